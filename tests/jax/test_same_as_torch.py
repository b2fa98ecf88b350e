"""Every module built in torch, converted, run in JAX: equal outputs, gradients and statistics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.jax.conftest import HAS_TORCH, Arrays
from tests.jax.modules import Pair, pairs

OUTPUT, GRADIENT = 1e-5, 1e-4
pytestmark = pytest.mark.usefixtures("quick_compilation")


def close(got: Any, expected: Any, tolerance: float, what: str, scale: float = 1.0) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, what
    off = np.abs(got - expected).max(initial=0.0) / max(scale, np.abs(expected).max(initial=0.0))
    assert off <= tolerance, f"{what}: off by {off:.2g}"


def torch_run(pair: Pair, training: bool) -> Arrays:
    """Weights, output, its cotangent, gradients, and what is in the state afterwards."""
    import torch

    import ml_networks.torch

    torch.manual_seed(0)
    module = pair.build(ml_networks.torch).train(training)
    with torch.no_grad():  # fresh statistics and affine parameters hide a swap of two of them
        for tensor in module.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.1 * torch.rand_like(tensor))
    found = {f"weights/{key}": value.numpy().copy() for key, value in module.state_dict().items()}
    inputs = [torch.tensor(x, requires_grad=True) for x in pair.inputs]
    output = pair.call(module, *inputs)
    cotangent = np.random.default_rng(7).standard_normal(tuple(output.shape)).astype(np.float32)
    parameters = dict(module.named_parameters())
    wanted = [*parameters.values(), *inputs]
    gradients = torch.autograd.grad(output, wanted, torch.tensor(cotangent), allow_unused=True)
    names = [
        *(f"gradient/{key}" for key in parameters),
        *(f"input/{i}" for i in range(len(inputs))),
    ]
    for name, x, gradient in zip(names, wanted, gradients, strict=True):
        found[name] = (torch.zeros_like(x) if gradient is None else gradient).numpy()
    after = {f"after/{key}": value.numpy() for key, value in module.state_dict().items()}
    return {**found, **after, "output": output.detach().numpy(), "cotangent": cotangent}


def part(arrays: Arrays, name: str) -> Arrays:
    return {
        key.removeprefix(f"{name}/"): array
        for key, array in arrays.items()
        if key.startswith(f"{name}/")
    }


CASES = [
    pytest.param(pair, training, id=f"{pair.name}-{'train' if training else 'eval'}")
    for pair in pairs()
    for training in pair.modes
]


# torch's vmap over its attention, in a hypernetwork's target.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(("pair", "training"), CASES)
def test_same_as_torch(pair: Pair, training: bool, from_torch: Any) -> None:
    import ml_networks.jax
    from ml_networks.convert import jax_to_torch, state_dict, torch_to_jax

    theirs = from_torch(lambda: torch_run(pair, training))
    weights, cotangent = part(theirs, "weights"), theirs["cotangent"]
    ours = pair.build(ml_networks.jax, rngs=jax.random.key(0))
    torch_to_jax(weights, ours)
    ours.train() if training else ours.eval()

    def forward(model: Any, *arrays: Any) -> tuple[Any, Any]:
        got = pair.call(model, *arrays)
        return (got * cotangent).sum(), got

    arrays = [jnp.asarray(x) for x in pair.inputs]
    wanted = (nnx.DiffState(0, nnx.Param), *range(1, len(arrays) + 1))
    step = nnx.jit(nnx.value_and_grad(forward, argnums=wanted, has_aux=True))
    (_, got), gradients = step(ours, *arrays)
    close(got, theirs["output"], OUTPUT, "output")
    for index, expected in part(theirs, "input").items():
        close(gradients[int(index) + 1], expected, GRADIENT, f"gradient of input {index}")

    state = state_dict(ours)
    for key, value in part(theirs, "after").items():
        if "running" in key:
            close(state[key], value, OUTPUT, key)
        elif not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(state[key], weights[key], err_msg=key)

    holder = nnx.clone(ours)
    nnx.update(holder, gradients[0])
    named = state_dict(holder)
    # The bias before a batch norm has gradient 0, a sum of terms that cancel: what is left of them
    # is to be small beside the gradients that flow through.
    parameters = part(theirs, "gradient")
    largest = max((float(np.abs(g).max()) for g in parameters.values()), default=1.0)
    for key, expected in parameters.items():
        close(named[key], expected, GRADIENT, f"gradient of {key}", max(1.0, largest))

    if HAS_TORCH:
        import ml_networks.torch

        back = jax_to_torch(ours, pair.build(ml_networks.torch))
        for key, value in back.state_dict().items():
            if not key.endswith("num_batches_tracked"):
                np.testing.assert_array_equal(value.numpy(), state[key], err_msg=key)
