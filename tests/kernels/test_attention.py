"""Attention in torch: masks, alignment, dropout, derivatives, layouts, bad input, compilation. The
sweep over cases, dtypes and layouts is in ``test_conformance.py``."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ml_networks.kernels import record_usage, use_implementation  # noqa: E402
from ml_networks.kernels.attention import reference, spec, torch_op  # noqa: E402
from ml_networks.kernels.attention.spec import Config  # noqa: E402
from ml_networks.kernels.core import device, dispatch, registry  # noqa: E402
from ml_networks.kernels.core.errors import (  # noqa: E402
    UnknownNameError,
    UnsupportedImplementationError,
)
from ml_networks.kernels.torch import attention  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()),
    reason="the Triton kernel needs a GPU, or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=interpreted)]


def tensors(
    *shape: int, keys: int | None = None, key_heads: int | None = None, dtype: Any = torch.float32
) -> tuple[Any, Any, Any]:
    """Query, key and value; ``shape`` is the query's."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, queries, width = shape
    of_keys = (batch, key_heads or heads, queries if keys is None else keys, width)
    drawn = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in (shape, of_keys, of_keys)
    )
    return tuple(tensor.to(DEVICE, dtype).requires_grad_() for tensor in drawn)


def results(query: Any, key: Any, value: Any, **options: Any) -> list[Any]:
    """The output and the three gradients, for a gradient of the output that has no order."""
    output = attention(query, key, value, **options)
    wave = torch.arange(output.numel(), device=output.device, dtype=output.dtype).sin()
    gradients = torch.autograd.grad(output, (query, key, value), wave.view(output.shape))
    return [output.detach(), *gradients]


def expected(
    query: Any, key: Any, value: Any, mask: Any = None, **options: Any
) -> list[np.ndarray]:
    names = ("query", "key", "value")
    inputs = {
        name: tensor.detach().double().cpu().numpy()
        for name, tensor in zip(names, (query, key, value), strict=True)
    }
    if mask is not None:
        inputs["mask"] = mask.detach().cpu().numpy()
    output = reference.forward(inputs, **options)["output"]
    wave = np.sin(np.arange(output.size, dtype=np.float32)).astype(np.float64)
    gradients = reference.backward(inputs, {"output": wave.reshape(output.shape)}, **options)
    return [output, *(gradients[name] for name in names)]


def assert_close(found: list[Any], exact: list[np.ndarray]) -> None:
    for mine, other in zip(found, exact, strict=True):
        np.testing.assert_allclose(mine.double().cpu().numpy(), other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("shape", [(), (7,), (5, 7), (1, 1, 1, 7), (2, 1, 5, 1), (1, 4, 1, 7)])
def test_masks_broadcast(shape: tuple[int, ...], additive: bool, implementation: str) -> None:
    inputs = tensors(2, 4, 5, 12, keys=7, key_heads=2)
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(shape, generator=generator) < 0.6).to(DEVICE)
    if additive:
        noise = torch.randn(shape, generator=generator).to(DEVICE)
        mask = noise.masked_fill(~mask, -torch.inf)
    found = results(*inputs, mask=mask, implementation=implementation)
    assert_close(found, expected(*inputs, mask=mask))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_rows_without_keys_are_zero(causal: bool, implementation: str) -> None:
    inputs = tensors(1, 2, 6, 8, keys=9)
    mask = torch.ones(6, 9, dtype=torch.bool, device=DEVICE)
    mask[2] = False
    # Every key that query 4 may see in order of time is hidden.
    mask[4, :5] = False
    options: dict[str, Any] = {"causal": causal, "implementation": implementation}
    output, of_query, *others = results(*inputs, mask=mask, **options)
    empty = [2, 4] if causal else [2]
    assert (output[:, :, empty] == 0).all()
    assert (of_query[:, :, empty] == 0).all()
    assert all(gradient.isfinite().all() for gradient in others)
    assert_close([output, of_query, *others], expected(*inputs, mask=mask, causal=causal))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("queries", "keys"), [(5, 40), (40, 5)])
def test_causal_counts_from_the_start(queries: int, keys: int, implementation: str) -> None:
    inputs = tensors(1, 2, queries, 8, keys=keys)
    found = results(*inputs, causal=True, implementation=implementation)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=DEVICE).tril()
    assert_close(found, expected(*inputs, mask=seen))
    torch.testing.assert_close(found[0][:, :, 0], inputs[2][:, :, 0])


@interpreted
@pytest.mark.parametrize("width", [8, 80, 136, 256])
def test_widths(width: int) -> None:
    inputs = tensors(1, 2, 17, width)
    assert_close(results(*inputs, implementation="triton"), expected(*inputs))


