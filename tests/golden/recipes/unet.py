"""Conditional U-Nets and their blocks.

Left out, because 0.2.6 cannot run them: attention and hypernetworks in a U-Net.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Case = Callable[[Any], tuple[Any, ...]]


def _conv(ml: Any, **keywords: Any) -> Any:
    fields = {"activation": "SiLU", "kernel_size": 3, "stride": 1, "padding": 1}
    return ml.ConvConfig(**fields | keywords)


def _unet(
    shape: tuple[int, ...],
    channels: tuple[int, ...],
    batch: tuple[int, ...] = (2,),
    conv: dict[str, Any] | None = None,
    **keywords: Any,
) -> Case:
    def build(ml: Any) -> tuple[Any, ...]:
        cls = ml.ConditionalUnet1d if len(shape) == 2 else ml.ConditionalUnet2d
        cfg = ml.UNetConfig(channels, _conv(ml, **(conv or {})), **keywords)
        inputs = torch.randn(*batch, *shape), torch.randn(*batch, 3)
        return cls(3, shape, cfg), inputs, {}

    return build


def _block(cls: str, shape: tuple[int, ...], out: int, scale: bool) -> Case:
    def build(ml: Any) -> tuple[Any, ...]:
        module = getattr(ml, cls)(shape[1], out, 3, _conv(ml), scale)
        return module, (torch.randn(shape), torch.randn(shape[0], 3)), {}

    return build


def _resample(cls: str, shape: tuple[int, ...], use_shuffle: bool) -> Case:
    return lambda ml: (getattr(ml, cls)(shape[1], use_shuffle), (torch.randn(shape),), {})


CASES: dict[str, Case] = {
    "1d": _unet((2, 8), (4, 6, 8)),
    "1d-shuffle-scale": _unet((2, 8), (4, 6), use_shuffle=True, cond_pred_scale=True),
    "1d-group": _unet((2, 4), (4, 6), (2, 2), {"norm": "group", "norm_cfg": {"num_groups": 2}}),
    "2d": _unet((2, 8, 4), (4, 5, 6)),
    "2d-one-level": _unet((2, 3, 5), (4,)),
    "2d-shuffle": _unet((1, 4, 6), (4, 6), use_shuffle=True),
    "2d-scale-unbatched": _unet((2, 4, 4), (4, 6), (), cond_pred_scale=True),
    "2d-batch-norm": _unet((2, 4, 4), (4, 6), (3, 2), {"norm": "batch"}),
    "2d-glu": _unet((2, 4, 4), (4, 6), conv={"activation": "GLU"}),
    "block1d": _block("ConditionalResidualBlock1d", (2, 4, 5), 4, False),
    "block2d-scale": _block("ConditionalResidualBlock2d", (2, 4, 5, 3), 6, True),
    "down1d": _resample("Downsample1d", (2, 4, 7), False),
    "down1d-shuffle": _resample("Downsample1d", (2, 4, 6), True),
    "down2d": _resample("Downsample2d", (2, 4, 7, 4), False),
    "down2d-shuffle": _resample("Downsample2d", (2, 4, 6, 2), True),
    "up1d": _resample("Upsample1d", (2, 4, 5), False),
    "up1d-shuffle": _resample("Upsample1d", (2, 4, 5), True),
    "up2d": _resample("Upsample2d", (2, 4, 5, 3), False),
    "up2d-shuffle": _resample("Upsample2d", (2, 4, 5, 3), True),
}
