from __future__ import annotations

import copy
import pickle
from typing import Any

import hydra.utils
import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ml_networks import (
    AdaptiveAveragePoolingConfig,
    AttentionConfig,
    ConvConfig,
    ConvNetConfig,
    DecoderConfig,
    EncoderConfig,
    LinearConfig,
    MLPConfig,
    ResNetConfig,
    SpatialSoftmaxConfig,
    TransformerConfig,
    ViTConfig,
    conv_transpose_out,
)
from ml_networks._geometry import _transposed
from ml_networks.torch import (
    ConvNet,
    ConvTranspose,
    Decoder,
    Encoder,
    ResNetPixShuffle,
    ResNetPixUnshuffle,
    ViT,
)

OBS = (3, 64, 64)
LINEAR = LinearConfig(activation="ReLU", bias=True)
MLP = MLPConfig(
    hidden_dim=128,
    n_layers=2,
    output_activation="Tanh",
    linear_cfg=LinearConfig(activation="ReLU", bias=True),
)

# The backbones of the documents.
ENCODER_CONVNET = ConvNetConfig(
    channels=[16, 32, 64],
    conv_cfgs=[
        ConvConfig(
            kernel_size=3,
            stride=2,
            padding=1,
            dilation=1,
            activation="ReLU",
            groups=1,
            bias=True,
            norm="none",
            norm_cfg={},
            dropout=0.0,
            scale_factor=0,
        ),
        ConvConfig(kernel_size=3, stride=2, padding=1, activation="ReLU"),
        ConvConfig(kernel_size=3, stride=2, padding=1, activation="ReLU"),
    ],
)
DECODER_CONVNET = ConvNetConfig(
    channels=[64, 32, 16],
    conv_cfgs=[
        ConvConfig(output_padding=0, kernel_size=3, stride=2, padding=1),
        ConvConfig(kernel_size=3, stride=2, padding=1, activation="ReLU"),
        ConvConfig(kernel_size=3, stride=2, padding=1, activation="Tanh"),
    ],
)
RESNET = ResNetConfig(
    conv_channel=64,
    conv_kernel=3,
    f_kernel=3,
    conv_activation="ReLU",
    output_activation="Tanh",
    n_res_blocks=3,
    scale_factor=2,
    n_scaling=3,
    norm="batch",
    norm_cfg={"affine": True},
    dropout=0.0,
)
VIT = ViTConfig(16, TransformerConfig(32, 4, 64, 2))


@pytest.mark.parametrize("full_connection_cfg", [MLP, LINEAR], ids=["MLP", "Linear"])
@pytest.mark.parametrize(
    ("encoder_cfg", "decoder_cfg"),
    [(ENCODER_CONVNET, DECODER_CONVNET), (RESNET, RESNET), (VIT, VIT)],
    ids=["ConvNet", "ResNet", "ViT"],
)
def test_the_documents_encoder_and_decoder(
    encoder_cfg: Any, decoder_cfg: Any, full_connection_cfg: Any
) -> None:
    encoder = Encoder(64, OBS, encoder_cfg, full_connection_cfg)
    z = encoder(torch.randn(2, *OBS))
    assert z.shape == (2, 64)
    decoder = Decoder(64, OBS, decoder_cfg, full_connection_cfg)
    assert decoder(z).shape == (2, *OBS)
    named = Encoder(64, OBS, encoder_cfg=encoder_cfg, full_connection_cfg=full_connection_cfg)
    assert named(torch.randn(*OBS)).shape == (64,)
    named = Decoder(64, OBS, decoder_cfg=decoder_cfg, full_connection_cfg=full_connection_cfg)
    assert named(torch.randn(2, 1, 64)).shape == (2, 1, *OBS)


def test_the_documents_feature_map() -> None:
    encoder = Encoder((64, 8, 8), OBS, ENCODER_CONVNET, None)
    features = encoder(torch.randn(2, *OBS))
    assert features.shape == (2, 64, 8, 8)
    # The head is documented as ignored here.
    assert Encoder((64, 8, 8), OBS, ENCODER_CONVNET, MLP)(torch.randn(*OBS)).shape == (64, 8, 8)
    with pytest.raises(ValueError, match=r"output is feature_dim=\(64, 8, 8\), got \(64, 7, 7\)"):
        Encoder((64, 7, 7), OBS, ENCODER_CONVNET)
    decoder = Decoder((16, 8, 8), OBS, DECODER_CONVNET)
    assert decoder(torch.randn(2, 3, 16, 8, 8)).shape == (2, 3, *OBS)
    with pytest.raises(ValueError, match=r"input is feature_dim=\(16, 8, 8\), got \(64, 8, 8\)"):
        Decoder((64, 8, 8), OBS, DECODER_CONVNET)


