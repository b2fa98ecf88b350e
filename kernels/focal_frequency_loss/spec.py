"""Focal frequency loss: sizes, limits, costs, cases. The meaning is in ``reference.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..core.device import Device
from ..core.problem import Case, Choice, Problem

NAME = "focal_frequency_loss"
DIMENSIONS = ("batch", "channels", "height", "width")
DIRECTIONS = ("forward", "gradient")
"""``forward``: the loss alone. ``gradient``: the loss and, from the same pass over the images, its
gradient for a cotangent of one."""

DEFAULTS = (
    ("alpha", 1.0),
    ("patch_factor", 1),
    ("log_matrix", False),
    ("batch_matrix", False),
    ("matrix", False),
)
"""The flags that a problem states where they differ from these, in this order."""

LARGEST_SIDE = 128
"""Of a patch. Beyond it a DFT by matrix product costs more than an FFT and its reads."""

LARGEST_GRID = 65535
"""What a GPU's launch grid holds on its second and third axis."""


def _images(*sizes: int) -> dict[str, int]:
    return dict(zip(DIMENSIONS, sizes, strict=True))


CASES: tuple[Case, ...] = (
    Case("square", "small", _images(2, 3, 16, 16)),
    Case("rectangle", "small", _images(2, 2, 8, 32), {"alpha": 0.5}),
    Case("alpha_0", "small", _images(1, 2, 16, 8), {"alpha": 0.0}),
    Case("alpha_2", "small", _images(1, 2, 8, 8), {"alpha": 2.0}),
    Case("log", "small", _images(2, 2, 16, 16), {"log_matrix": True}),
    Case("batch", "small", _images(3, 2, 8, 16), {"batch_matrix": True}),
    Case("average", "small", _images(3, 2, 8, 8), {"ave_spectrum": True}),
    Case("given", "small", _images(2, 2, 8, 8), {"matrix": True}),
    Case("each", "small", _images(3, 1, 8, 8), {"mean_batch": False}),
    Case("prime", "ragged", _images(2, 1, 13, 7)),
    Case("line", "ragged", _images(2, 1, 1, 10)),
    Case("odd_even", "ragged", _images(1, 3, 15, 22), {"alpha": 1.5}),
    Case(
        "patches",
        "ragged",
        _images(2, 2, 18, 10),
        {"patch_factor": 2, "log_matrix": True, "batch_matrix": True, "mean_batch": False},
    ),
    Case("above_64", "ragged", _images(1, 1, 67, 20)),
    Case("image_32", "large", _images(128, 3, 32, 32)),
    Case("image_64", "large", _images(256, 3, 64, 64)),
    Case("cpu_64", "large", _images(32, 3, 64, 64)),
    Case("image_128", "large", _images(64, 3, 128, 128)),
    Case("image_256", "large", _images(16, 3, 256, 256)),
)


@dataclass(frozen=True)
class Config:
    """How much of each side is held at once, and the launch of one program per patch. In Triton
    these are frequencies; Pallas holds all frequencies and takes so many pixels at a time."""

    row_frequencies: int
    column_frequencies: int
    num_warps: int
    num_stages: int = 2


