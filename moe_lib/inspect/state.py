"""Streaming statistics of one block: a few tables, whatever the number of tokens.

Shapes: N tokens, D width, E experts, K slots per token, C classes, M tokens kept, B sequences, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lib.inspect.adapters import Dispatch

WAITING = 4096  # tokens of a block that are tallied together: small calls would cost more than they say
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
        self.inputs_ED: Tensor | None = None  # sums; the last of its E + 1 rows: read by no expert
        self.waiting: list[dict[str, Tensor | None]] = []
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
        """One call's dispatch; tallied once enough tokens wait."""
        size_NK, scores_NE = seen.weights_NK.abs().float(), seen.scores_NE
        indices_NK = seen.indices_NK.where(size_NK.any(1, keepdim=True), -1)  # no weight at all: not served
        size, sequences = len(indices_NK), place.sequences
        follows_N = None  # is the next token its successor?
        if sequences is not None and sequences[1] > 1:
            follows_N = torch.ones(sequences, dtype=torch.bool, device=indices_NK.device)
            follows_N[:, -1] = False
            follows_N = follows_N.flatten()
        if seen.tokens_ND.is_floating_point() and len(seen.tokens_ND) == size:
            self._inputs(seen.tokens_ND, indices_NK, size_NK, place.valid_N)
        call = {
            "indices": indices_NK, "size": size_NK, "follows": follows_N, "valid": place.valid_N,
            "scores": scores_NE if scores_NE is not None and len(scores_NE) == size else None,
            "labels": place.labels_N, "position": place.position_N, "priority": place.priority_N,
        }  # fmt: skip
        last = self.waiting[-1] if self.waiting else call
        if any((call[key] is None) != (last[key] is None) for key in call) or (
            indices_NK.shape[1] != last["indices"].shape[1]  # type: ignore[union-attr]
        ):
            self._tally()
        self.waiting.append(call)
        if sum(len(call["indices"]) for call in self.waiting) >= WAITING:  # type: ignore[arg-type]
            self._tally()

    def _tally(self) -> None:
        """Add the waiting calls to the tables; they have the same entries and number of slots."""
        if not self.waiting:
            return
        waiting, self.waiting = self.waiting, []
        joined = {
            key: None if value is None else torch.cat([call[key] for call in waiting])  # type: ignore[misc]
            for key, value in waiting[0].items()
        }
        indices_NK, size_NK = joined["indices"], joined["size"]
        assert indices_NK is not None
        assert size_NK is not None
        num_experts = self.num_experts
        chosen_NK = indices_NK >= 0
        incidence_NE = torch.zeros(len(indices_NK), num_experts + 1, device=indices_NK.device)
        incidence_NE.scatter_(1, indices_NK.where(chosen_NK, num_experts), 1.0)
        incidence_NE = incidence_NE[:, :num_experts]
        first_N = indices_NK.gather(1, size_NK.argmax(1, keepdim=True)).squeeze(1)
        valid_N = torch.ones_like(first_N, dtype=torch.bool) if joined["valid"] is None else joined["valid"]
        used_N = valid_N & chosen_NK.any(1)
        self.num_slots = max(self.num_slots, int(indices_NK.shape[1]))
        if joined["follows"] is not None:
            self._pairs(incidence_NE, first_N, used_N, joined["follows"])
        self._add("padding", (~valid_N).sum())
        self._add("tokens", valid_N.sum())
        self._add("dropped", (valid_N & ~used_N).sum())
        if joined["scores"] is not None:
            self._scores(joined["scores"].float(), incidence_NE, valid_N, chosen_NK)
        all_used = bool(used_N.all())  # the usual case needs no copies
        if not all_used:
            indices_NK, size_NK, chosen_NK = indices_NK[used_N], size_NK[used_N], chosen_NK[used_N]
            incidence_NE, first_N = incidence_NE[used_N], first_N[used_N]
        self._add("slots", chosen_NK.sum())
        self._add("together_EE", (incidence_NE.T @ incidence_NE).double())
        self._add("first_E", first_N.bincount(minlength=num_experts).double())
        share_NK = (size_NK / size_NK.sum(1, keepdim=True).clamp(min=1e-30)).where(chosen_NK, 0)
        self._add("weight_E", _sum(indices_NK.clamp(min=0), share_NK, num_experts))
        self._add("entropy", torch.special.entr(share_NK).sum().double())
        labels_N = joined["labels"]
        if labels_N is not None:
            labels_N = labels_N if all_used else labels_N[used_N]
            key_NK = (labels_N[:, None] * num_experts + indices_NK)[chosen_NK & (labels_N >= 0)[:, None]]
            self.pending.append(key_NK.cpu())
            if sum(map(len, self.pending)) > DENSE_TABLE:
                self.merge_pending()
        if joined["priority"] is not None and joined["position"] is not None:
            used = slice(None) if all_used else used_N.cpu()
            self._keep(joined["priority"][used], joined["position"][used], labels_N, indices_NK)

    def _pairs(self, inside_NE: Tensor, first_N: Tensor, used_N: Tensor, follows_N: Tensor) -> None:
        both_N = (used_N & follows_N)[:-1] & used_N[1:]
        size_N = inside_NE.sum(1)
        common_N = (inside_NE[1:] * inside_NE[:-1]).sum(1)
        larger_N = torch.maximum(size_N[1:], size_N[:-1]).clamp(min=1)
        self._add("pairs", both_N.sum())
        self._add("overlap", (common_N / larger_N).where(both_N, 0).sum().double())
        self._add("first_same", ((first_N[1:] == first_N[:-1]) & both_N).sum())

    def _scores(self, scores_NE: Tensor, inside_NE: Tensor, valid_N: Tensor, chosen_NK: Tensor) -> None:
        """What the router preferred, and whether the dispatch followed it."""
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

    def _inputs(self, tokens_ND: Tensor, indices_NK: Tensor, size_NK: Tensor, valid_N: Tensor | None) -> None:
        """Means of what each expert reads, from at most 256 tokens of a call."""
        if not len(tokens_ND):
            return
        step, stride = -(-len(tokens_ND) // 256), -(-tokens_ND.shape[1] // MAX_WIDTH)
        some_MD, num_experts = tokens_ND[::step, ::stride].float(), self.num_experts
        first_M1 = size_NK[::step].argmax(1, keepdim=True)
        expert_M = indices_NK[::step].gather(1, first_M1).squeeze(1)
        used_M = expert_M >= 0 if valid_N is None else (expert_M >= 0) & valid_N[::step]
        expert_M = expert_M.where(used_M, num_experts)
        if self.inputs_ED is None:
            self.inputs_ED = torch.zeros(num_experts + 1, some_MD.shape[1], device=some_MD.device)
        self.inputs_ED.index_add_(0, expert_M, some_MD)
        self._add("read_E", expert_M.bincount(minlength=num_experts + 1)[:num_experts].double())
        self._add("squares", (some_MD.square().sum(1) * used_M).sum().double())

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
        self._tally()
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
