"""What JAX code of several ops computes inside: activations by name, dropout from a counter.

``ACTIVATIONS`` and the dropout functions are fit for Pallas kernels: nothing that its lowerings
lack. `apply` is for plain JAX code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .activations import GATED, NORMAL_TAIL, NORMAL_TAIL_SCALE, SELU_ALPHA, SELU_SCALE
from .dropout import MULTIPLIERS, PARITY, ROTATIONS

ValueAndSlope = tuple[Array, Array]


def _log1p_exp_of_minus(size: Array) -> Array:
    """log(1 + exp(-size)) for size >= 0, as 2 artanh(e / (2 + e))."""
    e = jnp.exp(-size)
    s = e / (2.0 + e)
    series = jnp.full_like(s, 1.0 / 15.0)
    for odd in (13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        series = 1.0 / odd + s * s * series
    return 2.0 * s * series


def _tanh(x: Array) -> Array:
    x2 = x * x
    near = x * (945.0 + x2 * (105.0 + x2)) / (945.0 + x2 * (420.0 + 15.0 * x2))
    size = jnp.abs(x)
    e = jnp.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    return jnp.where(size < 0.5, near, jnp.where(x < 0, -far, far))


def _sech_squared(x: Array) -> Array:
    e = jnp.exp(-2.0 * jnp.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


def _sigmoids(x: Array) -> tuple[Array, Array]:
    e = jnp.exp(-jnp.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return jnp.where(x >= 0, large, small), jnp.where(x >= 0, small, large)


def _where(condition: Array, one: Any, other: Any, like: Array) -> Array:
    """`jnp.where` of two numbers, in the dtype of ``like``."""
    return jnp.where(condition, jnp.full_like(like, one), jnp.full_like(like, other))


def _gelu(x: Array) -> ValueAndSlope:
    t = jnp.abs(x)
    e = jnp.exp(-0.5 * t * t)
    u = 1.0 / (1.0 + NORMAL_TAIL_SCALE * t)
    tail = jnp.zeros_like(u)
    for coefficient in reversed(NORMAL_TAIL):
        tail = coefficient + u * tail
    tail = e * u * tail
    distribution = jnp.where(x > 0, 1.0 - tail, tail)
    return x * distribution, distribution + x * e * 0.3989422804014327


def _relu(x: Array) -> ValueAndSlope:
    return jnp.where(x <= 0, 0.0, x), _where(x <= 0, 0.0, 1.0, x)


def _leaky_relu(x: Array) -> ValueAndSlope:
    slope = _where(x > 0, 1.0, 0.01, x)
    return slope * x, slope


def _clip(x: Array, lowest: float, highest: float) -> ValueAndSlope:
    value = jnp.where(x <= lowest, lowest, jnp.where(x >= highest, highest, x))
    return value, _where((x > lowest) & (x < highest), 1.0, 0.0, x)


def _hardsigmoid(x: Array) -> ValueAndSlope:
    value, slope = _clip(x, -3.0, 3.0)
    return (value + 3.0) / 6.0, slope / 6.0


def _hardswish(x: Array) -> ValueAndSlope:
    slope = jnp.where(x <= -3.0, 0.0, jnp.where(x >= 3.0, 1.0, x / 3.0 + 0.5))
    return x * _hardsigmoid(x)[0], slope


def _hardshrink(x: Array) -> ValueAndSlope:
    near = (x >= -0.5) & (x <= 0.5)
    return jnp.where(near, 0.0, x), _where(near, 0.0, 1.0, x)


def _softshrink(x: Array) -> ValueAndSlope:
    near = (x >= -0.5) & (x <= 0.5)
    value = jnp.where(x > 0.5, x - 0.5, jnp.where(x < -0.5, x + 0.5, 0.0 * x))
    return value, _where(near, 0.0, 1.0, x)


def _softsign(x: Array) -> ValueAndSlope:
    inverse = 1.0 / (1.0 + jnp.abs(x))
    return x * inverse, inverse * inverse


def _sigmoid(x: Array) -> ValueAndSlope:
    one, other = _sigmoids(x)
    return one, one * other


def _silu(x: Array) -> ValueAndSlope:
    one, other = _sigmoids(x)
    return x * one, one * (1.0 + x * other)


def _log_sigmoid(x: Array) -> ValueAndSlope:
    return jnp.where(x >= 0, 0.0, x) - _log1p_exp_of_minus(jnp.abs(x)), _sigmoids(x)[1]


def _softplus(x: Array) -> ValueAndSlope:
    return jnp.where(x <= 0, 0.0, x) + _log1p_exp_of_minus(jnp.abs(x)), _sigmoids(x)[0]


def _mish(x: Array) -> ValueAndSlope:
    e = jnp.exp(-jnp.abs(x))
    # tanh(log(1 + w)) = (w^2 + 2 w) / (w^2 + 2 w + 2), with w = exp(x) or, above 0, in 1 / w.
    scale = 1.0 / jnp.where(x >= 0, 1.0 + 2.0 * e * (1.0 + e), e * (e + 2.0) + 2.0)
    kept = jnp.where(x >= 0, 1.0 + 2.0 * e, e * (e + 2.0)) * scale
    rest = jnp.where(x >= 0, 2.0 * e * e, 2.0) * scale
    return x * kept, kept + x * _sigmoids(x)[0] * (rest * (1.0 + kept))


def _tanhshrink(x: Array) -> ValueAndSlope:
    y = _tanh(x)
    return x - y, y * y


def _tanhexp(x: Array) -> ValueAndSlope:
    grown = jnp.exp(jnp.where(x >= 5.0, 5.0, x))
    y = _tanh(grown)
    return x * y, y + jnp.where(x < 5.0, x * grown * _sech_squared(grown), 0.0)


def _elu(x: Array) -> ValueAndSlope:
    below = jnp.where(x > 0, 0.0, x)
    e = jnp.exp(below)
    # exp(x) - 1 without cancellation.
    return jnp.where(x > 0, x, _tanh(0.5 * below) * (e + 1.0)), jnp.where(x > 0, 1.0, e)


def _selu(x: Array) -> ValueAndSlope:
    value, slope = _elu(x)
    scale = _where(x > 0, SELU_SCALE, SELU_SCALE * SELU_ALPHA, x)
    return scale * value, scale * slope


ACTIVATIONS: dict[str, Callable[[Array], ValueAndSlope]] = {
    "CELU": _elu,
    "ELU": _elu,
    "GELU": _gelu,
    "Hardshrink": _hardshrink,
    "Hardsigmoid": _hardsigmoid,
    "Hardswish": _hardswish,
    "Hardtanh": lambda x: _clip(x, -1.0, 1.0),
    "Identity": lambda x: (x, jnp.ones_like(x)),
    "LeakyReLU": _leaky_relu,
    "LogSigmoid": _log_sigmoid,
    "Mish": _mish,
    "REReLU": lambda x: (_relu(x)[0], _gelu(x)[1]),
    "ReLU": _relu,
    "ReLU6": lambda x: _clip(x, 0.0, 6.0),
    "SELU": _selu,
    "SiLU": _silu,
    "Sigmoid": _sigmoid,
    "Softplus": _softplus,
    "Softshrink": _softshrink,
    "Softsign": _softsign,
    "Tanh": lambda x: (_tanh(x), _sech_squared(x)),
    "TanhExp": _tanhexp,
    "Tanhshrink": _tanhshrink,
}
"""Value and slope of float32 arrays, by the names of `core.activations.ELEMENTWISE`."""


def _plain_tanhexp(x: Array) -> Array:
    return x * jnp.tanh(jnp.exp(jnp.minimum(x, 5.0)))


def _exact_gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


@jax.custom_jvp
def _rerelu(x: Array) -> Array:
    return jax.nn.relu(x)


@_rerelu.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return jax.nn.relu(primals[0]), jax.jvp(_exact_gelu, primals, tangents)[1]


def _plain_softplus(x: Array) -> Array:
    # Clipped before the exponential, so that the branch not taken has a finite gradient.
    return jnp.where(x > 20.0, x, jnp.log1p(jnp.exp(jnp.where(x > 20.0, 20.0, x))))


def _at_kinks(name: str) -> Callable[[Array], Array]:
    """An activation of pieces, with torch's slope where two pieces meet."""

    @jax.custom_jvp
    def activation(x: Array) -> Array:
        return ACTIVATIONS[name](x)[0].astype(x.dtype)

    @activation.defjvp
    def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        value, slope = ACTIVATIONS[name](primals[0])
        return value.astype(primals[0].dtype), slope.astype(primals[0].dtype) * tangents[0]

    return activation


