from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor

from ml_networks import (
    Distribution,
    FocalFrequencyLoss,
    binary_focal_loss,
    charbonnier,
    cross_entropy,
    focal_loss,
    gumbel_softmax,
    kl_balancing,
    kl_divergence,
    log_softmax,
    soft_target_cross_entropy,
    softmax,
)
from ml_networks.kernels.torch import focal_frequency_loss
from ml_networks.torch.distributions import BernoulliStoch, CategoricalStoch, NormalStoch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def images(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(*(shape or (2, 3, 6, 5))), torch.randn(*(shape or (2, 3, 6, 5)))


# --- focal losses ---------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("shape", "axis"), [((5, 7), -1), ((5, 3, 4, 7), -1), ((5, 7, 3), 1)])
def test_focal_loss(shape: tuple[int, ...], axis: int, gamma: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rest = [n for i, n in enumerate(shape) if i != axis % len(shape)]
    target = torch.randint(0, shape[axis], rest)
    entropy = F.cross_entropy(logits.movedim(axis, 1), target, reduction="none")
    expected = (
        ((1 - (-entropy).exp()) ** gamma * entropy).flatten(1).sum(1).mean()
        if len(rest) > 1
        else ((1 - (-entropy).exp()) ** gamma * entropy).mean()
    )
    loss = focal_loss(logits, target, gamma=gamma, sum_dim=axis)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_binary_focal_loss(gamma: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 2, (5, 6))
    entropy = F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none")
    expected = (1 - (-entropy).exp()) ** gamma * entropy
    for sum_dim in (-1, 0, [0, 1], (-2, -1), None):
        axes = tuple(sum_dim) if isinstance(sum_dim, list) else sum_dim
        for target in (labels, labels.bool(), labels.float(), labels.to(torch.uint8)):
            loss = binary_focal_loss(logits, target, gamma, sum_dim)
            torch.testing.assert_close(loss, expected.sum(axes))
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits), torch.autograd.grad(expected.sum(), logits)
    )


def test_binary_focal_loss_of_soft_labels_lies_between() -> None:
    logits = torch.linspace(-3, 3, 7)
    yes, no = (binary_focal_loss(logits, torch.full((7,), y), sum_dim=()) for y in (1.0, 0.0))
    soft = binary_focal_loss(logits, torch.full((7,), 0.25), sum_dim=())
    torch.testing.assert_close(soft, 0.25 * yes + 0.75 * no)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_losses_stay_finite(gamma: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], dtype=dtype, requires_grad=True)
    for loss in (
        focal_loss(logits, torch.tensor([0, 0]), gamma),
        binary_focal_loss(logits, torch.tensor([[1, 1], [0, 1]]), gamma, None),
    ):
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert gradient.isfinite().all()


# --- images ---------------------------------------------------------------------------------


def test_charbonnier() -> None:
    x, y = images()
    expected = ((x - y) ** 2 + 1e-6).sqrt()
    torch.testing.assert_close(charbonnier(x, y), expected.sum((1, 2, 3)))
    power = ((x - y) ** 2 + 1e-4) ** 0.45
    loss = charbonnier(x, y, epsilon=1e-2, alpha=0.9, sum_dim=[-1, -2])
    torch.testing.assert_close(loss, power.sum((2, 3)))
    torch.testing.assert_close(charbonnier(x, y, sum_dim=-1), expected.sum(-1))


def test_charbonnier_takes_lists_from_yaml() -> None:
    from omegaconf import OmegaConf

    x, y = images()
    axes = OmegaConf.create([-1, -2, -3])
    torch.testing.assert_close(charbonnier(x, y, sum_dim=axes), charbonnier(x, y))


