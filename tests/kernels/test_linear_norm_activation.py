"""Linear with norm and activation beyond the conformance suite: torch's own layers, strides, edge
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

from ml_networks.kernels import explain  # noqa: E402
from ml_networks.kernels.core import device, pallas  # noqa: E402
from ml_networks.kernels.core.errors import UnsupportedImplementationError  # noqa: E402
from ml_networks.kernels.jax import linear_norm_activation as jax_layer  # noqa: E402
from ml_networks.kernels.linear_norm_activation import reference, torch_op  # noqa: E402
from ml_networks.kernels.torch import linear_norm_activation as torch_layer  # noqa: E402

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = ["torch", "triton"] if INTERPRETING or DEVICE == "cuda" else ["torch"]
EVERY = [*(("torch", name) for name in TORCH), ("jax", "xla"), ("jax", "pallas")]
Given = dict[str, np.ndarray]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(
    where: tuple[str, str], inputs: Given, cotangent: np.ndarray | None = None, **options: Any
) -> Given:
    """``y`` and, for a cotangent, the gradients of all inputs."""
    framework, implementation = where
    if framework == "torch":
        leaves = {k: torch.from_numpy(v).to(DEVICE).requires_grad_() for k, v in inputs.items()}
        y = torch_layer(**leaves, **options, implementation=implementation)
        results = {"y": y}
        if cotangent is not None:
            of_y = torch.from_numpy(cotangent).to(DEVICE)
            found = torch.autograd.grad(y, list(leaves.values()), of_y)
            results |= dict(zip(leaves, found, strict=True))
        return {name: value.detach().cpu().numpy() for name, value in results.items()}

    def function(values: dict[str, jax.Array]) -> jax.Array:
        return jax_layer(**values, **options, implementation=implementation)

    with pallas.interpret():
        y, pull = jax.vjp(function, {k: jnp.asarray(v) for k, v in inputs.items()})
        found = {} if cotangent is None else pull(jnp.asarray(cotangent))[0]
    return {"y": np.asarray(y), **{name: np.asarray(value) for name, value in found.items()}}


def inputs_of(kept: tuple[str, ...], outputs: int = 12, norm_first: bool = False) -> Given:
    normed = 10 if norm_first else outputs
    inputs = {
        "x": draw(7, 10),
        "weight": draw(outputs, 10, seed=1) / 3,
        "bias": draw(outputs, seed=2),
        "norm_weight": 1 + draw(normed, seed=3) / 4,
        "norm_bias": draw(normed, seed=4),
        "residual": draw(7, outputs, seed=5),
    }
    return {name: value for name, value in inputs.items() if name in ("x", "weight", *kept)}


@pytest.mark.parametrize("kept", [(), ("bias", "norm_weight"), ("norm_bias", "residual")])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_what_is_left_out_is_one_or_zero(
    where: tuple[str, str], norm_first: bool, kept: tuple[str, ...]
) -> None:
    inputs = inputs_of(kept, norm_first=norm_first)
    every = inputs_of(("bias", "norm_weight", "norm_bias", "residual"), norm_first=norm_first)
    missing = {k: np.full_like(v, k == "norm_weight") for k, v in every.items() if k not in inputs}
    options = {"norm": "layer", "norm_first": norm_first, "activation": "SiLU"}
    of_y = draw(7, 12, seed=9)
    got = run(where, inputs, of_y, **options)
    whole = {**missing, **inputs}
    exact = reference.forward(whole, **options)
    exact |= reference.backward(whole, {"y": of_y}, **options)
    for name, value in got.items():
        np.testing.assert_allclose(value, exact[name], rtol=5e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_wide_layers_and_leading_axes(where: tuple[str, str]) -> None:
    x, weight = draw(2, 3, 520), draw(20, 520, seed=1) / 20
    if where[1] in ("triton", "pallas"):
        with pytest.raises(UnsupportedImplementationError, match="in_features=520"):
            run(where, {"x": x, "weight": weight}, activation="ReLU")
        x, weight = x[..., :60].copy(), weight[:, :60].copy()
    got = run(where, {"x": x, "weight": weight}, activation="ReLU")["y"]
    exact = np.maximum(x.astype(np.float64) @ weight.T, 0.0)
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_no_rows_and_nan(where: tuple[str, str]) -> None:
    inputs = inputs_of(("bias",))
    empty = {**inputs, "x": np.zeros((2, 0, 10), np.float32)}
    got = run(where, empty, np.zeros((2, 0, 12), np.float32), norm="layer")
    assert got["y"].shape == (2, 0, 12)
    assert not got["weight"].any()
    inputs["x"][3, 4] = np.nan
    y = run(where, inputs, norm="layer", activation="GELU")["y"]
    assert np.isnan(y[3]).all()
    assert np.isfinite(np.delete(y, 3, 0)).all()


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_repeated_calls_give_the_same_bits(where: tuple[str, str]) -> None:
    inputs = inputs_of(("bias", "norm_weight", "norm_bias", "residual"))
    of_y = draw(7, 12, seed=6)
    first, second = (run(where, inputs, of_y, norm="rms", activation="SiLU") for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("implementation", TORCH)
def test_strides_and_offsets_beyond_two_to_the_31(implementation: str) -> None:
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    x = memory.as_strided((3, 8), (2**30, 2))
    x.copy_(torch.from_numpy(draw(3, 8)))
    weight = torch.from_numpy(draw(6, 8, seed=1)).half().to(DEVICE).T.contiguous().T
    for first in (False, True):
        options = {"norm": "rms", "norm_first": first, "implementation": implementation}
        far = torch_layer(x, weight, **options)
        assert torch.equal(far, torch_layer(x.contiguous(), weight.contiguous(), **options))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"norm": "group"}, "unknown norm 'group'"),
    ({"activation": "Relu"}, "unknown activation 'Relu'"),
    ({"weight": np.ones(8, np.float32)}, r"must be \(out_features, in_features\)"),
    ({"weight": np.ones((4, 7), np.float32)}, "last axes must be equal"),
    ({"weight": np.ones((5, 8), np.float32), "activation": "GLU"}, "must be even"),
    ({"norm_weight": np.ones(8, np.float32)}, r"norm_weight has shape \(8,\)"),
]


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_named(framework: str, options: dict[str, Any], message: str) -> None:
    function: Callable[..., Any] = jax_layer
    arguments = {"x": np.zeros((2, 8), np.float32), "weight": np.ones((4, 8), np.float32)}
    arguments |= options
    if framework == "torch":
        function = torch_layer
        arguments = {
            k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v
            for k, v in arguments.items()
        }
    with pytest.raises(ValueError, match=message):
        function(**arguments)


def test_mixed_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"weight is torch\.float32; it must be torch\.bfloat16"):
        torch_layer(torch.ones(2, 3).bfloat16(), torch.ones(4, 3))
    with pytest.raises(TypeError, match="floating-point array, got int32"):
        jax_layer(jnp.ones((2, 3), jnp.int32), jnp.ones((4, 3)))


def test_the_choice_says_why() -> None:
    name, hopper = "linear_norm_activation", device.target("sm_90")
    dims = {"rows": 4096, "in_features": 256, "width": 256}
    flags = {"norm": "layer", "activation": "GELU"}
    narrow = explain(name, dims, dtype="bfloat16", flags=flags, device=hopper)
    assert narrow.implementation == "triton"
    exact = explain(name, dims, flags=flags, device=hopper)
    assert (exact.implementation, exact.why[:10]) == ("torch", "three TF32")
    wide = explain(name, {**dims, "width": 1024}, dtype="bfloat16", flags=flags, device=hopper)
    assert wide.implementation == "torch"
    assert "norm_activation decides" in wide.why


# torch


@pytest.mark.parametrize("norm_first", [False, True])
def test_gradcheck_twice(norm_first: bool) -> None:
    inputs = inputs_of(("bias", "norm_weight", "norm_bias", "residual"), 4, norm_first)
    leaves = {k: torch.from_numpy(v).double().requires_grad_() for k, v in inputs.items()}
    leaves["x"] = leaves["x"].detach()[:3].requires_grad_()
    leaves["residual"] = leaves["residual"].detach()[:3].requires_grad_()
    options = {"norm": "layer", "norm_first": norm_first, "activation": "Tanh"}

    def function(*values: torch.Tensor) -> torch.Tensor:
        return torch_layer(**dict(zip(leaves, values, strict=True)), **options)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


def op_arguments(norm_first: bool, dropout: float) -> tuple[Any, ...]:
    inputs = inputs_of(("bias", "norm_weight", "norm_bias", "residual"), 6, norm_first)
    leaves = [torch.from_numpy(value).requires_grad_() for value in inputs.values()]
    seed = torch.tensor([3]) if dropout else None
    return *leaves, seed, "layer", norm_first, "GELU", 1e-5, dropout, True, None


@pytest.mark.skipif(DEVICE == "cuda", reason="the plain path in the op is for a CPU")
@pytest.mark.parametrize(("norm_first", "dropout"), [(False, 0.3), (True, 0.0)])
def test_the_custom_op(norm_first: bool, dropout: float) -> None:
    """opcheck, and first and second derivatives against the plain path's."""
    arguments = op_arguments(norm_first, dropout)
    torch.library.opcheck(torch_op._forward_op, arguments)
    leaves = arguments[:6]
    y = torch_op._forward_op(*arguments)[0]
    plain = torch_op._plain(*arguments[:12], "torch")
    torch.testing.assert_close(y, plain)
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    exact = torch.autograd.grad(plain.square().sum(), leaves, create_graph=True)
    torch.testing.assert_close(first, exact, rtol=1e-4, atol=1e-4)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    exact = torch.autograd.grad(sum(g.square().sum() for g in exact), leaves)
    torch.testing.assert_close(second, exact, rtol=1e-3, atol=1e-2)


