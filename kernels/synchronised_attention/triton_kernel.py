"""Triton kernels of synchronised attention, and their launches.

Forward, one kernel makes sums and queries, a product whose right side is gathered from pairs of
neurons; in the next a program keeps some queries to a set of keys and walks over the positions
with an online softmax, reading keys that are values too once. Every warp has positions of its
own, and a maximum and sums of its own. Where there are few sets the positions are split among
programs too; a third kernel joins what their warps found. Scores are positions by queries: a
product has 16 rows and 8 columns, and queries are few.

Backward, the same walk gives the gradient of the queries, the product the other way round that of
the sums, and every neuron collects from its pairs in a fixed order: no atomics, the same bits in
every run. The gradients of keys and values are taken once for all ticks, by blocks of positions.

The last feature of a width of one more than a power of two stays beside the products: 65 costs 64
columns, not 128. Distances in memory come divided by
``UNIT``, so that the compiler knows they are multiples of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from ..core.ahead_of_time import Compilation
from ..core.device import Device
from ..core.problem import Problem
from ..core.triton_functions import early, wait
from ..core.triton_low_rank import compilation, dot, precision
from .layout import is_channels_first, is_shared
from .spec import Config, padded, split_positions, split_width

_LOG2_E, _LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_FOLD = tl.constexpr(8)
"""Positions that threads of a warp share in the result of a product."""
_QUERY_COLUMNS, _SUM_COLUMNS, _SLICES = 32, 16, 8
"""Tiles of the two products with the map to the queries."""
_WARPS = 4
_COLLECT_ROWS, _COLLECT_NEURONS = 2, 64


# Whether these are 1 or multiples of 16 would make more code and no faster one.
_GENERAL = ["rows", "splits", "batches", "ticks", "columns", "depth", "neurons"]
_GENERAL += [
    f"{name}_row"
    for name in (
        *("z", "before", "sums", "query", "read", "log", "delta"),
        *("of_next", "of_query", "of_read", "of_synchronisation", "of_sums", "of_z"),
    )
]


@triton.jit
def _places(SLICES: tl.constexpr, EACH: tl.constexpr):
    """Where in a block the part of each warp is."""
    return tl.arange(0, SLICES)[:, None] * EACH + tl.arange(0, EACH)[None, :]


@triton.jit(do_not_specialize=_GENERAL)
def query_kernel(
    z, left, right, r, scale, in_weight, in_bias, before, sums, query,
    rows, pairs, columns,
    z_row, z_column, before_row, before_column, sums_row, sums_column, query_row, query_column,
    weight_row, weight_column,
    BEFORE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    SLICES: tl.constexpr, EACH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of the queries, of which each warp takes ``EACH`` pairs at a time; those of the first
    columns store the sums too."""
    wait(EARLY)
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tile.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_rows = (row < rows)[None, :, None]
    in_columns = column < columns
    z_rows = z + (row * z_row)[None, :, None]
    bias = tl.load(in_bias + column, mask=in_columns, other=0.0)
    total = tl.zeros([SLICES, BLOCK_COLUMNS, BLOCK_ROWS], tl.float32)
    for start in range(0, pairs, SLICES * EACH):
        pair = start + _places(SLICES, EACH)
        in_pairs = pair < pairs
        mask = in_rows & in_pairs[:, None, :]
        # All that waits for nothing first.
        i = tl.load(left + pair, mask=in_pairs, other=0)
        j = tl.load(right + pair, mask=in_pairs, other=0)
        weight = tl.load(
            in_weight
            + (column * weight_row)[None, :, None]
            + (pair.to(tl.int64) * weight_column)[:, None, :],
            mask=in_pairs[:, None, :] & in_columns[None, :, None],
            other=0.0,
        )
        along = pair[:, None, :] + tl.zeros([1, BLOCK_ROWS, 1], tl.int32)
        scaled = tl.load(scale + along, mask=mask, other=0.0)
        if BEFORE:
            kept = tl.load(r + along, mask=mask, other=0.0)
            lines = before + (row * before_row)[None, :, None]
            last = tl.load(lines + (pair * before_column)[:, None, :], mask=mask, other=0.0)
        one = tl.load(z_rows + i[:, None, :] * z_column, mask=mask, other=0.0)
        other = tl.load(z_rows + j[:, None, :] * z_column, mask=mask, other=0.0)
        found = one.to(tl.float32) * other.to(tl.float32)
        if BEFORE:
            found += kept.to(tl.float32) * last.to(tl.float32)
        if tile == 0:
            place = sums + (row * sums_row)[None, :, None] + (pair * sums_column)[:, None, :]
            tl.store(place, found.to(sums.dtype.element_ty), mask=mask)
        found = tl.trans(found * scaled.to(tl.float32), (0, 2, 1))
        total = dot(weight, found.to(weight.dtype), total, PRECISION, UPCAST)
    found = tl.sum(total, 0) + bias.to(tl.float32)[:, None]
    place = query + (row * query_row)[None, :] + (column * query_column)[:, None]
    mask = (row < rows)[None, :] & in_columns[:, None]
    tl.store(place, found.to(query.dtype.element_ty), mask=mask)


