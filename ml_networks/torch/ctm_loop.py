"""All ticks of the Continuous Thought Machine as one function of autograd.

Of each tick only what it cannot cheaply compute again is kept: the outputs of the linear layers,
the states, the activations, what attention read and the sums of the synchronisation. The backward
pass computes layer norms, gates, attention weights and neuron-level models anew, and walks the
ticks only for what one tick passes to the one before. Every weight's gradient is then one product
over the rows of all ticks.

Dropout, hooks, layers of other kinds, layer norms in the neuron-level models, ``torch.compile``
and the transforms of ``torch.func`` need the ordinary loop over the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ml_networks.kernels.core.arguments import plain_vjp
from ml_networks.kernels.core.torch_functions import transformed
from ml_networks.kernels.torch import (
    hyper_lora_linear,
    neuron_level_model,
    neuron_level_model_trace_gradient,
    neuron_level_model_weight_gradient,
    norm_activation,
    norm_silu_skip_norm,
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
        The synapses. The first takes what attention read, and the activations.
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
    activations
        (1 + T, B, D), the start's first.
    history
        (M - 1 + T, B, D): the start's trace but for its oldest value, and every state.
    sums
        Of the synchronised pairs, (T, B, n), before they are scaled.
    reads, products
        What attention read, and the output of every linear layer, (T, B, width) each; of the last
        tick only, if the others were not to be kept.
    """

    activations: Tensor
    history: Tensor
    sums: Tensor
    reads: Tensor
    products: tuple[Tensor, ...]


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
        activations, history, sums = _run(loop, keep=False)[:3]
    return activations, history[-len(sums) :], sums * loop.scale[:, None]


class _Ticks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loop: Loop, *tensors: Tensor) -> Any:
        found = _run(loop, keep=True)
        ctx.loop, ctx.count = loop, len(tensors)
        ctx.mark_non_differentiable(found.history, found.sums)
        ctx.save_for_backward(*tensors, *found[:4], *found.products)
        return found[:3]

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
        thought = Thought(kept[0], kept[1], kept[2], kept[3], kept[4:])
        return None, *_gradients(loop.with_tensors(tensors), thought, of_activations)


def _run(loop: Loop, keep: bool) -> Thought:
    """All ticks, without autograd."""
    batch, ticks, memory = len(loop.keys), len(loop.scale), loop.trace.shape[1]
    new, rows = loop.keys.new_empty, ticks if keep else 1
    activations = new(1 + ticks, batch, len(loop.start))
    history = _history(loop)
    sums = loop.r.new_empty(ticks, batch, len(loop.r))
    reads = new(rows, batch, loop.layers[0].linear[0].shape[1] - len(loop.start))
    products = tuple(new(rows, batch, len(layer.linear[0])) for layer in loop.layers)
    activations[0] = loop.start
    history[: memory - 1] = loop.trace[:, 1:].T[:, None]
    for tick in range(ticks):
        row = tick if keep else 0
        sums[tick], reads[row], history[memory - 1 + tick] = _tick(
            loop,
            loop.scale[tick],
            activations[tick],
            sums[tick - 1] if tick else None,
            [product[row] for product in products],
        )
        trace = history[tick : tick + memory].permute(1, 2, 0)
        activations[tick + 1] = neuron_level_model(trace, *loop.neurons)
    return Thought(activations, history, sums, reads, products)


def _history(loop: Loop) -> Tensor:
    """Room for (M - 1 + T, B, D): the layout in which a window of it is read without a copy, by a
    GPU's kernel and by a CPU's matrix products."""
    size = len(loop.scale) + loop.trace.shape[1] - 1, len(loop.keys), len(loop.start)
    if loop.keys.device.type == "cpu":
        return loop.keys.new_empty(size[::-1]).permute(2, 1, 0)
    return loop.keys.new_empty(size)


def _differentiable(loop: Loop) -> Tensor:
    """The activations, by operations that autograd follows."""
    batch, memory = len(loop.keys), loop.trace.shape[1]
    activations = [loop.start.to(loop.dtype).expand(batch, -1)]
    states = list(loop.trace.to(loop.dtype).T[1:, None].expand(-1, batch, -1).unbind())
    total, out = None, [None] * len(loop.layers)
    for tick, scale in enumerate(loop.scale):
        total, _, state = _tick(loop, scale, activations[-1], total, out)
        states.append(state)
        trace = torch.stack(states[tick : tick + memory], -1)
        activations.append(neuron_level_model(trace, *loop.neurons))
    return torch.stack(activations)


