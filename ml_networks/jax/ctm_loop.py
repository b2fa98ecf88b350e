"""All ticks of the Continuous Thought Machine as one function with a gradient of its own.

As :mod:`ml_networks.torch.ctm_loop`: of each tick only what it cannot cheaply compute again is
kept, the outputs of the linear layers, the states, the activations, what attention read and the
sums of the synchronisation. The backward pass computes layer norms, gates, attention weights and
neuron-level models anew, and walks the ticks only for what one tick passes to the one before.
Every weight's gradient is then one product over the rows of all ticks.

On one accelerator a tick's steps are ops: synchronisation, queries and attention; linear layers
with the norms, SiLU and skip connection before them, and backward after them.

Dropout, layers of other kinds and layer norms in the neuron-level models need the ordinary loop
over the modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ml_networks.jax.layers import Identity
from ml_networks.jax.lora import HyperLoRALinear
from ml_networks.jax.neurons import NeuronLevelModel, SuperLinear
from ml_networks.jax.primitives import LayerNorm, Linear, on_one_accelerator
from ml_networks.jax.synapses import GatedSynapses, SynapseUNET, _Projection
from ml_networks.kernels.jax import (
    hyper_lora_linear,
    linear_norm_silu_gradient,
    neuron_level_model,
    neuron_level_model_at_tick,
    neuron_level_model_trace_gradient,
    neuron_level_model_weight_gradient,
    norm_activation,
    norm_silu_linear,
    norm_silu_skip_norm,
    synchronised_attention,
)

__all__ = ["Layer", "Loop", "layers_of", "neuron_weights_of", "think"]

Array = jax.Array

CPU_ROWS, ROWS = 64, 1024
"""Rows, of ticks and samples, whose neurons and positions the backward pass looks at at once: what
a CPU's cache holds, and what takes little of a GPU's memory."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("linear", "norms"),
    meta_fields=("eps", "skip", "gated"),
)
@dataclass(frozen=True)
class Layer:
    """A linear layer of the synapses and what follows it.

    That is ``SiLU(norm(y))``; with ``skip`` ``skip_norm(SiLU(norm(y)) + outputs[skip])``; with
    ``gated`` ``norm(GLU(y))``.

    Attributes
    ----------
    linear
        Kernel (in, out) and bias, and those of the generators of a
        :class:`~ml_networks.jax.HyperLoRALinear`.
    norms
        Weight and bias of the layer norm, and of the one after the skip connection.
    eps
        Of both.
    """

    linear: tuple[Array, ...]
    norms: tuple[Array, ...]
    eps: float
    skip: int | None = None
    gated: bool = False


class Loop(NamedTuple):
    """Everything that the ticks use.

    Attributes
    ----------
    pairs
        Neurons of the synchronised pairs, the left ones and then the right ones, (2 n,).
    start, trace
        First activations (D,) and trace (D, M).
    r, scale
        What a sum keeps from a tick to the next, (n,), and its factor at each tick, (T, n).
    keys, values, in_weight, in_bias
        As in attention over a fixed input: (B, 1 or heads, S, K) and (B, 1 or heads, S, V), or
        None where the keys are the values, and the map from synchronisation to queries.
    neurons
        The arguments of :func:`~ml_networks.kernels.jax.neuron_level_model` after the first.
    layers
        The synapses. The first takes what attention read, and the activations.

    All but the norms' weights are of one dtype. The loop's gradient has no ``pairs``.
    """

    pairs: Array | None
    start: Array
    trace: Array
    r: Array
    scale: Array
    keys: Array
    values: Array | None
    in_weight: Array
    in_bias: Array
    neurons: tuple[Array, ...]
    layers: tuple[Layer, ...]


class Thought(NamedTuple):
    """What the ticks found.

    Attributes
    ----------
    activations
        (1 + T, B, D), the start's first.
    history
        (D, M - 1 + T, B): the start's trace but for its oldest value, and every state.
    sums
        Of the synchronised pairs, (T, B, n), before they are scaled.
    reads, products
        What attention read, and the output of every linear layer, (T, B, width) each.
    """

    activations: Array
    history: Array
    sums: Array
    reads: Array
    products: tuple[Array, ...]


Found = tuple[Array, Array, Array]


