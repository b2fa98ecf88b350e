"""Focal frequency loss in NumPy float64: what the op means (Jiang et al., arXiv:2012.12821)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.problem import Case

Array = np.ndarray


def make_inputs(case: Case, seed: int) -> dict[str, Array]:
    """Images of the case's shape, and a weight matrix where its flags ask for one."""
    generator = np.random.default_rng(seed)
    shape = tuple(case.dims[name] for name in ("batch", "channels", "height", "width"))
    inputs = {name: generator.standard_normal(shape) for name in ("prediction", "target")}
    flags: dict[str, Any] = dict(case.flags)
    if flags.get("matrix"):
        factor = flags.get("patch_factor", 1)
        patch = (shape[1], shape[2] // factor, shape[3] // factor)
        inputs["matrix"] = generator.uniform(size=patch)
    return inputs


def forward(inputs: dict[str, Array], **flags: Any) -> dict[str, Array]:
    """The loss of ``prediction`` against ``target``: a number, or one per image and patch."""
    spectrum, weight, scale = _analyse(inputs, flags)
    losses = flags.get("loss_weight", 1.0) * (weight * np.abs(spectrum) ** 2).sum(axis=(2, 3, 4))
    return {"loss": np.asarray(losses.sum() * scale) if _mean(flags) else losses}


def backward(
    inputs: dict[str, Array], cotangents: dict[str, Array], **flags: Any
) -> dict[str, Array]:
    """The gradient of both images; the weight is a constant, so that of the target is the other's
    negative.
    """
    spectrum, weight, scale = _analyse(inputs, flags)
    cotangent = np.asarray(cotangents["loss"], np.float64) * flags.get("loss_weight", 1.0)
    cotangent = cotangent * scale if _mean(flags) else cotangent[:, :, None, None, None]
    # The ortho inverse transform is the adjoint of the ortho transform; a weight that is not
    # even leaves an imaginary part that belongs to no real image.
    patches = 2 * np.fft.ifft2(cotangent * weight * spectrum, norm="ortho").real
    gradient = _join(patches, flags.get("patch_factor", 1))
    if flags.get("ave_spectrum", False):
        batch = inputs["prediction"].shape[0]
        gradient = np.broadcast_to(gradient, (batch, *gradient.shape[1:])) / max(batch, 1)
    return {"prediction": gradient, "target": -gradient}


def _mean(flags: dict[str, Any]) -> bool:
    return bool(flags.get("mean_batch", True))


def _analyse(inputs: dict[str, Array], flags: dict[str, Any]) -> tuple[Array, Array, float]:
    """Spectrum and weight, (batch, patches, channels, height, width); 1 / (batch * patches)."""
    difference = inputs["prediction"].astype(np.float64) - inputs["target"].astype(np.float64)
    if flags.get("ave_spectrum", False):
        difference = difference.sum(axis=0, keepdims=True) / max(difference.shape[0], 1)
    patches = _cut(difference, flags.get("patch_factor", 1))
    spectrum = np.fft.fft2(patches, norm="ortho") if patches.size else patches.astype(complex)
    if "matrix" in inputs:
        weight = np.broadcast_to(inputs["matrix"].astype(np.float64), spectrum.shape)
    else:
        weight = _focal_weight(np.abs(spectrum), flags)
    return spectrum, weight, 1.0 / max(spectrum.shape[0] * spectrum.shape[1], 1)


def _focal_weight(magnitude: Array, flags: dict[str, Any]) -> Array:
    """|F|^alpha, or log(|F|^alpha + 1), over its maximum in the plane or the batch; 0/0 is 0."""
    weight = magnitude ** flags.get("alpha", 1.0)
    if flags.get("log_matrix", False):
        weight = np.log(weight + 1)
    axes = None if flags.get("batch_matrix", False) else (3, 4)
    peak = weight.max(axis=axes, keepdims=True, initial=0.0)
    with np.errstate(invalid="ignore"):
        weight = weight / peak
    return np.clip(np.nan_to_num(weight, nan=0.0), 0.0, 1.0)


def _cut(images: Array, factor: int) -> Array:
    """(batch, channels, height, width) into (batch, factor^2, channels, height/f, width/f)."""
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, factor, height // factor, factor, width // factor)
    return grid.transpose(0, 2, 4, 1, 3, 5).reshape(
        batch, factor**2, channels, height // factor, width // factor
    )


def _join(patches: Array, factor: int) -> Array:
    """The inverse of `_cut`."""
    batch, _, channels, height, width = patches.shape
    grid = patches.reshape(batch, factor, factor, channels, height, width)
    return grid.transpose(0, 3, 1, 4, 2, 5).reshape(
        batch, channels, height * factor, width * factor
    )
