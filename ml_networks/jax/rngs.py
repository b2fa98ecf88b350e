"""What ``rngs=`` takes."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

RngsLike: TypeAlias = nnx.Rngs | jax.Array


def as_rngs(rngs: RngsLike | None) -> nnx.Rngs:
    """``rngs`` as an ``nnx.Rngs``.

    Parameters
    ----------
    rngs
        An ``nnx.Rngs`` (used as it is, so modules that share one draw from one stream), a key of
        ``jax.random.key`` or a legacy ``jax.random.PRNGKey``.

    Raises
    ------
    TypeError
        If it is None or anything else, or an array that is not one key.
    """
    if isinstance(rngs, nnx.Rngs):
        return rngs
    wanted = "give rngs=nnx.Rngs(0), rngs=jax.random.key(0) or rngs=jax.random.PRNGKey(0)"
    if rngs is None:
        raise TypeError(f"rngs is missing: parameters are drawn from it; {wanted}")
    if not isinstance(rngs, jax.Array):
        raise TypeError(f"rngs is a {type(rngs).__name__}; {wanted}")
    if jnp.issubdtype(rngs.dtype, jax.dtypes.prng_key):
        if rngs.ndim:
            raise TypeError(f"rngs holds keys of shape {rngs.shape}, not one key; {wanted}")
        return nnx.Rngs(rngs)
    if rngs.dtype != jnp.uint32 or rngs.ndim != 1:
        raise TypeError(f"rngs is an array {rngs.dtype}{list(rngs.shape)}, not a key; {wanted}")
    return nnx.Rngs(jax.random.wrap_key_data(rngs))
