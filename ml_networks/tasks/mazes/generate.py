"""Make mazes and write them as PNG files, in the folders that public maze sets have.

``python -m ml_networks.tasks.mazes.generate mazes --maze_size 9 19`` writes
``mazes/train/9x9/0.png``, ``mazes/train/19x19/0.png`` and so on, and the same under
``mazes/test/``, with solutions in blue.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ml_networks.tasks.mazes.data import check_size, save_folder, split
from ml_networks.tasks.mazes.settings import SIZES, SPELLING, WithSizes
from ml_networks.tasks.program import refuse

app = typer.Typer(add_completion=False, context_settings=SPELLING)


@app.command(cls=WithSizes)
def main(
    out: Annotated[Path, typer.Argument(help="Folder for train/ and test/, without mazes yet.")],
    maze_size: Annotated[list[int], typer.Option("--maze_size", help=SIZES)] = [19],  # noqa: B006
    training_mazes: Annotated[
        int, typer.Option("--training_mazes", min=0, help="Of each size.")
    ] = 1_000,
    test_mazes: Annotated[int, typer.Option("--test_mazes", min=0, help="Of each size.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same mazes.")] = 0,
) -> None:
    """Make perfect mazes by depth-first search; no test maze is among those to train on."""
    try:
        for size in maze_size:
            check_size(size, "maze_size")
        for name in ("train", "test"):
            if any((out / name).rglob("*.png")):
                raise ValueError(f"{out / name} already holds PNG files; name another folder")
        sizes = sorted(set(maze_size))
        made = [split(training_mazes, test_mazes, size, seed) for size in sizes]
        for size, (training, test) in zip(sizes, made, strict=True):
            save_folder(training, out / "train")
            save_folder(test, out / "test")
            typer.echo(
                f"{training_mazes:,} mazes of {size} x {size} pixels in {out / 'train'}, "
                f"{test_mazes:,} others in {out / 'test'}"
            )
    except (OSError, ValueError, ModuleNotFoundError) as error:
        refuse(error)


if __name__ == "__main__":
    app()
