from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import blosc2
import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ml_networks import load_blosc2, save_blosc2
from ml_networks.io import load_blosc2_with_dtype, load_weights, save_weights, write_atomically

GOLDEN = Path(__file__).parent / "golden" / "data"

ARRAYS = {
    "float32": np.random.default_rng(0).standard_normal((5, 3, 4)).astype(np.float32),
    "transposed": np.arange(6).reshape(2, 3).T,
    "reversed": np.arange(10, dtype=np.int16)[::-2],
    "scalar": np.array(3.5),
    "empty": np.zeros((0, 3)),
    "complex": np.arange(5, dtype=np.complex64) * 1j,
    "bool": np.array([True, False]),
    "float16": np.arange(4, dtype=np.float16),
    "text": np.array(["a", "bc"]),
    "record": np.array([(1, 2.0), (3, 4.0)], dtype=[("a", "i4"), ("b", "f8")]),
    "big-endian": np.arange(5, dtype=">i4"),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_blosc2_round_trip(array: np.ndarray[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x.blosc2"
    save_blosc2(array, path)
    loaded = load_blosc2(path)
    assert loaded.dtype == array.dtype
    assert loaded.shape == array.shape
    np.testing.assert_array_equal(loaded, array)
    loaded.flags.writeable = True


def test_both_argument_orders(tmp_path: Path) -> None:
    array = np.arange(6.0).reshape(2, 3)
    save_blosc2(array, str(tmp_path / "a.blosc2"))
    save_blosc2(str(tmp_path / "b.blosc2"), array)
    assert (tmp_path / "a.blosc2").read_bytes() == (tmp_path / "b.blosc2").read_bytes()
    for arguments in ((array, array), ("a", "b")):
        with pytest.raises(TypeError, match="an array and a path"):
            save_blosc2(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_torch_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randn(4, 6).mul(10).to(dtype)[:, ::2].T
    if dtype.is_floating_point:
        tensor.requires_grad_()
    save_blosc2(tensor, tmp_path / "x.blosc2")
    array, name = load_blosc2_with_dtype(tmp_path / "x.blosc2")
    assert getattr(torch, name) is dtype
    assert torch.equal(torch.from_numpy(array).to(dtype), tensor)


def test_files_of_the_published_version_load(tmp_path: Path) -> None:
    expected = np.arange(12.0).reshape(3, 4)
    array = load_blosc2(GOLDEN / "numpy.blosc2")
    assert array.dtype == np.float64
    np.testing.assert_array_equal(array, expected)
    # It had packed a torch tensor as such.
    np.testing.assert_array_equal(load_blosc2(GOLDEN / "torch.blosc2"), expected)
    save_blosc2(expected, tmp_path / "x.blosc2")
    np.testing.assert_array_equal(
        blosc2.unpack_array2((tmp_path / "x.blosc2").read_bytes()), expected
    )


def test_python_objects_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Python objects"):
        save_blosc2(np.array([{}, []], dtype=object), tmp_path / "x.blosc2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [0, 1, 31, 100, 336])
def test_a_torn_file(length: int, tmp_path: Path) -> None:
    path = tmp_path / "torn.blosc2"
    path.write_bytes((GOLDEN / "numpy.blosc2").read_bytes()[:length])
    with pytest.raises(ValueError, match=r"torn\.blosc2 is not a blosc2 array, or was cut short"):
        load_blosc2(path)


def test_something_else_than_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_blosc2(tmp_path / "none.blosc2")
    (tmp_path / "text.blosc2").write_text("This is a text, long enough to hold a header.")
    with pytest.raises(ValueError, match="not a blosc2 array"):
        load_blosc2(tmp_path / "text.blosc2")


def _frame(header: Any, data: bytes = bytes(32), raw: bytes | None = None) -> bytes:
    chunks = blosc2.SChunk(chunksize=len(data), data=data, cparams={"typesize": 8})
    content = msgpack.packb(header) if raw is None else raw
    # The C library's own call, which stores any bytes.
    super(type(chunks.vlmeta), chunks.vlmeta).set_vlmeta("__pack_tensor__", content)
    return chunks.to_cframe()


def _lazy_function(marker: Path) -> bytes:
    """A header that blosc2's own reader would turn into a function, by running its source."""
    source = f"open({str(marker)!r}, 'w')\ndef f(x, y, z): pass"
    payload = {
        "kind": "lazyudf",
        "version": 1,
        "udf": {"source": source, "name": "f"},
        "function_kind": "dsl",
        "udf_source": source,
        "name": "f",
        "dtype": "<f8",
        "shape": [4],
        "operands": {},
        "kwargs": {},
    }
    return msgpack.packb(msgpack.ExtType(43, msgpack.packb(payload)))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (["__tuple__", "numpy", ["__tuple__", 4], "|O"], "Python objects"),
        (["__tuple__", "numpy", ["__tuple__", 4], [["a", "|O"]]], "Python objects"),
        (["__tuple__", "numpy", ["__tuple__", 9], "<f8"], "32 bytes do not make"),
        (["__tuple__", "numpy", ["__tuple__", -4], "<f8"], r"shape is \(-4,\)"),
        (["__tuple__", "numpy", ["__tuple__", 1 << 40], "<f8"], "do not make"),
        (["__tuple__", "numpy", ["__tuple__", 4], "os.system"], "not an array"),
        (["__tuple__", "numpy", ["__tuple__", 4], ",1"], "not an array"),
        (["__tuple__", "pickle", ["__tuple__", 4], "<f8"], "holds a 'pickle'"),
        ({"a": 1}, "not an array"),
        ("numpy", "not an array"),
        (None, "not an array"),
    ],
)
def test_hostile_headers(header: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.blosc2"
    path.write_bytes(_frame(header))
    with pytest.raises(ValueError, match=message):
        load_blosc2(path)


def test_no_object_is_built_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("blosc2 was asked to build an object")

    for name in ("_decode_msgpack_ext", "_decode_structured_reference", "msgpack_unpackb"):
        monkeypatch.setattr(f"blosc2.msgpack_utils.{name}", build)
    monkeypatch.setattr("blosc2.schunk.msgpack_unpackb", build)
    monkeypatch.setattr("pickle.loads", build)
    path = tmp_path / "x.blosc2"
    path.write_bytes(_frame(None, raw=_lazy_function(tmp_path / "marker")))
    with pytest.raises(ValueError, match="not an array"):
        load_blosc2(path)
    assert not (tmp_path / "marker").exists()
    save_blosc2(np.arange(3.0), path)
    assert load_blosc2(path).tolist() == [0.0, 1.0, 2.0]


FUZZ = """
import random, sys
from pathlib import Path
from ml_networks import load_blosc2
content, path = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
draw = random.Random(0)
refused = 0
for _ in range(400):
    broken = bytearray(content)
    for _ in range(draw.choice([1, 2, 5])):
        broken[draw.randrange(len(broken))] = draw.randrange(256)
    path.write_bytes(broken)
    try:
        load_blosc2(path)
    except ValueError:
        refused += 1
print(refused)
"""


def test_damaged_bytes_never_crash(tmp_path: Path) -> None:
    """In a process of its own, since a crash would take the test run with it."""
    arguments = [sys.executable, "-c", FUZZ, GOLDEN / "numpy.blosc2", tmp_path / "x.blosc2"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 100


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_weights_round_trip(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    weights = {
        "a.weight": base,
        "tied": base,
        "transposed": base.T,
        "slice": base[1:, ::2],
        "half": torch.randn(3).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 2),
        "learned": torch.nn.Parameter(torch.randn(2)),
    }
    metadata = {"epoch": 3, "config": {"channels": [1, 2], "name": "網"}}
    path = tmp_path / "new" / "weights.safetensors"
    save_weights(weights, path, metadata)
    loaded, found = load_weights(path)
    assert found == metadata
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert loaded[name].dtype is tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_weights_of_numpy_and_torch(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.float32(2.0)}
    save_weights(arrays, path)
    loaded, metadata = load_weights(path, "numpy")
    assert metadata == {}
    assert loaded["b"].shape == ()
    np.testing.assert_array_equal(loaded["a"], arrays["a"])
    assert load_weights(path)[0]["a"].tolist() == arrays["a"].tolist()
    with pytest.raises(TypeError, match="mixes torch tensors"):
        save_weights({"a": torch.zeros(2), "b": np.zeros(2)}, path)
    with pytest.raises(ValueError, match="'jax'; it takes 'torch' or 'numpy'"):
        load_weights(path, "jax")


def test_torn_and_foreign_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights({"a": torch.randn(100)}, path)
    content = path.read_bytes()
    for length in (0, 5, 60, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"weights\.safetensors is not a whole safetensors"):
            load_weights(path)
    for metadata in ("[1]", "{"):
        save_file({"a": torch.zeros(2)}, path, {"ml_networks": metadata})
        with pytest.raises(ValueError, match="not a whole safetensors"):
            load_weights(path)
    path.write_bytes(random.Random(0).randbytes(500))
    with pytest.raises(ValueError, match="not a whole safetensors"):
        load_weights(path)
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load_weights(tmp_path / "none")


def test_the_packages_are_imported_only_when_used() -> None:
    code = (
        "import sys, ml_networks.io; print(*({'blosc2', 'torch', 'msgpack'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
