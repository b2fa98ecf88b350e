from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ml_networks.config import ConvConfig, LinearConfig, MLPConfig, UNetConfig
from ml_networks.torch import unet
from tests.torch.modules import ModuleCase

CONV = ConvConfig("SiLU", 3, 1, 1, norm="group", norm_cfg={"num_groups": 2})
MLP = MLPConfig(6, 1, "Identity", LinearConfig("SiLU"))


def _inputs(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, *shape), torch.randn(batch, 3))


def _unet(name: str, shape: tuple[int, ...], **keywords: Any) -> ModuleCase:
    cls = unet.ConditionalUnet1d if len(shape) == 2 else unet.ConditionalUnet2d
    return ModuleCase(
        f"{cls.__name__}{name}",
        lambda: cls(3, shape, UNetConfig((4, 6), CONV, **keywords)),
        _inputs(*shape),
    )


MODULES = [
    _unet("", (2, 6)),
    _unet("-attention", (2, 6), has_attn=True, nhead=2, use_shuffle=True),
    _unet("-hypernet", (2, 6), use_hypernet=True),
    _unet("", (3, 4, 6), cond_pred_scale=True),
    _unet("-attention", (3, 4, 6), has_attn=True, nhead=2),
    _unet("-hypernet", (3, 4, 2), has_attn=True, nhead=2, use_hypernet=True, hyper_mlp_cfg=MLP),
    ModuleCase(
        "ConditionalResidualBlock2d",
        lambda: unet.ConditionalResidualBlock2d(4, 6, 3, CONV, True),
        _inputs(4, 5, 3),
    ),
    ModuleCase(
        "HyperConditionalResidualBlock1d",
        lambda: unet.HyperConditionalResidualBlock1d(4, 6, 3, ConvConfig("GLU", 3, 1, 1)),
        _inputs(4, 5),
    ),
]
