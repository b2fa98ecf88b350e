"""The command ``ml-networks``: what is installed, what would run and why, how close to the
hardware limit it is, and how to make it faster.

Every command prints tables, or with ``--json`` one JSON document. Bad input is answered in one
line on stderr and exit code 2.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ml_networks.kernels.core import device as devices
from ml_networks.kernels.core import dispatch, records, registry, roofline
from ml_networks.kernels.core.errors import KernelError, unknown_name
from ml_networks.kernels.core.problem import DTYPES, Problem

if TYPE_CHECKING:
    from ml_networks.kernels.core.ahead_of_time import Resources
    from ml_networks.kernels.core.device import Device
    from ml_networks.kernels.core.registry import Binding, Framework, Op

FRAMEWORKS: tuple[Framework, ...] = ("torch", "jax")
_EXTRAS = {
    "torch": "torch",
    "triton": "torch",
    "jax": "jax",
    "jaxlib": "jax",
    "matplotlib": "bench",
}
_PACKAGES = ("ml-networks", "torch", "triton", "jax", "jaxlib", "flax", "numpy")


class BadInput(Exception):
    """What was typed cannot be answered; the message says what would do."""


_commands = typer.Typer(
    help="Neural networks for PyTorch and JAX: inspect, explain and tune their kernels.",
    add_completion=False,
)
_cache = typer.Typer(help="The tuning records on this machine.")
_commands.add_typer(_cache, name="cache")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
OpName = Annotated[str, typer.Argument(help="An op; `ml-networks info` lists them.")]
OpNames = Annotated[list[str] | None, typer.Argument(help="Ops; all by default.")]
InFramework = Annotated[str, typer.Option(help="torch or jax.")]
Target = Annotated[
    str | None,
    typer.Option(help=f"A chip instead of this machine's: {', '.join(devices.TARGETS)}."),
]


def app() -> None:
    """The entry point: runs the command and turns what was typed wrongly into one line."""
    try:
        sys.exit(_commands(sys.argv[1:] or ["--help"], standalone_mode=False))
    except (typer.Abort, KeyboardInterrupt):
        _fail("stopped", 130)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        _fail(f"{missing} is not installed: pip install 'ml-networks[{_EXTRAS[missing]}]'", 2)
    except (KernelError, BadInput) as error:
        _fail(str(error), 2)
    except Exception as error:
        # The parser's own errors: their class has moved between versions of typer.
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{error.format_message().rstrip('.')}. See --help.", 2)


def _fail(message: str, code: int) -> None:
    first, *more = message.splitlines()
    reasons = "; ".join(line.strip(" -") for line in more if line.strip())
    print(f"ml-networks: {first} {reasons}".strip(), file=sys.stderr)
    sys.exit(code)


@contextmanager
def _bad_values() -> Iterator[None]:
    """Values typed by a person are checked by the library; its ValueErrors are answers."""
    try:
        yield
    except ValueError as error:
        raise BadInput(str(error)) from error


def _show(data: Any, as_json: bool, tables: Callable[[], Sequence[Any]]) -> None:
    if as_json:
        print(json.dumps(data, indent=1, default=_plain))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 160  # a pipe has no width: leave wide tables readable
    for table in tables():
        console.print(table)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)  # type: ignore[arg-type]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    return table


def _framework(name: str) -> Framework:
    for known in FRAMEWORKS:
        if name == known:
            return known
    raise unknown_name("framework", name, FRAMEWORKS)


def _binding(op: Op, framework: Framework) -> Binding:
    if not op.has(framework):
        raise BadInput(f"{op.name} is not written for {framework}")
    return op.binding(framework)


def _device(target: str | None, framework: Framework) -> Device:
    return devices.target(target) if target else dispatch.current_device(framework)


def _scalar(text: str) -> Any:
    try:
        value = json.loads(text.lower() if text in ("True", "False", "None") else text)
    except ValueError:
        return text
    return text if isinstance(value, list | dict) else value


def _pairs(option: str, entries: Sequence[str], example: str) -> dict[str, str]:
    pairs = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not (name and equals and value):
            raise BadInput(f"--{option} {entry!r} is not name=value, as in --{option} {example}")
        pairs[name] = value
    return pairs


def _problem(
    op: Op, shape: Sequence[str], flags: Sequence[str], dtype: str, direction: str | None
) -> Problem:
    """The problem that ``--shape``, ``--flag``, ``--dtype`` and ``--direction`` describe."""
    example = f"{op.spec.DIMENSIONS[0]}=64"
    dims = {}
    for name, text in _pairs("shape", shape, example).items():
        if not text.isdecimal():
            raise BadInput(f"--shape {name}={text}: the size is not a whole number")
        dims[name] = int(text)
    known = {name for case in op.spec.CASES for name in case.flags}
    values = {name: _scalar(text) for name, text in _pairs("flag", flags, "alpha=1.0").items()}
    for name in values:
        if name not in known:
            raise unknown_name(f"flag of {op.name}", name, known)
    with _bad_values():
        return dispatch.problem_of(op.name, dims, dtype=dtype, flags=values, direction=direction)


# ---------------------------------------------------------------------------------------- info


@_commands.command()
def info(as_json: AsJson = False) -> None:
    """Versions, devices and their peaks, caches, and which ops have tuning records."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        versions[package] = _version(package) or "not installed"
    found = {
        framework: dispatch.current_device(framework)
        for framework in FRAMEWORKS
        if _version(framework)
    }
    ops = [
        {
            "op": op.name,
            "frameworks": [framework for framework in FRAMEWORKS if op.has(framework)],
            "directions": list(op.spec.DIRECTIONS),
            "dimensions": list(op.spec.DIMENSIONS),
            "shipped records": _counts(records.shipped_folder(), op),
            "own records": _counts(records.user_folder(), op),
        }
        for op in registry.ops().values()
    ]
    caches = {
        "tuning records": str(records.user_folder()),
        "shipped records": str(records.shipped_folder()),
    }
    data = {"versions": versions, "devices": found, "caches": caches, "ops": ops}
    _show(data, as_json, lambda: _info_tables(versions, found, caches, ops))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _counts(folder: Path, op: Op) -> dict[str, int]:
    return {
        path.parent.name: len(records.read(path, path.parent.name, op.name))
        for path in sorted(folder.glob(f"*/{op.name}.json"))
    }


