"""The distrax distributions of states. A module of its own because distrax is slow to import: it
is imported when the first distribution is made."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from ml_networks.jax.utils import straight_through

with warnings.catch_warnings():
    # TensorFlow Probability, which distrax is built on, uses names that JAX has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    import distrax

__all__ = [
    "BernoulliStraightThrough",
    "Distribution",
    "OneHotCategoricalStraightThrough",
    "StateDistribution",
    "bernoulli",
    "categorical",
    "normal",
]

Array = jax.Array
Distribution = distrax.Distribution


class StateDistribution(distrax.Independent):
    """The distrax distribution of a state.

    Unlike :class:`distrax.Independent` it has a Kullback-Leibler divergence to a distribution that
    is not wrapped, for example the ``Normal(0, 1)`` of a variational autoencoder: the divergences
    of the single features, summed over the event axes.
    """

    def kl_divergence(self, other_dist: Any, **kwargs: Any) -> Array:
        """Return KL(self || other_dist), in nats, of the shape of the batch.

        Raises
        ------
        ValueError
            If ``other_dist`` is wrapped and its events have another shape.
        NotImplementedError
            If distrax knows no divergence between the two kinds.
        """
        if isinstance(other_dist, distrax.Independent):
            if other_dist.event_shape not in {self.event_shape, ()}:
                raise ValueError(
                    f"the events of the two distributions have shapes {self.event_shape} and "
                    f"{other_dist.event_shape}"
                )
            other_dist = other_dist.distribution
        single = self.distribution.kl_divergence(other_dist, **kwargs)
        return single.sum(tuple(range(-self.reinterpreted_batch_ndims, 0)))


class BernoulliStraightThrough(distrax.Bernoulli):
    """A Bernoulli distribution whose samples pass their gradient on to ``probs`` unchanged."""

    def _sample_n(self, key: Array, n: int) -> Array:
        bits = super()._sample_n(key, n).astype(self.probs.dtype)
        return straight_through(bits, jnp.broadcast_to(self.probs, bits.shape))


class OneHotCategoricalStraightThrough(distrax.OneHotCategorical):
    """A categorical distribution over one-hot vectors whose samples pass their gradient on to
    ``probs`` unchanged. The class of a vector is that of its largest entry."""

    def _sample_n(self, key: Array, n: int) -> Array:
        one_hot = super()._sample_n(key, n).astype(self.probs.dtype)
        return straight_through(one_hot, jnp.broadcast_to(self.probs, one_hot.shape))

    def log_prob(self, value: Array) -> Array:
        """Return the log-probability of ``(..., C)``, the shape of the batch."""
        classes = jnp.broadcast_shapes(value.shape, self.logits.shape)
        logits = jnp.broadcast_to(self.logits, classes)
        largest = jnp.broadcast_to(value, classes).argmax(-1, keepdims=True)
        return jnp.take_along_axis(logits, largest, -1).squeeze(-1)


def normal(mean: Array, std: Array, independent: int) -> StateDistribution:
    """Return the normal distribution, its last ``independent`` batch axes one event."""
    return StateDistribution(distrax.Normal(_widened(mean), _widened(std)), independent)


def categorical(probs: Array, independent: int) -> StateDistribution:
    """Return the one-hot distribution, its last ``independent`` batch axes one event."""
    probs = _widened(probs)
    # As torch does, so that a probability that underflowed has a logarithm, and a gradient of 0.
    eps = jnp.finfo(probs.dtype).eps
    held = jnp.clip(probs, eps, 1 - eps)
    return StateDistribution(OneHotCategoricalStraightThrough(probs=held), independent)


def bernoulli(logits: Array, independent: int) -> StateDistribution:
    """Return the distribution of bits, its last ``independent`` batch axes one event."""
    return StateDistribution(BernoulliStraightThrough(logits=_widened(logits)), independent)


def _widened(x: Array) -> Array:
    """Float32 for half precision, whose rounding would drown the logarithms."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
