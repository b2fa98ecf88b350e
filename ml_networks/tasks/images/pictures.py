"""Pictures of what an autoencoder does to images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ml_networks.io import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Images = NDArray[np.float32]
BACKGROUND = "white"


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'pictures need matplotlib, which is not installed: pip install "ml-networks[train]"',
            name="matplotlib",
        ) from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=BACKGROUND)


def _show(axes: Any, image: Images) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())


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
    figure = _figure(1.05 * columns + 0.6, 2.45 * pair_rows + 0.4)
    figure.suptitle(title)
    pairs = figure.subfigures(pair_rows, squeeze=False)[:, 0]
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
    _save(figure, path)


def save_code(
    original: Images, indices: NDArray[np.int64], reconstruction: Images, title: str, path: Path
) -> None:
    """Draw an image, the grid of indices it was encoded into, and what they decode to."""
    figure = _figure(10, 3.8)
    figure.suptitle(title)
    left, middle, right = figure.subplots(1, 3)
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
    _save(figure, path)
