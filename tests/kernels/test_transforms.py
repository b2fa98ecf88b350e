"""What users of attention, the low-rank and the linear-norm ops wrap around them: ``torch.func``,
batched gradients, and the transforms of JAX.

Triton kernels run where ``TRITON_INTERPRET=1`` is set or a GPU is found.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ml_networks.kernels import torch as ops  # noqa: E402
from ml_networks.kernels.core import usage  # noqa: E402

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = ["torch", "triton"] if INTERPRETING or DEVICE == "cuda" else ["torch"]
each = pytest.mark.parametrize("implementation", TORCH)
FOLDED = "folded into one launch"
PLAIN = "example by example, by the plain path"

Axes = tuple[int | None, ...]


def draw(*shape: int, seed: int = 0) -> Any:
    return torch.from_numpy(np.random.default_rng((seed, *shape)).normal(size=shape)).float()


def attention(mask: Any, *tensors: Any, **options: Any) -> Any:
    return ops.attention(*tensors, mask=mask, **options)


def lora(*tensors: Any, **options: Any) -> Any:
    return ops.lora_linear(*tensors, scale=0.5, **options)


def norm(*tensors: Any, **options: Any) -> Any:
    return ops.norm_activation(*tensors, norm="layer", activation="GELU", **options)


def linear_norm(*tensors: Any, **options: Any) -> Any:
    return ops.linear_norm_activation(*tensors, norm="rms", activation="SiLU", **options)


HYPER = ((4, 9), (7, 9), (7,), (4, 2), (1, 2), (1,), (21, 2), (21,), (27, 2), (27,))
ADAPTED = ((4, 9), (7, 9), (7,), (7, 3), (9, 3))
HEADS = ((2, 4, 5, 6), (2, 2, 7, 6), (2, 2, 7, 6))
LINEAR = ((4, 9), (8, 9), (8,), (8,), (8,), (4, 8))

CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], Axes, str]] = {
    "attention": (attention, ((5, 7), *HEADS), (None, 0, 3, 1), FOLDED),
    "attention-of-one-query": (attention, ((2, 1, 1, 7), *HEADS), (None, 1, None, None), FOLDED),
    "attention-with-masks": (attention, ((5, 7), *HEADS), (1, None, 0, 2), FOLDED),
    "norm": (norm, ((4, 9), (9,), (9,), (4, 9)), (1, None, None, None), FOLDED),
    "norm-of-own-weights": (norm, ((4, 9), (9,), (9,)), (0, 1, None), PLAIN),
    "linear-norm": (linear_norm, LINEAR, (2, None, None, None, None, 0), FOLDED),
    "linear-norm-of-own-bias": (linear_norm, LINEAR, (0, None, 1, None, None, None), PLAIN),
    "lora": (lora, ADAPTED, (1, None, None, None, None), FOLDED),
    "lora-with-gates": (lora, (*ADAPTED, (4, 3)), (0, None, None, None, None, 1), FOLDED),
    "lora-with-shared-gates": (lora, (*ADAPTED, (4, 3)), (0, *(None,) * 5), FOLDED),
    "lora-of-own-adapters": (lora, (*ADAPTED, (1, 3)), (0, None, None, 2, 0, 0), FOLDED),
    "lora-of-own-weights": (lora, ADAPTED, (0, 1, 0, None, None), PLAIN),
    "hyper": (
        lambda *tensors, **options: ops.hyper_lora_linear(*tensors, **options),
        HYPER,
        (1, None, None, 0, *(None,) * 6),
        FOLDED,
    ),
    "hyper-of-own-generators": (
        lambda *tensors, **options: ops.hyper_lora_linear(*tensors, **options),
        HYPER,
        (0, *(None,) * 5, 1, 0, None, None),
        PLAIN,
    ),
}


def inputs_of(case: str) -> tuple[Callable[..., Any], list[Any], Axes]:
    """The function, its tensors with the mapped axis of length 3 in its place, and the axes."""
    function, shapes, axes, _ = CASES[case]
    tensors = []
    for index, (shape, axis) in enumerate(zip(shapes, axes, strict=True)):
        full = list(shape)
        if axis is not None:
            full.insert(axis, 3)
        tensors.append(draw(*full, seed=index).to(DEVICE))
    return function, tensors, axes


def one_by_one(function: Callable[..., Any], tensors: list[Any], axes: Axes) -> Any:
    def example(index: int) -> list[Any]:
        pairs = zip(tensors, axes, strict=True)
        return [x if axis is None else x.select(axis, index) for x, axis in pairs]

    return torch.stack([function(*example(index)) for index in range(3)])


@each
@pytest.mark.parametrize("case", CASES)
def test_vmap_over_unequal_axes(case: str, implementation: str) -> None:
    function, tensors, axes = inputs_of(case)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    if function is attention:  # a mask that learns has no kernel
        leaves = leaves[1:]
        tensors[0].requires_grad_(False)

    def call(*tensors: Any) -> Any:
        return function(*tensors, implementation=implementation)

    with usage.record() as used:
        y = torch.func.vmap(call, axes)(*tensors)
    rows = [row for row in used.rows if row.implementation == "triton"]
    if implementation == "triton":
        assert sum(row.calls for row in rows) == (CASES[case][3] == FOLDED)
    expected = one_by_one(
        lambda *tensors: function(*tensors, implementation="torch"), tensors, axes
    )
    torch.testing.assert_close(y, expected)
    cotangent = draw(*y.shape, seed=9).to(DEVICE)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent),
        rtol=1e-4,
        atol=1e-5,
    )


@each
@pytest.mark.parametrize("case", ["attention", "norm", "linear-norm", "lora", "hyper"])
def test_other_transforms_of_torch_func(case: str, implementation: str) -> None:
    function, tensors, axes = inputs_of(case)
    first = 1 if function is attention else 0

    def size(*tensors: Any) -> Any:
        return function(*tensors, implementation=implementation).square().sum()

    def mapped(*tensors: Any) -> Any:
        return torch.func.vmap(size, axes)(*tensors).sum()

    each = torch.func.vmap(torch.func.grad(size, first), axes)(*tensors)
    whole = torch.func.grad(mapped, first)(*tensors)
    leaf = tensors[first].requires_grad_()
    expected = torch.autograd.grad(one_by_one(size, tensors, axes).sum(), leaf)[0]
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(each, expected.movedim(axes[first] or 0, 0), rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("case", ["attention", "norm", "linear-norm", "lora", "hyper"])
def test_batched_gradients(case: str, implementation: str) -> None:
    function, shapes, _, _ = CASES[case]
    tensors = [draw(*shape, seed=index).to(DEVICE) for index, shape in enumerate(shapes)]
    leaves = [tensor.requires_grad_() for tensor in tensors[function is attention :]]
    y = function(*tensors, implementation=implementation)
    cotangents = draw(2, *y.shape).to(DEVICE)
    together = torch.autograd.grad(y, leaves, cotangents, retain_graph=True, is_grads_batched=True)
    for index, cotangent in enumerate(cotangents):
        alone = torch.autograd.grad(y, leaves, cotangent, retain_graph=True)
        torch.testing.assert_close([x[index] for x in together], list(alone))