_SMOOTH: dict[str, Callable[[Array], Array]] = {
    "CELU": jax.nn.celu,
    "ELU": jax.nn.elu,
    "GELU": _exact_gelu,
    "Identity": lambda x: x,
    "LogSigmoid": jax.nn.log_sigmoid,
    "Mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "REReLU": _rerelu,
    "SELU": jax.nn.selu,
    "SiLU": jax.nn.silu,
    "Sigmoid": jax.nn.sigmoid,
    "Softplus": _plain_softplus,
    "Softsign": jax.nn.soft_sign,
    "Tanh": jnp.tanh,
    "TanhExp": _plain_tanhexp,
    "Tanhshrink": lambda x: x - jnp.tanh(x),
}
_PLAIN: dict[str, Callable[[Array], Array]] = _SMOOTH | {
    name: _at_kinks(name)
    for name in (
        "Hardshrink",
        "Hardsigmoid",
        "Hardswish",
        "Hardtanh",
        "LeakyReLU",
        "ReLU",
        "ReLU6",
        "Softshrink",
    )
}


def apply(activation: str, x: Array) -> Array:
    """An activation of `core.activations.NAMES` in plain JAX, any dtype, differentiable any number
    of times; gated ones halve the last axis."""
    if activation in GATED:
        value, gate = jnp.split(x, 2, -1)
        return value * _PLAIN[GATED[activation]](gate)
    return _PLAIN[activation](x)


