from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from ml_networks.config import ContrastiveLearningConfig, LinearConfig, MLPConfig
from ml_networks.torch import ContrastiveLearningLoss


def _loss(dims: tuple[int, int] = (4, 3), **keywords: Any) -> ContrastiveLearningLoss:
    torch.manual_seed(0)
    network = MLPConfig(8, 1, "Identity", LinearConfig("SiLU"))
    return ContrastiveLearningLoss(*dims, ContrastiveLearningConfig(5, network, **keywords))


def _views(*batch: int, dims: tuple[int, int] = (4, 3)) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return 3 * torch.randn(*batch, dims[0]), 3 * torch.randn(*batch, dims[1])


def _dot(a: Tensor, b: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def reference(a: Tensor, b: Tensor, range_self: int, range_target: int) -> dict[str, Any]:
    """The time-series loss by loops, in float64; a and b are (batch, length, width)."""
    samples = [(i, t) for i in range(a.shape[0]) for t in range(a.shape[1])]
    rows: dict[str, list[float]] = {"positive": [], "negative": []}

    def near(i: int, t: int, query: Tensor, key: Tensor, reach: int) -> float:
        window = range(max(t - reach, 0), min(t + reach, a.shape[1] - 1) + 1)
        return sum(_dot(query[i, t], key[i, u]) for u in window) / len(window)

    for i, t in samples:
        rows["positive"].append(_dot(a[i, t], b[i, t]))
        exponentials = [math.exp(_dot(a[i, t], b[j, u])) for j, u in samples]
        rows["negative"].append(math.log(sum(exponentials) / len(samples)))
        if range_self:
            rows.setdefault("self_positive_1", []).append(near(i, t, a, a, range_self))
            rows.setdefault("self_positive_2", []).append(near(i, t, b, b, range_self))
        if range_target:
            rows.setdefault("tgt_positive", []).append(near(i, t, a, b, range_target))
    nce = torch.tensor(rows["negative"]).double()
    for name, values in rows.items():
        if name != "negative":
            nce = nce - torch.tensor(values).double()
    means = {name: sum(values) / len(values) for name, values in rows.items()}
    return {"nce": nce.reshape(a.shape[:2]), **means}


@pytest.mark.parametrize("ranges", [(0, 0), (1, 0), (0, 1), (3, 2), (9, 5)], ids=str)
@pytest.mark.parametrize("shape", [(2, 6), (3, 1), (1, 5)], ids=str)
def test_time_series_equals_loops(shape: tuple[int, int], ranges: tuple[int, int]) -> None:
    loss = _loss().double()
    views = [view.double() for view in _views(*shape)]
    with torch.no_grad():
        losses, embeddings = loss.calc_timeseries_nce(*views, *ranges, return_emb=True)
    expected = reference(*embeddings, *ranges)
    assert losses.keys() == expected.keys()
    torch.testing.assert_close(losses.pop("nce"), expected.pop("nce"))
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_time_series_in_other_types(dtype: torch.dtype) -> None:
    loss = _loss().to(dtype)
    losses, embeddings = loss.calc_timeseries_nce(
        *(view.to(dtype) for view in _views(2, 9)), 3, 3, return_emb=True
    )
    assert losses["nce"].dtype == torch.float32
    expected = reference(*(embedding.detach() for embedding in embeddings), 3, 3)["nce"]
    # Products of the embeddings are summed in float32: a few roundings of the largest.
    largest = max(embedding.detach().double().norm(dim=-1).max() for embedding in embeddings)
    tolerance = 32 * torch.finfo(torch.float32).eps * float(largest) ** 2
    torch.testing.assert_close(losses["nce"].double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("cross_entropy_like", [False, True])
@pytest.mark.parametrize("batch", [(5,), (2, 3), (2, 2, 3)], ids=str)
def test_losses_and_embeddings_keep_the_batch_dimensions(
    batch: tuple[int, ...], cross_entropy_like: bool
) -> None:
    loss = _loss(cross_entropy_like=cross_entropy_like)
    views = _views(*batch)
    for method, name in (
        (loss.calc_nce, "nce"),
        (loss.calc_sigmoid, "sigmoid"),
        (loss.calc_timeseries_nce, "nce"),
    ):
        losses, embeddings = method(*views, return_emb=True)
        assert losses[name].shape == batch
        assert all(embedding.shape == (*batch, 5) for embedding in embeddings)
    assert loss.calc_timeseries_nce(*views, 1, 2)["nce"].shape == batch
    assert ("positive" in loss(*views)) is not cross_entropy_like


def test_cross_entropy_like_is_the_same_number() -> None:
    views = _views(6)
    plain, like = _loss()(*views), _loss(cross_entropy_like=True)(*views)
    assert like.keys() == {"nce"}
    assert torch.equal(plain["nce"], like["nce"])
    mean = float(plain["negative"] - plain["positive"])
    assert plain["nce"].mean().item() == pytest.approx(mean)
    assert not plain["positive"].requires_grad


def test_nce_equals_cross_entropy_of_the_pairing() -> None:
    loss = _loss().double()
    views = [view.double() for view in _views(7)]
    losses, (a, b) = loss.calc_nce(*views, return_emb=True)
    expected = torch.nn.functional.cross_entropy(a @ b.T, torch.arange(7), reduction="none")
    torch.testing.assert_close(losses["nce"], expected - math.log(7))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "bias": -1.5}])