def think(loop: Loop) -> Found:
    """Run all ticks.

    Returns
    -------
    activations
        (1 + T, B, D), the start's first.
    states
        Pre-activations (T, B, D), without a gradient.
    synchronisations
        Of the action neurons, (T, B, n), without a gradient.
    """
    activations, history, sums = _ticks(loop)
    states = history[:, -len(loop.scale) :].transpose(1, 2, 0)
    stop = jax.lax.stop_gradient
    return activations, stop(states), stop(sums * loop.scale[:, None])


@jax.custom_vjp
def _ticks(loop: Loop) -> Found:
    return _run(loop, keep=False)[:3]


def _ticks_forward(loop: Loop) -> tuple[Found, tuple[Loop, Thought]]:
    thought = _kept(loop)
    return thought[:3], (loop, thought)


def _ticks_backward(saved: tuple[Loop, Thought], of_found: Found) -> tuple[Loop]:
    return (_gradient(*saved, of_found[0]),)


_ticks.defvjp(_ticks_forward, _ticks_backward)


@jax.custom_vjp
def _kept(loop: Loop) -> Thought:
    """All ticks, and what the backward pass needs. Only the activations have a gradient, which a
    second derivative asks for."""
    return _run(loop, keep=True)


def _kept_forward(loop: Loop) -> tuple[Thought, tuple[Loop, Thought]]:
    thought = _kept(loop)
    return thought, (loop, thought)


def _kept_backward(saved: tuple[Loop, Thought], of_thought: Thought) -> tuple[Loop]:
    return (_gradient(*saved, of_thought.activations),)


_kept.defvjp(_kept_forward, _kept_backward)


@jax.custom_vjp
def _gradient(loop: Loop, thought: Thought, of_activations: Array) -> Loop:
    """The gradients; their own derivative goes through ordinary operations, as functions of the
    loop alone."""
    return _gradients(loop, thought, of_activations)


def _gradient_forward(
    loop: Loop, thought: Thought, of_activations: Array
) -> tuple[Loop, tuple[Loop, Thought, Array]]:
    return _gradient(loop, thought, of_activations), (loop, thought, of_activations)


def _gradient_backward(
    saved: tuple[Loop, Thought, Array], cotangents: Loop
) -> tuple[Loop, Thought, Array]:
    loop, thought, of_activations = saved

    def gradients(loop: Loop, of_activations: Array) -> Loop:
        return jax.vjp(_differentiable, loop)[1](of_activations)[0]._replace(pairs=None)

    of_loop, of_of_activations = jax.vjp(gradients, loop, of_activations)[1](cotangents)
    return of_loop, jax.tree.map(jnp.zeros_like, thought), of_of_activations


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _run(loop: Loop, keep: bool) -> Thought:
    """All ticks; without ``keep`` no ``reads`` and ``products``."""
    batch, ticks, memory = len(loop.keys), len(loop.scale), loop.trace.shape[1]
    start = jnp.broadcast_to(loop.start, (batch, *loop.start.shape))
    past = jnp.broadcast_to(loop.trace[:, 1:, None], (len(loop.start), memory - 1, batch))
    history = jnp.concatenate([past, jnp.zeros((len(loop.start), ticks, batch), past.dtype)], 1)

    def step(carry: Any, xs: tuple[Array, Array]) -> tuple[Any, Any]:
        z, total, history = carry
        tick, scale = xs
        total, read, state, products = _tick(loop, scale, z, total)
        history = jax.lax.dynamic_update_slice_in_dim(
            history, state.T[:, None], tick + memory - 1, 1
        )
        z = neuron_level_model_at_tick(
            history, tick, *loop.neurons, implementation=_implementation()
        )
        return (z, total, history), (z, total, *((read, products) if keep else ()))

    carry = start, jnp.zeros((batch, len(loop.r)), loop.r.dtype), history
    (_, _, history), found = jax.lax.scan(step, carry, (jnp.arange(ticks), loop.scale))
    activations, sums, *kept = found
    activations = jnp.concatenate([start[None], activations])
    return Thought(activations, history, sums, *(kept or (None, ())))


