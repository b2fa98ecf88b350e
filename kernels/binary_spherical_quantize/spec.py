"""Binary spherical quantization: sizes, limits, cost, and what to run unmeasured.

Features ``(tokens, width)`` split into ``groups`` codes of ``bits = width / groups`` bits each.
Flags: ``groups``; ``entropy_bits`` (0: no entropies), the block of bits whose joint distribution
the codebook entropy keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.device import Device
from ..core.problem import Case, Choice, Problem

NAME = "binary_spherical_quantize"
DIMENSIONS = ("tokens", "width")
DIRECTIONS = ("forward", "backward")

MAX_BITS = 63
"""An index is a non-negative int64."""
MAX_ENTROPY_BITS = 20
"""The average distribution of a block holds ``2 ** entropy_bits`` probabilities."""
MAX_FUSED_ENTROPY_BITS = 10
"""Above this a block's table of half-codes by half-codes leaves the registers of a program."""
MAX_PALLAS_ENTROPY_GROUPS = 16
"""A program adds up the coins of each group in turn."""
SMALLEST_NORM = 1e-12
"""A vector whose norm is not above this counts as the zero vector."""

CASES = (
    Case(
        "codes-18bit-small", "small", {"tokens": 48, "width": 18}, {"groups": 1, "entropy_bits": 0}
    ),
    Case(
        "marginals-36bit",
        "small",
        {"tokens": 64, "width": 36},
        {"groups": 1, "entropy_bits": 1, "temperature": 20.0},
    ),
    Case(
        "groups-3x11bit",
        "ragged",
        {"tokens": 37, "width": 33},
        {"groups": 3, "entropy_bits": 1, "temperature": 5.0},
    ),
    Case(
        "joint-10bit",
        "ragged",
        {"tokens": 53, "width": 10},
        {"groups": 1, "entropy_bits": 10, "temperature": 3.0},
    ),
    Case(
        "blocks-2x9of18bit",
        "ragged",
        {"tokens": 41, "width": 18},
        {"groups": 1, "entropy_bits": 9, "temperature": 6.0},
    ),
    Case("wide-63bit", "ragged", {"tokens": 19, "width": 63}, {"groups": 1, "entropy_bits": 0}),
    Case(
        "codes-18bit", "large", {"tokens": 262144, "width": 18}, {"groups": 1, "entropy_bits": 0}
    ),
    Case(
        "marginals-36bit-large",
        "large",
        {"tokens": 262144, "width": 36},
        {"groups": 1, "entropy_bits": 1},
    ),
    Case(
        "blocks-2x9of18bit-large",
        "large",
        {"tokens": 262144, "width": 18},
        {"groups": 1, "entropy_bits": 9},
    ),
)


@dataclass(frozen=True)
class Config:
    """``block_tokens`` codes a program holds at a time in the row kernels, ``joint_tokens`` in the
    kernels of the joint distribution (``entropy_bits`` above 1)."""

    block_tokens: int = 64
    num_warps: int = 4
    joint_tokens: int = 16


def bits_of(problem: Problem) -> int:
    """Bits of one code."""
    return problem["width"] // problem.flag("groups", 1)


def padded(size: int) -> int:
    """The power of two that holds ``size``; tiles have such sides."""
    return 1 << max(size - 1, 0).bit_length()


def bucket(problem: Problem) -> Problem:
    """The tuning key: the token count up to a power of two; the width is a model's constant, and
    a temperature does not matter to speed.
    """
    key = problem.with_dims({"tokens": padded(problem["tokens"]), "width": problem["width"]})
    flags = (("groups", 1), ("entropy_bits", 0))
    return replace(key, flags=tuple((name, key.flag(name, usual)) for name, usual in flags))


