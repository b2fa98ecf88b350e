"""The base class: an ``nnx.Module`` whose parameters can be frozen by kind."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx

__all__ = ["BaseModule", "FrozenParam"]

_WEIGHTS = ("kernel", "scale", "weight")
_BIASES = ("bias",)


class FrozenParam(nnx.Variable):
    """A parameter that is not trained: ``nnx.grad`` and ``nnx.Optimizer(wrt=nnx.Param)`` leave it
    alone."""


class BaseModule(nnx.Module):
    """Base class of models: an ``nnx.Module`` with parameters that can be frozen by kind.

    A frozen parameter changes its variable type from ``nnx.Param`` to :class:`FrozenParam`, so
    freeze before making an optimizer.
    """

    def freeze(self) -> None:
        """Freeze all parameters and switch to evaluation mode."""
        _retype(self, nnx.Param, FrozenParam, lambda _: True)
        self.eval()

    def unfreeze(self) -> None:
        """Let all parameters train and switch to training mode."""
        _retype(self, FrozenParam, nnx.Param, lambda _: True)
        self.train()

    def freeze_weights(self) -> None:
        """Freeze every kernel, scale and weight."""
        _retype(self, nnx.Param, FrozenParam, _WEIGHTS.__contains__)

    def unfreeze_weights(self) -> None:
        """Let every kernel, scale and weight train."""
        _retype(self, FrozenParam, nnx.Param, _WEIGHTS.__contains__)

    def freeze_biases(self) -> None:
        """Freeze every bias."""
        _retype(self, nnx.Param, FrozenParam, _BIASES.__contains__)

    def unfreeze_biases(self) -> None:
        """Let every bias train."""
        _retype(self, FrozenParam, nnx.Param, _BIASES.__contains__)


def _retype(
    module: nnx.Module,
    before: type[nnx.Variable],
    after: type[nnx.Variable],
    wanted: Callable[[str], bool],
) -> None:
    """Replace the variables of type ``before`` whose own name is ``wanted`` by ``after``."""
    for _, node in nnx.iter_graph(module):
        if not isinstance(node, nnx.Module):
            continue
        for name, value in list(vars(node).items()):
            if type(value) is before and wanted(name):
                setattr(node, name, after(value[...]))
