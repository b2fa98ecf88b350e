"""The low-rank linear layer on the Pallas kernels of `core.pallas_low_rank`."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ..core.device import Device
from ..core.pallas_low_rank import Tile, gradient, linear
from .spec import Config


def _tile(config: Config) -> Tile:
    return Tile(
        config.block_rows,
        config.block_columns,
        config.block_depth,
        config.num_warps,
        config.num_stages,
    )


def _grouped(rows: Array, groups: int) -> Array:
    return rows.reshape(groups, rows.shape[0] // groups, rows.shape[1])


def _adapter(adapter: Array) -> Array:
    return adapter if adapter.ndim == 3 else adapter[None]


def _factors(gate: Array | None, count: int, samples: int, u: Array, scale: float) -> Array:
    """What each row's t is multiplied by, scale * gate: (count, rank)."""
    rank = u.shape[-1]
    gates = jnp.ones((1, 1), u.dtype) if gate is None else gate
    each = jnp.broadcast_to(gates[:, None], (samples, count // samples, rank))
    return (scale * each).reshape(count, rank)


@partial(jax.jit, static_argnames=("samples", "scale", "config", "device"))
def forward(
    rows: Array,
    weight: Array,
    bias: Array | None,
    u: Array,
    v: Array,
    gate: Array | None,
    *,
    samples: int,
    scale: float,
    config: Config,
    device: Device,
) -> tuple[Array, Array]:
    """Launch on ``rows`` (samples * n, in), n > 0; returns y (samples * n, out) and t
    (samples * n, rank). ``device`` keys the compiled code."""
    groups = u.shape[0] if u.ndim == 3 else 1
    count, rank = rows.shape[0], u.shape[-1]
    y, t = linear(
        _grouped(rows, groups),
        weight,
        bias,
        _adapter(u),
        v=_adapter(v),
        before=_grouped(_factors(gate, count, samples, u, scale), groups),
        tile=_tile(config),
        device=device,
    )
    assert t is not None
    return y.reshape(count, -1), t.reshape(count, rank)


@partial(jax.jit, static_argnames=("samples", "scale", "config", "device"))
def backward(
    dy: Array,
    rows: Array,
    weight: Array,
    u: Array,
    v: Array,
    gate: Array | None,
    t: Array,
    *,
    samples: int,
    scale: float,
    config: Config,
    device: Device,
) -> tuple[Array, Array, Array, Array | None]:
    """The gradients of x, u, v and the gate for that of y, (samples * n, out), n > 0."""
    groups = u.shape[0] if u.ndim == 3 else 1
    count, rank = t.shape
    factors = _factors(gate, count, samples, u, scale).astype(jnp.float32)
    q = (factors * t).astype(dy.dtype)
    high, du = gradient(
        _grouped(dy, groups),
        _adapter(u),
        _grouped(q, groups),
        tile=_tile(config)._replace(block_columns=config.pass_columns),
        device=device,
    )
    high = high.reshape(count, rank)
    h = _grouped((factors * high).astype(dy.dtype), groups)
    dx, _ = linear(
        _grouped(dy, groups),
        weight,
        None,
        _adapter(v),
        q=h,
        depth_first=True,
        tile=_tile(config),
        device=device,
    )
    dv = _grouped(rows, groups).mT @ h
    dgate = None
    if gate is not None:
        products = scale * (t * high).reshape(samples, count // samples, rank).sum(1)
        unit = tuple(axis for axis, size in enumerate(gate.shape) if size == 1)
        dgate = products.sum(unit, keepdims=True).astype(gate.dtype)
    du, dv = du.reshape(u.shape).astype(u.dtype), dv.reshape(v.shape)
    return dx.reshape(rows.shape), du, dv, dgate
