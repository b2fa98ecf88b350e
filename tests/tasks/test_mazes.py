from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console
from typer.testing import CliRunner, Result

from ml_networks.io import load_weights, save_weights
from ml_networks.tasks.mazes import evaluate, generate, pictures, train
from ml_networks.tasks.mazes.data import WAIT, Mazes, size_of
from ml_networks.tasks.mazes.learner import (
    Measures,
    Scores,
    best_constant,
    counted,
    measure,
    scores,
    table,
)
from ml_networks.tasks.mazes.run import (
    LAST,
    PROGRAM,
    Point,
    Run,
    fit,
    load_checkpoint,
    load_mazes,
    make_learner,
    model_weights,
    read_settings,
    save_checkpoint,
    turns,
)
from ml_networks.tasks.mazes.settings import Settings
from ml_networks.tasks.mazes.torch_learner import TorchLearner, dynamic_weights, maze_loss
from ml_networks.tasks.program import INTERRUPTED, progress_bar
from ml_networks.torch import HyperLoRALinear

Image = pytest.importorskip("PIL.Image", reason="pillow, which writes PNG, is not installed")
pytest.importorskip("matplotlib", reason="matplotlib, which draws the pictures, is not installed")

HAS_JAX = importlib.util.find_spec("flax") is not None
FRAMEWORKS = [
    "torch",
    pytest.param(
        "jax", marks=pytest.mark.skipif(not HAS_JAX, reason="jax and flax are not installed")
    ),
]
TINY = Settings(
    use_hyper=True,
    iterations=3,
    d_model=20,
    d_input=8,
    heads=2,
    n_synch_out=10,
    n_synch_action=10,
    synapse_depth=3,
    memory_length=3,
    memory_hidden_dims=2,
    hyper_rank=2,
    maze_route_length=12,
    maze_size=(7, 9),
    training_mazes=20,
    test_mazes=6,
    training_iterations=6,
    batch_size=8,
    warmup_steps=2,
    evaluate_every=2,
    save_every=3,
    lr=1e-2,
    seed=1,
)
# Programs started from here run this code, installed or not.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).parents[2]),
}


# --- the loss -------------------------------------------------------------------------------


def reference_loss(
    predictions: NDArray[Any], certainties: NDArray[Any], routes: NDArray[Any], lookahead: int
) -> float:
    """The loss as its definition reads, one maze, tick and step after the other."""
    total = 0.0
    for logits, certainty, route in zip(predictions, certainties, routes, strict=True):
        length, _, ticks = logits.shape
        longest = 0
        for tick in range(ticks):
            beginning = 0
            while beginning < length and logits[beginning, :, tick].argmax() == route[beginning]:
                beginning += 1
            longest = max(longest, beginning)
        seen = min(longest + lookahead, length)
        losses = []
        for tick in range(ticks):
            entropies = [
                np.log(np.exp(logits[step, :, tick]).sum()) - logits[step, route[step], tick]
                for step in range(seen)
            ]
            losses.append(sum(entropies) / seen)
        total += (min(losses) + losses[int(certainty[1].argmax())]) / 2
    return total / len(routes)


