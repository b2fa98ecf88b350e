"""Measuring: fair rounds, sound percentiles, and workloads that compute what they say."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ml_networks.kernels.core import device, measure, registry
from ml_networks.kernels.core.registry import Framework
from tests.kernels.toy_op import spec

torch = pytest.importorskip("torch", reason="torch is not installed")

TOY = registry.get("toy_square")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Clock:
    """Every function takes what it returns, plus a drift that grows with each call."""

    def __init__(self, drift: float = 0.0) -> None:
        self.drift, self.calls = drift, 0
        self.order: list[float] = []

    def __call__(self, function: Callable[[], float]) -> float:
        self.calls += 1
        self.order.append(function())
        return self.order[-1] + self.drift * self.calls


def test_drift_hits_all_candidates_alike() -> None:
    same = {name: lambda: 100.0 for name in "abc"}
    times = measure.compare(same, Clock(drift=1.0), rounds=(50, 50))
    middles = [timing.p50 for timing in times.values()]
    assert max(middles) - min(middles) <= 1.0


def test_rounds_go_there_and_back() -> None:
    clock = Clock()
    measure.compare({1: lambda: 1.0, 2: lambda: 2.0}, clock, rounds=(2, 2))
    assert clock.order[-4:] == [1.0, 2.0, 2.0, 1.0]


def test_percentiles() -> None:
    times = [float(t) for t in range(101)]
    assert measure.timing(times) == measure.Timing(20.0, 50.0, 80.0)


def test_a_budget_of_nothing_still_gives_the_fewest_rounds() -> None:
    clock = Clock()
    measure.compare({"a": lambda: 1.0}, clock, seconds=0.0, rounds=(4, 1000))
    assert len(clock.order) == measure.WARM_UP + 4


def test_the_budget_ends_a_slow_race() -> None:
    start = time.monotonic()
    slow = {"a": lambda: time.sleep(0.01)}
    measure.compare(slow, measure.stopwatch("torch", device.cpu()), seconds=0.05)
    assert time.monotonic() - start < 5


def test_the_host_clock_tells_the_time() -> None:
    clock = measure.stopwatch("torch", device.cpu())
    assert 10_000 <= clock(lambda: time.sleep(0.01)) < 1_000_000


def test_the_jax_clock_waits_for_the_result() -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    clock = measure.stopwatch("jax", device.cpu())
    work = jax.jit(lambda x: x @ x @ x @ x)
    x = jax.numpy.ones((500, 500))
    work(x).block_until_ready()
    assert clock(lambda: work(x)) > 200


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_workload_computes_the_op(framework: Framework, training: bool) -> None:
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    load = measure.Workload(TOY, spec.CASES[1], framework, "float32", training)
    results = load.run(None)
    assert set(results) == ({"x"} if training else {"y"})
    assert all(error < 1e-6 for error in load.errors(results).values())
    outputs, gradients = load.function(None)()
    assert set(outputs) == {"y"}
    timed = gradients if training else outputs
    assert all(error < 1e-6 for error in load.errors(timed).values())
    wrong = {name: value * 1.001 for name, value in results.items()}
    assert all(error > 5e-4 for error in load.errors(wrong).values())


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_rival_runs_on_the_same_arrays(framework: Framework) -> None:
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    load = measure.Workload(TOY, spec.CASES[0], framework, "float32", True)

    def rival(inputs: Any) -> dict[str, Any]:
        return {"y": inputs["x"] ** 2 * spec.CASES[0].flags["scale"]}

    assert all(error < 1e-6 for error in load.errors(load.run(rival)).values())
    assert set(load.function(rival)()[1]) == {"x"}


def test_training_draws_output_gradients_that_are_not_constant() -> None:
    load = measure.Workload(TOY, spec.CASES[0], "torch", "float32", True)
    assert np.std(load.side.to_numpy(load.cotangents["y"])) > 0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_captured() -> None:
    def function() -> None: ...

    assert measure.graphed(function) is function


@gpu
def test_a_graph_repeats_the_work() -> None:
    x = torch.zeros(4, device="cuda")
    replay = measure.graphed(lambda: x.add_(1))
    before = x.clone()
    replay()
    torch.testing.assert_close(x, before + 1)


@gpu
def test_what_cannot_be_captured_runs_as_it_is() -> None:
    x = torch.zeros(4, device="cuda")

    def synchronizes() -> float:
        return x.sum().item()

    assert measure.graphed(synchronizes) is synchronizes
    assert measure.stopwatch("torch", device.torch_device(x.device))(synchronizes) > 0


@gpu
@pytest.mark.parametrize("training", [False, True])
def test_device_events_time_a_captured_pass(training: bool) -> None:
    load = measure.Workload(TOY, spec.CASES[2], "torch", "float32", training)
    here = device.torch_device(torch.device("cuda"))
    replay = measure.graphed(load.function("triton"))
    times = measure.compare({"triton": replay}, measure.stopwatch("torch", here))
    moved = 8 * spec.CASES[2].dims["elements"]
    assert here.bandwidth is None or times["triton"].p50 > moved / here.bandwidth * 1e6 / 2


def test_versions_name_what_a_figure_depends_on() -> None:
    assert {"torch"} <= set(measure.versions("torch"))
    assert set(measure.versions("jax")) <= {"jax", "jaxlib"}
