"""Focal frequency loss on a GPU: one program transforms, weighs and transforms back one patch.

The DFT is taken about the centre of the patch. That turns F by a phase, which neither |F| nor the
gradient sees, and makes every basis vector even (cosine) or odd (sine) under reflection. A patch
is folded into its even-even, even-odd, odd-even and odd-odd parts (ee, eo, oe and oo), each a
quarter of its size, and each part meets one small basis on each side. See README for the costs.

Of a side n a basis has ceil(n / 2) rows: cosine row k is frequency k; sine row k is frequency k
too, except row 0, which holds frequency n / 2 of an even n. So a transform is four tables, named
by their rows and columns: cc, cs, sc and ss.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.ahead_of_time import Compilation
from ..core.device import Device, torch_device
from ..core.problem import Problem
from . import spec

PIXELS = 16
"""Rows of each quarter of the patch that are read, and written, at once."""


@triton.jit
def _split(x):
    """``x`` as what a tensor core keeps of it in TF32, and the rest."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _load_basis(table, offset, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """One basis as its two TF32 parts; the second is unused where one product is enough."""
    high = tl.load(table + offset)
    low = high
    if PRECISION == "tf32x3":
        low = tl.load(table + 2 * SIZE * SIZE + offset)
    return high, low


@triton.jit
def _from_left(high, low, x, total, PRECISION: tl.constexpr):
    """``total + basis @ x``; three TF32 products carry float32 accuracy."""
    if PRECISION == "tf32x3":
        x, rest = _split(x)
        total = tl.dot(low, x, total, input_precision="tf32")
        total = tl.dot(high, rest, total, input_precision="tf32")
        total = tl.dot(high, x, total, input_precision="tf32")
    else:
        total = tl.dot(high, x, total, input_precision=PRECISION)
    return total


@triton.jit
def _from_right(x, high, low, total, PRECISION: tl.constexpr):
    """``total + x @ basis``."""
    if PRECISION == "tf32x3":
        x, rest = _split(x)
        total = tl.dot(x, low, total, input_precision="tf32")
        total = tl.dot(rest, high, total, input_precision="tf32")
        total = tl.dot(x, high, total, input_precision="tf32")
    else:
        total = tl.dot(x, high, total, input_precision=PRECISION)
    return total


@triton.jit
def _weight(energy, reference, alpha, LINEAR: tl.constexpr, LOG: tl.constexpr):
    """|F|^alpha, or log(1 + |F|^alpha), of ``energy`` = |F / reference|^2. Without the logarithm
    it is relative to reference^alpha: then no power overflows."""
    if LOG:
        energy = energy * reference * reference
    if LINEAR:
        weight = tl.sqrt(energy)
    else:
        # The floor spares log2 a zero; the weight of F = 0 does not matter.
        weight = tl.exp2(0.5 * alpha * tl.log2(tl.maximum(energy, 1e-37)))
    if LOG:
        weight = tl.log(1.0 + weight)
    return weight


@triton.jit
def _difference(
    prediction,
    target,
    y,
    x,
    sides,
    strides,
    BELOW: tl.constexpr,
    RIGHT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Prediction minus target at the pixels (y, x), or at their mirror images below, right or
    both. Zero outside; the middle of an odd side is its own image and counts above, or left."""
    height, width = sides
    inside = (2 * y + BELOW < height)[:, None] & (2 * x + RIGHT < width)[None, :]
    if BELOW:
        y = height - 1 - y
    if RIGHT:
        x = width - 1 - x
    y = y.to(tl.int64)[:, None]
    x = x.to(tl.int64)[None, :]
    prediction += y * strides[0] + x * strides[1]
    target += y * strides[2] + x * strides[3]
    if EXACT:
        return tl.load(prediction).to(tl.float32) - tl.load(target).to(tl.float32)
    p = tl.load(prediction, inside, other=0.0)
    t = tl.load(target, inside, other=0.0)
    return p.to(tl.float32) - t.to(tl.float32)


