"""The benchmark program itself, on the toy op: what it times, checks, writes and draws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, peers, report
from ml_networks.kernels.core import device, measure, registry
from ml_networks.kernels.core.errors import KernelError

torch = pytest.importorskip("torch", reason="torch is not installed")

TOY = registry.register("tests.kernels.toy_op")
SMALL = TOY.spec.CASES[0]
ROOT = Path(__file__).parent.parent
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def once(
    functions: Mapping[str, Any], clock: object, **limits: float
) -> dict[str, measure.Timing]:
    """Run each function; the first takes 100 us, each next half as long."""
    for function in functions.values():
        function()
    times = [100.0 / 2**i for i in range(len(functions))]
    return {k: measure.Timing(t, t, t) for k, t in zip(functions, times, strict=True)}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "compare", once)


@pytest.mark.usefixtures("quick")
def test_figures_say_how_they_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pytest", "benchmarks"])
    rows = report.run([TOY.name], tmp_path, frameworks=["torch"], sizes=["small"])
    assert {row.mode for row in rows} == {"forward", "forward+backward"}
    first = rows[0]
    assert (first.op, first.case, first.dtype) == (TOY.name, "small", "float32")
    assert (first.contender, first.speedup) == ("torch (eager)", 1.0)
    (figure,) = json.loads((tmp_path / "results.json").read_text())["figures"]
    assert set(figure["setup"]) == {
        "device",
        "target",
        "peaks_from",
        "versions",
        "command",
        "date",
    }
    assert figure["setup"]["versions"]["torch"] == measure.versions("torch")["torch"]
    assert figure["setup"]["command"] == "python -m pytest benchmarks"
    assert report.read(tmp_path / "results.json")[0].rows == rows
    assert "small" in render(rows)


def render(rows: list[report.Row]) -> str:
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as capture:
        for table in report.tables(rows):
            console.print(table)
    return capture.get()


@pytest.mark.usefixtures("quick")
def test_another_run_replaces_figures_and_resume_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"frameworks": ["torch"], "sizes": ["small"]}
    rows = report.run([TOY.name], tmp_path, **options)
    assert len(report.run([TOY.name], tmp_path, **options)) == len(rows)
    monkeypatch.setattr(report, "measure_case", lambda *_: pytest.fail("measured again"))
    assert report.run([TOY.name], tmp_path, **options, resume=True) == rows
    versions = {"torch": "another"}
    monkeypatch.setattr(measure, "versions", lambda framework: versions)
    monkeypatch.setattr(report, "measure_case", lambda *_: [])
    assert report.run([TOY.name], tmp_path, **options, resume=True) == []


def test_an_op_that_is_wrong_gets_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.kernels.toy_op import torch_op

    right = torch_op.toy_square
    monkeypatch.setattr(torch_op, "toy_square", lambda x, **flags: right(x, **flags) * 1.01)
    with pytest.raises(report.NotConformingError, match=r"no figures for toy_square.*error"):
        report.run([TOY.name], tmp_path, frameworks=["torch"], sizes=["small"])
    assert report.read(tmp_path / "results.json") == []
    assert issubclass(report.NotConformingError, KernelError)


@no_gpu
@pytest.mark.usefixtures("quick")
def test_a_case_that_is_too_slow_for_a_cpu_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "SLOWEST_CPU_CASE", 0.0)
    assert not report.measure_case(TOY, "torch", SMALL, "float32", "forward", device.cpu())


def test_on_an_accelerator_everything_is_planned_on_a_cpu_little() -> None:
    full = list(report.plan(TOY, device.target("sm_90")))
    assert len(full) == len(TOY.spec.CASES) * 2 * 2
    assert full[0] == (TOY.spec.CASES[2], "float32", "forward+backward")
    brief = {(case.id, dtype) for case, dtype, _ in report.plan(TOY, device.cpu())}
    assert brief == {("small", "float32"), ("large", "float32")}


def test_the_floor_of_a_pass_counts_every_direction_it_runs() -> None:
    h100 = device.target("sm_90")
    forward = report.floor_of(measure.Workload(TOY, SMALL, "torch", "float32", False), h100)
    assert forward == pytest.approx(8 * 64 / 3.352e12 * 1e6)


def test_a_rival_with_other_numbers_is_no_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    load = measure.Workload(TOY, SMALL, "torch", "float32", False)
    peer = peers.Peer(TOY.name, "torch", lambda *_: lambda i: {"y": 2.0 * i["x"] ** 2}, True)
    wrong = replace(peer, build=lambda *_: lambda inputs: {"y": inputs["x"]})
    absent = replace(peer, package="no-such-package")
    monkeypatch.setattr(report, "PEERS", (peer,))
    assert list(report.contenders(load, device.cpu()))[-1] == peer.name
    monkeypatch.setattr(report, "PEERS", (wrong, absent))
    assert peer.name not in report.contenders(load, device.cpu())


def test_a_contender_that_fails_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> None:
        raise RuntimeError("out of memory")

    def contenders(load: measure.Workload, device: object) -> dict[str, measure.Function]:
        return {"torch (eager)": load.function("torch"), "rival": fails}

    monkeypatch.setattr(report, "contenders", contenders)
    monkeypatch.setattr(measure, "compare", once)
    with pytest.warns(UserWarning, match="rival fails: out of memory"):
        rows = report.measure_case(TOY, "torch", SMALL, "float32", "forward", device.cpu())
    assert [row.contender for row in rows] == ["torch (eager)"]


def test_the_picture_shows_large_cases(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    row = report.Row(
        TOY.name, "large", "float32", "forward", "torch", "triton", 1.0, 1.1, 1.2, 5.0, 0.6
    )
    rows = [row, replace(row, contender="torch (eager)", p50=5.5, roofline=None)]
    figure = report.Figure(TOY.name, "torch", report.setup(device.cpu(), "torch"), rows)
    report.picture(tmp_path / "toy.png", [figure])
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    figure.rows[:] = [replace(row, case="small")]
    report.picture(tmp_path / "none.png", [figure])
    assert not (tmp_path / "none.png").exists()


PUBLISHED = {peer.op: peer for peer in peers.PEERS}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", ["square", "alpha_2", "log", "batch", "average", "patched"])
def test_the_published_loss_gives_the_same_numbers(case: str, training: bool) -> None:
    if not PUBLISHED["focal_frequency_loss"].installed:
        pytest.skip("focal-frequency-loss is not installed")
    cases = {row.id: row for row in registry.get("focal_frequency_loss").spec.CASES}
    patched = replace(cases["square"], id="patched", flags={"patch_factor": 2})
    chosen = {**cases, "patched": patched}[case]
    load = measure.Workload(
        registry.get("focal_frequency_loss"), chosen, "torch", "float32", training
    )
    call = PUBLISHED["focal_frequency_loss"].build(chosen, "cpu")
    assert call is not None
    assert all(error < 1e-5 for error in load.errors(load.run(call)).values())


def test_what_the_published_loss_does_not_do_is_not_compared() -> None:
    cases = {row.id: row for row in registry.get("focal_frequency_loss").spec.CASES}
    for case in ("given", "each"):
        assert PUBLISHED["focal_frequency_loss"].build(cases[case], "cpu") is None


@pytest.mark.parametrize("training", [False, True])
def test_the_published_lora_gives_the_same_numbers(training: bool) -> None:
    peer = PUBLISHED["lora_linear"]
    op = registry.get("lora_linear")
    cases = {row.id: row for row in op.spec.CASES}
    assert peer.build(cases["per-sample-odd"], "cpu") is None
    if not peer.installed:
        pytest.skip("loralib is not installed")
    call = peer.build(cases["shared"], "cpu")
    assert call is not None
    load = measure.Workload(op, cases["shared"], "torch", "float32", training)
    assert all(error < 1e-5 for error in load.errors(load.run(call)).values())


def test_the_published_quantizer_gives_the_same_codes() -> None:
    peer = PUBLISHED["binary_spherical_quantize"]
    if not peer.installed:
        pytest.skip("vector-quantize-pytorch is not installed")
    op = registry.get("binary_spherical_quantize")
    cases = {bool(row.flags["entropy_bits"]): row for row in op.spec.CASES if row.size == "small"}
    assert peer.build(cases[True], "cpu") is None
    call = peer.build(cases[False], "cpu")
    assert call is not None
    load = measure.Workload(op, cases[False], "torch", "float32", training=False)
    nonzero = (load.inputs["features"] != 0).all(-1)
    theirs, ours = load.run(call), load.run("torch")
    assert nonzero.sum() > 10
    for name in ("quantized", "indices"):
        torch.testing.assert_close(theirs[name][nonzero], ours[name][nonzero])


@pytest.mark.parametrize("training", [False, True])
def test_attention_with_all_scores_gives_the_same_numbers(training: bool) -> None:
    op = registry.get("attention")
    case = next(case for case in op.spec.CASES if case.size == "small")
    (peer,) = (peer for peer in peers.PEERS if peer.part == "einsum")
    load = measure.Workload(op, case, "torch", "float32", training)
    call = peer.build(case, "cpu")
    assert call is not None
    assert all(error < 1e-5 for error in load.errors(load.run(call)).values())
    assert peer.name.startswith("torch ")
    masked = next(case for case in op.spec.CASES if case.flags.get("mask"))
    attention_peers = [peer for peer in peers.PEERS if peer.op == "attention"]
    assert all(peer.build(masked, "cuda") is None for peer in attention_peers)


def test_a_rival_that_does_not_take_a_case_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(inputs: Any) -> Any:
        raise RuntimeError("no kernel")

    load = measure.Workload(TOY, SMALL, "torch", "float32", False)
    monkeypatch.setattr(
        report, "PEERS", (peers.Peer(TOY.name, "torch", lambda *_: refuses, True),)
    )
    with pytest.warns(UserWarning, match="does not take small: no kernel"):
        names = list(report.contenders(load, device.cpu()))
    assert not any(name.startswith("torch 2") for name in names)


# ------------------------------------------------------------------------------ benchmarks.gpu


@no_gpu
def test_without_a_gpu_it_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "no GPU here" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert gpu.main(["--out", str(tmp_path / "file"), "--device", "cpu"]) == 2
    assert "cannot be written" in capsys.readouterr().err


SCRIPT = """
import sys, time
print("begun", flush=True)
{}
"""


def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Steps run ``code`` instead."""
    program = tmp_path / "program.py"
    program.write_text(SCRIPT.format(code))
    real = subprocess.Popen

    def begin(command: list[str], **options: Any) -> Any:
        return real([sys.executable, str(program), *command[3:]], **options)

    monkeypatch.setattr(subprocess, "Popen", begin)


