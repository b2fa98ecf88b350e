from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ml_networks import (
    ConvConfig,
    LinearConfig,
    MLPConfig,
    SpatialSoftmaxConfig,
    TransformerConfig,
)
from ml_networks.torch import (
    ConvNormActivation,
    ConvNormActivation1d,
    ConvTransposeNormActivation,
    ConvTransposeNormActivation1d,
    HorizonShuffle,
    HorizonUnShuffle,
    LinearNormActivation,
    MLPLayer,
    PatchEmbed,
    PositionalEncoding,
    ResidualBlock,
    SpatialSoftmax,
    TransformerLayer,
    get_norm,
)


def conv(**keywords: Any) -> ConvConfig:
    return ConvConfig(**{"kernel_size": 3, "stride": 1, "padding": 1} | keywords)


def test_the_documents_mlp() -> None:
    mlp_config = MLPConfig(
        hidden_dim=128,
        n_layers=2,
        output_activation="Tanh",
        linear_cfg=LinearConfig(
            activation="ReLU",
            bias=True,
            norm="none",
            norm_cfg={},
            norm_first=False,
            dropout=0.0,
        ),
    )
    x = torch.randn(32, 16)
    mlp = MLPLayer(16, 8, mlp_config)
    assert mlp(x).shape == (32, 8)
    assert MLPLayer(input_dim=16, output_dim=8, mlp_config=mlp_config).cfg is mlp_config
    with pytest.raises(TypeError, match=r"MLPLayer\(\) .*'hidden_dim'.*It takes: input_dim"):
        MLPLayer(16, 8, hidden_dim=4)
    with pytest.raises(TypeError, match="MLPLayer cfg must be MLPConfig, got LinearConfig"):
        MLPLayer(16, 8, LinearConfig("ReLU"))


def test_mlp_takes_omegaconf() -> None:
    cfg = OmegaConf.create(
        {
            "hidden_dim": 8,
            "n_layers": 1,
            "output_activation": "Tanh",
            "linear_cfg": {"activation": "ReLU", "norm": "layer", "norm_cfg": {"eps": 1e-3}},
        }
    )
    mlp = MLPLayer(4, 2, cfg)
    assert mlp.dense[0].norm.eps == 1e-3
    assert isinstance(mlp.dense[1].norm, nn.Identity)


def test_mlp_freezing() -> None:
    mlp = MLPLayer(4, 2, MLPConfig(8, 1, "Tanh", LinearConfig("CRReLU", "layer")))
    mlp.freeze_weights()
    frozen = {name for name, p in mlp.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in mlp.named_parameters() if name.endswith("weight")}
    mlp.unfreeze_weights()
    mlp.freeze_biases()
    frozen = {name for name, p in mlp.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in mlp.named_parameters() if name.endswith("bias")}
    mlp.unfreeze_biases()
    assert all(p.requires_grad for p in mlp.parameters())
    mlp.freeze()
    assert not any(p.requires_grad for p in mlp.parameters())
    assert not mlp.training
    mlp.unfreeze()
    assert all(p.requires_grad for p in mlp.parameters())
    assert mlp.training
    assert mlp.device == torch.device("cpu")
    assert mlp.to("meta").device == torch.device("meta")


def test_get_norm() -> None:
    x = torch.randn(4, 6)
    assert isinstance(get_norm("layer", normalized_shape=6, eps=1e-2), nn.LayerNorm)
    assert isinstance(get_norm("none", anything=1), nn.Identity)
    torch.testing.assert_close(
        get_norm("rms", normalized_shape=6, eps=0.0)(x),
        x / x.square().mean(-1, keepdim=True).sqrt(),
    )
    with pytest.raises(ValueError, match=r"got 'Layer'; did you mean 'layer'\?"):
        get_norm("Layer", normalized_shape=6)


def test_groups_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match=r'"num_groups": n\} with n a divisor of the 4 channels'):
        ConvNormActivation(3, 4, conv(norm="group"))
    with pytest.raises(ValueError, match=r"divisor of the 4 channels.*\{'num_groups': 3\}"):
        ConvNormActivation(3, 4, conv(norm="group", norm_cfg={"num_groups": 3}))


