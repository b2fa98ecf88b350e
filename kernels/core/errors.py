"""Every error and warning that the kernels raise on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KernelError(Exception):
    """Base of the errors below."""


class UnsupportedImplementationError(KernelError, ValueError):
    """The implementation asked for cannot run here. The message lists every reason."""


class UnknownNameError(KernelError, ValueError):
    """No op, implementation or target has this name. The message suggests the nearest."""


class TuningMissError(KernelError, LookupError):
    """Policy ``error`` is set and no tuning record fits."""


class TuningRecordWarning(UserWarning):
    """A tuning file is broken, foreign or cannot be written; dispatch goes on without it."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """The error for a misspelt ``name``: says what is known and which of it is nearest."""
    choices = sorted(known)
    near = difflib.get_close_matches(str(name), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(choices)}")
