"""Measures of a block against loops over tokens in Python, and their nulls against simulation.

Shapes: N tokens, K slots, B sequences, T positions, E experts, C classes.
"""

import itertools
import random
from collections import Counter

import pytest
import reference_panel
import torch
from torch import nn

from moe_lib.inspect import Adapter, Dispatch, inspect_moe, rows
from moe_lib.inspect.measures import balance_losses, explain_balance_loss, information, routing_measures
from moe_lib.inspect.state import BlockState, Place

E, K, B, T, C = 5, 2, 6, 9, 3
N = B * T


def planted(seed=0, num_slots=K, drop=0.15, pad=0.2):
    draw = torch.Generator().manual_seed(seed)
    favourite_E = torch.rand(E, generator=draw)
    indices_NK = (torch.rand(N, E, generator=draw) + favourite_E).argsort(1, descending=True)[:, :num_slots]
    weights_NK = torch.rand(N, num_slots, generator=draw) + 0.1
    lost_NK = torch.rand(N, num_slots, generator=draw) < drop
    indices_NK, weights_NK = indices_NK.masked_fill(lost_NK, -1), weights_NK.masked_fill(lost_NK, 0)
    valid_N = torch.rand(N, generator=draw) > pad
    labels_N = torch.randint(-1, C, (N,), generator=draw)
    return indices_NK, weights_NK, valid_N, labels_N, torch.randn(N, 4, generator=draw)


def follows(num_sequences, length):
    """Is the next token the successor of this one? [N]"""
    return torch.arange(num_sequences * length) % length != length - 1


def seen_by_state(parts=1, **options):
    indices_NK, weights_NK, valid_N, labels_N, tokens_ND = planted(**options)
    state = BlockState(E)
    rows_each = B // parts
    for part in range(parts):
        cut = slice(part * rows_each * T, (part + 1) * rows_each * T)
        place = Place(valid_N[cut], labels_N[cut], torch.arange(N)[cut], follows(rows_each, T))
        state.update(Dispatch(tokens_ND[cut], indices_NK[cut], weights_NK[cut]), place)
    return state.finish()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_measures_are_the_loops(seed, parts):
    found = routing_measures(seen_by_state(parts, seed=seed))
    indices_NK, weights_NK, valid_N, labels_N, tokens_ND = planted(seed)
    index_NK = indices_NK.where(indices_NK >= 0, E)
    weight_NE = torch.zeros(N, E + 1).scatter(1, index_NK, weights_NK)[:, :E]
    given = weight_NE > 0, weight_NE, labels_N, follows(B, T), valid_N, tokens_ND
    for name, value in reference_panel.measures(*given)[1].items():
        assert found[name].value == pytest.approx(value, rel=1e-5), name


