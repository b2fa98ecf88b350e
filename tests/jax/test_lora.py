"""What the cross-framework suite does not show of the low-rank layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ml_networks.convert import state_dict
from ml_networks.jax import HyperLoRALinear, LoRALinear
from ml_networks.jax.primitives import Linear

Layer = LoRALinear | HyperLoRALinear


def layer_of(cls: type) -> Layer:
    layer = cls(7, 5, 3, rngs=nnx.Rngs(0))
    adapter = layer.lora_B if cls is LoRALinear else layer.to_u.kernel
    adapter[...] = jax.random.normal(jax.random.key(1), adapter.shape)
    return layer


X = np.random.default_rng(0).standard_normal((4, 7)).astype(np.float32)
each = pytest.mark.parametrize("cls", [LoRALinear, HyperLoRALinear])


@each
def test_merging_keeps_the_result_and_unmerging_restores_every_bit(cls: type) -> None:
    layer, x = layer_of(cls), jnp.asarray(X[0])
    before, kernel, saved = layer(x), layer.kernel[...], state_dict(layer)
    layer.merge() if isinstance(layer, LoRALinear) else layer.merge(x)
    assert layer.merged
    assert not np.array_equal(layer.kernel[...], kernel)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, x), before, rtol=1e-5, atol=1e-6)
    merged = state_dict(layer)
    assert merged.keys() == saved.keys()
    assert all(np.array_equal(merged[key], value) for key, value in saved.items())
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge(*(() if cls is LoRALinear else (x,)))
    layer.unmerge()
    assert np.array_equal(layer.kernel[...], kernel)
    assert np.array_equal(layer(x), before)


@each
def test_both_start_as_the_linear_layer(cls: type) -> None:
    layer = cls(7, 5, rngs=nnx.Rngs(0))
    expected = X @ layer.kernel[...] + layer.bias[...]
    np.testing.assert_allclose(layer(X), expected, rtol=1e-5, atol=1e-6)


def test_only_the_adapter_of_lora_learns() -> None:
    layer = layer_of(LoRALinear)
    gradients = nnx.grad(lambda m: m(X).sum())(layer)
    assert set(gradients) == {"lora_A", "lora_B"}


def test_lora_adapts_an_existing_layer() -> None:
    linear = Linear(7, 5, rngs=nnx.Rngs(0))
    layer = LoRALinear.from_linear(linear, 2, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(layer(X), linear(X), rtol=1e-5, atol=1e-6)
    bare = LoRALinear.from_linear(Linear(7, 5, bias=False, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    assert bare.bias is None


def test_bad_arguments_are_named() -> None:
    for cls in (LoRALinear, HyperLoRALinear):
        with pytest.raises(ValueError, match="rank is 0"):
            cls(7, 5, 0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="context_dim is 0"):
        HyperLoRALinear(7, 5, 2, 0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"x has shape \(4, 7\)"):
        layer_of(HyperLoRALinear).merge(X)
