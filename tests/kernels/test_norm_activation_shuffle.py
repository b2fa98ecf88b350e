"""Norm, shuffle, activation, dropout, residual and FiLM beyond the conformance suite: torch's own
layers, running statistics, layouts, edge values, errors, and each framework's transforms.

Triton kernels run where ``TRITON_INTERPRET=1`` is set or a GPU is found.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

from ml_networks.kernels import explain  # noqa: E402
from ml_networks.kernels.core import device, pallas  # noqa: E402
from ml_networks.kernels.core.errors import UnsupportedImplementationError  # noqa: E402
from ml_networks.kernels.jax import norm_activation_shuffle as jax_op  # noqa: E402
from ml_networks.kernels.norm_activation_shuffle import (  # noqa: E402
    reference,
    spec,
    torch_op,
)
from ml_networks.kernels.torch import norm_activation_shuffle as op  # noqa: E402

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = ["torch", "triton"] if INTERPRETING or DEVICE == "cuda" else ["torch"]
EVERY = [*(("torch", name) for name in TORCH), ("jax", "xla"), ("jax", "pallas")]
NAME = "norm_activation_shuffle"
Given = dict[str, np.ndarray]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs_of(shape: tuple[int, ...], without: tuple[str, ...] = (), **options: Any) -> Given:
    """Everything that a call with ``options`` may take, but what it shall be ``without``."""
    channels, sides = spec.shuffled(shape[1], list(shape[2:]), options.get("shuffle", 0))
    channels //= spec.parts(options.get("activation", "Identity"))
    inputs = {
        "x": 2 * draw(*shape) + draw(shape[1], *[1] * (len(shape) - 2), seed=1),
        "weight": 1 + draw(shape[1], seed=2) / 4,
        "bias": draw(shape[1], seed=3) / 4,
        "residual": draw(shape[0], channels, *sides, seed=4),
        "scale": 1 + draw(shape[0], channels, seed=5) / 4,
        "shift": draw(shape[0], channels, seed=6),
    }
    if not options.get("training", True):
        inputs["running_mean"] = draw(shape[1], seed=7)
        inputs["running_var"] = 1 + draw(shape[1], seed=8) ** 2
    return {name: value for name, value in inputs.items() if name not in without}


def run(
    where: tuple[str, str], inputs: Given, cotangent: np.ndarray | None = None, **options: Any
) -> Given:
    """``y`` and, for a cotangent, the gradients of all inputs but running statistics."""
    framework, implementation = where
    fixed = {k: v for k, v in inputs.items() if k.startswith("running")}
    free = {k: v for k, v in inputs.items() if k not in fixed}
    if framework == "torch":
        leaves = {k: torch.from_numpy(v).to(DEVICE).requires_grad_() for k, v in free.items()}
        held = {k: torch.from_numpy(v).to(DEVICE) for k, v in fixed.items()}
        y = op(**leaves, **held, **options, implementation=implementation)
        results = {"y": y}
        if cotangent is not None:
            of_y = torch.from_numpy(cotangent).to(DEVICE)
            found = torch.autograd.grad(y, list(leaves.values()), of_y)
            results |= dict(zip(leaves, found, strict=True))
        return {name: value.detach().cpu().numpy() for name, value in results.items()}

    def function(values: dict[str, jax.Array]) -> jax.Array:
        return jax_op(**values, **fixed, **options, implementation=implementation)

    with pallas.interpret():
        y, pull = jax.vjp(function, {k: jnp.asarray(v) for k, v in free.items()})
        found = {} if cotangent is None else pull(jnp.asarray(cotangent))[0]
    return {"y": np.asarray(y), **{name: np.asarray(value) for name, value in found.items()}}


FILM = ("scale", "shift")
CALLS: dict[str, tuple[tuple[int, ...], tuple[str, ...], dict[str, Any]]] = {
    "film": ((3, 6, 5, 3), (), {"activation": "SiLU", "dropout": 0.3, "seed": 3}),
    "film-group-gated": (
        (2, 12, 4, 5),
        ("residual", "bias"),
        {"norm": "group", "num_groups": 2, "activation": "SiGLU", "dropout": 0.2, "seed": 1},
    ),
    "film-first": ((2, 5, 3, 3), ("weight",), {"activation": "Mish", "residual_first": True}),
    "group-gated": (
        (2, 20, 5, 3),
        FILM,
        {"norm": "group", "num_groups": 5, "activation": "GLU", "dropout": 0.3, "seed": 9},
    ),
    "instance": ((2, 6, 7), (*FILM, "residual"), {"norm": "group", "num_groups": 6}),
    "layer": ((3, 5, 2, 3, 4), (*FILM, "weight"), {"norm": "group", "activation": "Tanh"}),
    "given": (
        (3, 8, 4, 3),
        FILM,
        {"training": False, "activation": "GELU", "residual_first": True, "eps": 1e-3},
    ),
    "given-shuffle": ((2, 16, 3, 5), FILM, {"training": False, "shuffle": 2}),
    "none-shuffle-gated": (
        (2, 16, 3, 5),
        (*FILM, "bias", "residual"),
        {"norm": "none", "shuffle": 2, "activation": "SwiGLU"},
    ),
    "unshuffle-gated": ((3, 4, 4, 6), FILM, {"shuffle": -2, "activation": "GLU"}),
    "vectors": ((7, 5), (*FILM, "residual"), {"activation": "ELU"}),
    "one-by-one": ((5, 9, 1, 1), FILM, {"norm": "group", "num_groups": 3, "shuffle": 3}),
    "nothing": ((2, 3, 3, 3), (*FILM, "weight", "bias", "residual"), {"norm": "none"}),
}


def able(where: tuple[str, str], call: str) -> bool:
    _, without, options = CALLS[call]
    if where[1] != "pallas":
        return True
    return "shift" in without and abs(options.get("shuffle", 0)) < 2


@pytest.mark.parametrize(
    ("where", "call"),
    [(where, call) for where in EVERY for call in CALLS if able(where, call)],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_equals_the_reference(where: tuple[str, str], call: str) -> None:
    shape, without, options = CALLS[call]
    inputs = inputs_of(shape, without, **options)
    of_y = draw(*reference.forward(inputs, **options)["y"].shape, seed=20)
    exact = reference.forward(inputs, **options)
    exact |= reference.backward(inputs, {"y": of_y}, **options)
    got = run(where, inputs, of_y, **options)
    assert set(got) == {"y", *(name for name in inputs if not name.startswith("running"))}
    for name, value in got.items():
        scale = np.abs(exact[name]).max()
        np.testing.assert_allclose(value, exact[name], atol=5e-6 * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize("where", EVERY[:-1], ids="-".join)
def test_equals_the_layers_it_replaces(where: tuple[str, str]) -> None:
    x = draw(4, 24, 3, 5)
    batch, group = nn.BatchNorm2d(24), nn.GroupNorm(4, 24)
    for norm in (batch, group):
        nn.init.normal_(norm.weight, 1.0, 0.2)
        nn.init.normal_(norm.bias)
    pixels = torch.from_numpy(x)
    with torch.no_grad():
        shuffled = nn.functional.silu(nn.functional.pixel_shuffle(batch(pixels), 2))
        gated = nn.functional.glu(nn.functional.pixel_shuffle(group(pixels), 2), 1)
    first, second = (
        {"x": x, "weight": norm.weight.detach().numpy(), "bias": norm.bias.detach().numpy()}
        for norm in (batch, group)
    )
    got = run(where, first, shuffle=2, activation="SiLU")["y"]
    np.testing.assert_allclose(got, shuffled.numpy(), rtol=2e-5, atol=2e-6)
    got = run(where, second, norm="group", num_groups=4, shuffle=2, activation="GLU")["y"]
    np.testing.assert_allclose(got, gated.numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_running_statistics_are_those_of_torch_after_100_steps(where: tuple[str, str]) -> None:
    layer = nn.BatchNorm2d(3, momentum=0.07)
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    held = [torch.from_numpy(value.copy()).to(DEVICE) for value in (mean, var)]

    @jax.jit
    def step(x: jax.Array, mean: jax.Array, var: jax.Array) -> Any:
        return jax_op(
            x, running_mean=mean, running_var=var, momentum=0.07, implementation=where[1]
        )[1:]

    for seed in range(100):
        x = 1 + draw(3, 3, 2, 2, seed=seed)
        layer(torch.from_numpy(x))
        if where[0] == "torch":
            pixels, running = torch.from_numpy(x).to(DEVICE), dict(zip(RUNNING, held, strict=True))
            op(pixels, **running, momentum=0.07, implementation=where[1])
        else:
            with pallas.interpret():
                mean, var = step(x, mean, var)
    if where[0] == "torch":
        mean, var = (value.cpu().numpy() for value in held)
    np.testing.assert_allclose(mean, layer.running_mean.numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(var, layer.running_var.numpy(), rtol=1e-6, atol=1e-6)


RUNNING = ("running_mean", "running_var")


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_a_large_mean_costs_the_variance_nothing(where: tuple[str, str], norm: str) -> None:
    inputs = {"x": 1e3 + draw(2, 2, 40, 9)}
    exact = reference.forward(inputs, norm=norm)["y"]
    got = run(where, inputs, norm=norm)["y"]
    # float32 knows the mean to 1e-4; a difference of squares would know the variance to 1e-1.
    np.testing.assert_allclose(got, exact, atol=1e-3)


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_backward_drops_what_forward_dropped(where: tuple[str, str]) -> None:
    x = np.abs(draw(4, 6, 9, 8)) + 1.0
    options = {"norm": "none", "dropout": 0.4, "seed": 12}
    got = run(where, {"x": x}, np.ones_like(x), **options)
    kept = got["y"] != 0
    assert abs(kept.mean() - 0.6) < 0.05
    np.testing.assert_allclose(got["y"][kept], x[kept] / 0.6, rtol=1e-6)
    np.testing.assert_allclose(got["x"], kept / 0.6, rtol=1e-6)


# The Triton interpreter computes inf - inf in NumPy, which warns.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_nan_and_infinity_stay_in_their_group(where: tuple[str, str]) -> None:
    x = draw(3, 4, 3, 2)
    x[1, 0, 2, 1], x[2, 3, 0, 0] = np.nan, np.inf
    got = run(where, {"x": x}, np.ones_like(x), norm="group", num_groups=2, activation="GELU")
    for value in (got["y"], got["x"]):
        assert np.isnan(value[1, :2]).all()
        assert np.isnan(value[2, 2:]).any()
        assert np.isfinite(value[0]).all()
        assert np.isfinite(value[1, 2:]).all()
        assert np.isfinite(value[2, :2]).all()


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_no_samples(where: tuple[str, str]) -> None:
    none = np.zeros((0, 8, 2, 2), np.float32)
    inputs = {**inputs_of((1, 8, 2, 2), FILM), "x": none, "residual": none}
    got = run(where, inputs, none, norm="group", num_groups=2)
    assert got["y"].shape == got["x"].shape == none.shape
    assert not got["weight"].any()
    assert not got["bias"].any()


@pytest.mark.parametrize("implementation", TORCH)
def test_an_empty_batch_leaves_running_statistics_alone(implementation: str) -> None:
    mean, var = torch.full((4,), 2.0, device=DEVICE), torch.full((4,), 3.0, device=DEVICE)
    empty = torch.zeros(0, 4, 2, 2, device=DEVICE)
    op(empty, running_mean=mean, running_var=var, implementation=implementation)
    assert (mean == 2).all()
    assert (var == 3).all()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"norm": "layer"}, "unknown norm 'layer'"),
    ({"activation": "silu"}, "unknown activation 'silu'"),
    ({"dropout": 1.0, "seed": 0}, "dropout is 1.0"),
    ({"norm": "group", "num_groups": 3}, "num_groups is 3"),
    ({"shuffle": 3}, "must be a multiple of 9"),
    ({"shuffle": -2}, r"the sides of x are \(3, 2\)"),
    ({"x": np.zeros((2, 8, 3), np.float32), "shuffle": 2}, "it needs two"),
    ({"training": False}, "give both"),
    ({"running_var": np.ones(8, np.float32)}, "go together"),
    ({"weight": np.ones(7, np.float32)}, r"weight has shape \(7,\)"),
    ({"residual": np.ones((2, 9), np.float32)}, "residual has shape"),
    ({"scale": np.ones((2, 9), np.float32)}, "scale has shape"),
    ({"residual_first": True, "activation": "GLU"}, "residual_first with GLU"),
    ({"x": np.ones((2, 9, 1, 1), np.float32), "activation": "GLU"}, "must be even"),
    ({"x": np.ones((1, 8, 1, 1), np.float32)}, "more than 1 value per channel"),
    (
        {"x": np.ones((1, 8, 1, 1), np.float32), "norm": "group", "num_groups": 8},
        "more than 1 value per channel",
    ),
    ({"x": np.ones(3, np.float32)}, r"\(batch, channels, \*sides\)"),
]


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_named(framework: str, options: dict[str, Any], message: str) -> None:
    function: Callable[..., Any] = jax_op
    arguments = {"x": np.zeros((2, 8, 3, 2), np.float32), **options}
    if framework == "torch":
        function = op
        arguments = {
            k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v
            for k, v in arguments.items()
        }
    with pytest.raises(ValueError, match=message):
        function(**arguments)


def test_bad_types_and_implementations_are_named() -> None:
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        op(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="floating-point array, got int32"):
        jax_op(jnp.ones((2, 3), jnp.int32))
    for function, ones in ((op, torch.ones), (jax_op, jnp.ones)):
        half = torch.float16 if function is op else jnp.float16
        with pytest.raises(TypeError, match="residual is"):
            function(ones((2, 3)), residual=ones((2, 3), dtype=half))
    with pytest.raises(ValueError, match="give seed="):
        jax_op(jnp.ones((2, 3)), dropout=0.1)
    with pallas.interpret(), pytest.raises(UnsupportedImplementationError, match="XLA moves"):
        jax_op(jnp.ones((2, 4, 2, 2)), shuffle=2, implementation="pallas")


def test_explain_reports_the_choice() -> None:
    dims = {"batch": 64, "channels": 128, "height": 32, "width": 32}
    hopper = device.target("sm_90")
    assert explain(NAME, dims, device=hopper).implementation == "triton"
    odd = {**dims, "channels": 3}
    flags = {"shuffle": -2, "activation": "GLU"}
    refused = explain(NAME, odd, flags=flags, device=hopper)
    assert refused.implementation == "torch"
    assert "odd" in str(refused.against)
    large = explain(NAME, {**dims, "height": 1 << 12, "width": 1 << 12}, device=hopper)
    assert "32 bits" in str(large.against)
    for direction, expected in (("forward", "xla"), ("backward", "pallas")):
        found = explain(NAME, dims, framework="jax", device=hopper, direction=direction)
        assert found.implementation == expected


# torch


@pytest.mark.skipif(len(TORCH) == 1, reason="needs TRITON_INTERPRET=1 or a GPU")
@settings(max_examples=15)
@given(data=st.data())
def test_triton_equals_the_reference_for_any_shape_and_stride(data: st.DataObject) -> None:
    options = {
        "norm": data.draw(st.sampled_from(["batch", "group", "none"])),
        "activation": data.draw(st.sampled_from(["Tanh", "ELU", "SwiGLU"])),
        "dropout": data.draw(st.sampled_from([0.0, 0.3])),
        "seed": data.draw(st.integers(-9, 9)),
        "shuffle": data.draw(st.sampled_from([0, 2, 3, -2, -3])),
    }
    factor = max(abs(options["shuffle"]), 1)
    batch, width = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 4))
    sides = [data.draw(st.integers(1, 5)) for _ in range(2)]
    if options["shuffle"] < 0:
        sides = [side * factor for side in sides]
    channels = 2 * width * (factor**2 if options["shuffle"] > 0 else 1)
    options["num_groups"] = 2 if options["norm"] == "group" else 1
    inputs = inputs_of((batch, channels, *sides), FILM, **options)
    step = data.draw(st.integers(1, 2))
    last = data.draw(st.booleans())

    def strided(value: np.ndarray) -> torch.Tensor:
        """Every ``step``-th sample, and at 2 every second column, of a larger tensor."""
        wide = torch.full(
            (value.shape[0] * step, *value.shape[1:3], value.shape[3] * step), torch.nan
        )
        if last:
            wide = wide.contiguous(memory_format=torch.channels_last)
        view = wide.to(DEVICE)[::step, :, :, :: data.draw(st.sampled_from([1, step]))]
        view = view[..., : value.shape[3]]
        return view.copy_(torch.from_numpy(value))

    leaves = {
        name: (strided(value) if value.ndim == 4 else torch.from_numpy(value).to(DEVICE))
        for name, value in inputs.items()
    }
    for value in leaves.values():
        value.requires_grad_()
    y = op(**leaves, **options, implementation="triton")
    layout = torch.channels_last if last else torch.contiguous_format
    assert y.is_contiguous(memory_format=layout) or sides == [1, 1]
    of_y = draw(*y.shape, seed=30)
    found = torch.autograd.grad(y, list(leaves.values()), strided(of_y))
    exact = reference.forward(inputs, **options)
    exact |= reference.backward(inputs, {"y": of_y}, **options)
    few = channels // options["num_groups"] * sides[0] * sides[1] < 8 or options["norm"] == "batch"
    for name, value in {"y": y, **dict(zip(leaves, found, strict=True))}.items():
        off = np.abs(value.detach().cpu().numpy() - exact[name]).max()
        # A few nearly equal elements are divided by almost nothing.
        allowed = 1e-2 if few and options["norm"] != "none" else 2e-5
        assert off < allowed * (np.abs(exact[name]).max() + 1.0), name


@pytest.mark.skipif(len(TORCH) == 1, reason="needs TRITON_INTERPRET=1 or a GPU")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("call", ["batch", "group", "film"])
def test_samples_of_many_tiles(call: str, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than programs, and no multiple of them: three tiles of a sample, or nine, for two
    programs, and eighteen of a batch for four."""
    from ml_networks.kernels.norm_activation_shuffle import triton_kernel

    chunks, processors = triton_kernel._chunks, 1 if last else 4
    monkeypatch.setattr(triton_kernel, "_chunks", lambda *sizes: chunks(*sizes[:3], processors))
    monkeypatch.setattr(spec, "_config", lambda problem, device: spec.Config(64, 1))
    options: dict[str, Any] = {"activation": "SiLU"}
    if call == "group":
        options |= {"norm": "group", "num_groups": 2}
    inputs = inputs_of((2, 4, 9, 15), () if call == "film" else FILM)
    leaves = {k: torch.from_numpy(v).to(DEVICE) for k, v in inputs.items()}
    if last:
        leaves["x"] = leaves["x"].contiguous(memory_format=torch.channels_last)
    for value in leaves.values():
        value.requires_grad_()
    y = op(**leaves, **options, implementation="triton")
    of_y = draw(*y.shape, seed=30)
    wanted = torch.from_numpy(of_y).to(DEVICE)
    found = torch.autograd.grad(y, list(leaves.values()), wanted)
    exact = reference.forward(inputs, **options)
    exact |= reference.backward(inputs, {"y": of_y}, **options)
    for name, value in {"y": y, **dict(zip(leaves, found, strict=True))}.items():
        off = np.abs(value.detach().cpu().numpy() - exact[name]).max()
        assert off < 5e-6 * np.abs(exact[name]).max(), name


