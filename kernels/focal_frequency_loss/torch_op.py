"""Focal frequency loss for torch: the public function, the plain path, the custom op, autograd.

Inside, an op takes images (batch, channels, height, width) and returns the loss of each plane,
(batch, patches, channels), and, when asked, the matrix that gives the gradient: the inverse
transform of ``weight * F``. It is half of the loss's gradient for a cotangent of one, computed in
the forward pass because everything it needs is at hand there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import dispatch, usage
from ..core.device import torch_device
from ..core.problem import Problem
from ..core.registry import Binding
from . import spec

PIXELS_IN_CACHE = 1 << 18
"""Of a thread: their difference, spectrum and weight stay in its caches."""


class _Options(NamedTuple):
    alpha: float
    patch_factor: int
    log_matrix: bool
    batch_matrix: bool


def focal_frequency_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    loss_weight: float = 1.0,
    alpha: float = 1.0,
    patch_factor: int = 1,
    ave_spectrum: bool = False,
    log_matrix: bool = False,
    batch_matrix: bool = False,
    matrix: Tensor | None = None,
    mean_batch: bool = True,
    implementation: str | None = None,
) -> Tensor:
    r"""Squared distance of two images' spectra, weighted towards the frequencies that differ most.

    With :math:`F` the orthonormal 2-D DFT of one channel of one patch of ``prediction - target``
    (the transform is linear, so one serves both images):

    .. math::

        w = \frac{|F|^\alpha}{\max |F|^\alpha}, \qquad
        \ell = \sum_{\text{channels}, u, v} w_{uv} |F_{uv}|^2

    and the loss is ``loss_weight`` times the mean of :math:`\ell` over images and patches. The
    weight :math:`w` counts as a constant: no gradient flows through it.

    Parameters
    ----------
    prediction, target
        Shape (batch, channels, height, width) or (batch, time, channels, height, width), any
        strides; float32, bfloat16, float16 or float64. Both may need a gradient.
    loss_weight
        Factor of the result.
    alpha
        How strongly large differences are favoured; 0 weighs all frequencies alike.
    patch_factor
        Cut each side into that many parts and transform each patch by itself.
    ave_spectrum
        Compare the spectra averaged over the batch (and time) instead of each image's.
    log_matrix
        Weigh by :math:`\log(1 + |F|^\alpha)` instead of :math:`|F|^\alpha`.
    batch_matrix
        Divide the weight by its maximum over the whole batch instead of over its plane.
    matrix
        Use this weight instead: values in [0, 1] (not checked: that would wait for the GPU), a
        shape that broadcasts to (batch, patches, channels, height / patch_factor,
        width / patch_factor). It gets no gradient.
    mean_batch
        False: return the loss of each image and patch, see below.
    implementation
        ``"torch"``, ``"triton"``, or None to let dispatch choose.

    Returns
    -------
    Tensor
        A scalar. With ``mean_batch=False``: (batch, patches), for images with a time axis (batch,
        time), or (batch, time, patches) where there is more than one; under ``ave_spectrum``
        batch and time are 1. float32, or float64 if either image is.

    Raises
    ------
    TypeError
        If an image is not a floating-point tensor, or ``matrix`` not a tensor.
    ValueError
        If shapes or devices differ, an image has the wrong number of axes, or
        ``patch_factor`` does not divide the sides.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    Where all weights of a plane are 0 / 0, they are 0. NaN or infinity in an image makes the loss
    of its planes and their gradient NaN. An empty batch has loss 0. Squares of magnitudes are
    formed in float32: differences between 1e-18 and 1e18 keep their accuracy. Second derivatives
    are those of the formula with the weight held constant.

    Jiang, Dai, Wu, Loy, "Focal Frequency Loss for Image Reconstruction and Synthesis",
    arXiv 2012.12821; that paper's code takes the mean over channels and pixels where the sum is
    taken here.
    """
    _check(prediction, target, matrix)
    spec.check_arguments(
        tuple(prediction.shape),
        tuple(target.shape),
        patch_factor,
        ave_spectrum,
        None if matrix is None else tuple(matrix.shape),
    )
    times = prediction.shape[:2] if prediction.ndim == 5 else None
    if times is not None:
        prediction, target = prediction.flatten(0, 1), target.flatten(0, 1)
    if ave_spectrum:
        # One difference before the mean: two means would cancel in the subtraction.
        dtype = _computed_in(prediction, target)
        difference = prediction.to(dtype) - target.to(dtype)
        prediction = difference.sum(0, keepdim=True) / max(difference.shape[0], 1)
        target = prediction.new_zeros(()).expand_as(prediction)
        times = times and torch.Size((1, 1))
    options = _Options(float(alpha), patch_factor, log_matrix, batch_matrix)
    losses = _run(prediction, target, matrix, options, implementation)
    if mean_batch:
        return losses.sum() * (loss_weight / max(losses.shape[0] * losses.shape[1], 1))
    each = losses.sum(-1) * loss_weight
    if times is None:
        return each
    each = each.unflatten(0, times)
    return each if patch_factor > 1 else each.squeeze(-1)


def _check(prediction: Tensor, target: Tensor, matrix: Tensor | None) -> None:
    for name, image in (("prediction", prediction), ("target", target)):
        if not isinstance(image, Tensor) or not image.is_floating_point():
            got = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if prediction.device != target.device:
        raise ValueError(
            f"prediction is on {prediction.device} and target on {target.device}; both must be "
            "on one device"
        )
    if matrix is None:
        return
    if not isinstance(matrix, Tensor):
        raise TypeError(f"matrix must be a tensor, got {type(matrix).__name__}")
    if matrix.device != prediction.device:
        raise ValueError(f"matrix is on {matrix.device} and prediction on {prediction.device}")


def _computed_in(prediction: Tensor, target: Tensor) -> torch.dtype:
    either = torch.promote_types(prediction.dtype, target.dtype)
    return either if either == torch.float64 else torch.float32


def _run(
    prediction: Tensor,
    target: Tensor,
    matrix: Tensor | None,
    options: _Options,
    implementation: str | None,
) -> Tensor:
    """The loss of each plane, (batch, patches, channels)."""
    differentiable = torch.is_grad_enabled() and (prediction.requires_grad or target.requires_grad)
    matrix = None if matrix is None else matrix.detach()
    if torch.compiler.is_compiling():
        # Opaque to the compiler: a new shape changes no traced code.
        return _op(prediction, target, matrix, *options, differentiable, implementation)[0]
    if differentiable:
        return _FocalFrequencyLoss.apply(prediction, target, matrix, options, implementation)[0]
    return _evaluate(prediction, target, matrix, options, False, implementation)[0]


def _evaluate(
    prediction: Tensor,
    target: Tensor,
    matrix: Tensor | None,
    options: _Options,
    with_gradient: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    """The loss of each plane and, or an empty tensor, half of its gradient."""
    if (
        prediction.device.type == "cpu"
        and not usage.recording()
        and not dispatch.is_overridden(BINDING, implementation)
    ):
        return _plain(prediction, target, matrix, options, with_gradient)
    decision = _decide(prediction, target, matrix, options, with_gradient, implementation)
    with usage.timed(decision):
        if decision.implementation == "triton" and prediction.numel():
            from . import triton_kernel

            return triton_kernel.launch(
                prediction, target, *options, with_gradient, decision.config
            )
        return _plain(prediction, target, matrix, options, with_gradient)


def _decide(
    prediction: Tensor,
    target: Tensor,
    matrix: Tensor | None,
    options: _Options,
    with_gradient: bool,
    implementation: str | None,
) -> dispatch.Decision:
    flags: dict[str, Any] = options._asdict()
    flags["matrix"] = matrix is not None
    dtype = torch.promote_types(prediction.dtype, target.dtype)
    problem = Problem(
        spec.NAME,
        tuple(zip(spec.DIMENSIONS, prediction.shape, strict=True)),
        str(dtype).removeprefix("torch."),
        tuple((name, flags[name]) for name, default in spec.DEFAULTS if flags[name] != default),
        "gradient" if with_gradient else "forward",
    )
    return dispatch.decide(problem, torch_device(prediction.device), BINDING, implementation)


def _patches(images: Tensor, factor: int) -> Tensor:
    """(batch, channels, height, width) as (batch, row, column, channels, height/f, width/f)."""
    batch, channels, height, width = images.shape
    grid = images.view(batch, channels, factor, height // factor, factor, width // factor)
    return grid.permute(0, 2, 4, 1, 3, 5)


def _images(patches: Tensor) -> Tensor:
    """The inverse of `_patches`."""
    batch, rows, columns, channels, height, width = patches.shape
    grid = patches.permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(batch, channels, rows * height, columns * width)


def _plain(
    prediction: Tensor,
    target: Tensor,
    matrix: Tensor | None,
    options: _Options,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """`_evaluate` in torch operations; on a CPU in pieces of the batch that stay in its caches."""
    dtype = _computed_in(prediction, target)
    if not prediction.numel():
        shape = (prediction.shape[0], options.patch_factor**2, prediction.shape[1])
        pull = prediction.new_empty(prediction.shape if with_gradient else (0,), dtype=dtype)
        return prediction.new_zeros(shape, dtype=dtype), pull
    batch = prediction.shape[0]
    n_pieces = 1
    if prediction.device.type == "cpu" and matrix is None and not options.batch_matrix:
        n_pieces = -(-prediction.numel() // (PIXELS_IN_CACHE * torch.get_num_threads()))
    if n_pieces == 1 or batch == 1:
        difference = prediction.to(dtype) - target.to(dtype)
        return _transform(difference, matrix, options, with_gradient)
    images = -(-batch // min(n_pieces, batch))
    pieces = zip(prediction.split(images), target.split(images), strict=True)
    losses, pulls = zip(
        *(
            _transform(one.to(dtype) - other.to(dtype), matrix, options, with_gradient)
            for one, other in pieces
        ),
        strict=True,
    )
    return torch.cat(losses), torch.cat(pulls)


def _transform(
    difference: Tensor, matrix: Tensor | None, options: _Options, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The loss of each plane and, or an empty tensor, the inverse transform of the weight times
    F."""
    patches = _patches(difference, options.patch_factor)
    height, width = patches.shape[-2:]
    spectrum = torch.fft.rfft2(patches, norm="ortho")
    real, imaginary = torch.view_as_real(spectrum).unbind(-1)
    energy = torch.addcmul(imaginary * imaginary, real, real)
    # The weight carries the norm of the inverse transform: irfft2 takes half as long again to
    # apply it itself on a CPU.
    norm = (height * width) ** -0.5
    weight = (
        _half(matrix, patches) * norm if matrix is not None else _weight(energy, options, norm)
    )
    energy *= weight
    # The columns that the half spectrum leaves out mirror all it has but the first and, for an
    # even width, the last.
    losses = 2 * energy.sum((-2, -1)) - energy[..., 0].sum(-1)
    if width % 2 == 0:
        losses -= energy[..., -1].sum(-1)
    losses = (losses / norm).flatten(1, 2)
    if not with_gradient:
        return losses, losses.new_empty(0)
    spectrum *= weight
    pull = torch.fft.irfft2(spectrum, s=(height, width), norm="forward")
    return losses, _images(pull)


