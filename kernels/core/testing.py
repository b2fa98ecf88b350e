"""The conformance suite: every op x case x implementation x direction against float64.

The tolerance is derived. An implementation may be off from the float64 reference by at most twice
what the plain framework path in the same dtype is off, plus `ULPS` roundings; the plain path must
equal the reference in float64 and stay within `ULPS` roundings of it below. Errors are taken
relative to the largest element, per output. Inputs are rounded to the dtype before the reference
sees them, so only the computation is judged.

Torch outputs are poisoned: uninitialised memory holds NaN during a check.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from . import dispatch, pallas
from .device import Device
from .problem import Case
from .registry import Framework, Op, get, ops

Direction = Literal["forward", "backward"]
Layout = Literal["contiguous", "transposed", "sliced", "expanded"]

ULPS = 8
EPSILON = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "bfloat16": 2.0**-7,
    "float16": 2.0**-10,
}


@dataclass(frozen=True)
class Check:
    """One line of the suite."""

    op: str
    case: Case
    framework: Framework
    implementation: str
    dtype: str
    direction: Direction
    layout: Layout = "contiguous"

    @property
    def id(self) -> str:
        """A readable name for test reports."""
        parts = (
            self.op,
            self.case.id,
            self.implementation,
            self.dtype,
            self.direction,
            self.layout,
        )
        return "-".join(parts)


@dataclass(frozen=True)
class Outcome:
    """How far one output or gradient is off, and how far it may be; relative to its largest
    element."""

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the error is within what is allowed; NaN never is."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.3g}, allowed {self.allowed:.3g}"


def device_of(framework: Framework) -> Device:
    """The device checks run on: the accelerator if there is one, else the CPU with its
    interpreters."""
    if framework == "torch":
        return dispatch.current_device("torch")
    with pallas.interpret():
        return dispatch.current_device("jax")


def checks(
    framework: Framework,
    names: tuple[str, ...] | None = None,
    *,
    sizes: tuple[str, ...] = ("small", "ragged"),
    implementations: tuple[str, ...] | None = None,
) -> Iterator[Check]:
    """Every check that can run here. Layouts other than contiguous are drawn at float32 on the
    ragged cases, where a wrong stride cannot hide."""
    device = device_of(framework)
    layouts: tuple[Layout, ...] = ("transposed", "sliced", "expanded")
    if framework == "jax":
        layouts = ()
    directions: tuple[Direction, ...] = ("forward", "backward")
    for op in ops().values():
        if (names is not None and op.name not in names) or not op.has(framework):
            continue
        binding = op.binding(framework)
        for case in op.spec.CASES:
            if case.size not in sizes:
                continue
            for implementation in binding.implementations:
                if implementations is not None and implementation not in implementations:
                    continue
                for dtype in ("float32", "bfloat16", "float16", "float64"):
                    if not _can_run(op, case, implementation, dtype, device, framework):
                        continue
                    for direction in directions:
                        check = Check(op.name, case, framework, implementation, dtype, direction)
                        yield check
                        if dtype == "float32" and case.size == "ragged":
                            yield from (replace(check, layout=layout) for layout in layouts)


def _can_run(
    op: Op, case: Case, implementation: str, dtype: str, device: Device, framework: Framework
) -> bool:
    binding = op.binding(framework)
    if implementation == binding.plain:
        return framework == "torch" or dtype != "float64"
    if dtype == "float64" or (device.platform == "cpu" and not device.interpreted):
        return False
    problems = [case.problem(op.name, dtype, direction) for direction in op.spec.DIRECTIONS]
    return not any(op.spec.not_supported_reasons(p, implementation, device) for p in problems)


def run(check: Check, seed: int = 0) -> list[Outcome]:
    """Run one check; one `Outcome` per output (forward) or per gradient (backward)."""
    op = get(check.op)
    side = side_of(check)
    inputs = side.inputs(op.reference.make_inputs(check.case, seed))
    flags = dict(check.case.flags)
    exact_inputs = {name: side.to_numpy(value) for name, value in inputs.items()}
    exact = op.reference.forward(exact_inputs, **flags)
    binding = op.binding(check.framework)
    cotangents: Mapping[str, Any] = {}
    if check.direction == "backward":
        cotangents = side.inputs(random_cotangents(exact, seed + 1))
        exact_cotangents = {name: side.to_numpy(value) for name, value in cotangents.items()}
        exact = op.reference.backward(exact_inputs, exact_cotangents, **flags)
        exact = {name: exact[name] for name in binding.wanted(inputs)}

    def off(implementation: str) -> dict[str, float]:
        def call(values: Mapping[str, Any]) -> Mapping[str, Any]:
            return binding.call(values, flags, implementation)

        with side.running():
            if check.direction == "forward":
                got = call(inputs)
            else:
                _, got = side.gradients(call, inputs, cotangents, binding.wanted(inputs))
        return {name: relative_error(side.to_numpy(got[name]), exact[name]) for name in exact}

    errors = off(check.implementation)
    rounding = ULPS * EPSILON[check.dtype]
    if check.implementation == binding.plain:
        return [Outcome(name, error, rounding) for name, error in errors.items()]
    plain = off(binding.plain)
    return [Outcome(name, e, 2 * plain[name] + rounding) for name, e in errors.items()]


def relative_error(got: np.ndarray, exact: np.ndarray) -> float:
    """The largest deviation over the largest magnitude of ``exact``. Integers must be equal;
    non-finite elements must be the same."""
    if got.shape != exact.shape:
        raise AssertionError(f"shape {got.shape} where the reference has {exact.shape}")
    if exact.dtype.kind in "iub":
        return 0.0 if np.array_equal(got.astype(exact.dtype), exact) else np.inf
    if exact.size == 0:
        return 0.0
    finite = np.isfinite(exact)
    same = (got == exact) | (np.isnan(got) & np.isnan(exact))
    if not np.all(finite | same):
        return np.inf
    if not finite.any():
        return 0.0
    largest = np.abs(exact[finite]).max()
    return float(np.abs(got[finite] - exact[finite]).max() / (largest or 1.0))


def random_cotangents(outputs: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """A random output gradient for each floating output."""
    generator = np.random.default_rng(seed)
    floating = {name: value for name, value in outputs.items() if value.dtype.kind == "f"}
    return {name: generator.standard_normal(value.shape) for name, value in floating.items()}


def side_of(check: Check) -> TorchSide | JaxSide:
    """How the framework of ``check`` is spoken to: arrays in and out, gradients, poison."""
    return TorchSide(check) if check.framework == "torch" else JaxSide(check)


class TorchSide:
    """How the suite speaks torch."""

    def __init__(self, check: Check) -> None:
        import torch

        self.torch = torch
        self.dtype = getattr(torch, check.dtype)
        self.layout = check.layout
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def inputs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {name: self._place(array) for name, array in arrays.items()}

    def _place(self, array: np.ndarray) -> Any:
        tensor = self.torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)
        if array.dtype.kind == "f":
            tensor = tensor.to(self.dtype)
        tensor = tensor.to(self.device)
        if self.layout == "transposed" and tensor.ndim >= 2:
            return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        if self.layout == "sliced" and tensor.ndim >= 1:
            poison = float("nan") if array.dtype.kind == "f" else -1
            wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), poison)
            wide[..., ::2] = tensor
            return wide[..., ::2]
        if self.layout == "expanded" and tensor.ndim >= 2 and tensor.shape[0] > 0:
            return tensor[:1].expand_as(tensor)
        return tensor

    def to_numpy(self, value: Any) -> np.ndarray:
        value = value.detach().cpu()
        return (value.double() if value.is_floating_point() else value).numpy()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Uninitialised memory is NaN inside: ``warn_only`` leaves every kernel allowed. TF32,
        which torch allows convolutions, is not float32."""
        torch = self.torch
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                yield
        finally:
            torch.use_deterministic_algorithms(before)

    def gradients(
        self,
        call: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        inputs: Mapping[str, Any],
        cotangents: Mapping[str, Any],
        wanted: tuple[str, ...],
    ) -> tuple[Mapping[str, Any], dict[str, Any]]:
        leaves = {
            name: value.detach().requires_grad_() if name in wanted else value
            for name, value in inputs.items()
        }
        outputs = call(leaves)
        gradients = self.torch.autograd.grad(
            [outputs[name] for name in cotangents],
            [leaves[name] for name in wanted],
            [cotangents[name].to(outputs[name].dtype) for name in cotangents],
        )
        return outputs, dict(zip(wanted, gradients, strict=True))


class JaxSide:
    """How the suite speaks JAX. Arrays have no strides there, so layouts do not differ."""

    def __init__(self, check: Check) -> None:
        self.dtype = check.dtype

    def inputs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        import jax.numpy as jnp

        return {
            name: jnp.asarray(array, dtype=self.dtype if array.dtype.kind == "f" else None)
            for name, array in arrays.items()
        }

    def to_numpy(self, value: Any) -> np.ndarray:
        array = np.asarray(value)
        return array if array.dtype.kind in "iub" else array.astype(np.float64)

    def running(self) -> AbstractContextManager[None]:
        return pallas.interpret()

    def gradients(
        self,
        call: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        inputs: Mapping[str, Any],
        cotangents: Mapping[str, Any],
        wanted: tuple[str, ...],
    ) -> tuple[Mapping[str, Any], dict[str, Any]]:
        import jax

        def floating(values: dict[str, Any]) -> dict[str, Any]:
            outputs = call({**inputs, **values})
            return {name: outputs[name] for name in cotangents}

        outputs, pull = jax.vjp(floating, {name: inputs[name] for name in wanted})
        (gradients,) = pull(
            {name: cotangents[name].astype(outputs[name].dtype) for name in cotangents}
        )
        return outputs, gradients
