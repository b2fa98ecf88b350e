"""Pictures of what an autoencoder does to images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_networks.tasks.figures import figure, save_figure

Images = NDArray[np.float32]


def _show(axes: Any, image: Images) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def save_reconstructions(
    originals: Images,
    reconstructions: Images,
    captions: Sequence[str],
    title: str,
    path: Path,
    columns: int = 10,
) -> None:
    """Draw originals above their reconstructions, ``columns`` pairs in each row of pairs.

    Parameters
    ----------
    originals, reconstructions
        (number, height, width), values in [0, 1].
    captions
        One line under each reconstruction.
    title
        One line above everything.
    path
        A PNG file.
    """
    pair_rows = -(-len(originals) // columns)
    picture = figure(1.05 * columns + 0.6, 2.45 * pair_rows + 0.4)
    picture.suptitle(title)
    pairs = picture.subfigures(pair_rows, squeeze=False)[:, 0]
    for pair_row, rows in enumerate(pairs):
        grid = rows.subplots(2, columns)
        for column in range(columns):
            number = pair_row * columns + column
            if number >= len(originals):
                grid[0, column].set_axis_off()
                grid[1, column].set_axis_off()
                continue
            _show(grid[0, column], originals[number])
            _show(grid[1, column], reconstructions[number])
            grid[1, column].set_xlabel(captions[number], fontsize=8)
        grid[0, 0].set_ylabel("original", fontsize=9)
        grid[1, 0].set_ylabel("decoded", fontsize=9)
    save_figure(picture, path)


def save_code(
    original: Images, indices: NDArray[np.int64], reconstruction: Images, title: str, path: Path
) -> None:
    """Draw an image, the grid of indices it was encoded into, and what they decode to."""
    picture = figure(10, 3.8)
    picture.suptitle(title)
    left, middle, right = picture.subplots(1, 3)
    _show(left, original)
    left.set_title("original", fontsize=10)
    middle.imshow(indices, cmap="viridis", interpolation="nearest")
    middle.set(xticks=[], yticks=[])
    middle.set_title("indices", fontsize=10)
    half = (indices.min() + indices.max()) / 2
    for (row, column), index in np.ndenumerate(indices):
        colour = "white" if index < half else "black"
        middle.text(column, row, str(index), ha="center", va="center", fontsize=6, color=colour)
    _show(right, reconstruction)
    right.set_title("decoded", fontsize=10)
    save_figure(picture, path)