def test_the_attributes() -> None:
    encoder = Encoder(np.int64(5), [3, 16, 12], ENCODER_CONVNET, LINEAR)
    assert encoder.feature_dim == 5
    assert encoder.obs_shape == (3, 16, 12)
    assert (encoder.last_channel, encoder.conved_shape, encoder.conved_size) == (64, (2, 2), 256)
    decoder = Decoder(5, (3, 16, 12), DECODER_CONVNET, LINEAR)
    assert (decoder.input_shape, decoder.has_fc) == ((16, 2, 2), True)
    assert not Decoder((16, 2, 2), (3, 16, 12), DECODER_CONVNET).has_fc
    encoder.freeze_weights()
    assert not encoder.fc[1].linear.weight.requires_grad
    assert encoder.fc[1].linear.bias.requires_grad


def test_configs_from_omegaconf_and_encoder_config() -> None:
    node = OmegaConf.create({"channels": [4], "conv_cfgs": [{"kernel_size": 3, "stride": 2}]})
    node.conv_cfgs[0].padding = 1
    encoder = Encoder(5, OmegaConf.create([3, 8, 8]), node, {"activation": "Tanh"})
    assert encoder(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    both = EncoderConfig(encoder.encoder.cfg, LINEAR)
    assert Encoder(5, (3, 8, 8), both)(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    both = DecoderConfig(encoder.encoder.cfg, LINEAR)
    assert Decoder(5, (3, 8, 8), both)(torch.randn(2, 5)).shape == (2, 3, 8, 8)
    with pytest.raises(TypeError, match="Encoder backbone_cfg must be ConvNetConfig or ResNet"):
        Encoder(5, (3, 8, 8), LINEAR, LINEAR)
    with pytest.raises(TypeError, match="Decoder fc_cfg must be MLPConfig or LinearConfig"):
        Decoder(5, (3, 8, 8), DECODER_CONVNET, AdaptiveAveragePoolingConfig())


@pytest.mark.parametrize("backbone", [ENCODER_CONVNET, RESNET], ids=["ConvNet", "ResNet"])
@pytest.mark.parametrize(
    ("head", "features"),
    [(AdaptiveAveragePoolingConfig((2, 1)), 128), (SpatialSoftmaxConfig(), 128)],
    ids=["pooling", "spatial"],
)
def test_heads_without_a_layer(backbone: Any, head: Any, features: int) -> None:
    encoder = Encoder(features, OBS, backbone, head)
    assert encoder(torch.randn(2, *OBS)).shape == (2, features)
    with pytest.warns(UserWarning, match=r"makes feature_dim=128 features, not the 5 asked for"):
        encoder = Encoder(5, OBS, backbone, head)
    assert encoder.feature_dim == features
    assert type(encoder.feature_dim) is int
    with_layer = copy.deepcopy(head)
    with_layer.additional_layer = MLP
    assert Encoder(5, OBS, backbone, with_layer)(torch.randn(2, *OBS)).shape == (2, 5)


def test_pooling_and_spatial_heads_take_images_of_other_sizes() -> None:
    encoder = Encoder(64, OBS, ENCODER_CONVNET, AdaptiveAveragePoolingConfig())
    assert encoder(torch.randn(2, 3, 40, 56)).shape == (2, 64)


@pytest.mark.parametrize("output_padding", [0, 1])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 2, 1), (4, 2, 1), (5, 3, 0), (2, 2, 0)]
)
@pytest.mark.parametrize("size", [(64, 64), (63, 50), (28, 31)])
def test_transposed_convolutions_meet_every_size(
    size: tuple[int, int], kernel: int, stride: int, padding: int, output_padding: int
) -> None:
    layer = ConvConfig("Tanh", kernel, stride, padding, output_padding=output_padding)
    cfg = ConvNetConfig([4, 3], [layer, layer])
    decoder = Decoder(5, (2, *size), cfg, LINEAR)
    assert decoder(torch.randn(1, 5)).shape == (1, 2, *size)