def test_ranks_add_up():
    """Two halves merged are the whole."""
    whole = seen_by_state(1)
    indices_NK, weights_NK, valid_N, labels_N, tokens_ND = planted()
    halves = []
    for cut in (slice(0, N // 2), slice(N // 2, N)):
        state = BlockState(E)
        place = Place(valid_N[cut], labels_N[cut], torch.arange(N)[cut], follows(B // 2, T))
        state.update(Dispatch(tokens_ND[cut], indices_NK[cut], weights_NK[cut]), place)
        halves.append(state.finish())
    halves[0].merge(halves[1])
    for name, value in routing_measures(whole).items():
        merged = routing_measures(halves[0])[name].value
        rel = 0.5 if name == "separation beyond chance" else 1e-5  # from pairs of tokens of one call
        assert merged == pytest.approx(value.value, rel=rel, nan_ok=True), name


def test_random_routing_lies_at_its_nulls():
    """Choices that ignore everything: every measure with a null of chance agrees with it."""
    draw = torch.Generator().manual_seed(3)
    size = 4000
    indices_NK = torch.rand(size, 8, generator=draw).argsort(1)[:, :2]
    labels_N = torch.randint(0, 40, (size,), generator=draw)
    place = Place(None, labels_N, torch.arange(size), follows(40, 100))
    state = BlockState(8)
    tokens_ND = torch.randn(size, 16, generator=draw)
    state.update(Dispatch(tokens_ND, indices_NK, torch.rand(size, 2, generator=draw) + 0.5), place)
    found = routing_measures(state.finish())
    assert found["I(c;E)"].value == pytest.approx(found["I(c;E)"].null, rel=0.12)
    assert found["switching"].value == pytest.approx(found["switching"].null, abs=0.01)
    assert found["effective experts"].value == pytest.approx(found["effective experts"].null, rel=2e-3)
    assert found["input separation"].value < 3 * found["input separation"].null + 1e-3
    assert found["co-activation"].value == pytest.approx(found["co-activation"].null, abs=0.04)


def test_information_null_is_the_permutation():
    """Against relabelling in plain Python."""
    state = seen_by_state()
    indices_NK, _, valid_N, labels_N, _ = planted()
    units = [
        (int(labels_N[n]), [int(e) for e in indices_NK[n] if e >= 0])
        for n in range(N)
        if valid_N[n] and labels_N[n] >= 0 and (indices_NK[n] >= 0).any()
    ]
    draws, rng = [], random.Random(0)
    for _ in range(300):
        labels = [c for c, _ in units]
        rng.shuffle(labels)
        joint = Counter((c, e) for c, (_, chosen) in zip(labels, units, strict=True) for e in chosen)
        key = torch.tensor([c * E + e for c, e in joint])
        draws.append(information(key, torch.tensor([*joint.values()], dtype=torch.float64), E))
    mean = sum(draws) / len(draws)
    spread = (sum((d - mean) ** 2 for d in draws) / len(draws)) ** 0.5
    assert routing_measures(state)["I(c;E)"].null == pytest.approx(mean, abs=4 * spread / 5**0.5)


def test_many_classes_stay_sparse():
    state = BlockState(8)
    draw = torch.Generator().manual_seed(0)
    joint = Counter()
    for _ in range(4):
        labels_N = torch.randint(0, 50_000, (3000,), generator=draw)
        indices_N1 = torch.randint(0, 8, (3000, 1), generator=draw)
        joint.update(zip(labels_N.tolist(), indices_N1.flatten().tolist(), strict=True))
        state.update(
            Dispatch(torch.randn(3000, 2), indices_N1, torch.ones(3000, 1)), Place(labels_N=labels_N)
        )
    state.finish()
    assert len(state.class_key) == len(joint)
    assert dict(zip(state.class_key.tolist(), state.class_count.tolist(), strict=True)) == {
        c * 8 + e: m for (c, e), m in joint.items()
    }


# ------------------------------------------------------------------------- what the experts compute


class Linears(nn.Module):
    def __init__(self, weights_EDO, logits_E=None):
        super().__init__()
        self.stacked = nn.Parameter(weights_EDO)
        self.logits_E = torch.zeros(len(weights_EDO)) if logits_E is None else logits_E

    def forward(self, x_ND):
        weight_NK, index_NK = (self.logits_E + 0.01 * x_ND[:, : len(self.stacked)]).softmax(1).topk(2, 1)
        self.chosen = weight_NK, index_NK
        return torch.einsum("nd,nkdo,nk->no", x_ND, self.stacked[index_NK], weight_NK)


class LinearsAdapter(Adapter):
    classes = ("Linears",)

    def dispatch(self, call):
        weight_NK, index_NK = self.block.chosen
        return Dispatch(rows(call.tokens), index_NK, weight_NK, rows(call.output))

    def answer(self, e, tokens_MD):
        return tokens_MD @ self.block.stacked[e]


def test_alike_experts_are_seen_by_answers_and_weights():
    torch.manual_seed(0)
    base_DO = torch.randn(16, 16)
    x_ND = torch.randn(200, 16)
    same = inspect_moe(Linears(base_DO.repeat(4, 1, 1)), [x_ND], adapters=[LinearsAdapter])[0]
    other = inspect_moe(Linears(torch.randn(4, 16, 16)), [x_ND], adapters=[LinearsAdapter])[0]
    assert same["answers alike"] == pytest.approx(1)
    assert same["weights alike"] == pytest.approx(1)
    assert abs(other["answers alike"]) < 0.15
    assert abs(other["weights alike"]) < 0.15
    assert abs(same.measures["answers alike"].null) < 0.15
    assert same.notes == ["experts' answers and the mixture: from a sample of 64 tokens"]


class Residual(nn.Module):
    """Experts x + f(x); the fs share some of their weights."""

    def __init__(self, common, scale):
        super().__init__()
        torch.manual_seed(0)
        self.stacked = nn.Parameter(torch.randn(4, 16, 16))
        with torch.no_grad():
            self.stacked.copy_(scale * torch.lerp(self.stacked, self.stacked[:1], common))

    def forward(self, x_ND):
        weight_NK, index_NK = x_ND[:, :4].softmax(1).topk(2, 1)
        self.chosen = weight_NK, index_NK
        answers_NKO = torch.einsum("nd,nkdo->nko", x_ND, self.stacked[index_NK]).tanh() + x_ND[:, None]
        return (answers_NKO * weight_NK[..., None]).sum(1)


class ResidualAdapter(LinearsAdapter):
    classes = ("Residual",)

    def answer(self, e, tokens_MD):
        return tokens_MD + (tokens_MD @ self.block.stacked[e]).tanh()


@pytest.mark.parametrize("scale", [0.03, 0.3])  # of what is added
@pytest.mark.parametrize("common", [0.0, 0.8, 1.0])
def test_experts_that_pass_their_input_on_are_judged_by_what_they_add(common, scale):
    model, x_ND = Residual(common, scale), torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    panel = inspect_moe(model, [x_ND], adapters=[ResidualAdapter])
    added = [(x_ND @ w).tanh().detach() for w in model.stacked]
    added = [(f_NO - f_NO.mean(0)).flatten() for f_NO in added]
    pairs = [torch.cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(added, 2)]
    assert panel[0]["answers alike"] == pytest.approx(float(sum(pairs) / len(pairs)), abs=0.07)
    assert ("alike" in {alarm.kind for alarm in panel.alarms}) == (common > 0)
    assert any("experts pass on what they read" in note for note in panel[0].notes)


def test_experts_that_add_nothing_to_their_input_are_alike():
    panel = inspect_moe(Residual(1.0, 0.0), [torch.randn(64, 16)], adapters=[ResidualAdapter])
    assert panel[0]["answers alike"] == pytest.approx(1)


def test_an_idle_expert_does_not_count_as_a_different_one():
    """Two experts in use that are copies, two idle ones that are not: by use they are alike."""
    torch.manual_seed(0)
    weights_EDO = torch.randn(4, 16, 16)
    weights_EDO[1] = weights_EDO[0]
    layer = inspect_moe(
        Linears(weights_EDO, torch.tensor([9.0, 9.0, 0.0, 0.0])),
        [torch.randn(200, 16)],
        adapters=[LinearsAdapter],
    )[0]
    assert layer["answers alike, by use"] == pytest.approx(1)
    assert layer["answers alike"] < 0.5


# ------------------------------------------------------------------------------ load-balancing loss


def states_with_scores():
    states = []
    draw = torch.Generator().manual_seed(5)
    for _ in range(2):
        scores_NE = torch.randn(40, 4, generator=draw) + torch.tensor([1.0, 0, 0, -1])
        index_NK = scores_NE.topk(2, 1).indices
        state = BlockState(4)
        place = Place(valid_N=torch.arange(40) < 30)
        state.update(Dispatch(torch.randn(40, 3), index_NK, torch.ones(40, 2), None, scores_NE), place)
        states.append((state.finish(), scores_NE, index_NK))
    return states


def switch_loss(scores_NE, index_NK):
    f_E = index_NK.flatten().bincount(minlength=4) / index_NK.numel()
    return float(4 * (f_E * scores_NE.softmax(1).mean(0)).sum())


def test_the_balance_loss_and_its_usual_mistakes():
    given = states_with_scores()
    states = [s for s, _, _ in given]
    right = sum(switch_loss(scores[:30], index[:30]) for _, scores, index in given) / 2
    padded = sum(switch_loss(scores, index) for _, scores, index in given) / 2
    twice = sum(switch_loss(scores[:30].softmax(1), index[:30]) for _, scores, index in given) / 2
    pooled = switch_loss(*(torch.cat([g[i][:30] for g in given]) for i in (1, 2)))
    expected = {
        "as published, mean over blocks": right,
        "padding counted": padded,
        "softmax applied twice": twice,
        "summed over blocks": 2 * right,
        "blocks pooled before the product": pooled,
        "as published, mean over blocks, times K": 2 * right,
        "constant": 1.0,
    }
    found = balance_losses(states)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
        assert name in explain_balance_loss(states, value)
    assert explain_balance_loss(states, 17.3) == []
