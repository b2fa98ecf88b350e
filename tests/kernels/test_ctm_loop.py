"""The kernels of a tick of the Continuous Thought Machine, together: what its loop runs on a GPU.

They run where ``TRITON_INTERPRET=1`` is set or a GPU is found.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ml_networks.kernels import record_usage, use_implementation  # noqa: E402
from ml_networks.torch import HyperContinuousThoughtMachine, ctm_loop  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAN_RUN = os.environ.get("TRITON_INTERPRET") == "1" or DEVICE == "cuda"
SMALL: dict[str, Any] = {
    "iterations": 3,
    "d_model": 40,
    "d_input": 8,
    "heads": 2,
    "n_synch_out": 6,
    "n_synch_action": 7,
    "synapse_depth": 4,
    "memory_length": 3,
    "deep_nlms": True,
    "memory_hidden_dims": 2,
    "do_layernorm_nlm": False,
    "backbone_type": "none",
    "positional_embedding_type": "none",
    "out_dims": 4,
    "in_channels": 5,
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"hyper_layers": "none"},
    "hyper": {"hyper_layers": "bottleneck", "hyper_rank": 2},
    "heads apart": {"hyper_layers": "none", "in_channels": 24},
    "one layer": {"hyper_layers": "none", "synapse_depth": 1, "deep_nlms": False},
}


def _gradients(model: Any, x: Any) -> dict[str, Any]:
    predictions, certainties, synchronisation = model(x)
    loss = predictions.square().sum() + certainties[:, 1].sum() + synchronisation.sum()
    wanted = {"x": x, **dict(model.named_parameters())}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    named = {name: value for name, value in zip(wanted, found, strict=True) if value is not None}
    return {"predictions": predictions.detach(), **named}


@pytest.mark.skipif(not CAN_RUN, reason="needs TRITON_INTERPRET=1 or a GPU")
@pytest.mark.parametrize("form", FORMS)
def test_all_ticks_by_kernels(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    options = {**SMALL, **FORMS[form]}
    model = HyperContinuousThoughtMachine(**options).double()
    for name, parameter in model.named_parameters():
        if name.startswith("decay"):
            parameter.data.uniform_(0, 2)
        elif "to_u" in name:
            parameter.data.normal_(std=0.3)
    x = torch.randn(3, options["in_channels"], 9, dtype=torch.float64, requires_grad=True)
    exact = _gradients(model, x)
    monkeypatch.setattr(ctm_loop, "_natively", lambda _: False)
    model = model.float().to(DEVICE)
    with use_implementation("triton"), record_usage() as usage:
        found = _gradients(model, x.detach().float().to(DEVICE).requires_grad_())
    assert found.keys() == exact.keys()
    largest = max(float(value.abs().max()) for value in exact.values())
    for name, value in exact.items():
        scale = max(float(value.abs().max()), 1e-3 * largest)
        assert float((found[name].cpu() - value).abs().max()) / scale < 2e-4, name
    ran = {row.op for row in usage.rows if row.implementation == "triton"}
    assert {"synchronised_attention", "neuron_level_model"} <= ran
    assert ("norm_silu_linear" in ran) == ("norm_silu_skip_norm" in ran) == (form != "one layer")
