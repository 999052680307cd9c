"""Tiny transformers, texts and images for the tests of models, tasks and measures.

Shapes: B sequences, T positions, N images or tokens, C channels, H height, W width.
"""

from dataclasses import replace

import torch
from torch import nn

from moe_lib.models.language import LanguageConfig, LanguageModel
from moe_lib.models.transformer import Embedding, TransformerConfig
from moe_lib.models.vision import VisionConfig
from moe_lib.moe import route
from moe_lib.rng import initialise
from moe_study.data import Dataset, Split
from moe_study.data.text import Corpus, Text
from moe_study.tasks import LanguageTask, RoutedObjective, VisionTask

SMALL = TransformerConfig(
    dim=6, depth=3, num_heads=2, mlp_hidden=7, moe_blocks=(0, 1, 2), num_experts=4, expert_hidden=5
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(model, seed=0):
    """In float64, with weights that are nowhere at their initial value: norms and biases count too.

    Embeddings are long enough for tokens to choose different experts.
    """
    model.double()
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise)
        for module in model.modules():
            if isinstance(module, Embedding):
                module.weight.mul_(4)
    return model


def language_model(seed=0, num_tokens=9, context=5, **options):
    config = LanguageConfig(replace(SMALL, **options), context=context)
    return shaken(LanguageModel(config, num_tokens), seed)


def read(count=2, length=5, num_tokens=9, seed=0):
    return torch.randint(num_tokens, (count, length), generator=torch.Generator().manual_seed(seed))


class Dropped(nn.Module):
    """A router that never chooses the experts named."""

    def __init__(self, router, experts):
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, tokens_ND, previous=None):
        routing = self.router(tokens_ND, previous)
        return route(routing.logits_NE.index_fill(1, torch.tensor(self.experts), -1e3), self.router.top_k)


def text_of(tokens):
    """Of tokens below 128, which are characters."""
    return Text(torch.tensor(tokens), "".join(map(chr, tokens)))


def corpus_of(train=60, validation=40, test=40, num_tokens=9):
    """Parts of so many random tokens."""
    draw = torch.Generator().manual_seed(0)
    parts = [
        text_of(torch.randint(num_tokens, (n,), generator=draw).tolist()) for n in (train, validation, test)
    ]
    return Corpus("random", *parts, num_tokens)


def language_task(corpus=None, context=4, batch_size=3, seed=5, objective=None, epoch_tokens=None, **options):
    config = LanguageConfig(replace(SMALL, moe_blocks=(1, 2), **options), context=context)
    return LanguageTask(
        corpus or corpus_of(), config, objective or RoutedObjective(),
        seed=seed, batch_size=batch_size, epoch_tokens=epoch_tokens, dtype=torch.float64,
    )  # fmt: skip


def tiny_dataset(num_train=24, num_other=16):
    """Random bytes of class and noise."""
    draw = torch.Generator().manual_seed(0)

    def split(n):
        labels_N = torch.arange(n) % 3
        noise_NCHW = torch.randint(160, (n, 1, 4, 4), generator=draw, dtype=torch.uint8)
        return Split(noise_NCHW + 40 * labels_N[:, None, None, None].to(torch.uint8), labels_N)

    return Dataset("tiny", split(num_train), split(num_other), split(num_other), 3)


def vision_task(objective=None, seed=3, batch_size=8, dataset=None, patch=2, **options):
    trunk = replace(SMALL, **{"moe_blocks": (1, 2)} | options)
    config = VisionConfig(trunk, patch)
    return VisionTask(
        dataset or tiny_dataset(), config, objective or RoutedObjective(),
        seed=seed, batch_size=batch_size, dtype=torch.float64,
    )  # fmt: skip
