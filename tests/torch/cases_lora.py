from __future__ import annotations

from torch import nn

from ml_networks.torch import HyperLoRALinear, LoRALinear
from tests.torch.modules import ModuleCase, normal


def _nonzero(module: nn.Module) -> nn.Module:
    """Adapters that start at zero would let parameters learn nothing."""
    for name, parameter in module.named_parameters():
        if name.startswith(("lora_B", "to_u")):
            nn.init.normal_(parameter, std=0.3)
    return module.requires_grad_(True)


MODULES = [
    ModuleCase("LoRALinear", lambda: _nonzero(LoRALinear(5, 6, 2, alpha=3.0)), normal(5)),
    ModuleCase("HyperLoRALinear", lambda: _nonzero(HyperLoRALinear(5, 6, 2, 3)), normal(4, 5)),
]
