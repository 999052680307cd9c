"""Mixtures of experts and the Adaptive Clustering router against their peers: what is compared.

Peers are written down from their formulas and start from our layer's weights:
    loop            a ModuleList of experts; soft: all of them on every row; top-k: sort by expert, then split
    einsum          soft: stacked weights in three einsums; top-k: one-hot dispatch to as many places as the
                    fullest expert needs (Mesh TensorFlow's and lucidrains' form, with nothing dropped)
    Hugging Face    the loop of the Mixtral block: torch.where for each expert, index_add_
    grouped_mm      Hugging Face's grouped form: choices sorted by expert, one product for all experts;
                    rows gathered by indexing, or by index_select, whose gradient is cheaper
    torchtitan      the same with each expert's rows padded to a multiple of 8
    authors         of AC: mean absolute deviations cluster by cluster, under masks
    authors, sums   the same deviations by index_add_
    pairwise        of AC: mean absolute difference of all pairs of a cluster, feature by feature

Every step sees another of `BATCHES` batches, as in training: how many rows choose an expert then changes.

Shapes: N rows, D width, H expert hidden width, O output width, E experts, K chosen, P places an expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import Contestant, Row, Step, Work
from moe_lib.moe import AdaptiveClusteringRouter, LinearRouter, MoE, Routing, route

BATCHES = 8

# ------------------------------------------------------------------------------------------ experts


class Size(NamedTuple):
    N: int
    D: int
    H: int
    O: int  # noqa: E741
    E: int
    K: int


class Peer(nn.Module):
    """Gate and experts with the weights of our layer."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        w1_EDH, b1_EH, w2_EHO, b2_EO = (weight.detach() for weight in layer.experts.stacked())
        assert isinstance(layer.router, LinearRouter)
        self.top_k, self.out_dim = layer.top_k, b2_EO.shape[1]
        self.gate = _linear(layer.router.gate.weight.detach().T, layer.router.gate.bias.detach())
        self.experts = nn.ModuleList(
            nn.Sequential(_linear(w1_DH, b1_H), nn.ReLU(), _linear(w2_HO, b2_O))
            for w1_DH, b1_H, w2_HO, b2_O in zip(w1_EDH, b1_EH, w2_EHO, b2_EO, strict=True)
        )

    def choose(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """[N, K] weights and indices."""
        probs_NE = self.gate(x_ND).to(torch.promote_types(x_ND.dtype, torch.float32)).softmax(1)
        weights_NK, indices_NK = probs_NE.topk(self.top_k, 1)
        return (weights_NK / weights_NK.sum(1, keepdim=True)).to(x_ND.dtype), indices_NK


def _linear(weight_DO: Tensor, bias_O: Tensor) -> nn.Linear:
    layer = nn.Linear(weight_DO.shape[0], weight_DO.shape[1], device=bias_O.device, dtype=bias_O.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight_DO.T)
        layer.bias.copy_(bias_O)
    return layer


class SoftLoop(Peer):
    def forward(self, x_ND: Tensor) -> Tensor:
        weights_NE = self.gate(x_ND).softmax(1)
        outs = [weights_NE[:, e, None] * expert(x_ND) for e, expert in enumerate(self.experts)]
        return sum(outs[1:], outs[0])


class SortedLoop(Peer):
    def forward(self, x_ND: Tensor) -> Tensor:
        weights_NK, indices_NK = self.choose(x_ND)
        order_M = indices_NK.flatten().argsort()
        counts = torch.bincount(indices_NK.flatten(), minlength=len(self.experts)).tolist()
        rows_M = order_M // indices_NK.shape[1]
        parts = x_ND[rows_M].split(counts)
        out_MO = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        out_MO = out_MO * weights_NK.flatten()[order_M, None]
        return out_MO.new_zeros(len(x_ND), out_MO.shape[1]).index_add_(0, rows_M, out_MO)


class HuggingFace(Peer):
    def forward(self, x_ND: Tensor) -> Tensor:
        weights_NK, indices_NK = self.choose(x_ND)
        out_NO = x_ND.new_zeros(len(x_ND), self.out_dim)
        chosen_EKN = F.one_hot(indices_NK, len(self.experts)).permute(2, 1, 0)
        for expert, chosen_KN in zip(self.experts, chosen_EKN, strict=True):
            choice_R, row_R = torch.where(chosen_KN)
            out_NO.index_add_(0, row_R, expert(x_ND[row_R]) * weights_NK[row_R, choice_R, None])
        return out_NO


class Einsum(Peer):
    def __init__(self, layer: MoE) -> None:
        super().__init__(layer)
        del self.experts
        self.weights = nn.ParameterList(weight.detach().clone() for weight in layer.experts.stacked())

    def forward(self, x_ND: Tensor) -> Tensor:
        w1_EDH, b1_EH, w2_EHO, b2_EO = self.weights
        if self.top_k is None:
            hidden_ENH = (torch.einsum("nd,edh->enh", x_ND, w1_EDH) + b1_EH[:, None]).relu()
            out_ENO = torch.einsum("enh,eho->eno", hidden_ENH, w2_EHO) + b2_EO[:, None]
            return torch.einsum("ne,eno->no", self.gate(x_ND).softmax(1), out_ENO)
        weights_NK, indices_NK = self.choose(x_ND)
        chosen_ME = F.one_hot(indices_NK.flatten(), len(b1_EH))
        place_ME = chosen_ME.cumsum(0) - 1
        num_places = int(chosen_ME.sum(0).max())
        place_MEP = (F.one_hot(place_ME.clamp(min=0), num_places) * chosen_ME[..., None]).to(x_ND.dtype)
        place_NKEP = place_MEP.unflatten(0, indices_NK.shape)
        tokens_EPD = torch.einsum("nkep,nd->epd", place_NKEP, x_ND)
        hidden_EPH = (torch.einsum("epd,edh->eph", tokens_EPD, w1_EDH) + b1_EH[:, None]).relu()
        out_EPO = torch.einsum("eph,eho->epo", hidden_EPH, w2_EHO) + b2_EO[:, None]
        combine_NEP = torch.einsum("nk,nkep->nep", weights_NK, place_NKEP)
        return torch.einsum("nep,epo->no", combine_NEP, out_EPO)


class GroupedMM(Einsum):
    multiple = 1  # to which an expert's rows are padded

    def take(self, x_ND: Tensor, row_M: Tensor) -> Tensor:
        return x_ND[row_M]

    def forward(self, x_ND: Tensor) -> Tensor:
        w1_EDH, b1_EH, w2_EHO, b2_EO = self.weights
        weights_NK, indices_NK = self.choose(x_ND)
        num_experts, num_choices = len(b1_EH), indices_NK.numel()
        expert_M, order_M = indices_NK.flatten().sort()
        count_E = torch.histc(expert_M.float(), num_experts, 0, num_experts - 1).int()
        padded_E = (count_E + self.multiple - 1) // self.multiple * self.multiple
        ends_E = padded_E.cumsum(0, dtype=torch.int32)
        row_M = order_M // indices_NK.shape[1]
        place_M = None
        if self.multiple > 1:
            shift_E = (ends_E - padded_E) - (count_E.cumsum(0) - count_E)
            place_M = torch.arange(num_choices, device=x_ND.device) + shift_E[expert_M]
            in_MD = x_ND.new_zeros(num_choices + num_experts * self.multiple, x_ND.shape[1])
            in_MD = in_MD.index_copy(0, place_M, self.take(x_ND, row_M))
            expert_of_M = torch.searchsorted(ends_E, torch.arange(len(in_MD), device=x_ND.device), right=True)
            expert_of_M = expert_of_M.clamp(max=num_experts - 1)
            ends_E = torch.cat([ends_E[:-1], ends_E.new_full((1,), len(in_MD))])
        else:
            in_MD, expert_of_M = self.take(x_ND, row_M), expert_M
        hidden_MH = (F.grouped_mm(in_MD, w1_EDH, offs=ends_E) + self.take(b1_EH, expert_of_M)).relu()
        out_MO = F.grouped_mm(hidden_MH, w2_EHO, offs=ends_E) + self.take(b2_EO, expert_of_M)
        out_MO = out_MO if place_M is None else out_MO[place_M]
        out_MO = out_MO * weights_NK.flatten()[order_M, None]
        return out_MO.new_zeros(len(x_ND), out_MO.shape[1]).index_add_(0, row_M, out_MO)


class GroupedMMSelect(GroupedMM):
    def take(self, x_ND: Tensor, row_M: Tensor) -> Tensor:
        return x_ND.index_select(0, row_M)


class TorchTitan(GroupedMM):
    multiple = 8


class Ours(nn.Module):
    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.layer(x_ND)[0]


def contestants(top_k: int | None) -> dict[str, type[nn.Module]]:
    if top_k is None:
        return {"ours": Ours, "loop": SoftLoop, "einsum": Einsum}
    found = {"ours": Ours, "loop": SortedLoop, "Hugging Face": HuggingFace, "einsum": Einsum}
    if hasattr(F, "grouped_mm"):
        found |= {
            "grouped_mm": GroupedMM,
            "grouped_mm, index_select": GroupedMMSelect,
            "torchtitan": TorchTitan,
        }
    return found


def rows(quick: bool = False) -> list[Row]:
    """Time and memory of value and gradient, by the input and all weights."""
    if quick:
        return [row(Size(40, 16, 16, 5, 4, 4), rounds=3), row(Size(40, 16, 16, 16, 4, 2), rounds=3)]
    layer = Size(2048, 256, 768, 256, 8, 2)
    return [
        row(Size(100, 128, 128, 10, 8, 8), goal_time=1.4),
        row(Size(4096, 128, 128, 10, 8, 8), goal_memory=5, rounds=9),
        *(row(Size(N, 96, 96, 96, 16, 2), goal_time=1) for N in (256, 1024, 2048)),  # as in the core profile
        row(layer, goal_time=1, rounds=9),
        row(layer, torch.bfloat16, goal_time=1.4, rounds=9),
    ]


def row(size: Size, dtype: torch.dtype = torch.float32, **options: Any) -> Row:
    top_k = None if size.K == size.E else size.K
    found = [
        Contestant(name, partial(_build, size, dtype, kind), peer=name != "ours")
        for name, kind in contestants(top_k).items()
        if top_k is None or name != "einsum" or size.N <= 256  # its one-hot tensor grows as N^2: seconds
    ]
    operations = 6.0 * size.N * size.K * size.H * (size.D + size.O)
    work = Work(gemm_bf16=operations) if dtype == torch.bfloat16 else Work(gemm=operations)
    name = f"{'soft' if top_k is None else f'top-{top_k}'} N={size.N} D={size.D} H={size.H} E={size.E}"
    short = str(dtype).removeprefix("torch.")
    name += "" if dtype == torch.float32 else f" {short}"
    return Row(name, size._asdict(), work, tuple(found), dtype=short, **options)


def build_layer(size: Size, dtype: torch.dtype, device: str) -> MoE:
    torch.manual_seed(0)
    layer = MoE(size.D, size.E, size.H, size.O, None if size.K == size.E else size.K)
    with torch.no_grad():
        for bias in (layer.experts.b1_EH, layer.experts.b2_EO):
            bias.normal_(std=0.1)
    return layer.to(device, dtype)


def _build(size: Size, dtype: torch.dtype, kind: type[nn.Module], device: str) -> Step:
    module = kind(build_layer(size, dtype, device))
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randn(size.N, size.D, generator=draw).to(device, dtype) for _ in range(BATCHES)]
    grad_NO = torch.randn(size.N, size.O, generator=draw).to(device, dtype)
    weights = list(module.parameters())
    turn = itertools.cycle(batches)

    def step() -> None:
        x_ND = next(turn).requires_grad_()
        torch.autograd.grad(module(x_ND), [x_ND, *weights], grad_NO)

    for _ in batches:
        step()
    return step


