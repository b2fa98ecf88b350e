"""Neuron-level model: sizes, limits, cost, and what to run unmeasured.

``rows`` samples (of one tick or of many) of ``neurons`` neurons, each with a trace of ``memory``
values and ``hidden`` gated units, 0 for the shallow form. There are no flags. Directions:
``backward`` is the gradient of the traces, ``weight_gradient`` that of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.device import Device
from ..core.problem import Case, Choice, Problem

NAME = "neuron_level_model"
DIMENSIONS = ("rows", "neurons", "memory", "hidden")
DIRECTIONS = ("forward", "backward", "weight_gradient")

MAX_MEMORY, MAX_HIDDEN = 64, 128
"""A warp holds a neuron's weights, ``memory`` x ``block_hidden`` of them twice, in registers."""


def _case(id: str, size: str, *dims: int) -> Case:
    return Case(id, size, dict(zip(DIMENSIONS, dims, strict=True)))  # type: ignore[arg-type]


CASES = (
    _case("small", "small", 24, 16, 8, 8),
    _case("odd", "ragged", 19, 13, 7, 5),
    _case("shallow-odd", "ragged", 18, 11, 9, 0),
    _case("maze-128", "large", 64, 128, 8, 8),
    _case("maze-128-ticks", "large", 1600, 128, 8, 8),
    _case("example-1024-b4", "large", 4, 1024, 25, 32),
    _case("example-1024", "large", 64, 1024, 25, 32),
)


@dataclass(frozen=True)
class Config:
    """The tile of one program: ``block_neurons`` neurons, ``block_rows`` rows at a time, and
    ``block_hidden`` hidden units at a time."""

    block_neurons: int = 8
    block_rows: int = 16
    block_hidden: int = 32
    num_warps: int = 8


def padded(size: int) -> int:
    """The power of two that holds ``size``; a dot wants 16."""
    return max(1 << max(size - 1, 0).bit_length(), 16)


def bucket(problem: Problem) -> Problem:
    """The tuning key: rows up to a power of two; the rest are a model's constants."""
    rows = 1 << max(problem["rows"] - 1, 0).bit_length()
    return problem.with_dims({**dict(problem.dims), "rows": rows})


def _sizes(problem: Problem) -> tuple[int, int, int]:
    """Elements of all traces, of all activations, and of all weights and biases."""
    rows, neurons, memory, hidden = (size for _, size in problem.dims)
    first = (memory + 1) * 2 * (hidden or 1)
    second = (hidden + 1) * 2 if hidden else 0
    return rows * neurons * memory, rows * neurons, neurons * (first + second)


def bytes_moved(problem: Problem) -> int:
    """Each array once: traces and weights in; the activations, or their gradient and that of
    traces or weights."""
    traces, activations, weights = _sizes(problem)
    elements = traces + activations + weights
    if problem.direction == "backward":
        elements += traces
    elif problem.direction == "weight_gradient":
        elements += weights
    return elements * problem.itemsize


def flops(problem: Problem) -> int:
    """The products of both layers; a gradient takes them again, and as many of its own."""
    rows, neurons, memory, hidden = (size for _, size in problem.dims)
    once = 4 * rows * neurons * (memory * hidden + hidden if hidden else memory)
    return once if problem.direction == "forward" else 2 * once


def not_supported_reasons(problem: Problem, implementation: str, device: Device) -> list[str]:
    """Why ``implementation`` cannot run ``problem`` on ``device``; empty if it can."""
    reasons = []
    for name, most in (("memory", MAX_MEMORY), ("hidden", MAX_HIDDEN)):
        if problem[name] > most:
            reasons.append(
                f"{name} is {problem[name]}; above {most} a neuron's weights leave the registers"
            )
    return reasons


def heuristic(problem: Problem, device: Device, implementations: tuple[str, ...]) -> Choice:
    """The fused kernels: the plain path writes the hidden layer, six times the traces' size."""
    fused = next((name for name in implementations if name in ("triton", "pallas")), None)
    plain = next((name for name in implementations if name in ("torch", "xla")), None)
    if fused is None:
        return Choice(plain or implementations[0], None, "no fused kernel can run here")
    if device.platform == "tpu" and plain is not None:
        return Choice(plain, None, "XLA batches the products of a TPU")
    config = _config(problem) if fused == "triton" else _pallas_config(problem)
    return Choice(fused, config, "one kernel, the hidden layer in registers")


