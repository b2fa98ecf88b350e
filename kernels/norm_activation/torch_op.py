"""Norm, activation, dropout and residual for torch: the public function, the plain path, the
custom ops. The custom ops work on rows (rows, columns)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import dispatch, torch_functions, usage
from ..core.device import torch_device
from ..core.registry import Binding
from . import spec

Optionals = Tensor | None
_SEEDS = 0, 1 << 62


def norm_activation(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    norm: str = "layer",
    activation: str = "Identity",
    eps: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    r"""Normalise each row, then apply an activation, dropout and a residual, in one kernel.

    .. math::

        y = m \odot \phi\!\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \odot \gamma
            + \beta\right) + r

    over the last axis. :math:`\phi` is any activation of the library without weights of its own;
    ``GLU``, ``SiGLU`` and ``SwiGLU`` halve the axis, :math:`\phi(a, b) = a \, \sigma(b)` and
    :math:`a \operatorname{silu}(b)`. :math:`m` is 0 with probability ``dropout``, otherwise
    1 / (1 - ``dropout``); it is made from a counter, in the backward pass again, and never stored.

    Parameters
    ----------
    x
        Shape (..., C); float32, bfloat16, float16 or float64. Arithmetic is in float32 (float64
        for float64), the result in the dtype of ``x``, also under autocast.
    weight, bias
        :math:`\gamma` and :math:`\beta`, shape (C,). None: ones and zeros.
    residual
        :math:`r`, the shape and dtype of the result.
    norm
        ``"layer"`` (Ba et al., arXiv 1607.06450), ``"rms"`` (Zhang and Sennrich, arXiv
        1910.07467: :math:`\mu = 0`, :math:`\sigma^2` the mean square) or ``"none"`` (the fraction
        is x).
    activation
        A name of `ml_networks.kernels.core.activations.NAMES`. Default ``"Identity"``.
    eps
        Default 1e-5 for ``"layer"`` and, as in torch, the machine epsilon of the arithmetic for
        ``"rms"``.
    dropout
        Probability in [0, 1).
    seed
        Makes the dropped elements a function of ``seed``, row and column alone, the same in every
        implementation and framework (`ml_networks.kernels.core.dropout`): an integer or an int64
        tensor of one element. None: drawn from torch's generator; the plain path then drops as
        ``torch.nn.functional.dropout`` does.
    implementation
        ``"torch"``, ``"triton"``, or None to let dispatch choose.

    Returns
    -------
    Tensor
        Shape (..., C), or (..., C / 2) after a gated activation.

    Raises
    ------
    TypeError
        If ``x`` is not a floating-point tensor or ``residual`` has another dtype.
    ValueError
        If a shape does not fit, ``dropout`` is outside [0, 1), or ``norm`` or ``activation`` has
        no such name.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    NaN and infinity in a row make a normalised row NaN, as in torch. Repeated calls give the same
    bits, gradients included. Under ``torch.func.vmap`` the mapped axis becomes rows where weight
    and bias are not mapped and nothing is dropped; under other transforms the plain path runs.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"x must be a floating-point tensor, got {got}")
    given = {"weight": weight, "bias": bias, "residual": residual}
    shapes = {k: None if v is None else tuple(v.shape) for k, v in given.items()}
    width = spec.check_arguments(tuple(x.shape), shapes, norm, activation, dropout)
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"residual is {residual.dtype}; it must be {x.dtype} like x")
    if eps is None:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        eps = torch.finfo(exact).eps if norm == "rms" else 1e-5
    options = norm, activation, float(eps), float(dropout)
    if _takes_plain_path(x, width, weight, bias, residual, options, implementation):
        return _plain(x, weight, bias, residual, seed, *options)
    if dropout > 0:
        if seed is None:
            seed = torch.randint(*_SEEDS, (1,), device=x.device)
        else:
            seed = torch.as_tensor(seed, dtype=torch.int64, device=x.device).reshape(1)
    rows = x.reshape(-1 if x.numel() else 0, x.shape[-1])
    residual = None if residual is None else residual.reshape(rows.shape[0], width)
    drawn = seed if dropout > 0 and isinstance(seed, Tensor) else None
    y = _forward_op(rows, weight, bias, residual, drawn, *options, implementation)
    return y.reshape(*x.shape[:-1], width)


Options = tuple[str, str, float, float]
"""norm, activation, eps, dropout."""


