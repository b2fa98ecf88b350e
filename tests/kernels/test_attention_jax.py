"""Attention in JAX: transforms, masks, dropout, derivatives, bad input. The sweep over cases and
dtypes is in ``test_conformance.py``."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, PartitionSpec  # noqa: E402

from ml_networks.kernels.attention import jax_op, reference, spec  # noqa: E402
from ml_networks.kernels.core import dispatch, pallas, registry  # noqa: E402
from ml_networks.kernels.core.errors import (  # noqa: E402
    UnknownNameError,
    UnsupportedImplementationError,
)
from ml_networks.kernels.core.problem import Problem  # noqa: E402
from ml_networks.kernels.jax import attention  # noqa: E402

NAMES = ("query", "key", "value")


def arrays(*shape: int, keys: int | None = None, key_heads: int | None = None) -> list[Any]:
    """Query, key and value; ``shape`` is the query's."""
    generator = np.random.default_rng(0)
    batch, heads, queries, width = shape
    of_keys = (batch, key_heads or heads, queries if keys is None else keys, width)
    return [
        jnp.asarray(generator.standard_normal(size), jnp.float32)
        for size in (shape, of_keys, of_keys)
    ]


def loss(query: Any, key: Any, value: Any, **options: Any) -> Any:
    output = attention(query, key, value, **options)
    return (output * jnp.sin(jnp.arange(output.size)).reshape(output.shape)).sum()


def results(inputs: list[Any], **options: Any) -> list[Any]:
    with pallas.interpret():
        output = attention(*inputs, **options)
        return [output, *jax.grad(partial(loss, **options), (0, 1, 2))(*inputs)]


def expected(inputs: list[Any], mask: Any = None, **options: Any) -> list[np.ndarray]:
    values = {n: np.asarray(x, np.float64) for n, x in zip(NAMES, inputs, strict=True)}
    if mask is not None:
        values["mask"] = np.asarray(mask)
    output = reference.forward(values, **options)["output"]
    wave = np.sin(np.arange(output.size, dtype=np.float32)).reshape(output.shape)
    gradients = reference.backward(values, {"output": wave}, **options)
    return [output, *(gradients[name] for name in NAMES)]


