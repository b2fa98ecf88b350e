"""Triton kernels of the hypernetwork low-rank linear layer, and their launches.

With ``c~ = [c; 1]`` the generators act as shared adapters of width rank * (context + 1), laid out
(rank, context + 1): ``p = x V~``, ``t = p c~``, ``q = (scale * gate * t) c~^T``, ``y = x W^T +
bias + q U~^T``. Forward is one kernel: p is taken along with the base product, q made from it in
registers. Backward is one pass over the output's gradient dY for dq, the gradients of context,
gate and the generator of U; the gradient of x is the low-rank linear kernel on dY; the generator
of V takes a matrix product. No atomics: results repeat bit for bit.

Inside a tile both axes are padded to powers of two; element i belongs to rank i // CONTEXTS and to
context i % CONTEXTS.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..core.ahead_of_time import Compilation
from ..core.device import Device
from ..core.problem import Problem
from ..core.triton_low_rank import Tile, compilation, dot, linear, linear_compilation, precision
from .spec import Config, padded


@triton.jit
def _contexts(context, row, in_rows, j, features, context_row, context_column):
    """c~ of each row, (rows, CONTEXTS)."""
    place = context + (row * context_row)[:, None] + (j * context_column)[None, :]
    c = tl.load(place, mask=in_rows[:, None] & (j < features)[None, :], other=0.0)
    return tl.where((j == features)[None, :], 1.0, c.to(tl.float32))


@triton.jit
def _gates(c, gate_weight, gate_bias, j, features):
    """sigmoid(gate_weight c + gate_bias) as a column, and [gate_weight, gate_bias]."""
    w = tl.load(gate_weight + j, mask=j < features, other=0.0).to(tl.float32)
    w += tl.load(gate_bias + j * 0, mask=j == features, other=0.0).to(tl.float32)
    logit = tl.sum(c * w[None, :], axis=1)
    return (1.0 / (1.0 + tl.exp(-logit)))[:, None], w


@triton.jit(do_not_specialize=["rows", "rank"])
def forward_kernel(
    x,
    weight,
    bias,
    context,
    gate_weight,
    gate_bias,
    u_weight,
    u_bias,
    v_weight,
    v_bias,
    p,
    y,
    rows,
    columns,
    depth,
    rank,
    features,
    scale,
    x_row,
    x_depth,
    weight_column,
    weight_depth,
    context_row,
    context_column,
    RANKS: tl.constexpr,
    CONTEXTS: tl.constexpr,
    SAVE: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One tile of y."""
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    column_tile = tl.program_id(0) % column_tiles
    row_tile = tl.program_id(0) // column_tiles
    row = row_tile.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_tile.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    i = tl.arange(0, RANKS * CONTEXTS)
    r = i // CONTEXTS
    of_pair = i % CONTEXTS
    is_bias = of_pair == features
    is_real = (r < rank) & (of_pair <= features)
    in_rows = row < rows
    in_columns = column < columns
    element = y.dtype.element_ty

    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    wide = tl.zeros([BLOCK_ROWS, RANKS * CONTEXTS], tl.float32)
    for start in range(0, depth, BLOCK_DEPTH):
        k = start + tl.arange(0, BLOCK_DEPTH)
        in_depth = k < depth
        k = k.to(tl.int64)
        left = tl.load(
            x + (row * x_row)[:, None] + (k * x_depth)[None, :],
            mask=in_rows[:, None] & in_depth[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + (column * weight_column)[None, :] + (k * weight_depth)[:, None],
            mask=in_depth[:, None] & in_columns[None, :],
            other=0.0,
        )
        total = dot(left, right, total, PRECISION, UPCAST)
        line = (k * rank)[:, None] + r[None, :]
        thin = tl.load(
            tl.where(
                is_bias[None, :], v_bias + line, v_weight + line * features + of_pair[None, :]
            ),
            mask=in_depth[:, None] & is_real[None, :],
            other=0.0,
        )
        wide = dot(left, thin, wide, PRECISION, UPCAST)

    real = in_rows[:, None] & is_real[None, :]
    if SAVE & (column_tile == 0):
        line = (row * rank)[:, None] + r[None, :]
        tl.store(p + line * (features + 1) + of_pair[None, :], wide.to(element), mask=real)
    # An infinite x makes NaN of the zeros beyond the real width.
    wide = tl.where(real, wide, 0.0)
    j = tl.arange(0, CONTEXTS)
    c = _contexts(context, row, in_rows, j, features, context_row, context_column)
    gates, _ = _gates(c, gate_weight, gate_bias, j, features)
    wide = tl.reshape(wide, (BLOCK_ROWS, RANKS, CONTEXTS))
    low = tl.sum(wide * c[:, None, :], axis=2) * gates * scale
    q = tl.reshape(low[:, :, None] * c[:, None, :], (BLOCK_ROWS, RANKS * CONTEXTS))
    q = tl.where(real, q, 0.0)
    line = (column * rank)[None, :] + r[:, None]
    real = is_real[:, None] & in_columns[None, :]
    thin = tl.load(
        u_weight + line * features + of_pair[:, None], mask=real & ~is_bias[:, None], other=0.0
    )
    thin += tl.load(u_bias + line, mask=real & is_bias[:, None], other=0.0)
    total = dot(q.to(element), thin, total, PRECISION, UPCAST)
    if BIAS:
        total += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    place = y + (row * columns)[:, None] + column[None, :]
    tl.store(place, total.to(element), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize=["rows", "rank", "tiles"])
def gradient_kernel(
    dy,
    context,
    gate_weight,
    gate_bias,
    u_weight,
    u_bias,
    p,
    dp,
    dcontext,
    dlogit,
    du,
    rows,
    columns,
    rank,
    features,
    tiles,
    scale,
    dy_row,
    dy_column,
    context_row,
    context_column,
    RANKS: tl.constexpr,
    CONTEXTS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One pass over dY: dp, the gradients of context and of the gate's logit, and dU~ in partial
    sums over ``tiles`` tiles of rows each."""
    chunk = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, RANKS * CONTEXTS)
    r = i // CONTEXTS
    of_pair = i % CONTEXTS
    is_bias = of_pair == features
    is_real = (r < rank) & (of_pair <= features)
    j = tl.arange(0, CONTEXTS)
    element = dp.dtype.element_ty
    width = rank * (features + 1)
    at = r * (features + 1) + of_pair
    for tile in range(tiles):
        row = (chunk * tiles + tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_rows = row < rows
        real = in_rows[:, None] & is_real[None, :]
        p_place = (row * width)[:, None] + at[None, :]
        c = _contexts(context, row, in_rows, j, features, context_row, context_column)
        gates, gate_line = _gates(c, gate_weight, gate_bias, j, features)
        wide = tl.load(p + p_place, mask=real, other=0.0).to(tl.float32)
        wide = tl.reshape(wide, (BLOCK_ROWS, RANKS, CONTEXTS))
        low = tl.sum(wide * c[:, None, :], axis=2) * scale
        q = (low * gates)[:, :, None] * c[:, None, :]
        q = tl.reshape(q, (BLOCK_ROWS, RANKS * CONTEXTS)).to(element)
        dq = tl.zeros([BLOCK_ROWS, RANKS * CONTEXTS], tl.float32)
        for start in range(0, columns, BLOCK_COLUMNS):
            column = start + tl.arange(0, BLOCK_COLUMNS)
            in_columns = column < columns
            column = column.to(tl.int64)
            d = tl.load(
                dy + (row * dy_row)[:, None] + (column * dy_column)[None, :],
                mask=in_rows[:, None] & in_columns[None, :],
                other=0.0,
            )
            line = (column * rank)[:, None] + r[None, :]
            mask = in_columns[:, None] & is_real[None, :]
            thin = tl.load(
                tl.where(
                    is_bias[None, :], u_bias + line, u_weight + line * features + of_pair[None, :]
                ),
                mask=mask,
                other=0.0,
            )
            dq = dot(d, thin, dq, PRECISION, UPCAST)
            place = du + ((chunk * columns + column) * width)[:, None] + at[None, :]
            before = tl.zeros([BLOCK_COLUMNS, RANKS * CONTEXTS], tl.float32)
            if tile > 0:
                before = tl.load(place, mask=mask, other=0.0)
            tl.store(place, dot(tl.trans(d), q, before, PRECISION, UPCAST), mask=mask)
        # An infinite dy makes NaN of the zeros beyond the real width.
        dq = tl.where(real, dq, 0.0)
        dq = tl.reshape(dq, (BLOCK_ROWS, RANKS, CONTEXTS))
        ds = tl.sum(dq * c[:, None, :], axis=2)
        slope = gates * (1.0 - gates)
        of_logit = tl.sum(ds * low, axis=1)[:, None] * slope
        dt = ds * gates * scale
        dc = tl.sum(dq * (low * gates)[:, :, None] + wide * dt[:, :, None], axis=1)
        dc += of_logit * gate_line[None, :]
        tl.store(
            dcontext + (row * features)[:, None] + j[None, :],
            dc.to(element),
            mask=in_rows[:, None] & (j < features)[None, :],
        )
        tl.store(dlogit + row[:, None], of_logit, mask=in_rows[:, None])
        of_p = tl.reshape(dt[:, :, None] * c[:, None, :], (BLOCK_ROWS, RANKS * CONTEXTS))
        tl.store(dp + p_place, of_p.to(element), mask=real)
        # The next tile reads the partial sums that other threads of this program wrote.
        tl.debug_barrier()


def _sides(rank: int, features: int) -> dict[str, int]:
    """RANKS and CONTEXTS, their product at least what a dot takes."""
    contexts = padded(features + 1)
    return {"RANKS": max(padded(rank), 16 // contexts), "CONTEXTS": contexts}


def forward(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    context: torch.Tensor,
    gate_weight: torch.Tensor,
    gate_bias: torch.Tensor,
    u_weight: torch.Tensor,
    u_bias: torch.Tensor,
    v_weight: torch.Tensor,
    v_bias: torch.Tensor,
    scale: float,
    save: bool,
    config: Config,
    device: Device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on ``rows`` (n, in) and ``context`` (n, features), n > 0; returns y (n, out) and, for
    the backward pass, p (n, rank * (features + 1))."""
    count, depth = rows.shape
    columns, features = weight.shape[0], context.shape[1]
    rank = u_bias.shape[0] // columns
    y = rows.new_empty(count, columns)
    p = rows.new_empty(count if save else 0, rank * (features + 1))
    generators = (gate_weight, gate_bias, u_weight, u_bias, v_weight, v_bias)
    grid = triton.cdiv(count, config.block_rows) * triton.cdiv(columns, config.block_columns)
    forward_kernel[(grid,)](
        *(rows, weight, y if bias is None else bias.contiguous(), context),
        *(tensor.contiguous() for tensor in generators),
        *(p, y, count, columns, depth, rank, features, scale),
        *rows.stride(),
        *weight.stride(),
        *context.stride(),
        **_sides(rank, features),
        SAVE=save,
        BIAS=bias is not None,
        PRECISION=precision(device),
        UPCAST=device.interpreted and rows.dtype == torch.bfloat16,
        BLOCK_ROWS=config.block_rows,
        BLOCK_COLUMNS=config.block_columns,
        BLOCK_DEPTH=config.block_depth,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y, p


def backward(
    dy: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    context: torch.Tensor,
    gate_weight: torch.Tensor,
    gate_bias: torch.Tensor,
    u_weight: torch.Tensor,
    u_bias: torch.Tensor,
    v_weight: torch.Tensor,
    v_bias: torch.Tensor,
    p: torch.Tensor,
    scale: float,
    wants_x: bool,
    config: Config,
    device: Device,
) -> tuple[torch.Tensor, ...]:
    """The gradients of x (empty if not wanted), context and the six generator arrays for that of
    y, (n, out), n > 0, of any strides."""
    count, columns = dy.shape
    features = context.shape[1]
    rank = u_bias.shape[0] // columns
    dp, dcontext = torch.empty_like(p), rows.new_empty(count, features)
    chunks, tiles = _chunks(count, config, device)
    exact: dict[str, Any] = {"dtype": torch.float32, "device": dy.device}
    dlogit = torch.empty((count, 1), **exact)
    du = torch.empty((chunks, columns * rank, features + 1), **exact)
    gradient_kernel[(chunks,)](
        *(dy, context),
        *(tensor.contiguous() for tensor in (gate_weight, gate_bias, u_weight, u_bias)),
        *(p, dp, dcontext, dlogit, du, count, columns, rank, features, tiles, scale),
        *dy.stride(),
        *context.stride(),
        **_sides(rank, features),
        PRECISION=precision(device),
        UPCAST=device.interpreted and dy.dtype == torch.bfloat16,
        BLOCK_ROWS=config.pass_rows,
        BLOCK_COLUMNS=config.pass_columns,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    dx = dy.new_empty(0)
    if wants_x:
        generator = torch.cat((v_weight, v_bias.unsqueeze(1)), 1).reshape(1, rows.shape[1], -1)
        dx, _ = linear(
            dy.unsqueeze(0),
            weight.mT,
            None,
            generator,
            None,
            None,
            dp,
            scale=1.0,
            gate_rows=1,
            save=False,
            tile=_tile(config),
            device=device,
        )
    du = du.sum(0).to(dy.dtype)
    dv = (rows.mT @ dp).reshape(-1, features + 1)
    dgate = dlogit.to(dy.dtype).mT @ context
    split = [part for whole in (du, dv) for part in (whole[:, :-1], whole[:, -1])]
    return dx, dcontext, dgate, dlogit.sum(0).to(dy.dtype), *(part.contiguous() for part in split)


def _tile(config: Config) -> Tile:
    return Tile(
        config.block_rows,
        config.block_columns,
        config.block_depth,
        config.num_warps,
        config.num_stages,
    )


def _chunks(rows: int, config: Config, device: Device) -> tuple[int, int]:
    """Programs along the rows, and tiles of rows for each. A chunk costs a partial sum as large
    as the generator of U, so there are no more than fill the device."""
    tiles = triton.cdiv(rows, config.pass_rows)
    each = triton.cdiv(tiles, max(1, min(tiles, device.processors)))
    return triton.cdiv(tiles, each), each


def compilations(problem: Problem, config: Config, device: Device) -> list[Compilation]:
    """The specialisations that ``problem`` launches in training, for contiguous arrays."""
    rows, depth, columns, rank, features = (size for _, size in problem.dims)
    launch: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    sizes = {"rows": rows, "columns": columns, "rank": rank, "features": features}
    strides = {"context_row": features, "context_column": 1}
    constants = {
        **_sides(rank, features),
        "PRECISION": precision(device),
        "UPCAST": False,
    }
    if problem.direction == "forward":
        strides |= {"x_row": depth, "x_depth": 1, "weight_column": depth, "weight_depth": 1}
        constants |= {"SAVE": True, "BIAS": True, "BLOCK_DEPTH": config.block_depth}
        constants |= {"BLOCK_ROWS": config.block_rows, "BLOCK_COLUMNS": config.block_columns}
        programs = triton.cdiv(rows, config.block_rows)
        programs *= triton.cdiv(columns, config.block_columns)
        integers = {**sizes, "depth": depth, **strides}
        kernel = forward_kernel
        return [
            compilation(kernel, problem.dtype, integers, constants, programs=programs, **launch)
        ]
    chunks, tiles = _chunks(rows, config, device)
    integers = {**sizes, "tiles": tiles, **strides, "dy_row": columns, "dy_column": 1}
    constants |= {"BLOCK_ROWS": config.pass_rows, "BLOCK_COLUMNS": config.pass_columns}
    one_pass = compilation(
        gradient_kernel,
        problem.dtype,
        integers,
        constants,
        exact=("dlogit", "du"),
        programs=chunks,
        **launch,
    )
    of_x = linear_compilation(
        problem.dtype,
        *(1, rows, columns, depth, rank * (features + 1)),
        transposed=True,
        **dict.fromkeys(("project", "save", "gate", "bias"), False),
        tile=_tile(config),
        device=device,
    )
    return [one_pass, of_x]
