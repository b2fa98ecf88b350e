from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor
from torch import nn as torch_nn

from ml_networks.tasks.images.train import leave_together
from ml_networks.torch import nn
from ml_networks.torch.nn import global_batch

SAME = {
    "BatchNorm1d": ((6,), {}, (5, 6)),
    "BatchNorm1d-sequence": ((6,), {"momentum": None}, (5, 6, 3)),
    "BatchNorm2d": ((6, 1e-3, 0.2), {}, (5, 6, 3, 4)),
    "BatchNorm2d-plain": ((6, 1e-5, 0.1, False, False), {}, (5, 6, 3, 4)),
    "Conv2d": ((6, 4, 3, 2, 1, 1, 2, False), {}, (5, 6, 7, 8)),
    "MaxPool2d": ((2,), {}, (5, 6, 7, 8)),
    "MaxPool2d-window": (((3, 2), (2, 1), (1, 0)), {"dilation": (1, 2)}, (5, 6, 7, 8)),
    "Flatten": ((), {}, (5, 6, 3)),
    "Linear": ((6, 3), {"bias": False}, (5, 6)),
    "ReLU": ((), {}, (5, 6)),
    "Dropout": ((0.3,), {}, (50, 6)),
}


@pytest.mark.parametrize("name", SAME)
def test_layers_can_replace_torchs(name: str) -> None:
    arguments, keywords, shape = SAME[name]
    kind = name.partition("-")[0]
    ours: Any = getattr(nn, kind)(*arguments, **keywords)
    theirs: Any = getattr(torch_nn, kind)(*arguments, **keywords)
    assert isinstance(ours, type(theirs))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for mode in (True, False):
        x = torch.randn(shape)
        results = []
        for layer in (ours.train(mode), theirs.train(mode)):
            torch.manual_seed(0)
            leaf = x.clone().requires_grad_()
            output = layer(leaf)
            (gradient,) = torch.autograd.grad(output.square().sum(), leaf)
            results.append((output, gradient))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_max_pool_takes_the_arguments_in_the_documented_order() -> None:
    x = torch.randn(1, 1, 5, 5)
    assert nn.MaxPool2d(2, 2, 0, 1, True)(x).shape == (1, 1, 3, 3)
    values, indices = nn.MaxPool2d(2, return_indices=True)(x)
    assert torch.equal(x.flatten()[indices.flatten()], values.flatten())


# --- loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_loss(reduction: str, label_smoothing: float, weighted: bool) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(8, 4), torch.tensor([0, 1, 2, 3, 7, 0, 1, 7])
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0]) if weighted else None
    loss = nn.CrossEntropyLoss(weight, reduction, 7, label_smoothing)(logits, target)
    each = torch.zeros(8)
    counted = torch.zeros(8)
    weights = torch.ones(4) if weight is None else weight
    for i, label in enumerate(target.tolist()):
        if label == 7:
            continue
        log_p = logits[i].log_softmax(-1)
        smooth = (weights * log_p).sum() / 4
        each[i] = -(1 - label_smoothing) * weights[label] * log_p[label] - label_smoothing * smooth
        counted[i] = weights[label]
    expected = {"none": each, "sum": each.sum(), "mean": each.sum() / counted.sum()}[reduction]
    torch.testing.assert_close(loss, expected)


def test_cross_entropy_loss_arguments() -> None:
    logits, target = torch.randn(3, 4), torch.tensor([0, -100, 2])
    for ignore_index in (-100, None):
        loss = nn.CrossEntropyLoss(ignore_index=ignore_index)(logits, target)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target))
    with pytest.raises(ValueError, match="'average'; it takes 'mean', 'sum' or 'none'"):
        nn.CrossEntropyLoss(reduction="average")


# --- Adam -----------------------------------------------------------------------------------


def _adam_by_hand(
    gradients: list[Tensor], lr: float, weight_decay: float, amsgrad: bool
) -> Tensor:
    x = torch.ones(3, dtype=torch.float64)
    m, v, largest = (torch.zeros_like(x) for _ in range(3))
    for t, gradient in enumerate(gradients, 1):
        g = gradient + weight_decay * x
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        largest = torch.maximum(largest, v)
        second = (largest if amsgrad else v) / (1 - 0.999**t)
        x = x - lr * m / (1 - 0.9**t) / (second.sqrt() + 1e-8)
    return x


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam(weight_decay: float, amsgrad: bool) -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = nn.Adam([parameter], 0.01, weight_decay=weight_decay, amsgrad=amsgrad)
    assert optimizer.param_groups[0]["fused"]
    gradients = [10.0 ** (2 - t) * torch.randn(3, dtype=torch.float64) for t in range(6)]
    for gradient in gradients:
        optimizer.zero_grad()
        (parameter * gradient).sum().backward()
        optimizer.step()
    expected = _adam_by_hand(gradients, 0.01, weight_decay, amsgrad)
    torch.testing.assert_close(parameter.detach(), expected)


