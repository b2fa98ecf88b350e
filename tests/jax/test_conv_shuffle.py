"""A convolution without a norm behind it as one op, as on a GPU, against its separate steps."""

from __future__ import annotations

from typing import Any

import pytest

jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from ml_networks.config import ConvConfig  # noqa: E402
from ml_networks.jax import layers, unet  # noqa: E402


def make(kind: Any, **options: Any) -> Any:
    cfg = ConvConfig(**{"kernel_size": 3, "stride": 1, "padding": 1, **options})
    return kind(4, 8, cfg, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (layers.ConvNormActivation, {"activation": "GLU", "scale_factor": 2, "groups": 2}),
        (
            layers.ConvNormActivation1d,
            {"scale_factor": -2, "bias": False, "padding_mode": "reflect"},
        ),
    ],
)
def test_one_op_equals_the_steps(
    kind: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make(kind, **options)
    layer.eval()
    x = jax.random.normal(jax.random.key(0), (2, 4, *(6, 8)[-layer.sides :]))
    assert layers._is_one_convolution(layer, x)
    assert not layers._is_one_convolution(layer, x[0])
    steps = layer(x)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_allclose(layer(x), steps, rtol=1e-5, atol=1e-5)


def test_layers_that_keep_to_their_steps() -> None:
    x = jnp.ones((2, 4, 6, 8))
    for options in ({"activation": "PReLU"}, {"norm": "batch"}):
        assert not layers._is_one_convolution(make(layers.ConvNormActivation, **options), x)


@pytest.mark.parametrize("norm", ["none", "group"])
def test_a_block_with_made_weights_is_made_of_ops(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the activation in the op too where no norm lies between."""
    norm_cfg = {"num_groups": 2} if norm == "group" else {}
    cfg = ConvConfig(
        kernel_size=3, stride=1, padding=1, activation="SiLU", norm=norm, norm_cfg=norm_cfg
    )
    block = unet.HyperConditionalResidualBlock2d(4, 4, 3, cfg, rngs=nnx.Rngs(0))
    x, cond = (jax.random.normal(jax.random.key(0), shape) for shape in ((3, 4, 5, 5), (3, 3)))
    expected = block(x, cond)
    seen = []
    op = layers.conv_shuffle

    def listen(x: Any, weight: Any, *arguments: Any, **options: Any) -> Any:
        seen.append((weight.ndim, options.get("activation", "none")))
        return op(x, weight, *arguments, **options)

    monkeypatch.setattr(layers, "conv_shuffle", listen)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_allclose(block(x, cond), expected, rtol=1e-5, atol=1e-5)
    assert seen == [(5, "SiLU" if norm == "none" else "none")] * 2
    # XLA cannot divide a kernel among several devices.
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    np.testing.assert_allclose(block(x, cond), expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 2
