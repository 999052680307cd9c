"""Nothing is silently wrong: odd blocks are counted truly, or the panel says why they are not.

Shapes: N tokens, M read by an expert, K slots, D width, E experts, C capacity, B sequences, T positions.
"""

import copy
import io
import math
import random
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from list_moes import Block, D, E, counts, looked, tokens
from torch import nn
from torch.nn import functional as F

from moe_lib import MoE
from moe_lib.inspect import CollapseCallback, Watch, inspect_moe, watch
from moe_lib.inspect.__main__ import main


def read(model, x=None):
    (layer,) = inspect_moe(nn.Sequential(model), [tokens() if x is None else x]).layers
    return layer


def kinds(panel):
    return {alarm.kind for alarm in panel.alarms}


def dense(block, weight_NE, x_ND):
    """Every expert reads every token."""
    return sum(weight_NE[:, e, None] * expert(x_ND) for e, expert in enumerate(block.experts))


# ------------------------------------------------------------------------------- collapsed for good


def one_expert(name, gate="gate"):
    """All tokens go to the first expert with weight 1."""

    def forward(self, x_ND):
        return self.nets[0](x_ND) * getattr(self, gate)(x_ND[:1]).numel() / E

    kind = type(name, (nn.Module,), {"forward": forward})
    model = kind()
    model.nets = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
    setattr(model, gate, nn.Linear(D, E))
    return model


@pytest.mark.parametrize("name", ["MoEFeedForward", "MoeMLP", "SwitchFFN", "Unheard"])
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_with_all_weight_on_one_expert_is_read(name, training):
    model = nn.Sequential(one_expert(name))
    panel = looked(model, tokens())[0] if training else inspect_moe(model, [tokens()])
    assert panel[0].load_E == [1.0, 0.0, 0.0, 0.0]
    assert kinds(panel) == {"collapsed", "dead", "blind"}


def test_constant_weights_without_a_known_gate_are_named():
    panel = inspect_moe(nn.Sequential(Block(), one_expert("Unheard", gate="picks")), [tokens()])
    assert [layer.name for layer in panel.layers] == ["0"]
    assert "1 (Unheard): every token gets the same weights" in panel.unread[0]


# ------------------------------------------------------------- how many experts a token has, and which


class Threshold(Block):
    """As many experts as have a positive score; the last is never the best of them."""

    def forward(self, x_ND):
        least_E, most_E = torch.tensor([0.02, 0.0, 0.0, 0.0]), torch.tensor([9.0, 9.0, 9.0, 0.01])
        self.weight_NE = (self.gate(x_ND) + torch.tensor([1.0, 1.0, 1.0, 0.0])).clamp(least_E, most_E)
        return dense(self, self.weight_NE, x_ND)


