"""What Triton kernels of several ops compute inside: activations by name, norms of rows, dropout
from a counter.

Only modules with kernels import this one. Everything takes and returns float32 unless it says
otherwise, uses no function that the interpreter lacks, and keeps relative accuracy near zero.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .activations import NORMAL_TAIL, NORMAL_TAIL_SCALE, SELU_ALPHA, SELU_SCALE
from .device import Device
from .dropout import MULTIPLIERS, PARITY

_SELU_SCALE = tl.constexpr(SELU_SCALE)
_SELU_ALPHA = tl.constexpr(SELU_ALPHA)
_TAIL_SCALE = tl.constexpr(NORMAL_TAIL_SCALE)
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9 = map(tl.constexpr, NORMAL_TAIL)
_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)
_PARITY = tl.constexpr(PARITY)
_M0, _M1, _M2 = map(tl.constexpr, MULTIPLIERS)


def early(device: Device) -> dict[str, Any]:
    """Launch options of a kernel that begins with `wait`: programmatic dependent launch, where
    the device has it. Its programs take their places while the kernel before still runs, which is
    much of the time from one small kernel to the next in a loop. Kernels before or after that know
    nothing of it are waited for, and wait, as ever."""
    if device.platform != "cuda" or device.capability < (9, 0) or device.interpreted:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@triton.jit
def wait(EARLY: tl.constexpr):
    """The first thing that every program of an early launched kernel does: let the next kernel be
    launched too, and wait until all before is finished and its results can be seen. Since no
    program reads, writes or ends before that, kernels work one after the other."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _log1p_exp_of_minus(size):
    """log(1 + exp(-size)) for size >= 0, as 2 artanh(e / (2 + e)), and exp(-size)."""
    e = tl.exp(-size)
    s = e / (2.0 + e)
    s2 = s * s
    series = 1.0 / 13.0 + s2 * (1.0 / 15.0)
    series = 1.0 / 11.0 + s2 * series
    series = 1.0 / 9.0 + s2 * series
    series = 1.0 / 7.0 + s2 * series
    series = 1.0 / 5.0 + s2 * series
    series = 1.0 / 3.0 + s2 * series
    return 2.0 * s * (1.0 + s2 * series), e


@triton.jit
def tanh(x):
    """tanh(x): a continued fraction near 0, exponentials elsewhere."""
    x2 = x * x
    near = x * (945.0 + x2 * (105.0 + x2)) / (945.0 + x2 * (420.0 + 15.0 * x2))
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(size < 0.5, near, tl.where(x < 0, -far, far))


@triton.jit
def _normal(x):
    """Distribution and density of the normal distribution."""
    t = tl.abs(x)
    e = tl.exp(-0.5 * t * t)
    u = 1.0 / (1.0 + _TAIL_SCALE * t)
    p = _C8 + u * _C9
    p = _C7 + u * p
    p = _C6 + u * p
    p = _C5 + u * p
    p = _C4 + u * p
    p = _C3 + u * p
    p = _C2 + u * p
    p = _C1 + u * p
    tail = e * u * (_C0 + u * p)
    return tl.where(x > 0, 1.0 - tail, tail), e * _DENSITY_AT_0


