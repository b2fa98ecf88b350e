"""Convolution with shuffle and activation beyond the conformance suite: torch's own layers, memory
formats, edge values, errors, and each framework's transforms.

Triton kernels run where ``TRITON_INTERPRET=1`` is set or a GPU is found.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from ml_networks.kernels import explain, record_usage, use_implementation  # noqa: E402
from ml_networks.kernels.conv_shuffle import spec, torch_op  # noqa: E402
from ml_networks.kernels.core import device, pallas  # noqa: E402
from ml_networks.kernels.core.errors import UnsupportedImplementationError  # noqa: E402
from ml_networks.kernels.jax import conv_shuffle as jax_conv_shuffle  # noqa: E402
from ml_networks.kernels.torch import conv_shuffle  # noqa: E402

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ["torch", "triton"] if INTERPRETING or DEVICE == "cuda" else ["torch"]
MODES = ("zeros", "reflect", "replicate", "circular")


@pytest.fixture(autouse=True)
def _without_tf32() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(values).float().to(DEVICE)


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_is_the_layers_of_torch(implementation: str, mode: str, kernel: int) -> None:
    layer = nn.Conv2d(4, 8, kernel, 2, kernel // 2, 2, groups=2, padding_mode=mode).to(DEVICE)
    steps = nn.Sequential(layer, nn.PixelShuffle(2), nn.SiLU())
    x = draw(2, 4, 7, 6).requires_grad_()
    options = {"stride": 2, "padding": kernel // 2, "dilation": 2, "groups": 2}
    y = conv_shuffle(
        x,
        layer.weight,
        layer.bias,
        **options,
        padding_mode=mode,
        shuffle=2,
        activation="SiLU",
        implementation=implementation,
    )
    expected = steps(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    wanted = [x, *layer.parameters()]
    of_y = draw(*y.shape, seed=9)
    torch.testing.assert_close(
        torch.autograd.grad(y, wanted, of_y),
        torch.autograd.grad(expected, wanted, of_y),
        rtol=1e-5,
        atol=1e-4,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_sample_has_its_own_weights(implementation: str) -> None:
    x, weight, bias = leaves((3, 6, 5, 4), (3, 4, 3, 3, 3), (3, 4))
    options: dict[str, Any] = {"padding": 1, "groups": 2, "padding_mode": "reflect"}
    y = conv_shuffle(x, weight, bias, **options, activation="Tanh", implementation=implementation)
    singly = [
        conv_shuffle(x[i : i + 1], weight[i], bias[i], **options, activation="Tanh")
        for i in range(3)
    ]
    expected = torch.cat(singly)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(y.square().sum(), (x, weight, bias))
    exact = torch.autograd.grad(expected.square().sum(), (x, weight, bias))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [0, 2, -2])
def test_channels_last_stays(implementation: str, scale: int) -> None:
    x, weight = draw(2, 5, 6, 4), draw(8, 5, 3, 3, seed=1)
    last = torch.channels_last
    options = {"padding": 1, "shuffle": scale, "implementation": implementation}
    expected = conv_shuffle(x, weight, activation="ReLU", **options)
    for w in (weight, weight.contiguous(memory_format=last)):
        # A leaf in that memory format.
        leaf = x.contiguous(memory_format=last).requires_grad_()
        y = conv_shuffle(leaf, w, activation="ReLU", **options)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        if implementation == "triton":
            assert y.is_contiguous(memory_format=last)
            (of_x,) = torch.autograd.grad(y.sum(), leaf)
            assert of_x.is_contiguous(memory_format=last)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("own", [False, True])
def test_no_samples_still_reach_the_weights(implementation: str, own: bool) -> None:
    front = (0,) if own else ()
    x, weight, bias = leaves((0, 4, 6), (*front, 6, 4, 3), (*front, 6))
    y = conv_shuffle(
        x, weight, bias, padding=1, activation="GELU", shuffle=2,
        implementation=implementation,
    )  # fmt: skip
    assert y.shape == (0, 3, 12)
    for gradient, value in zip(
        torch.autograd.grad(y.sum(), (x, weight, bias)), (x, weight, bias), strict=True
    ):
        assert gradient.shape == value.shape
        assert not gradient.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_pixel_and_nan(implementation: str) -> None:
    x, weight = draw(3, 5, 1, 1), draw(4, 5, 3, 3, seed=1)
    options: dict[str, Any] = {"padding": 1, "activation": "ReLU"}
    y = conv_shuffle(x, weight, **options, implementation=implementation)
    expected = torch.relu(x[..., 0, 0] @ weight[..., 1, 1].T)
    torch.testing.assert_close(y[..., 0, 0], expected, rtol=1e-5, atol=1e-5)
    x[1, 2] = float("nan")
    y = conv_shuffle(x, weight, **options, implementation=implementation)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_and_offsets_beyond_two_to_the_31(implementation: str) -> None:
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    x = memory.as_strided((2, 3, 8), (2**30, 2**29, 2))
    x.copy_(draw(2, 3, 8))
    weight = draw(4, 3, 3, seed=1).half()
    far = conv_shuffle(x, weight, padding=1, implementation=implementation)
    near = conv_shuffle(x.contiguous(), weight, padding=1, implementation=implementation)
    assert torch.equal(far, near)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"activation": "Relu"}, "unknown activation 'Relu'"),
    ({"padding_mode": "wrap"}, "unknown padding_mode 'wrap'"),
    ({"stride": 0}, "stride is 0; it must be at least 1"),
    ({"weight": torch.ones(4, 3, 3)}, r"it must be \(out, in / groups, kernel, kernel\)"),
    ({"weight": torch.ones(4, 3, 3, 1)}, r"weight has shape \(4, 3, 3, 1\)"),
    ({"weight": torch.ones(3, 4, 4, 3, 3)}, "weight is for 3 samples and x has 2"),
    ({"groups": 2}, "the channels of x must be groups times those of weight"),
    ({"bias": torch.ones(3)}, r"bias has shape \(3,\); here it must be \(6,\)"),
    ({"padding": 5, "padding_mode": "reflect"}, "reflect padding by 5 needs at least 6"),
    ({"dilation": 3}, "smaller than a window of 3 with dilation 3"),
    ({"shuffle": 2}, "weight has 6 outputs; shuffle=2 needs a multiple of 4"),
    ({"shuffle": -2}, r"makes \[3, 3\] positions; shuffle=-2 needs multiples of 2"),
    ({"weight": torch.ones(5, 4, 3, 3), "activation": "GLU"}, "GLU halves the 5 channels"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.ones(2, 4, 5, 5), "weight": torch.ones(6, 4, 3, 3)}
    with pytest.raises(ValueError, match=message):
        conv_shuffle(**{**arguments, **options})


def test_mixed_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"weight is torch\.float32 and x is torch\.float16"):
        conv_shuffle(torch.ones(2, 4, 5, 5).half(), torch.ones(6, 4, 3, 3))


@pytest.mark.parametrize("own", [False, True])
def test_sizes_seen_before_hide_nothing(own: bool) -> None:
    """What is remembered of a call is that its sizes fit, and nothing else."""
    front = (2,) if own else ()
    x, weight, bias = draw(2, 4, 6), draw(*front, 6, 4, 3), draw(*front, 6)
    expected = conv_shuffle(x, weight, bias, padding=1)
    for _ in range(2):
        assert torch.equal(conv_shuffle(x, weight, bias, padding=1), expected)
        with pytest.raises(ValueError, match="bias has shape"):
            conv_shuffle(x, weight, bias[..., 1:], padding=1)
        with pytest.raises(ValueError, match="unknown activation"):
            conv_shuffle(x, weight, bias, padding=1, activation="relu")
        with pytest.raises(TypeError, match=r"bias is torch\.float64 and x is torch\.float32"):
            conv_shuffle(x, weight, bias.double(), padding=1)
        with pytest.raises(
            TypeError, match=r"x must be a floating-point tensor, got torch\.int32"
        ):
            conv_shuffle(x.int(), weight.int(), bias.int(), padding=1)
        with pytest.raises(TypeError, match="weight must be a floating-point tensor, got list"):
            conv_shuffle(x, weight.tolist(), bias, padding=1)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert conv_shuffle(x, weight, bias, padding=1).dtype == torch.bfloat16
        with record_usage() as usage:
            conv_shuffle(x, weight, bias, padding=1)
        assert [row.calls for row in usage.rows] == [1]


@pytest.mark.skipif(len(IMPLEMENTATIONS) > 1, reason="asks for what cannot run")
def test_what_is_asked_for_counts_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(2, 4, 6), draw(6, 4, 3)
    refused = pytest.raises(UnsupportedImplementationError, match="needs a GPU")
    for _ in range(2):
        conv_shuffle(x, weight)
        with refused:
            conv_shuffle(x, weight, implementation="triton")
        with use_implementation("triton"), refused:
            conv_shuffle(x, weight)
        with monkeypatch.context() as patch, refused:
            patch.setenv("ML_NETWORKS_IMPLEMENTATION", "conv_shuffle=triton")
            conv_shuffle(x, weight)


@pytest.mark.skipif(DEVICE == "cuda", reason="the plain path in the op is for a CPU")
def test_traces_with_symbols_for_sizes() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return conv_shuffle(x, weight, padding=1, activation="SiLU")

    weight = draw(6, 4, 3)
    traced = make_fx(function, tracing_mode="symbolic")(draw(3, 4, 7), weight)
    torch.testing.assert_close(traced(draw(5, 4, 9), weight), function(draw(5, 4, 9), weight))


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETING, reason="needs a GPU or its interpreter")
def test_gated_and_wide_ones_are_refused_with_reasons() -> None:
    with pytest.raises(UnsupportedImplementationError, match="GLU takes two channels"):
        conv_shuffle(draw(1, 4, 3, 3), draw(4, 4, 1, 1), activation="GLU", implementation="triton")
    with pytest.raises(UnsupportedImplementationError, match="65 input channels: above 64"):
        conv_shuffle(draw(1, 65, 3, 3), draw(4, 65, 1, 1), implementation="triton")


def test_the_choice_says_why() -> None:
    hopper = device.target("sm_90")
    dims = {
        "batch": 64, "in_channels": 64, "out_channels": 64, "kernel": 3, "height": 32, "width": 32
    }  # fmt: skip
    flags = {"padding": 1, "activation": "ReLU"}

    def choice(direction: str = "forward", **change: Any) -> Any:
        sizes = {**dims, **{k: v for k, v in change.items() if k in dims}}
        more = {**flags, **{k: v for k, v in change.items() if k not in dims}}
        return explain(
            "conv_shuffle",
            sizes,
            dtype="bfloat16",
            flags=more,
            direction=direction,
            device=hopper,
        )

    assert choice(out_channels=3).implementation == "triton"
    assert choice(per_sample=True).why.startswith("one batched product")
    assert choice(in_channels=128).implementation == "torch"
    assert "128 input channels" in str(choice(in_channels=128).against)
    assert choice("backward").implementation == "triton"
    assert choice("backward", activation="Identity").why == "nothing follows the convolution"
    assert "so narrow" in choice(groups=64).why


def test_gated_activations_on_the_plain_path() -> None:
    x, weight = draw(2, 4, 3, 3), draw(8, 4, 3, 3, seed=1)
    y = conv_shuffle(x, weight, padding=1, shuffle=2, activation="GLU")
    expected = F.glu(F.pixel_shuffle(F.conv2d(x, weight, padding=1), 2), 1)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("own", [False, True])
def test_gradcheck_twice(own: bool) -> None:
    front = (2,) if own else ()
    values = [v.detach().double().requires_grad_() for v in leaves(
        (2, 2, 4, 4), (*front, 4, 2, 3, 3), (*front, 4)
    )]  # fmt: skip

    def function(*values: torch.Tensor) -> torch.Tensor:
        return conv_shuffle(*values, padding=1, padding_mode="circular", shuffle=2,
                            activation="Tanh")  # fmt: skip

    assert torch.autograd.gradcheck(function, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


CALLS: list[tuple[tuple[tuple[int, ...], ...], spec.Options]] = [
    (((2, 4, 5, 6), (8, 2, 3, 3), (8,)), spec.Options(1, 1, 1, 2, "reflect", 2, "GELU")),
    (((2, 3, 6, 6), (4, 3, 3, 3), (4,)), spec.Options(2, 2, 1, 1, "replicate", -2, "ReLU")),
    (((2, 3, 7), (2, 6, 3, 3), (2, 6)), spec.Options(1, 1, 1, 1, "circular", 2, "SiLU")),
    (((2, 3, 4, 4), (2, 4, 3, 1, 1), (2, 4)), spec.Options(1, 0, 1, 1, "zeros", 0, "Identity")),
    (((2, 3, 4, 4), (4, 3, 1, 1), (4,)), spec.Options(1, 0, 1, 1, "zeros", 0, "SwiGLU")),
]


@pytest.mark.skipif(DEVICE == "cuda", reason="the plain path in the op is for a CPU")
@pytest.mark.parametrize(("shapes", "options"), CALLS)
def test_the_custom_ops(shapes: Any, options: spec.Options) -> None:
    """opcheck, and first and second derivatives against the plain path's."""
    values = leaves(*shapes)
    arguments = (*values, *options, True, None)
    checked = options.activation in ("Identity", "SiLU")  # for it takes seconds
    if checked:
        torch.library.opcheck(torch_op._forward_op, arguments)
    y, z = torch_op._forward_op(*arguments)
    plain = torch_op._plain(*values, options)
    torch.testing.assert_close(y, plain)
    of_y = draw(*y.shape, seed=7)
    slope = y if options.activation in spec.SLOPE_FROM_RESULT else z
    saved = slope.detach()
    if checked:
        torch.library.opcheck(
            torch_op._backward_op, (*values, saved, of_y, *options, [True, True, True], None)
        )
    first = torch.autograd.grad(y.square().sum(), values, create_graph=True)
    exact = torch.autograd.grad(plain.square().sum(), values, create_graph=True)
    torch.testing.assert_close(first, exact, rtol=1e-4, atol=1e-4)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), values)
    exact = torch.autograd.grad(sum(g.square().sum() for g in exact), values)
    torch.testing.assert_close(second, exact, rtol=1e-3, atol=1e-2)