ACTIVATIONS = ["ReLU", "GLU"]
NORMS: list[dict[str, Any]] = [
    {},
    {"norm": "batch"},
    {"norm": "batch", "norm_first": True},
    {"norm": "group", "norm_cfg": {"num_groups": 1}},
    {"norm": "group", "norm_cfg": {"num_groups": 1}, "norm_first": True},
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: "-".join(map(str, n.values())) or "none")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale_factor", [-2, 0, 1, 3])
def test_convolutions_of_every_kind(
    norm: dict[str, Any], activation: str, scale_factor: int
) -> None:
    cfg = conv(activation=activation, scale_factor=scale_factor, dropout=0.1, **norm)
    ratio = {-2: 0.5, 0: 1, 1: 1, 3: 3}[scale_factor]
    image, line = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 6)
    expected = (2, 4, int(4 * ratio), int(6 * ratio))
    assert ConvNormActivation(3, 4, cfg)(image).shape == expected
    assert ConvNormActivation1d(3, 4, cfg)(line).shape == (2, 4, int(6 * ratio))
    if not norm:
        assert ConvNormActivation(3, 4, cfg)(image[0]).shape == expected[1:]
        assert ConvNormActivation1d(3, 4, cfg)(line[0]).shape == (4, int(6 * ratio))


def test_unshuffle_needs_enough_channels() -> None:
    with pytest.raises(ValueError, match=r"scale_factor=-2 .* 2 channels .* divisible by 4"):
        ConvNormActivation(3, 2, conv(scale_factor=-2))
    with pytest.raises(ValueError, match="divisible by 2"):
        ConvNormActivation1d(3, 3, conv(scale_factor=-2))


def test_the_order_of_convolution_norm_shuffle_activation() -> None:
    x = torch.randn(2, 3, 4, 6)
    layer = ConvNormActivation(3, 4, conv(norm="batch", scale_factor=2, activation="Tanh"))
    expected = nn.PixelShuffle(2)(layer.norm(layer.conv(x))).tanh()
    torch.testing.assert_close(layer(x), expected)
    first = ConvNormActivation(3, 4, conv(norm="batch", norm_first=True, activation="Tanh"))
    torch.testing.assert_close(first(x), first.conv(first.norm(x)).tanh())
    line = torch.randn(2, 3, 6)
    one = ConvNormActivation1d(3, 4, conv(norm="batch", scale_factor=2, activation="Tanh"))
    assert one.norm.num_features == 4
    torch.testing.assert_close(one(line), one.norm(HorizonShuffle(2)(one.conv(line))).tanh())


def test_horizon_shuffle_is_pixel_shuffle_in_one_dimension() -> None:
    x = torch.randn(2, 6, 5)
    shuffled = HorizonShuffle(3)(x)
    for c in range(2):
        for i in range(3):
            assert torch.equal(shuffled[:, c, i::3], x[:, 3 * c + i])
    assert torch.equal(HorizonUnShuffle(3)(shuffled), x)
    assert HorizonShuffle(3)(x.transpose(0, 1).contiguous().transpose(0, 1)).shape == (2, 2, 15)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_transposed_convolutions(activation: str) -> None:
    cfg = conv(activation=activation, stride=2, output_padding=1, norm="batch")
    assert ConvTransposeNormActivation(3, 4, cfg)(torch.randn(2, 3, 5, 4)).shape == (2, 4, 10, 8)
    assert ConvTransposeNormActivation1d(3, 4, cfg)(torch.randn(2, 3, 5)).shape == (2, 4, 10)
    layer = ConvTransposeNormActivation(3, 4, cfg, output_padding=(0, 1))
    assert layer(torch.randn(2, 3, 5, 4)).shape == (2, 4, 9, 8)


@pytest.mark.parametrize("cls", [ConvTransposeNormActivation, ConvTransposeNormActivation1d])
def test_output_padding_must_be_below_the_stride(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"output_padding below stride=2 or dilation=1, got \(2"):
        cls(3, 4, conv(stride=2, output_padding=2))


def test_the_documents_residual_block() -> None:
    cfg = ConvConfig(kernel_size=3, stride=1, padding=1, activation="ReLU", norm="batch")
    block = ResidualBlock(in_channels=64, out_channels=64, conv_cfg=cfg)
    assert block(torch.randn(4, 64, 32, 32)).shape == (4, 64, 32, 32)
    assert isinstance(block.shortcut, nn.Identity)


def test_both_forms_of_a_residual_block_are_one() -> None:
    torch.manual_seed(0)
    old = ResidualBlock(4, 3, "SiLU", "group", {"num_groups": 2}, 0.0, "reflect")
    cfg = conv(activation="SiLU", norm="group", norm_cfg={"num_groups": 2}, padding_mode="reflect")
    new = ResidualBlock(in_channels=4, conv_cfg=cfg)
    new.load_state_dict(old.state_dict(), strict=True)
    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(old(x), new(x))


