"""The two loops over ticks of the JAX Continuous Thought Machine on the CPU.

The large model but for 10 ticks and features in place of a backbone: 4 images, 2,500 positions,
one thread. All ticks as one function against the scan over the modules, in turns, processor time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import pytest

# Before JAX is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

jax = pytest.importorskip("jax", reason="jax is not installed")

from flax import nnx  # noqa: E402

from tests.jax.test_ctm_loop import EXAMPLE  # noqa: E402

ROUNDS = 9
SIDES = ("scan over the modules", "one function")


def _compiled(side: str, patch: pytest.MonkeyPatch) -> dict[str, Callable[[], Any]]:
    from ml_networks.jax import ContinuousThoughtMachine, ctm

    if side == SIDES[0]:
        patch.setattr(ctm, "layers_of", lambda _: None)
    model = ContinuousThoughtMachine(**EXAMPLE | {"iterations": 10}, rngs=nnx.Rngs(0))
    model.eval()
    structure, parameters, rest = nnx.split(model, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(1), (4, 64, 50, 50))

    def loss(parameters: Any) -> jax.Array:
        predictions, certainties, _ = nnx.merge(structure, parameters, rest)(x)
        return predictions.mean() + certainties.mean()

    def bound(function: Callable[[Any], Any]) -> Callable[[], Any]:
        run = jax.jit(function).lower(parameters).compile()
        return lambda: jax.block_until_ready(run(parameters))

    return {"forward": bound(loss), "forward and backward": bound(jax.value_and_grad(loss))}


def test_not_slower_than_the_scan_over_the_modules(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: dict[str, dict[str, Callable[[], Any]]] = {}
    for side in SIDES:
        with monkeypatch.context() as patch:
            runs[side] = _compiled(side, patch)
    times: dict[str, dict[str, list[float]]] = {s: {k: [] for k in runs[s]} for s in SIDES}
    for _ in range(ROUNDS):
        for side, kinds in runs.items():
            for kind, run in kinds.items():
                start = time.process_time()
                run()
                times[side][kind].append(time.process_time() - start)
    seconds = {s: {k: median(v) for k, v in rows.items()} for s, rows in times.items()}
    figures = {
        "example": "B=4, 64 features at 50x50 positions, T=10, one thread, float32",
        "jax": jax.__version__,
        "processor seconds": seconds,
        "rounds": times,
    }
    folder = Path(request.config.getoption("--benchmark-out"))
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(figures, indent=1)
    (folder / "ctm-jax.json").write_text(f"{text}\n", encoding="utf-8")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        print("", json.dumps(seconds, indent=1), sep="\n")
    before, after = (seconds[side] for side in SIDES)
    # Forward both read the same weights at every tick, which is what takes the time.
    assert after["forward"] <= 1.1 * before["forward"]
    assert after["forward and backward"] <= before["forward and backward"]
