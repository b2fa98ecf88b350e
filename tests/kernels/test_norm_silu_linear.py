"""Norm, SiLU, skip, norm and a linear layer beyond the conformance suite: the layers they replace,
the gradient for loops, results in place, edge values, errors, and each framework's transforms.

Triton kernels run where ``TRITON_INTERPRET=1`` is set or a GPU is found.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ml_networks.kernels import explain, record_usage  # noqa: E402
from ml_networks.kernels import jax as jax_ops  # noqa: E402
from ml_networks.kernels.core import ahead_of_time, device, pallas  # noqa: E402
from ml_networks.kernels.core.errors import UnsupportedImplementationError  # noqa: E402
from ml_networks.kernels.core.problem import Case  # noqa: E402
from ml_networks.kernels.norm_silu_linear import reference, spec, torch_op  # noqa: E402
from ml_networks.kernels.torch import (  # noqa: E402
    linear_norm_silu_gradient,
    norm_silu_linear,
    norm_silu_linear_step,
)
from tests.kernels.jax_transforms import assert_transforms  # noqa: E402

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = ["torch", "triton"] if INTERPRETING or DEVICE == "cuda" else ["torch"]
EVERY = [*(("torch", name) for name in TORCH), ("jax", "xla"), ("jax", "pallas")]
every = pytest.mark.parametrize("where", EVERY, ids="-".join)
needs_triton = pytest.mark.skipif(len(TORCH) == 1, reason="needs TRITON_INTERPRET=1 or a GPU")
Given = dict[str, np.ndarray]
AFTER = ("skip", "skip_weight", "skip_bias")


def inputs_of(rows: int, width: int, features: int, skip: bool, seed: int = 0) -> Given:
    dims = {"rows": rows, "width": width, "features": features}
    drawn = reference.make_inputs(Case("", "small", dims, {"skip": skip}), seed)
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def draw(*shape: int, seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensors_of(inputs: Given, dtype: Any = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value).to(DEVICE, dtype) for name, value in inputs.items()}


def leaves_of(inputs: Given, dtype: Any = torch.float32) -> dict[str, torch.Tensor]:
    return {name: value.requires_grad_() for name, value in tensors_of(inputs, dtype).items()}


def arrays_of(framework: str, inputs: Given) -> dict[str, Any]:
    if framework == "torch":
        return tensors_of(inputs)
    return {name: jnp.asarray(value) for name, value in inputs.items()}


def numbers_of(found: dict[str, Any]) -> Given:
    return {
        name: value.detach().cpu().double().numpy()
        if isinstance(value, torch.Tensor)
        else np.asarray(value, np.float64)
        for name, value in found.items()
        if value is not None
    }


def forward(where: tuple[str, str], arrays: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    framework, implementation = where
    function = norm_silu_linear if framework == "torch" else jax_ops.norm_silu_linear
    with pallas.interpret():
        return function(**arrays, **options, implementation=implementation)


def of_linear(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the gradient for loops: another linear layer's weight, and no bias."""
    given = {name: value for name, value in arrays.items() if name != "bias"}
    return {**given, "weight": given["weight"].T}


def pull(
    where: tuple[str, str], arrays: dict[str, Any], of_h: Any, **options: Any
) -> dict[str, Any]:
    """The gradients for loops, for the transpose of the weight."""
    framework, implementation = where
    function = linear_norm_silu_gradient
    if framework == "jax":
        function = jax_ops.linear_norm_silu_gradient
    options["implementation"] = implementation
    with pallas.interpret():
        of_u, of_skip = function(of_h, **of_linear(arrays), **options)
    return {"input": of_u, "skip": of_skip}


