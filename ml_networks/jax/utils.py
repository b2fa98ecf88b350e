"""Softmax and samples of categories, optimizers by name, fixed seeds, parameter counts."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ml_networks._compat import UnknownOptimizerError, checked_keywords, did_you_mean

__all__ = [
    "UnknownOptimizerError",
    "count_nnx_params",
    "get_optimizer",
    "gumbel_softmax",
    "jax_fix_seed",
    "log_softmax",
    "softmax",
]

Array = jax.Array

_TORCH_NAMES = {
    "Adagrad": "adagrad",
    "Adam": "adam",
    "AdamW": "adamw",
    "Lamb": "lamb",
    "Lars": "lars",
    "Lion": "lion",
    "NAdam": "nadam",
    "RAdam": "radam",
    "RMSprop": "rmsprop",
    "SGD": "sgd",
}
_TORCH_DEFAULTS: dict[str, dict[str, Any]] = {
    "Adagrad": {"learning_rate": 1e-2, "initial_accumulator_value": 0.0, "eps": 1e-10},
    "Adam": {"learning_rate": 1e-3},
    "AdamW": {"learning_rate": 1e-3, "weight_decay": 1e-2},
    "RMSprop": {"learning_rate": 1e-2, "decay": 0.99, "eps": 1e-8, "eps_in_sqrt": False},
    "SGD": {"learning_rate": 1e-3},
}
_DECOUPLED = ("AdamW", "Lamb", "Lars", "Lion")


def get_optimizer(name: str, **kwargs: Any) -> Any:
    """Build an optax optimizer by the name of its torch class, or by its optax name.

    Torch's arguments are understood for torch's names: ``lr``, ``betas``, ``alpha`` (RMSprop's
    decay), ``nesterov``, and ``weight_decay``, which for all but AdamW, Lamb, Lars and Lion is
    added to the gradient, as in torch. Optax's own arguments work too.

    Parameters
    ----------
    name
        For example ``"Adam"``, ``"AdamW"``, ``"SGD"``, ``"RMSprop"``, or ``"adabelief"``.
    **kwargs
        Arguments of the optimizer.

    Returns
    -------
    optax.GradientTransformation
        For ``nnx.Optimizer(model, optimizer, wrt=nnx.Param)``.

    Raises
    ------
    UnknownOptimizerError
        If optax has no such optimizer; the message suggests the nearest. It is a ValueError and,
        as in 0.2.6, a NotImplementedError.
    TypeError
        For an argument that the optimizer does not take.
    """
    import optax

    known = {
        key: value
        for key, value in vars(optax).items()
        if inspect.isfunction(value) and "learning_rate" in inspect.signature(value).parameters
    }
    optimizer = known.get(_TORCH_NAMES.get(name, name))
    if optimizer is None:
        hint = did_you_mean(name, _TORCH_NAMES) or did_you_mean(name, known)
        raise UnknownOptimizerError(f"there is no optimizer {name!r}{hint}; looked in optax")
    arguments = _translated(name, kwargs)
    if name not in _TORCH_NAMES or name in _DECOUPLED or "weight_decay" not in arguments:
        return _call(name, optimizer, arguments)
    weight_decay = arguments.pop("weight_decay")
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, _call(name, optimizer, arguments))


def _translated(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    arguments = {**_TORCH_DEFAULTS.get(name, {}), **kwargs}
    if "lr" in arguments:
        arguments["learning_rate"] = arguments.pop("lr")
    if "betas" in arguments:
        arguments["b1"], arguments["b2"] = arguments.pop("betas")
    if name == "RMSprop" and "alpha" in arguments:
        arguments["decay"] = arguments.pop("alpha")
    return arguments


def _call(name: str, optimizer: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    parameters = inspect.signature(optimizer).parameters
    for argument in arguments:
        if argument not in parameters:
            raise TypeError(
                f"{name} got an unexpected argument {argument!r}"
                f"{did_you_mean(argument, (*parameters, 'lr', 'betas', 'weight_decay'))}"
            )
    return optimizer(**arguments)


def jax_fix_seed(seed: int = 42) -> Array:
    """Seed ``random`` and NumPy, and return a JAX key of the same seed.

    Parameters
    ----------
    seed
        0 to ``2**32 - 1``. Default 42.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (the global generator is the one to fix)
    return jax.random.key(seed)


def count_nnx_params(model: nnx.Module) -> tuple[int, int]:
    """Return the number of parameters of a model, and of those that train.

    A frozen parameter (:class:`ml_networks.jax.base.FrozenParam`) counts in the first alone.
    """
    from ml_networks.jax.base import FrozenParam

    def count(kind: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, kind)))

    trainable = count(nnx.Param)
    return trainable + count(FrozenParam), trainable


@checked_keywords(dim="axis")
def log_softmax(inputs: Array, axis: int = -1, temperature: float = 1.0) -> Array:
    """Return the logarithm of ``softmax(inputs / temperature)`` along ``axis``."""
    return jax.nn.log_softmax(inputs / temperature, axis)


@checked_keywords(dim="axis")
def softmax(inputs: Array, axis: int = -1, temperature: float = 1.0) -> Array:
    """Return ``softmax(inputs / temperature)`` along ``axis``."""
    return jax.nn.softmax(inputs / temperature, axis)


@checked_keywords(dim="axis")
def gumbel_softmax(
    inputs: Array, key: Array, axis: int = -1, temperature: float = 1.0, hard: bool = True
) -> Array:
    r"""Sample a categorical distribution differentiably.

    With Gumbel noise :math:`g`, the soft sample is
    :math:`\operatorname{softmax}((x + g) / \tau)`, whose largest entry is a sample of
    :math:`\operatorname{softmax}(x)`.

    Parameters
    ----------
    inputs
        Logits, classes in axis ``axis``.
    key
        A ``jax.random`` key.
    axis
        Default -1. ``dim`` is another name.
    temperature
        Towards 0 the soft samples become one-hot. Default 1.
    hard
        Return the one-hot vector of the largest entry, with the gradient of the soft sample
        (straight-through). Default True.

    Returns
    -------
    Array
        The shape and dtype of ``inputs``.

    References
    ----------
    Jang et al., "Categorical Reparameterization with Gumbel-Softmax", arXiv 1611.01144.
    """
    soft = jax.nn.softmax((inputs + gumbel_noise(key, inputs)) / temperature, axis)
    soft = soft.astype(inputs.dtype)
    return straight_through(one_hot_of_largest(soft, axis, soft.dtype), soft) if hard else soft


def gumbel_noise(key: Array, like: Array) -> Array:
    """Return float32 standard Gumbel noise of the shape of ``like``.

    Always float32: in half precision the noise has few values.
    """
    return jax.random.gumbel(key, like.shape, jnp.float32)


def one_hot_of_largest(x: Array, axis: int, dtype: jnp.dtype) -> Array:
    """Return the one-hot vector, along ``axis``, of the largest entry."""
    return jax.nn.one_hot(x.argmax(axis), x.shape[axis], axis=axis % x.ndim, dtype=dtype)


def straight_through(value: Array, soft: Array) -> Array:
    """Return exactly ``value``, with the gradient of ``soft``."""
    return value + (soft - jax.lax.stop_gradient(soft))
