"""Config-built neural networks for PyTorch and JAX with fused Triton and Pallas kernels.

``import ml_networks`` imports no framework. The configs, shape arithmetic and blosc2 files are
here; the modules are in :mod:`ml_networks.torch` and :mod:`ml_networks.jax`. The torch names can
also be imported from here (``from ml_networks import MLPLayer``), as in older versions; they are
left out of ``__all__`` so that ``from ml_networks import *`` works with either framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ml_networks._compat import did_you_mean, install_path_aliases

if TYPE_CHECKING:
    from ml_networks.config import *
    from ml_networks.io import *
    from ml_networks.shapes import *
    from ml_networks.torch.activations import *
    from ml_networks.torch.attention import *
    from ml_networks.torch.base import *
    from ml_networks.torch.callbacks import *
    from ml_networks.torch.contrastive import *
    from ml_networks.torch.ctm import *
    from ml_networks.torch.data import *
    from ml_networks.torch.distributions import *
    from ml_networks.torch.hypernetworks import *
    from ml_networks.torch.layers import *
    from ml_networks.torch.lora import *
    from ml_networks.torch.losses import *
    from ml_networks.torch.neurons import *
    from ml_networks.torch.synapses import *
    from ml_networks.torch.unet import *
    from ml_networks.torch.utils import *
    from ml_networks.torch.vision import *
    from ml_networks.torch.vit import *

_HOMES: dict[str, str] = {
    "AdaptiveAveragePoolingConfig": "config",
    "AttentionConfig": "config",
    "ContinuousThoughtMachineConfig": "config",
    "ContrastiveLearningConfig": "config",
    "ConvConfig": "config",
    "ConvNetConfig": "config",
    "DecoderConfig": "config",
    "EncoderConfig": "config",
    "HyperContinuousThoughtMachineConfig": "config",
    "LinearConfig": "config",
    "MLPConfig": "config",
    "ResNetConfig": "config",
    "SoftmaxTransConfig": "config",
    "SpatialSoftmaxConfig": "config",
    "TransformerConfig": "config",
    "UNetConfig": "config",
    "ViTConfig": "config",
    "conv_out": "shapes",
    "conv_out_shape": "shapes",
    "conv_transpose_in": "shapes",
    "conv_transpose_in_shape": "shapes",
    "conv_transpose_out": "shapes",
    "conv_transpose_out_shape": "shapes",
    "convert_dictconfig_to_dict": "config",
    "load_blosc2": "io",
    "load_config": "config",
    "output_padding": "shapes",
    "output_padding_shape": "shapes",
    "save_blosc2": "io",
}
_SUBMODULES = ("config", "convert", "io", "jax", "kernels", "shapes", "torch")

__all__ = sorted(_HOMES)

install_path_aliases(
    __name__,
    {
        "activations": ("torch.activations",),
        "base": ("torch.base",),
        "callbacks": ("torch.callbacks",),
        "contrastive": ("torch.contrastive",),
        "distributions": ("torch.distributions",),
        "hypernetworks": ("torch.hypernetworks",),
        "layers": ("torch.attention", "torch.layers"),
        "loss": ("torch.losses",),
        "torch_utils": ("torch.utils", "torch.data"),
        "unet": ("torch.unet",),
        "utils": ("shapes", "io", "torch.data", "torch.utils"),
        "vision": ("torch.vision", "torch.vit"),
        "torch.loss": ("torch.losses",),
        "torch.torch_utils": ("torch.utils", "torch.data"),
        "jax.jax_utils": ("jax.utils", "jax.data"),
        "jax.loss": ("jax.losses",),
    },
)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "ProgressBarCallback":
        return importlib.import_module(f"{__name__}.torch.callbacks").ProgressBarCallback
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        torch_names = importlib.import_module(f"{__name__}.torch")
        if name not in torch_names.__all__:
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}{did_you_mean(name, __dir__())}"
            )
        value = getattr(torch_names, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    torch_names = importlib.import_module(f"{__name__}.torch").__all__
    return sorted({*globals(), *__all__, *torch_names, *_SUBMODULES, "ProgressBarCallback"})
