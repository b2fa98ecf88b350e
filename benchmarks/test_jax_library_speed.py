"""The JAX modules against those of ml-networks 0.2.6, compiled, forward and backward, on the CPU.

Seconds of the processor on one thread, in turns.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks import peers
from benchmarks.conftest import collected_races
from benchmarks.peers_026 import JAX_WORKLOADS, Race, race

pytest.importorskip("jax", reason="jax is not installed")


@pytest.fixture(scope="module")
def races(request: pytest.FixtureRequest) -> Iterator[list[Race]]:
    """Collects the results; prints the table and writes the JSON at the end."""
    yield from collected_races(request, "jax")


@pytest.mark.parametrize("workload", JAX_WORKLOADS)
def test_not_slower_than_0_2_6(workload: str, races: list[Race]) -> None:
    python = peers.peers_python()
    if python is None:
        pytest.skip(
            "no environment with ml-networks 0.2.6: run `make peers`, "
            f"or set {peers.ENVIRONMENT} to the Python of one"
        )
    result = race(workload, python)
    races.append(result)
    # Slower counts only beyond what rounds differ among themselves.
    assert result.speedup >= 1.0 or result.spread[1] >= 1.0
