"""U-Nets whose residual blocks are steered by a condition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ml_networks._compat import checked_keywords
from ml_networks._geometry import same_size_conv, unet_batch, unet_shape
from ml_networks.config import ConvConfig, MLPConfig, UNetConfig, as_config
from ml_networks.torch.attention import Attention1d, Attention2d
from ml_networks.torch.base import Module
from ml_networks.torch.hypernetworks import HyperNet
from ml_networks.torch.layers import (
    ConvNormActivation,
    ConvNormActivation1d,
    HorizonShuffle,
    HorizonUnShuffle,
    PixelShuffle,
    PixelUnshuffle,
    convolve,
    has_hooks,
    is_per_sample,
)

__all__ = [
    "ConditionalResidualBlock1d",
    "ConditionalResidualBlock2d",
    "ConditionalUnet1d",
    "ConditionalUnet2d",
    "Downsample1d",
    "Downsample2d",
    "HyperConditionalResidualBlock1d",
    "HyperConditionalResidualBlock2d",
    "Upsample1d",
    "Upsample2d",
]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d}
_CONV_NORM_ACTIVATION = {1: ConvNormActivation1d, 2: ConvNormActivation}


class _Resample(nn.Module):
    """A layer that halves or doubles every side and keeps the channels."""

    make: Callable[[int, bool], nn.Module]

    def __init__(self, dim: int, use_shuffle: bool = False) -> None:
        super().__init__()
        self.conv = type(self).make(dim, use_shuffle)

    def forward(self, x: Tensor) -> Tensor:
        """Map feature maps (batch, channels, *sides) to the same channels."""
        output: Tensor = self.conv(x)
        return output


class Downsample1d(_Resample):
    """Halve the length, by a strided convolution or by unshuffling and a convolution.

    Parameters
    ----------
    dim
        Channels.
    use_shuffle
        Unshuffle. Default: a convolution of size 3, stride 2.
    """

    @staticmethod
    def make(dim: int, use_shuffle: bool) -> nn.Module:
        """Make the layer."""
        if use_shuffle:
            return nn.Sequential(HorizonUnShuffle(2), nn.Conv1d(2 * dim, dim, 3, padding=1))
        return nn.Conv1d(dim, dim, 3, 2, 1)


class Downsample2d(_Resample):
    """Halve height and width, by a strided convolution or by unshuffling and a convolution.

    Parameters
    ----------
    dim
        Channels.
    use_shuffle
        Unshuffle. Default: a convolution of size 3, stride 2.
    """

    @staticmethod
    def make(dim: int, use_shuffle: bool) -> nn.Module:
        """Make the layer."""
        if use_shuffle:
            return nn.Sequential(PixelUnshuffle(2), nn.Conv2d(4 * dim, dim, 3, padding=1))
        return nn.Conv2d(dim, dim, 3, 2, 1)


class Upsample1d(_Resample):
    """Double the length, by a transposed convolution or by a convolution and shuffling.

    Parameters
    ----------
    dim
        Channels.
    use_shuffle
        Shuffle. Default: a transposed convolution of size 4, stride 2.
    """

    @staticmethod
    def make(dim: int, use_shuffle: bool) -> nn.Module:
        """Make the layer."""
        if use_shuffle:
            return nn.Sequential(nn.Conv1d(dim, 2 * dim, 3, padding=1), HorizonShuffle(2))
        return nn.ConvTranspose1d(dim, dim, 4, 2, 1)


class Upsample2d(_Resample):
    """Double height and width, by a transposed convolution or by a convolution and shuffling.

    Parameters
    ----------
    dim
        Channels.
    use_shuffle
        Shuffle. Default: a transposed convolution of size 4, stride 2.
    """

    @staticmethod
    def make(dim: int, use_shuffle: bool) -> nn.Module:
        """Make the layer."""
        if use_shuffle:
            return nn.Sequential(nn.Conv2d(dim, 4 * dim, 3, padding=1), PixelShuffle(2))
        return nn.ConvTranspose2d(dim, dim, 4, 2, 1)


class _PerChannel(nn.Module):
    """Give a number for each channel a dimension of size 1 for each side of a feature map."""

    def __init__(self, sides: int) -> None:
        super().__init__()
        self.sides = sides

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape, *[1] * self.sides)


def _shortcut(sides: int, in_channels: int, out_channels: int) -> nn.Module:
    if in_channels == out_channels:
        return nn.Identity()
    return _CONV[sides](in_channels, out_channels, 1)


class _ConditionalResidualBlock(nn.Module):
    sides: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        cond_dim: int,
        conv_cfg: ConvConfig,
        cond_predict_scale: bool = False,
    ) -> None:
        super().__init__()
        cfg = same_size_conv(conv_cfg, type(self).__name__)
        convolution = _CONV_NORM_ACTIVATION[self.sides]
        self.out_channels = out_channels
        self.cond_predict_scale = cond_predict_scale
        self.first_conv = convolution(in_channels, out_channels, cfg)
        self.last_conv = convolution(out_channels, out_channels, cfg)
        self.cond_encoder = nn.Sequential(
            nn.Linear(cond_dim, 2 * out_channels if cond_predict_scale else out_channels),
            _PerChannel(self.sides),
        )
        self.residual_conv = _shortcut(self.sides, in_channels, out_channels)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Map (batch, in_channels, *sides), (batch, cond_dim) to (batch, out_channels, *sides)."""
        if x.is_cuda and self._is_one_op():
            return self._one_op(x, cond)
        hidden, code = self.first_conv(x), self.cond_encoder(cond)
        if self.cond_predict_scale:
            scale, bias = code.chunk(2, 1)
            hidden = torch.addcmul(bias, scale, hidden)
        else:
            hidden = hidden + code
        output: Tensor = self.last_conv(hidden) + self.residual_conv(x)
        return output

    def _is_one_op(self) -> bool:
        """Whether all that follows either convolution is one op."""
        kind: Any = _CONV_NORM_ACTIVATION[self.sides]
        layers: tuple[Any, Any] = (self.first_conv, self.last_conv)
        return all(
            type(layer) is kind and not has_hooks(layer) and layer._is_one_op() for layer in layers
        )

    def _one_op(self, x: Tensor, cond: Tensor) -> Tensor:
        first: Any = self.first_conv
        last: Any = self.last_conv
        code = self.cond_encoder(cond).flatten(1)
        scale, shift = code.chunk(2, 1) if self.cond_predict_scale else (None, code)
        hidden = first._one_op(x, scale=scale, shift=shift)
        output: Tensor = last._one_op(hidden, self.residual_conv(x))
        return output


