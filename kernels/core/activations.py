"""The elementwise activations that kernels can apply, by the library's names, in NumPy float64.

This is their meaning; `core.triton_functions`, `core.jax_functions` and `core.torch_functions` say
the same in float32. An activation here has no arguments and no weights of its own. Where it has a
kink, the slope is the one that torch takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import unknown_name

Array = NDArray[Any]
ValueAndSlope = tuple[Array, Array]

SELU_SCALE = 1.0507009873554805
SELU_ALPHA = 1.6732632423543772

NORMAL_TAIL_SCALE = 0.3
NORMAL_TAIL = (
    0.1196826955,
    0.1196800312,
    0.109011599,
    0.08591980911,
    0.06838701571,
    -0.01553608582,
    0.09958457442,
    -0.1472413835,
    0.07293952633,
    -0.01242773435,
)
"""``Phi(-t) = exp(-t^2 / 2) u (c_0 + c_1 u + ...)`` with ``u = 1 / (1 + scale t)``, t >= 0: the
normal distribution's tail to a relative 1e-7, for kernels that have no erf."""


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))


def _normal(x: Array) -> Array:
    return 0.5 * np.vectorize(math.erfc, otypes=[float])(-x / math.sqrt(2.0))


def _gelu(x: Array) -> ValueAndSlope:
    density = np.exp(-x * x / 2.0) / math.sqrt(2.0 * math.pi)
    return x * _normal(x), _normal(x) + x * density


def _elu(x: Array) -> ValueAndSlope:
    below = np.minimum(x, 0.0)
    return np.where(x > 0, x, np.expm1(below)), np.where(x > 0, 1.0, np.exp(below))


def _selu(x: Array) -> ValueAndSlope:
    value, slope = _elu(x)
    scale = SELU_SCALE * np.where(x > 0, 1.0, SELU_ALPHA)
    return scale * value, scale * slope


def _clip(x: Array, lowest: float, highest: float) -> ValueAndSlope:
    return np.clip(x, lowest, highest), np.where((x > lowest) & (x < highest), 1.0, 0.0)


def _hardsigmoid(x: Array) -> ValueAndSlope:
    value, slope = _clip(x, -3.0, 3.0)
    return (value + 3.0) / 6.0, slope / 6.0


def _hardswish(x: Array) -> ValueAndSlope:
    inside = x / 3.0 + 0.5
    slope = np.where(x <= -3.0, 0.0, np.where(x < 3.0, inside, 1.0))
    return x * np.clip(x + 3.0, 0.0, 6.0) / 6.0, slope


def _shrink(x: Array, by: float) -> ValueAndSlope:
    kept = np.abs(x) > 0.5
    return np.where(kept, x - by * np.sign(x), 0.0 * x), np.where(kept, 1.0, 0.0)


def _relu(x: Array) -> ValueAndSlope:
    return np.where(x <= 0, 0.0, x), np.where(x <= 0, 0.0, 1.0)


def _leaky_relu(x: Array) -> ValueAndSlope:
    slope = np.where(x > 0, 1.0, 0.01)
    return slope * x, slope


def _mish(x: Array) -> ValueAndSlope:
    tanh = np.tanh(np.logaddexp(0.0, x))
    return x * tanh, tanh + x * _sigmoid(x) * (1.0 - tanh * tanh)


def _rerelu(x: Array) -> ValueAndSlope:
    return _relu(x)[0], _gelu(x)[1]


def _sigmoid_slope(x: Array) -> ValueAndSlope:
    return _sigmoid(x), _sigmoid(x) * _sigmoid(-x)


def _silu(x: Array) -> ValueAndSlope:
    gate = _sigmoid(x)
    return x * gate, gate * (1.0 + x * _sigmoid(-x))


def _softplus(x: Array) -> ValueAndSlope:
    # torch's threshold of 20, beyond which it is the identity.
    linear = x > 20.0
    return np.where(linear, x, np.logaddexp(0.0, x)), np.where(linear, 1.0, _sigmoid(x))


def _softsign(x: Array) -> ValueAndSlope:
    return x / (1.0 + np.abs(x)), 1.0 / (1.0 + np.abs(x)) ** 2


def _tanhexp(x: Array) -> ValueAndSlope:
    # tanh(exp(5)) is exactly 1.
    grown = np.exp(np.minimum(x, 5.0))
    tanh = np.tanh(grown)
    curved = np.where(x < 5.0, x * grown * (1.0 - tanh * tanh), 0.0)
    return x * tanh, tanh + curved


ELEMENTWISE: dict[str, Callable[[Array], ValueAndSlope]] = {
    "CELU": _elu,
    "ELU": _elu,
    "GELU": _gelu,
    "Hardshrink": lambda x: _shrink(x, 0.0),
    "Hardsigmoid": _hardsigmoid,
    "Hardswish": _hardswish,
    "Hardtanh": lambda x: _clip(x, -1.0, 1.0),
    "Identity": lambda x: (x, np.ones_like(x)),
    "LeakyReLU": _leaky_relu,
    "LogSigmoid": lambda x: (-np.logaddexp(0.0, -x), _sigmoid(-x)),
    "Mish": _mish,
    "REReLU": _rerelu,
    "ReLU": _relu,
    "ReLU6": lambda x: _clip(x, 0.0, 6.0),
    "SELU": _selu,
    "SiLU": _silu,
    "Sigmoid": _sigmoid_slope,
    "Softplus": _softplus,
    "Softshrink": lambda x: _shrink(x, 0.5),
    "Softsign": _softsign,
    "Tanh": lambda x: (np.tanh(x), 1.0 / np.cosh(np.clip(x, -350.0, 350.0)) ** 2),
    "TanhExp": _tanhexp,
    "Tanhshrink": lambda x: (x - np.tanh(x), np.tanh(x) ** 2),
}
"""Value and slope of each activation. REReLU has the value of ReLU and the slope of GELU."""

GATED: dict[str, str] = {"GLU": "Sigmoid", "SiGLU": "SiLU", "SwiGLU": "SiLU"}
"""Activations that halve their axis: the first half times this activation of the second."""

NAMES = (*ELEMENTWISE, *GATED)


def check_name(activation: str) -> None:
    """Raise UnknownNameError, with the nearest name, unless kernels can apply ``activation``."""
    if activation not in ELEMENTWISE and activation not in GATED:
        raise unknown_name("activation", activation, NAMES)


def apply(activation: str, x: Array) -> Array:
    """``activation`` of ``x``; gated ones halve the last axis."""
    if activation in GATED:
        value, gate = np.split(x, 2, axis=-1)
        return value * ELEMENTWISE[GATED[activation]](gate)[0]
    return ELEMENTWISE[activation](x)[0]


def pull_back(activation: str, x: Array, cotangent: Array) -> Array:
    """The gradient of ``x`` for the ``cotangent`` of ``apply(activation, x)``."""
    if activation in GATED:
        value, gate = np.split(x, 2, axis=-1)
        open_, slope = ELEMENTWISE[GATED[activation]](gate)
        return np.concatenate((cotangent * open_, cotangent * value * slope), axis=-1)
    return cotangent * ELEMENTWISE[activation](x)[1]
