"""The numbers of one block, each beside its null: the value it takes when nothing was learned.

Shapes: N tokens, M examined, D width, O output width, E experts, K slots per token, C classes, P parameters.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_lib.inspect.adapters import some_entries
from moe_lib.inspect.state import BlockState, counted

if TYPE_CHECKING:
    from moe_lib.inspect.block import Block

NULL_DRAWS = 5  # of labels permuted, but
MANY_TOKENS = 20_000  # no more in all, if more than one draw


class Value(NamedTuple):
    value: float
    null: float  # NaN: there is none


class About(NamedTuple):
    formula: str
    null: str
    sign: str


ABOUT: dict[str, About] = {
    "effective experts": About(
        "exp(H(load)); load: share of the filled slots, of the weight where every token uses all experts",
        "balanced but finite: exp(log E - (E - 1) / 2S) for S slots", "high: many experts in use",
    ),
    "never chosen": About(
        "experts with load 0; where every token uses all, experts that are no token's largest weight",
        "E (1 - K / E)^N: uniform choice", "0 is best",
    ),
    "largest load": About("max of load", "1 / E", "low"),
    "dropped": About("share of tokens that no expert served", "0", "0 is best"),
    "unfilled": About("share of the N K slots that no expert filled", "0", "0 is best"),
    "H(E)": About("entropy of the mean weight, nats", "log E: balanced", "low: experts idle"),
    "H(E|x)": About("mean entropy of a token's weights, nats", "log K: equal weights", "low: sure choice"),
    "I(x;E)": About(
        "H(E) - H(E|x), nats", "0: a gate that ignores its input", "high: the choice depends on the token",
    ),
    "I(c;E)": About(
        "information between label and expert over slots, nats; plug-in",
        "the same with labels permuted among tokens: the plug-in bias",
        "above its null: experts know the classes",
    ),
    "input separation": About(
        "share of the variance of the experts' inputs that lies between first-choice experts",
        "(G - 1) / (M - 1) for G experts used: a choice made at random", "near its null: arbitrary routing",
    ),
    "switching": About(
        "1 - |S_t ∩ S_t+1| / K, mean over neighbouring tokens of a sequence",
        "independent neighbours: 1 - sum_e q_e^2 / K, q_e the share of tokens that expert e serves",
        "low: stays with its experts",
    ),
    "co-activation": About(
        "largest n_ab / min(n_a, n_b) over pairs: how often the rarer comes with the other",
        "that pair chosen independently: (K - 1) q_b / (K - q_a), a the rarer; the largest lies above",
        "1: two experts always run together",
    ),
    "follows scores": About(
        "share of filled slots among the K best of the router's scores",
        "1: the dispatch is what the router prefers", "below 1: bias, groups, capacity or a fault decide",
    ),
    "answers alike": About(
        "mean cosine of two experts' answers to the same tokens, each expert's mean removed",
        "the same with tokens unpaired", "1: the experts compute the same",
    ),
    "answers alike, by use": About(
        "the same, each pair weighted by the product of its loads", "the same with tokens unpaired",
        "1: the experts in use compute the same",
    ),
    "weights alike": About(
        "mean cosine of two experts' weights", "0: independent; copies start at 1", "1: copies",
    ),
    "mixture error": About(
        "norm of (sum_k weight x answer - output) over the norm of the output", "0",
        "above rounding: what was observed does not explain the block",
    ),
}  # fmt: skip


def load(state: BlockState) -> Tensor:
    """[E], sums to 1: share of the slots, or of the weight where every token uses all experts."""
    soft = state.num_slots == state.num_experts and bool((state.count_E == state.count_E.max()).all())
    total_E = state.weight_E if soft else state.count_E
    return total_E / total_E.sum().clamp(min=1e-30)


def routing_measures(state: BlockState, seed: int = 0) -> dict[str, Value]:
    """What the tables say."""
    num_experts, slots_K = state.num_experts, max(state.num_slots, 1)
    num_tokens = float(state.tokens)
    served = float(state.tokens - state.dropped)
    if served < 1:
        nothing = {"dropped": Value(1.0 if num_tokens else math.nan, 0.0)}
        return {name: nothing.get(name, Value(math.nan, math.nan)) for name in ABOUT}
    load_E = load(state)
    soft = slots_K == num_experts
    slots = float(state.slots)
    entropy = float(torch.special.entr(load_E).sum())
    mean_E = state.weight_E / served
    marginal, per_token = float(torch.special.entr(mean_E).sum()), float(state.entropy) / served
    used = state.first_E if soft else state.count_E
    q_E = state.count_E / served
    found = {
        "effective experts": Value(
            math.exp(entropy), math.exp(max(math.log(num_experts) - (num_experts - 1) / (2 * slots), 0.0))
        ),
        "never chosen": Value(
            float((used == 0).sum()), num_experts * (1 - (1 if soft else slots_K) / num_experts) ** served
        ),
        "largest load": Value(float(load_E.max()), 1 / num_experts),
        "dropped": Value(float(state.dropped) / num_tokens, 0.0),
        "unfilled": Value(1 - slots / (num_tokens * slots_K), 0.0),
        "H(E)": Value(marginal, math.log(num_experts)),
        "H(E|x)": Value(per_token, math.log(slots_K)),
        "I(x;E)": Value(max(marginal - per_token, 0.0), 0.0),
        "I(c;E)": class_information(state, seed),
        "input separation": input_separation(state),
        "switching": Value(math.nan, math.nan),
        "co-activation": Value(math.nan, math.nan),
        "follows scores": Value(math.nan, math.nan),
    }
    if pairs := float(state.pairs):
        p_E = state.first_E / served
        found["switching"] = (
            Value(1 - float(state.first_same) / pairs, 1 - float(p_E.square().sum()))
            if soft
            else Value(1 - float(state.overlap) / pairs, 1 - float(q_E.square().sum()) / slots_K)
        )
    if 1 < slots_K < num_experts:
        rarer_EE = torch.minimum(state.count_E[:, None], state.count_E[None]).clamp(min=1)
        often_EE = (state.together_EE / rarer_EE).fill_diagonal_(0)
        a, b = divmod(int(often_EE.argmax()), num_experts)
        rarer, other = sorted((float(q_E[a]), float(q_E[b])))
        chance = (slots_K - 1) * other / (slots_K - rarer)
        found["co-activation"] = Value(float(often_EE[a, b]), chance)
    if scored := float(state.scored):
        found["follows scores"] = Value(float(state.followed) / scored, 1.0)
    return found


def input_separation(state: BlockState) -> Value:
    count, groups = float(state.read_E.sum()), int((state.read_E > 0).sum())
    if state.inputs_ED is None or count < 3 or groups < 1:
        return Value(math.nan, math.nan)
    sums_ED = state.inputs_ED[:-1].double()
    middle = float(sums_ED.sum(0).square().sum()) / count
    between = float((sums_ED.square().sum(1) / state.read_E.clamp(min=1)).sum()) - middle
    total = float(state.squares) - middle
    return Value(between / total if total > 0 else math.nan, (groups - 1) / (count - 1))


def class_information(state: BlockState, seed: int = 0) -> Value:
    """I(c;E) over slots, and its mean with labels permuted (Monte Carlo from the tokens kept)."""
    if not len(state.class_key):
        return Value(math.nan, math.nan)
    classes_C, table_CE = state.class_table()
    if len(classes_C) < 2:
        return Value(math.nan, math.nan)
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
    exact = num_tokens == len(label_M)  # every token was kept: a true permutation
    for _ in range(draws):
        if exact:
            drawn, labels_N = torch.randperm(num_tokens, generator=generator), label_M
        else:  # as many tokens of each class, their experts drawn from those kept
            drawn = torch.randint(len(label_M), (num_tokens,), generator=generator)
            labels_N = classes_C.repeat_interleave(size_C)
        experts_NK = chosen_MK[drawn]
        key = (labels_N[:, None] * state.num_experts + experts_NK)[experts_NK >= 0]
        total += information(*counted(key), state.num_experts)
    return Value(value, total / draws)


def information(key: Tensor, count: Tensor, num_experts: int) -> float:
    """Mutual information in nats of a sparse table of (class, expert) counts."""
    p = count / count.sum()
    _, row = (key // num_experts).unique(return_inverse=True)
    column = key % num_experts
    p_row = torch.zeros(int(row.max()) + 1, dtype=torch.float64).index_add_(0, row, p)
    p_column = torch.zeros(num_experts, dtype=torch.float64).index_add_(0, column, p)
    return float((p * (p / (p_row[row] * p_column[column])).log()).sum())


@torch.no_grad()
def expert_measures(block: Block) -> dict[str, Value]:
    """What the experts compute: their answers to a few tokens that the block read, and their weights."""
    nothing = Value(math.nan, math.nan)
    found = {
        "answers alike": nothing,
        "answers alike, by use": nothing,
        "weights alike": nothing,
        "mixture error": Value(block.mixture_error, 0.0),
    }
    if block.adapter.num_experts < 2:
        return found
    if block.alike is not None and block.examined > 2:
        load_E = load(block.state).to(block.alike[0])
        values, nulls = (_pair_means(cosine_EE, load_E) for cosine_EE in block.alike)
        found["answers alike"] = Value(values[0], nulls[0])
        found["answers alike, by use"] = Value(values[1], nulls[1])
    inner_EE: Tensor | float = 0.0
    for weight in block.adapter.expert_weights():
        flat_EP = some_entries(weight).float()
        inner_EE = inner_EE + flat_EP @ flat_EP.T
    if isinstance(inner_EE, Tensor):
        norm_E = inner_EE.diagonal().clamp(min=1e-30).sqrt()
        found["weights alike"] = Value(_pair_means(inner_EE / norm_E / norm_E[:, None], norm_E)[0], 0.0)
    return found


def _pair_means(cosine_EE: Tensor, load_E: Tensor) -> tuple[float, float]:
    """Mean over pairs of different experts: plain, and weighted by the product of their loads."""
    off_EE = cosine_EE.clone().fill_diagonal_(0)
    num_experts, total = len(off_EE), float(load_E.sum() ** 2 - load_E.square().sum())
    plain = float(off_EE.sum()) / (num_experts * (num_experts - 1))
    return plain, float(load_E @ off_EE @ load_E) / total if total > 1e-12 else math.nan


def balance_losses(states: list[BlockState]) -> dict[str, float]:
    """What a load-balancing loss is, as published and with each of its usual mistakes.

    E sum_e f_e P_e per block (Fedus et al. 2022, eq. 4; f_e = share of slots), mean over blocks.
    """
    states = [s for s in states if float(s.scored)]
    if not states:
        return {}

    def one(count_E: Tensor, score_E: Tensor) -> float:
        f_E, p_E = count_E / count_E.sum(), score_E / score_E.sum()
        return len(f_E) * float((f_E * p_E).sum())

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    num_slots, same = states[0].num_slots, len({s.num_experts for s in states}) == 1
    right = mean([one(s.count_E, s.score_E) for s in states])
    found = {
        "as published, mean over blocks": right,
        "padding counted": mean([one(s.count_all_E, s.score_all_E) for s in states]),
        "softmax applied twice": mean([one(s.count_E, s.twice_E) for s in states]),
        "summed over blocks": right * len(states),
        "constant": 1.0,
    }
    if same:
        count_E = torch.stack([s.count_E for s in states]).sum(0)
        score_E = torch.stack([s.score_E for s in states]).sum(0)
        all_E = torch.stack([s.count_all_E for s in states]).sum(0)
        score_all_E = torch.stack([s.score_all_E for s in states]).sum(0)
        found["blocks pooled before the product"] = one(count_E, score_E)
        found["blocks pooled, padding counted"] = one(all_E, score_all_E)
    if num_slots > 1:
        found |= {f"{name}, times K": value * num_slots for name, value in found.items()}
    return found


def explain_balance_loss(states: list[BlockState], value: float, rtol: float = 1e-3) -> list[str]:
    """The formulas that give this value on the same tokens, nearest first; the right one is named first."""
    close = {
        name: abs(value - expected) / max(abs(expected), 1e-12)
        for name, expected in balance_losses(states).items()
    }
    return sorted(
        (name for name, off in close.items() if off <= rtol),
        key=lambda name: (close[name] > 1e-6, name != "as published, mean over blocks"),
    )
