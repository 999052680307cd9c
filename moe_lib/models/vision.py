"""A small vision transformer with mixture-of-experts blocks, and its training task.

Shapes: N images, T = h * w tokens of an image, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lib.models.transformer import (
    Block,
    Embedding,
    Projection,
    RoutedObjective,
    TransformerConfig,
    routing_losses,
    weighted_total,
)
from moe_lib.moe.routing import Routing, joined
from moe_lib.rng import generator, initialise
from moe_lib.snnl import LayerwiseSNNL
from moe_study.data import Dataset, Split, pixels


@dataclass(frozen=True)
class VisionConfig:
    trunk: TransformerConfig = TransformerConfig()
    patch: int = 8  # side of a patch, pixels
    merge_before: tuple[int, ...] = ()  # blocks in front of which 2 x 2 tokens become one of double width

    def __post_init__(self) -> None:
        depth = self.trunk.depth
        if self.trunk.router == "hash-token":
            raise ValueError("router 'hash-token' is for text: an image's tokens have no ids; use 'hash'")
        if any(not 0 <= block < depth for block in self.merge_before):
            raise ValueError(f"merge_before names blocks 0 to {depth - 1}, got {self.merge_before}")


class Output(NamedTuple):
    log_probs_NC: Tensor
    routings: list[Routing]  # one per MoE layer, of N * T tokens or fewer after merging
    activations: dict[str, Tensor]  # "stem": the mean token in front of the first MoE block [N, D]


class PatchMerging(nn.Module):
    """2 x 2 neighbouring tokens become one of double width (Liu et al., "Swin Transformer", 2021)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.project = Projection(4 * dim, 2 * dim)

    def forward(self, x_NTD: Tensor, side: tuple[int, int]) -> Tensor:
        (images, _, dim), (h, w) = x_NTD.shape, side
        x = x_NTD.view(images, h // 2, 2, w // 2, 2, dim).permute(0, 1, 3, 2, 4, 5)
        return self.project(self.norm(x.reshape(images, h * w // 4, 4 * dim)))


class VisionTransformer(nn.Module):
    """Patches -> blocks -> mean token -> classes.

    Each MoE block hands its decision to the next; where tokens are merged, and so the width changes, the
    chain starts anew, as between the stages of the published Swin models.
    """

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
        side = self.side = height // config.patch, width // config.patch
        self.embed = Projection(channels * config.patch**2, dim)
        self.position = Embedding(side[0] * side[1], dim)
        self.merges = nn.ModuleDict()
        self.blocks = nn.ModuleList()
        for index in range(trunk.depth):
            if index in config.merge_before:
                if side[0] % 2 or side[1] % 2:
                    raise ValueError(f"cannot merge 2 x 2 of {side[0]} x {side[1]} tokens at block {index}")
                side = side[0] // 2, side[1] // 2
                self.merges[str(index)] = PatchMerging(dim)
                dim *= 2
            self.blocks.append(Block(dim, trunk, index, side[0] * side[1], causal=False))
        self.norm = nn.LayerNorm(dim)
        self.head = Projection(dim, num_classes)
        self.first_moe_block = min(trunk.moe_blocks)

    def forward(self, images_NCHW: Tensor) -> Output:
        """Images in [0, 1]."""
        # As by F.unfold, which takes ten times as long where patches do not overlap.
        patches = (images_NCHW * 2 - 1).unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))
        patches_NTF = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x_NTD = self.embed(patches_NTF) + self.position.weight
        previous, side, routings, activations = None, self.side, [], {}
        for index, block in enumerate(self.blocks):
            if str(index) in self.merges:
                x_NTD = self.merges[str(index)](x_NTD, side)
                previous, side = None, (side[0] // 2, side[1] // 2)
            if index == self.first_moe_block:
                activations["stem"] = x_NTD.mean(1)
            x_NTD, routing = block(x_NTD, previous)
            if routing is not None:
                previous = routing
                routings.append(routing)
        log_probs_NC = self.head(self.norm(x_NTD.mean(1))).log_softmax(1)
        return Output(log_probs_NC, routings, activations)


Batch = tuple[Tensor, Tensor]


class VisionTask(nn.Module):
    """The model and the two methods that the training loop asks for."""

    def __init__(
        self,
        dataset: Dataset,
        config: VisionConfig,
        objective: RoutedObjective,
        *,
        seed: int,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 (statistics need company), got {batch_size}")
        self.dataset, self.objective = dataset, objective
        self.seed, self.batch_size, self.dtype = seed, batch_size, dtype
        self.num_batches = -(-len(dataset.train) // batch_size)
        channels, height, width = dataset.train.images_NCHW.shape[1:]
        self.model = VisionTransformer(config, (channels, height, width), dataset.num_classes)
        if objective.snnl is not None:
            self.snnl = LayerwiseSNNL(objective.snnl)
        initialise(self, seed)
        self.to(device=dataset.train.images_NCHW.device, dtype=dtype)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The training set in the order of (seed, epoch), ragged last batch included."""
        train = self.dataset.train
        order_N = torch.randperm(len(train), generator=generator(self.seed, "order", epoch))
        for index in order_N.to(train.labels_N.device).split(self.batch_size):
            batch = train.take(index)
            yield pixels(batch.images_NCHW, self.dtype), batch.labels_N

    def losses(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """Unweighted losses by name, and their weighted sum, "total"."""
        images_NCHW, labels_N = batch
        output = self.model(images_NCHW)
        losses = {"cross_entropy": F.nll_loss(output.log_probs_NC, labels_N)}
        losses |= routing_losses(output.routings)
        if self.objective.snnl is not None:
            losses["snnl"] = self.snnl(output.activations, labels_N, epoch)
        return weighted_total(losses, self.objective)

    @torch.no_grad()
    def predict(self, split: Split) -> Output:
        """Outputs on a whole split, in batches of the training size: AC statistics are those of a batch."""
        outputs = [
            self.model(pixels(images_NCHW, self.dtype))
            for images_NCHW in split.images_NCHW.split(self.batch_size)
        ]
        return Output(
            torch.cat([output.log_probs_NC for output in outputs]),
            [joined(layer) for layer in zip(*(output.routings for output in outputs), strict=True)],
            {"stem": torch.cat([output.activations["stem"] for output in outputs])},
        )