def _config(problem: Problem) -> Config:
    """A neuron for each warp, as the batched dot lays it out; eight are a sector of memory. Twice
    the rows halve the traffic of weights, where the registers hold them. The sums of the weights'
    gradients take as many registers as the weights."""
    half, gradient = problem.dtype != "float32", problem.direction == "weight_gradient"
    many = problem["rows"] > 16 and (half or problem.direction == "forward")
    hidden = max((512 if gradient else 1024) // padded(problem["memory"]), 16)
    rows = 32 if many or (half and gradient) else 16
    return Config(8, rows, min(hidden, padded(problem["hidden"])), 8)


def _pallas_config(problem: Problem) -> Config:
    """A neuron for each program, with all its hidden units. Products of float32 values are three,
    which leaves a gradient registers for half the rows."""
    hidden = padded(problem["hidden"])
    exact = problem.dtype == "float32" and problem.direction != "forward"
    rows = min(padded(problem["rows"]), 32 if exact else 64)
    return Config(1, rows, hidden, 4 if hidden > 16 else 1)


def search_space(problem: Problem, device: Device, implementation: str) -> list[Config]:
    """Every config worth timing."""
    if implementation == "pallas":
        return [
            Config(1, rows, padded(problem["hidden"]), warps)
            for rows in (16, 32, 64, 128)
            for warps in (1, 2, 4)
        ]
    return [
        Config(neurons, rows, hidden, warps)
        for neurons in (4, 8, 16)
        for rows in (16, 32, 64)
        for hidden in (16, 32, 64)
        if hidden <= padded(problem["hidden"])
        for warps in (4, 8)
        if warps <= neurons
    ]


Shape = Sequence[int]


def check_shapes(shapes: Mapping[str, Shape | None]) -> None:
    """Raise ValueError, naming the argument, for shapes that do not fit together."""
    trace, weight1 = tuple(shapes["trace"] or ()), tuple(shapes["weight1"] or ())
    if len(trace) < 2 or trace[-1] < 1:
        raise ValueError(
            f"trace has shape {trace}; it must be (..., neurons, memory) with a memory of at "
            "least 1"
        )
    neurons, memory = trace[-2:]
    if len(weight1) != 3 or weight1[:2] != (neurons, memory) or weight1[2] < 2 or weight1[2] % 2:
        raise ValueError(
            f"weight1 has shape {weight1}; with trace {trace} it must be (neurons, memory, "
            f"2 * hidden) = ({neurons}, {memory}, 2 * hidden)"
        )
    hidden = weight1[2] // 2
    wanted: dict[str, tuple[int, ...]] = {"bias1": (neurons, 2 * hidden)}
    if (shapes["weight2"] is None) != (shapes["bias2"] is None):
        raise ValueError("weight2 and bias2 belong together: give both or neither")
    if shapes["weight2"] is not None:
        wanted |= {"weight2": (neurons, hidden, 2), "bias2": (neurons, 2)}
    elif hidden != 1:
        raise ValueError(
            f"weight1 has shape {weight1} and there is no weight2; without a hidden layer its "
            "last axis is 2, one value and its gate"
        )
    if "of_z" in shapes:
        wanted["of_z"] = trace[:-1]
    if shapes.get("out") is not None:
        wanted["out"] = trace[:-1]
    if shapes.get("into") is not None:
        wanted["into"] = trace
    for name, shape in wanted.items():
        got = tuple(shapes[name] or ())
        if got != shape:
            raise ValueError(
                f"{name} has shape {got}; with trace {trace} and weight1 {weight1} it must be "
                f"{shape}"
            )


def check_history(shapes: Mapping[str, Shape | None], tick: object = 0) -> None:
    """Raise ValueError, naming the argument, for shapes that do not fit to a history (neurons,
    length, rows), or a tick known to be outside."""
    history, weight1 = tuple(shapes["history"] or ()), tuple(shapes["weight1"] or ())
    memory = weight1[1] if len(weight1) == 3 else 1
    if len(history) != 3 or not 1 <= memory <= history[1]:
        raise ValueError(
            f"history has shape {history}; it must be (neurons, length, rows), with weight1 "
            f"{weight1} of a length of at least {memory}"
        )
    neurons, length, rows = history
    if isinstance(tick, int) and not 0 <= tick <= length - memory:
        raise ValueError(
            f"tick is {tick}; in a history of length {length} traces of {memory} begin at 0 to "
            f"{length - memory}"
        )
    rest = {name: shape for name, shape in shapes.items() if name.startswith(("weight", "bias"))}
    check_shapes({"trace": (rows, neurons, memory), **rest})
    wanted = {"of_z": (rows, neurons), "into": history}
    for name, shape in wanted.items():
        got = shapes.get(name)
        if name == "of_z" and got is not None and "into" not in shapes:
            shape = (length - memory + 1, *shape)
        if got is not None and tuple(got) != shape:
            raise ValueError(
                f"{name} has shape {tuple(got)}; with history {history} and weight1 {weight1} it "
                f"must be {shape}"
            )