def check_arguments(
    prediction: tuple[int, ...],
    target: tuple[int, ...],
    patch_factor: int,
    ave_spectrum: bool,
    matrix: tuple[int, ...] | None,
) -> None:
    """Refuse what does not fit. ``prediction``, ``target`` and ``matrix`` are shapes.

    Raises
    ------
    ValueError
        Naming the argument, what came and what would do.
    """
    if prediction != target:
        raise ValueError(
            f"prediction has shape {prediction} and target {target}; they must have the same"
        )
    if len(prediction) not in {4, 5}:
        raise ValueError(
            "prediction must be (batch, channels, height, width) or (batch, time, channels, "
            f"height, width), got shape {prediction}"
        )
    channels, height, width = prediction[-3:]
    if patch_factor < 1 or height % patch_factor or width % patch_factor:
        raise ValueError(
            f"patch_factor is {patch_factor}; it must divide height {height} and width {width}"
        )
    if matrix is None:
        return
    patches = (height // patch_factor, width // patch_factor)
    images = 1 if ave_spectrum else math.prod(prediction[:-3])
    spectrum = (images, patch_factor**2, channels, *patches)
    missing = len(spectrum) - len(matrix)
    fits = missing >= 0 and all(
        size in {1, whole} for size, whole in zip(matrix, spectrum[missing:], strict=True)
    )
    if not fits:
        raise ValueError(
            f"matrix has shape {matrix}; it must broadcast to the spectrum's {spectrum} (batch, "
            "patches, channels, height, width)"
        )


def patch_sides(problem: Problem) -> tuple[int, int]:
    """Height and width of one patch."""
    factor = problem.flag("patch_factor", 1)
    return problem["height"] // factor, problem["width"] // factor


def half_side(height: int, width: int) -> int:
    """Rows of the Triton kernel's bases: half of the larger side, padded to what matrix products
    take. Each side by itself would do, but oblong products are the ones that spill."""
    half = (max(height, width) + 1) // 2
    return max(16, 1 << max(half - 1, 0).bit_length())


def planes(problem: Problem) -> int:
    """Transforms to make: one for each image (or for their mean), channel and patch."""
    batch = min(problem["batch"], 1) if problem.flag("ave_spectrum", False) else problem["batch"]
    return batch * problem["channels"] * problem.flag("patch_factor", 1) ** 2


def bucket(problem: Problem) -> Problem:
    """The tuning key: sizes up to a power of two, and the flags that change the work."""
    averaged = problem.flag("ave_spectrum", False)
    batch = min(problem["batch"], 1) if averaged else problem["batch"]
    sizes = {**dict(problem.dims), "batch": batch}
    key = problem.with_dims({name: 1 << max(0, n - 1).bit_length() for name, n in sizes.items()})
    flags = ((name, problem.flag(name, usual), usual) for name, usual in DEFAULTS)
    matter = tuple((n, is_) for n, is_, usual in flags if is_ != usual and n != "alpha")
    return replace(key, flags=matter)


def _pixels(problem: Problem) -> int:
    return math.prod(problem[name] for name in DIMENSIONS)


def flops(problem: Problem) -> int:
    """Of real FFTs: half of 5 n log2(n) a transform, and the weights. The least known; the
    kernels' matrix products do more."""
    height, width = patch_sides(problem)
    transforms = 2 if problem.direction == "gradient" else 1
    size = height * width
    return int(planes(problem) * size * (2.5 * transforms * math.log2(max(size, 2)) + 8))


def bytes_moved(problem: Problem) -> int:
    """Both images read once; in direction ``gradient`` a float32 gradient written once."""
    written = 4 if problem.direction == "gradient" else 0
    return _pixels(problem) * (2 * problem.itemsize + written)


def not_supported_reasons(problem: Problem, implementation: str, device: Device) -> list[str]:
    """Why ``implementation`` cannot run ``problem`` on ``device``; empty if it can."""
    height, width = patch_sides(problem)
    reasons = []
    if max(height, width) > LARGEST_SIDE:
        reasons.append(
            f"patches of {height}x{width}: the transform is a matrix product up to "
            f"{LARGEST_SIDE} on a side and an FFT above"
        )
    if problem["height"] * problem["width"] >= 2**31:
        reasons.append("one channel of an image has 2^31 pixels or more")
    if max(problem["channels"], problem.flag("patch_factor", 1) ** 2) > LARGEST_GRID:
        reasons.append(f"an image has more than {LARGEST_GRID} channels or patches")
    if problem.flag("matrix", False):
        reasons.append("the weight is given as `matrix`; the kernels compute it")
    if problem.flag("alpha", 1.0) < 0:
        reasons.append("alpha is negative, so weights may be infinite")
    if device.platform == "cuda" and device.capability < (8, 0):
        reasons.append(f"it needs compute capability 8.0 and {device.name} is {device.target}")
    if implementation == "pallas":
        reasons += _pallas_reasons(problem, device)
    return reasons


def _pallas_reasons(problem: Problem, device: Device) -> list[str]:
    height, width = patch_sides(problem)
    if device.platform == "hip":
        return ["its Pallas kernel was never compiled for AMD GPUs"]
    compiled_for = device.platform != "cuda" or device.capability[0] in {9, 10}
    if problem.direction == "gradient" and min(height, width) > 64 and not compiled_for:
        return [f"the gradient of patches of {height}x{width} spills on {device.target}"]
    return []


def heuristic(problem: Problem, device: Device, implementations: tuple[str, ...]) -> Choice:
    """The kernel wherever it can run: it reads each image once, the plain path many times."""
    chosen = implementations[-1]
    if chosen in ("torch", "xla"):
        return Choice(chosen, None, "no kernel supports this call")
    if device.platform == "tpu" and len(implementations) > 1:
        return Choice(implementations[0], None, "the kernel was never timed on a TPU")
    config = default_config(problem, device, chosen)
    if chosen == "triton" and len(implementations) > 1 and not _fits(problem, device):
        height, width = patch_sides(problem)
        why = f"the kernel for patches of {height}x{width} spills on {device.target}"
        return Choice(implementations[0], None, why)
    return Choice(chosen, config, "one pass over the images")


def _fits(problem: Problem, device: Device) -> bool:
    """Whether the Triton kernel compiles without spills: above 64 on a side not everywhere."""
    sides = patch_sides(problem)
    if max(sides) <= 64:
        return True
    single = problem.dtype == "float32"
    if problem.direction == "forward":
        return device.target in {"sm_80", "sm_90"}
    return (device.target == "sm_80" and single) or (
        device.target == "sm_90" and (not single or sides == (128, 128))
    )


def default_config(problem: Problem, device: Device, implementation: str) -> Config:
    """The config that compiles without spills on every target (see README)."""
    height, width = patch_sides(problem)
    if implementation == "pallas":
        return Config(16, 32, 8 if max(height, width) > 64 else 4)
    columns = half_side(height, width)
    rows = 32 if device.platform == "hip" and columns > 16 else 16
    num_warps = {16: 1, 32: 8 if device.target == "sm_90" else 4, 64: 8}[columns]
    halves = problem.dtype in {"float16", "bfloat16"}
    return Config(rows, columns, num_warps, 2 if columns == 64 and halves else 1)


def search_space(problem: Problem, device: Device, implementation: str) -> list[Config]:
    """Configs worth timing; those that spill are pruned by compiling them."""
    height, width = patch_sides(problem)
    if implementation == "pallas":
        return [
            Config(rows, columns, num_warps)
            for rows in (16, 32)
            for columns in (16, 32, 64)
            for num_warps in (4, 8)
            if rows < max(height, 17) and columns < max(width, 17)
        ]
    columns = half_side(height, width)
    return [
        Config(rows, columns, num_warps, num_stages)
        for rows in (16, 32)
        for num_warps in (1, 2, 4, 8)
        for num_stages in (1, 2, 3)
        if rows <= columns and columns // 32 <= num_warps <= columns // 4
    ]
