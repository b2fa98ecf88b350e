"""The ops of ml-networks: one folder an op, installed as ``ml_networks.kernels``.

``ml_networks.kernels.torch`` and ``ml_networks.kernels.jax`` are the two faces. The package itself
imports neither framework.
"""

from .core.dispatch import explain, tuning_policy, use_implementation
from .core.records import overlay as tuning_overlay
from .core.usage import record as record_usage

__all__ = ["explain", "record_usage", "tuning_overlay", "tuning_policy", "use_implementation"]
