"""What plain torch code of several ops computes: activations by name, pixel shuffles, dropout from
a counter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dropout as counter
from .activations import GATED, SELU_ALPHA, SELU_SCALE


def _tanhexp(x: Tensor) -> Tensor:
    return x * torch.tanh(torch.exp(x.clamp(max=5.0)))


def _rerelu(x: Tensor) -> Tensor:
    smooth = F.gelu(x)
    return F.relu(x.detach()) + (smooth - smooth.detach())


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "CELU": F.celu,
    "ELU": F.elu,
    "GELU": F.gelu,
    "Hardshrink": F.hardshrink,
    "Hardsigmoid": F.hardsigmoid,
    "Hardswish": F.hardswish,
    "Hardtanh": F.hardtanh,
    "Identity": lambda x: x,
    "LeakyReLU": F.leaky_relu,
    "LogSigmoid": F.logsigmoid,
    "Mish": F.mish,
    "REReLU": _rerelu,
    "ReLU": F.relu,
    "ReLU6": F.relu6,
    "SELU": F.selu,
    "SiLU": F.silu,
    "Sigmoid": torch.sigmoid,
    "Softplus": F.softplus,
    "Softshrink": F.softshrink,
    "Softsign": F.softsign,
    "Tanh": torch.tanh,
    "TanhExp": _tanhexp,
    "Tanhshrink": F.tanhshrink,
}
"""By the names of `core.activations.ELEMENTWISE`; differentiable any number of times."""


def apply(activation: str, x: Tensor) -> Tensor:
    """An activation of `core.activations.NAMES`; gated ones halve the last dimension."""
    if activation in GATED:
        value, gate = x.chunk(2, -1)
        return value * ACTIVATIONS[GATED[activation]](gate)
    return ACTIVATIONS[activation](x)


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """``torch.nn.PixelShuffle`` for ``factor`` > 1, its inverse for ``factor`` < -1, of an empty
    ``x`` too: torch 2.13 unshuffles none and has no gradient of the other."""
    size = abs(factor)
    if size < 2:
        return x
    if x.numel():
        return F.pixel_shuffle(x, factor) if factor > 0 else F.pixel_unshuffle(x, size)
    *batch, channels, height, width = x.shape
    if factor > 0:
        return x.reshape(*batch, channels // size**2, height * size, width * size)
    return x.reshape(*batch, channels * size**2, height // size, width // size)


_aten = torch.ops.aten


def _pull_tanhexp(g: Tensor, x: Tensor) -> Tensor:
    grown = torch.exp(x.clamp(max=5.0))
    tanh = torch.tanh(grown)
    return g * (tanh + torch.where(x < 5.0, x * grown * (1.0 - tanh * tanh), 0.0))


_PULL_BACKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "CELU": lambda g, x: _aten.elu_backward(g, 1.0, 1.0, 1.0, False, x),
    "ELU": lambda g, x: _aten.elu_backward(g, 1.0, 1.0, 1.0, False, x),
    "GELU": lambda g, x: _aten.gelu_backward(g, x),
    "Hardshrink": lambda g, x: _aten.hardshrink_backward(g, x, 0.5),
    "Hardsigmoid": lambda g, x: _aten.hardsigmoid_backward(g, x),
    "Hardswish": lambda g, x: _aten.hardswish_backward(g, x),
    "Hardtanh": lambda g, x: _aten.hardtanh_backward(g, x, -1.0, 1.0),
    "Identity": lambda g, x: g,
    "LeakyReLU": lambda g, x: _aten.leaky_relu_backward(g, x, 0.01, False),
    "LogSigmoid": lambda g, x: g * torch.sigmoid(-x),
    "Mish": lambda g, x: _aten.mish_backward(g, x),
    "REReLU": lambda g, x: _aten.gelu_backward(g, x),
    "ReLU": lambda g, x: _aten.threshold_backward(g, x, 0.0),
    "ReLU6": lambda g, x: _aten.hardtanh_backward(g, x, 0.0, 6.0),
    "SELU": lambda g, x: _aten.elu_backward(g, SELU_ALPHA, SELU_SCALE, 1.0, False, x),
    "SiLU": lambda g, x: _aten.silu_backward(g, x),
    "Sigmoid": lambda g, x: g * torch.sigmoid(x) * torch.sigmoid(-x),
    "Softplus": lambda g, x: _aten.softplus_backward(g, x, 1.0, 20.0),
    "Softshrink": lambda g, x: _aten.softshrink_backward(g, x, 0.5),
    "Softsign": lambda g, x: g / (1.0 + x.abs()) ** 2,
    "Tanh": lambda g, x: _aten.tanh_backward(g, torch.tanh(x)),
    "TanhExp": _pull_tanhexp,
    "Tanhshrink": lambda g, x: g * torch.tanh(x) ** 2,
}


def pull_back(activation: str, x: Tensor, cotangent: Tensor) -> Tensor:
    """The gradient of ``x`` for the cotangent of ``apply(activation, x)``, where autograd cannot
    be asked: inside a custom op."""
    if activation in GATED:
        value, gate = x.chunk(2, -1)
        opened = ACTIVATIONS[GATED[activation]](gate)
        of_gate = _PULL_BACKS[GATED[activation]](cotangent * value, gate)
        return torch.cat((cotangent * opened, of_gate), -1)
    return _PULL_BACKS[activation](cotangent, x)


_WORD = 0xFFFFFFFF


def _times(x: Tensor, factor: int) -> Tensor:
    """The low 32 bits of a product of 32-bit words held in int64."""
    low = (x & 0xFFFF) * factor
    return (low + (((x >> 16) * factor & 0xFFFF) << 16)) & _WORD


def dropout_scale(
    dropout: float,
    seed: int | Tensor,
    rows: int,
    columns: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What each element of (rows, columns) is multiplied by: 0 or ``1 / (1 - dropout)``. The
    meaning is that of `core.dropout.scale`."""
    row = torch.arange(rows, device=device)[:, None]
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    keys = k0, k1, k0 ^ k1 ^ counter.PARITY
    x, y = (row & _WORD) + k0 & _WORD, (row >> 32) + k1 & _WORD
    for block in range(5):
        for rotation in counter.ROTATIONS[block % 2]:
            x = x + y & _WORD
            y = (y << rotation & _WORD | y >> 32 - rotation) ^ x
        x = x + keys[(block + 1) % 3] & _WORD
        y = y + keys[(block + 2) % 3] + block + 1 & _WORD
    first, second, third = counter.MULTIPLIERS
    z = torch.arange(columns, device=device) ^ x
    z = _times(z ^ z >> 17, first) + y & _WORD
    z = _times(z ^ z >> 11, second)
    z = _times(z ^ z >> 15, third)
    z = z ^ z >> 14
    kept = (z >> 8) >= counter.threshold(dropout)
    return kept.to(dtype) / (1.0 - dropout)


