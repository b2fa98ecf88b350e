"""The layers, loss and optimizer of a convolutional network, on torch's own kernels.

They are torch's classes, or subclasses that can replace them anywhere (``state_dict`` keys
included). What they add: :class:`Adam` is fused where torch can and its learning rate can be read
and set; and inside :func:`global_batch`, :class:`Dropout` and the batch norms compute what one
process would compute for the whole batch, whatever the number of processes that share it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch import nn as torch_nn
from torch.nn import Conv2d, Flatten, Linear, ReLU

__all__ = [
    "Adam",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv2d",
    "CrossEntropyLoss",
    "Dropout",
    "Flatten",
    "GlobalBatch",
    "Linear",
    "MaxPool2d",
    "ReLU",
    "global_batch",
]

_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}


@dataclass(frozen=True)
class GlobalBatch:
    """The part of a batch that this process computes, and the random numbers of the step."""

    start: int
    size: int
    generator: torch.Generator


_current: GlobalBatch | None = None


@contextmanager
def global_batch(start: int, size: int, generator: torch.Generator) -> Iterator[GlobalBatch]:
    """Say which part of the batch this process computes, for the layers of this module.

    Inside, the input's first axis holds the rows from ``start`` on of a batch of ``size`` rows
    that all processes of the default group share. In training mode a batch norm takes its
    statistics over the whole batch, and dropout draws the whole batch's mask from ``generator``
    and uses its own rows of it. Output and gradients are then those of one process with the whole
    batch, up to the rounding of sums. The default torch layers instead normalise each process's
    part by itself and drop whatever its own generator says.

    Parameters
    ----------
    start
        Row of the batch at which this process's part starts.
    size
        Rows in the whole batch.
    generator
        On the device of the data, in the same state in each process.
    """
    global _current
    outer = _current
    _current = GlobalBatch(start, size, generator)
    try:
        yield _current
    finally:
        _current = outer


class Dropout(torch_nn.Dropout):
    """Zero features with probability ``p`` in training, and scale the rest by ``1 / (1 - p)``.

    Parameters
    ----------
    p
        Default 0.5.
    inplace
        Overwrite the input. Default False.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with features dropped; see :func:`global_batch`."""
        if not self.training or _current is None or self.p == 0:
            return super().forward(input)
        batch = _current
        shape = (batch.size, *input.shape[1:])
        kept = torch.empty(shape, dtype=input.dtype, device=input.device)
        kept.bernoulli_(1 - self.p, generator=batch.generator)
        mask = kept[batch.start : batch.start + len(input)]
        mask = mask / (1 - self.p) if self.p < 1 else mask
        return input.mul_(mask) if self.inplace else input * mask


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; every process's result depends on every input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _sum_over_processes(x: Tensor) -> Tensor:
    total: Tensor = _SumOverProcesses.apply(x)
    return total


class _GlobalBatchNorm(torch_nn.modules.batchnorm._BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised input; see :func:`global_batch`."""
        if not self.training or _current is None or _current.size == len(input):
            return super().forward(input)
        self._check_input_dim(input)
        axes = [0, *range(2, input.ndim)]
        column = (1, -1, *(1 for _ in input.shape[2:]))
        count = _current.size * math.prod(input.shape[2:])
        wide = input.float() if input.dtype.itemsize < 4 else input
        mean = _sum_over_processes(wide.sum(axes)) / count
        centred = wide - mean.view(column)
        variance = _sum_over_processes((centred * centred).sum(axes)) / count
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        normalised = centred * (variance + self.eps).rsqrt().view(column)
        if self.affine:
            normalised = normalised * self.weight.view(column) + self.bias.view(column)
        return normalised.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        weight = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), weight)
        self.running_var.lerp_(variance.to(self.running_var), weight)


class BatchNorm1d(_GlobalBatchNorm, torch_nn.BatchNorm1d):
    """Batch normalisation of ``(B, C)`` or ``(B, C, L)``.

    Parameters
    ----------
    num_features
        Channels ``C``.
    eps
        Added to the variance. Default 1e-5.
    momentum
        Weight of the newest batch in the running statistics; None: the plain average. Default
        0.1.
    affine
        Learn a scale and a shift for each channel. Default True.
    track_running_stats
        Keep the running statistics that evaluation uses. Default True.
    """


class BatchNorm2d(_GlobalBatchNorm, torch_nn.BatchNorm2d):
    """Batch normalisation of ``(B, C, H, W)``, with the arguments of :class:`BatchNorm1d`."""


class MaxPool2d(torch_nn.MaxPool2d):
    """The largest value of each window of ``(B, C, H, W)``.

    Parameters
    ----------
    kernel_size
        Window, one integer or (height, width).
    stride
        Default: the window.
    padding
        Rows and columns of minus infinity around the image. Default 0.
    dilation
        Distance of a window's pixels. Default 1.
    ceil_mode
        Keep windows that the image's edge cuts off. Default False.
    return_indices
        Return also where each maximum was. Default False.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        ceil_mode: bool = False,
        *,
        return_indices: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)


class CrossEntropyLoss(torch_nn.CrossEntropyLoss):
    r"""Cross entropy of logits ``(B, C, ...)`` with class indices ``(B, ...)`` or probabilities.

    Parameters
    ----------
    weight
        Weight of each class, ``(C,)``. Default: all 1.
    reduction
        ``"mean"`` (weighted by the targets' class weights), ``"sum"`` or ``"none"``.
    ignore_index
        Targets of this value do not count. Default -100, which None stands for.
    label_smoothing
        Share :math:`\epsilon` of the target that is spread evenly over the classes. Default 0.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        if reduction not in {"mean", "sum", "none"}:
            raise ValueError(f"reduction is {reduction!r}; it takes 'mean', 'sum' or 'none'")
        super().__init__(
            weight,
            ignore_index=-100 if ignore_index is None else ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )


class Adam(torch.optim.Adam):
    """Adam (Kingma and Ba, arXiv 1412.6980), one fused kernel a step where torch has one.

    Parameters
    ----------
    parameters
        Parameters or parameter groups.
    lr
        Learning rate. Default 1e-3.
    betas
        Decay of the running averages of the gradient and of its square. Default (0.9, 0.999).
    eps
        Added to the denominator. Default 1e-8.
    weight_decay
        Factor of an L2 penalty's gradient. Default 0.
    amsgrad
        Divide by the largest running average so far (Reddi et al., 2018). Default False.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(
            parameters,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
        )
        for group in self.param_groups:
            group["fused"] = all(
                parameter.is_floating_point() and parameter.device.type in _FUSED_DEVICES
                for parameter in group["params"]
            )

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group."""
        return float(self.param_groups[0]["lr"])

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every parameter group."""
        if not lr >= 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        for group in self.param_groups:
            group["lr"] = lr
