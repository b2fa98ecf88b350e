"""U-Nets whose residual blocks are steered by a condition.

Shapes are channels-first, as in :mod:`ml_networks.torch.unet`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ml_networks._compat import checked_keywords
from ml_networks._geometry import same_size_conv, unet_batch, unet_shape
from ml_networks.config import ConvConfig, MLPConfig, UNetConfig, as_config
from ml_networks.jax.attention import Attention1d, Attention2d
from ml_networks.jax.base import BaseModule
from ml_networks.jax.hypernetworks import HyperNet
from ml_networks.jax.layers import (
    ConvNormActivation,
    ConvNormActivation1d,
    Identity,
    _is_one_convolution,
    _one_convolution,
    convolve,
)
from ml_networks.jax.primitives import (
    Conv,
    ConvTranspose,
    Linear,
    on_one_accelerator,
    pixel_shuffle,
    pixel_unshuffle,
    with_channels_last,
)
from ml_networks.jax.rngs import RngsLike, as_rngs

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

Array = jax.Array
_CONV_NORM_ACTIVATION: dict[int, type[ConvNormActivation] | type[ConvNormActivation1d]] = {
    1: ConvNormActivation1d,
    2: ConvNormActivation,
}


class _Downsample(nnx.Module):
    sides: ClassVar[int]

    def __init__(
        self, dim: int, use_shuffle: bool = False, *, rngs: RngsLike | None = None
    ) -> None:
        rngs = as_rngs(rngs)
        self.use_shuffle = use_shuffle
        if use_shuffle:
            self.conv = Conv(2**self.sides * dim, dim, 3, padding=1, sides=self.sides, rngs=rngs)
        else:
            self.conv = Conv(dim, dim, 3, 2, 1, sides=self.sides, rngs=rngs)

    @property
    def torch_names(self) -> Mapping[str, str]:
        """Where the children stand in torch."""
        return {"conv": "conv.1" if self.use_shuffle else "conv"}

    def __call__(self, x: Array) -> Array:
        """Map (batch, channels, *sides) to the same channels and half the sides."""
        return self.conv(pixel_unshuffle(x, 2, self.sides) if self.use_shuffle else x)


@checked_keywords()
class Downsample1d(_Downsample):
    """Halve the length, by a strided convolution or by unshuffling and a convolution.

    Parameters
    ----------
    dim
        Channels.
    use_shuffle
        Unshuffle. Default: a convolution of size 3, stride 2.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    sides = 1


@checked_keywords()
class Downsample2d(_Downsample):
    """Halve height and width, by a strided convolution or by unshuffling and a convolution.

    Parameters
    ----------
    dim
        Channels.
    use_shuffle
        Unshuffle. Default: a convolution of size 3, stride 2.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    sides = 2


class _Upsample(nnx.Module):
    sides: ClassVar[int]

    def __init__(
        self, dim: int, use_shuffle: bool = False, *, rngs: RngsLike | None = None
    ) -> None:
        rngs = as_rngs(rngs)
        self.use_shuffle = use_shuffle
        self.conv: Conv | ConvTranspose
        if use_shuffle:
            self.conv = Conv(dim, 2**self.sides * dim, 3, padding=1, sides=self.sides, rngs=rngs)
        else:
            self.conv = ConvTranspose(dim, dim, 4, 2, 1, sides=self.sides, rngs=rngs)

    @property
    def torch_names(self) -> Mapping[str, str]:
        """Where the children stand in torch."""
        return {"conv": "conv.0" if self.use_shuffle else "conv"}

    def __call__(self, x: Array) -> Array:
        """Map (batch, channels, *sides) to the same channels and twice the sides."""
        x = self.conv(x)
        return pixel_shuffle(x, 2, self.sides) if self.use_shuffle else x


@checked_keywords()
class Upsample1d(_Upsample):
    """Double the length, by a transposed convolution or by a convolution and shuffling.

    Parameters
    ----------
    dim
        Channels.
    use_shuffle
        Shuffle. Default: a transposed convolution of size 4, stride 2.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    sides = 1


