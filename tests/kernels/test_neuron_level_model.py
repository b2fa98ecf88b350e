"""The neuron-level model beyond the conformance suite: histories in place, all ticks at once, the
gradients as functions, edge values, errors, and each framework's transforms.

Triton kernels run where ``TRITON_INTERPRET=1`` is set or a GPU is found.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402

from ml_networks.kernels import explain  # noqa: E402
from ml_networks.kernels.core import device, dispatch, pallas, testing, usage  # noqa: E402
from ml_networks.kernels.core.errors import UnsupportedImplementationError  # noqa: E402
from ml_networks.kernels.core.problem import Case  # noqa: E402
from ml_networks.kernels.jax import neuron_level_model as jax_model  # noqa: E402
from ml_networks.kernels.jax import neuron_level_model_at_tick as at_tick  # noqa: E402
from ml_networks.kernels.jax import (  # noqa: E402
    neuron_level_model_trace_gradient as jax_trace_gradient,
)
from ml_networks.kernels.jax import (  # noqa: E402
    neuron_level_model_weight_gradient as jax_weight_gradient,
)
from ml_networks.kernels.neuron_level_model import reference, spec, torch_op  # noqa: E402
from ml_networks.kernels.torch import (  # noqa: E402
    neuron_level_model,
    neuron_level_model_trace_gradient,
    neuron_level_model_weight_gradient,
)

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = ["torch", "triton"] if INTERPRETING or DEVICE == "cuda" else ["torch"]
EVERY = [*(("torch", name) for name in TORCH), ("jax", "xla"), ("jax", "pallas")]
Given = dict[str, np.ndarray]
WEIGHTS = ("weight1", "bias1", "weight2", "bias2")
each = pytest.mark.parametrize("implementation", TORCH)
both_forms = pytest.mark.parametrize("hidden", [5, 0], ids=["deep", "shallow"])


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def inputs_of(rows: int = 6, neurons: int = 5, memory: int = 7, hidden: int = 5) -> Given:
    sizes = rows, neurons, memory, hidden
    case = Case("asked", "ragged", dict(zip(spec.DIMENSIONS, sizes, strict=True)))
    return {k: v.astype(np.float32) for k, v in reference.make_inputs(case, 3).items()}


def tensors_of(inputs: Given, dtype: Any = torch.float32) -> dict[str, Any]:
    """The traces, a view of the history, and the weights."""
    tensors = {k: torch.from_numpy(v).to(DEVICE, dtype) for k, v in inputs.items()}
    return {"trace": tensors.pop("history").permute(1, 2, 0), **tensors}


def run(where: tuple[str, str], inputs: Given, of_z: np.ndarray | None = None) -> Given:
    """``z`` and, for a cotangent, the gradients of all inputs."""
    framework, implementation = where
    if framework == "torch":
        leaves = {k: torch.from_numpy(v).to(DEVICE).requires_grad_() for k, v in inputs.items()}
        z = torch_op.BINDING.call(leaves, {}, implementation)["z"]
        results = {"z": z}
        if of_z is not None:
            cotangent = torch.from_numpy(of_z).to(DEVICE)
            found = torch.autograd.grad(z, list(leaves.values()), cotangent)
            results |= dict(zip(leaves, found, strict=True))
        return {name: value.detach().cpu().numpy() for name, value in results.items()}

    def function(values: dict[str, jax.Array]) -> jax.Array:
        trace = values["history"].transpose(1, 2, 0)
        weights = {k: v for k, v in values.items() if k != "history"}
        return jax_model(trace, **weights, implementation=implementation)

    with pallas.interpret():
        z, pull = jax.vjp(function, {k: jnp.asarray(v) for k, v in inputs.items()})
        found = {} if of_z is None else pull(jnp.asarray(of_z))[0]
    return {"z": np.asarray(z), **{name: np.asarray(value) for name, value in found.items()}}


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_longer_memories_and_wider_layers_than_a_block(where: tuple[str, str]) -> None:
    inputs, of_z = inputs_of(20, 3, 40, 20), draw(20, 3)
    got = run(where, inputs, of_z)
    exact = reference.forward(inputs) | reference.backward(inputs, {"z": of_z})
    for name, value in got.items():
        np.testing.assert_allclose(value, exact[name], rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_no_rows_and_what_is_not_finite(where: tuple[str, str]) -> None:
    inputs = inputs_of()
    empty = {**inputs, "history": np.zeros((7, 0, 5), np.float32)}
    got = run(where, empty, np.zeros((0, 5), np.float32))
    assert got["z"].shape == (0, 5)
    assert not got["weight1"].any()
    assert not got["bias2"].any()
    inputs["history"][2, 3, 1] = np.nan
    z = run(where, inputs)["z"]
    assert np.isnan(z[3, 1])
    assert np.isnan(z).sum() == 1


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_a_neuron_that_cannot_fit_is_refused_with_the_reason(where: tuple[str, str]) -> None:
    for sizes, reason in (((65, 2), "memory is 65"), ((3, 129), "hidden is 129")):
        inputs = inputs_of(2, 2, *sizes)
        if where[1] in ("triton", "pallas"):
            with pytest.raises(UnsupportedImplementationError, match=reason):
                run(where, inputs)
        else:
            exact = reference.forward(inputs)["z"]
            np.testing.assert_allclose(run(where, inputs)["z"], exact, rtol=1e-4, atol=1e-5)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"trace": np.ones(7, np.float32)}, r"trace has shape \(7,\)"),
    ({"weight1": np.ones((5, 6, 10), np.float32)}, r"\(neurons, memory, 2 \* hidden\)"),
    ({"bias1": np.ones((5, 5), np.float32)}, r"it must be \(5, 10\)"),
    ({"bias2": None}, "belong together"),
    ({"weight2": None, "bias2": None}, "there is no weight2"),
]


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_arguments_are_named(framework: str, wrong: dict[str, Any], message: str) -> None:
    inputs = inputs_of()
    given: dict[str, Any] = {"trace": inputs.pop("history").transpose(1, 2, 0), **inputs, **wrong}
    function: Callable[..., Any] = jax_model
    if framework == "torch":
        function = neuron_level_model
        given = {k: v if v is None else torch.from_numpy(v.copy()) for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        function(**given)


def test_wrong_types_are_refused() -> None:
    tensors = tensors_of(inputs_of())
    with pytest.raises(TypeError, match=r"trace is torch\.float32"):
        neuron_level_model(**tensors | {"weight1": tensors["weight1"].half()})
    with pytest.raises(ValueError, match=r"of_z has shape \(6, 4\)"):
        neuron_level_model_trace_gradient(torch.ones(6, 4, device=DEVICE), **tensors)
    into = torch.ones(6, device=DEVICE)
    with pytest.raises(ValueError, match=r"into has shape \(6,\)"):
        neuron_level_model_trace_gradient(torch.ones(6, 5, device=DEVICE), **tensors, into=into)
    with pytest.raises(TypeError, match="floating-point array, got int32"):
        jax_model(jnp.ones((2, 5, 7), jnp.int32), jnp.ones((5, 7, 2)), jnp.ones((5, 2)))


def test_the_choice_says_why() -> None:
    dims = dict(zip(spec.DIMENSIONS, (64, 1024, 25, 32), strict=True))
    for direction in spec.DIRECTIONS:
        chosen = explain(
            spec.NAME, dims, direction=direction, device=device.target("sm_90"), dtype="bfloat16"
        )
        assert (chosen.implementation, chosen.why[:10]) == ("triton", "one kernel")
    on_tpu = explain(spec.NAME, dims, framework="jax", device=device.target("tpu"))
    assert on_tpu.implementation == "xla"


# torch


@each
@both_forms
def test_all_ticks_of_a_history_at_once(implementation: str, hidden: int) -> None:
    """What a loop over ticks does by hand, against autograd through the plain path."""
    ticks, rows, neurons, memory = 4, 3, 5, 6
    inputs = inputs_of(rows, neurons, memory, hidden)
    weights = [torch.from_numpy(inputs[k]).to(DEVICE) for k in WEIGHTS if k in inputs]
    history = torch.from_numpy(draw(ticks + memory - 1, rows, neurons)).to(DEVICE)
    leaves = [value.clone().requires_grad_() for value in (history, *weights)]
    z = neuron_level_model(leaves[0].unfold(0, memory, 1), *leaves[1:], implementation="torch")
    of_z = torch.from_numpy(draw(neurons, ticks, rows)).to(DEVICE).permute(1, 2, 0)
    of_history, *of_weights = torch.autograd.grad(z, leaves, of_z)

    traces = history.unfold(0, memory, 1)
    assert traces.reshape(ticks * rows, neurons, memory).data_ptr() == history.data_ptr()
    at_once = neuron_level_model(traces, *weights, implementation=implementation)
    torch.testing.assert_close(at_once, z.detach())
    found = neuron_level_model_weight_gradient(
        of_z, traces, *weights, implementation=implementation
    )
    torch.testing.assert_close(list(found), of_weights)
    total = torch.zeros_like(history)
    for tick in reversed(range(ticks)):
        window = slice(tick, tick + memory)
        trace, into = (x[window].permute(1, 2, 0) for x in (history, total))
        result = neuron_level_model_trace_gradient(
            of_z[tick], trace, *weights, into=into, implementation=implementation
        )
        assert result is into
    torch.testing.assert_close(total, of_history)
    alone = neuron_level_model_trace_gradient(
        of_z, traces, *weights, implementation=implementation
    )
    assert alone.shape == traces.shape
    trace = history[:memory].permute(1, 2, 0)
    first = neuron_level_model_trace_gradient(of_z[0], trace, *weights)
    torch.testing.assert_close(alone[0], first)


@each
def test_gradients_add_up_in_float32(implementation: str) -> None:
    tensors = tensors_of(inputs_of(), torch.bfloat16)
    of_z = torch.from_numpy(draw(6, 5)).to(DEVICE, torch.bfloat16)
    into = torch.full((6, 5, 7), 1000.0, device=DEVICE)
    neuron_level_model_trace_gradient(of_z, **tensors, into=into, implementation=implementation)
    exact = {k: v.float() for k, v in tensors.items()}
    expected = neuron_level_model_trace_gradient(of_z.float(), **exact, implementation="torch")
    torch.testing.assert_close(into - 1000, expected, rtol=0.05, atol=0.02)


@each
def test_a_gradient_may_be_of_another_dtype_and_results_go_where_they_are_wanted(
    implementation: str,
) -> None:
    tensors = tensors_of(inputs_of(), torch.bfloat16)
    of_z = torch.from_numpy(draw(6, 5)).to(DEVICE)
    own, other = (
        neuron_level_model_trace_gradient(
            gradient,
            **tensors,
            into=torch.zeros(6, 5, 7, device=DEVICE),
            implementation=implementation,
        )
        for gradient in (of_z.bfloat16(), of_z)
    )
    torch.testing.assert_close(own, other, rtol=0.05, atol=0.05)
    z = neuron_level_model(**tensors, implementation=implementation)
    wide = torch.zeros(6, 9, device=DEVICE, dtype=torch.bfloat16)
    target = wide[:, 2:7]
    assert neuron_level_model(**tensors, out=target, implementation=implementation) is target
    assert torch.equal(target, z)
    assert not wide[:, :2].any()
    assert not wide[:, 7:].any()
    with pytest.raises(ValueError, match=r"out has shape \(6, 4\)"):
        neuron_level_model(**tensors, out=wide[:, :4], implementation=implementation)


@each
def test_strides_and_offsets_beyond_two_to_the_31(implementation: str) -> None:
    tensors = tensors_of(inputs_of(3, 5, 2), torch.float16)
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    far = memory.as_strided((3, 5, 2), (2**30, 4, 1))
    far.copy_(tensors["trace"])
    of_z = torch.from_numpy(draw(3, 5)).to(DEVICE, torch.float16)
    near, options = {**tensors, "trace": far.contiguous()}, {"implementation": implementation}
    tensors["trace"] = far
    for function, cotangents in (
        (neuron_level_model, ()),
        (neuron_level_model_trace_gradient, (of_z,)),
        (neuron_level_model_weight_gradient, (of_z,)),
    ):
        torch.testing.assert_close(
            function(*cotangents, **tensors, **options), function(*cotangents, **near, **options)
        )


@pytest.mark.skipif(len(TORCH) == 1, reason="needs TRITON_INTERPRET=1 or a GPU")
@both_forms
def test_parts_of_the_rows_are_added_in_order(hidden: int) -> None:
    """The weights' gradients on a device with many processors, where rows are divided."""
    from ml_networks.kernels.neuron_level_model import triton_kernel

    inputs = inputs_of(70, 5, 7, hidden)
    trace, *weights = tensors_of(inputs).values()
    weights += [None] * (4 - len(weights))
    of_z = torch.from_numpy(draw(70, 5)).to(DEVICE)
    many = replace(dispatch.current_device("torch"), processors=2)
    config = spec.Config()
    assert triton_kernel._parts(70, 5, hidden, config, many)[:2] == (3, 2)
    found, again = (
        triton_kernel.weight_gradient(of_z, trace, *weights, config, many) for _ in range(2)
    )
    assert all(map(torch.equal, found, again))
    exact = reference.backward(inputs, {"z": of_z.cpu().numpy()})
    for name, value in zip(WEIGHTS, found, strict=True):
        if name in exact:
            np.testing.assert_allclose(value.cpu(), exact[name], rtol=1e-4, atol=2e-5)


