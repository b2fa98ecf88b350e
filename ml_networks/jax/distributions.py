"""Stochastic features: distributions from network outputs, their samples, and binary codes.

Each means what its namesake in :mod:`ml_networks.torch.distributions` means. A
:class:`Distribution` turns the output of a network into a *state*: the parameters of the
distribution together with one reparametrised sample ``stoch`` that feeds the next network. With
``B*`` any leading batch axes, ``F = in_dim`` features, ``G = n_groups`` and ``C = F / G``:

=================  ============================  ==========
state              parameters                    ``stoch``
=================  ============================  ==========
`NormalStoch`      mean, std ``(B*, F)``         ``(B*, F)``
`CategoricalStoch` logits, probs ``(B*, G, C)``  ``(B*, F)``
`BernoulliStoch`   logits, probs ``(B*, G, C)``  ``(B*, F)``
=================  ============================  ==========

A state behaves like an array of shape ``stoch.shape``: index it, ``stack`` it, call an array
method on it, and every field follows. States are pytrees, so they pass through ``jit``, ``grad``,
``vmap`` and ``scan``. Nothing here looks at values: invalid *numbers* (a negative std) are not
reported. distrax is imported when the first distribution is made of a state, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.errors import TraceContextError

from ml_networks._compat import UnknownDistributionError, checked_keywords, did_you_mean
from ml_networks.io import load_blosc2_with_dtype, save_blosc2
from ml_networks.jax.activations import L2Norm
from ml_networks.jax.layers import Identity
from ml_networks.jax.primitives import Linear
from ml_networks.jax.rngs import RngsLike, as_rngs
from ml_networks.jax.utils import gumbel_noise, one_hot_of_largest, straight_through
from ml_networks.kernels.jax import BinarySphericalCodes, binary_spherical_quantize
from ml_networks.shapes import BernoulliShape, CategoricalShape, NormalShape, show_shapes

if TYPE_CHECKING:
    import os
    from typing import Self

    from ml_networks.jax._distrax import StateDistribution

__all__ = [
    "BSQCodebook",
    "BernoulliShape",
    "BernoulliStoch",
    "CategoricalShape",
    "CategoricalStoch",
    "Distribution",
    "NormalShape",
    "NormalStoch",
    "StochState",
    "UnknownDistributionError",
    "cat_dist",
    "get_dist",
    "stack_dist",
]

Array = jax.Array
State = TypeVar("State", bound="StochState")

MAX_BITS = 63
"""Most bits of a code, as in torch, where its index is a non-negative int64."""
_WORD_BITS = 32
_MIN_STD = 1e-6


class StochState:
    """What the states have in common. Use :class:`NormalStoch` and its siblings.

    Every method of :class:`jax.Array` that is not defined here is called on each field
    (``astype``, ``copy``, ``sum``, ...). Axes are those of ``stoch``: the feature axis is the last
    one, and the parameters' ``(groups, classes)`` axes count as that one.
    """

    _names: ClassVar[tuple[str, ...]]
    _shape_type: ClassVar[Callable[..., Any]]
    _printed: ClassVar[tuple[str, ...]]

    stoch: Array

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        raise NotImplementedError

    def _values(self) -> list[Array]:
        return [getattr(self, name) for name in self._names]

    def _map(self, function: Callable[[Array], Any]) -> Any:
        results = [function(value) for value in self._values()]
        if all(hasattr(result, "shape") for result in results):
            return type(self)(*results)
        return dict(zip(self._names, results, strict=True))

    def _like_stoch(self, stoch: Array) -> Self:
        """Return the state with ``stoch`` in a new shape of the same elements."""
        raise NotImplementedError

    def _axis(self, axis: int, n_axes: int) -> int:
        """Return ``axis``, one of the ``n_axes`` of ``stoch``, counted from the front.

        From the front an axis has the same number in every field.
        """
        if not -n_axes <= axis < n_axes:
            raise IndexError(f"axis is {axis}; this state has axes {-n_axes} to {n_axes - 1}")
        return axis % n_axes

    def __getattr__(self, name: str) -> Any:
        # Reached for a missing attribute only; copying and pickling look for such names.
        if name.startswith("_") or name in self._names or not hasattr(jax.Array, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if not callable(getattr(jax.Array, name)):
            return getattr(self.stoch, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            return self._map(lambda value: getattr(value, name)(*args, **kwargs))

        return method

    def __getitem__(self, index: Any) -> Self:
        """Return the state of some of the batch: ``index`` applies to every field."""
        result: Self = self._map(lambda value: value[index])
        return result

    def __len__(self) -> int:
        return len(self.stoch)

    def __iter__(self) -> Iterator[Self]:
        # Without it Python would count up until an index is refused, and JAX refuses none.
        return (self[index] for index in range(len(self)))

    @property
    def shape(self) -> Any:
        """Shapes of all fields, as :class:`NormalShape`, ..."""
        return type(self)._shape_type(*(value.shape for value in self._values()))

    def __repr__(self) -> str:
        # A transform may have put anything in place of an array.
        fields = {name: getattr(self, name) for name in self._printed}
        shapes = {name: getattr(value, "shape", value) for name, value in fields.items()}
        return show_shapes(type(self).__name__, shapes)

    def stop_gradient(self) -> Self:
        """Return the state without gradients."""
        result: Self = self._map(jax.lax.stop_gradient)
        return result

    detach = stop_gradient

    def to_numpy(self) -> Self:
        """Return the state with NumPy arrays as fields."""
        result: Self = self._map(np.asarray)
        return result

    def device_put(self, device: Any = None) -> Self:
        """Return the state on a device, by default JAX's default one."""
        result: Self = self._map(lambda value: jax.device_put(value, device))
        return result

    def reshape(self, *shape: Any) -> Self:
        """Return the state with ``stoch`` in another shape, its features last."""
        return self._like_stoch(self.stoch.reshape(*shape))

    @checked_keywords(start_dim="start_axis", end_dim="end_axis")
    def flatten(self, start_axis: int = 0, end_axis: int = -1) -> Self:
        """Return the state with axes ``start_axis`` to ``end_axis`` of ``stoch`` joined."""
        shape = self.stoch.shape
        first, last = (self._axis(axis, len(shape)) for axis in (start_axis, end_axis))
        return self.reshape(*shape[:first], -1, *shape[last + 1 :])

    @checked_keywords(dim="axis")
    def squeeze(self, axis: int | tuple[int, ...] | None = None) -> Self:
        """Return the state without an axis of length 1, by default without all of them."""
        return self._like_stoch(self.stoch.squeeze(axis))

    @checked_keywords(dim="axis")
    def expand_dims(self, axis: int) -> Self:
        """Return the state with a new axis of length 1, ``axis`` of the new ``stoch``."""
        return self._like_stoch(jnp.expand_dims(self.stoch, axis))

    unsqueeze = expand_dims

    def transpose(self, *axes: int) -> Self:
        """Return the state with its axes in the order ``axes``.

        Raises
        ------
        ValueError
            If ``axes`` is no permutation, or moves the features of a discrete state.
        """
        n_axes = self.stoch.ndim
        order = tuple(self._axis(axis, n_axes) for axis in axes)
        extra = self._values()[0].ndim - n_axes
        if sorted(order) != list(range(n_axes)) or (extra and order[-1] != n_axes - 1):
            last = ", the feature axis last" if extra else ""
            raise ValueError(f"axes must be an order of the {n_axes} axes{last}; got {axes}")
        whole = (*order, *range(n_axes, n_axes + extra))
        result: Self = self._map(lambda value: value.transpose(whole[: value.ndim]))
        return result

    def swapaxes(self, axis0: int, axis1: int) -> Self:
        """Return the state with two axes of ``stoch`` exchanged, as :meth:`transpose`."""
        n_axes = self.stoch.ndim
        order = list(range(n_axes))
        a, b = self._axis(axis0, n_axes), self._axis(axis1, n_axes)
        order[a], order[b] = b, a
        return self.transpose(*order)

    def broadcast(self, shape: tuple[int, ...]) -> Self:
        """Return the state with ``stoch`` broadcast to ``shape``, whose last axis is as it was."""
        shape = tuple(shape)
        if not shape or shape[-1] != self.stoch.shape[-1]:
            raise ValueError(f"shape must end in the {self.stoch.shape[-1]} features, got {shape}")
        n_batch = self.stoch.ndim - 1
        result: Self = self._map(
            lambda value: jnp.broadcast_to(value, (*shape[:-1], *value.shape[n_batch:]))
        )
        return result

    def get_distribution(self, independent: int = 1) -> StateDistribution:
        """Return the distrax distribution, its last ``independent`` batch axes one event.

        float16 and bfloat16 parameters are widened to float32: their rounding would drown the
        logarithms.
        """
        raise NotImplementedError

    def log_prob(self, value: Array | None = None) -> Array:
        """Return the log-probability (density) of a sample of the shape of ``stoch``.

        Parameters
        ----------
        value
            ``(..., B*, F)``. Default: ``stoch``.

        Returns
        -------
        Array
            ``(..., B*)``, the sum over the features.
        """
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write each field to ``<path>/<field>.blosc2``; the folder is created.

        The torch state of the same name reads the files too.
        """
        for name in self._names:
            save_blosc2(getattr(self, name), Path(path) / f"{name}.blosc2")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote, here or in torch, onto the default device.

        The dtypes are those that were saved; float64 becomes float32 unless ``jax_enable_x64`` is
        set.

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
            try:
                dtype = jnp.dtype(dtype_name)
            except TypeError as error:
                raise ValueError(f"{file} holds {dtype_name}, which is no dtype of JAX") from error
            values.append(jnp.asarray(array.astype(dtype)))
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

    mean: Array
    std: Array
    stoch: Array

    def _check(self) -> None:
        if not self.mean.shape == self.std.shape == self.stoch.shape:
            raise ValueError(
                f"mean, std and stoch must have one shape, got {self.mean.shape}, "
                f"{self.std.shape} and {self.stoch.shape}"
            )

    def _like_stoch(self, stoch: Array) -> NormalStoch:
        return NormalStoch(self.mean.reshape(stoch.shape), self.std.reshape(stoch.shape), stoch)

    def get_distribution(self, independent: int = 1) -> StateDistribution:  # noqa: D102
        from ml_networks.jax import _distrax

        return _distrax.normal(self.mean, self.std, independent)

    def log_prob(self, value: Array | None = None) -> Array:  # noqa: D102
        value = self.stoch if value is None else value
        log_prob: Array = self.get_distribution().log_prob(value)
        return log_prob


@dataclass(eq=False, repr=False)
class _DiscreteStoch(StochState):
    _names = CategoricalShape._fields

    logits: Array
    probs: Array
    stoch: Array

    def _check(self) -> None:
        logits, probs, stoch = self._values()
        if (
            logits.shape != probs.shape
            or logits.ndim < 2
            or stoch.shape != (*logits.shape[:-2], logits.shape[-2] * logits.shape[-1])
        ):
            raise ValueError(
                "logits and probs must be (*batch, groups, classes) and stoch "
                f"(*batch, groups * classes), got {logits.shape}, {probs.shape} and "
                f"{stoch.shape}. Indices and array methods may touch the batch axes only"
            )

    def _like_stoch(self, stoch: Array) -> Self:
        n_classes = self.logits.shape[-1]
        if stoch.ndim == 0 or stoch.shape[-1] % n_classes:
            raise ValueError(
                f"the last axis of shape {stoch.shape} must hold the features, a multiple of the "
                f"{n_classes} classes"
            )
        shape = (*stoch.shape[:-1], stoch.shape[-1] // n_classes, n_classes)
        return type(self)(self.logits.reshape(shape), self.probs.reshape(shape), stoch)

    def _grouped(self, value: Array | None) -> Array:
        value = self.stoch if value is None else value
        return value.reshape(*value.shape[:-1], *self.logits.shape[-2:])


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

    def get_distribution(self, independent: int = 1) -> StateDistribution:  # noqa: D102
        from ml_networks.jax import _distrax

        return _distrax.categorical(self.probs, independent)

    def log_prob(self, value: Array | None = None) -> Array:
        """Return the log-probability of one-hot vectors, ``{0, 1}`` or ``{-1, 1}``.

        ``value`` (default ``stoch``) is ``(..., B*, F)``, the result ``(..., B*)``.
        """
        log_prob: Array = self.get_distribution().log_prob(self._grouped(value))
        return log_prob


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

    def get_distribution(self, independent: int = 1) -> StateDistribution:  # noqa: D102
        from ml_networks.jax import _distrax

        return _distrax.bernoulli(self.logits, independent)

    def log_prob(self, value: Array | None = None) -> Array:
        """Return the log-probability of bits, ``{0, 1}`` or ``{-1, 1} / sqrt(C)``.

        ``value`` (default ``stoch``) is ``(..., B*, F)``, the result ``(..., B*)``.
        """
        bits = (self._grouped(value) > 0).astype(jnp.float32)
        log_prob: Array = self.get_distribution(independent=2).log_prob(bits)
        return log_prob


def _register_pytree(cls: type[StochState]) -> None:
    keys = [jax.tree_util.GetAttrKey(name) for name in cls._names]

    def flatten(state: StochState) -> tuple[list[Any], None]:
        return state._values(), None

    def flatten_with_keys(state: StochState) -> tuple[list[tuple[Any, Any]], None]:
        return list(zip(keys, state._values(), strict=True)), None

    def unflatten(_: None, values: Any) -> StochState:
        # Transforms put what they like into the leaves, so nothing is checked.
        state = object.__new__(cls)
        for name, value in zip(cls._names, values, strict=True):
            setattr(state, name, value)
        return state

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


for _state_type in (NormalStoch, CategoricalStoch, BernoulliStoch):
    _register_pytree(_state_type)


def get_dist(state: StochState) -> StateDistribution:
    """Return the distrax distribution of a state, all axes after the batch one event.

    Raises
    ------
    TypeError
        If ``state`` is no state.
    """
    if not isinstance(state, StochState):
        raise TypeError(f"state must be a StochState, got {type(state).__name__}")
    return state.get_distribution(2 if isinstance(state, BernoulliStoch) else 1)


@checked_keywords(dim="axis")
def cat_dist(stochs: Sequence[State], axis: int = -1) -> State:
    """Concatenate states along an existing axis of ``stoch``.

    ``axis=-1`` joins features: for categorical and Bernoulli states, groups. ``dim`` is another
    name.

    Raises
    ------
    TypeError, ValueError
        If ``stochs`` is empty, or not of one kind of state.
    """
    first = _first_of_a_kind(stochs)
    axis = first._axis(axis, first.stoch.ndim)
    return _combine(stochs, lambda values: jnp.concatenate(values, axis))


@checked_keywords(dim="axis")
def stack_dist(stochs: Sequence[State], axis: int = 0) -> State:
    """Stack states along a new axis, ``axis`` of the new ``stoch``; ``dim`` is another name.

    Raises
    ------
    TypeError, ValueError
        If ``stochs`` is empty, or not of one kind of state.
    """
    first = _first_of_a_kind(stochs)
    axis = first._axis(axis, first.stoch.ndim + 1)
    return _combine(stochs, lambda values: jnp.stack(values, axis))


def _first_of_a_kind(stochs: Sequence[State]) -> State:
    if not len(stochs):
        raise ValueError("stochs is empty; give at least one state")
    kinds = sorted({type(state).__name__ for state in stochs})
    if len(kinds) > 1 or not isinstance(stochs[0], StochState):
        raise TypeError(f"stochs must be states of one kind, got {', '.join(kinds)}")
    return stochs[0]


def _combine(stochs: Sequence[State], function: Callable[[list[Array]], Array]) -> State:
    columns = zip(*(state._values() for state in stochs), strict=True)
    return type(stochs[0])(*(function(list(column)) for column in columns))


@checked_keywords()
class Distribution(nnx.Module):
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
    rngs
        Where samples are drawn from unless a call brings a ``key``: the stream ``sample`` of an
        ``nnx.Rngs``, or its default stream; or a key. See :func:`ml_networks.jax.rngs.as_rngs`.

    Raises
    ------
    UnknownDistributionError
        If ``dist`` is another name.
    ValueError
        If ``n_groups`` does not divide ``in_dim``.

    Notes
    -----
    Drawing from ``rngs`` changes the module, which JAX's own transforms forbid for a module from
    outside: there give a ``key``, or use ``nnx.jit``, ``nnx.scan``, ...
    """

    def __init__(
        self,
        in_dim: int,
        dist: str,
        n_groups: int = 1,
        spherical: bool = False,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
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
        self.rngs = (
            None if rngs is None else as_rngs(rngs, draws_parameters=False)["sample"].fork()
        )
        # Present whatever the distribution, because torch's checkpoints hold its mask. Codes too
        # wide for an index have none there either.
        if spherical and 1 <= self.n_class <= MAX_BITS:
            self.codebook = BSQCodebook(self.n_class)

    def __call__(
        self,
        x: Array,
        deterministic: bool = False,
        inv_tmp: float = 1.0,
        key: Array | None = None,
    ) -> StochState:
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
        key
            A ``jax.random`` key to draw the sample with. Default: the next of ``rngs``.

        Raises
        ------
        ValueError
            If the last axis of ``x`` has the wrong length.
        TypeError
            If there is neither a ``key`` nor ``rngs`` to draw a sample with.
        """
        state: StochState = getattr(self, self.dist)(x, deterministic, inv_tmp, key)
        return state

    def normal(
        self,
        mu_std: Array,
        deterministic: bool = False,
        inv_tmp: float = 1.0,
        key: Array | None = None,
    ) -> NormalStoch:
        """Return the normal state of ``(B*, 2 F)``: ``std = softplus(second half) + 1e-6``."""
        self._check_width(mu_std, 2 * self.in_dim)
        mean, raw_std = jnp.split(mu_std, 2, -1)
        std = jax.nn.softplus(raw_std) + _MIN_STD
        if deterministic:
            return NormalStoch(mean, std, mean)
        # In half precision the noise would have few values.
        dtype = jnp.promote_types(std.dtype, jnp.float32)
        noise = jax.random.normal(self._key(key), std.shape, dtype).astype(std.dtype)
        return NormalStoch(mean, std, mean + std * noise)

    def categorical(
        self,
        logits: Array,
        deterministic: bool = False,
        inv_tmp: float = 1.0,
        key: Array | None = None,
    ) -> CategoricalStoch:
        """Return the categorical state of ``(B*, F)``, sampled by the Gumbel-max trick."""
        logits = self._grouped(logits)
        scaled = logits * inv_tmp
        probs = jax.nn.softmax(scaled, -1)
        if deterministic:
            one_hot = self.deterministic_onehot(probs)
        else:
            noise = gumbel_noise(self._key(key), scaled)
            noisy = jax.lax.stop_gradient(scaled).astype(jnp.float32) + noise
            one_hot = straight_through(one_hot_of_largest(noisy, -1, probs.dtype), probs)
        stoch = 2 * one_hot - 1 if self.spherical else one_hot
        return CategoricalStoch(logits, probs, _ungrouped(stoch))

    def bernoulli(
        self,
        logits: Array,
        deterministic: bool = False,
        inv_tmp: float = 1.0,
        key: Array | None = None,
    ) -> BernoulliStoch:
        """Return the Bernoulli state of ``(B*, F)``."""
        logits = self._grouped(logits) * inv_tmp
        probs = jax.nn.sigmoid(logits)
        if deterministic:
            bits = probs > 0.5
        else:
            bits = probs > jax.random.uniform(self._key(key), probs.shape, jnp.float32)
        stoch = straight_through(bits.astype(probs.dtype), probs)
        if self.spherical:
            stoch = BSQCodebook.bits_to_codes(stoch)
        return BernoulliStoch(logits, probs, _ungrouped(stoch))

    def deterministic_onehot(self, input: Array) -> Array:
        """Return the one-hot vector of the largest of ``(..., C)``, with the input's gradient."""
        return straight_through(one_hot_of_largest(input, -1, input.dtype), input)

    def _key(self, key: Array | None) -> Array:
        if key is not None:
            return key
        if self.rngs is None:
            raise TypeError(
                "there is nothing to draw a sample with: give key=jax.random.key(0) in the call, "
                "or rngs=jax.random.key(0) when making the Distribution"
            )
        try:
            return self.rngs()
        except TraceContextError as error:
            error.add_note(
                "A sample changes the random stream of a module, which is not traced here: give "
                "key= in the call, or pass the module in (nnx.jit, or nnx.split and nnx.merge)"
            )
            raise

    def _grouped(self, logits: Array) -> Array:
        self._check_width(logits, self.in_dim)
        return logits.reshape(*logits.shape[:-1], self.n_groups, self.n_class)

    def _check_width(self, x: Array, width: int) -> None:
        if x.shape[-1] != width:
            raise ValueError(
                f"a {self.dist} distribution with in_dim={self.in_dim} takes {width} features in "
                f"the last axis, got shape {x.shape}"
            )


_KINDS = ("normal", "categorical", "bernoulli")


def _ungrouped(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], -1)


