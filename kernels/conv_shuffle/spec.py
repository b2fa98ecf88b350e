"""Convolution, pixel (un)shuffle and activation: sizes, limits, cost, and what to run unmeasured.

``batch`` feature maps of ``height`` x ``width`` and a window of ``kernel`` x ``kernel``; with
``sides`` 1 the maps are sequences of ``width`` (and ``height`` is 1). Flags: the options of the
call; ``per_sample``, whether each sample has weights of its own; ``sides``, 2 by default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..core.activations import ELEMENTWISE, GATED, check_name
from ..core.device import Device
from ..core.errors import unknown_name
from ..core.problem import Case, Choice, Problem

NAME = "conv_shuffle"
DIMENSIONS = ("batch", "in_channels", "out_channels", "kernel", "height", "width")
DIRECTIONS = ("forward", "backward")

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
MAX_CHANNELS = 64
"""Of a group's input, where all samples share the weights: a wider product is the framework's."""
SMALLEST_SIDE = 16
SLOPE_FROM_RESULT = ("Hardtanh", "LeakyReLU", "ReLU", "ReLU6")
"""Activations with the same slope at their result as at their argument."""


def _case(name: str, size: Any, sizes: tuple[int, ...], **flags: Any) -> Case:
    return Case(name, size, dict(zip(DIMENSIONS, sizes, strict=True)), flags)


CASES = (
    _case("stem-small", "small", (2, 3, 8, 3, 16, 16), stride=2, padding=1, activation="ReLU"),
    _case(
        "groups-shuffle-ragged",
        "ragged",
        (2, 6, 24, 3, 7, 5),
        padding=2,
        dilation=2,
        groups=2,
        padding_mode="reflect",
        shuffle=2,
        activation="GELU",
    ),
    _case(
        "per-sample-unshuffle-ragged",
        "ragged",
        (3, 5, 7, 3, 7, 11),
        stride=2,
        padding=1,
        padding_mode="circular",
        shuffle=-2,
        activation="LeakyReLU",
        per_sample=True,
    ),
    _case(
        "per-sample-line-ragged",
        "ragged",
        (3, 19, 18, 3, 1, 23),
        stride=2,
        padding=1,
        shuffle=2,
        activation="SiLU",
        per_sample=True,
        sides=1,
    ),
    _case("encoder-stem", "large", (256, 3, 64, 3, 64, 64), stride=2, padding=1),
    _case("decoder-last", "large", (32, 64, 3, 3, 64, 64), padding=1, activation="Tanh"),
    _case(
        "decoder-upsampling",
        "large",
        (32, 64, 256, 3, 32, 32),
        padding=1,
        shuffle=2,
        activation="ReLU",
    ),
    _case("decoder-64", "large", (32, 64, 64, 3, 64, 64), padding=1, activation="ReLU"),
    _case(
        "unet-per-sample",
        "large",
        (64, 64, 64, 3, 32, 32),
        padding=1,
        activation="ReLU",
        per_sample=True,
    ),
    _case(
        "unet-line-per-sample",
        "large",
        (64, 128, 128, 3, 1, 64),
        padding=1,
        activation="ReLU",
        per_sample=True,
        sides=1,
    ),
)


@dataclass(frozen=True)
class Config:
    """A tile has ``block_positions`` positions and ``block_out`` channels and takes ``block_in``
    elements of the windows at a time. The gradient of per-sample weights has tiles of
    ``block_out`` x ``block_in`` and takes positions in blocks."""

    block_positions: int = 128
    block_out: int = 64
    block_in: int = 32
    num_warps: int = 4
    num_stages: int = 2


class Options(NamedTuple):
    """The options of a call."""

    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    padding_mode: str = "zeros"
    shuffle: int = 0
    activation: str = "Identity"


class Geometry(NamedTuple):
    """The sizes of a call, each as (rows, columns); a sequence has one row."""

    batch: int
    in_channels: int
    out_channels: int
    window: tuple[int, int]
    size: tuple[int, int]
    """Of the input."""
    convolved: tuple[int, int]
    """Of the convolution's result."""
    padding: tuple[int, int]
    factor: tuple[int, int]
    """Of the shuffle or unshuffle; 1 where there is none."""
    result: tuple[int, ...]
    """The shape of the op's result, sequences without a row axis."""


