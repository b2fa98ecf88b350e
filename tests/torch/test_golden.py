"""Golden checkpoints of the published 0.2.6 load strictly and give the same numbers.

See ``tests/golden/make.py`` for what a file holds and how large a deviation may be.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.golden import make

CASES = {
    f"{recipe}.{name}": build
    for recipe, cases in make.recipes().items()
    for name, build in cases.items()
}


def _built(case: str, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    torch.manual_seed(0)
    module, inputs, *rest = CASES[case](make.Library())
    if isinstance(module, nn.Module):
        state = {
            key.removeprefix("state/"): value
            for key, value in tensors.items()
            if key.startswith("state/")
        }
        module.load_state_dict(state, strict=True)
    inputs = tuple(tensors.get(f"input/{i}", x) for i, x in enumerate(inputs))
    return (module, inputs, *rest)


def test_every_case_has_its_file() -> None:
    files = {path.name.removesuffix(".safetensors") for path in make.DATA.glob("*.safetensors")}
    assert files == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_parameters_keep_their_order(case: str) -> None:
    with safe_open(make.DATA / f"{case}.safetensors", "pt") as file:
        published = json.loads(file.metadata()["parameters"])
    module = CASES[case](make.Library())[0]
    names = [n for n, _ in module.named_parameters()] if isinstance(module, nn.Module) else []
    assert names == [name for name in published if name in names]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, dtype: torch.dtype) -> None:
    tensors = load_file(make.DATA / f"{case}.safetensors")
    kinds = ("output/", "grad/", "after/", "eval/")
    reference = {key: value for key, value in tensors.items() if key.startswith(kinds)}
    cotangents = {
        key.removeprefix("cotangent/"): value
        for key, value in tensors.items()
        if key.startswith("cotangent/")
    }
    values = make.run(_built(case, tensors), cotangents, dtype)

    assert set(values) == set(reference)
    allowed = make.tolerances(reference, tensors, dtype)
    wrong = []
    for key, value in values.items():
        assert value.shape == reference[key].shape, key
        if not value.is_floating_point():
            assert torch.equal(value, reference[key]), key
        elif key not in allowed:
            # 0.2.6 does not run in this type and leaves no measure.
            assert value.isfinite().all(), key
        else:
            deviation = float(make.deviation(value, reference[key]))
            if not deviation <= allowed[key]:
                wrong.append(f"{key}: off by {deviation:.3g}, allowed {allowed[key]:.3g}")
    assert not wrong, "\n".join(wrong)
