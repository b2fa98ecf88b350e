"""Losses, the functions beside them, and the two transforms.

Left out: the focal loss of pixels, whose backward pass 0.2.6 cannot run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _two_images(name: str, **keywords: Any) -> Any:
    def build(ml: Any) -> tuple[Any, ...]:
        return getattr(ml, name), (torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 5)), keywords

    return build


def _classification(name: str, **keywords: Any) -> Any:
    def build(ml: Any) -> tuple[Any, ...]:
        return getattr(ml, name), (torch.randn(6, 7), torch.randint(0, 7, (6,))), keywords

    return build


def _binary(dtype: torch.dtype, **keywords: Any) -> Any:
    def build(ml: Any) -> tuple[Any, ...]:
        def call(function: Any, prediction: Tensor, labels: Tensor) -> Any:
            return function(prediction, labels.to(dtype), **keywords)

        return ml.binary_focal_loss, (torch.randn(4, 6), torch.randint(0, 2, (4, 6))), {}, call

    return build


def _focal_frequency(**options: Any) -> Any:
    def build(ml: Any) -> tuple[Any, ...]:
        loss = ml.FocalFrequencyLoss(**options)
        return loss, (torch.randn(3, 2, 8, 6), torch.randn(3, 2, 8, 6)), {}

    return build


def _divergence(kind: str, name: str, **keywords: Any) -> Any:
    def build(ml: Any) -> tuple[Any, ...]:
        def state(a: Tensor, b: Tensor) -> Any:
            if kind == "normal":
                return ml.NormalStoch(a, b.exp(), a)
            probs = a.softmax(-1) if kind == "categorical" else a.sigmoid()
            cls = ml.CategoricalStoch if kind == "categorical" else ml.BernoulliStoch
            return cls(a, probs, probs.flatten(-2))

        def divergence(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
            return getattr(ml, name)(state(a, b), state(c, d), **keywords)

        shape = (3, 5) if kind == "normal" else (3, 2, 4)
        return divergence, tuple(0.5 * torch.randn(shape) for _ in range(4)), {}

    return build


def _logits(name: str, n_inputs: int = 1, **keywords: Any) -> Any:
    def build(ml: Any) -> tuple[Any, ...]:
        return getattr(ml, name), tuple(torch.randn(3, 5, 4) for _ in range(n_inputs)), keywords

    return build


def _min_max(ml: Any) -> tuple[Any, ...]:
    return ml.MinMaxNormalize(-1.0, 1.0, 0.0, 255.0), (255 * torch.rand(2, 3, 4, 4),), {}


def _softmax_transformation(method: str, features: int) -> Any:
    def build(ml: Any) -> tuple[Any, ...]:
        cfg = ml.SoftmaxTransConfig(vector=5, sigma=0.5, n_ignore=1, max=1.0, min=-1.0)
        transformation = ml.SoftmaxTransformation(cfg)

        def transform(x: Tensor) -> Tensor:
            transformation.k = transformation.k.to(x.dtype)
            return getattr(transformation, method)(x)

        return transform, (torch.rand(4, features),), {}

    return build


CASES = {
    "focal": _classification("focal_loss"),
    "focal-gamma": _classification("focal_loss", gamma=0.5),
    "focal-gamma0": _classification("focal_loss", gamma=0.0),
    "binary-focal": _binary(torch.int64),
    "binary-focal-all": _binary(torch.float32, gamma=1.5, sum_dim=[-1, -2]),
    "charbonnier": _two_images("charbonnier"),
    "charbonnier-alpha": _two_images("charbonnier", epsilon=1e-2, alpha=0.9, sum_dim=-1),
    "focal-frequency": _focal_frequency(),
    "focal-frequency-options": _focal_frequency(
        loss_weight=2.0, alpha=0.5, patch_factor=2, log_matrix=True, batch_matrix=True
    ),
    "focal-frequency-average": _focal_frequency(ave_spectrum=True),
    "kl-normal": _divergence("normal", "kl_divergence"),
    "kl-categorical": _divergence("categorical", "kl_divergence"),
    "kl-bernoulli": _divergence("bernoulli", "kl_divergence"),
    "kl-balancing": _divergence("normal", "kl_balancing"),
    "kl-balancing-weight": _divergence("categorical", "kl_balancing", weight=0.3),
    "cross-entropy": _classification("cross_entropy"),
    "soft-target": _logits("soft_target_cross_entropy", 2),
    "soft-target-dim": _logits("soft_target_cross_entropy", 2, dim=1),
    "log-softmax": _logits("log_softmax", dim=1, temperature=2.0),
    "softmax": _logits("softmax", dim=-1, temperature=0.5),
    "min-max": _min_max,
    "softmax-transformation": _softmax_transformation("transform", 3),
    "softmax-transformation-inverse": _softmax_transformation("inverse", 11),
}
