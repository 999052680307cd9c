"""Streaming statistics of one block: a few tables, whatever the number of tokens.

Shapes: N tokens, D width, E experts, K slots per token, C classes, M tokens kept or read, B sequences,
T positions.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lib.inspect.adapters import Dispatch

WAITING = 1 << 18  # entries, tokens times experts or features, that wait to be tallied together: small calls
# would cost more than they say
KEPT = 16384  # tokens kept per block, by position: the same ones in every model that reads the same data
READ = 256  # tokens of a call used for `input separation`, and
MAX_WIDTH = 256  # features of each
FAINT = 1e-4  # in float16 a softmax ends at 6e-8, in float32 at 1e-45
DENSE_TABLE = 1 << 20  # entries; a larger class table is kept sparse


class Place(NamedTuple):
    """Of each token of a call: padding, label, position, whether the next one follows it; None: unknown."""

    valid_N: Tensor | None = None  # False: padding
    labels_N: Tensor | None = None  # below 0: not counted by class
    position_N: Tensor | None = None  # in the whole stream
    follows_N: Tensor | None = None  # is the next token its successor?


class Kept(NamedTuple):
    """Some tokens: the same ones in every model that reads the same data."""

    position_M: Tensor = torch.zeros(0, dtype=torch.long)
    label_M: Tensor = torch.zeros(0, dtype=torch.long)
    chosen_MK: Tensor = torch.zeros(0, 0, dtype=torch.int16)

    def of(self, some: Tensor) -> Kept:
        return Kept(*(column[some] for column in self))

    def joined(self, other: Kept) -> Kept:
        """Of both, the KEPT tokens whose positions' `scrambled` numbers are smallest."""
        width = max(self.chosen_MK.shape[1], other.chosen_MK.shape[1])
        pad = torch.nn.functional.pad
        chosen = [pad(t, (0, width - t.shape[1]), value=-1) for t in (self.chosen_MK, other.chosen_MK)]
        position_M, label_M = (torch.cat(pair) for pair in zip(self[:2], other[:2], strict=True))
        both = Kept(position_M, label_M, torch.cat(chosen))
        if len(both.position_M) <= KEPT:
            return both
        return both.of(scrambled(both.position_M).topk(KEPT, largest=False, sorted=False).indices)


