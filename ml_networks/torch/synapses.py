"""The synapses of the Continuous Thought Machine: what mixes its neurons at every tick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ml_networks._compat import checked_keywords
from ml_networks._geometry import hyper_levels, synapse_widths
from ml_networks.kernels.torch import norm_activation, norm_silu_skip_norm
from ml_networks.torch.layers import has_hooks
from ml_networks.torch.lora import HyperLoRALinear

__all__ = ["HyperSynapseUNET", "SynapseUNET", "make_synapses"]

MakeLinear = Callable[[int, int], nn.Module]


def _projection(inputs: int, outputs: int, dropout: float, linear: MakeLinear) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(dropout), linear(inputs, outputs), nn.LayerNorm(outputs), nn.SiLU()
    )


@checked_keywords()
class SynapseUNET(nn.Module):
    """A U-Net of linear layers with a skip connection at each level.

    Every projection is dropout, linear, layer norm, SiLU. The widths go from ``out_dims`` down to
    ``minimum_width`` in ``depth`` even steps and up again, ``u = LayerNorm(up(u) + down)``. On a
    GPU all that follows a linear layer is one op,
    :func:`~ml_networks.kernels.torch.norm_activation` or, going up,
    :func:`~ml_networks.kernels.torch.norm_silu_skip_norm`.

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
        Width of the input. Default None: found in the first input.
    """

    def __init__(
        self,
        out_dims: int,
        depth: int,
        minimum_width: int = 16,
        dropout: float = 0.0,
        in_dims: int | None = None,
    ) -> None:
        super().__init__()
        self.widths = synapse_widths(out_dims, depth, minimum_width)
        self.first_projection = nn.Sequential(
            nn.LazyLinear(out_dims) if in_dims is None else nn.Linear(in_dims, out_dims),
            nn.LayerNorm(out_dims),
            nn.SiLU(),
        )
        levels = list(zip(self.widths, self.widths[1:], strict=False))
        self.down_projections = nn.ModuleList(
            _projection(outer, inner, dropout, self._linear("down", level))
            for level, (outer, inner) in enumerate(levels)
        )
        self.up_projections = nn.ModuleList(
            _projection(inner, outer, dropout, self._linear("up", level))
            for level, (outer, inner) in enumerate(levels)
        )
        self.skip_lns = nn.ModuleList(nn.LayerNorm(width) for width in self.widths[:-1])

    def _linear(self, direction: str, level: int) -> MakeLinear:
        return nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_dims) to (B, out_dims)."""
        return self.from_first(self.first_projection[0](x))

    def from_first(self, x: Tensor) -> Tensor:
        """Go on from the output (B, out_dims) of the first linear layer."""
        if x.is_cuda and self._is_by_ops():
            return self._by_ops(x)
        _, norm, activation = self.first_projection
        x = activation(norm(x))
        skipped = [x]
        for down in self.down_projections:
            skipped.append(down(skipped[-1]))
        x = skipped.pop()
        for up, norm in zip(reversed(self.up_projections), reversed(self.skip_lns), strict=True):
            x = norm(up(x) + skipped.pop())
        return x

    def _is_by_ops(self) -> bool:
        """Whether all that follows the linear layers is as it was made: nothing replaced, hooked
        or sharded."""
        norms: list[Any] = [*self.skip_lns]
        for projection in self._projections():
            *_, norm, activation = projection
            norms.append(norm)
            if type(activation) is not nn.SiLU or has_hooks(activation) or has_hooks(projection):
                return False
        return all(
            type(norm) is nn.LayerNorm
            and type(norm.weight) is nn.Parameter
            and type(norm.bias) is nn.Parameter
            and norm.eps == norms[0].eps
            and not has_hooks(norm)
            for norm in norms
        )

    def _projections(self) -> Iterator[Any]:
        yield self.first_projection
        yield from self.down_projections
        yield from self.up_projections

    def _by_ops(self, x: Tensor) -> Tensor:
        eps: Any = self.skip_lns[0].eps

        def descended(x: Tensor, norm: Any) -> Tensor:
            return norm_activation(x, norm.weight, norm.bias, activation="SiLU", eps=eps)

        skipped = [descended(x, self.first_projection[1])]
        downs: list[Any] = [*self.down_projections]
        for dropout, linear, norm, _ in downs:
            skipped.append(descended(linear(dropout(skipped[-1])), norm))
        x = skipped.pop()
        ups: list[Any] = list(zip(self.up_projections, self.skip_lns, strict=True))
        for (dropout, linear, inner, _), outer in reversed(ups):
            y = linear(dropout(x))
            skip = skipped.pop().to(y.dtype)
            weights = outer.weight, outer.bias
            x = norm_silu_skip_norm(y, inner.weight, inner.bias, skip, *weights, eps=eps)
        return x


@checked_keywords()
class HyperSynapseUNET(SynapseUNET):
    """A :class:`SynapseUNET` whose chosen layers are :class:`~ml_networks.torch.HyperLoRALinear`.

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
    ) -> None:
        downs, ups = hyper_levels(hyper_layers, depth - 1)
        self.hyper_layers, self.hyper_rank = hyper_layers, hyper_rank
        self.dynamic = {"down": downs, "up": ups}
        super().__init__(out_dims, depth, minimum_width, dropout, in_dims)

    def _linear(self, direction: str, level: int) -> MakeLinear:
        if level not in self.dynamic[direction]:
            return nn.Linear
        return lambda inputs, outputs: HyperLoRALinear(inputs, outputs, self.hyper_rank)


def make_synapses(in_dims: int, out_dims: int, depth: int, dropout: float) -> nn.Module:
    """Make the synapses of a depth: one gated linear layer for 1, else a U-Net."""
    if depth > 1:
        return SynapseUNET(out_dims, depth, dropout=dropout, in_dims=in_dims)
    return nn.Sequential(
        nn.Dropout(dropout), nn.Linear(in_dims, 2 * out_dims), nn.GLU(), nn.LayerNorm(out_dims)
    )
