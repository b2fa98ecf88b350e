from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ml_networks.tasks.mazes import data
from ml_networks.tasks.mazes.data import (
    COLOURS,
    END,
    OPEN,
    SOLUTION,
    START,
    WAIT,
    WALL,
    Mazes,
    augment,
    generate,
    images_of,
    load_folder,
    save_folder,
    size_of,
    solve,
    split,
)

Image = pytest.importorskip("PIL.Image", reason="pillow, which reads PNG, is not installed")

MOVES = {0: (-1, 0), 1: (1, 0), 2: (0, -1), 3: (0, 1)}  # up, down, left, right


def distances(free: NDArray[np.bool_], start: tuple[int, int]) -> NDArray[np.int64]:
    """Steps from ``start`` by flooding, -1 where it does not get. The rim is not free."""
    distance = np.full(free.shape, -1)
    distance[start] = 0
    for step in range(1, free.size):
        front = distance == step - 1
        shifts = ((0, 1), (0, -1), (1, 1), (1, -1))
        wider = np.any([np.roll(front, shift, axis) for axis, shift in shifts], axis=0)
        wider &= free & (distance < 0)
        if not wider.any():
            break
        distance[wider] = step
    return distance


def only(pixels: NDArray[np.uint8], kind: int) -> tuple[int, int]:
    ((row, column),) = np.argwhere(pixels == kind)
    return int(row), int(column)


def walk(pixels: NDArray[np.uint8], route: NDArray[np.int64]) -> list[tuple[int, int]]:
    """The pixels that a route goes through, the start first."""
    places = [only(pixels, START)]
    for step in route:
        if step != WAIT:
            row, column = places[-1]
            places.append((row + MOVES[step][0], column + MOVES[step][1]))
    return places


# --- the generator --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 9, 19, 21])
def test_mazes_are_perfect(size: int) -> None:
    """All cells are open and joined, with one wall fewer broken than there are cells."""
    for pixels in generate(20, size, seed=1, route_length=1000).pixels:
        free = pixels != WALL
        assert free[1::2, 1::2].all()
        assert not free[::2, ::2].any()
        assert not free[[0, -1]].any()
        assert not free[:, [0, -1]].any()
        assert free.sum() == 2 * (size // 2) ** 2 - 1
        assert (distances(free, only(pixels, START))[free] >= 0).all()


@pytest.mark.parametrize("size", [5, 9, 19])
def test_routes_are_shortest_and_drawn(size: int) -> None:
    mazes = generate(20, size, seed=2, route_length=500)
    assert mazes.routes.dtype == np.int64
    for pixels, route in zip(mazes.pixels, mazes.routes, strict=True):
        places = walk(pixels, route)
        assert places[-1] == only(pixels, END)
        assert len(places) - 1 == distances(pixels != WALL, places[0])[places[-1]]
        assert (route[len(places) - 1 :] == WAIT).all()
        assert not (route[: len(places) - 1] == WAIT).any()
        drawn = {(int(row), int(column)) for row, column in np.argwhere(pixels == SOLUTION)}
        assert drawn == set(places[1:-1])


def test_routes_are_cut() -> None:
    whole, cut = (generate(5, 19, seed=3, route_length=n).routes for n in (300, 7))
    assert (cut == whole[:, :7]).all()


def test_a_seed_gives_the_same_mazes_everywhere() -> None:
    mazes = generate(30, 19, seed=7)
    digest = hashlib.sha256(mazes.pixels.tobytes() + mazes.routes.astype("<i8").tobytes())
    assert digest.hexdigest() == "46a8e159955bfd37640a78e8e6593365689c2e55733ce3edd0d93e9b09f6bcbc"
    assert (generate(10, 19, seed=7).pixels == mazes.pixels[:10]).all()
    assert not (generate(30, 19, seed=8).pixels == mazes.pixels).all((1, 2)).any()


def test_starts_and_ends_are_anywhere() -> None:
    mazes = generate(400, 5, seed=0)
    for kind in (START, END):
        counts = Counter(only(pixels, kind) for pixels in mazes.pixels)
        assert len(counts) == 4
        assert min(counts.values()) > 70  # 100 expected


def test_no_held_out_maze_is_trained_on() -> None:
    """Of 3 x 3 cells there are so few mazes that the two sets would meet."""
    training, held_out = split(400, 60, 7, seed=0)
    assert len(training.routes) == 400
    seen = {pixels.tobytes() for pixels in training.pixels}
    turned = [augment(held_out, np.random.default_rng(n)).pixels for n in range(60)]
    assert not seen & {pixels.tobytes() for pixels in np.concatenate(turned)}
    alike = generate(400, 7, seed=1).pixels
    assert {p.tobytes() for p in alike} & {p.tobytes() for p in np.concatenate(turned)}
    with pytest.raises(ValueError, match="hardly any mazes of 5 x 5 pixels besides the 400"):
        split(10, 400, 5)


@pytest.mark.parametrize("size", [0, 3, 8, -5])
def test_bad_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=f"^size is {size}; it takes odd numbers >= 5"):
        generate(1, size)
    with pytest.raises(ValueError, match=f"^size is {size}; it takes odd numbers >= 5"):
        split(1, 1, size)


