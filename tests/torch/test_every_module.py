"""What holds for every module: compiling, types, copies, checkpoints, distributed training."""

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
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ml_networks.tasks.images.train import leave_together
from tests.golden.make import flatten
from tests.torch.modules import ModuleCase, all_modules

CASES = all_modules()
every_module = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _built(case: ModuleCase, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return case.build()


def _inputs(case: ModuleCase, batch: int) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return case.inputs(batch)


def _run(module: Any, inputs: tuple[Tensor, ...], seed: int = 2) -> dict[str, Tensor]:
    """Run forward and backward, with equal random numbers each time; return all tensors."""
    torch.manual_seed(seed)
    outputs = dict(flatten(module(*inputs)))
    differentiable = [output for output in outputs.values() if output.requires_grad]
    module.zero_grad()
    sum(output.float().square().mean() for output in differentiable).backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {f"output {k}": v.detach() for k, v in outputs.items()} | gradients


def _assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], **kw: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, n=name: f"{n}: {m}", **kw)


@every_module
def test_every_parameter_learns(case: ModuleCase) -> None:
    module = _built(case)
    values = _run(module, _inputs(case, 4))
    assert {name for name, _ in module.named_parameters()} <= values.keys()
    assert all(value.isfinite().all() for value in values.values())


@every_module
def test_compiles_without_graph_breaks(case: ModuleCase) -> None:
    torch.compiler.reset()
    module = _built(case).eval()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for batch in (4, 3):
        inputs = _inputs(case, batch)
        expected = _run(module, inputs)
        actual = _run(compiled, inputs)
        actual = {name.removeprefix("_orig_mod."): value for name, value in actual.items()}
        if not case.random:
            _assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@every_module
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
def test_bfloat16(case: ModuleCase, autocast: bool) -> None:
    module, inputs = _built(case), _inputs(case, 4)
    if not autocast:
        module = module.bfloat16()
        inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values = _run(module, inputs)
    assert {name for name, _ in module.named_parameters()} <= values.keys()
    assert all(value.isfinite().all() for value in values.values())


@every_module
def test_copies_and_checkpoints_compute_the_same(case: ModuleCase) -> None:
    module = _built(case).eval()
    inputs = _inputs(case, 2)
    expected = _run(module, inputs)
    other = _built(case, seed=3).eval()
    other.load_state_dict(module.state_dict(), strict=True)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        _assert_close(_run(twin, inputs), expected, rtol=0, atol=0)
        assert all(a is not b for a, b in zip(twin.parameters(), module.parameters(), strict=True))


def _half(inputs: tuple[Tensor, ...], rank: int) -> tuple[Tensor, ...]:
    return tuple(x.chunk(2)[rank] for x in inputs)


def _distributed(rank: int, store: str, results: str) -> None:
    """Check in one of two processes that DDP averages the gradients of the halves of a batch."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    joined = torch.distributed.FileStore(store, 2)
    torch.distributed.init_process_group("gloo", store=joined, rank=rank, world_size=2)
    lines = []
    for name, case in CASES.items():
        inputs = _inputs(case, 4)
        alone = [_run(_built(case), _half(inputs, half)) for half in (0, 1)]
        parallel = DistributedDataParallel(_built(case))
        _run(parallel, _half(inputs, rank))
        for key, parameter in parallel.module.named_parameters():
            expected = (alone[0][key] + alone[1][key]) / 2
            if not torch.allclose(parameter.grad, expected, rtol=1e-4, atol=1e-6):
                lines.append(f"{name}: {key}")
    Path(f"{results}-{rank}").write_text("\n".join(lines))
    leave_together(joined, 2)
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(
        _distributed, (str(tmp_path / "store"), str(tmp_path / "wrong")), nprocs=2
    )
    assert [path.read_text() for path in sorted(tmp_path.glob("wrong-*"))] == ["", ""]
