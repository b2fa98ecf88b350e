"""Binary spherical quantization for JAX: the public function, the plain path, the derivatives."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..core import dispatch, usage
from ..core.device import jax_device
from ..core.problem import Problem
from ..core.registry import Binding
from . import pallas_kernel, spec
from .pallas_kernel import LOW_BITS


class Options(NamedTuple):
    """What a call fixes beside its array: hashable, so it can be static."""

    temperature: float
    groups: int
    block: int
    implementation: str | None


class BinarySphericalCodes(NamedTuple):
    """What `binary_spherical_quantize` returns.

    With ``groups`` above 1, ``indices`` and both entropies have a last axis of that length.
    """

    quantized: Array
    """(..., D), in the dtype of the features: +-1 / sqrt(D / groups)."""
    indices: Array
    """(...): the signs as bits, the first feature the most significant. int64 where
    ``jax_enable_x64`` is set, otherwise int32; codes of more than 31 bits then are two uint32
    words on a new last axis, the high one first."""
    sample_entropy: Array | None
    """(...), nats: how undecided each code is. None unless asked for."""
    codebook_entropy: Array | None
    """(), nats: how evenly all tokens together use the codes. None unless asked for."""


def binary_spherical_quantize(
    features: Array,
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
        Shape (..., D); float32, bfloat16, float16 or float64.
    temperature
        The paper's factor :math:`\tau`, a Python number: larger is more certain. It matters to
        entropies alone.
    groups
        Splits the last axis into that many vectors of D / groups features, each normalised by
        itself, with an index and entropies of its own.
    entropy_bits
        Ask for the entropies, with this block size for the codebook entropy: a divisor of
        D / groups, at most 20. None: both entropies are None.
    implementation
        ``"xla"``, ``"pallas"``, or None to let dispatch choose.

    Returns
    -------
    BinarySphericalCodes
        ``(quantized, indices, sample_entropy, codebook_entropy)``. Entropies are float32 (float64
        for float64 features) and differentiable.

    Raises
    ------
    TypeError
        If ``features`` is not a floating-point array.
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
    features = jnp.asarray(features)
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise TypeError(f"features must be a floating-point array, got {features.dtype}")
    if features.ndim == 0:
        raise ValueError("features has no axis to quantize over; it needs at least one")
    *leading, width = features.shape
    spec.check_arguments(width, temperature, groups, entropy_bits)
    options = Options(float(temperature), groups, entropy_bits or 0, implementation)
    rows = features.reshape(-1 if features.size else 0, width // groups)
    decision = _decide(rows, options, "forward")
    with usage.timed(decision):
        if decision.implementation == "xla" or not rows.size:
            results = _plain(rows, options)
        else:
            results = _fused(rows, options)
    quantized, words, sample_entropy, average = results
    codes = (*leading, groups) if groups > 1 else tuple(leading)
    indices = _indices(words, rows.shape[1])
    indices = indices.reshape(*codes, *indices.shape[1:])
    quantized = quantized.reshape(features.shape)
    if sample_entropy is None or average is None:
        return BinarySphericalCodes(quantized, indices, None, None)
    smallest = jnp.finfo(average.dtype).tiny
    codebook_entropy = -(average * jnp.log(jnp.maximum(average, smallest))).sum((-2, -1))
    return BinarySphericalCodes(
        quantized,
        indices,
        sample_entropy.reshape(codes),
        codebook_entropy if groups > 1 else codebook_entropy[0],
    )


Rows = tuple[Array, tuple[Array, Array], Array | None, Array | None]
"""quantized, low and high word of the indices (int32), sample entropy, average distribution."""


def _decide(rows: Array, options: Options, direction: str) -> dispatch.Decision:
    tokens, width = rows.shape[0] // options.groups, rows.shape[1] * options.groups
    problem = Problem(
        spec.NAME,
        (("tokens", tokens), ("width", width)),
        rows.dtype.name,
        (("groups", options.groups), ("entropy_bits", options.block)),
        direction,
    )
    return dispatch.decide(problem, jax_device(), BINDING, options.implementation)


def _indices(words: tuple[Array, Array], bits: int) -> Array:
    """The indices from their words: (codes,), or (codes, 2) where no integer holds them whole."""
    low, high = words
    unsigned = [jax.lax.bitcast_convert_type(word, jnp.uint32) for word in (high, low)]
    if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        whole = [word.astype(jnp.int64) for word in unsigned]
        return (whole[0] << LOW_BITS) | whole[1]
    return jnp.stack(unsigned, -1) if bits > 31 else low


@jax.custom_jvp
def _coin_entropy(logit: Array) -> Array:
    """Entropy of a coin from its logit, in nats. The derivative -logit p q is written down:
    differentiating the stable formula term by term cancels all digits near logit 0."""
    size = jnp.abs(logit)
    return jnp.log1p(jnp.exp(-size)) + size * jax.nn.sigmoid(-size)


@_coin_entropy.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (logit,), (tangent,) = primals, tangents
    slope = -logit * jax.nn.sigmoid(logit) * jax.nn.sigmoid(-logit)
    return _coin_entropy(logit), slope * tangent


def _slope(bits: int, temperature: float) -> float:
    return 4.0 * temperature / bits**0.5


def _logit(z: Array, options: Options) -> Array:
    return _slope(z.shape[-1], options.temperature) * z


def _normalized(rows: Array) -> tuple[Array, Array]:
    """The codes x in the dtype of the computation, and z."""
    x = rows if rows.dtype == jnp.float64 else rows.astype(jnp.float32)
    squared = (x * x).sum(-1, keepdims=True)
    is_zero = squared <= spec.SMALLEST_NORM**2
    return x, x * jnp.where(is_zero, 0.0, jax.lax.rsqrt(jnp.where(is_zero, 1.0, squared)))


def _product(coins: Array) -> Array:
    """The joint distribution of independent coins (..., bits, 2): (..., 2 ** bits)."""
    table = coins[..., 0, :]
    for bit in range(1, coins.shape[-2]):
        table = (table[..., :, None] * coins[..., bit, None, :]).reshape(*table.shape[:-1], -1)
    return table


def _average(logit: Array, options: Options) -> Array:
    """The average distribution of each block over the tokens: (groups, blocks, 2 ** block)."""
    _, groups, block, _ = options
    tokens = max(logit.shape[0] // groups, 1)
    coins = jnp.stack((jax.nn.sigmoid(-logit), jax.nn.sigmoid(logit)), -1)
    coins = coins.reshape(logit.shape[0] // groups, groups, logit.shape[1] // block, block, 2)
    if block == 1:
        return coins[..., 0, :].sum(0) / tokens
    left, right = _product(coins[..., : block // 2, :]), _product(coins[..., block // 2 :, :])
    tables = jnp.einsum("ngbi,ngbj->gbij", left, right, precision=_full_precision()) / tokens
    return tables.reshape(groups, -1, 1 << block)


def _full_precision() -> Any:
    """IEEE float32 unless the user set a matmul precision: unset, XLA would allow TF32."""
    set_by_user = jax.config.jax_default_matmul_precision is not None  # type: ignore[attr-defined]
    return None if set_by_user else jax.lax.Precision.HIGHEST


def _plain_floats(rows: Array, options: Options) -> tuple[Array, Array | None, Array | None]:
    x, z = _normalized(rows)
    bits = rows.shape[1]
    code = jnp.where(x >= 0, bits**-0.5, -(bits**-0.5)).astype(x.dtype)
    # z - z is 0 with the gradient of z, and NaN where z is.
    quantized = (code + (z - jax.lax.stop_gradient(z))).astype(rows.dtype)
    if not options.block:
        return quantized, None, None
    logit = _logit(z, options)
    return quantized, _coin_entropy(logit).sum(-1), _average(logit, options)


@partial(jax.jit, static_argnames="options")
def _plain(rows: Array, options: Options) -> Rows:
    """The op in ordinary JAX operations, differentiable any number of times."""
    quantized, sample_entropy, average = _plain_floats(rows, options)
    shift = np.arange(rows.shape[1] - 1, -1, -1)
    bit = rows >= 0

    def word(first: int) -> Array:
        inside = (shift >= first) & (shift < first + LOW_BITS)
        value = np.where(inside, 1 << np.clip(shift - first, 0, LOW_BITS - 1), 0)
        total = jnp.where(bit, jnp.asarray(value.astype(np.uint32)), jnp.uint32(0))
        return jax.lax.bitcast_convert_type(total.sum(-1, dtype=jnp.uint32), jnp.int32)

    return quantized, (word(0), word(LOW_BITS)), sample_entropy, average


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _fused(rows: Array, options: Options) -> Rows:
    decision = _decide(rows, options, "forward")
    slope = _slope(rows.shape[1], options.temperature)
    quantized, low, high, sample_entropy, sums = pallas_kernel.forward(
        rows,
        slope=slope,
        groups=options.groups,
        entropies=options.block > 0,
        config=decision.config,
        device=jax_device(),
    )
    average = None if sums is None else sums / (rows.shape[0] // options.groups)
    return quantized, (low, high), sample_entropy, average


def _fused_forward(rows: Array, options: Options) -> tuple[Rows, Array]:
    return _fused(rows, options), rows


Cotangents = tuple[Array, Array | None, Array | None]


def _fused_backward(options: Options, rows: Array, cotangents: Any) -> tuple[Array]:
    of_quantized, _, of_sample_entropy, of_average = cotangents
    return (_gradient(rows, (of_quantized, of_sample_entropy, of_average), options),)


_fused.defvjp(_fused_forward, _fused_backward)


@partial(jax.jit, static_argnames="options")
def _plain_gradient(rows: Array, cotangents: Cotangents, options: Options) -> Array:
    return jax.vjp(partial(_plain_floats, options=options), rows)[1](cotangents)[0]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gradient(rows: Array, cotangents: Cotangents, options: Options) -> Array:
    """The gradient of the rows; its own derivative goes through the plain path."""
    decision = _decide(rows, options, "backward")
    with usage.timed(decision):
        if decision.implementation == "xla":
            return _plain_gradient(rows, cotangents, options)
        of_quantized, of_sample_entropy, of_average = cotangents
        tokens = rows.shape[0] // options.groups
        of_sums = None if of_average is None else of_average / tokens
        slope = _slope(rows.shape[1], options.temperature)
        return pallas_kernel.backward(
            rows,
            of_quantized,
            of_sample_entropy,
            of_sums,
            slope=slope,
            groups=options.groups,
            config=decision.config,
            device=jax_device(),
        )


def _gradient_forward(
    rows: Array, cotangents: Cotangents, options: Options
) -> tuple[Array, tuple[Array, Cotangents]]:
    return _gradient(rows, cotangents, options), (rows, cotangents)


def _gradient_backward(
    options: Options, residuals: tuple[Array, Cotangents], of_gradient: Array
) -> tuple[Array, Cotangents]:
    return jax.vjp(partial(_plain_gradient, options=options), *residuals)[1](of_gradient)


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _call(
    inputs: Mapping[str, Array], flags: Mapping[str, Any], implementation: str | None
) -> dict[str, Any]:
    options = {**flags, "entropy_bits": flags.get("entropy_bits") or None}
    codes = binary_spherical_quantize(
        jnp.asarray(inputs["features"]), **options, implementation=implementation
    )
    results: dict[str, Any] = {k: v for k, v in codes._asdict().items() if v is not None}
    indices = codes.indices
    if indices.dtype == jnp.uint32 and not isinstance(indices, jax.core.Tracer):
        high, low = np.moveaxis(np.asarray(indices).astype(np.int64), -1, 0)
        results["indices"] = high << LOW_BITS | low
    return results


BINDING = Binding(
    op=spec.NAME,
    framework="jax",
    implementations=("xla", "pallas"),
    call=_call,
    differentiable=("features",),
    kernel_module="pallas_kernel",
)
