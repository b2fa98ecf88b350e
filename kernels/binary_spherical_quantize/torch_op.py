"""Binary spherical quantization for torch: the public function, the plain path, the custom ops.

The custom ops work on rows (tokens, width) and return the average distribution of each block; its
entropy is taken outside, by plain torch, so that autograd needs no rule for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import dispatch, usage
from ..core.device import torch_device
from ..core.problem import Problem
from ..core.registry import Binding
from . import spec

Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""quantized, indices, sample entropy, average distribution, 1 / norm."""


class BinarySphericalCodes(NamedTuple):
    """What `binary_spherical_quantize` returns.

    With ``groups`` above 1, ``indices`` and both entropies have a last axis of that length.
    """

    quantized: Tensor
    """(..., D), in the dtype of the features: +-1 / sqrt(D / groups)."""
    indices: Tensor
    """(...), int64: the signs as bits, the first feature the most significant."""
    sample_entropy: Tensor | None
    """(...), nats: how undecided each code is. None unless asked for."""
    codebook_entropy: Tensor | None
    """(), nats: how evenly all tokens together use the codes. None unless asked for."""


def binary_spherical_quantize(
    features: Tensor,
    *,
    temperature: float = 1.0,
    groups: int = 1,
    entropy_bits: int | None = None,
    implementation: str | None = None,
) -> BinarySphericalCodes:
    r"""Quantize each vector to the nearest corner of the cube in the unit sphere.

    With :math:`x` one vector of :math:`D` features (of :math:`D` / ``groups``, if there are more
    groups) and :math:`\tau` the temperature:

    .. math::

        z = \frac{x}{\lVert x \rVert}, \qquad
        \hat z_d = \frac{\operatorname{sign} z_d}{\sqrt D}, \qquad
        \frac{\partial \hat z}{\partial z} := I, \qquad
        p_d = \sigma\!\left(\frac{4 \tau z_d}{\sqrt D}\right)

    :math:`p` are the bits of :math:`\operatorname{softmax}_c(-\tau \lVert z - c \rVert^2)` over
    all :math:`2^D` corners :math:`c`: that distribution is a product of :math:`D` coins, so
    nothing of size :math:`2^D` is ever made.

    The sample entropy is exactly :math:`\sum_d H(p_d)`. The codebook entropy is that of the
    distribution averaged over all tokens, kept jointly for blocks of ``entropy_bits`` consecutive
    bits and summed over blocks: with ``entropy_bits = D`` it is exactly the entropy of the average
    over all :math:`2^D` codes, with 1 the sum over bits of :math:`H(\operatorname{mean} p_d)`, its
    upper bound, which takes any :math:`D`. Smaller blocks never give a smaller value.

    Parameters
    ----------
    features
        Shape (..., D), any strides; float32, bfloat16, float16 or float64.
    temperature
        The paper's factor :math:`\tau`: larger is more certain. It matters to entropies alone.
    groups
        Splits the last axis into that many vectors of D / groups features, each normalised by
        itself, with an index and entropies of its own.
    entropy_bits
        Ask for the entropies, with this block size for the codebook entropy: a divisor of
        D / groups, at most 20. None: both entropies are None.
    implementation
        ``"torch"``, ``"triton"``, or None to let dispatch choose.

    Returns
    -------
    BinarySphericalCodes
        ``(quantized, indices, sample_entropy, codebook_entropy)``. Entropies are float32 (float64
        for float64 features) and differentiable.

    Raises
    ------
    TypeError
        If ``features`` is not a floating-point tensor.
    ValueError
        If ``groups`` does not divide D, a code has more than 63 bits, ``entropy_bits`` does not
        divide D / groups, or ``temperature`` is not positive.
    UnsupportedImplementationError
        If the implementation asked for cannot run here.

    Notes
    -----
    A feature of exactly 0 (or -0) counts as positive. A vector whose norm is at most 1e-12 is a
    zero vector: z = 0, all its coins are fair, its gradient is 0; its code is that of its signs.
    NaN in a vector makes its quantized features and entropies NaN; the bit of a NaN is 0. With
    no tokens at all the codebook entropy is 0.

    Zhao, Xiong, Krähenbühl, "Image and Video Tokenization with Binary Spherical Quantization",
    arXiv 2406.07548, whose exponent :math:`\tau z \cdot c` is half the one here; the factor is
    that of its published code and of ``vector-quantize-pytorch`` (``inv_temperature``).
    """
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = getattr(features, "dtype", type(features).__name__)
        raise TypeError(f"features must be a floating-point tensor, got {got}")
    if features.ndim == 0:
        raise ValueError("features has no axis to quantize over; it needs at least one")
    width = features.shape[-1]
    spec.check_arguments(width, temperature, groups, entropy_bits)
    rows = features.reshape(features.shape[:-1].numel(), width)
    block = entropy_bits or 0
    quantized, indices, sample_entropy, average, _ = _run(
        rows, temperature, groups, block, implementation
    )
    leading = features.shape[:-1]
    codes = (*leading, groups) if groups > 1 else leading
    result = quantized.reshape(features.shape), indices.reshape(codes)
    if not block:
        return BinarySphericalCodes(*result, None, None)
    smallest = torch.finfo(average.dtype).tiny
    codebook_entropy = -(average * average.clamp(min=smallest).log()).sum((-2, -1))
    return BinarySphericalCodes(
        *result,
        sample_entropy.reshape(codes),
        codebook_entropy if groups > 1 else codebook_entropy.squeeze(0),
    )