@hypothesis.given(
    st.integers(1, 200), st.integers(1, 7), st.integers(1, 5), st.integers(0, 4), st.integers(1, 3)
)
def test_every_length_has_an_output_padding(
    length: int, kernel: int, stride: int, padding: int, dilation: int
) -> None:
    for output_padding in range(max(stride, dilation)):
        cfg = ConvConfig(
            "ReLU", kernel, stride, padding, output_padding=output_padding, dilation=dilation
        )
        before, chosen = _transposed(length, cfg)
        geometry = (padding, kernel, stride, dilation)
        assert conv_transpose_out(before, *geometry, chosen) == length
        assert chosen < max(stride, dilation)
        fitting = {conv_transpose_out(n, *geometry, output_padding) for n in range(-5, 220)}
        assert chosen == output_padding or length not in fitting


def test_output_padding_that_fits_is_kept_and_other_is_replaced() -> None:
    def paddings(size: int, *output_paddings: int) -> list[tuple[int, ...]]:
        layers = [ConvConfig("ReLU", 3, 2, 1, output_padding=p) for p in output_paddings]
        cfg = ConvNetConfig([4] * len(layers), layers)
        decoder = Decoder(5, (1, size, size), cfg, LINEAR)
        return [layer.conv.output_padding for layer in decoder.decoder.conv]

    assert paddings(29, 0, 0) == [(0, 0), (0, 0)]
    assert paddings(32, 1, 1) == [(1, 1), (1, 1)]
    assert paddings(32, 0, 0) == [(1, 1), (1, 1)]
    assert paddings(31, 1, 1) == [(1, 1), (0, 0)]
    # An explicit input shape that the config itself leads to the image is taken as it is.
    cfg = ConvNetConfig([4], [ConvConfig("ReLU", 3, 2, 1)])
    assert ConvTranspose((4, 4, 4), (1, 7, 7), cfg).conv[0].conv.output_padding == (0, 0)
    with pytest.raises(ValueError, match=r"makes images of 9 x 9 .* needs in_shape=\(4, 4, 4\)"):
        ConvTranspose((4, 5, 5), (1, 8, 8), cfg)
    with pytest.raises(ValueError, match=r"cannot make obs_shape=\(1, 1, 8\)"):
        Decoder(5, (1, 1, 8), ConvNetConfig([4], [ConvConfig("ReLU", 9, 2, 1)]), LINEAR)


@pytest.mark.parametrize("scale_factor", [2, -2])
def test_convnet_with_pixel_shuffle_knows_its_size(scale_factor: int) -> None:
    layer = ConvConfig("ReLU", 3, 1, 1, scale_factor=scale_factor)
    encoder = Encoder(5, (3, 8, 12), ConvNetConfig([4, 8], [layer, layer]), LINEAR)
    ratio = 2.0**scale_factor if scale_factor > 0 else 0.25
    assert encoder.conved_shape == (8 * ratio, 12 * ratio)
    assert encoder(torch.randn(2, 3, 8, 12)).shape == (2, 5)


@pytest.mark.parametrize("activation", ["GLU", "SwiGLU"])
def test_gated_resnets(activation: str) -> None:
    cfg = ResNetConfig(4, 3, 5, activation, "GLU", 1, 2, 1, "batch", init_channel=6)
    down = ResNetPixUnshuffle((3, 8, 6), cfg)
    assert down(torch.randn(2, 3, 8, 6)).shape == (2, 4, 4, 3)
    up = ResNetPixShuffle(ResNetPixShuffle.get_input_shape((3, 8, 6), cfg), (3, 8, 6), cfg)
    image = up(torch.randn(2, 6, 4, 3))
    assert image.shape == (2, 3, 8, 6)
    image.sum().backward()
    assert all(p.grad is not None for p in up.parameters())