def _takes_plain_path(
    x: Tensor,
    width: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    options: Options,
    implementation: str | None,
) -> bool:
    on_cpu = x.is_cpu
    if torch.compiler.is_compiling():
        # The custom op decides at run time: a new shape then changes no traced code.
        return implementation == "torch" or (on_cpu and implementation is None)
    if on_cpu and not usage.recording() and not dispatch.is_overridden(BINDING, implementation):
        return True
    if torch_functions.transformed(x, weight, bias, residual):
        fits = torch_functions.mapped(x, residual) and not torch_functions.mapped(weight, bias)
        return not fits or options[-1] > 0
    rows = x.shape[:-1].numel()
    decision = _decide(rows, width, x, options, residual is not None, "forward", implementation)
    return decision.implementation == "torch" and not usage.recording()


def _decide(
    rows: int,
    width: int,
    x: Tensor,
    options: Options,
    residual: bool,
    direction: str,
    implementation: str | None,
) -> dispatch.Decision:
    norm, activation, _, dropout = options
    flags = {"norm": norm, "activation": activation, "dropout": dropout, "residual": residual}
    dtype = str(x.dtype).removeprefix("torch.")
    problem = spec.problem_of(rows, width, dtype, direction, flags)
    return dispatch.decide(problem, torch_device(x.device), BINDING, implementation)


def _plain(
    x: Tensor,
    weight: Optionals,
    bias: Optionals,
    residual: Optionals,
    seed: int | Tensor | None,
    norm: str,
    activation: str,
    eps: float,
    dropout: float,
) -> Tensor:
    """The op in ordinary torch operations, differentiable any number of times."""
    with torch_functions.without_autocast(x):
        if weight is not None and weight.dtype != x.dtype:
            weight = weight.to(x.dtype)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        y = _normalized(x, weight, bias, norm, eps)
        y = torch_functions.apply(activation, y)
        if dropout and seed is None:
            y = F.dropout(y, dropout)
        elif dropout and seed is not None:
            rows, width = y.shape[:-1].numel(), y.shape[-1]
            scale = torch_functions.dropout_scale(dropout, seed, rows, width, y.device, y.dtype)
            y = y * scale.reshape(y.shape)
        return y if residual is None else y + residual


def _normalized(x: Tensor, weight: Optionals, bias: Optionals, norm: str, eps: float) -> Tensor:
    if norm == "layer":
        # torch's function takes no bias without a weight.
        one = torch.ones_like(bias) if weight is None and bias is not None else weight
        return F.layer_norm(x, x.shape[-1:], one, bias, eps)
    y = x
    if norm == "rms":
        y = F.rms_norm(x, x.shape[-1:], weight, eps)
    elif weight is not None:
        y = y * weight
    return y if bias is None else y + bias


@torch.library.custom_op("ml_networks::norm_activation", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    norm: str,
    activation: str,
    eps: float,
    dropout: float,
    implementation: str | None,
) -> Tensor:
    options = norm, activation, eps, dropout
    rows, width = x.shape[0], x.shape[1] // spec.parts(activation)
    decision = _decide(rows, width, x, options, residual is not None, "forward", implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or not rows:
            y = _plain(x, weight, bias, residual, seed, *options)
            # A custom op may return none of its inputs.
            return y.clone() if y is x else y
        from . import triton_kernel

        weight, bias = _contiguous(weight), _contiguous(bias)
        return triton_kernel.forward(x, weight, bias, residual, seed, *options, decision.config)


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


@_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    norm: str,
    activation: str,
    *_: Any,
) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // spec.parts(activation)))


@_forward_op.register_vmap
def _(
    info: Any,
    axes: tuple[Any, ...],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    norm: str,
    activation: str,
    eps: float,
    dropout: float,
    implementation: str | None,
) -> tuple[Tensor, int]:
    """Of x and the residual alone: `_takes_plain_path` lets nothing else through."""
    size = info.batch_size
    y = norm_activation(
        torch_functions.folded(x, axes[0], size),
        weight,
        bias,
        None if residual is None else torch_functions.folded(residual, axes[3], size),
        norm=norm,
        activation=activation,
        eps=eps,
        implementation=implementation,
    )
    return torch_functions.unfolded(y, size), 0


