"""Layers: linear and convolution with norm and activation, residual, transformer, pooling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ml_networks._compat import checked_keywords, did_you_mean, moved_attributes
from ml_networks._geometry import conv_norm, conv_width, is_glu, residual_plan, transpose_padding
from ml_networks.config import (
    ConvConfig,
    LinearConfig,
    MLPConfig,
    SpatialSoftmaxConfig,
    TransformerConfig,
    as_config,
)
from ml_networks.kernels.core.activations import NAMES as KERNEL_ACTIVATIONS
from ml_networks.kernels.core.torch_functions import pixel_shuffle
from ml_networks.kernels.torch import (
    conv_shuffle,
    fused_mlp,
    linear_norm_activation,
    norm_activation_shuffle,
)
from ml_networks.torch.activations import Activation
from ml_networks.torch.attention import MultiheadAttention
from ml_networks.torch.base import Module

__all__ = [
    "ConvNormActivation",
    "ConvNormActivation1d",
    "ConvTransposeNormActivation",
    "ConvTransposeNormActivation1d",
    "HorizonShuffle",
    "HorizonUnShuffle",
    "LinearNormActivation",
    "MLPLayer",
    "PatchEmbed",
    "PositionalEncoding",
    "ResidualBlock",
    "SpatialSoftmax",
    "TransformerLayer",
    "get_norm",
]

__getattr__ = moved_attributes(
    __name__,
    {
        "Attention1d": "ml_networks.torch.attention",
        "Attention2d": "ml_networks.torch.attention",
    },
)

_NORMS: dict[str, Callable[..., nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "group": nn.GroupNorm,
    "batch2d": nn.BatchNorm2d,
    "batch1d": nn.BatchNorm1d,
}


def get_norm(norm: str, **kwargs: Any) -> nn.Module:
    """Make a normalisation layer by name.

    Parameters
    ----------
    norm
        ``"layer"``, ``"rms"``, ``"group"``, ``"batch2d"``, ``"batch1d"`` or ``"none"``.
    **kwargs
        Arguments of the torch class (``normalized_shape``, ``num_groups``, ``eps``, ...);
        ignored for ``"none"``.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    if norm == "none":
        return nn.Identity()
    if norm not in _NORMS:
        raise ValueError(
            f"norm must be one of {', '.join(_NORMS)}, none, got {norm!r}"
            f"{did_you_mean(norm, (*_NORMS, 'none')) if isinstance(norm, str) else ''}"
        )
    return _NORMS[norm](**kwargs)


def _conv_norm(cfg: ConvConfig, channels: int, dimensions: int) -> nn.Module:
    """Return the norm of a convolution's ``channels`` feature maps."""
    norm, arguments = conv_norm(cfg, channels)
    return get_norm(f"batch{dimensions}d" if norm == "batch" else norm, **arguments)


def _conv_activation(name: str, dim: int = -1) -> Activation:
    """Return the activation of a tensor of which nothing else needs the value."""
    # The derivative of ReLU needs its output alone, so feature maps need not be copied.
    return Activation(name, dim=dim, **({"inplace": True} if name == "ReLU" else {}))


def _dropout(probability: float) -> nn.Module:
    return nn.Dropout(probability) if probability > 0 else nn.Identity()