# --- what a network sees --------------------------------------------------------------------


def test_images() -> None:
    pixels = np.array([[[WALL, OPEN, START], [END, SOLUTION, WALL]]], dtype=np.uint8)
    red, green, blue = images_of(pixels, expand_range=False)[0]
    assert red.tolist() == [[0, 1, 1], [0, 1, 0]]
    assert green.tolist() == [[0, 1, 0], [1, 1, 0]]
    assert blue.tolist() == [[0, 1, 0], [0, 1, 0]]
    expanded = images_of(pixels)
    assert expanded.dtype == np.float32
    assert expanded.flags.c_contiguous
    assert (expanded[0] == 2 * np.stack([red, green, blue]) - 1).all()


def test_augmentation_turns_the_routes_too() -> None:
    mazes = generate(300, 9, seed=4, route_length=40)
    before = mazes.pixels.copy()
    result = augment(mazes, np.random.default_rng(0))
    assert (mazes.pixels == before).all()
    kinds = Counter()
    for old, pixels, route in zip(before, result.pixels, result.routes, strict=True):
        assert data.pad_route(solve(pixels), 40).tolist() == route.tolist()
        turned = [np.rot90(old, n) for n in range(4)] + [np.rot90(old.T, n) for n in range(4)]
        kinds[[(image == pixels).all() for image in turned].index(True)] += 1
    # Turned with probability 1/2, mirrored both ways with 1/2 each: all eight are as likely.
    assert len(kinds) == 8
    assert min(kinds.values()) > 18  # 37.5 expected


def test_augmentation_of_a_rectangle() -> None:
    pixels = np.full((50, 3, 5), WALL, dtype=np.uint8)
    pixels[:, 1, 1:4] = START, SOLUTION, END
    result = augment(Mazes(pixels, np.array([[3, 3]] * 50)), np.random.default_rng(0))
    assert result.pixels.shape == (50, 3, 5)
    assert {tuple(route) for route in result.routes.tolist()} == {(3, 3), (2, 2)}


# --- folders of PNG files -------------------------------------------------------------------


