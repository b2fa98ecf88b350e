"""Machine code without a GPU: compile a Triton kernel for a chip and read what the compiler says.

``triton.compile`` makes real machine code for any target on any machine. Registers, stack and
shared memory come from ``cuobjdump`` (in the Triton wheel), tensor-core instructions from the
disassembly. Nothing here tells a time; it tells which configs cannot be good.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import dispatch
from .device import Device
from .errors import KernelError
from .problem import Problem
from .registry import Op

_TENSOR_CORE = re.compile(r"\b(?:[HIQD]G?MMA|UTC\w*MMA|v_mfma_\w+)\b")
_MEMORY = re.compile(r"\b(?:ld|st|atom|red|prefetch)\.(?:\w+\.)*?global|\bcp\.async")
_WARPS_PER_PROCESSOR = 64
_PROGRAMS_PER_PROCESSOR = 32
_REGISTERS_PER_PROCESSOR = 65536


@dataclass(frozen=True)
class Compilation:
    """One specialisation of one ``@triton.jit`` function, as the launcher would make it.

    ``signature`` names every argument in order ("*fp32", "i32", "constexpr"); ``divisible`` are
    the arguments specialised as multiples of 16: without them loads are narrow and the picture
    is wrong. ``programs`` is the size of the grid, ``uses_dot`` whether tensor cores are meant.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    programs: int = 1
    uses_dot: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells two compilations apart: the grid does not."""
        return (
            self.kernel.__name__,
            tuple(self.signature.items()),
            tuple(sorted(self.constexprs.items(), key=lambda item: item[0])),
            self.divisible,
            self.num_warps,
            self.num_stages,
        )


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs. ``occupancy`` is the fraction of a processor's warps that
    can be resident. ``error`` is the compiler's message where there is no machine code."""

    kernel: str
    target: str
    registers: int = 0
    spill_bytes: int = 0
    shared_memory_bytes: int = 0
    tensor_core_instructions: int = 0
    occupancy: float = 0.0
    complaints: tuple[str, ...] = field(default=())

    @property
    def clean(self) -> bool:
        """Compiles, spills nothing, fits, and uses tensor cores where it should."""
        return not self.complaints


def _nvidia_tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def occupancy(device: Device, registers: int, shared: int, warps: int) -> float:
    """The fraction of a processor's warps that can be resident."""
    if device.platform == "hip":
        waves = min(8, 512 // max(8, -(-registers // 8) * 8))
        by_shared = device.shared_memory_bytes // shared * warps if shared else 32
        return min(4 * waves, by_shared) / 32
    registers_per_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = _REGISTERS_PER_PROCESSOR // registers_per_warp // warps
    by_shared = (device.shared_memory_bytes + 1024) // (shared + 1024)
    programs = min(by_registers, by_shared, _PROGRAMS_PER_PROCESSOR, _WARPS_PER_PROCESSOR // warps)
    return programs * warps / _WARPS_PER_PROCESSOR


def _read_nvidia(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack bytes and tensor-core instructions of a cubin."""
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(flag: str) -> str:
            command = [_nvidia_tool("cuobjdump"), flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = dump("--dump-resource-usage"), dump("--dump-sass")
    counts = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return counts["REG"], max(counts["STACK"], spills), len(_TENSOR_CORE.findall(sass))


def _read_amd(assembly: str) -> tuple[int, int, int]:
    """Registers, bytes of scratch and matrix instructions. Scalar registers that do not fit are
    kept in lanes of vector registers, which count them: nothing goes to memory."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found.group(1)) if found else 0

    spilled = max(4 * number("vgpr_spill_count"), number("private_segment_fixed_size"))
    return number("vgpr_count"), spilled, len(_TENSOR_CORE.findall(assembly))


def _waits(ptx: str) -> bool:
    """Whether a program waits for the kernel before, once and on every path, before it touches
    memory that another one may write: before any branch and any access."""
    before, _, after = ptx.partition("griddepcontrol.wait")
    begun = before[before.find(".entry") :]
    return bool(after) and not _MEMORY.search(begun) and not re.search(r"\b(?:bra|ret)\b", begun)


def compile_for(compilation: Compilation, device: Device) -> Resources:
    """Compile for ``device`` and read the result; a failure is a complaint, not an exception.

    Raises
    ------
    KernelError
        Under ``TRITON_INTERPRET=1``: one process cannot both interpret and compile.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise KernelError("TRITON_INTERPRET=1 is set: this process cannot compile kernels")
    known = _results.get((compilation.key, device.target))
    if known is None:
        known = _results[compilation.key, device.target] = _compile(compilation, device)
    return known


_results: dict[tuple[Any, ...], Resources] = {}


def _compile(compilation: Compilation, device: Device) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name = compilation.kernel.__name__
    arguments = list(compilation.signature)
    if device.platform == "hip":
        chip = GPUTarget("hip", device.target, 64)
    else:
        chip = GPUTarget("cuda", device.capability[0] * 10 + device.capability[1], 32)
    source = ASTSource(
        fn=compilation.kernel,
        signature=dict(compilation.signature),
        constexprs=dict(compilation.constexprs),
        attrs={(arguments.index(a),): [["tt.divisibility", 16]] for a in compilation.divisible},
    )
    options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages}
    try:
        compiled = triton.compile(source, target=chip, options=options)
    except Exception as error:  # the compiler raises whatever it likes
        first = str(error).strip().splitlines() or [type(error).__name__]
        return Resources(name, device.target, complaints=(f"does not compile: {first[0]}",))
    if device.platform == "hip":
        registers, spills, dots = _read_amd(compiled.asm["amdgcn"])
    else:
        registers, spills, dots = _read_nvidia(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    complaints = []
    if spills:
        complaints.append(f"spills {spills} bytes")
    if shared > device.shared_memory_bytes:
        complaints.append(f"needs {shared} B of shared memory, {device.shared_memory_bytes} exist")
    if compilation.uses_dot and not dots:
        complaints.append("has a dot but no tensor-core instruction")
    if compilation.constexprs.get("EARLY") and not _waits(compiled.asm["ptx"]):
        complaints.append("is launched early and does not begin with waiting for what is before")
    resident = occupancy(device, registers, shared, compilation.num_warps)
    return Resources(
        name, device.target, registers, spills, shared, dots, resident, tuple(complaints)
    )


def inspect(op: Op, problem: Problem, device: Device, config: Any = None) -> list[Resources]:
    """The resources of every Triton kernel that ``problem`` launches on ``device``.

    ``config`` None means the one dispatch would choose there; [] if it would choose the plain
    path.
    """
    if config is None:
        decision = dispatch.decide(problem, device, op.binding("torch"))
        if decision.implementation != "triton":
            return []
        config = decision.config
    compilations = op.kernels("torch").compilations(problem, config, device)
    return [compile_for(compilation, device) for compilation in compilations]


def chosen(op: Op, device: Device) -> Iterator[tuple[Problem, list[Resources]]]:
    """`inspect` for each case, dtype and direction of ``op`` in the config dispatch chooses."""
    for case in op.spec.CASES:
        for direction in op.spec.DIRECTIONS:
            for dtype in ("float32", "bfloat16", "float16"):
                problem = case.problem(op.name, dtype, direction)
                yield problem, inspect(op, problem, device)