def _differentiable(loop: Loop) -> Array:
    """The activations, by operations that may be differentiated any number of times."""
    batch = len(loop.keys)
    start = jnp.broadcast_to(loop.start, (batch, *loop.start.shape))
    trace = jnp.broadcast_to(loop.trace, (batch, *loop.trace.shape))

    def step(carry: Any, scale: Array) -> tuple[Any, Array]:
        z, total, trace = carry
        total, _, state, _ = _tick(loop, scale, z, total)
        trace = jnp.concatenate([trace[:, :, 1:], state[:, :, None]], -1)
        z = neuron_level_model(trace, *loop.neurons, implementation=_implementation())
        return (z, total, trace), z

    carry = start, jnp.zeros((batch, len(loop.r)), loop.r.dtype), trace
    step = jax.checkpoint(step, prevent_cse=False)
    return jnp.concatenate([start[None], jax.lax.scan(step, carry, loop.scale)[1]])


def _tick(
    loop: Loop, scale: Array, z: Array, before: Array
) -> tuple[Array, Array, Array, tuple[Array, ...]]:
    """The sums of the synchronisation, what attention read, the state, and the outputs of the
    linear layers."""
    if on_one_accelerator():
        left, right = jnp.split(jnp.asarray(loop.pairs), 2)
        ask, look = (loop.in_weight, loop.in_bias), (loop.keys, _values(loop))
        read, total = synchronised_attention(z, left, right, loop.r, scale, *ask, *look, before)
    else:
        left, right = jnp.split(z[:, loop.pairs], 2, 1)
        total = loop.r * before + left * right
        read = _read(_queries(loop, total * scale), loop.keys, _values(loop))
        read = read.reshape(len(z), -1)
    outputs: list[Array] = []
    products = [_linear(loop.layers[0], jnp.concatenate([read, z], 1))]
    for number, layer in enumerate(loop.layers):
        y, skipped = products[number], _skipped(layer, outputs)
        following = loop.layers[number + 1] if number + 1 < len(loop.layers) else None
        if following is not None and _is_fused(layer, following):
            kernel, bias = following.linear
            norms = _norms_of(layer, skipped)
            product, output = norm_silu_linear(y, weight=kernel.T, bias=bias, **norms)
            products.append(product)
            outputs.append(output.astype(y.dtype))
            continue
        outputs.append(_finish(layer, y, *skipped, *layer.norms))
        if following is not None:
            products.append(_linear(following, outputs[-1]))
    return total, read, outputs[-1], tuple(products)


