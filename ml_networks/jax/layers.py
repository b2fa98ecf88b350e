"""Layers: linear and convolution with norm and activation, residual, transformer, pooling.

Shapes are channels-first, as in :mod:`ml_networks.torch.layers`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ml_networks._compat import checked_keywords, did_you_mean
from ml_networks._geometry import conv_norm, conv_width, is_glu, residual_plan, transpose_padding
from ml_networks.config import (
    ConvConfig,
    LinearConfig,
    MLPConfig,
    SpatialSoftmaxConfig,
    TransformerConfig,
    as_config,
)
from ml_networks.jax.activations import Activation
from ml_networks.jax.base import BaseModule
from ml_networks.jax.primitives import (
    BatchNorm,
    Conv,
    ConvTranspose,
    GroupNorm,
    LayerNorm,
    Linear,
    RMSNorm,
    check_channels,
    on_one_accelerator,
    pixel_shuffle,
    pixel_unshuffle,
)
from ml_networks.jax.rngs import RngsLike, as_rngs
from ml_networks.kernels.core.activations import NAMES as KERNEL_ACTIVATIONS
from ml_networks.kernels.jax import (
    attention,
    conv_shuffle,
    fused_mlp,
    linear_norm_activation,
    norm_activation_shuffle,
)

__all__ = [
    "ConvNormActivation",
    "ConvNormActivation1d",
    "ConvTransposeNormActivation",
    "ConvTransposeNormActivation1d",
    "HorizonShuffle",
    "HorizonUnShuffle",
    "Identity",
    "LinearNormActivation",
    "MLPLayer",
    "PatchEmbed",
    "PositionalEncoding",
    "ResidualBlock",
    "SpatialSoftmax",
    "TransformerLayer",
    "get_norm",
    "pixel_shuffle_2d",
    "pixel_unshuffle_2d",
]

Array = jax.Array


class Identity(nnx.Module):
    """f(x) = x."""

    def __call__(self, x: Array) -> Array:
        """Return ``x``."""
        return x


_NORMS: dict[str, type[nnx.Module]] = {
    "layer": LayerNorm,
    "rms": RMSNorm,
    "group": GroupNorm,
    "batch2d": BatchNorm,
    "batch1d": BatchNorm,
}


def get_norm(norm: str, *, rngs: RngsLike | None = None, **kwargs: Any) -> Any:
    """Make a normalisation layer by name.

    Parameters
    ----------
    norm
        ``"layer"``, ``"rms"``, ``"group"``, ``"batch2d"``, ``"batch1d"`` or ``"none"``.
    rngs
        Not needed, since norms start at one and zero; taken for symmetry with other modules.
    **kwargs
        The arguments of torch's class (``normalized_shape``, ``num_groups``, ``eps``, ...);
        ignored for ``"none"``.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    if norm == "none":
        return Identity()
    if norm not in _NORMS:
        raise ValueError(
            f"norm must be one of {', '.join(_NORMS)}, none, got {norm!r}"
            f"{did_you_mean(norm, (*_NORMS, 'none')) if isinstance(norm, str) else ''}"
        )
    return _NORMS[norm](**kwargs)


def _conv_norm(cfg: ConvConfig, channels: int) -> Any:
    """Return the norm of a convolution's ``channels`` feature maps."""
    norm, arguments = conv_norm(cfg, channels)
    return get_norm("batch2d" if norm == "batch" else norm, **arguments)


def make_dropout(probability: float, rngs: nnx.Rngs) -> Any:
    """Return a dropout layer, or the identity for probability 0."""
    return nnx.Dropout(probability, rngs=rngs) if probability > 0 else Identity()


