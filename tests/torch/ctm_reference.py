"""The Continuous Thought Machine written tick by tick, as its equations read: nothing is moved out
of the loop, no two matrices are multiplied. The measure of the model's own forward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def _pairs(model: Any, kind: str, z: Tensor) -> Tensor:
    """The product of every synchronised pair of neurons, (B, n)."""
    cfg = model.cfg
    n = cfg.n_synch_out if kind == "out" else cfg.n_synch_action
    left = z[:, getattr(model, f"{kind}_neuron_indices_left")]
    right = z[:, getattr(model, f"{kind}_neuron_indices_right")]
    if cfg.neuron_select_type == "random-pairing":
        return left * right
    if cfg.neuron_select_type == "first-last":
        left = right = z[:, :n] if kind == "out" else z[:, -n:]
    rows, columns = torch.triu_indices(n, n)
    return (left[:, :, None] * right[:, None, :])[:, rows, columns]


def _super_linear(layer: Any, x: Tensor) -> Tensor:
    x = layer.layernorm(layer.dropout(x))
    return (torch.einsum("BDM,MHD->BDH", x, layer.w1) + layer.b1) / layer.T


def straightforward(model: Any, x: Tensor, track: bool = False) -> tuple[Any, ...]:
    """What ``model(x, track)`` is to return."""
    features = model.backbone(model.initial_rgb(x))
    if model.positional_embedding is not None:
        features = features + model.positional_embedding(features)
    kv = model.kv_proj(features.flatten(2).transpose(1, 2))
    z = model.start_activated_state.expand(len(x), -1)
    trace = model.start_trace.expand(len(x), -1, -1)
    r = {
        k: torch.exp(-getattr(model, f"decay_params_{k}").clamp(0, 15)) for k in ("out", "action")
    }
    alpha: dict[str, Any] = {"out": _pairs(model, "out", z), "action": 0.0}
    beta: dict[str, Any] = {"out": torch.ones_like(r["out"]), "action": 0.0}
    layers = [layer for layer in model.trace_processor[0] if hasattr(layer, "w1")]
    predictions, certainties, tracked = [], [], []

    def synchronise(kind: str, z: Tensor) -> Tensor:
        alpha[kind] = r[kind] * alpha[kind] + _pairs(model, kind, z)
        beta[kind] = r[kind] * beta[kind] + 1
        return alpha[kind] / beta[kind].sqrt()

    for _ in range(model.iterations):
        action = synchronise("action", z)
        query = model.q_proj(action)[:, None]
        attended, weights = model.attention(query, kv, kv, average_attn_weights=False)
        state = model.synapses(torch.cat([attended[:, 0], z], -1))
        trace = torch.cat([trace[:, :, 1:], state[:, :, None]], -1)
        hidden = trace
        for layer in layers:
            hidden = torch.nn.functional.glu(_super_linear(layer, hidden))
        z = hidden.squeeze(-1)
        out = synchronise("out", z)
        prediction = model.output_projector(out)
        log_p = prediction.reshape(len(x), *model.cfg.prediction_reshaper).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1) / math.log(log_p.shape[-1])
        entropy = entropy.reshape(len(x), -1).mean(1)
        predictions.append(prediction)
        certainties.append(torch.stack([entropy, 1 - entropy], -1))
        if track:
            tracked.append((out, action, state, z, weights))
    results = torch.stack(predictions, -1), torch.stack(certainties, -1)
    if not track:
        return (*results, out)
    arrays = [torch.stack(v).detach().numpy() for v in zip(*tracked, strict=True)]
    return (*results, (arrays[0], arrays[1]), *arrays[2:])
