"""The ops for JAX."""

from __future__ import annotations

from .attention.jax_op import attention
from .binary_spherical_quantize.jax_op import BinarySphericalCodes, binary_spherical_quantize
from .conv_shuffle.jax_op import conv_shuffle
from .focal_frequency_loss.jax_op import focal_frequency_loss
from .fused_mlp.jax_op import fused_mlp
from .hyper_lora_linear.jax_op import hyper_lora_linear
from .linear_norm_activation.jax_op import linear_norm_activation
from .lora_linear.jax_op import lora_linear
from .neuron_level_model.jax_op import (
    neuron_level_model,
    neuron_level_model_at_tick,
    neuron_level_model_trace_gradient,
    neuron_level_model_weight_gradient,
)
from .norm_activation.jax_op import norm_activation
from .norm_activation_shuffle.jax_op import norm_activation_shuffle
from .norm_silu_linear.jax_op import linear_norm_silu_gradient, norm_silu_linear
from .norm_silu_skip_norm.jax_op import norm_silu_skip_norm
from .synchronisation.jax_op import synchronisation
from .synchronised_attention.jax_op import synchronised_attention

__all__ = [
    "BinarySphericalCodes",
    "attention",
    "binary_spherical_quantize",
    "conv_shuffle",
    "focal_frequency_loss",
    "fused_mlp",
    "hyper_lora_linear",
    "linear_norm_activation",
    "linear_norm_silu_gradient",
    "lora_linear",
    "neuron_level_model",
    "neuron_level_model_at_tick",
    "neuron_level_model_trace_gradient",
    "neuron_level_model_weight_gradient",
    "norm_activation",
    "norm_activation_shuffle",
    "norm_silu_linear",
    "norm_silu_skip_norm",
    "synchronisation",
    "synchronised_attention",
]
