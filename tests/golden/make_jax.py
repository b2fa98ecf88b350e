"""Write the golden checkpoints of the published 0.2.6's JAX side.

Run in an environment with the published 0.2.6 (``make peers``)::

    JAX_PLATFORMS=cpu .venv-peers/bin/python tests/golden/make_jax.py

Each file in ``data_jax/`` holds parameters and statistics by path, a channels-last input and the
output in evaluation mode. Left out is what 0.2.6 computes unlike torch: GELU by tanh, epsilons of
norms, transposed convolutions, transformers, attention with several heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

DATA = Path(__file__).parent / "data_jax"


def cases(library: Any, configs: Any, rngs: Any) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Modules by name with the shape of their channels-last input."""
    conv = configs.ConvConfig("ReLU", 3, 2, 1, norm="batch", norm_cfg={"eps": 1e-5})
    resnet = configs.ResNetConfig(4, 3, 3, "ReLU", "Tanh", 1, n_scaling=1)
    hidden = configs.LinearConfig("ReLU", norm="layer", norm_cfg={"eps": 1e-5})
    mlp = configs.MLPConfig(6, 2, "Tanh", hidden)
    layers = configs.ConvNetConfig((4, 6), (conv, conv))
    return {
        "mlp": (library.MLPLayer(5, 3, mlp, rngs=rngs), (2, 5)),
        "conv": (library.ConvNormActivation(3, 4, conv, rngs=rngs), (2, 8, 6, 3)),
        "convnet": (library.ConvNet(_image(library, 8, 6), layers, rngs=rngs), (2, 8, 6, 3)),
        "unshuffle": (
            library.ResNetPixUnshuffle(_image(library, 8, 6), resnet, rngs=rngs),
            (2, 8, 6, 3),
        ),
    }


def _image(library: Any, height: int, width: int) -> tuple[int, int, int]:
    """The shape of an image: 0.2.6 is channels-last in JAX, this version channels-first."""
    first = hasattr(library, "as_rngs")
    return (3, height, width) if first else (height, width, 3)


def main() -> None:
    """Write one file a case."""
    import ml_networks
    import ml_networks.jax as library

    for name, (module, shape) in cases(library, ml_networks, nnx.Rngs(0)).items():
        generator = np.random.default_rng(0)
        module.eval()
        leaves = {}
        for path, leaf in nnx.to_flat_state(nnx.state(module, (nnx.Param, nnx.BatchStat))):
            value = np.asarray(leaf[...]) + 0.1 * generator.random(leaf.shape)
            leaf[...] = jax.numpy.asarray(value, "float32")
            leaves["state/" + "/".join(map(str, path))] = np.asarray(leaf[...])
        x = generator.standard_normal(shape).astype(np.float32)
        arrays = {**leaves, "input": x, "output": np.asarray(module(x))}
        save_file(arrays, DATA / f"{name}.safetensors")


if __name__ == "__main__":
    main()
