"""Train a convolutional network on real images of digits.

``python -m ml_networks.tasks.images.train`` trains on 4,000 MNIST images and validates on the
1,000 held out. ``torchrun --nproc-per-node 2 -m ml_networks.tasks.images.train`` shares each batch
among processes and gives the same result: batch norms take their statistics over the whole batch,
and order and dropout depend on the seed and the step alone. For the same reason a run that was
stopped anywhere, and resumed, ends bit for bit where the whole run ends.
"""

from __future__ import annotations

import dataclasses
import math
import os
import resource
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from ml_networks.io import load_weights, save_weights
from ml_networks.tasks.images.curves import Epoch, save_learning_curves
from ml_networks.tasks.images.mnist import load_mnist
from ml_networks.tasks.program import (
    INTERRUPTED,
    pick_device,
    progress_bar,
    refuse,
    stop_on_interrupt,
)
from ml_networks.torch.nn import (
    Adam,
    BatchNorm1d,
    BatchNorm2d,
    Conv2d,
    CrossEntropyLoss,
    Dropout,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    global_batch,
)
from ml_networks.torch.utils import torch_fix_seed

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

PROGRAM = "ml_networks.tasks.images.train"
LAST = "last.safetensors"
PICTURE = "learning-curves.png"
EVALUATED_AT_ONCE = 100

console = Console()


@dataclass(frozen=True)
class Settings:
    """What a run's result depends on.

    Attributes
    ----------
    epochs
        Passes over the training images.
    batch_size
        Images a step, of all processes together.
    learning_rate, weight_decay
        Of Adam. The learning rate falls to 0 along half a cosine.
    label_smoothing
        Of the cross entropy.
    seed
        Of the weights, the order of the images and dropout.
    """

    epochs: int = 15
    batch_size: int = 100
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    seed: int = 0


class DigitNetwork(Module):
    """Two convolutions and two linear layers: (B, 1, 28, 28) to the logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = Conv2d(1, 32, kernel_size=3, padding=1)
        self.bn1 = BatchNorm2d(32)
        self.relu1 = ReLU()
        self.pool1 = MaxPool2d(kernel_size=2)
        self.dropout1 = Dropout(0.25)
        self.conv2 = Conv2d(32, 64, kernel_size=3, padding=1)
        self.bn2 = BatchNorm2d(64)
        self.relu2 = ReLU()
        self.pool2 = MaxPool2d(kernel_size=2)
        self.dropout2 = Dropout(0.25)
        self.flatten = Flatten()
        self.linear1 = Linear(64 * 7 * 7, 128)
        self.bn3 = BatchNorm1d(128)
        self.relu3 = ReLU()
        self.dropout3 = Dropout(0.5)
        self.linear2 = Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of normalised images."""
        x = self.dropout1(self.pool1(self.relu1(self.bn1(self.conv1(x)))))
        x = self.dropout2(self.pool2(self.relu2(self.bn2(self.conv2(x)))))
        x = self.dropout3(self.relu3(self.bn3(self.linear1(self.flatten(x)))))
        logits: Tensor = self.linear2(x)
        return logits


class Digits(NamedTuple):
    """Normalised images (N, 1, 28, 28) and labels (N,), for training and held out."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Digits:
        """Return the digits on a device, the images in a dtype."""
        return Digits(*(x.to(device, dtype if x.is_floating_point() else None) for x in self))


def load_digits() -> Digits:
    """Read MNIST; every fifth image is held out, 100 of each digit."""
    pixels, digits = load_mnist()
    images = (torch.from_numpy(pixels)[:, None] / 255.0 - 0.1307) / 0.3081
    labels = torch.from_numpy(digits)
    held_out = torch.arange(len(labels)) % 5 == 4
    return Digits(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


@dataclass(frozen=True)
class Processes:
    """The processes that share the work, and which of them this is."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def part(self, n: int) -> slice:
        """Return this process's share of ``n`` rows."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over the processes."""
        total = x.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total


