"""What ops share in taking their arguments and in being differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

    values = list(tensors.values())
    dtypes: dict[torch.dtype, str] = {}
    for name, value in tensors.items():
        if value is None or (isinstance(value, torch.Tensor) and value.dtype in dtypes):
            continue
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
        dtypes[value.dtype] = name
    kind = next(value.device.type for value in values if value is not None)
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return [
            value if value is None or value.dtype == torch.float64 else value.to(dtype)
            for value in values
        ]
    if len(dtypes) > 1:
        (dtype, first), (other, name), *_ = dtypes.items()
        raise TypeError(f"{name} is {other} and {first} is {dtype}; convert one of them")
    return values


def check_result(name: str, value: torch.Tensor | None) -> None:
    """Raise ValueError unless a kernel can write rows of ``value``: columns of stride 1."""
    if value is not None and value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name} has strides {tuple(value.stride())}; its last axis must have stride 1"
        )


def plain_vjp(
    function: Callable[..., Sequence[torch.Tensor]],
    inputs: Sequence[torch.Tensor | None],
    cotangents: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """The gradient of each input of a function made of ordinary torch operations, itself
    differentiable where autograd records: what a custom op's backward op has for its own
    derivative."""
    import torch

    def leaf(value: torch.Tensor | None) -> torch.Tensor | None:
        """A view, so that no path leads from one input to another; one of a graph stays so."""
        if value is None or not value.requires_grad:
            return None if value is None else value.detach().requires_grad_()
        return value.view_as(value)

    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [leaf(value) for value in inputs]
        pairs = [
            (output, cotangent)
            for output, cotangent in zip(function(*leaves), cotangents, strict=True)
            if cotangent is not None and output.requires_grad
        ]
        found = iter(
            torch.autograd.grad(
                [output for output, _ in pairs],
                [value for value in leaves if value is not None],
                [cotangent for _, cotangent in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return [None if value is None else next(found) for value in leaves]


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
