"""Image encoders and decoders: backbones, heads, and the two classes that join them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ml_networks._compat import checked_keywords
from ml_networks._geometry import (
    backbone_and_head,
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
    AttentionConfig,
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
from ml_networks.torch.base import Module
from ml_networks.torch.layers import (
    ConvNormActivation,
    ConvTransposeNormActivation,
    LinearNormActivation,
    MLPLayer,
    ResidualBlock,
    SpatialSoftmax,
)
from ml_networks.torch.vit import ViT

__all__ = [
    "ConvNet",
    "ConvTranspose",
    "Decoder",
    "Encoder",
    "ResNetPixShuffle",
    "ResNetPixUnshuffle",
    "ViT",
]


def _attention(channels: int, cfg: AttentionConfig) -> nn.Module:
    from ml_networks.torch.attention import Attention2d

    return Attention2d(channels, cfg.nhead, cfg.patch_size)


@checked_keywords()
class ConvNet(nn.Module):
    """A stack of convolutions, each followed by attention if the config has it.

    Parameters
    ----------
    obs_shape
        (C, H, W) of the images.
    cfg
        The :class:`~ml_networks.config.ConvNetConfig`; its channels are the layers' outputs.
    """

    def __init__(self, obs_shape: tuple[int, int, int], cfg: ConvNetConfig) -> None:
        super().__init__()
        cfg = as_config(cfg, ConvNetConfig, what="ConvNet cfg")
        self.obs_shape = image_shape(obs_shape, "ConvNet")
        self.cfg = cfg
        self.channels = [self.obs_shape[0], *cfg.channels]
        self.last_channel = self.channels[-1]
        self._conved_shape = conv_net_size(self.obs_shape, cfg)
        layers: list[nn.Module] = []
        for before, after, conv_cfg in zip(
            self.channels, cfg.channels, cfg.conv_cfgs, strict=False
        ):
            layers.append(ConvNormActivation(before, after, conv_cfg))
            if cfg.attention is not None:
                layers.append(_attention(after, cfg.attention))
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, last_channel, *conved_shape)."""
        output: Tensor = self.conv(x)
        return output

    @property
    def conved_shape(self) -> tuple[int, int]:
        """Height and width of the output."""
        return self._conved_shape

    @property
    def conved_size(self) -> int:
        """Number of values in the output of one image."""
        return self.last_channel * math.prod(self._conved_shape)


@checked_keywords()
class ConvTranspose(nn.Module):
    """A stack of transposed convolutions, each preceded by attention if the config has it.

    Layer i maps ``channels[i]`` to ``channels[i + 1]``, the last one to the image's channels; a
    1x1 convolution comes first if ``in_shape`` has other channels than ``channels[0]``.

    A strided convolution gives several input sizes the same output size, so the sizes of its
    transpose do not always meet the image (kernel 3, stride 2, padding 1 makes 63 of 32). Where
    ``in_shape`` is the one that :meth:`get_input_shape` returns, a layer whose
    ``output_padding`` does not lead to ``obs_shape`` gets the one that does. It changes neither
    the parameters nor anything where the config's own values fit.

    Parameters
    ----------
    in_shape
        (C, H, W) of the feature maps that enter.
    obs_shape
        (C, H, W) of the images.
    cfg
        The :class:`~ml_networks.config.ConvNetConfig`; its channels are the layers' inputs.

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
    ) -> None:
        super().__init__()
        cfg = as_config(cfg, ConvNetConfig, what="ConvTranspose cfg")
        self.in_shape = image_shape(in_shape, "ConvTranspose in_shape:")
        self.obs_shape = image_shape(obs_shape, "ConvTranspose")
        self.cfg = cfg
        self.channels = [*cfg.channels, self.obs_shape[0]]
        self.init_channel = cfg.channels[0]
        self.have_first_conv = self.in_shape[0] != self.init_channel
        self.first_conv: nn.Module = nn.Identity()
        if self.have_first_conv:
            self.first_conv = nn.Conv2d(self.in_shape[0], self.init_channel, 1)
        paddings = output_paddings(self.in_shape, self.obs_shape, cfg)
        layers: list[nn.Module] = []
        for before, after, conv_cfg, padding in zip(
            self.channels, self.channels[1:], cfg.conv_cfgs, paddings, strict=False
        ):
            if cfg.attention is not None:
                layers.append(_attention(before, cfg.attention))
            layers.append(ConvTransposeNormActivation(before, after, conv_cfg, padding))
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, *in_shape) to (B, *obs_shape)."""
        output: Tensor = self.conv(self.first_conv(x))
        return output

    @staticmethod
    def get_input_shape(
        obs_shape: tuple[int, int, int], cfg: ConvNetConfig
    ) -> tuple[int, int, int]:
        """Return the shape of the feature maps that lead to ``obs_shape``."""
        (height, width), _ = fit_transposes(obs_shape, cfg)
        return cfg.init_channel, height, width


