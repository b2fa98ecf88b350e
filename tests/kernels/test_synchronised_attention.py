"""Synchronised attention beyond the conformance suite: a loop over ticks by hand, keys and values
in any layout, split positions, edge values, errors, and each framework's transforms.

Triton kernels run where ``TRITON_INTERPRET=1`` is set or a GPU is found.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed")
jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402

from ml_networks.kernels import explain  # noqa: E402
from ml_networks.kernels.core import device, dispatch, pallas, testing, usage  # noqa: E402
from ml_networks.kernels.core.errors import UnsupportedImplementationError  # noqa: E402
from ml_networks.kernels.core.problem import Case  # noqa: E402
from ml_networks.kernels.core.torch_functions import neuron_table  # noqa: E402
from ml_networks.kernels.jax import synchronised_attention as jax_attention  # noqa: E402
from ml_networks.kernels.synchronised_attention import (  # noqa: E402
    pallas_kernel,
    reference,
    spec,
    torch_op,
)
from ml_networks.kernels.torch import (  # noqa: E402
    Attended,
    AttendedGradient,
    synchronised_attention,
    synchronised_attention_gradient,
    synchronised_attention_key_gradient,
    synchronised_attention_tick,
)

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = ["torch", "triton"] if INTERPRETING or DEVICE == "cuda" else ["torch"]
each = pytest.mark.parametrize("implementation", TORCH)
both_kinds = pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
needs_kernels = pytest.mark.skipif(len(TORCH) == 1, reason="needs TRITON_INTERPRET=1 or a GPU")
Given = dict[str, np.ndarray]
SIZES = 3, 11, 7, 2, 2, 21, 5, 5
DIFFERENTIABLE = "z", "r", "scale", "in_weight", "in_bias", "keys", "values", "sums"


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def inputs_of(sizes: tuple[int, ...] = SIZES, shared: bool = False) -> Given:
    flags = {"shared": shared, "channels_first": False}
    case = Case("asked", "ragged", dict(zip(spec.DIMENSIONS, sizes, strict=True)), flags)
    found = reference.make_inputs(case, 3)
    return {k: v.astype(np.float32 if v.dtype.kind == "f" else v.dtype) for k, v in found.items()}


def tensors_of(inputs: Given, dtype: Any = torch.float32) -> dict[str, Any]:
    """By the names of the arguments. Keys have positions next to each other; so do values, if they
    are not the keys."""
    tensors = {k: torch.from_numpy(v).to(DEVICE) for k, v in inputs.items()}
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    for name in ("keys", "values"):
        if name in tensors:
            tensors[name] = tensors[name].mT.contiguous().mT
    tensors.setdefault("values", tensors["keys"])
    return tensors


def cotangents_of(inputs: Given) -> tuple[np.ndarray, np.ndarray]:
    exact = reference.forward(inputs, shared="values" not in inputs)
    return draw(*exact["read"].shape, seed=5), draw(*exact["new_sums"].shape, seed=6)


def run(implementation: str, inputs: Given) -> Given:
    """Results, and the gradients of all inputs."""
    tensors = tensors_of(inputs)
    leaves = {k: v.requires_grad_() for k, v in tensors.items() if v.is_floating_point()}
    results = synchronised_attention(**tensors, implementation=implementation)
    cotangents = [torch.from_numpy(value).to(DEVICE) for value in cotangents_of(inputs)]
    wanted = {k: leaves[k] for k in DIFFERENTIABLE if k in inputs}
    found = torch.autograd.grad(results, list(wanted.values()), cotangents, materialize_grads=True)
    named = dict(zip(("read", "new_sums"), results, strict=True)) | dict(
        zip(wanted, found, strict=True)
    )
    return {name: value.detach().cpu().numpy() for name, value in named.items()}


def exact_of(inputs: Given) -> Given:
    shared = "values" not in inputs
    cotangents = dict(zip(("read", "new_sums"), cotangents_of(inputs), strict=True))
    results = reference.forward(inputs, shared=shared)
    return results | reference.backward(inputs, cotangents, shared=shared)


@needs_kernels
@settings(max_examples=8)
@given(data=st.data())
def test_triton_equals_the_reference_for_any_shape(data: st.DataObject) -> None:
    tops = 20, 12, 20, 2, 4, 70, 34, 34
    sizes = tuple(data.draw(st.integers(1, top)) for top in tops)
    shared = data.draw(st.booleans())
    sizes = (*sizes[:7], sizes[6]) if shared else sizes
    inputs = inputs_of(sizes, shared)
    exact = exact_of(inputs)
    for name, value in run("triton", inputs).items():
        np.testing.assert_allclose(value, exact[name], rtol=1e-3, atol=2e-4, err_msg=name)


@each
@both_kinds
@pytest.mark.parametrize("width", [33, 17, 16, 40])
def test_widths_with_one_feature_beside_a_tile(
    width: int, shared: bool, implementation: str
) -> None:
    inputs = inputs_of((*SIZES[:6], width, width), shared)
    exact = exact_of(inputs)
    for name, value in run(implementation, inputs).items():
        np.testing.assert_allclose(value, exact[name], rtol=1e-4, atol=2e-5, err_msg=name)


@each
def test_the_first_tick_has_no_sums(implementation: str) -> None:
    inputs = inputs_of()
    del inputs["sums"]
    got = run(implementation, inputs)
    assert not got.pop("r").any()
    exact = exact_of(inputs)
    for name, value in got.items():
        np.testing.assert_allclose(value, exact[name], rtol=1e-4, atol=2e-5, err_msg=name)


@each
def test_no_samples_and_no_pairs(implementation: str) -> None:
    for place in (0, 2):
        inputs = inputs_of()
        axes = {0: ("z", "keys", "values", "sums"), 2: ("left", "right", "r", "scale")}[place]
        inputs |= {name: inputs[name][:0] for name in axes}
        if place == 2:
            inputs |= {name: inputs[name][:, :0] for name in ("in_weight", "sums")}
        got, exact = run(implementation, inputs), exact_of(inputs)
        for name, value in got.items():
            assert value.shape == exact[name].shape
            np.testing.assert_allclose(value, exact[name], rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@each
def test_nan_and_infinity_stay_in_their_sample(implementation: str) -> None:
    tensors = tensors_of(inputs_of())
    tensors["z"][1, tensors["left"][0]] = float("nan")
    tensors["keys"][2, 1, 4, 0] = float("inf")
    read, sums = synchronised_attention(**tensors, implementation=implementation)
    plain, plain_sums = synchronised_attention(**tensors, implementation="torch")
    torch.testing.assert_close(read, plain, equal_nan=True, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums, plain_sums, equal_nan=True)
    assert read[0].isfinite().all()
    assert read[1].isnan().all()


@each
def test_far_scores_do_not_overflow(implementation: str) -> None:
    tensors = tensors_of(inputs_of())
    tensors["in_bias"] = tensors["in_bias"] * 1000
    read, _ = synchronised_attention(**tensors, implementation=implementation)
    exact, _ = synchronised_attention(**tensors, implementation="torch")
    assert read.isfinite().all()
    torch.testing.assert_close(read, exact, rtol=1e-3, atol=1e-3)


@each
def test_strides_and_offsets_beyond_two_to_the_31(implementation: str) -> None:
    tensors = tensors_of(inputs_of(), torch.float16)
    memory = torch.empty(2**31 + 2**27, dtype=torch.float16, device=DEVICE)
    for name, strides in (
        ("keys", (2**30, 64, 1, 2**24)),
        ("z", (2**30, 3)),
    ):
        far = memory.as_strided(tensors[name].shape, strides)
        far.copy_(tensors[name])
        got = synchronised_attention(**tensors | {name: far}, implementation=implementation)
        exact = synchronised_attention(**tensors, implementation=implementation)
        torch.testing.assert_close(got, exact)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"z": np.ones(7, np.float32)}, r"z has shape \(7,\)"),
    ({"keys": np.ones((3, 2, 5), np.float32)}, r"\(batch, heads, positions, K\)"),
    ({"keys": np.ones((3, 2, 0, 5), np.float32)}, "at least one position"),
    ({"values": np.ones((3, 2, 20, 5), np.float32)}, r"values has shape \(3, 2, 20, 5\)"),
    ({"in_weight": np.ones((21, 7), np.float32)}, "a multiple of 10"),
    ({"in_bias": np.ones(7, np.float32)}, r"it must be \(20,\)"),
    ({"r": np.ones(8, np.float32)}, r"r has shape \(8,\)"),
    ({"right": np.ones(6, np.int64)}, r"right has shape \(6,\)"),
    ({"sums": np.ones((3, 8), np.float32)}, r"it must be \(3, 7\)"),
]


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_arguments_are_named(framework: str, wrong: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = inputs_of() | wrong
    function: Any = jax_attention
    if framework == "torch":
        function = synchronised_attention
        given = {k: torch.from_numpy(v) for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        function(**given)


def test_wrong_types_are_refused() -> None:
    tensors = tensors_of(inputs_of())
    for name, value, message in (
        ("left", tensors["left"].int(), r"left must be a tensor of int64, got torch\.int32"),
        ("r", tensors["r"].long(), "r must be a floating-point tensor"),
        ("r", tensors["r"].half(), "r is torch.float16 and z torch.float32"),
        ("sums", tensors["sums"].double(), "sums is torch.float64 and r is torch.float32"),
        ("keys", tensors["keys"].half(), "keys is torch.float16 and z is torch.float32"),
    ):
        with pytest.raises(TypeError, match=message):
            synchronised_attention(**tensors | {name: value})
    arrays = {k: jnp.asarray(v) for k, v in inputs_of().items()}
    for name, value, message in (
        ("left", arrays["r"], "left must be an array of integers"),
        ("r", arrays["left"], "r must be a floating-point array"),
        ("sums", arrays["sums"].astype(jnp.float16), "sums is float16 and r is float32"),
    ):
        with pytest.raises(TypeError, match=message):
            jax_attention(**arrays | {name: value})
    narrow = {k: arrays[k].astype(jnp.float16) for k in ("r", "scale", "sums")}
    with pytest.raises(TypeError, match="r is float16 and z float32"):
        jax_attention(**arrays | narrow)


@each
def test_what_cannot_fit_is_refused_with_the_reason(implementation: str) -> None:
    for sizes, reason in (
        ((2, 4, 3, 1, 2, 5, 130, 4), "key_width is 130"),
        ((2, 4, 3, 1, 33, 5, 4, 4), "queries is 33"),
    ):
        inputs = inputs_of(sizes)
        if implementation == "triton":
            with pytest.raises(UnsupportedImplementationError, match=reason):
                run(implementation, inputs)
        else:
            exact = reference.forward(inputs)["read"]
            np.testing.assert_allclose(run("torch", inputs)["read"], exact, rtol=1e-4, atol=1e-5)


def test_the_choice_says_why() -> None:
    dims = dict(zip(spec.DIMENSIONS, (64, 1024, 128, 1, 4, 2500, 65, 65), strict=True))
    for direction in spec.DIRECTIONS:
        chosen = explain(
            spec.NAME, dims, direction=direction, device=device.target("sm_90"), dtype="bfloat16"
        )
        assert (chosen.implementation, chosen.why[:6]) == ("triton", "scores")
    on_tpu = explain(spec.NAME, dims, framework="jax", device=device.target("tpu"))
    assert on_tpu.implementation == "xla"


# The parts for a loop over ticks


TICKS = 3


def loop_of(
    tensors: dict[str, Any], scales: Any, of_reads: Any, implementation: str | None
) -> tuple[list[Any], list[Any]]:
    """Results and gradients of a loop in which each tick's activations are given, by hand, in rows
    and slices of wider tensors."""
    z, sums, r = tensors["z"], None, tensors["r"]
    ticks, batch, neurons = z.shape
    keys, values, in_weight = tensors["keys"], tensors["values"], tensors["in_weight"]
    columns, pairs = in_weight.shape
    width = columns // keys.shape[3] * values.shape[3]
    wide = keys.new_full((ticks, batch, width + neurons), float("nan"))
    all_of = Attended(
        wide[:, :, :width],
        r.new_empty(ticks, batch, pairs),
        keys.new_empty(ticks, batch, columns),
        r.new_empty(ticks, batch, columns // keys.shape[3], dtype=torch.float32),
    )
    common = {name: tensors[name] for name in ("left", "right", "r", "in_weight")}
    common |= {"keys": keys, "values": values, "implementation": implementation}
    for tick in range(ticks):
        into = Attended(*(value[tick] for value in all_of))
        got = synchronised_attention_tick(
            z[tick], **common, scale=scales[tick], in_bias=tensors["in_bias"], sums=sums, into=into
        )
        assert got is into
        sums = into.sums
    assert wide[:, :, width:].isnan().all()
    gradients = AttendedGradient(
        torch.empty_like(all_of.query),
        torch.empty_like(all_of.sums),
        torch.empty_like(all_of.sums),
    )
    of_z = torch.zeros(z.shape, dtype=r.dtype, device=z.device)
    table = neuron_table(tensors["left"], tensors["right"], neurons)
    for tick in reversed(range(ticks)):
        into = AttendedGradient(*(value[tick] for value in gradients))
        got = synchronised_attention_gradient(
            of_reads[tick],
            gradients.sums[tick + 1] if tick + 1 < ticks else None,
            z[tick],
            **common,
            scale=scales[tick],
            attended=Attended(*(value[tick] for value in all_of)),
            of_z=of_z[tick],
            table=table if tick else None,
            into=into if tick else None,
        )
        assert (got is into) == bool(tick)
        if not tick:
            for target, value in zip(into, got, strict=True):
                target.copy_(value)
    of_both = synchronised_attention_key_gradient(
        of_reads, all_of.read, all_of.query, all_of.log_sum_exp,
        keys, values, implementation=implementation,
    )  # fmt: skip
    rows, scaled = gradients.query.flatten(0, 1), all_of.sums * scales[:, None]
    found = [
        of_z,
        (gradients.sums[1:] * all_of.sums[:-1]).sum((0, 1)),
        (gradients.synchronisation * all_of.sums).sum(1),
        rows.mT @ scaled.flatten(0, 1).to(rows.dtype),
        rows.sum(0),
        *of_both,
    ]
    return [all_of.read, all_of.sums], found


def by_autograd(tensors: dict[str, Any], scales: Any, of_reads: Any) -> tuple[Any, Any]:
    """The same through the public op's plain path."""
    names = "z", "r", "scale", "in_weight", "in_bias", "keys", "values"
    values = {**tensors, "scale": scales}
    leaves = {name: values[name].clone().requires_grad_() for name in names}
    reads, sums = [], None
    all_sums = []
    for tick in range(len(leaves["z"])):
        read, sums = synchronised_attention(
            leaves["z"][tick],
            tensors["left"],
            tensors["right"],
            leaves["r"],
            leaves["scale"][tick],
            *(leaves[name] for name in names[3:]),
            sums,
            implementation="torch",
        )
        reads.append(read)
        all_sums.append(sums)
    found = torch.autograd.grad(torch.stack(reads), list(leaves.values()), of_reads)
    return [torch.stack(reads).detach(), torch.stack(all_sums).detach()], list(found)


