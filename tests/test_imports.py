"""What can be imported from where, and what an import costs."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import hydra.utils
import pytest
import torch

import ml_networks
import ml_networks.torch
from ml_networks import MLPConfig
from ml_networks.config import LinearConfig

ROOT = Path(__file__).parent.parent


def _names(text: str) -> list[str]:
    return text.split()


# The public names of 0.2.6: `ml_networks.__all__` and `ml_networks.torch.__all__`.
TOP = _names("""
AdaptiveAveragePoolingConfig AttentionConfig ContrastiveLearningConfig ConvConfig ConvNetConfig
DecoderConfig EncoderConfig LinearConfig MLPConfig ProgressBarCallback ResNetConfig
SoftmaxTransConfig SpatialSoftmaxConfig TransformerConfig UNetConfig ViTConfig conv_out
conv_out_shape conv_transpose_in conv_transpose_in_shape conv_transpose_out
conv_transpose_out_shape determine_loader load_blosc2 output_padding output_padding_shape
save_blosc2 seed_worker
""")
TORCH = _names("""
Activation Attention1d Attention2d BSQCodebook BaseModule BernoulliStoch CRReLU CategoricalStoch
ConditionalUnet1d ConditionalUnet2d ContrastiveLearningLoss ConvNet ConvNormActivation
ConvNormActivation1d ConvTranspose ConvTransposeNormActivation ConvTransposeNormActivation1d
Decoder Distribution Encoder FocalFrequencyLoss HyperNet LinearNormActivation MLPLayer
MinMaxNormalize NormalStoch PatchEmbed PositionalEncoding REReLU ResNetPixShuffle
ResNetPixUnshuffle ResidualBlock SiGLU SoftmaxTransformation SpatialSoftmax StochState TanhExp
TransformerLayer ViT binary_focal_loss cat_dist charbonnier cross_entropy focal_loss get_dist
get_norm get_optimizer gumbel_softmax kl_balancing kl_divergence log_softmax
soft_target_cross_entropy softmax stack_dist torch_fix_seed
""")
# Modules of 0.2.6 and older versions, each with names that YAML files refer to.
OLD_PATHS = {
    "ml_networks.activations": "Activation L2Norm REReLU TanhExp TanhExpBase",
    "ml_networks.base": "BaseModule",
    "ml_networks.callbacks": "ProgressBarCallback",
    "ml_networks.contrastive": "ContrastiveLearningLoss",
    "ml_networks.distributions": "Distribution NormalStoch stack_dist BSQCodebook",
    "ml_networks.hypernetworks": "HyperNet",
    "ml_networks.layers": "MLPLayer Attention2d ConvNormActivation HorizonShuffle",
    "ml_networks.loss": "focal_loss FocalFrequencyLoss charbonnier",
    "ml_networks.unet": "ConditionalUnet2d",
    "ml_networks.utils": "conv_out save_blosc2 determine_loader get_optimizer",
    "ml_networks.vision": "Encoder Decoder ViT",
    "ml_networks.torch.loss": "kl_divergence focal_loss",
    "ml_networks.torch.torch_utils": "get_optimizer MinMaxNormalize softmax",
}


def _python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light() -> None:
    code = (
        "import time; start = time.perf_counter()\n"
        "import ml_networks, ml_networks.config\n"
        "seconds = time.perf_counter() - start\n"
        "import sys; heavy = {'torch', 'jax', 'numpy', 'lightning', 'omegaconf'}\n"
        "print(seconds, *heavy & set(sys.modules))"
    )
    # The best of three, since other processes may share the processor.
    runs = [_python(code).split() for _ in range(3)]
    assert all(len(run) == 1 for run in runs), runs
    assert min(float(run[0]) for run in runs) < 0.3


def test_torch_modules_import_neither_lightning_nor_jax() -> None:
    code = (
        "from ml_networks.torch import MLPLayer, Encoder, Decoder, ViT, Activation\n"
        "import sys\n"
        "print(*{'lightning', 'pytorch_lightning', 'jax', 'omegaconf'} & set(sys.modules))"
    )
    assert _python(code) == ""


def test_without_lightning_base_module_is_a_torch_module() -> None:
    code = (
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if 'lightning' in name else find(name)\n"
        "from ml_networks.torch import BaseModule\n"
        "print(BaseModule.__mro__[1].__name__, BaseModule().device)"
    )
    assert _python(code) == "Module cpu"


def test_without_torch_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import ml_networks; ml_networks.MLPConfig\n"
        "try: ml_networks.MLPLayer\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    assert "pip install 'ml-networks[torch]'" in _python(code)


@pytest.mark.parametrize("name", TOP + TORCH)
def test_every_name_of_the_top_level(name: str) -> None:
    assert name in dir(ml_networks)
    assert getattr(ml_networks, name) is not None


@pytest.mark.parametrize("name", TORCH)
def test_every_torch_name(name: str) -> None:
    assert name in ml_networks.torch.__all__
    assert name in dir(ml_networks.torch)
    assert getattr(ml_networks.torch, name) is getattr(ml_networks, name)


def test_star_imports() -> None:
    code = (
        "from ml_networks import *; import sys; print(MLPConfig.__name__, 'torch' in sys.modules)"
    )
    assert _python(code) == "MLPConfig False"
    assert set(TORCH) <= set(ml_networks.torch.__all__)


def test_submodules_are_attributes() -> None:
    code = "import ml_networks; print(ml_networks.torch.MLPLayer, ml_networks.config.MLPConfig)"
    assert "MLPLayer" in _python(code)


def test_a_misspelt_name_suggests_the_right_one() -> None:
    with pytest.raises(AttributeError, match="'MLPLayr'; did you mean 'MLPLayer'"):
        ml_networks.MLPLayr  # noqa: B018
    with pytest.raises(AttributeError, match="'Encodr'; did you mean 'Encoder'"):
        ml_networks.torch.Encodr  # noqa: B018


@pytest.mark.parametrize("path", OLD_PATHS)
def test_old_paths(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, path, raising=False)
    with pytest.warns(DeprecationWarning, match=rf"{path} is an old path; import from ml_net"):
        module = importlib.import_module(path)
    for name in OLD_PATHS[path].split():
        assert getattr(module, name) is getattr(ml_networks, name, None) or inspect.getmodule(
            getattr(module, name)
        ).__name__.startswith("ml_networks.torch.")
    with pytest.raises(AttributeError, match="has no attribute 'nothing_like_it'"):
        module.nothing_like_it  # noqa: B018


def test_old_path_of_a_moved_class_in_a_module_that_stays() -> None:
    import ml_networks.torch.layers as layers

    with pytest.warns(DeprecationWarning, match="has moved to ml_networks.torch.attention"):
        moved = layers.Attention2d
    assert moved is ml_networks.torch.Attention2d
    with pytest.raises(AttributeError, match="has no attribute 'Attention3d'"):
        layers.Attention3d  # noqa: B018


def test_old_paths_import_in_every_form() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import ml_networks.layers\n"
        "from ml_networks.vision import Encoder\n"
        "from ml_networks.torch import loss\n"
        "from ml_networks.activations import *\n"
        "import ml_networks.torch as t\n"
        "print(ml_networks.layers.MLPLayer is t.MLPLayer, Encoder is t.Encoder,\n"
        "      loss.focal_loss is t.focal_loss, Activation is t.Activation)"
    )
    assert _python(code) == "True True True True"


def test_an_old_yaml_file_instantiates() -> None:
    node = {
        "_target_": "ml_networks.layers.MLPLayer",
        "input_dim": 4,
        "output_dim": 2,
        "cfg": {
            "_target_": "ml_networks.config.MLPConfig",
            "hidden_dim": 8,
            "n_layers": 1,
            "output_activation": "Tanh",
            "linear_cfg": {
                "_target_": "ml_networks.config.LinearConfig",
                "activation": "ReLU",
                "norm": "layer",
                "norm_cfg": {"eps": 1e-3},
            },
        },
    }
    sys.modules.pop("ml_networks.layers", None)
    vars(ml_networks).pop("layers", None)
    with pytest.warns(DeprecationWarning, match="old path"):
        mlp = hydra.utils.instantiate(node)
    assert isinstance(mlp, ml_networks.torch.MLPLayer)
    assert mlp.cfg == MLPConfig(
        8, 1, "Tanh", LinearConfig("ReLU", norm="layer", norm_cfg={"eps": 1e-3})
    )
    assert mlp(torch.ones(3, 4)).shape == (3, 2)


def test_base_module_is_a_lightning_module() -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    from ml_networks.torch import BaseModule
    from ml_networks.torch.base import Module

    class Model(BaseModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 3)

    model = Model()
    assert isinstance(model, Module)
    assert isinstance(model, torch.nn.Module)
    names = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    assert names & {"lightning", "pytorch_lightning"}
    assert lightning is not None
    model.freeze_weights()
    assert [p.requires_grad for p in model.parameters()] == [False, True]
    model.unfreeze_weights()
    model.freeze_biases()
    assert [p.requires_grad for p in model.parameters()] == [True, False]
    model.unfreeze_biases()
    assert all(p.requires_grad for p in model.parameters())


def test_both_frameworks_raise_the_same_errors() -> None:
    import ml_networks.jax.activations as jax_activations
    import ml_networks.jax.distributions as jax_distributions
    import ml_networks.jax.utils as jax_utils
    import ml_networks.torch.activations as torch_activations
    import ml_networks.torch.distributions as torch_distributions
    import ml_networks.torch.utils as torch_utils

    assert jax_activations.UnknownActivationError is torch_activations.UnknownActivationError
    assert jax_utils.UnknownOptimizerError is torch_utils.UnknownOptimizerError
    error = torch_distributions.UnknownDistributionError
    assert jax_distributions.UnknownDistributionError is error
