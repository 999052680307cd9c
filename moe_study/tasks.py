"""What is trained: a model, the heads that only training needs, its batches and its losses.

The training loop asks a task for `batches`, `losses` and `num_batches`; see `train.Task`.

Shapes: N samples, C classes (of images also channels), H height, W width, D code width, E experts,
B sequences, T positions (the context), M tokens of a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lib import parallel
from moe_lib.models.classifier import Classifier, ClassifierConfig, ClassifierOutput, jacobs_loss
from moe_lib.models.language import LanguageConfig, LanguageModel
from moe_lib.models.transformer import routing_losses
from moe_lib.models.vision import VisionConfig, VisionOutput, VisionTransformer
from moe_lib.moe import joined, load_balancing_loss
from moe_lib.rng import generator, initialise
from moe_lib.snnl import LayerwiseSNNL, SNNLConfig
from moe_study.data import Dataset, Split, pixels
from moe_study.data.text import Corpus
from moe_study.precision import bfloat16
from moe_study.replay import Replayed

ImageBatch = tuple[Tensor, ...]  # images in [0, 1], labels; what a task adds


def image_batches(split: Split, order_N: Tensor, batch_size: int, dtype: torch.dtype) -> Iterator[ImageBatch]:
    """The split's images in the given order, ragged last batch included."""
    for index in order_N.to(split.labels_N.device).split(batch_size):
        batch = split.take(index)
        yield pixels(batch.images_NCHW, dtype), batch.labels_N


BORDER = 4  # black pixels on each side of an image that is cropped


def drawn_crops(count: int, draw: torch.Generator, border: int = BORDER) -> tuple[Tensor, Tensor]:
    """Where each of N images is cropped, [2, N], and whether it is flipped, [N]."""
    offset_2N = torch.randint(2 * border + 1, (2, count), generator=draw)
    return offset_2N, torch.rand(count, generator=draw) < 0.5


