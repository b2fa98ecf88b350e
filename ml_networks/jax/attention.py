"""Multi-head self-attention over the positions of sequences and images."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from ml_networks._compat import checked_keywords
from ml_networks._geometry import attention_heads
from ml_networks.config import AttentionConfig
from ml_networks.jax.primitives import Conv, pixel_shuffle, pixel_unshuffle, with_channels_last
from ml_networks.jax.rngs import RngsLike, as_rngs
from ml_networks.kernels.jax import attention

__all__ = ["Attention1d", "Attention2d"]

Array = jax.Array


class _Projection(nnx.Module):
    """A 1x1 convolution under the name ``conv``."""

    def __init__(self, channels: int, out_channels: int, sides: int, rngs: nnx.Rngs) -> None:
        self.conv = Conv(channels, out_channels, 1, sides=sides, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class _Attention(nnx.Module):
    """What the two attention layers share, for ``sides`` axes of positions."""

    sides: int

    def __init__(
        self,
        channels: int,
        nhead: int | None = None,
        patch_size: int = 1,
        attn_cfg: AttentionConfig | None = None,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        nhead, patch_size = attention_heads(
            type(self).__name__, channels, nhead, patch_size, attn_cfg
        )
        self.channels = channels
        self.n_heads = nhead
        self.patch_size = patch_size
        self.qkv = _Projection(channels, 3 * channels, self.sides, rngs)
        self.proj_out = _Projection(channels, channels, self.sides, rngs)

    def _attend(self, x: Array) -> Array:
        """Attention over the patches of (batch, channels, *positions), the residual added."""
        if any(side % self.patch_size for side in x.shape[2:]):
            raise ValueError(
                f"{type(self).__name__} cuts its input into patches of {self.patch_size}, which "
                f"does not divide {x.shape[2:]}; pad to a multiple of {self.patch_size}"
            )
        # Channels last, as convolutions have them inside.
        folded = jnp.moveaxis(pixel_unshuffle(self.qkv(x), self.patch_size, self.sides), 1, -1)
        batch, *sides, _ = folded.shape
        # The channels are ordered (head, query | key | value, channel of that head).
        heads = folded.reshape(batch, math.prod(sides), self.n_heads, -1)
        mixed = attention(*(part.swapaxes(1, 2) for part in jnp.split(heads, 3, -1)))
        mixed = jnp.moveaxis(mixed.swapaxes(1, 2).reshape(batch, *sides, -1), -1, 1)
        mixed = self.proj_out(pixel_shuffle(mixed, self.patch_size, self.sides))
        return with_channels_last(jnp.add, x, mixed)


@checked_keywords(in_channels="channels")
class Attention1d(_Attention):
    """Residual multi-head self-attention over a sequence.

    ``y = x + W_out attention(W_qkv x)``, where every patch of ``patch_size`` positions is one
    token and ``attention = softmax(q k^T / sqrt(width)) v`` in each head (Vaswani et al., 2017,
    arXiv 1706.03762). There is no normalisation and no positional encoding.

    Parameters
    ----------
    channels, in_channels
        Channels of the input and the output: one argument with two names.
    nhead
        Number of heads; must divide the channels.
    patch_size
        Positions in a token; must divide the length. Default 1.
    attn_cfg
        Gives ``nhead`` and ``patch_size`` instead of the two arguments.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.

    Raises
    ------
    TypeError
        Without channels or heads.
    ValueError
        If ``nhead`` does not divide the channels, or ``patch_size`` the length.
    """

    sides = 1

    def __call__(self, x: Array) -> Array:
        """Map (batch, channels, *positions) to the same shape.

        Further axes of positions are treated as one long sequence.
        """
        return self._attend(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


@checked_keywords(in_channels="channels")
class Attention2d(_Attention):
    """Residual multi-head self-attention over the positions of an image.

    As :class:`Attention1d`; a token is a patch of ``patch_size`` x ``patch_size`` pixels, and
    ``patch_size`` must divide the height and the width.
    """

    sides = 2

    def __call__(self, x: Array) -> Array:
        """Map (*batch, channels, height, width) to the same shape."""
        return self._attend(x.reshape(-1, *x.shape[-3:])).reshape(x.shape)
