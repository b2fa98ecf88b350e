"""Packages whose names are imported from their files on first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ml_networks._compat import did_you_mean


def lazy_names(
    package: str, modules: Mapping[str, tuple[str, ...]], framework: str
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__all__``, ``__getattr__`` and ``__dir__`` of a package.

    Parameters
    ----------
    package
        Its ``__name__``.
    modules
        ``{module below the package: the names it holds}``. The modules themselves are attributes
        too, so that ``package.module.name`` needs no import of its own.
    framework
        The import name of the framework the modules need, also the extra that installs it.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}{did_you_mean(name, homes)}"
            )
        try:
            module = importlib.import_module(f"{package}.{homes[name]}")
        except ModuleNotFoundError as error:
            if error.name == framework:
                raise ModuleNotFoundError(
                    f"{package}.{name} needs {framework}: pip install 'ml-networks[{framework}]'",
                    name=framework,
                ) from error
            raise
        value = getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return sorted(homes), __getattr__, __dir__
