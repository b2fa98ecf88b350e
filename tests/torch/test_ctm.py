"""The Continuous Thought Machine: golden files, its straightforward form, sizes, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import hydra.utils
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.autograd import forward_ad

from ml_networks import HyperContinuousThoughtMachineConfig
from ml_networks.torch import (
    ContinuousThoughtMachine,
    HyperContinuousThoughtMachine,
    HyperSynapseUNET,
    LoRALinear,
    SuperLinear,
    SynapseUNET,
    ctm,
    ctm_loop,
    positions,
)
from ml_networks.torch.ctm_backbones import ResNet, ShallowWide
from tests.torch.cases_ctm import SMALL
from tests.torch.ctm_reference import straightforward

GOLDEN = sorted((Path(__file__).parent.parent / "golden" / "ctm").glob("*.safetensors"))
EXAMPLE: dict[str, Any] = {
    "iterations": 50,
    "d_model": 1024,
    "d_input": 256,
    "heads": 4,
    "n_synch_out": 128,
    "n_synch_action": 128,
    "synapse_depth": 8,
    "memory_length": 25,
    "deep_nlms": True,
    "memory_hidden_dims": 32,
    "do_layernorm_nlm": False,
    "backbone_type": "resnet18-1",
    "positional_embedding_type": "none",
    "out_dims": 250,
    "neuron_select_type": "random-pairing",
    "dropout": 0.0,
}


@pytest.fixture(params=["hoisted", "absorbed"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two forms of attention, whatever the sizes."""
    absorbs = request.param == "absorbed"
    monkeypatch.setattr(ctm, "absorbs_attention", lambda *_: absorbs)
    return str(request.param)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def off(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path, attention: str) -> None:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        model = ContinuousThoughtMachine(**json.loads(file.metadata()["config"])).eval()
    state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
    model.load_state_dict(state, strict=True)
    predictions, certainties, synchronisation = model(tensors["x"])
    assert off(predictions, tensors["predictions"]) < 2e-6
    assert off(certainties, tensors["certainties"]) < 2e-6
    assert off(synchronisation, tensors["synch_out"]) < 5e-6
    loss = (predictions * tensors["cotangent/predictions"]).sum()
    (loss + (certainties * tensors["cotangent/certainties"]).sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert off(parameter.grad, tensors[f"grad/{name}"]) < 5e-5, name


FORMS: dict[str, dict[str, Any]] = {
    "deep": {"in_channels": 3},
    "reshaped": {"in_channels": 3, "prediction_reshaper": [-1, 2], "n_random_pairing_self": 2},
    "shallow": {"in_channels": 3, "deep_nlms": False, "do_layernorm_nlm": True},
    "norms": {"in_channels": 3, "do_layernorm_nlm": True, "neuron_select_type": "first-last"},
    "one-layer": {"in_channels": 3, "synapse_depth": 1, "neuron_select_type": "random"},
    "signs": {
        "backbone_type": "parity_backbone",
        "positional_embedding_type": "custom-rotational-1d",
    },
    **{
        kind: {"backbone_type": "resnet18-1", "positional_embedding_type": kind}
        for kind in ("learnable-fourier", "multi-learnable-fourier", "custom-rotational")
    },
}


def _built(**changes: Any) -> Any:
    torch.manual_seed(0)
    cls = HyperContinuousThoughtMachine if "hyper_layers" in changes else ContinuousThoughtMachine
    model = cls(**SMALL | {"iterations": 5} | changes).double()
    with torch.no_grad():  # fresh parameters hide a mix-up of two of them
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return model


def _input(model: Any) -> Tensor:
    kind = model.cfg.backbone_type
    if kind == "parity_backbone":
        return torch.randn(2, 7, dtype=torch.float64).sign()
    return torch.randn(2, 3, 9, 7, dtype=torch.float64)


def _gradients(results: tuple[Any, ...], model: Any, x: Tensor) -> dict[str, Tensor]:
    """Gradients under fixed cotangents, of everything that may have one."""
    torch.manual_seed(5)
    loss = sum(
        (value * torch.randn(value.shape, dtype=value.dtype)).sum() for value in results[:3]
    )
    wanted = {"x": x, **dict(model.named_parameters())}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {name: grad for name, grad in zip(wanted, found, strict=True) if grad is not None}


def _assert_same(model: Any, x: Tensor) -> None:
    x.requires_grad_(model.cfg.backbone_type != "parity_backbone")
    if not x.requires_grad:
        x = x + torch.zeros((), dtype=x.dtype, requires_grad=True)
    torch.manual_seed(6)
    ours = model(x)
    torch.manual_seed(6)
    reference = straightforward(model, x)
    for got, expected in zip(ours, reference, strict=True):
        assert off(got, expected) < 1e-10
    expected_gradients = _gradients(reference, model, x)
    gradients = _gradients(ours, model, x)
    assert set(gradients) == set(expected_gradients)
    # A gradient that is 0 but for rounding is measured by the others.
    largest = max(float(g.abs().max()) for g in expected_gradients.values())
    for name, expected in expected_gradients.items():
        scale = max(float(expected.abs().max()), 1e-6 * largest)
        assert float((gradients[name] - expected).abs().max()) / scale < 1e-10, name


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_straightforward_form(form: str, attention: str) -> None:
    model = _built(**FORMS[form]).eval()
    _assert_same(model, _input(model))


@pytest.mark.parametrize("form", ["deep", "one-layer"])
def test_what_a_gpu_runs_equals_it_too(form: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(ctm_loop, "_natively", lambda _: False)
    model = _built(**FORMS[form]).eval()
    _assert_same(model, _input(model))


@pytest.mark.parametrize("form", ["deep", "one-layer"])
def test_the_loop_over_the_modules_equals_it_too(form: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(ctm, "is_ordinary", lambda _: False)
    model = _built(**FORMS[form]).eval()
    _assert_same(model, _input(model))


@pytest.mark.parametrize("synapse_depth", [1, 3])
def test_nothing_is_folded_through_dropout(
    synapse_depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A dropout that can be compared: each place of it scales by another factor.
    def scaled(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * torch.linspace(0.5, 1 + p, x.shape[-1], dtype=x.dtype) if training and p else x

    monkeypatch.setattr(torch.nn.functional, "dropout", scaled)
    model = _built(in_channels=3, dropout=0.3, dropout_nlm=0.2, synapse_depth=synapse_depth)
    _assert_same(model.train(), _input(model))


@pytest.fixture(params=["whole", "modules"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two loops over ticks: one function of autograd, and that over the modules."""
    if request.param == "modules":
        monkeypatch.setattr(ctm, "is_ordinary", lambda _: False)
    return str(request.param)


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    monkeypatch.setattr(ctm, "think", lambda loop: calls.append(loop) or ctm_loop.think(loop))
    return calls


def _listening(model: Any) -> None:
    model.synapses.down_projections[0][1].register_forward_hook(lambda *_: None)


def _low_rank(model: Any) -> None:
    up = model.synapses.up_projections[1]
    up[1] = LoRALinear.from_linear(up[1], rank=2)


@pytest.mark.parametrize(
    ("changes", "alter", "whole"),
    [
        ({}, None, True),
        ({"deep_nlms": False, "memory_length": 1}, None, True),
        ({"synapse_depth": 1, "neuron_select_type": "random"}, None, True),
        ({"hyper_layers": "all", "hyper_rank": 2}, None, True),
        ({"dropout": 0.3}, None, True),
        ({"dropout": 0.3}, lambda model: model.train(), False),
        ({"dropout_nlm": 0.3}, lambda model: model.train(), False),
        ({"do_layernorm_nlm": True}, None, False),
        ({}, _listening, False),
        ({}, _low_rank, False),
    ],
)
def test_one_function_runs_the_ticks_that_it_knows(
    changes: dict[str, Any], alter: Any, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _counted(monkeypatch)
    model = _built(in_channels=3, **changes).eval()
    if alter is not None:
        alter(model.double())
    x = _input(model)
    if whole:
        _assert_same(model, x)
    else:
        model(x)
    assert bool(calls) == whole


def test_gradients_of_gradients(loop: str) -> None:
    model = _built(in_channels=3, hyper_layers="bottleneck", iterations=3).eval()
    x = _input(model).requires_grad_()
    found = []
    for form in (model, lambda x: straightforward(model, x)):
        torch.manual_seed(5)
        results = form(x)
        loss = sum((v * torch.randn(v.shape, dtype=v.dtype)).sum() for v in results)
        (of_x,) = torch.autograd.grad(loss, x, create_graph=True)
        wanted = [p for n, p in model.named_parameters() if n != "output_projector.0.bias"]
        found.append(torch.autograd.grad(of_x.square().sum(), wanted, allow_unused=True))
    for got, expected in zip(*found, strict=True):
        assert (got is None) == (expected is None)
        if expected is not None and expected.abs().max() > 1e-12:
            assert off(got, expected) < 1e-9


def test_autocast_is_as_exact_as_over_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _counted(monkeypatch)
    model = _built(in_channels=3, hyper_layers="bottleneck", d_model=32, iterations=4).eval()
    x = _input(model)
    exact = _gradients(model(x), model, x.requires_grad_())
    model, x = model.float(), x.detach().float().requires_grad_()
    errors = {}
    for whole in (True, False):
        monkeypatch.setattr(ctm, "is_ordinary", lambda _, whole=whole: whole)
        with torch.autocast("cpu", torch.bfloat16):
            results = model(x)
        assert results[0].dtype == torch.float32
        found = _gradients(tuple(value.float() for value in results), model, x)
        assert {value.dtype for value in found.values()} == {torch.float32}
        errors[whole] = sum(float((found[n] - exact[n]).norm() / exact[n].norm()) for n in exact)
    assert len(calls) == 2
    assert errors[True] < 1.2 * errors[False]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_each_tick_keeps_43_kilobytes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loops = _counted(monkeypatch)
    monkeypatch.setattr(ctm_loop, "_natively", lambda _: device == "cpu")
    with torch.device("meta"):
        ContinuousThoughtMachine(**EXAMPLE)(torch.empty(2, 3, 99, 99))
    (loop,) = loops
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        results = ctm_loop.think(loop)
    assert results[0].requires_grad
    for tensor in loop.tensors():
        kept.pop(tensor.untyped_storage()._cdata, None)
    widths = [1024, 880, 736, 592, 448, 304, 160, 16]
    products = sum(widths) + sum(widths[:-1])  # the way down, the way up
    # Activations, what attention read and zeros in a row, sums and state.
    row = 1024 + 4 * 65 + 4
    a_tick = 4 * (products + row + 128 + 1024)
    if device == "gpu":
        a_tick += 4 * (4 * 65 + 4)  # queries, and the log-sum-exp of their scores
    assert a_tick == {"cpu": 42_976, "gpu": 44_032}[device]
    assert sum(kept.values()) == 2 * (50 * a_tick + 4 * (row + 24 * 1024))  # and the start


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_compilers_and_transforms_see_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _counted(monkeypatch)
    model = _built(in_channels=3, iterations=2).eval()
    x = _input(model)
    expected, *_ = model(x)
    (of_x,) = torch.autograd.grad(model(x.requires_grad_())[0].sum(), x)
    del calls[:]
    x = x.detach()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert off(compiled(x)[0], expected) < 1e-12

    def total(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        predictions: Tensor = torch.func.functional_call(model, parameters, (x,))[0]
        return predictions.sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = torch.func.grad(total, argnums=(0, 1))(parameters, x)
    assert off(gradients[1], of_x) < 1e-9
    with forward_ad.dual_level():
        (predictions, *_) = model(forward_ad.make_dual(x, torch.ones_like(x)))
        slope = forward_ad.unpack_dual(predictions).tangent.sum()
    assert off(slope, of_x.sum()) < 1e-9
    assert not calls


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("training", [True, False])
def test_all_ticks_in_a_cuda_graph(training: bool) -> None:
    model = _built(in_channels=3, hyper_layers="bottleneck").float().cuda().train(training)
    x = torch.randn(2, 3, 9, 7, device="cuda")

    def results() -> list[Tensor]:
        predictions, certainties, synchronisation = model(x)
        if training:
            model.zero_grad()
            (predictions.square().sum() + certainties.sum()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [v.clone() for v in (predictions, certainties, synchronisation, *gradients)]

    model.requires_grad_(training)
    expected = results()
    torch.cuda.make_graphed_callables(model, (torch.zeros_like(x),))
    for got, reference in zip(results(), expected, strict=True):
        assert off(got, reference) < 1e-5


@pytest.mark.parametrize("form", ["deep", "one-layer"])
def test_track_returns_every_tick_as_arrays(form: str, loop: str) -> None:
    model = _built(**FORMS[form]).eval()
    x = _input(model)
    predictions, certainties, *tracked = model(x, track=True)
    expected = straightforward(model, x, track=True)
    assert off(predictions, expected[0]) < 1e-7
    assert off(certainties, expected[1]) < 1e-7
    (out, action), pre, post, weights = tracked
    assert weights.shape == (5, 2, 2, 1, 63)
    assert post.shape == pre.shape == (5, 2, 12)
    references = (*expected[2], *expected[3:])
    for got, reference in zip((out, action, pre, post, weights), references, strict=True):
        assert got.dtype == "float64"
        assert off(torch.from_numpy(got), torch.from_numpy(reference)) < 1e-7


def test_saves_at_most_a_fifth_of_the_activations() -> None:
    changes = {"d_input": 64, "heads": 4, "d_model": 96, "synapse_depth": 2, "memory_length": 5}
    model = ContinuousThoughtMachine(**SMALL | changes | {"in_channels": 16, "iterations": 8})
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def saved(form: Any) -> int:
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            results = form(torch.randn(1, 16, 400))
        assert results[0].requires_grad
        return sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in own)

    assert 5 * saved(model) <= saved(lambda x: straightforward(model, x))


def test_the_example_has_its_size_and_never_asks_the_device() -> None:
    with torch.device("meta"):  # a value that the host asked for would raise
        model = ContinuousThoughtMachine(**EXAMPLE)
        predictions, certainties, synchronisation = model(torch.empty(4, 3, 99, 99))
        (predictions.sum() + certainties.sum()).backward()
    assert count(model) == 8_511_992
    assert count(model.synapses) == 6_218_160
    assert count(model.trace_processor) == 1_771_522
    assert count(model.attention) == 263_168
    assert count(model.backbone) == 149_824
    assert predictions.shape == (4, 250, 50)
    assert certainties.shape == (4, 2, 50)
    assert synchronisation.shape == (4, 128)


@pytest.mark.parametrize(
    ("hyper_layers", "extra"),
    [
        ("none", 0),
        ("bottleneck", 97_348),
        ("down", 557_431),
        ("up", 549_367),
        ("all", 1_106_798),
    ],
)
def test_the_hyper_model_adds_these_parameters(hyper_layers: str, extra: int) -> None:
    with torch.device("meta"):
        model = HyperContinuousThoughtMachine(**EXAMPLE, hyper_layers=hyper_layers)
        alone = HyperSynapseUNET(1024, 8, hyper_layers=hyper_layers, in_dims=1280)
        plain = SynapseUNET(1024, 8, in_dims=1280)
    assert count(model) - 8_511_992 == extra
    assert count(alone) - count(plain) == extra


@pytest.mark.parametrize("hyper_layers", ["none", "bottleneck", "down", "up", "all"])
def test_a_fresh_hyper_model_equals_the_plain_one(hyper_layers: str) -> None:
    torch.manual_seed(0)
    plain = ContinuousThoughtMachine(**SMALL, in_channels=3)
    model = HyperContinuousThoughtMachine(**SMALL, in_channels=3, hyper_layers=hyper_layers)
    missing, extra = model.load_state_dict(plain.state_dict(), strict=False)
    assert bool(missing) == (hyper_layers != "none")
    assert not extra
    x = torch.randn(2, 3, 5)
    for got, expected in zip(model(x), plain(x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("hyper_layers", ["bottleneck", "all"])
def test_the_hyper_model_equals_the_straightforward_form(hyper_layers: str) -> None:
    model = _built(in_channels=3, hyper_layers=hyper_layers, hyper_rank=2).eval()
    plain = ContinuousThoughtMachine(**SMALL | {"iterations": 5}, in_channels=3).double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    x = _input(model)
    assert off(model(x)[0], plain(x)[0]) > 1e-4  # its dynamic weights do something
    _assert_same(model, x)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18-4", 11_168_832),
        ("resnet34-4", 21_276_992),
        ("resnet50-4", 23_500_352),
        ("resnet101-4", 42_492_480),
        ("resnet152-4", 58_136_128),
    ],
)
def test_residual_networks_have_their_sizes(name: str, parameters: int) -> None:
    """Torchvision's counts without the classifier, and with a stem of 3x3."""
    with torch.device("meta"):
        assert count(ResNet(name)) == parameters
        for stages, side in enumerate((20, 10, 5, 3), 1):
            network = ResNet(f"{name[:-1]}{stages}")
            channels = (64 << (stages - 1)) * (1 if name in ("resnet18-4", "resnet34-4") else 4)
            shape = network(torch.empty(1, 3, 39, 39)).shape
            assert shape == (1, channels, side, side)
            assert network.out_channels == channels


def test_a_bottleneck_strides_in_its_middle() -> None:
    network = ResNet("resnet50-2")
    block = network.layer2[0]
    assert [block.conv1.stride, block.conv2.stride, block.conv3.stride] == [(1, 1), (2, 2), (1, 1)]
    x = torch.randn(1, 256, 4, 4)
    network.eval()
    inner = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())).relu()
    expected = (block.bn3(block.conv3(inner)) + block.downsample(x)).relu()
    torch.testing.assert_close(block(x), expected)


def test_shallow_wide_halves_the_sides() -> None:
    with torch.device("meta"):
        network = ShallowWide(1)
        assert network(torch.empty(2, 1, 9, 7)).shape == (2, 2048, 5, 4)
        model = ContinuousThoughtMachine(
            **SMALL | {"backbone_type": "shallow-wide", "in_channels": 1}
        )
        assert model(torch.empty(2, 1, 9, 7))[0].shape == (2, 6, 2)
    assert model.kv_proj[0].in_features == 2048


def test_rotational_embeddings_turn_by_row_and_column() -> None:
    embedding = positions.CustomRotationalEmbedding(3)
    got = embedding(torch.empty(1, 3, 4, 5))
    for row in range(4):
        for column in range(5):
            # (0, 1) turned by an angle is (-sin, cos).
            a, b = math.pi * row / 3, math.pi * column / 4
            vector = torch.tensor([-math.sin(a), math.cos(a), -math.sin(b), math.cos(b)])
            torch.testing.assert_close(got[0, :, row, column], embedding.projection(vector))
    sequence = positions.CustomRotationalEmbedding1D(3)
    got = sequence(torch.empty(1, 3, 4))
    vector = torch.tensor([-math.sin(math.pi / 3), math.cos(math.pi / 3)])
    torch.testing.assert_close(got[0, :, 1], sequence.projection(vector))


def test_fourier_embeddings_see_x_and_y_from_0_to_1() -> None:
    embedding = positions.LearnableFourierPositionalEncoding(3)
    got = embedding(torch.empty(1, 3, 4, 5))
    projected = embedding.Wr(torch.tensor([3 / 4, 2 / 3]))
    features = torch.cat([projected.cos(), projected.sin()]) / 16
    torch.testing.assert_close(got[0, :, 2, 3], embedding.mlp(features))
    several = positions.MultiLearnableFourierPositionalEncoding(3)
    with torch.no_grad():
        several.combination[4] = 50.0  # the softmax then picks the fifth
    x = torch.empty(1, 3, 4, 5)
    torch.testing.assert_close(several(x), several.embedders[4](x))
    for i, embedder in enumerate(several.embedders):
        spread = float(embedder.Wr.weight.detach().std())
        assert 0.8 < spread * (1 - i / 10) ** 2 < 1.2


def test_super_linear_is_a_layer_for_each_neuron() -> None:
    torch.manual_seed(0)
    layer = SuperLinear(3, 2, 4, T=2.0)
    with torch.no_grad():
        layer.b1.normal_()
    x = torch.randn(5, 4, 3)
    for n in range(4):
        expected = (x[:, n] @ layer.w1[:, :, n] + layer.b1[0, n]) / 2
        torch.testing.assert_close(layer(x)[:, n], expected)
    assert SuperLinear(3, 1, 4)(x).shape == (5, 4)


def test_the_input_may_have_any_channels() -> None:
    model = ContinuousThoughtMachine(**SMALL)
    first = model(torch.randn(2, 5, 3, 3))
    assert first[0].shape == (2, 6, 2)
    assert model.kv_proj[0].in_features == 5
    fresh = ContinuousThoughtMachine(**SMALL)
    fresh.load_state_dict(model.state_dict())
    synapses = SynapseUNET(9, 3)
    assert synapses(torch.randn(2, 4)).shape == (2, 9)


def test_decays_are_clamped_in_place_and_still_learn() -> None:
    model = ContinuousThoughtMachine(**SMALL, in_channels=3)
    with torch.no_grad():
        model.decay_params_out.copy_(torch.tensor([-1.0, 0.0, 1.0, 15.0, 16.0]))
    parameter = model.decay_params_out
    model(torch.randn(2, 3, 5))[0].square().sum().backward()
    assert parameter.tolist() == [0.0, 0.0, 1.0, 15.0, 15.0]
    assert parameter is model.decay_params_out
    assert parameter.grad is not None
    assert float(parameter.grad[0]) != 0.0


def test_neurons_are_chosen_as_the_type_says() -> None:
    model = ContinuousThoughtMachine(**SMALL, n_random_pairing_self=3)
    for kind in ("out", "action"):
        left = getattr(model, f"{kind}_neuron_indices_left")
        right = getattr(model, f"{kind}_neuron_indices_right")
        assert left.dtype == torch.int64
        assert torch.equal(left[:3], right[:3])
    model = ContinuousThoughtMachine(**SMALL, neuron_select_type="first-last")
    assert model.out_neuron_indices_right.tolist() == [0, 1, 2, 3, 4]
    assert model.action_neuron_indices_left.tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("name", ["model_state_dict", "state_dict"])
def test_training_checkpoints_load(name: str) -> None:
    source = ContinuousThoughtMachine(**SMALL, in_channels=3)
    model = ContinuousThoughtMachine(**SMALL, in_channels=3)
    model.load_state_dict({name: source.state_dict(), "iteration": 7})
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_a_checkpoint_of_another_configuration_names_the_first_mismatch() -> None:
    model = ContinuousThoughtMachine(**SMALL, in_channels=3)
    wider = ContinuousThoughtMachine(**SMALL | {"n_synch_out": 7}, in_channels=3)
    with pytest.raises(RuntimeError, match=r"decay_params_out is \(7,\) and \(5,\) here.*3 more"):
        model.load_state_dict(wider.state_dict())
    flat = ContinuousThoughtMachine(**SMALL | {"synapse_depth": 1}, in_channels=3)
    with pytest.raises(RuntimeError, match=r"first_projection.0.weight \(12, 20\) is missing"):
        model.load_state_dict(flat.state_dict())
    extra = model.state_dict() | {"surplus": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"surplus is not part of this model$"):
        model.load_state_dict(extra)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "d_input must be divisible by heads=3, got 8"),
        ({"prediction_reshaper": [4, 2]}, r"a shape of out_dims=6 values, got \(4, 2\)|\[4, 2\]"),
        ({"prediction_reshaper": [-1, -1]}, "prediction_reshaper"),
        ({"prediction_reshaper": [6, 1]}, "two or more classes"),
        ({"backbone_type": "resnet18"}, "did you mean 'resnet18-"),
        ({"backbone_type": "resnet18-5"}, "backbone_type must be one of"),
        ({"positional_embedding_type": "learnable-fourier"}, "needs in_channels"),
        (
            {"backbone_type": "parity_backbone", "positional_embedding_type": "learnable-fourier"},
            "for the sequences of 'parity_backbone'",
        ),
        (
            {"backbone_type": "resnet18-1", "positional_embedding_type": "custom-rotational-1d"},
            "one for images",
        ),
        ({"neuron_select_type": "first"}, "neuron_select_type must be one of"),
        ({"neuron_select_type": "first-last", "n_synch_out": 13}, "at most d_model=12, got 13"),
        ({"n_random_pairing_self": 5}, "n_random_pairing_self must be at most"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout_nlm": -0.1}, "dropout_nlm"),
        ({"iterations": 0}, "iterations must be an integer >= 1"),
    ],
)
def test_arguments_that_do_not_fit_say_so(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinuousThoughtMachine(**SMALL | changes)


def test_hyper_layers_need_a_unet() -> None:
    with pytest.raises(ValueError, match="hyper_layers must be 'none' with synapse_depth=1"):
        HyperContinuousThoughtMachine(**SMALL | {"synapse_depth": 1})
    HyperContinuousThoughtMachine(**SMALL | {"synapse_depth": 1}, hyper_layers="none")
    with pytest.raises(ValueError, match="did you mean 'bottleneck'"):
        HyperContinuousThoughtMachine(**SMALL, hyper_layers="botleneck")
    with pytest.raises(ValueError, match="needs depth > 1, got depth=1"):
        HyperSynapseUNET(8, 1)
    with pytest.raises(ValueError, match="must be one of bottleneck, down"):
        HyperSynapseUNET(8, 3, hyper_layers="middle")


def test_built_from_a_config_and_by_hydra() -> None:
    cfg = HyperContinuousThoughtMachineConfig(**SMALL, hyper_layers="up", hyper_rank=2)
    for given in (cfg, {**SMALL, "hyper_layers": "up", "hyper_rank": 2}):
        assert HyperContinuousThoughtMachine.from_config(given).cfg == cfg
    target = "ml_networks.torch.HyperContinuousThoughtMachine"
    made = hydra.utils.instantiate(
        {"_target_": target, **SMALL, "hyper_layers": "up", "hyper_rank": 2}
    )
    assert made.cfg == cfg
    made = hydra.utils.instantiate(
        {"_target_": "ml_networks.ContinuousThoughtMachineConfig", **SMALL}
    )
    assert ContinuousThoughtMachine.from_config(made).cfg == made
    with pytest.raises(TypeError, match="did you mean 'd_model'"):
        ContinuousThoughtMachine(**SMALL, dmodel=3)
