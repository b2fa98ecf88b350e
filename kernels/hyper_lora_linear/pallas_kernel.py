"""The hypernetwork low-rank linear layer on the Pallas kernels of `core.pallas_low_rank`.

With ``c~ = [c; 1]`` the generators act as shared adapters of width rank * (context + 1), laid
out (rank, context + 1). What happens to a row between them is ``q = scale * gate * c~ * ((p * c~)
M)``, with c~ repeated for every rank and M the sums over contexts, spread out again: ones on the
diagonal blocks.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ..core.device import Device
from ..core.pallas_low_rank import Tile, gradient, linear
from .spec import Config

_STATIC = ("scale", "config", "device")


def _tile(config: Config) -> Tile:
    return Tile(
        config.block_rows,
        config.block_columns,
        config.block_depth,
        config.num_warps,
        config.num_stages,
    )


def generator(weight: Array, bias: Array, features: int) -> Array:
    """A generator as a shared adapter, (features, rank * (context + 1))."""
    both = jnp.concatenate((weight, bias[:, None]), 1)
    return both.reshape(features, both.size // features)


def with_one(context: Array) -> Array:
    """c~ = [c; 1], (rows, context + 1)."""
    return jnp.pad(context, ((0, 0), (0, 1)), constant_values=1)


@partial(jax.jit, static_argnames=_STATIC)
def forward(
    rows: Array,
    weight: Array,
    bias: Array | None,
    context: Array,
    gate_weight: Array,
    gate_bias: Array,
    u_weight: Array,
    u_bias: Array,
    v_weight: Array,
    v_bias: Array,
    *,
    scale: float,
    config: Config,
    device: Device,
) -> tuple[Array, Array]:
    """Launch on ``rows`` (n, in) and ``context`` (n, features), n > 0; returns y (n, out) and p
    (n, rank * (features + 1)). ``device`` keys the compiled code."""
    width_out, width_in = weight.shape
    rank = u_bias.shape[0] // width_out
    c = with_one(context)
    gate = jax.nn.sigmoid(context @ gate_weight.T + gate_bias)
    repeated = jnp.tile(c, (1, rank))
    y, p = linear(
        rows[None],
        weight,
        bias,
        generator(u_weight, u_bias, width_out)[None],
        v=generator(v_weight, v_bias, width_in)[None],
        before=repeated[None],
        mix=jnp.kron(jnp.eye(rank, dtype=rows.dtype), jnp.ones((c.shape[1],) * 2, rows.dtype)),
        after=(scale * gate * repeated)[None],
        tile=_tile(config),
        device=device,
    )
    assert p is not None
    return y[0], p[0]


@partial(jax.jit, static_argnames=_STATIC)
def backward(
    dy: Array,
    rows: Array,
    weight: Array,
    context: Array,
    gate_weight: Array,
    gate_bias: Array,
    u_weight: Array,
    u_bias: Array,
    v_weight: Array,
    v_bias: Array,
    p: Array,
    *,
    scale: float,
    config: Config,
    device: Device,
) -> tuple[Array, ...]:
    """The gradients of x, context and the six generator arrays for that of y, (n, out), n > 0."""
    count, width_out = dy.shape
    c = with_one(context).astype(jnp.float32)[:, None]
    dtype, pairs = dy.dtype, (count, -1, c.shape[2])
    gate = jax.nn.sigmoid((context @ gate_weight.T + gate_bias).astype(jnp.float32))
    wide = p.astype(jnp.float32).reshape(pairs)
    t = (wide * c).sum(2)
    s = scale * gate * t
    q = (s[:, :, None] * c).reshape(p.shape).astype(dtype)
    tile = _tile(config)
    dq, du = gradient(
        dy[None],
        generator(u_weight, u_bias, width_out)[None],
        q[None],
        tile=tile._replace(block_rows=config.pass_rows, block_columns=config.pass_columns),
        device=device,
    )
    dq = dq[0].reshape(pairs)
    ds = (dq * c).sum(2)
    dt = (scale * gate * ds)[:, :, None]
    dlogit = scale * (ds * t).sum(1, keepdims=True) * gate * (1 - gate)
    dcontext = (dq * s[:, :, None] + wide * dt).sum(1)[:, :-1] + dlogit * gate_weight
    dp = (dt * c).reshape(p.shape).astype(dtype)
    dx, _ = linear(
        dy[None],
        weight,
        None,
        generator(v_weight, v_bias, rows.shape[1])[None],
        q=dp[None],
        depth_first=True,
        tile=tile,
        device=device,
    )
    of_u = du[0].astype(dtype).reshape(-1, c.shape[2])
    of_v = (rows.T @ dp).reshape(-1, c.shape[2])
    return (
        dx[0],
        dcontext.astype(dtype),
        dlogit.astype(dtype).T @ context,
        dlogit.sum(0).astype(dtype),
        *(of_u[:, :-1], of_u[:, -1]),
        *(of_v[:, :-1], of_v[:, -1]),
    )
