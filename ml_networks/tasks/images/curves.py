"""The learning curves of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ml_networks.tasks.figures import figure, save_figure


class Epoch(NamedTuple):
    """What one epoch came to: mean losses in nats, accuracies in [0, 1], its duration."""

    epoch: int
    loss: float
    accuracy: float
    held_out_loss: float
    held_out_accuracy: float
    seconds: float


def save_learning_curves(history: Sequence[Epoch], title: str, path: Path) -> None:
    """Draw loss and error rate of every epoch, in training and held out, into a PNG file.

    Raises
    ------
    ModuleNotFoundError
        If matplotlib is not installed.
    """
    picture = figure(9, 3.6)
    picture.suptitle(title)
    left, right = picture.subplots(1, 2)
    epochs = [entry.epoch for entry in history]
    curves = (
        (left, "loss", [entry.loss for entry in history], "training (with dropout)"),
        (left, "loss", [entry.held_out_loss for entry in history], "held out"),
        (right, "error, %", [_error(entry.accuracy) for entry in history], None),
        (right, "error, %", [_error(entry.held_out_accuracy) for entry in history], None),
    )
    for axes, name, values, label in curves:
        axes.plot(epochs, values, marker=".", label=label)
        axes.set(xlabel="epoch", ylabel=name, yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(visible=True, which="both", alpha=0.25)
    left.legend()
    save_figure(picture, path)


def _error(accuracy: float) -> float:
    """Return the error rate in percent, 0 as 0.01 so that a logarithmic axis can show it."""
    return max(100 - 100 * accuracy, 0.01)
