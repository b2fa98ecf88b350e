"""The synapses of the Continuous Thought Machine: what mixes its neurons at every tick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import nnx

from ml_networks._compat import checked_keywords
from ml_networks._geometry import hyper_levels, synapse_widths
from ml_networks.jax.layers import make_dropout
from ml_networks.jax.lora import HyperLoRALinear
from ml_networks.jax.primitives import LayerNorm, Linear, on_one_accelerator
from ml_networks.jax.rngs import RngsLike, as_rngs
from ml_networks.kernels.jax import norm_activation, norm_silu_skip_norm

__all__ = ["HyperSynapseUNET", "SynapseUNET", "make_synapses"]

Array = jax.Array
MakeLinear = Callable[[int, int], Any]


class _Projection(nnx.Module):
    """Dropout, linear, layer norm, SiLU."""

    torch_names: ClassVar[dict[str, str]] = {"linear": "1", "norm": "2"}

    def __init__(
        self, inputs: int, outputs: int, dropout: float, linear: MakeLinear, rngs: nnx.Rngs
    ) -> None:
        self.dropout = make_dropout(dropout, rngs)
        self.linear = linear(inputs, outputs)
        self.norm = LayerNorm(outputs)

    def __call__(self, x: Array) -> Array:
        return jax.nn.silu(self.norm(self.linear(self.dropout(x))))


@checked_keywords()
class SynapseUNET(nnx.Module):
    """A U-Net of linear layers with a skip connection at each level.

    Every projection is dropout, linear, layer norm, SiLU. The widths go from ``out_dims`` down to
    ``minimum_width`` in ``depth`` even steps and up again, ``u = LayerNorm(up(u) + down)``. On one
    GPU all that follows a linear layer is one op, :func:`~ml_networks.kernels.jax.norm_activation`
    or, going up, :func:`~ml_networks.kernels.jax.norm_silu_skip_norm`.

    Parameters
    ----------
    out_dims
        Width of the output, and of the outermost level.
    depth
        Number of widths, at least 2.
    minimum_width
        Width of the innermost level. Default 16.
    dropout
        Dropout probability. Default 0.
    in_dims
        Width of the input. Must be given.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    torch_names: ClassVar[dict[str, str]] = {
        "first_linear": "first_projection.0",
        "first_norm": "first_projection.1",
    }

    def __init__(
        self,
        out_dims: int,
        depth: int,
        minimum_width: int = 16,
        dropout: float = 0.0,
        in_dims: int | None = None,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        self.widths = synapse_widths(out_dims, depth, minimum_width)
        if in_dims is None:
            raise TypeError(f"{type(self).__name__} needs in_dims, the width of its input")
        self.first_linear = Linear(in_dims, out_dims, rngs=rngs)
        self.first_norm = LayerNorm(out_dims)
        levels = list(zip(self.widths, self.widths[1:], strict=False))
        self.down_projections = nnx.List(
            [
                _Projection(outer, inner, dropout, self._linear("down", level, rngs), rngs)
                for level, (outer, inner) in enumerate(levels)
            ]
        )
        self.up_projections = nnx.List(
            [
                _Projection(inner, outer, dropout, self._linear("up", level, rngs), rngs)
                for level, (outer, inner) in enumerate(levels)
            ]
        )
        self.skip_lns = nnx.List([LayerNorm(width) for width in self.widths[:-1]])

    def _linear(self, direction: str, level: int, rngs: nnx.Rngs) -> MakeLinear:
        return lambda inputs, outputs: Linear(inputs, outputs, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Map (B, in_dims) to (B, out_dims)."""
        return self.from_first(self.first_linear(x))

    def from_first(self, x: Array) -> Array:
        """Go on from the output (B, out_dims) of the first linear layer."""
        if on_one_accelerator() and self._is_by_ops():
            return self._by_ops(x)
        skipped = [jax.nn.silu(self.first_norm(x))]
        for down in self.down_projections:
            skipped.append(down(skipped[-1]))
        x = skipped.pop()
        for level in reversed(range(len(skipped))):
            x = self.skip_lns[level](self.up_projections[level](x) + skipped[level])
        return x

    def _is_by_ops(self) -> bool:
        """Whether the children are as they were made."""
        projections = [*self.down_projections, *self.up_projections]
        norms = [self.first_norm, *self.skip_lns, *(p.norm for p in projections)]
        return all(type(projection) is _Projection for projection in projections) and all(
            type(norm) is LayerNorm and norm.eps == norms[0].eps for norm in norms
        )

    def _by_ops(self, x: Array) -> Array:
        eps = self.first_norm.eps

        def of(norm: Any) -> tuple[Array, Array]:
            return norm.scale[...], norm.bias[...]

        def descended(x: Array, norm: LayerNorm) -> Array:
            return norm_activation(x, *of(norm), activation="SiLU", eps=eps)

        skipped = [descended(x, self.first_norm)]
        for down in self.down_projections:
            skipped.append(descended(down.linear(down.dropout(skipped[-1])), down.norm))
        x = skipped.pop()
        for up, norm in reversed(list(zip(self.up_projections, self.skip_lns, strict=True))):
            y = up.linear(up.dropout(x))
            skip = skipped.pop().astype(y.dtype)
            x = norm_silu_skip_norm(y, *of(up.norm), skip, *of(norm), eps=eps)
        return x


@checked_keywords()
class HyperSynapseUNET(SynapseUNET):
    """A :class:`SynapseUNET` whose chosen layers are :class:`~ml_networks.jax.HyperLoRALinear`.

    Parameters
    ----------
    out_dims, depth, minimum_width, dropout
        As in :class:`SynapseUNET`.
    hyper_layers
        ``"bottleneck"`` (the two deepest levels, down and up), ``"down"``, ``"up"``, ``"all"`` or
        ``"none"``.
    hyper_rank
        Rank of the dynamic weights. Default 8.
    in_dims
        As in :class:`SynapseUNET`.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    def __init__(
        self,
        out_dims: int,
        depth: int,
        minimum_width: int = 16,
        dropout: float = 0.0,
        hyper_layers: str = "bottleneck",
        hyper_rank: int = 8,
        in_dims: int | None = None,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        downs, ups = hyper_levels(hyper_layers, depth - 1)
        self.hyper_layers, self.hyper_rank = hyper_layers, hyper_rank
        self.dynamic = frozenset({("down", n) for n in downs} | {("up", n) for n in ups})
        super().__init__(out_dims, depth, minimum_width, dropout, in_dims, rngs=rngs)

    def _linear(self, direction: str, level: int, rngs: nnx.Rngs) -> MakeLinear:
        if (direction, level) not in self.dynamic:
            return super()._linear(direction, level, rngs)
        rank = self.hyper_rank
        return lambda inputs, outputs: HyperLoRALinear(inputs, outputs, rank, rngs=rngs)


class GatedSynapses(nnx.Module):
    """The synapses of depth 1: dropout, linear, GLU, layer norm."""

    torch_names: ClassVar[dict[str, str]] = {"linear": "1", "norm": "3"}

    def __init__(self, in_dims: int, out_dims: int, dropout: float, rngs: nnx.Rngs) -> None:
        self.dropout = make_dropout(dropout, rngs)
        self.linear = Linear(in_dims, 2 * out_dims, rngs=rngs)
        self.norm = LayerNorm(out_dims)

    def __call__(self, x: Array) -> Array:
        """Map (B, in_dims) to (B, out_dims)."""
        return self.norm(jax.nn.glu(self.linear(self.dropout(x))))


def make_synapses(
    in_dims: int, out_dims: int, depth: int, dropout: float, *, rngs: RngsLike
) -> Any:
    """Make the synapses of a depth: one gated linear layer for 1, else a U-Net."""
    rngs = as_rngs(rngs)
    if depth > 1:
        return SynapseUNET(out_dims, depth, dropout=dropout, in_dims=in_dims, rngs=rngs)
    return GatedSynapses(in_dims, out_dims, dropout, rngs)
