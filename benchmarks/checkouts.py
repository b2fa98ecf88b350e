"""Modules of this checkout against those of another, in small calls on a CPU.

    python -m benchmarks.checkouts OTHER [--only PATTERN] [--seconds N]

OTHER is the folder of another checkout, as ``git worktree add`` makes one. Both copies of the
library are loaded into one process and called in turns, in a random order, on one thread; figures
are seconds of the processor. A second copy of OTHER races along: how far its ratio is from 1 says
what a ratio is worth.
"""

from __future__ import annotations

import argparse
import gc
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.peers_026 import Run, conv_config, trained

HERE = Path(__file__).resolve().parent.parent
GROUP: dict[str, Any] = {"norm": "group", "norm_cfg": {"num_groups": 4}}


def _conv(sides: int, name: str = "ConvNormActivation", **options: Any) -> Callable[..., Run]:
    def build(ml: Any, config: Any) -> Run:
        cls = getattr(ml, name if sides == 2 else f"{name}1d")
        module = cls(8, 8, conv_config(config, **options))
        return trained(module, torch.randn(4, 8, *((32,) if sides == 1 else (8, 8))))

    return build


def _unet(sides: int, norm: dict[str, Any] = GROUP, **options: Any) -> Callable[..., Run]:
    def build(ml: Any, config: Any) -> Run:
        shape = (4, 32) if sides == 1 else (3, 8, 8)
        cfg = config.UNetConfig((16, 32), conv_config(config, **norm), **options)
        module = getattr(ml, f"ConditionalUnet{sides}d")(16, shape, cfg)
        return trained(module, torch.randn(4, *shape), torch.randn(4, 16))

    return build


def _attention(sides: int) -> Callable[..., Run]:
    def build(ml: Any, config: Any) -> Run:
        module = getattr(ml, f"Attention{sides}d")(16, 4)
        return trained(module, torch.randn(4, 16, *((32,) if sides == 1 else (8, 8))))

    return build


def _residual(norm: str) -> Callable[..., Run]:
    def build(ml: Any, config: Any) -> Run:
        return trained(ml.ResidualBlock(8, 3, norm=norm), torch.randn(4, 8, 8, 8))

    return build


def _images(name: str, backbone: str) -> Callable[..., Run]:
    """An encoder, a decoder, or the backbone of one."""

    def build(ml: Any, config: Any) -> Run:
        image, maps = (3, 16, 16), (16, 4, 4)
        to_image = name in ("Decoder", "ConvTranspose", "ResNetPixShuffle")
        conv = conv_config(config, kernel_size=4, stride=2, **GROUP)
        last = conv_config(config, kernel_size=4, stride=2) if to_image else conv
        channels = (16, 8) if to_image else (8, 16)
        cfg: Any = {
            "ConvNet": config.ConvNetConfig(channels, (conv, last)),
            "ResNet": config.ResNetConfig(16, 3, 3, "ReLU", "Tanh", 2, 2, 2, **GROUP),
        }[backbone]
        module = getattr(ml, name)
        shape: tuple[int, ...] = image
        if name in ("Encoder", "Decoder"):
            built = module(16, image, cfg, config.LinearConfig("ReLU"))
            shape = image if name == "Encoder" else (16,)
        elif to_image:
            built, shape = module(maps, image, cfg), maps
        else:
            built = module(image, cfg)
        return trained(built, torch.randn(4, *shape))

    return build


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "no norm": {},
    "group norm": GROUP,
    "batch norm": {"norm": "batch"},
    "norm first, dropout": {"norm": "batch", "norm_first": True, "dropout": 0.1},
    "shuffle": {"scale_factor": 2},
    "unshuffle": {"scale_factor": -2},
}
ATTENTION: dict[str, Any] = {"has_attn": True, "nhead": 4, "use_shuffle": True}
UNETS: dict[str, dict[str, Any]] = {
    "": {},
    ", scale, attention, shuffle": {"cond_pred_scale": True, **ATTENTION},
    ", hypernetworks": {"use_hypernet": True},
    ", hypernetworks, no norm": {"use_hypernet": True, "norm": {}},
    ", hypernetworks, attention, shuffle": {"use_hypernet": True, **ATTENTION},
}
WORKLOADS: dict[str, Callable[..., Run]] = {
    **{
        f"ConvNormActivation{end}, {name}": _conv(sides, **options)
        for sides, end in ((2, ""), (1, "1d"))
        for name, options in CONVOLUTIONS.items()
    },
    "ConvTransposeNormActivation, no norm": _conv(2, "ConvTransposeNormActivation"),
    "ConvTransposeNormActivation, batch norm": _conv(
        2, "ConvTransposeNormActivation", norm="batch"
    ),
    "ConvTransposeNormActivation1d, group norm": _conv(1, "ConvTransposeNormActivation", **GROUP),
    "ResidualBlock, no norm": _residual("none"),
    "ResidualBlock, batch norm": _residual("batch"),
    "Attention1d": _attention(1),
    "Attention2d": _attention(2),
    "ConvNet": _images("ConvNet", "ConvNet"),
    "ConvTranspose": _images("ConvTranspose", "ConvNet"),
    "ResNetPixUnshuffle": _images("ResNetPixUnshuffle", "ResNet"),
    "ResNetPixShuffle": _images("ResNetPixShuffle", "ResNet"),
    "Encoder, ConvNet": _images("Encoder", "ConvNet"),
    "Encoder, ResNet": _images("Encoder", "ResNet"),
    "Decoder, ConvNet": _images("Decoder", "ConvNet"),
    "Decoder, ResNet": _images("Decoder", "ResNet"),
    **{
        f"ConditionalUnet{sides}d{name}": _unet(sides, **options)
        for sides in (1, 2)
        for name, options in UNETS.items()
    },
}
"""Four samples, 8 to 32 channels; forward and backward."""


