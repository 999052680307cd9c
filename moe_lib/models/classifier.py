"""An image classifier with a mixture of experts on top of a feature extractor, and its training task.

Shapes: N samples, D code width, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lib.moe.experts import MoE
from moe_lib.moe.routing import MLPRouter, Routing, UniformRouter, joined, load_balancing_loss
from moe_lib.rng import generator, initialise
from moe_lib.snnl import LayerwiseSNNL, SNNLConfig
from moe_study.data import Dataset, Split, pixels

Mixture = Literal["logits", "likelihood", "jacobs"]


@dataclass(frozen=True)
class ClassifierConfig:
    extractor: Literal["mlp", "cnn", "none"] = "cnn"  # "none": the MoE sees the pixels
    extractor_hidden: int = 64  # of "mlp"
    code_dim: int | None = 128  # a linear layer behind the extractor; None: no such layer
    num_experts: int = 4
    expert_hidden: int = 512
    gate: Literal["mlp", "uniform"] = "mlp"
    gate_hidden: int = 512
    top_k: int | None = None
    mixture: Mixture = "logits"


class Output(NamedTuple):
    log_probs_NC: Tensor  # the mixture's prediction
    expert_logits_NEC: Tensor
    routing: Routing
    activations: dict[str, Tensor]  # of the extractor, by layer name; empty without one


class Extractor(nn.Module):
    """Named layers, so that a loss can address their activations from the one forward pass."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        activations = {}
        for name, layer in self.layers.items():
            x = activations[name] = layer(x)
        return x.flatten(1), activations