class ExpertChoice(Block):
    """Each expert takes three quarters of the tokens."""

    def forward(self, x_ND):
        gate_NE = (self.gate(x_ND) + torch.tensor([3.0, 0, 0, 0])).softmax(-1)
        token_CE = gate_NE.topk(3 * len(x_ND) // 4, 0).indices
        self.weight_NE = torch.zeros_like(gate_NE).scatter(0, token_CE, gate_NE.gather(0, token_CE))
        return dense(self, self.weight_NE, x_ND)


@pytest.mark.parametrize("kind", [Threshold, ExpertChoice])
def test_experts_of_tokens_with_any_number_are_counted(kind):
    model = kind()
    panel = inspect_moe(nn.Sequential(model), [tokens()])
    served_E = (model.weight_NE > 0).sum(0)
    assert (model.weight_NE > 0).all(1).any()  # some token has all experts, and not every one
    assert not (model.weight_NE > 0).all()
    assert panel[0].load_E == pytest.approx((served_E / served_E.sum()).tolist())
    assert "dead" not in kinds(panel)


class Soft(Block):
    """All experts for all tokens; the third has a share of the weight, but never the largest."""

    def __init__(self, third):
        super().__init__()
        self.third = third

    def forward(self, x_ND):
        most_N = (self.gate(x_ND)[:, 0] > 0).float()
        rest_N = torch.full_like(most_N, self.third)
        self.weight_NE = torch.stack([0.4 * most_N + 0.1, 0.5 - 0.4 * most_N, rest_N, 0.4 - rest_N], 1)
        return dense(self, self.weight_NE, x_ND)


@pytest.mark.parametrize(("third", "idle"), [(0.2, 0), (0.01, 1)])
def test_an_expert_with_weight_in_every_token_is_not_dead(third, idle):
    model = Soft(third)
    panel = inspect_moe(nn.Sequential(model), [tokens()])
    assert panel[0].load_E == pytest.approx(model.weight_NE.mean(0).tolist())
    assert panel[0]["never chosen"] == idle
    assert [a.what for a in panel.alarms if a.kind == "dead"] == [
        "1 of 4 experts have hardly any weight"
    ] * idle


# ---------------------------------------------------------------------------------- several outputs


class Tasks(Block):
    """Two gates: the first task uses half of the experts, the second the other half."""

    def forward(self, x_ND):
        high_E = torch.tensor([9.0, 9.0, -9.0, -9.0])
        weights = [(self.gate(x_ND) + sign * high_E).softmax(-1) for sign in (1, -1)]
        self.weight_NE, answer_NED = sum(weights), torch.stack([expert(x_ND) for expert in self.experts], 1)
        return [torch.einsum("ne,ned->nd", weight_NE, answer_NED) for weight_NE in weights]


class ScoresFirst(Block):
    def forward(self, x_ND):
        return self.gate(x_ND), super().forward(x_ND)


class Takes(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x_ND):
        return self.block(x_ND)[-1]


def test_mixtures_of_several_tasks_are_added_up():
    model = Takes(Tasks())
    panel = inspect_moe(model, [tokens()], causal=True, loss=lambda output, *_: output.mean())
    layer = panel[0]
    assert layer.load_E == pytest.approx((model.block.weight_NE.mean(0) / 2).tolist(), abs=1e-6)
    assert layer["mixture error"] < 1e-5
    assert "it returns 2 mixtures of its experts: their weights are added up" in layer.notes
    assert math.isnan(layer["cost of permuting"])


@pytest.mark.parametrize("training", [False, True])
def test_the_output_with_the_answers_is_the_mixture(training):
    model = Takes(ScoresFirst())
    panel = looked(model, tokens())[0] if training else inspect_moe(model, [tokens()])
    assert panel[0].state.count_E.tolist() == counts(model.block)
    assert panel[0]["mixture error"] < 1e-5
    costs = inspect_moe(model, [tokens()], causal=True, loss=lambda output, *_: output.square().mean())
    assert costs[0]["cost of permuting"] != 0


# ------------------------------------------------------------------------- blocks that change themselves


class Slots:
    __slots__ = ("__weakref__", "bias", "last")

    def __init__(self):
        self.bias = torch.zeros(E)


@dataclass(frozen=True, slots=True)
class Frozen:
    """Of a class that forbids setting attributes; it holds itself."""

    load_E: torch.Tensor
    others: list


ELSEWHERE = SimpleNamespace(bias=torch.zeros(E))


class Balanced(Block):
    """A bias against the load, changed in each training step; held by a buffer, or by another object."""

    def __init__(self, held):
        super().__init__()
        self.bias = nn.Buffer(torch.zeros(E))
        self.statistics = {"object": SimpleNamespace(bias=torch.zeros(E)), "slots": Slots()}.get(held)
        self.held = held

    def forward(self, x_ND):
        holder = ELSEWHERE if self.held == "global" else self.statistics or self
        weight_NE = self.gate(x_ND).softmax(-1)
        self.chosen = (weight_NE + holder.bias).topk(2, -1).indices
        holder.bias = holder.bias - 0.3 * (self.chosen.flatten().bincount(minlength=E) / len(x_ND) - 0.5)
        out_ND = torch.zeros_like(x_ND)
        for e, expert in enumerate(self.experts):
            row = (self.chosen == e).any(1).nonzero().flatten()
            out_ND = out_ND.index_add(0, row, expert(x_ND[row]) * weight_NE[row, e, None])
        return out_ND


@pytest.mark.parametrize("held", ["buffer", "object", "slots"])
def test_a_bias_that_training_moves_is_that_of_the_step(held):
    model = nn.Sequential(Balanced(held)).train()
    with watch(model, every=1) as w:
        for step in range(4):
            model(tokens(seed=step)).sum().backward()
            assert w.panel()[0].state.count_E.tolist() == counts(model[0])
            assert w.panel()[0]["mixture error"] < 1e-5


def test_a_state_that_cannot_be_taken_back_is_named():
    panel, _ = looked(nn.Sequential(Balanced("global")), tokens(), tokens(seed=1))
    assert panel.layers == []
    assert "it keeps a state that its modules do not hold" in panel.unread[0]


class Statistics:
    """A helper that is no module: tensors, an array, counters and random generators."""

    def __init__(self):
        self.load_E, self.calls, self.history, self.totals = torch.zeros(E), 0, [], [torch.zeros(())]
        self.array_E, self.draw = np.zeros(E), torch.Generator().manual_seed(0)
        self.frozen = Frozen(torch.zeros(E), [self])
        self.others = np.random.default_rng(0), random.Random(0)

    def update(self, chosen_NK):
        self.load_E += chosen_NK.flatten().bincount(minlength=E)
        self.array_E += 1
        self.totals[0] += 1
        self.frozen.load_E.add_(1)
        self.calls += 1
        self.history.append(
            [*torch.rand(2, generator=self.draw), self.others[0].random(), self.others[1].random()]
        )


class Counting(Block):
    def __init__(self):
        super().__init__()
        self.statistics = Statistics()

    def forward(self, x_ND):
        output_ND = super().forward(x_ND)
        self.statistics.update(self.chosen)
        return output_ND


@pytest.mark.parametrize("how", ["watch", "inspect", "causal"])
def test_helper_objects_are_those_of_an_unwatched_model(how):
    found = []
    for looked_at in (False, True):
        model = nn.Sequential(Counting(), Counting()).train()
        if not looked_at:
            model(tokens())
        elif how == "watch":
            looked(model, tokens())
        else:
            inspect_moe(model, [tokens()], causal=how == "causal", loss=lambda out, *_: out.square().mean())
        found.append(
            [
                (*s.load_E, s.calls, *s.totals, *s.frozen.load_E, s.history, *s.array_E)
                for s in (b.statistics for b in model)
            ]
        )
    assert found[0] == found[1]
    assert found[0][0][4] == 1  # calls


# -------------------------------------------------------------------------------------- false alarms


class Buffers(Block):
    """Experts read all tokens, those of others set to zero; or buffers of N rows; or scaled tokens."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x_ND):
        weight_NE = self.gate(x_ND).softmax(-1)
        inside_NE = weight_NE >= weight_NE.topk(2, -1).values[:, 1:]
        self.weight_NE, out_ND = weight_NE * inside_NE, torch.zeros_like(x_ND)
        for e, expert in enumerate(self.experts):
            inside_N1 = inside_NE[:, e, None]
            if self.kind == "one-hot":
                slot_NC = F.one_hot((inside_N1[:, 0].cumsum(0) - 1).clamp(min=0), len(x_ND)) * inside_N1
                out_ND = out_ND + slot_NC.float() @ expert(slot_NC.float().T @ x_ND) * weight_NE[:, e, None]
            else:
                scale_N1 = inside_N1 * (weight_NE[:, e, None] if self.kind == "scaled" else 1.0)
                out_ND = out_ND + expert(x_ND * scale_N1) * self.weight_NE[:, e, None]
        return out_ND


@pytest.mark.parametrize("kind", ["masked", "one-hot", "scaled"])
def test_what_experts_read_of_full_buffers(kind):
    model = Buffers(kind)
    panel = inspect_moe(nn.Sequential(model), [tokens()])
    assert panel[0].state.count_E.tolist() == (model.weight_NE > 0).sum(0).tolist()
    assert panel.alarms == []
    if kind == "scaled":
        assert "which tokens the experts read is not known" in panel[0].explanation
        assert math.isnan(panel[0]["input separation"])
    else:
        assert panel[0]["mixture error"] < 1e-5
        assert panel[0]["input separation"] == pytest.approx(read(Same(model))["input separation"], rel=1e-5)


class Same(Block):
    """The same experts, each reading its tokens alone."""

    def __init__(self, other):
        super().__init__()
        self.gate, self.experts = other.gate, other.experts


class WithPath(Block):
    """Beside the mixture something that all tokens take."""

    def __init__(self, name, gated=False):
        super().__init__()
        setattr(self, name, nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)))
        self.name, self.switch = name, nn.Linear(D, 1) if gated else None

    def forward(self, x_ND):
        share_N1 = 2.0 if self.switch is None else self.switch(x_ND).sigmoid()
        return super().forward(x_ND) + share_N1 * getattr(self, self.name)(x_ND)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["shared", "dense", "residual_mlp", "anything"])
def test_a_path_of_any_name_beside_the_mixture_is_found(name, gated):
    panel = inspect_moe(nn.Sequential(WithPath(name, gated)), [tokens()])
    assert f"the mixture and the answer of its {name!r}" in panel[0].explanation
    assert panel.alarms == []


@pytest.mark.parametrize("num_tokens", [4, 8, 16, 32, 64])
def test_few_tokens_raise_no_alarm(num_tokens):
    for seed in range(10):
        torch.manual_seed(seed)
        model = MoE(D, E, 8, top_k=2)
        assert "arbitrary" not in kinds(inspect_moe(model, [tokens(num_tokens, seed)]))


class Dropping(Block):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x_ND):
        return self.dropout(super().forward(x_ND))


@pytest.mark.parametrize("training", [False, True])
def test_dropout_on_the_output_is_no_fault(training):
    model = nn.Sequential(Dropping())
    panel = looked(model, tokens())[0] if training else inspect_moe(model, [tokens()])
    assert panel.alarms == []
    assert ("not checked: dropout acts" in panel[0].explanation) == training


class Centres(nn.Module):
    def __init__(self):
        super().__init__()
        self.centre_ED = nn.Parameter(torch.randn(E, D))

    def forward(self, x_ND):
        return torch.cdist(x_ND, self.centre_ED)


class Nearest(Block):
    """A router that returns distances; or the same, and the farthest is chosen of scores around 0."""

    def __init__(self, scores):
        super().__init__()
        self.gate = Centres() if scores == "distances" else nn.Linear(D, E)

    def forward(self, x_ND):
        chosen_N = self.gate(x_ND).argmin(-1)
        return dense(self, F.one_hot(chosen_N, E).float(), x_ND)


@pytest.mark.parametrize("scores", ["distances", "logits"])
def test_the_lowest_of_distances_is_the_best(scores):
    panel = inspect_moe(nn.Sequential(Nearest(scores)), [tokens()])
    assert panel[0]["follows scores"] == (scores == "distances")
    assert ("overridden" in kinds(panel)) == (scores == "logits")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x_BTD):
        return self.inner(x_BTD, x_BTD, x_BTD, need_weights=False)[0]


class Recurrent(nn.GRU):
    """Its answer is not contiguous, as after a convolution."""

    def forward(self, x_BTD):
        return super().forward(x_BTD)[0].transpose(1, 2).contiguous().transpose(1, 2)


class Sequences(Block):
    """A gate for each sequence, experts that read whole ones."""

    def __init__(self, kind):
        self.kind = kind
        super().__init__()

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value) if name == "kind" else super().__setattr__(name, value)

    def expert(self):
        return Attention() if self.kind == "attention" else Recurrent(D, D, batch_first=True)

    def forward(self, x_BTD):
        weight_BE = (5 * self.gate(x_BTD.mean(1))).softmax(-1)
        self.weight_BE = weight_BE.detach()
        return sum(weight_BE[:, e, None, None] * expert(x_BTD) for e, expert in enumerate(self.experts))


@pytest.mark.parametrize("kind", ["attention", "recurrent"])
def test_experts_that_read_whole_sequences_are_checked_with_their_answers_of_one_call(kind):
    model = Sequences(kind)
    panel = inspect_moe(nn.Sequential(model), [tokens(320).view(32, 10, D)])
    assert panel[0].load_E == pytest.approx(model.weight_BE.mean(0).tolist(), abs=1e-5)
    assert panel[0].explanation == "the mixture of what was observed is the block's output"
    assert panel[0]["mixture error"] < 1e-5
    assert any("depends on the other tokens: the mixture was checked" in note for note in panel[0].notes)
    assert panel.alarms == []


# ------------------------------------------------------------------------------------ stacked weights


class Stack(nn.Module):
    """Weights [D, E, H] and [H, E, D]; the number of experts under a name, or none."""

    def __init__(self, count, num_experts=E):
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(torch.randn(D, E, 8)), nn.Parameter(torch.randn(8, E, D))
        if count:
            setattr(self, count, num_experts)

    def forward(self, x, indices, weights):
        out_ND = torch.zeros_like(x)
        for e in range(E):
            row, slot = torch.where(indices == e)
            answer = (x[row] @ self.w_in[:, e]).relu() @ self.w_out[:, e]
            out_ND = out_ND.index_add(0, row, answer * weights[row, slot, None])
        return out_ND


class Stacked(nn.Module):
    def __init__(self, *options):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, E), Stack(*options)

    def forward(self, x_ND):
        weight_NK, self.chosen = self.gate(x_ND).softmax(-1).topk(2, -1)
        return self.experts(x_ND, self.chosen, weight_NK)


@pytest.mark.parametrize("count", ["num_experts", "n_experts", "num_local_experts", "n_routed_experts"])
def test_the_number_of_stacked_experts_is_what_the_module_says(count):
    model = Stacked(count)
    layer = read(model)
    assert layer.state.count_E.tolist() == counts(model)
    assert math.isnan(layer["weights alike"])  # not along their first dimension


@pytest.mark.parametrize("options", [("",), ("num_experts", 2)])
def test_an_unclear_number_of_stacked_experts_is_refused(options):
    with pytest.raises(ValueError, match=r"its number of experts is not clear: \[8, 16\]"):
        inspect_moe(nn.Sequential(Stacked(*options)), [tokens()])


# -------------------------------------------------------------------------------------------- errors


class Fails(Block):
    def forward(self, x_ND):
        raise RuntimeError("my own error")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("model", "x", "said"), [
    (Block, torch.randn(8, D + 1), "shapes cannot be multiplied"),
    (Block, torch.randn(8, D).double(), "must have the same dtype"),
    (Fails, torch.randn(8, D), "my own error"),
])  # fmt: skip
def test_an_error_of_the_model_is_raised_as_it_is(model, x, said, training):
    with pytest.raises(RuntimeError, match=said):
        looked(nn.Sequential(model()), x) if training else inspect_moe(nn.Sequential(model()), [x])


class Bypassed(Block):
    def answer(self, e, x_MD):
        return self.experts[e].forward(x_MD)


def test_experts_that_hooks_do_not_see_are_named():
    with pytest.raises(ValueError, match=r"not called, or not through __call__: as expert\(x\)"):
        inspect_moe(nn.Sequential(Bypassed()), [tokens()])


def test_inference_mode_is_left_or_named():
    model = nn.Sequential(Block())
    with torch.inference_mode():
        panel = inspect_moe(model, [tokens()])
    assert panel[0].state.count_E.tolist() == counts(model[0])
    with pytest.raises(ValueError, match=r"inference mode hides .* use torch\.no_grad"):
        inspect_moe(model, [tokens()], run=torch.inference_mode()(model))


# ------------------------------------------------------------------------------------ masks and labels


B, T = 4, 6
IDS = torch.arange(B * T).view(B, T) % 9 + 1
MASK = (torch.arange(T) < torch.tensor([[6], [4], [2], [1]])).long()


class Language(nn.Module):
    """The first block reads the tokens; the second what `then` makes of them."""

    def __init__(self, then=lambda x_BTD: x_BTD):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.one, self.two, self.then = nn.Embedding(10, D), Block(), Block(), then

    def forward(self, input_ids, attention_mask=None):
        x_BTD = self.embed(input_ids)
        x_BTD = x_BTD + self.one(x_BTD.flatten(0, 1)).view_as(x_BTD)
        other = self.then(x_BTD)
        return self.two(other.flatten(0, -2)).view_as(other)


@pytest.mark.parametrize("labels", [None, "tokens"])
@pytest.mark.parametrize("then", [
    lambda x_BTD: F.pad(x_BTD, (0, 0, 1, 0)), lambda x_BTD: x_BTD.mean(1), lambda x_BTD: x_BTD[:, ::2],
])  # fmt: skip
def test_a_block_that_reads_other_tokens_stops_nothing(then, labels):
    model = Language(then)
    panel = inspect_moe(model, [{"input_ids": IDS, "attention_mask": MASK}], labels)
    assert [layer.num_tokens for layer in panel.layers] == [int(MASK.sum()), len(model.two.chosen)]
    assert any(note.startswith("padding [4, 6] cannot be told apart") for note in panel[1].notes)
    assert any(note.startswith("labels [4, 6]") for note in panel[1].notes) == (labels is not None)
    assert math.isnan(panel[1]["switching"])


@pytest.mark.parametrize("batch", [
    {"input_ids": IDS, "attention_mask": MASK}, ((IDS, MASK), IDS), ((IDS, MASK.bool()), IDS),
    ((IDS, MASK.float()), IDS), ((IDS, (MASK - 1) * 1e4), IDS), ((IDS, MASK.log()), IDS),
])  # fmt: skip
def test_padding_by_position_and_by_addition_is_not_counted(batch):
    model = Language()
    panel = inspect_moe(model, [batch], "tokens")
    for layer, block in zip(panel.layers, (model.one, model.two), strict=True):
        real = block.chosen[MASK.flatten().bool()]
        assert layer.state.count_E.tolist() == real.flatten().bincount(minlength=E).tolist()
        assert (layer.num_tokens, int(layer.state.padding)) == (len(real), B * T - len(real))
        assert len(layer.class_expert) == len(IDS[MASK.bool()].unique())


def test_masks_that_are_not_clear_are_refused():
    with pytest.raises(ValueError, match=r"attention_mask holds values from -1 to 1: give 1 for tokens"):
        inspect_moe(Language(), [{"input_ids": IDS, "attention_mask": 2 * MASK - 1}])
    with pytest.raises(ValueError, match="this one looks like a mask"):
        inspect_moe(Language(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IDS, MASK)))
    labels = IDS % 2  # not sorted: no mask
    assert set(inspect_moe(Language(), [(IDS, labels)])[0].class_expert) == {"0", "1"}


# -------------------------------------------------------------------------------------- odd structures


class Capacity(Block):
    """The first choices, as long as there is room."""

    def forward(self, x_ND):
        weight_NE, out_ND = self.gate(x_ND).softmax(-1), torch.zeros_like(x_ND)
        for e, expert in enumerate(self.experts):
            row = (weight_NE.argmax(-1) == e).nonzero().flatten()[: len(x_ND) // 5]
            out_ND = out_ND.index_add(0, row, expert(x_ND[row]) * weight_NE[row, e, None])
        return out_ND


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Capacity()

    def forward(self, x_ND):
        return self.block(x_ND + self.block(x_ND))


def test_a_block_that_runs_twice_can_be_compared():
    before, model = inspect_moe(Twice(), [tokens()]), Twice()
    assert inspect_moe(model, [tokens()]).compare(before).saturation()[0].value == 1
    with torch.no_grad():
        model.block.gate.weight.add_(torch.randn(E, D))
    after = inspect_moe(model, [tokens()])
    assert len(set(after[0].state.kept.position_M.tolist())) == int(
        after[0].state.tokens - after[0].state.dropped
    )
    assert 0 < after.compare(before).saturation()[0].value < 1


class Images(Block):
    """Convolutions, and a gate for each image."""

    def expert(self):
        return nn.Conv2d(D, 8, 3, padding=1)

    def forward(self, x_BDHW):
        weight_BE = self.gate(x_BDHW.mean((2, 3))).softmax(-1)
        self.weight_BE = weight_BE.detach()
        return sum(
            weight_BE[:, e, None, None, None] * expert(x_BDHW) for e, expert in enumerate(self.experts)
        )


class Pixels(Block):
    """Tokens [B, H, W, D]."""

    def forward(self, x_BHWD):
        return super().forward(x_BHWD.reshape(-1, D)).view_as(x_BHWD)


def test_images_are_read():
    x_BDHW = tokens(20 * 25).view(20, 5, 5, D).permute(0, 3, 1, 2)
    model = Images()
    layer = read(model, x_BDHW)
    assert layer.load_E == pytest.approx(model.weight_BE.mean(0).tolist(), abs=1e-5)
    assert layer["mixture error"] < 1e-5
    model = Pixels()
    layer = read(model, tokens(500).view(20, 5, 5, D))
    assert layer.state.count_E.tolist() == counts(model)
    assert layer["mixture error"] < 1e-5


class Tied(Block):
    def __init__(self):
        super().__init__()
        self.experts[2] = self.experts[0]


class TwoLists(nn.Module):
    """Experts as a list of first layers and one of second layers; routing ignores the token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, E)
        self.up, self.down = (nn.ModuleList(nn.Linear(D, D) for _ in range(E)) for _ in range(2))

    def forward(self, x_ND):
        draw = torch.Generator().manual_seed(0)
        self.chosen, out_ND = torch.randint(0, E, (len(x_ND), 1), generator=draw), torch.zeros_like(x_ND)
        for e in range(E):
            row = (self.chosen[:, 0] == e).nonzero().flatten()
            out_ND = out_ND.index_add(0, row, 0.9 * self.down[e](self.up[e](x_ND[row]).relu()))
        return out_ND


