"""Contrastive losses between two views of the same samples."""

from __future__ import annotations

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp

from ml_networks._compat import checked_keywords
from ml_networks._geometry import check_ranges, check_views
from ml_networks.config import ContrastiveLearningConfig, as_config
from ml_networks.jax.base import BaseModule
from ml_networks.jax.layers import MLPLayer
from ml_networks.jax.rngs import RngsLike, as_rngs

__all__ = ["ContrastiveLearningLoss"]

Array = jax.Array
Losses: TypeAlias = dict[str, Array]
Embeddings: TypeAlias = tuple[Array, Array]


def _precise(embedding: Array) -> Array:
    """Return half-precision embeddings in float32: exponentials of their products follow."""
    return embedding.astype(jnp.promote_types(embedding.dtype, jnp.float32))


def _window_mean(sequence: Array, positive_range: int) -> Array:
    """Mean over the positions within `positive_range` that exist, (*batch, length, width)."""
    length = sequence.shape[-2]
    edges = [(0, 0)] * sequence.ndim
    edges[-2] = (positive_range, positive_range)
    window = (*(1,) * (sequence.ndim - 2), 2 * positive_range + 1, 1)
    total = jax.lax.reduce_window(sequence, 0.0, jax.lax.add, window, (1,) * sequence.ndim, edges)
    position = jnp.arange(length)
    last = jnp.minimum(position + positive_range, length - 1)
    count = last - jnp.maximum(position - positive_range, 0) + 1
    return total / count[:, None].astype(total.dtype)