def loop_inputs(shared: bool, dtype: Any = torch.float32) -> tuple[dict[str, Any], Any, Any]:
    inputs = inputs_of((5, 11, 7, 2, 3, 21, 17, 17), shared)
    tensors = tensors_of(inputs, dtype)
    # Scores of order 1: the log-sum-exp is kept in float32, which larger ones lose digits of.
    z = torch.from_numpy(0.5 * draw(TICKS, 5, 22)).to(DEVICE, dtype)
    tensors |= {"z": z[:, :, 3:14]}
    tensors |= {"r": tensors["r"].float()}
    scales = torch.from_numpy(draw(TICKS, 7, seed=2)).to(DEVICE)
    of_reads = torch.from_numpy(draw(TICKS, 5, 150, seed=4)).to(DEVICE, dtype)[:, :, 20:122]
    return tensors, scales, of_reads


def errors(tensors: dict[str, Any], scales: Any, of_reads: Any, *, by: str) -> list[float]:
    """How far a loop's results and gradients are off float64, relative to the largest element."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    exact, gradients = by_autograd(wide, scales.double(), of_reads.double())
    results, found = loop_of(tensors, scales, of_reads, by)
    return [
        float((got.double() - value).abs().max() / value.abs().max())
        for got, value in zip([*results, *found], [*exact, *gradients], strict=True)
    ]


@each
@both_kinds
def test_a_loop_by_hand_equals_autograd(shared: bool, implementation: str) -> None:
    given = loop_inputs(shared)
    plain = errors(*given, by="torch")
    assert max(plain) < 4 * testing.ULPS * testing.EPSILON["float32"]
    for off, other in zip(errors(*given, by=implementation), plain, strict=True):
        assert off <= 2 * other + testing.ULPS * testing.EPSILON["float32"]
    found, again = (loop_of(*given, implementation)[1] for _ in range(2))
    assert all(map(torch.equal, found, again))


@each
def test_a_loop_in_half_precision_with_sums_in_float32(implementation: str) -> None:
    given = loop_inputs(True, torch.bfloat16)
    results, found = loop_of(*given, implementation)
    assert [value.dtype for value in results] == [torch.bfloat16, torch.float32]
    assert [value.dtype for value in found[:3]] == [torch.float32] * 3
    plain = errors(*given, by="torch")
    assert max(plain) < testing.ULPS * testing.EPSILON["bfloat16"]
    for off, other in zip(errors(*given, by=implementation), plain, strict=True):
        assert off <= 2 * other + testing.ULPS * testing.EPSILON["bfloat16"]


@needs_kernels
@pytest.mark.parametrize(("warps", "processors", "splits"), [(1, 64, 5), (2, 64, 3), (4, 1, 1)])
@both_kinds
def test_positions_of_warps_and_programs_are_joined(
    shared: bool, warps: int, processors: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device with many processors programs share the positions of a set of keys."""
    from ml_networks.kernels.synchronised_attention import triton_kernel

    monkeypatch.setattr(spec, "POSITIONS_PER_SPLIT", 8)
    inputs = inputs_of((3, 11, 7, 2, 2, 70, 17, 17), shared)
    exact, tensors = exact_of(inputs), tensors_of(inputs)
    many = replace(dispatch.current_device("torch"), processors=processors)
    config = spec.Config(block_positions=16 * warps, num_warps=warps)
    assert spec.split_positions(6, 70, config, processors)[0] == splits
    given = torch_op.Inputs(**tensors)
    into = torch_op._empty(given)
    triton_kernel.forward(*given, *into, config, many)
    np.testing.assert_allclose(into.read.cpu(), exact["read"], rtol=1e-4, atol=1e-5)
    plain = torch_op._plain_tick(given)
    torch.testing.assert_close(into.log_sum_exp, plain.log_sum_exp, rtol=1e-5, atol=1e-5)

    of_read, of_sums = (torch.from_numpy(value).to(DEVICE) for value in cotangents_of(inputs))
    given = (tensors[k] for k in ("scale", "in_weight", "keys", "values"))
    of_z = torch.zeros_like(tensors["z"])
    found = AttendedGradient(*(torch.empty_like(x) for x in (into.query, into.sums, into.sums)))
    kept = into.read, into.query, into.log_sum_exp
    table = neuron_table(tensors["left"], tensors["right"], 11)
    triton_kernel.gradient(
        of_read, of_sums, tensors["z"], None, *given, *kept, table, of_z, *found, config, many
    )
    np.testing.assert_allclose(of_z.cpu(), exact["z"], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(found.query.sum(0).cpu(), exact["in_bias"], rtol=1e-4, atol=2e-5)


@needs_kernels
@both_kinds
def test_many_wide_queries_are_shared_among_programs(shared: bool) -> None:
    inputs = inputs_of((2, 11, 7, 2, 20, 40, 65, 65), shared)
    exact = exact_of(inputs)
    for name, value in run("triton", inputs).items():
        np.testing.assert_allclose(value, exact[name], rtol=1e-3, atol=1e-4, err_msg=name)


@needs_kernels
@both_kinds
def test_keys_and_values_by_a_kernel_each(shared: bool) -> None:
    from ml_networks.kernels.synchronised_attention import triton_kernel

    tensors, _, of_reads = loop_inputs(shared)
    rows = tensors["in_weight"].shape[0]
    query = torch.from_numpy(draw(TICKS, 5, rows, seed=7)).to(DEVICE)
    keys, values = tensors["keys"], tensors["values"]
    scores = torch_op._by_head(query.flatten(0, 1), keys).unflatten(0, (TICKS, 5)) @ keys.mT
    log_sum_exp, read = scores.logsumexp(-1).flatten(2), (scores.softmax(-1) @ values).flatten(2)
    delta = (read * of_reads).unflatten(2, (6, -1)).sum(3)
    exact = torch_op._plain_key_gradient(of_reads, query, keys, values)
    for config in (spec.Config(16, 16, apart=True), spec.Config(32, 16)):
        found = triton_kernel.key_gradient(
            of_reads, delta, query, log_sum_exp, keys, values, config,
            dispatch.current_device("torch"),
        )  # fmt: skip
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=2e-5)


