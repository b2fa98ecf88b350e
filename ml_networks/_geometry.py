"""What a config means in sizes, for either framework: channels, sides, paddings, checks."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from ml_networks._compat import did_you_mean
from ml_networks.config import (
    BACKBONES,
    HEADS,
    AdaptiveAveragePoolingConfig,
    AttentionConfig,
    ConvConfig,
    ConvNetConfig,
    DecoderConfig,
    EncoderConfig,
    LinearConfig,
    MLPConfig,
    ResNetConfig,
    SoftmaxTransConfig,
    SpatialSoftmaxConfig,
    ViTConfig,
    as_config,
)
from ml_networks.shapes import conv_out, conv_transpose_out


def is_glu(activation: str) -> bool:
    """Return whether an activation halves its input, so that the layer before it doubles."""
    return "glu" in activation.lower()


def conv_width(out_channels: int, cfg: ConvConfig, sides: int) -> int:
    """Return the channels a convolution makes before shuffle and gate bring ``out_channels``."""
    width = 2 * out_channels if is_glu(cfg.activation) else out_channels
    ratio = abs(cfg.scale_factor) ** sides
    if cfg.scale_factor > 0:
        return width * ratio
    if cfg.scale_factor < 0:
        if width % ratio:
            raise ValueError(
                f"scale_factor={cfg.scale_factor} moves blocks of {ratio} positions into the "
                f"channels, so the {width} channels before the activation must be divisible by "
                f"{ratio}"
            )
        return width // ratio
    return width


def transpose_padding(
    cfg: ConvConfig, output_padding: Sequence[int] | None, sides: int, owner: str
) -> tuple[int, ...]:
    """Return the output padding of each side of a transposed convolution, checked."""
    padding = tuple(output_padding or (cfg.output_padding,) * sides)
    if max(padding) >= max(cfg.stride, cfg.dilation):
        raise ValueError(
            f"{owner} needs output_padding below stride={cfg.stride} or "
            f"dilation={cfg.dilation}, got {padding}"
        )
    return padding


def conv_norm(cfg: ConvConfig, channels: int) -> tuple[str, dict[str, Any]]:
    """Return name ("batch", "group" or "none") and arguments of the norm of ``channels`` maps."""
    if cfg.norm == "batch":
        return "batch", {**cfg.norm_cfg, "num_features": channels}
    if cfg.norm == "group":
        groups = cfg.norm_cfg.get("num_groups")
        if groups is None or channels % groups:
            raise ValueError(
                'norm="group" needs norm_cfg={"num_groups": n} with n a divisor of the '
                f"{channels} channels it normalises, got norm_cfg={cfg.norm_cfg}"
            )
        return "group", {**cfg.norm_cfg, "num_channels": channels}
    return "none", {}


@dataclasses.dataclass(frozen=True)
class ResidualPlan:
    """Channels and the two convolutions of a residual block; ``gated`` has no activation last."""

    in_channels: int
    out_channels: int
    first: ConvConfig
    last: ConvConfig
    gated: bool

    @property
    def changes_shape(self) -> bool:
        """Whether the shortcut must be a convolution."""
        return self.in_channels != self.out_channels or self.first.stride != 1


def residual_plan(
    in_features: int | None,
    kernel_size: int | None,
    in_channels: int | None,
    out_channels: int | None,
    conv_cfg: ConvConfig | None,
    **fields: Any,
) -> ResidualPlan:
    """Return what the arguments of a residual block mean; ``fields`` are a ConvConfig's."""
    if (in_features is None) == (in_channels is None):
        raise TypeError("ResidualBlock needs either in_features or in_channels")
    if (kernel_size is None) == (conv_cfg is None):
        raise TypeError("ResidualBlock needs either kernel_size or conv_cfg")
    channels = in_features if in_channels is None else in_channels
    assert channels is not None
    if kernel_size is not None:
        conv_cfg = ConvConfig(
            kernel_size=kernel_size, stride=1, padding=(kernel_size - 1) // 2, **fields
        )
    cfg = as_config(conv_cfg, ConvConfig, what="ResidualBlock conv_cfg")
    if 2 * cfg.padding != cfg.dilation * (cfg.kernel_size - 1) or cfg.scale_factor:
        raise ValueError(
            "ResidualBlock needs convolutions that keep the size: scale_factor 0 and "
            "padding = dilation * (kernel_size - 1) / 2 with an odd kernel_size, got "
            f"kernel_size={cfg.kernel_size}, padding={cfg.padding}, "
            f"dilation={cfg.dilation}, scale_factor={cfg.scale_factor}"
        )
    gated = is_glu(cfg.activation)
    last = dataclasses.replace(cfg, stride=1, activation=cfg.activation if gated else "Identity")
    return ResidualPlan(channels, out_channels or channels, cfg, last, gated)


