"""Hypernetworks: networks that make the weights of another network from a condition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ml_networks._compat import checked_keywords
from ml_networks._hypernetworks import (
    NamedShapes,
    bias_value,
    check_encoding,
    fan_in,
    weight_gain,
)
from ml_networks.config import MLPConfig, as_config
from ml_networks.torch.base import Module
from ml_networks.torch.layers import MLPLayer

__all__ = [
    "HyperNet",
    "HyperNetMixin",
    "encode_input",
    "initialize_bias",
    "initialize_generator",
    "initialize_layer",
    "initialize_weight",
]

Shape: TypeAlias = tuple[int, ...]
InputMode: TypeAlias = Literal["cos|sin", "z|1-z"] | None


def encode_input(input: Tensor, mode: InputMode = "cos|sin") -> Tensor:
    """Encode a tensor whose entries lie in [0, 1] along its last dimension.

    Parameters
    ----------
    input
        ``(*batch, n)``.
    mode
        ``"cos|sin"``: ``[cos(pi z / 2), sin(pi z / 2)]``, of constant norm whatever z is.
        ``"z|1-z"``: ``[z, 1 - z]``. None: z itself.

    Returns
    -------
    Tensor
        ``(*batch, 2 n)``; ``(*batch, n)`` for None.

    Raises
    ------
    ValueError
        For another mode.
    """
    check_encoding(mode)
    if mode == "cos|sin":
        angle = input * (math.pi / 2)
        return torch.cat([angle.cos(), angle.sin()], -1)
    if mode == "z|1-z":
        return torch.cat([input, 1 - input], -1)
    return input


def initialize_weight(
    weight: Tensor, distribution: str | None, nonlinearity: str | None = "LeakyReLU"
) -> None:
    """Fill a weight in place with random numbers of a named distribution.

    Parameters
    ----------
    weight
        The weight of a linear or convolution layer.
    distribution
        ``"zeros"``, ``"kaiming_normal"``, ``"kaiming_uniform"`` (each also with ``_fanout``),
        ``"glorot_normal"``, ``"glorot_uniform"`` or ``"orthogonal"``. None leaves the weight.
    nonlinearity
        Activation that follows, whose gain multiplies the weight: sqrt(2) for those like ReLU,
        5/3 for Tanh, 3/4 for SELU, otherwise 1. Upper and lower case are one.

    Raises
    ------
    ValueError
        For another distribution.
    """
    if distribution is None:
        return
    gain = weight_gain(distribution, nonlinearity)
    if distribution == "zeros":
        nn.init.zeros_(weight)
    elif distribution == "orthogonal":
        nn.init.orthogonal_(weight, gain)
    elif distribution == "glorot_normal":
        nn.init.xavier_normal_(weight, gain)
    elif distribution == "glorot_uniform":
        nn.init.xavier_uniform_(weight, gain)
    else:
        by_output = distribution.endswith("fanout")
        fan = weight.numel() // weight.shape[1] if by_output else weight[0].numel()
        std = gain / math.sqrt(fan)
        if "uniform" in distribution:
            nn.init.uniform_(weight, -math.sqrt(3.0) * std, math.sqrt(3.0) * std)
        else:
            nn.init.normal_(weight, 0.0, std)


def initialize_bias(bias: Tensor, distribution: float | None = 0.0) -> None:
    """Fill a bias in place with a constant; None leaves it.

    Raises
    ------
    ValueError
        If the constant is not a number.
    """
    if distribution is None:
        return
    nn.init.constant_(bias, bias_value(distribution))


def initialize_layer(
    layer: nn.Module,
    distribution: str | None = "kaiming_normal",
    init_bias: float | None = 0.0,
    nonlinearity: str | None = "LeakyReLU",
) -> None:
    """Initialise the weight and the bias of a linear or convolution layer in place.

    Parameters
    ----------
    layer
        An ``nn.Linear`` or ``nn.Conv*d``.
    distribution, nonlinearity
        As in :func:`initialize_weight`.
    init_bias
        As in :func:`initialize_bias`.

    Raises
    ------
    TypeError
        For another layer.
    """
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise TypeError(f"layer must be a linear or convolution layer, got {type(layer).__name__}")
    initialize_weight(layer.weight, distribution, nonlinearity)
    if layer.bias is not None:
        initialize_bias(layer.bias, init_bias)


def initialize_generator(layer: nn.Linear, shapes: Mapping[str, Shape], *, offset: bool) -> None:
    """Initialise the last layer of a hypernetwork by the scale of the weights it makes.

    torch's layers of fan-in f start with weights and biases from U(-f^-1/2, f^-1/2). The rows that
    make a tensor are drawn as torch's linear layer would, times 0.3 f^-1/2, so that a condition
    changes it by a fraction of that range. (Without it the generated weights know nothing of
    their fan-in and blow the target up; Chang et al., 2020,
    https://openreview.net/forum?id=H1lma24tPB.) A norm's tensors count their own length as f.

    Parameters
    ----------
    layer
        The last linear layer; its rows are the generated tensors, flattened, one after another.
    shapes
        The shapes of the generated tensors, by name.
    offset
        Draw the layer's bias from U(-f^-1/2, f^-1/2), as torch would the weights themselves.
        Otherwise the bias is 0: the layer makes deviations from weights kept elsewhere.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    with torch.no_grad():
        rows = layer.weight.split(sizes)
        biases = layer.bias.split(sizes)
        for name, row, bias in zip(shapes, rows, biases, strict=True):
            bound = 1 / math.sqrt(fan_in(name, shapes))
            row.uniform_(-bound, bound).mul_(0.3 / math.sqrt(layer.in_features))
            bias.uniform_(-bound, bound) if offset else bias.zero_()


class HyperNetMixin(NamedShapes):
    """Named inputs and outputs of a hypernetwork, flattened side by side.

    A class with it sets ``input_shapes`` and ``output_shapes``, dicts of shapes without the batch
    dimension, and ``encoding`` (see :func:`encode_input`).
    """

    encoding: InputMode = None

    def encode_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Encode each input along its last dimension."""
        return {name: encode_input(value, self.encoding) for name, value in inputs.items()}

    def flatten_inputs(self, inputs: dict[str, Tensor]) -> Tensor:
        """Join inputs (batch, *shape), or (*shape) for a batch of one, to (batch, entries)."""
        batch = self._validate_inputs(inputs)
        return torch.cat([inputs[name].reshape(batch, -1) for name in self.input_shapes], -1)

    def unflatten_output(self, flat_output: Tensor) -> dict[str, Tensor]:
        """Cut (*batch, entries) into the named outputs, (*batch, *shape) each."""
        sizes = [math.prod(shape) for shape in self.output_shapes.values()]
        parts = flat_output.split(sizes, -1)
        return {
            name: part.reshape(*flat_output.shape[:-1], *shape)
            for (name, shape), part in zip(self.output_shapes.items(), parts, strict=True)
        }


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, in an order that does not hang on the order of definitions.

    The JAX side, which has no such order, makes the same one of the names in a checkpoint.
    """
    named: dict[str, Tensor] = {}
    for name, parameter in sorted(
        module.named_parameters(remove_duplicate=False), key=lambda item: item[0]
    ):
        if not any(parameter is other for other in named.values()):
            named[name] = parameter
    return named


@checked_keywords(mlp_cfg="fc_cfg", input_mode="encoding", output_shapes="output_params")
class HyperNet(HyperNetMixin, Module):
    r"""A network that makes the weights of another one from a condition.

    With `target_net` it runs that network with weights of its own for every sample,
    ``y_i = target(x_i; theta + h(c_i))``: theta are the target's own parameters, which are
    learnt too, and h is the hypernetwork. ``hypernet(x, condition)`` runs all samples at once.
    h starts small (:func:`initialize_generator`), so the model starts near the target as it is.

    With `output_params` instead, ``hypernet(condition)`` returns the tensors ``h(c)`` by name,
    and they start at the scale of torch's own initial weights.

    Parameters
    ----------
    input_dim
        Width of the condition.
    output_params
        ``{name: shape}`` of the tensors to make; a tensor stands for its shape, so a
        ``state_dict()`` will do. Not with `target_net`.
    fc_cfg
        The hypernetwork, an :class:`~ml_networks.config.MLPConfig`; ``mlp_cfg`` is another name
        for it. None: a single linear layer.
    encoding
        Encoding of the condition, ``"cos|sin"``, ``"z|1-z"`` or None, see :func:`encode_input`;
        ``input_mode`` is another name for it.
    target_net
        The network to run. It is called with a batch of one for each sample. Layers that mix
        samples (batch norm in training mode) do not fit; ``running_mean`` and other buffers are
        shared by all samples.

    Raises
    ------
    TypeError
        Unless exactly one of `output_params` and `target_net` is given.
    ValueError
        For an unknown encoding, or without anything to make.

    Examples
    --------
    >>> target = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> hypernet = HyperNet(target_net=target, input_dim=64)
    >>> hypernet(torch.randn(4, 16), torch.randn(4, 64)).shape
    torch.Size([4, 8])

    >>> hypernet = HyperNet(64, {"weight": (8, 16), "bias": (8,)})
    >>> hypernet(torch.randn(4, 64))["weight"].shape
    torch.Size([4, 8, 16])
    """

    def __init__(
        self,
        input_dim: int,
        output_params: Mapping[str, Sequence[int] | Tensor] | None = None,
        fc_cfg: MLPConfig | None = None,
        encoding: InputMode = None,
        *,
        target_net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if (output_params is None) == (target_net is None):
            raise TypeError(
                "HyperNet takes either target_net, a module to run, or output_params, the shapes "
                f"of the tensors to make, not {'both' if target_net is not None else 'neither'}"
            )
        check_encoding(encoding)
        params = output_params if target_net is None else _parameters(target_net)
        assert params is not None
        if not params:
            raise ValueError("HyperNet has no tensor to make: target_net has no parameters")
        self.input_dim = input_dim
        self.input_shapes = {"condition": (input_dim,)}
        self.output_shapes = {
            name: tuple(value.shape if isinstance(value, Tensor) else value)
            for name, value in params.items()
        }
        self.encoding = encoding
        self.target_net = target_net
        sizes = self.flat_input_size(), self.flat_output_size()
        if fc_cfg is None:
            self.backbone: nn.Module = nn.Linear(*sizes)
        else:
            self.backbone = MLPLayer(*sizes, as_config(fc_cfg, MLPConfig, what="HyperNet fc_cfg"))
        self.reset_generator(offset=target_net is None)

    def reset_generator(self, *, offset: bool) -> None:
        """Initialise the last layer anew, see :func:`initialize_generator`."""
        last = [layer for layer in self.backbone.modules() if isinstance(layer, nn.Linear)][-1]
        # A gated output layer has twice the rows, and one without bias no offset to hold.
        if last.out_features == self.flat_output_size() and last.bias is not None:
            initialize_generator(last, self.output_shapes, offset=offset)

    def generate(self, condition: Tensor) -> dict[str, Tensor]:
        """Return the tensors for each condition: ``(*batch, input_dim)`` to (*batch, *shape)."""
        self._check_condition(condition.shape)
        made = self.unflatten_output(self.backbone(encode_input(condition, self.encoding)))
        if self.target_net is None:
            return made
        own = dict(self.target_net.named_parameters(remove_duplicate=False))
        return {name: own[name] + value for name, value in made.items()}

    def forward(self, inputs: Tensor, condition: Tensor | None = None) -> Any:
        """Run the target, ``hypernet(x, condition)``, or make tensors, ``hypernet(condition)``.

        Parameters
        ----------
        inputs
            The target's input x, ``(*batch, ...)``; without a target, the condition.
        condition
            ``(*batch, input_dim)``, with the batch dimensions of x.

        Returns
        -------
        Tensor or dict
            What the target returns, ``(*batch, ...)``; without a target, ``{name: tensor}``.
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
                f"x of shape {tuple(inputs.shape)} and condition of shape "
                f"{tuple(condition.shape)} must share their batch dimensions {tuple(batch)}"
            )
        target, n_batch = self.target_net, len(batch)
        parameters = {
            name: value.reshape(-1, *self.output_shapes[name])
            for name, value in self.generate(condition).items()
        }
        samples = inputs.unsqueeze(0) if n_batch == 0 else inputs.flatten(0, n_batch - 1)

        def run(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(target, parameters, (x,))

        if samples.shape[0] == 0:  # which torch's grouped convolutions refuse
            output = run({name: value.sum(0) for name, value in parameters.items()}, samples)
            return output.reshape(*batch, *output.shape[1:])
        # Each sample keeps a batch dimension of one: many layers want to see one.
        output = vmap(run, randomness="different")(parameters, samples.unsqueeze(1))
        return output.reshape(*batch, *output.shape[2:])