# ------------------------------------------------------------------------------------------- router

Deviation = Callable[[Tensor, Tensor, int], Tensor]  # tokens [N, D], clusters [N], E -> [E, D]


def by_masks(tokens_ND: Tensor, cluster_N: Tensor, num_experts: int) -> Tensor:
    deviations = []
    for k in range(num_experts):
        members_RD = tokens_ND[cluster_N == k]
        deviations.append((members_RD - members_RD.mean(0)).abs().mean(0))
    return torch.stack(deviations)


def by_sums(tokens_ND: Tensor, cluster_N: Tensor, num_experts: int) -> Tensor:
    zeros_ED = tokens_ND.new_zeros(num_experts, tokens_ND.shape[1])
    count_E1 = torch.bincount(cluster_N, minlength=num_experts)[:, None]
    mean_ED = zeros_ED.index_add(0, cluster_N, tokens_ND) / count_E1
    return zeros_ED.index_add(0, cluster_N, (tokens_ND - mean_ED[cluster_N]).abs()) / count_E1


def pairwise(tokens_ND: Tensor, cluster_N: Tensor, num_experts: int) -> Tensor:
    deviations = []
    for k in range(num_experts):
        members_RD = tokens_ND[cluster_N == k]
        deviations.append((members_RD[:, None] - members_RD).abs().mean((0, 1)))
    return torch.stack(deviations)


