from __future__ import annotations

from typing import Any

from ml_networks.config import (
    AdaptiveAveragePoolingConfig,
    AttentionConfig,
    ConvConfig,
    ConvNetConfig,
    LinearConfig,
    MLPConfig,
    ResNetConfig,
    SpatialSoftmaxConfig,
    TransformerConfig,
    ViTConfig,
)
from ml_networks.torch import vision
from tests.torch.modules import ModuleCase, normal

IMAGE = (3, 8, 8)
LINEAR = LinearConfig("Tanh")
MLP = MLPConfig(6, 1, "Identity", LinearConfig("SiLU", "layer"))
DOWN = ConvConfig("ReLU", 3, 2, 1, norm="batch")
ATTENTION = AttentionConfig(2, 1)
BACKBONES: dict[str, Any] = {
    "ConvNet": ConvNetConfig((4, 6), (DOWN, DOWN), ATTENTION),
    "ResNet": ResNetConfig(
        4, 3, 3, "SiLU", "Tanh", 1, 2, 1, "group", {"num_groups": 1}, attention=ATTENTION
    ),
    "ViT": ViTConfig(4, TransformerConfig(8, 2, 12, 2)),
}
HEADS: dict[str, Any] = {
    "Linear": LINEAR,
    "MLP": MLP,
    "AdaptiveAveragePooling": AdaptiveAveragePoolingConfig(2, LINEAR),
    "SpatialSoftmax": SpatialSoftmaxConfig(additional_layer=MLP),
}


def _encoder(backbone: str, head: str) -> ModuleCase:
    return ModuleCase(
        f"Encoder-{backbone}-{head}",
        lambda: vision.Encoder(5, IMAGE, BACKBONES[backbone], HEADS[head]),
        normal(*IMAGE),
    )


def _decoder(backbone: str, head: str) -> ModuleCase:
    return ModuleCase(
        f"Decoder-{backbone}-{head}",
        lambda: vision.Decoder(5, IMAGE, BACKBONES[backbone], HEADS[head]),
        normal(5),
    )


MODULES = [
    *(
        _encoder(backbone, head)
        for backbone in BACKBONES
        for head in HEADS
        if backbone != "ViT" or head in ("Linear", "MLP")
    ),
    *(_decoder(backbone, head) for backbone in BACKBONES for head in ("Linear", "MLP")),
    ModuleCase(
        "Encoder-ViT-mean",
        lambda: vision.Encoder(
            8, IMAGE, ViTConfig(4, TransformerConfig(8, 2, 12, 1), cls_token=False)
        ),
        normal(*IMAGE),
    ),
]
