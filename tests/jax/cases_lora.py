"""Low-rank layers of the cross-framework suite."""

from __future__ import annotations

from typing import Any

from flax import nnx

from tests.jax.modules import Pair, normal


def _learning(module: Any) -> Any:
    """The layer with gradients for its base weights too, and no update of zero."""
    if isinstance(module, nnx.Module):
        for name in ("kernel", "bias"):
            value = getattr(module, name)
            setattr(module, name, None if value is None else nnx.Param(value[...]))
        return module
    for name, parameter in module.requires_grad_(True).named_parameters():
        if name.startswith(("lora_B", "to_u")):
            parameter.data.normal_(std=0.3)
    return module


def _pair(name: str, cls: str, *arguments: Any, **options: Any) -> Pair:
    def build(library: Any, **rngs: Any) -> Any:
        return _learning(getattr(library, cls)(*arguments, **options, **rngs))

    return Pair(name, build, (normal(3, 4, 5),))


PAIRS = [
    _pair("lora", "LoRALinear", 5, 6, 2, 3.0),
    _pair("lora no bias", "LoRALinear", 5, 6, bias=False),
    _pair("hyper lora", "HyperLoRALinear", 5, 6, 2, 3),
    _pair("hyper lora no bias", "HyperLoRALinear", 5, 6, bias=False),
]
