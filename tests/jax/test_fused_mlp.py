"""The MLP as one op, as on a GPU, against its layers one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="jax is not installed")

from flax import nnx  # noqa: E402

from ml_networks.config import LinearConfig, MLPConfig  # noqa: E402
from ml_networks.jax.layers import LinearNormActivation, MLPLayer  # noqa: E402

CONFIGS: list[tuple[int, dict[str, Any]]] = [
    (2, {"activation": "SwiGLU", "norm": "rms", "bias": False}),
    (1, {"activation": "Mish", "norm": "layer", "norm_cfg": {"bias": False, "eps": 0.1}}),
]


def make(layers: int = 2, **options: Any) -> MLPLayer:
    cfg = MLPConfig(8, layers, "Tanh", LinearConfig(**options))
    return MLPLayer(6, 3, cfg, rngs=jax.random.key(0))


@pytest.mark.parametrize(("layers", "options"), CONFIGS, ids=str)
def test_one_op_equals_the_layers(layers: int, options: dict[str, Any]) -> None:
    mlp = make(layers, **options)
    assert mlp._is_one_op()
    x = jax.random.normal(jax.random.key(1), (2, 3, 6))
    np.testing.assert_allclose(mlp._one_op(x), mlp(x), rtol=1e-5, atol=1e-5)


def test_a_changed_mlp_keeps_to_its_layers() -> None:
    mlp = make(activation="ReLU", norm="layer")
    assert mlp._is_one_op()
    assert not make(activation="ReLU", norm="layer", norm_first=True)._is_one_op()
    assert not make(activation="PReLU")._is_one_op()
    layer = LinearConfig("ReLU", norm="layer", norm_cfg={"eps": 0.1})
    mlp.layers[1] = LinearNormActivation(8, 8, layer, rngs=jax.random.key(2))
    assert not mlp._is_one_op()
    mlp.layers[1] = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    assert not mlp._is_one_op()


def test_what_drops_keeps_to_its_layers_while_training() -> None:
    mlp = make(activation="ReLU", dropout=0.5)
    assert not mlp._is_one_op()
    mlp.eval()
    assert mlp._is_one_op()