@checked_keywords()
class LinearNormActivation(nn.Module):
    """Linear layer, norm, activation, dropout; with ``norm_first`` the norm precedes the layer.

    An activation with "glu" in its name gets twice ``output_dim`` and halves it. On a GPU all of
    it is one op, :func:`ml_networks.kernels.torch.linear_norm_activation`, which also draws the
    dropout; activations with weights or over rows (PReLU, Softmax, ...) keep to separate steps.

    Parameters
    ----------
    input_dim, output_dim
        Widths.
    cfg
        The layer's :class:`~ml_networks.config.LinearConfig`.
    """

    def __init__(self, input_dim: int, output_dim: int, cfg: LinearConfig) -> None:
        super().__init__()
        cfg = as_config(cfg, LinearConfig, what="LinearNormActivation cfg")
        width = 2 * output_dim if is_glu(cfg.activation) else output_dim
        norm_width = input_dim if cfg.norm_first else width
        self.cfg = cfg
        self.linear = nn.Linear(input_dim, width, bias=cfg.bias)
        self.norm = get_norm(cfg.norm, **{**cfg.norm_cfg, "normalized_shape": norm_width})
        self.activation = Activation(cfg.activation)
        self.dropout = _dropout(cfg.dropout)
        self.norm_first = cfg.norm_first

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., input_dim) to (..., output_dim)."""
        if x.is_cuda and self._is_one_op():
            return self._one_op(x)
        x = self.linear(self.norm(x)) if self.norm_first else self.norm(self.linear(x))
        output: Tensor = self.dropout(self.activation(x))
        return output

    def _is_one_op(self) -> bool:
        """Whether the children are as they were made: nothing replaced, hooked or sharded."""
        children = (self.linear, self.norm, self.activation, self.dropout)
        return (
            self.cfg.activation in KERNEL_ACTIVATIONS
            and type(self.linear) is nn.Linear
            and type(self.linear.weight) is nn.Parameter
            and type(self.norm) in _ROW_NORMS
            and type(self.activation) is Activation
            and type(self.dropout) in (nn.Dropout, nn.Identity)
            and getattr(self.dropout, "p", 0.0) < 1
            and not any(has_hooks(child) for child in children)
        )

    def _one_op(self, x: Tensor) -> Tensor:
        norm: Any = self.norm
        return linear_norm_activation(
            x,
            self.linear.weight,
            self.linear.bias,
            getattr(norm, "weight", None),
            getattr(norm, "bias", None),
            norm=_ROW_NORMS[type(norm)],
            norm_first=self.norm_first,
            activation=self.cfg.activation,
            eps=getattr(norm, "eps", None),
            dropout=getattr(self.dropout, "p", 0.0) if self.dropout.training else 0.0,
        )


_ROW_NORMS = {nn.LayerNorm: "layer", nn.RMSNorm: "rms", nn.Identity: "none"}


def has_hooks(module: nn.Module) -> bool:
    """Whether anything listens to the calls of a module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