@pytest.mark.skipif(len(TORCH) == 1, reason="needs TRITON_INTERPRET=1 or a GPU")
def test_a_programs_tiles_beyond_the_last_read_no_moments() -> None:
    from ml_networks.kernels.norm_activation_shuffle import triton_kernel

    options = torch_op.Options("group", 1, "SiLU", 1e-5, 0, 0.0, False, False)
    inputs = inputs_of((2, 2, 9, 15), ("residual", *FILM))
    x, weight, bias = (torch.from_numpy(value).to(DEVICE) for value in inputs.values())
    # Behind the moments of the two samples lies NaN.
    mean, var = (
        torch.cat((value, torch.full((30, 1), torch.nan, device=DEVICE)))[:2]
        for value in torch_op._moments(x, options)
    )
    of_y = draw(*x.shape, seed=30)
    config, two = spec.Config(64, 1), replace(device.target("sm_90"), processors=2)
    pulled = torch.from_numpy(of_y).to(DEVICE)
    found = triton_kernel.backward(
        x, weight, bias, *[None] * 3, mean, var, None, pulled, options, config, two
    )
    exact = reference.backward(inputs, {"y": of_y}, norm="group", activation="SiLU")
    for name, value in zip(inputs, found, strict=False):
        off = np.abs(value.cpu().numpy() - exact[name]).max()
        assert off < 5e-6 * np.abs(exact[name]).max(), name


