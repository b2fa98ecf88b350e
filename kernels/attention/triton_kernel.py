"""Triton kernels of attention, and their launches.

Forward, a program keeps a block of queries and walks over keys with an online softmax; the scores
never leave the chip. Where there are few queries the keys are split among programs, whose results
a second kernel joins. Backward makes the scores again from the log-sum-exp of each row: once by
blocks of queries, for their gradient, and once by blocks of keys, for that of keys and values, so
each sum has one owner, and results repeat bit for bit.

Logarithms are to base 2. The log-sum-exp of a row without keys is +inf: its weights are 0 then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.ahead_of_time import Compilation
from ..core.device import Device
from ..core.dropout import threshold as dropout_threshold
from ..core.problem import Problem
from ..core.triton_functions import dropout_keeps, dropout_row_keys
from .spec import Config, Options, padded

_LOG2_E = tl.constexpr(1.4426950408889634)
_KEYS_PER_SPLIT = 256
"""A program with fewer keys than this is not worth the second kernel."""
_WIDEST_BLOCK = 128
"""Features with which all tensors of a head fit the shared memory of every chip."""


class Inputs(NamedTuple):
    """What both passes are given."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    seed: torch.Tensor | None


class Kept(NamedTuple):
    """What the backward pass is given beside the inputs."""

    output: torch.Tensor
    lse: torch.Tensor
    of_output: torch.Tensor


