"""The low-rank linear ops beyond the conformance suite: arguments, edge values, frozen weights,
and each framework's transforms.

Triton kernels run where ``TRITON_INTERPRET=1`` is set or a GPU is found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402

from ml_networks.kernels import explain  # noqa: E402
from ml_networks.kernels.core import device, pallas, registry  # noqa: E402
from ml_networks.kernels.core.errors import UnsupportedImplementationError  # noqa: E402
from ml_networks.kernels.core.problem import Case  # noqa: E402
from ml_networks.kernels.jax import lora_linear as jax_lora_linear  # noqa: E402
from ml_networks.kernels.torch import hyper_lora_linear, lora_linear  # noqa: E402

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = ["torch", "triton"] if INTERPRETING or DEVICE == "cuda" else ["torch"]
FUNCTIONS = {"lora_linear": lora_linear, "hyper_lora_linear": hyper_lora_linear}
OPS = list(FUNCTIONS)
each_op = pytest.mark.parametrize("op", OPS)
each_torch = pytest.mark.parametrize("implementation", TORCH)


def dims_of(op: str, rows: int = 6) -> dict[str, int]:
    if op == "lora_linear":
        return dict(zip(registry.get(op).spec.DIMENSIONS, (2, rows // 2, 9, 7, 3), strict=True))
    return dict(zip(registry.get(op).spec.DIMENSIONS, (rows, 9, 7, 3, 4), strict=True))


def arrays_of(op: str, dims: Mapping[str, int] | None = None, **flags: Any) -> dict[str, Any]:
    flags = {"gate": "sample_rank", **flags} if op == "lora_linear" else flags
    case = Case("here", "small", dims or dims_of(op), flags)
    return registry.get(op).reference.make_inputs(case, 0)


def tensors_of(op: str, dtype: Any = torch.float32, **options: Any) -> dict[str, Any]:
    arrays = arrays_of(op, **options)
    return {k: torch.tensor(v, dtype=dtype, device=DEVICE) for k, v in arrays.items()}


def run(op: str, inputs: Mapping[str, Any], implementation: str | None, **flags: Any) -> Any:
    return FUNCTIONS[op](**inputs, **flags, implementation=implementation)


def exact(op: str, inputs: Mapping[str, Any], **flags: Any) -> np.ndarray:
    doubles = {k: v.detach().double().cpu().numpy() for k, v in inputs.items()}
    return registry.get(op).reference.forward(doubles, **flags)["y"]


def leaves(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}


@each_torch
@each_op
def test_the_base_weight_and_bias_learn_if_they_may(op: str, implementation: str) -> None:
    inputs = leaves(tensors_of(op))
    y = run(op, inputs, implementation, scale=1.5)
    dy = torch.randn_like(y)
    y.backward(dy)
    doubles = {k: v.detach().double().cpu().numpy() for k, v in inputs.items()}
    expected = registry.get(op).reference.backward(
        doubles, {"y": dy.double().cpu().numpy()}, scale=1.5
    )
    for name, value in inputs.items():
        # A sum of one element may cancel: what counts is how large its terms are.
        size = max(np.abs(expected[name]).max(), 1.0)
        got = value.grad.double().cpu().numpy()
        np.testing.assert_allclose(got, expected[name], atol=2e-6 * size, err_msg=name)


@each_torch
@each_op
def test_a_frozen_base_weight_costs_nothing(op: str, implementation: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(frozen: bool) -> int:
        inputs = leaves(tensors_of(op))
        inputs["weight"].requires_grad_(not frozen)
        y = run(op, inputs, implementation)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert (inputs["weight"].grad is None) == frozen
        return counter.get_total_flops()

    assert flops(frozen=False) - flops(frozen=True) == 2 * 6 * 9 * 7


@each_torch
@each_op
def test_gradients_of_fewer_inputs(op: str, implementation: str) -> None:
    inputs = leaves(tensors_of(op))
    every = torch.autograd.grad(run(op, inputs, implementation).sum(), list(inputs.values()))
    for name, expected in zip(inputs, every, strict=True):
        alone = {k: v.detach().requires_grad_(k == name) for k, v in inputs.items()}
        run(op, alone, implementation).sum().backward()
        torch.testing.assert_close(alone[name].grad, expected)
    with torch.no_grad():
        assert not run(op, inputs, implementation).requires_grad


GATES: list[tuple[int, ...]] = [(), (3,), (1, 3), (2,), (2, 1), (2, 3), (1, 1)]


@each_torch
@pytest.mark.parametrize("gate", [None, *GATES], ids=str)
def test_every_shape_of_gate(implementation: str, gate: tuple[int, ...] | None) -> None:
    inputs = leaves(tensors_of("lora_linear"))
    inputs["gate"] = None if gate is None else torch.randn(gate, device=DEVICE, requires_grad=True)
    y = lora_linear(**inputs, scale=0.5, implementation=implementation)
    g = torch.ones(()) if gate is None else inputs["gate"]
    g = (g[:, None] if g.shape == (2,) else g.expand(2, 3)).expand(2, 3).unsqueeze(1)
    x, u, v = inputs["x"], inputs["u"], inputs["v"]
    expected = x @ inputs["weight"].T + inputs["bias"] + 0.5 * (g * (x @ v)) @ u.T
    torch.testing.assert_close(y, expected)
    if gate is not None:
        (got,) = torch.autograd.grad(y.square().sum(), inputs["gate"])
        (wanted,) = torch.autograd.grad(expected.square().sum(), inputs["gate"])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [lora_linear, jax_lora_linear], ids=["torch", "jax"])
def test_a_gate_of_two_meanings_is_refused(function: Callable[..., Any]) -> None:
    shapes = {"x": (3, 9), "weight": (7, 9), "bias": (7,), "u": (7, 3), "v": (9, 3), "gate": (3,)}
    make = torch.ones if function is lora_linear else jnp.ones
    arrays = {name: make(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"write gate\[None\] for one value per rank"):
        function(**arrays)
    assert function(**{**arrays, "gate": make((1, 3))}).shape == (3, 7)


@each_torch
@pytest.mark.parametrize("rank", [1, 128])
def test_the_smallest_and_the_largest_rank(implementation: str, rank: int) -> None:
    dims = {"samples": 2, "rows": 3, "in_features": 9, "out_features": 7, "rank": rank}
    inputs = tensors_of("lora_linear", dims=dims, gate="sample_rank")
    y = run("lora_linear", inputs, implementation)
    np.testing.assert_allclose(y.cpu(), exact("lora_linear", inputs), atol=3e-6)


@each_torch
@each_op
def test_no_rows_and_leading_axes(op: str, implementation: str) -> None:
    inputs = leaves(tensors_of(op, dims=dims_of(op, 0)))
    y = run(op, inputs, implementation)
    assert y.numel() == 0
    assert y.shape[-1] == 7
    y.sum().backward()
    assert all(v.grad is not None and not v.grad.any() for v in inputs.values())
    inputs = tensors_of(op)
    if op == "lora_linear":
        inputs["gate"] = inputs["gate"][:1]
    flat = {k: v.reshape(6, -1) if k in ("x", "context") else v for k, v in inputs.items()}
    wide = {k: v.reshape(1, 2, 3, -1) if k in ("x", "context") else v for k, v in flat.items()}
    one = {k: v[0] if k in ("x", "context") else v for k, v in flat.items()}
    y = run(op, flat, implementation)
    torch.testing.assert_close(run(op, wide, implementation), y.reshape(1, 2, 3, 7))
    torch.testing.assert_close(run(op, one, implementation), y[0])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's NumPy
@each_torch
@each_op
def test_nan_and_infinity_stay_in_their_rows(op: str, implementation: str) -> None:
    # All positive: an infinite row is infinite, not NaN.
    inputs = {name: value.abs() for name, value in tensors_of(op).items()}
    rows = inputs["x"].reshape(6, -1)
    clean = run(op, inputs, implementation).reshape(6, -1)
    rows[1, 3], rows[4, 2] = float("nan"), float("inf")
    inputs["x"] = rows.reshape(inputs["x"].shape)
    y = run(op, inputs, implementation).reshape(6, -1)
    assert y[1].isnan().all()
    assert y[4].isposinf().all()
    kept = [0, 2, 3, 5]
    torch.testing.assert_close(y[kept], clean[kept])


@each_torch
@each_op
def test_offsets_beyond_two_to_the_31(op: str, implementation: str) -> None:
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    inputs = tensors_of(op, torch.float16, dims=dims_of(op, 6))
    if op == "lora_linear":
        inputs["gate"] = inputs["gate"][:1]
    flat = {k: v.reshape(6, -1) if k == "x" else v for k, v in inputs.items()}
    far = memory.as_strided((3, 9), (2**30, 1))
    far.copy_(flat["x"][:3])
    few = {**flat, "x": far}
    if op == "hyper_lora_linear":
        few["context"] = flat["context"][:3]
    expected = run(op, {**few, "x": far.contiguous()}, implementation)
    assert torch.equal(run(op, few, implementation), expected)


@each_torch
def test_per_sample_adapters_of_stride_zero(implementation: str) -> None:
    for rows in (1, 3):
        dims = {"samples": 2, "rows": rows, "in_features": 9, "out_features": 7, "rank": 3}
        inputs = tensors_of("lora_linear", dims=dims)
        expected = run("lora_linear", inputs, "torch")
        for name in ("u", "v"):
            inputs[name] = inputs[name].expand(2, *inputs[name].shape)
        torch.testing.assert_close(run("lora_linear", inputs, implementation), expected)


def test_mixed_adapters_take_the_plain_path() -> None:
    inputs = tensors_of("lora_linear")
    expected = run("lora_linear", inputs, "torch")
    mixed = {**inputs, "u": inputs["u"].expand(2, 7, 3)}
    torch.testing.assert_close(run("lora_linear", mixed, None), expected)
    mixed = {**inputs, "v": inputs["v"].expand(2, 9, 3)}
    torch.testing.assert_close(run("lora_linear", mixed, None), expected)
    with pytest.raises(UnsupportedImplementationError, match="both alike"):
        run("lora_linear", mixed, "triton")


BAD = [
    ("x", (2, 3, 8), r"x has shape \(2, 3, 8\)"),
    ("weight", (7,), "weight has shape"),
    ("bias", (9,), "bias has shape"),
    ("u", (9, 3), r"u has shape \(9, 3\); it must be \(7, rank\), or \(2, 7, rank\)"),
    ("v", (3, 9, 3), "v has shape"),
    ("v", (9, 2), "u has rank 3 and v has rank 2"),
    ("gate", (5,), r"gate has shape \(5,\)"),
    ("gate", (3, 2), "gate has shape"),
]
BAD_HYPER = [
    ("x", (6, 8), r"x has shape \(6, 8\)"),
    ("weight", (7,), "weight has shape"),
    ("context", (5, 4), r"context has shape \(5, 4\)"),
    ("u_weight", (20, 4), "u_weight has 20 rows"),
    ("v_weight", (27, 5), r"v_weight has shape \(27, 5\)"),
    ("gate_bias", (2,), "gate_bias has shape"),
]


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize(
    ("op", "name", "shape", "message"),
    [("lora_linear", *bad) for bad in BAD] + [("hyper_lora_linear", *bad) for bad in BAD_HYPER],
)
def test_bad_shapes_are_named(
    op: str, name: str, shape: tuple[int, ...], message: str, framework: Any
) -> None:
    inputs = {**arrays_of(op), name: np.zeros(shape)}
    make = torch.tensor if framework == "torch" else jnp.asarray
    with pytest.raises(ValueError, match=message):
        registry.get(op).binding(framework).call({k: make(v) for k, v in inputs.items()}, {}, None)


@pytest.mark.parametrize("framework", ["torch", "jax"])
@each_op
def test_bad_dtypes_are_named(op: str, framework: Any) -> None:
    make = torch.tensor if framework == "torch" else jnp.asarray
    inputs = {k: make(v.astype(np.float32)) for k, v in arrays_of(op).items()}
    call = registry.get(op).binding(framework).call
    half = make(arrays_of(op)["weight"].astype(np.float16))
    with pytest.raises(TypeError, match=r"weight is .*float16 and x is .*float32"):
        call({**inputs, "weight": half}, {}, None)
    with pytest.raises(TypeError, match=r"x must be a floating-point .*int32"):
        call({**inputs, "x": make(np.zeros((2, 3, 9), np.int32))}, {}, None)


def choice(op: str, *dims: int, **options: Any) -> tuple[str, str]:
    sizes = dict(zip(registry.get(op).spec.DIMENSIONS, dims, strict=True))
    chip = device.target(options.pop("target", "sm_90"))
    decision = explain(op, sizes, device=chip, dtype="bfloat16", **options)
    return decision.implementation, decision.why


def test_the_choice_says_why() -> None:
    assert choice("lora_linear", 1, 4096, 512, 512, 16)[0] == "triton"
    assert "takes nearly all the time" in choice("lora_linear", 1, 8192, 4096, 4096, 16)[1]
    assert "little work" in choice("lora_linear", 1, 8, 64, 64, 4)[1]
    assert "leave a tile" in choice("lora_linear", 512, 8, 512, 512, 8, flags={"per_sample": 1})[1]
    few = choice("lora_linear", 1, 64, 1024, 1024, 8, direction="backward")
    assert "fills few processors" in few[1]
    own = choice("lora_linear", 256, 1, 512, 512, 8, flags={"per_sample": True})
    assert own == ("triton", "u and v are read once")
    assert choice("hyper_lora_linear", 64, 1024, 880, 8, 8)[0] == "triton"
    assert choice("hyper_lora_linear", 64, 1024, 880, 8, 8, target="gfx942")[0] == "triton"
    for op, dims in (
        ("lora_linear", (1, 8, 64, 64, 129)),
        ("hyper_lora_linear", (8, 64, 64, 32, 8)),
    ):
        sizes = dict(zip(registry.get(op).spec.DIMENSIONS, dims, strict=True))
        against = dict(explain(op, sizes, device=device.target("sm_90")).against)
        assert any("above 128" in reason for reason in against["triton"])


# torch


@each_op
def test_gradcheck_twice(op: str) -> None:
    inputs = leaves(tensors_of(op, torch.float64))

    def function(*values: Any) -> Any:
        return run(op, dict(zip(inputs, values, strict=True)), None, scale=0.7)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()))


@each_torch
@each_op
def test_second_derivatives_go_through_the_kernels(op: str, implementation: str) -> None:
    def second(implementation: str) -> tuple[Any, ...]:
        inputs = leaves(tensors_of(op))
        loss = run(op, inputs, implementation).square().sum()
        grads = torch.autograd.grad(loss, list(inputs.values()), create_graph=True)
        norm = sum(grad.square().sum() for grad in grads)
        return torch.autograd.grad(norm, list(inputs.values()))

    for got, expected in zip(second(implementation), second("torch"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(DEVICE == "cuda", reason="the plain path in the op is for a CPU")
@each_op
@pytest.mark.parametrize("rows", [6, 0])
def test_custom_ops_pass_opcheck(op: str, rows: int) -> None:
    module = registry.get(op).module("torch_op")
    inputs = leaves(tensors_of(op, dims=dims_of(op, rows)))
    samples = (2,) if op == "lora_linear" else ()
    names = {
        "lora_linear": ("x", "weight", "bias", "u", "v", "gate"),
        "hyper_lora_linear": tuple(inputs),
    }[op]
    flat = {k: v.flatten(0, -2) if k == "x" else v for k, v in inputs.items()}
    values = [flat[name].detach().requires_grad_() for name in names]
    # Compiling both is a test of its own below.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*values, *samples, 0.5, True, None)
    torch.library.opcheck(module._forward_op, arguments, test_utils=checks)
    y, saved = module._forward_op(*values, *samples, 0.5, True, None)
    given = [value for name, value in zip(names, values, strict=True) if name != "bias"]
    dy = torch.ones_like(y).requires_grad_()
    arguments = (dy, *given, saved.detach(), *samples, 0.5, True, None)
    torch.library.opcheck(module._backward_op, arguments, test_utils=checks)


# Tracing an autograd.Function, torch._dynamo instantiates it, which torch.autograd deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@each_torch
@each_op
def test_compiles_whole_and_does_not_recompile_for_a_new_length(
    op: str, implementation: str
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    asked = None if implementation == "torch" else implementation

    def loss(inputs: dict[str, Any]) -> Any:
        return run(op, inputs, asked, scale=0.5).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for rows in (24, 10, 36):
        eager = leaves(tensors_of(op, dims=dims_of(op, rows)))
        if op == "lora_linear":
            eager["gate"] = eager["gate"][:1].detach().requires_grad_()
        traced = leaves(eager)
        loss(eager).backward()
        compiled(traced).backward()
        for name, value in eager.items():
            got = traced[name].grad
            torch.testing.assert_close(got, value.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert counter.frame_count == 1


@each_torch
@each_op
def test_autocast_computes_in_its_dtype(op: str, implementation: str) -> None:
    inputs = leaves(tensors_of(op))
    halves = {k: v.detach().bfloat16() for k, v in inputs.items()}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = run(op, inputs, implementation)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, run(op, halves, implementation))
    y.sum().backward()
    assert all(v.grad is not None and v.grad.dtype == torch.float32 for v in inputs.values())


@pytest.mark.skipif(len(TORCH) == 1, reason="needs TRITON_INTERPRET=1 or a GPU")
@each_op
def test_results_repeat_bit_for_bit(op: str) -> None:
    inputs = leaves(tensors_of(op, dims=dims_of(op, 90)))

    def once() -> list[Any]:
        y = run(op, inputs, "triton")
        return [y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1")
@each_op
def test_several_tiles_of_rows_add_up(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one processor a program of the backward pass goes through all rows."""
    found = registry.get(op)
    monkeypatch.setattr(found.kernels("torch"), "_chunks", lambda rows, *_: (1, -(-rows // 16)))
    inputs = leaves(tensors_of(op, dims=dims_of(op, 150)))
    y = run(op, inputs, "triton")
    y.backward(torch.ones_like(y))
    expected = leaves(inputs)
    run(op, expected, "torch").sum().backward()
    for name, value in expected.items():
        torch.testing.assert_close(inputs[name].grad, value.grad, rtol=1e-4, atol=1e-4, msg=name)


# JAX


def jax_loss(op: str, inputs: dict[str, Any], implementation: str) -> Any:
    y = registry.get(op).binding("jax").call(inputs, {"scale": 0.5}, implementation)["y"]
    return (jnp.sin(jnp.arange(y.size)).reshape(y.shape) * y**2).sum()


@each_op
def test_pallas_goes_through_every_transform(op: str) -> None:
    inputs = {k: jnp.asarray(v, jnp.float32) for k, v in arrays_of(op).items()}
    xs = jnp.stack([inputs["x"], 0.5 * inputs["x"], -inputs["x"]])

    def cases(loss: Callable[[Any], Any]) -> dict[str, Any]:
        return {
            "vmap of grad": jax.vmap(jax.grad(loss))(xs),
            "grad of vmap, other axis": jax.grad(
                lambda x: jax.vmap(loss, in_axes=1)(jnp.moveaxis(x, 0, 1)).sum()
            )(xs),
            "checkpoint": jax.grad(jax.checkpoint(loss))(xs[0]),
            "scan": jax.grad(lambda x: jax.lax.scan(lambda c, v: (c + loss(v), None), 0.0, x)[0])(
                xs
            ),
            "grad of grad": jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))(xs[0]),
        }

    def of(implementation: str) -> dict[str, Any]:
        function = jax.jit(
            lambda: cases(lambda x: jax_loss(op, {**inputs, "x": x}, implementation))
        )
        with pallas.interpret():
            return function()

    expected, got = of("xla"), of("pallas")
    for name, value in expected.items():
        scale = float(jnp.abs(value).max())
        np.testing.assert_allclose(got[name], value, atol=1e-5 * scale, err_msg=name)


def test_nan_and_infinity_stay_in_their_rows_in_pallas() -> None:
    inputs = {k: jnp.abs(jnp.asarray(v, jnp.float32)) for k, v in arrays_of("lora_linear").items()}
    clean = jax_lora_linear(**inputs)
    inputs["x"] = inputs["x"].at[0, 1, 3].set(jnp.nan).at[1, 2, 2].set(jnp.inf)
    with pallas.interpret():
        y = jax_lora_linear(**inputs, implementation="pallas")
    assert jnp.isnan(y[0, 1]).all()
    assert jnp.isposinf(y[1, 2]).all()
    kept = jnp.isfinite(inputs["x"]).all(-1)
    np.testing.assert_allclose(y[kept], clean[kept], rtol=1e-5)


@each_op
def test_pallas_runs_inside_shard_map(op: str) -> None:
    inputs = {k: jnp.asarray(v, jnp.float32) for k, v in arrays_of(op).items()}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))
    split, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    specs = {k: split if k in ("x", "context") else whole for k in inputs}
    call = registry.get(op).binding("jax").call

    def layer(values: dict[str, Any]) -> Any:
        return call(values, {}, "pallas")["y"]

    sharded = jax.shard_map(layer, mesh=mesh, in_specs=(specs,), out_specs=split, check_vma=False)
    with pallas.interpret():
        y = jax.jit(sharded)(inputs)
    np.testing.assert_allclose(y, call(inputs, {}, "xla")["y"], rtol=1e-5, atol=1e-5)


