from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from ml_networks import (
    conv_out,
    conv_out_shape,
    conv_transpose_in,
    conv_transpose_in_shape,
    conv_transpose_out,
    conv_transpose_out_shape,
    output_padding,
    output_padding_shape,
)

SMALL = {
    "length": st.integers(1, 20),
    "padding": st.integers(0, 3),
    "kernel": st.integers(1, 5),
    "stride": st.integers(1, 4),
    "dilation": st.integers(1, 3),
}


@given(**SMALL)
def test_conv_out_is_what_torch_makes(
    length: int, padding: int, kernel: int, stride: int, dilation: int
) -> None:
    expected = conv_out(length, padding, kernel, stride, dilation)
    assume(expected >= 1)
    conv = nn.Conv1d(1, 1, kernel, stride, padding, dilation)
    assert conv(torch.zeros(1, 1, length)).shape[-1] == expected


@given(**SMALL, extra=st.integers(0, 3))
def test_conv_transpose_is_what_torch_makes_and_its_inverse(
    length: int, padding: int, kernel: int, stride: int, dilation: int, extra: int
) -> None:
    assume(extra < max(stride, dilation))
    made = conv_transpose_out(length, padding, kernel, stride, dilation, extra)
    assert conv_transpose_in(made, padding, kernel, stride, dilation, extra) == length
    assume(made >= 1)
    conv = nn.ConvTranspose1d(1, 1, kernel, stride, padding, extra, dilation=dilation)
    assert conv(torch.zeros(1, 1, length)).shape[-1] == made


@given(**SMALL)
def test_output_padding_undoes_a_convolution(
    length: int, padding: int, kernel: int, stride: int, dilation: int
) -> None:
    out = conv_out(length, padding, kernel, stride, dilation)
    extra = output_padding(length, out, padding, kernel, stride, dilation)
    assert 0 <= extra < stride
    assert conv_transpose_out(out, padding, kernel, stride, dilation, extra) == length


def test_shapes_go_side_by_side() -> None:
    assert conv_out_shape((28, 30), 1, 3, 2) == (14, 15)
    assert conv_out_shape((28, 30), (1, 0), (3, 5), (2, 1), 1) == (14, 26)
    assert conv_transpose_out_shape((7, 8), 1, 3, 2, 1, (1, 0)) == (14, 15)
    assert conv_transpose_in_shape((14, 15), 1, 3, 2, 1, (1, 0)) == (7, 8)
    assert output_padding_shape((14, 15), (7, 8), 1, 3, 2) == (1, 0)


def test_wrong_number_of_sides() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 3\) for the 2 sides"):
        conv_out_shape((28, 28), (1, 2, 3), 3, 1)
