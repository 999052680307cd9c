"""Routers, what they return, and the losses on it.

A router is any module `forward(tokens_ND, previous=None) -> Routing`, with the decision of the MoE layer
before it as `previous`. One whose experts are to see something else than the tokens has a second method,
`experts_see(tokens_ND, previous=None) -> (Routing, Tensor)`. Gates run in float32 or better, also under
autocast.

Shapes: N samples or tokens, D width, H gate hidden width, E experts, K experts chosen per token,
R keys of a `HashRouter`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lib import parallel
from moe_lib.checks import check_count, check_floating, check_labels
from moe_lib.products import at_least_float32, on_host


class Routing(NamedTuple):
    """One decision per token. In a soft mixture K = E, in the experts' order, weighted by probability."""

    logits_NE: Tensor
    probs_NE: Tensor  # the full softmax, before any top-k
    indices_NK: Tensor  # chosen experts; after a top-k the best comes first
    weights_NK: Tensor  # what the chosen experts' outputs are multiplied by

    def top(self, k: int, renormalize: bool | None = None) -> Routing:
        """The same decision restricted to the k best experts.

        Args:
            renormalize: divide the weights of the chosen experts by their sum, as Mixtral and Qwen3 do;
                otherwise they are the probabilities themselves, as in OLMoE, Qwen1.5-MoE, Qwen2-MoE and (for
                k = 1) Switch. None: for k > 1. Impossible for k = 1: the only weight would be 1 whatever the
                router says, so the task's loss would not train it.
        """
        check_choice(self.probs_NE.shape[1], k, renormalize)
        indices_NK = _largest(self.probs_NE, k)
        weights_NK = self.probs_NE.gather(1, indices_NK)
        if k > 1 and renormalize is not False:
            weights_NK = weights_NK / weights_NK.sum(1, keepdim=True)
        return self._replace(indices_NK=indices_NK, weights_NK=weights_NK)

    def first_choices(self) -> Tensor:
        """[N]: the most probable expert."""
        return self.probs_NE.max(1).indices  # faster than argmax

    def dense_weights(self) -> Tensor:
        """[N, E]: the weights, zero for experts that were not chosen."""
        return torch.zeros_like(self.probs_NE).scatter(1, self.indices_NK, self.weights_NK)


def route(logits_NE: Tensor, top_k: int | None = None, renormalize: bool | None = None) -> Routing:
    """Softmax over the experts, in float32 or better; `top_k=None` keeps them all.

    `renormalize`: see `Routing.top`. NaN in a token's logits gives NaN in its probabilities, as in torch.
    """
    check_floating(logits_NE, "logits", "N, E", finite=False)
    check_choice(logits_NE.shape[1], top_k, renormalize)
    probs_NE = at_least_float32(logits_NE).softmax(1)
    experts_NE = torch.arange(probs_NE.shape[1], device=probs_NE.device).expand_as(probs_NE)
    routing = Routing(logits_NE, probs_NE, experts_NE, probs_NE)
    return routing if top_k is None else routing.top(top_k, renormalize)


@torch.no_grad()
def _largest(probs_NE: Tensor, k: int) -> Tensor:
    """[N, k] indices, the largest first: on a CPU one or two maxima take a third of topk's time."""
    if k > 2 or not on_host(probs_NE):
        return probs_NE.topk(k, dim=1).indices
    first_N1 = probs_NE.max(1, keepdim=True).indices
    if k == 1:
        return first_N1
    second_N1 = probs_NE.scatter(1, first_N1, -1.0).max(1, keepdim=True).indices
    return torch.cat([first_N1, second_N1], 1)


def joined(routings: Iterable[Routing]) -> Routing:
    """Several decisions, one below the other."""
    return Routing(*(torch.cat(field) for field in zip(*routings, strict=True)))