def _table_entries(problem: Problem) -> int:
    """Probabilities in the average distributions of all blocks."""
    entropy_bits = problem.flag("entropy_bits", 0)
    return (problem["width"] // entropy_bits) << entropy_bits if entropy_bits else 0


def bytes_moved(problem: Problem) -> int:
    """Features read once, results written once. Forward: quantized features, int64 indices and,
    when asked for, entropies. Backward: their cotangents in, the gradient of the features out."""
    elements = problem["tokens"] * problem["width"]
    codes = problem["tokens"] * problem.flag("groups", 1)
    entropy = (4 * codes if problem.flag("entropy_bits", 0) else 0) + 4 * _table_entries(problem)
    if problem.direction == "forward":
        return 2 * elements * problem.itemsize + 8 * codes + entropy
    return 3 * elements * problem.itemsize + entropy


def flops(problem: Problem) -> int:
    """Norm, projection and entropies per element, and the product of half-codes per block."""
    elements = problem["tokens"] * problem["width"]
    forward = problem.direction == "forward"
    count = (4 if forward else 8) * elements
    entropy_bits = problem.flag("entropy_bits", 0)
    if entropy_bits:
        count += 12 * elements
    if entropy_bits > 1:
        count += (2 if forward else 4) * problem["tokens"] * _table_entries(problem)
    return count


def not_supported_reasons(problem: Problem, implementation: str, device: Device) -> list[str]:
    """Why ``implementation`` cannot run ``problem`` on ``device``; empty if it can."""
    reasons = []
    entropy_bits, groups = problem.flag("entropy_bits", 0), problem.flag("groups", 1)
    if bits_of(problem) > MAX_BITS:
        reasons.append(f"a code of {bits_of(problem)} bits does not fit an int64 index")
    if implementation == "triton" and entropy_bits > MAX_FUSED_ENTROPY_BITS:
        reasons.append(
            f"entropy_bits={entropy_bits}: above {MAX_FUSED_ENTROPY_BITS} the average "
            "distribution is one large matrix product, which the framework does best"
        )
    if implementation == "pallas" and entropy_bits > 1:
        reasons.append(
            f"entropy_bits={entropy_bits}: above 1 the average distribution is a matrix product "
            "of half-codes, which XLA does"
        )
    if implementation == "pallas" and entropy_bits and groups > MAX_PALLAS_ENTROPY_GROUPS:
        reasons.append(
            f"entropies of {groups} groups: above {MAX_PALLAS_ENTROPY_GROUPS} a program would go "
            "over its rows too often"
        )
    return reasons


def heuristic(problem: Problem, device: Device, implementations: tuple[str, ...]) -> Choice:
    """The fused kernels on a GPU; the plain path where only that can run, and on a TPU, whose
    lanes a row of few bits leaves mostly idle."""
    fused = next((name for name in implementations if name in ("triton", "pallas")), None)
    plain = next((name for name in implementations if name in ("torch", "xla")), None)
    if fused is None or (device.platform == "tpu" and plain is not None):
        why = "narrow rows leave TPU lanes idle" if fused else "no fused kernel can run here"
        return Choice(plain or implementations[0], None, why)
    entropy_bits = problem.flag("entropy_bits", 0)
    # Eight elements a thread: sixteen need up to 180 registers at 36 bits, and few programs fit.
    elements, warps = 1024, 4
    if fused == "pallas" and entropy_bits:
        elements, warps = 4096, 8  # each program writes sums of its own: fewer, larger ones
    tokens = min(max(elements // padded(bits_of(problem)), 16), 128)
    return Choice(fused, Config(tokens, warps), "one kernel reads each feature once")


def search_space(problem: Problem, device: Device, implementation: str) -> list[Config]:
    """Every config worth timing."""
    joint = (16, 32, 64) if problem.flag("entropy_bits", 0) > 1 else (16,)
    return [
        Config(tokens, warps, joint_tokens)
        for tokens in (16, 32, 64, 128, 256)
        if tokens * padded(bits_of(problem)) <= 8192
        for warps in (2, 4, 8)
        for joint_tokens in joint
    ]


def check_arguments(width: int, temperature: float, groups: int, entropy_bits: int | None) -> None:
    """Raise ValueError, naming the argument, for options that no implementation takes."""
    if groups < 1:
        raise ValueError(f"groups is {groups}; it must be at least 1")
    if width < 1 or width % groups:
        raise ValueError(
            f"features has {width} elements on its last axis; groups={groups} must divide it, "
            "with at least one bit for each group"
        )
    bits = width // groups
    if bits > MAX_BITS:
        raise ValueError(
            f"features has {width} elements on its last axis: {bits} bits for each of {groups} "
            f"groups, and an index holds {MAX_BITS}; use at least "
            f"groups={-(-width // MAX_BITS)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if entropy_bits is None:
        return
    if not 1 <= entropy_bits <= MAX_ENTROPY_BITS or bits % entropy_bits:
        fitting = [n for n in range(1, min(bits, MAX_ENTROPY_BITS) + 1) if bits % n == 0]
        raise ValueError(
            f"entropy_bits is {entropy_bits}; a code of {bits} bits takes "
            f"{', '.join(map(str, fitting))} (or None for no entropies)"
        )
