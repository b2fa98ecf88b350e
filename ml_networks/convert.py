"""Weights between torch and JAX, by explicit maps, and back without a loss.

A checkpoint has torch's keys and layouts whichever framework wrote it, so one safetensors file
(:func:`ml_networks.io.save_weights`) serves both. Each JAX module states in ``torch_names`` how
its children are called in torch; the few classes with arrays of their own are listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ml_networks._compat import did_you_mean

if TYPE_CHECKING:
    from flax import nnx
    from torch import nn

__all__ = ["from_026_jax", "jax_to_torch", "state_dict", "torch_to_jax"]

Array = np.ndarray


@dataclass(frozen=True)
class _Entry:
    """One torch key: how to read its value from a JAX module, and how to write it there."""

    key: str
    read: Callable[[], Array]
    write: Callable[[Array], None]


def torch_to_jax(source: nn.Module | Mapping[str, Any], module: nnx.Module) -> nnx.Module:
    """Copy torch weights into a JAX module, in place.

    Parameters
    ----------
    source
        A torch module, or its state dict (tensors or NumPy arrays).
    module
        The JAX module built from the same config.

    Returns
    -------
    nnx.Module
        ``module``.

    Raises
    ------
    KeyError
        For entries that are missing or too many; the message names them, nothing is changed.
    ValueError
        For an entry of another shape; nothing is changed.
    """
    given = source if isinstance(source, Mapping) else source.state_dict()
    arrays = {
        key: _to_numpy(value)
        for key, value in given.items()
        if not key.endswith("num_batches_tracked")
    }
    entries = list(_entries(module))
    _check_keys(type(module).__name__, set(arrays), {entry.key for entry in entries})
    for entry in entries:
        wanted = entry.read().shape
        if arrays[entry.key].shape != wanted:
            raise ValueError(
                f"{entry.key} has shape {arrays[entry.key].shape} and {type(module).__name__} "
                f"needs {wanted}: was it built from the same config?"
            )
    for entry in entries:
        entry.write(arrays[entry.key])
    return module


def state_dict(module: nnx.Module) -> dict[str, Array]:
    """The weights of a JAX module with torch's keys and layouts, as NumPy arrays."""
    return {entry.key: entry.read() for entry in _entries(module)}


def jax_to_torch(module: nnx.Module, target: nn.Module) -> nn.Module:
    """Copy the weights of a JAX module into a torch module, in place.

    Parameters
    ----------
    module
        The JAX module.
    target
        The torch module built from the same config.

    Returns
    -------
    nn.Module
        ``target``.

    Raises
    ------
    KeyError
        For entries that are missing or too many; nothing is changed.
    ValueError
        For an entry of another shape; nothing is changed.
    """
    import torch

    arrays = state_dict(module)
    wanted = target.state_dict()
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}
    _check_keys(type(target).__name__, set(arrays), set(wanted) - counters)
    for key, array in arrays.items():
        if tuple(wanted[key].shape) != array.shape:
            raise ValueError(
                f"{key} has shape {array.shape} and {type(target).__name__} needs "
                f"{tuple(wanted[key].shape)}: was it built from the same config?"
            )
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}
    target.load_state_dict({**{key: wanted[key] for key in counters}, **tensors})
    return target


