"""Image encoders and decoders: backbones, heads, and the two classes that join them.

Shapes are channels-first, as in :mod:`ml_networks.torch.vision`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ml_networks._compat import checked_keywords
from ml_networks._geometry import (
    Layer,
    backbone_and_head,
    channels_hint,
    conv_net_size,
    decoder_head,
    encoder_head,
    fit_transposes,
    image_shape,
    output_paddings,
    resnet_conv,
    scaled,
)
from ml_networks.config import (
    AdaptiveAveragePoolingConfig,
    ConvNetConfig,
    DecoderConfig,
    EncoderConfig,
    LinearConfig,
    MLPConfig,
    ResNetConfig,
    SpatialSoftmaxConfig,
    ViTConfig,
    as_config,
)
from ml_networks.jax.attention import Attention2d
from ml_networks.jax.base import BaseModule
from ml_networks.jax.layers import (
    ConvNormActivation,
    ConvTransposeNormActivation,
    Identity,
    LinearNormActivation,
    MLPLayer,
    ResidualBlock,
    SpatialSoftmax,
)
from ml_networks.jax.primitives import Conv
from ml_networks.jax.rngs import RngsLike, as_rngs
from ml_networks.jax.vit import ViT

__all__ = [
    "ConvNet",
    "ConvTranspose",
    "Decoder",
    "Encoder",
    "ResNetPixShuffle",
    "ResNetPixUnshuffle",
]

Array = jax.Array


def _attention_layers(cfg: ConvNetConfig, rngs: nnx.Rngs) -> nnx.List:
    """One attention layer for each of the config's channels; none without attention."""
    if cfg.attention is None:
        return nnx.List([])
    return nnx.List([Attention2d(n, attn_cfg=cfg.attention, rngs=rngs) for n in cfg.channels])