def _run(
    rows: Tensor, temperature: float, groups: int, block: int, implementation: str | None
) -> Rows:
    on_cpu = rows.device.type == "cpu"
    if torch.compiler.is_compiling():
        # The custom op decides at run time: a new shape then changes no traced code.
        if implementation == "torch" or (on_cpu and implementation is None):
            return _plain(rows, temperature, groups, block)
        return _forward_op(rows, temperature, groups, block, implementation)
    if on_cpu and not usage.recording() and not dispatch.is_overridden(BINDING, implementation):
        return _plain(rows, temperature, groups, block)
    decision = _decide(rows, groups, block, "forward", implementation)
    if decision.implementation == "torch":
        with usage.timed(decision):
            return _plain(rows, temperature, groups, block)
    return _forward_op(rows, temperature, groups, block, implementation)


def _decide(
    rows: Tensor, groups: int, block: int, direction: str, implementation: str | None
) -> dispatch.Decision:
    problem = Problem(
        spec.NAME,
        (("tokens", rows.shape[0]), ("width", rows.shape[1])),
        str(rows.dtype).removeprefix("torch."),
        (("groups", groups), ("entropy_bits", block)),
        direction,
    )
    return dispatch.decide(problem, torch_device(rows.device), BINDING, implementation)


class _CoinEntropy(torch.autograd.Function):
    """Entropy of a coin from its logit, in nats. The derivative -logit p q is written down:
    differentiating the stable formula term by term cancels all digits near logit 0."""

    @staticmethod
    def forward(ctx: Any, logit: Tensor) -> Tensor:
        ctx.save_for_backward(logit)
        size = logit.abs()
        return torch.log1p(torch.exp(-size)) + size * torch.sigmoid(-size)

    @staticmethod
    def backward(ctx: Any, of_entropy: Tensor) -> Tensor:
        (logit,) = ctx.saved_tensors
        return -of_entropy * logit * torch.sigmoid(logit) * torch.sigmoid(-logit)