def run(where: tuple[str, str], inputs: Given, of_y: np.ndarray, of_h: np.ndarray) -> Given:
    """``y``, ``h`` and the gradients of all inputs."""
    framework, implementation = where
    if framework == "torch":
        leaves = leaves_of(inputs)
        results = norm_silu_linear(**leaves, implementation=implementation)
        cotangents = [torch.from_numpy(value).to(DEVICE) for value in (of_y, of_h)]
        gradients = torch.autograd.grad(results, list(leaves.values()), cotangents)
        found = dict(zip(leaves, gradients, strict=True))
    else:

        def function(values: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return jax_ops.norm_silu_linear(**values, implementation=implementation)

        with pallas.interpret():
            results, pulled = jax.vjp(function, arrays_of("jax", inputs))
            (found,) = pulled((jnp.asarray(of_y), jnp.asarray(of_h)))
    return numbers_of({"y": results[0], "h": results[1], **found})


def assert_near(got: Any, exact: np.ndarray, name: str = "", within: float = 5e-5) -> None:
    (got,) = numbers_of({name: got}).values()
    assert np.abs(got - exact).max() <= within * (np.abs(exact).max() + 1.0), name


@pytest.mark.parametrize("skip", [False, True])
@every
def test_equals_the_layers_it_replaces(where: tuple[str, str], skip: bool) -> None:
    inputs, of_y, of_h = inputs_of(6, 24, 10, skip), draw(6, 10), draw(6, 24)
    leaves = {name: torch.from_numpy(value).requires_grad_() for name, value in inputs.items()}
    layer_norm, size = torch.nn.functional.layer_norm, (24,)
    h = layer_norm(leaves["x"], size, leaves["norm_weight"], leaves["norm_bias"])
    h = torch.nn.functional.silu(h)
    if skip:
        h = layer_norm(h + leaves["skip"], size, *(leaves[name] for name in AFTER[1:]))
    y = torch.nn.functional.linear(h, leaves["weight"], leaves["bias"])
    cotangents = torch.from_numpy(of_y), torch.from_numpy(of_h)
    gradients = torch.autograd.grad((y, h), list(leaves.values()), cotangents)
    exact = {"y": y, "h": h, **dict(zip(leaves, gradients, strict=True))}
    got = run(where, inputs, of_y, of_h)
    for name, value in numbers_of(exact).items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


# The second in several blocks of rows, of features and of columns.
@pytest.mark.parametrize("sizes", [(19, 37, 21), (33, 300, 70)])
@pytest.mark.parametrize("skip", [False, True])
@every
def test_both_functions_equal_the_reference(
    where: tuple[str, str], skip: bool, sizes: tuple[int, int, int]
) -> None:
    inputs, of_h = inputs_of(*sizes, skip), draw(*sizes[:2])
    exact = reference.forward(inputs, skip=skip)
    exact_pull = reference.linear_norm_silu_gradient(inputs, of_h.astype(np.float64), skip=skip)
    arrays = arrays_of(where[0], inputs)
    # Without a bias, and with rows in two leading axes of which one is of length 1.
    few = {name: value for name, value in arrays.items() if name != "bias"}
    split = {name: few[name][None] for name in ("x", "skip") if name in few}
    y, h = forward(where, {**few, **split})
    assert_near(y[0], exact["y"] - inputs["bias"], "y")
    assert_near(h[0], exact["h"], "h")
    cotangent = arrays_of(where[0], {"of_h": of_h[None]})["of_h"]
    found = pull(where, {**few, **split}, cotangent)
    assert_near(found["input"][0], exact_pull["input"], "input")
    if skip:
        assert_near(found["skip"][0], exact_pull["skip"], "skip")
    else:
        assert found["skip"] is None


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("implementation", TORCH)
def test_gradients_for_loops_go_where_they_are_wanted(implementation: str, skip: bool) -> None:
    inputs, of_h = inputs_of(19, 37, 21, skip), draw(19, 37)
    exact = reference.linear_norm_silu_gradient(inputs, of_h.astype(np.float64), skip=skip)
    # In place: added to a slice of wider rows, and what is around it stays.
    wide = torch.ones(19, 30, device=DEVICE)
    into = wide[:, 4:25]
    placed = {"into": into}
    if skip:
        placed["of_skip"] = torch.full((19, 50), float("nan"), device=DEVICE)[:, :37]
    cotangent = torch.from_numpy(of_h).to(DEVICE)
    found = pull(("torch", implementation), tensors_of(inputs), cotangent, **placed)
    assert found["input"] is into
    assert (wide[:, :4] == 1).all()
    assert (wide[:, 25:] == 1).all()
    assert_near(into - 1.0, exact["input"], "into")
    assert found["skip"] is placed.get("of_skip")
    if skip:
        assert_near(found["skip"], exact["skip"], "of_skip")


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("implementation", TORCH)
def test_results_go_where_they_are_wanted(implementation: str, skip: bool) -> None:
    given = tensors_of(inputs_of(5, 18, 11, skip))
    y, h = norm_silu_linear(**given, implementation="torch")
    wide = torch.zeros(5, 20, device=DEVICE)
    target, inner = wide[:, 3:14], torch.empty(5, 18, device=DEVICE, dtype=torch.float64)
    found = norm_silu_linear_step(**given, into=(target, inner), implementation=implementation)
    assert found.y is target
    assert found.h is inner
    torch.testing.assert_close(target, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inner.float(), h, rtol=1e-4, atol=1e-5)
    assert not wide[:, :3].any()
    assert not wide[:, 14:].any()
    alone = torch.empty_like(y)
    found = norm_silu_linear_step(**given, into=(alone, None), implementation=implementation)
    assert found.h is None
    torch.testing.assert_close(alone, y, rtol=1e-4, atol=1e-5)


# The second layer's rows are of several blocks of columns, the last of them not full.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("implementation", TORCH)
def test_steps_tell_each_other_what_they_know(implementation: str, skip: bool, dtype: str) -> None:
    element = getattr(torch, dtype)
    first, second = inputs_of(19, 37, 75, False), inputs_of(19, 75, 21, skip, seed=1)
    first["bias"] += 30.0  # far from 0, where sums of squares would cancel
    given = tensors_of(first, element)
    y = torch.empty(19, 75, device=DEVICE, dtype=element)
    step = norm_silu_linear_step(**given, into=(y, None), implementation=implementation)
    given = {**tensors_of(second), "x": y}
    given |= {name: given[name].to(element) for name in ("weight", "bias")}
    second["x"] = numbers_of({"": y})[""]
    second |= {name: numbers_of({name: given[name]})[name] for name in ("weight", "bias")}
    results = torch.empty(19, 21, device=DEVICE), torch.empty(19, 75, device=DEVICE)
    options = {"moments": step.moments, "implementation": implementation}
    step = norm_silu_linear_step(**given, into=results, **options)
    exact = reference.forward(second, skip=skip)
    coarse = 1.0 if dtype == "float32" else 150.0
    assert_near(step.y, exact["y"], "y", 5e-5 * coarse)
    # In bfloat16 too: only the product rounds.
    assert_near(step.h, exact["h"], "h", 5e-5)

    of_h = draw(19, 75)
    exact = reference.linear_norm_silu_gradient(second, of_h.astype(np.float64), skip=skip)
    cotangent = torch.from_numpy(of_h).to(DEVICE)
    options = {"statistics": step.statistics, "implementation": implementation}
    of_u, of_skip = linear_norm_silu_gradient(cotangent, **of_linear(given), **options)
    assert_near(of_u, exact["input"], "of_u", 5e-5 * coarse)
    if skip:
        assert_near(of_skip, exact["skip"], "of_skip", 5e-5)
    told = step.moments is not None, step.statistics is not None
    assert told == (implementation == "triton",) * 2


# The launcher compiles an integer 1 in.
@pytest.mark.skipif(INTERPRETING, reason="TRITON_INTERPRET=1: this process cannot compile kernels")
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("sizes", [(1, 64, 48), (8, 1, 16), (8, 64, 1)])
def test_sizes_of_one_compile(sizes: tuple[int, int, int], skip: bool, told: bool) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from ml_networks.kernels.norm_silu_linear import triton_kernel

    hopper = device.target("sm_90")
    for direction in spec.DIRECTIONS:
        problem = spec.problem_of(*sizes, "bfloat16", direction, skip)
        config = spec.heuristic(problem, hopper, ("torch", "triton")).config
        (kernel,) = triton_kernel.compilations(problem, config, hopper)
        constants = {**kernel.constexprs}
        constants |= {key: told for key in ("MOMENTS", "STATISTICS") if key in constants}
        assert ahead_of_time.compile_for(replace(kernel, constexprs=constants), hopper).clean


@needs_triton
def test_what_is_told_is_used() -> None:
    given = tensors_of(inputs_of(5, 40, 11, True))
    into = torch.empty(5, 11, device=DEVICE), None
    options = {"into": into, "implementation": "triton"}
    step = norm_silu_linear_step(**given, **options)
    y, moments, statistics = step.y.clone(), step.moments, step.statistics
    assert moments is not None
    assert statistics is not None
    x = given["x"].double()
    u = torch.nn.functional.silu(
        torch.nn.functional.layer_norm(x, (40,)) * given["norm_weight"] + given["norm_bias"]
    )
    u += given["skip"]
    for value, (mean, inverse) in ((x, statistics[:, :2].unbind(1)), (u, statistics[:, 2:].T)):
        variance = value.var(1, correction=0)
        torch.testing.assert_close(mean.double(), value.mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inverse.double(), (variance + 1e-5).rsqrt(), rtol=1e-5, atol=0)
    assert moments.shape == (2, 5, 1)
    torch.testing.assert_close(moments[0, :, 0], step.y.mean(1), rtol=1e-5, atol=1e-6)
    squares = step.y.var(1, correction=0) * 11
    torch.testing.assert_close(moments[1, :, 0], squares, rtol=1e-5, atol=1e-6)
    blocks = torch.zeros(2, 5, 2, device=DEVICE)
    blocks[1] = 1.0
    assert not torch.allclose(norm_silu_linear_step(**given, **options, moments=blocks).y, y)
    other = linear_norm_silu_gradient(
        x.float(), **of_linear(given), statistics=statistics * 2, implementation="triton"
    )[0]
    known = linear_norm_silu_gradient(
        x.float(), **of_linear(given), statistics=statistics, implementation="triton"
    )[0]
    assert not torch.allclose(other, known)


# What the kernel takes off before it sums keeps large levels from cancelling.
@every
@pytest.mark.parametrize("level", [30.0, 1000.0])
def test_rows_far_from_zero_keep_their_accuracy(where: tuple[str, str], level: float) -> None:
    inputs = inputs_of(7, 200, 9, True)
    inputs["x"] += np.float32(level)
    inputs["skip"] -= np.float32(level)
    of_h = draw(7, 200)
    exact = reference.forward(inputs, skip=True)
    exact |= reference.linear_norm_silu_gradient(inputs, of_h.astype(np.float64), skip=True)
    arrays = arrays_of(where[0], inputs)
    found = pull(where, arrays, arrays_of(where[0], {"of_h": of_h})["of_h"])
    found["y"] = forward(where, arrays)[0]
    # float32 holds these elements to 2^-24 of the level.
    for name, value in found.items():
        assert_near(value, exact[name], name, 2e-5 + level * 2e-7)


# The Triton interpreter computes inf - inf in NumPy, which warns.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@every
def test_nan_and_infinity_stay_in_their_row(where: tuple[str, str]) -> None:
    inputs = inputs_of(6, 20, 5, True)
    inputs["x"][1, 2], inputs["skip"][4, 3] = float("nan"), float("inf")
    arrays = arrays_of(where[0], inputs)
    ones = arrays_of(where[0], {"of_h": np.ones((6, 20), np.float32)})["of_h"]
    found = {**pull(where, arrays, ones), **dict(zip("yh", forward(where, arrays), strict=True))}
    for name, value in numbers_of(found).items():
        assert np.isnan(value[[1, 4]]).all(), name
        assert np.isfinite(value[[0, 2, 3, 5]]).all(), name


@pytest.mark.parametrize("skip", [False, True])
@every
def test_no_rows(where: tuple[str, str], skip: bool) -> None:
    inputs = inputs_of(1, 8, 3, skip)
    nothing = np.zeros((2, 0, 8), np.float32)
    inputs |= {name: nothing for name in ("x", "skip") if name in inputs}
    got = run(where, inputs, np.zeros((2, 0, 3), np.float32), nothing)
    assert (got["y"].shape, got["h"].shape) == ((2, 0, 3), (2, 0, 8))
    assert not any(value.any() for value in got.values())
    arrays = arrays_of(where[0], {**inputs, "of_h": nothing})
    found = numbers_of(pull(where, arrays, arrays.pop("of_h")))
    assert found["input"].shape == (2, 0, 3)
    assert not skip or found["skip"].shape == nothing.shape


@every
def test_each_result_has_a_dtype_of_its_own(where: tuple[str, str]) -> None:
    inputs, of_h = inputs_of(5, 18, 11, True), draw(5, 18)
    half = {"torch": torch.bfloat16, "jax": jnp.bfloat16}[where[0]]
    single = {"torch": torch.float32, "jax": jnp.float32}[where[0]]
    arrays = arrays_of(where[0], {**inputs, "of_h": of_h})

    def cast(value: Any) -> Any:
        return value.to(half) if where[0] == "torch" else value.astype(half)

    few = ("x", "weight", "bias", "of_h")
    arrays = {name: cast(value) if name in few else value for name, value in arrays.items()}
    cotangent = arrays.pop("of_h")
    y, h = forward(where, arrays)
    found = pull(where, arrays, cotangent)
    assert (y.dtype, h.dtype) == (half, single)
    assert (found["input"].dtype, found["skip"].dtype) == (half, half)
    exact = reference.forward(inputs, skip=True)
    exact |= reference.linear_norm_silu_gradient(inputs, of_h, skip=True)
    for name, value in {"y": y, "h": h, **found}.items():
        if where[0] == "jax":
            value = value.astype(single)
        assert_near(value, exact[name], name, 0.03)


@needs_triton
@settings(max_examples=15)
@given(data=st.data())
def test_triton_equals_the_reference_for_any_shape_and_stride(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 35)), data.draw(st.integers(3, 150))
    features, skip = data.draw(st.integers(1, 40)), data.draw(st.booleans())
    step, padding = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    inputs, of_h = inputs_of(rows, width, features, skip), draw(width, rows)

    def strided(value: np.ndarray) -> torch.Tensor:
        wide = torch.full((rows, width * step + padding), float("nan"), device=DEVICE)
        view = wide[:, : width * step : step]
        view.copy_(torch.from_numpy(value))
        return view

    given = tensors_of(inputs)
    given |= {name: strided(inputs[name]) for name in ("x", "skip") if name in inputs}
    y, h = norm_silu_linear(**given, eps=1e-2, implementation="triton")
    weight = given.pop("weight").T
    del given["bias"]
    cotangent = torch.from_numpy(of_h).to(DEVICE).T
    found = linear_norm_silu_gradient(
        cotangent, weight=weight, **given, eps=1e-2, implementation="triton"
    )
    exact = reference.forward(inputs, skip=skip, eps=1e-2)
    of_h64 = of_h.T.astype(np.float64)
    exact |= reference.linear_norm_silu_gradient(inputs, of_h64, skip=skip, eps=1e-2)
    got = {"y": y, "h": h, "input": found[0], **({"skip": found[1]} if skip else {})}
    for name, value in got.items():
        assert_near(value, exact[name], name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "fused", [where for where in EVERY if where[1] in ("triton", "pallas")], ids="-".join
)
def test_the_gradient_for_loops_is_as_exact_as_the_plain_path(
    fused: tuple[str, str], dtype: str
) -> None:
    framework = fused[0]
    given = arrays_of(framework, {**inputs_of(21, 147, 29, True), "of_h": draw(21, 147)})
    kinds = getattr({"torch": torch, "jax": jnp}[framework], dtype)
    cast = "to" if framework == "torch" else "astype"
    given = {name: getattr(value, cast)(kinds) for name, value in given.items()}
    rounded = numbers_of(given)
    of_h = given.pop("of_h")
    exact = reference.linear_norm_silu_gradient(rounded, rounded["of_h"], skip=True)
    plain = framework, "torch" if framework == "torch" else "xla"

    def errors(where: tuple[str, str]) -> list[float]:
        found = numbers_of(pull(where, given, of_h))
        return [np.abs(found[k] - exact[k]).max() / np.abs(exact[k]).max() for k in exact]

    rounding = 8 * torch.finfo(getattr(torch, dtype)).eps
    for allowed, error in zip(errors(plain), errors(fused), strict=True):
        assert error <= 2 * allowed + rounding