def _info_tables(
    versions: Mapping[str, str],
    found: Mapping[Framework, Device],
    caches: Mapping[str, str],
    ops: Sequence[Mapping[str, Any]],
) -> list[Any]:
    def rates(device: Device) -> str:
        peaks = [f"{name} {peak / 1e12:.3g} TFLOP/s" for name, peak in device.peak_flops]
        bandwidth = [f"{device.bandwidth / 1e12:.3g} TB/s"] if device.bandwidth else []
        return ", ".join([*bandwidth, *peaks]) or "unknown"

    def counts(numbers: Mapping[str, int]) -> str:
        return ", ".join(f"{device} {number}" for device, number in numbers.items()) or "none"

    device_rows = [
        (name, device.name, device.target, rates(device), device.peaks_from)
        for name, device in found.items()
    ]
    op_rows = [
        (
            row["op"],
            ", ".join(row["frameworks"]),
            ", ".join(row["dimensions"]),
            counts(row["shipped records"]),
            counts(row["own records"]),
        )
        for row in ops
    ]
    columns = ("op", "frameworks", "dimensions", "shipped records", "own records")
    return [
        _table("versions", ("package", "version"), list(versions.items())),
        _table("devices", ("framework", "device", "target", "peaks", "from"), device_rows),
        _table("caches", ("what", "where"), list(caches.items())),
        _table("ops", columns, op_rows),
    ]


# ------------------------------------------------------------------------------------- explain