@checked_keywords()
class Upsample2d(_Upsample):
    """Double height and width, by a transposed convolution or by a convolution and shuffling.

    Parameters
    ----------
    dim
        Channels.
    use_shuffle
        Shuffle. Default: a transposed convolution of size 4, stride 2.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    sides = 2


def _shortcut(sides: int, in_channels: int, out_channels: int, rngs: nnx.Rngs) -> Any:
    if in_channels == out_channels:
        return Identity()
    return Conv(in_channels, out_channels, 1, sides=sides, rngs=rngs)


class _ConditionalResidualBlock(nnx.Module):
    sides: ClassVar[int]
    torch_names: ClassVar[dict[str, str]] = {"cond_linear": "cond_encoder.0"}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        cond_dim: int,
        conv_cfg: ConvConfig,
        cond_predict_scale: bool = False,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        cfg = same_size_conv(conv_cfg, type(self).__name__)
        convolution = _CONV_NORM_ACTIVATION[self.sides]
        self.out_channels = out_channels
        self.cond_predict_scale = cond_predict_scale
        self.first_conv = convolution(in_channels, out_channels, cfg, rngs=rngs)
        self.last_conv = convolution(out_channels, out_channels, cfg, rngs=rngs)
        width = 2 * out_channels if cond_predict_scale else out_channels
        self.cond_linear = Linear(cond_dim, width, rngs=rngs)
        self.residual_conv = _shortcut(self.sides, in_channels, out_channels, rngs)

    def __call__(self, x: Array, cond: Array) -> Array:
        """Map (batch, in_channels, *sides), (batch, cond_dim) to (batch, out_channels, *sides)."""
        code = self.cond_linear(cond)
        code = code.reshape(len(code), *[1] * self.sides, -1)

        def steered(hidden: Array) -> Array:
            if self.cond_predict_scale:
                scale, bias = jnp.split(code, 2, -1)
                return scale * hidden + bias
            return hidden + code

        hidden = with_channels_last(steered, self.first_conv(x))
        return with_channels_last(jnp.add, self.last_conv(hidden), self.residual_conv(x))


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
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    sides = 1


@checked_keywords(cond_pred_scale="cond_predict_scale")
class ConditionalResidualBlock2d(_ConditionalResidualBlock):
    """Residual block whose channels are shifted (and scaled) by a condition.

    As :class:`ConditionalResidualBlock1d`, on images.

    Parameters
    ----------
    in_channels, out_channels, cond_dim, conv_cfg, cond_predict_scale, rngs
        As in :class:`ConditionalResidualBlock1d`.
    """

    sides = 2


class _HyperConditionalResidualBlock(nnx.Module):
    sides: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        cond_dim: int,
        conv_cfg: ConvConfig,
        hyper_mlp_cfg: MLPConfig | None = None,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        cfg = same_size_conv(conv_cfg, type(self).__name__)
        convolution = _CONV_NORM_ACTIVATION[self.sides]
        self.out_channels = out_channels
        self.first_conv = convolution(in_channels, out_channels, cfg, rngs=rngs)
        self.last_conv = convolution(out_channels, out_channels, cfg, rngs=rngs)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, layer in (("first_conv", self.first_conv), ("last_conv", self.last_conv)):
            *window, inner, outer = layer.conv.kernel.shape
            shapes[f"{name}.conv.weight"] = (outer, inner, *window)
            if layer.conv.bias is not None:
                shapes[f"{name}.conv.bias"] = (outer,)
        self.hyper_net = HyperNet(cond_dim, shapes, hyper_mlp_cfg, rngs=rngs)
        self.hyper_net.reset_generator(offset=False, rngs=rngs)
        self.residual_conv = _shortcut(self.sides, in_channels, out_channels, rngs)

    def __call__(self, x: Array, cond: Array) -> Array:
        """Map (batch, in_channels, *sides), (batch, cond_dim) to (batch, out_channels, *sides)."""
        made = self.hyper_net(cond)
        shortcut = self.residual_conv(x)
        for name, layer in (("first_conv", self.first_conv), ("last_conv", self.last_conv)):
            weight, bias = made[f"{name}.conv.weight"], made.get(f"{name}.conv.bias")
            # The names and layouts made are torch's, (out, in, *window).
            kernel = layer.conv.kernel[...] + jnp.moveaxis(weight, (1, 2), (-1, -2))
            if layer.conv.bias is not None:
                bias = layer.conv.bias[...] + bias
            if on_one_accelerator() and _is_one_convolution(layer, x):
                x = _one_convolution(layer, x, kernel, bias)
            else:
                x = layer.through(partial(_per_sample, layer.conv, kernel, bias), x)
        return with_channels_last(jnp.add, x, shortcut)


def _per_sample(conv: Conv, kernel: Array, bias: Array | None, x: Array) -> Array:
    """Apply `conv` with a kernel and a bias for each sample, (batch, *shape)."""
    if on_one_accelerator():
        return convolve(conv, x, kernel, bias)

    def run(x: Array, kernel: Array, bias: Array | None) -> Array:
        return conv.convolve(x[None], kernel, bias)[0]

    return jax.vmap(run)(x, kernel, bias)


@checked_keywords()
class HyperConditionalResidualBlock1d(_HyperConditionalResidualBlock):
    """Residual block whose convolutions are made for each sample from its condition.

    ``y = conv2(conv1(x)) + shortcut(x)``: weight and bias of the two convolutions are
    ``W + h(c)``, with a learnt W and a :class:`~ml_networks.jax.HyperNet` h that starts small.
    All samples run in one op, :func:`ml_networks.kernels.jax.conv_shuffle`, on a GPU, and in one
    grouped convolution elsewhere.

    Parameters
    ----------
    in_channels, out_channels
        Channels of input and output.
    cond_dim
        Width of the condition.
    conv_cfg
        Both convolutions; they must keep the size.
    hyper_mlp_cfg
        The hypernetwork; None: one linear layer. Its last layer has a column for every weight of
        the two convolutions.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    sides = 1


