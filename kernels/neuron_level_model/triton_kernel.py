"""Triton kernels of the neuron-level model, and their launches.

A program holds a block of neurons, next to each other in memory, and a block of rows. The first
layer is a dot batched over the neurons, which tensor cores take a neuron per warp; the second has
two columns and is a sum. The hidden layer never leaves the registers: the gradients compute it
again. In the shallow form the traces take the hidden layer's place.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..core.ahead_of_time import Compilation
from ..core.device import Device
from ..core.problem import Problem
from ..core.triton_functions import activation, early, wait
from ..core.triton_low_rank import dot, precision
from .spec import Config, padded

_PROGRAMS_PER_PROCESSOR = 2
_UNSPECIALISED = ("rows", "tiles")
"""They change from call to call and say nothing about addresses."""


@triton.jit
def _place(base, neuron, row, k, neuron_stride, row_stride, time_stride):
    """The addresses of (neurons, rows, times)."""
    place = base + (neuron * neuron_stride)[:, None, None]
    place += (row * row_stride)[None, :, None]
    return place + (k.to(tl.int64) * time_stride)[None, None, :]


@triton.jit
def _first_weights(
    weight1, bias1, neuron, exists, unit, k, MEMORY: tl.constexpr, HIDDEN: tl.constexpr
):
    """Of value and gate of the hidden units ``unit``: weights (neurons, times, units) and biases
    (neurons, units)."""
    place = weight1 + (neuron * (2 * MEMORY * HIDDEN))[:, None, None]
    place += (k * (2 * HIDDEN))[None, :, None] + unit[None, None, :]
    mask = exists[:, None, :] & (k < MEMORY)[None, :, None]
    to_value = tl.load(place, mask=mask, other=0.0)
    to_gate = tl.load(place + HIDDEN, mask=mask, other=0.0)
    line = bias1 + (neuron * (2 * HIDDEN))[:, None] + unit[None, :]
    value_bias = tl.load(line, mask=exists, other=0.0).to(tl.float32)
    gate_bias = tl.load(line + HIDDEN, mask=exists, other=0.0).to(tl.float32)
    return to_value, to_gate, value_bias, gate_bias


@triton.jit
def _first_layer(
    x, to_value, to_gate, value_bias, gate_bias, exists,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Value and opened gate, (neurons, rows, units)."""
    zeros = tl.zeros([x.shape[0], x.shape[1], to_value.shape[2]], tl.float32)
    value = dot(x, to_value, zeros, PRECISION, UPCAST) + value_bias[:, None, :]
    gate = dot(x, to_gate, zeros, PRECISION, UPCAST) + gate_bias[:, None, :]
    # An infinite x makes NaN of the zeros beyond the hidden layer.
    value = tl.where(exists[:, None, :], value, 0.0)
    gate = tl.where(exists[:, None, :], gate, 0.0)
    opened, _ = activation(gate, "Sigmoid")
    return value, opened


