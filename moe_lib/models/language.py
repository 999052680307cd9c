"""A small causal transformer with mixture-of-experts blocks, and its training task.

Shapes: B sequences, T positions (the context), N = B * T tokens, D width, V vocabulary, M tokens of a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

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
from moe_lib.moe.routing import Routing
from moe_lib.rng import generator, initialise
from moe_study.data.text import Corpus


@dataclass(frozen=True)
class LanguageConfig:
    trunk: TransformerConfig = TransformerConfig(depth=3, moe_blocks=(0, 1, 2))
    level: Literal["byte", "word"] = "byte"
    vocabulary_size: int = 10_000  # of "word"
    context: int = 128

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"context must be at least 1, got {self.context}")
        if self.level == "byte" and self.vocabulary_size != 10_000:
            raise ValueError(f"vocabulary_size has no effect with level='byte', got {self.vocabulary_size}")


class Output(NamedTuple):
    log_probs_BTV: Tensor  # of each position's next token
    routings: list[Routing]  # one per MoE layer, of B * T tokens


class LanguageModel(nn.Module):
    """Tokens -> blocks -> next tokens. Each MoE block hands its decision to the next."""

    def __init__(self, config: LanguageConfig, num_tokens: int) -> None:
        super().__init__()
        trunk = config.trunk
        self.token = Embedding(num_tokens, trunk.dim)
        self.position = Embedding(config.context, trunk.dim)
        self.hashes_ids = trunk.router == "hash-token"
        num_keys = num_tokens if self.hashes_ids else config.context
        self.blocks = nn.ModuleList(
            Block(trunk.dim, trunk, index, num_keys, causal=True) for index in range(trunk.depth)
        )
        self.norm = nn.LayerNorm(trunk.dim)
        self.head = Projection(trunk.dim, num_tokens)

    def forward(self, tokens_BT: Tensor) -> Output:
        """At most `context` positions."""
        length, context = tokens_BT.shape[1], self.position.num_embeddings
        if length > context:
            raise ValueError(f"a sequence of {length} tokens is longer than the context of {context}")
        x_BTD = self.token(tokens_BT) + self.position.weight[:length]
        previous, routings = None, []
        for block in self.blocks:
            x_BTD, routing = block(x_BTD, previous, tokens_BT if self.hashes_ids else None)
            if routing is not None:
                previous = routing
                routings.append(routing)
        return Output(self.head(self.norm(x_BTD)).log_softmax(2), routings)


class LanguageTask(nn.Module):
    """The model and the two methods that the training loop asks for.

    Args:
        batch_size: B, sequences.
        epoch_tokens: an epoch covers this many tokens of the training text (rounded down to whole batches)
            and the next epoch goes on from there, so that a long text still has a curve; None: all of it.
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
        initialise(self, seed)
        self.to(device=corpus.train.tokens_N.device, dtype=dtype)

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """Windows [B, T + 1] of the training text; pass after pass, each in an order of (seed, pass)."""
        tokens_M, context = self.corpus.train.tokens_N, self.config.context
        offset_W = torch.arange(context + 1)
        orders: dict[int, Tensor] = {}
        for batch in range(epoch * self.num_batches, (epoch + 1) * self.num_batches):
            windows = []
            for place in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                turn, at = divmod(place, self.num_windows)
                if turn not in orders:
                    orders[turn] = torch.randperm(
                        self.num_windows, generator=generator(self.seed, "order", turn)
                    )
                windows.append(orders[turn][at])
            index_BW = torch.stack(windows)[:, None] * context + offset_W
            yield tokens_M[index_BW.to(tokens_M.device)]

    def losses(self, batch: Tensor, epoch: int) -> dict[str, Tensor]:
        """Unweighted losses by name, and their weighted sum, "total"."""
        output = self.model(batch[:, :-1])
        losses = {"cross_entropy": F.nll_loss(output.log_probs_BTV.flatten(0, 1), batch[:, 1:].flatten())}
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
        losses_M = torch.empty(targets, dtype=torch.float64, device=tokens_M.device)
        right_M = torch.empty(targets, dtype=torch.bool, device=tokens_M.device)
        offset_W = torch.arange(context + 1)
        scored = 0  # targets up to here are done
        for part in torch.tensor(starts).split(self.batch_size):
            window_BW = tokens_M[(part[:, None] + offset_W).to(tokens_M.device)]
            log_probs_BTV = self.model(window_BW[:, :-1]).log_probs_BTV
            loss_BT = -log_probs_BTV.gather(2, window_BW[:, 1:, None])[..., 0]
            right_BT = log_probs_BTV.argmax(2) == window_BW[:, 1:]
            for row, start in enumerate(part.tolist()):
                losses_M[scored : start + context] = loss_BT[row, scored - start :].double()
                right_M[scored : start + context] = right_BT[row, scored - start :]
                scored = start + context
        return losses_M, right_M