def assert_close(found: list[Any], exact: list[Any]) -> None:
    for mine, other in zip(found, exact, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_masks_broadcast(implementation: str) -> None:
    """Over images and queries; one for all keys hides whole rows."""
    inputs = arrays(2, 4, 5, 12, keys=7, key_heads=2)
    generator = np.random.default_rng(1)
    mask = jnp.asarray(generator.standard_normal((4, 1, 7)), jnp.float32)
    mask = jnp.where(generator.random(mask.shape) < 0.6, mask, -jnp.inf)
    found = results(inputs, mask=mask, implementation=implementation)
    assert_close(found, expected(inputs, mask))


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_rows_without_keys_are_zero(implementation: str) -> None:
    inputs = arrays(1, 2, 6, 8, keys=9)
    mask = np.ones((6, 9), bool)
    mask[2] = False
    # Every key that query 4 may see in order of time is hidden.
    mask[4, :5] = False
    options: dict[str, Any] = {"mask": jnp.asarray(mask), "causal": True}
    found = results(inputs, **options, implementation=implementation)
    assert (found[0][:, :, [2, 4]] == 0).all()
    assert (found[1][:, :, [2, 4]] == 0).all()
    assert_close(found, expected(inputs, mask, causal=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_what_accelerators_run_says_the_same(masked: bool, causal: bool) -> None:
    inputs = arrays(2, 4, 6, 8, keys=9, key_heads=2)
    mask = np.random.default_rng(1).standard_normal((1, 1, 6, 9)).astype(np.float32)
    mask = np.where(mask < 0, -np.inf, mask)
    mask[:, :, 3] = -np.inf
    given = jnp.asarray(mask) if masked else None
    problem = Problem(spec.NAME, (), "float32", ())
    call = jax_op.Call(problem, causal, 0.3, 0.0, None)
    output, pull = jax.vjp(lambda *qkv: jax_op._by_jax(*qkv, given, call), *inputs)
    wave = jnp.sin(jnp.arange(output.size)).reshape(output.shape)
    exact = expected(inputs, mask if masked else None, causal=causal, scale=0.3)
    assert_close([output, *pull(wave)], exact)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_a_seed_drops_the_same_weights_everywhere(implementation: str) -> None:
    inputs = arrays(2, 4, 20, 8, keys=35, key_heads=2)
    options: dict[str, Any] = {"dropout": 0.3, "seed": -(1 << 40) + 5}
    found = results(inputs, **options, implementation=implementation)
    assert_close(found, expected(inputs, **options))


def test_a_key_of_jax_random_seeds_dropout() -> None:
    inputs = arrays(1, 2, 6, 8)
    first, again, other = (
        jax.jit(partial(attention, dropout=0.5))(*inputs, seed=jax.random.key(number))
        for number in (0, 0, 1)
    )
    assert (first == again).all()
    assert not jnp.allclose(first, other)


@pytest.mark.parametrize("where", [0, 1, 2], ids=NAMES)
def test_nan_reaches_what_it_reaches_in_the_plain_path(where: int) -> None:
    inputs = arrays(1, 2, 18, 8)
    inputs[where] = inputs[where].at[0, 1, 3, 5].set(jnp.nan)
    with pallas.interpret():
        found = attention(*inputs, implementation="pallas")
    plain = attention(*inputs, implementation="xla")
    assert jnp.isnan(plain).any()
    assert (jnp.isnan(found) == jnp.isnan(plain)).all()


def test_transforms_of_the_kernel() -> None:
    """jit, vmap over unequal axes, scan and checkpoint, each under grad, against the plain
    path."""
    inputs = arrays(2, 2, 6, 8, keys=9)

    def batched(query: Any, key: Any, value: Any, implementation: str) -> Any:
        one = partial(loss, implementation=implementation, causal=True)
        stacked = jnp.stack([query, 0.5 * query], 2)
        mapped = jax.vmap(jax.checkpoint(one), in_axes=(2, None, None))(stacked, key, value)

        def step(carry: Any, factor: Any) -> tuple[Any, Any]:
            return carry + one(factor * query, key, value), None

        total, _ = jax.lax.scan(step, 0.0, jnp.asarray([1.0, 2.0]))
        return mapped.sum() + total

    found = []
    for implementation in ("xla", "pallas"):
        with pallas.interpret():
            of = jax.grad(partial(batched, implementation=implementation), (0, 1, 2))
            found.append(jax.jit(of)(*inputs))
    assert_close(found[1], found[0])


def test_shard_map() -> None:
    inputs = arrays(2, 2, 5, 8)
    mesh = Mesh(np.array(jax.devices()[:1]), ("batch",))
    parts = (PartitionSpec("batch"),) * 3
    with pallas.interpret():
        sharded = jax.shard_map(
            partial(attention, implementation="pallas"),
            mesh=mesh,
            in_specs=parts,
            out_specs=parts[0],
            check_vma=False,
        )
        found = jax.grad(lambda query: sharded(query, *inputs[1:]).sum())(inputs[0])
    exact = jax.grad(lambda query: attention(query, *inputs[1:]).sum())(inputs[0])
    assert_close([found], [exact])


def test_second_derivative_of_the_kernel() -> None:
    inputs = arrays(1, 2, 5, 8, keys=7)
    found = []
    for implementation in ("xla", "pallas"):

        def product(query: Any, key: Any, value: Any, of: str = implementation) -> Any:
            first = jax.grad(lambda *x: jnp.sin(attention(*x, implementation=of)).sum(), (0, 1))
            return sum(jnp.square(part).sum() for part in first(query, key, value))

        with pallas.interpret():
            found.append(jax.jit(jax.grad(product, (0, 1, 2)))(*inputs))
    for mine, other in zip(*found, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-4)


def test_the_gradient_of_a_mask() -> None:
    inputs = arrays(1, 2, 5, 8, keys=7)
    mask = jnp.asarray(np.random.default_rng(2).standard_normal((2, 5, 7)), jnp.float32)
    found = []
    for implementation in ("xla", "pallas"):
        with pallas.interpret():
            one = partial(loss, *inputs, implementation=implementation)
            found.append(jax.jit(jax.grad(lambda mask, one=one: one(mask=mask)))(mask))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert jnp.abs(found[0]).max() > 0.01


def test_float64_is_computed_in_float64() -> None:
    with jax.enable_x64(True):
        inputs = [jnp.asarray(array, jnp.float64) for array in arrays(1, 2, 5, 8, keys=7)]
        found = [attention(*inputs), *jax.grad(loss, (0, 1, 2))(*inputs)]
        assert found[0].dtype == jnp.float64
    values = dict(zip(NAMES, map(np.asarray, inputs), strict=True))
    np.testing.assert_allclose(found[0], reference.forward(values)["output"], rtol=1e-12)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("shape", [(0, 2, 4, 8, 4), (2, 2, 0, 8, 4), (2, 2, 4, 8, 0)], ids=str)
def test_nothing_in_nothing_out(shape: tuple[int, ...], implementation: str) -> None:
    found = results(arrays(*shape[:4], keys=shape[4]), implementation=implementation)
    assert found[0].shape == shape[:4]
    assert all((array == 0).all() for array in found)


def test_what_is_known_to_win_is_chosen() -> None:
    op = registry.get("attention")
    chosen = {}
    for case in op.spec.CASES:
        problem = case.problem("attention", "bfloat16")
        with pallas.lowering_for("sm_90") as chip:
            chosen[case.id] = dispatch.decide(problem, chip, op.binding("jax")).implementation
    assert chosen["causal-1024"] == chosen["image-64x64"] == "pallas"
    assert chosen["vit-small"] == chosen["one-query-2500"] == "xla"


ZEROS = np.zeros((2, 4, 3, 8), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": np.zeros((4, 3, 8), np.float32)}, ValueError, r"query has shape \(4, 3, 8\)"),
        ({"query": ZEROS.astype(np.int32)}, TypeError, "int32"),
        ({"query": ZEROS.astype(np.float16)}, TypeError, "float16"),
        ({"mask": np.ones((3, 4), bool)}, ValueError, r"mask has shape \(3, 4\)"),
        ({"mask": np.ones((3, 3), np.int32)}, TypeError, "mask .*int32"),
        ({"dropout": 1.5, "seed": 0}, ValueError, "dropout is 1.5"),
        ({"dropout": 0.5}, ValueError, "dropout needs a seed"),
        ({"implementation": "palas"}, UnknownNameError, "pallas"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"query": ZEROS, "key": ZEROS, "value": ZEROS}
    with pytest.raises(error, match=message):
        attention(**{**arguments, **change})


def test_the_kernel_says_what_it_cannot_do() -> None:
    wide = jnp.zeros((1, 1, 2, spec.MAX_WIDTH + 1))
    with pallas.interpret(), pytest.raises(UnsupportedImplementationError, match="257 features"):
        attention(wide, wide, wide, implementation="pallas")
    assert (attention(wide, wide, wide) == 0).all()
    assert jax_op.BINDING.plain == "xla"