def drawn(seed: int, right: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Predictions for 5 mazes whose routes start with ``right`` right steps at one tick each."""
    random = np.random.default_rng(seed)
    predictions = random.normal(size=(5, 9, 5, 4))
    certainties = random.random((5, 2, 4))
    routes = random.integers(0, 5, (5, 9))
    for maze in range(5):
        for step in range(right):
            predictions[maze, step, routes[maze, step], maze % 4] += 10
    return predictions, certainties, routes


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("right", "lookahead"), [(0, 1), (0, 5), (3, 2), (6, 5), (9, 1), (4, 100)]
)
def test_loss(framework: str, right: int, lookahead: int) -> None:
    for seed in range(3):
        arrays = drawn(seed, right)
        expected = reference_loss(*arrays, lookahead)
        if framework == "torch":
            loss = maze_loss(*(torch.from_numpy(array) for array in arrays), lookahead)
            assert loss.item() == pytest.approx(expected, rel=1e-12)
        else:
            from ml_networks.tasks.mazes import jax_learner

            found = jax_learner.maze_loss(*arrays, lookahead)
            assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_gradient_of_the_loss(framework: str) -> None:
    """Against differences; certainties have no gradient, since only their order counts."""
    predictions, certainties, routes = drawn(0, 3)
    expected = np.zeros_like(predictions)
    for index in np.ndindex(predictions.shape):
        for sign in (1, -1):
            moved = predictions.copy()
            moved[index] += sign * 1e-5
            expected[index] += sign * reference_loss(moved, certainties, routes, 2) / 2e-5
    if framework == "torch":
        x = torch.from_numpy(predictions).requires_grad_()
        y = torch.from_numpy(certainties).requires_grad_()
        maze_loss(x, y, torch.from_numpy(routes), 2).backward()
        assert y.grad is None
        np.testing.assert_allclose(x.grad, expected, atol=1e-9)
    else:
        import jax

        from ml_networks.tasks.mazes import jax_learner

        found = jax.grad(jax_learner.maze_loss)(predictions, certainties, routes, 2)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_measures() -> None:
    routes = np.array([[0, 1, 4, 4], [2, 1, 1, 4], [0, 1, 1, 1]])
    answers = np.array([[0, 1, 4, 4], [2, 0, 1, 4], [0, 1, 4, 4]])
    found = measure(answers, routes)
    assert found[1:] == pytest.approx((9 / 12, 6 / 9, 1 / 3))
    mazes = Mazes(np.zeros((3, 2, 5), np.uint8), routes)
    constant = best_constant([mazes])  # 0 1 1 4, and for the route alone 0 1 1 1
    assert constant.overall[1:] == pytest.approx((9 / 12, 8 / 9, 0))
    assert [*constant.sizes] == ["2 x 5"]
    assert constant.sizes["2 x 5"][1:] == constant.overall[1:]


def test_measures_of_several_sizes() -> None:
    """Every step counts once, so a size with more or longer routes counts more."""
    small = Mazes(np.zeros((1, 5, 5), np.uint8), np.array([[0, 0, 4, 4]]))
    large = Mazes(np.zeros((3, 7, 7), np.uint8), np.array([[1, 1, 1, 4]] * 3))
    answers = [np.array([[0, 1, 4, 4]]), np.array([[1, 1, 1, 4], [1, 1, 0, 4], [0, 0, 0, 0]])]
    found = scores([small, large], answers, [2.0, 6.0])
    assert found.sizes["5 x 5"] == pytest.approx((2.0, 3 / 4, 1 / 2, 0))
    assert found.sizes["7 x 7"] == pytest.approx((6.0, 7 / 12, 5 / 9, 1 / 3))
    assert found.overall == pytest.approx((5.0, 10 / 16, 6 / 11, 1 / 4))
    constant = best_constant([small, large])  # an answer for each size
    assert constant.overall[1:] == (1, 1, 1)
    text = table(found, constant).splitlines()
    assert [line.split("  ")[0] for line in text[1:4]] == ["5 x 5", "7 x 7", "all"]
    assert re.search(r"5 x 5 +75\.0% \(100\.0%\) +50\.0% \(100\.0%\) +0\.0% \(100\.0%\)", text[1])
    one = Scores(found.sizes["5 x 5"], {"5 x 5": found.sizes["5 x 5"]})
    assert "all" not in table(one, constant).split()
    assert counted([small]) == "1 mazes of 5 x 5 pixels"
    assert counted([large, small]) == "3 mazes of 7 x 7 pixels and 1 mazes of 5 x 5 pixels"
    assert counted([large, large]) == "3 mazes of 7 x 7, 7 x 7 pixels each"


# --- training -------------------------------------------------------------------------------


class StopAfter:
    """Says stop at the n-th time of asking, which is once a step."""

    def __init__(self, n: int) -> None:
        self.n = n

    def is_set(self) -> bool:
        self.n -= 1
        return self.n == 0


@pytest.fixture(scope="module")
def mazes() -> tuple[list[Mazes], list[Mazes]]:
    return load_mazes(TINY)


def trained(run: Run, mazes: tuple[list[Mazes], list[Mazes]], out: Path, steps: int = 0) -> bool:
    with progress_bar(Console(), visible=False) as bar:
        return fit(run, *mazes, StopAfter(steps), out, lambda point: None, bar)


def fresh(settings: Settings) -> Run:
    return Run(settings, make_learner(settings, "cpu"))


def assert_same(a: Path, b: Path) -> None:
    (tensors, metadata), (others, other_metadata) = (
        load_weights(path, "numpy") for path in (a, b)
    )
    assert tensors.keys() == others.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(x, others[name], err_msg=name)
    for data in (metadata, other_metadata):
        data.pop("seconds")
        for point in data["history"]:
            point.pop("seconds")
    assert metadata == other_metadata


def test_it_learns() -> None:
    """A few mazes by heart."""
    settings = dataclasses.replace(
        TINY,
        use_hyper=False,
        maze_size=7,
        training_mazes=8,
        training_iterations=60,
        d_model=40,
        n_synch_out=30,
    )
    learner = fresh(settings).learner
    (training,) = load_mazes(settings)[0]
    before = learner.test(training)[0]
    for step in range(settings.training_iterations):
        learner.step(training, step)
    loss, answers = learner.test(training)
    assert loss < before / 3
    found, constant = measure(answers, training.routes), best_constant([training]).overall
    assert found.on_route > constant.on_route + 0.1
    assert found.per_step > constant.per_step + 0.1


def test_batches_depend_on_seed_and_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 8 from 20 mazes are an epoch, in which no maze comes twice."""
    numbered = Mazes(np.zeros((20, 3, 3), np.uint8), np.arange(20)[:, None])
    drawn = []

    def unturned(mazes: Mazes, random: np.random.Generator) -> Mazes:
        drawn.append(random.random())
        return mazes

    monkeypatch.setattr("ml_networks.tasks.mazes.run.augment", unturned)
    epochs = []
    run = fresh(TINY)
    for run.step in range(0, 6, 2):
        first = run.batch([numbered]).routes.flatten().tolist()
        run.step += 1
        epochs.append(first + run.batch([numbered]).routes.flatten().tolist())
        assert len(set(epochs[-1])) == 16
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(set(drawn)) == 6
    again = fresh(TINY)
    again.step = 4
    assert again.batch([numbered]).routes.flatten().tolist() == epochs[2][:8]
    monkeypatch.undo()
    training = load_mazes(TINY)[0][0]
    turned = [again.batch([training]).pixels for _ in range(2)]
    assert (turned[0] == turned[1]).all()
    order = [int(row) for row in epochs[2][:8]]
    assert not (turned[0] == training.pixels[order]).all()


def test_batches_of_several_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a size go through its mazes as if there were no other, in whatever order they
    are asked for."""
    monkeypatch.setattr("ml_networks.tasks.mazes.run.augment", lambda mazes, random: mazes)
    settings = dataclasses.replace(TINY, batch_size=5, training_iterations=40)
    training = [
        Mazes(np.full((n, side, side), 1, np.uint8), np.arange(n)[:, None] + 100 * side)
        for n, side in ((12, 3), (25, 5), (9, 7))
    ]
    run = fresh(settings)
    batches = [run.batch(training) for run.step in range(40)]
    sides = [batch.pixels.shape[1] for batch in batches]
    rows = [batch.routes.flatten().tolist() for batch in batches]
    for number, (side, in_epoch) in enumerate(((3, 2), (5, 5), (7, 1))):
        alone = fresh(settings)
        steps = [step for step in range(40) if sides[step] == side]
        assert len(steps) > in_epoch
        assert len({row for step in steps[:in_epoch] for row in rows[step]}) == 5 * in_epoch
        for alone.step, step in reversed(list(enumerate(steps))):
            assert alone.batch([training[number]]).routes.flatten().tolist() == rows[step]
    later = fresh(settings)
    for later.step in (33, 8):
        assert later.batch(training).routes.flatten().tolist() == rows[later.step]


def test_turns_of_the_sizes() -> None:
    """As many steps for every maze; with a curriculum, once all sizes have joined."""
    settings = dataclasses.replace(TINY, training_iterations=12_000)
    shares = np.bincount(turns([300, 100, 200], settings)) / 12_000
    assert shares == pytest.approx([1 / 2, 1 / 6, 1 / 3], abs=0.02)
    first = turns([300, 100, 200], dataclasses.replace(settings, seed=2))[:50]
    assert (first != turns([300, 100, 200], settings)[:50]).any()
    assert set(turns([7], settings)) == {0}

    growing = turns([10, 10, 10], dataclasses.replace(settings, size_curriculum=0.5))
    assert growing[0] == 0
    # The second size has joined after a quarter of the steps, the third after a half.
    assert growing[:3000].max() == 1
    assert 0.1 < (growing[:3000] == 1).mean() < 0.4
    for start, end, kinds in ((3000, 6000, 3), (6000, 12_000, 3)):
        shares = np.bincount(growing[start:end], minlength=3) / (end - start)
        assert (shares > 0.1).sum() == kinds
    assert shares == pytest.approx([1 / 3] * 3, abs=0.02)
    assert (turns([10], dataclasses.replace(settings, size_curriculum=1.0)) == 0).all()


def test_the_learning_rate_warms_up_and_falls() -> None:
    settings = dataclasses.replace(TINY, training_iterations=10, warmup_steps=4, lr=1.0)
    rates = [settings.learning_rate(step) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([(1 + np.cos(np.pi * n / 6)) / 2 for n in range(6)])


def test_resumed_is_uninterrupted(mazes: tuple[list[Mazes], list[Mazes]], tmp_path: Path) -> None:
    """Stopped between two tests, with dropout, which depends on the step; and a second time. What
    is left has mazes of both sizes."""
    settings = dataclasses.replace(TINY, dropout=0.2)
    run = fresh(settings)
    assert {run.batch(mazes[0]).pixels.shape[1] for run.step in (4, 5)} == {7, 9}
    assert trained(fresh(settings), mazes, tmp_path / "whole")
    out = tmp_path / "parts"
    assert not trained(fresh(settings), mazes, out, steps=3)
    torch.manual_seed(123)
    for steps in (1, 0):
        again = load_checkpoint(out / LAST, read_settings(out / LAST)[0], "cpu")
        assert again.step in (3, 4)
        assert trained(again, mazes, out, steps) is (steps == 0)
    assert_same(out / LAST, tmp_path / "whole" / LAST)


@pytest.mark.skipif(not HAS_JAX, reason="jax and flax are not installed")
def test_jax_resumes_and_torch_answers_the_same(
    mazes: tuple[list[Mazes], list[Mazes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run goes on after a stop, one from the checkpoint that the stop left. Both have one
    learner, which is compiled once; loading replaces all that it holds."""
    settings = dataclasses.replace(
        TINY,
        framework="jax",
        maze_size=7,
        use_hyper=False,
        synapse_depth=2,
        dropout_nlm=0.2,
        backbone_type="none",
        iterations=2,
    )
    run = fresh(settings)
    of_one_size = mazes[0][:1], mazes[1][:1]
    assert not trained(run, of_one_size, tmp_path / "a", steps=3)
    stopped = (tmp_path / "a" / LAST).read_bytes()
    assert trained(run, of_one_size, tmp_path / "a")
    assert run.history[-1].loss != run.history[0].loss

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / LAST).write_bytes(stopped)
    monkeypatch.setattr("ml_networks.tasks.mazes.run.make_learner", lambda *_: run.learner)
    again = load_checkpoint(tmp_path / "b" / LAST, settings)
    assert again.step == 3
    assert trained(again, of_one_size, tmp_path / "b")
    assert_same(tmp_path / "a" / LAST, tmp_path / "b" / LAST)

    in_torch = make_learner(dataclasses.replace(settings, framework="torch"), "cpu")
    in_torch.load_model(model_weights(tmp_path / "a" / LAST, "torch"))
    for held_out in mazes[1]:
        loss, answers = run.learner.test(held_out)
        found_loss, found = in_torch.test(held_out)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert (found == answers).all()


