"""The feature extractors of the Continuous Thought Machine."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ml_networks._compat import checked_keywords
from ml_networks._geometry import resnet_stages

__all__ = ["ParityBackbone", "ResNet", "ShallowWide", "ctm_backbone"]


def _conv(inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    padding = kernel_size // 2
    return nn.Conv2d(inputs, outputs, kernel_size, stride, padding, bias=False)


class _Block(nn.Module):
    """``ReLU(shortcut(x) + branch(x))``; the branch is conv-norm pairs with ReLU between."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            self.conv1 = _conv(inputs, width, 1)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = _conv(width, width, 3, stride)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = _conv(width, outputs, 1)
            self.bn3 = nn.BatchNorm2d(outputs)
        else:
            self.conv1 = _conv(inputs, width, 3, stride)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = _conv(width, width, 3)
            self.bn2 = nn.BatchNorm2d(width)
        self.bottleneck = bottleneck
        self.downsample = (
            nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.bottleneck:
            x = self.bn3(self.conv3(x.relu()))
        return (x + shortcut).relu()


@checked_keywords()
class ResNet(nn.Module):
    """The first stages of a residual network (He et al., 2016, arXiv 1512.03385).

    The stem is a 3x3 convolution of stride 1, batch norm, ReLU and a 3x3 max pooling of stride
    2; every stage after the first halves the sides.

    Parameters
    ----------
    name
        ``"resnet18-1"``: the depth 18, 34, 50, 101 or 152, and the number of stages 1 to 4.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        blocks, bottleneck = resnet_stages(name)
        self.conv1 = _conv(3, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        self.n_stages = len(blocks)
        for stage, count in enumerate(blocks):
            layers = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(_Block(channels, 64 << stage, stride, bottleneck))
                channels = (64 << stage) * (4 if bottleneck else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.out_channels = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stages(self) -> Iterator[nn.Module]:
        return (getattr(self, f"layer{n + 1}") for n in range(self.n_stages))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features (B, out_channels, h, w)."""
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for stage in self._stages():
            x = stage(x)
        return x


@checked_keywords()
class ShallowWide(nn.Module):
    """Two convolutions of 4096 channels, each with GLU and batch norm; the sides are halved.

    Parameters
    ----------
    in_channels
        Channels of the images.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 4096, 3, 2, 1),
            nn.GLU(1),
            nn.BatchNorm2d(2048),
            nn.Conv2d(2048, 4096, 3, 1, 1, groups=32),
            nn.GLU(1),
            nn.BatchNorm2d(2048),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to features (B, 2048, ceil(H / 2), ceil(W / 2))."""
        features: Tensor = self.layers(x)
        return features


@checked_keywords()
class ParityBackbone(nn.Module):
    """An embedding of the signs of a sequence: one vector for 1, another for anything else.

    Parameters
    ----------
    d_embedding
        Width of the vectors.
    """

    def __init__(self, d_embedding: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, d_embedding)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L) to (B, d_embedding, L)."""
        embedded: Tensor = self.embedding((x == 1).long())
        return embedded.transpose(1, 2)


def ctm_backbone(name: str, d_input: int, in_channels: int) -> nn.Module:
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
    """
    if name == "none":
        return nn.Identity()
    if name == "parity_backbone":
        return ParityBackbone(d_input)
    return ShallowWide(in_channels) if name == "shallow-wide" else ResNet(name)