@checked_keywords()
class LinearNormActivation(nnx.Module):
    """Linear layer, norm, activation, dropout; with ``norm_first`` the norm precedes the layer.

    An activation with "glu" in its name gets twice ``output_dim`` and halves it. On one GPU all
    but the dropout is one op, :func:`ml_networks.kernels.jax.linear_norm_activation`; activations
    with weights or over rows (PReLU, Softmax, ...) keep to separate steps.

    Parameters
    ----------
    input_dim, output_dim
        Widths.
    cfg
        The layer's :class:`~ml_networks.config.LinearConfig`.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    def __init__(
        self, input_dim: int, output_dim: int, cfg: LinearConfig, *, rngs: RngsLike | None = None
    ) -> None:
        rngs = as_rngs(rngs)
        cfg = as_config(cfg, LinearConfig, what="LinearNormActivation cfg")
        width = 2 * output_dim if is_glu(cfg.activation) else output_dim
        norm_width = input_dim if cfg.norm_first else width
        self.linear = Linear(input_dim, width, bias=cfg.bias, rngs=rngs)
        self.norm = get_norm(cfg.norm, **{**cfg.norm_cfg, "normalized_shape": norm_width})
        self.activation = Activation(cfg.activation, rngs=rngs)
        self.dropout = make_dropout(cfg.dropout, rngs)
        self.norm_first = cfg.norm_first
        self.activation_name = cfg.activation

    def __call__(self, x: Array) -> Array:
        """Map (..., input_dim) to (..., output_dim)."""
        if on_one_accelerator() and self._is_one_op():
            return self.dropout(self._one_op(x))
        x = self.linear(self.norm(x)) if self.norm_first else self.norm(self.linear(x))
        return self.dropout(self.activation(x))

    def _is_one_op(self) -> bool:
        """Whether the children are as they were made."""
        return (
            self.activation_name in KERNEL_ACTIVATIONS
            and type(self.linear) is Linear
            and type(self.norm) in _ROW_NORMS
            and type(self.activation) is Activation
        )

    def _one_op(self, x: Array) -> Array:
        bias = self.linear.bias
        scale, shift = (getattr(self.norm, name, None) for name in ("scale", "bias"))
        return linear_norm_activation(
            x,
            self.linear.kernel[...].T,
            None if bias is None else bias[...],
            None if scale is None else scale[...],
            None if shift is None else shift[...],
            norm=_ROW_NORMS[type(self.norm)],
            norm_first=self.norm_first,
            activation=self.activation_name,
            eps=getattr(self.norm, "eps", None),
        )


_ROW_NORMS: dict[Any, str] = {LayerNorm: "layer", RMSNorm: "rms", Identity: "none"}


@checked_keywords(mlp_config="cfg", mlp_cfg="cfg")
class MLPLayer(BaseModule):
    """Multi-layer perceptron: hidden layers of equal width and an output layer.

    The output layer shares the hidden layers' config except that it has ``output_activation``
    and no norm. There is always at least one hidden layer, also for ``n_layers=0``. On one GPU all
    of it is one op, :func:`ml_networks.kernels.jax.fused_mlp`, while the layers are as they were
    made, no norm comes first and nothing is dropped.

    Parameters
    ----------
    input_dim, output_dim
        Widths.
    cfg
        The :class:`~ml_networks.config.MLPConfig`; ``mlp_config`` is another name for it.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    torch_names: ClassVar[dict[str, str]] = {"layers": "dense"}

    def __init__(
        self, input_dim: int, output_dim: int, cfg: MLPConfig, *, rngs: RngsLike | None = None
    ) -> None:
        rngs = as_rngs(rngs)
        cfg = as_config(cfg, MLPConfig, what="MLPLayer cfg")
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.hidden_dim = cfg.hidden_dim
        self.n_layers = cfg.n_layers
        widths = [input_dim, *[cfg.hidden_dim] * max(cfg.n_layers, 1)]
        last = dataclasses.replace(cfg.linear_cfg, activation=cfg.output_activation, norm="none")
        hidden = [
            LinearNormActivation(before, after, cfg.linear_cfg, rngs=rngs)
            for before, after in pairwise(widths)
        ]
        output = LinearNormActivation(widths[-1], output_dim, last, rngs=rngs)
        self.layers = nnx.List([*hidden, output])

    def __call__(self, x: Array) -> Array:
        """Map (..., input_dim) to (..., output_dim)."""
        if on_one_accelerator() and self._is_one_op():
            return self._one_op(x)
        for layer in self.layers:
            x = layer(x)
        return x

    def _is_one_op(self) -> bool:
        """Whether the layers are as they were made, the hidden ones alike, without a norm first
        and without a dropout that is active."""
        *hidden, last = self.layers
        return (
            bool(hidden)
            and not any(type(layer) is not LinearNormActivation for layer in self.layers)
            and all(layer._is_one_op() and not layer.norm_first for layer in self.layers)
            and not any(_drops(layer.dropout) for layer in self.layers)
            and len({_hidden_options(layer) for layer in hidden}) == 1
            and type(last.norm) is Identity
            and (last.linear.bias is None) == (hidden[0].linear.bias is None)
        )

    def _one_op(self, x: Array) -> Array:
        layers: list[Any] = list(self.layers)
        *hidden, last = layers
        norm = hidden[0].norm
        scale, shift = (getattr(norm, name, None) is not None for name in ("scale", "bias"))
        return fused_mlp(
            x,
            [layer.linear.kernel[...].T for layer in layers],
            None if last.linear.bias is None else [one.linear.bias[...] for one in layers],
            [layer.norm.scale[...] for layer in hidden] if scale else None,
            [layer.norm.bias[...] for layer in hidden] if shift else None,
            norm=_ROW_NORMS[type(norm)],
            activation=hidden[0].activation_name,
            output_activation=last.activation_name,
            eps=getattr(norm, "eps", None),
        )