@pytest.mark.parametrize("implementation", TORCH)
def test_offsets_beyond_two_to_the_31(implementation: str) -> None:
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    x = memory.as_strided((3, 2, 2, 3), (2**30, 6, 3, 1))
    x.copy_(torch.from_numpy(draw(3, 2, 2, 3)))
    far = op(x, implementation=implementation)
    torch.testing.assert_close(far, op(x.contiguous(), implementation=implementation))


@pytest.mark.parametrize("implementation", TORCH)
def test_channels_last_stays(implementation: str) -> None:
    inputs = inputs_of((2, 8, 3, 5), FILM, shuffle=2)
    leaves = {k: torch.from_numpy(v).to(DEVICE) for k, v in inputs.items()}
    expected = op(**leaves, shuffle=2, implementation="torch")
    leaves["x"] = leaves["x"].contiguous(memory_format=torch.channels_last).requires_grad_()
    y = op(**leaves, shuffle=2, implementation=implementation)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    if implementation == "triton":
        assert y.is_contiguous(memory_format=torch.channels_last)
        (of_x,) = torch.autograd.grad(y.square().sum(), leaves["x"])
        assert of_x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("implementation", TORCH)
def test_repeated_calls_give_the_same_bits(implementation: str) -> None:
    inputs = inputs_of((9, 16, 8, 8))
    of_y = draw(9, 16, 8, 8, seed=5)
    first, second = (
        run(("torch", implementation), inputs, of_y, activation="SiLU") for _ in range(2)
    )
    assert all(np.array_equal(first[name], second[name]) for name in first)


