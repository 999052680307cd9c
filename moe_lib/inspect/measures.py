"""The numbers of one block, each beside its null: the value it takes when nothing was learned.

Shapes: N tokens, M examined, D width, O output width, E experts, K slots per token, C classes, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_lib.inspect.adapters import some_entries
from moe_lib.inspect.state import BlockState, added, counted

if TYPE_CHECKING:
    from moe_lib.inspect.block import Block

NULL_DRAWS = 5  # of labels permuted, but
MANY_TOKENS = 20_000  # no more in all, if more than one draw
ENOUGH = 16  # times the root of the number of directions: with so many tokens, linear gates on tokens without
# any structure lie above the threshold of `arbitrary`; with half as many, up to all lie below it


class Value(NamedTuple):
    value: float
    null: float  # NaN: there is none


class About(NamedTuple):
    formula: str
    null: str
    sign: str
    axis: float = 0.0  # in pictures: the least top of its axis, so that nothing looks like something


ABOUT: dict[str, About] = {
    "effective experts": About(
        "exp(H(load)); load: share of the filled slots, of the weight where every token uses all experts",
        "balanced but finite: exp(log E - (E - 1) / 2S) for S slots", "high: many experts in use", 1.0,
    ),
    "never chosen": About(
        "experts that serve no token; where every token uses all, those that are no token's largest weight "
        "and have less than half of an equal share of all weight",
        "E (1 - K / E)^N: uniform choice", "0 is best", 1.0,
    ),
    "largest load": About("max of load", "1 / E", "low"),
    "dropped": About("share of tokens that no expert served", "0", "0 is best", 0.05),
    "unfilled": About("share of the N K slots that no expert filled", "0", "0 is best"),
    "H(E)": About("entropy of the mean weight, nats", "log E: balanced", "low: experts idle"),
    "H(E|x)": About("mean entropy of a token's weights, nats", "log K: equal weights", "low: sure choice"),
    "I(x;E)": About(
        "H(E) - H(E|x), nats", "0: a gate that ignores its input", "high: the choice depends on the token",
        0.1,
    ),
    "I(c;E)": About(
        "information between label and expert over slots, nats; plug-in; where every token uses all experts, "
        "of label and largest weight",
        "the same with labels permuted among tokens: the plug-in bias",
        "above its null: experts know the classes", 0.1,
    ),
    "input separation": About(
        "share of the variance of the experts' inputs that lies between first-choice experts",
        "(G - 1) / (M - 1) for G experts used: a choice made at random", "near its null: arbitrary routing",
        0.1,
    ),
    "separation beyond chance": About(
        "(input separation - its null) / the standard deviation of chance, null sqrt(2 / ((G - 1) d)); "
        "d = (tr S)^2 / tr S^2, S the covariance of the inputs",
        "0", "below 4: arbitrary routing; not given for fewer than 16 sqrt(d) tokens",
    ),
    "switching": About(
        "1 - |S_t ∩ S_t+1| / K, mean over neighbouring tokens of a sequence",
        "independent neighbours: 1 - sum_e q_e^2 / K, q_e the share of tokens that expert e serves",
        "low: stays with its experts", 1.0,
    ),
    "co-activation": About(
        "largest n_ab / min(n_a, n_b) over pairs: how often the rarer comes with the other",
        "that pair chosen independently: (K - 1) q_b / (K - q_a), a the rarer; the largest lies above",
        "1: two experts always run together",
    ),
    "follows scores": About(
        "share of filled slots among the K best of the router's scores; the lowest, if these are distances",
        "1: the dispatch is what the router prefers", "below 1: bias, groups, capacity or a fault decide",
        1.0,
    ),
    "answers alike": About(
        "mean cosine of two experts' answers to the same tokens, each expert's mean removed; where a "
        "multiple of the input makes up over 10 % of their variance, of what they add to it",
        "the same with tokens unpaired",
        "1: the experts compute the same",
    ),
    "answers alike, by use": About(
        "the same, each pair weighted by the product of its loads", "the same with tokens unpaired",
        "1: the experts in use compute the same", 1.0,
    ),
    "weights alike": About(
        "mean cosine of two experts' weights", "0: independent; copies start at 1", "1: copies",
    ),
    "mixture error": About(
        "norm of (sum_k weight x answer - output) over the output's; beside a path, over the mixture's", "0",
        "above rounding: what was observed does not explain the block",
    ),
    "cost of permuting": About(
        "loss with another token's routing for every token, minus the loss, nats", "0",
        "near 0: it does not matter which expert treats a token", 0.01,
    ),
    "cost of swapping": About(
        "loss when the two most used experts serve each other's tokens, minus the loss, nats", "0",
        "near 0: these two are alike, or do not matter",
    ),
    "cost of dropping": About(
        "loss without the most used expert, its weight given to others, minus the loss, nats", "0",
        "near 0: the others can do its work",
    ),
}  # fmt: skip


NOTHING = Value(math.nan, math.nan)


@dataclass
class Layer:
    """One block's numbers."""

    name: str
    family: str
    num_experts: int
    top_k: int
    num_tokens: int
    load_E: list[float]  # sums to 1
    weight_E: list[float]  # mean weight; sums to 1
    measures: dict[str, Value]
    explanation: str = ""  # of the mixture check
    notes: list[str] = field(default_factory=list)
    class_expert: dict[str, list[float]] = field(
        default_factory=dict
    )  # of a class's slots, or of its largest weights
    dropped_E: list[float] = field(default_factory=list)  # cost of dropping each expert, if asked for
    state: BlockState | None = field(default=None, repr=False)

    @property
    def soft(self) -> bool:
        """Do tokens use all experts? As `BlockState.soft`; also without a state."""
        return self.top_k == self.num_experts and self["unfilled"] <= self["dropped"] + 1e-9

    def __getitem__(self, measure: str) -> float:
        return self.measures[measure].value