def test_what_is_not_one_list_of_experts_is_said():
    with pytest.raises(ValueError, match="its list holds one module twice"):
        read(Tied())
    model = TwoLists()
    layer = read(model)
    assert layer.state.count_E.tolist() == counts(model)
    assert layer["mixture error"] < 1e-5
    assert [alarm.kind for alarm in inspect_moe(nn.Sequential(model), [tokens()]).alarms] == ["arbitrary"]


class Layers(nn.Module):
    """Experts as lists of their layers; `join` makes of the first ones' answers what the last reads."""

    def __init__(self, join, lists, extra=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.join, self.lists, self.extra = nn.Linear(D, E), join, lists, extra
        for name in lists:
            sizes = (2 * D, D) if name == lists[-1] else (D, 2 * D)
            setattr(self, name, nn.ModuleList(nn.Linear(*sizes) for _ in range(E)))

    def whole(self, e, x_MD):
        *first, last = (getattr(self, name)[e] for name in self.lists)
        return last(self.join(*(layer(x_MD) for layer in first)))

    def forward(self, x_ND):
        weight_NK, self.chosen = self.gate(x_ND).softmax(-1).topk(2, -1)
        out_ND = torch.zeros_like(x_ND)
        for e in range(E):
            row, slot = torch.where(self.chosen == e)
            out_ND = out_ND.index_add(0, row, self.whole(e, x_ND[row]) * weight_NK[row, slot, None])
        return out_ND + self.extra


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("join", "lists"), [
    (F.relu, ("w1", "w2")), (F.gelu, ("fc_in", "fc_out")), (lambda a, b: F.silu(a) * b, ("w1", "w3", "w2")),
    (lambda a, b: a * F.gelu(b), ("up", "gates", "down")),
])  # fmt: skip
def test_experts_in_lists_of_their_layers_are_computed_again(join, lists, training):
    model = Layers(join, lists)
    panel = (
        looked(nn.Sequential(model), tokens())[0]
        if training
        else inspect_moe(nn.Sequential(model), [tokens()])
    )
    (layer,) = panel.layers
    assert layer.state.count_E.tolist() == counts(model)
    assert layer.explanation == "the mixture of what was observed is the block's output"
    assert layer["mixture error"] < 1e-5
    assert layer["input separation"] == pytest.approx(separation(tokens(), model), rel=1e-4)
    answers = [model.whole(e, tokens()).detach() for e in range(E)]
    answers = [(a - a.mean(0)).flatten() for a in answers]
    pairs = [F.cosine_similarity(answers[a], answers[b], dim=0) for a in range(E) for b in range(a)]
    assert layer["answers alike"] == pytest.approx(float(sum(pairs) / len(pairs)), abs=0.07)


