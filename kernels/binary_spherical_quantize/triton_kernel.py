"""Triton kernels of binary spherical quantization, and their launches.

The row kernels hold a tile of whole codes, (tokens, bits), so norm, code, index and entropies
follow from one read of the features. A group is a code of its own: grid axis 1.

The average distribution of blocks of several bits is a matrix product: a block of k bits splits
into two half-codes, whose tables L (tokens, 2 ** (k // 2)) and R (tokens, 2 ** (k - k // 2)) are
built in registers, and P = mean_n L_n R_n^T. Partial sums go to memory and are added in a second
stage in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..core.ahead_of_time import Compilation
from ..core.device import Device
from ..core.problem import Problem
from .spec import SMALLEST_NORM, Config, bits_of, padded

_SQUARED_SMALLEST_NORM = tl.constexpr(SMALLEST_NORM**2)
_SMALLEST_DOT = 16
_PROGRAMS_PER_PROCESSOR = 8
_JOINT = {"num_warps": 4, "num_stages": 1}
"""One stage: prefetching whole columns into shared memory costs registers and spilled."""


@triton.jit
def _probabilities(logit):
    """The two sides of a coin, sigmoid of +-logit, and the entropy of that coin.

    exp of a negative number only, and log(1 + e) as 2 artanh(e / (2 + e)): relative accuracy also
    where the coin is all but certain, which the hardware's log2 near 1 does not give.
    """
    size = tl.abs(logit)
    decay = tl.exp(-size)
    large = 1.0 / (1.0 + decay)
    small = decay * large
    s = decay / (2.0 + decay)
    s2 = s * s
    series = 1.0 / 13.0 + s2 * (1.0 / 15.0)
    series = 1.0 / 11.0 + s2 * series
    series = 1.0 / 9.0 + s2 * series
    series = 1.0 / 7.0 + s2 * series
    series = 1.0 / 5.0 + s2 * series
    series = 1.0 / 3.0 + s2 * series
    log1p = 2.0 * s * (1.0 + s2 * series)
    positive = logit >= 0
    return tl.where(positive, large, small), tl.where(positive, small, large), log1p + size * small


@triton.jit
def _inverse_norm(x):
    """1 / |row|, 0 for a zero vector; NaN stays NaN."""
    squared = tl.sum(x * x, axis=1)
    is_zero = squared <= _SQUARED_SMALLEST_NORM
    return tl.where(is_zero, 0.0, 1.0 / tl.sqrt(tl.where(is_zero, 1.0, squared)))


@triton.jit
def forward_kernel(
    features,
    quantized,
    indices,
    sample_entropy,
    inverse_norms,
    partial_sums,
    tokens,
    groups,
    token_stride,
    column_stride,
    tiles,
    slope,
    magnitude,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ENTROPY: tl.constexpr,
    MARGINALS: tl.constexpr,
    NORMS: tl.constexpr,
):
    """Codes, indices, sample entropies and per-chunk sums of each bit's coin."""
    chunk = tl.program_id(0)
    group = tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    in_code = column < BITS
    feature_column = (group * BITS + column).to(tl.int64) * column_stride
    shift = tl.where(in_code, BITS - 1 - column, 0)
    low_weight = tl.where(in_code & (shift < 32), 1 << (shift & 31), 0)
    high_weight = tl.where(shift >= 32, 1 << (shift & 31), 0)
    ones = tl.zeros([BLOCK_TOKENS, COLUMNS], tl.float32)
    zeros = tl.zeros([BLOCK_TOKENS, COLUMNS], tl.float32)
    for tile in range(tiles):
        token = (chunk.to(tl.int64) * tiles + tile) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        in_range = token < tokens
        mask = in_range[:, None] & in_code[None, :]
        source = features + (token * token_stride)[:, None] + feature_column[None, :]
        x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        inverse_norm = _inverse_norm(x)
        z = x * inverse_norm[:, None]

        code = tl.where(x >= 0, magnitude, -magnitude)
        code = tl.where(z == z, code, z)
        row = token * groups + group
        target = quantized + (row * BITS)[:, None] + column[None, :]
        tl.store(target, code.to(quantized.dtype.element_ty), mask=mask)
        # Two words of 32 bits: sums in int64 would take twice the registers.
        index = tl.sum(tl.where(x >= 0, low_weight[None, :], 0), axis=1).to(tl.int64)
        if BITS > 31:
            index = index & 0xFFFFFFFF
        if BITS > 32:
            high = tl.sum(tl.where(x >= 0, high_weight[None, :], 0), axis=1)
            index = index | (high.to(tl.int64) << 32)
        tl.store(indices + row, index, mask=in_range)

        if ENTROPY:
            p, q, entropy = _probabilities(slope * z)
            tl.store(
                sample_entropy + row,
                tl.sum(tl.where(in_code[None, :], entropy, 0.0), axis=1),
                mask=in_range,
            )
            if MARGINALS:
                ones += tl.where(mask, p, 0.0)
                zeros += tl.where(mask, q, 0.0)
        if NORMS:
            tl.store(inverse_norms + row, inverse_norm, mask=in_range)
    if MARGINALS:
        place = partial_sums + ((chunk * groups + group) * BITS + column) * 2
        tl.store(place, tl.sum(zeros, axis=0), mask=in_code)
        tl.store(place + 1, tl.sum(ones, axis=0), mask=in_code)


