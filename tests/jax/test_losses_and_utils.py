"""Losses, samples, optimizers and the guide's examples on the JAX side, against torch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ml_networks.jax as ours
from ml_networks import ConvConfig, ConvNetConfig, LinearConfig, MLPConfig
from tests.jax.conftest import Arrays
from tests.jax.modules import normal

LABELS = np.array([[0, 3, 1], [4, 4, 2]])
IMAGES = (normal(2, 3, 6, 5), normal(2, 3, 6, 5, seed=1))
LOSSES: list[tuple[str, tuple[np.ndarray, ...], dict[str, Any]]] = [
    ("focal_loss", (normal(2, 3, 5), LABELS), {}),
    ("focal_loss", (normal(2, 5, 3), LABELS), {"gamma": 0.5, "sum_dim": 1}),
    ("binary_focal_loss", (normal(2, 3) * 9, LABELS > 2), {"gamma": 0.0}),
    ("binary_focal_loss", (normal(2, 3), LABELS / 4.0), {"sum_dim": None}),
    ("charbonnier", IMAGES, {}),
    ("charbonnier", IMAGES, {"alpha": 0.45, "epsilon": 0.1, "sum_dim": [0, -1]}),
    ("cross_entropy", (normal(2, 5, 3), LABELS), {"dim": 1}),
    ("soft_target_cross_entropy", (normal(4, 5), normal(4, 5, seed=1)), {}),
    ("softmax", (normal(4, 5),), {"dim": 0, "temperature": 0.3}),
    ("log_softmax", (normal(4, 5),), {"temperature": 2.0}),
]


@pytest.mark.parametrize(("name", "arrays", "keywords"), LOSSES, ids=lambda v: str(v)[:20])
def test_value_and_gradient_are_torchs(
    name: str, arrays: Any, keywords: Any, from_torch: Any
) -> None:
    def in_torch() -> Arrays:
        import torch

        import ml_networks.torch

        first = torch.tensor(arrays[0], requires_grad=True)
        rest = [torch.tensor(array) for array in arrays[1:]]
        value = getattr(ml_networks.torch, name)(first, *rest, **keywords)
        (gradient,) = torch.autograd.grad(value.sum(), first)
        return {"value": value.detach().numpy(), "gradient": gradient.numpy()}

    expected = from_torch(in_torch)

    def total(x: Any) -> Any:
        value = getattr(ours, name)(x, *map(jnp.asarray, arrays[1:]), **keywords)
        return value.sum(), value

    (_, got), mine = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(arrays[0]))
    np.testing.assert_allclose(got, expected["value"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(mine, expected["gradient"], rtol=1e-4, atol=2e-6)


def test_focal_frequency_loss_is_torchs(from_torch: Any) -> None:
    options = {"alpha": 0.5, "log_matrix": True}

    def in_torch() -> Arrays:
        import torch

        from ml_networks.torch import FocalFrequencyLoss

        return {"value": FocalFrequencyLoss(**options)(*map(torch.tensor, IMAGES)).numpy()}

    got = ours.FocalFrequencyLoss(**options)(*map(jnp.asarray, IMAGES))
    np.testing.assert_allclose(got, from_torch(in_torch)["value"], rtol=1e-5)


def test_losses_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="one shape"):
        ours.charbonnier(jnp.ones((2, 3, 4, 4)), jnp.ones((2, 1, 4, 4)))
    with pytest.raises(ValueError, match="class indices"):
        ours.focal_loss(jnp.ones((2, 5)), jnp.ones(2))
    with pytest.raises(TypeError, match="gamma"):
        ours.focal_loss(jnp.ones((2, 5)), jnp.ones(2, jnp.int32), gama=1.0)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gumbel_softmax_samples_with_straight_through_gradient(axis: int) -> None:
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]] * 4)) if axis else jnp.zeros((4, 3))

    @jax.jit
    def draw(key: Any) -> Any:
        return ours.gumbel_softmax(logits, key, axis)

    samples = jax.vmap(draw)(jax.random.split(jax.random.key(0), 2000))
    np.testing.assert_allclose(samples.sum(axis + 1 if axis >= 0 else -1), 1.0, atol=1e-6)
    expected = jax.nn.softmax(logits, axis)
    np.testing.assert_allclose(samples.mean(0), expected, atol=0.05)
    gradient = jax.grad(lambda x: (ours.gumbel_softmax(x, jax.random.key(1), axis)[0] * 3.0).sum())
    assert bool(jnp.isfinite(gradient(logits)).all())


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("Adam", {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.05}),
        ("AdamW", {"lr": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("RMSprop", {"lr": 0.05, "alpha": 0.9}),
        ("Adagrad", {"lr": 0.1}),
    ],
)
def test_optimizers_step_as_torchs(name: str, keywords: dict[str, Any], from_torch: Any) -> None:
    import optax

    start, gradients = normal(5), normal(4, 5, seed=1)

    def in_torch() -> Arrays:
        import torch

        parameter = torch.nn.Parameter(torch.tensor(start))
        reference = getattr(torch.optim, name)([parameter], **keywords)
        for gradient in gradients:
            parameter.grad = torch.tensor(gradient)
            reference.step()
        return {"value": parameter.detach().numpy()}

    optimizer = ours.get_optimizer(name, **keywords)
    value = jnp.asarray(start)
    state = optimizer.init(value)
    for gradient in gradients:
        updates, state = optimizer.update(jnp.asarray(gradient), state, value)
        value = optax.apply_updates(value, updates)
    np.testing.assert_allclose(value, from_torch(in_torch)["value"], rtol=1e-4, atol=1e-6)


def test_optimizer_names() -> None:
    ours.get_optimizer("adabelief", learning_rate=1e-3)
    ours.get_optimizer("Adam", learning_rate=1e-3)
    with pytest.raises(NotImplementedError, match="'Adam'"):
        ours.get_optimizer("Adma", lr=0.1)
    with pytest.raises(TypeError, match="'betas'"):
        ours.get_optimizer("Adam", beta=0.1)


def test_seeds_and_counts() -> None:
    import random

    key = ours.jax_fix_seed(3)
    first = (random.random(), np.random.rand())  # noqa: NPY002
    assert jnp.array_equal(jax.random.key_data(key), jax.random.key_data(ours.jax_fix_seed(3)))
    assert first == (random.random(), np.random.rand())  # noqa: NPY002
    model = ours.MLPLayer(3, 2, MLPConfig(4, 1, "Tanh", LinearConfig("ReLU")), rngs=key)
    assert ours.count_nnx_params(model) == (26, 26)
    model.freeze_biases()
    assert ours.count_nnx_params(model) == (26, 20)
    model.unfreeze_biases()
    assert ours.count_nnx_params(model) == (26, 26)


def test_keys_of_every_kind() -> None:
    cfg = LinearConfig("ReLU")
    keys = (jax.random.key(0), jax.random.PRNGKey(0), nnx.Rngs(jax.random.key(0)))
    first, *others = [
        np.asarray(ours.LinearNormActivation(3, 2, cfg, rngs=k).linear.kernel[...]) for k in keys
    ]
    for other in others:
        np.testing.assert_array_equal(first, other)
    for bad in (None, 3, jnp.ones(3), jax.random.split(jax.random.key(0))):
        with pytest.raises(TypeError, match="rngs"):
            ours.LinearNormActivation(3, 2, cfg, rngs=bad)


def test_channels_last_images_are_answered_with_the_axis() -> None:
    cfg = ConvNetConfig((4,), (ConvConfig("ReLU", 3, 2, 1),))
    key = jax.random.key(0)
    encoder = ours.Encoder(2, (3, 8, 8), cfg, LinearConfig("ReLU"), rngs=key)
    with pytest.raises(ValueError, match="axis -3"):
        encoder(jnp.ones((2, 8, 8, 3)))


def test_a_step_of_training_with_jax_jit() -> None:
    import optax

    cfg = MLPConfig(
        hidden_dim=16, n_layers=2, output_activation="Tanh", linear_cfg=LinearConfig("ReLU")
    )
    model = ours.MLPLayer(input_dim=4, output_dim=2, mlp_config=cfg, rngs=jax.random.PRNGKey(0))
    graph, parameters = nnx.split(model)
    optimizer = ours.get_optimizer("Adam", lr=1e-2)
    x, y = jnp.asarray(normal(64, 4)), jnp.tanh(jnp.asarray(normal(64, 2)))

    @jax.jit
    def step(parameters: Any, state: Any) -> Any:
        def loss(parameters: Any) -> Any:
            return ((nnx.merge(graph, parameters)(x) - y) ** 2).mean()

        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    state = optimizer.init(parameters)
    values = []
    for _ in range(60):
        parameters, state, value = step(parameters, state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]
