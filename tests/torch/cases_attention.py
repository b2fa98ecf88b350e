from __future__ import annotations

from ml_networks.config import AttentionConfig
from ml_networks.torch import attention
from tests.torch.modules import ModuleCase, normal

MODULES = [
    ModuleCase("Attention1d", lambda: attention.Attention1d(6, 3), normal(6, 5)),
    ModuleCase("Attention1d-patch", lambda: attention.Attention1d(4, 2, 3), normal(4, 9)),
    ModuleCase("Attention2d", lambda: attention.Attention2d(6, 2), normal(6, 3, 5)),
    ModuleCase(
        "Attention2d-patch",
        lambda: attention.Attention2d(4, attn_cfg=AttentionConfig(2, 2)),
        normal(4, 4, 6),
    ),
]
