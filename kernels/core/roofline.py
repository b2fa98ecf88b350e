"""The least time a problem can take on a device: its bytes over the bandwidth or its FLOPs over
the peak, whichever is longer (Williams et al., 2009).

Bytes and FLOPs are those of the op's ``spec.py``: each input read once, each output written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .device import Device
from .problem import Problem
from .registry import Spec


@dataclass(frozen=True)
class Floor:
    """``microseconds`` is None, and ``bound`` "unknown", where the device's rates are unknown."""

    microseconds: float | None
    bound: Literal["memory", "compute", "unknown"]
    bytes_moved: int
    flops: int

    def fraction(self, microseconds: float) -> float | None:
        """How much of the roofline a measured time reaches; 1 is the limit."""
        return None if self.microseconds is None else self.microseconds / microseconds


def peak_flops(device: Device, dtype: str) -> float | None:
    """The highest rate at which ``device`` can compute in ``dtype`` without losing accuracy.

    A float32 product may be made of three TF32 products on tensor cores, so its peak is a third
    of TF32's where that is above the vector units'.
    """
    if dtype != "float32":
        return device.peak(dtype)
    rates = [device.peak("float32"), (device.peak("tf32") or 0.0) / 3]
    return max(filter(None, rates), default=None)


def floor(spec: Spec, problem: Problem, device: Device) -> Floor:
    """The roofline of ``problem`` on ``device``; a rate that is unknown does not limit."""
    flops, bytes_moved = spec.flops(problem), spec.bytes_moved(problem)
    peak = peak_flops(device, problem.dtype)
    compute = flops / peak * 1e6 if peak else None
    memory = bytes_moved / device.bandwidth * 1e6 if device.bandwidth else None
    if memory is None and compute is None:
        return Floor(None, "unknown", bytes_moved, flops)
    if (compute or 0.0) > (memory or 0.0):
        return Floor(compute, "compute", bytes_moved, flops)
    return Floor(memory, "memory", bytes_moved, flops)
