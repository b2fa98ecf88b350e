"""A multi-layer perceptron in NumPy float64: the meaning of the op.

With L hidden layers, N a norm with weight and bias, m_l the dropout's factors of layer l (those of
`core.dropout` for the seed plus l 2^32) and h_0 = x:

    z_l = h_(l-1) W_l^T + b_l                       l = 1 ... L
    h_l = m_l * activation(N_l(z_l))
    y = m_(L+1) * output_activation(h_L W_(L+1)^T + b_(L+1))

The hidden layers' parameters are stacked: ``hidden_weight`` (L - 1, H, H) after ``first_weight``
(H, I), before ``last_weight`` (O, H); ``bias``, ``norm_weight`` and ``norm_bias`` (L, H).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import activations
from ..core import dropout as counter
from ..core.problem import Case

Array = NDArray[Any]


def make_inputs(case: Case, seed: int = 0) -> dict[str, Array]:
    """Rows and the parameters of a network just made, norms and biases a little off theirs."""
    generator = np.random.default_rng(seed)
    rows, inputs, width, outputs, layers = case.dims.values()
    normal = generator.standard_normal
    return {
        "x": normal((rows, inputs)),
        "first_weight": normal((width, inputs)) / np.sqrt(inputs),
        "hidden_weight": normal((layers - 1, width, width)) / np.sqrt(width),
        "last_weight": normal((outputs, width)) / np.sqrt(width),
        "bias": 0.3 * normal((layers, width)),
        "last_bias": 0.3 * normal(outputs),
        "norm_weight": 1.0 + 0.3 * normal((layers, width)),
        "norm_bias": 0.3 * normal((layers, width)),
    }


def _weights(inputs: dict[str, Array]) -> list[Array]:
    return [inputs["first_weight"], *inputs["hidden_weight"], inputs["last_weight"]]


def _dropped(shape: tuple[int, ...], dropout: float, seed: int, layer: int) -> Array:
    if not dropout:
        return np.ones(shape)
    return counter.scale(dropout, seed + (layer << 32), shape[0], shape[1])


def _norm(z: Array, norm: str, eps: float) -> tuple[Array, Array]:
    """The normalised rows and what they were scaled by."""
    if norm == "none":
        return z, np.ones((len(z), 1))
    centred = z - z.mean(-1, keepdims=True) if norm == "layer" else z
    scale = 1.0 / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
    return centred * scale, scale


def _run(
    inputs: dict[str, Array],
    norm: str,
    activation: str,
    output_activation: str,
    eps: float,
    dropout: float,
    seed: int,
) -> tuple[Array, list[tuple[Array, Array, Array, Array]], Array]:
    """The result; for each hidden layer its input, the normalised rows, their scale and what the
    activation sees; what the output activation sees."""
    h, hidden = inputs["x"], []
    *weights, last = _weights(inputs)
    for layer, weight in enumerate(weights):
        n, scale = _norm(h @ weight.T + inputs["bias"][layer], norm, eps)
        v = n * inputs["norm_weight"][layer] + inputs["norm_bias"][layer]
        hidden.append((h, n, scale, v))
        h = activations.apply(activation, v)
        h = h * _dropped(h.shape, dropout, seed, layer)
    z = h @ last.T + inputs["last_bias"]
    y = activations.apply(output_activation, z)
    hidden.append((h, z, z, z))
    return y * _dropped(y.shape, dropout, seed, len(weights)), hidden, z


def forward(
    inputs: dict[str, Array],
    *,
    norm: str = "none",
    activation: str = "Identity",
    output_activation: str = "Identity",
    eps: float = 1e-5,
    dropout: float = 0.0,
    seed: int = 0,
) -> dict[str, Array]:
    """``y`` (rows, out_features)."""
    return {"y": _run(inputs, norm, activation, output_activation, eps, dropout, seed)[0]}


def backward(
    inputs: dict[str, Array],
    cotangents: dict[str, Array],
    *,
    norm: str = "none",
    activation: str = "Identity",
    output_activation: str = "Identity",
    eps: float = 1e-5,
    dropout: float = 0.0,
    seed: int = 0,
) -> dict[str, Array]:
    """The gradients of all inputs for the cotangent of ``y``."""
    weights = _weights(inputs)
    layers = len(weights) - 1
    _, hidden, z = _run(inputs, norm, activation, output_activation, eps, dropout, seed)
    of_h = np.asarray(cotangents["y"], np.float64)
    of_h = of_h * _dropped(of_h.shape, dropout, seed, layers)
    of_z = activations.pull_back(output_activation, z, of_h)
    of_weights = [of_z.T @ hidden[-1][0]]
    found = {"last_bias": of_z.sum(0)}
    of_bias, of_norm_weight, of_norm_bias = [], [], []
    for layer in reversed(range(layers)):
        of_h = of_z @ weights[layer + 1]
        h, n, scale, v = hidden[layer]
        of_h = of_h * _dropped(of_h.shape, dropout, seed, layer)
        of_v = activations.pull_back(activation, v, of_h)
        of_norm_weight.append((of_v * n).sum(0))
        of_norm_bias.append(of_v.sum(0))
        of_z = of_v * inputs["norm_weight"][layer]
        if norm != "none":
            level = of_z.mean(-1, keepdims=True) if norm == "layer" else 0.0
            of_z = (of_z - level - n * (of_z * n).mean(-1, keepdims=True)) * scale
        of_bias.append(of_z.sum(0))
        of_weights.append(of_z.T @ h)
    last, *middle, first = of_weights
    width = first.shape[0]
    return {
        **found,
        "x": of_z @ weights[0],
        "first_weight": first,
        "hidden_weight": np.array(middle[::-1]).reshape(-1, width, width),
        "last_weight": last,
        "bias": np.array(of_bias[::-1]),
        "norm_weight": np.array(of_norm_weight[::-1]),
        "norm_bias": np.array(of_norm_bias[::-1]),
    }
