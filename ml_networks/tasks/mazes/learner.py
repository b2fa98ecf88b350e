"""What a model in training does, in either framework, and what its answers are worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ml_networks.tasks.mazes.data import WAIT, Mazes, Routes

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
    """Compare routes (N, route length), or one answer to all of them, with the right ones."""
    right = np.broadcast_to(answers == routes, routes.shape)
    under_way = routes != WAIT
    on_route = right[under_way].mean() if under_way.any() else float("nan")
    return Measures(loss, float(right.mean()), float(on_route), float(right.all(1).mean()))


def best_constant(routes: Routes) -> Measures:
    """The most that one answer to all of these mazes can be worth, chosen knowing them.

    Of every step it is the most frequent class; for ``on_route`` the most frequent direction.
    """
    counts = np.stack([(routes == kind).sum(0) for kind in range(WAIT + 1)])
    with_waiting = measure(counts.argmax(0), routes)
    return with_waiting._replace(on_route=measure(counts[:WAIT].argmax(0), routes).on_route)


def table(measures: Measures, constant: Measures) -> str:
    """Three lines: what answers are worth, and what the best constant one is."""
    names = {"per_step": "per-step accuracy", "on_route": "on the route", "solved": "mazes solved"}
    return "\n".join(
        f"{text:<18} {getattr(measures, name):6.1%}  "
        f"(best constant answer: {getattr(constant, name):.1%})"
        for name, text in names.items()
    )


def evaluate(learner: Learner, mazes: Mazes) -> Measures:
    """Answer mazes with each one's most certain tick."""
    losses, answers = [], []
    for start in range(0, len(mazes.routes), TESTED_AT_ONCE):
        part = mazes.take(slice(start, start + TESTED_AT_ONCE))
        loss, answer = learner.test(part)
        losses.append(loss * len(answer))
        answers.append(answer)
    return measure(np.concatenate(answers), mazes.routes, sum(losses) / len(mazes.routes))


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

    @property
    def routes(self) -> Routes:
        """The predicted routes (B, T, route length)."""
        return self.predictions.argmax(2).swapaxes(1, 2)

    def take(self, n: int) -> Thoughts:
        """Those on the first ``n`` mazes."""
        return Thoughts(
            self.predictions[:n],
            self.certainties[:n],
            self.attention[:n],
            {
                name: DynamicWeights(*(values[:n] for values in weights))
                for name, weights in self.dynamic_weights.items()
            },
        )
