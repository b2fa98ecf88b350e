"""Make mazes and write them as PNG files, in the folders that public maze sets have.

``python -m ml_networks.tasks.mazes.generate mazes --maze_size 19`` writes ``mazes/train/0/0.png``
and so on, and ``mazes/test/0/...``, with solutions in blue.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ml_networks.tasks.mazes.data import save_folder, split
from ml_networks.tasks.mazes.settings import SPELLING
from ml_networks.tasks.program import refuse

app = typer.Typer(add_completion=False, context_settings=SPELLING)


@app.command()
def main(
    out: Annotated[Path, typer.Argument(help="Folder for train/ and test/, without mazes yet.")],
    maze_size: Annotated[int, typer.Option("--maze_size", help="Pixels a side; odd.")] = 19,
    training_mazes: Annotated[int, typer.Option("--training_mazes", min=0)] = 1_000,
    test_mazes: Annotated[int, typer.Option("--test_mazes", min=0)] = 100,
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same mazes.")] = 0,
) -> None:
    """Make perfect mazes by depth-first search; no test maze is among those to train on."""
    try:
        training, test = split(training_mazes, test_mazes, maze_size, seed)
        parts = {"train": training, "test": test}
        for name in parts:
            if any((out / name).rglob("*.png")):
                raise ValueError(f"{out / name} already holds PNG files; name another folder")
        for name, mazes in parts.items():
            save_folder(mazes, out / name)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        refuse(error)
    typer.echo(
        f"{training_mazes:,} mazes of {maze_size} x {maze_size} pixels in {out / 'train'}, "
        f"{test_mazes:,} others in {out / 'test'}"
    )


if __name__ == "__main__":
    app()
