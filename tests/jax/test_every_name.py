"""What the torch side has and the JAX side has not, or is not compared with, and why."""

from __future__ import annotations

import pytest

import ml_networks.jax as ours
from tests.jax.modules import pairs

torch = pytest.importorskip("torch", reason="torch is not installed")
theirs = pytest.importorskip("ml_networks.torch")

TORCH_ALONE = {
    "determine_loader": "a torch DataLoader; numpy_collate makes its batches NumPy's",
    "seed_worker": "for workers of a torch DataLoader",
    "torch_fix_seed": "here jax_fix_seed",
}
NOT_COMPARED = {
    "BaseModule": "abstract",
    "MinMaxNormalize": "a function here, with nothing to convert: test_steered.py",
}


def test_every_public_torch_name_is_here_or_has_a_reason() -> None:
    missing = set(theirs.__all__) - set(ours.__all__)
    assert missing - set(TORCH_ALONE) == set()
    assert set(TORCH_ALONE) & set(ours.__all__) == set()


def test_every_public_torch_module_has_a_pair_or_a_reason() -> None:
    compared: set[type] = set()
    for pair in pairs():
        for module in pair.build(theirs).modules():
            compared.update(type(module).__mro__)
    public = {name: getattr(theirs, name) for name in theirs.__all__}
    modules = {
        name
        for name, value in public.items()
        if isinstance(value, type) and issubclass(value, torch.nn.Module)
    }
    assert {name for name in modules if public[name] not in compared} == set(NOT_COMPARED)
