"""A convolution without a norm behind it as one op, as on a GPU, against its separate steps."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ml_networks.config import ConvConfig  # noqa: E402
from ml_networks.torch import layers  # noqa: E402
from ml_networks.torch.layers import ConvNormActivation, ConvNormActivation1d  # noqa: E402
from ml_networks.torch.unet import HyperConditionalResidualBlock2d  # noqa: E402

CONFIGS: list[dict[str, Any]] = [
    {"activation": "ReLU", "stride": 2},
    {"activation": "GELU", "scale_factor": 2, "padding_mode": "reflect", "groups": 2},
    {"activation": "GLU", "scale_factor": -2, "bias": False, "dilation": 2, "padding": 2},
    {"activation": "SiLU", "norm": "batch", "norm_first": True, "padding_mode": "circular"},
]


def make(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(4, 8, ConvConfig(**{"kernel_size": 3, "stride": 1, "padding": 1, **options}))


def is_one(layer: Any) -> bool:
    shuffle = getattr(layer, "pixel_shuffle", getattr(layer, "horizontal_shuffle", None))
    return layers._is_one_convolution(layer, shuffle)


@pytest.mark.parametrize("kind", [ConvNormActivation, ConvNormActivation1d])
@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_one_op_equals_the_steps(options: dict[str, Any], kind: Any) -> None:
    layer = make(kind, **options).eval()
    assert is_one(layer)
    x = torch.randn(2, 4, 6, 8) if kind is ConvNormActivation else torch.randn(2, 4, 8)
    wanted = [x.requires_grad_(), *layer.parameters()]
    steps, whole = layer(x), layers._one_convolution(layer, x)
    torch.testing.assert_close(whole, steps)
    for found, exact in zip(
        torch.autograd.grad(whole.square().sum(), wanted),
        torch.autograd.grad(steps.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(found, exact)


def test_dropout_is_drawn_while_training_alone() -> None:
    layer = make(ConvNormActivation, activation="Identity", dropout=0.25)
    x = torch.randn(4, 4, 16, 16)
    whole = layers._one_convolution(layer, x)
    assert abs((whole == 0).float().mean() - 0.25) < 0.05
    torch.testing.assert_close(whole[whole != 0], (layer.eval()(x) / 0.75)[whole != 0])


@pytest.mark.parametrize("change", ["hook", "conv", "activation", "norm", "weight", "shuffle"])
def test_a_changed_layer_keeps_to_its_steps(change: str) -> None:
    layer = make(ConvNormActivation, activation="ReLU", scale_factor=2)
    assert is_one(layer)
    if change == "hook":
        layer.norm.register_forward_hook(lambda module, inputs, output: output)
    elif change == "conv":
        layer.conv = torch.nn.Sequential(layer.conv)
        layer.conv.weight = None
    elif change == "activation":
        layer = make(ConvNormActivation, activation="PReLU")
    elif change == "norm":
        layer = make(ConvNormActivation, norm="batch")
    elif change == "weight":
        torch.nn.utils.parametrizations.weight_norm(layer.conv)
    else:
        layer.pixel_shuffle = torch.nn.Sequential(layer.pixel_shuffle)
    assert not is_one(layer)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_block_with_made_weights_is_made_of_ops(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the activation in the op too where no norm lies between."""
    cfg = ConvConfig(kernel_size=3, stride=1, padding=1, activation="SiLU", norm=norm)
    block = HyperConditionalResidualBlock2d(4, 4, 3, cfg).eval()
    x, cond = torch.randn(3, 4, 5, 5), torch.randn(3, 3)
    expected = block(x, cond)
    if norm == "none":
        monkeypatch.setattr(
            ConvNormActivation, "forward", lambda layer, x: layers._one_convolution(layer, x)
        )
    seen = []
    op = layers.conv_shuffle

    def listen(x: Any, weight: Any, *arguments: Any, **options: Any) -> Any:
        seen.append((weight.dim(), options.get("activation", "none")))
        return op(x, weight, *arguments, **options)

    monkeypatch.setattr(layers, "conv_shuffle", listen)
    torch.testing.assert_close(block(x, cond), expected)
    assert seen == [(5, "SiLU" if norm == "none" else "none")] * 2
