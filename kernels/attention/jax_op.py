"""Attention for JAX: the public function, the plain path, the derivatives.

Where a kernel may run, a call that is differentiated follows the choice for the backward pass, and
one that is not the choice for the forward pass: the two passes of training come as a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..core import dispatch, usage
from ..core.device import jax_device
from ..core.dropout import check_probability
from ..core.jax_functions import dropout_scale, seed_words
from ..core.problem import Problem
from ..core.registry import Binding
from . import pallas_kernel, spec


class Call(NamedTuple):
    """What a call fixes beside its arrays: hashable, so it can be static."""

    problem: Problem
    causal: bool
    scale: float
    dropout: float
    implementation: str | None

    def decide(self, direction: str) -> dispatch.Decision:
        """Who runs ``direction`` on the device in use."""
        problem = replace(self.problem, direction=direction)
        return dispatch.decide(problem, jax_device(), BINDING, self.implementation)


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | Array | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Scaled dot-product attention.

    For query :math:`i` and key :math:`j` of one head, with :math:`s` the scale:

    .. math::

        S_{ij} = s\, q_i \cdot k_j + \text{mask}_{ij}, \qquad
        P_{ij} = \frac{e^{S_{ij}}}{\sum_j e^{S_{ij}}}, \qquad
        o_i = \sum_j P_{ij} v_j

    A row whose scores are all :math:`-\infty` has weights, output and gradients 0.

    Parameters
    ----------
    query
        Shape (batch, heads, queries, features); float32, bfloat16, float16 or float64.
    key, value
        Shape (batch, key heads, keys, features). Key heads divide heads: head h reads key head
        h // (heads / key heads).
    mask
        Broadcasts to (batch, heads, queries, keys). Boolean: True where a query sees a key.
        Floating: added to the scores.
    causal
        Hide the keys after a query: query i sees keys 0 to i, both counted from the start of their
        sequence, also where there are more keys than queries. Together with ``mask``, a key must
        pass both.
    scale
        Factor of the products, a Python number; 1 / sqrt(features) by default.
    dropout
        Probability that a weight is set to 0; the others are divided by 1 - dropout.
    seed
        Of the dropout, and needed with one: an integer, two uint32 words or a key of `jax.random`.
        The same seed drops the same weights in every implementation.
    implementation
        ``"xla"``, ``"pallas"``, or None to let dispatch choose.

    Returns
    -------
    Array
        Shape of ``query``, in its dtype.

    Raises
    ------
    TypeError
        If the arrays are not floating-point arrays of one dtype, or ``mask`` is neither boolean
        nor floating.
    ValueError
        For shapes that do not fit each other, a ``dropout`` outside [0, 1), or one without seed.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    The plain path is `jax.nn.dot_product_attention`, which stores the scores; the kernel does not.
    The kernel's second derivatives, and the gradient of a mask, go by way of the scores.

    Vaswani et al., "Attention Is All You Need", arXiv 1706.03762; computed by tiles as in Dao, Fu,
    Ermon, Rudra, Ré, "FlashAttention", arXiv 2205.14135.
    """
    return _attention(query, key, value, mask, causal, scale, dropout, seed, implementation, False)


