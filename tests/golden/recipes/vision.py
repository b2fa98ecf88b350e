"""Image backbones, encoders and decoders.

Left out, because 0.2.6 computes them wrongly or not at all: transposed convolutions with an
output padding or whose sizes need one, ConvNet with a scale factor behind a head, gated
activations in the ResNets, heads whose feature_dim 0.2.6 replaces silently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Case = Callable[[Any], tuple[Any, ...]]

IMAGE = (3, 8, 8)


def _convnet(ml: Any, attention: bool = False, activation: str = "ELU", **keywords: Any) -> Any:
    down = ml.ConvConfig(activation, 3, 2, 1, **keywords)
    return ml.ConvNetConfig((4, 6), (down, down), ml.AttentionConfig(2, 1) if attention else None)


def _transposed(ml: Any, attention: bool = False, init_channel: int = 5, **keywords: Any) -> Any:
    up = ml.ConvConfig("ELU", 4, 2, 1, **keywords)
    attention_cfg = ml.AttentionConfig(2, 1) if attention else None
    return ml.ConvNetConfig((6, 4), (up, up), attention_cfg, init_channel)


def _resnet(ml: Any, attention: bool = False, **keywords: Any) -> Any:
    fields = {"norm": "batch", "scale_factor": 2, "n_scaling": 1, "init_channel": 5} | keywords
    attention_cfg = ml.AttentionConfig(2, 1) if attention else None
    return ml.ResNetConfig(4, 3, 5, "ELU", "Tanh", 2, attention=attention_cfg, **fields)


def _vit(ml: Any, **keywords: Any) -> Any:
    return ml.ViTConfig(4, ml.TransformerConfig(8, 2, 12, 2, 0.0, "GELU", "GELU"), **keywords)


def _linear(ml: Any) -> Any:
    return ml.LinearConfig("Tanh")


def _mlp(ml: Any) -> Any:
    return ml.MLPConfig(7, 1, "Identity", ml.LinearConfig("SiLU", norm="layer"))


def _images(*batch: int) -> torch.Tensor:
    return torch.randn(*batch, *IMAGE)


def _encoder(feature_dim: Any, backbone: Any, head: Any = None, *batch: int) -> Case:
    def build(ml: Any) -> tuple[Any, ...]:
        fc_cfg = None if head is None else head(ml)
        return ml.Encoder(feature_dim, IMAGE, backbone(ml), fc_cfg), (_images(*batch or (2,)),), {}

    return build


def _decoder(feature_dim: Any, backbone: Any, head: Any = None, *batch: int) -> Case:
    def build(ml: Any) -> tuple[Any, ...]:
        fc_cfg = None if head is None else head(ml)
        shape = feature_dim if isinstance(feature_dim, tuple) else (feature_dim,)
        code = torch.randn(*batch or (2,), *shape)
        return ml.Decoder(feature_dim, IMAGE, backbone(ml), fc_cfg), (code,), {}

    return build


CASES: dict[str, Case] = {
    "convnet-norm": lambda ml: (
        ml.ConvNet(IMAGE, _convnet(ml, norm="group", norm_cfg={"num_groups": 2})),
        (_images(2),),
        {},
    ),
    "convnet-attention": lambda ml: (ml.ConvNet(IMAGE, _convnet(ml, True)), (_images(2),), {}),
    "resnet-down-attention": lambda ml: (
        ml.ResNetPixUnshuffle(IMAGE, _resnet(ml, True, padding_mode="reflect")),
        (_images(2),),
        {},
    ),
    "resnet-up-attention": lambda ml: (
        ml.ResNetPixShuffle((5, 4, 4), IMAGE, _resnet(ml, True, norm="none")),
        (torch.randn(2, 5, 4, 4),),
        {},
    ),
    "conv-transpose-attention": lambda ml: (
        ml.ConvTranspose((5, 2, 2), IMAGE, _transposed(ml, True)),
        (torch.randn(2, 5, 2, 2),),
        {},
    ),
    "vit-cls": lambda ml: (ml.ViT(IMAGE, _vit(ml)), (_images(2),), {}),
    "vit-mean": lambda ml: (ml.ViT(IMAGE, _vit(ml, cls_token=False)), (_images(2),), {}),
    "vit-decoder": lambda ml: (
        ml.ViT((8,), _vit(ml, decoder_output_activation="Tanh"), IMAGE),
        (torch.randn(2, 1, 8),),
        {},
    ),
    "encoder-map": _encoder((6, 2, 2), _convnet, None, 2, 1),
    "encoder-linear": _encoder(5, _convnet, _linear, 2, 2),
    "encoder-mlp": _encoder(5, lambda ml: _convnet(ml, norm="batch"), _mlp),
    "encoder-pooling": _encoder(
        5, _convnet, lambda ml: ml.AdaptiveAveragePoolingConfig(2, _linear(ml))
    ),
    "encoder-pooling-bare": _encoder(6, _convnet, lambda ml: ml.AdaptiveAveragePoolingConfig()),
    "encoder-spatial": _encoder(
        5, _convnet, lambda ml: ml.SpatialSoftmaxConfig(additional_layer=_mlp(ml))
    ),
    "encoder-spatial-bare": _encoder(12, _convnet, lambda ml: ml.SpatialSoftmaxConfig()),
    "encoder-resnet-linear": _encoder(5, _resnet, _linear),
    "encoder-resnet-map": _encoder((4, 4, 4), lambda ml: _resnet(ml, norm="none")),
    "encoder-vit": _encoder(8, _vit),
    "encoder-vit-linear": _encoder(5, _vit, _linear),
    "encoder-vit-mlp": _encoder(5, _vit, _mlp, 2, 1),
    "decoder-map": _decoder((5, 2, 2), _transposed, None, 2, 1),
    "decoder-linear": _decoder(5, _transposed, _linear, 2, 2),
    "decoder-no-first-conv": _decoder(
        3, lambda ml: _transposed(ml, init_channel=6, norm="batch"), _mlp
    ),
    "decoder-resnet-mlp": _decoder(3, _resnet, _mlp),
    "decoder-vit": _decoder(8, _vit),
    "decoder-vit-linear": _decoder(5, _vit, _linear),
}
