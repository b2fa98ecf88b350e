"""All ticks of the Continuous Thought Machine as one function of autograd.

Of each tick only what it cannot cheaply compute again is kept: the outputs of the linear layers,
the states, the activations, what attention read and the sums of the synchronisation. The backward
pass computes layer norms, gates, attention weights and neuron-level models anew, and walks the
ticks only for what one tick passes to the one before. Every weight's gradient is then one product
over the rows of all ticks.

On a GPU a tick is as few kernels as its steps can be, each of which writes where the next one
reads: synchronisation, query and attention; a linear layer; linear layers that begin with the
norms, SiLU and skip connection of the one before; the last norms; the neuron-level models. Its
queries and the log-sum-exp of their scores are kept too. On a CPU an op's checks would take as
long as its work, and torch's own operations follow each other.

Dropout, hooks, layers of other kinds, layer norms in the neuron-level models, ``torch.compile``
and the transforms of ``torch.func`` need the ordinary loop over the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ml_networks.kernels.core.arguments import plain_vjp
from ml_networks.kernels.core.torch_functions import neuron_table, transformed
from ml_networks.kernels.torch import (
    Attended,
    AttendedGradient,
    hyper_lora_linear,
    linear_norm_silu_gradient,
    neuron_level_model,
    neuron_level_model_trace_gradient,
    neuron_level_model_weight_gradient,
    norm_activation,
    norm_silu_linear_step,
    norm_silu_skip_norm,
    synchronised_attention_gradient,
    synchronised_attention_key_gradient,
    synchronised_attention_tick,
)
from ml_networks.torch.layers import has_hooks
from ml_networks.torch.lora import HyperLoRALinear
from ml_networks.torch.neurons import PreparedNeurons, SuperLinear
from ml_networks.torch.synapses import SynapseUNET

__all__ = ["Layer", "Loop", "is_ordinary", "layers_of", "neuron_weights_of", "think"]

_aten: Any = torch.ops.aten

CPU_ROWS, ROWS = 64, 1024
"""Rows, of ticks and samples, whose neurons and positions the backward pass looks at at once: what
a CPU's cache holds, and what takes little of a GPU's memory."""


class Layer(NamedTuple):
    """A linear layer of the synapses and what follows it.

    That is ``SiLU(norm(y))``; with ``skip`` ``skip_norm(SiLU(norm(y)) + outputs[skip])``; with
    ``gated`` ``norm(GLU(y))``.

    Attributes
    ----------
    linear
        Weight and bias, and those of the generators of a
        :class:`~ml_networks.torch.HyperLoRALinear`.
    norms
        Weight and bias of the layer norm, and of the one after the skip connection.
    eps
        Of both.
    """

    linear: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]
    eps: float
    skip: int | None = None
    gated: bool = False


_SINGLE = ("start", "trace", "r", "scale", "keys", "values", "in_weight", "in_bias")


@dataclass(frozen=True)
class Loop:
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
        As in attention over a fixed input: (B, 1 or heads, S, K) and (B, 1 or heads, S, V), and
        the map from synchronisation to queries.
    neurons
        The arguments of :func:`~ml_networks.kernels.torch.neuron_level_model` after the first.
    layers
        The synapses. The first takes the activations, what attention read, and any zeros.
    """

    pairs: Tensor
    start: Tensor
    trace: Tensor
    r: Tensor
    scale: Tensor
    keys: Tensor
    values: Tensor
    in_weight: Tensor
    in_bias: Tensor
    neurons: tuple[Tensor, ...]
    layers: tuple[Layer, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The type in which matrices are multiplied."""
        return self.keys.dtype

    @property
    def activations(self) -> slice:
        """Where they are in a row of the first layer's input."""
        return slice(len(self.start))

    @property
    def read(self) -> slice:
        """Where in such a row that is what attention read."""
        width = len(self.in_weight) // self.keys.shape[-1] * self.values.shape[-1]
        return slice(len(self.start), len(self.start) + width)

    def tensors(self) -> list[Tensor]:
        """All that may have a gradient, in a fixed order."""
        layers = [tensor for layer in self.layers for tensor in (*layer.linear, *layer.norms)]
        return [*(getattr(self, name) for name in _SINGLE), *self.neurons, *layers]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Loop:
        """The same with other tensors in the order of :meth:`tensors`."""
        rest = iter(tensors)
        single = dict(zip(_SINGLE, rest, strict=False))
        neurons = tuple(islice(rest, len(self.neurons)))
        layers = tuple(
            layer._replace(
                linear=tuple(islice(rest, len(layer.linear))),
                norms=tuple(islice(rest, len(layer.norms))),
            )
            for layer in self.layers
        )
        return Loop(self.pairs, **single, neurons=neurons, layers=layers)


def is_ordinary(loop: Loop) -> bool:
    """Whether nothing but autograd looks at the call: no compiler, ``torch.func`` transform or
    forward-mode derivative."""
    return not (
        torch.compiler.is_compiling()
        or transformed(*loop.tensors())
        or forward_ad._current_level >= 0
    )


class Thought(NamedTuple):
    """What the ticks found.

    Attributes
    ----------
    inputs
        Of the first layer, (1 + T, B, width): the activations, the start's first, what attention
        read with them, and zeros.
    history
        (M - 1 + T, B, D): the start's trace but for its oldest value, and every state.
    sums
        Of the synchronised pairs, (T, B, n), before they are scaled.
    queries, log_sum_exp
        Of attention, (T, B, width) and (T, B, rows of scores); empty on a CPU.
    products
        The output of every linear layer, (T, B, width). These three are of the last tick only, if
        the others were not to be kept.
    statistics
        Of each tick, if they were to be kept, what
        :func:`~ml_networks.kernels.torch.norm_silu_linear_step` told of each layer's norms; None
        where it did not run.
    """

    inputs: Tensor
    history: Tensor
    sums: Tensor
    queries: Tensor
    log_sum_exp: Tensor
    products: tuple[Tensor, ...]
    statistics: tuple[tuple[Tensor | None, ...], ...]


def think(loop: Loop) -> tuple[Tensor, Tensor, Tensor]:
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
    tensors = loop.tensors()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        activations, history, sums = _Ticks.apply(loop, *tensors)
    else:
        inputs, history, sums, *_ = _run(loop, keep=False)
        activations = inputs[..., loop.activations]
    return activations, history[-len(sums) :], sums * loop.scale[:, None]


class _Ticks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loop: Loop, *tensors: Tensor) -> Any:
        found = _run(loop, keep=True)
        ctx.loop, ctx.count = loop, len(tensors)
        ctx.mark_non_differentiable(found.history, found.sums)
        ctx.save_for_backward(*tensors, *found[:5], *found.products)
        ctx.statistics = found.statistics
        return found.inputs[..., loop.activations], found.history, found.sums

    @staticmethod
    def backward(ctx: Any, of_activations: Tensor, *_: Any) -> Any:
        tensors, kept = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        loop: Loop = ctx.loop
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            return None, *plain_vjp(
                lambda *tensors: (_differentiable(loop.with_tensors(tensors)),),
                tensors,
                (of_activations,),
            )
        inputs, history, sums, queries, log_sum_exp, *products = kept
        exact = sums, queries, log_sum_exp
        thought = Thought(inputs, history, *exact, tuple(products), ctx.statistics)
        return None, *_gradients(loop.with_tensors(tensors), thought, of_activations)