def test_sigmoid_equals_loops(options: dict[str, float]) -> None:
    loss = _loss().double()
    views = [view.double() for view in _views(6)]
    with torch.no_grad():
        losses, (a, b) = loss.calc_sigmoid(*views, return_emb=True, **options)
    temperature, bias = options.get("temperature", 0.1), options.get("bias", 0.0)
    for i in range(6):
        expected = 0.0
        for j in range(6):
            logit = temperature * _dot(a[i], b[j]) + bias
            expected += math.log1p(math.exp(-logit if i == j else logit))
        assert losses["sigmoid"][i].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "method", ["calc_nce", "calc_sigmoid", "calc_timeseries_nce"], ids=lambda name: name[5:]
)
def test_gradients(method: str) -> None:
    loss = _loss().double()
    views = tuple(view.double().requires_grad_() for view in _views(2, 4))
    options = (2, 1) if method == "calc_timeseries_nce" else ()
    name = "sigmoid" if method == "calc_sigmoid" else "nce"

    def call(*views: Tensor) -> Tensor:
        result: Tensor = getattr(loss, method)(*views, *options)[name]
        return result

    assert torch.autograd.gradcheck(call, views)
    assert torch.autograd.gradgradcheck(call, views, fast_mode=True)


def test_large_products_stay_finite() -> None:
    loss = _loss((4, 4))
    view = 1e3 * _views(8, dims=(4, 4))[0]
    for losses in (
        loss.calc_nce(view, -view),
        loss.calc_timeseries_nce(view[None], -view[None], 3, 3),
    ):
        losses["nce"].mean().backward()
        assert losses["nce"].isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in loss.parameters())


def test_equal_widths_share_one_network() -> None:
    loss = _loss((4, 4))
    assert loss.eval_func is loss.eval_func2
    state = loss.state_dict()
    assert {key.partition(".")[0] for key in state} == {"eval_func", "eval_func2"}
    other = _loss((4, 4))
    other.load_state_dict(state, strict=True)
    assert other.eval_func is other.eval_func2
    assert _loss().eval_func is not _loss().eval_func2


def test_compiles_with_ranges() -> None:
    torch.compiler.reset()
    loss = _loss()
    compiled = torch.compile(loss.calc_timeseries_nce, fullgraph=True, backend="eager")
    for shape in ((2, 6), (3, 6), (3, 8)):
        views = _views(*shape)
        expected = loss.calc_timeseries_nce(*views, 2, 3)
        torch.testing.assert_close(compiled(*views, 2, 3), expected)


def test_wrong_inputs() -> None:
    loss = _loss()
    x1, x2 = _views(4)
    with pytest.raises(ValueError, match=r"feature1 must have shape \(\*batch, 4\), got \(4, 3\)"):
        loss.calc_nce(x2, x1)
    with pytest.raises(ValueError, match="same batch dimensions"):
        loss.calc_sigmoid(x1, x2[:3])
    with pytest.raises(ValueError, match="positive_range_tgt must be at least 0, got -1"):
        loss.calc_timeseries_nce(x1, x2, 0, -1)
    with pytest.raises(TypeError, match="ContrastiveLearningLoss cfg must be"):
        ContrastiveLearningLoss(4, 3, MLPConfig(8, 1, "Tanh", LinearConfig("ReLU")))  # type: ignore[arg-type]


def test_needs_no_lightning() -> None:
    program = (
        "import sys\n"
        "sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "import torch\n"
        "from ml_networks.torch import ContrastiveLearningLoss\n"
        "from ml_networks import ContrastiveLearningConfig, LinearConfig, MLPConfig\n"
        "network = MLPConfig(8, 1, 'Tanh', LinearConfig('ReLU'))\n"
        "loss = ContrastiveLearningLoss(4, 4, ContrastiveLearningConfig(5, network))\n"
        "print(loss.calc_nce(torch.ones(3, 4), torch.ones(3, 4))['nce'].shape)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    assert result.stdout.strip() == "torch.Size([3])"
