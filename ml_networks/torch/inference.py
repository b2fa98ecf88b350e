"""Batch norms folded into the convolutions beside them, for evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ml_networks._fusion import MIXES_POSITIONS, NO_STATISTICS, PADS_WITH_ZEROS, Fusion
from ml_networks.torch.layers import (
    ConvNormActivation,
    ConvNormActivation1d,
    ConvTransposeNormActivation,
    ConvTransposeNormActivation1d,
    HorizonShuffle,
    HorizonUnShuffle,
)

__all__ = ["Fusion", "fuse_for_inference", "unfuse"]

_BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
_BLOCKS = (
    ConvNormActivation,
    ConvNormActivation1d,
    ConvTransposeNormActivation,
    ConvTransposeNormActivation1d,
)


# A folded module is the same object under another class, which has the same parameters, buffers
# and hooks. So names in a state dict, optimizers' references, copies and pickles are as before.


class _FoldedConv:
    folded_weight: Tensor
    folded_bias: Tensor


class _FoldedConv1d(_FoldedConv, nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.folded_weight, self.folded_bias)


class _FoldedConv2d(_FoldedConv, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.folded_weight, self.folded_bias)


class _FoldedConvTranspose1d(_FoldedConv, nn.ConvTranspose1d):
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return _transposed(F.conv_transpose1d, self, input)


class _FoldedConvTranspose2d(_FoldedConv, nn.ConvTranspose2d):
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return _transposed(F.conv_transpose2d, self, input)


def _transposed(function: Callable[..., Tensor], conv: Any, x: Tensor) -> Tensor:
    return function(
        x,
        conv.folded_weight,
        conv.folded_bias,
        conv.stride,
        conv.padding,
        conv.output_padding,
        conv.groups,
        conv.dilation,
    )


_FOLDED_CONVS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: _FoldedConv1d,
    nn.Conv2d: _FoldedConv2d,
    nn.ConvTranspose1d: _FoldedConvTranspose1d,
    nn.ConvTranspose2d: _FoldedConvTranspose2d,
}
_UNFOLDED_CONVS = {folded: plain for plain, folded in _FOLDED_CONVS.items()}


class _FoldedNorm(nn.BatchNorm2d):
    """A batch norm whose scale and shift its convolution applies."""

    pair: _Pair
    plain_class: type[nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        return input

    def train(self, mode: bool = True) -> nn.Module:  # type: ignore[override]
        if mode:
            _unfold(self)
            warnings.warn(
                "train() has undone fuse_for_inference: batch statistics cannot be folded",
                stacklevel=2,
            )
        # No longer of this class, so no super().
        return nn.Module.train(self, mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # In every pair the convolution is loaded before its norm.
        self.pair.fold(self)


@dataclass(frozen=True)
class _Pair:
    """A convolution, and how the channels of the norm beside it relate to its own."""

    conv: nn.Module
    norm_first: bool = False
    spread: int = 1
    """Output channels of the convolution to a channel of the norm."""

    def fold(self, norm: nn.Module) -> None:
        """Compute the convolution's folded weight and bias, in float64."""
        conv: Any = self.conv
        bn: Any = norm
        with torch.no_grad():
            scale = torch.rsqrt(bn.running_var.double() + bn.eps)
            if bn.weight is not None:
                scale *= bn.weight.double()
            shift = -bn.running_mean.double() * scale
            if bn.bias is not None:
                shift += bn.bias.double()
            weight = conv.weight.double()
            bias = torch.zeros_like(shift[:1]) if conv.bias is None else conv.bias.double()
            if self.norm_first:
                # weight[o, i] meets channel i of o's group.
                groups = weight.unflatten(0, (conv.groups, -1))
                by_group = (conv.groups, 1, -1, *(1,) * (weight.ndim - 2))
                scale, shift = scale.view(by_group), shift.view(by_group)
                bias = bias + (groups * shift).flatten(2).sum(2).flatten()
                weight = (groups * scale).flatten(0, 1)
            else:
                scale = scale.repeat_interleave(self.spread)
                shift = shift.repeat_interleave(self.spread)
                bias = bias * scale + shift
                if isinstance(conv, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
                    # weight[i, o] makes channel o of i's group.
                    groups = weight.unflatten(0, (conv.groups, -1))
                    by_group = (conv.groups, 1, -1, *(1,) * (weight.ndim - 2))
                    weight = (groups * scale.view(by_group)).flatten(0, 1)
                else:
                    weight = weight * scale.view(-1, *(1,) * (weight.ndim - 1))
            for name, value in (("folded_weight", weight), ("folded_bias", bias)):
                conv.register_buffer(name, value.to(conv.weight.dtype), persistent=False)


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Module, _Pair | str]]:
    """Yield the norm after (or before) each convolution, with its pair or why there is none."""
    for parent in module.modules():
        if isinstance(parent, _BLOCKS):
            yield parent.norm, _block_pair(parent)
        elif type(parent) is nn.Sequential:
            for conv, norm in pairwise(parent):
                if type(conv) in _FOLDED_CONVS:
                    yield norm, _Pair(conv)


