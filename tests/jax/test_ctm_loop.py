"""All ticks as one function: equal to the loop over the modules, what it keeps, when it runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ml_networks.jax import (
    ContinuousThoughtMachine,
    HyperContinuousThoughtMachine,
    LoRALinear,
    ctm,
    ctm_loop,
)
from ml_networks.kernels.core import pallas
from tests.jax.cases_ctm import SMALL

EXAMPLE: dict[str, Any] = {
    "iterations": 50,
    "d_model": 1024,
    "d_input": 256,
    "heads": 4,
    "n_synch_out": 128,
    "n_synch_action": 128,
    "synapse_depth": 8,
    "memory_length": 25,
    "deep_nlms": True,
    "memory_hidden_dims": 32,
    "do_layernorm_nlm": False,
    "backbone_type": "none",
    "positional_embedding_type": "none",
    "out_dims": 250,
    "in_channels": 64,
}
Model = Callable[[Any, jax.Array], tuple[jax.Array, ...]]


def _built(**changes: Any) -> Any:
    """In float64, no two parameters alike."""
    cls = HyperContinuousThoughtMachine if "hyper_layers" in changes else ContinuousThoughtMachine
    sizes = SMALL if "hyper_layers" in changes else SMALL.keys() - {"hyper_rank"}
    model = cls(**{k: SMALL[k] for k in sizes} | changes, rngs=nnx.Rngs(0))
    structure, parameters, rest = nnx.split(model, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    leaves = [
        leaf.astype(float) + 0.1 * jax.random.uniform(key, leaf.shape, float)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    model = nnx.merge(structure, jax.tree.unflatten(tree, leaves), rest)
    model.eval()
    return model


def _gradients(model: Model, parameters: Any, x: jax.Array) -> Any:
    """Results, and gradients under fixed cotangents."""
    results, pull = jax.vjp(model, parameters, x)
    keys = jax.random.split(jax.random.key(5), len(results))
    cotangents = [
        jax.random.normal(key, value.shape, value.dtype)
        for key, value in zip(keys, results, strict=True)
    ]
    return results, pull(tuple(cotangents))


def _assert_same(
    model: Any, compute: Callable[[Model, Any, jax.Array], Any], x: jax.Array, patch: Any
) -> None:
    """What is computed with the two loops over ticks."""
    structure, parameters, rest = nnx.split(model, nnx.Param, ...)
    found = []
    for layers_of in (ctm_loop.layers_of, lambda _: None):
        patch.setattr(ctm, "layers_of", layers_of)

        def call(parameters: Any, x: jax.Array) -> Any:
            return nnx.merge(structure, parameters, rest)(x)

        compiled = jax.jit(lambda parameters, x, call=call: compute(call, parameters, x))
        found.append(jax.tree.leaves(compiled(parameters, x)))
    # A gradient that is 0 but for rounding is measured by the others.
    largest = max(float(jnp.abs(value).max()) for value in found[1])
    for got, expected in zip(*found, strict=True):
        scale = jnp.maximum(jnp.abs(expected).max(), 1e-6 * largest)
        assert float(jnp.abs(got - expected).max() / scale) < 1e-10


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("by_ops", [False, True])
def test_equals_the_loop_over_the_modules(by_ops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctm_loop, "on_one_accelerator", lambda: by_ops)
    with jax.enable_x64(True):
        model = _built(hyper_layers="bottleneck" if by_ops else "all", synapse_depth=4)
        x = jax.random.normal(jax.random.key(1), (2, 3, 4, 5), float)
        _assert_same(model, _gradients, x, monkeypatch)


@pytest.mark.usefixtures("quick_compilation")
def test_more_axes_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a hidden layer, memory or U-Net; attention over keys and values of each head."""

    def compute(model: Model, parameters: Any, x: jax.Array) -> Any:
        gradients = jax.vmap(
            lambda x: _gradients(jax.checkpoint(model), parameters, x), in_axes=2, out_axes=1
        )
        return gradients(x)

    shallow = {"deep_nlms": False, "memory_length": 1, "synapse_depth": 1, "iterations": 2}
    monkeypatch.setattr(ctm, "absorbs_attention", lambda *_: False)
    with jax.enable_x64(True):
        model = _built(**shallow, neuron_select_type="random")
        x = jax.random.normal(jax.random.key(1), (2, 3, 3, 4, 5), float)
        _assert_same(model, compute, x, monkeypatch)


