"""U-Nets, hypernetworks and contrastive losses of the cross-framework suite."""

from __future__ import annotations

from typing import Any

from ml_networks.config import (
    AttentionConfig,
    ContrastiveLearningConfig,
    ConvConfig,
    ConvNetConfig,
    LinearConfig,
    MLPConfig,
    TransformerConfig,
    UNetConfig,
)
from tests.jax.modules import Pair, normal

_CONV = ConvConfig("SiLU", 3, 1, 1, norm="group", norm_cfg={"num_groups": 2})
_BATCH = ConvConfig("SiLU", 3, 1, 1, norm="batch")
_MLP = MLPConfig(6, 1, "Identity", LinearConfig("SiLU", "layer"))
_GATED = MLPConfig(5, 1, "SiGLU", LinearConfig("Tanh"))


def _modes(cfg: ConvConfig) -> tuple[bool, ...]:
    return (True, False) if cfg.norm == "batch" else (True,)


def _unet(name: str, shape: tuple[int, ...], conv: ConvConfig = _CONV, **fields: Any) -> Pair:
    cfg = UNetConfig(**{"channels": (4, 6), "conv_cfg": conv, **fields})
    cls = "ConditionalUnet1d" if len(shape) == 2 else "ConditionalUnet2d"

    def build(library: Any, **rngs: Any) -> Any:
        return getattr(library, cls)(3, shape, cfg, **rngs)

    inputs = (normal(2, *shape), normal(2, 3, seed=1))
    return Pair(f"{cls} {name}", build, inputs, modes=_modes(conv))


def _block(cls: str, shape: tuple[int, ...], out: int, *rest: Any, **conv: Any) -> Pair:
    cfg = ConvConfig(**{"activation": "SiLU", "kernel_size": 3, "stride": 1, "padding": 1, **conv})

    def build(library: Any, **rngs: Any) -> Any:
        return getattr(library.unet, cls)(shape[1], out, 3, cfg, *rest, **rngs)

    inputs = (normal(*shape), normal(shape[0], 3, seed=1))
    return Pair(f"{cls} {conv}", build, inputs, modes=_modes(cfg))


def _resample(cls: str, shape: tuple[int, ...], use_shuffle: bool) -> Pair:
    def build(library: Any, **rngs: Any) -> Any:
        return getattr(library.unet, cls)(shape[1], use_shuffle, **rngs)

    return Pair(f"{cls} {use_shuffle}", build, (normal(*shape),), modes=(True,))


def _flat(made: dict[str, Any]) -> Any:
    """The arrays a hypernetwork makes, which both frameworks can sum, in one."""
    rows = [value.reshape(value.shape[0], -1) for value in made.values()]
    kind = type(rows[0])
    if kind.__module__.partition(".")[0] == "torch":
        import torch

        return torch.cat(rows, 1)
    import jax.numpy as jnp

    return jnp.concatenate(rows, 1)


def _shapes(name: str, *rest: Any) -> Pair:
    shapes = {"weight": (3, 2), "bias": (3,), "kernel": (2, 1, 3)}

    def build(library: Any, **rngs: Any) -> Any:
        return library.HyperNet(4, shapes, *rest, **rngs)

    return Pair(f"HyperNet {name}", build, (normal(5, 4),), lambda net, x: _flat(net(x)), (True,))


_TARGETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (lambda lib, **rngs: lib.MLPLayer(5, 3, _MLP, **rngs), (5,)),
    "decoder": (
        lambda lib, **rngs: lib.Decoder(
            3,
            (2, 6, 4),
            ConvNetConfig(
                (4, 4),
                (ConvConfig("ReLU", 4, 2, 1, groups=2), _CONV),
                attention=AttentionConfig(2, 1),
                init_channel=4,
            ),
            LinearConfig("Tanh", "layer"),
            **rngs,
        ),
        (3,),
    ),
    "tokens": (
        lambda lib, **rngs: lib.TransformerLayer(
            5, 3, TransformerConfig(8, 2, 12, 1, dropout=0.0), **rngs
        ),
        (4, 5),
    ),
}


