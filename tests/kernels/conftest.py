"""The toy op joins every suite that walks the registry."""

from ml_networks.kernels.core import registry

registry.register("tests.kernels.toy_op")