def _block_pair(block: nn.Module) -> _Pair | str:
    conv: Any = block.conv
    shuffle = getattr(block, "horizontal_shuffle", None)
    if getattr(block, "norm_first", False):
        if conv.padding_mode == "zeros" and (conv.padding == "same" or any(conv.padding)):
            return PADS_WITH_ZEROS
        return _Pair(conv, norm_first=True)
    if isinstance(shuffle, HorizonUnShuffle):
        return MIXES_POSITIONS
    return _Pair(conv, spread=shuffle.upscale_factor if isinstance(shuffle, HorizonShuffle) else 1)


def fuse_for_inference(module: nn.Module) -> Fusion:
    r"""Fold the batch norms of a module in evaluation mode into its convolutions, in place.

    A batch norm of fixed statistics is :math:`s x + t` per channel, with
    :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}` and :math:`t = \beta - \mu s`. After a
    convolution it is the same as weights :math:`s W` and bias :math:`s b + t`, which are computed
    in float64; before one, as :math:`W s` and :math:`b + W t` unless the padding is zeros.
    Folded are the batch norms of the library's convolution blocks, and those right after a
    convolution in an ``nn.Sequential``.

    The parameters stay as they are, so ``state_dict`` does not change, and
    ``load_state_dict`` folds anew what it loads. Changing weights in any other way while they are
    folded has no effect until this is called again. :func:`unfuse` undoes it, as does
    ``train()``, which warns.

    Parameters
    ----------
    module
        Any module, in evaluation mode.

    Returns
    -------
    Fusion
        Which batch norms are folded, and for every other one why it is not.

    Raises
    ------
    ValueError
        If the module is in training mode.
    """
    if module.training:
        raise ValueError(
            "module is in training mode, whose batch statistics cannot be folded; call "
            "module.eval() first"
        )
    unfuse(module)
    uses: dict[nn.Module, int] = {}
    reasons: dict[nn.Module, str] = {}
    found: dict[nn.Module, _Pair] = {}
    for norm, pair in _pairs(module):
        if not isinstance(norm, _BatchNorm):
            continue
        if isinstance(pair, str):
            reasons[norm] = pair
        else:
            found[norm] = pair
            uses[pair.conv] = uses.get(pair.conv, 0) + 1
    names = {norm: name for name, norm in module.named_modules() if isinstance(norm, _BatchNorm)}
    folded, kept = [], {}
    for norm, name in names.items():
        reason = reasons.get(norm) or _why_not(norm, found.get(norm), uses)
        if reason is None:
            _fold(norm, found[norm])
            folded.append(name)
        else:
            kept[name] = reason
    return Fusion(tuple(folded), kept)


def _why_not(norm: _BatchNorm, pair: _Pair | None, uses: dict[nn.Module, int]) -> str | None:
    if pair is None:
        return "no convolution is right before it in a block or an nn.Sequential"
    if type(pair.conv) not in _FOLDED_CONVS:
        return f"its convolution is a {type(pair.conv).__name__}"
    if uses[pair.conv] > 1:
        return "its convolution is shared"
    if norm.training:
        return "it is in training mode"
    if norm.running_mean is None:
        return NO_STATISTICS
    return None


def _fold(norm: Any, pair: _Pair) -> None:
    pair.fold(norm)
    pair.conv.__class__ = _FOLDED_CONVS[type(pair.conv)]
    norm.pair, norm.plain_class = pair, type(norm)
    norm.__class__ = _FoldedNorm


def _unfold(norm: Any) -> None:
    conv: Any = norm.pair.conv
    del conv.folded_weight, conv.folded_bias
    conv.__class__ = _UNFOLDED_CONVS[type(conv)]
    plain_class = norm.plain_class
    del norm.pair, norm.plain_class
    norm.__class__ = plain_class


def unfuse(module: nn.Module) -> None:
    """Undo :func:`fuse_for_inference`: convolutions and batch norms compute apart again.

    Parameters
    ----------
    module
        A module, folded in part, in whole or not at all.
    """
    for norm in list(module.modules()):
        if isinstance(norm, _FoldedNorm):
            _unfold(norm)