@both_forms
def test_gradcheck_twice(hidden: int) -> None:
    tensors = tensors_of(inputs_of(2, 2, 3, hidden and 2), torch.float64)
    leaves = tuple(value.detach().requires_grad_() for value in tensors.values())
    assert torch.autograd.gradcheck(neuron_level_model, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(neuron_level_model, leaves, fast_mode=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="the plain path in the op is for a CPU")
@both_forms
def test_the_custom_ops(hidden: int) -> None:
    """opcheck, and first and second derivatives against the plain path's."""
    leaves = [v.detach().requires_grad_() for v in tensors_of(inputs_of(hidden=hidden)).values()]
    tensors = (*leaves, *(None,) * (5 - len(leaves)))
    of_z = torch.from_numpy(draw(6, 5)).requires_grad_()
    torch.library.opcheck(torch_op._forward_op, (*tensors, None))
    torch.library.opcheck(torch_op._trace_op, (of_z, *tensors, None))
    torch.library.opcheck(torch_op._weight_op, (of_z, *tensors, None))
    still = [None if value is None else value.detach() for value in (of_z, *tensors)]
    into = torch.ones(6, 5, 7)
    torch.library.opcheck(torch_op._add_trace_op, (into.clone(), *still, None))
    torch_op._add_trace_op(into, *still, None)
    torch.testing.assert_close(into - 1, torch_op._trace_op(*still, None))

    z, plain = torch_op._forward_op(*tensors, None), torch_op._plain(*tensors)
    torch.testing.assert_close(z, plain)
    first = torch.autograd.grad(z.square().sum(), leaves, create_graph=True)
    exact = torch.autograd.grad(plain.square().sum(), leaves, create_graph=True)
    torch.testing.assert_close(first, exact, rtol=1e-4, atol=1e-5)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    exact = torch.autograd.grad(sum(g.square().sum() for g in exact), leaves)
    torch.testing.assert_close(second, exact, rtol=1e-4, atol=1e-4)


@each
def test_a_gradient_that_nobody_wants_is_not_taken(implementation: str) -> None:
    trace, *weights = tensors_of(inputs_of()).values()
    for frozen, direction in ((0, "backward"), (1, "weight_gradient")):
        leaves = [trace.detach(), *(value.detach() for value in weights)]
        for index, leaf in enumerate(leaves):
            leaf.requires_grad_((index > 0) == bool(frozen))
        with usage.record() as used:
            neuron_level_model(*leaves, implementation=implementation).sum().backward()
        assert [row.direction for row in used.rows] == ["forward", direction]


# Tracing an autograd.Function, torch._dynamo instantiates it, which torch.autograd deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@each
def test_compiles_whole_and_does_not_recompile_for_a_new_length(implementation: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    weights = [value.requires_grad_() for value in tensors_of(inputs_of()).values()][1:]

    def function(history: torch.Tensor) -> torch.Tensor:
        trace = history.permute(1, 2, 0)
        return neuron_level_model(trace, *weights, implementation=implementation).square().sum()

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for rows in (6, 9, 17):
        history = torch.from_numpy(draw(7, rows, 5)).to(DEVICE).requires_grad_()
        found = torch.autograd.grad(compiled(history), (history, *weights))
        torch.testing.assert_close(
            found, torch.autograd.grad(function(history), (history, *weights))
        )
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


@each
def test_autocast_casts_as_for_matrix_products(implementation: str) -> None:
    tensors = tensors_of(inputs_of())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        z = neuron_level_model(**tensors, implementation=implementation)
    assert z.dtype == torch.bfloat16
    exact = neuron_level_model(**tensors, implementation="torch")
    torch.testing.assert_close(z.float(), exact, rtol=0.05, atol=0.03)


@each
def test_the_transforms_of_torch_func(implementation: str) -> None:
    trace, *weights = tensors_of(inputs_of()).values()

    def size(trace: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return neuron_level_model(trace, *weights, implementation=implementation).square().sum()

    whole = torch.func.grad(size, 1)(trace, *weights)
    by_rows = torch.func.vmap(torch.func.grad(size, 1), (0, *(None,) * 4))(trace, *weights)
    torch.testing.assert_close(by_rows.sum(0), whole, rtol=1e-4, atol=1e-5)
    leaf = weights[0].requires_grad_()
    (expected,) = torch.autograd.grad(size(trace, *weights), leaf)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)


# JAX


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_transforms(implementation: str) -> None:
    inputs = inputs_of(4, 3, 5, 2)
    histories = np.stack([inputs["history"], draw(5, 4, 3)])
    weights = {k: jnp.asarray(v) for k, v in inputs.items() if k != "history"}
    of_z = draw(4, 3)

    def gradient(history: jax.Array) -> Given:
        def function(values: dict[str, jax.Array]) -> jax.Array:
            trace = values.pop("history").transpose(1, 2, 0)
            return jax_model(trace, **values, implementation=implementation)

        return jax.vjp(function, {**weights, "history": history})[1](jnp.asarray(of_z))[0]

    @jax.jit
    def both(histories: jax.Array) -> tuple[Given, Given]:
        scanned = jax.lax.scan(lambda carry, history: (carry, gradient(history)), 0, histories)
        return jax.vmap(gradient)(histories), scanned[1]

    @jax.jit
    @jax.value_and_grad
    def size(history: jax.Array) -> jax.Array:
        return sum((value * value).sum() for value in gradient(history).values())

    with pallas.interpret():
        results = both(histories)
        _, slope = size(histories[0])
        step = 1e-2 * slope / jnp.linalg.norm(slope)
        ahead, behind = (size(histories[0] + sign * step)[0] for sign in (1, -1))
    for index, history in enumerate(histories):
        exact = reference.backward({**inputs, "history": history}, {"z": of_z})
        for found in results:
            for name, value in found.items():
                np.testing.assert_allclose(value[index], exact[name], rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose((ahead - behind) / 0.02, jnp.linalg.norm(slope), rtol=0.01)


def history_of(ticks: int, rows: int, memory: int, hidden: int, dtype: Any) -> list[jax.Array]:
    """A history (D, L, B), weights and the gradient of each tick's activations."""
    inputs = inputs_of(rows, 3, memory, hidden)
    inputs["history"] = draw(3, ticks + memory - 1, rows)
    values = [*inputs.values(), draw(ticks, rows, 3)]
    return [jnp.asarray(value, dtype) for value in values]


def by_hand(history: jax.Array, *rest: jax.Array, implementation: str) -> list[jax.Array]:
    """What a loop over ticks does: activations, and the gradients of history and weights."""
    *weights, of_z = rest
    options = {"implementation": implementation}

    def forward(_: Any, tick: jax.Array) -> Any:
        return _, at_tick(history, tick, *weights, **options)

    def backward(into: jax.Array, xs: Any) -> Any:
        tick, of_tick = xs
        found = jax_trace_gradient(of_tick, history, tick, *weights, into=into, **options)
        return found, None

    ticks = jnp.arange(len(of_z))
    zeros = jnp.zeros(history.shape, jnp.promote_types(history.dtype, jnp.float32))
    _, z = jax.lax.scan(forward, None, ticks)
    of_history, _ = jax.lax.scan(backward, zeros, (ticks, of_z), reverse=True)
    return [z, of_history, *jax_weight_gradient(of_z, history, *weights, **options)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@both_forms
def test_ticks_of_a_history_in_place(hidden: int, dtype: str) -> None:
    """Windows at any tick, more rows than a block, against the reference of each tick."""
    ticks, rows, memory = 3, 70, 7
    given = history_of(ticks, rows, memory, hidden, dtype)
    history, *weights, of_z = (np.asarray(value, np.float64) for value in given)
    named = dict(zip(WEIGHTS, weights, strict=False))
    exact = [np.zeros((ticks, rows, 3)), np.zeros(history.shape)]
    exact += [np.zeros(value.shape) for value in weights]
    for tick in range(ticks):
        inputs = {"history": history[:, tick : tick + memory].transpose(1, 2, 0), **named}
        exact[0][tick] = reference.forward(inputs)["z"]
        found = reference.backward(inputs, {"z": of_z[tick]})
        exact[1][:, tick : tick + memory] += found.pop("history").transpose(2, 0, 1)
        for total, name in zip(exact[2:], named, strict=True):
            total += found[name]
    errors = {}
    for implementation in ("xla", "pallas"):
        with pallas.interpret():
            results = jax.jit(partial(by_hand, implementation=implementation))(*given)
        errors[implementation] = [
            testing.relative_error(np.asarray(got, np.float64), wanted)
            for got, wanted in zip(results, exact, strict=True)
        ]
    rounding = testing.ULPS * testing.EPSILON[dtype]
    for plain, fused in zip(*errors.values(), strict=True):
        assert plain <= rounding
        assert fused <= 2 * plain + rounding


@pytest.mark.parametrize("target", ["sm_90", "tpu"])
@both_forms
def test_a_loop_by_hand_lowers(target: str, hidden: int) -> None:
    for dtype in ("float32", "bfloat16"):
        given = history_of(2, 70, 7, hidden, dtype)
        text = pallas.lower(partial(by_hand, implementation="pallas"), *given, target_name=target)
        assert text.count("custom_call @") >= 3


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_a_tick_is_differentiated_like_its_trace(implementation: str) -> None:
    """First and second derivatives, also of the gradients as functions, and over more axes."""
    history, *weights, of_z = history_of(2, 4, 3, 2, jnp.float32)
    histories = jnp.stack([history, history[::-1]])

    def by_tick(history: jax.Array, weights: Any, tick: Any) -> jax.Array:
        return at_tick(history, tick, *weights, implementation=implementation)

    def by_trace(history: jax.Array, weights: Any, tick: Any) -> jax.Array:
        trace = jax.lax.dynamic_slice_in_dim(history, tick, 3, 1).transpose(2, 0, 1)
        return jax_model(trace, *weights, implementation="xla")

    def gradients(form: Any, history: jax.Array, weights: Any, tick: Any) -> Any:
        return jax.vjp(lambda *given: form(*given, tick), history, weights)[1](of_z[0])

    def size(form: Any, history: jax.Array, weights: Any) -> jax.Array:
        found = jax.tree.leaves(gradients(form, history, weights, 1))
        if form is by_tick:
            options: Any = {"into": history * history, "implementation": implementation}
            extra = jax_trace_gradient(of_z[1], history, 0, *weights, **options)
            options.pop("into")
            found += [extra, *jax_weight_gradient(of_z, history, *weights, **options)]
        else:
            (of_history,) = jax.vjp(lambda h: form(h, weights, 0), history)[1](of_z[1])
            of_weights = [
                jax.vjp(lambda w, tick=tick: form(history, w, tick), weights)[1](of_tick)[0]
                for tick, of_tick in enumerate(of_z)
            ]
            found += [history * history + of_history, *map(jnp.add, *of_weights)]
        return sum((value * value).sum() for value in found)

    results = []
    with pallas.interpret():
        for form in (by_tick, by_trace):
            both = jax.vmap(lambda h, t, form=form: gradients(form, h, weights, t))
            second = jax.grad(partial(size, form), (0, 1))
            both, second = jax.jit(both), jax.jit(second)
            results.append((both(histories, jnp.arange(2)), second(history, weights)))
    for got, wanted in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5)


def test_bad_histories_are_named() -> None:
    history, *weights, of_z = history_of(2, 4, 3, 2, jnp.float32)
    with pytest.raises(ValueError, match=r"history has shape \(3, 2, 4\); .* at least 3"):
        at_tick(history[:, :2], 0, *weights)
    with pytest.raises(ValueError, match=r"tick is 2; .* begin at 0 to 1"):
        at_tick(history, 2, *weights)
    with pytest.raises(ValueError, match=r"of_z has shape \(4, 2\); .* must be \(4, 3\)"):
        jax_trace_gradient(of_z[0, :, :2], history, 0, *weights, into=history)
    with pytest.raises(ValueError, match=r"into has shape \(3, 3, 4\); .* must be \(3, 4, 4\)"):
        jax_trace_gradient(of_z[0], history, 0, *weights, into=history[:, 1:])
    with pytest.raises(TypeError, match="into must be a floating-point array, got int32"):
        jax_trace_gradient(of_z[0], history, 0, *weights, into=history.astype(jnp.int32))
    with pytest.raises(ValueError, match=r"of_z has shape \(1, 4, 3\); .* must be \(2, 4, 3\)"):
        jax_weight_gradient(of_z[:1], history, *weights)
    with pytest.raises(TypeError, match="weight1 is bfloat16 and history is float32"):
        at_tick(history, 0, weights[0].astype(jnp.bfloat16), *weights[1:])
