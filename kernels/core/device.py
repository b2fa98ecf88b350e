"""Facts about the hardware: what fits on it and how fast it can be at best.

Rates are the vendors' datasheet figures (dense, no sparsity); a device that is not in the table
takes those of its generation scaled by its multiprocessor count, and says so in ``peaks_from``.
"""

from __future__ import annotations

import os
import platform as host
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

from .errors import unknown_name

if TYPE_CHECKING:
    import torch

Platform = Literal["cpu", "cuda", "hip", "tpu"]


@dataclass(frozen=True)
class Device:
    """One chip. Bandwidth in bytes/s, peaks in FLOP/s by number format; empty where unknown."""

    platform: Platform
    name: str
    capability: tuple[int, int] = (0, 0)
    processors: int = 1
    shared_memory_bytes: int = 0
    bandwidth: float | None = None
    peak_flops: tuple[tuple[str, float], ...] = ()
    peaks_from: str = ""
    interpreted: bool = False
    """The kernels run in an interpreter here: right, and slow."""

    @property
    def key(self) -> str:
        """The name of this device's folder of tuning records."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def target(self) -> str:
        """The compiler target: ``sm_90``, ``gfx942``, ``tpu`` or ``cpu``."""
        if self.platform == "cuda":
            return f"sm_{self.capability[0]}{self.capability[1]}"
        return self.name.split()[-1].lower() if self.platform == "hip" else self.platform

    def peak(self, number_format: str) -> float | None:
        """Peak FLOP/s in ``number_format`` (``float32``, ``tf32``, ``bfloat16``), if known."""
        return dict(self.peak_flops).get(number_format)


def _gpu(
    name: str,
    capability: tuple[int, int],
    processors: int,
    shared: int,
    bandwidth: float,
    float32: float,
    tf32: float,
    half: float,
    platform: Platform = "cuda",
) -> Device:
    peaks = (("float32", float32), ("tf32", tf32), ("bfloat16", half), ("float16", half))
    return Device(
        platform, name, capability, processors, shared, bandwidth, peaks, peaks_from="datasheet"
    )


KNOWN: tuple[Device, ...] = (
    _gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912, 2.039e12, 19.5e12, 156e12, 312e12),
    _gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 166912, 1.555e12, 19.5e12, 156e12, 312e12),
    _gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448, 3.352e12, 66.9e12, 494.7e12, 989.4e12),
    _gpu("NVIDIA H200", (9, 0), 132, 232448, 4.8e12, 66.9e12, 494.7e12, 989.4e12),
    _gpu("NVIDIA B200", (10, 0), 148, 232448, 8e12, 75e12, 1.1e15, 2.25e15),
    _gpu("AMD MI300X gfx942", (9, 4), 304, 65536, 5.3e12, 163.4e12, 653.7e12, 1307e12, "hip"),
)
_TPU = Device(
    "tpu",
    "TPU v5e",
    bandwidth=8.19e11,
    peak_flops=(("bfloat16", 197e12),),
    peaks_from="datasheet",
)

TARGETS: dict[str, Device] = {
    "sm_80": KNOWN[0],
    "sm_90": KNOWN[2],
    "sm_100": KNOWN[4],
    "gfx942": KNOWN[5],
    "tpu": _TPU,
}
"""The chips that ahead-of-time checks compile for, on any machine."""


def target(name: str) -> Device:
    """The device that stands for the compiler target ``name`` in ahead-of-time checks.

    Raises
    ------
    UnknownNameError
        With the nearest target, if there is none.
    """
    if name not in TARGETS:
        raise unknown_name("target", name, TARGETS)
    return TARGETS[name]


def _describe(
    platform: Platform, name: str, capability: tuple[int, int], processors: int, shared: int
) -> Device:
    """A device as its runtime reports it, with the peaks that the table knows or implies."""
    known = next((device for device in KNOWN if device.name == name), None)
    if known is not None:
        return replace(known, processors=processors, shared_memory_bytes=shared)
    kin = [
        device
        for device in KNOWN
        if device.platform == platform and device.capability[0] <= capability[0]
    ]
    bare = Device(platform, name, capability, processors, shared)
    if not kin:
        return bare
    relative = kin[-1]
    share = processors / relative.processors
    return replace(
        bare,
        bandwidth=relative.bandwidth and relative.bandwidth * share,
        peak_flops=tuple((key, peak * share) for key, peak in relative.peak_flops),
        peaks_from=f"estimated from {relative.name} by processor count",
    )


def cpu(interpreted: bool = False) -> Device:
    """This machine's processor. Its peaks are unknown: the roofline is for accelerators."""
    name = host.processor() or host.machine() or "cpu"
    return Device("cpu", name, processors=os.cpu_count() or 1, interpreted=interpreted)


def torch_device(device: torch.device) -> Device:
    """The facts of a torch device. On a CPU ``interpreted`` is true under TRITON_INTERPRET=1."""
    if device.type != "cuda":
        return _cpu_for_torch()
    import torch

    return _cuda_for_torch(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cpu_for_torch() -> Device:
    return cpu(interpreted=os.environ.get("TRITON_INTERPRET") == "1")


@cache
def _cuda_for_torch(index: int) -> Device:
    import torch

    facts = torch.cuda.get_device_properties(index)
    shared = getattr(facts, "shared_memory_per_block_optin", 0)
    if torch.version.hip:
        name = f"{facts.name} {facts.gcnArchName.split(':')[0]}"
        capability = (facts.major, facts.minor)
        return _describe("hip", name, capability, facts.multi_processor_count, 65536)
    capability = (facts.major, facts.minor)
    return _describe("cuda", facts.name, capability, facts.multi_processor_count, shared)


def jax_device() -> Device:
    """The facts of the device that JAX computes on, or of the one that `core.pallas.lowering_for`
    names. On a CPU ``interpreted`` is true inside `core.pallas.interpret`."""
    from . import pallas

    lowering = pallas.lowering_target()
    if lowering is not None:
        return lowering
    import jax

    device = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    if device.platform == "cpu":
        return cpu(interpreted=pallas.interpreting())
    return _accelerator_for_jax(device.id)


@cache
def _accelerator_for_jax(index: int) -> Device:
    import jax

    device = next(device for device in jax.devices() if device.id == index)
    if device.platform == "tpu":
        return replace(_TPU, name=device.device_kind)
    capability_text = getattr(device, "compute_capability", "0.0")
    major, _, minor = capability_text.partition(".")
    processors = getattr(device, "core_count", 1)
    shared = TARGETS["sm_90"].shared_memory_bytes
    if not major.isdigit():
        return _describe(
            "hip", f"{device.device_kind} {capability_text}", (9, 4), processors, 65536
        )
    capability = (int(major), int(minor or 0))
    return _describe("cuda", device.device_kind, capability, processors, shared)