@checked_keywords(mlp_config="cfg", mlp_cfg="cfg")
class MLPLayer(Module):
    """Multi-layer perceptron: hidden layers of equal width and an output layer.

    The output layer shares the hidden layers' config except that it has ``output_activation``
    and no norm. There is always at least one hidden layer, also for ``n_layers=0``. On a GPU all
    of it is one op, :func:`ml_networks.kernels.torch.fused_mlp`, while the layers are as they were
    made and no norm comes first.

    Parameters
    ----------
    input_dim, output_dim
        Widths.
    cfg
        The :class:`~ml_networks.config.MLPConfig`; ``mlp_config`` is another name for it.
    """

    def __init__(self, input_dim: int, output_dim: int, cfg: MLPConfig) -> None:
        super().__init__()
        cfg = as_config(cfg, MLPConfig, what="MLPLayer cfg")
        self.cfg = cfg
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.hidden_dim = cfg.hidden_dim
        self.n_layers = cfg.n_layers
        widths = [input_dim, *[cfg.hidden_dim] * max(cfg.n_layers, 1)]
        output_cfg = dataclasses.replace(
            cfg.linear_cfg, activation=cfg.output_activation, norm="none"
        )
        self.dense = nn.Sequential(
            *(
                LinearNormActivation(before, after, cfg.linear_cfg)
                for before, after in pairwise(widths)
            ),
            LinearNormActivation(widths[-1], output_dim, output_cfg),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., input_dim) to (..., output_dim)."""
        if x.is_cuda and self._is_one_op():
            return self._one_op(x)
        output: Tensor = self.dense(x)
        return output

    def _is_one_op(self) -> bool:
        """Whether the layers are as they were made, the hidden ones alike and without a norm
        first."""
        if type(self.dense) is not nn.Sequential or len(self.dense) < 2 or has_hooks(self.dense):
            return False
        layers: list[Any] = list(self.dense)
        *hidden, last = layers
        return (
            not any(
                type(layer) is not LinearNormActivation or has_hooks(layer) for layer in layers
            )
            and all(layer._is_one_op() and not layer.norm_first for layer in layers)
            and len({_hidden_options(layer) for layer in hidden}) == 1
            and type(last.norm) is nn.Identity
            and _shared_options(last) == _shared_options(hidden[0])
        )

    def _one_op(self, x: Tensor) -> Tensor:
        layers: list[Any] = list(self.dense)
        *hidden, last = layers
        norm = hidden[0].norm
        has_norm_weight, has_norm_bias = _affine(norm)
        has_bias, dropout = _shared_options(last)
        return fused_mlp(
            x,
            [layer.linear.weight for layer in layers],
            [layer.linear.bias for layer in layers] if has_bias else None,
            [layer.norm.weight for layer in hidden] if has_norm_weight else None,
            [layer.norm.bias for layer in hidden] if has_norm_bias else None,
            norm=_ROW_NORMS[type(norm)],
            activation=hidden[0].cfg.activation,
            output_activation=last.cfg.activation,
            eps=getattr(norm, "eps", None),
            dropout=dropout,
        )


def _affine(norm: Any) -> tuple[bool, bool]:
    """Whether a norm has a weight and a bias."""
    return getattr(norm, "weight", None) is not None, getattr(norm, "bias", None) is not None


def _shared_options(layer: Any) -> tuple[bool, float]:
    """What all layers of an MLP share: whether there is a bias, the dropout at present."""
    dropout = layer.dropout
    return layer.linear.bias is not None, getattr(dropout, "p", 0.0) if dropout.training else 0.0


def _hidden_options(layer: Any) -> tuple[Any, ...]:
    """What the hidden layers of an MLP share."""
    norm, width = layer.norm, layer.linear.out_features
    eps = getattr(norm, "eps", None)
    return width, layer.cfg.activation, type(norm), eps, *_affine(norm), *_shared_options(layer)


@checked_keywords()
class ConvNormActivation(nn.Module):
    """2-d convolution, norm, pixel (un)shuffle, activation, dropout.

    With ``norm_first`` the norm precedes the convolution. With ``scale_factor`` s > 0 the
    convolution makes s^2 times the channels, which a pixel shuffle turns into an image s times
    as large; with s < 0 a pixel unshuffle makes it |s| times as small. An activation with "glu"
    in its name gets twice the channels and halves them. On a GPU all that follows the convolution
    is one op where there is a norm, :func:`ml_networks.kernels.torch.norm_activation_shuffle`,
    which also draws the dropout. With none, convolution, shuffle and activation are one op,
    :func:`ml_networks.kernels.torch.conv_shuffle`. Activations with weights (PReLU, ...) keep to
    separate steps.

    Parameters
    ----------
    in_channels, out_channels
        Channels of input and output.
    cfg
        The layer's :class:`~ml_networks.config.ConvConfig`.
    """

    def __init__(self, in_channels: int, out_channels: int, cfg: ConvConfig) -> None:
        super().__init__()
        cfg = as_config(cfg, ConvConfig, what="ConvNormActivation cfg")
        width = conv_width(out_channels, cfg, 2)
        self.cfg = cfg
        self.conv = nn.Conv2d(
            in_channels,
            width,
            cfg.kernel_size,
            cfg.stride,
            cfg.padding,
            cfg.dilation,
            cfg.groups,
            cfg.bias,
            cfg.padding_mode,  # type: ignore[arg-type]
        )
        self.norm = _conv_norm(cfg, in_channels if cfg.norm_first else width, dimensions=2)
        self.pixel_shuffle: nn.Module = nn.Identity()
        if cfg.scale_factor > 0:
            self.pixel_shuffle = PixelShuffle(cfg.scale_factor)
        elif cfg.scale_factor < 0:
            self.pixel_shuffle = PixelUnshuffle(-cfg.scale_factor)
        self.activation = _conv_activation(cfg.activation, dim=-3)
        self.dropout = _dropout(cfg.dropout)
        self.norm_first = cfg.norm_first

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) or (C, H, W) to feature maps of the same rank."""
        if x.is_cuda and x.dim() == 4:
            if self._is_one_op():
                return self._one_op(x)
            if _is_one_convolution(self, self.pixel_shuffle):
                return _one_convolution(self, x)
        x = self.conv(self.norm(x)) if self.norm_first else self.norm(self.conv(x))
        output: Tensor = self.dropout(self.activation(self.pixel_shuffle(x)))
        return output

    def _is_one_op(self) -> bool:
        return (
            type(self.norm) is not nn.Identity
            and not self.norm_first
            and _is_one_tail(self, self.pixel_shuffle)
        )

    def _one_op(self, x: Tensor, residual: Tensor | None = None, **options: Any) -> Tensor:
        shuffle = self.cfg.scale_factor
        return _one_tail(self, self.conv(x), residual, shuffle=shuffle, **options)


