"""What a training run on mazes depends on, as one dataclass and as options of the command line."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from ml_networks._compat import did_you_mean
from ml_networks.config import (
    ContinuousThoughtMachineConfig,
    HyperContinuousThoughtMachineConfig,
)
from ml_networks.tasks.mazes.data import CLASSES, ROUTE_LENGTH, check_size
from ml_networks.tasks.program import FRAMEWORKS

MAY_CHANGE = ("data_root", "training_iterations", "evaluate_every", "save_every")
"""Settings that a run may be resumed with other values of."""

SPELLING = {"token_normalize_func": lambda name: name.replace("-", "_")}
"""For a command whose options are spelt with underscores: dashes are understood too."""

SIZES = "Pixels a side of mazes that are made; odd; several as in --maze_size 9 11 13."


class WithSizes(TyperCommand):
    """A command that takes every whole number after ``--maze_size`` as a size."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the option's name before each number from the second on, as click asks for."""
        spread: list[str] = []
        sizes: int | None = None  # how many came since the option, None outside of it
        for argument in args:
            name, separator, _ = argument.partition("=")
            if name.replace("-", "_") == "__maze_size":
                sizes = len(separator)
            elif sizes is not None and re.fullmatch(r"-?\d+", argument):
                spread += ["--maze_size"] * (sizes > 0)
                sizes += 1
            else:
                sizes = None
            spread.append(argument)
        return super().parse_args(ctx, spread)


