"""Attention for torch: the public function, the plain path, the custom ops, autograd.

The plain path is torch's `scaled_dot_product_attention` with its own autograd. So a call that
needs a gradient follows the choice for the backward pass: that was timed as both passes together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import dispatch, torch_functions, usage
from ..core.device import torch_device
from ..core.dropout import check_probability
from ..core.problem import Problem
from ..core.registry import Binding
from . import spec
from .spec import Options


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    r"""Scaled dot-product attention, without a matrix of scores in memory.

    For query :math:`i` and key :math:`j` of one head, with :math:`s` the scale:

    .. math::

        S_{ij} = s\, q_i \cdot k_j + \text{mask}_{ij}, \qquad
        P_{ij} = \frac{e^{S_{ij}}}{\sum_j e^{S_{ij}}}, \qquad
        o_i = \sum_j P_{ij} v_j

    A row whose scores are all :math:`-\infty` has weights, output and gradients 0.

    Parameters
    ----------
    query
        Shape (batch, heads, queries, features), any strides; float32, bfloat16, float16 or
        float64.
    key, value
        Shape (batch, key heads, keys, features), any strides. Key heads divide heads: head h
        reads key head h // (heads / key heads).
    mask
        Broadcasts to (batch, heads, queries, keys). Boolean: True where a query sees a key.
        Floating: added to the scores.
    causal
        Hide the keys after a query: query i sees keys 0 to i, both counted from the start of their
        sequence, also where there are more keys than queries. Together with ``mask``, a key must
        pass both.
    scale
        Factor of the products; 1 / sqrt(features) by default.
    dropout
        Probability that a weight is set to 0; the others are divided by 1 - dropout.
    seed
        Of the dropout: a 64-bit integer, or a tensor with one. The same seed drops the same
        weights in every implementation, but the plain path then stores the scores. None: drawn
        from torch's default generator.
    implementation
        ``"torch"``, ``"triton"``, or None to let dispatch choose.

    Returns
    -------
    Tensor
        Shape of ``query``, in its dtype.

    Raises
    ------
    TypeError
        If the tensors are not floating-point tensors of one dtype, or ``mask`` is neither boolean
        nor floating.
    ValueError
        For shapes that do not fit each other, tensors of different devices, or a ``dropout``
        outside [0, 1).
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    Under autocast the tensors are cast as for torch's own function. Results of the kernel repeat
    bit for bit; it has second derivatives, by way of the matrix of scores. Code compiled by
    ``torch.compile`` asks dispatch only for sizes at which the kernel may win, so a surrounding
    `use_implementation` counts there alone; the argument counts always. Under ``torch.func.vmap``
    the mapped axis becomes part of the batch where nothing is dropped; under other transforms the
    plain path runs.

    Vaswani et al., "Attention Is All You Need", arXiv 1706.03762; computed by tiles as in Dao, Fu,
    Ermon, Rudra, Ré, "FlashAttention", arXiv 2205.14135.
    """
    if (
        mask is None
        and not dropout
        and query.is_cpu
        and torch._C._functorch.maybe_current_level() is None
        and not torch.compiler.is_compiling()
        and not usage.recording()
        and not dispatch.is_overridden(BINDING, implementation)
    ):
        at_once = _at_once(query, key, value, causal, scale)
        if at_once is not None:
            return at_once
    shape = None if mask is None else mask.shape
    spec.check_arguments(query.shape, key.shape, value.shape, shape)
    kind = query.device.type
    on_cpu = kind == "cpu"
    autocast = (on_cpu or kind == "cuda") and torch.is_autocast_enabled(kind)
    if autocast and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check(query, key, value, mask)
    check_probability(dropout)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = Options(bool(causal), float(scale), float(dropout))
    given = None
    if dropout and seed is not None:
        given = torch.as_tensor(seed, dtype=torch.int64, device=query.device)
    if mask is not None and mask.dim() < 2:
        mask = mask.expand(1, -1) if mask.dim() else mask.expand(1, 1)
    if torch.compiler.is_compiling():
        if implementation == "torch" or (
            implementation is None and (on_cpu or not _may_win(query, key, value, mask))
        ):
            return _plain(query, key, value, mask, given, options)
        tensors = query, key, value, mask, _drawn(given, query, options)
        return _forward_op(*tensors, *options, _needs_gradient(*tensors[:3]), implementation)[0]
    if torch_functions.transformed(query, key, value, mask):
        if not dropout and torch_functions.mapped(query, key, value, mask):
            return _forward_op(query, key, value, mask, None, *options, False, implementation)[0]
        if on_cpu and (given is not None or not dropout):
            # What torch's function runs there has no rule for vmap.
            return _spelled_out(query, key, value, mask, given, options)
        return _plain(query, key, value, mask, given, options)
    if on_cpu and not usage.recording() and not dispatch.is_overridden(BINDING, implementation):
        return _plain(query, key, value, mask, given, options)
    differentiable = _needs_gradient(query, key, value)
    problem = _problem(query, key, value, mask, options)
    decision = _decide(problem, query, differentiable, implementation)
    if decision.implementation == "torch" or not query.numel() or not key.numel():
        with usage.timed(decision):
            return _plain(query, key, value, mask, given, options)
    tensors = query, key, value, mask, _drawn(given, query, options)
    if differentiable:
        output: Tensor = _Attention.apply(*tensors, options, decision, implementation)[0]
        return output
    return _fused(*tensors, options, decision)[0]


def _at_once(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
) -> Tensor | None:
    """The framework's function without a look at what it checks itself; None where something is
    wrong, or is to be prepared first."""
    shape = query.shape
    if not spec.fit(shape, key.shape, value.shape) or shape[1] != key.shape[1]:
        return None
    whole = query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
    if not whole and _channels_first(query, key, value):
        return None
    try:
        if causal or scale is not None:
            return F.scaled_dot_product_attention(
                query, key, value, None, 0.0, causal, scale=scale
            )
        return F.scaled_dot_product_attention(query, key, value)
    except (RuntimeError, TypeError):
        return None


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            "query, key and value must be floating-point tensors of one dtype, got "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"query is on {query.device}, key on {key.device} and value on {value.device}; all "
            "must be on one device"
        )
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be boolean or floating-point, got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"mask is on {mask.device} and query on {query.device}")


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _channels_first(*tensors: Tensor) -> bool:
    """Whether the plain path must copy: its kernels need the features of a token side by side."""
    return any(tensor.stride(-1) != 1 for tensor in tensors)


def _may_win(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Compiled code asks this, and no more: the answer holds for a range of sizes."""
    if mask is not None and mask.requires_grad:
        return False
    strided = _channels_first(query, key, value)
    return bool(spec.may_win(query.shape[2], key.shape[2], strided))