@triton.jit
def _load_rows(
    base, offset, real, feature_stride, WIDTH: tl.constexpr, MAIN: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """``MAIN`` features of the rows at ``offset`` of which ``real`` exist, and the last one."""
    feature = tl.arange(0, MAIN)
    place = base + offset[:, None] + (feature * feature_stride)[None, :]
    main = tl.load(place, mask=real[:, None] & (feature < WIDTH)[None, :], other=0.0)
    last = tl.zeros(offset.shape, main.dtype)
    if LAST:
        last = tl.load(base + offset + MAIN * feature_stride, mask=real, other=0.0)
    return main, last


@triton.jit
def _load_columns(
    base, offset, real, feature_stride, WIDTH: tl.constexpr, MAIN: tl.constexpr,
    LAST: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """What `_load_rows` loads, features by rows, once for each warp, and the last one in
    float32."""
    feature = tl.arange(0, MAIN)[None, :, None]
    place = base + offset[None, None, :] + feature * feature_stride
    place += tl.zeros([SLICES, 1, 1], tl.int64)
    main = tl.load(place, mask=real[None, None, :] & (feature < WIDTH), other=0.0)
    last = tl.zeros(offset.shape, tl.float32)
    if LAST:
        last = tl.load(base + offset + MAIN * feature_stride, mask=real, other=0.0)
    return main, last.to(tl.float32)


@triton.jit
def _store_rows(
    base, offset, real, feature_stride, main, last, WIDTH: tl.constexpr, LAST: tl.constexpr
):
    """What `_load_rows` loads, features by rows."""
    element = base.dtype.element_ty
    feature = tl.arange(0, main.shape[0])
    place = base + offset[None, :] + (feature * feature_stride)[:, None]
    tl.store(place, main.to(element), mask=real[None, :] & (feature < WIDTH)[:, None])
    if LAST:
        tl.store(base + offset + main.shape[0] * feature_stride, last.to(element), mask=real)


@triton.jit
def _load_tile(
    base, position, positions, position_stride, feature_stride, WIDTH: tl.constexpr,
    MAIN: tl.constexpr, LAST: tl.constexpr, FIRST: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Positions by ``MAIN`` features, and the last one. ``FIRST``: positions are next to each
    other in memory."""
    if not FIRST:
        position_stride *= UNIT
    else:
        feature_stride *= UNIT
    feature = tl.arange(0, MAIN)
    along = base + position.to(tl.int64) * position_stride
    across = feature.to(tl.int64) * feature_stride
    real = position < positions
    mask = real[:, None]
    if MAIN > WIDTH:
        mask = mask & (feature < WIDTH)[None, :]
    main = tl.load(along[:, None] + across[None, :], mask=mask, other=0.0)
    last = tl.zeros(position.shape, main.dtype)
    if LAST:
        distance = tl.full([], MAIN, tl.int64) * feature_stride
        last = tl.load(along + distance, mask=real, other=0.0)
    return main, last


@triton.jit
def _store_tile(
    base, main, last, position, positions, position_stride, feature_stride, WIDTH: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """What `_load_tile` loads."""
    element = base.dtype.element_ty
    feature = tl.arange(0, main.shape[1])
    along = base + position.to(tl.int64) * position_stride
    across = feature.to(tl.int64) * feature_stride
    real = position < positions
    mask = real[:, None] & (feature < WIDTH)[None, :]
    tl.store(along[:, None] + across[None, :], main.to(element), mask=mask)
    if LAST:
        distance = tl.full([], main.shape[1], tl.int64) * feature_stride
        tl.store(along + distance, last.to(element), mask=real)


@triton.jit
def _times(
    tile, tile_last, rows, rows_last, LAST: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The product over the features, positions by rows."""
    total = tl.zeros([tile.shape[0], rows.shape[0]], tl.float32)
    if LAST:
        total += tile_last.to(tl.float32)[:, None] * rows_last.to(tl.float32)[None, :]
    return dot(tile, tl.trans(rows), total, PRECISION, UPCAST)


@triton.jit
def _load_slices(
    base, start, positions, position_stride, feature_stride, WIDTH: tl.constexpr,
    MAIN: tl.constexpr, FIRST: tl.constexpr, UNIT: tl.constexpr, SLICES: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """``EACH`` positions for each warp by ``MAIN`` features, from ``start`` on. ``FIRST``:
    positions are next to each other in memory."""
    feature = tl.arange(0, MAIN)
    position = start + _places(SLICES, EACH)
    real = position < positions
    if FIRST:
        feature_stride *= UNIT
        # So ordered, a thread loads several features of the same positions.
        along = base + tl.trans(position).to(tl.int64) * position_stride
        across = feature.to(tl.int64) * feature_stride
        mask = tl.trans(real)[None, :, :]
        if MAIN > WIDTH:
            mask = mask & (feature < WIDTH)[:, None, None]
        tile = tl.load(along[None, :, :] + across[:, None, None], mask=mask, other=0.0)
        tile = tl.trans(tile, (2, 1, 0))
    else:
        position_stride *= UNIT
        along = base + position.to(tl.int64) * position_stride
        across = feature.to(tl.int64) * feature_stride
        mask = real[:, :, None]
        if MAIN > WIDTH:
            mask = mask & (feature < WIDTH)[None, None, :]
        tile = tl.load(along[:, :, None] + across[None, None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def _load_last(
    base, start, positions, position_stride, feature_stride, MAIN: tl.constexpr,
    LAST: tl.constexpr, FIRST: tl.constexpr, UNIT: tl.constexpr, SLICES: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """The last feature of what `_load_slices` loads."""
    last = tl.zeros([SLICES, EACH], base.dtype.element_ty)
    if LAST:
        if FIRST:
            feature_stride *= UNIT
        else:
            position_stride *= UNIT
        position = start + _places(SLICES, EACH)
        distance = tl.full([], MAIN, tl.int64) * feature_stride
        place = base + distance + position.to(tl.int64) * position_stride
        last = tl.load(place, mask=position < positions, other=0.0)
    return last


@triton.jit
def _folded(tile):
    """The sum over positions as far as a thread holds it."""
    SLICES: tl.constexpr = tile.shape[0]
    FOLDS: tl.constexpr = tile.shape[1] // _FOLD
    return tl.sum(tl.reshape(tile, [SLICES, FOLDS, _FOLD, tile.shape[2]]), 1)


@triton.jit(do_not_specialize=_GENERAL)
def attention_kernel(
    query, keys, values, read, log_sum_exp,
    query_row, query_column, read_row, read_column, log_row, log_column,
    keys_batch, keys_head, keys_position, keys_feature,
    values_batch, values_head, values_position, values_feature,
    heads, positions, split_positions,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    KEY_MAIN: tl.constexpr, KEY_LAST: tl.constexpr, VALUE_MAIN: tl.constexpr,
    VALUE_LAST: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr, UNIT: tl.constexpr,
    KEYS_FIRST: tl.constexpr, VALUES_FIRST: tl.constexpr, SHARED: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What ``ROWS`` queries to one set of keys read, and their log-sum-exp, from all positions or,
    with ``SPLIT``, some. Every warp has a slice of each block, a maximum and sums of its own."""
    wait(EARLY)
    EACH: tl.constexpr = BLOCK // SLICES
    BLOCKS: tl.constexpr = (QUERIES + ROWS - 1) // ROWS
    plane = tl.program_id(0) // BLOCKS
    batch = (plane // heads).to(tl.int64)
    head = (plane % heads).to(tl.int64)
    if KEYS_FIRST | VALUES_FIRST:
        positions *= UNIT
    keys += (batch * keys_batch + head * keys_head) * UNIT
    values += (batch * values_batch + head * values_head) * UNIT
    first = 0
    last = positions
    if SPLIT:
        first = tl.program_id(1) * split_positions
        last = tl.minimum(positions, first + split_positions)
    k_last = _load_last(
        keys, first, positions, keys_position, keys_feature, KEY_MAIN, KEY_LAST, KEYS_FIRST, UNIT,
        SLICES, EACH,
    )  # fmt: skip
    v_last = k_last
    if not SHARED:
        v_last = _load_last(
            values, first, positions, values_position, values_feature, VALUE_MAIN, VALUE_LAST,
            VALUES_FIRST, UNIT, SLICES, EACH,
        )  # fmt: skip
    row = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)
    real = row < QUERIES
    line = head * QUERIES + row
    offset = batch * query_row + line * (KEY_WIDTH * query_column)
    q, q_last = _load_columns(
        query, offset, real, query_column, KEY_WIDTH, KEY_MAIN, KEY_LAST, SLICES
    )
    # Of the scores times log2(e), as all that goes through exp2.
    largest = tl.full([SLICES, ROWS], float("-inf"), tl.float32)
    total = tl.zeros([SLICES, _FOLD, ROWS], tl.float32)
    extra = tl.zeros([SLICES, _FOLD, ROWS], tl.float32)
    main = tl.zeros([SLICES, VALUE_MAIN, ROWS], tl.float32)
    for start in range(first, last, BLOCK):
        k = _load_slices(
            keys, start, positions, keys_position, keys_feature, KEY_WIDTH, KEY_MAIN, KEYS_FIRST,
            UNIT, SLICES, EACH,
        )  # fmt: skip
        v = k
        if not SHARED:
            v = _load_slices(
                values, start, positions, values_position, values_feature, VALUE_WIDTH, VALUE_MAIN,
                VALUES_FIRST, UNIT, SLICES, EACH,
            )  # fmt: skip
        k_now = k_last.to(tl.float32)[:, :, None]
        v_now = v_last.to(tl.float32)[:, :, None]
        # For the next block: these loads are too small for the pipeline.
        k_last = _load_last(
            keys, start + BLOCK, positions, keys_position, keys_feature, KEY_MAIN, KEY_LAST,
            KEYS_FIRST, UNIT, SLICES, EACH,
        )  # fmt: skip
        v_last = k_last
        if not SHARED:
            v_last = _load_last(
                values, start + BLOCK, positions, values_position, values_feature, VALUE_MAIN,
                VALUE_LAST, VALUES_FIRST, UNIT, SLICES, EACH,
            )  # fmt: skip
        scores = _scores(
            k, k_now, q, q_last, start, positions, KEY_LAST, SLICES, EACH, PRECISION, UPCAST
        )
        highest = tl.maximum(largest, tl.max(scores, 1) * _LOG2_E)
        # A row that has seen nothing finite: -inf - -inf would be NaN for ever.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores * _LOG2_E - base[:, None, :])
        decay = tl.exp2(largest - base)[:, None, :]
        largest = highest
        total = total * decay + _folded(weights)
        if VALUE_LAST:
            extra = extra * decay + _folded(weights * v_now)
        main = dot(tl.trans(v, (0, 2, 1)), weights.to(v.dtype), main * decay, PRECISION, UPCAST)

    total = tl.sum(total, 1)
    extra_row = tl.sum(extra, 1)
    if SPLIT:
        # Each warp's own: scratch of (splits * slices, batch, heads * queries, V), and of the
        # log-sum-exp. Positions are split where there are few sets: it is small.
        part = tl.program_id(1) * SLICES + tl.arange(0, SLICES)
        part = part * (tl.num_programs(0) // (heads * BLOCKS)) + plane // heads
        place = (part * (heads * QUERIES))[:, None] + (plane % heads * QUERIES + row)[None, :]
        # A warp that has seen nothing finite read nothing, and says so by a sum of -inf.
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(log_sum_exp + place, largest * _LN_2 + tl.log(total), mask=real[None, :])
        inverse = 1 / total
        place *= VALUE_WIDTH
        feature = tl.arange(0, VALUE_MAIN)
        mask = real[None, None, :] & (feature < VALUE_WIDTH)[None, :, None]
        target = read + (place[:, None, :] + feature[None, :, None])
        tl.store(target, main * inverse[:, None, :], mask=mask)
        if VALUE_LAST:
            tl.store(read + (place + VALUE_MAIN), extra_row * inverse, mask=real[None, :])
    else:
        highest = tl.max(largest, 0)
        share = tl.exp2(largest - tl.where(highest == float("-inf"), 0.0, highest)[None, :])
        whole = tl.sum(total * share, 0)
        logarithm = highest * _LN_2 + tl.log(whole)
        tl.store(log_sum_exp + batch * log_row + line * log_column, logarithm, mask=real)
        offset = batch * read_row + line * (VALUE_WIDTH * read_column)
        share /= whole[None, :]
        main = tl.sum(main * share[:, None, :], 0)
        extra_row = tl.sum(extra_row * share, 0)
        _store_rows(read, offset, real, read_column, main, extra_row, VALUE_WIDTH, VALUE_LAST)


@triton.jit
def _scores(
    tile, tile_last, rows, rows_last, start, positions, LAST: tl.constexpr, SLICES: tl.constexpr,
    EACH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The product over the features of each warp's positions; -inf where there are none."""
    there = start + _places(SLICES, EACH) < positions
    total = tl.where(there, 0.0, float("-inf"))[:, :, None]
    if LAST:
        total += tile_last * rows_last[None, None, :]
    total = tl.broadcast_to(total, [SLICES, EACH, rows.shape[2]])
    return dot(tile, rows, total, PRECISION, UPCAST)


@triton.jit(do_not_specialize=_GENERAL)
def join_kernel(
    parts, logarithms, read, log_sum_exp,
    read_row, read_column, log_row, log_column,
    batches, splits, rows,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some features of what one query reads, from what each split of the positions gives for
    it."""
    wait(EARLY)
    batch = (tl.program_id(0) // rows).to(tl.int64)
    row = tl.program_id(0) % rows
    split = tl.arange(0, SPLITS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    # Positions are split where there are few sets: there are few parts.
    line = split * (batches * rows) + tl.program_id(0)
    logarithm = tl.load(logarithms + line, mask=split < splits, other=float("-inf"))
    real = feature < WIDTH
    place = parts + (line * WIDTH)[:, None] + feature[None, :]
    part = tl.load(place, mask=(split < splits)[:, None] & real[None, :], other=0.0)
    largest = tl.max(logarithm, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    shares = tl.exp(logarithm - base)
    total = tl.sum(shares, 0)
    value = tl.sum(part * shares[:, None], 0) / total
    target = read + batch * read_row + (row * WIDTH + feature) * read_column
    tl.store(target, value.to(read.dtype.element_ty), mask=real)
    if tl.program_id(1) == 0:
        tl.store(log_sum_exp + batch * log_row + row * log_column, base + tl.log(total))


@triton.jit(do_not_specialize=_GENERAL)
def query_gradient_kernel(
    query, keys, values, read, of_read, log_sum_exp, parts,
    query_row, query_column, read_row, read_column, of_read_row, of_read_column,
    log_row, log_column,
    keys_batch, keys_head, keys_position, keys_feature,
    values_batch, values_head, values_position, values_feature,
    heads, positions, split_positions,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    KEY_MAIN: tl.constexpr, KEY_LAST: tl.constexpr, VALUE_MAIN: tl.constexpr,
    VALUE_LAST: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr, UNIT: tl.constexpr,
    KEYS_FIRST: tl.constexpr, VALUES_FIRST: tl.constexpr, SHARED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The share of some positions in the gradient of ``ROWS`` queries to one set of keys, for
    ``parts`` (splits, batch, heads * queries * K)."""
    wait(EARLY)
    EACH: tl.constexpr = BLOCK // SLICES
    BLOCKS: tl.constexpr = (QUERIES + ROWS - 1) // ROWS
    plane = tl.program_id(0) // BLOCKS
    batch = (plane // heads).to(tl.int64)
    head = (plane % heads).to(tl.int64)
    if KEYS_FIRST | VALUES_FIRST:
        positions *= UNIT
    keys += (batch * keys_batch + head * keys_head) * UNIT
    values += (batch * values_batch + head * values_head) * UNIT
    first = tl.program_id(1) * split_positions
    last = tl.minimum(positions, first + split_positions)
    k_last = _load_last(
        keys, first, positions, keys_position, keys_feature, KEY_MAIN, KEY_LAST, KEYS_FIRST, UNIT,
        SLICES, EACH,
    )  # fmt: skip
    v_last = k_last
    if not SHARED:
        v_last = _load_last(
            values, first, positions, values_position, values_feature, VALUE_MAIN, VALUE_LAST,
            VALUES_FIRST, UNIT, SLICES, EACH,
        )  # fmt: skip
    row = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)
    real = row < QUERIES
    line = head * QUERIES + row
    offset = batch * query_row + line * (KEY_WIDTH * query_column)
    q, q_last = _load_columns(
        query, offset, real, query_column, KEY_WIDTH, KEY_MAIN, KEY_LAST, SLICES
    )
    offset = batch * of_read_row + line * (VALUE_WIDTH * of_read_column)
    g, g_last = _load_columns(
        of_read, offset, real, of_read_column, VALUE_WIDTH, VALUE_MAIN, VALUE_LAST, SLICES
    )
    g = g.to(q.dtype)
    # Once more, as rows, for sums that stay within a warp.
    left, left_last = _load_rows(
        of_read, offset, real, of_read_column, VALUE_WIDTH, VALUE_MAIN, VALUE_LAST
    )
    offset = batch * read_row + line * (VALUE_WIDTH * read_column)
    right, right_last = _load_rows(
        read, offset, real, read_column, VALUE_WIDTH, VALUE_MAIN, VALUE_LAST
    )
    logs = log_sum_exp + batch * log_row + line * log_column
    logarithm = tl.load(logs, mask=real, other=float("inf")) * _LOG2_E
    delta = tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)
    delta += left_last.to(tl.float32) * right_last.to(tl.float32)
    main = tl.zeros([SLICES, KEY_MAIN, ROWS], tl.float32)
    extra = tl.zeros([SLICES, _FOLD, ROWS], tl.float32)
    for start in range(first, last, BLOCK):
        k = _load_slices(
            keys, start, positions, keys_position, keys_feature, KEY_WIDTH, KEY_MAIN, KEYS_FIRST,
            UNIT, SLICES, EACH,
        )  # fmt: skip
        v = k
        if not SHARED:
            v = _load_slices(
                values, start, positions, values_position, values_feature, VALUE_WIDTH, VALUE_MAIN,
                VALUES_FIRST, UNIT, SLICES, EACH,
            )  # fmt: skip
        k_now = k_last.to(tl.float32)[:, :, None]
        v_now = v_last.to(tl.float32)[:, :, None]
        k_last = _load_last(
            keys, start + BLOCK, positions, keys_position, keys_feature, KEY_MAIN, KEY_LAST,
            KEYS_FIRST, UNIT, SLICES, EACH,
        )  # fmt: skip
        v_last = k_last
        if not SHARED:
            v_last = _load_last(
                values, start + BLOCK, positions, values_position, values_feature, VALUE_MAIN,
                VALUE_LAST, VALUES_FIRST, UNIT, SLICES, EACH,
            )  # fmt: skip
        scores = _scores(
            k, k_now, q, q_last, start, positions, KEY_LAST, SLICES, EACH, PRECISION, UPCAST
        )
        weights = tl.exp2(scores * _LOG2_E - logarithm[None, None, :])
        of_weights = tl.broadcast_to(-delta[None, None, :], [SLICES, EACH, ROWS])
        if VALUE_LAST:
            of_weights += v_now * g_last[None, None, :]
        of_scores = weights * dot(v, g, of_weights, PRECISION, UPCAST)
        if KEY_LAST:
            extra += _folded(of_scores * k_now)
        main = dot(tl.trans(k, (0, 2, 1)), of_scores.to(k.dtype), main, PRECISION, UPCAST)
    part = tl.program_id(1) * (tl.num_programs(0) // (heads * BLOCKS)) + batch
    offset = (part * (heads * QUERIES) + line) * KEY_WIDTH
    main = tl.sum(main, 0)
    extra_row = tl.sum(tl.sum(extra, 1), 0)
    _store_rows(parts, offset, real, 1, main, extra_row, KEY_WIDTH, KEY_LAST)


@triton.jit
def _load_part(parts, split, splits, rows, row, depth, k):
    """What one split of the positions gives for some columns of the queries' gradient, by rows."""
    real = (k < depth)[:, None, :] & (row < rows)[None, :, None] & (split < splits)
    line = (split * rows + row) * depth
    return tl.load(parts + line[None, :, None] + k[:, None, :], mask=real, other=0.0)


@triton.jit(do_not_specialize=_GENERAL)
def sum_gradient_kernel(
    parts, in_weight, r, scale, of_next, of_query, of_synchronisation, of_sums,
    rows, splits, pairs, depth,
    weight_row, weight_column, of_next_row, of_next_column, of_query_row, of_query_column,
    of_synchronisation_row, of_synchronisation_column, of_sums_row, of_sums_column,
    NEXT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    SLICES: tl.constexpr, EACH: tl.constexpr, TOGETHER: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of the gradients of synchronisation and sums, of which each warp takes ``EACH``
    columns of the queries at a time, loading ``TOGETHER`` parts of their gradient together; those
    of the first columns store that gradient too. ``NEXT``: "decayed" adds r times the gradient of
    the next sums, "given" the gradient itself."""
    wait(EARLY)
    tiles = tl.cdiv(pairs, BLOCK_COLUMNS)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    pair = tile.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_pairs = pair < pairs
    mask = (row < rows)[None, :] & in_pairs[:, None]
    later = tl.zeros([BLOCK_COLUMNS, BLOCK_ROWS], tl.float32)
    if NEXT != "none":
        place = of_next + (row * of_next_row)[None, :] + (pair * of_next_column)[:, None]
        later = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        if NEXT == "decayed":
            later *= tl.load(r + pair, mask=in_pairs, other=0.0).to(tl.float32)[:, None]
    scaled = tl.load(scale + pair, mask=in_pairs, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros([SLICES, BLOCK_COLUMNS, BLOCK_ROWS], tl.float32)
    for start in range(0, depth, SLICES * EACH):
        k = start + _places(SLICES, EACH)
        gradient = tl.zeros([SLICES, BLOCK_ROWS, EACH], tl.float32)
        for split in tl.static_range(TOGETHER):
            gradient += _load_part(parts, split, splits, rows, row, depth, k)
        weight = tl.load(
            in_weight
            + (k.to(tl.int64) * weight_row)[:, :, None]
            + (pair * weight_column)[None, None, :],
            mask=(k < depth)[:, :, None] & in_pairs[None, None, :],
            other=0.0,
        )
        for first in range(TOGETHER, splits, TOGETHER):
            for split in tl.static_range(TOGETHER):
                gradient += _load_part(parts, first + split, splits, rows, row, depth, k)
        gradient = gradient.to(of_query.dtype.element_ty)
        if tile == 0:
            target = of_query + (row * of_query_row)[None, :, None]
            real = (k < depth)[:, None, :] & (row < rows)[None, :, None]
            tl.store(target + (k * of_query_column)[:, None, :], gradient, mask=real)
        gradient = tl.trans(gradient.to(weight.dtype), (0, 2, 1))
        total = dot(tl.trans(weight, (0, 2, 1)), gradient, total, PRECISION, UPCAST)
    found = tl.sum(total, 0)
    place = of_synchronisation + (row * of_synchronisation_row)[None, :]
    place += (pair * of_synchronisation_column)[:, None]
    tl.store(place, found.to(of_synchronisation.dtype.element_ty), mask=mask)
    found = found * scaled + later
    place = of_sums + (row * of_sums_row)[None, :] + (pair * of_sums_column)[:, None]
    tl.store(place, found.to(of_sums.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_GENERAL)
def collect_kernel(
    z, of_sums, starts, pair_of, other_of, of_z,
    rows, neurons,
    z_row, z_column, of_sums_row, of_sums_column, of_z_row, of_z_column,
    ROWS: tl.constexpr, NEURONS: tl.constexpr, ENTRIES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Add to the gradient of each neuron, over its pairs, that of the sum times the other one."""
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    neuron = tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)
    in_rows = (row < rows)[:, None, None]
    in_neurons = neuron < neurons
    first = tl.load(starts + neuron, mask=in_neurons, other=0)
    count = tl.load(starts + neuron + 1, mask=in_neurons, other=0) - first
    total = tl.zeros([ROWS, NEURONS], tl.float32)
    for start in range(0, tl.max(count, 0), ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        present = entry[None, :] < count[:, None]
        place = first[:, None] + entry[None, :]
        pair = tl.load(pair_of + place, mask=present, other=0)[None, :, :]
        other = tl.load(other_of + place, mask=present, other=0)[None, :, :]
        mask = in_rows & present[None, :, :]
        partner = z + (row * z_row)[:, None, None] + other * z_column
        gradient = of_sums + (row * of_sums_row)[:, None, None] + pair * of_sums_column
        product = tl.load(gradient, mask=mask, other=0.0).to(tl.float32)
        product *= tl.load(partner, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(product, 2)
    target = of_z + (row * of_z_row)[:, None] + (neuron * of_z_column)[None, :]
    mask = (row < rows)[:, None] & in_neurons[None, :]
    total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, total.to(of_z.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_GENERAL)
def key_gradient_kernel(
    query, keys, values, of_read, log_sum_exp, delta, of_keys, of_values,
    query_tick, query_row, query_column, of_read_tick, of_read_row, of_read_column,
    log_tick, log_row, log_column, delta_tick, delta_row,
    keys_batch, keys_head, keys_position, keys_feature,
    values_batch, values_head, values_position, values_feature,
    of_keys_batch, of_keys_head, of_keys_position, of_keys_feature,
    of_values_batch, of_values_head, of_values_position, of_values_feature,
    ticks, heads, positions,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    KEY_MAIN: tl.constexpr, KEY_LAST: tl.constexpr, VALUE_MAIN: tl.constexpr,
    VALUE_LAST: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, KEYS_FIRST: tl.constexpr,
    VALUES_FIRST: tl.constexpr, SHARED: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values, or of one of them, ``PART``, from the queries
    of all ticks."""
    if KEYS_FIRST | VALUES_FIRST:
        positions *= UNIT
    blocks = tl.cdiv(positions, BLOCK)
    plane = tl.program_id(0) // blocks
    batch = (plane // heads).to(tl.int64)
    head = (plane % heads).to(tl.int64)
    keys += (batch * keys_batch + head * keys_head) * UNIT
    values += (batch * values_batch + head * values_head) * UNIT
    position = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    k, k_last = _load_tile(
        keys, position, positions, keys_position, keys_feature, KEY_WIDTH, KEY_MAIN, KEY_LAST,
        KEYS_FIRST, UNIT,
    )  # fmt: skip
    v = k
    v_last = k_last
    if PART != "values" and not SHARED:
        v, v_last = _load_tile(
            values, position, positions, values_position, values_feature, VALUE_WIDTH, VALUE_MAIN,
            VALUE_LAST, VALUES_FIRST, UNIT,
        )  # fmt: skip
    query += batch * query_row + head * (QUERIES * KEY_WIDTH) * query_column
    of_read += batch * of_read_row + head * (QUERIES * VALUE_WIDTH) * of_read_column
    log_sum_exp += batch * log_row + head * QUERIES * log_column
    delta += batch * delta_row + head * QUERIES
    key_main = tl.zeros([BLOCK, KEY_MAIN], tl.float32)
    key_extra = tl.zeros([BLOCK], tl.float32)
    value_main = tl.zeros([BLOCK, VALUE_MAIN], tl.float32)
    value_extra = tl.zeros([BLOCK], tl.float32)
    for start in range(0, ticks * QUERIES, ROWS):
        line = start + tl.arange(0, ROWS)
        real = line < ticks * QUERIES
        tick = (line // QUERIES).to(tl.int64)
        row = line % QUERIES
        offset = tick * query_tick + row * (KEY_WIDTH * query_column)
        q, q_last = _load_rows(query, offset, real, query_column, KEY_WIDTH, KEY_MAIN, KEY_LAST)
        offset = tick * of_read_tick + row * (VALUE_WIDTH * of_read_column)
        g, g_last = _load_rows(
            of_read, offset, real, of_read_column, VALUE_WIDTH, VALUE_MAIN, VALUE_LAST
        )
        g = g.to(k.dtype)
        logs = log_sum_exp + tick * log_tick + row * log_column
        logarithm = tl.load(logs, mask=real, other=float("inf"))
        scores = _times(k, k_last, q, q_last, KEY_LAST, PRECISION, UPCAST)
        weights = tl.exp2((scores - logarithm[None, :]) * _LOG2_E)
        if PART != "keys":
            value_main = dot(weights.to(k.dtype), g, value_main, PRECISION, UPCAST)
            if VALUE_LAST:
                value_extra += tl.sum(weights * g_last.to(tl.float32)[None, :], 1)
        if PART != "values":
            share = tl.load(delta + tick * delta_tick + row, mask=real, other=0.0)
            of_weights = _times(v, v_last, g, g_last, VALUE_LAST, PRECISION, UPCAST)
            of_scores = weights * (of_weights - share[None, :])
            key_main = dot(of_scores.to(k.dtype), q, key_main, PRECISION, UPCAST)
            if KEY_LAST:
                key_extra += tl.sum(of_scores * q_last.to(tl.float32)[None, :], 1)
    if PART != "values":
        of_keys += batch * of_keys_batch + head * of_keys_head
        _store_tile(
            of_keys, key_main, key_extra, position, positions, of_keys_position, of_keys_feature,
            KEY_WIDTH, KEY_LAST,
        )  # fmt: skip
    if PART != "keys":
        of_values += batch * of_values_batch + head * of_values_head
        _store_tile(
            of_values, value_main, value_extra, position, positions, of_values_position,
            of_values_feature, VALUE_WIDTH, VALUE_LAST,
        )  # fmt: skip


Strides = tuple[int, ...]


def _layout(
    shape: Strides, tensors: Mapping[str, tuple[Strides, bool]], itemsize: int
) -> tuple[dict[str, int], dict[str, Any]]:
    """The distances of ``keys`` and ``values`` and the number of positions, in units that divide
    them, and what the kernels know of it; of each the strides and whether positions come first."""
    batch, heads, positions, _ = shape
    strides = {
        # The launcher makes different code of strides that nothing goes along.
        name: (given[0] if batch > 1 else 0, given[1] if heads > 1 else 0, *given[2:])
        for name, (given, _) in tensors.items()
    }
    firsts = {name: first for name, (_, first) in tensors.items()}
    most = 16 // itemsize
    unit = math.gcd(most, positions if any(firsts.values()) else most)
    for name, (along_batch, along_heads, position, feature) in strides.items():
        unit = math.gcd(unit, along_batch, along_heads, feature if firsts[name] else position)
    integers = {"positions": positions // unit if any(firsts.values()) else positions}
    for name, (along_batch, along_heads, position, feature) in strides.items():
        integers |= {
            f"{name}_batch": along_batch // unit,
            f"{name}_head": along_heads // unit,
            f"{name}_position": position if firsts[name] else position // unit,
            f"{name}_feature": feature // unit if firsts[name] else feature,
        }
    known = {
        "UNIT": unit,
        "KEYS_FIRST": firsts["keys"],
        "VALUES_FIRST": firsts["values"],
    }
    return integers, known


def _least(device: Device) -> int:
    """Columns of a product, of which tensor cores of NVIDIA take 8."""
    return 16 if device.platform == "hip" else 8


def _rows(queries: int, key_width: int, value_width: int, device: Device) -> int:
    """Queries of a program: as many as the registers of each warp hold sums of."""
    width = max(split_width(key_width)[0], split_width(value_width)[0])
    least = _least(device)
    return min(padded(queries, least), max(least, 1024 // width))


def _constants(
    queries: int,
    key_width: int,
    value_width: int,
    shared: bool,
    rows: int,
    config: Config,
    device: Device,
) -> dict[str, Any]:
    """Of the kernels that walk over positions or queries."""
    (key_main, key_last), (value_main, value_last) = map(split_width, (key_width, value_width))
    return {
        "QUERIES": queries,
        "ROWS": rows,
        "KEY_WIDTH": key_width,
        "VALUE_WIDTH": value_width,
        "KEY_MAIN": key_main,
        "KEY_LAST": key_last,
        "VALUE_MAIN": value_main,
        "VALUE_LAST": value_last,
        "BLOCK": config.block_positions,
        "SLICES": min(config.num_warps, config.block_positions // 16),
        "SHARED": shared,
        "PRECISION": precision(device),
    }


def _tiles(columns: int, depth: int, itemsize: int, device: Device) -> dict[str, Any]:
    """Constants of the two products with the map to the queries: the whole depth at once, if it
    is not too much, since each step waits for memory."""
    return {
        "BLOCK_ROWS": _least(device),
        "BLOCK_COLUMNS": columns,
        "SLICES": _SLICES,
        "EACH": min(128 // itemsize, padded(-(-depth // _SLICES))),
        "PRECISION": precision(device),
        "num_warps": _SLICES,
        "num_stages": 1,
    }


def _together(splits: int) -> int:
    return min(4, padded(splits, 1))


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    device: Device,
) -> None:
    given = {**arguments, **constants}
    names = [name for name in kernel.arg_names if name in given]
    options = {name: given[name] for name in ("num_warps", "num_stages")}
    if "EARLY" in kernel.arg_names:
        options |= early(device)
    kernel[grid](**{name: given[name] for name in names}, **options)


def _strides(**tensors: torch.Tensor) -> dict[str, int]:
    """Row and column stride of each."""
    found: dict[str, int] = {}
    for name, tensor in tensors.items():
        found |= {f"{name}_row": tensor.stride(0), f"{name}_column": tensor.stride(1)}
    return found


def _walk(
    keys: torch.Tensor,
    values: torch.Tensor,
    queries: int,
    rows: int,
    config: Config,
    device: Device,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants of a kernel that reads keys and values."""
    tensors = {
        "keys": (keys.stride(), is_channels_first(keys)),
        "values": (values.stride(), is_channels_first(values)),
    }
    integers, known = _layout(tuple(keys.shape), tensors, keys.element_size())
    shared = is_shared(keys, values)
    constants = known | _constants(
        queries, keys.shape[3], values.shape[3], shared, rows, config, device
    )
    constants |= {
        "UPCAST": _upcast(keys, device),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return {"keys": keys, "values": values, "heads": keys.shape[1], **integers}, constants


def _upcast(tensor: torch.Tensor, device: Device) -> bool:
    return device.interpreted and tensor.dtype == torch.bfloat16


def forward(
    z: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    r: torch.Tensor,
    scale: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    before: torch.Tensor | None,
    read: torch.Tensor,
    sums: torch.Tensor,
    query: torch.Tensor,
    log_sum_exp: torch.Tensor,
    config: Config,
    device: Device,
) -> None:
    """Write the last four; nothing is empty."""
    (batch, pairs), columns = sums.shape, in_weight.shape[0]
    heads, positions, width = keys.shape[1:]
    last = sums if before is None else before
    arguments = {
        "z": z,
        "left": left.contiguous(),
        "right": right.contiguous(),
        "r": r.contiguous(),
        "scale": scale.contiguous(),
        "in_weight": in_weight,
        "in_bias": in_bias.contiguous(),
        "before": last,
        "sums": sums,
        "query": query,
        "rows": batch,
        "pairs": pairs,
        "columns": columns,
        **_strides(z=z, before=last, sums=sums, query=query, weight=in_weight),
    }
    constants = _tiles(_QUERY_COLUMNS, pairs, in_weight.element_size(), device)
    constants |= {"BEFORE": before is not None, "UPCAST": _upcast(z, device)}
    row_tiles = triton.cdiv(batch, constants["BLOCK_ROWS"])
    grid = (row_tiles * triton.cdiv(columns, _QUERY_COLUMNS),)
    _launch(query_kernel, grid, arguments, constants, device)

    queries = columns // (heads * width)
    rows = _rows(queries, width, values.shape[3], device)
    programs = batch * heads * triton.cdiv(queries, rows)
    arguments, constants = _walk(keys, values, queries, rows, config, device)
    splits, each = split_positions(programs, positions, config, device.processors)
    parts, logarithms, pieces = read, log_sum_exp, splits * constants["SLICES"]
    if splits > 1:
        parts = torch.empty((pieces * batch, read.shape[1]), dtype=torch.float32, device=z.device)
        logarithms = log_sum_exp.new_empty((pieces * batch, heads * queries))
    arguments |= {
        "query": query,
        "read": parts,
        "log_sum_exp": logarithms,
        "split_positions": each,
        **_strides(query=query, read=parts, log=logarithms),
    }
    _launch(
        attention_kernel, (programs, splits), arguments, constants | {"SPLIT": splits > 1}, device
    )
    if splits == 1:
        return
    arguments = {
        "parts": parts,
        "logarithms": logarithms,
        "read": read,
        "log_sum_exp": log_sum_exp,
        "batches": batch,
        "splits": pieces,
        "rows": heads * queries,
        **_strides(read=read, log=log_sum_exp),
    }
    constants = _join(values.shape[3], pieces)
    blocks = triton.cdiv(values.shape[3], constants["FEATURES"])
    _launch(join_kernel, (batch * heads * queries, blocks), arguments, constants, device)


def _join(width: int, splits: int) -> dict[str, int]:
    """Constants of the kernel that joins what each warp of each split found."""
    splits = padded(splits, 1)
    return {
        "WIDTH": width,
        "FEATURES": 32,
        "SPLITS": splits,
        "num_warps": max(1, min(8, splits // 16)),
        "num_stages": 1,
    }


def gradient(
    of_read: torch.Tensor,
    of_next: torch.Tensor | None,
    z: torch.Tensor,
    r: torch.Tensor | None,
    scale: torch.Tensor,
    in_weight: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    read: torch.Tensor,
    query: torch.Tensor,
    log_sum_exp: torch.Tensor,
    table: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    of_z: torch.Tensor,
    of_query: torch.Tensor,
    of_synchronisation: torch.Tensor,
    of_sums: torch.Tensor,
    config: Config,
    device: Device,
) -> None:
    """Add to ``of_z``, write the three after it. ``of_next`` counts r times, once without an
    ``r``; ``table`` is `core.torch_functions.neuron_table`."""
    (batch, pairs), (depth, _) = of_sums.shape, in_weight.shape
    heads, positions, width = keys.shape[1:]
    queries = depth // (heads * width)
    rows = _rows(queries, width, values.shape[3], device)
    programs = batch * heads * triton.cdiv(queries, rows)
    arguments, constants = _walk(keys, values, queries, rows, config, device)
    splits, each = split_positions(programs, positions, config, device.processors)
    parts = torch.empty((splits, batch, depth), dtype=torch.float32, device=z.device)
    arguments |= {
        "query": query,
        "read": read,
        "of_read": of_read,
        "log_sum_exp": log_sum_exp,
        "parts": parts,
        "split_positions": each,
        **_strides(query=query, read=read, of_read=of_read, log=log_sum_exp),
    }
    _launch(query_gradient_kernel, (programs, splits), arguments, constants, device)

    later = of_sums if of_next is None else of_next
    arguments = {
        "parts": parts,
        "in_weight": in_weight,
        "r": scale if r is None else r.contiguous(),
        "scale": scale.contiguous(),
        "of_next": later,
        "of_query": of_query,
        "of_synchronisation": of_synchronisation,
        "of_sums": of_sums,
        "rows": batch,
        "splits": splits,
        "pairs": pairs,
        "depth": depth,
        **_strides(
            weight=in_weight,
            of_next=later,
            of_query=of_query,
            of_synchronisation=of_synchronisation,
            of_sums=of_sums,
        ),
    }
    following = "none" if of_next is None else "given" if r is None else "decayed"
    constants = _tiles(_SUM_COLUMNS, depth, in_weight.element_size(), device)
    constants |= {"TOGETHER": _together(splits), "NEXT": following}
    constants |= {"UPCAST": _upcast(in_weight, device)}
    row_tiles = triton.cdiv(batch, constants["BLOCK_ROWS"])
    grid = (row_tiles * triton.cdiv(pairs, _SUM_COLUMNS),)
    _launch(sum_gradient_kernel, grid, arguments, constants, device)

    starts, pair_of, other_of = table
    neurons = z.shape[1]
    arguments = {
        "z": z,
        "of_sums": of_sums,
        "starts": starts,
        "pair_of": pair_of,
        "other_of": other_of,
        "of_z": of_z,
        "rows": batch,
        "neurons": neurons,
        **_strides(z=z, of_sums=of_sums, of_z=of_z),
    }
    blocks = triton.cdiv(batch, _COLLECT_ROWS), triton.cdiv(neurons, _COLLECT_NEURONS)
    _launch(collect_kernel, blocks, arguments, _collect(pairs, neurons), device)


def _collect(pairs: int, neurons: int) -> dict[str, int]:
    """Constants of `collect_kernel`: more pairs than neurons are all pairs of some of them, which
    have as many entries as these are."""
    return {
        "ROWS": _COLLECT_ROWS,
        "NEURONS": _COLLECT_NEURONS,
        "ENTRIES": 16 if pairs > neurons else 4,
        "num_warps": _WARPS,
        "num_stages": 1,
    }


def _parts(config: Config) -> tuple[str, ...]:
    return ("keys", "values") if config.apart else ("both",)


def key_gradient(
    of_read: torch.Tensor,
    delta: torch.Tensor,
    query: torch.Tensor,
    log_sum_exp: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    config: Config,
    device: Device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of keys and values from the queries of all ticks: ``of_read`` and ``query``
    (ticks, batch, heads * queries * width), ``log_sum_exp`` and contiguous ``delta``, what each
    query read times its gradient, (ticks, batch, heads * queries)."""
    ticks, batch, rows = log_sum_exp.shape
    heads, positions, _ = keys.shape[1:]
    arguments, constants = _walk(keys, values, rows // heads, config.block_queries, config, device)
    of_keys, of_values = torch.empty_like(keys), torch.empty_like(values)
    tensors = {"query": query, "of_read": of_read, "log": log_sum_exp}
    for name, tensor in tensors.items():
        along = zip(("tick", "row", "column"), tensor.stride(), strict=True)
        arguments |= {f"{name}_{key}": size for key, size in along}
    for name, tensor in (("of_keys", of_keys), ("of_values", of_values)):
        along = zip(("batch", "head", "position", "feature"), tensor.stride(), strict=True)
        arguments |= {f"{name}_{key}": size for key, size in along}
    arguments |= {
        "query": query,
        "of_read": of_read,
        "log_sum_exp": log_sum_exp,
        "delta": delta,
        "delta_tick": batch * rows,
        "delta_row": rows,
        "of_keys": of_keys,
        "of_values": of_values,
        "ticks": ticks,
    }
    grid = (batch * heads * triton.cdiv(positions, config.block_positions),)
    for part in _parts(config):
        _launch(key_gradient_kernel, grid, arguments, constants | {"PART": part}, device)
    return of_keys, of_values


_FLOAT32 = (
    *("parts", "logarithms", "log_sum_exp", "delta", "of_z"),
    *("r", "scale", "before", "sums", "of_next", "of_synchronisation", "of_sums"),
)
_INDICES = ("left", "right", "starts", "pair_of", "other_of")


def compilations(problem: Problem, config: Config, device: Device) -> list[Compilation]:
    """The specialisations that ``problem`` launches within a loop: contiguous tensors but for keys
    whose positions come first, sums in float32, after the first tick."""
    batch, neurons, pairs, heads, queries, positions, key_width, value_width = (
        size for _, size in problem.dims
    )
    shared, first = bool(problem.flag("shared")), bool(problem.flag("channels_first"))
    columns, widths = heads * queries * key_width, heads * queries * value_width
    strides = {
        name: (heads * positions * width, positions * width, *((1, positions) if turned else
               (width, 1)))
        for name, width, turned in (
            ("keys", key_width, first),
            ("values", value_width, first and shared),
        )
    }  # fmt: skip
    tensors = {name: (given, given[2] == 1) for name, given in strides.items()}
    layout, known = _layout((batch, heads, positions, key_width), tensors, problem.itemsize)
    rows = _rows(queries, key_width, value_width, device)
    programs = batch * heads * triton.cdiv(queries, rows)
    splits, each = split_positions(programs, positions, config, device.processors)
    lines = {
        **dict.fromkeys(("query", "of_query"), columns),
        **dict.fromkeys(("read", "of_read"), widths),
        **dict.fromkeys(("z", "of_z"), neurons),
        **dict.fromkeys(("before", "sums", "weight", "of_next", "of_sums"), pairs),
        "of_synchronisation": pairs,
        "log": heads * queries,
        "delta": heads * queries,
    }
    integers = {"rows": batch, "pairs": pairs, "columns": columns, "depth": columns}
    integers |= {"neurons": neurons, "heads": heads, "split_positions": each, "splits": splits}
    integers |= {"batches": batch, "ticks": 50, **layout}
    for name, width in lines.items():
        integers |= {f"{name}_row": width, f"{name}_column": 1, f"{name}_tick": batch * width}
    for name, given in strides.items():
        along = zip(("batch", "head", "position", "feature"), given, strict=True)
        integers |= {f"of_{name}_{key}": size for key, size in along}

    def made(
        kernel: Any,
        constants: Mapping[str, Any],
        programs: int,
        exact: tuple[str, ...] = _FLOAT32,
        sizes: Mapping[str, int] = integers,
        uses_dot: bool = True,
    ) -> Compilation:
        given = {**constants, **early(device)}
        found = compilation(
            kernel,
            problem.dtype,
            sizes,
            {k: v for k, v in given.items() if k in kernel.arg_names},
            exact=exact,
            uses_dot=uses_dot,
            programs=programs,
            num_warps=constants["num_warps"],
            num_stages=constants["num_stages"],
        )
        # Integers, and a tensor with the name of a number.
        types = dict.fromkeys(_INDICES, "*i64") | {"scale": "*fp32"}
        signature = {name: types.get(name, kind) for name, kind in found.signature.items()}
        pointers = tuple(
            name
            for name, kind in signature.items()
            if kind.startswith("*") and name not in found.divisible
        )
        return replace(found, signature=signature, divisible=(*found.divisible, *pointers))

    common = {"UPCAST": False, "num_warps": config.num_warps, "num_stages": config.num_stages}
    rows = config.block_queries if problem.direction == "key_gradient" else rows
    walk = common | known
    walk |= _constants(queries, key_width, value_width, shared, rows, config, device)
    row_tiles = triton.cdiv(batch, _least(device))
    if problem.direction == "key_gradient":
        blocks = triton.cdiv(positions, config.block_positions)
        return [
            made(key_gradient_kernel, walk | {"PART": part}, batch * heads * blocks)
            for part in _parts(config)
        ]
    if problem.direction == "backward":
        collect = triton.cdiv(batch, _COLLECT_ROWS) * triton.cdiv(neurons, _COLLECT_NEURONS)
        tiles = common | _tiles(_SUM_COLUMNS, columns, problem.itemsize, device)
        tiles |= {"NEXT": "decayed", "TOGETHER": _together(splits)}
        return [
            made(query_gradient_kernel, walk, programs * splits),
            made(sum_gradient_kernel, tiles, row_tiles * triton.cdiv(pairs, _SUM_COLUMNS)),
            made(collect_kernel, _collect(pairs, neurons), collect, uses_dot=False),
        ]
    tiles = common | _tiles(_QUERY_COLUMNS, pairs, problem.itemsize, device) | {"BEFORE": True}
    parts = ("read",) if splits > 1 else ()
    found = [
        made(query_kernel, tiles, row_tiles * triton.cdiv(columns, _QUERY_COLUMNS)),
        made(
            attention_kernel,
            walk | {"SPLIT": splits > 1},
            programs * splits,
            exact=(*_FLOAT32, *parts),
        ),
    ]
    if splits > 1:
        join, sizes = (
            _join(value_width, splits * walk["SLICES"]),
            integers | {"rows": heads * queries},
        )
        joins = batch * heads * queries * triton.cdiv(value_width, join["FEATURES"])
        found.append(made(join_kernel, join, joins, sizes=sizes, uses_dot=False))
    return found
