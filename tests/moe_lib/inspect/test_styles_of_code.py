"""Styles of other code bases (Megatron, GraphGPS, SwitchHead, loralib, THOR, DiT): each panel against what
the model itself kept, and training that is watched against training that is not.

Shapes: N tokens, D width, E experts, B samples, T positions.
"""

import copy
import dataclasses
import random
from contextlib import nullcontext
from typing import ClassVar

import numpy as np
import pytest
import torch
from list_moes import D, tokens, top
from torch import nn
from torch.nn import functional as F

from moe_lib import inspect_moe
from moe_lib.inspect import watch

E = 4


def mlp():
    return nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))


class Base(nn.Module):
    """Two of four experts a token; `weight_NE` are those of the last call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList(mlp() for _ in range(E))

    def route(self, x_ND):
        self.weight_NE = top(self.gate(x_ND), 2)
        return self.weight_NE

    def mix(self, x_ND, weight_NE):
        out_ND = torch.zeros_like(x_ND)
        for e, expert in enumerate(self.experts):
            row_R = weight_NE[:, e].nonzero().flatten()
            out_ND = out_ND.index_add(0, row_R, expert(x_ND[row_R]) * weight_NE[row_R, e, None])
        return out_ND

    def forward(self, x_ND):
        return self.mix(x_ND, self.route(x_ND))


def entropy(weight_NE):
    share_NE = weight_NE.detach() / weight_NE.detach().sum(-1, keepdim=True)
    return torch.special.entr(share_NE).sum(-1).mean().item()


def kinds(panel):
    return {alarm.kind for alarm in panel.alarms}


def seen(model, *inputs):
    with watch(model.train(), every=1) as w:
        model(*inputs)
    return w.panel()


# ------------------------------------------------------------------- rows that are slots, not tokens


class SequentialMLP(nn.Module):
    """As in Megatron: experts read permuted tokens; the layer around adds up."""

    def __init__(self):
        super().__init__()
        self.local_experts = nn.ModuleList(mlp() for _ in range(E))

    def forward(self, x_SD, count_E):
        parts = x_SD.split(count_E.tolist())
        return torch.cat([expert(part) for expert, part in zip(self.local_experts, parts, strict=True)])


class Permuted(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = nn.Linear(D, E), SequentialMLP()

    def forward(self, x_ND):
        weight_NK, index_NK = self.router(x_ND).softmax(-1).topk(2, -1)
        self.weight_NE = torch.zeros(len(x_ND), E).scatter(1, index_NK, weight_NK)
        order_S = index_NK.flatten().argsort(stable=True)
        answer_SD = self.experts(x_ND[order_S // 2], index_NK.flatten().bincount(minlength=E))
        slots_SD = torch.zeros(2 * len(x_ND), D).index_copy(0, order_S, answer_SD)
        return (slots_SD.view(len(x_ND), 2, D) * weight_NK[..., None]).sum(1)


class WeightedStack(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(mlp() for _ in range(E))

    def forward(self, x_ND, weight_NE):
        return torch.stack([weight_NE[:, e, None] * net(x_ND) for e, net in enumerate(self.nets)])


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.inner = nn.Linear(D, E), WeightedStack()

    def forward(self, x_ND):
        self.weight_NE = (3 * self.gate(x_ND)).softmax(-1)
        return self.inner(x_ND, self.weight_NE).sum(0)


@pytest.mark.parametrize("kind", [Permuted, Summed])
def test_answers_that_are_added_up_outside_of_their_holder(kind):
    model = nn.Sequential(nn.Linear(D, D), kind())
    (layer,) = inspect_moe(model, [tokens(200)]).layers
    assert (layer.name, layer.num_tokens) == ("1", 200)
    assert layer["H(E|x)"] == pytest.approx(entropy(model[1].weight_NE), abs=1e-4)
    assert layer["mixture error"] < 1e-5


# -------------------------------------------------------------- weights before an expert's last layer


class OnInputs(Base):
    def mix(self, x_ND, weight_NE):
        out_ND = torch.zeros_like(x_ND)
        for e, expert in enumerate(self.experts):
            row_R = weight_NE[:, e].nonzero().flatten()
            out_ND = out_ND.index_add(0, row_R, expert(x_ND[row_R] * weight_NE[row_R, e, None]))
        return out_ND


class BySlot(Base):
    def forward(self, x_ND):
        weight_NK, index_NK = self.gate(x_ND).softmax(-1).topk(2, -1)
        out_ND = torch.zeros_like(x_ND)
        for k in range(2):
            for e, expert in enumerate(self.experts):
                row_N = index_NK[:, k] == e
                out_ND[row_N] = out_ND[row_N] + expert(x_ND[row_N] * weight_NK[row_N, k, None])
        return out_ND


class OnActivations(nn.Module):
    """As in Megatron: probabilities multiply the activations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, E)
        self.up_experts = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(E))
        self.down_experts = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(E))

    def forward(self, x_ND):
        weight_NE, out_ND = top(3 * self.gate(x_ND), 2), torch.zeros_like(x_ND)
        for e in range(E):
            row_R = weight_NE[:, e].nonzero().flatten()
            hidden_RD = F.silu(self.up_experts[e](x_ND[row_R])) * weight_NE[row_R, e, None]
            out_ND = out_ND.index_add(0, row_R, self.down_experts[e](hidden_RD))
        return out_ND