OPTIONS: list[dict[str, Any]] = [
    {"norm": "batch", "activation": "SiLU", "residual_first": True},
    {"norm": "group", "num_groups": 2, "activation": "SwiGLU", "dropout": 0.3, "shuffle": -2},
    {"training": False, "activation": "Softplus", "shuffle": 2, "dropout": 0.2},
    {"norm": "none", "activation": "Tanh"},
]


def double(shape: tuple[int, ...], options: dict[str, Any]) -> dict[str, torch.Tensor]:
    inputs = inputs_of(shape, **options)
    return {k: torch.from_numpy(v).double() for k, v in inputs.items()}


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_twice(options: dict[str, Any]) -> None:
    tensors = double((2, 4, 2, 2), options)
    running = {k: v for k, v in tensors.items() if k.startswith("running")}
    leaves = [v.requires_grad_() for k, v in tensors.items() if k not in running]

    def function(*values: torch.Tensor) -> torch.Tensor:
        return op(*values, **running, **options, seed=4)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def op_arguments(
    options: dict[str, Any], batch: int = 3
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Those of the forward and of the backward op."""
    inputs = inputs_of((batch, 8, 4, 2), **options)
    tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}
    running = [tensors.pop(name, None) for name in RUNNING]
    leaves = [value.requires_grad_() for value in tensors.values()]
    seed = torch.tensor([3]) if options.get("dropout") else None
    norm = "given" if running[0] is not None else options["norm"]
    groups = options.get("num_groups", 1)
    first = options.get("residual_first", False)
    fixed = (norm, groups, options["activation"], 1e-5, options.get("shuffle", 0))
    fixed = *fixed, options.get("dropout", 0.0), first, False, None
    of_y = torch.from_numpy(draw(*leaves[3].shape, seed=8)).requires_grad_()
    forward = (*leaves, *running, seed, *fixed)
    moments = torch_op._moments(leaves[0].detach(), torch_op.Options(*fixed[:-1]))
    moments = moments if norm in ("batch", "group") else running
    kept = leaves if first else [*leaves[:3], None, *leaves[4:]]
    return forward, (*kept, *moments, seed, of_y, *fixed)


@pytest.mark.skipif(DEVICE == "cuda", reason="the plain path in the op is for a CPU")
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]])
def test_custom_ops_pass_opcheck(options: dict[str, Any]) -> None:
    forward, backward = op_arguments(options)
    torch.library.opcheck(torch_op._forward_op, forward)
    torch.library.opcheck(torch_op._backward_op, backward)


@pytest.mark.skipif(DEVICE == "cuda", reason="the plain path in the op is for a CPU")
@pytest.mark.parametrize("options", OPTIONS)
def test_the_backward_op_equals_autograd_and_can_be_differentiated(
    options: dict[str, Any],
) -> None:
    forward, backward = op_arguments(options)
    fixed = torch_op.Options(*forward[9:-1])
    moments = forward[6:8]
    y = torch_op._plain(*forward[:6], *moments, forward[8], fixed)
    # A cotangent that depends on the inputs, as in any loss that is not linear.
    wanted = [v for v in forward[:6] if v is not None]
    of_y = backward[9] * forward[0].sum() * forward[1].sum()
    expected = torch.autograd.grad(y, wanted, of_y, create_graph=True, allow_unused=True)
    found = torch_op._backward_op(*backward[:9], of_y, *backward[10:])
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if f.numel()]
    assert len(pairs) >= 5
    for got, exact in pairs:
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
    inputs = [forward[0], forward[1], forward[2], forward[4], backward[9]]
    loss, exact_loss = (sum(pair[i].square().sum() for pair in pairs) for i in range(2))
    second = torch.autograd.grad(loss, inputs, retain_graph=True)
    exact = torch.autograd.grad(exact_loss, inputs)
    for got, wanted_value in zip(second, exact, strict=True):
        scale = wanted_value.abs().max().item()
        torch.testing.assert_close(got, wanted_value, rtol=1e-3, atol=1e-4 * (1 + scale))


# Tracing an autograd.Function, torch._dynamo instantiates it, which torch.autograd deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("implementation", TORCH)
def test_compiles_whole_and_does_not_recompile_for_a_new_batch(implementation: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        y = op(
            x,
            weight,
            running_mean=mean,
            running_var=torch.ones_like(mean),
            activation="SwiGLU",
            shuffle=2,
            dropout=0.2,
            seed=5,
            implementation=implementation,
        )
        return y.square().sum()

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    weight = torch.from_numpy(draw(8, seed=1)).to(DEVICE).requires_grad_()
    means = torch.zeros(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    for batch in (3, 5, 6):
        x = torch.from_numpy(draw(batch, 8, 2, 3)).to(DEVICE)
        torch._dynamo.mark_dynamic(x, 0)
        x.requires_grad_()
        found = torch.autograd.grad(compiled(x, weight, means[0]), (x, weight))
        exact = torch.autograd.grad(function(x, weight, means[1]), (x, weight))
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*means)
    assert counter.frame_count == 1


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("implementation", TORCH)
def test_autocast_leaves_dtypes_alone(implementation: str, norm: str) -> None:
    x = torch.from_numpy(draw(4, 8, 2, 2)).to(DEVICE)
    weight = torch.full((8,), 1.5, device=DEVICE)
    options = {"norm": norm, "implementation": implementation}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert op(x, weight, **options).dtype == x.dtype
        half = op(x.bfloat16(), weight, **options)
    assert half.dtype == torch.bfloat16
    exact = op(x, weight, norm=norm, implementation="torch")
    torch.testing.assert_close(half.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("implementation", TORCH)
def test_without_a_seed_torch_draws_one(implementation: str) -> None:
    x = torch.ones(5, 4, 9, 9, device=DEVICE)
    options = {"norm": "none", "dropout": 0.5, "implementation": implementation}
    torch.manual_seed(0)
    first, second = (op(x, **options) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(op(x, **options), first)


@pytest.mark.parametrize("implementation", TORCH)
def test_transforms_of_torch_func(implementation: str) -> None:
    x = torch.from_numpy(draw(3, 2, 4, 2, 2)).to(DEVICE)
    weight = torch.from_numpy(draw(3, 4, seed=1)).to(DEVICE)

    def size(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = op(x, weight, norm="group", activation="GELU", implementation=implementation)
        return y.square().sum()

    gradients = torch.func.vmap(torch.func.grad(size, (0, 1)))(x, weight)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    total = sum(size(*pair) for pair in zip(*leaves, strict=True))
    torch.testing.assert_close(gradients, torch.autograd.grad(total, leaves), rtol=1e-4, atol=1e-4)


# JAX


def test_transforms_of_jax() -> None:
    options = {"norm": "group", "num_groups": 2, "activation": "SiLU", "dropout": 0.25}
    inputs = {k: jnp.asarray(v) for k, v in inputs_of((2, 4, 2, 3), FILM, **options).items()}

    def loss(values: dict[str, jax.Array], seed: Any, implementation: str) -> jax.Array:
        y = jax_op(**values, **options, seed=seed, implementation=implementation)
        return (y * y).sum()

    def gradient_size(values: dict[str, jax.Array], implementation: str) -> jax.Array:
        gradients = jax.grad(loss)(values, 7, implementation)
        return sum((g * g).sum() for g in gradients.values())

    with pallas.interpret():
        seeds = jnp.arange(2)
        of_one = jax.jit(jax.grad(loss), static_argnums=2)
        expected = [of_one(inputs, seed, "xla") for seed in seeds]
        vectorized = jax.vmap(lambda v, s: jax.grad(loss)(v, s, "pallas"), (None, 0))
        together = jax.jit(vectorized)(inputs, seeds)
        second, exact = (
            jax.jit(jax.grad(gradient_size), static_argnums=1)(inputs, implementation)
            for implementation in ("pallas", "xla")
        )
    for index, gradients in enumerate(expected):
        for name, value in gradients.items():
            np.testing.assert_allclose(together[name][index], value, rtol=2e-4, atol=2e-4)
    for name, value in second.items():
        np.testing.assert_allclose(value, exact[name], rtol=1e-3, atol=1e-2)
