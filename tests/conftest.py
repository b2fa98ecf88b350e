"""What every test shares: a tuning cache of its own, repeatable draws, no second thread."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile

import pytest

# Before anything reads them: the user's own tuning cache must neither help nor suffer.
CACHE = tempfile.mkdtemp(prefix="ml-networks-test-cache-")
os.environ["ML_NETWORKS_CACHE"] = CACHE
os.environ.setdefault("MPLBACKEND", "agg")

with contextlib.suppress(ModuleNotFoundError):
    from hypothesis import settings

    # A draw that fails fails on every machine, and a busy machine fails none.
    settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
    settings.load_profile("repeatable")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(CACHE, ignore_errors=True)
