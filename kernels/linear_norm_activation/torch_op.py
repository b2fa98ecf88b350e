"""Linear, norm, activation, dropout and residual for torch: the public function, the plain path,
the custom op. The plain path is torch's linear layer and `norm_activation`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import dispatch, torch_functions, usage
from ..core.device import torch_device
from ..core.registry import Binding
from ..norm_activation.torch_op import norm_activation
from . import spec

_SEEDS = 0, 1 << 62


def linear_norm_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    norm: str = "none",
    norm_first: bool = False,
    activation: str = "Identity",
    eps: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    r"""A linear layer with norm, activation, dropout and residual, in one kernel if it is narrow.

    .. math::

        y = m \odot \phi(N(x W^\top + b)) + r \qquad\text{or}\qquad
        y = m \odot \phi(N(x) W^\top + b) + r

    with :math:`N` a norm of the last axis with weight and bias, :math:`\phi` an activation and
    :math:`m` the dropout, as in :func:`norm_activation`. Wide layers (more than 256 outputs or 512
    inputs) stay with the framework's matrix product, behind which `norm_activation` runs.

    Parameters
    ----------
    x
        Shape (..., I); float32, bfloat16, float16 or float64. Sums are in float32 (float64 for
        float64). Under autocast x, weight and bias are cast as those of torch's linear layer are,
        and the result has that dtype.
    weight, bias
        :math:`W` (O, I) and :math:`b` (O,).
    norm_weight, norm_bias
        Of the norm: shape (O,), or (I,) where ``norm_first``. None: ones and zeros.
    residual
        :math:`r`, the shape and dtype of the result.
    norm
        ``"layer"``, ``"rms"`` or ``"none"``.
    norm_first
        The second formula: the norm precedes the linear layer.
    activation, eps, dropout, seed
        As in :func:`norm_activation`.
    implementation
        ``"torch"``, ``"triton"``, or None to let dispatch choose.

    Returns
    -------
    Tensor
        Shape (..., O), or (..., O / 2) after a gated activation.

    Raises
    ------
    TypeError
        If ``x`` is not a floating-point tensor, or ``weight`` or ``residual`` has another dtype.
    ValueError
        If a shape does not fit, ``dropout`` is outside [0, 1), or ``norm`` or ``activation`` has
        no such name.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    Under the transforms of ``torch.func`` as :func:`norm_activation`.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"x must be a floating-point tensor, got {got}")
    given = {
        "weight": weight,
        "bias": bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "residual": residual,
    }
    shapes = {k: None if v is None else tuple(v.shape) for k, v in given.items()}
    width = spec.check_arguments(tuple(x.shape), shapes, norm, norm_first, activation, dropout)
    place = x.device.type
    if torch.is_autocast_enabled(place):
        dtype = torch.get_autocast_dtype(place)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight is {weight.dtype}; it must be {x.dtype} like x")
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"residual is {residual.dtype}; it must be {x.dtype} like the result")
    if eps is None:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        eps = torch.finfo(exact).eps if norm == "rms" else 1e-5
    options = norm, norm_first, activation, float(eps), float(dropout)
    tensors = x, weight, bias, norm_weight, norm_bias, residual
    if _takes_plain_path(tensors, options, implementation):
        return _plain(*tensors, seed, *options, implementation)
    drawn = None
    if dropout > 0 and seed is None:
        drawn = torch.randint(*_SEEDS, (1,), device=x.device)
    elif dropout > 0:
        drawn = torch.as_tensor(seed, dtype=torch.int64, device=x.device).reshape(1)
    rows = x.reshape(-1 if x.numel() else 0, x.shape[-1])
    residual = None if residual is None else residual.reshape(rows.shape[0], width)
    needed = (x, weight, bias, norm_weight, norm_bias)
    keep = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in needed)
    y, _ = _forward_op(rows, *tensors[1:5], residual, drawn, *options, keep, implementation)
    return y.reshape(*x.shape[:-1], width)


