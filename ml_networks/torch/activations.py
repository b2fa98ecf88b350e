"""Activations by name: torch's own and a few that torch does not have."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ml_networks._compat import UnknownActivationError, did_you_mean
from ml_networks._geometry import is_glu

__all__ = [
    "Activation",
    "CRReLU",
    "L2Norm",
    "REReLU",
    "SiGLU",
    "SwiGLU",
    "TanhExp",
    "TanhExpBase",
    "UnknownActivationError",
]


class TanhExpBase:
    """:class:`TanhExp` as a function, called as ``TanhExpBase.apply(x)``."""

    @staticmethod
    def apply(x: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        # exp(5) already makes tanh exactly 1 and its derivative exactly 0 in float64; without
        # the limit exp overflows and the gradient becomes inf * 0.
        return x * torch.tanh(torch.exp(x.clamp(max=5.0)))


class TanhExp(nn.Module):
    """TanhExp, f(x) = x tanh(exp(x)) (arXiv 2003.09855)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return TanhExpBase.apply(x)


class REReLU(nn.Module):
    """Reparametrised ReLU: the value of relu(x), the gradient of a smooth activation.

    See https://openreview.net/forum?id=lNCnZwcH5Z.

    Parameters
    ----------
    reparametarize_fn
        Name of the smooth activation in ``torch.nn.functional``. Default ``"gelu"``.
    """

    def __init__(self, reparametarize_fn: str = "gelu") -> None:
        super().__init__()
        if not callable(getattr(F, reparametarize_fn, None)):
            raise UnknownActivationError(
                f"reparametarize_fn {reparametarize_fn!r} is not in torch.nn.functional"
                + did_you_mean(reparametarize_fn, ("gelu", "silu", "elu", "softplus", "mish"))
            )
        self.reparametarize_fn = reparametarize_fn

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        smooth = getattr(F, self.reparametarize_fn)(x)
        return F.relu(x.detach()) + (smooth - smooth.detach())

    def extra_repr(self) -> str:
        """Show the argument."""
        return repr(self.reparametarize_fn)


class SiGLU(nn.Module):
    """SiLU-gated linear unit, f(a, b) = a * silu(b), the halves of x (arXiv 2002.05202).

    Parameters
    ----------
    dim
        The dimension that is halved. Its size must be even.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., 2 n, ...) to (..., n, ...)."""
        if x.shape[self.dim] % 2:
            raise ValueError(
                f"SiGLU halves dimension {self.dim}, whose size must be even, got shape "
                f"{tuple(x.shape)}"
            )
        value, gate = x.chunk(2, dim=self.dim)
        return value * F.silu(gate)

    def extra_repr(self) -> str:
        """Show the argument."""
        return f"dim={self.dim}"


SwiGLU = SiGLU


class CRReLU(nn.Module):
    """Correction regularised ReLU, f(x) = max(0, x) + lr * x * exp(-x^2 / 2).

    See https://openreview.net/forum?id=7TZYM6Hm9p. ``lr`` is a learned scalar.

    Parameters
    ----------
    lr
        Initial value. Default 0.01.
    """

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.lr = nn.Parameter(torch.tensor(lr))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return F.relu(x) + self.lr * x * torch.exp(-x * x / 2)


class L2Norm(nn.Module):
    """Projection onto the unit sphere along the last dimension, f(x) = x / max(|x|, eps).

    eps is 1e-12, or the smallest normal number of a type that cannot hold it (float16).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., n) along n; a zero vector stays zero."""
        return F.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny))


_OWN: dict[str, type[nn.Module]] = {
    "CRReLU": CRReLU,
    "L2Norm": L2Norm,
    "REReLU": REReLU,
    "SiGLU": SiGLU,
    "SwiGLU": SwiGLU,
    "TanhExp": TanhExp,
}
_SUGGESTED = (*_OWN, *nn.modules.activation.__all__, "Identity")
_TAKES_DIM = ("Softmax", "LogSoftmax", "Softmin")


class Activation(nn.Module):
    """An activation by name.

    Parameters
    ----------
    activation
        A module class of ``torch.nn`` (``"ReLU"``, ``"GELU"``, ``"Identity"``, ...) or one of
        ``"CRReLU"``, ``"L2Norm"``, ``"REReLU"``, ``"SiGLU"``, ``"SwiGLU"``, ``"TanhExp"``. The
        case matters.
    dim
        Dimension of gated units and softmaxes; other activations ignore it. Default -1.
    **kwargs
        Further arguments of the activation.

    Raises
    ------
    UnknownActivationError
        For an unknown name, with the nearest right one. It is both a ValueError and a
        NotImplementedError.
    """

    def __init__(self, activation: str, *, dim: int = -1, **kwargs: Any) -> None:
        super().__init__()
        cls = _OWN.get(activation) or getattr(nn, activation, None)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise UnknownActivationError(
                f"unknown activation {activation!r}{did_you_mean(activation, _SUGGESTED)}"
            )
        if is_glu(activation) or activation in _TAKES_DIM:
            kwargs["dim"] = dim
        self.activation = cls(**kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation."""
        output: Tensor = self.activation(x)
        return output
