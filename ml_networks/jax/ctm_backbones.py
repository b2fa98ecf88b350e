"""The feature extractors of the Continuous Thought Machine."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ml_networks._compat import checked_keywords
from ml_networks._geometry import resnet_stages
from ml_networks.jax.layers import Identity
from ml_networks.jax.primitives import BatchNorm, Conv
from ml_networks.jax.rngs import RngsLike, as_rngs

__all__ = ["ParityBackbone", "ResNet", "ShallowWide", "ctm_backbone"]

Array = jax.Array


def _conv(inputs: int, outputs: int, kernel_size: int, stride: int, rngs: nnx.Rngs) -> Conv:
    """A convolution drawn from N(0, 2 / fan_out), which suits a ReLU after it."""
    padding = kernel_size // 2
    conv = Conv(inputs, outputs, kernel_size, stride, padding, bias=False, sides=2, rngs=rngs)
    spread = math.sqrt(2 / (outputs * kernel_size**2))
    conv.kernel[...] = spread * jax.random.normal(rngs.params(), conv.kernel.shape)
    return conv


class _Shortcut(nnx.Module):
    torch_names: ClassVar[dict[str, str]] = {"conv": "0", "norm": "1"}

    def __init__(self, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs) -> None:
        self.conv = _conv(inputs, outputs, 1, stride, rngs)
        self.norm = BatchNorm(outputs)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.conv(x))


class _Block(nnx.Module):
    """``ReLU(shortcut(x) + branch(x))``; the branch is conv-norm pairs with ReLU between."""

    def __init__(
        self, inputs: int, width: int, stride: int, bottleneck: bool, rngs: nnx.Rngs
    ) -> None:
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            self.conv1 = _conv(inputs, width, 1, 1, rngs)
            self.bn1 = BatchNorm(width)
            self.conv2 = _conv(width, width, 3, stride, rngs)
            self.bn2 = BatchNorm(width)
            self.conv3 = _conv(width, outputs, 1, 1, rngs)
            self.bn3 = BatchNorm(outputs)
        else:
            self.conv1 = _conv(inputs, width, 3, stride, rngs)
            self.bn1 = BatchNorm(width)
            self.conv2 = _conv(width, width, 3, 1, rngs)
            self.bn2 = BatchNorm(width)
        self.bottleneck = bottleneck
        changes = stride != 1 or inputs != outputs
        self.downsample = _Shortcut(inputs, outputs, stride, rngs) if changes else None

    def __call__(self, x: Array) -> Array:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(jax.nn.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            x = self.bn3(self.conv3(jax.nn.relu(x)))
        return jax.nn.relu(x + shortcut)


@checked_keywords()
class ResNet(nnx.Module):
    """The first stages of a residual network (He et al., 2016, arXiv 1512.03385).

    The stem is a 3x3 convolution of stride 1, batch norm, ReLU and a 3x3 max pooling of stride
    2; every stage after the first halves the sides.

    Parameters
    ----------
    name
        ``"resnet18-1"``: the depth 18, 34, 50, 101 or 152, and the number of stages 1 to 4.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    def __init__(self, name: str, *, rngs: RngsLike | None = None) -> None:
        rngs = as_rngs(rngs)
        blocks, bottleneck = resnet_stages(name)
        self.conv1 = _conv(3, 64, 3, 1, rngs)
        self.bn1 = BatchNorm(64)
        channels = 64
        self.n_stages = len(blocks)
        for stage, count in enumerate(blocks):
            layers = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(_Block(channels, 64 << stage, stride, bottleneck, rngs))
                channels = (64 << stage) * (4 if bottleneck else 1)
            setattr(self, f"layer{stage + 1}", nnx.List(layers))
        self.out_channels = channels

    def __call__(self, x: Array) -> Array:
        """Map images (B, 3, H, W) to features (B, out_channels, h, w)."""
        x = _max_pool(jax.nn.relu(self.bn1(self.conv1(x))))
        for stage in range(self.n_stages):
            for block in getattr(self, f"layer{stage + 1}"):
                x = block(x)
        return x


def _max_pool(x: Array) -> Array:
    """The maximum of 3x3 windows, two apart."""
    window, strides = (1, 1, 3, 3), (1, 1, 2, 2)
    padding = ((0, 0), (0, 0), (1, 1), (1, 1))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)


@checked_keywords()
class ShallowWide(nnx.Module):
    """Two convolutions of 4096 channels, each with GLU and batch norm; the sides are halved.

    Parameters
    ----------
    in_channels
        Channels of the images.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    torch_names: ClassVar[dict[str, str]] = {
        "conv1": "layers.0",
        "norm1": "layers.2",
        "conv2": "layers.3",
        "norm2": "layers.5",
    }

    def __init__(self, in_channels: int, *, rngs: RngsLike | None = None) -> None:
        rngs = as_rngs(rngs)
        self.conv1 = Conv(in_channels, 4096, 3, 2, 1, sides=2, rngs=rngs)
        self.norm1 = BatchNorm(2048)
        self.conv2 = Conv(2048, 4096, 3, 1, 1, groups=32, sides=2, rngs=rngs)
        self.norm2 = BatchNorm(2048)

    def __call__(self, x: Array) -> Array:
        """Map images (B, in_channels, H, W) to features (B, 2048, ceil(H / 2), ceil(W / 2))."""
        x = self.norm1(jax.nn.glu(self.conv1(x), 1))
        return self.norm2(jax.nn.glu(self.conv2(x), 1))


@checked_keywords()
class ParityBackbone(nnx.Module):
    """An embedding of the signs of a sequence: one vector for 1, another for anything else.

    Parameters
    ----------
    d_embedding
        Width of the vectors.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """

    torch_names: ClassVar[dict[str, str]] = {"embedding": "embedding.weight"}

    def __init__(self, d_embedding: int, *, rngs: RngsLike | None = None) -> None:
        table = jax.random.normal(as_rngs(rngs).params(), (2, d_embedding))
        self.embedding = nnx.Param(table)

    def __call__(self, x: Array) -> Array:
        """Map (B, L) to (B, d_embedding, L)."""
        table = self.embedding[...]
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else table.dtype
        return table.astype(dtype)[(x == 1).astype(int)].mT


def ctm_backbone(name: str, d_input: int, in_channels: int, *, rngs: RngsLike) -> Any:
    """Make the backbone of that name.

    Parameters
    ----------
    name
        ``"resnet18-1"`` and so on (see :class:`ResNet`), ``"shallow-wide"``,
        ``"parity_backbone"`` or ``"none"``.
    d_input
        Width of the embedding of ``"parity_backbone"``.
    in_channels
        Channels of the images that ``"shallow-wide"`` takes.
    rngs
        See :func:`ml_networks.jax.rngs.as_rngs`.
    """
    if name == "none":
        return Identity()
    if name == "parity_backbone":
        return ParityBackbone(d_input, rngs=rngs)
    if name == "shallow-wide":
        return ShallowWide(in_channels, rngs=rngs)
    return ResNet(name, rngs=rngs)
