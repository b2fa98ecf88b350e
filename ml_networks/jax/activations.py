"""Activations by name: those of ``torch.nn``, with torch's meaning and arguments, and others."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ml_networks._compat import UnknownActivationError, did_you_mean
from ml_networks._geometry import is_glu
from ml_networks.jax.rngs import RngsLike, as_rngs

__all__ = [
    "Activation",
    "CRReLU",
    "L2Norm",
    "REReLU",
    "SiGLU",
    "SwiGLU",
    "TanhExp",
    "UnknownActivationError",
]

Array = jax.Array


def _halves(x: Array, axis: int, name: str) -> tuple[Array, Array]:
    if x.shape[axis] % 2:
        raise ValueError(
            f"{name} halves axis {axis}, whose size must be even, got shape {x.shape}"
        )
    value, gate = jnp.split(x, 2, axis)
    return value, gate


class TanhExp(nnx.Module):
    """TanhExp, f(x) = x tanh(exp(x)) (arXiv 2003.09855)."""

    def __call__(self, x: Array) -> Array:
        """Apply the activation elementwise."""
        # tanh(exp(5)) is exactly 1 in every dtype; without the limit exp overflows and the
        # gradient becomes inf * 0.
        return x * jnp.tanh(jnp.exp(jnp.minimum(x, 5.0)))


class REReLU(nnx.Module):
    """Reparametrised ReLU: the value of relu(x), the gradient of a smooth activation.

    See https://openreview.net/forum?id=lNCnZwcH5Z.

    Parameters
    ----------
    reparametarize_fn
        Name of the smooth activation, lower case as in ``torch.nn.functional``. Default "gelu".
    """

    def __init__(self, reparametarize_fn: str = "gelu") -> None:
        if reparametarize_fn not in _SMOOTH:
            raise UnknownActivationError(
                f"reparametarize_fn {reparametarize_fn!r} is not one of {', '.join(_SMOOTH)}"
                + did_you_mean(reparametarize_fn, _SMOOTH)
            )
        self.reparametarize_fn = reparametarize_fn

    def __call__(self, x: Array) -> Array:
        """Apply the activation elementwise."""
        return _relu_with_gradient_of(x, self.reparametarize_fn)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _relu_with_gradient_of(x: Array, smooth: str) -> Array:
    return jax.nn.relu(x)


@_relu_with_gradient_of.defjvp
def _(smooth: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return jax.nn.relu(primals[0]), jax.jvp(_SMOOTH[smooth], primals, tangents)[1]


class SiGLU(nnx.Module):
    """SiLU-gated linear unit, f(a, b) = a * silu(b), the halves of x (arXiv 2002.05202).

    Parameters
    ----------
    axis
        The axis that is halved. Its size must be even.
    """

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis

    def __call__(self, x: Array) -> Array:
        """Map (..., 2 n, ...) to (..., n, ...)."""
        value, gate = _halves(x, self.axis, "SiGLU")
        return value * jax.nn.silu(gate)


SwiGLU = SiGLU


class CRReLU(nnx.Module):
    """Correction regularised ReLU, f(x) = max(0, x) + lr * x * exp(-x^2 / 2).

    See https://openreview.net/forum?id=7TZYM6Hm9p. ``lr`` is a learned scalar.

    Parameters
    ----------
    lr
        Initial value. Default 0.01.
    """

    def __init__(self, lr: float = 0.01) -> None:
        self.lr = nnx.Param(jnp.asarray(lr))

    def __call__(self, x: Array) -> Array:
        """Apply the activation elementwise."""
        return jax.nn.relu(x) + self.lr[...].astype(x.dtype) * x * jnp.exp(-x * x / 2)


class L2Norm(nnx.Module):
    """Projection onto the unit sphere along the last axis, f(x) = x / max(|x|, 1e-12)."""

    def __call__(self, x: Array) -> Array:
        """Normalise (..., n) along n; a zero vector stays zero, with a finite gradient."""
        squares = (x * x).sum(-1, keepdims=True)
        norm = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
        return x / jnp.where(squares > 0, jnp.maximum(norm, 1e-12), 1e-12)


class PReLU(nnx.Module):
    """f(x) = max(0, x) + weight * min(0, x), ``weight`` learned, one or one per channel (axis 1).

    Parameters
    ----------
    num_parameters
        1 or the number of channels.
    init
        Initial value. Default 0.25.
    """

    def __init__(self, num_parameters: int = 1, init: float = 0.25) -> None:
        self.weight = nnx.Param(jnp.full(num_parameters, init))

    def __call__(self, x: Array) -> Array:
        """Apply the activation elementwise."""
        weight = self.weight[...].astype(x.dtype)
        if weight.size > 1:
            weight = weight.reshape(-1, *(1,) * (x.ndim - 2))
        return jnp.where(x >= 0, x, weight * x)


class RReLU(nnx.Module):
    """Leaky ReLU whose slope is drawn from U(lower, upper) for each element while training, and
    is the mean of the two in evaluation.

    Parameters
    ----------
    lower, upper
        Limits of the slope. Defaults 1/8 and 1/3.
    rngs
        Where the slopes are drawn from while training.
    """

    def __init__(
        self, lower: float = 1 / 8, upper: float = 1 / 3, *, rngs: RngsLike | None = None
    ) -> None:
        self.lower, self.upper = lower, upper
        self.deterministic = False
        self.rngs = None if rngs is None else as_rngs(rngs, draws_parameters=False).dropout.fork()

    def __call__(self, x: Array) -> Array:
        """Apply the activation elementwise."""
        slope: Any = (self.lower + self.upper) / 2
        if not self.deterministic:
            if self.rngs is None:
                raise TypeError("RReLU draws slopes while training: give Activation rngs=")
            slope = jax.random.uniform(self.rngs(), x.shape, x.dtype, self.lower, self.upper)
        return jnp.where(x >= 0, x, slope * x)


def _softplus(x: Array, beta: float = 1.0, threshold: float = 20.0) -> Array:
    # Clipped before the exponential, so that the branch not taken has a finite gradient. A minimum
    # would halve the slope at the threshold.
    scaled = x * beta
    linear = scaled > threshold
    return jnp.where(linear, x, jnp.log1p(jnp.exp(jnp.where(linear, threshold, scaled))) / beta)


def _gelu(x: Array, approximate: str = "none") -> Array:
    return jax.nn.gelu(x, approximate=approximate == "tanh")


def _glu(x: Array, dim: int = -1) -> Array:
    value, gate = _halves(x, dim, "GLU")
    return value * jax.nn.sigmoid(gate)


def _elu(x: Array, alpha: float = 1.0) -> Array:
    return jax.nn.elu(x, alpha)


def _celu(x: Array, alpha: float = 1.0) -> Array:
    return jax.nn.celu(x, alpha)


def _leaky_relu(x: Array, negative_slope: float = 0.01) -> Array:
    return jnp.where(x >= 0, x, negative_slope * x)


def _hardtanh(x: Array, min_val: float = -1.0, max_val: float = 1.0) -> Array:
    return jnp.clip(x, min_val, max_val)


def _threshold(x: Array, threshold: float, value: float) -> Array:
    return jnp.where(x > threshold, x, value)


def _hardshrink(x: Array, lambd: float = 0.5) -> Array:
    return jnp.where(jnp.abs(x) > lambd, x, 0)


def _softshrink(x: Array, lambd: float = 0.5) -> Array:
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - lambd, 0)


def _softmax(x: Array, dim: int = -1) -> Array:
    return jax.nn.softmax(x, dim)


def _softmin(x: Array, dim: int = -1) -> Array:
    return jax.nn.softmax(-x, dim)


def _log_softmax(x: Array, dim: int = -1) -> Array:
    return jax.nn.log_softmax(x, dim)


def _mish(x: Array) -> Array:
    return x * jnp.tanh(_softplus(x))


_SMOOTH: dict[str, Callable[[Array], Array]] = {
    "celu": _celu,
    "elu": _elu,
    "gelu": _gelu,
    "mish": _mish,
    "selu": jax.nn.selu,
    "silu": jax.nn.silu,
    "softplus": _softplus,
}
_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "CELU": _celu,
    "ELU": _elu,
    "GELU": _gelu,
    "GLU": _glu,
    "Hardshrink": _hardshrink,
    "Hardsigmoid": jax.nn.hard_sigmoid,
    "Hardswish": jax.nn.hard_swish,
    "Hardtanh": _hardtanh,
    "Identity": lambda x: x,
    "LeakyReLU": _leaky_relu,
    "LogSigmoid": jax.nn.log_sigmoid,
    "LogSoftmax": _log_softmax,
    "Mish": _mish,
    "ReLU": jax.nn.relu,
    "ReLU6": jax.nn.relu6,
    "SELU": jax.nn.selu,
    "SiLU": jax.nn.silu,
    "Sigmoid": jax.nn.sigmoid,
    "Softmax": _softmax,
    "Softmax2d": partial(_softmax, dim=-3),
    "Softmin": _softmin,
    "Softplus": _softplus,
    "Softshrink": _softshrink,
    "Softsign": jax.nn.soft_sign,
    "Tanh": jnp.tanh,
    "Tanhshrink": lambda x: x - jnp.tanh(x),
    "Threshold": _threshold,
}
_CLASSES: dict[str, type[nnx.Module]] = {
    "CRReLU": CRReLU,
    "L2Norm": L2Norm,
    "PReLU": PReLU,
    "REReLU": REReLU,
    "RReLU": RReLU,
    "SiGLU": SiGLU,
    "SwiGLU": SwiGLU,
    "TanhExp": TanhExp,
}
_SOFTMAXES = ("LogSoftmax", "Softmax", "Softmin")
_NOT_ELEMENTWISE = (*_SOFTMAXES, "GLU", "L2Norm", "PReLU", "SiGLU", "Softmax2d", "SwiGLU")


class Activation(nnx.Module):
    """An activation by name.

    Parameters
    ----------
    activation
        A name of ``torch.nn`` ("ReLU", "GELU", "Identity", ...; GELU is exact, as in torch) or
        one of "CRReLU", "L2Norm", "REReLU", "SiGLU", "SwiGLU", "TanhExp". The case matters.
    dim
        Axis of gated units and softmaxes; other activations ignore it. Default -1.
    rngs
        Needed by "RReLU" alone, which draws its slopes while training.
    **kwargs
        Further arguments of the activation, named as in torch.

    Raises
    ------
    UnknownActivationError
        For an unknown name, with the nearest right one. It is both a ValueError and a
        NotImplementedError.
    TypeError
        For an argument that the activation does not have.
    """

    torch_names = {"_module": "activation"}

    def __init__(
        self, activation: str, *, dim: int = -1, rngs: RngsLike | None = None, **kwargs: Any
    ) -> None:
        module: nnx.Module | None = None
        function: Callable[[Array], Array] | None = None
        if activation in _FUNCTIONS:
            function = _FUNCTIONS[activation]
            if activation in ("GLU", *_SOFTMAXES):
                kwargs["dim"] = dim
            if kwargs or activation == "Threshold":
                inspect.signature(function).bind(None, **kwargs)
                function = partial(function, **kwargs)
        elif activation in _CLASSES:
            if is_glu(activation):
                kwargs["axis"] = dim
            if activation == "RReLU":
                kwargs["rngs"] = rngs
            module = _CLASSES[activation](**kwargs)
        else:
            raise UnknownActivationError(
                f"unknown activation {activation!r}"
                f"{did_you_mean(activation, (*_FUNCTIONS, *_CLASSES))}"
            )
        self._module = module
        self._function = function
        self._channels = -1 if activation in _NOT_ELEMENTWISE else dim

    def __call__(self, x: Array) -> Array:
        """Apply the activation."""
        if self._channels == -1 or not -x.ndim <= self._channels < x.ndim:
            return self._apply(x)
        # In the order that convolutions have inside, see `primitives.with_channels_last`.
        return jnp.moveaxis(self._apply(jnp.moveaxis(x, self._channels, -1)), -1, self._channels)

    def _apply(self, x: Array) -> Array:
        if self._module is not None:
            return self._module(x)
        assert self._function is not None
        return self._function(x)
