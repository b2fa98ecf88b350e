"""Folding batch norms: the same outputs, and everything else as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from ml_networks.config import ConvConfig, ConvNetConfig, LinearConfig, ResNetConfig
from ml_networks.torch import (
    ConvNormActivation,
    ConvNormActivation1d,
    ConvTransposeNormActivation,
    ConvTransposeNormActivation1d,
    Decoder,
    Encoder,
    fuse_for_inference,
    unfuse,
)
from ml_networks.torch.nn import BatchNorm2d


def conv(**fields: object) -> ConvConfig:
    fields = {
        "activation": "SiLU",
        "kernel_size": 3,
        "stride": 1,
        "padding": 1,
        "norm": "batch",
    } | fields
    return ConvConfig(**fields)  # type: ignore[arg-type]


def trained(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """``module`` in evaluation mode, with weights and statistics far from the initial ones."""
    generator = torch.Generator().manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._NormBase):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_(0, 2, generator=generator)
            norm.running_var.uniform_(0.01, 9, generator=generator)
            if norm.affine:
                nn.init.normal_(norm.weight, 0, 2, generator=generator)
                nn.init.normal_(norm.bias, 0, 2, generator=generator)
    return module.to(dtype).eval()


def assert_same(module: nn.Module, x: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}[x.dtype]
    assert (module(x) - expected).abs().max() <= tolerance * expected.abs().max()


BLOCKS: dict[str, tuple[type[nn.Module], ConvConfig, tuple[int, ...]]] = {
    "plain": (ConvNormActivation, conv(), (2, 4, 5, 7)),
    "groups-stride-dilation": (
        ConvNormActivation,
        conv(groups=2, stride=2, dilation=2, bias=False, padding_mode="circular"),
        (2, 4, 9, 8),
    ),
    "shuffle": (ConvNormActivation, conv(scale_factor=2), (2, 4, 5, 7)),
    "unshuffle": (ConvNormActivation, conv(scale_factor=-2), (2, 4, 6, 8)),
    "gated": (ConvNormActivation, conv(activation="SiGLU"), (2, 4, 5, 7)),
    "not-affine": (ConvNormActivation, conv(norm_cfg={"affine": False}), (2, 4, 5, 7)),
    "norm-first": (ConvNormActivation, conv(norm_first=True, padding=0, groups=2), (2, 4, 5, 7)),
    "norm-first-reflect": (
        ConvNormActivation,
        conv(norm_first=True, padding_mode="reflect", bias=False),
        (2, 4, 5, 7),
    ),
    "1d": (ConvNormActivation1d, conv(), (2, 4, 9)),
    "1d-shuffle": (ConvNormActivation1d, conv(scale_factor=2), (2, 4, 9)),
    "transpose": (ConvTransposeNormActivation, conv(stride=2, groups=2), (2, 4, 5, 7)),
    "transpose-1d": (ConvTransposeNormActivation1d, conv(stride=2), (2, 4, 9)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str, dtype: torch.dtype) -> None:
    kind, cfg, shape = BLOCKS[name]
    torch.manual_seed(0)
    block = trained(kind(4, 8, cfg), dtype)
    x = torch.randn(shape, dtype=dtype)
    expected = block(x)
    state = copy.deepcopy(block.state_dict())

    fusion = fuse_for_inference(block)
    assert fusion.folded == ("norm",)
    assert not fusion.kept
    assert_same(block, x, expected)
    assert not torch.equal(block(x), expected) or dtype == torch.float64
    assert list(block.state_dict()) == list(state)
    for key, value in block.state_dict().items():
        assert torch.equal(value, state[key]), key

    unfuse(block)
    assert torch.equal(block(x), expected)
    assert {type(m) for m in block.modules()} == {type(m) for m in kind(4, 8, cfg).modules()}


def test_whole_models() -> None:
    torch.manual_seed(0)
    layers = (conv(stride=2), conv(stride=2))
    encoder = trained(Encoder(5, (3, 16, 16), ConvNetConfig((4, 8), layers), LinearConfig("Tanh")))
    resnet = ResNetConfig(4, 3, 3, "ReLU", "Tanh", 2, 2, 1, "batch")
    decoder = trained(Decoder(5, (3, 16, 16), resnet, LinearConfig("Tanh")))
    for module, x in ((encoder, torch.randn(3, 3, 16, 16)), (decoder, torch.randn(3, 5))):
        expected = module(x)
        count = sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())
        fusion = fuse_for_inference(module)
        assert len(fusion.folded) == count >= 2
        assert str(fusion) == f"batch norms: {count} folded, 0 kept"
        assert_same(module, x, expected)


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))


def test_what_stays_has_a_reason() -> None:
    module = nn.ModuleDict(
        {
            "padded": ConvNormActivation(3, 4, conv(norm_first=True)),
            "mixed": ConvNormActivation1d(4, 8, conv(scale_factor=-2)),
            "list": sequential(),
            "forgetful": ConvNormActivation(3, 4, conv(norm_cfg={"track_running_stats": False})),
            "in training": ConvNormActivation(3, 4, conv()),
            "group": ConvNormActivation(3, 4, conv(norm="group", norm_cfg={"num_groups": 2})),
        }
    ).eval()
    module["in training"].norm.train()
    shared = nn.Conv2d(4, 4, 1)
    module["first"] = nn.Sequential(shared, nn.BatchNorm2d(4)).eval()
    module["second"] = nn.Sequential(shared, nn.BatchNorm2d(4)).eval()
    fusion = fuse_for_inference(module)
    assert fusion.folded == ("list.1",)
    reasons = {
        "padded.norm": "it comes before a convolution that pads with zeros",
        "mixed.norm": "a shuffle mixes positions",
        "list.3": "no convolution is right before it",
        "forgetful.norm": "it keeps no running statistics",
        "in training.norm": "it is in training mode",
        "first.1": "its convolution is shared",
        "second.1": "its convolution is shared",
    }
    assert set(fusion.kept) == set(reasons)
    for name, reason in reasons.items():
        assert fusion.kept[name].startswith(reason), name
        assert f"  {name}: {reason}" in str(fusion)


def test_training_mode() -> None:
    module = sequential()
    with pytest.raises(ValueError, match=r"call module.eval\(\) first"):
        fuse_for_inference(module)
    x = torch.randn(2, 3, 5, 5)
    trained(module)
    twin = copy.deepcopy(module)
    fuse_for_inference(module)
    with pytest.warns(UserWarning, match=r"train\(\) has undone fuse_for_inference"):
        module.train()
    assert all(m.training for m in module.modules())
    assert torch.equal(module(x), twin.train()(x))
    module.eval()  # nothing left to warn of
    module.train()


def test_loading_folds_anew() -> None:
    x = torch.randn(2, 3, 5, 5)
    torch.manual_seed(1)
    other = trained(sequential())
    module = trained(sequential())
    fuse_for_inference(module)
    module.load_state_dict(other.state_dict())
    assert_same(module, x, other(x))


def test_copies() -> None:
    x = torch.randn(2, 3, 5, 5)
    module = trained(sequential())
    plain = module(x)
    fuse_for_inference(module)
    expected = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), expected)
        unfuse(twin)
        assert torch.equal(twin(x), plain)
        assert torch.equal(module(x), expected)
    fuse_for_inference(module)  # again: the same
    assert torch.equal(module(x), expected)
    unfuse(module)
    unfuse(module)


def test_compiled() -> None:
    module = trained(ConvNormActivation(4, 8, conv()))
    x = torch.randn(2, 4, 5, 7)
    expected = module(x)
    fuse_for_inference(module)
    assert_same(torch.compile(module, fullgraph=True, backend="eager"), x, expected)
