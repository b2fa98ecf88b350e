"""Linear layers with a low-rank update: one that is learnt, and one that the input generates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ml_networks.kernels.torch import hyper_lora_linear, lora_linear

__all__ = ["HyperLoRALinear", "LoRALinear"]


class _Mergeable(nn.Linear):
    """A linear layer whose update can be added to the weight and taken off again.

    While merged the original weight is kept, so that `unmerge` restores it exactly and
    ``state_dict`` holds it, merged or not.
    """

    _unmerged: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("_unmerged", None, persistent=False)

    @property
    def merged(self) -> bool:
        """Whether the weight holds the update."""
        return self._unmerged is not None

    @torch.no_grad()
    def _merge(self, update: Tensor) -> None:
        if self.merged:
            raise RuntimeError(f"this {type(self).__name__} is merged already; unmerge() it first")
        self._unmerged = self.weight.detach().clone()
        self.weight.add_(update.to(self.weight.dtype))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weight from before `merge`, exactly. Nothing happens if it is not merged."""
        if self._unmerged is not None:
            self.weight.copy_(self._unmerged)
            self._unmerged = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unmerged is not None:
            destination[f"{prefix}weight"] = self._unmerged

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")


class LoRALinear(_Mergeable):
    r"""A linear layer with a frozen weight and a learnt low-rank update.

    .. math::

        y = W x + b + \frac{\alpha}{r} B A x

    ``W`` and ``b`` have ``requires_grad`` off. B starts at zero, so the layer starts as the linear
    layer that it adapts. Keys are those of ``loralib``: ``weight``, ``bias``, ``lora_A``
    (rank, in), ``lora_B`` (out, rank).

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
    ) -> None:
        _check_rank(rank)
        super().__init__(in_features, out_features, bias)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int = 8, alpha: float | None = None
    ) -> LoRALinear:
        """Make the layer that adapts ``linear``, with its weights (the same memory), device and
        dtype.
        """
        bias = linear.bias is not None
        made = cls(linear.in_features, linear.out_features, rank, alpha, bias)
        made.to(linear.weight.device, linear.weight.dtype)
        made.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        if bias:
            made.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return made

    @property
    def scaling(self) -> float:
        """The factor of the update, alpha / rank."""
        return self.alpha / self.rank

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self.merged:
            return functional.linear(input, self.weight, self.bias)
        return lora_linear(
            input, self.weight, self.bias, self.lora_B, self.lora_A.mT, scale=self.scaling
        )

    def merge(self) -> None:
        """Add the update to the weight, for inference at the price of a linear layer.

        Raises
        ------
        RuntimeError
            If it is merged already.
        """
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self._merge(self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide)))

    def extra_repr(self) -> str:
        """Sizes, rank and alpha."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"


class HyperLoRALinear(_Mergeable):
    r"""A linear layer with a low-rank update that every input generates for itself.

    .. math::

        c = \operatorname{SiLU}(W_c x + b_c),\quad g = \sigma(w_g c + b_g),\quad
        U = W_u c + b_u,\quad V = W_v c + b_v,\qquad
        y = W x + b + g\, U V^\top x

    U (out, rank) and V (in, rank) are never made. The generator of U starts at zero, so the layer
    starts as a linear layer. Beside a linear layer's keys it has those of the linear layers
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
    ) -> None:
        _check_rank(rank)
        if context_dim < 1:
            raise ValueError(f"context_dim is {context_dim}; it must be at least 1")
        super().__init__(in_features, out_features, bias)
        self.rank = rank
        self.context = nn.Linear(in_features, context_dim)
        self.to_gate = nn.Linear(context_dim, 1)
        self.to_u = nn.Linear(context_dim, out_features * rank)
        self.to_v = nn.Linear(context_dim, in_features * rank)
        nn.init.zeros_(self.to_u.weight)
        nn.init.zeros_(self.to_u.bias)

    def _context(self, input: Tensor) -> Tensor:
        return functional.silu(self.context(input))

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self.merged:
            return functional.linear(input, self.weight, self.bias)
        return hyper_lora_linear(
            input,
            self.weight,
            self.bias,
            self._context(input),
            self.to_gate.weight,
            self.to_gate.bias,
            self.to_u.weight,
            self.to_u.bias,
            self.to_v.weight,
            self.to_v.bias,
        )

    @torch.no_grad()
    def update(self, input: Tensor) -> Tensor:
        """The update that each input adds to the weight, g U V^T: (..., in) to (..., out, in)."""
        c = self._context(input)
        u = self.to_u(c).unflatten(-1, (self.out_features, self.rank))
        v = self.to_v(c).unflatten(-1, (self.in_features, self.rank))
        return torch.sigmoid(self.to_gate(c)).unsqueeze(-1) * (u @ v.mT)

    def merge(self, input: Tensor) -> None:
        """Add to the weight the update that one input generates; every input then gets this one.

        Parameters
        ----------
        input
            The input (in,) whose update to hold fast.

        Raises
        ------
        ValueError
            If it is not one input.
        RuntimeError
            If it is merged already.
        """
        if input.shape != (self.in_features,):
            raise ValueError(
                f"input has shape {tuple(input.shape)}; merging holds the update of one input, "
                f"({self.in_features},)"
            )
        self._merge(self.update(input))

    def extra_repr(self) -> str:
        """Sizes and rank."""
        return f"{super().extra_repr()}, rank={self.rank}"
