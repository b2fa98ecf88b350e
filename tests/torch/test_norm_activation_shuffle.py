"""What follows a convolution as one op, as on a GPU, against its separate steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn  # noqa: E402

from ml_networks.config import ConvConfig  # noqa: E402
from ml_networks.torch import layers, unet  # noqa: E402

GROUP = {"norm": "group", "norm_cfg": {"num_groups": 2}}
Options = dict[str, Any]


def config(**options: Any) -> ConvConfig:
    return ConvConfig(**{"kernel_size": 3, "stride": 1, "padding": 1, **options})


def varied(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def same_in_one_op(module: Any, *inputs: torch.Tensor) -> None:
    """Outputs, gradients and buffers, training and not."""
    assert module._is_one_op()
    for training in (True, False):
        steps = varied(module).train(training)
        whole = copy.deepcopy(steps)
        exact, found = steps(*inputs), whole._one_op(*inputs)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
        for result, made in ((exact, steps), (found, whole)):
            made.zero_grad()
            result.square().sum().backward()
        for (name, one), other in zip(steps.named_parameters(), whole.parameters(), strict=True):
            scale = one.grad.abs().max().item()
            torch.testing.assert_close(
                other.grad, one.grad, rtol=1e-3, atol=1e-4 * (1 + scale), msg=name
            )
        torch.testing.assert_close(dict(whole.named_buffers()), dict(steps.named_buffers()))


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "ReLU", "norm": "batch"},
        {"activation": "SwiGLU", "scale_factor": 2, **GROUP},
        {"activation": "Mish", "norm": "batch", "scale_factor": -2, "bias": False},
        {"activation": "SiLU", "norm": "batch", "norm_cfg": {"affine": False, "momentum": 0.3}},
        {"activation": "ELU", "norm": "batch", "norm_cfg": {"track_running_stats": False}},
        {"activation": "GELU", "norm": "group", "norm_cfg": {"num_groups": 4, "eps": 0.1}},
    ],
    ids=str,
)
def test_convolutions(options: Options) -> None:
    layer = layers.ConvNormActivation(3, 4, config(**options))
    same_in_one_op(layer, torch.randn(2, 3, 4, 6))


@pytest.mark.parametrize(
    "module",
    [
        layers.ConvNormActivation1d(3, 4, config(norm="batch", activation="SiLU")),
        layers.ConvNormActivation1d(3, 4, config(**GROUP, activation="GLU", scale_factor=2)),
        layers.ConvNormActivation1d(
            3, 4, config(norm="batch", activation="Tanh", scale_factor=-2)
        ),
        layers.ConvTransposeNormActivation1d(3, 4, config(norm="batch", activation="ReLU")),
    ],
    ids=lambda module: f"{type(module).__name__}{module.cfg.scale_factor}",
)
def test_in_one_dimension(module: nn.Module) -> None:
    same_in_one_op(module, torch.randn(3, 3, 8))


def test_transposed() -> None:
    layer = layers.ConvTransposeNormActivation(3, 4, config(**GROUP, activation="SwiGLU"))
    same_in_one_op(layer, torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "ReLU", "norm": "batch"},
        {"activation": "SwiGLU", **GROUP},
        {"activation": "SiLU", "norm": "none"},
        {"activation": "GELU", "norm": "group", "norm_cfg": {"num_groups": 1}, "stride": 2},
    ],
    ids=str,
)
def test_residual_blocks(options: Options) -> None:
    strided = options.get("stride", 1) > 1
    block = layers.ResidualBlock(
        in_channels=4, out_channels=6 if strided else 4, conv_cfg=config(**options)
    )
    same_in_one_op(block, torch.randn(2, 4, 6, 4))


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("sides", [1, 2])
def test_conditional_residual_blocks(sides: int, scales: bool) -> None:
    made = unet.ConditionalResidualBlock1d if sides == 1 else unet.ConditionalResidualBlock2d
    block = made(4, 6, 5, config(**GROUP, activation="SiLU"), scales)
    same_in_one_op(block, torch.randn(2, 4, *[6] * sides), torch.randn(2, 5))


def test_dropout_is_drawn_while_training_alone() -> None:
    cfg = config(norm="batch", activation="Identity", dropout=0.25, scale_factor=2)
    layer = layers.ConvNormActivation(3, 4, cfg)
    x = torch.randn(4, 3, 8, 8)
    whole = layer._one_op(x)
    assert abs((whole == 0).float().mean() - 0.25) < 0.05
    layer.eval()
    assert not (layer._one_op(x) == 0).any()


@pytest.mark.parametrize(
    "change",
    ["hook", "sync", "activation", "dropout", "weight", "momentum", "shuffle", "norm first"],
)
def test_a_changed_layer_keeps_to_its_steps(change: str) -> None:
    layer: Any = layers.ConvNormActivation(4, 4, config(norm="batch", activation="ReLU"))
    assert layer._is_one_op()
    if change == "hook":
        layer.norm.register_forward_hook(lambda module, inputs, output: output)
    elif change == "sync":
        layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
        assert type(layer.norm) is nn.SyncBatchNorm
    elif change == "activation":
        layer = layers.ConvNormActivation(4, 4, config(norm="batch", activation="PReLU"))
    elif change == "dropout":
        layer.dropout = nn.Dropout(1.0)
    elif change == "weight":
        del layer.norm.weight
        layer.norm.weight = torch.ones(4)
    elif change == "momentum":
        layer.norm.momentum = None
    elif change == "shuffle":
        layer.pixel_shuffle = nn.Upsample(scale_factor=2)
    else:
        layer = layers.ConvNormActivation(
            4, 4, config(norm="batch", activation="ReLU", norm_first=True)
        )
    assert not layer._is_one_op()


@pytest.mark.parametrize("change", ["hook", "block", "norm first", "activation"])
def test_a_changed_residual_block_keeps_to_its_steps(change: str) -> None:
    block: Any = layers.ResidualBlock(4, 3, "ReLU", "batch")
    assert block._is_one_op()
    if change == "hook":
        block.conv_block[1].register_forward_hook(lambda module, inputs, output: output)
    elif change == "block":
        block.conv_block.append(nn.Identity())
    elif change == "norm first":
        cfg = config(norm="batch", activation="ReLU", norm_first=True)
        block = layers.ResidualBlock(in_channels=4, conv_cfg=cfg)
    else:
        block.activation = nn.Sigmoid()
    assert not block._is_one_op()


# Tracing an autograd.Function, torch._dynamo instantiates it, which torch.autograd deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_blocks_of_one_ops_compile_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (layers.ConvNormActivation, layers.ResidualBlock):
        monkeypatch.setattr(made, "forward", made._one_op)
    cfg = config(norm="batch", activation="SiLU", scale_factor=2)
    model = nn.Sequential(
        layers.ResidualBlock(4, 3, "SiLU", "batch"), layers.ConvNormActivation(4, 2, cfg)
    )
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in (2, 3):
        x = torch.randn(batch, 4, 5, 3)
        torch.testing.assert_close(compiled(x), other(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(model.named_buffers()), dict(other.named_buffers()))
