"""``pytest benchmarks``: where the figures go, and the tables at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import median

import pytest

from benchmarks import report
from benchmarks.peers_026 import Race
from ml_networks.kernels.core.device import cpu
from ml_networks.kernels.core.registry import Framework


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark-out",
        default="runs/benchmarks",
        help="folder for results.json and the pictures (runs/benchmarks)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            # Compilers warn about much that does not concern a benchmark, and take their time.
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.timeout(1200))


ROWS = pytest.StashKey[list[report.Row]]()


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> list[report.Row]:
    """Rows to print when all is done."""
    return request.config.stash.setdefault(ROWS, [])


@pytest.fixture
def out(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--benchmark-out"))


def collected_races(request: pytest.FixtureRequest, framework: Framework) -> Iterator[list[Race]]:
    """A list to collect races in; then their table is printed, and ``<framework>_library.json``
    written."""
    found: list[Race] = []
    yield found
    folder = Path(request.config.getoption("--benchmark-out"))
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        asdict(result) | {"speedup": result.speedup, "fastest": result.fastest} for result in found
    ]
    setup = asdict(report.setup(cpu(), framework))
    text = json.dumps({"setup": setup, "races": rows}, indent=1)
    (folder / f"{framework}_library.json").write_text(f"{text}\n", encoding="utf-8")
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from rich.console import Console

    rows = terminalreporter.config.stash.get(ROWS, [])
    console = Console(width=120)
    with console.capture() as capture:
        for table in report.tables(rows):
            console.print(table)
    for line in capture.get().splitlines():
        terminalreporter.write_line(line)