def scrambled(position_N: Tensor) -> Tensor:
    """A pseudo-random integer for each position: the finalizer of SplitMix64 (Steele et al. 2014)."""
    mixed_N = (position_N ^ (position_N >> 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as a signed number
    mixed_N = (mixed_N ^ (mixed_N >> 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return mixed_N ^ (mixed_N >> 31)


@functools.lru_cache(maxsize=16)
def sampled(size: int, device: torch.device) -> Tensor:
    """Which READ of a call's tokens [N] are used for `input separation`: every so many-th."""
    return (torch.arange(size) % -(-size // READ) == 0).to(device)


def added(index: Tensor, weight: Tensor, size: int) -> Tensor:
    """Weights summed by index [size]."""
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


class Tables:
    """Sums over tokens, unless said otherwise; views into one vector, `totals`."""

    tokens: Tensor
    padding: Tensor
    not_finite: Tensor  # not counted
    dropped: Tensor
    slots: Tensor  # filled,
    faint: Tensor  # and those with less than `FAINT` of the token's weight
    entropy: Tensor  # of a token's weights
    pairs: Tensor  # of neighbouring tokens, both served
    overlap: Tensor  # of their experts, as a share of the larger set
    first_same: Tensor  # pairs with the same first choice
    scored: Tensor  # filled slots of tokens with scores
    followed: Tensor  # those among the K best scores
    opposed: Tensor  # those among the K lowest, if scores may be distances
    squares: Tensor  # of the inputs sampled
    crossed: Tensor  # squared products of differences of two inputs, and
    crosses: Tensor  # how many: for the number of directions that inputs vary in
    first_E: Tensor  # tokens whose largest weight is this expert's
    weight_E: Tensor  # weights, normalised token by token
    score_E: Tensor  # softmax of the scores
    count_all_E: Tensor  # slots, padding included
    score_all_E: Tensor  # softmax of the scores, padding included
    twice_E: Tensor  # softmax applied twice
    read_E: Tensor  # tokens sampled by first choice
    together_EE: Tensor  # tokens that both experts serve

    def __init__(self, num_experts: int) -> None:
        """A name's ending gives the table's shape."""
        self.num_experts = num_experts
        self.sizes = {name: num_experts ** _rank(name) for name in Tables.__annotations__}
        ends = itertools.accumulate(self.sizes.values())
        self.starts = {name: end - self.sizes[name] for name, end in zip(self.sizes, ends, strict=True)}
        self.totals = torch.zeros(sum(self.sizes.values()), dtype=torch.float64)

    def __getattr__(self, name: str) -> Tensor:
        """A table by its name: totals are replaced, so views are made when asked for."""
        if name not in Tables.__annotations__ or "totals" not in vars(self):
            raise AttributeError(name)
        found = self.totals.narrow(0, self.starts[name], self.sizes[name])
        return found.view((self.num_experts,) * _rank(name))


def _rank(name: str) -> int:
    return len(name) - len(name.rstrip("E"))


class BlockState(Tables):
    """Tables of one block; those of other ranks are added with `merge`."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.num_slots = 0  # K, the most that a token had
        self.stride = 1  # of the features read
        self.inputs_ED: Tensor | None = None  # sums; the last of its E + 1 rows: read by no expert
        self.waiting: list[dict[str, Tensor]] = []  # calls to be added together; all have the same keys
        self.num_waiting = 0  # entries
        self.class_key = torch.zeros(0, dtype=torch.long)  # class * E + expert
        self.class_count = torch.zeros(0, dtype=torch.float64)
        self.pending: list[Tensor] = []
        self.shares: bool | None = None  # are the router's scores shares already? Judged once
        self.may_be_distances = False  # no score is below 0, and some are above 1; decided once
        self.kept = Kept()

    @property
    def soft(self) -> bool:
        """Do tokens use all experts?"""
        empty = float(self.tokens - self.dropped) * self.num_experts - float(self.slots)
        return uses_all(self.num_slots, self.num_experts, empty, float(self.faint))

    @property
    def distances(self) -> bool:
        """Are the router's scores distances? The lowest are chosen."""
        return self.may_be_distances and float(self.opposed) > 0.99 * float(self.scored)

    @property
    def count_E(self) -> Tensor:
        return self.together_EE.diagonal()

    @torch.no_grad()
    def update(self, seen: Dispatch, place: Place) -> None:
        """One call's dispatch; tallied once enough waits. Copies what the model may change later."""
        size, tokens_ND, scores_NE = len(seen.indices_NK), seen.tokens_ND, seen.scores_NE
        call = {"indices_NK": seen.indices_NK.clone(), "size_NK": seen.weights_NK.abs()}
        call |= {name: value for name, value in place._asdict().items() if value is not None}
        if scores_NE is not None and len(scores_NE) == size:
            call["scores_NE"] = scores_NE.clone()
        if seen.in_order and tokens_ND.is_floating_point() and len(tokens_ND) == size:
            self.stride = stride = -(-tokens_ND.shape[1] // MAX_WIDTH)
            call["reads_N"] = sampled(size, tokens_ND.device)
            call["read_MD"] = tokens_ND[:: -(-size // READ), ::stride].to(torch.float32, copy=True)
        if self.waiting and not _alike(call, self.waiting[0]):
            self._tally()
        self.waiting.append(call)
        self.num_waiting += size * self.num_experts + (call["read_MD"].numel() if "read_MD" in call else 0)
        if self.num_waiting >= WAITING:
            self._tally()

    def _tally(self) -> None:
        """Add the waiting calls to the tables."""
        if not self.waiting:
            return
        waiting, self.waiting, self.num_waiting = self.waiting, [], 0
        call = {name: torch.cat([each[name] for each in waiting]) for name in waiting[0]}
        indices_NK, size_NK, num_experts = call["indices_NK"], call["size_NK"].float(), self.num_experts
        chosen_NK = (indices_NK >= 0) & (indices_NK < num_experts)
        finite_N = size_NK.isfinite().all(1)
        if "read_MD" in call:
            finite_N[call["reads_N"]] &= call["read_MD"].sum(1).isfinite()
        all_finite = bool(finite_N.all())  # the usual case needs no copies
        chosen_NK &= size_NK.any(1, keepdim=True)  # no weight at all: not served
        indices_NK = indices_NK.where(chosen_NK, num_experts)  # the last column: no expert
        size_NK = size_NK.where(chosen_NK, 0)
        incidence_NE = torch.zeros(len(indices_NK), num_experts + 1, device=indices_NK.device)
        incidence_NE = incidence_NE.scatter_(1, indices_NK, 1.0)[:, :num_experts]
        first_N = indices_NK.gather(1, size_NK.argmax(1, keepdim=True)).squeeze(1)
        served_N = chosen_NK.any(1)
        valid_N = call.get("valid_N", torch.ones_like(served_N))
        found = {"padding": (~valid_N).sum(), "not_finite": (valid_N & ~finite_N).sum()}
        valid_N = valid_N & finite_N
        used_N = valid_N & served_N
        self.num_slots = max(self.num_slots, indices_NK.shape[1])
        found |= {"tokens": valid_N.sum(), "dropped": (valid_N & ~served_N).sum()}
        if "follows_N" in call:
            found |= _pairs(incidence_NE, first_N, used_N, call["follows_N"])
        if "scores_NE" in call:
            scores_NE = call["scores_NE"].float()
            if not all_finite:
                scores_NE = scores_NE.where(finite_N[:, None], 0)
            if self.shares is None:
                some_NE = scores_NE[finite_N]
                self.shares = bool((some_NE >= 0).all() & (some_NE.sum(1) - 1).abs().le(1e-2).all())
                self.may_be_distances = bool((some_NE >= 0).all() & (some_NE > 1).any())
            used_NK = chosen_NK & valid_N[:, None]
            found |= _scores(scores_NE, self.shares, incidence_NE, valid_N, indices_NK, used_NK)
            if self.may_be_distances:
                found["opposed"] = _among_best(-scores_NE, indices_NK, used_NK)
        if "read_MD" in call:
            reads_N = call["reads_N"]
            expert_M = first_N.where(used_N, num_experts)[reads_N]
            found |= self._inputs(call["read_MD"], expert_M, None if all_finite else finite_N[reads_N])
        everyone, labels_N, position_N = bool(used_N.all()), call.get("labels_N"), call.get("position_N")
        if not everyone:
            indices_NK, size_NK, chosen_NK = indices_NK[used_N], size_NK[used_N], chosen_NK[used_N]
            incidence_NE, first_N = incidence_NE[used_N], first_N[used_N]
            labels_N = None if labels_N is None else labels_N[used_N]
            position_N = None if position_N is None else position_N[used_N.cpu()]
        share_NK = size_NK / size_NK.sum(1, keepdim=True).clamp(min=1e-30)
        found["slots"], found["entropy"] = chosen_NK.sum(), torch.special.entr(share_NK).sum()
        found["faint"] = ((share_NK < FAINT) & chosen_NK).sum()
        found["together_EE"] = incidence_NE.T @ incidence_NE
        found["first_E"] = first_N.bincount(minlength=num_experts)
        found["weight_E"] = added(indices_NK, share_NK, num_experts + 1)[:num_experts]
        zero = found["entropy"].new_zeros(())
        packed = [found.get(name, zero.expand(size)).reshape(-1) for name, size in self.sizes.items()]
        self.totals += torch.cat(packed).to("cpu", torch.float64)
        if uses_all(indices_NK.shape[1], num_experts, (~chosen_NK).sum(), found["faint"]):
            indices_NK, chosen_NK = first_N[:, None], chosen_NK.any(1, keepdim=True)
        self._remember(indices_NK, chosen_NK, labels_N, position_N)

    def _inputs(self, read_MD: Tensor, expert_M: Tensor, finite_M: Tensor | None) -> dict[str, Tensor]:
        """Sums of a sample of what the experts read, by first choice."""
        some_MD = read_MD[:READ][expert_M[:READ] < self.num_experts]
        read_MD = read_MD.double() if finite_M is None else read_MD.double().where(finite_M[:, None], 0)
        read_ED = read_MD.new_zeros(self.num_experts + 1, read_MD.shape[1]).index_add_(0, expert_M, read_MD)
        self.inputs_ED = read_ED if self.inputs_ED is None else self.inputs_ED + read_ED
        apart_LD = some_MD[: len(some_MD) // 2] - some_MD[len(some_MD) - len(some_MD) // 2 :]
        product_LL = apart_LD @ apart_LD.T
        return {
            "read_E": expert_M.bincount(minlength=self.num_experts + 1)[: self.num_experts],
            "squares": (read_MD.square().sum(1) * (expert_M < self.num_experts)).sum(),
            "crossed": product_LL.double().fill_diagonal_(0).square().sum(),
            "crosses": product_LL.new_tensor(len(product_LL) * (len(product_LL) - 1)),
        }

    def _remember(self, indices_NK: Tensor, chosen_NK: Tensor, labels_N: Tensor | None,
                  position_N: Tensor | None) -> None:  # fmt: skip
        """The experts of each class, and some tokens by position; of tokens that use all, the largest
        weight's."""
        if labels_N is not None:
            counts_NK = chosen_NK & (labels_N >= 0)[:, None]
            key_NK = (labels_N[:, None] * self.num_experts + indices_NK).where(counts_NK, -1)
            self.pending.append(key_NK.flatten().cpu())
            if sum(map(len, self.pending)) > DENSE_TABLE:
                self._count_classes()
        if position_N is not None:
            label_N = torch.full_like(position_N, -1) if labels_N is None else labels_N.cpu()
            chosen = indices_NK.where(chosen_NK, -1).to("cpu", torch.int16)
            self.kept = self.kept.joined(Kept(position_N, label_N, chosen))

    def _count_classes(self) -> None:
        """Fold the keys seen since the last time into the sparse table."""
        if self.pending:
            key, count = counted(torch.cat(self.pending) + 1)
            self.pending = []
            self._add_classes(key[key > 0] - 1, count[key > 0])

    def _add_classes(self, key: Tensor, count: Tensor) -> None:
        all_keys, where = torch.cat([self.class_key, key]).unique(return_inverse=True)
        self.class_count = added(where, torch.cat([self.class_count, count]), len(all_keys))
        self.class_key = all_keys

    def finish(self) -> BlockState:
        """On the CPU, nothing pending."""
        self._tally()
        self._count_classes()
        self.inputs_ED = None if self.inputs_ED is None else self.inputs_ED.cpu()
        return self

    def merge(self, other: BlockState) -> None:
        """Add another rank's tables; positions of the tokens kept are not shifted."""
        self.totals = self.totals + other.totals
        if self.inputs_ED is None or other.inputs_ED is None:
            self.inputs_ED = other.inputs_ED if self.inputs_ED is None else self.inputs_ED
        else:
            self.inputs_ED = self.inputs_ED + other.inputs_ED
        self.num_slots = max(self.num_slots, other.num_slots)
        self._add_classes(other.class_key, other.class_count)
        self.kept = self.kept.joined(other.kept)

    def class_table(self) -> tuple[Tensor, Tensor]:
        """The classes that occur [C], and how many of their slots went to each expert [C, E]."""
        classes, row = (self.class_key // self.num_experts).unique(return_inverse=True)
        cell = row * self.num_experts + self.class_key % self.num_experts
        flat = added(cell, self.class_count, len(classes) * self.num_experts)
        return classes, flat.view(-1, self.num_experts)


def uses_all(num_slots: int, num_experts: int, empty: float | Tensor, faint: float | Tensor) -> bool:
    """Is it a soft mixture? Weights that underflow to 0 leave slots empty, and others faint."""
    return num_slots == num_experts and bool(empty <= faint)


def _alike(call: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Can they be tallied together?"""
    return call.keys() == other.keys() and call["indices_NK"].shape[1] == other["indices_NK"].shape[1]


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


def _among_best(scores_NE: Tensor, indices_NK: Tensor, used_NK: Tensor) -> Tensor:
    """How many slots there are with fewer than K scores better than their expert's."""
    num_slots, num_experts = indices_NK.shape[1], scores_NE.shape[1]
    if num_slots == num_experts:
        return used_NK.sum()
    own_NK = scores_NE.gather(1, indices_NK.clamp(max=num_experts - 1))
    better = [(scores_NE > own_N1).sum(1) for own_N1 in own_NK.split(1, 1)]
    return ((torch.stack(better, 1) < num_slots) & used_NK).sum()


def _scores(scores_NE: Tensor, shares: bool, inside_NE: Tensor, valid_N: Tensor, indices_NK: Tensor,
            used_NK: Tensor) -> dict[str, Tensor]:  # fmt: skip
    """What the router preferred, and whether the dispatch followed it."""
    probs_NE = scores_NE if shares else scores_NE.softmax(1)
    valid_1N = valid_N.float()[None]
    return {
        "followed": _among_best(scores_NE, indices_NK, used_NK),
        "scored": used_NK.sum(),
        "count_all_E": inside_NE.sum(0),
        "score_all_E": probs_NE.sum(0),
        "score_E": valid_1N @ probs_NE,
        "twice_E": valid_1N @ probs_NE.softmax(1),
    }