def test_what_a_loop_gives_is_checked() -> None:
    tensors, scales, of_reads = loop_inputs(True)
    given = {**tensors, "z": tensors["z"][0], "scale": scales[0], "sums": None}
    found = synchronised_attention_tick(**given)
    with pytest.raises(ValueError, match=r"into.read has shape \(5, 101\)"):
        synchronised_attention_tick(**given, into=found._replace(read=found.read[:, 1:]))
    with pytest.raises(ValueError, match=r"log_sum_exp has shape \(1, 5, 102\)"):
        synchronised_attention_key_gradient(
            found.read[None], found.read[None], found.query[None], found.read[None],
            tensors["keys"], tensors["values"],
        )  # fmt: skip
    kept = {k: v for k, v in given.items() if k not in ("in_bias", "sums")}
    with pytest.raises(ValueError, match=r"of_z has shape \(5, 10\)"):
        synchronised_attention_gradient(
            of_reads[0], None, **kept, attended=found, of_z=given["z"][:, 1:]
        )


# torch


@both_kinds
def test_gradcheck_twice(shared: bool) -> None:
    tensors = tensors_of(inputs_of((2, 4, 3, 1, 2, 4, 3, 3), shared), torch.float64)
    names = [k for k in DIFFERENTIABLE if k != "values" or not shared]
    leaves = tuple(tensors[name].detach().requires_grad_() for name in names)

    def function(*leaves: Any) -> Any:
        given = {**tensors, **dict(zip(names, leaves, strict=True))}
        return synchronised_attention(**given | ({"values": given["keys"]} if shared else {}))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="the plain path in the op is for a CPU")
