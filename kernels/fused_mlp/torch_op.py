"""A whole narrow multi-layer perceptron for torch: the public function, the plain path, the custom
ops. The plain path is one `linear_norm_activation` after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import dispatch, torch_functions, usage
from ..core.arguments import plain_vjp
from ..core.device import torch_device
from ..core.problem import Problem
from ..core.registry import Binding
from ..linear_norm_activation.torch_op import linear_norm_activation
from ..norm_activation.torch_op import norm_activation
from . import spec

_SEEDS = 0, 1 << 62

Parameters = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]
"""weights, biases, norm_weights, norm_biases, each of the last three empty where there is none."""
Options = tuple[str, str, str, float, float]
"""norm, activation, output_activation, eps, dropout."""


def fused_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    norm_weights: Sequence[Tensor] | None = None,
    norm_biases: Sequence[Tensor] | None = None,
    *,
    norm: str = "none",
    activation: str = "Identity",
    output_activation: str = "Identity",
    eps: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    r"""A multi-layer perceptron of equal hidden layers, all of it in one kernel if it is narrow.

    .. math::

        h_l = m_l \odot \phi(N_l(h_{l-1} W_l^\top + b_l)), \quad l = 1 \dots L, \qquad
        y = m_{L+1} \odot \psi(h_L W_{L+1}^\top + b_{L+1})

    with :math:`h_0 = x`, :math:`N` a norm of the last axis with weight and bias, :math:`\phi` and
    :math:`\psi` activations and :math:`m` the dropout, as in :func:`norm_activation`. Wide
    networks (more than 256 hidden or output features) and gated activations run layer by layer
    through :func:`linear_norm_activation`. In the literature a fully fused MLP (Müller et al.,
    arXiv 2106.12372).

    Parameters
    ----------
    x
        Shape (..., I); float32, bfloat16, float16 or float64. Sums are in float32 (float64 for
        float64). Under autocast it is cast as the input of torch's linear layer is, and so are
        all parameters inside; the result has that dtype.
    weights
        :math:`W_1` (H, I), :math:`W_2` to :math:`W_L` (H, H), :math:`W_{L+1}` (O, H); two or
        more. A gated activation takes twice the rows.
    biases
        :math:`b`, one for each weight. None: zeros.
    norm_weights, norm_biases
        Of the norms, one (H,) for each hidden layer. None: ones and zeros.
    norm
        ``"layer"``, ``"rms"`` or ``"none"``, after each hidden linear layer.
    activation, output_activation
        :math:`\phi` and :math:`\psi`: names of `ml_networks.kernels.core.activations.NAMES`.
    eps, dropout, seed
        As in :func:`norm_activation`; layer l takes the seed plus :math:`(l - 1) 2^{32}`.
    implementation
        ``"torch"``, ``"triton"``, or None to let dispatch choose.

    Returns
    -------
    Tensor
        Shape (..., O).

    Raises
    ------
    TypeError
        If ``x`` is not a floating-point tensor, or a weight or bias has another dtype outside
        autocast.
    ValueError
        If a shape does not fit, ``dropout`` is outside [0, 1), or ``norm`` or an activation has
        no such name.
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
    vectors = {"biases": biases, "norm_weights": norm_weights, "norm_biases": norm_biases}
    shapes = {
        k: None if v is None else [tuple(one.shape) for one in v] for k, v in vectors.items()
    }
    sides = [tuple(weight.shape) for weight in weights]
    spec.check_arguments(
        tuple(x.shape), sides, shapes, norm, activation, output_activation, dropout
    )
    parameters: Parameters = (
        list(weights),
        list(biases or ()),
        list(norm_weights or ()),
        list(norm_biases or ()),
    )
    place = x.device.type
    casts = torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place)
    if casts and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(place))
    else:
        for name, given in (("weights", weights), ("biases", biases or ())):
            for index, value in enumerate(given):
                if value.dtype != x.dtype:
                    raise TypeError(
                        f"{name}[{index}] is {value.dtype}; it must be {x.dtype} like x"
                    )
    if eps is None:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        eps = torch.finfo(exact).eps if norm == "rms" else 1e-5
    options = norm, activation, output_activation, float(eps), float(dropout)
    if dropout > 0 and seed is not None:
        seed = torch.as_tensor(seed, dtype=torch.int64, device=x.device).reshape(1)
    flat = list(chain(*parameters))
    if _takes_plain_path(x, sides, options, implementation) or torch_functions.transformed(
        x, *flat
    ):
        return _plain(x, parameters, seed, *options, implementation)
    if dropout > 0 and seed is None:
        seed = torch.randint(*_SEEDS, (1,), device=x.device)
    drawn = seed if dropout > 0 and isinstance(seed, Tensor) else None
    rows = x.reshape(-1 if x.numel() else 0, x.shape[-1])
    keep = torch.is_grad_enabled() and any(value.requires_grad for value in (x, *flat))
    y = _forward_op(rows, *parameters, drawn, *options, keep, implementation)[0]
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _takes_plain_path(
    x: Tensor, sides: Sequence[tuple[int, ...]], options: Options, implementation: str | None
) -> bool:
    on_cpu = x.is_cpu
    if torch.compiler.is_compiling():
        # The custom op decides at run time, so that a new number of rows changes no traced code;
        # what never fits does not fit any number.
        plain = implementation == "torch" or (on_cpu and implementation is None)
        misfits = spec.misfits(_problem(1, x, sides, options, "forward"), "triton")
        return plain or (bool(misfits) and implementation is None)
    if on_cpu and not usage.recording() and not dispatch.is_overridden(BINDING, implementation):
        return True
    decision = _decide(x.shape[:-1].numel(), x, sides, options, "forward", implementation)
    return decision.implementation == "torch" and not usage.recording()