def _run(loop: Loop, keep: bool) -> Thought:
    """All ticks, without autograd."""
    batch, ticks, memory = len(loop.keys), len(loop.scale), loop.trace.shape[1]
    new, rows, native = loop.keys.new_empty, ticks if keep else 1, _natively(loop.keys)
    inputs = new(1 + ticks, batch, loop.layers[0].linear[0].shape[1])
    history = _history(loop)
    sums = loop.r.new_empty(ticks, batch, len(loop.r))
    queries = new(0 if native else rows, batch, len(loop.in_weight))
    scores = loop.in_weight.shape[0] // loop.keys.shape[-1]
    log_sum_exp = loop.r.new_empty(0 if native else rows, batch, scores)
    products = tuple(new(rows, batch, len(layer.linear[0])) for layer in loop.layers)
    inputs[..., loop.read.stop :] = 0
    inputs[0, :, loop.activations] = loop.start
    history[: memory - 1] = loop.trace[:, 1:].T[:, None]
    outputs = _skips(loop)
    statistics = []
    left, right = loop.pairs.chunk(2)
    for tick in range(ticks):
        row = tick if keep else 0
        z, read = (inputs[tick, :, part] for part in (loop.activations, loop.read))
        before = sums[tick - 1] if tick else None
        if native:
            sums[tick], found = _attend(loop, loop.scale[tick], z, before)
            read.copy_(found)
        else:
            synchronised_attention_tick(
                z,
                left,
                right,
                loop.r,
                loop.scale[tick],
                loop.in_weight,
                loop.in_bias,
                loop.keys,
                loop.values,
                before,
                into=Attended(read, sums[tick], queries[row], log_sum_exp[row]),
            )
        out = [product[row] for product in products]
        state = history[memory - 1 + tick]
        told = _pass(loop, inputs[tick], out, outputs, state)
        if keep:
            statistics.append(told)
        trace = history[tick : tick + memory].permute(1, 2, 0)
        following = inputs[tick + 1, :, loop.activations]
        if native:
            following.copy_(neuron_level_model(trace, *loop.neurons))
        else:
            neuron_level_model(trace, *loop.neurons, out=following)
    return Thought(inputs, history, sums, queries, log_sum_exp, products, tuple(statistics))


