"""Triton kernels of a whole narrow multi-layer perceptron, and their launches.

All parameters come in one buffer, and their gradients leave in one: weights, biases, norm weights,
norm biases, each with those of all layers one after the other.

A program takes a block of rows through all layers. Where a layer's weight fits whole (on chip),
the rows stay in registers between layers and the next weight is fetched meanwhile. Otherwise a
program writes its rows and, after a barrier, reads them back from cache, a few columns at a time.
The backward kernel leaves each layer's gradient before the norm; the gradients of the parameters
are products over the rows, all in one more launch, whose programs add up shares of the rows in a
fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..core import dropout as counter
from ..core.ahead_of_time import Compilation
from ..core.device import Device
from ..core.problem import Problem
from ..core.triton_functions import (
    activation,
    dropout_keeps,
    dropout_row_keys,
    row_statistics,
    scale_and_shift,
)
from .spec import Config, on_chip, padded

_PROGRAMS_PER_PROCESSOR = 4
_VECTOR_TILE = 128
_COUNTS = ["rows", "rows_each", "programs", "programs_each"]


@triton.jit
def _dot(left, right, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        # The interpreter cannot multiply matrices of bfloat16.
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _streamed(
    source, source_row, source_column, lane, in_range, weight, column, INNER: tl.constexpr,
    OUTER: tl.constexpr, INNER_STEP: tl.constexpr, OUTER_STEP: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_IN: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """A block of rows in memory times a weight, a few of the ``INNER`` common columns at a time.
    ``lane`` are the rows within the block, in the integers that its addresses take."""
    total = tl.zeros([BLOCK_ROWS, COLUMNS], tl.float32)
    for start in range(0, INNER, BLOCK_IN):
        k = start + tl.arange(0, BLOCK_IN)
        place = source + (lane * source_row)[:, None]
        place += (k.to(lane.dtype) * source_column)[None, :]
        left = tl.load(place, mask=in_range[:, None] & (k < INNER)[None, :], other=0.0)
        mask = (k < INNER)[:, None] & (column < OUTER)[None, :]
        right = weight + k[:, None] * INNER_STEP + column[None, :] * OUTER_STEP
        total = _dot(left, tl.load(right, mask=mask, other=0.0), total, PRECISION, UPCAST)
    return total


@triton.jit
def _held(
    left, weight, k, column, INNER: tl.constexpr, OUTER: tl.constexpr, INNER_STEP: tl.constexpr,
    OUTER_STEP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows on the chip times a weight that fits whole."""
    mask = (k < INNER)[:, None] & (column < OUTER)[None, :]
    right = weight + k[:, None] * INNER_STEP + column[None, :] * OUTER_STEP
    total = tl.zeros([left.shape[0], column.shape[0]], tl.float32)
    return _dot(left, tl.load(right, mask=mask, other=0.0), total, PRECISION, UPCAST)


@triton.jit
def _dropped(value, seed, layer, block, column, threshold, kept_scale):
    row = block + tl.arange(0, value.shape[0])
    high = (tl.full([], 0, tl.int64) + layer) << 32
    k0, k1 = dropout_row_keys(tl.load(seed) + high, row)
    keeps = dropout_keeps(k0[:, None], k1[:, None], column[None, :], threshold)
    return tl.where(keeps, value * kept_scale, 0.0)