def _is_one_tail(layer: Any, *others: nn.Module) -> bool:
    """Whether what follows a convolution is as it was made: nothing replaced, hooked or
    sharded."""
    children = (layer.norm, layer.activation, layer.dropout, *others)
    return (
        layer.cfg.activation in KERNEL_ACTIVATIONS
        and type(layer.norm) in _MAP_NORMS
        and type(getattr(layer.norm, "weight", None)) in (nn.Parameter, type(None))
        # Without a momentum the weight of the new is a number that a device would have to tell.
        and getattr(layer.norm, "momentum", 0.0) is not None
        and type(layer.activation) is Activation
        and type(layer.dropout) in (nn.Dropout, nn.Identity)
        and getattr(layer.dropout, "p", 0.0) < 1
        and all(type(other) in _SHUFFLES for other in others)
        and not any(has_hooks(child) for child in children)
    )


def _one_tail(layer: Any, x: Tensor, residual: Tensor | None = None, **options: Any) -> Tensor:
    """What follows a convolution, whose output is ``x``, as one op."""
    norm: Any = layer.norm
    if type(norm) is nn.GroupNorm:
        options |= {"norm": "group", "num_groups": norm.num_groups}
    elif type(norm) is nn.Identity:
        options |= {"norm": "none"}
    else:
        if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        if norm.track_running_stats or not norm.training:
            options |= {"running_mean": norm.running_mean, "running_var": norm.running_var}
        training = norm.training or norm.running_mean is None
        options |= {"training": training, "momentum": norm.momentum}
    return norm_activation_shuffle(
        x,
        getattr(norm, "weight", None),
        getattr(norm, "bias", None),
        None if residual is None else residual.to(x.dtype),
        eps=getattr(norm, "eps", 0.0),
        dropout=getattr(layer.dropout, "p", 0.0) if layer.dropout.training else 0.0,
        **{"activation": layer.cfg.activation, **options},
    )


def _is_one_convolution(layer: Any, shuffle: nn.Module) -> bool:
    """Whether a convolution without a norm behind it, shuffle and activation are as they were
    made: nothing replaced, hooked or sharded."""
    conv = layer.conv
    return (
        (layer.norm_first or type(layer.norm) is nn.Identity)
        and layer.cfg.activation in KERNEL_ACTIVATIONS
        and (type(conv) in (nn.Conv1d, nn.Conv2d) or is_per_sample(conv))
        and (type(conv.weight) is nn.Parameter or is_per_sample(conv))
        and type(layer.activation) is Activation
        and type(shuffle) in (*_SHUFFLES, HorizonShuffle, HorizonUnShuffle)
        and not any(has_hooks(child) for child in (conv, layer.norm, layer.activation, shuffle))
    )


def is_per_sample(conv: nn.Module) -> bool:
    """Whether the weight of a convolution has a batch axis, as hypernetworks make it."""
    sides = 1 if isinstance(conv, nn.Conv1d) else 2
    return isinstance(conv, (nn.Conv1d, nn.Conv2d)) and conv.weight.dim() == sides + 3


def convolve(conv: nn.Conv1d | nn.Conv2d, x: Tensor, **options: Any) -> Tensor:
    """A convolution of the same geometry along both sides, and what follows it, as one op."""
    padding: Any = conv.padding
    return conv_shuffle(
        x,
        conv.weight,
        conv.bias,
        stride=conv.stride[0],
        padding=padding[0],
        dilation=conv.dilation[0],
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        **options,
    )


def _one_convolution(layer: Any, x: Tensor) -> Tensor:
    """Convolution, shuffle and activation as one op, then the dropout."""
    x = layer.norm(x) if layer.norm_first else x
    name, factor = layer.cfg.activation, layer.cfg.scale_factor
    output: Tensor = layer.dropout(convolve(layer.conv, x, shuffle=factor, activation=name))
    return output


_MAP_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.Identity)
"""SyncBatchNorm, which averages over processes, is none of them."""


class PixelShuffle(nn.PixelShuffle):
    """torch's, for empty batches too."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., C f^2, H, W) to (..., C, H f, W f)."""
        return pixel_shuffle(input, self.upscale_factor)


class PixelUnshuffle(nn.PixelUnshuffle):
    """torch's, for empty batches too."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., C, H f, W f) to (..., C f^2, H, W)."""
        return pixel_shuffle(input, -self.downscale_factor)


_SHUFFLES = (PixelShuffle, PixelUnshuffle, nn.Identity)


