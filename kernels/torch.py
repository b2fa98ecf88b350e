"""The ops for PyTorch."""

from __future__ import annotations

from .attention.torch_op import attention
from .binary_spherical_quantize.torch_op import BinarySphericalCodes, binary_spherical_quantize
from .conv_shuffle.torch_op import conv_shuffle
from .focal_frequency_loss.torch_op import focal_frequency_loss
from .fused_mlp.torch_op import fused_mlp
from .hyper_lora_linear.torch_op import hyper_lora_linear
from .linear_norm_activation.torch_op import linear_norm_activation
from .lora_linear.torch_op import lora_linear
from .neuron_level_model.torch_op import (
    neuron_level_model,
    neuron_level_model_trace_gradient,
    neuron_level_model_weight_gradient,
)
from .norm_activation.torch_op import norm_activation
from .norm_activation_shuffle.torch_op import norm_activation_shuffle
from .norm_silu_linear.torch_op import (
    linear_norm_silu_gradient,
    norm_silu_linear,
    norm_silu_linear_step,
)
from .norm_silu_skip_norm.torch_op import norm_silu_skip_norm
from .synchronisation.torch_op import synchronisation
from .synchronised_attention.torch_op import (
    Attended,
    AttendedGradient,
    synchronised_attention,
    synchronised_attention_gradient,
    synchronised_attention_key_gradient,
    synchronised_attention_tick,
)

__all__ = [
    "Attended",
    "AttendedGradient",
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
    "neuron_level_model_trace_gradient",
    "neuron_level_model_weight_gradient",
    "norm_activation",
    "norm_activation_shuffle",
    "norm_silu_linear",
    "norm_silu_linear_step",
    "norm_silu_skip_norm",
    "synchronisation",
    "synchronised_attention",
    "synchronised_attention_gradient",
    "synchronised_attention_key_gradient",
    "synchronised_attention_tick",
]
