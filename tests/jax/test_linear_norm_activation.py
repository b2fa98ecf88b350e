"""The linear layer as one op, as on a GPU, against its separate steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="jax is not installed")

from ml_networks.config import LinearConfig  # noqa: E402
from ml_networks.jax.layers import LinearNormActivation  # noqa: E402
from ml_networks.jax.primitives import RMSNorm  # noqa: E402
from tests.jax.conftest import Arrays  # noqa: E402

CONFIGS: list[dict[str, Any]] = [
    {"activation": "GELU", "norm": "layer"},
    {"activation": "SwiGLU", "norm": "rms", "norm_first": True, "bias": False},
    {"activation": "Mish", "norm": "layer", "norm_cfg": {"bias": False, "eps": 0.1}},
    {"activation": "ReLU", "norm": "none"},
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_one_op_equals_the_steps(options: dict[str, Any], dtype: str) -> None:
    layer = LinearNormActivation(6, 5, LinearConfig(**options), rngs=jax.random.key(0))
    assert layer._is_one_op()
    x = jax.random.normal(jax.random.key(1), (2, 3, 6), dtype)
    steps, whole = layer(x), layer._one_op(x)
    assert whole.dtype == steps.dtype
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.04, "atol": 0.04}
    np.testing.assert_allclose(np.float32(whole), np.float32(steps), **close)


def test_an_activation_with_weights_keeps_to_its_steps() -> None:
    layer = LinearNormActivation(6, 5, LinearConfig(activation="PReLU"), rngs=jax.random.key(0))
    assert not layer._is_one_op()


def test_rms_norm_has_torchs_epsilon_in_half_precision(from_torch: Any) -> None:
    """Of float32, in which both compute: at 1e-3 that of bfloat16 would be all there is."""
    x = np.full((1, 6), 1e-3, np.float32)

    def in_torch() -> Arrays:
        import torch

        norm = torch.nn.RMSNorm(6, dtype=torch.bfloat16)
        return {"y": norm(torch.tensor(x).bfloat16()).float().detach().numpy()}

    y = RMSNorm(6)(jax.numpy.asarray(x, "bfloat16"))
    np.testing.assert_allclose(np.float32(y), from_torch(in_torch)["y"], rtol=0.01)