class HorizonShuffle(nn.Module):
    """Pixel shuffle along one dimension: y[..., c, t u + i] = x[..., c u + i, t].

    Parameters
    ----------
    upscale_factor
        u. Default 2.
    """

    def __init__(self, upscale_factor: int = 2) -> None:
        super().__init__()
        self.upscale_factor = upscale_factor

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C u, T) to (..., C, T u)."""
        return x.unflatten(-2, (-1, self.upscale_factor)).transpose(-1, -2).flatten(-2)


class HorizonUnShuffle(nn.Module):
    """Inverse of :class:`HorizonShuffle`: y[..., c d + i, t] = x[..., c, t d + i].

    Parameters
    ----------
    downscale_factor
        d. Default 2.
    """

    def __init__(self, downscale_factor: int = 2) -> None:
        super().__init__()
        self.downscale_factor = downscale_factor

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C, T d) to (..., C d, T)."""
        return x.unflatten(-1, (-1, self.downscale_factor)).transpose(-1, -2).flatten(-3, -2)


@checked_keywords()
class ConvNormActivation1d(nn.Module):
    """1-d convolution, (un)shuffle along the length, norm, activation, dropout.

    As :class:`ConvNormActivation`, but the shuffle comes before the norm, and a scale factor s
    changes the channels |s|-fold.

    Parameters
    ----------
    in_channels, out_channels
        Channels of input and output.
    cfg
        The layer's :class:`~ml_networks.config.ConvConfig`.
    """

    def __init__(self, in_channels: int, out_channels: int, cfg: ConvConfig) -> None:
        super().__init__()
        cfg = as_config(cfg, ConvConfig, what="ConvNormActivation1d cfg")
        gated = 2 * out_channels if is_glu(cfg.activation) else out_channels
        self.cfg = cfg
        self.conv = nn.Conv1d(
            in_channels,
            conv_width(out_channels, cfg, 1),
            cfg.kernel_size,
            cfg.stride,
            cfg.padding,
            cfg.dilation,
            cfg.groups,
            cfg.bias,
            cfg.padding_mode,  # type: ignore[arg-type]
        )
        self.horizontal_shuffle: nn.Module = nn.Identity()
        if cfg.scale_factor > 0:
            self.horizontal_shuffle = HorizonShuffle(cfg.scale_factor)
        elif cfg.scale_factor < 0:
            self.horizontal_shuffle = HorizonUnShuffle(-cfg.scale_factor)
        self.norm = _conv_norm(cfg, in_channels if cfg.norm_first else gated, dimensions=1)
        self.activation = _conv_activation(cfg.activation, dim=-2)
        self.dropout = _dropout(cfg.dropout)
        self.norm_first = cfg.norm_first

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, L) or (C, L) to feature maps of the same rank."""
        if x.is_cuda and x.dim() == 3:
            if self._is_one_op():
                return self._one_op(x)
            if _is_one_convolution(self, self.horizontal_shuffle):
                return _one_convolution(self, x)
        if self.norm_first:
            x = self.horizontal_shuffle(self.conv(self.norm(x)))
        else:
            x = self.norm(self.horizontal_shuffle(self.conv(x)))
        output: Tensor = self.dropout(self.activation(x))
        return output

    def _is_one_op(self) -> bool:
        return type(self.norm) is not nn.Identity and not self.norm_first and _is_one_tail(self)

    def _one_op(self, x: Tensor, residual: Tensor | None = None, **options: Any) -> Tensor:
        return _one_tail(self, self.horizontal_shuffle(self.conv(x)), residual, **options)


class _ConvTransposeNormActivation(nn.Module):
    """Transposed convolution, norm, activation, dropout, in one or two dimensions."""

    dimensions: int
    conv_class: type[nn.ConvTranspose1d] | type[nn.ConvTranspose2d]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        cfg: ConvConfig,
        output_padding: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        cfg = as_config(cfg, ConvConfig, what=f"{type(self).__name__} cfg")
        padding = transpose_padding(cfg, output_padding, self.dimensions, type(self).__name__)
        width = 2 * out_channels if is_glu(cfg.activation) else out_channels
        self.cfg = cfg
        self.conv = self.conv_class(
            in_channels,
            width,
            cfg.kernel_size,
            cfg.stride,
            cfg.padding,
            padding,  # type: ignore[arg-type]
            cfg.groups,
            cfg.bias,
            cfg.dilation,
        )
        self.norm = _conv_norm(cfg, width, self.dimensions)
        self.activation = _conv_activation(cfg.activation, dim=-1 - self.dimensions)
        self.dropout = _dropout(cfg.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W), or (B, C, L) in one dimension, to feature maps of the same rank."""
        if x.is_cuda and x.dim() == 2 + self.dimensions and self._is_one_op():
            return self._one_op(x)
        output: Tensor = self.dropout(self.activation(self.norm(self.conv(x))))
        return output

    def _is_one_op(self) -> bool:
        return type(self.norm) is not nn.Identity and _is_one_tail(self)

    def _one_op(self, x: Tensor) -> Tensor:
        return _one_tail(self, self.conv(x))


