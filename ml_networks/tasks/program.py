"""What the training programs share: the device, one-line refusals, Ctrl-C, the progress bar."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    import jax
    import torch

INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended, as shells have it."""

FRAMEWORKS = ("torch", "jax")


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Set the event at the first Ctrl-C, so that a step is never cut in two; the second one
    interrupts as usual."""
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def progress_bar(console: Console, *, visible: bool = True) -> Progress:
    """A bar for tasks whose description says where they stand; gone when it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not visible,
    )


def refuse(error: object) -> NoReturn:
    """Answer bad input in one line and exit code 2."""
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(2)


def pick_device(name: str | None) -> torch.device:
    """The device ``name``, or the GPU where there is one."""
    import torch  # here, so that programs on JAX need no torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        refuse(f"device {name!r} cannot be used: {str(error).splitlines()[0]}")
    return device


def pick_jax_device(name: str | None) -> jax.Device:
    """JAX's first device of the platform ``name``, or of the best there is."""
    import jax

    try:
        device: jax.Device = jax.devices(name)[0]
    except RuntimeError as error:
        refuse(f"device {name!r} cannot be used: {str(error).splitlines()[0]}")
    return device
