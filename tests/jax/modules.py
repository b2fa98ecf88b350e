"""Every module in both frameworks: what the cross-framework suite walks.

A file ``cases_*.py`` beside this one adds its own to ``PAIRS``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Pair:
    """One module, built by the same call in either framework.

    ``build(library, **rngs)`` gets ``ml_networks.torch`` and no keyword, or ``ml_networks.jax``
    and ``rngs=``. ``inputs`` are float32 arrays; ``call`` turns module and inputs into one array
    (the module's own call by default). ``modes`` are those to compare, training or not; one is
    enough for what holds neither batch norm nor dropout.
    """

    name: str
    build: Callable[..., Any]
    inputs: tuple[np.ndarray, ...]
    call: Callable[..., Any] = field(default=lambda module, *inputs: module(*inputs))
    modes: tuple[bool, ...] = (True, False)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers in float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pairs() -> list[Pair]:
    """The pairs of every ``cases_*.py``."""
    folder = Path(__file__).parent
    names = sorted(m.name for m in pkgutil.iter_modules([str(folder)]))
    found = [n for n in names if n.startswith("cases_")]
    modules = [importlib.import_module(f"{__package__}.{name}") for name in found]
    return [pair for module in modules for pair in module.PAIRS]