_NOTHING = nullcontext()


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Where ``tensor`` is, for code that keeps to its own dtypes; free where autocast is off."""
    kind = tensor.device.type
    known = torch.amp.is_autocast_available(kind)
    on = known and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else _NOTHING


def transformed(*tensors: Tensor | None) -> bool:
    """Whether ``torch.func`` transforms a call of these: custom ops with gradients do not take
    that, the plain path does."""
    if torch.compiler.is_compiling():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(value is not None and wrapped(value) for value in tensors)


def mapped(*tensors: Tensor | None) -> bool:
    """Whether the innermost transform is a ``torch.func.vmap`` over one of these. A custom op has
    a rule for some, by which the mapped axis becomes one of its own; the plain path takes all."""
    functorch = torch._C._functorch
    level = functorch.maybe_current_level()
    return any(
        value is not None
        and functorch.is_batchedtensor(value)
        and functorch.maybe_get_level(value) == level
        for value in tensors
    )


def folded(value: Tensor, axis: int | None, size: int) -> Tensor:
    """The mapped axis of a tensor, of the length ``size``, in front and as one with the first."""
    value = value.expand(size, *value.shape) if axis is None else value.movedim(axis, 0)
    return value.flatten(0, 1)


def unfolded(value: Tensor, size: int) -> Tensor:
    """The inverse of `folded`."""
    return value.unflatten(0, (size, value.shape[0] // size))


def neuron_table(left: Tensor, right: Tensor, neurons: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each neuron the pairs it is in, sorted by neuron: where each neuron's begin
    (neurons + 1,), the pairs, and the other neuron of each (2 n,)."""
    both = torch.cat([left, right])
    found, order = torch.sort(both, stable=True)
    starts = torch.searchsorted(found, torch.arange(neurons + 1, device=both.device))
    other = torch.cat([right, left])[order]
    return starts, order % max(len(left), 1), other