def _target(name: str, mlp_cfg: MLPConfig | None = None, input_mode: str | None = None) -> Pair:
    make, shape = _TARGETS[name]

    def build(library: Any, **rngs: Any) -> Any:
        return library.HyperNet(
            target_net=make(library, **rngs),
            input_dim=4,
            mlp_cfg=mlp_cfg,
            input_mode=input_mode,
            **rngs,
        )

    inputs = (normal(3, *shape), normal(3, 4, seed=1))
    return Pair(f"HyperNet {name} {input_mode}", build, inputs, modes=(True,))


def _contrast(
    method: str, shape: tuple[int, ...], dims: tuple[int, int] = (4, 3), **keywords: Any
) -> Pair:
    cfg = ContrastiveLearningConfig(
        5,
        MLPConfig(6, 1, "Tanh", LinearConfig("SiLU", "layer")),
        cross_entropy_like=keywords.pop("cross_entropy_like", False),
    )

    def build(library: Any, **rngs: Any) -> Any:
        return library.ContrastiveLearningLoss(*dims, cfg, **rngs)

    def call(loss: Any, *views: Any) -> Any:
        losses = getattr(loss, method)(*views, **keywords)
        return losses["sigmoid" if method == "calc_sigmoid" else "nce"]

    views = (normal(*shape, dims[0]), normal(*shape, dims[1], seed=1))
    return Pair(f"{method} {shape} {dims} {keywords}", build, views, call, (True,))


PAIRS = [
    _unet("attention", (2, 8), has_attn=True, nhead=2, use_shuffle=True),
    _unet("batch", (2, 8, 4), _BATCH, cond_pred_scale=True),
    _unet("hypernet", (2, 5), channels=(4,), use_hypernet=True),
    _unet(
        "hypernet attention",
        (3, 4, 2),
        _BATCH,
        channels=(4,),
        has_attn=True,
        nhead=2,
        use_hypernet=True,
        hyper_mlp_cfg=_MLP,
    ),
    _block("ConditionalResidualBlock1d", (2, 4, 7), 4, activation="GLU"),
    _block("ConditionalResidualBlock2d", (2, 4, 5, 3), 6, True),
    _block("HyperConditionalResidualBlock1d", (2, 4, 5), 4, None, padding_mode="circular"),
    _block("HyperConditionalResidualBlock1d", (2, 4, 5), 6, _MLP, bias=False, activation="GLU"),
    _block(
        "HyperConditionalResidualBlock2d",
        (2, 4, 4, 6),
        6,
        _MLP,
        groups=2,
        dilation=2,
        padding=2,
        norm="batch",
        norm_first=True,
    ),
    _resample("Downsample1d", (2, 4, 7), False),
    _resample("Downsample1d", (2, 4, 6), True),
    _resample("Downsample2d", (2, 4, 7, 4), False),
    _resample("Downsample2d", (2, 4, 6, 2), True),
    _resample("Upsample1d", (2, 4, 5), False),
    _resample("Upsample1d", (2, 4, 5), True),
    _resample("Upsample2d", (2, 4, 5, 3), False),
    _resample("Upsample2d", (2, 4, 5, 3), True),
    Pair("HorizonShuffle", lambda lib, **_: lib.HorizonShuffle(3), (normal(2, 6, 5),)),
    Pair("HorizonUnShuffle", lambda lib, **_: lib.HorizonUnShuffle(3), (normal(2, 2, 6),)),
    _shapes("linear"),
    _shapes("mlp", _MLP, "cos|sin"),
    _target("mlp", _MLP, "z|1-z"),
    _target("decoder", _GATED, "cos|sin"),
    _target("tokens"),
    _contrast("calc_nce", (6,), (4, 4)),
    _contrast("calc_nce", (2, 3), cross_entropy_like=True),
    _contrast("calc_sigmoid", (2, 3), temperature=0.7, bias=-0.4),
    _contrast("calc_timeseries_nce", (2, 6)),
    _contrast("calc_timeseries_nce", (2, 6), positive_range_self=2, positive_range_tgt=1),
    _contrast("calc_timeseries_nce", (2, 2, 4), (3, 3), positive_range_tgt=9),
]
