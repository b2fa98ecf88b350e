"""The torch modules against those of ml-networks 0.2.6, forward and backward, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import median

import pytest

from benchmarks import peers
from benchmarks.peers_026 import WORKLOADS, Race, race

REQUIRED = {
    "Attention2d (4, 64, 32, 32), 8 heads": 2.5,
    "calc_timeseries_nce, batch 16, length 64, range 3": 50.0,
}


@pytest.fixture(scope="module")
def races(request: pytest.FixtureRequest) -> Iterator[list[Race]]:
    """Collects the results; prints the table and writes the JSON at the end."""
    found: list[Race] = []
    yield found
    folder = Path(request.config.getoption("--benchmark-out"))
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        asdict(result) | {"speedup": result.speedup, "fastest": result.fastest} for result in found
    ]
    text = json.dumps(rows, indent=1)
    (folder / "torch_library.json").write_text(f"{text}\n", encoding="utf-8")
    lines = [f"{'forward + backward, ms':<52}{'0.2.6':>9}{'ours':>9}{'ratio':>9}{'fastest':>9}"]
    for result in found:
        theirs, ours = (1e3 * median(times) for times in (result.theirs, result.ours))
        low, high = result.spread
        lines.append(
            f"{result.workload:<52}{theirs:>9.2f}{ours:>9.2f}{result.speedup:>8.2f}x"
            f"{result.fastest:>8.2f}x  ({low:.2f} - {high:.2f})"
        )
    # Pytest keeps what a fixture prints to itself.
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        print("", *lines, sep="\n")


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