@pytest.mark.parametrize("activation", ["ReLU", "GLU", "SwiGLU"])
def test_residual_blocks(activation: str) -> None:
    x = torch.randn(2, 4, 6, 8)
    block = ResidualBlock(4, 3, activation)
    inner = block.conv_block(x)
    expected = x + inner if "GLU" in activation else (x + inner).relu()
    torch.testing.assert_close(block(x), expected)
    strided = ResidualBlock(
        in_channels=4, out_channels=6, conv_cfg=conv(stride=2, activation=activation)
    )
    assert strided(x).shape == (2, 6, 3, 4)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({}, TypeError, "either in_features or in_channels"),
        ({"in_features": 4, "in_channels": 4}, TypeError, "either in_features or in_channels"),
        ({"in_features": 4}, TypeError, "either kernel_size or conv_cfg"),
        ({"in_features": 4, "kernel_size": 2}, ValueError, "odd kernel_size, got kernel_size=2"),
        ({"in_channels": 4, "conv_cfg": conv(padding=0)}, ValueError, "padding=0"),
        ({"in_channels": 4, "conv_cfg": conv(scale_factor=2)}, ValueError, "scale_factor 0"),
        ({"in_chanels": 4, "kernel_size": 3}, TypeError, "did you mean 'in_channels'"),
    ],
)
def test_wrong_residual_blocks(
    keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ResidualBlock(**keywords)


def test_the_documents_transformer() -> None:
    cfg = TransformerConfig(
        d_model=256,
        nhead=8,
        dim_ff=512,
        n_layers=4,
        dropout=0.1,
        hidden_activation="GELU",
        output_activation="GELU",
    )
    assert TransformerLayer(16, 8, cfg)(torch.randn(2, 5, 16)).shape == (2, 5, 8)


def test_transformer_layers_start_different_and_have_no_dead_copy() -> None:
    layer = TransformerLayer(8, 8, TransformerConfig(8, 2, 16, 2))
    first, second = (block.linear1.weight for block in layer.transformer.layers)
    assert not torch.equal(first, second)
    assert not any("transformer_layer" in name for name in layer.state_dict())
    TransformerLayer(5, 8, TransformerConfig(8, 2, 16, 1))(torch.randn(2, 3, 5)).sum().backward()


def test_transformer_loads_the_dead_layer_of_0_2_6_but_no_other_stray_key() -> None:
    cfg = TransformerConfig(8, 2, 16, 1)
    net = nn.Sequential(TransformerLayer(8, 8, cfg))
    state = net.state_dict()
    net.load_state_dict(state | {"0.transformer_layer.linear1.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*0.transfomer.weight"):
        net.load_state_dict(state | {"0.transfomer.weight": torch.zeros(1)})


@pytest.mark.parametrize("hidden", ["ReLU", "GELU", "SiLU", "CRReLU"])
def test_transformer_activations_in_both_modes(hidden: str) -> None:
    layer = TransformerLayer(8, 0, TransformerConfig(8, 2, 16, 2, 0.0, hidden, "Identity"))
    x = torch.randn(2, 3, 8)
    training = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), training)


def test_transformer_output_may_be_gated_but_hidden_may_not() -> None:
    cfg = TransformerConfig(8, 2, 16, 1, output_activation="GLU")
    assert TransformerLayer(8, 6, cfg)(torch.randn(2, 3, 8)).shape == (2, 3, 6)
    with pytest.raises(ValueError, match="hidden_activation that keeps the width, got 'GLU'"):
        TransformerLayer(8, 6, TransformerConfig(8, 2, 16, 1, hidden_activation="GLU"))


def test_the_documents_positional_encoding() -> None:
    pos_enc = PositionalEncoding(d_model=256, max_len=512)
    x = torch.randn(4, 100, 256)
    out = pos_enc(x)
    assert out.shape == (4, 100, 256)
    code = (out - x)[0]
    angle = 7 / 10000 ** (2 * 3 / 256)
    expected = torch.tensor([math.sin(angle), math.cos(angle)])
    torch.testing.assert_close(code[7, 6:8], expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="max_len=512, got a sequence of 513"):
        pos_enc(torch.randn(1, 513, 256))


def test_positional_encoding_of_an_odd_width() -> None:
    encoding = PositionalEncoding(5, 0.0, 10)
    wide = PositionalEncoding(5, 0.5, 20)
    assert encoding(torch.zeros(1, 10, 5)).shape == (1, 10, 5)
    assert torch.equal(encoding.pe, wide.pe[:, :10])
    assert not torch.equal(wide(torch.ones(2, 9, 5)), torch.ones(2, 9, 5) + wide.pe[:, :9])


def test_the_documents_patch_embedding() -> None:
    patch_embed = PatchEmbed(in_channels=3, patch_size=16, embed_dim=256)
    assert patch_embed(torch.randn(4, 3, 64, 64)).shape == (4, 16, 256)
    assert patch_embed(torch.randn(4, 3, 32, 48)).shape == (4, 6, 256)
    with pytest.raises(ValueError, match=r"divisible by patch_size=16, got \(4, 3, 64, 60\)"):
        patch_embed(torch.randn(4, 3, 64, 60))


