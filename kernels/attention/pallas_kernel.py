"""Pallas kernels of attention.

As in `triton_kernel`: an online softmax forward, and backward the scores again from the
log-sum-exp of each row, once for the gradient of the queries and once for that of keys and values.
A plane is one head of one image. Whole planes of keys (or, for their gradients, of queries) are
one block, read tile by tile; what reaches beyond an array is masked by hand.

The log-sum-exp of a row without keys is +inf: its weights are 0 then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..core import pallas
from ..core.device import Device
from ..core.dropout import threshold
from ..core.jax_functions import dropout_keeps, dropout_row_keys
from .spec import Config, padded


class _Plan(NamedTuple):
    """What the kernels of one call know beside their blocks."""

    queries: int
    keys: int
    width: int
    causal: bool
    scale: float
    dropout: float
    mask: str | None
    config: Config

    def real(self, first: Any, tokens: int, shape: tuple[int, int]) -> Array | None:
        """Which elements of a tile of tokens from ``first`` on exist."""
        if not pallas.masks_blocks():
            return None
        return (first + _iota(shape, 0) < tokens) & (_iota(shape, 1) < self.width)

    def load(self, reference: Any, first: Any, block: int, tokens: int) -> Array:
        """Tokens from ``first`` on of a plane, zeros beyond."""
        shape = block, reference.shape[-1]
        part = reference.at[pl.ds(first, block), :]
        return pallas.load(part, self.real(first, tokens, shape))

    def lines(self, reference: Any, first: Any, beyond: float) -> Array:
        """One number for each query from ``first`` on, as a column."""
        block = self.config.block_queries
        row = first + _iota((block, 1), 0)
        mask = row < self.queries if pallas.masks_blocks() else None
        column = pallas.load(reference.at[pl.ds(first, block), :], mask)
        return jnp.where(row < self.queries, column, beyond)

    def scores(self, query: Array, key: Array, mask: Any, rows: Any, columns: Any) -> Array:
        """A tile of scores, -inf where a query does not see a key. ``rows`` and ``columns`` are
        where it begins; ``mask`` holds its rows, or one for all."""
        scores = pallas.dot(query, key, transpose_right=True) * self.scale
        row, column = rows + _iota(scores.shape, 0), columns + _iota(scores.shape, 1)
        seen = (row < self.queries) & (column < self.keys)
        if mask is not None:
            given = self._mask_tile(mask, rows, columns)
            if self.mask == "boolean":
                seen = seen & (given != 0)
            else:
                scores = scores + given.astype(jnp.float32)
        if self.causal:
            seen = seen & (column <= row)
        return jnp.where(seen, scores, -jnp.inf)

    def _mask_tile(self, mask: Any, rows: Any, columns: Any) -> Array:
        shape = (
            min(self.config.block_queries, mask.shape[0]),
            min(self.config.block_keys, mask.shape[1]),
        )
        at = (
            pl.ds(rows if shape[0] > 1 else 0, shape[0]),
            pl.ds(columns if shape[1] > 1 else 0, shape[1]),
        )
        real = None
        if pallas.masks_blocks():
            of_row = (rows + _iota(shape, 0) < self.queries) | (shape[0] == 1)
            of_column = (columns + _iota(shape, 1) < self.keys) | (shape[1] == 1)
            real = of_row & of_column
        return pallas.load(mask.at[at], real)

    def keeps(self, seed: Any, plane: Any, rows: Any, columns: Any, shape: Any) -> Array:
        """Which weights of a tile dropout leaves."""
        row = plane * self.queries + rows + _iota((shape[0], 1), 0)
        words = seed[0][...], seed[1][...]
        k0, k1 = dropout_row_keys(words, row)
        column = columns + _iota((1, shape[1]), 1)
        return dropout_keeps(k0, k1, column, threshold(self.dropout))

    def steps(self, of: str) -> int:
        """Tiles of ``queries`` or ``keys``."""
        return pl.cdiv(getattr(self, of), getattr(self.config, f"block_{of}"))


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _forward_kernel(*references: Any, plan: _Plan) -> None:
    query, key, value, *more, output, lse = references
    mask, seed = _optional(plan, more)
    block_queries, block_keys = plan.config.block_queries, plan.config.block_keys
    plane, rows = pl.program_id(0), pl.program_id(1) * block_queries
    q = plan.load(query, rows, block_queries, plan.queries)

    def step(index: Any, carry: Any) -> Any:
        largest, total, sums = carry
        columns = index * block_keys
        k = plan.load(key, columns, block_keys, plan.keys)
        scores = plan.scores(q, k, mask, rows, columns)
        highest = jnp.maximum(largest, jnp.max(scores, axis=1, keepdims=True))
        # A row that has seen no key yet: -inf - -inf would be NaN.
        base = jnp.where(highest == -jnp.inf, 0.0, highest)
        weights = jnp.exp(scores - base)
        decay = jnp.exp(largest - base)
        total = total * decay + jnp.sum(weights, axis=1, keepdims=True)
        if plan.dropout:
            kept = plan.keeps(seed, plane, rows, columns, weights.shape)
            weights = jnp.where(kept, weights / (1.0 - plan.dropout), 0.0)
        v = plan.load(value, columns, block_keys, plan.keys)
        return highest, total, sums * decay + pallas.dot(weights.astype(v.dtype), v)

    start = (
        jnp.full((block_queries, 1), -jnp.inf, jnp.float32),
        jnp.zeros((block_queries, 1), jnp.float32),
        jnp.zeros((block_queries, query.shape[-1]), jnp.float32),
    )
    largest, total, sums = jax.lax.fori_loop(0, _last_step(plan, rows), step, start)
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    result = sums / divisor
    in_range = rows + _iota((block_queries, 1), 0) < plan.queries
    masked = pallas.masks_blocks()
    real = plan.real(rows, plan.queries, (block_queries, output.shape[-1]))
    pallas.store(output, result.astype(output.dtype), real)
    logarithm = jnp.where(empty, jnp.inf, largest + jnp.log(divisor))
    pallas.store(lse, logarithm, in_range if masked else None)


def _last_step(plan: _Plan, rows: Any) -> Any:
    """How many tiles of keys the queries from ``rows`` on may see."""
    if not plan.causal:
        return plan.steps("keys")
    seen = rows + plan.config.block_queries + plan.config.block_keys - 1
    return jnp.minimum(jax.lax.div(seen, plan.config.block_keys), plan.steps("keys"))


def _optional(plan: _Plan, references: list[Any]) -> tuple[Any, Any]:
    """The mask and the words of the seed, None where the call has none."""
    mask = references[0] if plan.mask else None
    return mask, (references[-2:] if plan.dropout else None)


def _query_gradient_kernel(*references: Any, plan: _Plan) -> None:
    query, key, value, of_output, lse, deltas, *more, of_query = references
    mask, seed = _optional(plan, more)
    block_queries, block_keys = plan.config.block_queries, plan.config.block_keys
    plane, rows = pl.program_id(0), pl.program_id(1) * block_queries
    q = plan.load(query, rows, block_queries, plan.queries)
    g = plan.load(of_output, rows, block_queries, plan.queries)
    logarithm, delta = plan.lines(lse, rows, jnp.inf), plan.lines(deltas, rows, 0.0)

    def step(index: Any, gradient: Array) -> Array:
        columns = index * block_keys
        k = plan.load(key, columns, block_keys, plan.keys)
        weights = jnp.exp(plan.scores(q, k, mask, rows, columns) - logarithm)
        v = plan.load(value, columns, block_keys, plan.keys)
        of_weights = pallas.dot(g, v, transpose_right=True)
        if plan.dropout:
            kept = plan.keeps(seed, plane, rows, columns, weights.shape)
            of_weights = jnp.where(kept, of_weights / (1.0 - plan.dropout), 0.0)
        of_scores = weights * (of_weights - delta)
        return gradient + pallas.dot(of_scores.astype(k.dtype), k)

    start = jnp.zeros((block_queries, query.shape[-1]), jnp.float32)
    gradient = jax.lax.fori_loop(0, _last_step(plan, rows), step, start) * plan.scale
    real = plan.real(rows, plan.queries, (block_queries, of_query.shape[-1]))
    pallas.store(of_query, gradient.astype(of_query.dtype), real)


def _key_gradient_kernel(*references: Any, plan: _Plan) -> None:
    query, key, value, of_output, lse, deltas, *more, of_key, of_value = references
    mask, seed = _optional(plan, more)
    block_queries, block_keys = plan.config.block_queries, plan.config.block_keys
    plane, columns = pl.program_id(0), pl.program_id(1) * block_keys
    k = plan.load(key, columns, block_keys, plan.keys)
    v = plan.load(value, columns, block_keys, plan.keys)

    def step(index: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        key_sums, value_sums = carry
        rows = index * block_queries
        q = plan.load(query, rows, block_queries, plan.queries)
        g = plan.load(of_output, rows, block_queries, plan.queries)
        logarithm, delta = plan.lines(lse, rows, jnp.inf), plan.lines(deltas, rows, 0.0)
        weights = jnp.exp(plan.scores(q, k, mask, rows, columns) - logarithm)
        of_weights = pallas.dot(g, v, transpose_right=True)
        left = weights
        if plan.dropout:
            kept = plan.keeps(seed, plane, rows, columns, weights.shape)
            left = jnp.where(kept, weights / (1.0 - plan.dropout), 0.0)
            of_weights = jnp.where(kept, of_weights / (1.0 - plan.dropout), 0.0)
        of_scores = weights * (of_weights - delta)
        return (
            key_sums + pallas.dot(of_scores.astype(q.dtype), q, transpose_left=True),
            value_sums + pallas.dot(left.astype(g.dtype), g, transpose_left=True),
        )

    zeros = jnp.zeros((block_keys, key.shape[-1]), jnp.float32)
    first = jax.lax.div(columns, block_queries) if plan.causal else 0
    key_sums, value_sums = jax.lax.fori_loop(first, plan.steps("queries"), step, (zeros, zeros))
    real = plan.real(columns, plan.keys, (block_keys, of_key.shape[-1]))
    pallas.store(of_key, (key_sums * plan.scale).astype(of_key.dtype), real)
    pallas.store(of_value, value_sums.astype(of_value.dtype), real)


class _Call:
    """The arrays of a call as planes, and the blocks that programs get of them."""

    def __init__(
        self,
        query: Array,
        key: Array,
        mask: Array | None,
        seed: Array | None,
        causal: bool,
        scale: float,
        dropout: float,
        config: Config,
    ) -> None:
        batch, self.heads, queries, width = query.shape
        keys = key.shape[2]
        self.groups = self.heads // key.shape[1]
        kind = None if mask is None else "boolean" if mask.dtype == bool else "additive"
        self.plan = _Plan(queries, keys, width, causal, scale, dropout, kind, config)
        self.planes = batch * self.heads
        self.columns = padded(width, 16) if pallas.masks_blocks() else width
        self.more: list[Array] = []
        self.specs: list[pl.BlockSpec] = []
        if mask is not None:
            self._add_mask(mask)
        if seed is not None:
            word = pl.BlockSpec((1, 1), lambda plane, tile: (0, 0))
            self.more += [seed[0].reshape(1, 1), seed[1].reshape(1, 1)]
            self.specs += [word, word]

    def _add_mask(self, mask: Array) -> None:
        heads, (batches, head_count, rows, columns) = self.heads, mask.shape
        mask = mask.astype(jnp.int8) if mask.dtype == bool else mask
        sides = [
            1 if size == 1 else self.whole(of)
            for size, of in ((rows, "queries"), (columns, "keys"))
        ]
        if not pallas.masks_blocks():
            padding = [(0, 0), (0, 0), (0, sides[0] - rows), (0, sides[1] - columns)]
            mask = jnp.pad(mask, padding)

        def place(plane: Any, tile: Any) -> tuple[Any, ...]:
            batch = jax.lax.div(plane, heads) if batches > 1 else 0
            return batch, jax.lax.rem(plane, heads) if head_count > 1 else 0, 0, 0

        self.more.append(mask)
        self.specs.append(pl.BlockSpec((None, None, *sides), place))

    def whole(self, of: str) -> int:
        """Tokens of a block that holds a whole plane: a power of two on a GPU, where nothing is
        read but by tiles, and a whole number of tiles on a TPU."""
        tokens, block = getattr(self.plan, of), getattr(self.plan.config, f"block_{of}")
        if pallas.masks_blocks():
            return padded(tokens, block)
        return pl.cdiv(tokens, block) * block

    def planes_of(self, array: Array, of: str) -> Array:
        """(planes, tokens, features); on a TPU with whole tiles of tokens."""
        array = array.reshape(-1, *array.shape[2:])
        if not pallas.masks_blocks():
            array = jnp.pad(array, [(0, 0), (0, self.whole(of) - array.shape[1]), (0, 0)])
        return array

    def all_tokens(self, of: str, columns: int | None = None) -> pl.BlockSpec:
        """A whole plane of queries, or of the keys that its head reads."""
        groups = self.groups if of == "keys" else 1
        shape = (None, self.whole(of), columns or self.columns)
        # A TPU's index maps know no floor division.
        return pl.BlockSpec(shape, lambda plane, tile: (jax.lax.div(plane, groups), 0, 0))

    def tile(self, of: str, columns: int | None = None) -> pl.BlockSpec:
        """One tile of a plane that is written."""
        shape = (None, getattr(self.plan.config, f"block_{of}"), columns or self.columns)
        return pl.BlockSpec(shape, lambda plane, tile: (plane, tile, 0))

    def run(self, kernel: Callable[..., None], of: str, **options: Any) -> Any:
        """A grid of planes by tiles of ``of``."""
        config = self.plan.config
        return pallas.call(
            partial(kernel, plan=self.plan),
            grid=(self.planes, self.plan.steps(of)),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **options,
        )


_STATIC = ("causal", "scale", "dropout", "config", "device")


@partial(jax.jit, static_argnames=_STATIC)
def forward(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    seed: Array | None,
    *,
    causal: bool,
    scale: float,
    dropout: float,
    config: Config,
    device: Device,
) -> tuple[Array, Array]:
    """The output and the log-sum-exp of each row, (planes, queries, 1). Nothing may be empty;
    ``device`` keys the compiled code."""
    call = _Call(query, key, mask, seed, causal, scale, dropout, config)
    q, k, v = (
        call.planes_of(array, of)
        for array, of in ((query, "queries"), (key, "keys"), (value, "keys"))
    )
    line = jax.ShapeDtypeStruct((*q.shape[:2], 1), jnp.float32)
    output, lse = call.run(
        _forward_kernel,
        "queries",
        in_specs=[call.all_tokens("queries"), *[call.all_tokens("keys")] * 2, *call.specs],
        out_specs=[call.tile("queries"), call.tile("queries", 1)],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), line],
        name="attention",
    )(q, k, v, *call.more)
    queries = query.shape[2]
    return output[:, :queries].reshape(query.shape), lse[:, :queries]


@partial(jax.jit, static_argnames=_STATIC)
def backward(
    query: Array,
    key: Array,
    value: Array,
    of_output: Array,
    mask: Array | None,
    seed: Array | None,
    output: Array,
    lse: Array,
    *,
    causal: bool,
    scale: float,
    dropout: float,
    config: Config,
    device: Device,
) -> tuple[Array, Array, Array]:
    """The gradients of query, key and value."""
    call = _Call(query, key, mask, seed, causal, scale, dropout, config)
    delta = (output.astype(jnp.float32) * of_output.astype(jnp.float32)).sum(-1, keepdims=True)
    arrays = [
        call.planes_of(array, of)
        for array, of in (
            (query, "queries"),
            (key, "keys"),
            (value, "keys"),
            (of_output, "queries"),
            (lse.reshape(delta.shape), "queries"),
            (delta, "queries"),
        )
    ]
    queries, keys = call.all_tokens("queries"), call.all_tokens("keys")
    line = call.all_tokens("queries", 1)
    in_specs = [queries, keys, keys, queries, line, line, *call.specs]
    shape = arrays[0].shape
    (of_query,) = call.run(
        _query_gradient_kernel,
        "queries",
        in_specs=in_specs,
        out_specs=[call.tile("queries")],
        out_shape=[jax.ShapeDtypeStruct(shape, query.dtype)],
        name="attention_query_gradient",
    )(*arrays, *call.more)
    # Heads that share keys add up outside, in float32.
    dtype = key.dtype if call.groups == 1 else jnp.float32
    shape = call.planes, arrays[1].shape[1], arrays[1].shape[2]
    found = call.run(
        _key_gradient_kernel,
        "keys",
        in_specs=in_specs,
        out_specs=[call.tile("keys")] * 2,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype)] * 2,
        name="attention_key_gradient",
    )(*arrays, *call.more)
    batch, key_heads, tokens, width = key.shape
    of_key, of_value = (
        part[:, :tokens]
        .reshape(batch, key_heads, call.groups, tokens, width)
        .sum(2)
        .astype(key.dtype)
        for part in found
    )
    return of_query[:, : query.shape[2]].reshape(query.shape), of_key, of_value
