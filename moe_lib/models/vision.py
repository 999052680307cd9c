"""A small vision transformer with mixture-of-experts blocks.

Shapes: N images, T = h * w tokens of an image, D width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from moe_lib.models.transformer import (
    Block,
    Embedding,
    Projection,
    TransformerConfig,
)
from moe_lib.moe.routing import Routing


@dataclass(frozen=True)
class VisionConfig:
    trunk: TransformerConfig = TransformerConfig()
    patch: int = 8  # side of a patch, pixels

    def __post_init__(self) -> None:
        if self.trunk.router == "hash-token":
            raise ValueError("router 'hash-token' is for text: an image's tokens have no ids; use 'hash'")


class VisionOutput(NamedTuple):
    log_probs_NC: Tensor
    routings: list[Routing]  # one per MoE layer, of N * T tokens
    activations: dict[str, Tensor]  # "stem": the mean token in front of the first MoE block [N, D]


class VisionTransformer(nn.Module):
    """Patches -> blocks -> mean token -> classes. Each MoE block hands its decision to the next."""

    def __init__(self, config: VisionConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.patch = config.patch
        if config.patch < 1 or height % config.patch or width % config.patch:
            raise ValueError(
                f"patch must divide the image, got patch {config.patch}, image {height} x {width}"
            )
        if num_classes < 2:
            raise ValueError(f"a classifier needs at least two classes, got {num_classes}")
        trunk, dim = config.trunk, config.trunk.dim
        num_tokens = (height // config.patch) * (width // config.patch)
        self.embed = Projection(channels * config.patch**2, dim)
        self.position = Embedding(num_tokens, dim)
        self.blocks = nn.ModuleList(
            Block(dim, trunk, index, num_tokens, causal=False) for index in range(trunk.depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = Projection(dim, num_classes)
        self.first_moe_block = min(trunk.moe_blocks)

    def forward(self, images_NCHW: Tensor) -> VisionOutput:
        """Images in [0, 1]."""
        # As by F.unfold, which takes ten times as long where patches do not overlap.
        patches = (images_NCHW * 2 - 1).unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))
        patches_NTF = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x_NTD = self.embed(patches_NTF) + self.position.weight
        previous, routings, activations = None, [], {}
        for index, block in enumerate(self.blocks):
            if index == self.first_moe_block:
                activations["stem"] = x_NTD.mean(1)
            x_NTD, routing = block(x_NTD, previous)
            if routing is not None:
                previous = routing
                routings.append(routing)
        log_probs_NC = self.head(self.norm(x_NTD.mean(1))).log_softmax(1)
        return VisionOutput(log_probs_NC, routings, activations)
