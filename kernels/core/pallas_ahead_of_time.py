"""Machine code of Pallas kernels without a GPU: XLA compiles for a described chip.

Needs the packages jax-cuda13-plugin and jax-cuda13-pjrt in JAX's version and an assembler
(``ptxas``), but no GPU and no driver. Each compilation is a process of its own: a kernel that is
much too large can keep the compiler busy for minutes, or end the process.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .ahead_of_time import Resources, occupancy
from .device import Device, target
from .errors import KernelError
from .problem import Case
from .registry import Binding, Op, get

_CHIP = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {core_memory} threads_per_core_limit: 2048 core_count: {processors}
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 41943040
  clock_rate_ghz: 1.4 device_memory_size: 85899345920
  shared_memory_per_block_optin: {block_memory}
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""


def missing() -> str | None:
    """The package to install before `inspect` can work; None where it is there."""
    return None if importlib.util.find_spec("jax_cuda13_plugin") else "jax-cuda13-plugin"


def inspect(
    op: Op, case: Case, dtype: str, direction: str, device: Device, timeout: float = 600.0
) -> list[Resources]:
    """What each Pallas kernel needs that dispatch chooses for ``case`` on ``device``, the kernels
    of the forward pass also where ``direction`` is backward; [] where it chooses the plain path.

    Raises
    ------
    KernelError
        If the compiler's package is not installed, or ``device`` is not an NVIDIA GPU.
    """
    if device.platform != "cuda":
        raise KernelError(f"Pallas kernels are compiled for NVIDIA GPUs only, not {device.target}")
    package = missing()
    if package is not None:
        raise KernelError(f"compiling Pallas kernels needs the package {package} of JAX's version")
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_gpu_autotune_level=0 --xla_dump_to={folder} "
            "--xla_dump_emitter_re=triton-to-llvm",
            "TF_CPP_MIN_LOG_LEVEL": "0",
            "TF_CPP_VMODULE": "subprocess_compilation=9",
        }
        words = op.name, case.id, dtype, direction, device.target
        command = [sys.executable, "-m", __name__, *words]
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            complaint = f"does not compile in {timeout:.0f} s"
            return [Resources(op.name, device.target, complaints=(complaint,))]
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return [Resources(op.name, device.target, complaints=(f"does not compile: {last}",))]
        return list(_read(Path(folder), done.stderr, device))


def _read(folder: Path, log: str, device: Device) -> Iterator[Resources]:
    """The resources of the Pallas kernels, from XLA's dump and its assembler's words."""
    (program,) = (path.read_text() for path in folder.glob("*.before_optimizations.txt"))
    ours = set(re.findall(r'\bname = "(\w+)"', program))
    assembly = [path.read_text() for path in folder.glob("*.ptx")]
    for path in sorted(folder.glob("*.triton-to-llvm.txt")):
        kernel = path.name.split(".")[-3]
        if re.sub(r"__\d+$", "", kernel) not in ours:
            continue
        passes = path.read_text()
        shared = int(re.findall(r"ttg.shared = (\d+)", passes)[-1])
        said = log.split(f"Compiling entry function '{kernel}'")[-1]
        (stack, *spills), registers = (
            re.findall(r"(\d+) bytes (?:stack|spill)", said)[:3],
            re.findall(r"Used (\d+) registers", said)[0],
        )
        spilled = max(map(int, (stack, *spills)))
        (code,) = (text for text in assembly if f".entry {kernel}(" in text)
        warps = int(re.findall(r"\.(?:maxn|reqn)tid\s+(\d+)", code)[0]) // 32
        products = len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", code))
        complaints = []
        if spilled:
            complaints.append(f"spills {spilled} bytes")
        if "tt.dot" in passes and not products:
            complaints.append("has a dot but no tensor-core instruction")
        yield Resources(
            kernel,
            device.target,
            int(registers),
            spilled,
            shared,
            products,
            occupancy(device, int(registers), shared, warps),
            tuple(complaints),
        )


def _describe(device: Device) -> str:
    major, minor = device.capability
    return _CHIP.format(
        core_memory=device.shared_memory_bytes + 1024,
        block_memory=device.shared_memory_bytes,
        processors=device.processors,
        bandwidth=int(device.bandwidth or 1e12),
        major=major,
        minor=minor,
        features="feature_extension: ACCELERATED_FEATURES" if major >= 9 else "",
        name=device.name,
    )


def _compile(op: str, case_id: str, dtype: str, direction: str, target_name: str) -> None:
    """Compile one call, and its derivative if backward, for the target."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from . import pallas

    found, device = get(op), target(target_name)
    case = next(case for case in found.spec.CASES if case.id == case_id)
    described = topologies.get_topology_desc(
        platform="cuda", target_config=_describe(device), topology="1x1x1"
    )
    mesh = topologies.make_mesh(described, (1,), ("chip",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    kinds = {"f": dtype, "b": "bool"}
    arrays = {
        name: jax.ShapeDtypeStruct(
            value.shape, kinds.get(value.dtype.kind, "int32"), sharding=everywhere
        )
        for name, value in found.reference.make_inputs(case, 0).items()
    }
    backward = direction == "backward"
    binding, flags = found.binding("jax"), dict(case.flags)

    def call(inputs: Mapping[str, Any]) -> Any:
        return call_and_pull(binding, flags, inputs, backward=backward)[backward]

    with pallas.lowering_for(target_name), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(call).trace(arrays).lower(lowering_platforms=("cuda",)).compile()


def call_and_pull(
    binding: Binding,
    flags: Mapping[str, Any],
    inputs: Mapping[str, Any],
    implementation: str | None = None,
    *,
    backward: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The floating-point outputs of an op and, if ``backward``, its gradients at cotangents of 1,
    without which no backward kernel is lowered."""
    import jax
    import jax.numpy as jnp

    def floating(values: Mapping[str, Any]) -> dict[str, Any]:
        outputs = binding.call({**inputs, **values}, flags, implementation)
        return {k: v for k, v in outputs.items() if jnp.issubdtype(v.dtype, jnp.floating)}

    wanted = {name: inputs[name] for name in binding.wanted(inputs)}
    if not backward:
        return floating(wanted), {}
    outputs, pull = jax.vjp(floating, wanted)
    return outputs, pull(jax.tree.map(jnp.ones_like, outputs))[0]


if __name__ == "__main__":
    _compile(*sys.argv[1:6])
