"""``make gpu``: everything that needs a GPU, in one command that installs nothing.

    python -m benchmarks.gpu --out DIR [--seconds 540]

Runs the conformance suite on the device, tunes, and benchmarks, each in its own process and its
share of the time. A step that fails or runs out of time does not stop the others; a second run
with the same DIR goes on where the first ended. What comes out:

    DIR/tuned/<device>/<op>.json    to be copied to kernels/tuned/
    DIR/benchmarks/results.json     and a picture of each op
    DIR/benchmarks/ctm-gpu-*.json   the Continuous Thought Machine, in a CUDA graph and not
    DIR/summary.json                what ran and how it ended
    DIR/report.tar.gz               all of it, with the logs

``--device cpu`` runs the same steps on a toy op in the interpreters: a check of this program.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

ROOT = Path(__file__).resolve().parent.parent
TOY = "tests.kernels.toy_op"
State = Literal["ok", "failed", "out of time", "not begun"]


@dataclass(frozen=True)
class Step:
    """A part of the run; ``share`` is how much of the time that is left it may take."""

    name: str
    share: float

    @property
    def words(self) -> list[str]:
        return self.name.split()


STEPS = (
    Step("conformance", 0.4),
    Step("tune torch", 0.35),
    Step("bench torch", 0.55),
    Step("tune jax", 0.5),
    Step("bench jax", 0.8),
    Step("ctm torch", 1.0),
)


@dataclass(frozen=True)
class Ended:
    """How a step ended. ``detail`` is the last line it printed."""

    step: str
    state: State
    seconds: float
    detail: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; 0 if all are well, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder for what comes out")
    parser.add_argument("--seconds", type=float, default=540.0, help="for all of it (540)")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--again", action="store_true", help="also repeat steps that were ok")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    smoke = chosen.device == "cpu"
    if chosen.step:
        kind, _, framework = chosen.step.partition(" ")
        steps = {"conformance": conformance, "tune": tune, "bench": bench, "ctm": ctm}
        return steps[kind](framework, chosen.out, chosen.seconds, smoke)
    if not smoke and (missing := _no_gpu()):
        print(f"benchmarks.gpu: {missing}; --device cpu checks this program", file=sys.stderr)
        return 2
    try:
        (chosen.out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"benchmarks.gpu: {chosen.out} cannot be written: {error}", file=sys.stderr)
        return 2
    return _all(chosen.out.resolve(), chosen.seconds, smoke, chosen.again)


def _no_gpu() -> str:
    """Why there is nothing to do, or ''."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return "" if torch.cuda.is_available() else "no GPU here: torch finds none"


def _all(out: Path, seconds: float, smoke: bool, again: bool) -> int:
    start = time.monotonic()
    summary = out / "summary.json"
    before = {} if again else _read(summary)
    ended: dict[str, Ended] = {}
    for step in STEPS:
        left = seconds - (time.monotonic() - start)
        known = before.get(step.name)
        if known is not None and known.state == "ok":
            ended[step.name] = known
        elif left < 5:
            ended[step.name] = Ended(step.name, "not begun", 0.0, "no time was left")
        else:
            print(f"== {step.name}", flush=True)
            ended[step.name] = _run(step, out, left * step.share, smoke)
            print(f"   {ended[step.name].detail}", flush=True)
        rows = [asdict(row) for row in ended.values()]
        summary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    _pack(out)
    _print(list(ended.values()), out)
    return int(any(row.state != "ok" for row in ended.values()))


def _read(summary: Path) -> dict[str, Ended]:
    try:
        rows = [Ended(**row) for row in json.loads(summary.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return {}
    return {row.step: row for row in rows}


def _run(step: Step, out: Path, seconds: float, smoke: bool) -> Ended:
    """One step in a process of its own, stopped when its time is over."""
    log = out / "logs" / f"{step.name.replace(' ', '-')}.log"
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), "--step", step.name]
    command += ["--seconds", str(0.8 * seconds), "--device", "cpu" if smoke else "gpu"]
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        # A session of its own, so that the workers of a step end with it.
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(out, smoke),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(timeout=seconds)
            state: State = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            _end(child)
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    detail = lines[-1].strip("= ") if lines else ""
    if state == "failed":
        print("\n".join(lines[-30:]), flush=True)
    return Ended(step.name, state, round(time.monotonic() - start, 1), detail[:200])


