"""Real machine code for every kernel and every chip, with no GPU: in the config that dispatch
chooses there, each kernel compiles, spills nothing, fits and uses tensor cores where it has a dot;
and every Pallas kernel lowers for CUDA and TPU."""

from __future__ import annotations

import functools
import importlib.util
import os

import pytest

from ml_networks.kernels.core import (
    ahead_of_time,
    device,
    dispatch,
    pallas,
    records,
    registry,
    tuner,
)
from ml_networks.kernels.core.errors import KernelError, UnknownNameError
from ml_networks.kernels.core.pallas_ahead_of_time import call_and_pull
from ml_networks.kernels.core.records import Timing

OPS = sorted(registry.ops())
GPUS = sorted(name for name in device.TARGETS if name != "tpu")
_MISSING = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]


has_triton = pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {' '.join(_MISSING)}")
_compiling = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="TRITON_INTERPRET=1: this process cannot compile kernels",
)


def compiles(test: object) -> object:
    """A test that compiles Triton kernels."""
    return has_triton(_compiling(test))


@compiles
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("op", OPS)
def test_chosen_kernels_are_clean(op: str, target: str) -> None:
    kernels = [
        (problem, resources)
        for problem, found in ahead_of_time.chosen(registry.get(op), device.target(target))
        for resources in found
    ]
    complaints = {
        f"{p} {found.kernel}": found.complaints for p, found in kernels if not found.clean
    }
    assert not complaints
    assert all(found.registers > 0 and found.occupancy > 0 for _, found in kernels)
    # Elsewhere an op may be left to the plain path.
    assert kernels or target != "sm_90"


@pytest.mark.parametrize(
    ("body", "waits"),
    [
        ("ld.param.b64 %rd1, [a]; griddepcontrol.wait; ld.global.b32 %r1, [%rd1]; ret;", True),
        ("ld.global.b32 %r1, [%rd1]; griddepcontrol.wait; ret;", False),
        ("st.volatile.global.b32 [%rd1], %r1; griddepcontrol.wait; ret;", False),
        ("cp.async.cg.shared.global [%r1], [%rd1], 16; griddepcontrol.wait; ret;", False),
        ("@%p1 bra $L1; griddepcontrol.wait; ret;", False),
        ("ld.global.b32 %r1, [%rd1]; ret;", False),
    ],
)
def test_a_kernel_launched_early_waits_first(body: str, waits: bool) -> None:
    assert (
        ahead_of_time._waits(f".visible .entry k(.param .u64 .ptr .global a) {{ {body} }}")
        is waits
    )


@compiles
def test_a_spilling_kernel_is_seen() -> None:
    from tests.kernels.toy_op import triton_kernel
    from tests.kernels.toy_op.spec import Config

    toy = registry.get("toy_square")
    problem = toy.spec.CASES[0].problem(toy.name)
    (wide,) = triton_kernel.compilations(problem, Config(1 << 14, 1), device.target("sm_90"))
    found = ahead_of_time.compile_for(wide, device.target("sm_90"))
    assert not found.clean
    assert found.spill_bytes > 0


@has_triton
def test_an_interpreting_process_says_that_it_cannot_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    toy = registry.get("toy_square")
    problem = toy.spec.CASES[2].problem(toy.name)
    with pytest.raises(KernelError, match="cannot compile"):
        ahead_of_time.inspect(toy, problem, device.target("sm_90"))


def test_an_unknown_target_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="sm_90"):
        device.target("sm90")


@pytest.mark.parametrize("target", ["sm_90", "tpu"])
@pytest.mark.parametrize("op", OPS)
def test_pallas_kernels_lower(op: str, target: str) -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    found = registry.get(op)
    binding = found.binding("jax")
    lowered = refused = 0
    for case in found.spec.CASES:
        for dtype in ("float32", "bfloat16"):
            problems = [case.problem(op, dtype, way) for way in found.spec.DIRECTIONS]
            chip = device.target(target)
            if any(found.spec.not_supported_reasons(p, "pallas", chip) for p in problems):
                refused += 1
                continue
            kinds = {"f": dtype, "b": "bool"}
            arrays = {
                name: jax.ShapeDtypeStruct(value.shape, kinds.get(value.dtype.kind, "i4"))
                for name, value in found.reference.make_inputs(case, 0).items()
                if value.size < 1 << 24
            }
            call = functools.partial(
                call_and_pull,
                binding,
                dict(case.flags),
                implementation="pallas",
                backward=True,
            )
            text = pallas.lower(call, arrays, target_name=target)
            assert "custom_call" in text
            lowered += 1
    # An op may leave a TPU to XLA altogether, with reasons.
    assert lowered or (target == "tpu" and refused), f"no case of {op} lowers for {target}"


def test_lowering_leaves_no_trace() -> None:
    pytest.importorskip("jax", reason="jax is not installed")
    with pallas.lowering_for("sm_90"):
        assert dispatch.current_device("jax").target == "sm_90"
    assert dispatch.current_device("jax").platform == "cpu"


@pytest.mark.parametrize("op", OPS)
def test_a_pallas_trace_serves_one_device_and_one_config(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was lowered for a GPU runs here after it, and in a config of its own."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    found = registry.get(op)
    binding, chip = found.binding("jax"), device.target("sm_90")
    case, problems = next(
        (case, problems)
        for case in found.spec.CASES
        for problems in [[case.problem(op, "float32", way) for way in found.spec.DIRECTIONS]]
        if not any(found.spec.not_supported_reasons(p, "pallas", chip) for p in problems)
    )
    inputs = {
        name: value.astype("f4") if value.dtype.kind == "f" else value
        for name, value in found.reference.make_inputs(case, 0).items()
    }
    inputs = jax.tree.map(jax.numpy.asarray, inputs)
    started: list[str] = []

    def counted(*arguments: object, **options: object) -> object:
        started.append(op)
        return call(*arguments, **options)

    call = pallas.call
    monkeypatch.setattr(pallas, "call", counted)
    pull = functools.partial(
        call_and_pull, binding, dict(case.flags), implementation="pallas", backward=True
    )
    jax.clear_caches()  # of earlier tests, which may have run the same configs
    pallas.lower(pull, inputs, target_name="sm_90")
    nothing = Timing(1.0, 1.0, 1.0)
    with pallas.interpret():
        here = dispatch.current_device("jax")
        for config in found.spec.search_space(problems[0], here, "pallas")[:2]:
            started.clear()
            candidate = tuner.Candidate("pallas", config)
            forced = [
                tuner._record(found, problem, binding, candidate, nothing, nothing)
                for problem in problems
            ]
            with records.overlay(op, *forced):
                pull(inputs)
            assert started, config
