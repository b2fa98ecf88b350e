from __future__ import annotations

import importlib.util
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from ml_networks import get_optimizer, torch_fix_seed
from ml_networks.torch import utils
from ml_networks.torch.utils import UnknownOptimizerError


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("AdamWScheduleFree", "schedulefree"),
        ("Adam", "torch.optim"),
        ("SGD", "torch.optim"),
        ("Lion", "pytorch_optimizer"),
    ],
)
def test_optimizers_by_name(name: str, package: str) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = get_optimizer(model.parameters(), name, lr=1e-2, weight_decay=1e-4)
    assert type(optimizer).__name__ == name
    assert type(optimizer).__module__.startswith(package)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4
    before = model.weight.detach().clone()
    if package == "schedulefree":
        optimizer.train()
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("name", "near"),
    [("adam", "Adam"), ("AdamWSchedulFree", "AdamWScheduleFree"), ("Lionn", "Lion")],
)
def test_near_names(name: str, near: str) -> None:
    with pytest.raises(UnknownOptimizerError, match=f"{name!r}; did you mean {near!r}") as error:
        get_optimizer([torch.zeros(2)], name, lr=1e-3)
    assert isinstance(error.value, NotImplementedError)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("name", ["Optimizer", "lr_scheduler", "__name__", "functional"])
def test_other_attributes_are_no_optimizers(name: str) -> None:
    with pytest.raises(UnknownOptimizerError):
        get_optimizer([torch.zeros(2)], name)


def test_optional_packages_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("schedulefree", "pytorch_optimizer"):
        monkeypatch.setitem(sys.modules, package, None)
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert isinstance(get_optimizer([parameter], "Adam"), torch.optim.Adam)
    with pytest.raises(
        UnknownOptimizerError, match=r"not installed: schedulefree, pytorch_optimizer"
    ):
        get_optimizer([parameter], "Lion")


def test_optimizer_packages_are_imported_only_to_look_for_a_name() -> None:
    code = """
import sys, torch
from ml_networks import get_optimizer
get_optimizer([torch.nn.Parameter(torch.zeros(2))], "Adam")
print("pytorch_optimizer" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_fixed_seed() -> None:
    draws = []
    precision = torch.get_float32_matmul_precision()
    for _ in range(2):
        torch_fix_seed(3)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
    assert draws[0] == draws[1]
    torch_fix_seed(4)
    assert draws[0][2] != torch.rand(()).item()
    assert torch.backends.cudnn.deterministic
    assert torch.get_float32_matmul_precision() == precision


PROGRESS_BAR = """
import sys
{first}
from ml_networks import ProgressBarCallback
callback = ProgressBarCallback()
print(*(base.__module__.partition(".")[0] for base in type(callback).__mro__[1:2]))
print(callback.theme.progress_bar)
"""


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_progress_bar_is_of_the_lightning_in_use(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    code = PROGRESS_BAR.format(
        first=f"import {package}.pytorch" if package == "lightning" else f"import {package}"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [package, "green1"]


def test_progress_bar_without_lightning() -> None:
    code = PROGRESS_BAR.format(first="sys.modules.update(lightning=None, pytorch_lightning=None)")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "ModuleNotFoundError: ProgressBarCallback needs Lightning: pip install" in done.stderr


def test_gumbel_noise_is_finite_and_has_its_moments() -> None:
    torch.manual_seed(0)
    noise = utils.gumbel_noise(torch.empty(200_000, dtype=torch.bfloat16))
    assert noise.dtype is torch.float32
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772) < 0.015
    assert abs(noise.var().item() - torch.pi**2 / 6) < 0.04
