"""What follows a convolution as one op, as on a GPU, against its separate steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="jax is not installed")

from flax import nnx  # noqa: E402

from ml_networks.config import ConvConfig  # noqa: E402
from ml_networks.jax import layers  # noqa: E402
from ml_networks.jax.inference import fuse_for_inference  # noqa: E402
from ml_networks.kernels import use_implementation  # noqa: E402
from ml_networks.kernels.core import pallas  # noqa: E402

GROUP = {"norm": "group", "norm_cfg": {"num_groups": 2}}


def config(**options: Any) -> ConvConfig:
    return ConvConfig(**{"kernel_size": 3, "stride": 1, "padding": 1, **options})


def varied(module: nnx.Module) -> nnx.Module:
    state = nnx.state(module, nnx.Param)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(state))))
    nnx.update(module, jax.tree.map(lambda v: jax.random.normal(next(keys), v.shape) / 2, state))
    return module


def close(found: Any, exact: Any) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_convolutions(training: bool) -> None:
    cfg = config(activation="ReLU", norm="batch", scale_factor=2)
    steps, whole = (
        varied(layers.ConvNormActivation(3, 4, cfg, rngs=jax.random.key(0))) for _ in range(2)
    )
    for layer in (steps, whole):
        layer.train() if training else layer.eval()
    x = jax.random.normal(jax.random.key(1), (2, 3, 4, 6))

    @nnx.jit
    def in_one(layer: Any, x: jax.Array) -> jax.Array:
        hidden = layer.conv(x)
        assert layers._is_one_tail(layer, hidden)
        return layers._one_tail(layer, hidden, shuffle=layer.scale_factor)

    close(in_one(whole, x), nnx.jit(lambda layer, x: layer(x))(steps, x))
    close(nnx.state(whole), nnx.state(steps))


@pytest.mark.parametrize(
    ("implementation", "activation", "norm"),
    [("pallas", "SiLU", {"norm": "batch"}), ("xla", "GLU", GROUP)],
)
def test_residual_blocks(implementation: str, activation: str, norm: dict[str, Any]) -> None:
    cfg = config(activation=activation, **norm)
    block = varied(layers.ResidualBlock(in_channels=4, conv_cfg=cfg, rngs=jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 6))

    @nnx.jit
    def in_one(block: Any, x: jax.Array) -> jax.Array:
        hidden = block.conv2.conv(block.conv1(x))
        assert block._may_be_one_op()
        assert layers._is_one_tail(block.conv2, hidden)
        return block._one_op(hidden, x)

    exact = nnx.jit(lambda block, x: block(x))(block, x)
    with pallas.interpret(), use_implementation(implementation, "norm_activation_shuffle"):
        close(in_one(block, x), exact)


def test_what_keeps_to_its_steps() -> None:
    x = jax.numpy.ones((2, 4, 3, 3))
    weighted = layers.ConvNormActivation(
        4, 4, config(activation="PReLU", norm="batch"), rngs=jax.random.key(0)
    )
    bare = layers.ConvNormActivation(
        4, 4, config(activation="ReLU", norm="none"), rngs=jax.random.key(0)
    )
    normed = layers.ConvNormActivation(
        4, 4, config(activation="ReLU", norm="batch"), rngs=jax.random.key(0)
    )
    assert not layers._is_one_tail(weighted, x)
    assert not layers._is_one_tail(bare, x)
    assert layers._is_one_tail(normed, x)
    assert not layers._is_one_tail(normed, x[0])
    assert not layers._is_one_tail(normed, x[:1, :, :1, :1])


def test_a_changed_residual_block_keeps_to_its_steps() -> None:
    cfg = config(activation="ReLU", norm="batch")
    for change in ("dropout", "norm_first", "folded"):
        more = {"dropout": 0.5} if change == "dropout" else {}
        more = {"norm_first": True} if change == "norm_first" else more
        altered = dataclasses.replace(cfg, **more)
        block = layers.ResidualBlock(in_channels=4, conv_cfg=altered, rngs=jax.random.key(0))
        if change == "folded":
            block.eval()
            fuse_for_inference(block)
        assert not block._may_be_one_op()
