"""Norm, activation, dropout and residual beyond the conformance suite: torch's own layers, edge
values, errors, and each framework's transforms.

Triton kernels run where ``TRITON_INTERPRET=1`` is set or a GPU is found.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ml_networks.kernels import explain, record_usage  # noqa: E402
from ml_networks.kernels.core import device, pallas, registry  # noqa: E402
from ml_networks.kernels.core.errors import (  # noqa: E402
    UnknownNameError,
    UnsupportedImplementationError,
)
from ml_networks.kernels.jax import norm_activation as jax_norm_activation  # noqa: E402
from ml_networks.kernels.norm_activation import reference, torch_op  # noqa: E402
from ml_networks.kernels.torch import norm_activation as torch_norm_activation  # noqa: E402

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = ["torch", "triton"] if INTERPRETING or DEVICE == "cuda" else ["torch"]
EVERY = [*(("torch", name) for name in TORCH), ("jax", "xla"), ("jax", "pallas")]
Given = dict[str, np.ndarray]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs_of(rows: int, columns: int, gated: bool = False, seed: int = 0) -> Given:
    return {
        "x": draw(rows, columns, seed=seed),
        "weight": 1 + draw(columns, seed=seed + 1) / 4,
        "bias": draw(columns, seed=seed + 2) / 4,
        "residual": draw(rows, columns // (1 + gated), seed=seed + 3),
    }


def run(
    where: tuple[str, str], inputs: Given, cotangent: np.ndarray | None = None, **options: Any
) -> Given:
    """``y`` and, for a cotangent, the gradients of all inputs."""
    framework, implementation = where
    if framework == "torch":
        leaves = {k: torch.from_numpy(v).to(DEVICE).requires_grad_() for k, v in inputs.items()}
        y = torch_norm_activation(**leaves, **options, implementation=implementation)
        results = {"y": y}
        if cotangent is not None:
            of_y = torch.from_numpy(cotangent).to(DEVICE)
            found = torch.autograd.grad(y, list(leaves.values()), of_y)
            results |= dict(zip(leaves, found, strict=True))
        return {name: value.detach().cpu().numpy() for name, value in results.items()}

    def function(values: dict[str, jax.Array]) -> jax.Array:
        return jax_norm_activation(**values, **options, implementation=implementation)

    with pallas.interpret():
        y, pull = jax.vjp(function, {k: jnp.asarray(v) for k, v in inputs.items()})
        found = {} if cotangent is None else pull(jnp.asarray(cotangent))[0]
    return {"y": np.asarray(y), **{name: np.asarray(value) for name, value in found.items()}}


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_equals_the_layers_it_replaces(where: tuple[str, str]) -> None:
    x = draw(6, 24)
    layer, rms = torch.nn.LayerNorm(24), torch.nn.RMSNorm(24)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(draw(24, seed=1)))
        layer.bias.copy_(torch.from_numpy(draw(24, seed=2)))
        rms.weight.copy_(layer.weight)
        expected = torch.nn.functional.silu(layer(torch.from_numpy(x)))
        gated = torch.nn.functional.glu(rms(torch.from_numpy(x)))
    weights = {name: value.detach().numpy() for name, value in layer.state_dict().items()}
    got = run(where, {"x": x, **weights}, norm="layer", activation="SiLU")["y"]
    np.testing.assert_allclose(got, expected.numpy(), rtol=2e-5, atol=2e-6)
    got = run(where, {"x": x, "weight": weights["weight"]}, norm="rms", activation="GLU")["y"]
    np.testing.assert_allclose(got, gated.numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kept", [(), ("weight",), ("bias",), ("residual",), ("weight", "bias")])
@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_what_is_left_out_is_one_or_zero(where: tuple[str, str], kept: tuple[str, ...]) -> None:
    inputs = inputs_of(5, 18, gated=True)
    inputs = {name: value for name, value in inputs.items() if name in ("x", *kept)}
    whole = {
        "weight": np.ones(18),
        "bias": np.zeros(18),
        "residual": np.zeros((5, 9)),
        **inputs,
    }
    of_y = draw(5, 9, seed=9)
    options = {"norm": "layer", "activation": "SwiGLU"}
    got = run(where, inputs, of_y, **options)
    exact = reference.forward(whole, **options)
    exact |= reference.backward(whole, {"y": of_y}, **options)
    for name, value in got.items():
        np.testing.assert_allclose(value, exact[name], rtol=2e-5, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_backward_drops_what_forward_dropped(where: tuple[str, str]) -> None:
    x = np.abs(draw(40, 48)) + 1.0
    options = {"norm": "none", "dropout": 0.4, "seed": 12}
    got = run(where, {"x": x}, np.ones_like(x), **options)
    kept = got["y"] != 0
    assert abs(kept.mean() - 0.6) < 0.05
    np.testing.assert_allclose(got["y"][kept], x[kept] / 0.6, rtol=1e-6)
    np.testing.assert_allclose(got["x"], kept / 0.6, rtol=1e-6)
    other = run(where, {"x": x}, **{**options, "seed": 13})["y"]
    assert 0.3 < ((other != 0) == kept).mean() < 0.7


# The Triton interpreter computes inf - inf in NumPy, which warns.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_nan_and_infinity_stay_in_their_row(where: tuple[str, str], norm: str) -> None:
    x = draw(6, 20)
    x[1, 2], x[4, 3] = np.nan, np.inf
    got = run(where, {"x": x}, np.ones_like(x), norm=norm, activation="GELU")
    for value in (got["y"], got["x"]):
        assert np.isnan(value[1]).all()
        assert np.isnan(value[4]).any()
        assert np.isfinite(value[[0, 2, 3, 5]]).all()


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_no_rows(where: tuple[str, str]) -> None:
    inputs = {**inputs_of(1, 8), "x": np.zeros((2, 0, 8), np.float32)}
    inputs["residual"] = np.zeros((2, 0, 8), np.float32)
    got = run(where, inputs, np.zeros((2, 0, 8), np.float32), dropout=0.5, seed=1)
    assert got["y"].shape == got["x"].shape == (2, 0, 8)
    assert not got["weight"].any()
    assert not got["bias"].any()


@pytest.mark.skipif(len(TORCH) == 1, reason="needs TRITON_INTERPRET=1 or a GPU")
@settings(max_examples=15)
@given(data=st.data())
def test_triton_equals_the_reference_for_any_shape_and_stride(data: st.DataObject) -> None:
    options = {
        "norm": data.draw(st.sampled_from(["layer", "rms", "none"])),
        "activation": data.draw(st.sampled_from(["Tanh", "ELU", "SwiGLU"])),
        "eps": 1e-5,
        "dropout": data.draw(st.sampled_from([0.0, 0.3])),
        "seed": data.draw(st.integers(-9, 9)),
    }
    gated = options["activation"] == "SwiGLU"
    rows, width = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 40))
    step, padding = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    columns = width * (1 + gated)
    inputs = inputs_of(rows, columns, gated)
    tensors = {k: torch.from_numpy(v).to(DEVICE) for k, v in inputs.items()}

    def strided(value: torch.Tensor) -> torch.Tensor:
        count = value.shape[1]
        wide = torch.full((rows, count * step + padding), float("nan"), device=DEVICE)
        view = wide[:, : count * step : step]
        view.copy_(value)
        return view

    tensors["x"], tensors["residual"] = strided(tensors["x"]), strided(tensors["residual"])
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    y = torch_norm_activation(**leaves, **options, implementation="triton")
    of_y = torch.from_numpy(draw(width, rows)).to(DEVICE).T
    found = torch.autograd.grad(y, list(leaves.values()), of_y)
    exact = reference.forward(inputs, **options)
    exact |= reference.backward(inputs, {"y": of_y.cpu().numpy()}, **options)
    for name, value in {"y": y, **dict(zip(leaves, found, strict=True))}.items():
        scale = np.abs(exact[name]).max() + 1.0
        off = np.abs(value.detach().cpu().numpy() - exact[name]).max() / scale
        # Rows of one or two nearly equal elements are divided by almost nothing.
        assert off < (2e-5 if columns > 2 or options["norm"] == "none" else 1e-2), name


@pytest.mark.parametrize("implementation", TORCH)
def test_offsets_beyond_two_to_the_31(implementation: str) -> None:
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    x = memory.as_strided((3, 8), (2**30, 1))
    x.copy_(torch.from_numpy(draw(3, 8)))
    far = torch_norm_activation(x, implementation=implementation)
    assert torch.equal(far, torch_norm_activation(x.contiguous(), implementation=implementation))


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_repeated_calls_give_the_same_bits(where: tuple[str, str]) -> None:
    inputs = inputs_of(300, 16)
    of_y = draw(300, 16, seed=5)
    first, second = (run(where, inputs, of_y, activation="SiLU") for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"norm": "batch"}, "unknown norm 'batch'"),
    ({"activation": "silu"}, "unknown activation 'silu'"),
    ({"dropout": 1.0, "seed": 0}, "dropout is 1.0"),
    ({"weight": np.ones(7, np.float32)}, r"weight has shape \(7,\)"),
    ({"residual": np.ones((2, 9), np.float32)}, "residual has shape"),
    ({"x": np.ones((2, 0), np.float32)}, "at least one element"),
    ({"x": np.ones((2, 9), np.float32), "activation": "GLU"}, "must be even"),
]


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_named(framework: str, options: dict[str, Any], message: str) -> None:
    function: Callable[..., Any] = jax_norm_activation
    arguments = {"x": np.zeros((2, 8), np.float32), **options}
    if framework == "torch":
        function = torch_norm_activation
        arguments = {
            k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v
            for k, v in arguments.items()
        }
    with pytest.raises(ValueError, match=message):
        function(**arguments)


def test_bad_types_and_implementations_are_named() -> None:
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        torch_norm_activation(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="floating-point array, got int32"):
        jax_norm_activation(jnp.ones((2, 3), jnp.int32))
    with pytest.raises(TypeError, match=r"residual is torch\.float16"):
        torch_norm_activation(torch.ones(2, 3), residual=torch.ones(2, 3).half())
    with pytest.raises(ValueError, match="give seed="):
        jax_norm_activation(jnp.ones((2, 3)), dropout=0.1)
    with pytest.raises(UnknownNameError, match="implementation"):
        torch_norm_activation(torch.ones(2, 3), implementation="cuda")
    wide = np.ones((1, 8193), np.float32)
    with pallas.interpret(), pytest.raises(UnsupportedImplementationError, match="up to 8192"):
        jax_norm_activation(wide, implementation="pallas")


def test_explain_and_usage_report_the_choice() -> None:
    dims, name, hopper = {"rows": 4096, "width": 512}, "norm_activation", device.target("sm_90")
    assert explain(name, dims, device=hopper).implementation == "triton"
    jax_forward = explain(name, dims, framework="jax", device=hopper)
    assert (jax_forward.implementation, jax_forward.why) == ("xla", "XLA makes one kernel of it")
    backward = explain(name, dims, framework="jax", device=hopper, direction="backward")
    assert backward.implementation == "pallas"
    with record_usage() as usage:
        torch_norm_activation(torch.ones(2, 8))
        jax_norm_activation(jnp.ones((2, 8)))
    ran = [(row.op, row.direction, row.implementation, row.calls) for row in usage.rows]
    assert ran == [(name, "forward", "torch", 1), (name, "forward", "xla", 1)]


# torch


OPTIONS = [("layer", "GELU", 0.0), ("rms", "SwiGLU", 0.3), ("none", "Softplus", 0.0)]


@pytest.mark.parametrize(("norm", "activation", "dropout"), OPTIONS)
def test_gradcheck_twice(norm: str, activation: str, dropout: float) -> None:
    inputs = inputs_of(3, 6, activation == "SwiGLU")
    leaves = [torch.from_numpy(v).double().requires_grad_() for v in inputs.values()]
    options = {"norm": norm, "activation": activation, "dropout": dropout, "seed": 4}

    def function(*values: torch.Tensor) -> torch.Tensor:
        return torch_norm_activation(*values, **options)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def op_arguments(
    norm: str, activation: str, dropout: float, rows: int = 5
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Those of the forward and of the backward op."""
    leaves = [
        torch.from_numpy(value).requires_grad_()
        for value in inputs_of(rows, 6, activation == "SwiGLU").values()
    ]
    seed = torch.tensor([3]) if dropout else None
    options = (norm, activation, 1e-5, dropout, None)
    of_y = torch.from_numpy(draw(rows, leaves[3].shape[1], seed=8)).requires_grad_()
    return (*leaves, seed, *options), (*leaves[:3], seed, of_y, *options)


