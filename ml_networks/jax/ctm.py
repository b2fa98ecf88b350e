"""The Continuous Thought Machine, and its form whose synapses adapt to the state.

As in :mod:`ml_networks.torch.ctm` the loop over ticks holds only what depends on the tick; it is
one ``lax.scan``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ml_networks._compat import checked_keywords
from ml_networks._geometry import absorbs_attention
from ml_networks.config import (
    ContinuousThoughtMachineConfig,
    HyperContinuousThoughtMachineConfig,
    as_config,
)
from ml_networks.jax.base import BaseModule
from ml_networks.jax.ctm_backbones import ctm_backbone
from ml_networks.jax.ctm_loop import Loop, layers_of, neuron_weights_of, think
from ml_networks.jax.layers import Identity, MultiheadAttention
from ml_networks.jax.neurons import NeuronLevelModel
from ml_networks.jax.positions import positional_embedding
from ml_networks.jax.primitives import Conv, LayerNorm, Linear
from ml_networks.jax.rngs import RngsLike, as_rngs
from ml_networks.jax.synapses import HyperSynapseUNET, SynapseUNET, make_synapses
from ml_networks.kernels.jax import synchronisation

__all__ = ["ContinuousThoughtMachine", "HyperContinuousThoughtMachine"]

Array = jax.Array
Thoughts: TypeAlias = tuple[Array, Array, Array]
Tracked: TypeAlias = tuple[
    Array, Array, tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray, np.ndarray
]


class NeuronIndices(nnx.Variable):
    """Which neurons are synchronised; not trained."""


@dataclass(frozen=True)
class _Look:
    """Attention over a fixed input: one linear map in, one linear map out.

    ``read = softmax(query keys^T) values`` with ``query = synchronisation in_weight^T + in_bias``,
    and the attention's output is ``read out_weight^T + out_bias``. Keys and values are
    (B, 1 or heads, S, K) and (B, 1 or heads, S, V); a single set serves every head. Values are
    None where the keys are the values.
    """

    keys: Array
    values: Array | None
    in_weight: Array
    in_bias: Array
    out_weight: Array
    out_bias: Array

    def astype(self, dtype: Any) -> _Look:
        """The same in another dtype."""
        arrays = [getattr(self, field.name) for field in fields(self)]
        return _Look(*jax.tree.map(lambda array: array.astype(dtype), arrays))

    def __call__(self, synchronisation: Array, dropout: Any) -> tuple[Array, Array]:
        """Return what was read (B, heads V), and the weights (B, heads, S)."""
        batch, sets, positions, width = self.keys.shape
        query = synchronisation @ self.in_weight.T + self.in_bias
        query = query.reshape(batch, sets, -1, width)
        scores = query @ self.keys.mT
        exact = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        weights = dropout(jax.nn.softmax(exact)).astype(scores.dtype)
        read = weights @ (self.keys if self.values is None else self.values)
        return read.reshape(batch, -1), weights.reshape(batch, -1, positions)


@checked_keywords()
class ContinuousThoughtMachine(BaseModule):
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
    learned :math:`r = e^{-decay}`. Decays outside [0, 15] count as the nearer bound and keep
    their gradient; torch writes the bound back into the parameter, this module changes none.
    The synchronisation of the output neurons is projected to a prediction at every tick.
    Certainty is 1 minus the entropy of the softmax of the prediction, divided by its maximum.

    Parameters
    ----------
    iterations, d_model, d_input, heads, n_synch_out, n_synch_action, synapse_depth, \
memory_length, deep_nlms, memory_hidden_dims, do_layernorm_nlm, backbone_type, \
positional_embedding_type, out_dims, prediction_reshaper, dropout, dropout_nlm, \
neuron_select_type, n_random_pairing_self, in_channels
        See :class:`~ml_networks.config.ContinuousThoughtMachineConfig`. ``"none"`` as backbone
        needs ``in_channels``.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or that do not fit each other.
    """

    torch_names: ClassVar[dict[str, str]] = {
        "kv_linear": "kv_proj.0",
        "kv_norm": "kv_proj.1",
        "neurons": "trace_processor.0",
        "projector": "output_projector.0",
    }

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
        *,
        rngs: RngsLike | None = None,
    ) -> None:
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
            ),
            as_rngs(rngs),
        )

    @classmethod
    def from_config(
        cls, cfg: ContinuousThoughtMachineConfig, *, rngs: RngsLike | None = None
    ) -> ContinuousThoughtMachine:
        """Make the model from its config, or a mapping of the config's fields."""
        cfg = as_config(cfg, cls.config_class(), what=f"{cls.__name__} cfg")
        return cls(**{field.name: getattr(cfg, field.name) for field in fields(cfg)}, rngs=rngs)

    @classmethod
    def config_class(cls) -> type[ContinuousThoughtMachineConfig]:
        """The config's class."""
        return ContinuousThoughtMachineConfig

    @property
    def cfg(self) -> ContinuousThoughtMachineConfig:
        """The config."""
        return self.config_class()(*self._cfg)

    def _build(self, cfg: ContinuousThoughtMachineConfig, rngs: nnx.Rngs) -> None:
        # As values: what a module holds beside arrays must be hashable.
        self._cfg = tuple(getattr(cfg, field.name) for field in fields(cfg))
        self.iterations = cfg.iterations
        size, memory, width = cfg.d_model, cfg.memory_length, cfg.d_input
        actions, outputs = (
            n if cfg.neuron_select_type == "random-pairing" else n * (n + 1) // 2
            for n in (cfg.n_synch_action, cfg.n_synch_out)
        )
        self.start_activated_state = _uniform(rngs, size)
        self.start_trace = _uniform(rngs, size, memory)
        self._choose_neurons("action", cfg.n_synch_action, actions, rngs)
        self._choose_neurons("out", cfg.n_synch_out, outputs, rngs)
        images = 3 if cfg.in_channels is None else cfg.in_channels
        is_resnet = cfg.backbone_type.startswith("resnet")
        self.initial_rgb = Conv(images, 3, 1, sides=2, rngs=rngs) if is_resnet else Identity()
        self.backbone = ctm_backbone(cfg.backbone_type, width, images, rngs=rngs)
        channels = self._feature_channels(cfg)
        self.positional_embedding = positional_embedding(
            cfg.positional_embedding_type, channels, rngs=rngs
        )
        self.kv_linear = Linear(channels, width, rngs=rngs)
        self.kv_norm = LayerNorm(width)
        self.q_proj = Linear(actions, width, rngs=rngs)
        self.attention = MultiheadAttention(width, cfg.heads, cfg.dropout, rngs=rngs)
        self.synapses = self._make_synapses(cfg, rngs)
        dropout_nlm = cfg.dropout if cfg.dropout_nlm is None else cfg.dropout_nlm
        hidden = cfg.memory_hidden_dims if cfg.deep_nlms else None
        self.neurons = NeuronLevelModel(
            memory, hidden, size, cfg.do_layernorm_nlm, dropout_nlm, rngs=rngs
        )
        self.projector = Linear(outputs, cfg.out_dims, rngs=rngs)

    def _feature_channels(self, cfg: ContinuousThoughtMachineConfig) -> int:
        if cfg.backbone_type == "parity_backbone":
            return cfg.d_input
        if cfg.backbone_type == "none":
            if cfg.in_channels is None:
                raise ValueError(
                    f"{type(self).__name__} with backbone_type='none' needs in_channels, the "
                    "channels of its input"
                )
            return cfg.in_channels
        return getattr(self.backbone, "out_channels", 2048)

    def _make_synapses(self, cfg: ContinuousThoughtMachineConfig, rngs: nnx.Rngs) -> Any:
        inputs = cfg.d_input + cfg.d_model
        return make_synapses(inputs, cfg.d_model, cfg.synapse_depth, cfg.dropout, rngs=rngs)

    def _choose_neurons(self, kind: str, n: int, size: int, rngs: nnx.Rngs) -> None:
        """Hold the decays and the chosen neurons of one synchronisation."""
        cfg = self.cfg
        left, right = jax.random.randint(rngs.params(), (2, n), 0, cfg.d_model)
        if cfg.neuron_select_type == "first-last":
            first = 0 if kind == "out" else cfg.d_model - n
            left = right = jnp.arange(first, first + n)
        elif cfg.neuron_select_type == "random-pairing":
            right = jnp.where(jnp.arange(n) < cfg.n_random_pairing_self, left, right)
        setattr(self, f"decay_params_{kind}", nnx.Param(jnp.zeros(size)))
        setattr(self, f"{kind}_neuron_indices_left", NeuronIndices(left))
        setattr(self, f"{kind}_neuron_indices_right", NeuronIndices(right))

    def _pairs(self, kind: str) -> tuple[Array, Array]:
        """The left and the right neurons of the synchronised pairs, (n,) each."""
        left = getattr(self, f"{kind}_neuron_indices_left")[...]
        right = getattr(self, f"{kind}_neuron_indices_right")[...]
        if self.cfg.neuron_select_type == "random-pairing":
            return left, right
        i, j = np.triu_indices(len(left))
        return left[i], right[j]

    def _decay(self, kind: str) -> Array:
        """The decays (n,) within [0, 15]."""
        free = getattr(self, f"decay_params_{kind}")[...]
        return free + jax.lax.stop_gradient(jnp.clip(free, 0, 15) - free)

    def _sums(self) -> tuple[Array, Array]:
        """Of the action neurons r = exp(-decay) (n,) and 1 / sqrt(beta) at every tick (T, n)."""
        decay = self._decay("action")
        steps = jnp.arange(self.iterations, dtype=decay.dtype)
        beta = jnp.cumsum(jnp.exp(-decay * steps[:, None]), 0)
        return jnp.exp(-decay), jax.lax.rsqrt(beta)

    def compute_features(self, x: Array) -> Array:
        """Map the input to the features that are attended to, (B, S, C)."""
        features = self.backbone(self.initial_rgb(x))
        if self.positional_embedding is not None:
            features = features + self.positional_embedding(features)
        return features.reshape(*features.shape[:2], -1).mT

    def compute_certainty(self, predictions: Array) -> Array:
        """Return the normalised entropy and 1 minus it, (..., 2), of predictions (..., out_dims).

        The entropy is over the last axis of ``prediction_reshaper`` and averaged over the others.
        """
        shape = predictions.shape[:-1]
        log_p = jax.nn.log_softmax(predictions.reshape(*shape, *self.cfg.prediction_reshaper))
        entropy = -(jnp.exp(log_p) * log_p).sum(-1) / math.log(log_p.shape[-1])
        entropy = entropy.reshape(*shape, -1).mean(-1)
        return jnp.stack([entropy, 1 - entropy], -1)

    def _look(self, features: Array) -> _Look:
        """Everything about attention that no tick changes."""
        attention = self.attention
        heads, width = self.cfg.heads, self.cfg.d_input
        w_q, w_k, w_v = (
            part.kernel[...].transpose(1, 2, 0)  # (heads, d, E)
            for part in (attention.query, attention.key, attention.value)
        )
        b_q, b_k, b_v = (
            part.bias[...] for part in (attention.query, attention.key, attention.value)
        )
        w_o = attention.out.kernel[...].transpose(2, 0, 1)  # (E, heads, d)
        b_o = attention.out.bias[...]
        assert self.q_proj.bias is not None
        scale = (width // heads) ** -0.5
        in_weight = w_q @ self.q_proj.kernel[...].T * scale  # (heads, d, n)
        in_bias = (w_q @ self.q_proj.bias[...] + b_q) * scale
        # A dropped-out row of weights does not sum to 1, which absorbing counts on.
        if self._attention_drops() or not absorbs_attention(features.shape[-1], width, heads):
            kv = self.kv_norm(self.kv_linear(features))[:, None]
            keys = kv @ w_k.mT + b_k[:, None]
            values = kv @ w_v.mT + b_v[:, None]
            return _Look(
                keys,
                values,
                in_weight.reshape(width, -1),
                in_bias.reshape(-1),
                w_o.reshape(width, -1),
                b_o,
            )
        # kv = gamma * (centred [features, 1]) / std + beta, with the linear layer's rows centred.
        # Queries are moved to the other side of that map, and what is constant over positions
        # drops out of the softmax.
        linear, norm = self.kv_linear, self.kv_norm
        assert linear.bias is not None
        assert norm.scale is not None
        assert norm.bias is not None
        centred = jnp.concatenate([linear.kernel[...].T, linear.bias[...][:, None]], 1)
        centred = centred - centred.mean(0)
        ones = jnp.ones((*features.shape[:2], 1), features.dtype)
        rows = jnp.concatenate([features, ones], -1)
        variance = ((rows @ centred.T) ** 2).mean(-1, keepdims=True)
        rows = (rows * jax.lax.rsqrt(variance + norm.eps))[:, None]
        scaled = norm.scale[...][:, None] * centred
        k_map, v_map = w_k @ scaled, w_v @ scaled  # (heads, d, C + 1)
        in_weight = (k_map.mT @ in_weight).reshape(k_map.shape[0] * k_map.shape[2], -1)
        in_bias = jnp.einsum("hdc,hd->hc", k_map, in_bias).reshape(-1)
        out_weight = jnp.einsum("ehd,hdc->ehc", w_o, v_map).reshape(width, -1)
        out_bias = jnp.einsum("ehd,hd->e", w_o, w_v @ norm.bias[...] + b_v) + b_o
        return _Look(rows, None, in_weight, in_bias, out_weight, out_bias)

    def __call__(self, x: Array, track: bool = False) -> Thoughts | Tracked:
        """Think about the input for ``iterations`` ticks.

        Parameters
        ----------
        x
            Images (B, in_channels, H, W); for ``"parity_backbone"`` signs (B, L); for ``"none"``
            features (B, in_channels, *positions).
        track
            Return every tick's inner values too. Not under ``jax.jit``.

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
        dtype = features.dtype
        look = self._look(features.astype(self.q_proj.kernel[...].dtype))
        weights = self.neurons.per_neuron()
        r, scale = (value.astype(dtype) for value in self._sums())
        loop = self._loop(look, weights, r, scale, dtype)
        look = look.astype(dtype)
        seen: tuple[Any, ...] = ()
        if loop is None:
            activations, seen = self._ticks(look, weights, r, scale, track)
        else:
            activations, states, synchronisations = think(loop)
            if track:
                attended = jax.lax.map(lambda value: look(value, Identity())[1], synchronisations)
                seen = synchronisations, states, attended[:, :, :, None]
        synchronised = self._synchronisation_out(activations)
        logits = self.projector(synchronised)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        predictions = logits.transpose(1, 2, 0)
        certainties = self.compute_certainty(logits).transpose(1, 2, 0)
        if not track:
            return predictions, certainties, synchronised[-1]
        out, post, action, pre, attention = (
            np.asarray(value) for value in (synchronised, activations[1:], *seen)
        )
        return predictions, certainties, (out, action), pre, post, attention

    def _loop(
        self,
        look: _Look,
        neurons: list[tuple[Array, Array]],
        r: Array,
        scale: Array,
        dtype: Any,
    ) -> Loop | None:
        """All that the ticks use, for one function with a gradient of its own; None where that
        cannot be."""
        layers, weights = layers_of(self.synapses), neuron_weights_of(self.neurons, neurons)
        if layers is None or weights is None or self._attention_drops():
            return None
        layers = (replace(layers[0], linear=self._first_layer(look)), *layers[1:])
        look = look.astype(dtype)
        return Loop(
            jnp.concatenate(self._pairs("action")),
            self.start_activated_state[...].astype(dtype),
            self.start_trace[...].astype(dtype),
            r,
            scale,
            look.keys,
            look.values,
            look.in_weight,
            look.in_bias,
            tuple(weight.astype(dtype) for weight in weights),
            tuple(
                replace(layer, linear=tuple(weight.astype(dtype) for weight in layer.linear))
                for layer in layers
            ),
        )

    def _ticks(
        self,
        look: _Look,
        weights: list[tuple[Array, Array]],
        r: Array,
        scale: Array,
        track: bool,
    ) -> tuple[Array, tuple[Any, ...]]:
        """The scan over the modules: activations (1 + T, B, D) and, if tracked, of every tick
        synchronisation of the action neurons, state and attention weights.
        """
        dtype, batch = look.keys.dtype, len(look.keys)
        first = self._synapses_of(look)
        left, right = self._pairs("action")
        # Dropout draws from counters that each tick moves on: they travel with the loop.
        parts: Any = nnx.split(self, nnx.RngState, ...)
        structure, counters, rest = parts

        def tick(carry: Any, scale: Array) -> tuple[Any, Any]:
            z, trace, alpha, counters = carry
            model = nnx.merge(structure, counters, rest)
            alpha = r * alpha + z[:, left] * z[:, right]
            synchronisation = alpha * scale
            read, attended = look(synchronisation, model.attention.dropout)
            state = first(model.synapses, read, z)
            trace = jnp.concatenate([trace[:, :, 1:], state[:, :, None]], -1)
            z = model.neurons(trace, weights)
            seen = (synchronisation, state, attended[:, :, None]) if track else ()
            counters = nnx.state(model, nnx.RngState)
            return (z, trace, alpha, counters), (z, seen)

        start = jnp.broadcast_to(
            self.start_activated_state[...].astype(dtype), (batch, self.cfg.d_model)
        )
        trace = self.start_trace[...].astype(dtype)
        trace = jnp.broadcast_to(trace, (batch, *trace.shape))
        carry: Any = (start, trace, jnp.zeros((batch, r.shape[0]), dtype), counters)
        # Of a tick the backward pass finds what it is given and the outputs of the linear layers.
        kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        tick = jax.checkpoint(tick, policy=kept, prevent_cse=False)
        carry, (activations, seen) = jax.lax.scan(tick, carry, scale)
        if self._drops():
            nnx.update(self, carry[-1])
        return jnp.concatenate([start[None], activations]), seen

    def _drops(self) -> bool:
        """Whether a dropout is at work."""
        layers = (node for _, node in nnx.iter_graph(self) if isinstance(node, nnx.Dropout))
        return any(not layer.deterministic for layer in layers)

    def _attention_drops(self) -> bool:
        dropout = self.attention.dropout
        return not isinstance(dropout, Identity) and not dropout.deterministic

    def _synapses_of(self, look: _Look) -> Callable[[Any, Array, Array], Array]:
        """The synapses as a function of themselves, what was read and z; the attention's last
        projection is multiplied into the first layer where no dropout stands between them.
        """
        if not isinstance(self.synapses, SynapseUNET):

            def attend_first(synapses: Any, read: Array, z: Array) -> Array:
                attended = read @ look.out_weight.T + look.out_bias
                return synapses(jnp.concatenate([attended, z], 1))

            return attend_first
        kernel, bias = (value.astype(look.keys.dtype) for value in self._first_layer(look))

        def attend_in_first(synapses: Any, read: Array, z: Array) -> Array:
            return synapses.from_first(jnp.concatenate([read, z], 1) @ kernel + bias)

        return attend_in_first

    def _first_layer(self, look: _Look) -> tuple[Array, Array]:
        """Kernel and bias of the synapses' first layer for what was read and z, the attention's
        last projection multiplied in.
        """
        is_unet = isinstance(self.synapses, SynapseUNET)
        layer = self.synapses.first_linear if is_unet else self.synapses.linear
        assert layer.bias is not None
        attended, thought = jnp.split(layer.kernel[...], [self.cfg.d_input])
        kernel = jnp.concatenate([look.out_weight.T @ attended, thought])
        return kernel, look.out_bias @ attended + layer.bias[...]

    def _synchronisation_out(self, activations: Array) -> Array:
        """Synchronisation (T, B, n) of the output neurons from all activations (1 + T, B, D)."""
        # XLA cannot divide a kernel among several devices.
        implementation = None if jax.device_count() == 1 else "xla"
        synchronised = synchronisation(
            activations, *self._pairs("out"), self._decay("out"), implementation=implementation
        )
        return synchronised[1:].astype(activations.dtype)


def _uniform(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    bound = math.sqrt(1 / sum(shape))
    return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))


@checked_keywords()
class HyperContinuousThoughtMachine(ContinuousThoughtMachine):
    """A :class:`ContinuousThoughtMachine` whose synapses adapt to the state at every tick.

    The chosen layers of the U-Net are :class:`~ml_networks.jax.HyperLoRALinear`, whose dynamic
    part starts at zero: with the same other weights a fresh model is exactly the plain one.

    Parameters
    ----------
    iterations, d_model, d_input, heads, n_synch_out, n_synch_action, synapse_depth, \
memory_length, deep_nlms, memory_hidden_dims, do_layernorm_nlm, backbone_type, \
positional_embedding_type, out_dims, prediction_reshaper, dropout, dropout_nlm, \
neuron_select_type, n_random_pairing_self, in_channels, hyper_layers, hyper_rank
        See :class:`~ml_networks.config.HyperContinuousThoughtMachineConfig`.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.

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
        *,
        rngs: RngsLike | None = None,
    ) -> None:
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
            ),
            as_rngs(rngs),
        )

    @classmethod
    def config_class(cls) -> type[HyperContinuousThoughtMachineConfig]:
        """The config's class."""
        return HyperContinuousThoughtMachineConfig

    def _make_synapses(self, cfg: ContinuousThoughtMachineConfig, rngs: nnx.Rngs) -> Any:
        assert isinstance(cfg, HyperContinuousThoughtMachineConfig)
        if cfg.hyper_layers == "none":
            return super()._make_synapses(cfg, rngs)
        return HyperSynapseUNET(
            cfg.d_model,
            cfg.synapse_depth,
            dropout=cfg.dropout,
            hyper_layers=cfg.hyper_layers,
            hyper_rank=cfg.hyper_rank,
            in_dims=cfg.d_input + cfg.d_model,
            rngs=rngs,
        )