def _end(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _environment(out: Path, smoke: bool) -> dict[str, str]:
    interpret = ("TRITON_INTERPRET", "ML_NETWORKS_PALLAS_INTERPRET")
    kept = {k: v for k, v in os.environ.items() if k not in (*interpret, "ML_NETWORKS_CACHE")}
    # Records are written to OUT/tuned; JAX leaves memory to torch.
    added = {"ML_NETWORKS_CACHE": str(out), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return {**kept, **added, **(dict.fromkeys(interpret, "1") if smoke else {})}


def conformance(framework: str, out: Path, seconds: float, smoke: bool) -> int:
    """The tests of the kernels, on the device; compiling for other chips is CI's."""
    import pytest

    arguments = ["tests/kernels", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    arguments.append(f"--junitxml={out / 'logs' / 'conformance.xml'}")
    if smoke:
        arguments += ["-k", "test_conforms and toy_square and small and float32"]
    else:
        arguments.append("--ignore=tests/kernels/test_ahead_of_time.py")
    if not smoke and importlib.util.find_spec("xdist"):
        arguments += ["-n", str(min(8, os.cpu_count() or 1))]
    return int(pytest.main(arguments))


def tune(framework: str, out: Path, seconds: float, smoke: bool) -> int:
    """Records for every case, the largest first, as far as the time goes."""
    from ml_networks.kernels.core import dispatch, registry, tuner

    side = cast("registry.Framework", framework)
    options: dict[str, Any] = {"framework": side}
    names: tuple[str, ...] = ()
    if smoke:
        names = (registry.register(TOY).name,)
        options |= {"sizes": ("small",), "dtypes": ("float32",)}
    device = dispatch.current_device(side) if smoke else tuner.accelerator(side)
    recorded = failed = 0
    for row in tuner.tune(device, names, seconds=seconds, **options):
        if row.record is None:
            print(f"{row.problem}: {row.note}", flush=True)
            failed += "fails" in row.note
        else:
            recorded += 1
            gain = row.record.plain.p50 / row.record.winner.p50
            chosen = f"{row.record.implementation} {dict(row.record.config or ())}"
            print(f"{row.problem}: {chosen} {gain:.2f}x plain", flush=True)
        for candidate, why in row.rejected:
            print(f"    without {candidate}: {why}", flush=True)
    total = len(tuner.problems(names, **options))
    print(f"{recorded} new records, {failed} failures, {total} problems in all")
    return int(failed > 0)


def bench(framework: str, out: Path, seconds: float, smoke: bool) -> int:
    """Figures of every op."""
    from rich.console import Console

    from benchmarks import report
    from ml_networks.kernels.core import registry

    names = [registry.register(TOY).name] if smoke else list(registry.ops())
    rows = report.run(
        names,
        out / "benchmarks",
        frameworks=[framework],  # type: ignore[list-item]
        seconds=seconds,
        sizes=("small",) if smoke else ("small", "ragged", "large"),
        resume=True,
    )
    console = Console(width=140)
    for table in report.tables(rows):
        console.print(table)
    print(f"{len(rows)} rows")
    return int(not rows)


def ctm(framework: str, out: Path, seconds: float, smoke: bool) -> int:
    """The Continuous Thought Machine's loop, in a CUDA graph and not; skipped without a GPU."""
    import pytest

    arguments = ["benchmarks/test_ctm_speed.py", "-q", "-p", "no:cacheprovider", "-k", "graph"]
    return int(pytest.main([*arguments, f"--benchmark-out={out / 'benchmarks'}"]))


def _pack(out: Path) -> None:
    """Everything in one file, and the logs only there."""
    target = out / "report.tar.gz"
    with tarfile.open(target, "w:gz") as archive:
        for path in sorted(out.rglob("*")):
            if path.is_file() and path != target:
                archive.add(path, path.relative_to(out))
    shutil.rmtree(out / "logs")


def _print(ended: Sequence[Ended], out: Path) -> None:
    """The summary: the steps, and what the largest cases came to."""
    print()
    for row in ended:
        print(f"{row.step:<14}{row.state:<13}{row.seconds:>7.1f} s  {row.detail}")
    results = out / "benchmarks" / "results.json"
    if results.is_file():
        from benchmarks import report

        shown = [row for figure in report.read(results) for row in figure.rows]
        for group in report.grouped(shown):
            ours = next((row for row in group if row.contender == "auto"), None)
            if ours is None or ours.mode == "forward" or ours.dtype != "float32":
                continue
            told = [f"{ours.p50:.1f} us"]
            told += [
                f"{row.p50 / ours.p50:.2f}x {row.contender}" for row in group if row is not ours
            ]
            if ours.roofline is not None:
                told.append(f"{ours.roofline:.0%} of the roofline")
            print(f"{ours.op} {ours.case} {ours.framework}: {', '.join(told)}")
    print(f"{sum(path.is_file() for path in out.rglob('*'))} files in {out}")


if __name__ == "__main__":
    sys.exit(main())
