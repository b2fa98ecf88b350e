"""The autoencoder in torch, and its training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ml_networks.kernels.torch import focal_frequency_loss
from ml_networks.tasks.images.config import WARM_UP, AutoencoderConfig, TrainingConfig
from ml_networks.tasks.program import pick_device
from ml_networks.torch import BSQCodebook, Decoder, Encoder, charbonnier

__all__ = ["BSQAutoencoder", "Learner", "Reconstruction", "losses"]


class Reconstruction(NamedTuple):
    """Images (B, C, H, W) and the codes they were decoded from; entropies in nats."""

    images: Tensor
    indices: Tensor
    sample_entropy: Tensor
    codebook_entropy: Tensor


class BSQAutoencoder(nn.Module):
    """Encoder, BSQ codebook, decoder.

    An image (C, H, W) becomes a grid of ``cfg.code_shape`` integers below
    ``2 ** cfg.codebook_dim``.
    """

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        self.cfg = cfg
        features = (cfg.encoder.conv_channel, *cfg.code_shape)
        self.encoder = Encoder(features, cfg.image_shape, cfg.encoder)
        self.codebook = BSQCodebook(features[0], cfg.codebook_dim, temperature=cfg.temperature)
        self.decoder = Decoder(features, cfg.image_shape, cfg.decoder)

    def _features(self, images: Tensor) -> Tensor:
        return self.encoder(images).movedim(-3, -1)

    def forward(self, images: Tensor) -> Reconstruction:
        """Encode and decode (B, C, H, W) images, with the entropies that training needs."""
        codes = self.codebook.quantize(self._features(images), entropy_bits=self.cfg.codebook_dim)
        # Both are there because they were asked for.
        assert codes.sample_entropy is not None
        assert codes.codebook_entropy is not None
        decoded = self.decoder(codes.quantized.movedim(-1, -3))
        return Reconstruction(decoded, codes.indices, codes.sample_entropy, codes.codebook_entropy)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to indices (B, rows, columns)."""
        return self.codebook.encode(self._features(images))

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, rows, columns) to images (B, C, H, W)."""
        return self.decoder(self.codebook.decode(indices).movedim(-1, -3))


def losses(model: BSQAutoencoder, images: Tensor, cfg: TrainingConfig) -> Tensor:
    """The terms of the loss, weighted: (charbonnier, focal frequency, entropy)."""
    result = model(images)
    frequency = focal_frequency_loss(result.images, images, loss_weight=cfg.focal_frequency_weight)
    entropy = result.sample_entropy.mean() - result.codebook_entropy
    return torch.stack(
        (charbonnier(result.images, images).mean(), frequency, cfg.entropy_weight * entropy)
    )


class Learner:
    """The model in torch, as the program uses it: arrays in, arrays out."""

    def __init__(self, cfg: AutoencoderConfig, device: str | None = None, seed: int = 0) -> None:
        self.device = pick_device(device)
        torch.manual_seed(seed)
        self.model = BSQAutoencoder(cfg).to(self.device)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def synchronize(self) -> Callable[[], object] | None:
        """What waits until the device has done its work; None where it need not be waited for."""
        return torch.cuda.synchronize if self.device.type == "cuda" else None

    def begin(self, images: NDArray[np.float32], cfg: TrainingConfig) -> None:
        """Make ready to train on ``images`` (N, C, H, W)."""
        self._images = torch.from_numpy(images).to(self.device)
        self._cfg = cfg
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=cfg.learning_rate,
            weight_decay=cfg.weight_decay,
            fused=True,
        )
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer,
            cfg.learning_rate,
            total_steps=cfg.epochs * math.ceil(len(images) / cfg.batch_size),
            pct_start=WARM_UP,
        )
        self._total = torch.zeros(3, device=self.device)

    def order(self) -> NDArray[np.int64]:
        """The training images in a new random order."""
        return torch.randperm(len(self._images)).numpy()

    def step(self, batch: NDArray[np.int64]) -> None:
        """Take one step on the images of these numbers."""
        self.model.train()
        images = self._images[torch.from_numpy(batch).to(self.device)]
        terms = losses(self.model, images, self._cfg)
        self._optimizer.zero_grad()
        terms.sum().backward()
        self._optimizer.step()
        self._schedule.step()
        self._total += terms.detach() * (len(batch) / len(self._images))

    def take_losses(self) -> list[float]:
        """The mean terms of the epoch that ends here."""
        total = self._total.tolist()
        self._total.zero_()
        return total

    @torch.no_grad()
    def reconstruct(
        self, images: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """What the images (B, C, H, W) decode to, and their indices (B, rows, columns)."""
        self.model.eval()
        result = self.model(torch.from_numpy(images).to(self.device))
        return result.images.cpu().numpy(), result.indices.cpu().numpy()

    @torch.no_grad()
    def encode(self, images: NDArray[np.float32]) -> NDArray[np.int64]:
        """Images (B, C, H, W) to indices (B, rows, columns)."""
        indices: NDArray[np.int64] = (
            self.model.eval().encode(torch.from_numpy(images).to(self.device)).cpu().numpy()
        )
        return indices

    @torch.no_grad()
    def decode(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Indices (B, rows, columns) to images (B, C, H, W)."""
        images: NDArray[np.float32] = (
            self.model.eval().decode(torch.from_numpy(indices).to(self.device)).cpu().numpy()
        )
        return images

    def weights(self) -> Mapping[str, Any]:
        """The weights by torch's names."""
        return self.model.state_dict()

    def load(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Take weights by torch's names; raises RuntimeError if they do not fit."""
        self.model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
