"""Every module built in torch, converted, run in JAX: equal outputs, gradients and statistics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.jax.modules import Pair, pairs

torch = pytest.importorskip("torch", reason="torch is not installed")

OUTPUT, GRADIENT = 1e-5, 1e-4


def close(got: Any, expected: Any, tolerance: float, what: str, scale: float = 1.0) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, what
    off = np.abs(got - expected).max(initial=0.0) / max(scale, np.abs(expected).max(initial=0.0))
    assert off <= tolerance, f"{what}: off by {off:.2g}"


def torch_run(pair: Pair, module: Any) -> tuple[Any, dict[str, Any], list[Any], Any]:
    """Output, parameter gradients, input gradients and cotangent in torch."""
    inputs = [torch.tensor(x, requires_grad=True) for x in pair.inputs]
    output = pair.call(module, *inputs)
    cotangent = np.random.default_rng(7).standard_normal(tuple(output.shape)).astype(np.float32)
    parameters = dict(module.named_parameters())
    wanted = [*parameters.values(), *inputs]
    gradients = torch.autograd.grad(output, wanted, torch.tensor(cotangent), allow_unused=True)
    zeros = [
        torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients, strict=True)
    ]
    named = dict(zip(parameters, zeros, strict=False))
    return output.detach().numpy(), named, [g.numpy() for g in zeros[len(named) :]], cotangent


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("pair", pairs(), ids=lambda pair: pair.name)
def test_same_as_torch(pair: Pair, training: bool) -> None:
    import ml_networks.jax
    import ml_networks.torch
    from ml_networks.convert import jax_to_torch, state_dict, torch_to_jax

    torch.manual_seed(0)
    theirs = pair.build(ml_networks.torch).train(training)
    ours = pair.build(ml_networks.jax, rngs=jax.random.key(0))
    with torch.no_grad():  # fresh statistics and affine parameters hide a swap of two of them
        for tensor in theirs.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.1 * torch.rand_like(tensor))
    torch_to_jax(theirs, ours)
    ours.train() if training else ours.eval()
    output, parameters, inputs, cotangent = torch_run(pair, theirs)

    def forward(model: Any, *arrays: Any) -> tuple[Any, Any]:
        got = pair.call(model, *arrays)
        return (got * cotangent).sum(), got

    arrays = [jnp.asarray(x) for x in pair.inputs]
    wanted = (nnx.DiffState(0, nnx.Param), *range(1, len(arrays) + 1))
    step = nnx.jit(nnx.value_and_grad(forward, argnums=wanted, has_aux=True))
    (_, got), gradients = step(ours, *arrays)
    close(got, output, OUTPUT, "output")
    for index, expected in enumerate(inputs):
        close(gradients[index + 1], expected, GRADIENT, f"gradient of input {index}")

    statistics = state_dict(ours)
    for key, value in theirs.state_dict().items():
        if "running" in key:
            close(statistics[key], value, OUTPUT, key)

    holder = pair.build(ml_networks.jax, rngs=jax.random.key(1))
    nnx.update(holder, gradients[0])
    named = state_dict(holder)
    # The bias before a batch norm has gradient 0, a sum of terms that cancel: what is left of them
    # is to be small beside the gradients that flow through.
    largest = max((float(g.abs().max()) for g in parameters.values()), default=1.0)
    for key, expected in parameters.items():
        close(named[key], expected.numpy(), GRADIENT, f"gradient of {key}", max(1.0, largest))

    back = jax_to_torch(ours, pair.build(ml_networks.torch))
    for key, value in back.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(value.numpy(), statistics[key], err_msg=key)