def _problem(
    rows: int, x: Tensor, sides: Sequence[tuple[int, ...]], options: Options, direction: str
) -> Problem:
    norm, activation, output_activation, _, dropout = options
    flags = {
        "norm": norm,
        "activation": activation,
        "output_activation": output_activation,
        "dropout": dropout,
    }
    dtype = str(x.dtype).removeprefix("torch.")
    return spec.problem_of(rows, sides, dtype, direction, flags)


def _decide(
    rows: int,
    x: Tensor,
    sides: Sequence[tuple[int, ...]],
    options: Options,
    direction: str,
    implementation: str | None,
) -> dispatch.Decision:
    problem = _problem(rows, x, sides, options, direction)
    return dispatch.decide(problem, torch_device(x.device), BINDING, implementation)


def _of_layer(seed: Tensor | None, layer: int) -> Tensor | None:
    return None if seed is None else seed + (layer << 32)


def _each(vectors: Sequence[Tensor], layers: int) -> list[Tensor | None]:
    """One for each layer, None where there is none."""
    return [*vectors, *[None] * (layers - len(vectors))]


def _plain(
    x: Tensor,
    parameters: Parameters,
    seed: int | Tensor | None,
    norm: str,
    activation: str,
    output_activation: str,
    eps: float,
    dropout: float,
    implementation: str | None,
) -> Tensor:
    """One `linear_norm_activation` after another, whose implementation is its own affair unless
    plain torch was asked for."""
    weights, biases, norm_weights, norm_biases = parameters
    last = len(weights) - 1
    every = (biases, norm_weights, norm_biases)
    for layer, weight, *vectors in zip(
        range(last + 1), weights, *(_each(kind, last + 1) for kind in every), strict=True
    ):
        x = linear_norm_activation(
            x,
            weight,
            *vectors,
            norm=norm if layer < last else "none",
            activation=activation if layer < last else output_activation,
            eps=eps,
            dropout=dropout,
            seed=_of_layer(seed, layer) if isinstance(seed, Tensor) else None,
            implementation="torch" if implementation == "torch" else None,
        )
    return x


def _packed(parameters: Parameters) -> Tensor:
    """All parameters in one tensor, of the widest of their dtypes."""
    return torch.cat([value.reshape(-1) for value in chain(*parameters)])


