"""Synchronised attention for torch: the public op, its parts for a loop over ticks, the plain
path, the custom ops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import dispatch, torch_functions, usage
from ..core.arguments import plain_vjp, torch_tensors
from ..core.device import torch_device
from ..core.problem import Problem
from ..core.registry import Binding
from . import spec
from .layout import is_channels_first, is_shared

Table = tuple[Tensor, Tensor, Tensor]


class Attended(NamedTuple):
    """What :func:`synchronised_attention_tick` finds, and its gradients need.

    For G sets of keys, R queries to each, n pairs; each may be a slice of a larger tensor.

    Attributes
    ----------
    read
        What attention read, (B, G R V).
    sums
        The sums of the pairs, (B, n), not scaled.
    query
        (B, G R K).
    log_sum_exp
        Of the scores of each query over all positions, (B, G R), float32.
    """

    read: Tensor
    sums: Tensor
    query: Tensor
    log_sum_exp: Tensor


class Inputs(NamedTuple):
    """The arguments of :func:`synchronised_attention`; a gradient needs neither bias nor sums."""

    z: Tensor
    left: Tensor
    right: Tensor
    r: Tensor
    scale: Tensor
    in_weight: Tensor
    in_bias: Tensor | None
    keys: Tensor
    values: Tensor
    sums: Tensor | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of ``spec.DIMENSIONS``."""
        _, heads, positions, width = self.keys.shape
        columns, pairs = self.in_weight.shape
        queries, read = columns // (heads * width), self.values.shape[3]
        return (*self.z.shape, pairs, heads, queries, positions, width, read)


class AttendedGradient(NamedTuple):
    """What :func:`synchronised_attention_gradient` finds beside the gradient of z.

    Attributes
    ----------
    query
        The gradient of the queries, (B, G R K).
    synchronisation
        That of the scaled sums, (B, n).
    sums
        That of the sums, (B, n), from this tick and all later ones.
    """

    query: Tensor
    synchronisation: Tensor
    sums: Tensor


