from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributions as D
from torch import Tensor
from torch.utils import _pytree as pytree

from ml_networks import BSQCodebook, Distribution, cat_dist, get_dist, stack_dist
from ml_networks.torch.distributions import (
    BernoulliStoch,
    CategoricalStoch,
    NormalStoch,
    StochState,
)

GROUPS, CLASSES = 2, 4
FEATURES = GROUPS * CLASSES
KINDS = ["normal", "categorical", "bernoulli"]
every_kind = pytest.mark.parametrize("kind", KINDS)
either = pytest.mark.parametrize("spherical", [False, True], ids=["plain", "spherical"])


def distribution(kind: str, spherical: bool = False) -> Distribution:
    return Distribution(FEATURES, kind, 1 if kind == "normal" else GROUPS, spherical)


def features(kind: str, *batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*batch, FEATURES * (2 if kind == "normal" else 1), dtype=dtype)


def state_of(kind: str, *batch: int, dtype: torch.dtype = torch.float32) -> StochState:
    torch.manual_seed(0)
    return distribution(kind)(features(kind, *batch, dtype=dtype))


def values(state: StochState) -> list[Tensor]:
    return pytree.tree_leaves(state)


def assert_equal(a: StochState, b: StochState) -> None:
    assert type(a) is type(b)
    for x, y in zip(values(a), values(b), strict=True):
        assert x.dtype is y.dtype
        assert torch.equal(x, y)


# --- Distribution ---------------------------------------------------------------------------


def test_normal() -> None:
    x = features("normal", 2, 3)
    state = distribution("normal")(x)
    mean, raw = x.chunk(2, -1)
    torch.testing.assert_close(state.mean, mean)
    torch.testing.assert_close(state.std, torch.nn.functional.softplus(raw) + 1e-6)
    deterministic = distribution("normal")(x, deterministic=True)
    assert torch.equal(deterministic.stoch, mean)


def test_normal_samples_have_the_stated_mean_and_deviation() -> None:
    torch.manual_seed(0)
    x = torch.tensor([1.0, -2.0, 0.5, 3.0]).expand(40_000, 4)
    state = Distribution(2, "normal")(x)
    error = 5 * state.std[0] / 200
    assert ((state.stoch.mean(0) - state.mean[0]).abs() < error).all()
    assert ((state.stoch.std(0) - state.std[0]).abs() < error).all()


def test_normal_sample_is_reparametrised() -> None:
    x = features("normal", 3).requires_grad_()
    state = distribution("normal")(x)
    noise = (state.stoch - state.mean) / state.std
    (gradient,) = torch.autograd.grad(state.stoch.sum(), x)
    slope = x[:, FEATURES:].sigmoid()
    expected = torch.cat([torch.ones_like(slope), noise * slope], -1)
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@either
@every_kind
def test_samples_are_exact_codes(
    kind: str, spherical: bool, dtype: torch.dtype, deterministic: bool
) -> None:
    torch.manual_seed(0)
    x = features(kind, 50, dtype=dtype)
    state = distribution(kind, spherical)(x, deterministic=deterministic, inv_tmp=2.0)
    assert all(value.dtype is dtype for value in values(state))
    assert state.stoch.shape == (50, FEATURES)
    if kind == "normal":
        return
    codes = state.stoch.unflatten(-1, (GROUPS, CLASSES))
    if kind == "categorical":
        low = -1 if spherical else 0
        assert set(state.stoch.unique().tolist()) == {low, 1}
        assert ((codes == 1).sum(-1) == 1).all()
    elif spherical:
        assert set(state.stoch.unique().tolist()) == {-0.5, 0.5}
    else:
        assert set(state.stoch.unique().tolist()) == {0, 1}


@either
def test_categorical(spherical: bool) -> None:
    x = features("categorical", 3).requires_grad_()
    state = distribution("categorical", spherical)(x, inv_tmp=2.0)
    logits = x.unflatten(-1, (GROUPS, CLASSES))
    probs = (2 * logits).softmax(-1)
    torch.testing.assert_close(state.logits, logits)
    torch.testing.assert_close(state.probs, probs)
    cotangent = torch.randn(3, FEATURES)
    (gradient,) = torch.autograd.grad(state.stoch, x, cotangent, retain_graph=True)
    scale = 2 if spherical else 1
    (expected,) = torch.autograd.grad(scale * probs.flatten(-2), x, cotangent)
    torch.testing.assert_close(gradient, expected)