@each_op
def test_jax_leaves_a_frozen_weight_alone(op: str) -> None:
    inputs = {k: jnp.asarray(v, jnp.float32) for k, v in arrays_of(op).items()}

    def flops(names: set[str]) -> float:
        def loss(wanted: dict[str, Any], fixed: dict[str, Any]) -> Any:
            return jax_loss(op, {**fixed, **wanted}, "xla")

        wanted = {k: v for k, v in inputs.items() if k in names}
        compiled = jax.jit(jax.grad(loss)).lower(wanted, inputs).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(set(inputs)) - flops(set(inputs) - {"weight"}) >= 2 * 6 * 9 * 7


@each_op
def test_float64_and_no_rows_in_jax(op: str) -> None:
    found = registry.get(op)
    arrays = arrays_of(op)
    with jax.enable_x64(True):
        got = found.binding("jax").call({k: jnp.asarray(v) for k, v in arrays.items()}, {}, None)
    np.testing.assert_allclose(got["y"], found.reference.forward(arrays)["y"], rtol=1e-12)
    empty = {k: jnp.asarray(v) for k, v in arrays_of(op, dims_of(op, 0)).items()}
    gradients = jax.grad(lambda values: jax_loss(op, values, "xla"))(empty)
    assert not any(gradient.any() for gradient in gradients.values())


def test_hyper_lora_never_makes_the_adapters() -> None:
    """No intermediate of a training step is as large as the adapters of all rows."""
    inputs = leaves(tensors_of("hyper_lora_linear", dims=dims_of("hyper_lora_linear", 60)))
    largest = 60 * 7 * 3
    sizes = []

    def seen(tensor: Any) -> Any:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        hyper_lora_linear(**inputs)
    assert max(sizes) < largest