class AuthorsRouter(nn.Module):
    """Of the language models: W = 1 / (s + 1e-4), at most 10 x its mean, divided by the clusters' mean."""

    def __init__(self, router: AdaptiveClusteringRouter, deviation: Deviation) -> None:
        super().__init__()
        self.embeddings_ED = nn.Parameter(router.embeddings_ED.detach().clone())
        assert router.top_k is not None
        self.top_k, self.deviation = router.top_k, deviation

    def forward(self, tokens_ND: Tensor, previous: Routing) -> Routing:
        cluster_N, num_experts = previous.probs_NE.argmax(1), len(self.embeddings_ED)
        with torch.no_grad():
            weight_ED = 1 / (self.deviation(tokens_ND, cluster_N, num_experts) + 1e-4)
            weight_ED = torch.minimum(weight_ED, 10 * weight_ED.mean())
            weight_ED = weight_ED / weight_ED.mean(0)
        scaled_ND = tokens_ND * weight_ED[cluster_N]
        logits_NE = scaled_ND @ F.normalize(self.embeddings_ED, dim=1).T
        probs_NE = logits_NE.softmax(1)
        weights_NK, indices_NK = probs_NE.topk(self.top_k, 1)
        return Routing(logits_NE, probs_NE, indices_NK, weights_NK / weights_NK.sum(1, keepdim=True))