@checked_keywords(contrastive_cfg="cfg", config="cfg")
class ContrastiveLearningLoss(BaseModule):
    """Embeds two views of the same samples and compares them.

    With embeddings a_i = f1(x1_i), b_i = f2(x2_i) of N samples (all batch dimensions together) and
    s_ij = a_i . b_j, the losses are written beside each method. f1 and f2 are one network when
    both inputs have the same width.

    Losses are computed in float32 at least, and keep the batch dimensions: take ``.mean()``.

    Parameters
    ----------
    dim_input1, dim_input2
        Widths of the two inputs.
    cfg
        The :class:`~ml_networks.config.ContrastiveLearningConfig`. With its `cross_entropy_like`
        the NCE losses are the same numbers, returned without the two terms they are made of.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.

    Raises
    ------
    ValueError
        When called with inputs of another width, or of different batch dimensions.
    """

    def __init__(
        self,
        dim_input1: int,
        dim_input2: int,
        cfg: ContrastiveLearningConfig,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        cfg = as_config(cfg, ContrastiveLearningConfig, what="ContrastiveLearningLoss cfg")
        self.dim_feature = cfg.dim_feature
        self.dim_input1 = dim_input1
        self.dim_input2 = dim_input2
        self.is_ce_like = cfg.cross_entropy_like
        self.eval_func = MLPLayer(dim_input1, cfg.dim_feature, cfg.eval_func, rngs=rngs)
        self.eval_func2 = (
            self.eval_func
            if dim_input1 == dim_input2
            else MLPLayer(dim_input2, cfg.dim_feature, cfg.eval_func, rngs=rngs)
        )

    def __call__(self, feature1: Array, feature2: Array) -> Losses:
        """Return :meth:`calc_nce` of the two inputs."""
        losses, _ = self._nce(*self._embed(feature1, feature2))
        return losses

    def calc_nce(
        self, feature1: Array, feature2: Array, return_emb: bool = False
    ) -> Losses | tuple[Losses, Embeddings]:
        """Noise-contrastive estimation (InfoNCE, https://arxiv.org/abs/1807.03748).

        ``nce_i = log(1/N sum_j exp s_ij) - s_ii``.

        Parameters
        ----------
        feature1, feature2
            ``(*batch, dim_input1)`` and ``(*batch, dim_input2)``.
        return_emb
            Return the embeddings too.

        Returns
        -------
        dict, or (dict, (embedding1, embedding2))
            ``"nce"`` (*batch); unless `cross_entropy_like`, also the means of its two terms
            without gradient, ``"positive"`` (s_ii) and ``"negative"`` (the logarithm). The
            embeddings are ``(*batch, dim_feature)``.
        """
        embeddings = self._embed(feature1, feature2)
        losses, _ = self._nce(*embeddings)
        return (losses, embeddings) if return_emb else losses

    def calc_sigmoid(
        self,
        feature1: Array,
        feature2: Array,
        return_emb: bool = False,
        temperature: float | Array = 0.1,
        bias: float | Array = 0.0,
    ) -> Losses | tuple[Losses, Embeddings]:
        """Pairwise sigmoid loss (SigLIP, https://arxiv.org/abs/2303.15343).

        ``sigmoid_i = -sum_j log sigmoid(z_ij (temperature s_ij + bias))``, z_ij = 1 if i = j,
        else -1.

        Parameters
        ----------
        feature1, feature2, return_emb
            As in :meth:`calc_nce`.
        temperature
            Multiplies the products. Default 0.1.
        bias
            Added to them. Default 0.

        Returns
        -------
        dict, or (dict, (embedding1, embedding2))
            ``"sigmoid"`` (*batch).
        """
        embeddings = self._embed(feature1, feature2)
        first, second = (_rows(embedding) for embedding in embeddings)
        logits = first @ second.T * temperature + bias
        # -log sigmoid(z) = softplus(-z); the positive pairs' sign is put right on the diagonal.
        loss = jax.nn.softplus(logits).sum(1) - logits.diagonal()
        losses = {"sigmoid": loss.reshape(feature1.shape[:-1])}
        return (losses, embeddings) if return_emb else losses

    def calc_timeseries_nce(
        self,
        feature1: Array,
        feature2: Array,
        positive_range_self: int = 0,
        positive_range_tgt: int = 0,
        return_emb: bool = False,
    ) -> Losses | tuple[Losses, Embeddings]:
        """NCE of time series whose near positions are positives too.

        ``nce_t = log(1/N sum_j exp s_tj) - s_tt - m(a_t, a) - m(b_t, b) - m'(a_t, b)``: m is the
        mean product of the position with those at most `positive_range_self` before or after it
        (itself included) in the same series, m' the same with `positive_range_tgt`. At the ends
        of a series the mean is over the positions that exist. A range of 0 leaves its terms out.

        Parameters
        ----------
        feature1, feature2
            ``(*batch, length, dim_input1)`` and ``(*batch, length, dim_input2)``.
        positive_range_self, positive_range_tgt
            The two ranges, Python integers. Default 0.
        return_emb
            Return the embeddings too.

        Returns
        -------
        dict, or (dict, (embedding1, embedding2))
            ``"nce"`` (*batch, length). With a range above 0 always, and otherwise unless
            `cross_entropy_like`: the means of the terms without gradient, ``"positive"``,
            ``"negative"``, ``"self_positive_1"``, ``"self_positive_2"``, ``"tgt_positive"``.

        Raises
        ------
        ValueError
            For a negative range.
        """
        check_ranges(
            positive_range_self=positive_range_self, positive_range_tgt=positive_range_tgt
        )
        embeddings = self._embed(feature1, feature2)
        losses, terms = self._nce(*embeddings)
        nce = losses["nce"]
        # The mean of products is the product with the mean: no (length x length) array.
        first, second = (_precise(embedding) for embedding in embeddings)
        length = first.shape[-2]
        positives: Losses = {}

        def near(query: Array, key: Array, positive_range: int) -> Array:
            return (query * _window_mean(key, min(positive_range, length - 1))).sum(-1)

        if positive_range_self:
            positives["self_positive_1"] = near(first, first, positive_range_self)
            positives["self_positive_2"] = near(second, second, positive_range_self)
        if positive_range_tgt:
            positives["tgt_positive"] = near(first, second, positive_range_tgt)
        if positives:
            for positive in positives.values():
                nce = nce - positive
            losses = _means(terms | positives) | {"nce": nce}
        return (losses, embeddings) if return_emb else losses

    def _embed(self, feature1: Array, feature2: Array) -> Embeddings:
        check_views((feature1.shape, feature2.shape), (self.dim_input1, self.dim_input2))
        return self.eval_func(feature1), self.eval_func2(feature2)

    def _nce(self, embedding1: Array, embedding2: Array) -> tuple[Losses, Losses]:
        """Return the losses of :meth:`calc_nce`, and the two terms of each sample."""
        first, second = _rows(embedding1), _rows(embedding2)
        negative = jax.nn.logsumexp(first @ second.T, 1) - math.log(max(first.shape[0], 1))
        positive = (first * second).sum(-1)
        losses = {"nce": (negative - positive).reshape(embedding1.shape[:-1])}
        terms = {"positive": positive, "negative": negative}
        if not self.is_ce_like:
            losses = _means(terms) | losses
        return losses, terms


def _rows(embedding: Array) -> Array:
    """All samples of (*batch, width) as rows."""
    return _precise(embedding).reshape(-1, embedding.shape[-1])


def _means(terms: Losses) -> Losses:
    """The means of the terms, without gradient."""
    return {name: jax.lax.stop_gradient(value).mean() for name, value in terms.items()}
