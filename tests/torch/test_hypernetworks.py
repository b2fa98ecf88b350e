from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ml_networks.config import LinearConfig, MLPConfig
from ml_networks.torch import HyperNet
from ml_networks.torch.hypernetworks import (
    HyperNetMixin,
    encode_input,
    initialize_bias,
    initialize_layer,
    initialize_weight,
)

MLP = MLPConfig(12, 1, "Identity", LinearConfig("ReLU"))
SHAPES = {"weight": (3, 2), "bias": (3,)}


def _targets() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    return {
        "linear": (nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)), (5,)),
        "sequence": (nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)), (3, 5)),
        "images": (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)
            ),
            (2, 4, 4),
        ),
        "signals": (nn.Conv1d(2, 4, 3, padding=2, dilation=2, groups=2, bias=False), (2, 7)),
        "transposed": (nn.ConvTranspose2d(2, 3, 4, 2, 1), (2, 3, 3)),
    }


@pytest.mark.parametrize("encoding", [None, "cos|sin", "z|1-z"])
@pytest.mark.parametrize("target", _targets())
def test_equals_a_loop_over_samples(target: str, encoding: Any) -> None:
    net, shape = _targets()[target]
    hypernet = HyperNet(target_net=net, input_dim=4, mlp_cfg=MLP, input_mode=encoding).double()
    x, condition = torch.randn(3, *shape).double(), torch.rand(3, 4).double()
    weights = hypernet.generate(condition)
    expected = [
        functional_call(net, {name: value[i] for name, value in weights.items()}, (x[i : i + 1],))
        for i in range(3)
    ]
    torch.testing.assert_close(hypernet(x, condition), torch.cat(expected))
    x.requires_grad_()
    assert torch.autograd.gradcheck(hypernet, (x, condition.requires_grad_()), fast_mode=True)


def test_weights_are_the_targets_own_plus_what_is_made() -> None:
    net, _ = _targets()["linear"]
    hypernet = HyperNet(4, target_net=net)
    condition = torch.randn(2, 4)
    flat = torch.cat([value.flatten() for _, value in sorted(net.named_parameters())])
    made = torch.cat([value.flatten(1) for value in hypernet.generate(condition).values()], 1)
    torch.testing.assert_close(made, flat + hypernet.backbone(condition))


def test_batch_dimensions() -> None:
    net, _ = _targets()["linear"]
    hypernet = HyperNet(4, target_net=net)
    x, condition = torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    expected = hypernet(x.flatten(0, 1), condition.flatten(0, 1))
    torch.testing.assert_close(hypernet(x, condition).flatten(0, 1), expected)
    torch.testing.assert_close(hypernet(x[0, 0], condition[0, 0]), expected[0])
    rows = hypernet(x, condition[:, 0])  # one condition for the three rows of a sample
    torch.testing.assert_close(rows[:, 0], hypernet(x[:, 0], condition[:, 0]))


@pytest.mark.parametrize("target", ["linear", "images", "signals"])
def test_empty_batch(target: str) -> None:
    net, shape = _targets()[target]
    output = HyperNet(4, target_net=net)(torch.zeros(0, *shape), torch.zeros(0, 4))
    output.sum().backward()
    assert output.shape == (0, *net(torch.zeros(1, *shape)).shape[1:])
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("cfg", [None, MLP])
def test_starts_at_the_scale_of_the_target(cfg: MLPConfig | None) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(100, 400), nn.ReLU(), nn.Linear(400, 50))
    hypernet = HyperNet(16, target_net=net, fc_cfg=cfg)
    with torch.no_grad():
        weights = hypernet.generate(torch.randn(8, 16))
    for name, own in net.named_parameters():
        change = float((weights[name] - own).detach().std() / own.detach().std())
        assert 0.02 < change < 0.5, name
    shapes = {name: tuple(own.shape) for name, own in net.named_parameters()}
    made = HyperNet(16, shapes, cfg)(torch.randn(8, 16))
    for name, own in net.named_parameters():
        assert 0.8 < float(made[name].detach().std() / own.detach().std()) < 1.3, name


@pytest.mark.parametrize("encoding", [None, "cos|sin", "z|1-z"])
def test_makes_named_tensors(encoding: Any) -> None:
    torch.manual_seed(0)
    hypernet = HyperNet(4, SHAPES, MLP, encoding)
    condition = torch.rand(2, 5, 4)
    made = hypernet(condition)
    flat = hypernet.backbone(encode_input(condition, encoding))
    torch.testing.assert_close(made["weight"], flat[..., :6].reshape(2, 5, 3, 2))
    torch.testing.assert_close(made["bias"], flat[..., 6:])


def test_a_state_dict_gives_the_shapes() -> None:
    target = nn.Linear(10, 5)
    made = HyperNet(128, target.state_dict(), MLP)(torch.randn(2, 128))
    assert {name: tuple(value.shape) for name, value in made.items()} == {
        "weight": (2, 5, 10),
        "bias": (2, 5),
    }


