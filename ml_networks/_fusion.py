"""What folding batch norms did, the same in both frameworks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fusion:
    """What ``fuse_for_inference`` did.

    Attributes
    ----------
    folded
        Names of the batch norms that are now part of a convolution.
    kept
        Name of every other batch norm, and why it stays.
    """

    folded: tuple[str, ...]
    kept: dict[str, str]

    def __str__(self) -> str:
        lines = [f"batch norms: {len(self.folded)} folded, {len(self.kept)} kept"]
        lines += [f"  {name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


PADS_WITH_ZEROS = "it comes before a convolution that pads with zeros"
MIXES_POSITIONS = "a shuffle mixes positions of a channel between the convolution and it"
NO_STATISTICS = "it keeps no running statistics"
