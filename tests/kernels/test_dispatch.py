"""Who runs, and why: every step of the policy, on a pretend H100 where one is needed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ml_networks import kernels
from ml_networks.kernels.core import device, dispatch, records, registry
from ml_networks.kernels.core.errors import (
    TuningMissError,
    UnknownNameError,
    UnsupportedImplementationError,
)
from ml_networks.kernels.core.problem import Problem
from ml_networks.kernels.core.records import Record, Timing

torch = pytest.importorskip("torch", reason="torch is not installed")

H100 = device.target("sm_90")
CPU = device.cpu()
TOY = registry.get("toy_square")
BINDING = TOY.binding("torch")


def problem(elements: int = 4096, dtype: str = "float32", **more: object) -> Problem:
    flags = (("scale", 1.0),)
    return Problem("toy_square", (("elements", elements),), dtype, flags, **more)  # type: ignore[arg-type]


def a_record(elements: int = 4096, implementation: str = "triton", **more: object) -> Record:
    record = Record(
        framework="torch",
        direction="forward",
        dtype="float32",
        dims=(("elements", elements),),
        flags=(("scale", 1.0),),
        implementation=implementation,
        config=(("block", 256), ("num_warps", 8)) if implementation == "triton" else None,
        winner=Timing(9.0, 10.0, 11.0),
        plain=Timing(19.0, 20.0, 21.0),
        versions=(("torch", "2.13.0"),),
        kernel_hash=records.kernel_hash(TOY, "torch"),
        date="2026-11-22",
    )
    return replace(record, **more)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_outside_influence(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ML_NETWORKS_CACHE", str(tmp_path))
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    records.forget()


def test_a_cpu_takes_the_plain_path_and_says_why_not_the_kernel() -> None:
    decision = dispatch.decide(problem(), CPU, BINDING)
    assert (decision.implementation, decision.source) == ("torch", "cpu")
    ((name, reasons),) = decision.against
    assert name == "triton"
    assert "GPU" in reasons[0]


def test_a_gpu_without_a_record_takes_the_heuristic() -> None:
    decision = dispatch.decide(problem(), H100, BINDING)
    assert (decision.implementation, decision.source) == ("triton", "heuristic")
    assert decision.config == TOY.spec.Config()
    small = dispatch.decide(problem(10), H100, BINDING)
    assert (small.implementation, small.why) == ("torch", "too small for a kernel")


def test_float64_takes_the_plain_path() -> None:
    decision = dispatch.decide(problem(dtype="float64"), H100, BINDING)
    assert (decision.implementation, decision.source) == ("torch", "float64")
    with pytest.raises(UnsupportedImplementationError, match="float64"):
        dispatch.decide(problem(dtype="float64"), H100, BINDING, "triton")


def test_a_refusal_lists_sizes_dtype_device_and_every_reason() -> None:
    with pytest.raises(UnsupportedImplementationError) as caught:
        dispatch.decide(problem(1 << 41), CPU, BINDING, "triton")
    message = str(caught.value)
    for part in ("elements=2199023255552", "float32", CPU.name, "needs a GPU", "more than 2^40"):
        assert part in message


def test_a_misspelt_implementation_is_answered_with_the_right_one() -> None:
    with pytest.raises(UnknownNameError, match="'triton'"):
        dispatch.decide(problem(), CPU, BINDING, "tritn")
    with (
        pytest.raises(UnknownNameError, match="'pallas'"),
        kernels.use_implementation("palas"),
    ):
        pass
    with (
        pytest.raises(UnknownNameError, match="'toy_square'"),
        kernels.use_implementation("torch", "toy_sqare"),
    ):
        pass


def test_the_argument_beats_the_context_which_beats_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT, "toy_square=triton")
    assert dispatch.decide(problem(), H100, BINDING).source == dispatch.ENVIRONMENT
    with kernels.use_implementation("torch"):
        decision = dispatch.decide(problem(), H100, BINDING)
        assert (decision.implementation, decision.source) == ("torch", "use_implementation")
        chosen = dispatch.decide(problem(), H100, BINDING, "triton")
        assert (chosen.implementation, chosen.source) == ("triton", "argument")
        with kernels.use_implementation("auto", "toy_square"):
            assert dispatch.decide(problem(), H100, BINDING).source == "heuristic"
    assert dispatch.decide(problem(), H100, BINDING, "auto").source == "heuristic"


@pytest.mark.parametrize(
    ("text", "implementation"),
    [
        ("torch", "torch"),
        ("torch, toy_square=triton", "triton"),
        ("toy_square=torch", "torch"),
        ("pallas", "triton"),
    ],
)
def test_the_environment_variable(
    monkeypatch: pytest.MonkeyPatch, text: str, implementation: str
) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT, text)
    assert dispatch.decide(problem(), H100, BINDING).implementation == implementation


def test_is_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not dispatch.is_overridden(BINDING, None)
    assert not dispatch.is_overridden(BINDING, "auto")
    assert dispatch.is_overridden(BINDING, "triton")
    with kernels.use_implementation("pallas"):
        assert not dispatch.is_overridden(BINDING, None)
    with kernels.use_implementation("triton"):
        assert dispatch.is_overridden(BINDING, None)


def test_an_overlay_beats_the_user_cache_which_beats_the_nearest() -> None:
    records.save(H100, "toy_square", [a_record(8192)])
    near = dispatch.decide(problem(), H100, BINDING)
    assert near.source.startswith("nearest record")
    assert near.config == TOY.spec.Config(256, 8)
    records.save(H100, "toy_square", [a_record(implementation="torch")])
    own = dispatch.decide(problem(), H100, BINDING)
    assert (own.implementation, own.source) == ("torch", "user cache")
    assert "2.00x" in own.why
    with kernels.tuning_overlay("toy_square", a_record()):
        assert dispatch.decide(problem(), H100, BINDING).source == "overlay"
    assert dispatch.decide(problem(), H100, BINDING).source == "user cache"


def test_real_sizes_in_a_bucket_share_a_record() -> None:
    records.save(H100, "toy_square", [a_record(4096)])
    assert dispatch.decide(problem(4000), H100, BINDING).source == "user cache"
    assert dispatch.decide(problem(1 << 20), H100, BINDING).source == "heuristic"


def test_a_record_of_another_kernel_source_is_stale() -> None:
    records.save(H100, "toy_square", [a_record(kernel_hash="0123456789ab")])
    assert dispatch.decide(problem(), H100, BINDING).source == "heuristic"


def test_an_older_chip_helps_out(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    a100 = device.target("sm_80")
    folder = records.user_folder() / "shipped"
    records.write(
        records.path_of(folder, a100.key, "toy_square"), a100.key, "toy_square", [a_record()]
    )
    monkeypatch.setattr(records, "shipped_folder", lambda: folder)
    records.forget()
    assert dispatch.decide(problem(), H100, BINDING).source == f"record of {a100.name}"
    assert dispatch.decide(problem(), a100, BINDING).source == "shipped record"


def test_policy_error_and_its_misspelling() -> None:
    with kernels.tuning_policy("error"):
        with pytest.raises(TuningMissError, match="ml-networks tune toy_square"):
            dispatch.decide(problem(), H100, BINDING)
        assert dispatch.decide(problem(), CPU, BINDING).implementation == "torch"
        with kernels.tuning_overlay("toy_square", a_record()):
            assert dispatch.decide(problem(), H100, BINDING).source == "overlay"
    with pytest.raises(UnknownNameError, match="on_miss"), kernels.tuning_policy("on_mis"):  # type: ignore[arg-type]
        pass


def test_explain_takes_names_and_checks_them() -> None:
    decision = kernels.explain("toy_square", {"elements": 4096}, device=H100)
    assert decision.implementation == "triton"
    with pytest.raises(UnknownNameError, match="'elements'"):
        kernels.explain("toy_square", {"element": 4096})
    with pytest.raises(ValueError, match="elements"):
        kernels.explain("toy_square", {})
    with pytest.raises(ValueError, match="negative"):
        kernels.explain("toy_square", {"elements": -1})
    with pytest.raises(UnknownNameError, match="float32"):
        kernels.explain("toy_square", {"elements": 1}, dtype="float23")
    with pytest.raises(UnknownNameError, match="'backward'"):
        kernels.explain("toy_square", {"elements": 1}, direction="backwards")
    with pytest.raises(UnknownNameError, match="'toy_square'"):
        kernels.explain("toy_squar", {"elements": 1})


def test_usage_counts_calls_by_what_ran() -> None:
    from tests.kernels.toy_op.torch_op import toy_square

    with kernels.record_usage() as usage:
        for _ in range(3):
            toy_square(torch.ones(8))
    (row,) = usage.rows
    assert (row.op, row.direction, row.implementation, row.calls) == (
        "toy_square",
        "forward",
        "torch",
        3,
    )
    assert row.seconds > 0
    toy_square(torch.ones(8))
    assert row.calls == 3


def test_the_registry_finds_folders_and_suggests_names() -> None:
    found = registry.ops()
    assert {"focal_frequency_loss", "binary_spherical_quantize", "toy_square"} <= set(found)
    with pytest.raises(UnknownNameError, match="'focal_frequency_loss'"):
        registry.get("focal_frequency_los")
    with pytest.raises(ModuleNotFoundError):
        registry.register("tests.kernels.no_such_op")


def test_device_facts() -> None:
    assert H100.key == "nvidia-h100-80gb-hbm3"
    assert (H100.target, device.target("gfx942").target) == ("sm_90", "gfx942")
    assert H100.peak("bfloat16") == pytest.approx(989.4e12)
    assert CPU.peak("bfloat16") is None
    unknown = device._describe("cuda", "NVIDIA Imaginary", (9, 0), 66, 232448)
    assert unknown.peak("float32") == pytest.approx(H100.peak("float32") / 2, rel=1e-6)  # type: ignore[operator]
    assert "estimated" in unknown.peaks_from