def load(state: BlockState) -> Tensor:
    """[E], sums to 1: share of the slots, or of the weight where every token uses all experts."""
    total_E = state.weight_E if state.soft else state.count_E
    return total_E / total_E.sum().clamp(min=1e-30)


def entropy(shares: Tensor) -> float:
    """Nats."""
    return float(torch.special.entr(shares).sum())


def routing_measures(state: BlockState, seed: int = 0) -> dict[str, Value]:
    """What the tables say."""
    num_experts, num_slots, num_tokens = state.num_experts, max(state.num_slots, 1), float(state.tokens)
    soft = state.soft
    served = float(state.tokens - state.dropped)
    slots = served * num_experts if soft else float(state.slots)
    if served < 1:
        return {"dropped": Value(1.0 if num_tokens else math.nan, 0.0)}
    load_E, q_E = load(state), (state.first_E if soft else state.count_E) / served
    size = 1 if soft else slots / served  # every token uses all: its largest weight is its choice
    missed = 1 - size / num_experts  # chance that a token does not choose an expert
    idle_E = (q_E == 0) & (load_E < 0.5 / num_experts)
    balanced = math.log(num_experts) - (num_experts - 1) / (2 * slots)
    marginal, per_token = entropy(state.weight_E / served), float(state.entropy) / served
    found = {
        "effective experts": Value(math.exp(entropy(load_E)), math.exp(max(balanced, 0.0))),
        "never chosen": Value(float(idle_E.sum()), num_experts * missed**served),
        "largest load": Value(float(load_E.max()), 1 / num_experts),
        "dropped": Value(float(state.dropped) / num_tokens, 0.0),
        "unfilled": Value(1 - slots / (num_tokens * num_slots), 0.0),
        "H(E)": Value(marginal, math.log(num_experts)),
        "H(E|x)": Value(per_token, math.log(num_slots)),
        "I(x;E)": Value(max(marginal - per_token, 0.0), 0.0),
        "I(c;E)": class_information(state, seed),
    }
    found["input separation"], found["separation beyond chance"] = input_separation(state)
    if pairs := float(state.pairs):
        same = state.first_same if soft else state.overlap
        found["switching"] = Value(1 - float(same) / pairs, 1 - float(q_E.square().sum()) / size)
    if 1 < num_slots < num_experts:
        rarer_EE = torch.minimum(state.count_E[:, None], state.count_E[None]).clamp(min=1)
        often_EE = (state.together_EE / rarer_EE).fill_diagonal_(0)
        a, b = divmod(int(often_EE.argmax()), num_experts)
        rarer, other = sorted((float(q_E[a]), float(q_E[b])))
        chance = (num_slots - 1) * other / (num_slots - rarer)
        found["co-activation"] = Value(float(often_EE[a, b]), chance)
    if scored := float(state.scored):
        followed = state.opposed if state.distances else state.followed
        found["follows scores"] = Value(float(followed) / scored, 1.0)
    return found


