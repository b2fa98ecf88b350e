"""Triton kernels of synchronisation, and their launches.

A lane follows one pair of one sample through time with alpha and beta in its registers; the
activations of several ticks are loaded at once, since a load that waits for the tick before would
be all the time there is. The backward pass is the same walk from the last tick to the first, then
a kernel in which every neuron collects from its pairs in a fixed order: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..core.ahead_of_time import Compilation
from ..core.device import Device
from ..core.problem import Problem
from .spec import Config

_ROWS, _NEURONS, _COLLECT_WARPS = 8, 128, 4


@triton.jit
def _before(r, elapsed):
    """Beta after ``elapsed`` ticks, and its derivative by r."""
    beta = tl.zeros_like(r)
    slope = tl.zeros_like(r)
    for _ in range(elapsed):
        slope = beta + r * slope
        beta = r * beta + 1.0
    return beta, slope


# A multiple of 16 among these would let a thread hold neighbouring pairs instead of all ticks, or
# only make more code.
_GENERAL = ["elapsed", "ticks", "elements", "pairs", "rows", "samples"]
_STRIDES = ["z_tick", "z_sample"]


@triton.jit(do_not_specialize=[*_GENERAL[:4], "neurons", *_STRIDES])
def forward_kernel(
    activations,
    left,
    right,
    decay,
    previous,
    s,
    scale,
    elapsed,
    ticks,
    elements,
    neurons,
    pairs,
    z_tick,
    z_sample,
    z_neuron,
    BLOCK: tl.constexpr,
    TICKS: tl.constexpr,
    PREVIOUS: tl.constexpr,
):
    """``BLOCK`` of the (samples, pairs), through all ticks."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = element < elements
    sample, pair = element // pairs, element % pairs
    one = tl.load(left + pair, mask=real, other=0).to(tl.int64)
    other = tl.load(right + pair, mask=real, other=0).to(tl.int64)
    # A pair that names no neuron reads nothing, and shows.
    real_one = real & (one >= 0) & (one < neurons)
    real_other = real & (other >= 0) & (other < neurons)
    r = tl.exp(-tl.load(decay + pair, mask=real, other=0.0).to(tl.float32))
    alpha = tl.zeros([BLOCK], tl.float32)
    beta = alpha
    if PREVIOUS:
        beta, _ = _before(r, elapsed)
        before = tl.load(previous + element, mask=real, other=0.0).to(tl.float32)
        alpha = before * tl.sqrt(beta)
    line = tl.arange(0, TICKS)
    source_one = activations + sample * z_sample + one * z_neuron
    source_other = activations + sample * z_sample + other * z_neuron
    for first in range(0, ticks, TICKS):
        tick = first + line
        in_time = (tick < ticks)[:, None]
        offset = (tick.to(tl.int64) * z_tick)[:, None]
        nan = float("nan")
        left_z = tl.load(source_one[None, :] + offset, mask=in_time & real_one[None, :], other=nan)
        right_z = tl.load(
            source_other[None, :] + offset, mask=in_time & real_other[None, :], other=nan
        )
        product = left_z.to(tl.float32) * right_z.to(tl.float32)
        result = tl.zeros([TICKS, BLOCK], tl.float32)
        scales = tl.zeros([TICKS, BLOCK], tl.float32)
        for i in tl.static_range(TICKS):
            here = (line == i)[:, None]
            alpha = r * alpha + tl.sum(tl.where(here, product, 0.0), axis=0)
            beta = r * beta + 1.0
            inverse = 1.0 / tl.sqrt(beta)
            result = tl.where(here, (alpha * inverse)[None, :], result)
            scales = tl.where(here, inverse[None, :], scales)
        target = s + (tick.to(tl.int64) * elements)[:, None] + element[None, :]
        tl.store(target, result.to(s.dtype.element_ty), mask=in_time & real[None, :])
        place = scale + (tick.to(tl.int64) * pairs)[:, None] + pair[None, :]
        tl.store(place, scales, mask=in_time & (real & (sample == 0))[None, :])


