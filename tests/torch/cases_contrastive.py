from __future__ import annotations

import torch

from ml_networks.config import ContrastiveLearningConfig, LinearConfig, MLPConfig
from ml_networks.torch import contrastive
from tests.torch.modules import ModuleCase

CFG = ContrastiveLearningConfig(5, MLPConfig(6, 1, "Tanh", LinearConfig("SiLU", "layer")))

MODULES = [
    ModuleCase(
        "ContrastiveLearningLoss",
        lambda: contrastive.ContrastiveLearningLoss(4, 3, CFG),
        lambda batch: (torch.randn(batch, 2, 4), torch.randn(batch, 2, 3)),
    ),
]
