"""Synchronised attention: sizes, limits, cost, and what to run unmeasured.

``batch`` samples of ``neurons`` activations, of which ``pairs`` pairs are synchronised;
``queries`` queries to each of ``heads`` sets of keys and values at ``positions``. The flag
``shared`` says that keys and values are one tensor, ``channels_first`` that positions are next to
each other in memory. Directions: ``backward`` is what one tick passes to the one before,
``key_gradient`` the gradient of keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..core.device import Device
from ..core.problem import Case, Choice, Problem

NAME = "synchronised_attention"
DIMENSIONS = (
    "batch",
    "neurons",
    "pairs",
    "heads",
    "queries",
    "positions",
    "key_width",
    "value_width",
)
DIRECTIONS = ("forward", "backward", "key_gradient")

MAX_QUERIES, MAX_WIDTH = 32, 129
"""A program holds all queries to a set of keys, and their sums, in registers."""


def _case(id: str, size: Any, dims: tuple[int, ...], shared: bool, channels_first: bool) -> Case:
    flags = {"shared": shared, "channels_first": channels_first}
    return Case(id, size, dict(zip(DIMENSIONS, dims, strict=True)), flags)


CASES = (
    _case("small", "small", (4, 12, 8, 1, 2, 24, 16, 16), True, True),
    _case("heads-odd", "ragged", (3, 13, 7, 3, 2, 37, 7, 11), False, False),
    _case("shared-odd", "ragged", (5, 11, 17, 1, 4, 70, 33, 33), True, True),
    _case("maze-128", "large", (64, 128, 64, 1, 4, 36, 65, 65), True, True),
    _case("example-64", "large", (64, 1024, 128, 1, 4, 2500, 65, 65), True, True),
    _case("example-64-rows", "large", (64, 1024, 128, 1, 4, 2500, 65, 65), True, False),
    _case("example-4", "large", (4, 1024, 128, 1, 4, 2500, 65, 65), True, True),
    _case("first-last-64", "large", (64, 1024, 2080, 1, 4, 2500, 65, 65), True, True),
    _case("heads-8", "large", (64, 512, 128, 8, 1, 196, 64, 64), False, False),
)


@dataclass(frozen=True)
class Config:
    """What the walk over positions takes at a time: ``block_positions`` and, for the gradient of
    keys and values, ``block_queries`` queries of all ticks. ``apart``: a kernel each for the
    gradients of keys and of values, which makes the scores twice and needs fewer registers."""

    block_positions: int = 64
    block_queries: int = 16
    num_warps: int = 4
    num_stages: int = 2
    apart: bool = False


def padded(size: int, least: int = 16) -> int:
    """The power of two that holds ``size``; a dot wants 16."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def split_width(width: int) -> tuple[int, bool]:
    """The columns of a tile for ``width``, and whether one feature stays outside: features with a
    constant beside them are one more than a power of two."""
    last = width > 16 and padded(width - 1) == width - 1
    return padded(width - last), last


POSITIONS_PER_SPLIT = 256
"""A program with fewer positions than this is not worth another kernel."""


WARPS_PER_PROCESSOR = 8
"""As many warps keep a processor busy while others wait for memory."""


