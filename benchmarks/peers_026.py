"""Programs that run in this library and in 0.2.6 alike, timed in processes of their own.

As a module: ``race(name)`` times one workload in both, turn by turn. As a script, under the Python
of either: reads the name of a workload from each line of its input, runs it once, and answers
with one line of JSON, ``{"seconds": ..., "version": ..., "torch": ..., "threads": ...}``.

The JAX workloads (``JAX_WORKLOADS``) are compiled, run on one thread and are timed in seconds of
the processor, compilation left out.
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


def trained(module: Any, *inputs: Any, loss: Callable[..., Any] | None = None) -> Run:
    """One forward and backward pass, gradients of the inputs included."""
    inputs = tuple(x.requires_grad_() for x in inputs)

    def run() -> None:
        module.zero_grad()
        (loss or (lambda *x: module(*x).square().mean()))(*inputs).backward()

    return run


def conv_config(config: Any, **keywords: Any) -> Any:
    fields = {"activation": "ReLU", "kernel_size": 3, "stride": 1, "padding": 1}
    return config.ConvConfig(**fields | keywords)


def _attention(ml: Any, config: Any, torch: Any) -> Run:
    return trained(ml.Attention2d(64, 8), torch.randn(4, 64, 32, 32))


def _time_series(ml: Any, config: Any, torch: Any) -> Run:
    network = config.MLPConfig(16, 1, "Identity", config.LinearConfig("ReLU"))
    module = ml.ContrastiveLearningLoss(16, 16, config.ContrastiveLearningConfig(16, network))

    def loss(*features: Any) -> Any:
        return module.calc_timeseries_nce(*features, 3, 3)["nce"].mean()

    return trained(module, torch.randn(16, 64, 16), torch.randn(16, 64, 16), loss=loss)


def _backbones(config: Any, down: bool) -> dict[str, Any]:
    norm = {"norm": "group", "norm_cfg": {"num_groups": 4}}
    channels = (16, 32, 64) if down else (64, 32, 16)
    conv = conv_config(config, kernel_size=4, stride=2, **norm)
    last = conv if down else conv_config(config, kernel_size=4, stride=2, activation="Tanh")
    return {
        "ConvNet": config.ConvNetConfig(channels, (conv, conv, last)),
        "ResNet": config.ResNetConfig(32, 3, 3, "ReLU", "Tanh", 2, 2, 2, **norm),
    }


def _encoder(backbone: str) -> Callable[..., Run]:
    def build(ml: Any, config: Any, torch: Any) -> Run:
        cfg = _backbones(config, down=True)[backbone]
        module = ml.Encoder(64, (3, 64, 64), cfg, config.LinearConfig("ReLU"))
        return trained(module, torch.randn(8, 3, 64, 64))

    return build


def _decoder(backbone: str) -> Callable[..., Run]:
    def build(ml: Any, config: Any, torch: Any) -> Run:
        cfg = _backbones(config, down=False)[backbone]
        module = ml.Decoder(64, (3, 64, 64), cfg, config.LinearConfig("ReLU"))
        return trained(module, torch.randn(8, 64))

    return build


def _unet(*shape: int) -> Callable[..., Run]:
    def build(ml: Any, config: Any, torch: Any) -> Run:
        conv = conv_config(config, norm="group", norm_cfg={"num_groups": 4})
        cfg = config.UNetConfig((16, 32, 64), conv, cond_pred_scale=True)
        cls = ml.ConditionalUnet1d if len(shape) == 2 else ml.ConditionalUnet2d
        return trained(cls(16, shape, cfg), torch.randn(8, *shape), torch.randn(8, 16))

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


def _compiled(module: Any, *inputs: Any, loss: Callable[..., Any] | None = None) -> Run:
    """One forward and backward pass in JAX, gradients of parameters and inputs."""
    import jax
    from flax import nnx

    graph, parameters, rest = nnx.split(module, nnx.Param, ...)

    def total(parameters: Any, rest: Any, inputs: Any) -> Any:
        model = nnx.merge(graph, parameters, rest)
        return (loss or (lambda model, *x: (model(*x) ** 2).mean()))(model, *inputs)

    step = jax.jit(jax.value_and_grad(total, argnums=(0, 2)))
    return lambda: jax.block_until_ready(step(parameters, rest, inputs)) and None


def _normal(*shape: int) -> Any:
    import jax

    return jax.random.normal(jax.random.key(0), shape)


def _image(own: bool, *shape: int) -> Any:
    """A shape (..., C, *sides), as 0.2.6 has it where that is not this library's."""
    sides = 2 if len(shape) > 2 else 1
    first, channels, last = shape[: -sides - 1], shape[-sides - 1], shape[-sides:]
    return shape if own else (*first, *last, channels)


