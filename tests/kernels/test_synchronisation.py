"""Synchronisation beyond the conformance suite: steps against scans, edge values, errors, and each
framework's transforms.

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
from ml_networks.kernels.core.problem import Case  # noqa: E402
from ml_networks.kernels.jax import synchronisation as jax_synchronisation  # noqa: E402
from ml_networks.kernels.synchronisation import reference, spec, torch_op  # noqa: E402
from ml_networks.kernels.torch import synchronisation as torch_synchronisation  # noqa: E402
from tests.kernels.jax_transforms import assert_transforms  # noqa: E402

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = ["torch", "triton"] if INTERPRETING or DEVICE == "cuda" else ["torch"]
EVERY = [*(("torch", name) for name in TORCH), ("jax", "xla"), ("jax", "pallas")]
KERNELS = [where for where in EVERY if where[1] in ("triton", "pallas")]
Given = dict[str, np.ndarray]


def inputs_of(*sizes: int, previous: bool = False, seed: int = 0) -> Given:
    """For ticks, batch, neurons and pairs."""
    case = Case("", "small", dict(zip(spec.DIMENSIONS, sizes, strict=True)))
    drawn = reference.make_inputs(case, seed)
    if not previous:
        del drawn["previous"]
    kinds = {"f": np.float32, "i": np.int32}
    return {name: value.astype(kinds[value.dtype.kind]) for name, value in drawn.items()}


def draw(*shape: int, seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def leaves_of(inputs: Given, dtype: Any = torch.float32) -> dict[str, torch.Tensor]:
    tensors = {name: torch.from_numpy(value).to(DEVICE) for name, value in inputs.items()}
    return {
        name: value.to(dtype).requires_grad_() if value.is_floating_point() else value
        for name, value in tensors.items()
    }


def floating(leaves: dict[str, Any]) -> list[Any]:
    return [value for name, value in leaves.items() if name not in ("left", "right")]


def run(where: tuple[str, str], inputs: Given, cotangent: np.ndarray, **options: Any) -> Given:
    """``s`` and the gradients."""
    framework, implementation = where
    names = [name for name in inputs if name not in ("left", "right")]
    if framework == "torch":
        leaves = leaves_of(inputs)
        s = torch_synchronisation(**leaves, **options, implementation=implementation)
        of_s = torch.from_numpy(cotangent).to(DEVICE)
        found = dict(zip(names, torch.autograd.grad(s, floating(leaves), of_s), strict=True))
        return {k: v.detach().cpu().numpy() for k, v in {"s": s, **found}.items()}
    arrays = {name: jnp.asarray(value) for name, value in inputs.items()}

    def function(values: dict[str, jax.Array]) -> jax.Array:
        return jax_synchronisation(
            **{**arrays, **values}, **options, implementation=implementation
        )

    with pallas.interpret():
        s, pull = jax.vjp(function, {name: arrays[name] for name in names})
        (found,) = pull(jnp.asarray(cotangent))
    return {"s": np.asarray(s), **{name: np.asarray(value) for name, value in found.items()}}


def check(got: Given, inputs: Given, of_s: np.ndarray, elapsed: int = 0) -> None:
    """``got`` against float64, relative to the largest of each."""
    exact = reference.forward(inputs, elapsed=elapsed)
    exact |= reference.backward(inputs, {"s": of_s}, elapsed=elapsed)
    for name, value in got.items():
        off = np.abs(value - exact[name]).max() / (np.abs(exact[name]).max() or 1.0)
        assert off < 2e-5, (name, off)


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_nothing_before(where: tuple[str, str]) -> None:
    inputs, of_s = inputs_of(5, 3, 7, 6), draw(5, 3, 6)
    check(run(where, inputs, of_s), inputs, of_s)


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_steps_are_the_scan(where: tuple[str, str]) -> None:
    """In values and, through ``previous``, in gradients."""
    inputs, of_s = inputs_of(3, 2, 7, 6), draw(3, 2, 6)
    whole = run(where, inputs, of_s)
    framework, implementation = where
    function: Any = torch_synchronisation if framework == "torch" else jax_synchronisation

    def steps(activations: Any, decay: Any, pairs: Any) -> list[Any]:
        found: list[Any] = []
        for tick in range(3):
            found.append(
                function(
                    activations[tick : tick + 1],
                    *pairs,
                    decay,
                    previous=found[-1][0] if tick else None,
                    elapsed=tick,
                    implementation=implementation,
                )
            )
        return found

    if framework == "torch":
        leaves = leaves_of(inputs)
        pairs = leaves["left"], leaves["right"]
        s = torch.cat(steps(leaves["activations"], leaves["decay"], pairs))
        gradients = torch.autograd.grad(s, floating(leaves), torch.from_numpy(of_s).to(DEVICE))
        found = [value.detach().cpu().numpy() for value in (s, *gradients)]
    else:
        arrays = {name: jnp.asarray(value) for name, value in inputs.items()}
        pairs = arrays["left"], arrays["right"]
        with pallas.interpret():
            s, pull = jax.vjp(
                lambda *given: jnp.concatenate(steps(*given, pairs)), *floating(arrays)
            )
            found = [s, *pull(jnp.asarray(of_s))]
    for value, exact in zip(found, whole.values(), strict=True):
        np.testing.assert_allclose(value, exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_a_neuron_in_every_pair(where: tuple[str, str]) -> None:
    """All pairs of three neurons, as the selection "first-last" has them."""
    inputs, of_s = inputs_of(4, 2, 5, 6), draw(4, 2, 6)
    left, right = np.triu_indices(3)
    inputs |= {"left": left.astype(np.int32), "right": right.astype(np.int32)}
    got = run(where, inputs, of_s)
    check(got, inputs, of_s)
    assert not got["activations"][..., 3:].any()


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_nan_stays_with_its_pairs_from_its_tick_on(where: tuple[str, str]) -> None:
    inputs, of_s = inputs_of(5, 3, 6, 4), np.ones((5, 3, 4), np.float32)
    inputs |= {"left": np.int32([0, 1, 2, 2]), "right": np.int32([0, 1, 3, 0])}
    inputs["decay"] = np.full(4, 0.5, np.float32)
    inputs["activations"][2, 1, 0] = np.nan
    got = run(where, inputs, of_s)
    assert np.isnan(got["s"][2:, 1, [0, 3]]).all()
    assert np.isnan(got["s"]).sum() == 6
    # Only the factors of the one that is not a number see it.
    assert np.isnan(got["activations"][2, 1, [0, 2]]).all()
    assert np.isnan(got["activations"]).sum() == 2


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_no_samples(where: tuple[str, str]) -> None:
    inputs = inputs_of(3, 0, 7, 6)
    got = run(where, inputs, np.zeros((3, 0, 6), np.float32))
    assert got["s"].shape == (3, 0, 6)
    assert got["activations"].shape == (3, 0, 7)
    assert not got["decay"].any()


@pytest.mark.parametrize("where", KERNELS, ids="-".join)
def test_repeated_calls_give_the_same_bits(where: tuple[str, str]) -> None:
    inputs, of_s = inputs_of(4, 6, 9, 40), draw(4, 6, 40)
    first, second = (run(where, inputs, of_s) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_the_wider_dtype_wins(framework: str) -> None:
    inputs = inputs_of(2, 3, 7, 6)
    if framework == "torch":
        leaves = leaves_of(inputs)
        halved = {**leaves, "activations": leaves["activations"].bfloat16()}
        assert torch_synchronisation(**halved).dtype == torch.float32
    else:
        halved = {**inputs, "activations": jnp.asarray(inputs["activations"], jnp.bfloat16)}
        assert jax_synchronisation(**halved).dtype == jnp.float32


@pytest.mark.skipif(len(TORCH) == 1, reason="needs TRITON_INTERPRET=1 or a GPU")
@settings(max_examples=8)
@given(data=st.data())
def test_triton_equals_the_reference_for_any_shape_and_stride(data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, most)) for most in (9, 3, 30, 20)]
    elapsed, step = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    ticks, batch, neurons, pairs = sizes
    inputs = inputs_of(*sizes, previous=elapsed > 0)
    leaves = leaves_of(inputs)
    wide = torch.full((batch, ticks, neurons * step), float("nan"), device=DEVICE)
    view = wide.transpose(0, 1)[..., ::step]
    view.copy_(leaves["activations"].detach())
    leaves["activations"] = view.requires_grad_()
    s = torch_synchronisation(**leaves, elapsed=elapsed, implementation="triton")
    of_s = torch.from_numpy(draw(pairs, batch, ticks)).to(DEVICE).permute(2, 1, 0)
    found = [s, *torch.autograd.grad(s, floating(leaves), of_s)]
    names = ["s", *(name for name in inputs if name not in ("left", "right"))]
    got = {n: v.detach().cpu().numpy() for n, v in zip(names, found, strict=True)}
    check(got, inputs, of_s.cpu().numpy(), elapsed)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"activations": np.ones((2, 7), np.float32)}, r"activations has shape \(2, 7\)"),
    ({"activations": np.ones((0, 3, 7), np.float32)}, "at least one tick"),
    ({"left": np.ones((1, 6), np.int32)}, r"left has shape \(1, 6\)"),
    ({"right": np.ones(5, np.int32)}, r"right has shape \(5,\)"),
    ({"decay": np.ones(5, np.float32)}, r"decay has shape \(5,\)"),
    ({"previous": np.ones((2, 6), np.float32), "elapsed": 1}, r"it must be \(3, 6\)|here it must"),
    ({"elapsed": -1}, "elapsed is -1"),
    ({"elapsed": 2}, "give previous"),
    ({"previous": np.ones((3, 6), np.float32)}, "elapsed is 0 and previous is given"),
]


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_named(framework: str, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {**inputs_of(2, 3, 7, 6), **options}
    function: Any = jax_synchronisation
    if framework == "torch":
        function = torch_synchronisation
        arguments = {
            k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v
            for k, v in arguments.items()
        }
    with pytest.raises(ValueError, match=message):
        function(**arguments)


def test_bad_types_are_named() -> None:
    inputs = inputs_of(2, 3, 7, 6)
    leaves = leaves_of(inputs)
    with pytest.raises(TypeError, match=r"left must be a tensor of int32 or int64, got torch\.fl"):
        torch_synchronisation(**{**leaves, "left": torch.ones(6)})
    with pytest.raises(TypeError, match=r"decay must be a floating-point tensor, got torch\.int"):
        torch_synchronisation(**{**leaves, "decay": torch.ones(6, dtype=torch.int64)})
    with pytest.raises(TypeError, match="right must be an array of integers, got float32"):
        jax_synchronisation(**{**inputs, "right": jnp.ones(6)})
    with pytest.raises(TypeError, match="activations must be a floating-point array, got int32"):
        jax_synchronisation(**{**inputs, "activations": jnp.ones((2, 3, 7), jnp.int32)})


def test_explain_and_usage_report_the_choice() -> None:
    name = "synchronisation"
    dims = dict(zip(spec.DIMENSIONS, (50, 64, 1024, 128), strict=True))
    hopper, step = device.target("sm_90"), {**dims, "ticks": 1}
    assert explain(name, dims, device=hopper).implementation == "triton"
    assert explain(name, dims, framework="jax", device=hopper).implementation == "pallas"
    assert explain(name, step, framework="jax", device=hopper).implementation == "xla"
    with record_usage() as usage:
        torch_synchronisation(**leaves_of(inputs_of(2, 3, 7, 6)))
        jax_synchronisation(**inputs_of(2, 3, 7, 6))
    ran = [(row.op, row.implementation, row.calls) for row in usage.rows]
    assert ran == [(name, "torch", 1), (name, "xla", 1)]


# torch


@pytest.mark.parametrize("elapsed", [0, 3])
def test_gradcheck_twice(elapsed: int) -> None:
    leaves = leaves_of(inputs_of(3, 2, 5, 4, previous=elapsed > 0), torch.float64)
    with torch.no_grad():
        leaves["decay"].add_(0.1)

    def function(activations: torch.Tensor, decay: torch.Tensor, *previous: Any) -> torch.Tensor:
        pairs = leaves["left"], leaves["right"]
        before = previous[0] if previous else None
        return torch_synchronisation(activations, *pairs, decay, previous=before, elapsed=elapsed)

    assert torch.autograd.gradcheck(function, floating(leaves))
    assert torch.autograd.gradgradcheck(function, floating(leaves))


@pytest.mark.skipif(DEVICE == "cuda", reason="the plain path in the op is for a CPU")
@pytest.mark.parametrize("elapsed", [0, 3])
@pytest.mark.parametrize("batch", [2, 0])
def test_custom_ops_pass_opcheck(batch: int, elapsed: int) -> None:
    inputs = leaves_of(inputs_of(3, batch, 5, 4, previous=elapsed > 0))
    given = [inputs.get(name) for name in ("activations", "left", "right", "decay", "previous")]
    torch.library.opcheck(torch_op._forward_op, (*given, elapsed, None))
    with torch.no_grad():
        s, scale = torch_op._forward_op(*given, elapsed, None)
    of_s = torch.from_numpy(draw(3, batch, 4)).requires_grad_()
    torch.library.opcheck(torch_op._backward_op, (*given, s, scale, of_s, elapsed, None))


@pytest.mark.parametrize("elapsed", [0, 3])
def test_the_backward_op_equals_autograd_and_can_be_differentiated(elapsed: int) -> None:
    inputs = leaves_of(inputs_of(3, 2, 5, 4, previous=elapsed > 0), torch.float64)
    given = [inputs.get(name) for name in ("activations", "left", "right", "decay", "previous")]
    wanted = floating(inputs)
    s, scale = torch_op._forward_op(*given, elapsed, None)
    # A cotangent that depends on the inputs, as in any loss that is not linear.
    of_s = torch.from_numpy(draw(3, 2, 4)).double() * wanted[0].sum() * wanted[1].sum()
    plain = torch_op._plain(*given, elapsed)
    expected = torch.autograd.grad(plain, wanted, of_s, create_graph=True)
    found = torch_op._backward_op(*given, s, scale, of_s, elapsed, None)[: len(wanted)]
    torch.testing.assert_close(found, expected)
    loss, exact = (sum(value.square().sum() for value in all_) for all_ in (found, expected))
    second = torch.autograd.grad(loss, wanted, retain_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(exact, wanted))


@pytest.mark.skipif(INTERPRETING, reason="torch.compile cannot trace the Triton interpreter")
@pytest.mark.parametrize("implementation", TORCH)
def test_compiles_whole_and_does_not_recompile_for_a_new_batch(implementation: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(*values: torch.Tensor) -> torch.Tensor:
        return torch_synchronisation(*values, implementation=implementation).square().sum()

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for batch in (5, 9):
        leaves = leaves_of(inputs_of(4, batch, 7, 6))
        found = torch.autograd.grad(compiled(*leaves.values()), floating(leaves))
        exact = torch.autograd.grad(function(*leaves.values()), floating(leaves))
        torch.testing.assert_close(found, exact)
    assert counter.frame_count == 1


@pytest.mark.parametrize("implementation", TORCH)
def test_autocast_changes_nothing(implementation: str) -> None:
    leaves = leaves_of(inputs_of(4, 2, 7, 6))
    exact = torch_synchronisation(**leaves, implementation=implementation)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(torch_synchronisation(**leaves, implementation=implementation), exact)


@pytest.mark.parametrize("implementation", TORCH)
def test_transforms_of_torch_func(implementation: str) -> None:
    leaves = leaves_of(inputs_of(4, 3, 7, 6))
    pairs = leaves["left"], leaves["right"]

    def size(activations: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        s = torch_synchronisation(activations, *pairs, decay, implementation=implementation)
        return s.square().sum()

    wanted = floating(leaves)
    gradients = torch.func.grad(size, (0, 1))(*(value.detach() for value in wanted))
    torch.testing.assert_close(gradients, torch.autograd.grad(size(*wanted), wanted))


# JAX


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_transforms(implementation: str) -> None:
    inputs = {k: jnp.asarray(v) for k, v in inputs_of(5, 2, 7, 6, previous=True).items()}
    pairs = {name: inputs.pop(name) for name in ("left", "right")}

    def loss(values: dict[str, jax.Array], name: str) -> jax.Array:
        return (jax_synchronisation(**values, **pairs, elapsed=2, implementation=name) ** 3).sum()

    assert_transforms(loss, inputs, "activations", implementation)