def augmented(images_NCHW: Tensor, offset_2N: Tensor, flip_N: Tensor, border: int = BORDER) -> Tensor:
    """Each image cropped out of itself with a black border, and flipped or not, as `drawn_crops` says."""
    count, _, height, width = images_NCHW.shape
    device = images_NCHW.device
    rows_NH = offset_2N[0, :, None] + torch.arange(height, device=device)
    columns_W = torch.arange(width, device=device)
    columns_NW = offset_2N[1, :, None] + torch.where(flip_N[:, None], columns_W.flip(0), columns_W)
    bordered = F.pad(images_NCHW, (border,) * 4)
    image_N = torch.arange(count, device=device)[:, None, None]
    return bordered[image_N, :, rows_NH[:, :, None], columns_NW[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Objective:
    """What is trained on beside the mixture's own loss."""

    snnl: SNNLConfig | None = None
    shuffled: bool = False  # control: SNNL of labels permuted within the batch, same gradient norm
    balance: float = 0.0  # weight of the load-balancing loss, on top-1 assignments
    auxiliary: float = 0.0  # weight of a linear classifier's cross-entropy on the code
    pretrain: Literal["none", "snnl", "ce"] = "none"  # first half: extractor alone; then it is frozen
    samples_per_class: int = 1  # batches are made of this many images of one class, then of another

    def __post_init__(self) -> None:
        if self.samples_per_class < 1:
            raise ValueError(f"samples_per_class must be at least 1, got {self.samples_per_class}")
        if self.pretrain not in ("none", "snnl", "ce"):
            raise ValueError(f"unknown pretrain {self.pretrain!r}; use 'none', 'snnl' or 'ce'")
        if self.snnl is not None and self.pretrain == "ce":
            raise ValueError("an snnl configuration has no effect with pretrain='ce'")
        if self.shuffled and self.pretrain != "none":
            raise ValueError("shuffled has no effect with pretraining")
        if (self.shuffled or self.pretrain == "snnl") and self.snnl is None:
            raise ValueError("shuffled and pretrain='snnl' have no effect without an snnl configuration")


class ClassifierTask(nn.Module):
    """The model, the heads that only training needs, and the two methods that the loop asks for.

    Args:
        bf16: the extractor's products in bfloat16; gate, experts and losses stay as they are.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: ClassifierConfig,
        objective: Objective,
        *,
        seed: int,
        epochs: int,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 (SNNL compares samples), got {batch_size}")
        if objective.pretrain != "none" and epochs < 2:
            raise ValueError(f"pretraining needs at least 2 epochs, got {epochs}")
        self.dataset, self.objective = dataset, objective
        self.seed, self.batch_size, self.dtype, self.bf16 = seed, batch_size, dtype, bf16
        self.num_batches = -(-len(dataset.train) // batch_size)
        self.pretrain_epochs = 0 if objective.pretrain == "none" else epochs // 2
        channels, height, width = dataset.train.images_NCHW.shape[1:]
        self.model = Classifier(config, (channels, height, width), dataset.num_classes)
        if objective.snnl is not None:
            self.snnl = LayerwiseSNNL(objective.snnl)
        if objective.auxiliary or objective.pretrain == "ce":
            self.head = nn.Linear(self.model.code_dim, dataset.num_classes)
        initialise(self, seed)
        self.to(device=dataset.train.images_NCHW.device, dtype=dtype)
        if config.extractor == "cnn":
            self.to(memory_format=torch.channels_last)

    def batches(self, epoch: int) -> Iterator[ImageBatch]:
        """The training set in the order of (seed, epoch), every image once, ragged last batch included.

        With `shuffled`, a permutation of each batch comes with it.
        """
        train, draw = self.dataset.train, generator(self.seed, "order", epoch)
        order_N = torch.randperm(len(train), generator=draw)
        if self.objective.samples_per_class > 1:
            labels_N = train.labels_N.cpu()[order_N]
            by_class = [order_N[labels_N == label] for label in range(self.dataset.num_classes)]
            groups = [group for own in by_class for group in own.split(self.objective.samples_per_class)]
            order_N = torch.cat([groups[i] for i in torch.randperm(len(groups), generator=draw)])
        batches = image_batches(train, order_N, self.batch_size, self.dtype)
        if not self.objective.shuffled:
            yield from batches
            return
        draw = generator(self.seed, "shuffled labels", epoch)
        sizes = [len(part) for part in order_N.split(self.batch_size)]
        permuted_N = torch.cat([torch.randperm(size, generator=draw) for size in sizes])
        permuted = permuted_N.to(train.labels_N.device).split(self.batch_size)
        for batch, order in zip(batches, permuted, strict=True):
            yield *batch, order

    def encode(self, images_NCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Code [N, D] and the extractor's activations."""
        with bfloat16(images_NCHW.device, self.bf16):
            code_ND, activations = self.model.extractor(images_NCHW)
        return code_ND.to(self.dtype), activations

    def losses(self, batch: ImageBatch, epoch: int) -> dict[str, Tensor]:
        """Unweighted losses by name, and their weighted sum, "total"."""
        images_NCHW, labels_N, *permutation = batch
        objective = self.objective
        if epoch < self.pretrain_epochs:
            return self._pretrain_losses(images_NCHW, labels_N, epoch)
        with torch.set_grad_enabled(self.pretrain_epochs == 0 and torch.is_grad_enabled()):
            code_ND, activations = self.encode(images_NCHW)
        output = self.model.classify(code_ND, activations, self.model.keys(images_NCHW))
        count = len(labels_N)
        losses = {"cross_entropy": parallel.mean(F.nll_loss(output.log_probs_NC, labels_N), count)}
        total = losses["cross_entropy"]
        if self.model.mixture == "jacobs":
            total = losses["jacobs"] = parallel.mean(jacobs_loss(output, labels_N), count)
        if objective.snnl is not None and objective.pretrain == "none":
            losses["snnl"] = self.snnl(activations, labels_N, epoch)
            weighted = objective.snnl.factor * losses["snnl"]
            if objective.shuffled:
                weighted = self._shuffled_snnl(weighted, activations, labels_N[permutation[0]], epoch)
            total = total + weighted
        if objective.balance:
            losses["balance"] = load_balancing_loss(output.routing.top(1))
            total = total + objective.balance * losses["balance"]
        if objective.auxiliary:
            losses["auxiliary"] = parallel.mean(F.cross_entropy(self.head(code_ND), labels_N), count)
            total = total + objective.auxiliary * losses["auxiliary"]
        return losses | {"total": total}

    def _pretrain_losses(self, images_NCHW: Tensor, labels_N: Tensor, epoch: int) -> dict[str, Tensor]:
        code_ND, activations = self.encode(images_NCHW)
        if self.objective.pretrain == "ce":
            loss = parallel.mean(F.cross_entropy(self.head(code_ND), labels_N), len(labels_N))
            return {"auxiliary": loss, "total": loss}
        loss = self.snnl(activations, labels_N, epoch)
        return {"snnl": loss, "total": loss}

    def _shuffled_snnl(
        self, weighted: Tensor, activations: dict[str, Tensor], permuted_N: Tensor, epoch: int
    ) -> Tensor:
        """SNNL of permuted labels, scaled to push on the activations as hard as the real one would."""
        assert self.objective.snnl is not None
        layers = [activations[name] for name in self.objective.snnl.layers]
        shuffled = self.snnl(activations, permuted_N, epoch)

        def push(loss: Tensor) -> Tensor:
            gradients = torch.autograd.grad(loss, layers, retain_graph=True)
            return torch.stack([g.float().norm() for g in gradients]).norm()

        size = push(shuffled)
        return shuffled * (push(weighted) / size.where(size > 0, 1)).detach()

    @torch.no_grad()
    def predict(self, split: Split, batch_size: int = 1000) -> tuple[ClassifierOutput, Tensor]:
        """Outputs on a whole split (without activations), and the codes [N, D]."""
        parts, codes = [], []
        for start in range(0, len(split), batch_size):
            images_NCHW = pixels(split.images_NCHW[start : start + batch_size], self.dtype)
            code_ND, _ = self.encode(images_NCHW)
            parts.append(self.model.classify(code_ND, keys_N=self.model.keys(images_NCHW)))
            codes.append(code_ND)
        output = ClassifierOutput(
            torch.cat([part.log_probs_NC for part in parts]),
            torch.cat([part.expert_logits_NEC for part in parts]),
            joined([part.routing for part in parts]),
            {},
        )
        return output, torch.cat(codes)


@dataclass(frozen=True)
class RoutedObjective:
    """What is trained on beside the cross-entropy; the losses of routing are means over MoE layers."""

    balance: float = 0.01  # weight of the load-balancing loss, on top-k assignments
    snnl: SNNLConfig | None = None  # vision only: on the mean token in front of the first MoE layer


def weighted_total(losses: dict[str, Tensor], objective: RoutedObjective) -> dict[str, Tensor]:
    """The named losses and their weighted sum, "total"."""
    total = losses["cross_entropy"] + objective.balance * losses["balance"]
    if objective.snnl is not None:
        total = total + objective.snnl.factor * losses["snnl"]
    return losses | {"total": total}


class VisionTask(nn.Module):
    """The model and the two methods that the training loop asks for.

    Args:
        augment: train on random crops and flips, see `augmented`.
        bf16: compute under bfloat16 autocast; weights, gates and losses stay as they are.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: VisionConfig,
        objective: RoutedObjective,
        *,
        seed: int,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        augment: bool = False,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 (statistics need company), got {batch_size}")
        self.dataset, self.objective = dataset, objective
        self.seed, self.batch_size, self.dtype, self.augment = seed, batch_size, dtype, augment
        self.num_batches = -(-len(dataset.train) // batch_size)
        channels, height, width = dataset.train.images_NCHW.shape[1:]
        self.model = VisionTransformer(config, (channels, height, width), dataset.num_classes)
        self.model.bf16 = bf16
        if objective.snnl is not None:
            self.snnl = LayerwiseSNNL(objective.snnl)
        initialise(self, seed)
        self.to(device=dataset.train.images_NCHW.device, dtype=dtype)
        if config.stem == "conv":
            self.model.embed.to(memory_format=torch.channels_last)

    def batches(self, epoch: int) -> Iterator[ImageBatch]:
        """The training set in the order of (seed, epoch), ragged last batch included."""
        train = self.dataset.train
        order_N = torch.randperm(len(train), generator=generator(self.seed, "order", epoch))
        batches = image_batches(train, order_N, self.batch_size, self.dtype)
        if not self.augment:
            yield from batches
            return
        drawn = drawn_crops(len(train), generator(self.seed, "augmentation", epoch))
        offset_2N, flip_N = (values.to(train.labels_N.device) for values in drawn)
        crops = zip(offset_2N.split(self.batch_size, 1), flip_N.split(self.batch_size), strict=True)
        for (images_NCHW, labels_N), crop in zip(batches, crops, strict=True):
            yield augmented(images_NCHW, *crop), labels_N

    def losses(self, batch: ImageBatch, epoch: int) -> dict[str, Tensor]:
        """Unweighted losses by name, and their weighted sum, "total"."""
        images_NCHW, labels_N = batch
        output = self.model(images_NCHW)
        loss = F.nll_loss(output.log_probs_NC, labels_N)
        losses = {"cross_entropy": parallel.mean(loss, len(labels_N))}
        losses |= routing_losses(output.routings)
        if self.objective.snnl is not None:
            losses["snnl"] = self.snnl(output.activations, labels_N, epoch)
        return weighted_total(losses, self.objective)

    @torch.no_grad()
    def predict(self, split: Split) -> VisionOutput:
        """Outputs on a whole split, in batches of the training size: AC statistics are those of a batch."""
        outputs = [
            self.model(pixels(images_NCHW, self.dtype))
            for images_NCHW in split.images_NCHW.split(self.batch_size)
        ]
        return VisionOutput(
            torch.cat([output.log_probs_NC for output in outputs]),
            [joined(layer) for layer in zip(*(output.routings for output in outputs), strict=True)],
            {"stem": torch.cat([output.activations["stem"] for output in outputs])},
        )


class LanguageTask(nn.Module):
    """The model and the two methods that the training loop asks for.

    Args:
        batch_size: B, sequences.
        epoch_tokens: an epoch covers this many tokens of the training text (rounded down to whole batches)
            and the next epoch goes on from there, so that a long text still has a curve; None: all of it.
        bf16: compute under bfloat16 autocast; weights, gates and losses stay as they are.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: LanguageConfig,
        objective: RoutedObjective,
        *,
        seed: int,
        batch_size: int,
        epoch_tokens: int | None = None,
        dtype: torch.dtype = torch.float32,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        if objective.snnl is not None:
            raise ValueError("snnl has no effect in a language model: its loss compares labelled samples")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.corpus, self.config, self.objective = corpus, config, objective
        self.seed, self.batch_size = seed, batch_size
        self.num_windows = (len(corpus.train.tokens_N) - 1) // config.context
        for name in ("train", "validation", "test"):
            length = len(getattr(corpus, name).tokens_N)
            if length <= config.context:
                raise ValueError(
                    f"a context of {config.context} needs more than that many tokens, but the {name} part of "
                    f"corpus {corpus.name!r} has {length}: use a longer text or a shorter context"
                )
        windows = self.num_windows if epoch_tokens is None else epoch_tokens // config.context
        self.num_batches = windows // batch_size
        if self.num_batches < 1:
            raise ValueError(
                f"an epoch of {windows} windows of {config.context} tokens does not fill one batch of "
                f"{batch_size}: use a longer text or a smaller batch_size"
            )
        self.model = LanguageModel(config, corpus.num_tokens)
        self.model.bf16 = bf16
        initialise(self, seed)
        self.to(device=corpus.train.tokens_N.device, dtype=dtype)

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """Windows [B, T + 1] of the training text; pass after pass, each in an order of (seed, pass)."""
        tokens_M, context = self.corpus.train.tokens_N, self.config.context
        size, whole = self.num_batches * self.batch_size, self.num_windows
        first, last = epoch * size // whole, ((epoch + 1) * size - 1) // whole
        order_N = torch.cat(
            [
                torch.randperm(whole, generator=generator(self.seed, "order", n))
                for n in range(first, last + 1)
            ]
        )
        begin = epoch * size - first * whole
        start_N = (order_N[begin : begin + size] * context).to(tokens_M.device)
        offset_W = torch.arange(context + 1, device=tokens_M.device)
        for start_B in start_N.split(self.batch_size):
            yield tokens_M[start_B[:, None] + offset_W]

    def losses(self, batch: Tensor, epoch: int) -> dict[str, Tensor]:
        """Unweighted losses by name, and their weighted sum, "total"."""
        output = self.model(batch[:, :-1])
        loss = F.nll_loss(output.log_probs_BTV.flatten(0, 1), batch[:, 1:].flatten())
        losses = {"cross_entropy": parallel.mean(loss, len(batch))}
        return weighted_total(losses | routing_losses(output.routings), self.objective)

    @torch.no_grad()
    def score(self, tokens_M: Tensor) -> tuple[Tensor, Tensor]:
        """Of every token but the first: its negative log-likelihood (nats, float64) and whether it was the
        most probable one, [M - 1] each.

        Windows of `context` tokens overlap by half and only the second half of each (the whole of the first
        window) is scored, so that every token is predicted from at least half a context, and a text that
        was shifted by a few tokens scores alike. Run in batches of the training size.

        Raises:
            ValueError: the text is not longer than the context.
        """
        context = self.config.context
        targets = len(tokens_M) - 1
        if targets < context:
            raise ValueError(f"a text of {len(tokens_M)} tokens is too short for a context of {context}")
        starts = [*range(0, targets - context, max(context // 2, 1)), targets - context]
        ends = torch.tensor(starts) + context
        first_S = torch.cat([ends.new_zeros(1), ends[:-1]])  # of the targets that a window is scored on
        offset_W = torch.arange(context + 1)

        def scores(window_BW: Tensor) -> dict[str, Tensor]:
            log_probs_BTV = self.model(window_BW[:, :-1]).log_probs_BTV
            loss_BT = -log_probs_BTV.gather(2, window_BW[:, 1:, None])[..., 0]
            return {"loss": loss_BT.double(), "right": log_probs_BTV.argmax(2) == window_BW[:, 1:]}

        replayed, parts = Replayed(scores), []
        for part in torch.tensor(starts).split(self.batch_size):
            parts.append(replayed(tokens_M[(part[:, None] + offset_W).to(tokens_M.device)]))
        target_ST = torch.tensor(starts)[:, None] + torch.arange(context)
        scored_ST = (target_ST >= first_S[:, None]).to(tokens_M.device)
        losses_M, right_M = (
            torch.cat([part[name] for part in parts])[scored_ST] for name in ("loss", "right")
        )
        return losses_M, right_M
