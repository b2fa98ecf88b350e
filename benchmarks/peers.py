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
    else than ``case``; ``trains`` is whether its gradients are the same too; ``part`` tells apart
    several of one package.
    """

    op: str
    package: str
    build: Callable[[Case, str], Call | None]
    trains: bool
    part: str = ""

    @property
    def name(self) -> str:
        """With the version, as in reports."""
        return f"{self.package} {metadata.version(self.package)} {self.part}".rstrip()

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


def _heads(inputs: Mapping[str, Any], case: Case) -> list[Any]:
    """Query, key and value as (batch, heads, tokens, features)."""
    tensors = [inputs[name] for name in ("query", "key", "value")]
    return [tensor.mT for tensor in tensors] if case.flags.get("channels_first") else tensors


def _backend(name: str) -> Callable[[Case, str], Call | None]:
    """One backend of torch's attention; where it does not take a case, it raises."""

    def build(case: Case, device: str) -> Call | None:
        if device == "cpu" or case.flags.get("mask"):
            return None
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        options = {"scale": case.flags.get("scale"), "is_causal": bool(case.flags.get("causal"))}
        grouped = case.dims["heads"] != case.dims["key_heads"]

        def call(inputs: Mapping[str, Any]) -> dict[str, Any]:
            heads = [tensor.contiguous() for tensor in _heads(inputs, case)]
            with sdpa_kernel(getattr(SDPBackend, name)):
                output = scaled_dot_product_attention(*heads, **options, enable_gqa=grouped)
            return {"output": output}

        return call

    return build


def _all_scores(case: Case, device: str) -> Call | None:
    """With the scores in memory, as 0.2.6 computes it."""
    if case.flags.get("mask") or case.dims["heads"] != case.dims["key_heads"]:
        return None
    import torch

    width, causal = case.dims["width"], case.flags.get("causal")

    def call(inputs: Mapping[str, Any]) -> dict[str, Any]:
        query, key, value = _heads(inputs, case)
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * width**-0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0]).tril() == 0, -torch.inf)
        return {"output": torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), value)}

    return call


def _published_lora(case: Case, device: str) -> Call | None:
    """LoRA as its authors and PEFT write it: a linear layer plus two more. It has no gate, so the
    gate of each rank goes into its B."""
    if case.flags.get("per_sample") or case.flags.get("gate") != "rank":
        return None
    import loralib
    from torch.func import functional_call

    width_in, width_out, rank = (case.dims[k] for k in ("in_features", "out_features", "rank"))
    scale = float(case.flags.get("scale", 1.0))
    layer = loralib.Linear(width_in, width_out, r=rank, lora_alpha=scale * rank).to(device)

    def call(inputs: Mapping[str, Any]) -> dict[str, Any]:
        weights = {
            "weight": inputs["weight"],
            "bias": inputs["bias"],
            "lora_A": inputs["v"].mT,
            "lora_B": inputs["u"] * inputs["gate"],
        }
        return {"y": functional_call(layer, weights, (inputs["x"],))}

    return call


PEERS = (
    Peer("focal_frequency_loss", "focal-frequency-loss", _published_loss, trains=True),
    Peer("lora_linear", "loralib", _published_lora, trains=True),
    Peer("binary_spherical_quantize", "vector-quantize-pytorch", _lookup_free, trains=False),
    Peer("attention", "torch", _backend("FLASH_ATTENTION"), True, "flash"),
    Peer("attention", "torch", _backend("CUDNN_ATTENTION"), True, "cuDNN"),
    Peer("attention", "torch", _backend("EFFICIENT_ATTENTION"), True, "memory-efficient"),
    Peer("attention", "torch", _all_scores, True, "einsum"),
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
