"""Streaming statistics of one block: a few tables, whatever the number of tokens.

Shapes: N tokens, D width, E experts, K slots per token, C classes, M tokens kept, B sequences, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lib.inspect.adapters import Dispatch

KEPT = 16384  # tokens kept per block, by position: the same ones in every model that reads the same data
MAX_WIDTH = 512  # features of a token used for `input separation`
DENSE_TABLE = 1 << 20  # entries; a larger class table is kept sparse


@dataclass
class Place:
    """Where the tokens of one call stand: all [N], or None where it is not known."""

    sequences: tuple[int, int] | None = None  # (B, T), N = B * T, sequence after sequence
    valid_N: Tensor | None = None  # False: padding
    labels_N: Tensor | None = None  # below 0: not counted by class
    position_N: Tensor | None = None  # in the whole stream
    priority_N: Tensor | None = None  # uniform; the smallest are kept


def _sum(index: Tensor, weight: Tensor, size: int) -> Tensor:
    total = torch.zeros(size, dtype=torch.float64, device=index.device)
    return total.index_add_(0, index.flatten(), weight.flatten().to(torch.float64))


SUMS = (  # over tokens, unless said otherwise
    "tokens", "padding", "dropped", "slots", "entropy",
    "pairs", "overlap", "first_same",  # over neighbouring tokens
    "scored", "followed", "score_entropy",  # where the router's scores were seen
    "squares",  # of the inputs sampled
)  # fmt: skip
BY_EXPERT = ("first_E", "weight_E", "score_E", "count_all_E", "score_all_E", "twice_E", "read_E")


class BlockState:
    """Tables of one block; those of other ranks are added with `merge`."""

    tokens: Tensor
    padding: Tensor
    dropped: Tensor
    slots: Tensor  # filled
    entropy: Tensor  # of a token's weights
    pairs: Tensor
    overlap: Tensor
    first_same: Tensor
    scored: Tensor  # filled slots of tokens with scores
    followed: Tensor  # those among the K best scores
    score_entropy: Tensor
    squares: Tensor
    first_E: Tensor  # tokens whose largest weight is this expert's
    weight_E: Tensor  # weights, normalised token by token
    score_E: Tensor  # softmax of the scores
    count_all_E: Tensor  # slots, padding included
    score_all_E: Tensor  # softmax of the scores, padding included
    twice_E: Tensor  # softmax applied twice
    read_E: Tensor  # tokens sampled by first choice
    together_EE: Tensor  # tokens that both experts serve

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.num_slots = 0  # K, the most that a token had
        for name in SUMS:
            setattr(self, name, torch.zeros((), dtype=torch.float64))
        for name in BY_EXPERT:
            setattr(self, name, torch.zeros(num_experts, dtype=torch.float64))
        self.together_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        self.inputs_ED: Tensor | None = None
        self.class_key = torch.zeros(0, dtype=torch.long)  # class * E + expert
        self.class_count = torch.zeros(0, dtype=torch.float64)
        self.pending: list[Tensor] = []
        self.kept_M = torch.zeros(0, dtype=torch.float64)  # priorities
        self.kept_position_M = torch.zeros(0, dtype=torch.long)
        self.kept_label_M = torch.zeros(0, dtype=torch.long)
        self.kept_MK = torch.zeros(0, 0, dtype=torch.int16)

    @property
    def count_E(self) -> Tensor:
        return self.together_EE.diagonal()

    def _add(self, name: str, value: Tensor) -> None:
        held = getattr(self, name)
        setattr(self, name, held.to(value.device) + value if held.device != value.device else held + value)

    @torch.no_grad()
    def update(self, seen: Dispatch, place: Place) -> None:
        indices_NK, size_NK = seen.indices_NK, seen.weights_NK.abs().float()
        num_experts = self.num_experts
        chosen_NK = indices_NK >= 0
        incidence_NE = torch.zeros(len(indices_NK), num_experts + 1, device=indices_NK.device)
        incidence_NE.scatter_(1, indices_NK.where(chosen_NK, num_experts), 1.0)
        incidence_NE = incidence_NE[:, :num_experts]
        first_N = indices_NK.gather(1, size_NK.argmax(1, keepdim=True)).squeeze(1)
        valid_N = torch.ones_like(first_N, dtype=torch.bool) if place.valid_N is None else place.valid_N
        used_N = valid_N & chosen_NK.any(1)
        self.num_slots = max(self.num_slots, int(indices_NK.shape[1]))
        if place.sequences is not None and place.sequences[1] > 1:
            self._pairs(incidence_NE, first_N, used_N, place.sequences)
        self._add("padding", (~valid_N).sum())
        self._add("tokens", valid_N.sum())
        self._add("dropped", (valid_N & ~used_N).sum())
        if seen.scores_NE is not None:
            self._scores(seen.scores_NE.float(), incidence_NE, valid_N, chosen_NK)
        all_used = bool(used_N.all())  # the usual case needs no copies
        if not all_used:
            indices_NK, size_NK, chosen_NK = indices_NK[used_N], size_NK[used_N], chosen_NK[used_N]
            incidence_NE, first_N = incidence_NE[used_N], first_N[used_N]
        self._add("slots", chosen_NK.sum())
        self._add("together_EE", (incidence_NE.T @ incidence_NE).double())
        self._add("first_E", _sum(first_N, torch.ones_like(first_N), num_experts))
        share_NK = (size_NK / size_NK.sum(1, keepdim=True).clamp(min=1e-30)).where(chosen_NK, 0)
        self._add("weight_E", _sum(indices_NK.clamp(min=0), share_NK, num_experts))
        self._add("entropy", torch.special.entr(share_NK).sum().double())
        tokens_ND = seen.tokens_ND
        if tokens_ND.is_floating_point() and len(tokens_ND) == len(used_N):
            self._inputs(tokens_ND if all_used else tokens_ND[used_N], first_N)
        labels_N = place.labels_N if place.labels_N is None or all_used else place.labels_N[used_N]
        if labels_N is not None:
            key_NK = (labels_N[:, None] * num_experts + indices_NK)[chosen_NK & (labels_N >= 0)[:, None]]
            self.pending.append(key_NK.cpu())
            if sum(map(len, self.pending)) > DENSE_TABLE:
                self.merge_pending()
        if place.priority_N is not None and place.position_N is not None:
            used = slice(None) if all_used else used_N.cpu()
            self._keep(place.priority_N[used], place.position_N[used], labels_N, indices_NK)

    def _pairs(self, inside_NE: Tensor, first_N: Tensor, used_N: Tensor, shape: tuple[int, int]) -> None:
        inside_BTE, first_BT = inside_NE.unflatten(0, shape), first_N.view(shape)
        used_BT = used_N.view(shape)
        both_BT = used_BT[:, 1:] & used_BT[:, :-1]
        common_BT = (inside_BTE[:, 1:] * inside_BTE[:, :-1]).sum(2)
        size_BT = inside_BTE.sum(2)
        larger_BT = torch.maximum(size_BT[:, 1:], size_BT[:, :-1]).clamp(min=1)
        self._add("pairs", both_BT.sum())
        self._add("overlap", (common_BT / larger_BT).where(both_BT, 0).sum().double())
        self._add("first_same", ((first_BT[:, 1:] == first_BT[:, :-1]) & both_BT).sum())

    def _scores(self, scores_NE: Tensor, inside_NE: Tensor, valid_N: Tensor, chosen_NK: Tensor) -> None:
        """What the router preferred, and whether the dispatch followed it."""
        if len(scores_NE) != len(inside_NE):
            return
        total_N = scores_NE.sum(1)
        already = bool((scores_NE >= 0).all()) and torch.allclose(
            total_N, torch.ones_like(total_N), atol=1e-2
        )
        probs_NE = scores_NE if already else scores_NE.softmax(1)
        best_NK = scores_NE.topk(chosen_NK.shape[1], 1).indices
        wanted_NK = inside_NE.gather(1, best_NK).bool() & valid_N[:, None]
        self._add("followed", wanted_NK.sum())
        self._add("scored", (inside_NE.sum(1) * valid_N).sum().double())
        self._add("count_all_E", inside_NE.sum(0).double())
        self._add("score_all_E", probs_NE.sum(0).double())
        self._add("score_E", (probs_NE * valid_N[:, None]).sum(0).double())
        self._add("twice_E", (probs_NE.softmax(1) * valid_N[:, None]).sum(0).double())
        self._add("score_entropy", (torch.special.entr(probs_NE).sum(1) * valid_N).sum().double())

    def _inputs(self, tokens_ND: Tensor, first_N: Tensor) -> None:
        """Means of what each expert reads, from at most 256 tokens of a call."""
        if not len(tokens_ND):
            return
        step, stride = -(-len(tokens_ND) // 256), -(-tokens_ND.shape[1] // MAX_WIDTH)
        some_MD, expert_M = tokens_ND[::step, ::stride].float(), first_N[::step]
        if self.inputs_ED is None:
            self.inputs_ED = torch.zeros(self.num_experts, some_MD.shape[1], device=some_MD.device)
        self.inputs_ED.index_add_(0, expert_M, some_MD)
        self._add("read_E", _sum(expert_M, torch.ones_like(expert_M), self.num_experts))
        self._add("squares", some_MD.square().sum().double())

    def _keep(
        self, priority_N: Tensor, position_N: Tensor, labels_N: Tensor | None, indices_NK: Tensor
    ) -> None:
        if len(self.kept_M) >= KEPT:
            small = priority_N < self.kept_M.max()
            priority_N, position_N = priority_N[small], position_N[small]
            chosen = small.to(indices_NK.device)
            indices_NK = indices_NK[chosen]
            labels_N = None if labels_N is None else labels_N[chosen]
        if not len(priority_N):
            return
        label_N = torch.full_like(position_N, -1) if labels_N is None else labels_N.cpu()
        self._keep_best(priority_N, position_N, label_N, indices_NK.to("cpu", torch.int16))

    def _keep_best(self, priority: Tensor, position: Tensor, label: Tensor, chosen: Tensor) -> None:
        width = max(chosen.shape[1], self.kept_MK.shape[1])
        padded = [
            torch.nn.functional.pad(t, (0, width - t.shape[1]), value=-1) for t in (self.kept_MK, chosen)
        ]
        joined = [
            torch.cat([self.kept_M, priority]),
            torch.cat([self.kept_position_M, position]),
            torch.cat([self.kept_label_M, label]),
            torch.cat(padded),
        ]
        if len(joined[0]) > KEPT:
            best = joined[0].topk(KEPT, largest=False).indices
            joined = [t[best] for t in joined]
        self.kept_M, self.kept_position_M, self.kept_label_M, self.kept_MK = joined

    def merge_pending(self) -> None:
        """Fold the keys (class, expert) seen since the last time into the sparse table."""
        if not self.pending:
            return
        key, count = torch.cat(self.pending).unique(return_counts=True)
        self.pending = []
        self._merge_table(key, count.double())

    def _merge_table(self, key: Tensor, count: Tensor) -> None:
        all_keys, where = torch.cat([self.class_key, key]).unique(return_inverse=True)
        self.class_count = _sum(where, torch.cat([self.class_count, count]), len(all_keys))
        self.class_key = all_keys

    def finish(self) -> BlockState:
        """On the CPU, nothing pending."""
        self.merge_pending()
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.cpu())
        return self

    def merge(self, other: BlockState) -> None:
        """Add another rank's tables; positions of the tokens kept are not shifted."""
        for name, value in vars(other).items():
            if isinstance(value, Tensor) and not name.startswith(("kept", "class", "inputs")):
                self._add(name, value)
        if other.inputs_ED is not None:
            mine = self.inputs_ED
            self.inputs_ED = other.inputs_ED if mine is None else mine + other.inputs_ED
        self.num_slots = max(self.num_slots, other.num_slots)
        self._merge_table(other.class_key, other.class_count)
        self._keep_best(other.kept_M, other.kept_position_M, other.kept_label_M, other.kept_MK)

    def class_table(self) -> tuple[Tensor, Tensor]:
        """The classes that occur [C], and how many of their slots went to each expert [C, E]."""
        classes, row = (self.class_key // self.num_experts).unique(return_inverse=True)
        flat = _sum(row * self.num_experts + self.class_key % self.num_experts, self.class_count,
                    len(classes) * self.num_experts)  # fmt: skip
        return classes, flat.view(-1, self.num_experts)
