"""``pytest benchmarks``: where the figures go, and the tables at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import report


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from rich.console import Console

    rows = terminalreporter.config.stash.get(ROWS, [])
    console = Console(width=120)
    with console.capture() as capture:
        for table in report.tables(rows):
            console.print(table)
    for line in capture.get().splitlines():
        terminalreporter.write_line(line)
