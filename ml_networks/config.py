"""Configuration dataclasses, shared by the torch and the JAX modules.

Nothing here imports torch or jax, and OmegaConf is imported only by :func:`load_config`.

Every class accepts plain Python values as well as OmegaConf's ``DictConfig`` and ``ListConfig``
(which hydra's ``instantiate`` passes) and holds plain values afterwards: sequences are tuples,
mappings are dicts, and a mapping given for a nested config is turned into that config. An
unknown keyword raises TypeError and names the nearest right one; a value out of range raises
ValueError and says what would do.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from ml_networks._compat import checked_keywords, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig, ListConfig

__all__ = [
    "AdaptiveAveragePoolingConfig",
    "AttentionConfig",
    "ContinuousThoughtMachineConfig",
    "ContrastiveLearningConfig",
    "ConvConfig",
    "ConvNetConfig",
    "DecoderConfig",
    "EncoderConfig",
    "HyperContinuousThoughtMachineConfig",
    "LinearConfig",
    "MLPConfig",
    "ResNetConfig",
    "SoftmaxTransConfig",
    "SpatialSoftmaxConfig",
    "TransformerConfig",
    "UNetConfig",
    "ViTConfig",
    "convert_dictconfig_to_dict",
    "load_config",
]

LINEAR_NORMS = ("layer", "rms", "none")
CONV_NORMS = ("batch", "group", "none")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

# OmegaConf's own mark for a value still missing. As the default of a required field that follows
# an optional one it keeps the dataclass usable as an OmegaConf structured config.
_MISSING: Any = "???"


def load_config(path: str | Path) -> DictConfig | ListConfig:
    """Read a YAML file with OmegaConf.

    Parameters
    ----------
    path
        The YAML file.

    Returns
    -------
    DictConfig or ListConfig
        Its content, interpolations unresolved.
    """
    from omegaconf import OmegaConf

    return OmegaConf.load(path)


def convert_dictconfig_to_dict(obj: Any) -> Any:
    """Replace OmegaConf containers by plain ones, at any depth.

    ``DictConfig`` becomes dict, or the dataclass it was made from; ``ListConfig`` becomes list;
    dict, list and tuple keep their type and are converted inside; anything else is returned as
    it is.
    """
    # An OmegaConf object can only exist once omegaconf has been imported.
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and isinstance(obj, (omegaconf.DictConfig, omegaconf.ListConfig)):
        obj = omegaconf.OmegaConf.to_object(obj)
    if isinstance(obj, dict):
        return {key: convert_dictconfig_to_dict(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        converted = [convert_dictconfig_to_dict(value) for value in obj]
        return tuple(converted) if isinstance(obj, tuple) else converted
    return obj


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


class Config:
    """What every config dataclass shares: conversion to plain values, then validation."""

    def __post_init__(self) -> None:
        self.dictcfg2dict()
        self._validate()

    def dictcfg2dict(self) -> None:
        """Replace OmegaConf containers in the fields by plain ones, in place, at any depth."""
        for name in _field_names(type(self)):
            value = convert_dictconfig_to_dict(getattr(self, name))
            setattr(self, name, value)
            for nested in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(nested, Config):
                    nested.dictcfg2dict()

    def _validate(self) -> None:
        """Check the values; raise TypeError or ValueError naming class, field and value."""

    def _error(self, name: str, wanted: str) -> str:
        return f"{type(self).__name__}.{name} must be {wanted}, got {getattr(self, name)!r}"

    def _integers(self, minimum: int | None, *names: str) -> None:
        wanted = "an integer" if minimum is None else f"an integer >= {minimum}"
        for name in names:
            value = getattr(self, name)
            if isinstance(value, str) and value == _MISSING:
                raise TypeError(f"{type(self).__name__}() is missing the argument {name!r}")
            if not _is_integer(value):
                raise TypeError(self._error(name, wanted))
            if minimum is not None and value < minimum:
                raise ValueError(self._error(name, wanted))

    def _dropout(self, value: Any, name: str = "dropout") -> None:
        if not _is_real(value) or not 0.0 <= value < 1.0:
            raise ValueError(self._error(name, f"a probability, 0 <= {name} < 1"))

    def _activations(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), str):
                raise TypeError(self._error(name, "the name of an activation, such as 'ReLU'"))

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            hint = did_you_mean(value, choices) if isinstance(value, str) else ""
            raise ValueError(self._error(name, f"one of {', '.join(choices)}") + hint)

    def _norm(self, choices: tuple[str, ...], norm: str, norm_cfg: Any) -> dict[str, Any]:
        self._one_of("norm", choices)
        if norm_cfg is not None and not isinstance(norm_cfg, Mapping):
            raise TypeError(self._error("norm_cfg", "a mapping of arguments for the norm"))
        return {} if norm == "none" else dict(norm_cfg or {})

    def _channels(self, channels: Any) -> tuple[int, ...]:
        valid = isinstance(channels, (list, tuple)) and len(channels) > 0
        if not valid or not all(_is_integer(c) and c >= 1 for c in channels):
            raise ValueError(self._error("channels", "a sequence of one or more integers >= 1"))
        return tuple(channels)

    def _nested(self, name: str, *classes: type[Config], optional: bool = False) -> None:
        value = getattr(self, name)
        if not (value is None and optional):
            setattr(self, name, as_config(value, *classes, what=f"{type(self).__name__}.{name}"))


def _field_names(cls: type[Any]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def as_config(value: Any, *classes: type[Config], what: str) -> Any:
    """Return ``value`` as one of the config ``classes``.

    Parameters
    ----------
    value
        Such a config, or a mapping (dict or DictConfig) of its fields. A ``_target_`` in the
        mapping decides the class; without one its keys must fit exactly one of ``classes``.
    *classes
        The config classes that will do.
    what
        What the value is, for the error message.

    Raises
    ------
    TypeError
        If the value is neither, or the mapping fits none or several of the classes.
    """
    value = convert_dictconfig_to_dict(value)
    if isinstance(value, classes):
        return value
    names = " or ".join(cls.__name__ for cls in classes)
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be {names}, got {type(value).__name__}: {value!r}")
    keywords = {key: entry for key, entry in value.items() if key != "_target_"}
    if "_target_" in value:
        target = str(value["_target_"]).rpartition(".")[2]
        fitting = [cls for cls in classes if cls.__name__ == target]
    elif len(classes) == 1:
        fitting = list(classes)
    else:
        fitting = [cls for cls in classes if set(keywords) <= set(_field_names(cls))]
    if len(fitting) != 1:
        raise TypeError(
            f"{what} must be {names}; the mapping {value!r} "
            + ("fits more than one of them, add _target_" if fitting else "fits none of them")
        )
    return fitting[0](**keywords)


@checked_keywords()
@dataclass
class LinearConfig(Config):
    """A linear layer with optional norm, activation and dropout.

    Attributes
    ----------
    activation
        Name of the activation, see :class:`ml_networks.torch.Activation`.
    norm
        ``"layer"``, ``"rms"`` or ``"none"``.
    norm_cfg
        Arguments for the norm (``eps``, ``elementwise_affine``, ...). Emptied for ``"none"``.
    dropout
        Dropout probability, 0 <= dropout < 1.
    norm_first
        Normalise the input of the linear layer instead of its output.
    bias
        Whether the linear layer has a bias.
    """

    activation: str
    norm: str = "none"
    norm_cfg: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    norm_first: bool = False
    bias: bool = True

    def _validate(self) -> None:
        self._activations("activation")
        self.norm_cfg = self._norm(LINEAR_NORMS, self.norm, self.norm_cfg)
        self._dropout(self.dropout)


@checked_keywords()
@dataclass
class MLPConfig(Config):
    """A multi-layer perceptron.

    Attributes
    ----------
    hidden_dim
        Width of the hidden layers.
    n_layers
        Number of hidden layers. An output layer follows them.
    output_activation
        Name of the activation after the output layer.
    linear_cfg
        The hidden layers. The output layer shares all of it but norm and activation.
    """

    hidden_dim: int
    n_layers: int
    output_activation: str
    linear_cfg: LinearConfig

    def _validate(self) -> None:
        self._integers(1, "hidden_dim")
        self._integers(0, "n_layers")
        self._activations("output_activation")
        self._nested("linear_cfg", LinearConfig)


@checked_keywords()
@dataclass
class ConvConfig(Config):
    """A convolution (or transposed convolution) with optional norm, activation and dropout.

    Attributes
    ----------
    activation
        Name of the activation. Default ``"ReLU"``.
    kernel_size, stride, padding, dilation, groups, bias
        As in a convolution. The first three are required.
    output_padding
        Rows and columns added at one side of a transposed convolution's output; unused by a
        plain convolution. Default 0.
    padding_mode
        ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
    dropout
        Dropout probability, 0 <= dropout < 1.
    norm
        ``"batch"``, ``"group"`` or ``"none"``.
    norm_cfg
        Arguments for the norm; ``"group"`` needs ``num_groups`` (1 makes it a layer norm over
        channels and positions, the number of channels an instance norm). Emptied for ``"none"``.
    norm_first
        Normalise the input of the convolution instead of its output.
    scale_factor
        Above 0: upscale by pixel shuffle. Below 0: downscale by pixel unshuffle. 0: neither.
    """

    activation: str = "ReLU"
    kernel_size: int = _MISSING
    stride: int = _MISSING
    padding: int = _MISSING
    output_padding: int = 0
    dilation: int = 1
    groups: int = 1
    bias: bool = True
    padding_mode: str = "zeros"
    dropout: float = 0.0
    norm: str = "none"
    norm_cfg: dict[str, Any] = field(default_factory=dict)
    norm_first: bool = False
    scale_factor: int = 0

    def _validate(self) -> None:
        self._activations("activation")
        self._integers(1, "kernel_size", "stride", "dilation", "groups")
        self._integers(0, "padding", "output_padding")
        self._integers(None, "scale_factor")
        self._one_of("padding_mode", PADDING_MODES)
        self.norm_cfg = self._norm(CONV_NORMS, self.norm, self.norm_cfg)
        self._dropout(self.dropout)


@checked_keywords()
@dataclass
class AttentionConfig(Config):
    """Self-attention blocks interleaved with the convolutions of a backbone.

    Attributes
    ----------
    nhead
        Number of heads.
    patch_size
        Side of the square patches that become one token. 1: every position is a token.
    """

    nhead: int
    patch_size: int

    def _validate(self) -> None:
        self._integers(1, "nhead", "patch_size")


@checked_keywords()
@dataclass
class ConvNetConfig(Config):
    """A stack of convolutions (encoder) or transposed convolutions (decoder).

    Attributes
    ----------
    channels
        Encoder: output channels of each layer. Decoder: input channels of each layer (the last
        layer makes the image's channels).
    conv_cfgs
        One :class:`ConvConfig` a layer.
    attention
        If given, an attention block beside each convolution.
    init_channel
        Decoder: channels of the feature map that enters it. Default 16.
    """

    channels: tuple[int, ...]
    conv_cfgs: tuple[ConvConfig, ...]
    attention: AttentionConfig | None = None
    init_channel: int = 16

    def _validate(self) -> None:
        self.channels = self._channels(self.channels)
        if not isinstance(self.conv_cfgs, (list, tuple)):
            raise TypeError(self._error("conv_cfgs", "a sequence of ConvConfig"))
        self.conv_cfgs = tuple(
            as_config(cfg, ConvConfig, what=f"ConvNetConfig.conv_cfgs[{i}]")
            for i, cfg in enumerate(self.conv_cfgs)
        )
        if len(self.channels) != len(self.conv_cfgs):
            raise ValueError(
                "ConvNetConfig needs one entry of conv_cfgs for each of channels, got "
                f"{len(self.channels)} channels {self.channels} and {len(self.conv_cfgs)} "
                "conv_cfgs"
            )
        self._nested("attention", AttentionConfig, optional=True)
        self._integers(1, "init_channel")


@checked_keywords(output_activation="out_activation")
@dataclass
class ResNetConfig(Config):
    """Residual blocks with pixel unshuffle (encoder) or pixel shuffle (decoder).

    Attributes
    ----------
    conv_channel
        Channels of every layer.
    conv_kernel
        Kernel size of the inner convolutions, odd.
    f_kernel
        Kernel size of the first convolution of an encoder and the last of a decoder, odd.
    conv_activation
        Name of the inner activation.
    out_activation
        Name of a decoder's last activation; an encoder does not use it. ``output_activation``
        is accepted as another name for it.
    n_res_blocks
        Number of residual blocks.
    scale_factor
        Factor of each pixel (un)shuffle. Default 2.
    n_scaling
        Number of pixel (un)shuffles. Default 2.
    norm, norm_cfg, dropout, padding_mode
        As in :class:`ConvConfig`.
    init_channel
        Decoder: channels of the feature map that enters it. Default 16.
    attention
        If given, an attention block after each residual block.
    """

    conv_channel: int
    conv_kernel: int
    f_kernel: int
    conv_activation: str
    out_activation: str
    n_res_blocks: int
    scale_factor: int = 2
    n_scaling: int = 2
    norm: str = "none"
    norm_cfg: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    init_channel: int = 16
    padding_mode: str = "zeros"
    attention: AttentionConfig | None = None

    def _validate(self) -> None:
        self._integers(1, "conv_channel", "conv_kernel", "f_kernel", "scale_factor")
        self._integers(1, "init_channel")
        self._integers(0, "n_res_blocks", "n_scaling")
        for name in ("conv_kernel", "f_kernel"):
            if getattr(self, name) % 2 == 0:
                raise ValueError(self._error(name, "odd, so that padding keeps the size"))
        self._activations("conv_activation", "out_activation")
        self._one_of("padding_mode", PADDING_MODES)
        self.norm_cfg = self._norm(CONV_NORMS, self.norm, self.norm_cfg)
        self._dropout(self.dropout)
        self._nested("attention", AttentionConfig, optional=True)


@checked_keywords()
@dataclass
class UNetConfig(Config):
    """A conditional U-Net.

    Attributes
    ----------
    channels
        Channels of each level, from the full resolution down.
    conv_cfg
        The convolutions of the residual blocks.
    cond_pred_scale
        The condition predicts a scale and a bias for each channel instead of a bias only.
    nhead
        Attention heads; required if ``has_attn``.
    has_attn
        Whether blocks contain self-attention.
    use_shuffle
        Down- and upsample by pixel (un)shuffle instead of strided convolutions.
    use_hypernet
        The condition generates the weights of the residual blocks.
    hyper_mlp_cfg
        The hypernetwork, if ``use_hypernet``.
    """

    channels: tuple[int, ...]
    conv_cfg: ConvConfig
    cond_pred_scale: bool = False
    nhead: int | None = None
    has_attn: bool = False
    use_shuffle: bool = False
    use_hypernet: bool = False
    hyper_mlp_cfg: MLPConfig | None = None

    def _validate(self) -> None:
        self.channels = self._channels(self.channels)
        self._nested("conv_cfg", ConvConfig)
        if self.nhead is not None:
            self._integers(1, "nhead")
        elif self.has_attn:
            raise ValueError("UNetConfig with has_attn=True needs nhead, the number of heads")
        self._nested("hyper_mlp_cfg", MLPConfig, optional=True)


@checked_keywords()
@dataclass
class TransformerConfig(Config):
    """A stack of transformer layers.

    Attributes
    ----------
    d_model
        Width of the tokens, divisible by ``nhead``.
    nhead
        Number of heads.
    dim_ff
        Width of the feed-forward layers.
    n_layers
        Number of layers.
    dropout
        Dropout probability, 0 <= dropout < 1. Default 0.1.
    hidden_activation
        Name of the activation of the feed-forward layers. Default ``"GELU"``.
    output_activation
        Name of the activation after the stack. Default ``"GELU"``.
    """

    d_model: int
    nhead: int
    dim_ff: int
    n_layers: int
    dropout: float = 0.1
    hidden_activation: str = "GELU"
    output_activation: str = "GELU"

    def _validate(self) -> None:
        self._integers(1, "d_model", "nhead", "dim_ff", "n_layers")
        if self.d_model % self.nhead:
            raise ValueError(self._error("d_model", f"divisible by nhead={self.nhead}"))
        self._dropout(self.dropout)
        self._activations("hidden_activation", "output_activation")


@checked_keywords()
@dataclass
class ViTConfig(Config):
    """A vision transformer, as encoder or decoder.

    Attributes
    ----------
    patch_size
        Side of the square patches.
    transformer_cfg
        The transformer.
    cls_token
        Encoder: the output is a class token (True) or the mean of the patches (False).
    init_channel, unpatchify
        Accepted for older configs; nothing reads them.
    decoder_output_activation
        Name of the decoder's last activation. Default ``"Identity"``.
    """

    patch_size: int
    transformer_cfg: TransformerConfig
    cls_token: bool = True
    init_channel: int = 16
    unpatchify: bool = False
    decoder_output_activation: str = "Identity"

    def _validate(self) -> None:
        self._integers(1, "patch_size", "init_channel")
        self._nested("transformer_cfg", TransformerConfig)
        self._activations("decoder_output_activation")


# OmegaConf knows no unions of containers, so at run time these annotations are Any: a config
# inside a DictConfig or ListConfig then survives.
if TYPE_CHECKING:
    OutputSize: TypeAlias = int | tuple[int, int]
    AdditionalLayer: TypeAlias = MLPConfig | LinearConfig | None
    Backbone: TypeAlias = ConvNetConfig | ResNetConfig | ViTConfig
    Pooling: TypeAlias = "AdaptiveAveragePoolingConfig | SpatialSoftmaxConfig"
    FullConnection: TypeAlias = Pooling | AdditionalLayer
else:
    OutputSize = AdditionalLayer = Backbone = Pooling = FullConnection = Any


@checked_keywords()
@dataclass
class AdaptiveAveragePoolingConfig(Config):
    """An encoder's head that averages the feature map over a grid of cells.

    Attributes
    ----------
    output_size
        Grid of cells, (rows, columns); an int n means (n, n). Default (1, 1).
    additional_layer
        What maps the pooled cells to the feature dimension; None: the cells are the features.
    """

    output_size: OutputSize = (1, 1)
    additional_layer: AdditionalLayer = None

    def _validate(self) -> None:
        size: Any = self.output_size
        if _is_integer(size):
            size = (size, size)
        valid = isinstance(size, (list, tuple)) and len(size) == 2
        if not valid or not all(_is_integer(n) and n >= 1 for n in size):
            raise ValueError(self._error("output_size", "an integer >= 1 or two of them"))
        self.output_size = (size[0], size[1])
        self._nested("additional_layer", MLPConfig, LinearConfig, optional=True)


@checked_keywords()
@dataclass
class SpatialSoftmaxConfig(Config):
    """An encoder's head that takes the expected position of each channel.

    Attributes
    ----------
    temperature
        Softmax temperature, > 0. Default 1. 0 stands for ``is_argmax=True`` at temperature 1.
    eps
        Accepted for older configs; nothing reads it.
    is_argmax, is_straight_through
        Either of them: take the position of the maximum, with the gradient of the expected
        position (straight-through).
    additional_layer
        What maps the positions to the feature dimension; None: the positions are the features.
    """

    temperature: float = 1.0
    eps: float = 1e-6
    is_argmax: bool = False
    is_straight_through: bool = False
    additional_layer: AdditionalLayer = None

    def _validate(self) -> None:
        if not _is_real(self.temperature) or not self.temperature >= 0:
            raise ValueError(self._error("temperature", "a number >= 0 (0 means argmax)"))
        if self.temperature == 0:
            self.temperature = 1.0
            self.is_argmax = True
        self._nested("additional_layer", MLPConfig, LinearConfig, optional=True)


BACKBONES = (ConvNetConfig, ResNetConfig, ViTConfig)
HEADS = (MLPConfig, LinearConfig, AdaptiveAveragePoolingConfig, SpatialSoftmaxConfig)


@checked_keywords()
@dataclass
class EncoderConfig(Config):
    """An encoder: backbone and head. It may be given as an Encoder's ``backbone_cfg``.

    Attributes
    ----------
    backbone
        :class:`ConvNetConfig`, :class:`ResNetConfig` or :class:`ViTConfig`.
    full_connection
        :class:`MLPConfig`, :class:`LinearConfig`, :class:`AdaptiveAveragePoolingConfig`,
        :class:`SpatialSoftmaxConfig`, or None for the bare feature map.
    """

    backbone: Backbone
    full_connection: FullConnection

    def _validate(self) -> None:
        self._nested("backbone", *BACKBONES)
        self._nested("full_connection", *HEADS, optional=True)


@checked_keywords()
@dataclass
class DecoderConfig(Config):
    """A decoder: backbone and head. It may be given as a Decoder's ``backbone_cfg``.

    Attributes
    ----------
    backbone
        :class:`ConvNetConfig`, :class:`ResNetConfig` or :class:`ViTConfig`.
    full_connection
        :class:`MLPConfig`, :class:`LinearConfig`, or None if feature maps enter the decoder.
    """

    backbone: Backbone
    full_connection: AdditionalLayer

    def _validate(self) -> None:
        self._nested("backbone", *BACKBONES)
        self._nested("full_connection", MLPConfig, LinearConfig, optional=True)


@checked_keywords()
@dataclass
class ContrastiveLearningConfig(Config):
    """A contrastive loss.

    Attributes
    ----------
    dim_feature
        Width of the embeddings that are compared.
    eval_func
        The network that makes the embeddings.
    dim_input2
        Accepted for older configs; nothing reads it.
    cross_entropy_like
        Whether the loss is written as the cross entropy of the pairing.
    """

    dim_feature: int
    eval_func: MLPConfig
    dim_input2: int | None = None
    cross_entropy_like: bool = False

    def _validate(self) -> None:
        self._integers(1, "dim_feature")
        self._nested("eval_func", MLPConfig)
        if self.dim_input2 is not None:
            self._integers(1, "dim_input2")


@checked_keywords()
@dataclass
class SoftmaxTransConfig(Config):
    """A soft one-hot code of continuous values.

    Attributes
    ----------
    vector
        Number of bins a value is spread over.
    sigma
        Width of the bins' kernel, > 0.
    n_ignore
        Number of last dimensions that are kept as they are. Default 0.
    max, min
        Range of the bins' centres. Default 1 and -1.
    """

    vector: int
    sigma: float
    n_ignore: int = 0
    max: float = 1.0
    min: float = -1.0

    def _validate(self) -> None:
        self._integers(1, "vector")
        self._integers(0, "n_ignore")
        if not _is_real(self.sigma) or not self.sigma > 0:
            raise ValueError(self._error("sigma", "a number > 0"))
        if not self.max > self.min:
            raise ValueError(self._error("max", f"above min={self.min!r}"))


CTM_BACKBONES = (
    "none",
    "parity_backbone",
    "shallow-wide",
    *(f"resnet{depth}-{stages}" for depth in (18, 34, 50, 101, 152) for stages in (1, 2, 3, 4)),
)
POSITIONAL_EMBEDDINGS = (
    "none",
    "learnable-fourier",
    "multi-learnable-fourier",
    "custom-rotational",
    "custom-rotational-1d",
)
NEURON_SELECT_TYPES = ("random-pairing", "first-last", "random")
HYPER_LAYERS = ("bottleneck", "down", "up", "all", "none")


@checked_keywords()
@dataclass
class ContinuousThoughtMachineConfig(Config):
    """A Continuous Thought Machine (Darlow et al., 2025, arXiv 2505.05522).

    Attributes
    ----------
    iterations
        Internal ticks, T.
    d_model
        Number of neurons, D.
    d_input
        Width of the attention over the input.
    heads
        Attention heads; must divide ``d_input``.
    n_synch_out, n_synch_action
        Neurons (or pairs of them) whose synchronisation is read out, and asks the input.
    synapse_depth
        1: one linear layer with a gate; above: a U-Net of that many widths.
    memory_length
        Pre-activations that a neuron's own model sees, M.
    deep_nlms
        Whether that model has a hidden layer.
    memory_hidden_dims
        Width of the hidden layer.
    do_layernorm_nlm
        Whether a layer norm precedes each layer of the neurons' models.
    backbone_type
        ``"resnet{18,34,50,101,152}-{1,2,3,4}"`` (depth and number of stages), ``"shallow-wide"``,
        ``"parity_backbone"`` (a sequence of signs) or ``"none"`` (the input is the features).
    positional_embedding_type
        Added to the features: ``"learnable-fourier"``, ``"multi-learnable-fourier"``,
        ``"custom-rotational"``, ``"custom-rotational-1d"`` or ``"none"``.
    out_dims
        Width of a prediction.
    prediction_reshaper
        Shape of a prediction whose last axis holds the classes that certainty is taken over; one
        entry may be -1. Default (-1,): one choice among ``out_dims``.
    dropout
        Dropout probability of attention and synapses. Default 0.
    dropout_nlm
        The same of the neurons' models. Default None: as ``dropout``.
    neuron_select_type
        ``"random-pairing"`` (default): products of random pairs of neurons. ``"random"`` and
        ``"first-last"``: of every pair among the chosen neurons, n (n + 1) / 2 of them.
    n_random_pairing_self
        The first pairs of ``"random-pairing"`` that are a neuron with itself. Default 0.
    in_channels
        Channels of the input. Default None: 3 for images; with backbone ``"none"`` the torch
        model finds it in its first input. ``"parity_backbone"`` has none.
    """

    iterations: int
    d_model: int
    d_input: int
    heads: int
    n_synch_out: int
    n_synch_action: int
    synapse_depth: int
    memory_length: int
    deep_nlms: bool
    memory_hidden_dims: int
    do_layernorm_nlm: bool
    backbone_type: str
    positional_embedding_type: str
    out_dims: int
    prediction_reshaper: tuple[int, ...] = (-1,)
    dropout: float = 0.0
    dropout_nlm: float | None = None
    neuron_select_type: str = "random-pairing"
    n_random_pairing_self: int = 0
    in_channels: int | None = None

    def _validate(self) -> None:
        self._integers(1, "iterations", "d_model", "d_input", "heads", "synapse_depth")
        self._integers(1, "n_synch_out", "n_synch_action", "memory_length", "out_dims")
        self._integers(1, "memory_hidden_dims")
        self._integers(0, "n_random_pairing_self")
        if self.in_channels is not None:
            self._integers(1, "in_channels")
        if self.d_input % self.heads:
            raise ValueError(self._error("d_input", f"divisible by heads={self.heads}"))
        self._one_of("backbone_type", CTM_BACKBONES)
        self._one_of("positional_embedding_type", POSITIONAL_EMBEDDINGS)
        self._one_of("neuron_select_type", NEURON_SELECT_TYPES)
        self._dropout(self.dropout)
        if self.dropout_nlm is not None:
            self._dropout(self.dropout_nlm, "dropout_nlm")
        self._positions()
        self._neurons()
        self.prediction_reshaper = self._reshaper(self.prediction_reshaper)

    def _positions(self) -> None:
        kind, backbone = self.positional_embedding_type, self.backbone_type
        if kind == "none":
            return
        if backbone == "none" and self.in_channels is None:
            raise ValueError(
                f"positional_embedding_type={kind!r} with backbone_type='none' needs in_channels, "
                "the channels of the input"
            )
        if backbone == "parity_backbone" and kind != "custom-rotational-1d":
            raise ValueError(
                self._error(
                    "positional_embedding_type",
                    "'custom-rotational-1d' or 'none' for the sequences of 'parity_backbone'",
                )
            )
        if kind == "custom-rotational-1d" and backbone not in ("parity_backbone", "none"):
            raise ValueError(
                self._error(
                    "positional_embedding_type",
                    f"one for images, since backbone_type is {backbone!r}",
                )
            )

    def _neurons(self) -> None:
        out, action = self.n_synch_out, self.n_synch_action
        if self.neuron_select_type == "first-last" and max(out, action) > self.d_model:
            name = "n_synch_out" if out > action else "n_synch_action"
            raise ValueError(self._error(name, f"at most d_model={self.d_model}"))
        if self.n_random_pairing_self > min(out, action):
            raise ValueError(
                self._error(
                    "n_random_pairing_self",
                    f"at most n_synch_out={out} and n_synch_action={action}",
                )
            )

    def _reshaper(self, shape: Any) -> tuple[int, ...]:
        valid = isinstance(shape, (list, tuple)) and len(shape) > 0
        if not valid or not all(_is_integer(n) and (n >= 1 or n == -1) for n in shape):
            raise ValueError(
                self._error("prediction_reshaper", "a sequence of integers >= 1, one may be -1")
            )
        known = math.prod(n for n in shape if n != -1)
        free = shape.count(-1)
        if free > 1 or self.out_dims % known or (not free and known != self.out_dims):
            raise ValueError(
                self._error("prediction_reshaper", f"a shape of out_dims={self.out_dims} values")
            )
        classes = shape[-1] if shape[-1] != -1 else self.out_dims // known
        if classes < 2:
            raise ValueError(
                self._error("prediction_reshaper", "a shape with two or more classes at its end")
            )
        return tuple(shape)


@checked_keywords()
@dataclass
class HyperContinuousThoughtMachineConfig(ContinuousThoughtMachineConfig):
    """A Continuous Thought Machine whose synapses adapt to the state at every tick.

    The attributes of :class:`ContinuousThoughtMachineConfig` and:

    Attributes
    ----------
    hyper_layers
        Which layers of the U-Net are dynamic: ``"bottleneck"`` (default; the two deepest levels,
        down and up), ``"down"``, ``"up"``, ``"all"`` or ``"none"``. All but ``"none"`` need
        ``synapse_depth`` above 1.
    hyper_rank
        Rank of the dynamic weights. Default 8.
    """

    hyper_layers: str = "bottleneck"
    hyper_rank: int = 8

    def _validate(self) -> None:
        super()._validate()
        self._integers(1, "hyper_rank")
        self._one_of("hyper_layers", HYPER_LAYERS)
        if self.hyper_layers != "none" and self.synapse_depth == 1:
            raise ValueError(
                self._error("hyper_layers", "'none' with synapse_depth=1, which has no U-Net")
                + "; or give synapse_depth > 1"
            )
