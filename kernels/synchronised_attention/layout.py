"""What the layout of keys and values in memory says."""

from __future__ import annotations

import torch


def is_channels_first(tensor: torch.Tensor) -> bool:
    """Whether neighbouring positions are next to each other, and features are not."""
    return tensor.stride(2) == 1 and tensor.stride(3) != 1


def is_shared(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether two tensors are the same elements in the same order."""
    return (
        keys.data_ptr() == values.data_ptr()
        and keys.shape == values.shape
        and keys.stride() == values.stride()
    )
