from __future__ import annotations

import torch
from torch import nn

from ml_networks.config import LinearConfig, MLPConfig
from ml_networks.torch import hypernetworks
from tests.torch.modules import ModuleCase, normal

MLP = MLPConfig(6, 1, "Identity", LinearConfig("SiLU", "layer"))


def _image_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


MODULES = [
    ModuleCase(
        "HyperNet-shapes",
        lambda: hypernetworks.HyperNet(4, {"weight": (3, 2), "bias": (3,)}, MLP, "cos|sin"),
        normal(4),
    ),
    ModuleCase(
        "HyperNet-linear",
        lambda: hypernetworks.HyperNet(
            target_net=nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)),
            input_dim=4,
            mlp_cfg=MLP,
            input_mode="z|1-z",
        ),
        lambda batch: (torch.randn(batch, 5), torch.rand(batch, 4)),
    ),
    ModuleCase(
        "HyperNet-images",
        lambda: hypernetworks.HyperNet(4, target_net=_image_net()),
        lambda batch: (torch.randn(batch, 2, 2, 2), torch.randn(batch, 4)),
    ),
]
