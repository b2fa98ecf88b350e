"""Every op x case x implementation x direction x dtype x layout against float64.

A process either interprets Triton kernels or compiles them, so the Triton half of this file runs
where ``TRITON_INTERPRET=1`` is set or a GPU is found.
"""

from __future__ import annotations

import importlib.util

import pytest

from ml_networks.kernels.core import dispatch, registry, testing
from ml_networks.kernels.core.errors import UnsupportedImplementationError

BOTH: tuple[registry.Framework, ...] = ("torch", "jax")
FRAMEWORKS = [name for name in BOTH if importlib.util.find_spec(name) is not None]
CHECKS = [check for framework in FRAMEWORKS for check in testing.checks(framework)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
def test_conforms(check: testing.Check) -> None:
    outcomes = testing.run(check)
    assert outcomes, "the reference names no output"
    assert all(outcome.ok for outcome in outcomes), "; ".join(map(str, outcomes))


def test_every_op_has_a_small_and_a_ragged_case() -> None:
    for op in registry.ops().values():
        sizes = {case.size for case in op.spec.CASES}
        assert {"small", "ragged", "large"} <= sizes, op.name


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_cannot_run_is_refused_with_reasons(framework: registry.Framework) -> None:
    device = testing.device_of(framework)
    for op in registry.ops().values():
        binding = op.binding(framework)
        for case in op.spec.CASES:
            problem = case.problem(op.name)
            for implementation in binding.implementations[1:]:
                reasons = op.spec.not_supported_reasons(problem, implementation, device)
                if reasons:
                    with pytest.raises(UnsupportedImplementationError) as caught:
                        dispatch.decide(problem, device, binding, implementation)
                    assert all(reason in str(caught.value) for reason in reasons)
