"""Small instances of the library's modules, for the tests that run on every module.

A file ``tests/torch/cases_<part>.py`` adds cases by a list ``MODULES`` of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ModuleCase:
    """One module and its inputs.

    Attributes
    ----------
    name
        The test's id.
    build
        Makes the module. Its initial values may be random.
    inputs
        Makes the arguments of ``forward`` for a batch size. A leading dimension of each floating
        tensor is the batch.
    random
        Whether the output in evaluation mode is random.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    random: bool = False


def normal(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Return an ``inputs`` of one standard normal tensor, (batch, *shape)."""
    return lambda batch: (torch.randn(batch, *shape),)


def _all() -> list[ModuleCase]:
    parts = sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py"))
    return [
        case for part in parts for case in importlib.import_module(f"tests.torch.{part}").MODULES
    ]


def all_modules() -> dict[str, ModuleCase]:
    """Return every case by its name."""
    cases = _all()
    by_name = {case.name: case for case in cases}
    assert len(by_name) == len(cases), "two module cases have one name"
    return by_name