def _skips(loop: Loop) -> list[Tensor | None]:
    """Of every layer room for what follows it, (B, width), if that is skipped to a later one."""
    wanted = {layer.skip for layer in loop.layers}
    return [
        layer.norms[0].new_empty(len(loop.keys), len(layer.norms[0])) if number in wanted else None
        for number, layer in enumerate(loop.layers)
    ]


def _pass(
    loop: Loop,
    x: Tensor,
    out: Sequence[Tensor],
    outputs: list[Tensor | None],
    state: Tensor,
) -> tuple[Tensor | None, ...]:
    """The linear layers of a tick into ``out``, what follows the last into ``state``, and what
    follows the others, where it is skipped to a later layer, into ``outputs``. Returns the norms'
    statistics."""
    _linear(loop.layers[0], x, out[0])
    moments: Tensor | None = None
    told: list[Tensor | None] = []
    for number, layer in enumerate(loop.layers):
        y, skipped = out[number], _skipped(layer, outputs)
        following = loop.layers[number + 1] if number + 1 < len(loop.layers) else None
        step = None
        if following is None:
            if not skipped or _natively(y):
                state.copy_(_finish(layer, y, *skipped, *layer.norms))
            else:
                inner, after = layer.norms[:2], layer.norms[2:]
                norm_silu_skip_norm(y, *inner, *skipped, *after, eps=layer.eps, out=state)
        elif _is_fused(layer, following):
            weight, bias = following.linear
            results = out[number + 1], outputs[number]
            norms = _norms_of(layer, skipped)
            step = norm_silu_linear_step(
                y, weight=weight, bias=bias, **norms, into=results, moments=moments
            )
        else:
            outputs[number] = x = _finish(layer, y, *skipped, *layer.norms)
            _linear(following, x.to(y.dtype), out[number + 1])
        moments = None if step is None else step.moments
        told.append(None if step is None else step.statistics)
    return tuple(told)