def _jax_mlp(ml: Any, config: Any, own: bool, rngs: Any) -> Run:
    cfg = config.MLPConfig(256, 3, "Tanh", config.LinearConfig("ReLU", norm="layer"))
    return _compiled(ml.MLPLayer(64, 32, cfg, rngs=rngs), _normal(256, 64))


def _jax_encoder(backbone: str) -> Callable[..., Run]:
    def build(ml: Any, config: Any, own: bool, rngs: Any) -> Run:
        cfg = _backbones(config, down=True)[backbone]
        shape = _image(own, 3, 64, 64)
        module = ml.Encoder(64, shape, cfg, config.LinearConfig("ReLU"), rngs=rngs)
        return _compiled(module, _normal(8, *shape))

    return build


def _jax_decoder(ml: Any, config: Any, own: bool, rngs: Any) -> Run:
    cfg = _backbones(config, down=False)["ResNet"]
    shape = _image(own, 3, 64, 64)
    module = ml.Decoder(64, shape, cfg, config.LinearConfig("ReLU"), rngs=rngs)
    return _compiled(module, _normal(8, 64))


def _jax_unet(*shape: int) -> Callable[..., Run]:
    def build(ml: Any, config: Any, own: bool, rngs: Any) -> Run:
        conv = conv_config(config, norm="group", norm_cfg={"num_groups": 4})
        cfg = config.UNetConfig((16, 32, 64), conv, cond_pred_scale=True, use_shuffle=True)
        cls = ml.ConditionalUnet1d if len(shape) == 2 else ml.ConditionalUnet2d
        ordered = shape if own else (*shape[1:], shape[0])
        return _compiled(cls(16, ordered, cfg, rngs=rngs), _normal(8, *ordered), _normal(8, 16))

    return build


def _jax_attention(ml: Any, config: Any, own: bool, rngs: Any) -> Run:
    module = ml.Attention2d(64, 1, rngs=rngs)
    return _compiled(module, _normal(*((4, 64, 16, 16) if own else (4, 16, 16, 64))))


def _jax_contrastive(ml: Any, config: Any, own: bool, rngs: Any) -> Run:
    network = config.MLPConfig(64, 1, "Identity", config.LinearConfig("ReLU"))
    cfg = config.ContrastiveLearningConfig(32, network)
    module = ml.ContrastiveLearningLoss(64, 64, cfg, rngs=rngs)

    def loss(model: Any, *features: Any) -> Any:
        return model.calc_nce(*features)["nce"].mean()

    return _compiled(module, _normal(256, 64), _normal(256, 64), loss=loss)


def _jax_losses(ml: Any, config: Any, own: bool, rngs: Any) -> Run:
    shape = _image(own, 16, 3, 64, 64)
    frequency = ml.FocalFrequencyLoss()

    def loss(model: Any, prediction: Any, target: Any) -> Any:
        return ml.charbonnier(prediction, target).mean() + frequency(prediction, target)

    identity = ml.MLPLayer(
        1, 1, config.MLPConfig(1, 1, "Tanh", config.LinearConfig("ReLU")), rngs=rngs
    )
    return _compiled(identity, _normal(*shape), _normal(*shape) + 1, loss=loss)


