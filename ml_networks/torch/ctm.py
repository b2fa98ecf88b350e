"""The Continuous Thought Machine, and its form whose synapses adapt to the state.

The loop over ticks holds only what depends on the tick. Before it: keys and values (or, where
cheaper, the features themselves: then the projections between synchronisation, attention and
synapses are multiplied into one matrix on each side), neuron by neuron layouts of the weights,
powers of the decays. After it: output synchronisation, predictions and certainties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ml_networks._compat import checked_keywords
from ml_networks._geometry import absorbs_attention
from ml_networks.config import (
    ContinuousThoughtMachineConfig,
    HyperContinuousThoughtMachineConfig,
    as_config,
)
from ml_networks.kernels.torch import synchronisation
from ml_networks.torch.base import Module
from ml_networks.torch.ctm_backbones import ctm_backbone
from ml_networks.torch.ctm_loop import Loop, is_ordinary, layers_of, neuron_weights_of, think
from ml_networks.torch.neurons import NeuronLevelModel, PreparedNeurons
from ml_networks.torch.positions import positional_embedding
from ml_networks.torch.synapses import HyperSynapseUNET, SynapseUNET, make_synapses

__all__ = ["ContinuousThoughtMachine", "HyperContinuousThoughtMachine"]

Thoughts: TypeAlias = tuple[Tensor, Tensor, Tensor]
Tracked: TypeAlias = tuple[
    Tensor, Tensor, tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray, np.ndarray
]


@dataclass(frozen=True)
class _Look:
    """Attention over a fixed input: one linear map in, one linear map out.

    ``read = softmax(query keys^T) values`` with ``query = synchronisation in_weight^T + in_bias``,
    and the attention's output is ``read out_weight^T + out_bias``.

    Attributes
    ----------
    keys, values
        (B, 1 or heads, S, K) and (B, 1 or heads, S, V). A single set serves every head.
    """

    keys: Tensor
    values: Tensor
    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    heads: int
    dropout: float

    def to(self, dtype: torch.dtype) -> _Look:
        """Cast what the ticks use. Keys that are the values too stay one tensor."""
        keys = self.keys.to(dtype)
        return replace(
            self,
            keys=keys,
            values=keys if self.values is self.keys else self.values.to(dtype),
            in_weight=self.in_weight.to(dtype),
            in_bias=self.in_bias.to(dtype),
        )

    def __call__(self, synchronisation: Tensor) -> tuple[Tensor, Tensor]:
        """Return what was read (B, heads V), and the weights (B, heads, S)."""
        query = F.linear(synchronisation, self.in_weight, self.in_bias)
        query = query.unflatten(-1, (self.keys.shape[1], -1, self.keys.shape[-1]))
        weights = torch.softmax(query @ self.keys.mT, -1)
        weights = F.dropout(weights, self.dropout)
        read = weights @ self.values
        return read.flatten(1), weights.flatten(1, 2)


@checked_keywords()
class ContinuousThoughtMachine(Module):
    r"""The Continuous Thought Machine (Darlow et al., 2025, arXiv 2505.05522).

    D neurons tick T times over one input. At each tick the synchronisation of some of them asks
    the input by attention; the answer and the activations z pass the synapses; every neuron's
    own small model maps its last M pre-activations to its next activation:

    .. math::
        o_t = attention(W_q s^{action}_t, kv), \quad
        a_t = synapses([o_t, z_t]), \quad
        z_{t+1} = NLM(a_{t-M+1}, \dots, a_t)

    The synchronisation of neurons i and j is :math:`s_t = \alpha_t / \sqrt{\beta_t}` with
    :math:`\alpha_t = r \alpha_{t-1} + z^i_t z^j_t`, :math:`\beta_t = r \beta_{t-1} + 1` and the
    learned :math:`r = e^{-decay}`; the decays are clamped to [0, 15] in place at each call. That
    of the output neurons is projected to a prediction at every tick. Certainty is 1 minus the
    entropy of the softmax of the prediction, divided by its maximum.

    Checkpoints of the original implementation load with ``strict=True``, also from inside a
    mapping with ``model_state_dict`` or ``state_dict``.

    Parameters
    ----------
    iterations, d_model, d_input, heads, n_synch_out, n_synch_action, synapse_depth, \
