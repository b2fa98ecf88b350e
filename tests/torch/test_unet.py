from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from ml_networks.config import ConvConfig, LinearConfig, MLPConfig, UNetConfig
from ml_networks.torch import ConditionalUnet1d, ConditionalUnet2d
from ml_networks.torch.unet import (
    ConditionalResidualBlock1d,
    ConditionalResidualBlock2d,
    HyperConditionalResidualBlock1d,
    HyperConditionalResidualBlock2d,
)

MLP = MLPConfig(6, 1, "Identity", LinearConfig("SiLU"))


def _conv(**keywords: Any) -> ConvConfig:
    return ConvConfig(
        **{"activation": "SiLU", "kernel_size": 3, "stride": 1, "padding": 1} | keywords
    )


def _inputs(*shape: int, batch: tuple[int, ...] = (2,)) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(*batch, *shape), torch.randn(*batch, 3)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention": {"has_attn": True, "nhead": 2},
    "hypernet": {"use_hypernet": True, "hyper_mlp_cfg": MLP},
    "both": {"has_attn": True, "nhead": 2, "use_hypernet": True, "use_shuffle": True},
}


@pytest.mark.parametrize("shape", [(2, 4), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(shape: tuple[int, ...], variant: str) -> None:
    torch.manual_seed(0)
    cls = ConditionalUnet1d if len(shape) == 2 else ConditionalUnet2d
    unet = cls(3, shape, UNetConfig((2, 4), _conv(), **VARIANTS[variant])).double()
    x, cond = (value.double().requires_grad_() for value in _inputs(*shape))
    assert torch.autograd.gradcheck(unet, (x, cond), fast_mode=True)
    unet(x, cond).sum().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_and_conditions_are_told_apart(variant: str) -> None:
    torch.manual_seed(0)
    unet = ConditionalUnet2d(3, (2, 4, 4), UNetConfig((4, 6), _conv(), **VARIANTS[variant]))
    x, cond = _inputs(2, 4, 4)
    together = unet(x, cond)
    alone = torch.cat([unet(x[i : i + 1], cond[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(unet(x, cond.flip(0)), together, atol=1e-4)


def test_attention_is_in_every_level() -> None:
    unet = ConditionalUnet2d(3, (2, 8, 8), UNetConfig((4, 6, 8), _conv(), has_attn=True, nhead=2))
    layers = [name for name, _ in unet.named_parameters() if name.endswith("qkv.conv.weight")]
    levels = [
        "mid_modules",
        "up_modules.0",
        "up_modules.1",
        *(f"down_modules.{i}" for i in range(3)),
    ]
    assert layers == [f"{level}.1.qkv.conv.weight" for level in levels]


@pytest.mark.parametrize("cls", [ConditionalUnet1d, ConditionalUnet2d])
def test_batch_dimensions_and_a_list_as_shape(cls: Any) -> None:
    torch.manual_seed(0)
    shape = [2, 4] if cls is ConditionalUnet1d else [2, 4, 6]
    unet = cls(3, shape, UNetConfig([4, 6], _conv()))
    x, cond = _inputs(*shape, batch=(2, 3))
    flat = unet(x.flatten(0, 1), cond.flatten(0, 1))
    torch.testing.assert_close(unet(x, cond).flatten(0, 1), flat)
    torch.testing.assert_close(unet(x[0, 0], cond[0, 0]), flat[0])
    assert unet(x[:0], cond[:0]).shape == (0, 3, *shape)


# Without shuffles: torch's own pixel_unshuffle returns an empty batch as it came.
@pytest.mark.parametrize("variant", ["plain", "attention", "hypernet"])
def test_empty_batch(variant: str) -> None:
    unet = ConditionalUnet2d(3, (2, 4, 4), UNetConfig((4, 6), _conv(), **VARIANTS[variant]))
    output = unet(*_inputs(2, 4, 4, batch=(0,)))
    output.sum().backward()
    assert output.shape == (0, 2, 4, 4)
    assert all(parameter.grad is not None for parameter in unet.parameters())


@pytest.mark.parametrize("variant", ["plain", "hypernet"])
def test_batch_norm(variant: str) -> None:
    torch.manual_seed(0)
    unet = ConditionalUnet1d(
        3, (2, 4), UNetConfig((4, 6), _conv(norm="batch"), **VARIANTS[variant])
    )
    before = copy.deepcopy(dict(unet.named_buffers()))
    unet(*_inputs(2, 4))
    changed = [not torch.equal(value, before[name]) for name, value in unet.named_buffers()]
    assert len(changed) > 0
    assert all(changed)


BLOCKS = [
    (HyperConditionalResidualBlock1d, (4, 7), {}),
    (HyperConditionalResidualBlock1d, (4, 5), {"padding_mode": "circular", "bias": False}),
    (HyperConditionalResidualBlock2d, (4, 5, 3), {"norm": "group", "norm_cfg": {"num_groups": 2}}),
    (HyperConditionalResidualBlock2d, (4, 4, 6), {"groups": 2, "padding_mode": "reflect"}),
    (
        HyperConditionalResidualBlock2d,
        (4, 4, 5),
        {"activation": "GLU", "dilation": 2, "padding": 2},
    ),
]


@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: f"{case[0].__name__}-{case[2]}")
def test_hypernetwork_block_equals_a_loop_over_samples(case: Any) -> None:
    """Each sample through ordinary convolutions that hold the weights made for it."""
    cls, shape, keywords = case
    torch.manual_seed(0)
    block = cls(shape[0], 6, 3, _conv(**keywords), MLP).double()
    x, cond = (value.double() for value in _inputs(*shape, batch=(3,)))
    expected = []
    for sample in range(3):
        made = {name: value[sample] for name, value in block.hyper_net(cond).items()}
        hidden = x[sample : sample + 1]
        for name in ("first_conv", "last_conv"):
            layer = block.get_submodule(name)
            own = dict(layer.named_parameters(prefix=name))
            weights = {
                key.removeprefix(f"{name}."): own[key] + value
                for key, value in made.items()
                if key.startswith(name)
            }
            hidden = functional_call(layer, weights, (hidden,))
        expected.append(hidden + block.residual_conv(x[sample : sample + 1]))
    torch.testing.assert_close(block(x, cond), torch.cat(expected))


def test_hypernetwork_block_starts_near_its_own_weights() -> None:
    torch.manual_seed(0)
    block = HyperConditionalResidualBlock2d(16, 16, 3, _conv(), MLP)
    x, cond = _inputs(16, 8, 8, batch=(16,))
    plain = block.last_conv(block.first_conv(x)) + block.residual_conv(x)
    change = float((block(x, cond) - plain).detach().std() / plain.detach().std())
    assert 0.005 < change < 0.5


@pytest.mark.parametrize("cls", [ConditionalResidualBlock1d, HyperConditionalResidualBlock2d])
def test_convolutions_that_change_the_size(cls: Any) -> None:
    for wrong in ({"stride": 2}, {"padding": 0}, {"kernel_size": 4}, {"scale_factor": 2}):
        with pytest.raises(ValueError, match=f"{cls.__name__} needs a convolution that keeps"):
            cls(4, 4, 3, _conv(**wrong))


def test_scale_of_the_condition() -> None:
    torch.manual_seed(0)
    block = ConditionalResidualBlock2d(4, 6, 3, _conv(), cond_predict_scale=True)
    x, cond = _inputs(4, 5, 3)
    code = block.cond_encoder[0](cond)[:, :, None, None]
    hidden = code[:, :6] * block.first_conv(x) + code[:, 6:]
    expected = block.last_conv(hidden) + block.residual_conv(x)
    torch.testing.assert_close(block(x, cond), expected)


def test_wrong_arguments() -> None:
    cfg = UNetConfig((4, 6, 8), _conv())
    with pytest.raises(ValueError, match=r"multiples of 4, got \(3, 18, 16\)"):
        ConditionalUnet2d(3, (3, 18, 16), cfg)
    with pytest.raises(ValueError, match=r"must be \(channels, length\), got \(3, 16, 16\)"):
        ConditionalUnet1d(3, (3, 16, 16), cfg)
    with pytest.raises(ValueError, match=r"nhead=3 does not divide the 4 channels"):
        ConditionalUnet2d(3, (3, 16, 16), UNetConfig((4, 6), _conv(), has_attn=True, nhead=3))
    with pytest.raises(TypeError, match="did you mean 'feature_dim'"):
        ConditionalUnet2d(feature_dims=3, obs_shape=(3, 16, 16), cfg=cfg)


def test_wrong_inputs() -> None:
    unet = ConditionalUnet2d(3, (2, 4, 4), UNetConfig((4, 6), _conv()))
    x, cond = _inputs(2, 4, 4)
    with pytest.raises(ValueError, match=r"expects base of shape \(\*batch, 2, 4, 4\), got"):
        unet(x[..., :2], cond)
    for wrong in (cond[:, :2], cond[:1], cond[None]):
        with pytest.raises(ValueError, match=r"expects cond of shape \(2, 3\)"):
            unet(x, wrong)


def test_documented_size_runs_with_attention() -> None:
    """64 x 64 at full resolution: a stored score matrix would take 4 heads x 4096^2 numbers."""
    torch.manual_seed(0)
    cfg = UNetConfig((8, 16), _conv(), has_attn=True, nhead=4)
    unet = ConditionalUnet2d(3, (3, 64, 64), cfg)
    with torch.no_grad():
        assert unet(*_inputs(3, 64, 64, batch=(1,))).isfinite().all()
