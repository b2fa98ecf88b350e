"""Batches of NumPy arrays, and transforms of images and vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ml_networks._compat import checked_keywords
from ml_networks._geometry import SoftmaxCode
from ml_networks.config import SoftmaxTransConfig

__all__ = ["MinMaxNormalize", "SoftmaxTransformation", "numpy_collate"]

Array = jax.Array


def numpy_collate(batch: Sequence[Any]) -> Any:
    """Stack the samples of a batch: the ``collate_fn`` of a torch ``DataLoader`` for JAX.

    Parameters
    ----------
    batch
        Samples of one structure: nested tuples, lists and dicts of numbers and arrays.

    Returns
    -------
    Any
        The structure of a sample, its leaves NumPy arrays (batch, ...).
    """
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *batch)


@checked_keywords(min="min_val", max="max_val")
class MinMaxNormalize:
    """Map the range ``[old_min, old_max]`` linearly to ``[min_val, max_val]``.

    Parameters
    ----------
    min_val, max_val
        The new range; ``min`` and ``max`` are other names.
    old_min, old_max
        The range of the input. Default 0 and 1.

    Raises
    ------
    ValueError
        If the old range is empty.
    """

    def __init__(
        self, min_val: float, max_val: float, old_min: float = 0.0, old_max: float = 1.0
    ) -> None:
        if old_min == old_max:
            raise ValueError(f"old_min and old_max are both {old_min}; the range is empty")
        self.min_val, self.max_val = min_val, max_val
        self.old_min, self.old_max = old_min, old_max

    def __repr__(self) -> str:
        return (
            f"MinMaxNormalize([{self.old_min}, {self.old_max}] -> "
            f"[{self.min_val}, {self.max_val}])"
        )

    def __call__(self, x: Array) -> Array:
        """Return the mapped values of an array of any shape; integers become floats."""
        scale = (self.max_val - self.min_val) / (self.old_max - self.old_min)
        return (x - float(self.old_min)) * scale + self.min_val


class SoftmaxTransformation(SoftmaxCode):
    r"""A soft one-hot code of continuous values, and its inverse.

    Each value :math:`x` becomes ``vector`` numbers
    :math:`\operatorname{softmax}_i(-(x - k_i)^2 / \sigma)`, with the centres :math:`k_i` evenly
    spaced in ``[min, max]``; the inverse is :math:`\sum_i k_i p_i`.

    Parameters
    ----------
    cfg
        Number of bins, width, range, and how many of the last features stay as they are.
    """

    def __init__(self, cfg: SoftmaxTransConfig) -> None:
        super().__init__(cfg)
        self.k = np.linspace(cfg.min, cfg.max, cfg.vector)

    def __call__(self, x: Array) -> Array:
        """Return the code, ``(B*, F)`` to ``(B*, get_transformed_dim(F))``."""
        return self.transform(x)

    def transform(self, x: Array) -> Array:
        """Return the code, ``(B*, F)`` to ``(B*, get_transformed_dim(F))``."""
        features = self.get_transformed_dim(x.shape[-1])
        values, ignored = jnp.split(x, [x.shape[-1] - self.n_ignore], -1)
        distance = values[..., None] - self.k.astype(x.dtype)
        codes = jax.nn.softmax(-(distance**2) / self.sigma, -1)
        codes = codes.reshape(*x.shape[:-1], features - self.n_ignore)
        return jnp.concatenate([codes, ignored], -1)

    def inverse(self, x: Array) -> Array:
        """Return the values of a code, ``(B*, get_transformed_dim(F))`` to ``(B*, F)``."""
        codes, ignored = jnp.split(x, [self._coded(x.shape[-1])], -1)
        bins = codes.reshape(*x.shape[:-1], codes.shape[-1] // self.vector, self.vector)
        return jnp.concatenate([(bins * self.k.astype(x.dtype)).sum(-1), ignored], -1)
