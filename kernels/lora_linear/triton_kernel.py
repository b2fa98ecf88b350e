"""Triton kernels of the low-rank linear layer, and their launches.

Forward: one kernel, the product with the base weight, with ``t = V^T x`` taken along and
``U (gate * t)`` added in the epilogue. Backward: one pass over the output's gradient dY gives
``h = U^T dY`` and the gradients of u and the gate; the forward's kernel then gives dX from dY with
the roles of u and v swapped; the gradient of v is a matrix product of x and h. No atomics: partial
sums go to memory and are added in a fixed order, so results repeat bit for bit.

Where each row has adapters of its own there is no product to fuse into: the framework takes the
base product, and one program a row does the rest, reading u and v once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..core.ahead_of_time import Compilation
from ..core.device import Device
from ..core.problem import Problem
from ..core.triton_low_rank import (
    Tile,
    compilation,
    dot,
    linear,
    linear_compilation,
    precision,
    ranks,
)
from .spec import Config


@triton.jit(
    do_not_specialize=[
        *("rows", "rank", "gate_rows", "chunks", "tiles", "dy_group", "u_group"),
        *("gate_sample", "gate_rank"),
    ]
)
def gradient_kernel(
    dy,
    u,
    t,
    gate,
    h,
    products,
    du,
    rows,
    columns,
    rank,
    gate_rows,
    chunks,
    tiles,
    scale,
    dy_group,
    dy_row,
    dy_column,
    u_group,
    u_column,
    u_rank,
    gate_sample,
    gate_rank,
    RANKS: tl.constexpr,
    GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One pass over dY: ``h = scale * gate * (dY U)``, ``products = scale * t * (dY U)``, whose
    sum is the gate's gradient, and dU, in partial sums over ``tiles`` tiles of rows each."""
    program = tl.program_id(0)
    chunk = program % chunks
    group = (program // chunks).to(tl.int64)
    r = tl.arange(0, RANKS)
    in_rank = r < rank
    element = h.dtype.element_ty
    for tile in range(tiles):
        row = (chunk.to(tl.int64) * tiles + tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_rows = row < rows
        t_mask = in_rows[:, None] & in_rank[None, :]
        t_place = ((group * rows + row) * rank)[:, None] + r[None, :]
        low = tl.load(t + t_place, mask=t_mask, other=0.0).to(tl.float32) * scale
        if GATE:
            sample = (group * rows + row) // gate_rows
            gates = tl.load(
                gate + (sample * gate_sample)[:, None] + (r * gate_rank)[None, :],
                mask=t_mask,
                other=0.0,
            ).to(tl.float32)
            gated = low * gates
        else:
            gated = low
        high = tl.zeros([BLOCK_ROWS, RANKS], tl.float32)
        for start in range(0, columns, BLOCK_COLUMNS):
            column = start + tl.arange(0, BLOCK_COLUMNS)
            in_columns = column < columns
            column = column.to(tl.int64)
            d = tl.load(
                dy + group * dy_group + (row * dy_row)[:, None] + (column * dy_column)[None, :],
                mask=in_rows[:, None] & in_columns[None, :],
                other=0.0,
            )
            u_place = u + group * u_group + (column * u_column)[:, None] + (r * u_rank)[None, :]
            u_mask = in_columns[:, None] & in_rank[None, :]
            thin = tl.load(u_place, mask=u_mask, other=0.0)
            high = dot(d, thin, high, PRECISION, UPCAST)
            place = du + program.to(tl.int64) * columns * rank
            place += (column * rank)[:, None] + r[None, :]
            before = tl.load(place, mask=u_mask & (tile > 0), other=0.0)
            added = dot(tl.trans(d), gated.to(element), before, PRECISION, UPCAST)
            tl.store(place, added, mask=u_mask)
        if GATE:
            tl.store(products + t_place, low * high, mask=t_mask)
            high *= gates
        tl.store(h + t_place, (high * scale).to(element), mask=t_mask)
        # The next tile reads the partial sums that other threads of this program wrote.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["rank", "x_row", "u_row", "v_row", "gate_row", "gate_rank"])
def own_kernel(
    x,
    u,
    v,
    gate,
    t,
    y,
    columns,
    depth,
    rank,
    scale,
    x_row,
    x_depth,
    u_row,
    u_column,
    u_rank,
    v_row,
    v_depth,
    v_rank,
    gate_row,
    gate_rank,
    RANKS: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: ``t = V^T x``, then ``y += scale * U (gate * t)``."""
    row = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, RANKS)
    in_rank = r < rank
    sums = tl.zeros([BLOCK, RANKS], tl.float32)
    for start in range(0, depth, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask = k < depth
        k = k.to(tl.int64)
        value = tl.load(x + row * x_row + k * x_depth, mask=mask, other=0.0).to(tl.float32)
        place = v + row * v_row + (k * v_depth)[:, None] + (r * v_rank)[None, :]
        thin = tl.load(place, mask=mask[:, None] & in_rank[None, :], other=0.0)
        sums += value[:, None] * thin.to(tl.float32)
    low = tl.where(in_rank, tl.sum(sums, axis=0), 0.0)
    tl.store(t + row * rank + r, low.to(y.dtype.element_ty), mask=in_rank)
    if GATE:
        gates = tl.load(gate + row * gate_row + r * gate_rank, mask=in_rank, other=0.0)
        low *= gates.to(tl.float32)
    low *= scale
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        column = column.to(tl.int64)
        place = u + row * u_row + (column * u_column)[:, None] + (r * u_rank)[None, :]
        thin = tl.load(place, mask=mask[:, None] & in_rank[None, :], other=0.0)
        added = tl.sum(thin.to(tl.float32) * low[None, :], axis=1)
        line = y + row * columns + column
        base = tl.load(line, mask=mask, other=0.0).to(tl.float32)
        tl.store(line, (base + added).to(y.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["rank", "dy_row", "x_row", "u_row", "v_row", "gate_row", "gate_rank"]
)
def own_gradient_kernel(
    dy,
    x,
    u,
    v,
    gate,
    t,
    dx,
    du,
    dv,
    products,
    columns,
    depth,
    rank,
    scale,
    dy_row,
    dy_column,
    x_row,
    x_depth,
    u_row,
    u_column,
    u_rank,
    v_row,
    v_depth,
    v_rank,
    gate_row,
    gate_rank,
    RANKS: tl.constexpr,
    GATE: tl.constexpr,
    WANTS_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: dU and ``h = U^T dY`` in one pass, dV and ``dx += V (gate * h)`` in another."""
    row = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, RANKS)
    in_rank = r < rank
    element = du.dtype.element_ty
    low = tl.load(t + row * rank + r, mask=in_rank, other=0.0).to(tl.float32) * scale
    gated = low
    if GATE:
        gates = tl.load(gate + row * gate_row + r * gate_rank, mask=in_rank, other=0.0)
        gates = gates.to(tl.float32)
        gated = low * gates
    sums = tl.zeros([BLOCK, RANKS], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        column = column.to(tl.int64)
        d = tl.load(dy + row * dy_row + column * dy_column, mask=mask, other=0.0)
        d = d.to(tl.float32)[:, None]
        both = mask[:, None] & in_rank[None, :]
        place = u + row * u_row + (column * u_column)[:, None] + (r * u_rank)[None, :]
        sums += d * tl.load(place, mask=both, other=0.0).to(tl.float32)
        place = du + ((row * columns + column) * rank)[:, None] + r[None, :]
        tl.store(place, (d * gated[None, :]).to(element), mask=both)
    high = tl.where(in_rank, tl.sum(sums, axis=0), 0.0)
    if GATE:
        tl.store(products + row * rank + r, low * high, mask=in_rank)
        high *= gates
    high *= scale
    for start in range(0, depth, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask = k < depth
        k = k.to(tl.int64)
        both = mask[:, None] & in_rank[None, :]
        value = tl.load(x + row * x_row + k * x_depth, mask=mask, other=0.0).to(tl.float32)
        place = dv + ((row * depth + k) * rank)[:, None] + r[None, :]
        tl.store(place, (value[:, None] * high[None, :]).to(element), mask=both)
        if WANTS_X:
            place = v + row * v_row + (k * v_depth)[:, None] + (r * v_rank)[None, :]
            thin = tl.load(place, mask=both, other=0.0).to(tl.float32)
            line = dx + row * depth + k
            base = tl.load(line, mask=mask, other=0.0).to(tl.float32)
            added = tl.sum(thin * high[None, :], axis=1)
            tl.store(line, (base + added).to(element), mask=mask)


_OWN_ELEMENTS = 2048
"""Of a row's adapter that its program holds at a time: 16 a thread."""


def _own_constants(rank: int) -> dict[str, int]:
    padded = triton.next_power_of_2(rank)
    return {"RANKS": padded, "BLOCK": max(_OWN_ELEMENTS // padded, 16)}


def _own_strides(gate: torch.Tensor | None, *arrays: torch.Tensor) -> tuple[int, ...]:
    gates = (0, 0) if gate is None else gate.stride()
    return *(stride for array in arrays for stride in array.stride()), *gates


def _tile(config: Config) -> Tile:
    return Tile(
        config.block_rows,
        config.block_columns,
        config.block_depth,
        config.num_warps,
        config.num_stages,
    )


def _grouped(rows: torch.Tensor, samples: int, per_sample: bool) -> torch.Tensor:
    """Rows (samples * n, width) by the adapter they meet."""
    groups = samples if per_sample else 1
    return rows.unflatten(0, (groups, rows.shape[0] // groups))


def _adapter(adapter: torch.Tensor) -> torch.Tensor:
    return adapter if adapter.ndim == 3 else adapter.unsqueeze(0)


def _gates(gate: torch.Tensor | None, samples: int, rank: int) -> torch.Tensor | None:
    return None if gate is None else gate.expand(samples, rank)


def forward(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    u: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor | None,
    samples: int,
    scale: float,
    save: bool,
    config: Config,
    device: Device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on ``rows`` (samples * n, in), n > 0; returns y (samples * n, out) and, for the
    backward pass, t (samples * n, rank)."""
    per_sample, rank = u.ndim == 3, u.shape[-1]
    gates = _gates(gate, samples, rank)
    if per_sample and rows.shape[0] == samples:
        y = torch.nn.functional.linear(rows, weight, bias)
        t = torch.empty((samples, rank), dtype=rows.dtype, device=rows.device)
        own_kernel[(samples,)](
            *(rows, u, v, y if gates is None else gates, t, y),
            *(y.shape[1], rows.shape[1], rank, scale),
            *_own_strides(gates, rows, u, v),
            GATE=gate is not None,
            **_own_constants(rank),
            num_warps=4,
        )
        return y, t if save else t[:0]
    return linear(
        _grouped(rows, samples, per_sample),
        weight,
        bias,
        _adapter(u),
        _adapter(v),
        gates,
        None,
        scale=scale,
        gate_rows=rows.shape[0] // samples,
        save=save,
        tile=_tile(config),
        device=device,
    )


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Of x, u and v, and of the gate before it is summed to the gate's shape: (samples, rank),
float32. The first is empty if not wanted, the last without a gate."""


def backward(
    dy: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor | None,
    t: torch.Tensor,
    samples: int,
    scale: float,
    wants_x: bool,
    config: Config,
    device: Device,
) -> Gradients:
    """The gradients for that of y, (samples * n, out), n > 0, of any strides."""
    per_sample, rank = u.ndim == 3, u.shape[-1]
    gates = _gates(gate, samples, rank)
    exact: dict[str, Any] = {"dtype": torch.float32, "device": dy.device}
    products = torch.empty(t.shape if gate is not None else (0,), **exact)
    if per_sample and rows.shape[0] == samples:
        return _own_backward(dy, rows, weight, u, v, gates, t, products, scale, wants_x)
    grouped = _grouped(dy, samples, per_sample)
    groups, count, columns = grouped.shape
    h = torch.empty_like(t)
    chunks, tiles = _chunks(count, config, groups, device)
    adapter = _adapter(u)
    du = torch.empty((groups, chunks, columns, rank), **exact)
    gradient_kernel[(groups * chunks,)](
        grouped,
        adapter,
        t,
        h if gates is None else gates,
        h,
        products,
        du,
        count,
        columns,
        rank,
        rows.shape[0] // samples,
        chunks,
        tiles,
        scale,
        *grouped.stride(),
        *adapter.stride(),
        *((0, 0) if gates is None else gates.stride()),
        RANKS=ranks(rank),
        GATE=gate is not None,
        PRECISION=precision(device),
        UPCAST=device.interpreted and dy.dtype == torch.bfloat16,
        BLOCK_ROWS=config.block_rows,
        BLOCK_COLUMNS=config.pass_columns,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    du = du.sum(1).to(dy.dtype).reshape(u.shape)
    dx = dy.new_empty(0)
    if wants_x:
        dx, _ = linear(
            grouped,
            weight.mT,
            None,
            _adapter(v),
            None,
            None,
            h,
            scale=1.0,
            gate_rows=1,
            save=False,
            tile=_tile(config),
            device=device,
        )
    by_group = _grouped(rows, samples, per_sample)
    dv = (by_group.mT @ h.view(groups, count, rank)).reshape(v.shape)
    if gate is not None:
        products = products.unflatten(0, (samples, rows.shape[0] // samples)).sum(1)
    return dx, du, dv, products


def _own_backward(
    dy: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor | None,
    t: torch.Tensor,
    products: torch.Tensor,
    scale: float,
    wants_x: bool,
) -> Gradients:
    count, rank = t.shape
    dx = dy @ weight if wants_x else dy.new_empty(0)
    du, dv = (dy.new_empty(adapter.shape) for adapter in (u, v))
    own_gradient_kernel[(count,)](
        *(dy, rows, u, v, t if gates is None else gates, t, dx, du, dv, products),
        *(u.shape[1], v.shape[1], rank, scale),
        *_own_strides(gates, dy, rows, u, v),
        GATE=gates is not None,
        WANTS_X=wants_x,
        **_own_constants(rank),
        num_warps=4,
    )
    return dx, du, dv, products


def _chunks(rows: int, config: Config, groups: int, device: Device) -> tuple[int, int]:
    """Programs along the rows of a group, and tiles of rows for each. A chunk costs a partial sum
    as large as u, so there are no more than fill the device."""
    tiles = triton.cdiv(rows, config.block_rows)
    each = triton.cdiv(tiles, max(1, min(tiles, device.processors // groups)))
    return triton.cdiv(tiles, each), each


def compilations(problem: Problem, config: Config, device: Device) -> list[Compilation]:
    """The specialisations that ``problem`` launches in training, for contiguous arrays and a
    gate."""
    samples, rows = problem["samples"], problem["rows"]
    width_in, width_out, rank = (problem[n] for n in ("in_features", "out_features", "rank"))
    per_sample = bool(problem.flag("per_sample", False))
    if per_sample and rows == 1:
        return [_own_compilation(problem)]
    groups, count = (samples, rows) if per_sample else (1, samples * rows)
    sizes = (groups, count, width_in, width_out, rank)
    if problem.direction == "forward":
        flags = dict.fromkeys(("project", "save", "gate", "bias"), True)
        return [
            linear_compilation(problem.dtype, *sizes, **flags, tile=_tile(config), device=device)
        ]
    chunks, tiles = _chunks(count, config, groups, device)
    integers = {
        "rows": count,
        "columns": width_out,
        "rank": rank,
        "gate_rows": rows,
        "chunks": chunks,
        "tiles": tiles,
        "dy_group": count * width_out,
        "dy_row": width_out,
        "dy_column": 1,
        "u_group": width_out * rank,
        "u_column": rank,
        "u_rank": 1,
        "gate_sample": 1,
        "gate_rank": 1,
    }
    constants = {
        "RANKS": ranks(rank),
        "GATE": True,
        "PRECISION": precision(device),
        "UPCAST": False,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLUMNS": config.pass_columns,
    }
    one_pass = compilation(
        gradient_kernel,
        problem.dtype,
        integers,
        constants,
        exact=("products", "du"),
        programs=groups * chunks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    flags = dict.fromkeys(("project", "save", "gate", "bias"), False)
    sizes = (groups, count, width_out, width_in, rank)
    of_x = linear_compilation(
        problem.dtype, *sizes, **flags, transposed=True, tile=_tile(config), device=device
    )
    return [one_pass, of_x]


def _own_compilation(problem: Problem) -> Compilation:
    width_in, width_out, rank = (problem[n] for n in ("in_features", "out_features", "rank"))
    integers = {
        "columns": width_out,
        "depth": width_in,
        "rank": rank,
        "dy_row": width_out,
        "x_row": width_in,
        "u_row": width_out * rank,
        "u_column": rank,
        "v_row": width_in * rank,
        "v_depth": rank,
        **dict.fromkeys(("dy_column", "x_depth", "u_rank", "v_rank", "gate_row", "gate_rank"), 1),
    }
    forward = problem.direction == "forward"
    flags = {"GATE": True} if forward else {"GATE": True, "WANTS_X": True}
    return compilation(
        own_kernel if forward else own_gradient_kernel,
        problem.dtype,
        integers,
        {**_own_constants(rank), **flags},
        exact=("products",),
        uses_dot=False,
        programs=problem["samples"],
        num_warps=4,
        num_stages=3,
    )
