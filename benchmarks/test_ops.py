"""Every op of the registry against what one would use instead."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import peers, report
from ml_networks.kernels.core import measure, registry
from ml_networks.kernels.core.registry import Framework


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("op", sorted(registry.ops()))
def test_op(op: str, framework: Framework, out: Path, figures: list[report.Row]) -> None:
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    if not registry.get(op).has(framework):
        pytest.skip(f"{op} is not written for {framework}")
    rows = report.run([op], out, frameworks=[framework])
    figures += rows
    assert rows, "nothing was measured"


@pytest.mark.skipif(
    peers.peers_python() is None,
    reason=f"no environment with ml-networks 0.2.6: run `make peers` or set {peers.ENVIRONMENT}",
)
def test_focal_frequency_loss_is_4x_faster_than_0_2_6_on_a_cpu() -> None:
    """In processor time of one thread, to which other programs on the machine add little."""
    pytest.importorskip("torch", reason="torch is not installed")
    old = peers.peers_python()
    assert old is not None
    shape, passes = (32, 3, 64, 64), 30
    with (
        peers.focal_frequency_loss(sys.executable, True, shape, passes) as (ours, run_ours),
        peers.focal_frequency_loss(old, False, shape, passes) as (theirs, run_theirs),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
        functions = {"ours": run_ours, "0.2.6": run_theirs}
        times = measure.compare(functions, lambda run: run(), seconds=4)
    ratio = times["0.2.6"].p50 / times["ours"].p50
    print(f"forward+backward {shape}: {times}, {ratio:.1f}x")
    assert ratio >= 4