def same_size_conv(cfg: ConvConfig, owner: str) -> ConvConfig:
    """Return the convolution of a U-Net's block, which must keep the size."""
    cfg = as_config(cfg, ConvConfig, what=f"{owner} conv_cfg")
    same_size = 2 * cfg.padding == cfg.dilation * (cfg.kernel_size - 1)
    if cfg.stride != 1 or cfg.scale_factor != 0 or not same_size:
        raise ValueError(
            f"{owner} needs a convolution that keeps the size: stride 1, scale_factor 0 and "
            "padding = dilation * (kernel_size - 1) / 2 with an odd kernel_size, got "
            f"stride={cfg.stride}, scale_factor={cfg.scale_factor}, padding={cfg.padding}, "
            f"kernel_size={cfg.kernel_size}, dilation={cfg.dilation}"
        )
    return cfg


def unet_shape(obs_shape: Sequence[int], levels: int, sides: int, owner: str) -> tuple[int, ...]:
    """Return the shape of a U-Net's input, whose sides can be halved ``levels - 1`` times."""
    obs_shape = tuple(obs_shape)
    if len(obs_shape) != 1 + sides or min(obs_shape) < 1:
        layout = "(channels, length)" if sides == 1 else "(channels, height, width)"
        raise ValueError(f"obs_shape of {owner} must be {layout}, got {obs_shape}")
    multiple = 2 ** (levels - 1)
    if any(side % multiple for side in obs_shape[1:]):
        raise ValueError(
            f"{owner} with {levels} levels halves its input {levels - 1} times: the sides in "
            f"obs_shape must be multiples of {multiple}, got {obs_shape}"
        )
    return obs_shape


def unet_batch(
    base: Sequence[int],
    cond: Sequence[int],
    obs_shape: tuple[int, ...],
    feature_dim: int,
    owner: str,
) -> tuple[int, ...]:
    """Return the batch dimensions that the shapes of a U-Net's two inputs have in common."""
    base, cond = tuple(base), tuple(cond)
    batch = base[: -len(obs_shape)]
    if base[-len(obs_shape) :] != obs_shape:
        raise ValueError(
            f"{owner} expects base of shape (*batch, {', '.join(map(str, obs_shape))}), got "
            f"{base}{channels_hint(base, obs_shape[0], len(obs_shape) - 1)}"
        )
    if cond != (*batch, feature_dim):
        raise ValueError(
            f"{owner} expects cond of shape {(*batch, feature_dim)} beside base of shape {base}, "
            f"got {cond}"
        )
    return batch


def channels_hint(shape: Sequence[int], channels: int, sides: int) -> str:
    """Return which axis looks wrong in a shape (*batch, channels, *sides); "" if none does."""
    if len(shape) <= sides or shape[-1 - sides] == channels:
        return ""
    hint = f": axis {-1 - sides} has {shape[-1 - sides]} entries for {channels} channels"
    if shape[-1] == channels:
        hint += f", and the channels look to be last: transpose them to axis {-1 - sides}"
    return hint


def check_views(shapes: Sequence[Sequence[int]], widths: Sequence[int]) -> None:
    """Raise ValueError unless two shapes are (*batch, width), with one or more batch axes."""
    for index, (shape, width) in enumerate(zip(shapes, widths, strict=True), 1):
        if len(shape) < 2 or shape[-1] != width:
            raise ValueError(
                f"feature{index} must have shape (*batch, {width}), got {tuple(shape)}"
            )
    first, second = (tuple(shape) for shape in shapes)
    if first[:-1] != second[:-1]:
        raise ValueError(
            "feature1 and feature2 must have the same batch dimensions, got shapes "
            f"{first} and {second}"
        )


def check_ranges(**ranges: int) -> None:
    """Raise ValueError for a negative range of positives."""
    for name, value in ranges.items():
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


