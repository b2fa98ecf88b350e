"""Attention, backbones, encoders and decoders of the cross-framework suite."""

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
from tests.jax.modules import Pair, normal

_IMAGES = (3, 12, 8)
_CONV = ConvConfig("ReLU", 3, 2, 1)
_ATTENTION = AttentionConfig(2, 1)
_STACK = ConvNetConfig((4, 6), (_CONV, ConvConfig("SiGLU", 3, 1, 1, norm="batch")))
_ATTENTIVE = ConvNetConfig((4, 6), (_CONV, _CONV), attention=_ATTENTION, init_channel=5)
_RESNET = ResNetConfig(
    8, 3, 5, "GELU", "Tanh", 2, n_scaling=2, norm="batch", init_channel=4, attention=_ATTENTION
)
_VIT = ViTConfig(4, TransformerConfig(8, 2, 12, 2, dropout=0.0))
_MEAN = ViTConfig(4, TransformerConfig(8, 2, 12, 1, 0.0, "SiGLU"), cls_token=False)
_HEAD = LinearConfig("Tanh", norm="layer")
_MLP = MLPConfig(7, 1, "Identity", LinearConfig("ReLU"))


def _encoder(name: str, feature_dim: Any, backbone: Any, head: Any = None) -> Pair:
    def build(library: Any, **rngs: Any) -> Any:
        return library.Encoder(feature_dim, _IMAGES, backbone, head, **rngs)

    return Pair(f"encoder {name}", build, (normal(2, 3, *_IMAGES),))


def _decoder(name: str, feature_dim: Any, backbone: Any, head: Any = None) -> Pair:
    def build(library: Any, **rngs: Any) -> Any:
        return library.Decoder(feature_dim, _IMAGES, backbone, head, **rngs)

    width = feature_dim if isinstance(feature_dim, tuple) else (feature_dim,)
    return Pair(f"decoder {name}", build, (normal(2, 3, *width),))


def _attention(cls: str, patch_size: int, *shape: int) -> Pair:
    def build(library: Any, **rngs: Any) -> Any:
        return getattr(library, cls)(4, 2, patch_size, **rngs)

    return Pair(f"{cls} {patch_size}", build, (normal(*shape),))


PAIRS = [
    _attention("Attention1d", 1, 2, 4, 7),
    _attention("Attention1d", 3, 2, 4, 9),
    _attention("Attention2d", 1, 2, 4, 3, 5),
    _attention("Attention2d", 2, 2, 4, 4, 6),
    _encoder("map", (6, 6, 4), _STACK),
    _encoder("linear", 5, _ATTENTIVE, _HEAD),
    _encoder("mlp", 5, _RESNET, _MLP),
    _encoder("average", 6 * 4 * 3, _STACK, AdaptiveAveragePoolingConfig((4, 3))),
    _encoder("average linear", 5, _STACK, AdaptiveAveragePoolingConfig((5, 2), _HEAD)),
    _encoder("spatial", 12, _STACK, SpatialSoftmaxConfig()),
    _encoder("spatial mlp", 5, _STACK, SpatialSoftmaxConfig(additional_layer=_MLP)),
    _encoder("vit", 8, _VIT),
    _encoder("vit mean linear", 5, _MEAN, _HEAD),
    _decoder("conv", 5, _STACK, _HEAD),
    _decoder("conv attention", 5, _ATTENTIVE, _MLP),
    _decoder("resnet", 5, _RESNET, _MLP),
    _decoder("resnet map", (4, 3, 2), _RESNET),
    _decoder("vit", 8, _VIT),
    _decoder("vit linear", 5, _MEAN, _HEAD),
]
