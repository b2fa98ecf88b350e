"""A progress bar for Lightning. Importing this module needs the lightning and rich packages."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import RichProgressBar
    from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
else:
    # Lightning is published under two names; the one imported already is the one in use.
    _packages = ("lightning.pytorch", "pytorch_lightning")
    for _package in sorted(_packages, key=lambda package: package not in sys.modules):
        if importlib.util.find_spec(_package.partition(".")[0]) is not None:
            _progress = importlib.import_module(f"{_package}.callbacks.progress.rich_progress")
            break
    else:
        raise ModuleNotFoundError(
            "ProgressBarCallback needs Lightning: pip install 'ml-networks[train]'",
            name="lightning",
        )
    RichProgressBar = _progress.RichProgressBar
    RichProgressBarTheme = _progress.RichProgressBarTheme

__all__ = ["ProgressBarCallback"]


class ProgressBarCallback(RichProgressBar):
    """Lightning's rich progress bar in a green theme."""

    def __init__(self) -> None:
        super().__init__(
            theme=RichProgressBarTheme(
                description="green_yellow",
                progress_bar="green1",
                progress_bar_finished="green1",
                progress_bar_pulse="green3",
                batch_progress="green_yellow",
                time="grey82",
                processing_speed="grey82",
                metrics="grey82",
            )
        )
