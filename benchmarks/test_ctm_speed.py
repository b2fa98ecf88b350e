"""The Continuous Thought Machine (8.5 million parameters, 50 ticks) on images of 99 x 99.

On a CPU against its straightforward form, 4 images, one thread; the two take turns, processor
time, so that other work on the machine counts little. On a GPU 64 images: the loop over the
modules, the one function of autograd, and that in a CUDA graph.
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


SIDES = ("modules", "one function", "in a CUDA graph")
GRAPHED_FORWARD_MS, GRAPHED_STEP_FASTER = 3.0, 5.0


def _milliseconds(call: Callable[[], Any], rounds: int = 20) -> float:
    """The median of a call on the GPU."""
    times = []
    for number in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end))
    return median(times)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_cuda_graph(
    dtype: torch.dtype, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml_networks.torch import ContinuousThoughtMachine, ctm

    torch.manual_seed(0)
    x = torch.randn(64, 3, 99, 99, device="cuda")
    ordinary, rows = ctm.is_ordinary, {}
    for side in SIDES:
        monkeypatch.setattr(ctm, "is_ordinary", ordinary if side != "modules" else lambda _: False)
        model = ContinuousThoughtMachine(**EXAMPLE).cuda()
        low = torch.autocast("cuda", dtype, dtype != torch.float32, cache_enabled=False)
        with low:
            if side == "in a CUDA graph":
                torch.cuda.make_graphed_callables(model, (x,))

            def step(model: Any = model) -> None:
                model.zero_grad()
                predictions, certainties, _ = model(x)
                (predictions.mean() + certainties.mean()).backward()

            with torch.no_grad():
                features = _milliseconds(lambda model=model: model.compute_features(x))
                forward = _milliseconds(lambda model=model: model(x))
            torch.cuda.reset_peak_memory_stats()
            rows[side] = {
                "features": features,
                "forward": forward,
                "ticks": forward - features,
                "step": _milliseconds(step, 10),
                "peak MB of a step": torch.cuda.max_memory_allocated() / 1e6,
            }
    folder = Path(request.config.getoption("--benchmark-out"))
    folder.mkdir(parents=True, exist_ok=True)
    name = str(dtype).removeprefix("torch.")
    figures = {
        "example": f"B=64, 3x99x99, T=50, {name}, milliseconds",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": rows,
    }
    text = json.dumps(figures, indent=1)
    (folder / f"ctm-gpu-{name}.json").write_text(f"{text}\n", encoding="utf-8")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        print("", text, sep="\n")
    graphed = rows["in a CUDA graph"]
    assert rows["modules"]["step"] >= GRAPHED_STEP_FASTER * graphed["step"]
    assert graphed["ticks"] <= GRAPHED_FORWARD_MS
