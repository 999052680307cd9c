"""The Adaptive Clustering (AC) router: it scores h^T M e for a token h and an expert's embedding e, with the
scaling matrix M of the cluster that the MoE layer before put the token in. Source and formula: scaling.py.

Shapes: N tokens, D width, E experts, and so clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from moe_lib.moe.routing import CosineRouter, Routing
from moe_lib.moe.scaling import (
    Dispersion,
    Normalize,
    check_scale_options,
    cluster_dispersion,
    scales_of_dispersion,
)
from moe_lib.products import at_least_float32, traced

NEWEST_STEP = 0.1  # its share in the running averages of the causal form


@dataclass(frozen=True)
class ACConfig:
    """Options and controls of the AC router; the defaults are the paper's, for language models.

    A control changes one thing about M and can be combined with the others:

    - shuffled: clusters use each other's rows, by a permutation that moves all of them, drawn once.
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
    gradient: bool = False  # through M; a second derivative through it is an error of torch's
    shuffled: bool = False
    pooled: bool = False
    matched: bool = False
    causal: bool = False
    mixed: bool = False
    scale_experts: bool = False

    def __post_init__(self) -> None:
        check_scale_options(self.dispersion, self.eps, self.normalize, self.max_ratio)
        if self.pooled and self.normalize == "feature":
            raise ValueError(
                "pooled with normalize='feature' scales nothing: use 'row' here and in its partner"
            )
        if self.pooled and self.shuffled:
            raise ValueError("shuffled has no effect with pooled: all rows are equal")
        if self.pooled and self.mixed:
            raise ValueError("mixed has no effect with pooled: all rows are equal")
        if self.causal and self.gradient:
            raise ValueError("gradient has no effect with causal: its M comes from earlier steps")


class AdaptiveClusteringRouter(CosineRouter):
    """The cosine router on tokens that were scaled by their cluster's tightness: h^T M_k e.

    A token's cluster k is its top-1 expert in the previous MoE layer, which must have the same number
    of experts. M_k is the scaling matrix of that cluster, see `adaptive_scales`. Without a previous decision
    nothing is scaled.

    If every cluster is isotropic (its dispersion the same along all features), "row" scales nothing and the
    router equals `CosineRouter`. Other normalisations leave one positive factor per cluster: the experts
    keep their order, tight clusters get a sharper gate; with one dispersion for all of them, "feature"
    and "global" scale nothing either.

    Statistics of the current batch (the paper's form) let each token see the others, later positions and
    other sequences included, in training and in evaluation. With `causal` they don't: a step uses the
    averages of the steps before it, then, in training mode only, adds its own. A cluster that had no
    step with 2 tokens so far is not scaled. A forward pass that activation checkpointing repeats in the
    backward pass uses the same averages again and counts once, as long as each forward pass is followed by
    its own backward pass.

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
            self.register_buffer("running_ED", at_least_float32(torch.zeros(num_rows, dim)))
            self.register_buffer("seen_E", torch.zeros(num_rows, dtype=torch.bool))

    def reset_parameters(self) -> None:
        super().reset_parameters()  # first, so that the embeddings equal CosineRouter's under one seed
        if self.config.shuffled:
            self.derangement_E.copy_(_derangement(len(self.derangement_E)))
        if self.config.causal:
            self.running_ED.zero_()
            self.seen_E.zero_()

    def forward(self, tokens_ND: Tensor, previous: Routing | None = None) -> Routing:
        return self.route_and_scale(tokens_ND, previous)[0]

    def experts_see(self, tokens_ND: Tensor, previous: Routing | None = None) -> tuple[Routing, Tensor]:
        """The decision, and the tokens: with `scale_experts`, as they are scaled for the decision."""
        if not self.config.scale_experts:
            return self(tokens_ND, previous), tokens_ND
        routing, scaled_ND = self.route_and_scale(tokens_ND, previous)
        return routing, scaled_ND.to(tokens_ND.dtype)

    def route_and_scale(self, tokens_ND: Tensor, previous: Routing | None = None) -> tuple[Routing, Tensor]:
        """The decision, and the scaled tokens M_k h [N, D] behind it, in float32 or better."""
        config, tokens_ND = self.config, self._tokens(tokens_ND)
        if previous is None:
            return super().forward(tokens_ND), tokens_ND
        with torch.autocast(tokens_ND.device.type, enabled=False):
            assignment_N, rows_ED = self._assign(tokens_ND, previous)
            if config.mixed:
                shares_NE = previous.dense_weights().to(rows_ED.dtype)
                total_N1 = shares_NE.sum(1, keepdim=True)  # not 1 where weights were not renormalised
                shares_NE = shares_NE / total_N1.where((total_N1 - 1).abs() > 1e-3, 1)
                scales_ND = (shares_NE if config.gradient else shares_NE.detach()) @ rows_ED
            else:
                scales_ND = rows_ED.index_select(0, assignment_N)
            scaled_ND = tokens_ND * scales_ND
            if config.matched:
                norm_N1 = torch.linalg.vector_norm(scaled_ND, dim=1, keepdim=True)
                target_N1 = torch.linalg.vector_norm(tokens_ND, dim=1, keepdim=True)
                scaled_ND = scaled_ND * (target_N1 / norm_N1.where(norm_N1 > 0, torch.ones_like(norm_N1)))
        return super().forward(scaled_ND), scaled_ND

    def _assign(self, tokens_ND: Tensor, previous: Routing) -> tuple[Tensor, Tensor]:
        """[N] clusters of the tokens, and [E, D] the rows of M."""
        expected, found = (tokens_ND.shape[0], len(self.embeddings_ED)), tuple(previous.probs_NE.shape)
        if found != expected:
            raise ValueError(f"previous must hold a decision [N, E] = {expected}, got {found}")
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
        if not config.causal:
            dispersion_ED, valid_E = self._batch_dispersion(observed_ND, assignment_N)
        elif not self.training:
            dispersion_ED, valid_E = self.running_ED, self.seen_E
        else:
            if not _in_backward():
                before = self.running_ED.clone(), self.seen_E.clone()
                self._count_step(*self._batch_dispersion(observed_ND, assignment_N))
                self._before = before
            dispersion_ED, valid_E = self._before
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
        # A cluster's first valid step is taken whole; a step in which it is not valid changes nothing.
        weight_E = (valid_E & ~self.seen_E) + NEWEST_STEP * (valid_E & self.seen_E)
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


def _in_backward() -> bool:
    """Whether a backward pass is running: then a forward pass is one that checkpointing repeats."""
    return not traced() and torch._C._current_graph_task_id() != -1


def _derangement(num_experts: int) -> Tensor:
    """A random permutation that moves everything: one cycle through all, from torch's current seed."""
    order_E = torch.randperm(num_experts)
    return torch.empty_like(order_E).scatter_(0, order_E, order_E.roll(1))