@checked_keywords()
class ConvTransposeNormActivation(_ConvTransposeNormActivation):
    """2-d transposed convolution, norm, activation, dropout.

    ``norm_first``, ``scale_factor`` and ``padding_mode`` of the config have no meaning here and
    are not used. An activation with "glu" in its name gets twice the channels and halves them.

    Parameters
    ----------
    in_channels, out_channels
        Channels of input and output.
    cfg
        The layer's :class:`~ml_networks.config.ConvConfig`.
    output_padding
        (rows, columns) added to the output, instead of the config's ``output_padding``.
    """

    dimensions = 2
    conv_class = nn.ConvTranspose2d


@checked_keywords()
class ConvTransposeNormActivation1d(_ConvTransposeNormActivation):
    """1-d transposed convolution, norm, activation, dropout.

    ``norm_first``, ``scale_factor`` and ``padding_mode`` of the config have no meaning here and
    are not used. An activation with "glu" in its name gets twice the channels and halves them.

    Parameters
    ----------
    in_channels, out_channels
        Channels of input and output.
    cfg
        The layer's :class:`~ml_networks.config.ConvConfig`.
    output_padding
        (positions,) added to the output, instead of the config's ``output_padding``.
    """

    dimensions = 1
    conv_class = nn.ConvTranspose1d