@checked_keywords(cond_pred_scale="cond_predict_scale")
class ConditionalResidualBlock1d(_ConditionalResidualBlock):
    """Residual block whose channels are shifted (and scaled) by a condition.

    ``y = conv2(scale(c) * conv1(x) + bias(c)) + shortcut(x)``, with scale(c) = 1 unless
    `cond_predict_scale` (FiLM, https://arxiv.org/abs/1709.07871). The shortcut is a 1x1
    convolution where the channels change.

    Parameters
    ----------
    in_channels, out_channels
        Channels of input and output.
    cond_dim
        Width of the condition.
    conv_cfg
        Both convolutions; they must keep the size.
    cond_predict_scale
        The condition scales too. Default False.
    """

    sides = 1


@checked_keywords(cond_pred_scale="cond_predict_scale")
class ConditionalResidualBlock2d(_ConditionalResidualBlock):
    """Residual block whose channels are shifted (and scaled) by a condition.

    As :class:`ConditionalResidualBlock1d`, on images.

    Parameters
    ----------
    in_channels, out_channels, cond_dim, conv_cfg, cond_predict_scale
        As in :class:`ConditionalResidualBlock1d`.
    """

    sides = 2


class _PerSampleConv1d(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return convolve(self, input) if is_per_sample(self) else super().forward(input)


class _PerSampleConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return convolve(self, input) if is_per_sample(self) else super().forward(input)


class _HyperConditionalResidualBlock(nn.Module):
    sides: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        cond_dim: int,
        conv_cfg: ConvConfig,
        hyper_mlp_cfg: MLPConfig | None = None,
    ) -> None:
        super().__init__()
        cfg = same_size_conv(conv_cfg, type(self).__name__)
        convolution = _CONV_NORM_ACTIVATION[self.sides]
        self.out_channels = out_channels
        self.first_conv = convolution(in_channels, out_channels, cfg)
        self.last_conv = convolution(out_channels, out_channels, cfg)
        # Same parameters, same initial values; the class alone can take weights with a batch.
        for layer in (self.first_conv, self.last_conv):
            layer.conv.__class__ = _PerSampleConv1d if self.sides == 1 else _PerSampleConv2d
        shapes = {
            f"{name}.{key}": tuple(parameter.shape)
            for name in ("first_conv", "last_conv")
            for key, parameter in self.get_submodule(name).named_parameters()
            if key.startswith("conv.")
        }
        self.hyper_net = HyperNet(cond_dim, shapes, hyper_mlp_cfg)
        self.hyper_net.reset_generator(offset=False)
        self.residual_conv = _shortcut(self.sides, in_channels, out_channels)

    def functional_call(self, name: str, made: dict[str, Tensor], x: Tensor) -> Tensor:
        """Run the layer `name` with its own parameters plus the ones made for each sample."""
        layer: Any = self.get_submodule(name)
        parameters = {
            key: parameter + made[f"{name}.{key}"]
            for key, parameter in layer.conv.named_parameters("conv")
            if f"{name}.{key}" in made
        }
        # What is made for each sample fits nothing else, so no ties are looked for.
        output: Tensor = functional_call(layer, parameters, (x,), tie_weights=False)
        return output

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Map (batch, in_channels, *sides), (batch, cond_dim) to (batch, out_channels, *sides)."""
        made = self.hyper_net(cond)
        hidden = self.functional_call("first_conv", made, x)
        output: Tensor = self.functional_call("last_conv", made, hidden) + self.residual_conv(x)
        return output


@checked_keywords()
class HyperConditionalResidualBlock1d(_HyperConditionalResidualBlock):
    """Residual block whose convolutions are made for each sample from its condition.

    ``y = conv2(conv1(x)) + shortcut(x)``: weight and bias of the two convolutions are
    ``W + h(c)``, with a learnt W and a :class:`~ml_networks.torch.HyperNet` h that starts small.
    All samples run in one op, :func:`ml_networks.kernels.torch.conv_shuffle`: a batched product on
    a GPU, a convolution with a group for each sample elsewhere.

    Parameters
    ----------
    in_channels, out_channels
        Channels of input and output.
    cond_dim
        Width of the condition.
    conv_cfg
        Both convolutions; they must keep the size.
    hyper_mlp_cfg
        The hypernetwork; None: one linear layer. Its last layer has a row for every weight of
        the two convolutions.
    """

    sides = 1


@checked_keywords()
class HyperConditionalResidualBlock2d(_HyperConditionalResidualBlock):
    """Residual block whose convolutions are made for each sample from its condition.

    As :class:`HyperConditionalResidualBlock1d`, on images.

    Parameters
    ----------
    in_channels, out_channels, cond_dim, conv_cfg, hyper_mlp_cfg
        As in :class:`HyperConditionalResidualBlock1d`.
    """

    sides = 2


class _Level(nn.ModuleList):
    """[residual block, attention, residual block] and, but in the middle, [resampling]."""

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Return the feature maps before and after resampling."""
        first, attention, second, *resample = self
        x = second(attention(first(x, cond)), cond)
        return x, resample[0](x) if resample else x


