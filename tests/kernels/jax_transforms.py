"""JAX's transforms of an op's gradient, against that gradient itself."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ml_networks.kernels.core import pallas

Arrays = dict[str, jax.Array]


def assert_transforms(
    loss: Callable[[Arrays, str], jax.Array], inputs: Arrays, mapped: str, implementation: str
) -> None:
    """jit, vmap over the input ``mapped``, scan, checkpoint, and the gradient of a gradient's size
    against that through XLA, of ``loss(inputs, implementation)``."""
    several = jnp.stack([inputs[mapped], 2.0 * inputs[mapped]])

    def own(values: Arrays) -> jax.Array:
        return loss(values, implementation)

    def of(value: jax.Array) -> Arrays:
        return jax.grad(own)({**inputs, mapped: value})

    def gradient_size(values: Arrays, name: str) -> jax.Array:
        return sum((g * g).sum() for g in jax.grad(loss)(values, name).values())

    with pallas.interpret():
        expected = [jax.jit(of)(value) for value in several]
        together = jax.jit(jax.vmap(of))(several)
        _, scanned = jax.lax.scan(lambda c, value: (c, of(value)), 0, several)
        kept = jax.jit(jax.grad(jax.checkpoint(own)))(inputs)
        second, exact = (
            jax.jit(jax.grad(gradient_size), static_argnums=1)(inputs, name)
            for name in (implementation, "xla")
        )
    for name in inputs:
        for index, gradients in enumerate(expected):
            for found in (together, scanned):
                np.testing.assert_allclose(
                    found[name][index], gradients[name], rtol=1e-4, atol=1e-4
                )
        np.testing.assert_allclose(kept[name], expected[0][name], rtol=1e-4, atol=1e-4)
        scale = np.abs(exact[name]).max()
        np.testing.assert_allclose(second[name] / scale, exact[name] / scale, atol=1e-4)
