"""Training: one compiled step over the whole state, and checkpoints to resume from.

Flax modules are split into arrays before ``jax.jit`` sees them and put together again inside:
the arrays of a call are then a tuple of plain dictionaries, which ``jax.jit`` takes at a fraction
of what ``nnx.jit`` spends on walking the module.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = [
    "TrainState",
    "eval_step",
    "restore_checkpoint",
    "save_checkpoint",
    "train_step",
    "update_model",
]

Array = jax.Array
StrPath = str | os.PathLike[str]


class TrainState(NamedTuple):
    """Everything that a step of training changes: a pytree.

    Attributes
    ----------
    step
        Steps taken, an int32 scalar.
    params
        What trains, by name: every ``nnx.Param``, for example ``"layers.0.linear.kernel"``.
    rest
        What else the module holds, by name: running statistics, the counts of its random
        streams, frozen parameters.
    optimizer
        The optax state.
    """

    step: Array
    params: dict[str, Array]
    rest: dict[str, Array]
    optimizer: Any

    @classmethod
    def create(cls, model: nnx.Module, optimizer: Any) -> TrainState:
        """The state of ``model`` before the first step.

        It holds copies: :func:`train_step` gives the memory of a state to the next one, and the
        module's own arrays stay as they are.

        Parameters
        ----------
        model
            The module.
        optimizer
            The optax optimizer, for example of :func:`ml_networks.jax.get_optimizer`.
        """
        params, rest = (_copies(part) for part in _Layout(model).arrays(model))
        return cls(jnp.zeros((), jnp.int32), params, rest, optimizer.init(params))


class _Layout:
    """How a module is taken apart into named arrays, and put together from them."""

    def __init__(self, model: nnx.Module) -> None:
        self.graph, *parts = nnx.split(model, nnx.Param, ...)
        self.trees = tuple(jax.tree.structure(part) for part in parts)
        self.names = tuple(tuple(_names(part)) for part in parts)

    def arrays(self, model: nnx.Module) -> tuple[dict[str, Array], ...]:
        """Parameters and the rest, by name."""
        parts = nnx.split(model, nnx.Param, ...)[1:]
        return tuple(dict(zip(_names(p), jax.tree.leaves(p), strict=True)) for p in parts)

    def module(self, params: dict[str, Array], rest: dict[str, Array]) -> nnx.Module:
        """The module that holds these arrays."""
        parts = (
            jax.tree.unflatten(tree, [arrays[name] for name in names])
            for tree, names, arrays in zip(self.trees, self.names, (params, rest), strict=True)
        )
        module: nnx.Module = nnx.merge(self.graph, *parts)
        return module

    def rest(self, module: nnx.Module) -> dict[str, Array]:
        """What the module holds beside its parameters, after it was called."""
        rest = self.arrays(module)[1]
        if rest.keys() != set(self.names[1]):
            changed = sorted(rest.keys() ^ set(self.names[1]))
            raise ValueError(
                f"the loss made or removed variables of {type(module).__name__}: "
                f"{', '.join(changed)}; create them before TrainState.create"
            )
        return rest


def train_step(
    model: nnx.Module, optimizer: Any, loss: Callable[..., Any]
) -> Callable[..., tuple[TrainState, Any]]:
    """Compile one step of training.

    Parameters
    ----------
    model
        The module; only its structure and its modes (``model.train()``) count here.
    optimizer
        The optax optimizer that :meth:`TrainState.create` was given.
    loss
        ``loss(model, *batch)``: a scalar, or a pytree of scalars whose sum is minimised, such as
        ``{"reconstruction": ..., "divergence": ...}``. Statistics and random streams that the
        model updates are kept.

    Returns
    -------
    Callable
        ``step(state, *batch) -> (state, losses)``, on ``jax.jit``. It takes the memory of the
        state that it is given, which cannot be used afterwards; ``losses`` is what ``loss``
        returned.

    Raises
    ------
    ValueError
        At the first call, if ``loss`` returns anything but scalars, or adds variables.

    Examples
    --------
    >>> optimizer = get_optimizer("Adam", lr=1e-3)
    >>> state = TrainState.create(model, optimizer)
    >>> step = train_step(model, optimizer, lambda model, x, y: ((model(x) - y) ** 2).mean())
    >>> state, loss = step(state, x, y)
    """
    layout = _Layout(model)

    def total(params: dict[str, Array], rest: dict[str, Array], batch: Any) -> Any:
        module = layout.module(params, rest)
        losses = loss(module, *batch)
        leaves = jax.tree.leaves(losses)
        shapes = [jnp.shape(leaf) for leaf in leaves]
        if not leaves or any(shapes):
            raise ValueError(
                "the loss must return a scalar or a pytree of scalars, got "
                f"{f'arrays of shapes {shapes}' if leaves else losses}; take means or sums"
            )
        return sum(leaves), (losses, layout.rest(module))

    def step(state: TrainState, *batch: Any) -> tuple[TrainState, Any]:
        import optax

        (_, (losses, rest)), gradients = jax.value_and_grad(total, has_aux=True)(
            state.params, state.rest, batch
        )
        updates, progress = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, rest, progress), losses

    compiled: Callable[..., tuple[TrainState, Any]] = jax.jit(step, donate_argnums=0)
    return compiled


def eval_step(model: nnx.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile ``function(model, *batch)`` with the model in evaluation mode.

    Parameters
    ----------
    model
        The module; only its structure counts here, and its own mode stays.
    function
        Anything of a model and arrays, for example ``lambda model, x: model(x)``. What the model
        updates is dropped.

    Returns
    -------
    Callable
        ``step(state, *batch)``, on ``jax.jit``, for a :class:`TrainState`; that is left whole.
    """
    copy: nnx.Module = nnx.merge(*nnx.split(model))
    copy.eval()
    layout = _Layout(copy)

    def step(params: dict[str, Array], rest: dict[str, Array], batch: Any) -> Any:
        return function(layout.module(params, rest), *batch)

    compiled = jax.jit(step)
    return lambda state, *batch: compiled(state.params, state.rest, batch)


