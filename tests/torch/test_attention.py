from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ml_networks.config import AttentionConfig, TransformerConfig
from ml_networks.torch import Attention1d, Attention2d, TransformerLayer
from ml_networks.torch.attention import MultiheadAttention

SHAPES = [
    (Attention1d, (2, 6, 7), 3, 1),
    (Attention1d, (1, 4, 12), 2, 3),
    (Attention1d, (3, 4, 1), 1, 1),
    (Attention2d, (2, 6, 5, 3), 2, 1),
    (Attention2d, (1, 8, 4, 10), 4, 2),
    (Attention2d, (2, 3, 3, 6), 1, 3),
]


def reference(layer: Any, x: Tensor) -> Tensor:
    """The same in float64, token by token: patches cut out by loops, softmax written out."""
    patch, heads, channels = layer.patch_size, layer.n_heads, layer.channels
    x = x.double()
    image = x if x.dim() == 4 else x.unsqueeze(2)
    weight = {
        name: (conv.conv.weight.double().reshape(-1, channels), conv.conv.bias.double())
        for name, conv in (("qkv", layer.qkv), ("out", layer.proj_out))
    }
    rows = patch if x.dim() == 4 else 1
    output = torch.empty_like(image)
    for sample in range(image.shape[0]):
        projected = torch.einsum("oc,chw->ohw", weight["qkv"][0], image[sample])
        projected = projected + weight["qkv"][1][:, None, None]
        corners = [
            (i, j) for i in range(0, image.shape[2], rows) for j in range(0, image.shape[3], patch)
        ]
        tokens = [projected[:, i : i + rows, j : j + patch].flatten() for i, j in corners]
        mixed = torch.empty_like(projected[:channels])
        split = torch.stack(tokens).reshape(len(tokens), heads, 3, -1)
        result = []
        for head in range(heads):
            query, key, value = split[:, head].unbind(1)
            scores = query @ key.T / math.sqrt(query.shape[1])
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            result.append(weights @ value)
        for (i, j), token in zip(corners, torch.cat(result, 1), strict=True):
            mixed[:, i : i + rows, j : j + patch] = token.reshape(channels, rows, patch)
        out = torch.einsum("oc,chw->ohw", weight["out"][0], mixed)
        output[sample] = image[sample] + out + weight["out"][1][:, None, None]
    return output.reshape(x.shape)


def _case(cls: Any, shape: tuple[int, ...], nhead: int, patch: int) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return cls(shape[1], nhead, patch), torch.randn(shape)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_the_reference(case: Any, dtype: torch.dtype) -> None:
    layer, x = _case(*case)
    layer, x = layer.to(dtype), x.to(dtype)
    with torch.no_grad():
        expected = reference(layer, x)
        actual = layer(x).double()
        # As far off as the path that stores the scores in the same type, twice, plus 4 ulp.
        with sdpa_kernel(SDPBackend.MATH):
            plain = (layer(x).double() - expected).abs().max()
    ulp = torch.finfo(dtype).eps * expected.abs().max()
    assert (actual - expected).abs().max() <= 2 * plain + 4 * ulp


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_gradients(case: Any) -> None:
    layer, x = _case(*case)
    layer = layer.double()
    assert torch.autograd.gradcheck(layer, (x.double().requires_grad_(),))


@pytest.mark.parametrize("cls", [Attention1d, Attention2d])
def test_strided_input_and_gradient(cls: Any) -> None:
    layer, x = _case(cls, (2, 4, 6, 4) if cls is Attention2d else (2, 4, 6), 2, 2)
    strided = x.repeat_interleave(2, -1)[..., ::2].transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(layer(strided), layer(x), rtol=0, atol=1e-6)
    inputs = [x.clone().requires_grad_(), strided.clone().requires_grad_()]
    cotangents = torch.ones_like(x), torch.ones(()).expand_as(x)
    for value, cotangent in zip(inputs, cotangents, strict=True):
        layer(value).backward(cotangent)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-5)


def test_batch_dimensions() -> None:
    layer, x = _case(Attention2d, (6, 4, 2, 3), 2, 1)
    expected = layer(x)
    torch.testing.assert_close(layer(x.reshape(2, 3, 4, 2, 3)).flatten(0, 1), expected)
    torch.testing.assert_close(layer(x[0]), expected[0])
    assert layer(x[:0]).shape == (0, 4, 2, 3)
    assert layer(x[:0].reshape(0, 3, 4, 2, 3)).shape == (0, 3, 4, 2, 3)
    assert Attention1d(4, 2)(torch.zeros(0, 4, 5)).shape == (0, 4, 5)


