"""Norm, SiLU, skip, norm and a linear layer for torch: the public functions, the plain path, the
custom op. The custom op works on rows (rows, width).

The plain path is torch's linear layer behind `norm_activation` or `norm_silu_skip_norm`, whose
implementation is their own affair unless plain torch was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import arguments, dispatch, torch_functions, usage
from ..core.device import torch_device
from ..core.registry import Binding
from ..norm_activation.torch_op import norm_activation
from ..norm_silu_skip_norm.torch_op import norm_silu_skip_norm
from . import spec


class _Norms(NamedTuple):
    """What precedes the linear layer, beside ``x``; ``skip`` as rows."""

    weight: Tensor
    bias: Tensor
    skip: Tensor | None
    skip_weight: Tensor | None
    skip_bias: Tensor | None
    eps: float


def norm_silu_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    skip: Tensor | None = None,
    skip_weight: Tensor | None = None,
    skip_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Layer norm and SiLU, if given a skip connection and its layer norm, and a linear layer.

    .. math::

        h = \operatorname{silu}(\operatorname{norm}(x) \odot \gamma + \beta)
        \quad\text{or}\quad
        h = \operatorname{norm}\bigl(\operatorname{silu}(\operatorname{norm}(x) \odot \gamma
            + \beta) + s\bigr) \odot \gamma_s + \beta_s,
        \qquad y = h W^\top + b

    with :math:`\operatorname{norm}(a) = (a - \mu_a) / \sqrt{\sigma_a^2 + \epsilon}` over the last
    axis (Ba et al., arXiv 1607.06450): from one linear layer of the synapses of the Continuous
    Thought Machine to the next (Darlow et al., 2025, arXiv 2505.05522). One kernel where rows are
    few; above 64 the norms and the product run apart.

    Parameters
    ----------
    x
        Shape (..., C); float32, bfloat16, float16 or float64. Arithmetic of the kernels is in
        float32.
    norm_weight, norm_bias
        :math:`\gamma` and :math:`\beta`, (C,), any floating-point dtype.
    weight, bias
        :math:`W` (F, C) and :math:`b` (F,), in the dtype of ``x``. Under autocast x, weight and
        bias are cast as those of torch's linear layer are.
    skip
        :math:`s`, the shape of ``x``, any floating-point dtype. None: the first form.
    skip_weight, skip_bias
        :math:`\gamma_s` and :math:`\beta_s`, (C,), together with ``skip``.
    eps
        :math:`\epsilon` of both norms. Default 1e-5.
    implementation
        ``"torch"``, ``"triton"``, or None to let dispatch choose.

    Returns
    -------
    y
        Shape (..., F), in the dtype of ``weight``.
    h
        Shape (..., C), in the dtype of ``norm_weight``, as a layer norm under autocast gives it.

    Raises
    ------
    TypeError
        If an argument is not a floating-point tensor, or those of x, weight and bias differ.
    ValueError
        If a shape does not fit, or only some of the skip connection's tensors are given.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    NaN and infinity in a row make it NaN. Repeated calls give the same bits, gradients included.
    Gradients are those of the norms and of the linear layer apart. For loops that are
    differentiated by hand there are :func:`norm_silu_linear_step` and
    :func:`linear_norm_silu_gradient`. Under the transforms of ``torch.func`` the plain path runs.
    """
    norms = _Norms(norm_weight, norm_bias, skip, skip_weight, skip_bias, float(eps))
    x, weight, bias = _checked(x, weight, bias, norms)
    tensors = x, weight, *_named(norms, bias=bias).values()
    if _takes_plain_path(x, weight, norms, implementation) or torch_functions.transformed(
        *tensors
    ):
        return _plain(x, weight, bias, norms, "torch" if implementation == "torch" else None)
    rows = _as_rows(x)
    y, h = _forward_op(
        rows,
        norm_weight,
        norm_bias,
        weight,
        bias,
        None if skip is None else _as_rows(skip),
        skip_weight,
        skip_bias,
        norms.eps,
        implementation,
    )
    return y.reshape(*x.shape[:-1], len(weight)), h.reshape(x.shape)