def synchronised_attention(
    z: Tensor,
    left: Tensor,
    right: Tensor,
    r: Tensor,
    scale: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    keys: Tensor,
    values: Tensor,
    sums: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Attend to an input by the synchronisation of pairs of neurons, one tick of a machine.

    For the pair of the neurons i and j, with the sums :math:`a` of the tick before:

    .. math::

        a' = z_i z_j + r a, \quad q = W (s \odot a') + b, \quad
        read = softmax(q \, keys^\top) \, values

    Parameters
    ----------
    z
        Activations, (B, D); float32, bfloat16, float16 or float64, any strides.
    left, right
        The neurons i and j of each pair, int64 in [0, D), (n,). They are not checked: that would
        wait for the GPU.
    r, scale
        What a sum keeps from a tick to the next, and its factor s, (n,); of the dtype of ``z`` or
        a wider one.
    in_weight, in_bias
        :math:`W`, (G R K, n), and :math:`b`, (G R K,), for G sets of keys and R queries to each.
        No further :math:`1/\sqrt{K}` is applied.
    keys, values
        (B, G, S, K) and (B, G, S, V), S at least 1, any strides; positions next to each other, as
        in ``features.flatten(2).mT``, are read without a copy. Where both are the same tensor, it
        is read once.
    sums
        :math:`a`, (B, n), in the dtype of ``r``; None: the first tick.
    implementation
        ``"torch"``, ``"triton"``, or None to let dispatch choose.

    Returns
    -------
    tuple of Tensor
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
    Sums, softmax and all accumulation are in float32 (float64 for float64). The kernels give the
    same bits in every call, gradients included. Under ``torch.autocast`` all tensors but ``r``,
    ``scale``, ``sums`` and float64 ones are cast to its dtype. Under the transforms of
    ``torch.func`` the plain path runs.

    Darlow et al., "Continuous Thought Machines", arXiv 2505.05522.
    """
    named = {"z": z, "in_weight": in_weight, "in_bias": in_bias, "keys": keys, "values": values}
    one = values is keys
    z, in_weight, in_bias, keys, values = torch_tensors(named)
    values = keys if one else values
    pairs = {"left": left, "right": right}
    exact = {"r": r, "scale": scale, "sums": sums}
    _check_types(z, pairs, exact)
    _check_shapes(
        z=z, in_weight=in_weight, in_bias=in_bias, keys=keys, values=values, **pairs, **exact
    )
    given = Inputs(z, left, right, r, scale, in_weight, in_bias, keys, values, sums)
    if torch_functions.transformed(*given) or _takes_plain_path(given, implementation):
        return _plain(given)
    read, found, _, _ = _forward_op(*given, implementation)
    return read, found


def synchronised_attention_tick(
    z: Tensor,
    left: Tensor,
    right: Tensor,
    r: Tensor,
    scale: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    keys: Tensor,
    values: Tensor,
    sums: Tensor | None = None,
    *,
    into: Attended | None = None,
    implementation: str | None = None,
) -> Attended:
    """:func:`synchronised_attention` for loops over ticks that are differentiated by hand: without
    autograd, and with what the gradients need.

    Parameters
    ----------
    z, left, right, r, scale, in_weight, in_bias, keys, values, sums, implementation
        As in :func:`synchronised_attention`; nothing is cast.
    into
        Where to write, which is also returned; nothing of it may overlap an argument. Default: new
        tensors.

    Returns
    -------
    Attended
        What was read, the new sums, the queries and the log-sum-exp of their scores.

    Raises
    ------
    ValueError, UnsupportedImplementationError
        As in :func:`synchronised_attention`.
    """
    given = Inputs(z, left, right, r, scale, in_weight, in_bias, keys, values, sums)
    _check_shapes(**given._asdict(), **_prefixed("into", into))
    return _tick(into, given, implementation)


def synchronised_attention_gradient(
    of_read: Tensor,
    of_next_sums: Tensor | None,
    z: Tensor,
    left: Tensor,
    right: Tensor,
    r: Tensor,
    scale: Tensor,
    in_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    attended: Attended,
    of_z: Tensor,
    *,
    table: Table | None = None,
    into: AttendedGradient | None = None,
    implementation: str | None = None,
) -> AttendedGradient:
    """Take one tick's gradients that the tick before waits for, adding that of ``z`` in place.

    What is returned gives those of the weights for all ticks at once: of ``in_weight``
    ``of_query^T synchronisation``, of ``scale`` ``(of_synchronisation * sums).sum(0)``, of ``r``
    ``(of_sums * sums of the tick before).sum(0)``. Repeated calls give the same bits.

    Parameters
    ----------
    of_read
        Gradient of ``read``, (B, G R V), any strides.
    of_next_sums
        ``sums`` of the next tick's `AttendedGradient`; None: this is the last tick.
    z, left, right, r, scale, in_weight, keys, values, implementation
        As in :func:`synchronised_attention`.
    attended
        What :func:`synchronised_attention_tick` found.
    of_z
        The gradient of ``z`` is added to this tensor, (B, D), of any floating-point dtype.
    table
        ``neuron_table(left, right, D)`` of `kernels.core.torch_functions`, which a loop makes
        once. Default: it is made here.
    into
        Where to write, which is also returned. Default: new tensors.

    Returns
    -------
    AttendedGradient
        The gradients of queries, synchronisation and sums.

    Raises
    ------
    ValueError, UnsupportedImplementationError
        As in :func:`synchronised_attention`.
    """
    given = Inputs(z, left, right, r, scale, in_weight, None, keys, values, None)
    cotangents = {"of_read": of_read, "of_next_sums": of_next_sums, "of_z": of_z}
    own = {name: value for name, value in given._asdict().items() if value is not None}
    kept = {**_prefixed("attended", attended), **_prefixed("into", into)}
    _check_shapes(**own, **cotangents, **kept)
    return _gradient(of_read, of_next_sums, r, given, attended, of_z, table, into, implementation)


def synchronised_attention_key_gradient(
    of_read: Tensor,
    read: Tensor,
    query: Tensor,
    log_sum_exp: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of keys and values, from all ticks at once.

    Parameters
    ----------
    of_read, read, query, log_sum_exp
        Of every tick, as :func:`synchronised_attention_gradient` takes them, (T, B, width); any
        strides.
    keys, values, implementation
        As in :func:`synchronised_attention`.

    Returns
    -------
    tuple of Tensor
        (B, G, S, K) and (B, G, S, V), apart also where keys and values are one tensor.

    Raises
    ------
    ValueError, UnsupportedImplementationError
        As in :func:`synchronised_attention`.
    """
    named = {"of_read": of_read, "read": read, "query": query, "log_sum_exp": log_sum_exp}
    shapes = {name: tuple(value.shape) for name, value in named.items()}
    spec.check_queries(shapes, tuple(keys.shape), tuple(values.shape))
    return _key_gradient(of_read, read, query, log_sum_exp, keys, values, implementation)


