"""The linear layer as one op, as on a GPU, against its separate steps."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ml_networks.config import LinearConfig, MLPConfig  # noqa: E402
from ml_networks.kernels.core.activations import NAMES  # noqa: E402
from ml_networks.torch.layers import LinearNormActivation, MLPLayer  # noqa: E402

CONFIGS: list[dict[str, Any]] = [
    *({"activation": name} for name in NAMES),
    *(
        {"activation": "SwiGLU", "norm": norm, "norm_first": first, "bias": not first}
        for norm in ("layer", "rms")
        for first in (False, True)
    ),
    {"activation": "GELU", "norm": "layer", "norm_cfg": {"elementwise_affine": False}},
    {"activation": "GELU", "norm": "layer", "norm_cfg": {"bias": False, "eps": 0.1}},
    {"activation": "ReLU", "norm": "rms", "norm_cfg": {"eps": 0.5}, "dropout": 0.5},
]


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_one_op_equals_the_steps(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = LinearNormActivation(6, 5, LinearConfig(**{"norm": "none", **options})).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    assert layer._is_one_op()
    x = torch.randn(2, 3, 6, requires_grad=True)
    wanted = [x, *layer.parameters()]
    steps, whole = layer(x), layer._one_op(x)
    torch.testing.assert_close(whole, steps)
    for found, exact in zip(
        torch.autograd.grad(whole.square().sum(), wanted),
        torch.autograd.grad(steps.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(found, exact)


def test_dropout_is_drawn_while_training_alone() -> None:
    layer = LinearNormActivation(6, 64, LinearConfig(activation="Identity", dropout=0.25))
    x = torch.randn(32, 6)
    whole = layer._one_op(x)
    assert abs((whole == 0).float().mean() - 0.25) < 0.05
    torch.testing.assert_close(whole[whole != 0], (layer.eval()(x) / 0.75)[whole != 0])
    assert not (layer._one_op(x) == 0).any()


@pytest.mark.parametrize("change", ["hook", "linear", "activation", "dropout", "weight"])
def test_a_changed_layer_keeps_to_its_steps(change: str) -> None:
    layer = LinearNormActivation(6, 6, LinearConfig(activation="ReLU", norm="layer"))
    assert layer._is_one_op()
    if change == "hook":
        layer.norm.register_forward_hook(lambda module, inputs, output: output)
    elif change == "linear":
        layer.linear = torch.nn.Sequential(layer.linear)
    elif change == "activation":
        layer = LinearNormActivation(6, 6, LinearConfig(activation="PReLU"))
    elif change == "dropout":
        layer.dropout = torch.nn.Dropout(1.0)
    else:
        del layer.linear.weight
        layer.linear.weight = torch.zeros(6, 6)
    assert not layer._is_one_op()


# Tracing an autograd.Function, torch._dynamo instantiates it, which torch.autograd deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_an_mlp_of_one_ops_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearNormActivation, "forward", LinearNormActivation._one_op)
    cfg = MLPConfig(8, 2, "Tanh", LinearConfig(activation="SwiGLU", norm="rms"))
    mlp = MLPLayer(6, 3, cfg)
    assert all(layer._is_one_op() for layer in mlp.dense)
    torch._dynamo.reset()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    for rows in (4, 7):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(compiled(x), mlp(x))