def _tick(
    loop: Loop, scale: Tensor, z: Tensor, before: Tensor | None, out: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of the synchronisation, what attention read, and the state; the outputs of the
    linear layers go to ``out``."""
    left, right = z.index_select(1, loop.pairs).to(loop.r.dtype).chunk(2, 1)
    total = left * right
    if before is not None:
        total = torch.addcmul(total, loop.r, before)
    query = _queries(loop, total * scale)
    read = _read(query, loop.keys, loop.values, total.dtype).flatten(1)
    x = torch.cat([read, z], 1)
    outputs: list[Tensor] = []
    for layer, target in zip(loop.layers, out, strict=True):
        y = _linear(layer, x, target)
        outputs.append(_finish(layer, y, *_skipped(layer, outputs), *layer.norms))
        x = outputs[-1].to(query.dtype)
    return total, read, x


def _gradients(loop: Loop, thought: Thought, of_activations: Tensor) -> list[Tensor]:
    """The gradients of :meth:`Loop.tensors`."""
    activations, history, sums, reads, products = thought
    ticks, memory, dtype = len(sums), loop.trace.shape[1], sums.dtype
    outputs: list[Tensor] = []
    for layer, product in zip(loop.layers[:-1], products, strict=False):
        outputs.append(_finish(layer, product, *_skipped(layer, outputs), *layer.norms))
    left, right = activations[:-1].index_select(2, loop.pairs).to(dtype).chunk(2, 2)
    partners = torch.cat([right, left], 2)
    synchronisations = sums * loop.scale[:, None]
    queries = _queries(loop, synchronisations)

    of_z = of_activations.to(dtype, copy=True)
    of_history = torch.zeros_like(history, dtype=dtype)
    of_outputs = [torch.zeros_like(output) for output in outputs]
    of_outputs.append(torch.empty_like(activations[1:], dtype=dtype))
    of_queries = torch.empty_like(queries)
    of_reads = queries.new_empty(*queries.shape[:4], loop.values.shape[-1])
    of_sums, of_synchronisations = torch.empty_like(sums), torch.empty_like(sums)
    for tick in reversed(range(ticks)):
        window = slice(tick, tick + memory)
        neuron_level_model_trace_gradient(
            of_z[tick + 1].to(history.dtype),
            history[window].permute(1, 2, 0),
            *loop.neurons,
            into=of_history[window].permute(1, 2, 0),
        )
        of_outputs[-1][tick] = of_history[tick + memory - 1]
        for number in reversed(range(len(loop.layers))):
            layer, y = loop.layers[number], products[number][tick]
            skipped = [value[tick] for value in _skipped(layer, outputs)]
            of_y, *of_skipped = _finish_gradient(layer, of_outputs[number][tick], y, skipped)
            if layer.skip is not None:
                of_outputs[layer.skip][tick] = of_skipped[0]
            if number:
                _add_input_gradient(
                    layer,
                    of_y.to(y.dtype),
                    outputs[number - 1][tick],
                    of_outputs[number - 1][tick],
                )
        of_read, of_thought = (of_y.to(y.dtype) @ layer.linear[0]).split(
            [reads.shape[-1], activations.shape[-1]], 1
        )
        of_reads[tick] = of_read = of_read.unflatten(1, (*queries.shape[2:4], -1))
        _, of_scores = _attention_gradient(queries[tick], loop.keys, loop.values, of_read, dtype)
        of_queries[tick] = of_scores @ loop.keys
        of_synchronisations[tick] = of_queries[tick].flatten(1) @ loop.in_weight
        of_sum = of_synchronisations[tick] * loop.scale[tick]
        if tick + 1 < ticks:
            of_sum.addcmul_(loop.r, of_sums[tick + 1])
        of_sums[tick] = of_sum
        of_z[tick] += of_thought
        of_z[tick].index_add_(1, loop.pairs, of_sum.repeat(1, 2) * partners[tick])

    gradients: list[Tensor] = []
    for number, layer in enumerate(loop.layers):
        y, of_x = products[number].flatten(0, 1), of_outputs[number].flatten(0, 1)
        skipped = [value.flatten(0, 1) for value in _skipped(layer, outputs)]
        of_y, *of_rest = _finish_gradient(layer, of_x, y, skipped, of_norms=True)
        x = outputs[number - 1] if number else torch.cat([reads, activations[:-1]], 2)
        x = x.flatten(0, 1).to(y.dtype)
        gradients += _linear_gradients(layer, of_y.to(y.dtype), x)
        gradients += of_rest[len(skipped) :]
    of_neurons, of_keys, of_values = _shared_gradients(
        loop, history, of_z[1:].to(history.dtype), queries, of_reads
    )
    of_query_rows = of_queries.flatten(2).flatten(0, 1)
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


def _shared_gradients(
    loop: Loop, history: Tensor, of_z: Tensor, queries: Tensor, of_reads: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The gradients of the neurons' weights, the keys and the values, some ticks at a time: the
    neurons' hidden layers, or the attention weights, of all of them would fill the memory."""
    of_neurons = [torch.zeros_like(weight) for weight in loop.neurons]
    of_keys, of_values = torch.zeros_like(loop.keys), torch.zeros_like(loop.values)
    traces = history.unfold(0, loop.trace.shape[1], 1)
    rows = CPU_ROWS if of_z.device.type == "cpu" else ROWS
    step = max(1, rows // max(1, of_z.shape[1]))
    for some in (slice(tick, tick + step) for tick in range(0, len(of_z), step)):
        found = neuron_level_model_weight_gradient(of_z[some], traces[some], *loop.neurons)
        torch._foreach_add_(of_neurons, list(found))
        query = queries[some].permute(1, 2, 0, 3, 4).flatten(2, 3)
        of_read = of_reads[some].permute(1, 2, 0, 3, 4).flatten(2, 3)
        weights, of_scores = _attention_gradient(
            query, loop.keys, loop.values, of_read, loop.r.dtype
        )
        of_keys += of_scores.mT @ query
        of_values += weights.mT @ of_read
    return of_neurons, of_keys, of_values


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


def _skipped(layer: Layer, outputs: Sequence[Tensor]) -> list[Tensor]:
    return [] if layer.skip is None else [outputs[layer.skip]]


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