def from_026_jax(state: Any, module: nnx.Module) -> nnx.Module:
    """Load the state of a JAX module of the published 0.2.6, in place.

    Parameters
    ----------
    state
        The ``nnx.State`` that ``nnx.state(model)`` gave, or its pure dict, as an Orbax checkpoint
        restores it. Random generators in it are left out.
    module
        The module of this version, built from the same config.

    Returns
    -------
    nnx.Module
        ``module``.

    Raises
    ------
    KeyError
        For parameters or statistics that are missing or too many; nothing is changed.
    ValueError
        For one of another shape; nothing is changed.
    """
    from flax import nnx

    given = {path: leaf for path, leaf in _flat(state).items() if "rngs" not in path}
    mine = dict(nnx.to_flat_state(nnx.state(module, (nnx.Param, nnx.BatchStat))))
    arrays = ("pe", "mask", "codebook")  # 0.2.6 kept these constants in its state
    named = {"/".join(map(str, path)): leaf for path, leaf in given.items()}
    named = {key: leaf for key, leaf in named.items() if key.split("/")[-1] not in arrays}
    known = {"/".join(map(str, path)): variable for path, variable in mine.items()}
    _check_keys(type(module).__name__, set(named), set(known))
    for key, leaf in named.items():
        if np.shape(leaf) != known[key].shape:
            raise ValueError(
                f"{key} has shape {np.shape(leaf)} and {type(module).__name__} needs "
                f"{known[key].shape}: was it built from the same config?"
            )
    for key, leaf in named.items():
        known[key][...] = leaf
    nnx.update(module, nnx.from_flat_state(mine.items()))
    return module


