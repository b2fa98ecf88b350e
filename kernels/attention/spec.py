"""Attention: sizes, limits, cost, and what to run unmeasured.

Queries ``(batch, heads, queries, width)``, keys and values ``(batch, key_heads, keys, width)``.
Flags: ``causal``; ``mask``, "boolean", "additive" or, where it needs a gradient, "learned";
``channels_first``, whether the tokens lie side by side in memory instead of the features;
``dropout``; ``scale``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..core.device import Device
from ..core.problem import Case, Choice, Problem, Scalar

NAME = "attention"
DIMENSIONS = ("batch", "heads", "key_heads", "queries", "keys", "width")
DIRECTIONS = ("forward", "backward")

MAX_WIDTH = 256
"""Above this a tile of the accumulator leaves the registers."""
SHORT = 1024
"""Up to so many keys the copies that put features side by side cost more than the products."""
FEW_QUERIES = 16
"""Queries that one tile of the smallest matrix product holds."""


def _case(
    name: str, size: Any, batch: int, heads: tuple[int, int], tokens: tuple[int, int], width: int,
    **flags: Scalar,
) -> Case:  # fmt: skip
    sizes = (batch, *heads, *tokens, width)
    return Case(name, size, dict(zip(DIMENSIONS, sizes, strict=True)), flags)


CASES = (
    _case("self-25", "small", 1, (2, 2), (25, 25), 8),
    _case("causal-masked", "ragged", 2, (4, 2), (35, 21), 40, causal=True, mask="boolean"),
    _case("one-query-biased", "ragged", 2, (2, 1), (1, 133), 16, mask="additive", scale=0.3),
    _case("image-8x8", "large", 32, (8, 8), (64, 64), 32, channels_first=True),
    _case("image-16x16", "large", 32, (8, 8), (256, 256), 32, channels_first=True),
    _case("image-64x64", "large", 4, (4, 4), (4096, 4096), 32, channels_first=True),
    _case("vit-small", "large", 64, (6, 6), (197, 197), 64),
    _case("one-query-2500", "large", 4, (8, 8), (1, 2500), 64),
    _case("causal-1024", "large", 8, (8, 2), (1024, 1024), 64, causal=True),
)


@dataclass(frozen=True)
class Config:
    """``block_queries`` x ``block_keys`` scores a program holds at a time. It keeps its queries
    and walks over keys, except for the gradients of keys and values, where it is the reverse."""

    block_queries: int = 64
    block_keys: int = 64
    num_warps: int = 4
    num_stages: int = 2


class Options(NamedTuple):
    """What a call fixes beside its tensors."""

    causal: bool
    scale: float
    dropout: float


def padded(size: int, least: int = 1) -> int:
    """The power of two that holds ``size``; tiles have such sides."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def bucket(problem: Problem) -> Problem:
    """The tuning key: every size up to a power of two, heads and batch as one; scale, the rate of
    a dropout and which of the masks with a gradient it is do not matter to speed."""
    rows = padded(problem["batch"] * problem["heads"])
    groups = padded(problem["heads"] // max(problem["key_heads"], 1))
    sizes = {
        "batch": 1,
        "heads": rows,
        "key_heads": max(rows // groups, 1),
        "queries": padded(problem["queries"]),
        "keys": padded(problem["keys"]),
        "width": padded(problem["width"], 16),
    }
    flags: tuple[tuple[str, Scalar], ...] = (
        ("causal", bool(problem.flag("causal"))),
        ("channels_first", bool(problem.flag("channels_first"))),
        ("dropout", bool(problem.flag("dropout"))),
        ("mask", problem.flag("mask")),
    )
    return replace(problem.with_dims(sizes), flags=flags)


def _scores(problem: Problem) -> int:
    """Pairs of a query and a key that it may attend to, masks apart."""
    queries, keys = problem["queries"], problem["keys"]
    pairs = queries * keys
    if problem.flag("causal"):
        square = min(queries, keys)
        pairs = square * (square + 1) // 2 + (queries - square) * keys
    return problem["batch"] * problem["heads"] * pairs


def flops(problem: Problem) -> int:
    """Two products forward, five backward (the scores once more), 2 x width FLOP a score each."""
    products = 2 if problem.direction == "forward" else 5
    return 2 * products * problem["width"] * _scores(problem)


def bytes_moved(problem: Problem) -> int:
    """Forward: queries, keys, values in, output out. Backward: these and the output's gradient
    in, three gradients out, and the log-sum-exp of each row. A mask is read once, without heads.
    """
    tokens = problem["batch"] * problem["width"] * problem.itemsize
    of_queries = problem["heads"] * problem["queries"] * tokens
    of_keys = problem["key_heads"] * problem["keys"] * tokens
    mask = {"boolean": 1, "additive": problem.itemsize}.get(problem.flag("mask"), 0)
    mask *= problem["batch"] * problem["queries"] * problem["keys"]
    if problem.direction == "forward":
        return 2 * of_queries + 2 * of_keys + mask
    rows = 4 * problem["batch"] * problem["heads"] * problem["queries"]
    return 4 * of_queries + 4 * of_keys + rows + mask


def not_supported_reasons(problem: Problem, implementation: str, device: Device) -> list[str]:
    """Why ``implementation`` cannot run ``problem`` on ``device``; empty if it can."""
    reasons = []
    if problem["width"] > MAX_WIDTH:
        reasons.append(f"heads of {problem['width']} features: the kernels hold up to {MAX_WIDTH}")
    if problem.flag("mask") == "learned" and implementation == "triton":
        reasons.append("the gradient of a mask: only the plain path sums it over what it repeats")
    return reasons


def heuristic(problem: Problem, device: Device, implementations: tuple[str, ...]) -> Choice:
    """The kernel where the plain path copies or leaves the device idle, and nowhere else."""
    fused = next((name for name in implementations if name in ("triton", "pallas")), None)
    plain = next((name for name in implementations if name in ("torch", "xla")), None)
    if fused is None:
        return Choice(plain or implementations[0], None, "no fused kernel can run here")
    why = "asked for"
    if plain is not None:
        why = kernel_wins(problem, device, fused)
        if not why:
            return Choice(plain, None, "the framework's own kernels are not slower here")
    return Choice(fused, config(problem, device, fused), why)


def kernel_wins(problem: Problem, device: Device, implementation: str) -> str:
    """Why the fused kernel is faster than the plain path; empty where that is not known."""
    if device.platform == "tpu":
        return ""
    if implementation == "pallas":
        # Compiled for both: wider tiles of three TF32 products spill on an H100.
        widest = 32 if problem.dtype == "float32" and problem.direction == "backward" else 64
        if min(problem["queries"], problem["keys"]) >= SHORT and problem["width"] <= widest:
            return "XLA writes every score to memory and reads it several times"
        return ""
    if not may_win(problem["queries"], problem["keys"], bool(problem.flag("channels_first"))):
        return ""
    if problem.flag("channels_first"):
        if problem.dtype == "float32" and problem["keys"] > SHORT // 4:
            return ""  # three TF32 products for one: no longer bound by the copies
        return "the plain path first copies the tokens' features side by side"
    heads = problem["batch"] * problem["heads"]
    # In half precision torch's flash attention splits keys too.
    whole = problem.dtype == "float32" and problem.direction == "forward"
    if whole and 2 * heads <= device.processors:
        return f"few queries: {heads} heads leave most of the device idle unless keys are split"
    return ""


def may_win(queries: int, keys: int, channels_first: bool) -> bool:
    """The sizes at which the Triton kernel is considered at all. Plain comparisons: compiled code
    asks them once for a range of sizes."""
    if channels_first:
        return keys <= SHORT
    return queries <= FEW_QUERIES and keys >= SHORT


def config(problem: Problem, device: Device, implementation: str) -> Config:
    """Tiles that fit the registers and, for short sequences, the tokens."""
    width = padded(problem["width"], 16)
    blocks = 64, 64
    if implementation == "triton" and _is_block(problem, device, width):
        side = padded(max(problem["queries"], problem["keys"]), 16)
        return Config(side, side, 8 if side > 32 else 4, 2)
    if problem.dtype == "float32":
        # Three TF32 products for each one: larger tiles spill.
        blocks = (64, 64) if width <= 32 else (32, 32)
        blocks = (32, 16) if problem.direction == "backward" else blocks
    queries = min(blocks[0], padded(problem["queries"], 16))
    keys = min(blocks[1], padded(problem["keys"], 16))
    warps = 4 if max(queries, keys) * width <= 8192 else 8
    return Config(queries, keys, warps, 2)


def _is_block(problem: Problem, device: Device, width: int) -> bool:
    """Whether the float32 scores of a head are one block backward, so that one kernel does."""
    if problem.dtype != "float32" or problem.direction != "backward" or width > 32:
        return False
    ampere = device.platform == "cuda" and device.capability < (9, 0)
    tokens = max(problem["queries"], problem["keys"])
    return problem["heads"] == problem["key_heads"] and tokens <= (32 if ampere else 64)


def search_space(problem: Problem, device: Device, implementation: str) -> list[Config]:
    """Every config worth timing."""
    queries, keys = padded(problem["queries"], 16), padded(problem["keys"], 16)
    return [
        Config(block_queries, block_keys, warps, stages)
        for block_queries in (16, 32, 64, 128)
        for block_keys in (16, 32, 64, 128)
        for warps in (2, 4, 8)
        for stages in ((1, 2, 3) if implementation == "triton" else (2,))
        if block_queries <= queries
        and block_keys <= keys
        and 256 * warps <= block_queries * block_keys <= 4096 * warps
    ]


def fit(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> bool:
    """Whether the shapes fit together, without the price of finding what is wrong."""
    if key != value or not len(query) == len(key) == 4:
        return False
    batch, heads, _, width = query
    others, shared, _, same = key
    return batch == others and same == width > 0 and shared > 0 and not heads % shared


def check_arguments(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    mask: tuple[int, ...] | None,
) -> None:
    """Raise ValueError, naming the argument, for shapes that no implementation takes."""
    if mask is None and fit(query, key, value):
        return
    query, key, value = tuple(query), tuple(key), tuple(value)
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if len(shape) != 4:
            raise ValueError(
                f"{name} has shape {shape}; it must be (batch, heads, tokens, features)"
            )
    if key != value:
        raise ValueError(f"key has shape {key} and value {value}; they must have the same")
    batch, heads, queries, width = query
    if key[0] != batch or key[3] != width:
        raise ValueError(
            f"query has shape {query} and key {key}; batch (axis 0) and features (axis 3) must be "
            "the same"
        )
    if heads % max(key[1], 1) or (heads and not key[1]):
        raise ValueError(
            f"query has {heads} heads and key {key[1]}, which must divide them: consecutive heads "
            "share one"
        )
    if width < 1:
        raise ValueError(f"query has shape {query}; heads need at least one feature")
    if mask is None:
        return
    full, mask = (batch, heads, queries, key[2]), tuple(mask)
    if len(mask) > 4 or any(
        size not in (1, whole) for size, whole in zip(mask[::-1], full[::-1], strict=False)
    ):
        raise ValueError(f"mask has shape {mask}; it must broadcast to {full}")