class NormSiluLinearStep(NamedTuple):
    """What :func:`norm_silu_linear_step` found.

    Attributes
    ----------
    y, h
        As of :func:`norm_silu_linear`; h is None if it was not wanted.
    moments
        Of y, (2, rows, blocks) in float32: the mean of each 32 columns and the sum of their
        squared distances from it, for the step that takes y. None where no kernel ran.
    statistics
        (rows, 2) in float32, with a skip connection (rows, 4): mean and inverse deviation of x,
        and of SiLU and skip, for :func:`linear_norm_silu_gradient`. None where no kernel ran.
    """

    y: Tensor
    h: Tensor | None
    moments: Tensor | None
    statistics: Tensor | None


def norm_silu_linear_step(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    skip: Tensor | None = None,
    skip_weight: Tensor | None = None,
    skip_bias: Tensor | None = None,
    *,
    into: tuple[Tensor, Tensor | None],
    moments: Tensor | None = None,
    eps: float = 1e-5,
    implementation: str | None = None,
) -> NormSiluLinearStep:
    r""":func:`norm_silu_linear` for a loop: results go where they are wanted, and calls tell each
    other what they know of the rows.

    Parameters
    ----------
    x, norm_weight, norm_bias, weight, bias, skip, skip_weight, skip_bias, eps, implementation
        As in :func:`norm_silu_linear`.
    into
        y and h are written to these tensors; None in place of h: it is not made. Any dtype, rows
        of any stride, columns of stride 1.
    moments
        Those of ``x`` if a step made it: the kernel then need not look at its rows twice.

    Returns
    -------
    NormSiluLinearStep

    Raises
    ------
    TypeError, ValueError, UnsupportedImplementationError
        As in :func:`norm_silu_linear`.

    Notes
    -----
    Not differentiable. Repeated calls give the same bits.
    """
    norms = _Norms(norm_weight, norm_bias, skip, skip_weight, skip_bias, float(eps))
    x, weight, bias = _checked(x, weight, bias, norms, y=into[0], h=into[1])
    arguments.check_result("y", into[0])
    arguments.check_result("h", into[1])
    _check_told("moments", moments, spec.moments_shape(x.shape[:-1].numel(), x.shape[-1]), x)
    with torch.no_grad():
        return _write(into, x, weight, bias, norms, moments, implementation)


