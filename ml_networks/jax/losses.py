"""Losses. Each means what its namesake in :mod:`ml_networks.torch.losses` means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp

from ml_networks._compat import checked_keywords
from ml_networks.jax.distributions import StochState
from ml_networks.kernels.jax import focal_frequency_loss

if TYPE_CHECKING:
    import distrax

__all__ = [
    "FocalFrequencyLoss",
    "binary_focal_loss",
    "charbonnier",
    "cross_entropy",
    "focal_loss",
    "kl_balancing",
    "kl_divergence",
    "soft_target_cross_entropy",
]

Array = jax.Array
Divergent: TypeAlias = "StochState | distrax.Distribution"


@checked_keywords(sum_dim="sum_axis")
def focal_loss(prediction: Array, target: Array, gamma: float = 2.0, sum_axis: int = -1) -> Array:
    r"""Return the focal loss :math:`-(1 - p_t)^\gamma \log p_t` of a classification.

    Parameters
    ----------
    prediction
        Logits, their classes in axis ``sum_axis``: ``(B, ..., C)``.
    target
        Class indices, the shape of ``prediction`` without that axis: ``(B, ...)``.
    gamma
        Weight of the hard examples; 0 is cross entropy. Default 2.
    sum_axis
        The axis of the classes, over which the loss sums. Default -1. ``sum_dim`` is another name.

    Returns
    -------
    Array
        A scalar: summed over positions, averaged over the batch.

    References
    ----------
    Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002.
    """
    log_p = -cross_entropy(prediction, target, sum_axis)
    loss = -_one_minus_exp(log_p, gamma) * log_p
    return loss.sum() / max(loss.shape[0], 1) if loss.ndim else loss


@checked_keywords(sum_dim="sum_axis")
def binary_focal_loss(
    prediction: Array,
    target: Array,
    gamma: float = 2.0,
    sum_axis: int | Sequence[int] | None = -1,
) -> Array:
    r"""Return the focal loss :math:`-(1 - p_t)^\gamma \log p_t` of yes-no decisions.

    Parameters
    ----------
    prediction
        Logits, any shape.
    target
        Labels of the same shape, of any dtype: 0, 1 or, for soft labels, the probability
        :math:`y` of a yes, whose loss is :math:`y` times that of a 1 plus :math:`1 - y` times
        that of a 0.
    gamma
        Weight of the hard examples; 0 is binary cross entropy. Default 2.
    sum_axis
        Axes to sum over, None for all. Default -1. ``sum_dim`` is another name.

    Returns
    -------
    Array
        ``prediction`` without the axes ``sum_axis``.

    References
    ----------
    Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002.
    """
    _check_same_shape(prediction, target)
    target = target.astype(prediction.dtype)
    log_yes, log_no = jax.nn.log_sigmoid(prediction), jax.nn.log_sigmoid(-prediction)
    loss = -target * _one_minus_exp(log_yes, gamma) * log_yes
    loss = loss - (1 - target) * _one_minus_exp(log_no, gamma) * log_no
    return loss.sum(_axes(sum_axis))


def _one_minus_exp(log_p: Array, power: float) -> Array:
    """Return ``(1 - p) ** power``, exact for p near 1, with a gradient that stays finite there."""
    if power == 0:
        return jnp.ones_like(log_p)
    missing = -jnp.expm1(log_p)
    # Below power 1 the derivative at p = 1 is infinite, where log p = 0 multiplies it to NaN.
    return jnp.maximum(missing, jnp.finfo(log_p.dtype).tiny) ** power


@checked_keywords(sum_dim="sum_axes")
def charbonnier(
    prediction: Array,
    target: Array,
    epsilon: float = 1e-3,
    alpha: float = 1,
    sum_axes: int | Sequence[int] | None = None,
) -> Array:
    r"""Return the Charbonnier loss :math:`\sum ((x - y)^2 + \epsilon^2)^{\alpha / 2}`.

    Parameters
    ----------
    prediction, target
        Images ``(B*, C, H, W)``, or any two arrays of one shape.
    epsilon
        Half-width of the rounded tip of the absolute value. Default 1e-3.
    alpha
        Power of the absolute difference. Default 1.
    sum_axes
        Axes to sum over. Default: the last three. ``sum_dim`` is another name.

    Returns
    -------
    Array
        ``prediction`` without the axes ``sum_axes``: by default one number an image. Its
        ``mean()`` is the usual loss.

    References
    ----------
    Barron, "A General and Adaptive Robust Loss Function", arXiv 1701.03077.
    """
    _check_same_shape(prediction, target)
    axes = (-1, -2, -3) if sum_axes is None else _axes(sum_axes)
    difference = prediction - target
    return ((difference * difference + epsilon**2) ** (alpha / 2)).sum(axes)


@checked_keywords()
class FocalFrequencyLoss:
    """The focal frequency loss of images, its options kept for many calls.

    See :func:`ml_networks.kernels.jax.focal_frequency_loss` for the equation.

    Parameters
    ----------
    loss_weight
        Factor of the loss. Default 1.
    alpha
        Power of the spectral weights. Default 1.
    patch_factor
        Each side of an image is cut into so many patches. Default 1.
    ave_spectrum
        Compare the spectra averaged over the batch. Default False.
    log_matrix
        Take the logarithm of the weights. Default False.
    batch_matrix
        Scale the weights by their maximum over the batch, not over each plane. Default False.

    References
    ----------
    Jiang et al., "Focal Frequency Loss for Image Reconstruction and Synthesis", arXiv 2012.12821.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        alpha: float = 1.0,
        patch_factor: int = 1,
        ave_spectrum: bool = False,
        log_matrix: bool = False,
        batch_matrix: bool = False,
    ) -> None:
        self.options: dict[str, Any] = {
            "loss_weight": loss_weight,
            "alpha": alpha,
            "patch_factor": patch_factor,
            "ave_spectrum": ave_spectrum,
            "log_matrix": log_matrix,
            "batch_matrix": batch_matrix,
        }

    def __call__(
        self, pred: Array, target: Array, matrix: Array | None = None, mean_batch: bool = True
    ) -> Array:
        """Return the loss of ``(N, C, H, W)`` or ``(B, T, C, H, W)`` images.

        Parameters
        ----------
        pred, target
            Images of one shape.
        matrix
            Spectral weights to use in place of the computed ones.
        mean_batch
            Average over the batch. Default True.
        """
        return focal_frequency_loss(
            pred, target, matrix=matrix, mean_batch=mean_batch, **self.options
        )


