"""Streaming statistics of one block: a few tables, whatever the number of tokens.

Shapes: N tokens, D width, E experts, K slots per token, C classes, M tokens kept, B sequences, T positions.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lib.inspect.adapters import Dispatch

WAITING = 1 << 18  # entries, tokens times experts or features, that wait to be tallied together: small calls
# would cost more than they say
KEPT = 16384  # tokens kept per block, by position: the same ones in every model that reads the same data
READ = 256  # tokens of a call used for `input separation`, and
MAX_WIDTH = 256  # features of each
DENSE_TABLE = 1 << 20  # entries; a larger class table is kept sparse


@dataclass
class Place:
    """Where the tokens of one call stand: all [N], or None where it is not known."""

    sequences: tuple[int, int] | None = None  # (B, T), N = B * T, sequence after sequence
    valid_N: Tensor | None = None  # False: padding
    labels_N: Tensor | None = None  # below 0: not counted by class
    position_N: Tensor | None = None  # in the whole stream
    priority_N: Tensor | None = None  # uniform; the smallest are kept

    @functools.cached_property
    def follows_N(self) -> Tensor | None:
        """Is the next token its successor?"""
        if self.sequences is None or self.sequences[1] < 2:
            return None
        follows_BT = torch.ones(self.sequences, dtype=torch.bool)
        follows_BT[:, -1] = False
        return follows_BT.flatten()


def _sum(index: Tensor, weight: Tensor, size: int) -> Tensor:
    total = torch.zeros(size, dtype=torch.float64, device=index.device)
    return total.index_add_(0, index.flatten(), weight.flatten().to(torch.float64))


def counted(key: Tensor) -> tuple[Tensor, Tensor]:
    """The keys that occur, and how often."""
    if len(key) and int(key.max()) < DENSE_TABLE:
        count = key.bincount()
        keys = count.nonzero().flatten()
        return keys, count[keys].double()
    keys, counts = key.unique(return_counts=True)
    return keys, counts.double()


class Waiting(NamedTuple):
    """What one call leaves to be tallied."""

    indices_NK: Tensor
    size_NK: Tensor  # absolute weights
    scores_NE: Tensor | None
    valid_N: Tensor | None
    labels_N: Tensor | None
    position_N: Tensor | None
    priority_N: Tensor | None
    follows_N: Tensor | None  # is the next token its successor?
    read_MD: Tensor | None  # what the experts read: every so many-th token

    def fits(self, other: Waiting) -> bool:
        same = all((a is None) == (b is None) for a, b in zip(self, other, strict=True))
        return same and self.indices_NK.shape[1] == other.indices_NK.shape[1]


class Kept(NamedTuple):
    """Some tokens: the same ones in every model that reads the same data."""

    priority_M: Tensor = torch.zeros(0, dtype=torch.float64)
    position_M: Tensor = torch.zeros(0, dtype=torch.long)
    label_M: Tensor = torch.zeros(0, dtype=torch.long)
    chosen_MK: Tensor = torch.zeros(0, 0, dtype=torch.int16)

    def of(self, some: Tensor) -> Kept:
        return Kept(*(column[some] for column in self))

    def joined(self, other: Kept) -> Kept:
        width = max(self.chosen_MK.shape[1], other.chosen_MK.shape[1])
        pad = torch.nn.functional.pad
        chosen = [pad(t, (0, width - t.shape[1]), value=-1) for t in (self.chosen_MK, other.chosen_MK)]
        first = [torch.cat(pair) for pair in zip(self[:3], other[:3], strict=True)]
        return Kept(first[0], first[1], first[2], torch.cat(chosen))


SUMS = (  # over tokens, unless said otherwise
    "tokens", "padding", "dropped", "slots", "entropy",
    "pairs", "overlap", "first_same",  # over neighbouring tokens
    "scored", "followed",  # where the router's scores were seen
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
        sizes = dict.fromkeys(SUMS, ()) | dict.fromkeys(BY_EXPERT, (num_experts,))
        self.shapes: dict[str, tuple[int, ...]] = {**sizes, "together_EE": (num_experts, num_experts)}
        self.totals = torch.zeros(sum(map(math.prod, self.shapes.values())), dtype=torch.float64)
        self.inputs_ED: Tensor | None = None  # sums; the last of its E + 1 rows: read by no expert
        self.waiting: list[Waiting] = []
        self.num_waiting = 0  # entries
        self.class_key = torch.zeros(0, dtype=torch.long)  # class * E + expert
        self.class_count = torch.zeros(0, dtype=torch.float64)
        self.pending: list[Tensor] = []
        self.shares: bool | None = None  # are the router's scores shares already? Judged once
        self.kept = Kept()
        self.kept_bound = math.inf  # of priorities: above it none is kept

    def __getattr__(self, name: str) -> Tensor:
        """The entry of `totals` that is called `name`."""
        start = 0
        for other, shape in self.__dict__.get("shapes", {}).items():
            if other == name:
                return self.totals[start : start + math.prod(shape)].view(shape)
            start += math.prod(shape)
        raise AttributeError(name)

    @property
    def count_E(self) -> Tensor:
        return self.together_EE.diagonal()

    @torch.no_grad()
    def update(self, seen: Dispatch, place: Place) -> None:
        """One call's dispatch; tallied once enough waits. Copies what the model may change later."""
        size, tokens_ND = len(seen.indices_NK), seen.tokens_ND
        scores_NE = seen.scores_NE if seen.scores_NE is not None and len(seen.scores_NE) == size else None
        follows_N, read_MD = place.follows_N, None
        follows_N = None if follows_N is None else follows_N.to(seen.indices_NK.device)
        if size and tokens_ND.is_floating_point() and len(tokens_ND) == size:
            stride = -(-tokens_ND.shape[1] // MAX_WIDTH)
            read_MD = tokens_ND[:: -(-size // READ), ::stride].to(torch.float32, copy=True)
        scores_NE = None if scores_NE is None else scores_NE.clone()
        call = Waiting(
            seen.indices_NK.clone(), seen.weights_NK.abs(), scores_NE, place.valid_N, place.labels_N,
            place.position_N, place.priority_N, follows_N, read_MD,
        )  # fmt: skip
        if self.waiting and not call.fits(self.waiting[0]):
            self._tally()
        self.waiting.append(call)
        self.num_waiting += size * self.num_experts + (0 if read_MD is None else read_MD.numel())
        if self.num_waiting >= WAITING:
            self._tally()

    def _tally(self) -> None:
        """Add the waiting calls to the tables; they have the same entries and number of slots."""
        if not self.waiting:
            return
        waiting, self.waiting, self.num_waiting = self.waiting, [], 0
        joined = [None if parts[0] is None else torch.cat(parts) for parts in zip(*waiting, strict=True)]
        call = Waiting._make(joined)
        indices_NK, size_NK, num_experts = call.indices_NK, call.size_NK.float(), self.num_experts
        found: dict[str, Tensor] = {}
        chosen_NK = (indices_NK >= 0) & (indices_NK < num_experts)
        chosen_NK &= size_NK.any(1, keepdim=True)  # no weight at all: not served
        indices_NK = indices_NK.where(chosen_NK, num_experts)  # the last column: no expert
        incidence_NE = torch.zeros(len(indices_NK), num_experts + 1, device=indices_NK.device)
        incidence_NE = incidence_NE.scatter_(1, indices_NK, 1.0)[:, :num_experts]
        size_NK = size_NK.where(chosen_NK, 0)
        first_N = indices_NK.gather(1, size_NK.argmax(1, keepdim=True)).squeeze(1)
        served_N = chosen_NK.any(1)
        valid_N = torch.ones_like(served_N) if call.valid_N is None else call.valid_N
        used_N = valid_N & served_N
        self.num_slots = max(self.num_slots, int(indices_NK.shape[1]))
        found["padding"], found["tokens"] = (~valid_N).sum(), valid_N.sum()
        found["dropped"] = found["tokens"] - used_N.sum()
        if call.follows_N is not None:
            found |= _pairs(incidence_NE, first_N, used_N, call.follows_N)
        if call.scores_NE is not None:
            scores_NE = call.scores_NE.float()
            if self.shares is None:
                self.shares = bool((scores_NE >= 0).all() & (scores_NE.sum(1) - 1).abs().le(1e-2).all())
            used_NK = chosen_NK & valid_N[:, None]
            found |= _scores(scores_NE, self.shares, incidence_NE, valid_N, indices_NK, used_NK)
        if call.read_MD is not None:
            sizes = [len(part.indices_NK) for part in waiting]
            ends = itertools.accumulate(sizes)
            rows = [
                torch.arange(end - size, end, -(-size // READ)) for end, size in zip(ends, sizes, strict=True)
            ]
            read_M = torch.cat(rows).to(first_N.device)
            expert_M = first_N[read_M].where(used_N[read_M], num_experts)
            if self.inputs_ED is None:
                width = call.read_MD.shape[1]
                self.inputs_ED = torch.zeros(num_experts + 1, width, device=call.read_MD.device)
            self.inputs_ED.index_add_(0, expert_M, call.read_MD)
            found["read_E"] = expert_M.bincount(minlength=num_experts + 1)[:num_experts]
            found["squares"] = (call.read_MD.square().sum(1) * (expert_M < num_experts)).sum()
        labels_N, all_used = call.labels_N, bool(used_N.all())  # the usual case needs no copies
        if not all_used:
            indices_NK, size_NK, chosen_NK = indices_NK[used_N], size_NK[used_N], chosen_NK[used_N]
            incidence_NE, first_N = incidence_NE[used_N], first_N[used_N]
            labels_N = None if labels_N is None else labels_N[used_N]
        found["slots"] = chosen_NK.sum()
        found["together_EE"] = incidence_NE.T @ incidence_NE
        found["first_E"] = first_N.bincount(minlength=num_experts)
        share_NK = size_NK / size_NK.sum(1, keepdim=True).clamp(min=1e-30)
        found["weight_E"] = _sum(indices_NK, share_NK, num_experts + 1)[:num_experts]
        found["entropy"] = torch.special.entr(share_NK).sum()
        zero = found["entropy"].new_zeros(())
        packed = [found.get(name, zero.expand(shape)).reshape(-1) for name, shape in self.shapes.items()]
        self.totals += torch.cat(packed).to("cpu", torch.float64)
        if labels_N is not None:
            counts_NK = chosen_NK & (labels_N >= 0)[:, None]
            key_NK = (labels_N[:, None] * num_experts + indices_NK).where(counts_NK, -1)
            self.pending.append(key_NK.flatten().cpu())
            if sum(map(len, self.pending)) > DENSE_TABLE:
                self.merge_pending()
        if call.priority_N is not None and call.position_N is not None:
            used = slice(None) if all_used else used_N.cpu()
            indices_NK = indices_NK.where(chosen_NK, -1)
            self._keep(call.priority_N[used], call.position_N[used], labels_N, indices_NK)

    def _keep(
        self, priority_N: Tensor, position_N: Tensor, labels_N: Tensor | None, indices_NK: Tensor
    ) -> None:
        labels_N = torch.full_like(position_N, -1) if labels_N is None else labels_N.cpu()
        more = Kept(priority_N, position_N, labels_N, indices_NK.to("cpu", torch.int16))
        self.kept = self.kept.joined(
            more if self.kept_bound == math.inf else more.of(priority_N < self.kept_bound)
        )
        if len(self.kept.priority_M) > 2 * KEPT:
            self._prune()

    def _prune(self) -> None:
        """Keep the smallest priorities."""
        if len(self.kept.priority_M) > KEPT:
            best, where = self.kept.priority_M.topk(KEPT, largest=False)
            self.kept, self.kept_bound = self.kept.of(where), float(best.max())

    def merge_pending(self) -> None:
        """Fold the keys (class, expert) seen since the last time into the sparse table."""
        if not self.pending:
            return
        key, count = counted(torch.cat(self.pending) + 1)
        self.pending = []
        self._merge_table(key[key > 0] - 1, count[key > 0])

    def _merge_table(self, key: Tensor, count: Tensor) -> None:
        if not len(self.class_key):
            self.class_key, self.class_count = key, count
            return
        all_keys, where = torch.cat([self.class_key, key]).unique(return_inverse=True)
        self.class_count = _sum(where, torch.cat([self.class_count, count]), len(all_keys))
        self.class_key = all_keys

    def finish(self) -> BlockState:
        """On the CPU, nothing pending."""
        self._tally()
        self.merge_pending()
        self._prune()
        self.inputs_ED = None if self.inputs_ED is None else self.inputs_ED.cpu()
        return self

    def merge(self, other: BlockState) -> None:
        """Add another rank's tables; positions of the tokens kept are not shifted."""
        self.totals += other.totals
        if other.inputs_ED is not None:
            mine = self.inputs_ED
            self.inputs_ED = other.inputs_ED if mine is None else mine + other.inputs_ED
        self.num_slots = max(self.num_slots, other.num_slots)
        self._merge_table(other.class_key, other.class_count)
        self.kept = self.kept.joined(other.kept)
        self._prune()

    def class_table(self) -> tuple[Tensor, Tensor]:
        """The classes that occur [C], and how many of their slots went to each expert [C, E]."""
        classes, row = (self.class_key // self.num_experts).unique(return_inverse=True)
        flat = _sum(row * self.num_experts + self.class_key % self.num_experts, self.class_count,
                    len(classes) * self.num_experts)  # fmt: skip
        return classes, flat.view(-1, self.num_experts)


def _pairs(inside_NE: Tensor, first_N: Tensor, used_N: Tensor, follows_N: Tensor) -> dict[str, Tensor]:
    both_N = (used_N & follows_N)[:-1] & used_N[1:]
    size_N = inside_NE.sum(1)
    common_N = torch.einsum("ne,ne->n", inside_NE[1:], inside_NE[:-1])
    larger_N = torch.maximum(size_N[1:], size_N[:-1]).clamp(min=1)
    return {
        "pairs": both_N.sum(),
        "overlap": (common_N / larger_N).where(both_N, 0).sum(),
        "first_same": ((first_N[1:] == first_N[:-1]) & both_N).sum(),
    }


def _scores(scores_NE: Tensor, shares: bool, inside_NE: Tensor, valid_N: Tensor, indices_NK: Tensor,
            used_NK: Tensor) -> dict[str, Tensor]:  # fmt: skip
    """What the router preferred, and whether the dispatch followed it."""
    probs_NE = scores_NE if shares else scores_NE.softmax(1)
    num_slots, num_experts = indices_NK.shape[1], scores_NE.shape[1]
    followed = used_NK.sum()
    if num_slots < num_experts:  # a slot follows if fewer than K scores are better than its expert's
        own_NK = scores_NE.gather(1, indices_NK.clamp(max=num_experts - 1))
        better = [(scores_NE > own_N1).sum(1) for own_N1 in own_NK.split(1, 1)]
        followed = ((torch.stack(better, 1) < num_slots) & used_NK).sum()
    valid_1N = valid_N.float()[None]
    return {
        "followed": followed,
        "scored": used_NK.sum(),
        "count_all_E": inside_NE.sum(0),
        "score_all_E": probs_NE.sum(0),
        "score_E": valid_1N @ probs_NE,
        "twice_E": valid_1N @ probs_NE.softmax(1),
    }
