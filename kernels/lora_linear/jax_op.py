"""Low-rank linear for JAX: the public function and the plain path."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jax import Array

from ..core import dispatch, usage
from ..core.arguments import jax_arrays
from ..core.device import jax_device
from ..core.problem import Problem
from ..core.registry import Binding
from . import spec


def lora_linear(
    x: Array,
    weight: Array,
    bias: Array | None,
    u: Array,
    v: Array,
    gate: Array | None = None,
    *,
    scale: float = 1.0,
    implementation: str | None = None,
) -> Array:
    r"""Apply a linear map plus a low-rank update: :math:`y = W x + b + s\, U (g \odot V^\top x)`.

    ``samples`` below is the length of the first axis of ``x``: adapters and gates may be shared or
    differ between samples. Gradients flow to every array; under ``jax.jit`` a base weight whose
    gradient nobody asks for costs nothing.

    Parameters
    ----------
    x
        (..., in); float32, bfloat16, float16 or float64.
    weight
        :math:`W`, (out, in).
    bias
        :math:`b`, (out,) or None.
    u
        :math:`U`, (out, rank), or (samples, out, rank).
    v
        :math:`V`, (in, rank), or (samples, in, rank).
    gate
        :math:`g`: a scalar (), one value per rank (rank,) or (1, rank), one per sample (samples,)
        or (samples, 1), or (samples, rank). None is 1.
    scale
        :math:`s`, a Python number.
    implementation
        ``"xla"``, ``"pallas"``, or None to let dispatch choose.

    Returns
    -------
    Array
        (..., out), in the dtype of ``x``.

    Raises
    ------
    TypeError
        If an argument is not a floating-point array, or their dtypes differ.
    ValueError
        If shapes do not fit together, or a gate (n,) could mean ranks as well as samples.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """
    arrays = jax_arrays({"x": x, "weight": weight, "bias": bias, "u": u, "v": v, "gate": gate})
    x, weight, bias, u, v, gate = arrays
    shapes = (None if array is None else array.shape for array in arrays)
    gate_shape = spec.check_shapes(*shapes)  # type: ignore[arg-type]
    if gate is not None and gate_shape is not None:
        gate = gate.reshape(gate_shape)
    decision = _decide(x, weight, u, v, "forward", implementation)
    with usage.timed(decision):
        return _plain(x, weight, bias, u, v, gate, scale=float(scale))


def _decide(
    x: Array, weight: Array, u: Array, v: Array, direction: str, implementation: str | None
) -> dispatch.Decision:
    width_out, width_in = weight.shape
    samples = x.shape[0] if x.ndim > 1 else 1
    sizes = (samples, math.prod(x.shape[1:-1]), width_in, width_out, u.shape[-1])
    problem = Problem(
        spec.NAME,
        tuple(zip(spec.DIMENSIONS, sizes, strict=True)),
        x.dtype.name,
        (("per_sample", u.ndim == 3 or v.ndim == 3),),
        direction,
    )
    return dispatch.decide(problem, jax_device(), BINDING, implementation)


@partial(jax.jit, static_argnames="scale")
def _plain(
    x: Array,
    weight: Array,
    bias: Array | None,
    u: Array,
    v: Array,
    gate: Array | None,
    *,
    scale: float,
) -> Array:
    """The op in ordinary JAX operations, differentiable any number of times. ``gate`` is (samples
    or 1, rank or 1)."""
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    samples = x.shape[0] if x.ndim > 1 else 1
    t = x.reshape(samples, math.prod(x.shape[1:-1]), x.shape[-1]) @ v
    if gate is not None:
        t = t * gate[:, None]
    return y + (scale * (t @ u.mT)).reshape(y.shape)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Array]:
    scale = flags.get("scale", 1.0)
    return {"y": lora_linear(**inputs, scale=scale, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla",),
    call=_call,
    differentiable=("x", "u", "v", "gate"),
    kernel_module="pallas_kernel",
)
