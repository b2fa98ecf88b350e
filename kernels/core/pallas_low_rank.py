"""A linear layer with a low-rank term in its epilogue: the Pallas kernels that several ops launch.

    y = x W^T + bias + q U^T,    q = after * ((before * x V) M),    or q given

Rows come in groups, each with adapters of its own; shared adapters are one group. Arrays are
padded to whole tiles, so that no kernel masks anything.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from . import pallas
from .device import Device

SMALLEST_DOT = 16


class Tile(NamedTuple):
    """What of a `Config` the kernels take."""

    block_rows: int
    block_columns: int
    block_depth: int
    num_warps: int
    num_stages: int


def _ranks(rank: int) -> int:
    """The power of two that holds a rank; a dot wants 16."""
    return max(1 << max(rank - 1, 0).bit_length(), SMALLEST_DOT)


def _padded(array: Array, *sizes: int) -> Array:
    """``array`` with zeros up to ``sizes`` on its last axes."""
    first = array.ndim - len(sizes)
    wanted = (*array.shape[:first], *sizes)
    if array.shape == wanted:
        return array
    return jnp.pad(array, [(0, new - old) for old, new in zip(array.shape, wanted, strict=True)])


def _up(size: int, block: int) -> int:
    return -(-size // block) * block


def _linear_kernel(
    *refs: Any, inputs: tuple[str, ...], rank: int, tile: Tile, depth_first: bool
) -> None:
    named = dict(zip(inputs, refs, strict=False))
    y_ref, *t_refs = refs[len(inputs) :]
    x_ref, weight_ref, u_ref = (named[name] for name in ("x", "weight", "u"))
    depth, ranks = x_ref.shape[1], u_ref.shape[1]
    project = "v" in named

    def step(i: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        at = pl.ds(i * tile.block_depth, tile.block_depth)
        left = x_ref[:, at]
        if depth_first:
            total = carry[0] + pallas.dot(left, weight_ref[at, :])
        else:
            total = carry[0] + pallas.dot(left, weight_ref[:, at], transpose_right=True)
        if not project:
            return (total,)
        return total, carry[1] + pallas.dot(left, named["v"][at, :])

    sums = [jnp.zeros(y_ref.shape, jnp.float32)]
    if project:
        sums.append(jnp.zeros((y_ref.shape[0], ranks), jnp.float32))
    total, *low = jax.lax.fori_loop(0, depth // tile.block_depth, step, tuple(sums))
    if project:
        for t_ref in t_refs:
            t_ref[...] = low[0].astype(t_ref.dtype)
        q = low[0] * named["before"][...].astype(jnp.float32)
        if "mix" in named:
            q = pallas.dot(q.astype(named["mix"].dtype), named["mix"][...])
            q = q * named["after"][...].astype(jnp.float32)
        # An infinite x makes NaN of the zeros beyond the rank.
        q = jnp.where(jax.lax.broadcasted_iota(jnp.int32, q.shape, 1) < rank, q, 0.0)
    else:
        q = named["q"][...]
    total += pallas.dot(q.astype(u_ref.dtype), u_ref[...], transpose_right=True)
    if "bias" in named:
        total += named["bias"][...].astype(jnp.float32)
    y_ref[...] = total.astype(y_ref.dtype)


@partial(jax.jit, static_argnames=("depth_first", "tile", "device"))
def linear(
    x: Array,
    weight: Array,
    bias: Array | None,
    u: Array,
    *,
    v: Array | None = None,
    before: Array | None = None,
    mix: Array | None = None,
    after: Array | None = None,
    q: Array | None = None,
    depth_first: bool = False,
    tile: Tile,
    device: Device,
) -> tuple[Array, Array | None]:
    """Launch on ``x`` (groups, rows, in), ``weight`` (out, in), or (in, out) if ``depth_first``,
    and ``u`` (groups, out, rank). Either ``v`` (groups, in, rank), ``before`` (groups, rows, rank)
    and, for ``M``, ``mix`` (rank, rank) and ``after``, or ``q`` (groups, rows, rank). ``device``
    keys the compiled code.

    Returns y (groups, rows, out) and ``x V`` (groups, rows, rank), None where q is given.
    """
    groups, rows, depth = x.shape
    columns, rank = u.shape[1:]
    all_rows, all_columns = _up(rows, tile.block_rows), _up(columns, tile.block_columns)
    all_depth, ranks = _up(depth, tile.block_depth), _ranks(rank)
    by_row = pl.BlockSpec((None, tile.block_rows, ranks), lambda g, i, j: (g, i, 0))
    arrays: dict[str, tuple[Array, pl.BlockSpec]] = {
        "x": (
            _padded(x, all_rows, all_depth),
            pl.BlockSpec((None, tile.block_rows, all_depth), lambda g, i, j: (g, i, 0)),
        ),
        "weight": (
            _padded(weight, all_depth, all_columns),
            pl.BlockSpec((all_depth, tile.block_columns), lambda g, i, j: (0, j)),
        )
        if depth_first
        else (
            _padded(weight, all_columns, all_depth),
            pl.BlockSpec((tile.block_columns, all_depth), lambda g, i, j: (j, 0)),
        ),
        "u": (
            _padded(u, all_columns, ranks),
            pl.BlockSpec((None, tile.block_columns, ranks), lambda g, i, j: (g, j, 0)),
        ),
    }
    if bias is not None:
        line = pl.BlockSpec((1, tile.block_columns), lambda g, i, j: (0, j))
        arrays["bias"] = _padded(bias[None], 1, all_columns), line
    for name, value in (("before", before), ("after", after), ("q", q)):
        if value is not None:
            arrays[name] = _padded(value, all_rows, ranks), by_row
    if mix is not None:
        square = pl.BlockSpec((ranks, ranks), lambda g, i, j: (0, 0))
        arrays["mix"] = _padded(mix, ranks, ranks), square
    out_shape = [jax.ShapeDtypeStruct((groups, all_rows, all_columns), x.dtype)]
    out_specs = [
        pl.BlockSpec((None, tile.block_rows, tile.block_columns), lambda g, i, j: (g, i, j))
    ]
    if v is not None:
        whole = pl.BlockSpec((None, all_depth, ranks), lambda g, i, j: (g, 0, 0))
        arrays["v"] = _padded(v, all_depth, ranks), whole
        out_shape.append(jax.ShapeDtypeStruct((groups, all_rows, ranks), x.dtype))
        out_specs.append(by_row)
    y, *t = pallas.call(
        partial(
            _linear_kernel, inputs=tuple(arrays), rank=rank, tile=tile, depth_first=depth_first
        ),
        out_shape=out_shape,
        grid=(groups, all_rows // tile.block_rows, all_columns // tile.block_columns),
        in_specs=[spec for _, spec in arrays.values()],
        out_specs=out_specs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        name="low_rank_linear",
    )(*(array for array, _ in arrays.values()))
    return y[:, :rows, :columns], t[0][:, :rows, :rank] if t else None


def _gradient_kernel(
    dy_ref: Any, u_ref: Any, q_ref: Any, dq_ref: Any, du_ref: Any, *, block_columns: int
) -> None:
    q = q_ref[...]

    def step(i: Any, dq: Array) -> Array:
        at = pl.ds(i * block_columns, block_columns)
        d = dy_ref[:, at]
        du_ref[at, :] = pallas.dot(d, q, transpose_left=True)
        return dq + pallas.dot(d, u_ref[at, :])

    steps = dy_ref.shape[1] // block_columns
    dq_ref[...] = jax.lax.fori_loop(0, steps, step, jnp.zeros(dq_ref.shape, jnp.float32))


@partial(jax.jit, static_argnames=("tile", "device"))
def gradient(dy: Array, u: Array, q: Array, *, tile: Tile, device: Device) -> tuple[Array, Array]:
    """One pass over ``dy`` (groups, rows, out) for ``dy U`` (groups, rows, rank) and ``dy^T q``
    (groups, out, rank), both float32. ``device`` keys the compiled code."""
    groups, rows, columns = dy.shape
    rank = u.shape[2]
    all_rows, all_columns = _up(rows, tile.block_rows), _up(columns, tile.block_columns)
    ranks, tiles = _ranks(rank), all_rows // tile.block_rows
    by_row = pl.BlockSpec((None, tile.block_rows, ranks), lambda g, i: (g, i, 0))
    dq, du = pallas.call(
        partial(_gradient_kernel, block_columns=tile.block_columns),
        out_shape=[
            jax.ShapeDtypeStruct((groups, all_rows, ranks), jnp.float32),
            jax.ShapeDtypeStruct((groups, tiles, all_columns, ranks), jnp.float32),
        ],
        grid=(groups, tiles),
        in_specs=[
            pl.BlockSpec((None, tile.block_rows, all_columns), lambda g, i: (g, i, 0)),
            pl.BlockSpec((None, all_columns, ranks), lambda g, i: (g, 0, 0)),
            by_row,
        ],
        out_specs=[
            by_row,
            pl.BlockSpec((None, None, all_columns, ranks), lambda g, i: (g, i, 0, 0)),
        ],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        name="low_rank_linear_gradient",
    )(
        _padded(dy, all_rows, all_columns),
        _padded(u, all_columns, ranks),
        _padded(q, all_rows, ranks),
    )
    return dq[:, :rows, :rank], du.sum(1)[:, :columns, :rank]
