"""Lightning around JAX: a ``LightningModule`` that trains JAX state, its trainer and callbacks.

Importing this module needs Lightning, and with it torch; no other module of the JAX side does.
Without Lightning train with :func:`ml_networks.jax.train_step`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from ml_networks.jax.training import named_leaves, replaced_leaves
from ml_networks.jax.utils import count_nnx_params

__all__ = ["JaxLightningModule", "JaxModelCheckpoint", "JaxModelSummary", "JaxTrainer"]

if TYPE_CHECKING:
    _lightning: Any
    _callbacks: Any
else:
    # Lightning is published under two names; the one imported already is the one in use.
    _packages = ("lightning.pytorch", "pytorch_lightning")
    for _package in sorted(_packages, key=lambda package: package not in sys.modules):
        if importlib.util.find_spec(_package.partition(".")[0]) is not None:
            _lightning = importlib.import_module(_package)
            _callbacks = importlib.import_module(f"{_package}.callbacks")
            break
    else:
        raise ModuleNotFoundError(
            "JaxTrainer and JaxLightningModule need Lightning: pip install 'ml-networks[train]'; "
            "ml_networks.jax.train_step does without",
            name="lightning",
        )

_torch: Any = importlib.import_module("torch")

_CHECKPOINT_KEY = "jax_state"


class JaxLightningModule(_lightning.LightningModule):
    """A ``LightningModule`` whose attributes hold JAX state: modules, optimizers, pytrees.

    ``training_step(batch, batch_index)`` does the work, for example with
    :func:`ml_networks.jax.train_step`, and calls :meth:`step_jax` after each update. Lightning
    gives loops, logging and callbacks, and does not optimize. Every attribute with JAX arrays in
    it is part of Lightning's checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._jax_step_count = 0

    @property
    def jax_step_count(self) -> int:
        """Updates so far."""
        return self._jax_step_count

    def step_jax(self) -> None:
        """Count one update, here and in ``trainer.global_step``."""
        self._jax_step_count += 1
        # Lightning counts the steps of its own optimizers, of which there are none.
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()

    def configure_optimizers(self) -> list[Any]:
        """No torch optimizer."""
        return []

    def log_jax_dict(self, metrics: Mapping[str, Any], prefix: str, **kwargs: Any) -> None:
        """Log JAX scalars as ``prefix/name``; further keywords are those of ``log_dict``."""
        values = {f"{prefix}/{name}": float(value) for name, value in metrics.items()}
        self.log_dict(values, **{"prog_bar": True, "sync_dist": True, **kwargs})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the JAX state to Lightning's checkpoint."""
        # Tensors: torch.load refuses a file with anything else in it unless it is told to trust.
        checkpoint[_CHECKPOINT_KEY] = {
            name: {
                key: (_torch.from_numpy(_bytes(array)), str(array.dtype), list(array.shape))
                for key, array in named_leaves(value).items()
            }
            for name, value in _jax_attributes(self).items()
        }
        checkpoint["jax_step_count"] = self._jax_step_count

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the JAX state from Lightning's checkpoint.

        Raises
        ------
        ValueError
            If it is that of another model; the message names the entries.
        """
        given = checkpoint.get(_CHECKPOINT_KEY, {})
        for name, value in _jax_attributes(self).items():
            arrays = {
                key: np.frombuffer(data.numpy(), jax.numpy.dtype(dtype)).reshape(shape)
                for key, (data, dtype, shape) in given.get(name, {}).items()
            }
            restored = replaced_leaves(value, arrays, f"the attribute {name}")
            held = getattr(self, name)
            if isinstance(held, nnx.Pytree):
                nnx.update(held, restored)
            else:
                setattr(self, name, restored)
        self._jax_step_count = checkpoint.get("jax_step_count", 0)


class JaxModelCheckpoint(_callbacks.ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``: :class:`JaxLightningModule` counts its own steps."""


class JaxModelSummary(_callbacks.ModelSummary):
    """Lightning's ``ModelSummary`` with the parameters of the Flax modules that a module holds."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Print a line a module, and the sums."""
        if not isinstance(pl_module, JaxLightningModule):
            super().on_fit_start(trainer, pl_module)
        elif trainer.is_global_zero and self._max_depth:
            print(summary(pl_module))


class JaxTrainer(_lightning.Trainer):
    """Lightning's ``Trainer`` with a :class:`JaxModelSummary` in place of Lightning's own.

    Parameters
    ----------
    **kwargs
        Those of Lightning's ``Trainer``. ``enable_model_summary=False`` leaves the summary out.
    """

    def __init__(self, **kwargs: Any) -> None:
        callbacks = kwargs.pop("callbacks", None) or []
        callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
        if kwargs.pop("enable_model_summary", True) and not any(
            isinstance(callback, _callbacks.ModelSummary) for callback in callbacks
        ):
            callbacks.append(JaxModelSummary())
        super().__init__(callbacks=callbacks, enable_model_summary=False, **kwargs)


def summary(module: JaxLightningModule) -> str:
    """Name, class and number of parameters of each Flax module that ``module`` holds."""
    held = {name: value for name, value in vars(module).items() if isinstance(value, nnx.Module)}
    counts = {name: count_nnx_params(value) for name, value in held.items()}
    lines = [
        f"{name:<20} {type(held[name]).__name__:<28} {total:>14,}"
        for name, (total, _) in counts.items()
    ]
    total, trainable = (sum(count[i] for count in counts.values()) for i in (0, 1))
    return "\n".join([*lines, f"{total:,} parameters, of which {trainable:,} train"])


def _jax_attributes(module: Any) -> dict[str, Any]:
    """The attributes that hold JAX arrays; of Flax objects their state."""
    states = {
        name: nnx.state(value) if isinstance(value, nnx.Pytree) else value
        for name, value in vars(module).items()
    }
    return {
        name: value
        for name, value in states.items()
        if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
    }


def _bytes(array: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(bytearray(np.asarray(array).tobytes()), np.uint8)