class _LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("side", [16, 32])
def test_memory_is_linear_in_the_positions(side: int) -> None:
    layer, x = _case(Attention2d, (1, 8, side, side), 4, 1)
    with _LargestTensor() as largest:
        layer(x.requires_grad_()).sum().backward()
    assert largest.numel == 3 * x.numel()  # query, key and value
    with _LargestTensor() as largest, sdpa_kernel(SDPBackend.MATH):
        layer(x).sum().backward()
    assert largest.numel == 4 * side**4  # the scores: this test would see them


def test_second_derivatives_by_the_math_path() -> None:
    layer, x = _case(Attention1d, (1, 2, 3), 1, 1)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(layer.double(), (x.double().requires_grad_(),))


def test_arguments() -> None:
    assert Attention2d(in_channels=8, nhead=2).channels == 8
    for cfg in (AttentionConfig(nhead=4, patch_size=2), {"nhead": 4, "patch_size": 2}):
        assert Attention1d(8, attn_cfg=cfg).n_heads == 4  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs nhead, or attn_cfg"):
        Attention1d(8)
    with pytest.raises(TypeError, match="did you mean 'nhead'"):
        Attention1d(8, n_head=2)
    with pytest.raises(ValueError, match=r"nhead=3 does not divide the 8 channels.*1, 2, 4, 8"):
        Attention2d(8, 3)
    with pytest.raises(ValueError, match="patch_size of Attention2d must be at least 1, got 0"):
        Attention2d(8, 2, 0)


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (8, 4), (2, 8, 4)])
def test_wrong_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Attention2d expects .* with 8 channels, got \("):
        Attention2d(8, 2)(torch.zeros(shape))


def test_patches_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="patches of 2, which does not divide"):
        Attention2d(8, 2, 2)(torch.zeros(1, 8, 4, 5))
    with pytest.raises(ValueError, match="pad to a multiple of 3"):
        Attention1d(8, 2, 3)(torch.zeros(1, 8, 10))


class TestMultiheadAttention:
    """Against the class of torch that it stands for."""

    @pytest.mark.parametrize("case", ["self", "cross", "position", "no_bias"])
    def test_equals_that_of_torch(self, case: str) -> None:
        torch.manual_seed(0)
        theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True, bias=case != "no_bias")
        torch.manual_seed(0)
        ours = MultiheadAttention(12, 3, batch_first=True, bias=case != "no_bias")
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, other)
        x, y = torch.randn(2, 7, 12), torch.randn(2, 5, 12)
        inputs = {"cross": (x, y, y), "position": (x, x, 2 * x)}.get(case, (x, x, x))
        results = []
        for layer in (theirs, ours):
            output = layer(*inputs, need_weights=False)[0]
            gradients = torch.autograd.grad(output.sin().sum(), list(layer.parameters()))
            results.append((output, *gradients))
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other)

    def test_what_it_leaves_to_torch(self) -> None:
        torch.manual_seed(0)
        layer = MultiheadAttention(8, 2, batch_first=True)
        x = torch.randn(2, 4, 8)
        output, weights = layer(x, x, x)
        assert weights is not None
        assert weights.shape == (2, 4, 4)
        torch.testing.assert_close(output, layer(x, x, x, need_weights=False)[0])
        hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)
        masked, _ = layer(x, x, x, attn_mask=hidden, need_weights=False)
        torch.testing.assert_close(masked[:, -1], output[:, -1])
        assert not torch.allclose(masked[:, 0], output[:, 0])

    def test_dropout_only_in_training(self) -> None:
        torch.manual_seed(0)
        layer = MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        x = torch.randn(2, 4, 8)
        first, second = (layer(x, x, x, need_weights=False)[0] for _ in range(2))
        assert not torch.equal(first, second)
        layer.eval()
        first, second = (layer(x, x, x, need_weights=False)[0] for _ in range(2))
        assert torch.equal(first, second)

    def test_a_transformer_has_it_with_the_weights_it_drew(self) -> None:
        cfg = TransformerConfig(d_model=8, nhead=2, dim_ff=16, n_layers=1)
        torch.manual_seed(0)
        (layer,) = TransformerLayer(8, 0, cfg).transformer.layers
        torch.manual_seed(0)
        plain = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        assert isinstance(layer.self_attn, MultiheadAttention)
        for name, value in plain.state_dict().items():
            assert torch.equal(value, layer.state_dict()[name]), name
        assert all(parameter.requires_grad for parameter in layer.parameters())
