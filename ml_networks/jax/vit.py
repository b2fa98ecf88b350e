"""Vision transformer: an encoder of images, and a decoder by learned patch queries."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ml_networks._compat import checked_keywords
from ml_networks._geometry import is_glu, n_patches
from ml_networks.config import TransformerConfig, ViTConfig, as_config
from ml_networks.jax.activations import Activation
from ml_networks.jax.layers import MultiheadAttention, PatchEmbed, make_dropout
from ml_networks.jax.primitives import LayerNorm, Linear
from ml_networks.jax.rngs import RngsLike, as_rngs

__all__ = ["ViT"]

Array = jax.Array


def _learned(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


class _FeedForward(nnx.Module):
    """linear2(dropout(activation(linear1(x)))); its two layers stand in the block in torch."""

    def __init__(self, cfg: TransformerConfig, rngs: nnx.Rngs) -> None:
        width = (2 if is_glu(cfg.hidden_activation) else 1) * cfg.dim_ff
        self.linear1 = Linear(cfg.d_model, width, rngs=rngs)
        self.activation = Activation(cfg.hidden_activation, rngs=rngs)
        self.linear2 = Linear(cfg.dim_ff, cfg.d_model, rngs=rngs)
        self.dropout = make_dropout(cfg.dropout, rngs)

    def __call__(self, x: Array) -> Array:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class _EncoderBlock(nnx.Module):
    """Pre-norm self-attention whose queries and keys carry the position, then feed-forward."""

    torch_names: ClassVar[dict[str, str]] = {"feed_forward": ""}

    def __init__(self, cfg: TransformerConfig, rngs: nnx.Rngs) -> None:
        self.norm1 = LayerNorm(cfg.d_model)
        self.attn = MultiheadAttention(cfg.d_model, cfg.nhead, cfg.dropout, rngs=rngs)
        self.norm2 = LayerNorm(cfg.d_model)
        self.feed_forward = _FeedForward(cfg, rngs)
        self.dropout = make_dropout(cfg.dropout, rngs)

    def __call__(self, x: Array, position: Array) -> Array:
        value = self.norm1(x)
        query = value + position
        x = x + self.dropout(self.attn(query, query, value))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class _DecoderBlock(nnx.Module):
    """Pre-norm cross-attention of the patch queries to the code, then feed-forward."""

    torch_names: ClassVar[dict[str, str]] = {"feed_forward": ""}

    def __init__(self, cfg: TransformerConfig, rngs: nnx.Rngs) -> None:
        self.norm_q = LayerNorm(cfg.d_model)
        self.norm_kv = LayerNorm(cfg.d_model)
        self.cross_attn = MultiheadAttention(cfg.d_model, cfg.nhead, cfg.dropout, rngs=rngs)
        self.norm_mlp = LayerNorm(cfg.d_model)
        self.feed_forward = _FeedForward(cfg, rngs)
        self.dropout = make_dropout(cfg.dropout, rngs)

    def __call__(self, x: Array, code: Array) -> Array:
        code = self.norm_kv(code)
        x = x + self.dropout(self.cross_attn(self.norm_q(x), code, code))
        return x + self.dropout(self.feed_forward(self.norm_mlp(x)))


@checked_keywords()
class ViT(nnx.Module):
    """Vision transformer (arXiv 2010.11929), as encoder or decoder.

    The encoder embeds patches, adds a learned position to the queries and keys of every block
    and returns the class token, or the mean of the patches. The decoder lets one learned query
    for each patch attend to the code and projects it to the patch's pixels. Neither uses
    ``output_activation`` of the transformer's config.

    Parameters
    ----------
    in_shape
        Encoder: (C, H, W) of the images. Decoder: (d_model,).
    cfg
        The :class:`~ml_networks.config.ViTConfig`.
    obs_shape
        None: an encoder. (C, H, W): a decoder of such images. Height and width must be
        divisible by the patch size.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        cfg: ViTConfig,
        obs_shape: tuple[int, int, int] | None = None,
        *,
        rngs: RngsLike | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        cfg = as_config(cfg, ViTConfig, what="ViT cfg")
        width = cfg.transformer_cfg.d_model
        self.in_shape = tuple(in_shape)
        self.patch_size = cfg.patch_size
        self.d_model = width
        self.is_encoder = obs_shape is None
        self.obs_shape = self.in_shape if obs_shape is None else tuple(obs_shape)
        self.n_patches = n_patches(self.obs_shape, cfg.patch_size)
        if self.is_encoder:
            self.last_channel = width
            self._build_encoder(cfg, rngs)
        else:
            if self.in_shape != (width,):
                raise ValueError(
                    f"a ViT decoder needs in_shape={(width,)}, its d_model, got {self.in_shape}"
                )
            self.last_channel = self.obs_shape[0] * cfg.patch_size**2
            self._build_decoder(cfg, rngs)

    def _build_encoder(self, cfg: ViTConfig, rngs: nnx.Rngs) -> None:
        channels, height, width = self.obs_shape
        transformer = cfg.transformer_cfg
        self.pos_emb = _learned(rngs, 1, self.n_patches, self.d_model)
        self.has_token = cfg.cls_token
        if cfg.cls_token:
            self.cls_token = _learned(rngs, 1, 1, self.d_model)
            self.cls_pos_emb = _learned(rngs, 1, 1, self.d_model)
        shape = (channels, height, width)
        self.patch_embed = PatchEmbed(self.d_model, self.patch_size, shape, rngs=rngs)
        blocks = [_EncoderBlock(transformer, rngs) for _ in range(transformer.n_layers)]
        self.encoder_blocks = nnx.List(blocks)
        self.encoder_norm = LayerNorm(self.d_model)

    def _build_decoder(self, cfg: ViTConfig, rngs: nnx.Rngs) -> None:
        activation = cfg.decoder_output_activation
        transformer = cfg.transformer_cfg
        gate = 2 if is_glu(activation) else 1
        self.queries = _learned(rngs, 1, self.n_patches, self.d_model)
        self.kv_norm = LayerNorm(self.d_model)
        self.kv_proj = Linear(self.d_model, self.d_model, rngs=rngs)
        blocks = [_DecoderBlock(transformer, rngs) for _ in range(transformer.n_layers)]
        self.decoder_blocks = nnx.List(blocks)
        self.decoder_norm = LayerNorm(self.d_model)
        self.out_proj = Linear(self.d_model, gate * self.last_channel, rngs=rngs)
        self.output_activation = Activation(activation, dim=-3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Encode (B, C, H, W) to (B, d_model), or decode (B, d_model) or (B, 1, d_model)."""
        return self._encode(x) if self.is_encoder else self._decode(x)

    def _encode(self, x: Array) -> Array:
        x = self.patch_embed(x)
        position = self.pos_emb[...].astype(x.dtype)
        if self.has_token:
            token = self.cls_token[...].astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.d_model)), x], 1)
            position = jnp.concatenate([self.cls_pos_emb[...].astype(x.dtype), position], 1)
        for block in self.encoder_blocks:
            x = block(x, position)
        return self.encoder_norm(x[:, 0]) if self.has_token else self.encoder_norm(x).mean(1)

    def _decode(self, x: Array) -> Array:
        code = self.kv_proj(self.kv_norm(x.reshape(x.shape[0], 1, self.d_model)))
        queries = self.queries[...].astype(x.dtype)
        x = jnp.broadcast_to(queries, (x.shape[0], *queries.shape[1:]))
        for block in self.decoder_blocks:
            x = block(x, code)
        return self.output_activation(self.unpatchify(self.out_proj(self.decoder_norm(x))))

    def patchify(self, imgs: Array) -> Array:
        """Cut (B, C, H, W) into (B, patches, patch_size^2 C), a pixel's channels together."""
        batch, channels, height, width = imgs.shape
        side = self.patch_size
        grid = imgs.reshape(batch, channels, height // side, side, width // side, side)
        return grid.transpose(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * channels)

    def unpatchify(self, x: Array) -> Array:
        """Join patches (B, patches, patch_size^2 C) to images of ``obs_shape``, (B, C, H, W)."""
        height, width = self.obs_shape[-2:]
        side = self.patch_size
        grid = x.reshape(x.shape[0], height // side, width // side, side, side, -1)
        return grid.transpose(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, height, width)

    @property
    def conved_shape(self) -> tuple[int, int]:
        """Spatial shape of the encoder's output, (1, 1)."""
        return (1, 1)

    @property
    def conved_size(self) -> int:
        """Number of the encoder's output features, d_model."""
        return self.d_model

    @staticmethod
    def get_input_shape(obs_shape: tuple[int, int, int], cfg: ViTConfig) -> tuple[int]:
        """Return the input shape of a decoder, (d_model,)."""
        return (cfg.transformer_cfg.d_model,)
