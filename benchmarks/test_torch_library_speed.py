"""The torch modules against those of ml-networks 0.2.6, forward and backward, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks import peers
from benchmarks.conftest import collected_races
from benchmarks.peers_026 import WORKLOADS, Race, race

REQUIRED = {
    "Attention2d (4, 64, 32, 32), 8 heads": 2.5,
    "calc_timeseries_nce, batch 16, length 64, range 3": 50.0,
}


@pytest.fixture(scope="module")
def races(request: pytest.FixtureRequest) -> Iterator[list[Race]]:
    """Collects the results; prints the table and writes the JSON at the end."""
    yield from collected_races(request, "torch")


@pytest.mark.parametrize("workload", WORKLOADS)
def test_not_slower_than_0_2_6(workload: str, races: list[Race]) -> None:
    python = peers.peers_python()
    if python is None:
        pytest.skip(
            "no environment with ml-networks 0.2.6: run `make peers`, "
            f"or set {peers.ENVIRONMENT} to the Python of one"
        )
    result = race(workload, python, threads=None if workload in REQUIRED else 1)
    races.append(result)
    if workload in REQUIRED:
        assert result.speedup >= REQUIRED[workload]
    else:
        # Slower counts only beyond what rounds differ among themselves.
        assert result.speedup >= 1.0 or result.spread[1] >= 1.0