def split_positions(sets: int, positions: int, config: Config, processors: int) -> tuple[int, int]:
    """How many programs share the positions of a set of keys, and the positions of each: enough to
    give every processor its warps."""
    programs = processors * max(1, WARPS_PER_PROCESSOR // config.num_warps)
    wanted = min(programs // max(sets, 1), positions // POSITIONS_PER_SPLIT, 64)
    blocks = -(-positions // config.block_positions)
    each = -(-blocks // max(1, wanted))
    return -(-blocks // each), each * config.block_positions


def bucket(problem: Problem) -> Problem:
    """The tuning key: batch and positions up to a power of two; the rest are a model's constants,
    of which neurons and pairs have no part in the gradient of keys and values. One key for both
    layouts: JAX knows none."""
    dims = dict(problem.dims)
    if problem.direction == "key_gradient":
        dims |= {"neurons": 1, "pairs": 1}
    for name in ("batch", "positions"):
        dims[name] = padded(dims[name], 1)
    key = problem.with_dims(dims)
    return replace(key, flags=(("shared", bool(problem.flag("shared", False))),))


def _widths(problem: Problem) -> int:
    """Features of a position that are read."""
    return problem["key_width"] + (0 if problem.flag("shared") else problem["value_width"])


def bytes_moved(problem: Problem) -> int:
    """Each array once. Forward: keys, values, the synchronised neurons, the map to the queries,
    the sums before and after, what was read. Backward: these, the gradients of what was read and
    of all neurons. Keys' gradient: keys and values, theirs, the queries and what they read."""
    batch, pairs = problem["batch"], problem["pairs"]
    sets = batch * problem["heads"]
    positions = sets * problem["positions"] * _widths(problem)
    rows = sets * problem["queries"]
    if problem.direction == "key_gradient":
        both = problem["key_width"] + problem["value_width"]
        gradients = sets * problem["positions"] * both
        return (positions + gradients + 2 * rows * both) * problem.itemsize
    neurons = batch * min(2 * pairs, problem["neurons"])
    weights = problem["heads"] * problem["queries"] * problem["key_width"] * (pairs + 1)
    elements = positions + neurons + weights + 2 * batch * pairs + rows * problem["value_width"]
    if problem.direction == "backward":
        elements += rows * (problem["value_width"] + 2 * problem["key_width"])
        elements += 2 * batch * problem["neurons"]
    return elements * problem.itemsize


def flops(problem: Problem) -> int:
    """The products: queries, scores and what is read; a gradient takes the scores again."""
    rows = problem["batch"] * problem["heads"] * problem["queries"]
    keys, values = problem["key_width"], problem["value_width"]
    scores, map = 2 * rows * problem["positions"], 2 * rows * keys * problem["pairs"]
    if problem.direction == "forward":
        return scores * (keys + values) + map
    if problem.direction == "backward":
        return scores * (2 * keys + values) + map
    return 2 * scores * (keys + values)


def not_supported_reasons(problem: Problem, implementation: str, device: Device) -> list[str]:
    """Why ``implementation`` cannot run ``problem`` on ``device``; empty if it can."""
    reasons = []
    for name, most in (
        ("queries", MAX_QUERIES),
        ("key_width", MAX_WIDTH),
        ("value_width", MAX_WIDTH),
    ):
        if problem[name] > most:
            reasons.append(f"{name} is {problem[name]}; the kernels hold up to {most}")
    return reasons


def heuristic(problem: Problem, device: Device, implementations: tuple[str, ...]) -> Choice:
    """The fused kernels: the plain path starts six to eight for the same."""
    fused = next((name for name in implementations if name in ("triton", "pallas")), None)
    plain = next((name for name in implementations if name in ("torch", "xla")), None)
    if fused is None:
        return Choice(plain or implementations[0], None, "no fused kernel can run here")
    if device.platform == "tpu" and plain is not None:
        return Choice(plain, None, "XLA fuses what is around the products on a TPU")
    config = _walk(problem, device) if fused == "triton" else _config(problem, device)
    return Choice(fused, config, "scores never leave the chip, and few kernels start")


def _config(problem: Problem, device: Device) -> Config:
    """Tiles that fit the registers: three TF32 products hold each operand twice."""
    whole = problem.dtype == "float32"
    if problem.direction != "key_gradient":
        block = min(32 if whole else 64, padded(problem["positions"]))
        return Config(block, 16, 4, 2 if whole else 3)
    if whole and device.platform == "cuda" and device.capability[0] != 9:
        return Config(32, 16, 4, 1, apart=True)
    return Config(64, 16, 4, 1 if whole else 2)


def _walk(problem: Problem, device: Device) -> Config:
    """In Triton each warp walks over positions of its own: as many as its registers hold, in as
    many warps as the sets leave to each and shared memory holds."""
    if problem.direction == "key_gradient":
        return _config(problem, device)
    whole = problem.dtype == "float32"
    widths = [split_width(problem["key_width"])[0]]
    if not problem.flag("shared"):
        widths.append(split_width(problem["value_width"])[0])
    each = 16 if whole or max(widths) * padded(problem["queries"], 8) > 512 else 32
    stages = 2 if whole or device.platform == "hip" else 3
    sets, warps = problem["batch"] * problem["heads"], WARPS_PER_PROCESSOR
    buffer = each * sum(widths) * problem.itemsize * stages
    while warps > 1 and (
        warps * buffer > (device.shared_memory_bytes or math.inf)
        or (warps // 2) * each >= problem["positions"]
        or (warps // 2) * sets >= device.processors * WARPS_PER_PROCESSOR // 2
        or (warps > 4 and _busy(sets, warps // 2, device) > _busy(sets, warps, device))
    ):
        warps //= 2
    return Config(warps * each, 16, warps, stages)


def _busy(sets: int, warps: int, device: Device) -> int:
    """Warps at work where programs of so many share sets."""
    programs = device.processors * WARPS_PER_PROCESSOR // warps
    return sets * (programs // sets) * warps


def search_space(problem: Problem, device: Device, implementation: str) -> list[Config]:
    """Every config worth timing."""
    gradient = problem.direction == "key_gradient"
    return [
        Config(positions, queries, warps, stages, apart)
        for positions in (16, 32, 64, 128, 256)
        if positions <= padded(problem["positions"])
        for queries in ((16, 32, 64) if gradient else (16,))
        for warps in (1, 2, 4, 8)
        if positions >= 16 * warps
        for stages in ((1, 2, 3, 4) if implementation == "triton" else (2,))
        for apart in ((False, True) if gradient and implementation == "triton" else (False,))
    ]


def check_arguments(shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    """Raise ValueError, naming the argument, for shapes that do not fit together."""
    for name, axes in (
        ("z", "(batch, neurons)"),
        ("keys", "(batch, heads, positions, K)"),
        ("values", "(batch, heads, positions, V)"),
        ("in_weight", "(heads * queries * K, pairs)"),
        ("left", "(pairs,)"),
    ):
        shape = shapes.get(name, ())
        if name in shapes and len(shape or ()) != axes.count(",") + (name != "left"):
            raise ValueError(f"{name} has shape {shape}; it must be {axes}")
    z, keys, values = (tuple(shapes[name] or ()) for name in ("z", "keys", "values"))
    in_weight, left = (tuple(shapes[name] or ()) for name in ("in_weight", "left"))
    heads, positions, width = keys[1:]
    features = heads * width
    if not features or not in_weight[0] or in_weight[0] % features:
        raise ValueError(
            f"in_weight has shape {in_weight}; its rows must be a multiple of {features}, the "
            f"heads times the width of keys {keys}"
        )
    if not positions:
        raise ValueError(f"keys has shape {keys}; there must be at least one position")
    rows = in_weight[0] // width
    read = z[0], rows * values[3]
    wanted: dict[str, tuple[int, ...]] = {
        "keys": (z[0], *keys[1:]),
        "values": (*keys[:3], values[3]),
        "right": left,
        "r": left,
        "scale": left,
        "in_weight": (in_weight[0], *left),
        "in_bias": in_weight[:1],
        "sums": (z[0], *left),
        "of_read": read,
        "of_next_sums": (z[0], *left),
        "of_z": z,
        "into.read": read,
        "into.sums": (z[0], *left),
        "into.query": (z[0], in_weight[0]),
        "into.log_sum_exp": (z[0], rows),
        "into.synchronisation": (z[0], *left),
        "attended.read": read,
        "attended.query": (z[0], in_weight[0]),
        "attended.log_sum_exp": (z[0], rows),
    }
    for name, shape in wanted.items():
        got = shapes.get(name)
        if got is not None and tuple(got) != shape:
            raise ValueError(
                f"{name} has shape {tuple(got)}; with z {z}, left {left}, in_weight {in_weight}, "
                f"keys {keys} and values {values} it must be {shape}"
            )


def check_queries(
    shapes: Mapping[str, tuple[int, ...]], keys: tuple[int, ...], values: tuple[int, ...]
) -> None:
    """Raise ValueError, naming the argument, for queries of all ticks that do not fit."""
    query, features = shapes["query"], keys[1] * keys[3]
    if len(query) != 3 or query[1] != keys[0] or not query[2] or query[2] % features:
        raise ValueError(
            f"query has shape {query}; with keys {keys} it must be (ticks, {keys[0]}, a multiple "
            f"of {features})"
        )
    rows = query[2] // keys[3]
    read = (*query[:2], rows * values[3])
    wanted = {"read": read, "of_read": read, "log_sum_exp": (*query[:2], rows)}
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise ValueError(
                f"{name} has shape {shapes[name]}; with query {query} and values "
                f"{values} it must be {shape}"
            )