class SoftmaxCode:
    """Sizes of a soft one-hot code: ``vector`` numbers a value, the last ``n_ignore`` kept."""

    def __init__(self, cfg: SoftmaxTransConfig) -> None:
        self.vector = cfg.vector
        self.sigma = cfg.sigma
        self.n_ignore = cfg.n_ignore
        self.max = cfg.max
        self.min = cfg.min

    def get_transformed_dim(self, dim: int) -> int:
        """Return how many features the code of ``dim`` features has."""
        if dim < self.n_ignore:
            raise ValueError(f"{dim} features are fewer than the {self.n_ignore} ignored ones")
        return (dim - self.n_ignore) * self.vector + self.n_ignore

    def _coded(self, features: int) -> int:
        """Return how many of a code's features stand for values, not for ignored ones."""
        coded = features - self.n_ignore
        if coded < 0 or coded % self.vector:
            raise ValueError(
                f"a code has a multiple of {self.vector} features and {self.n_ignore} ignored "
                f"ones, got {features}"
            )
        return coded


def image_shape(obs_shape: Sequence[int], owner: str) -> tuple[int, int, int]:
    """Return (channels, height, width), checked."""
    if len(obs_shape) != 3 or any(side < 1 for side in obs_shape):
        raise ValueError(
            f"{owner} needs obs_shape=(channels, height, width), each >= 1, got {obs_shape!r}"
        )
    channels, height, width = obs_shape
    return channels, height, width


def conv_net_size(obs_shape: tuple[int, int, int], cfg: ConvNetConfig) -> tuple[int, int]:
    """Return height and width of what a ConvNet makes of images of ``obs_shape``."""
    height, width = obs_shape[1:]
    for i, conv in enumerate(cfg.conv_cfgs):
        geometry = (conv.padding, conv.kernel_size, conv.stride, conv.dilation)
        height, width = conv_out(height, *geometry), conv_out(width, *geometry)
        shrink = max(-conv.scale_factor, 1)
        if min(height, width) < 1 or height % shrink or width % shrink:
            raise ValueError(
                f"ConvNet layer {i} makes feature maps of {height} x {width} from obs_shape="
                f"{obs_shape}"
                + (f", not divisible by scale_factor={-shrink}" if shrink > 1 else "")
            )
        grow = max(conv.scale_factor, 1)
        height, width = height * grow // shrink, width * grow // shrink
    return height, width


def _transposed(h_out: int, cfg: ConvConfig) -> tuple[int, int]:
    """Return the input length and output padding of a transposed convolution to ``h_out``.

    The output padding is the config's if an input length fits it. Otherwise it is the one that
    some length fits, of which there is exactly one below the stride.
    """
    reach = h_out - 1 + 2 * cfg.padding - cfg.dilation * (cfg.kernel_size - 1)
    fits = (reach - cfg.output_padding) % cfg.stride == 0
    padding = cfg.output_padding if fits else reach % cfg.stride
    return (reach - padding) // cfg.stride + 1, padding


def fit_transposes(
    obs_shape: Sequence[int], cfg: ConvNetConfig
) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Return the input size that transposed convolutions lead to ``obs_shape`` and the (rows,
    columns) of output padding of each.
    """
    _, height, width = obs_shape
    paddings = []
    for conv_cfg in reversed(cfg.conv_cfgs):
        height, rows = _transposed(height, conv_cfg)
        width, columns = _transposed(width, conv_cfg)
        paddings.append((rows, columns))
    if min(height, width) < 1:
        raise ValueError(
            f"ConvTranspose cannot make obs_shape={tuple(obs_shape)}: its "
            f"{len(cfg.conv_cfgs)} layers would need feature maps of {height} x {width}"
        )
    return (height, width), paddings[::-1]


def output_paddings(
    in_shape: tuple[int, int, int], obs_shape: tuple[int, int, int], cfg: ConvNetConfig
) -> list[tuple[int, int]]:
    """Return (rows, columns) of output padding of each layer to ``obs_shape``."""
    height, width = in_shape[1:]
    for conv in cfg.conv_cfgs:
        geometry = (
            conv.padding,
            conv.kernel_size,
            conv.stride,
            conv.dilation,
            conv.output_padding,
        )
        height = conv_transpose_out(height, *geometry)
        width = conv_transpose_out(width, *geometry)
    if (height, width) == obs_shape[1:]:
        return [(conv.output_padding, conv.output_padding) for conv in cfg.conv_cfgs]
    needed, paddings = fit_transposes(obs_shape, cfg)
    if in_shape[1:] != needed:
        raise ValueError(
            f"ConvTranspose makes images of {height} x {width} from in_shape={in_shape}; for "
            f"obs_shape={obs_shape} it needs in_shape={(in_shape[0], *needed)}"
        )
    return paddings


def resnet_conv(cfg: ResNetConfig, kernel_size: int, **changes: Any) -> ConvConfig:
    """Return the config of a ResNet's convolution, which keeps the size unless it shuffles."""
    return dataclasses.replace(
        ConvConfig(
            cfg.conv_activation,
            kernel_size,
            stride=1,
            padding=(kernel_size - 1) // 2,
            padding_mode=cfg.padding_mode,
            dropout=cfg.dropout,
            norm=cfg.norm,
            norm_cfg=cfg.norm_cfg,
        ),
        **changes,
    )


