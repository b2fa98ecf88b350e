"""Attention in NumPy float64: the meaning of the op.

For query i and key j of one head, with s = ``scale`` (1 / sqrt(width) by default):

    S_ij = s q_i . k_j + mask_ij      -inf where a boolean mask is False
    P_ij = exp(S_ij) / sum_j exp(S_ij)
    P_i  = 0 for a row whose scores are all -inf
    out_i = sum_j D_ij P_ij v_j       D: 0 or 1 / (1 - dropout), see `core.dropout`

``causal`` hides keys j > i, both counted from 0: the first query sees the first key, whatever the
two lengths. Head h reads the keys of head h // (heads / key_heads).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import dropout as random
from ..core.problem import Case

Array = NDArray[Any]
_TENSORS = ("query", "key", "value")


def make_inputs(case: Case, seed: int = 0) -> dict[str, Array]:
    """Standard normal queries, keys and values, (batch, heads, width, tokens) where the case says
    channels first. Masks are (batch, 1, queries, keys) and hide all keys from one row."""
    generator = np.random.default_rng(seed)
    batch, heads, key_heads, queries, keys, width = case.dims.values()
    inputs: dict[str, Array] = {
        "query": generator.standard_normal((batch, heads, queries, width)),
        "key": generator.standard_normal((batch, key_heads, keys, width)),
        "value": generator.standard_normal((batch, key_heads, keys, width)),
    }
    if case.flags.get("channels_first"):
        inputs = {name: _swapped(array) for name, array in inputs.items()}
    if case.flags.get("mask"):
        seen = generator.random((batch, 1, queries, keys)) < 0.7
        seen[-1, :, queries // 2] = False
        inputs["mask"] = seen
        if case.flags["mask"] == "additive":
            bias = np.where(seen, generator.standard_normal(seen.shape), -np.inf)
            inputs["mask"] = bias
    return inputs


def _swapped(array: Array) -> Array:
    return np.ascontiguousarray(np.swapaxes(array, -1, -2))


def _parts(
    inputs: dict[str, Array], causal: bool, scale: float | None, channels_first: bool
) -> tuple[Array, Array, Array, Array, float]:
    """Queries, keys and values with one key head for each head, P, and the scale."""
    query, key, value = (
        _swapped(array) if channels_first else array
        for array in (np.asarray(inputs[name], np.float64) for name in _TENSORS)
    )
    groups = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, groups, 1), np.repeat(value, groups, 1)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = factor * query @ np.swapaxes(key, -1, -2)
    mask = inputs.get("mask")
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:]) > 0, scores, -np.inf)
    largest = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(largest == -np.inf, 0.0, largest))
    total = weights.sum(-1, keepdims=True)
    return query, key, value, weights / np.where(total == 0, 1.0, total), factor


def _kept(weights: Array, dropout: float, seed: int) -> Array:
    """D: a row for each query of each head of each image, a column for each key."""
    if not dropout:
        return np.ones_like(weights)
    columns = weights.shape[-1]
    rows = weights.size // max(columns, 1)
    return random.scale(dropout, seed, rows, columns).reshape(weights.shape)


def forward(
    inputs: dict[str, Array],
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    channels_first: bool = False,
    mask: str | None = None,
) -> dict[str, Array]:
    """``output``, (batch, heads, queries, width)."""
    _, _, value, weights, _ = _parts(inputs, causal, scale, channels_first)
    return {"output": (weights * _kept(weights, dropout, seed)) @ value}


def backward(
    inputs: dict[str, Array],
    cotangents: dict[str, Array],
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    channels_first: bool = False,
    mask: str | None = None,
) -> dict[str, Array]:
    """The gradients of ``query``, ``key`` and ``value`` in their own layout, and of the scores."""
    query, key, value, weights, factor = _parts(inputs, causal, scale, channels_first)
    kept = _kept(weights, dropout, seed)
    of_output = np.asarray(cotangents["output"], np.float64)
    of_weights = kept * (of_output @ np.swapaxes(value, -1, -2))
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True))
    gradients = {
        "query": factor * of_scores @ key,
        "key": factor * np.swapaxes(of_scores, -1, -2) @ query,
        "value": np.swapaxes(weights * kept, -1, -2) @ of_output,
    }
    for name in ("key", "value"):
        batch, _, keys, width = gradients[name].shape
        heads = inputs[name].shape[1]
        gradients[name] = gradients[name].reshape(batch, heads, -1, keys, width).sum(2)
    if channels_first:
        gradients = {name: _swapped(array) for name, array in gradients.items()}
    return {**gradients, "scores": of_scores}