def write(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(COLOURS[pixels]).save(path)


def test_folders(tmp_path: Path) -> None:
    mazes = generate(12, 9, seed=5, route_length=30)
    save_folder(mazes, tmp_path / "train")
    names = {f"{number}.png" for number in range(12)}
    assert {path.name for path in (tmp_path / "train" / "9x9").iterdir()} == names
    with Image.open(tmp_path / "train" / "9x9" / "3.png") as image:
        assert image.mode == "RGB"
        assert (np.asarray(image) == COLOURS[mazes.pixels[3]]).all()
    (read,) = load_folder(tmp_path / "train", 30)
    order = sorted(range(12), key=str)
    assert (read.pixels == mazes.pixels[order]).all()
    assert (read.routes == mazes.routes[order]).all()
    assert (load_folder(tmp_path, 4)[0].routes == mazes.routes[order][:, :4]).all()


def test_folders_of_several_sizes(tmp_path: Path) -> None:
    """One size a folder, whatever its name; folders of the same size are one."""
    parts = {"b": (11, 1), "a/0": (9, 2), "a": (21, 3), "c": (9, 4)}
    for name, (size, seed) in parts.items():
        for number, pixels in enumerate(generate(2, size, seed).pixels):
            write(tmp_path / name / f"{number}.png", pixels)
    read = load_folder(tmp_path, 30)
    assert [size_of(mazes) for mazes in read] == ["9 x 9", "11 x 11", "21 x 21"]
    expected = [generate(2, 9, 2, 30), generate(2, 9, 4, 30)]
    assert (read[0].pixels == np.concatenate([mazes.pixels for mazes in expected])).all()
    assert (read[0].routes == np.concatenate([mazes.routes for mazes in expected])).all()
    assert (read[2].pixels == generate(2, 21, 3).pixels).all()


def test_mazes_of_others(tmp_path: Path) -> None:
    """Without a drawn solution; with a palette; not square; with a solution that is a detour."""
    (pixels,), (route,) = generate(1, 9, seed=6, route_length=30)
    undrawn = np.where(pixels == SOLUTION, OPEN, pixels)
    write(tmp_path / "a" / "0.png", undrawn)
    Image.fromarray(COLOURS[pixels]).convert("P").save(tmp_path / "a" / "1.png")
    assert load_folder(tmp_path / "a", 30)[0].routes.tolist() == [route.tolist()] * 2

    detour = np.full((4, 6), WALL, dtype=np.uint8)
    detour[1, 1:5] = START, OPEN, OPEN, END
    detour[2, 1:5] = SOLUTION
    write(tmp_path / "b" / "0.png", detour)
    assert load_folder(tmp_path / "b", 6)[0].routes.tolist() == [[1, 3, 3, 3, 0, WAIT]]
    detour[2, 1:5] = OPEN
    assert solve(detour) == [3, 3, 3]


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_folder(tmp_path / "none")
    (tmp_path / "empty" / "0").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="there are no PNG files in"):
        load_folder(tmp_path / "empty")

    pixels = generate(1, 9).pixels[0]
    row, column = walk(pixels, generate(1, 9).routes[0])[1]
    blocked = pixels.copy()
    blocked[row, column] = WALL
    two = pixels.copy()
    two[0, 0] = START
    startless = np.where(pixels == START, OPEN, pixels)
    for name, bad, message in (
        ("blocked", blocked, "0.png has no route from its start"),
        ("two", two, r"0.png has 2 pixels of start \(red\), not 1"),
        ("startless", startless, r"0.png has 0 pixels of start \(red\), not 1"),
        ("endless", np.where(pixels == END, OPEN, pixels), r"has 0 pixels of end \(green\)"),
    ):
        write(tmp_path / name / "0.png", bad)
        with pytest.raises(ValueError, match=message):
            load_folder(tmp_path / name)

    colours = COLOURS[pixels].copy()
    colours[2, 3] = 255, 255, 0
    (tmp_path / "yellow").mkdir()
    Image.fromarray(colours).save(tmp_path / "yellow" / "0.png")
    with pytest.raises(ValueError, match=r"pixel \(2, 3\) is \(255, 255, 0\), none of black"):
        load_folder(tmp_path / "yellow")

    write(tmp_path / "sizes" / "0.png", pixels)
    write(tmp_path / "sizes" / "1.png", generate(1, 11).pixels[0])
    with pytest.raises(ValueError, match=r"1.png has 11 x 11 pixels and .*0.png 9 x 9"):
        load_folder(tmp_path / "sizes")

    content = (tmp_path / "sizes" / "0.png").read_bytes()
    (tmp_path / "torn").mkdir()
    for torn in (content[: len(content) // 2], b""):
        (tmp_path / "torn" / "0.png").write_bytes(torn)
        with pytest.raises(ValueError, match=r"0\.png is not a whole PNG file"):
            load_folder(tmp_path / "torn")