@pytest.mark.skipif(DEVICE == "cuda", reason="the plain path in the op is for a CPU")
@pytest.mark.parametrize("rows", [5, 0])
@pytest.mark.parametrize(("norm", "activation", "dropout"), OPTIONS)
def test_custom_ops_pass_opcheck(norm: str, activation: str, dropout: float, rows: int) -> None:
    forward, backward = op_arguments(norm, activation, dropout, rows)
    torch.library.opcheck(torch_op._forward_op, forward)
    torch.library.opcheck(torch_op._backward_op, backward)


@pytest.mark.parametrize(("norm", "activation", "dropout"), OPTIONS)
def test_the_backward_op_equals_autograd_and_can_be_differentiated(
    norm: str, activation: str, dropout: float
) -> None:
    _, (x, weight, bias, seed, of_y, *options) = op_arguments(norm, activation, dropout)
    y = torch_op._plain(x, weight, bias, None, seed, *options[:4])
    # A cotangent that depends on the inputs, as in any loss that is not linear.
    of_y = of_y * x.sum() * weight.sum()
    expected = torch.autograd.grad(y, (x, weight, bias), of_y, create_graph=True)
    found = torch_op._backward_op(x, weight, bias, seed, of_y, *options)
    torch.testing.assert_close(found, expected)
    wanted = [x, weight, bias, of_y]
    loss, exact = (sum(value.square().sum() for value in all_) for all_ in (found, expected))
    second = torch.autograd.grad(loss, wanted, retain_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(exact, wanted), rtol=1e-4, atol=1e-4)


