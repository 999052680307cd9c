"""Routers, what they return, and the losses on it.

Shapes: N samples or tokens, D width, H gate hidden width, E experts, K experts chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from moe_lib.moe.adaptive import (
    Dispersion,
    Normalize,
    at_least_float32,
    check_scale_options,
    cluster_dispersion,
    scaled_scores,
    scales_of_dispersion,
)
from moe_lib.moe.adaptive import adaptive_scales as adaptive_scales  # part of this module's interface


class Routing(NamedTuple):
    """One decision per token. In a soft mixture K = E, in the experts' order, weighted by probability."""

    logits_NE: Tensor
    probs_NE: Tensor  # the full softmax, before any top-k
    indices_NK: Tensor  # chosen experts; after a top-k the best comes first
    weights_NK: Tensor  # what the chosen experts' outputs are multiplied by; rows sum to 1

    def top(self, k: int) -> Routing:
        """The same decision restricted to the k best experts, weights renormalised over them."""
        indices_NK = _largest(self.probs_NE, k)
        weights_NK = self.probs_NE.gather(1, indices_NK)
        weights_NK = weights_NK / weights_NK.sum(1, keepdim=True)
        return self._replace(indices_NK=indices_NK, weights_NK=weights_NK)

    def first_choices(self) -> Tensor:
        """[N]: the most probable expert."""
        return self.probs_NE.max(1).indices  # faster than argmax

    def dense_weights(self) -> Tensor:
        """[N, E]: the weights, zero for experts that were not chosen."""
        return torch.zeros_like(self.probs_NE).scatter(1, self.indices_NK, self.weights_NK)

    def losses(self) -> dict[str, Tensor]:
        """The unweighted losses on this decision, by name."""
        return {"balance": load_balancing_loss(self), "router_z": router_z_loss(self)}


def route(logits_NE: Tensor, top_k: int | None = None) -> Routing:
    """Softmax over the experts, in float32 or better; `top_k=None` keeps them all."""
    check_experts(logits_NE.shape[1], top_k)
    probs_NE = at_least_float32(logits_NE).softmax(1)
    experts_NE = torch.arange(probs_NE.shape[1], device=probs_NE.device).expand_as(probs_NE)
    routing = Routing(logits_NE, probs_NE, experts_NE, probs_NE)
    return routing if top_k is None else routing.top(top_k)


@torch.no_grad()
def _largest(probs_NE: Tensor, k: int) -> Tensor:
    """[N, k] indices, the largest first: on a CPU one or two maxima take a third of topk's time."""
    if k > 2 or probs_NE.device.type != "cpu":
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
    num_experts = routing.probs_NE.shape[1]
    share_E = nn.functional.one_hot(routing.indices_NK, num_experts).to(routing.probs_NE.dtype).mean((0, 1))
    return num_experts * (share_E * routing.probs_NE.mean(0)).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2: keeps the scores small, where float arithmetic is fine.

    Source: Zoph et al., "ST-MoE: Designing Stable and Transferable Sparse Expert Models", 2022, eq. 5.
    """
    return at_least_float32(routing.logits_NE).logsumexp(1).square().mean()


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

    def __init__(self, num_experts: int, num_keys: int, top_k: int = 1) -> None:
        super().__init__()
        check_experts(num_experts, top_k)
        if num_keys < 1:
            raise ValueError(f"num_keys must be at least 1, got {num_keys}")
        self.num_experts, self.num_keys, self.top_k = num_experts, num_keys, top_k
        self.register_buffer("experts_RK", torch.empty(num_keys, top_k, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the experts anew, from torch's current seed."""
        self.experts_RK.copy_(torch.rand(self.num_keys, self.num_experts).argsort(1)[:, : self.top_k])

    def forward(
        self, tokens_ND: Tensor, previous: Routing | None = None, keys_N: Tensor | None = None
    ) -> Routing:
        if keys_N is None or keys_N.shape != tokens_ND.shape[:1]:
            found = "none" if keys_N is None else tuple(keys_N.shape)
            raise ValueError(f"a HashRouter needs one key per token, keys_N [{len(tokens_ND)}]; got {found}")
        indices_NK = self.experts_RK[keys_N]
        dtype = at_least_float32(tokens_ND).dtype
        # exp(-1e4) is exactly 0, so that the softmax is exactly 1 / K for each chosen expert.
        logits_NE = tokens_ND.new_full((len(tokens_ND), self.num_experts), -1e4, dtype=dtype)
        logits_NE = logits_NE.scatter(1, indices_NK, 0.0)
        weights_NK = torch.full_like(indices_NK, 1 / self.top_k, dtype=dtype)
        return Routing(logits_NE, logits_NE.softmax(1), indices_NK, weights_NK)


