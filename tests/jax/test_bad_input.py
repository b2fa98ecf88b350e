"""What the JAX library says to keys, shapes and names that do not fit."""

from __future__ import annotations

import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ml_networks.jax as library
from ml_networks import (
    ContrastiveLearningConfig,
    ConvConfig,
    ConvNetConfig,
    LinearConfig,
    MLPConfig,
    ResNetConfig,
    TransformerConfig,
    UNetConfig,
    ViTConfig,
)
from ml_networks.jax.primitives import BatchNorm, GroupNorm

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONV = ConvConfig("ReLU", 3, 1, 1)
MLP = MLPConfig(4, 1, "Tanh", LinearConfig("ReLU"))
TOKENS = TransformerConfig(4, 2, 4, 1, 0.0)
RESNET = ResNetConfig(4, 3, 3, "ReLU", "Tanh", 1, n_scaling=1)
IMAGE = (3, 8, 8)


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


@pytest.fixture(scope="module")
def key() -> Any:
    return jax.random.key(0)


def test_a_legacy_key_makes_one_module() -> None:
    key = jax.random.PRNGKey(0)
    library.MLPLayer(3, 2, MLP, rngs=key)
    with pytest.raises(jax.errors.KeyReuseError, match=r"jax\.random\.split"):
        library.LinearNormActivation(3, 2, LinearConfig("ReLU"), rngs=key)
    first, second = jax.random.split(key)
    library.MLPLayer(3, 2, MLP, rngs=first)
    library.MLPLayer(3, 2, MLP, rngs=second)
    library.MLPLayer(3, 2, MLP, rngs=jax.random.PRNGKey(0))  # another array of the same numbers


def test_what_draws_no_initial_values_may_share_a_legacy_key() -> None:
    key = jax.random.PRNGKey(0)
    library.MLPLayer(3, 4, MLP, rngs=key)
    library.Distribution(2, "normal", rngs=key)
    library.PositionalEncoding(4, 0.1, 5, rngs=key)
    library.Activation("RReLU", rngs=key)


def test_a_legacy_key_that_is_gone_is_forgotten() -> None:
    from ml_networks.jax.rngs import _USED

    gc.collect()
    before = len(_USED)
    key = jax.random.PRNGKey(1)
    library.LinearNormActivation(3, 2, LinearConfig("ReLU"), rngs=key)
    assert len(_USED) == before + 1
    del key
    gc.collect()
    assert len(_USED) == before


def test_a_key_inside_jit_makes_a_module() -> None:
    @jax.jit
    def run(x: Any) -> Any:
        key = jax.random.PRNGKey(0)
        return library.LinearNormActivation(3, 2, LinearConfig("ReLU"), rngs=key)(x)

    assert run(jnp.ones((4, 3))).shape == (4, 2)


WITH_PARAMETERS: dict[str, Any] = {
    "Attention1d": lambda **k: library.Attention1d(4, 2, **k),
    "Attention2d": lambda **k: library.Attention2d(4, 2, **k),
    "BSQCodebook": lambda **k: library.BSQCodebook(dim=4, codebook_dim=2, **k),
    "ConditionalUnet1d": lambda **k: library.ConditionalUnet1d(
        3, (2, 4), UNetConfig((4,), CONV), **k
    ),
    "ConditionalUnet2d": lambda **k: library.ConditionalUnet2d(
        3, IMAGE, UNetConfig((4,), CONV), **k
    ),
    "ContrastiveLearningLoss": lambda **k: library.ContrastiveLearningLoss(
        3, 2, ContrastiveLearningConfig(4, MLP), **k
    ),
    "ConvNet": lambda **k: library.ConvNet(IMAGE, ConvNetConfig((4,), (CONV,)), **k),
    "ConvNormActivation": lambda **k: library.ConvNormActivation(3, 4, CONV, **k),
    "ConvNormActivation1d": lambda **k: library.ConvNormActivation1d(3, 4, CONV, **k),
    "ConvTranspose": lambda **k: library.ConvTranspose(
        (4, 8, 8), IMAGE, ConvNetConfig((4,), (CONV,)), **k
    ),
    "ConvTransposeNormActivation": lambda **k: library.ConvTransposeNormActivation(
        3, 4, CONV, **k
    ),
    "ConvTransposeNormActivation1d": lambda **k: library.ConvTransposeNormActivation1d(
        3, 4, CONV, **k
    ),
    "Decoder": lambda **k: library.Decoder(4, IMAGE, RESNET, MLP, **k),
    "Encoder": lambda **k: library.Encoder(4, IMAGE, RESNET, MLP, **k),
    "HyperNet": lambda **k: library.HyperNet(3, {"weight": (2, 2)}, **k),
    "LinearNormActivation": lambda **k: library.LinearNormActivation(
        3, 2, LinearConfig("ReLU"), **k
    ),
    "MLPLayer": lambda **k: library.MLPLayer(3, 2, MLP, **k),
    "PatchEmbed": lambda **k: library.PatchEmbed(4, 4, IMAGE, **k),
    "ResNetPixShuffle": lambda **k: library.ResNetPixShuffle((16, 4, 4), IMAGE, RESNET, **k),
    "ResNetPixUnshuffle": lambda **k: library.ResNetPixUnshuffle(IMAGE, RESNET, **k),
    "ResidualBlock": lambda **k: library.ResidualBlock(3, 3, **k),
    "TransformerLayer": lambda **k: library.TransformerLayer(3, 2, TOKENS, **k),
    "ViT": lambda **k: library.ViT(IMAGE, ViTConfig(4, TOKENS), **k),
}


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_missing_rngs(name: str) -> None:
    with pytest.raises(TypeError, match=r"rngs is missing: .* give rngs=nnx\.Rngs\(0\)"):
        WITH_PARAMETERS[name]()