def update_model(model: nnx.Module, state: TrainState) -> nnx.Module:
    """Write what was trained into ``model``, in place; it gets copies.

    Raises
    ------
    ValueError
        If the state is another module's.
    """
    layout = _Layout(model)
    own = dict(zip(("params", "rest"), layout.arrays(model), strict=True))
    given = {"params": state.params, "rest": state.rest}
    fitted = replaced_leaves(own, named_leaves(given), type(model).__name__)
    trained = layout.module(_copies(fitted["params"]), _copies(fitted["rest"]))
    nnx.update(model, nnx.state(trained))
    return model


def save_checkpoint(path: StrPath, state: Any) -> None:
    """Write a whole training state with Orbax, to go on from exactly there.

    Parameters
    ----------
    path
        A folder, made if need be. The new state is written beside the one that is there, which
        is removed when the new one is whole: a program that is killed leaves one or the other.
    state
        A :class:`TrainState`, or any pytree of arrays.
    """
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager(Path(path).absolute(), options=options) as manager:
        latest = manager.latest_step()
        number = 0 if latest is None else latest + 1
        manager.save(number, args=ocp.args.StandardSave(named_leaves(state)))


def restore_checkpoint(path: StrPath, like: Any) -> Any:
    """Read what :func:`save_checkpoint` wrote.

    Parameters
    ----------
    path
        The folder.
    like
        A state of the same model and optimizer, for example a new :meth:`TrainState.create`;
        its arrays say where the restored ones go (device and sharding). It is left whole.

    Returns
    -------
    Any
        A state of the structure of ``like``, bit for bit the one that was saved.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If it holds no whole checkpoint, or one of another model or optimizer; the message names
        the entries that are missing, too many or of another shape or dtype.
    """
    import orbax.checkpoint as ocp

    folder = Path(path).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder {path}")
    options = ocp.CheckpointManagerOptions(create=False)
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(folder, options=options, item_handlers=handler) as manager:
        latest = manager.latest_step()
        if latest is None:
            raise ValueError(f"{path} holds no checkpoint that save_checkpoint wrote")
        wanted = named_leaves(like)
        try:
            stored = dict(manager.item_metadata(latest).items())
        except Exception as error:  # whatever files that are not a checkpoint make Orbax raise
            raise ValueError(f"{path} holds no whole checkpoint: {error}") from error
        _check(wanted, stored, f"the checkpoint {path}", "the state")
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
        try:
            arrays = manager.restore(latest, args=ocp.args.StandardRestore(target))
        except Exception as error:
            raise ValueError(f"{path} holds no whole checkpoint: {error}") from error
    return replaced_leaves(like, arrays, "the state")


def named_leaves(tree: Any) -> dict[str, Array]:
    """The arrays of a pytree by name; a random key as the numbers that it is made of."""
    leaves = (
        jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)
        for leaf in jax.tree.leaves(tree)
    )
    return dict(zip(_names(tree), leaves, strict=True))


def replaced_leaves(tree: Any, arrays: dict[str, Any], what: str) -> Any:
    """``tree`` with the arrays of :func:`named_leaves` in place of its own.

    Raises
    ------
    ValueError
        For names that are missing or too many, and for other shapes or dtypes.
    """
    _check(named_leaves(tree), arrays, "what was given", what)
    leaves = [
        jax.random.wrap_key_data(arrays[name], impl=jax.random.key_impl(leaf))
        if _is_key(leaf)
        else jnp.asarray(arrays[name])
        for name, leaf in zip(_names(tree), jax.tree.leaves(tree), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _check(wanted: dict[str, Array], given: dict[str, Any], source: str, what: str) -> None:
    misfits = [f"{name} is missing" for name in wanted if name not in given]
    misfits += [f"{name} is too much" for name in given if name not in wanted]
    for name, array in wanted.items():
        if name in given:
            found = given[name]
            if (tuple(found.shape), found.dtype) != (array.shape, array.dtype):
                misfits.append(
                    f"{name} is {found.dtype}{list(found.shape)} in place of "
                    f"{array.dtype}{list(array.shape)}"
                )
    if misfits:
        more = f" and {len(misfits) - 5} more" if len(misfits) > 5 else ""
        raise ValueError(f"{source} does not fit {what}: {', '.join(misfits[:5])}{more}")


def _names(tree: Any) -> list[str]:
    """The names of a pytree's leaves: the path, without the last step into an ``nnx.Variable``."""
    paths = (path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0])
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path in paths)
    return [name.removesuffix(".value") for name in names]


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _copies(arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: jnp.copy(array) for name, array in arrays.items()}
