"""Models in which a panel could be wrong without a word: against what a plain hook or a formula says.

Shapes: N tokens, D width, E experts, K chosen, B samples, T positions.
"""

import math

import pytest
import torch
from list_moes import Block, D, E, tokens
from torch import nn
from torch.nn import functional as F

from moe_lib import MoE, inspect_moe, routing_entropy
from moe_lib.inspect import Adapter
from moe_lib.models.classifier import Classifier, ClassifierConfig, mix


class Soft(nn.Module):
    """All experts, weighted; `weight_NE` are those of the last call."""

    def __init__(self, bias_E, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, len(bias_E))
        self.gate.weight.data.mul_(4)
        self.gate.bias.data = torch.tensor(bias_E)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in bias_E)
        self.to(dtype)

    def forward(self, x_ND):
        self.weight_NE = self.gate(x_ND).softmax(-1)
        return sum(self.weight_NE[:, e, None] * expert(x_ND) for e, expert in enumerate(self.experts))


@pytest.mark.parametrize(
    ("bias_E", "dtype"),
    [
        ([90.0, 90.0, -4.0, -5.0, -6.0, -7.0, -8.0, -9.0], torch.float32),
        ([14.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], torch.float16),
    ],
)
def test_a_collapsed_soft_mixture_whose_weights_underflow(bias_E, dtype):
    model = Soft(bias_E, dtype)
    panel = inspect_moe(model, [tokens(500).to(dtype)])
    weight_NE = model.weight_NE.double()
    assert 0 < (weight_NE == 0).double().mean() < 0.5
    expected = torch.special.entr(weight_NE.mean(0)).sum().exp().item()
    assert panel[0]["effective experts"] == pytest.approx(expected, rel=1e-2)
    assert {"collapsed", "dead"} <= {alarm.kind for alarm in panel.alarms}


def test_classes_of_a_soft_mixture_are_those_of_its_largest_weight():
    labels_N = torch.arange(400) % 4
    model = nn.Sequential(MoE(4, 4, 8))
    model[0].router.gate.weight.data = 20 * torch.eye(4)
    model[0].router.gate.bias.data.zero_()
    x_ND = F.one_hot(labels_N, 4).float()
    layer = inspect_moe(model, [(x_ND, labels_N)])[0]
    probs_NE = model[0].route(x_ND).probs_NE
    expected = routing_entropy(probs_NE, labels_N, 4).information_class
    assert layer["I(c;E)"] == pytest.approx(expected, abs=1e-4)
    assert layer["I(c;E)"] == pytest.approx(math.log(4), abs=1e-4)
    assert layer.measures["I(c;E)"].null < 0.05
    assert layer.class_expert["2"] == [0, 0, 1, 0]


class Stacked(nn.Module):
    """Stacked weights, at most `capacity` tokens an expert; the others get zeros."""

    num_experts = E

    def __init__(self, capacity):
        super().__init__()
        torch.manual_seed(0)
        self.weight_EDD, self.capacity = nn.Parameter(torch.randn(E, D, D)), capacity

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out_ND = torch.zeros_like(hidden_states)
        for e in range(E):
            row = torch.where(top_k_index.flatten() == e)[0][: self.capacity]
            out_ND[row] = hidden_states[row] @ self.weight_EDD[e] * top_k_weights[row]
        return out_ND


class Layer(nn.Module):
    def __init__(self, capacity):
        super().__init__()
        torch.manual_seed(1)
        self.gate, self.experts = nn.Linear(D, E), Stacked(capacity)

    def forward(self, x_ND):
        weight_N1, self.index_N1 = self.gate(x_ND).softmax(-1).topk(1)
        return self.experts(x_ND, self.index_N1, weight_N1)


@pytest.mark.parametrize(
    ("mixture", "top_k"), [("logits", None), ("logits", 2), ("likelihood", 2), ("jacobs", 1)]
)
def test_the_classifier_that_asks_router_and_experts_apart(mixture, top_k):
    """Entropies by formula; the cost of permuting by mixing its experts' logits anew."""
    torch.manual_seed(0)
    config = ClassifierConfig("mlp", 16, 8, expert_hidden=8, gate_hidden=8, mixture=mixture, top_k=top_k)
    model = Classifier(config, (1, 6, 6), 5)
    images, labels_N = 20 * torch.rand(60, 1, 6, 6), torch.arange(60) % 5
    panel = inspect_moe(model, [(images, labels_N)], causal=True)
    layer, found = panel[0], model(images)
    weights_NE = found.routing.dense_weights()
    load_NE = weights_NE if top_k is None else (weights_NE > 0) / top_k
    effective = torch.special.entr(load_NE.mean(0)).sum().exp()
    assert layer["effective experts"] == pytest.approx(effective.item(), rel=1e-4)
    assert math.isfinite(layer["answers alike"])
    if mixture != "logits":
        assert "not checked" in layer.explanation
        return
    assert layer.explanation == "the mixture of what was observed is the block's output"
    order_N = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    permuted = mix(weights_NE[order_N], found.expert_logits_NEC, mixture)
    cost = F.nll_loss(permuted, labels_N) - F.nll_loss(found.log_probs_NC, labels_N)
    assert layer["cost of permuting"] == pytest.approx(cost.item(), rel=1e-4)


