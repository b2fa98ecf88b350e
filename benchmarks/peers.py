"""What a user would pick instead of an op: published packages, where they do the same work."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ml_networks.kernels.core.problem import Case

Call = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Peer:
    """A package on PyPI that has the op for torch.

    ``build(case, device)`` gives a function of the op's inputs, or None where it does something
    else than ``case``; ``trains`` is whether its gradients are the same too.
    """

    op: str
    package: str
    build: Callable[[Case, str], Call | None]
    trains: bool

    @property
    def name(self) -> str:
        """With the version, as in reports."""
        return f"{self.package} {metadata.version(self.package)}"

    @property
    def installed(self) -> bool:
        """Whether the package is there."""
        try:
            metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return False
        return True


_LOSS_OPTIONS = {"alpha", "patch_factor", "ave_spectrum", "log_matrix", "batch_matrix"}


def _published_loss(case: Case, device: str) -> Call | None:
    if not set(case.flags) <= _LOSS_OPTIONS:
        return None
    from focal_frequency_loss import FocalFrequencyLoss

    loss = FocalFrequencyLoss(**case.flags)
    # It takes the mean over a patch where the op takes the sum.
    sides = case.dims["channels"] * case.dims["height"] * case.dims["width"]
    pixels = sides // case.flags.get("patch_factor", 1) ** 2
    return lambda inputs: {"loss": pixels * loss(inputs["prediction"], inputs["target"])}


def _lookup_free(case: Case, device: str) -> Call | None:
    """LFQ with ``spherical=True`` is BSQ. In training it also makes tokens x 2^D probabilities,
    so only codes and indices are compared."""
    width, groups = case.dims["width"], case.flags.get("groups", 1)
    if case.flags.get("entropy_bits") or groups != 1 or width > 20:
        return None
    from vector_quantize_pytorch import LFQ

    quantizer = LFQ(dim=width, codebook_size=2**width, spherical=True).to(device).eval()

    def call(inputs: Mapping[str, Any]) -> dict[str, Any]:
        result = quantizer(inputs["features"][None])
        return {"quantized": result.quantized[0], "indices": result.indices[0]}

    return call


PEERS = (
    Peer("focal_frequency_loss", "focal-frequency-loss", _published_loss, trains=True),
    Peer("binary_spherical_quantize", "vector-quantize-pytorch", _lookup_free, trains=False),
)


ENVIRONMENT = "ML_NETWORKS_PEERS_PYTHON"


def peers_python() -> Path | None:
    """The Python that has ml-networks 0.2.6: ``ML_NETWORKS_PEERS_PYTHON``, or that of
    ``.venv-peers``, which ``make peers`` makes."""
    own = os.environ.get(ENVIRONMENT)
    found = Path(own or Path(__file__).parent.parent / ".venv-peers" / "bin" / "python")
    return found if found.is_file() else None


_ONE_SIDE = """
import json, sys, time
import torch
shape, passes, new = json.loads(sys.argv[1])
if new:
    from ml_networks.kernels.torch import focal_frequency_loss as loss
else:
    from ml_networks.torch import FocalFrequencyLoss
    loss = FocalFrequencyLoss()
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
prediction = torch.randn(shape, generator=generator).requires_grad_()
target = torch.randn(shape, generator=generator)
print(loss(prediction, target).item(), flush=True)
for _ in sys.stdin:
    start = time.process_time()
    for _ in range(passes):
        prediction.grad = None
        loss(prediction, target).backward()
    print((time.process_time() - start) / passes * 1e6, flush=True)
"""


@contextmanager
def focal_frequency_loss(
    python: str | Path, new: bool, shape: tuple[int, ...], passes: int
) -> Iterator[tuple[float, Callable[[], float]]]:
    """The loss of this library or of 0.2.6 on the same standard normal images, and a function that
    runs it ``passes`` times forward and backward, in one thread of a process of its own, and
    returns the microseconds of processor time that one took.
    """
    root = str(Path(__file__).parent.parent)
    dropped = ("PYTHONPATH", "PYTHONHOME", "LD_PRELOAD")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    # Memory that goes back to the system between passes costs either side as much as it computes.
    kept = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
    child = subprocess.Popen(
        [python, "-W", "ignore", "-c", _ONE_SIDE, json.dumps([shape, passes, new])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tempfile.gettempdir(),
        env={**environment, **kept, **({"PYTHONPATH": root} if new else {})},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    source, sink = child.stdout, child.stdin

    def run() -> float:
        sink.write("\n")
        sink.flush()
        return float(source.readline())

    try:
        yield float(source.readline()), run
    finally:
        sink.close()
        child.wait(timeout=60)
        source.close()
