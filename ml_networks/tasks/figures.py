"""What the pictures of all programs share: a figure without a window, written atomically."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_networks.io import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BACKGROUND = "white"


def figure(width: float, height: float, **options: Any) -> Figure:
    """A figure of so many inches, with matplotlib's further options for figures.

    Raises
    ------
    ModuleNotFoundError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'pictures need matplotlib, which is not installed: pip install "ml-networks[train]"',
            name="matplotlib",
        ) from error
    options = {"dpi": 150, "layout": "constrained", "facecolor": BACKGROUND, **options}
    return Figure(figsize=(width, height), **options)


def save_figure(picture: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    content = io.BytesIO()
    picture.savefig(content, format="png")
    write_atomically(path, content.getvalue())