def load_balancing_loss(routing: Routing) -> Tensor:
    """E * sum_e f_e P_e, with f_e = count_e / (N K) and P_e the mean probability of expert e.

    1 for uniform routing, E for total collapse at K = 1. Source: Fedus, Zoph, Shazeer, "Switch
    Transformers", JMLR 2022, eq. 4. In a soft mixture every f_e is 1/E and the loss is constant:
    pass `routing.top(1)`.
    """
    _check_decisions(routing)
    probs_NE, chosen_M = at_least_float32(routing.probs_NE), routing.indices_NK.flatten()
    num_experts = probs_NE.shape[1]
    one_M = torch.ones_like(chosen_M, dtype=probs_NE.dtype)
    count_E = parallel.total(probs_NE.new_zeros(num_experts).index_add(0, chosen_M, one_M))
    return num_experts * (count_E / count_E.sum() * parallel.mean_of_rows(probs_NE)).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2: keeps the scores small, where float arithmetic is fine.

    Source: Zoph et al., "ST-MoE: Designing Stable and Transferable Sparse Expert Models", 2022, eq. 5.
    """
    _check_decisions(routing)
    return parallel.mean_of_rows(at_least_float32(routing.logits_NE).logsumexp(1).square())


def _check_decisions(routing: Routing) -> None:
    if not len(routing.probs_NE):
        raise ValueError("routing holds no token: a loss on it is a mean over tokens")


def check_choice(num_experts: int, top_k: int | None, renormalize: bool | None = None) -> None:
    check_count(num_experts, "num_experts")
    if top_k is None:
        if renormalize is not None:
            raise ValueError(f"renormalize has no effect without top_k, got {renormalize}")
        return
    check_count(top_k, "top_k")
    if top_k > num_experts:
        raise ValueError(f"top_k must lie between 1 and num_experts = {num_experts}, got {top_k}")
    if renormalize and top_k == 1:
        raise ValueError("renormalize must not be True for top_k = 1: the weight would always be 1")


def check_tokens(tokens_ND: Tensor, dim: int) -> Tensor:
    remedy = ": flatten batch and sequence with .flatten(0, -2)"
    tokens_ND = check_floating(tokens_ND, "tokens", f"N, {dim}", finite=False, remedy=remedy)
    if tokens_ND.shape[1] != dim:
        raise ValueError(f"tokens must have shape [N, {dim}], got {list(tokens_ND.shape)}")
    return tokens_ND


def _precise_linear(layer: nn.Linear, x_ND: Tensor) -> Tensor:
    """In float32 or better, whatever the types of weights and input: in bfloat16 tokens change experts."""
    dtype = torch.promote_types(torch.promote_types(x_ND.dtype, layer.weight.dtype), torch.float32)
    with torch.autocast(x_ND.device.type, enabled=False):
        return F.linear(x_ND.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))


class LinearRouter(nn.Module):
    """Scores are a linear map of the token, with bias."""

    def __init__(self, dim: int, num_experts: int, top_k: int | None = None) -> None:
        super().__init__()
        check_choice(num_experts, top_k)
        self.top_k = top_k
        self.gate = nn.Linear(check_count(dim, "dim"), num_experts)

    def forward(self, tokens_ND: Tensor, previous: Routing | None = None) -> Routing:
        tokens_ND = check_tokens(tokens_ND, self.gate.in_features)
        return route(_precise_linear(self.gate, tokens_ND), self.top_k)


class MLPRouter(nn.Module):
    """Scores from one hidden layer: the gate x-512-E of the authors' MoE example."""

    def __init__(self, dim: int, num_experts: int, hidden_dim: int, top_k: int | None = None) -> None:
        super().__init__()
        check_choice(num_experts, top_k)
        self.top_k = top_k
        hidden_dim = check_count(hidden_dim, "hidden_dim")
        self.gate = nn.Sequential(
            nn.Linear(check_count(dim, "dim"), hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_experts)
        )

    def forward(self, tokens_ND: Tensor, previous: Routing | None = None) -> Routing:
        first, last = self.gate[0], self.gate[2]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        hidden_NH = _precise_linear(first, check_tokens(tokens_ND, first.in_features)).relu()
        return route(_precise_linear(last, hidden_NH), self.top_k)


