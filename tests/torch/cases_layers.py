from __future__ import annotations

from typing import Any

from torch import nn

from ml_networks.config import (
    ConvConfig,
    LinearConfig,
    MLPConfig,
    SpatialSoftmaxConfig,
    TransformerConfig,
)
from ml_networks.torch import activations, layers
from tests.torch.modules import ModuleCase, normal

_TRANSFORMER = TransformerConfig(8, 2, 12, 2, hidden_activation="SiLU", output_activation="Tanh")


def _conv(**keywords: Any) -> ConvConfig:
    return ConvConfig(**{"kernel_size": 3, "stride": 1, "padding": 1} | keywords)


def _activation(name: str) -> ModuleCase:
    # A linear layer before it gives every case parameters.
    return ModuleCase(
        f"Activation-{name}",
        lambda: nn.Sequential(nn.Linear(4, 6), activations.Activation(name)),
        normal(4),
    )


MODULES = [
    *(
        _activation(name)
        for name in ("ReLU", "GELU", "CRReLU", "L2Norm", "REReLU", "SwiGLU", "TanhExp", "Softmax")
    ),
    ModuleCase(
        "LinearNormActivation",
        lambda: layers.LinearNormActivation(4, 5, LinearConfig("GLU", "rms", norm_first=True)),
        normal(3, 4),
    ),
    ModuleCase(
        "MLPLayer",
        lambda: layers.MLPLayer(
            4, 5, MLPConfig(6, 2, "Tanh", LinearConfig("SiLU", "layer", dropout=0.1))
        ),
        normal(4),
    ),
    ModuleCase(
        "ConvNormActivation",
        lambda: layers.ConvNormActivation(3, 4, _conv(norm="batch", scale_factor=2, dropout=0.1)),
        normal(3, 4, 6),
    ),
    ModuleCase(
        "ConvNormActivation1d",
        lambda: layers.ConvNormActivation1d(
            3,
            4,
            _conv(activation="GLU", norm="group", norm_cfg={"num_groups": 2}, scale_factor=-2),
        ),
        normal(3, 6),
    ),
    ModuleCase(
        "ConvTransposeNormActivation",
        lambda: layers.ConvTransposeNormActivation(
            3, 4, _conv(stride=2, norm="batch", output_padding=1)
        ),
        normal(3, 4, 4),
    ),
    ModuleCase(
        "ConvTransposeNormActivation1d",
        lambda: layers.ConvTransposeNormActivation1d(3, 4, _conv(stride=2)),
        normal(3, 4),
    ),
    ModuleCase(
        "ResidualBlock",
        lambda: layers.ResidualBlock(4, 3, "ReLU", "batch", dropout=0.1),
        normal(4, 5, 6),
    ),
    ModuleCase(
        "ResidualBlock-strided-GLU",
        lambda: layers.ResidualBlock(
            in_channels=4, out_channels=6, conv_cfg=_conv(stride=2, activation="GLU")
        ),
        normal(4, 5, 6),
    ),
    ModuleCase(
        "TransformerLayer", lambda: layers.TransformerLayer(5, 6, _TRANSFORMER), normal(4, 5)
    ),
    ModuleCase("PatchEmbed", lambda: layers.PatchEmbed(6, 4, (3, 8, 12)), normal(3, 8, 12)),
    ModuleCase(
        "PositionalEncoding",
        lambda: nn.Sequential(nn.Linear(4, 5), layers.PositionalEncoding(5, 0.1, 9)),
        normal(7, 4),
    ),
    ModuleCase(
        "SpatialSoftmax",
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1), layers.SpatialSoftmax(SpatialSoftmaxConfig(is_argmax=True))
        ),
        normal(3, 4, 5),
    ),
    ModuleCase(
        "HorizonShuffle",
        lambda: nn.Sequential(
            nn.Conv1d(4, 4, 1), layers.HorizonShuffle(2), layers.HorizonUnShuffle(3)
        ),
        normal(4, 6),
    ),
]