class _ConditionalUnet(Module):
    sides: int
    block: type[_ConditionalResidualBlock]
    hyper_block: type[_HyperConditionalResidualBlock]
    attention: type[Attention1d] | type[Attention2d]
    downsample: type[_Resample]
    upsample: type[_Resample]

    def __init__(self, feature_dim: int, obs_shape: Sequence[int], cfg: UNetConfig) -> None:
        super().__init__()
        name = type(self).__name__
        cfg = as_config(cfg, UNetConfig, what=f"{name} cfg")
        obs_shape = unet_shape(obs_shape, len(cfg.channels), self.sides, name)
        self.feature_dim = feature_dim
        self.obs_shape = obs_shape
        self.cfg = cfg

        channels = cfg.channels
        last = len(channels) - 1
        # Built, and so ordered among the parameters, as in 0.2.6: optimizers go by that order.
        self.mid_modules = self._level(channels[-1], channels[-1])
        self.up_modules = nn.ModuleList(
            self._level(
                2 * channels[i], channels[i - 1], self.upsample(channels[i - 1], cfg.use_shuffle)
            )
            for i in range(last, 0, -1)
        )
        self.down_modules = nn.ModuleList(
            self._level(
                before,
                after,
                self.downsample(after, cfg.use_shuffle) if i < last else nn.Identity(),
            )
            for i, (before, after) in enumerate(
                zip((obs_shape[0], *channels), channels, strict=False)
            )
        )
        self.final_conv = nn.Sequential(
            _CONV_NORM_ACTIVATION[self.sides](channels[0], channels[0], cfg.conv_cfg),
            _CONV[self.sides](channels[0], obs_shape[0], 1),
        )

    def _level(self, in_channels: int, out_channels: int, *resample: nn.Module) -> _Level:
        attention: nn.Module = nn.Identity()
        if self.cfg.has_attn:
            attention = self.attention(out_channels, self.cfg.nhead)
        first = self._block(in_channels, out_channels)
        return _Level((first, attention, self._block(out_channels, out_channels), *resample))

    def _block(self, in_channels: int, out_channels: int) -> nn.Module:
        cfg = self.cfg
        shared = (in_channels, out_channels, self.feature_dim, cfg.conv_cfg)
        if cfg.use_hypernet:
            return self.hyper_block(*shared, cfg.hyper_mlp_cfg)
        return self.block(*shared, cfg.cond_pred_scale)

    def forward(self, base: Tensor, cond: Tensor) -> Tensor:
        """Map (*batch, *obs_shape) and (*batch, feature_dim) to (*batch, *obs_shape).

        Raises
        ------
        ValueError
            If a shape does not fit, or the batch dimensions differ.
        """
        batch = unet_batch(
            base.shape, cond.shape, self.obs_shape, self.feature_dim, type(self).__name__
        )
        samples = math.prod(batch)
        x = base.reshape(samples, *self.obs_shape)
        cond = cond.reshape(samples, self.feature_dim)
        skips = []
        for level in self.down_modules:
            skip, x = level(x, cond)
            skips.append(skip)
        x, _ = self.mid_modules(x, cond)
        for level in self.up_modules:
            _, x = level(torch.cat((x, skips.pop()), 1), cond)
        output: Tensor = self.final_conv(x).reshape(base.shape)
        return output


