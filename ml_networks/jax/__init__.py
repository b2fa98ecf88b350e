"""The JAX (Flax NNX) modules and functions. Each is imported from its file on first use.

Files, class names, configs and channels-first shapes are those of :mod:`ml_networks.torch`; a
module with parameters takes ``rngs=`` besides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ml_networks._lazy import lazy_names

if TYPE_CHECKING:
    from ml_networks.jax.activations import *
    from ml_networks.jax.attention import *
    from ml_networks.jax.base import *
    from ml_networks.jax.contrastive import *
    from ml_networks.jax.ctm import *
    from ml_networks.jax.data import *
    from ml_networks.jax.distributions import *
    from ml_networks.jax.hypernetworks import *
    from ml_networks.jax.inference import *
    from ml_networks.jax.layers import *
    from ml_networks.jax.lightning import *
    from ml_networks.jax.lora import *
    from ml_networks.jax.losses import *
    from ml_networks.jax.neurons import *
    from ml_networks.jax.synapses import *
    from ml_networks.jax.training import *
    from ml_networks.jax.unet import *
    from ml_networks.jax.utils import *
    from ml_networks.jax.vision import *
    from ml_networks.jax.vit import *

_MODULES: dict[str, tuple[str, ...]] = {
    "activations": (
        "Activation",
        "CRReLU",
        "L2Norm",
        "REReLU",
        "SiGLU",
        "SwiGLU",
        "TanhExp",
    ),
    "attention": ("Attention1d", "Attention2d"),
    "base": ("BaseModule",),
    "contrastive": ("ContrastiveLearningLoss",),
    "ctm": ("ContinuousThoughtMachine", "HyperContinuousThoughtMachine"),
    "ctm_backbones": (),
    "data": ("MinMaxNormalize", "SoftmaxTransformation", "numpy_collate"),
    "distributions": (
        "BSQCodebook",
        "BernoulliStoch",
        "CategoricalStoch",
        "Distribution",
        "NormalStoch",
        "StochState",
        "cat_dist",
        "get_dist",
        "stack_dist",
    ),
    "hypernetworks": ("HyperNet",),
    "inference": ("Fusion", "fuse_for_inference", "unfuse"),
    "layers": (
        "ConvNormActivation",
        "ConvNormActivation1d",
        "ConvTransposeNormActivation",
        "ConvTransposeNormActivation1d",
        "HorizonShuffle",
        "HorizonUnShuffle",
        "Identity",
        "LinearNormActivation",
        "MLPLayer",
        "PatchEmbed",
        "PositionalEncoding",
        "ResidualBlock",
        "SpatialSoftmax",
        "TransformerLayer",
        "get_norm",
    ),
    "lora": ("HyperLoRALinear", "LoRALinear"),
    "lightning": ("JaxLightningModule", "JaxModelCheckpoint", "JaxModelSummary", "JaxTrainer"),
    "losses": (
        "FocalFrequencyLoss",
        "binary_focal_loss",
        "charbonnier",
        "cross_entropy",
        "focal_loss",
        "kl_balancing",
        "kl_divergence",
        "soft_target_cross_entropy",
    ),
    "neurons": ("NeuronLevelModel", "SuperLinear"),
    "rngs": ("as_rngs",),
    "positions": (),
    "synapses": ("HyperSynapseUNET", "SynapseUNET"),
    "training": (
        "TrainState",
        "eval_step",
        "restore_checkpoint",
        "save_checkpoint",
        "train_step",
        "update_model",
    ),
    "unet": ("ConditionalUnet1d", "ConditionalUnet2d"),
    "utils": (
        "count_nnx_params",
        "get_optimizer",
        "gumbel_softmax",
        "jax_fix_seed",
        "log_softmax",
        "softmax",
    ),
    "vision": (
        "ConvNet",
        "ConvTranspose",
        "Decoder",
        "Encoder",
        "ResNetPixShuffle",
        "ResNetPixUnshuffle",
    ),
    "vit": ("ViT",),
}
__all__, __getattr__, __dir__ = lazy_names(__name__, _MODULES, "jax")
