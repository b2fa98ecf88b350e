"""Train a binary spherical quantization (BSQ) autoencoder on real images, and use it.

``python -m ml_networks.tasks.images.autoencoder train`` trains on 4,500 MNIST images, reports on
the 500 held out, and says which implementation of every op ran. ``... encode CHECKPOINT`` turns an
image into integers and back. ``--framework jax`` does either in JAX, from the same config and the
same checkpoints.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ml_networks.io import load_weights, save_weights
from ml_networks.kernels import record_usage
from ml_networks.kernels.core.usage import Row
from ml_networks.tasks.images.config import AutoencoderConfig, ProgramConfig, TrainingConfig
from ml_networks.tasks.images.mnist import load_mnist
from ml_networks.tasks.images.pictures import save_code, save_reconstructions
from ml_networks.tasks.program import (
    FRAMEWORKS,
    INTERRUPTED,
    progress_bar,
    refuse,
    stop_on_interrupt,
)

PROGRAM = "ml_networks.tasks.images.autoencoder"
CHECKPOINT = "autoencoder.safetensors"
PICTURE = "reconstructions.png"
HELD_OUT = 500

Images = NDArray[np.float32]
Indices = NDArray[np.int64]

# Files and pipes have no width of their own; 80 columns would fold the table of ops.
console = Console(width=None if sys.stdout.isatty() else 110)


class Learner(Protocol):
    """The model, in either framework: ``Learner`` of ``torch_`` and of ``jax_autoencoder``."""

    model: Any
    device: Any
    synchronize: Callable[[], object] | None

    @property
    def parameters(self) -> int:
        """Number of parameters."""

    def begin(self, images: Images, cfg: TrainingConfig) -> None:
        """Make ready to train on ``images``."""

    def order(self) -> Indices:
        """The training images in a new random order."""

    def step(self, batch: Indices) -> None:
        """Take one step on the images of these numbers."""

    def take_losses(self) -> list[float]:
        """The mean terms of the epoch that ends here."""

    def reconstruct(self, images: Images) -> tuple[Images, Indices]:
        """What the images decode to, and their indices."""

    def encode(self, images: Images) -> Indices:
        """Images to indices."""

    def decode(self, indices: Indices) -> Images:
        """Indices to images."""

    def weights(self) -> Mapping[str, Any]:
        """The weights by torch's names."""

    def load(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Take weights by torch's names."""


def make_learner(
    framework: str, cfg: AutoencoderConfig, device: str | None = None, seed: int = 0
) -> Learner:
    """A new model in ``framework``, torch or jax.

    Raises
    ------
    ValueError
        For another framework.
    ModuleNotFoundError
        If it is not installed.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework is {framework!r}; it takes {' or '.join(FRAMEWORKS)}")
    try:
        module = importlib.import_module(f"{__package__}.{framework}_autoencoder")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; pip install 'ml-networks[{framework}]'", name=error.name
        ) from error
    learner: Learner = module.Learner(cfg, device, seed)
    return learner


class Split(NamedTuple):
    """Images (N, 1, 32, 32) in [0, 1] for training, those held out, and the digits of these."""

    training: Images
    held_out: Images
    held_out_labels: NDArray[np.int64]


def load_split() -> Split:
    """MNIST padded to 32 x 32. The same images are held out on every machine, for every seed."""
    images, labels = load_mnist()
    order = np.random.RandomState(0).permutation(len(images))
    scaled = images[order][:, None].astype(np.float32) / np.float32(255)
    shuffled = np.pad(scaled, ((0, 0), (0, 0), (2, 2), (2, 2)))
    return Split(shuffled[HELD_OUT:], shuffled[:HELD_OUT], labels[order][:HELD_OUT])


def peak_signal_to_noise(images: Images, target: Images) -> NDArray[np.float32]:
    """The PSNR of each image, in dB, for values in [0, 1]: ``-10 log10(mean squared error)``."""
    error = np.square(images - target).reshape(len(images), -1).mean(1)
    decibels: NDArray[np.float32] = -10 * np.log10(error.clip(1e-10))
    return decibels


class Evaluation(NamedTuple):
    """What the held-out images say. ``codes_used`` of all codes appear; their entropy is in bits;
    ``baseline`` is the PSNR of answering with the mean training image."""

    psnr: float
    baseline: float
    codes_used: int
    code_entropy: float


def evaluate(learner: Learner, split: Split) -> Evaluation:
    """Encode and decode the held-out images."""
    target = split.held_out
    images, indices = learner.reconstruct(target)
    counts = np.unique(indices, return_counts=True)[1]
    share = counts / counts.sum()
    mean_image = np.broadcast_to(split.training.mean(0), target.shape)
    return Evaluation(
        psnr=float(peak_signal_to_noise(images, target).mean()),
        baseline=float(peak_signal_to_noise(mean_image, target).mean()),
        codes_used=len(counts),
        code_entropy=float(-(share * np.log2(share)).sum()),
    )


def fit(learner: Learner, split: Split, cfg: TrainingConfig, stop: threading.Event) -> Evaluation:
    """Train the model in place, with a progress bar and a line an epoch, until done or stopped."""
    steps = math.ceil(len(split.training) / cfg.batch_size)
    learner.begin(split.training, cfg)
    with progress_bar(console) as bar:
        task = bar.add_task("training", total=steps * cfg.epochs)
        for epoch in range(1, cfg.epochs + 1):
            bar.update(task, description=f"epoch {epoch}")
            order = learner.order()
            for start in range(0, len(order), cfg.batch_size):
                learner.step(order[start : start + cfg.batch_size])
                bar.advance(task)
                if stop.is_set():
                    return evaluate(learner, split)
            evaluation = evaluate(learner, split)
            print_epoch(epoch, cfg.epochs, learner.take_losses(), evaluation)
    return evaluation


def print_epoch(epoch: int, epochs: int, terms: list[float], evaluation: Evaluation) -> None:
    """One line: the loss and its terms, and what the held-out images say."""
    pixel, frequency, entropy = terms
    console.print(
        f"epoch {epoch:>{len(str(epochs))}}/{epochs}  loss {sum(terms):7.2f} "
        f"(charbonnier {pixel:.2f}, focal frequency {frequency:.2f}, entropy {entropy:.2f})  "
        f"held-out PSNR {evaluation.psnr:.2f} dB",
        highlight=False,
        soft_wrap=True,
    )


def op_table(rows: list[Row], *, timed: bool) -> Table:
    """What ran, as `record_usage` saw it; inside ``jax.jit`` it sees each op once, untimed."""
    table = Table(title="Which implementation ran, and why", title_justify="left")
    for name in ("op", "direction", "ran", "why"):
        table.add_column(name, overflow="fold")
    for name in ("calls", "time", "each") if timed else ():
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        figures = (
            f"{row.calls:,}",
            f"{row.seconds:.2f} s",
            f"{1e3 * row.seconds / max(row.calls, 1):.2f} ms",
        )
        named = (row.op, row.direction, row.implementation, row.why)
        table.add_row(*named, *(figures if timed else ()))
    return table


def draw_reconstructions(
    learner: Learner, cfg: AutoencoderConfig, split: Split, psnr: float, path: Path
) -> None:
    """Draw the first two held-out images of each digit above what they decode to."""
    digits = split.held_out_labels
    chosen = np.stack([np.flatnonzero(digits == digit)[:2] for digit in range(10)], axis=1)
    originals = split.held_out[chosen.flatten()]
    decoded, _ = learner.reconstruct(originals)
    captions = [f"{value:.1f} dB" for value in peak_signal_to_noise(decoded, originals)]
    rows, columns = cfg.code_shape
    save_reconstructions(
        originals[:, 0],
        decoded[:, 0],
        captions,
        f"Held-out images as {rows} x {columns} codes of {cfg.codebook_dim} bits; "
        f"mean PSNR of all {len(digits)}: {psnr:.1f} dB",
        path,
    )


def save_checkpoint(
    learner: Learner, cfg: ProgramConfig, evaluation: Evaluation, path: Path
) -> None:
    """Write weights, by their names in torch, config and evaluation into one safetensors file."""
    metadata = {
        "program": PROGRAM,
        "config": dataclasses.asdict(cfg),
        "evaluation": evaluation._asdict(),
    }
    save_weights(learner.weights(), path, metadata)


def load_learner(
    path: Path, framework: str = "torch", device: str | None = "cpu"
) -> tuple[Learner, AutoencoderConfig]:
    """Rebuild the model that `save_checkpoint` wrote, in either framework.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is torn, or something else's, or there is no such framework.
    """
    weights, metadata = load_weights(path, "numpy")
    if metadata.get("program") != PROGRAM:
        raise ValueError(f"{path} is not a checkpoint of {PROGRAM}")
    cfg = ProgramConfig.from_mapping(metadata["config"]).model
    learner = make_learner(framework, cfg, device)
    try:
        learner.load(weights)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} does not fit its own config: {error}") from error
    return learner, cfg


def load_checkpoint(path: Path, framework: str = "torch") -> Any:
    """The model that `save_checkpoint` wrote, in evaluation mode: that of :func:`load_learner`."""
    model = load_learner(path, framework)[0].model
    model.eval()
    return model


app = typer.Typer(help="A BSQ autoencoder on real images.", add_completion=False)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint and picture.")] = Path(
        "runs/autoencoder"
    ),
    config: Annotated[Path | None, typer.Option(help="YAML file in place of the own one.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="In place of the config's.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the GPU.")] = None,
    framework: Annotated[str, typer.Option(help="torch or jax.")] = "torch",
) -> None:
    """Train on 4,500 images and report on the 500 held out. Ctrl-C saves what there is."""
    with stop_on_interrupt() as stop:
        try:
            cfg = ProgramConfig.read(config)
            learner = make_learner(framework, cfg.model, device, seed)
            split = load_split()
            out.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError, TypeError, ModuleNotFoundError) as error:
            refuse(error)
        if epochs is not None:
            cfg.training = dataclasses.replace(cfg.training, epochs=epochs)
        rows, columns = cfg.model.code_shape
        place = getattr(learner.device, "platform", learner.device)
        console.print(
            f"{learner.parameters:,} parameters on {place}; an image of "
            f"{math.prod(cfg.model.image_shape):,} pixels becomes {rows} x {columns} codes of "
            f"{cfg.model.codebook_dim} bits = {cfg.model.bits} bits",
            highlight=False,
        )
        start = time.perf_counter()
        with record_usage(learner.synchronize) as usage:
            evaluation = fit(learner, split, cfg.training, stop)
        seconds = time.perf_counter() - start
        if stop.is_set():
            console.print("stopped by Ctrl-C; saving what there is")
        save_checkpoint(learner, cfg, evaluation, out / CHECKPOINT)
        draw_reconstructions(learner, cfg.model, split, evaluation.psnr, out / PICTURE)
    console.print(op_table(usage.rows, timed=framework == "torch"))
    codes = 2**cfg.model.codebook_dim
    console.print(
        f"held-out PSNR  {evaluation.psnr:.2f} dB (answering with the mean image: "
        f"{evaluation.baseline:.2f} dB)\n"
        f"codebook       {evaluation.codes_used} of {codes} codes used "
        f"({evaluation.codes_used / codes:.0%}), entropy {evaluation.code_entropy:.2f} of "
        f"{cfg.model.codebook_dim} bits\n"
        f"training       {seconds:.0f} s on {place}\n"
        f"saved          {out / CHECKPOINT}, {out / PICTURE}",
        highlight=False,
        soft_wrap=True,
    )
    if stop.is_set():
        raise typer.Exit(INTERRUPTED)


@app.command()
def encode(
    checkpoint: Annotated[Path, typer.Argument(help="File that `train` saved.")],
    index: Annotated[int, typer.Option(help=f"Held-out image, 0 to {HELD_OUT - 1}.")] = 0,
    picture: Annotated[
        Path | None, typer.Option(help="PNG file. Default: beside the checkpoint.")
    ] = None,
    framework: Annotated[
        str, typer.Option(help="torch or jax, whichever trained the checkpoint.")
    ] = "torch",
) -> None:
    """Encode a held-out image into indices, decode these, and compare."""
    if not 0 <= index < HELD_OUT:
        refuse(f"--index is {index}; the held-out images are 0 to {HELD_OUT - 1}")
    try:
        learner, cfg = load_learner(checkpoint, framework)
        split = load_split()
    except (OSError, ValueError, TypeError, KeyError, ModuleNotFoundError) as error:
        refuse(error)
    image = split.held_out[index : index + 1]
    indices = learner.encode(image)
    decoded = learner.decode(indices)
    (psnr,) = peak_signal_to_noise(decoded, image)
    digits = len(str(2**cfg.codebook_dim - 1))
    for row in indices[0]:
        console.print(" ".join(f"{code:{digits}d}" for code in row), highlight=False)
    console.print(
        f"held-out image {index}, a {split.held_out_labels[index]}: {cfg.bits} bits in place of "
        f"{8 * image.size:,}, decoded at {psnr:.2f} dB",
        highlight=False,
        soft_wrap=True,
    )
    path = picture or checkpoint.with_name(f"{checkpoint.stem}-{index}.png")
    title = f"Held-out image {index} in {cfg.bits} bits: {psnr:.1f} dB"
    try:
        save_code(image[0, 0], indices[0], decoded[0, 0], title, path)
    except (OSError, ModuleNotFoundError) as error:
        refuse(error)
    console.print(f"saved {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