IMAGE_MODULES = (
    "ConditionalUnet2d",
    "ConvNet",
    "ConvNormActivation",
    "ConvTransposeNormActivation",
    "Encoder",
    "PatchEmbed",
    "ResNetPixUnshuffle",
    "ResidualBlock",
    "ViT",
)


@pytest.mark.parametrize("name", IMAGE_MODULES)
def test_images_with_channels_last(name: str, key: Any) -> None:
    module = WITH_PARAMETERS[name](rngs=key)
    rest = (jnp.ones((2, 3)),) if "Unet" in name else ()
    message = r"axis -3 has 8 entries for 3 channels, and the channels look to be last: transpose"
    with pytest.raises(ValueError, match=message):
        module(jnp.ones((2, 8, 8, 3)), *rest)
    with pytest.raises(ValueError, match=r"axis -3 has 5 entries for 3 channels$"):
        module(jnp.ones((2, 5, 8, 8)), *rest)


@pytest.mark.parametrize("name", ["ConvNormActivation1d", "ConvTransposeNormActivation1d"])
def test_sequences_with_channels_last(name: str, key: Any) -> None:
    with pytest.raises(ValueError, match="axis -2 has 9 entries for 3 channels, and the channels"):
        WITH_PARAMETERS[name](rngs=key)(jnp.ones((2, 9, 3)))


def test_other_channels_last(key: Any) -> None:
    unet = library.ConditionalUnet1d(3, (2, 4), UNetConfig((4,), CONV), rngs=key)
    with pytest.raises(ValueError, match="transpose them to axis -2"):
        unet(jnp.ones((5, 4, 2)), jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="transpose them to axis -3"):
        library.Attention2d(4, 2, rngs=key)(jnp.ones((2, 8, 8, 4)))
    decoder = library.Decoder((16, 4, 4), IMAGE, RESNET, rngs=key)
    with pytest.raises(ValueError, match="transpose them to axis -3"):
        decoder(jnp.ones((2, 4, 4, 16)))
    for norm in (BatchNorm(3), GroupNorm(1, 3)):
        with pytest.raises(ValueError, match="transpose them to axis -3"):
            norm(jnp.ones((2, 8, 8, 3)))


def test_one_image_without_a_batch_axis(key: Any) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4)), jnp.float32)
    for module in (
        library.ConvNormActivation(3, 4, CONV, rngs=key),
        library.ConvTransposeNormActivation(3, 4, CONV, rngs=key),
    ):
        np.testing.assert_array_equal(module(x), module(x[None])[0])


def test_names() -> None:
    with pytest.raises(ValueError, match="'AdamW'"):
        library.get_optimizer("Adamw ", lr=0.1)
    with pytest.raises(AttributeError, match="did you mean 'HyperNet'"):
        library.Hypernet  # noqa: B018
    with pytest.raises(TypeError, match="did you mean 'mlp_cfg'"):
        library.HyperNet(3, {"weight": (2, 2)}, mlp_cgf=MLP, rngs=rngs())
    with pytest.raises(TypeError, match="did you mean 'feature_dim'"):
        library.ConditionalUnet2d(
            feature_dims=3, obs_shape=IMAGE, cfg=UNetConfig((4,), CONV), rngs=rngs()
        )
