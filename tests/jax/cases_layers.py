"""Layers of the cross-framework suite."""

from __future__ import annotations

from typing import Any

from ml_networks.config import (
    ConvConfig,
    LinearConfig,
    MLPConfig,
    SpatialSoftmaxConfig,
    TransformerConfig,
)
from tests.jax.modules import Pair, normal


def _linear(**fields: Any) -> Pair:
    cfg = LinearConfig(**{"activation": "GELU", **fields})
    name = "linear " + " ".join(f"{k}={v}" for k, v in fields.items())

    def build(library: Any, **rngs: Any) -> Any:
        return library.LinearNormActivation(5, 6, cfg, **rngs)

    return Pair(name, build, (normal(3, 2, 5),))


def _conv(cls: str, shape: tuple[int, ...], out_channels: int = 8, **fields: Any) -> Pair:
    cfg = ConvConfig(
        **{"activation": "ReLU", "kernel_size": 3, "stride": 1, "padding": 1, **fields}
    )
    name = f"{cls} " + " ".join(f"{k}={v}" for k, v in fields.items())

    def build(library: Any, **rngs: Any) -> Any:
        return getattr(library, cls)(shape[1], out_channels, cfg, **rngs)

    return Pair(name, build, (normal(*shape),))


def _pair(name: str, build: Any, *shape: int) -> Pair:
    return Pair(name, build, (normal(*shape),))


def _activation(name: str) -> Pair:
    def build(library: Any, **_: Any) -> Any:
        return getattr(library, name)()

    return Pair(name, build, (normal(3, 4, 6),), modes=(True,))


_MLP = MLPConfig(8, 2, "Tanh", LinearConfig("SiGLU", norm="layer"))
_TOKENS = TransformerConfig(8, 2, 12, 2, dropout=0.0)
PAIRS = [
    *map(_activation, ("CRReLU", "L2Norm", "REReLU", "SiGLU", "TanhExp")),
    _linear(),
    _linear(norm="layer"),
    _linear(norm="layer", norm_cfg={"eps": 1e-3, "bias": False}),
    _linear(norm="rms", norm_first=True),
    _linear(norm="rms", norm_cfg={"eps": 1e-6, "elementwise_affine": False}),
    _linear(activation="SwiGLU", bias=False),
    _pair("mlp", lambda lib, **rngs: lib.MLPLayer(5, 3, _MLP, **rngs), 4, 5),
    _conv("ConvNormActivation", (2, 4, 9, 7)),
    _conv("ConvNormActivation", (2, 4, 9, 7), norm="batch", activation="SiGLU"),
    _conv("ConvNormActivation", (2, 4, 9, 7), norm="batch", norm_first=True, stride=2),
    _conv("ConvNormActivation", (2, 4, 9, 7), norm="group", norm_cfg={"num_groups": 2}),
    _conv("ConvNormActivation", (2, 4, 9, 7), groups=2, dilation=2, padding=2, bias=False),
    _conv("ConvNormActivation", (2, 4, 9, 7), padding_mode="reflect"),
    _conv("ConvNormActivation", (2, 4, 9, 7), padding_mode="replicate"),
    _conv("ConvNormActivation", (2, 4, 9, 7), padding_mode="circular"),
    _conv("ConvNormActivation", (2, 4, 5, 3), scale_factor=2, norm="batch"),
    _conv("ConvNormActivation", (2, 4, 6, 8), scale_factor=-2),
    _conv("ConvNormActivation1d", (2, 4, 9), norm="batch"),
    _conv("ConvNormActivation1d", (2, 4, 9), scale_factor=3, norm="batch", activation="GLU"),
    _conv("ConvNormActivation1d", (2, 4, 8), scale_factor=-2, norm="batch", norm_first=True),
    _conv("ConvTransposeNormActivation", (2, 4, 5, 3), norm="batch"),
    _conv("ConvTransposeNormActivation", (2, 4, 5, 3), kernel_size=4, stride=2),
    _conv("ConvTransposeNormActivation", (2, 4, 5, 3), stride=2, output_padding=1, groups=2),
    _conv("ConvTransposeNormActivation", (2, 4, 5, 3), stride=3, dilation=2, padding=0),
    _conv("ConvTransposeNormActivation1d", (2, 4, 5), kernel_size=4, stride=2, groups=4),
    _pair(
        "residual", lambda lib, **rngs: lib.ResidualBlock(4, 3, norm="batch", **rngs), 2, 4, 6, 5
    ),
    _pair(
        "residual change",
        lambda lib, **rngs: lib.ResidualBlock(
            in_channels=4,
            out_channels=6,
            conv_cfg=ConvConfig("SiGLU", 3, 2, 1),
            **rngs,
        ),
        *(2, 4, 6, 5),
    ),
    _pair("tokens", lambda lib, **rngs: lib.TransformerLayer(5, 3, _TOKENS, **rngs), 2, 7, 5),
    _pair("tokens same", lambda lib, **rngs: lib.TransformerLayer(8, 0, _TOKENS, **rngs), 2, 7, 8),
    _pair("positions", lambda lib, **rngs: lib.PositionalEncoding(7, max_len=9, **rngs), 2, 6, 7),
    _pair("patches", lambda lib, **rngs: lib.PatchEmbed(5, 3, (2, 9, 6), **rngs), 2, 2, 9, 6),
    _pair(
        "spatial softmax",
        lambda lib, **rngs: lib.SpatialSoftmax(SpatialSoftmaxConfig(0.7)),
        *(2, 3, 5, 4),
    ),
    _pair(
        "spatial argmax",
        lambda lib, **rngs: lib.SpatialSoftmax(SpatialSoftmaxConfig(is_straight_through=True)),
        *(2, 3, 5, 4),
    ),
]