Options = tuple[str, bool, str, float, float]
"""norm, norm_first, activation, eps, dropout."""


Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""x, weight, bias, norm_weight, norm_bias, residual."""


def _takes_plain_path(tensors: Tensors, options: Options, implementation: str | None) -> bool:
    x, weight, *_, residual = tensors
    on_cpu = x.is_cpu
    if torch.compiler.is_compiling():
        # The custom op decides at run time, so that a new number of rows changes no traced code;
        # a layer too wide for the kernel is wide for any.
        wide = weight.shape[0] > spec.MAX_COLUMNS or weight.shape[1] > spec.MAX_IN_FEATURES
        plain = implementation == "torch" or (on_cpu and implementation is None)
        return plain or (wide and implementation is None)
    if on_cpu and not usage.recording() and not dispatch.is_overridden(BINDING, implementation):
        return True
    if torch_functions.transformed(*tensors):
        fits = torch_functions.mapped(x, residual) and not torch_functions.mapped(*tensors[1:5])
        return not fits or options[-1] > 0
    rows = x.shape[:-1].numel()
    decision = _decide(rows, x, weight, options, residual is not None, implementation)
    return decision.implementation == "torch" and not usage.recording()


def _decide(
    rows: int,
    x: Tensor,
    weight: Tensor,
    options: Options,
    residual: bool,
    implementation: str | None,
) -> dispatch.Decision:
    norm, norm_first, activation, _, dropout = options
    flags = {
        "norm": norm,
        "norm_first": norm_first,
        "activation": activation,
        "dropout": dropout,
        "residual": residual,
    }
    dtype = str(x.dtype).removeprefix("torch.")
    outputs, inputs = weight.shape
    problem = spec.problem_of(rows, inputs, outputs // spec.parts(activation), dtype, flags)
    return dispatch.decide(problem, torch_device(x.device), BINDING, implementation)


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: int | Tensor | None,
    norm: str,
    norm_first: bool,
    activation: str,
    eps: float,
    dropout: float,
    implementation: str | None,
) -> Tensor:
    """The framework's linear layer and `norm_activation`, whose implementation is its own affair
    unless plain torch was asked for."""
    own = "torch" if implementation == "torch" else None
    with torch_functions.without_autocast(x):
        z = _linear_result(x, weight, bias, norm_weight, norm_bias, norm, norm_first, eps, own)
        options = norm, norm_first, activation, eps, dropout
        return _tail(z, norm_weight, norm_bias, residual, seed, *options, own)


def _tail(
    z: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: int | Tensor | None,
    norm: str,
    norm_first: bool,
    activation: str,
    eps: float,
    dropout: float,
    implementation: str | None,
) -> Tensor:
    """What follows the linear layer."""
    if norm_first:
        norm_weight, norm_bias, norm = None, None, "none"
    return norm_activation(
        z,
        norm_weight,
        norm_bias,
        residual,
        norm=norm,
        activation=activation,
        eps=eps,
        dropout=dropout,
        seed=seed,
        implementation=implementation,
    )


def _linear_result(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    norm_first: bool,
    eps: float,
    implementation: str | None,
) -> Tensor:
    if norm_first:
        x = norm_activation(
            x, norm_weight, norm_bias, norm=norm, eps=eps, implementation=implementation
        )
    return F.linear(x, weight, bias)


@torch.library.custom_op("ml_networks::linear_norm_activation", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    norm: str,
    norm_first: bool,
    activation: str,
    eps: float,
    dropout: float,
    keep: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    """The result and, where ``keep``, that of the linear layer for the backward pass."""
    options = norm, norm_first, activation, eps, dropout
    rows = x.shape[0]
    decision = _decide(rows, x, weight, options, residual is not None, implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or not rows:
            tensors = x, weight, bias, norm_weight, norm_bias
            z = _linear_result(*tensors, norm, norm_first, eps, "torch")
            y = _tail(z, norm_weight, norm_bias, residual, seed, *options, "torch")
            # An op's results may not share memory.
            return (y.clone() if y is z else y), (z if keep else z.new_empty(0, z.shape[1]))
        from . import triton_kernel

        return triton_kernel.forward(
            x,
            weight.contiguous(),
            _contiguous(bias),
            _contiguous(norm_weight),
            _contiguous(norm_bias),
            residual,
            seed,
            *options,
            keep,
            decision.config,
            torch_device(x.device),
        )


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


@_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    norm: str,
    norm_first: bool,
    activation: str,
    eps: float,
    dropout: float,
    keep: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    rows, outputs = x.shape[0], weight.shape[0]
    y = x.new_empty((rows, outputs // spec.parts(activation)))
    return y, x.new_empty((rows if keep else 0, outputs))


@_forward_op.register_vmap
def _(
    info: Any,
    axes: tuple[Any, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    norm: str,
    norm_first: bool,
    activation: str,
    eps: float,
    dropout: float,
    keep: bool,
    implementation: str | None,
) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
    """Of x and the residual alone: `_takes_plain_path` lets nothing else through."""
    size = info.batch_size
    y = linear_norm_activation(
        torch_functions.folded(x, axes[0], size),
        weight,
        bias,
        norm_weight,
        norm_bias,
        None if residual is None else torch_functions.folded(residual, axes[5], size),
        norm=norm,
        norm_first=norm_first,
        activation=activation,
        eps=eps,
        implementation=implementation,
    )
    return (torch_functions.unfolded(y, size), x.new_empty(0)), (0, None)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, norm_weight, norm_bias, residual, seed, *ctx.options = inputs
    ctx.has_bias, ctx.residual = bias is not None, residual is not None
    ctx.save_for_backward(x, weight, norm_weight, norm_bias, seed, output[1])


def _gradient(ctx: Any, of_y: Tensor, of_z: Tensor | None) -> tuple[Any, ...]:
    x, weight, norm_weight, norm_bias, seed, z = ctx.saved_tensors
    norm, norm_first, activation, eps, dropout, _, implementation = ctx.options
    if implementation != "torch":
        implementation = None
    # The op behind `norm_activation`, of which only the gradient is needed here.
    pull = torch.ops.ml_networks.norm_activation_backward
    affine = (None, None) if norm_first else (norm_weight, norm_bias)
    outer = "none" if norm_first else norm
    of_linear, of_norm_weight, of_norm_bias = pull(
        z, *affine, seed, of_y, outer, activation, eps, dropout, implementation
    )
    if of_z is not None:
        of_linear = of_linear + of_z
    of_x, h = None, x
    if norm_first:
        h = norm_activation(x, norm_weight, norm_bias, norm=norm, eps=eps)
        of_x, of_norm_weight, of_norm_bias = pull(
            x, norm_weight, norm_bias, None, of_linear @ weight,
            norm, "Identity", eps, 0.0, implementation,
        )  # fmt: skip
    elif ctx.needs_input_grad[0]:
        of_x = of_linear @ weight
    return (
        of_x,
        of_linear.T @ h if ctx.needs_input_grad[1] else None,
        of_linear.sum(0) if ctx.has_bias else None,
        None if norm_weight is None else of_norm_weight,
        None if norm_bias is None else of_norm_bias,
        of_y if ctx.residual else None,
        *(None,) * 8,
    )


_forward_op.register_autograd(_gradient, setup_context=_setup)


def _call(
    inputs: Mapping[str, Tensor], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor]:
    options: dict[str, Any] = {**inputs, **flags}
    return {"y": linear_norm_activation(**options, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="torch",
    implementations=("torch", "triton"),
    call=_call,
    differentiable=("x", "weight", "bias", "norm_weight", "norm_bias", "residual"),
    kernel_module="triton_kernel",
)
