"""The MLP as one op, as on a GPU, against its layers one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ml_networks.config import LinearConfig, MLPConfig  # noqa: E402
from ml_networks.torch.layers import LinearNormActivation, MLPLayer  # noqa: E402

CONFIGS: list[tuple[int, dict[str, Any]]] = [
    (1, {"activation": "ReLU"}),
    (0, {"activation": "GELU", "norm": "layer", "norm_cfg": {"elementwise_affine": False}}),
    (2, {"activation": "SiLU", "norm": "rms", "norm_cfg": {"eps": 0.5}, "dropout": 0.5}),
    (3, {"activation": "Mish", "norm": "layer", "norm_cfg": {"bias": False}, "bias": False}),
    (2, {"activation": "SwiGLU", "norm": "rms"}),
]


def make(layers: int = 2, **options: Any) -> MLPLayer:
    torch.manual_seed(0)
    mlp = MLPLayer(6, 3, MLPConfig(8, layers, "Tanh", LinearConfig(**options)))
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    return mlp


@pytest.mark.parametrize(("layers", "options"), CONFIGS, ids=str)
def test_one_op_equals_the_layers(layers: int, options: dict[str, Any]) -> None:
    mlp = make(layers, **options).eval()
    assert mlp._is_one_op()
    x = torch.randn(2, 3, 6, requires_grad=True)
    wanted = [x, *mlp.parameters()]
    steps, whole = mlp(x), mlp._one_op(x)
    torch.testing.assert_close(whole, steps)
    for found, exact in zip(
        torch.autograd.grad(whole.square().sum(), wanted),
        torch.autograd.grad(steps.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_dropout_is_drawn_while_training_alone() -> None:
    mlp = make(1, activation="Identity", dropout=0.5)
    x = torch.randn(64, 6)
    assert abs((mlp._one_op(x) == 0).float().mean() - 0.5) < 0.1
    torch.testing.assert_close(mlp.eval()._one_op(x), mlp(x))


def _replace_by(mlp: MLPLayer, **changed: Any) -> None:
    """Make the second hidden layer anew with another config."""
    cfg = dataclasses.replace(mlp.cfg.linear_cfg, **changed)
    mlp.dense[1] = LinearNormActivation(8, 8, cfg)


CHANGES = {
    "a hook": lambda mlp: mlp.dense[1].register_forward_hook(lambda *_: None),
    "a hook inside": lambda mlp: mlp.dense[1].norm.register_forward_hook(lambda *_: None),
    "a hook on all": lambda mlp: mlp.dense.register_forward_pre_hook(lambda *_: None),
    "another module": lambda mlp: mlp.dense.__setitem__(1, torch.nn.Linear(8, 8)),
    "another list": lambda mlp: setattr(mlp, "dense", torch.nn.ModuleList(mlp.dense)),
    "norm first": lambda mlp: _replace_by(mlp, norm_first=True),
    "another norm": lambda mlp: _replace_by(mlp, norm="rms"),
    "another epsilon": lambda mlp: _replace_by(mlp, norm_cfg={"eps": 0.1}),
    "another activation": lambda mlp: _replace_by(mlp, activation="GELU"),
    "an activation with weights": lambda mlp: _replace_by(mlp, activation="PReLU"),
    "no bias": lambda mlp: _replace_by(mlp, bias=False),
    "another dropout": lambda mlp: _replace_by(mlp, dropout=0.5),
    "one layer": lambda mlp: mlp.dense.__delitem__(slice(0, 2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_mlp_keeps_to_its_layers(change: str) -> None:
    mlp = make(activation="ReLU", norm="layer")
    assert mlp._is_one_op()
    CHANGES[change](mlp)
    assert not mlp._is_one_op()


def test_on_a_cpu_the_layers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(MLPLayer, "_one_op")
    monkeypatch.delattr(MLPLayer, "_is_one_op")
    assert make(activation="ReLU")(torch.randn(4, 6)).shape == (4, 3)


# Tracing an autograd.Function, torch._dynamo instantiates it, which torch.autograd deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_one_op_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MLPLayer, "forward", MLPLayer._one_op)
    mlp = make(activation="SiLU", norm="rms")
    torch._dynamo.reset()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    for rows in (4, 7):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(compiled(x), mlp(x))
