"""Convolution, pixel (un)shuffle and activation for torch: the public function, the plain path,
the custom ops."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import dispatch, torch_functions, usage
from ..core.activations import GATED
from ..core.arguments import plain_vjp, torch_tensors
from ..core.device import torch_device
from ..core.registry import Binding
from . import spec
from .spec import Options


def conv_shuffle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    shuffle: int = 0,
    activation: str = "Identity",
    implementation: str | None = None,
) -> Tensor:
    r"""A convolution, a pixel shuffle or unshuffle and an activation, in one kernel if narrow.

    .. math::

        y = \phi(s(z)), \qquad
        z_{b,o,p} = \beta_o + \sum_{c,k} W_{o,c,k}\, \bar x_{b,\,c,\,p\,t + k\,d}

    with :math:`\bar x` the input continued beyond its edges, t the stride, d the dilation,
    :math:`s` the (un)shuffle and :math:`\phi` an activation. Weights with a batch axis
    (:math:`W_{b,o,c,k}`, :math:`\beta_{b,o}`) give each sample its own convolution, as
    hypernetworks do. Shared weights of more than 64 input channels a group, and gated activations,
    stay with the framework.

    Parameters
    ----------
    x
        Shape (B, C, H, W), in either memory format, or (B, C, L); float32, bfloat16, float16 or
        float64. Sums are in float32 (float64 for float64). float32 products are exact unless
        ``torch.backends.cudnn`` allows TF32. Under autocast x, weight and bias are cast.
    weight
        :math:`W`: (O, C / groups, k, k) or (O, C / groups, k); with a batch axis (B, O, ...).
    bias
        :math:`\beta`: (O,), or (B, O) with per-sample weights. None: 0.
    stride, padding, dilation, groups
        As in a convolution, the same along both sides.
    padding_mode
        ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
    shuffle
        f > 0 makes of f^2 channels an image f times as large along each side (of f channels a
        sequence f times as long), as torch's ``PixelShuffle``; f < 0 is the inverse; 0: neither.
    activation
        A name of `core.activations.NAMES`; gated ones ("GLU", "SiGLU", "SwiGLU") halve the
        channels.
    implementation
        ``"torch"``, ``"triton"``, or None to let dispatch choose.

    Returns
    -------
    Tensor
        Shape (B, O', H', W') or (B, O', L'), in the memory format of ``x``.

    Raises
    ------
    TypeError
        If an argument is not a floating-point tensor, or dtypes differ.
    ValueError
        If a shape does not fit, a number is out of range, or a name is unknown.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    The kernels repeat bit for bit. Shared weights take their gradients from the framework's
    convolution, which is deterministic where torch is told to be.
    """
    options = Options(stride, padding, dilation, groups, padding_mode, shuffle, activation)
    if implementation is None and _is_ordinary(x, weight, bias, options):
        return _activated(_shuffled(_convolved(x, weight, bias, options), options), options)
    x, weight, bias = torch_tensors({"x": x, "weight": weight, "bias": bias})
    shapes = tuple(x.shape), tuple(weight.shape)
    spec.check_arguments(*shapes, None if bias is None else tuple(bias.shape), options)
    if _takes_plain_path(x, weight, options, implementation) or torch_functions.transformed(
        x, weight, bias
    ):
        return _plain(x, weight, bias, options)
    keep = torch.is_grad_enabled() and any(
        v is not None and v.requires_grad for v in (x, weight, bias)
    )
    y: Tensor = _forward_op(x, weight, bias, *options, keep, implementation)[0]
    return y


def _is_ordinary(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> bool:
    """Whether an eager call on a CPU leaves nothing to prepare or to choose, told in a few
    microseconds; also False where something is wrong."""
    return (
        not torch.compiler.is_compiling()
        and isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and x.is_cpu
        and x.is_floating_point()
        and weight.dtype is x.dtype
        and not torch.is_autocast_enabled("cpu")
        and (bias is None or (isinstance(bias, Tensor) and bias.dtype is x.dtype))
        and _fit(x.shape, weight.shape, None if bias is None else bias.shape, options)
        and not usage.recording()
        and not dispatch.is_overridden(BINDING, None)
    )


def _fit(*given: Any) -> bool:
    try:
        _check_arguments(*given)
    except (TypeError, ValueError):  # as of sizes that are symbols, which no cache can hold
        return False
    return True


# A model makes the same calls over and over; an error is not kept.
_check_arguments = lru_cache(maxsize=1024)(spec.check_arguments)


def _takes_plain_path(
    x: Tensor, weight: Tensor, options: Options, implementation: str | None
) -> bool:
    on_cpu = x.is_cpu
    if torch.compiler.is_compiling():
        # The custom op decides at run time, so that a new size changes no traced code; channels
        # and activation are the same for any.
        wide = weight.dim() == x.dim() and weight.shape[1] > spec.MAX_CHANNELS
        plain = implementation == "torch" or (on_cpu and implementation is None)
        return plain or (implementation is None and (wide or options.activation in GATED))
    if on_cpu and not usage.recording() and not dispatch.is_overridden(BINDING, implementation):
        return True
    if usage.recording():
        return False
    decision = _decide(x, weight, options, "forward", implementation)
    if decision.implementation == "torch" and torch.is_grad_enabled() and implementation is None:
        # Its backward pass may be fused all the same.
        decision = _decide(x, weight, options, "backward", implementation)
    return decision.implementation == "torch"


def _decide(
    x: Tensor, weight: Tensor, options: Options, direction: str, implementation: str | None
) -> dispatch.Decision:
    sizes = spec.geometry(tuple(x.shape), tuple(weight.shape), options)
    dtype = str(x.dtype).removeprefix("torch.")
    problem = spec.problem_of(
        sizes, x.dim() - 2, weight.dim() > x.dim(), dtype, direction, options
    )
    return dispatch.decide(problem, torch_device(x.device), BINDING, implementation)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    """The op in ordinary torch operations, differentiable any number of times."""
    with torch_functions.without_autocast(x):
        return _activated(_shuffled(_convolved(x, weight, bias, options), options), options)


def _activated(z: Tensor, options: Options) -> Tensor:
    if options.activation in GATED:
        return torch_functions.apply(options.activation, z.movedim(1, -1)).movedim(-1, 1)
    return torch_functions.apply(options.activation, z)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    stride, _, dilation, groups, _, _, _ = options
    x, padding = padded(x, options)
    convolution = F.conv1d if x.dim() == 3 else F.conv2d
    if weight.dim() == x.dim():
        return convolution(x, weight, bias, stride, padding, dilation, groups)
    batch = x.shape[0]
    if batch == 0:  # nothing to convolve, but gradients still reach the weights
        bias = None if bias is None else bias.sum(0)
        return convolution(x, weight.sum(0), bias, stride, padding, dilation, groups)
    # A batch of different convolutions is one convolution with a group for each sample.
    z = convolution(
        x.reshape(1, -1, *x.shape[2:]),
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(),
        stride,
        padding,
        dilation,
        batch * groups,
    )
    return z.reshape(batch, -1, *z.shape[2:])


def _shuffled(z: Tensor, options: Options) -> Tensor:
    scale = options.shuffle
    if not scale:
        return z
    if z.dim() == 4:
        return torch_functions.pixel_shuffle(z, scale)
    if scale > 0:
        return z.unflatten(1, (-1, scale)).transpose(2, 3).flatten(2)
    return z.unflatten(2, (-1, -scale)).transpose(2, 3).flatten(1, 2)


def _format(x: Tensor) -> torch.memory_format:
    """The memory format of the result: that of ``x``."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return torch.contiguous_format


def _empty(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(x))


def _kept(options: Options, keep: bool) -> bool:
    """Whether the backward pass needs the convolution's result: its slope is nothing else's."""
    return keep and options.activation not in (*spec.SLOPE_FROM_RESULT, "Identity")


@torch.library.custom_op("ml_networks::conv_shuffle", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    padding_mode: str,
    shuffle: int,
    activation: str,
    keep: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    """The result and, where ``keep`` and the slope needs it, the activation's argument."""
    options = Options(stride, padding, dilation, groups, padding_mode, shuffle, activation)
    decision = _decide(x, weight, options, "forward", implementation)
    keep = _kept(options, keep)
    with usage.timed(decision):
        if decision.implementation == "torch" or not x.shape[0]:
            with torch_functions.without_autocast(x):
                z = _shuffled(_convolved(x, weight, bias, options), options)
                y = _activated(z, options)
            y, z = (value.contiguous(memory_format=_format(x)) for value in (y, z))
            return y, z if keep else x.new_empty(0)
        from . import triton_kernel

        shape = spec.geometry(tuple(x.shape), tuple(weight.shape), options).result
        y, kept = _empty(x, shape), _empty(x, shape) if keep else None
        where = torch_device(x.device)
        triton_kernel.forward(x, weight, bias, y, kept, options, decision.config, where)
        return y, x.new_empty(0) if kept is None else kept


@_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    padding_mode: str,
    shuffle: int,
    activation: str,
    keep: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    options = Options(stride, padding, dilation, groups, padding_mode, shuffle, activation)
    shape = spec.geometry(tuple(x.shape), tuple(weight.shape), options).result
    kept = shape
    if activation in GATED:
        kept = (shape[0], 2 * shape[1], *shape[2:])
    return _empty(x, shape), _empty(x, kept) if _kept(options, keep) else x.new_empty(0)


@torch.library.custom_op("ml_networks::conv_shuffle_backward", mutates_args=())
def _backward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    of_y: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    padding_mode: str,
    shuffle: int,
    activation: str,
    needed: list[bool],
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias that are ``needed``, the others empty. ``z`` is where
    the slope is taken: the activation's argument, or its result where that will do."""
    options = Options(stride, padding, dilation, groups, padding_mode, shuffle, activation)
    decision = _decide(x, weight, options, "backward", implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or not x.shape[0]:
            of_z = _pulled(z, of_y, options)
            of_bias = _bias_gradient(of_z, weight.dim() > x.dim()) if needed[2] else None
            found = (*_product_gradients(x, weight, of_z, options, needed), of_bias)
        else:
            found = _fused_gradients(x, weight, z, of_y, options, needed, decision.config)
    of_x, of_weight, of_bias = (
        gradient.to(value.dtype).contiguous(memory_format=_format(value))
        if want and value is not None and gradient is not None
        else x.new_empty(0)
        for value, gradient, want in zip((x, weight, bias), found, needed, strict=True)
    )
    return of_x, of_weight, of_bias


def _fused_gradients(
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    of_y: Tensor,
    options: Options,
    needed: list[bool],
    config: spec.Config,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """By kernels, except the products with shared weights."""
    from . import triton_kernel

    sizes = spec.geometry(tuple(x.shape), tuple(weight.shape), options)
    of_z = _empty(x, (*x.shape[:1], sizes.out_channels, *sizes.convolved[4 - x.dim() :]))
    of_bias = triton_kernel.pull(weight, z, of_y, of_z, options)
    if weight.dim() == x.dim():
        return *_product_gradients(x, weight, of_z, options, needed), of_bias
    of_x = of_weight = None
    where = torch_device(x.device)
    if needed[0]:
        p = options.padding if options.padding_mode != "zeros" else 0
        rest = options._replace(padding=options.padding - p, padding_mode="zeros")
        shape = (*x.shape[:2], *(size + 2 * p for size in x.shape[2:]))
        of_padded = _empty(x, shape)
        triton_kernel.input_gradient(weight, of_z, of_padded, rest, config, where)
        of_x = unpadded(of_padded, options)
    if needed[1]:
        of_weight = _like(weight)
        triton_kernel.weight_gradient(x, of_z, of_weight, options, config, where)
    return of_x, of_weight, of_bias


def _like(value: Tensor) -> Tensor:
    return _empty(value, tuple(value.shape))


@_backward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    of_y: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    padding_mode: str,
    shuffle: int,
    activation: str,
    needed: list[bool],
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    of_x, of_weight, of_bias = (
        _like(value) if want and value is not None else x.new_empty(0)
        for value, want in zip((x, weight, bias), needed, strict=True)
    )
    return of_x, of_weight, of_bias


def _pulled(z: Tensor, of_y: Tensor, options: Options) -> Tensor:
    """The cotangent of the convolution's result."""
    name = options.activation
    if name in GATED:
        of_y = torch_functions.pull_back(name, z.movedim(1, -1), of_y.movedim(1, -1))
        of_y = of_y.movedim(-1, 1)
    elif name != "Identity":
        of_y = torch_functions.pull_back(name, z, of_y)
    return _shuffled(of_y, options._replace(shuffle=-options.shuffle))


def _bias_gradient(of_z: Tensor, per_sample: bool) -> Tensor:
    axes = (*(() if per_sample else (0,)), *range(2, of_z.dim()))
    return of_z.sum(axes)


def padded(x: Tensor, options: Options) -> tuple[Tensor, int]:
    """``x`` continued beyond its edges, and the padding by zeros that is left to do."""
    if options.padding_mode == "zeros" or not options.padding:
        return x, options.padding
    return F.pad(x, (options.padding,) * (2 * x.dim() - 4), mode=options.padding_mode), 0


def unpadded(of_padded: Tensor, options: Options) -> Tensor:
    """The gradient of what `padded` continued; with no atomic sums, unlike torch's own."""
    p, mode = options.padding, options.padding_mode
    if mode == "zeros" or not p:
        return of_padded
    for axis in range(2, of_padded.dim()):
        size = of_padded.shape[axis] - 2 * p
        before, core, after = of_padded.split((p, size, p), axis)
        core = core.clone()
        if mode == "reflect":
            core.narrow(axis, 1, p).add_(before.flip(axis))
            core.narrow(axis, size - 1 - p, p).add_(after.flip(axis))
        elif mode == "replicate":
            core.narrow(axis, 0, 1).add_(before.sum(axis, keepdim=True))
            core.narrow(axis, size - 1, 1).add_(after.sum(axis, keepdim=True))
        else:
            core.narrow(axis, size - p, p).add_(before)
            core.narrow(axis, 0, p).add_(after)
        of_padded = core
    return of_padded


def _product_gradients(
    x: Tensor, weight: Tensor, of_z: Tensor, options: Options, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight by the framework's convolutions."""
    batch, sides, groups = x.shape[0], x.dim() - 2, options.groups
    if not batch:
        return torch.zeros_like(x), torch.zeros_like(weight)
    taken, padding = padded(x, options)
    shape, kernel = taken.shape, weight
    if weight.dim() > x.dim():
        taken = taken.reshape(1, -1, *shape[2:])
        of_z = of_z.reshape(1, -1, *of_z.shape[2:])
        kernel, groups = weight.flatten(0, 1), batch * groups
    of_taken, of_kernel, _ = torch.ops.aten.convolution_backward(
        of_z,
        taken,
        kernel,
        None,
        [options.stride] * sides,
        [padding] * sides,
        [options.dilation] * sides,
        False,
        [0] * sides,
        groups,
        [needed[0], needed[1], False],
    )
    of_x = unpadded(of_taken.reshape(shape), options) if needed[0] else None
    return of_x, of_kernel.reshape(weight.shape) if needed[1] else None


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, *ctx.options = inputs
    y, z = output
    name = ctx.options[6]
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, y if name in spec.SLOPE_FROM_RESULT else z)


def _forward_gradient(ctx: Any, of_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, z = ctx.saved_tensors
    *options, _keep, implementation = ctx.options
    needed = list(ctx.needs_input_grad[:3])
    nothing = (None,) * 9
    if of_y is None or not any(needed):
        return None, None, None, *nothing
    # What is not differentiated here must not lead the derivative of the backward op back.
    found = _backward_op(x, weight, bias, z.detach(), of_y, *options, needed, implementation)
    return *(value if want else None for value, want in zip(found, needed, strict=True)), *nothing


_forward_op.register_autograd(_forward_gradient, setup_context=_setup_forward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _z, of_y, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, of_y)


def _second_gradient(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    """The derivative of the backward op, through the plain path."""
    *options, needed, _implementation = ctx.options

    def gradients(
        x: Tensor, weight: Tensor, bias: Tensor | None, of_y: Tensor
    ) -> tuple[Tensor, ...]:
        y = _plain(x, weight, bias, Options(*options))
        first = [v for v, want in zip((x, weight, bias), needed, strict=True) if want]
        found = torch.autograd.grad(y, first, of_y, create_graph=True)  # type: ignore[arg-type]
        return tuple(found)

    given = [c for c, want in zip(cotangents, needed, strict=True) if want]
    of_x, of_weight, of_bias, of_of_y = plain_vjp(gradients, ctx.saved_tensors, given)
    return of_x, of_weight, of_bias, None, of_of_y, *(None,) * 9


_backward_op.register_autograd(_second_gradient, setup_context=_setup_backward)


def _call(
    inputs: Mapping[str, Tensor], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor]:
    # What the shapes of the inputs say.
    options = {name: value for name, value in flags.items() if name in Options._fields}
    arguments: dict[str, Any] = {**inputs, **options}
    return {"y": conv_shuffle(**arguments, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="torch",
    implementations=("torch", "triton"),
    call=_call,
    differentiable=("x", "weight", "bias"),
    kernel_module="triton_kernel",
)
