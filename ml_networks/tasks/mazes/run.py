"""A training run on mazes: its data, its steps, its checkpoints."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from ml_networks.io import load_weights, save_weights
from ml_networks.tasks.mazes.data import Mazes, augment, load_folder, size_of, split
from ml_networks.tasks.mazes.learner import Learner, Measures, evaluate
from ml_networks.tasks.mazes.settings import Settings
from ml_networks.tasks.program import pick_device, pick_jax_device

PROGRAM = "ml_networks.tasks.mazes.train"
LAST = "last.safetensors"


class Point(NamedTuple):
    """Where a run stood after ``step`` steps: the mean loss in nats of the training steps since
    the point before, what held-out mazes said, all of them and those of each size, and the seconds
    since the run's beginning."""

    step: int
    loss: float
    held_out_loss: float
    per_step: float
    on_route: float
    solved: float
    seconds: float
    sizes: dict[str, Measures]

    @property
    def measures(self) -> Measures:
        """What all held-out mazes said."""
        return Measures(self.held_out_loss, self.per_step, self.on_route, self.solved)


class Stop(Protocol):
    """Says whether to stop after this step, as :class:`threading.Event` does."""

    def is_set(self) -> bool:
        """Return whether to stop."""


def make_learner(settings: Settings, device: str | None = None) -> Learner:
    """A fresh model in training, on a device of its framework."""
    if settings.framework == "jax":
        from ml_networks.tasks.mazes.jax_learner import JaxLearner

        return JaxLearner(settings, pick_jax_device(device))
    from ml_networks.tasks.mazes.torch_learner import TorchLearner

    return TorchLearner(settings, pick_device(device))


def load_held_out(settings: Settings) -> list[Mazes]:
    """The mazes of each size that a run of these settings is tested on, and never trained on.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`load_mazes`.
    """
    if settings.data_root:
        return load_folder(Path(settings.data_root) / "test", settings.maze_route_length)
    return _made(settings, 0)[1]


def load_mazes(settings: Settings) -> tuple[list[Mazes], list[Mazes]]:
    """The mazes of each size to train on and those held out: made, or read from ``data_root``.

    Raises
    ------
    FileNotFoundError, ValueError
        For folders without mazes, bad files, bad sizes, fewer mazes of a size than a batch.
    """
    if settings.data_root:
        folder = Path(settings.data_root) / "train"
        training = load_folder(folder, settings.maze_route_length)
        held_out = load_held_out(settings)
    else:
        training, held_out = _made(settings, settings.training_mazes)
    for mazes in training:
        if len(mazes.routes) < settings.batch_size:
            raise ValueError(
                f"batch_size is {settings.batch_size} and there are {len(mazes.routes)} mazes of "
                f"{size_of(mazes)} pixels to train on"
            )
    return training, held_out


def _made(settings: Settings, training: int) -> tuple[list[Mazes], list[Mazes]]:
    held_out, seed, length = settings.test_mazes, settings.seed, settings.maze_route_length
    made = [split(training, held_out, size, seed, length) for size in settings.maze_size]
    return [train for train, _ in made], [test for _, test in made]