def _drawn(seed: Tensor | None, query: Tensor, options: Options) -> Tensor | None:
    """The seed, drawn on the device where none is given."""
    if seed is None and options.dropout:
        return torch.randint(1 << 62, (), device=query.device)
    return seed


def _problem(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options
) -> Problem:
    kind = None
    if mask is not None:
        learned = mask.requires_grad and torch.is_grad_enabled()
        kind = "learned" if learned else "boolean" if mask.dtype == torch.bool else "additive"
    flags = (
        ("causal", options.causal),
        ("channels_first", _channels_first(query, key, value)),
        ("dropout", options.dropout > 0),
        ("mask", kind),
    )
    batch, heads, queries, width = query.shape
    sizes = batch, heads, key.shape[1], queries, key.shape[2], width
    dtype = str(query.dtype).removeprefix("torch.")
    return Problem(spec.NAME, tuple(zip(spec.DIMENSIONS, sizes, strict=True)), dtype, flags)


def _decide(
    problem: Problem, query: Tensor, differentiable: bool, implementation: str | None
) -> dispatch.Decision:
    """Who runs the forward pass of a call that needs a gradient or does not."""
    device = torch_device(query.device)
    if differentiable:
        backward = replace(problem, direction="backward")
        decision = dispatch.decide(backward, device, BINDING, implementation)
        if decision.implementation == "torch":
            return decision
        implementation = decision.implementation
    return dispatch.decide(problem, device, BINDING, implementation)


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> Tensor:
    """The framework's own function; spelled out where a given seed says which weights to drop."""
    causal, scale, dropout = options
    if seed is not None:
        return _spelled_out(query, key, value, mask, seed, options)
    # Its fused kernels would hand these to the path that stores the scores.
    if query.stride(-1) != 1:
        query = query.contiguous()
    if key.stride(-1) != 1:
        key = key.contiguous()
    if value.stride(-1) != 1:
        value = value.contiguous()
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and (mask is not None or query.dtype == torch.float32):
        # Only its memory-efficient kernel takes these, and that takes no groups.
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        grouped = False
    if mask is not None:
        mask = _merged(
            mask if mask.dtype == torch.bool else mask.to(query.dtype), query, key, causal
        )
        causal = False
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped
    )