def _drops(dropout: Any) -> bool:
    """Whether ``dropout`` is other than the identity at present."""
    if type(dropout) is nnx.Dropout:
        return not dropout.deterministic
    return type(dropout) is not Identity


def _hidden_options(layer: Any) -> tuple[Any, ...]:
    """What the hidden layers of an MLP share."""
    norm = layer.norm
    affine = (getattr(norm, name, None) is not None for name in ("scale", "bias"))
    width, bias = layer.linear.kernel.shape[1], layer.linear.bias is not None
    return width, bias, layer.activation_name, type(norm), getattr(norm, "eps", None), *affine


class _Convolution(nnx.Module):
    """A convolution with what follows it, in ``sides`` dimensions."""

    sides: ClassVar[int]

    def __init__(
        self, in_channels: int, out_channels: int, cfg: ConvConfig, *, rngs: RngsLike | None = None
    ) -> None:
        rngs = as_rngs(rngs)
        cfg = as_config(cfg, ConvConfig, what=f"{type(self).__name__} cfg")
        width = conv_width(out_channels, cfg, self.sides)
        self.conv = Conv(
            in_channels,
            width,
            cfg.kernel_size,
            cfg.stride,
            cfg.padding,
            cfg.dilation,
            cfg.groups,
            cfg.bias,
            cfg.padding_mode,
            sides=self.sides,
            rngs=rngs,
        )
        self.norm = _conv_norm(cfg, in_channels if cfg.norm_first else self._normed(width, cfg))
        self.activation = Activation(cfg.activation, dim=-1 - self.sides, rngs=rngs)
        self.dropout = make_dropout(cfg.dropout, rngs)
        self.norm_first = cfg.norm_first
        self.scale_factor = cfg.scale_factor
        self.activation_name = cfg.activation

    def _normed(self, width: int, cfg: ConvConfig) -> int:
        """Channels where the norm stands, of the ``width`` that the convolution makes."""
        raise NotImplementedError

    def through(self, convolve: Callable[[Array], Array], x: Array) -> Array:
        """Map ``x`` as the layer does, with ``convolve`` in the place of its convolution."""
        raise NotImplementedError

    def __call__(self, x: Array) -> Array:
        """Map (B, C, *sides) or (C, *sides) to feature maps of the same rank."""
        if on_one_accelerator() and _is_one_convolution(self, x):
            bias = None if self.conv.bias is None else self.conv.bias[...]
            return _one_convolution(self, x, self.conv.kernel[...], bias)
        return self.through(self.conv, x)

    def _shuffle(self, x: Array) -> Array:
        if self.scale_factor > 0:
            return pixel_shuffle(x, self.scale_factor, self.sides)
        if self.scale_factor < 0:
            return pixel_unshuffle(x, -self.scale_factor, self.sides)
        return x


