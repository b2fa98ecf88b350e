"""Neuron-level models: a small network of its own for every neuron, over its recent past."""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ml_networks._compat import checked_keywords
from ml_networks.jax.layers import Identity, make_dropout
from ml_networks.jax.primitives import LayerNorm
from ml_networks.jax.rngs import RngsLike, as_rngs
from ml_networks.kernels.jax import neuron_level_model

__all__ = ["NeuronLevelModel", "SuperLinear"]

Array = jax.Array


@checked_keywords()
class SuperLinear(nnx.Module):
    """One linear layer for each of N neurons, ``y[b, n] = (x[b, n] w1[:, :, n] + b1[n]) / T``.

    Parameters
    ----------
    in_dims, out_dims
        Widths. With ``out_dims=1`` the last axis of the output is dropped.
    N
        Number of neurons.
    T
        Initial value of the learned divisor. Default 1.
    do_norm
        Whether a layer norm over ``in_dims`` comes first.
    dropout
        Dropout probability of the input. Default 0.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    def __init__(
        self,
        in_dims: int,
        out_dims: int,
        N: int,
        T: float = 1.0,
        do_norm: bool = False,
        dropout: float = 0.0,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        bound = 1 / math.sqrt(in_dims + out_dims)
        shape = (in_dims, out_dims, N)
        self.dropout = make_dropout(dropout, rngs)
        self.layernorm = LayerNorm(in_dims) if do_norm else Identity()
        self.w1 = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.b1 = nnx.Param(jnp.zeros((1, N, out_dims)))
        self.T = nnx.Param(jnp.array([T]))

    def per_neuron(self) -> tuple[Array, Array]:
        """Return weight (N, in, out) and bias (N, out), both divided by T."""
        scale = self.T[...]
        return (self.w1[...] / scale).transpose(2, 0, 1), (self.b1[...] / scale)[0]

    def norms_or_drops(self) -> bool:
        """Whether a layer norm or dropout comes first, for which there is no kernel."""
        drops = isinstance(self.dropout, nnx.Dropout) and not self.dropout.deterministic
        return drops or not isinstance(self.layernorm, Identity)

    def __call__(self, x: Array) -> Array:
        """Map (B, N, in_dims) to (B, N, out_dims), or (B, N) for one output."""
        y = self.apply(x, *self.per_neuron())
        return y[..., 0] if y.shape[-1] == 1 else y

    def apply(self, x: Array, weight: Array, bias: Array) -> Array:
        """Map (B, N, in_dims) to (B, N, out_dims) by what :meth:`per_neuron` returned."""
        x = self.layernorm(self.dropout(x))
        return jnp.einsum("bni,nio->bno", x, weight.astype(x.dtype)) + bias.astype(x.dtype)


class NeuronLevelModel(nnx.Module):
    """``z = GLU(SuperLinear(GLU(SuperLinear(trace))))``, or the outer layer alone.

    Parameters
    ----------
    memory_length
        Length of the trace.
    hidden_dims
        Width of the hidden layer; None: no hidden layer.
    n_neurons
        Number of neurons.
    do_norm
        Whether a layer norm precedes each layer.
    dropout
        Dropout probability before each layer.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    torch_names: ClassVar[dict[str, tuple[str, int, int]]] = {"layers": ("", 0, 2)}

    def __init__(
        self,
        memory_length: int,
        hidden_dims: int | None,
        n_neurons: int,
        do_norm: bool,
        dropout: float,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        widths = [memory_length] if hidden_dims is None else [memory_length, hidden_dims]
        pairs = zip(widths, [*widths[1:], 1], strict=True)
        self.layers = nnx.List(
            [
                SuperLinear(inner, 2 * outer, n_neurons, 1.0, do_norm, dropout, rngs=rngs)
                for inner, outer in pairs
            ]
        )

    def per_neuron(self) -> list[tuple[Array, Array]]:
        """The weights and biases of the layers, laid out neuron by neuron."""
        return [layer.per_neuron() for layer in self.layers]

    def __call__(self, trace: Array, weights: list[tuple[Array, Array]] | None = None) -> Array:
        """Map traces (B, N, memory_length) to activations (B, N).

        ``weights`` is what :meth:`per_neuron` returned, for many calls with the same weights.
        """
        weights = self.per_neuron() if weights is None else weights
        # XLA cannot divide a kernel among several devices.
        if jax.device_count() == 1 and not any(layer.norms_or_drops() for layer in self.layers):
            arrays = [array.astype(trace.dtype) for pair in weights for array in pair]
            return neuron_level_model(trace, *arrays)
        x = trace
        for layer, (weight, bias) in zip(self.layers, weights, strict=True):
            x = jax.nn.glu(layer.apply(x, weight, bias))
        return x[..., 0]