def test_a_token_of_zeros_does_not_hide_weights_on_inputs():
    x_ND = tokens(200)
    x_ND[5] = 0
    model = nn.Sequential(OnInputs())
    (layer,) = inspect_moe(model, [x_ND]).layers
    served_NE = torch.cat([model[0].weight_NE[:5], model[0].weight_NE[6:]])
    assert layer["H(E|x)"] == pytest.approx(entropy(served_NE), abs=1e-4)
    assert layer["mixture error"] < 1e-5


@pytest.mark.parametrize("kind", [BySlot, OnActivations])
def test_weights_inside_of_experts_are_refused(kind):
    with pytest.raises(ValueError, match="answers are added up as they are"):
        inspect_moe(nn.Sequential(kind()), [tokens(200)])


# ----------------------------------------------------------------------------- nothing is left behind


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = Base()

    def forward(self, x_ND):
        return self.moe(x_ND.sub_(0.5).mul_(3))


class Data:
    pass


def graph():
    data = Data()
    data.x = torch.arange(90) % 9
    return data


class Graph(nn.Module):
    """Writes to the object that it is given, as GraphGPS."""

    def __init__(self):
        super().__init__()
        self.embed, self.moe = nn.Embedding(9, D), Base()

    def forward(self, data):
        data.x = self.embed(data.x)
        data.x = data.x + self.moe(data.x)
        return data.x


def test_a_model_may_write_to_its_inputs():
    model, plain, x_ND = InPlace(), InPlace(), tokens(200)
    (layer,) = inspect_moe(model, [x_ND]).layers
    assert torch.equal(x_ND, tokens(200))
    plain(x_ND)
    assert layer["H(E|x)"] == pytest.approx(entropy(plain.moe.weight_NE), abs=1e-4)
    for panel in (inspect_moe(Graph(), [graph()]), seen(Graph(), graph())):
        assert panel[0].num_tokens == 90


class InContext(Base):
    def forward(self, x_ND, context):
        context.aux = self.gate(x_ND).softmax(-1).mean(0).square().sum()
        return super().forward(x_ND)