@checked_keywords()
class ConvNormActivation(_Convolution):
    """2-d convolution, norm, pixel (un)shuffle, activation, dropout.

    With ``norm_first`` the norm precedes the convolution. With ``scale_factor`` s > 0 the
    convolution makes s^2 times the channels, which a pixel shuffle turns into an image s times
    as large; with s < 0 a pixel unshuffle makes it |s| times as small. An activation with "glu"
    in its name gets twice the channels and halves them.

    Parameters
    ----------
    in_channels, out_channels
        Channels of input and output.
    cfg
        The layer's :class:`~ml_networks.config.ConvConfig`.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    sides = 2

    def _normed(self, width: int, cfg: ConvConfig) -> int:
        return width

    def through(self, convolve: Callable[[Array], Array], x: Array) -> Array:
        """Map (B, C, H, W) or (C, H, W), with ``convolve`` in the place of the convolution."""
        if self.norm_first:
            return self.dropout(self.activation(self._shuffle(convolve(self.norm(x)))))
        x = convolve(x)
        if on_one_accelerator() and _is_one_tail(self, x):
            return self.dropout(_one_tail(self, x, shuffle=self.scale_factor))
        return self.dropout(self.activation(self._shuffle(self.norm(x))))


@checked_keywords()
class ConvNormActivation1d(_Convolution):
    """1-d convolution, (un)shuffle along the length, norm, activation, dropout.

    As :class:`ConvNormActivation`, but the shuffle comes before the norm, and a scale factor s
    changes the channels |s|-fold.

    Parameters
    ----------
    in_channels, out_channels
        Channels of input and output.
    cfg
        The layer's :class:`~ml_networks.config.ConvConfig`.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    sides = 1

    def _normed(self, width: int, cfg: ConvConfig) -> int:
        if cfg.scale_factor > 0:
            return width // cfg.scale_factor
        return width * -cfg.scale_factor if cfg.scale_factor else width

    def through(self, convolve: Callable[[Array], Array], x: Array) -> Array:
        """Map (B, C, L) or (C, L), with ``convolve`` in the place of the convolution."""
        if self.norm_first:
            return self.dropout(self.activation(self._shuffle(convolve(self.norm(x)))))
        x = self._shuffle(convolve(x))
        if on_one_accelerator() and _is_one_tail(self, x):
            return self.dropout(_one_tail(self, x))
        return self.dropout(self.activation(self.norm(x)))


def _is_one_convolution(layer: Any, x: Array) -> bool:
    """Whether a convolution without a norm behind it and its activation are as they were made."""
    return (
        (layer.norm_first or type(layer.norm) is Identity)
        and layer.activation_name in KERNEL_ACTIVATIONS
        and type(layer.conv) is Conv
        and type(layer.activation) is Activation
        and x.ndim == 2 + layer.sides
    )


def convolve(conv: Conv, x: Array, kernel: Array, bias: Array | None, **options: Any) -> Array:
    """A convolution of the same geometry along both sides, with another kernel and bias, which may
    have a batch axis, and what follows it, as one op."""
    return conv_shuffle(
        x,
        jnp.moveaxis(kernel, (-1, -2), (-2 - conv.sides, -1 - conv.sides)).astype(x.dtype),
        None if bias is None else bias.astype(x.dtype),
        stride=conv.stride[0],
        padding=conv.padding[0],
        dilation=conv.dilation[0],
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        **options,
    )


def _one_convolution(layer: Any, x: Array, kernel: Array, bias: Array | None) -> Array:
    """Convolution, shuffle and activation as one op, then the dropout."""
    x = layer.norm(x) if layer.norm_first else x
    name, factor = layer.activation_name, layer.scale_factor
    return layer.dropout(convolve(layer.conv, x, kernel, bias, shuffle=factor, activation=name))


