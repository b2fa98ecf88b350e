"""A whole narrow multi-layer perceptron: sizes, limits, cost, and what to run unmeasured.

``rows`` rows of ``in_features`` go through ``layers`` hidden layers of ``width`` to
``out_features``. Flags: ``norm`` and ``activation`` of the hidden layers; ``output_activation``;
``dropout``, its probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core import dropout as counter
from ..core.activations import GATED, check_name
from ..core.device import Device
from ..core.errors import unknown_name
from ..core.problem import Case, Choice, Problem

NAME = "fused_mlp"
DIMENSIONS = ("rows", "in_features", "width", "out_features", "layers")
DIRECTIONS = ("forward", "backward")

NORMS = ("layer", "rms", "none")
MAX_COLUMNS = 256
"""A program holds whole rows of sums, at least 16 of them."""
MAX_IN_FEATURES = 1024
MAX_PALLAS_COLUMNS = 128
"""A program of Pallas holds a layer's whole weight."""
ON_CHIP_ELEMENTS = 1 << 14
"""The largest weight, in half precision, that a program holds whole; others come in slices."""
SMALLEST_SIDE = 16

CASES = (
    Case(
        "layer-gelu-small",
        "small",
        {"rows": 32, "in_features": 24, "width": 57, "out_features": 8, "layers": 2},
        {"norm": "layer", "activation": "GELU", "output_activation": "Tanh"},
    ),
    Case(
        "rms-dropout-ragged",
        "ragged",
        {"rows": 37, "in_features": 29, "width": 130, "out_features": 5, "layers": 2},
        {"norm": "rms", "activation": "Mish", "eps": 1e-6, "dropout": 0.2, "seed": 5},
    ),
    Case(
        "policy-128",
        "large",
        {"rows": 16384, "in_features": 128, "width": 128, "out_features": 32, "layers": 3},
        {"norm": "layer", "activation": "SiLU"},
    ),
    Case(
        "world-model-256",
        "large",
        {"rows": 2048, "in_features": 512, "width": 256, "out_features": 255, "layers": 4},
        {"norm": "rms", "activation": "SiLU"},
    ),
    Case(
        "world-model-256-many",
        "large",
        {"rows": 16384, "in_features": 512, "width": 256, "out_features": 255, "layers": 4},
        {"norm": "rms", "activation": "SiLU"},
    ),
)


@dataclass(frozen=True)
class Config:
    """``block_rows`` rows a program takes through all layers, ``block_in`` of a layer's inputs at
    a time where its weight does not fit whole."""

    block_rows: int = 64
    block_in: int = 32
    num_warps: int = 4
    num_stages: int = 2


def padded(size: int) -> int:
    """The power of two that holds ``size``; tiles have such sides."""
    return max(1 << max(size - 1, 0).bit_length(), SMALLEST_SIDE)


def parts(activation: str) -> int:
    """How many outputs of a linear layer make one result."""
    return 2 if activation in GATED else 1


def on_chip(width: int, out_features: int, itemsize: int) -> bool:
    """Whether a program can hold each weight whole, and so the rows between two layers."""
    columns = padded(width)
    return itemsize == 2 and columns * max(columns, padded(out_features)) <= ON_CHIP_ELEMENTS


def parameters(problem: Problem) -> int:
    """Elements of all weights, biases and norms."""
    inputs, width, outputs, layers = (
        problem[name] for name in ("in_features", "width", "out_features", "layers")
    )
    return width * (inputs + (layers - 1) * width + outputs + 3 * layers) + outputs


def bucket(problem: Problem) -> Problem:
    """The tuning key: rows up to a power of two, a model's sizes as they are. All elementwise
    activations cost about the same, as do both norms; dropout and seed do not matter."""
    rows = 1 << max(problem["rows"] - 1, 0).bit_length()
    key = problem.with_dims({**dict(problem.dims), "rows": rows})
    norm = "none" if problem.flag("norm", "none") == "none" else "layer"
    return replace(key, flags=(("norm", norm),))


def bytes_moved(problem: Problem) -> int:
    """Forward: input and weights in, result out; all between stays on the chip. Backward: also
    each hidden layer's sums and activations in, the gradients of input and weights out."""
    rows, layers = problem["rows"], problem["layers"]
    ends = problem["in_features"] + problem["out_features"]
    if problem.direction == "forward":
        return (rows * ends + parameters(problem)) * problem.itemsize
    between = 2 * layers * problem["width"]
    streams = ends + between + problem["in_features"]
    return (rows * streams + 2 * parameters(problem)) * problem.itemsize


def flops(problem: Problem) -> int:
    """The matrix products, two of them backward, and about 20 for each hidden value."""
    values = 20 * problem["width"] * problem["layers"]
    forward = problem["rows"] * (2 * parameters(problem) + values)
    return forward if problem.direction == "forward" else 2 * forward


def not_supported_reasons(problem: Problem, implementation: str, device: Device) -> list[str]:
    """Why ``implementation`` cannot run ``problem`` on ``device``; empty if it can."""
    reasons = misfits(problem, implementation)
    if implementation == "pallas" and device.platform == "tpu":
        reasons += [
            f"Mosaic has no product of bfloat16 with one row, here {name} is 1"
            for name in ("in_features", "width", "out_features")
            if problem[name] == 1
        ]
    return reasons


