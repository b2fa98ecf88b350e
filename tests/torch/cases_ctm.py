from __future__ import annotations

from typing import Any

from ml_networks.torch import ctm, neurons, synapses
from tests.torch.modules import ModuleCase, normal

SMALL: dict[str, Any] = {
    "iterations": 2,
    "d_model": 12,
    "d_input": 8,
    "heads": 2,
    "n_synch_out": 5,
    "n_synch_action": 4,
    "synapse_depth": 3,
    "memory_length": 4,
    "deep_nlms": True,
    "memory_hidden_dims": 3,
    "do_layernorm_nlm": False,
    "backbone_type": "none",
    "positional_embedding_type": "none",
    "out_dims": 6,
}


def _ctm(name: str, *shape: int, **changes: Any) -> ModuleCase:
    return ModuleCase(
        f"CTM-{name}", lambda: ctm.ContinuousThoughtMachine(**SMALL | changes), normal(*shape)
    )


MODULES = [
    ModuleCase("SuperLinear", lambda: neurons.SuperLinear(3, 4, 5, do_norm=True), normal(5, 3)),
    ModuleCase(
        "SynapseUNET", lambda: synapses.SynapseUNET(9, 4, minimum_width=3, in_dims=7), normal(7)
    ),
    _ctm("hoist", 9, 5, in_channels=9),
    _ctm("absorb", 3, 4, 5, in_channels=3, prediction_reshaper=[2, 3]),
    _ctm(
        "one-layer",
        *(3, 7),
        in_channels=3,
        synapse_depth=1,
        neuron_select_type="random",
        deep_nlms=False,
        do_layernorm_nlm=True,
        positional_embedding_type="custom-rotational-1d",
    ),
    _ctm(
        "images",
        *(3, 9, 7),
        backbone_type="resnet18-1",
        neuron_select_type="first-last",
        positional_embedding_type="learnable-fourier",
    ),
]