@either
def test_bernoulli(spherical: bool) -> None:
    x = features("bernoulli", 3).requires_grad_()
    state = distribution("bernoulli", spherical)(x, inv_tmp=2.0)
    logits = 2 * x.unflatten(-1, (GROUPS, CLASSES))
    torch.testing.assert_close(state.logits, logits)
    torch.testing.assert_close(state.probs, logits.sigmoid())
    cotangent = torch.randn(3, FEATURES)
    (gradient,) = torch.autograd.grad(state.stoch, x, cotangent, retain_graph=True)
    soft = logits.sigmoid()
    if spherical:
        bits = (state.stoch > 0).float().unflatten(-1, (GROUPS, CLASSES))
        soft = BSQCodebook.bits_to_codes(bits + soft - soft.detach())
    (expected,) = torch.autograd.grad(soft.flatten(-2), x, cotangent)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("kind", ["categorical", "bernoulli"])
def test_discrete_samples_have_the_stated_probabilities(kind: str) -> None:
    torch.manual_seed(0)
    n = 40_000
    x = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.1, 0.2, -0.3, -3.0]).expand(n, FEATURES)
    state = distribution(kind)(x, inv_tmp=1.5)
    expected = state.probs[0].flatten()
    error = 5 * (expected * (1 - expected) / n).sqrt()
    assert ((state.stoch.mean(0) - expected).abs() < error).all()


@either
@every_kind
def test_deterministic_is_deterministic(kind: str, spherical: bool) -> None:
    # At logits of 0, all probabilities are equal: there sampling shows.
    for x in (torch.zeros_like(features(kind, 20)), features(kind, 20)):
        first, second = (distribution(kind, spherical)(x, deterministic=True) for _ in range(2))
        assert_equal(first, second)
    if kind == "bernoulli":
        bits = x > 0
        assert torch.equal(second.stoch > 0, bits)
    if kind == "categorical":
        largest = x.unflatten(-1, (GROUPS, CLASSES)).argmax(-1)
        assert torch.equal(second.stoch.unflatten(-1, (GROUPS, CLASSES)).argmax(-1), largest)


def test_deterministic_onehot() -> None:
    x = torch.tensor([[0.1, 0.7, 0.2]], requires_grad=True)
    one_hot = distribution("categorical").deterministic_onehot(x)
    assert one_hot.tolist() == [[0.0, 1.0, 0.0]]
    (gradient,) = torch.autograd.grad(one_hot, x, torch.tensor([[1.0, 2.0, 3.0]]))
    assert gradient.tolist() == [[1.0, 2.0, 3.0]]


def test_spherical_makes_no_table_of_codes() -> None:
    module = Distribution(160, "bernoulli", n_groups=2, spherical=True)  # 80 bits a group
    state = module(torch.randn(5, 160))
    torch.testing.assert_close(state.stoch.unflatten(-1, (2, 80)).norm(dim=-1), torch.ones(5, 2))
    module = Distribution(40, "bernoulli", spherical=True)
    assert sum(buffer.numel() for buffer in module.buffers()) == 40
    assert list(module.state_dict()) == ["codebook.mask"]


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="'n_gropus'; did you mean 'n_groups'"):
        Distribution(in_dim=8, dist="normal", n_gropus=1)
    for error in (NotImplementedError, ValueError):
        with pytest.raises(error, match="'norml'; did you mean 'normal'"):
            Distribution(8, "norml")
    with pytest.raises(ValueError, match="n_groups = 3 must divide in_dim = 8"):
        Distribution(8, "categorical", n_groups=3)
    for kind, width in (("normal", 16), ("categorical", 8), ("bernoulli", 8)):
        with pytest.raises(ValueError, match=f"takes {width} features in the last axis"):
            distribution(kind)(torch.zeros(2, 12))


# --- states ---------------------------------------------------------------------------------


def test_states_print_as_shapes() -> None:
    assert repr(Distribution(64, "normal")(torch.randn(32, 128))) == (
        "NormalStoch(mean: torch.Size([32, 64]), std: torch.Size([32, 64]), "
        "stoch: torch.Size([32, 64]))"
    )
    state = Distribution(64, "categorical", 8)(torch.randn(32, 64))
    assert repr(state) == (
        "CategoricalStoch(logits: torch.Size([32, 8, 8]), stoch: torch.Size([32, 64]), "
        "probs: torch.Size([32, 8, 8]))"
    )
    assert repr(state.shape) == (
        "CategoricalShape(logits: torch.Size([32, 8, 8]), probs: torch.Size([32, 8, 8]), "
        "stoch: torch.Size([32, 64]))"
    )
    assert state.shape.stoch == (32, 64)


