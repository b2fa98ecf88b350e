"""Stochastic features: distributions from network outputs, their samples, and binary codes.

A :class:`Distribution` turns the output of a network into a *state*: the parameters of the
distribution together with one reparametrised sample ``stoch`` that feeds the next network. With
``B*`` any leading batch axes, ``F = in_dim`` features, ``G = n_groups`` and ``C = F / G``:

=================  ============================  ==========
state              parameters                    ``stoch``
=================  ============================  ==========
`NormalStoch`      mean, std ``(B*, F)``         ``(B*, F)``
`CategoricalStoch` logits, probs ``(B*, G, C)``  ``(B*, F)``
`BernoulliStoch`   logits, probs ``(B*, G, C)``  ``(B*, F)``
=================  ============================  ==========

A state behaves like a tensor of shape ``stoch.shape``: index it, ``stack`` it, call a tensor
method on it, and every field follows. States are torch pytrees, so they pass through
``torch.compile`` and ``torch.func``. Nothing here looks at values: there is no host
synchronisation, and invalid *numbers* (a negative std) are not reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ml_networks._compat import UnknownDistributionError, checked_keywords, did_you_mean
from ml_networks.io import load_blosc2_with_dtype, save_blosc2
from ml_networks.kernels.torch import BinarySphericalCodes, binary_spherical_quantize
from ml_networks.shapes import BernoulliShape, CategoricalShape, NormalShape, show_shapes
from ml_networks.torch.utils import gumbel_noise, one_hot_of_largest, straight_through

if TYPE_CHECKING:
    import os
    from typing import Self

__all__ = [
    "BSQCodebook",
    "BernoulliShape",
    "BernoulliStoch",
    "BernoulliStraightThrough",
    "CategoricalShape",
    "CategoricalStoch",
    "Distribution",
    "NormalShape",
    "NormalStoch",
    "StateDistribution",
    "StochState",
    "UnknownDistributionError",
    "cat_dist",
    "get_dist",
    "stack_dist",
]

State = TypeVar("State", bound="StochState")

MAX_BITS = 63
"""Most bits of a code: its index is a non-negative int64."""
_MIN_STD = 1e-6
# They keep the order of the elements, so the fields follow the new shape of `stoch`.
_RESHAPING = frozenset({"flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view"})


class StateDistribution(D.Independent):
    """The torch distribution of a state.

    Unlike :class:`torch.distributions.Independent` it has a Kullback-Leibler divergence to a
    distribution that is not wrapped, for example the ``Normal(0, 1)`` of a variational
    autoencoder: the divergences of the single features, summed over the event axes.
    """


@D.register_kl(StateDistribution, D.Independent)  # type: ignore[untyped-decorator]
def _kl_state_independent(p: StateDistribution, q: D.Independent) -> Tensor:
    if p.event_shape != q.event_shape and q.event_shape:
        raise ValueError(
            f"the events of the two distributions have shapes {tuple(p.event_shape)} and "
            f"{tuple(q.event_shape)}"
        )
    return _sum_last(D.kl_divergence(p.base_dist, q.base_dist), p.reinterpreted_batch_ndims)


@D.register_kl(StateDistribution, D.Distribution)  # type: ignore[untyped-decorator]
def _kl_state_distribution(p: StateDistribution, q: D.Distribution) -> Tensor:
    return _sum_last(D.kl_divergence(p.base_dist, q), p.reinterpreted_batch_ndims)


class BernoulliStraightThrough(D.Bernoulli):
    """A Bernoulli distribution whose samples pass their gradient on to ``probs`` unchanged."""

    has_rsample = True

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return 0/1 samples with the gradient of ``probs``."""
        return straight_through(self.sample(torch.Size(sample_shape)), self.probs)


