"""Blocks that are built unusually: which of their lists are experts, and what is said of those not read.

Shapes: N tokens, M read by an expert, D width, E experts, C capacity, T positions, B sequences.
"""

import pytest
import torch
from list_moes import Block, D, E, counts, looked, tokens
from torch import nn
from torch.nn import functional as F

from moe_lib.inspect import inspect_moe


def read(model):
    (layer,) = inspect_moe(nn.Sequential(model), [tokens()]).layers
    return layer


def squares(output, inputs, labels):
    return output.square().mean()


def unread(model):
    with pytest.raises(ValueError, match="no mixture-of-experts block was recognised") as caught:
        inspect_moe(model, [tokens()])
    return str(caught.value)


class Head(Block):
    def __init__(self, width):
        super().__init__()
        self.head = nn.Linear(D, width)

    def forward(self, x_ND):
        return self.head(super().forward(x_ND))


class Towers(nn.Module):
    """As in multi-gate mixtures: a gate and a tower for each task."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(D, E) for _ in range(2))
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.towers = nn.ModuleList(nn.Linear(D, 1) for _ in range(2))

    def forward(self, x_ND):
        answer_NED = torch.stack([expert(x_ND) for expert in self.experts], 1)
        mixed = [(gate(x_ND).softmax(-1)[..., None] * answer_NED).sum(1) for gate in self.gates]
        return [tower(mixed_ND) for tower, mixed_ND in zip(self.towers, mixed, strict=True)]


@pytest.mark.parametrize("model", [Head(1), Towers()])
def test_a_narrow_output_is_not_read(model):
    assert "its output is narrower than its number of experts" in unread(nn.Sequential(model))


def test_an_output_of_another_width_is_not_read():
    assert "transformed after that" in unread(nn.Sequential(Head(E)))


class Common(Block):
    """Experts for all tokens, declared before the others."""

    def __init__(self, name, collapsed=False):
        nn.Module.__init__(self)
        setattr(self, name, nn.ModuleList(nn.Linear(D, D) for _ in range(2)))
        self.common = [*getattr(self, name)]
        later = Block()
        self.gate, self.experts = later.gate, later.experts
        if collapsed:
            nn.init.zeros_(self.gate.weight)

    def forward(self, x_ND):
        return super().forward(x_ND) + sum(expert(x_ND) for expert in self.common)


@pytest.mark.parametrize("collapsed", [False, True])
@pytest.mark.parametrize("name", ["shared", "shared_experts", "common_experts"])
def test_the_list_whose_weights_vary_is_the_mixture(name, collapsed):
    model = Common(name, collapsed)
    layer = read(model)
    assert layer.state.count_E.tolist() == counts(model)
    assert f"the answer of its {name!r} (a shared expert)" in layer.explanation


class Idle(Block):
    """The last expert computes nothing."""

    def __init__(self):
        super().__init__()
        self.experts[-1] = nn.Identity()


def test_experts_without_parameters_are_counted():
    model = Idle()
    layer = read(model)
    assert layer.num_experts == E
    assert layer.state.count_E.tolist() == counts(model)
    assert layer["dropped"] == 0
    weight_EP = torch.stack([nn.utils.parameters_to_vector(e.parameters()) for e in model.experts[:-1]])
    pairs = F.cosine_similarity(weight_EP[:, None], weight_EP[None], dim=2)[~torch.eye(E - 1).bool()]
    assert layer["weights alike"] == pytest.approx(float(pairs.mean().detach()), abs=1e-6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x


class Deep(Block):
    def expert(self):
        return Net()


class Tree(Block):
    """Experts that are mixtures themselves; the last two are never chosen."""

    def expert(self):
        return Block()

    def __init__(self):
        super().__init__()
        nn.init.constant_(self.gate.bias[2:], -100)


def test_experts_may_hold_lists():
    model = Deep()
    assert read(model).state.count_E.tolist() == counts(model)


@pytest.mark.parametrize("training", [False, True])
def test_experts_may_be_mixtures(training):
    model = nn.Sequential(Tree())
    panel = looked(model, tokens())[0] if training else inspect_moe(model, [tokens()])
    read_by = counts(model[0])
    assert [layer.name for layer in panel.layers] == ["0", "0.experts.0", "0.experts.1"]
    assert panel["0"].state.count_E.tolist() == read_by
    for e in (0, 1):
        layer = panel[f"0.experts.{e}"]
        assert layer.num_tokens == read_by[e]
        assert layer.state.count_E.tolist() == counts(model[0].experts[e])
    assert panel.unread == [f"0.experts.{e} (Block): its forward did not run" for e in (2, 3)]


class Choice(nn.Module):
    """Experts choose tokens, best first, after a norm; or read buffers that are padded with zeros."""

    def __init__(self, padded, normed=True, share=2):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(D) if normed else nn.Identity()
        self.router = nn.Linear(D, E)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.padded, self.share = padded, share

    def forward(self, x_ND):
        h_ND = self.norm(x_ND)
        weight_NE, size = self.router(h_ND).softmax(-1), len(x_ND) // self.share
        out_ND, self.weight_NE = torch.zeros_like(x_ND), torch.zeros_like(weight_NE)
        best_N = weight_NE.argmax(1)
        for e, expert in enumerate(self.experts):
            token_C = (best_N == e).nonzero().flatten() if self.padded else weight_NE[:, e].topk(size).indices
            read_CD = h_ND[token_C]
            if self.padded:
                read_CD = F.pad(read_CD, (0, 0, 0, size - len(token_C)))
            answer_CD = expert(read_CD)[: len(token_C)] * weight_NE[token_C, e, None]
            out_ND = out_ND.index_add(0, token_C, answer_CD)
            self.weight_NE[token_C, e] = weight_NE[token_C, e].detach()
        return out_ND


def separation(read_ND, weight_NE):
    served = weight_NE.any(1)
    read_ND, first_N = read_ND[served].detach().double(), weight_NE.argmax(1)[served]
    apart_ND = read_ND - read_ND.mean(0)
    groups = [apart_ND[first_N == e] for e in range(E)]
    between = sum(len(g) * g.mean(0).square().sum() for g in groups if len(g))
    return float(between / apart_ND.square().sum())


@pytest.mark.parametrize(
    ("padded", "normed", "share"), [(False, True, 2), (False, False, 2), (False, True, 4), (True, False, 2)]
)
def test_what_experts_read_is_put_back_in_order(padded, normed, share):
    model = Choice(padded, normed, share)
    layer = read(model)
    expected = separation(model.norm(tokens()), model.weight_NE)
    assert layer.state.count_E.tolist() == (model.weight_NE > 0).sum(0).tolist()
    assert layer["dropped"] == pytest.approx(float((model.weight_NE == 0).all(1).double().mean()))
    assert (layer["dropped"] > 0) == (share == 4)
    assert layer["input separation"] == pytest.approx(expected, abs=1e-6)
    assert layer["mixture error"] < 1e-5


def test_what_cannot_be_put_back_in_order_is_not_used():
    model = Choice(padded=True)
    panel = inspect_moe(
        nn.Sequential(model), [tokens()], causal=True, loss=lambda out, *_: out.square().mean()
    )
    (layer,) = panel.layers
    assert layer.state.count_E.tolist() == (model.weight_NE > 0).sum(0).tolist()
    assert "which tokens the experts read is not known" in layer.explanation
    for name in ("input separation", "mixture error", "cost of permuting"):
        assert layer[name] != layer[name]  # NaN
    assert -1 < layer["answers alike"] < 1
    assert panel.alarms == []


class Weighted(nn.Linear):
    def forward(self, x, weight):
        return super().forward(x) * weight


class Inside(Block):
    """Experts get the weight too."""

    def expert(self):
        return Weighted(D, D)

    def forward(self, x_ND):
        weight_NE = self.gate(x_ND).softmax(-1)
        return sum(expert(x_ND, weight_NE[:, e, None]) for e, expert in enumerate(self.experts))


class Named(nn.Linear):
    def forward(self, hidden_states):
        return super().forward(hidden_states)


class Keywords(Block):
    def expert(self):
        return Named(D, D)

    def answer(self, e, x_MD):
        return self.experts[e](hidden_states=x_MD)


class LossFirst(Block):
    def forward(self, x_ND):
        return x_ND.sum(), super().forward(x_ND)


class Second(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x_ND):
        return self.block(x_ND)[1]


@pytest.mark.parametrize("training", [False, True])
def test_keywords_and_losses_before_the_output(training):
    for model in (nn.Sequential(Keywords()), Second(LossFirst())):
        panel = looked(model, tokens())[0] if training else inspect_moe(model, [tokens()])
        assert panel[0].state.count_E.tolist() == counts(next(model.children()))
        assert panel[0]["mixture error"] < 1e-5


def test_experts_that_take_more_than_tokens_are_not_read():
    assert "0 (Inside): answers are added up as they are, and its experts take" in unread(
        nn.Sequential(Inside())
    )


class Picky(nn.Module):
    """Stacked experts that cannot be called with one choice a token."""

    def __init__(self):
        super().__init__()
        self.weight_EDD = nn.Parameter(torch.randn(E, D, D))

    def forward(self, x_ND, top_k_index, top_k_weights):
        if top_k_index.shape[1] != 2:
            raise ValueError("two experts, please")
        return torch.einsum("nd,nkdo,nk->no", x_ND, self.weight_EDD[top_k_index], top_k_weights)


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, E), Picky()

    def forward(self, x_ND):
        weight_NK, self.chosen = self.gate(x_ND).softmax(-1).topk(2, -1)
        return self.experts(x_ND, self.chosen, weight_NK)


def test_experts_that_cannot_be_called_again_are_counted():
    model = nn.Sequential(Stacked())
    panel = inspect_moe(model, [tokens()], causal=True, loss=squares)
    assert panel[0].state.count_E.tolist() == counts(model[0])
    assert "cannot be called again: two experts, please" in panel[0].explanation


class Rounded(Block):
    def forward(self, x_ND):
        with torch.autocast("cpu", torch.bfloat16):
            weight_NE = self.gate(x_ND).softmax(-1)
            return sum(weight_NE[:, e, None] * expert(x_ND) for e, expert in enumerate(self.experts)).float()


def test_rounding_is_judged_by_the_coarsest_numbers():
    layer = read(Rounded())
    assert 1e-4 < layer["mixture error"] < 0.02
    assert layer.explanation == "the mixture of what was observed is the block's output"


class Added(Block):
    def forward(self, x_ND):
        return super().forward(x_ND) + 0.001


def test_small_differences_are_not_said_to_be_none():
    said = read(Added()).explanation
    assert "differs" in said
    assert " by 0%" not in said


@pytest.mark.parametrize("size", [5, 6])
def test_batches_as_long_as_wide_are_said_to_be_ambiguous(size):
    x_BTD = tokens(5 * size).view(5, size, D)

    class Flat(Block):
        def forward(self, x_BTD):
            return super().forward(x_BTD.flatten(0, 1)).view_as(x_BTD)

    layer = inspect_moe(nn.Sequential(Flat()), [x_BTD])[0]
    assert any("T equals B" in note for note in layer.notes) == (size == 5)


class Holder(nn.Module):
    """Answers of all experts, one below the other, side by side, or in a list."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.nets = how, nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x):
        if self.how in ("buffers", "idle"):  # [E, C, D]; expert 0 is not called
            idle = self.how == "idle"
            answers = [net(x_CD) for net, x_CD in zip(self.nets, x, strict=True) if not idle or x_CD.any()]
            return torch.stack([torch.zeros_like(answers[0])] * idle + answers)
        answers = [net(x) for net in self.nets]
        if self.how == "list":
            return answers
        return torch.cat(answers) if self.how == "below" else torch.stack(answers, 1)