def _flat(state: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """The leaves of nested mappings by path; a variable counts as its value."""
    if isinstance(state, Mapping) or hasattr(state, "items"):
        found: dict[tuple[Any, ...], Any] = {}
        for name, child in state.items():
            found.update(_flat(child, (*path, name)))
        return found
    value = state[...] if hasattr(state, "get_metadata") else state
    path = path[:-1] if path and path[-1] == "value" else path
    return {path: value}


def _to_numpy(value: Any) -> Array:
    """A torch tensor, also bfloat16 or on a GPU, or an array, as a NumPy array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if value.is_floating_point() and value.dtype.itemsize == 2:
            value = value.float()
        return np.asarray(value.numpy())
    return np.asarray(value)


def _check_keys(name: str, given: set[str], wanted: set[str]) -> None:
    missing, extra = sorted(wanted - given), sorted(given - wanted)
    if not missing and not extra:
        return
    parts = []
    if missing:
        hint = did_you_mean(missing[0], extra) if extra else ""
        parts.append(f"missing: {_some(missing)}{hint}")
    if extra:
        parts.append(f"not part of it: {_some(extra)}")
    raise KeyError(f"the weights do not fit {name}; {'; '.join(parts)}")


def _some(keys: list[str], most: int = 5) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def _entries(module: Any, path: tuple[str, ...] = ()) -> Iterator[_Entry]:
    """Every torch key of ``module``, depth first. A module held twice is listed twice, as torch's
    state dict does.

    ``torch_names`` of a JAX module maps a child's name to torch's; for a list whose items are
    every nth child of a torch sequence, to (its name, the first index, n). An empty name is a
    level that torch does not have.
    """
    from flax import nnx

    own = _own_entries(module)
    if own is not None:
        for entry in own:
            yield _Entry(_key(path, entry.key), entry.read, entry.write)
        return
    names: Mapping[str, str | tuple[str, int, int]] = getattr(module, "torch_names", {})
    for name, value in vars(module).items():
        torch_name = names.get(name, name)
        if isinstance(value, nnx.List):
            sequence = (torch_name, 0, 1) if isinstance(torch_name, str) else torch_name
            for index, child in enumerate(value):
                position = sequence[1] + sequence[2] * index
                yield from _entries(child, (*path, sequence[0], str(position)))
        elif isinstance(value, nnx.Dropout):
            continue
        elif isinstance(value, nnx.Module):
            yield from _entries(value, (*path, str(torch_name)))
        elif isinstance(value, nnx.Variable) and not isinstance(value, nnx.RngState):
            yield _variable(_key(path, str(torch_name)), value)


def _key(path: tuple[str, ...], name: str) -> str:
    return ".".join(part for part in (*path, name) if part)


def _same(array: Array) -> Array:
    return array


def _variable(
    key: str,
    variable: nnx.Variable,
    to_torch: Callable[[Array], Array] = _same,
    to_jax: Callable[[Array], Array] = _same,
) -> _Entry:
    """The entry of one variable, with the change of layout both ways."""

    def read() -> Array:
        return to_torch(np.asarray(variable[...]))

    def write(array: Array) -> None:
        import jax.numpy as jnp

        # A copy: on a CPU JAX would share the memory of a torch parameter that training changes.
        variable[...] = jnp.array(to_jax(array), variable.dtype)

    return _Entry(key, read, write)


def _own_entries(module: Any) -> list[_Entry] | None:
    """The entries of a class with arrays of its own; None for a class that only has children."""
    from ml_networks.jax import distributions, hypernetworks, layers, lora, primitives

    if isinstance(module, lora.LoRALinear | lora.HyperLoRALinear):
        return _lora_entries(module)
    if isinstance(module, primitives.Linear):
        return _optional(("weight", module.kernel, np.transpose, np.transpose), module.bias)
    if isinstance(module, primitives.Conv):
        return _optional(("weight", module.kernel, _conv_to_torch, _conv_to_jax), module.bias)
    if isinstance(module, primitives.ConvTranspose):
        groups = module.groups
        return _optional(
            (
                "weight",
                module.kernel,
                lambda kernel: _transpose_to_torch(kernel, groups),
                lambda weight: _transpose_to_jax(weight, groups),
            ),
            module.bias,
        )
    if isinstance(module, primitives.Affine):
        named = {
            "weight": module.scale,
            "bias": module.bias,
            "running_mean": getattr(module, "mean", None),
            "running_var": getattr(module, "var", None),
        }
        return [_variable(key, value) for key, value in named.items() if value is not None]
    if isinstance(module, layers.MultiheadAttention):
        return _attention_entries(module)
    if isinstance(module, hypernetworks.HyperNet) and module.target_net is not None:
        return _hypernet_entries(module)
    if isinstance(module, distributions.BSQCodebook):
        return _codebook_entries(module)
    if isinstance(module, layers.PositionalEncoding):

        def write(array: Array) -> None:
            import jax.numpy as jnp

            module.pe = jnp.array(array)

        return [_Entry("pe", lambda: np.asarray(module.pe), write)]
    return None


def _optional(weight: tuple[Any, ...], bias: nnx.Variable | None) -> list[_Entry]:
    return [_variable(*weight), *([] if bias is None else [_variable("bias", bias)])]


def _conv_to_torch(kernel: Array) -> Array:
    """(*window, in, out) -> (out, in, *window)."""
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def _conv_to_jax(weight: Array) -> Array:
    return np.moveaxis(weight, (0, 1), (-1, -2))


def _transpose_to_torch(kernel: Array, groups: int) -> Array:
    """(*window, in / g, out) -> (in, out / g, *window), the window flipped."""
    *window, inner, outer = kernel.shape
    axes = tuple(range(len(window)))
    split = np.flip(kernel, axes).reshape(*window, inner, groups, outer // groups)
    moved = np.moveaxis(split, (-2, -3, -1), (0, 1, 2))
    return moved.reshape(groups * inner, outer // groups, *window)


def _transpose_to_jax(weight: Array, groups: int) -> Array:
    rows, columns, *window = weight.shape
    split = weight.reshape(groups, rows // groups, columns, *window)
    moved = np.moveaxis(split, (0, 1, 2), (-2, -3, -1))
    kernel = moved.reshape(*window, rows // groups, groups * columns)
    return np.flip(kernel, tuple(range(len(window))))


def _hypernet_entries(module: Any) -> list[_Entry]:
    """The rows of a hypernetwork's last layer are the target's parameters, flattened: in torch
    each in torch's layout, one after another by torch's names.
    """
    order = _torch_order(module)
    last = {"weight", "bias"}
    if not hasattr(module.backbone, "kernel"):
        last = {f"dense.{len(module.backbone.layers) - 1}.linear.{name}" for name in last}
    entries = list(_entries(module.target_net, ("target_net",)))
    for entry in _entries(module.backbone):
        ordered = _permuted(entry, order) if entry.key in last else entry
        entries.append(_Entry(f"backbone.{entry.key}", ordered.read, ordered.write))
    return entries


def _torch_order(module: Any) -> Array:
    """Where each entry of the target's parameters, flattened as in torch, stands in JAX."""
    from flax import nnx

    graph, state = nnx.split(module.target_net)
    variables = dict(nnx.to_flat_state(state))
    for path, variable in variables.items():
        name = ".".join(map(str, path))
        if name in module.output_shapes:
            start, size = module.output_offsets()[name]
            numbers = np.arange(start, start + size, dtype=np.int64)
            variables[path] = variable.replace(numbers.reshape(variable.shape))
    numbered = nnx.merge(graph, nnx.from_flat_state(variables.items()))
    rows: list[Array] = []
    seen: set[int] = set()
    for entry in sorted(_entries(numbered), key=lambda entry: entry.key):
        row = entry.read().reshape(-1)
        # Statistics are no parameters, and one that is held twice is made once.
        if row.dtype == np.int64 and row.size and int(row[0]) not in seen:
            seen.add(int(row[0]))
            rows.append(row)
    return np.concatenate(rows)


def _permuted(entry: _Entry, order: Array) -> _Entry:
    """The entry with its rows in another order; a gated layer has ``order`` for each half."""
    halves = entry.read().shape[0] // len(order)
    rows = np.concatenate([order + half * len(order) for half in range(halves)])
    return _Entry(
        entry.key,
        lambda: entry.read()[rows],
        lambda array: entry.write(array[np.argsort(rows)]),
    )


def _codebook_entries(module: Any) -> list[_Entry]:
    """Torch keeps the value of each bit of an index, a constant that no JAX integer may hold."""
    mask = 2 ** np.arange(module.codebook_dim - 1, -1, -1)
    linear = [
        entry
        for name in ("project_in", "project_out")
        for entry in _entries(getattr(module, name), (name,))
    ]
    return [_Entry("mask", lambda: mask, lambda _: None), *linear]


def _attention_entries(module: Any) -> list[_Entry]:
    """Torch keeps the three input projections of attention as one matrix of rows."""
    import jax.numpy as jnp

    parts = (module.query, module.key, module.value)
    heads = module.query.bias[...].shape
    width = heads[0] * heads[1]

    def read_weight() -> Array:
        rows = [np.asarray(p.kernel[...]).reshape(-1, width).T for p in parts]
        return np.concatenate(rows)

    def write_weight(array: Array) -> None:
        for part, rows in zip(parts, np.split(array, 3), strict=True):
            part.kernel[...] = jnp.array(rows.T.reshape(-1, *heads))

    def read_bias() -> Array:
        return np.concatenate([np.asarray(p.bias[...]).reshape(-1) for p in parts])

    def write_bias(array: Array) -> None:
        for part, values in zip(parts, np.split(array, 3), strict=True):
            part.bias[...] = jnp.array(values.reshape(heads))

    return [
        _Entry("in_proj_weight", read_weight, write_weight),
        _Entry("in_proj_bias", read_bias, write_bias),
        _variable(
            "out_proj.weight",
            module.out.kernel,
            lambda kernel: kernel.reshape(width, -1).T,
            lambda weight: weight.T.reshape(*heads, -1),
        ),
        _variable("out_proj.bias", module.out.bias),
    ]


def _lora_entries(module: Any) -> list[_Entry]:
    """The base layer as it is when not merged, and everything beside it."""

    def read() -> Array:
        kernel = module.kernel if module.unmerged is None else module.unmerged
        return np.asarray(kernel[...]).T

    def write(array: Array) -> None:
        module.unmerge()
        _variable("", module.kernel, np.transpose, np.transpose).write(array)

    entries = [_Entry("weight", read, write)]
    for name in ("bias", "lora_A", "lora_B"):
        value = getattr(module, name, None)
        entries += [] if value is None else [_variable(name, value)]
    for name in ("context", "to_gate", "to_u", "to_v"):
        child = getattr(module, name, None)
        entries += [] if child is None else _entries(child, (name,))
    return entries
