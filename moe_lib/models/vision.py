"""A small vision transformer with mixture-of-experts blocks.

Shapes: N images, T = h * w tokens of an image, D width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from moe_lib.checks import check_count, check_option
from moe_lib.models.classifier import check_images
from moe_lib.models.transformer import (
    Block,
    Embedding,
    Projection,
    TransformerConfig,
    precision,
)
from moe_lib.moe import Routing
from moe_lib.products import at_least_float32


@dataclass(frozen=True)
class VisionConfig:
    trunk: TransformerConfig = TransformerConfig()
    patch: int = 8  # side of a patch, pixels
    stem: Literal["patch", "conv"] = "patch"  # what makes a token of a patch: one linear map, or `ConvStem`

    def __post_init__(self) -> None:
        check_option(self.stem, "stem", ("patch", "conv"))
        if self.stem == "conv" and (self.patch < 2 or self.patch & (self.patch - 1)):
            raise ValueError(f"stem 'conv' halves the image: patch must be 2, 4, 8, ..., got {self.patch}")
        if self.trunk.router == "hash-token":
            raise ValueError("router 'hash-token' is for text: an image's tokens have no ids; use 'hash'")


class VisionOutput(NamedTuple):
    log_probs_NC: Tensor
    routings: list[Routing]  # one per MoE layer, of N * T tokens
    activations: dict[str, Tensor]  # "stem": the mean token in front of the first MoE block [N, D]


class PatchStem(Projection):
    """One linear map of each patch."""

    def __init__(self, channels: int, patch: int, dim: int) -> None:
        super().__init__(channels * patch**2, dim)
        self.patch = patch

    def forward(self, images_NCHW: Tensor) -> Tensor:
        # As by F.unfold, which takes ten times as long where patches do not overlap.
        patches = images_NCHW.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))
        return super().forward(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))


class ConvStem(nn.Sequential):
    """3 x 3 convolutions of stride 2 until a patch is one token, each with group norm and ReLU.

    Source: Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021; group norm instead
    of batch norm, so that no image depends on the others of its batch.
    """

    def __init__(self, channels: int, patch: int, dim: int) -> None:
        layers: list[nn.Module] = []
        width = channels
        for step in reversed(range(patch.bit_length() - 1)):
            wider = max(dim >> step, 8)
            layers += [nn.Conv2d(width, wider, 3, 2, 1, bias=False), nn.GroupNorm(1, wider), nn.ReLU()]
            width = wider
        super().__init__(*layers, nn.Conv2d(width, dim, 1), nn.Flatten(2))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return super().forward(images_NCHW).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Patches -> blocks -> mean token -> classes. Each MoE block hands its decision to the next."""

    bf16 = False  # set on a model: products in bfloat16; weights, gates and log-probabilities in float32

    def __init__(self, config: VisionConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        if config.patch < 1 or height % config.patch or width % config.patch:
            raise ValueError(
                f"patch must divide the image, got patch {config.patch}, image {height} x {width}"
            )
        check_count(num_classes, "num_classes", 2)
        self.image_shape = image_shape
        trunk, dim = config.trunk, config.trunk.dim
        num_tokens = (height // config.patch) * (width // config.patch)
        stem = PatchStem if config.stem == "patch" else ConvStem
        self.embed = stem(channels, config.patch, dim)
        self.position = Embedding(num_tokens, dim)
        self.blocks = nn.ModuleList(
            Block(dim, trunk, index, num_tokens, causal=False) for index in range(trunk.depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = Projection(dim, num_classes)
        self.first_moe_block = min(trunk.moe_blocks)

    def forward(self, images_NCHW: Tensor) -> VisionOutput:
        """Images in [0, 1]."""
        check_images(images_NCHW, self.image_shape)
        with precision(self.bf16, images_NCHW):
            x_NTD = self.embed(images_NCHW * 2 - 1) + self.position.weight
            previous, routings, activations = None, [], {}
            for index, block in enumerate(self.blocks):
                if index == self.first_moe_block:
                    activations["stem"] = x_NTD.mean(1)
                x_NTD, routing = block(x_NTD, previous)
                if routing is not None:
                    previous = routing
                    routings.append(routing)
            logits_NC = at_least_float32(self.head(self.norm(x_NTD.mean(1))))
            return VisionOutput(logits_NC.log_softmax(1), routings, activations)