class CosineRouter(nn.Module):
    """Scores are inner products of the token with unit-norm expert embeddings: AC with M = I.

    Tokens are not normalised and there is no bias. Computed in float32 or better, also under autocast.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int | None = None) -> None:
        super().__init__()
        check_experts(num_experts, top_k)
        self.top_k = top_k
        self.embeddings_ED = nn.Parameter(nn.init.orthogonal_(torch.empty(num_experts, dim)))

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.embeddings_ED)

    def forward(self, tokens_ND: Tensor, previous: Routing | None = None) -> Routing:
        tokens_ND = self._check_tokens(tokens_ND)
        with torch.autocast(tokens_ND.device.type, enabled=False):
            return route(tokens_ND @ self._directions(tokens_ND.dtype).T, self.top_k)

    def _directions(self, dtype: torch.dtype) -> Tensor:
        """[E, D]: the embeddings at unit length."""
        return nn.functional.normalize(self.embeddings_ED.to(dtype), dim=1)

    def _check_tokens(self, tokens_ND: Tensor) -> Tensor:
        dim = self.embeddings_ED.shape[1]
        if tokens_ND.ndim != 2 or tokens_ND.shape[1] != dim:
            raise ValueError(f"expected tokens [N, {dim}], got {tuple(tokens_ND.shape)}")
        return at_least_float32(tokens_ND)


@dataclass(frozen=True)
class ACConfig:
    """Options and controls of the AC router; the defaults are the paper's, for language models.

    A control changes one thing about M and can be combined with the others:

    - shuffled: clusters use each other's rows, by a derangement drawn once (placebo).
    - pooled: one row from all tokens, for all clusters: whitening without clustering. "feature" would
      divide that row by itself, so both this arm and its partner take another `normalize`.
    - matched: |M h| is rescaled to |h| token by token: the direction without the gate's sharpness.
    - causal: running averages of the dispersion from earlier training steps, not the batch's own.

    Two options of the published code:

    - mixed: a token's M is the mean of the rows of all clusters that its previous top-k names, by its
      previous weights, not the row of its top-1 cluster alone.
    - scale_experts: the experts see M h too, not only the router (the published Swin models).
    """

    dispersion: Dispersion = "mad"  # this and the next three: see adaptive_scales
    eps: float = 1e-4
    normalize: Normalize = "feature"
    max_ratio: float | None = 10.0
    gradient: bool = False  # through M
    shuffled: bool = False
    pooled: bool = False
    matched: bool = False
    causal: bool = False
    momentum: float | None = None  # causal: share of the newest step in the running averages; None: 0.1
    mixed: bool = False
    scale_experts: bool = False

    def __post_init__(self) -> None:
        check_scale_options(self.dispersion, self.eps, self.normalize, self.max_ratio)
        if self.pooled and self.normalize == "feature":
            raise ValueError("pooled with normalize='feature' is M = I: use 'row' here and in its partner")
        if self.pooled and self.shuffled:
            raise ValueError("shuffled has no effect with pooled: all rows are equal")
        if self.pooled and self.mixed:
            raise ValueError("mixed has no effect with pooled: all rows are equal")
        if self.causal and self.gradient:
            raise ValueError("gradient has no effect with causal: its M comes from earlier steps")
        if self.momentum is not None and not self.causal:
            raise ValueError(f"momentum has no effect without causal, got {self.momentum}")
        if self.momentum is not None and not 0 < self.momentum <= 1:
            raise ValueError(f"momentum must lie in (0, 1], got {self.momentum}")


class AdaptiveClusteringRouter(CosineRouter):
    """The cosine router on tokens that were scaled by their cluster's tightness: h^T M_k e.

    A token's cluster k is its top-1 expert in the previous MoE layer, which must have the same number
    of experts. Without a previous decision M = I. Source and formula: `adaptive_scales`.

    If every cluster is isotropic (its dispersion the same along all features), M under "row" is I and the
    router equals `CosineRouter`. Other normalisations leave one positive factor per cluster: the experts
    keep their order, tight clusters get a sharper gate; with one dispersion for all of them, "feature"
    and "global" give M = I too.

    Statistics of the current batch (the paper's form) let each token see the others, later positions and
    other sequences included, in training and in evaluation. With `causal` they don't: a step uses the
    averages of the steps before it, then, in training mode only, adds its own. A cluster that had no
    step with 2 tokens so far has M = I.

    Args:
        dim: D.
        num_experts: E.
        top_k: as in `route`.
        config: `ACConfig()` if None.
    """

    running_ED: Tensor  # one row if pooled
    seen_E: Tensor
    derangement_E: Tensor
    keep_rows = False  # these two: see `frozen_scales`
    frozen_ED: Tensor | None = None

    def __init__(
        self, dim: int, num_experts: int, top_k: int | None = None, config: ACConfig | None = None
    ) -> None:
        super().__init__(dim, num_experts, top_k)
        self.config = config = ACConfig() if config is None else config
        if config.shuffled:
            if num_experts == 1:
                raise ValueError("shuffled needs at least 2 experts, got 1")
            self.register_buffer("derangement_E", _derangement(num_experts))
        if config.causal:
            num_rows = 1 if config.pooled else num_experts
            self.register_buffer("running_ED", torch.zeros(num_rows, dim))
            self.register_buffer("seen_E", torch.zeros(num_rows, dtype=torch.bool))

    def reset_parameters(self) -> None:
        super().reset_parameters()  # first, so that the embeddings equal CosineRouter's under one seed
        if self.config.shuffled:
            self.derangement_E.copy_(_derangement(len(self.derangement_E)))
        if self.config.causal:
            self.running_ED.zero_()
            self.seen_E.zero_()

    def forward(self, tokens_ND: Tensor, previous: Routing | None = None) -> Routing:
        if previous is None or self.config.mixed or self.config.matched:
            return self.route_and_scale(tokens_ND, previous)[0]
        tokens_ND = self._check_tokens(tokens_ND)
        with torch.autocast(tokens_ND.device.type, enabled=False):
            assignment_N, rows_ED = self._assign(tokens_ND, previous)
            directions_ED = self._directions(tokens_ND.dtype)
            return route(scaled_scores(tokens_ND, assignment_N, rows_ED, directions_ED), self.top_k)

    def route_and_scale(self, tokens_ND: Tensor, previous: Routing | None = None) -> tuple[Routing, Tensor]:
        """The decision, and the scaled tokens M_k h [N, D] behind it, in float32 or better.

        In the paper's Swin form these are the experts' input too.
        """
        tokens_ND = self._check_tokens(tokens_ND)
        if previous is None:
            return super().forward(tokens_ND), tokens_ND
        with torch.autocast(tokens_ND.device.type, enabled=False):
            assignment_N, rows_ED = self._assign(tokens_ND, previous)
            if self.config.mixed:
                shares_NE = previous.dense_weights().to(rows_ED.dtype)
                scales_ND = (shares_NE if self.config.gradient else shares_NE.detach()) @ rows_ED
            else:
                scales_ND = rows_ED.index_select(0, assignment_N)
            scaled_ND = tokens_ND * scales_ND
            if self.config.matched:
                norm_N1 = torch.linalg.vector_norm(scaled_ND, dim=1, keepdim=True)
                target_N1 = torch.linalg.vector_norm(tokens_ND, dim=1, keepdim=True)
                scaled_ND = scaled_ND * (target_N1 / norm_N1.where(norm_N1 > 0, torch.ones_like(norm_N1)))
        return super().forward(scaled_ND), scaled_ND

    def _assign(self, tokens_ND: Tensor, previous: Routing) -> tuple[Tensor, Tensor]:
        """[N] clusters of the tokens, and [E, D] the rows of M."""
        expected = len(tokens_ND), len(self.embeddings_ED)
        if previous.probs_NE.shape != expected:
            raise ValueError(
                f"expected a previous decision [N, E] = {expected}, got {tuple(previous.probs_NE.shape)}"
            )
        assignment_N = previous.first_choices()
        rows_ED = self._rows(tokens_ND, assignment_N) if self.frozen_ED is None else self.frozen_ED
        if self.keep_rows:
            self.frozen_ED = rows_ED.detach()
        return assignment_N, rows_ED

    def _rows(self, tokens_ND: Tensor, assignment_N: Tensor) -> Tensor:
        """[E, D]: the rows of M that the clusters use in this step."""
        config = self.config
        num_experts = len(self.embeddings_ED)
        observed_ND = tokens_ND if config.gradient else tokens_ND.detach()
        if config.causal:
            dispersion_ED, valid_E = self.running_ED.clone(), self.seen_E.clone()
            if self.training:
                self._count_step(*self._batch_dispersion(observed_ND, assignment_N))
        else:
            dispersion_ED, valid_E = self._batch_dispersion(observed_ND, assignment_N)
        rows_ED = scales_of_dispersion(
            dispersion_ED, valid_E, config.eps, config.normalize, config.max_ratio
        ).expand(num_experts, -1)
        return rows_ED.index_select(0, self.derangement_E) if config.shuffled else rows_ED

    def _batch_dispersion(self, tokens_ND: Tensor, assignment_N: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.pooled:
            return cluster_dispersion(tokens_ND, torch.zeros_like(assignment_N), 1, self.config.dispersion)
        return cluster_dispersion(tokens_ND, assignment_N, len(self.embeddings_ED), self.config.dispersion)

    @torch.no_grad()
    def _count_step(self, dispersion_ED: Tensor, valid_E: Tensor) -> None:
        momentum = 0.1 if self.config.momentum is None else self.config.momentum
        # A cluster's first valid step is taken whole; a step in which it is not valid changes nothing.
        weight_E = (valid_E & ~self.seen_E) + momentum * (valid_E & self.seen_E)
        self.running_ED.lerp_(dispersion_ED.to(self.running_ED.dtype), weight_E[:, None].to(self.running_ED))
        self.seen_E |= valid_E

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keeps the running averages in float32 or better, whatever the weights are cast to."""
        if not self.config.causal:
            return super()._apply(fn, recurse)
        before_ED = self.running_ED
        super()._apply(fn, recurse)
        if self.running_ED.dtype.itemsize < 4:
            self.running_ED = before_ED.to(at_least_float32(self.running_ED))
        return self


def adaptive_routers(model: nn.Module) -> list[AdaptiveClusteringRouter]:
    return [module for module in model.modules() if isinstance(module, AdaptiveClusteringRouter)]


@contextmanager
def gradient_through_scales(model: nn.Module) -> Iterator[None]:
    """Differentiate through the batch statistics of every AC router, for attacks that must not be masked.

    A causal router stays as it is: its M does not depend on the batch.
    """
    routers = [router for router in adaptive_routers(model) if not router.config.causal]
    before = [router.config for router in routers]
    try:
        for router in routers:
            router.config = replace(router.config, gradient=True)
        yield
    finally:
        for router, config in zip(routers, before, strict=True):
            router.config = config


@contextmanager
def frozen_scales(model: nn.Module, forward: Callable[[], object]) -> Iterator[None]:
    """Hold the M of every AC router at its value in `forward()`, one call of the model on clean data.

    The model must be in evaluation mode, or a causal router would count the clean data as a step.
    """
    routers = adaptive_routers(model)
    try:
        for router in routers:
            router.keep_rows = True
        with torch.no_grad():
            forward()
        yield
    finally:
        for router in routers:
            router.keep_rows, router.frozen_ED = False, None


def _derangement(num_experts: int) -> Tensor:
    """A random permutation that moves everything: one cycle through all, from torch's current seed."""
    order_E = torch.randperm(num_experts)
    return torch.empty_like(order_E).scatter_(0, order_E, order_E.roll(1))