@every
def test_repeated_calls_give_the_same_bits(where: tuple[str, str]) -> None:
    arrays = arrays_of(where[0], {**inputs_of(40, 33, 20, True), "of_h": draw(40, 33)})
    of_h = arrays.pop("of_h")
    first, second = (
        numbers_of({**pull(where, arrays, of_h), "y": forward(where, arrays)[0]}) for _ in range(2)
    )
    assert all(np.array_equal(first[name], second[name]) for name in first)


BAD = [
    ({"norm_weight": np.ones(7, np.float32)}, r"norm_weight has shape \(7,\)"),
    ({"weight": np.ones((4, 9), np.float32)}, r"weight has shape \(4, 9\).*\(features, 8\)"),
    ({"bias": np.ones(5, np.float32)}, r"bias has shape \(5,\); here it must be \(4,\)"),
    ({"skip": np.ones((2, 9), np.float32)}, r"skip has shape \(2, 9\)"),
    ({"skip_bias": None}, "skip_bias is missing: skip, skip_weight, skip_bias go together"),
    ({"x": np.ones((2, 0), np.float32)}, "at least one element"),
]


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_named(framework: str, options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {**inputs_of(2, 8, 4, True), **options}
    if framework == "torch":
        given = {k: None if v is None else torch.from_numpy(v) for k, v in given.items()}
    function = {"torch": norm_silu_linear, "jax": jax_ops.norm_silu_linear}[framework]
    with pytest.raises(ValueError, match=message):
        function(**given)


def test_bad_types_and_results_are_named() -> None:
    given = tensors_of(inputs_of(2, 8, 4, False))
    with pytest.raises(TypeError, match=r"norm_bias must be .*got torch\.int64"):
        norm_silu_linear(**{**given, "norm_bias": torch.ones(8, dtype=torch.int64)})
    with pytest.raises(TypeError, match=r"weight is torch\.float16; it must be torch\.float32"):
        norm_silu_linear(**{**given, "weight": given["weight"].half()})
    with pytest.raises(ValueError, match=r"y has shape \(2, 5\); here it must be \(2, 4\)"):
        norm_silu_linear_step(**given, into=(torch.empty(2, 5), None))
    with pytest.raises(ValueError, match=r"y has strides \(1, 2\); its last axis must"):
        norm_silu_linear_step(**given, into=(torch.empty(4, 2, device=DEVICE).T, None))
    into = torch.empty(2, 4, device=DEVICE), None
    with pytest.raises(ValueError, match=r"moments is \(2, 2, 2\), .* tells \(2, 2, 1\), torch"):
        norm_silu_linear_step(**given, into=into, moments=torch.ones(2, 2, 2, device=DEVICE))
    double = torch.ones(2, 2, 1, device=DEVICE, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"moments is .*torch\.float64 on"):
        norm_silu_linear_step(**given, into=into, moments=double)
    weight, of_h = given.pop("weight"), torch.ones(2, 8)
    del given["bias"]
    with pytest.raises(ValueError, match=r"weight has shape \(4, 8\).*\(8, features\)"):
        linear_norm_silu_gradient(of_h, weight=weight, **given)
    with pytest.raises(ValueError, match="there is no skip"):
        linear_norm_silu_gradient(of_h, weight=weight.T, **given, of_skip=of_h)
    with pytest.raises(ValueError, match=r"into has strides \(1, 2\)"):
        linear_norm_silu_gradient(of_h, weight=weight.T, **given, into=torch.empty(4, 2).T)
    wrong = torch.ones(2, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"statistics is \(2, 4\), .* tells \(2, 2\)"):
        linear_norm_silu_gradient(of_h, weight=weight.T, **given, statistics=wrong)
    with pytest.raises(TypeError, match="of_h must be a floating-point tensor, got NoneType"):
        linear_norm_silu_gradient(None, weight=weight.T, **given)


def test_bad_types_are_named_in_jax() -> None:
    given = arrays_of("jax", inputs_of(2, 8, 4, False))
    with pytest.raises(TypeError, match=r"norm_bias must be a floating-point array, got int32"):
        jax_ops.norm_silu_linear(**{**given, "norm_bias": jnp.ones(8, jnp.int32)})
    with pytest.raises(TypeError, match=r"weight is float16; it must be float32 like x"):
        jax_ops.norm_silu_linear(**{**given, "weight": given["weight"].astype(jnp.float16)})
    with pytest.raises(TypeError, match="norm_weight must be a floating-point array, got None"):
        jax_ops.norm_silu_linear(**{**given, "norm_weight": None})
    of_h = jnp.ones((2, 8))
    with pytest.raises(ValueError, match=r"weight has shape \(4, 8\).*\(8, features\)"):
        jax_ops.linear_norm_silu_gradient(of_h, **{**of_linear(given), "weight": given["weight"]})
    with pytest.raises(ValueError, match=r"of_h has shape \(2, 7\)"):
        jax_ops.linear_norm_silu_gradient(of_h[:, 1:], **of_linear(given))


@pytest.mark.skipif(len(TORCH) > 1, reason="Triton kernels can run here")
def test_what_cannot_run_says_why() -> None:
    with pytest.raises(UnsupportedImplementationError, match="needs a GPU"):
        norm_silu_linear(**tensors_of(inputs_of(2, 8, 4, False)), implementation="triton")


def test_explain_and_usage_report_the_choice() -> None:
    name, hopper = "norm_silu_linear", device.target("sm_90")
    few, many = ({"rows": rows, "width": 1024, "features": 880} for rows in (64, 3200))
    for framework, plain, fused in (("torch", "torch", "triton"), ("jax", "xla", "pallas")):
        found = [explain(name, dims, framework=framework, device=hopper) for dims in (few, many)]
        assert [choice.implementation for choice in found] == [fused, plain]
    for dtype, direction, fits in (
        ("bfloat16", "backward", True),
        ("float32", "forward", True),
        ("float32", "backward", False),
    ):
        flags = {"skip": True}
        found = explain(name, few, dtype=dtype, direction=direction, flags=flags, device=hopper)
        assert found.implementation == ("triton" if fits else "torch")
        assert fits or "TF32" in found.why
    found = explain(name, few, framework="jax", device=device.target("tpu"))
    assert found.implementation == "xla"
    with record_usage() as usage:
        norm_silu_linear(**tensors_of(inputs_of(2, 8, 4, False)))
        arrays = arrays_of("jax", inputs_of(2, 8, 4, False))
        jax_ops.norm_silu_linear(**arrays)
        jax_ops.linear_norm_silu_gradient(arrays["x"], **of_linear(arrays))
    ran = [
        (row.op, row.implementation, row.direction, row.calls)
        for row in usage.rows
        if row.op == name
    ]
    assert ran == [
        (name, "torch", "forward", 1),
        (name, "xla", "forward", 1),
        (name, "xla", "backward", 1),
    ]


# torch


@pytest.mark.parametrize("skip", [False, True])
def test_gradcheck_twice(skip: bool) -> None:
    leaves = leaves_of(inputs_of(3, 5, 2, skip), torch.float64)

    def function(*values: torch.Tensor) -> Any:
        return norm_silu_linear(**dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(function, list(leaves.values()))
    assert torch.autograd.gradgradcheck(function, list(leaves.values()))


@pytest.mark.skipif(DEVICE == "cuda", reason="the plain path in the op is for a CPU")
@pytest.mark.parametrize("rows", [5, 0])
def test_the_custom_op_passes_opcheck(rows: int) -> None:
    for skip in (False, True):
        leaves = leaves_of(inputs_of(rows, 6, 4, skip))
        after = [leaves.get(name) for name in AFTER]
        first = [leaves[name] for name in ("x", "norm_weight", "norm_bias", "weight", "bias")]
        torch.library.opcheck(torch_op._forward_op, (*first, *after, 1e-5, None))


@pytest.mark.skipif(INTERPRETING, reason="torch.compile cannot trace the Triton interpreter")
@pytest.mark.parametrize("implementation", TORCH)
def test_compiles_whole_and_does_not_recompile_for_a_new_length(implementation: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(**values: torch.Tensor) -> torch.Tensor:
        y, h = norm_silu_linear(**values, eps=1e-5, implementation=implementation)
        return y.square().sum() + h.sum()

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for rows in (5, 9):
        leaves = leaves_of(inputs_of(rows, 8, 6, True))
        wanted = list(leaves.values())
        found = torch.autograd.grad(compiled(**leaves), wanted)
        torch.testing.assert_close(found, torch.autograd.grad(function(**leaves), wanted))
    assert counter.frame_count == 1


@pytest.mark.parametrize("implementation", TORCH)
def test_under_autocast_norms_keep_their_precision(implementation: str) -> None:
    given = tensors_of(inputs_of(4, 32, 16, True))
    exact = norm_silu_linear(**given, implementation="torch")
    half = {**given, "x": given["x"].bfloat16()}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y, h = norm_silu_linear(**half, implementation=implementation)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), exact[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(h, exact[1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("implementation", TORCH)
def test_transforms_of_torch_func(implementation: str) -> None:
    leaves = leaves_of(inputs_of(4, 6, 3, True))
    names = tuple(leaves)

    def size(*values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, values, strict=True))
        y, h = norm_silu_linear(**given, implementation=implementation)
        return y.square().sum() + h.sum()

    values = [value.detach() for value in leaves.values()]
    gradients = torch.func.grad(size, tuple(range(8)))(*values)
    wanted = list(leaves.values())
    torch.testing.assert_close(gradients, torch.autograd.grad(size(*wanted), wanted))


# JAX


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_transforms(implementation: str) -> None:
    inputs = arrays_of("jax", inputs_of(6, 8, 5, True))

    def loss(values: dict[str, jax.Array], name: str) -> jax.Array:
        y, h = jax_ops.norm_silu_linear(**values, implementation=name)
        return (y**3).sum() + (h**2).sum()

    assert_transforms(loss, inputs, "skip", implementation)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_transforms_of_the_gradient_for_loops(implementation: str, skip: bool) -> None:
    inputs = of_linear(arrays_of("jax", inputs_of(6, 8, 5, skip)))
    several = jnp.asarray(draw(2, 6, 8))

    def of(of_h: jax.Array, name: str = implementation, **values: jax.Array) -> list[jax.Array]:
        given = {**inputs, **values}
        found = jax_ops.linear_norm_silu_gradient(of_h, **given, implementation=name)
        return [value for value in found if value is not None]

    def size(values: dict[str, jax.Array], of_h: jax.Array, name: str) -> jax.Array:
        return sum((value**2).sum() for value in of(of_h, name, **values))

    with pallas.interpret():
        expected = [jax.jit(of)(of_h) for of_h in several]
        together = jax.jit(jax.vmap(of))(several)
        _, scanned = jax.lax.scan(lambda c, of_h: (c, of(of_h)), 0, several)
        (slopes, along), exact = (
            jax.jit(jax.grad(size, (0, 1)), static_argnums=2)(inputs, several[0], name)
            for name in (implementation, "xla")
        )
    for index, gradients in enumerate(expected):
        for found in (together, scanned):
            for value, alone in zip(found, gradients, strict=True):
                np.testing.assert_allclose(value[index], alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(along, exact[1], rtol=1e-3, atol=1e-4)
    for name, slope in slopes.items():
        np.testing.assert_allclose(slope, exact[0][name], rtol=1e-3, atol=1e-4, err_msg=name)


# The suite that lowers every kernel reaches a backward kernel through a derivative only.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("skip", [False, True])
def test_the_gradient_kernel_lowers(skip: bool, dtype: Any) -> None:
    inputs = of_linear(arrays_of("jax", inputs_of(21, 147, 29, skip)))
    given = {name: value.astype(dtype) for name, value in inputs.items()}

    def function(values: dict[str, jax.Array]) -> Any:
        of_h = values["x"]
        return jax_ops.linear_norm_silu_gradient(of_h, **values, implementation="pallas")

    text = pallas.lower(function, given, target_name="sm_90")
    assert "linear_norm_silu_gradient" in text
    assert "custom_call" in text
    with pytest.raises(UnsupportedImplementationError, match="TPU"):
        pallas.lower(function, given, target_name="tpu")