@dataclass(frozen=True)
class Settings:
    """What a run's result depends on; the command line has an option of the name of each.

    Raises
    ------
    ValueError
        For a value out of range, or values that do not fit each other.
    """

    model: Annotated[str, "ctm: the Continuous Thought Machine."] = "ctm"
    framework: Annotated[str, "torch or jax."] = "torch"
    use_hyper: Annotated[bool, "Synapses that adapt to the state at every tick."] = False
    hyper_layers: Annotated[str, "With --use_hyper: bottleneck, down, up, all or none."] = (
        "bottleneck"
    )
    hyper_rank: Annotated[int, "With --use_hyper: rank of the dynamic weights."] = 8
    iterations: Annotated[int, "Internal ticks."] = 50
    d_model: Annotated[int, "Neurons."] = 1024
    d_input: Annotated[int, "Width of the attention."] = 256
    heads: Annotated[int, "Attention heads."] = 4
    n_synch_out: Annotated[int, "Synchronised neurons (or pairs) that are read out."] = 128
    n_synch_action: Annotated[int, "Synchronised neurons (or pairs) that direct attention."] = 128
    synapse_depth: Annotated[int, "Depth of the synapses' U-Net; 1: one layer."] = 8
    memory_length: Annotated[int, "Pre-activations that a neuron's own model sees."] = 25
    deep_memory: Annotated[bool, "Neurons' models with a hidden layer."] = True
    memory_hidden_dims: Annotated[int, "Width of that layer."] = 32
    do_normalisation: Annotated[bool, "Layer norms in the neurons' models."] = False
    backbone_type: Annotated[str, "resnet{18,34,50,101,152}-{1,2,3,4}, shallow-wide, none."] = (
        "resnet18-1"
    )
    positional_embedding_type: Annotated[
        str, "none, learnable-fourier, multi-learnable-fourier or custom-rotational."
    ] = "none"
    dropout: Annotated[float, "Of attention and synapses."] = 0.0
    dropout_nlm: Annotated[float | None, "Of the neurons' models; default: as --dropout."] = None
    neuron_select_type: Annotated[str, "random-pairing, random or first-last."] = "random-pairing"
    n_random_pairing_self: Annotated[int, "Neurons paired with themselves."] = 0
    maze_route_length: Annotated[int, "Steps of a route; longer ones are cut."] = ROUTE_LENGTH
    expand_range: Annotated[bool, "Pixels in [-1, 1] in place of [0, 1]."] = True
    cirriculum_lookahead: Annotated[
        int, "Steps beyond the longest right beginning that the loss looks at."
    ] = 5
    data_root: Annotated[str, "Folder with train/ and test/; empty: make mazes."] = ""
    maze_size: Annotated[tuple[int, ...], SIZES] = (19,)
    size_curriculum: Annotated[
        float, "Share of the steps until the last of the sizes, smallest first, has joined."
    ] = 0.0
    training_mazes: Annotated[int, "Mazes of each size made to train on."] = 50_000
    test_mazes: Annotated[
        int, "Mazes of each size made to test on, none of them among the others."
    ] = 1_000
    training_iterations: Annotated[int, "Optimizer steps."] = 100_000
    batch_size: Annotated[int, "Mazes a step, all of one size."] = 64
    lr: Annotated[float, "Highest learning rate of AdamW."] = 1e-4
    warmup_steps: Annotated[int, "Steps up to it, before a cosine down to 0."] = 5_000
    weight_decay: Annotated[float, "Of AdamW."] = 0.0
    gradient_clipping: Annotated[float, "Highest norm of the gradient; 0 or less: any."] = 1.0
    use_amp: Annotated[bool, "bfloat16 autocast, on a GPU with torch."] = True
    evaluate_every: Annotated[int, "Steps from one test to the next."] = 1_000
    save_every: Annotated[int, "Steps from one checkpoint to the next."] = 1_000
    seed: Annotated[int, "Of weights, mazes, batches and dropout."] = 0

    def __post_init__(self) -> None:
        # A checkpoint has a list, one of a single size may have just that number.
        object.__setattr__(self, "maze_size", _in_order(self.maze_size))
        if not self.maze_size:
            raise ValueError("maze_size has no size; it takes odd numbers, as in 9 11 13")
        for size in self.maze_size:
            check_size(size, "maze_size")
        for name, allowed in (("model", ("ctm",)), ("framework", FRAMEWORKS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name} is {value!r}; it takes {' or '.join(allowed)}"
                    f"{did_you_mean(value, allowed)}"
                )
        for name, least in (
            ("maze_route_length", 1),
            ("cirriculum_lookahead", 1),
            ("training_mazes", 1),
            ("test_mazes", 1),
            ("training_iterations", 1),
            ("batch_size", 1),
            ("evaluate_every", 1),
            ("save_every", 1),
            ("warmup_steps", 0),
            ("weight_decay", 0),
            ("seed", 0),
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be >= {least}")
        if not 0 <= self.size_curriculum <= 1:
            raise ValueError(
                f"size_curriculum is {self.size_curriculum}; it must be a share from 0, where all "
                "sizes are there from the beginning, to 1"
            )
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; it must be a number > 0")
        if self.backbone_type == "parity_backbone":
            raise ValueError("backbone_type is 'parity_backbone', which takes no images")
        self.model_config()

    def model_config(self) -> ContinuousThoughtMachineConfig:
        """The config of the model, which predicts ``maze_route_length`` steps of 5 classes."""
        arguments: dict[str, Any] = {
            name: getattr(self, name)
            for name in (field.name for field in dataclasses.fields(self))
            if name in {field.name for field in dataclasses.fields(ContinuousThoughtMachineConfig)}
        }
        arguments |= {
            "deep_nlms": self.deep_memory,
            "do_layernorm_nlm": self.do_normalisation,
            "out_dims": CLASSES * self.maze_route_length,
            "prediction_reshaper": (self.maze_route_length, CLASSES),
            "in_channels": 3,
        }
        if not self.use_hyper:
            return ContinuousThoughtMachineConfig(**arguments)
        return HyperContinuousThoughtMachineConfig(
            **arguments, hyper_layers=self.hyper_layers, hyper_rank=self.hyper_rank
        )

    def learning_rate(self, step: int) -> float:
        """The rate of a step, from 0: up to ``lr`` in ``warmup_steps``, then a cosine to 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        rest = max(self.training_iterations - self.warmup_steps, 1)
        return self.lr * (1 + math.cos(math.pi * (step - self.warmup_steps) / rest)) / 2


def _in_order(sizes: int | Iterable[int]) -> tuple[int, ...]:
    """Each size once, the smallest first."""
    return tuple(sorted({sizes} if isinstance(sizes, int) else set(sizes)))


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each of the settings: ``--d_model`` for ``d_model``.

    An option that is left out is passed on as None, so that what a checkpoint holds is told from
    what was asked for.
    """
    hints = get_type_hints(Settings, include_extras=True)
    options = []
    for field in dataclasses.fields(Settings):
        kind, text = get_args(hints[field.name])
        names = f"--{field.name}" + (f"/--no-{field.name}" if kind is bool else "")
        shown = "" if field.default is None else _written(field.default)
        if kind == tuple[int, ...]:
            kind = list[int]
        option = typer.Option(names, help=text, show_default=shown or False)
        if type(None) not in get_args(kind):
            kind = kind | None
        options.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind, option],
            )
        )
    signature = inspect.signature(command, eval_str=True)
    own = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    command.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return command


def _written(value: Any) -> str:
    """A setting's value as the command line has it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def resumed(stored: Settings, given: dict[str, Any], path: object) -> Settings:
    """The settings that a checkpoint goes on with, where ``given`` were asked for.

    Raises
    ------
    ValueError
        If another value was asked for of a setting that cannot change; it names the first.
    """
    for name, value in given.items():
        known, asked = getattr(stored, name), value
        if name == "maze_size":
            asked = _in_order(value)
        if name not in MAY_CHANGE and asked != known:
            raise ValueError(
                f"{path} was trained with {name} = {_written(known)} and cannot go on with "
                f"{_written(asked)}; leave that option out"
            )
    return dataclasses.replace(
        stored, **{name: value for name, value in given.items() if name in MAY_CHANGE}
    )
