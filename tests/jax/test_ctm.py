"""The Continuous Thought Machine in JAX: golden files, backbones, dropout, tracking, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from ml_networks.convert import jax_to_torch, state_dict, torch_to_jax
from ml_networks.jax import (
    ContinuousThoughtMachine,
    HyperContinuousThoughtMachine,
    SynapseUNET,
    ctm_backbones,
    positions,
)
from tests.jax.cases_ctm import SMALL

PLAIN = {name: value for name, value in SMALL.items() if name != "hyper_rank"}
GOLDEN = sorted((Path(__file__).parent.parent / "golden" / "ctm").glob("*.safetensors"))


def off(got: Any, expected: np.ndarray) -> float:
    got = np.asarray(got)
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-6))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.usefixtures("quick_compilation")
def test_golden(path: Path) -> None:
    tensors = load_file(path)
    with safe_open(path, "np") as file:
        cfg = json.loads(file.metadata()["config"])
    model = ContinuousThoughtMachine(**cfg, rngs=jax.random.key(0))
    state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
    torch_to_jax(state, model)
    model.eval()
    structure, parameters, rest = nnx.split(model, nnx.Param, ...)

    def forward(parameters: Any) -> tuple[jax.Array, Any]:
        results = nnx.merge(structure, parameters, rest)(tensors["x"])
        loss = (results[0] * tensors["cotangent/predictions"]).sum()
        return loss + (results[1] * tensors["cotangent/certainties"]).sum(), results

    step = jax.jit(jax.value_and_grad(forward, has_aux=True))
    (_, results), gradients = step(parameters)
    for got, name in zip(results, ("predictions", "certainties", "synch_out"), strict=True):
        assert off(got, tensors[name]) < 5e-6, name
    nnx.update(model, gradients)
    named = state_dict(model)
    wanted = {k.removeprefix("grad/"): v for k, v in tensors.items() if k.startswith("grad/")}
    for name, expected in wanted.items():
        assert off(named[name], expected) < 1e-4, name


def test_a_bottleneck_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from ml_networks.torch.ctm_backbones import _Block

    theirs = _Block(8, 4, 2, bottleneck=True).eval()
    ours = ctm_backbones._Block(8, 4, 2, bottleneck=True, rngs=nnx.Rngs(0))
    torch_to_jax(theirs, ours).eval()
    x = np.random.default_rng(0).standard_normal((1, 8, 9, 7)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x)).numpy()
    assert off(ours(x), expected) < 1e-5


def test_shallow_wide_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from ml_networks.torch.ctm_backbones import ShallowWide

    theirs = ShallowWide(1).eval()
    ours = torch_to_jax(theirs, ctm_backbones.ShallowWide(1, rngs=jax.random.key(0)))
    ours.eval()
    x = np.random.default_rng(0).standard_normal((1, 1, 5, 4)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x)).numpy()
    assert off(ours(x), expected) < 1e-5
    for key, value in jax_to_torch(ours, ShallowWide(1)).state_dict().items():
        np.testing.assert_array_equal(value.numpy(), theirs.state_dict()[key].numpy())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("LearnableFourierPositionalEncoding", (1, 3, 4, 5)),
        ("MultiLearnableFourierPositionalEncoding", (1, 3, 4, 5)),
        ("CustomRotationalEmbedding", (1, 3, 4, 5)),
        ("CustomRotationalEmbedding1D", (1, 3, 5)),
    ],
)
def test_positional_embeddings_are_those_of_torch(name: str, shape: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from ml_networks.torch import positions as torch_positions

    theirs = getattr(torch_positions, name)(3)
    with torch.no_grad():  # fresh ones hide a mix-up
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    ours = torch_to_jax(theirs, getattr(positions, name)(3, rngs=jax.random.key(0)))
    expected = theirs(torch.zeros(shape)).detach().numpy()
    assert off(ours(jnp.zeros(shape)), expected) < 1e-5


@pytest.fixture(scope="module")
def model() -> ContinuousThoughtMachine:
    return ContinuousThoughtMachine(**PLAIN | {"dropout": 0.5}, rngs=nnx.Rngs(0))


think = nnx.jit(lambda model, x: model(x))
X = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)


def test_dropout_draws_anew_at_every_call(model: ContinuousThoughtMachine) -> None:
    model.train()
    first, second = think(model, X)[0], think(model, X)[0]
    assert off(first, np.asarray(second)) > 1e-3


def test_track_returns_every_tick_as_arrays(model: ContinuousThoughtMachine) -> None:
    model.eval()
    predictions, certainties, synchronisation = think(model, X)
    tracked = model(X, track=True)
    np.testing.assert_allclose(tracked[0], predictions, rtol=1e-5)
    np.testing.assert_allclose(tracked[1], certainties, rtol=1e-5)
    (out, action), pre, post, weights = tracked[2:]
    np.testing.assert_allclose(out[-1], synchronisation, rtol=1e-5)
    shapes = [value.shape for value in (out, action, pre, post, weights)]
    assert shapes == [(3, 2, 5), (3, 2, 4), (3, 2, 12), (3, 2, 12), (3, 2, 2, 1, 20)]
    assert all(isinstance(value, np.ndarray) for value in (out, action, pre, post, weights))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_bfloat16_and_decays_out_of_range(model: ContinuousThoughtMachine) -> None:
    model.eval()
    expected = np.asarray(think(model, X)[0])
    model.decay_params_out[...] = jnp.full(5, -1.0)  # counts as 0, which it was
    np.testing.assert_array_equal(think(model, X)[0], expected)
    low = jax.eval_shape(model, jax.ShapeDtypeStruct(X.shape, jnp.bfloat16))
    assert [value.dtype for value in low] == [jnp.float32, jnp.float32, jnp.bfloat16]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="backbone_type='none' needs in_channels"):
        ContinuousThoughtMachine(
            **PLAIN | {"in_channels": None, "positional_embedding_type": "none"}, rngs=nnx.Rngs(0)
        )
    with pytest.raises(ValueError, match="hyper_layers must be 'none' with synapse_depth=1"):
        HyperContinuousThoughtMachine(**SMALL | {"synapse_depth": 1}, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="SynapseUNET needs in_dims"):
        SynapseUNET(8, 3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="rngs is missing"):
        ContinuousThoughtMachine(**PLAIN)


def test_built_from_its_config(model: ContinuousThoughtMachine) -> None:
    twin = ContinuousThoughtMachine.from_config(model.cfg, rngs=nnx.Rngs(0))
    assert twin.cfg == model.cfg
    assert set(state_dict(twin)) == set(state_dict(model))
