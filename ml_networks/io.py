"""Arrays in blosc2 files and weights in safetensors files.

Both kinds of file are written beside their destination and moved into place, so a reader sees
the old file or the whole new one, never half of it. Reading either kind executes no code.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import ArrayLike

    StrPath = str | os.PathLike[str]

__all__ = ["load_blosc2", "load_weights", "save_blosc2", "save_weights"]

_ARRAY_LAYER = "__pack_tensor__"  # what blosc2.pack_array2, hence 0.2.6, calls it
_DTYPE_LAYER = "ml_networks_dtype"
_METADATA_KEY = "ml_networks"


def save_blosc2(x: ArrayLike | torch.Tensor, path: StrPath) -> None:
    """Compress an array into one file with blosc2.

    Parameters
    ----------
    x
        Array, torch tensor or JAX array of any shape and strides. NumPy has no bfloat16 (nor
        float8): such values are stored as float32, which holds them exactly.
    path
        Destination, by custom ``*.blosc2``. Its folders are created. The two arguments may be
        given in either order, because 0.2.6 had ``save_blosc2(path, x)``.

    Raises
    ------
    TypeError
        If not exactly one argument is a path, or the array holds Python objects.
    """
    if _is_path(x) == _is_path(path):
        raise TypeError(
            f"save_blosc2 takes an array and a path, got {type(x).__name__} and "
            f"{type(path).__name__}"
        )
    if _is_path(x):
        x, path = path, x  # type: ignore[assignment]
    blosc2 = _import_blosc2()
    array, dtype_name = _as_numpy(x)
    if array.dtype.hasobject:
        raise TypeError(
            f"x has dtype {array.dtype}: Python objects cannot be saved; convert it to numbers"
        )
    flat = np.ascontiguousarray(array).reshape(-1)
    chunks = blosc2.SChunk(
        chunksize=_chunk_bytes(flat),
        data=flat.view(np.uint8),
        cparams={"typesize": min(flat.itemsize, 255)},
    )
    dtype = array.dtype.descr if array.dtype.kind == "V" else array.dtype.str
    chunks.vlmeta[_ARRAY_LAYER] = ("numpy", array.shape, dtype)
    if dtype_name != array.dtype.name:
        chunks.vlmeta[_DTYPE_LAYER] = dtype_name
    write_atomically(path, chunks.to_cframe())


def load_blosc2(path: StrPath) -> np.ndarray[Any, Any]:
    """Read an array written by :func:`save_blosc2`, of this version or of 0.2.6.

    Nothing in the file is executed or unpickled: the values are raw numbers, and of the metadata
    only plain strings and integers are accepted.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is torn, is not a blosc2 array or holds anything but plain numbers.
    """
    return load_blosc2_with_dtype(path)[0]


def load_blosc2_with_dtype(path: StrPath) -> tuple[np.ndarray[Any, Any], str]:
    """Read an array and the name of the dtype that it had before it was saved.

    The name differs from that of the array's dtype where NumPy lacks the type (``bfloat16``).
    """
    import msgpack

    blosc2 = _import_blosc2()
    frame = Path(path).read_bytes()
    # schunk_from_cframe trusts the length that the header states.
    if len(frame) < 32 or len(frame) != int.from_bytes(frame[16:24], "big"):
        raise ValueError(f"{path} is not a blosc2 array, or was cut short ({len(frame)} bytes)")
    try:
        chunks = blosc2.schunk_from_cframe(frame)
        layers = chunks.vlmeta
        # Going round vlmeta[...]: blosc2 would build whatever object the bytes describe, among
        # them user-defined functions from their source.
        header = msgpack.unpackb(layers.get_vlmeta(_ARRAY_LAYER))
        dtype, shape = _checked_header(header, chunks.nbytes)
        array = np.empty(math.prod(shape), dtype)
        if array.nbytes:
            chunks.get_slice(out=array.view(np.uint8))
        name = dtype.name
        if _DTYPE_LAYER in layers:
            name = msgpack.unpackb(layers.get_vlmeta(_DTYPE_LAYER))
    except Exception as error:  # what arbitrary bytes make NumPy, msgpack and blosc2 raise
        raise ValueError(f"{path} is not an array that save_blosc2 wrote: {error}") from error
    return array.reshape(shape), str(name)


def save_weights(
    weights: Mapping[str, ArrayLike | torch.Tensor],
    path: StrPath,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write named tensors, with JSON metadata, as one safetensors file.

    Parameters
    ----------
    weights
        For example ``module.state_dict()``. All values torch tensors, or all of them arrays
        (NumPy or JAX). Tensors that share memory are written once each.
    path
        Destination, by custom ``*.safetensors``. Its folders are created.
    metadata
        Anything that :func:`json.dumps` takes.
    """
    text = {_METADATA_KEY: json.dumps(dict(metadata or {}))}
    torch = sys.modules.get("torch")
    tensors = [
        name
        for name, value in weights.items()
        if torch is not None and isinstance(value, torch.Tensor)
    ]
    if tensors and len(tensors) < len(weights):
        array = next(name for name in weights if name not in tensors)
        raise TypeError(f"weights mixes torch tensors ({tensors[0]!r}) and arrays ({array!r})")
    if tensors:
        from safetensors.torch import save

        owned: set[int] = set()
        contiguous = {}
        for name, value in weights.items():
            tensor = value.detach().cpu().contiguous()  # type: ignore[union-attr]
            storage = tensor.untyped_storage()
            if storage.data_ptr() in owned or storage.nbytes() != tensor.nbytes:
                tensor = tensor.clone()
            owned.add(tensor.untyped_storage().data_ptr())
            contiguous[name] = tensor
        content = save(contiguous, metadata=text)
    else:
        from safetensors.numpy import save as save_arrays

        arrays = {name: np.ascontiguousarray(value) for name, value in weights.items()}
        shaped = {name: a.reshape(np.shape(weights[name])) for name, a in arrays.items()}
        content = save_arrays(shaped, metadata=text)
    write_atomically(path, content)


