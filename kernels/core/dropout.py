"""Dropout without a stored mask: which elements stay is a function of a seed and their indices.

The seed and a row are two 32-bit words each, the low one first. With ``(k0, k1) =
threefry2x32(seed, row)`` (20 rounds; Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*,
SC 2011), element (row, column) has the bits

    x = column ^ k0
    x = (x ^ x >> 17) * 0xED5AD4BB + k1
    x = (x ^ x >> 11) * 0xAC4C1B51
    x = (x ^ x >> 15) * 0x31848BAB
    x =  x ^ x >> 14

in 32-bit arithmetic: a good generator once for a row, and a dozen instructions for an element. The
element stays where ``x >> 8`` is at least `threshold`, and is then divided by ``1 - dropout``.
The same bits come from NumPy (here), `core.torch_functions`, `core.jax_functions` and
`core.triton_functions`, so forward, backward and both frameworks agree on the mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
MULTIPLIERS = (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)


def threshold(dropout: float) -> int:
    """The element stays where the upper 24 bits are at least this."""
    return round(dropout * (1 << 24))


def check_probability(dropout: float) -> None:
    """Raise ValueError unless ``dropout`` is in [0, 1)."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")


def words(seed: int) -> tuple[int, int]:
    """The low and the high 32-bit word of a 64-bit seed, negative or not."""
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF


def threefry(key: tuple[int, int], first: Array, second: Array) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds of two uint32 counters."""
    keys = [np.uint32(key[0]), np.uint32(key[1]), np.uint32(key[0] ^ key[1] ^ PARITY)]
    with np.errstate(over="ignore"):
        x, y = first + keys[0], second + keys[1]
        for block in range(5):
            for rotation in ROTATIONS[block % 2]:
                x = x + y
                y = (y << np.uint32(rotation) | y >> np.uint32(32 - rotation)) ^ x
            x = x + keys[(block + 1) % 3]
            y = y + keys[(block + 2) % 3] + np.uint32(block + 1)
    return x, y


def column_bits(k0: Array, k1: Array, columns: int) -> Array:
    """32 random bits for each column, uint32, from the keys of each row."""
    shifts = [np.uint32(shift) for shift in (17, 11, 15, 14)]
    factors = [np.uint32(factor) for factor in MULTIPLIERS]
    x = np.arange(columns, dtype=np.uint32)[None, :] ^ k0[:, None]
    x = (x ^ x >> shifts[0]) * factors[0] + k1[:, None]
    x = (x ^ x >> shifts[1]) * factors[1]
    x = (x ^ x >> shifts[2]) * factors[2]
    return x ^ x >> shifts[3]


def random_bits(seed: int, rows: int, columns: int) -> Array:
    """32 random bits for each element of (rows, columns), uint32."""
    row = np.arange(rows, dtype=np.uint64)
    high = (row >> np.uint64(32)).astype(np.uint32)
    return column_bits(*threefry(words(seed), row.astype(np.uint32), high), columns)


def scale(dropout: float, seed: int, rows: int, columns: int) -> Array:
    """What each element is multiplied by: 0 or ``1 / (1 - dropout)``, float64."""
    kept = (random_bits(seed, rows, columns) >> np.uint32(8)) >= threshold(dropout)
    return np.where(kept, 1.0 / (1.0 - dropout), 0.0)