def _check_types(
    z: Tensor, pairs: Mapping[str, Tensor], exact: Mapping[str, Tensor | None]
) -> None:
    for name, index in pairs.items():
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            got = getattr(index, "dtype", type(index).__name__)
            raise TypeError(f"{name} must be a tensor of int64, got {got}")
    r = exact["r"]
    for name, value in exact.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
        if isinstance(r, Tensor) and value.dtype != r.dtype:
            raise TypeError(f"{name} is {value.dtype} and r is {r.dtype}; convert one of them")
        if torch.promote_types(value.dtype, z.dtype) != value.dtype:
            raise TypeError(
                f"{name} is {value.dtype} and z {z.dtype}; {name} must be of the same dtype or a "
                "wider one"
            )


def _check_shapes(**tensors: Tensor | None) -> None:
    spec.check_arguments({k: None if v is None else tuple(v.shape) for k, v in tensors.items()})


def _prefixed(name: str, tensors: Any) -> dict[str, Tensor]:
    return {} if tensors is None else {f"{name}.{k}": v for k, v in tensors._asdict().items()}


def _takes_plain_path(given: Inputs, implementation: str | None) -> bool:
    on_cpu = given.z.device.type == "cpu"
    if torch.compiler.is_compiling():
        # The custom op decides at run time: a new shape then changes no traced code.
        return implementation == "torch" or (on_cpu and implementation is None)
    if on_cpu and not usage.recording() and not dispatch.is_overridden(BINDING, implementation):
        return True
    decision = _decide(given.sizes, given.keys, given.values, "forward", implementation)
    return decision.implementation == "torch" and not usage.recording()


def _decide(
    sizes: tuple[int, ...],
    keys: Tensor,
    values: Tensor,
    direction: str,
    implementation: str | None,
) -> dispatch.Decision:
    flags = ("shared", is_shared(keys, values)), ("channels_first", is_channels_first(keys))
    problem = Problem(
        spec.NAME,
        tuple(zip(spec.DIMENSIONS, sizes, strict=True)),
        str(keys.dtype).removeprefix("torch."),
        flags,
        direction,
    )
    return dispatch.decide(problem, torch_device(keys.device), BINDING, implementation)