# Tracing an autograd.Function, torch._dynamo instantiates it, which torch.autograd deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("implementation", TORCH)
def test_compiles_whole_and_does_not_recompile_for_a_new_length(implementation: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = torch_norm_activation(
            x, weight, activation="SwiGLU", dropout=0.2, seed=5, implementation=implementation
        )
        return y.square().sum()

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    weight = torch.from_numpy(draw(8, seed=1)).to(DEVICE).requires_grad_()
    for rows in (5, 9, 17):
        x = torch.from_numpy(draw(rows, 8)).to(DEVICE).requires_grad_()
        found = torch.autograd.grad(compiled(x, weight), (x, weight))
        exact = torch.autograd.grad(function(x, weight), (x, weight))
        torch.testing.assert_close(found, exact)
    assert counter.frame_count == 1


@pytest.mark.parametrize("implementation", TORCH)
def test_autocast_leaves_dtypes_alone(implementation: str) -> None:
    x = torch.from_numpy(draw(4, 8)).to(DEVICE)
    weight = torch.full((8,), 1.5, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch_norm_activation(x, weight, implementation=implementation).dtype == x.dtype
        half = torch_norm_activation(x.bfloat16(), weight, implementation=implementation)
    assert half.dtype == torch.bfloat16
    exact = torch_norm_activation(x, weight, implementation="torch")
    torch.testing.assert_close(half.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("implementation", TORCH)
def test_without_a_seed_torch_draws_one(implementation: str) -> None:
    x = torch.ones(50, 40, device=DEVICE)
    options = {"norm": "none", "dropout": 0.5, "implementation": implementation}
    torch.manual_seed(0)
    first, second = (torch_norm_activation(x, **options) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(torch_norm_activation(x, **options), first)


# JAX


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_transforms(implementation: str) -> None:
    inputs = {k: jnp.asarray(v) for k, v in inputs_of(6, 8, gated=True).items()}

    def loss(values: dict[str, jax.Array], seed: Any) -> jax.Array:
        y = jax_norm_activation(
            **values,
            activation="SwiGLU",
            dropout=0.25,
            seed=seed,
            implementation=implementation,
        )
        return (y * y).sum()

    with pallas.interpret():
        seeds = jnp.arange(2)
        of_one = jax.jit(jax.grad(loss))
        expected = [of_one(inputs, seed) for seed in seeds]
        together = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(inputs, seeds)
        _, scanned = jax.lax.scan(lambda c, s: (c, jax.grad(loss)(inputs, s)), 0, seeds)
        kept = jax.jit(jax.grad(jax.checkpoint(loss)))(inputs, seeds[1])
        axes = {"x": 1, "weight": None, "bias": None, "residual": 1}
        wide = {k: jnp.stack([v] * 2, 1) if axes[k] else v for k, v in inputs.items()}
        uneven, one = jax.vmap(loss, (axes, None))(wide, 4), loss(inputs, 4)

        def gradient_size(values: dict[str, jax.Array]) -> jax.Array:
            return sum((g * g).sum() for g in jax.grad(loss)(values, 7).values())

        second = jax.jit(jax.grad(gradient_size))(inputs)
    for index, gradients in enumerate(expected):
        for name, value in gradients.items():
            for found in (together, scanned):
                np.testing.assert_allclose(found[name][index], value, rtol=2e-5, atol=2e-5)
    for name, value in expected[1].items():
        np.testing.assert_allclose(kept[name], value, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(uneven, [one] * 2, rtol=2e-5)
    assert all(np.isfinite(value).all() for value in second.values())
    if implementation == "pallas":
        implementation = "xla"
        exact = jax.jit(jax.grad(gradient_size))(inputs)
        for name, value in second.items():
            np.testing.assert_allclose(value, exact[name], rtol=1e-3, atol=1e-3)


def test_shard_map() -> None:
    from jax.sharding import Mesh, PartitionSpec

    mesh = Mesh(np.array(jax.devices()[:1]), ("batch",))
    x, weight = jnp.asarray(draw(4, 8)), jnp.ones(8)

    def function(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jax_norm_activation(x, weight, activation="GELU", implementation="pallas")

    with pallas.interpret():
        sharded = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(PartitionSpec("batch"), PartitionSpec()),
            out_specs=PartitionSpec("batch"),
            check_vma=False,
        )
        np.testing.assert_allclose(sharded(x, weight), function(x, weight), rtol=1e-6)


def test_a_gated_activation_is_not_for_tpus() -> None:
    spec = registry.get("norm_activation").spec
    problem = spec.CASES[1].problem("norm_activation")
    reasons = spec.not_supported_reasons(problem, "pallas", device.target("tpu"))
    assert any("gated" in reason for reason in reasons)


@pytest.mark.parametrize("implementation", TORCH)
def test_transforms_of_torch_func(implementation: str) -> None:
    x = torch.from_numpy(draw(3, 4, 6)).to(DEVICE)
    weight = torch.from_numpy(draw(3, 6, seed=1)).to(DEVICE)

    def size(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = torch_norm_activation(x, weight, activation="GELU", implementation=implementation)
        return y.square().sum()

    gradients = torch.func.vmap(torch.func.grad(size, (0, 1)))(x, weight)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    total = sum(size(*pair) for pair in zip(*leaves, strict=True))
    torch.testing.assert_close(gradients, torch.autograd.grad(total, leaves))
