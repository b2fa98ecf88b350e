"""Activations and dropout as kernels compute them: each framework's against NumPy in float64, and
NumPy's against torch's modules and JAX's own Threefry."""

from __future__ import annotations

import os

import numpy as np
import pytest

from ml_networks.kernels.core import activations, device, dropout, pallas
from ml_networks.kernels.core.errors import UnknownNameError

torch = pytest.importorskip("torch", reason="torch is not installed")
triton = pytest.importorskip("triton", reason="triton is not installed")
jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402
import triton.language as tl  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.extend.random import threefry_2x32  # noqa: E402

from ml_networks.kernels.core import (  # noqa: E402
    ahead_of_time,
    jax_functions,
    torch_functions,
    triton_functions,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = sorted(activations.ELEMENTWISE)
SIXTH = 4e-8
"""torch's derivative of Hardsigmoid is 1 / 6 in float32, also of float64."""
KINKS = np.array([-6.0, -3.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 3.0, 5.0, 6.0, 20.0])
SPREAD = np.concatenate(
    [KINKS, np.linspace(-30.0, 30.0, 201), np.geomspace(1e-6, 1.0, 60), -np.geomspace(1e-6, 9, 99)]
)


def float32_spread() -> np.ndarray:
    padded = np.zeros(512, np.float32)
    padded[: SPREAD.size] = SPREAD
    return padded


def assert_close(got: np.ndarray, exact: np.ndarray, name: str, x: np.ndarray) -> None:
    """Within some roundings of each element itself, or of the terms that cancel in it: near its
    root a slope is a difference of numbers of about a tenth."""
    cancels = np.abs(x) if name == "Tanhshrink" else np.where(np.abs(exact) < 0.02, 0.1, 0.0)
    off = np.abs(got - exact) / (np.abs(exact) + np.where(np.abs(x) < 3, cancels, 0) + 1e-12)
    assert off.max() < 2e-6, (name, x[off.argmax()], got[off.argmax()], exact[off.argmax()])


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_torch(name: str) -> None:
    from ml_networks.torch.activations import Activation

    x = torch.from_numpy(SPREAD).requires_grad_()
    value = Activation(name)(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    exact = activations.ELEMENTWISE[name](SPREAD)
    np.testing.assert_allclose(value.detach().numpy(), exact[0], rtol=1e-12, atol=1e-14)
    rtol = SIXTH if name == "Hardsigmoid" else 1e-11
    np.testing.assert_allclose(slope.numpy(), exact[1], rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("name", activations.NAMES)
def test_plain_paths(name: str) -> None:
    spread = SPREAD.reshape(-1, 6)
    cotangent = np.random.default_rng(0).standard_normal(activations.apply(name, spread).shape)
    exact = activations.apply(name, spread), activations.pull_back(name, spread, cotangent)

    x = torch.from_numpy(spread).requires_grad_()
    value = torch_functions.apply(name, x)
    (gradient,) = torch.autograd.grad(value, x, torch.from_numpy(cotangent))
    np.testing.assert_allclose(value.detach().numpy(), exact[0], rtol=1e-12, atol=1e-14)
    rtol = SIXTH if name == "Hardsigmoid" else 1e-11
    np.testing.assert_allclose(gradient.numpy(), exact[1], rtol=rtol, atol=1e-14)
    pulled = torch_functions.pull_back(name, x.detach(), torch.from_numpy(cotangent))
    np.testing.assert_allclose(pulled.numpy(), exact[1], rtol=rtol, atol=1e-14)

    given = jnp.asarray(spread, jnp.float32)
    value, pull = jax.vjp(lambda x: jax_functions.apply(name, x), given)
    (gradient,) = pull(jnp.asarray(cotangent, jnp.float32))
    for got, expected in zip((value, gradient), exact, strict=True):
        np.testing.assert_allclose(np.asarray(got), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_jax_functions(name: str) -> None:
    x = jnp.asarray(SPREAD, jnp.float32)
    exact = activations.ELEMENTWISE[name](np.asarray(x, np.float64))
    for got, expected in zip(jax_functions.ACTIVATIONS[name](x), exact, strict=True):
        assert_close(np.asarray(got, np.float64), expected, name, SPREAD)


@pytest.mark.parametrize("target", ["sm_90", "tpu"])
def test_jax_functions_lower(target: str) -> None:
    def kernel(source, result):  # type: ignore[no-untyped-def]
        x = source[...]
        for name in NAMES:
            value, slope = jax_functions.ACTIVATIONS[name](x)
            x = value + slope
        row = jax.lax.broadcasted_iota(jnp.int32, (8, 1), 0)
        column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        keys = jax_functions.dropout_row_keys((jnp.uint32(1), jnp.uint32(2)), row)
        result[...] = jnp.where(jax_functions.dropout_keeps(*keys, column, 9), x, 0.0)

    def run(x):  # type: ignore[no-untyped-def]
        block = pl.BlockSpec((8, 128), lambda i: (i, 0))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        call = pallas.call(kernel, out_shape=shape, grid=(1,), in_specs=[block], out_specs=block)
        return call(x)

    text = pallas.lower(run, jax.ShapeDtypeStruct((8, 128), jnp.float32), target_name=target)
    assert "custom_call" in text


@triton.jit
def _activation_kernel(source, value, slope, NAME: tl.constexpr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    y, dy = triton_functions.activation(tl.load(source + place), NAME)
    tl.store(value + place, y)
    tl.store(slope + place, dy)


@triton.jit
def _chain_kernel(source, result, seed, threshold, NAMES: tl.constexpr, COUNT: tl.constexpr):
    """All activations one after another, and dropout: compiled, not run."""
    place = tl.arange(0, COUNT)
    x = tl.load(source + place)
    for index in tl.static_range(len(NAMES)):
        y, dy = triton_functions.activation(x, NAMES[index])
        x = y + dy
    k0, k1 = triton_functions.dropout_row_keys(tl.load(seed), place.to(tl.int64))
    keeps = triton_functions.dropout_keeps(k0, k1, place, threshold)
    tl.store(result + place, tl.where(keeps, x, 0.0))


@triton.jit
def _bits_kernel(seed, result, first, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = first + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    k0, k1 = triton_functions.dropout_row_keys(tl.load(seed), row)
    keeps = triton_functions.dropout_keeps(k0[:, None], k1[:, None], column[None, :], threshold)
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + column[None, :]
    tl.store(result + place, keeps.to(tl.int32))


needs_interpreter = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()),
    reason="Triton kernels run under TRITON_INTERPRET=1 or on a GPU",
)
PLACE = "cuda" if torch.cuda.is_available() else "cpu"


@needs_interpreter
@pytest.mark.parametrize("name", NAMES)
def test_triton_functions(name: str) -> None:
    x = float32_spread()
    x[-1] = np.nan
    value, slope = torch.empty(2, 512, device=PLACE)
    source = torch.from_numpy(x).to(PLACE)
    _activation_kernel[(1,)](source, value, slope, NAME=name, COUNT=512)
    assert value[-1].isnan()
    exact = activations.ELEMENTWISE[name](x[:-1].astype(np.float64))
    for got, expected in zip((value, slope), exact, strict=True):
        assert_close(got.cpu().double().numpy()[:-1], expected, name, x[:-1])


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: this process cannot compile kernels")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_triton_functions_compile(target: str) -> None:
    types = {"source": "*fp32", "result": "*fp32", "seed": "*i64", "threshold": "i32"}
    compilation = ahead_of_time.Compilation(
        _chain_kernel,
        {**types, "NAMES": "constexpr", "COUNT": "constexpr"},
        {"NAMES": tuple(NAMES), "COUNT": 128},
    )
    found = ahead_of_time.compile_for(compilation, device.target(target))
    assert found.clean, found.complaints


def test_threefry_is_the_one_of_jax() -> None:
    counters = np.random.default_rng(0).integers(0, 1 << 32, (2, 64)).astype(np.uint32)
    for key in ((0, 0), (0x13198A2E, 0x03707344), (0xFFFFFFFF, 0xFFFFFFFF)):
        pair = jnp.asarray(key, jnp.uint32)
        expected = np.asarray(threefry_2x32(pair, jnp.asarray(counters)))
        assert np.array_equal(np.stack(dropout.threefry(key, *counters)), expected)


@pytest.mark.parametrize("seed", [0, 7, -1, 1 << 40, -(1 << 62)])
def test_all_frameworks_draw_the_same_mask(seed: int) -> None:
    exact = dropout.scale(0.3, seed, 9, 130)
    got = torch_functions.dropout_scale(0.3, seed, 9, 130, torch.device("cpu"), torch.float64)
    np.testing.assert_allclose(got.numpy(), exact, rtol=1e-15)
    words = jax_functions.seed_words(seed)
    np.testing.assert_allclose(jax_functions.dropout_scale(0.3, words, 9, 130), exact, rtol=1e-6)


@needs_interpreter
@pytest.mark.parametrize(("seed", "first"), [(0, 0), (-3, 0), (1 << 40, 0), (5, (1 << 33) + 4)])
def test_triton_draws_the_same_mask(seed: int, first: int) -> None:
    result = torch.empty(8, 64, dtype=torch.int32, device=PLACE)
    limit = dropout.threshold(0.25)
    seeds = torch.tensor([seed], device=PLACE)
    _bits_kernel[(1,)](seeds, result, first, limit, ROWS=8, COLUMNS=64)
    row = first + np.arange(8, dtype=np.uint64)
    high = (row >> np.uint64(32)).astype(np.uint32)
    keys = dropout.threefry(dropout.words(seed), row.astype(np.uint32), high)
    bits = dropout.column_bits(*keys, 64)
    assert np.array_equal(result.cpu().numpy(), bits >> np.uint32(8) >= limit)


def test_the_bits_look_random() -> None:
    bits = dropout.random_bits(11, 512, 512)
    ones = np.unpackbits(bits.view(np.uint8)).reshape(512, 512, 32) * 2.0 - 1.0
    bound = 5.5 / np.sqrt(512 * 512)
    assert np.abs(ones.mean((0, 1))).max() < bound
    for shifted in (np.roll(ones, 1, 0), np.roll(ones, 1, 1), np.roll(ones, 1, 2)):
        assert np.abs((ones * shifted).mean((0, 1))).max() < bound
    other = np.unpackbits(dropout.random_bits(12, 512, 512).view(np.uint8)).reshape(ones.shape)
    assert np.abs((ones * (other * 2.0 - 1.0)).mean((0, 1))).max() < bound
    rows = ones[..., 0]
    assert np.abs(np.corrcoef(rows) - np.eye(512)).max() < 6.0 / np.sqrt(512)
    share = (bits >> np.uint32(8) < dropout.threshold(0.1)).mean()
    assert abs(share - 0.1) < 5 * np.sqrt(0.09 / bits.size)


def test_seeds_of_jax() -> None:
    def mask(seed):  # type: ignore[no-untyped-def]
        return jax_functions.dropout_scale(0.5, jax_functions.seed_words(seed), 4, 32)

    assert np.array_equal(mask(-5), mask(jnp.int32(-5)))
    assert np.array_equal(mask(7), mask(jnp.array([7, 0], jnp.uint32)))
    assert not np.array_equal(mask(jax.random.key(0)), mask(jax.random.key(1)))
    with pytest.raises(ValueError, match="float32"):
        mask(jnp.ones(2))


def test_an_unknown_activation_is_answered_with_the_nearest() -> None:
    activations.check_name("SwiGLU")
    with pytest.raises(UnknownNameError, match="SiLU"):
        activations.check_name("Silu")


def test_a_dropout_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="dropout is 1"):
        dropout.check_probability(1)
