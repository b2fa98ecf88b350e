"""Focal frequency loss in JAX beyond the conformance suite: transforms, derivatives, edges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, PartitionSpec  # noqa: E402

from ml_networks.kernels.core import pallas, usage  # noqa: E402
from ml_networks.kernels.core.errors import (  # noqa: E402
    UnknownNameError,
    UnsupportedImplementationError,
)
from ml_networks.kernels.focal_frequency_loss import (  # noqa: E402
    pallas_kernel,
    reference,
    spec,
)
from ml_networks.kernels.jax import focal_frequency_loss  # noqa: E402

Array = Any
EPSILON = 2.0**-23


@pytest.fixture(params=["xla", "pallas"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with pallas.interpret() if request.param == "pallas" else nullcontext():
        yield request.param


def images(*shape: int, dtype: Any = np.float32) -> tuple[Array, Array]:
    generator = np.random.default_rng(sum(shape))
    return tuple(jnp.asarray(generator.standard_normal(shape), dtype) for _ in range(2))


def exact(prediction: Array, target: Array, **flags: Any) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient of the mean loss from the float64 reference."""
    inputs = {"prediction": np.float64(prediction), "target": np.float64(target)}
    loss = reference.forward(inputs, **flags)["loss"]
    gradient = reference.backward(inputs, {"loss": np.ones_like(loss)}, **flags)["prediction"]
    return loss, gradient


