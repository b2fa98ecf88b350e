"""README and docs: every Python block runs and prints what its comments say; links lead somewhere.

The blocks of a page share one namespace, in order. A comment after ``print(...)`` is what it must
print. A block with ``title="name"`` is a file that the other blocks find.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import linecache
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from ml_networks.kernels.core import registry

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w.]+)(?P<options>[^\n]*)\n(?P<body>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
PRINTS = re.compile(r"^ *print\(.*\)(?:  # (?P<expected>.+))?$", re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:)(?P<path>[^)#\s]+)?(?:#(?P<anchor>[^)\s]+))?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is the one of its first line in the page."""

    language: str
    options: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            found["language"],
            found["options"],
            textwrap.dedent(found["body"]),
            text.count("\n", 0, found.start("body")) + 1,
        )
        for found in FENCE.finditer(text)
    ]


def title_of(block: Block) -> str | None:
    title = re.search(r'title="([^"]+)"', block.options)
    return title[1] if title else None


def expected_output(block: Block) -> list[str] | None:
    """What the block's comments say is printed; None where a print has no comment."""
    expected = [found["expected"] for found in PRINTS.finditer(block.text)]
    return None if None in expected else expected


def needs(text: str) -> list[str]:
    """The optional packages that a page's Python blocks import, files among them."""
    names = re.findall(r"^ *(?:from|import) (\w+)", text, re.MULTILINE)
    if re.search(r"ml_networks(?:\.kernels)?\.jax", text):
        names.append("jax")
    return sorted({"torch", "jax", "hydra", "lightning", "optax", "flax"} & set(names))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(page)
    python = [block for block in blocks if block.language == "python"]
    code = [block for block in python if not title_of(block)]
    for package in needs("\n".join(block.text for block in python)):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_packages", dict(registry._packages))
    for block in blocks:
        title = title_of(block)
        if title is not None:
            path = tmp_path / title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")

    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in code:
        where = f"{page.name}:{block.line}"
        # Dataclasses, inspect and tracebacks look a block's source up by this name.
        linecache.cache[where] = (
            len(block.text),
            None,
            block.text.splitlines(keepends=True),
            where,
        )
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block.text, where, "exec"), namespace)
        expected = expected_output(block)
        if expected is not None:
            assert printed.getvalue().splitlines() == expected, where


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for found in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if found["path"]:
            target = (page.parent / found["path"]).resolve()
            assert target.exists(), f"{page.name}: {found['path']} does not exist"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs')}" in navigation, page
