"""The nouns: a `Problem` is one call without its arrays, a `Case` a problem worth testing, a
`Choice` what a spec would run without having measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Scalar = int | float | bool | str | None

DTYPES = ("float32", "bfloat16", "float16", "float64")
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Problem:
    """One call of an op as dispatch, tuning and the roofline see it: sizes and options, no arrays.

    ``dims`` and ``flags`` are tuples of pairs so that a problem hashes; index it for a dim
    (``problem["height"]``) and ask `flag` for an option. ``deterministic`` is a demand of the
    caller's framework, not part of the tuning key.
    """

    op: str
    dims: tuple[tuple[str, int], ...]
    dtype: str
    flags: tuple[tuple[str, Scalar], ...] = ()
    direction: str = "forward"
    deterministic: bool = False

    def __getitem__(self, dim: str) -> int:
        for name, size in self.dims:
            if name == dim:
                return size
        known = ", ".join(name for name, _ in self.dims)
        raise KeyError(f"{self.op} has no dimension {dim!r}; it has {known}")

    def flag(self, name: str, default: Scalar = None) -> Any:
        """The option ``name``, or ``default`` where the problem does not state it."""
        return next((value for key, value in self.flags if key == name), default)

    @property
    def itemsize(self) -> int:
        """Bytes of one element of ``dtype``."""
        return DTYPE_BYTES[self.dtype]

    def with_dims(self, dims: Mapping[str, int]) -> Problem:
        """The same problem at other sizes."""
        return replace(self, dims=tuple((name, dims[name]) for name, _ in self.dims))

    def __str__(self) -> str:
        dims = " ".join(f"{name}={size}" for name, size in self.dims)
        flags = "".join(f" {name}={value}" for name, value in self.flags)
        return f"{self.op}[{self.direction}] {dims} {self.dtype}{flags}"


@dataclass(frozen=True)
class Case:
    """A problem of ``spec.CASES``, the one list that tests, tuning, ahead-of-time checks and
    benchmarks draw on. ``small`` and ``ragged`` cases are cheap enough for the interpreters."""

    id: str
    size: Literal["small", "ragged", "large"]
    dims: Mapping[str, int]
    flags: Mapping[str, Scalar] = field(default_factory=dict)

    def problem(self, op: str, dtype: str = "float32", direction: str = "forward") -> Problem:
        """The case as a `Problem` of ``op``."""
        return Problem(op, tuple(self.dims.items()), dtype, tuple(self.flags.items()), direction)


@dataclass(frozen=True)
class Choice:
    """What a spec's heuristic runs where nothing was measured. ``config`` is an instance of the
    spec's ``Config``, or None for an implementation without tunables."""

    implementation: str
    config: Any = None
    why: str = ""