@_commands.command()
def explain(
    op: OpName,
    shape: Annotated[
        list[str] | None, typer.Option(help="A size as name=value; once for each dimension.")
    ] = None,
    flag: Annotated[list[str] | None, typer.Option(help="An option as name=value.")] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    direction: Annotated[str | None, typer.Option(help="The op's first by default.")] = None,
    framework: InFramework = "torch",
    target: Target = None,
    implementation: Annotated[
        str | None, typer.Option(help="Ask for one by name, as a call would.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Which implementation would run, with which config, why, and why not the others."""
    found, side = registry.get(op), _framework(framework)
    problem = _problem(found, shape or (), flag or (), dtype, direction)
    device = _device(target, side)
    decision = dispatch.decide(problem, device, _binding(found, side), implementation)
    floor = roofline.floor(found.spec, problem, device)
    data = {"problem": problem, "device": device, "decision": decision, "floor": floor}

    def tables() -> list[Any]:
        config = decision.config and dataclasses.asdict(decision.config)
        rows = [
            ("problem", problem),
            ("device", f"{device.name} ({device.target})"),
            ("runs", decision.implementation),
            ("config", " ".join(f"{k}={v}" for k, v in (config or {}).items()) or "none"),
            ("source", decision.source),
            ("why", decision.why),
            *((f"not {name}", "; ".join(reasons)) for name, reasons in decision.against),
            ("floor", _floor(floor)),
        ]
        return [_table(found.name, ("", ""), rows)]

    _show(data, as_json, tables)


def _floor(floor: roofline.Floor) -> str:
    if floor.microseconds is None:
        return f"unknown ({floor.bytes_moved:,} bytes, {floor.flops:,} FLOP)"
    return f"{floor.microseconds:.3g} us, bound by {floor.bound}"


# ------------------------------------------------------------------------------------- inspect


@_commands.command()
def inspect(
    op: OpName,
    target: Annotated[str, typer.Option(help=f"One of {', '.join(devices.TARGETS)}.")] = "sm_90",
    case: Annotated[str | None, typer.Option(help="One of the op's cases by id.")] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    framework: InFramework = "torch",
    machine_code: Annotated[
        bool,
        typer.Option(
            "--machine-code",
            help="jax: compile the Pallas kernels too; needs jax-cuda13-plugin, not a GPU.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compile the op's kernels for a chip, without having it, and show what they need.

    torch: Triton's machine code: registers, spilled bytes, bytes of shared memory, tensor-core
    instructions, occupancy of a processor's warps. jax, and the target tpu: whether the Pallas
    kernels lower; with --machine-code what torch has, backward with the forward kernels before
    it. All: the least time the roofline allows.
    """
    found, device = registry.get(op), devices.target(target)
    side: Framework = "jax" if device.platform == "tpu" else _framework(framework)
    cases = {row.id: row for row in found.spec.CASES}
    if case is not None and case not in cases:
        raise unknown_name(f"case of {op}", case, cases)
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    binding = _binding(found, side)
    if side == "torch" and "triton" in binding.implementations:
        importlib.import_module("triton")
    chosen = [cases[case]] if case else [row for row in cases.values() if row.size == "large"]
    describe = _compiled if side == "torch" else _assembled if machine_code else _lowered
    rows = [row for case_ in chosen for row in describe(found, case_, dtype, device)]
    data = {"op": op, "target": target, "framework": side, "kernels": rows}

    def table(case_id: str) -> Any:
        own = [row for row in rows if row["case"] == case_id]
        columns = list(dict.fromkeys(k for row in own for k in row if row[k] is not None))[1:]
        cells = [[row.get(name) for name in columns] for row in own]
        titles = [_SHORT.get(name, name) for name in columns]
        return _table(f"{case_id}, {dtype} on {device.name}", titles, cells)

    _show(data, as_json, lambda: [table(row.id) for row in chosen])


_SHORT = {"registers": "regs", "spilled": "spill", "tensor": "mma", "occupied": "occ"}


def _limits(op: Op, problem: Problem, device: Device) -> dict[str, Any]:
    floor = roofline.floor(op.spec, problem, device)
    return {
        "floor us": floor.microseconds and round(floor.microseconds, 3),
        "bound": floor.bound,
    }


def _compiled(op: Op, case: Any, dtype: str, device: Device) -> Iterator[dict[str, Any]]:
    """One row for each Triton kernel and direction, in the config that dispatch chooses."""
    from ml_networks.kernels.core import ahead_of_time

    def kernels_of(direction: str) -> list[Resources]:
        return ahead_of_time.inspect(op, case.problem(op.name, dtype, direction), device)

    return _kernels(op, case, dtype, device, kernels_of)


def _assembled(op: Op, case: Any, dtype: str, device: Device) -> Iterator[dict[str, Any]]:
    """One row for each Pallas kernel and direction, where dispatch chooses it."""
    from ml_networks.kernels.core import pallas_ahead_of_time

    def kernels_of(direction: str) -> list[Resources]:
        return pallas_ahead_of_time.inspect(op, case, dtype, direction, device)

    return _kernels(op, case, dtype, device, kernels_of)


def _kernels(
    op: Op,
    case: Any,
    dtype: str,
    device: Device,
    kernels_of: Callable[[str], list[Resources]],
) -> Iterator[dict[str, Any]]:
    for direction in op.spec.DIRECTIONS:
        end = _limits(op, case.problem(op.name, dtype, direction), device)
        kernels = kernels_of(direction)
        if not kernels:
            yield {"case": case.id, "direction": direction, "kernel": "(plain path)", **end}
        for kernel in kernels:
            yield {
                "case": case.id,
                "direction": direction,
                "kernel": kernel.kernel,
                "registers": kernel.registers,
                "spilled": kernel.spill_bytes,
                "shared": kernel.shared_memory_bytes,
                "tensor": kernel.tensor_core_instructions,
                "occupied": round(kernel.occupancy, 2),
                "complaints": "; ".join(kernel.complaints) or None,
                **end,
            }


def _lowered(op: Op, case: Any, dtype: str, device: Device) -> Iterator[dict[str, Any]]:
    """One row for each direction: whether the Pallas kernels lower for the chip."""
    import jax

    from ml_networks.kernels.core import pallas

    binding = op.binding("jax")
    for direction in op.spec.DIRECTIONS:
        problem = case.problem(op.name, dtype, direction)
        reasons = op.spec.not_supported_reasons(problem, "pallas", device)
        arrays = {
            name: jax.ShapeDtypeStruct(value.shape, dtype if value.dtype.kind == "f" else "int32")
            for name, value in op.reference.make_inputs(case, 0).items()
        }
        text = "" if reasons else "yes"
        if not reasons:
            call = partial(_lower_this, binding, dict(case.flags), direction != "forward")
            try:
                module = pallas.lower(call, arrays, target_name=device.target)
                text = f"yes, {len(module):,} characters of MLIR"
            except Exception as error:
                text = f"no: {str(error).strip().splitlines()[0]}"
        yield {
            "case": case.id,
            "direction": direction,
            "lowers": text or f"no: {'; '.join(reasons)}",
            **_limits(op, problem, device),
        }


def _lower_this(
    binding: Binding, flags: dict[str, Any], training: bool, inputs: Mapping[str, Any]
) -> Any:
    import jax
    import jax.numpy as jnp

    def floating(values: Mapping[str, Any]) -> dict[str, Any]:
        outputs = binding.call({**inputs, **values}, flags, "pallas")
        return {k: v for k, v in outputs.items() if jnp.issubdtype(v.dtype, jnp.floating)}

    wanted = {name: inputs[name] for name in binding.wanted(inputs)}
    if not training:
        return floating(wanted)
    outputs, pull = jax.vjp(floating, wanted)
    return outputs, pull(jax.tree.map(jnp.ones_like, outputs))


# ---------------------------------------------------------------------------------- tune, bench


@_commands.command()
def tune(
    ops: OpNames = None,
    framework: InFramework = "torch",
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16, float16; all by default.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Also tune what has a record.")] = False,
    seconds: Annotated[float, typer.Option(help="Begin nothing after so long.")] = math.inf,
    as_json: AsJson = False,
) -> None:
    """Time every config on this machine's GPU and remember the winners.

    Stop it at any time: what is finished is kept, and the next run goes on from there.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from ml_networks.kernels.core import tuner

    side = _framework(framework)
    for name in dtype or ():
        if name not in tuner.DTYPES:
            raise unknown_name("dtype to tune", name, tuner.DTYPES)
    options: dict[str, Any] = {"framework": side, "dtypes": dtype or tuner.DTYPES}
    waiting = [str(problem) for _, _, problem in tuner.problems(ops or (), **options)]
    finished: list[tuner.Tuned] = []
    device = tuner.accelerator(side)
    results = tuner.tune(device, ops or (), **options, force=force, seconds=seconds)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(waiting[0], total=len(waiting))
        try:
            for row in results:
                finished.append(row)
                now = waiting[len(finished)] if len(finished) < len(waiting) else "done"
                progress.update(bar, advance=1, description=now)
        except KeyboardInterrupt:
            raise typer.Abort from None
        finally:
            new = sum(row.record is not None for row in finished)
            progress.console.print(f"{new} new records in {records.user_folder()}")
    cells = [_tuned_row(row) for row in finished]
    titles = ("problem", "winner", "us", "plain us", "gain", "thrown out")
    _show(finished, as_json, lambda: [_table("tuned", titles, cells)])


def _tuned_row(row: Any) -> tuple[Any, ...]:
    record = row.record
    if record is None:
        return (row.problem, row.note, None, None, None, len(row.rejected))
    config = " ".join(f"{k}={v}" for k, v in record.config or ())
    gain = record.plain.p50 / record.winner.p50
    winner = f"{record.implementation} {config}".strip()
    times = f"{record.winner.p50:.1f}", f"{record.plain.p50:.1f}", f"{gain:.2f}x"
    return (row.problem, winner, *times, len(row.rejected))


@_commands.command()
def bench(
    ops: OpNames = None,
    out: Annotated[Path, typer.Option(help="Where the JSON and the picture go.")] = Path(
        "runs/benchmarks"
    ),
    framework: Annotated[str | None, typer.Option(help="torch or jax; both by default.")] = None,
    seconds: Annotated[float, typer.Option(help="Begin nothing after so long.")] = math.inf,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what OUT has.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time the ops against what one would use instead, as ``pytest benchmarks`` does."""
    names = [registry.get(name).name for name in ops or registry.ops()]
    report = _benchmarks()
    sides = [_framework(framework)] if framework else [f for f in FRAMEWORKS if _version(f)]
    rows = report.run(names, out, frameworks=sides, seconds=seconds, resume=resume)
    _show(rows, as_json, lambda: report.tables(rows))


def _benchmarks() -> Any:
    """The benchmarks are part of the repository, not of the package, as they need the rivals."""
    root = Path(registry.__file__).resolve().parents[2]
    if not (root / "benchmarks" / "report.py").is_file():
        raise BadInput("bench runs from a clone of the repository, and this is an installed wheel")
    sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.report")


# --------------------------------------------------------------------------------------- cache


def _files() -> list[Path]:
    return sorted(records.user_folder().glob("*/*.json"))


@_cache.command("show")
def cache_show(as_json: AsJson = False) -> None:
    """Every record in this user's cache."""
    rows = [
        (path.parent.name, path.stem, record)
        for path in _files()
        for record in records.read(path, path.parent.name, path.stem)
    ]
    data = [{"device": device, "op": op, "record": record} for device, op, record in rows]
    cells = [
        (
            device,
            op,
            f"{r.framework} {r.direction} {r.dtype} "
            + " ".join(f"{name}={value}" for name, value in (*r.dims, *r.flags)),
            r.implementation,
            f"{r.winner.p50:.1f}",
            f"{r.plain.p50 / r.winner.p50:.2f}x",
            r.date,
        )
        for device, op, r in rows
    ]
    columns = ("device", "op", "problem", "winner", "us", "gain", "date")
    _show(data, as_json, lambda: [_table(str(records.user_folder()), columns, cells)])


@_cache.command("clear")
def cache_clear(
    ops: OpNames = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete this user's tuning records; those that came with the package stay."""
    names = {registry.get(name).name for name in ops or ()}
    doomed = [path for path in _files() if not names or path.stem in names]
    if doomed and not yes:
        typer.confirm(f"Delete {len(doomed)} files in {records.user_folder()}?", abort=True)
    try:
        for path in doomed:
            path.unlink()
    except OSError as error:
        raise BadInput(f"{error.filename} cannot be deleted: {error.strerror}") from error
    records.forget()
    removed = [str(path) for path in doomed]
    _show({"deleted": removed}, as_json, lambda: [f"deleted {len(removed)} files"])


if __name__ == "__main__":
    app()