memory_length, deep_nlms, memory_hidden_dims, do_layernorm_nlm, backbone_type, \
positional_embedding_type, out_dims, prediction_reshaper, dropout, dropout_nlm, \
neuron_select_type, n_random_pairing_self, in_channels
        See :class:`~ml_networks.config.ContinuousThoughtMachineConfig`.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or that do not fit each other.
    """

    def __init__(
        self,
        iterations: int,
        d_model: int,
        d_input: int,
        heads: int,
        n_synch_out: int,
        n_synch_action: int,
        synapse_depth: int,
        memory_length: int,
        deep_nlms: bool,
        memory_hidden_dims: int,
        do_layernorm_nlm: bool,
        backbone_type: str,
        positional_embedding_type: str,
        out_dims: int,
        prediction_reshaper: Sequence[int] = (-1,),
        dropout: float = 0.0,
        dropout_nlm: float | None = None,
        neuron_select_type: str = "random-pairing",
        n_random_pairing_self: int = 0,
        in_channels: int | None = None,
    ) -> None:
        super().__init__()
        self._build(
            ContinuousThoughtMachineConfig(
                iterations,
                d_model,
                d_input,
                heads,
                n_synch_out,
                n_synch_action,
                synapse_depth,
                memory_length,
                deep_nlms,
                memory_hidden_dims,
                do_layernorm_nlm,
                backbone_type,
                positional_embedding_type,
                out_dims,
                prediction_reshaper,  # type: ignore[arg-type]
                dropout,
                dropout_nlm,
                neuron_select_type,
                n_random_pairing_self,
                in_channels,
            )
        )

    @classmethod
    def from_config(cls, cfg: ContinuousThoughtMachineConfig) -> ContinuousThoughtMachine:
        """Make the model from its config, or a mapping of the config's fields."""
        cfg = as_config(cfg, cls.config_class(), what=f"{cls.__name__} cfg")
        return cls(**{field.name: getattr(cfg, field.name) for field in fields(cfg)})

    @classmethod
    def config_class(cls) -> type[ContinuousThoughtMachineConfig]:
        """The config's class."""
        return ContinuousThoughtMachineConfig

    def _build(self, cfg: ContinuousThoughtMachineConfig) -> None:
        self.cfg = cfg
        self.iterations = cfg.iterations
        size, memory, width = cfg.d_model, cfg.memory_length, cfg.d_input
        images = 3 if cfg.in_channels is None else cfg.in_channels
        is_resnet = cfg.backbone_type.startswith("resnet")
        self.initial_rgb = nn.Conv2d(images, 3, 1) if is_resnet else nn.Identity()
        self.backbone = ctm_backbone(cfg.backbone_type, width, images)
        channels = self._feature_channels(cfg)
        self.positional_embedding = (
            None
            if channels is None
            else positional_embedding(cfg.positional_embedding_type, channels)
        )
        self.kv_proj = nn.Sequential(
            nn.LazyLinear(width) if channels is None else nn.Linear(channels, width),
            nn.LayerNorm(width),
        )
        actions, outputs = (
            n if cfg.neuron_select_type == "random-pairing" else n * (n + 1) // 2
            for n in (cfg.n_synch_action, cfg.n_synch_out)
        )
        self.q_proj = nn.Linear(actions, width)
        self.attention = nn.MultiheadAttention(width, cfg.heads, cfg.dropout, batch_first=True)
        self.synapses = self._make_synapses(cfg)
        dropout_nlm = cfg.dropout if cfg.dropout_nlm is None else cfg.dropout_nlm
        hidden = cfg.memory_hidden_dims if cfg.deep_nlms else None
        self.trace_processor = nn.Sequential(
            NeuronLevelModel(memory, hidden, size, cfg.do_layernorm_nlm, dropout_nlm)
        )
        bounds = math.sqrt(1 / size), math.sqrt(1 / (size + memory))
        self.start_activated_state = nn.Parameter(
            torch.empty(size).uniform_(-bounds[0], bounds[0])
        )
        self.start_trace = nn.Parameter(torch.empty(size, memory).uniform_(-bounds[1], bounds[1]))
        self._choose_neurons("action", cfg.n_synch_action, actions)
        self._choose_neurons("out", cfg.n_synch_out, outputs)
        self.output_projector = nn.Sequential(nn.Linear(outputs, cfg.out_dims))

    def _feature_channels(self, cfg: ContinuousThoughtMachineConfig) -> int | None:
        if cfg.backbone_type == "none":
            return cfg.in_channels
        if cfg.backbone_type == "parity_backbone":
            return cfg.d_input
        return getattr(self.backbone, "out_channels", 2048)

    def _make_synapses(self, cfg: ContinuousThoughtMachineConfig) -> nn.Module:
        inputs = cfg.d_input + cfg.d_model
        return make_synapses(inputs, cfg.d_model, cfg.synapse_depth, cfg.dropout)

    def _choose_neurons(self, kind: str, n: int, size: int) -> None:
        """Register the decays and the chosen neurons of one synchronisation."""
        cfg = self.cfg
        left, right = torch.randint(cfg.d_model, (2, n))
        if cfg.neuron_select_type == "first-last":
            first = 0 if kind == "out" else cfg.d_model - n
            left = right = torch.arange(first, first + n)
        elif cfg.neuron_select_type == "random-pairing":
            right[: cfg.n_random_pairing_self] = left[: cfg.n_random_pairing_self]
        self.register_buffer(f"{kind}_neuron_indices_left", left.clone())
        self.register_buffer(f"{kind}_neuron_indices_right", right.clone())
        self.register_parameter(f"decay_params_{kind}", nn.Parameter(torch.zeros(size)))

    def _pairs(self, kind: str) -> Tensor:
        """The neurons of each synchronised pair, the left ones and then the right ones, (2 n,)."""
        left = getattr(self, f"{kind}_neuron_indices_left")
        right = getattr(self, f"{kind}_neuron_indices_right")
        if self.cfg.neuron_select_type != "random-pairing":
            i, j = torch.triu_indices(len(left), len(left), device=left.device)
            left, right = left[i], right[j]
        return torch.cat([left, right])

    def _decay(self, kind: str) -> Tensor:
        """The decays of one synchronisation, clamped in place, as a CUDA graph needs it."""
        decay: Tensor = getattr(self, f"decay_params_{kind}")
        with torch.no_grad():
            decay.clamp_(0, 15)
        return decay

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Of the action neurons r = exp(-decay) (n,), and 1 / sqrt(beta) at each tick (T, n)."""
        decay = self._decay("action")
        exact = decay.to(torch.promote_types(decay.dtype, torch.float32))
        steps = torch.arange(self.iterations, device=decay.device, dtype=exact.dtype)
        beta = torch.exp(-exact * steps[:, None]).cumsum(0)
        return torch.exp(-decay), beta.rsqrt().to(decay.dtype)

    def compute_features(self, x: Tensor) -> Tensor:
        """Map the input to the features that are attended to, (B, S, C)."""
        features = self.backbone(self.initial_rgb(x))
        if self.positional_embedding is not None:
            features = features + self.positional_embedding(features)
        features = features.flatten(2).mT
        if isinstance(self.kv_proj[0], nn.LazyLinear):
            self.kv_proj[0](features)  # finds its width and becomes an ordinary layer
        return features

    def compute_certainty(self, predictions: Tensor) -> Tensor:
        """Return the normalised entropy and 1 minus it, (..., 2), of predictions (..., out_dims).

        The entropy is over the last axis of ``prediction_reshaper`` and averaged over the others.
        """
        shape = predictions.shape[:-1]
        log_p = predictions.reshape(*shape, *self.cfg.prediction_reshaper).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1) / math.log(log_p.shape[-1])
        entropy = entropy.reshape(*shape, -1).mean(-1)
        return torch.stack([entropy, 1 - entropy], -1)

    def _look(self, features: Tensor) -> _Look:
        """Everything about attention that no tick changes."""
        attention = self.attention
        heads = attention.num_heads
        dropout = attention.dropout if self.training else 0.0
        width = attention.embed_dim
        scale = (width // heads) ** -0.5
        w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
        b_q, b_k, b_v = attention.in_proj_bias.chunk(3)
        w_o, b_o = attention.out_proj.weight, attention.out_proj.bias
        in_weight = w_q @ self.q_proj.weight * scale
        in_bias = (w_q @ self.q_proj.bias + b_q) * scale
        linear, norm = cast(nn.Linear, self.kv_proj[0]), cast(nn.LayerNorm, self.kv_proj[1])
        # A dropped-out row of weights does not sum to 1, which absorbing counts on.
        if dropout or not absorbs_attention(features.shape[-1], width, heads):
            kv = norm(linear(features))
            keys, values = (
                F.linear(kv, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
                for w, b in ((w_k, b_k), (w_v, b_v))
            )
            return _Look(keys, values, in_weight, in_bias, w_o, b_o, heads, dropout)
        # kv = gamma * (centred [features, 1]) / std + beta, with the linear layer's rows centred.
        # Queries are moved to the other side of that map, and what is constant over positions
        # drops out of the softmax.
        centred = torch.cat([linear.weight, linear.bias[:, None]], 1)
        centred = centred - centred.mean(0)
        # Positions stay side by side in memory, as the features come.
        maps = torch.cat([features.mT, features.new_ones(len(features), 1, features.shape[1])], 1)
        maps = maps * ((centred @ maps).square().mean(1, keepdim=True) + norm.eps).rsqrt()
        scaled = norm.weight[:, None] * centred
        per_head = (heads, width // heads, -1)
        k_map, v_map = ((w @ scaled).view(per_head) for w in (w_k, w_v))
        in_weight = (k_map.mT @ in_weight.view(per_head)).flatten(0, 1)
        in_bias = (k_map.mT @ in_bias.view(heads, -1, 1)).flatten()
        out_weight = w_o.view(width, heads, -1).transpose(0, 1) @ v_map
        out_weight = out_weight.transpose(0, 1).flatten(1)
        out_bias = w_o @ (w_v @ norm.bias + b_v) + b_o
        shared = maps.mT[:, None]
        return _Look(shared, shared, in_weight, in_bias, out_weight, out_bias, heads, dropout)

    def forward(self, x: Tensor, track: bool = False) -> Thoughts | Tracked:
        """Think about the input for ``iterations`` ticks.

        Parameters
        ----------
        x
            Images (B, in_channels, H, W); for ``"parity_backbone"`` signs (B, L); for ``"none"``
            features (B, in_channels, *positions).
        track
            Return every tick's inner values too.

        Returns
        -------
        predictions
            (B, out_dims, T), at least float32.
        certainties
            (B, 2, T): normalised entropy, and 1 minus it.
        synchronisation
            Of the output neurons after the last tick, (B, n). With ``track`` instead a pair of
            NumPy arrays, of the output and the action neurons, (T, B, n) each; and after it
            pre-activations (T, B, D), activations (T, B, D) and attention weights
            (T, B, heads, 1, S).
        """
        features = self.compute_features(x)
        dtype = self._compute_dtype(x.device.type)
        neurons = cast(NeuronLevelModel, self.trace_processor[0]).prepared()
        r, scale = self._sums()
        with _no_autocast(x.device.type):
            look = self._look(features.to(self.q_proj.weight.dtype))
            loop = self._loop(look, neurons, r, scale, dtype)
        tracked: list[tuple[Tensor, Tensor, Tensor]] = []
        if loop is None:
            activations, tracked = self._ticks(look, neurons, r, scale, dtype, track)
        else:
            activations, states, synchronisations = think(loop)
            if track:
                attend = look.to(dtype)
                weights = (attend(value)[1] for value in synchronisations)
                tracked = list(zip(synchronisations, states, weights, strict=True))
        synchronised = self._synchronisation_out(activations.to(r.dtype))
        logits = self.output_projector(synchronised)
        certainties = self.compute_certainty(logits)
        exact = torch.promote_types(logits.dtype, torch.float32)
        predictions = logits.to(exact).permute(1, 2, 0)
        certainties = certainties.to(exact).permute(1, 2, 0)
        if not track:
            return predictions, certainties, synchronised[-1]
        action, pre, attention = (_array(values) for values in zip(*tracked, strict=True))
        post, out = _array(activations[1:]), _array(synchronised)
        return predictions, certainties, (out, action), pre, post, attention[:, :, :, None]

    def _loop(
        self, look: _Look, neurons: PreparedNeurons, r: Tensor, scale: Tensor, dtype: torch.dtype
    ) -> Loop | None:
        """All that the ticks use, for one function of autograd; None where that cannot be."""
        layers, weights = layers_of(self.synapses), neuron_weights_of(neurons)
        if layers is None or weights is None or look.dropout:
            return None
        weight, bias = self._first_layer(look)
        # With rows of whole vectors of memory matrix products are faster.
        weight = F.pad(weight, (0, -weight.shape[1] % 8))
        layers = (layers[0]._replace(linear=(weight, bias)), *layers[1:])
        look = look.to(dtype)
        loop = Loop(
            self._pairs("action"),
            self.start_activated_state,
            self.start_trace,
            r,
            scale,
            look.keys,
            look.values,
            look.in_weight,
            look.in_bias,
            tuple(weight.to(dtype) for weight in weights),
            tuple(
                layer._replace(linear=tuple(weight.to(dtype) for weight in layer.linear))
                for layer in layers
            ),
        )
        return loop if is_ordinary(loop) else None

    def _ticks(
        self,
        look: _Look,
        neurons: PreparedNeurons,
        r: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
        track: bool,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """The loop over the modules: activations (1 + T, B, D) and, if tracked, of every tick
        synchronisation of the action neurons, state and attention weights.
        """
        attend, synapses = look.to(dtype), self._hoisted_synapses(look, dtype)
        batch, pairs = len(look.keys), self._pairs("action")
        z = self.start_activated_state.expand(batch, -1)
        trace = self.start_trace.expand(batch, -1, -1)
        alpha: Tensor | None = None
        activations, tracked = [z], []
        for factor in scale:
            left, right = z.index_select(1, pairs).chunk(2, 1)
            alpha = left * right if alpha is None else torch.addcmul(left * right, r, alpha)
            synchronised = alpha * factor
            read, weights = attend(synchronised)
            state = synapses(read, z)
            trace = torch.cat([trace[:, :, 1:], state.unsqueeze(-1)], -1)
            z = neurons(trace)
            activations.append(z)
            if track:
                tracked.append((synchronised, state, weights))
        return torch.stack(activations), tracked

    def _compute_dtype(self, device: str) -> torch.dtype:
        """The type in which the ticks multiply matrices."""
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.q_proj.weight.dtype

    def _hoisted_synapses(self, look: _Look, dtype: torch.dtype) -> Callable[..., Tensor]:
        """The synapses as a function of what was read and z, the attention's last projection
        multiplied into the first layer where no dropout stands between them.
        """
        synapses = self.synapses
        if not isinstance(synapses, SynapseUNET):
            out_weight, out_bias = look.out_weight.to(dtype), look.out_bias.to(dtype)

            def attend_first(read: Tensor, z: Tensor) -> Tensor:
                attended = F.linear(read, out_weight, out_bias)
                state: Tensor = synapses(torch.cat([attended, z], 1))
                return state

            return attend_first
        with _no_autocast(look.keys.device.type):
            weight, bias = (value.to(dtype) for value in self._first_layer(look))
        return lambda read, z: synapses.from_first(F.linear(torch.cat([z, read], 1), weight, bias))

    def _first_layer(self, look: _Look) -> tuple[Tensor, Tensor]:
        """Weight and bias of the synapses' first layer for z and what was read, the attention's
        last projection multiplied in.
        """
        synapses: Any = self.synapses
        is_unet = isinstance(synapses, SynapseUNET)
        first = cast(nn.Linear, synapses.first_projection[0] if is_unet else synapses[1])
        attended, thought = first.weight.split([self.cfg.d_input, self.cfg.d_model], 1)
        weight = torch.cat([thought, attended @ look.out_weight], 1)
        return weight, attended @ look.out_bias + first.bias

    def _synchronisation_out(self, activations: Tensor) -> Tensor:
        """Synchronisation (T, B, n) of the output neurons from all activations (1 + T, B, D)."""
        left, right = self._pairs("out").chunk(2)
        return synchronisation(activations, left, right, self._decay("out"))[1:]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights; also from inside a mapping's ``model_state_dict`` or ``state_dict``.

        Raises
        ------
        RuntimeError
            With ``strict``, for weights of another configuration; the message names the first
            entry that does not fit.
        """
        for name in ("model_state_dict", "state_dict"):
            if isinstance(state_dict.get(name), Mapping):
                state_dict = state_dict[name]
        if strict:
            self._check_weights(state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _check_weights(self, given: Mapping[str, Any]) -> None:
        """Raise for the first entry that is missing, of another shape or too many."""
        own = self.state_dict()
        problems = []
        for key, value in own.items():
            wanted = None if isinstance(value, nn.UninitializedParameter) else tuple(value.shape)
            if key not in given:
                problems.append(f"{key} {wanted or ''} is missing")
            elif wanted is not None and tuple(given[key].shape) != wanted:
                problems.append(f"{key} is {tuple(given[key].shape)} and {wanted} here")
        problems += [f"{key} is not part of this model" for key in given if key not in own]
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise RuntimeError(
                f"the weights are of another configuration than this {type(self).__name__}: "
                f"{problems[0]}{more}"
            )


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """Products of weights keep the weights' own precision."""
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


def _uniform(*shape: int) -> nn.Parameter:
    bound = math.sqrt(1 / sum(shape))
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def _array(values: Sequence[Tensor] | Tensor) -> np.ndarray:
    stacked = values if isinstance(values, Tensor) else torch.stack(list(values))
    stacked = stacked.detach().cpu()
    return (stacked.float() if stacked.dtype.itemsize < 4 else stacked).numpy()


@checked_keywords()
class HyperContinuousThoughtMachine(ContinuousThoughtMachine):
    """A :class:`ContinuousThoughtMachine` whose synapses adapt to the state at every tick.

    The chosen layers of the U-Net are :class:`~ml_networks.torch.HyperLoRALinear`, whose dynamic
    part starts at zero: with the same other weights a fresh model is exactly the plain one.

    Parameters
    ----------
    iterations, d_model, d_input, heads, n_synch_out, n_synch_action, synapse_depth, \
memory_length, deep_nlms, memory_hidden_dims, do_layernorm_nlm, backbone_type, \
positional_embedding_type, out_dims, prediction_reshaper, dropout, dropout_nlm, \
neuron_select_type, n_random_pairing_self, in_channels, hyper_layers, hyper_rank
        See :class:`~ml_networks.config.HyperContinuousThoughtMachineConfig`.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or that do not fit each other.
    """

    def __init__(
        self,
        iterations: int,
        d_model: int,
        d_input: int,
        heads: int,
        n_synch_out: int,
        n_synch_action: int,
        synapse_depth: int,
        memory_length: int,
        deep_nlms: bool,
        memory_hidden_dims: int,
        do_layernorm_nlm: bool,
        backbone_type: str,
        positional_embedding_type: str,
        out_dims: int,
        prediction_reshaper: Sequence[int] = (-1,),
        dropout: float = 0.0,
        dropout_nlm: float | None = None,
        neuron_select_type: str = "random-pairing",
        n_random_pairing_self: int = 0,
        in_channels: int | None = None,
        hyper_layers: str = "bottleneck",
        hyper_rank: int = 8,
    ) -> None:
        Module.__init__(self)
        self._build(
            HyperContinuousThoughtMachineConfig(
                iterations,
                d_model,
                d_input,
                heads,
                n_synch_out,
                n_synch_action,
                synapse_depth,
                memory_length,
                deep_nlms,
                memory_hidden_dims,
                do_layernorm_nlm,
                backbone_type,
                positional_embedding_type,
                out_dims,
                prediction_reshaper,  # type: ignore[arg-type]
                dropout,
                dropout_nlm,
                neuron_select_type,
                n_random_pairing_self,
                in_channels,
                hyper_layers,
                hyper_rank,
            )
        )

    @classmethod
    def config_class(cls) -> type[HyperContinuousThoughtMachineConfig]:
        """The config's class."""
        return HyperContinuousThoughtMachineConfig

    def _make_synapses(self, cfg: ContinuousThoughtMachineConfig) -> nn.Module:
        assert isinstance(cfg, HyperContinuousThoughtMachineConfig)
        if cfg.hyper_layers == "none":
            return super()._make_synapses(cfg)
        return HyperSynapseUNET(
            cfg.d_model,
            cfg.synapse_depth,
            dropout=cfg.dropout,
            hyper_layers=cfg.hyper_layers,
            hyper_rank=cfg.hyper_rank,
            in_dims=cfg.d_input + cfg.d_model,
        )
