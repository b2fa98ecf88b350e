"""Time ops against what a user would pick instead; tables, JSON and pictures of the result.

Works for any op of the registry: contenders are its implementations, ``torch.compile`` of the
plain path, jit-compiled XLA, and the packages of ``peers.py``. An op whose conformance checks fail
gets no figures.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import re
import shlex
import sys
import textwrap
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS
from ml_networks.kernels.core import dispatch, measure, registry, roofline, testing, usage
from ml_networks.kernels.core.device import Device
from ml_networks.kernels.core.errors import KernelError
from ml_networks.kernels.core.problem import Case
from ml_networks.kernels.core.registry import Framework, Op

SLOWEST_CPU_CASE = 1e6
"""Microseconds: on a CPU, cases that take longer are left out."""
AGREES = 0.95
"""A rival must give this share of the same floating-point results; ties may differ."""


class NotConformingError(KernelError):
    """The op's checks fail, so its times mean nothing."""


@dataclass(frozen=True)
class Row:
    """One contender at one case. Times in microseconds; ``speedup`` is over the plain path of the
    same framework; ``roofline`` is the floor over the time, where the device's rates are known.
    """

    op: str
    case: str
    dtype: str
    mode: str
    framework: str
    contender: str
    p20: float
    p50: float
    p80: float
    speedup: float
    roofline: float | None


@dataclass(frozen=True)
class Setup:
    """Where, with what and how figures were made: they mean nothing without."""

    device: str
    target: str
    peaks_from: str
    versions: Mapping[str, str]
    command: str
    date: str


@dataclass
class Figure:
    """The rows of an op in one framework, and how they were made."""

    op: str
    framework: str
    setup: Setup
    rows: list[Row]


