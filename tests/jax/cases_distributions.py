"""Distributions and codes of the cross-framework suite, where nothing is drawn."""

from __future__ import annotations

from typing import Any

from tests.jax.modules import Pair, normal

FEATURES = 12


def _distribution(dist: str, field: str, *arguments: Any) -> Pair:
    def build(library: Any, **rngs: Any) -> Any:
        return library.Distribution(FEATURES, dist, *arguments, **rngs)

    def call(module: Any, x: Any) -> Any:
        return getattr(module(x, deterministic=True, inv_tmp=1.7), field)

    width = (2 if dist == "normal" else 1) * FEATURES
    name = f"distribution {dist} {field} {' '.join(map(str, arguments))}"
    return Pair(name, build, (normal(2, 3, width),), call)


def _codebook(name: str, call: Any, *arguments: int) -> Pair:
    def build(library: Any, **rngs: Any) -> Any:
        return library.BSQCodebook(*arguments, temperature=3.0, **rngs)

    return Pair(f"bsq {name}", build, (normal(4, 5, arguments[0]),), call)


def _entropies(module: Any, x: Any) -> Any:
    codes = module.quantize(x, entropy_bits=2)
    return codes.sample_entropy - codes.codebook_entropy


PAIRS = [
    _distribution("normal", "std"),
    _distribution("normal", "stoch", 1, True),
    _distribution("categorical", "probs", 3),
    _distribution("categorical", "stoch", 3, True),
    _distribution("bernoulli", "logits", 3),
    _distribution("bernoulli", "stoch", 3),
    _distribution("bernoulli", "stoch", 3, True),
    _codebook("code", lambda module, x: module(x), 6),
    _codebook("projected", lambda module, x: module(x), 6, 4),
    _codebook("entropies", _entropies, 6, 4),
]
