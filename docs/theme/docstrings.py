"""Lets the documentation show docstrings as they are written, for Sphinx and for people."""

from __future__ import annotations

import re
from typing import Any

import griffe

MATH_BLOCK = re.compile(r"^( *)\.\. math::\n((?:\n|\1 +.*\n?)+)", re.MULTILINE)
MATH = re.compile(r":math:`([^`]+)`")
ROLE = re.compile(r":(?:py:)?(?:class|func|meth|mod|attr|obj):`[~.]*([^`]+)`")


def to_markdown(text: str) -> str:
    """Turn reStructuredText's formulas and cross references into Markdown's."""
    text = MATH_BLOCK.sub(lambda found: f"{found[1]}$$\n{found[2].strip()}\n{found[1]}$$\n", text)
    text = MATH.sub(r"$\1$", text)
    text = ROLE.sub(r"`\1`", text)
    return re.sub(r"(?<!`)``([^`]+)``(?!`)", r"`\1`", text)


class Docstrings(griffe.Extension):
    """Applies `to_markdown` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # noqa: D102
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