def setup(device: Device, framework: Framework) -> Setup:
    command = [Path(word).name if Path(word).is_file() else word for word in sys.orig_argv]
    name = device.name if device.platform != "cpu" else _processor()
    return Setup(
        name,
        device.target,
        device.peaks_from,
        measure.versions(framework),
        shlex.join(command),
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _processor() -> str:
    """The name of the CPU, which Python's platform module does not know on Linux."""
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        facts = ""
    found = re.search(r"^model name\s*:\s*(.+)$", facts, re.MULTILINE)
    name = found.group(1) if found else platform.processor() or platform.machine()
    threads = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    return f"{name}, {threads} threads"


def require_conformance(op: Op, framework: Framework) -> None:
    """Raise NotConformingError unless the op's small cases agree with float64."""
    for check in testing.checks(framework, (op.name,), sizes=("small",)):
        if check.dtype == "float32":
            wrong = [str(outcome) for outcome in testing.run(check) if not outcome.ok]
            if wrong:
                raise NotConformingError(f"no figures for {op.name}: {check.id}: {wrong[0]}")


def plan(op: Op, device: Device) -> Iterator[tuple[Case, str, str]]:
    """Case, dtype and mode, the most telling first. On a CPU one small case and the large ones in
    float32, on an accelerator everything, float32 and bfloat16.
    """
    large = [case for case in op.spec.CASES if case.size == "large"]
    others = [case for case in op.spec.CASES if case.size != "large"]
    if device.platform == "cpu":
        dtypes, cases = ("float32",), [*large, *others[:1]]
    else:
        dtypes, cases = ("float32", "bfloat16"), [*large, *others]
    for dtype in dtypes:
        for case in cases:
            for mode in ("forward+backward", "forward"):
                yield case, dtype, mode


def floor_of(load: measure.Workload, device: Device) -> float | None:
    """The roofline of a pass: of all directions that dispatch runs in it, together."""
    with usage.record() as ran:
        load.run(None)
    floors = [
        roofline.floor(load.op.spec, load.case.problem(load.op.name, load.dtype, way), device)
        for way in {row.direction for row in ran.rows}
    ]
    times = [floor.microseconds for floor in floors if floor.microseconds is not None]
    return sum(times) if times else None


def contenders(load: measure.Workload, device: Device) -> dict[str, measure.Function]:
    """What runs this case, by the name it has in reports; the plain path first."""
    op, binding = load.op, load.binding
    label = "eager" if load.framework == "torch" else "jit"
    found = {f"{binding.plain} ({label})": load.function(binding.plain)}
    able = [
        implementation
        for implementation in binding.implementations[1:]
        if all(
            not dispatch.reasons_against(problem, device, binding)[implementation]
            for problem in (
                load.case.problem(op.name, load.dtype, way) for way in op.spec.DIRECTIONS
            )
        )
    ]
    found |= {implementation: load.function(implementation) for implementation in able}
    if able:
        found["auto"] = load.function(None)
    if load.framework == "torch":
        found |= _rivals(load, device)
        if load.case.size == "large":
            found["torch.compile"] = load.function(_compiled(load))
    return found


def _compiled(load: measure.Workload) -> Any:
    import torch

    torch.compiler.reset()
    flags, plain = dict(load.case.flags), load.binding.plain
    return torch.compile(lambda values: load.binding.call(values, flags, plain), dynamic=False)


def _rivals(load: measure.Workload, device: Device) -> dict[str, measure.Function]:
    """The published packages that give the same numbers."""
    import torch

    found = {}
    for peer in PEERS:
        if peer.op != load.op.name or not peer.installed or (load.training and not peer.trains):
            continue
        call = peer.build(load.case, "cpu" if device.platform == "cpu" else "cuda")
        if call is None:
            continue
        try:
            theirs = load.run(call)
        except Exception as error:
            warnings.warn(f"{peer.name} does not take {load.case.id}: {error}", stacklevel=1)
            continue
        ours = load.run(load.binding.plain)
        close = [
            torch.isclose(theirs[name].double(), ours[name].double(), rtol=1e-2, atol=1e-6)
            for name in theirs
            if theirs[name].is_floating_point()
        ]
        if min(part.double().mean().item() for part in close) >= AGREES:
            found[peer.name] = load.function(call)
    return found


def measure_case(
    op: Op, framework: Framework, case: Case, dtype: str, mode: str, device: Device
) -> list[Row]:
    """The rows of one case, fastest last; [] where it is too slow for a CPU."""
    load = measure.Workload(op, case, framework, dtype, mode != "forward")
    clock = measure.stopwatch(framework, device)
    if device.platform == "cpu":
        once = load.function(load.binding.plain)
        once()
        if clock(once) > SLOWEST_CPU_CASE:
            return []
    functions: dict[str, measure.Function] = {}
    for name, function in contenders(load, device).items():
        try:
            function()
        except Exception as error:
            warnings.warn(f"{op.name} {case.id}: {name} fails: {error}", stacklevel=1)
            continue
        functions[name] = measure.graphed(function) if framework == "torch" else function
    floor = floor_of(load, device)
    times = measure.compare(functions, clock, seconds=0.5)
    plain = times[next(iter(functions))].p50
    return [
        Row(
            op.name,
            case.id,
            dtype,
            mode,
            framework,
            name,
            time.p20,
            time.p50,
            time.p80,
            plain / time.p50,
            floor / time.p50 if floor else None,
        )
        for name, time in times.items()
    ]


def run(
    names: Sequence[str],
    out: Path,
    *,
    frameworks: Sequence[Framework] = ("torch", "jax"),
    seconds: float = math.inf,
    sizes: Sequence[str] = ("small", "ragged", "large"),
    resume: bool = False,
) -> list[Row]:
    """Measure the ops ``names``, writing ``results.json`` after every case and a picture of each
    op at the end; returns their rows. With ``resume`` the cases that ``results.json`` has from the
    same device and versions are not measured again.

    Raises
    ------
    NotConformingError
        If an op's checks fail, after the other ops were measured.
    """
    start = time.monotonic()
    path = out / "results.json"
    figures = {(figure.op, figure.framework): figure for figure in read(path)}
    failed: list[NotConformingError] = []
    for framework in frameworks:
        device = dispatch.current_device(framework)
        for op in map(registry.get, names):
            if not op.has(framework):
                continue
            figure = Figure(op.name, framework, setup(device, framework), [])
            before = figures.get((op.name, framework))
            if resume and before is not None and _same_place(before.setup, figure.setup):
                figure = before
            figures[op.name, framework] = figure
            done = {(row.case, row.dtype, row.mode) for row in figure.rows}
            try:
                require_conformance(op, framework)
            except NotConformingError as error:
                del figures[op.name, framework]
                failed.append(error)
                continue
            for case, dtype, mode in plan(op, device):
                if case.size not in sizes or (case.id, dtype, mode) in done:
                    continue
                if time.monotonic() - start > seconds:
                    break
                figure.rows += measure_case(op, framework, case, dtype, mode, device)
                write(path, list(figures.values()))
                gc.collect()
    mine = [figure for figure in figures.values() if figure.op in names]
    for name in names:
        picture(out / f"{name}.png", [figure for figure in mine if figure.op == name])
    if failed:
        raise failed[0]
    return [row for figure in mine if figure.framework in frameworks for row in figure.rows]


def _same_place(one: Setup, other: Setup) -> bool:
    return (one.device, one.versions) == (other.device, other.versions)


def write(path: Path, figures: Sequence[Figure]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"figures": [asdict(figure) for figure in figures]}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> list[Figure]:
    if not path.is_file():
        return []
    return [
        Figure(
            figure["op"],
            figure["framework"],
            Setup(**figure["setup"]),
            [Row(**row) for row in figure["rows"]],
        )
        for figure in json.loads(path.read_text(encoding="utf-8"))["figures"]
    ]


def tables(rows: Sequence[Row]) -> list[Any]:
    """A table for each op."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    found = []
    for name in dict.fromkeys(row.op for row in rows):
        own = [row for row in rows if row.op == name]
        table = Table(title=name, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for column in ("case", "mode", "dtype", "contender"):
            table.add_column(column)
        for column in ("us (p50)", "p20", "p80", "x plain", "roofline"):
            table.add_column(column, justify="right")
        for group in grouped(own):
            for index, row in enumerate(group):
                head = (row.case, row.mode, row.dtype) if index == 0 else ("", "", "")
                reached = "" if row.roofline is None else f"{row.roofline:.0%}"
                times = (f"{time:,.1f}" for time in (row.p50, row.p20, row.p80))
                last = index == len(group) - 1
                cells = (*head, row.contender, *times, f"{row.speedup:.2f}", reached)
                table.add_row(*cells, end_section=last)
        found.append(table)
    return found


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that were measured together, slowest first."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.op, row.framework, row.case, row.dtype, row.mode].append(row)
    return [sorted(group, key=lambda row: -row.p50) for group in groups.values()]


_COLOURS = {
    "triton": "#2a6f97",
    "pallas": "#2a6f97",
    "torch (eager)": "#7fb3d5",
    "xla (jit)": "#7fb3d5",
    "auto": "#52b788",
}


def picture(path: Path, figures: Sequence[Figure]) -> None:
    """Horizontal bars of an op's large cases in float32: shorter is faster."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for figure in figures for row in figure.rows if row.dtype == "float32"]
    large = {
        (row.op, case.id)
        for row in rows
        for case in registry.get(row.op).spec.CASES
        if case.size == "large"
    }
    groups = grouped([row for row in rows if (row.op, row.case) in large])
    if not groups:
        return
    bars = sum(len(group) for group in groups)
    chart, axes = plt.subplots(figsize=(10, 0.26 * (bars + 1.6 * len(groups)) + 1.4))
    position = 0.0
    widest = max(row.p50 for group in groups for row in group)
    narrowest = min(row.p50 for group in groups for row in group)
    for group in groups:
        first = group[0]
        title = f"{first.case}, {first.mode}, {first.framework}"
        axes.text(narrowest * 0.7, position, title, va="center", fontsize=8, weight="bold")
        position += 1
        for row in group:
            colour = _COLOURS.get(row.contender, "#b0b0b0")
            axes.barh(position, row.p50, color=colour, height=0.8)
            reached = "" if row.roofline is None else f", {row.roofline:.0%} of the roofline"
            label = f" {_duration(row.p50)}, {row.speedup:.1f}x{reached}"
            axes.text(row.p50, position, label, va="center", fontsize=7)
            axes.text(
                narrowest * 0.7, position, f"{row.contender} ", va="center", ha="right", fontsize=8
            )
            position += 1
        position += 0.6
    axes.set_xscale("log")
    axes.set_xlim(narrowest * 0.7, widest * (widest / narrowest) ** 0.35 * 2)
    axes.set_ylim(position, -1)
    axes.set_yticks([])
    axes.set_xlabel("microseconds, median; the factor is over the plain framework path")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    where = figures[0].setup
    versions = {f"{k} {v}": None for figure in figures for k, v in figure.setup.versions.items()}
    told = f"{', '.join(versions)}; {where.date}; {where.command}"
    lines = [f"{rows[0].op} on {where.device}, float32", *textwrap.wrap(told, 110)]
    axes.set_title("\n".join(lines), fontsize=9, loc="left")
    chart.tight_layout()
    chart.savefig(path, dpi=130)
    plt.close(chart)


def _duration(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.1f} us"
    return f"{microseconds / 1000:.2f} ms"