def _normalized(rows: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The codes x (tokens, groups, bits) in the dtype of the computation, z, and 1 / |x|."""
    x = rows.unflatten(1, (groups, rows.shape[1] // groups))
    x = x if x.dtype == torch.float64 else x.float()
    squared = (x * x).sum(-1, keepdim=True)
    is_zero = squared <= spec.SMALLEST_NORM**2
    inverse_norm = torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squared).rsqrt())
    return x, x * inverse_norm, inverse_norm


def _slope(bits: int, temperature: float) -> float:
    return 4.0 * temperature / bits**0.5


def _product(coins: Tensor) -> Tensor:
    """The joint distribution of independent coins (..., bits, 2): (..., 2 ** bits)."""
    table = coins[..., 0, :]
    for bit in range(1, coins.shape[-2]):
        table = (table.unsqueeze(-1) * coins[..., bit, :].unsqueeze(-2)).flatten(-2)
    return table


def _half_codes(logit: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Distributions of both halves of each block, (tokens, groups, blocks, 2 ** half)."""
    coins = torch.stack((torch.sigmoid(-logit), torch.sigmoid(logit)), -1)
    coins = coins.unflatten(2, (logit.shape[-1] // block, block))
    return _product(coins[..., : block // 2, :]), _product(coins[..., block // 2 :, :])


def _average(logit: Tensor, block: int) -> Tensor:
    """The average distribution of each block over the tokens: (groups, blocks, 2 ** block)."""
    tokens = max(logit.shape[0], 1)
    if block == 1:
        coins = torch.stack((torch.sigmoid(-logit), torch.sigmoid(logit)), -1)
        return coins.sum(0) / tokens
    left, right = _half_codes(logit, block)
    return torch.einsum("ngbi,ngbj->gbij", left, right).flatten(-2) / tokens


def _plain(rows: Tensor, temperature: float, groups: int, block: int) -> Rows:
    """The op in ordinary torch operations, differentiable any number of times."""
    with torch.autocast(rows.device.type, enabled=False):
        x, z, inverse_norm = _normalized(rows, groups)
        bits = x.shape[-1]
        positive = x >= 0
        magnitude = x.new_full((), bits**-0.5)
        code = torch.where(positive, magnitude, -magnitude)
        # z - z is 0 with the gradient of z, and NaN where z is.
        quantized = (code + (z - z.detach())).to(rows.dtype).flatten(1)
        shift = torch.arange(bits - 1, -1, -1, device=rows.device)
        indices = (positive.long() << shift).sum(-1)
        if not block:
            empty = x.new_empty(0)
            return quantized, indices, empty, empty.clone(), empty.clone()
        logit = _slope(bits, temperature) * z
        sample_entropy = _CoinEntropy.apply(logit).sum(-1)
        norms = inverse_norm.squeeze(-1) if block > 1 else x.new_empty(0)
        return quantized, indices, sample_entropy, _average(logit, block), norms


def _plain_gradient(
    rows: Tensor,
    of_quantized: Tensor | None,
    of_sample_entropy: Tensor | None,
    of_average: Tensor | None,
    temperature: float,
    groups: int,
    block: int,
) -> Tensor:
    """The gradient of the rows in ordinary torch operations: the backward op's plain path, and
    the function that its own derivative is taken of."""
    with torch.autocast(rows.device.type, enabled=False):
        x, z, inverse_norm = _normalized(rows, groups)
        tokens, bits = max(x.shape[0], 1), x.shape[-1]
        of_z = torch.zeros_like(x)
        if of_quantized is not None:
            of_z = of_z + of_quantized.unflatten(1, (groups, bits)).to(x.dtype)
        slope = _slope(bits, temperature)
        logit = slope * z
        p, q = torch.sigmoid(logit), torch.sigmoid(-logit)
        if of_sample_entropy is not None:
            of_z = of_z - slope * of_sample_entropy.unsqueeze(-1) * logit * p * q
        if of_average is not None and block == 1:
            of_z = of_z + slope * p * q * (of_average[..., 1] - of_average[..., 0]) / tokens
        elif of_average is not None:
            left, right = _half_codes(logit, block)
            table = of_average.unflatten(-1, (left.shape[-1], right.shape[-1])) / tokens
            of_left = left * torch.einsum("gbij,ngbj->ngbi", table, right)
            of_right = right * torch.einsum("gbij,ngbi->ngbj", table, left)
            of_one = torch.cat((_sum_where_one(of_left), _sum_where_one(of_right)), -1)
            of_zero = torch.cat(
                (_sum_where_one(of_left.flip(-1)), _sum_where_one(of_right.flip(-1))), -1
            )
            # Both sums carry their own p or q: no cancellation when a bit is all but certain.
            of_z = of_z + slope * (q * of_one.flatten(2) - p * of_zero.flatten(2))
        radial = (of_z * z).sum(-1, keepdim=True)
        return ((of_z - radial * z) * inverse_norm).flatten(1).to(rows.dtype)


def _sum_where_one(table: Tensor) -> Tensor:
    """For each bit of the last axis' index, the sum over the values where it is one."""
    bits = table.shape[-1].bit_length() - 1
    value = torch.arange(table.shape[-1], device=table.device)
    is_one = (value.unsqueeze(-1) >> torch.arange(bits - 1, -1, -1, device=table.device)) & 1
    return table @ is_one.to(table.dtype)


@torch.library.custom_op("ml_networks::binary_spherical_quantize", mutates_args=())
def _forward_op(
    rows: Tensor, temperature: float, groups: int, block: int, implementation: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    decision = _decide(rows, groups, block, "forward", implementation)
    with usage.timed(decision):
        if decision.implementation == "torch" or rows.shape[0] == 0:
            return _plain(rows, temperature, groups, block)
        from . import triton_kernel

        device = torch_device(rows.device)
        return triton_kernel.forward(rows, temperature, groups, block, decision.config, device)


@_forward_op.register_fake
def _(
    rows: Tensor, temperature: float, groups: int, block: int, implementation: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, width = rows.shape
    exact = torch.float64 if rows.dtype == torch.float64 else torch.float32

    def empty(*shape: int) -> Tensor:
        return rows.new_empty(shape, dtype=exact)

    return (
        rows.new_empty((tokens, width)),
        rows.new_empty((tokens, groups), dtype=torch.int64),
        empty(tokens, groups) if block else empty(0),
        empty(groups, width // groups // block, 1 << block) if block else empty(0),
        empty(tokens, groups) if block > 1 else empty(0),
    )


@torch.library.custom_op("ml_networks::binary_spherical_quantize_backward", mutates_args=())
def _backward_op(
    rows: Tensor,
    inverse_norms: Tensor,
    of_quantized: Tensor | None,
    of_sample_entropy: Tensor | None,
    of_average: Tensor | None,
    temperature: float,
    groups: int,
    block: int,
    implementation: str | None,
) -> Tensor:
    decision = _decide(rows, groups, block, "backward", implementation)
    cotangents = (of_quantized, of_sample_entropy, of_average)
    with usage.timed(decision):
        if decision.implementation == "torch" or rows.shape[0] == 0:
            return _plain_gradient(rows, *cotangents, temperature, groups, block)
        from . import triton_kernel

        config, device = decision.config, torch_device(rows.device)
        return triton_kernel.backward(
            rows, inverse_norms, *cotangents, temperature, groups, block, config, device
        )


@_backward_op.register_fake
def _(rows: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(tuple(rows.shape))


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Rows) -> None:
    rows, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1], output[4])
    ctx.save_for_backward(rows, output[4])


def _forward_gradient(
    ctx: Any,
    of_quantized: Tensor | None,
    of_indices: None,
    of_sample_entropy: Tensor | None,
    of_average: Tensor | None,
    of_norms: None,
) -> tuple[Tensor, None, None, None, None]:
    rows, inverse_norms = ctx.saved_tensors
    if not ctx.options[2]:
        of_sample_entropy = of_average = None
    gradient = _backward_op(
        rows, inverse_norms, of_quantized, of_sample_entropy, of_average, *ctx.options
    )
    return gradient, None, None, None, None


_forward_op.register_autograd(_forward_gradient, setup_context=_setup_forward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, _, *cotangents = inputs[:5]
    ctx.options = inputs[5:8]
    ctx.save_for_backward(rows, *cotangents)


def _second_gradient(ctx: Any, of_gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The derivative of the backward op, through the plain path."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs: list[Any] = [_leaf(value) for value in ctx.saved_tensors]
        gradient = _plain_gradient(*inputs, *ctx.options)
        of_rows, *of_cotangents = torch.autograd.grad(
            gradient,
            [value for value in inputs if value is not None],
            of_gradient,
            create_graph=create_graph,
        )
    remaining = iter(of_cotangents)
    found = [None if value is None else next(remaining) for value in inputs[1:]]
    return of_rows, None, *found, None, None, None, None


def _leaf(value: Tensor | None) -> Tensor | None:
    """A tensor to differentiate by; one that is part of a graph already stays so, as a view: no
    path leads from one such tensor to another."""
    if value is None:
        return None
    return value.view_as(value) if value.requires_grad else value.detach().requires_grad_()


_backward_op.register_autograd(_second_gradient, setup_context=_setup_backward)


def _call(
    inputs: Mapping[str, Tensor], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Tensor]:
    options = {**flags, "entropy_bits": flags.get("entropy_bits") or None}
    codes = binary_spherical_quantize(inputs["features"], **options, implementation=implementation)
    return {name: value for name, value in codes._asdict().items() if value is not None}


BINDING = Binding(
    op=spec.NAME,
    framework="torch",
    implementations=("torch", "triton"),
    call=_call,
    differentiable=("features",),
    kernel_module="triton_kernel",
)
