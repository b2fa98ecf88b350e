"""Distributions, their states and binary codes on the JAX side, against torch."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import TraceContextError

from ml_networks.jax import (
    BernoulliStoch,
    BSQCodebook,
    CategoricalStoch,
    Distribution,
    NormalStoch,
    StochState,
    cat_dist,
    get_dist,
    kl_balancing,
    kl_divergence,
    stack_dist,
)
from tests.jax.conftest import Arrays
from tests.jax.modules import normal

GROUPS, CLASSES = 2, 4
FEATURES = GROUPS * CLASSES
KINDS = ["normal", "categorical", "bernoulli"]
CLASSES_OF = {"normal": NormalStoch, "categorical": CategoricalStoch, "bernoulli": BernoulliStoch}
KEY = jax.random.key(3)
every_kind = pytest.mark.parametrize("kind", KINDS)
either = pytest.mark.parametrize("spherical", [False, True], ids=["plain", "spherical"])
FromTorch = Callable[[Callable[[], Arrays]], Arrays]


def distribution(kind: str, spherical: bool = False, **rngs: Any) -> Distribution:
    return Distribution(FEATURES, kind, 1 if kind == "normal" else GROUPS, spherical, **rngs)


def features(kind: str, *batch: int, seed: int = 0) -> np.ndarray:
    return normal(*batch, FEATURES * (2 if kind == "normal" else 1), seed=seed)


def arguments_of(kind: str, *batch: int, seed: int = 0) -> list[np.ndarray]:
    """The parameters of a posterior and of a prior, and a sample."""
    raw = [normal(*batch, GROUPS, CLASSES, seed=4 * seed + i) for i in range(4)]
    flat = [x.reshape(*batch, FEATURES) for x in raw]
    if kind == "normal":
        return [flat[0], np.exp(flat[1]), flat[2], np.exp(flat[3]), normal(*batch, FEATURES)]
    if kind == "categorical":
        probs = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in raw]
        value = (raw[2] == raw[2].max(-1, keepdims=True)).astype(np.float32)
    else:
        probs = [1 / (1 + np.exp(-x)) for x in raw]
        value = (raw[2] > 0).astype(np.float32)
    return [raw[0], probs[0], raw[1], probs[1], value.reshape(*batch, FEATURES)]


def state_of(kind: str, *batch: int, dtype: Any = jnp.float32, seed: int = 0) -> Any:
    first, second, *_, value = arguments_of(kind, *batch, seed=seed)
    return CLASSES_OF[kind](*(jnp.asarray(a, dtype) for a in (first, second, value)))


def assert_equal(a: StochState, b: StochState) -> None:
    assert type(a) is type(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def close(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def all_close(got: dict[str, Any], expected: Arrays, tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        value, found = np.asarray(value, np.float64), np.asarray(got[name], np.float64)
        assert found.shape == value.shape, name
        np.testing.assert_allclose(found, value, tolerance, tolerance, err_msg=name)


# --- the same numbers as torch --------------------------------------------------------------


def measures(library: Any, kind: str, *arguments: Any) -> dict[str, Any]:
    """What either framework computes of the same parameters and the same sample."""
    first, second, third, fourth, value = arguments
    state_type = getattr(library, CLASSES_OF[kind].__name__)
    posterior = state_type(first, second, value)
    prior = state_type(third, fourth, value)
    return {
        "log_prob": posterior.log_prob(value[None]),
        "log_prob of stoch": prior.log_prob(),
        "entropy": library.get_dist(posterior).entropy(),
        "entropy of the last axis": posterior.get_distribution().entropy(),
        "divergence": library.kl_divergence(posterior, prior),
        "balanced divergence": library.kl_balancing(posterior, prior, weight=0.3),
        "mode": library.get_dist(posterior).mode + 0 * first.sum()
        if library.__name__.endswith("torch")
        else library.get_dist(posterior).mode() + 0 * first.sum(),
    }


def torch_measures(kind: str, arguments: list[np.ndarray]) -> Arrays:
    """The measures in torch, and the gradient of each by every argument."""
    import torch

    import ml_networks.torch

    inputs = [torch.tensor(x, requires_grad=True) for x in arguments]
    found = {}
    for name, value in measures(ml_networks.torch, kind, *inputs).items():
        gradients = torch.autograd.grad(
            (value * torch.tensor(normal(*value.shape, seed=9))).sum(),
            inputs,
            allow_unused=True,
            materialize_grads=True,
            retain_graph=True,
        )
        found[name] = value.detach().numpy()
        found |= {f"{name} by {i}": g.numpy() for i, g in enumerate(gradients)}
    return found


@every_kind
def test_measures_are_torchs(kind: str, from_torch: FromTorch) -> None:
    import ml_networks.jax

    arguments = arguments_of(kind, 3, 2)
    expected = from_torch(lambda: torch_measures(kind, arguments))

    @jax.jit
    def run(*inputs: Any) -> Any:
        values, pull = jax.vjp(lambda *a: measures(ml_networks.jax, kind, *a), *inputs)
        found = dict(values)
        for name in values:
            cotangents = {n: jnp.zeros_like(v) for n, v in values.items()}
            cotangents[name] = jnp.asarray(normal(*values[name].shape, seed=9))
            found |= {f"{name} by {i}": g for i, g in enumerate(pull(cotangents))}
        return found

    got = run(*map(jnp.asarray, arguments))
    groups = (GROUPS,) if kind == "bernoulli" else ()
    assert got["divergence"].shape == (3, 2, *groups)
    all_close(got, expected, 2e-5)


def outputs(module: Any, x: Any, **keywords: Any) -> dict[str, Any]:
    state = module(x, deterministic=True, **keywords)
    return {name: getattr(state, name) for name in state.shape._fields}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@either
@every_kind
def test_half_precision_is_torchs(
    kind: str, spherical: bool, dtype: str, from_torch: FromTorch
) -> None:
    x = features(kind, 3, 2)

    def compute() -> Arrays:
        import torch

        import ml_networks.torch

        groups = 1 if kind == "normal" else GROUPS
        module = ml_networks.torch.Distribution(FEATURES, kind, groups, spherical)
        state = outputs(module, torch.tensor(x).to(getattr(torch, dtype)), inv_tmp=2.0)
        log_prob = module(torch.tensor(x).to(getattr(torch, dtype)), True).log_prob()
        assert log_prob.dtype is torch.float32
        return {**{k: v.float().numpy() for k, v in state.items()}, "log_prob": log_prob.numpy()}

    expected = from_torch(compute)
    module = distribution(kind, spherical)

    @jax.jit
    def run(x: Any) -> Any:
        return outputs(module, x, inv_tmp=2.0), module(x, deterministic=True).log_prob()

    got, log_prob = run(jnp.asarray(x, dtype))
    assert all(value.dtype == dtype for value in got.values())
    assert log_prob.dtype == jnp.float32
    # One rounding of the parameters may fall the other way.
    all_close({**got, "log_prob": log_prob}, expected, 4 * float(jnp.finfo(dtype).eps))


# --- Distribution ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_samples_are_exact_codes(dtype: str) -> None:
    codes = {("categorical", False): {0, 1}, ("categorical", True): {-1, 1}}
    codes |= {("bernoulli", False): {0, 1}, ("bernoulli", True): {-0.5, 0.5}}
    modules = {case: distribution(*case) for case in codes}

    @jax.jit
    def run(x: Any) -> Any:
        drawn = {case: module(x, False, 2.0, KEY) for case, module in modules.items()}
        return drawn, {case: module(x, True, 2.0) for case, module in modules.items()}

    with jax.enable_x64(dtype == "float64"):
        for states in run(jnp.asarray(features("bernoulli", 50), dtype)):
            for (kind, spherical), state in states.items():
                assert all(value.dtype == dtype for value in jax.tree.leaves(state))
                stoch = np.asarray(state.stoch, np.float64)
                assert stoch.shape == (50, FEATURES)
                assert set(np.unique(stoch)) == codes[kind, spherical]
                if kind == "categorical":
                    assert ((stoch.reshape(50, GROUPS, CLASSES) == 1).sum(-1) == 1).all()
        state = distribution("normal")(jnp.ones((2, 2 * FEATURES), dtype), key=KEY)
        assert all(value.dtype == dtype for value in jax.tree.leaves(state))


def test_normal_samples_have_the_stated_mean_and_deviation() -> None:
    x = jnp.broadcast_to(jnp.array([1.0, -2.0, 0.5, 3.0]), (40_000, 4))
    state = Distribution(2, "normal", rngs=jax.random.key(0))(x)
    drawn = get_dist(state[0]).sample(seed=KEY, sample_shape=40_000)
    error = 5 * state.std[0] / 200
    for sample in (state.stoch, drawn):
        assert (jnp.abs(sample.mean(0) - state.mean[0]) < error).all()
        assert (jnp.abs(sample.std(0) - state.std[0]) < error).all()


@pytest.mark.parametrize("kind", ["categorical", "bernoulli"])
def test_discrete_samples_have_the_stated_probabilities(kind: str) -> None:
    n = 40_000
    row = jnp.array([0.3, -1.0, 2.0, 0.0, 0.1, 0.2, -0.3, -3.0])
    state = distribution(kind)(jnp.broadcast_to(row, (n, FEATURES)), inv_tmp=1.5, key=KEY)
    expected = state.probs[0].reshape(-1)
    error = 5 * jnp.sqrt(expected * (1 - expected) / n)
    drawn = get_dist(state[0]).sample(seed=KEY, sample_shape=n).reshape(n, -1)
    for sample in (state.stoch, drawn):
        assert (jnp.abs(sample.mean(0) - expected) < error).all()


def test_normal_sample_is_reparametrised() -> None:
    x = jnp.asarray(features("normal", 3))
    state, pull = jax.vjp(lambda x: distribution("normal")(x, key=KEY), x)
    noise = (state.stoch - state.mean) / state.std
    nothing = jnp.zeros_like(state.mean)
    (gradient,) = pull(NormalStoch(nothing, nothing, jnp.ones_like(nothing)))
    slope = jax.nn.sigmoid(x[:, FEATURES:])
    close(gradient, jnp.concatenate([jnp.ones_like(slope), noise * slope], -1), 1e-4)


@either
@pytest.mark.parametrize("kind", ["categorical", "bernoulli"])
def test_sample_passes_its_gradient_straight_through(kind: str, spherical: bool) -> None:
    x = jnp.asarray(features(kind, 3))
    cotangent = jnp.asarray(normal(3, FEATURES, seed=1))
    module = distribution(kind, spherical)
    stoch, pull = jax.vjp(lambda x: module(x, inv_tmp=2.0, key=KEY).stoch, x)

    def soft(x: Any) -> Any:
        logits = 2 * x.reshape(3, GROUPS, CLASSES)
        if kind == "categorical":
            probs = jax.nn.softmax(logits, -1)
            return (2 * probs if spherical else probs).reshape(3, -1)
        probs = jax.nn.sigmoid(logits)
        if spherical:  # the derivative of x / |x| at the corner that was drawn
            corner = (2 * (stoch > 0) - 1.0).reshape(probs.shape)
            moved = corner + 2 * (probs - jax.lax.stop_gradient(probs))
            probs = moved / jnp.linalg.norm(moved, axis=-1, keepdims=True)
        return probs.reshape(3, -1)

    close(pull(cotangent)[0], jax.vjp(soft, x)[1](cotangent)[0])


@every_kind
def test_samples_of_the_distrax_distribution_pass_their_gradient_on(kind: str) -> None:
    state = state_of(kind, 3)

    weights = np.arange(FEATURES if kind == "normal" else CLASSES)

    @jax.jit
    @jax.grad
    def gradient_of_a_sample(state: Any) -> Any:
        return (get_dist(state).sample(seed=KEY, sample_shape=5) * weights).sum()

    gradient, probs = gradient_of_a_sample(state), np.asarray(jax.tree.leaves(state)[1])
    if kind == "normal":
        close(gradient.mean, np.broadcast_to(5 * weights, (3, FEATURES)))
    elif kind == "bernoulli":
        close(gradient.logits, 5 * weights * probs * (1 - probs))
    else:  # through the normalisation of the probabilities
        close(gradient.probs, 5 * (weights - (weights * probs).sum(-1, keepdims=True)), 1e-4)


@every_kind
def test_deterministic_takes_the_most_probable(kind: str) -> None:
    module = jax.jit(lambda x: distribution(kind)(x, deterministic=True))
    # At logits of 0, all probabilities are equal: there sampling would show.
    for x in (jnp.zeros(features(kind, 20).shape), jnp.asarray(features(kind, 20))):
        first, second = module(x), module(x)
        assert_equal(first, second)
    grouped = features(kind, 20)[:, :FEATURES].reshape(20, GROUPS, CLASSES)
    stoch = second.to_numpy().stoch.reshape(grouped.shape)
    if kind == "bernoulli":
        assert ((stoch > 0) == (grouped > 0)).all()
    elif kind == "categorical":
        assert (stoch.argmax(-1) == grouped.argmax(-1)).all()


def test_deterministic_onehot() -> None:
    x = jnp.array([[0.1, 0.7, 0.2]])
    one_hot, pull = jax.vjp(distribution("categorical").deterministic_onehot, x)
    assert one_hot.tolist() == [[0.0, 1.0, 0.0]]
    assert pull(jnp.array([[1.0, 2.0, 3.0]]))[0].tolist() == [[1.0, 2.0, 3.0]]


def test_spherical_makes_no_table_of_codes() -> None:
    from ml_networks.convert import state_dict

    module = Distribution(160, "bernoulli", n_groups=2, spherical=True)  # 80 bits a group
    state = module(jnp.asarray(normal(5, 160)), key=KEY)
    close(jnp.linalg.norm(state.stoch.reshape(5, 2, 80), axis=-1), jnp.ones((5, 2)))
    assert state_dict(module) == {}
    module = Distribution(40, "bernoulli", spherical=True, rngs=jax.random.key(0))
    weights = state_dict(module)
    assert list(weights) == ["codebook.mask"]
    assert weights["codebook.mask"].tolist() == [2**i for i in range(39, -1, -1)]


@every_kind
def test_certain_states_have_finite_measures_and_gradients(kind: str) -> None:
    x = 150 * jnp.sign(jnp.asarray(features(kind, 3)))

    def loss(x: Any, y: Any) -> Any:
        state, other = distribution(kind)(x, True), distribution(kind)(y, True)
        return kl_balancing(state, other).sum() + state.log_prob().sum() + other.log_prob().sum()

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, -x)
    assert jnp.isfinite(value)
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)


def test_divergence_from_a_prior_whose_probability_rounds_to_one() -> None:
    """That of the logits in float64; torch rounds the probability first and has inf."""
    logits = np.array([[[0.0, 30.0, -200.0, 0.0]], [[20.0, 20.0, 3.0, 120.0]]])
    states = [
        BernoulliStoch(x, jax.nn.sigmoid(x), x.reshape(1, -1))
        for x in jnp.asarray(logits[:, None], jnp.float32)
    ]
    (q_off, q_on), (p_off, p_on) = ((np.logaddexp(0, x), np.logaddexp(0, -x)) for x in logits)
    expected = np.exp(-q_on) * (p_on - q_on) + np.exp(-q_off) * (p_off - q_off)
    close(kl_divergence(*states).sum(), expected.sum())


def test_nan_is_not_hidden() -> None:
    for kind in KINDS:
        module = distribution(kind)
        run = jax.jit(lambda x, module=module: (module(x, True).stoch, module(x, key=KEY).stoch))
        for stoch in run(jnp.full(features(kind, 1).shape, jnp.nan)):
            assert np.isnan(stoch).all()


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="'n_gropus'; did you mean 'n_groups'"):
        Distribution(in_dim=8, dist="normal", n_gropus=1)
    for error in (NotImplementedError, ValueError):
        with pytest.raises(error, match="'norml'; did you mean 'normal'"):
            Distribution(8, "norml")
    with pytest.raises(ValueError, match="n_groups = 3 must divide in_dim = 8"):
        Distribution(8, "categorical", n_groups=3)
    with pytest.raises(TypeError, match="rngs is a int"):
        Distribution(8, "categorical", rngs=0)
    for kind, width in (("normal", 16), ("categorical", 8), ("bernoulli", 8)):
        with pytest.raises(ValueError, match=f"takes {width} features in the last axis"):
            distribution(kind)(jnp.zeros((2, 12)), key=KEY)
        with pytest.raises(TypeError, match="give key="):
            distribution(kind)(jnp.zeros((2, width)))


# --- keys and transformations ---------------------------------------------------------------


def test_keys_of_every_kind() -> None:
    x = jnp.asarray(features("normal", 3))
    module = distribution("normal", rngs=jax.random.PRNGKey(7))
    first, second = module(x), module(x)
    assert (first.stoch != second.stoch).any()
    again = distribution("normal", rngs=jax.random.key(7))
    assert_equal(again(x), first)
    assert_equal(module(x, key=KEY), module(x, key=jax.random.PRNGKey(3)))
    own = nnx.Rngs(0, sample=7)
    same = nnx.Rngs(params=5, sample=7)
    assert_equal(distribution("normal", rngs=own)(x), distribution("normal", rngs=same)(x))


@every_kind
def test_vmap_with_keys(kind: str) -> None:
    module, x = distribution(kind, spherical=True), jnp.asarray(features(kind, 6, 3))
    keys = jax.random.split(KEY, 6)

    @jax.jit
    def run(x: Any, keys: Any) -> Any:
        states = jax.vmap(lambda row, key: module(row, key=key))(x, keys)
        log_prob = jax.vmap(lambda state: state.log_prob(), in_axes=1, out_axes=1)(states)
        divergence = jax.vmap(kl_divergence)(states, states[::-1])
        return (
            states,
            (log_prob, divergence),
            (
                states.log_prob(),
                kl_divergence(states, states[::-1]),
            ),
        )

    states, mapped, whole = run(x, keys)
    row = module(x[2], key=keys[2])
    for got, expected in zip(jax.tree.leaves(states), jax.tree.leaves(row), strict=True):
        close(got[2], expected, 1e-6)
    for got, expected in zip(mapped, whole, strict=True):
        close(got, expected)


@every_kind
def test_a_state_is_carried_through_scan(kind: str) -> None:
    """As a world model does: the sample feeds the features of the next step."""
    module = distribution(kind)
    weight = jnp.asarray(normal(FEATURES, features(kind).size, seed=1))

    def rollout(weight: Any, start: Any) -> tuple[Any, Any]:
        def step(state: Any, key: Any) -> tuple[Any, Any]:
            after = module(state.stoch @ weight, key=key)
            return after, (after, kl_balancing(after, state))

        return jax.lax.scan(step, start, jax.random.split(KEY, 5))[1]

    def loss(weight: Any) -> tuple[Any, Any]:
        states, divergence = rollout(weight, state_of(kind, 3))
        return divergence.sum(), (states, divergence, kl_divergence(states[1:], states[:-1]))

    results, gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(weight)
    states, divergence, again = results[1]
    assert states.stoch.shape == (5, 3, FEATURES)
    assert divergence.shape == ((5, 3, GROUPS) if kind == "bernoulli" else (5, 3))
    close(again, divergence[1:], 1e-4)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient) != 0).any()


def test_the_modules_own_rngs_under_nnx_and_split() -> None:
    x = jnp.asarray(features("bernoulli", 3))
    eager, module = (distribution("bernoulli", rngs=jax.random.key(1)) for _ in range(2))
    call = nnx.jit(lambda module, x: module(x).stoch)
    np.testing.assert_array_equal(call(module, x), eager(x).stoch)
    np.testing.assert_array_equal(call(module, x), eager(x).stoch)
    graph, state = nnx.split(module)

    @jax.jit
    def pure(state: Any, x: Any) -> Any:
        module = nnx.merge(graph, state)
        return module(x).stoch, nnx.state(module)

    with pytest.raises(TraceContextError) as raised:
        jax.jit(lambda x: module(x).stoch)(x)
    assert "give key= in the call" in "".join(raised.value.__notes__)
    first, state = pure(state, x)
    np.testing.assert_array_equal(first, eager(x).stoch)
    np.testing.assert_array_equal(pure(state, x)[0], eager(x).stoch)


# --- states ---------------------------------------------------------------------------------


@every_kind
def test_a_state_is_a_pytree(kind: str) -> None:
    state = state_of(kind, 3)
    leaves, structure = jax.tree.flatten(state)
    assert_equal(jax.tree.unflatten(structure, leaves), state)
    assert structure == jax.tree.structure(state[:2])
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert paths == [f".{name}" for name in state.shape._fields]
    shapes = jax.eval_shape(lambda: state)
    assert type(shapes) is type(state)
    assert repr(shapes) == repr(state)
    half = jax.tree.map(lambda value: value.astype(jnp.bfloat16), state)
    assert_equal(half, state.astype(jnp.bfloat16))


def test_states_print_as_shapes() -> None:
    assert repr(Distribution(64, "normal")(jnp.zeros((32, 128)), True)) == (
        "NormalStoch(mean: (32, 64), std: (32, 64), stoch: (32, 64))"
    )
    state = Distribution(64, "categorical", 8)(jnp.zeros((32, 64)), True)
    assert repr(state) == (
        "CategoricalStoch(logits: (32, 8, 8), stoch: (32, 64), probs: (32, 8, 8))"
    )
    assert repr(state.shape) == (
        "CategoricalShape(logits: (32, 8, 8), probs: (32, 8, 8), stoch: (32, 64))"
    )
    assert state.shape.stoch == (32, 64)
    assert repr(jax.tree.map(lambda _: None, state)) == (
        "CategoricalStoch(logits: None, stoch: None, probs: None)"
    )


@every_kind
def test_copy_and_pickle(kind: str) -> None:
    state = state_of(kind, 3)
    for twin in (copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert_equal(twin, state)
    assert copy.copy(state).stoch is state.stoch


@every_kind
def test_indexing(kind: str) -> None:
    state = state_of(kind, 3, 5)
    assert len(state) == 3
    assert len(list(state)) == 3
    whole = state.to_numpy()
    for index in (0, slice(1, None), (1, 2), (slice(None), np.array([0, 4])), np.array([2, 0])):
        part = state[index]
        assert type(part) is type(state)
        assert_equal(part, whole[index])


@every_kind
def test_reshaping_follows_stoch(kind: str) -> None:
    state = state_of(kind, 3, 5)
    stoch = np.asarray(state.stoch)
    for changed, expected in (
        (state.expand_dims(0), stoch[None]),
        (state.unsqueeze(1), stoch[:, None]),
        (state.expand_dims(dim=1), stoch[:, None]),
        (state.flatten(), stoch.reshape(-1)),
        (state.flatten(0, 1), stoch.reshape(15, -1)),
        (state.flatten(start_dim=0, end_dim=-2), stoch.reshape(15, -1)),
        (state.reshape(15, -1), stoch.reshape(15, -1)),
        (state.reshape((5, 3, FEATURES)), stoch.reshape(5, 3, -1)),
        (state[:1].squeeze(0), stoch[0]),
        (state[:1, :1].squeeze(), stoch[0, 0]),
        (state.transpose(1, 0, 2), stoch.swapaxes(0, 1)),
        (state.swapaxes(0, 1), stoch.swapaxes(0, 1)),
        (state.swapaxes(-3, -2), stoch.swapaxes(0, 1)),
        (state.broadcast((2, 3, 5, FEATURES)), np.stack([stoch, stoch])),
    ):
        assert type(changed) is type(state)
        np.testing.assert_array_equal(changed.stoch, expected)
        if kind != "normal":  # what describes a group stays with it
            grouped = (*expected.shape[:-1], expected.shape[-1] // CLASSES, CLASSES)
            assert changed.probs.shape == grouped
    close(state.swapaxes(0, 1).log_prob(), state.log_prob().T)
    if kind != "normal":
        with pytest.raises(ValueError, match="the feature axis last"):
            state.transpose(2, 1, 0)
    with pytest.raises(ValueError, match="an order of the 3 axes"):
        state.transpose(1, 0)
    with pytest.raises(ValueError, match=f"must end in the {FEATURES} features"):
        state.broadcast((5, 3, 1))


@every_kind
def test_array_methods_go_to_every_field(kind: str) -> None:
    state = state_of(kind, 3)
    assert all(value.dtype == jnp.float16 for value in jax.tree.leaves(state.astype("float16")))
    assert_equal(state.copy(), state)
    assert_equal(state.device_put(), state)
    assert_equal(state.device_put(jax.devices()[0]), state)
    assert all(type(value) is np.ndarray for value in jax.tree.leaves(state.to_numpy()))
    assert_equal(jax.tree.map(jnp.asarray, state.to_numpy()), state)
    for stop in ("stop_gradient", "detach"):
        gradient = jax.grad(lambda s, stop=stop: getattr(s, stop)().log_prob().sum())(state)
        assert all((value == 0).all() for value in jax.tree.leaves(gradient))
    assert (state.ndim, state.dtype) == (2, jnp.float32)
    with pytest.raises(AttributeError, match="has no attribute 'meann'"):
        state.meann  # noqa: B018


@every_kind
def test_stack_and_cat(kind: str) -> None:
    states = [state_of(kind, 3, 5, seed=seed) for seed in range(4)]
    for axis in (0, 1, 2, -2):
        stacked = stack_dist(states, axis)
        np.testing.assert_array_equal(stacked.stoch, jnp.stack([s.stoch for s in states], axis))
        front = (slice(None),) * (axis % 4)
        for i, state in enumerate(states):
            assert_equal(stacked[(*front, i)], state)
    for axis in (0, 1, -2):
        joined = cat_dist(states, dim=axis)
        expected = jnp.concatenate([s.stoch for s in states], axis)
        np.testing.assert_array_equal(joined.stoch, expected)
        size = states[0].stoch.shape[axis]
        front = (slice(None),) * (axis % 3)
        assert_equal(joined[(*front, slice(size, 2 * size))], states[1])
    joined = cat_dist(states)
    np.testing.assert_array_equal(joined.stoch, jnp.concatenate([s.stoch for s in states], -1))
    close(joined.log_prob(), sum(s.log_prob() for s in states), 1e-4)


def test_what_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match="stochs is empty"):
        stack_dist([])
    with pytest.raises(TypeError, match="one kind, got BernoulliStoch, CategoricalStoch"):
        cat_dist([state_of("bernoulli", 3), state_of("categorical", 3)])
    with pytest.raises(TypeError, match="one kind, got ArrayImpl"):
        cat_dist([jnp.zeros(2)])
    with pytest.raises(ValueError, match="batch axes only"):
        stack_dist([state_of("categorical", 3)] * 2, axis=-1)
    with pytest.raises(IndexError, match="axis is 3; this state has axes -2 to 1"):
        cat_dist([state_of("categorical", 3)] * 2, axis=3)
    with pytest.raises(TypeError, match="twice"):
        cat_dist([state_of("normal", 3)] * 2, -1, dim=-1)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(3,\), \(4,\) and \(3,\)"):
        NormalStoch(jnp.zeros(3), jnp.ones(4), jnp.zeros(3))
    for kind in (CategoricalStoch, BernoulliStoch):
        with pytest.raises(ValueError, match=r"\(2, 4\), \(2, 4\) and \(2, 4\)"):
            kind(jnp.zeros((2, 4)), jnp.zeros((2, 4)), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="batch axes only"):
        state_of("categorical", 3)[:, :3]
    with pytest.raises(ValueError, match="a multiple of the 4 classes"):
        state_of("categorical", 3).expand_dims(-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@every_kind
def test_save_and_load(kind: str, dtype: str, tmp_path: Path) -> None:
    state = state_of(kind, 3, 2, dtype=dtype)
    state.save(tmp_path / "reports" / "0")
    names = {path.name for path in (tmp_path / "reports" / "0").iterdir()}
    assert names == {f"{name}.blosc2" for name in state.shape._fields}
    assert_equal(type(state).load(tmp_path / "reports" / "0"), state)
    (tmp_path / "reports" / "0" / "stoch.blosc2").unlink()
    with pytest.raises(FileNotFoundError):
        type(state).load(tmp_path / "reports" / "0")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@every_kind
def test_files_of_torch(kind: str, dtype: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import ml_networks.torch

    state = state_of(kind, 3)
    theirs = getattr(ml_networks.torch, type(state).__name__)
    there = theirs(*(torch.tensor(np.asarray(value)) for value in jax.tree.leaves(state)))
    there.to(getattr(torch, dtype)).save(tmp_path)
    here = type(state).load(tmp_path)
    assert_equal(here, state.astype("float32" if dtype == "float64" else dtype))
    here.save(tmp_path)
    back = theirs.load(tmp_path)
    for name in state.shape._fields:
        close(getattr(back, name).float().numpy(), np.asarray(getattr(here, name), np.float32))


@every_kind
def test_the_distrax_distribution(kind: str) -> None:
    import distrax

    state = state_of(kind, 3, 5)
    made = get_dist(state)
    assert isinstance(made, distrax.Independent)
    event = (FEATURES,) if kind == "normal" else (GROUPS, CLASSES)
    assert (made.batch_shape, made.event_shape) == ((3, 5), event)
    narrow = state.get_distribution().batch_shape
    assert narrow == ((3, 5, GROUPS) if kind == "bernoulli" else (3, 5))

    @jax.jit
    def run(state: Any) -> Any:
        value = get_dist(state).sample(seed=KEY)
        flat = value.reshape(3, 5, FEATURES)
        others = state.log_prob(jnp.stack([flat, state.stoch]))
        return (
            value,
            (state.log_prob(flat), state.log_prob()),
            (get_dist(state).log_prob(value), others),
        )

    value, (drawn, own), (expected, others) = run(state)
    assert value.shape == (3, 5, *event)
    close(drawn, expected)
    close(others, np.stack([drawn, own]))
    with pytest.raises(TypeError, match="must be a StochState, got ArrayImpl"):
        get_dist(value)


@pytest.mark.parametrize("kind", ["categorical", "bernoulli"])
def test_log_prob_of_spherical_samples(kind: str) -> None:
    plain = state_of(kind, 6)
    codes = (2 * plain.to_numpy().stoch - 1) * (1 if kind == "categorical" else 0.5)
    expected = plain.log_prob()
    close(plain.log_prob(jnp.asarray(codes)), expected)
    if kind == "categorical":
        grouped = jnp.asarray(codes.reshape(6, GROUPS, CLASSES))
        close(get_dist(plain).log_prob(grouped), expected)


# --- divergences ----------------------------------------------------------------------------


def test_divergence_to_a_distribution_that_is_not_wrapped() -> None:
    import distrax

    state = state_of("normal", 3)
    variance = state.std**2
    expected = 0.5 * (variance + state.mean**2 - 1 - jnp.log(variance)).sum(-1)
    standard = distrax.Normal(jnp.zeros(FEATURES), jnp.ones(FEATURES))
    for prior in (distrax.Normal(0.0, 1.0), standard, distrax.Independent(standard, 1)):
        close(kl_divergence(state, prior), expected)
        close(state.get_distribution().kl_divergence(prior), expected)
    state = state_of("categorical", 3)
    flat = distrax.OneHotCategorical(probs=jnp.full_like(state.probs, 1 / CLASSES))
    expected = (state.probs * jnp.log(state.probs * CLASSES)).sum((-1, -2))
    close(kl_divergence(state, flat), expected)
    with pytest.raises(ValueError, match="the events of the two distributions"):
        kl_divergence(state, distrax.Independent(flat, 0))
    with pytest.raises(NotImplementedError):
        kl_divergence(state, distrax.Normal(0.0, 1.0))
    with pytest.raises(TypeError, match="a state or a distrax distribution, got ArrayImpl"):
        kl_divergence(state, state.stoch)


def test_kl_balancing() -> None:
    mean = jnp.asarray(normal(2, 3, 4))
    std = jnp.exp(jnp.asarray(normal(2, 3, 4, seed=1)))

    def pair(mean: Any) -> Any:
        return [NormalStoch(mean[i], std[i], mean[i]) for i in (0, 1)]

    def gradient(loss: Any) -> Any:
        return jax.grad(lambda mean: loss(*pair(mean)).sum())(mean)

    q, p = pair(mean)
    for loss, weight in (
        (kl_balancing, 0.8),
        (lambda q, p: kl_balancing(q, p, 0.3), 0.3),
        (lambda q, p: kl_balancing([q, p], alpha=0.3), 0.3),
        (lambda q, p: kl_balancing((q,), (p,), weight=0.3), 0.3),
    ):
        close(loss(q, p), kl_divergence(q, p))
        share = jnp.array([1 - weight, weight]).reshape(2, 1, 1)
        close(gradient(loss), share * gradient(kl_divergence), 1e-4)
    close(kl_balancing([q, p], [p, q]), kl_divergence(q, p) + kl_divergence(p, q))


def test_kl_balancing_arguments() -> None:
    import distrax

    q, p = state_of("normal", 3), state_of("normal", 3, seed=1)
    with pytest.raises(TypeError, match="needs a posterior and a prior"):
        kl_balancing(q)
    with pytest.raises(ValueError, match="2 posteriors and 1 priors"):
        kl_balancing([q, p], [p])
    with pytest.raises(TypeError, match="needs states, got Normal"):
        kl_balancing(distrax.Normal(0.0, 1.0), distrax.Normal(0.0, 1.0))
    with pytest.raises(TypeError, match="twice"):
        kl_balancing(q, p, weight=0.5, alpha=0.5)


# --- BSQCodebook ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 31, 32, 63])
def test_codes(bits: int, from_torch: FromTorch) -> None:
    x = normal(4, 7, bits)

    def compute() -> Arrays:
        import torch

        import ml_networks.torch

        codebook = ml_networks.torch.BSQCodebook(bits)
        return {"indices": codebook.encode(torch.tensor(x)).numpy()}

    whole = from_torch(compute)["indices"]
    codebook, expected = BSQCodebook(bits), np.where(x >= 0, 1.0, -1.0) / bits**0.5

    @jax.jit
    def run(x: Any) -> Any:
        indices = codebook.encode(x)
        single = indices[:, :, None]
        decoded = (codebook.decode(indices), codebook.indices_to_codes(indices))
        kept = codebook.decode(single)
        return indices, (codebook(x), *decoded, codebook.indices_to_codes(single)), kept

    indices, codes, kept = run(jnp.asarray(x))
    if bits > 31:
        assert (indices.dtype, indices.shape) == (jnp.uint32, (4, 7, 2))
        high, low = np.moveaxis(np.asarray(indices).astype(np.int64), -1, 0)
        np.testing.assert_array_equal(high << 32 | low, whole)
    else:
        assert (indices.dtype, indices.shape) == (jnp.int32, (4, 7))
        np.testing.assert_array_equal(indices, whole)
    for code in (*codes, codebook.decode(whole)):
        close(code, expected, 1e-6)
    assert kept.shape == (4, 7, 1, bits)
    if bits > 32:
        with jax.enable_x64(True):
            indices = codebook.encode(jnp.asarray(x))
            assert indices.dtype == jnp.int64
            np.testing.assert_array_equal(indices, whole)
            close(codebook.decode(indices), expected, 1e-6)


def test_indices_that_do_not_fit() -> None:
    codebook = BSQCodebook(40)
    with pytest.raises(ValueError, match="two uint32 words in the last axis, got shape \\(3,\\)"):
        codebook.decode(jnp.zeros(3, jnp.uint32))
    with pytest.raises(TypeError, match="must be integers, got float32"):
        codebook.decode(jnp.zeros(3))
    close(codebook.decode(jnp.array([5])), codebook.decode(np.array([5])))


def test_decoding_keeps_an_axis_of_length_one() -> None:
    codebook = BSQCodebook(6, 3, rngs=KEY)
    again = jax.jit(lambda x: (codebook.decode(codebook.encode(x)), codebook(x)))
    for shape in ((6,), (4, 1, 6)):
        decoded, quantized = again(jnp.asarray(normal(*shape)))
        close(decoded, quantized, 1e-6)


def test_projections() -> None:
    codebook = BSQCodebook(dim=64, codebook_dim=8, rngs=jax.random.key(0))
    x = jnp.asarray(normal(32, 64))

    @nnx.jit
    def run(codebook: Any, x: Any) -> Any:
        projected = codebook.project_in(x)
        expected = codebook.project_out(jnp.where(projected >= 0, 1, -1) / 8**0.5)
        codes = codebook.quantize(x, entropy_bits=4)
        return codes, (codebook(x), expected), codebook(x.astype(jnp.bfloat16))

    codes, others, half = run(codebook, x)
    for other in others:
        close(codes.quantized, other, 1e-6)
    assert codes.sample_entropy.shape == (32,)
    assert codes.codebook_entropy.shape == ()
    assert half.dtype == jnp.bfloat16
    assert codebook.quantize(x).codebook_entropy is None

    @nnx.jit
    @nnx.grad
    def gradient(codebook: Any) -> Any:
        codes = codebook.quantize(x, entropy_bits=4)
        return codes.sample_entropy.mean() - codes.codebook_entropy

    assert np.abs(gradient(codebook)["project_in"]["kernel"][...]).sum() > 0


def test_bits_to_codes() -> None:
    expected = np.array([[-1.0, 1.0, 1.0]]) / 3**0.5
    for bits in (jnp.array([[0, 1, 1]]), jnp.array([[0.0, 1.0, 1.0]])):
        close(BSQCodebook.bits_to_codes(bits), expected)
        close(BSQCodebook.bits_to_codes(bits != 0), expected)
    assert jnp.abs(BSQCodebook.bits_to_codes(jnp.full((2, 3), 0.5))).sum() == 0


def test_codebook_arguments() -> None:
    assert BSQCodebook(codebook_dim=8).dim == 8
    with pytest.raises(TypeError, match="needs dim"):
        BSQCodebook()
    with pytest.raises(TypeError, match="rngs is missing"):
        BSQCodebook(8, 4)
    for bits in (0, 64):
        with pytest.raises(ValueError, match=f"1 to 63 bits, got {bits}"):
            BSQCodebook(bits)
    with pytest.raises(ValueError, match="must have 6 in the last axis"):
        BSQCodebook(6)(jnp.zeros((2, 5)))


# --- imports --------------------------------------------------------------------------------


def test_distrax_is_imported_with_the_first_distribution() -> None:
    code = """
import sys, jax.numpy as jnp
from ml_networks.jax import BSQCodebook, Distribution, cat_dist, focal_loss, kl_divergence
state = Distribution(2, "normal")(jnp.ones((3, 4)), deterministic=True)
heavy = {"torch", "lightning", "pytorch_lightning", "distrax", "tensorflow_probability"}
print(sorted(heavy & set(sys.modules)))
state.get_distribution()
print(sorted(heavy & set(sys.modules)))
"""
    command = [sys.executable, "-W", "error", "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[:2] == ["[]", "['distrax', 'tensorflow_probability']"]