def _attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    causal: bool,
    scale: float | None,
    dropout: float,
    seed: int | Array | None,
    implementation: str | None,
    channels_first: bool,
) -> Array:
    query, key, value = (jnp.asarray(array) for array in (query, key, value))
    if (
        not jnp.issubdtype(query.dtype, jnp.floating)
        or not query.dtype == key.dtype == value.dtype
    ):
        raise TypeError(
            "query, key and value must be floating-point arrays of one dtype, got "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    kind = None
    if mask is not None:
        mask = jnp.asarray(mask)
        kind = "boolean" if mask.dtype == bool else "additive"
        if kind == "additive" and not jnp.issubdtype(mask.dtype, jnp.floating):
            raise TypeError(f"mask must be boolean or floating-point, got {mask.dtype}")
    spec.check_arguments(query.shape, key.shape, value.shape, None if mask is None else mask.shape)
    check_probability(dropout)
    if dropout and seed is None:
        raise ValueError(f"dropout is {dropout} and seed None; dropout needs a seed")
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    words = jnp.stack(seed_words(seed)) if dropout else None
    batch, heads, queries, width = query.shape
    flags = (
        ("causal", bool(causal)),
        ("channels_first", channels_first),
        ("dropout", dropout > 0),
        ("mask", kind),
    )
    sizes = batch, heads, key.shape[1], queries, key.shape[2], width
    dims = tuple(zip(spec.DIMENSIONS, sizes, strict=True))
    problem = Problem(spec.NAME, dims, query.dtype.name, flags)
    factor = width**-0.5 if scale is None else float(scale)
    call = Call(problem, bool(causal), factor, float(dropout), implementation)
    decision = call.decide("forward")
    is_plain = {decision.implementation, call.decide("backward").implementation} == {"xla"}
    with usage.timed(decision):
        if is_plain or not query.size or not key.size:
            return _plain(query, key, value, mask, words, call)
        return _chosen(query, key, value, mask, words, call)


@partial(jax.jit, static_argnames="call")
def _plain(
    query: Array, key: Array, value: Array, mask: Array | None, seed: Array | None, call: Call
) -> Array:
    """JAX's own function; spelled out for what that lacks (dropout, float64, and float16 outside
    GPUs), and on CPUs, where XLA makes fewer copies of that."""
    if not query.size or not key.size:
        return jnp.zeros_like(query)
    platform = jax_device().platform
    lacking = query.dtype == jnp.float64 or (query.dtype == jnp.float16 and platform != "cuda")
    if seed is not None or lacking or platform == "cpu":
        return _spelled_out(query, key, value, mask, seed, call)
    return _by_jax(query, key, value, mask, call)


def _by_jax(query: Array, key: Array, value: Array, mask: Array | None, call: Call) -> Array:
    """JAX's own function."""
    visible = _visible(query, key, mask, call)
    bias = None
    if mask is not None and mask.dtype != bool:
        bias = jnp.where(mask == -jnp.inf, 0.0, mask)
    with _precision(query.dtype):
        output = jax.nn.dot_product_attention(
            query.swapaxes(1, 2),
            key.swapaxes(1, 2),
            value.swapaxes(1, 2),
            bias=bias,
            mask=visible,
            scale=call.scale,
        ).swapaxes(1, 2)
    if mask is not None and visible is not None:
        # JAX spreads the weight of a row without keys over all of them.
        output = jnp.where(visible.any(-1, keepdims=True), output, 0.0)
    return output


def _visible(query: Array, key: Array, mask: Array | None, call: Call) -> Array | None:
    """Which keys a query sees; None: all."""
    visible = None
    if mask is not None:
        visible = mask if mask.dtype == bool else mask != -jnp.inf
    if call.causal:
        earlier = jnp.tri(query.shape[2], key.shape[2], dtype=bool)[None, None]
        visible = earlier if visible is None else visible & earlier
    return visible


def _widened(array: Array, heads: int) -> Array:
    """In the dtype of the computation, with a key head for each head, as (batch * heads, ...)."""
    array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    array = jnp.repeat(array, heads // array.shape[1], 1)
    return array.reshape(-1, *array.shape[2:])


def _precision(dtype: Any) -> AbstractContextManager[None]:
    """IEEE float32 unless the user set a matmul precision: unset, XLA would allow TF32, which
    holds all of a half-precision number and not all of a float32 one."""
    set_by_user = jax.config.jax_default_matmul_precision is not None  # type: ignore[attr-defined]
    if set_by_user or dtype != jnp.float32:
        return nullcontext()
    return jax.default_matmul_precision("highest")


def _spelled_out(
    query: Array, key: Array, value: Array, mask: Array | None, seed: Array | None, call: Call
) -> Array:
    """The op with all scores in memory. One batch axis, and a scale that the scores do not wait
    for, keep XLA from copying them on a CPU."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    q, k, v = (_widened(array, heads) for array in (query, key, value))
    visible = _visible(query, key, mask, call)
    with _precision(query.dtype):
        scores = jnp.einsum("bqd,bkd->bqk", call.scale * q, k)
        if visible is not None:
            scores = scores.reshape(batch, heads, queries, keys)
        if mask is not None and mask.dtype != bool:
            scores = scores + mask
        weights = jax.nn.softmax(scores, where=visible).reshape(-1, queries, keys)
        if seed is not None:
            rows = batch * heads * queries
            kept = dropout_scale(call.dropout, (seed[0], seed[1]), rows, keys)
            weights = weights * kept.reshape(weights.shape).astype(weights.dtype)
        return jnp.einsum("bqk,bkd->bqd", weights, v).reshape(query.shape).astype(query.dtype)


@partial(jax.jit, static_argnames="call")
def _plain_gradients(
    query: Array,
    key: Array,
    value: Array,
    of_output: Array,
    mask: Array | None,
    seed: Array | None,
    call: Call,
) -> tuple[Array, Array, Array]:
    def forward(*arrays: Array) -> Array:
        return _plain(*arrays, mask, seed, call)

    found: tuple[Array, Array, Array] = jax.vjp(forward, query, key, value)[1](of_output)
    return found


Residuals = tuple[Any, ...]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _chosen(
    query: Array, key: Array, value: Array, mask: Array | None, seed: Array | None, call: Call
) -> Array:
    """By whom dispatch chooses for the forward pass."""
    decision = call.decide("forward")
    if decision.implementation == "xla":
        return _plain(query, key, value, mask, seed, call)
    return _fused(query, key, value, mask, seed, call, decision.config)[0]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _fused(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    seed: Array | None,
    call: Call,
    config: Any,
) -> tuple[Array, Array]:
    """The output and the log-sum-exp of each row, by the kernel. It has a derivative because a
    derivative of `_chosen` runs it, and that may be differentiated again."""
    return pallas_kernel.forward(
        query,
        key,
        value,
        mask,
        seed,
        causal=call.causal,
        scale=call.scale,
        dropout=call.dropout,
        config=config,
        device=jax_device(),
    )


def _fused_forward(*arguments: Any) -> tuple[tuple[Array, Array], Residuals]:
    results = _fused(*arguments)
    return results, (*arguments[:5], *results)


def _fused_backward(
    call: Call, config: Any, residuals: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array | None, ...]:
    return _chosen_backward(call, residuals, cotangents[0])


_fused.defvjp(_fused_forward, _fused_backward)


def _chosen_forward(
    query: Array, key: Array, value: Array, mask: Array | None, seed: Array | None, call: Call
) -> tuple[Array, Residuals]:
    arrays = query, key, value, mask, seed
    if call.decide("backward").implementation == "xla":
        return _plain(*arrays, call), (*arrays, None, None)
    # The kernel runs backward, so it runs forward: only it leaves what it needs.
    config = call._replace(implementation="pallas").decide("forward").config
    output, lse = _fused(*arrays, call, config)
    return output, (*arrays, output, lse)


def _chosen_backward(
    call: Call, residuals: Residuals, of_output: Array
) -> tuple[Array | None, ...]:
    query, key, value, mask, seed, output, lse = residuals
    of_mask = None
    if mask is not None and mask.dtype != bool:
        # Under jit the compiler drops this where nobody asks for it.
        def by_mask(mask: Array) -> Array:
            return _plain(query, key, value, mask, seed, call)

        (of_mask,) = jax.vjp(by_mask, mask)[1](of_output)
    if lse is None:
        gradients = _plain_gradients(query, key, value, of_output, mask, seed, call)
    else:
        gradients = _gradients(query, key, value, of_output, mask, seed, output, lse, call)
    return *gradients, of_mask, None


_chosen.defvjp(_chosen_forward, _chosen_backward)


@partial(jax.custom_vjp, nondiff_argnums=(8,))
def _gradients(
    query: Array,
    key: Array,
    value: Array,
    of_output: Array,
    mask: Array | None,
    seed: Array | None,
    output: Array,
    lse: Array,
    call: Call,
) -> tuple[Array, Array, Array]:
    """The gradients by the kernel; their own derivatives go through the plain path."""
    decision = call._replace(implementation="pallas").decide("backward")
    with usage.timed(decision):
        return pallas_kernel.backward(
            query,
            key,
            value,
            of_output,
            mask,
            seed,
            output,
            lse,
            causal=call.causal,
            scale=call.scale,
            dropout=call.dropout,
            config=decision.config,
            device=jax_device(),
        )


def _gradients_forward(*arguments: Any) -> tuple[tuple[Array, Array, Array], Residuals]:
    return _gradients(*arguments), arguments[:6]


def _gradients_backward(
    call: Call, residuals: Residuals, cotangents: tuple[Array, Array, Array]
) -> tuple[Array | None, ...]:
    *arrays, mask, seed = residuals

    def plain(*arrays: Array) -> tuple[Array, Array, Array]:
        return _plain_gradients(*arrays, mask, seed, call)

    found = jax.vjp(plain, *arrays)[1](cotangents)
    return *found, None, None, None, None


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Array]:
    channels_first = bool(flags.get("channels_first"))
    arrays = [jnp.asarray(inputs[name]) for name in BINDING.differentiable]
    if channels_first:
        arrays = [array.swapaxes(2, 3) for array in arrays]
    query, key, value = arrays
    output = _attention(
        query,
        key,
        value,
        inputs.get("mask"),
        bool(flags.get("causal")),
        flags.get("scale"),
        flags.get("dropout", 0.0),
        flags.get("seed"),
        implementation,
        channels_first,
    )
    return {"output": output}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla", "pallas"),
    call=_call,
    differentiable=("query", "key", "value"),
    kernel_module="pallas_kernel",
)