def padded(size: int) -> int:
    """The power of two that holds ``size``; tiles have such sides."""
    return max(1 << max(size - 1, 0).bit_length(), SMALLEST_SIDE)


def convolved(size: int, window: int, stride: int, padding: int, dilation: int) -> int:
    """How many positions a convolution has along a side."""
    return (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1


def geometry(x: tuple[int, ...], weight: tuple[int, ...], options: Options) -> Geometry:
    """The sizes of a call with these shapes of ``x`` and ``weight``."""
    stride, padding, dilation, _, _, scale, activation = options
    sides = len(x) - 2
    size, window = (1, x[2]), (1, weight[-1])
    if sides == 2:
        size, window = (x[2], x[3]), (weight[-2], weight[-1])
    paddings = (padding if sides == 2 else 0, padding)
    height, width = (convolved(size[i], window[i], stride, paddings[i], dilation) for i in (0, 1))
    factor = abs(scale) or 1
    factors = (factor if sides == 2 else 1, factor)
    channels, area = weight[-2 - sides], math.prod(factors)
    made = channels // area if scale > 0 else channels * area
    made //= 2 if activation in GATED else 1
    ends = [
        side * f if scale > 0 else side // f
        for side, f in zip((height, width), factors, strict=True)
    ]
    return Geometry(
        x[0],
        x[1],
        channels,
        window,
        size,
        (height, width),
        paddings,
        factors,
        (x[0], made, *ends[-sides:]),
    )


def _sides(problem: Problem) -> int:
    return int(problem.flag("sides", 2))


def options_of(problem: Problem) -> Options:
    """The options that the flags of ``problem`` state."""
    names = Options._fields
    given: Any = {name: value for name, value in problem.flags if name in names}
    return Options(**given)


def geometry_of(problem: Problem) -> Geometry:
    """The sizes of ``problem``."""
    options, sides = options_of(problem), _sides(problem)
    batch, inputs, outputs, kernel, *size = (value for _, value in problem.dims)
    x = (batch, inputs, *size[-sides:])
    return geometry(x, (outputs, inputs // options.groups, *[kernel] * sides), options)


def bucket(problem: Problem) -> Problem:
    """The tuning key: the batch up to a power of two, a model's sizes as they are. Padding decides
    no more than sizes do; index maps cost about the same, as do elementwise activations."""
    batch = 1 << max(problem["batch"] - 1, 0).bit_length()
    activation = problem.flag("activation", "Identity")
    kind = "GLU" if activation in GATED else activation if activation == "Identity" else "GELU"
    flags = (
        ("stride", problem.flag("stride", 1)),
        ("dilation", problem.flag("dilation", 1)),
        ("groups", problem.flag("groups", 1)),
        ("mapped", problem.flag("padding_mode", "zeros") != "zeros"),
        ("shuffle", problem.flag("shuffle", 0)),
        ("activation", kind),
        ("per_sample", bool(problem.flag("per_sample", False))),
        ("sides", _sides(problem)),
    )
    return replace(problem.with_dims({**dict(problem.dims), "batch": batch}), flags=flags)


def _streams(problem: Problem) -> tuple[int, int, int]:
    """The elements of input, weights and the convolution's result."""
    sizes = geometry_of(problem)
    x = sizes.batch * sizes.in_channels * math.prod(sizes.size)
    y = sizes.batch * sizes.out_channels * math.prod(sizes.convolved)
    weights = sizes.out_channels * (_depth(problem) + 1)
    return x, weights * (sizes.batch if problem.flag("per_sample", False) else 1), y


def _depth(problem: Problem) -> int:
    """How many products make one result."""
    inputs = problem["in_channels"] // problem.flag("groups", 1)
    return int(inputs * problem["kernel"] ** _sides(problem))


def bytes_moved(problem: Problem) -> int:
    """Forward: input and weights in, result out. Backward: both and the cotangent in, with what
    the slope is taken from, the gradients out."""
    x, weights, y = _streams(problem)
    if problem.direction == "forward":
        return (x + weights + y) * problem.itemsize
    slope = problem.flag("activation", "Identity") != "Identity"
    return (2 * (x + weights) + y * (1 + slope)) * problem.itemsize


def flops(problem: Problem) -> int:
    """The convolution, or its two gradients, and about 20 for each of its results."""
    y = _streams(problem)[2]
    products = 1 if problem.direction == "forward" else 2
    return y * (2 * products * _depth(problem) + 20)


def not_supported_reasons(problem: Problem, implementation: str, device: Device) -> list[str]:
    """Why ``implementation`` cannot run ``problem`` on ``device``; empty if it can."""
    reasons = []
    activation, groups = problem.flag("activation", "Identity"), problem.flag("groups", 1)
    if activation not in ELEMENTWISE:
        reasons.append(
            f"{activation} takes two channels that lie in different tiles; kernels apply "
            "elementwise activations"
        )
    if not problem.flag("per_sample", False) and problem["in_channels"] > MAX_CHANNELS * groups:
        reasons.append(
            f"{problem['in_channels'] // groups} input channels: above {MAX_CHANNELS} the "
            "framework's convolution is the faster"
        )
    if implementation == "pallas" and device.platform == "tpu":
        reasons.append("a TPU kernel cannot gather the elements of a window")
    return reasons


def _fused_is_faster(problem: Problem, device: Device) -> bool:
    """By the roofline, with the fused product at a quarter of the device's peak and the
    framework's at six tenths, which makes a pass over the result for each of activation and
    shuffle. Assumptions, for want of a measurement."""
    peak = device.peak("tf32" if problem.dtype == "float32" else problem.dtype)
    if peak is None or device.bandwidth is None:
        return _depth(problem) <= 9 * SMALLEST_SIDE
    moved, operations = bytes_moved(problem) / device.bandwidth, flops(problem) / peak
    result = 2 * _streams(problem)[2] * problem.itemsize / device.bandwidth
    passes = (problem.flag("activation", "Identity") != "Identity") + bool(
        problem.flag("shuffle", 0)
    )
    return max(moved, operations / 0.25) <= max(moved, operations / 0.6) + passes * result


def heuristic(problem: Problem, device: Device, implementations: tuple[str, ...]) -> Choice:
    """Fused where memory is the limit, and where samples have weights of their own."""
    fused = next((name for name in implementations if name in ("triton", "pallas")), None)
    plain = next((name for name in implementations if name in ("torch", "xla")), None)
    if fused is None:
        why = "gated activations and wide shared convolutions stay with the framework"
        return Choice(plain or implementations[0], None, why)
    chosen = Choice(fused, config(problem, device), "the convolution's result stays on the chip")
    if plain is None:
        return chosen
    if problem.direction == "backward" and fused == "pallas":
        return Choice(plain, None, "the gradients are XLA's convolutions")
    if problem.flag("per_sample", False):
        return replace(chosen, why="one batched product; the framework has a group a sample")
    groups = problem.flag("groups", 1)
    if groups > 1 and min(_depth(problem), problem["out_channels"] // groups) < SMALLEST_SIDE:
        return Choice(plain, None, "groups so narrow leave most of a tile empty")
    if problem.direction == "backward":
        same = problem.flag("activation", "Identity") == "Identity"
        if same and not problem.flag("shuffle", 0):
            return Choice(plain, None, "nothing follows the convolution")
        return replace(chosen, why="one pass for slope, order and bias; the products are cuDNN's")
    if not _fused_is_faster(problem, device):
        return Choice(plain, None, "arithmetic is the limit, and the framework's is the faster")
    return chosen


def config(problem: Problem, device: Device) -> Config:
    """The tile to take unmeasured."""
    sizes = geometry_of(problem)
    outputs = padded(sizes.out_channels // problem.flag("groups", 1))
    area = math.prod(sizes.convolved)
    if not problem.flag("per_sample", False):
        area *= sizes.batch
    if problem.dtype == "float32":  # three products, each operand in two parts
        return Config(64, min(outputs, 64), 32 if outputs == SMALLEST_SIDE else 16, 4, 2)
    positions = 64 if outputs > SMALLEST_SIDE else 128
    return Config(min(padded(area), positions), min(outputs, 64), 32, 4, 2)


def search_space(problem: Problem, device: Device, implementation: str) -> list[Config]:
    """Every config worth timing."""
    outputs = padded(problem["out_channels"] // problem.flag("groups", 1))
    return [
        Config(positions, block_out, block_in, warps, stages)
        for positions in (32, 64, 128, 256)
        for block_out in sorted({min(outputs, most) for most in (32, 64, 128)})
        for block_in in (32, 64)
        for warps in (4, 8)
        for stages in ((2, 3) if implementation == "triton" else (1,))
    ]


def check_arguments(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    bias: tuple[int, ...] | None,
    options: Options,
) -> None:
    """Raise an error that names the argument that is wrong, if one is."""
    stride, padding, dilation, groups, mode, scale, activation = options
    check_name(activation)
    if mode not in PADDING_MODES:
        raise unknown_name("padding_mode", mode, PADDING_MODES)
    for name, value, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
        ("groups", groups, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    sides = len(x) - 2
    if sides not in (1, 2):
        raise ValueError(
            f"x has shape {x}; it must be (batch, channels, length) or (batch, channels, height, "
            "width)"
        )
    own = len(weight) == sides + 3
    if len(weight) not in (sides + 2, sides + 3) or weight[-sides] != weight[-1]:
        window = ", kernel" * sides
        raise ValueError(
            f"weight has shape {weight}; for x of shape {x} it must be (out, in / groups{window}),"
            f" or (batch, out, in / groups{window})"
        )
    if own and weight[0] != x[0]:
        raise ValueError(f"weight is for {weight[0]} samples and x has {x[0]}")
    outputs, inputs = weight[own : own + 2]
    if x[1] != inputs * groups or outputs % groups or not inputs or not outputs:
        raise ValueError(
            f"x has shape {x}, weight {weight} and groups is {groups}; the channels of x must be "
            "groups times those of weight, and groups must divide its outputs"
        )
    wanted = (x[0], outputs) if own else (outputs,)
    if bias is not None and bias != wanted:
        raise ValueError(f"bias has shape {bias}; here it must be {wanted}")
    least = {"reflect": padding + 1, "circular": padding}.get(mode, 0 if padding else 1)
    for size in x[2:]:
        if size < least or (mode != "zeros" and not size):
            raise ValueError(
                f"x has shape {x}; {mode} padding by {padding} needs at least {least} positions"
            )
        if convolved(size, weight[-1], stride, padding, dilation) < 1:
            raise ValueError(
                f"x has shape {x}; padded by {padding} it is smaller than a window of "
                f"{weight[-1]} with dilation {dilation}"
            )
    area = abs(scale) ** sides
    if scale > 0 and outputs % area:
        raise ValueError(
            f"weight has {outputs} outputs; shuffle={scale} needs a multiple of {area}"
        )
    if scale < 0:
        ends = [convolved(size, weight[-1], stride, padding, dilation) for size in x[2:]]
        if any(end % -scale for end in ends):
            raise ValueError(
                f"the convolution makes {ends} positions; shuffle={scale} needs multiples "
                f"of {-scale}"
            )
    channels = outputs // area if scale > 0 else outputs * (area or 1)
    if activation in GATED and channels % 2:
        raise ValueError(
            f"{activation} halves the {channels} channels of its argument; the number must be even"
        )


def problem_of(
    sizes: Geometry, sides: int, per_sample: bool, dtype: str, direction: str, options: Options
) -> Problem:
    """The `Problem` of a call."""
    dims = (
        ("batch", sizes.batch),
        ("in_channels", sizes.in_channels),
        ("out_channels", sizes.out_channels),
        ("kernel", sizes.window[1]),
        ("height", sizes.size[0]),
        ("width", sizes.size[1]),
    )
    flags = (*options._asdict().items(), ("per_sample", per_sample), ("sides", sides))
    return Problem(NAME, dims, dtype, flags, direction)