def _exact(tensor: Tensor) -> torch.dtype:
    """The dtype of sums and weights."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _plain_sums(given: Inputs) -> Tensor:
    exact = _exact(given.r)
    left, right = (given.z.index_select(1, index).to(exact) for index in given[1:3])
    found = left * right
    if given.sums is not None:
        found = torch.addcmul(found, given.r.to(exact), given.sums.to(exact))
    return found


def _plain_scores(found: Tensor, given: Inputs) -> tuple[Tensor, Tensor]:
    """The queries (B, G R K), and the scores (B, G, R, S)."""
    synchronisation = (found * given.scale.to(found.dtype)).to(given.in_weight.dtype)
    query = F.linear(synchronisation, given.in_weight, given.in_bias)
    return query, (_by_head(query, given.keys) @ given.keys.mT).to(_exact(given.keys))


def _by_head(rows: Tensor, keys: Tensor) -> Tensor:
    """(B, G R width) as (B, G, R, width) for keys, or values, of that width."""
    return rows.unflatten(1, (keys.shape[1], -1, keys.shape[3]))


def _plain(given: Inputs) -> tuple[Tensor, Tensor]:
    """The op in ordinary torch operations, differentiable any number of times."""
    found = _plain_sums(given)
    _, scores = _plain_scores(found, given)
    read = torch.softmax(scores, -1).to(given.values.dtype) @ given.values
    return read.flatten(1), found.to(given.r.dtype)


def _plain_tick(given: Inputs) -> Attended:
    found = _plain_sums(given)
    query, scores = _plain_scores(found, given)
    read = torch.softmax(scores, -1).to(given.values.dtype) @ given.values
    log_sum_exp = torch.logsumexp(scores, -1).flatten(1)
    return Attended(read.flatten(1), found.to(given.r.dtype), query, log_sum_exp)


def _plain_gradient(
    of_read: Tensor,
    of_next_sums: Tensor | None,
    decay: Tensor | None,
    given: Inputs,
    query: Tensor,
    of_z: Tensor,
) -> AttendedGradient:
    z, left, right, scale = given.z, given.left, given.right, given.scale
    exact = _exact(scale)
    _, of_scores = _plain_weights(of_read, query, given.keys, given.values)
    of_query = (of_scores @ given.keys).flatten(1)
    of_synchronisation = (of_query @ given.in_weight).to(exact)
    of_sums = of_synchronisation * scale.to(exact)
    if of_next_sums is not None:
        of_sums += of_next_sums if decay is None else of_next_sums * decay.to(exact)
    one, other = z.index_select(1, left).to(exact), z.index_select(1, right).to(exact)
    of_z.index_add_(1, left, (of_sums * other).to(of_z.dtype))
    of_z.index_add_(1, right, (of_sums * one).to(of_z.dtype))
    return AttendedGradient(of_query, of_synchronisation.to(scale.dtype), of_sums.to(scale.dtype))


def _plain_weights(
    of_read: Tensor, query: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """The attention weights, and the gradient of the scores before the softmax, (B, G, R, S)."""
    exact, dtype = _exact(keys), keys.dtype
    weights = torch.softmax((_by_head(query, keys) @ keys.mT).to(exact), -1)
    of_weights = (_by_head(of_read.to(dtype), values) @ values.mT).to(exact)
    of_scores: Tensor = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, exact)
    return weights.to(dtype), of_scores.to(dtype)


_PLAIN_ROWS = 1024
"""Rows, of ticks and samples, whose weights are in memory at once."""


def _plain_key_gradient(
    of_read: Tensor, query: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
    heads, step = keys.shape[1], max(1, _PLAIN_ROWS // max(1, len(keys)))

    def by_head(rows: Tensor) -> Tensor:
        """(ticks, B, G R width) as (B, G R' width), R' the queries of all ticks."""
        return rows.unflatten(2, (heads, -1)).permute(1, 2, 0, 3).flatten(1)

    for some in (slice(start, start + step) for start in range(0, len(query), step)):
        of_rows, rows = by_head(of_read[some]).to(keys.dtype), by_head(query[some])
        weights, of_scores = _plain_weights(of_rows, rows, keys, values)
        of_keys += of_scores.mT @ _by_head(rows, keys)
        of_values += weights.mT @ _by_head(of_rows, values)
    return of_keys, of_values


def _tick(into: Attended | None, given: Inputs, implementation: str | None) -> Attended:
    decision = _decide(given.sizes, given.keys, given.values, "forward", implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or 0 in given.sizes:
            return _written(into, _plain_tick(given))
        from . import triton_kernel

        into = _empty(given) if into is None else into
        everything: list[Any] = [*given, *into, decision.config, torch_device(given.z.device)]
        triton_kernel.forward(*everything)
    return into


def _written(into: Any, found: Any) -> Any:
    """What was found, in the tensors of ``into`` if these are given."""
    if into is None:
        return found
    for target, value in zip(into, found, strict=True):
        target.copy_(value)
    return into


def _empty(given: Inputs) -> Attended:
    z, keys, values = given.z, given.keys, given.values
    columns, pairs = given.in_weight.shape
    batch, rows = z.shape[0], columns // keys.shape[3]
    return Attended(
        values.new_empty((batch, rows * values.shape[3])),
        given.r.new_empty((batch, pairs)),
        z.new_empty((batch, columns)),
        z.new_empty((batch, rows), dtype=_exact(keys)),
    )


def _gradient(
    of_read: Tensor,
    of_next_sums: Tensor | None,
    decay: Tensor | None,
    given: Inputs,
    attended: Attended,
    of_z: Tensor,
    table: Table | None,
    into: AttendedGradient | None,
    implementation: str | None,
) -> AttendedGradient:
    """``of_next_sums`` counts ``decay`` times; without one, once."""
    decision = _decide(given.sizes, given.keys, given.values, "backward", implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or 0 in given.sizes:
            query = attended.query
            found = _plain_gradient(of_read, of_next_sums, decay, given, query, of_z)
            written: AttendedGradient = _written(into, found)
            return written
        from . import triton_kernel

        z, in_weight, scale = given.z, given.in_weight, given.scale
        if table is None:
            table = torch_functions.neuron_table(given.left, given.right, z.shape[1])
        if into is None:
            batch, (columns, pairs) = z.shape[0], in_weight.shape
            into = AttendedGradient(
                in_weight.new_empty((batch, columns)),
                scale.new_empty((batch, pairs)),
                scale.new_empty((batch, pairs)),
            )
        triton_kernel.gradient(
            *(of_read, of_next_sums, z, decay, scale, in_weight, given.keys, given.values),
            *(attended.read, attended.query, attended.log_sum_exp, table, of_z, *into),
            decision.config,
            torch_device(z.device),
        )
    return into


def _key_gradient(
    of_read: Tensor,
    read: Tensor,
    query: Tensor,
    log_sum_exp: Tensor,
    keys: Tensor,
    values: Tensor,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    heads, positions, width = keys.shape[1:]
    rows = query.shape[2] // (heads * width)
    # Activations and pairs have no part in it: the queries' sizes say all.
    sizes = (keys.shape[0], 1, 1, heads, rows, positions, width, values.shape[3])
    decision = _decide(sizes, keys, values, "key_gradient", implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or not keys.numel():
            return _plain_key_gradient(of_read, query, keys, values)
        from . import triton_kernel

        delta = (of_read.to(log_sum_exp.dtype) * read).unflatten(2, (heads * rows, -1)).sum(3)
        return triton_kernel.key_gradient(
            of_read,
            delta,
            query,
            log_sum_exp,
            keys,
            values,
            decision.config,
            torch_device(keys.device),
        )


Four = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("ml_networks::synchronised_attention", mutates_args=())
def _forward_op(
    z: Tensor,
    left: Tensor,
    right: Tensor,
    r: Tensor,
    scale: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    keys: Tensor,
    values: Tensor,
    sums: Tensor | None,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = Inputs(z, left, right, r, scale, in_weight, in_bias, keys, values, sums)
    found = _tick(None, given, implementation)
    return found.read, found.sums, found.query, found.log_sum_exp


@_forward_op.register_fake
def _(*arguments: Any) -> Four:
    found = _empty(Inputs(*arguments[:10]))
    return found.read, found.sums, found.query, found.log_sum_exp


@torch.library.custom_op("ml_networks::synchronised_attention_backward", mutates_args=())
def _backward_op(
    z: Tensor,
    left: Tensor,
    right: Tensor,
    r: Tensor,
    scale: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    keys: Tensor,
    values: Tensor,
    sums: Tensor | None,
    read: Tensor,
    new_sums: Tensor,
    query: Tensor,
    log_sum_exp: Tensor,
    of_read: Tensor,
    of_sums: Tensor,
    of_both: bool,
    implementation: str | None,
) -> list[Tensor]:
    """The gradients of z, r, scale, in_weight, in_bias and sums and, if wanted, those of keys and
    values; what is not there is empty."""
    exact = _exact(r)
    of_z = torch.zeros(z.shape, dtype=_exact(z), device=z.device)
    attended = Attended(read, new_sums, query, log_sum_exp)
    # In float32 until all is summed up.
    wide = AttendedGradient(
        torch.empty_like(query), *(new_sums.new_empty(new_sums.shape, dtype=exact) for _ in "ab")
    )
    given = Inputs(z, left, right, r, scale, in_weight, in_bias, keys, values, sums)
    of_later = of_sums.to(exact)
    _gradient(of_read, of_later, None, given, attended, of_z, None, wide, implementation)
    of_r = of_before = None
    if sums is not None:
        of_r = (wide.sums * sums).sum(0).to(r.dtype)
        of_before = (wide.sums * r).to(sums.dtype)
    synchronisation = (new_sums * scale).to(in_weight.dtype)
    of_keys = of_values = None
    if of_both:
        of_keys, of_values = _key_gradient(
            of_read[None],
            read[None],
            query[None],
            log_sum_exp[None],
            keys,
            values,
            implementation,
        )
    return [
        of_z.to(z.dtype),
        torch.zeros_like(r) if of_r is None else of_r,
        (wide.synchronisation * new_sums).sum(0).to(scale.dtype),
        wide.query.mT @ synchronisation,
        wide.query.sum(0),
        *(z.new_empty(0) if x is None else x for x in (of_before, of_keys, of_values)),
    ]


@_backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    given, of_both = Inputs(*arguments[:10]), arguments[-2]

    def like(value: Tensor | None) -> Tensor:
        return given.z.new_empty(0) if value is None else value.new_empty(value.shape)

    found = [like(value) for value in (given.z, *given[3:7], given.sums)]
    both = (torch.empty_like(x) if of_both else like(None) for x in (given.keys, given.values))
    return [*found, *both]


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    *tensors, ctx.implementation = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output)


def _forward_gradient(ctx: Any, of_read: Tensor, of_sums: Tensor, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    of_both = any(ctx.needs_input_grad[7:9])
    of_z, of_r, of_scale, of_weight, of_bias, of_before, of_keys, of_values = _backward_op(
        *saved, of_read, of_sums, of_both, ctx.implementation
    )
    both = (of_keys, of_values) if of_both else (None, None)
    last = None if saved[9] is None else of_before
    return of_z, None, None, of_r, of_scale, of_weight, of_bias, *both, last, None


_forward_op.register_autograd(_forward_gradient, setup_context=_setup_forward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.of_both, _ = inputs
    ctx.save_for_backward(*tensors)


def _second_gradient(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
    """The derivative of the backward op, through the plain path. What it knows of the results is a
    function of its other inputs."""
    z, left, right, *others = ctx.saved_tensors
    *weights, sums, _, _, _, _, of_read, of_sums = others

    def gradients(*given: Any) -> list[Tensor]:
        z, r, scale, in_weight, in_bias, keys, values, sums, of_read, of_sums = given
        tensors = z, left, right, r, scale, in_weight, in_bias, keys, values, sums
        results = _plain(Inputs(*tensors))
        inputs = [z, r, scale, in_weight, in_bias, *([] if sums is None else [sums])]
        inputs += [keys, values] if ctx.of_both else []
        return list(
            torch.autograd.grad(
                results, inputs, (of_read, of_sums), create_graph=True, materialize_grads=True
            )
        )

    kept = [*cotangents[:5], *([] if sums is None else cotangents[5:6])]
    kept += cotangents[6:] if ctx.of_both else []
    found = plain_vjp(gradients, (z, *weights, sums, of_read, of_sums), kept)
    of_z, *of_weights, of_before, of_of_read, of_of_sums = found
    nothing = (None,) * 4
    return of_z, None, None, *of_weights, of_before, *nothing, of_of_read, of_of_sums, None, None


_backward_op.register_autograd(_second_gradient, setup_context=_setup_backward)


def _call(
    inputs: Mapping[str, Tensor], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor]:
    given = dict(inputs)
    keys = given["keys"].mT if flags["channels_first"] else given["keys"]
    given |= {"keys": keys, "values": keys if flags["shared"] else given["values"]}
    read, sums = synchronised_attention(**given, implementation=implementation)
    return {"read": read, "new_sums": sums}


BINDING = Binding(
    op=spec.NAME,
    framework="torch",
    implementations=("torch", "triton"),
    call=_call,
    differentiable=("z", "r", "scale", "in_weight", "in_bias", "keys", "values", "sums"),
    kernel_module="triton_kernel",
)