def _gradients(loop: Loop, thought: Thought, of_activations: Array) -> Loop:
    """The gradients of the loop's arrays."""
    activations, history, sums, reads, products = thought
    ticks, memory, dtype = len(sums), loop.trace.shape[1], sums.dtype
    exact = jnp.promote_types(dtype, jnp.float32)
    outputs: list[Array] = []
    for layer, product in zip(loop.layers[:-1], products, strict=False):
        outputs.append(_finish(layer, product, *_skipped(layer, outputs), *layer.norms))
    synchronisations = sums * loop.scale[:, None]
    queries = _queries(loop, synchronisations)

    def step(carry: Any, xs: Any) -> tuple[Any, Any]:
        of_z, of_sum, of_history = carry
        tick, of_activation, scale, z, query, products, outputs = xs
        of_activation = of_z + of_activation
        of_history = neuron_level_model_trace_gradient(
            of_activation.astype(dtype),
            history,
            tick,
            *loop.neurons,
            into=of_history,
            implementation=_implementation(),
        )
        of_products: list[Any] = [None] * len(products)
        of_outputs: list[Any] = [0.0] * len(outputs)
        of_outputs.append(
            jax.lax.dynamic_index_in_dim(of_history, tick + memory - 1, 1, keepdims=False).T
        )
        for number, layer in reversed(list(enumerate(loop.layers))):
            y, skipped = products[number], _skipped(layer, outputs)
            if _is_fused(layer, layer):
                norms = _norms_of(layer, skipped)
                found: Any = linear_norm_silu_gradient(
                    of_outputs[number], y, weight=layer.linear[0].T, **norms
                )
                of_x, *of_skipped = found
            else:
                of_y, *of_skipped = _finish_gradient(layer, of_outputs[number], y, skipped)
                of_products[number] = of_y
                of_x = _input_gradient(layer, of_y, outputs[number - 1] if number else None)
            if layer.skip is not None:
                of_outputs[layer.skip] = of_skipped[0].astype(exact)
            if number:
                of_outputs[number - 1] += of_x.astype(exact)
        width = reads.shape[-1]
        of_read = of_x[:, :width].reshape(*query.shape[:3], -1)
        _, of_scores = _attention_gradient(query, loop.keys, _values(loop), of_read)
        of_query = (of_scores @ loop.keys).reshape(len(z), -1)
        of_synchronisation = (of_query @ loop.in_weight).astype(exact)
        of_sum = loop.r * of_sum + of_synchronisation * scale
        left, right = jnp.split(z[:, loop.pairs], 2, 1)
        of_pairs = jnp.concatenate([of_sum * right, of_sum * left], 1)
        of_z = of_x[:, width:].astype(exact).at[:, loop.pairs].add(of_pairs)
        found = (
            of_activation,
            of_sum,
            of_synchronisation,
            of_query,
            of_read,
            tuple(of_outputs),
            tuple(of_products),
        )
        return (of_z, of_sum, of_history), found

    of_history = jnp.zeros(history.shape, exact)
    carry = jnp.zeros(activations.shape[1:], exact), jnp.zeros(sums.shape[1:], exact), of_history
    of_start, of_later = of_activations[0].astype(exact), of_activations[1:].astype(exact)
    xs = jnp.arange(ticks), of_later, loop.scale, activations[:-1], queries, products, outputs
    (of_z, _, of_history), found = jax.lax.scan(step, carry, xs, reverse=True)
    of_later, of_sums, of_synchronisations, of_queries, of_reads, of_outputs, of_products = found

    layers = []
    for number, layer in enumerate(loop.layers):
        y, skipped = products[number], _skipped(layer, outputs)
        of_y, *of_norms = _finish_gradient(layer, of_outputs[number], y, skipped, of_norms=True)
        if of_products[number] is not None:
            of_y = of_products[number]
        x = outputs[number - 1] if number else jnp.concatenate([reads, activations[:-1]], 2)
        of_linear = _linear_gradients(layer, of_y, x)
        layers.append(replace(layer, linear=of_linear, norms=tuple(of_norms)))
    of_neurons, of_keys, of_values = _shared_gradients(
        loop, history, of_later.astype(dtype), queries, of_reads
    )
    found = Loop(
        None,
        (of_start + of_z).sum(0),
        jnp.pad(of_history[:, : memory - 1].sum(2), ((0, 0), (1, 0))),
        (of_sums[1:] * sums[:-1]).sum((0, 1)),
        (of_synchronisations * sums).sum(1),
        of_keys,
        of_values,
        jnp.einsum("tbq,tbn->qn", of_queries, synchronisations),
        of_queries.sum((0, 1)),
        of_neurons,
        tuple(layers),
    )
    return jax.tree.map(
        lambda value, like: value.astype(like.dtype), found, loop._replace(pairs=None)
    )