def _merged(mask: Tensor, query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """``mask`` with later keys hidden too, if asked for."""
    if not causal:
        return mask
    size = query.shape[2], key.shape[2]
    seen = torch.ones(size, dtype=torch.bool, device=mask.device).tril()
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


def _weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """All weights of a query, and what dropout multiplies them by (1 without)."""
    scores = options.scale * (query @ key.mT)
    if mask is None and options.causal:
        mask = scores.new_ones((), dtype=torch.bool)
    if mask is not None:
        mask = _merged(mask, query, key, options.causal)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            scores = scores + mask.to(scores.dtype)
    if not scores.numel():
        return scores, scores.new_ones(())
    largest = scores.detach().amax(-1, keepdim=True)
    weights = (scores - largest.masked_fill(largest == -torch.inf, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1.0)
    if seed is None:
        return weights, weights.new_ones(())
    rows, columns = weights.shape[:-1].numel(), weights.shape[-1]
    kept = torch_functions.dropout_scale(options.dropout, seed, rows, columns, weights.device)
    return weights, kept.view(weights.shape).to(weights.dtype)


def _widened(tensor: Tensor, heads: int) -> Tensor:
    """In the dtype of the computation, with a key head for each head."""
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    return tensor.repeat_interleave(heads // tensor.shape[1], 1)


def _spelled_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> Tensor:
    """The op with all scores in memory, differentiable any number of times."""
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = (_widened(tensor, query.shape[1]) for tensor in (query, key, value))
        weights, kept = _weights(q, k, mask, seed, options)
        return ((weights * kept) @ v).to(query.dtype)


def _spelled_out_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_output: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with all scores in memory: the backward op's plain path, and the function that
    its own derivative is taken of."""
    with torch.autocast(query.device.type, enabled=False):
        q, k, v, g = (_widened(x, query.shape[1]) for x in (query, key, value, of_output))
        weights, kept = _weights(q, k, mask, seed, options)
        of_weights = kept * (g @ v.mT)
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        of_scores = options.scale * of_scores
        of_key, of_value = of_scores.mT @ q, (weights * kept).mT @ g
        shared = key.shape[1], query.shape[1] // max(key.shape[1], 1)
        return (
            (of_scores @ k).to(query.dtype),
            of_key.unflatten(1, shared).sum(2).to(key.dtype),
            of_value.unflatten(1, shared).sum(2).to(value.dtype),
        )


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    options: Options,
    decision: dispatch.Decision,
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of each row, by the kernel."""
    from . import triton_kernel

    device = torch_device(query.device)
    with usage.timed(decision):
        inputs = triton_kernel.Inputs(query, key, value, mask, seed)
        return triton_kernel.forward(inputs, options, decision.config, device)


def _gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    of_output: Tensor,
    options: Options,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, in strides like theirs."""
    problem = replace(_problem(query, key, value, mask, options), direction="backward")
    device = torch_device(query.device)
    decision = dispatch.decide(problem, device, BINDING, implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or not query.numel() or not key.numel():
            of_query, of_key, of_value = _spelled_out_gradients(
                query, key, value, of_output, mask, seed, options
            )
            return (
                torch.empty_like(query).copy_(of_query),
                torch.empty_like(key).copy_(of_key),
                torch.empty_like(value).copy_(of_value),
            )
        from . import triton_kernel

        inputs = triton_kernel.Inputs(query, key, value, mask, seed)
        kept = triton_kernel.Kept(output, lse, of_output)
        return triton_kernel.backward(inputs, kept, options, decision.config, device)


class _Attention(torch.autograd.Function):
    """The op for eager calls: `torch.library` costs tens of microseconds more."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        options: Options,
        decision: dispatch.Decision,
        implementation: str | None,
    ) -> tuple[Tensor, Tensor]:
        return _fused(query, key, value, mask, seed, options, decision)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.options, decision, _ = inputs
        # The kernel ran forward, so it runs backward: only it has what it needs.
        ctx.implementation = decision.implementation
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, of_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        tensors: tuple[Any, ...] = (*ctx.saved_tensors, of_output)
        legacy = torch._C._functorch.is_legacy_batchedtensor(of_output)
        if legacy or torch_functions.transformed(of_output):
            # Of a batch of gradients `torch.library` makes one call for each.
            return *_backward_op(*tensors, *ctx.options, ctx.implementation), *(None,) * 5
        # With a graph to build this is a function of its own, with a derivative of its own.
        gradients: Any = _Gradients.apply if torch.is_grad_enabled() else _gradients
        return *gradients(*tensors, ctx.options, ctx.implementation), *(None,) * 5


class _Gradients(torch.autograd.Function):
    """`_gradients`, differentiable through the plain path."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _gradients(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        query, key, value, mask, seed, _, _, of_output, ctx.options, _ = inputs
        ctx.save_for_backward(query, key, value, of_output, mask, seed)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return *_second_gradients(ctx, cotangents), None, None


def _second_gradients(ctx: Any, cotangents: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """For query, key, value, mask, seed, output, log-sum-exp and the output's gradient."""
    create_graph = torch.is_grad_enabled()
    *tensors, mask, seed = ctx.saved_tensors
    with torch.enable_grad():
        # Views of their own: the output's gradient may itself depend on the query.
        leaves = [
            x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in tensors
        ]
        query, key, value, of_output = leaves
        gradients = _spelled_out_gradients(query, key, value, of_output, mask, seed, ctx.options)
        *found, of_last = torch.autograd.grad(
            gradients, leaves, cotangents, create_graph=create_graph
        )
    return *found, None, None, None, None, of_last


@torch.library.custom_op("ml_networks::attention", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    differentiable: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    options = Options(causal, scale, dropout)
    decision = _decide(
        _problem(query, key, value, mask, options), query, differentiable, implementation
    )
    if decision.implementation != "torch" and query.numel() and key.numel():
        return _fused(query, key, value, mask, seed, options, decision)
    with usage.timed(decision):
        output = torch.empty_like(query).copy_(_plain(query, key, value, mask, seed, options))
        # A kernel that took this for a log-sum-exp of its own would make no finite gradient.
        return output, query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)


@_forward_op.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(tuple(query.shape[:-1]), dtype=torch.float32)
    return torch.empty_like(query), lse


@_forward_op.register_vmap
def _(
    info: Any,
    axes: tuple[Any, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    differentiable: bool,
    implementation: str | None,
) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
    """Without dropout: `attention` lets nothing else through."""
    size = info.batch_size
    query, key, value = (
        torch_functions.folded(tensor, axis, size)
        for tensor, axis in zip((query, key, value), axes[:3], strict=True)
    )
    if mask is not None:
        mask = _folded_mask(mask, axes[3], size, query.shape[0] // size)
    tensors, options = (query, key, value, mask), Options(causal, scale, dropout)
    transformed = torch_functions.transformed(*tensors)
    if transformed and not torch_functions.mapped(*tensors):
        output = _spelled_out(*tensors, None, options)
    else:
        gradient = not transformed and _needs_gradient(*tensors[:3])
        output = _forward_op(*tensors, None, *options, gradient, implementation)[0]
    return (torch_functions.unfolded(output, size), output.new_empty(0)), (0, None)


def _folded_mask(mask: Tensor, axis: int | None, size: int, batch: int) -> Tensor:
    if axis is None and (mask.dim() < 4 or mask.shape[0] == 1):
        return mask
    mask = mask.expand(size, *mask.shape) if axis is None else mask.movedim(axis, 0)
    while mask.dim() < 5:
        mask = mask.unsqueeze(1)
    return mask.expand(size, batch, *mask.shape[2:]).flatten(0, 1)


@torch.library.custom_op("ml_networks::attention_backward", mutates_args=())
def _backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    of_output: Tensor,
    causal: bool,
    scale: float,
    dropout: float,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(causal, scale, dropout)
    return _gradients(
        query, key, value, mask, seed, output, lse, of_output, options, implementation
    )


@_backward_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, causal, scale, dropout, _, ctx.implementation = inputs
    ctx.options = Options(causal, scale, dropout)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _forward_gradients(ctx: Any, of_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    tensors = (*ctx.saved_tensors, of_output)
    gradients = _backward_op(*tensors, *ctx.options, ctx.implementation)
    return *gradients, *(None,) * 7


_forward_op.register_autograd(_forward_gradients, setup_context=_setup_forward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, mask, seed, _, _, of_output, causal, scale, dropout, _ = inputs
    ctx.options = Options(causal, scale, dropout)
    ctx.save_for_backward(query, key, value, of_output, mask, seed)


def _backward_gradients(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    return *_second_gradients(ctx, cotangents), *(None,) * 4


_backward_op.register_autograd(_backward_gradients, setup_context=_setup_backward)


def _call(
    inputs: Mapping[str, Any], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor]:
    options = {name: flag for name, flag in flags.items() if name not in _LAYOUT}
    tensors = [inputs[name] for name in BINDING.differentiable]
    if flags.get("channels_first"):
        tensors = [tensor.mT for tensor in tensors]
    mask = inputs.get("mask")
    return {"output": attention(*tensors, mask=mask, **options, implementation=implementation)}


_LAYOUT = ("mask", "channels_first")
"""Flags that say what the inputs are, not how the function is called."""

BINDING = Binding(
    spec.NAME, "torch", ("torch", "triton"), _call, ("query", "key", "value"), "triton_kernel"
)