def separation(x_ND, model):
    """Share of the variance between first choices."""
    apart_ND, first_N = x_ND - x_ND.mean(0), model.chosen[:, 0]
    groups = [apart_ND[first_N == e] for e in range(E)]
    between = sum(len(group) * group.mean(0).square().sum() for group in groups)
    return float(between / apart_ND.square().sum())


def test_layers_that_are_joined_unusually_are_not_guessed():
    for join in (torch.sin, lambda hidden: hidden.relu() + 0.01):
        layer = read(Layers(join, ("w1", "w2")))
        assert "experts are made of 2 lists, and only the last was read" in layer.explanation
        assert math.isnan(layer["answers alike"])
    layer = read(Layers(F.relu, ("w1", "w2"), extra=1.0))
    assert "differs from the mixture" in layer.explanation


# ------------------------------------------------------------------------------------------ watching


@pytest.mark.filterwarnings("ignore")  # of Dynamo
def test_two_watches_see_the_same():
    model = nn.Sequential(Block()).train()
    with watch(model, every=1) as one, watch(model, every=2) as two:
        for step in range(3):
            model(tokens(seed=step)).sum().backward()
    assert ([row["step"] for row in one.history], [row["step"] for row in two.history]) == ([0, 1, 2], [0, 2])
    for w in (one, two):
        assert w.panel()[0].state.count_E.tolist() == counts(model[0])
    torch._dynamo.reset()
    graphs = []
    torch.compile(torch.sin, backend=lambda graph, _: graphs.append(graph) or graph.forward)(tokens())
    assert graphs  # compiled again after the looks