@pytest.mark.parametrize("loss", [charbonnier, binary_focal_loss, soft_target_cross_entropy])
def test_shapes_must_agree(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\) and \(2, 3, 5\)"):
        loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_weight": 2.0, "alpha": 0.5, "patch_factor": 2, "ave_spectrum": True},
        {"log_matrix": True, "batch_matrix": True},
    ],
)
def test_focal_frequency_loss_keeps_its_options(options: dict[str, Any]) -> None:
    x, y = images(2, 3, 8, 6)
    loss = FocalFrequencyLoss(**options)
    torch.testing.assert_close(loss(x, y), focal_frequency_loss(x, y, **options))
    torch.testing.assert_close(
        loss(x, y, mean_batch=False), focal_frequency_loss(x, y, **options, mean_batch=False)
    )
    assert loss(x, y).shape == ()
    with pytest.raises(TypeError, match="'aplha'; did you mean 'alpha'"):
        FocalFrequencyLoss(aplha=1.0)


# --- divergences ----------------------------------------------------------------------------


def states(kind: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module = Distribution(8, kind, 1 if kind == "normal" else 2)
    width = 16 if kind == "normal" else 8
    return module(torch.randn(5, width)), module(torch.randn(5, width))


@pytest.mark.parametrize("kind", ["normal", "categorical", "bernoulli"])
def test_kl_divergence(kind: str) -> None:
    q, p = states(kind)
    if isinstance(q, NormalStoch):
        a, b = D.Normal(q.mean, q.std), D.Normal(p.mean, p.std)
    elif isinstance(q, CategoricalStoch):
        a, b = D.OneHotCategorical(probs=q.probs), D.OneHotCategorical(probs=p.probs)
    else:
        assert isinstance(q, BernoulliStoch)
        a, b = D.Bernoulli(logits=q.logits), D.Bernoulli(logits=p.logits)
    expected = D.kl_divergence(a, b).sum(-1)
    torch.testing.assert_close(kl_divergence(q, p), expected)
    torch.testing.assert_close(kl_divergence(D.Independent(a, 1), D.Independent(b, 1)), expected)
    torch.testing.assert_close(kl_divergence(q, D.Independent(b, 1)), expected)
    torch.testing.assert_close(kl_divergence(q, b), expected)
    with pytest.raises(TypeError, match="a state or a torch distribution, got Tensor"):
        kl_divergence(q, q.stoch)


def test_kl_balancing() -> None:
    mean, std = torch.randn(2, 3, 4, requires_grad=True), torch.rand(2, 3, 4) + 0.5
    q, p = (NormalStoch(mean[i], std[i], mean[i]) for i in (0, 1))
    plain = kl_divergence(q, p)
    (expected,) = torch.autograd.grad(plain.sum(), mean, retain_graph=True)
    for loss, weight in (
        (kl_balancing(q, p), 0.8),
        (kl_balancing(q, p, 0.3), 0.3),
        (kl_balancing([q, p], alpha=0.3), 0.3),
        (kl_balancing((q,), (p,), weight=0.3), 0.3),
    ):
        torch.testing.assert_close(loss, plain)
        (gradient,) = torch.autograd.grad(loss.sum(), mean, retain_graph=True)
        share = torch.tensor([1 - weight, weight]).view(2, 1, 1)
        torch.testing.assert_close(gradient, share * expected)
    torch.testing.assert_close(kl_balancing([q, p], [p, q]), plain + kl_divergence(p, q))


def test_kl_balancing_arguments() -> None:
    q, p = states("normal")
    with pytest.raises(TypeError, match="needs a posterior and a prior"):
        kl_balancing(q)
    with pytest.raises(ValueError, match="2 posteriors and 1 priors"):
        kl_balancing([q, p], [p])
    with pytest.raises(TypeError, match="needs states, got Normal"):
        kl_balancing(D.Normal(0.0, 1.0), D.Normal(0.0, 1.0))
    with pytest.raises(TypeError, match="twice"):
        kl_balancing(q, p, weight=0.5, alpha=0.5)


# --- entropies and softmax ------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axis"), [((5, 7), -1), ((7, 5), 0), ((2, 7, 3, 4), 1)])
def test_cross_entropy(shape: tuple[int, ...], axis: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(shape)
    rest = [n for i, n in enumerate(shape) if i != axis % len(shape)]
    for dtype in (torch.int64, torch.int32, torch.uint8):
        target = torch.randint(0, 7, rest).to(dtype)
        moved = logits.movedim(axis, -1).reshape(-1, 7)
        expected = F.cross_entropy(moved, target.long().flatten(), reduction="none").reshape(rest)
        torch.testing.assert_close(cross_entropy(logits, target, axis), expected)
    with pytest.raises(ValueError, match="class indices of shape"):
        cross_entropy(logits, target.float(), axis)
    with pytest.raises(ValueError, match="class indices of shape"):
        cross_entropy(logits, target[..., :-1], axis)


@pytest.mark.parametrize("axis", [-1, 0])
def test_soft_target_cross_entropy(axis: int) -> None:
    x, t = (v.double().requires_grad_() for v in images(4, 5))
    loss = soft_target_cross_entropy(x, t, axis)
    expected = -(t.softmax(axis) * x.log_softmax(axis)).sum(axis)
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.gradcheck(lambda *a: soft_target_cross_entropy(*a, axis), (x, t))


def test_softmax_with_a_temperature() -> None:
    x, _ = images(4, 5)
    for axis in (0, -1):
        torch.testing.assert_close(softmax(x, axis, 2.0), (x / 2).softmax(axis))
        torch.testing.assert_close(log_softmax(x, axis, 0.5), (2 * x).log_softmax(axis))
    assert softmax(torch.tensor([float("nan"), 0.0])).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gumbel_softmax(axis: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 5, 6, dtype=dtype, requires_grad=True)
    hard = gumbel_softmax(x, axis, 0.5)
    assert hard.dtype is dtype
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert (hard.sum(axis) == 1).all()
    torch.manual_seed(1)
    hard = gumbel_softmax(x, axis, temperature=0.5)
    torch.manual_seed(1)
    soft = gumbel_softmax(x, dim=axis, temperature=0.5, hard=False)
    assert torch.equal(soft.argmax(axis), hard.argmax(axis))
    ones = torch.ones_like(x)
    cotangent = torch.randn_like(x)
    torch.testing.assert_close(soft.sum(axis), ones.sum(axis) / x.shape[axis])
    assert torch.equal(
        torch.autograd.grad(hard, x, cotangent)[0], torch.autograd.grad(soft, x, cotangent)[0]
    )


def test_gumbel_softmax_samples_the_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    share = gumbel_softmax(logits.expand(40_000, 4), -1, temperature=3.0).mean(0)
    expected = logits.softmax(-1)
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / 40_000).sqrt()).all()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (focal_loss, (torch.randn(4, 5), torch.tensor([0, 1, 2, 3]))),
        (binary_focal_loss, (torch.randn(4, 5), torch.ones(4, 5))),
        (charbonnier, images()),
        (cross_entropy, (torch.randn(4, 5), torch.tensor([0, 1, 2, 3]))),
        (soft_target_cross_entropy, images()),
        (softmax, (torch.randn(4, 5),)),
        (log_softmax, (torch.randn(4, 5),)),
        (gumbel_softmax, (torch.randn(4, 5),)),
        (FocalFrequencyLoss(), images(2, 3, 8, 8)),
    ],
    ids=lambda value: getattr(value, "__name__", "") if callable(value) else "",
)
def test_compiles_and_reads_no_value(function: Any, arguments: tuple[Tensor, ...]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    result = compiled(*arguments)
    if function is not gumbel_softmax:
        torch.testing.assert_close(result, function(*arguments))
    assert function(*(x.to("meta") for x in arguments)).shape == result.shape


def test_misspelt_keywords() -> None:
    with pytest.raises(TypeError, match="'gama'; did you mean 'gamma'"):
        focal_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), gama=1.0)
    with pytest.raises(TypeError, match="'eps'; did you mean 'epsilon'"):
        charbonnier(*images(), eps=1e-3)