def _shared_gradients(
    loop: Loop, history: Array, of_z: Array, queries: Array, of_reads: Array
) -> tuple[tuple[Array, ...], Array, Array | None]:
    """The gradients of the neurons' weights, the keys and the values, some ticks at a time: the
    neurons' hidden layers, or the attention weights, of all of them would fill the memory."""
    ticks, batch = of_z.shape[:2]
    rows = CPU_ROWS if jax.default_backend() == "cpu" else ROWS
    parts = -(-ticks * batch // max(rows, batch)) if batch else 1
    step = -(-ticks // parts)
    parts = -(-ticks // step)

    def divided(values: Array) -> Array:
        padding = [(0, parts * step - ticks)] + [(0, 0)] * (values.ndim - 1)
        return jnp.pad(values, padding).reshape(parts, step, *values.shape[1:])

    memory = loop.trace.shape[1]
    history = jnp.pad(history, ((0, 0), (0, parts * step - ticks), (0, 0)))

    def add(sums: Any, xs: Any) -> tuple[Any, None]:
        part, of_z, queries, of_reads = xs
        some = jax.lax.dynamic_slice_in_dim(history, part * step, step + memory - 1, 1)
        found = neuron_level_model_weight_gradient(
            of_z, some, *loop.neurons, implementation=_implementation()
        )
        query, of_read = (
            values.transpose(1, 2, 0, 3, 4).reshape(*values.shape[1:3], -1, values.shape[-1])
            for values in (queries, of_reads)
        )
        weights, of_scores = _attention_gradient(query, loop.keys, _values(loop), of_read)
        of_keys, of_values = of_scores.mT @ query, weights.mT @ of_read
        if loop.values is None:
            of_keys, of_values = of_keys.astype(sums[1].dtype) + of_values, None
        return jax.tree.map(jnp.add, sums, (found, of_keys, of_values)), None

    zeros = jax.tree.map(
        lambda value: jnp.zeros(value.shape, jnp.promote_types(value.dtype, jnp.float32)),
        (loop.neurons, loop.keys, loop.values),
    )
    xs = jnp.arange(parts), *map(divided, (of_z, queries, of_reads))
    sums: Any = jax.lax.scan(add, zeros, xs)[0]
    return sums


def _implementation() -> str | None:
    """XLA cannot divide a kernel among several devices."""
    return None if jax.device_count() == 1 else "xla"


def _by_ticks(x: Array) -> bool:
    """Whether an op takes the ticks one by one: all their rows at once are one axis, in which
    samples could not stay divided among several devices."""
    return x.ndim > 2 and jax.device_count() > 1


def _values(loop: Loop) -> Array:
    return loop.keys if loop.values is None else loop.values


def _queries(loop: Loop, synchronisations: Array) -> Array:
    """(..., B, n) to (..., B, 1 or heads, heads or 1, K)."""
    found = synchronisations @ loop.in_weight.T + loop.in_bias
    return found.reshape(*found.shape[:-1], loop.keys.shape[1], -1, loop.keys.shape[-1])


def _softmax(query: Array, keys: Array) -> Array:
    scores = query @ keys.mT
    return jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)))


def _read(query: Array, keys: Array, values: Array) -> Array:
    return _softmax(query, keys).astype(query.dtype) @ values


def _attention_gradient(
    query: Array, keys: Array, values: Array, of_read: Array
) -> tuple[Array, Array]:
    """The attention weights, and the gradient of the scores before the softmax."""
    weights = _softmax(query, keys)
    of_weights = (of_read @ values.mT).astype(weights.dtype)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True))
    return weights.astype(query.dtype), of_scores.astype(query.dtype)


def _linear(layer: Layer, x: Array) -> Array:
    kernel, bias, *generators = layer.linear
    return _hyper_linear(x, *layer.linear) if generators else x @ kernel + bias


def _hyper_linear(
    x: Array, kernel: Array, bias: Array, context: Array, context_bias: Array, *rest: Array
) -> Array:
    if _by_ticks(x):
        weights = kernel, bias, context, context_bias, *rest
        return jax.vmap(lambda x: _hyper_linear(x, *weights))(x)
    c = jax.nn.silu(x @ context + context_bias)
    return hyper_lora_linear(x, kernel.T, bias, c, *rest, implementation=_implementation())


def _input_gradient(layer: Layer, of_y: Array, x: Array | None = None) -> Array:
    """The gradient of the layer's input; ``x`` is for generators."""
    kernel, _, *generators = layer.linear
    if not generators:
        return of_y @ kernel.T
    return jax.vjp(lambda x: _hyper_linear(x, *layer.linear), x)[1](of_y)[0]


def _linear_gradients(layer: Layer, of_y: Array, x: Array) -> tuple[Array, ...]:
    """The gradients of the weights, from all ticks."""
    if len(layer.linear) == 2:
        return jnp.einsum("tbi,tbo->io", x, of_y), of_y.sum((0, 1))
    return jax.vjp(partial(_hyper_linear, x), *layer.linear)[1](of_y)


def _skipped(layer: Layer, outputs: Sequence[Array]) -> list[Array]:
    return [] if layer.skip is None else [outputs[layer.skip]]


def _is_fused(layer: Layer, linear: Layer) -> bool:
    """Whether one op takes what follows the first and the linear layer of the second."""
    return on_one_accelerator() and not layer.gated and len(linear.linear) == 2


def _norms_of(layer: Layer, skipped: Sequence[Array]) -> dict[str, Any]:
    """What follows the linear layer, as arguments of :func:`norm_silu_linear`."""
    names = ("norm_weight", "norm_bias", "skip_weight", "skip_bias")
    norms: dict[str, Any] = dict(zip(names, layer.norms, strict=False))
    return {**norms, **dict(zip(("skip",), skipped, strict=False)), "eps": layer.eps}


