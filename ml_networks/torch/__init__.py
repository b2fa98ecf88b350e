"""The PyTorch modules and functions. Each is imported from its file on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ml_networks._lazy import lazy_names

if TYPE_CHECKING:
    from ml_networks.torch.activations import *
    from ml_networks.torch.attention import *
    from ml_networks.torch.base import *
    from ml_networks.torch.contrastive import *
    from ml_networks.torch.ctm import *
    from ml_networks.torch.data import *
    from ml_networks.torch.distributions import *
    from ml_networks.torch.hypernetworks import *
    from ml_networks.torch.inference import *
    from ml_networks.torch.layers import *
    from ml_networks.torch.lora import *
    from ml_networks.torch.losses import *
    from ml_networks.torch.neurons import *
    from ml_networks.torch.synapses import *
    from ml_networks.torch.unet import *
    from ml_networks.torch.utils import *
    from ml_networks.torch.vision import *
    from ml_networks.torch.vit import *

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
    "data": ("MinMaxNormalize", "SoftmaxTransformation", "determine_loader", "seed_worker"),
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
    "nn": (),
    "positions": (),
    "synapses": ("HyperSynapseUNET", "SynapseUNET"),
    "unet": ("ConditionalUnet1d", "ConditionalUnet2d"),
    "utils": ("get_optimizer", "gumbel_softmax", "log_softmax", "softmax", "torch_fix_seed"),
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
__all__, __getattr__, __dir__ = lazy_names(__name__, _MODULES, "torch")
