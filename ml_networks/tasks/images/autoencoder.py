"""Train a binary spherical quantization (BSQ) autoencoder on real images, and use it.

``python -m ml_networks.tasks.images.autoencoder train`` trains on 4,500 MNIST images, reports on
the 500 held out, and says which implementation of every op ran. ``... encode CHECKPOINT`` turns an
image into integers and back.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from ml_networks.io import load_weights, save_weights
from ml_networks.kernels import record_usage
from ml_networks.kernels.core.usage import Row
from ml_networks.kernels.torch import focal_frequency_loss
from ml_networks.tasks.images.config import AutoencoderConfig, ProgramConfig, TrainingConfig
from ml_networks.tasks.images.mnist import load_mnist
from ml_networks.tasks.images.pictures import save_code, save_reconstructions
from ml_networks.tasks.program import (
    INTERRUPTED,
    pick_device,
    progress_bar,
    refuse,
    stop_on_interrupt,
)
from ml_networks.torch import BSQCodebook, Decoder, Encoder, charbonnier

PROGRAM = "ml_networks.tasks.images.autoencoder"
CHECKPOINT = "autoencoder.safetensors"
PICTURE = "reconstructions.png"
HELD_OUT = 500

# Files and pipes have no width of their own; 80 columns would fold the table of ops.
console = Console(width=None if sys.stdout.isatty() else 110)


class Reconstruction(NamedTuple):
    """Images (B, C, H, W) and the codes they were decoded from; entropies in nats."""

    images: Tensor
    indices: Tensor
    sample_entropy: Tensor
    codebook_entropy: Tensor


class BSQAutoencoder(nn.Module):
    """Encoder, BSQ codebook, decoder.

    An image (C, H, W) becomes a grid of ``cfg.code_shape`` integers below
    ``2 ** cfg.codebook_dim``.
    """

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        self.cfg = cfg
        features = (cfg.encoder.conv_channel, *cfg.code_shape)
        self.encoder = Encoder(features, cfg.image_shape, cfg.encoder)
        self.codebook = BSQCodebook(features[0], cfg.codebook_dim, temperature=cfg.temperature)
        self.decoder = Decoder(features, cfg.image_shape, cfg.decoder)

    def _features(self, images: Tensor) -> Tensor:
        return self.encoder(images).movedim(-3, -1)

    def forward(self, images: Tensor) -> Reconstruction:
        """Encode and decode (B, C, H, W) images, with the entropies that training needs."""
        codes = self.codebook.quantize(self._features(images), entropy_bits=self.cfg.codebook_dim)
        # Both are there because they were asked for.
        assert codes.sample_entropy is not None
        assert codes.codebook_entropy is not None
        decoded = self.decoder(codes.quantized.movedim(-1, -3))
        return Reconstruction(decoded, codes.indices, codes.sample_entropy, codes.codebook_entropy)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to indices (B, rows, columns)."""
        return self.codebook.encode(self._features(images))

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, rows, columns) to images (B, C, H, W)."""
        return self.decoder(self.codebook.decode(indices).movedim(-1, -3))


class Split(NamedTuple):
    """Images (N, 1, 32, 32) in [0, 1] for training, those held out, and the digits of these."""

    training: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def load_split() -> Split:
    """MNIST padded to 32 x 32. The same images are held out on every machine, for every seed."""
    images, labels = load_mnist()
    order = np.random.RandomState(0).permutation(len(images))
    shuffled = F.pad(torch.from_numpy(images[order])[:, None] / 255.0, (2, 2, 2, 2))
    digits = torch.from_numpy(labels[order])
    return Split(shuffled[HELD_OUT:], shuffled[:HELD_OUT], digits[:HELD_OUT])


def peak_signal_to_noise(images: Tensor, target: Tensor) -> Tensor:
    """The PSNR of each image, in dB, for values in [0, 1]: ``-10 log10(mean squared error)``."""
    error = (images - target).square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-10).log10()


class Evaluation(NamedTuple):
    """What the held-out images say. ``codes_used`` of all codes appear; their entropy is in bits;
    ``baseline`` is the PSNR of answering with the mean training image."""

    psnr: float
    baseline: float
    codes_used: int
    code_entropy: float


@torch.no_grad()
def evaluate(model: BSQAutoencoder, split: Split) -> Evaluation:
    """Encode and decode the held-out images."""
    model.eval()
    target = split.held_out
    reconstruction = model(target)
    counts = torch.bincount(reconstruction.indices.flatten(), minlength=2**model.cfg.codebook_dim)
    share = counts / counts.sum()
    mean_image = split.training.mean(0).expand_as(target)
    return Evaluation(
        psnr=peak_signal_to_noise(reconstruction.images, target).mean().item(),
        baseline=peak_signal_to_noise(mean_image, target).mean().item(),
        codes_used=int((counts > 0).sum()),
        code_entropy=-torch.special.xlogy(share, share).sum().item() / math.log(2),
    )


def losses(model: BSQAutoencoder, images: Tensor, cfg: TrainingConfig) -> Tensor:
    """The terms of the loss, weighted: (charbonnier, focal frequency, entropy)."""
    result = model(images)
    frequency = focal_frequency_loss(result.images, images, loss_weight=cfg.focal_frequency_weight)
    entropy = result.sample_entropy.mean() - result.codebook_entropy
    return torch.stack(
        (charbonnier(result.images, images).mean(), frequency, cfg.entropy_weight * entropy)
    )


def fit(
    model: BSQAutoencoder, split: Split, cfg: TrainingConfig, stop: threading.Event
) -> Evaluation:
    """Train ``model`` in place, with a progress bar and a line an epoch, until done or stopped."""
    steps = math.ceil(len(split.training) / cfg.batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, cfg.learning_rate, total_steps=steps * cfg.epochs, pct_start=0.1
    )
    with progress_bar(console) as bar:
        task = bar.add_task("", total=steps * cfg.epochs)
        for epoch in range(1, cfg.epochs + 1):
            bar.update(task, description=f"epoch {epoch}")
            model.train()
            total = torch.zeros(3, device=split.training.device)
            order = torch.randperm(len(split.training)).to(split.training.device)
            for batch in order.split(cfg.batch_size):
                terms = losses(model, split.training[batch], cfg)
                optimizer.zero_grad()
                terms.sum().backward()
                optimizer.step()
                schedule.step()
                total += terms.detach() * (len(batch) / len(order))
                bar.advance(task)
                if stop.is_set():
                    return evaluate(model, split)
            evaluation = evaluate(model, split)
            print_epoch(epoch, cfg.epochs, total.tolist(), evaluation)
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


def op_table(rows: list[Row]) -> Table:
    """What ran, as `record_usage` saw it."""
    table = Table(title="Which implementation ran, and why", title_justify="left")
    for name in ("op", "direction", "ran", "why"):
        table.add_column(name, overflow="fold")
    for name in ("calls", "time", "each"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.op,
            row.direction,
            row.implementation,
            row.why,
            f"{row.calls:,}",
            f"{row.seconds:.2f} s",
            f"{1e3 * row.seconds / max(row.calls, 1):.2f} ms",
        )
    return table


@torch.no_grad()
def draw_reconstructions(model: BSQAutoencoder, split: Split, psnr: float, path: Path) -> None:
    """Draw the first two held-out images of each digit above what they decode to."""
    model.eval()
    digits = split.held_out_labels
    chosen = torch.stack([(digits == digit).nonzero()[:2, 0] for digit in range(10)], dim=1)
    originals = split.held_out[chosen.flatten()]
    decoded = model(originals).images
    captions = [f"{value:.1f} dB" for value in peak_signal_to_noise(decoded, originals).tolist()]
    rows, columns = model.cfg.code_shape
    save_reconstructions(
        originals[:, 0].cpu().numpy(),
        decoded[:, 0].cpu().numpy(),
        captions,
        f"Held-out images as {rows} x {columns} codes of {model.cfg.codebook_dim} bits; "
        f"mean PSNR of all {len(digits)}: {psnr:.1f} dB",
        path,
    )


def save_checkpoint(
    model: BSQAutoencoder, cfg: ProgramConfig, evaluation: Evaluation, path: Path
) -> None:
    """Write weights, config and evaluation into one safetensors file."""
    metadata = {
        "program": PROGRAM,
        "config": dataclasses.asdict(cfg),
        "evaluation": evaluation._asdict(),
    }
    save_weights(model.state_dict(), path, metadata)


def load_checkpoint(path: Path) -> BSQAutoencoder:
    """Rebuild the model that `save_checkpoint` wrote, in evaluation mode.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is torn, or something else's.
    """
    weights, metadata = load_weights(path)
    if metadata.get("program") != PROGRAM:
        raise ValueError(f"{path} is not a checkpoint of {PROGRAM}")
    model = BSQAutoencoder(ProgramConfig.from_mapping(metadata["config"]).model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its own config: {error}") from error
    return model.eval()


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
) -> None:
    """Train on 4,500 images and report on the 500 held out. Ctrl-C saves what there is."""
    with stop_on_interrupt() as stop:
        place = pick_device(device)
        try:
            cfg = ProgramConfig.read(config)
            split = Split(*(part.to(place) for part in load_split()))
            out.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError, TypeError, ModuleNotFoundError) as error:
            refuse(error)
        if epochs is not None:
            cfg.training = dataclasses.replace(cfg.training, epochs=epochs)
        torch.manual_seed(seed)
        model = BSQAutoencoder(cfg.model).to(place)
        rows, columns = cfg.model.code_shape
        console.print(
            f"{sum(p.numel() for p in model.parameters()):,} parameters on {place}; an image of "
            f"{math.prod(cfg.model.image_shape):,} pixels becomes {rows} x {columns} codes of "
            f"{cfg.model.codebook_dim} bits = {cfg.model.bits} bits",
            highlight=False,
        )
        synchronize = torch.cuda.synchronize if place.type == "cuda" else None
        start = time.perf_counter()
        with record_usage(synchronize) as usage:
            evaluation = fit(model, split, cfg.training, stop)
        seconds = time.perf_counter() - start
        if stop.is_set():
            console.print("stopped by Ctrl-C; saving what there is")
        save_checkpoint(model, cfg, evaluation, out / CHECKPOINT)
        draw_reconstructions(model, split, evaluation.psnr, out / PICTURE)
    console.print(op_table(usage.rows))
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
@torch.no_grad()
def encode(
    checkpoint: Annotated[Path, typer.Argument(help="File that `train` saved.")],
    index: Annotated[int, typer.Option(help=f"Held-out image, 0 to {HELD_OUT - 1}.")] = 0,
    picture: Annotated[
        Path | None, typer.Option(help="PNG file. Default: beside the checkpoint.")
    ] = None,
) -> None:
    """Encode a held-out image into indices, decode these, and compare."""
    if not 0 <= index < HELD_OUT:
        refuse(f"--index is {index}; the held-out images are 0 to {HELD_OUT - 1}")
    try:
        model = load_checkpoint(checkpoint)
        split = load_split()
    except (OSError, ValueError, TypeError, KeyError, ModuleNotFoundError) as error:
        refuse(error)
    image = split.held_out[index : index + 1]
    indices = model.encode(image)
    decoded = model.decode(indices)
    (psnr,) = peak_signal_to_noise(decoded, image).tolist()
    digit = int(split.held_out_labels[index])
    digits = len(str(2**model.cfg.codebook_dim - 1))
    for row in indices[0].tolist():
        console.print(" ".join(f"{code:{digits}d}" for code in row), highlight=False)
    console.print(
        f"held-out image {index}, a {digit}: {model.cfg.bits} bits in place of "
        f"{8 * image.numel():,}, decoded at {psnr:.2f} dB",
        highlight=False,
        soft_wrap=True,
    )
    path = picture or checkpoint.with_name(f"{checkpoint.stem}-{index}.png")
    title = f"Held-out image {index} in {model.cfg.bits} bits: {psnr:.1f} dB"
    try:
        save_code(image[0, 0].numpy(), indices[0].numpy(), decoded[0, 0].numpy(), title, path)
    except (OSError, ModuleNotFoundError) as error:
        refuse(error)
    console.print(f"saved {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