@triton.jit
def backward_kernel(
    features,
    of_quantized,
    of_sample_entropy,
    of_marginals,
    of_logits,
    gradient,
    tokens,
    groups,
    token_stride,
    column_stride,
    of_token_stride,
    of_column_stride,
    slope,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    SAMPLE: tl.constexpr,
    MARGINALS: tl.constexpr,
    LOGITS: tl.constexpr,
):
    """The gradient through straight-through, entropies and normalisation, in one pass."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    group = tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    in_code = column < BITS
    in_range = token < tokens
    mask = in_range[:, None] & in_code[None, :]
    feature_column = (group * BITS + column).to(tl.int64)
    row = token * groups + group
    place = (row * BITS)[:, None] + column[None, :]

    source = features + (token * token_stride)[:, None] + (feature_column * column_stride)[None, :]
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    inverse_norm = _inverse_norm(x)
    z = x * inverse_norm[:, None]
    of_z = tl.zeros([BLOCK_TOKENS, COLUMNS], tl.float32)
    if QUANTIZED:
        offset = (token * of_token_stride)[:, None] + (feature_column * of_column_stride)[None, :]
        of_z += tl.load(of_quantized + offset, mask=mask, other=0.0).to(tl.float32)
    if SAMPLE or MARGINALS:
        logit = slope * z
        p, q, _ = _probabilities(logit)
        of_probability = tl.zeros([BLOCK_TOKENS, COLUMNS], tl.float32)
        if SAMPLE:
            of_entropy = tl.load(of_sample_entropy + row, mask=in_range, other=0.0)
            of_probability -= of_entropy[:, None] * logit
        if MARGINALS:
            table = of_marginals + (group * BITS + column) * 2
            of_one = tl.load(table + 1, mask=in_code, other=0.0)
            of_zero = tl.load(table, mask=in_code, other=0.0)
            of_probability += ((of_one - of_zero) / tokens)[None, :]
        of_z += slope * of_probability * p * q
    if LOGITS:
        of_z += slope * tl.load(of_logits + place, mask=mask, other=0.0)
    radial = tl.sum(tl.where(mask, of_z * z, 0.0), axis=1)
    of_x = (of_z - radial[:, None] * z) * inverse_norm[:, None]
    tl.store(gradient + place, of_x.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def _coin(features, token, column, token_stride, column_stride, scale, in_range):
    """The two sides of one bit's coin. Columns are loaded one by one, from cache after the first:
    a tile in registers cannot be indexed."""
    source = features + token * token_stride + column.to(tl.int64) * column_stride
    logit = tl.load(source, mask=in_range, other=0.0).to(tl.float32) * scale
    decay = tl.exp(-tl.abs(logit))
    large = 1.0 / (1.0 + decay)
    small = decay * large
    return tl.where(logit >= 0, large, small), tl.where(logit >= 0, small, large)


@triton.jit
def _half_codes(
    features,
    token,
    first,
    token_stride,
    column_stride,
    scale,
    in_range,
    COUNT: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Probability of each value of ``COUNT`` bits from ``first`` on, (tokens, CODES); 0 in the
    padding."""
    value = tl.arange(0, CODES)
    real = in_range[:, None] & (value < (1 << COUNT))[None, :]
    table = tl.where(real, 1.0, tl.zeros([BLOCK_TOKENS, CODES], tl.float32))
    for bit in tl.static_range(COUNT):
        p, q = _coin(features, token, first + bit, token_stride, column_stride, scale, in_range)
        is_one = ((value >> (COUNT - 1 - bit)) & 1) == 1
        table *= tl.where(is_one[None, :], p[:, None], q[:, None])
    return table


