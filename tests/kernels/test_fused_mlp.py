"""Whole narrow MLPs beyond the conformance suite: what is left out, strides, edge values, errors,
which gradients are made, and each framework's transforms.

Triton kernels run where ``TRITON_INTERPRET=1`` is set or a GPU is found.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402

from ml_networks.kernels import explain  # noqa: E402
from ml_networks.kernels.core import device, pallas, usage  # noqa: E402
from ml_networks.kernels.core.errors import UnsupportedImplementationError  # noqa: E402
from ml_networks.kernels.fused_mlp import reference, torch_op  # noqa: E402
from ml_networks.kernels.jax import fused_mlp as jax_mlp  # noqa: E402
from ml_networks.kernels.torch import fused_mlp as torch_mlp  # noqa: E402

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = ["torch", "triton"] if INTERPRETING or DEVICE == "cuda" else ["torch"]
EVERY = [*(("torch", name) for name in TORCH), ("jax", "xla"), ("jax", "pallas")]
Lists = dict[str, Any]
"""``x`` and, for each kind of parameter, a list with one for each layer."""


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def lists_of(
    sizes: tuple[int, ...], rows: int, kept: tuple[str, ...] = ("biases", "norm_weights")
) -> Lists:
    pairs = list(pairwise(sizes))
    lists = {
        "x": draw(rows, sizes[0]),
        "weights": [draw(o, i, seed=k) / float(np.sqrt(i)) for k, (i, o) in enumerate(pairs)],
        "biases": [draw(o, seed=10 + k) for k, (_, o) in enumerate(pairs)],
        "norm_weights": [1 + draw(o, seed=20 + k) / 4 for k, (_, o) in enumerate(pairs[:-1])],
        "norm_biases": [draw(o, seed=30 + k) for k, (_, o) in enumerate(pairs[:-1])],
    }
    return {k: v for k, v in lists.items() if k in ("x", "weights", *kept)}


def exact(lists: Lists, of_y: np.ndarray, **options: Any) -> Lists:
    """``y`` and the gradients by the reference, which takes stacks; in the form of ``lists``."""
    sizes = lists["x"].shape[1], *(weight.shape[0] for weight in lists["weights"])
    hidden = list(sizes[1:-1])
    zeros = {
        "biases": [np.zeros(size) for size in sizes[1:]],
        "norm_weights": [np.ones(size) for size in hidden],
        "norm_biases": [np.zeros(size) for size in hidden],
    }
    whole = {**zeros, **lists}
    first, *middle, last = whole["weights"]
    inputs = {
        "x": whole["x"].astype(np.float64),
        "first_weight": first,
        "hidden_weight": np.array(middle).reshape(-1, hidden[0], hidden[0]),
        "last_weight": last,
        "bias": np.array(whole["biases"][:-1]),
        "last_bias": whole["biases"][-1],
        "norm_weight": np.array(whole["norm_weights"]),
        "norm_bias": np.array(whole["norm_biases"]),
    }
    y = reference.forward(inputs, **options)["y"]
    found = reference.backward(inputs, {"y": of_y}, **options)
    every = {
        "y": y,
        "x": found["x"],
        "weights": [found["first_weight"], *found["hidden_weight"], found["last_weight"]],
        "biases": [*found["bias"], found["last_bias"]],
        "norm_weights": list(found["norm_weight"]),
        "norm_biases": list(found["norm_bias"]),
    }
    return {name: value for name, value in every.items() if name == "y" or name in lists}


def leaves_of(lists: Lists, dtype: Any = None) -> Lists:
    def leaf(value: np.ndarray) -> Any:
        return torch.from_numpy(value).to(DEVICE, dtype or torch.float32).requires_grad_()

    return {k: [leaf(v) for v in f] if isinstance(f, list) else leaf(f) for k, f in lists.items()}


def flat_of(lists: Lists) -> list[Any]:
    return [v for f in lists.values() for v in (f if isinstance(f, list) else [f])]


def run(where: tuple[str, str], lists: Lists, of_y: np.ndarray, **options: Any) -> Lists:
    """``y`` and the gradients of everything given."""
    framework, implementation = where
    options["implementation"] = implementation
    if framework == "torch":
        leaves = leaves_of(lists)
        y = torch_mlp(**leaves, **options)
        found = iter(torch.autograd.grad(y, flat_of(leaves), torch.from_numpy(of_y).to(DEVICE)))
        gradients = {
            k: [next(found).cpu().numpy() for _ in f] if isinstance(f, list) else next(found).cpu()
            for k, f in leaves.items()
        }
        return {"y": y.detach().cpu().numpy(), **gradients}
    with pallas.interpret():
        y, pull = jax.vjp(
            lambda given: jax_mlp(**given, **options), jax.tree.map(jnp.asarray, lists)
        )
        return {"y": y, **pull(jnp.asarray(of_y))[0]}


def assert_close(found: Lists, wanted: Lists, tolerance: float = 5e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        pairs = (
            zip(found[name], value, strict=True)
            if isinstance(value, list)
            else [(found[name], value)]
        )
        for got, expected in pairs:
            scale = max(float(np.abs(expected).max(initial=0.0)), 1.0)
            np.testing.assert_allclose(
                np.asarray(got), expected, rtol=0, atol=tolerance * scale, err_msg=name
            )


@pytest.mark.parametrize(
    ("kept", "sizes"),
    [
        ((), (10, 12, 12, 5)),
        (("biases", "norm_weights"), (10, 12, 5)),
        (("norm_biases",), (3, 17, 17, 17, 17, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_what_is_left_out_is_one_or_zero(
    where: tuple[str, str], kept: tuple[str, ...], sizes: tuple[int, ...]
) -> None:
    lists, of_y = lists_of(sizes, 7, kept), draw(7, sizes[-1], seed=9)
    options = {"norm": "layer", "activation": "SiLU", "output_activation": "Softplus"}
    assert_close(run(where, lists, of_y, **options), exact(lists, of_y, **options))


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_every_layer_drops_by_a_seed_of_its_own(where: tuple[str, str]) -> None:
    lists, of_y = lists_of((6, 9, 9, 3), 21), draw(21, 3, seed=9)
    options = {"norm": "rms", "activation": "GELU", "eps": 1e-6, "dropout": 0.25, "seed": -7}
    assert_close(run(where, lists, of_y, **options), exact(lists, of_y, **options))


@pytest.mark.parametrize("implementation", TORCH)
def test_norms_of_weights_that_do_not_fit_whole(implementation: str) -> None:
    lists, of_y = (
        lists_of((9, 140, 140, 3), 19, ("biases", "norm_weights", "norm_biases")),
        draw(19, 3),
    )
    options = {"norm": "layer", "activation": "Mish", "dropout": 0.25, "seed": 7}
    found = run(("torch", implementation), lists, of_y, **options)
    assert_close(found, exact(lists, of_y, **options))


@pytest.mark.parametrize("implementation", TORCH)
def test_shares_of_the_rows_add_up_the_same_each_time(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists, of_y = lists_of((5, 16, 16, 3), 300), draw(300, 3, seed=9)
    if implementation == "triton":
        from ml_networks.kernels.fused_mlp import triton_kernel

        monkeypatch.setattr(triton_kernel, "_PROGRAMS_PER_PROCESSOR", 1024)
        assert triton_kernel._shares((5, 16, 3, 2), (True, True, False), 300, 32, 8)[1] > 1
    options = {"norm": "rms", "activation": "Tanh", "eps": 1e-6}
    first, second = (run(("torch", implementation), lists, of_y, **options) for _ in range(2))
    assert_close(first, exact(lists, of_y, **options))
    for one, other in zip(flat_of(first), flat_of(second), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_no_rows_and_nan(where: tuple[str, str]) -> None:
    lists = lists_of((10, 12, 12, 5), 7)
    empty = {**lists, "x": np.zeros((2, 0, 10), np.float32)}
    got = run(where, empty, np.zeros((2, 0, 5), np.float32), norm="layer", activation="GELU")
    assert got["y"].shape == (2, 0, 5)
    assert not any(np.asarray(one).any() for one in got["weights"])
    lists["x"][3, 4] = np.nan
    got = run(where, lists, draw(7, 5), norm="layer", activation="GELU")
    for name in ("y", "x"):
        assert np.isnan(np.asarray(got[name])[3]).all()
        assert np.isfinite(np.delete(np.asarray(got[name]), 3, 0)).all()


@pytest.mark.parametrize("implementation", TORCH)
def test_strides_and_offsets_beyond_two_to_the_31(implementation: str) -> None:
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    x = memory.as_strided((3, 8), (2**30, 2))
    x.copy_(torch.from_numpy(draw(3, 8)))
    weights = [torch.from_numpy(draw(o, i)).half().to(DEVICE) for i, o in ((8, 6), (6, 6), (6, 4))]
    strided = [weight.T.contiguous().T.requires_grad_() for weight in weights]
    plain = [weight.clone().requires_grad_() for weight in weights]
    of_y = torch.from_numpy(draw(3, 4)).half().to(DEVICE)[:1].expand(3, 4)
    options = {"norm": "rms", "activation": "ReLU", "implementation": implementation}
    far, near = torch_mlp(x, strided, **options), torch_mlp(x.contiguous(), plain, **options)
    assert torch.equal(far, near)
    gradients = torch.autograd.grad(far, strided, of_y)
    expected = torch.autograd.grad(near, plain, of_y.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


ONES = [np.ones((4, 8), np.float32), np.ones((4, 4), np.float32), np.ones((2, 4), np.float32)]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"norm": "group"}, "unknown norm 'group'"),
    ({"output_activation": "Relu"}, "unknown activation 'Relu'"),
    ({"weights": ONES[:1]}, "needs those of one hidden layer or more"),
    ({"weights": [*ONES[:2], ONES[0]]}, r"weights\[2\] has shape \(4, 8\)"),
    ({"weights": [np.ones((4, 7), np.float32), *ONES[1:]]}, r"weights\[0\] has shape \(4, 7\)"),
    ({"activation": "GLU", "weights": [np.ones((5, 8), np.float32), *ONES[1:]]}, "must be even"),
    ({"biases": [np.ones(4, np.float32)] * 3}, "biases have shapes"),
    ({"norm_weights": [np.ones(4, np.float32)]}, "norm_weights have shapes"),
]


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_named(framework: str, options: dict[str, Any], message: str) -> None:
    arguments = {"x": np.zeros((2, 8), np.float32), "weights": ONES, **options}
    function: Callable[..., Any] = jax_mlp
    if framework == "torch":
        function = torch_mlp
        arguments = jax.tree.map(
            lambda v: torch.from_numpy(v) if isinstance(v, np.ndarray) else v, arguments
        )
    with pytest.raises(ValueError, match=message):
        function(**arguments)


def test_mixed_types_are_refused() -> None:
    weights = [torch.from_numpy(one) for one in ONES]
    with pytest.raises(TypeError, match=r"weights\[0\] is torch\.float32; it must be torch\.bf"):
        torch_mlp(torch.ones(2, 8).bfloat16(), weights)
    with pytest.raises(TypeError, match="floating-point array, got int32"):
        jax_mlp(jnp.ones((2, 8), jnp.int32), ONES)


def test_the_choice_says_why() -> None:
    hopper = device.target("sm_90")
    dims = {"rows": 4096, "in_features": 64, "width": 128, "out_features": 6, "layers": 3}

    def chosen(dtype: str = "bfloat16", target: str = "sm_90", **changed: Any) -> tuple[str, str]:
        flags = {k: changed.pop(k) for k in ("activation",) if k in changed}
        where = device.target(target)
        found = explain("fused_mlp", {**dims, **changed}, dtype=dtype, flags=flags, device=where)
        return found.implementation, found.why

    assert chosen()[0] == "triton"
    assert chosen(rows=1 << 20)[0] == "triton"
    assert chosen(width=256, rows=hopper.processors * 32)[0] == "triton"
    assert chosen("float32", rows=1024)[0] == "triton"
    assert "read all weights again" in chosen(width=256, rows=16384)[1]
    assert "read all weights again" in chosen("float32", rows=16384)[1]
    for large in ({"width": 257}, {"out_features": 300}, {"in_features": 2000}):
        assert "linear_norm_activation decides" in chosen(**large)[1]
    assert "linear_norm_activation decides" in chosen(activation="SwiGLU")[1]
    assert "on AMD" in chosen("float32", "gfx942")[1]


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_what_does_not_fit_runs_layer_by_layer(framework: str) -> None:
    lists = lists_of((10, 14, 14, 6), 7, ("biases",))
    lists["weights"][1], lists["weights"][2] = draw(14, 7) / 3, draw(6, 7)
    options = {"norm": "layer", "activation": "SwiGLU", "output_activation": "GLU"}
    if framework == "torch":
        found: Any = torch_mlp(**leaves_of(lists), **options)
    else:
        found = jax_mlp(**lists, **options)
    h = torch.from_numpy(lists["x"])
    functional = torch.nn.functional
    for weight, bias in zip(lists["weights"][:2], lists["biases"][:2], strict=True):
        z = functional.linear(h, torch.from_numpy(weight), torch.from_numpy(bias))
        value, gate = functional.layer_norm(z, (14,)).chunk(2, -1)
        h = value * functional.silu(gate)
    z = functional.linear(h, *(torch.from_numpy(lists[k][2]) for k in ("weights", "biases")))
    np.testing.assert_allclose(np.asarray(found.detach().cpu() if framework == "torch" else found),
                               functional.glu(z), rtol=1e-4, atol=1e-5)  # fmt: skip
    if framework == "jax" or len(TORCH) == 2:
        fused = {"torch": "triton", "jax": "pallas"}[framework]
        with pytest.raises(UnsupportedImplementationError, match="activation=SwiGLU"):
            run((framework, fused), lists, draw(7, 3), **options)


# torch


@pytest.mark.parametrize("implementation", TORCH)
def test_first_and_second_derivatives(implementation: str) -> None:
    leaves = leaves_of(lists_of((5, 8, 8, 3), 6, ("biases", "norm_weights", "norm_biases")))
    options = {"norm": "layer", "activation": "Tanh", "output_activation": "Sigmoid"}

    def derivatives(name: str) -> tuple[Any, Any]:
        y = torch_mlp(**leaves, **options, implementation=name)
        first = torch.autograd.grad(y.square().sum(), flat_of(leaves), create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), flat_of(leaves))

    for found, plain in zip(derivatives(implementation), derivatives("torch"), strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4)


def test_gradcheck_twice() -> None:
    lists = lists_of((4, 5, 5, 3), 3, ("biases", "norm_weights", "norm_biases"))
    leaves = leaves_of(lists, torch.float64)

    def function(*flat: torch.Tensor) -> torch.Tensor:
        remaining = iter(flat)
        given = {
            k: [next(remaining) for _ in f] if isinstance(f, list) else next(remaining)
            for k, f in leaves.items()
        }
        return torch_mlp(**given, norm="rms", activation="Tanh", output_activation="GELU")

    assert torch.autograd.gradcheck(function, tuple(flat_of(leaves)), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(flat_of(leaves)), fast_mode=True)


@pytest.mark.parametrize("implementation", TORCH)
@pytest.mark.parametrize("wanted", ["x", "parameters", "one bias"])
def test_only_the_gradients_that_are_wanted(wanted: str, implementation: str) -> None:
    lists = lists_of((10, 12, 12, 5), 7)
    leaves, of_y = leaves_of(lists), draw(7, 5, seed=9)
    for value in flat_of(leaves):
        value.requires_grad_(False)
    chosen = {
        "x": [leaves["x"]],
        "parameters": leaves["weights"],
        "one bias": leaves["biases"][1:2],
    }
    for value in chosen[wanted]:
        value.requires_grad_()
    torch_mlp(**leaves, implementation=implementation).backward(torch.from_numpy(of_y).to(DEVICE))
    gradients = exact(lists, of_y)
    expected = {
        "x": [gradients["x"]],
        "parameters": gradients["weights"],
        "one bias": gradients["biases"][1:2],
    }
    for value, gradient in zip(chosen[wanted], expected[wanted], strict=True):
        np.testing.assert_allclose(value.grad.cpu(), gradient, rtol=1e-4, atol=1e-4)
    assert sum(value.grad is not None for value in flat_of(leaves)) == len(chosen[wanted])


@pytest.mark.skipif(DEVICE == "cuda", reason="the plain path in the ops is for a CPU")
@pytest.mark.parametrize(("output", "dropout"), [("Tanh", 0.3), ("Identity", 0.0)])
def test_the_custom_ops(output: str, dropout: float) -> None:
    lists = leaves_of(lists_of((5, 6, 6, 3), 7, ("biases", "norm_weights", "norm_biases")))
    seed = torch.tensor([3]) if dropout else None
    options = "layer", "GELU", output, 1e-5, dropout
    torch.library.opcheck(torch_op._forward_op, (*lists.values(), seed, *options, True, None))
    y, *kept = torch_op._forward_op(*lists.values(), seed, *options, True, None)
    plain = torch_op._plain(lists["x"], tuple(lists.values())[1:], seed, *options, "torch")
    torch.testing.assert_close(y, plain)
    first = torch.autograd.grad(y.square().sum(), flat_of(lists))
    torch.testing.assert_close(first, torch.autograd.grad(plain.square().sum(), flat_of(lists)))
    saved = [value.detach() for value in kept]
    arguments = (*lists.values(), seed, torch.ones_like(y), *saved, *options, True, True, None)
    torch.library.opcheck(torch_op._backward_op, arguments)


# Tracing an autograd.Function, torch._dynamo instantiates it, which torch.autograd deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("implementation", TORCH)
def test_compiles_whole_and_does_not_recompile_for_a_new_length(implementation: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    leaves = leaves_of(lists_of((8, 6, 6, 3), 1))
    del leaves["x"]
    options = {"norm": "rms", "activation": "SiLU", "implementation": implementation}

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch_mlp(x, **leaves, **options).square().sum()

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for rows in (5, 9, 17):
        x = torch.from_numpy(draw(rows, 8)).to(DEVICE).requires_grad_()
        found = torch.autograd.grad(compiled(x), (x, *flat_of(leaves)))
        expected = torch.autograd.grad(function(x), (x, *flat_of(leaves)))
        torch.testing.assert_close(found, expected)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


@pytest.mark.parametrize("implementation", TORCH)
def test_autocast_casts_as_for_linear_layers(implementation: str) -> None:
    lists = lists_of((8, 6, 6, 4), 5)
    leaves = leaves_of(lists)
    options = {"norm": "layer", "activation": "SiLU"}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = torch_mlp(**leaves, **options, implementation=implementation)
    assert y.dtype == torch.bfloat16
    of_y = draw(5, 4, seed=9)
    found = torch.autograd.grad(y, flat_of(leaves), torch.from_numpy(of_y).to(DEVICE, y.dtype))
    gradients = exact(lists, of_y, **options)
    for value, gradient in zip((y, *found), flat_of(gradients), strict=True):
        assert value.dtype == (torch.bfloat16 if value is y else torch.float32)
        np.testing.assert_allclose(value.detach().float().cpu(), gradient, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("implementation", TORCH)
def test_dropout_is_drawn_anew_and_kept_for_the_backward_pass(implementation: str) -> None:
    eye = torch.eye(32, device=DEVICE)
    x = torch.ones(64, 32, device=DEVICE, requires_grad=True)
    options: dict[str, Any] = {"dropout": 0.25, "implementation": implementation}
    first, second = (torch_mlp(x, [eye, eye], **options) for _ in range(2))
    assert not torch.equal(first, second)
    assert abs((first == 0).float().mean() - (1 - 0.75**2)) < 0.05
    (of_x,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(of_x, first.detach())


def test_torch_func_takes_the_plain_path() -> None:
    leaves = leaves_of(lists_of((8, 6, 6, 4), 5))
    stacked = torch.stack((leaves["x"], 2 * leaves["x"])).detach()
    weights = [weight.detach() for weight in leaves["weights"]]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return torch_mlp(x, weights, activation="Tanh").square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(stacked)
    for index in range(2):
        torch.testing.assert_close(found[index], torch.func.grad(loss)(stacked[index]))


def test_usage_tells_what_ran() -> None:
    leaves = leaves_of(lists_of((8, 6, 6, 4), 5))
    with usage.record() as seen:
        torch_mlp(**leaves).sum().backward()
    rows = {(row.op, row.direction): row for row in seen.rows}
    if DEVICE == "cpu":
        assert rows["fused_mlp", "forward"].implementation == "torch"
    assert ("fused_mlp", "backward") in rows


# JAX


def jax_loss(lists: Lists, seed: Any, implementation: str) -> jax.Array:
    options = {"norm": "layer", "activation": "GELU", "output_activation": "Tanh"}
    y = jax_mlp(**lists, **options, dropout=0.25, seed=seed, implementation=implementation)
    return (y * y).sum()


def assert_equal_trees(found: Any, expected: Any) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


def test_transforms() -> None:
    lists = jax.tree.map(jnp.asarray, lists_of((6, 8, 3), 7))
    gradient = jax.grad(lambda lists, seed: jax_loss(lists, seed, "pallas"))
    with pallas.interpret():
        seeds = jnp.arange(2)
        expected = [jax.jit(gradient)(lists, seed) for seed in seeds]
        together = jax.jit(jax.vmap(gradient, (None, 0)))(lists, seeds)
        _, scanned = jax.lax.scan(lambda c, s: (c, gradient(lists, s)), 0, seeds)
    for index, one in enumerate(expected):
        for found in (together, scanned):
            assert_equal_trees(jax.tree.map(lambda value, i=index: value[i], found), one)


def test_second_derivatives_in_jax() -> None:
    lists = jax.tree.map(jnp.asarray, lists_of((6, 8, 3), 5))

    def size(lists: Lists, implementation: str) -> jax.Array:
        gradient = jax.grad(jax_loss)(lists, 1, implementation)
        return sum((g * g).sum() for g in jax.tree.leaves(gradient))

    with pallas.interpret():
        found, plain = (
            jax.jit(jax.grad(size), static_argnums=1)(lists, name) for name in ("pallas", "xla")
        )
    assert_equal_trees(found, plain)


def test_shard_map() -> None:
    from jax.sharding import Mesh, PartitionSpec

    lists = jax.tree.map(jnp.asarray, lists_of((6, 8, 3), 4))
    x = lists.pop("x")
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    rows = PartitionSpec("rows")

    def function(x: jax.Array) -> jax.Array:
        return jax_mlp(x, **lists, activation="SiLU", implementation="pallas")

    with pallas.interpret():
        sharded = jax.shard_map(
            function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
        )
        np.testing.assert_allclose(jax.jit(sharded)(x), function(x), rtol=1e-5, atol=1e-5)