def _jax_focal(ml: Any, config: Any, own: bool, rngs: Any) -> Run:
    import jax.numpy as jnp

    def loss(model: Any, logits: Any) -> Any:
        return ml.focal_loss(logits, jnp.arange(4096) % 100)

    identity = ml.MLPLayer(
        1, 1, config.MLPConfig(1, 1, "Tanh", config.LinearConfig("ReLU")), rngs=rngs
    )
    return _compiled(identity, _normal(4096, 100), loss=loss)


# What 0.2.6 runs in JAX: no transposed convolutions, attention with several heads or ViT.
JAX_WORKLOADS: dict[str, Callable[..., Run]] = {
    "JAX MLPLayer (256, 64), 3 x 256": _jax_mlp,
    "JAX Encoder, ConvNet": _jax_encoder("ConvNet"),
    "JAX Encoder, ResNet": _jax_encoder("ResNet"),
    "JAX Decoder, ResNet": _jax_decoder,
    "JAX ConditionalUnet1d (4, 256), shuffle": _jax_unet(4, 256),
    "JAX ConditionalUnet2d (3, 32, 32), shuffle": _jax_unet(3, 32, 32),
    "JAX Attention2d (4, 64, 16, 16), 1 head": _jax_attention,
    "JAX calc_nce, batch 256": _jax_contrastive,
    "JAX charbonnier + focal frequency, 16 x 3 x 64 x 64": _jax_losses,
    "JAX focal_loss (4096, 100)": _jax_focal,
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
        One of ``WORKLOADS`` or ``JAX_WORKLOADS``.
    peers_python
        A Python that has 0.2.6.
    seconds
        Rounds go on for so long, warm-up excluded,
    rounds
        but at least so many are run.
    threads
        Of each side. Default: torch's own choice. With one, what the other cores do matters less.
        JAX always has one.
    """
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    if threads is not None:
        clean["OMP_NUM_THREADS"] = str(threads)
    if workload in JAX_WORKLOADS:
        clean |= {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu"}
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


def _is_own(config: Any) -> bool:
    """Whether this repository's library is the one imported, not 0.2.6."""
    own = Path(__file__).parent.parent / "ml_networks"
    return Path(config.__file__).parent.samefile(own) if own.exists() else False


def _facts(config: Any, **more: Any) -> dict[str, Any]:
    from importlib.metadata import version

    return {"version": "this" if _is_own(config) else version("ml-networks")} | more


def _torch_side() -> tuple[dict[str, Any], Callable[[str], Run]]:
    import torch

    import ml_networks.config as config
    import ml_networks.torch as ml

    # glibc keeps freed memory for later once a large block has been freed, which importing the
    # dependencies of 0.2.6 happens to do. Without it every pass waits for fresh pages.
    torch.ones(31 << 20, dtype=torch.uint8)

    def build(name: str) -> Run:
        torch.manual_seed(0)
        return WORKLOADS[name](ml, config, torch)

    return _facts(config, torch=torch.__version__, threads=torch.get_num_threads()), build


def _jax_side() -> tuple[dict[str, Any], Callable[[str], Run]]:
    import jax
    from flax import nnx

    import ml_networks.config as config
    import ml_networks.jax as ml

    def build(name: str) -> Run:
        return JAX_WORKLOADS[name](ml, config, _is_own(config), nnx.Rngs(0))

    return _facts(config, jax=jax.__version__, threads=1), build


def _answer() -> None:
    ready: dict[str, Run] = {}
    sides: dict[bool, tuple[dict[str, Any], Callable[[str], Run]]] = {}
    for line in sys.stdin:
        name = line.strip()
        in_jax = name in JAX_WORKLOADS
        if in_jax not in sides:
            sides[in_jax] = _jax_side() if in_jax else _torch_side()
        facts, build = sides[in_jax]
        if name not in ready:
            ready[name] = build(name)
            for _ in range(WARM_UP):
                ready[name]()
        clock = time.process_time if in_jax else time.perf_counter
        start = clock()
        ready[name]()
        print(json.dumps({"seconds": clock() - start} | facts), flush=True)


if __name__ == "__main__":
    _answer()
