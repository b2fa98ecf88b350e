"""A value that a ``with`` block changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Setting(Generic[T]):
    """A value of the whole process, changed inside `during`.

    Not a ContextVar: autograd runs a GPU's backward pass on threads of its own, which would see
    the default instead of what the caller set. So blocks of two threads must not overlap.
    """

    def __init__(self, default: T) -> None:
        self.value = default

    @contextmanager
    def during(self, value: T) -> Iterator[None]:
        """Hold ``value`` inside the block."""
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before