class Contexts(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = InContext()

    def forward(self, x_ND):
        context = Data()
        return self.block(x_ND, context).square().mean() + 10 * context.aux


class MovingGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.bias = nn.Linear(D, E), nn.Buffer(torch.zeros(E))

    def forward(self, x_ND):
        probs_NE = self.linear(x_ND).softmax(-1)
        index_NK = (probs_NE + self.bias).topk(2, -1).indices
        count_E = F.one_hot(index_NK, E).sum((0, 1)).float()
        self.bias += 0.01 * torch.sign(count_E.mean() - count_E)
        return torch.zeros_like(probs_NE).scatter(1, index_NK, probs_NE.gather(1, index_NK))


class GivenGate(Base):
    def forward(self, x_ND, gate):
        return self.mix(x_ND, gate(x_ND))


class OneGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.blocks = MovingGate(), nn.ModuleList(GivenGate() for _ in "12")

    def forward(self, x_ND):
        for block in self.blocks:
            x_ND = x_ND + block(x_ND, self.gate)
        return x_ND.square().mean()


class ListOfTheClass(Base):
    losses: ClassVar[list] = []

    def forward(self, x_ND):
        self.losses.append(self.gate(x_ND).softmax(-1).mean(0).square().sum())
        return super().forward(x_ND)


class Collected(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(ListOfTheClass(), ListOfTheClass())

    def forward(self, x_ND):
        ListOfTheClass.losses.clear()
        return self.layers(x_ND).square().mean() + 10 * torch.stack(ListOfTheClass.losses).mean()


@pytest.mark.parametrize("kind", [Contexts, OneGate, Collected])
def test_training_is_the_same_when_watched(kind):
    found = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = kind().train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with watch(model, every=1) if watched else nullcontext():
            for step in range(3):
                optimizer.zero_grad()
                model(tokens(50) + step).backward()
                optimizer.step()
        found.append([*model.parameters(), *model.buffers()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


class LoRA(nn.Linear):
    """Merges in evaluation mode, as loralib does."""

    def __init__(self):
        super().__init__(D, D)
        self.merged = False
        self.a_RD, self.b_DR = nn.Parameter(torch.randn(4, D) / 9), nn.Parameter(torch.randn(D, 4) / 9)

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b_DR @ self.a_RD
            self.merged = not mode
        return self

    def forward(self, x_ND):
        return super().forward(x_ND) + (0 if self.merged else x_ND @ self.a_RD.T @ self.b_DR.T)


def test_layers_that_merge_in_evaluation_mode_come_apart_again():
    block = Base()
    block.experts = nn.ModuleList(LoRA() for _ in range(E))
    model = nn.Sequential(block).train()
    inspect_moe(model, [tokens(200)])
    assert all(expert.training and not expert.merged for expert in block.experts)


class Noise(Base):
    """Routing noise of NumPy."""

    def route(self, x_ND):
        noise_NE = torch.from_numpy(np.random.randn(len(x_ND), E)).float()  # noqa: NPY002
        self.weight_NE = top(self.gate(x_ND) + noise_NE, 2)
        return self.weight_NE


class Thor(Base):
    """One expert a batch, drawn by Python."""

    def forward(self, x_ND):
        e = random.randrange(E)
        self.weight_NE = F.one_hot(torch.full((len(x_ND),), e), E).float()
        return self.experts[e](x_ND)


@pytest.mark.parametrize("kind", [Noise, Thor])
def test_random_numbers_of_python_and_numpy_are_drawn_again(kind):
    model = nn.Sequential(kind())
    layer = seen(model, tokens(200))[0]
    use_E = (model[0].weight_NE > 0).float().mean(0)
    assert layer.load_E == pytest.approx((use_E / use_E.sum()).tolist(), abs=1e-5)


# ------------------------------------------------------------------------------- what is added beside


class Values(Base):
    """Attention on a mixture of values, beside a residual that is a hundred times as large."""

    def forward(self, x_BTD):
        weight_BTE = top(3 * self.gate(x_BTD), 1)
        value_BTD = sum(weight_BTE[..., e, None] * expert(x_BTD) for e, expert in enumerate(self.experts))
        return x_BTD + 0.01 * (x_BTD @ x_BTD.transpose(1, 2) / 4).softmax(-1) @ value_BTD


def test_a_large_residual_explains_no_mixture():
    assert "unexplained" in kinds(inspect_moe(nn.Sequential(Values()), [tokens(320).view(20, 16, D)]))


class Frozen(Base):
    """Half of the experts are detached: no tag comes through."""

    def forward(self, x_ND):
        weight_NE, out_ND = top(self.gate(x_ND), 1), torch.zeros_like(x_ND)
        for e, expert in enumerate(self.experts):
            row_R = weight_NE[:, e].nonzero().flatten()
            answer_RD = expert(x_ND[row_R])
            answer_RD = answer_RD.detach() if e < 2 else answer_RD
            out_ND = out_ND.index_add(0, row_R, answer_RD * weight_NE[row_R, e, None])
        return out_ND


def test_experts_that_are_detached_are_not_taken_for_dropped_tokens_in_silence():
    panel = inspect_moe(nn.Sequential(Frozen()), [tokens(200)])
    assert "unexplained" in kinds(panel)
    assert "detached" in panel[0].explanation


class Paths(Base):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.norm, self.shared = kind, nn.LayerNorm(D), mlp()
        self.bias = nn.Parameter(torch.randn(D))
        self.norm.weight.data.uniform_(0.5, 2)

    def forward(self, x_ND):
        h_ND = self.norm(x_ND)
        mixed_ND = super().forward(h_ND)
        if self.kind == "in place":
            x_ND += mixed_ND
            return x_ND
        return (
            mixed_ND
            + {
                "residual and shared": x_ND + self.shared(h_ND),
                "shared reads the input": self.shared(x_ND),
                "residual after the norm": h_ND,
                "bias": self.bias,
            }[self.kind]
        )


@pytest.mark.parametrize(
    "kind", ["residual and shared", "shared reads the input", "residual after the norm", "in place", "bias"]
)
def test_usual_paths_beside_the_mixture_are_explained(kind):
    panel = inspect_moe(nn.Sequential(nn.Identity(), Paths(kind)), [tokens(200)])
    assert panel[0]["mixture error"] < 1e-3
    assert kinds(panel) == set()


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.other = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x_ND, c_ND=None):
        return self.own(x_ND) + (0 if c_ND is None else self.other(c_ND))


class DiT(Base):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Conditioned() for _ in range(E))

    def forward(self, x_ND):
        weight_NE = self.route(x_ND)
        return sum(weight_NE[:, e, None] * f(x_ND, x_ND.flip(0)) for e, f in enumerate(self.experts))


class WeightedInPlace(Base):
    def __init__(self):
        super().__init__()
        layers = (nn.Sequential(mlp(), nn.Dropout(0.2), nn.Linear(D, D)) for _ in range(E))
        self.experts = nn.ModuleList(layers)

    def forward(self, x_ND):
        weight_NE = self.route(x_ND)
        return sum(expert(x_ND).mul_(weight_NE[:, e, None]) for e, expert in enumerate(self.experts))


@pytest.mark.parametrize("kind", [DiT, WeightedInPlace])
def test_answers_of_one_call_explain_what_cannot_be_asked_again(kind):
    for panel in (
        inspect_moe(nn.Sequential(kind()), [tokens(200)]),
        seen(nn.Sequential(kind()), tokens(200)),
    ):
        assert panel[0]["mixture error"] < 1e-5
        assert "unexplained" not in kinds(panel)


# ------------------------------------------------------------------------------------ gates and lists


class TimeFirst(Base):
    def forward(self, x_BTD):
        x_TBD = x_BTD.transpose(0, 1)
        weight_TBE = top(3 * self.gate(x_TBD), 1)
        mixed_TBD = sum(weight_TBE[..., e, None] * expert(x_TBD) for e, expert in enumerate(self.experts))
        return mixed_TBD.transpose(0, 1)


class ConvGate(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = nn.Conv2d(D, 8, 1), nn.ModuleList(mlp() for _ in range(8))

    def forward(self, x_BDHW):
        weight_BHWE = top(3 * self.gate(x_BDHW).permute(0, 2, 3, 1), 2)
        x_BHWD = x_BDHW.permute(0, 2, 3, 1)
        return sum(weight_BHWE[..., e, None] * expert(x_BHWD) for e, expert in enumerate(self.experts))


@pytest.mark.parametrize(
    ("model", "x"),
    [(TimeFirst(), tokens(320).view(20, 16, D)), (ConvGate(), tokens(640).view(10, D, 8, 8))],
    ids=["time first", "convolution"],
)
def test_scores_that_lie_in_another_order_than_tokens_override_nothing(model, x):
    panel = inspect_moe(nn.Sequential(model), [x])
    assert panel[0]["follows scores"] == pytest.approx(1)
    assert "overridden" not in kinds(panel)


class WarmUp(Base):
    steps = 0

    def forward(self, x_ND):
        self.steps += 1
        return super().forward(x_ND) if self.steps > 2 else self.gate(x_ND).mean() + x_ND


def test_experts_that_begin_later_are_read_then():
    model = nn.Sequential(WarmUp(), Base()).train()
    with watch(model, every=1) as w:
        for step in range(5):
            model(tokens(50) + step)
    assert [layer.name for layer in w.panel().layers] == ["0", "1"]


class Compiled(Base):
    def __init__(self):
        super().__init__()
        for e in range(E):
            self.experts[e] = torch.compile(self.experts[e], backend="eager")


class Named(nn.Module):
    """Its arguments are called as those of stacked experts."""

    def __init__(self):
        super().__init__()
        self.conv, self.moe = nn.Conv1d(D, D, 1), Base()

    def forward(self, x_ND, indices=None, weights=None):
        return self.moe(self.conv(x_ND[..., None])[..., 0])


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    aux: torch.Tensor


class WithDataclass(Base):
    def forward(self, x_ND):
        return Output(super().forward(x_ND), x_ND.mean())


class UsesDataclass(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = WithDataclass(), nn.Linear(D, 3)

    def forward(self, x_ND):
        return self.head(self.block(x_ND).hidden)


@pytest.mark.parametrize(
    "model", [nn.Sequential(Compiled()), Named(), UsesDataclass()], ids=lambda m: type(m)
)
def test_other_forms_are_read(model):
    (layer,) = inspect_moe(model, [tokens(200)]).layers
    block = dict(model.named_modules())[layer.name]
    assert layer["H(E|x)"] == pytest.approx(entropy(block.weight_NE), abs=1e-4)


def test_lazy_experts_are_read_at_the_second_step():
    block = Base()
    block.experts = nn.ModuleList(nn.LazyLinear(D) for _ in range(E))
    model = nn.Sequential(block).train()
    with pytest.raises(ValueError, match="not initialised yet: call it once before"):
        inspect_moe(copy.deepcopy(model), [tokens(50)])
    with watch(model, every=1) as w:
        model(tokens(50))
        model(tokens(50))
    assert w.panel()[0].num_tokens == 50
