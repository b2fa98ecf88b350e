"""Softmax and samples of categories, optimizers by name, fixed seeds."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from ml_networks._compat import UnknownOptimizerError, checked_keywords, did_you_mean

__all__ = [
    "UnknownOptimizerError",
    "get_optimizer",
    "gumbel_softmax",
    "log_softmax",
    "softmax",
    "torch_fix_seed",
]

_OPTIMIZER_MODULES = ("schedulefree", "torch.optim", "pytorch_optimizer")


def get_optimizer(
    param: Iterable[nn.Parameter] | Iterable[dict[str, Any]], name: str, **kwargs: Any
) -> torch.optim.Optimizer:
    """Build an optimizer by the name of its class.

    The name is looked up in schedulefree, ``torch.optim`` and pytorch_optimizer, in this order;
    the first and the last are optional packages, imported only to look for a name.

    Parameters
    ----------
    param
        Parameters or parameter groups, for example ``model.parameters()``.
    name
        For example ``"Adam"``, ``"AdamWScheduleFree"`` or ``"Lion"``; case matters.
    **kwargs
        Passed on to the optimizer.

    Raises
    ------
    UnknownOptimizerError
        If no installed package has the optimizer; the message suggests near names. It is a
        ValueError and, as in 0.2.6, a NotImplementedError.
    """
    known: set[str] = set()
    missing = []
    for package, module in _optimizer_modules():
        if module is None:
            missing.append(package)
            continue
        found = getattr(module, name, None)
        if _is_optimizer(found):
            optimizer: torch.optim.Optimizer = found(param, **kwargs)
            return optimizer
        known |= {key for key, value in vars(module).items() if _is_optimizer(value)}
    hint = f" (not installed: {', '.join(missing)})" if missing else ""
    raise UnknownOptimizerError(
        f"there is no optimizer {name!r}{did_you_mean(name, known)}; looked in "
        f"{', '.join(_OPTIMIZER_MODULES)}{hint}"
    )


def _optimizer_modules() -> Iterator[tuple[str, ModuleType | None]]:
    for package in _OPTIMIZER_MODULES:
        try:
            yield package, importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            yield package, None


def _is_optimizer(value: object) -> TypeGuard[type[torch.optim.Optimizer]]:
    return (
        isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    )


def torch_fix_seed(seed: int = 42) -> None:
    """Seed ``random``, NumPy and torch on every device, and make cuDNN deterministic.

    Workers of a data loader follow through :func:`ml_networks.seed_worker`. For kernels without
    a deterministic form see :func:`torch.use_deterministic_algorithms`.

    Parameters
    ----------
    seed
        0 to ``2**32 - 1``. Default 42.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (the global generator is the one to fix)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def log_softmax(inputs: Tensor, dim: int = -1, temperature: float = 1.0) -> Tensor:
    """Return the logarithm of ``softmax(inputs / temperature)`` along ``dim``."""
    return (inputs / temperature).log_softmax(dim)


def softmax(inputs: Tensor, dim: int = -1, temperature: float = 1.0) -> Tensor:
    """Return ``softmax(inputs / temperature)`` along ``dim``."""
    return (inputs / temperature).softmax(dim)


@checked_keywords()
def gumbel_softmax(
    inputs: Tensor, dim: int = -1, temperature: float = 1.0, hard: bool = True
) -> Tensor:
    r"""Sample a categorical distribution differentiably.

    With Gumbel noise :math:`g`, the soft sample is
    :math:`\operatorname{softmax}((x + g) / \tau)`, whose largest entry is a sample of
    :math:`\operatorname{softmax}(x)`.

    Parameters
    ----------
    inputs
        Logits, classes in axis ``dim``.
    temperature
        Towards 0 the soft samples become one-hot. Default 1.
    hard
        Return the one-hot vector of the largest entry, with the gradient of the soft sample
        (straight-through). Default True.

    Returns
    -------
    Tensor
        The shape and dtype of ``inputs``.

    References
    ----------
    Jang et al., "Categorical Reparameterization with Gumbel-Softmax", arXiv 1611.01144.
    """
    soft = ((inputs + gumbel_noise(inputs)) / temperature).softmax(dim).to(inputs.dtype)
    return straight_through(one_hot_of_largest(soft, dim, soft.dtype), soft) if hard else soft


def gumbel_noise(like: Tensor) -> Tensor:
    """Return float32 standard Gumbel noise of the shape of ``like``.

    Always float32: in half precision an exponential sample may round to 0, the noise to inf.
    """
    return -torch.empty_like(like, dtype=torch.float32).exponential_().log()


def one_hot_of_largest(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return the one-hot vector, along ``dim``, of the largest entry."""
    largest = x.detach().argmax(dim, keepdim=True)
    return torch.zeros_like(x, dtype=dtype).scatter(dim, largest, 1.0)


def straight_through(value: Tensor, soft: Tensor) -> Tensor:
    """Return exactly ``value``, with the gradient of ``soft``."""
    return value + (soft - soft.detach())