@triton.jit(do_not_specialize=[*_GENERAL[:4], "of_s_tick", "of_s_sample"])
def backward_kernel(
    decay,
    previous,
    s,
    scale,
    of_s,
    of_products,
    of_decay,
    of_previous,
    elapsed,
    ticks,
    elements,
    pairs,
    of_s_tick,
    of_s_sample,
    of_s_pair,
    BLOCK: tl.constexpr,
    TICKS: tl.constexpr,
    PREVIOUS: tl.constexpr,
):
    """``BLOCK`` of the (samples, pairs), from the last tick to the first: the gradients of each
    product, of the decay by each sample, and of what came before."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = element < elements
    sample, pair = element // pairs, element % pairs
    r = tl.exp(-tl.load(decay + pair, mask=real, other=0.0).to(tl.float32))
    beta_before = tl.zeros([BLOCK], tl.float32)
    slope = beta_before
    before = beta_before
    if PREVIOUS:
        beta_before, slope = _before(r, elapsed)
        before = tl.load(previous + element, mask=real, other=0.0).to(tl.float32)
    root = tl.sqrt(beta_before)
    of_alpha = tl.zeros([BLOCK], tl.float32)
    of_beta = of_alpha
    of_r = of_alpha
    line = tl.arange(0, TICKS)
    cotangent_at = of_s + sample * of_s_sample + pair * of_s_pair
    blocks = tl.cdiv(ticks, TICKS)
    for block in range(blocks):
        tick = (blocks - 1 - block) * TICKS + line
        mask = (tick < ticks)[:, None] & real[None, :]
        earlier = mask & (tick > 0)[:, None]
        far = tick.to(tl.int64)[:, None]
        scales_at = scale + far * pairs + pair[None, :]
        s_at = s + far * elements + element[None, :]
        # Beyond the last tick all is 0 and stays so.
        scales = tl.load(scales_at, mask=mask, other=0.0)
        grads = tl.load(cotangent_at[None, :] + far * of_s_tick, mask=mask, other=0.0)
        scaled = grads.to(tl.float32) * scales
        # of_s times the derivative of s by beta.
        by_beta = -0.5 * scaled * scales * tl.load(s_at, mask=mask, other=0.0).to(tl.float32)
        scales = tl.load(scales_at - pairs, mask=earlier, other=1.0)
        values = tl.load(s_at - elements, mask=earlier, other=0.0).to(tl.float32)
        is_first = (tick == 0)[:, None]
        alphas = tl.where(is_first, (before * root)[None, :], values / scales)
        betas = tl.where(is_first, beta_before[None, :], 1.0 / (scales * scales))
        result = tl.zeros([TICKS, BLOCK], tl.float32)
        for k in tl.static_range(TICKS):
            here = (line == TICKS - 1 - k)[:, None]
            of_alpha = r * of_alpha + tl.sum(tl.where(here, scaled, 0.0), axis=0)
            of_beta = r * of_beta + tl.sum(tl.where(here, by_beta, 0.0), axis=0)
            of_r += of_alpha * tl.sum(tl.where(here, alphas, 0.0), axis=0)
            of_r += of_beta * tl.sum(tl.where(here, betas, 0.0), axis=0)
            result = tl.where(here, of_alpha[None, :], result)
        tl.store(of_products + far * elements + element[None, :], result, mask=mask)
    if PREVIOUS:
        of_before = r * of_alpha
        of_r += (r * of_beta + 0.5 * of_before * before / root) * slope
        tl.store(
            of_previous + element,
            (of_before * root).to(of_previous.dtype.element_ty),
            mask=real,
        )
    tl.store(of_decay + element, -r * of_r, mask=real)


@triton.jit(do_not_specialize=[*_GENERAL[3:], *_STRIDES])
def collect_kernel(
    activations,
    of_products,
    starts,
    pair_of,
    other_of,
    of_activations,
    rows,
    samples,
    neurons,
    pairs,
    z_tick,
    z_sample,
    z_neuron,
    ROWS: tl.constexpr,
    NEURONS: tl.constexpr,
):
    """The gradient of each neuron of ``ROWS`` of the (ticks, samples): over its pairs, that of the
    product times the other neuron."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    neuron = tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)[None, :]
    in_rows, in_neurons = row < rows, neuron < neurons
    first = tl.load(starts + neuron, mask=in_neurons, other=0)
    count = tl.load(starts + neuron + 1, mask=in_neurons, other=0) - first
    source = activations + (row // samples) * z_tick + (row % samples) * z_sample
    total = tl.zeros([ROWS, NEURONS], tl.float32)
    for k in range(tl.max(tl.max(count, axis=1), axis=0)):
        present = k < count
        pair = tl.load(pair_of + first + k, mask=present, other=0)
        other = tl.load(other_of + first + k, mask=present, other=0)
        mask = in_rows & present
        z = tl.load(source + other * z_neuron, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(of_products + row * pairs + pair, mask=mask, other=0.0) * z
    target = of_activations + row * neurons + neuron
    tl.store(target, total.to(of_activations.dtype.element_ty), mask=in_rows & in_neurons)


def forward(
    activations: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    decay: torch.Tensor,
    previous: torch.Tensor | None,
    elapsed: int,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """s, and in float32 1 / sqrt(beta) of each tick (ticks, pairs); with at least one element."""
    (ticks, batch, neurons), pairs = activations.shape, left.shape[0]
    dtype = torch.promote_types(activations.dtype, decay.dtype)
    s = torch.empty((ticks, batch, pairs), dtype=dtype, device=activations.device)
    scale = torch.empty((ticks, pairs), dtype=torch.float32, device=activations.device)
    forward_kernel[(triton.cdiv(batch * pairs, config.block),)](
        activations,
        left.contiguous(),
        right.contiguous(),
        decay.contiguous(),
        decay if previous is None else previous.contiguous(),
        s,
        scale,
        elapsed,
        ticks,
        batch * pairs,
        neurons,
        pairs,
        *activations.stride(),
        BLOCK=config.block,
        TICKS=config.ticks,
        PREVIOUS=previous is not None,
        num_warps=config.num_warps,
    )
    return s, scale


def backward(
    activations: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    decay: torch.Tensor,
    previous: torch.Tensor | None,
    s: torch.Tensor,
    scale: torch.Tensor,
    of_s: torch.Tensor,
    elapsed: int,
    table: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of activations, decay and previous (empty without one); ``s`` and ``scale``
    are what `forward` returned, ``table`` is
    `core.torch_functions.neuron_table`."""
    (ticks, batch, neurons), pairs = activations.shape, left.shape[0]
    device = activations.device
    of_products = torch.empty((ticks, batch, pairs), dtype=torch.float32, device=device)
    of_decay = torch.empty((batch, pairs), dtype=torch.float32, device=device)
    of_previous = activations.new_empty(0)
    if previous is not None:
        of_previous = torch.empty(previous.shape, dtype=previous.dtype, device=device)
    backward_kernel[(triton.cdiv(batch * pairs, config.block),)](
        decay.contiguous(),
        decay if previous is None else previous.contiguous(),
        s,
        scale,
        of_s,
        of_products,
        of_decay,
        of_previous,
        elapsed,
        ticks,
        batch * pairs,
        pairs,
        *of_s.stride(),
        BLOCK=config.block,
        TICKS=config.ticks,
        PREVIOUS=previous is not None,
        num_warps=config.num_warps,
    )
    of_activations = torch.empty(
        activations.shape, dtype=activations.dtype, device=activations.device
    )
    collect_kernel[(triton.cdiv(ticks * batch, _ROWS), triton.cdiv(neurons, _NEURONS))](
        activations,
        of_products,
        *table,
        of_activations,
        ticks * batch,
        batch,
        neurons,
        pairs,
        *activations.stride(),
        ROWS=_ROWS,
        NEURONS=_NEURONS,
        num_warps=_COLLECT_WARPS,
    )
    return of_activations, of_decay.sum(0).to(decay.dtype), of_previous


def compilations(problem: Problem, config: Config, device: Device) -> list[Compilation]:
    """The specialisations that ``problem`` launches, for contiguous tensors, with a previous."""
    ticks, batch, neurons, pairs = (problem[n] for n in ("ticks", "batch", "neurons", "pairs"))
    sizes = {
        "ticks": ticks,
        "elements": batch * pairs,
        "rows": ticks * batch,
        "samples": batch,
        "neurons": neurons,
        "pairs": pairs,
        "z_tick": batch * neurons,
        "z_sample": neurons,
        "z_neuron": 1,
        "of_s_tick": batch * pairs,
        "of_s_sample": pairs,
        "of_s_pair": 1,
    }
    element = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[problem.dtype]
    types = {
        **dict.fromkeys(("scale", "of_products", "of_decay"), "*fp32"),
        **dict.fromkeys(("left", "right", "starts", "pair_of", "other_of"), "*i64"),
        "elapsed": "i32",
    }

    def compilation(kernel: Any, programs: int, warps: int, **constants: Any) -> Compilation:
        # The launcher compiles an integer 1 in, and knows a multiple of 16.
        general = [kernel.arg_names[p.num] for p in kernel.params if p.do_not_specialize]
        special = {k: v for k, v in sizes.items() if k in kernel.arg_names and k not in general}
        constants |= {name: 1 for name, size in special.items() if size == 1}
        signature = {
            name: "constexpr"
            if name in constants
            else types.get(name, "i32" if name in sizes else element)
            for name in kernel.arg_names
        }
        divisible = tuple(
            name
            for name, kind in signature.items()
            if kind.startswith("*") or (kind == "i32" and special.get(name, 1) % 16 == 0)
        )
        return Compilation(kernel, signature, constants, divisible, warps, programs=programs)

    programs = triton.cdiv(batch * pairs, config.block)
    constants = {"BLOCK": config.block, "TICKS": config.ticks, "PREVIOUS": True}
    if problem.direction == "forward":
        return [compilation(forward_kernel, programs, config.num_warps, **constants)]
    grid = triton.cdiv(ticks * batch, _ROWS) * triton.cdiv(neurons, _NEURONS)
    return [
        compilation(backward_kernel, programs, config.num_warps, **constants),
        compilation(collect_kernel, grid, _COLLECT_WARPS, ROWS=_ROWS, NEURONS=_NEURONS),
    ]
