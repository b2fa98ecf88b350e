"""Base classes: freezing of parameters, and ``BaseModule`` on Lightning's ``LightningModule``.

``BaseModule`` is made when it is first asked for, since Lightning takes seconds to import; the
library's own modules derive from :class:`Module`, which needs torch alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

__all__ = ["BaseModule", "Module"]


class Module(nn.Module):
    """An ``nn.Module`` whose parameters can be frozen by kind."""

    @property
    def device(self) -> torch.device:
        """Device of the first parameter or buffer; the CPU if there is none."""
        first = next(chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    def freeze(self) -> None:
        """Stop the gradients of all parameters and switch to evaluation mode."""
        self.requires_grad_(False)
        self.eval()

    def unfreeze(self) -> None:
        """Let all parameters have gradients and switch to training mode."""
        self.requires_grad_(True)
        self.train()

    def freeze_weights(self) -> None:
        """Stop the gradients of every parameter with ``weight`` in its own name."""
        self._set_requires_grad("weight", False)

    def unfreeze_weights(self) -> None:
        """Let every parameter with ``weight`` in its own name have gradients."""
        self._set_requires_grad("weight", True)

    def freeze_biases(self) -> None:
        """Stop the gradients of every parameter with ``bias`` in its own name."""
        self._set_requires_grad("bias", False)

    def unfreeze_biases(self) -> None:
        """Let every parameter with ``bias`` in its own name have gradients."""
        self._set_requires_grad("bias", True)

    def _set_requires_grad(self, kind: str, requires_grad: bool) -> None:
        for name, parameter in self.named_parameters():
            if kind in name.rpartition(".")[2]:
                parameter.requires_grad_(requires_grad)


if TYPE_CHECKING:

    class BaseModule(Module):
        """Base class of models: Lightning's ``LightningModule`` and :class:`Module`."""


def _lightning_module() -> type[nn.Module]:
    """Return the LightningModule class of the Lightning package in use, or ``nn.Module``."""
    # Lightning is published under two names, and a Trainer of one refuses modules of the other:
    # the one the program has imported already is the one it trains with.
    packages = ("lightning.pytorch", "pytorch_lightning")
    for package in sorted(packages, key=lambda package: package not in sys.modules):
        if importlib.util.find_spec(package.partition(".")[0]) is not None:
            lightning: type[nn.Module] = importlib.import_module(package).LightningModule
            return lightning
    return nn.Module


def __getattr__(name: str) -> Any:
    if name != "BaseModule":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    lightning = _lightning_module()
    bases = (Module,) if lightning is nn.Module else (lightning, Module)
    base_module = type(
        "BaseModule",
        bases,
        {
            "__doc__": "Base class of models: Lightning's ``LightningModule`` (``nn.Module`` "
            "where Lightning is not installed) with the freezing methods of :class:`Module`.",
            "__module__": __name__,
        },
    )
    globals()[name] = base_module
    return base_module
