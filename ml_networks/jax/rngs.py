"""What ``rngs=`` takes."""

from __future__ import annotations

import weakref
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

RngsLike: TypeAlias = nnx.Rngs | jax.Array

# Legacy keys that modules were made from, by id, as long as they live.
_USED: dict[int, weakref.ref[jax.Array]] = {}


def as_rngs(rngs: RngsLike | None, *, draws_parameters: bool = True) -> nnx.Rngs:
    """``rngs`` as an ``nnx.Rngs``.

    Parameters
    ----------
    rngs
        An ``nnx.Rngs`` (used as it is, so modules that share one draw from one stream), a key of
        ``jax.random.key`` or a legacy ``jax.random.PRNGKey``. JAX's own check of reuse
        (``jax_debug_key_reuse``) does not see legacy keys, so one makes one module here.
    draws_parameters
        False where a key that has made a module may be used again: its numbers are no initial
        values. Default True.

    Raises
    ------
    jax.errors.KeyReuseError
        For a legacy key that another module was made from: their initial values would be the
        same numbers.
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
    if draws_parameters:
        _use_once(rngs)
    return nnx.Rngs(jax.random.wrap_key_data(rngs))


def _use_once(key: jax.Array) -> None:
    """Raise KeyReuseError if this very array has made a module before."""
    name = id(key)
    if name in _USED and _USED[name]() is key:
        raise jax.errors.KeyReuseError(
            "this PRNGKey has made a module before, and another one would start from the same "
            "numbers: split it, `first, second = jax.random.split(key)`, or share one stream, "
            "`rngs = nnx.Rngs(key)`; for a copy of the module use nnx.clone"
        )
    _USED[name] = weakref.ref(key, lambda _: _USED.pop(name, None))
