"""The command: what it answers, and how it answers bad input."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ml_networks import cli
from ml_networks.kernels.core import (
    device,
    dispatch,
    pallas_ahead_of_time,
    records,
    registry,
    tuner,
)
from ml_networks.kernels.core.records import Record, Timing

torch = pytest.importorskip("torch", reason="torch is not installed")

TOY = registry.register("tests.kernels.toy_op")
SHAPE = ("--shape", "elements=4096")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ML_NETWORKS_CACHE", str(tmp_path))
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    records.forget()
    return tmp_path


def run(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ml-networks", *words])
        with pytest.raises(SystemExit) as ended:
            cli.app()
    return int(ended.value.code or 0)


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Any:
    """The JSON document of a command that succeeds."""

    def ask(*words: str) -> Any:
        assert run(*words, "--json") == 0
        out, err = capsys.readouterr()
        assert err == ""
        return json.loads(out)

    return ask


def a_record(**more: Any) -> Record:
    facts: dict[str, Any] = {
        "framework": "torch",
        "direction": "forward",
        "dtype": "float32",
        "dims": (("elements", 4096),),
        "flags": (("scale", 1.0),),
        "implementation": "triton",
        "config": (("block", 256), ("num_warps", 8)),
        "winner": Timing(9.0, 10.0, 11.0),
        "plain": Timing(19.0, 20.0, 21.0),
        "versions": (("torch", "2.13.0"),),
        "kernel_hash": records.kernel_hash(TOY, "torch"),
        "date": "2026-11-22",
    }
    return Record(**{**facts, **more})


# ----------------------------------------------------------------------------- what it answers


def test_info_names_versions_devices_caches_and_records(answer: Any, cache: Path) -> None:
    records.save(device.target("sm_90"), TOY.name, [a_record()])
    facts = answer("info")
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["devices"]["torch"]["platform"] in ("cpu", "cuda", "hip")
    assert facts["caches"]["tuning records"] == str(cache / "tuned")
    ops = {row["op"]: row for row in facts["ops"]}
    assert set(ops) == set(registry.ops())
    assert ops["toy_square"]["own records"] == {"nvidia-h100-80gb-hbm3": 1}
    assert ops["toy_square"]["frameworks"] == ["torch", "jax"]


def test_explain_gives_the_decision_and_the_floor(answer: Any) -> None:
    told = answer("explain", TOY.name, *SHAPE, "--target", "sm_90", "--flag", "scale=1.0")
    assert told["problem"]["dims"] == [["elements", 4096]]
    assert told["problem"]["flags"] == [["scale", 1.0]]
    assert told["device"]["name"] == "NVIDIA H100 80GB HBM3"
    decision = told["decision"]
    assert (decision["implementation"], decision["source"]) == ("triton", "heuristic")
    assert decision["config"] == {"block": 128, "num_warps": 4}
    assert told["floor"]["bound"] == "memory"
    assert told["floor"]["bytes_moved"] == 8 * 4096


def test_explain_uses_tuning_records(answer: Any) -> None:
    records.save(device.target("sm_90"), TOY.name, [a_record()])
    told = answer("explain", TOY.name, *SHAPE, "--target", "sm_90", "--flag", "scale=1.0")
    assert told["decision"]["source"] == "user cache"
    assert told["decision"]["config"] == {"block": 256, "num_warps": 8}


def test_explain_takes_dtype_direction_and_framework(answer: Any) -> None:
    pytest.importorskip("jax", reason="jax is not installed")
    words = ("--dtype", "bfloat16", "--direction", "backward", "--framework", "jax")
    told = answer("explain", TOY.name, *SHAPE, *words, "--target", "sm_80")
    assert (told["problem"]["dtype"], told["problem"]["direction"]) == ("bfloat16", "backward")
    assert told["decision"]["implementation"] == "pallas"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_explain_prints_why_not_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", TOY.name, *SHAPE) == 0
    text = capsys.readouterr().out
    assert "on a CPU the plain path is the fastest" in text
    assert "unknown (32,768 bytes, 8,192 FLOP)" in text


inspects = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@inspects
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_inspect_compiles_without_a_gpu(
    target: str, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    told = answer("inspect", TOY.name, "--target", target, "--case", "large")
    forward, backward = told["kernels"]
    assert forward["kernel"] == "forward_kernel"
    assert backward["kernel"] == "backward_kernel"
    for row in told["kernels"]:
        assert row["registers"] > 0
        assert row["spilled"] == 0
        assert 0 < row["occupied"] <= 1
        assert row["floor us"] > 1
        assert row["complaints"] is None


@inspects
def test_inspect_prints_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run("inspect", TOY.name, "--case", "small") == 0
    text = capsys.readouterr().out
    assert "small, float32 on NVIDIA H100" in text
    assert "(plain path)" in text  # too small for a kernel, says its heuristic


@pytest.mark.parametrize("words", [("--target", "tpu"), ("--framework", "jax")])
def test_inspect_lowers_pallas_kernels(words: tuple[str, str], answer: Any) -> None:
    pytest.importorskip("jax", reason="jax is not installed")
    told = answer("inspect", TOY.name, "--case", "odd", *words)
    assert told["framework"] == "jax"
    assert [row["lowers"][:4] for row in told["kernels"]] == ["yes,", "yes,"]


@pytest.mark.skipif(
    pallas_ahead_of_time.missing() is not None,
    reason=f"not installed: {pallas_ahead_of_time.missing()}",
)
def test_inspect_compiles_pallas_kernels(answer: Any) -> None:
    words = ("--framework", "jax", "--machine-code", "--case", "mlp-256")
    told = answer("inspect", "norm_activation", *words)
    plain, backward = told["kernels"]
    assert plain["kernel"] == "(plain path)"  # XLA's forward pass is one kernel too
    assert backward["kernel"] == "norm_activation_backward"
    assert backward["registers"] > 0
    assert 0 < backward["occupied"] <= 1
    assert backward["complaints"] is None


def test_machine_code_of_pallas_kernels_asks_for_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pallas_ahead_of_time, "missing", lambda: "jax-cuda13-plugin")
    assert run("inspect", TOY.name, "--framework", "jax", "--machine-code") == 2
    assert "needs the package jax-cuda13-plugin" in capsys.readouterr().err


def test_cache_show_and_clear(answer: Any, cache: Path) -> None:
    assert answer("cache", "show") == []
    for target in ("sm_80", "sm_90"):
        records.save(device.target(target), TOY.name, [a_record()])
    (cache / "tuned" / "nvidia-h100-80gb-hbm3" / "other.json").write_text("{}")
    (cache / "tuned" / "notes.txt").write_text("mine")
    with pytest.warns(records.TuningRecordWarning, match="other.json"):
        shown = answer("cache", "show")
    assert len(shown) == 2
    assert shown[0]["record"]["implementation"] == "triton"
    assert len(answer("cache", "clear", TOY.name, "--yes")["deleted"]) == 2
    assert len(answer("cache", "clear", "--yes")["deleted"]) == 1
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["notes.txt"]


def test_cache_clear_asks_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    records.save(device.target("sm_90"), TOY.name, [a_record()])
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert run("cache", "clear") == 130
    assert "stopped" in capsys.readouterr().err
    assert list(cache.rglob("*.json"))


def tuned(where: Any, names: Any, **options: Any) -> Any:
    problem = TOY.spec.CASES[0].problem(TOY.name)
    yield tuner.Tuned(problem, a_record())
    yield tuner.Tuned(problem, None, note="has a record")


def test_tune_prints_what_came_of_it(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "accelerator", lambda framework: device.target("sm_90"))
    monkeypatch.setattr(tuner, "tune", tuned)
    monkeypatch.setattr(sys.stderr, "write", lambda text: len(text))
    first, second = answer("tune", TOY.name)
    assert first["record"]["implementation"] == "triton"
    assert second["note"] == "has a record"


def test_tune_stopped_says_what_it_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*arguments: Any, **options: Any) -> Any:
        yield from tuned(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner, "accelerator", lambda framework: device.target("sm_90"))
    monkeypatch.setattr(tuner, "tune", stopped)
    assert run("tune") == 130
    error = capsys.readouterr().err
    assert "1 new records" in error
    assert error.rstrip().endswith("ml-networks: stopped")


def test_help_is_quick_and_imports_no_framework() -> None:
    code = (
        "import sys; sys.argv = ['ml-networks', '--help']\n"
        "from ml_networks.cli import app\n"
        "try: app()\n"
        "finally: print(sorted({'torch', 'jax', 'triton'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "[]"
    for command in ("info", "explain", "inspect", "tune", "bench", "cache"):
        assert command in ended.stdout


# --------------------------------------------------------------------------------- bad input

TOO_LITTLE = ("explain", "focal_frequency_loss", "--shape", "height=64")
BAD = [
    (("explain", "toy_sqare", *SHAPE), "unknown op 'toy_sqare'. Did you mean 'toy_square'?"),
    (("inspect", "toy_sqare"), "Did you mean 'toy_square'?"),
    (("tune", "toy_sqare"), "Did you mean 'toy_square'?"),
    (("bench", "toy_sqare"), "Did you mean 'toy_square'?"),
    (("cache", "clear", "toy_sqare"), "Did you mean 'toy_square'?"),
    (("explain", TOY.name, "--shape", "4096"), "--shape '4096' is not name=value"),
    (("explain", TOY.name, "--shape", "elements="), "is not name=value, as in --shape elements="),
    (("explain", TOY.name, "--shape", "elements=4k"), "elements=4k: the size is not a whole"),
    (("explain", TOY.name, "--shape", "elements=-4"), "elements=-4: the size is not a whole"),
    (("explain", TOY.name, "--shape", "element=4"), "Did you mean 'elements'?"),
    (TOO_LITTLE, "needs the dimensions batch, channels, width too"),
    (("explain", TOY.name, *SHAPE, "--flag", "scal=1"), "Did you mean 'scale'?"),
    (("explain", TOY.name, *SHAPE, "--dtype", "float23"), "Did you mean 'float32'?"),
    (("explain", TOY.name, *SHAPE, "--direction", "back"), "Did you mean 'backward'?"),
    (("explain", TOY.name, *SHAPE, "--framework", "jaxx"), "Did you mean 'jax'?"),
    (("explain", TOY.name, *SHAPE, "--target", "sm90"), "Did you mean 'sm_90'?"),
    (("explain", TOY.name, *SHAPE, "--implementation", "tritn"), "Did you mean 'triton'?"),
    (("inspect", TOY.name, "--target", "h100"), "unknown target 'h100'"),
    (("inspect", TOY.name, "--case", "larg"), "Did you mean 'large'?"),
    (("inspect", TOY.name, "--dtype", "fp16"), "unknown dtype 'fp16'"),
    (("tune", TOY.name, "--dtype", "float64"), "unknown dtype to tune 'float64'"),
    (("explain",), "Missing argument"),
    (("cache",), "Missing command"),
    (("explian",), "explian"),
    (("info", "--jsn"), "--jsn"),
    (("tune", "--seconds", "soon"), "Invalid value for '--seconds'"),
]


@pytest.mark.parametrize(("words", "text"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_answered_in_one_line(
    words: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert text in err
    assert err.count("\n") == 1
    assert err.startswith("ml-networks: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_implementation_that_cannot_run_here(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("explain", TOY.name, "--shape", f"elements={1 << 41}", "--implementation", "triton")
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "more than 2^40 elements" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tune", TOY.name) == 2
    assert capsys.readouterr().err == (
        "ml-networks: tuning needs an accelerator and torch finds none here\n"
    )


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_missing_framework_names_the_extra(
    framework: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: registry.Op, framework: str) -> registry.Binding:
        raise ModuleNotFoundError(f"No module named {framework!r}", name=f"{framework}.nn")

    monkeypatch.setattr(registry.Op, "binding", missing)
    assert run("explain", TOY.name, *SHAPE, "--framework", framework, "--target", "sm_90") == 2
    assert capsys.readouterr().err == (
        f"ml-networks: {framework} is not installed: pip install 'ml-networks[{framework}]'\n"
    )


def test_a_bug_is_not_mistaken_for_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(dispatch, "decide", broken)
    monkeypatch.setattr(sys, "argv", ["ml-networks", "explain", TOY.name, *SHAPE])
    with pytest.raises(ValueError, match="a bug"):
        cli.app()


def test_a_wheel_has_no_benchmarks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = tmp_path / "site" / "ml_networks" / "kernels" / "core" / "registry.py"
    monkeypatch.setattr(registry, "__file__", str(installed))
    assert run("bench", TOY.name) == 2
    assert "clone of the repository" in capsys.readouterr().err


def test_a_broken_tuning_file_does_not_stop_a_command(answer: Any, cache: Path) -> None:
    path = records.path_of(cache / "tuned", device.target("sm_90").key, TOY.name)
    path.parent.mkdir(parents=True)
    path.write_text('{"schema":')
    with pytest.warns(records.TuningRecordWarning, match="broken"):
        told = answer("explain", TOY.name, *SHAPE, "--target", "sm_90")
    assert told["decision"]["source"] == "heuristic"
