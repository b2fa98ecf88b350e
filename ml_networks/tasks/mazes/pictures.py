"""Pictures of a model that thinks about mazes: learning, routes, attention, dynamic weights."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_networks.io import write_atomically
from ml_networks.tasks.figures import figure, save_figure
from ml_networks.tasks.mazes.data import (
    COLOURS,
    OPEN,
    SOLUTION,
    START,
    STEPS,
    WAIT,
    Pixels,
    Routes,
    import_pillow,
)
from ml_networks.tasks.mazes.learner import DynamicWeights, Example, Scores
from ml_networks.tasks.mazes.run import Point

RIGHT_STEPS, WRONG_STEPS = "#1f77b4", "#e6550d"
CONSTANT = "#7f7f7f"
LOOKED_AT = (0.85, 0.1, 0.55)
FRAME_MS, LAST_FRAME_MS = 250, 2500
ACCURACIES = {"per_step": "all steps", "on_route": "steps on the route", "solved": "whole mazes"}
"""What is drawn of measures, and what it is called."""


def save_learning_curves(history: Sequence[Point], constant: Scores, path: Path) -> None:
    """Draw loss and accuracies over the steps; dashed, the best answer that never changes.

    Of mazes of several sizes a third part has the steps on the route of each size.
    """
    several = len(history[-1].sizes) > 1
    picture = figure(14 if several else 9.5, 3.6)
    left, right, *more = picture.subplots(1, 3 if several else 2)
    steps = [point.step for point in history]
    left.plot(steps, [point.loss for point in history], marker=".", label="training")
    left.plot(steps, [point.held_out_loss for point in history], marker=".", label="held out")
    left.set(xlabel="step", ylabel="maze loss, nats")
    for name, label in ACCURACIES.items():
        values = [100 * getattr(point, name) for point in history]
        (line,) = right.plot(steps, values, marker=".", label=label)
        least = 100 * getattr(constant.overall, name)
        right.axhline(least, color=line.get_color(), linestyle="--", linewidth=1)
    right.set(xlabel="step", ylabel="right on held-out mazes, %", ylim=(-3, 103))
    for axes in more:
        for size in history[-1].sizes:
            points = [point for point in history if size in point.sizes]
            values = [100 * point.sizes[size].on_route for point in points]
            axes.plot([point.step for point in points], values, marker=".", label=size)
        least = 100 * constant.overall.on_route
        axes.axhline(least, color=CONSTANT, linestyle="--", linewidth=1)
        axes.set(xlabel="step", ylabel="steps on the route, %", ylim=(-3, 103))
    for axes in (right, *more):
        axes.plot(
            [], [], color=CONSTANT, linestyle="--", linewidth=1, label="best constant answer"
        )
    for axes in more:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    right.legend(fontsize=8)
    left.legend()
    for axes in (left, right, *more):
        axes.grid(visible=True, alpha=0.25)
    save_figure(picture, path)


def save_sizes(found: Scores, constant: Scores, path: Path) -> None:
    """Draw what answers to mazes of each size are worth, beside the best constant answer."""
    picture = figure(9.5, 2.9)
    places = np.arange(len(found.sizes))
    grid = picture.subplots(1, len(ACCURACIES), sharey=True)
    for axes, (name, label) in zip(grid, ACCURACIES.items(), strict=True):
        for scores, shift, colour, who in (
            (found, -0.2, RIGHT_STEPS, "the model"),
            (constant, 0.2, CONSTANT, "best constant answer"),
        ):
            values = [100 * getattr(scores.sizes[size], name) for size in found.sizes]
            bars = axes.bar(places + shift, values, 0.4, color=colour, label=who)
            axes.bar_label(bars, fmt="%.0f", fontsize=7)
        axes.set_title(label, fontsize=10)
        axes.set_xticks(places, [size.replace(" ", "") for size in found.sizes], fontsize=8)
        axes.set(ylim=(0, 108), xlabel="pixels of a maze")
        axes.grid(visible=True, axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    grid[0].set_ylabel("right on held-out mazes, %")
    grid[-1].legend(fontsize=8)
    save_figure(picture, path)


def _unsolved(maze: Pixels) -> Pixels:
    """The colours (H, W, 3) of a maze as the model sees it."""
    return COLOURS[np.where(maze == SOLUTION, OPEN, maze)]


def _show_maze(axes: Any, maze: Pixels, alpha: float = 1.0) -> None:
    axes.imshow(_unsolved(maze), interpolation="nearest", alpha=alpha)
    axes.set(
        xticks=[], yticks=[], xlim=(-0.5, maze.shape[1] - 0.5), ylim=(maze.shape[0] - 0.5, -0.5)
    )
    axes.spines[:].set_visible(False)


def _path(maze: Pixels, route: Routes) -> NDArray[np.float64]:
    """The pixels (1 + steps, 2) that a route goes through, columns before rows."""
    moves = np.array([*STEPS, (0, 0)])[route]
    places = np.concatenate([np.argwhere(maze == START), moves]).cumsum(0)
    return places[:, ::-1].astype(np.float64)


def _beginning(answer: Routes, route: Routes) -> int:
    """How many steps are right before the first wrong one."""
    return int((answer == route).cumprod().sum())


class _RouteLines:
    """A predicted route over a maze: its right beginning, and what follows the first mistake."""

    def __init__(self, axes: Any, example: Example, width: float = 2.5) -> None:
        self.example = example
        style = {"linewidth": width, "solid_capstyle": "round", "solid_joinstyle": "round"}
        (self.wrong,) = axes.plot([], [], color=WRONG_STEPS, alpha=0.75, **style)
        (self.right,) = axes.plot([], [], color=RIGHT_STEPS, **style)

    def draw(self, tick: int) -> int:
        """Draw a tick's answer; return the steps on the route that it starts with."""
        answer, route = self.example.answers[tick], self.example.route
        places = _path(self.example.pixels, answer)
        right = _beginning(answer, route)
        self.right.set_data(*places[: right + 1].T)
        self.wrong.set_data(*places[right:].T)
        return min(right, int((route != WAIT).sum()))