# Tracing an autograd.Function, torch._dynamo instantiates it, which torch.autograd deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("implementation", TORCH)
def test_compiles_whole_and_does_not_recompile_for_a_new_length(implementation: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    weight = torch.from_numpy(draw(6, 8)).to(DEVICE).requires_grad_()

    def function(x: torch.Tensor) -> torch.Tensor:
        y = torch_layer(x, weight, norm="rms", activation="SwiGLU", implementation=implementation)
        return y.square().sum()

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for rows in (5, 9, 17):
        x = torch.from_numpy(draw(rows, 8)).to(DEVICE).requires_grad_()
        found = torch.autograd.grad(compiled(x), (x, weight))
        torch.testing.assert_close(found, torch.autograd.grad(function(x), (x, weight)))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


@pytest.mark.parametrize("implementation", TORCH)
def test_autocast_casts_as_for_a_linear_layer(implementation: str) -> None:
    x, weight = (torch.from_numpy(draw(4, 8)).to(DEVICE) for _ in range(2))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = torch_layer(x, weight, norm="layer", implementation=implementation)
    assert y.dtype == torch.bfloat16
    exact = torch_layer(x, weight, norm="layer", implementation="torch")
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)


# JAX


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_transforms(implementation: str) -> None:
    inputs = {k: jnp.asarray(v) for k, v in inputs_of(("bias", "norm_weight")).items()}

    def loss(values: dict[str, jax.Array], seed: Any) -> jax.Array:
        y = jax_layer(
            **values,
            norm="layer",
            activation="GELU",
            dropout=0.25,
            seed=seed,
            implementation=implementation,
        )
        return (y * y).sum()

    def size(values: dict[str, jax.Array]) -> jax.Array:
        return sum((g * g).sum() for g in jax.grad(loss)(values, 1).values())

    with pallas.interpret():
        seeds = jnp.arange(2)
        expected = [jax.jit(jax.grad(loss))(inputs, seed) for seed in seeds]
        together = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(inputs, seeds)
        _, scanned = jax.lax.scan(lambda c, s: (c, jax.grad(loss)(inputs, s)), 0, seeds)
        kept = jax.jit(jax.grad(jax.checkpoint(loss)))(inputs, seeds[1])
        axes = {"x": 1, "weight": None, "bias": 0, "norm_weight": None}
        wide = {
            k: v if axes[k] is None else jnp.stack([v] * 2, axes[k]) for k, v in inputs.items()
        }
        uneven, one = jax.jit(jax.vmap(loss, (axes, None)))(wide, 4), loss(inputs, 4)
        second = jax.jit(jax.grad(size))(inputs)
    for index, gradients in enumerate(expected):
        for name, value in gradients.items():
            for found in (together, scanned):
                np.testing.assert_allclose(found[name][index], value, rtol=2e-4, atol=2e-4)
    for name, value in expected[1].items():
        np.testing.assert_allclose(kept[name], value, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(uneven, [one] * 2, rtol=2e-5)
    assert all(np.isfinite(value).all() for value in second.values())


def test_shard_map() -> None:
    from jax.sharding import Mesh, PartitionSpec

    mesh = Mesh(np.array(jax.devices()[:1]), ("batch",))
    inputs = {k: jnp.asarray(v) for k, v in inputs_of(("bias", "norm_weight")).items()}
    specs = {name: PartitionSpec("batch" if name == "x" else None) for name in inputs}

    def layer(values: dict[str, jax.Array]) -> jax.Array:
        return jax_layer(**values, norm="layer", activation="GELU", implementation="pallas")

    def sharded(values: dict[str, jax.Array]) -> jax.Array:
        return jax.shard_map(
            layer, mesh=mesh, in_specs=(specs,), out_specs=specs["x"], check_vma=False
        )(values)

    with pallas.interpret():
        found, exact = (
            jax.jit(jax.grad(lambda v, f=function: (f(v) ** 2).sum()))(inputs)
            for function in (sharded, layer)
        )
    for name, value in exact.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)
