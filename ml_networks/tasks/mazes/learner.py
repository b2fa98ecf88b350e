"""What a model in training does, in either framework, and what its answers are worth."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ml_networks.tasks.mazes.data import WAIT, Mazes, Pixels, Routes, size_of

Floats = NDArray[np.float32]
Tensors = Mapping[str, Any]
"""Torch tensors, or NumPy arrays, by name."""

TESTED_AT_ONCE = 100


class Learner(Protocol):
    """A model with its optimizer, made from settings."""

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""

    def step(self, mazes: Mazes, number: int) -> None:
        """Take one optimizer step; ``number`` counts them from 0."""

    def take_losses(self) -> float:
        """The sum of the losses of the steps since this was last asked."""

    def test(self, mazes: Mazes) -> tuple[float, Routes]:
        """The mean loss, and the routes (B, route length) at each maze's most certain tick."""

    def tensors(self) -> Tensors:
        """The model's weights as ``model/<name in torch>``, and all else that training needs."""

    def load(self, tensors: Tensors) -> None:
        """Go on from what :meth:`tensors` gave; raises ValueError for anything else."""

    def load_model(self, weights: Tensors) -> None:
        """Take weights by their names in torch; raises ValueError for those that do not fit."""


class Measures(NamedTuple):
    """What answers to mazes are worth.

    ``per_step`` is the share of all steps that are right, waiting at the end included;
    ``on_route`` that of the steps before the end is reached; ``solved`` the share of mazes
    without a wrong step.
    """

    loss: float
    per_step: float
    on_route: float
    solved: float


def measure(answers: Routes, routes: Routes, loss: float = float("nan")) -> Measures:
    """Compare answers (N, route length) with the right routes."""
    right = answers == routes
    under_way = routes != WAIT
    on_route = right[under_way].mean() if under_way.any() else float("nan")
    return Measures(loss, float(right.mean()), float(on_route), float(right.all(1).mean()))


class Scores(NamedTuple):
    """What answers to mazes of several sizes are worth: to all of them, where every maze and every
    step counts once, and to those of each size, by names such as ``"9 x 9"``."""

    overall: Measures
    sizes: dict[str, Measures]


def scores(
    mazes: Sequence[Mazes], answers: Sequence[Routes], losses: Sequence[float] | None = None
) -> Scores:
    """Measure the answers to mazes of each size, whose mean losses are ``losses``."""
    losses = [float("nan")] * len(mazes) if losses is None else losses
    sizes = {
        size_of(part): measure(answer, part.routes, loss)
        for part, answer, loss in zip(mazes, answers, losses, strict=True)
    }
    counts = [len(part.routes) for part in mazes]
    loss = sum(map(operator.mul, losses, counts)) / sum(counts)
    routes = np.concatenate([part.routes for part in mazes])
    return Scores(measure(np.concatenate(answers), routes, loss), sizes)


def best_constant(mazes: Sequence[Mazes]) -> Scores:
    """The most that one answer to all mazes of a size can be worth, chosen knowing them.

    Of every step it is the most frequent class; for ``on_route`` the most frequent direction. Of
    several sizes each has an answer of its own.
    """
    waiting, moving = (
        scores(mazes, [_most_frequent(part.routes, kinds) for part in mazes])
        for kinds in (WAIT + 1, WAIT)
    )
    sizes = {
        size: measures._replace(on_route=moving.sizes[size].on_route)
        for size, measures in waiting.sizes.items()
    }
    return Scores(waiting.overall._replace(on_route=moving.overall.on_route), sizes)


def _most_frequent(routes: Routes, kinds: int) -> Routes:
    """As many routes, each step the most frequent of the first ``kinds`` classes."""
    counts = np.stack([(routes == kind).sum(0) for kind in range(kinds)])
    return np.broadcast_to(counts.argmax(0), routes.shape)


def counted(mazes: Sequence[Mazes]) -> str:
    """How many mazes of which sizes."""
    sizes: dict[int, list[str]] = {}
    for part in mazes:
        sizes.setdefault(len(part.routes), []).append(size_of(part))
    return " and ".join(
        f"{number:,} mazes of {', '.join(alike)} pixels{' each' if len(alike) > 1 else ''}"
        for number, alike in sizes.items()
    )


def table(found: Scores, constant: Scores) -> str:
    """A line for each size and one for all: what answers are worth, and in brackets what the best
    constant answer is."""
    names = {"per_step": "per-step accuracy", "on_route": "on the route", "solved": "mazes solved"}
    lines = [" " * 8 + "".join(f"{text:>20}" for text in names.values())]
    rows = {
        size: (measures, constant.sizes[size])
        for size, measures in found.sizes.items()
        if size in constant.sizes
    }
    if len(rows) != 1:
        rows["all"] = found.overall, constant.overall
    for title, (measures, least) in rows.items():
        cells = [f"{getattr(measures, name):.1%} ({getattr(least, name):.1%})" for name in names]
        lines.append(f"{title:<8}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join([*lines, "in brackets: the best answer that is the same for every maze"])


def evaluate(
    learner: Learner, mazes: Sequence[Mazes], say: Callable[[str], object] = lambda _: None
) -> Scores:
    """Answer mazes of each size with each one's most certain tick; ``say`` is told where it is."""
    losses, answers = [], []
    for part in mazes:
        say(f"testing on {size_of(part)} pixels")
        total, found = 0.0, []
        for start in range(0, len(part.routes), TESTED_AT_ONCE):
            loss, answer = learner.test(part.take(slice(start, start + TESTED_AT_ONCE)))
            total += loss * len(answer)
            found.append(answer)
        losses.append(total / len(part.routes))
        answers.append(np.concatenate(found))
    return scores(mazes, answers, losses)


class DynamicWeights(NamedTuple):
    """The dynamic weights ``g U V^T`` of one hyper layer at every tick of B mazes.

    ``gate`` (B, T) is g; ``strength`` (B, T) the Frobenius norm relative to that of the layer's
    own weight; ``similarity`` (B, T, T) the cosine between the weights of every two ticks.
    """

    gate: Floats
    strength: Floats
    similarity: Floats


class Thoughts(NamedTuple):
    """What a model does on mazes at every tick.

    ``predictions`` are logits (B, route length, 5, T), ``certainties`` (B, 2, T), ``attention``
    (B, T, heads, positions); ``dynamic_weights`` by the names of the hyper layers.
    """

    predictions: Floats
    certainties: Floats
    attention: Floats
    dynamic_weights: dict[str, DynamicWeights]

    def examples(self, mazes: Mazes) -> list[Example]:
        """What it does on each of these mazes, which it was shown."""
        answers = self.predictions.argmax(2).swapaxes(1, 2)
        each = zip(*mazes, answers, self.certainties[:, 1], self.attention, strict=True)
        return [Example(*one) for one in each]


class Example(NamedTuple):
    """What a model does on one maze at every tick.

    ``pixels`` (H, W) and ``route`` (route length) are the maze; ``answers`` (T, route length) the
    predicted routes, ``certainty`` (T,), ``attention`` (T, heads, positions).
    """

    pixels: Pixels
    route: Routes
    answers: Routes
    certainty: Floats
    attention: Floats