class Run:
    """A model in training and where it stands."""

    def __init__(self, settings: Settings, learner: Learner) -> None:
        self.settings = settings
        self.learner = learner
        self.step = 0
        self.history: list[Point] = []
        self.seconds = 0.0
        self._turns: NDArray[np.int64] | None = None

    def batch(self, training: Sequence[Mazes]) -> Mazes:
        """The mazes of the next step, all of one size, which the settings and the step decide.

        In an epoch of a size every maze of it comes once, turned and mirrored at random; what is
        left over after the last whole batch waits for another epoch.
        """
        seed, batch_size = self.settings.seed, self.settings.batch_size
        if self._turns is None:
            self._turns = turns([len(mazes.routes) for mazes in training], self.settings)
        size = self._turns[self.step]
        mazes = training[size]
        before = int((self._turns[: self.step] == size).sum())
        epoch, position = divmod(before, len(mazes.routes) // batch_size)
        order = np.random.default_rng([seed, epoch]).permutation(len(mazes.routes))
        chosen = mazes.take(order[position * batch_size : (position + 1) * batch_size])
        return augment(chosen, np.random.default_rng([seed, self.step, 1]))


def turns(counts: Sequence[int], settings: Settings) -> NDArray[np.int64]:
    """Which of the sizes, that have so many mazes, each step of a run takes, drawn at random.

    After a share ``size_curriculum`` of the steps every maze is as likely as any other; before,
    the sizes join one by one, the smallest being there from the beginning.
    """
    steps, last = settings.training_iterations, len(counts) - 1
    ramp = settings.size_curriculum * steps
    progress = np.minimum(np.arange(steps) / ramp, 1) if ramp else np.ones(steps)
    joined = np.clip(1 + last * progress[:, None] - np.arange(last + 1), 0, 1)
    ends = (np.array(counts) * joined).cumsum(1)
    draws = np.random.default_rng([settings.seed, 2]).random((steps, 1)) * ends[:, -1:]
    return (draws >= ends[:, :-1]).sum(1)


def fit(
    run: Run,
    training: Sequence[Mazes],
    held_out: Sequence[Mazes],
    stop: Stop,
    out: Path,
    report: Callable[[Point], None],
    bar: Progress,
) -> bool:
    """Train until all steps are done or ``stop`` is set; return whether all are done.

    Writes ``last.safetensors`` into the folder ``out`` every ``save_every`` steps and in the end.
    """
    settings = run.settings
    started = time.monotonic() - run.seconds
    task = bar.add_task("", total=settings.training_iterations, completed=run.step)

    def say(text: str) -> None:
        bar.update(task, description=text)

    # JAX compiles for each size, which takes far longer than a step.
    not_compiled = {size_of(mazes) for mazes in training} if settings.framework == "jax" else set()
    while run.step < settings.training_iterations:
        mazes = run.batch(training)
        size = size_of(mazes)
        say(f"compiling for {size} pixels" if size in not_compiled else "training")
        run.learner.step(mazes, run.step)
        not_compiled.discard(size)
        run.step += 1
        bar.update(task, completed=run.step)
        last = run.step == settings.training_iterations
        if last or run.step % settings.evaluate_every == 0:
            since = run.history[-1].step if run.history else 0
            loss = run.learner.take_losses() / (run.step - since)
            measures, sizes = evaluate(run.learner, held_out, say)
            run.seconds = time.monotonic() - started
            run.history.append(Point(run.step, loss, *measures, run.seconds, sizes))
            report(run.history[-1])
        if stop.is_set():
            break
        if run.step % settings.save_every == 0 and not last:
            run.seconds = time.monotonic() - started
            save_checkpoint(run, out / LAST)
    run.seconds = time.monotonic() - started
    save_checkpoint(run, out / LAST)
    return run.step >= settings.training_iterations


def save_checkpoint(run: Run, path: Path) -> None:
    """Write everything that the rest of the run depends on."""
    metadata = {
        "program": PROGRAM,
        "settings": dataclasses.asdict(run.settings),
        "step": run.step,
        "history": [point._asdict() for point in run.history],
        "seconds": run.seconds,
    }
    save_weights(run.learner.tensors(), path, metadata)


def read_settings(path: Path) -> tuple[Settings, dict[str, Any]]:
    """The settings of a checkpoint, and the rest of its metadata.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is torn, or not a checkpoint of this program.
    """
    metadata = load_weights(path, "numpy")[1]
    if metadata.get("program") != PROGRAM:
        raise ValueError(f"{path} is not a checkpoint of {PROGRAM}")
    try:
        return Settings(**metadata.pop("settings")), metadata
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole checkpoint of {PROGRAM}: {error}") from error


def _point(sizes: dict[str, list[float]] | None = None, **point: Any) -> Point:
    """A point of a checkpoint's history; before there were several sizes it had none."""
    return Point(
        sizes={size: Measures(*values) for size, values in (sizes or {}).items()}, **point
    )


def load_checkpoint(path: Path, settings: Settings, device: str | None = None) -> Run:
    """The run that :func:`save_checkpoint` wrote, going on with ``settings``.

    Raises
    ------
    ValueError
        If the checkpoint is not whole, or has more steps behind it than ``settings`` asks for.
    """
    metadata = read_settings(path)[1]
    run = Run(settings, make_learner(settings, device))
    try:
        run.learner.load(
            load_weights(path, "numpy" if settings.framework == "jax" else "torch")[0]
        )
        run.step, run.seconds = metadata["step"], metadata["seconds"]
        run.history = [_point(**point) for point in metadata["history"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole checkpoint of {PROGRAM}: {error}") from error
    if run.step > settings.training_iterations:
        raise ValueError(
            f"{path} has {run.step} steps behind it, more than the {settings.training_iterations} "
            "of --training_iterations"
        )
    return run


def model_weights(path: Path, framework: str) -> dict[str, Any]:
    """A model's weights by their names in torch: of a checkpoint, or of a torch file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is neither.
    """
    if path.suffix == ".safetensors" or not path.is_file():
        tensors = load_weights(path, "numpy" if framework == "jax" else "torch")[0]
        weights = {name[6:]: x for name, x in tensors.items() if name.startswith("model/")}
        return weights or tensors
    import torch

    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is no such thing makes torch raise
        raise ValueError(
            f"{path} is not a file of torch weights: {str(error).splitlines()[0]}"
        ) from error
    for name in ("model_state_dict", "state_dict"):
        content = content.get(name, content)
    return content
