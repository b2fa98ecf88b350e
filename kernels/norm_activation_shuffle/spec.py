"""Norm, shuffle, activation, dropout, residual and FiLM of feature maps: sizes, limits, cost, and
what to run unmeasured.

``batch`` feature maps of ``channels`` x ``height`` x ``width`` before the shuffle. Flags:
``norm``, ``num_groups``, ``training``; ``shuffle``, the factor; ``activation``; ``dropout``, its
probability; ``residual``, whether there is one, and ``residual_first``; ``film``, whether scale
and shift are given; ``channels_last``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..core import dropout as counter
from ..core.activations import GATED, check_name
from ..core.device import Device
from ..core.errors import unknown_name
from ..core.problem import Case, Choice, Problem

NAME = "norm_activation_shuffle"
DIMENSIONS = ("batch", "channels", "height", "width")
DIRECTIONS = ("forward", "backward")

NORMS = ("batch", "group", "none")
MAX_SAMPLE = 1 << 31
MAX_CHANNELS = 2048
"""A Pallas program holds all channels of some positions; a wider one leaves its registers."""


def _dims(batch: int, channels: int, height: int, width: int) -> dict[str, int]:
    return {"batch": batch, "channels": channels, "height": height, "width": width}


CASES = (
    Case("batch-relu-small", "small", _dims(4, 8, 6, 5), {"activation": "ReLU"}),
    Case(
        "group-swiglu-shuffle-ragged",
        "ragged",
        _dims(3, 36, 5, 7),
        {
            "norm": "group",
            "num_groups": 3,
            "activation": "SwiGLU",
            "shuffle": 3,
            "dropout": 0.25,
            "seed": -9,
        },
    ),
    Case(
        "batch-mish-unshuffle-ragged",
        "ragged",
        _dims(5, 6, 4, 6),
        {
            "activation": "Mish",
            "shuffle": -2,
            "dropout": 0.25,
            "seed": 5,
            "residual_first": True,
            "channels_last": True,
        },
    ),
    Case(
        "resnet-64x64-residual",
        "large",
        _dims(32, 64, 64, 64),
        {"activation": "ReLU", "residual_first": True},
    ),
    Case(
        "decoder-256x256-shuffle",
        "large",
        _dims(2, 256, 128, 128),
        {"activation": "ReLU", "shuffle": 2, "channels_last": True},
    ),
    Case(
        "unet-128-32x32",
        "large",
        _dims(64, 128, 32, 32),
        {"norm": "group", "num_groups": 8, "activation": "SiLU"},
    ),
)


@dataclass(frozen=True)
class Config:
    """``block`` elements a program holds at a time, a power of two."""

    block: int = 2048
    num_warps: int = 4


def parts(activation: str) -> int:
    """How many channels, after the shuffle, make one of the result."""
    return 2 if activation in GATED else 1


def power_of_two(size: int) -> int:
    """The power of two that holds ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def tile(channels: int, positions: int, channels_last: bool, block: int) -> tuple[int, int]:
    """Channels and positions of a tile of ``block`` elements: as many as there are of what is
    contiguous, the rest of the other."""
    channels, positions = power_of_two(channels), power_of_two(positions)
    if channels_last:
        channels = min(channels, block)
        return channels, min(positions, max(block // channels, 1))
    positions = min(positions, block)
    return min(channels, max(block // positions, 1)), positions


def _elements(problem: Problem) -> int:
    return problem["batch"] * problem["channels"] * problem["height"] * problem["width"]


def _parts(problem: Problem) -> int:
    return parts(problem.flag("activation", "Identity"))


def computes_statistics(problem: Problem) -> bool:
    """Whether moments of the input itself normalise it."""
    norm = problem.flag("norm", "batch")
    return norm == "group" or (norm == "batch" and bool(problem.flag("training", True)))


def bucket(problem: Problem) -> Problem:
    """The tuning key: the batch up to a power of two; the rest is a model's constant. Elementwise
    activations cost about the same, so do shuffles by any factor, and both layouts are read in
    the order in which they lie."""
    dims = dict(problem.dims) | {"batch": power_of_two(problem["batch"])}
    norm, shuffle = problem.flag("norm", "batch"), problem.flag("shuffle", 0)
    if norm == "batch" and not computes_statistics(problem):
        norm = "none"
    direction = (shuffle > 1) - (shuffle < -1)
    first = bool(problem.flag("residual_first", False)) and problem.flag("residual", True)
    flags = (
        ("norm", norm),
        ("num_groups", problem.flag("num_groups", 1) if norm == "group" else 1),
        ("shuffle", 2 * direction),
        ("activation", "SwiGLU" if _parts(problem) == 2 else "GELU"),
        ("dropout", bool(problem.flag("dropout", 0.0))),
        ("residual_first", bool(first)),
        ("film", bool(problem.flag("film", False))),
    )
    return replace(problem.with_dims(dims), flags=flags)


def bytes_moved(problem: Problem) -> int:
    """The input once for its statistics and once more to apply them, residual in, result out;
    backward reads input and cotangent twice as well. Weights and statistics are small."""
    elements, halves = _elements(problem), _parts(problem)
    twice = 2 if computes_statistics(problem) else 1
    results = elements // halves
    residual = results if problem.flag("residual", True) else 0
    if problem.direction == "forward":
        moved = twice * elements + residual + results
    else:
        first = residual if problem.flag("residual_first", False) else 0
        moved = 2 * (elements + results + first) + elements + first
    return moved * problem.itemsize


def flops(problem: Problem) -> int:
    """Statistics, normalisation and activation, about: nothing here is limited by arithmetic."""
    return (20 if problem.direction == "forward" else 50) * _elements(problem)


def not_supported_reasons(problem: Problem, implementation: str, device: Device) -> list[str]:
    """Why ``implementation`` cannot run ``problem`` on ``device``; empty if it can."""
    reasons: list[str] = []
    if implementation not in ("triton", "pallas"):
        return reasons
    shuffle, channels = problem.flag("shuffle", 0), problem["channels"]
    film = bool(problem.flag("film", False))
    if shuffle < -1 and _parts(problem) == 2 and channels % 2:
        reasons.append(
            f"an unshuffle of {channels} channels, an odd number, puts value and gate of "
            "a gated activation at different positions"
        )
    if channels * problem["height"] * problem["width"] >= MAX_SAMPLE:
        reasons.append(f"a sample has {MAX_SAMPLE} elements or more; offsets in it have 32 bits")
    if film and abs(shuffle) > 1:
        reasons.append("scale and shift of samples are not summed through a shuffle")
    if implementation == "pallas":
        if abs(shuffle) > 1:
            reasons.append("XLA moves the pixels of a shuffle")
        if film:
            reasons.append("XLA applies scale and shift of samples")
        if channels > MAX_CHANNELS:
            reasons.append(f"a program holds all channels, up to {MAX_CHANNELS}, here {channels}")
        if device.platform == "tpu" and _parts(problem) == 2:
            reasons.append("on a TPU halves of a gated activation cannot be blocks of one array")
    return reasons


def heuristic(problem: Problem, device: Device, implementations: tuple[str, ...]) -> Choice:
    """The fused kernels, except where XLA fuses as well."""
    fused = next((name for name in implementations if name in ("triton", "pallas")), None)
    plain = next((name for name in implementations if name in ("torch", "xla")), None)
    if fused is None:
        return Choice(plain or implementations[0], None, "no fused kernel can run here")
    if fused == "pallas" and plain is not None:
        if device.platform == "tpu":
            return Choice(plain, None, "XLA fuses row operations on a TPU")
        if problem.direction == "forward" or not computes_statistics(problem):
            return Choice(plain, None, "XLA makes as few passes of it")
    why = "the input is read once for its statistics and once to apply everything"
    if problem.direction == "backward":
        why = "one pass for all sums, one for the gradient"
    return Choice(fused, _config(problem, device), why)


def _config(problem: Problem, device: Device) -> Config:
    """Sixteen elements a thread forward, eight backward, where several tensors are read at a time
    and sums held beside them."""
    each = 512 if problem.direction == "forward" else 256
    sample = problem["channels"] // _parts(problem) * problem["height"] * problem["width"]
    block = min(4 * each, max(power_of_two(sample), 32))
    return Config(block, max(block // each, 1))


def search_space(problem: Problem, device: Device, implementation: str) -> list[Config]:
    """Every config worth timing."""
    return [
        Config(block, warps)
        for block in (256, 512, 1024, 2048, 4096, 8192)
        for warps in (1, 2, 4, 8, 16)
        if 4 * 32 <= block // warps <= 32 * 32
    ]


class Sizes(NamedTuple):
    """The shape of the result, and what it has between."""

    result: tuple[int, ...]
    averaged: int
    """Elements behind one mean; 1 without a norm."""


def check_arguments(
    shape: tuple[int, ...],
    given: Mapping[str, tuple[int, ...] | None],
    *,
    norm: str,
    num_groups: int,
    training: bool,
    activation: str,
    shuffle: int,
    dropout: float,
    residual_first: bool,
) -> Sizes:
    """The shape of the result, or an error that names the argument that is wrong.

    ``given`` are the shapes of the other arrays, None where there is none.
    """
    if norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    check_name(activation)
    counter.check_probability(dropout)
    if len(shape) < 2 or shape[1] < 1:
        raise ValueError(f"x has shape {shape}; it must be (batch, channels, *sides)")
    if residual_first and parts(activation) == 2:
        raise ValueError(
            f"residual_first with {activation}, which halves the channels, has no meaning; "
            "use residual_first=False"
        )
    batch, channels, *sides = shape
    count = 1
    if norm == "batch":
        count = batch * math.prod(sides)
        if not training and (given["running_mean"] is None or given["running_var"] is None):
            raise ValueError(
                "training=False normalises by running_mean and running_var; give both"
            )
        if (given["running_mean"] is None) != (given["running_var"] is None):
            raise ValueError("running_mean and running_var go together; give both or neither")
        if training and count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {shape}"
            )
    elif norm == "group":
        if num_groups < 1 or channels % num_groups:
            raise ValueError(
                f"num_groups is {num_groups}; it must divide the {channels} channels of x"
            )
        count = channels // num_groups * math.prod(sides)
        if batch * count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {shape}"
            )
    channels, sides = shuffled(channels, sides, shuffle)
    if channels % parts(activation):
        raise ValueError(
            f"{activation} halves the channels; after the shuffle there are {channels}, so the "
            "number must be even"
        )
    channels //= parts(activation)
    result = (batch, channels, *sides)
    line = (shape[1],)
    wanted = {
        "weight": line,
        "bias": line,
        "residual": result,
        "scale": (batch, channels),
        "shift": (batch, channels),
        "running_mean": line,
        "running_var": line,
    }
    for name, got in given.items():
        if got is not None and got != wanted[name]:
            raise ValueError(f"{name} has shape {got}; here it must be {wanted[name]}")
    return Sizes(result, count)


def shuffled(channels: int, sides: list[int], shuffle: int) -> tuple[int, list[int]]:
    """Channels and sides after a shuffle by ``shuffle``; below 0, an unshuffle."""
    factor = abs(shuffle)
    if factor < 2:
        return channels, sides
    if len(sides) != 2:
        raise ValueError(f"shuffle is {shuffle} and x has {len(sides)} sides; it needs two")
    if shuffle > 0:
        if channels % factor**2:
            raise ValueError(
                f"shuffle is {shuffle} and x has {channels} channels; they must be a multiple of "
                f"{factor**2}"
            )
        return channels // factor**2, [side * factor for side in sides]
    if sides[0] % factor or sides[1] % factor:
        raise ValueError(
            f"shuffle is {shuffle} and the sides of x are {tuple(sides)}; they must be multiples "
            f"of {factor}"
        )
    return channels * factor**2, [side // factor for side in sides]


def problem_of(
    shape: tuple[int, ...], dtype: str, direction: str, options: Mapping[str, Any]
) -> Problem:
    """The `Problem` of a call on (batch, channels, height, width)."""
    dims = tuple(zip(DIMENSIONS, shape, strict=True))
    return Problem(NAME, dims, dtype, tuple(options.items()), direction)
