"""Time what runs: warmed up, with a cold L2 cache, candidates in alternating rounds, percentiles.

A `Workload` is a case with its arrays in a framework, run through the public function, so what is
timed is what a user gets. `compare` times several functions side by side.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from importlib import metadata
from typing import Any, TypeVar

import numpy as np

from . import testing
from .device import Device
from .problem import Case
from .records import Timing
from .registry import Framework, Op

Arrays = Mapping[str, Any]
Call = Callable[[Arrays], Arrays]
Function = Callable[[], Any]
Stopwatch = Callable[[Function], float]
"""Runs a function once and returns the microseconds that took."""
Name = TypeVar("Name")

COLD_BYTES = 1 << 28
"""More than any L2 cache holds: writing (or rotating through) so much leaves nothing of the
inputs in it."""
_JAX_BATCH = 10
WARM_UP = 3


class Workload:
    """One case of ``op`` in ``framework``: a forward pass, or with ``training`` a forward and a
    backward pass with random output gradients.
    """

    def __init__(
        self, op: Op, case: Case, framework: Framework, dtype: str, training: bool, seed: int = 0
    ) -> None:
        self.op, self.case, self.framework, self.dtype = op, case, framework, dtype
        self.training = training
        self.binding = op.binding(framework)
        way: testing.Direction = "backward" if training else "forward"
        check = testing.Check(op.name, case, framework, self.binding.plain, dtype, way)
        self.side = testing.side_of(check)
        self.inputs = self.side.inputs(op.reference.make_inputs(case, seed))
        self.cotangents: Arrays = {}
        if training:
            outputs = self.binding.call(self.inputs, self._flags, self.binding.plain)
            arrays = {name: self.side.to_numpy(value) for name, value in outputs.items()}
            self.cotangents = self.side.inputs(testing.random_cotangents(arrays, seed + 1))

    @property
    def _flags(self) -> dict[str, Any]:
        return dict(self.case.flags)

    def _pass(
        self, what: Call | str | None, inputs: Arrays, cotangents: Arrays
    ) -> tuple[Arrays, Arrays]:
        flags = dict(self.case.flags)
        if what is None or isinstance(what, str):
            name = what
            what = lambda values: self.binding.call(values, flags, name)  # noqa: E731
        if not self.training:
            return what(inputs), {}
        return self.side.gradients(what, inputs, cotangents, self.binding.wanted(inputs))

    def run(self, what: Call | str | None) -> Arrays:
        """The gradients in training, else the outputs, of ``what``: an implementation by name,
        what dispatch chooses (None), or any other function of the inputs.
        """
        outputs, gradients = self._pass(what, self.inputs, self.cotangents)
        return gradients if self.training else outputs

    def function(self, what: Call | str | None) -> Function:
        """Outputs and gradients of ``what`` as a function to time, jitted in JAX."""
        if self.framework == "torch":
            return lambda: self._pass(what, self.inputs, self.cotangents)
        import jax

        jitted, turn = jax.jit(partial(self._pass, what)), itertools.cycle(self._rotation)
        return lambda: jitted(*next(turn))

    @cached_property
    def _rotation(self) -> list[Any]:
        """Copies of the arrays, enough of them to push each other out of a GPU's L2 cache."""
        import jax

        arrays = (dict(self.inputs), dict(self.cotangents))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        copies = 1 if jax.default_backend() == "cpu" else min(32, -(-COLD_BYTES // max(size, 1)))
        return [jax.tree.map(lambda leaf: leaf.copy(), arrays) for _ in range(copies)]

    @cached_property
    def _exact(self) -> Arrays:
        inputs = {name: self.side.to_numpy(value) for name, value in self.inputs.items()}
        if not self.training:
            return self.op.reference.forward(inputs, **self._flags)
        cotangents = {name: self.side.to_numpy(value) for name, value in self.cotangents.items()}
        gradients = self.op.reference.backward(inputs, cotangents, **self._flags)
        return {name: gradients[name] for name in self.binding.wanted(inputs)}

    def errors(self, results: Arrays) -> dict[str, float]:
        """How far ``results`` of `run` are from the float64 reference, per array."""
        return {
            name: testing.relative_error(self.side.to_numpy(results[name]), exact)
            for name, exact in self._exact.items()
        }


def stopwatch(framework: Framework, device: Device) -> Stopwatch:
    """The way to time one call: device events after a flushed L2 (torch on a GPU), a batch of
    calls over rotated inputs (JAX on an accelerator), the host's clock (CPU).
    """
    if framework == "jax":
        return _jax_clock(1 if device.platform == "cpu" else _JAX_BATCH)
    return _host_clock if device.platform == "cpu" else _device_events()


def _host_clock(function: Function) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e6


def _jax_clock(batch: int) -> Stopwatch:
    import jax

    def clock(function: Function) -> float:
        start = time.perf_counter()
        jax.block_until_ready([function() for _ in range(batch)])
        return (time.perf_counter() - start) / batch * 1e6

    return clock


def _device_events() -> Stopwatch:
    import torch

    cold = torch.empty(COLD_BYTES, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(function: Function) -> float:
        # The write empties L2 and, as it outlasts the launch, hides the host's time.
        cold.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    return clock


def graphed(function: Function) -> Function:
    """``function`` as the replay of a CUDA graph, so that its launches cost the host nothing;
    itself where there is no GPU or it cannot be captured.
    """
    import torch

    if not torch.cuda.is_available():
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:
        torch.cuda.synchronize()
        return function
    return graph.replay


def compare(
    functions: Mapping[Name, Function],
    clock: Stopwatch,
    *,
    seconds: float = 0.3,
    rounds: tuple[int, int] = (5, 200),
) -> dict[Name, Timing]:
    """Time ``functions`` in rounds, each round through all of them and every second one
    backwards, so that drift of the machine hits all alike.

    Parameters
    ----------
    seconds
        Budget of each function; `rounds` bounds how many calls that makes.
    """
    samples: dict[Name, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(WARM_UP):
            clock(function)
    fewest, most = rounds
    deadline = time.perf_counter() + seconds * len(functions)
    order = list(functions)
    for done in range(most):
        if done >= fewest and time.perf_counter() > deadline:
            break
        for name in order:
            samples[name].append(clock(functions[name]))
        order.reverse()
    return {name: timing(times) for name, times in samples.items()}


def timing(microseconds: list[float]) -> Timing:
    """The percentiles of a list of times."""
    p20, p50, p80 = np.percentile(microseconds, (20, 50, 80))
    return Timing(float(p20), float(p50), float(p80))


def versions(framework: Framework) -> dict[str, str]:
    """The versions that a figure depends on."""
    names = ("torch", "triton") if framework == "torch" else ("jax", "jaxlib")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
