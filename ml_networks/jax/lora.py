"""Linear layers with a low-rank update: one that is learnt, and one that the input generates."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ml_networks.jax.base import FrozenParam, _retype
from ml_networks.jax.primitives import Linear
from ml_networks.jax.rngs import RngsLike, as_rngs
from ml_networks.kernels.jax import hyper_lora_linear, lora_linear

__all__ = ["HyperLoRALinear", "LoRALinear"]


class Unmerged(nnx.Variable):
    """The kernel from before `merge`."""


class _Mergeable(Linear):
    """A linear layer whose update can be added to the kernel and taken off again. While merged
    the original kernel is kept: `unmerge` restores it exactly, and checkpoints hold it."""

    def __init__(self, in_features: int, out_features: int, bias: bool, rngs: nnx.Rngs) -> None:
        super().__init__(in_features, out_features, bias, rngs=rngs)
        self.unmerged: Unmerged | None = nnx.data(None)

    @property
    def merged(self) -> bool:
        """Whether the kernel holds the update."""
        return self.unmerged is not None

    def _merge(self, update: Array) -> None:
        if self.merged:
            raise RuntimeError(f"this {type(self).__name__} is merged already; unmerge() it first")
        self.unmerged = Unmerged(self.kernel[...])
        self.kernel[...] = self.kernel[...] + update.astype(self.kernel[...].dtype)

    def unmerge(self) -> None:
        """Restore the kernel from before `merge`, exactly. Nothing happens if it is not merged."""
        if self.unmerged is not None:
            self.kernel[...] = self.unmerged[...]
            self.unmerged = None

    def _bias(self, x: Array) -> Array | None:
        return None if self.bias is None else self.bias[...].astype(x.dtype)


def _weight_and_bias(layer: Linear) -> tuple[Array, Array]:
    assert layer.bias is not None
    return layer.kernel[...].T, layer.bias[...]


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")


class LoRALinear(_Mergeable):
    r"""A linear layer with a frozen kernel and a learnt low-rank update.

    .. math::

        y = W x + b + \frac{\alpha}{r} B A x

    ``W`` (as ``kernel``, (in, out)) and ``b`` are :class:`ml_networks.jax.base.FrozenParam`. B
    starts at zero, so the layer starts as the linear layer that it adapts. ``lora_A`` is
    (rank, in) and ``lora_B`` (out, rank), as in ``loralib``.

    Parameters
    ----------
    in_features, out_features
        Sizes of the last axis before and after.
    rank
        :math:`r`. Default 8.
    alpha
        :math:`\alpha`. Default ``rank``, a factor of 1.
    bias
        Whether ``b`` exists. Default True.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.

    Raises
    ------
    ValueError
        If ``rank`` is below 1.

    Notes
    -----
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float | None = None,
        bias: bool = True,
        *,
        rngs: RngsLike,
    ) -> None:
        _check_rank(rank)
        rngs = as_rngs(rngs)
        super().__init__(in_features, out_features, bias, rngs)
        _retype(self, nnx.Param, FrozenParam, ("kernel", "bias").__contains__)
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        bound = 1 / math.sqrt(in_features) if in_features else 0.0
        initial = jax.random.uniform(
            rngs.params(), (rank, in_features), minval=-bound, maxval=bound
        )
        self.lora_A = nnx.Param(initial)
        self.lora_B = nnx.Param(jnp.zeros((out_features, rank)))

    @classmethod
    def from_linear(
        cls, linear: Linear, rank: int = 8, alpha: float | None = None, *, rngs: RngsLike
    ) -> LoRALinear:
        """Make the layer that adapts ``linear``, with its weights and dtype."""
        kernel = linear.kernel[...]
        width_in, width_out = kernel.shape
        made = cls(width_in, width_out, rank, alpha, linear.bias is not None, rngs=rngs)
        made.kernel[...] = kernel
        if made.bias is not None and linear.bias is not None:
            made.bias[...] = linear.bias[...]
        for adapter in (made.lora_A, made.lora_B):
            adapter[...] = adapter[...].astype(kernel.dtype)
        return made

    @property
    def scaling(self) -> float:
        """The factor of the update, alpha / rank."""
        return self.alpha / self.rank

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Map (..., in) to (..., out)."""
        if self.merged:
            return super().__call__(x)
        weight, u, v = (
            value.astype(x.dtype)
            for value in (self.kernel[...].T, self.lora_B[...], self.lora_A[...].T)
        )
        return lora_linear(x, weight, self._bias(x), u, v, scale=self.scaling)

    def merge(self) -> None:
        """Add the update to the kernel, for inference at the price of a linear layer.

        Raises
        ------
        RuntimeError
            If it is merged already.
        """
        a, b = (value[...].astype(jnp.float32) for value in (self.lora_A, self.lora_B))
        self._merge(self.scaling * jnp.matmul(a.T, b.T, precision="highest"))


class HyperLoRALinear(_Mergeable):
    r"""A linear layer with a low-rank update that every input generates for itself.

    .. math::

        c = \operatorname{SiLU}(W_c x + b_c),\quad g = \sigma(w_g c + b_g),\quad
        U = W_u c + b_u,\quad V = W_v c + b_v,\qquad
        y = W x + b + g\, U V^\top x

    U (out, rank) and V (in, rank) are never made. The generator of U starts at zero, so the layer
    starts as a linear layer. Beside a linear layer's weights it has those of the linear layers
    ``context`` (in to context_dim), ``to_gate`` (to 1), ``to_u`` (to out * rank) and ``to_v``
    (to in * rank).

    Parameters
    ----------
    in_features, out_features
        Sizes of the last axis before and after.
    rank
        Rank of the update. Default 8.
    context_dim
        Size of c. Default 8.
    bias
        Whether ``b`` exists. Default True.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.

    Raises
    ------
    ValueError
        If ``rank`` or ``context_dim`` is below 1.

    Notes
    -----
    Ha, Dai, Le, "HyperNetworks", arXiv 1609.09106, for weights made by a network; Hu et al.,
    "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, for the update's form.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        context_dim: int = 8,
        bias: bool = True,
        *,
        rngs: RngsLike,
    ) -> None:
        _check_rank(rank)
        if context_dim < 1:
            raise ValueError(f"context_dim is {context_dim}; it must be at least 1")
        rngs = as_rngs(rngs)
        super().__init__(in_features, out_features, bias, rngs)
        self.rank = rank
        self.context = Linear(in_features, context_dim, rngs=rngs)
        self.to_gate = Linear(context_dim, 1, rngs=rngs)
        self.to_u = Linear(context_dim, out_features * rank, rngs=rngs)
        self.to_v = Linear(context_dim, in_features * rank, rngs=rngs)
        nnx.update(self.to_u, jax.tree.map(jnp.zeros_like, nnx.state(self.to_u)))

    def _context(self, x: Array) -> Array:
        return jax.nn.silu(self.context(x))

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Map (..., in) to (..., out)."""
        if self.merged:
            return super().__call__(x)
        generators = [
            value.astype(x.dtype)
            for layer in (self.to_gate, self.to_u, self.to_v)
            for value in _weight_and_bias(layer)
        ]
        weight = self.kernel[...].astype(x.dtype).T
        return hyper_lora_linear(x, weight, self._bias(x), self._context(x), *generators)

    def update(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch in out"]:
        """The update that each input adds to the kernel, g V U^T: (..., in) to (..., in, out)."""
        c = self._context(x)
        width_in, width_out = self.kernel[...].shape
        u = self.to_u(c).reshape(*c.shape[:-1], width_out, self.rank)
        v = self.to_v(c).reshape(*c.shape[:-1], width_in, self.rank)
        return jax.nn.sigmoid(self.to_gate(c))[..., None] * (v @ u.mT)

    def merge(self, x: Float[Array, " in"]) -> None:
        """Add to the kernel the update that one input generates; every input then gets this one.

        Parameters
        ----------
        x
            The input (in,) whose update to hold fast.

        Raises
        ------
        ValueError
            If it is not one input.
        RuntimeError
            If it is merged already.
        """
        width_in = self.kernel[...].shape[0]
        if x.shape != (width_in,):
            raise ValueError(
                f"x has shape {x.shape}; merging holds the update of one input, ({width_in},)"
            )
        self._merge(self.update(x))