@checked_keywords()
class HyperConditionalResidualBlock2d(_HyperConditionalResidualBlock):
    """Residual block whose convolutions are made for each sample from its condition.

    As :class:`HyperConditionalResidualBlock1d`, on images.

    Parameters
    ----------
    in_channels, out_channels, cond_dim, conv_cfg, hyper_mlp_cfg, rngs
        As in :class:`HyperConditionalResidualBlock1d`.
    """

    sides = 2


def _through_level(level: nnx.List, x: Array, cond: Array) -> tuple[Array, Array]:
    """Return the feature maps before and after resampling.

    A level is [residual block, attention, residual block] and, but in the middle, [resampling].
    """
    first, attention, second, *resample = level
    x = second(attention(first(x, cond)), cond)
    return x, resample[0](x) if resample else x


class _ConditionalUnet(BaseModule):
    sides: ClassVar[int]
    block: ClassVar[type[_ConditionalResidualBlock]]
    hyper_block: ClassVar[type[_HyperConditionalResidualBlock]]
    attention: ClassVar[type[Attention1d] | type[Attention2d]]
    downsample: ClassVar[type[_Downsample]]
    upsample: ClassVar[type[_Upsample]]
    torch_names: ClassVar[dict[str, str]] = {
        "final_conv1": "final_conv.0",
        "final_conv2": "final_conv.1",
    }

    def __init__(
        self,
        feature_dim: int,
        obs_shape: Sequence[int],
        cfg: UNetConfig,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        name = type(self).__name__
        cfg = as_config(cfg, UNetConfig, what=f"{name} cfg")
        obs_shape = unet_shape(obs_shape, len(cfg.channels), self.sides, name)
        self.feature_dim = feature_dim
        self.obs_shape = obs_shape

        channels = cfg.channels
        last = len(channels) - 1

        def level(in_channels: int, out_channels: int, *resample: Any) -> nnx.List:
            attention: Any = Identity()
            if cfg.has_attn:
                attention = self.attention(out_channels, cfg.nhead, rngs=rngs)
            first = self._block(in_channels, out_channels, cfg, rngs)
            second = self._block(out_channels, out_channels, cfg, rngs)
            return nnx.List([first, attention, second, *resample])

        self.mid_modules = level(channels[-1], channels[-1])
        self.up_modules = nnx.List(
            [
                level(
                    2 * channels[i],
                    channels[i - 1],
                    self.upsample(channels[i - 1], cfg.use_shuffle, rngs=rngs),
                )
                for i in range(last, 0, -1)
            ]
        )
        self.down_modules = nnx.List(
            [
                level(
                    before,
                    after,
                    self.downsample(after, cfg.use_shuffle, rngs=rngs) if i < last else Identity(),
                )
                for i, (before, after) in enumerate(
                    zip((obs_shape[0], *channels), channels, strict=False)
                )
            ]
        )
        self.final_conv1 = _CONV_NORM_ACTIVATION[self.sides](
            channels[0], channels[0], cfg.conv_cfg, rngs=rngs
        )
        self.final_conv2 = Conv(channels[0], obs_shape[0], 1, sides=self.sides, rngs=rngs)

    def _block(
        self, in_channels: int, out_channels: int, cfg: UNetConfig, rngs: nnx.Rngs
    ) -> nnx.Module:
        shared = (in_channels, out_channels, self.feature_dim, cfg.conv_cfg)
        if cfg.use_hypernet:
            return self.hyper_block(*shared, cfg.hyper_mlp_cfg, rngs=rngs)
        return self.block(*shared, cfg.cond_pred_scale, rngs=rngs)

    def __call__(self, base: Array, cond: Array) -> Array:
        """Map (*batch, *obs_shape) and (*batch, feature_dim) to (*batch, *obs_shape).

        Raises
        ------
        ValueError
            If a shape does not fit, or the batch dimensions differ.
        """
        batch = unet_batch(
            base.shape, cond.shape, self.obs_shape, self.feature_dim, type(self).__name__
        )
        x = base.reshape(math.prod(batch), *self.obs_shape)
        cond = cond.reshape(math.prod(batch), self.feature_dim)
        skips = []
        for level in self.down_modules:
            skip, x = _through_level(level, x, cond)
            skips.append(skip)
        x, _ = _through_level(self.mid_modules, x, cond)
        for level in self.up_modules:
            x = with_channels_last(lambda *maps: jnp.concatenate(maps, -1), x, skips.pop())
            _, x = _through_level(level, x, cond)
        return self.final_conv2(self.final_conv1(x)).reshape(base.shape)


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
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.

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
    feature_dim, obs_shape, cfg, rngs
        As in :class:`ConditionalUnet1d`.
    """

    sides = 2
    block = ConditionalResidualBlock2d
    hyper_block = HyperConditionalResidualBlock2d
    attention = Attention2d
    downsample = Downsample2d
    upsample = Upsample2d