@triton.jit
def _accumulate(
    gradient,
    y,
    x,
    sides,
    row_stride,
    value,
    factor,
    again,
    BELOW: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """Store ``factor * value`` at the pixels (y, x), or at their mirror images; ``again``: with
    what is there already added to ``value``."""
    height, width = sides
    inside = (2 * y + BELOW < height)[:, None] & (2 * x + RIGHT < width)[None, :]
    if BELOW:
        y = height - 1 - y
    if RIGHT:
        x = width - 1 - x
    gradient += y[:, None] * row_stride + x[None, :]
    value += tl.load(gradient, inside & again, other=0.0)
    tl.store(gradient, value * factor, inside)


@triton.jit
def _inverse(x):
    return tl.where(x > 0, 1.0 / tl.where(x > 0, x, 1.0), 0.0)


@triton.jit
def _energies(cc, cs, sc, ss, at_row, at_column):
    """|F|^2 from the four tables: of (k, l) and of (k, -l); then, for the corner alone, of the two
    frequencies that would have no place. In row and column 0 a sine table holds frequency n / 2,
    so there a pair of tables is one frequency, and in the corner each table is one."""
    corner = at_row & at_column
    edge = at_row | at_column
    mate = tl.where(corner, 0.0, tl.where(at_column, sc, cs))
    other = tl.where(corner, 0.0, tl.where(at_column, cs, sc))
    plus = (cc - ss) * (cc - ss) + (sc + cs) * (sc + cs)
    minus = (cc + ss) * (cc + ss) + (sc - cs) * (sc - cs)
    plus = tl.where(edge, cc * cc + mate * mate, plus)
    minus = tl.where(edge, ss * ss + other * other, minus)
    return plus, minus, tl.where(corner, sc * sc, 0.0), tl.where(corner, cs * cs, 0.0)


@triton.jit
def _weigh(cc, cs, sc, ss, plus, minus, corner_sc, corner_cs, at_row, at_column):
    """The four tables of weight * F, each frequency counted as often as the full spectrum has it,
    from the weights in the order of `_energies`."""
    corner = at_row & at_column
    edge = at_row | at_column
    cross = tl.where(edge, 0.0, 2.0 * (minus - plus))
    both = 2.0 * (plus + minus)
    count = tl.where(corner, 1.0, 2.0)
    of_sc = tl.where(edge, 2.0 * tl.where(at_column, plus, minus), both)
    of_cs = tl.where(edge, 2.0 * tl.where(at_column, minus, plus), both)
    of_sc = tl.where(corner, corner_sc, of_sc)
    of_cs = tl.where(corner, corner_cs, of_cs)
    weighted_cc = tl.where(edge, count * plus, both) * cc + cross * ss
    weighted_ss = tl.where(edge, count * minus, both) * ss + cross * cc
    return weighted_cc, of_cs * cs - cross * sc, of_sc * sc - cross * cs, weighted_ss


# One kernel for all strides: with a column stride known to be 1 the mirrored and the plain loads
# would get different layouts, and every fold a trip through shared memory.
@triton.jit(
    do_not_specialize=[
        *("alpha", "norm", "finish", "patches_per_side", "height", "width"),
        *(f"{image}_stride_{axis}" for image in ("prediction", "target") for axis in "nchw"),
    ]
)
def patch_kernel(
    prediction,
    target,
    row_basis,
    column_basis,
    losses,
    references,
    peaks,
    gradient,
    alpha,
    norm,
    finish,
    patches_per_side,
    height,
    width,
    prediction_stride_n,
    prediction_stride_c,
    prediction_stride_h,
    prediction_stride_w,
    target_stride_n,
    target_stride_c,
    target_stride_h,
    target_stride_w,
    LINEAR: tl.constexpr,
    LOG: tl.constexpr,
    GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The loss of one plane and, if GRADIENT, the inverse transform of its weight * F.

    ``finish`` divides by the plane's largest weight; without it the largest magnitude goes to
    ``peaks`` and the unit that weights are relative to goes to ``references``.
    """
    image = tl.program_id(0).to(tl.int64)
    patch = tl.program_id(1)
    channel = tl.program_id(2).to(tl.int64)
    top = (patch // patches_per_side * height).to(tl.int64)
    left = (patch % patches_per_side * width).to(tl.int64)
    prediction += image * prediction_stride_n + channel * prediction_stride_c
    prediction += top * prediction_stride_h + left * prediction_stride_w
    target += image * target_stride_n + channel * target_stride_c
    target += top * target_stride_h + left * target_stride_w
    sides = (height, width)
    strides = (
        prediction_stride_h,
        prediction_stride_w,
        target_stride_h,
        target_stride_w,
    )
    row_stride = width * patches_per_side
    if GRADIENT:
        first_pixel = (image * tl.num_programs(2) + channel) * height * patches_per_side + top
        gradient += first_pixel * row_stride + left
    row_sine = row_basis + HALF * HALF
    column_sine = column_basis + HALF * HALF
    x = tl.arange(0, HALF)
    columns = tl.arange(0, HALF)
    pixels = tl.arange(0, PIXELS)
    nothing = tl.zeros((ROWS, HALF), tl.float32)
    loss = 0.0
    peak = 0.0
    reference = 0.0

    for first_row in range(0, HALF, ROWS):
        rows = first_row + tl.arange(0, ROWS)
        ce = nothing
        co = nothing
        se = nothing
        so = nothing
        largest = tl.zeros((PIXELS, HALF), tl.float32)
        for start in range(0, HALF, PIXELS):
            y = start + pixels
            a = _difference(prediction, target, y, x, sides, strides, False, False, EXACT)
            b = _difference(prediction, target, y, x, sides, strides, False, True, EXACT)
            c = _difference(prediction, target, y, x, sides, strides, True, False, EXACT)
            d = _difference(prediction, target, y, x, sides, strides, True, True, EXACT)
            upper = tl.maximum(tl.abs(a), tl.abs(b))
            largest = tl.maximum(largest, tl.maximum(upper, tl.maximum(tl.abs(c), tl.abs(d))))
            forth = rows[:, None] * HALF + y[None, :]
            forth_high, forth_low = _load_basis(row_basis, forth, HALF, PRECISION)
            # The factor also keeps the compiler from folding after the trip to shared memory, in
            # a layout that repeats each pixel in every warp.
            ce = _from_left(forth_high, forth_low, ((a + b) + (c + d)) * norm, ce, PRECISION)
            co = _from_left(forth_high, forth_low, ((a - b) + (c - d)) * norm, co, PRECISION)
            forth_high, forth_low = _load_basis(row_sine, forth, HALF, PRECISION)
            se = _from_left(forth_high, forth_low, ((a + b) - (c + d)) * norm, se, PRECISION)
            so = _from_left(forth_high, forth_low, ((a - b) - (c - d)) * norm, so, PRECISION)
        reference = tl.max(largest)
        inverse = _inverse(reference)
        across = columns[None, :] * HALF + x[:, None]
        across_high, across_low = _load_basis(column_basis, across, HALF, PRECISION)
        cc = _from_right(ce * inverse, across_high, across_low, nothing, PRECISION)
        sc = _from_right(se * inverse, across_high, across_low, nothing, PRECISION)
        across_high, across_low = _load_basis(column_sine, across, HALF, PRECISION)
        cs = _from_right(co * inverse, across_high, across_low, nothing, PRECISION)
        ss = _from_right(so * inverse, across_high, across_low, nothing, PRECISION)

        at_row = (rows == 0)[:, None]
        at_column = (columns == 0)[None, :]
        ea, eb, ec, ed = _energies(cc, cs, sc, ss, at_row, at_column)
        highest = tl.maximum(tl.maximum(ea, eb), tl.maximum(ec, ed))
        peak = tl.maximum(peak, tl.max(highest))
        wa = _weight(ea, reference, alpha, LINEAR, LOG)
        wb = _weight(eb, reference, alpha, LINEAR, LOG)
        wc = _weight(ec, reference, alpha, LINEAR, LOG)
        wd = _weight(ed, reference, alpha, LINEAR, LOG)
        gcc, gcs, gsc, gss = _weigh(cc, cs, sc, ss, wa, wb, wc, wd, at_row, at_column)
        loss += tl.sum(cc * gcc + ss * gss + sc * gsc + cs * gcs)

        if GRADIENT:
            factor = reference * norm
            if finish:
                factor *= _inverse(_weight(peak, reference, alpha, LINEAR, LOG))
            factor = tl.where(first_row + ROWS == HALF, factor, 1.0)
            along = 4 * HALF * HALF + columns[:, None] + x[None, :] * HALF
            along_high, along_low = _load_basis(column_basis, along, HALF, PRECISION)
            ce = _from_right(gcc, along_high, along_low, nothing, PRECISION)
            se = _from_right(gsc, along_high, along_low, nothing, PRECISION)
            along_high, along_low = _load_basis(column_sine, along, HALF, PRECISION)
            co = _from_right(gcs, along_high, along_low, nothing, PRECISION)
            so = _from_right(gss, along_high, along_low, nothing, PRECISION)
            again = first_row > 0
            blank = tl.zeros((PIXELS, HALF), tl.float32)
            for start in range(0, HALF, PIXELS):
                y = start + pixels
                back = 4 * HALF * HALF + rows[None, :] + y[:, None] * HALF
                back_high, back_low = _load_basis(row_basis, back, HALF, PRECISION)
                ee = _from_left(back_high, back_low, ce, blank, PRECISION)
                eo = _from_left(back_high, back_low, co, blank, PRECISION)
                back_high, back_low = _load_basis(row_sine, back, HALF, PRECISION)
                oe = _from_left(back_high, back_low, se, blank, PRECISION)
                oo = _from_left(back_high, back_low, so, blank, PRECISION)
                _accumulate(
                    gradient,
                    y,
                    x,
                    sides,
                    row_stride,
                    (ee + eo) + (oe + oo),
                    factor,
                    again,
                    False,
                    False,
                )
                _accumulate(
                    gradient,
                    y,
                    x,
                    sides,
                    row_stride,
                    (ee - eo) + (oe - oo),
                    factor,
                    again,
                    False,
                    True,
                )
                _accumulate(
                    gradient,
                    y,
                    x,
                    sides,
                    row_stride,
                    (ee + eo) - (oe + oo),
                    factor,
                    again,
                    True,
                    False,
                )
                _accumulate(
                    gradient,
                    y,
                    x,
                    sides,
                    row_stride,
                    (ee - eo) - (oe - oo),
                    factor,
                    again,
                    True,
                    True,
                )
            tl.debug_barrier()

    loss *= reference * reference
    plane = (image * tl.num_programs(1) + patch) * tl.num_programs(2) + channel
    if finish:
        loss *= _inverse(_weight(peak, reference, alpha, LINEAR, LOG))
    else:
        tl.store(references + plane, reference)
        tl.store(peaks + plane, tl.where(loss == loss, reference * tl.sqrt(peak), loss))
    tl.store(losses + plane, loss)


@lru_cache(maxsize=64)
def _bases(side: int, size: int, split: bool, device: torch.device) -> Tensor:
    """(direction, part, cosine or sine, row, column): rows are frequencies and columns pixels of
    the half side, or the other way round for the way back; parts are what TF32 keeps of the
    values and the rest, or twice the values."""
    half = (side + 1) // 2
    frequency = np.arange(half)[:, None]
    angle = 2 * np.pi / side * frequency * (np.arange(half)[None, :] - (side - 1) / 2)
    bases = np.zeros((2, size, size))
    bases[0, :half, :half] = np.cos(angle)
    bases[1, :half, :half] = np.sin(angle)
    if side % 2 == 0:
        bases[1, 0, :half] = np.sin(np.pi * (np.arange(half) - (side - 1) / 2))
    high = bases.astype(np.float32)
    if split:
        rounded = (high.view(np.int32) + (1 << 12)) & ~((1 << 13) - 1)
        high = rounded.view(np.float32)
    parts = np.stack((high, (bases - high).astype(np.float32)))
    both = np.stack((parts, parts.swapaxes(-1, -2)))
    return torch.from_numpy(both).to(device)


def _precision(device: Device) -> str:
    """How float32 is multiplied: in float32 accuracy unless the user allows TF32."""
    if device.platform == "hip":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _constants(
    sides: tuple[int, int],
    alpha: float,
    log_matrix: bool,
    with_gradient: bool,
    config: spec.Config,
    precision: str,
) -> dict[str, object]:
    height, width = sides
    half = spec.half_side(height, width)
    return {
        "LINEAR": alpha == 1,
        "LOG": log_matrix,
        "GRADIENT": with_gradient,
        "PRECISION": precision,
        "EXACT": height == width == 2 * half,
        "HALF": half,
        "ROWS": min(config.row_frequencies, half),
        "PIXELS": PIXELS,
    }


def launch(
    prediction: Tensor,
    target: Tensor,
    alpha: float,
    patch_factor: int,
    log_matrix: bool,
    batch_matrix: bool,
    with_gradient: bool,
    config: spec.Config,
) -> tuple[Tensor, Tensor]:
    """The loss of each plane (batch, patches, channels), and the inverse transform of weight * F
    in the shape of the images, or an empty tensor."""
    batch, channels = prediction.shape[:2]
    patches = patch_factor**2
    height, width = (side // patch_factor for side in prediction.shape[2:])
    precision = _precision(torch_device(prediction.device))
    half = spec.half_side(height, width)
    bases = [_bases(n, half, precision == "tf32x3", prediction.device) for n in (height, width)]
    losses = prediction.new_empty((batch, patches, channels), dtype=torch.float32)
    references = torch.empty_like(losses) if batch_matrix else losses
    peaks = torch.empty_like(losses) if batch_matrix else losses
    shape = prediction.shape if with_gradient else (0,)
    gradient = prediction.new_empty(shape, dtype=torch.float32)
    constants = _constants((height, width), alpha, log_matrix, with_gradient, config, precision)
    # Triton launches on the current device, which need not be the images'.
    with torch.cuda.device_of(prediction):
        patch_kernel[(batch, patches, channels)](
            prediction,
            target,
            *bases,
            losses,
            references,
            peaks,
            gradient,
            alpha,
            (height * width) ** -0.5,
            int(not batch_matrix),
            patch_factor,
            height,
            width,
            *prediction.stride(),
            *target.stride(),
            **constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    if batch_matrix:
        peak = peaks.amax()
        scales = 1 / torch.log1p(peak**alpha) if log_matrix else (references / peak) ** alpha
        scales = scales.expand_as(losses).nan_to_num(nan=0.0, posinf=0.0)
        losses *= scales
        if with_gradient:
            grid = gradient.unflatten(-1, (patch_factor, width))
            grid = grid.unflatten(-3, (patch_factor, height))
            factors = scales.unflatten(1, (patch_factor, patch_factor)).permute(0, 3, 1, 2)
            grid *= factors[:, :, :, None, :, None]
    return losses, gradient


_POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def compilations(problem: Problem, config: spec.Config, device: Device) -> list[Compilation]:
    """What one call launches."""
    height, width = spec.patch_sides(problem)
    images = dict.fromkeys(("prediction", "target"), _POINTERS[problem.dtype])
    if problem.flag("ave_spectrum", False):
        images = dict.fromkeys(images, "*fp32")
    tables = ("row_basis", "column_basis", "losses", "references", "peaks", "gradient")
    strides = [f"{image}_stride_{axis}" for image in images for axis in "nchw"]
    sizes = ("patches_per_side", "height", "width", *strides)
    constants = _constants(
        (height, width),
        problem.flag("alpha", 1.0),
        problem.flag("log_matrix", False),
        problem.direction == "gradient",
        config,
        _precision(device),
    )
    return [
        Compilation(
            patch_kernel,
            {
                **images,
                **dict.fromkeys(tables, "*fp32"),
                "alpha": "fp32",
                "norm": "fp32",
                "finish": "i32",
                **dict.fromkeys(sizes, "i32"),
                **dict.fromkeys(constants, "constexpr"),
            },
            constants,
            divisible=(*images, *tables),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            programs=spec.planes(problem),
            uses_dot=True,
        )
    ]