def test_resnets_follow_their_equations() -> None:
    cfg = ResNetConfig(4, 3, 5, "ReLU", "Tanh", 2, 2, 1, init_channel=6)
    down = ResNetPixUnshuffle((3, 8, 8), cfg)
    x = torch.randn(2, 3, 8, 8)
    y = down.downsample(down.conv1(x))
    torch.testing.assert_close(down(x), down.conv3(down.conv2(down.res_blocks(y)) + y))
    up = ResNetPixShuffle((6, 4, 4), (3, 8, 8), cfg)
    x = torch.randn(2, 6, 4, 4)
    y = up.conv1(x)
    y = up.upsampling(up.conv2(up.res_blocks(y)) + y)
    torch.testing.assert_close(up(x), up.conv3.conv(y).tanh())


def test_attention_stands_between_the_convolutions() -> None:
    attention = AttentionConfig(nhead=2, patch_size=2)
    layers = [ConvConfig("ReLU", 3, 2, 1)] * 2
    net = ConvNet((3, 16, 16), ConvNetConfig([4, 8], layers, attention))
    kinds = [type(layer).__name__ for layer in net.conv]
    assert kinds == ["ConvNormActivation", "Attention2d"] * 2
    transposed = ConvTranspose((16, 4, 4), (3, 16, 16), ConvNetConfig([8, 4], layers, attention))
    kinds = [type(layer).__name__ for layer in transposed.conv]
    assert kinds == ["Attention2d", "ConvTransposeNormActivation"] * 2
    assert transposed(torch.randn(1, 16, 4, 4)).shape == (1, 3, 16, 16)


def test_vit_patches() -> None:
    vit = ViT((8,), ViTConfig(4, TransformerConfig(8, 2, 16, 1)), (3, 8, 12))
    images = torch.randn(2, 3, 8, 12)
    patches = vit.patchify(images)
    assert patches.shape == (2, vit.n_patches, vit.get_patch_dim((3, 8, 12)))
    # Patch 4 is in row 1, column 1; within it pixel (2, 3) of channel 1.
    assert patches[0, 4, (2 * 4 + 3) * 3 + 1] == images[0, 1, 4 + 2, 4 + 3]
    assert torch.equal(vit.unpatchify(patches), images)
    assert vit(torch.randn(2, 8)).shape == vit(torch.randn(2, 1, 8)).shape == (2, 3, 8, 12)


def test_vit_activations_may_be_gated_and_output_activation_is_not_used() -> None:
    transformer = TransformerConfig(8, 2, 16, 1, 0.0, "SwiGLU", "GeLU")
    cfg = ViTConfig(4, transformer, decoder_output_activation="GLU")
    assert ViT((3, 8, 12), cfg)(torch.randn(2, 3, 8, 12)).shape == (2, 8)
    assert ViT((8,), cfg, (3, 8, 12))(torch.randn(2, 8)).shape == (2, 3, 8, 12)