class Silent:
    """A learner that answers nothing, so that a run can be watched."""

    parameters = 0

    def step(self, mazes: Mazes, number: int) -> None:
        """Learn nothing."""

    def take_losses(self) -> float:
        return 0.0

    def test(self, mazes: Mazes) -> tuple[float, NDArray[np.int64]]:
        return 0.0, np.zeros_like(mazes.routes)

    def tensors(self) -> dict[str, Any]:
        return {"losses": torch.zeros(1)}


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_the_bar_says_what_takes_time(
    framework: str, mazes: tuple[list[Mazes], list[Mazes]], tmp_path: Path
) -> None:
    """JAX compiles at the first step of each size, also after a stop."""
    settings = dataclasses.replace(TINY, framework=framework, evaluate_every=4)
    run = Run(settings, Silent())  # type: ignore[arg-type]
    sizes = [size_of(run.batch(mazes[0])) for run.step in range(6)]
    assert len(set(sizes)) == 2
    run.step = 0
    with progress_bar(Console(), visible=False) as bar:
        said: list[str] = []
        update = bar.update

        def listen(task: Any, **values: Any) -> None:
            said.extend([values["description"]] if "description" in values else [])
            update(task, **values)

        bar.update = listen  # type: ignore[method-assign]
        fit(run, *mazes, StopAfter(0), tmp_path, lambda point: None, bar)
    testing = [f"testing on {size} pixels" for size in ("7 x 7", "9 x 9")]
    first = [size not in sizes[:step] for step, size in enumerate(sizes)]
    steps = [
        f"compiling for {size} pixels" if new and framework == "jax" else "training"
        for size, new in zip(sizes, first, strict=True)
    ]
    assert said == steps[:4] + testing + steps[4:] + testing


