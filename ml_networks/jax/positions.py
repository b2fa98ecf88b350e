"""Positional embeddings that are added to a feature map."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ml_networks._compat import checked_keywords
from ml_networks.jax.primitives import LayerNorm, Linear
from ml_networks.jax.rngs import RngsLike, as_rngs

__all__ = [
    "CustomRotationalEmbedding",
    "CustomRotationalEmbedding1D",
    "LearnableFourierPositionalEncoding",
    "MultiLearnableFourierPositionalEncoding",
    "positional_embedding",
]

Array = jax.Array


@checked_keywords()
class LearnableFourierPositionalEncoding(nnx.Module):
    """Learned Fourier features of a pixel's position (Li et al., 2021, arXiv 2106.02795).

    ``LayerNorm(W2 GLU(W1 [cos(Wr p), sin(Wr p)] / sqrt(256)))`` for ``p = (x, y)`` in [0, 1].

    Parameters
    ----------
    d_model
        Channels of the embedding.
    gamma
        ``Wr`` starts normal with standard deviation ``gamma**-2``. Default 0.4.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    fourier_dim, hidden_dim = 256, 128
    torch_names: ClassVar[dict[str, str]] = {
        "linear1": "mlp.0",
        "linear2": "mlp.2",
        "norm": "mlp.3",
    }

    def __init__(
        self, d_model: int, gamma: float = 1 / 2.5, *, rngs: RngsLike | None = None
    ) -> None:
        rngs = as_rngs(rngs)
        self.Wr = Linear(2, self.fourier_dim // 2, bias=False, rngs=rngs)
        self.linear1 = Linear(self.fourier_dim, self.hidden_dim, rngs=rngs)
        self.linear2 = Linear(self.hidden_dim // 2, d_model, rngs=rngs)
        self.norm = LayerNorm(d_model)
        kernel = self.Wr.kernel
        kernel[...] = gamma**-2 * jax.random.normal(rngs.params(), kernel.shape)

    def __call__(self, x: Array) -> Array:
        """Return the embedding (1, d_model, H, W) of a feature map (B, C, H, W)."""
        rows, columns = (jnp.linspace(0, 1, side, dtype=x.dtype) for side in x.shape[-2:])
        y, x_ = jnp.meshgrid(rows, columns, indexing="ij")
        projected = self.Wr(jnp.stack([x_, y], -1))
        features = jnp.concatenate([jnp.cos(projected), jnp.sin(projected)], -1)
        hidden = jax.nn.glu(self.linear1(features / math.sqrt(self.fourier_dim)))
        return self.norm(self.linear2(hidden)).transpose(2, 0, 1)[None]


@checked_keywords()
class MultiLearnableFourierPositionalEncoding(nnx.Module):
    """Ten :class:`LearnableFourierPositionalEncoding` of ``gamma`` 1 to 0.1, averaged by learned
    softmax weights.

    Parameters
    ----------
    d_model
        Channels of the embedding.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    def __init__(self, d_model: int, *, rngs: RngsLike | None = None) -> None:
        rngs = as_rngs(rngs)
        self.embedders = nnx.List(
            [
                LearnableFourierPositionalEncoding(d_model, (10 - i) / 10, rngs=rngs)
                for i in range(10)
            ]
        )
        self.combination = nnx.Param(jnp.ones(10))

    def __call__(self, x: Array) -> Array:
        """Return the embedding (1, d_model, H, W) of a feature map (B, C, H, W)."""
        embeddings = jnp.stack([embedder(x) for embedder in self.embedders])
        weights = jax.nn.softmax(self.combination[...]).astype(x.dtype)
        return jnp.tensordot(weights, embeddings, 1)


def _half_turn(start: Array, n: int) -> Array:
    """``start`` rotated by n angles from 0 to 180 degrees, (n, 2)."""
    angle = jnp.linspace(0, math.pi, n, dtype=start.dtype)
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    x, y = start
    return jnp.stack([cosine * x - sine * y, sine * x + cosine * y], -1)


@checked_keywords()
class CustomRotationalEmbedding(nnx.Module):
    """A linear map of two copies of a learned 2-vector, rotated by the row and by the column.

    Parameters
    ----------
    d_model
        Channels of the embedding.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    torch_names: ClassVar[dict[str, str]] = {"projection": "projection.0"}

    def __init__(self, d_model: int, *, rngs: RngsLike | None = None) -> None:
        self.start_vector = nnx.Param(jnp.array([0.0, 1.0]))
        self.projection = Linear(4, d_model, rngs=as_rngs(rngs))

    def __call__(self, x: Array) -> Array:
        """Return the embedding (1, d_model, H, W) of a feature map (B, C, H, W)."""
        height, width = x.shape[-2:]
        start = self.start_vector[...].astype(x.dtype)
        rows = jnp.broadcast_to(_half_turn(start, height)[:, None], (height, width, 2))
        columns = jnp.broadcast_to(_half_turn(start, width), (height, width, 2))
        return self.projection(jnp.concatenate([rows, columns], -1)).transpose(2, 0, 1)[None]


@checked_keywords()
class CustomRotationalEmbedding1D(nnx.Module):
    """A linear map of the vector (0, 1), rotated by the position in a sequence.

    Parameters
    ----------
    d_model
        Channels of the embedding.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    def __init__(self, d_model: int, *, rngs: RngsLike | None = None) -> None:
        self.projection = Linear(2, d_model, rngs=as_rngs(rngs))

    def __call__(self, x: Array) -> Array:
        """Return the embedding (1, d_model, L) of a sequence (B, C, L)."""
        start = jnp.array([0.0, 1.0], x.dtype)
        return self.projection(_half_turn(start, x.shape[2])).T[None]


def positional_embedding(kind: str, d_model: int, *, rngs: RngsLike) -> Any:
    """Make the embedding of that name, None for ``"none"``.

    Parameters
    ----------
    kind
        ``"learnable-fourier"``, ``"multi-learnable-fourier"``, ``"custom-rotational"``,
        ``"custom-rotational-1d"`` or ``"none"``.
    d_model
        Channels of the feature map.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """
    classes: dict[str, Any] = {
        "learnable-fourier": LearnableFourierPositionalEncoding,
        "multi-learnable-fourier": MultiLearnableFourierPositionalEncoding,
        "custom-rotational": CustomRotationalEmbedding,
        "custom-rotational-1d": CustomRotationalEmbedding1D,
    }
    return None if kind == "none" else classes[kind](d_model, rngs=rngs)