def summary(out: Path) -> dict[str, dict[str, Any]]:
    return {row["step"]: row for row in json.loads((out / "summary.json").read_text())}


def test_a_step_that_fails_does_not_stop_the_others_and_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    stand_in(monkeypatch, tmp_path, "sys.exit('torch' in ' '.join(sys.argv))")
    assert gpu.main(["--out", str(out), "--device", "cpu"]) == 1
    states = {name: row["state"] for name, row in summary(out).items()}
    assert states == {
        "conformance": "ok",
        "tune torch": "failed",
        "bench torch": "failed",
        "tune jax": "ok",
        "bench jax": "ok",
        "ctm torch": "failed",
    }
    assert "tune torch    failed" in capsys.readouterr().out
    with tarfile.open(out / "report.tar.gz") as archive:
        assert "logs/tune-torch.log" in archive.getnames()
    assert not (out / "logs").exists()

    stand_in(monkeypatch, tmp_path, "assert 'torch' in ' '.join(sys.argv)")
    assert gpu.main(["--out", str(out), "--device", "cpu"]) == 0
    assert {row["state"] for row in summary(out).values()} == {"ok"}


def _runs(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_step_that_hangs_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    marker = tmp_path / "child.pid"
    stand_in(
        monkeypatch,
        tmp_path,
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(marker)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)",
    )
    monkeypatch.setattr(gpu, "STEPS", (gpu.Step("conformance", 0.5), gpu.Step("tune jax", 1.0)))
    assert gpu.main(["--out", str(out), "--device", "cpu", "--seconds", "7"]) == 1
    ended = summary(out)
    assert (ended["conformance"]["state"], ended["conformance"]["detail"]) == (
        "out of time",
        "begun",
    )
    assert ended["tune jax"]["state"] == "not begun"
    # The kernel may take a moment to carry out the SIGKILL that was sent.
    deadline = time.monotonic() + 30
    while _runs(marker.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_environment_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    on_gpu = gpu._environment(tmp_path, smoke=False)
    assert "TRITON_INTERPRET" not in on_gpu
    assert on_gpu["ML_NETWORKS_CACHE"] == str(tmp_path)
    assert gpu._environment(tmp_path, smoke=True)["ML_NETWORKS_PALLAS_INTERPRET"] == "1"


@no_gpu
def test_tuning_runs_on_the_toy_op_in_the_interpreter(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "ML_NETWORKS_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    ended = subprocess.run(
        [*command, "--step", "tune torch", "--device", "cpu"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1].startswith("2 new records, 0 failures")
    assert len(list((tmp_path / "tuned").glob("*/toy_square.json"))) == 1


@pytest.mark.usefixtures("quick")
def test_the_bench_step_prints_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.bench("torch", tmp_path, 60.0, smoke=True) == 0
    told = capsys.readouterr().out
    assert "forward+backward" in told
    assert told.splitlines()[-1].endswith("rows")


@no_gpu
def test_two_checkouts_race_in_one_process() -> None:
    """In a process of its own: a second copy of the library registers the ops anew."""
    name = "ConditionalUnet1d, hypernetworks"

    def run(other: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.checkouts", str(other)]
        options = ["--only", f"^{name}$", "--seconds", "0.1"]
        return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)

    found = run(ROOT)
    assert not found.returncode, found.stderr
    cells = [cell.strip() for cell in found.stdout.splitlines()[-1].split("|")[1:-1]]
    assert cells[0] == name
    assert all(float(cell.removesuffix(" us")) > 0 for cell in cells[1:3])
    assert all(0.2 < float(cell.split()[0]) < 5 for cell in cells[3:])
    assert "ImportError: no ml_networks in" in run(ROOT / "docs").stderr
