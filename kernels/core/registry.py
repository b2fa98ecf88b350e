"""Ops are folders: every package beside ``core`` that holds a ``spec.py`` is an op.

``register`` adds one that lives elsewhere, so a third-party op needs no change here.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal, Protocol, cast

from .device import Device
from .errors import unknown_name
from .problem import Case, Choice, Problem

Framework = Literal["torch", "jax"]

_KERNELS = __name__.rsplit(".", 2)[0]
_packages: dict[str, str] = {}


class Spec(Protocol):
    """What an op's ``spec.py`` says. A module satisfies it; see any op for an example.

    ``bucket(problem) -> Problem`` may be added where rounding every dim up to a power of two is
    not the right tuning key.
    """

    NAME: str
    DIMENSIONS: tuple[str, ...]
    DIRECTIONS: tuple[str, ...]
    CASES: tuple[Case, ...]
    Config: type

    @staticmethod
    def flops(problem: Problem) -> int: ...
    @staticmethod
    def bytes_moved(problem: Problem) -> int: ...
    @staticmethod
    def not_supported_reasons(
        problem: Problem, implementation: str, device: Device
    ) -> list[str]: ...
    @staticmethod
    def heuristic(
        problem: Problem, device: Device, implementations: tuple[str, ...]
    ) -> Choice: ...
    @staticmethod
    def search_space(problem: Problem, device: Device, implementation: str) -> list[Any]: ...


@dataclass(frozen=True)
class Binding:
    """An op in one framework.

    ``implementations[0]`` is the plain framework path. ``call(inputs, flags, implementation)``
    goes through the public function: tests, tuning and benchmarks see what a user sees.
    ``differentiable`` names the inputs that get a gradient, of which a case may lack some;
    ``kernel_module`` holds the kernels.
    """

    op: str
    framework: Framework
    implementations: tuple[str, ...]
    call: Callable[[Mapping[str, Any], Mapping[str, Any], str | None], Mapping[str, Any]]
    differentiable: tuple[str, ...]
    kernel_module: str

    @property
    def plain(self) -> str:
        """The name of the plain framework path."""
        return self.implementations[0]

    def wanted(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """Which of ``inputs`` get a gradient."""
        return tuple(name for name in self.differentiable if name in inputs)


@dataclass(frozen=True)
class Op:
    """An op by name. Its modules are imported when asked for, so a missing framework only
    matters to who uses it."""

    name: str
    package: str

    def module(self, name: str) -> ModuleType:
        """The module ``name`` of the op's folder."""
        return importlib.import_module(f"{self.package}.{name}")

    @property
    def spec(self) -> Spec:
        """The op's ``spec.py``."""
        return cast(Spec, self.module("spec"))

    @property
    def reference(self) -> ModuleType:
        """The op's ``reference.py``: NumPy float64, the meaning of the op."""
        return self.module("reference")

    def has(self, framework: Framework) -> bool:
        """Whether the op is written for ``framework``."""
        return importlib.util.find_spec(f"{self.package}.{framework}_op") is not None

    def binding(self, framework: Framework) -> Binding:
        """The op in ``framework``; imports that framework."""
        return cast(Binding, self.module(f"{framework}_op").BINDING)

    def kernels(self, framework: Framework) -> ModuleType:
        """The module with the op's kernels for ``framework``."""
        return self.module(self.binding(framework).kernel_module)


@cache
def _shipped() -> dict[str, str]:
    root = importlib.import_module(_KERNELS)
    return {
        module.name: f"{_KERNELS}.{module.name}"
        for module in pkgutil.iter_modules(root.__path__)
        if module.ispkg and importlib.util.find_spec(f"{_KERNELS}.{module.name}.spec")
    }


def register(package: str) -> Op:
    """Add the op that lives in ``package`` (a dotted name); returns it.

    Raises
    ------
    ModuleNotFoundError
        If ``package.spec`` does not exist.
    """
    name = importlib.import_module(f"{package}.spec").NAME
    _packages[name] = package
    return Op(name, package)


def ops() -> dict[str, Op]:
    """Every op: the shipped ones and those given to `register`, by name."""
    return {name: Op(name, package) for name, package in {**_shipped(), **_packages}.items()}


def get(name: str) -> Op:
    """The op ``name``.

    Raises
    ------
    UnknownNameError
        With the nearest name, if there is none.
    """
    found = ops()
    if name not in found:
        raise unknown_name("op", name, found)
    return found[name]