@every_kind
def test_copy_and_pickle(kind: str) -> None:
    state = state_of(kind, 3)
    for twin in (copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert_equal(twin, state)
    assert copy.copy(state).stoch is state.stoch
    assert copy.deepcopy(state).stoch is not state.stoch


@every_kind
def test_indexing(kind: str) -> None:
    state = state_of(kind, 3, 5)
    assert len(state) == 3
    assert len(list(state)) == 3
    for index in (0, slice(1, None), (1, 2), (slice(None), [0, 4]), torch.tensor([2, 0])):
        part = state[index]
        assert type(part) is type(state)
        for field, whole in zip(values(part), values(state), strict=True):
            assert torch.equal(field, whole[index])


@every_kind
def test_reshaping_follows_stoch(kind: str) -> None:
    state = state_of(kind, 3, 5)
    for method, arguments in (
        ("unsqueeze", (0,)),
        ("unsqueeze", (1,)),
        ("flatten", ()),
        ("flatten", (0, 1)),
        ("flatten", (0, -2)),
        ("reshape", (15, -1)),
        ("view", (5, 3, FEATURES)),
        ("unflatten", (1, (5, 1))),
    ):
        changed = getattr(state, method)(*arguments)
        assert torch.equal(changed.stoch, getattr(state.stoch, method)(*arguments))
        for field, original in zip(values(changed), values(state), strict=True):
            assert torch.equal(field.flatten(), original.flatten())
        if kind != "normal":
            assert changed.probs.shape[-1] == CLASSES
    assert_equal(state.unsqueeze(1).squeeze(1), state)
    assert_equal(state.flatten(0, 1).unflatten(0, (3, 5)), state)


@every_kind
def test_tensor_methods_go_to_every_field(kind: str) -> None:
    state = state_of(kind, 3)
    assert state.double().dtype is torch.float64
    assert all(value.dtype is torch.float64 for value in values(state.to(torch.float64)))
    assert all(not value.requires_grad for value in values(state.detach()))
    assert_equal(state.clone(), state)
    assert state.size(0) == dict.fromkeys(state.shape._fields, 3)
    assert (state.device, state.ndim) == (torch.device("cpu"), 2)
    with pytest.raises(AttributeError, match="has no attribute 'meann'"):
        state.meann  # noqa: B018


@every_kind
def test_stack_and_cat(kind: str) -> None:
    states = [distribution(kind)(features(kind, 3, 5)) for _ in range(4)]
    for dim in (0, 1, 2, -2):
        stacked = stack_dist(states, dim)
        assert torch.equal(stacked.stoch, torch.stack([s.stoch for s in states], dim))
        axis = dim % 4
        for i, state in enumerate(states):
            assert_equal(stacked[(slice(None),) * axis + (i,)], state)
    for dim in (0, 1, -2):
        joined = cat_dist(states, dim)
        assert torch.equal(joined.stoch, torch.cat([s.stoch for s in states], dim))
        axis = dim % 3
        size = states[0].stoch.shape[axis]
        assert_equal(joined[(slice(None),) * axis + (slice(size, 2 * size),)], states[1])


def test_cat_joins_features_by_default() -> None:
    normal = cat_dist([state_of("normal", 3) for _ in range(5)])
    assert repr(normal.shape) == (
        f"NormalShape(mean: torch.Size([3, {5 * FEATURES}]), "
        f"std: torch.Size([3, {5 * FEATURES}]), stoch: torch.Size([3, {5 * FEATURES}]))"
    )
    a, b = (distribution("categorical")(features("categorical", 3)) for _ in range(2))
    joined = cat_dist([a, b])
    assert torch.equal(joined.stoch, torch.cat([a.stoch, b.stoch], -1))
    assert torch.equal(joined.probs, torch.cat([a.probs, b.probs], 1))
    torch.testing.assert_close(joined.log_prob(), a.log_prob() + b.log_prob())


def test_what_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match="stochs is empty"):
        stack_dist([])
    with pytest.raises(TypeError, match="one kind, got BernoulliStoch, CategoricalStoch"):
        cat_dist([state_of("bernoulli", 3), state_of("categorical", 3)])
    with pytest.raises(TypeError, match="one kind, got Tensor"):
        cat_dist([torch.zeros(2)])
    with pytest.raises(ValueError, match="batch axes only"):
        stack_dist([state_of("categorical", 3)] * 2, dim=-1)
    with pytest.raises(IndexError, match="dim is 3; this state has axes -2 to 1"):
        cat_dist([state_of("categorical", 3)] * 2, dim=3)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(3,\), \(4,\) and \(3,\)"):
        NormalStoch(torch.zeros(3), torch.ones(4), torch.zeros(3))
    for kind in (CategoricalStoch, BernoulliStoch):
        with pytest.raises(ValueError, match=r"\(2, 4\), \(2, 4\) and \(2, 4\)"):
            kind(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="batch axes only"):
        state_of("categorical", 3)[:, :3]
    with pytest.raises(ValueError, match="a multiple of the 4 classes"):
        state_of("categorical", 3).unsqueeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_kind
