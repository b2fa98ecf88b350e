"""Hypernetworks, contrastive losses and transforms in JAX, beyond the comparison with torch."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ml_networks.jax as library
from ml_networks import (
    ContrastiveLearningConfig,
    ConvConfig,
    LinearConfig,
    MLPConfig,
    SoftmaxTransConfig,
    UNetConfig,
)
from ml_networks.convert import state_dict, torch_to_jax
from ml_networks.jax.data import numpy_collate
from ml_networks.jax.hypernetworks import (
    HyperNetMixin,
    encode_input,
    initialize_layer,
    initialize_weight,
)
from ml_networks.jax.layers import pixel_shuffle_2d, pixel_unshuffle_2d
from ml_networks.jax.primitives import BatchNorm, Linear
from tests.jax.modules import normal

pytestmark = pytest.mark.usefixtures("quick_compilation")
MLP = MLPConfig(8, 1, "Identity", LinearConfig("ReLU"))


def target(dropout: float = 0.0) -> Any:
    layers = [nnx.Linear(3, 6, rngs=nnx.Rngs(0)), nnx.relu]
    if dropout:
        layers.append(nnx.Dropout(dropout, rngs=nnx.Rngs(3)))
    return nnx.Sequential(*layers, nnx.Linear(6, 2, rngs=nnx.Rngs(1)))


def small() -> Any:
    net = library.LinearNormActivation(3, 2, LinearConfig("Tanh"), rngs=nnx.Rngs(0))
    return library.HyperNet(3, target_net=net, rngs=nnx.Rngs(1))


def test_a_hypernetwork_over_flax_layers_equals_a_loop_over_samples() -> None:
    hypernet = library.HyperNet(4, target_net=target(), mlp_cfg=MLP, rngs=nnx.Rngs(0))
    x, condition = jnp.asarray(normal(2, 3, 3)), jnp.asarray(normal(2, 3, 4, seed=1))
    weights = hypernet.generate(condition)
    assert weights["layers.0.kernel"].shape == (2, 3, 3, 6)
    outputs = jax.jit(lambda model, *inputs: model(*inputs))(hypernet, x, condition)
    for i in range(2):
        for j in range(3):
            w = {name: value[i, j] for name, value in weights.items()}
            hidden = jax.nn.relu(x[i, j] @ w["layers.0.kernel"] + w["layers.0.bias"])
            expected = hidden @ w["layers.2.kernel"] + w["layers.2.bias"]
            np.testing.assert_allclose(outputs[i, j], expected, rtol=1e-5, atol=1e-6)
    assert hypernet(x[0, 0], condition[0, 0]).shape == (2,)
    assert hypernet(x[:0], condition[:0]).shape == (0, 3, 2)


def test_dropout_in_the_target_differs_between_samples_and_calls() -> None:
    hypernet = library.HyperNet(4, target_net=target(0.5), rngs=nnx.Rngs(0))
    x, condition = jnp.ones((8, 3)), jnp.ones((8, 4))
    first, second = hypernet(x, condition), hypernet(x, condition)
    assert len(np.unique(np.asarray(first), axis=0)) > 2
    assert not jnp.array_equal(first, second)
    hypernet.eval()
    assert len(np.unique(np.asarray(hypernet(x, condition)).round(5), axis=0)) == 1


def test_a_checkpoint_does_not_hang_on_the_order_of_attributes() -> None:
    """Attributes of a merged module are in alphabetical order, of a new one as it sets them."""
    net = library.Attention1d(4, 2, rngs=nnx.Rngs(0))
    hypernet = library.HyperNet(3, target_net=net, rngs=nnx.Rngs(1))
    merged = nnx.merge(*nnx.split(hypernet))
    assert list(vars(merged.target_net)) != list(vars(net))
    before, after = state_dict(hypernet), state_dict(merged)
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(value, after[key], err_msg=key)


def test_a_hypernetwork_refuses_weights_of_another() -> None:
    hypernet = library.HyperNet(3, target_net=target(), rngs=nnx.Rngs(1))
    weights = {key: value + 0 for key, value in state_dict(small()).items()}
    torch_to_jax(weights, small())
    for change, error, message in (
        ({"backbone.bias": None}, KeyError, "missing: backbone.bias"),
        ({"backbone.offset": np.zeros(2)}, KeyError, "not part of it: backbone.offset"),
        ({"backbone.weight": np.zeros((2, 3))}, ValueError, "backbone.weight has shape"),
    ):
        wrong = {k: v for k, v in {**weights, **change}.items() if v is not None}
        with pytest.raises(error, match=message):
            torch_to_jax(wrong, small())
    with pytest.raises(KeyError, match="missing"):
        torch_to_jax(weights, hypernet)


def test_statistics_of_the_target_cannot_be_updated() -> None:
    net = nnx.Sequential(Linear(3, 4, rngs=nnx.Rngs(0)), BatchNorm(4))
    hypernet = library.HyperNet(4, target_net=net, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"updates the statistics .* call eval\(\) first"):
        hypernet(jnp.ones((2, 3)), jnp.ones((2, 4)))
    hypernet.eval()
    assert hypernet(jnp.ones((2, 3)), jnp.ones((2, 4))).shape == (2, 4)


@pytest.mark.parametrize("cfg", [None, MLP])
def test_starts_at_the_scale_of_the_target(cfg: MLPConfig | None) -> None:
    net = nnx.Sequential(*(Linear(n, 2 * n, rngs=nnx.Rngs(n)) for n in (50, 100)))
    hypernet = library.HyperNet(16, target_net=net, fc_cfg=cfg, rngs=nnx.Rngs(0))
    shapes = hypernet.output_shapes
    made = library.HyperNet(16, shapes, cfg, rngs=nnx.Rngs(1))(jnp.asarray(normal(8, 16)))
    weights = hypernet.generate(jnp.asarray(normal(8, 16)))
    for i, layer in enumerate(net.layers):
        for name, own in (("kernel", layer.kernel[...]), ("bias", layer.bias[...])):
            change = float((weights[f"layers.{i}.{name}"] - own).std() / own.std())
            assert 0.02 < change < 0.5, name
            assert 0.8 < float(made[f"layers.{i}.{name}"].std() / own.std()) < 1.3, name


def test_wrong_hypernetworks() -> None:
    make, x = library.HyperNet, jnp.ones((4, 3))
    shapes = make(5, {"weight": (2, 2)}, rngs=nnx.Rngs(0))
    run = make(5, target_net=target(), rngs=nnx.Rngs(0))
    for error, message, call in (
        (TypeError, "not neither", lambda: make(5, rngs=nnx.Rngs(0))),
        (TypeError, "not both", lambda: make(5, {"w": (1,)}, target_net=x, rngs=nnx.Rngs(0))),
        (
            ValueError,
            "encoding must be",
            lambda: make(5, {"w": (1,)}, encoding="z", rngs=nnx.Rngs(0)),
        ),
        (TypeError, "has no target_net", lambda: shapes(x, x)),
        (TypeError, r"called as hypernet\(x, condition\)", lambda: run(x)),
        (ValueError, r"\(\*batch, 5\), got \(4, 3\)", lambda: run(x, x)),
        (ValueError, "share their batch", lambda: run(x, jnp.ones((3, 5)))),
    ):
        with pytest.raises(error, match=message):
            call()


def test_the_mixin_flattens_and_cuts() -> None:
    class Named(HyperNetMixin):
        def __init__(self) -> None:
            self.input_shapes = {"x": (2,), "y": (3,)}
            self.output_shapes = {"a": (2, 2), "b": (3,)}
            self.encoding = "cos|sin"

    named = Named()
    assert (named.flat_input_size(), named.flat_output_size()) == (10, 7)
    inputs = {"y": jnp.ones((4, 3)), "x": jnp.zeros((4, 2))}
    np.testing.assert_array_equal(named.flatten_inputs(inputs), [[0, 0, 1, 1, 1]] * 4)
    assert named.encode_inputs(inputs)["y"].shape == (4, 6)
    outputs = named.unflatten_output(jnp.arange(14.0).reshape(2, 7))
    np.testing.assert_array_equal(outputs["a"][1], [[7, 8], [9, 10]])
    np.testing.assert_array_equal(outputs["b"][0], [4, 5, 6])
    with pytest.raises(ValueError, match="must be named"):
        named.flatten_inputs({"x": jnp.zeros((4, 2))})


def test_encodings() -> None:
    z = jnp.array([[0.0, 0.25, 1.0]])
    c, s = math.cos(math.pi / 8), math.sin(math.pi / 8)
    np.testing.assert_allclose(encode_input(z), [[1, c, 0, 0, s, 1]], atol=1e-6)
    np.testing.assert_allclose(encode_input(z, "z|1-z"), [[0, 0.25, 1, 1, 0.75, 0]])
    assert encode_input(z, None) is z


@pytest.mark.parametrize(
    ("distribution", "variance"),
    [
        ("kaiming_normal", 1 / 300),
        ("kaiming_uniform_fanout", 1 / 200),
        ("glorot_uniform", 2 / 500),
        ("orthogonal", 1 / 300),
    ],
)
def test_weight_distributions(distribution: str, variance: float) -> None:
    weight = initialize_weight(jax.random.key(0), (300, 200), distribution, "Tanh")
    # 60,000 draws: the standard deviation is known to 0.3 %.
    assert float(weight.std()) == pytest.approx(5 / 3 * math.sqrt(variance), rel=0.015)


def test_layers_are_initialised_in_place() -> None:
    layer = Linear(40, 50, rngs=nnx.Rngs(0))
    before = np.asarray(layer.kernel[...])
    initialize_layer(layer, None, 0.1)
    np.testing.assert_array_equal(layer.kernel[...], before)
    np.testing.assert_allclose(layer.bias[...], 0.1)
    initialize_layer(layer, "zeros", None, rngs=jax.random.key(0))
    assert not np.asarray(layer.kernel[...]).any()
    with pytest.raises(TypeError, match="linear or convolution layer, got BatchNorm"):
        initialize_layer(BatchNorm(3))
    with pytest.raises(ValueError, match="did you mean 'kaiming_normal'"):
        initialize_layer(layer, "kaiming_norm", rngs=jax.random.key(0))


def loss(**keywords: Any) -> Any:
    cfg = ContrastiveLearningConfig(5, MLP, **keywords)
    return library.ContrastiveLearningLoss(4, 3, cfg, rngs=nnx.Rngs(0))


def test_contrastive_terms_and_batch_dimensions() -> None:
    views = jnp.asarray(normal(2, 3, 4)), jnp.asarray(normal(2, 3, 3, seed=1))
    plain, like = loss(), loss(cross_entropy_like=True)
    losses, embeddings = plain.calc_nce(*views, return_emb=True)
    assert losses.keys() == {"positive", "negative", "nce"}
    assert like(*views).keys() == {"nce"}
    np.testing.assert_array_equal(losses["nce"], like(*views)["nce"])
    assert losses["nce"].shape == (2, 3)
    assert embeddings[0].shape == (2, 3, 5)
    a, b = (np.asarray(e, np.float64).reshape(6, 5) for e in embeddings)
    expected = np.log(np.exp(a @ b.T).mean(1)) - (a * b).sum(1)
    np.testing.assert_allclose(losses["nce"].reshape(-1), expected, rtol=1e-5, atol=1e-6)
    mean = losses["negative"] - losses["positive"]
    np.testing.assert_allclose(losses["nce"].mean(), mean, rtol=1e-4, atol=1e-6)
    series = plain.calc_timeseries_nce(*views, 1, 2)
    assert {"self_positive_1", "self_positive_2", "tgt_positive"} < series.keys()
    half = plain.calc_nce(*(view.astype(jnp.bfloat16) for view in views))["nce"]
    assert half.dtype == jnp.float32


def test_wrong_views() -> None:
    for message, call in (
        (
            r"feature2 must have shape \(\*batch, 3\)",
            lambda f: f(jnp.ones((2, 4)), jnp.ones((2, 4))),
        ),
        ("same batch dimensions", lambda f: f(jnp.ones((2, 4)), jnp.ones((3, 3)))),
        ("must be at least 0", lambda f: f(jnp.ones((2, 4)), jnp.ones((2, 3)), -1)),
    ):
        with pytest.raises(ValueError, match=message):
            call(loss().calc_timeseries_nce)


def test_unets_in_vmap_and_without_a_batch() -> None:
    cfg = UNetConfig((4,), ConvConfig("SiLU", 3, 1, 1), use_hypernet=True)
    unet = library.ConditionalUnet1d(3, (2, 4), cfg, rngs=jax.random.key(0))
    x, cond = jnp.asarray(normal(3, 2, 4)), jnp.asarray(normal(3, 3, seed=1))
    expected = unet(x, cond)
    np.testing.assert_allclose(jax.vmap(unet)(x, cond), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(unet(x[0], cond[0]), expected[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"expects cond of shape \(3, 3\)"):
        unet(x, cond[:2])


def test_pixel_shuffles_of_two_dimensions() -> None:
    x = jnp.arange(2.0 * 8 * 3 * 2).reshape(2, 8, 3, 2)
    y = pixel_shuffle_2d(x, 2)
    assert y.shape == (2, 2, 6, 4)
    np.testing.assert_array_equal(y[:, 1, 1::2, 0::2], x[:, 6])
    np.testing.assert_array_equal(pixel_unshuffle_2d(y, 2), x)


def test_min_max_normalize() -> None:
    x = jnp.arange(256, dtype=jnp.uint8)
    expected = np.arange(256) / 255 * 2 - 1
    np.testing.assert_allclose(library.MinMaxNormalize(-1, 1, 0, 255)(x), expected, atol=1e-6)
    normalize = library.MinMaxNormalize(min=-1.0, max=1.0, old_max=255.0)
    assert repr(normalize) == "MinMaxNormalize([0.0, 255.0] -> [-1.0, 1.0])"
    with pytest.raises(ValueError, match="the range is empty"):
        library.MinMaxNormalize(0.0, 1.0, 1.0, 1.0)


def test_softmax_transformation() -> None:
    cfg = SoftmaxTransConfig(vector=7, sigma=0.02, n_ignore=2, min=-2.0, max=2.0)
    transformation = library.SoftmaxTransformation(cfg)
    x = jnp.asarray(normal(4, 5, 6)).clip(-1, 1)
    code = jax.jit(transformation)(x)
    assert code.shape == (4, 5, transformation.get_transformed_dim(6)) == (4, 5, 30)
    centres = np.linspace(-2, 2, 7)
    scores = -((np.asarray(x)[..., :4, None] - centres) ** 2) / 0.02
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(code[..., :28].reshape(expected.shape), expected, atol=1e-5)
    np.testing.assert_array_equal(code[..., 28:], x[..., 4:])
    back = transformation.inverse(code)
    np.testing.assert_allclose((expected * centres).sum(-1), back[..., :4], atol=1e-5)
    with pytest.raises(ValueError, match="a multiple of 7 features and 2 ignored ones, got 10"):
        transformation.inverse(jnp.zeros((3, 10)))
    with pytest.raises(ValueError, match="1 features are fewer than the 2 ignored"):
        transformation(jnp.zeros((3, 1)))


def test_samples_are_stacked() -> None:
    batch = numpy_collate([(np.ones(2), {"label": 1}), (np.zeros(2), {"label": 2})])
    np.testing.assert_array_equal(batch[0], [[1, 1], [0, 0]])
    np.testing.assert_array_equal(batch[1]["label"], [1, 2])