DEVIATIONS: dict[str, Deviation] = {"authors": by_masks, "authors, sums": by_sums, "pairwise": pairwise}


def router_rows(quick: bool = False) -> list[Row]:
    """Time and memory of statistics, decision, and the gradient of its weights."""
    if quick:
        return [router_row(64, 8, 4, rounds=3)]
    return [
        router_row(2048, 96, 16),  # the transformers of the core profile
        router_row(4096, 256, 16, goal_time=2, goal_memory=1 / 0.6, rounds=9),
    ]


def router_row(num_tokens: int, dim: int, num_experts: int, top_k: int = 2, **options: Any) -> Row:
    def contestant(name: str, deviation: Deviation | None) -> Contestant:
        build = partial(_build_router, num_tokens, dim, num_experts, top_k, deviation)
        return Contestant(name, build, peer=deviation is not None)

    peers = {name: peer for name, peer in DEVIATIONS.items() if name != "pairwise" or num_tokens <= 2048}
    found = [contestant("ours", None), *itertools.starmap(contestant, peers.items())]
    numbers = float(num_tokens * dim)
    # Products: two cluster sums, the scores, two for their gradient. Moved: the tokens, read for the mean,
    # the deviations, the scores and the gradient; the gradient, written.
    work = Work(gemm=5 * 2 * numbers * num_experts, bytes=5 * 4 * numbers)
    sizes = {"N": num_tokens, "D": dim, "E": num_experts, "K": top_k}
    return Row(f"N={num_tokens} D={dim} E={num_experts}", sizes, work, tuple(found), **options)


def _build_router(
    num_tokens: int, dim: int, num_experts: int, top_k: int, deviation: Deviation | None, device: str
) -> Step:
    torch.manual_seed(0)
    router: nn.Module = AdaptiveClusteringRouter(dim, num_experts, top_k)
    if deviation is not None:
        assert isinstance(router, AdaptiveClusteringRouter)
        router = AuthorsRouter(router, deviation)
    router.to(device)
    draw = torch.Generator().manual_seed(1)
    tokens_ND = torch.randn(num_tokens, dim, generator=draw).to(device).requires_grad_()
    previous = route(torch.randn(num_tokens, num_experts, generator=draw).to(device), top_k)
    target_NK = torch.randn(num_tokens, top_k, generator=draw).to(device)

    def step() -> None:
        weights_NK = router(tokens_ND, previous).weights_NK
        torch.autograd.grad(weights_NK, [tokens_ND, *router.parameters()], target_NK)

    return step