def kl_divergence(posterior: Divergent, prior: Divergent) -> Array:
    """Return the Kullback-Leibler divergence KL(posterior || prior).

    Parameters
    ----------
    posterior, prior
        States, distrax distributions, or one of each.

    Returns
    -------
    Array
        ``(B*)``, in nats; for Bernoulli states ``(B*, G)``, as their ``get_distribution()`` keeps
        the groups apart.

    Raises
    ------
    NotImplementedError
        If distrax knows no divergence between the two kinds.

    Notes
    -----
    Bernoulli states are compared by their logits. So the divergence is right also against a prior
    whose probability rounds to 1 (a logit of 20, say), where :mod:`torch.distributions` has inf.
    """
    divergence: Array = _as_distribution(posterior).kl_divergence(_as_distribution(prior))
    return divergence


@checked_keywords(alpha="weight")
def kl_balancing(
    posterior: Divergent | Sequence[Divergent],
    prior: Divergent | Sequence[Divergent] | None = None,
    weight: float = 0.8,
) -> Array:
    r"""Return a KL divergence that trains the prior more than the posterior.

    .. math::

        w \, KL(\operatorname{sg}(q) \| p) + (1 - w) \, KL(q \| \operatorname{sg}(p))

    with :math:`q` the posterior, :math:`p` the prior and sg the stopped gradient, so its value is
    that of KL(q || p).

    Parameters
    ----------
    posterior, prior
        States; or two sequences of states, whose divergences are summed; or the pair
        ``[posterior, prior]`` as the first argument alone.
    weight
        Share of the gradient that goes to the prior. Default 0.8. ``alpha`` is another name.

    Returns
    -------
    Array
        As :func:`kl_divergence`.

    References
    ----------
    Hafner et al., "Mastering Atari with Discrete World Models", arXiv 2010.02193.
    """
    if prior is None:
        if not isinstance(posterior, Sequence) or len(posterior) != 2:
            raise TypeError("kl_balancing needs a posterior and a prior, or the pair of them")
        posterior, prior = posterior
    posteriors = posterior if isinstance(posterior, Sequence) else [posterior]
    priors = prior if isinstance(prior, Sequence) else [prior]
    if len(posteriors) != len(priors) or not posteriors:
        raise ValueError(f"got {len(posteriors)} posteriors and {len(priors)} priors")
    terms = [
        weight * kl_divergence(_stopped(q), p) + (1 - weight) * kl_divergence(q, _stopped(p))
        for q, p in zip(posteriors, priors, strict=True)
    ]
    return jnp.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def _as_distribution(value: Divergent) -> Any:
    from ml_networks.jax import _distrax

    if isinstance(value, StochState):
        return value.get_distribution()
    if isinstance(value, _distrax.Distribution):
        return value
    raise TypeError(f"expected a state or a distrax distribution, got {type(value).__name__}")


