"""The calls of the JAX guide, as it writes them, and what it says of their results."""

from __future__ import annotations

import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ml_networks.jax
from ml_networks import (
    ConvConfig,
    ConvNetConfig,
    LinearConfig,
    MLPConfig,
    ResNetConfig,
    UNetConfig,
    ViTConfig,
)

CONV = {"kernel_size": 3, "stride": 2, "padding": 1}
DOWN = ConvNetConfig(channels=[16, 32, 64], conv_cfgs=[ConvConfig(**CONV, activation="ReLU")] * 3)
SHAPE = (3, 64, 64)


def key() -> Any:
    """The guide's ``rngs``: a legacy key, used for each module anew."""
    return jax.random.PRNGKey(0)


def test_imports() -> None:
    from ml_networks.jax import (  # noqa: F401
        ConditionalUnet2d,
        Decoder,
        Distribution,
        Encoder,
        MLPLayer,
        binary_focal_loss,
        charbonnier,
        focal_loss,
        get_optimizer,
        jax_fix_seed,
    )

    assert ResNetConfig is not UNetConfig is not ViTConfig


# The table of the guide: what both frameworks have under one name.
NAMES = [
    "Activation",
    "ConditionalUnet1d",
    "ConditionalUnet2d",
    "ContrastiveLearningLoss",
    "ConvNet",
    "Decoder",
    "Distribution",
    "Encoder",
    "HyperNet",
    "MLPLayer",
    "ResNetPixShuffle",
    "ResNetPixUnshuffle",
    "ViT",
    "charbonnier",
    "focal_loss",
    "get_optimizer",
]


@pytest.mark.parametrize("name", [*NAMES, "jax_fix_seed"])
def test_every_name_of_the_table(name: str) -> None:
    assert name in ml_networks.jax.__all__
    assert callable(getattr(ml_networks.jax, name))


def test_mlp() -> None:
    from ml_networks.jax import MLPLayer

    mlp_config = MLPConfig(
        hidden_dim=128,
        n_layers=2,
        output_activation="Tanh",
        linear_cfg=LinearConfig(activation="ReLU", bias=True),
    )
    mlp = MLPLayer(input_dim=16, output_dim=8, mlp_config=mlp_config, rngs=key())
    y = mlp(jnp.ones((32, 16)))
    assert y.shape == (32, 8)
    assert float(jnp.abs(y).max()) <= 1
    with pytest.raises(TypeError, match="rngs is missing"):
        MLPLayer(input_dim=16, output_dim=8, mlp_config=mlp_config)


def test_encoder() -> None:
    from ml_networks.jax import Encoder

    full_connection_cfg = LinearConfig(activation="ReLU", bias=True)
    encoder = Encoder(64, SHAPE, DOWN, full_connection_cfg, rngs=key())
    assert encoder(jnp.ones((32, 3, 64, 64))).shape == (32, 64)


def test_decoder() -> None:
    from ml_networks.jax import Decoder

    decoder_cfg = ConvNetConfig(
        channels=[64, 32, 16],
        conv_cfgs=[
            ConvConfig(**CONV, activation="ReLU"),
            ConvConfig(**CONV, activation="ReLU"),
            ConvConfig(**CONV, activation="Tanh"),
        ],
    )
    full_connection_cfg = LinearConfig(activation="ReLU", bias=True)
    decoder = Decoder(64, SHAPE, decoder_cfg, full_connection_cfg, rngs=key())
    predicted_obs = decoder(jnp.ones((32, 64)))
    assert predicted_obs.shape == (32, 3, 64, 64)
    assert float(jnp.abs(predicted_obs).max()) <= 1


def test_distribution() -> None:
    from ml_networks.jax import Distribution, Encoder

    full_connection_cfg = MLPConfig(
        hidden_dim=128,
        n_layers=2,
        output_activation="Identity",
        linear_cfg=LinearConfig(activation="ReLU", bias=True),
    )
    encoder = Encoder(64 * 2, SHAPE, DOWN, full_connection_cfg, rngs=key())
    dist = Distribution(in_dim=64, dist="normal", n_groups=1, rngs=key())
    dist_z = dist(encoder(jnp.ones((32, 3, 64, 64))))
    assert dist_z.mean.shape == dist_z.std.shape == dist_z.stoch.shape == (32, 64)
    assert float(dist_z.std.min()) > 0
    assert float(jnp.abs(dist_z.stoch - dist_z.mean).max()) > 0


def test_optimizers() -> None:
    from ml_networks.jax import get_optimizer

    start, gradient = {"w": jnp.ones(3)}, {"w": jnp.array([1.0, -2.0, 0.5])}
    optimizer = get_optimizer("Adam", learning_rate=1e-3)
    updates, _ = optimizer.update(gradient, optimizer.init(start), start)
    np.testing.assert_allclose(updates["w"], [-1e-3, 1e-3, -1e-3], rtol=1e-4)
    for name in ("Adam", "SGD", "AdamW"):
        named = get_optimizer(name, learning_rate=1e-2)
        assert isinstance(named, optax.GradientTransformation)


def test_seeds() -> None:
    from ml_networks.jax import jax_fix_seed

    def draw() -> tuple[float, float]:
        jax_fix_seed(42)
        return random.random(), float(np.random.rand())  # noqa: NPY002

    assert draw() == draw()


def test_losses() -> None:
    from ml_networks.jax import binary_focal_loss, charbonnier, focal_loss

    loss = focal_loss(jnp.ones((32, 10)), jnp.zeros((32,), dtype=jnp.int32), gamma=2.0)
    np.testing.assert_allclose(loss, 0.9**2 * np.log(10), rtol=1e-5)
    binary = binary_focal_loss(jnp.zeros((32, 10)), jnp.zeros((32, 10)), gamma=2.0)
    np.testing.assert_allclose(binary, np.full(32, 10 * 0.25 * np.log(2)), rtol=1e-5)
    loss = charbonnier(jnp.ones((32, 3, 64, 64)), jnp.zeros((32, 3, 64, 64)))
    np.testing.assert_allclose(loss, np.full(32, 3 * 64 * 64 * (1 + 1e-6)), rtol=1e-3)
