"""Every activation of the JAX side means what its torch namesake means."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml_networks.jax.activations import _CLASSES, _FUNCTIONS, Activation, UnknownActivationError
from tests.jax.conftest import Arrays

POINTS = np.array(
    [-1e4, -90.0, -20.5, -2.9, -1.2, -0.4, 0.3, 0.7, 2.0, 5.0, 6.5, 20.0, 21.0, 95.0, 1e4, 0.0]
)
KEYWORDS = {
    "Threshold": {"threshold": 0.1, "value": -2.0},
    "LeakyReLU": {"negative_slope": 0.2},
    "Softplus": {"beta": 2.0, "threshold": 10.0},
    "ELU": {"alpha": 0.5},
    "GELU": {"approximate": "tanh"},
    "Hardtanh": {"min_val": -0.5, "max_val": 3.0},
}
CASES = [
    *(
        (name, {})
        for name in (*_FUNCTIONS, *_CLASSES)
        if name not in ("Threshold", "RReLU", "Softmax2d")
    ),
    *KEYWORDS.items(),
]


@pytest.mark.parametrize(("name", "keywords"), CASES, ids=lambda case: str(case))
def test_value_and_gradient_are_torchs(name: str, keywords: dict, from_torch: Any) -> None:
    x = np.stack([POINTS, POINTS[::-1]]).astype(np.float32)
    cotangent = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)

    def in_torch() -> Arrays:
        import torch

        from ml_networks.torch.activations import Activation as TorchActivation

        tensor = torch.tensor(x, requires_grad=True)
        value = TorchActivation(name, dim=-1, **keywords)(tensor)
        pulled = torch.tensor(cotangent[:, : value.shape[1]])
        (gradient,) = torch.autograd.grad(value, tensor, pulled)
        return {"value": value.detach().numpy(), "gradient": gradient.numpy()}

    theirs = from_torch(in_torch)
    expected, expected_gradient = theirs["value"], theirs["gradient"]
    cotangent = cotangent[:, : expected.shape[1]]
    got, pull = jax.vjp(Activation(name, **keywords), jnp.asarray(x))
    (gradient,) = pull(jnp.asarray(cotangent))
    # Where torch's one-sided choice at a kink differs the subgradient does too: only x = 0.
    smooth = x != 0
    scale = 1e-6 * (1 + np.abs(expected))
    np.testing.assert_array_less(np.abs(got - expected), scale + 1e-6)
    off = np.abs(np.asarray(gradient) - expected_gradient)
    bound = 4e-6 * (1 + np.abs(expected_gradient))
    assert (off <= bound)[smooth].all(), (off / bound).max()
    assert np.isfinite(np.asarray(gradient)).all()


def test_a_channel_axis_of_gated_units() -> None:
    x = jnp.arange(24.0).reshape(1, 4, 2, 3)
    assert Activation("SiGLU", dim=-3)(x).shape == (1, 2, 2, 3)
    assert Activation("GLU", dim=-3)(x).shape == (1, 2, 2, 3)
    with pytest.raises(ValueError, match="even"):
        Activation("SwiGLU")(x)


def test_rrelu_draws_in_training_and_averages_in_evaluation() -> None:
    act = Activation("RReLU", rngs=jax.random.key(0))
    x = -jnp.ones(1000)
    drawn = act(x)
    assert float(drawn.min()) >= -1 / 3
    assert float(drawn.max()) <= -1 / 8
    assert float(jnp.std(drawn)) > 0.05
    assert not jnp.array_equal(drawn, act(x))
    act.eval()
    np.testing.assert_allclose(act(x), -(1 / 8 + 1 / 3) / 2, rtol=1e-6)
    with pytest.raises(TypeError, match="rngs"):
        Activation("RReLU")(x)


def test_bfloat16_stays_bfloat16() -> None:
    x = jnp.ones((1, 2, 2, 4), jnp.bfloat16)
    for name in (*_FUNCTIONS, *_CLASSES):
        keywords = KEYWORDS["Threshold"] if name == "Threshold" else {}
        assert Activation(name, rngs=jax.random.key(0), **keywords)(x).dtype == jnp.bfloat16, name


def test_bad_names_and_arguments() -> None:
    with pytest.raises(UnknownActivationError, match="'ReLU'"):
        Activation("relu")
    with pytest.raises(NotImplementedError, match="'GELU'"):
        Activation("GeLU")
    with pytest.raises(TypeError, match="slope"):
        Activation("LeakyReLU", slope=0.1)
    with pytest.raises(UnknownActivationError, match="'gelu'"):
        Activation("REReLU", reparametarize_fn="gelo")
