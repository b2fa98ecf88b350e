"""The Continuous Thought Machine against its straightforward form, on the CPU.

The document's example (8.5 million parameters, 50 ticks) on 4 images of 99 x 99, one thread. The
two take turns; processor time, so that other work on the machine counts little.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.torch.ctm_reference import straightforward
from tests.torch.test_ctm import EXAMPLE

ROUNDS = 3
FASTER, LEANER = 4.0, 5.0


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _passes(form: Callable[[Tensor], Any], x: Tensor) -> tuple[float, float, float]:
    """Seconds without gradients, forward with them, and backward."""
    start = time.process_time()
    with torch.no_grad():
        form(x)
    alone = time.process_time()
    predictions, certainties, _ = form(x)
    forward = time.process_time()
    (predictions.mean() + certainties.mean()).backward()
    return alone - start, forward - alone, time.process_time() - forward


def _saved(form: Callable[[Tensor], Any], x: Tensor, model: torch.nn.Module) -> float:
    """Megabytes that the backward pass keeps, for each tick and image; without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        form(x)
    total = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in own)
    return total / 1e6 / EXAMPLE["iterations"] / len(x)


def test_faster_and_leaner_than_the_straightforward_form(request: pytest.FixtureRequest) -> None:
    from ml_networks.torch import ContinuousThoughtMachine

    torch.manual_seed(0)
    model = ContinuousThoughtMachine(**EXAMPLE)
    x = torch.randn(4, 3, 99, 99)
    forms = {"straightforward": lambda x: straightforward(model, x), "ours": model}
    with one_thread():
        saved = {name: _saved(form, x, model) for name, form in forms.items()}
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in forms}
        for _ in range(ROUNDS):
            for name, form in forms.items():
                times[name].append(_passes(form, x))
    kinds = ("no gradient", "forward", "backward")
    seconds = {
        name: dict(zip(kinds, map(median, zip(*rows, strict=True)), strict=True))
        for name, rows in times.items()
    }
    ratios = {kind: seconds["straightforward"][kind] / seconds["ours"][kind] for kind in kinds}
    folder = Path(request.config.getoption("--benchmark-out"))
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "example": "B=4, 3x99x99, T=50, one thread, float32, processor seconds",
        "torch": torch.__version__,
        "seconds": seconds,
        "rounds": times,
        "faster": ratios,
        "saved MB a tick and image": saved,
    }
    text = json.dumps(figures, indent=1)
    (folder / "ctm.json").write_text(f"{text}\n", encoding="utf-8")
    lines = [f"{'':<18}{'no gradient':>12}{'forward':>10}{'backward':>10}{'saved MB':>10}"]
    for name, row in seconds.items():
        figures_of = "".join(
            f"{row[kind]:>{w}.2f}" for kind, w in zip(kinds, (12, 10, 10), strict=True)
        )
        lines.append(f"{name:<18}{figures_of}{saved[name]:>10.2f}")
    # Pytest keeps what a test prints to itself.
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        print("", *lines, sep="\n")
    assert ratios["forward"] >= FASTER
    assert ratios["no gradient"] >= FASTER
    assert ratios["backward"] >= FASTER
    assert saved["straightforward"] >= LEANER * saved["ours"]
