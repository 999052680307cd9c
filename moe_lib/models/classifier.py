"""An image classifier with a mixture of experts on top of a feature extractor.

Shapes: N samples, D code width, E experts, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lib.checks import check_count, check_floating, check_labels, check_option
from moe_lib.moe import HashRouter, MLPRouter, MoE, Routing, UniformRouter

Mixture = Literal["logits", "likelihood", "jacobs"]
HASH_KEYS = 4096  # of images, under gate "hash"


@dataclass(frozen=True)
class ClassifierConfig:
    extractor: Literal["mlp", "cnn", "none"] = "cnn"  # "none": the MoE sees the pixels
    extractor_hidden: int = 64  # of "mlp"
    code_dim: int | None = 128  # a linear layer behind the extractor; None: no such layer
    num_experts: int = 4
    expert_hidden: int = 512
    gate: Literal["mlp", "uniform", "hash"] = "mlp"  # "hash": `top_k` fixed random experts per image
    gate_hidden: int = 512
    top_k: int | None = None
    mixture: Mixture = "logits"


class ClassifierOutput(NamedTuple):
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
        check_count(config.extractor_hidden, "extractor_hidden")
        layers["hidden"] = nn.Sequential(
            nn.Flatten(), nn.Linear(dim, config.extractor_hidden), nn.ReLU(inplace=True)
        )
        dim = config.extractor_hidden
    elif config.extractor == "cnn":  # the CNN of the authors' earlier code, pt-snnl
        layers["conv1"] = nn.Sequential(
            nn.Conv2d(channels, 64, 8, stride=2, padding=1), nn.ReLU(inplace=True)
        )
        layers["conv2"] = nn.Sequential(nn.Conv2d(64, 128, 6, stride=2, padding=1), nn.ReLU(inplace=True))
        if min(height, width) < 14:
            raise ValueError(f"extractor 'cnn' needs images of 14 x 14 or more, got {height} x {width}")
        height, width = ((((side + 2 - 8) // 2 + 1) + 2 - 6) // 2 + 1 for side in (height, width))
        dim = 128 * height * width
    else:
        check_option(config.extractor, "extractor", ("mlp", "cnn", "none"))
    if config.extractor != "none" and config.code_dim is not None:
        check_count(config.code_dim, "code_dim")
        layers["code"] = nn.Sequential(nn.Flatten(), nn.Linear(dim, config.code_dim))
        dim = config.code_dim
    return Extractor(layers), dim


def check_images(images_NCHW: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError for images of another shape or type than the model was built for."""
    check_floating(images_NCHW, "images", "N, C, H, W", finite=False)
    if images_NCHW.shape[1:] != torch.Size(image_shape):
        raise ValueError(f"images must have shape [N, {image_shape}], got {list(images_NCHW.shape)}")


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
        check_option(config.mixture, "mixture", get_args(Mixture))
        check_option(config.gate, "gate", ("mlp", "uniform", "hash"))
        check_count(num_classes, "num_classes", 2)
        if config.gate == "mlp" and config.top_k == 1 and config.mixture == "likelihood":
            raise ValueError(
                "mixture 'likelihood' needs top_k of 2 or more, or None, got 1: the weight of one expert is "
                "always 1, so the gate would not be trained"
            )
        self.mixture, self.hashed, self.image_shape = config.mixture, config.gate == "hash", image_shape
        self.extractor, self.code_dim = build_extractor(config, image_shape)
        if config.gate == "uniform":
            router: nn.Module = UniformRouter(config.num_experts)
        elif config.gate == "mlp":
            router = MLPRouter(self.code_dim, config.num_experts, config.gate_hidden)
        else:
            if config.top_k is None:
                raise ValueError("gate 'hash' needs top_k, the number of experts per image, got None")
            router = HashRouter(config.num_experts, HASH_KEYS, config.top_k)
        self.moe = MoE(
            self.code_dim, config.num_experts, config.expert_hidden, num_classes, config.top_k, router
        )

    def forward(self, images_NCHW: Tensor) -> ClassifierOutput:
        """Images in [0, 1]."""
        check_images(images_NCHW, self.image_shape)
        code_ND, activations = self.extractor(images_NCHW)
        return self.classify(code_ND, activations, self.keys(images_NCHW))

    def keys(self, images_NCHW: Tensor) -> Tensor | None:
        """What gate "hash" looks up, [N]: the sum of an image's 8-bit intensities, modulo `HASH_KEYS`."""
        if not self.hashed:
            return None
        return (images_NCHW * 255).round().long().flatten(1).sum(1) % HASH_KEYS

    def classify(
        self, code_ND: Tensor, activations: dict[str, Tensor] | None = None, keys_N: Tensor | None = None
    ) -> ClassifierOutput:
        """Gate, experts and mixture on codes that are already there; `keys_N` as from `keys`."""
        routing = self.moe.route(code_ND, keys_N=keys_N)
        expert_logits_NEC = self.moe.experts(code_ND).to(routing.probs_NE.dtype)
        weights_NE = routing.dense_weights()
        if self.moe.top_k == 1 and self.mixture != "logits":  # a weight below 1 would lose probability
            weights_NE = weights_NE / weights_NE.sum(1, keepdim=True)
        log_probs_NC = mix(weights_NE, expert_logits_NEC, self.mixture)
        return ClassifierOutput(log_probs_NC, expert_logits_NEC, routing, activations or {})


def mix(weights_NE: Tensor, expert_logits_NEC: Tensor, mixture: Mixture) -> Tensor:
    """Log-probabilities [N, C] of the mixture."""
    check_option(mixture, "mixture", get_args(Mixture))
    if mixture == "logits":
        return torch.einsum("ne,nec->nc", weights_NE, expert_logits_NEC).log_softmax(1)
    tiny = torch.finfo(weights_NE.dtype).tiny
    return (weights_NE.clamp(min=tiny).log()[..., None] + expert_logits_NEC.log_softmax(2)).logsumexp(1)


def jacobs_loss(output: ClassifierOutput, labels_N: Tensor) -> Tensor:
    """The competitive loss of the "jacobs" mixture; see `Classifier`."""
    labels_N = check_labels(labels_N, *output.log_probs_NC.shape)
    target_N1C = F.one_hot(labels_N, output.log_probs_NC.shape[1])[:, None]
    distance_NE = (target_N1C - output.expert_logits_NEC.softmax(2)).square().sum(2)
    tiny = torch.finfo(distance_NE.dtype).tiny
    return -(output.routing.dense_weights().clamp(min=tiny).log() - distance_NE / 2).logsumexp(1).mean()
