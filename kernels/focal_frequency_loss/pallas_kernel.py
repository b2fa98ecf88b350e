"""Loss and gradient of one plane in one Pallas program: DFT, weight and inverse DFT on chip.

The DFT is two matrix products with a packed real basis. A side of ``n`` pixels has
``(n + 1) // 2`` frequencies; each has a cosine and a sine row, and the sine row of frequency 0,
which would be zero, holds the Nyquist cosine (for odd ``n`` it stays zero). The rows are
orthonormal, so the inverse is the transpose. A plane gives four quadrants, cosine or sine down by
cosine or sine across, in which the frequencies (k, l) and (k, -l) are

    2 F(k, l) = cc - ss - i (sc + cs),    2 F(k, -l) = cc + ss - i (sc - cs),    k, l > 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ..core import pallas
from . import spec

Quadrants = Sequence[jax.Array]
"""Four of (rows, columns)."""


def padded_side(size: int) -> int:
    """Pixels of a side in a tile: a power of two that a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())


@cache
def packed_basis(size: int) -> np.ndarray:
    """Cosine and sine rows: (2, frequencies, pixels), zero beyond those that ``size`` has."""
    pixels = padded_side(size)
    basis = np.zeros((2, max(16, pixels // 2), pixels))
    frequency = np.arange((size + 1) // 2)[:, None]
    angle = 2 * math.pi / size * (frequency * np.arange(size) % size)
    waves = math.sqrt(2 / size) * np.stack([np.cos(angle), np.sin(angle)])
    waves[0, 0] = math.sqrt(1 / size)
    if size % 2 == 0:
        waves[1, 0] = math.sqrt(1 / size) * (-1.0) ** np.arange(size)
    basis[:, : len(frequency), :size] = waves
    return basis.astype(np.float32)


def _frequencies(quadrants: Quadrants, row_0: jax.Array, column_0: jax.Array) -> Quadrants:
    """Two pairs of real and imaginary part, of F(k, l) and of F(k, -l), times sqrt(2): a rotation
    of the quadrants. In row 0 and column 0 the quadrants are such pairs already."""
    cc, cs, sc, ss = quadrants
    edge = row_0 | column_0
    half = math.sqrt(0.5)
    return (
        jnp.where(edge, cc, half * (cc - ss)),
        jnp.where(column_0, sc, jnp.where(row_0, cs, half * (sc + cs))),
        jnp.where(column_0, cs, jnp.where(row_0, sc, half * (sc - cs))),
        jnp.where(edge, ss, half * (cc + ss)),
    )


def _quadrants(frequencies: Quadrants, row_0: jax.Array, column_0: jax.Array) -> Quadrants:
    """The inverse of `_frequencies`."""
    real, imaginary, mirror_imaginary, mirror_real = frequencies
    edge = row_0 | column_0
    half = math.sqrt(0.5)
    cs = half * (imaginary - mirror_imaginary)
    sc = half * (imaginary + mirror_imaginary)
    return (
        jnp.where(edge, real, half * (real + mirror_real)),
        jnp.where(column_0, mirror_imaginary, jnp.where(row_0, imaginary, cs)),
        jnp.where(column_0, imaginary, jnp.where(row_0, mirror_imaginary, sc)),
        jnp.where(edge, mirror_real, half * (mirror_real - real)),
    )


def _power(energy: jax.Array, exponent: float) -> jax.Array:
    if exponent == 0:
        return jnp.ones_like(energy)
    if exponent == 0.5:
        return jnp.sqrt(energy)
    return energy if exponent == 1 else jnp.exp(exponent * jnp.log(energy))


def _kernel(
    *refs: Any,
    images: int,
    sides: tuple[int, ...],
    config: spec.Config,
    alpha: float,
    log_matrix: bool,
    gradient: bool,
) -> None:
    """``refs``: one or two images, both bases; the loss, the peak and, if asked, the gradient.

    All frequencies of the plane are held, its pixels come and go by tiles in loops: that, and not
    the other way round, is what fits into registers.
    """
    image_refs, (row_basis, column_basis) = refs[:images], refs[images : images + 2]
    loss_ref, peak_ref, *gradient_refs = refs[images + 2 :]
    _, rows, height = row_basis.shape
    _, columns, width = column_basis.shape
    tile = min(config.row_frequencies, height), min(config.column_frequencies, width)

    def place(i: Any, j: Any) -> tuple[Any, jax.Array | None]:
        """Index and mask of a tile of an image."""
        at = pl.ds(i * tile[0], tile[0]), pl.ds(j * tile[1], tile[1])
        if sides == (height, width):
            return at, None
        row = _iota(tile, 0) + i * tile[0]
        column = _iota(tile, 1) + j * tile[1]
        return at, (row < sides[0]) & (column < sides[1])

    def analyse(i: Any, carry: Any) -> Any:
        """Add a band of rows to the four quadrants, and find its largest pixel."""

        def transform_columns(j: Any, carry: Any) -> Any:
            unit, cosine, sine = carry
            at, mask = place(i, j)
            pixels, *target = (
                pallas.load(ref.at[at], mask).astype(jnp.float32) for ref in image_refs
            )
            if target:
                pixels = pixels - target[0]
            cosine += pallas.dot(pixels, column_basis[0, :, at[1]], transpose_right=True)
            sine += pallas.dot(pixels, column_basis[1, :, at[1]], transpose_right=True)
            return jnp.maximum(unit, jnp.max(jnp.abs(pixels))), cosine, sine

        unit, quadrants = carry
        zeros = jnp.zeros((tile[0], columns), jnp.float32)
        unit, *across = jax.lax.fori_loop(
            0, width // tile[1], transform_columns, (unit, zeros, zeros)
        )
        down = [row_basis[half, :, pl.ds(i * tile[0], tile[0])] for half in (0, 1)]
        products = [pallas.dot(left, right) for left in down for right in across]
        return unit, tuple(map(jnp.add, quadrants, products))

    zeros = jnp.zeros((rows, columns), jnp.float32)
    unit, quadrants = jax.lax.fori_loop(0, height // tile[0], analyse, (0.0, (zeros,) * 4))
    # With the largest pixel at 1 no power of the spectrum overflows or vanishes.
    unit = jnp.where(unit > 0, unit, 1.0)

    def weigh(energy: jax.Array) -> jax.Array:
        if log_matrix:
            return jnp.log(1 + _power(energy * (unit * unit), alpha / 2))
        return _power(energy, alpha / 2)

    row_0, column_0 = _iota((rows, columns), 0) == 0, _iota((rows, columns), 1) == 0
    scaled = [quadrant * (1 / unit) for quadrant in quadrants]
    parts = _frequencies(scaled, row_0, column_0)
    squares = [part * part for part in parts]
    first, mirror = 0.5 * (squares[0] + squares[1]), 0.5 * (squares[2] + squares[3])
    # Frequency (0, 0) shares its place with the three real ones at Nyquist.
    energies = [
        jnp.where(row_0 & column_0, square, pair)
        for square, pair in zip(squares, (first, first, mirror, mirror), strict=True)
    ]
    peak = jnp.max(reduce(jnp.maximum, energies))
    highest = weigh(peak)
    scale = jnp.where(highest > 0, unit / highest, 0.0)
    weights = [weigh(energy) * scale for energy in energies]
    terms = [weight * square for weight, square in zip(weights, squares, strict=True)]
    loss = unit * jnp.sum(reduce(jnp.add, terms))
    loss_ref[...] = jnp.full(loss_ref.shape, loss, jnp.float32)
    # In units of the images; NaN where they are, whatever the maximum made of it.
    peak = jnp.where(loss == loss, jnp.sqrt(peak) * unit, loss)
    peak_ref[...] = jnp.full(peak_ref.shape, peak, jnp.float32)
    if not gradient:
        return

    weighted = [2 * weight * part for weight, part in zip(weights, parts, strict=True)]
    cc, cs, sc, ss = _quadrants(weighted, row_0, column_0)

    def synthesise(i: Any, carry: None) -> None:
        """Write a band of rows of the gradient."""
        down = [row_basis[half, :, pl.ds(i * tile[0], tile[0])] for half in (0, 1)]
        cosine = pallas.dot(down[0], cc, transpose_left=True)
        cosine += pallas.dot(down[1], sc, transpose_left=True)
        sine = pallas.dot(down[0], cs, transpose_left=True)
        sine += pallas.dot(down[1], ss, transpose_left=True)

        def write(j: Any, carry: None) -> None:
            at, mask = place(i, j)
            image = pallas.dot(cosine, column_basis[0, :, at[1]])
            image += pallas.dot(sine, column_basis[1, :, at[1]])
            pallas.store(gradient_refs[0].at[at], image, mask)

        jax.lax.fori_loop(0, width // tile[1], write, None)

    jax.lax.fori_loop(0, height // tile[0], synthesise, None)


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def transform(
    images: tuple[jax.Array, ...],
    *,
    alpha: float,
    log_matrix: bool,
    gradient: bool,
    config: spec.Config,
) -> tuple[jax.Array, ...]:
    """Analyse planes, each weighed by its own maximum.

    Parameters
    ----------
    images
        Predictions and targets, or their difference: one or two of (planes, height, width).

    Returns
    -------
    tuple of Array
        In float32. Per plane the loss and the largest magnitude of F, (planes,); with ``gradient``
        also the gradient of the loss, (planes, height, width).
    """
    planes, *sides = images[0].shape
    bases = [jnp.asarray(packed_basis(side)) for side in sides]
    tile = tuple(basis.shape[-1] for basis in bases)
    if not pallas.masks_blocks():
        padding = [(0, 0), *((0, whole - side) for whole, side in zip(tile, sides, strict=True))]
        images = tuple(jnp.pad(image, padding) for image in images)
    _, *stored = images[0].shape
    plane = pl.BlockSpec((None, *tile), lambda index: (index, 0, 0))
    number = pl.BlockSpec((1, 1, 1), lambda index: (index, 0, 0))
    whole = [pl.BlockSpec(basis.shape, lambda index: (0, 0, 0)) for basis in bases]
    numbers = jax.ShapeDtypeStruct((planes, 1, 1), jnp.float32)
    out_specs, out_shape = [number, number], [numbers, numbers]
    if gradient:
        out_specs.append(plane)
        out_shape.append(jax.ShapeDtypeStruct((planes, *stored), jnp.float32))
    loss, peak, *result = pallas.call(
        partial(
            _kernel,
            images=len(images),
            sides=tuple(stored),
            config=config,
            alpha=alpha,
            log_matrix=log_matrix,
            gradient=gradient,
        ),
        grid=(planes,),
        in_specs=[plane] * len(images) + whole,
        out_specs=out_specs,
        out_shape=out_shape,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        name="focal_frequency_loss",
    )(*images, *bases)
    return loss[:, 0, 0], peak[:, 0, 0], *(part[:, : sides[0], : sides[1]] for part in result)
