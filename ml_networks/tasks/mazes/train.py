"""Train a Continuous Thought Machine to find the route through a maze from its image.

``python -m ml_networks.tasks.mazes.train --model ctm --d_model 1024 --d_input 256`` trains the
model of these sizes; ``--use_hyper --hyper_layers bottleneck --hyper_rank 8`` lets its synapses
adapt to its state. The mazes are made, or read from ``--data_root``. A run that was stopped
anywhere, and resumed with ``--resume``, ends where the whole run ends.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ml_networks.tasks.mazes.learner import Scores, best_constant, counted, table
from ml_networks.tasks.mazes.pictures import save_learning_curves
from ml_networks.tasks.mazes.run import (
    LAST,
    Point,
    Run,
    fit,
    load_checkpoint,
    load_mazes,
    make_learner,
    model_weights,
    read_settings,
)
from ml_networks.tasks.mazes.settings import (
    SPELLING,
    Settings,
    WithSizes,
    resumed,
    with_settings,
)
from ml_networks.tasks.program import INTERRUPTED, progress_bar, refuse, stop_on_interrupt

CURVES = "learning-curves.png"

console = Console(width=None if sys.stdout.isatty() else 110)

app = typer.Typer(add_completion=False, context_settings=SPELLING)


@app.command(cls=WithSizes)
@with_settings
def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint and curves.")] = Path(
        "runs/mazes"
    ),
    resume: Annotated[
        Path | None, typer.Option(help="Checkpoint to go on from, with its settings.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Checkpoint or torch file to take the first weights from.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the GPU.")] = None,
    **options: Any,
) -> None:
    """Train on mazes and test on others. Ctrl-C saves what there is."""
    given = {name: value for name, value in options.items() if value is not None}
    with stop_on_interrupt() as stop:
        try:
            run = start(resume, weights, given, device)
            training, held_out = load_mazes(run.settings)
            out.mkdir(parents=True, exist_ok=True)
        except (OSError, TypeError, ValueError, ModuleNotFoundError) as error:
            refuse(error)
        constant = best_constant(held_out)
        console.print(
            f"{run.learner.parameters:,} parameters; {counted(training)} to train on, "
            f"{counted(held_out)} held out",
            highlight=False,
            soft_wrap=True,
        )
        used = time.process_time()
        with progress_bar(console) as bar:
            done = fit(run, training, held_out, stop, out, lambda point: show(run, point), bar)
        used = time.process_time() - used
    report(run, constant, out, used, done=done)
    if not done:
        raise typer.Exit(INTERRUPTED)


def start(
    resume: Path | None, weights: Path | None, given: dict[str, Any], device: str | None
) -> Run:
    """A new run, or the one to resume; ``given`` holds the options of the command line."""
    if resume is not None:
        if weights is not None:
            raise ValueError("--resume brings its own weights; leave --weights out")
        settings = resumed(read_settings(resume)[0], given, resume)
        return load_checkpoint(resume, settings, device)
    settings = Settings(**given)
    run = Run(settings, make_learner(settings, device))
    if weights is not None:
        try:
            run.learner.load_model(model_weights(weights, settings.framework))
        except ValueError as error:
            raise ValueError(f"{weights}: {error}") from error
    return run


def show(run: Run, point: Point) -> None:
    """One line: the loss, and what the held-out mazes say."""
    steps = run.settings.training_iterations
    sizes = ""
    if len(point.sizes) > 1:
        sizes = ", ".join(f"{size} {each.on_route:.0%}" for size, each in point.sizes.items())
        sizes = f" ({sizes})"
    console.print(
        f"step {point.step:>{len(str(steps))}}/{steps}  loss {point.loss:.3f}  held out: loss "
        f"{point.held_out_loss:.3f}  per step {point.per_step:.1%}  on the route "
        f"{point.on_route:.1%}{sizes}  solved {point.solved:.1%}  {point.seconds:.0f} s",
        highlight=False,
        soft_wrap=True,
    )


def report(run: Run, constant: Scores, out: Path, used: float, *, done: bool) -> None:
    """What came of it, beside the best answer that is the same for every maze."""
    lines = []
    if run.history:
        last = run.history[-1]
        lines.append(table(Scores(last.measures, last.sizes), constant))
        save_learning_curves(run.history, constant, out / CURVES)
    lines.append(f"time               {run.seconds:.0f} s, {used:.0f} s of a processor")
    lines.append(f"saved              {out / LAST}" + (f", {out / CURVES}" if run.history else ""))
    if not done:
        lines.append(f"stopped after {run.step} steps; go on with --resume {out / LAST}")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
