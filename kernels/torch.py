"""The ops for PyTorch."""

from __future__ import annotations

from .binary_spherical_quantize.torch_op import BinarySphericalCodes, binary_spherical_quantize
from .focal_frequency_loss.torch_op import focal_frequency_loss

__all__ = ["BinarySphericalCodes", "binary_spherical_quantize", "focal_frequency_loss"]
