"""The Pallas kernel of synchronised attention.

XLA fuses the gather of the pairs and the sums; the kernel is what follows the queries: a program
walks over the positions of one set of keys, or a part of them, with an online softmax. As in
`triton_kernel` scores are positions by queries, so queries come and results go features first, and
the last feature of a width of one more than a power of two stays beside the products. On a GPU
what reaches beyond an array is masked by hand; on a TPU positions are padded.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..core import pallas
from ..core.device import Device
from .spec import Config, padded, split_positions, split_width


class _Plan(NamedTuple):
    """What the kernel of a call knows beside its blocks. ``each``: the positions of a program."""

    queries: int
    positions: int
    key_width: int
    value_width: int
    shared: bool
    block: int
    each: int


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _parts(width: int) -> tuple[int, bool]:
    """The columns of a tile, and whether the last feature is beside them."""
    return split_width(width) if pallas.masks_blocks() else (width, False)


def _load(reference: Any, at: tuple[Any, Any], real: Any) -> Array:
    return pallas.load(reference.at[at], real if pallas.masks_blocks() else None)


def _tile(reference: Any, first: Any, plan: _Plan, width: int) -> tuple[Array, Array | None]:
    """Positions from ``first`` on, zeros beyond, and their last feature as a column."""
    main, last = _parts(width)
    here = first + _iota((plan.block, main), 0) < plan.positions
    real = here & (_iota((plan.block, main), 1) < width)
    rows = pl.ds(first, plan.block)
    tile = _load(reference, (rows, pl.ds(0, main)), real)
    if not last:
        return tile, None
    here = first + _iota((plan.block, 1), 0) < plan.positions
    return tile, _load(reference, (rows, pl.ds(main, 1)), here).astype(jnp.float32)


def _kernel(query: Any, keys: Any, *references: Any, plan: _Plan) -> None:
    values = keys if plan.shared else references[0]
    read, log_sum_exp = references[-2:]
    rows = query.shape[-1]
    key_main, key_last = _parts(plan.key_width)
    value_main, value_last = _parts(plan.value_width)
    real = (_iota((key_main, rows), 0) < plan.key_width) & (
        _iota((key_main, rows), 1) < plan.queries
    )
    line = _iota((1, rows), 1) < plan.queries
    q = _load(query, (pl.ds(0, key_main), pl.ds(0, rows)), real)
    q_last: Any = 0.0
    if key_last:
        q_last = _load(query, (pl.ds(key_main, 1), pl.ds(0, rows)), line).astype(jnp.float32)
    start = pl.program_id(1) * plan.each

    def step(index: Any, carry: Any) -> Any:
        largest, total, main, extra = carry
        first = start + index * plan.block
        k, k_last = _tile(keys, first, plan, plan.key_width)
        v, v_last = k, k_last
        if not plan.shared:
            v, v_last = _tile(values, first, plan, plan.value_width)
        scores = pallas.dot(k, q)
        if k_last is not None:
            scores = scores + k_last * q_last
        scores = jnp.where(first + _iota(scores.shape, 0) < plan.positions, scores, -jnp.inf)
        highest = jnp.maximum(largest, jnp.max(scores, axis=0, keepdims=True))
        # A row that has seen nothing finite: -inf - -inf would be NaN for ever.
        base = jnp.where(highest == -jnp.inf, 0.0, highest)
        weights = jnp.exp(scores - base)
        decay = jnp.exp(largest - base)
        total = total * decay + jnp.sum(weights, axis=0, keepdims=True)
        if v_last is not None:
            extra = extra * decay + jnp.sum(weights * v_last, axis=0, keepdims=True)
        main = main * decay + pallas.dot(v, weights.astype(v.dtype), transpose_left=True)
        return highest, total, main, extra

    nothing = jnp.zeros((1, rows), jnp.float32)
    carry = nothing - jnp.inf, nothing, jnp.zeros((value_main, rows), jnp.float32), nothing
    tiles = jnp.minimum(plan.each, plan.positions - start + plan.block - 1)
    steps = jax.lax.div(tiles, plan.block)
    largest, total, main, extra = jax.lax.fori_loop(0, steps, step, carry)
    mask = pallas.masks_blocks()
    real = (_iota(main.shape, 0) < plan.value_width) & (_iota(main.shape, 1) < plan.queries)
    target = read.at[pl.ds(0, value_main), pl.ds(0, rows)]
    pallas.store(target, (main / total).astype(read.dtype), real if mask else None)
    if value_last:
        target = read.at[pl.ds(value_main, 1), pl.ds(0, rows)]
        pallas.store(target, (extra / total).astype(read.dtype), line)
    pallas.store(log_sum_exp, largest + jnp.log(total), line if mask else None)


@partial(jax.jit, static_argnames=("config", "device"))
def attend(
    query: Array, keys: Array, values: Array | None, *, config: Config, device: Device
) -> Array:
    """What queries (B, G, R, K) read of keys (B, G, S, K) and values (B, G, S, V), or None where
    the keys are the values; nothing may be empty. ``device`` keys the compiled code."""
    batch, heads, queries, key_width = query.shape
    positions, value_width = (keys if values is None else values).shape[2:]
    planes, block = batch * heads, config.block_positions
    splits, each = split_positions(planes, positions, config, device.processors)
    plan = _Plan(queries, positions, key_width, value_width, values is None, block, each)
    whole = splits * each
    rows, key_side, value_side = queries, key_width, value_width
    if pallas.masks_blocks():
        whole = padded(positions, block)
        rows, key_side, value_side = map(padded, (queries, key_width, value_width))

    def planes_of(array: Array) -> Array:
        array = array.reshape(planes, *array.shape[2:])
        if pallas.masks_blocks():
            return array
        return jnp.pad(array, [(0, 0), (0, whole - positions), (0, 0)])

    def tokens(side: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, whole, side), lambda plane, split: (plane, 0, 0))

    def part(side: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, side, rows), lambda plane, split: (split, plane, 0, 0))

    arrays = [query.reshape(planes, queries, key_width).mT, planes_of(keys)]
    in_specs = [
        pl.BlockSpec((None, key_side, rows), lambda plane, split: (plane, 0, 0)),
        tokens(key_side),
    ]
    if values is not None:
        arrays.append(planes_of(values))
        in_specs.append(tokens(value_side))
    dtype = keys.dtype if splits == 1 else jnp.float32
    parts, log_sum_exp = pallas.call(
        partial(_kernel, plan=plan),
        grid=(planes, splits),
        in_specs=in_specs,
        out_specs=[part(value_side), part(1)],
        out_shape=[
            jax.ShapeDtypeStruct((splits, planes, value_width, queries), dtype),
            jax.ShapeDtypeStruct((splits, planes, 1, queries), jnp.float32),
        ],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        name="synchronised_attention",
    )(*arrays)
    read = parts[0]
    if splits > 1:
        shares = jax.nn.softmax(log_sum_exp, axis=0)
        # A part with no finite score has a share of 0 and says NaN.
        read = jnp.where(shares == 0.0, 0.0, parts * shares).sum(0).astype(keys.dtype)
    return read.mT.reshape(batch, heads, queries, value_width)
