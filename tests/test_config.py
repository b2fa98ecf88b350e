"""Configs: fields and defaults of 0.2.6, plain values from any container, clear errors."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import hydra.utils
import pytest
from omegaconf import DictConfig, ListConfig, OmegaConf

from ml_networks import config
from ml_networks._compat import checked_keywords
from ml_networks.config import (
    AdaptiveAveragePoolingConfig,
    AttentionConfig,
    ContrastiveLearningConfig,
    ConvConfig,
    ConvNetConfig,
    DecoderConfig,
    EncoderConfig,
    LinearConfig,
    MLPConfig,
    ResNetConfig,
    SoftmaxTransConfig,
    SpatialSoftmaxConfig,
    TransformerConfig,
    UNetConfig,
    ViTConfig,
    as_config,
    convert_dictconfig_to_dict,
    load_config,
)

LINEAR = LinearConfig("ReLU")
CONV = ConvConfig("ReLU", 3, 2, 1)
TRANSFORMER = TransformerConfig(8, 2, 16, 1)

REQUIRED = object()
# Field and default of every class, in positional order, as published.
FIELDS: dict[str, dict[str, Any]] = {
    "LinearConfig": {
        "activation": REQUIRED,
        "norm": "none",
        "norm_cfg": {},
        "dropout": 0.0,
        "norm_first": False,
        "bias": True,
    },
    "MLPConfig": dict.fromkeys(
        ("hidden_dim", "n_layers", "output_activation", "linear_cfg"), REQUIRED
    ),
    "ConvConfig": {
        "activation": "ReLU",
        "kernel_size": REQUIRED,
        "stride": REQUIRED,
        "padding": REQUIRED,
        "output_padding": 0,
        "dilation": 1,
        "groups": 1,
        "bias": True,
        "padding_mode": "zeros",
        "dropout": 0.0,
        "norm": "none",
        "norm_cfg": {},
        "norm_first": False,
        "scale_factor": 0,
    },
    "ConvNetConfig": {
        "channels": REQUIRED,
        "conv_cfgs": REQUIRED,
        "attention": None,
        "init_channel": 16,
    },
    "ResNetConfig": {
        "conv_channel": REQUIRED,
        "conv_kernel": REQUIRED,
        "f_kernel": REQUIRED,
        "conv_activation": REQUIRED,
        "out_activation": REQUIRED,
        "n_res_blocks": REQUIRED,
        "scale_factor": 2,
        "n_scaling": 2,
        "norm": "none",
        "norm_cfg": {},
        "dropout": 0.0,
        "init_channel": 16,
        "padding_mode": "zeros",
        "attention": None,
    },
    "UNetConfig": {
        "channels": REQUIRED,
        "conv_cfg": REQUIRED,
        "cond_pred_scale": False,
        "nhead": None,
        "has_attn": False,
        "use_shuffle": False,
        "use_hypernet": False,
        "hyper_mlp_cfg": None,
    },
    "TransformerConfig": {
        "d_model": REQUIRED,
        "nhead": REQUIRED,
        "dim_ff": REQUIRED,
        "n_layers": REQUIRED,
        "dropout": 0.1,
        "hidden_activation": "GELU",
        "output_activation": "GELU",
    },
    "ViTConfig": {
        "patch_size": REQUIRED,
        "transformer_cfg": REQUIRED,
        "cls_token": True,
        "init_channel": 16,
        "unpatchify": False,
        "decoder_output_activation": "Identity",
    },
    "AttentionConfig": {"nhead": REQUIRED, "patch_size": REQUIRED},
    "AdaptiveAveragePoolingConfig": {"output_size": (1, 1), "additional_layer": None},
    "SpatialSoftmaxConfig": {
        "temperature": 1.0,
        "eps": 1e-6,
        "is_argmax": False,
        "is_straight_through": False,
        "additional_layer": None,
    },
    "EncoderConfig": {"backbone": REQUIRED, "full_connection": REQUIRED},
    "DecoderConfig": {"backbone": REQUIRED, "full_connection": REQUIRED},
    "ContrastiveLearningConfig": {
        "dim_feature": REQUIRED,
        "eval_func": REQUIRED,
        "dim_input2": None,
        "cross_entropy_like": False,
    },
    "SoftmaxTransConfig": {
        "vector": REQUIRED,
        "sigma": REQUIRED,
        "n_ignore": 0,
        "max": 1.0,
        "min": -1.0,
    },
}
MLP = MLPConfig(4, 2, "Tanh", LINEAR)
RESNET = ResNetConfig(8, 3, 3, "ReLU", "Tanh", 2)
# One instance of every class.
EXAMPLES: list[Any] = [
    LinearConfig("ReLU", "layer", {"eps": 1e-3}, 0.1, True, False),
    MLP,
    CONV,
    ConvNetConfig((4, 8), (CONV, CONV), AttentionConfig(2, 1)),
    RESNET,
    UNetConfig((4, 8), CONV, nhead=2, has_attn=True, hyper_mlp_cfg=MLP),
    TRANSFORMER,
    ViTConfig(4, TRANSFORMER),
    AttentionConfig(2, 4),
    AdaptiveAveragePoolingConfig(3, MLP),
    SpatialSoftmaxConfig(additional_layer=LINEAR),
    EncoderConfig(RESNET, LINEAR),
    DecoderConfig(ViTConfig(4, TRANSFORMER), None),
    ContrastiveLearningConfig(8, MLP),
    SoftmaxTransConfig(5, 0.1),
]
each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: type(e).__name__)


@pytest.mark.parametrize("name", FIELDS)
def test_fields_defaults_and_order(name: str) -> None:
    fields = {}
    for field in dataclasses.fields(getattr(config, name)):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        missing = default is dataclasses.MISSING or default == "???"
        fields[field.name] = REQUIRED if missing else default
    assert list(fields.items()) == list(FIELDS[name].items())


def test_every_class_has_an_example() -> None:
    assert sorted(type(example).__name__ for example in EXAMPLES) == sorted(FIELDS)


@each_example
def test_copies_and_pickles_are_equal(example: Any) -> None:
    assert copy.deepcopy(example) == example
    assert pickle.loads(pickle.dumps(example)) == example
    assert dataclasses.replace(example) == example


@each_example
def test_survives_omegaconf(example: Any) -> None:
    # hydra puts configs it has made into a ListConfig or DictConfig of the level above.
    container = OmegaConf.create([example], flags={"allow_objects": True})
    assert convert_dictconfig_to_dict(container) == [example]


def _yaml(example: Any) -> Any:
    """Return a config as nested dicts with ``_target_``, as in a YAML file."""
    if dataclasses.is_dataclass(example):
        fields = {f.name: _yaml(getattr(example, f.name)) for f in dataclasses.fields(example)}
        return {"_target_": f"ml_networks.config.{type(example).__name__}", **fields}
    if isinstance(example, (list, tuple)):
        return [_yaml(entry) for entry in example]
    return example


@each_example
@pytest.mark.parametrize("convert", ["none", "partial", "object", "all"])
def test_hydra_instantiates(example: Any, convert: str) -> None:
    node = OmegaConf.create(_yaml(example))
    assert hydra.utils.instantiate(node, _convert_=convert) == example


@each_example
def test_a_mapping_becomes_the_config(example: Any) -> None:
    made = as_config(OmegaConf.create(_yaml(example)), type(example), what="example")
    assert made == example


def test_a_mapping_without_target_fits_one_class() -> None:
    cfg = AdaptiveAveragePoolingConfig(additional_layer={"activation": "ReLU"})
    assert cfg.additional_layer == LINEAR
    with pytest.raises(TypeError, match=r"backbone.*none of them"):
        EncoderConfig({"activation": "ReLU"}, None)
    with pytest.raises(TypeError, match=r"full_connection.*more than one.*_target_"):
        EncoderConfig(RESNET, {"additional_layer": None})
    with pytest.raises(TypeError, match=r"linear_cfg must be LinearConfig, got int: 3"):
        MLPConfig(4, 2, "Tanh", 3)


def test_containers_become_plain() -> None:
    conv = ConvConfig("ReLU", 3, 1, 1, norm="group", norm_cfg=OmegaConf.create({"num_groups": 2}))
    assert type(conv.norm_cfg) is dict
    net = ConvNetConfig(OmegaConf.create([4]), [conv])
    assert net.channels == (4,)
    assert net.conv_cfgs == (conv,)
    assert UNetConfig([4, 8], CONV).channels == (4, 8)
    assert AdaptiveAveragePoolingConfig(OmegaConf.create([2, 3])).output_size == (2, 3)
    assert AdaptiveAveragePoolingConfig(4).output_size == (4, 4)


def test_dictcfg2dict_works_in_place_at_any_depth() -> None:
    mlp = MLPConfig(4, 2, "Tanh", LinearConfig("ReLU", norm="layer"))
    mlp.linear_cfg.norm_cfg = DictConfig({"eps": 1e-3})
    mlp.dictcfg2dict()
    assert type(mlp.linear_cfg.norm_cfg) is dict
    assert mlp.linear_cfg.norm_cfg == {"eps": 1e-3}


def test_convert_is_recursive() -> None:
    mixed = [{"a": ListConfig([1, {"b": 2}])}, (DictConfig({"c": [3]}), 4)]
    converted = convert_dictconfig_to_dict(mixed)
    assert converted == [{"a": [1, {"b": 2}]}, ({"c": [3]}, 4)]
    assert type(converted[0]["a"][1]) is dict
    assert type(converted[1][0]["c"]) is list


def test_norm_none_empties_its_arguments() -> None:
    assert LinearConfig("ReLU", "none", {"eps": 1.0}).norm_cfg == {}
    shared = {"eps": 1.0}
    assert LinearConfig("ReLU", "layer", shared).norm_cfg is not shared


def test_load_config(tmp_path: Path) -> None:
    path = tmp_path / "mlp.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(_yaml(MLP))))
    loaded = load_config(path)
    assert isinstance(loaded, DictConfig)
    assert hydra.utils.instantiate(loaded) == MLP
    path.write_text("- 1\n- 2\n")
    assert load_config(path) == [1, 2]


@pytest.mark.parametrize(
    ("cls", "keywords", "message"),
    [
        (MLPConfig, {"linaer_cfg": LINEAR}, r"'linaer_cfg'; did you mean 'linear_cfg'\?"),
        (ConvConfig, {"kernel": 3}, r"'kernel'; did you mean 'kernel_size'\?"),
        (LinearConfig, {"Activation": "ReLU"}, r"did you mean 'activation'\?"),
        (ConvConfig, {"qqq": 1}, r"'qqq'; It takes: activation, kernel_size, stride"),
        (ConvConfig, {"kernel_size": 3}, r"ConvConfig\(\) is missing the argument 'stride'"),
        (LinearConfig, {}, "missing 1 required positional argument: 'activation'"),
    ],
)
def test_wrong_keywords(cls: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        cls(**keywords)


def test_the_documents_name_of_the_output_activation() -> None:
    fields = {"conv_channel": 8, "conv_kernel": 3, "f_kernel": 3, "n_res_blocks": 2}
    made = ResNetConfig(**fields, conv_activation="ReLU", output_activation="Tanh")
    assert made == RESNET
    with pytest.raises(TypeError, match=r"'out_activation' twice \('output_activation' is"):
        ResNetConfig(
            **fields, conv_activation="ReLU", out_activation="Tanh", output_activation="Tanh"
        )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ConvConfig("ReLU", 0, 1, 1), ValueError, "kernel_size must be an integer >= 1"),
        (lambda: ConvConfig("ReLU", 3, 0, 1), ValueError, "stride must be an integer >= 1, got 0"),
        (lambda: ConvConfig("ReLU", 3, 1, -1), ValueError, "padding must be an integer >= 0"),
        (lambda: ConvConfig("ReLU", 3.0, 1, 1), TypeError, "kernel_size must be an integer"),
        (lambda: ConvConfig("ReLU", True, 1, 1), TypeError, "kernel_size must be an integer"),
        (lambda: ConvConfig(3, 3, 1, 1), TypeError, "activation must be the name"),
        (
            lambda: ConvConfig("ReLU", 3, 1, 1, norm="bacth"),
            ValueError,
            r"norm must be one of batch, group, none, got 'bacth'; did you mean 'batch'\?",
        ),
        (
            lambda: ConvConfig("ReLU", 3, 1, 1, padding_mode="mirror"),
            ValueError,
            "padding_mode must be one of zeros, reflect, replicate, circular",
        ),
        (lambda: LinearConfig("ReLU", norm="batch"), ValueError, "one of layer, rms, none"),
        (lambda: LinearConfig("ReLU", "layer", 3), TypeError, "norm_cfg must be a mapping"),
        (lambda: LinearConfig("ReLU", dropout=1.0), ValueError, "dropout must be a probability"),
        (lambda: LinearConfig("ReLU", dropout=-0.1), ValueError, "0 <= dropout < 1"),
        (lambda: LinearConfig("ReLU", dropout="x"), ValueError, "0 <= dropout < 1"),
        (lambda: MLPConfig(0, 1, "Tanh", LINEAR), ValueError, "hidden_dim"),
        (lambda: MLPConfig(4, -1, "Tanh", LINEAR), ValueError, "n_layers"),
        (
            lambda: ConvNetConfig([4, 8], [CONV]),
            ValueError,
            r"one entry of conv_cfgs for each of channels, got 2 channels \(4, 8\) and 1",
        ),
        (lambda: ConvNetConfig([], []), ValueError, "channels must be a sequence of one or more"),
        (lambda: ConvNetConfig([0], [CONV]), ValueError, "channels"),
        (lambda: ConvNetConfig([4], CONV), TypeError, "conv_cfgs must be a sequence"),
        (lambda: ConvNetConfig([4], [3]), TypeError, r"conv_cfgs\[0\] must be ConvConfig"),
        (lambda: ResNetConfig(8, 4, 3, "ReLU", "Tanh", 2), ValueError, "conv_kernel must be odd"),
        (lambda: UNetConfig([4], CONV, has_attn=True), ValueError, "needs nhead"),
        (lambda: TransformerConfig(8, 3, 16, 1), ValueError, "d_model must be divisible by nhead"),
        (lambda: AdaptiveAveragePoolingConfig((1, 2, 3)), ValueError, "output_size"),
        (lambda: AdaptiveAveragePoolingConfig(0), ValueError, "output_size"),
        (lambda: SpatialSoftmaxConfig(-1.0), ValueError, "temperature"),
        (lambda: SoftmaxTransConfig(5, 0.0), ValueError, "sigma"),
        (lambda: SoftmaxTransConfig(5, 0.1, max=-2.0), ValueError, "max must be above min"),
        (lambda: ContrastiveLearningConfig(8, LINEAR), TypeError, "eval_func must be MLPConfig"),
    ],
)
def test_wrong_values(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_temperature_zero_is_argmax() -> None:
    assert SpatialSoftmaxConfig(0.0) == SpatialSoftmaxConfig(1.0, is_argmax=True)


@checked_keywords(size="width")
def _frame(height: int, width: int = 1) -> tuple[int, int]:
    return height, width


def test_checked_keywords_on_functions() -> None:
    assert _frame(1, size=2) == (1, 2)
    assert _frame(width=3, height=4) == (4, 3)
    with pytest.raises(TypeError, match=r"_frame\(\) got 'width' twice \('size' is another"):
        _frame(1, 2, size=3)
    with pytest.raises(TypeError, match=r"_frame\(\) .*'hight'; did you mean 'height'"):
        _frame(hight=1)
    with pytest.raises(TypeError, match="missing 1 required"):
        _frame()