def save_routes(examples: Sequence[Example], path: Path) -> None:
    """Draw the predicted routes over the mazes tick by tick, into an animated GIF.

    The right beginning of each route is blue, what follows the first mistake orange; below runs
    the certainty, with a line at its highest, where the answer is read off.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    pillow = import_pillow()
    n, ticks = len(examples), len(examples[0].certainty)
    picture = figure(2.3 * n, 3.5, dpi=100)
    canvas = FigureCanvasAgg(picture)
    grid = picture.subplots(2, n, squeeze=False, height_ratios=[4, 1])
    lines, dots = [], []
    for (above, below), example in zip(grid.T, examples, strict=True):
        _show_maze(above, example.pixels)
        lines.append(_RouteLines(above, example))
        below.plot(range(1, ticks + 1), example.certainty, color=CONSTANT, linewidth=1.2)
        answered_at = 1 + int(example.certainty.argmax())
        below.axvline(answered_at, color=RIGHT_STEPS, linewidth=1.5, alpha=0.6)
        (dot,) = below.plot([], [], marker="o", color="black", markersize=5)
        dots.append(dot)
        below.set(ylim=(-0.05, 1.05), xlim=(0.5, ticks + 0.5), yticks=[0, 1])
        below.tick_params(labelsize=7)
        below.set_xlabel("tick", fontsize=8)
    grid[1, 0].set_ylabel("certainty", fontsize=8)
    titles = [axes.set_title("0 of 000 steps", fontsize=9) for axes in grid[0]]
    heading = picture.suptitle("tick 00", fontsize=10)
    canvas.draw()
    picture.set_layout_engine("none")  # so that nothing moves from frame to frame

    frames = []
    for tick in range(ticks):
        heading.set_text(f"tick {tick + 1} of {ticks}")
        for number, example in enumerate(examples):
            right = lines[number].draw(tick)
            dots[number].set_data([tick + 1], [example.certainty[tick]])
            length = int((example.route != WAIT).sum())
            titles[number].set_text(f"{right} of {length} steps")
        canvas.draw()
        frames.append(pillow.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))
    content = io.BytesIO()
    durations = [FRAME_MS] * (ticks - 1) + [LAST_FRAME_MS]
    frames[0].save(
        content,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        # Frames alike would be merged and the ticks miscounted.
        disposal=2,
    )
    write_atomically(path, content.getvalue())


def save_attention(examples: Sequence[Example], path: Path, columns: int = 8) -> None:
    """Draw where the model looks: one row a maze, ticks from left to right, heads averaged.

    The darker a place, the further its weight is above the even one of 1 / positions.
    """
    ticks = len(examples[0].attention)
    shown = np.unique(np.linspace(0, ticks - 1, min(columns, ticks)).round().astype(int))
    picture = figure(1.45 * len(shown) + 0.4, 1.5 * len(examples) + 0.3)
    grid = picture.subplots(len(examples), len(shown), squeeze=False)
    for line, example in zip(grid, examples, strict=True):
        height, width = example.pixels.shape
        weights = example.attention.mean(1)
        rows = _rows(weights.shape[-1], height, width)
        weights = weights.reshape(ticks, rows, -1)
        above = (weights * weights[0].size - 1).clip(min=0)
        top = max(above.max(), 2.0)  # attention that is almost even stays faint
        for axes, tick in zip(line, shown, strict=True):
            _show_maze(axes, example.pixels, alpha=0.35)
            axes.imshow(
                np.full((*weights.shape[1:], 3), LOOKED_AT),
                alpha=0.85 * above[tick] / top,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                interpolation="nearest",
            )
            _RouteLines(axes, example, width=1.2).draw(tick)
    for axes, tick in zip(grid[0], shown, strict=True):
        axes.set_title(f"tick {tick + 1}", fontsize=9)
    save_figure(picture, path)


def _rows(positions: int, height: int, width: int) -> int:
    """The rows of a feature map of so many positions, as near to the image's shape as can be."""
    wanted = math.sqrt(positions * height / width)
    fitting = [rows for rows in range(1, positions + 1) if positions % rows == 0]
    return min(fitting, key=lambda rows: abs(rows - wanted))