@triton.jit
def joint_forward_kernel(
    features,
    inverse_norms,
    partial_sums,
    tokens,
    groups,
    token_stride,
    column_stride,
    tiles,
    slope,
    BITS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    LEFT_CODES: tl.constexpr,
    RIGHT_CODES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk's sum of products of half-codes, for one block of bits."""
    chunk = tl.program_id(0)
    block = tl.program_id(1)
    first = block * (LEFT + RIGHT)
    group = first // BITS
    total = tl.zeros([LEFT_CODES, RIGHT_CODES], tl.float32)
    for tile in range(tiles):
        token = (chunk.to(tl.int64) * tiles + tile) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        in_range = token < tokens
        scale = slope * tl.load(inverse_norms + token * groups + group, mask=in_range, other=0.0)
        left = _half_codes(
            features, token, first, token_stride, column_stride, scale, in_range,
            LEFT, LEFT_CODES, BLOCK_TOKENS,
        )  # fmt: skip
        right = _half_codes(
            features, token, first + LEFT, token_stride, column_stride, scale, in_range,
            RIGHT, RIGHT_CODES, BLOCK_TOKENS,
        )  # fmt: skip
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    i = tl.arange(0, LEFT_CODES)
    j = tl.arange(0, RIGHT_CODES)
    table = (chunk.to(tl.int64) * tl.num_programs(1) + block) << (LEFT + RIGHT)
    real = (i < (1 << LEFT))[:, None] & (j < (1 << RIGHT))[None, :]
    place = partial_sums + table + (i << RIGHT)[:, None] + j[None, :]
    tl.store(place, total, mask=real)


@triton.jit
def _store_logit_gradients(
    features,
    of_logits,
    weighted,
    token,
    first,
    width,
    token_stride,
    column_stride,
    scale,
    in_range,
    COUNT: tl.constexpr,
    CODES: tl.constexpr,
):
    value = tl.arange(0, CODES)
    for bit in tl.static_range(COUNT):
        p, q = _coin(features, token, first + bit, token_stride, column_stride, scale, in_range)
        is_one = (((value >> (COUNT - 1 - bit)) & 1) == 1)[None, :]
        of_one = tl.sum(tl.where(is_one, weighted, 0.0), axis=1)
        of_zero = tl.sum(tl.where(is_one, 0.0, weighted), axis=1)
        place = of_logits + token * width + first + bit
        # Both sums carry their own p or q: no cancellation when the bit is all but certain.
        tl.store(place, q * of_one - p * of_zero, mask=in_range)


@triton.jit
def joint_backward_kernel(
    features,
    inverse_norms,
    of_average,
    of_logits,
    tokens,
    groups,
    token_stride,
    column_stride,
    slope,
    BITS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    LEFT_CODES: tl.constexpr,
    RIGHT_CODES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The average distribution's cotangent pulled back to the logits of one block of bits."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    block = tl.program_id(1)
    first = block * (LEFT + RIGHT)
    group = first // BITS
    in_range = token < tokens
    width = groups * BITS
    scale = slope * tl.load(inverse_norms + token * groups + group, mask=in_range, other=0.0)
    i = tl.arange(0, LEFT_CODES)
    j = tl.arange(0, RIGHT_CODES)
    real = (i < (1 << LEFT))[:, None] & (j < (1 << RIGHT))[None, :]
    table = of_average + (block.to(tl.int64) << (LEFT + RIGHT))
    of_table = tl.load(table + (i << RIGHT)[:, None] + j[None, :], mask=real, other=0.0) / tokens
    left = _half_codes(
        features, token, first, token_stride, column_stride, scale, in_range,
        LEFT, LEFT_CODES, BLOCK_TOKENS,
    )  # fmt: skip
    right = _half_codes(
        features, token, first + LEFT, token_stride, column_stride, scale, in_range,
        RIGHT, RIGHT_CODES, BLOCK_TOKENS,
    )  # fmt: skip
    left_weighted = left * tl.dot(right, tl.trans(of_table), input_precision=PRECISION)
    right_weighted = right * tl.dot(left, of_table, input_precision=PRECISION)
    _store_logit_gradients(
        features, of_logits, left_weighted, token, first, width, token_stride, column_stride,
        scale, in_range, LEFT, LEFT_CODES,
    )  # fmt: skip
    _store_logit_gradients(
        features, of_logits, right_weighted, token, first + LEFT, width, token_stride,
        column_stride, scale, in_range, RIGHT, RIGHT_CODES,
    )  # fmt: skip


def _halves(entropy_bits: int) -> dict[str, int]:
    left, right = entropy_bits // 2, entropy_bits - entropy_bits // 2
    return {
        "LEFT": left,
        "RIGHT": right,
        "LEFT_CODES": max(1 << left, _SMALLEST_DOT),
        "RIGHT_CODES": max(1 << right, _SMALLEST_DOT),
    }


def _precision(platform: str, allow_tf32: bool) -> str:
    """Three TF32 products keep float32 accuracy on tensor cores; AMD has no TF32 dot."""
    if platform == "hip":
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


def _chunks(tokens: int, block_tokens: int, processors: int, rows: int) -> tuple[int, int]:
    """Programs along the tokens and tiles for each, enough programs to fill the device."""
    tiles = triton.cdiv(tokens, block_tokens)
    programs = min(tiles, triton.cdiv(_PROGRAMS_PER_PROCESSOR * processors, rows))
    each = triton.cdiv(tiles, programs)
    return triton.cdiv(tiles, each), each


def forward(
    features: torch.Tensor,
    temperature: float,
    groups: int,
    entropy_bits: int,
    config: Config,
    device: Device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch on ``features`` (tokens, width), tokens > 0.

    Returns ``quantized``, ``indices`` (tokens, groups), ``sample_entropy`` (tokens, groups),
    ``average`` (groups, blocks, 2 ** entropy_bits) and ``inverse_norms``; empty where not needed.
    """
    tokens, width = features.shape
    bits = width // groups
    joint = entropy_bits > 1
    quantized = torch.empty((tokens, width), dtype=features.dtype, device=features.device)
    indices = torch.empty((tokens, groups), dtype=torch.int64, device=features.device)

    def scratch(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=features.device)

    codes = (tokens, groups)
    sample_entropy = scratch(*codes) if entropy_bits else scratch(0)
    inverse_norms = scratch(*codes) if joint else scratch(0)
    chunks, tiles = triton.cdiv(tokens, config.block_tokens), 1
    if entropy_bits == 1:
        chunks, tiles = _chunks(tokens, config.block_tokens, device.processors, groups)
    partial_sums = scratch(chunks, groups, bits, 2) if entropy_bits == 1 else scratch(0)
    slope = 4.0 * temperature / bits**0.5
    forward_kernel[(chunks, groups)](
        features,
        quantized,
        indices,
        sample_entropy,
        inverse_norms,
        partial_sums,
        tokens,
        groups,
        *features.stride(),
        tiles,
        slope,
        bits**-0.5,
        BITS=bits,
        COLUMNS=padded(bits),
        BLOCK_TOKENS=config.block_tokens,
        ENTROPY=entropy_bits > 0,
        MARGINALS=entropy_bits == 1,
        NORMS=joint,
        num_warps=config.num_warps,
    )
    if joint:
        blocks = width // entropy_bits
        chunks, tiles = _chunks(tokens, config.joint_tokens, device.processors, blocks)
        partial_sums = scratch(chunks, groups, bits // entropy_bits, 1 << entropy_bits)
        joint_forward_kernel[(chunks, blocks)](
            features,
            inverse_norms,
            partial_sums,
            tokens,
            groups,
            *features.stride(),
            tiles,
            slope,
            BITS=bits,
            **_halves(entropy_bits),
            BLOCK_TOKENS=config.joint_tokens,
            PRECISION=_precision(device.platform, _allow_tf32()),
            **_JOINT,
        )
    average = partial_sums.sum(0) / tokens if entropy_bits else scratch(0)
    return quantized, indices, sample_entropy, average, inverse_norms


def backward(
    features: torch.Tensor,
    inverse_norms: torch.Tensor,
    of_quantized: torch.Tensor | None,
    of_sample_entropy: torch.Tensor | None,
    of_average: torch.Tensor | None,
    temperature: float,
    groups: int,
    entropy_bits: int,
    config: Config,
    device: Device,
) -> torch.Tensor:
    """The gradient of ``features`` (tokens, width), tokens > 0, for the cotangents given."""
    tokens, width = features.shape
    bits = width // groups
    gradient = torch.empty((tokens, width), dtype=features.dtype, device=features.device)
    slope = 4.0 * temperature / bits**0.5
    joint = entropy_bits > 1 and of_average is not None
    of_logits = gradient
    if joint:
        assert of_average is not None
        of_logits = torch.empty_like(gradient, dtype=torch.float32)
        grid = (triton.cdiv(tokens, config.joint_tokens), width // entropy_bits)
        joint_backward_kernel[grid](
            features,
            inverse_norms,
            of_average.contiguous(),
            of_logits,
            tokens,
            groups,
            *features.stride(),
            slope,
            BITS=bits,
            **_halves(entropy_bits),
            BLOCK_TOKENS=config.joint_tokens,
            PRECISION=_precision(device.platform, _allow_tf32()),
            **_JOINT,
        )
    marginals = entropy_bits == 1 and of_average is not None
    backward_kernel[(triton.cdiv(tokens, config.block_tokens), groups)](
        features,
        gradient if of_quantized is None else of_quantized,
        gradient if of_sample_entropy is None else of_sample_entropy.contiguous(),
        of_average.contiguous() if marginals and of_average is not None else gradient,
        of_logits,
        gradient,
        tokens,
        groups,
        *features.stride(),
        *(gradient if of_quantized is None else of_quantized).stride(),
        slope,
        BITS=bits,
        COLUMNS=padded(bits),
        BLOCK_TOKENS=config.block_tokens,
        QUANTIZED=of_quantized is not None,
        SAMPLE=of_sample_entropy is not None,
        MARGINALS=marginals,
        LOGITS=joint,
        num_warps=config.num_warps,
    )
    return gradient


def _allow_tf32() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


def compilations(problem: Problem, config: Config, device: Device) -> list[Compilation]:
    """The specialisations that ``problem`` launches, for contiguous features."""
    groups, entropy_bits = problem.flag("groups", 1), problem.flag("entropy_bits", 0)
    tokens, width, bits = problem["tokens"], problem["width"], bits_of(problem)
    forward = problem.direction == "forward"
    element = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[problem.dtype]
    types = dict.fromkeys(("features", "quantized", "of_quantized", "gradient"), element)
    types |= {"indices": "*i64", "slope": "fp32", "magnitude": "fp32"}

    def compilation(
        kernel: Any, constexprs: dict[str, Any], chunks: tuple[int, int], rows: int, **options: Any
    ) -> Compilation:
        integers = {
            "tokens": tokens,
            "groups": groups,
            "token_stride": width,
            "of_token_stride": width,
            "column_stride": 1,
            "of_column_stride": 1,
            "tiles": chunks[1],
        }
        # The launcher compiles an integer 1 in, and knows a multiple of 16.
        ones = {name for name, value in integers.items() if value == 1}
        constants = {**constexprs, **dict.fromkeys(ones.intersection(kernel.arg_names), 1)}
        signature = {
            name: "constexpr"
            if name in constants
            else types.get(name, "i32" if name in integers else "*fp32")
            for name in kernel.arg_names
        }
        divisible = tuple(
            name
            for name, kind in signature.items()
            if kind.startswith("*") or (kind == "i32" and integers[name] % 16 == 0)
        )
        programs = chunks[0] * rows
        return Compilation(kernel, signature, constants, divisible, programs=programs, **options)

    sides = {"BITS": bits, "COLUMNS": padded(bits), "BLOCK_TOKENS": config.block_tokens}
    chunks = triton.cdiv(tokens, config.block_tokens), 1
    if forward and entropy_bits == 1:
        chunks = _chunks(tokens, config.block_tokens, device.processors, groups)
    flags = {"MARGINALS": entropy_bits == 1}
    if forward:
        flags |= {"ENTROPY": entropy_bits > 0, "NORMS": entropy_bits > 1}
    else:
        flags |= {"QUANTIZED": True, "SAMPLE": entropy_bits > 0, "LOGITS": entropy_bits > 1}
    kernel = forward_kernel if forward else backward_kernel
    launched = [
        compilation(kernel, {**sides, **flags}, chunks, groups, num_warps=config.num_warps)
    ]
    if entropy_bits > 1:
        blocks = width // entropy_bits
        chunks = triton.cdiv(tokens, config.joint_tokens), 1
        if forward:
            chunks = _chunks(tokens, config.joint_tokens, device.processors, blocks)
        sides = {"BITS": bits, **_halves(entropy_bits), "BLOCK_TOKENS": config.joint_tokens}
        precision = {"PRECISION": _precision(device.platform, allow_tf32=False)}
        kernel = joint_forward_kernel if forward else joint_backward_kernel
        launched.append(
            compilation(kernel, {**sides, **precision}, chunks, blocks, uses_dot=True, **_JOINT)
        )
    return launched