def _resnet_conv(
    cfg: ResNetConfig, in_channels: int, out_channels: int, kernel_size: int, **changes: Any
) -> ConvNormActivation:
    return ConvNormActivation(in_channels, out_channels, resnet_conv(cfg, kernel_size, **changes))


def _residual_blocks(cfg: ResNetConfig) -> nn.Sequential:
    blocks: list[nn.Module] = []
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
            )
        )
        if cfg.attention is not None:
            blocks.append(_attention(cfg.conv_channel, cfg.attention))
    return nn.Sequential(*blocks)


@checked_keywords()
class ResNetPixUnshuffle(nn.Module):
    """Convolution, pixel unshuffles, residual blocks with a long skip, convolution.

    ``x = downsample(conv1(image)); y = conv3(conv2(res_blocks(x)) + x)``

    Parameters
    ----------
    obs_shape
        (C, H, W) of the images, H and W divisible by ``scale_factor^n_scaling``.
    cfg
        The :class:`~ml_networks.config.ResNetConfig`. ``conv_channel`` must be divisible by
        ``scale_factor^2``; ``out_activation`` is not used.
    """

    def __init__(self, obs_shape: tuple[int, int, int], cfg: ResNetConfig) -> None:
        super().__init__()
        cfg = as_config(cfg, ResNetConfig, what="ResNetPixUnshuffle cfg")
        self.obs_shape = image_shape(obs_shape, "ResNetPixUnshuffle")
        self.cfg = cfg
        self._conved_shape = scaled(self.obs_shape, cfg, "ResNetPixUnshuffle")
        channels = self.last_channel = cfg.conv_channel
        kernel = cfg.conv_kernel
        self.conv1 = _resnet_conv(cfg, self.obs_shape[0], channels, cfg.f_kernel)
        self.downsample = nn.Sequential(
            *(
                _resnet_conv(cfg, channels, channels, kernel, scale_factor=-cfg.scale_factor)
                for _ in range(cfg.n_scaling)
            )
        )
        self.res_blocks = _residual_blocks(cfg)
        self.conv2 = _resnet_conv(cfg, channels, channels, kernel)
        self.conv3 = _resnet_conv(cfg, channels, channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, conv_channel, *conved_shape)."""
        x = self.downsample(self.conv1(x))
        output: Tensor = self.conv3(self.conv2(self.res_blocks(x)) + x)
        return output

    @property
    def conved_shape(self) -> tuple[int, int]:
        """Height and width of the output."""
        return self._conved_shape

    @property
    def conved_size(self) -> int:
        """Number of values in the output of one image."""
        return self.last_channel * math.prod(self._conved_shape)


@checked_keywords()
class ResNetPixShuffle(nn.Module):
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
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        obs_shape: tuple[int, int, int],
        cfg: ResNetConfig,
    ) -> None:
        super().__init__()
        cfg = as_config(cfg, ResNetConfig, what="ResNetPixShuffle cfg")
        self.in_shape = image_shape(in_shape, "ResNetPixShuffle in_shape:")
        self.obs_shape = image_shape(obs_shape, "ResNetPixShuffle")
        self.cfg = cfg
        needed = self.get_input_shape(self.obs_shape, cfg)
        if self.in_shape[1:] != needed[1:]:
            raise ValueError(
                f"ResNetPixShuffle needs in_shape={(self.in_shape[0], *needed[1:])} for "
                f"obs_shape={self.obs_shape}, got {self.in_shape}"
            )
        channels, kernel = cfg.conv_channel, cfg.conv_kernel
        self.conv1 = _resnet_conv(cfg, self.in_shape[0], channels, kernel)
        self.res_blocks = _residual_blocks(cfg)
        self.conv2 = _resnet_conv(cfg, channels, channels, kernel)
        self.upsampling = nn.Sequential(
            *(
                _resnet_conv(cfg, channels, channels, kernel, scale_factor=cfg.scale_factor)
                for _ in range(cfg.n_scaling)
            )
        )
        self.conv3 = _resnet_conv(
            cfg,
            channels,
            self.obs_shape[0],
            cfg.f_kernel,
            activation=cfg.out_activation,
            norm="none",
            dropout=0.0,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, *in_shape) to (B, *obs_shape)."""
        x = self.conv1(x)
        output: Tensor = self.conv3(self.upsampling(self.conv2(self.res_blocks(x)) + x))
        return output

    @staticmethod
    def get_input_shape(
        obs_shape: tuple[int, int, int], cfg: ResNetConfig
    ) -> tuple[int, int, int]:
        """Return the shape of the feature maps that lead to ``obs_shape``."""
        return (cfg.init_channel, *scaled(obs_shape, cfg, "ResNetPixShuffle"))


