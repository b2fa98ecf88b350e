"""Hypernetworks: networks that make the weights of another network from a condition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from ml_networks._compat import checked_keywords
from ml_networks._hypernetworks import (
    NamedShapes,
    bias_value,
    check_encoding,
    fan_in,
    weight_gain,
)
from ml_networks.config import MLPConfig, as_config
from ml_networks.jax.base import BaseModule, FrozenParam
from ml_networks.jax.layers import MLPLayer
from ml_networks.jax.primitives import Conv, Linear
from ml_networks.jax.rngs import RngsLike, as_rngs

__all__ = [
    "HyperNet",
    "HyperNetMixin",
    "encode_input",
    "initialize_bias",
    "initialize_generator",
    "initialize_layer",
    "initialize_weight",
]

Array = jax.Array
Shape: TypeAlias = tuple[int, ...]
InputMode: TypeAlias = Literal["cos|sin", "z|1-z"] | None


def encode_input(input: Array, mode: InputMode = "cos|sin") -> Array:
    """Encode an array whose entries lie in [0, 1] along its last axis.

    Parameters
    ----------
    input
        ``(*batch, n)``.
    mode
        ``"cos|sin"``: ``[cos(pi z / 2), sin(pi z / 2)]``, of constant norm whatever z is.
        ``"z|1-z"``: ``[z, 1 - z]``. None: z itself.

    Returns
    -------
    Array
        ``(*batch, 2 n)``; ``(*batch, n)`` for None.

    Raises
    ------
    ValueError
        For another mode.
    """
    check_encoding(mode)
    if mode == "cos|sin":
        angle = input * (math.pi / 2)
        return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
    if mode == "z|1-z":
        return jnp.concatenate([input, 1 - input], -1)
    return input


def initialize_weight(
    key: Array, shape: Shape, distribution: str, nonlinearity: str | None = "LeakyReLU"
) -> Array:
    """Draw the kernel of a linear or convolution layer from a named distribution.

    Parameters
    ----------
    key
        A ``jax.random`` key.
    shape
        ``(*window, in, out)``.
    distribution
        ``"zeros"``, ``"kaiming_normal"``, ``"kaiming_uniform"`` (each also with ``_fanout``),
        ``"glorot_normal"``, ``"glorot_uniform"`` or ``"orthogonal"``.
    nonlinearity
        Activation that follows, whose gain multiplies the weight: sqrt(2) for those like ReLU,
        5/3 for Tanh, 3/4 for SELU, otherwise 1. Upper and lower case are one.

    Raises
    ------
    ValueError
        For another distribution.
    """
    gain = weight_gain(distribution, nonlinearity)
    if distribution == "zeros":
        return jnp.zeros(shape)
    if distribution == "orthogonal":
        return jax.nn.initializers.orthogonal(gain)(key, shape)
    mode: Literal["fan_in", "fan_out", "fan_avg"] = "fan_in"
    if "glorot" in distribution:
        mode = "fan_avg"
    elif distribution.endswith("fanout"):
        mode = "fan_out"
    form: Literal["uniform", "normal"] = "uniform" if "uniform" in distribution else "normal"
    return jax.nn.initializers.variance_scaling(gain**2, mode, form)(key, shape)


def initialize_bias(shape: Shape, distribution: float = 0.0) -> Array:
    """Return a bias filled with a constant.

    Raises
    ------
    ValueError
        If the constant is not a number.
    """
    return jnp.full(shape, bias_value(distribution))


def initialize_layer(
    layer: nnx.Module,
    distribution: str | None = "kaiming_normal",
    init_bias: float | None = 0.0,
    nonlinearity: str | None = "LeakyReLU",
    *,
    rngs: RngsLike | None = None,
) -> None:
    """Initialise the kernel and the bias of a linear or convolution layer in place.

    Parameters
    ----------
    layer
        A linear or convolution layer of :mod:`ml_networks.jax.primitives` or Flax.
    distribution, nonlinearity
        As in :func:`initialize_weight`. None leaves the kernel.
    init_bias
        As in :func:`initialize_bias`. None leaves the bias.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.

    Raises
    ------
    TypeError
        For another layer.
    """
    if not isinstance(layer, (Linear, Conv, nnx.Linear, nnx.Conv)):
        raise TypeError(f"layer must be a linear or convolution layer, got {type(layer).__name__}")
    if distribution is not None:
        key = as_rngs(rngs).params()
        layer.kernel[...] = initialize_weight(key, layer.kernel.shape, distribution, nonlinearity)
    if layer.bias is not None and init_bias is not None:
        layer.bias[...] = initialize_bias(layer.bias.shape, init_bias)


def initialize_generator(
    layer: Linear, shapes: Mapping[str, Shape], *, offset: bool, rngs: RngsLike
) -> None:
    """Initialise the last layer of a hypernetwork by the scale of the weights it makes.

    Layers of fan-in f start with weights and biases from U(-f^-1/2, f^-1/2). The columns that make
    an array are drawn as a linear layer would draw it, times 0.3 f^-1/2, so that a condition
    changes it by a fraction of that range. (Without it the generated weights know nothing of
    their fan-in and blow the target up; Chang et al., 2020,
    https://openreview.net/forum?id=H1lma24tPB.) A norm's arrays count their own length as f.

    Parameters
    ----------
    layer
        The last linear layer; its columns are the generated arrays, flattened, one after another.
    shapes
        The shapes of the generated arrays, by name. A ``kernel`` is (*window, in, out), any other
        weight (out, in, *window).
    offset
        Draw the layer's bias from U(-f^-1/2, f^-1/2), as the weights themselves would be.
        Otherwise the bias is 0: the layer makes deviations from weights kept elsewhere.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """
    rngs = as_rngs(rngs)
    bounds = jnp.repeat(
        jnp.array([1 / math.sqrt(fan_in(name, shapes)) for name in shapes]),
        jnp.array([math.prod(shape) for shape in shapes.values()]),
        total_repeat_length=layer.kernel.shape[-1],
    )
    assert layer.bias is not None

    def draw(shape: Shape) -> Array:
        return bounds * jax.random.uniform(rngs.params(), shape, minval=-1.0)

    layer.kernel[...] = 0.3 / math.sqrt(layer.kernel.shape[0]) * draw(layer.kernel.shape)
    layer.bias[...] = draw(layer.bias.shape) if offset else jnp.zeros(layer.bias.shape)


class HyperNetMixin(NamedShapes):
    """Named inputs and outputs of a hypernetwork, flattened side by side.

    A class with it has ``input_shapes`` and ``output_shapes``, dicts of shapes without the batch
    axis, and ``encoding`` (see :func:`encode_input`).
    """

    encoding: InputMode = None

    def encode_inputs(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Encode each input along its last axis."""
        return {name: encode_input(value, self.encoding) for name, value in inputs.items()}

    def flatten_inputs(self, inputs: dict[str, Array]) -> Array:
        """Join inputs (batch, *shape), or (*shape) for a batch of one, to (batch, entries)."""
        batch = self._validate_inputs(inputs)
        return jnp.concatenate([inputs[name].reshape(batch, -1) for name in self.input_shapes], -1)

    def unflatten_output(self, flat_output: Array) -> dict[str, Array]:
        """Cut (*batch, entries) into the named outputs, (*batch, *shape) each."""
        return {
            name: flat_output[..., start : start + size].reshape(
                *flat_output.shape[:-1], *self.output_shapes[name]
            )
            for name, (start, size) in self.output_offsets().items()
        }


@checked_keywords(mlp_cfg="fc_cfg", input_mode="encoding", output_shapes="output_params")
class HyperNet(HyperNetMixin, BaseModule):
    r"""A network that makes the weights of another one from a condition.

    With `target_net` it runs that network with weights of its own for every sample,
    ``y_i = target(x_i; theta + h(c_i))``: theta are the target's own parameters, which are
    learnt too, and h is the hypernetwork. ``hypernet(x, condition)`` runs all samples at once.
    h starts small (:func:`initialize_generator`), so the model starts near the target as it is.

    With `output_params` instead, ``hypernet(condition)`` returns the arrays ``h(c)`` by name,
    and they start at the scale of a layer's own initial weights.

    Parameters
    ----------
    input_dim
        Width of the condition.
    output_params
        ``{name: shape}`` of the arrays to make; an array stands for its shape.
        ``output_shapes`` is another name for it. Not with `target_net`.
    fc_cfg
        The hypernetwork, an :class:`~ml_networks.config.MLPConfig`; ``mlp_cfg`` is another name
        for it. None: a single linear layer.
    encoding
        Encoding of the condition, ``"cos|sin"``, ``"z|1-z"`` or None, see :func:`encode_input`;
        ``input_mode`` is another name for it.
    target_net
        The network to run. It is called with a batch of one for each sample. Layers that mix
        samples (batch norm in training mode) do not fit.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.

    Raises
    ------
    TypeError
        Unless exactly one of `output_params` and `target_net` is given.
    ValueError
        For an unknown encoding, or without anything to make.

    Examples
    --------
    >>> rngs = nnx.Rngs(0)
    >>> layers = nnx.Linear(16, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 8, rngs=rngs)
    >>> hypernet = HyperNet(target_net=nnx.Sequential(*layers), input_dim=64, rngs=rngs)
    >>> hypernet(jnp.ones((4, 16)), jnp.ones((4, 64))).shape
    (4, 8)

    >>> hypernet = HyperNet(64, {"weight": (8, 16), "bias": (8,)}, rngs=rngs)
    >>> hypernet(jnp.ones((4, 64)))["weight"].shape
    (4, 8, 16)
    """

    def __init__(
        self,
        input_dim: int,
        output_params: Mapping[str, Sequence[int] | Array] | None = None,
        fc_cfg: MLPConfig | None = None,
        encoding: InputMode = None,
        *,
        target_net: nnx.Module | None = None,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        if (output_params is None) == (target_net is None):
            raise TypeError(
                "HyperNet takes either target_net, a module to run, or output_params, the shapes "
                f"of the arrays to make, not {'both' if target_net is not None else 'neither'}"
            )
        check_encoding(encoding)
        params: Mapping[str, Any] = output_params or {}
        if target_net is not None:
            params = _named(nnx.state(target_net, (nnx.Param, FrozenParam)))
        if not params:
            raise ValueError("HyperNet has no array to make: target_net has no parameters")
        self.input_dim = input_dim
        # Not a dict: what is no array in a module must be hashable for jit.
        self._output_shapes = tuple(
            (name, tuple(getattr(value, "shape", value))) for name, value in params.items()
        )
        self.encoding = encoding
        self.target_net = target_net
        sizes = self.flat_input_size(), self.flat_output_size()
        if fc_cfg is None:
            self.backbone: Linear | MLPLayer = Linear(*sizes, rngs=rngs)
        else:
            cfg = as_config(fc_cfg, MLPConfig, what="HyperNet fc_cfg")
            self.backbone = MLPLayer(*sizes, cfg, rngs=rngs)
        self.reset_generator(offset=target_net is None, rngs=rngs)

    @property
    def input_shapes(self) -> dict[str, Shape]:  # type: ignore[override]
        """The shape of the condition, by its name."""
        return {"condition": (self.input_dim,)}

    @property
    def output_shapes(self) -> dict[str, Shape]:  # type: ignore[override]
        """The shapes of the arrays made, by name."""
        return dict(self._output_shapes)

    @property
    def last_layer(self) -> Linear:
        """The layer whose columns are the arrays made, flattened, one after another."""
        if isinstance(self.backbone, Linear):
            return self.backbone
        layer: Linear = self.backbone.layers[-1].linear
        return layer

    def reset_generator(self, *, offset: bool, rngs: RngsLike) -> None:
        """Initialise the last layer anew, see :func:`initialize_generator`."""
        last = self.last_layer
        # A gated output layer has twice the columns, and one without bias no offset to hold.
        if last.kernel.shape[-1] == self.flat_output_size() and last.bias is not None:
            initialize_generator(last, self.output_shapes, offset=offset, rngs=rngs)

    def generate(self, condition: Array) -> dict[str, Array]:
        """Return the arrays for each condition: ``(*batch, input_dim)`` to (*batch, *shape)."""
        self._check_condition(condition.shape)
        made = self.unflatten_output(self.backbone(encode_input(condition, self.encoding)))
        if self.target_net is None:
            return made
        own = _named(nnx.state(self.target_net))
        return {name: own[name][...] + value for name, value in made.items()}

    def __call__(self, inputs: Array, condition: Array | None = None) -> Any:
        """Run the target, ``hypernet(x, condition)``, or make arrays, ``hypernet(condition)``.

        Parameters
        ----------
        inputs
            The target's input x, ``(*batch, ...)``; without a target, the condition.
        condition
            ``(*batch, input_dim)``, with the batch axes of x.

        Returns
        -------
        Array or dict
            What the target returns, ``(*batch, ...)``; without a target, ``{name: array}``.
        """
        if self.target_net is None:
            if condition is not None:
                raise TypeError(
                    "this HyperNet has no target_net to run: call it as hypernet(condition)"
                )
            return self.generate(inputs)
        if condition is None:
            raise TypeError("a HyperNet with a target_net is called as hypernet(x, condition)")
        batch = condition.shape[:-1]
        if inputs.shape[: len(batch)] != batch:
            raise ValueError(
                f"x of shape {inputs.shape} and condition of shape {condition.shape} must share "
                f"their batch dimensions {batch}"
            )
        n_samples = math.prod(batch)
        made = {
            name: value.reshape(n_samples, *self.output_shapes[name])
            for name, value in self.generate(condition).items()
        }
        samples = inputs.reshape(n_samples, *inputs.shape[len(batch) :])
        with nnx.split_rngs(self.target_net, splits=n_samples):  # dropout differs between samples
            graph, *states = nnx.split(self.target_net, nnx.RngState, ...)
            streams, own = states
            output = jax.vmap(partial(_run, graph, own))(made, streams, samples)
        return output.reshape(*batch, *output.shape[1:])


def _run(
    graph: nnx.GraphDef, own: nnx.State, made: dict[str, Array], streams: nnx.State, x: Array
) -> Array:
    """Run a target, with the arrays made in the place of its own, on one sample."""
    state = {}
    for path, variable in nnx.to_flat_state(own):
        value = made.get(".".join(map(str, path)), variable.get_value())
        state[path] = variable.replace(value)
    target: Any = nnx.merge(graph, streams, nnx.from_flat_state(state.items()))
    statistics = [
        (path, variable, variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(target, nnx.BatchStat))
    ]
    output: Array = target(x[None])[0]  # a batch dimension of one: many layers want to see one
    for path, variable, before in statistics:
        if variable.get_value() is not before:
            raise ValueError(
                f"target_net updates the statistics {'.'.join(map(str, path))}, which cannot be "
                "one for samples with weights of their own: call eval() first or use another norm"
            )
    return output


def _named(state: nnx.State) -> dict[str, Any]:
    """The variables of a state by their dotted names."""
    return {".".join(map(str, path)): value for path, value in nnx.to_flat_state(state)}