@torch.library.custom_op("ml_networks::norm_activation_backward", mutates_args=())
def _backward_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    of_y: Tensor,
    norm: str,
    activation: str,
    eps: float,
    dropout: float,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, the last two empty without weight and bias."""
    options = norm, activation, eps, dropout
    rows, width = of_y.shape
    decision = _decide(rows, width, x, options, False, "backward", implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or not x.shape[0]:
            return _plain_gradient(x, weight, bias, seed, of_y, *options)
        from . import triton_kernel

        of_x, of_weight, of_bias = triton_kernel.backward(
            x,
            _contiguous(weight),
            _contiguous(bias),
            seed,
            of_y,
            *options,
            decision.config,
            torch_device(x.device),
        )
        return of_x, _gradient_like(weight, of_weight, x), _gradient_like(bias, of_bias, x)


def _gradient_like(value: Tensor | None, gradient: Tensor, x: Tensor) -> Tensor:
    if value is None:
        return x.new_empty(0)
    # A tensor of its own: an op's results may not share memory.
    return torch.empty_like(value, memory_format=torch.contiguous_format).copy_(gradient)


def _plain_gradient(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    of_y: Tensor,
    norm: str,
    activation: str,
    eps: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in ordinary torch operations: the backward op's plain path."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = x.to(dtype)
    inverse = z.new_ones(())
    if norm != "none":
        z = z - z.mean(-1, keepdim=True) if norm == "layer" else z
        inverse = (z.square().mean(-1, keepdim=True) + eps).rsqrt()
        z = z * inverse
    scaled = z if weight is None else z * weight
    dropped = of_y.to(dtype)
    if seed is not None:
        rows, width = of_y.shape
        dropped = dropped * torch_functions.dropout_scale(
            dropout, seed, rows, width, x.device, dtype
        )
    affine = scaled if bias is None else scaled + bias
    of_v = torch_functions.pull_back(activation, affine, dropped)
    of_z = of_v if weight is None else of_v * weight
    if norm != "none":
        along = z * (of_z * z).mean(-1, keepdim=True)
        of_z = of_z - along - of_z.mean(-1, keepdim=True) if norm == "layer" else of_z - along
    of_weight = x.new_empty(0) if weight is None else (of_v * z).sum(0).to(weight.dtype)
    of_bias = x.new_empty(0) if bias is None else of_v.sum(0).to(bias.dtype)
    # A custom op may return none of its inputs.
    return torch.empty_like(x).copy_(of_z * inverse), of_weight, of_bias


@_backward_op.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    def like(value: Tensor | None) -> Tensor:
        return x.new_empty(0) if value is None else value.new_empty(tuple(value.shape))

    return x.new_empty(tuple(x.shape)), like(weight), like(bias)


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, seed, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias, seed)


def _forward_gradient(ctx: Any, of_y: Tensor) -> tuple[Any, ...]:
    x, weight, bias, seed = ctx.saved_tensors
    of_x = of_weight = of_bias = None
    if any(ctx.needs_input_grad[:3]):
        of_x, of_weight, of_bias = _backward_op(x, weight, bias, seed, of_y, *ctx.options)
    return (
        of_x,
        None if weight is None else of_weight,
        None if bias is None else of_bias,
        of_y if ctx.needs_input_grad[3] else None,
        *(None,) * 6,
    )


_forward_op.register_autograd(_forward_gradient, setup_context=_setup_forward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, seed, of_y, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias, seed, of_y)


def _second_gradient(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    """The derivative of the backward op, through the plain path."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        saved: Any = [_leaf(value) for value in ctx.saved_tensors]
        x, weight, bias, seed, of_y = saved
        y = _plain(x, weight, bias, None, seed, *ctx.options[:4])
        first = [value for value in (x, weight, bias) if value is not None]
        gradients = torch.autograd.grad(y, first, of_y, create_graph=True)
        given = [c for c, v in zip(cotangents, (x, weight, bias), strict=True) if v is not None]
        found = _gradients(gradients, [*first, of_y], given, create_graph)
    remaining = iter(found)
    ordered = [None if value is None else next(remaining) for value in (x, weight, bias)]
    return *ordered, None, next(remaining), *(None,) * 5


def _gradients(
    outputs: Sequence[Tensor], wanted: list[Tensor], given: list[Tensor], create_graph: bool
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(
        outputs, wanted, given, create_graph=create_graph, allow_unused=True
    )


def _leaf(value: Tensor | None) -> Tensor | None:
    """A tensor to differentiate by. One that is part of a graph stays so, under a name of its own:
    a cotangent may depend on the other inputs, and that path is not this op's to follow."""
    if value is None or not value.is_floating_point():
        return value
    return value.view_as(value) if value.requires_grad else value.detach().requires_grad_()


_backward_op.register_autograd(_second_gradient, setup_context=_setup_backward)


def _call(
    inputs: Mapping[str, Tensor], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor]:
    options: dict[str, Any] = {**inputs, **flags}
    return {"y": norm_activation(**options, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="torch",
    implementations=("torch", "triton"),
    call=_call,
    differentiable=("x", "weight", "bias", "residual"),
    kernel_module="triton_kernel",
)