def test_tokens_that_stacked_experts_leave_out_are_dropped():
    model = Layer(capacity=20)
    panel = inspect_moe(model, [tokens(200)])
    served = model.index_N1.flatten().bincount(minlength=E).clamp(max=20).sum()
    assert panel[0]["dropped"] == pytest.approx(1 - float(served) / 200)
    assert "dropping" in {alarm.kind for alarm in panel.alarms}


def test_experts_chosen_as_a_vector():
    class Vector(Stacked):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return super().forward(hidden_states, top_k_index[:, None], top_k_weights[:, None])

    class Outer(Layer):
        def forward(self, x_ND):
            weight_N, self.index_N = self.gate(x_ND).softmax(-1).max(-1)
            return self.experts(x_ND, self.index_N, weight_N)

    model = Outer(200)
    model.experts = Vector(200)
    layer = inspect_moe(model, [tokens(200)])[0]
    counts_E = model.index_N.bincount(minlength=E)
    assert layer.load_E == pytest.approx((counts_E / 200).tolist())


class Pooled(nn.Module):
    """Patches of an image to experts, and their mean: the block's own input holds no tokens."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, images_BCHW):
        x_BTD = images_BCHW.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).flatten(1, 3)
        weight_BTE = self.gate(x_BTD).softmax(-1)
        answers = [weight_BTE[..., e, None] * expert(x_BTD) for e, expert in enumerate(self.experts)]
        return sum(answers).mean(1)


def test_pooling_inside_a_block_is_refused_whatever_it_reads():
    with pytest.raises(ValueError, match="pooled"):
        inspect_moe(Pooled(), [torch.randn(8, 1, 16, 16)])


class ByTask(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.embedding = Block(), nn.Embedding(3, D)

    def forward(self, x_ND, task=None):
        return self.block(x_ND if task is None else x_ND + self.embedding(task))


def test_what_may_be_an_input_and_was_taken_as_labels_is_noted():
    x_ND, task_N = tokens(60), torch.arange(60) % 3
    noted = inspect_moe(ByTask(), [(x_ND, task_N)])[0].notes
    assert any("the model takes 'task' as well" in note for note in noted)
    told = inspect_moe(ByTask(), [((x_ND, task_N), task_N)])[0].notes
    assert not any("as well" in note for note in told)


@pytest.mark.parametrize(
    "targets", [{"boxes": torch.zeros(3)}, ["a"] * 60, (torch.zeros(60), torch.zeros(9))]
)
def test_targets_that_are_no_labels_are_left_out(targets):
    layer = inspect_moe(nn.Sequential(Block()), [(tokens(60), targets)])[0]
    assert layer.num_tokens == 60
    assert math.isnan(layer["I(c;E)"])


def test_labels_of_several_tasks_are_refused_with_a_remedy():
    model, labels = nn.Sequential(Block()), torch.zeros(60, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="labels=lambda inputs: None"):
        inspect_moe(model, [(tokens(60), labels)])
    assert inspect_moe(model, [(tokens(60), labels)], labels=lambda inputs: None)[0].num_tokens == 60


class LossAlone(Block):
    def forward(self, x_ND):
        return super().forward(x_ND).square().mean()


class Top2Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E)

    def forward(self, x_ND):
        return self.gate(x_ND).softmax(-1).topk(2)


class OwnGate(nn.Module):
    """A gate of one's own under a package's name."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = Top2Gate(), nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x_ND):
        weight_NK, index_NK = self.gate(x_ND)
        answer_NED = torch.stack([expert(x_ND) for expert in self.experts], 1)
        rows_N1 = torch.arange(len(x_ND))[:, None]
        return (answer_NED[rows_N1, index_NK] * weight_NK[..., None]).sum(1)


class Towers(nn.Module):
    """Multi-gate mixture of experts (Ma et al. 2018): two tasks, a gate and a tower for each."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.gates = nn.ModuleList(nn.Linear(D, E) for _ in range(2))
        self.towers = nn.ModuleList(nn.Linear(D, 4) for _ in range(2))

    def forward(self, x_ND):
        answer_NED = torch.stack([expert(x_ND) for expert in self.experts], 1)
        mixed = [(gate(x_ND).softmax(-1)[..., None] * answer_NED).sum(1) for gate in self.gates]
        return sum(tower(each).relu() for tower, each in zip(self.towers, mixed, strict=True))


class MMoE(Towers):
    pass


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (LossAlone(), "returns a number, such as a loss"),
        (Towers(), "are transformed after that"),
        (MMoE(), "are transformed after that"),
    ],
)
def test_what_cannot_be_read_says_why(model, reason):
    with pytest.raises(ValueError, match=reason):
        inspect_moe(model, [tokens(60)])


def test_a_gate_under_a_packages_name_is_not_read_as_the_packages():
    panel = inspect_moe(nn.Sequential(OwnGate(), Block()), [tokens(60)])
    assert [layer.family for layer in panel.layers] == ["OwnGate", "Block"]
    assert panel[0]["mixture error"] < 1e-5
    assert panel.unread == []


def test_an_adapter_in_the_wrong_form_is_refused():
    class Mine(Adapter):
        classes = ("Listed",)

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ParameterList(torch.randn(D, D) for _ in range(E))

    with pytest.raises(ValueError, match=r"adapters takes classes: give Mine instead of Mine\(...\)"):
        inspect_moe(Block(), [tokens()], adapters=[Mine(Block())])
    with pytest.raises(ValueError, match="override num_experts in Mine"):
        inspect_moe(nn.Sequential(Listed()), [tokens()], adapters=[Mine])