def input_separation(state: BlockState) -> tuple[Value, Value]:
    """Its share of the variance, and by how many standard deviations of chance it is above its null."""
    count, groups = float(state.read_E.sum()), int((state.read_E > 0).sum())
    if state.inputs_ED is None or count < 3 or groups < 1 or state.num_experts < 2:
        return NOTHING, NOTHING
    sums_ED = state.inputs_ED[:-1].double()
    middle = float(sums_ED.sum(0).square().sum()) / count
    between = float((sums_ED.square().sum(1) / state.read_E.clamp(min=1)).sum()) - middle
    total = float(state.squares) - middle
    value, null = between / total if total > 0 else math.nan, (groups - 1) / (count - 1)
    crossed = float(state.crossed / state.crosses) / 4 if state.crosses else 0.0  # unbiased for tr S^2
    if groups < 2 or crossed <= 0:
        return Value(value, null), NOTHING
    directions = max((total / (count - 1)) ** 2 / crossed, 1.0)
    if count < ENOUGH * math.sqrt(directions * state.stride):
        return Value(value, null), NOTHING
    deviation = null * math.sqrt(2 / ((groups - 1) * directions))
    return Value(value, null), Value((value - null) / deviation, 0.0)


def class_information(state: BlockState, seed: int = 0) -> Value:
    """I(c;E), and its mean with labels permuted (Monte Carlo from the tokens kept)."""
    classes_C, table_CE = state.class_table()
    if len(classes_C) < 2:
        return NOTHING
    value = information(state.class_key, state.class_count, state.num_experts)
    labelled = state.kept.label_M >= 0
    chosen_MK, label_M = state.kept.chosen_MK[labelled].long(), state.kept.label_M[labelled]
    if not len(label_M):
        return Value(value, math.nan)
    slots_per_token = float((chosen_MK >= 0).sum()) / len(chosen_MK)
    size_C = (table_CE.sum(1) / slots_per_token).round().long().clamp(min=1)
    num_tokens = int(size_C.sum())
    generator = torch.Generator().manual_seed(seed)
    total, draws = 0.0, min(max(MANY_TOKENS // num_tokens, 1), NULL_DRAWS)
    for _ in range(draws):
        if num_tokens == len(label_M):  # every token was kept: a true permutation
            drawn, labels_N = torch.randperm(num_tokens, generator=generator), label_M
        else:  # as many tokens of each class, their experts drawn from those kept
            drawn = torch.randint(len(label_M), (num_tokens,), generator=generator)
            labels_N = classes_C.repeat_interleave(size_C)
        experts_NK = chosen_MK[drawn]
        key = (labels_N[:, None] * state.num_experts + experts_NK)[experts_NK >= 0]
        total += information(*counted(key), state.num_experts)
    return Value(value, total / draws)


def information(key: Tensor, count: Tensor, num_experts: int) -> float:
    """Mutual information in nats of a sparse table of (class, expert) counts; a key is class * E + expert."""
    share = count / count.sum()
    _, row = (key // num_experts).unique(return_inverse=True)
    by_class, by_expert = (added(index, share, int(index.max()) + 1) for index in (row, key % num_experts))
    return entropy(by_class) + entropy(by_expert) - entropy(share)


@torch.no_grad()
def expert_measures(block: Block) -> dict[str, Value]:
    """What the experts compute: their answers to a few tokens that the block read, and their weights."""
    found = {"mixture error": Value(block.mixture_error, 0.0)}
    if block.adapter.num_experts < 2:
        return found
    if block.alike is not None and block.examined > 2:
        load_E = load(block.state).to(block.alike[0])
        values, nulls = (_pair_means(cosine_EE, load_E) for cosine_EE in block.alike)
        found["answers alike"] = Value(values[0], nulls[0])
        found["answers alike, by use"] = Value(values[1], nulls[1])
    if weights := block.adapter.expert_weights():
        flat_EP = torch.cat([some_entries(weight).float() for weight in weights], 1)
        unit_EP = flat_EP / flat_EP.norm(dim=1, keepdim=True).clamp(min=1e-15)
        found["weights alike"] = Value(
            _pair_means(unit_EP @ unit_EP.T, unit_EP.new_ones(len(unit_EP)))[0], 0.0
        )
    return found


def _pair_means(cosine_EE: Tensor, load_E: Tensor) -> tuple[float, float]:
    """Mean over pairs of different experts: plain, and weighted by the product of their loads."""
    off_EE = cosine_EE.clone().fill_diagonal_(0)
    num_experts, total = len(off_EE), float(load_E.sum() ** 2 - load_E.square().sum())
    plain = float(off_EE.sum()) / (num_experts * (num_experts - 1))
    return plain, float(load_E @ off_EE @ load_E) / total if total > 1e-12 else math.nan


def how_many(items: list, what: str) -> str:
    """ "1 block", "2 blocks"."""
    return f"{len(items)} {what}{'s' * (len(items) != 1)}"


RIGHT = "as published, mean over blocks"


def balance_losses(states: list[BlockState]) -> dict[str, float]:
    """What a load-balancing loss is, as published and with each of its usual mistakes.

    E sum_e f_e P_e per block (Fedus et al. 2022, eq. 4; f_e = share of slots), mean over blocks.
    """
    states = [state for state in states if float(state.scored) and not state.distances]
    if not states:
        return {}

    def mean(count: str, score: str, pooled: bool = False) -> float:
        tables = [(getattr(state, count), getattr(state, score)) for state in states]
        if pooled:
            counts, scores = (torch.stack(parts).sum(0) for parts in zip(*tables, strict=True))
            tables = [(counts, scores)]
        products = [len(f_E) * float(f_E @ p_E / f_E.sum() / p_E.sum()) for f_E, p_E in tables]
        return sum(products) / len(products)

    right = mean("count_E", "score_E")
    found = {
        RIGHT: right,
        "padding counted": mean("count_all_E", "score_all_E"),
        "softmax applied twice": mean("count_E", "twice_E"),
        "summed over blocks": right * len(states),
        "constant": 1.0,
    }
    if len({state.num_experts for state in states}) == 1:
        found["blocks pooled before the product"] = mean("count_E", "score_E", pooled=True)
        found["blocks pooled, padding counted"] = mean("count_all_E", "score_all_E", pooled=True)
    if (num_slots := states[0].num_slots) > 1:
        found |= {f"{name}, times K": value * num_slots for name, value in found.items()}
    return found


def explain_balance_loss(states: list[BlockState], value: float, rtol: float = 1e-3) -> list[str]:
    """The formulas that give this value on the same tokens, nearest first; the right one is named first."""
    off = {name: abs(value / expected - 1) for name, expected in balance_losses(states).items()}
    close = [name for name in off if off[name] <= rtol]
    return sorted(close, key=lambda name: (off[name] > 1e-6, name != RIGHT))
