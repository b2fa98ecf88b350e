"""Focal frequency loss in torch: its derivatives, its flags against the published package, bad
input, compilation. The sweep over cases, dtypes and layouts is in ``test_conformance.py``."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ml_networks.kernels import record_usage, use_implementation  # noqa: E402
from ml_networks.kernels.core.errors import (  # noqa: E402
    UnknownNameError,
    UnsupportedImplementationError,
)
from ml_networks.kernels.focal_frequency_loss import reference, torch_op  # noqa: E402
from ml_networks.kernels.torch import focal_frequency_loss  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()),
    reason="the Triton kernel needs a GPU, or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def images(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return tuple(image.to(DEVICE, dtype).requires_grad_() for image in pair)


def loss_and_gradients(*pair: Any, **options: Any) -> tuple[Any, Any, Any]:
    loss = focal_frequency_loss(*pair, **options)
    return loss, *torch.autograd.grad(loss.sum(), pair)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 2.5},
        {"log_matrix": True},
        {"batch_matrix": True},
        {"ave_spectrum": True},
        {"patch_factor": 2},
        {"patch_factor": 3, "ave_spectrum": True, "batch_matrix": True},
        {"loss_weight": 0.25},
    ],
    ids=str,
)
def test_equals_the_published_package(options: dict[str, Any]) -> None:
    published = pytest.importorskip(
        "focal_frequency_loss", reason="focal-frequency-loss is not installed"
    )
    prediction, target = images(2, 3, 12, 18, dtype=torch.float64)
    theirs = published.FocalFrequencyLoss(**options)(prediction, target)
    ours = focal_frequency_loss(prediction, target, **options)
    # They take the mean over channels and pixels of a patch where we sum.
    factor = options.get("patch_factor", 1)
    torch.testing.assert_close(ours, theirs * (3 * 12 * 18 / factor**2))
    for mine, other in zip(
        torch.autograd.grad(ours, (prediction, target)),
        torch.autograd.grad(theirs, (prediction, target)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other * (3 * 12 * 18 / factor**2))


@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize("case", ["alpha_0", "matrix", "patches", "average"])
def test_derivatives_where_the_weight_is_constant(case: str, width: int) -> None:
    """Elsewhere the weight is held constant, which finite differences cannot know."""
    matrix = torch.rand(4 if case != "patches" else 2, 1, dtype=torch.float64, device=DEVICE)
    options: dict[str, Any] = {
        "alpha_0": {"alpha": 0.0},
        "matrix": {"matrix": matrix, "mean_batch": False},
        "patches": {"matrix": matrix, "patch_factor": 2},
        "average": {"matrix": matrix, "ave_spectrum": True},
    }[case]
    pair = images(2, 1, 4, 2 * width if case == "patches" else width, dtype=torch.float64)

    def loss(*pair: Any) -> Any:
        return focal_frequency_loss(*pair, **options)

    assert torch.autograd.gradcheck(loss, pair)
    assert torch.autograd.gradgradcheck(loss, pair)


def test_second_derivative_holds_the_weight_constant() -> None:
    prediction, target = images(2, 1, 6, 5, dtype=torch.float64)
    vector = torch.randn_like(prediction)
    (gradient,) = torch.autograd.grad(
        focal_frequency_loss(prediction, target), prediction, create_graph=True
    )
    (product,) = torch.autograd.grad(gradient, prediction, vector)
    spectrum = torch.fft.fft2(prediction - target, norm="ortho").abs()
    weight = (spectrum / spectrum.amax((-2, -1), keepdim=True)).detach()
    (expected,) = torch.autograd.grad(
        focal_frequency_loss(
            vector.requires_grad_(), torch.zeros_like(vector), matrix=weight[:, None]
        ),
        vector,
    )
    torch.testing.assert_close(product, expected)


def test_time_axis() -> None:
    prediction, target = images(2, 3, 2, 8, 6, dtype=torch.float64)
    flat = prediction.flatten(0, 1), target.flatten(0, 1)
    torch.testing.assert_close(
        focal_frequency_loss(prediction, target), focal_frequency_loss(*flat)
    )
    for factor, shape in ((1, (2, 3)), (2, (2, 3, 4))):
        options: dict[str, Any] = {"patch_factor": factor, "mean_batch": False}
        each = focal_frequency_loss(prediction, target, **options)
        assert each.shape == shape
        torch.testing.assert_close(
            each.flatten(), focal_frequency_loss(*flat, **options).flatten()
        )
    averaged = focal_frequency_loss(prediction, target, ave_spectrum=True, mean_batch=False)
    assert averaged.shape == (1, 1)


def test_a_matrix_that_is_not_even() -> None:
    pair = images(2, 3, 6, 7, dtype=torch.float64)
    matrix = torch.rand(2, 1, 3, 6, 7, dtype=torch.float64, device=DEVICE)
    arrays = {"prediction": pair[0], "target": pair[1], "matrix": matrix}
    inputs = {name: tensor.detach().cpu().numpy() for name, tensor in arrays.items()}
    loss, of_prediction, _ = loss_and_gradients(*pair, matrix=matrix.requires_grad_())
    np.testing.assert_allclose(loss.detach().cpu(), reference.forward(inputs)["loss"])
    expected = reference.backward(inputs, {"loss": np.ones(())})["prediction"]
    np.testing.assert_allclose(of_prediction.cpu(), expected, atol=1e-12)
    assert not focal_frequency_loss(*(i.detach() for i in pair), matrix=matrix).requires_grad


IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=interpreted)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 0.0}, {"alpha": 0.5}, {"log_matrix": True}, {"batch_matrix": True}],
    ids=str,
)
def test_no_difference_no_loss(implementation: str, options: dict[str, Any]) -> None:
    prediction, _ = images(2, 1, 6, 5)
    target = prediction.detach().clone().requires_grad_()
    results = loss_and_gradients(prediction, target, implementation=implementation, **options)
    assert all(torch.equal(result, torch.zeros_like(result)) for result in results)


# The interpreter's tl.max is NumPy's nanmax, which warns.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch_matrix", [False, True])
def test_non_finite_pixels(implementation: str, bad: float, batch_matrix: bool) -> None:
    prediction, target = images(3, 1, 6, 5)
    with torch.no_grad():
        prediction[1, 0, 2, 3] = bad
    loss, gradient, _ = loss_and_gradients(
        prediction,
        target,
        mean_batch=False,
        batch_matrix=batch_matrix,
        implementation=implementation,
    )
    assert loss[1].isnan().all()
    assert gradient[1].isnan().all()
    others = loss[[0, 2]], gradient[[0, 2]]
    assert all(other.isfinite().all() for other in others)
    # The largest weight of the batch is NaN then, and NaN weights are 0.
    assert all((other == 0).all() == batch_matrix for other in others)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mean_batch", [False, True])
@pytest.mark.parametrize("ave_spectrum", [False, True])
def test_empty_batch(implementation: str, mean_batch: bool, ave_spectrum: bool) -> None:
    pair = images(0, 3, 8, 8)
    loss, gradient, _ = loss_and_gradients(
        *pair,
        mean_batch=mean_batch,
        ave_spectrum=ave_spectrum,
        batch_matrix=True,
        implementation=implementation,
    )
    assert (loss == 0).all()
    assert gradient.shape == pair[0].shape


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_does_not_matter(implementation: str, scale: float) -> None:
    """|F|^3 of these would leave float32; so would a power of it."""
    prediction, target = images(1, 2, 8, 8)
    pair = [(image * scale).detach().requires_grad_() for image in (prediction, target)]
    options: dict[str, Any] = {"alpha": 1.0, "implementation": implementation}
    loss, gradient, _ = loss_and_gradients(*pair, **options)
    plain, expected, _ = loss_and_gradients(prediction, target, **options)
    torch.testing.assert_close(loss / scale**2, plain)
    torch.testing.assert_close(gradient / scale, expected)


@interpreted
def test_images_of_two_dtypes_and_strides() -> None:
    prediction, target = images(2, 2, 6, 10)
    half = target.detach().to(torch.bfloat16)[..., ::2].requires_grad_()
    wide = prediction.detach().transpose(-1, -2).contiguous().transpose(-1, -2)[..., 1::2]
    wide.requires_grad_()
    fused = loss_and_gradients(wide, half, implementation="triton")
    plain = loss_and_gradients(wide, half, implementation="torch")
    for mine, other in zip(fused, plain, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other)


@interpreted
@pytest.mark.parametrize("flag", ["batch_matrix", "log_matrix"])
def test_second_derivative_of_the_kernel(flag: str) -> None:
    prediction, target = images(2, 1, 6, 5)
    products = []
    for implementation in ("torch", "triton"):
        loss = focal_frequency_loss(
            prediction, target, **{flag: True}, implementation=implementation
        )
        (gradient,) = torch.autograd.grad(loss, prediction, create_graph=True)
        products += torch.autograd.grad(gradient.square().sum(), (prediction, target))
    torch.testing.assert_close(products[:2], products[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_custom_op(dtype: torch.dtype) -> None:
    prediction, target = images(2, 2, 6, 5, dtype=dtype)
    for with_gradient in (True, False):
        inputs = (prediction, target) if with_gradient else (prediction.detach(), target.detach())
        options = (1.0, 1, False, False, with_gradient, None)
        torch.library.opcheck(torch_op._op, (*inputs, None, *options))


def test_compiles_once_for_all_shapes() -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(prediction: Any, target: Any) -> Any:
        return focal_frequency_loss(prediction, target, log_matrix=True)

    for side in (4, 6, 7, 10, 12):
        prediction, target = images(side, 2, side + 1, side, seed=side)
        loss = compiled(prediction, target)
        torch.testing.assert_close(
            torch.autograd.grad(loss, (prediction, target)),
            loss_and_gradients(prediction, target, log_matrix=True)[1:],
        )
    assert len(graphs) <= 2


def test_autocast_changes_nothing() -> None:
    pair = images(2, 2, 6, 5)
    plain = loss_and_gradients(*pair)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = loss_and_gradients(*pair)
    assert all(torch.equal(mine, other) for mine, other in zip(cast, plain, strict=True))


def test_usage_names_what_ran() -> None:
    pair = images(2, 2, 6, 5)
    with record_usage() as usage:
        focal_frequency_loss(*pair, implementation="torch").backward()
    (row,) = usage.rows
    assert (row.op, row.direction, row.implementation, row.calls) == (
        "focal_frequency_loss",
        "gradient",
        "torch",
        1,
    )


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    prediction, target = images(2, 2, 6, 5)
    focal_frequency_loss(prediction, target.detach()).backward()
    assert prediction.grad is not None
    focal_frequency_loss(prediction.detach(), target).backward()
    torch.testing.assert_close(target.grad, -prediction.grad)
    assert not focal_frequency_loss(prediction.detach(), target.detach()).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.zeros(2, 3, 8, 5)}, ValueError, r"\(2, 3, 8, 5\)"),
        (
            {"prediction": torch.zeros(2, 3, 8, 6, dtype=torch.int64)},
            TypeError,
            "prediction.*int64",
        ),
        ({"target": np.zeros((2, 3, 8, 6))}, TypeError, "target.*ndarray"),
        ({"patch_factor": 3}, ValueError, "patch_factor is 3.*height 8"),
        ({"patch_factor": 0}, ValueError, "patch_factor is 0"),
        ({"matrix": torch.zeros(3, 8, 5)}, ValueError, r"matrix has shape \(3, 8, 5\)"),
        ({"matrix": torch.zeros(1, 1, 1, 1, 8, 6)}, ValueError, "matrix has shape"),
        ({"matrix": 0.5}, TypeError, "matrix.*float"),
        ({"target": torch.zeros(2, 3, 8, 6, device="meta")}, ValueError, "target on meta"),
        ({"matrix": torch.zeros(8, 6, device="meta")}, ValueError, "matrix is on meta"),
        ({"implementation": "tritno"}, UnknownNameError, "triton"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"prediction": torch.zeros(2, 3, 8, 6), "target": torch.zeros(2, 3, 8, 6)}
    with pytest.raises(error, match=message):
        focal_frequency_loss(**{**arguments, **change})


@pytest.mark.parametrize("ndim", [3, 6])
def test_bad_axes(ndim: int) -> None:
    image = torch.zeros(ndim * (2,))
    with pytest.raises(ValueError, match="batch, channels"):
        focal_frequency_loss(image, image)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"alpha": -1.0}, "alpha is negative"),
        ({"matrix": torch.ones(130, 4, device=DEVICE)}, "given as `matrix`"),
        ({}, "130x4"),
    ],
)
def test_the_kernel_says_what_it_cannot_do(options: dict[str, Any], reason: str) -> None:
    image = torch.zeros(1, 1, 130, 4, device=DEVICE)
    with pytest.raises(UnsupportedImplementationError, match=reason):
        focal_frequency_loss(image, image, implementation="triton", **options)
    with use_implementation("triton"), pytest.raises(UnsupportedImplementationError, match=reason):
        focal_frequency_loss(image, image, **options)
    assert focal_frequency_loss(image, image, **options) == 0
