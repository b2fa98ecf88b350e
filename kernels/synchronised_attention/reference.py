"""Synchronised attention in NumPy float64: the meaning of the op.

For each sample, with i and j the neurons of each pair and a set of keys and values for each head:

    a = z_i z_j + r sums
    q = (scale a) W^T + b
    read = softmax(q keys^T) values

Without sums a is the product alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.problem import Case

Array = NDArray[Any]


def make_inputs(case: Case, seed: int = 0) -> dict[str, Array]:
    """Activations, pairs, sums so far, and a map and keys that make scores of order 1. Pairs share
    neurons, one is a neuron with itself; more pairs than neurons are all pairs of a few."""
    generator = np.random.default_rng(seed)
    batch, neurons, pairs, heads, queries, positions, key_width, value_width = case.dims.values()
    left, right = generator.integers(0, neurons, (2, pairs))
    right[:1] = left[:1]
    few = int(np.ceil(np.sqrt(2 * pairs + 0.25) - 0.5))
    if few <= neurons < pairs:
        left, right = (index[:pairs] for index in np.triu_indices(few))
    columns = heads * queries * key_width
    keys = generator.standard_normal((batch, heads, positions, key_width))
    inputs = {
        "z": generator.standard_normal((batch, neurons)),
        "left": left,
        "right": right,
        "r": generator.uniform(0, 1, pairs),
        "scale": generator.uniform(0.2, 1, pairs),
        "in_weight": generator.standard_normal((columns, pairs)) / np.sqrt(pairs * key_width),
        "in_bias": generator.standard_normal(columns) / np.sqrt(key_width),
        "keys": keys.swapaxes(2, 3) if case.flags["channels_first"] else keys,
        "values": generator.standard_normal((batch, heads, positions, value_width)),
        "sums": generator.standard_normal((batch, pairs)),
    }
    if case.flags["shared"]:
        del inputs["values"]
    return inputs


def _arrays(
    inputs: dict[str, Array], shared: bool, channels_first: bool
) -> tuple[Array, Array, Array, Array, Array]:
    """Keys, values, the sums, the queries (batch, heads, queries, K), and the weights."""
    keys = inputs["keys"].swapaxes(2, 3) if channels_first else inputs["keys"]
    values = keys if shared else inputs["values"]
    z, left, right = inputs["z"], inputs["left"], inputs["right"]
    sums = z[:, left] * z[:, right]
    if "sums" in inputs:
        sums = sums + inputs["r"] * inputs["sums"]
    query = (sums * inputs["scale"]) @ inputs["in_weight"].T + inputs["in_bias"]
    batch, heads, _, width = keys.shape
    query = query.reshape(batch, heads, query.shape[1] // (heads * width), width)
    scores = query @ keys.swapaxes(2, 3)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return keys, values, sums, query, weights / weights.sum(-1, keepdims=True)


def _flat(rows: Array) -> Array:
    """(batch, heads, queries, width) as (batch, heads * queries * width)."""
    return rows.reshape(len(rows), int(np.prod(rows.shape[1:])))


def forward(
    inputs: dict[str, Array], *, shared: bool = False, channels_first: bool = False
) -> dict[str, Array]:
    """``read`` (batch, heads * queries * V) and ``new_sums`` (batch, pairs)."""
    _, values, sums, _, weights = _arrays(inputs, shared, channels_first)
    return {"read": _flat(weights @ values), "new_sums": sums}


def backward(
    inputs: dict[str, Array],
    cotangents: dict[str, Array],
    *,
    shared: bool = False,
    channels_first: bool = False,
) -> dict[str, Array]:
    """The gradients of all inputs but the pairs, for the cotangents of both results."""
    keys, values, sums, query, weights = _arrays(inputs, shared, channels_first)
    of_read = np.asarray(cotangents["read"], np.float64)
    of_read = of_read.reshape(*query.shape[:3], values.shape[3])
    of_weights = of_read @ values.swapaxes(2, 3)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True))
    of_keys = of_scores.swapaxes(2, 3) @ query
    of_values = weights.swapaxes(2, 3) @ of_read
    of_query = _flat(of_scores @ keys)
    of_synchronisation = of_query @ inputs["in_weight"]
    of_sums = of_synchronisation * inputs["scale"] + np.asarray(cotangents["new_sums"], np.float64)
    z, left, right = inputs["z"], inputs["left"], inputs["right"]
    of_z = np.zeros(z.shape)
    for pair, (i, j) in enumerate(zip(left, right, strict=True)):
        of_z[:, i] += of_sums[:, pair] * z[:, j]
        of_z[:, j] += of_sums[:, pair] * z[:, i]
    gradients = {
        "z": of_z,
        "scale": (of_synchronisation * sums).sum(0),
        "in_weight": of_query.T @ (sums * inputs["scale"]),
        "in_bias": of_query.sum(0),
    }
    if "sums" in inputs:
        gradients["r"] = (of_sums * inputs["sums"]).sum(0)
        gradients["sums"] = of_sums * inputs["r"]
    if shared:
        of_keys = of_keys + of_values
    else:
        gradients["values"] = of_values
    gradients["keys"] = of_keys.swapaxes(2, 3) if channels_first else of_keys
    return gradients