def test_save_and_load(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    x = features(kind, 3, 2, dtype=dtype).requires_grad_()
    state = distribution(kind)(x)
    state.save(tmp_path / "reports" / "0")
    names = {path.name for path in (tmp_path / "reports" / "0").iterdir()}
    assert names == {f"{name}.blosc2" for name in state.shape._fields}
    assert_equal(type(state).load(tmp_path / "reports" / "0"), state.detach())
    (tmp_path / "reports" / "0" / "stoch.blosc2").unlink()
    with pytest.raises(FileNotFoundError):
        type(state).load(tmp_path / "reports" / "0")


@every_kind
def test_distribution_and_log_prob(kind: str) -> None:
    state = state_of(kind, 3, 5)
    if kind == "normal":
        reference: Any = D.Independent(D.Normal(state.mean, state.std), 1)
        value = state.stoch
    else:
        value = state.stoch.unflatten(-1, (GROUPS, CLASSES))
        base = D.OneHotCategorical if kind == "categorical" else D.Bernoulli
        reference = D.Independent(base(probs=state.probs), 1 if kind == "categorical" else 2)
    torch.testing.assert_close(state.log_prob(), reference.log_prob(value))
    torch.testing.assert_close(get_dist(state).log_prob(value), reference.log_prob(value))
    torch.testing.assert_close(get_dist(state).entropy(), reference.entropy())
    assert state.log_prob().shape == (3, 5)
    other = state_of(kind, 7, 3, 5).stoch
    torch.testing.assert_close(state.log_prob(other)[6], state.log_prob(other[6]))
    sample = get_dist(state).rsample()
    assert sample.shape == value.shape
    assert state.get_distribution().batch_shape == ((3, 5, 2) if kind == "bernoulli" else (3, 5))
    with pytest.raises(TypeError, match="must be a StochState, got Tensor"):
        get_dist(value)


@pytest.mark.parametrize("kind", ["categorical", "bernoulli"])
def test_log_prob_of_spherical_samples(kind: str) -> None:
    x = features(kind, 6)
    state = distribution(kind, spherical=True)(x)
    bits = (state.stoch > 0).float()
    plain = type(state)(state.logits, state.probs, bits)
    torch.testing.assert_close(state.log_prob(), plain.log_prob())


@every_kind
def test_half_precision_logarithms_are_taken_in_float32(kind: str) -> None:
    state = state_of(kind, 3, dtype=torch.bfloat16)
    torch.testing.assert_close(
        state.log_prob(), state.double().log_prob().float(), rtol=1e-5, atol=1e-5
    )


def test_divergence_to_a_distribution_that_is_not_wrapped() -> None:
    state = state_of("normal", 3)
    standard = D.Independent(D.Normal(torch.zeros(FEATURES), torch.ones(FEATURES)), 1)
    expected = D.kl_divergence(D.Independent(D.Normal(state.mean, state.std), 1), standard)
    for prior in (D.Normal(0, 1), standard):
        torch.testing.assert_close(D.kl_divergence(state.get_distribution(), prior), expected)
    state = state_of("categorical", 3)
    flat = D.OneHotCategorical(probs=torch.full_like(state.probs, 1 / CLASSES))
    divergence = D.kl_divergence(state.get_distribution(), flat)
    expected = (state.probs * (state.probs * CLASSES).log()).sum((-1, -2))
    torch.testing.assert_close(divergence, expected)
    with pytest.raises(ValueError, match="the events of the two distributions"):
        D.kl_divergence(state.get_distribution(), D.Independent(flat, 0))


# --- transformations ------------------------------------------------------------------------


@either
@every_kind
def test_compiles_with_everything_around_it(kind: str, spherical: bool) -> None:
    module = distribution(kind, spherical)

    def step(x: Tensor) -> tuple[StochState, Tensor]:
        state = module(x, inv_tmp=2.0)
        both = stack_dist([state, state.detach()]).flatten(0, 1)
        return both[:2].unsqueeze(0), both.log_prob()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (3, 5):
        x = features(kind, batch).requires_grad_()
        state, log_prob = compiled(x)
        assert state.stoch.shape == (1, 2, FEATURES)
        log_prob.sum().backward()
        assert x.grad.isfinite().all()


@every_kind
def test_states_pass_through_function_transforms(kind: str) -> None:
    module, x = distribution(kind), features(kind, 6, 3)
    expected = module(x, deterministic=True)
    mapped = torch.func.vmap(lambda row: module(row, deterministic=True))(x)
    for a, b in zip(values(mapped), values(expected), strict=True):
        torch.testing.assert_close(a, b)
    log_prob = torch.func.vmap(lambda state: state.log_prob())(expected)
    torch.testing.assert_close(log_prob, expected.log_prob())


@every_kind
def test_no_value_is_read(kind: str) -> None:
    """On the meta device there are no values to read."""
    module = distribution(kind, spherical=True).to("meta")
    state = module(features(kind, 3).to("meta"))
    joined = cat_dist([state, state], 0)
    assert joined.log_prob().shape == (6,)


# --- BSQCodebook ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 5, 8, 63])
def test_codes(bits: int) -> None:
    codebook = BSQCodebook(bits)
    x = torch.randn(4, 7, bits).requires_grad_()
    quantized = codebook(x)
    expected = torch.where(x >= 0, 1.0, -1.0) / bits**0.5
    torch.testing.assert_close(quantized, expected)
    cotangent = torch.randn_like(x)
    gradients = torch.autograd.grad(quantized, x, cotangent, retain_graph=True)
    on_sphere = torch.autograd.grad(torch.nn.functional.normalize(x, dim=-1), x, cotangent)
    torch.testing.assert_close(gradients, on_sphere)
    indices = codebook.encode(x)
    powers = 2 ** torch.arange(bits - 1, -1, -1)
    assert torch.equal(indices, ((x >= 0) * powers).sum(-1))
    torch.testing.assert_close(codebook.decode(indices), expected)
    torch.testing.assert_close(codebook.indices_to_codes(indices[..., None]), expected)


def test_decoding_keeps_an_axis_of_length_one() -> None:
    codebook = BSQCodebook(6, 3)
    for shape in ((6,), (1, 6), (4, 1, 6), (1, 1, 6)):
        x = torch.randn(shape)
        assert torch.equal(codebook.decode(codebook.encode(x)), codebook(x))


def test_projections() -> None:
    codebook = BSQCodebook(dim=64, codebook_dim=8)
    x = torch.randn(32, 64)
    codes = codebook.quantize(x, entropy_bits=4)
    assert codebook(x).shape == (32, 64)
    torch.testing.assert_close(codebook(x), codes.quantized)
    projected = codebook.project_in(x)
    torch.testing.assert_close(
        codes.quantized, codebook.project_out(torch.where(projected >= 0, 1.0, -1.0) / 8**0.5)
    )
    assert codes.sample_entropy.shape == (32,)
    assert codes.codebook_entropy.shape == ()
    assert codebook.quantize(x).codebook_entropy is None
    loss = codes.sample_entropy.mean() - codes.codebook_entropy
    loss.backward()
    assert codebook.project_in.weight.grad.abs().sum() > 0
    assert codebook.bfloat16()(x.bfloat16()).dtype is torch.bfloat16


def test_bits_to_codes() -> None:
    expected = torch.tensor([[-1.0, 1.0, 1.0]]) / 3**0.5
    for bits in (torch.tensor([[0, 1, 1]]), torch.tensor([[0.0, 1.0, 1.0]])):
        torch.testing.assert_close(BSQCodebook.bits_to_codes(bits), expected)
        torch.testing.assert_close(BSQCodebook.bits_to_codes(bits != 0), expected)
    assert BSQCodebook.bits_to_codes(torch.full((2, 3), 0.5)).abs().sum() == 0


def test_codebook_arguments() -> None:
    assert BSQCodebook(codebook_dim=8).dim == 8
    with pytest.raises(TypeError, match="needs dim"):
        BSQCodebook()
    for bits in (0, 64):
        with pytest.raises(ValueError, match=f"1 to 63 bits, got {bits}"):
            BSQCodebook(bits)
    with pytest.raises(ValueError, match="must have 6 in the last axis"):
        BSQCodebook(6)(torch.zeros(2, 5))