@pytest.mark.skipif(DEVICE == "cuda", reason="the plain path in the op is for a CPU")
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_asked_for(needed: tuple[int, ...]) -> None:
    values = [draw(2, 3, 5, seed=1), draw(4, 3, 3, seed=2), draw(4, seed=3)]
    for index in needed:
        values[index].requires_grad_()
    options = spec.Options(1, 1, activation="Tanh")
    wanted = [values[index] for index in needed]
    y = torch_op._forward_op(*values, *options, True, None)[0]
    found = torch.autograd.grad(y.sum(), wanted)
    exact = torch.autograd.grad(torch_op._plain(*values, options).sum(), wanted)
    torch.testing.assert_close(found, exact)


# Tracing an autograd.Function, torch._dynamo instantiates it, which torch.autograd deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiles_whole_and_does_not_recompile_for_a_new_size(implementation: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    weight, bias = leaves((8, 3, 3, 3), (8,))

    def function(x: torch.Tensor) -> torch.Tensor:
        y = conv_shuffle(x, weight, bias, padding=1, shuffle=2, activation="SiLU",
                         implementation=implementation)  # fmt: skip
        return y.square().sum()

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for batch, side in ((2, 5), (4, 8), (7, 11)):
        x = draw(batch, 3, side, side + 1).requires_grad_()
        found = torch.autograd.grad(compiled(x), (x, weight, bias))
        exact = torch.autograd.grad(function(x), (x, weight, bias))
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_casts_as_for_a_convolution(implementation: str) -> None:
    x, weight, bias = leaves((2, 4, 6), (6, 4, 3), (6,))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = conv_shuffle(x, weight, bias, padding=1, implementation=implementation)
        z = F.conv1d(x, weight, bias, padding=1)
    assert y.dtype == z.dtype == torch.bfloat16
    torch.testing.assert_close(y, z, rtol=0.05, atol=0.05)
    of_weight = torch.autograd.grad(y.sum(), weight)[0]
    assert of_weight.dtype == torch.float32