class UniformRouter(nn.Module):
    """Every expert equally, whatever the token: the control for whether routing matters at all."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        check_choice(num_experts, None)
        self.num_experts = num_experts

    def forward(self, tokens_ND: Tensor, previous: Routing | None = None) -> Routing:
        check_floating(tokens_ND, "tokens", "N, D", finite=False)
        return route(tokens_ND.new_zeros(tokens_ND.shape[0], self.num_experts))


class HashRouter(nn.Module):
    """A fixed random set of experts for every key, with equal weights; it learns nothing.

    A key is what the caller says of a token: its position, or its id. The control for whether learned
    routing pays at all. Source: Roller, Sukhbaatar, Szlam, Weston, "Hash Layers for Large Sparse Models",
    NeurIPS 2021.

    Args:
        num_experts: E.
        num_keys: keys are 0 .. num_keys - 1.
        top_k: experts per key, drawn without replacement.
    """

    experts_RK: Tensor  # R = num_keys
    needs_keys = True  # a model that holds this router must tell it each token's key

    def __init__(self, num_experts: int, num_keys: int, top_k: int = 1) -> None:
        super().__init__()
        check_choice(num_experts, top_k)
        check_count(num_keys, "num_keys")
        self.num_experts, self.num_keys, self.top_k = num_experts, num_keys, top_k
        self.register_buffer("experts_RK", torch.empty(num_keys, top_k, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the experts anew, from torch's current seed."""
        self.experts_RK.copy_(torch.rand(self.num_keys, self.num_experts).argsort(1)[:, : self.top_k])

    def forward(
        self, tokens_ND: Tensor, previous: Routing | None = None, keys_N: Tensor | None = None
    ) -> Routing:
        check_floating(tokens_ND, "tokens", "N, D", finite=False)
        if keys_N is None:
            raise ValueError(
                f"keys must hold one key per token, [{len(tokens_ND)}], for a HashRouter; got None"
            )
        keys_N = check_labels(keys_N, tokens_ND.shape[0], self.num_keys, name="keys", like=tokens_ND)
        indices_NK = self.experts_RK[keys_N]
        dtype = at_least_float32(tokens_ND).dtype
        # exp(-1e4) is exactly 0, so that the softmax is exactly 1 / K for each chosen expert.
        logits_NE = tokens_ND.new_full((tokens_ND.shape[0], self.num_experts), -1e4, dtype=dtype)
        logits_NE = logits_NE.scatter(1, indices_NK, 0.0)
        weights_NK = torch.full_like(indices_NK, 1 / self.top_k, dtype=dtype)
        return Routing(logits_NE, logits_NE.softmax(1), indices_NK, weights_NK)


class CosineRouter(nn.Module):
    """Scores are inner products of the token with unit-norm expert embeddings: the AC router without scaling.

    Tokens are not normalised and there is no bias.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int | None = None) -> None:
        super().__init__()
        check_choice(num_experts, top_k)
        check_count(dim, "dim")
        self.top_k = top_k
        self.embeddings_ED = nn.Parameter(torch.empty(num_experts, dim))
        CosineRouter.reset_parameters(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        drawn_ED = at_least_float32(torch.empty_like(self.embeddings_ED))  # torch draws it in no half type
        self.embeddings_ED.copy_(nn.init.orthogonal_(drawn_ED))

    def forward(self, tokens_ND: Tensor, previous: Routing | None = None) -> Routing:
        tokens_ND = self._tokens(tokens_ND)
        with torch.autocast(tokens_ND.device.type, enabled=False):
            directions_ED = F.normalize(self.embeddings_ED.to(tokens_ND.dtype), dim=1)
            scores_NE = tokens_ND @ directions_ED.T
        return route(scores_NE, self.top_k)

    def _tokens(self, tokens_ND: Tensor) -> Tensor:
        return at_least_float32(check_tokens(tokens_ND, self.embeddings_ED.shape[1]))
