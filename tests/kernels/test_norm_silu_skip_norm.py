"""Layer norm, SiLU, skip and layer norm beyond the conformance suite: the modules it replaces,
edge values, errors, and each framework's transforms.

Triton kernels run where ``TRITON_INTERPRET=1`` is set or a GPU is found.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ml_networks.kernels import explain, record_usage  # noqa: E402
from ml_networks.kernels.core import device, pallas  # noqa: E402
from ml_networks.kernels.core.errors import UnsupportedImplementationError  # noqa: E402
from ml_networks.kernels.core.problem import Case  # noqa: E402
from ml_networks.kernels.jax import norm_silu_skip_norm as jax_function  # noqa: E402
from ml_networks.kernels.norm_silu_skip_norm import reference, torch_op  # noqa: E402
from ml_networks.kernels.torch import norm_silu_skip_norm as torch_function  # noqa: E402
from tests.kernels.jax_transforms import assert_transforms  # noqa: E402

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = ["torch", "triton"] if INTERPRETING or DEVICE == "cuda" else ["torch"]
EVERY = [*(("torch", name) for name in TORCH), ("jax", "xla"), ("jax", "pallas")]
Given = dict[str, np.ndarray]


def inputs_of(rows: int, width: int, seed: int = 0) -> Given:
    drawn = reference.make_inputs(Case("", "small", {"rows": rows, "width": width}), seed)
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def draw(*shape: int, seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def leaves_of(inputs: Given, dtype: Any = torch.float32) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v).to(DEVICE, dtype).requires_grad_() for k, v in inputs.items()}


def run(where: tuple[str, str], inputs: Given, cotangent: np.ndarray, **options: Any) -> Given:
    """``y`` and the gradients of all inputs."""
    framework, implementation = where
    if framework == "torch":
        leaves = leaves_of(inputs)
        y = torch_function(**leaves, **options, implementation=implementation)
        of_y = torch.from_numpy(cotangent).to(DEVICE)
        found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), of_y), strict=True))
        return {k: v.detach().cpu().numpy() for k, v in {"y": y, **found}.items()}

    def function(values: dict[str, jax.Array]) -> jax.Array:
        return jax_function(**values, **options, implementation=implementation)

    with pallas.interpret():
        y, pull = jax.vjp(function, {k: jnp.asarray(v) for k, v in inputs.items()})
        (found,) = pull(jnp.asarray(cotangent))
    return {"y": np.asarray(y), **{name: np.asarray(value) for name, value in found.items()}}


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_equals_the_layers_it_replaces(where: tuple[str, str]) -> None:
    inputs, of_y = inputs_of(6, 24), draw(6, 24)
    inner, outer = torch.nn.LayerNorm(24), torch.nn.LayerNorm(24)
    weights = [torch.from_numpy(inputs[name]) for name in list(inputs) if "x" != name != "skip"]
    for parameter, value in zip([*inner.parameters(), *outer.parameters()], weights, strict=True):
        parameter.data.copy_(value)
    x, skip = (torch.from_numpy(inputs[name]).requires_grad_() for name in ("x", "skip"))
    y = outer(torch.nn.functional.silu(inner(x)) + skip)
    wanted = x, *inner.parameters(), skip, *outer.parameters()
    found = dict(zip(inputs, torch.autograd.grad(y, wanted, torch.from_numpy(of_y)), strict=True))
    got = run(where, inputs, of_y)
    for name, exact in {"y": y.detach(), **found}.items():
        np.testing.assert_allclose(got[name], exact, rtol=1e-4, atol=2e-5, err_msg=name)


# The Triton interpreter computes inf - inf in NumPy, which warns.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_nan_and_infinity_stay_in_their_row(where: tuple[str, str]) -> None:
    inputs = inputs_of(6, 20)
    inputs["x"][1, 2], inputs["skip"][4, 3] = np.nan, np.inf
    got = run(where, inputs, np.ones((6, 20), np.float32))
    for name in ("y", "x", "skip"):
        assert np.isnan(got[name][[1, 4]]).all(), name
        assert np.isfinite(got[name][[0, 2, 3, 5]]).all(), name


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_no_rows(where: tuple[str, str]) -> None:
    empty = np.zeros((2, 0, 8), np.float32)
    got = run(where, {**inputs_of(1, 8), "x": empty, "skip": empty}, empty)
    assert got["y"].shape == got["x"].shape == got["skip"].shape == (2, 0, 8)
    assert not any(got[name].any() for name in ("weight", "bias", "skip_weight", "skip_bias"))


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_repeated_calls_give_the_same_bits(where: tuple[str, str]) -> None:
    inputs, of_y = inputs_of(100, 16), draw(100, 16)
    first, second = (run(where, inputs, of_y) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(len(TORCH) == 1, reason="needs TRITON_INTERPRET=1 or a GPU")
@settings(max_examples=15)
@given(data=st.data())
def test_triton_equals_the_reference_for_any_shape_and_stride(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 40)), data.draw(st.integers(3, 40))
    step, padding = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    inputs, of_y = inputs_of(rows, width), draw(width, rows)

    def strided(value: np.ndarray) -> torch.Tensor:
        wide = torch.full((rows, width * step + padding), float("nan"), device=DEVICE)
        view = wide[:, : width * step : step]
        view.copy_(torch.from_numpy(value))
        return view.requires_grad_()

    leaves = leaves_of(inputs)
    leaves |= {name: strided(inputs[name]) for name in ("x", "skip")}
    y = torch_function(**leaves, eps=1e-2, implementation="triton")
    cotangent = torch.from_numpy(of_y).to(DEVICE).T
    found = torch.autograd.grad(y, list(leaves.values()), cotangent)
    exact = reference.forward(inputs, eps=1e-2)
    exact |= reference.backward(inputs, {"y": of_y.T}, eps=1e-2)
    for name, value in {"y": y, **dict(zip(leaves, found, strict=True))}.items():
        scale = np.abs(exact[name]).max() + 1.0
        assert np.abs(value.detach().cpu().numpy() - exact[name]).max() / scale < 5e-5, name


BAD = [
    ({"weight": np.ones(7, np.float32)}, r"weight has shape \(7,\)"),
    ({"skip": np.ones((2, 9), np.float32)}, r"skip has shape \(2, 9\)"),
    ({"skip_bias": np.ones((1, 8), np.float32)}, r"skip_bias has shape \(1, 8\)"),
    ({"x": np.ones((2, 0), np.float32)}, "at least one element"),
]


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_named(framework: str, options: Given, message: str) -> None:
    arguments: dict[str, Any] = {**inputs_of(2, 8), **options}
    function = jax_function
    if framework == "torch":
        function, arguments = (
            torch_function,
            {k: torch.from_numpy(v) for k, v in arguments.items()},
        )
    with pytest.raises(ValueError, match=message):
        function(**arguments)


def test_bad_types_and_sizes_are_named() -> None:
    tensors = {k: torch.from_numpy(v) for k, v in inputs_of(2, 8).items()}
    with pytest.raises(TypeError, match=r"bias must be a floating-point tensor, got torch\.int64"):
        torch_function(**{**tensors, "bias": torch.ones(8, dtype=torch.int64)})
    with pytest.raises(TypeError, match=r"skip is torch\.float16"):
        torch_function(**{**tensors, "skip": tensors["skip"].half()})
    with pytest.raises(TypeError, match="x must be a floating-point array, got int32"):
        jax_function(**{**inputs_of(2, 8), "x": jnp.ones((2, 8), jnp.int32)})
    with pallas.interpret(), pytest.raises(UnsupportedImplementationError, match="up to 8192"):
        jax_function(**inputs_of(1, 8193), implementation="pallas")


def test_explain_and_usage_report_the_choice() -> None:
    name, dims, hopper = "norm_silu_skip_norm", {"rows": 64, "width": 1024}, "sm_90"
    assert explain(name, dims, device=device.target(hopper)).implementation == "triton"
    found = explain(name, dims, framework="jax", device=device.target(hopper))
    assert found.implementation == "pallas"
    with record_usage() as usage:
        torch_function(**leaves_of(inputs_of(2, 8)))
        jax_function(**inputs_of(2, 8))
    ran = [(row.op, row.implementation, row.calls) for row in usage.rows]
    assert ran == [(name, "torch", 1), (name, "xla", 1)]


# torch


def test_gradcheck_twice() -> None:
    leaves = list(leaves_of(inputs_of(3, 5), torch.float64).values())
    assert torch.autograd.gradcheck(torch_function, leaves)
    assert torch.autograd.gradgradcheck(torch_function, leaves)


@pytest.mark.skipif(DEVICE == "cuda", reason="the plain path in the op is for a CPU")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("rows", [5, 0])
def test_custom_ops_pass_opcheck(rows: int, affine: bool) -> None:
    leaves = tuple(leaves_of(inputs_of(rows, 6)).values())
    of_y = torch.from_numpy(draw(rows, 6)).requires_grad_()
    torch.library.opcheck(torch_op._forward_op, (*leaves, 1e-5, None))
    torch.library.opcheck(torch_op._backward_op, (*leaves, of_y, 1e-5, affine, None))


@pytest.mark.parametrize("affine", [True, False])
def test_the_backward_op_equals_autograd_and_can_be_differentiated(affine: bool) -> None:
    leaves = leaves_of(inputs_of(5, 6), torch.float64)
    x, weight, skip = leaves["x"], leaves["weight"], leaves["skip"]
    y = torch_op._plain(*leaves.values(), 1e-5)
    # A cotangent that depends on the inputs, as in any loss that is not linear.
    of_y = torch.from_numpy(draw(5, 6)).to(DEVICE) * x.sum() * weight.sum()
    wanted = list(leaves.values()) if affine else [x, skip]
    expected = torch.autograd.grad(y, wanted, of_y, create_graph=True)
    found = torch_op._backward_op(*leaves.values(), of_y, 1e-5, affine, None)
    found = [value for value in found if value.numel()]
    torch.testing.assert_close(found, list(expected))
    loss, exact = (sum(value.square().sum() for value in all_) for all_ in (found, expected))
    everything = [x, weight, skip, leaves["skip_weight"]]
    second = torch.autograd.grad(loss, everything, retain_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(exact, everything))


@pytest.mark.parametrize("implementation", TORCH)
def test_frozen_weights_get_no_gradient(implementation: str) -> None:
    leaves = leaves_of(inputs_of(5, 6))
    frozen = {k: v if k in ("x", "skip") else v.detach() for k, v in leaves.items()}
    wanted = leaves["x"], leaves["skip"]
    found = torch.autograd.grad(
        torch_function(**frozen, implementation=implementation).square().sum(), wanted
    )
    exact = torch.autograd.grad(
        torch_function(**leaves, implementation="torch").square().sum(), wanted
    )
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", TORCH)
def test_results_go_where_they_are_wanted(implementation: str) -> None:
    leaves = {name: value.detach() for name, value in leaves_of(inputs_of(5, 6)).items()}
    exact = torch_function(**leaves, implementation="torch")
    wide = torch.zeros(5, 9, device=DEVICE)
    target = wide[:, 2:8]
    assert torch_function(**leaves, out=target, implementation=implementation) is target
    torch.testing.assert_close(target, exact, rtol=1e-4, atol=1e-5)
    assert not wide[:, :2].any()
    assert not wide[:, 8:].any()
    mixed = {**leaves, "skip": leaves["skip"].double()}
    torch_function(**mixed, out=target, implementation=implementation)
    torch.testing.assert_close(target, exact, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"out has shape \(5, 9\)"):
        torch_function(**leaves, out=wide, implementation=implementation)
    with pytest.raises(ValueError, match=r"out has strides \(1, 5\)"):
        torch_function(**leaves, out=torch.empty(6, 5, device=DEVICE).T)


@pytest.mark.skipif(INTERPRETING, reason="torch.compile cannot trace the Triton interpreter")
@pytest.mark.parametrize("implementation", TORCH)
def test_compiles_whole_and_does_not_recompile_for_a_new_length(implementation: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(*values: torch.Tensor) -> torch.Tensor:
        y = torch_function(*values, eps=1e-5, implementation=implementation)
        return y.square().sum()

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for rows in (5, 9):
        leaves = list(leaves_of(inputs_of(rows, 8)).values())
        found = torch.autograd.grad(compiled(*leaves), leaves)
        torch.testing.assert_close(found, torch.autograd.grad(function(*leaves), leaves))
    assert counter.frame_count == 1


@pytest.mark.parametrize("implementation", TORCH)
def test_autocast_leaves_dtypes_alone(implementation: str) -> None:
    leaves = leaves_of(inputs_of(4, 8))
    half = {k: v.bfloat16() if k in ("x", "skip") else v for k, v in leaves.items()}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        whole = torch_function(**leaves, implementation=implementation)
        rounded = torch_function(**half, implementation=implementation)
    assert (whole.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(rounded.float(), whole, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("implementation", TORCH)
def test_transforms_of_torch_func(implementation: str) -> None:
    leaves = [value.detach() for value in leaves_of(inputs_of(4, 6)).values()]

    def size(*values: torch.Tensor) -> torch.Tensor:
        return torch_function(*values, implementation=implementation).square().sum()

    gradients = torch.func.grad(size, tuple(range(6)))(*leaves)
    leaves = [value.requires_grad_() for value in leaves]
    torch.testing.assert_close(gradients, torch.autograd.grad(size(*leaves), leaves))


# JAX


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_transforms(implementation: str) -> None:
    inputs = {k: jnp.asarray(v) for k, v in inputs_of(6, 8).items()}

    def loss(values: dict[str, jax.Array], name: str) -> jax.Array:
        return (jax_function(**values, implementation=name) ** 3).sum()

    assert_transforms(loss, inputs, "skip", implementation)