def _fully_connected(
    input_dim: int, output_dim: int, cfg: MLPConfig | LinearConfig
) -> MLPLayer | LinearNormActivation:
    if isinstance(cfg, MLPConfig):
        return MLPLayer(input_dim, output_dim, cfg)
    return LinearNormActivation(input_dim, output_dim, cfg)


def _pooling(cfg: AdaptiveAveragePoolingConfig | SpatialSoftmaxConfig) -> nn.Module:
    if isinstance(cfg, SpatialSoftmaxConfig):
        return SpatialSoftmax(cfg)
    return nn.AdaptiveAvgPool2d(cfg.output_size)


@checked_keywords(encoder_cfg="backbone_cfg", full_connection_cfg="fc_cfg")
class Encoder(Module):
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
    ) -> None:
        super().__init__()
        cfg, fc_cfg = backbone_and_head(backbone_cfg, fc_cfg, EncoderConfig, "Encoder")
        self.obs_shape = image_shape(obs_shape, "Encoder")
        self.encoder: ViT | ConvNet | ResNetPixUnshuffle
        if isinstance(cfg, ViTConfig):
            self.encoder = ViT(self.obs_shape, cfg)
        elif isinstance(cfg, ConvNetConfig):
            self.encoder = ConvNet(self.obs_shape, cfg)
        else:
            self.encoder = ResNetPixUnshuffle(self.obs_shape, cfg)
        self.last_channel = self.encoder.last_channel
        self.conved_shape = self.encoder.conved_shape
        self.conved_size = self.encoder.conved_size
        is_vit = isinstance(cfg, ViTConfig)
        plan = encoder_head(feature_dim, fc_cfg, (self.last_channel, *self.conved_shape), is_vit)
        self.feature_dim = plan.feature_dim
        layer: nn.Module = nn.Identity()
        if plan.layer is not None:
            assert isinstance(plan.feature_dim, int)
            layer = _fully_connected(plan.width, plan.feature_dim, plan.layer)
        self.fc = layer
        if plan.pooling is not None:
            self.fc = nn.Sequential(_pooling(plan.pooling), nn.Flatten(), layer)
        elif plan.layer is not None and not is_vit:
            self.fc = nn.Sequential(nn.Flatten(), layer)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B*, C, H, W) to (B*, feature_dim), B* being any leading dimensions."""
        if x.dim() < 3 or x.shape[-3] != self.obs_shape[0]:
            raise ValueError(
                f"Encoder needs images (..., {', '.join(map(str, self.obs_shape))}), got shape "
                f"{tuple(x.shape)}"
            )
        features = self.fc(self.encoder(x.reshape(-1, *x.shape[-3:])))
        return features.reshape(*x.shape[:-3], *features.shape[1:])


@checked_keywords(decoder_cfg="backbone_cfg", full_connection_cfg="fc_cfg")
class Decoder(Module):
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
    ) -> None:
        super().__init__()
        cfg, fc_cfg = backbone_and_head(backbone_cfg, fc_cfg, DecoderConfig, "Decoder")
        self.obs_shape = image_shape(obs_shape, "Decoder")
        self.input_shape = self._input_shape(cfg)
        self.has_fc = not isinstance(feature_dim, Sequence)
        self.feature_dim, layer = decoder_head(feature_dim, fc_cfg, self.input_shape)
        self.fc: nn.Module = nn.Identity()
        if layer is not None:
            assert isinstance(self.feature_dim, int)
            self.fc = _fully_connected(self.feature_dim, math.prod(self.input_shape), layer)
        self.decoder: ViT | ConvTranspose | ResNetPixShuffle
        if isinstance(cfg, ViTConfig):
            self.decoder = ViT(self.input_shape, cfg, self.obs_shape)
        elif isinstance(cfg, ConvNetConfig):
            self.decoder = ConvTranspose(self.input_shape, self.obs_shape, cfg)
        else:
            self.decoder = ResNetPixShuffle(self.input_shape, self.obs_shape, cfg)

    def _input_shape(self, cfg: ConvNetConfig | ResNetConfig | ViTConfig) -> tuple[int, ...]:
        if isinstance(cfg, ViTConfig):
            return ViT.get_input_shape(self.obs_shape, cfg)
        if isinstance(cfg, ConvNetConfig):
            return ConvTranspose.get_input_shape(self.obs_shape, cfg)
        return ResNetPixShuffle.get_input_shape(self.obs_shape, cfg)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B*, feature_dim) to (B*, C, H, W), B* being any leading dimensions."""
        shape = (self.feature_dim,) if isinstance(self.feature_dim, int) else self.feature_dim
        batch = x.shape[: x.dim() - len(shape)]
        if x.shape[len(batch) :] != shape:
            raise ValueError(
                f"Decoder needs features (..., {', '.join(map(str, shape))}), got shape "
                f"{tuple(x.shape)}"
            )
        image = self.decoder(self.fc(x.reshape(-1, *shape)).reshape(-1, *self.input_shape))
        return image.reshape(*batch, *self.obs_shape)