def test_vit_blocks_start_different_and_see_every_patch() -> None:
    vit = ViT((3, 8, 8), ViTConfig(4, TransformerConfig(8, 2, 16, 2, 0.0), cls_token=False))
    first, second = vit.encoder_blocks
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(vit(x)[0, 0], x)
    assert (vit.patchify(gradient).abs().amax(-1) > 0).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Encoder(5, OBS, ENCODER_CONVNET), ValueError, r"must be \(64, 8, 8\)"),
        (lambda: Decoder(5, OBS, DECODER_CONVNET), ValueError, r"must be \(16, 8, 8\)"),
        (lambda: Encoder(5, OBS, VIT), ValueError, "feature_dim=32, its d_model, got 5"),
        (lambda: Decoder(5, OBS, VIT), ValueError, r"must be \(32,\), the backbone's input"),
        (lambda: Encoder(5, OBS, VIT, SpatialSoftmaxConfig()), TypeError, "a ViT's fc_cfg"),
        (lambda: Encoder((32, 1, 1), OBS, VIT), ValueError, "feature_dim=32, got"),
        (lambda: Encoder(5, (64, 64), RESNET, LINEAR), ValueError, r"\(channels, height, width\)"),
        (
            lambda: Encoder(5, (3, 60, 64), RESNET, LINEAR),
            ValueError,
            r"divisible by scale_factor\^n_scaling = 8, got obs_shape=\(3, 60, 64\)",
        ),
        (lambda: Decoder(5, (3, 60, 64), RESNET, LINEAR), ValueError, "ResNetPixShuffle needs"),
        (lambda: Encoder(5, (3, 60, 64), VIT, LINEAR), ValueError, "divisible by patch_size=16"),
        (
            lambda: ResNetPixShuffle((16, 4, 4), OBS, RESNET),
            ValueError,
            r"needs in_shape=\(16, 8, 8\) for obs_shape=\(3, 64, 64\), got \(16, 4, 4\)",
        ),
        (lambda: ViT((8,), VIT, OBS), ValueError, r"needs in_shape=\(32,\), its d_model"),
        (
            lambda: ConvNet((3, 2, 2), ConvNetConfig([4], [ConvConfig("ReLU", 5, 1, 0)])),
            ValueError,
            "layer 0 makes feature maps of -2 x -2",
        ),
        (
            lambda: ConvNet(
                (3, 5, 4), ConvNetConfig([4], [ConvConfig("ReLU", 3, 1, 1, scale_factor=-2)])
            ),
            ValueError,
            "5 x 4 .* not divisible by scale_factor=-2",
        ),
        (
            lambda: Encoder(5, OBS, RESNET, LINEAR)(torch.randn(2, 64, 64, 3)),
            ValueError,
            r"needs images \(\.\.\., 3, 64, 64\), got shape \(2, 64, 64, 3\)",
        ),
        (
            lambda: Decoder(5, OBS, DECODER_CONVNET, LINEAR)(torch.randn(2, 6)),
            ValueError,
            r"needs features \(\.\.\., 5\), got shape \(2, 6\)",
        ),
        (lambda: Encoder(5, OBS, fc_cgf=LINEAR), TypeError, "'fc_cgf'; did you mean 'fc_cfg'"),
    ],
)
def test_bad_input(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("backbone", ["ConvNet", "ResNet", "ViT"])
def test_gradcheck(backbone: str) -> None:
    torch.manual_seed(0)
    layer = ConvConfig("Tanh", 3, 2, 1)
    cfg = {
        "ConvNet": ConvNetConfig([2], [layer], init_channel=2),
        "ResNet": ResNetConfig(4, 3, 3, "SiLU", "Tanh", 1, 2, 1, "batch", init_channel=2),
        "ViT": ViTConfig(2, TransformerConfig(4, 2, 4, 1, 0.0)),
    }[backbone]
    head = LinearConfig("Tanh")
    encoder = Encoder(3, (1, 4, 4), cfg, head).double()
    decoder = Decoder(3, (1, 4, 4), cfg, head).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda image: decoder(encoder(image)), x)


def test_leading_dimensions_strides_and_empty_batches() -> None:
    torch.manual_seed(0)
    encoder = Encoder(5, (3, 8, 8), ConvNetConfig([4], [ConvConfig("Tanh", 3, 2, 1)]), LINEAR)
    x = torch.randn(2, 3, 8, 8, 3).permute(1, 0, 4, 3, 2)
    expected = torch.stack([encoder(image) for image in x.flatten(0, 1)]).view(3, 2, 5)
    torch.testing.assert_close(encoder(x), expected)
    assert encoder(torch.randn(0, 3, 8, 8)).shape == (0, 5)
    assert encoder(x[0, 0]).shape == (5,)


@pytest.mark.parametrize("convert", ["none", "partial", "object", "all"])
def test_hydra_instantiates_a_yaml_file(convert: str) -> None:
    text = """
    _target_: ml_networks.torch.vision.Encoder
    feature_dim: 5
    obs_shape: [3, 16, 16]
    backbone_cfg:
      _target_: ml_networks.config.ConvNetConfig
      channels: [4, 8]
      conv_cfgs:
        - _target_: ml_networks.config.ConvConfig
          activation: ReLU
          kernel_size: 3
          stride: 2
          padding: 1
          norm: group
          norm_cfg: {num_groups: 2}
        - {_target_: ml_networks.config.ConvConfig, kernel_size: 3, stride: 2, padding: 1}
      attention: {_target_: ml_networks.config.AttentionConfig, nhead: 2, patch_size: 1}
    fc_cfg:
      _target_: ml_networks.config.AdaptiveAveragePoolingConfig
      output_size: [2, 2]
      additional_layer: {_target_: ml_networks.config.LinearConfig, activation: Tanh}
    """
    encoder = hydra.utils.instantiate(OmegaConf.create(text), _convert_=convert)
    assert encoder(torch.randn(2, 3, 16, 16)).shape == (2, 5)
    pickle.loads(pickle.dumps(encoder))
