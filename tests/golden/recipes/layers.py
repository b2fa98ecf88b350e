"""Layers and activations.

Left out, because 0.2.6 computes them wrongly or not at all: norm_first or shuffles with norms of
the wrong width, GLU activations in residual blocks, TransformerLayer's default output
activation, the gradient of a straight-through SpatialSoftmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Case = Callable[[Any], tuple[Any, ...]]


def _activation(name: str, **keywords: Any) -> Case:
    return lambda ml: (ml.Activation(name, **keywords), (3 * torch.randn(3, 6),), {})


def _linear(activation: str, **keywords: Any) -> Case:
    def build(ml: Any) -> tuple[Any, ...]:
        cfg = ml.LinearConfig(activation, **keywords)
        return ml.LinearNormActivation(5, 6, cfg), (torch.randn(2, 3, 5),), {}

    return build


def _mlp(n_layers: int, output_activation: str, **keywords: Any) -> Case:
    def build(ml: Any) -> tuple[Any, ...]:
        cfg = ml.MLPConfig(7, n_layers, output_activation, ml.LinearConfig(**keywords))
        return ml.MLPLayer(5, 3, cfg), (torch.randn(2, 4, 5),), {}

    return build


def _conv(cls: str, shape: tuple[int, ...], out_channels: int, **keywords: Any) -> Case:
    def build(ml: Any) -> tuple[Any, ...]:
        fields = {"activation": "ELU", "kernel_size": 3, "stride": 1, "padding": 1} | keywords
        module = getattr(ml, cls)(shape[1], out_channels, ml.ConvConfig(**fields))
        return module, (torch.randn(shape),), {}

    return build


def _transformer(input_dim: int, output_dim: int, hidden: str) -> Case:
    def build(ml: Any) -> tuple[Any, ...]:
        cfg = ml.TransformerConfig(8, 2, 12, 2, 0.0, hidden, "Tanh")
        return ml.TransformerLayer(input_dim, output_dim, cfg), (torch.randn(2, 5, input_dim),), {}

    return build


def _spatial_softmax(**keywords: Any) -> Case:
    def build(ml: Any) -> tuple[Any, ...]:
        cfg = ml.SpatialSoftmaxConfig(**keywords)
        return ml.SpatialSoftmax(cfg), (torch.randn(2, 3, 4, 5),), {}

    return build


CASES: dict[str, Case] = {
    "crrelu": _activation("CRReLU"),
    "gelu": _activation("GELU"),
    "glu": _activation("GLU", dim=1),
    "l2norm": _activation("L2Norm"),
    "prelu": _activation("PReLU"),
    "rerelu": _activation("REReLU"),
    "rerelu-silu": _activation("REReLU", reparametarize_fn="silu"),
    "siglu": _activation("SiGLU", dim=-1),
    "tanhexp": _activation("TanhExp"),
    "linear": _linear("ReLU"),
    "linear-layer": _linear("SiLU", norm="layer", norm_cfg={"eps": 1e-3}),
    "linear-rms-first": _linear("Tanh", norm="rms", norm_first=True, bias=False),
    "linear-glu-layer": _linear("GLU", norm="layer"),
    "mlp": _mlp(2, "Identity", activation="GELU", norm="layer"),
    "mlp-no-hidden": _mlp(0, "Tanh", activation="Mish"),
    "mlp-swiglu": _mlp(1, "SwiGLU", activation="SwiGLU", norm="rms", bias=False),
    "conv": _conv("ConvNormActivation", (2, 3, 7, 6), 4, stride=2),
    "conv-batch": _conv("ConvNormActivation", (2, 3, 6, 5), 4, norm="batch"),
    "conv-batch-first": _conv(
        "ConvNormActivation", (2, 4, 6, 5), 4, norm="batch", norm_first=True
    ),
    "conv-group-up": _conv(
        "ConvNormActivation",
        (2, 3, 4, 4),
        2,
        norm="group",
        norm_cfg={"num_groups": 2},
        scale_factor=2,
    ),
    "conv-glu-down": _conv(
        "ConvNormActivation", (2, 3, 4, 6), 8, activation="GLU", scale_factor=-2, norm="batch"
    ),
    "conv-dilated-groups": _conv(
        "ConvNormActivation",
        (2, 4, 8, 8),
        6,
        dilation=2,
        padding=2,
        groups=2,
        padding_mode="reflect",
        bias=False,
    ),
    "conv-unbatched-siglu": lambda ml: (
        ml.ConvNormActivation(3, 4, ml.ConvConfig("SiGLU", 3, 1, 1)),
        (torch.randn(3, 5, 5),),
        {},
    ),
    "conv1d": _conv("ConvNormActivation1d", (2, 3, 7), 4, stride=2, padding_mode="circular"),
    "conv1d-group": _conv(
        "ConvNormActivation1d", (2, 3, 7), 4, norm="group", norm_cfg={"num_groups": 4}
    ),
    "conv1d-glu-up": _conv("ConvNormActivation1d", (2, 3, 6), 4, activation="GLU", scale_factor=3),
    "conv1d-down": _conv("ConvNormActivation1d", (2, 3, 6), 4, scale_factor=-2),
    "conv-transpose": _conv(
        "ConvTransposeNormActivation", (2, 3, 4, 5), 4, kernel_size=4, stride=2
    ),
    "conv-transpose-glu-batch": _conv(
        "ConvTransposeNormActivation",
        (2, 4, 4, 5),
        4,
        activation="GLU",
        norm="batch",
        stride=2,
        output_padding=1,
        groups=2,
    ),
    "conv-transpose1d": _conv(
        "ConvTransposeNormActivation1d",
        (2, 3, 5),
        4,
        norm="group",
        norm_cfg={"num_groups": 1},
        dilation=2,
        stride=3,
    ),
    "horizon-shuffle": lambda ml: (ml.HorizonShuffle(3), (torch.randn(2, 6, 4),), {}),
    "horizon-unshuffle": lambda ml: (ml.HorizonUnShuffle(2), (torch.randn(2, 3, 6),), {}),
    "residual": lambda ml: (ml.ResidualBlock(4, 3, "GELU"), (torch.randn(2, 4, 5, 6),), {}),
    "residual-batch": lambda ml: (
        ml.ResidualBlock(4, 5, "ReLU", "batch", {"momentum": 0.2}, 0.0, "replicate"),
        (torch.randn(2, 4, 5, 6),),
        {},
    ),
    "transformer": _transformer(5, 6, "GELU"),
    "transformer-same": _transformer(8, 8, "ReLU"),
    "transformer-no-output": _transformer(8, 0, "GELU"),
    "positional": lambda ml: (
        ml.PositionalEncoding(6, 0.0, 9),
        (torch.randn(2, 7, 6),),
        {},
    ),
    "patch": lambda ml: (ml.PatchEmbed(6, 4, (3, 8, 12)), (torch.randn(2, 3, 8, 12),), {}),
    "spatial-softmax": _spatial_softmax(temperature=0.5),
    "spatial-argmax": _spatial_softmax(is_argmax=True),
    "norm-batch1d": lambda ml: (ml.get_norm("batch1d", num_features=3), (torch.randn(4, 3),), {}),
}
