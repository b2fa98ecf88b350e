"""What hypernetworks of both frameworks share: named shapes, encodings, gains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_networks._compat import did_you_mean


def check_encoding(mode: str | None) -> None:
    """Raise ValueError unless ``mode`` is an encoding of a hypernetwork's condition."""
    encodings = ("cos|sin", "z|1-z")
    if mode is not None and mode not in encodings:
        raise ValueError(
            f"encoding must be None, {' or '.join(map(repr, encodings))}, got {mode!r}"
            f"{did_you_mean(str(mode), encodings)}"
        )


class NamedShapes:
    """Named inputs and outputs of a hypernetwork: shapes without the batch dimension."""

    input_shapes: dict[str, tuple[int, ...]]
    output_shapes: dict[str, tuple[int, ...]]
    encoding: str | None = None

    def flat_input_size(self) -> int:
        """Entries of all inputs together, after encoding."""
        size = sum(math.prod(shape) for shape in self.input_shapes.values())
        return size if self.encoding is None else 2 * size

    def flat_output_size(self) -> int:
        """Entries of all outputs together."""
        return sum(math.prod(shape) for shape in self.output_shapes.values())

    def output_offsets(self) -> dict[str, tuple[int, int]]:
        """(start, size) of each output in the flat output."""
        offsets: dict[str, tuple[int, int]] = {}
        start = 0
        for name, shape in self.output_shapes.items():
            offsets[name] = (start, math.prod(shape))
            start += math.prod(shape)
        return offsets

    def _validate_inputs(self, inputs: Mapping[str, Any]) -> int:
        """Check names and shapes; return the common batch size."""
        if set(inputs) != set(self.input_shapes):
            raise ValueError(
                f"inputs must be named {sorted(self.input_shapes)}, got {sorted(inputs)}"
            )
        batches = {}
        for name, shape in self.input_shapes.items():
            given = tuple(inputs[name].shape)
            if given not in (shape, (given[0] if given else 1, *shape)):
                raise ValueError(f"input {name!r} must have shape (batch, *{shape}), got {given}")
            batches[name] = 1 if given == shape else given[0]
        if len(set(batches.values())) > 1:
            raise ValueError(f"inputs have different batch sizes: {batches}")
        return next(iter(batches.values()), 1)

    def _check_condition(self, shape: Sequence[int]) -> None:
        (width,) = self.input_shapes["condition"]
        if not shape or shape[-1] != width:
            raise ValueError(f"condition must have shape (*batch, {width}), got {tuple(shape)}")


WEIGHT_DISTRIBUTIONS = (
    "zeros",
    "kaiming_normal",
    "kaiming_uniform",
    "kaiming_normal_fanout",
    "kaiming_uniform_fanout",
    "glorot_normal",
    "glorot_uniform",
    "orthogonal",
)
_RELU_LIKE = ("relu", "leakyrelu", "elu", "gelu", "silu", "mish")
_GAINS = dict.fromkeys(_RELU_LIKE, math.sqrt(2.0)) | {"tanh": 5.0 / 3.0, "selu": 0.75}


def weight_gain(distribution: str, nonlinearity: str | None) -> float:
    """Return the gain for the activation that follows; ValueError for another distribution."""
    if distribution not in WEIGHT_DISTRIBUTIONS:
        raise ValueError(
            f"weight distribution must be one of {', '.join(WEIGHT_DISTRIBUTIONS)}, "
            f"got {distribution!r}{did_you_mean(str(distribution), WEIGHT_DISTRIBUTIONS)}"
        )
    return _GAINS.get((nonlinearity or "").lower().replace("_", ""), 1.0)


def bias_value(distribution: float) -> float:
    """Return the constant that fills a bias."""
    try:
        return float(distribution)
    except (TypeError, ValueError):
        raise ValueError(
            f"bias must be filled with a number or None, got {distribution!r}"
        ) from None


def fan_in(name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Inputs that add up in one output: those of the weight, for a bias beside a weight.

    A ``weight`` is (out, in, ...), as in torch, a ``kernel`` (..., in, out), as in Flax.
    """
    shape = shapes[name]
    owner = name.removesuffix("bias")
    if name.endswith("bias"):
        name = next((n for n in (f"{owner}weight", f"{owner}kernel") if n in shapes), name)
        shape = shapes[name]
    if len(shape) < 2:
        return max(math.prod(shape), 1)
    return max(math.prod(shape[:-1] if name.endswith("kernel") else shape[1:]), 1)
