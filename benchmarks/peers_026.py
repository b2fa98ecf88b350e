"""Programs that run in this library and in 0.2.6 alike, timed in processes of their own.

As a module: ``race(name)`` times one workload in both, turn by turn. As a script, under the Python
of either: reads the name of a workload from each line of its input, runs it once, and answers
with one line of JSON, ``{"seconds": ..., "version": ..., "torch": ..., "threads": ...}``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Run = Callable[[], None]
WARM_UP = 2


def _trained(module: Any, *inputs: Any, loss: Callable[..., Any] | None = None) -> Run:
    """One forward and backward pass, gradients of the inputs included."""
    inputs = tuple(x.requires_grad_() for x in inputs)

    def run() -> None:
        module.zero_grad()
        (loss or (lambda *x: module(*x).square().mean()))(*inputs).backward()

    return run


def _conv(config: Any, **keywords: Any) -> Any:
    fields = {"activation": "ReLU", "kernel_size": 3, "stride": 1, "padding": 1}
    return config.ConvConfig(**fields | keywords)


def _attention(ml: Any, config: Any, torch: Any) -> Run:
    return _trained(ml.Attention2d(64, 8), torch.randn(4, 64, 32, 32))


def _time_series(ml: Any, config: Any, torch: Any) -> Run:
    network = config.MLPConfig(16, 1, "Identity", config.LinearConfig("ReLU"))
    module = ml.ContrastiveLearningLoss(16, 16, config.ContrastiveLearningConfig(16, network))

    def loss(*features: Any) -> Any:
        return module.calc_timeseries_nce(*features, 3, 3)["nce"].mean()

    return _trained(module, torch.randn(16, 64, 16), torch.randn(16, 64, 16), loss=loss)


def _backbones(config: Any, down: bool) -> dict[str, Any]:
    norm = {"norm": "group", "norm_cfg": {"num_groups": 4}}
    channels = (16, 32, 64) if down else (64, 32, 16)
    conv = _conv(config, kernel_size=4, stride=2, **norm)
    last = conv if down else _conv(config, kernel_size=4, stride=2, activation="Tanh")
    return {
        "ConvNet": config.ConvNetConfig(channels, (conv, conv, last)),
        "ResNet": config.ResNetConfig(32, 3, 3, "ReLU", "Tanh", 2, 2, 2, **norm),
    }


def _encoder(backbone: str) -> Callable[..., Run]:
    def build(ml: Any, config: Any, torch: Any) -> Run:
        cfg = _backbones(config, down=True)[backbone]
        module = ml.Encoder(64, (3, 64, 64), cfg, config.LinearConfig("ReLU"))
        return _trained(module, torch.randn(8, 3, 64, 64))

    return build


def _decoder(backbone: str) -> Callable[..., Run]:
    def build(ml: Any, config: Any, torch: Any) -> Run:
        cfg = _backbones(config, down=False)[backbone]
        module = ml.Decoder(64, (3, 64, 64), cfg, config.LinearConfig("ReLU"))
        return _trained(module, torch.randn(8, 64))

    return build


def _unet(*shape: int) -> Callable[..., Run]:
    def build(ml: Any, config: Any, torch: Any) -> Run:
        conv = _conv(config, norm="group", norm_cfg={"num_groups": 4})
        cfg = config.UNetConfig((16, 32, 64), conv, cond_pred_scale=True)
        cls = ml.ConditionalUnet1d if len(shape) == 2 else ml.ConditionalUnet2d
        return _trained(cls(16, shape, cfg), torch.randn(8, *shape), torch.randn(8, 16))

    return build


WORKLOADS: dict[str, Callable[..., Run]] = {
    "Attention2d (4, 64, 32, 32), 8 heads": _attention,
    "calc_timeseries_nce, batch 16, length 64, range 3": _time_series,
    "Encoder, ConvNet": _encoder("ConvNet"),
    "Encoder, ResNet": _encoder("ResNet"),
    "Decoder, ConvNet": _decoder("ConvNet"),
    "Decoder, ResNet": _decoder("ResNet"),
    "ConditionalUnet1d (4, 256)": _unet(4, 256),
    "ConditionalUnet2d (3, 32, 32)": _unet(3, 32, 32),
}


@dataclass(frozen=True)
class Race:
    """Seconds of each round in both, and what ran."""

    workload: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    versions: dict[str, Any]

    @property
    def speedup(self) -> float:
        """Their median time over ours."""
        return median(self.theirs) / median(self.ours)

    @property
    def fastest(self) -> float:
        """Their fastest round over ours: on a busy machine, what is left of its work aside."""
        return min(self.theirs) / min(self.ours)

    @property
    def spread(self) -> tuple[float, float]:
        """20th and 80th percentile of the rounds' own ratios."""
        ratios = sorted(t / o for o, t in zip(self.ours, self.theirs, strict=True))
        return ratios[len(ratios) // 5], ratios[len(ratios) - 1 - len(ratios) // 5]


@contextmanager
def _child(python: str, environment: dict[str, str]) -> Iterator[Callable[[str], dict[str, Any]]]:
    child = subprocess.Popen(
        [python, "-W", "ignore", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    source, sink = child.stdout, child.stdin
    assert source is not None
    assert sink is not None

    def ask(name: str) -> dict[str, Any]:
        sink.write(f"{name}\n")
        sink.flush()
        answer: dict[str, Any] = json.loads(source.readline())
        return answer

    try:
        yield ask
    finally:
        sink.close()
        child.wait(timeout=60)
        source.close()


def race(
    workload: str,
    peers_python: Path,
    seconds: float = 6.0,
    rounds: int = 7,
    threads: int | None = None,
) -> Race:
    """Time a workload here and in 0.2.6, in turns that change their order.

    Parameters
    ----------
    workload
        One of ``WORKLOADS``.
    peers_python
        A Python that has 0.2.6.
    seconds
        Rounds go on for so long, warm-up excluded,
    rounds
        but at least so many are run.
    threads
        Of each side. Default: torch's own choice. With one, what the other cores do matters less.
    """
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    if threads is not None:
        clean["OMP_NUM_THREADS"] = str(threads)
    here = clean | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    with _child(sys.executable, here) as ours, _child(str(peers_python), clean) as theirs:
        sides = [("ours", ours), ("theirs", theirs)]
        answers = {side: ask(workload) for side, ask in sides}
        end = time.perf_counter() + seconds
        while len(times["ours"]) < rounds or time.perf_counter() < end:
            for side, ask in sides:
                times[side].append(ask(workload)["seconds"])
            sides.reverse()
    for answer in answers.values():
        del answer["seconds"]
    assert answers["theirs"]["version"] == "0.2.6", f"{peers_python} has {answers['theirs']}"
    return Race(workload, tuple(times["ours"]), tuple(times["theirs"]), answers)


def _answer() -> None:
    import torch

    import ml_networks.config as config
    import ml_networks.torch as ml

    # 0.2.6 is the one that is installed as a distribution of that version; this repository has
    # its own on the path.
    own = Path(__file__).parent.parent / "ml_networks"
    from importlib.metadata import version

    is_own = Path(config.__file__).parent.samefile(own) if own.exists() else False
    facts = {
        "version": "this" if is_own else version("ml-networks"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    # glibc keeps freed memory for later once a large block has been freed, which importing the
    # dependencies of 0.2.6 happens to do. Without it every pass waits for fresh pages.
    torch.ones(31 << 20, dtype=torch.uint8)
    ready: dict[str, Run] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in ready:
            torch.manual_seed(0)
            ready[name] = WORKLOADS[name](ml, config, torch)
            for _ in range(WARM_UP):
                ready[name]()
        start = time.perf_counter()
        ready[name]()
        print(json.dumps({"seconds": time.perf_counter() - start} | facts), flush=True)


if __name__ == "__main__":
    _answer()
