"""The autoencoder in JAX, and its training: what :mod:`.torch_autoencoder` is in torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import NDArray

from ml_networks.convert import state_dict, torch_to_jax
from ml_networks.jax import (
    BSQCodebook,
    Decoder,
    Encoder,
    TrainState,
    charbonnier,
    count_nnx_params,
    eval_step,
    train_step,
    update_model,
)
from ml_networks.jax.rngs import RngsLike, as_rngs
from ml_networks.kernels.jax import focal_frequency_loss
from ml_networks.tasks.images.config import WARM_UP, AutoencoderConfig, TrainingConfig
from ml_networks.tasks.program import pick_jax_device

__all__ = ["BSQAutoencoder", "Learner", "Reconstruction", "losses", "one_cycle"]

Array = jax.Array


class Reconstruction(NamedTuple):
    """Images (B, C, H, W) and the codes they were decoded from; entropies in nats."""

    images: Array
    indices: Array
    sample_entropy: Array
    codebook_entropy: Array


class BSQAutoencoder(nnx.Module):
    """Encoder, BSQ codebook, decoder.

    An image (C, H, W) becomes a grid of ``cfg.code_shape`` integers below
    ``2 ** cfg.codebook_dim``.
    """

    def __init__(self, cfg: AutoencoderConfig, *, rngs: RngsLike) -> None:
        rngs = as_rngs(rngs)
        self.codebook_dim = cfg.codebook_dim
        features = (cfg.encoder.conv_channel, *cfg.code_shape)
        self.encoder = Encoder(features, cfg.image_shape, cfg.encoder, rngs=rngs)
        self.codebook = BSQCodebook(
            features[0], cfg.codebook_dim, temperature=cfg.temperature, rngs=rngs
        )
        self.decoder = Decoder(features, cfg.image_shape, cfg.decoder, rngs=rngs)

    def _features(self, images: Array) -> Array:
        return jnp.moveaxis(self.encoder(images), -3, -1)

    def __call__(self, images: Array) -> Reconstruction:
        """Encode and decode (B, C, H, W) images, with the entropies that training needs."""
        codes = self.codebook.quantize(self._features(images), entropy_bits=self.codebook_dim)
        # Both are there because they were asked for.
        assert codes.sample_entropy is not None
        assert codes.codebook_entropy is not None
        decoded = self.decoder(jnp.moveaxis(codes.quantized, -1, -3))
        return Reconstruction(decoded, codes.indices, codes.sample_entropy, codes.codebook_entropy)

    def encode(self, images: Array) -> Array:
        """Images (B, C, H, W) to indices (B, rows, columns)."""
        return self.codebook.encode(self._features(images))

    def decode(self, indices: Array) -> Array:
        """Indices (B, rows, columns) to images (B, C, H, W)."""
        return self.decoder(jnp.moveaxis(self.codebook.decode(indices), -1, -3))


def losses(model: BSQAutoencoder, images: Array, cfg: TrainingConfig) -> tuple[Array, ...]:
    """The terms of the loss, weighted: (charbonnier, focal frequency, entropy)."""
    result = model(images)
    frequency = focal_frequency_loss(result.images, images, loss_weight=cfg.focal_frequency_weight)
    entropy = result.sample_entropy.mean() - result.codebook_entropy
    return charbonnier(result.images, images).mean(), frequency, cfg.entropy_weight * entropy


def one_cycle(
    total_steps: int, peak: float, warm_up: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Learning rate and first beta of AdamW at each step, as torch's ``OneCycleLR`` has them.

    The rate goes from ``peak / 25`` to ``peak`` in the share ``warm_up`` of the steps, then to
    ``peak / 250000``, both along half a cosine; beta from 0.95 to 0.85 and back.
    """
    top = warm_up * total_steps - 1
    steps = np.arange(total_steps)
    rising = np.clip(steps / top, 0, 1) if top > 0 else np.ones(total_steps)
    falling = np.clip((steps - top) / max(total_steps - 1 - top, 1e-9), 0, 1)

    def between(start: float, end: float, share: NDArray[Any]) -> NDArray[np.float64]:
        return end + (start - end) / 2 * (1 + np.cos(np.pi * share))

    up = steps <= top
    rate = np.where(up, between(peak / 25, peak, rising), between(peak, peak / 25 / 1e4, falling))
    beta = np.where(up, between(0.95, 0.85, rising), between(0.85, 0.95, falling))
    return rate, beta


class Learner:
    """The model in JAX, as the program uses it: arrays in, arrays out."""

    synchronize = None

    def __init__(self, cfg: AutoencoderConfig, device: str | None = None, seed: int = 0) -> None:
        self.device = pick_jax_device(device)
        self._random = np.random.default_rng(seed)
        self.model = BSQAutoencoder(cfg, rngs=jax.random.key(seed))
        self._hold(optax.identity())
        self._reconstruct = eval_step(self.model, lambda model, images: model(images))
        self._encode = eval_step(self.model, lambda model, images: model.encode(images))
        self._decode = eval_step(self.model, lambda model, indices: model.decode(indices))

    def _hold(self, optimizer: Any) -> None:
        state = TrainState.create(self.model, optimizer)
        self._state = jax.device_put(state, self.device)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return count_nnx_params(self.model)[0]

    def begin(self, images: NDArray[np.float32], cfg: TrainingConfig) -> None:
        """Make ready to train on ``images`` (N, C, H, W)."""
        self._images = jax.device_put(images, self.device)
        total_steps = cfg.epochs * math.ceil(len(images) / cfg.batch_size)
        rates, betas = map(jnp.asarray, one_cycle(total_steps, cfg.learning_rate, WARM_UP))
        optimizer = optax.inject_hyperparams(optax.adamw)(
            learning_rate=lambda step: rates[step],
            b1=lambda step: betas[step],
            weight_decay=cfg.weight_decay,
        )
        self._hold(optimizer)
        self._step = train_step(
            self.model, optimizer, lambda model, images, batch: losses(model, images[batch], cfg)
        )
        self._terms: list[tuple[tuple[Array, ...], float]] = []

    def order(self) -> NDArray[np.int64]:
        """The training images in a new random order."""
        return self._random.permutation(len(self._images))

    def step(self, batch: NDArray[np.int64]) -> None:
        """Take one step on the images of these numbers."""
        self._state, terms = self._step(self._state, self._images, batch)
        self._terms.append((terms, len(batch) / len(self._images)))

    def take_losses(self) -> list[float]:
        """The mean terms of the epoch that ends here."""
        held, self._terms = jax.device_get(self._terms), []
        total: list[float] = sum(share * np.array(terms) for terms, share in held).tolist()
        return total

    def reconstruct(
        self, images: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """What the images (B, C, H, W) decode to, and their indices (B, rows, columns)."""
        result = self._reconstruct(self._state, images)
        return np.asarray(result.images), np.asarray(result.indices)

    def encode(self, images: NDArray[np.float32]) -> NDArray[np.int64]:
        """Images (B, C, H, W) to indices (B, rows, columns)."""
        return np.asarray(self._encode(self._state, images))

    def decode(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Indices (B, rows, columns) to images (B, C, H, W)."""
        return np.asarray(self._decode(self._state, indices))

    def weights(self) -> Mapping[str, Any]:
        """The weights by torch's names."""
        return state_dict(update_model(self.model, self._state))

    def load(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Take weights by torch's names; raises KeyError or ValueError if they do not fit."""
        torch_to_jax(weights, self.model)
        self._hold(optax.identity())
