"""Checkpoints of the published 0.2.6's JAX side load and give its outputs."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ml_networks
import ml_networks.jax as library
from ml_networks.convert import from_026_jax
from tests.golden.make_jax import DATA, cases

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")


def nested(flat: dict[str, np.ndarray]) -> dict:
    """A pure dict as Orbax restores it: lists' indices are integers."""
    tree: dict = {}
    for key, value in flat.items():
        *path, last = [int(part) if part.isdigit() else part for part in key.split("/")]
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


@pytest.mark.parametrize("name", ["mlp", "conv", "convnet", "unshuffle"])
def test_a_checkpoint_loads(name: str) -> None:
    arrays = safetensors.load_file(Path(DATA) / f"{name}.safetensors")
    state = {k.removeprefix("state/"): v for k, v in arrays.items() if k.startswith("state/")}
    module, _ = cases(library, ml_networks, jax.random.key(1))[name]
    from_026_jax({**nested(state), "dropout": {"rngs": {"count": np.zeros(())}}}, module)
    module.eval()
    x, expected = arrays["input"], arrays["output"]
    images = x.ndim == 4
    got = module(jnp.asarray(np.moveaxis(x, -1, 1) if images else x))
    got = np.moveaxis(np.asarray(got), 1, -1) if images else np.asarray(got)
    np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_another_config_is_refused_and_nothing_changes() -> None:
    arrays = safetensors.load_file(Path(DATA) / "mlp.safetensors")
    state = {k.removeprefix("state/"): v for k, v in arrays.items() if k.startswith("state/")}
    module, _ = cases(library, ml_networks, jax.random.key(1))["mlp"]
    before = np.asarray(module.layers[0].linear.kernel[...])
    fewer = {k: v for k, v in state.items() if k != "layers/1/norm/scale"}
    with pytest.raises(KeyError, match="missing: layers/1/norm/scale"):
        from_026_jax(nested(fewer), module)
    wider = {**state, "layers/0/linear/bias": np.zeros(7, np.float32)}
    with pytest.raises(ValueError, match=r"layers/0/linear/bias has shape \(7,\)"):
        from_026_jax(nested(wider), module)
    np.testing.assert_array_equal(before, np.asarray(module.layers[0].linear.kernel[...]))