def _stopped(value: Divergent) -> Divergent:
    if isinstance(value, StochState):
        return value.stop_gradient()
    raise TypeError(f"kl_balancing needs states, got {type(value).__name__}")


@checked_keywords(dim="axis")
def cross_entropy(logits: Array, target: Array, axis: int = -1) -> Array:
    """Return the cross entropy of each position, without reduction.

    Parameters
    ----------
    logits
        Classes in axis ``axis``.
    target
        Class indices, the shape of ``logits`` without that axis.
    axis
        Default -1. ``dim`` is another name.

    Returns
    -------
    Array
        The shape of ``target``, in nats.
    """
    expected = list(logits.shape)
    del expected[axis]
    if list(target.shape) != expected or not jnp.issubdtype(target.dtype, jnp.integer):
        raise ValueError(
            f"target must be class indices of shape {tuple(expected)} for logits {logits.shape} "
            f"with classes in axis {axis}, got {target.dtype} {target.shape}"
        )
    chosen = jnp.expand_dims(target, axis % logits.ndim)
    log_p = jax.nn.log_softmax(logits, axis)
    return -jnp.take_along_axis(log_p, chosen, axis).squeeze(axis)


@checked_keywords(dim="axis")
def soft_target_cross_entropy(logits: Array, target_logits: Array, axis: int = -1) -> Array:
    r"""Return :math:`-\sum_c \operatorname{softmax}(t)_c \log\operatorname{softmax}(x)_c`.

    Parameters
    ----------
    logits, target_logits
        One shape; classes in axis ``axis``. Both are differentiated.
    axis
        Default -1. ``dim`` is another name.

    Returns
    -------
    Array
        ``logits`` without axis ``axis``, in nats.
    """
    _check_same_shape(logits, target_logits)
    return -(jax.nn.softmax(target_logits, axis) * jax.nn.log_softmax(logits, axis)).sum(axis)


def _axes(axes: int | Sequence[int] | None) -> int | tuple[int, ...] | None:
    """Return the axes in a form that JAX takes; they may come as a list of a YAML file."""
    return axes if axes is None or isinstance(axes, int) else tuple(axes)


def _check_same_shape(prediction: Array, target: Array) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"the two arrays must have one shape, got {prediction.shape} and {target.shape}"
        )
