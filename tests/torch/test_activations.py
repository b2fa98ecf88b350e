from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ml_networks._geometry import is_glu
from ml_networks.torch import Activation
from ml_networks.torch.activations import UnknownActivationError

# Threshold needs arguments, Softmax2d images.
TORCH_NAMES = sorted(
    set(nn.modules.activation.__all__) - {"MultiheadAttention", "Threshold", "Softmax2d"}
)
OWN_NAMES = ["CRReLU", "L2Norm", "REReLU", "SiGLU", "SwiGLU", "TanhExp"]
# Where exp overflows, where it is exactly one, around the kinks, and subnormal numbers.
EXTREMES = [-1e30, -1e4, -89.0, -20.0, -1.0, -1e-40, 0.0, 1e-40, 1.0, 5.0, 20.0, 89.0, 1e4, 1e30]


@pytest.mark.parametrize("name", [*TORCH_NAMES, *OWN_NAMES, "Identity"])
def test_every_activation_by_name(name: str) -> None:
    activation = Activation(name)
    x = torch.randn(3, 4, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = activation(x)
    assert y.shape == ((3, 2) if is_glu(name) else (3, 4))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_torch_activations_are_torchs(name: str) -> None:
    keywords = {"dim": -1} if name in ("Softmax", "Softmin", "LogSoftmax", "GLU") else {}
    x = torch.randn(3, 4)
    torch.manual_seed(0)
    expected = getattr(nn, name)(**keywords)(x)
    torch.manual_seed(0)
    assert torch.equal(Activation(name)(x), expected)


def test_arguments_are_passed_on() -> None:
    x = torch.randn(3, 4, 5)
    assert torch.equal(Activation("LeakyReLU", negative_slope=0.3)(x), F.leaky_relu(x, 0.3))
    assert torch.equal(Activation("Softmax", dim=1)(x), x.softmax(1))
    assert torch.equal(Activation("GLU", dim=1)(x), F.glu(x, 1))
    assert torch.equal(Activation("ReLU", dim=1)(x), x.relu())


@pytest.mark.parametrize(
    ("name", "suggestion"), [("relu", "ReLU"), ("GeLU", "GELU"), ("Tanhexp", "TanhExp")]
)
@pytest.mark.parametrize("error", [UnknownActivationError, NotImplementedError, ValueError])
def test_an_unknown_name_suggests_the_right_one(
    name: str, suggestion: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"unknown activation '{name}'; did you mean '{suggestion}'"):
        Activation(name)


def test_what_is_no_module_is_no_activation() -> None:
    with pytest.raises(UnknownActivationError, match="unknown activation 'functional'"):
        Activation("functional")
    with pytest.raises(UnknownActivationError, match=r"'geluu'.*did you mean 'gelu'"):
        Activation("REReLU", reparametarize_fn="geluu")


def _values(name: str, x: torch.Tensor) -> torch.Tensor:
    """Return the equation of an own activation."""
    first, second = x.chunk(2, -1)
    return {
        "CRReLU": lambda: x.clamp(min=0) + 0.01 * x * torch.exp(-x.square() / 2),
        "L2Norm": lambda: x / x.square().sum(-1, keepdim=True).sqrt(),
        "REReLU": lambda: x.clamp(min=0),
        "SiGLU": lambda: first * second / (1 + torch.exp(-second)),
        "SwiGLU": lambda: first * second / (1 + torch.exp(-second)),
        "TanhExp": lambda: x * torch.tanh(torch.exp(x)),
    }[name]()


@pytest.mark.parametrize("name", OWN_NAMES)
def test_equations(name: str) -> None:
    x = torch.linspace(-4, 4, 24, dtype=torch.float64).view(3, 8)
    torch.testing.assert_close(Activation(name).double()(x), _values(name, x))


@pytest.mark.parametrize("name", ["CRReLU", "L2Norm", "SiGLU", "TanhExp"])
def test_gradients(name: str) -> None:
    torch.manual_seed(0)
    # Away from the kink of the ReLU in CRReLU.
    x = torch.randn(3, 4, dtype=torch.float64)
    x = (x + x.sign() * 0.01).requires_grad_()
    activation = Activation(name).double()
    assert torch.autograd.gradcheck(activation, x)
    assert torch.autograd.gradgradcheck(activation, x)


@pytest.mark.parametrize("function", ["gelu", "silu"])
def test_rerelu_has_the_gradient_of_the_smooth_function(function: str) -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    activation = Activation("REReLU", reparametarize_fn=function)
    (gradient,) = torch.autograd.grad(activation(x).sum(), x)
    (expected,) = torch.autograd.grad(getattr(F, function)(x).sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OWN_NAMES)
def test_finite_everywhere(name: str, dtype: torch.dtype) -> None:
    largest = 0.9 * torch.finfo(dtype).max ** 0.5
    extremes = torch.tensor(EXTREMES, dtype=torch.float64).clamp(-largest, largest)
    x = torch.stack([extremes, extremes.flip(0)], -1).to(dtype).requires_grad_()
    y = Activation(name).to(dtype)(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_l2norm_is_on_the_sphere_and_finite_at_zero() -> None:
    x = torch.randn(32, 64)
    torch.testing.assert_close(Activation("L2Norm")(x).norm(dim=-1), torch.ones(32))
    zero = torch.zeros(2, 3, requires_grad=True)
    y = Activation("L2Norm")(zero)
    y.sum().backward()
    assert not y.any()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


def test_tanhexp_limits() -> None:
    x = torch.tensor([-100.0, 100.0], requires_grad=True)
    y = Activation("TanhExp")(x)
    y.sum().backward()
    torch.testing.assert_close(y, torch.tensor([0.0, 100.0]))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 1.0]))
    assert math.tanh(math.exp(5.0)) == 1.0


def test_siglu_needs_an_even_size() -> None:
    with pytest.raises(ValueError, match=r"dimension 1, whose size must be even.*\(2, 3, 4\)"):
        Activation("SiGLU", dim=1)(torch.randn(2, 3, 4))