@interpreted
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_split_keys(causal: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts of 16 keys; the last has 5, and a row may have none in a part, or none."""
    from ml_networks.kernels.attention import triton_kernel

    monkeypatch.setattr(triton_kernel, "_splits", lambda *_: (3, 16))
    monkeypatch.setattr(spec, "config", lambda *_: Config(16, 16, 4, 1))
    inputs = tensors(2, 2, 3, 12, keys=37, key_heads=1)
    mask = torch.ones(3, 37, dtype=torch.bool, device=DEVICE)
    mask[0, 16:32] = False
    mask[1] = False
    mask = mask if masked else None
    dispatch._decide.cache_clear()
    found = results(*inputs, mask=mask, causal=causal, implementation="triton")
    assert_close(found, expected(*inputs, mask=mask, causal=causal))
    dispatch._decide.cache_clear()


@interpreted
@pytest.mark.parametrize("widest", [0, 128])
@pytest.mark.parametrize("kind", ["causal", "boolean", "additive", "dropout"])
def test_short_sequences_with_one_kernel_backward_and_with_two(
    kind: str, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml_networks.kernels.attention import triton_kernel

    monkeypatch.setattr(triton_kernel, "_WIDEST_BLOCK", widest)
    inputs = tensors(2, 3, 20, 12, keys=27)
    options: dict[str, Any] = {"causal": kind == "causal"}
    if kind == "dropout":
        options |= {"dropout": 0.3, "seed": 11}
    elif kind != "causal":
        bias = torch.randn(2, 1, 20, 27, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        options["mask"] = bias if kind == "additive" else bias > 0
    found = results(*inputs, **options, implementation="triton")
    assert_close(found, expected(*inputs, **options))


def test_one_kernel_backward_where_the_scores_of_a_head_are_one_block() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from ml_networks.kernels.attention import triton_kernel

    def launched(name: str, dtype: str, target: str = "sm_90") -> list[str]:
        (case,) = (case for case in spec.CASES if case.id == name)
        problem, chip = case.problem("attention", dtype, "backward"), device.target(target)
        config = spec.config(problem, chip, "triton")
        return [c.kernel.__name__ for c in triton_kernel.compilations(problem, config, chip)]

    two = ["query_gradient_kernel", "key_gradient_kernel"]
    assert launched("image-8x8", "bfloat16") == ["short_gradient_kernel"]
    assert launched("image-8x8", "float32") == ["short_gradient_kernel"]
    assert launched("image-8x8", "float32", "sm_80") == two  # would spill
    assert launched("image-16x16", "bfloat16") == two
    assert launched("causal-1024", "bfloat16") == two


def test_keys_are_split_where_the_device_would_idle() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from ml_networks.kernels.attention import triton_kernel

    h100 = device.target("sm_90")
    splits, each = triton_kernel._splits(8, 2500, h100)
    assert splits > 1
    assert (splits - 1) * each < 2500 <= splits * each
    assert triton_kernel._splits(512, 2500, h100)[0] == 1
    assert triton_kernel._splits(1, 300, h100)[0] == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_seed_drops_the_same_weights_everywhere(implementation: str) -> None:
    inputs = tensors(2, 4, 20, 8, keys=35, key_heads=2)
    options: dict[str, Any] = {"dropout": 0.3, "seed": -(1 << 40) + 5, "causal": True}
    found = results(*inputs, **options, implementation=implementation)
    assert_close(found, expected(*inputs, **options))
    other = attention(*inputs, **{**options, "seed": 6}, implementation=implementation)
    assert not torch.allclose(found[0], other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_draws_from_the_generator(implementation: str) -> None:
    query, key, _ = tensors(1, 2, 16, 16)
    value = torch.eye(16, device=DEVICE).expand(1, 2, 16, 16)
    options: dict[str, Any] = {"dropout": 0.5, "implementation": implementation}
    torch.manual_seed(0)
    first, second = (attention(query, key, value, **options) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(first, attention(query, key, value, **options))
    assert not torch.equal(first, second)
    weights = attention(query, key, value, implementation=implementation)
    stayed = first != 0
    torch.testing.assert_close(first[stayed], 2 * weights[stayed])
    assert 0.35 < stayed.float().mean() < 0.65


# The interpreter's tl.max is NumPy's nanmax, which warns.
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["query", "key", "value"])
def test_non_finite_inputs_reach_what_they_reach_in_the_plain_path(
    where: int, bad: float, implementation: str
) -> None:
    inputs = tensors(1, 2, 18, 8)
    with torch.no_grad():
        inputs[where][0, 1, 3, 5] = bad
        if where < 2:
            # All scores of a key or query of one sign: infinite ones are not of both.
            inputs[1 - where].abs_()
    found, *_ = results(*inputs, implementation=implementation)
    plain, *_ = results(*inputs, implementation="torch")
    assert not plain.isfinite().all()
    assert torch.equal(found.isfinite(), plain.isfinite())
    assert torch.equal(found.isnan(), plain.isnan())


@interpreted
def test_results_repeat_bit_for_bit() -> None:
    inputs = tensors(1, 4, 33, 16, keys=70, key_heads=1)
    first, second = (results(*inputs, implementation="triton") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_view_of_one_projection(implementation: str) -> None:
    """Channels first, as `Attention1d` and `Attention2d` have it."""
    projected = torch.randn(2, 3, 3, 8, 20, device=DEVICE, requires_grad=True)
    query, key, value = projected.permute(2, 0, 1, 4, 3).unbind(0)
    output = attention(query, key, value, implementation=implementation)
    (gradient,) = torch.autograd.grad(output.mT.reshape(2, 24, 20).square().sum(), projected)
    apart = [tensor.detach().contiguous().requires_grad_() for tensor in (query, key, value)]
    whole = attention(*apart, implementation="torch")
    others = torch.autograd.grad(whole.square().sum(), apart)
    torch.testing.assert_close(output, whole)
    torch.testing.assert_close(gradient, torch.stack([x.mT for x in others], 2))
    if implementation == "triton":
        assert output.mT.is_contiguous()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_gradient_with_strides_of_its_own(implementation: str) -> None:
    inputs = tensors(2, 2, 17, 8)
    output = attention(*inputs, implementation=implementation)
    given = torch.randn(1, 1, 8, 17, device=DEVICE).mT.expand_as(output)
    found = torch.autograd.grad(output, inputs, given)
    exact = attention(*inputs, implementation="torch")
    others = torch.autograd.grad(exact, inputs, given.contiguous())
    for mine, other in zip(found, others, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_first_derivatives(masked: bool) -> None:
    inputs = tensors(1, 2, 3, 4, keys=5, key_heads=1, dtype=torch.float64)
    mask = None
    if masked:
        mask = torch.randn(2, 3, 5, dtype=torch.float64, device=DEVICE).requires_grad_()

    def call(*inputs: Any) -> Any:
        return attention(*inputs[:3], mask=inputs[3] if masked else None)

    assert torch.autograd.gradcheck(call, (*inputs, mask) if masked else inputs)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_derivatives_of_the_gradients(dropout: float) -> None:
    """What a derivative of the kernel's gradients is taken of, against finite differences."""
    inputs = tensors(1, 2, 3, 4, keys=5, key_heads=1, dtype=torch.float64)
    seed = torch.tensor(3, device=DEVICE) if dropout else None
    options = spec.Options(True, 0.5, dropout)
    given = torch.randn(1, 2, 3, 4, dtype=torch.float64, device=DEVICE).requires_grad_()

    def gradients(*inputs: Any) -> Any:
        return torch_op._spelled_out_gradients(*inputs, None, seed, options)

    assert torch.autograd.gradcheck(gradients, (*inputs, given))
    output = torch_op._spelled_out(*inputs, None, seed, options)
    for mine, other in zip(
        gradients(*inputs, given), torch.autograd.grad(output, inputs, given), strict=True
    ):
        torch.testing.assert_close(mine, other)


@interpreted
@pytest.mark.parametrize("compiled", [False, True])
def test_second_derivative_of_the_kernel(compiled: bool) -> None:
    """``compiled`` takes the custom op, as code under torch.compile does."""
    inputs = tensors(1, 2, 5, 8, keys=7)
    mask = (torch.rand(5, 7, device=DEVICE) < 0.7).index_fill_(1, torch.tensor([0]).to(DEVICE), 1)
    options = spec.Options(False, 0.3, 0.0)

    def product(output: Any) -> Any:
        gradients = torch.autograd.grad(output.sin().sum(), inputs, create_graph=True)
        total = sum(gradient.square().sum() for gradient in gradients)
        return torch.autograd.grad(total, inputs)

    if compiled:
        fused = torch_op._forward_op(*inputs, mask[None, None], None, *options, True, "triton")[0]
    else:
        fused = attention(*inputs, mask=mask, scale=0.3, implementation="triton")
    plain = torch_op._spelled_out(*inputs, mask, None, options)
    for mine, other in zip(product(fused), product(plain), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_a_learned_mask_has_a_gradient_and_no_kernel() -> None:
    inputs = tensors(1, 2, 3, 4)
    mask = torch.randn(1, 3, 3, device=DEVICE, requires_grad=True)
    given = torch.randn(1, 2, 3, 4, device=DEVICE)
    (found,) = torch.autograd.grad(attention(*inputs, mask=mask), mask, given)
    arrays = dict(zip(("query", "key", "value", "mask"), (*inputs, mask), strict=True))
    arrays = {name: tensor.detach().cpu().double().numpy() for name, tensor in arrays.items()}
    exact = reference.backward(arrays, {"output": given.cpu().numpy()})["scores"]
    np.testing.assert_allclose(found.cpu(), exact.sum((0, 1))[None], rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedImplementationError, match="gradient of a mask"):
        attention(*inputs, mask=mask, implementation="triton")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 2, 4, 8, 4), (2, 2, 0, 8, 4), (2, 2, 4, 8, 0)], ids=str)
