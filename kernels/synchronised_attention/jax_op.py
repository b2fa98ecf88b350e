"""Synchronised attention for JAX: the public function, the plain path, the derivative."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..core import dispatch, usage
from ..core.arguments import jax_arrays
from ..core.device import jax_device
from ..core.problem import Problem
from ..core.registry import Binding
from . import pallas_kernel, spec


def synchronised_attention(
    z: Array,
    left: Array,
    right: Array,
    r: Array,
    scale: Array,
    in_weight: Array,
    in_bias: Array,
    keys: Array,
    values: Array,
    sums: Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    r"""Attend to an input by the synchronisation of pairs of neurons, one tick of a machine.

    For the pair of the neurons i and j, with the sums :math:`a` of the tick before:

    .. math::

        a' = z_i z_j + r a, \quad q = W (s \odot a') + b, \quad
        read = softmax(q \, keys^\top) \, values

    Parameters
    ----------
    z
        Activations, (B, D); float32, bfloat16, float16 or float64.
    left, right
        The neurons i and j of each pair, integers in [0, D), (n,). They are not checked.
    r, scale
        What a sum keeps from a tick to the next, and its factor s, (n,); of the dtype of ``z`` or
        a wider one.
    in_weight, in_bias
        :math:`W`, (G R K, n), and :math:`b`, (G R K,), for G sets of keys and R queries to each.
        No further :math:`1/\sqrt{K}` is applied.
    keys, values
        (B, G, S, K) and (B, G, S, V), S at least 1. One array given for both is read once, under
        a transform too; what comes into the transformed function as two arguments is two.
    sums
        :math:`a`, (B, n), in the dtype of ``r``; None: the first tick.
    implementation
        ``"xla"``, ``"pallas"``, or None to let dispatch choose.

    Returns
    -------
    tuple of Array
        ``read``, (B, G R V), in the dtype of ``z``, and :math:`a'`, (B, n), in the dtype of ``r``.

    Raises
    ------
    TypeError
        If an argument is of a wrong dtype.
    ValueError
        If shapes do not fit together, or there are no positions.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    Sums, softmax and all accumulation are in float32 (float64 for float64).

    Darlow et al., "Continuous Thought Machines", arXiv 2505.05522.
    """
    shared = values is keys
    named = {"z": z, "in_weight": in_weight, "in_bias": in_bias, "keys": keys, "values": values}
    z, in_weight, in_bias, keys, values = jax_arrays(named)
    exact = dict(zip(("r", "scale", "sums"), jax_arrays({"r": r, "scale": scale, "sums": sums}),
                     strict=True))  # fmt: skip
    wide = exact["r"].dtype
    if jnp.promote_types(wide, z.dtype) != wide:
        raise TypeError(f"r is {wide} and z {z.dtype}; r must be of the same dtype or a wider one")
    pairs = {"left": jnp.asarray(left), "right": jnp.asarray(right)}
    for name, index in pairs.items():
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise TypeError(f"{name} must be an array of integers, got {index.dtype}")
    arrays = {"z": z, "in_weight": in_weight, "in_bias": in_bias, "keys": keys, "values": values}
    given = {**arrays, **pairs, **exact}
    spec.check_arguments({k: None if v is None else tuple(v.shape) for k, v in given.items()})
    sizes = _sizes(z, in_weight, keys, values)
    decision = _decide(sizes, keys.dtype.name, shared, implementation)
    attend: Any = _plain_attend
    if decision.implementation == "pallas" and 0 not in sizes:
        attend = partial(_fused_attend, sizes=sizes, implementation=implementation)
    with usage.timed(decision):
        query, found = _plain_query(
            z, pairs["left"], pairs["right"], **exact, in_weight=in_weight, in_bias=in_bias
        )
        heads, width = keys.shape[1], keys.shape[3]
        query = query.reshape(len(z), heads, in_weight.shape[0] // (heads * width), width)
        read = attend(query, keys, None if shared else values)
        return read.reshape(len(z), in_weight.shape[0] // width * values.shape[3]), found


def _sizes(z: Array, in_weight: Array, keys: Array, values: Array) -> tuple[int, ...]:
    """In the order of ``spec.DIMENSIONS``."""
    _, heads, positions, width = keys.shape
    columns, pairs = in_weight.shape
    return (*z.shape, pairs, heads, columns // (heads * width), positions, width, values.shape[3])


def _decide(
    sizes: tuple[int, ...], dtype: str, shared: bool, implementation: str | None
) -> dispatch.Decision:
    flags = ("shared", shared), ("channels_first", False)
    dims = tuple(zip(spec.DIMENSIONS, sizes, strict=True))
    problem = Problem(spec.NAME, dims, dtype, flags, "forward")
    return dispatch.decide(problem, jax_device(), BINDING, implementation)


@jax.jit
def _plain_query(
    z: Array,
    left: Array,
    right: Array,
    r: Array,
    scale: Array,
    sums: Array | None,
    in_weight: Array,
    in_bias: Array,
) -> tuple[Array, Array]:
    """The queries (B, G R K), and the sums."""
    exact = jnp.promote_types(r.dtype, jnp.float32)
    found = z[:, left].astype(exact) * z[:, right].astype(exact)
    if sums is not None:
        found = found + r.astype(exact) * sums.astype(exact)
    synchronisation = (found * scale.astype(exact)).astype(in_weight.dtype)
    return synchronisation @ in_weight.T + in_bias, found.astype(r.dtype)


@jax.jit
def _plain_attend(query: Array, keys: Array, values: Array | None) -> Array:
    """Queries (B, G, R, K) to what they read (B, G, R, V); without values, of the keys."""
    values = keys if values is None else values
    exact = jnp.promote_types(keys.dtype, jnp.float32)
    scores = jnp.matmul(query, keys.mT, preferred_element_type=exact)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return weights @ values


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fused_attend(
    query: Array,
    keys: Array,
    values: Array | None,
    sizes: tuple[int, ...],
    implementation: str | None,
) -> Array:
    decision = _decide(sizes, keys.dtype.name, values is None, implementation)
    return pallas_kernel.attend(query, keys, values, config=decision.config, device=jax_device())


Three = tuple[Array, Array, Array | None]


def _fused_forward(
    query: Array,
    keys: Array,
    values: Array | None,
    sizes: tuple[int, ...],
    implementation: str | None,
) -> tuple[Array, Three]:
    return _fused_attend(query, keys, values, sizes, implementation), (query, keys, values)


def _fused_backward(
    sizes: tuple[int, ...], implementation: str | None, saved: Three, of_read: Array
) -> Three:
    found: Three = jax.vjp(_plain_attend, *saved)[1](of_read)
    return found


_fused_attend.defvjp(_fused_forward, _fused_backward)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Any]:
    given = dict(inputs)
    keys = given["keys"].mT if flags["channels_first"] else given["keys"]
    given |= {"keys": keys, "values": keys if flags["shared"] else given["values"]}
    read, sums = synchronised_attention(**given, implementation=implementation)
    return {"read": read, "new_sums": sums}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla", "pallas"),
    call=_call,
    differentiable=("z", "r", "scale", "in_weight", "in_bias", "keys", "values", "sums"),
    kernel_module="pallas_kernel",
)
