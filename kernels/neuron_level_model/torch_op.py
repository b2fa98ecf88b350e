"""The neuron-level model for torch: the public functions, the plain path, the custom ops. The
custom ops work on traces (rows, neurons, memory)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import dispatch, torch_functions, usage
from ..core.arguments import plain_vjp, torch_tensors
from ..core.device import torch_device
from ..core.problem import Problem
from ..core.registry import Binding
from . import spec


def neuron_level_model(
    trace: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    out: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    r"""Map the recent past of every neuron to its activation, by the neuron's own small network.

    For each row and each of the D neurons, with M past values :math:`x`:

    .. math::

        (a, g) = x W_1 + b_1,\quad h = a \odot \sigma(g),\qquad
        (v, u) = h W_2 + b_2,\quad z = v \, \sigma(u)

    Without a second layer :math:`z` is the only unit of :math:`h`. The weights are laid out neuron
    by neuron, in advance of all ticks.

    Parameters
    ----------
    trace
        :math:`x`, (..., D, M), oldest first; any strides: ``history[t : t + M].permute(1, 2, 0)``
        of a history (L, B, D) is read in place, and so are all its ticks at once,
        ``history.unfold(0, M, 1)``. float32, bfloat16, float16 or float64.
    weight1, bias1
        :math:`W_1`, (D, M, 2 H), the values' columns before the gates', and :math:`b_1`, (D, 2 H).
    weight2, bias2
        :math:`W_2`, (D, H, 2), and :math:`b_2`, (D, 2); None: no second layer, and H = 1.
    out
        :math:`z` is written to this tensor, which is also returned: (..., D), any strides that
        reach no element twice, any floating-point dtype. Not differentiable.
    implementation
        ``"torch"``, ``"triton"``, or None to let dispatch choose.

    Returns
    -------
    Tensor
        :math:`z`, (..., D), in the dtype of ``trace``.

    Raises
    ------
    TypeError
        If an argument is not a floating-point tensor, or their dtypes differ outside autocast.
    ValueError
        If shapes do not fit together.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    Nothing but the arguments is kept for the backward pass. Repeated calls give the same bits,
    gradients included. Under ``torch.autocast`` all tensors but float64 ones are cast to its
    dtype. Under the transforms of ``torch.func`` the plain path runs.

    Darlow et al., "Continuous Thought Machines", arXiv 2505.05522.
    """
    named = _named(trace, weight1, bias1, weight2, bias2)
    rows, *weights = _rows(named, out=out)
    if out is not None:
        with torch.no_grad():
            z = out if out.dim() == 2 else out.view(rows.shape[:2])
            _activate(z, rows, cast(Weights, tuple(weights)), implementation)
        return out
    if _is_plain(rows, weight1, weight2, "forward", implementation) or torch_functions.transformed(
        *named.values()
    ):
        z = _plain(rows, *weights)
    else:
        z = _forward_op(rows, *weights, implementation)
    return z if trace.dim() == 3 else z.reshape(trace.shape[:-1])


def neuron_level_model_trace_gradient(
    of_z: Tensor,
    trace: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    into: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Return the gradient of ``trace`` for that of :func:`neuron_level_model`'s result.

    For loops over ticks that are differentiated by hand: each tick's gradient is added to that of
    the history, and those of the weights are taken once for all ticks, by
    :func:`neuron_level_model_weight_gradient`.

    Parameters
    ----------
    of_z
        Gradient of the result, (..., D), any strides, any floating-point dtype.
    trace, weight1, bias1, weight2, bias2, implementation
        As in :func:`neuron_level_model`.
    into
        The gradient is added to this tensor, which is also returned: (..., D, M), any strides that
        reach no element twice, any floating-point dtype. Not differentiable.

    Returns
    -------
    Tensor
        (..., D, M); without ``into`` laid out time first, in the dtype of ``trace``.

    Raises
    ------
    TypeError, ValueError, UnsupportedImplementationError
        As in :func:`neuron_level_model`.
    """
    named = {"of_z": of_z, **_named(trace, weight1, bias1, weight2, bias2)}
    of_rows, rows, *weights = _rows(named, into=into)
    plain = _is_plain(rows, weight1, weight2, "backward", implementation)
    if into is None:
        function = _plain_trace_gradient if plain else _trace_op
        options = () if plain else (implementation,)
        return function(of_rows, rows, *weights, *options).reshape(trace.shape)
    target = into if into.dim() == 3 else into.view(rows.shape)
    if plain:
        target += _plain_trace_gradient(of_rows, rows, *weights)
    elif torch.compiler.is_compiling():
        _add_trace_op(target, of_rows, rows, *weights, implementation)
    else:  # an op that torch knows costs the host three times as much
        with torch.no_grad():
            given = cast(Weights, tuple(weights))
            _trace_gradient(target, True, of_rows, rows, given, implementation)
    return into