def close(got: Array, wanted: Array, roundings: float = 16) -> None:
    """Within ``roundings`` float32 roundings of the largest element."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max(initial=0) <= roundings * EPSILON * np.abs(wanted).max(
        initial=0
    )


def run(implementation: str, **flags: Any) -> Callable[[Array, Array], Array]:
    def loss(prediction: Array, target: Array) -> Array:
        return focal_frequency_loss(prediction, target, implementation=implementation, **flags)

    return loss


def test_transforms_agree_with_the_plain_call(implementation: str) -> None:
    loss = run(implementation)
    prediction, target = images(2, 1, 9, 12)
    value, gradient = exact(prediction, target)
    close(jax.jit(loss)(prediction, target), value)
    for pull in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.grad(jax.checkpoint(loss))):
        close(pull(prediction, target), gradient)
    close(jax.jit(jax.grad(loss, argnums=1))(prediction, target), -gradient)

    def step(carry: Array, _: None) -> tuple[Array, Array]:
        value, gradient = jax.value_and_grad(loss)(carry, target)
        return carry - 0.0 * gradient, value

    _, values = jax.jit(lambda start: jax.lax.scan(step, start, None, length=2))(prediction)
    close(values, [value, value])


def test_vmap_over_unequal_axes(implementation: str) -> None:
    predictions, targets = images(1, 3, 1, 8, 6)
    loss = run(implementation)
    wanted = [exact(predictions[:, i], targets[:, i]) for i in range(3)]
    values = jax.jit(jax.vmap(loss, in_axes=(1, 1)))(predictions, targets)
    close(values, [value for value, _ in wanted])
    gradients = jax.jit(jax.vmap(jax.grad(loss), in_axes=(1, None)))(predictions, targets[:, 0])
    close(gradients[2], exact(predictions[:, 2], targets[:, 0])[1])
    summed = jax.grad(lambda p: jax.vmap(loss, in_axes=(1, 1))(p, targets).sum())
    close(jax.jit(summed)(predictions)[:, 1], wanted[1][1])


def test_shard_map(implementation: str) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("batch",))
    along = PartitionSpec("batch")
    loss = run(implementation, mean_batch=False)
    sharded = jax.shard_map(
        lambda p, t: loss(p, t),
        mesh=mesh,
        in_specs=(along, along),
        out_specs=along,
        check_vma=False,
    )
    prediction, target = images(2, 1, 8, 8)
    _, gradient = exact(prediction, target)
    got = jax.jit(jax.grad(lambda p: sharded(p, target).mean()))(prediction)
    close(got, gradient)


@pytest.mark.parametrize("flags", [{}, {"log_matrix": True, "batch_matrix": True, "alpha": 1.5}])
def test_second_derivatives_hold_the_weight(implementation: str, flags: dict[str, Any]) -> None:
    """The gradient is 2 IDFT(w F), w constant: its own derivative along v is 2 IDFT(w DFT(v))."""
    prediction, target = images(2, 1, 6, 5)
    direction, _ = images(2, 1, 5, 6)
    direction = direction.swapaxes(-1, -2)
    loss = run(implementation, **flags)
    slope = jax.grad(lambda p: jnp.vdot(jax.grad(loss)(p, target), direction))
    got = jax.jit(slope)(prediction)
    difference = np.float64(prediction) - np.float64(target)
    spectrum = np.fft.fft2(difference, norm="ortho")
    weight = np.abs(spectrum) ** flags.get("alpha", 1.0)
    weight = np.log1p(weight) if flags else weight
    weight /= weight.max(axis=None if flags else (2, 3), keepdims=True)
    along = np.fft.fft2(np.float64(direction), norm="ortho")
    close(got, np.fft.ifft2(weight * along, norm="ortho").real, 32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gets_a_float32_loss_and_gradients_of_its_own(
    implementation: str, dtype: str
) -> None:
    prediction, target = images(1, 2, 8, 8, dtype=dtype)
    value, pull = jax.vjp(run(implementation), prediction, target.astype("float32"))
    assert value.dtype == jnp.float32
    wanted, gradient = exact(prediction.astype("float32"), target.astype("float32"))
    close(value, wanted)
    of_prediction, of_target = pull(jnp.float32(1))
    assert (of_prediction.dtype, of_target.dtype) == (dtype, jnp.float32)
    close(of_target, -gradient)
    close(of_prediction.astype("float32"), gradient, float(jnp.finfo(dtype).eps) / EPSILON)


def test_float64_takes_the_plain_path() -> None:
    with jax.enable_x64(True):
        prediction, target = images(2, 1, 7, 10, dtype=np.float64)
        value, gradient = jax.value_and_grad(run("xla"))(prediction, target)
        assert value.dtype == gradient.dtype == jnp.float64
        wanted, exact_gradient = exact(prediction, target)
        close(value, wanted, 2.0**-26)
        close(gradient, exact_gradient, 2.0**-26)
        with pallas.interpret(), pytest.raises(UnsupportedImplementationError, match="float64"):
            run("pallas")(prediction, target)


def test_videos_and_single_losses(implementation: str) -> None:
    prediction, target = images(2, 3, 1, 8, 4)
    flat = [image.reshape(6, 1, 8, 4) for image in (prediction, target)]
    each, _ = exact(*flat, mean_batch=False)
    close(run(implementation)(prediction, target), each.mean())
    close(run(implementation, mean_batch=False)(prediction, target), each.reshape(2, 3))
    close(run(implementation, mean_batch=False)(*flat), each)
    patches, _ = exact(*flat, mean_batch=False, patch_factor=2)
    got = run(implementation, mean_batch=False, patch_factor=2)(prediction, target)
    close(got, patches.reshape(2, 3, 4))


def test_the_loss_weight_may_be_traced(implementation: str) -> None:
    prediction, target = images(1, 1, 8, 8)

    def loss(weight: Array) -> Array:
        return focal_frequency_loss(
            prediction, target, loss_weight=weight, implementation=implementation
        )

    wanted, _ = exact(prediction, target)
    value, slope = jax.jit(jax.value_and_grad(loss))(0.5)
    close(value, 0.5 * wanted)
    close(slope, wanted)


@pytest.mark.parametrize("size", [1e-12, 1e12])
@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_small_and_large_images(size: float, alpha: float) -> None:
    """Where the powers of the spectrum leave float32 and the loss does not."""
    prediction, target = (jnp.float32(size) * image for image in images(1, 1, 8, 16))
    wanted = exact(prediction, target, alpha=alpha)
    with pallas.interpret():
        got = jax.value_and_grad(run("pallas", alpha=alpha))(prediction, target)
    close(got[0], wanted[0])
    close(got[1], wanted[1])


def test_equal_images_have_no_loss_and_no_gradient(implementation: str) -> None:
    image, _ = images(2, 1, 8, 8)
    for flags in ({}, {"log_matrix": True}, {"batch_matrix": True}, {"alpha": 0.0}):
        value, gradient = jax.value_and_grad(run(implementation, **flags))(image, image)
        assert value == 0
        assert not gradient.any()


@pytest.mark.parametrize("flaw", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_image(implementation: str, flaw: float) -> None:
    prediction, target = images(2, 1, 8, 8)
    broken = prediction.at[0, 0, 3, 3].set(flaw)
    loss = run(implementation, mean_batch=False)
    value, pull = jax.vjp(loss, broken, target)
    gradient = pull(jnp.ones_like(value))[0]
    assert np.isnan(value[0]).all()
    assert np.isnan(gradient[0]).all()
    close(value[1], exact(prediction, target, mean_batch=False)[0][1])
    together = run(implementation, mean_batch=False, batch_matrix=True)(broken, target)
    assert np.isnan(together[0]).all()
    assert together[1] == 0


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8)])
def test_nothing_to_compare_has_no_loss(implementation: str, shape: tuple[int, ...]) -> None:
    value, gradient = jax.value_and_grad(run(implementation))(jnp.zeros(shape), jnp.zeros(shape))
    assert value == 0
    assert gradient.shape == shape


def test_given_weights_get_no_gradient() -> None:
    prediction, target = images(2, 2, 6, 5)
    matrix = jnp.asarray(np.random.default_rng(3).uniform(size=(2, 6, 5)), jnp.float32)

    def loss(matrix: Array) -> Array:
        return focal_frequency_loss(prediction, target, matrix=matrix)

    assert not jax.grad(loss)(matrix).any()
    flat = jnp.full((1, 1), 0.5)
    mean_square = 0.5 * ((prediction - target) ** 2).sum((1, 2, 3)).mean()
    close(loss(flat), mean_square)
    with pallas.interpret(), pytest.raises(UnsupportedImplementationError, match="matrix"):
        focal_frequency_loss(prediction, target, matrix=matrix, implementation="pallas")


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"target": jnp.zeros((1, 1, 8, 4))}, ValueError, "target"),
    ({"prediction": jnp.zeros((8, 8)), "target": jnp.zeros((8, 8))}, ValueError, "prediction"),
    ({"prediction": jnp.zeros((1, 1, 8, 8), jnp.uint8)}, TypeError, "prediction.*uint8"),
    ({"patch_factor": 3}, ValueError, "patch_factor is 3"),
    ({"patch_factor": 0}, ValueError, "patch_factor is 0"),
    ({"matrix": jnp.zeros((3, 8, 8))}, ValueError, "matrix"),
    ({"implementation": "triton"}, UnknownNameError, "triton"),
    ({"implementation": "pallas"}, UnsupportedImplementationError, "CPU"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"prediction": jnp.zeros((1, 1, 8, 8)), "target": jnp.zeros((1, 1, 8, 8))}
    with pytest.raises(error, match=words):
        focal_frequency_loss(**{**arguments, **change})


def test_usage_tells_directions_apart() -> None:
    prediction, target = images(1, 1, 8, 8)
    with usage.record() as seen:
        run("xla")(prediction, target)
        jax.grad(run("xla"))(prediction, target)
    rows = [(row.direction, row.implementation, row.calls) for row in seen.rows]
    assert rows == [("forward", "xla", 1), ("gradient", "xla", 1)]


@pytest.mark.parametrize("size", [1, 2, 7, 16, 33, 64])
def test_the_packed_basis_is_orthonormal(size: int) -> None:
    basis = pallas_kernel.packed_basis(size).astype(np.float64)
    rows = basis.reshape(-1, basis.shape[-1])
    close(rows.T @ rows, np.diag(np.arange(basis.shape[-1]) < size).astype(float))


@pytest.mark.parametrize("target_name", ["sm_80", "sm_90", "sm_100", "tpu"])
@pytest.mark.parametrize("case", ["odd_even", "patches", "image_64", "image_128"])
def test_the_kernel_lowers_for_gpus_and_tpus(case: str, target_name: str) -> None:
    found = next(one for one in spec.CASES if one.id == case)
    shape = (1, *(found.dims[name] for name in ("channels", "height", "width")))
    image = jnp.zeros(shape, jnp.bfloat16)
    flags = {name: value for name, value in found.flags.items() if name != "mean_batch"}
    loss = run("pallas", **flags)
    call = "tpu_custom_call" if target_name == "tpu" else "__gpu$xla.gpu.triton"
    assert call in pallas.lower(loss, image, image, target_name=target_name)
    if (case, target_name) != ("image_128", "sm_80"):
        assert call in pallas.lower(jax.grad(loss), image, image, target_name=target_name)