def _is_one_tail(layer: Any, x: Array) -> bool:
    """Whether norm and activation of a convolution, whose output is ``x``, are as they were made.
    One value has no variance."""
    return (
        layer.activation_name in KERNEL_ACTIVATIONS
        and type(layer.norm) in (BatchNorm, GroupNorm)
        and type(layer.activation) is Activation
        and x.ndim == 2 + layer.sides
        and x.size > x.shape[1]
    )


def _one_tail(layer: Any, x: Array, residual: Array | None = None, **options: Any) -> Array:
    """Norm, shuffle and activation of a convolution, whose output is ``x``, as one op."""
    norm = layer.norm
    tracks = type(norm) is BatchNorm and norm.mean is not None
    training = not (tracks and norm.use_running_average)
    if type(norm) is GroupNorm:
        options |= {"norm": "group", "num_groups": norm.num_groups}
    else:
        options |= {"training": training, "momentum": norm.momentum}
    y: Any = norm_activation_shuffle(
        x,
        None if norm.scale is None else norm.scale[...],
        None if norm.bias is None else norm.bias[...],
        residual,
        running_mean=norm.mean[...] if tracks else None,
        running_var=norm.var[...] if tracks else None,
        eps=norm.eps,
        **{"activation": layer.activation_name, **options},
    )
    if tracks and training:
        y, norm.mean[...], norm.var[...] = y
    return y


class HorizonShuffle(nnx.Module):
    """Pixel shuffle along one dimension: y[..., c, t u + i] = x[..., c u + i, t].

    Parameters
    ----------
    upscale_factor
        u. Default 2.
    """

    def __init__(self, upscale_factor: int = 2) -> None:
        self.upscale_factor = upscale_factor

    def __call__(self, x: Array) -> Array:
        """Map (..., C u, T) to (..., C, T u)."""
        return pixel_shuffle(x, self.upscale_factor, 1)


class HorizonUnShuffle(nnx.Module):
    """Inverse of :class:`HorizonShuffle`: y[..., c d + i, t] = x[..., c, t d + i].

    Parameters
    ----------
    downscale_factor
        d. Default 2.
    """

    def __init__(self, downscale_factor: int = 2) -> None:
        self.downscale_factor = downscale_factor

    def __call__(self, x: Array) -> Array:
        """Map (..., C, T d) to (..., C d, T)."""
        return pixel_unshuffle(x, self.downscale_factor, 1)


def pixel_shuffle_2d(x: Array, factor: int) -> Array:
    """Map (..., C f^2, H, W) to (..., C, H f, W f), in the order of torch's ``PixelShuffle``."""
    return pixel_shuffle(x, factor, 2)


def pixel_unshuffle_2d(x: Array, factor: int) -> Array:
    """Map (..., C, H f, W f) to (..., C f^2, H, W), the inverse of :func:`pixel_shuffle_2d`."""
    return pixel_unshuffle(x, factor, 2)


class _ConvTranspose(nnx.Module):
    """Transposed convolution, norm, activation, dropout, in ``sides`` dimensions."""

    sides: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        cfg: ConvConfig,
        output_padding: Sequence[int] | None = None,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        cfg = as_config(cfg, ConvConfig, what=f"{type(self).__name__} cfg")
        width = 2 * out_channels if is_glu(cfg.activation) else out_channels
        self.conv = ConvTranspose(
            in_channels,
            width,
            cfg.kernel_size,
            cfg.stride,
            cfg.padding,
            transpose_padding(cfg, output_padding, self.sides, type(self).__name__),
            cfg.groups,
            cfg.bias,
            cfg.dilation,
            sides=self.sides,
            rngs=rngs,
        )
        self.norm = _conv_norm(cfg, width)
        self.activation = Activation(cfg.activation, dim=-1 - self.sides, rngs=rngs)
        self.dropout = make_dropout(cfg.dropout, rngs)
        self.activation_name = cfg.activation

    def __call__(self, x: Array) -> Array:
        """Map (B, C, H, W), or (B, C, L) in one dimension, to feature maps of the same rank."""
        x = self.conv(x)
        if on_one_accelerator() and _is_one_tail(self, x):
            return self.dropout(_one_tail(self, x))
        return self.dropout(self.activation(self.norm(x)))