def test_a_copy_of_a_watched_model_is_not_watched():
    model = nn.Sequential(Block()).train()
    with watch(model, every=1) as w:
        model(tokens())
        copied, file = copy.deepcopy(model), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copied, torch.load(file, weights_only=False)):
            other(tokens())
            (hook,) = other._forward_pre_hooks.values()
            assert hook.__self__ is w or hook.__self__.history == []
    assert len(w.history) == 1


def test_steps_are_of_one_kind():
    model = nn.Sequential(Block()).train()
    with watch(model, every=2) as w:
        for step in range(3):
            for _ in range(4):
                model(tokens())
            w.log(step)
    assert [row["step"] for row in w.history] == [0, 0, 1, 1, 2, 2]


class Reports:
    def __init__(self):
        self.got = []

    def on_log(self, args, state, control, logs, **_):
        self.got.append(dict(logs))


def trained(callback, reports, model, steps=4, error_at=None):
    """As a Trainer: two batches a step; the reports' callback is there before that of the user."""
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[reports]))
    callback.add_to(trainer)
    state = SimpleNamespace(global_step=0, log_history=[])

    def event(name, **given):
        for each in trainer.callback_handler.callbacks:
            getattr(each, name, lambda *_, **__: None)(
                SimpleNamespace(report_to=["board"]), state, None, **given
            )

    event("on_train_begin", model=model.train())
    for step in range(steps):
        for _ in range(2):
            model(tokens()).sum().backward()
        if step == error_at:
            raise KeyboardInterrupt
        state.global_step += 1
        event("on_step_end")
        state.log_history.append({"loss": 1.0})
        event("on_log", logs={"loss": 1.0})
    event("on_train_end")


