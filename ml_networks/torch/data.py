"""Reproducible data loaders, and transforms of images and vectors."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ml_networks._compat import checked_keywords
from ml_networks._geometry import SoftmaxCode
from ml_networks.config import SoftmaxTransConfig

__all__ = ["MinMaxNormalize", "SoftmaxTransformation", "determine_loader", "seed_worker"]


def seed_worker(_worker_id: int) -> None:
    """Seed ``random`` and NumPy in a data loader's worker from its torch seed.

    torch seeds itself differently in each worker; the others would all start alike.
    """
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (the global generator is the one to fix)


def determine_loader(
    data: Dataset[Any],
    seed: int,
    batch_size: int,
    shuffle: bool = True,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 2,
) -> DataLoader[Any]:
    """Return a data loader that always delivers the same batches.

    Parameters
    ----------
    data
        The data set.
    seed
        Of the order, and of the workers' random numbers.
    batch_size
        Samples in a batch.
    shuffle
        Draw a new order each epoch. Default True.
    collate_fn
        Makes a batch of a list of samples. Default: torch's.
    num_workers
        Processes that read samples. Default 2; the batches do not depend on it, unless reading a
        sample is random.
    """
    return DataLoader(
        data,
        batch_size=batch_size,
        shuffle=shuffle,
        collate_fn=collate_fn,
        num_workers=num_workers,
        worker_init_fn=seed_worker,
        generator=torch.Generator().manual_seed(seed),
    )


@checked_keywords(min="min_val", max="max_val")
class MinMaxNormalize(nn.Module):
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
        super().__init__()
        if old_min == old_max:
            raise ValueError(f"old_min and old_max are both {old_min}; the range is empty")
        self.min_val, self.max_val = min_val, max_val
        self.old_min, self.old_max = old_min, old_max

    def extra_repr(self) -> str:
        """Return the arguments, for the printed module."""
        return f"[{self.old_min}, {self.old_max}] -> [{self.min_val}, {self.max_val}]"

    def forward(self, x: Tensor) -> Tensor:
        """Return the mapped values of a tensor of any shape; integers become floats."""
        scale = (self.max_val - self.min_val) / (self.old_max - self.old_min)
        return (x - self.old_min) * scale + self.min_val


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
        self.k = torch.linspace(cfg.min, cfg.max, cfg.vector)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the code, ``(B*, F)`` to ``(B*, get_transformed_dim(F))``."""
        return self.transform(x)

    def transform(self, x: Tensor) -> Tensor:
        """Return the code, ``(B*, F)`` to ``(B*, get_transformed_dim(F))``."""
        n_coded = x.shape[-1] - self.n_ignore
        if n_coded < 0:
            self.get_transformed_dim(x.shape[-1])
        values, ignored = x.split([n_coded, self.n_ignore], dim=-1)
        distance = values[..., None] - self.k.to(x)
        codes = (-(distance**2) / self.sigma).softmax(-1)
        return torch.cat([codes.flatten(-2), ignored], -1)

    def inverse(self, x: Tensor) -> Tensor:
        """Return the values of a code, ``(B*, get_transformed_dim(F))`` to ``(B*, F)``."""
        codes, ignored = x.split([self._coded(x.shape[-1]), self.n_ignore], dim=-1)
        values = (codes.unflatten(-1, (-1, self.vector)) * self.k.to(x)).sum(-1)
        return torch.cat([values, ignored], -1)