def test_patch_embedding_is_a_linear_map_of_each_patch() -> None:
    embed = PatchEmbed(5, 2, (3, 4, 6))
    x = torch.randn(1, 3, 4, 6)
    patch = x[0, :, 2:4, 4:6].flatten()
    weight, bias = embed.patch_emb_layer.weight.flatten(1), embed.patch_emb_layer.bias
    torch.testing.assert_close(embed(x)[0, 5], weight @ patch + bias)
    with pytest.raises(TypeError, match="needs obs_shape or in_channels"):
        PatchEmbed(5, 2)
    with pytest.raises(ValueError, match="in_channels=4 and obs_shape"):
        PatchEmbed(5, 2, (3, 4, 6), in_channels=4)
    with pytest.raises(ValueError, match=r"divisible by patch_size=4, got \(3, 4, 6\)"):
        PatchEmbed(5, 4, (3, 4, 6))


def test_spatial_softmax_finds_a_peak() -> None:
    x = torch.full((1, 2, 5, 9), -1e4)
    x[0, 0, 0, 8] = 1e4
    x[0, 1, 2, 4] = 1e4
    expected = torch.tensor([[[1.0, -1.0], [0.0, 0.0]]])
    for cfg in (SpatialSoftmaxConfig(), SpatialSoftmaxConfig(is_argmax=True)):
        torch.testing.assert_close(SpatialSoftmax(cfg)(x), expected)


@pytest.mark.parametrize(
    "cfg",
    [
        SpatialSoftmaxConfig(0.5, is_argmax=True),
        SpatialSoftmaxConfig(0.5, is_straight_through=True),
    ],
    ids=["argmax", "straight-through"],
)
def test_spatial_argmax_is_straight_through(cfg: SpatialSoftmaxConfig) -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    position = SpatialSoftmax(cfg)(x)
    index = x.flatten(2).argmax(-1)
    columns, rows = torch.linspace(-1, 1, 5), torch.linspace(-1, 1, 4)
    expected = torch.stack([columns[index % 5], rows[index // 5]], -1).double()
    torch.testing.assert_close(position, expected)
    cotangent = torch.randn_like(position)
    (gradient,) = torch.autograd.grad(position, x, cotangent)
    soft = SpatialSoftmax(SpatialSoftmaxConfig(0.5))(x)
    torch.testing.assert_close(gradient, torch.autograd.grad(soft, x, cotangent)[0])


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (lambda: LinearNormActivation(3, 4, LinearConfig("SwiGLU", "rms", norm_first=True)), (3,)),
        (lambda: MLPLayer(3, 2, MLPConfig(4, 2, "Tanh", LinearConfig("SiLU", "layer"))), (3,)),
        (lambda: ConvNormActivation(2, 4, conv(norm="batch", activation="GLU")), (2, 3, 4)),
        (lambda: ConvNormActivation1d(2, 4, conv(scale_factor=2, activation="Tanh")), (2, 4)),
        (lambda: ConvTransposeNormActivation(2, 3, conv(stride=2, activation="ELU")), (2, 2, 3)),
        (lambda: ResidualBlock(2, 3, "SiLU"), (2, 3, 3)),
        (lambda: TransformerLayer(3, 2, TransformerConfig(4, 2, 6, 1, 0.0)), (3, 3)),
        (lambda: SpatialSoftmax(SpatialSoftmaxConfig(0.7)), (2, 3, 4)),
        (lambda: PatchEmbed(3, 2, (2, 4, 4)), (2, 4, 4)),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_gradcheck(module: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = module().double()
    x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_strides_and_empty_batches() -> None:
    torch.manual_seed(0)
    layer = ConvNormActivation(3, 4, conv(norm="group", norm_cfg={"num_groups": 2}))
    x = torch.randn(2, 4, 6, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    torch.testing.assert_close(layer(x[:, :, ::2]), layer(x[:, :, ::2].contiguous()))
    assert MLPLayer(3, 2, MLPConfig(4, 1, "Tanh", LinearConfig("ReLU")))(
        torch.randn(0, 3)
    ).shape == (0, 2)


@pytest.mark.parametrize("factor", [2, -2])
def test_pixel_shuffles_of_an_empty_batch(factor: int) -> None:
    cfg = ConvConfig("ReLU", 3, 1, 1, scale_factor=factor)
    layer = ConvNormActivation(4, 8, cfg)
    x = torch.zeros(0, 4, 6, 8, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, *layer(torch.zeros(1, 4, 6, 8)).shape[1:])
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(parameter.grad is not None for parameter in layer.parameters())