@contextmanager
def join_processes(device: str | None) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes(device=pick_device(device))
        return
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    place = pick_device(device)
    store, rank, _ = next(rendezvous("env://"))
    backend = "nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield Processes(rank, size, place)
        leave_together(store, size)
    finally:
        dist.destroy_process_group()


def leave_together(store: Store, size: int) -> None:
    """Wait until all ``size`` processes are here, without a collective operation.

    A process that ends closes its connections, which another one that has yet to wake from their
    last collective operation takes for a failure. And a thread of gloo that still holds tensors
    of that operation needs the GIL to let them go: after Python has begun to shut down that ends
    the process with SIGABRT. Here it gets the GIL.
    """
    store.add("leaving", 1)
    while store.add("leaving", 0) < size:
        time.sleep(0.01)
    time.sleep(0.1)


class Stop(Protocol):
    """Says whether to stop after this step, as :class:`threading.Event` does."""

    def is_set(self) -> bool:
        """Return whether to stop."""


class Run:
    """A network in training and where it stands: ``step`` of the epoch after ``history``."""

    def __init__(
        self, settings: Settings, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        torch_fix_seed(settings.seed)
        self.settings = settings
        self.network = DigitNetwork().to(device, dtype)
        self.optimizer = Adam(
            self.network.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.history: list[Epoch] = []
        self.step = 0
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.seconds = 0.0

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to, from 1."""
        return len(self.history) + 1

    def generator(self, purpose: str, device: torch.device) -> torch.Generator:
        """Return random numbers that depend on seed, epoch and ``purpose`` alone."""
        # torch's generator on the CPU uses 32 bits of its seed.
        text = f"{self.settings.seed} {self.epoch} {purpose}"
        return torch.Generator(device).manual_seed(zlib.crc32(text.encode()))


def save_checkpoint(run: Run, path: Path) -> None:
    """Write everything that the rest of the run depends on."""
    tensors = {f"network/{name}": x for name, x in run.network.state_dict().items()}
    for index, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": x for name, x in state.items()}
    metadata = {
        "program": PROGRAM,
        "settings": dataclasses.asdict(run.settings),
        "history": [entry._asdict() for entry in run.history],
        "step": run.step,
        "sums": run.sums.tolist(),
        "seconds": run.seconds,
    }
    save_weights(tensors, path, metadata)


def load_checkpoint(path: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Run:
    """Return the run that :func:`save_checkpoint` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is torn, or not a checkpoint of this program.
    """
    tensors, metadata = load_weights(path)
    if metadata.get("program") != PROGRAM:
        raise ValueError(f"{path} is not a checkpoint of {PROGRAM}")
    try:
        run = Run(Settings(**metadata["settings"]), device, dtype)
        run.history = [Epoch(**entry) for entry in metadata["history"]]
        run.step, run.seconds = metadata["step"], metadata["seconds"]
        run.sums += torch.tensor(metadata["sums"], dtype=torch.float64, device=device)
        states: dict[int, dict[str, Tensor]] = {}
        network = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "network":
                network[rest] = tensor
            else:
                index, _, key = rest.partition("/")
                states.setdefault(int(index), {})[key] = tensor
        run.network.load_state_dict(network)
        groups = run.optimizer.state_dict()["param_groups"]
        run.optimizer.load_state_dict({"state": states, "param_groups": groups})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint of {PROGRAM}: {error}") from error
    return run


def train_step(
    run: Run, network: Module, digits: Digits, batch: Tensor, processes: Processes
) -> None:
    """Take one optimizer step on the images ``batch``, of which this process computes its part."""
    part = batch[processes.part(len(batch))]
    labels = digits.labels[part]
    criterion = CrossEntropyLoss(reduction="sum", label_smoothing=run.settings.label_smoothing)
    generator = run.generator(f"dropout {run.step}", processes.device)
    start = processes.part(len(batch)).start
    with global_batch(start, len(batch), generator):
        logits = network(digits.images[part])
    loss = criterion(logits, labels)
    run.optimizer.zero_grad()
    # DistributedDataParallel averages the processes' gradients; the batch's loss is a sum.
    (loss * (processes.size / len(batch))).backward()
    run.optimizer.step()
    correct = (logits.argmax(1) == labels).sum()
    run.sums += torch.stack([loss.detach().double(), correct.double()])
    run.step += 1


@torch.no_grad()
def evaluate(network: Module, digits: Digits, processes: Processes) -> tuple[float, float]:
    """Return mean loss and accuracy on the held-out images."""
    network.eval()
    criterion = CrossEntropyLoss(reduction="sum")
    n = len(digits.held_out_labels)
    sums = torch.zeros(2, dtype=torch.float64, device=processes.device)
    part = torch.arange(n, device=processes.device)[processes.part(n)]
    for batch in part.split(EVALUATED_AT_ONCE):
        labels = digits.held_out_labels[batch]
        logits = network(digits.held_out_images[batch])
        correct = (logits.argmax(1) == labels).sum()
        sums += torch.stack([criterion(logits, labels).double(), correct.double()])
    mean_loss, accuracy = (processes.total(sums) / n).tolist()
    return mean_loss, accuracy


def fit(
    run: Run,
    digits: Digits,
    processes: Processes,
    stop: Stop,
    out: Path | None = None,
    checkpoint_every: int = 5,
) -> bool:
    """Train until all epochs are done or ``stop`` is set; return whether all are done.

    With a folder ``out``, the first process writes ``epoch-<n>.safetensors`` every
    ``checkpoint_every`` epochs, and in the end ``last.safetensors``.
    """
    main = processes.rank == 0
    network: Module = run.network
    if processes.size > 1:
        network = DistributedDataParallel(run.network)
    settings = run.settings
    n_steps = -(-len(digits.labels) // settings.batch_size)
    if not main:
        run.sums.zero_()  # a checkpoint holds the sums of all processes
    stopped = False
    with progress_bar(console, visible=main) as bar:
        task = bar.add_task("", total=n_steps * settings.epochs)
        while run.epoch <= settings.epochs and not stopped:
            bar.update(
                task,
                description=f"epoch {run.epoch}",
                completed=(run.epoch - 1) * n_steps + run.step,
            )
            network.train()
            started = time.monotonic()
            order = torch.randperm(
                len(digits.labels), generator=run.generator("order", torch.device("cpu"))
            ).to(processes.device)
            for batch in order.split(settings.batch_size)[run.step :]:
                progress = (run.epoch - 1 + run.step / n_steps) / settings.epochs
                run.optimizer.set_lr(
                    settings.learning_rate * (1 + math.cos(math.pi * progress)) / 2
                )
                train_step(run, network, digits, batch, processes)
                bar.advance(task)
                stopped = _any(stop.is_set(), processes)
                if stopped:
                    break
            if run.step == n_steps:
                _finish_epoch(run, digits, processes, started, main=main)
                if main and out is not None and (run.epoch - 1) % checkpoint_every == 0:
                    save_checkpoint(run, out / f"epoch-{run.epoch - 1:03d}.safetensors")
            else:
                run.seconds += time.monotonic() - started
        sums = processes.total(run.sums)
    if main and out is not None:
        run.sums.copy_(sums)
        save_checkpoint(run, out / LAST)
    return run.epoch > settings.epochs


def _finish_epoch(
    run: Run, digits: Digits, processes: Processes, started: float, *, main: bool
) -> None:
    loss, accuracy = (processes.total(run.sums) / len(digits.labels)).tolist()
    held_out_loss, held_out_accuracy = evaluate(run.network, digits, processes)
    seconds = run.seconds + time.monotonic() - started
    entry = Epoch(run.epoch, loss, accuracy, held_out_loss, held_out_accuracy, seconds)
    run.history.append(entry)
    run.step = 0
    run.sums.zero_()
    run.seconds = 0.0
    if main:
        console.print(
            f"epoch {entry.epoch:>{len(str(run.settings.epochs))}}/{run.settings.epochs}  "
            f"loss {loss:.4f}  accuracy {accuracy:.2%}  held out: loss {held_out_loss:.4f}  "
            f"accuracy {held_out_accuracy:.2%}  {seconds:.1f} s",
            highlight=False,
            soft_wrap=True,
        )


def _any(flag: bool, processes: Processes) -> bool:
    """Return whether the flag is set in any process, so that all leave a loop together."""
    if processes.size == 1:
        return flag
    return bool(processes.total(torch.tensor(int(flag), device=processes.device)) > 0)


def peak_memory(processes: Processes) -> float:
    """Return the most memory in MiB that the processes held, on the CPU or on their GPUs."""
    if processes.device.type == "cuda":
        used = float(torch.cuda.max_memory_allocated(processes.device))
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used *= 1 if sys.platform == "darwin" else 1024
    return processes.total(torch.tensor(used, device=processes.device)).item() / 2**20


def _start(resume: Path | None, given: dict[str, Any], device: torch.device) -> Run:
    """Return a new run, or the one to resume; ``given`` holds the options of the command line."""
    if resume is None:
        run = Run(Settings(**given), device)
    else:
        run = load_checkpoint(resume, device)
        stored = dataclasses.asdict(run.settings)
        for name, value in given.items():
            if name != "epochs" and value != stored[name]:
                raise ValueError(
                    f"{resume} was trained with {name} = {stored[name]} and cannot go on with "
                    f"{value}; leave that option out"
                )
        epochs = given.get("epochs", run.settings.epochs)
        if epochs < run.epoch - 1:
            raise ValueError(f"{resume} has {run.epoch - 1} epochs behind it, more than {epochs}")
        run.settings = dataclasses.replace(run.settings, epochs=epochs)
    return run


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the picture.")] = Path(
        "runs/digits"
    ),
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: 15.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, help="Images a step, of all processes. Default: 100.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Of Adam. Default: 0.001.")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(min=0.0, help="Of Adam. Default: 0.")
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Default: 0.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: 0.")] = None,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Epochs from one checkpoint to the next.")
    ] = 5,
    resume: Annotated[
        Path | None, typer.Option(help="Checkpoint to go on from, with its settings.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the GPU.")] = None,
) -> None:
    """Train on 4,000 images and validate on the 1,000 held out. Ctrl-C saves what there is."""
    options = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "label_smoothing": label_smoothing,
        "seed": seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    started = time.monotonic()
    with join_processes(device) as processes, stop_on_interrupt() as stop:
        try:
            run = _start(resume, given, processes.device)
            digits = load_digits().to(processes.device)
            _check_last_batch(len(digits.labels), run.settings.batch_size)
            out.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError, ModuleNotFoundError) as error:
            refuse(error)
        if processes.rank == 0:
            count = sum(parameter.numel() for parameter in run.network.parameters())
            console.print(f"{count:,} parameters on {processes.device}", highlight=False)
        done = fit(run, digits, processes, stop, out, checkpoint_every)
        memory = peak_memory(processes)
        if processes.rank == 0:
            _report(run, out, memory, processes, time.monotonic() - started, done=done)
    if not done:
        raise typer.Exit(INTERRUPTED)


def _check_last_batch(n: int, batch_size: int) -> None:
    if n % batch_size == 1:
        raise ValueError(
            f"a batch size of {batch_size} leaves one of the {n} training images to the last "
            "batch, and one image has no batch statistics"
        )


def _report(
    run: Run, out: Path, memory: float, processes: Processes, seconds: float, *, done: bool
) -> None:
    lines = []
    if run.history:
        last = run.history[-1]
        save_learning_curves(
            run.history, f"Held-out accuracy {last.held_out_accuracy:.2%}", out / PICTURE
        )
        lines.append(f"held-out accuracy  {last.held_out_accuracy:.2%}")
    lines.append(
        f"time               {seconds:.1f} s, {processes.size} "
        f"process{'es' if processes.size > 1 else ''} on {processes.device}"
    )
    lines.append(f"peak memory        {memory:.0f} MiB")
    lines.append(
        f"saved              {out / LAST}" + (f", {out / PICTURE}" if run.history else "")
    )
    if not done:
        lines.append(f"stopped in epoch {run.epoch}; go on with --resume {out / LAST}")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