def load_weights(path: StrPath, framework: str = "torch") -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a safetensors file.

    Parameters
    ----------
    path
        Written by :func:`save_weights` or by anything else that writes safetensors.
    framework
        ``"torch"`` for tensors on the CPU, ``"numpy"`` for arrays.

    Returns
    -------
    weights, metadata
        The named tensors, and the metadata given to :func:`save_weights` (``{}`` if none).

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is torn or is not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    if framework not in {"torch", "numpy"}:
        raise ValueError(f"framework is {framework!r}; it takes 'torch' or 'numpy'")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    try:
        with safe_open(path, framework="pt" if framework == "torch" else "np") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text = (file.metadata() or {}).get(_METADATA_KEY, "{}")
        metadata = json.loads(text)
        if not isinstance(metadata, dict):
            raise ValueError(f"its metadata is {text[:40]!r}, not a mapping")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return weights, metadata


def write_atomically(path: StrPath, content: bytes) -> None:
    """Write ``content`` to ``path`` so that ``path`` never holds a part of it.

    The folders of ``path`` are created. When writing fails the file keeps what it had.
    """
    destination = Path(path)
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, destination)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


def _import_blosc2() -> Any:
    try:
        import blosc2
    except ImportError as error:
        raise ImportError(
            "blosc2 files need the blosc2 package: pip install 'ml-networks[torch]' or "
            "'ml-networks[jax]'"
        ) from error
    return blosc2


def _as_numpy(x: Any) -> tuple[np.ndarray[Any, Any], str]:
    """Return ``x`` as an array that NumPy knows, and the name of the dtype it came with."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        name = str(x.dtype).removeprefix("torch.")
        try:
            return x.numpy(), name
        except TypeError:
            return x.float().numpy(), name
    array = np.asarray(x)
    if array.dtype.kind == "V" and array.dtype.names is None:
        return array.astype(np.float32), array.dtype.name
    return array, array.dtype.name


def _chunk_bytes(flat: np.ndarray[Any, Any]) -> int:
    """Return blosc2's chunk size: all of the array, but at most about 256 MiB."""
    items = min(max(flat.size, 1), max(2**28 // flat.itemsize, 1))
    return int(items * flat.itemsize)


def _checked_header(header: Any, n_bytes: int) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return dtype and shape; raise unless they describe ``n_bytes`` of plain numbers."""
    kind, shape, descr = _untupled(header)
    shape = tuple(shape)
    if kind not in {"numpy", "torch", "tensorflow"}:
        raise ValueError(f"it holds a {kind!r}")
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"its shape is {shape}")
    dtype = np.lib.format.descr_to_dtype(descr)
    # Raw bytes taken for object pointers would be memory that the file's author chose.
    if dtype.hasobject:
        raise ValueError(f"its dtype {dtype} holds Python objects")
    if math.prod(shape) * dtype.itemsize != n_bytes:
        raise ValueError(f"{n_bytes} bytes do not make shape {shape} of {dtype}")
    return dtype, shape


def _untupled(value: Any) -> Any:
    """Undo blosc2's spelling of a tuple in msgpack: a list that starts with ``__tuple__``."""
    if not isinstance(value, list):
        return value
    items = [_untupled(item) for item in value]
    return tuple(items[1:]) if items and items[0] == "__tuple__" else items