@dataclass
class Checkout:
    """A copy of the library that is imported only inside `imported`."""

    root: Path
    modules: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def imported(self) -> Iterator[tuple[Any, Any]]:
        """`ml_networks.torch` and `ml_networks.config` of this checkout."""
        outside = _taken()
        sys.modules.update(self.modules)
        sys.path.insert(0, str(self.root))
        try:
            from ml_networks import config
            from ml_networks import torch as ml

            assert config.__file__ is not None
            if not Path(config.__file__).is_relative_to(self.root):
                raise ImportError(f"no ml_networks in {self.root}: {config.__file__} was found")
            yield ml, config
        finally:
            sys.path.remove(str(self.root))
            self.modules = _taken()
            sys.modules.update(outside)


def _taken() -> dict[str, Any]:
    names = [name for name in sys.modules if name.partition(".")[0] == "ml_networks"]
    return {name: sys.modules.pop(name) for name in names}


@dataclass(frozen=True)
class Race:
    """Seconds of each round: here, in the other checkout, in a second copy of that."""

    workload: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    again: tuple[float, ...]

    def __str__(self) -> str:
        def ratios(values: tuple[float, ...]) -> str:
            rounds = sorted(v / t for v, t in zip(values, self.theirs, strict=True))
            fifth = len(rounds) // 5
            return f"{median(rounds):.3f} ({rounds[fifth]:.3f} - {rounds[-1 - fifth]:.3f})"

        times = " | ".join(f"{1e6 * median(v):.0f} us" for v in (self.theirs, self.ours))
        return f"| {self.workload} | {times} | {ratios(self.ours)} | {ratios(self.again)} |"


def race(
    workload: str, copies: tuple[Checkout, Checkout, Checkout], seconds: float, rounds: int = 15
) -> Race:
    """Time a workload in turns: here, there, and there once more. A round's figure is the 20th
    percentile of its calls, which other work on the machine disturbs less than their median."""
    runs = []
    for copy in copies:
        with copy.imported() as (ml, config):
            torch.manual_seed(0)
            runs.append(WORKLOADS[workload](ml, config))
            for _ in range(10):
                runs[-1]()
    figures: list[list[float]] = [[], [], []]
    order = list(enumerate(runs))
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            times: list[list[float]] = [[], [], []]
            end = time.process_time() + seconds / rounds
            while time.process_time() < end or len(times[0]) < 5:
                random.shuffle(order)
                for index, run in order:
                    start = time.process_time_ns()
                    run()
                    times[index].append(1e-9 * (time.process_time_ns() - start))
            for values, calls in zip(figures, times, strict=True):
                values.append(sorted(calls)[len(calls) // 5])
            gc.collect()
    finally:
        gc.enable()
    return Race(workload, *map(tuple, figures))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path)
    parser.add_argument("--only", default="", help="a regular expression")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="of the processor, for each workload"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    other = given.other.resolve()
    copies = Checkout(HERE), Checkout(other), Checkout(other)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread")
    print("| | other | this | this / other | other / other |\n|---|---|---|---|---|")
    for workload in WORKLOADS:
        if re.search(given.only, workload):
            print(race(workload, copies, given.seconds), flush=True)


if __name__ == "__main__":
    main()