@triton.jit
def activation(x, NAME: tl.constexpr):
    """Value and slope at ``x`` of an activation of `core.activations.ELEMENTWISE`.

    What the caller does not use is not computed. NaN stays NaN.
    """
    if NAME == "Identity":
        value = x
        slope = tl.where(x == x, 1.0, 1.0)
    elif NAME == "ReLU":
        value = tl.where(x <= 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, 1.0)
    elif NAME == "LeakyReLU":
        slope = tl.where(x > 0, 1.0, 0.01)
        value = slope * x
    elif NAME == "ReLU6":
        value = tl.where(x <= 0, 0.0, tl.where(x >= 6.0, 6.0, x))
        slope = tl.where((x > 0) & (x < 6.0), 1.0, 0.0)
    elif NAME == "Hardtanh":
        value = tl.where(x <= -1.0, -1.0, tl.where(x >= 1.0, 1.0, x))
        slope = tl.where((x > -1.0) & (x < 1.0), 1.0, 0.0)
    elif NAME == "Hardsigmoid":
        value = tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 1.0, x / 6.0 + 0.5))
        slope = tl.where((x > -3.0) & (x < 3.0), 1.0 / 6.0, 0.0)
    elif NAME == "Hardswish":
        value = x * tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 1.0, x / 6.0 + 0.5))
        slope = tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 1.0, x / 3.0 + 0.5))
    elif NAME == "Hardshrink":
        value = tl.where((x >= -0.5) & (x <= 0.5), 0.0, x)
        slope = tl.where((x >= -0.5) & (x <= 0.5), 0.0, 1.0)
    elif NAME == "Softshrink":
        value = tl.where(x > 0.5, x - 0.5, tl.where(x < -0.5, x + 0.5, 0.0 * x))
        slope = tl.where((x >= -0.5) & (x <= 0.5), 0.0, 1.0)
    elif NAME == "Softsign":
        inverse = 1.0 / (1.0 + tl.abs(x))
        value = x * inverse
        slope = inverse * inverse
    elif NAME == "Sigmoid" or NAME == "SiLU" or NAME == "LogSigmoid" or NAME == "Softplus":
        logarithm, e = _log1p_exp_of_minus(tl.abs(x))
        large = 1.0 / (1.0 + e)
        small = e * large
        one = tl.where(x >= 0, large, small)
        other = tl.where(x >= 0, small, large)
        if NAME == "Sigmoid":
            value = one
            slope = one * other
        elif NAME == "SiLU":
            value = x * one
            slope = one * (1.0 + x * other)
        elif NAME == "LogSigmoid":
            value = tl.where(x >= 0, 0.0, x) - logarithm
            slope = other
        else:
            value = tl.where(x <= 0, 0.0, x) + logarithm
            slope = one
    elif NAME == "Mish":
        e = tl.exp(-tl.abs(x))
        # tanh(log(1 + w)) = (w^2 + 2 w) / (w^2 + 2 w + 2), with w = exp(x) or, above 0, in 1 / w.
        scale = 1.0 / tl.where(x >= 0, 1.0 + 2.0 * e * (1.0 + e), e * (e + 2.0) + 2.0)
        kept = tl.where(x >= 0, 1.0 + 2.0 * e, e * (e + 2.0)) * scale
        rest = tl.where(x >= 0, 2.0 * e * e, 2.0) * scale
        sigmoid = tl.where(x >= 0, 1.0, e) / (1.0 + e)
        value = x * kept
        slope = kept + x * sigmoid * (rest * (1.0 + kept))
    elif NAME == "Tanh" or NAME == "Tanhshrink":
        y = tanh(x)
        if NAME == "Tanh":
            e = tl.exp(-2.0 * tl.abs(x))
            value = y
            slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
        else:
            value = x - y
            slope = y * y
    elif NAME == "TanhExp":
        grown = tl.exp(tl.where(x >= 5.0, 5.0, x))
        y = tanh(grown)
        e = tl.exp(-2.0 * grown)
        value = x * y
        curved = x * grown * (4.0 * e / ((1.0 + e) * (1.0 + e)))
        slope = y + tl.where(x < 5.0, curved, 0.0)
    elif NAME == "ELU" or NAME == "CELU" or NAME == "SELU":
        below = tl.where(x > 0, 0.0, x)
        e = tl.exp(below)
        # exp(x) - 1 without cancellation.
        value = tl.where(x > 0, x, tanh(0.5 * below) * (e + 1.0))
        slope = tl.where(x > 0, 1.0, e)
        if NAME == "SELU":
            scale = tl.where(x > 0, _SELU_SCALE, _SELU_SCALE * _SELU_ALPHA)
            value *= scale
            slope *= scale
    elif NAME == "GELU" or NAME == "REReLU":
        distribution, density = _normal(x)
        value = x * distribution
        slope = distribution + x * density
        if NAME == "REReLU":
            value = tl.where(x <= 0, 0.0, x)
    else:
        tl.static_assert(False, "unknown activation")
    return value, slope


@triton.jit
def row_statistics(
    x, other, mask, eps, COUNT: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr
):
    """Mean and 1 / deviation of each row, whose second half is ``other`` if it is gated."""
    mean = tl.zeros([x.shape[0]], tl.float32)
    if NORM == "layer":
        total = tl.sum(x, axis=1)
        if GATED:
            total += tl.sum(other, axis=1)
        mean = total / COUNT
    centred = tl.where(mask, x - mean[:, None], 0.0)
    squares = tl.sum(centred * centred, axis=1)
    if GATED:
        centred = tl.where(mask, other - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, axis=1)
    return mean, 1.0 / tl.sqrt(squares / COUNT + eps)


@triton.jit
def scale_and_shift(z, weight, bias, column, in_row, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """``z * weight + bias``, and the weight as a line."""
    scale = tl.full([column.shape[0]], 1.0, tl.float32)
    if WEIGHT:
        scale = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
        z *= scale[None, :]
    if BIAS:
        z += tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    return z, scale


@triton.jit
def _mixed(x, y, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr):
    """Four rounds of Threefry-2x32."""
    x += y
    y = (y << R0 | y >> (32 - R0)) ^ x
    x += y
    y = (y << R1 | y >> (32 - R1)) ^ x
    x += y
    y = (y << R2 | y >> (32 - R2)) ^ x
    x += y
    y = (y << R3 | y >> (32 - R3)) ^ x
    return x, y


@triton.jit
def dropout_row_keys(seed, row):
    """The two keys of each row for `dropout_keeps`. ``seed``: a scalar int64; ``row``: int64."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    k2 = k0 ^ k1 ^ _PARITY
    x = (row & 0xFFFFFFFF).to(tl.uint32) + k0
    y = ((row >> 32) & 0xFFFFFFFF).to(tl.uint32) + k1
    x, y = _mixed(x, y, 13, 15, 26, 6)
    x, y = x + k1, y + k2 + 1
    x, y = _mixed(x, y, 17, 29, 16, 24)
    x, y = x + k2, y + k0 + 2
    x, y = _mixed(x, y, 13, 15, 26, 6)
    x, y = x + k0, y + k1 + 3
    x, y = _mixed(x, y, 17, 29, 16, 24)
    x, y = x + k1, y + k2 + 4
    x, y = _mixed(x, y, 13, 15, 26, 6)
    return x + k2, y + k0 + 5


@triton.jit
def dropout_keeps(k0, k1, column, threshold):
    """Whether each element stays. Keys and ``column`` (integers) broadcast against each other;
    ``threshold`` is `core.dropout.threshold`."""
    x = column.to(tl.uint32) ^ k0
    x = (x ^ (x >> 17)) * _M0 + k1
    x = (x ^ (x >> 11)) * _M1
    x = (x ^ (x >> 15)) * _M2
    x = x ^ (x >> 14)
    return (x >> 8).to(tl.int32) >= threshold