@checked_keywords()
class ConvNet(nnx.Module):
    """A stack of convolutions, each followed by attention if the config has it.

    Parameters
    ----------
    obs_shape
        (C, H, W) of the images.
    cfg
        The :class:`~ml_networks.config.ConvNetConfig`; its channels are the layers' outputs.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    def __init__(
        self,
        obs_shape: tuple[int, int, int],
        cfg: ConvNetConfig,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        cfg = as_config(cfg, ConvNetConfig, what="ConvNet cfg")
        self.obs_shape = image_shape(obs_shape, "ConvNet")
        self.channels = (self.obs_shape[0], *cfg.channels)
        self.last_channel = self.channels[-1]
        self.conved_shape = conv_net_size(self.obs_shape, cfg)
        self.conv_layers = nnx.List(
            [
                ConvNormActivation(before, after, conv_cfg, rngs=rngs)
                for before, after, conv_cfg in zip(
                    self.channels, cfg.channels, cfg.conv_cfgs, strict=False
                )
            ]
        )
        self.attn_layers = _attention_layers(cfg, rngs)

    @property
    def torch_names(self) -> Mapping[str, Any]:
        """Where the children stand in torch."""
        step = 2 if self.attn_layers else 1
        return {"conv_layers": ("conv", 0, step), "attn_layers": ("conv", 1, 2)}

    def __call__(self, x: Array) -> Array:
        """Map (B, C, H, W) to (B, last_channel, *conved_shape)."""
        for i, conv in enumerate(self.conv_layers):
            x = conv(x)
            x = self.attn_layers[i](x) if self.attn_layers else x
        return x

    @property
    def conved_size(self) -> int:
        """Number of values in the output of one image."""
        return self.last_channel * math.prod(self.conved_shape)


class _FirstConv(nnx.Module):
    """A 1x1 convolution under the name ``conv``, a level that torch does not have."""

    torch_names: ClassVar[dict[str, str]] = {"conv": ""}

    def __init__(self, channels: int, out_channels: int, rngs: nnx.Rngs) -> None:
        self.conv = Conv(channels, out_channels, 1, sides=2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


@checked_keywords()
class ConvTranspose(nnx.Module):
    """A stack of transposed convolutions, each preceded by attention if the config has it.

    Layer i maps ``channels[i]`` to ``channels[i + 1]``, the last one to the image's channels; a
    1x1 convolution comes first if ``in_shape`` has other channels than ``channels[0]``. Output
    paddings that do not lead to ``obs_shape`` are replaced by those that do, as in torch.

    Parameters
    ----------
    in_shape
        (C, H, W) of the feature maps that enter.
    obs_shape
        (C, H, W) of the images.
    cfg
        The :class:`~ml_networks.config.ConvNetConfig`; its channels are the layers' inputs.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.

    Raises
    ------
    ValueError
        If the layers do not lead from ``in_shape`` to ``obs_shape``.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        obs_shape: tuple[int, int, int],
        cfg: ConvNetConfig,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        cfg = as_config(cfg, ConvNetConfig, what="ConvTranspose cfg")
        self.in_shape = image_shape(in_shape, "ConvTranspose in_shape:")
        self.obs_shape = image_shape(obs_shape, "ConvTranspose")
        self.channels = (*cfg.channels, self.obs_shape[0])
        first = cfg.channels[0]
        self.first_conv = (
            Identity() if self.in_shape[0] == first else _FirstConv(self.in_shape[0], first, rngs)
        )
        paddings = output_paddings(self.in_shape, self.obs_shape, cfg)
        self.conv_layers = nnx.List(
            [
                ConvTransposeNormActivation(before, after, conv_cfg, padding, rngs=rngs)
                for before, after, conv_cfg, padding in zip(
                    self.channels, self.channels[1:], cfg.conv_cfgs, paddings, strict=False
                )
            ]
        )
        self.attn_layers = _attention_layers(cfg, rngs)

    @property
    def torch_names(self) -> Mapping[str, Any]:
        """Where the children stand in torch."""
        first = ("conv", 1, 2) if self.attn_layers else ("conv", 0, 1)
        return {"conv_layers": first, "attn_layers": ("conv", 0, 2)}

    def __call__(self, x: Array) -> Array:
        """Map (B, *in_shape) to (B, *obs_shape)."""
        x = self.first_conv(x)
        for i, conv in enumerate(self.conv_layers):
            x = conv(self.attn_layers[i](x) if self.attn_layers else x)
        return x

    @staticmethod
    def get_input_shape(
        obs_shape: tuple[int, int, int], cfg: ConvNetConfig
    ) -> tuple[int, int, int]:
        """Return the shape of the feature maps that lead to ``obs_shape``."""
        (height, width), _ = fit_transposes(obs_shape, cfg)
        return cfg.init_channel, height, width


def _residual_blocks(cfg: ResNetConfig, rngs: nnx.Rngs) -> nnx.List:
    blocks: list[nnx.Module] = []
    for _ in range(cfg.n_res_blocks):
        blocks.append(
            ResidualBlock(
                cfg.conv_channel,
                cfg.conv_kernel,
                cfg.conv_activation,
                cfg.norm,
                cfg.norm_cfg,
                cfg.dropout,
                cfg.padding_mode,
                rngs=rngs,
            )
        )
        if cfg.attention is not None:
            blocks.append(Attention2d(cfg.conv_channel, attn_cfg=cfg.attention, rngs=rngs))
    return nnx.List(blocks)


def _through(layers: nnx.List, x: Array) -> Array:
    for layer in layers:
        x = layer(x)
    return x


