"""Checkpoints of the published 0.2.6's JAX side load and give its outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import ml_networks
import ml_networks.jax as library
from ml_networks.convert import from_026_jax
from tests.golden.make_jax import DATA, call, cases

pytestmark = pytest.mark.usefixtures("quick_compilation")
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


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(DATA).iterdir()))
def test_a_checkpoint_loads(name: str) -> None:
    arrays = safetensors.load_file(Path(DATA) / f"{name}.safetensors")
    state = {k.removeprefix("state/"): v for k, v in arrays.items() if k.startswith("state/")}
    build, *_ = cases(library, ml_networks, nnx.Rngs(1))[name]
    module = build()
    from_026_jax({**nested(state), "dropout": {"rngs": {"count": np.zeros(())}}}, module)
    module.eval()
    inputs = [arrays[key] for key in ("input", "input1") if key in arrays]
    expected = arrays["output"]
    # 0.2.6 is channels-last; so are the feature maps that it flattens.
    maps = inputs[0].ndim > 2
    first = [np.moveaxis(x, -1, 1) if x.ndim > 2 else x for x in inputs]
    got = np.asarray(nnx.jit(call)(module, *first))
    if maps:
        got = np.moveaxis(got, 1, -1)
    np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_another_config_is_refused_and_nothing_changes() -> None:
    arrays = safetensors.load_file(Path(DATA) / "mlp.safetensors")
    state = {k.removeprefix("state/"): v for k, v in arrays.items() if k.startswith("state/")}
    build, *_ = cases(library, ml_networks, nnx.Rngs(1))["mlp"]
    module = build()
    before = np.asarray(module.layers[0].linear.kernel[...])
    fewer = {k: v for k, v in state.items() if k != "layers/1/norm/scale"}
    with pytest.raises(KeyError, match="missing: layers/1/norm/scale"):
        from_026_jax(nested(fewer), module)
    wider = {**state, "layers/0/linear/bias": np.zeros(7, np.float32)}
    with pytest.raises(ValueError, match=r"layers/0/linear/bias has shape \(7,\)"):
        from_026_jax(nested(wider), module)
    np.testing.assert_array_equal(before, np.asarray(module.layers[0].linear.kernel[...]))
