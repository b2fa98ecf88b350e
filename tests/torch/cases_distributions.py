from __future__ import annotations

from torch import nn

from ml_networks.torch import BSQCodebook, Distribution
from ml_networks.torch import nn as layers
from tests.torch.modules import ModuleCase, normal


def _distribution(dist: str, n_groups: int, spherical: bool = False) -> ModuleCase:
    width = 12 if dist == "normal" else 6
    # A linear layer before it gives every case parameters.
    return ModuleCase(
        f"Distribution-{dist}{'-spherical' if spherical else ''}",
        lambda: nn.Sequential(nn.Linear(4, width), Distribution(6, dist, n_groups, spherical)),
        normal(3, 4),
        random=True,
    )


MODULES = [
    _distribution("normal", 1),
    _distribution("categorical", 2),
    _distribution("categorical", 2, spherical=True),
    _distribution("bernoulli", 2),
    _distribution("bernoulli", 2, spherical=True),
    ModuleCase("BSQCodebook", lambda: BSQCodebook(6, 4), normal(3, 6)),
    ModuleCase(
        "nn-convolutional",
        lambda: nn.Sequential(
            layers.Conv2d(2, 4, 3, padding=1),
            layers.BatchNorm2d(4),
            layers.ReLU(),
            layers.MaxPool2d(2),
            layers.Dropout(0.25),
            layers.Flatten(),
            layers.Linear(16, 5),
            layers.BatchNorm1d(5),
        ),
        normal(2, 4, 4),
    ),
]