@checked_keywords()
class ResNetPixUnshuffle(nnx.Module):
    """Convolution, pixel unshuffles, residual blocks with a long skip, convolution.

    ``x = downsample(conv1(image)); y = conv3(conv2(res_blocks(x)) + x)``

    Parameters
    ----------
    obs_shape
        (C, H, W) of the images, H and W divisible by ``scale_factor^n_scaling``.
    cfg
        The :class:`~ml_networks.config.ResNetConfig`. ``conv_channel`` must be divisible by
        ``scale_factor^2``; ``out_activation`` is not used.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    def __init__(
        self,
        obs_shape: tuple[int, int, int],
        cfg: ResNetConfig,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        cfg = as_config(cfg, ResNetConfig, what="ResNetPixUnshuffle cfg")
        self.obs_shape = image_shape(obs_shape, "ResNetPixUnshuffle")
        self.conved_shape = scaled(self.obs_shape, cfg, "ResNetPixUnshuffle")
        n = self.last_channel = cfg.conv_channel
        plain = resnet_conv(cfg, cfg.conv_kernel)
        down = resnet_conv(cfg, cfg.conv_kernel, scale_factor=-cfg.scale_factor)
        first = resnet_conv(cfg, cfg.f_kernel)
        self.conv1 = ConvNormActivation(self.obs_shape[0], n, first, rngs=rngs)
        self.downsample = nnx.List(
            [ConvNormActivation(n, n, down, rngs=rngs) for _ in range(cfg.n_scaling)]
        )
        self.res_blocks = _residual_blocks(cfg, rngs)
        self.conv2 = ConvNormActivation(n, n, plain, rngs=rngs)
        self.conv3 = ConvNormActivation(n, n, plain, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Map (B, C, H, W) to (B, conv_channel, *conved_shape)."""
        x = _through(self.downsample, self.conv1(x))
        return self.conv3(self.conv2(_through(self.res_blocks, x)) + x)

    @property
    def conved_size(self) -> int:
        """Number of values in the output of one image."""
        return self.last_channel * math.prod(self.conved_shape)


@checked_keywords()
class ResNetPixShuffle(nnx.Module):
    """Convolution, residual blocks with a long skip, pixel shuffles, convolution.

    ``y = conv1(x); image = conv3(upsampling(conv2(res_blocks(y)) + y))``, the last convolution
    with kernel ``f_kernel`` and ``out_activation``, without norm and dropout.

    Parameters
    ----------
    in_shape
        (C, H, W) of the feature maps that enter, see :meth:`get_input_shape`.
    obs_shape
        (C, H, W) of the images, H and W divisible by ``scale_factor^n_scaling``.
    cfg
        The :class:`~ml_networks.config.ResNetConfig`.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        obs_shape: tuple[int, int, int],
        cfg: ResNetConfig,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        cfg = as_config(cfg, ResNetConfig, what="ResNetPixShuffle cfg")
        self.in_shape = image_shape(in_shape, "ResNetPixShuffle in_shape:")
        self.obs_shape = image_shape(obs_shape, "ResNetPixShuffle")
        needed = self.get_input_shape(self.obs_shape, cfg)
        if self.in_shape[1:] != needed[1:]:
            raise ValueError(
                f"ResNetPixShuffle needs in_shape={(self.in_shape[0], *needed[1:])} for "
                f"obs_shape={self.obs_shape}, got {self.in_shape}"
            )
        n = cfg.conv_channel
        plain = resnet_conv(cfg, cfg.conv_kernel)
        up = resnet_conv(cfg, cfg.conv_kernel, scale_factor=cfg.scale_factor)
        last = resnet_conv(
            cfg, cfg.f_kernel, activation=cfg.out_activation, norm="none", dropout=0.0
        )
        self.conv1 = ConvNormActivation(self.in_shape[0], n, plain, rngs=rngs)
        self.res_blocks = _residual_blocks(cfg, rngs)
        self.conv2 = ConvNormActivation(n, n, plain, rngs=rngs)
        self.upsampling = nnx.List(
            [ConvNormActivation(n, n, up, rngs=rngs) for _ in range(cfg.n_scaling)]
        )
        self.conv3 = ConvNormActivation(n, self.obs_shape[0], last, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Map (B, *in_shape) to (B, *obs_shape)."""
        x = self.conv1(x)
        x = self.conv2(_through(self.res_blocks, x)) + x
        return self.conv3(_through(self.upsampling, x))

    @staticmethod
    def get_input_shape(
        obs_shape: tuple[int, int, int], cfg: ResNetConfig
    ) -> tuple[int, int, int]:
        """Return the shape of the feature maps that lead to ``obs_shape``."""
        return (cfg.init_channel, *scaled(obs_shape, cfg, "ResNetPixShuffle"))


def _fully_connected(
    input_dim: int, output_dim: int, cfg: Layer, rngs: nnx.Rngs
) -> MLPLayer | LinearNormActivation:
    if isinstance(cfg, MLPConfig):
        return MLPLayer(input_dim, output_dim, cfg, rngs=rngs)
    return LinearNormActivation(input_dim, output_dim, cfg, rngs=rngs)