def threefry(k0: Array, k1: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds; everything uint32."""
    keys = k0, k1, k0 ^ k1 ^ np.uint32(PARITY)
    x, y = x + k0, y + k1
    for block in range(5):
        for rotation in ROTATIONS[block % 2]:
            x = x + y
            y = (y << np.uint32(rotation) | y >> np.uint32(32 - rotation)) ^ x
        x = x + keys[(block + 1) % 3]
        y = y + keys[(block + 2) % 3] + np.uint32(block + 1)
    return x, y


def dropout_row_keys(seed: tuple[Array, Array], row: Array) -> tuple[Array, Array]:
    """The two keys of each row for `dropout_keeps`. ``seed``: two uint32; ``row``: integers."""
    row = row.astype(jnp.uint32)
    return threefry(*seed, row, jnp.zeros_like(row))


def dropout_keeps(k0: Array, k1: Array, column: Array, threshold: int) -> Array:
    """Whether each element stays. Keys and ``column`` (integers) broadcast against each other;
    ``threshold`` is `core.dropout.threshold`."""
    first, second, third = map(np.uint32, MULTIPLIERS)
    x = column.astype(jnp.uint32) ^ k0
    x = (x ^ x >> np.uint32(17)) * first + k1
    x = (x ^ x >> np.uint32(11)) * second
    x = (x ^ x >> np.uint32(15)) * third
    x = x ^ x >> np.uint32(14)
    return (x >> np.uint32(8)).astype(jnp.int32) >= threshold


def dropout_scale(dropout: float, seed: tuple[Array, Array], rows: int, columns: int) -> Array:
    """What each element of (rows, columns) is multiplied by: 0 or ``1 / (1 - dropout)``."""
    from .dropout import threshold

    k0, k1 = dropout_row_keys(seed, jnp.arange(rows)[:, None])
    kept = dropout_keeps(k0, k1, jnp.arange(columns)[None, :], threshold(dropout))
    return jnp.where(kept, 1.0 / (1.0 - dropout), 0.0)


def seed_words(seed: Any) -> tuple[Array, Array]:
    """The two uint32 words of ``seed``: a Python integer, an integer array () or (2,), or a key of
    `jax.random` (both kinds)."""
    if isinstance(seed, int):
        from .dropout import words

        low, high = words(seed)
        return jnp.uint32(low), jnp.uint32(high)
    array: Array = jnp.asarray(seed)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.bits(array, (2,), jnp.uint32)
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.shape not in ((), (2,)):
        raise ValueError(
            f"seed must be an integer, two uint32 words or a key of jax.random, got "
            f"{array.dtype}{list(array.shape)}"
        )
    if array.shape == (2,):
        return array[0].astype(jnp.uint32), array[1].astype(jnp.uint32)
    upper = array >> 32 if array.dtype.itemsize == 8 else jnp.where(array < 0, -1, 0)
    return array.astype(jnp.uint32), upper.astype(jnp.uint32)