def test_nothing_in_nothing_out(shape: tuple[int, ...], implementation: str) -> None:
    inputs = tensors(*shape[:4], keys=shape[4])
    output, *gradients = results(*inputs, implementation=implementation)
    assert output.shape == shape[:4]
    assert (output == 0).all()
    for gradient, tensor in zip(gradients, inputs, strict=True):
        assert gradient.shape == tensor.shape
        assert (gradient == 0).all()


def test_offsets_beyond_31_bits() -> None:
    """A tensor of 2^33 elements has strides and planes beyond 32 bits; nothing wraps."""
    triton_kernel = pytest.importorskip(
        "ml_networks.kernels.attention.triton_kernel", reason="triton is not installed"
    )
    sizes = (1 << 6, 8, 8, 1 << 16, 1 << 16, 256)
    dims = dict(zip(spec.DIMENSIONS, sizes, strict=True))
    h100 = device.target("sm_90")
    for channels_first in (False, True):
        problem = registry.get("attention").spec.CASES[0].problem("attention", "bfloat16")
        problem = problem.with_dims(dims)
        flags = (("channels_first", channels_first), ("mask", "boolean"))
        problem = torch_op.replace(problem, flags=flags)
        (forward,) = triton_kernel.compilations(problem, Config(), h100)
        assert forward.signature["mask_batch"] == "i64"
        assert forward.signature["query_batch"] == "i32"
    huge = torch_op.replace(problem.with_dims({**dims, "heads": 256, "key_heads": 256}))
    (forward,) = triton_kernel.compilations(huge, Config(), h100)
    assert forward.signature["query_batch"] == "i64"


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: this process cannot compile kernels")
def test_addresses_are_computed_in_64_bits() -> None:
    """Every address that the machine reads is a pointer plus a 64-bit offset."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ml_networks.kernels.attention import triton_kernel

    problem = spec.CASES[0].problem("attention", "bfloat16")
    (found,) = triton_kernel.compilations(problem, Config(16, 16, 4, 1), device.target("sm_90"))
    source = ASTSource(found.kernel, dict(found.signature), dict(found.constexprs))
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    offsets = [line for line in compiled.asm["ttir"].splitlines() if "tt.addptr" in line]
    tiles = [line for line in offsets if "tensor<" in line]
    assert tiles
    narrow = [line for line in tiles if line.rstrip().split(" loc(")[0].endswith("xi32>")]
    # Only along the features of one token, which are no more than 256.
    assert all("x16x" in line for line in narrow), narrow


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: the same path runs without it")
def test_custom_ops() -> None:
    query, key, value = tensors(1, 4, 3, 8, keys=5, key_heads=2)
    query = query.detach().mT.contiguous().mT.requires_grad_()
    mask, seed = torch.rand(1, 1, 3, 5, device=DEVICE) < 0.5, torch.tensor(7, device=DEVICE)
    given, options = (query, key, value, mask, seed), (False, 0.5, 0.25)
    torch.library.opcheck(torch_op._forward_op, (*given, *options, True, None))
    output, lse = torch_op._forward_op(*given, *options, True, None)
    kept = output.detach(), lse.detach(), torch.randn_like(output)
    torch.library.opcheck(torch_op._backward_op, (*given, *kept, *options, None))


@pytest.mark.parametrize("implementation", [None, pytest.param("triton", marks=interpreted)])
def test_compiles_once_for_all_lengths(implementation: str | None) -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(query: Any, key: Any, value: Any) -> Any:
        return attention(query, key, value, causal=True, implementation=implementation)

    for length in (4, 6, 7, 9):
        inputs = tensors(2, 2, length, 8, keys=length + 3)
        output = compiled(*inputs)
        gradients = torch.autograd.grad(output.sin().sum(), inputs)
        plain = attention(*inputs, causal=True)
        torch.testing.assert_close(output, plain)
        torch.testing.assert_close(gradients, torch.autograd.grad(plain.sin().sum(), inputs))
    assert len(graphs) <= 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_computes_in_its_dtype(implementation: str) -> None:
    inputs = tensors(1, 2, 17, 8)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output, *gradients = results(*inputs, implementation=implementation)
    assert output.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    exact = expected(*inputs)[0]
    np.testing.assert_allclose(output.float().cpu(), exact, atol=0.02)


def test_usage_names_what_ran() -> None:
    inputs = tensors(1, 2, 4, 8)
    with record_usage() as usage:
        attention(*(tensor.detach() for tensor in inputs), implementation="torch")
    (row,) = usage.rows
    assert (row.op, row.direction, row.implementation) == ("attention", "forward", "torch")


def test_what_is_known_to_win_is_chosen() -> None:
    op = registry.get("attention")
    chosen = {}
    for case in op.spec.CASES:
        for direction in op.spec.DIRECTIONS:
            problem = case.problem("attention", "float32", direction)
            decision = dispatch.decide(problem, device.target("sm_90"), op.binding("torch"))
            chosen[case.id, direction] = decision.implementation
    kernels = {key for key, implementation in chosen.items() if implementation == "triton"}
    # Elsewhere torch's own kernels are not slower, or that is not known.
    assert kernels == {
        ("image-8x8", "forward"),
        ("image-8x8", "backward"),
        ("image-16x16", "forward"),
        ("image-16x16", "backward"),
        ("one-query-2500", "forward"),
    }


def test_a_tuning_key_forgets_what_does_not_matter_to_speed() -> None:
    sizes = dict(zip(spec.DIMENSIONS, (3, 4, 2, 200, 200, 40), strict=True))
    problem = spec.CASES[0].problem("attention").with_dims(sizes)
    one = torch_op.replace(problem, flags=(("scale", 0.5), ("dropout", 0.1)))
    sizes = dict(zip(spec.DIMENSIONS, (4, 3, 3, 256, 129, 64), strict=True))
    other = torch_op.replace(problem.with_dims(sizes), flags=(("dropout", 0.9),))
    assert spec.bucket(one).flags == spec.bucket(other).flags
    assert spec.bucket(one)["heads"] == spec.bucket(other)["heads"] == 16
    assert spec.bucket(one)["key_heads"] == 8
    assert spec.bucket(spec.bucket(one)) == spec.bucket(one)


ZEROS = torch.zeros(2, 4, 3, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(4, 3, 8)}, ValueError, r"query has shape \(4, 3, 8\)"),
        ({"key": torch.zeros(2, 4, 5, 8)}, ValueError, r"key has shape .* and value"),
        ({"query": torch.zeros(2, 4, 3, 9)}, ValueError, "features"),
        ({"query": torch.zeros(2, 6, 3, 8)}, ValueError, "query has 6 heads and key 4"),
        ({"query": torch.zeros(2, 4, 3, 8, dtype=torch.int64)}, TypeError, "int64"),
        ({"query": torch.zeros(2, 4, 3, 8, dtype=torch.bfloat16)}, TypeError, "bfloat16"),
        ({"query": torch.zeros(2, 4, 3, 8, device="meta")}, ValueError, "query is on meta"),
        ({"mask": torch.ones(3, 4, dtype=torch.bool)}, ValueError, r"mask has shape \(3, 4\)"),
        ({"mask": torch.ones(3, 3, dtype=torch.int32)}, TypeError, "mask .*int32"),
        ({"mask": torch.ones(3, 3, device="meta")}, ValueError, "mask is on meta"),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0"),
        ({"implementation": "tritno"}, UnknownNameError, "triton"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"query": ZEROS, "key": ZEROS, "value": ZEROS}
    with pytest.raises(error, match=message):
        attention(**{**arguments, **change})


def test_the_kernel_says_what_it_cannot_do() -> None:
    wide = torch.zeros(1, 1, 2, 300, device=DEVICE)
    with pytest.raises(UnsupportedImplementationError, match="300 features"):
        attention(wide, wide, wide, implementation="triton")
    with use_implementation("triton"), pytest.raises(UnsupportedImplementationError):
        attention(wide, wide, wide)
    assert (attention(wide, wide, wide) == 0).all()