def _weight(energy: Tensor, options: _Options, scale: float = 1.0) -> Tensor:
    """The weight of each frequency from |F|^2, times ``scale``. It is at most 1: no clamp."""
    weight = energy.sqrt() if options.alpha == 1 else energy ** (0.5 * options.alpha)
    if options.log_matrix:
        weight = weight.log1p_()
    peak = weight.amax() if options.batch_matrix else weight.amax((-2, -1), keepdim=True)
    # Where all weights are 0, and beside a NaN in the batch, the weight is 0.
    weight = weight.div_(torch.where(peak > 0, peak / scale, torch.inf))
    return weight.nan_to_num_(nan=0.0) if options.alpha < 0 else weight


def _half(matrix: Tensor, patches: Tensor) -> Tensor:
    """A given weight on the half spectrum of `rfft2`. |F| is even, so only the even part of the
    weight counts."""
    height, width = patches.shape[-2:]
    matrix = matrix.to(patches.dtype).expand(*matrix.shape[:-2], height, width)
    mirrored = matrix.flip((-2, -1)).roll((1, 1), (-2, -1))
    half = (0.5 * (matrix + mirrored))[..., : width // 2 + 1]
    if half.ndim < 5:
        return half
    per_side = patches.shape[1] if half.shape[1] > 1 else 1
    return half.unflatten(1, (per_side, per_side))


def _curvature(
    prediction: Tensor, target: Tensor, matrix: Tensor | None, options: _Options, image: Tensor
) -> Tensor:
    """What `_evaluate`'s second result is linear in, applied to ``image``: the inverse transform
    of the weight times the transform. Its own adjoint."""
    dtype = image.dtype
    with torch.no_grad():
        patches = _patches(prediction.to(dtype) - target.to(dtype), options.patch_factor)
        if matrix is None:
            energy = torch.fft.rfft2(patches, norm="ortho").abs().square()
            weight = _weight(energy, options)
        else:
            weight = _half(matrix, patches)
    spectrum = torch.fft.rfft2(_patches(image, options.patch_factor), norm="ortho")
    pull = torch.fft.irfft2(spectrum * weight, s=patches.shape[-2:], norm="ortho")
    return _images(pull)


def _pull_back(
    context: Any, options: _Options, of_losses: Tensor | None, of_pull: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of prediction and target."""
    prediction, target, matrix, pull = context.saved_tensors
    gradient = None
    if of_losses is not None:
        factor = options.patch_factor
        scale = (2 * of_losses).unflatten(1, (factor, factor))[..., None, None]
        gradient = _images(_patches(pull, factor) * scale)
    if of_pull is not None:
        second = _curvature(prediction, target, matrix, options, of_pull)
        gradient = second if gradient is None else gradient + second
    of_prediction, of_target = context.needs_input_grad[:2]
    if gradient is None:
        return None, None
    return (
        gradient.to(prediction.dtype) if of_prediction else None,
        -gradient.to(target.dtype) if of_target else None,
    )


class _FocalFrequencyLoss(torch.autograd.Function):
    """The op for eager calls: `torch.library` costs tens of microseconds more."""

    @staticmethod
    def forward(
        prediction: Tensor,
        target: Tensor,
        matrix: Tensor | None,
        options: _Options,
        implementation: str | None,
    ) -> tuple[Tensor, Tensor]:
        return _evaluate(prediction, target, matrix, options, True, implementation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        prediction, target, matrix, ctx.options, _ = inputs
        ctx.save_for_backward(prediction, target, matrix, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_pull_back(ctx, ctx.options, *cotangents), None, None, None


@torch.library.custom_op("ml_networks::focal_frequency_loss", mutates_args=())
def _op(
    prediction: Tensor,
    target: Tensor,
    matrix: Tensor | None,
    alpha: float,
    patch_factor: int,
    log_matrix: bool,
    batch_matrix: bool,
    with_gradient: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    options = _Options(alpha, patch_factor, log_matrix, batch_matrix)
    return _evaluate(prediction, target, matrix, options, with_gradient, implementation)


@_op.register_fake
def _shapes(
    prediction: Tensor,
    target: Tensor,
    matrix: Tensor | None,
    alpha: float,
    patch_factor: int,
    log_matrix: bool,
    batch_matrix: bool,
    with_gradient: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    batch, channels = prediction.shape[:2]
    dtype = _computed_in(prediction, target)
    losses = prediction.new_empty((batch, patch_factor**2, channels), dtype=dtype)
    pull = prediction.new_empty(prediction.shape if with_gradient else (0,), dtype=dtype)
    return losses, pull


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    prediction, target, matrix, *options, _, _ = inputs
    ctx.options = _Options(*options)
    ctx.save_for_backward(prediction, target, matrix, output[1])
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_pull_back(ctx, ctx.options, *cotangents), *(None,) * 7


_op.register_autograd(_op_backward, setup_context=_remember)


def _call(
    inputs: Mapping[str, Any], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor]:
    options = {**flags, "matrix": inputs.get("matrix")}
    loss = focal_frequency_loss(
        inputs["prediction"], inputs["target"], **options, implementation=implementation
    )
    return {"loss": loss}


BINDING = Binding(
    spec.NAME, "torch", ("torch", "triton"), _call, ("prediction", "target"), "triton_kernel"
)
