"""Norm, SiLU, skip, norm and a linear layer beyond the conformance suite: the layers they replace,
the gradient for loops, results in place, edge values, errors, and each framework's transforms.

Triton kernels run where ``TRITON_INTERPRET=1`` is set or a GPU is found.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ml_networks.kernels import explain, record_usage  # noqa: E402
from ml_networks.kernels.core import device  # noqa: E402
from ml_networks.kernels.core.errors import UnsupportedImplementationError  # noqa: E402
from ml_networks.kernels.core.problem import Case  # noqa: E402
from ml_networks.kernels.norm_silu_linear import reference, torch_op  # noqa: E402
from ml_networks.kernels.torch import (  # noqa: E402
    linear_norm_silu_gradient,
    norm_silu_linear,
)

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = ["torch", "triton"] if INTERPRETING or DEVICE == "cuda" else ["torch"]
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


def assert_near(got: Any, exact: np.ndarray, name: str = "", within: float = 5e-5) -> None:
    got = got.detach().cpu().double().numpy()
    assert np.abs(got - exact).max() <= within * (np.abs(exact).max() + 1.0), name


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("implementation", TORCH)
def test_equals_the_layers_it_replaces(implementation: str, skip: bool) -> None:
    inputs, of_y, of_h = inputs_of(6, 24, 10, skip), draw(6, 10), draw(6, 24)
    leaves = leaves_of(inputs)
    y, h = norm_silu_linear(**leaves, implementation=implementation)
    cotangents = [torch.from_numpy(value).to(DEVICE) for value in (of_y, of_h)]
    found = torch.autograd.grad((y, h), list(leaves.values()), cotangents)
    x = leaves["x"]
    layer_norm, size = torch.nn.functional.layer_norm, (24,)
    value = layer_norm(x, size, leaves["norm_weight"], leaves["norm_bias"])
    value = torch.nn.functional.silu(value)
    if skip:
        value = layer_norm(value + leaves["skip"], size, *(leaves[name] for name in AFTER[1:]))
    result = torch.nn.functional.linear(value, leaves["weight"], leaves["bias"])
    exact = torch.autograd.grad((result, value), list(leaves.values()), cotangents)
    torch.testing.assert_close((y, h), (result, value), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("implementation", TORCH)
def test_the_gradient_for_loops_equals_the_reference(implementation: str, skip: bool) -> None:
    inputs, of_h = inputs_of(19, 37, 21, skip), draw(19, 37)
    exact = reference.linear_norm_silu_gradient(inputs, of_h.astype(np.float64), skip=skip)
    given = tensors_of(inputs)
    weight = given.pop("weight").T
    del given["bias"]
    cotangent = torch.from_numpy(of_h).to(DEVICE)

    def call(**results: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return linear_norm_silu_gradient(
            cotangent, weight=weight, **given, **results, implementation=implementation
        )

    of_u, of_skip = call()
    # In place: added to a slice of wider rows, and what is around it stays.
    wide = torch.ones(19, 30, device=DEVICE)
    into = wide[:, 4:25]
    placed = {"into": into}
    if skip:
        placed["of_skip"] = torch.full((19, 50), float("nan"), device=DEVICE)[:, :37]
    again, of_skip_again = call(**placed)
    assert again is into
    assert (wide[:, :4] == 1).all()
    assert (wide[:, 25:] == 1).all()
    assert_near(of_u, exact["input"], "input")
    assert_near(into - 1.0, exact["input"], "into")
    if skip:
        assert_near(of_skip, exact["skip"], "skip")
        assert of_skip_again is placed["of_skip"]
        assert_near(of_skip_again, exact["skip"], "of_skip")
    else:
        assert of_skip is None
        assert of_skip_again is None


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("implementation", TORCH)
def test_results_go_where_they_are_wanted(implementation: str, skip: bool) -> None:
    given = tensors_of(inputs_of(5, 18, 11, skip))
    y, h = norm_silu_linear(**given, implementation="torch")
    wide = torch.zeros(5, 20, device=DEVICE)
    target, inner = wide[:, 3:14], torch.empty(5, 18, device=DEVICE, dtype=torch.float64)
    out = norm_silu_linear(**given, out=(target, inner), implementation=implementation)
    assert out[0] is target
    assert out[1] is inner
    torch.testing.assert_close(target, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inner.float(), h, rtol=1e-4, atol=1e-5)
    assert not wide[:, :3].any()
    assert not wide[:, 14:].any()
    alone = torch.empty_like(y)
    assert norm_silu_linear(**given, out=(alone, None), implementation=implementation)[1] is None
    torch.testing.assert_close(alone, y, rtol=1e-4, atol=1e-5)


# What the kernel takes off before it sums keeps large levels from cancelling.
@pytest.mark.parametrize("implementation", TORCH)
@pytest.mark.parametrize("level", [30.0, 1000.0])
def test_rows_far_from_zero_keep_their_accuracy(implementation: str, level: float) -> None:
    inputs = inputs_of(7, 200, 9, True)
    inputs["x"] += np.float32(level)
    inputs["skip"] -= np.float32(level)
    of_h = draw(7, 200)
    exact = reference.forward(inputs, skip=True)
    exact |= reference.linear_norm_silu_gradient(inputs, of_h.astype(np.float64), skip=True)
    given = tensors_of(inputs)
    y, _ = norm_silu_linear(**given, implementation=implementation)
    weight = given.pop("weight").T
    del given["bias"]
    of_h = torch.from_numpy(of_h).to(DEVICE)
    of_u, of_skip = linear_norm_silu_gradient(
        of_h, weight=weight, **given, implementation=implementation
    )
    # float32 holds these elements to 2^-24 of the level.
    within = 2e-5 + level * 2e-7
    assert_near(y, exact["y"], "y", within)
    assert_near(of_u, exact["input"], "input", within)
    assert_near(of_skip, exact["skip"], "skip", within)


# The Triton interpreter computes inf - inf in NumPy, which warns.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("implementation", TORCH)
def test_nan_and_infinity_stay_in_their_row(implementation: str) -> None:
    given = tensors_of(inputs_of(6, 20, 5, True))
    given["x"][1, 2], given["skip"][4, 3] = float("nan"), float("inf")
    y, h = norm_silu_linear(**given, implementation=implementation)
    weight = given.pop("weight").T
    del given["bias"]
    of_h = torch.ones(6, 20, device=DEVICE)
    found = linear_norm_silu_gradient(of_h, weight=weight, **given, implementation=implementation)
    for value in (y, h, *found):
        assert value is not None
        assert value[[1, 4]].isnan().all()
        assert value[[0, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("implementation", TORCH)
def test_no_rows(implementation: str, skip: bool) -> None:
    inputs = inputs_of(1, 8, 3, skip)
    empty = {name: np.zeros((2, 0, 8), np.float32) for name in ("x", "skip") if name in inputs}
    leaves = leaves_of({**inputs, **empty})
    y, h = norm_silu_linear(**leaves, implementation=implementation)
    assert (y.shape, h.shape) == ((2, 0, 3), (2, 0, 8))
    found = torch.autograd.grad(y.sum() + h.sum(), list(leaves.values()))
    assert not any(value.any() for value in found)


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


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_for_loops_is_as_exact_as_the_plain_path(dtype: Any) -> None:
    inputs, of_h = inputs_of(21, 147, 29, True), draw(21, 147)
    given = {name: value.to(dtype) for name, value in tensors_of(inputs).items()}
    rounded = {name: value.double().cpu().numpy() for name, value in given.items()}
    cotangent = torch.from_numpy(of_h).to(DEVICE, dtype)
    exact = reference.linear_norm_silu_gradient(
        rounded, cotangent.double().cpu().numpy(), skip=True
    )
    weight = given.pop("weight").T
    del given["bias"]
    errors = {}
    for implementation in ("torch", "triton"):
        found = linear_norm_silu_gradient(
            cotangent, weight=weight, **given, implementation=implementation
        )
        errors[implementation] = [
            np.abs(value.double().cpu().numpy() - exact[name]).max() / np.abs(exact[name]).max()
            for name, value in zip(("input", "skip"), found, strict=True)
        ]
    rounding = 8 * torch.finfo(dtype).eps
    for plain, fused in zip(errors["torch"], errors["triton"], strict=True):
        assert fused <= 2 * plain + rounding


@pytest.mark.parametrize("implementation", TORCH)
def test_repeated_calls_give_the_same_bits(implementation: str) -> None:
    given = tensors_of(inputs_of(40, 33, 20, True))
    first, second = (norm_silu_linear(**given, implementation=implementation) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


BAD = [
    ({"norm_weight": np.ones(7, np.float32)}, r"norm_weight has shape \(7,\)"),
    ({"weight": np.ones((4, 9), np.float32)}, r"weight has shape \(4, 9\).*\(features, 8\)"),
    ({"bias": np.ones(5, np.float32)}, r"bias has shape \(5,\); here it must be \(4,\)"),
    ({"skip": np.ones((2, 9), np.float32)}, r"skip has shape \(2, 9\)"),
    ({"skip_bias": None}, "skip_bias is missing: skip, skip_weight, skip_bias go together"),
    ({"x": np.ones((2, 0), np.float32)}, "at least one element"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {**inputs_of(2, 8, 4, True), **options}
    given = {k: None if v is None else torch.from_numpy(v) for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        norm_silu_linear(**given)


def test_bad_types_and_results_are_named() -> None:
    given = tensors_of(inputs_of(2, 8, 4, False))
    with pytest.raises(TypeError, match=r"norm_bias must be .*got torch\.int64"):
        norm_silu_linear(**{**given, "norm_bias": torch.ones(8, dtype=torch.int64)})
    with pytest.raises(TypeError, match=r"weight is torch\.float16; it must be torch\.float32"):
        norm_silu_linear(**{**given, "weight": given["weight"].half()})
    with pytest.raises(ValueError, match=r"y has shape \(2, 5\); here it must be \(2, 4\)"):
        norm_silu_linear(**given, out=(torch.empty(2, 5), None))
    weight, of_h = given.pop("weight"), torch.ones(2, 8)
    del given["bias"]
    with pytest.raises(ValueError, match=r"weight has shape \(4, 8\).*\(8, features\)"):
        linear_norm_silu_gradient(of_h, weight=weight, **given)
    with pytest.raises(ValueError, match="there is no skip"):
        linear_norm_silu_gradient(of_h, weight=weight.T, **given, of_skip=of_h)
    with pytest.raises(TypeError, match="of_h must be a floating-point tensor, got NoneType"):
        linear_norm_silu_gradient(None, weight=weight.T, **given)


@pytest.mark.skipif(len(TORCH) > 1, reason="Triton kernels can run here")
def test_what_cannot_run_says_why() -> None:
    with pytest.raises(UnsupportedImplementationError, match="needs a GPU"):
        norm_silu_linear(**tensors_of(inputs_of(2, 8, 4, False)), implementation="triton")


def test_explain_and_usage_report_the_choice() -> None:
    name, hopper = "norm_silu_linear", device.target("sm_90")
    few, many = ({"rows": rows, "width": 1024, "features": 880} for rows in (64, 3200))
    assert explain(name, few, device=hopper).implementation == "triton"
    assert explain(name, many, device=hopper).implementation == "torch"
    with record_usage() as usage:
        norm_silu_linear(**tensors_of(inputs_of(2, 8, 4, False)))
    ran = [(row.op, row.implementation, row.calls) for row in usage.rows]
    assert (name, "torch", 1) in ran


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