def _unpacked(packed: Tensor, parameters: Parameters) -> list[list[Tensor]]:
    """The reverse of `_packed`: pieces like ``parameters``, views where the dtype is theirs."""
    pieces = iter(packed.split([value.numel() for value in chain(*parameters)]))
    return [
        [next(pieces).reshape(value.shape).to(value.dtype) for value in kind]
        for kind in parameters
    ]


def _parameters_dtype(parameters: Parameters) -> torch.dtype:
    dtype = parameters[0][0].dtype
    for value in chain(*parameters):
        dtype = torch.promote_types(dtype, value.dtype)
    return dtype


def _given(parameters: Parameters) -> tuple[bool, bool, bool]:
    _, biases, norm_weights, norm_biases = parameters
    return bool(biases), bool(norm_weights), bool(norm_biases)


def _sizes(weights: Sequence[Tensor]) -> tuple[int, int, int, int]:
    """in_features, width, out_features, layers."""
    outputs, width = weights[-1].shape
    return weights[0].shape[1], width, outputs, len(weights) - 1


def _sides(weights: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(weight.shape) for weight in weights]


@torch.library.custom_op("ml_networks::fused_mlp", mutates_args=())
def _forward_op(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    seed: Tensor | None,
    norm: str,
    activation: str,
    output_activation: str,
    eps: float,
    dropout: float,
    keep: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result and, where ``keep``, what the backward pass needs: each hidden layer's product
    and result, the output layer's product if an activation follows, and all parameters."""
    parameters = weights, biases, norm_weights, norm_biases
    options = norm, activation, output_activation, eps, dropout
    rows, sides = x.shape[0], _sides(weights)
    decision = _decide(rows, x, sides, options, "forward", implementation)
    with usage.timed(decision):
        packed = _packed(parameters).to(x.dtype)
        if decision.implementation == "torch" or not rows:
            found = _plain_forward(x, parameters, seed, options, keep, implementation)
        else:
            from . import triton_kernel

            found = triton_kernel.forward(
                x,
                packed,
                seed,
                _sizes(weights),
                _given(parameters),
                options,
                keep,
                decision.config,
                torch_device(x.device),
            )
        return *found, packed if keep else packed.new_empty(0)


@_forward_op.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    seed: Tensor | None,
    norm: str,
    activation: str,
    output_activation: str,
    eps: float,
    dropout: float,
    keep: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, (_, width, outputs, layers) = x.shape[0], _sizes(weights)
    every = chain(weights, biases, norm_weights, norm_biases)
    outputs //= spec.parts(output_activation)
    between = (layers if keep else 0, rows, weights[0].shape[0])
    after = (layers if keep else 0, rows, width)
    products = rows if keep and output_activation != "Identity" else 0
    return (
        x.new_empty((rows, outputs)),
        x.new_empty(between),
        x.new_empty(after),
        x.new_empty((products, weights[-1].shape[0])),
        x.new_empty(sum(value.numel() for value in every) if keep else 0),
    )


def _cast(parameters: Parameters, dtype: torch.dtype) -> list[list[Any]]:
    """As lists with an entry for each layer, None where there is none."""
    layers = len(parameters[0])
    return [_each([value.to(dtype) for value in kind], layers) for kind in parameters]


def _plain_forward(
    x: Tensor,
    parameters: Parameters,
    seed: Tensor | None,
    options: Options,
    keep: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the forward kernel returns, layer by layer."""
    norm, activation, output_activation, eps, dropout = options
    weights, biases, norm_weights, norm_biases = _cast(parameters, x.dtype)
    layers = len(weights) - 1
    own = "torch" if implementation == "torch" else None
    rest: dict[str, Any] = {"eps": eps, "dropout": dropout, "implementation": own}
    h, pre, post = x, [], []
    with torch.autocast(x.device.type, enabled=False):
        for layer in range(layers):
            z = F.linear(h, weights[layer], biases[layer])
            affine = norm_weights[layer], norm_biases[layer]
            rest["seed"] = _of_layer(seed, layer)
            h = norm_activation(z, *affine, norm=norm, activation=activation, **rest)
            pre.append(z)
            post.append(h)
        z = F.linear(h, weights[layers], biases[layers])
        rest["seed"] = _of_layer(seed, layers)
        y = norm_activation(z, norm="none", activation=output_activation, **rest)
    products = z if keep and output_activation != "Identity" else z[:0].clone()
    if keep:
        return y, torch.stack(pre), torch.stack(post), products
    return y, z.new_empty((0, *pre[0].shape)), z.new_empty((0, *post[0].shape)), products


@torch.library.custom_op("ml_networks::fused_mlp_backward", mutates_args=())
def _backward_op(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    seed: Tensor | None,
    of_y: Tensor,
    pre: Tensor,
    post: Tensor,
    pre_out: Tensor,
    packed: Tensor,
    norm: str,
    activation: str,
    output_activation: str,
    eps: float,
    dropout: float,
    of_x_wanted: bool,
    of_parameters_wanted: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of all parameters, each empty unless wanted."""
    parameters = weights, biases, norm_weights, norm_biases
    options = norm, activation, output_activation, eps, dropout
    rows, sides = x.shape[0], _sides(weights)
    wanted = of_x_wanted, of_parameters_wanted
    decision = _decide(rows, x, sides, options, "backward", implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or not rows:
            own = "torch" if implementation == "torch" else None
            return _plain_backward(
                x, parameters, seed, of_y, pre, post, pre_out, options, *wanted, own
            )
        from . import triton_kernel

        return triton_kernel.backward(
            x,
            packed,
            seed,
            of_y,
            pre,
            post,
            pre_out,
            _sizes(weights),
            _given(parameters),
            options,
            *wanted,
            _parameters_dtype(parameters),
            decision.config,
            torch_device(x.device),
        )


@_backward_op.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    seed: Tensor | None,
    of_y: Tensor,
    pre: Tensor,
    post: Tensor,
    pre_out: Tensor,
    packed: Tensor,
    norm: str,
    activation: str,
    output_activation: str,
    eps: float,
    dropout: float,
    of_x_wanted: bool,
    of_parameters_wanted: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    parameters = weights, biases, norm_weights, norm_biases
    elements = sum(value.numel() for value in chain(*parameters))
    return (
        x.new_empty((x.shape[0] if of_x_wanted else 0, x.shape[1])),
        x.new_empty(elements if of_parameters_wanted else 0, dtype=_parameters_dtype(parameters)),
    )


def _plain_backward(
    x: Tensor,
    parameters: Parameters,
    seed: Tensor | None,
    of_y: Tensor,
    pre: Tensor,
    post: Tensor,
    pre_out: Tensor,
    options: Options,
    of_x_wanted: bool,
    of_parameters_wanted: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    """What the backward kernels return, layer by layer."""
    norm, activation, output_activation, eps, dropout = options
    # The op behind `norm_activation`, of which only the gradient is needed here.
    pull = torch.ops.ml_networks.norm_activation_backward
    weights, _, norm_weights, norm_biases = _cast(parameters, x.dtype)
    layers = len(weights) - 1
    z = of_y if output_activation == "Identity" else pre_out
    rest = eps, dropout, implementation
    drawn = _of_layer(seed, layers)
    of_z, *_ = pull(z, None, None, drawn, of_y, "none", output_activation, *rest)
    of_weights, of_biases, of_norms = [of_z.T @ post[-1]], [of_z.sum(0)], []
    for layer in reversed(range(layers)):
        affine = norm_weights[layer], norm_biases[layer]
        of_h = of_z @ weights[layer + 1]
        drawn = _of_layer(seed, layer)
        of_z, *of_norm = pull(pre[layer], *affine, drawn, of_h, norm, activation, *rest)
        of_weights.append(of_z.T @ (post[layer - 1] if layer else x))
        of_biases.append(of_z.sum(0))
        of_norms.append(of_norm)
    found = [
        of_weights[::-1],
        of_biases[::-1] if parameters[1] else [],
        *([one[i] for one in reversed(of_norms)] if parameters[2 + i] else [] for i in range(2)),
    ]
    of_packed = x.new_empty(0)
    if of_parameters_wanted:
        of_packed = _packed((found[0], found[1], found[2], found[3]))
    of_x = of_z @ weights[0] if of_x_wanted else x.new_empty((0, x.shape[1]))
    return of_x, of_packed.to(_parameters_dtype(parameters))


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *parameters, seed = inputs[:6]
    *ctx.options, ctx.implementation = (*inputs[6:11], inputs[12])
    ctx.counts = [len(kind) for kind in parameters]
    # Only the result is a function to differentiate; the others are for this op's own use.
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, seed, *output[1:], *chain(*parameters))


def _regrouped(flat: Sequence[Any], counts: Sequence[int]) -> Any:
    """The `Parameters` that ``chain(*parameters)`` makes ``flat`` of."""
    remaining = iter(flat)
    return tuple([next(remaining) for _ in range(count)] for count in counts)


def _forward_gradient(ctx: Any, of_y: Tensor, *_: Any) -> tuple[Any, ...]:
    x, seed, *kept = ctx.saved_tensors[:6]
    parameters = _regrouped(ctx.saved_tensors[6:], ctx.counts)
    of_x_wanted = bool(ctx.needs_input_grad[0])
    wanted = any(any(kind) for kind in ctx.needs_input_grad[1:5] if kind)
    of_x, of_packed = _backward_op(
        x, *parameters, seed, of_y, *kept, *ctx.options, of_x_wanted, wanted, ctx.implementation
    )
    of_parameters: Any = [[None] * count for count in ctx.counts]
    if wanted:
        of_parameters = _unpacked(of_packed, parameters)
    return (of_x if of_x_wanted else None, *of_parameters, *(None,) * 8)


_forward_op.register_autograd(_forward_gradient, setup_context=_setup_forward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *parameters, seed, of_y = inputs[:7]
    ctx.options = inputs[11:16]
    ctx.wanted = inputs[16:18]
    ctx.counts = [len(kind) for kind in parameters]
    ctx.save_for_backward(seed, x, of_y, *chain(*parameters))


def _second_gradient(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    """The derivative of the backward op, through the plain path."""
    seed, *leaves = ctx.saved_tensors
    options: Options = ctx.options

    def first(x: Tensor, of_y: Tensor, *flat: Tensor) -> list[Tensor]:
        parameters = _regrouped(flat, ctx.counts)
        y = _plain(x, parameters, seed, *options, None)
        of_x, *found = torch.autograd.grad(y, [x, *flat], of_y, create_graph=True)
        return [of_x, torch.cat([value.reshape(-1) for value in found])]

    given = [c if wanted else None for c, wanted in zip(cotangents, ctx.wanted, strict=True)]
    of_x, of_of_y, *flat = plain_vjp(first, leaves, given)
    return (of_x, *_regrouped(flat, ctx.counts), None, of_of_y, *(None,) * 12)


_backward_op.register_autograd(_second_gradient, setup_context=_setup_backward)


def _call(
    inputs: Mapping[str, Tensor], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor]:
    weights = [inputs["first_weight"], *inputs["hidden_weight"].unbind(), inputs["last_weight"]]
    biases = [*inputs["bias"].unbind(), inputs["last_bias"]]
    norms = inputs["norm_weight"].unbind(), inputs["norm_bias"].unbind()
    options: dict[str, Any] = {**flags, "implementation": implementation}
    return {"y": fused_mlp(inputs["x"], weights, biases, *norms, **options)}


BINDING = Binding(
    op=spec.NAME,
    framework="torch",
    implementations=("torch", "triton"),
    call=_call,
    differentiable=(
        "x",
        "first_weight",
        "hidden_weight",
        "last_weight",
        "bias",
        "last_bias",
        "norm_weight",
        "norm_bias",
    ),
    kernel_module="triton_kernel",
)
