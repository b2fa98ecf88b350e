"""What ran: a recorder that counts calls and time per op, direction and implementation.

Free when nobody records: `timed` then returns one shared null context.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .dispatch import Decision


@dataclass
class Row:
    """One line of a usage report. ``seconds`` is the sum over ``calls``."""

    op: str
    direction: str
    implementation: str
    why: str
    calls: int = 0
    seconds: float = 0.0


class Usage:
    """The rows collected by `record`, in order of first use.

    ``synchronize`` is called before each reading of the clock. Give
    ``torch.cuda.synchronize`` to time a GPU: recording is for reports, not for training at speed.
    """

    def __init__(self, synchronize: Callable[[], object] | None = None) -> None:
        self._rows: dict[tuple[str, str, str, str], Row] = {}
        self._synchronize = synchronize

    @property
    def rows(self) -> list[Row]:
        """What ran so far."""
        return list(self._rows.values())

    def _clock(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()

    @contextmanager
    def time(self, decision: Decision) -> Iterator[None]:
        """Add one call of ``decision`` and the time until the block ends."""
        key = (decision.op, decision.direction, decision.implementation, decision.why)
        row = self._rows.setdefault(key, Row(*key))
        start = self._clock()
        try:
            yield
        finally:
            row.calls += 1
            row.seconds += self._clock() - start


_active: Usage | None = None
_NOTHING = nullcontext()


@contextmanager
def record(synchronize: Callable[[], object] | None = None) -> Iterator[Usage]:
    """Collect what every op runs inside the block; yields the `Usage`, readable at any time."""
    global _active
    before, _active = _active, Usage(synchronize)
    try:
        yield _active
    finally:
        _active = before


def recording() -> bool:
    """Whether a `record` block is open."""
    return _active is not None


def timed(decision: Decision) -> AbstractContextManager[None]:
    """The context an op's public function runs its implementation in."""
    return _NOTHING if _active is None else _active.time(decision)