@triton.jit
def _second_weights(weight, neuron, real, unit, UNITS: tl.constexpr):
    """What the last layer makes value and gate of, (neurons, units) each."""
    place = weight + (neuron * (2 * UNITS))[:, None] + (2 * unit)[None, :]
    mask = real[:, None] & (unit < UNITS)[None, :]
    to_value = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    return to_value, tl.load(place + 1, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _last_layer(
    x,
    weight1,
    bias1,
    weight2,
    bias2,
    neuron,
    real,
    MEMORY: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Value and opened gate of the last layer, (neurons, rows)."""
    if HIDDEN == 0:
        weight, bias = weight1, bias1
    else:
        weight, bias = weight2, bias2
    line = bias + 2 * neuron
    value = tl.load(line, mask=real, other=0.0).to(tl.float32)[:, None]
    gate = tl.load(line + 1, mask=real, other=0.0).to(tl.float32)[:, None]
    k = tl.arange(0, x.shape[2])
    if HIDDEN == 0:
        to_value, to_gate = _second_weights(weight, neuron, real, k, MEMORY)
        inner = x.to(tl.float32)
        value += tl.sum(inner * to_value[:, None, :], axis=2)
        gate += tl.sum(inner * to_gate[:, None, :], axis=2)
    else:
        for start in tl.static_range(0, HIDDEN, BLOCK_HIDDEN):
            unit = start + tl.arange(0, BLOCK_HIDDEN)
            exists = real[:, None] & (unit < HIDDEN)[None, :]
            value_weight, gate_weight, value_bias, gate_bias = _first_weights(
                weight1, bias1, neuron, exists, unit, k, MEMORY, HIDDEN
            )
            first, opened = _first_layer(
                x, value_weight, gate_weight, value_bias, gate_bias, exists, PRECISION, UPCAST
            )
            to_value, to_gate = _second_weights(weight, neuron, real, unit, HIDDEN)
            value += tl.sum(first * opened * to_value[:, None, :], axis=2)
            gate += tl.sum(first * opened * to_gate[:, None, :], axis=2)
    opened, _ = activation(gate, "Sigmoid")
    return value, opened


@triton.jit
def _last_gradient(of_z, value, opened, neuron, row, mask, of_z_row, of_z_neuron):
    """The gradients of value and gate of the last layer, (neurons, rows)."""
    place = of_z + (row * of_z_row)[None, :] + (neuron * of_z_neuron)[:, None]
    of_product = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    of_value = of_product * opened
    return of_value, tl.where(mask, of_value * value * (1.0 - opened), 0.0)


@triton.jit
def _first_gradient(of_value, of_gate, to_value, to_gate, first, opened):
    """The gradients of value and gate of the first layer, (neurons, rows, units)."""
    of_first = of_value[:, :, None] * to_value[:, None, :]
    of_first += of_gate[:, :, None] * to_gate[:, None, :]
    of_first *= opened
    return of_first, of_first * first * (1.0 - opened)


@triton.jit(do_not_specialize=_UNSPECIALISED[:1])
def forward_kernel(
    of_z,
    trace,
    weight1,
    bias1,
    weight2,
    bias2,
    z,
    rows,
    neurons,
    of_z_row,
    of_z_neuron,
    trace_row,
    trace_neuron,
    trace_time,
    MEMORY: tl.constexpr,
    HIDDEN: tl.constexpr,
    TIMES: tl.constexpr,
    BLOCK_NEURONS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    GRADIENT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The activations of one block of neurons and rows, whose strides are given as those of
    ``of_z``. ``GRADIENT``: instead, the gradients of value and gate of the last layer,
    (2, rows, neurons)."""
    wait(EARLY)
    neuron_blocks = tl.cdiv(neurons, BLOCK_NEURONS)
    program = tl.program_id(0)
    neuron = (program % neuron_blocks).to(tl.int64) * BLOCK_NEURONS + tl.arange(0, BLOCK_NEURONS)
    row = (program // neuron_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.arange(0, TIMES)
    real = neuron < neurons
    mask = real[:, None] & (row < rows)[None, :]
    in_trace = mask[:, :, None] & (k < MEMORY)[None, None, :]
    place = _place(trace, neuron, row, k, trace_neuron, trace_row, trace_time)
    x = tl.load(place, mask=in_trace, other=0.0)
    value, opened = _last_layer(
        x, weight1, bias1, weight2, bias2, neuron, real,
        MEMORY, HIDDEN, BLOCK_HIDDEN, PRECISION, UPCAST,
    )  # fmt: skip
    if GRADIENT:
        target = z + (row * neurons)[None, :] + neuron[:, None]
        of_value, of_gate = _last_gradient(
            of_z, value, opened, neuron, row, mask, of_z_row, of_z_neuron
        )
        tl.store(target, of_value, mask=mask)
        tl.store(target + tl.full([], 1, tl.int64) * rows * neurons, of_gate, mask=mask)
    else:
        target = z + (row * of_z_row)[None, :] + (neuron * of_z_neuron)[:, None]
        tl.store(target, (value * opened).to(z.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_UNSPECIALISED[:1])
def trace_gradient_kernel(
    of_z,
    trace,
    weight1,
    bias1,
    weight2,
    bias2,
    into,
    rows,
    neurons,
    of_z_row,
    of_z_neuron,
    trace_row,
    trace_neuron,
    trace_time,
    into_row,
    into_neuron,
    into_time,
    MEMORY: tl.constexpr,
    HIDDEN: tl.constexpr,
    TIMES: tl.constexpr,
    BLOCK_NEURONS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The gradient of the traces of one block of neurons and rows. ``ADD``: to what is there."""
    wait(EARLY)
    neuron_blocks = tl.cdiv(neurons, BLOCK_NEURONS)
    program = tl.program_id(0)
    neuron = (program % neuron_blocks).to(tl.int64) * BLOCK_NEURONS + tl.arange(0, BLOCK_NEURONS)
    row = (program // neuron_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.arange(0, TIMES)
    real = neuron < neurons
    mask = real[:, None] & (row < rows)[None, :]
    in_trace = mask[:, :, None] & (k < MEMORY)[None, None, :]
    place = _place(trace, neuron, row, k, trace_neuron, trace_row, trace_time)
    x = tl.load(place, mask=in_trace, other=0.0)
    value, opened = _last_layer(
        x, weight1, bias1, weight2, bias2, neuron, real,
        MEMORY, HIDDEN, BLOCK_HIDDEN, PRECISION, UPCAST,
    )  # fmt: skip
    of_value, of_gate = _last_gradient(
        of_z, value, opened, neuron, row, mask, of_z_row, of_z_neuron
    )
    of_x = tl.zeros([BLOCK_NEURONS, BLOCK_ROWS, TIMES], tl.float32)
    if HIDDEN == 0:
        to_value, to_gate = _second_weights(weight1, neuron, real, k, MEMORY)
        of_x += of_value[:, :, None] * to_value[:, None, :]
        of_x += of_gate[:, :, None] * to_gate[:, None, :]
    else:
        for start in tl.static_range(0, HIDDEN, BLOCK_HIDDEN):
            unit = start + tl.arange(0, BLOCK_HIDDEN)
            exists = real[:, None] & (unit < HIDDEN)[None, :]
            value_weight, gate_weight, value_bias, gate_bias = _first_weights(
                weight1, bias1, neuron, exists, unit, k, MEMORY, HIDDEN
            )
            first, open1 = _first_layer(
                x, value_weight, gate_weight, value_bias, gate_bias, exists, PRECISION, UPCAST
            )
            to_value, to_gate = _second_weights(weight2, neuron, real, unit, HIDDEN)
            of_first, of_gate1 = _first_gradient(
                of_value, of_gate, to_value, to_gate, first, open1
            )
            value_weight = tl.permute(value_weight, (0, 2, 1))
            gate_weight = tl.permute(gate_weight, (0, 2, 1))
            of_x = dot(of_first.to(x.dtype), value_weight, of_x, PRECISION, UPCAST)
            of_x = dot(of_gate1.to(x.dtype), gate_weight, of_x, PRECISION, UPCAST)
    target = _place(into, neuron, row, k, into_neuron, into_row, into_time)
    if ADD:
        of_x += tl.load(target, mask=in_trace, other=0.0).to(tl.float32)
    tl.store(target, of_x.to(into.dtype.element_ty), mask=in_trace)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def weight_gradient_kernel(
    of_last,
    trace,
    weight1,
    bias1,
    weight2,
    of_weight1,
    of_bias1,
    of_weight2,
    of_bias2,
    rows,
    tiles,
    neurons,
    trace_row,
    trace_neuron,
    trace_time,
    MEMORY: tl.constexpr,
    HIDDEN: tl.constexpr,
    TIMES: tl.constexpr,
    BLOCK_NEURONS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``tiles`` blocks of rows: their share of the weights' gradients, of one block of neurons and
    of hidden units. ``of_last`` is what `forward_kernel` makes with ``GRADIENT``."""
    neuron_blocks = tl.cdiv(neurons, BLOCK_NEURONS)
    hidden_blocks: tl.constexpr = (HIDDEN + BLOCK_HIDDEN - 1) // BLOCK_HIDDEN if HIDDEN else 1
    UNITS: tl.constexpr = BLOCK_HIDDEN if HIDDEN else TIMES
    program = tl.program_id(0)
    neuron = (program % neuron_blocks).to(tl.int64) * BLOCK_NEURONS + tl.arange(0, BLOCK_NEURONS)
    block = program // neuron_blocks % hidden_blocks
    part = (program // neuron_blocks // hidden_blocks).to(tl.int64)
    k = tl.arange(0, TIMES)
    unit = block * UNITS + tl.arange(0, UNITS)
    real = neuron < neurons
    if HIDDEN:
        exists = real[:, None] & (unit < HIDDEN)[None, :]
        value_weight, gate_weight, value_bias, gate_bias = _first_weights(
            weight1, bias1, neuron, exists, unit, k, MEMORY, HIDDEN
        )
        to_value, to_gate = _second_weights(weight2, neuron, real, unit, HIDDEN)
    else:
        exists = real[:, None] & (unit < MEMORY)[None, :]

    value_sum = tl.zeros([BLOCK_NEURONS, TIMES, UNITS], tl.float32)
    gate_sum = tl.zeros([BLOCK_NEURONS, TIMES, UNITS], tl.float32)
    value_bias_sum = tl.zeros([BLOCK_NEURONS, UNITS], tl.float32)
    gate_bias_sum = tl.zeros([BLOCK_NEURONS, UNITS], tl.float32)
    last_value_sum = tl.zeros([BLOCK_NEURONS, UNITS], tl.float32)
    last_gate_sum = tl.zeros([BLOCK_NEURONS, UNITS], tl.float32)
    last_value_bias_sum = tl.zeros([BLOCK_NEURONS], tl.float32)
    last_gate_bias_sum = tl.zeros([BLOCK_NEURONS], tl.float32)
    for tile in range(tiles):
        row = (part * tiles + tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = real[:, None] & (row < rows)[None, :]
        in_trace = mask[:, :, None] & (k < MEMORY)[None, None, :]
        place = _place(trace, neuron, row, k, trace_neuron, trace_row, trace_time)
        x = tl.load(place, mask=in_trace, other=0.0)
        source = of_last + (row * neurons)[None, :] + neuron[:, None]
        of_value = tl.load(source, mask=mask, other=0.0)
        of_gate = tl.load(source + tl.full([], 1, tl.int64) * rows * neurons, mask=mask, other=0.0)
        last_value_bias_sum += tl.sum(of_value, axis=1)
        last_gate_bias_sum += tl.sum(of_gate, axis=1)
        if HIDDEN:
            first, opened = _first_layer(
                x, value_weight, gate_weight, value_bias, gate_bias, exists, PRECISION, UPCAST
            )
            inner = first * opened
            of_first, of_gate1 = _first_gradient(
                of_value, of_gate, to_value, to_gate, first, opened
            )
            value_bias_sum += tl.sum(of_first, axis=1)
            gate_bias_sum += tl.sum(of_gate1, axis=1)
            turned = tl.permute(x, (0, 2, 1))
            value_sum = dot(turned, of_first.to(x.dtype), value_sum, PRECISION, UPCAST)
            gate_sum = dot(turned, of_gate1.to(x.dtype), gate_sum, PRECISION, UPCAST)
        else:
            inner = x.to(tl.float32)
        last_value_sum += tl.sum(of_value[:, :, None] * inner, axis=1)
        last_gate_sum += tl.sum(of_gate[:, :, None] * inner, axis=1)

    neuron += part * neurons
    if HIDDEN:
        place = of_weight1 + (neuron * (2 * MEMORY * HIDDEN))[:, None, None]
        place += (k * (2 * HIDDEN))[None, :, None] + unit[None, None, :]
        inside = exists[:, None, :] & (k < MEMORY)[None, :, None]
        tl.store(place, value_sum, mask=inside)
        tl.store(place + HIDDEN, gate_sum, mask=inside)
        first_line = of_bias1 + (neuron * (2 * HIDDEN))[:, None] + unit[None, :]
        tl.store(first_line, value_bias_sum, mask=exists)
        tl.store(first_line + HIDDEN, gate_bias_sum, mask=exists)
        line = of_bias2 + 2 * neuron
        lines = of_weight2 + (neuron * (2 * HIDDEN))[:, None] + (2 * unit)[None, :]
    else:
        line = of_bias1 + 2 * neuron
        lines = of_weight1 + (neuron * (2 * MEMORY))[:, None] + (2 * unit)[None, :]
    tl.store(lines, last_value_sum, mask=exists)
    tl.store(lines + 1, last_gate_sum, mask=exists)
    tl.store(line, last_value_bias_sum, mask=real & (block == 0))
    tl.store(line + 1, last_gate_bias_sum, mask=real & (block == 0))


def _constants(memory: int, hidden: int, config: Config, device: Device) -> dict[str, Any]:
    return {
        "MEMORY": memory,
        "HIDDEN": hidden,
        "TIMES": padded(memory),
        "BLOCK_NEURONS": config.block_neurons,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_HIDDEN": min(config.block_hidden, padded(hidden)),
        "PRECISION": precision(device),
    }


def _upcast(dtype: torch.dtype, device: Device) -> bool:
    return device.interpreted and dtype == torch.bfloat16


def _shared(
    trace: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor | None,
    bias2: torch.Tensor | None,
    config: Config,
    device: Device,
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """The tensors that every kernel reads, and its constants."""
    hidden = 0 if weight2 is None else weight2.shape[1]
    tensors = trace, weight1, bias1, weight1 if weight2 is None else weight2
    constants = _constants(trace.shape[2], hidden, config, device)
    constants |= {"UPCAST": _upcast(trace.dtype, device), "num_warps": config.num_warps}
    constants["num_stages"] = 1
    return (*tensors, bias1 if bias2 is None else bias2), constants


def _blocks(rows: int, neurons: int, config: Config) -> int:
    return triton.cdiv(neurons, config.block_neurons) * triton.cdiv(rows, config.block_rows)


def forward(
    z: torch.Tensor,
    trace: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor | None,
    bias2: torch.Tensor | None,
    config: Config,
    device: Device,
) -> None:
    """Launch on ``trace`` (rows, neurons, memory), rows > 0, into ``z`` (rows, neurons), both of
    any strides; contiguous weights."""
    rows, neurons, _ = trace.shape
    tensors, constants = _shared(trace, weight1, bias1, weight2, bias2, config, device)
    forward_kernel[(_blocks(rows, neurons, config),)](
        z,
        *tensors,
        z,
        rows,
        neurons,
        *z.stride(),
        *trace.stride(),
        **constants,
        GRADIENT=False,
        **early(device),
    )


def trace_gradient(
    into: torch.Tensor,
    add: bool,
    of_z: torch.Tensor,
    trace: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor | None,
    bias2: torch.Tensor | None,
    config: Config,
    device: Device,
) -> None:
    """Write the gradient of ``trace`` to ``into``, of the same shape, or add it."""
    rows, neurons, _ = trace.shape
    tensors, constants = _shared(trace, weight1, bias1, weight2, bias2, config, device)
    trace_gradient_kernel[(_blocks(rows, neurons, config),)](
        of_z,
        *tensors,
        into,
        rows,
        neurons,
        *of_z.stride(),
        *trace.stride(),
        *into.stride(),
        **constants,
        ADD=add,
        **early(device),
    )


def _parts(
    rows: int, neurons: int, hidden: int, config: Config, device: Device
) -> tuple[int, int, int]:
    """How the rows are divided: into how many parts, of how many blocks; and the programs of a
    part. Enough programs to fill the device, no more, since each part has sums of its own."""
    programs = triton.cdiv(neurons, config.block_neurons)
    if hidden:
        programs *= triton.cdiv(hidden, min(config.block_hidden, padded(hidden)))
    blocks = triton.cdiv(rows, config.block_rows)
    wanted = max(_PROGRAMS_PER_PROCESSOR * device.processors // programs, 1)
    tiles = triton.cdiv(blocks, min(blocks, wanted))
    return triton.cdiv(blocks, tiles), tiles, programs


def weight_gradient(
    of_z: torch.Tensor,
    trace: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor | None,
    bias2: torch.Tensor | None,
    config: Config,
    device: Device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the weights; the last two are empty without a second layer."""
    rows, neurons, _ = trace.shape
    tensors, constants = _shared(trace, weight1, bias1, weight2, bias2, config, device)
    of_last = torch.empty((2, rows, neurons), dtype=torch.float32, device=trace.device)
    forward_kernel[(_blocks(rows, neurons, config),)](
        of_z,
        *tensors,
        of_last,
        rows,
        neurons,
        *of_z.stride(),
        *trace.stride(),
        **constants,
        GRADIENT=True,
        **early(device),
    )
    parts, tiles, programs = _parts(rows, neurons, constants["HIDDEN"], config, device)
    given = weight1, bias1, weight2, bias2
    sums = [
        torch.empty(
            (parts, *((0,) if value is None else value.shape)),
            dtype=torch.float32,
            device=trace.device,
        )
        for value in given
    ]
    weight_gradient_kernel[(parts * programs,)](
        of_last,
        *tensors[:4],
        *sums,
        rows,
        tiles,
        neurons,
        *trace.stride(),
        **constants,
    )
    of_weight1, of_bias1, of_weight2, of_bias2 = (
        (total[0] if parts == 1 else total.sum(0)).to(trace.dtype) for total in sums
    )
    return of_weight1, of_bias1, of_weight2, of_bias2


def compilations(problem: Problem, config: Config, device: Device) -> list[Compilation]:
    """The specialisations that ``problem`` launches on a history laid out time first."""
    rows, neurons, memory, hidden = (size for _, size in problem.dims)
    blocks = _blocks(rows, neurons, config)
    parts, tiles, programs = _parts(rows, neurons, hidden, config, device)
    kernels: list[tuple[Any, int]] = [(forward_kernel, blocks)]
    if problem.direction == "backward":
        kernels = [(trace_gradient_kernel, blocks)]
    elif problem.direction == "weight_gradient":
        kernels.append((weight_gradient_kernel, parts * programs))
    element = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[problem.dtype]
    integers = {"rows": rows, "tiles": tiles, "neurons": neurons}
    integers |= {"of_z_row": neurons, "of_z_neuron": 1}
    for name in ("trace", "into"):
        strides = {"row": neurons, "neuron": 1, "time": rows * neurons}
        integers |= {f"{name}_{key}": size for key, size in strides.items()}
    gradient = problem.direction == "weight_gradient"
    constants = {
        **_constants(memory, hidden, config, device),
        "UPCAST": False,
        "ADD": True,
        "GRADIENT": gradient,
        **early(device),
        # The launcher compiles an integer 1 in, and knows a multiple of 16.
        **{key: 1 for key, value in integers.items() if value == 1 and key not in _UNSPECIALISED},
    }
    types = {f"of_{name}{i}": "*fp32" for name in ("weight", "bias") for i in (1, 2)}
    types |= {"of_last": "*fp32"} | ({"z": "*fp32"} if gradient else {})
    aligned = [key for key, v in integers.items() if v % 16 == 0 and key not in _UNSPECIALISED]
    found = []
    for kernel, count in kernels:
        own = {key: value for key, value in constants.items() if key in kernel.arg_names}
        signature = {
            argument: "constexpr"
            if argument in own
            else types.get(argument, "i32" if argument in integers else element)
            for argument in kernel.arg_names
        }
        divisible = tuple(
            argument
            for argument, kind in signature.items()
            if kind.startswith("*") or (kind == "i32" and argument in aligned)
        )
        found.append(
            Compilation(
                kernel,
                signature,
                own,
                divisible,
                num_warps=config.num_warps,
                num_stages=1,
                programs=count,
                uses_dot=hidden > 0,
            )
        )
    return found
