"""The layers under the layers: linear, convolution and norms over channels-first arrays.

They mean what their torch namesakes mean (initial distribution, padding, epsilon, momentum,
unbiased running variance) and keep Flax's parameter names and layouts: ``kernel`` is
(*window, in / groups, out), ``scale``, ``bias``, ``mean``, ``var``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ml_networks._geometry import channels_hint
from ml_networks.jax.rngs import RngsLike, as_rngs


def on_one_accelerator() -> bool:
    """Whether modules hand what they compute to ops. On a CPU their own steps are the plain path;
    several devices do without kernels, which XLA cannot divide among them."""
    return jax.default_backend() != "cpu" and jax.device_count() == 1


_PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _uniform(rngs: nnx.Rngs, shape: Sequence[int], fan_in: int) -> nnx.Param:
    """Torch's default for linear and convolution: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
    return nnx.Param(jax.random.uniform(rngs.params(), tuple(shape), minval=-bound, maxval=bound))


class Linear(nnx.Module):
    """``y = x W + b`` over the last axis; ``kernel`` is (in, out).

    Parameters
    ----------
    in_features, out_features
        Sizes of the last axis before and after.
    bias
        Whether ``b`` exists.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, rngs: RngsLike
    ) -> None:
        rngs = as_rngs(rngs)
        self.kernel = _uniform(rngs, (in_features, out_features), in_features)
        self.bias = _uniform(rngs, (out_features,), in_features) if bias else None

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Map (..., in) to (..., out)."""
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def _per_side(value: int | Sequence[int], sides: int) -> tuple[int, ...]:
    return (value,) * sides if isinstance(value, int) else tuple(value)


def _dimension_numbers(sides: int) -> tuple[str, str, str]:
    window = "DHW"[-sides:]
    return f"N{window}C", f"{window}IO", f"N{window}C"


