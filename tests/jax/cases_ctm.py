"""The Continuous Thought Machine and its parts, for the cross-framework suite."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from tests.jax.modules import Pair, normal

SMALL: dict[str, Any] = {
    "iterations": 3,
    "d_model": 12,
    "d_input": 8,
    "heads": 2,
    "n_synch_out": 5,
    "n_synch_action": 4,
    "synapse_depth": 2,
    "memory_length": 4,
    "deep_nlms": True,
    "memory_hidden_dims": 3,
    "do_layernorm_nlm": False,
    "backbone_type": "none",
    "positional_embedding_type": "custom-rotational",
    "out_dims": 6,
    "prediction_reshaper": [2, 3],
    "in_channels": 3,
    "hyper_rank": 2,
}


def _hyper(library: ModuleType, **rngs: Any) -> Any:
    return library.HyperContinuousThoughtMachine(**SMALL, **rngs)


def _everything(model: Any, x: Any) -> Any:
    """One array (B, out_dims, T) in which predictions, certainty and synchronisation count."""
    predictions, certainties, synchronisation = model(x)
    return predictions * certainties[:, :1] + synchronisation.sum(1)[:, None, None]


PAIRS = [
    Pair(
        "super linear",
        lambda library, **rngs: library.SuperLinear(3, 4, 5, T=2.0, do_norm=True, **rngs),
        (normal(2, 5, 3),),
    ),
    Pair(
        "hyper synapse unet",
        lambda library, **rngs: library.HyperSynapseUNET(9, 3, 3, in_dims=7, **rngs),
        (normal(2, 7),),
    ),
    Pair("ctm", _hyper, (normal(2, 3, 4, 5),), _everything),
]
