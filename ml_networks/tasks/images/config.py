"""What the autoencoder programs are configured with. Imports neither torch nor jax."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ml_networks._compat import checked_keywords
from ml_networks.config import Config, ResNetConfig, as_config, load_config

__all__ = ["WARM_UP", "AutoencoderConfig", "ProgramConfig", "TrainingConfig"]

WARM_UP = 0.1
"""Share of the steps in which the learning rate warms up."""


@checked_keywords()
@dataclass
class AutoencoderConfig(Config):
    """An autoencoder whose code is a grid of binary spherical codes.

    Attributes
    ----------
    image_shape
        (channels, height, width).
    encoder, decoder
        Residual networks that pixel-unshuffle down and pixel-shuffle up by the same factor. The
        decoder's ``init_channel`` must be the encoder's ``conv_channel``.
    codebook_dim
        Bits of a code.
    temperature
        Factor of the logits that the code entropies are taken of.
    """

    image_shape: tuple[int, int, int]
    encoder: ResNetConfig
    decoder: ResNetConfig
    codebook_dim: int
    temperature: float = 1.0

    def _validate(self) -> None:
        self._nested("encoder", ResNetConfig)
        self._nested("decoder", ResNetConfig)
        self._integers(1, "codebook_dim")
        shape = self.image_shape
        if not isinstance(shape, (list, tuple)) or len(shape) != 3:
            raise ValueError(self._error("image_shape", "(channels, height, width)"))
        self.image_shape = (shape[0], shape[1], shape[2])
        factor = self.encoder.scale_factor**self.encoder.n_scaling
        if self.decoder.scale_factor**self.decoder.n_scaling != factor:
            raise ValueError("AutoencoderConfig: encoder and decoder must scale by one factor")
        if any(side % factor for side in self.image_shape[1:]):
            raise ValueError(self._error("image_shape", f"of sides divisible by {factor}"))
        if self.decoder.init_channel != self.encoder.conv_channel:
            raise ValueError(
                "AutoencoderConfig: decoder.init_channel must be encoder.conv_channel, got "
                f"{self.decoder.init_channel} and {self.encoder.conv_channel}"
            )

    @property
    def code_shape(self) -> tuple[int, int]:
        """Rows and columns of the grid of codes."""
        factor = self.encoder.scale_factor**self.encoder.n_scaling
        return self.image_shape[1] // factor, self.image_shape[2] // factor

    @property
    def bits(self) -> int:
        """Bits that an image is encoded into."""
        return math.prod(self.code_shape) * self.codebook_dim


@checked_keywords()
@dataclass
class TrainingConfig(Config):
    """How the autoencoder is trained.

    The loss of an image is its Charbonnier loss + ``focal_frequency_weight`` x focal frequency
    loss + ``entropy_weight`` x (mean entropy of a code - entropy of all codes together).

    Attributes
    ----------
    epochs, batch_size
        Passes over the training images, and images a step.
    learning_rate, weight_decay
        Of AdamW; the rate warms up, then falls to 0 along a cosine.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    focal_frequency_weight: float
    entropy_weight: float

    def _validate(self) -> None:
        self._integers(1, "epochs", "batch_size")
        if not self.learning_rate > 0:
            raise ValueError(self._error("learning_rate", "a number > 0"))


@checked_keywords()
@dataclass
class ProgramConfig(Config):
    """The whole file: ``model`` and ``training``."""

    model: AutoencoderConfig
    training: TrainingConfig

    def _validate(self) -> None:
        self._nested("model", AutoencoderConfig)
        self._nested("training", TrainingConfig)

    @classmethod
    def read(cls, path: Path | None = None) -> ProgramConfig:
        """Read a YAML file; by default the one that the package ships."""
        with resources.as_file(resources.files(__package__) / "autoencoder.yaml") as shipped:
            content: Any = load_config(path or shipped)
        return as_config(content, cls, what="the config file")

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> ProgramConfig:
        """Rebuild it from ``dataclasses.asdict``, as checkpoints hold it."""
        return as_config(content, cls, what="the config")
