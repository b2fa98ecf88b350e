"""The one module that knows JAX backends and versions: every Pallas kernel starts here.

The Triton lowering of ``pl.pallas_call`` is deprecated since JAX 0.11. When a kernel moves to
``plgpu.kernel`` (Mosaic GPU), this is the only shared file that changes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from .device import Device, jax_device, target

if TYPE_CHECKING:
    import jax

_REDUCED = frozenset(
    ("default", "fastest", "bfloat16", "bfloat16_3x", "high", "tensorfloat32", "TF32_TF32_F32")
)
"""Settings of ``jax_default_matmul_precision`` that allow TF32. Unset, XLA takes TF32 for matrix
products; kernels do not, because theirs stand for transforms and sums that XLA makes in full."""

_interpret: ContextVar[bool] = ContextVar("pallas_interpret", default=False)
_lowering: ContextVar[Device | None] = ContextVar("pallas_lowering", default=None)


def interpreting() -> bool:
    """Whether Pallas kernels run in the interpreter: inside `interpret`, or where the environment
    has ``ML_NETWORKS_PALLAS_INTERPRET=1``."""
    return _interpret.get() or os.environ.get("ML_NETWORKS_PALLAS_INTERPRET") == "1"


@contextmanager
def interpret() -> Iterator[None]:
    """Run Pallas kernels in the interpreter, for tests on a machine without a GPU."""
    token = _interpret.set(True)
    try:
        yield
    finally:
        _interpret.reset(token)


def lowering_target() -> Device | None:
    """The device that code is being lowered for without running it, if any."""
    return _lowering.get()


@contextmanager
def lowering_for(name: str) -> Iterator[Device]:
    """Dispatch as on the target ``name`` (``sm_90``, ``tpu``, ...) while lowering on a CPU."""
    device = target(name)
    token = _lowering.set(device)
    try:
        yield device
    finally:
        _lowering.reset(token)


def lower(function: Callable[..., Any], *arguments: Any, target_name: str) -> str:
    """Lower ``function`` for a target without that hardware; returns StableHLO with the kernels in
    it.

    A kernel that uses something its lowering does not take raises here, on any machine.
    """
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

    device = target(target_name)
    platform = "tpu" if device.platform == "tpu" else "cuda"
    # Since 0.11 the Triton lowering asks the mesh which chip it is for.
    chip = AbstractDevice(device_kind=device.name, num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("chip",), axis_types=(AxisType.Auto,), abstract_device=chip)
    where = nullcontext() if platform == "tpu" else use_abstract_mesh(mesh)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    _expect_triton()  # `call` is not reached where JAX has the trace already
    with lowering_for(target_name), where:
        traced = jax.jit(function).trace(*shapes)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def masks_blocks() -> bool:
    """Whether `load` and `store` take a mask, so that a block may reach beyond its array. A TPU
    kernel needs padded arrays instead."""
    return jax_device().platform != "tpu"


def load(ref: Any, mask: jax.Array | None = None) -> jax.Array:
    """The block ``ref``, with zeros where ``mask`` is False. Before JAX 0.12 a GPU block that
    reaches beyond its array reads what lies there."""
    if mask is None:
        return ref[...]
    from jax.experimental.pallas import triton as plt

    return plt.load(ref, mask=mask, other=0)


def store(ref: Any, value: jax.Array, mask: jax.Array | None = None) -> None:
    """Write ``value`` to the block ``ref`` where ``mask`` is True."""
    if mask is None:
        ref[...] = value
        return
    from jax.experimental.pallas import triton as plt

    plt.store(ref, value, mask=mask)


def scalar_block() -> Any:
    """The block of an array (1,) whose number every program reads as ``ref[0]``, to reach other
    references by it."""
    from jax.experimental import pallas as pl

    options: dict[str, Any] = {}
    if jax_device().platform == "tpu":
        from jax.experimental.pallas import tpu

        options["memory_space"] = tpu.SMEM
    return pl.BlockSpec((1,), lambda *_: (0,), **options)


def dot(
    left: jax.Array,
    right: jax.Array,
    *,
    transpose_left: bool = False,
    transpose_right: bool = False,
) -> jax.Array:
    """A matrix product in float32. Of float32 values with float32 accuracy: three TF32 products on
    NVIDIA tensor cores, one where ``jax_default_matmul_precision`` is set to allow it. Products of
    half-precision values are exact anyway.
    """
    import jax

    precision: Any = jax.lax.Precision.HIGHEST
    reduced = jax.config.jax_default_matmul_precision in _REDUCED  # type: ignore[attr-defined]
    if left.dtype != jax.numpy.float32:
        precision = None
    elif jax_device().platform == "cuda":
        presets = jax.lax.DotAlgorithmPreset
        precision = presets.TF32_TF32_F32 if reduced else presets.TF32_TF32_F32_X3
    elif jax_device().platform == "tpu" and reduced:
        precision = jax.lax.Precision.DEFAULT
    contracted = ((0 if transpose_left else 1,), (1 if transpose_right else 0,))
    return jax.lax.dot_general(
        left,
        right,
        (contracted, ((), ())),
        precision=precision,
        preferred_element_type=jax.numpy.float32,
    )


def _expect_triton() -> None:
    """JAX warns of its Triton lowering: known, and nothing that a caller could act on."""
    warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)


def call(
    kernel: Callable[..., None],
    *,
    out_shape: Any,
    grid: tuple[int, ...],
    in_specs: Any,
    out_specs: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    name: str | None = None,
    input_output_aliases: Mapping[int, int] | None = None,
) -> Callable[..., Any]:
    """``pl.pallas_call`` with the parameters that each backend and JAX version wants.

    On NVIDIA GPUs the Triton lowering is asked for by name: without parameters the default
    changes between JAX versions.
    """
    from jax.experimental import pallas as pl

    device = jax_device()
    parameters: dict[str, Any] = {}
    if device.platform == "cpu":
        parameters["interpret"] = True
    elif device.platform in ("cuda", "hip"):
        from jax.experimental.pallas import triton as plt

        _expect_triton()
        parameters["compiler_params"] = plt.CompilerParams(
            num_warps=num_warps, num_stages=num_stages
        )
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        name=name,
        input_output_aliases=dict(input_output_aliases or {}),
        **parameters,
    )
