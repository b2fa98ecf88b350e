"""Multi-head self-attention over the positions of sequences and images."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ml_networks._compat import checked_keywords
from ml_networks._geometry import attention_heads
from ml_networks.config import AttentionConfig
from ml_networks.kernels.core.torch_functions import pixel_shuffle
from ml_networks.kernels.torch import attention

__all__ = ["Attention1d", "Attention2d"]


def attend(projected: Tensor, nhead: int) -> Tensor:
    """Let every token attend to every token, head by head.

    Parameters
    ----------
    projected
        Queries, keys and values, ``(batch, 3 * channels, tokens)``. The channels are ordered
        (head, query | key | value, channel of that head).
    nhead
        Number of heads; divides the channels.

    Returns
    -------
    Tensor
        ``softmax(q k^T / sqrt(channels / nhead)) v``, ``(batch, channels, tokens)``. No score
        matrix is stored, so memory grows linearly with the number of tokens.
    """
    batch, channels, tokens = projected.shape
    split = projected.reshape(batch, nhead, 3, channels // (3 * nhead), tokens)
    split = split.permute(2, 0, 1, 4, 3)
    if projected.device.type == "cpu":
        # There the features of a token must lie side by side: one copy for all three.
        split = split.contiguous()
    mixed = attention(*split.unbind(0))
    return mixed.transpose(-1, -2).reshape(batch, channels // 3, tokens)


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` by way of :func:`ml_networks.kernels.torch.attention`.

    Parameters, their names and initial values, and results are those of the base class. A call
    that asks for weights or has a mask, and other layouts than ``batch_first``, are left to it.
    """

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Map (B, L, d_model) queries to the same shape; keys and values are (B, S, d_model)."""
        masked = any(options.get(name) is not None for name in ("key_padding_mask", "attn_mask"))
        special = self.bias_k is not None or self.add_zero_attn or not self._qkv_same_embed_dim
        weights = options.get("need_weights", True) or options.get("is_causal", False)
        if masked or special or weights or not self.batch_first or query.dim() != 3:
            found: tuple[Tensor, Tensor | None] = super().forward(query, key, value, **options)
            return found
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key and key is value:
            projected = F.linear(query, weight, bias).chunk(3, -1)
        else:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            inputs = zip((query, key, value), weight.chunk(3), biases, strict=True)
            projected = tuple(F.linear(*arguments) for arguments in inputs)
        heads = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected)
        mixed = attention(*heads, dropout=self.dropout if self.training else 0.0)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


class _Attention(nn.Module):
    """What the two attention layers share: their arguments and their two 1x1 convolutions."""

    convolution: type[nn.Conv1d] | type[nn.Conv2d]

    def __init__(
        self,
        channels: int,
        nhead: int | None = None,
        patch_size: int = 1,
        attn_cfg: AttentionConfig | None = None,
    ) -> None:
        super().__init__()
        nhead, patch_size = attention_heads(
            type(self).__name__, channels, nhead, patch_size, attn_cfg
        )
        self.channels = channels
        self.n_heads = nhead
        self.patch_size = patch_size
        self.qkv = nn.Sequential(OrderedDict(conv=self.convolution(channels, 3 * channels, 1)))
        self.proj_out = nn.Sequential(OrderedDict(conv=self.convolution(channels, channels, 1)))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, nhead={self.n_heads}, patch_size={self.patch_size}"

    def _check(self, x: Tensor, layout: str) -> None:
        name, shape, n_sides = type(self).__name__, tuple(x.shape), layout.count(",") - 1
        if x.dim() <= n_sides or shape[-1 - n_sides] != self.channels:
            raise ValueError(f"{name} expects {layout} with {self.channels} channels, got {shape}")
        if any(side % self.patch_size for side in shape[-n_sides:]):
            raise ValueError(
                f"{name} cuts its input into patches of {self.patch_size}, which does not divide "
                f"{shape[-n_sides:]} in the shape {shape}; pad to a multiple of {self.patch_size}"
            )


@checked_keywords(in_channels="channels")
class Attention1d(_Attention):
    """Residual multi-head self-attention over a sequence.

    ``y = x + W_out attention(W_qkv x)``, where every patch of `patch_size` positions is one token
    and ``attention = softmax(q k^T / sqrt(width)) v`` in each head (Vaswani et al., 2017,
    https://arxiv.org/abs/1706.03762). There is no normalisation and no positional encoding.

    Memory is linear in the number of positions. torch's fused attention kernels have no second
    derivative; run inside ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` to have one.

    Parameters
    ----------
    channels
        Channels of the input and the output; ``in_channels`` is another name for it.
    nhead
        Number of heads; must divide the channels.
    patch_size
        Positions in a token; must divide the length. Default 1.
    attn_cfg
        Gives `nhead` and `patch_size` instead of the two arguments.

    Raises
    ------
    TypeError
        Without `nhead` and `attn_cfg`.
    ValueError
        If `nhead` does not divide the channels, or `patch_size` the length.

    Examples
    --------
    >>> Attention1d(in_channels=64, nhead=8)(torch.randn(4, 64, 128)).shape
    torch.Size([4, 64, 128])
    """

    convolution = nn.Conv1d

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, channels, *positions)`` to the same shape.

        Further dimensions of positions are treated as one long sequence.
        """
        sequence = x.flatten(2) if x.dim() > 3 else x
        self._check(sequence, "(batch, channels, length)")
        # The positions of a patch become channels, and come back.
        folded = self.qkv(sequence).unflatten(2, (-1, self.patch_size)).mT.flatten(1, 2)
        mixed = attend(folded, self.n_heads).unflatten(1, (-1, self.patch_size)).mT.flatten(2)
        output: Tensor = x + self.proj_out(mixed).reshape(x.shape)
        return output


@checked_keywords(in_channels="channels")
class Attention2d(_Attention):
    """Residual multi-head self-attention over the positions of an image.

    As :class:`Attention1d`; a token is a patch of `patch_size` x `patch_size` pixels, and
    `patch_size` must divide the height and the width.

    Parameters
    ----------
    channels, nhead, patch_size, attn_cfg
        As in :class:`Attention1d`.

    Examples
    --------
    >>> Attention2d(in_channels=64, nhead=8)(torch.randn(4, 64, 32, 32)).shape
    torch.Size([4, 64, 32, 32])
    """

    convolution = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(*batch, channels, height, width)`` to the same shape."""
        self._check(x, "(batch, channels, height, width)")
        images = x.unsqueeze(0) if x.dim() == 3 else x.flatten(0, -4)
        folded = pixel_shuffle(self.qkv(images), -self.patch_size)
        mixed = attend(folded.flatten(2), self.n_heads).unflatten(2, folded.shape[2:])
        output: Tensor = x + self.proj_out(pixel_shuffle(mixed, self.patch_size)).reshape(x.shape)
        return output
