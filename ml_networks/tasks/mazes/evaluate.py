"""Measure a trained model on mazes and draw what it does at every tick.

``python -m ml_networks.tasks.mazes.evaluate runs/mazes/last.safetensors`` takes the mazes that the
run held out. ``--data_root`` or ``--maze_size`` name others, of one size or several.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from ml_networks.tasks.mazes.data import Mazes
from ml_networks.tasks.mazes.learner import (
    Example,
    Learner,
    Scores,
    best_constant,
    counted,
    evaluate,
    table,
)
from ml_networks.tasks.mazes.pictures import (
    save_attention,
    save_certainty,
    save_dynamic_weights,
    save_routes,
    save_sizes,
)
from ml_networks.tasks.mazes.run import (
    load_held_out,
    make_learner,
    model_weights,
    read_settings,
)
from ml_networks.tasks.mazes.settings import SIZES, SPELLING, Settings, WithSizes
from ml_networks.tasks.program import pick_device, progress_bar, refuse

EXAMPLES = 4
AVERAGED = 100
ROUTES, ATTENTION, CERTAINTY, DYNAMIC_WEIGHTS, ACCURACY = (
    "routes.gif",
    "attention.png",
    "certainty.png",
    "dynamic-weights.png",
    "sizes.png",
)

console = Console(width=None if sys.stdout.isatty() else 110)
app = typer.Typer(add_completion=False, context_settings=SPELLING)


@app.command(cls=WithSizes)
def main(
    checkpoint: Annotated[Path, typer.Argument(help="What the training program wrote.")],
    data_root: Annotated[
        Path | None, typer.Option("--data_root", help="Folder with train/ and test/.")
    ] = None,
    maze_size: Annotated[
        list[int] | None, typer.Option("--maze_size", help=SIZES, show_default=False)
    ] = None,
    framework: Annotated[
        str | None, typer.Option(help="torch or jax. Default: what the model was trained with.")
    ] = None,
    pictures: Annotated[bool, typer.Option(help="Draw, which needs torch.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Folder for pictures. Default: the checkpoint's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the GPU.")] = None,
) -> None:
    """Measure on mazes that were held out, and draw routes, attention, certainty, weights."""
    folder = out or checkpoint.parent
    try:
        if data_root is not None and maze_size is not None:
            raise ValueError("give --data_root or --maze_size, not both")
        settings = read_settings(checkpoint)[0]
        if data_root is not None:
            settings = dataclasses.replace(settings, data_root=str(data_root))
        if maze_size is not None:
            settings = dataclasses.replace(settings, data_root="", maze_size=tuple(maze_size))
        settings = dataclasses.replace(settings, framework=framework or settings.framework)
        mazes = load_held_out(settings)
        learner = make_learner(settings, device)
        learner.load_model(model_weights(checkpoint, settings.framework))
        folder.mkdir(parents=True, exist_ok=True)
        found, constant = tested(learner, mazes), best_constant(mazes)
        console.print(
            f"{counted(mazes)}, loss {found.overall.loss:.3f}\n{table(found, constant)}",
            highlight=False,
            soft_wrap=True,
        )
        drawn = []
        if pictures:
            drawn = draw(settings, checkpoint, mazes, folder, device)
            if len(mazes) > 1:
                save_sizes(found, constant, folder / ACCURACY)
                drawn.append(str(folder / ACCURACY))
    except (OSError, TypeError, ValueError, ModuleNotFoundError) as error:
        refuse(error)
    if drawn:
        console.print(f"saved              {', '.join(drawn)}", highlight=False, soft_wrap=True)


def tested(learner: Learner, mazes: Sequence[Mazes]) -> Scores:
    """What the model's answers are worth, behind a bar that says where it is."""
    with progress_bar(console, visible=console.is_terminal) as bar:
        task, done = bar.add_task("", total=len(mazes)), itertools.count()
        return evaluate(
            learner,
            mazes,
            lambda text: bar.update(task, description=text, completed=next(done)),
        )


def draw(
    settings: Settings, checkpoint: Path, mazes: Sequence[Mazes], folder: Path, device: str | None
) -> list[str]:
    """Draw what the model does at every tick, with torch; return the files.

    Of several sizes a few are drawn, from the smallest to the largest, and the dynamic weights on
    the largest.
    """
    from ml_networks.tasks.mazes.torch_learner import TorchLearner

    learner = TorchLearner(settings, pick_device(device))
    learner.load_model(model_weights(checkpoint, "torch"))
    sizes: list[list[Example]] = []
    for part in mazes:
        several = part.take(slice(math.ceil(AVERAGED / len(mazes))))
        thoughts = learner.think(several)
        sizes.append(thoughts.examples(several))
    chosen = np.linspace(0, len(sizes) - 1, EXAMPLES).round().astype(int)
    few = [
        example
        for number, of_size in enumerate(sizes)
        for example in of_size[: int((chosen == number).sum())]
    ]
    save_routes(few, folder / ROUTES)
    save_attention(few, folder / ATTENTION)
    save_certainty([example for of_size in sizes for example in of_size], folder / CERTAINTY)
    drawn = [ROUTES, ATTENTION, CERTAINTY]
    if thoughts.dynamic_weights:
        save_dynamic_weights(thoughts.dynamic_weights, folder / DYNAMIC_WEIGHTS)
        drawn.append(DYNAMIC_WEIGHTS)
    return [str(folder / name) for name in drawn]


if __name__ == "__main__":
    app()