@pytest.mark.usefixtures("quick_compilation")
def test_gradients_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(model: Model, parameters: Any, x: jax.Array) -> Any:
        def size(parameters: Any, x: jax.Array) -> jax.Array:
            found = jax.tree.leaves(_gradients(model, parameters, x)[1])
            return sum((value * value).sum() for value in found)

        return jax.grad(size, (0, 1))(parameters, x)

    with jax.enable_x64(True):
        model = _built(iterations=2, synapse_depth=1)
        x = jax.random.normal(jax.random.key(1), (2, 3, 4, 5), float)
        _assert_same(model, compute, x, monkeypatch)


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def counted(loop: Any) -> Any:
        calls.append(loop)
        return ctm_loop.think(loop)

    monkeypatch.setattr(ctm, "think", counted)
    return calls


def _low_rank(model: Any) -> None:
    up = model.synapses.up_projections[0]
    up.linear = LoRALinear.from_linear(up.linear, rank=2, rngs=nnx.Rngs(0))


def _another_epsilon(model: Any) -> None:
    model.synapses.first_norm.eps = 1e-3


@pytest.mark.parametrize(
    ("changes", "alter", "whole"),
    [
        ({"dropout": 0.3}, None, True),
        ({"dropout": 0.3}, lambda model: model.train(), False),
        ({"dropout_nlm": 0.3, "synapse_depth": 1}, lambda model: model.train(), False),
        ({"do_layernorm_nlm": True}, None, False),
        ({}, _low_rank, False),
        ({}, _another_epsilon, False),
    ],
)
def test_one_function_runs_the_ticks_that_it_knows(
    changes: dict[str, Any], alter: Any, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _counted(monkeypatch)

    def predictions() -> jax.Array:
        sizes = {name: value for name, value in SMALL.items() if name != "hyper_rank"}
        model = ContinuousThoughtMachine(**sizes | changes, rngs=nnx.Rngs(0))
        model.eval()
        if alter is not None:
            alter(model)
        found: jax.Array = model(jnp.zeros((2, 3, 4, 5)))[0]
        return found

    assert jax.eval_shape(predictions).shape == (2, 6, 3)
    assert bool(calls) == whole


def test_one_gpu_runs_it_on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a GPU would run lowers; each kernel of a scan stands once, whatever the ticks."""
    monkeypatch.setattr(ctm_loop, "on_one_accelerator", lambda: True)
    model = _built(hyper_layers="bottleneck", synapse_depth=4)
    structure, parameters, rest = nnx.split(model, nnx.Param, ...)

    def gradients(parameters: Any, x: jax.Array) -> Any:
        return _gradients(lambda p, x: nnx.merge(structure, p, rest)(x), parameters, x)

    text = pallas.lower(gradients, parameters, jnp.zeros((2, 3, 4, 5)), target_name="sm_90")
    kernels = Counter(re.findall(r'name = "(\w+)"', text))
    # Of seven linear layers three do not adapt, and two of these follow another layer.
    counts = {"norm_silu_linear": 2, "linear_norm_silu_gradient": 3, "synchronised_attention": 1}
    counts |= {
        f"neuron_level_model{kind}": 1 for kind in ("", "_trace_gradient", "_weight_gradient")
    }
    assert {name: kernels[name] for name in counts} == counts
    # Beside the queries one array: the keys, which are the values.
    (attention,) = re.findall(r'.*name = "synchronised_attention".*', text)
    assert re.findall(r"\((%[^)]*)\)", attention)[0].count("%") == 2


def test_each_tick_keeps_43_kilobytes(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = _counted(monkeypatch)

    def kept() -> tuple[Any, Any]:
        ContinuousThoughtMachine(**EXAMPLE, rngs=nnx.Rngs(0))(jnp.zeros((2, 64, 50, 50)))
        (loop,) = loops
        return loop, jax.vjp(lambda loop: ctm_loop.think(loop)[0], loop)[1]

    own, every = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part))
        for part in jax.eval_shape(kept)
    )
    widths = [1024, 880, 736, 592, 448, 304, 160, 16]
    products = sum(widths) + sum(widths[:-1])  # the way down, the way up
    a_tick = 4 * (products + 4 * 65 + 128 + 2 * 1024)  # read, sums, state and activations
    assert a_tick == 42_960
    assert every - own == 2 * (50 * a_tick + 4 * 1024 * (1 + 24))  # and the start
