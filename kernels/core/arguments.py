"""Checks that ops share on what a caller hands them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    import torch


def torch_tensors(tensors: Mapping[str, torch.Tensor | None]) -> list[Any]:
    """The tensors in the dtype of the computation; None stays. Under autocast all but float64
    ones are cast to its dtype, as torch's own matrix products do.

    Raises
    ------
    TypeError
        If one is not a floating-point tensor, or dtypes differ outside autocast.
    """
    import torch

    given = {name: value for name, value in tensors.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    first, reference = next(iter(given.items()))
    kind = reference.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return [
            value if value is None or value.dtype == torch.float64 else value.to(dtype)
            for value in tensors.values()
        ]
    for name, value in given.items():
        if value.dtype != reference.dtype:
            raise TypeError(
                f"{name} is {value.dtype} and {first} is {reference.dtype}; convert one of them"
            )
    return list(tensors.values())


def jax_arrays(arrays: Mapping[str, jax.Array | None]) -> list[Any]:
    """The arrays as JAX arrays; None stays.

    Raises
    ------
    TypeError
        If one is not a floating-point array, or dtypes differ.
    """
    import jax.numpy as jnp

    given = {name: jnp.asarray(value) for name, value in arrays.items() if value is not None}
    first, reference = next(iter(given.items()))
    for name, value in given.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name} must be a floating-point array, got {value.dtype}")
        if value.dtype != reference.dtype:
            raise TypeError(
                f"{name} is {value.dtype} and {first} is {reference.dtype}; convert one of them"
            )
    return [given.get(name) for name in arrays]