@checked_keywords()
class ConvTransposeNormActivation(_ConvTranspose):
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
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    sides = 2


@checked_keywords()
class ConvTransposeNormActivation1d(_ConvTranspose):
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
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    sides = 1


@checked_keywords()
class ResidualBlock(nnx.Module):
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
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    torch_names: ClassVar[dict[str, str]] = {"conv1": "conv_block.0", "conv2": "conv_block.1"}

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
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
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
        channels, out = plan.in_channels, plan.out_channels
        self.conv1 = ConvNormActivation(channels, out, plan.first, rngs=rngs)
        self.conv2 = ConvNormActivation(out, out, plan.last, rngs=rngs)
        self.shortcut = (
            Conv(channels, out, 1, plan.first.stride, sides=2, rngs=rngs)
            if plan.changes_shape
            else Identity()
        )
        self.activation = Activation(
            "Identity" if plan.gated else plan.first.activation, rngs=rngs
        )

    def __call__(self, x: Array) -> Array:
        """Map (B, C, H, W) to feature maps of the same size (at stride 1)."""
        last = self.conv2
        if not (on_one_accelerator() and self._may_be_one_op()):
            return self.activation(self.shortcut(x) + last(self.conv1(x)))
        shortcut, hidden = self.shortcut(x), last.conv(self.conv1(x))
        if shortcut.dtype == hidden.dtype and _is_one_tail(last, hidden):
            return self._one_op(hidden, shortcut)
        tail = last.through(lambda value: value, hidden)
        return self.activation(shortcut + tail)

    def _may_be_one_op(self) -> bool:
        """Whether the sum and all between it and the last convolution are as they were made."""
        return (
            type(self.conv2) is ConvNormActivation
            and not self.conv2.norm_first
            and type(self.conv2.dropout) is Identity
            and type(self.activation) is Activation
            and self.conv1.activation_name in KERNEL_ACTIVATIONS
        )

    def _one_op(self, hidden: Array, shortcut: Array) -> Array:
        if is_glu(self.conv1.activation_name):
            return _one_tail(self.conv2, hidden, shortcut)
        name = self.conv1.activation_name
        return _one_tail(self.conv2, hidden, shortcut, activation=name, residual_first=True)