class StochState:
    """What the states have in common. Use :class:`NormalStoch` and its siblings.

    Every method of :class:`torch.Tensor` that is not defined here is called on each field
    (``detach``, ``to``, ``float``, ``clone``, ...). Axes are those of ``stoch``: the feature axis
    is the last one, and the parameters' ``(groups, classes)`` axes count as that one.
    """

    _names: ClassVar[tuple[str, ...]]
    _shape_type: ClassVar[Callable[..., Any]]
    _printed: ClassVar[tuple[str, ...]]

    stoch: Tensor

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        raise NotImplementedError

    def _values(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._names]

    def _map(self, function: Callable[[Tensor], Any]) -> Any:
        results = [function(value) for value in self._values()]
        if all(hasattr(result, "shape") for result in results):
            return type(self)(*results)
        return dict(zip(self._names, results, strict=True))

    def _like_stoch(self, stoch: Tensor) -> Self:
        """Return the state with ``stoch`` in a new shape of the same elements."""
        raise NotImplementedError

    def _axis(self, dim: int, n_axes: int) -> int:
        """Return ``dim``, an axis among the ``n_axes`` of ``stoch``, as one from the front.

        From the front an axis has the same number in every field.
        """
        if not -n_axes <= dim < n_axes:
            raise IndexError(f"dim is {dim}; this state has axes {-n_axes} to {n_axes - 1}")
        return dim % n_axes

    def __getattr__(self, name: str) -> Any:
        # Reached for a missing attribute only; copying and pickling look for such names.
        if name.startswith("_") or name in self._names or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if not callable(getattr(Tensor, name)):
            return getattr(self.stoch, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            if name in _RESHAPING:
                return self._like_stoch(getattr(self.stoch, name)(*args, **kwargs))
            return self._map(lambda value: getattr(value, name)(*args, **kwargs))

        return method

    def __getitem__(self, index: Any) -> Self:
        """Return the state of some of the batch: ``index`` applies to every field."""
        result: Self = self._map(lambda value: value[index])
        return result

    def __len__(self) -> int:
        return len(self.stoch)

    @property
    def shape(self) -> Any:
        """Shapes of all fields, as :class:`NormalShape`, ..."""
        return type(self)._shape_type(*(value.shape for value in self._values()))

    def __repr__(self) -> str:
        return show_shapes(type(self).__name__, {n: getattr(self, n).shape for n in self._printed})

    def get_distribution(self, independent: int = 1) -> StateDistribution:
        """Return the torch distribution, its last ``independent`` batch axes one event.

        float16 and bfloat16 parameters are widened to float32: their rounding would drown the
        logarithms.
        """
        return StateDistribution(self._base_distribution(), independent, validate_args=False)

    def _base_distribution(self) -> D.Distribution:
        raise NotImplementedError

    def log_prob(self, value: Tensor | None = None) -> Tensor:
        """Return the log-probability (density) of a sample of the shape of ``stoch``.

        Parameters
        ----------
        value
            ``(..., B*, F)``. Default: ``stoch``.

        Returns
        -------
        Tensor
            ``(..., B*)``, the sum over the features.
        """
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write each field to ``<path>/<field>.blosc2``; the folder is created."""
        for name in self._names:
            save_blosc2(getattr(self, name), Path(path) / f"{name}.blosc2")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote, with its dtypes, onto the CPU.

        Raises
        ------
        FileNotFoundError
            If the folder lacks a field.
        ValueError
            If a file is torn, or the shapes do not fit.
        """
        values = []
        for name in cls._names:
            file = Path(path) / f"{name}.blosc2"
            array, dtype_name = load_blosc2_with_dtype(file)
            dtype = getattr(torch, dtype_name, None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{file} holds {dtype_name}, which is no dtype of torch")
            values.append(torch.from_numpy(array).to(dtype))
        return cls(*values)


@dataclass(eq=False, repr=False)
class NormalStoch(StochState):
    """A normal distribution with a diagonal covariance, and a sample.

    Attributes
    ----------
    mean, std, stoch
        ``(B*, F)``.

    Raises
    ------
    ValueError
        If the shapes differ.
    """

    _names = NormalShape._fields
    _shape_type = NormalShape
    _printed = ("mean", "std", "stoch")

    mean: Tensor
    std: Tensor
    stoch: Tensor

    def _check(self) -> None:
        if not self.mean.shape == self.std.shape == self.stoch.shape:
            raise ValueError(
                f"mean, std and stoch must have one shape, got {tuple(self.mean.shape)}, "
                f"{tuple(self.std.shape)} and {tuple(self.stoch.shape)}"
            )

    def _like_stoch(self, stoch: Tensor) -> NormalStoch:
        return NormalStoch(self.mean.reshape(stoch.shape), self.std.reshape(stoch.shape), stoch)

    def _base_distribution(self) -> D.Normal:
        return D.Normal(_widened(self.mean), _widened(self.std), validate_args=False)

    def log_prob(self, value: Tensor | None = None) -> Tensor:  # noqa: D102
        return self.get_distribution().log_prob(self.stoch if value is None else value)


@dataclass(eq=False, repr=False)
class _DiscreteStoch(StochState):
    _names = CategoricalShape._fields

    logits: Tensor
    probs: Tensor
    stoch: Tensor

    def _check(self) -> None:
        logits, probs, stoch = self._values()
        if (
            logits.shape != probs.shape
            or logits.ndim < 2
            or stoch.shape != (*logits.shape[:-2], logits.shape[-2] * logits.shape[-1])
        ):
            raise ValueError(
                "logits and probs must be (*batch, groups, classes) and stoch "
                f"(*batch, groups * classes), got {tuple(logits.shape)}, {tuple(probs.shape)} "
                f"and {tuple(stoch.shape)}. Indices and tensor methods may touch the batch axes "
                "only"
            )

    def _like_stoch(self, stoch: Tensor) -> Self:
        n_classes = self.logits.shape[-1]
        if stoch.ndim == 0 or stoch.shape[-1] % n_classes:
            raise ValueError(
                f"the last axis of shape {tuple(stoch.shape)} must hold the features, a multiple "
                f"of the {n_classes} classes"
            )
        shape = (*stoch.shape[:-1], stoch.shape[-1] // n_classes, n_classes)
        return type(self)(self.logits.reshape(shape), self.probs.reshape(shape), stoch)

    def _grouped(self, value: Tensor | None) -> Tensor:
        value = self.stoch if value is None else value
        return value.unflatten(-1, self.logits.shape[-2:])


class CategoricalStoch(_DiscreteStoch):
    """``G`` categorical distributions over ``C`` classes, and a one-hot sample of each.

    Attributes
    ----------
    logits, probs
        ``(B*, G, C)``. The distribution is that of ``probs``.
    stoch
        ``(B*, G * C)``, the one-hot vectors side by side.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """

    _shape_type = CategoricalShape
    _printed = ("logits", "stoch", "probs")

    def _base_distribution(self) -> D.OneHotCategoricalStraightThrough:
        probs = _widened(self.probs)
        return D.OneHotCategoricalStraightThrough(probs=probs, validate_args=False)

    def log_prob(self, value: Tensor | None = None) -> Tensor:
        """Return the log-probability of one-hot vectors, ``{0, 1}`` or ``{-1, 1}``.

        ``value`` (default ``stoch``) is ``(..., B*, F)``, the result ``(..., B*)``.
        """
        return self.get_distribution().log_prob(self._grouped(value))


class BernoulliStoch(_DiscreteStoch):
    """``G`` groups of ``C`` Bernoulli distributions, and a sample of each.

    Attributes
    ----------
    logits, probs
        ``(B*, G, C)``.
    stoch
        ``(B*, G * C)``: bits ``{0, 1}`` or, spherical, ``{-1, 1} / sqrt(C)``.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """

    _shape_type = BernoulliShape
    _printed = ("logits", "stoch", "probs")

    def _base_distribution(self) -> BernoulliStraightThrough:
        return BernoulliStraightThrough(logits=_widened(self.logits), validate_args=False)

    def log_prob(self, value: Tensor | None = None) -> Tensor:
        """Return the log-probability of bits, ``{0, 1}`` or ``{-1, 1} / sqrt(C)``.

        ``value`` (default ``stoch``) is ``(..., B*, F)``, the result ``(..., B*)``.
        """
        logits = _widened(self.logits)
        bits = (self._grouped(value) > 0).to(logits.dtype)
        return self.get_distribution(independent=2).log_prob(bits)


def _register_pytree(cls: type[StochState]) -> None:
    names = cls._names

    def flatten(state: StochState) -> tuple[list[Any], None]:
        return state._values(), None

    def flatten_with_keys(state: StochState) -> tuple[list[tuple[Any, Any]], None]:
        keys = [pytree.GetAttrKey(name) for name in names]
        return list(zip(keys, state._values(), strict=True)), None

    def unflatten(values: Any, context: Any) -> StochState:
        # Transforms put what they like into the leaves, so nothing is checked.
        state = object.__new__(cls)
        for name, value in zip(names, values, strict=True):
            setattr(state, name, value)
        return state

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"ml_networks.{cls.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


for _state_type in (NormalStoch, CategoricalStoch, BernoulliStoch):
    _register_pytree(_state_type)


def get_dist(state: StochState) -> StateDistribution:
    """Return the torch distribution of a state, all axes after the batch one event.

    Raises
    ------
    TypeError
        If ``state`` is no state.
    """
    if not isinstance(state, StochState):
        raise TypeError(f"state must be a StochState, got {type(state).__name__}")
    return state.get_distribution(2 if isinstance(state, BernoulliStoch) else 1)


def cat_dist(stochs: Sequence[State], dim: int = -1) -> State:
    """Concatenate states along an existing axis of ``stoch``.

    ``dim=-1`` joins features: for categorical and Bernoulli states, groups.

    Raises
    ------
    TypeError, ValueError
        If ``stochs`` is empty, or not of one kind of state.
    """
    first = _first_of_a_kind(stochs)
    axis = first._axis(dim, first.stoch.ndim)
    return _combine(stochs, lambda values: torch.cat(values, axis))


def stack_dist(stochs: Sequence[State], dim: int = 0) -> State:
    """Stack states along a new axis, ``dim`` of the new ``stoch``.

    Raises
    ------
    TypeError, ValueError
        If ``stochs`` is empty, or not of one kind of state.
    """
    first = _first_of_a_kind(stochs)
    axis = first._axis(dim, first.stoch.ndim + 1)
    return _combine(stochs, lambda values: torch.stack(values, axis))


def _first_of_a_kind(stochs: Sequence[State]) -> State:
    if not stochs:
        raise ValueError("stochs is empty; give at least one state")
    kinds = sorted({type(state).__name__ for state in stochs})
    if len(kinds) > 1 or not isinstance(stochs[0], StochState):
        raise TypeError(f"stochs must be states of one kind, got {', '.join(kinds)}")
    return stochs[0]


def _combine(stochs: Sequence[State], function: Callable[[list[Tensor]], Tensor]) -> State:
    columns = zip(*(state._values() for state in stochs), strict=True)
    return type(stochs[0])(*(function(list(column)) for column in columns))


@checked_keywords()
class Distribution(nn.Module):
    """Turn features into a distribution and a reparametrised sample of it.

    Parameters
    ----------
    in_dim
        Number of features ``F`` of the sample.
    dist
        ``"normal"``: the input ``(B*, 2 F)`` is the mean and, through softplus, the standard
        deviation. ``"categorical"``: the input ``(B*, F)`` is the logits of ``n_groups``
        distributions over ``F / n_groups`` classes. ``"bernoulli"``: it is the logits of
        ``n_groups`` groups of ``F / n_groups`` bits.
    n_groups
        Default 1. Must divide ``in_dim``; a normal distribution has no use for it.
    spherical
        Categorical samples are ``{-1, 1}`` instead of ``{0, 1}``. The bits of each group of a
        Bernoulli sample become a point on the unit sphere, ``{-1, 1} / sqrt(F / n_groups)``.

    Raises
    ------
    UnknownDistributionError
        If ``dist`` is another name.
    ValueError
        If ``n_groups`` does not divide ``in_dim``.
    """

    def __init__(self, in_dim: int, dist: str, n_groups: int = 1, spherical: bool = False) -> None:
        super().__init__()
        if dist not in _KINDS:
            raise UnknownDistributionError(
                f"dist is {dist!r}{did_you_mean(str(dist), _KINDS)}; it takes {', '.join(_KINDS)}"
            )
        if in_dim < 1 or n_groups < 1 or (dist != "normal" and in_dim % n_groups):
            raise ValueError(f"n_groups = {n_groups} must divide in_dim = {in_dim}, both above 0")
        self.in_dim = in_dim
        self.dist = dist
        self.n_groups = n_groups
        self.spherical = spherical
        self.n_class = in_dim // n_groups
        # Present whatever the distribution, because the checkpoints of 0.2.6 hold its mask. Codes
        # too wide for an index have none there either.
        if spherical and 1 <= self.n_class <= MAX_BITS:
            self.codebook = BSQCodebook(self.n_class)

    def extra_repr(self) -> str:
        """Return the arguments, for the printed module."""
        return (
            f"in_dim={self.in_dim}, dist={self.dist!r}, n_groups={self.n_groups}, "
            f"spherical={self.spherical}"
        )

    def forward(self, x: Tensor, deterministic: bool = False, inv_tmp: float = 1.0) -> StochState:
        """Return the distribution that ``x`` describes, with a sample.

        Parameters
        ----------
        x
            ``(B*, 2 F)`` for a normal distribution, else ``(B*, F)``.
        deterministic
            Take the mean, the most probable class or the more probable value of each bit (0 when
            both are as probable) in place of a random sample.
        inv_tmp
            Inverse temperature, which multiplies the logits. A categorical state keeps the
            logits as they came and applies it to ``probs``; a normal one has no use for it.

        Raises
        ------
        ValueError
            If the last axis of ``x`` has the wrong length.
        """
        state: StochState = getattr(self, self.dist)(x, deterministic, inv_tmp)
        return state

    def normal(
        self, mu_std: Tensor, deterministic: bool = False, inv_tmp: float = 1.0
    ) -> NormalStoch:
        """Return the normal state of ``(B*, 2 F)``: ``std = softplus(second half) + 1e-6``."""
        self._check_width(mu_std, 2 * self.in_dim)
        mean, raw_std = mu_std.chunk(2, -1)
        std = F.softplus(raw_std) + _MIN_STD
        stoch = mean if deterministic else mean + std * torch.randn_like(std)
        return NormalStoch(mean, std, stoch)

    def categorical(
        self, logits: Tensor, deterministic: bool = False, inv_tmp: float = 1.0
    ) -> CategoricalStoch:
        """Return the categorical state of ``(B*, F)``, sampled by the Gumbel-max trick."""
        self._check_width(logits, self.in_dim)
        logits = logits.unflatten(-1, (self.n_groups, self.n_class))
        scaled = logits * inv_tmp
        probs = scaled.softmax(-1)
        if deterministic:
            one_hot = self.deterministic_onehot(probs)
        else:
            noisy = scaled.detach().float() + gumbel_noise(scaled)
            one_hot = straight_through(one_hot_of_largest(noisy, -1, probs.dtype), probs)
        stoch = 2 * one_hot - 1 if self.spherical else one_hot
        return CategoricalStoch(logits, probs, stoch.flatten(-2))

    def bernoulli(
        self, logits: Tensor, deterministic: bool = False, inv_tmp: float = 1.0
    ) -> BernoulliStoch:
        """Return the Bernoulli state of ``(B*, F)``."""
        self._check_width(logits, self.in_dim)
        logits = logits.unflatten(-1, (self.n_groups, self.n_class)) * inv_tmp
        probs = logits.sigmoid()
        threshold = 0.5 if deterministic else torch.rand_like(probs, dtype=torch.float32)
        bits = probs > threshold
        stoch = straight_through(bits.to(probs.dtype), probs)
        if self.spherical:
            stoch = BSQCodebook.bits_to_codes(stoch)
        return BernoulliStoch(logits, probs, stoch.flatten(-2))

    def deterministic_onehot(self, input: Tensor) -> Tensor:
        """Return the one-hot vector of the largest of ``(..., C)``, with the input's gradient."""
        return straight_through(one_hot_of_largest(input, -1, input.dtype), input)

    def _check_width(self, x: Tensor, width: int) -> None:
        if x.shape[-1] != width:
            raise ValueError(
                f"a {self.dist} distribution with in_dim={self.in_dim} takes {width} features in "
                f"the last axis, got shape {tuple(x.shape)}"
            )


_KINDS = ("normal", "categorical", "bernoulli")


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x


def _sum_last(x: Tensor, n_axes: int) -> Tensor:
    return x.sum(tuple(range(-n_axes, 0))) if n_axes else x


@checked_keywords()
class BSQCodebook(nn.Module):
    r"""Binary spherical quantization of feature vectors (Zhao et al. 2024, arXiv 2406.07548).

    A vector is projected to ``codebook_dim`` = :math:`D` features, normalised to length 1 and
    replaced by the nearest of the :math:`2^D` corners :math:`\{-1, 1\}^D / \sqrt D`, with a
    straight-through gradient; the corner is projected back. There is no table of codes: the
    index of a code is its signs as bits, the first feature the most significant.

    Parameters
    ----------
    dim
        Width of the features. ``BSQCodebook(codebook_dim=D)`` means ``dim = D``.
    codebook_dim
        Bits of a code, 1 to 63. Default ``dim``; else two linear layers project there and back.
    temperature
        Factor of the logits that the entropies are taken of: larger is more certain. Default 1.

    Raises
    ------
    TypeError, ValueError
        If neither width is given, or a code has no or more than 63 bits.
    """

    mask: Tensor

    def __init__(
        self,
        dim: int | None = None,
        codebook_dim: int | None = None,
        *,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        bits = dim if codebook_dim is None else codebook_dim
        if bits is None:
            raise TypeError("BSQCodebook needs dim, the width of the features")
        if not 1 <= bits <= MAX_BITS:
            raise ValueError(f"a code has 1 to {MAX_BITS} bits, got {bits}; give a codebook_dim")
        self.dim = bits if dim is None else dim
        self.codebook_dim = bits
        self.temperature = temperature
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.dim != bits:
            self.project_in = nn.Linear(self.dim, bits)
            self.project_out = nn.Linear(bits, self.dim)
        self.register_buffer("mask", 2 ** torch.arange(bits - 1, -1, -1))

    def extra_repr(self) -> str:
        """Return the arguments, for the printed module."""
        return f"dim={self.dim}, codebook_dim={self.codebook_dim}"

    def forward(self, features: Tensor) -> Tensor:
        """Return the quantized features, ``(B*, dim)`` as they came."""
        return self.quantize(features).quantized

    def quantize(
        self, features: Tensor, *, entropy_bits: int | None = None
    ) -> BinarySphericalCodes:
        """Return the quantized features with what training needs.

        Parameters
        ----------
        features
            ``(B*, dim)``.
        entropy_bits
            Ask for the entropies: that of each code (small = certain, to be minimised) and that
            of all codes together (large = all codes in use, to be maximised), the latter kept
            jointly for blocks of so many bits, a divisor of ``codebook_dim``.

        Returns
        -------
        BinarySphericalCodes
            quantized ``(B*, dim)``, indices ``(B*)``, sample_entropy ``(B*)`` and
            codebook_entropy ``()`` in nats, both None unless asked for.
        """
        if features.shape[-1] != self.dim:
            raise ValueError(
                f"features must have {self.dim} in the last axis, got {tuple(features.shape)}"
            )
        codes = binary_spherical_quantize(
            self.project_in(features), temperature=self.temperature, entropy_bits=entropy_bits
        )
        return codes._replace(quantized=self.project_out(codes.quantized))

    def encode(self, features: Tensor) -> Tensor:
        """Return the index ``(B*)`` of the code of each ``(B*, dim)``."""
        return self.quantize(features).indices

    def decode(self, indices: Tensor) -> Tensor:
        """Return the quantized features ``(B*, dim)`` of indices ``(B*)``."""
        codes = self.indices_to_codes(indices[..., None])
        if isinstance(self.project_out, nn.Linear):
            codes = codes.to(self.project_out.weight.dtype)
        decoded: Tensor = self.project_out(codes)
        return decoded

    @staticmethod
    def bits_to_codes(bits: Tensor) -> Tensor:
        """Return the codes ``{-1, 1} / sqrt(D)`` of bits ``{0, 1}``, ``(..., D)``.

        Soft bits in between give the point of the sphere in their direction.
        """
        if not bits.is_floating_point():
            bits = bits.to(torch.get_default_dtype())
        return F.normalize(2 * bits - 1, dim=-1)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the codes ``(..., codebook_dim)`` of indices ``(..., 1)`` or ``(...)``.

        A last axis of length 1 is dropped; :meth:`decode` keeps every axis.
        """
        if indices.ndim == 0 or indices.shape[-1] != 1:
            indices = indices[..., None]
        return self.bits_to_codes((indices & self.mask) != 0)
