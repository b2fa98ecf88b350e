"""Contrastive losses.

Left out, because 0.2.6 gives NaN: time series with a range above 0. Embeddings of inputs with
several batch dimensions, and its cross-entropy-like loss of them, come flattened from 0.2.6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Case = Callable[[Any], tuple[Any, ...]]


def _loss(
    method: str, batch: tuple[int, ...], dims: tuple[int, int] = (4, 4), **keywords: Any
) -> Case:
    cross_entropy_like = keywords.pop("cross_entropy_like", False)

    def build(ml: Any) -> tuple[Any, ...]:
        network = ml.MLPConfig(6, 1, "Tanh", ml.LinearConfig("SiLU", "layer"))
        cfg = ml.ContrastiveLearningConfig(5, network, cross_entropy_like=cross_entropy_like)
        inputs = tuple(torch.randn(*batch, dim) for dim in dims)
        module = ml.ContrastiveLearningLoss(*dims, cfg)
        return module, inputs, keywords, lambda loss, *x, **kw: getattr(loss, method)(*x, **kw)

    return build


CASES: dict[str, Case] = {
    "nce": _loss("calc_nce", (6,), return_emb=True),
    "nce-dims": _loss("calc_nce", (2, 3), (4, 3)),
    "nce-cross-entropy": _loss("calc_nce", (6,), (4, 3), cross_entropy_like=True),
    "sigmoid": _loss("calc_sigmoid", (2, 3), (4, 3)),
    "sigmoid-options": _loss("calc_sigmoid", (5,), temperature=0.7, bias=-0.4, return_emb=True),
    "timeseries": _loss("calc_timeseries_nce", (2, 4), (4, 3)),
}