def test_dynamic_weights() -> None:
    torch.manual_seed(0)
    layer = HyperLoRALinear(6, 5, rank=3)
    torch.nn.init.normal_(layer.to_u.weight)
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        found = dynamic_weights(layer, x)
        whole = layer.update(x)
        gate = torch.sigmoid(layer.to_gate(torch.nn.functional.silu(layer.context(x))))
        strength = whole.flatten(2).norm(dim=-1) / layer.weight.norm()
    flat = whole.flatten(2)
    similarity = torch.nn.functional.cosine_similarity(flat[:, :, None], flat[:, None], dim=-1)
    np.testing.assert_allclose(found.gate, gate[..., 0], rtol=1e-5)
    np.testing.assert_allclose(found.strength, strength, rtol=1e-5)
    np.testing.assert_allclose(found.similarity, similarity, atol=1e-5)


# --- the commands ---------------------------------------------------------------------------


def command(app: Any, *arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(app: Any, *arguments: object) -> str:
    done = command(app, *arguments)
    assert done.exit_code == 2, done.stdout
    assert not done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def options(settings: Settings) -> list[str]:
    """The settings as a command line."""
    result = []
    for name, value in dataclasses.asdict(settings).items():
        if isinstance(value, bool):
            result.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            result += [f"--{name}", *map(str, value)]
        elif value not in (None, ""):
            result += [f"--{name}", str(value)]
    return result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves of a whole run, on a folder of mazes."""
    folder = tmp_path_factory.mktemp("mazes")
    sizes = ("--maze_size", 7, "--training_mazes", 9, "--test_mazes", 5, "--seed", 3)
    done = command(generate.app, folder / "data", *sizes)
    assert done.exit_code == 0, done.stderr
    assert len(list((folder / "data" / "train" / "7x7").glob("*.png"))) == 9
    arguments = (*options(TINY), "--data_root", folder / "data", "--device", "cpu")
    done = command(train.app, *arguments, "--out", folder / "run")
    assert done.exit_code == 0, done.stderr
    for pattern in (
        r"\d+ parameters; 9 mazes of 7 x 7 pixels to train on, 5 mazes of 7 x 7 pixels held out",
        r"step 2/6  loss \d\.\d{3}  held out: loss \d\.\d{3}  per step +\d+\.\d%",
        r"step 6/6",
        r"7 x 7 +\d+\.\d% \(\d+\.\d%\) +\d+\.\d% \(\d+\.\d%\) +\d+\.\d% \(\d+\.\d%\)",
        r"time +\d+ s, \d+ s of a processor",
    ):
        assert re.search(pattern, done.stdout), done.stdout
    assert {path.name for path in (folder / "run").iterdir()} == {LAST, train.CURVES}
    return folder / "run" / LAST


def test_the_documented_options(tmp_path: Path) -> None:
    """Every option of the documented commands, for a run of one tick on the smallest mazes."""
    short = "--iterations 1 --maze_size 5 7 --training_iterations 1 --batch_size 1 --test_mazes 1"
    short += " --training_mazes 2 --device cpu --maze_route_length 4"
    for documented, settings in (
        (
            "--model ctm --d_model 64 --d_input 16 --synapse_depth 4 --hyper_layers none",
            Settings(d_model=64, d_input=16, synapse_depth=4, hyper_layers="none"),
        ),
        (
            "--model ctm --use_hyper --hyper_layers all --hyper_rank 3 --d-model 64 --d-input 16"
            " --no-deep-memory --do_normalisation --dropout 0.1 --dropout_nlm 0.2 --heads 2"
            " --n_synch_out 9 --n_synch_action 8 --memory_length 4 --memory_hidden_dims 3"
            " --backbone_type resnet18-1 --positional_embedding_type learnable-fourier"
            " --neuron_select_type random-pairing --n_random_pairing_self 2",
            Settings(
                use_hyper=True,
                hyper_layers="all",
                hyper_rank=3,
                d_model=64,
                d_input=16,
                deep_memory=False,
                do_normalisation=True,
                dropout=0.1,
                dropout_nlm=0.2,
                heads=2,
                n_synch_out=9,
                n_synch_action=8,
                memory_length=4,
                memory_hidden_dims=3,
                positional_embedding_type="learnable-fourier",
                n_random_pairing_self=2,
            ),
        ),
    ):
        done = command(train.app, *documented.split(), *short.split(), "--out", tmp_path)
        assert done.exit_code == 0, done.stderr
        found = read_settings(tmp_path / LAST)[0]
        expected = dataclasses.replace(
            settings,
            iterations=1,
            maze_size=(5, 7),
            training_iterations=1,
            batch_size=1,
            test_mazes=1,
            training_mazes=2,
            maze_route_length=4,
        )
        assert found == expected


def test_evaluation_draws(checkpoint: Path, tmp_path: Path) -> None:
    done = command(evaluate.app, checkpoint, "--out", tmp_path, "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    assert "5 mazes of 7 x 7 pixels" in done.stdout
    metadata = json.loads(json.dumps(load_weights(checkpoint)[1]))
    last = Point(**metadata["history"][-1])
    assert re.search(rf"7 x 7 +{last.per_step:.1%} \(", done.stdout)
    names = {evaluate.ROUTES, evaluate.ATTENTION, evaluate.CERTAINTY, evaluate.DYNAMIC_WEIGHTS}
    assert {path.name for path in tmp_path.iterdir()} == names
    with Image.open(tmp_path / evaluate.ROUTES) as animation:
        assert animation.n_frames == TINY.iterations
    for name in names - {evaluate.ROUTES}:
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("L").getcolors() or [0] * 99) > 10, name

    larger = command(evaluate.app, checkpoint, "--maze_size", 9, "--no-pictures")
    assert "6 mazes of 9 x 9 pixels" in larger.stdout


def test_evaluation_of_several_sizes(checkpoint: Path, tmp_path: Path) -> None:
    """Of mazes that are made and of a folder with two sizes, which says the same."""
    arguments = ("--out", tmp_path / "drawn", "--device", "cpu")
    done = command(evaluate.app, checkpoint, "--maze-size", 11, 7, *arguments)
    assert done.exit_code == 0, done.stderr
    assert "6 mazes of 7 x 7, 11 x 11 pixels each" in done.stdout
    rows = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert rows[2:5] == ["7 x 7", "11 x 11", "all"]
    names = {evaluate.ROUTES, evaluate.ATTENTION, evaluate.CERTAINTY, evaluate.DYNAMIC_WEIGHTS}
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == names | {evaluate.ACCURACY}
    with Image.open(tmp_path / "drawn" / evaluate.ROUTES) as animation:
        assert animation.n_frames == TINY.iterations
        assert animation.width == 4 * 230

    seed = read_settings(checkpoint)[0].seed
    sizes = ("--maze_size=11", 7, "--training_mazes", 1, "--test_mazes", 6, "--seed", seed)
    assert command(generate.app, tmp_path / "data", *sizes).exit_code == 0
    read = command(evaluate.app, checkpoint, "--data_root", tmp_path / "data", "--no-pictures")
    of_folder, made = (result.stdout.splitlines()[1:6] for result in (read, done))
    assert of_folder == made


@pytest.mark.parametrize(
    ("image", "features"), [((11, 11), (6, 6)), ((9, 21), (5, 11)), ((99, 99), (50, 50))]
)
def test_shape_of_the_feature_map(image: tuple[int, int], features: tuple[int, int]) -> None:
    assert pictures._rows(features[0] * features[1], *image) == features[0]


def test_weights_to_start_from(
    checkpoint: Path, mazes: tuple[list[Mazes], list[Mazes]], tmp_path: Path
) -> None:
    """Of a checkpoint, and as the original training program and its analysis save them."""
    given = {"device": "cpu", "resume": None}
    first = load_checkpoint(checkpoint, read_settings(checkpoint)[0], "cpu").learner
    assert isinstance(first, TorchLearner)
    state = first.model.state_dict()
    paths = [checkpoint]
    for number, content in enumerate((state, {"model_state_dict": state}, {"state_dict": state})):
        paths.append(tmp_path / f"{number}.pt")
        torch.save(content, paths[-1])
    expected = first.test(mazes[1][0])
    options = {
        name: value
        for name, value in dataclasses.asdict(dataclasses.replace(TINY, seed=9)).items()
        if value is not None
    }
    for path in paths:
        run = train.start(weights=path, given=options, **given)  # type: ignore[arg-type]
        loss, answers = run.learner.test(mazes[1][0])
        assert loss == expected[0]
        assert (answers == expected[1]).all()
    (tmp_path / "bad.pt").write_text("nothing")
    with pytest.raises(ValueError, match=r"bad\.pt is not a file of torch weights"):
        train.start(weights=tmp_path / "bad.pt", given=options, **given)  # type: ignore[arg-type]


def test_checkpoints_of_other_configurations(checkpoint: Path, tmp_path: Path) -> None:
    resume = ("--resume", checkpoint)
    message = refused(train.app, *resume, "--d_model", 32, "--d_input", 4)
    assert "was trained with d_model = 20 and cannot go on with 32" in message
    assert "d_input" not in message
    message = refused(train.app, *resume, "--maze_size", 9, 7, 11)
    assert "was trained with maze_size = 7 9 and cannot go on with 7 9 11" in message
    assert "with framework = torch" in refused(train.app, *resume, "--framework", "jax")
    assert "has 6 steps behind it" in refused(train.app, *resume, "--training_iterations", 5)
    assert "leave --weights out" in refused(train.app, *resume, "--weights", checkpoint)

    other = ("--weights", checkpoint, *options(dataclasses.replace(TINY, memory_length=4)))
    message = refused(train.app, *other, "--device", "cpu")
    assert f"{checkpoint}: the weights are of another configuration" in message
    assert "start_trace is (20, 3) and (20, 4) here" in message

    tensors, metadata = load_weights(checkpoint)
    path = tmp_path / "changed.safetensors"
    for change in (
        lambda t, m: t.pop("model/start_trace"),
        lambda t, m: t.pop("optimizer/0/exp_avg"),
        lambda t, m: t.pop("losses"),
        lambda t, m: m.pop("history"),
        lambda t, m: m["settings"].update(more=1),
        lambda t, m: m["settings"].update(d_model=21),
    ):
        weights, data = dict(tensors), json.loads(json.dumps(metadata))
        change(weights, data)
        save_weights(weights, path, data)
        assert f"is not a whole checkpoint of {PROGRAM}" in refused(
            train.app, "--resume", path, "--device", "cpu"
        )
    save_weights({"a": torch.zeros(2)}, path)
    assert "is not a checkpoint of ml_networks" in refused(train.app, "--resume", path)
    assert "is not a checkpoint of ml_networks" in refused(evaluate.app, path)
    assert "there is no weights file" in refused(evaluate.app, tmp_path / "none")


def test_checkpoints_of_a_single_size(checkpoint: Path, tmp_path: Path) -> None:
    """As they were before there were several: a number, and a history without sizes."""
    tensors, metadata = load_weights(checkpoint)
    expected = load_checkpoint(checkpoint, read_settings(checkpoint)[0], "cpu")
    for sizes, found in ((7, (7,)), ([11, 9, 11], (9, 11))):
        data = json.loads(json.dumps(metadata))
        data["settings"]["maze_size"] = sizes
        for point in data["history"]:
            del point["sizes"]
        save_weights(tensors, tmp_path / LAST, data)
        settings = read_settings(tmp_path / LAST)[0]
        assert settings.maze_size == found
        run = load_checkpoint(tmp_path / LAST, settings, "cpu")
        assert run.history == [point._replace(sizes={}) for point in expected.history]
        assert all(isinstance(each, Measures) for each in expected.history[-1].sizes.values())
        resumed = command(train.app, "--resume", tmp_path / LAST, "--out", tmp_path / "on")
        assert resumed.exit_code == 0, resumed.stderr
    with pytest.raises(ValueError, match="maze_size has no size"):
        dataclasses.replace(TINY, maze_size=())


def test_bad_options(checkpoint: Path, tmp_path: Path) -> None:
    assert "model is 'lstm'; it takes ctm" in refused(train.app, "--model", "lstm")
    assert "did you mean 'torch'" in refused(train.app, "--framework", "touch")
    assert "divisible by heads=3" in refused(train.app, "--heads", 3)
    assert "which has no U-Net" in refused(train.app, "--use_hyper", "--synapse_depth", 1)
    assert "which takes no images" in refused(train.app, "--backbone_type", "parity_backbone")
    assert "lr is -1.0; it must be a number > 0" in refused(train.app, "--lr", -1)
    message = refused(train.app, "--size_curriculum", 1.5)
    assert "size_curriculum is 1.5; it must be a share from 0" in message
    assert "batch_size is 0; it must be >= 1" in refused(train.app, "--batch_size", 0)
    tiny = (*options(TINY), "--device", "cpu")
    for sizes, bad in (((8,), 8), ((9, 3), 3), ((9, 11, 12), 12), ((9, -5), -5)):
        assert f"maze_size is {bad}; it takes odd numbers >= 5" in refused(
            train.app, *tiny, "--maze_size", *sizes
        )
    message = refused(train.app, *tiny, "--batch_size", 21)
    assert "batch_size is 21 and there are 20 mazes of 7 x 7 pixels to train on" in message
    empty = tmp_path / "train"
    assert f"there is no folder {empty}" in refused(train.app, *tiny, "--data_root", tmp_path)
    empty.mkdir()
    assert f"no PNG files in {empty}" in refused(train.app, *tiny, "--data_root", tmp_path)
    assert "device 'nonsense' cannot be used" in refused(train.app, "--device", "nonsense")
    assert "not both" in refused(
        evaluate.app, checkpoint, "--maze_size", 9, "--data_root", tmp_path
    )
    data = checkpoint.parents[1] / "data"
    assert "already holds PNG files" in refused(generate.app, data)
    assert "maze_size is 4" in refused(generate.app, tmp_path, "--maze_size", 9, 4)
    assert "maze_size is 10" in refused(evaluate.app, checkpoint, "--maze_size", 10)


def test_interrupt_saves(tmp_path: Path) -> None:
    settings = dataclasses.replace(TINY, training_iterations=100_000, evaluate_every=10**6)
    process = subprocess.Popen(
        [sys.executable, "-m", PROGRAM, *options(settings), "--out", tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    assert "20 mazes of 7 x 7, 9 x 9 pixels each to train on" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED, output
    assert f"go on with --resume {tmp_path / LAST}" in output.replace("\n", "")
    run = load_checkpoint(tmp_path / LAST, read_settings(tmp_path / LAST)[0], "cpu")
    assert run.settings == settings
    assert 0 < run.step < settings.training_iterations
    assert run.history == []
    save_checkpoint(run, tmp_path / "again.safetensors")
    assert_same(tmp_path / "again.safetensors", tmp_path / LAST)


def test_routes_end_with_waiting(mazes: tuple[list[Mazes], list[Mazes]]) -> None:
    routes = mazes[0][0].routes
    assert routes.shape == (20, TINY.maze_route_length)
    assert (routes[:, -1] == WAIT).any()