@checked_keywords()
class ResidualBlock(nn.Module):
    """Residual block, y = act(shortcut(x) + conv(act(conv(x)))).

    It is built either from ``in_channels``, ``out_channels`` and ``conv_cfg``, or from
    ``in_features``, ``kernel_size`` and the fields of a convolution that follow. The shortcut is
    the identity, or a 1x1 convolution where channels or size change. A gated activation (GLU)
    cannot follow the sum, whose channels it would halve, so there y = x + act(conv(act(conv(x)))).

    Parameters
    ----------
    in_features
        Channels of input and output.
    kernel_size
        Odd; the padding keeps the size.
    activation, norm, norm_cfg, dropout, padding_mode
        As in :class:`~ml_networks.config.ConvConfig`.
    in_channels, out_channels
        Channels of input and output; ``out_channels`` defaults to ``in_channels``.
    conv_cfg
        Both convolutions. Its stride is the first one's. Its padding must keep the size at
        stride 1, and ``scale_factor`` must be 0.
    """

    def __init__(
        self,
        in_features: int | None = None,
        kernel_size: int | None = None,
        activation: str = "ReLU",
        norm: str = "none",
        norm_cfg: dict[str, Any] | None = None,
        dropout: float = 0.0,
        padding_mode: str = "zeros",
        *,
        in_channels: int | None = None,
        out_channels: int | None = None,
        conv_cfg: ConvConfig | None = None,
    ) -> None:
        super().__init__()
        plan = residual_plan(
            in_features,
            kernel_size,
            in_channels,
            out_channels,
            conv_cfg,
            activation=activation,
            norm=norm,
            norm_cfg=norm_cfg or {},
            dropout=dropout,
            padding_mode=padding_mode,
        )
        self.conv_block = nn.Sequential(
            ConvNormActivation(plan.in_channels, plan.out_channels, plan.first),
            ConvNormActivation(plan.out_channels, plan.out_channels, plan.last),
        )
        self.shortcut: nn.Module = nn.Identity()
        if plan.changes_shape:
            self.shortcut = nn.Conv2d(plan.in_channels, plan.out_channels, 1, plan.first.stride)
        self.activation = _conv_activation("Identity" if plan.gated else plan.first.activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to feature maps of the same size (at stride 1)."""
        if x.is_cuda and x.dim() == 4 and self._is_one_op():
            return self._one_op(x)
        output: Tensor = self.activation(self.shortcut(x) + self.conv_block(x))
        return output

    def _is_one_op(self) -> bool:
        """Whether the sum and all between it and the last convolution are as they were made."""
        if type(self.conv_block) is not nn.Sequential or len(self.conv_block) != 2:
            return False
        first, last = self.conv_block
        return (
            type(first) is type(last) is ConvNormActivation
            and first.cfg.activation in KERNEL_ACTIVATIONS
            and not (last.norm_first and type(last.norm) is not nn.Identity)
            and _is_one_tail(last, last.pixel_shuffle)
            and type(self.activation) is Activation
            and not any(has_hooks(child) for child in (self.conv_block, last, self.activation))
        )

    def _one_op(self, x: Tensor) -> Tensor:
        first: Any = self.conv_block[0]
        last: Any = self.conv_block[1]
        options: dict[str, Any] = {}
        if not is_glu(first.cfg.activation):
            options = {"activation": first.cfg.activation, "residual_first": True}
        output: Tensor = last._one_op(first(x), self.shortcut(x), **options)
        return output


@checked_keywords()
class TransformerLayer(nn.Module):
    """A stack of post-norm transformer encoder layers with projections in and out.

    ``in_proj`` (linear, layer norm, hidden activation) is there only if ``input_dim`` differs
    from ``d_model``. ``output_dim=0`` leaves out the linear output projection; the output
    activation stays.

    Parameters
    ----------
    input_dim, output_dim
        Widths of the tokens before and after.
    cfg
        The :class:`~ml_networks.config.TransformerConfig`. A gated hidden activation (GLU) does
        not fit a transformer's feed-forward layers and raises ValueError.
    """

    def __init__(self, input_dim: int, output_dim: int, cfg: TransformerConfig) -> None:
        super().__init__()
        cfg = as_config(cfg, TransformerConfig, what="TransformerLayer cfg")
        if is_glu(cfg.hidden_activation):
            raise ValueError(
                "TransformerLayer needs a hidden_activation that keeps the width, got "
                f"{cfg.hidden_activation!r}"
            )
        self.d_model = cfg.d_model
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.nhead = cfg.nhead
        self.dim_feedforward = cfg.dim_ff
        self.n_layers = cfg.n_layers
        self.in_proj: nn.Module = nn.Identity()
        if input_dim != cfg.d_model:
            self.in_proj = nn.Sequential(
                nn.Linear(input_dim, cfg.d_model),
                nn.LayerNorm(cfg.d_model),
                Activation(cfg.hidden_activation),
            )
        gate = 2 if is_glu(cfg.output_activation) else 1
        output_activation = Activation(cfg.output_activation)
        self.out_proj: nn.Module = output_activation
        if output_dim:
            projection = nn.Linear(cfg.d_model, gate * output_dim)
            self.out_proj = nn.Sequential(projection, output_activation)
        # A named child gives the layers the keys transformer.layers.{i} of nn.TransformerEncoder,
        # which would make them all copies of one layer, with equal initial weights.
        layers = nn.Sequential(*(self._layer(cfg) for _ in range(cfg.n_layers)))
        self.transformer = nn.Sequential()
        self.transformer.add_module("layers", layers)

    @staticmethod
    def _layer(cfg: TransformerConfig) -> nn.TransformerEncoderLayer:
        # Given as functions, these two let torch choose its fused layer for inference.
        functions: dict[str, Callable[[Tensor], Tensor]] = {"ReLU": F.relu, "GELU": F.gelu}
        activation = functions.get(cfg.hidden_activation) or Activation(cfg.hidden_activation)
        layer = nn.TransformerEncoderLayer(
            cfg.d_model, cfg.nhead, cfg.dim_ff, cfg.dropout, activation, batch_first=True
        )
        weights = layer.self_attn.state_dict()
        layer.self_attn = MultiheadAttention(
            cfg.d_model, cfg.nhead, cfg.dropout, batch_first=True, device="meta"
        )
        # Without drawing numbers, and in place of those of `meta`, which hold none.
        layer.self_attn.load_state_dict(weights, assign=True)
        return layer

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Checkpoints of 0.2.6 carry one more layer that took no part in the computation.
        for key in [key for key in state_dict if key.startswith(f"{prefix}transformer_layer.")]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, input_dim) to (B, L, output_dim)."""
        output: Tensor = self.out_proj(self.transformer(self.in_proj(x)))
        return output


@checked_keywords()
class PositionalEncoding(nn.Module):
    """Sinusoidal position code, added to the input (arXiv 1706.03762).

    ``pe[t, 2 i] = sin(t / 10000^(2 i / d_model))``, ``pe[t, 2 i + 1] = cos(...)`` of the same.

    Parameters
    ----------
    d_model
        Width of the tokens.
    dropout
        Dropout probability after the addition. Default 0.
    max_len
        Longest sequence. Default 5000.
    """

    pe: Tensor

    def __init__(self, d_model: int, dropout: float = 0.0, max_len: int = 5000) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        position = torch.arange(max_len)[:, None]
        frequency = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        pe = torch.zeros(1, max_len, d_model)
        pe[0, :, 0::2] = torch.sin(position * frequency)
        pe[0, :, 1::2] = torch.cos(position * frequency[: d_model // 2])
        self.register_buffer("pe", pe)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, d_model) to the same shape, L <= max_len."""
        if x.shape[-2] > self.pe.shape[1]:
            raise ValueError(
                f"PositionalEncoding was made for max_len={self.pe.shape[1]}, got a sequence of "
                f"{x.shape[-2]}"
            )
        output: Tensor = self.dropout(x + self.pe[:, : x.shape[-2]])
        return output


@checked_keywords(embed_dim="emb_dim")
class PatchEmbed(nn.Module):
    """Cut an image into square patches and embed each linearly.

    Parameters
    ----------
    emb_dim
        Width of the embeddings; ``embed_dim`` is another name for it.
    patch_size
        Side of a patch.
    obs_shape
        (C, H, W) of the images; H and W must be divisible by ``patch_size``.
    in_channels
        Instead of ``obs_shape``: the channels alone, for images of any divisible size.
    """

    def __init__(
        self,
        emb_dim: int,
        patch_size: int,
        obs_shape: tuple[int, int, int] | None = None,
        *,
        in_channels: int | None = None,
    ) -> None:
        super().__init__()
        if obs_shape is not None:
            if in_channels not in (None, obs_shape[0]):
                raise ValueError(
                    f"PatchEmbed got in_channels={in_channels} and obs_shape={obs_shape}, "
                    "whose first entry must be the same"
                )
            in_channels = obs_shape[0]
        if in_channels is None:
            raise TypeError("PatchEmbed needs obs_shape or in_channels")
        self.patch_size = patch_size
        if obs_shape is not None:
            self._check_size(obs_shape)
        self.patch_emb_layer = nn.Conv2d(in_channels, emb_dim, patch_size, patch_size)

    def _check_size(self, shape: tuple[int, ...]) -> None:
        if shape[-2] % self.patch_size or shape[-1] % self.patch_size:
            raise ValueError(
                "PatchEmbed needs height and width divisible by "
                f"patch_size={self.patch_size}, got {tuple(shape)}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, H W / patch_size^2, emb_dim), patches row by row."""
        self._check_size(x.shape)
        output: Tensor = self.patch_emb_layer(x).flatten(2).transpose(1, 2)
        return output


@checked_keywords()
class SpatialSoftmax(nn.Module):
    """Expected position of each feature map (arXiv 1504.00702).

    ``p = softmax(x / temperature)`` over the positions, ``out = (sum p * column, sum p * row)``
    with columns and rows running from -1 to 1. With ``is_argmax`` or ``is_straight_through`` the
    position of the maximum, with the gradient of the expected one.

    Parameters
    ----------
    cfg
        The :class:`~ml_networks.config.SpatialSoftmaxConfig`.
    """

    def __init__(self, cfg: SpatialSoftmaxConfig) -> None:
        super().__init__()
        cfg = as_config(cfg, SpatialSoftmaxConfig, what="SpatialSoftmax cfg")
        self.temperature = cfg.temperature
        self.is_argmax = cfg.is_argmax or cfg.is_straight_through

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, H, W) to (B, N, 2), (x, y) of each feature map in [-1, 1]."""
        height, width = x.shape[-2:]
        columns = torch.linspace(-1.0, 1.0, width, device=x.device, dtype=x.dtype)
        rows = torch.linspace(-1.0, 1.0, height, device=x.device, dtype=x.dtype)
        scores = x.flatten(-2)
        weights = torch.softmax(scores / self.temperature, -1).view_as(x)
        expected = torch.stack([weights.sum(-2) @ columns, weights.sum(-1) @ rows], -1)
        if not self.is_argmax:
            return expected
        index = scores.argmax(-1)
        position = torch.stack([columns[index % width], rows[index // width]], -1)
        return position + (expected - expected.detach())
