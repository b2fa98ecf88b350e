"""Focal frequency loss for JAX: the public function, the plain path, the derivatives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..core import dispatch, usage
from ..core.device import Device, jax_device
from ..core.problem import Problem
from ..core.registry import Binding
from . import pallas_kernel, spec


class Call(NamedTuple):
    """What a call fixes beside its arrays: hashable, so it can be static."""

    problem: Problem
    implementation: str | None

    def decide(self, direction: str) -> dispatch.Decision:
        """Who runs ``direction`` on the device in use."""
        problem = replace(self.problem, direction=direction)
        return dispatch.decide(problem, jax_device(), BINDING, self.implementation)


Images = tuple[Array, ...]
"""Prediction and target, or their difference alone: (images, patches, channels, height, width)."""


def focal_frequency_loss(
    prediction: Array,
    target: Array,
    *,
    loss_weight: float | Array = 1.0,
    alpha: float = 1.0,
    patch_factor: int = 1,
    ave_spectrum: bool = False,
    log_matrix: bool = False,
    batch_matrix: bool = False,
    matrix: Array | None = None,
    mean_batch: bool = True,
    implementation: str | None = None,
) -> Array:
    r"""Focal frequency loss: squared errors of the spectrum, weighted by themselves.

    With :math:`F` the orthonormal 2-D DFT of one patch of one channel of ``prediction - target``:

    .. math::

        w = \frac{|F|^\alpha}{\max_{k, l} |F|^\alpha}, \qquad
        L = \text{loss\_weight} \cdot \frac{1}{N P} \sum_{n, p, c, k, l} w \, |F|^2

    over N images and P = ``patch_factor`` ** 2 patches. The weight is a constant: no gradient
    flows through it. Where the maximum is 0, so is the weight.

    Parameters
    ----------
    prediction, target
        Images (N, C, H, W), or (B, T, C, H, W) with N = B T; float32, bfloat16, float16 or
        float64.
    loss_weight
        Factor of the loss; may be traced.
    alpha
        Exponent of the weight, a Python number: 0 weighs all frequencies alike.
    patch_factor
        Cuts each image into that many patches down and across, each with its own spectrum.
    ave_spectrum
        Take the loss of the spectrum averaged over the N images.
    log_matrix
        Use :math:`\log(|F|^\alpha + 1)` in place of :math:`|F|^\alpha`.
    batch_matrix
        Take the maximum over everything instead of over the plane.
    matrix
        Weights to use instead, for example (C, H, W); anything that broadcasts to (N, P, C, H / f,
        W / f) with f = ``patch_factor``. They get no gradient.
    mean_batch
        False returns one loss per image and patch.
    implementation
        ``"xla"``, ``"pallas"``, or None to let dispatch choose.

    Returns
    -------
    Array
        A number, or with ``mean_batch=False`` (N, P), for 5-D images (B, T) with one patch and
        (B, T, P) with more; B = T = N = 1 under ``ave_spectrum``. float32, or float64 if either
        image is.

    Raises
    ------
    TypeError
        If an argument is not a floating-point array.
    ValueError
        For shapes that differ, another number of axes, or a ``patch_factor`` that does not divide
        the sides.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    Loss and gradient come from one computation. Derivatives of the gradient work by reverse mode,
    with the weight held constant. NaN or infinity in an image makes the loss of its planes and
    their gradient NaN. An empty batch has loss 0.

    Jiang, Dai, Wu, Loy, "Focal Frequency Loss for Image Reconstruction and Synthesis",
    arXiv 2012.12821.
    """
    prediction = _floating("prediction", prediction)
    target = _floating("target", target)
    matrix = None if matrix is None else _floating("matrix", matrix)
    spec.check_arguments(
        prediction.shape,
        target.shape,
        patch_factor,
        ave_spectrum,
        None if matrix is None else matrix.shape,
    )
    *leading, channels, height, width = prediction.shape
    batch = math.prod(leading)
    images: Images = tuple(
        image.reshape(batch, 1, channels, height, width) for image in (prediction, target)
    )
    if ave_spectrum or patch_factor > 1:
        images = (_difference(images),)
    if ave_spectrum:
        images = (images[0].sum(0, keepdims=True) / max(batch, 1),)
    if patch_factor > 1:
        images = (_cut(images[0], patch_factor),)
    flags = {
        "alpha": float(alpha),
        "patch_factor": patch_factor,
        "log_matrix": log_matrix,
        "batch_matrix": batch_matrix,
        "matrix": matrix is not None,
    }
    sizes = images[0].shape[0], channels, height, width
    problem = Problem(
        spec.NAME,
        tuple(zip(spec.DIMENSIONS, sizes, strict=True)),
        jnp.promote_types(prediction.dtype, target.dtype).name,
        tuple((name, flags[name]) for name, default in spec.DEFAULTS if flags[name] != default),
    )
    losses = loss_weight * _losses(images, matrix, Call(problem, implementation))
    if mean_batch:
        return losses.sum() / max(losses.size, 1)
    if len(leading) == 1:
        return losses
    times = (1, 1) if ave_spectrum else tuple(leading)
    return losses.reshape(times if patch_factor == 1 else (*times, -1))


def _floating(name: str, array: Any) -> Array:
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point array, got {array.dtype}")
    return array


def _difference(images: Images) -> Array:
    """In the dtype of the computation."""
    double = any(image.dtype == jnp.float64 for image in images)
    first, *second = (image.astype(jnp.float64 if double else jnp.float32) for image in images)
    return first - second[0] if second else first


def _cut(images: Array, factor: int) -> Array:
    """(images, 1, channels, height, width) into patches: (images, factor ** 2, channels, ...)."""
    batch, _, channels, height, width = images.shape
    patch = height // factor, width // factor
    grid = images.reshape(batch, channels, factor, patch[0], factor, patch[1])
    return grid.transpose(0, 2, 4, 1, 3, 5).reshape(batch, factor**2, channels, *patch)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _losses(images: Images, matrix: Array | None, call: Call) -> Array:
    """The loss of every image and patch, (images, patches)."""
    decision = call.decide("forward")
    with usage.timed(decision):
        if _is_plain(decision, images):
            return _plain(images, matrix, call.problem, gradient=False)[0]
        return _fused(images, call.problem, decision.config, jax_device(), gradient=False)[0]


def _losses_forward(images: Images, matrix: Array | None, call: Call) -> tuple[Array, Any]:
    decision = call.decide("gradient")
    with usage.timed(decision):
        if _is_plain(decision, images):
            losses, gradient = _plain(images, matrix, call.problem, gradient=True)
        else:
            losses, gradient = _fused_gradient(images, call, decision.config)
    return losses, (gradient, [jnp.zeros((), image.dtype) for image in images])


def _losses_backward(call: Call, residuals: Any, of_losses: Array) -> tuple[Images, None]:
    gradient, likes = residuals
    scaled = gradient * of_losses[:, :, None, None, None]
    signs = (scaled, -scaled)
    return tuple(part.astype(like.dtype) for part, like in zip(signs, likes, strict=False)), None


_losses.defvjp(_losses_forward, _losses_backward)


def _is_plain(decision: dispatch.Decision, images: Images) -> bool:
    return decision.implementation == BINDING.plain or not images[0].size


@partial(jax.jit, static_argnames=("problem", "gradient"))
def _plain(
    images: Images, matrix: Array | None, problem: Problem, *, gradient: bool
) -> tuple[Array, Array]:
    """Losses and, if asked, their gradients in ordinary JAX operations. Half of the spectrum of a
    real image says it all."""
    difference = _difference(images)
    height, width = difference.shape[-2:]
    if not difference.size:
        return difference.sum((2, 3, 4)), difference
    spectrum = jnp.fft.rfft2(difference, norm="ortho")
    energy = spectrum.real**2 + spectrum.imag**2
    if matrix is None:
        weight = _focal_weight(energy, problem)
    else:
        weight = _given_weight(matrix, difference)
    weight = jax.lax.stop_gradient(weight)
    occurrences = np.full(width // 2 + 1, 2.0)
    occurrences[0] = 1.0
    if width % 2 == 0:
        occurrences[-1] = 1.0
    losses = (weight * energy * occurrences.astype(energy.dtype)).sum((2, 3, 4))
    if not gradient:
        return losses, difference
    return losses, 2 * jnp.fft.irfft2(weight * spectrum, s=(height, width), norm="ortho")


def _focal_weight(energy: Array, problem: Problem) -> Array:
    weight = energy ** (problem.flag("alpha", 1.0) / 2)
    if problem.flag("log_matrix"):
        weight = jnp.log1p(weight)
    axes = None if problem.flag("batch_matrix") else (3, 4)
    weight = weight / weight.max(axes, keepdims=True)
    return jnp.where(jnp.isnan(weight), 0.0, jnp.clip(weight, 0.0, 1.0))


def _given_weight(matrix: Array, images: Array) -> Array:
    """The even part of ``matrix``, on half of the spectrum: the odd part meets energies that are
    even, and sums to nothing."""
    sides = images.shape[-2:]
    matrix = matrix.astype(images.dtype).reshape((1,) * (5 - matrix.ndim) + matrix.shape)
    matrix = jnp.broadcast_to(matrix, (*matrix.shape[:3], *sides))
    mirrored = jnp.roll(jnp.flip(matrix, (3, 4)), (1, 1), (3, 4))
    return (0.5 * (matrix + mirrored))[..., : sides[1] // 2 + 1]


@partial(jax.jit, static_argnames=("problem", "config", "device", "gradient"))
def _fused(
    images: Images, problem: Problem, config: spec.Config, device: Device, *, gradient: bool
) -> tuple[Array, Array]:
    """`_plain` by the kernel. ``device`` only tells traces apart."""
    shape = images[0].shape
    alpha, log_matrix = problem.flag("alpha", 1.0), problem.flag("log_matrix")
    losses, peaks, *gradients = pallas_kernel.transform(
        tuple(image.reshape(-1, *shape[-2:]) for image in images),
        alpha=alpha,
        log_matrix=log_matrix,
        gradient=gradient,
        config=config,
    )
    if problem.flag("batch_matrix"):
        # Each plane is weighed by its own maximum; the ratio to that of the batch is left.
        peak = peaks.max()
        ratio = (peaks / peak) ** alpha
        if log_matrix:
            ratio = jnp.log1p(peaks**alpha) / jnp.log1p(peak**alpha)
        ratio = jnp.where(jnp.isnan(ratio), 0.0, ratio)
        losses = losses * ratio
        gradients = [part * ratio[:, None, None] for part in gradients]
    return losses.reshape(shape[:3]).sum(2), (gradients[0].reshape(shape) if gradient else losses)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _fused_gradient(images: Images, call: Call, config: spec.Config) -> tuple[Array, Array]:
    """Losses and gradients by the kernel; their own derivatives go through the plain path."""
    return _fused(images, call.problem, config, jax_device(), gradient=True)


def _fused_gradient_forward(
    images: Images, call: Call, config: spec.Config
) -> tuple[tuple[Array, Array], Images]:
    return _fused_gradient(images, call, config), images


def _fused_gradient_backward(
    call: Call, config: spec.Config, images: Images, cotangents: tuple[Array, Array]
) -> tuple[Images]:
    def plain(images: Images) -> tuple[Array, Array]:
        return _plain(images, None, call.problem, gradient=True)

    return jax.vjp(plain, images)[1](cotangents)


_fused_gradient.defvjp(_fused_gradient_forward, _fused_gradient_backward)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Array]:
    options: dict[str, Any] = {name: flag for name, flag in flags.items() if name != "matrix"}
    arguments = {**inputs, **options, "implementation": implementation}
    return {"loss": focal_frequency_loss(**arguments)}


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla", "pallas"),
    call=_call,
    differentiable=("prediction", "target"),
    kernel_module="pallas_kernel",
)
