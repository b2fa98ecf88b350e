"""Measure a trained model on mazes and draw what it does at every tick.

``python -m ml_networks.tasks.mazes.evaluate runs/mazes/last.safetensors`` takes the mazes that the
run held out. ``--data_root`` or ``--maze_size`` name others.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ml_networks.tasks.mazes.data import Mazes
from ml_networks.tasks.mazes.learner import best_constant, evaluate, table
from ml_networks.tasks.mazes.pictures import (
    save_attention,
    save_certainty,
    save_dynamic_weights,
    save_routes,
)
from ml_networks.tasks.mazes.run import (
    load_held_out,
    make_learner,
    model_weights,
    read_settings,
)
from ml_networks.tasks.mazes.settings import SPELLING, Settings
from ml_networks.tasks.program import pick_device, refuse

EXAMPLES = 4
AVERAGED = 100
ROUTES, ATTENTION, CERTAINTY, DYNAMIC_WEIGHTS = (
    "routes.gif",
    "attention.png",
    "certainty.png",
    "dynamic-weights.png",
)

console = Console(width=None if sys.stdout.isatty() else 110)
app = typer.Typer(add_completion=False, context_settings=SPELLING)


@app.command()
def main(
    checkpoint: Annotated[Path, typer.Argument(help="What the training program wrote.")],
    data_root: Annotated[
        Path | None, typer.Option("--data_root", help="Folder with train/ and test/.")
    ] = None,
    maze_size: Annotated[
        int | None, typer.Option("--maze_size", help="Pixels a side of mazes that are made.")
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
            settings = dataclasses.replace(settings, data_root="", maze_size=maze_size)
        settings = dataclasses.replace(settings, framework=framework or settings.framework)
        mazes = load_held_out(settings)
        learner = make_learner(settings, device)
        learner.load_model(model_weights(checkpoint, settings.framework))
        folder.mkdir(parents=True, exist_ok=True)
        measures = evaluate(learner, mazes)
        side = " x ".join(map(str, mazes.pixels.shape[1:]))
        console.print(
            f"{len(mazes.routes):,} mazes of {side} pixels, loss {measures.loss:.3f}\n"
            + table(measures, best_constant(mazes.routes)),
            highlight=False,
            soft_wrap=True,
        )
        drawn = draw(settings, checkpoint, mazes, folder, device) if pictures else []
    except (OSError, TypeError, ValueError, ModuleNotFoundError) as error:
        refuse(error)
    if drawn:
        console.print(f"saved              {', '.join(drawn)}", highlight=False, soft_wrap=True)


def draw(
    settings: Settings, checkpoint: Path, mazes: Mazes, folder: Path, device: str | None
) -> list[str]:
    """Draw what the model does at every tick, with torch; return the files."""
    from ml_networks.tasks.mazes.torch_learner import TorchLearner

    learner = TorchLearner(settings, pick_device(device))
    learner.load_model(model_weights(checkpoint, "torch"))
    several = mazes.take(slice(AVERAGED))
    thoughts = learner.think(several)
    few, examples = several.take(slice(EXAMPLES)), thoughts.take(EXAMPLES)
    save_routes(few, examples, folder / ROUTES)
    save_attention(few, examples, folder / ATTENTION)
    save_certainty(several, thoughts, folder / CERTAINTY)
    drawn = [ROUTES, ATTENTION, CERTAINTY]
    if thoughts.dynamic_weights:
        save_dynamic_weights(thoughts.take(EXAMPLES * 4).dynamic_weights, folder / DYNAMIC_WEIGHTS)
        drawn.append(DYNAMIC_WEIGHTS)
    return [str(folder / name) for name in drawn]


if __name__ == "__main__":
    app()