class Experts(Holder):
    """The same, by a telling name."""


class Around(nn.Module):
    """Mixes what the holder returns; without a gate all alike: an ensemble."""

    def __init__(self, holder, gated=True):
        super().__init__()
        self.gate, self.held, self.gated = nn.Linear(D, E), holder, gated
        if holder.how == "idle":
            self.gate.bias.data[0] = -50

    def forward(self, x_ND):
        weight_NE = self.gate(x_ND).softmax(-1) if self.gated else torch.full((len(x_ND), E), 1 / E)
        inside_NE = weight_NE == weight_NE.amax(1, keepdim=True)
        self.chosen = weight_NE.argmax(1)
        if self.held.how in ("buffers", "idle"):
            answer_END = self.held(inside_NE.T[:, :, None] * x_ND)
        elif self.held.how == "below":
            answer_END = self.held(x_ND).view(E, len(x_ND), D)
        else:
            found = self.held(x_ND)
            answer_END = torch.stack(found) if self.held.how == "list" else found.transpose(0, 1)
        return torch.einsum("end,ne->nd", answer_END, weight_NE * inside_NE)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("how", ["below", "beside", "list", "buffers", "idle"])
@pytest.mark.parametrize("kind", [Holder, Experts])
def test_a_module_that_only_holds_experts_is_not_the_mixture(kind, how, root, training):
    block = Around(kind(how))
    model = block if root else nn.Sequential(block)
    panel = looked(model, tokens())[0] if training else inspect_moe(model, [tokens()])
    (layer,) = panel.layers
    assert layer.family == "Around"
    assert layer.state.count_E.tolist() == counts(block)
    assert layer["mixture error"] < 1e-5


@pytest.mark.parametrize("how", ["below", "beside", "list"])
def test_an_ensemble_in_a_holder_is_no_mixture(how):
    with pytest.raises(ValueError, match="no module looks like one"):
        inspect_moe(Around(Holder(how), gated=False), [tokens()])