@pytest.mark.parametrize("first", [False, True])
@both_kinds
def test_the_custom_ops(shared: bool, first: bool) -> None:
    """opcheck, and first and second derivatives against the plain path's."""
    inputs = tensors_of(inputs_of(shared=shared))
    given = [
        inputs[k].detach().requires_grad_() if inputs[k].is_floating_point() else inputs[k]
        for k in ("z", "left", "right", "r", "scale", "in_weight", "in_bias", "keys")
    ]
    given.append(given[-1] if shared else inputs["values"].detach().requires_grad_())
    given.append(None if first else inputs["sums"].detach().requires_grad_())
    torch.library.opcheck(torch_op._forward_op, (*given, None))
    results = torch_op._forward_op(*given, None)
    cotangents = [torch.ones_like(value).requires_grad_() for value in results[:2]]
    kept = [value.detach() for value in results]
    for of_both in (True, False):
        torch.library.opcheck(torch_op._backward_op, (*given, *kept, *cotangents, of_both, None))

    plain = torch_op._plain(torch_op.Inputs(*given))
    torch.testing.assert_close(results[:2], plain)
    leaves = [v for v in given if v is not None and v.requires_grad]
    leaves = leaves[:-1] if shared and first else leaves

    def slopes(results: Any) -> tuple[Any, Any]:
        size = sum(value.square().sum() for value in results)
        options = {"materialize_grads": True}
        one = torch.autograd.grad(size, leaves, create_graph=True, **options)
        return one, torch.autograd.grad(sum(g.square().sum() for g in one), leaves, **options)

    torch.testing.assert_close(slopes(results[:2]), slopes(plain), rtol=1e-4, atol=1e-4)