def test_reports_get_the_numbers_and_steps_are_the_trainers():
    callback, reports, model = CollapseCallback(every=2, verbose=False), Reports(), nn.Sequential(Block())
    trained(callback, reports, model)
    assert [row["step"] for row in callback.watch.history] == [1, 3]
    assert all("moe/0/effective experts" in row for row in reports.got)
    assert len(reports.got) == 4
    late = CollapseCallback()
    with pytest.warns(UserWarning, match=r"\['board'\] get no numbers of the blocks: use add_to"):
        late.on_train_begin(SimpleNamespace(report_to=["board"]), None, None, model=model)
    late.on_train_end(None, None, None)


def test_a_training_that_was_stopped_leaves_no_second_watch():
    callback, model = CollapseCallback(every=1, verbose=False), nn.Sequential(Block())
    with pytest.raises(KeyboardInterrupt):
        trained(callback, Reports(), model, error_at=1)
    old = callback.watch
    trained(callback, Reports(), model)
    assert (len(old.history), len(callback.watch.history)) == (2, 4)
    assert not model._forward_pre_hooks


# --------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(("options", "said"), [
    ({"batches": {"input_ids": IDS}}, r"batches is one dict: give a list of batches, \[batch\]"),
    ({"batches": IDS}, "batches is one Tensor"),
    ({"batches": (tokens(), torch.arange(200))}, r"one pair .*: give a list, \[\(inputs, labels\)\]"),
    ({"batches": [IDS], "max_batches": 0}, "max_batches must be at least 1, got 0"),
    ({"batches": [IDS], "thresholds": {"colapsed": 1.0}}, r"unknown alarms \['colapsed'\]"),
    ({"batches": [{"ids": IDS}], "labels": "tokens"}, "needs an entry input_ids, and there are ids"),
])  # fmt: skip
def test_wrong_arguments_are_named_before_the_model_runs(options, said):
    def run(batch):
        raise AssertionError("the model ran")

    model = nn.Sequential(MoE(D, E, 8, top_k=2))
    with pytest.raises(ValueError, match=said):
        inspect_moe(model, **options, run=run)


def test_a_missing_folder_and_an_unseen_model_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*none"):
        Watch(Block(), path=tmp_path / "none" / "log.jsonl")
    model = nn.Sequential(Block()).train()
    with watch(model, every=1) as w:
        model.forward(tokens())
    with pytest.raises(ValueError, match=r"calling model\(x\); model\.forward, training_step"):
        w.panel()


@pytest.mark.parametrize(("option", "value", "said"), [
    ("--out", ".", "is a folder: name an .html in it"), ("--max-batches", "-1", "at least 1, got -1"),
])  # fmt: skip
def test_the_command_line_names_wrong_options(tmp_path, capsys, option, value, said):
    pytest.importorskip("transformers")
    text = tmp_path / "text.txt"
    text.write_text("some words")
    value = str(tmp_path) if value == "." else value
    assert main([str(tmp_path), "--text", str(text), option, value]) == 2
    assert said in capsys.readouterr().err


def test_costs_are_printed():
    panel = inspect_moe(
        nn.Sequential(Block()), [tokens()], causal=True, loss=lambda out, *_: out.square().mean()
    )
    assert f"loss {panel.loss:.4f}; with routing permuted in all blocks" in str(panel)