def scaled(obs_shape: Sequence[int], cfg: ResNetConfig, owner: str) -> tuple[int, int]:
    """Return height and width divided by all of the config's scalings."""
    factor = cfg.scale_factor**cfg.n_scaling
    _, height, width = obs_shape
    if height % factor or width % factor:
        raise ValueError(
            f"{owner} needs height and width divisible by scale_factor^n_scaling = {factor}, got "
            f"obs_shape={tuple(obs_shape)}"
        )
    return height // factor, width // factor


def n_patches(obs_shape: Sequence[int], patch_size: int) -> int:
    """Return the number of patches of an image (C, H, W)."""
    _, height, width = obs_shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"ViT needs height and width divisible by patch_size={patch_size}, got "
            f"obs_shape={tuple(obs_shape)}"
        )
    return (height // patch_size) * (width // patch_size)


def attention_heads(
    owner: str, channels: int, nhead: int | None, patch_size: int, attn_cfg: AttentionConfig | None
) -> tuple[int, int]:
    """Return heads and patch size of an attention layer, checked."""
    if attn_cfg is not None:
        attn_cfg = as_config(attn_cfg, AttentionConfig, what=f"{owner} attn_cfg")
        nhead, patch_size = attn_cfg.nhead, attn_cfg.patch_size
    if nhead is None:
        raise TypeError(f"{owner} needs nhead, or attn_cfg=AttentionConfig(nhead, patch_size)")
    if nhead < 1 or channels % nhead:
        divisors = [heads for heads in range(1, channels + 1) if channels % heads == 0]
        raise ValueError(
            f"nhead={nhead} does not divide the {channels} channels of {owner}; "
            f"these do: {', '.join(map(str, divisors))}"
        )
    if patch_size < 1:
        raise ValueError(f"patch_size of {owner} must be at least 1, got {patch_size}")
    return nhead, patch_size


Backbone = ConvNetConfig | ResNetConfig | ViTConfig
Layer = MLPConfig | LinearConfig


def backbone_and_head(
    cfg: Any, fc_cfg: Any, both: type[EncoderConfig] | type[DecoderConfig], owner: str
) -> tuple[Backbone, Any]:
    """Return the backbone's and the head's config, also out of a config that holds both."""
    found = as_config(cfg, *BACKBONES, both, what=f"{owner} backbone_cfg")
    if isinstance(found, both):
        return found.backbone, found.full_connection if fc_cfg is None else fc_cfg
    return found, fc_cfg


@dataclasses.dataclass(frozen=True)
class HeadPlan:
    """The head of an encoder: pooling, if any, then a layer of ``width`` inputs, if any."""

    feature_dim: int | tuple[int, int, int]
    pooling: AdaptiveAveragePoolingConfig | SpatialSoftmaxConfig | None = None
    layer: Layer | None = None
    width: int = 0

    @property
    def flattens(self) -> bool:
        """Whether there is a head at all."""
        return self.pooling is not None or self.layer is not None


def encoder_head(
    feature_dim: int | Sequence[int],
    fc_cfg: Any,
    map_shape: tuple[int, int, int],
    is_vit: bool,
) -> HeadPlan:
    """Return what an encoder's ``feature_dim`` and ``fc_cfg`` mean for a backbone whose output is
    ``map_shape``; for a ViT that is (d_model, 1, 1).
    """
    channels = map_shape[0]
    if isinstance(feature_dim, Sequence):
        if tuple(feature_dim) != map_shape or is_vit:
            right = channels if is_vit else map_shape
            raise ValueError(
                f"the backbone's output is feature_dim={right}, got {tuple(feature_dim)}"
            )
        return HeadPlan(map_shape)
    feature_dim = int(feature_dim)
    if fc_cfg is None:
        if not is_vit:
            raise ValueError(
                f"Encoder needs fc_cfg to make feature_dim={feature_dim} features; without "
                f"it feature_dim must be {map_shape}, the backbone's feature map"
            )
        if feature_dim != channels:
            raise ValueError(
                f"a ViT without fc_cfg has feature_dim={channels}, its d_model, got {feature_dim}"
            )
        return HeadPlan(feature_dim)
    cfg = as_config(fc_cfg, *HEADS, what="Encoder fc_cfg")
    if isinstance(cfg, (MLPConfig, LinearConfig)):
        return HeadPlan(feature_dim, None, cfg, math.prod(map_shape))
    if is_vit:
        raise TypeError(f"a ViT's fc_cfg must be MLPConfig, LinearConfig or None, got {cfg!r}")
    cells: Any = cfg.output_size if isinstance(cfg, AdaptiveAveragePoolingConfig) else (2,)
    pooled = channels * math.prod(cells)
    if cfg.additional_layer is not None:
        return HeadPlan(feature_dim, cfg, cfg.additional_layer, pooled)
    if feature_dim != pooled:
        warnings.warn(
            f"{type(cfg).__name__} without additional_layer makes feature_dim={pooled} "
            f"features, not the {feature_dim} asked for",
            stacklevel=4,
        )
    return HeadPlan(pooled, cfg, None, pooled)


def decoder_head(
    feature_dim: int | Sequence[int], fc_cfg: Any, input_shape: tuple[int, ...]
) -> tuple[int | tuple[int, ...], Layer | None]:
    """Return a decoder's ``feature_dim`` and the layer to its backbone's ``input_shape``."""
    if isinstance(feature_dim, Sequence):
        if tuple(feature_dim) != input_shape:
            raise ValueError(
                f"the backbone's input is feature_dim={input_shape}, got {tuple(feature_dim)}"
            )
        return tuple(feature_dim), None
    feature_dim = int(feature_dim)
    if fc_cfg is not None:
        return feature_dim, as_config(fc_cfg, MLPConfig, LinearConfig, what="Decoder fc_cfg")
    if input_shape != (feature_dim,):
        raise ValueError(
            f"Decoder needs fc_cfg to take feature_dim={feature_dim} features; without it "
            f"feature_dim must be {input_shape}, the backbone's input"
        )
    return feature_dim, None


def resnet_stages(name: str) -> tuple[tuple[int, ...], bool]:
    """Return the blocks of each stage of ``"resnet{depth}-{stages}"``, and whether they are
    bottlenecks.
    """
    depth, stages = (int(number) for number in name.removeprefix("resnet").split("-"))
    blocks = {
        18: (2, 2, 2, 2),
        34: (3, 4, 6, 3),
        50: (3, 4, 6, 3),
        101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
    }
    return blocks[depth][:stages], depth >= 50


def synapse_widths(out_dims: int, depth: int, minimum_width: int) -> tuple[int, ...]:
    """Return the widths of a synapse U-Net: ``depth`` even steps from the outer to the inner."""
    if depth < 2:
        raise ValueError(f"a synapse U-Net needs depth > 1, got depth={depth}")
    return tuple(int(width) for width in np.linspace(out_dims, minimum_width, depth))


def hyper_levels(hyper_layers: str, levels: int) -> tuple[frozenset[int], frozenset[int]]:
    """Return the levels whose down and whose up projections are dynamic."""
    every, deepest = frozenset(range(levels)), frozenset(range(max(0, levels - 2), levels))
    none: frozenset[int] = frozenset()
    chosen = {
        "bottleneck": (deepest, deepest),
        "down": (every, none),
        "up": (none, every),
        "all": (every, every),
        "none": (none, none),
    }
    if hyper_layers not in chosen:
        hint = did_you_mean(str(hyper_layers), chosen)
        raise ValueError(
            f"hyper_layers must be one of {', '.join(chosen)}, got {hyper_layers!r}{hint}"
        )
    return chosen[hyper_layers]


def absorbs_attention(channels: int, d_input: int, heads: int) -> bool:
    """Whether attending to ``channels`` + 1 features with every head moves and computes less than
    attending to keys and values of ``d_input``.
    """
    return heads * (channels + 1) <= 2 * d_input