def linear_norm_silu_gradient(
    of_h: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    skip: Tensor | None = None,
    skip_weight: Tensor | None = None,
    skip_bias: Tensor | None = None,
    *,
    statistics: Tensor | None = None,
    eps: float = 1e-5,
    into: Tensor | None = None,
    of_skip: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Pull a gradient back through skip, norms and SiLU, and the linear layer before them.

    With :math:`h(x, s)` as in :func:`norm_silu_linear` and :math:`x = u W^\top + b`: the gradients
    of :math:`u` and :math:`s` for that of h. For loops that are differentiated by hand, whose
    weights' gradients are taken once for all rounds.

    Parameters
    ----------
    of_h
        Gradient of h, (..., C), any floating-point dtype.
    x, norm_weight, norm_bias, skip, skip_weight, skip_bias, eps, implementation
        As in :func:`norm_silu_linear`; ``x`` is the linear layer's result.
    weight
        :math:`W` of the linear layer, (C, F), in the dtype of ``x``.
    statistics
        Those that :func:`norm_silu_linear_step` told of the same ``x`` and ``skip``: the kernel
        then need not look at rows twice.
    into
        The gradient of u is added to this tensor (..., F), which is also returned; rows of any
        stride, columns of stride 1, any floating-point dtype.
    of_skip
        The gradient of s is written to this tensor (..., C), which is also returned.

    Returns
    -------
    of_u
        (..., F), without ``into`` in the dtype of ``of_h``.
    of_skip
        (..., C), without ``of_skip`` in the dtype of ``of_h``; None without a skip connection.

    Raises
    ------
    TypeError, ValueError, UnsupportedImplementationError
        As in :func:`norm_silu_linear`.

    Notes
    -----
    Not differentiable. Repeated calls give the same bits.
    """
    norms = _Norms(norm_weight, norm_bias, skip, skip_weight, skip_bias, float(eps))
    given = {**_named(norms), "of_h": of_h, "into": into, "of_skip": of_skip}
    _check_floating(x=x, weight=weight, **given)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight is {weight.dtype}; it must be {x.dtype} like x")
    if of_skip is not None and skip is None:
        raise ValueError("of_skip is given, and there is no skip whose gradient it could be")
    shapes = {name: None if t is None else tuple(t.shape) for name, t in given.items()}
    spec.check_arguments(tuple(x.shape), shapes, tuple(weight.shape), transposed=True)
    arguments.check_result("into", into)
    arguments.check_result("of_skip", of_skip)
    rows = x.shape[:-1].numel()
    _check_told("statistics", statistics, (rows, 2 if skip is None else 4), x)
    add = into is not None
    if into is None:
        into = of_h.new_empty(*x.shape[:-1], weight.shape[1])
    if of_skip is None and skip is not None:
        of_skip = of_h.new_empty(x.shape)
    with torch.no_grad():
        _pull(into, add, of_skip, of_h, x, weight, norms, statistics, implementation)
    return into, of_skip


def _checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norms: _Norms,
    **results: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``x``, ``weight`` and ``bias`` in the dtype of the product, once all arguments fit."""
    given = _named(norms, bias=bias)
    _check_floating(x=x, weight=weight, **given)
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != x.dtype:
            raise TypeError(f"{name} is {value.dtype}; it must be {x.dtype} like x")
    given |= results
    shapes = {name: None if t is None else tuple(t.shape) for name, t in given.items()}
    spec.check_arguments(tuple(x.shape), shapes, tuple(weight.shape))
    return x, weight, bias


def _check_told(name: str, value: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if value is None:
        return
    fits = tuple(value.shape) == shape and value.dtype == torch.float32
    if not (fits and value.is_contiguous() and value.device == x.device):
        got = f"{tuple(value.shape)}, {value.dtype} on {value.device}"
        raise ValueError(
            f"{name} is {got}; a step for this x tells {shape}, torch.float32 on {x.device}"
        )


def _named(norms: _Norms, **more: Tensor | None) -> dict[str, Tensor | None]:
    return {
        "norm_weight": norms.weight,
        "norm_bias": norms.bias,
        "skip": norms.skip,
        "skip_weight": norms.skip_weight,
        "skip_bias": norms.skip_bias,
        **more,
    }


_OPTIONAL = ("bias", "skip", "skip_weight", "skip_bias", "into", "of_skip")


def _check_floating(**given: Tensor | None) -> None:
    for name, value in given.items():
        if value is None and name in _OPTIONAL:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")


def _as_rows(value: Tensor) -> Tensor:
    if value.dim() == 2:
        return value
    return value.reshape(-1 if value.numel() else value.shape[:-1].numel(), value.shape[-1])


def _dense(value: Tensor) -> Tensor:
    """Rows whose columns have stride 1, copied if they had another."""
    rows = _as_rows(value)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _decide(
    x: Tensor, features: int, direction: str, skip: bool, implementation: str | None
) -> dispatch.Decision:
    dtype = str(x.dtype).removeprefix("torch.")
    sizes = x.shape[:-1].numel(), x.shape[-1], features
    problem = spec.problem_of(*sizes, dtype, direction, skip)
    return dispatch.decide(problem, torch_device(x.device), BINDING, implementation)


def _takes_plain_path(
    x: Tensor, weight: Tensor, norms: _Norms, implementation: str | None
) -> bool:
    on_cpu = x.device.type == "cpu"
    if torch.compiler.is_compiling():
        # The custom op decides at run time: a new shape then changes no traced code.
        return implementation == "torch" or (on_cpu and implementation is None)
    if on_cpu and not usage.recording() and not dispatch.is_overridden(BINDING, implementation):
        return True
    decision = _decide(x, len(weight), "forward", norms.skip is not None, implementation)
    return decision.implementation == "torch" and not usage.recording()


def _finish(x: Tensor, norms: _Norms, implementation: str | None) -> Tensor:
    """``h``, in the dtype of the norm's weight."""
    x = x.to(norms.weight.dtype)
    eps = norms.eps
    if norms.skip is None or norms.skip_weight is None or norms.skip_bias is None:
        return norm_activation(
            x,
            norms.weight,
            norms.bias,
            norm="layer",
            activation="SiLU",
            eps=eps,
            implementation=implementation,
        )
    after = norms.skip.to(x.dtype), norms.skip_weight, norms.skip_bias
    inner = norms.weight, norms.bias
    return norm_silu_skip_norm(x, *inner, *after, eps=eps, implementation=implementation)


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, norms: _Norms, implementation: str | None
) -> tuple[Tensor, Tensor]:
    """The op by other ops, differentiable any number of times."""
    with torch_functions.without_autocast(x):
        h = _finish(x, norms, implementation)
        return F.linear(h.to(weight.dtype), weight, bias), h


def _write(
    into: tuple[Tensor, Tensor | None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norms: _Norms,
    moments: Tensor | None,
    implementation: str | None,
) -> NormSiluLinearStep:
    """Y and, if wanted, h into the tensors given."""
    y, h = into
    decision = _decide(x, len(weight), "forward", norms.skip is not None, implementation)
    with usage.timed(decision):
        if decision.implementation != "torch" and x.numel():
            told = _launch(into, x, weight, bias, norms, moments, decision)
            return NormSiluLinearStep(y, h, *told)
        with torch_functions.without_autocast(x):
            found = _finish(x, norms, "torch" if implementation == "torch" else None)
            if h is not None:
                h.copy_(found)
            rows = _as_rows(found.to(weight.dtype))
            if bias is None or y.dtype != weight.dtype:
                y.copy_(F.linear(rows, weight, bias).view(y.shape))
            else:
                torch.addmm(bias, rows, weight.mT, out=_viewed(y))
    return NormSiluLinearStep(y, h, None, None)


def _launch(
    into: tuple[Tensor, Tensor | None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norms: _Norms,
    moments: Tensor | None,
    decision: dispatch.Decision,
) -> tuple[Tensor, Tensor]:
    """Moments of y and statistics of the norms."""
    from . import triton_kernel

    y, h = (None if value is None else _viewed(value) for value in into)
    assert y is not None
    of_y = x.new_empty(spec.moments_shape(*y.shape), dtype=torch.float32)
    statistics = x.new_empty(len(y), 2 if norms.skip is None else 4, dtype=torch.float32)
    triton_kernel.forward(
        y,
        h,
        of_y,
        statistics,
        _dense(x),
        norms.weight.contiguous(),
        norms.bias.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if norms.skip is None else _dense(norms.skip),
        None if norms.skip_weight is None else norms.skip_weight.contiguous(),
        None if norms.skip_bias is None else norms.skip_bias.contiguous(),
        moments,
        norms.eps,
        decision.config,
        torch_device(x.device),
    )
    return of_y, statistics


def _viewed(value: Tensor) -> Tensor:
    """A result's rows, in place."""
    return value if value.dim() == 2 else value.view(value.shape[:-1].numel(), value.shape[-1])


def _pull(
    into: Tensor,
    add: bool,
    of_skip: Tensor | None,
    of_h: Tensor,
    x: Tensor,
    weight: Tensor,
    norms: _Norms,
    statistics: Tensor | None,
    implementation: str | None,
) -> None:
    """Write or add the gradient of the linear layer's input, and write that of the skip."""
    decision = _decide(x, weight.shape[1], "backward", norms.skip is not None, implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or not x.numel():
            own = "torch" if implementation == "torch" else None
            of_x, of_skipped = _plain_gradient(of_h, x, norms, own)
            of_u = of_x.to(weight.dtype) @ weight
            into.add_(of_u) if add else into.copy_(of_u)
            if of_skip is not None:
                of_skip.copy_(of_skipped)
            return
        from . import triton_kernel

        triton_kernel.gradient(
            _viewed(into),
            add,
            None if of_skip is None else _viewed(of_skip),
            _dense(of_h),
            _dense(x),
            norms.weight.contiguous(),
            norms.bias.contiguous(),
            weight.contiguous(),
            None if norms.skip is None else _dense(norms.skip),
            None if norms.skip_weight is None else norms.skip_weight.contiguous(),
            statistics,
            norms.eps,
            decision.config,
            torch_device(x.device),
        )


def _plain_gradient(
    of_h: Tensor, x: Tensor, norms: _Norms, implementation: str | None
) -> list[Any]:
    """The gradients of x and the skip, None without one."""
    with torch.enable_grad(), torch_functions.without_autocast(x):
        leaf = x.detach().to(norms.weight.dtype).requires_grad_()
        skip = None if norms.skip is None else norms.skip.detach().to(leaf.dtype).requires_grad_()
        h = _finish(leaf, norms._replace(skip=skip), implementation)
        leaves = [leaf] if skip is None else [leaf, skip]
        found: list[Any] = list(torch.autograd.grad(h, leaves, of_h.to(h.dtype)))
    return found if skip is not None else [*found, None]


@torch.library.custom_op("ml_networks::norm_silu_linear", mutates_args=())
def _forward_op(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    skip_bias: Tensor | None,
    eps: float,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    norms = _Norms(norm_weight, norm_bias, skip, skip_weight, skip_bias, eps)
    found = _results(x, norm_weight, weight)
    _write(found, x, weight, bias, norms, None, implementation)
    return found


def _results(x: Tensor, norm_weight: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    return x.new_empty(rows, weight.shape[0]), norm_weight.new_empty(rows, width)


@_forward_op.register_fake
def _(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return _results(x, norm_weight, weight)


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, ctx.implementation = inputs
    ctx.save_for_backward(*tensors)


def _forward_gradient(ctx: Any, of_y: Tensor, of_h: Tensor) -> tuple[Any, ...]:
    """Through the norms' ops and the linear layer, whose own derivatives exist."""

    def again(
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *skips: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        norms = _Norms(norm_weight, norm_bias, skips[0], skips[1], skips[2], ctx.eps)
        return _plain(x, weight, bias, norms, None)

    found = arguments.plain_vjp(again, ctx.saved_tensors, (of_y, of_h))
    needed = ctx.needs_input_grad
    kept = (value if wanted else None for value, wanted in zip(found, needed, strict=False))
    return *kept, None, None


_forward_op.register_autograd(_forward_gradient, setup_context=_setup_forward)


def _call(
    inputs: Mapping[str, Tensor], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor | None]:
    options: dict[str, Any] = {"eps": flags.get("eps", 1e-5), **inputs}
    y, h = norm_silu_linear(**options, implementation=implementation)
    return {"y": y, "h": h}


BINDING = Binding(
    op=spec.NAME,
    framework="torch",
    implementations=("torch", "triton"),
    call=_call,
    differentiable=(
        "x",
        "norm_weight",
        "norm_bias",
        "weight",
        "bias",
        "skip",
        "skip_weight",
        "skip_bias",
    ),
    kernel_module="triton_kernel",
)