def _adaptive_average(x: Array, output_size: tuple[int, int]) -> Array:
    """Averages of (B, C, H, W) over a grid of cells, torch's ``AdaptiveAvgPool2d``."""
    rows, columns = (
        _cells(side, cells) for side, cells in zip(x.shape[-2:], output_size, strict=True)
    )
    return jnp.einsum("bchw,ih,jw->bcij", x, rows.astype(x.dtype), columns.astype(x.dtype))


def _cells(side: int, cells: int) -> np.ndarray:
    """(cells, side) weights; cell i averages positions floor(i side / cells) to the ceiling of
    (i + 1) side / cells.
    """
    weights = np.zeros((cells, side), np.float32)
    for i in range(cells):
        start, stop = i * side // cells, -(-(i + 1) * side // cells)
        weights[i, start:stop] = 1 / (stop - start)
    return weights


@checked_keywords(encoder_cfg="backbone_cfg", full_connection_cfg="fc_cfg")
class Encoder(BaseModule):
    """Images to features: a backbone and a head.

    ============================  ==================================================
    head (``fc_cfg``)             output for each image
    ============================  ==================================================
    None                          the backbone's feature map; d_model for a ViT
    LinearConfig, MLPConfig       ``feature_dim``
    AdaptiveAveragePoolingConfig  averages over a grid of cells
    SpatialSoftmaxConfig          (x, y) of each channel
    ============================  ==================================================

    The last two map to ``feature_dim`` by their ``additional_layer``; without one the number of
    features is channels * cells, or channels * 2, and any other ``feature_dim`` is replaced by it
    with a warning.

    Parameters
    ----------
    feature_dim
        Number of features. With ``fc_cfg=None``: the shape of the backbone's feature map.
    obs_shape
        (C, H, W) of the images.
    backbone_cfg
        :class:`~ml_networks.config.ConvNetConfig`, ``ResNetConfig`` or ``ViTConfig``, or an
        ``EncoderConfig`` with both backbone and head. ``encoder_cfg`` is another name for it.
    fc_cfg
        The head. A ViT takes LinearConfig, MLPConfig or None. It is not used if ``feature_dim``
        is a tuple. ``full_connection_cfg`` is another name for it.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.

    Raises
    ------
    ValueError
        If the sizes do not fit; the message names those that do.
    """

    def __init__(
        self,
        feature_dim: int | tuple[int, int, int],
        obs_shape: tuple[int, int, int],
        backbone_cfg: ConvNetConfig | ResNetConfig | ViTConfig | EncoderConfig,
        fc_cfg: MLPConfig
        | LinearConfig
        | AdaptiveAveragePoolingConfig
        | SpatialSoftmaxConfig
        | None = None,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        cfg, fc_cfg = backbone_and_head(backbone_cfg, fc_cfg, EncoderConfig, "Encoder")
        self.obs_shape = image_shape(obs_shape, "Encoder")
        self.encoder: Any
        if isinstance(cfg, ViTConfig):
            self.encoder = ViT(self.obs_shape, cfg, rngs=rngs)
        elif isinstance(cfg, ConvNetConfig):
            self.encoder = ConvNet(self.obs_shape, cfg, rngs=rngs)
        else:
            self.encoder = ResNetPixUnshuffle(self.obs_shape, cfg, rngs=rngs)
        self.last_channel = self.encoder.last_channel
        self.conved_shape = self.encoder.conved_shape
        self.conved_size = self.encoder.conved_size
        is_vit = isinstance(cfg, ViTConfig)
        plan = encoder_head(feature_dim, fc_cfg, (self.last_channel, *self.conved_shape), is_vit)
        self.feature_dim = plan.feature_dim
        self.flattens = plan.flattens
        self.output_size: Any = None
        if isinstance(plan.pooling, AdaptiveAveragePoolingConfig):
            self.output_size = plan.pooling.output_size
        self.spatial = (
            SpatialSoftmax(plan.pooling)
            if isinstance(plan.pooling, SpatialSoftmaxConfig)
            else Identity()
        )
        self.fc: Any = Identity()
        if plan.layer is not None:
            assert isinstance(plan.feature_dim, int)
            self.fc = _fully_connected(plan.width, plan.feature_dim, plan.layer, rngs)
        self._position = "" if is_vit else ".2" if plan.pooling is not None else ".1"

    @property
    def torch_names(self) -> Mapping[str, str]:
        """Where the children stand in torch."""
        return {"fc": f"fc{self._position}"}

    def __call__(self, x: Array) -> Array:
        """Map (B*, C, H, W) to (B*, feature_dim), B* being any leading axes."""
        if x.ndim < 3 or x.shape[-3] != self.obs_shape[0]:
            raise ValueError(
                f"Encoder needs images (..., {', '.join(map(str, self.obs_shape))}), got shape "
                f"{x.shape}{channels_hint(x.shape, self.obs_shape[0], 2)}"
            )
        features = self.encoder(x.reshape(-1, *x.shape[-3:]))
        if self.output_size is not None:
            features = _adaptive_average(features, self.output_size)
        features = self.spatial(features)
        if self.flattens:
            features = self.fc(features.reshape(features.shape[0], -1))
        return features.reshape(*x.shape[:-3], *features.shape[1:])


@checked_keywords(decoder_cfg="backbone_cfg", full_connection_cfg="fc_cfg")
class Decoder(BaseModule):
    """Features to images: a head and a backbone.

    Parameters
    ----------
    feature_dim
        Number of features. With ``fc_cfg=None``: the shape of the backbone's input, as its
        ``get_input_shape`` gives it.
    obs_shape
        (C, H, W) of the images.
    backbone_cfg
        :class:`~ml_networks.config.ConvNetConfig` (:class:`ConvTranspose`), ``ResNetConfig``
        (:class:`ResNetPixShuffle`) or ``ViTConfig``, or a ``DecoderConfig`` with both backbone
        and head. ``decoder_cfg`` is another name for it.
    fc_cfg
        LinearConfig or MLPConfig from the features to the backbone's input; None for a ViT whose
        d_model is ``feature_dim``. It is not used if ``feature_dim`` is a tuple.
        ``full_connection_cfg`` is another name for it.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.

    Raises
    ------
    ValueError
        If the sizes do not fit; the message names those that do.
    """

    def __init__(
        self,
        feature_dim: int | tuple[int, ...],
        obs_shape: tuple[int, int, int],
        backbone_cfg: ConvNetConfig | ResNetConfig | ViTConfig | DecoderConfig,
        fc_cfg: MLPConfig | LinearConfig | None = None,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        cfg, fc_cfg = backbone_and_head(backbone_cfg, fc_cfg, DecoderConfig, "Decoder")
        self.obs_shape = image_shape(obs_shape, "Decoder")
        builder: Any
        if isinstance(cfg, ViTConfig):
            builder = ViT
        else:
            builder = ConvTranspose if isinstance(cfg, ConvNetConfig) else ResNetPixShuffle
        self.input_shape = builder.get_input_shape(self.obs_shape, cfg)
        self.has_fc = not isinstance(feature_dim, Sequence)
        self.feature_dim, layer = decoder_head(feature_dim, fc_cfg, self.input_shape)
        self.fc: Any = Identity()
        if layer is not None:
            assert isinstance(self.feature_dim, int)
            width = math.prod(self.input_shape)
            self.fc = _fully_connected(self.feature_dim, width, layer, rngs)
        if isinstance(cfg, ViTConfig):
            self.decoder: Any = ViT(self.input_shape, cfg, self.obs_shape, rngs=rngs)
        else:
            self.decoder = builder(self.input_shape, self.obs_shape, cfg, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Map (B*, feature_dim) to (B*, C, H, W), B* being any leading axes."""
        shape = (self.feature_dim,) if isinstance(self.feature_dim, int) else self.feature_dim
        batch = x.shape[: x.ndim - len(shape)]
        if x.shape[len(batch) :] != shape:
            hint = channels_hint(x.shape, shape[0], 2) if len(shape) == 3 else ""
            raise ValueError(
                f"Decoder needs features (..., {', '.join(map(str, shape))}), got shape "
                f"{x.shape}{hint}"
            )
        image = self.decoder(self.fc(x.reshape(-1, *shape)).reshape(-1, *self.input_shape))
        return image.reshape(*batch, *self.obs_shape)
