"""Names that changed or are unknown: keywords, moved attributes, old dotted paths, errors.

Three small mechanisms, shared by the whole package, keep programs and YAML files written for
older versions working and turn a misspelt name into an error that names the right one:

* :func:`checked_keywords` for the keyword arguments of a class or function,
* :func:`moved_attributes` for a name that now lives in another module,
* :func:`install_path_aliases` for whole modules that moved (``ml_networks.layers``).
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.abc
import importlib.machinery
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


class UnknownActivationError(NotImplementedError, ValueError):
    """No activation has this name. Also a NotImplementedError, which 0.2.6 raised."""


class UnknownDistributionError(NotImplementedError, ValueError):
    """No distribution has this name. Also a NotImplementedError, which 0.2.6 raised."""


class UnknownOptimizerError(NotImplementedError, ValueError):
    """No optimizer has this name. Also a NotImplementedError, which 0.2.6 raised."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice nearest to ``name``, else ``""``."""
    by_lower_case = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.5)
    return f"; did you mean {by_lower_case[near[0]]!r}?" if near else ""


def checked_keywords(**aliases: str) -> Callable[[T], T]:
    """Decorate a class or function so that an unknown keyword names the nearest right one.

    The callable must not take ``**kwargs`` itself, for which no keyword is unknown.

    Parameters
    ----------
    **aliases
        Further accepted spellings, ``alias="parameter"``. Giving an alias together with the
        parameter it stands for raises TypeError, as giving an argument twice does.

    Raises
    ------
    TypeError
        By the decorated callable, for a keyword that is neither a parameter nor an alias.
    """

    def decorate(target: T) -> T:
        is_class = inspect.isclass(target)
        owner: Any = target
        function = owner.__init__ if is_class else owner
        parameters = list(inspect.signature(function).parameters.values())[int(is_class) :]
        by_keyword = [
            p.name
            for p in parameters
            if p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        ]
        known = frozenset(by_keyword)
        by_position = [
            p.name
            for p in parameters
            if p.kind
            in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        ]

        def translate(n_positional: int, keywords: dict[str, Any]) -> dict[str, Any]:
            translated = {}
            for name, value in keywords.items():
                parameter = name if name in known else aliases.get(name)
                if parameter is None:
                    raise TypeError(
                        f"{owner.__name__}() got an unexpected keyword argument {name!r}"
                        + (did_you_mean(name, [*by_keyword, *aliases]) or ";")
                        + f" It takes: {', '.join(by_keyword)}"
                    )
                given = parameter in translated or parameter in by_position[:n_positional]
                if given:
                    raise TypeError(
                        f"{owner.__name__}() got {parameter!r} twice"
                        + (f" ({name!r} is another name for it)" if name != parameter else "")
                    )
                translated[parameter] = value
            return translated

        if is_class:

            @functools.wraps(function)
            def __init__(self: Any, *args: Any, **keywords: Any) -> None:
                function(self, *args, **translate(len(args), keywords) if keywords else {})

            owner.__init__ = __init__
            return target

        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            return function(*args, **translate(len(args), keywords) if keywords else {})

        return call  # type: ignore[return-value]

    return decorate


def moved_attributes(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module ``__getattr__`` for names that moved from ``module`` elsewhere.

    Parameters
    ----------
    module
        ``__name__`` of the module that used to hold the names.
    homes
        ``{name: module that holds it now}``; the module is imported on first use.
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} has moved to {homes[name]}.{name}",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(homes[name]), name)

    return __getattr__


class _MovedModule(ModuleType):
    """Stands for a module under its old path and looks every attribute up in its new homes."""

    _homes: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        names: set[str] = set()
        for home in self._homes:
            module = importlib.import_module(home)
            names.update(getattr(module, "__all__", dir(module)))
            if name != "__all__" and hasattr(module, name):
                return getattr(module, name)
        if name == "__all__":
            return sorted(n for n in names if not n.startswith("_"))
        raise AttributeError(
            f"module {self.__name__!r} (now {' and '.join(self._homes)}) has no attribute "
            f"{name!r}{did_you_mean(name, names)}"
        )


class _PathAliases(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads the old dotted paths of one package."""

    def __init__(self, package: str, homes: Mapping[str, tuple[str, ...]]) -> None:
        self.homes = {
            f"{package}.{old}": tuple(f"{package}.{home}" for home in new)
            for old, new in homes.items()
        }

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.homes:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = _MovedModule(spec.name)
        module._homes = self.homes[spec.name]
        return module

    def exec_module(self, module: ModuleType) -> None:
        homes = self.homes[module.__name__]
        importlib.import_module(homes[0])
        warnings.warn(
            f"{module.__name__} is an old path; import from {' or '.join(homes)}",
            DeprecationWarning,
            stacklevel=2,
        )


def install_path_aliases(package: str, homes: Mapping[str, tuple[str, ...]]) -> None:
    """Let old module paths below ``package`` be imported, with a DeprecationWarning.

    Parameters
    ----------
    package
        Name of the package.
    homes
        ``{old path: new paths}``, all relative to ``package``. An attribute of the old module
        is looked up in the new ones in order.
    """
    sys.meta_path.append(_PathAliases(package, homes))
