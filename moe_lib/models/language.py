"""A small causal transformer with mixture-of-experts blocks.

Shapes: B sequences, T positions (the context), N = B * T tokens, D width, V vocabulary, M tokens of a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from moe_lib.checks import check_count, check_labels, check_tensor
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
class LanguageConfig:
    trunk: TransformerConfig = TransformerConfig(depth=3, moe_blocks=(0, 1, 2))
    context: int = 128

    def __post_init__(self) -> None:
        check_count(self.context, "context")


class LanguageOutput(NamedTuple):
    log_probs_BTV: Tensor  # of each position's next token
    routings: list[Routing]  # one per MoE layer, of B * T tokens


class LanguageModel(nn.Module):
    """Tokens -> blocks -> next tokens. Each MoE block hands its decision to the next."""

    bf16 = False  # set on a model: products in bfloat16; weights, gates and log-probabilities in float32

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

    def forward(self, tokens_BT: Tensor) -> LanguageOutput:
        """At most `context` positions; tokens of any integer type, 0 to V - 1."""
        check_tensor(tokens_BT, "tokens", "B, T")
        length, context = tokens_BT.shape[1], self.position.num_embeddings
        if length > context:
            raise ValueError(f"a sequence of {length} tokens is longer than the context of {context}")
        ids_N = check_labels(tokens_BT.flatten(), tokens_BT.numel(), self.token.num_embeddings, name="tokens")
        tokens_BT = ids_N.view_as(tokens_BT)
        with precision(self.bf16, tokens_BT):
            x_BTD = self.token(tokens_BT) + self.position.weight[:length]
            previous, routings = None, []
            for block in self.blocks:
                x_BTD, routing = block(x_BTD, previous, tokens_BT if self.hashes_ids else None)
                if routing is not None:
                    previous = routing
                    routings.append(routing)
            logits_BTV = at_least_float32(self.head(self.norm(x_BTD)))
            return LanguageOutput(logits_BTV.log_softmax(2), routings)
