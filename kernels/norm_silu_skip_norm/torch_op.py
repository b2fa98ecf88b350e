"""Layer norm, SiLU, skip and layer norm for torch: the public function, the plain path, the custom
ops. The custom ops work on rows (rows, width)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import arguments, dispatch, torch_functions, usage
from ..core.device import torch_device
from ..core.registry import Binding
from . import spec


def norm_silu_skip_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    skip: Tensor,
    skip_weight: Tensor,
    skip_bias: Tensor,
    *,
    eps: float = 1e-5,
    out: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    r"""Layer norm, SiLU, a skip connection and its layer norm, in one kernel.

    .. math::

        y = \operatorname{norm}\bigl(\operatorname{silu}(\operatorname{norm}(x) \odot \gamma
            + \beta) + s\bigr) \odot \gamma_s + \beta_s, \qquad
        \operatorname{norm}(a) = \frac{a - \mu_a}{\sqrt{\sigma_a^2 + \epsilon}}

    over the last axis (Ba et al., arXiv 1607.06450): a level of the synapses of the Continuous
    Thought Machine (Darlow et al., 2025, arXiv 2505.05522).

    Parameters
    ----------
    x
        Shape (..., C); float32, bfloat16, float16 or float64. Arithmetic of the kernels is in
        float32, the result in the dtype of ``x``, also under autocast.
    weight, bias
        :math:`\gamma` and :math:`\beta`, shape (C,).
    skip
        :math:`s`, the shape and dtype of ``x``; with ``out`` any floating-point dtype.
    skip_weight, skip_bias
        :math:`\gamma_s` and :math:`\beta_s`, shape (C,).
    eps
        :math:`\epsilon` of both norms. Default 1e-5.
    out
        y is written to this tensor, which is also returned: (..., C), columns of stride 1, any
        floating-point dtype. Not differentiable.
    implementation
        ``"torch"``, ``"triton"``, or None to let dispatch choose.

    Returns
    -------
    Tensor
        Shape (..., C).

    Raises
    ------
    TypeError
        If an argument is not a floating-point tensor, or ``skip`` has another dtype than ``x``.
    ValueError
        If a shape does not fit.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    NaN and infinity in a row make it NaN, as in torch. Repeated calls give the same bits,
    gradients included. Under the transforms of ``torch.func`` the plain path runs.
    """
    given = {
        "skip": skip,
        "weight": weight,
        "bias": bias,
        "skip_weight": skip_weight,
        "skip_bias": skip_bias,
    }
    for name, value in {"x": x, **given}.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if skip.dtype != x.dtype and out is None:
        raise TypeError(f"skip is {skip.dtype}; it must be {x.dtype} like x")
    shapes = {name: tuple(value.shape) for name, value in given.items()}
    if out is not None:
        spec.check_arguments(tuple(x.shape), {**shapes, "out": tuple(out.shape)})
        arguments.check_result("out", out)
        with torch.no_grad():
            weights = weight, bias, skip, skip_weight, skip_bias
            _write(_rows(out, view=True), _rows(x), *weights, eps, implementation)
        return out
    spec.check_arguments(tuple(x.shape), shapes)
    if _takes_plain_path(x, implementation) or torch_functions.transformed(x, *given.values()):
        return _plain(x, weight, bias, skip, skip_weight, skip_bias, eps)
    y = _forward_op(
        _rows(x),
        weight,
        bias,
        _rows(skip),
        skip_weight,
        skip_bias,
        eps,
        implementation,
    )
    return y.reshape(x.shape)


def _rows(value: Tensor, view: bool = False) -> Tensor:
    """As (rows, width); with ``view`` never a copy."""
    shape = value.shape[:-1].numel(), value.shape[-1]
    return value.view(shape) if view else value.reshape(shape)


def _takes_plain_path(x: Tensor, implementation: str | None) -> bool:
    on_cpu = x.device.type == "cpu"
    if torch.compiler.is_compiling():
        # The custom op decides at run time: a new shape then changes no traced code.
        return implementation == "torch" or (on_cpu and implementation is None)
    if on_cpu and not usage.recording() and not dispatch.is_overridden(BINDING, implementation):
        return True
    decision = _decide(x, "forward", True, implementation)
    return decision.implementation == "torch" and not usage.recording()


def _decide(
    x: Tensor, direction: str, affine: bool, implementation: str | None
) -> dispatch.Decision:
    dtype = str(x.dtype).removeprefix("torch.")
    rows, width = x.shape[:-1].numel(), x.shape[-1]
    problem = spec.problem_of(rows, width, dtype, direction, {"affine": affine})
    return dispatch.decide(problem, torch_device(x.device), BINDING, implementation)


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    skip: Tensor,
    skip_weight: Tensor,
    skip_bias: Tensor,
    eps: float,
) -> Tensor:
    """The op in ordinary torch operations, differentiable any number of times."""
    size = x.shape[-1:]
    y = F.silu(F.layer_norm(x, size, weight.to(x.dtype), bias.to(x.dtype), eps)) + skip
    y = F.layer_norm(y, size, skip_weight.to(y.dtype), skip_bias.to(y.dtype), eps)
    return y.to(x.dtype)  # autocast makes it float32


def _write(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    skip: Tensor,
    skip_weight: Tensor,
    skip_bias: Tensor,
    eps: float,
    implementation: str | None,
) -> None:
    """The op on rows, into ``y``."""
    decision = _decide(x, "forward", True, implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or not len(x):
            y.copy_(_plain(x, weight, bias, skip, skip_weight, skip_bias, eps))
            return
        from . import triton_kernel

        inner = weight.contiguous(), bias.contiguous()
        outer = skip_weight.contiguous(), skip_bias.contiguous()
        device = torch_device(x.device)
        triton_kernel.forward(y, x, *inner, _rows(skip), *outer, eps, decision.config, device)


@torch.library.custom_op("ml_networks::norm_silu_skip_norm", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    skip: Tensor,
    skip_weight: Tensor,
    skip_bias: Tensor,
    eps: float,
    implementation: str | None,
) -> Tensor:
    y = x.new_empty(tuple(x.shape))
    _write(y, x, weight, bias, skip, skip_weight, skip_bias, eps, implementation)
    return y


@_forward_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(tuple(x.shape))


Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("ml_networks::norm_silu_skip_norm_backward", mutates_args=())
def _backward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    skip: Tensor,
    skip_weight: Tensor,
    skip_bias: Tensor,
    of_y: Tensor,
    eps: float,
    affine: bool,
    implementation: str | None,
) -> Six:
    """The gradients of all inputs; those of weights and biases empty without ``affine``."""
    decision = _decide(x, "backward", affine, implementation)
    weights = weight, bias, skip_weight, skip_bias
    with usage.timed(decision):
        if decision.implementation == "torch" or not len(x):
            of_x, of_skip, sums = _plain_gradient(x, weight, bias, skip, skip_weight, of_y, eps)
        else:
            from . import triton_kernel

            inner = weight.contiguous(), bias.contiguous()
            of_x, of_skip, sums = triton_kernel.backward(
                x,
                *inner,
                skip,
                skip_weight.contiguous(),
                of_y,
                eps,
                affine,
                decision.config,
                torch_device(x.device),
            )
        # Tensors of their own: an op's results may not share memory.
        of_weight, of_bias, of_skip_weight, of_skip_bias = (
            _like(value, affine).copy_(total) if affine else _like(value, affine)
            for value, total in zip(weights, sums.unbind(), strict=True)
        )
        return of_x, of_weight, of_bias, of_skip, of_skip_weight, of_skip_bias


def _like(value: Tensor, affine: bool) -> Tensor:
    return value.new_empty(value.shape if affine else (0,))


def _plain_gradient(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    skip: Tensor,
    skip_weight: Tensor,
    of_y: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, skip and the weights (4, width) in ordinary torch operations: the
    backward op's plain path."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32

    def norm(value: Tensor) -> tuple[Tensor, Tensor]:
        centred = value - value.mean(-1, keepdim=True)
        inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        return centred * inverse, inverse

    def of_norm(z: Tensor, inverse: Tensor, of_z: Tensor) -> Tensor:
        along = z * (of_z * z).mean(-1, keepdim=True)
        return (of_z - of_z.mean(-1, keepdim=True) - along) * inverse

    inner, inner_inverse = norm(x.to(exact))
    affine = inner * weight + bias
    outer, outer_inverse = norm(F.silu(affine) + skip)
    of_y = of_y.to(exact)
    of_u = of_norm(outer, outer_inverse, of_y * skip_weight)
    of_v = torch_functions.pull_back("SiLU", affine, of_u)
    of_x = of_norm(inner, inner_inverse, of_v * weight)
    sums = torch.stack([(of_v * inner).sum(0), of_v.sum(0), (of_y * outer).sum(0), of_y.sum(0)])
    return of_x.to(x.dtype), of_u.to(x.dtype), sums


@_backward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    skip: Tensor,
    skip_weight: Tensor,
    skip_bias: Tensor,
    of_y: Tensor,
    eps: float,
    affine: bool,
    implementation: str | None,
) -> Six:
    of_x, of_skip = (x.new_empty(tuple(x.shape)) for _ in range(2))
    first, second, third, fourth = (
        _like(value, affine) for value in (weight, bias, skip_weight, skip_bias)
    )
    return of_x, first, second, of_skip, third, fourth


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.implementation = inputs
    ctx.save_for_backward(*tensors)


def _forward_gradient(ctx: Any, of_y: Tensor) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad
    affine = any(needed[i] for i in (1, 2, 4, 5))
    found = _backward_op(*ctx.saved_tensors, of_y, ctx.eps, affine, ctx.implementation)
    return *(value if wanted else None for value, wanted in zip(found, needed, strict=False)), *(
        None,
        None,
    )


_forward_op.register_autograd(_forward_gradient, setup_context=_setup_forward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Six) -> None:
    *tensors, ctx.eps, ctx.affine, _ = inputs
    ctx.save_for_backward(*tensors)


def _second_gradient(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    """The derivative of the backward op, through the plain path."""

    def gradients(*given: Tensor) -> list[Tensor]:
        x, weight, bias, skip, skip_weight, skip_bias, of_y = given
        y = _plain(x, weight, bias, skip, skip_weight, skip_bias, ctx.eps)
        wanted = given[:6] if ctx.affine else (x, skip)
        return list(torch.autograd.grad(y, wanted, of_y, create_graph=True))

    kept = cotangents if ctx.affine else (cotangents[0], cotangents[3])
    return *arguments.plain_vjp(gradients, ctx.saved_tensors, kept), None, None, None


_backward_op.register_autograd(_second_gradient, setup_context=_setup_backward)


def _call(
    inputs: Mapping[str, Tensor], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor]:
    options: dict[str, Any] = {**inputs, **flags}
    return {"y": norm_silu_skip_norm(**options, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="torch",
    implementations=("torch", "triton"),
    call=_call,
    differentiable=("x", "weight", "bias", "skip", "skip_weight", "skip_bias"),
    kernel_module="triton_kernel",
)