class _Heads(nnx.Module):
    """A projection of tokens to heads, (d_model, nhead, width)."""

    def __init__(self, d_model: int, nhead: int, rngs: nnx.Rngs) -> None:
        # torch draws one (3 d, d) matrix by Xavier's rule and starts the biases at zero.
        bound = math.sqrt(6 / (4 * d_model))
        shape = (d_model, nhead, d_model // nhead)
        self.kernel = nnx.Param(
            jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        )
        self.bias = nnx.Param(jnp.zeros(shape[1:]))

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(x.dtype)
        return jnp.einsum("bld,dhe->blhe", x, kernel) + self.bias[...].astype(x.dtype)


class _FromHeads(nnx.Module):
    """A projection of heads (nhead, width) back to tokens."""

    def __init__(self, d_model: int, nhead: int, rngs: nnx.Rngs) -> None:
        bound = 1 / math.sqrt(d_model)
        shape = (nhead, d_model // nhead, d_model)
        self.kernel = nnx.Param(
            jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        )
        self.bias = nnx.Param(jnp.zeros(d_model))

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(x.dtype)
        return jnp.einsum("blhe,hed->bld", x, kernel) + self.bias[...].astype(x.dtype)


class MultiheadAttention(nnx.Module):
    """Attention of tokens to tokens, ``softmax(q k^T / sqrt(width / nhead)) v``, per head.

    Parameters
    ----------
    d_model, nhead
        Width of the tokens and number of heads, a divisor of it.
    dropout
        Of the attention weights.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    def __init__(self, d_model: int, nhead: int, dropout: float, *, rngs: RngsLike) -> None:
        rngs = as_rngs(rngs)
        if d_model % nhead:
            raise ValueError(f"d_model={d_model} is not divisible by nhead={nhead}")
        self.query, self.key, self.value = (_Heads(d_model, nhead, rngs) for _ in range(3))
        self.out = _FromHeads(d_model, nhead, rngs)
        self.dropout = make_dropout(dropout, rngs)

    def __call__(self, query: Array, key: Array, value: Array) -> Array:
        """Map (B, L, d_model) queries to the same shape; keys and values are (B, S, d_model)."""
        tokens = self.query(query), self.key(key), self.value(value)
        heads = (array.swapaxes(1, 2) for array in tokens)
        if isinstance(self.dropout, Identity) or self.dropout.deterministic:
            mixed = attention(*heads)
        else:
            mixed = attention(*heads, dropout=self.dropout.rate, seed=self.dropout.rngs())
        return self.out(mixed.swapaxes(1, 2))


class _EncoderLayer(nnx.Module):
    """Post-norm transformer encoder layer."""

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.self_attn = MultiheadAttention(cfg.d_model, cfg.nhead, cfg.dropout, rngs=rngs)
        self.norm1 = LayerNorm(cfg.d_model)
        self.norm2 = LayerNorm(cfg.d_model)
        self.linear1 = Linear(cfg.d_model, cfg.dim_ff, rngs=rngs)
        self.linear2 = Linear(cfg.dim_ff, cfg.d_model, rngs=rngs)
        self.activation = Activation(cfg.hidden_activation, rngs=rngs)
        self.dropout = make_dropout(cfg.dropout, rngs)
        self.dropout1 = make_dropout(cfg.dropout, rngs)
        self.dropout2 = make_dropout(cfg.dropout, rngs)

    def __call__(self, x: Array) -> Array:
        x = self.norm1(x + self.dropout1(self.self_attn(x, x, x)))
        hidden = self.dropout(self.activation(self.linear1(x)))
        return self.norm2(x + self.dropout2(self.linear2(hidden)))


@checked_keywords()
class TransformerLayer(nnx.Module):
    """A stack of post-norm transformer encoder layers with projections in and out.

    The input projection (linear, layer norm, hidden activation) is there only if ``input_dim``
    differs from ``d_model``. ``output_dim=0`` leaves out the linear output projection; the
    output activation stays.

    Parameters
    ----------
    input_dim, output_dim
        Widths of the tokens before and after.
    cfg
        The :class:`~ml_networks.config.TransformerConfig`. A gated hidden activation (GLU) does
        not fit a transformer's feed-forward layers and raises ValueError.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    torch_names: ClassVar[dict[str, str]] = {
        "in_linear": "in_proj.0",
        "in_norm": "in_proj.1",
        "hidden_activation": "in_proj.2",
        "out_linear": "out_proj.0",
        "output_activation": "out_proj.1",
        "encoder_layers": "transformer.layers",
    }

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        cfg: TransformerConfig,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        cfg = as_config(cfg, TransformerConfig, what="TransformerLayer cfg")
        if is_glu(cfg.hidden_activation):
            raise ValueError(
                "TransformerLayer needs a hidden_activation that keeps the width, got "
                f"{cfg.hidden_activation!r}"
            )
        self.input_dim = input_dim
        self.output_dim = output_dim
        projects = input_dim != cfg.d_model
        self.in_linear = Linear(input_dim, cfg.d_model, rngs=rngs) if projects else Identity()
        self.in_norm = LayerNorm(cfg.d_model) if projects else Identity()
        self.hidden_activation = (
            Activation(cfg.hidden_activation, rngs=rngs) if projects else Identity()
        )
        self.encoder_layers = nnx.List(
            [_EncoderLayer(cfg, rngs=rngs) for _ in range(cfg.n_layers)]
        )
        gate = 2 if is_glu(cfg.output_activation) else 1
        self.out_linear = (
            Linear(cfg.d_model, gate * output_dim, rngs=rngs) if output_dim else Identity()
        )
        self.output_activation = Activation(cfg.output_activation, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Map (B, L, input_dim) to (B, L, output_dim)."""
        x = self.hidden_activation(self.in_norm(self.in_linear(x)))
        for layer in self.encoder_layers:
            x = layer(x)
        return self.output_activation(self.out_linear(x))


@checked_keywords()
class PositionalEncoding(nnx.Module):
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
    rngs
        Needed if ``dropout`` is not 0.
    """

    def __init__(
        self,
        d_model: int,
        dropout: float = 0.0,
        max_len: int = 5000,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        self.dropout: Any = Identity()
        if dropout > 0:
            self.dropout = make_dropout(dropout, as_rngs(rngs, draws_parameters=False))
        position = jnp.arange(max_len)[:, None]
        frequency = jnp.exp(jnp.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        pe = jnp.zeros((1, max_len, d_model))
        pe = pe.at[0, :, 0::2].set(jnp.sin(position * frequency))
        self.pe = pe.at[0, :, 1::2].set(jnp.cos(position * frequency[: d_model // 2]))

    def __call__(self, x: Array) -> Array:
        """Map (B, L, d_model) to the same shape, L <= max_len."""
        if x.shape[-2] > self.pe.shape[1]:
            raise ValueError(
                f"PositionalEncoding was made for max_len={self.pe.shape[1]}, got a sequence of "
                f"{x.shape[-2]}"
            )
        return self.dropout(x + self.pe[:, : x.shape[-2]].astype(x.dtype))


@checked_keywords(embed_dim="emb_dim")
class PatchEmbed(nnx.Module):
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
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    def __init__(
        self,
        emb_dim: int,
        patch_size: int,
        obs_shape: tuple[int, int, int] | None = None,
        *,
        in_channels: int | None = None,
        rngs: RngsLike | None = None,
    ) -> None:
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
        self.patch_emb_layer = Conv(
            in_channels, emb_dim, patch_size, patch_size, sides=2, rngs=as_rngs(rngs)
        )

    def _check_size(self, shape: tuple[int, ...]) -> None:
        if shape[-2] % self.patch_size or shape[-1] % self.patch_size:
            raise ValueError(
                "PatchEmbed needs height and width divisible by "
                f"patch_size={self.patch_size}, got {tuple(shape)}"
            )

    def __call__(self, x: Array) -> Array:
        """Map (B, C, H, W) to (B, H W / patch_size^2, emb_dim), patches row by row."""
        check_channels("PatchEmbed", x, self.patch_emb_layer.kernel.shape[-2], 2)
        self._check_size(x.shape)
        patches = self.patch_emb_layer(x)
        return patches.reshape(*patches.shape[:2], -1).swapaxes(1, 2)


@checked_keywords()
class SpatialSoftmax(nnx.Module):
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
        cfg = as_config(cfg, SpatialSoftmaxConfig, what="SpatialSoftmax cfg")
        self.temperature = cfg.temperature
        self.is_argmax = cfg.is_argmax or cfg.is_straight_through

    def __call__(self, x: Array) -> Array:
        """Map (B, N, H, W) to (B, N, 2), (x, y) of each feature map in [-1, 1]."""
        height, width = x.shape[-2:]
        columns = jnp.linspace(-1.0, 1.0, width, dtype=x.dtype)
        rows = jnp.linspace(-1.0, 1.0, height, dtype=x.dtype)
        scores = x.reshape(*x.shape[:-2], -1)
        weights = jax.nn.softmax(scores / self.temperature, -1).reshape(x.shape)
        expected = jnp.stack([weights.sum(-2) @ columns, weights.sum(-1) @ rows], -1)
        if not self.is_argmax:
            return expected
        index = scores.argmax(-1)
        position = jnp.stack([columns[index % width], rows[index // width]], -1)
        return position + (expected - jax.lax.stop_gradient(expected))
