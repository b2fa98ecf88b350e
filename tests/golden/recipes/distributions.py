"""Distributions, their states and binary codes.

Left out, because 0.2.6 computes something else than it says: Bernoulli and spherical categorical
distributions with ``deterministic=True``, which sample or are not spherical. Where 0.2.6 samples,
logits of +-40 leave one possible sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _distribution(
    dist: str, *shape: int, spherical: bool = False, certain: bool = False, **keywords: Any
) -> Any:
    def build(ml: Any) -> tuple[Any, ...]:
        in_dim = shape[-1] // (2 if dist == "normal" else 1)
        groups = 1 if dist == "normal" else 2
        module = ml.Distribution(in_dim, dist, groups, spherical)
        x = torch.randn(shape)
        if certain and dist == "categorical":
            x = (
                80
                * torch.nn.functional.one_hot(
                    torch.randint(0, in_dim // groups, (*shape[:-1], groups)), in_dim // groups
                )
                .flatten(-2)
                .float()
            )
        elif certain:
            x = 40 * x.sign()
        return module, (x,), keywords

    return build


def _torch_distribution(name: str) -> Any:
    """A state's torch distribution: entropy, and log-probability of another sample."""

    def build(ml: Any) -> tuple[Any, ...]:
        def normal(mean: Tensor, raw_std: Tensor, value: Tensor) -> Tensor:
            state = ml.NormalStoch(mean, raw_std.exp(), mean)
            return ml.get_dist(state).log_prob(value)

        def categorical(logits: Tensor) -> tuple[Tensor, Tensor]:
            probs = logits.softmax(-1)
            state = ml.CategoricalStoch(logits, probs, probs.flatten(-2))
            dist = ml.get_dist(state)
            return dist.entropy(), dist.log_prob(torch.eye(4).to(logits).expand(3, 4, 4))

        def bernoulli(logits: Tensor) -> tuple[Tensor, Tensor]:
            probs = logits.sigmoid()
            state = ml.BernoulliStoch(logits, probs, probs.flatten(-2))
            dist = ml.get_dist(state)
            return dist.entropy(), dist.log_prob(torch.eye(4).to(logits).expand(3, 4, 4))

        if name == "normal":
            return normal, (torch.randn(3, 5), 0.3 * torch.randn(3, 5), torch.randn(3, 5)), {}
        return (
            {"categorical": categorical, "bernoulli": bernoulli}[name],
            (torch.randn(3, 4, 4),),
            {},
        )

    return build


def _joined(function: str, dim: int) -> Any:
    def build(ml: Any) -> tuple[Any, ...]:
        def join(a: Tensor, b: Tensor) -> Any:
            states = [
                ml.CategoricalStoch(x, x.softmax(-1), x.softmax(-1).flatten(-2)) for x in (a, b)
            ]
            return getattr(ml, function)(states, dim=dim)

        return join, (torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)), {}

    return build


def _bits_to_codes(ml: Any) -> tuple[Any, ...]:
    return ml.BSQCodebook(5).bits_to_codes, (torch.randn(3, 5).sigmoid(),), {}


def _indices_to_codes(ml: Any) -> tuple[Any, ...]:
    codebook = ml.BSQCodebook(5)
    call = lambda module, indices: module.indices_to_codes(indices)  # noqa: E731
    return codebook, (torch.arange(32).reshape(4, 8, 1),), {}, call


CASES = {
    "normal": _distribution("normal", 4, 3, 10, deterministic=True),
    "normal-spherical": _distribution("normal", 4, 10, spherical=True, deterministic=True),
    "categorical": _distribution("categorical", 4, 3, 8, deterministic=True),
    "categorical-temperature": _distribution("categorical", 4, 8, deterministic=True, inv_tmp=2.5),
    "categorical-sampled": _distribution("categorical", 4, 8, certain=True),
    "categorical-spherical": _distribution("categorical", 4, 8, spherical=True, certain=True),
    "bernoulli": _distribution("bernoulli", 4, 3, 8, certain=True),
    "bernoulli-temperature": _distribution("bernoulli", 4, 8, certain=True, inv_tmp=0.75),
    "bernoulli-spherical": _distribution("bernoulli", 4, 10, spherical=True, certain=True),
    "get-dist-normal": _torch_distribution("normal"),
    "get-dist-categorical": _torch_distribution("categorical"),
    "get-dist-bernoulli": _torch_distribution("bernoulli"),
    "stack": _joined("stack_dist", 1),
    "cat": _joined("cat_dist", 0),
    "bits-to-codes": _bits_to_codes,
    "indices-to-codes": _indices_to_codes,
}