@triton.jit
def _load_tokens(
    tensor, token, stride, feature, feature_stride, tokens, WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Tokens by features, or features by tokens; zeros beyond both."""
    of_token = token.to(tl.int64) * stride
    of_feature = feature.to(tl.int64) * feature_stride
    if TRANSPOSED:
        place = tensor + of_feature[:, None] + of_token[None, :]
        real = (feature < WIDTH)[:, None] & (token < tokens)[None, :]
    else:
        place = tensor + of_token[:, None] + of_feature[None, :]
        real = (token < tokens)[:, None] & (feature < WIDTH)[None, :]
    return tl.load(place, mask=real, other=0.0)


@triton.jit
def _dot(left, right, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """A product in float32; `UPCAST` because the interpreter cannot multiply bfloat16."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def _hide(
    scores, mask, row, column, row_stride, column_stride, queries, keys, CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Scores with the mask applied: -inf where a query does not see a key. ``row`` and ``column``
    broadcast against each other."""
    seen = (row < queries) & (column < keys)
    if MASK != "none":
        place = mask + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
        if MASK == "boolean":
            seen = seen & (tl.load(place, mask=seen, other=0) != 0)
        else:
            scores += tl.load(place, mask=seen, other=0.0).to(tl.float32) * _LOG2_E
    if CAUSAL:
        seen = seen & (column <= row)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def forward_kernel(
    query, key, value, mask, seed, output, lse,
    query_batch, query_head, query_token, query_feature,
    key_batch, key_head, key_token, key_feature,
    value_batch, value_head, value_token, value_feature,
    output_batch, output_head, output_token, output_feature,
    mask_batch, mask_head, mask_row, mask_column,
    heads, groups, queries, keys, split_keys,
    scale, threshold, kept_scale,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a block of queries, from all keys or, with `SPLIT`, some."""
    tiles = tl.cdiv(queries, BLOCK_QUERIES)
    tile = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    batch = (plane // heads).to(tl.int64)
    head = (plane % heads).to(tl.int64)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + (head // groups) * key_head
    value += batch * value_batch + (head // groups) * value_head
    if MASK != "none":
        mask += batch * mask_batch + head * mask_head

    row = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    feature = tl.arange(0, FEATURES)
    q = _load_tokens(query, row, query_token, feature, query_feature, queries, WIDTH, False)
    if DROPOUT:
        line = plane.to(tl.int64) * queries + row
        k0, k1 = dropout_row_keys(tl.load(seed), line)
    first = 0
    last = keys
    if SPLIT:
        first = tl.program_id(1) * split_keys
        last = tl.minimum(keys, first + split_keys)
    if CAUSAL:
        last = tl.minimum(last, (tile + 1) * BLOCK_QUERIES)
    largest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    sums = tl.zeros([BLOCK_QUERIES, FEATURES], tl.float32)
    for start in range(first, last, BLOCK_KEYS):
        column = start + tl.arange(0, BLOCK_KEYS)
        k = _load_tokens(key, column, key_token, feature, key_feature, keys, WIDTH, True)
        scores = _dot(q, k, PRECISION, UPCAST) * scale
        scores = _hide(
            scores, mask, row[:, None], column[None, :], mask_row, mask_column, queries, keys,
            CAUSAL, MASK,
        )  # fmt: skip
        highest = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen no key yet: -inf - -inf would be NaN.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(largest - base)
        total = total * decay + tl.sum(weights, 1)
        if DROPOUT:
            stays = dropout_keeps(k0[:, None], k1[:, None], column[None, :], threshold)
            weights = tl.where(stays, weights * kept_scale, 0.0)
        v = _load_tokens(value, column, value_token, feature, value_feature, keys, WIDTH, False)
        sums = sums * decay[:, None] + _dot(weights.to(v.dtype), v, PRECISION, UPCAST)
        largest = highest

    empty = total == 0.0
    sums = sums / tl.where(empty, 1.0, total)[:, None]
    logarithm = largest + tl.log2(tl.where(empty, 1.0, total))
    if SPLIT:
        # Scratch of (splits, planes, queries, features), without strides of its own.
        planes = tl.num_programs(0) // tiles
        line = (tl.program_id(1).to(tl.int64) * planes + plane) * queries + row
        place = output + line[:, None] * WIDTH + feature[None, :]
        tl.store(lse + line, logarithm, mask=row < queries)
    else:
        line = plane.to(tl.int64) * queries + row
        place = (
            output + batch * output_batch + head * output_head
            + (row.to(tl.int64) * output_token)[:, None]
            + (feature.to(tl.int64) * output_feature)[None, :]
        )  # fmt: skip
        tl.store(lse + line, tl.where(empty, float("inf"), logarithm), mask=row < queries)
    real = (row < queries)[:, None] & (feature < WIDTH)[None, :]
    tl.store(place, sums.to(output.dtype.element_ty), mask=real)


@triton.jit
def join_kernel(
    parts, logarithms, output, lse,
    output_batch, output_head, output_token, output_feature,
    heads, queries, lines, splits,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One row from what each split of the keys gives for it."""
    line = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    feature = tl.arange(0, FEATURES)
    logarithm = tl.load(
        logarithms + split * lines.to(tl.int64) + line, mask=split < splits, other=float("-inf")
    )
    largest = tl.max(logarithm, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    shares = tl.exp2(logarithm - base)
    total = tl.sum(shares, 0)
    place = (split * lines.to(tl.int64) + line)[:, None] * WIDTH + feature[None, :]
    real = (split < splits)[:, None] & (feature < WIDTH)[None, :]
    part = tl.load(parts + place, mask=real, other=0.0)
    empty = total == 0.0
    row = tl.sum(part * shares[:, None], 0) / tl.where(empty, 1.0, total)
    plane = line // queries
    place = (
        output + (plane // heads) * output_batch + (plane % heads) * output_head
        + (line % queries) * output_token + feature.to(tl.int64) * output_feature
    )  # fmt: skip
    tl.store(place, row.to(output.dtype.element_ty), mask=feature < WIDTH)
    logarithm = base + tl.log2(tl.where(empty, 1.0, total))
    tl.store(lse + line, tl.where(empty, float("inf"), logarithm))


@triton.jit
def query_gradient_kernel(
    query, key, value, mask, seed, output, of_output, lse, deltas, of_query,
    query_batch, query_head, query_token, query_feature,
    key_batch, key_head, key_token, key_feature,
    value_batch, value_head, value_token, value_feature,
    output_batch, output_head, output_token, output_feature,
    given_batch, given_head, given_token, given_feature,
    gradient_batch, gradient_head, gradient_token, gradient_feature,
    mask_batch, mask_head, mask_row, mask_column,
    heads, groups, queries, keys, split_keys,
    scale, scale_2, threshold, kept_scale,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries, and each row's product of output and its gradient, which
    the other kernel needs. `scale_2` is for logarithms to base 2."""
    tiles = tl.cdiv(queries, BLOCK_QUERIES)
    tile = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    batch = (plane // heads).to(tl.int64)
    head = (plane % heads).to(tl.int64)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + (head // groups) * key_head
    value += batch * value_batch + (head // groups) * value_head
    output += batch * output_batch + head * output_head
    of_output += batch * given_batch + head * given_head
    if MASK != "none":
        mask += batch * mask_batch + head * mask_head

    row = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    in_range = row < queries
    line = plane.to(tl.int64) * queries + row
    feature = tl.arange(0, FEATURES)
    q = _load_tokens(query, row, query_token, feature, query_feature, queries, WIDTH, False)
    g = _load_tokens(of_output, row, given_token, feature, given_feature, queries, WIDTH, False)
    o = _load_tokens(output, row, output_token, feature, output_feature, queries, WIDTH, False)
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(deltas + line, delta, mask=in_range & (tl.program_id(1) == 0))
    logarithm = tl.load(lse + line, mask=in_range, other=float("inf"))
    if DROPOUT:
        k0, k1 = dropout_row_keys(tl.load(seed), line)
    first = 0
    last = keys
    if SPLIT:
        first = tl.program_id(1) * split_keys
        last = tl.minimum(keys, first + split_keys)
    if CAUSAL:
        last = tl.minimum(last, (tile + 1) * BLOCK_QUERIES)
    gradient = tl.zeros([BLOCK_QUERIES, FEATURES], tl.float32)
    for start in range(first, last, BLOCK_KEYS):
        column = start + tl.arange(0, BLOCK_KEYS)
        k = _load_tokens(key, column, key_token, feature, key_feature, keys, WIDTH, False)
        scores = _dot(q, tl.trans(k), PRECISION, UPCAST) * scale_2
        scores = _hide(
            scores, mask, row[:, None], column[None, :], mask_row, mask_column, queries, keys,
            CAUSAL, MASK,
        )  # fmt: skip
        weights = tl.exp2(scores - logarithm[:, None])
        v = _load_tokens(value, column, value_token, feature, value_feature, keys, WIDTH, True)
        of_weights = _dot(g, v, PRECISION, UPCAST)
        if DROPOUT:
            stays = dropout_keeps(k0[:, None], k1[:, None], column[None, :], threshold)
            of_weights = tl.where(stays, of_weights * kept_scale, 0.0)
        of_scores = weights * (of_weights - delta[:, None])
        gradient += _dot(of_scores.to(k.dtype), k, PRECISION, UPCAST)
    gradient *= scale
    if SPLIT:
        planes = tl.num_programs(0) // tiles
        place = of_query + (
            (tl.program_id(1).to(tl.int64) * planes * queries + line)[:, None] * WIDTH
            + feature[None, :]
        )
    else:
        place = (
            of_query + batch * gradient_batch + head * gradient_head
            + (row.to(tl.int64) * gradient_token)[:, None]
            + (feature.to(tl.int64) * gradient_feature)[None, :]
        )  # fmt: skip
    real = in_range[:, None] & (feature < WIDTH)[None, :]
    tl.store(place, gradient.to(of_query.dtype.element_ty), mask=real)


@triton.jit
def key_gradient_kernel(
    query, key, value, mask, seed, of_output, lse, deltas, of_key, of_value,
    query_batch, query_head, query_token, query_feature,
    key_batch, key_head, key_token, key_feature,
    value_batch, value_head, value_token, value_feature,
    given_batch, given_head, given_token, given_feature,
    of_key_batch, of_key_head, of_key_token, of_key_feature,
    of_value_batch, of_value_head, of_value_token, of_value_feature,
    mask_batch, mask_head, mask_row, mask_column,
    heads, groups, queries, keys,
    scale, scale_2, threshold, kept_scale,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values, summed over the heads that share them. Scores
    here are keys by queries."""
    tiles = tl.cdiv(keys, BLOCK_KEYS)
    tile = tl.program_id(0) % tiles
    shared = tl.program_id(0) // tiles
    key_heads = heads // groups
    batch = (shared // key_heads).to(tl.int64)
    key_plane = (shared % key_heads).to(tl.int64)
    key += batch * key_batch + key_plane * key_head
    value += batch * value_batch + key_plane * value_head

    column = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    feature = tl.arange(0, FEATURES)
    k = _load_tokens(key, column, key_token, feature, key_feature, keys, WIDTH, False)
    v = _load_tokens(value, column, value_token, feature, value_feature, keys, WIDTH, False)
    key_sums = tl.zeros([BLOCK_KEYS, FEATURES], tl.float32)
    value_sums = tl.zeros([BLOCK_KEYS, FEATURES], tl.float32)
    first = 0
    if CAUSAL:
        first = tile * BLOCK_KEYS // BLOCK_QUERIES * BLOCK_QUERIES
    for group in range(groups):
        head = key_plane * groups + group
        plane = batch * heads + head
        of_query_head = query + batch * query_batch + head * query_head
        of_given_head = of_output + batch * given_batch + head * given_head
        of_mask_head = mask
        if MASK != "none":
            of_mask_head = mask + batch * mask_batch + head * mask_head
        for start in range(first, queries, BLOCK_QUERIES):
            row = start + tl.arange(0, BLOCK_QUERIES)
            line = plane * queries + row
            logarithm = tl.load(lse + line, mask=row < queries, other=float("inf"))
            delta = tl.load(deltas + line, mask=row < queries, other=0.0)
            q = _load_tokens(
                of_query_head, row, query_token, feature, query_feature, queries, WIDTH, False
            )
            scores = _dot(k, tl.trans(q), PRECISION, UPCAST) * scale_2
            scores = _hide(
                scores, of_mask_head, row[None, :], column[:, None], mask_row, mask_column,
                queries, keys, CAUSAL, MASK,
            )  # fmt: skip
            weights = tl.exp2(scores - logarithm[None, :])
            g = _load_tokens(
                of_given_head, row, given_token, feature, given_feature, queries, WIDTH, False
            )
            of_weights = _dot(v, tl.trans(g), PRECISION, UPCAST)
            kept = weights
            if DROPOUT:
                k0, k1 = dropout_row_keys(tl.load(seed), line)
                stays = dropout_keeps(k0[None, :], k1[None, :], column[:, None], threshold)
                kept = tl.where(stays, weights * kept_scale, 0.0)
                of_weights = tl.where(stays, of_weights * kept_scale, 0.0)
            value_sums += _dot(kept.to(g.dtype), g, PRECISION, UPCAST)
            of_scores = weights * (of_weights - delta[None, :])
            key_sums += _dot(of_scores.to(q.dtype), q, PRECISION, UPCAST)
    real = (column < keys)[:, None] & (feature < WIDTH)[None, :]
    place = (
        of_key + batch * of_key_batch + key_plane * of_key_head
        + (column.to(tl.int64) * of_key_token)[:, None]
        + (feature.to(tl.int64) * of_key_feature)[None, :]
    )  # fmt: skip
    tl.store(place, (key_sums * scale).to(of_key.dtype.element_ty), mask=real)
    place = (
        of_value + batch * of_value_batch + key_plane * of_value_head
        + (column.to(tl.int64) * of_value_token)[:, None]
        + (feature.to(tl.int64) * of_value_feature)[None, :]
    )  # fmt: skip
    tl.store(place, value_sums.to(of_value.dtype.element_ty), mask=real)


@triton.jit
def short_gradient_kernel(
    query, key, value, mask, seed, output, of_output, lse, of_query, of_key, of_value,
    query_batch, query_head, query_token, query_feature,
    key_batch, key_head, key_token, key_feature,
    value_batch, value_head, value_token, value_feature,
    output_batch, output_head, output_token, output_feature,
    given_batch, given_head, given_token, given_feature,
    gradient_batch, gradient_head, gradient_token, gradient_feature,
    of_key_batch, of_key_head, of_key_token, of_key_feature,
    of_value_batch, of_value_head, of_value_token, of_value_feature,
    mask_batch, mask_head, mask_row, mask_column,
    heads, queries, keys,
    scale, scale_2, threshold, kept_scale,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """All three gradients of one head whose scores are one block: five products, not seven."""
    plane = tl.program_id(0)
    batch = (plane // heads).to(tl.int64)
    head = (plane % heads).to(tl.int64)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    output += batch * output_batch + head * output_head
    of_output += batch * given_batch + head * given_head
    if MASK != "none":
        mask += batch * mask_batch + head * mask_head

    row = tl.arange(0, BLOCK_QUERIES)
    column = tl.arange(0, BLOCK_KEYS)
    feature = tl.arange(0, FEATURES)
    line = plane.to(tl.int64) * queries + row
    g = _load_tokens(of_output, row, given_token, feature, given_feature, queries, WIDTH, False)
    o = _load_tokens(output, row, output_token, feature, output_feature, queries, WIDTH, False)
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    logarithm = tl.load(lse + line, mask=row < queries, other=float("inf"))
    q = _load_tokens(query, row, query_token, feature, query_feature, queries, WIDTH, False)
    k = _load_tokens(key, column, key_token, feature, key_feature, keys, WIDTH, False)
    scores = _dot(q, tl.trans(k), PRECISION, UPCAST) * scale_2
    scores = _hide(
        scores, mask, row[:, None], column[None, :], mask_row, mask_column, queries, keys,
        CAUSAL, MASK,
    )  # fmt: skip
    weights = tl.exp2(scores - logarithm[:, None])
    v = _load_tokens(value, column, value_token, feature, value_feature, keys, WIDTH, False)
    of_weights = _dot(g, tl.trans(v), PRECISION, UPCAST)
    kept = weights
    if DROPOUT:
        k0, k1 = dropout_row_keys(tl.load(seed), line)
        stays = dropout_keeps(k0[:, None], k1[:, None], column[None, :], threshold)
        kept = tl.where(stays, weights * kept_scale, 0.0)
        of_weights = tl.where(stays, of_weights * kept_scale, 0.0)
    in_keys = (column < keys)[:, None] & (feature < WIDTH)[None, :]
    sums = _dot(tl.trans(kept.to(g.dtype)), g, PRECISION, UPCAST)
    place = (
        of_value + batch * of_value_batch + head * of_value_head
        + (column.to(tl.int64) * of_value_token)[:, None]
        + (feature.to(tl.int64) * of_value_feature)[None, :]
    )  # fmt: skip
    tl.store(place, sums.to(of_value.dtype.element_ty), mask=in_keys)
    of_scores = (weights * (of_weights - delta[:, None])).to(q.dtype)
    sums = _dot(tl.trans(of_scores), q, PRECISION, UPCAST) * scale
    place = (
        of_key + batch * of_key_batch + head * of_key_head
        + (column.to(tl.int64) * of_key_token)[:, None]
        + (feature.to(tl.int64) * of_key_feature)[None, :]
    )  # fmt: skip
    tl.store(place, sums.to(of_key.dtype.element_ty), mask=in_keys)
    sums = _dot(of_scores, k, PRECISION, UPCAST) * scale
    place = (
        of_query + batch * gradient_batch + head * gradient_head
        + (row.to(tl.int64) * gradient_token)[:, None]
        + (feature.to(tl.int64) * gradient_feature)[None, :]
    )  # fmt: skip
    real = (row < queries)[:, None] & (feature < WIDTH)[None, :]
    tl.store(place, sums.to(of_query.dtype.element_ty), mask=real)


@dataclass(frozen=True)
class _Launch:
    """One kernel with everything it is given: what a launch and a compilation have in common."""

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    uses_dot: bool = True

    def run(self) -> None:
        self.kernel[self.grid](
            **self.arguments,
            **self.constants,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )

    def compilation(self) -> Compilation:
        """As the launcher specialises: None and 1 are compiled in, multiples of 16 are known."""
        kinds = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
        kinds |= {torch.bool: "*i1", torch.int64: "*i64"}
        constants, signature, divisible = dict(self.constants), {}, []
        for name in self.kernel.arg_names:
            value = self.arguments.get(name)
            if value is None or (isinstance(value, int) and value == 1):
                constants.setdefault(name, value)
                signature[name] = "constexpr"
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif isinstance(value, int):
                signature[name] = "i32" if value < 1 << 31 else "i64"
                divisible += [name] if value % 16 == 0 else []
            else:
                signature[name] = kinds[value.dtype]
                divisible.append(name)
        return Compilation(
            self.kernel,
            signature,
            constants,
            tuple(divisible),
            self.num_warps,
            self.num_stages,
            programs=self.grid[0] * (self.grid[1] if len(self.grid) > 1 else 1),
            uses_dot=self.uses_dot,
        )


def _strides(**tensors: torch.Tensor) -> dict[str, int]:
    axes = ("batch", "head", "token", "feature")
    return {
        f"{name}_{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip(axes, tensor.stride(), strict=True)
    }


def _mask(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> tuple[dict[str, Any], str]:
    """The mask with a stride for each axis, 0 where it repeats, and its kind."""
    names = ("mask_batch", "mask_head", "mask_row", "mask_column")
    if mask is None:
        return {"mask": None, **dict.fromkeys(names, 0)}, "none"
    whole = mask.expand(*query.shape[:3], key.shape[2])
    kind = "boolean" if mask.dtype == torch.bool else "additive"
    return {"mask": mask, **dict(zip(names, whole.stride(), strict=True))}, kind


def _precision(dtype: torch.dtype, platform: str, allow_tf32: bool) -> str:
    """Three TF32 products keep float32 accuracy on tensor cores; AMD has no TF32 dot."""
    if platform == "hip" or dtype != torch.float32:
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


def _common(
    inputs: Inputs, options: Options, config: Config, device: Device, allow_tf32: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments and the constants that all but the joining kernel take."""
    query, key, _, mask, seed = inputs
    causal, _, dropout = options
    _, heads, queries, width = query.shape
    given, kind = _mask(mask, query, key)
    arguments = {
        **given,
        "seed": seed,
        "heads": heads,
        "groups": heads // key.shape[1],
        "queries": queries,
        "keys": key.shape[2],
        "threshold": dropout_threshold(dropout),
        "kept_scale": 1.0 / (1.0 - dropout),
    }
    constants = {
        "WIDTH": width,
        "FEATURES": padded(width, 16),
        "BLOCK_QUERIES": config.block_queries,
        "BLOCK_KEYS": config.block_keys,
        "CAUSAL": causal,
        "MASK": kind,
        "DROPOUT": dropout > 0,
        "PRECISION": _precision(query.dtype, device.platform, allow_tf32),
        "UPCAST": device.interpreted and query.dtype == torch.bfloat16,
    }
    return arguments, constants


def _splits(programs: int, keys: int, device: Device) -> tuple[int, int]:
    """Into how many parts the keys go so that the device is busy, and the keys of each."""
    wanted = 2 * device.processors // max(programs, 1)
    splits = max(1, min(wanted, keys // _KEYS_PER_SPLIT, 64))
    each = -(-keys // splits)
    each = -(-each // 64) * 64
    return -(-keys // each), each


def _forward(
    inputs: Inputs, options: Options, config: Config, device: Device, allow_tf32: bool
) -> tuple[torch.Tensor, torch.Tensor, list[_Launch]]:
    query, key, value, _, _ = inputs
    batch, heads, queries, width = query.shape
    arguments, constants = _common(inputs, options, config, device, allow_tf32)
    # Strides in the order of the query's: what comes next may want the result as it came.
    output = torch.empty_like(query)
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    programs = batch * heads * -(-queries // config.block_queries)
    splits, each = _splits(programs, key.shape[2], device)
    part, logarithms = output, lse
    if splits > 1:
        part = query.new_empty((splits, *query.shape), dtype=torch.float32)
        logarithms = query.new_empty((splits, *lse.shape), dtype=torch.float32)
    launches = [
        _Launch(
            forward_kernel,
            arguments
            | {"query": query, "key": key, "value": value, "output": part, "lse": logarithms}
            | _strides(query=query, key=key, value=value, output=output)
            | {"scale": options.scale * _LOG2_E.value, "split_keys": each},
            constants | {"SPLIT": splits > 1},
            (programs, splits),
            config.num_warps,
            config.num_stages,
        )
    ]
    if splits > 1:
        lines = batch * heads * queries
        joined = {
            "parts": part,
            "logarithms": logarithms,
            "output": output,
            "lse": lse,
            "heads": heads,
            "queries": queries,
            "lines": lines,
            "splits": splits,
        }
        sizes = {"WIDTH": width, "FEATURES": padded(width, 16), "SPLITS": padded(splits)}
        strides = _strides(output=output)
        launches.append(_Launch(join_kernel, joined | strides, sizes, (lines,), 4, 1, False))
    return output, lse, launches


def _backward(
    inputs: Inputs,
    kept: Kept,
    options: Options,
    config: Config,
    device: Device,
    allow_tf32: bool,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], list[_Launch]]:
    """The gradients, that of the queries for each split of the keys where there are splits."""
    query, key, value, _, _ = inputs
    output, lse, of_output = kept
    batch, heads, queries, _ = query.shape
    arguments, constants = _common(inputs, options, config, device, allow_tf32)
    of_query, of_key, of_value = (torch.empty_like(x) for x in (query, key, value))
    gradients = {"of_key": of_key, "of_value": of_value}
    how = config.num_warps, config.num_stages
    arguments |= {
        "query": query,
        "key": key,
        "value": value,
        "of_output": of_output,
        "lse": lse,
        "scale": options.scale,
        "scale_2": options.scale * _LOG2_E.value,
        **_strides(query=query, key=key, value=value, given=of_output),
    }
    own = _strides(output=output, gradient=of_query) | {"output": output}
    whole = queries <= config.block_queries and key.shape[2] <= config.block_keys
    if whole and heads == key.shape[1] and constants["FEATURES"] <= _WIDEST_BLOCK:
        arguments |= own | gradients | _strides(**gradients) | {"of_query": of_query}
        del arguments["groups"]
        once = _Launch(short_gradient_kernel, arguments, constants, (batch * heads,), *how)
        return (of_query, of_key, of_value), [once]
    arguments["deltas"] = torch.empty_like(lse)
    programs = batch * heads * -(-queries // config.block_queries)
    splits, each = _splits(programs, key.shape[2], device)
    if splits > 1:
        of_query = query.new_empty((splits, *query.shape), dtype=torch.float32)
    by_queries = _Launch(
        query_gradient_kernel,
        arguments | own | {"of_query": of_query, "split_keys": each},
        constants | {"SPLIT": splits > 1},
        (programs, splits),
        *how,
    )
    tiles = batch * key.shape[1] * -(-key.shape[2] // config.block_keys)
    by_keys = _Launch(
        key_gradient_kernel,
        arguments | gradients | _strides(**gradients),
        constants,
        (tiles,),
        *how,
    )
    return (of_query, of_key, of_value), [by_queries, by_keys]


def forward(
    inputs: Inputs, options: Options, config: Config, device: Device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, in strides ordered like the query's, and the log-sum-exp of each row, (batch,
    heads, queries). Nothing may be empty."""
    output, lse, launches = _forward(inputs, options, config, device, _allow_tf32())
    for launch in launches:
        launch.run()
    return output, lse


def backward(
    inputs: Inputs, kept: Kept, options: Options, config: Config, device: Device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, in strides ordered like theirs."""
    gradients, launches = _backward(inputs, kept, options, config, device, _allow_tf32())
    of_query, of_key, of_value = gradients
    for launch in launches:
        launch.run()
    if of_query.ndim > inputs.query.ndim:
        of_query = torch.empty_like(inputs.query).copy_(of_query.sum(0))
    return of_query, of_key, of_value


def _allow_tf32() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


def compilations(problem: Problem, config: Config, device: Device) -> list[Compilation]:
    """The specialisations that ``problem`` launches."""
    batch, heads, key_heads, queries, keys, width = (size for _, size in problem.dims)
    dtype = getattr(torch, problem.dtype)

    def tensor(head_count: int, tokens: int) -> torch.Tensor:
        if problem.flag("channels_first"):
            # Queries, keys and values of one projection, side by side in each head.
            shape = batch, head_count, 3 * width, tokens
            return torch.empty(shape, dtype=dtype, device="meta")[:, :, :width].mT
        return torch.empty((batch, head_count, tokens, width), dtype=dtype, device="meta")

    query, key = tensor(heads, queries), tensor(key_heads, keys)
    mask = None
    if problem.flag("mask"):
        kind = torch.bool if problem.flag("mask") == "boolean" else dtype
        mask = torch.empty((batch, 1, queries, keys), dtype=kind, device="meta")
    dropout = 0.1 if problem.flag("dropout") else 0.0
    seed = torch.empty((), dtype=torch.int64, device="meta") if dropout else None
    inputs = Inputs(query, key, key, mask, seed)
    options = Options(bool(problem.flag("causal")), 1.0, dropout)
    if problem.direction == "forward":
        launches = _forward(inputs, options, config, device, False)[2]
    else:
        lse = torch.empty((batch, heads, queries), device="meta")
        kept = Kept(torch.empty_like(query), lse, torch.empty_like(query))
        launches = _backward(inputs, kept, options, config, device, False)[1]
    return [launch.compilation() for launch in launches]