@checked_keywords()
class BSQCodebook(nnx.Module):
    r"""Binary spherical quantization of feature vectors (Zhao et al. 2024, arXiv 2406.07548).

    A vector is projected to ``codebook_dim`` = :math:`D` features, normalised to length 1 and
    replaced by the nearest of the :math:`2^D` corners :math:`\{-1, 1\}^D / \sqrt D`, with a
    straight-through gradient; the corner is projected back. There is no table of codes: the
    index of a code is its signs as bits, the first feature the most significant.

    An index is an int32, or an int64 where ``jax_enable_x64`` is set. A code of more than 31 bits
    has no int32: without ``jax_enable_x64`` its index is two uint32 words on a last axis of
    length 2, the high one first. :meth:`decode` takes what :meth:`encode` gives, and NumPy's int64
    besides.

    Parameters
    ----------
    dim
        Width of the features. ``BSQCodebook(codebook_dim=D)`` means ``dim = D``.
    codebook_dim
        Bits of a code, 1 to 63. Default ``dim``; else two linear layers project there and back.
    temperature
        Factor of the logits that the entropies are taken of: larger is more certain. Default 1.
    rngs
        Needed for the two linear layers. See :func:`ml_networks.jax.rngs.as_rngs`.

    Raises
    ------
    TypeError, ValueError
        If neither width is given, a code has no or more than 63 bits, or ``rngs`` is missing.
    """

    def __init__(
        self,
        dim: int | None = None,
        codebook_dim: int | None = None,
        *,
        temperature: float = 1.0,
        rngs: RngsLike | None = None,
    ) -> None:
        bits = dim if codebook_dim is None else codebook_dim
        if bits is None:
            raise TypeError("BSQCodebook needs dim, the width of the features")
        if not 1 <= bits <= MAX_BITS:
            raise ValueError(f"a code has 1 to {MAX_BITS} bits, got {bits}; give a codebook_dim")
        self.dim = bits if dim is None else dim
        self.codebook_dim = bits
        self.temperature = temperature
        self.project_in: nnx.Module = Identity()
        self.project_out: nnx.Module = Identity()
        if self.dim != bits:
            rngs = as_rngs(rngs)
            self.project_in = Linear(self.dim, bits, rngs=rngs)
            self.project_out = Linear(bits, self.dim, rngs=rngs)

    def __call__(self, features: Array) -> Array:
        """Return the quantized features, ``(B*, dim)`` as they came."""
        return self.quantize(features).quantized

    def quantize(
        self, features: Array, *, entropy_bits: int | None = None
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
            quantized ``(B*, dim)``, indices ``(B*)`` or ``(B*, 2)``, sample_entropy ``(B*)`` and
            codebook_entropy ``()`` in nats, both None unless asked for.
        """
        if features.shape[-1] != self.dim:
            raise ValueError(
                f"features must have {self.dim} in the last axis, got {features.shape}"
            )
        codes = binary_spherical_quantize(
            self.project_in(features), temperature=self.temperature, entropy_bits=entropy_bits
        )
        return codes._replace(quantized=self.project_out(codes.quantized))

    def encode(self, features: Array) -> Array:
        """Return the index ``(B*)``, or ``(B*, 2)``, of the code of each ``(B*, dim)``."""
        return self.quantize(features).indices

    def decode(self, indices: Array | np.ndarray[Any, Any]) -> Array:
        """Return the quantized features ``(B*, dim)`` of indices ``(B*)``, or ``(B*, 2)``."""
        codes = self.bits_to_codes(self._bits(indices))
        if isinstance(self.project_out, Linear):
            codes = codes.astype(self.project_out.kernel.dtype)
        decoded: Array = self.project_out(codes)
        return decoded

    @staticmethod
    def bits_to_codes(bits: Array) -> Array:
        """Return the codes ``{-1, 1} / sqrt(D)`` of bits ``{0, 1}``, ``(..., D)``.

        Soft bits in between give the point of the sphere in their direction.
        """
        if not jnp.issubdtype(bits.dtype, jnp.floating):
            bits = bits.astype(jnp.float32)
        codes: Array = L2Norm()(2 * bits - 1)
        return codes

    def indices_to_codes(self, indices: Array | np.ndarray[Any, Any]) -> Array:
        """Return the codes ``(..., codebook_dim)`` of indices ``(..., 1)`` or ``(...)``.

        A last axis of length 1 (before that of the two words) is dropped; :meth:`decode` keeps
        every axis.
        """
        bits = self._bits(indices)
        if bits.ndim > 1 and bits.shape[-2] == 1:
            bits = bits.squeeze(-2)
        return self.bits_to_codes(bits)

    def _bits(self, indices: Array | np.ndarray[Any, Any]) -> Array:
        """The bits ``(B*, D)`` of indices, as booleans."""
        words = self._words(indices)
        shift = np.arange(self.codebook_dim - 1, -1, -1)
        word = words[..., np.where(shift < _WORD_BITS, -1, 0)]
        return (word >> jnp.asarray(shift % _WORD_BITS, word.dtype)) & 1 != 0

    def _words(self, indices: Array | np.ndarray[Any, Any]) -> Array:
        """The two words ``(B*, 2)`` of indices, the high one first, as uint32."""
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        if indices.dtype == jnp.uint32 and self.codebook_dim > _WORD_BITS - 1:
            if indices.ndim == 0 or indices.shape[-1] != 2:
                raise ValueError(
                    f"indices of {self.codebook_dim} bits must have two uint32 words in the last "
                    f"axis, got shape {indices.shape}"
                )
            return jnp.asarray(indices)
        if indices.dtype.itemsize < 8:
            low = jnp.asarray(indices).astype(jnp.uint32)
            return jnp.stack([jnp.zeros_like(low), low], -1)
        # NumPy splits its own, since JAX would cut them to 32 bits.
        xp: Any = jnp if isinstance(indices, jax.Array) else np
        halves = [indices >> _WORD_BITS, indices & (2**_WORD_BITS - 1)]
        return jnp.asarray(xp.stack(halves, -1).astype(xp.uint32))
