"""Mazes as images and routes: made, drawn, read from folders of PNG files. NumPy alone.

A pixel is a wall (black), open (white), the start (red), the end (green) or a part of the solution
(blue), which a network never sees. A route is one step a pixel: up, down, left, right, and waiting
once the end is reached.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_networks.io import write_atomically

__all__ = [
    "CLASSES",
    "ROUTE_LENGTH",
    "WAIT",
    "Mazes",
    "augment",
    "check_size",
    "generate",
    "images_of",
    "import_pillow",
    "load_folder",
    "pad_route",
    "save_folder",
    "size_of",
    "solve",
    "split",
]

Pixels = NDArray[np.uint8]
Routes = NDArray[np.int64]

WALL, OPEN, START, END, SOLUTION = range(5)
COLOURS = np.array(
    [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)], dtype=np.uint8
)
UP, DOWN, LEFT, RIGHT, WAIT = range(5)
CLASSES = 5
STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))
ROUTE_LENGTH = 100
SMALLEST = 5
ATTEMPTS = 20
"""How many mazes are made for each one wanted before a size counts as exhausted."""

# Read as three bits red, green, blue: what the colour stands for, or 255.
KINDS = np.full(8, 255, dtype=np.uint8)
KINDS[[0b000, 0b111, 0b100, 0b010, 0b001]] = WALL, OPEN, START, END, SOLUTION

# What a step becomes when its maze is turned left, turned right, or mirrored.
TURNED_LEFT = np.array([LEFT, RIGHT, DOWN, UP, WAIT])
TURNED_RIGHT = np.array([RIGHT, LEFT, UP, DOWN, WAIT])
LEFT_RIGHT = np.array([UP, DOWN, RIGHT, LEFT, WAIT])
UP_DOWN = np.array([DOWN, UP, LEFT, RIGHT, WAIT])


class Mazes(NamedTuple):
    """Mazes of one size: ``pixels`` (N, H, W), kinds 0 to 4 with the solution drawn in, and
    ``routes`` (N, route length), classes 0 to 4."""

    pixels: Pixels
    routes: Routes

    def take(self, chosen: Any) -> Mazes:
        """The mazes ``chosen``, by anything that indexes an array."""
        return Mazes(self.pixels[chosen], self.routes[chosen])


def size_of(mazes: Mazes) -> str:
    """Height and width in pixels, as in ``"9 x 9"``."""
    return _size(mazes.pixels[0])


def images_of(pixels: Pixels, expand_range: bool = True) -> NDArray[np.float32]:
    """What a network sees of mazes (N, H, W): (N, 3, H, W), the solution turned white.

    Values are in [0, 1], or with ``expand_range`` in [-1, 1].
    """
    colours = COLOURS / np.float32(255)
    colours[SOLUTION] = colours[OPEN]
    if expand_range:
        colours = 2 * colours - 1
    return np.ascontiguousarray(colours.astype(np.float32).T[:, pixels].swapaxes(0, 1))


def pad_route(steps: list[int], length: int) -> Routes:
    """The first ``length`` of the steps, followed by waiting where there are fewer."""
    route = np.full(length, WAIT, dtype=np.int64)
    route[: len(steps)] = steps[:length]
    return route


def solve(pixels: Pixels) -> list[int]:
    """The steps of a shortest route from start to end, along the solution if one is drawn.

    Raises
    ------
    ValueError
        If there is not exactly one start and one end, or no route between them.
    """
    for name, kind in (("start (red)", START), ("end (green)", END)):
        count = int((pixels == kind).sum())
        if count != 1:
            raise ValueError(f"has {count} pixels of {name}, not 1")
    height, width = pixels.shape
    drawn = (pixels == SOLUTION).any()
    rim = np.zeros((height + 2, width + 2), dtype=np.uint8)
    rim[1:-1, 1:-1] = (pixels == SOLUTION) | (pixels == END) if drawn else pixels != WALL
    free = bytearray(rim.tobytes())
    start, end = (
        int((row + 1) * (width + 2) + column + 1)
        for row, column in (np.argwhere(pixels == kind)[0] for kind in (START, END))
    )
    moves = tuple(row * (width + 2) + column for row, column in STEPS)
    came: dict[int, int] = {}
    waiting = deque([start])
    free[start] = 0
    while waiting and end not in came:
        here = waiting.popleft()
        for step, move in enumerate(moves):
            there = here + move
            if free[there]:
                free[there] = 0
                came[there] = step
                waiting.append(there)
    if end not in came:
        raise ValueError("has no route from its start (red) to its end (green)")
    steps = []
    while end != start:
        steps.append(came[end])
        end -= moves[came[end]]
    return steps[::-1]


def _carve(size: int, random: Random) -> tuple[Pixels, list[int]]:
    """One perfect maze by depth-first search from its start, and the route to a random end.

    Only ``random.random()`` is drawn from: its values are the same in every Python.
    """
    side = size // 2
    width = side + 2
    untouched = bytearray(width * width)
    for row in range(1, side + 1):
        untouched[row * width + 1 : row * width + side + 1] = b"\1" * side

    def draw(number: int) -> int:
        return int(random.random() * number)

    row, column = divmod(draw(side * side), side)
    start = (row + 1) * width + column + 1
    moves = (-width, width, -1, 1)
    came: dict[int, int] = {}
    untouched[start] = 0
    path = [start]
    while path:
        here = path[-1]
        ways = [step for step in range(4) if untouched[here + moves[step]]]
        if not ways:
            path.pop()
            continue
        step = ways[draw(len(ways))]
        there = here + moves[step]
        untouched[there] = 0
        came[there] = step
        path.append(there)

    pixels = np.full((size, size), WALL, dtype=np.uint8)
    cells = np.array([start, *came])
    rows, columns = 2 * (cells // width) - 1, 2 * (cells % width) - 1
    pixels[rows, columns] = OPEN
    back = np.array(STEPS)[list(came.values())]
    pixels[rows[1:] - back[:, 0], columns[1:] - back[:, 1]] = OPEN

    here = list(came)[draw(len(came))]
    steps = []
    while here != start:
        steps += [came[here]] * 2
        here -= moves[came[here]]
    steps.reverse()
    at_row, at_column = int(rows[0]), int(columns[0])
    pixels[at_row, at_column] = START
    for step in steps:
        at_row, at_column = at_row + STEPS[step][0], at_column + STEPS[step][1]
        pixels[at_row, at_column] = SOLUTION
    pixels[at_row, at_column] = END
    return pixels, steps


def check_size(size: int, name: str = "size") -> None:
    """Raise ValueError for a size that no maze is made of; ``name`` is that of the argument."""
    if size < SMALLEST or size % 2 == 0:
        raise ValueError(f"{name} is {size}; it takes odd numbers >= {SMALLEST}, as in 19")


def _stream(size: int, seed: str) -> Iterator[tuple[Pixels, list[int]]]:
    random = Random(f"{size} {seed}")
    while True:
        yield _carve(size, random)


def generate(number: int, size: int, seed: int = 0, route_length: int = ROUTE_LENGTH) -> Mazes:
    """Make perfect mazes: every two open pixels are joined by exactly one route.

    Parameters
    ----------
    number
        How many.
    size
        Pixels a side: odd, at least 5. Cells lie at odd rows and columns, so a maze of 19 pixels
        has 9 x 9 cells.
    seed
        The same seed gives the same mazes on every machine; start and end are random cells.
    route_length
        Steps a route is cut or padded to.

    Raises
    ------
    ValueError
        For a size that is even or too small.
    """
    check_size(size)
    stream = _stream(size, str(seed))
    return _gather([next(stream) for _ in range(number)], size, route_length)


def _gather(made: list[tuple[Pixels, list[int]]], size: int, route_length: int) -> Mazes:
    pixels = np.array([maze for maze, _ in made], dtype=np.uint8).reshape(-1, size, size)
    routes = np.array([pad_route(steps, route_length) for _, steps in made], dtype=np.int64)
    return Mazes(pixels, routes.reshape(-1, route_length))


def split(
    training: int, held_out: int, size: int, seed: int = 0, route_length: int = ROUTE_LENGTH
) -> tuple[Mazes, Mazes]:
    """Mazes to train on, and others to test on that no turn or mirror image of them equals.

    Raises
    ------
    ValueError
        For a bad size, or one that has too few different mazes.
    """
    check_size(size)
    stream = _stream(size, f"{seed} test")
    test = [next(stream) for _ in range(held_out)]
    unseen = {image for maze, _ in test for image in _symmetries(maze)}
    stream = _stream(size, f"{seed} train")
    train: list[tuple[Pixels, list[int]]] = []
    for _ in range(ATTEMPTS * training):
        if len(train) == training:
            break
        maze, steps = next(stream)
        if maze.tobytes() not in unseen:
            train.append((maze, steps))
    if len(train) < training:
        raise ValueError(
            f"there are hardly any mazes of {size} x {size} pixels besides the {held_out} held "
            "out; take larger ones"
        )
    return _gather(train, size, route_length), _gather(test, size, route_length)


def _symmetries(maze: Pixels) -> list[bytes]:
    turned = [np.rot90(maze, turns) for turns in range(4)]
    return [image.tobytes() for turn in turned for image in (turn, turn[:, ::-1])]


def augment(mazes: Mazes, random: np.random.Generator) -> Mazes:
    """Turn mazes by 90 degrees left or right and mirror them both ways, each with probability
    1/2, and their routes with them. Only square mazes are turned."""
    pixels, routes = mazes.pixels.copy(), mazes.routes.copy()
    draws = random.random((4, len(pixels)))
    if pixels.shape[1] == pixels.shape[2]:
        turn, left = draws[0] < 0.5, draws[1] < 0.5
        for chosen, turns, table in (
            (turn & left, 1, TURNED_LEFT),
            (turn & ~left, -1, TURNED_RIGHT),
        ):
            pixels[chosen] = np.rot90(pixels[chosen], turns, axes=(1, 2))
            routes[chosen] = table[routes[chosen]]
    for chosen, axis, table in ((draws[2] < 0.5, 2, LEFT_RIGHT), (draws[3] < 0.5, 1, UP_DOWN)):
        pixels[chosen] = np.flip(pixels[chosen], axis)
        routes[chosen] = table[routes[chosen]]
    return Mazes(pixels, routes)


def import_pillow() -> Any:
    """Pillow's module for images, or an error that says how to install it."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'PNG files need pillow, which is not installed: pip install "ml-networks[train]"',
            name="PIL",
        ) from error
    return Image