def test_learning_rate() -> None:
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = nn.Adam([{"params": a, "lr": 0.5}, {"params": [b]}], lr=0.1)
    assert optimizer.lr == 0.5
    optimizer.set_lr(0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    (a + b).sum().backward()
    optimizer.step()
    assert a.tolist() == b.tolist() == [1.0, 1.0]
    optimizer.set_lr(0.25)
    optimizer.step()
    assert a.tolist() == pytest.approx([0.75, 0.75], abs=0.01)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="must not be negative"):
            optimizer.set_lr(wrong)


def test_adam_keeps_its_state_through_copies_and_checkpoints() -> None:
    def trained(optimizer: nn.Adam, steps: int) -> list[Tensor]:
        parameters = optimizer.param_groups[0]["params"]
        for _ in range(steps):
            optimizer.zero_grad()
            (parameters[0] ** 4).sum().backward()
            optimizer.step()
        return [p.detach().clone() for p in parameters]

    optimizer = nn.Adam([torch.nn.Parameter(torch.randn(4))], amsgrad=True)
    trained(optimizer, 3)
    twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    other = nn.Adam([torch.nn.Parameter(optimizer.param_groups[0]["params"][0].detach().clone())])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = trained(optimizer, 3)
    for twin in (*twins, other):
        assert torch.equal(trained(twin, 3)[0], expected[0])


def test_adam_of_generators_of_parameters() -> None:
    model = torch_nn.Linear(2, 2)
    assert len(nn.Adam(model.parameters()).param_groups[0]["params"]) == 2
    groups = ({"params": module.parameters()} for module in (model,))
    assert len(nn.Adam(groups).param_groups[0]["params"]) == 2


# --- a batch shared among processes ---------------------------------------------------------


def _layers() -> torch_nn.Module:
    torch.manual_seed(0)
    return torch_nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4, momentum=None),
        nn.ReLU(),
        nn.Dropout(0.4),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.BatchNorm1d(5, affine=False),
        nn.Dropout(0.2, inplace=True),
    ).double()


def _steps(rank: int, sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Run two batches of 5, of which this process has ``sizes[rank]``; return all results."""
    module = _layers()
    start, stop = sizes[rank]
    results = {}
    for step in range(2):
        torch.manual_seed(step)
        x, cotangent = torch.randn(5, 2, 4, 4).double(), torch.randn(5, 5).double()
        x.requires_grad_()
        generator = torch.Generator().manual_seed(step)
        with global_batch(start, 5, generator):
            output = module(x[start:stop])
        (output * cotangent[start:stop]).sum().backward()
        results[f"output {step}"] = output.detach()
        results[f"x.grad {step}"] = x.grad[start:stop]
    results |= {f"grad {k}": p.grad for k, p in module.named_parameters()}
    return results | {f"buffer {k}": b.clone() for k, b in module.named_buffers()}


def _half_precision(start: int, stop: int) -> Tensor:
    torch.manual_seed(0)
    x = (100 + torch.randn(5, 6, 3, 4)).bfloat16()
    with global_batch(start, 5, torch.Generator()):
        return nn.BatchNorm2d(6)(x[start:stop]).detach()


def _process(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    joined = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=joined, rank=rank, world_size=2)
    torch.save(_steps(rank, [(0, 2), (2, 5)]), f"{folder}/{rank}")
    torch.save(_half_precision(*[(0, 2), (2, 5)][rank]), f"{folder}/half-{rank}")
    leave_together(joined, 2)
    torch.distributed.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    expected = _steps(0, [(0, 5)])
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    for name, value in expected.items():
        first, second = (part[name] for part in parts)
        if name.startswith(("output", "x.grad")):
            torch.testing.assert_close(torch.cat([first, second]), value, msg=name)
        elif name.startswith("grad"):
            torch.testing.assert_close(first + second, value, msg=name)
        else:
            torch.testing.assert_close(first, value, msg=name)
            torch.testing.assert_close(second, value, msg=name)
    half = torch.cat([torch.load(tmp_path / f"half-{rank}") for rank in (0, 1)])
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half, _half_precision(0, 5))


def test_dropout_of_a_part_is_that_part_of_the_whole() -> None:
    layer, x = nn.Dropout(0.3), torch.ones(6, 1000)

    def drop(start: int, stop: int, seed: int = 0) -> Tensor:
        with global_batch(start, 6, torch.Generator().manual_seed(seed)):
            return layer(x[start:stop])

    whole = drop(0, 6)
    assert torch.equal(drop(2, 5), whole[2:5])
    assert not torch.equal(drop(0, 6, seed=1), whole)
    kept = whole != 0
    assert abs(kept.float().mean().item() - 0.7) < 5 * (0.21 / 6000) ** 0.5
    torch.testing.assert_close(whole[kept], torch.full_like(whole[kept], 1 / 0.7))
    with global_batch(0, 6, torch.Generator()):
        assert torch.equal(layer.eval()(x), x)
        assert torch.equal(nn.Dropout(1.0)(x), torch.zeros_like(x))
        assert torch.equal(nn.Dropout(0.0)(x), x)


def test_the_context_ends() -> None:
    with pytest.raises(KeyError), global_batch(0, 4, torch.Generator()):
        raise KeyError
    assert nn._current is None