def _finish(layer: Layer, y: Array, *rest: Array) -> Array:
    """What follows the linear layer; ``rest`` is what is skipped, if anything, and the norms'
    weights."""
    skipped = rest[: -len(layer.norms)]
    if _by_ticks(y):
        axes = 0, *(0 for _ in skipped), *(None for _ in layer.norms)
        return jax.vmap(partial(_finish, layer), axes)(y, *rest)
    weight, bias, *after = rest[-len(layer.norms) :]
    options: dict[str, Any] = {"eps": layer.eps, "implementation": _implementation()}
    if layer.gated:
        return norm_activation(jax.nn.glu(y), weight, bias, **options)
    if skipped:
        return norm_silu_skip_norm(y, weight, bias, *skipped, *after, **options)
    return norm_activation(y, weight, bias, activation="SiLU", **options)


def _finish_gradient(
    layer: Layer, of_x: Array, y: Array, skipped: list[Array], of_norms: bool = False
) -> Sequence[Array]:
    """The gradients of the linear layer's output and of what is skipped, if anything, or of the
    norms' weights."""
    found = jax.vjp(partial(_finish, layer), y, *skipped, *layer.norms)[1](of_x.astype(y.dtype))
    first = 1 + len(skipped)
    return (found[0], *found[first:]) if of_norms else found[:first]


def _silent(dropout: Any) -> bool:
    if type(dropout) is nnx.Dropout:
        return bool(dropout.deterministic)
    return type(dropout) is Identity


def _is_affine(norm: Any) -> bool:
    return type(norm) is LayerNorm and None not in (norm.scale, norm.bias)


def _is_linear(linear: Any) -> bool:
    if type(linear) not in (Linear, HyperLoRALinear) or linear.bias is None:
        return False
    return not getattr(linear, "merged", False)


def _linear_weights(linear: Any) -> tuple[Array, ...]:
    weights: list[Any] = [linear.kernel, linear.bias]
    if not isinstance(linear, HyperLoRALinear):
        return tuple(weight[...] for weight in weights)
    weights += [linear.context.kernel, linear.context.bias]
    generators: list[Any] = [linear.to_gate, linear.to_u, linear.to_v]
    rest = [array for made in generators for array in (made.kernel[...].T, made.bias[...])]
    return (*(weight[...] for weight in weights), *rest)


def layers_of(synapses: Any) -> tuple[Layer, ...] | None:
    """The layers of the synapses; None if they drop out or have layers of other kinds."""
    projections: list[Any]
    skip_norms: list[Any] = []
    if isinstance(synapses, SynapseUNET):
        skip_norms = [*synapses.skip_lns]
        projections = [*synapses.down_projections, *reversed(synapses.up_projections)]
        linears = [synapses.first_linear, *(projection.linear for projection in projections)]
        norms = [synapses.first_norm, *(projection.norm for projection in projections)]
        kind: type = _Projection
    else:
        projections, linears, norms = [synapses], [synapses.linear], [synapses.norm]
        kind = GatedSynapses
    if not (
        all(type(part) is kind for part in projections)
        and all(_silent(part.dropout) for part in projections)
        and all(map(_is_linear, linears))
        and all(map(_is_affine, (*norms, *skip_norms)))
        and len({norm.eps for norm in (*norms, *skip_norms)}) == 1
    ):
        return None
    layers, depth = [], len(skip_norms)
    for number, (linear, norm) in enumerate(zip(linears, norms, strict=True)):
        skip = 2 * depth - number if number > depth else None
        both = (norm,) if skip is None else (norm, skip_norms[skip])
        scales = tuple(array[...] for norm in both for array in (norm.scale, norm.bias))
        gated = kind is GatedSynapses
        layers.append(Layer(_linear_weights(linear), scales, norm.eps, skip, gated))
    return tuple(layers)


def neuron_weights_of(
    neurons: NeuronLevelModel, weights: Sequence[tuple[Array, Array]]
) -> tuple[Array, ...] | None:
    """The ``weights`` of neuron-level models, as their ``per_neuron`` gave them; None if they drop
    out or norm."""
    known = all(
        type(layer) is SuperLinear and not layer.norms_or_drops() for layer in neurons.layers
    )
    return tuple(array for pair in weights for array in pair) if known else None
