"""Write the golden checkpoints of the published 0.2.6's JAX side.

Run in an environment with the published 0.2.6 (``make peers``)::

    JAX_PLATFORMS=cpu .venv-peers/bin/python tests/golden/make_jax.py

Each file in ``data_jax/`` holds parameters and statistics by path, channels-last inputs and the
output in evaluation mode. Left out is what 0.2.6 computes unlike torch: GELU by tanh, epsilons of
norms, transposed convolutions, transformers, attention with several heads; and what it cannot run:
hypernetworks with a network to run, U-Nets with attention or hypernetworks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

DATA = Path(__file__).parent / "data_jax"


def cases(library: Any, configs: Any, rngs: Any) -> dict[str, tuple[Any, ...]]:
    """How modules are made, by name, with the shapes of their channels-last inputs."""
    conv = configs.ConvConfig("ReLU", 3, 2, 1, norm="batch", norm_cfg={"eps": 1e-5})
    resnet = configs.ResNetConfig(4, 3, 3, "ReLU", "Tanh", 1, n_scaling=1)
    hidden = configs.LinearConfig("ReLU", norm="layer", norm_cfg={"eps": 1e-5})
    mlp = configs.MLPConfig(6, 2, "Tanh", hidden)
    layers = configs.ConvNetConfig((4, 6), (conv, conv))
    plain = configs.ConvConfig("SiLU", 3, 1, 1)
    unet = configs.UNetConfig((4, 6), plain, use_shuffle=True)
    scaled = configs.UNetConfig((4, 6), plain, use_shuffle=True, cond_pred_scale=True)
    contrast = configs.ContrastiveLearningConfig(5, mlp)
    line = (2, 8) if hasattr(library, "as_rngs") else (8, 2)
    return {
        "mlp": (lambda: library.MLPLayer(5, 3, mlp, rngs=rngs), (2, 5)),
        "conv": (lambda: library.ConvNormActivation(3, 4, conv, rngs=rngs), (2, 8, 6, 3)),
        "convnet": (
            lambda: library.ConvNet(_image(library, 8, 6), layers, rngs=rngs),
            (2, 8, 6, 3),
        ),
        "unshuffle": (
            lambda: library.ResNetPixUnshuffle(_image(library, 8, 6), resnet, rngs=rngs),
            (2, 8, 6, 3),
        ),
        "contrast": (
            lambda: library.ContrastiveLearningLoss(4, 3, contrast, rngs=rngs),
            (6, 4),
            (6, 3),
        ),
        "contrast-shared": (
            lambda: library.ContrastiveLearningLoss(4, 4, contrast, rngs=rngs),
            (6, 4),
            (6, 4),
        ),
        "hypernet": (lambda: library.HyperNet(4, {"weight": (3, 2)}, rngs=rngs), (5, 4)),
        "hypernet-mlp": (lambda: library.HyperNet(4, {"weight": (3, 2)}, mlp, rngs=rngs), (5, 4)),
        "unet1d": (
            lambda: library.ConditionalUnet1d(3, line, scaled, rngs=rngs),
            (2, 8, 2),
            (2, 3),
        ),
        "unet2d": (
            lambda: library.ConditionalUnet2d(3, _image(library, 8, 4), unet, rngs=rngs),
            (2, 8, 4, 3),
            (2, 3),
        ),
    }


def _image(library: Any, height: int, width: int) -> tuple[int, int, int]:
    """The shape of an image: 0.2.6 is channels-last in JAX, this version channels-first."""
    first = hasattr(library, "as_rngs")
    return (3, height, width) if first else (height, width, 3)


def call(module: Any, *inputs: Any) -> Any:
    """The output of a module; what a hypernetwork or a loss returns is one entry of it."""
    output = module.calc_nce(*inputs) if hasattr(module, "calc_nce") else module(*inputs)
    return output.get("nce", output.get("weight")) if isinstance(output, dict) else output


def main() -> None:
    """Write one file a case."""
    import ml_networks
    import ml_networks.jax as library

    for name, (build, *shapes) in cases(library, ml_networks, nnx.Rngs(0)).items():
        module = build()
        generator = np.random.default_rng(0)
        module.eval()
        leaves = {}
        for path, leaf in nnx.to_flat_state(nnx.state(module, (nnx.Param, nnx.BatchStat))):
            value = np.asarray(leaf[...]) + 0.1 * generator.random(leaf.shape)
            leaf[...] = jax.numpy.asarray(value, "float32")
            leaves["state/" + "/".join(map(str, path))] = np.asarray(leaf[...])
        inputs = [generator.standard_normal(shape).astype(np.float32) for shape in shapes]
        named = {f"input{i or ''}": x for i, x in enumerate(inputs)}
        arrays = {**leaves, **named, "output": np.asarray(call(module, *inputs))}
        save_file(arrays, DATA / f"{name}.safetensors")


if __name__ == "__main__":
    main()
