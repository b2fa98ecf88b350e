"""Positional embeddings that are added to a feature map."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ml_networks._compat import checked_keywords

__all__ = [
    "CustomRotationalEmbedding",
    "CustomRotationalEmbedding1D",
    "LearnableFourierPositionalEncoding",
    "MultiLearnableFourierPositionalEncoding",
    "positional_embedding",
]


@checked_keywords()
class LearnableFourierPositionalEncoding(nn.Module):
    """Learned Fourier features of a pixel's position (Li et al., 2021, arXiv 2106.02795).

    ``LayerNorm(W2 GLU(W1 [cos(Wr p), sin(Wr p)] / sqrt(256)))`` for ``p = (x, y)`` in [0, 1].

    Parameters
    ----------
    d_model
        Channels of the embedding.
    gamma
        ``Wr`` starts normal with standard deviation ``gamma**-2``. Default 0.4.
    """

    fourier_dim, hidden_dim = 256, 128

    def __init__(self, d_model: int, gamma: float = 1 / 2.5) -> None:
        super().__init__()
        self.Wr = nn.Linear(2, self.fourier_dim // 2, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(self.fourier_dim, self.hidden_dim),
            nn.GLU(),
            nn.Linear(self.hidden_dim // 2, d_model),
            nn.LayerNorm(d_model),
        )
        nn.init.normal_(self.Wr.weight, std=gamma**-2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the embedding (1, d_model, H, W) of a feature map (B, C, H, W)."""
        rows, columns = (
            torch.linspace(0, 1, side, device=x.device, dtype=self.Wr.weight.dtype)
            for side in x.shape[-2:]
        )
        y, x_ = torch.meshgrid(rows, columns, indexing="ij")
        projected = self.Wr(torch.stack([x_, y], -1))
        features = torch.cat([projected.cos(), projected.sin()], -1)
        embedding: Tensor = self.mlp(features / math.sqrt(self.fourier_dim))
        return embedding.permute(2, 0, 1).unsqueeze(0)


@checked_keywords()
class MultiLearnableFourierPositionalEncoding(nn.Module):
    """Ten :class:`LearnableFourierPositionalEncoding` of ``gamma`` 1 to 0.1, averaged by learned
    softmax weights.

    Parameters
    ----------
    d_model
        Channels of the embedding.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.embedders = nn.ModuleList(
            LearnableFourierPositionalEncoding(d_model, (10 - i) / 10) for i in range(10)
        )
        self.combination = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        """Return the embedding (1, d_model, H, W) of a feature map (B, C, H, W)."""
        embeddings = torch.stack([embedder(x) for embedder in self.embedders])
        return torch.tensordot(self.combination.softmax(0), embeddings, 1)


def _half_turn(start: Tensor, n: int) -> Tensor:
    """``start`` rotated by n angles from 0 to 180 degrees, (n, 2)."""
    angle = torch.linspace(0, math.pi, n, device=start.device, dtype=start.dtype)
    cosine, sine = angle.cos(), angle.sin()
    x, y = start[0], start[1]
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y], -1)


@checked_keywords()
class CustomRotationalEmbedding(nn.Module):
    """A linear map of two copies of a learned 2-vector, rotated by the row and by the column.

    Parameters
    ----------
    d_model
        Channels of the embedding.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.start_vector = nn.Parameter(torch.tensor([0.0, 1.0]))
        self.projection = nn.Sequential(nn.Linear(4, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Return the embedding (1, d_model, H, W) of a feature map (B, C, H, W)."""
        height, width = x.shape[-2:]
        rows = _half_turn(self.start_vector, height)[:, None].expand(-1, width, -1)
        columns = _half_turn(self.start_vector, width)[None].expand(height, -1, -1)
        embedding: Tensor = self.projection(torch.cat([rows, columns], -1))
        return embedding.permute(2, 0, 1).unsqueeze(0)


@checked_keywords()
class CustomRotationalEmbedding1D(nn.Module):
    """A linear map of the vector (0, 1), rotated by the position in a sequence.

    Parameters
    ----------
    d_model
        Channels of the embedding.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.projection = nn.Linear(2, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Return the embedding (1, d_model, L) of a sequence (B, C, L)."""
        start = torch.tensor([0.0, 1.0], device=x.device, dtype=self.projection.weight.dtype)
        embedding: Tensor = self.projection(_half_turn(start, x.shape[2]))
        return embedding.T.unsqueeze(0)


def positional_embedding(kind: str, d_model: int) -> nn.Module | None:
    """Make the embedding of that name, None for ``"none"``.

    Parameters
    ----------
    kind
        ``"learnable-fourier"``, ``"multi-learnable-fourier"``, ``"custom-rotational"``,
        ``"custom-rotational-1d"`` or ``"none"``.
    d_model
        Channels of the feature map.
    """
    classes: dict[str, Any] = {
        "learnable-fourier": LearnableFourierPositionalEncoding,
        "multi-learnable-fourier": MultiLearnableFourierPositionalEncoding,
        "custom-rotational": CustomRotationalEmbedding,
        "custom-rotational-1d": CustomRotationalEmbedding1D,
    }
    module: nn.Module | None = None if kind == "none" else classes[kind](d_model)
    return module