def _history(loop: Loop) -> Tensor:
    """Room for (M - 1 + T, B, D): the layout in which a window of it is read without a copy, by a
    GPU's kernel and by a CPU's matrix products."""
    size = len(loop.scale) + loop.trace.shape[1] - 1, len(loop.keys), len(loop.start)
    if _natively(loop.keys):
        return loop.keys.new_empty(size[::-1]).permute(2, 1, 0)
    return loop.keys.new_empty(size)


def _differentiable(loop: Loop) -> Tensor:
    """The activations, by operations that autograd follows."""
    batch, memory = len(loop.keys), loop.trace.shape[1]
    activations = [loop.start.to(loop.dtype).expand(batch, -1)]
    states = list(loop.trace.to(loop.dtype).T[1:, None].expand(-1, batch, -1).unbind())
    total = None
    for tick, scale in enumerate(loop.scale):
        total, read = _attend(loop, scale, activations[-1], total)
        x = torch.cat([activations[-1], read], 1)
        x = F.pad(x, (0, loop.layers[0].linear[0].shape[1] - x.shape[1]))
        outputs: list[Tensor] = []
        for layer in loop.layers:
            y = _linear(layer, x)
            outputs.append(_finish(layer, y, *_skipped(layer, outputs), *layer.norms))
            x = outputs[-1].to(loop.dtype)
        states.append(x)
        trace = torch.stack(states[tick : tick + memory], -1)
        activations.append(neuron_level_model(trace, *loop.neurons))
    return torch.stack(activations)


