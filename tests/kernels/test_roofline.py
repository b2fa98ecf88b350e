"""The roofline against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ml_networks.kernels.core import device, registry, roofline
from ml_networks.kernels.core.problem import Problem

TOY = registry.get("toy_square").spec
H100 = device.target("sm_90")
PROBLEM = Problem("toy_square", (("elements", 1 << 20),), "float32", (("scale", 1.0),))


def test_a_copy_is_bound_by_memory() -> None:
    floor = roofline.floor(TOY, PROBLEM, H100)
    assert floor.bytes_moved == 8 << 20
    assert floor.bound == "memory"
    assert floor.microseconds == pytest.approx((8 << 20) / 3.352e12 * 1e6)
    assert floor.fraction(2 * floor.microseconds) == pytest.approx(0.5)


def test_much_arithmetic_is_bound_by_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOY, "flops", lambda problem: 10**12)
    floor = roofline.floor(TOY, replace(PROBLEM, dtype="bfloat16"), H100)
    assert floor.bound == "compute"
    assert floor.microseconds == pytest.approx(1e12 / 989.4e12 * 1e6)


@pytest.mark.parametrize(
    ("target", "dtype", "peak"),
    [
        ("sm_90", "float32", 494.7e12 / 3),  # three TF32 products beat the vector units
        ("sm_90", "float16", 989.4e12),
        ("sm_90", "float64", None),
        ("gfx942", "float32", 653.7e12 / 3),
        ("tpu", "bfloat16", 197e12),
        ("tpu", "float32", None),
    ],
)
def test_peaks(target: str, dtype: str, peak: float | None) -> None:
    assert roofline.peak_flops(device.target(target), dtype) == peak


def test_vector_units_are_the_peak_where_there_is_no_tf32() -> None:
    plain = replace(H100, peak_flops=(("float32", 1e13),))
    assert roofline.peak_flops(plain, "float32") == 1e13


def test_a_rate_that_is_unknown_does_not_limit() -> None:
    floor = roofline.floor(TOY, PROBLEM, replace(H100, bandwidth=None))
    assert floor.bound == "compute"
    floor = roofline.floor(TOY, replace(PROBLEM, dtype="float64"), H100)
    assert floor.bound == "memory"


def test_a_cpu_has_no_roofline() -> None:
    floor = roofline.floor(TOY, PROBLEM, device.cpu())
    assert (floor.microseconds, floor.bound) == (None, "unknown")
    assert floor.fraction(1.0) is None


def test_every_op_has_a_floor_for_every_case() -> None:
    for op in registry.ops().values():
        for case in op.spec.CASES:
            for direction in op.spec.DIRECTIONS:
                floor = roofline.floor(op.spec, case.problem(op.name, direction=direction), H100)
                assert floor.microseconds is not None
                assert floor.microseconds > 0
                assert floor.bytes_moved > 0
