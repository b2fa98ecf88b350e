"""Folding batch norms: the same outputs, and everything else as it was."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ml_networks.config import ConvConfig, ConvNetConfig, LinearConfig, ResNetConfig, UNetConfig
from ml_networks.jax import (
    ConditionalUnet2d,
    ConvNormActivation,
    ConvNormActivation1d,
    ConvTransposeNormActivation,
    ConvTransposeNormActivation1d,
    Decoder,
    Encoder,
    fuse_for_inference,
    unfuse,
)
from ml_networks.jax.primitives import BatchNorm

pytestmark = pytest.mark.usefixtures("quick_compilation")


def conv(**fields: Any) -> ConvConfig:
    fields = {
        "activation": "SiLU",
        "kernel_size": 3,
        "stride": 1,
        "padding": 1,
        "norm": "batch",
    } | fields
    return ConvConfig(**fields)


def trained(module: Any) -> Any:
    """``module`` in evaluation mode, with weights and statistics far from the initial ones."""
    random = np.random.default_rng(0)
    for _, norm in nnx.iter_graph(module):
        if isinstance(norm, BatchNorm) and norm.mean is not None and norm.var is not None:
            norm.mean[...] = random.normal(0, 2, norm.features).astype(np.float32)
            norm.var[...] = random.uniform(0.01, 9, norm.features).astype(np.float32)
            for value in (norm.scale, norm.bias):
                if value is not None:
                    value[...] = random.normal(0, 2, norm.features).astype(np.float32)
    module.eval()
    return module


def normal(shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)


BLOCKS: dict[str, tuple[Any, ConvConfig, tuple[int, ...]]] = {
    "groups-stride-dilation": (
        ConvNormActivation,
        conv(groups=2, stride=2, dilation=2, bias=False, padding_mode="circular"),
        (2, 4, 9, 8),
    ),
    "shuffle": (ConvNormActivation, conv(scale_factor=2), (2, 4, 5, 7)),
    "unshuffle": (ConvNormActivation, conv(scale_factor=-2), (2, 4, 6, 8)),
    "not-affine": (ConvNormActivation, conv(norm_cfg={"affine": False}), (2, 4, 5, 7)),
    "norm-first": (ConvNormActivation, conv(norm_first=True, padding=0, groups=2), (2, 4, 5, 7)),
    "norm-first-reflect": (
        ConvNormActivation,
        conv(norm_first=True, padding_mode="reflect", bias=False),
        (2, 4, 5, 7),
    ),
    "1d-shuffle": (ConvNormActivation1d, conv(scale_factor=2, activation="SiGLU"), (2, 4, 9)),
    "transpose": (ConvTransposeNormActivation, conv(stride=2, groups=2), (2, 4, 5, 7)),
    "transpose-1d": (ConvTransposeNormActivation1d, conv(stride=2), (2, 4, 9)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    kind, cfg, shape = BLOCKS[name]
    block = trained(kind(4, 8, cfg, rngs=jax.random.key(0)))
    plain = type(block)
    x = normal(shape)
    expected = block(x)
    before = nnx.to_flat_state(nnx.state(block))

    fusion = fuse_for_inference(block)
    assert fusion.folded == ("norm",)
    assert not fusion.kept
    folded = block(x)
    assert jnp.abs(folded - expected).max() <= 1e-6 * jnp.abs(expected).max()
    assert not jnp.array_equal(folded, expected)
    after = nnx.to_flat_state(nnx.state(block))
    assert [path for path, _ in after] == [path for path, _ in before]
    for (_, one), (_, other) in zip(after, before, strict=True):
        assert jnp.array_equal(one[...], other[...])

    unfuse(block)
    assert type(block) is plain
    assert jnp.array_equal(block(x), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_whole_models(dtype: str) -> None:
    """In float32 a model of many norms may differ by rounding, as it does from its exact value."""
    layers = (conv(stride=2), conv(stride=2))
    linear, resnet = LinearConfig("Tanh"), ResNetConfig(4, 3, 3, "ReLU", "Tanh", 2, 2, 1, "batch")
    key = jax.random.key(0)
    encoder = Encoder(5, (3, 16, 16), ConvNetConfig((4, 8), layers), linear, rngs=key)
    decoder = Decoder(5, (3, 16, 16), resnet, linear, rngs=key)
    for module, shape in ((encoder, (3, 3, 16, 16)), (decoder, (3, 5))):
        x = np.asarray(normal(shape))
        with jax.enable_x64(True):
            trained(module)
            nnx.update(module, jax.tree.map(lambda v: v.astype("float64"), nnx.state(module)))
            exact = module(x.astype("float64"))
            nnx.update(module, jax.tree.map(lambda v: v.astype(dtype), nnx.state(module)))
            plain = module(x.astype(dtype))
            count = sum(isinstance(node, BatchNorm) for _, node in nnx.iter_graph(module))
            fusion = fuse_for_inference(module)
            assert len(fusion.folded) == count >= 2
            assert str(fusion) == f"batch norms: {count} folded, 0 kept"
            folded = module(x.astype(dtype))
            assert folded.dtype == dtype
            error, of_plain = (jnp.abs(y - exact).max() for y in (folded, plain))
            largest = jnp.abs(exact).max()
            if dtype == "float64":
                assert error <= 1e-12 * largest
            else:
                assert error <= 2 * of_plain + 4 * jnp.finfo(dtype).eps * largest


def test_what_stays_has_a_reason() -> None:
    def block(kind: Any = ConvNormActivation, **fields: Any) -> Any:
        return kind(4, 8, conv(**fields), rngs=jax.random.key(0))

    module = nnx.Dict(
        padded=block(norm_first=True),
        mixed=block(ConvNormActivation1d, scale_factor=-2),
        forgetful=block(norm_cfg={"track_running_stats": False}),
        alone=BatchNorm(4),
        group=block(norm="group", norm_cfg={"num_groups": 2}),
    )
    fusion = fuse_for_inference(module)
    assert not fusion.folded
    reasons = {
        "padded.norm": "it comes before a convolution that pads with zeros",
        "mixed.norm": "a shuffle mixes positions",
        "forgetful.norm": "it keeps no running statistics",
        "alone": "it is not part of a convolution block",
    }
    assert set(fusion.kept) == set(reasons)
    for name, reason in reasons.items():
        assert fusion.kept[name].startswith(reason), name
        assert f"  {name}: {reason}" in str(fusion)


def test_weights_made_per_sample_are_not_folded() -> None:
    cfg = UNetConfig((4, 8), conv(), use_hypernet=True)
    unet = ConditionalUnet2d(3, (4, 8, 8), cfg, rngs=jax.random.key(0))
    fusion = fuse_for_inference(unet)
    assert fusion.folded == ("final_conv1.norm",)
    assert set(fusion.kept.values()) == {"the weights of its convolution are made per sample"}


def test_training_and_new_weights() -> None:
    """A folded block that trains is an ordinary one, and evaluates with what it has learned."""
    cfg = conv()
    block, twin = (
        trained(ConvNormActivation(4, 8, cfg, rngs=jax.random.key(0))) for _ in range(2)
    )
    fuse_for_inference(block)
    x = normal((2, 4, 5, 7))
    for module in (block, twin):
        module.train()
    assert jnp.array_equal(block(x), twin(x))
    for module in (block, twin):
        module.eval()
        module.conv.kernel[...] = 2 * module.conv.kernel[...]
    expected = twin(x)
    assert jnp.array_equal(block.norm.mean[...], twin.norm.mean[...])
    assert jnp.abs(block(x) - expected).max() <= 1e-6 * jnp.abs(expected).max()


def test_under_jit_over_split_state() -> None:
    block = trained(ConvNormActivation(4, 8, conv(), rngs=jax.random.key(0)))
    x = normal((2, 4, 5, 7))
    expected = block(x)
    fuse_for_inference(block)
    graphdef, state = nnx.split(block)
    y = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
    assert jnp.abs(y - expected).max() <= 1e-6 * jnp.abs(expected).max()
