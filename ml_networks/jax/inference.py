"""Batch norms folded into the convolutions beside them, for evaluation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ml_networks._fusion import MIXES_POSITIONS, NO_STATISTICS, PADS_WITH_ZEROS, Fusion
from ml_networks.jax.layers import (
    ConvNormActivation,
    ConvNormActivation1d,
    ConvTransposeNormActivation,
    ConvTransposeNormActivation1d,
)
from ml_networks.jax.primitives import BatchNorm
from ml_networks.jax.unet import HyperConditionalResidualBlock1d, HyperConditionalResidualBlock2d

__all__ = ["Fusion", "fuse_for_inference", "unfuse"]

_HYPER_BLOCKS = (HyperConditionalResidualBlock1d, HyperConditionalResidualBlock2d)

# A folded block is the same object under another class: its variables, their paths and so states
# and checkpoints are as before. The folded weights are computed where they are used, which costs
# little beside the convolution and follows every change of weights.


class _Folded(nnx.Module):
    conv: Any
    norm: Any
    activation: Any
    dropout: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.norm.use_running_average:
            return super().__call__(x)
        y = self.conv.convolve(x, *_folded_weights(self))
        shuffle = getattr(self, "_shuffle", None)
        y = y if shuffle is None else shuffle(y)
        return self.dropout(self.activation(y))


class _FoldedConv(_Folded, ConvNormActivation):
    pass


class _FoldedConv1d(_Folded, ConvNormActivation1d):
    pass


class _FoldedConvTranspose(_Folded, ConvTransposeNormActivation):
    pass


class _FoldedConvTranspose1d(_Folded, ConvTransposeNormActivation1d):
    pass


_FOLDED: dict[type[nnx.Module], type[nnx.Module]] = {
    ConvNormActivation: _FoldedConv,
    ConvNormActivation1d: _FoldedConv1d,
    ConvTransposeNormActivation: _FoldedConvTranspose,
    ConvTransposeNormActivation1d: _FoldedConvTranspose1d,
}
_UNFOLDED = {folded: plain for plain, folded in _FOLDED.items()}


def _folded_weights(block: Any) -> tuple[jax.Array, jax.Array]:
    """The kernel and bias of the convolution with the norm's scale and shift in them."""
    conv, norm = block.conv, block.norm
    kernel = conv.kernel[...]
    exact = jnp.promote_types(kernel.dtype, jnp.float32)
    kernel = kernel.astype(exact)
    scale = jax.lax.rsqrt(norm.var[...].astype(exact) + norm.eps)
    scale = scale if norm.scale is None else scale * norm.scale[...]
    shift = -norm.mean[...] * scale
    shift = shift if norm.bias is None else shift + norm.bias[...]
    bias = jnp.zeros((), exact) if conv.bias is None else conv.bias[...]
    if getattr(block, "norm_first", False):
        # kernel[..., i, o] meets channel i of o's group.
        scale, shift = (
            jnp.repeat(value.reshape(conv.groups, -1), kernel.shape[-1] // conv.groups, 0).T
            for value in (scale, shift)
        )
        return kernel * scale, bias + (kernel * shift).sum(range(kernel.ndim - 1))
    # Where a shuffle comes between, several channels of the convolution make one of the norm.
    scale, shift = (jnp.repeat(v, kernel.shape[-1] // len(v)) for v in (scale, shift))
    return kernel * scale, bias * scale + shift


def fuse_for_inference(module: nnx.Module) -> Fusion:
    r"""Fold the batch norms of a module into its convolutions while it evaluates, in place.

    A batch norm of fixed statistics is :math:`s x + t` per channel, with
    :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}` and :math:`t = \beta - \mu s`. After a
    convolution it is the same as weights :math:`s W` and bias :math:`s b + t`; before one, as
    :math:`W s` and :math:`b + W t` unless the padding is zeros. Folded are the batch norms of
    the library's convolution blocks.

    Variables stay as they are, so states and checkpoints do not change, and the folded weights
    follow them. While training (after ``train()``) a folded block computes as it would otherwise.
    Fold before ``nnx.split``: the graph definition holds which blocks are folded.

    Parameters
    ----------
    module
        Any module.

    Returns
    -------
    Fusion
        Which batch norms are folded, and for every other one why it is not.
    """
    unfuse(module)
    reasons: dict[int, str] = {}
    found: dict[int, Any] = {}
    norms: dict[int, str] = {}
    for path, node in nnx.iter_graph(module):
        if isinstance(node, BatchNorm):
            norms[id(node)] = ".".join(map(str, path))
        if isinstance(node, _HYPER_BLOCKS):
            for layer in (node.first_conv, node.last_conv):
                reasons[id(layer.norm)] = "the weights of its convolution are made per sample"
        if type(node) in _FOLDED:
            block: Any = node
            found[id(block.norm)] = block
    folded, kept = [], {}
    for identity, name in norms.items():
        reason = reasons.get(identity) or _why_not(found.get(identity))
        if reason is None:
            block = found[identity]
            block.__class__ = _FOLDED[type(block)]
            folded.append(name)
        else:
            kept[name] = reason
    return Fusion(tuple(folded), kept)


def _why_not(block: Any | None) -> str | None:
    if block is None:
        return "it is not part of a convolution block"
    if block.norm.mean is None:
        return NO_STATISTICS
    if getattr(block, "norm_first", False):
        pads = block.conv.padding_mode == "zeros" and any(block.conv.padding)
        return PADS_WITH_ZEROS if pads else None
    if isinstance(block, ConvNormActivation1d) and block.scale_factor < 0:
        return MIXES_POSITIONS
    return None


def unfuse(module: nnx.Module) -> None:
    """Undo :func:`fuse_for_inference`: convolutions and batch norms compute apart again.

    Parameters
    ----------
    module
        A module, folded in part, in whole or not at all.
    """
    for _, node in nnx.iter_graph(module):
        if type(node) in _UNFOLDED:
            node.__class__ = _UNFOLDED[type(node)]
