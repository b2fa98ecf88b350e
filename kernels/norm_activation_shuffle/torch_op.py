"""Norm, shuffle, activation, dropout, residual and FiLM for torch: the public function, the plain
path, the custom ops. The custom ops work on (batch, channels, height, width)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import dispatch, torch_functions, usage
from ..core.arguments import plain_vjp
from ..core.device import torch_device
from ..core.registry import Binding
from . import spec

_SEEDS = 0, 1 << 62


class Options(NamedTuple):
    """What a call fixes beside its tensors. ``norm`` is ``"batch"`` or ``"group"`` with moments of
    the input, ``"given"`` with given ones, or ``"none"``."""

    norm: str
    num_groups: int
    activation: str
    eps: float
    shuffle: int
    dropout: float
    residual_first: bool
    channels_last: bool


def norm_activation_shuffle(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    norm: str = "batch",
    num_groups: int = 1,
    training: bool = True,
    momentum: float = 0.1,
    activation: str = "Identity",
    eps: float = 1e-5,
    shuffle: int = 0,
    dropout: float = 0.0,
    residual_first: bool = False,
    seed: int | Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    r"""Everything after a convolution in as few passes over its feature maps as possible.

    .. math::

        v &= S\!\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \, \gamma + \beta\right) \\
        y &= a \, m \odot \phi(v) + b + r
        \qquad\text{or}\qquad y = a \, \phi(m \odot v + r) + b

    the second with ``residual_first``. :math:`S` is the pixel shuffle of
    ``torch.nn.PixelShuffle`` or its inverse, :math:`\phi` any activation of the library without
    weights of its own; ``GLU``, ``SiGLU`` and ``SwiGLU`` halve the channels after the shuffle.
    :math:`m` is 0 with probability ``dropout``, otherwise 1 / (1 - ``dropout``), made from a
    counter, in the backward pass again, and never stored. :math:`a` and :math:`b` are those of
    FiLM (Perez et al., arXiv 1709.07871).

    Parameters
    ----------
    x
        Shape (N, C, \*sides); float32, bfloat16, float16 or float64. Arithmetic is in float32
        (float64 for float64), the result in the dtype of ``x``, also under autocast, and
        channels-last where ``x`` is.
    weight, bias
        :math:`\gamma` and :math:`\beta`, shape (C,). None: ones and zeros.
    residual
        :math:`r`, the shape and dtype of the result. None: zero.
    scale, shift
        :math:`a` and :math:`b`, shape (N, C') with the C' channels of the result. None: ones and
        zeros.
    running_mean, running_var
        Shape (C,), for ``norm="batch"``: while training they move by ``momentum`` towards the
        batch's mean and unbiased variance, in place; otherwise they normalise.
    norm
        ``"batch"`` (Ioffe and Szegedy, arXiv 1502.03167), ``"group"`` (Wu and He, arXiv
        1803.08494; C groups are instance norm, one group is layer norm over channels and sides)
        or ``"none"`` (the fraction is x).
    num_groups
        Of ``norm="group"``. Default 1.
    training
        Whether ``norm="batch"`` takes the moments of the batch. Default True.
    momentum
        Default 0.1.
    activation
        A name of `ml_networks.kernels.core.activations.NAMES`. Default ``"Identity"``.
    eps
        Default 1e-5.
    shuffle
        The factor s of the shuffle, (N, C, H, W) to (N, C / s², s H, s W); below 0 the unshuffle
        by \|s\|; default 0, none.
    dropout
        Probability in [0, 1).
    residual_first
        Whether the residual is added before the activation. Not with a gated one.
    seed
        Makes the dropped elements a function of ``seed``, sample, and place in the sample's
        (C', \*sides) alone, the same in every implementation and framework
        (`ml_networks.kernels.core.dropout`): an integer or an int64 tensor of one element. None:
        drawn from torch's generator; the plain path then drops as
        ``torch.nn.functional.dropout`` does.
    implementation
        ``"torch"``, ``"triton"``, or None to let dispatch choose.

    Returns
    -------
    Tensor
        Shape (N, C', \*sides').

    Raises
    ------
    TypeError
        If ``x`` is not a floating-point tensor or ``residual`` has another dtype.
    ValueError
        If a shape does not fit, batch statistics are asked for of one value, ``dropout`` is
        outside [0, 1), or ``norm`` or ``activation`` has no such name.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    Repeated calls give the same bits, gradients included. Under the transforms of ``torch.func``
    the plain path runs.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"x must be a floating-point tensor, got {got}")
    given = {
        "weight": weight,
        "bias": bias,
        "residual": residual,
        "scale": scale,
        "shift": shift,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    shape, count = spec.check_arguments(
        tuple(x.shape),
        {name: None if value is None else tuple(value.shape) for name, value in given.items()},
        norm=norm,
        num_groups=num_groups,
        training=training,
        activation=activation,
        shuffle=shuffle,
        dropout=dropout,
        residual_first=residual_first,
    )
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"residual is {residual.dtype}; it must be {x.dtype} like x")
    inside = norm if norm != "batch" or training else "given"
    fixed = inside, num_groups, activation, float(eps), shuffle, float(dropout), residual_first
    pixels = _as_images(x)
    options = Options(*fixed, channels_last=_is_channels_last(pixels))
    film = scale is not None or shift is not None
    if _takes_plain_path(pixels, residual, film, options, implementation) or (
        torch_functions.transformed(x, *given.values())
    ):
        moments = (running_mean, running_var) if norm == "batch" else (None, None)
        return _plain(
            x, weight, bias, residual, scale, shift, *moments, seed, options, momentum=momentum
        )
    if film:
        scale = x.new_ones(shape[:2]) if scale is None else scale
        shift = x.new_zeros(shape[:2]) if shift is None else shift
    drawn = None
    if dropout > 0:
        if seed is None:
            drawn = torch.randint(*_SEEDS, (1,), device=x.device)
        else:
            drawn = torch.as_tensor(seed, dtype=torch.int64, device=x.device).reshape(1)
    residual = None if residual is None else _as_images(residual)
    moments = (running_mean, running_var) if inside == "given" else (None, None)
    y, mean, var = _forward_op(
        pixels, weight, bias, residual, scale, shift, *moments, drawn, *options, implementation
    )
    if inside == "batch" and running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = var * (count / max(count - 1, 1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return y.reshape(shape)


def _as_images(x: Tensor) -> Tensor:
    """(N, C, *sides) as (N, C, height, width)."""
    if x.dim() == 4:
        return x
    if x.dim() > 4:
        return x.flatten(3)
    return x.unsqueeze(2) if x.dim() == 3 else x[:, :, None, None]


def _is_channels_last(x: Tensor) -> bool:
    _, channels, height, width = x.shape
    return channels > 1 and height * width > 1 and x.stride(1) == 1


def _takes_plain_path(
    x: Tensor,
    residual: Tensor | None,
    film: bool,
    options: Options,
    implementation: str | None,
) -> bool:
    on_cpu = x.device.type == "cpu"
    if torch.compiler.is_compiling():
        # The custom op decides at run time: a new shape then changes no traced code.
        return implementation == "torch" or (on_cpu and implementation is None)
    if on_cpu and not usage.recording() and not dispatch.is_overridden(BINDING, implementation):
        return True
    if not x.numel():
        return True
    decision = _decide(x, residual is not None, film, options, "forward", implementation)
    return decision.implementation == "torch" and not usage.recording()


def _decide(
    x: Tensor,
    residual: bool,
    film: bool,
    options: Options,
    direction: str,
    implementation: str | None,
) -> dispatch.Decision:
    norm = options.norm
    flags = {
        "norm": "batch" if norm == "given" else norm,
        "num_groups": options.num_groups,
        "training": norm != "given",
        "activation": options.activation,
        "shuffle": options.shuffle,
        "dropout": options.dropout,
        "residual": residual,
        "residual_first": options.residual_first,
        "film": film,
        "channels_last": options.channels_last,
    }
    dtype = str(x.dtype).removeprefix("torch.")
    problem = spec.problem_of(tuple(x.shape), dtype, direction, flags)
    return dispatch.decide(problem, torch_device(x.device), BINDING, implementation)


def _plain(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    seed: int | Tensor | None,
    options: Options,
    momentum: float = 0.0,
) -> Tensor:
    """The op in ordinary torch operations, differentiable any number of times; ``mean`` and
    ``var`` are those given, or the running ones that a batch moves."""
    norm, groups, activation, eps, shuffle, dropout, residual_first, _ = options
    with torch.autocast(x.device.type, enabled=False):
        y = _normalized(x, weight, bias, mean, var, norm, groups, eps, momentum)
        y = torch_functions.pixel_shuffle(y, shuffle)
        if residual_first:
            y = _dropped(y, dropout, seed)
            y = torch_functions.apply(activation, y if residual is None else y + residual)
        else:
            y = _dropped(_on_channels(activation, y), dropout, seed)
        if scale is not None:
            y = y * _beside_sides(scale, y).to(x.dtype)
        if shift is not None:
            y = y + _beside_sides(shift, y).to(x.dtype)
        return y if residual is None or residual_first else y + residual


def _normalized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    norm: str,
    groups: int,
    eps: float,
    momentum: float,
) -> Tensor:
    if weight is None and bias is not None:
        # torch's functions take no bias without a weight.
        weight = torch.ones_like(bias)
    if norm in ("batch", "given"):
        # Half-precision feature maps may have float32 parameters, as long as all of them are.
        if mean is not None:
            weight = None if weight is None else weight.to(mean.dtype)
            bias = None if bias is None else bias.to(mean.dtype)
        return F.batch_norm(x, mean, var, weight, bias, norm == "batch", momentum, eps)
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if norm == "group":
        return F.group_norm(x, groups, weight, bias, eps)
    if weight is not None:
        x = x * weight.reshape(-1, *[1] * (x.dim() - 2))
    return x if bias is None else x + bias.reshape(-1, *[1] * (x.dim() - 2))


def _on_channels(activation: str, x: Tensor) -> Tensor:
    if spec.parts(activation) == 1:
        return torch_functions.apply(activation, x)
    return torch_functions.apply(activation, x.movedim(1, -1)).movedim(-1, 1)


def _dropped(x: Tensor, dropout: float, seed: int | Tensor | None) -> Tensor:
    if not dropout:
        return x
    if seed is None:
        return F.dropout(x, dropout)
    return x * _mask(x, dropout, seed, x.dtype)


def _mask(x: Tensor, dropout: float, seed: int | Tensor, dtype: torch.dtype) -> Tensor:
    sample = math.prod(x.shape[1:])
    scale = torch_functions.dropout_scale(dropout, seed, x.shape[0], sample, x.device, dtype)
    return scale.reshape(x.shape)


def _beside_sides(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(*value.shape, *[1] * (x.dim() - 2))


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


@torch.library.custom_op("ml_networks::norm_activation_shuffle", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    seed: Tensor | None,
    norm: str,
    num_groups: int,
    activation: str,
    eps: float,
    shuffle: int,
    dropout: float,
    residual_first: bool,
    channels_last: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the moments it was normalised by; empty where they were given."""
    options = Options(
        norm, num_groups, activation, eps, shuffle, dropout, residual_first, channels_last
    )
    film = scale is not None
    decision = _decide(x, residual is not None, film, options, "forward", implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or not x.numel():
            y = _plain(x, weight, bias, residual, scale, shift, mean, var, seed, options)
            # A custom op may return none of its inputs, and says how its results lie.
            kept = torch.empty_like(y, memory_format=_layout(channels_last)).copy_(y)
            return kept, *_moments(x, options)
        from . import triton_kernel

        return triton_kernel.forward(
            x,
            _contiguous(weight),
            _contiguous(bias),
            residual,
            _contiguous(scale),
            _contiguous(shift),
            _contiguous(mean),
            _contiguous(var),
            seed,
            options,
            decision.config,
            torch_device(x.device),
        )


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _moments_shape(x: Tensor, norm: str, num_groups: int) -> tuple[int, ...]:
    if norm == "batch":
        return (x.shape[1],)
    return (x.shape[0], num_groups) if norm == "group" else (0,)


def _moments(x: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The mean and the biased variance that the input is normalised by."""
    shape = _moments_shape(x, options.norm, options.num_groups)
    if options.norm not in ("batch", "group") or not x.numel():
        return x.new_zeros(shape, dtype=_exact(x)), x.new_ones(shape, dtype=_exact(x))
    x = x.to(_exact(x))
    rows = x.transpose(0, 1).flatten(1) if options.norm == "batch" else x.reshape(*shape, -1)
    var, mean = torch.var_mean(rows, -1, correction=0)
    return mean, var


def _result_shape(x: Tensor, activation: str, shuffle: int) -> tuple[int, ...]:
    channels, sides = spec.shuffled(x.shape[1], list(x.shape[2:]), shuffle)
    return (x.shape[0], channels // spec.parts(activation), *sides)


@_forward_op.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    norm, num_groups, activation, _, shuffle, _, _, channels_last, _ = arguments[8:]
    y = x.new_empty(_result_shape(x, activation, shuffle))
    y = torch.empty_like(y, memory_format=_layout(channels_last))
    shape = _moments_shape(x, norm, num_groups)
    return y, x.new_empty(shape, dtype=_exact(x)), x.new_empty(shape, dtype=_exact(x))


@torch.library.custom_op("ml_networks::norm_activation_shuffle_backward", mutates_args=())
def _backward_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    seed: Tensor | None,
    of_y: Tensor,
    norm: str,
    num_groups: int,
    activation: str,
    eps: float,
    shuffle: int,
    dropout: float,
    residual_first: bool,
    channels_last: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias, residual, scale and shift, empty where there is none.
    A residual is only given, and has a gradient of its own, where it is added first."""
    options = Options(
        norm, num_groups, activation, eps, shuffle, dropout, residual_first, channels_last
    )
    film = scale is not None
    decision = _decide(x, residual is not None, film, options, "backward", implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or not x.numel():
            found = _plain_gradient(
                x, weight, bias, residual, scale, shift, mean, var, seed, of_y, options
            )
        else:
            from . import triton_kernel

            found = triton_kernel.backward(
                x,
                _contiguous(weight),
                _contiguous(bias),
                residual,
                _contiguous(scale),
                _contiguous(shift),
                _contiguous(mean),
                _contiguous(var),
                seed,
                of_y,
                options,
                decision.config,
                torch_device(x.device),
            )
        given = (x, weight, bias, residual, scale, shift)
        made = [
            _like(value, gradient, x, channels_last)
            for value, gradient in zip(given, found, strict=True)
        ]
        return made[0], made[1], made[2], made[3], made[4], made[5]


def _like(value: Tensor | None, gradient: Tensor | None, x: Tensor, channels_last: bool) -> Tensor:
    """``gradient`` in the dtype of ``value``, as a tensor of its own: an op's results may not
    share memory."""
    if value is None or gradient is None:
        return x.new_empty(0)
    layout = _layout(channels_last and value.dim() == 4)
    if gradient.dtype == value.dtype and gradient._base is None:
        return gradient.contiguous(memory_format=layout)
    made = torch.empty(value.shape, dtype=value.dtype, device=x.device, memory_format=layout)
    return made.copy_(gradient)


def _plain_gradient(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    seed: Tensor | None,
    of_y: Tensor,
    options: Options,
) -> list[Tensor | None]:
    """The gradients in ordinary torch operations: the backward op's plain path."""
    norm, groups, activation, eps, shuffle, dropout, residual_first, _ = options
    dtype = _exact(x)
    z, inverse = x.to(dtype), x.new_ones((), dtype=dtype)
    if mean is not None and var is not None:
        inverse = _per_channel((var.to(dtype) + eps).rsqrt(), x)
        z = (z - _per_channel(mean.to(dtype), x)) * inverse
    line = (1, -1, 1, 1)
    slope = torch.ones_like(inverse) if weight is None else weight.to(dtype).reshape(line)
    v = z * slope if bias is None else z * slope + bias.to(dtype).reshape(line)
    v, g = torch_functions.pixel_shuffle(v, shuffle), of_y.to(dtype)
    mask = None if seed is None else _mask(of_y, dropout, seed, dtype)
    argument = v
    if residual_first:
        argument = v if mask is None else v * mask
        argument = argument if residual is None else argument + residual.to(dtype)
    of_made = g if scale is None else g * _beside_sides(scale, g).to(dtype)
    of_scale = of_shift = of_residual = None
    if scale is not None:
        made = _on_channels(activation, argument)
        made = made if mask is None or residual_first else made * mask
        of_scale, of_shift = (g * made).sum((2, 3)), g.sum((2, 3))
    if mask is not None and not residual_first:
        of_made = of_made * mask
    of_v = torch_functions.pull_back(
        activation, argument.movedim(1, -1), of_made.movedim(1, -1)
    ).movedim(-1, 1)
    if residual_first:
        of_residual = of_v
        of_v = of_v if mask is None else of_v * mask
    of_v = torch_functions.pixel_shuffle(of_v, -shuffle)
    of_z = of_v * slope
    if norm in ("batch", "group") and x.numel():
        of_z = of_z - _averaged(of_z, norm, groups) - z * _averaged(of_z * z, norm, groups)
    of_weight, of_bias = (of_v * z).sum((0, 2, 3)), of_v.sum((0, 2, 3))
    return [of_z * inverse, of_weight, of_bias, of_residual, of_scale, of_shift]


def _per_channel(moments: Tensor, x: Tensor) -> Tensor:
    """(channels,) or (batch, groups) to be broadcast against feature maps."""
    if moments.dim() == 2:
        moments = moments.repeat_interleave(x.shape[1] // moments.shape[1], 1)
    return moments.reshape(-1, x.shape[1], 1, 1)


def _averaged(value: Tensor, norm: str, groups: int) -> Tensor:
    if norm == "batch":
        return value.mean((0, 2, 3), keepdim=True)
    return _per_channel(value.reshape(value.shape[0], groups, -1).mean(-1), value)


@_backward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    channels_last = arguments[-2]

    def like(value: Tensor | None) -> Tensor:
        if value is None:
            return x.new_empty(0)
        made = value.new_empty(tuple(value.shape))
        layout = _layout(channels_last and value.dim() == 4)
        return torch.empty_like(made, memory_format=layout)

    return tuple(map(like, (x, weight, bias, residual, scale, shift)))


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, scale, shift, mean, var, seed, *ctx.options = inputs
    *options, _ = ctx.options
    options = Options(*options)
    if options.norm in ("batch", "group"):
        mean, var = output[1:]
    kept = residual if options.residual_first else None
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, weight, bias, kept, scale, shift, mean, var, seed)
    ctx.set_materialize_grads(False)


def _forward_gradient(ctx: Any, of_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Nothing flows through the moments that the op returns: they leave it to be remembered."""
    found: list[Any] = [None] * 6
    if of_y is not None:
        given = ctx.saved_tensors
        if any(ctx.needs_input_grad[:6]):
            gradients = _backward_op(*given, of_y, *ctx.options)
            found = [
                None if value is None else gradient
                for value, gradient in zip(given, gradients, strict=False)
            ]
        if ctx.has_residual and not Options(*ctx.options[:-1]).residual_first:
            found[3] = of_y
    return *found, *(None,) * 12


_forward_op.register_autograd(_forward_gradient, setup_context=_setup_forward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[10:]
    ctx.save_for_backward(*inputs[:10])


def _second_gradient(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    """The derivative of the backward op, through the plain path."""
    *inputs, mean, var, seed, of_y = ctx.saved_tensors
    options = Options(*ctx.options[:-1])
    moments = (mean, var) if options.norm == "given" else (None, None)

    def output(*values: Any) -> Sequence[Tensor]:
        arguments: Any = *values, *moments, seed, options
        return [_plain(*arguments)]

    def gradients(*values: Any) -> Sequence[Tensor]:
        found = plain_vjp(output, values[:-1], values[-1:])
        zero = values[-1].new_zeros(())
        return [zero if gradient is None else gradient for gradient in found]

    given = [c if v is not None else None for c, v in zip(cotangents, inputs, strict=True)]
    found = plain_vjp(gradients, [*inputs, of_y], given)
    return *found[:-1], None, None, None, found[-1], *(None,) * 9


_backward_op.register_autograd(_second_gradient, setup_context=_setup_backward)


def _call(
    inputs: Mapping[str, Tensor], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor]:
    options: dict[str, Any] = {**inputs, **flags}
    if options.pop("channels_last", False):
        options["x"] = options["x"].contiguous(memory_format=torch.channels_last)
    return {"y": norm_activation_shuffle(**options, implementation=implementation)}


BINDING = Binding(
    op=spec.NAME,
    framework="torch",
    implementations=("torch", "triton"),
    call=_call,
    differentiable=("x", "weight", "bias", "residual"),
    kernel_module="triton_kernel",
)
