"""Binary spherical quantization beyond the conformance suite: brute force over all codes, the
published package's numbers, edge values, errors, and each framework's transforms.

Triton kernels run where ``TRITON_INTERPRET=1`` is set or a GPU is found.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ml_networks.kernels import explain, record_usage  # noqa: E402
from ml_networks.kernels.binary_spherical_quantize import (  # noqa: E402
    jax_op,
    reference,
    torch_op,
)
from ml_networks.kernels.core import pallas  # noqa: E402
from ml_networks.kernels.core.errors import (  # noqa: E402
    UnknownNameError,
    UnsupportedImplementationError,
)
from ml_networks.kernels.jax import binary_spherical_quantize as jax_quantize  # noqa: E402
from ml_networks.kernels.torch import binary_spherical_quantize as torch_quantize  # noqa: E402

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = ["torch", "triton"] if INTERPRETING or DEVICE == "cuda" else ["torch"]
WHOLE_INDICES, WHOLE_SAMPLE, WHOLE_CODEBOOK = [36, 45, 10, 20, 41], 2.4529645, 3.4814730
HALVES_INDICES = [[4, 4], [5, 5], [1, 2], [2, 4], [5, 1]]
HALVES_SAMPLE, HALVES_CODEBOOK = 0.5524911, 1.6198765
EVERY = [*(("torch", name) for name in TORCH), ("jax", "xla"), ("jax", "pallas")]


def run(where: tuple[str, str], features: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
    """The op in one framework and implementation, as arrays."""
    framework, implementation = where
    if framework == "torch":
        call, inputs = torch_op._call, {"features": torch.from_numpy(features).to(DEVICE)}
        outputs = call(inputs, options, implementation)
        return {name: value.cpu().numpy() for name, value in outputs.items()}
    with pallas.interpret():
        outputs = jax_op._call({"features": jnp.asarray(features)}, options, implementation)
    return {name: np.asarray(value) for name, value in outputs.items()}


def gradient(
    where: tuple[str, str], features: np.ndarray, loss: Callable[[Any], Any], **options: Any
) -> np.ndarray:
    """The gradient of ``loss(codes)`` by the features."""
    framework, implementation = where
    if framework == "torch":
        leaf = torch.from_numpy(features).to(DEVICE).requires_grad_()
        loss(torch_quantize(leaf, implementation=implementation, **options)).backward()
        return leaf.grad.cpu().numpy()

    def of_features(x: jax.Array) -> jax.Array:
        return loss(jax_quantize(x, implementation=implementation, **options))

    with pallas.interpret():
        return np.asarray(jax.grad(of_features)(jnp.asarray(features)))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal features in float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def every_corner(features: np.ndarray, temperature: float) -> np.ndarray:
    """softmax over all corners c of -temperature |z - c|^2, (tokens, 2 ** bits), in float64."""
    bits = features.shape[-1]
    signs = (np.arange(1 << bits)[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    corners = (2.0 * signs - 1.0) / np.sqrt(bits)
    z = features / np.linalg.norm(features.astype(np.float64), axis=-1, keepdims=True)
    distance = ((z[:, None, :] - corners) ** 2).sum(-1)
    weights = np.exp(-temperature * (distance - distance.min(-1, keepdims=True)))
    return weights / weights.sum(-1, keepdims=True)


def entropy(probability: np.ndarray) -> np.ndarray:
    return -(probability * np.log(np.maximum(probability, 1e-300))).sum(-1)


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_entropies_equal_brute_force_over_all_corners(where: tuple[str, str]) -> None:
    features = draw(23, 8)
    probability = every_corner(features, 7.0)
    joint = entropy(probability.mean(0))
    bits = probability.mean(0).reshape([2] * 8)
    marginals = sum(
        entropy(bits.sum(tuple(axis for axis in range(8) if axis != bit))) for bit in range(8)
    )
    halves = entropy(bits.sum((4, 5, 6, 7)).ravel()) + entropy(bits.sum((0, 1, 2, 3)).ravel())
    blocks = {1: marginals} if where[1] == "pallas" else {1: marginals, 4: halves, 8: joint}
    for block, expected in blocks.items():
        got = run(where, features, temperature=7.0, entropy_bits=block)
        np.testing.assert_allclose(got["sample_entropy"], entropy(probability), rtol=2e-6)
        np.testing.assert_allclose(got["codebook_entropy"], expected, rtol=2e-6)
    nearest = probability.argmax(-1)
    np.testing.assert_array_equal(got["indices"], nearest)


def test_a_finer_block_bounds_the_joint_entropy_from_above() -> None:
    features = draw(40, 12)
    found = [
        float(
            run(("torch", "torch"), features, temperature=9.0, entropy_bits=n)["codebook_entropy"]
        )
        for n in (1, 2, 4, 12)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1] + 0.1


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_equals_the_published_package(where: tuple[str, str]) -> None:
    """vector-quantize-pytorch 1.32.0: LFQ(dim=6, spherical=True) and with two codebooks of three
    bits, in training, inv_temperature=3, return_loss_breakdown=True."""
    features = np.sin(1.7 * np.arange(1.0, 31.0, dtype=np.float32) ** np.float32(1.1)).reshape(
        5, 6
    )
    whole = run(where, features, temperature=3.0, entropy_bits=1)
    assert whole["indices"].tolist() == WHOLE_INDICES
    assert whole["sample_entropy"].mean() == pytest.approx(WHOLE_SAMPLE, rel=1e-5)
    np.testing.assert_allclose(np.abs(whole["quantized"]), 6**-0.5, rtol=1e-6)
    halves = run(where, features, temperature=3.0, groups=2, entropy_bits=1)
    assert halves["indices"].tolist() == HALVES_INDICES
    assert halves["sample_entropy"].mean() == pytest.approx(HALVES_SAMPLE, rel=1e-5)
    if where[1] != "pallas":
        whole = run(where, features, temperature=3.0, entropy_bits=6)
        assert whole["codebook_entropy"] == pytest.approx(WHOLE_CODEBOOK, rel=1e-4)
        halves = run(where, features, temperature=3.0, groups=2, entropy_bits=3)
        assert halves["codebook_entropy"].mean() == pytest.approx(HALVES_CODEBOOK, rel=1e-4)


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_ties_are_positive_and_zero_vectors_have_no_gradient(where: tuple[str, str]) -> None:
    features = np.zeros((4, 5), np.float32)
    features[1] = [1.0, -0.0, 0.0, -2.0, 0.0]
    features[2] = [1e-13, -1e-13, 0.0, 0.0, 0.0]
    features[3] = [-3.0, 1.0, 2.0, -1.0, -1.0]
    got = run(where, features, temperature=2.0, entropy_bits=1)
    assert got["indices"].tolist() == [0b11111, 0b11101, 0b10111, 0b01100]
    np.testing.assert_allclose(got["sample_entropy"][[0, 2]], 5 * np.log(2.0), rtol=1e-6)

    def loss(codes: Any) -> Any:
        weighted = codes.quantized * (1.0 + codes.quantized)
        return weighted.sum() + codes.sample_entropy.sum() - codes.codebook_entropy

    found = gradient(where, features, loss, temperature=2.0, entropy_bits=1)
    assert np.isfinite(found).all()
    assert not found[[0, 2]].any()
    assert found[[1, 3]].any(1).all()


# The Triton interpreter computes inf * 0 in NumPy, which warns.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_nan_and_infinity_stay_in_their_vector(where: tuple[str, str]) -> None:
    features = draw(6, 5)
    features[1, 2] = np.nan
    features[4, 3] = np.inf
    got = run(where, features, entropy_bits=1)
    assert np.isnan(got["quantized"][1]).all()
    assert np.isnan(got["quantized"][4]).tolist() == [False, False, False, True, False]
    assert np.isfinite(got["quantized"][[0, 2, 3, 5]]).all()
    assert np.isnan(got["sample_entropy"]).tolist() == [False, True, False, False, True, False]
    assert np.isnan(got["codebook_entropy"])


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_no_tokens(where: tuple[str, str]) -> None:
    features = np.zeros((2, 0, 6), np.float32)
    got = run(where, features, groups=2, entropy_bits=1)
    assert got["quantized"].shape == (2, 0, 6)
    assert got["indices"].shape == got["sample_entropy"].shape == (2, 0, 2)
    assert got["codebook_entropy"].tolist() == [0.0, 0.0]

    def loss(codes: Any) -> Any:
        return codes.quantized.sum() + codes.sample_entropy.sum() + codes.codebook_entropy.sum()

    assert gradient(where, features, loss, groups=2, entropy_bits=1).shape == (2, 0, 6)


@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_leading_axes_and_groups_shape_the_results(where: tuple[str, str]) -> None:
    features = draw(2, 3, 4, 10)
    alone = run(where, features, entropy_bits=1)
    assert alone["indices"].shape == alone["sample_entropy"].shape == (2, 3, 4)
    assert alone["codebook_entropy"].shape == ()
    split = run(where, features, groups=2, entropy_bits=1)
    assert split["indices"].shape == split["sample_entropy"].shape == (2, 3, 4, 2)
    for group in range(2):
        part = run(where, features[..., 5 * group : 5 * group + 5], entropy_bits=1)
        np.testing.assert_array_equal(split["indices"][..., group], part["indices"])
        np.testing.assert_allclose(
            split["codebook_entropy"][group], part["codebook_entropy"], rtol=1e-6
        )
    one = run(where, features[0, 0, 0])
    assert one["indices"].shape == ()
    assert one["indices"] == alone["indices"][0, 0, 0]


@pytest.mark.parametrize("bits", [1, 31, 32, 33, 62, 63])
@pytest.mark.parametrize("where", EVERY, ids="-".join)
def test_indices_of_every_word_length(where: tuple[str, str], bits: int) -> None:
    features = draw(9, bits, seed=bits)
    features[0], features[1] = 1.0, -1.0
    packed = [int("".join("01"[int(x >= 0)] for x in row), 2) for row in features]
    assert run(where, features)["indices"].tolist() == packed


@pytest.mark.skipif(len(TORCH) == 1, reason="needs TRITON_INTERPRET=1 or a GPU")
@settings(max_examples=15)
@given(data=st.data())
def test_triton_equals_the_reference_for_any_shape_and_stride(data: st.DataObject) -> None:
    tokens, groups = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    block = data.draw(st.sampled_from([0, 1, 2, 3, 5, 7]))
    bits = max(block, 1) * data.draw(st.integers(1, 3))
    step, padding = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    wide = draw(tokens, groups * bits * step + padding, seed=data.draw(st.integers(0, 99)))
    rows = torch.from_numpy(wide).to(DEVICE)[:, : groups * bits * step : step]
    rows = rows.flip(0) if data.draw(st.booleans()) else rows
    options = {"groups": groups, "entropy_bits": block, "temperature": 4.0}
    got = torch_op._call({"features": rows}, options, "triton")
    exact = reference.forward({"features": rows.cpu().double().numpy()}, **options)
    for name, value in exact.items():
        found = got[name].cpu().numpy()
        if value.dtype.kind == "i":
            np.testing.assert_array_equal(found, value)
        else:
            np.testing.assert_allclose(found, value, rtol=5e-6, err_msg=name)


@pytest.mark.parametrize("implementation", TORCH)
def test_offsets_beyond_two_to_the_31(implementation: str) -> None:
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    features = memory.as_strided((3, 8), (2**30, 1))
    features.copy_(torch.from_numpy(draw(3, 8)))
    got = torch_quantize(features, implementation=implementation)
    expected = torch_quantize(features.contiguous(), implementation="torch")
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(got.quantized, expected.quantized)


BAD = [
    ({"groups": 0}, 8, "groups is 0"),
    ({"groups": 3}, 8, "groups=3 must divide"),
    ({}, 64, "use at least groups=2"),
    ({}, 0, "0 elements on its last axis"),
    ({"temperature": 0.0}, 8, "temperature is 0.0"),
    ({"temperature": float("nan")}, 8, "temperature is nan"),
    ({"entropy_bits": 3}, 8, "a code of 8 bits takes 1, 2, 4, 8"),
    ({"entropy_bits": 0}, 8, "entropy_bits is 0"),
    ({"entropy_bits": 36}, 36, "takes 1, 2, 3, 4, 6, 9, 12, 18"),
]


@pytest.mark.parametrize("quantize", [torch_quantize, jax_quantize], ids=["torch", "jax"])
@pytest.mark.parametrize(("options", "width", "message"), BAD)
def test_bad_options_are_named(
    quantize: Callable[..., Any], options: dict[str, Any], width: int, message: str
) -> None:
    features: Any = np.zeros((2, width), np.float32)
    features = torch.from_numpy(features) if quantize is torch_quantize else features
    with pytest.raises(ValueError, match=message):
        quantize(features, **options)


@pytest.mark.parametrize("quantize", [torch_quantize, jax_quantize], ids=["torch", "jax"])
def test_bad_features_and_implementations_are_named(quantize: Callable[..., Any]) -> None:
    make = torch.from_numpy if quantize is torch_quantize else jnp.asarray
    with pytest.raises(TypeError, match=r"floating-point .* .*int32"):
        quantize(make(np.zeros((2, 8), np.int32)))
    with pytest.raises(ValueError, match="no axis"):
        quantize(make(np.array(1.0, np.float32)))
    with pytest.raises(UnknownNameError, match="implementation"):
        quantize(make(np.zeros((2, 8), np.float32)), implementation="cuda")


def test_implementations_that_cannot_run_say_why() -> None:
    wide = np.zeros((2, 12), np.float32)
    with pytest.raises(UnsupportedImplementationError, match="entropy_bits=12"):
        torch_quantize(torch.from_numpy(wide), entropy_bits=12, implementation="triton")
    with pallas.interpret(), pytest.raises(UnsupportedImplementationError, match="half-codes"):
        jax_quantize(wide, entropy_bits=4, implementation="pallas")
    many = np.zeros((2, 34), np.float32)
    with pallas.interpret(), pytest.raises(UnsupportedImplementationError, match="17 groups"):
        jax_quantize(many, groups=17, entropy_bits=1, implementation="pallas")


def test_explain_and_usage_report_the_choice() -> None:
    from ml_networks.kernels.core import device

    dims, flags = {"tokens": 4096, "width": 36}, {"groups": 1, "entropy_bits": 1}
    name = "binary_spherical_quantize"
    hopper = explain(name, dims, flags=flags, device=device.TARGETS["sm_90"])
    assert hopper.implementation == "triton"
    flags["entropy_bits"] = 12
    hopper = explain(name, dims, flags=flags, device=device.TARGETS["sm_90"])
    assert hopper.implementation == "torch"
    assert "triton" in dict(hopper.against)
    tpu = explain(name, dims, framework="jax", device=device.TARGETS["tpu"])
    assert (tpu.implementation, tpu.why) == ("xla", "narrow rows leave TPU lanes idle")
    with record_usage() as usage:
        torch_quantize(torch.ones(2, 8))
        jax_quantize(jnp.ones((2, 8)), implementation="xla")
    ran = [(row.op, row.direction, row.implementation, row.calls) for row in usage.rows]
    assert (name, "forward", "xla", 1) in ran
    assert len(ran) == 2


# torch


def entropies_of(features: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    codes = torch_quantize(features, temperature=5.0, **options)
    return codes.sample_entropy, codes.codebook_entropy


@pytest.mark.parametrize(("groups", "block"), [(1, 1), (2, 3), (1, 6)])
def test_entropies_pass_gradcheck_twice(groups: int, block: int) -> None:
    features = torch.from_numpy(draw(4, 6).astype(np.float64)).requires_grad_()

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return entropies_of(x, groups=groups, entropy_bits=block)

    assert torch.autograd.gradcheck(function, (features,))
    assert torch.autograd.gradgradcheck(function, (features,))


def test_the_code_passes_the_gradient_of_the_normalised_vector() -> None:
    features = torch.from_numpy(draw(5, 7).astype(np.float64)).requires_grad_()
    weights = torch.from_numpy(draw(5, 7, seed=1).astype(np.float64))
    (straight,) = torch.autograd.grad(
        (torch_quantize(features).quantized * weights).sum(), features
    )
    unit = torch.nn.functional.normalize(features, dim=-1)
    (expected,) = torch.autograd.grad((unit * weights).sum(), features)
    torch.testing.assert_close(straight, expected)


CALLS = [(1, 0, (9, 36)), (1, 1, (9, 36)), (2, 3, (7, 12)), (1, 1, (0, 8))]


def backward_arguments(groups: int, block: int, shape: tuple[int, int]) -> tuple[Any, ...]:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    outputs = torch_op._forward_op(rows, 2.0, groups, block, None)
    cotangents = [torch.ones_like(rows, requires_grad=True)]
    for output in outputs[2:4]:
        cotangents.append(torch.ones_like(output).requires_grad_() if block else None)
    return rows, outputs[4].detach(), *cotangents, 2.0, groups, block, None


@pytest.mark.skipif(DEVICE == "cuda", reason="the plain path in the op is for a CPU")
@pytest.mark.parametrize(("groups", "block", "shape"), CALLS)
def test_custom_ops_pass_opcheck(groups: int, block: int, shape: tuple[int, int]) -> None:
    arguments = backward_arguments(groups, block, shape)
    torch.library.opcheck(torch_op._forward_op, (arguments[0], 2.0, groups, block, None))
    torch.library.opcheck(torch_op._backward_op, arguments)


@pytest.mark.parametrize(("groups", "block", "shape"), CALLS[:3])
def test_the_backward_op_equals_autograd_and_can_be_differentiated(
    groups: int, block: int, shape: tuple[int, int]
) -> None:
    rows, norms, *cotangents = backward_arguments(groups, block, shape)[:5]
    options = (2.0, groups, block)
    outputs = torch_op._plain(rows, *options)
    floats = [outputs[0], *(outputs[2:4] if block else [])]
    given = [value for value in cotangents if value is not None]
    (expected,) = torch.autograd.grad(floats, rows, given, create_graph=True)
    found = torch_op._backward_op(rows, norms, *cotangents, *options, None)
    torch.testing.assert_close(found, expected)
    wanted = [rows, *given]
    second = torch.autograd.grad(found.square().sum(), wanted)
    for got, exact in zip(
        second, torch.autograd.grad(expected.square().sum(), wanted), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(len(TORCH) == 1, reason="needs TRITON_INTERPRET=1 or a GPU")
def test_second_derivatives_where_the_cotangent_depends_on_the_features() -> None:
    def second(implementation: str) -> torch.Tensor:
        features = torch.from_numpy(draw(6, 4)).to(DEVICE).requires_grad_()
        entropies = entropies_of(features, entropy_bits=2, implementation=implementation)
        loss = entropies[0].square().sum() + entropies[1].square()
        (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), features)[0]

    torch.testing.assert_close(second("triton"), second("torch"), rtol=1e-4, atol=1e-5)


# Tracing an autograd.Function, torch._dynamo instantiates it, which torch.autograd deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("implementation", TORCH)
def test_compiles_whole_and_does_not_recompile_for_a_new_length(implementation: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    asked = None if implementation == "torch" else implementation

    def loss(x: torch.Tensor) -> torch.Tensor:
        codes = torch_quantize(x, temperature=3.0, entropy_bits=3, implementation=asked)
        total = (codes.quantized * x).sum() + codes.sample_entropy.mean()
        return total + codes.indices.sum() - codes.codebook_entropy

    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (33, 20, 57):
        eager_leaf = torch.from_numpy(draw(tokens, 6)).to(DEVICE).requires_grad_()
        leaf = eager_leaf.detach().clone().requires_grad_()
        loss(eager_leaf).backward()
        compiled(leaf).backward()
        torch.testing.assert_close(leaf.grad, eager_leaf.grad, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


def test_autocast_changes_nothing() -> None:
    features = torch.from_numpy(draw(12, 8)).to(DEVICE)
    expected = torch_quantize(features, temperature=5.0, entropy_bits=4)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = torch_quantize(features, temperature=5.0, entropy_bits=4)
    for found, value in zip(got, expected, strict=True):
        assert found.dtype == value.dtype
        assert torch.equal(found, value)


@pytest.mark.parametrize("implementation", TORCH)
def test_half_precision_keeps_its_dtype_and_exact_signs(implementation: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        features = torch.from_numpy(draw(12, 18)).to(DEVICE, dtype)
        got = torch_quantize(features, entropy_bits=1, implementation=implementation)
        assert got.quantized.dtype == dtype
        assert got.sample_entropy.dtype == got.codebook_entropy.dtype == torch.float32
        magnitude = torch.tensor(18**-0.5).to(dtype)
        assert torch.equal(got.quantized.abs().unique().cpu(), magnitude[None])


@pytest.mark.skipif(len(TORCH) == 1, reason="needs TRITON_INTERPRET=1 or a GPU")
def test_results_repeat_bit_for_bit() -> None:
    features = torch.from_numpy(draw(150, 18)).to(DEVICE).requires_grad_()
    for block in (1, 9):

        def once(block: int = block) -> tuple[torch.Tensor, torch.Tensor]:
            found = torch_quantize(features, entropy_bits=block, implementation="triton")
            total = found.codebook_entropy - found.sample_entropy.mean()
            return total, torch.autograd.grad(total, features)[0]

        first, second = once(), once()
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# JAX


def jax_loss(features: jax.Array, implementation: str) -> jax.Array:
    codes = jax_quantize(
        features, temperature=5.0, groups=2, entropy_bits=1, implementation=implementation
    )
    weights = jnp.arange(codes.quantized.size).reshape(codes.quantized.shape) / 7.0
    total = (jnp.sin(weights) * codes.quantized).sum() + codes.sample_entropy.sum()
    return total - 3.0 * codes.codebook_entropy.sum()


def test_pallas_goes_through_every_transform() -> None:
    features = jnp.asarray(draw(3, 21, 10))
    cases: list[Callable[[Any], Any]] = [
        lambda f: jax.jit(jax.vmap(jax.grad(f)))(features),
        lambda f: jax.jit(jax.grad(lambda x: jax.vmap(f, in_axes=1)(x).sum()))(features),
        lambda f: jax.jit(jax.grad(jax.checkpoint(f)))(features),
        lambda f: jax.jit(jax.grad(lambda x: jax.lax.scan(_step(f), 0.0, x)[0]))(features),
        lambda f: jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2)))(features[0]),
        lambda f: jax.jit(jax.jacrev(lambda x: jnp.stack([f(x), 2.0 * f(x)])))(features[1]),
    ]
    for number, case in enumerate(cases):
        expected = case(lambda x: jax_loss(x, "xla"))
        with pallas.interpret():
            got = case(lambda x: jax_loss(x, "pallas"))
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(got, expected, atol=3e-6 * scale, err_msg=str(number))


def _step(function: Callable[[Any], Any]) -> Callable[[Any, Any], tuple[Any, None]]:
    return lambda carry, x: (carry + function(x), None)


def test_pallas_runs_inside_shard_map() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tokens",))
    spec = jax.sharding.PartitionSpec("tokens")
    features = jnp.asarray(draw(24, 6))

    def codes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = jax_quantize(x, implementation="pallas")
        return found.quantized, found.indices

    sharded = jax.shard_map(codes, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    with pallas.interpret():
        quantized, indices = jax.jit(sharded)(features)
    expected = jax_quantize(features, implementation="xla")
    np.testing.assert_array_equal(indices, expected.indices)
    np.testing.assert_allclose(quantized, expected.quantized, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_index_types_in_jax(implementation: str) -> None:
    with pallas.interpret():
        narrow = jax_quantize(draw(4, 31), implementation=implementation).indices
        wide = jax_quantize(draw(4, 36), implementation=implementation).indices
        with jax.enable_x64(True):
            exact = jax_quantize(draw(4, 36), implementation=implementation).indices
            small = jax_quantize(draw(4, 31), implementation=implementation).indices
    assert (narrow.dtype, narrow.shape) == (jnp.int32, (4,))
    assert (wide.dtype, wide.shape) == (jnp.uint32, (4, 2))
    assert (exact.dtype, exact.shape) == (jnp.int64, (4,))
    assert small.dtype == jnp.int64
    words = np.asarray(wide).astype(np.int64)
    np.testing.assert_array_equal(words[:, 0] << 32 | words[:, 1], exact)
    np.testing.assert_array_equal(small, narrow)


def test_float64_in_jax_keeps_its_precision() -> None:
    features = draw(20, 9).astype(np.float64)
    exact = reference.forward({"features": features}, temperature=4.0, entropy_bits=9)
    with jax.enable_x64(True):
        got = jax_quantize(features, temperature=4.0, entropy_bits=9)
    for name, value in exact.items():
        np.testing.assert_allclose(getattr(got, name), value, rtol=1e-13, err_msg=name)


def test_torch_and_jax_agree() -> None:
    features = draw(50, 36)
    options: dict[str, Any] = {"temperature": 30.0, "groups": 2, "entropy_bits": 9}
    left = run(("torch", "torch"), features, **options)
    right = run(("jax", "xla"), features, **options)
    np.testing.assert_array_equal(left["indices"], right["indices"])
    for name in ("quantized", "sample_entropy", "codebook_entropy"):
        np.testing.assert_allclose(left[name], right[name], rtol=5e-6, err_msg=name)
