r"""Sizes of convolution outputs, one axis at a time or for a whole shape; shapes of states.

With padding :math:`p`, kernel :math:`k`, stride :math:`s` and dilation :math:`d`, a convolution
maps a length :math:`n` to :math:`\lfloor (n + 2p - d(k - 1) - 1) / s \rfloor + 1`, and a
transposed convolution with output padding :math:`o` maps it to
:math:`(n - 1) s - 2p + d(k - 1) + o + 1`.

The functions are the plain formulas: a result below one says that no such layer exists. In the
``*_shape`` functions ``shape`` holds the spatial sides only, and every other argument is one
integer for all sides or a tuple with one for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = [
    "BernoulliShape",
    "CategoricalShape",
    "NormalShape",
    "conv_out",
    "conv_out_shape",
    "conv_transpose_in",
    "conv_transpose_in_shape",
    "conv_transpose_out",
    "conv_transpose_out_shape",
    "output_padding",
    "output_padding_shape",
]

PerSide = int | Sequence[int]
Shape = tuple[int, ...]


def conv_out(h_in: int, padding: int, kernel_size: int, stride: int, dilation: int = 1) -> int:
    """Return the length that a convolution makes of ``h_in``."""
    return (h_in + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1


def conv_transpose_out(
    h_in: int,
    padding: int,
    kernel_size: int,
    stride: int,
    dilation: int = 1,
    output_padding: int = 0,
) -> int:
    """Return the length that a transposed convolution makes of ``h_in``."""
    return (h_in - 1) * stride - 2 * padding + dilation * (kernel_size - 1) + output_padding + 1


def conv_transpose_in(
    h_out: int,
    padding: int,
    kernel_size: int,
    stride: int,
    dilation: int = 1,
    output_padding: int = 0,
) -> int:
    """Return the largest length of which a transposed convolution makes at most ``h_out``."""
    surplus = h_out - 1 - output_padding - dilation * (kernel_size - 1) + 2 * padding
    return surplus // stride + 1


def output_padding(
    h_in: int, h_out: int, padding: int, kernel_size: int, stride: int, dilation: int = 1
) -> int:
    """Return the output padding with which a transposed convolution undoes a convolution.

    ``h_in`` and ``h_out`` are the lengths before and after the convolution: the result is what
    the transposed convolution of ``h_out`` is short of ``h_in``. Outside ``[0, stride)`` no
    output padding does it.
    """
    return h_in - conv_transpose_out(h_out, padding, kernel_size, stride, dilation)


def conv_out_shape(
    shape: Sequence[int],
    padding: PerSide,
    kernel_size: PerSide,
    stride: PerSide,
    dilation: PerSide = 1,
) -> tuple[int, ...]:
    """Return :func:`conv_out` of every side of ``shape``."""
    return _per_side(conv_out, shape, padding, kernel_size, stride, dilation)


def conv_transpose_out_shape(
    in_shape: Sequence[int],
    padding: PerSide,
    kernel_size: PerSide,
    stride: PerSide,
    dilation: PerSide = 1,
    output_padding: PerSide = 0,
) -> tuple[int, ...]:
    """Return :func:`conv_transpose_out` of every side of ``in_shape``."""
    return _per_side(
        conv_transpose_out, in_shape, padding, kernel_size, stride, dilation, output_padding
    )


def conv_transpose_in_shape(
    out_shape: Sequence[int],
    padding: PerSide,
    kernel_size: PerSide,
    stride: PerSide,
    dilation: PerSide = 1,
    output_padding: PerSide = 0,
) -> tuple[int, ...]:
    """Return :func:`conv_transpose_in` of every side of ``out_shape``."""
    return _per_side(
        conv_transpose_in, out_shape, padding, kernel_size, stride, dilation, output_padding
    )


def output_padding_shape(
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    padding: PerSide,
    kernel_size: PerSide,
    stride: PerSide,
    dilation: PerSide = 1,
) -> tuple[int, ...]:
    """Return :func:`output_padding` of every pair of sides of ``in_shape`` and ``out_shape``."""
    return _per_side(output_padding, in_shape, out_shape, padding, kernel_size, stride, dilation)


def _per_side(
    function: Callable[..., int], shape: Sequence[int], *arguments: PerSide
) -> tuple[int, ...]:
    columns = [
        [argument] * len(shape) if isinstance(argument, int) else list(argument)
        for argument in arguments
    ]
    for column in columns:
        if len(column) != len(shape):
            raise ValueError(
                f"{function.__name__}_shape: got {tuple(column)} for the {len(shape)} sides "
                f"{tuple(shape)}; give one integer, or one for each side"
            )
    return tuple(function(*sides) for sides in zip(shape, *columns, strict=True))


def show_shapes(name: str, shapes: Mapping[str, Any]) -> str:
    """Return ``name(field: shape, ...)``."""
    return f"{name}({', '.join(f'{field}: {shape}' for field, shape in shapes.items())})"


class NormalShape(NamedTuple):
    """Shapes of the fields of a ``NormalStoch``, of either framework."""

    mean: Shape
    std: Shape
    stoch: Shape

    def __repr__(self) -> str:
        return show_shapes("NormalShape", self._asdict())


class CategoricalShape(NamedTuple):
    """Shapes of the fields of a ``CategoricalStoch``, of either framework."""

    logits: Shape
    probs: Shape
    stoch: Shape

    def __repr__(self) -> str:
        return show_shapes("CategoricalShape", self._asdict())


class BernoulliShape(NamedTuple):
    """Shapes of the fields of a ``BernoulliStoch``, of either framework."""

    logits: Shape
    probs: Shape
    stoch: Shape

    def __repr__(self) -> str:
        return show_shapes("BernoulliShape", self._asdict())