def _attend(loop: Loop, scale: Tensor, z: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sums of the synchronisation, and what attention read."""
    left, right = z.index_select(1, loop.pairs).to(loop.r.dtype).chunk(2, 1)
    total = left * right
    if before is not None:
        total = torch.addcmul(total, loop.r, before)
    query = _queries(loop, total * scale)
    return total, _read(query, loop.keys, loop.values, total.dtype).flatten(1)


def _gradients(loop: Loop, thought: Thought, of_activations: Tensor) -> list[Tensor]:
    """The gradients of :meth:`Loop.tensors`."""
    inputs, history, sums, queries, log_sum_exp, products, _ = thought
    ticks, memory, dtype = len(sums), loop.trace.shape[1], sums.dtype
    native, pairs = _natively(history), loop.pairs
    first, second = pairs.chunk(2)
    outputs: list[Tensor] = []
    for layer, product in zip(loop.layers[:-1], products, strict=False):
        outputs.append(_finish(layer, product, *_skipped(layer, outputs), *layer.norms))
    activations, reads = (inputs[:-1, :, part] for part in (loop.activations, loop.read))
    synchronisations = sums * loop.scale[:, None]
    if native:
        queries = _queries(loop, synchronisations).flatten(2)
        left, right = activations.index_select(2, pairs).to(dtype).chunk(2, 2)
        partners = torch.cat([right, left], 2)
    else:
        table = neuron_table(first, second, len(loop.start))

    of_inputs = torch.zeros_like(inputs, dtype=dtype)
    of_z = of_inputs[..., loop.activations]
    of_z.copy_(of_activations)
    of_reads = of_inputs[:-1, :, loop.read]
    of_history = torch.zeros_like(history, dtype=dtype)
    of_outputs = [torch.zeros_like(output) for output in outputs]
    of_outputs.append(of_history[memory - 1 :])
    of_queries = torch.empty_like(queries)
    of_sums, of_synchronisations = torch.empty_like(sums), torch.empty_like(sums)
    for tick in reversed(range(ticks)):
        window = slice(tick, tick + memory)
        neuron_level_model_trace_gradient(
            of_z[tick + 1],
            history[window].permute(1, 2, 0),
            *loop.neurons,
            into=of_history[window].permute(1, 2, 0),
        )
        for number in reversed(range(len(loop.layers))):
            _pull(loop, number, tick, thought, outputs, of_inputs, of_outputs)
        into = AttendedGradient(of_queries[tick], of_synchronisations[tick], of_sums[tick])
        following = of_sums[tick + 1] if tick + 1 < ticks else None
        if native:
            of_read = of_reads[tick].to(inputs.dtype)
            _attention_gradients(loop, loop.scale[tick], queries[tick], of_read, following, into)
            of_pairs = into.sums.repeat(1, 2) * partners[tick]
            of_z[tick].index_add_(1, pairs, of_pairs)
        else:
            synchronised_attention_gradient(
                of_reads[tick],
                following,
                activations[tick],
                first,
                second,
                loop.r,
                loop.scale[tick],
                loop.in_weight,
                loop.keys,
                loop.values,
                Attended(reads[tick], sums[tick], queries[tick], log_sum_exp[tick]),
                of_z[tick],
                table=table,
                into=into,
            )

    gradients: list[Tensor] = []
    for number, layer in enumerate(loop.layers):
        y, of_x = products[number].flatten(0, 1), of_outputs[number].flatten(0, 1)
        skipped = [value.flatten(0, 1) for value in _skipped(layer, outputs)]
        of_y, *of_rest = _finish_gradient(layer, of_x, y, skipped, of_norms=True)
        x = outputs[number - 1] if number else inputs[:-1]
        x = x.flatten(0, 1).to(y.dtype)
        gradients += _linear_gradients(layer, of_y.to(y.dtype), x)
        gradients += of_rest[len(skipped) :]
    of_neurons = _neuron_gradients(loop, history, of_z[1:])
    if native:
        of_keys, of_values = _key_gradients(loop, queries, of_reads)
    else:
        of_keys, of_values = synchronised_attention_key_gradient(
            of_reads, reads, queries, log_sum_exp, loop.keys, loop.values
        )
    of_query_rows = of_queries.flatten(0, 1)
    return [
        of_z[0].sum(0),
        F.pad(of_history[: memory - 1].sum(1).T, (1, 0)),
        (of_sums[1:] * sums[:-1]).sum((0, 1)),
        (of_synchronisations * sums).sum(1),
        of_keys,
        of_values,
        of_query_rows.mT @ synchronisations.flatten(0, 1).to(queries.dtype),
        of_query_rows.sum(0),
        *of_neurons,
        *gradients,
    ]


def _pull(
    loop: Loop,
    number: int,
    tick: int,
    thought: Thought,
    outputs: Sequence[Tensor],
    of_inputs: Tensor,
    of_outputs: Sequence[Tensor],
) -> None:
    """Pull a tick's gradient from behind a layer to its input, and to what is skipped to it."""
    layer, y, of_x = loop.layers[number], thought.products[number][tick], of_outputs[number][tick]
    into = of_outputs[number - 1][tick] if number else of_inputs[tick]
    skipped = [value[tick] for value in _skipped(layer, outputs)]
    of_skip = None if layer.skip is None else of_outputs[layer.skip][tick]
    if _is_fused(layer, layer):
        norms = _norms_of(layer, skipped)
        linear_norm_silu_gradient(
            of_x,
            y,
            weight=layer.linear[0],
            **norms,
            statistics=thought.statistics[tick][number],
            into=into,
            of_skip=of_skip,
        )
        return
    of_y, *of_skipped = _finish_gradient(layer, of_x.contiguous(), y, skipped)
    if of_skip is not None:
        of_skip.copy_(of_skipped[0])
    x = outputs[number - 1][tick] if number else thought.inputs[tick]
    _add_input_gradient(layer, of_y.to(y.dtype), x, into)


def _attention_gradients(
    loop: Loop,
    scale: Tensor,
    query: Tensor,
    of_read: Tensor,
    of_next_sums: Tensor | None,
    into: AttendedGradient,
) -> None:
    """Pull a tick's gradient from what attention read to the sums."""
    heads = loop.keys.shape[1]
    query, of_read = (
        value.unflatten(1, (heads, -1, n))
        for value, n in ((query, loop.keys.shape[-1]), (of_read, loop.values.shape[-1]))
    )
    _, of_scores = _attention_gradient(query, loop.keys, loop.values, of_read, loop.r.dtype)
    of_query = (of_scores @ loop.keys).flatten(1)
    into.query.copy_(of_query)
    into.synchronisation.copy_(of_query @ loop.in_weight)
    torch.mul(into.synchronisation, scale, out=into.sums)
    if of_next_sums is not None:
        into.sums.addcmul_(loop.r, of_next_sums)


def _chunks(loop: Loop) -> Iterator[slice]:
    """Some ticks at a time: the neurons' hidden layers, or the attention weights, of all of them
    would fill the memory."""
    rows = CPU_ROWS if _natively(loop.keys) else ROWS
    step = max(1, rows // max(1, len(loop.keys)))
    return (slice(tick, tick + step) for tick in range(0, len(loop.scale), step))


def _neuron_gradients(loop: Loop, history: Tensor, of_z: Tensor) -> list[Tensor]:
    """The gradients of the neurons' weights."""
    found = [torch.zeros_like(weight) for weight in loop.neurons]
    traces = history.unfold(0, loop.trace.shape[1], 1)
    for some in _chunks(loop):
        share = neuron_level_model_weight_gradient(of_z[some], traces[some], *loop.neurons)
        torch._foreach_add_(found, list(share))
    return found


def _key_gradients(loop: Loop, queries: Tensor, of_reads: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of keys and values."""
    # Positions side by side, as in the keys.
    of_keys, of_values = (value.new_zeros(value.mT.shape) for value in (loop.keys, loop.values))
    heads = loop.keys.shape[1]
    for some in _chunks(loop):
        query, of_read = (
            value[some].unflatten(2, (heads, -1, width)).permute(1, 2, 0, 3, 4).flatten(2, 3)
            for value, width in (
                (queries, loop.keys.shape[-1]),
                (of_reads.to(queries.dtype), loop.values.shape[-1]),
            )
        )
        weights, of_scores = _attention_gradient(
            query, loop.keys, loop.values, of_read, loop.r.dtype
        )
        of_keys += query.mT @ of_scores
        of_values += of_read.mT @ weights
    return of_keys.mT, of_values.mT


def _queries(loop: Loop, synchronisations: Tensor) -> Tensor:
    """(..., n) to (..., 1 or heads, heads or 1, K)."""
    found = F.linear(synchronisations.to(loop.in_weight.dtype), loop.in_weight, loop.in_bias)
    return found.unflatten(-1, (loop.keys.shape[1], -1, loop.keys.shape[-1]))


def _read(query: Tensor, keys: Tensor, values: Tensor, exact: torch.dtype) -> Tensor:
    weights = torch.softmax((query @ keys.mT).to(exact), -1)
    return weights.to(query.dtype) @ values


def _attention_gradient(
    query: Tensor, keys: Tensor, values: Tensor, of_read: Tensor, exact: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The attention weights, and the gradient of the scores before the softmax."""
    weights = torch.softmax((query @ keys.mT).to(exact), -1)
    of_weights = (of_read @ values.mT).to(exact)
    of_scores = _aten._softmax_backward_data(of_weights, weights, -1, exact)
    return weights.to(query.dtype), of_scores.to(query.dtype)


def _linear(layer: Layer, x: Tensor, out: Tensor | None = None) -> Tensor:
    weight, bias, *generators = layer.linear
    if not generators:
        return torch.addmm(bias, x, weight.mT, out=out)
    y = _hyper_linear(x, *layer.linear)
    return y if out is None else out.copy_(y)


def _hyper_linear(
    x: Tensor, weight: Tensor, bias: Tensor, context: Tensor, context_bias: Tensor, *rest: Tensor
) -> Tensor:
    return hyper_lora_linear(x, weight, bias, F.silu(F.linear(x, context, context_bias)), *rest)


def _add_input_gradient(layer: Layer, of_y: Tensor, x: Tensor, into: Tensor) -> None:
    weight, *rest = layer.linear
    if len(rest) > 1:
        into += _pulled(_hyper_linear, of_y, [x.to(of_y.dtype)], layer.linear)[0]
    elif into.dtype == weight.dtype:
        into.addmm_(of_y, weight)
    else:
        into += of_y @ weight


def _linear_gradients(layer: Layer, of_y: Tensor, x: Tensor) -> Sequence[Tensor]:
    """The gradients of the weights."""
    if len(layer.linear) == 2:
        return of_y.mT @ x, of_y.sum(0)
    return _pulled(lambda *weights: _hyper_linear(x, *weights), of_y, layer.linear)


def _skipped(layer: Layer, outputs: Sequence[Any]) -> list[Tensor]:
    return [] if layer.skip is None else [outputs[layer.skip]]


def _is_fused(layer: Layer, linear: Layer) -> bool:
    """Whether one kernel takes what follows the first and the linear layer of the second."""
    native = _natively(layer.norms[0])
    return not native and not layer.gated and len(linear.linear) == 2


def _norms_of(layer: Layer, skipped: Sequence[Tensor]) -> dict[str, Any]:
    """What follows the linear layer, as arguments of :func:`norm_silu_linear`."""
    names = ("norm_weight", "norm_bias", "skip_weight", "skip_bias")
    norms: dict[str, Any] = dict(zip(names, layer.norms, strict=False))
    return {**norms, **dict(zip(("skip",), skipped, strict=False)), "eps": layer.eps}


def _natively(y: Tensor) -> bool:
    """Whether torch's own operations follow a linear layer: on a CPU an op's checks take as long
    as its work."""
    return y.device.type == "cpu"


def _finish(layer: Layer, y: Tensor, *rest: Tensor) -> Tensor:
    """What follows the linear layer; ``rest`` is what is skipped, if anything, and the norms'
    weights."""
    skipped = rest[: -len(layer.norms)]
    weight, bias, *after = rest[-len(layer.norms) :]
    y = y.to(weight.dtype)
    if _natively(y):
        if layer.gated:
            return F.layer_norm(F.glu(y), weight.shape, weight, bias, layer.eps)
        x = F.silu(F.layer_norm(y, weight.shape, weight, bias, layer.eps))
        for value in skipped:
            x = F.layer_norm(x + value, weight.shape, after[0], after[1], layer.eps)
        return x
    if layer.gated:
        return norm_activation(F.glu(y), weight, bias, eps=layer.eps)
    if skipped:
        return norm_silu_skip_norm(y, weight, bias, *skipped, *after, eps=layer.eps)
    return norm_activation(y, weight, bias, activation="SiLU", eps=layer.eps)


def _finish_gradient(
    layer: Layer, of_x: Tensor, y: Tensor, skipped: list[Tensor], of_norms: bool = False
) -> Sequence[Tensor]:
    """The gradients of the linear layer's output, of what is skipped, if anything, and, if wanted,
    of the norms' weights."""
    y = y.to(of_x.dtype)
    if not _natively(y):
        finish = partial(_finish, layer)
        if of_norms:
            return _pulled(finish, of_x, [y, *skipped, *layer.norms])
        return _pulled(finish, of_x, [y, *skipped], layer.norms)
    inner, after = layer.norms[:2], layer.norms[2:]
    if layer.gated:
        gated = F.glu(y)
        found = _norm_gradient(of_x, gated, _norm(gated, inner, layer.eps), inner, of_norms)
        return [_aten.glu_backward(found[0], y, -1), *found[1:]]
    normed = _norm(y, inner, layer.eps)
    of_after: list[Tensor] = []
    of_skipped: list[Tensor] = []
    for value in skipped:
        total = F.silu(normed[0]).add_(value)
        of_x, *of_after = _norm_gradient(
            of_x, total, _norm(total, after, layer.eps), after, of_norms
        )
        of_skipped = [of_x]
    of_normed = _aten.silu_backward(of_x, normed[0])
    of_y, *of_inner = _norm_gradient(of_normed, y, normed, inner, of_norms)
    return [of_y, *of_skipped, *of_inner, *of_after]


def _norm(x: Tensor, weights: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The layer norm, and mean and inverse deviation of its rows."""
    return torch.native_layer_norm(x, weights[0].shape, weights[0], weights[1], eps)


def _norm_gradient(
    of_norm: Tensor, x: Tensor, normed: Sequence[Tensor], weights: Sequence[Tensor], of_both: bool
) -> list[Tensor]:
    """The gradients of x and, if wanted, of weight and bias."""
    gradients: Sequence[Tensor] = _aten.native_layer_norm_backward(
        of_norm, x, weights[0].shape, *normed[1:], *weights, [True, of_both, of_both]
    )
    return list(gradients if of_both else gradients[:1])


def _pulled(
    function: Callable[..., Tensor],
    of_result: Tensor,
    inputs: Sequence[Tensor],
    others: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """The gradients of the inputs of ``function(*inputs, *others)``."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        result = function(*leaves, *(tensor.detach() for tensor in others))
    return torch.autograd.grad(result, leaves, of_result)


def _plain(module: nn.Module, *kinds: type) -> bool:
    """Whether a module is of one of these very classes, and nothing listens to its calls."""
    return type(module) in kinds and not has_hooks(module)


def _silent(dropout: nn.Module) -> bool:
    return _plain(dropout, nn.Dropout) and not (dropout.training and dropout.p)


def _linear_weights(linear: Any) -> tuple[Tensor, ...]:
    parts = [linear]
    if isinstance(linear, HyperLoRALinear):
        parts += [linear.context, linear.to_gate, linear.to_u, linear.to_v]
    return tuple(weight for part in parts for weight in (part.weight, part.bias))


def layers_of(synapses: Any) -> tuple[Layer, ...] | None:
    """The layers of the synapses; None if they drop out, have hooks or layers of other kinds."""
    kind: type[nn.Module]
    activations: Any
    dropouts: Any
    linears: Any
    norms: Any
    skip_norms: Any
    if isinstance(synapses, SynapseUNET):
        depth = len(synapses.down_projections)
        (linear, norm, activation), skip_norms = synapses.first_projection, synapses.skip_lns
        projections = [*synapses.down_projections, *reversed(synapses.up_projections)]
        dropouts, linears, norms, activations = zip(*projections, strict=True)
        linears, norms = [linear, *linears], [norm, *norms]
        activations = [activation, *activations]
        kind, containers = nn.SiLU, [*projections, synapses.first_projection]
    else:
        dropouts, linears, activations, norms = ([module] for module in synapses)
        kind, containers, skip_norms, depth = nn.GLU, [synapses], [], 0
    if not (
        all(_plain(module, nn.Sequential) for module in containers)
        and all(map(_silent, dropouts))
        and all(_plain(module, nn.Linear, HyperLoRALinear) for module in linears)
        and not any(getattr(module, "merged", False) for module in linears)
        and all(_plain(module, nn.LayerNorm) for module in (*norms, *skip_norms))
        and all(_plain(module, kind) for module in activations)
    ):
        return None
    layers = []
    for number, (linear, norm) in enumerate(zip(linears, norms, strict=True)):
        skip = 2 * depth - number if number > depth else None
        both = (norm,) if skip is None else (norm, skip_norms[skip])
        scales = tuple(tensor for norm in both for tensor in (norm.weight, norm.bias))
        layers.append(Layer(_linear_weights(linear), scales, norm.eps, skip, kind is nn.GLU))
    return tuple(layers)


def neuron_weights_of(neurons: PreparedNeurons) -> tuple[Tensor, ...] | None:
    """The weights of neuron-level models; None if they drop out or norm, or have hooks."""
    layers = [layer for layer, *_ in neurons.layers]
    ours = all(_plain(layer, SuperLinear) and not layer.norms_or_drops() for layer in layers)
    return neurons.weights if ours else None
