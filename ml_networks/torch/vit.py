"""Vision transformer: an encoder of images, and a decoder by learned patch queries."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ml_networks._compat import checked_keywords
from ml_networks._geometry import is_glu, n_patches
from ml_networks.config import TransformerConfig, ViTConfig, as_config
from ml_networks.torch.activations import Activation
from ml_networks.torch.attention import MultiheadAttention
from ml_networks.torch.layers import PatchEmbed

__all__ = ["ViT"]


def _learned(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(shape))


class _EncoderBlock(nn.Module):
    """Pre-norm self-attention whose queries and keys carry the position, then feed-forward."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.d_model)
        self.attn = MultiheadAttention(
            cfg.d_model, cfg.nhead, dropout=cfg.dropout, batch_first=True
        )
        self.norm2 = nn.LayerNorm(cfg.d_model)
        self.linear1 = _linear1(cfg)
        self.activation = Activation(cfg.hidden_activation)
        self.linear2 = nn.Linear(cfg.dim_ff, cfg.d_model)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Map (B, L, d_model) to the same shape."""
        value = self.norm1(x)
        query = value + position
        x = x + self.dropout(self.attn(query, query, value, need_weights=False)[0])
        hidden = self.dropout(self.activation(self.linear1(self.norm2(x))))
        return x + self.dropout(self.linear2(hidden))


class _DecoderBlock(nn.Module):
    """Pre-norm cross-attention of the patch queries to the code, then feed-forward."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.norm_q = nn.LayerNorm(cfg.d_model)
        self.norm_kv = nn.LayerNorm(cfg.d_model)
        self.cross_attn = MultiheadAttention(
            cfg.d_model, cfg.nhead, dropout=cfg.dropout, batch_first=True
        )
        self.norm_mlp = nn.LayerNorm(cfg.d_model)
        self.linear1 = _linear1(cfg)
        self.activation = Activation(cfg.hidden_activation)
        self.linear2 = nn.Linear(cfg.dim_ff, cfg.d_model)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """Map queries (B, L, d_model) to the same shape; the code is (B, 1, d_model)."""
        code = self.norm_kv(code)
        attended = self.cross_attn(self.norm_q(x), code, code, need_weights=False)[0]
        x = x + self.dropout(attended)
        hidden = self.dropout(self.activation(self.linear1(self.norm_mlp(x))))
        return x + self.dropout(self.linear2(hidden))


def _linear1(cfg: TransformerConfig) -> nn.Linear:
    return nn.Linear(cfg.d_model, (2 if is_glu(cfg.hidden_activation) else 1) * cfg.dim_ff)


@checked_keywords()
class ViT(nn.Module):
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
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        cfg: ViTConfig,
        obs_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        cfg = as_config(cfg, ViTConfig, what="ViT cfg")
        transformer = cfg.transformer_cfg
        self.in_shape = tuple(in_shape)
        self.cfg = cfg
        self.patch_size = cfg.patch_size
        self.transformer_cfg = transformer
        self.d_model = transformer.d_model
        self.is_encoder = obs_shape is None
        self.obs_shape = self.in_shape if obs_shape is None else tuple(obs_shape)
        self.n_patches = self.get_n_patches(self.obs_shape)
        if self.is_encoder:
            self.last_channel = self.out_patch_dim = self.d_model
            self._build_encoder(transformer)
        else:
            if self.in_shape != (self.d_model,):
                raise ValueError(
                    f"a ViT decoder needs in_shape={(self.d_model,)}, its d_model, got "
                    f"{self.in_shape}"
                )
            self.last_channel = self.out_patch_dim = self.get_patch_dim(self.obs_shape)
            self._build_decoder(transformer)

    def _build_encoder(self, cfg: TransformerConfig) -> None:
        channels, height, width = self.obs_shape
        self.pos_emb = _learned(1, self.n_patches, self.d_model)
        if self.cfg.cls_token:
            self.cls_token = _learned(1, 1, self.d_model)
            self.cls_pos_emb = _learned(1, 1, self.d_model)
        self.patch_embed = PatchEmbed(self.d_model, self.patch_size, (channels, height, width))
        self.encoder_blocks = nn.ModuleList(_EncoderBlock(cfg) for _ in range(cfg.n_layers))
        self.encoder_norm = nn.LayerNorm(self.d_model)

    def _build_decoder(self, cfg: TransformerConfig) -> None:
        activation = self.cfg.decoder_output_activation
        gate = 2 if is_glu(activation) else 1
        self.queries = _learned(1, self.n_patches, self.d_model)
        self.kv_norm = nn.LayerNorm(self.d_model)
        self.kv_proj = nn.Linear(self.d_model, self.d_model)
        self.decoder_blocks = nn.ModuleList(_DecoderBlock(cfg) for _ in range(cfg.n_layers))
        self.decoder_norm = nn.LayerNorm(self.d_model)
        self.out_proj = nn.Linear(self.d_model, gate * self.out_patch_dim)
        self.output_activation = Activation(activation, dim=-3)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, C, H, W) to (B, d_model), or decode (B, d_model) or (B, 1, d_model)."""
        return self._encode(x) if self.is_encoder else self._decode(x)

    def _encode(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        position: Tensor = self.pos_emb
        if self.cfg.cls_token:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
            position = torch.cat([self.cls_pos_emb, position], 1)
        for block in self.encoder_blocks:
            x = block(x, position)
        if self.cfg.cls_token:
            output: Tensor = self.encoder_norm(x[:, 0])
            return output
        return self.encoder_norm(x).mean(1)

    def _decode(self, x: Tensor) -> Tensor:
        code = self.kv_proj(self.kv_norm(x.reshape(-1, 1, self.d_model)))
        x = self.queries.expand(x.shape[0], -1, -1)
        for block in self.decoder_blocks:
            x = block(x, code)
        image = self.unpatchify(self.out_proj(self.decoder_norm(x)))
        output: Tensor = self.output_activation(image)
        return output

    def patchify(self, imgs: Tensor) -> Tensor:
        """Cut (B, C, H, W) into (B, patches, patch_size^2 C), a pixel's channels together."""
        batch, channels, height, width = imgs.shape
        side = self.patch_size
        grid = imgs.reshape(batch, channels, height // side, side, width // side, side)
        return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * channels)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Join patches (B, patches, patch_size^2 C) to images of ``obs_shape``, (B, C, H, W)."""
        height, width = self.obs_shape[-2:]
        side = self.patch_size
        grid = x.reshape(x.shape[0], height // side, width // side, side, side, -1)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, height, width)

    @property
    def conved_shape(self) -> tuple[int, int]:
        """Spatial shape of the encoder's output, (1, 1)."""
        return (1, 1)

    @property
    def conved_size(self) -> int:
        """Number of the encoder's output features, d_model."""
        return self.d_model

    def get_n_patches(self, obs_shape: tuple[int, ...]) -> int:
        """Return the number of patches of an image (C, H, W)."""
        return n_patches(obs_shape, self.patch_size)

    def get_patch_dim(self, obs_shape: tuple[int, ...]) -> int:
        """Return the number of values in a patch of an image (C, H, W)."""
        return math.prod((obs_shape[0], self.patch_size, self.patch_size))

    @staticmethod
    def get_input_shape(obs_shape: tuple[int, int, int], cfg: ViTConfig) -> tuple[int]:
        """Return the input shape of a decoder, (d_model,)."""
        return (cfg.transformer_cfg.d_model,)