def misfits(problem: Problem, implementation: str) -> list[str]:
    """Why ``implementation`` cannot run ``problem``, on any device and with any number of rows."""
    most = MAX_PALLAS_COLUMNS if implementation == "pallas" else MAX_COLUMNS
    reasons = [
        f"a program holds whole rows of up to {most} elements, here {name} is {problem[name]}"
        for name in ("width", "out_features")
        if padded(problem[name]) > most
    ]
    most = MAX_PALLAS_COLUMNS if implementation == "pallas" else MAX_IN_FEATURES
    if problem["in_features"] > most:
        reasons.append(
            f"in_features={problem['in_features']}: above {most} the framework's product is faster"
        )
    for flag in ("activation", "output_activation"):
        if problem.flag(flag, "Identity") in GATED:
            reasons.append(f"{flag}={problem.flag(flag)} halves its rows; layers of it run singly")
    return reasons


def heuristic(problem: Problem, device: Device, implementations: tuple[str, ...]) -> Choice:
    """The fused kernels, where the device holds all rows at once or each weight whole: a layer of
    the plain path takes two launches forward and six backward, each of which passes over all
    rows. Otherwise every block of rows reads slices of all weights again, and cuBLAS is ahead."""
    fused = next((name for name in implementations if name in ("triton", "pallas")), None)
    plain = next((name for name in implementations if name in ("torch", "xla")), None)
    if fused is None:
        why = "layer by layer, where linear_norm_activation decides"
        return Choice(plain or implementations[0], None, why)
    why = ""
    if device.platform == "tpu":
        why = "XLA fuses what follows a product on a TPU"
    elif device.platform == "hip" and problem.dtype == "float32":
        why = "there is no fast float32 product in Triton on AMD"
    elif fused == "pallas" and problem.dtype == "float32":
        why = "three TF32 products cost more than XLA's one"
    elif problem["rows"] > 32 * device.processors and not on_chip(
        problem["width"], problem["out_features"], problem.itemsize
    ):
        why = "so many blocks of rows would each read all weights again"
    if why and plain is not None:
        return Choice(plain, None, why)
    return Choice(fused, config(problem, device), "all layers in one launch, rows on the chip")


def config(problem: Problem, device: Device) -> Config:
    """The tile to take unmeasured: few rows while there are fewer programs than processors, and
    at most 32 elements of the rows in each thread. More spill on AMD."""
    columns = max(padded(problem["width"]), padded(problem["out_features"]))
    few = problem["rows"] <= 16 * device.processors or device.platform == "hip"
    rows = 16 if few or (columns > 128 and problem.dtype == "float32") else 32
    half = problem.dtype != "float32"
    stages = 3 if columns > 128 and half and problem.direction == "forward" else 2
    block_in = 64 if columns <= 128 and half else 32
    return Config(rows, block_in, 4 if rows * columns <= 2048 else 8, stages)


def search_space(problem: Problem, device: Device, implementation: str) -> list[Config]:
    """Every config worth timing."""
    return [
        Config(rows, block_in, warps, stages)
        for rows in (16, 32, 64, 128)
        for block_in in ((32, 64) if implementation == "triton" else (32,))
        for warps in (4, 8)
        for stages in ((2, 3) if implementation == "triton" else (1,))
    ]


def check_arguments(
    shape: tuple[int, ...],
    weights: Sequence[tuple[int, ...]],
    vectors: Mapping[str, Sequence[tuple[int, ...]] | None],
    norm: str,
    activation: str,
    output_activation: str,
    dropout: float,
) -> None:
    """Raise an error that names the argument that is wrong.

    ``vectors`` are the shapes of ``biases``, ``norm_weights`` and ``norm_biases``, None where
    there are none.
    """
    if norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    check_name(activation)
    check_name(output_activation)
    counter.check_probability(dropout)
    if len(weights) < 2:
        raise ValueError(
            f"weights has {len(weights)} entries; it needs those of one hidden layer or more and "
            "of the output layer"
        )
    if any(len(weight) != 2 or not all(weight) for weight in weights):
        raise ValueError(f"weights have shapes {list(weights)}; each must be (outputs, inputs)")
    columns, last = weights[0][0], len(weights) - 1
    if columns % parts(activation) or weights[-1][0] % parts(output_activation):
        raise ValueError("a gated activation halves a layer's result, so its size must be even")
    width = columns // parts(activation)
    inputs = shape[-1] if shape else 0
    expected = [(columns, inputs), *[(columns, width)] * (last - 1), (weights[-1][0], width)]
    for index, (weight, wanted) in enumerate(zip(weights, expected, strict=True)):
        if tuple(weight) != wanted:
            raise ValueError(
                f"weights[{index}] has shape {tuple(weight)}; after x of shape {shape} and hidden "
                f"layers of equal width it must be {wanted}"
            )
    for name, given in vectors.items():
        wanted_vectors = [(columns,)] * last
        if name == "biases":
            wanted_vectors.append((weights[-1][0],))
        if given is not None and [tuple(one) for one in given] != wanted_vectors:
            raise ValueError(f"{name} have shapes {list(given)}; here it must be {wanted_vectors}")


def problem_of(
    rows: int,
    weights: Sequence[tuple[int, ...]],
    dtype: str,
    direction: str,
    options: dict[str, Any],
) -> Problem:
    """The `Problem` of a call."""
    sizes = rows, weights[0][1], weights[-1][1], weights[-1][0], len(weights) - 1
    dims = tuple(zip(DIMENSIONS, sizes, strict=True))
    return Problem(NAME, dims, dtype, tuple(options.items()), direction)
