"""The toy op's Pallas kernels: the last block is padded, never partial."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ml_networks.kernels.core import pallas

from .spec import Config


def _elementwise(body: Any, arrays: tuple[jax.Array, ...], config: Config) -> jax.Array:
    n, block = arrays[0].shape[0], (8, config.block)
    blocks = max(1, -(-n // (8 * config.block)))
    whole = (8 * blocks, config.block)
    missing = blocks * 8 * config.block - n
    padded = [jnp.pad(array, (0, missing)).reshape(whole) for array in arrays]
    spec = pl.BlockSpec(block, lambda i: (i, 0))

    def kernel(*refs: Any) -> None:
        *sources, out = refs
        values = [source[...].astype(jnp.float32) for source in sources]
        out[...] = body(*values).astype(out.dtype)

    shape = jax.ShapeDtypeStruct(whole, arrays[0].dtype)
    launch = pallas.call(
        kernel,
        out_shape=shape,
        grid=(blocks,),
        in_specs=[spec] * len(padded),
        out_specs=spec,
        num_warps=config.num_warps,
    )
    return launch(*padded).reshape(-1)[:n]


def forward(x: jax.Array, scale: float, config: Config) -> jax.Array:
    """``scale * x^2``."""
    return _elementwise(lambda value: scale * value * value, (x,), config)


def backward(x: jax.Array, dy: jax.Array, scale: float, config: Config) -> jax.Array:
    """``2 * scale * x * dy``."""
    return _elementwise(lambda value, g: 2 * scale * value * g, (x, dy), config)