def save_folder(mazes: Mazes, folder: Path) -> None:
    """Write mazes as ``folder/<height>x<width>/<number>.png``, with their solutions in blue."""
    image = import_pillow()
    folder = folder / "x".join(map(str, mazes.pixels.shape[1:]))
    for number, maze in enumerate(mazes.pixels):
        content = io.BytesIO()
        image.fromarray(COLOURS[maze]).save(content, format="PNG")
        write_atomically(folder / f"{number}.png", content.getvalue())


def load_folder(folder: Path, route_length: int = ROUTE_LENGTH) -> list[Mazes]:
    """Read every PNG file under a folder: the mazes of each size, the smallest first, by path.

    Parameters
    ----------
    folder
        Searched with its subfolders, so ``train/0/0.png`` is found from ``train``. The files
        side by side in one folder are of one size.
    route_length
        Steps a route is cut or padded to.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or no PNG file in it.
    ValueError
        If a file is no maze, has no route, or is not of the size of the first beside it; the
        message names the file.
    ModuleNotFoundError
        If pillow is not installed.
    """
    image = import_pillow()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    paths = sorted(folder.rglob("*.png"))
    if not paths:
        raise FileNotFoundError(f"there are no PNG files in {folder}")
    read: dict[tuple[int, ...], list[tuple[Pixels, Routes]]] = {}
    beside: dict[Path, tuple[Path, Pixels]] = {}
    for path in paths:
        try:
            with image.open(path) as file:
                colours = np.asarray(file.convert("RGB"))
        except OSError as error:
            raise ValueError(f"{path} is not a whole PNG file: {error}") from error
        kinds = KINDS[(colours >= 128) @ np.array([4, 2, 1], dtype=np.uint8)]
        if (kinds == 255).any():
            row, column = np.argwhere(kinds == 255)[0]
            raise ValueError(
                f"{path} is not a maze: pixel ({row}, {column}) is "
                f"{tuple(colours[row, column].tolist())}, none of black, white, red, green, blue"
            )
        first, other = beside.setdefault(path.parent, (path, kinds))
        if kinds.shape != other.shape:
            raise ValueError(
                f"{path} has {_size(kinds)} pixels and {first} {_size(other)}: all mazes "
                "of a folder must have one size; give each size a folder of its own"
            )
        try:
            route = pad_route(solve(kinds), route_length)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error
        read.setdefault(kinds.shape, []).append((kinds, route))
    return [
        Mazes(*(np.stack(arrays) for arrays in zip(*read[shape], strict=True)))
        for shape in sorted(read)
    ]


def _size(pixels: Pixels) -> str:
    return " x ".join(map(str, pixels.shape))