class Conv(nnx.Module):
    """Convolution of (batch, channels, *sides) arrays, as torch's ``ConvNd``.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        As in torch. ``padding_mode`` is zeros, reflect, replicate or circular.
    sides
        Number of spatial axes.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        sides: int,
        rngs: RngsLike,
    ) -> None:
        rngs = as_rngs(rngs)
        window = _per_side(kernel_size, sides)
        fan_in = in_channels // groups * math.prod(window)
        self.kernel = _uniform(rngs, (*window, in_channels // groups, out_channels), fan_in)
        self.bias = _uniform(rngs, (out_channels,), fan_in) if bias else None
        self.stride = _per_side(stride, sides)
        self.padding = _per_side(padding, sides)
        self.dilation = _per_side(dilation, sides)
        self.groups = groups
        self.padding_mode = padding_mode
        self.sides = sides

    def __call__(self, x: Float[Array, "*batch in *sides"]) -> jax.Array:
        """Map (batch, in, *sides) to (batch, out, *sides); the batch axis may be left out."""
        return self.convolve(x, self.kernel[...], None if self.bias is None else self.bias[...])

    def convolve(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        """Do the same with another kernel and bias."""
        check_channels("Conv", x, self.kernel.shape[-2] * self.groups, self.sides)
        if x.ndim == self.sides + 1:
            return self.convolve(x[None], kernel, bias)[0]
        padding = [(p, p) for p in self.padding]
        x = _channels_last(x)
        if self.padding_mode != "zeros":
            x = jnp.pad(x, [(0, 0), *padding, (0, 0)], mode=_PAD_MODES[self.padding_mode])
            padding = [(0, 0)] * self.sides
        y = jax.lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            self.stride,
            padding,
            rhs_dilation=self.dilation,
            dimension_numbers=_dimension_numbers(self.sides),
            feature_group_count=self.groups,
        )
        return _add_bias(y, bias)


class ConvTranspose(nnx.Module):
    """Transposed convolution of (batch, channels, *sides) arrays, as torch's ``ConvTransposeNd``:
    sides become ``(side - 1) stride - 2 padding + dilation (kernel - 1) + output_padding + 1``.

    ``kernel`` is torch's weight with its window flipped.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        *,
        sides: int,
        rngs: RngsLike,
    ) -> None:
        rngs = as_rngs(rngs)
        window = _per_side(kernel_size, sides)
        fan_in = out_channels // groups * math.prod(window)  # torch's reading of its layout
        self.kernel = _uniform(rngs, (*window, in_channels // groups, out_channels), fan_in)
        self.bias = _uniform(rngs, (out_channels,), fan_in) if bias else None
        self.stride = _per_side(stride, sides)
        self.dilation = _per_side(dilation, sides)
        reach = [d * (k - 1) for d, k in zip(self.dilation, window, strict=True)]
        before = [r - p for r, p in zip(reach, _per_side(padding, sides), strict=True)]
        extra = _per_side(output_padding, sides)
        self.edges = tuple((b, b + e) for b, e in zip(before, extra, strict=True))
        self.groups = groups
        self.sides = sides

    def __call__(self, x: Float[Array, "*batch in *sides"]) -> jax.Array:
        """Map (batch, in, *sides) to (batch, out, *sides); the batch axis may be left out."""
        return self.convolve(x, self.kernel[...], None if self.bias is None else self.bias[...])

    def convolve(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        """Do the same with another kernel and bias."""
        check_channels("ConvTranspose", x, self.kernel.shape[-2] * self.groups, self.sides)
        if x.ndim == self.sides + 1:
            return self.convolve(x[None], kernel, bias)[0]
        y = jax.lax.conv_general_dilated(
            _channels_last(x),
            kernel.astype(x.dtype),
            (1,) * self.sides,
            self.edges,
            lhs_dilation=self.stride,
            rhs_dilation=self.dilation,
            dimension_numbers=_dimension_numbers(self.sides),
            feature_group_count=self.groups,
        )
        return _add_bias(y, bias)


def check_channels(owner: str, x: jax.Array, channels: int, sides: int) -> None:
    """Raise ValueError, naming the axis that looks wrong, unless ``x`` is (channels, *sides) with
    at most one axis before.
    """
    if x.ndim in (sides + 1, sides + 2) and x.shape[-1 - sides] == channels:
        return
    raise ValueError(
        f"{owner} needs {channels} channels in axis {-1 - sides} of an array of {sides + 2} axes, "
        f"got shape {x.shape}{channels_hint(x.shape, channels, sides)}"
    )


# Inside, channels are last: XLA convolves so on a CPU. The moves in and out of neighbouring layers
# cancel when compiled, as long as everything between convolutions makes them.
def _channels_last(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, 1, -1)


def _channels_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, 1)


def with_channels_last(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Apply to arrays (batch, channels, *sides) what works on (batch, *sides, channels)."""
    return _channels_first(function(*map(_channels_last, arrays)))


def _add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Add to convolved (batch, *sides, channels), which become (batch, channels, *sides)."""
    return _channels_first(y if bias is None else y + bias.astype(y.dtype))


class Affine(nnx.Module):
    """``scale`` and ``bias`` of a norm; both absent without ``affine``."""

    def __init__(self, features: int, affine: bool, bias: bool) -> None:
        self.features = features
        self.scale = nnx.Param(jnp.ones(features)) if affine else None
        self.bias = nnx.Param(jnp.zeros(features)) if affine and bias else None


class LayerNorm(Affine):
    """``(x - mean) / sqrt(var + eps) * scale + bias`` over the last axis."""

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(normalized_shape, elementwise_affine, bias)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Normalise (..., features) along the last axis."""
        exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = exact - exact.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + self.eps)
        y = y if self.scale is None else y * self.scale[...]
        y = y if self.bias is None else y + self.bias[...]
        return y.astype(x.dtype)


class RMSNorm(Affine):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis; ``eps`` None is
    that of the dtype computed in, float32 for half precision."""

    def __init__(
        self, normalized_shape: int, eps: float | None = None, elementwise_affine: bool = True
    ) -> None:
        super().__init__(normalized_shape, elementwise_affine, bias=False)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Normalise (..., features) along the last axis."""
        exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        eps = jnp.finfo(exact.dtype).eps if self.eps is None else self.eps
        y = exact * jax.lax.rsqrt((exact**2).mean(-1, keepdims=True) + eps)
        y = y if self.scale is None else y * self.scale[...]
        return y.astype(x.dtype)


class GroupNorm(Affine):
    """Mean and variance over groups of channels and all sides of (batch, channels, *sides)."""

    def __init__(
        self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True
    ) -> None:
        if num_channels % num_groups:
            raise ValueError(
                f"num_channels = {num_channels} is not a multiple of num_groups = {num_groups}"
            )
        super().__init__(num_channels, affine, bias=True)
        self.num_groups = num_groups
        self.eps = eps

    def __call__(self, x: Float[Array, "batch channels *sides"]) -> jax.Array:
        """Normalise (batch, channels, *sides); the shape stays."""
        check_channels(type(self).__name__, x, self.features, x.ndim - 2)
        exact = _channels_last(x).astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = self._of_groups(exact)
        var = self._of_groups((exact - _beside_sides(mean, x.ndim)) ** 2)
        return _normalized(exact, mean, jax.lax.rsqrt(var + self.eps), self).astype(x.dtype)

    def _of_groups(self, x: jax.Array) -> jax.Array:
        """(batch, channels): the mean of each channel's group. The sides go first, so that feature
        maps need not be moved into the order of groups.
        """
        means = x.mean(range(1, x.ndim - 1)).reshape(len(x), self.num_groups, -1).mean(-1)
        return jnp.repeat(means, self.features // self.num_groups, 1)


class BatchNorm(Affine):
    """Batch norm of (batch, channels, *sides), or (batch, features).

    While training, the batch's own mean and (biased) variance normalise, and ``mean`` and ``var``
    move by ``momentum`` towards the batch's mean and unbiased variance: torch's meaning of
    momentum, the weight of the new. ``use_running_average`` is set by ``module.eval()`` and
    ``module.train()``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, affine, bias=True)
        self.mean = nnx.BatchStat(jnp.zeros(num_features)) if track_running_stats else None
        self.var = nnx.BatchStat(jnp.ones(num_features)) if track_running_stats else None
        self.eps = eps
        self.momentum = momentum
        self.use_running_average = False

    def __call__(self, x: Float[Array, "batch channels *sides"]) -> jax.Array:
        """Normalise (batch, channels, *sides); the shape stays."""
        check_channels(type(self).__name__, x, self.features, x.ndim - 2)
        exact = _channels_last(x).astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.use_running_average and self.mean is not None and self.var is not None:
            mean, var = self.mean[...], self.var[...]
        else:
            axes = range(x.ndim - 1)
            mean, var = exact.mean(axes), exact.var(axes)
            self._update(mean, var, x.size // x.shape[1])
        return _normalized(exact, mean, jax.lax.rsqrt(var + self.eps), self).astype(x.dtype)

    def _update(self, mean: jax.Array, var: jax.Array, count: int) -> None:
        if self.mean is None or self.var is None:
            return
        unbiased = var * (count / max(count - 1, 1))
        for running, new in ((self.mean, mean), (self.var, unbiased)):
            held = jax.lax.stop_gradient(new)
            running[...] = (1 - self.momentum) * running[...] + self.momentum * held


def _normalized(x: jax.Array, mean: jax.Array, factor: jax.Array, norm: Affine) -> jax.Array:
    """``(x - mean) factor scale + bias`` of (batch, *sides, channels), as (batch, channels,
    *sides), with (channels,) or (batch, channels) moments.

    One multiplication and addition an element, as in torch: the moments are folded into scale and
    bias first, which makes the backward pass shorter too.
    """
    factor = factor if norm.scale is None else factor * norm.scale[...]
    offset = -mean * factor
    offset = offset if norm.bias is None else offset + norm.bias[...]
    y = x * _beside_sides(factor, x.ndim) + _beside_sides(offset, x.ndim)
    return _channels_first(y)


def _beside_sides(moment: jax.Array, axes: int) -> jax.Array:
    return moment if moment.ndim == 1 else jnp.expand_dims(moment, range(1, axes - 1))


# Channels go last while pixels move, so that whole rows of channels are copied.
def pixel_shuffle(x: Float[Array, "*batch channels *sides"], factor: int, sides: int) -> Any:
    """(…, c f^n, *sides) -> (…, c, f * sides), torch's order; n = ``sides`` spatial axes."""
    first = x.ndim - sides - 1
    batch, channels, size = x.shape[:first], x.shape[first], x.shape[first + 1 :]
    kept = channels // factor**sides
    x = jnp.moveaxis(x, first, -1).reshape(*batch, *size, kept, *(factor,) * sides)
    inner = first + sides + 1
    order = [axis for n in range(sides) for axis in (first + n, inner + n)]
    x = x.transpose(*range(first), *order, inner - 1)
    return jnp.moveaxis(x.reshape(*batch, *(factor * side for side in size), kept), -1, first)


def pixel_unshuffle(x: Float[Array, "*batch channels *sides"], factor: int, sides: int) -> Any:
    """The inverse of :func:`pixel_shuffle`."""
    first = x.ndim - sides - 1
    batch, channels = x.shape[:first], x.shape[first]
    size = [side // factor for side in x.shape[first + 1 :]]
    pairs = (n for side in size for n in (side, factor))
    x = jnp.moveaxis(x, first, -1).reshape(*batch, *pairs, channels)
    outer = [first + 2 * n for n in range(sides)]
    x = x.transpose(*range(first), *outer, x.ndim - 1, *(axis + 1 for axis in outer))
    return jnp.moveaxis(x.reshape(*batch, *size, channels * factor**sides), -1, first)