def build_extractor(config: ClassifierConfig, image_shape: tuple[int, int, int]) -> tuple[Extractor, int]:
    """The extractor and the width of its code."""
    channels, height, width = image_shape
    layers: dict[str, nn.Module] = {}
    dim = channels * height * width
    if config.extractor == "mlp":
        layers["hidden"] = nn.Sequential(
            nn.Flatten(), nn.Linear(dim, config.extractor_hidden), nn.ReLU(inplace=True)
        )
        dim = config.extractor_hidden
    elif config.extractor == "cnn":  # the CNN of the authors' public code
        layers["conv1"] = nn.Sequential(
            nn.Conv2d(channels, 64, 8, stride=2, padding=1), nn.ReLU(inplace=True)
        )
        layers["conv2"] = nn.Sequential(nn.Conv2d(64, 128, 6, stride=2, padding=1), nn.ReLU(inplace=True))
        if min(height, width) < 14:
            raise ValueError(f"extractor 'cnn' needs images of 14 x 14 or more, got {height} x {width}")
        height, width = ((((side + 2 - 8) // 2 + 1) + 2 - 6) // 2 + 1 for side in (height, width))
        dim = 128 * height * width
    elif config.extractor != "none":
        raise ValueError(f"unknown extractor {config.extractor!r}; use 'mlp', 'cnn' or 'none'")
    if config.extractor != "none" and config.code_dim is not None:
        layers["code"] = nn.Sequential(nn.Flatten(), nn.Linear(dim, config.code_dim))
        dim = config.code_dim
    return Extractor(layers), dim


class Classifier(nn.Module):
    """Extractor -> gate and experts -> mixture over classes.

    Mixture rules, with gate g, expert logits z and p = softmax(z):
        "logits": softmax(sum_e g_e z_e), cross-entropy;
        "likelihood": sum_e g_e p_e, cross-entropy of it: -log sum_e g_e p_e(y|x);
        "jacobs": predicts with sum_e g_e p_e and trains on -log sum_e g_e exp(-|y - p_e|^2 / 2), y one-hot
            (Jacobs, Jordan, Nowlan, Hinton, "Adaptive Mixtures of Local Experts", 1991, eq. 1.3).
    """

    def __init__(self, config: ClassifierConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        if config.mixture not in ("logits", "likelihood", "jacobs"):
            raise ValueError(f"unknown mixture {config.mixture!r}; use 'logits', 'likelihood' or 'jacobs'")
        if num_classes < 2:
            raise ValueError(f"a classifier needs at least two classes, got {num_classes}")
        self.mixture = config.mixture
        self.extractor, self.code_dim = build_extractor(config, image_shape)
        if config.gate == "uniform":
            router: nn.Module = UniformRouter(config.num_experts)
        elif config.gate == "mlp":
            router = MLPRouter(self.code_dim, config.num_experts, config.gate_hidden)
        else:
            raise ValueError(f"unknown gate {config.gate!r}; use 'mlp' or 'uniform'")
        self.moe = MoE(
            self.code_dim, config.num_experts, config.expert_hidden, num_classes, config.top_k, router
        )

    def forward(self, images_NCHW: Tensor) -> Output:
        """Images in [0, 1]."""
        code_ND, activations = self.extractor(images_NCHW)
        return self.classify(code_ND, activations)

    def classify(self, code_ND: Tensor, activations: dict[str, Tensor] | None = None) -> Output:
        """Gate, experts and mixture on codes that are already there."""
        routing = self.moe.route(code_ND)
        expert_logits_NEC = self.moe.experts(code_ND).to(routing.probs_NE.dtype)
        log_probs_NC = mix(routing.dense_weights(), expert_logits_NEC, self.mixture)
        return Output(log_probs_NC, expert_logits_NEC, routing, activations or {})


def mix(weights_NE: Tensor, expert_logits_NEC: Tensor, mixture: Mixture) -> Tensor:
    """Log-probabilities [N, C] of the mixture."""
    if mixture == "logits":
        return torch.einsum("ne,nec->nc", weights_NE, expert_logits_NEC).log_softmax(1)
    tiny = torch.finfo(weights_NE.dtype).tiny
    return (weights_NE.clamp(min=tiny).log()[..., None] + expert_logits_NEC.log_softmax(2)).logsumexp(1)


def jacobs_loss(output: Output, labels_N: Tensor) -> Tensor:
    """The competitive loss of the "jacobs" mixture; see `Classifier`."""
    target_N1C = F.one_hot(labels_N, output.log_probs_NC.shape[1])[:, None]
    distance_NE = (target_N1C - output.expert_logits_NEC.softmax(2)).square().sum(2)
    tiny = torch.finfo(distance_NE.dtype).tiny
    return -(output.routing.dense_weights().clamp(min=tiny).log() - distance_NE / 2).logsumexp(1).mean()


@dataclass(frozen=True)
class Objective:
    """What is trained on beside the mixture's own loss."""

    snnl: SNNLConfig | None = None
    shuffled: bool = False  # placebo: SNNL of labels permuted within the batch, gradient norm unchanged
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


Batch = tuple[Tensor, Tensor]


class ClassifierTask(nn.Module):
    """The model, the heads that only training needs, and the two methods that the loop asks for.

    Args:
        bf16: run the extractor under bfloat16 autocast; gate, experts and losses stay as they are.
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

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The training set in the order of (seed, epoch), every image once, ragged last batch included."""
        train, draw = self.dataset.train, generator(self.seed, "order", epoch)
        order_N = torch.randperm(len(train), generator=draw)
        if self.objective.samples_per_class > 1:
            labels_N = train.labels_N.cpu()[order_N]
            by_class = [order_N[labels_N == label] for label in range(self.dataset.num_classes)]
            groups = [group for own in by_class for group in own.split(self.objective.samples_per_class)]
            order_N = torch.cat([groups[i] for i in torch.randperm(len(groups), generator=draw)])
        self._shuffle = generator(self.seed, "shuffled labels", epoch)
        for index in order_N.to(train.labels_N.device).split(self.batch_size):
            batch = train.take(index)
            yield pixels(batch.images_NCHW, self.dtype), batch.labels_N

    def encode(self, images_NCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Code [N, D] and the extractor's activations."""
        with torch.autocast(images_NCHW.device.type, torch.bfloat16, enabled=self.bf16):
            code_ND, activations = self.model.extractor(images_NCHW)
        return code_ND.to(self.dtype), activations

    def losses(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """Unweighted losses by name, and their weighted sum, "total"."""
        images_NCHW, labels_N = batch
        objective = self.objective
        if epoch < self.pretrain_epochs:
            return self._pretrain_losses(images_NCHW, labels_N, epoch)
        with torch.set_grad_enabled(self.pretrain_epochs == 0 and torch.is_grad_enabled()):
            code_ND, activations = self.encode(images_NCHW)
        output = self.model.classify(code_ND, activations)
        losses = {"cross_entropy": F.nll_loss(output.log_probs_NC, labels_N)}
        total = losses["cross_entropy"]
        if self.model.mixture == "jacobs":
            total = losses["jacobs"] = jacobs_loss(output, labels_N)
        if objective.snnl is not None and objective.pretrain == "none":
            losses["snnl"] = self.snnl(activations, labels_N, epoch)
            weighted = objective.snnl.factor * losses["snnl"]
            if objective.shuffled:
                weighted = self._placebo(weighted, activations, labels_N, epoch)
            total = total + weighted
        if objective.balance:
            losses["balance"] = load_balancing_loss(output.routing.top(1))
            total = total + objective.balance * losses["balance"]
        if objective.auxiliary:
            losses["auxiliary"] = F.cross_entropy(self.head(code_ND), labels_N)
            total = total + objective.auxiliary * losses["auxiliary"]
        return losses | {"total": total}

    def _pretrain_losses(self, images_NCHW: Tensor, labels_N: Tensor, epoch: int) -> dict[str, Tensor]:
        code_ND, activations = self.encode(images_NCHW)
        if self.objective.pretrain == "ce":
            loss = F.cross_entropy(self.head(code_ND), labels_N)
            return {"auxiliary": loss, "total": loss}
        loss = self.snnl(activations, labels_N, epoch)
        return {"snnl": loss, "total": loss}

    def _placebo(
        self, weighted: Tensor, activations: dict[str, Tensor], labels_N: Tensor, epoch: int
    ) -> Tensor:
        """SNNL of permuted labels, scaled to push on the activations as hard as the real one would."""
        assert self.objective.snnl is not None
        layers = [activations[name] for name in self.objective.snnl.layers]
        order_N = torch.randperm(len(labels_N), generator=self._shuffle).to(labels_N.device)
        placebo = self.snnl(activations, labels_N[order_N], epoch)

        def push(loss: Tensor) -> Tensor:
            gradients = torch.autograd.grad(loss, layers, retain_graph=True)
            return torch.stack([g.float().norm() for g in gradients]).norm()

        size = push(placebo)
        return placebo * (push(weighted) / size.where(size > 0, 1)).detach()

    @torch.no_grad()
    def predict(self, split: Split, batch_size: int = 1000) -> tuple[Output, Tensor]:
        """Outputs on a whole split (without activations), and the codes [N, D]."""
        parts, codes = [], []
        for start in range(0, len(split), batch_size):
            code_ND, _ = self.encode(pixels(split.images_NCHW[start : start + batch_size], self.dtype))
            parts.append(self.model.classify(code_ND))
            codes.append(code_ND)
        routing = joined([part.routing for part in parts])
        log_probs_NC = torch.cat([p.log_probs_NC for p in parts])
        return Output(log_probs_NC, torch.cat([p.expert_logits_NEC for p in parts]), routing, {}), torch.cat(
            codes
        )
