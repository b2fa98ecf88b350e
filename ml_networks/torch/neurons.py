"""Neuron-level models: a small network of its own for every neuron, over its recent past."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ml_networks._compat import checked_keywords
from ml_networks.kernels.torch import neuron_level_model

__all__ = ["NeuronLevelModel", "SuperLinear"]


@checked_keywords()
class SuperLinear(nn.Module):
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
    """

    def __init__(
        self,
        in_dims: int,
        out_dims: int,
        N: int,
        T: float = 1.0,
        do_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_dims + out_dims)
        self.in_dims = in_dims
        self.dropout = nn.Dropout(dropout)
        self.layernorm = nn.LayerNorm(in_dims) if do_norm else nn.Identity()
        self.w1 = nn.Parameter(torch.empty(in_dims, out_dims, N).uniform_(-bound, bound))
        self.b1 = nn.Parameter(torch.zeros(1, N, out_dims))
        self.T = nn.Parameter(torch.tensor([T]))

    def per_neuron(self) -> tuple[Tensor, Tensor]:
        """Return weight (N, in, out) and bias (N, 1, out), both divided by T."""
        weight = (self.w1 / self.T).permute(2, 0, 1).contiguous()
        return weight, (self.b1 / self.T).transpose(0, 1)

    def norms_or_drops(self) -> bool:
        """Whether a layer norm or dropout comes first, for which there is no kernel."""
        drops = self.dropout.training and self.dropout.p > 0
        return drops or not isinstance(self.layernorm, nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, in_dims) to (B, N, out_dims), or (B, N) for one output."""
        weight, bias = self.per_neuron()
        x = self.layernorm(self.dropout(x)).transpose(0, 1)
        return torch.baddbmm(bias, x, weight).transpose(0, 1).squeeze(-1)


class NeuronLevelModel(nn.Sequential):
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
    """

    def __init__(
        self,
        memory_length: int,
        hidden_dims: int | None,
        n_neurons: int,
        do_norm: bool,
        dropout: float,
    ) -> None:
        widths = [memory_length] if hidden_dims is None else [memory_length, hidden_dims]
        outputs = [*widths[1:], 1]
        layers: list[nn.Module] = []
        for inner, outer in zip(widths, outputs, strict=True):
            layers += [SuperLinear(inner, 2 * outer, n_neurons, 1.0, do_norm, dropout), nn.GLU()]
        super().__init__(*layers, nn.Flatten(-2))

    def prepared(self) -> PreparedNeurons:
        """Lay the weights out for many calls with the same weights; under autocast in its dtype,
        to which every call would cast them."""
        layers = [layer for layer in self if isinstance(layer, SuperLinear)]
        prepared = []
        for layer in layers:
            weight, bias = layer.per_neuron()
            kind = weight.device.type
            autocasts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
            if autocasts and weight.dtype != torch.float64:
                dtype = torch.get_autocast_dtype(kind)
                weight, bias = weight.to(dtype), bias.to(dtype)
            prepared.append((layer, weight, bias))
        return PreparedNeurons(tuple(prepared))


@dataclass(frozen=True)
class PreparedNeurons:
    """A :class:`NeuronLevelModel` whose weights are laid out neuron by neuron."""

    layers: tuple[tuple[SuperLinear, Tensor, Tensor], ...]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The arguments of `neuron_level_model` after the first."""
        pairs = [(weight, bias.squeeze(1)) for _, weight, bias in self.layers]
        return tuple(tensor for pair in pairs for tensor in pair)

    def __call__(self, trace: Tensor) -> Tensor:
        """Map traces (B, N, memory_length) to activations (B, N)."""
        if not any(layer.norms_or_drops() for layer, *_ in self.layers):
            return neuron_level_model(trace, *self.weights)
        x = trace.transpose(0, 1)
        for layer, weight, bias in self.layers:
            x = F.glu(torch.baddbmm(bias, layer.layernorm(layer.dropout(x)), weight))
        return x.squeeze(-1).T