@triton.jit
def _finished(
    z, biases, norm_weights, norm_biases, layer, pre, post, seed, block, inside, column, mask, eps,
    threshold, kept_scale, WIDTH: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, NORM_WEIGHT: tl.constexpr, NORM_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    KEEP: tl.constexpr, ON_CHIP: tl.constexpr,
):  # fmt: skip
    """What follows a hidden layer's product: the next layer's rows, also in memory where they are
    read there or kept for the backward pass. ``pre`` and ``post`` begin at the block's rows."""
    in_row = column < WIDTH
    vector = layer * WIDTH
    if BIAS:
        z += tl.load(biases + vector + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if KEEP:
        tl.store(pre + inside, z.to(pre.dtype.element_ty), mask=mask)
    if NORM != "none":
        mean, inverse = row_statistics(z, z, mask, eps, WIDTH, NORM, False)
        z = (z - mean[:, None]) * inverse[:, None]
    z, _ = scale_and_shift(
        z, norm_weights + vector, norm_biases + vector, column, in_row, NORM_WEIGHT, NORM_BIAS
    )
    h, _ = activation(z, ACTIVATION)
    if DROPOUT:
        h = _dropped(h, seed, layer, block, column, threshold, kept_scale)
    # What is not real must stay finite: the next layer multiplies it by zero.
    h = tl.where(mask, h, 0.0).to(post.dtype.element_ty)
    if KEEP or not ON_CHIP:
        tl.store(post + inside, h, mask=mask)
    if not ON_CHIP:
        tl.debug_barrier()
    return h


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x,
    parameters,
    seed,
    y,
    pre,
    post,
    pre_out,
    rows,
    x_row,
    x_column,
    eps,
    threshold,
    kept_scale,
    IN: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    LAYERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    NORM_WEIGHT: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEEP: tl.constexpr,
    ON_CHIP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One block of rows from ``x`` to ``y``."""
    SLOTS: tl.constexpr = LAYERS if KEEP else 2
    LAST: tl.constexpr = WIDTH * IN + (LAYERS - 1) * WIDTH * WIDTH
    hidden = parameters + WIDTH * IN
    biases = parameters + (LAST + OUT * WIDTH)
    norm_weights = biases + (LAYERS * WIDTH + OUT if BIAS else 0)
    norm_biases = norm_weights + (LAYERS * WIDTH if NORM_WEIGHT else 0)
    # Where a block begins takes 64 bits, what lies inside it 32: half the registers.
    block = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    lane, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, COLUMNS)
    out_column = tl.arange(0, OUT_COLUMNS)
    in_range = block + lane < rows
    mask = in_range[:, None] & (column < WIDTH)[None, :]
    inside = lane[:, None] * WIDTH + column[None, :]
    size = rows.to(tl.int64) * WIDTH
    pre += block * WIDTH
    post += block * WIDTH
    z = _streamed(
        x + block * x_row, x_row, x_column, lane.to(tl.int64), in_range, parameters, column, IN,
        WIDTH, 1, IN, COLUMNS, BLOCK_ROWS, BLOCK_IN, PRECISION, UPCAST,
    )  # fmt: skip
    for layer in range(LAYERS - 1):
        h = _finished(
            z, biases, norm_weights, norm_biases, layer, pre + layer * size,
            post + (layer % SLOTS) * size, seed, block, inside, column, mask, eps, threshold,
            kept_scale, WIDTH, NORM, ACTIVATION, BIAS, NORM_WEIGHT, NORM_BIAS, DROPOUT, KEEP,
            ON_CHIP,
        )  # fmt: skip
        weight = hidden + layer * (WIDTH * WIDTH)
        if ON_CHIP:
            z = _held(h, weight, column, column, WIDTH, WIDTH, 1, WIDTH, PRECISION, UPCAST)
        else:
            z = _streamed(
                post + (layer % SLOTS) * size, WIDTH, 1, lane, in_range, weight, column, WIDTH,
                WIDTH, 1, WIDTH, COLUMNS, BLOCK_ROWS, BLOCK_IN, PRECISION, UPCAST,
            )  # fmt: skip
    h = _finished(
        z, biases, norm_weights, norm_biases, LAYERS - 1, pre + (LAYERS - 1) * size,
        post + ((LAYERS - 1) % SLOTS) * size, seed, block, inside, column, mask, eps, threshold,
        kept_scale, WIDTH, NORM, ACTIVATION, BIAS, NORM_WEIGHT, NORM_BIAS, DROPOUT, KEEP, ON_CHIP,
    )  # fmt: skip
    if ON_CHIP:
        result = _held(
            h, parameters + LAST, column, out_column, WIDTH, OUT, 1, WIDTH, PRECISION, UPCAST
        )
    else:
        result = _streamed(
            post + ((LAYERS - 1) % SLOTS) * size, WIDTH, 1, lane, in_range, parameters + LAST,
            out_column, WIDTH, OUT, 1, WIDTH, OUT_COLUMNS, BLOCK_ROWS, BLOCK_IN, PRECISION, UPCAST,
        )  # fmt: skip
    out_mask = in_range[:, None] & (out_column < OUT)[None, :]
    outside = lane[:, None] * OUT + out_column[None, :]
    if BIAS:
        last_bias = biases + LAYERS * WIDTH + out_column
        bias = tl.load(last_bias, mask=out_column < OUT, other=0.0)
        result += bias.to(tl.float32)[None, :]
    if OUT_ACTIVATION != "Identity":
        if KEEP:
            tl.store(
                pre_out + block * OUT + outside, result.to(pre_out.dtype.element_ty), mask=out_mask
            )
        result, _ = activation(result, OUT_ACTIVATION)
    if DROPOUT:
        result = _dropped(result, seed, LAYERS, block, out_column, threshold, kept_scale)
    tl.store(y + block * OUT + outside, result.to(y.dtype.element_ty), mask=out_mask)


@triton.jit
def _pulled(
    grad, parameters, sums, layer, pre, of_pre, seed, block, inside, column, mask, eps, threshold,
    kept_scale, WIDTH: tl.constexpr, OUT: tl.constexpr, LAYERS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    NORM_WEIGHT: tl.constexpr, NORM_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    ON_CHIP: tl.constexpr,
):  # fmt: skip
    """The gradient of a hidden layer's product from that of its result. ``parameters`` and
    ``sums`` begin at the biases, ``pre`` and ``of_pre`` at the block's rows."""
    in_row = column < WIDTH
    vector = layer * WIDTH
    NORM_WEIGHTS: tl.constexpr = LAYERS * WIDTH + OUT if BIAS else 0
    NORM_BIASES: tl.constexpr = NORM_WEIGHTS + (LAYERS * WIDTH if NORM_WEIGHT else 0)
    z = tl.load(pre + inside, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    if NORM != "none":
        mean, inverse = row_statistics(z, z, mask, eps, WIDTH, NORM, False)
        z = tl.where(mask, (z - mean[:, None]) * inverse[:, None], 0.0)
    v, scale = scale_and_shift(
        z, parameters + NORM_WEIGHTS + vector, parameters + NORM_BIASES + vector, column, in_row,
        NORM_WEIGHT, NORM_BIAS,
    )  # fmt: skip
    if DROPOUT:
        grad = _dropped(grad, seed, layer, block, column, threshold, kept_scale)
    _, slope = activation(v, ACTIVATION)
    grad = tl.where(mask, grad * slope, 0.0)
    place = sums + vector + column
    if NORM_WEIGHT:
        tl.store(place + NORM_WEIGHTS, tl.sum(grad * z, axis=0), mask=in_row)
    if NORM_BIAS:
        tl.store(place + NORM_BIASES, tl.sum(grad, axis=0), mask=in_row)
    grad *= scale[None, :]
    if NORM != "none":
        along = tl.sum(grad * z, axis=1) / WIDTH
        level = tl.zeros([BLOCK_ROWS], tl.float32)
        if NORM == "layer":
            level = tl.sum(grad, axis=1) / WIDTH
        grad = (grad - level[:, None] - z * along[:, None]) * inverse[:, None]
        grad = tl.where(mask, grad, 0.0)
    if BIAS:
        tl.store(place, tl.sum(grad, axis=0), mask=in_row)
    grad = grad.to(of_pre.dtype.element_ty)
    tl.store(of_pre + inside, grad, mask=mask)
    if not ON_CHIP:
        tl.debug_barrier()
    return grad


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    parameters,
    seed,
    of_y,
    pre,
    pre_out,
    of_x,
    of_pre,
    of_out,
    sums,
    rows,
    of_y_row,
    of_y_column,
    eps,
    threshold,
    kept_scale,
    IN: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    LAYERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    NORM_WEIGHT: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    OF_X: tl.constexpr,
    ON_CHIP: tl.constexpr,
    VECTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One block of rows from ``of_y`` to ``of_x``, each layer's gradient before its norm on the
    way, and the block's share of the gradients of the ``VECTORS`` biases and norm weights."""
    LAST: tl.constexpr = WIDTH * IN + (LAYERS - 1) * WIDTH * WIDTH
    hidden = parameters + WIDTH * IN
    vectors = parameters + (LAST + OUT * WIDTH)
    sums += tl.program_id(0).to(tl.int64) * VECTORS
    block = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    lane, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, COLUMNS)
    out_column = tl.arange(0, OUT_COLUMNS)
    in_range = block + lane < rows
    mask = in_range[:, None] & (column < WIDTH)[None, :]
    inside = lane[:, None] * WIDTH + column[None, :]
    size = rows.to(tl.int64) * WIDTH
    pre += block * WIDTH
    of_pre += block * WIDTH
    of_out += block * OUT

    out_mask = in_range[:, None] & (out_column < OUT)[None, :]
    outside = lane[:, None] * OUT + out_column[None, :]
    place = of_y + ((block + lane) * of_y_row)[:, None]
    place += (out_column.to(tl.int64) * of_y_column)[None, :]
    grad = tl.load(place, mask=out_mask, other=0.0).to(tl.float32)
    if DROPOUT:
        grad = _dropped(grad, seed, LAYERS, block, out_column, threshold, kept_scale)
    if OUT_ACTIVATION != "Identity":
        result = tl.load(pre_out + block * OUT + outside, mask=out_mask, other=0.0).to(tl.float32)
        _, slope = activation(result, OUT_ACTIVATION)
        grad = tl.where(out_mask, grad * slope, 0.0)
    if BIAS:
        last_bias = sums + LAYERS * WIDTH + out_column
        tl.store(last_bias, tl.sum(grad, axis=0), mask=out_column < OUT)
    left = grad.to(of_out.dtype.element_ty)
    tl.store(of_out + outside, left, mask=out_mask)
    if ON_CHIP:
        of_h = _held(
            left, parameters + LAST, out_column, column, OUT, WIDTH, WIDTH, 1, PRECISION, UPCAST
        )
    else:
        tl.debug_barrier()
        of_h = _streamed(
            of_out, OUT, 1, lane, in_range, parameters + LAST, column, OUT, WIDTH, WIDTH, 1,
            COLUMNS, BLOCK_ROWS, BLOCK_IN, PRECISION, UPCAST,
        )  # fmt: skip
    for back in range(LAYERS - 1):
        layer = LAYERS - 1 - back
        of_z = _pulled(
            of_h, vectors, sums, layer, pre + layer * size, of_pre + layer * size, seed, block,
            inside, column, mask, eps, threshold, kept_scale, WIDTH, OUT, LAYERS, BLOCK_ROWS, NORM,
            ACTIVATION, BIAS, NORM_WEIGHT, NORM_BIAS, DROPOUT, ON_CHIP,
        )  # fmt: skip
        weight = hidden + (layer - 1) * (WIDTH * WIDTH)
        if ON_CHIP:
            of_h = _held(of_z, weight, column, column, WIDTH, WIDTH, WIDTH, 1, PRECISION, UPCAST)
        else:
            of_h = _streamed(
                of_pre + layer * size, WIDTH, 1, lane, in_range, weight, column, WIDTH, WIDTH,
                WIDTH, 1, COLUMNS, BLOCK_ROWS, BLOCK_IN, PRECISION, UPCAST,
            )  # fmt: skip
    of_z = _pulled(
        of_h, vectors, sums, 0, pre, of_pre, seed, block, inside, column, mask, eps, threshold,
        kept_scale, WIDTH, OUT, LAYERS, BLOCK_ROWS, NORM, ACTIVATION, BIAS, NORM_WEIGHT, NORM_BIAS,
        DROPOUT, ON_CHIP,
    )  # fmt: skip
    if OF_X:
        for start in range(0, IN, COLUMNS):
            n = start + column
            if ON_CHIP:
                share = _held(of_z, parameters, column, n, WIDTH, IN, IN, 1, PRECISION, UPCAST)
            else:
                share = _streamed(
                    of_pre, WIDTH, 1, lane, in_range, parameters, n, WIDTH, IN, IN, 1, COLUMNS,
                    BLOCK_ROWS, BLOCK_IN, PRECISION, UPCAST,
                )  # fmt: skip
            target = of_x + block * IN + lane[:, None] * IN + n[None, :]
            kept = in_range[:, None] & (n < IN)[None, :]
            tl.store(target, share.to(of_x.dtype.element_ty), mask=kept)


@triton.jit
def _of_weight(
    of_z, h, h_row, h_column, target, tile, first, last, OUTER: tl.constexpr, INNER: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of ``of_z^T h`` (OUTER, INNER) over the rows from ``first`` to ``last``."""
    ACROSS: tl.constexpr = (INNER + TILE - 1) // TILE
    o = tile // ACROSS * TILE + tl.arange(0, TILE)
    i = tile % ACROSS * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE, TILE], tl.float32)
    for start in range(first, last, TILE):
        row = tl.arange(0, TILE).to(tl.int64) + start
        in_range = (row < last)[:, None]
        left = of_z + (row * OUTER)[:, None] + o[None, :]
        right = h + (row * h_row)[:, None] + (i.to(tl.int64) * h_column)[None, :]
        a = tl.load(left, mask=in_range & (o < OUTER)[None, :], other=0.0)
        b = tl.load(right, mask=in_range & (i < INNER)[None, :], other=0.0)
        total = _dot(tl.trans(a), b, total, PRECISION, UPCAST)
    mask = (o < OUTER)[:, None] & (i < INNER)[None, :]
    place = target + o[:, None] * INNER + i[None, :]
    tl.store(place, total.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def parameters_kernel(
    x,
    post,
    of_pre,
    of_out,
    sums,
    of_parameters,
    rows,
    rows_each,
    programs,
    programs_each,
    x_row,
    x_column,
    IN: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    LAYERS: tl.constexpr,
    VECTORS: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of one parameter's gradient, of the rows that belong to one share of them."""
    LAST: tl.constexpr = WIDTH * IN + (LAYERS - 1) * WIDTH * WIDTH
    BIASES: tl.constexpr = LAST + OUT * WIDTH
    ACROSS: tl.constexpr = (WIDTH + TILE - 1) // TILE
    HIDDEN_TILES: tl.constexpr = (LAYERS - 1) * ACROSS * ACROSS
    FIRST_TILES: tl.constexpr = ACROSS * ((IN + TILE - 1) // TILE)
    LAST_TILES: tl.constexpr = ((OUT + TILE - 1) // TILE) * ACROSS
    tile, share = tl.program_id(0), tl.program_id(1)
    first = share * rows_each
    last = tl.minimum(first + rows_each, rows)
    of_parameters += share.to(tl.int64) * (BIASES + VECTORS)
    size = rows.to(tl.int64) * WIDTH
    if tile < HIDDEN_TILES:
        layer = tile // (ACROSS * ACROSS)
        _of_weight(
            of_pre + (layer + 1) * size, post + layer * size, WIDTH, 1,
            of_parameters + WIDTH * IN + layer * (WIDTH * WIDTH), tile % (ACROSS * ACROSS), first,
            last, WIDTH, WIDTH, TILE, PRECISION, UPCAST,
        )  # fmt: skip
    elif tile < HIDDEN_TILES + FIRST_TILES:
        _of_weight(
            of_pre, x, x_row, x_column, of_parameters, tile - HIDDEN_TILES, first, last, WIDTH, IN,
            TILE, PRECISION, UPCAST,
        )  # fmt: skip
    elif tile < HIDDEN_TILES + FIRST_TILES + LAST_TILES:
        _of_weight(
            of_out, post + (LAYERS - 1) * size, WIDTH, 1, of_parameters + LAST,
            tile - HIDDEN_TILES - FIRST_TILES, first, last, OUT, WIDTH, TILE, PRECISION, UPCAST,
        )  # fmt: skip
    else:
        place = (tile - HIDDEN_TILES - FIRST_TILES - LAST_TILES) * VECTOR_TILE
        place += tl.arange(0, VECTOR_TILE)
        total = tl.zeros([VECTOR_TILE], tl.float32)
        begin = share * programs_each
        end = tl.minimum(begin + programs_each, programs)
        for program in range(begin, end):
            source = sums + (tl.full([], 0, tl.int64) + program) * VECTORS + place
            total += tl.load(source, mask=place < VECTORS, other=0.0)
        target = of_parameters + BIASES + place
        tl.store(target, total.to(of_parameters.dtype.element_ty), mask=place < VECTORS)


def _precision(platform: str, allow_tf32: bool) -> str:
    """Three TF32 products keep float32 accuracy on tensor cores; AMD has no TF32 dot."""
    if platform == "hip":
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


Sizes = tuple[int, int, int, int]
"""in_features, width, out_features, layers."""
Given = tuple[bool, bool, bool]
"""Whether there are biases, norm weights, norm biases."""


def _constants(
    sizes: Sizes,
    given: Given,
    norm: str,
    name: str,
    output_name: str,
    dropout: float,
    config: Config,
    itemsize: int,
    precision: str,
) -> dict[str, Any]:
    inputs, width, outputs, layers = sizes
    return {
        "IN": inputs,
        "WIDTH": width,
        "OUT": outputs,
        "LAYERS": layers,
        "COLUMNS": padded(width),
        "OUT_COLUMNS": padded(outputs),
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_IN": config.block_in,
        "NORM": norm,
        "ACTIVATION": name,
        "OUT_ACTIVATION": output_name,
        "BIAS": given[0],
        "NORM_WEIGHT": given[1],
        "NORM_BIAS": given[2],
        "DROPOUT": dropout > 0,
        "ON_CHIP": on_chip(width, outputs, itemsize),
        "PRECISION": precision,
    }


def _tile(itemsize: int) -> int:
    """Rows and columns of a program's share of a weight's gradient; float32 takes three products
    and twice the memory."""
    return 64 if itemsize == 2 else 32


def _vectors(sizes: Sizes, given: Given) -> int:
    """How many elements biases, norm weights and norm biases have."""
    _, width, outputs, layers = sizes
    return sum(given) * layers * width + given[0] * outputs


def _shares(
    sizes: Sizes, given: Given, rows: int, tile: int, processors: int
) -> tuple[int, int, int]:
    """Tiles of the parameters' gradients, shares of the rows, rows of each share: enough programs
    to fill the device, each with some blocks of rows to add up."""
    inputs, width, outputs, layers = sizes
    across, before, after = (triton.cdiv(size, tile) for size in (width, inputs, outputs))
    tiles = (layers - 1) * across * across + across * (before + after)
    tiles += triton.cdiv(_vectors(sizes, given), _VECTOR_TILE)
    wanted = triton.cdiv(_PROGRAMS_PER_PROCESSOR * processors, tiles)
    shares = max(min(wanted, rows // (4 * tile)), 1)
    each = triton.cdiv(triton.cdiv(rows, shares), tile) * tile
    return tiles, triton.cdiv(rows, each), each


Options = tuple[str, str, str, float, float]
"""norm, activation, output_activation, eps, dropout."""


def _launch(config: Config) -> dict[str, int]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def _settings(x: torch.Tensor, device: Device) -> tuple[str, bool]:
    """The precision of float32 products, and whether operands of products are upcast."""
    allow_tf32 = torch.get_float32_matmul_precision() != "highest"
    return (
        _precision(device.platform, allow_tf32),
        device.interpreted and x.dtype == torch.bfloat16,
    )


def forward(
    x: torch.Tensor,
    parameters: torch.Tensor,
    seed: torch.Tensor | None,
    sizes: Sizes,
    given: Given,
    options: Options,
    keep: bool,
    config: Config,
    device: Device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch on ``x`` (rows, in_features), rows > 0. Returns the result and, where ``keep``, each
    hidden layer's product and result and the output layer's product; empty otherwise."""
    rows, (_, width, outputs, layers) = x.shape[0], sizes
    norm, name, output_name, eps, dropout = options
    precision, upcast = _settings(x, device)
    constants = _constants(
        sizes, given, norm, name, output_name, dropout, config, x.itemsize, precision
    )
    slots = layers if keep else 0 if constants["ON_CHIP"] else min(layers, 2)
    y = x.new_empty((rows, outputs))
    pre = x.new_empty((layers if keep else 0, rows, width))
    post = x.new_empty((slots, rows, width))
    pre_out = x.new_empty((rows if keep and output_name != "Identity" else 0, outputs))
    forward_kernel[(triton.cdiv(rows, config.block_rows),)](
        x,
        parameters,
        x if seed is None else seed,
        y,
        pre,
        post,
        pre_out,
        rows,
        *x.stride(),
        eps,
        counter.threshold(dropout),
        1.0 / (1.0 - dropout),
        **constants,
        KEEP=keep,
        UPCAST=upcast,
        **_launch(config),
    )
    return y, pre, (post if keep else post.new_empty((0, rows, width))), pre_out


def backward(
    x: torch.Tensor,
    parameters: torch.Tensor,
    seed: torch.Tensor | None,
    of_y: torch.Tensor,
    pre: torch.Tensor,
    post: torch.Tensor,
    pre_out: torch.Tensor,
    sizes: Sizes,
    given: Given,
    options: Options,
    of_x_wanted: bool,
    of_parameters_wanted: bool,
    dtype: torch.dtype,
    config: Config,
    device: Device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of ``x`` (rows, in_features), rows > 0, and, in ``dtype``, of ``parameters``;
    each is empty unless wanted."""
    rows, (inputs, width, outputs, layers) = x.shape[0], sizes
    norm, name, output_name, eps, dropout = options
    precision, upcast = _settings(x, device)
    constants = _constants(
        sizes, given, norm, name, output_name, dropout, config, x.itemsize, precision
    )
    vectors, programs = _vectors(sizes, given), triton.cdiv(rows, config.block_rows)
    of_x = x.new_empty((rows if of_x_wanted else 0, inputs))
    of_pre = torch.empty_like(pre)
    of_out = x.new_empty((rows, outputs))
    sums = torch.empty((programs, vectors), dtype=torch.float32, device=x.device)
    backward_kernel[(programs,)](
        parameters,
        x if seed is None else seed,
        of_y,
        pre,
        pre_out,
        of_x,
        of_pre,
        of_out,
        sums,
        rows,
        *of_y.stride(),
        eps,
        counter.threshold(dropout),
        1.0 / (1.0 - dropout),
        **constants,
        OF_X=of_x_wanted,
        VECTORS=vectors,
        UPCAST=upcast,
        **_launch(config),
    )
    if not of_parameters_wanted:
        return of_x, torch.empty(0, dtype=dtype, device=x.device)
    tile = _tile(x.itemsize)
    tiles, shares, each = _shares(sizes, given, rows, tile, device.processors)
    shape = shares, parameters.numel()
    kind = dtype if shares == 1 else torch.float32
    of_parameters = torch.empty(shape, dtype=kind, device=x.device)
    parameters_kernel[(tiles, shares)](
        x,
        post,
        of_pre,
        of_out,
        sums,
        of_parameters,
        rows,
        each,
        programs,
        triton.cdiv(programs, shares),
        *x.stride(),
        inputs,
        width,
        outputs,
        layers,
        vectors,
        tile,
        _VECTOR_TILE,
        precision,
        upcast,
        num_warps=4,
        num_stages=3,
    )
    return of_x, of_parameters[0] if shares == 1 else of_parameters.sum(0, dtype=dtype)


def compilations(problem: Problem, config: Config, device: Device) -> list[Compilation]:
    """The specialisations that ``problem`` launches in training, for contiguous tensors."""
    rows, inputs, width, outputs, layers = (size for _, size in problem.dims)
    sizes, tile = (inputs, width, outputs, layers), _tile(problem.itemsize)
    given = (True, True, True)
    dropout = problem.flag("dropout", 0.0)
    constants = {
        **_constants(
            sizes,
            given,
            problem.flag("norm", "none"),
            problem.flag("activation", "Identity"),
            problem.flag("output_activation", "Identity"),
            dropout,
            config,
            problem.itemsize,
            _precision(device.platform, allow_tf32=False),
        ),
        **dict.fromkeys(("KEEP", "OF_X"), True),
        "VECTORS": _vectors(sizes, given),
        "TILE": tile,
        "VECTOR_TILE": _VECTOR_TILE,
        "UPCAST": False,
    }
    integers = {
        "x_row": inputs,
        "x_column": 1,
        "of_y_row": outputs,
        "of_y_column": 1,
        "threshold": counter.threshold(dropout),
    }
    # The launcher compiles an integer 1 in, and knows a multiple of 16.
    constants |= {key: 1 for key, value in integers.items() if value == 1}
    element = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[problem.dtype]
    types = dict.fromkeys((*_COUNTS, *integers), "i32")
    types |= {"eps": "fp32", "kept_scale": "fp32", "sums": "*fp32"}
    types["seed"] = "*i64" if dropout else element
    tiles, shares, _ = _shares(sizes, given, rows, tile, device.processors)
    types["of_parameters"] = element if shares == 1 else "*fp32"
    blocks = triton.cdiv(rows, config.block_rows)
    if problem.direction == "forward":
        launches = [(forward_kernel, blocks, _launch(config))]
    else:
        launches = [
            (backward_kernel, blocks, _launch(config)),
            (parameters_kernel, tiles * shares, {"num_warps": 4, "num_stages": 3}),
        ]
    found = []
    for kernel, programs, launch in launches:
        signature = {
            name: "constexpr" if name in constants else types.get(name, element)
            for name in kernel.arg_names
        }
        divisible = tuple(
            name
            for name, kind in signature.items()
            if kind.startswith("*") or integers.get(name, 1) % 16 == 0
        )
        found.append(
            Compilation(
                kernel,
                signature,
                {name: value for name, value in constants.items() if name in signature},
                divisible,
                **launch,
                programs=programs,
                uses_dot=problem.dtype != "float32" or device.platform != "hip",
            )
        )
    return found