@checked_keywords(unet_cfg="cfg")
class ConditionalUnet1d(_ConditionalUnet):
    """U-Net over a sequence, steered by a condition (https://arxiv.org/abs/1505.04597).

    Each level down is [residual block, attention, residual block, halving], the lowest is not
    halved; the middle is [block, attention, block]; each level up takes the output of the same
    level beside its own and is [block, attention, block, doubling]. A norm, an activation and a
    1x1 convolution follow. The condition enters every residual block.

    Parameters
    ----------
    feature_dim
        Width of the condition.
    obs_shape
        (channels, length), the length a multiple of ``2**(levels - 1)``.
    cfg
        The :class:`~ml_networks.config.UNetConfig`; with ``has_attn`` self-attention with
        ``nhead`` heads, with ``use_hypernet`` the residual blocks of
        :class:`HyperConditionalResidualBlock1d`.

    Raises
    ------
    ValueError
        If a side is no such multiple, or ``nhead`` does not divide the channels of a level.
    """

    sides = 1
    block = ConditionalResidualBlock1d
    hyper_block = HyperConditionalResidualBlock1d
    attention = Attention1d
    downsample = Downsample1d
    upsample = Upsample1d


@checked_keywords(unet_cfg="cfg")
class ConditionalUnet2d(_ConditionalUnet):
    """U-Net over an image, steered by a condition.

    As :class:`ConditionalUnet1d`, with ``obs_shape`` (channels, height, width), both sides
    multiples of ``2**(levels - 1)``.

    Parameters
    ----------
    feature_dim, obs_shape, cfg
        As in :class:`ConditionalUnet1d`.
    """

    sides = 2
    block = ConditionalResidualBlock2d
    hyper_block = HyperConditionalResidualBlock2d
    attention = Attention2d
    downsample = Downsample2d
    upsample = Upsample2d