def test_encode_input() -> None:
    z = torch.tensor([[0.0, 0.25, 1.0]], dtype=torch.float64)
    c, s = math.cos(math.pi / 8), math.sin(math.pi / 8)
    angle = torch.tensor([[1.0, c, 0.0, 0.0, s, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(encode_input(z), angle)
    complement = torch.tensor([[0.0, 0.25, 1.0, 1.0, 0.75, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(encode_input(z, "z|1-z"), complement)
    assert encode_input(z, None) is z
    with pytest.raises(ValueError, match=r"did you mean 'cos\|sin'"):
        encode_input(z, "cos,sin")  # type: ignore[arg-type]


class _Named(HyperNetMixin):
    def __init__(self) -> None:
        self.input_shapes = {"x": (2,), "y": (3,)}
        self.output_shapes = {"a": (2, 2), "b": (3,)}
        self.encoding = "cos|sin"


def test_mixin() -> None:
    named = _Named()
    assert named.flat_input_size() == 10
    assert named.flat_output_size() == 7
    assert named.output_offsets() == {"a": (0, 4), "b": (4, 3)}
    inputs = {"y": torch.ones(4, 3), "x": torch.zeros(4, 2)}
    assert torch.equal(named.flatten_inputs(inputs), torch.tensor([[0.0, 0, 1, 1, 1]] * 4))
    assert named.flatten_inputs({"x": torch.zeros(2), "y": torch.ones(3)}).shape == (1, 5)
    assert named.encode_inputs(inputs)["y"].shape == (4, 6)
    outputs = named.unflatten_output(torch.arange(14.0).reshape(2, 7))
    assert torch.equal(outputs["a"][1], torch.tensor([[7.0, 8], [9, 10]]))
    assert torch.equal(outputs["b"][0], torch.tensor([4.0, 5, 6]))
    for wrong, message in (
        ({"x": torch.zeros(4, 2)}, "must be named"),
        ({"x": torch.zeros(4, 3), "y": torch.ones(4, 3)}, "input 'x' must have shape"),
        ({"x": torch.zeros(3, 2), "y": torch.ones(4, 3)}, "different batch sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            named.flatten_inputs(wrong)


FAN = {"fan_in": 300, "fan_out": 200}


@pytest.mark.parametrize(
    ("distribution", "variance"),
    [
        ("kaiming_normal", 1 / 300),
        ("kaiming_uniform", 1 / 300),
        ("kaiming_normal_fanout", 1 / 200),
        ("kaiming_uniform_fanout", 1 / 200),
        ("glorot_normal", 2 / 500),
        ("glorot_uniform", 2 / 500),
        ("orthogonal", 1 / 300),
    ],
)
@pytest.mark.parametrize(
    ("nonlinearity", "gain"),
    [("LeakyReLU", 2**0.5), ("SiLU", 2**0.5), ("Tanh", 5 / 3), ("SELU", 0.75), (None, 1.0)],
)
def test_weight_distributions(
    distribution: str, variance: float, nonlinearity: str | None, gain: float
) -> None:
    torch.manual_seed(0)
    weight = torch.empty(200, 300)
    initialize_weight(weight, distribution, nonlinearity)
    # 60,000 draws: the standard deviation is known to 0.3 %.
    assert weight.std().item() == pytest.approx(gain * math.sqrt(variance), rel=0.015)
    assert weight.mean().abs() < 0.002
    if "uniform" in distribution:
        assert weight.max() <= gain * math.sqrt(3 * variance) + 1e-6


def test_weights_of_convolutions_and_layers() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(40, 50, 3)
    initialize_layer(layer, "kaiming_normal", 0.1)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 360), rel=0.03)
    assert torch.all(layer.bias == 0.1)
    before = layer.weight.clone()
    initialize_layer(layer, None, None)
    assert torch.equal(layer.weight, before)
    initialize_layer(nn.Linear(2, 3, bias=False), "zeros")
    with pytest.raises(TypeError, match="linear or convolution layer, got BatchNorm2d"):
        initialize_layer(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="did you mean 'kaiming_normal'"):
        initialize_weight(torch.empty(2, 3), "kaiming_norm")
    with pytest.raises(ValueError, match="a number or None, got 'invalid'"):
        initialize_bias(torch.empty(3), "invalid")  # type: ignore[arg-type]


def test_dropout_differs_between_samples() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5))
    hypernet = HyperNet(2, target_net=net)
    x, condition = torch.ones(2, 3), torch.ones(2, 2)
    dropped = hypernet(x, condition) == 0
    assert not torch.equal(dropped[0], dropped[1])


def _wrong_calls() -> dict[str, tuple[type[Exception], str, Any]]:
    net, x = nn.Linear(3, 2), torch.zeros(4, 3)
    made, run = HyperNet(5, SHAPES), HyperNet(5, target_net=net)
    condition: Tensor = torch.zeros(4, 5)
    return {
        "neither": (TypeError, "not neither", lambda: HyperNet(5)),
        "both": (TypeError, "not both", lambda: HyperNet(5, SHAPES, target_net=net)),
        "no parameters": (ValueError, "no parameters", lambda: HyperNet(5, target_net=nn.ReLU())),
        "encoding": (ValueError, "encoding must be", lambda: HyperNet(5, SHAPES, encoding="z")),  # type: ignore[arg-type]
        "keyword": (TypeError, "did you mean 'mlp_cfg'", lambda: HyperNet(5, SHAPES, mlp_cgf=MLP)),  # type: ignore[call-arg]
        "no target": (TypeError, "has no target_net", lambda: made(x, condition)),
        "no condition": (TypeError, r"called as hypernet\(x, condition\)", lambda: run(x)),
        "width": (ValueError, r"\(\*batch, 5\), got \(4, 3\)", lambda: run(x, x)),
        "batch": (ValueError, "share their batch", lambda: run(x, condition[:3])),
    }


@pytest.mark.parametrize("wrong", _wrong_calls())
def test_wrong_arguments(wrong: str) -> None:
    error, message, call = _wrong_calls()[wrong]
    with pytest.raises(error, match=message):
        call()
