"""Tuning without a GPU: the toy op in the interpreters, with made-up times."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from ml_networks.kernels.core import device, dispatch, measure, records, registry, tuner
from ml_networks.kernels.core.device import Device
from ml_networks.kernels.core.errors import KernelError, TuningRecordWarning, UnknownNameError
from ml_networks.kernels.core.problem import Case, Problem
from ml_networks.kernels.core.records import Timing
from ml_networks.kernels.core.tuner import Candidate
from tests.kernels.toy_op import spec

torch = pytest.importorskip("torch", reason="torch is not installed")

TOY = registry.get("toy_square")
H100 = device.target("sm_90")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETING or torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 and no GPU"
)
compiled = pytest.mark.skipif(INTERPRETING, reason="TRITON_INTERPRET=1: kernels do not compile")
FAST = spec.Config(128)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ML_NETWORKS_CACHE", str(tmp_path))
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    records.forget()
    return tmp_path


def pretend(fastest: Any) -> tuner.Compare:
    """Every function runs once; ``fastest`` takes 10 us, the plain path 20, all others 30."""

    def compare(
        functions: Mapping[Candidate, Any], clock: object, **limits: float
    ) -> dict[Candidate, Timing]:
        times = {}
        for candidate, function in functions.items():
            function()
            known = {fastest: 10.0, None: 20.0}
            time = known.get(candidate.config, 30.0)
            times[candidate] = Timing(time - 1, time, time + 1)
        return times

    return compare


def tune(**options: Any) -> list[tuner.Tuned]:
    options = {"compare": pretend(FAST), "dtypes": ["float32"], "sizes": ["small"], **options}
    here = device.torch_device(torch.device("cpu"))
    return list(tuner.tune(here, ["toy_square"], **options))


def config_taken(direction: str) -> Any:
    """What the toy op would launch when its kernel is asked for by name."""
    problem = replace(spec.CASES[0].problem(spec.NAME), direction=direction)
    here = device.torch_device(torch.device("cpu"))
    return dispatch.decide(problem, here, TOY.binding("torch"), "triton").config


@interpreted
@pytest.mark.parametrize("direction", spec.DIRECTIONS)
def test_the_fastest_right_config_is_recorded_and_then_used(direction: str) -> None:
    assert config_taken(direction) == spec.Config()
    fast = spec.Config(256)
    results = tune(compare=pretend(fast))
    assert [result.problem.direction for result in results] == ["backward", "forward"]
    assert all(result.rejected == () for result in results)
    record = next(r.record for r in results if r.problem.direction == direction)
    assert record is not None
    assert record.implementation == "triton"
    assert record.instantiate(spec) == fast
    assert (record.winner.p50, record.plain.p50) == (10.0, 20.0)
    assert dict(record.versions)["torch"] == metadata.version("torch")
    assert config_taken(direction) == fast


@interpreted
def test_the_plain_path_may_win() -> None:
    for result in tune(compare=pretend("nothing")):
        assert result.record is not None
        assert (result.record.implementation, result.record.config) == ("torch", None)
        assert result.record.winner == result.record.plain


@interpreted
@pytest.mark.parametrize("direction", spec.DIRECTIONS)
def test_a_config_with_wrong_numbers_never_wins(
    direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.kernels.toy_op import triton_kernel

    right = getattr(triton_kernel, direction)

    def wrong(*arguments: Any) -> torch.Tensor:
        result = right(*arguments)
        if arguments[-1] == FAST:
            result[-1] += 0.001
        return result

    monkeypatch.setattr(triton_kernel, direction, wrong)
    result = next(r for r in tune() if r.problem.direction == direction)
    assert result.record is not None
    assert result.record.implementation == "torch"
    ((candidate, why),) = result.rejected
    assert candidate == Candidate("triton", FAST)
    assert "error" in why
    assert "allowed" in why


@interpreted
def test_a_kernel_that_leaves_memory_unwritten_is_caught_by_the_poison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.kernels.toy_op import triton_kernel

    right = triton_kernel.forward

    def lazy(x: torch.Tensor, scale: float, config: spec.Config) -> torch.Tensor:
        return torch.empty_like(x) if config == FAST else right(x, scale, config)

    monkeypatch.setattr(triton_kernel, "forward", lazy)
    result = next(r for r in tune() if r.problem.direction == "forward")
    ((candidate, why),) = result.rejected
    assert candidate.config == FAST
    assert "nan" in why or "inf" in why


@interpreted
def test_a_config_that_crashes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.kernels.toy_op import triton_kernel

    right = triton_kernel.forward

    def crash(x: torch.Tensor, scale: float, config: spec.Config) -> torch.Tensor:
        if config == FAST:
            raise RuntimeError("out of resources")
        return right(x, scale, config)

    monkeypatch.setattr(triton_kernel, "forward", crash)
    for result in tune():
        assert dict(result.rejected)[Candidate("triton", FAST)] == (
            "RuntimeError: out of resources"
        )
        assert result.record is not None
        assert result.record.implementation == "torch"


@interpreted
def test_a_plain_path_that_fails_is_noted_and_tuning_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.kernels.toy_op import torch_op

    public = torch_op.toy_square

    def fails(x: torch.Tensor, *, scale: float, implementation: str | None) -> torch.Tensor:
        if x.requires_grad:
            raise RuntimeError("out of memory")
        return public(x, scale=scale, implementation=implementation)

    monkeypatch.setattr(torch_op, "toy_square", fails)
    backward, forward = tune()
    assert backward.record is None
    assert "out of memory" in backward.note
    assert forward.record is not None


@interpreted
def test_stopping_keeps_what_is_finished_and_a_second_run_resumes(own_cache: Path) -> None:
    times = pretend(FAST)
    calls = 0

    def interrupted(*arguments: Any, **options: Any) -> dict[Candidate, Timing]:
        nonlocal calls
        calls += 1
        if calls == 5:  # a problem is two races: the third one is stopped
            raise KeyboardInterrupt
        return times(*arguments, **options)

    with pytest.raises(KeyboardInterrupt):
        tune(compare=interrupted, sizes=["small", "ragged"])
    here = device.torch_device(torch.device("cpu"))
    path = records.path_of(own_cache / "tuned", here.key, spec.NAME)
    assert len(records.read(path, here.key, spec.NAME)) == 2

    results = tune(sizes=["small", "ragged"])
    assert [result.note for result in results] == ["has a record", "has a record", "", ""]
    assert len(records.read(path, here.key, spec.NAME)) == 4
    assert all(not r.note for r in tune(sizes=["small", "ragged"], force=True))
    assert len(records.read(path, here.key, spec.NAME)) == 4


@interpreted
def test_a_record_of_an_older_kernel_is_tuned_again(own_cache: Path) -> None:
    tune()
    here = device.torch_device(torch.device("cpu"))
    path = records.path_of(own_cache / "tuned", here.key, spec.NAME)
    path.write_text(path.read_text().replace(records.kernel_hash(TOY, "torch"), "old"))
    records.forget()
    assert all(not result.note for result in tune())


@interpreted
def test_a_budget_ends_it_between_problems() -> None:
    assert tune(seconds=-1.0) == []


@interpreted
def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("ML_NETWORKS_CACHE", str(blocked))
    with pytest.warns(TuningRecordWarning, match="ML_NETWORKS_CACHE"):
        tune(compare=pretend(spec.Config(64)))
    assert config_taken("forward") == spec.Config(64)


def test_jax_configs_are_tuned_and_a_direction_that_is_not_dispatched_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("jax", reason="jax is not installed")
    monkeypatch.setenv("ML_NETWORKS_PALLAS_INTERPRET", "1")
    results = tuner.tune(
        device.jax_device(),
        ["toy_square"],
        framework="jax",
        dtypes=["float32"],
        sizes=["small"],
        compare=pretend(FAST),
    )
    backward, forward = results
    assert forward.record is not None
    assert (forward.record.implementation, forward.record.instantiate(spec)) == ("pallas", FAST)
    assert backward.record is None
    assert "not dispatched" in backward.note


@compiled
def test_configs_that_spill_are_thrown_out_before_they_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    wide, good = spec.Config(1 << 14, 1), spec.Config(256)
    monkeypatch.setattr(spec, "search_space", lambda *_: [wide, good])
    problem = spec.CASES[0].problem(spec.NAME)
    kept, rejected = tuner.prune(TOY, problem, H100, TOY.binding("torch"))
    assert kept == [Candidate("triton", good)]
    assert list(rejected) == [Candidate("triton", wide)]
    assert "forward_kernel spills" in rejected[Candidate("triton", wide)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_an_accelerator_it_says_so() -> None:
    with pytest.raises(KernelError, match="needs an accelerator"):
        tuner.accelerator("torch")


def test_an_unknown_op_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="toy_square"):
        tuner.problems(["toy_sqare"])


def test_problems_are_distinct_keys_largest_first() -> None:
    rows = tuner.problems(["toy_square"])
    keys = [records.key_of(spec, problem, "torch") for _, _, problem in rows]
    assert len(rows) == len(set(keys)) == len(spec.CASES) * 2 * 3
    assert rows[0][2]["elements"] == 1 << 22


@pytest.mark.parametrize("policy", ["on_miss", "off"])
def test_a_miss_tunes_only_where_asked(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned: list[tuple[object, Device]] = []

    def remember(problem: object, where: Device, binding: object) -> None:
        tuned.append((problem, where))

    monkeypatch.setattr(tuner, "tune_problem", remember)
    problem = spec.CASES[2].problem(spec.NAME)
    with dispatch.tuning_policy(policy):
        dispatch.decide(problem, H100, TOY.binding("torch"))
    assert tuned == ([(problem, H100)] if policy == "on_miss" else [])


def call_and_pull(op: registry.Op, case: Case) -> None:
    for training in (False, True):
        measure.Workload(op, case, "torch", "float32", training).run("torch")


def trace_and_pull(op: registry.Op, case: Case) -> None:
    """The forward and backward pass in JAX, of shapes alone: eager JAX is slow."""
    import jax
    import jax.numpy as jnp

    binding, flags = op.binding("jax"), dict(case.flags)

    def floating(inputs: dict[str, Any]) -> dict[str, Any]:
        outputs = binding.call(inputs, flags, "xla")
        return {k: v for k, v in outputs.items() if jnp.issubdtype(v.dtype, jnp.floating)}

    def both(inputs: dict[str, Any]) -> Any:
        outputs, pull = jax.vjp(floating, inputs)
        return pull(jax.tree.map(jnp.ones_like, outputs))

    arrays = op.reference.make_inputs(case, 0)
    kinds = {"b": "bool", "i": "int32"}
    jax.eval_shape(
        both, {k: jnp.asarray(v, kinds.get(v.dtype.kind, "float32")) for k, v in arrays.items()}
    )


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("name", sorted(registry.ops()))
def test_what_an_op_asks_dispatch_for_is_what_was_tuned(
    name: str, framework: registry.Framework, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record of a case would never be found if a call of that case had another key."""
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    op = registry.get(name)
    asked: list[Problem] = []
    decide = dispatch.decide

    def listen(problem: Problem, *arguments: Any) -> dispatch.Decision:
        if problem.op == name:  # its plain path may be made of other ops
            asked.append(problem)
        return decide(problem, *arguments)

    monkeypatch.setattr(dispatch, "decide", listen)
    for case in op.spec.CASES:
        if case.size == "large":
            continue
        asked.clear()
        call_and_pull(op, case) if framework == "torch" else trace_and_pull(op, case)
        assert asked
        keys = {
            records.key_of(op.spec, case.problem(name, direction=direction), framework)
            for direction in op.spec.DIRECTIONS
        }
        assert {records.key_of(op.spec, problem, framework) for problem in asked} <= keys, case.id