@each
def test_a_gradient_that_nobody_wants_is_not_taken(implementation: str) -> None:
    for names, directions in (
        (("z", "in_weight"), ["forward", "backward"]),
        (("keys",), ["forward", "backward", "key_gradient"]),
    ):
        tensors = tensors_of(inputs_of())
        for name in names:
            tensors[name].requires_grad_()
        with usage.record() as used:
            read, _ = synchronised_attention(**tensors, implementation=implementation)
            read.sum().backward()
        rows = [row.direction for row in used.rows]
        assert rows == directions


# Tracing an autograd.Function, torch._dynamo instantiates it, which torch.autograd deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@each
@both_kinds
def test_compiles_whole_and_does_not_recompile_for_a_new_length(
    shared: bool, implementation: str
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(keys: Any, values: Any, others: dict[str, Any]) -> Any:
        read, sums = synchronised_attention(
            **others, keys=keys, values=values, implementation=implementation
        )
        return read.square().sum() + sums.sum()

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for batch, positions in ((3, 21), (4, 27), (5, 24)):
        tensors = tensors_of(inputs_of((batch, 11, 7, 2, 2, positions, 5, 5), shared))
        keys = tensors.pop("keys").requires_grad_()
        values = tensors.pop("values") if not shared else keys
        tensors.pop("values", None)
        leaves = keys, tensors["z"].requires_grad_(), tensors["in_weight"].requires_grad_()
        found = torch.autograd.grad(compiled(keys, values, tensors), leaves)
        exact = torch.autograd.grad(function(keys, values, tensors), leaves)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


@each
def test_autocast_leaves_the_sums_in_float32(implementation: str) -> None:
    tensors = tensors_of(inputs_of(shared=True))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        read, sums = synchronised_attention(**tensors, implementation=implementation)
    assert (read.dtype, sums.dtype) == (torch.bfloat16, torch.float32)
    exact, exact_sums = synchronised_attention(**tensors, implementation="torch")
    torch.testing.assert_close(read.float(), exact, rtol=0.05, atol=0.03)
    torch.testing.assert_close(sums, exact_sums, rtol=0.02, atol=0.03)


@each
def test_the_transforms_of_torch_func(implementation: str) -> None:
    tensors = tensors_of(inputs_of())
    names = "z", "in_weight", "keys"

    def size(z: Any, in_weight: Any, keys: Any) -> Any:
        given = {**tensors, "z": z, "in_weight": in_weight, "keys": keys}
        read, sums = synchronised_attention(**given, implementation=implementation)
        return read.square().sum() + sums.square().sum()

    given = [tensors[name] for name in names]
    leaf = tensors["in_weight"].clone().requires_grad_()
    (exact,) = torch.autograd.grad(size(given[0], leaf, given[2]), leaf)
    found = torch.func.grad(size, 1)(*given)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    stacked = torch.stack([given[0], 2 * given[0]])
    mapped = torch.func.vmap(torch.func.grad(size, 1), (0, None, None))(stacked, *given[1:])
    torch.testing.assert_close(mapped[0], exact, rtol=1e-4, atol=1e-5)


# JAX


def pulled_back(inputs: dict[str, Any], implementation: str) -> dict[str, Any]:
    """Results and gradients in JAX."""

    def function(values: dict[str, Any]) -> Any:
        given = {**inputs, **values}
        given.setdefault("values", given["keys"])
        return jax_attention(**given, implementation=implementation)

    wanted = {k: inputs[k] for k in DIFFERENTIABLE if k in inputs}
    results, pull = jax.vjp(function, wanted)
    cotangents = tuple(jnp.ones_like(value) for value in results)
    return dict(zip(("read", "new_sums"), results, strict=True)) | pull(cotangents)[0]


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@both_kinds
def test_jax_without_sums_samples_or_pairs(shared: bool, implementation: str) -> None:
    first, none, unpaired = (inputs_of(shared=shared) for _ in range(3))
    del first["sums"]
    none |= {name: none[name][:0] for name in ("z", "keys", "values", "sums") if name in none}
    unpaired |= {name: unpaired[name][:0] for name in ("left", "right", "r", "scale")}
    unpaired |= {name: unpaired[name][:, :0] for name in ("in_weight", "sums")}
    for inputs in (first, none, unpaired):
        exact = reference.forward(inputs, shared=shared)
        ones = {name: np.ones_like(value) for name, value in exact.items()}
        exact |= reference.backward(inputs, ones, shared=shared)
        with pallas.interpret():
            got = pulled_back({k: jnp.asarray(v) for k, v in inputs.items()}, implementation)
        for name, value in got.items():
            if name in exact:
                np.testing.assert_allclose(value, exact[name], rtol=1e-4, atol=2e-5, err_msg=name)


@both_kinds
def test_pallas_joins_split_positions(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "POSITIONS_PER_SPLIT", 16)
    query, keys, values = draw(3, 2, 2, 17), draw(3, 2, 70, 17, seed=1), draw(3, 2, 70, 17, seed=2)
    arrays = [jnp.asarray(value) for value in (query, keys, values)]
    many = replace(dispatch.current_device("jax"), processors=64)
    with pallas.interpret():
        found = pallas_kernel.attend(
            *arrays[:2],
            None if shared else arrays[2],
            config=spec.Config(block_positions=16),
            device=many,
        )
    scores = query @ keys.swapaxes(2, 3)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = weights / weights.sum(-1, keepdims=True) @ (keys if shared else values)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_jax_keeps_sums_in_float32(implementation: str) -> None:
    inputs = inputs_of(shared=True)
    exact = reference.forward(inputs, shared=True)
    arrays = {k: jnp.asarray(v) for k, v in inputs.items()}
    halves = "z", "in_weight", "in_bias", "keys"
    arrays |= {name: arrays[name].astype(jnp.bfloat16) for name in halves}
    with pallas.interpret():
        read, sums = jax_attention(**arrays, values=arrays["keys"], implementation=implementation)
    assert (read.dtype, sums.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(read.astype(jnp.float32), exact["read"], rtol=0.05, atol=0.05)
    np.testing.assert_allclose(sums, exact["new_sums"], rtol=0.02, atol=0.03)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_transforms(implementation: str) -> None:
    inputs = {k: jnp.asarray(v) for k, v in inputs_of((2, 5, 3, 1, 2, 19, 5, 5)).items()}
    zs = jnp.stack([inputs["z"], 0.5 * inputs["z"]])

    def gradient(z: Any) -> Any:
        return pulled_back({**inputs, "z": z}, implementation)

    @jax.jit
    def both(zs: Any) -> Any:
        scanned = jax.lax.scan(lambda carry, z: (carry, gradient(z)), 0, zs)
        return jax.vmap(gradient)(zs), scanned[1]

    @jax.jit
    @jax.value_and_grad
    def size(z: Any) -> Any:
        return sum((value * value).sum() for value in gradient(z).values())

    with pallas.interpret():
        results = both(zs)
        _, slope = size(zs[0])
        step = 1e-2 * slope / jnp.linalg.norm(slope)
        ahead, behind = (size(zs[0] + sign * step)[0] for sign in (1, -1))
    for index, z in enumerate(zs):
        given = {k: np.asarray(v) for k, v in {**inputs, "z": z}.items()}
        exact = reference.forward(given)
        ones = {name: np.ones_like(value) for name, value in exact.items()}
        exact |= reference.backward(given, ones)
        for found in results:
            for name, value in found.items():
                np.testing.assert_allclose(value[index], exact[name], rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose((ahead - behind) / 0.02, jnp.linalg.norm(slope), rtol=0.01)