def save_certainty(examples: Sequence[Example], path: Path, drawn: int = 12) -> None:
    """Draw certainty and accuracy over the ticks: their means, and ``drawn`` mazes' certainty."""
    certainties = np.stack([example.certainty for example in examples])
    routes = np.stack([example.route for example in examples])
    ticks = np.arange(1, certainties.shape[-1] + 1)
    right = np.stack([example.answers for example in examples]) == routes[:, None]
    under_way = routes != WAIT
    on_route = (right & under_way[:, None]).sum((0, 2)) / under_way.sum()
    # Of all that there are, so that every size is among them.
    chosen = np.linspace(0, len(examples) - 1, min(drawn, len(examples))).astype(int)
    picture = figure(9.5, 3.6)
    left, middle = picture.subplots(1, 2)
    left.plot(ticks, certainties[chosen].T, color=CONSTANT, linewidth=0.7, alpha=0.6)
    left.plot([], [], color=CONSTANT, linewidth=0.7, label=f"{len(chosen)} mazes")
    left.plot(
        ticks, certainties.mean(0), color="black", linewidth=2, label=f"mean of {len(certainties)}"
    )
    left.set(xlabel="tick", ylabel="certainty", ylim=(0, 1.03))
    over_ticks = (right.mean((0, 2)), on_route, right.all(2).mean(0))
    for values, label in zip(over_ticks, ACCURACIES.values(), strict=True):
        middle.plot(ticks, 100 * values, marker=".", label=label)
    middle.set(xlabel="tick", ylabel="right on held-out mazes, %", ylim=(-3, 103))
    for axes in (left, middle):
        axes.grid(visible=True, alpha=0.25)
        axes.legend(fontsize=8)
    save_figure(picture, path)


def save_dynamic_weights(
    weights: Mapping[str, DynamicWeights], path: Path, drawn: int = 16
) -> None:
    """Draw the dynamic weights ``g U V^T`` of each hyper layer over the ticks.

    One column a layer, in the order in which the state passes them. From above, of the first
    ``drawn`` mazes: the gate g; the norm of the dynamic weights relative to that of the layer's
    own; how alike, as a cosine, those of every two ticks are, for the first maze alone.
    """
    names = sorted(weights, key=_depth)
    lowest = min(layer.similarity[0].min() for layer in weights.values())
    lowest = math.floor(10 * min(lowest, 0.95)) / 10
    picture = figure(1.75 * len(names) + 1.3, 5.6)
    grid = picture.subplots(3, len(names), squeeze=False, sharey="row")
    for column, name in enumerate(names):
        layer = weights[name]
        ticks = np.arange(1, layer.gate.shape[1] + 1)
        for axes, values in zip(
            grid[:2, column], (layer.gate[:drawn], layer.strength[:drawn]), strict=True
        ):
            axes.plot(ticks, values.T, color=RIGHT_STEPS, linewidth=0.6, alpha=0.4)
            axes.plot(ticks, values.mean(0), color="black", linewidth=1.5)
            axes.grid(visible=True, alpha=0.25)
            axes.tick_params(labelsize=7)
            axes.set_xlim(1, max(len(ticks), 2))
        grid[0, column].set_title(" ".join(_label(name)), fontsize=9)
        image = grid[2, column].imshow(
            layer.similarity[0],
            cmap="viridis",
            vmin=lowest,
            vmax=1,
            extent=(0.5, len(ticks) + 0.5, len(ticks) + 0.5, 0.5),
        )
        grid[2, column].set_xlabel("tick", fontsize=8)
        grid[2, column].tick_params(labelsize=7)
    grid[0, 0].set_ylabel("gate", fontsize=9)
    grid[0, 0].set_ylim(0, 1)
    grid[1, 0].set_ylabel("norm / norm of W", fontsize=9)
    grid[1, 0].set_ylim(bottom=0)
    grid[2, 0].set_ylabel("tick", fontsize=9)
    bar = picture.colorbar(image, ax=list(grid[2]), shrink=0.8, pad=0.01)
    bar.set_label("cosine", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    save_figure(picture, path)


def _label(name: str) -> tuple[str, str]:
    """``("down", "5")`` of ``synapses.down_projections.5.1``."""
    _, projections, level, *_ = name.split(".")
    return projections.partition("_")[0], level


def _depth(name: str) -> tuple[bool, int]:
    direction, level = _label(name)
    return direction == "up", int(level) if direction == "down" else -int(level)