def test_func_transforms_take_the_plain_path() -> None:
    x, weight = draw(3, 4, 6), draw(3, 6, 4, 3, seed=1)

    def loss(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return conv_shuffle(x[None], weight, padding=1, activation="Tanh").square().sum()

    each = torch.func.vmap(torch.func.grad(loss))(weight, x)
    leaf = weight.clone().requires_grad_()
    together = conv_shuffle(x, leaf, padding=1, activation="Tanh").square().sum()
    torch.testing.assert_close(each, torch.autograd.grad(together, leaf)[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_repeats_bit_for_bit(implementation: str) -> None:
    x, weight, bias = leaves((2, 4, 6, 6), (2, 4, 4, 3, 3), (2, 4))
    runs = []
    for _ in range(2):
        y = conv_shuffle(x, weight, bias, padding=1, activation="SiLU",
                         padding_mode="reflect", implementation=implementation)  # fmt: skip
        runs.append((y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_usage_counts_both_directions() -> None:
    x, weight = leaves((2, 4, 6), (6, 4, 3))
    with record_usage() as usage:
        conv_shuffle(x, weight, padding=1, activation="Tanh").sum().backward()
    assert [(row.op, row.direction) for row in usage.rows] == [
        ("conv_shuffle", "forward"),
        ("conv_shuffle", "backward"),
    ]


# JAX


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_transforms(implementation: str) -> None:
    x, weight = (jnp.asarray(draw(*shape).cpu().numpy()) for shape in ((3, 2, 4), (3, 4, 2, 3)))

    def loss(weight: jax.Array, x: jax.Array) -> jax.Array:
        y = jax_conv_shuffle(
            x, weight, padding=1, shuffle=2, activation="Tanh", implementation=implementation
        )
        return (y * y).sum()

    def size(weight: jax.Array) -> jax.Array:
        return (jax.grad(loss)(weight, x) ** 2).sum()

    with pallas.interpret():
        together = jax.jit(jax.grad(loss))(weight, x)
        each = jax.jit(jax.vmap(jax.grad(loss)))(weight, x[:, None])
        second = jax.jit(jax.grad(size))(weight)
        nothing = jax.grad(loss)(weight[:0], x[:0])
    np.testing.assert_allclose(each, together, rtol=1e-5, atol=1e-5)
    assert np.isfinite(second).all()
    assert nothing.shape == (0, 4, 2, 3)


def test_bad_arguments_are_named_in_jax() -> None:
    with pytest.raises(ValueError, match="weight is for 3 samples and x has 2"):
        jax_conv_shuffle(jnp.ones((2, 4, 5)), jnp.ones((3, 6, 4, 3)))
    with pytest.raises(TypeError, match="x must be a floating-point array, got int32"):
        jax_conv_shuffle(jnp.ones((2, 4, 5), jnp.int32), jnp.ones((6, 4, 3)))
    with pytest.raises(UnsupportedImplementationError, match="65 input channels"):
        jax_conv_shuffle(jnp.ones((1, 65, 3)), jnp.ones((4, 65, 1)), implementation="pallas")
