"""Routers, what they return, and the losses on it.

Shapes: N samples or tokens, D width, H gate hidden width, E experts, K experts chosen per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Routing(NamedTuple):
    """One decision per token. In a soft mixture K = E, in the experts' order, weighted by probability."""

    logits_NE: Tensor
    probs_NE: Tensor  # the full softmax, before any top-k
    indices_NK: Tensor  # chosen experts; after a top-k the best comes first
    weights_NK: Tensor  # what the chosen experts' outputs are multiplied by; rows sum to 1

    def top(self, k: int) -> Routing:
        """The same decision restricted to the k best experts, weights renormalised over them."""
        weights_NK, indices_NK = self.probs_NE.topk(k, dim=1)
        weights_NK = weights_NK / weights_NK.sum(1, keepdim=True)
        return self._replace(indices_NK=indices_NK, weights_NK=weights_NK)

    def dense_weights(self) -> Tensor:
        """[N, E]: the weights, zero for experts that were not chosen."""
        return torch.zeros_like(self.probs_NE).scatter(1, self.indices_NK, self.weights_NK)


def route(logits_NE: Tensor, top_k: int | None = None) -> Routing:
    """Softmax over the experts, in float32 or better; `top_k=None` keeps them all."""
    probs_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32)).softmax(1)
    experts_NE = torch.arange(probs_NE.shape[1], device=probs_NE.device).expand_as(probs_NE)
    routing = Routing(logits_NE, probs_NE, experts_NE, probs_NE)
    return routing if top_k is None else routing.top(top_k)


def load_balancing_loss(routing: Routing) -> Tensor:
    """E * sum_e f_e P_e, with f_e = count_e / (N K) and P_e the mean probability of expert e.

    1 for uniform routing, E for total collapse at K = 1. Source: Fedus, Zoph, Shazeer, "Switch
    Transformers", JMLR 2022, eq. 4. In a soft mixture every f_e is 1/E and the loss is constant:
    pass `routing.top(1)`.
    """
    num_experts = routing.probs_NE.shape[1]
    share_E = nn.functional.one_hot(routing.indices_NK, num_experts).to(routing.probs_NE.dtype).mean((0, 1))
    return num_experts * (share_E * routing.probs_NE.mean(0)).sum()


def check_experts(num_experts: int, top_k: int | None) -> None:
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if top_k is not None and not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must lie between 1 and num_experts = {num_experts}, got {top_k}")


class LinearRouter(nn.Module):
    """Scores are a linear map of the token, with bias."""

    def __init__(self, dim: int, num_experts: int, top_k: int | None = None) -> None:
        super().__init__()
        check_experts(num_experts, top_k)
        self.top_k = top_k
        self.gate = nn.Linear(dim, num_experts)

    def forward(self, tokens_ND: Tensor, previous: Routing | None = None) -> Routing:
        return route(self.gate(tokens_ND), self.top_k)


class MLPRouter(nn.Module):
    """Scores from one hidden layer: the gate x-512-E of the authors' MoE example."""

    def __init__(self, dim: int, num_experts: int, hidden_dim: int, top_k: int | None = None) -> None:
        super().__init__()
        check_experts(num_experts, top_k)
        self.top_k = top_k
        self.gate = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_experts))

    def forward(self, tokens_ND: Tensor, previous: Routing | None = None) -> Routing:
        return route(self.gate(tokens_ND), self.top_k)


class UniformRouter(nn.Module):
    """Every expert equally, whatever the token: the control for whether routing matters at all."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        check_experts(num_experts, None)
        self.num_experts = num_experts

    def forward(self, tokens_ND: Tensor, previous: Routing | None = None) -> Routing:
        return route(tokens_ND.new_zeros(len(tokens_ND), self.num_experts))
