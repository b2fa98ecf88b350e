"""The synapses' U-Net by ops, as one GPU runs it."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="jax is not installed")
pytest.importorskip("flax", reason="flax is not installed")

from flax import nnx  # noqa: E402

from ml_networks.jax import HyperSynapseUNET  # noqa: E402


def test_the_ops_equal_the_layers() -> None:
    synapses = HyperSynapseUNET(24, 3, in_dims=10, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (5, 24))
    assert synapses._is_by_ops()
    np.testing.assert_allclose(synapses._by_ops(x), synapses.from_first(x), rtol=1e-5, atol=1e-5)
    synapses.skip_lns[0].eps = 1e-3
    assert not synapses._is_by_ops()