def neuron_level_model_weight_gradient(
    of_z: Tensor,
    trace: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of the weights for that of :func:`neuron_level_model`'s result.

    Parameters
    ----------
    of_z
        Gradient of the result, (..., D), any strides.
    trace, weight1, bias1, weight2, bias2, implementation
        As in :func:`neuron_level_model`; leading axes are summed over, so all ticks of a loop can
        be given at once.

    Returns
    -------
    tuple of Tensor
        Of ``weight1`` and ``bias1`` and, where given, of ``weight2`` and ``bias2``.

    Raises
    ------
    TypeError, ValueError, UnsupportedImplementationError
        As in :func:`neuron_level_model`.
    """
    named = {"of_z": of_z, **_named(trace, weight1, bias1, weight2, bias2)}
    of_rows, rows, *weights = _rows(named)
    if _is_plain(rows, weight1, weight2, "weight_gradient", implementation):
        found = _plain_weight_gradient(of_rows, rows, *weights)
    else:
        found = _weight_op(of_rows, rows, *weights, implementation)
    return found if weight2 is not None else found[:2]


Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

Four = tuple[Tensor, Tensor, Tensor, Tensor]
"""The gradients of the weights; the last two are empty without a second layer."""


def _named(
    trace: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor | None, bias2: Tensor | None
) -> dict[str, Tensor | None]:
    return {
        "trace": trace,
        "weight1": weight1,
        "bias1": bias1,
        "weight2": weight2,
        "bias2": bias2,
    }


def _rows(named: Mapping[str, Tensor | None], **results: Tensor | None) -> list[Any]:
    """The checked arguments, with one leading axis. A gradient keeps its dtype."""
    rest = {name: value for name, value in named.items() if name != "of_z"}
    tensors = dict(zip(rest, torch_tensors(rest), strict=True))
    if "of_z" in named:
        of_z = named["of_z"]
        if not isinstance(of_z, Tensor) or not of_z.is_floating_point():
            got = getattr(of_z, "dtype", type(of_z).__name__)
            raise TypeError(f"of_z must be a floating-point tensor, got {got}")
        tensors = {"of_z": of_z, **tensors}
    shapes = {name: None if t is None else t.shape for name, t in {**tensors, **results}.items()}
    spec.check_shapes(shapes)
    for name, kept in (("of_z", 1), ("trace", 2)):
        if name in tensors and tensors[name].dim() != kept + 1:
            shape = tensors[name].shape
            rows = shape[:-kept].numel()
            tensors[name] = tensors[name].reshape(rows, *shape[-kept:])
    return list(tensors.values())


def _is_plain(
    rows: Tensor,
    weight1: Tensor,
    weight2: Tensor | None,
    direction: str,
    implementation: str | None,
) -> bool:
    on_cpu = rows.device.type == "cpu"
    if torch.compiler.is_compiling():
        # The custom op decides at run time: a new shape then changes no traced code.
        return implementation == "torch" or (on_cpu and implementation is None)
    if on_cpu and not usage.recording() and not dispatch.is_overridden(BINDING, implementation):
        return True
    decision = _decide(rows, weight1, weight2, direction, implementation)
    return decision.implementation == "torch" and not usage.recording()


def _decide(
    rows: Tensor,
    weight1: Tensor,
    weight2: Tensor | None,
    direction: str,
    implementation: str | None,
) -> dispatch.Decision:
    hidden = 0 if weight2 is None else weight1.shape[2] // 2
    problem = Problem(
        spec.NAME,
        tuple(zip(spec.DIMENSIONS, (*rows.shape, hidden), strict=True)),
        str(rows.dtype).removeprefix("torch."),
        (),
        direction,
    )
    return dispatch.decide(problem, torch_device(rows.device), BINDING, implementation)


def _plain(
    trace: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor | None, bias2: Tensor | None
) -> Tensor:
    """The op in ordinary torch operations, differentiable any number of times."""
    x = F.glu(torch.baddbmm(bias1.unsqueeze(1), trace.transpose(0, 1), weight1))
    if weight2 is not None and bias2 is not None:
        x = F.glu(torch.baddbmm(bias2.unsqueeze(1), x, weight2))
    return x.squeeze(-1).T


def _layer_gradient(of_product: Tensor, layer: Tensor) -> Tensor:
    """The gradient of a layer's values and gates for that of their product."""
    gradient: Tensor = torch.ops.aten.glu_backward(of_product, layer, -1)
    return gradient


def _plain_gradients(
    of_z: Tensor,
    trace: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the first layer's and the second layer's results, and the hidden layer."""
    first = torch.baddbmm(bias1.unsqueeze(1), trace.transpose(0, 1), weight1)
    hidden, of_z = F.glu(first), of_z.to(trace.dtype)
    of_product, of_second = of_z.T.unsqueeze(-1), of_z.new_empty(0)
    if weight2 is not None and bias2 is not None:
        second = torch.baddbmm(bias2.unsqueeze(1), hidden, weight2)
        of_second = _layer_gradient(of_product, second)
        of_product = of_second @ weight2.mT
    return _layer_gradient(of_product, first), of_second, hidden


def _plain_trace_gradient(of_z: Tensor, trace: Tensor, *weights: Any) -> Tensor:
    of_first, _, _ = _plain_gradients(of_z, trace, *weights)
    return (of_first @ weights[0].mT).transpose(0, 1)


def _plain_weight_gradient(of_z: Tensor, trace: Tensor, *weights: Any) -> Four:
    of_first, of_second, hidden = _plain_gradients(of_z, trace, *weights)
    of_weight2, of_bias2 = of_z.new_empty(0), of_z.new_empty(0)
    if weights[2] is not None:
        of_weight2, of_bias2 = hidden.mT @ of_second, of_second.sum(1)
    return trace.permute(1, 2, 0) @ of_first, of_first.sum(1), of_weight2, of_bias2


def _activate(z: Tensor, trace: Tensor, weights: Weights, implementation: str | None) -> None:
    """Write the activations."""
    decision = _decide(trace, weights[0], weights[2], "forward", implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or trace.shape[0] == 0:
            z.copy_(_plain(trace, *weights))
            return
        from . import triton_kernel

        device = torch_device(trace.device)
        triton_kernel.forward(z, trace, *_contiguous(*weights), decision.config, device)


@torch.library.custom_op("ml_networks::neuron_level_model", mutates_args=())
def _forward_op(
    trace: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    implementation: str | None,
) -> Tensor:
    z = trace.new_empty(tuple(trace.shape[:2]))
    _activate(z, trace, (weight1, bias1, weight2, bias2), implementation)
    return z


@_forward_op.register_fake
def _(trace: Tensor, *_: Any) -> Tensor:
    return trace.new_empty(tuple(trace.shape[:2]))


@torch.library.custom_op("ml_networks::neuron_level_model_trace_gradient", mutates_args=())
def _trace_op(
    of_z: Tensor,
    trace: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    implementation: str | None,
) -> Tensor:
    of_trace = _time_first(trace)
    weights = weight1, bias1, weight2, bias2
    _trace_gradient(of_trace, False, of_z, trace, weights, implementation)
    return of_trace


def _time_first(trace: Tensor) -> Tensor:
    """An empty tensor in the shape of ``trace``, laid out as a history is."""
    rows, neurons, memory = trace.shape
    return trace.new_empty((memory, rows, neurons)).permute(1, 2, 0)


@_trace_op.register_fake
def _(of_z: Tensor, trace: Tensor, *_: Any) -> Tensor:
    return _time_first(trace)


@torch.library.custom_op(
    "ml_networks::neuron_level_model_add_trace_gradient", mutates_args=("into",)
)
def _add_trace_op(
    into: Tensor,
    of_z: Tensor,
    trace: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    implementation: str | None,
) -> None:
    _trace_gradient(into, True, of_z, trace, (weight1, bias1, weight2, bias2), implementation)


@_add_trace_op.register_fake
def _(into: Tensor, *_: Any) -> None:
    return None


def _trace_gradient(
    into: Tensor,
    add: bool,
    of_z: Tensor,
    trace: Tensor,
    weights: Weights,
    implementation: str | None,
) -> None:
    """Write or add the gradient of ``trace``."""
    decision = _decide(trace, weights[0], weights[2], "backward", implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or trace.shape[0] == 0:
            found = _plain_trace_gradient(of_z, trace, *weights)
            into.add_(found) if add else into.copy_(found)
            return
        from . import triton_kernel

        tensors = of_z, trace, *_contiguous(*weights)
        device = torch_device(trace.device)
        triton_kernel.trace_gradient(into, add, *tensors, decision.config, device)


@torch.library.custom_op("ml_networks::neuron_level_model_weight_gradient", mutates_args=())
def _weight_op(
    of_z: Tensor,
    trace: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    decision = _decide(trace, weight1, weight2, "weight_gradient", implementation)
    weights = weight1, bias1, weight2, bias2
    with usage.timed(decision):
        if decision.implementation == "torch" or trace.shape[0] == 0:
            return _plain_weight_gradient(of_z, trace, *weights)
        from . import triton_kernel

        tensors = of_z, trace, *_contiguous(*weights)
        return triton_kernel.weight_gradient(*tensors, decision.config, torch_device(trace.device))


@_weight_op.register_fake
def _(
    of_z: Tensor,
    trace: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    *_: Any,
) -> Four:
    def like(value: Tensor | None) -> Tensor:
        return trace.new_empty(0 if value is None else tuple(value.shape))

    return like(weight1), like(bias1), like(weight2), like(bias2)


def _contiguous(
    weight1: Tensor, bias1: Tensor, weight2: Tensor | None, bias2: Tensor | None
) -> Weights:
    if weight2 is None or bias2 is None:
        return weight1.contiguous(), bias1.contiguous(), None, None
    return weight1.contiguous(), bias1.contiguous(), weight2.contiguous(), bias2.contiguous()


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.implementation = inputs
    ctx.save_for_backward(*tensors)


def _forward_gradient(ctx: Any, of_z: Tensor) -> tuple[Any, ...]:
    trace, *weights = ctx.saved_tensors
    of_trace = None
    of_weights: tuple[Tensor | None, ...] = (None,) * 4
    if ctx.needs_input_grad[0]:
        of_trace = _trace_op(of_z, trace, *weights, ctx.implementation)
    if any(ctx.needs_input_grad[1:5]):
        of_weights = _weight_op(of_z, trace, *weights, ctx.implementation)
        if weights[2] is None:
            of_weights = (*of_weights[:2], None, None)
    return of_trace, *of_weights, None


_forward_op.register_autograd(_forward_gradient, setup_context=_setup_forward)


def _setup_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _trace_second(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
    """The derivative of the traces' gradient, through the plain path."""
    found = plain_vjp(
        lambda *inputs: (_plain_trace_gradient(*inputs),), ctx.saved_tensors, (cotangent,)
    )
    return *found, None


def _weight_second(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    """The derivative of the weights' gradients, through the plain path."""
    return *plain_vjp(_plain_weight_gradient, ctx.saved_tensors, cotangents), None


_trace_op.register_autograd(_trace_second, setup_context=_setup_gradient)
_weight_op.register_autograd(_weight_second, setup_context=_setup_gradient)


def _call(
    inputs: Mapping[str, Tensor], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor]:
    weights: dict[str, Any] = dict(inputs)
    history = weights.pop("history")
    trace = history.permute(1, 2, 0)
    return {"z": neuron_level_model(trace, **weights, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="torch",
    implementations=("torch", "triton"),
    call=_call,
    differentiable=("history", "weight1", "bias1", "weight2", "bias2"),
    kernel_module="triton_kernel",
)
