"""Binary spherical quantization in NumPy float64: the meaning of the op.

With one code x of ``bits`` features, tau the temperature and c = 4 tau / sqrt(bits):

    z = x / |x|                       (0 where |x| <= 1e-12)
    quantized_d = +-1 / sqrt(bits)    (+ where x_d >= 0); its gradient is that of z_d
    p_d = sigmoid(c z_d)              probability of bit d in softmax_v(2 tau z . v) over all
                                      corners v of the cube {+-1 / sqrt(bits)} ** bits
    sample entropy = sum_d H(p_d),    H(p) = -p log p - (1 - p) log(1 - p)
    codebook entropy = sum over blocks of `entropy_bits` bits of -sum_k P_k log P_k,
                       P = mean over tokens of the product of the block's p_d or 1 - p_d

Everything here is spelled out over all ``2 ** entropy_bits`` values of a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.problem import Case
from .spec import SMALLEST_NORM

Array = NDArray[Any]


def make_inputs(case: Case, seed: int = 0) -> dict[str, Array]:
    """Features on a spread of scales, with ties at zero and one zero vector."""
    generator = np.random.default_rng(seed)
    tokens, width = case.dims["tokens"], case.dims["width"]
    features = generator.standard_normal((tokens, width))
    features *= np.exp(generator.uniform(-2.0, 2.0, (tokens, 1)))
    features[generator.random((tokens, width)) < 0.02] = 0.0
    if tokens:
        features[tokens // 2] = 0.0
    return {"features": features}


def _bits_of_codes(bits: int) -> Array:
    """All codes of ``bits`` bits, the first bit the most significant: (2 ** bits, bits)."""
    return (np.arange(1 << bits)[:, None] >> np.arange(bits - 1, -1, -1)) & 1


def _parts(
    features: Array, temperature: float, groups: int
) -> tuple[Array, Array, Array, Array, float]:
    """Codes x, 1 / |x| (0 for a zero vector), z, the probability p of each bit, and c."""
    x = features.astype(np.float64).reshape(*features.shape[:-1], groups, -1)
    norm = np.sqrt((x * x).sum(-1, keepdims=True))
    inverse_norm = np.where(norm <= SMALLEST_NORM, 0.0, 1.0 / np.maximum(norm, SMALLEST_NORM))
    z = x * inverse_norm
    slope = 4.0 * temperature / np.sqrt(x.shape[-1])
    probability = 1.0 / (1.0 + np.exp(-slope * z))
    return x, inverse_norm, z, probability, slope


def _block_probabilities(probability: Array, entropy_bits: int) -> tuple[Array, Array]:
    """The coins as (tokens, groups, blocks, entropy_bits), and the probability of each value of
    the block, (tokens, groups, blocks, 2 ** entropy_bits)."""
    groups, bits = probability.shape[-2:]
    p = probability.reshape(-1, groups, bits // entropy_bits, 1, entropy_bits)
    codes = _bits_of_codes(entropy_bits)
    return p[..., 0, :], np.where(codes == 1, p, 1.0 - p).prod(-1)


def forward(
    inputs: dict[str, Array],
    *,
    temperature: float = 1.0,
    groups: int = 1,
    entropy_bits: int = 0,
) -> dict[str, Array]:
    """``quantized``, ``indices`` and, unless ``entropy_bits`` is 0, both entropies."""
    features = inputs["features"]
    x, _, _, probability, slope = _parts(features, temperature, groups)
    bits = x.shape[-1]
    code = x >= 0
    weights = np.int64(1) << np.arange(bits - 1, -1, -1, dtype=np.int64)
    shape = (*features.shape[:-1], groups) if groups > 1 else features.shape[:-1]
    results = {
        "quantized": (np.where(code, 1.0, -1.0) / np.sqrt(bits)).reshape(features.shape),
        "indices": (code * weights).sum(-1).reshape(shape),
    }
    if entropy_bits:
        p, q = probability, 1.0 / (1.0 + np.exp(slope * _parts(features, 1.0, groups)[2]))
        results["sample_entropy"] = -(p * np.log(p) + q * np.log(q)).sum(-1).reshape(shape)
        values = _block_probabilities(probability, entropy_bits)[1]
        average = values.sum(0) / max(values.shape[0], 1)
        logarithm = np.log(np.where(average > 0, average, 1.0))
        entropy = -(average * logarithm).sum((-2, -1))
        results["codebook_entropy"] = entropy if groups > 1 else entropy[0]
    return results


def backward(
    inputs: dict[str, Array],
    cotangents: dict[str, Array],
    *,
    temperature: float = 1.0,
    groups: int = 1,
    entropy_bits: int = 0,
) -> dict[str, Array]:
    """The gradient of the features for cotangents of ``quantized`` and the entropies."""
    features = inputs["features"]
    x, inverse_norm, z, p, slope = _parts(features, temperature, groups)
    gradient_z = np.asarray(cotangents["quantized"], np.float64).reshape(x.shape).copy()
    if entropy_bits:
        of_sample = np.asarray(cotangents["sample_entropy"], np.float64)
        of_codebook = np.asarray(cotangents["codebook_entropy"], np.float64)
        # dH / d(slope z) = -slope z p (1 - p)
        logit_gradient = -of_sample.reshape(*x.shape[:-1], 1) * slope * z * p * (1.0 - p)
        p_block, values = _block_probabilities(p, entropy_bits)
        average = values.sum(0) / max(values.shape[0], 1)
        table = -np.log(np.where(average > 0, average, 1.0)) - 1.0
        table *= of_codebook.reshape(groups, 1, 1) / max(values.shape[0], 1)
        # d(product) / d(logit of bit j) = product * (bit_j - p_j)
        codes = _bits_of_codes(entropy_bits)
        weighted = values * table
        of_logits = weighted @ codes - weighted.sum(-1, keepdims=True) * p_block
        logit_gradient += of_logits.reshape(x.shape)
        gradient_z += slope * logit_gradient
    radial = (gradient_z * z).sum(-1, keepdims=True)
    return {"features": ((gradient_z - radial * z) * inverse_norm).reshape(features.shape)}
