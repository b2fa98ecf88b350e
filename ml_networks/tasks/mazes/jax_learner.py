"""The maze loss in JAX, and a model in training with JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ml_networks.convert import state_dict, torch_to_jax
from ml_networks.jax import ContinuousThoughtMachine, HyperContinuousThoughtMachine
from ml_networks.jax.training import (
    TrainState,
    eval_step,
    named_leaves,
    replaced_leaves,
    train_step,
    update_model,
)
from ml_networks.tasks.mazes.data import CLASSES, Mazes, Routes, images_of
from ml_networks.tasks.mazes.learner import Tensors
from ml_networks.tasks.mazes.settings import Settings

__all__ = ["JaxLearner", "maze_loss"]

Array = jax.Array


def maze_loss(predictions: Array, certainties: Array, routes: Array, lookahead: int = 5) -> Array:
    """:func:`ml_networks.tasks.mazes.torch_learner.maze_loss`, of JAX arrays."""
    log_p = jax.nn.log_softmax(predictions, axis=2)
    losses = -jnp.take_along_axis(log_p, routes[:, :, None, None], axis=2)[:, :, 0]
    right = predictions.argmax(2) == routes[:, :, None]
    beginning = right.cumprod(1).sum(1).max(1)
    seen = jnp.arange(routes.shape[1]) < beginning[:, None] + lookahead
    per_tick = (losses * seen[:, :, None]).sum(1) / seen.sum(1)[:, None]
    ticks = jnp.stack([per_tick.argmin(1), certainties[:, 1].argmax(1)], axis=1)
    return jnp.take_along_axis(per_tick, ticks, axis=1).mean()


class JaxLearner:
    """A model with its optimizer, on one device; see :class:`Learner`."""

    def __init__(self, settings: Settings, device: jax.Device) -> None:
        self.settings = settings
        self.device = device
        kind = HyperContinuousThoughtMachine if settings.use_hyper else ContinuousThoughtMachine
        with jax.default_device(device):
            rngs = nnx.Rngs(settings.seed)
            self.model = kind.from_config(settings.model_config(), rngs=rngs)
            rates = jnp.array(
                [settings.learning_rate(step) for step in range(settings.training_iterations)]
            )
            clip = settings.gradient_clipping
            self.optimizer = optax.chain(
                optax.clip_by_global_norm(clip) if clip > 0 else optax.identity(),
                optax.adamw(lambda step: rates[step], weight_decay=settings.weight_decay),
            )
            self.model.train()
            self.state = TrainState.create(self.model, self.optimizer)
            self.losses = jnp.zeros(())
        self._step = train_step(self.model, self.optimizer, lambda *batch: self._loss(*batch)[0])
        self._test = eval_step(self.model, self._loss)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.size for parameter in self.state.params.values())

    def _loss(self, model: nnx.Module, images: Array, routes: Array) -> tuple[Array, Array]:
        """The loss, and the routes at each maze's most certain tick."""
        predictions, certainties = model(images)[:2]
        predictions = predictions.reshape(len(images), -1, CLASSES, predictions.shape[-1])
        loss = maze_loss(predictions, certainties, routes, self.settings.cirriculum_lookahead)
        most_certain = certainties[:, 1].argmax(1)[:, None, None]
        answers = jnp.take_along_axis(predictions.argmax(2), most_certain, axis=2)
        return loss, answers[..., 0]

    def _batch(self, mazes: Mazes) -> Any:
        images = images_of(mazes.pixels, self.settings.expand_range)
        return jax.device_put((images, mazes.routes.astype(np.int32)), self.device)

    def step(self, mazes: Mazes, number: int) -> None:
        """Take one optimizer step; the state counts them itself."""
        self.state, loss = self._step(self.state, *self._batch(mazes))
        self.losses = self.losses + loss

    def take_losses(self) -> float:
        """The sum of the losses of the steps since this was last asked."""
        total = float(self.losses)
        self.losses = jnp.zeros_like(self.losses)
        return total

    def test(self, mazes: Mazes) -> tuple[float, Routes]:
        """The mean loss, and the routes (B, route length) at each maze's most certain tick."""
        loss, answers = self._test(self.state, *self._batch(mazes))
        return float(loss), np.asarray(answers, dtype=np.int64)

    def tensors(self) -> Tensors:
        """Weights as torch names them, and the whole state of training as JAX does."""
        weights = state_dict(update_model(self.model, self.state))
        training = named_leaves(self.state)
        return {
            **{f"model/{name}": array for name, array in weights.items()},
            **{f"training/{name}": np.asarray(array) for name, array in training.items()},
            "losses": np.asarray(self.losses),
        }

    def load(self, tensors: Tensors) -> None:
        """Go on from what :meth:`tensors` gave; raises ValueError for anything else."""
        training = {
            name.removeprefix("training/"): array
            for name, array in tensors.items()
            if name.startswith("training/")
        }
        with jax.default_device(self.device):
            self.state = replaced_leaves(self.state, training, "the state")
            self.losses = jnp.asarray(tensors["losses"])

    def load_model(self, weights: Tensors) -> None:
        """Take weights; raises ValueError, naming the first, for those that do not fit."""
        try:
            torch_to_jax(weights, self.model)
        except KeyError as error:
            raise ValueError(error.args[0]) from error
        with jax.default_device(self.device):
            self.state = TrainState.create(self.model, self.optimizer)
