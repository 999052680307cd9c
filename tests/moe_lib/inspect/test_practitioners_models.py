"""Models as people write them, in which a panel was wrong once: against what the model itself kept.

Shapes: N tokens, D width, O output width, E experts, K chosen, B samples, C channels, L length.
"""

import warnings

import pytest
import torch
from list_moes import D, E, tokens, top
from torch import nn
from torch.nn import functional as F

from moe_lib import inspect_moe, soft_nearest_neighbor_loss
from moe_lib.inspect import Adapter, Dispatch, rows, watch


def kept_weights(module, weight_NE):
    module.weight_NE = weight_NE.detach()
    return weight_NE


def check_weights(layer, weight_NE):
    """Load, effective experts and H(E|x) are those of the weights; where tokens choose, slots are counted."""
    weight_NE = weight_NE.flatten(0, -2).double()
    share_NE = weight_NE / weight_NE.sum(1, keepdim=True)
    use_E = share_NE.sum(0) if (weight_NE > 0).all() else (weight_NE > 0).double().sum(0)
    use_E = use_E / use_E.sum()
    assert layer.load_E == pytest.approx(use_E.tolist(), abs=1e-4)
    assert layer["effective experts"] == pytest.approx(torch.special.entr(use_E).sum().exp().item(), rel=1e-4)
    assert layer["H(E|x)"] == pytest.approx(torch.special.entr(share_NE).sum(1).mean().item(), abs=1e-4)
    assert layer.num_tokens == len(weight_NE)
    assert layer["mixture error"] < 1e-3


# --------------------------------------------------------------------------- what a block returns


class Beside(nn.Module):
    """All experts, weighted; their own answers are returned beside the mixture."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.gate = kind, nn.Linear(D, 4)
        self.gate.bias.data[0] = 4.0
        self.experts = nn.ModuleList(nn.Linear(D, 10) for _ in range(4))

    def forward(self, x_ND):
        weight_NE = kept_weights(self, self.gate(x_ND).softmax(1))
        answer_NEO = torch.stack([expert(x_ND) for expert in self.experts], 1)
        output_NO = (answer_NEO * weight_NE[..., None]).sum(1)
        return {
            "stacked first": {"expert_logits": answer_NEO, "logits": output_NO},
            "list last": (output_NO, list(answer_NEO.unbind(1))),
            "weighted first": (answer_NEO * weight_NE[..., None], output_NO),
        }[self.kind]


@pytest.mark.parametrize("kind", ["stacked first", "list last", "weighted first"])
def test_answers_returned_beside_the_mixture(kind):
    model = Beside(kind)
    panel = inspect_moe(model, [tokens(200)])
    check_weights(panel[0], model.weight_NE)
    assert "collapsed" in {alarm.kind for alarm in panel.alarms}


class Narrow(nn.Module):
    """As many classes as experts, whose answers are random in training."""

    def __init__(self, after):
        super().__init__()
        torch.manual_seed(0)
        self.after, self.gate = after, nn.Linear(D, 10)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Dropout(0.2), nn.Linear(D, 10)) for _ in range(10)
        )

    def forward(self, x_ND):
        weight_NE = kept_weights(self, (4 * self.gate(x_ND)).softmax(1))
        answer_NEO = torch.stack([expert(x_ND) for expert in self.experts], 1)
        return self.after((answer_NEO * weight_NE[..., None]).sum(1))


@pytest.mark.parametrize(("after", "is_mixture"), [(nn.Identity(), True), (nn.LogSoftmax(1), False)])
def test_random_answers_are_checked_by_those_of_one_call(after, is_mixture):
    model = Narrow(after).train()
    with watch(model, every=1) as w:
        model(tokens(200)).sum().backward()
    panel = w.panel()
    assert ("unexplained" in {alarm.kind for alarm in panel.alarms}) is not is_mixture
    if is_mixture:
        check_weights(panel[0], model.weight_NE)


class DropPath(nn.Module):
    def forward(self, x_BTD):
        return x_BTD * (torch.rand(len(x_BTD), 1, 1) > 0.5) * 2 if self.training else x_BTD


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.drop_path = nn.Linear(D, E), DropPath()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x_BTD):
        weight_BTE = kept_weights(self, top(self.gate(x_BTD), 2))
        mixed_BTD = sum(weight_BTE[..., e, None] * expert(x_BTD) for e, expert in enumerate(self.experts))
        return x_BTD + self.drop_path(mixed_BTD)


def test_a_dropped_path_drops_no_token():
    model = Residual().train()
    with watch(model, every=1) as w:
        model(tokens(320).view(20, 16, D)).sum().backward()
    check_weights(w.panel()[0], model.weight_NE)
    assert w.panel()[0]["dropped"] == 0


# --------------------------------------------------------------------------------------- experts


class Own(nn.ModuleList):
    def forward(self, x_ND, weight_NE):
        return sum(weight_NE[:, e, None] * expert(x_ND) for e, expert in enumerate(self))


class Idle(nn.Module):
    """Two of six experts compute nothing, in a list with a forward of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, 6)
        self.experts = Own([*(nn.Linear(D, D) for _ in range(4)), nn.Identity(), nn.Identity()])

    def forward(self, x_ND):
        return self.experts(x_ND, kept_weights(self, top(self.gate(x_ND), 2)))


class WeightedInputs(nn.Module):
    """Weights multiply what an expert reads."""

    def __init__(self, num_chosen):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.num_chosen = nn.Linear(D, E), num_chosen
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)) for _ in range(E)
        )

    def forward(self, x_ND):
        weight_NE = kept_weights(self, top(3 * self.gate(x_ND), self.num_chosen))
        output_ND = torch.zeros_like(x_ND)
        for e, expert in enumerate(self.experts):
            row_R = weight_NE[:, e].nonzero().flatten()
            output_ND = output_ND.index_add(0, row_R, expert(x_ND[row_R] * weight_NE[row_R, e, None]))
        return output_ND


class Convolutions(nn.Module):
    """One expert a sample; the last gets none if the gate says so."""

    def __init__(self, layer, channels, num_dims):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.dims = nn.Linear(channels, 4), tuple(range(2, 2 + num_dims))
        self.experts = nn.ModuleList(layer(channels, channels, 3, padding=1) for _ in range(4))
        self.gate.bias.data[3] = -100.0

    def forward(self, x):
        index_B = (9 * self.gate(x.mean(self.dims))).argmax(1)
        kept_weights(self, F.one_hot(index_B, 4).float())
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            row_R = (index_B == e).nonzero().flatten()
            out.index_add_(0, row_R, expert(x[row_R]))
        return out


class Grid(nn.Module):
    """Tokens [B, H, W, D]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x_BHWD):
        weight_BHWE = kept_weights(self, self.gate(x_BHWD).softmax(-1))
        return sum(weight_BHWE[..., e, None] * expert(x_BHWD) for e, expert in enumerate(self.experts))


class Sizes(nn.Module):
    """Experts of different widths."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, hidden), nn.ReLU(), nn.Linear(hidden, D)) for hidden in (4, 8, 16, 32)
        )

    def forward(self, x_ND):
        weight_NE = kept_weights(self, self.gate(x_ND).softmax(-1))
        return sum(weight_NE[:, e, None] * expert(x_ND) for e, expert in enumerate(self.experts))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Idle(), tokens(300)),
        (WeightedInputs(2), tokens(300)),
        (WeightedInputs(E), tokens(300)),
        (Convolutions(nn.Conv2d, 3, 2), torch.randn(64, 3, 8, 8)),
        (Convolutions(nn.Conv1d, 16, 1), torch.randn(128, 16, 20)),
        (Convolutions(nn.Conv1d, 20, 1), torch.randn(128, 20, 20)),
        (Grid(), tokens(144).view(4, 6, 6, D)),
        (Sizes(), tokens(300)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_experts_of_many_kinds(model, x):
    layer = inspect_moe(nn.Sequential(model, nn.Flatten()), [x])[0]
    check_weights(layer, model.weight_NE)
    assert layer["dropped"] == 0


class Edges(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x_ND, edge_2M):
        return torch.zeros_like(x_ND).index_add(0, edge_2M[1], self.linear(x_ND)[edge_2M[0]])


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = nn.Linear(D, 4), nn.ModuleList(Edges() for _ in range(4))

    def forward(self, x_ND, edge_2M):
        weight_NE = kept_weights(self, self.gate(x_ND).softmax(-1))
        return sum(weight_NE[:, e, None] * f(x_ND, edge_2M) for e, f in enumerate(self.experts))


def test_experts_that_read_more_than_tokens_are_counted():
    model = Graph()
    layer = inspect_moe(model, [((tokens(50), torch.randint(0, 50, (2, 200))), None)])[0]
    assert layer.load_E == pytest.approx(model.weight_NE.mean(0).tolist(), abs=1e-5)
    assert layer["mixture error"] < 1e-5
    assert any("take more than tokens: the mixture was checked" in note for note in layer.notes)


# --------------------------------------------------------------------------------- stacked weights


class Stack(nn.Module):
    """Stacked weights with room for so many tokens an expert."""

    def __init__(self, capacity):
        super().__init__()
        torch.manual_seed(0)
        self.capacity = capacity
        self.w_in = nn.Parameter(torch.randn(E, D, 16) / 4)
        self.w_out = nn.Parameter(torch.randn(E, 16, D) / 4)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out_ND = torch.zeros_like(hidden_states)
        for e in range(E):
            row_R, slot_R = torch.where(top_k_index == e)
            row_R, slot_R = row_R[: self.capacity], slot_R[: self.capacity]
            answer_RD = (hidden_states[row_R] @ self.w_in[e]).relu() @ self.w_out[e]
            out_ND.index_add_(0, row_R, answer_RD * top_k_weights[row_R, slot_R, None])
        return out_ND


class Stacked(nn.Module):
    def __init__(self, num_chosen, capacity=10**6):
        super().__init__()
        self.experts, self.num_chosen = Stack(capacity), num_chosen
        self.gate = nn.Linear(D, E)

    def forward(self, x_ND):
        weight_NK, index_NK = self.gate(x_ND).softmax(1).topk(self.num_chosen, 1)
        kept_weights(self, torch.zeros(len(x_ND), E).scatter(1, index_NK, weight_NK))
        return self.experts(x_ND, index_NK, weight_NK)


@pytest.mark.parametrize("num_chosen", [1, 2])
def test_an_expert_that_answers_zero_serves_its_tokens(num_chosen):
    model = Stacked(num_chosen)
    model.experts.w_out.data[3:5] = 0
    panel = inspect_moe(nn.Sequential(model), [tokens(400)])
    check_weights(panel[0], model.weight_NE)
    assert panel[0]["dropped"] == panel[0]["never chosen"] == 0
    assert not {"dropping", "dead"} & {alarm.kind for alarm in panel.alarms}


def test_tokens_over_capacity_are_dropped_beside_an_expert_that_answers_zero():
    model = Stacked(1, capacity=20)
    model.experts.w_out.data[3] = 0
    panel = inspect_moe(nn.Sequential(model), [tokens(400)])
    count_E = (model.weight_NE > 0).sum(0)
    lost = sum(max(int(count) - 20, 0) for e, count in enumerate(count_E) if e != 3)
    assert panel[0]["dropped"] == pytest.approx(lost / 400)


def test_slots_dropped_inside_of_stacked_experts_raise_an_alarm():
    panel = inspect_moe(nn.Sequential(Stacked(2, capacity=16)), [tokens(128)])
    assert "unexplained" in {alarm.kind for alarm in panel.alarms}
    assert "if it drops tokens over a capacity" in panel[0].explanation


# ----------------------------------------------------------------------------- more than one list


class Two(nn.Module):
    """Two mixtures in one module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(D, E), nn.Linear(D, E)
        self.attn_experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.ffn_experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x_ND):
        for gate, experts in ((self.one, self.attn_experts), (self.two, self.ffn_experts)):
            weight_NE = top(gate(x_ND), 2)
            x_ND = x_ND + sum(weight_NE[:, e, None] * f(x_ND) for e, f in enumerate(experts))
        return x_ND


def test_a_list_beside_the_one_that_is_read_is_named():
    panel = inspect_moe(nn.Sequential(Two()), [tokens(100)])
    assert len(panel.layers) == 1
    assert any("its list 'attn_experts'" in entry for entry in panel.unread)


class Inner(nn.Module):
    def __init__(self, name="experts"):
        super().__init__()
        self.name, self.gate = name, nn.Linear(D, 4)
        setattr(self, name, nn.ModuleList(self.expert() for _ in range(4)))

    def expert(self):
        return nn.Linear(D, D)

    def forward(self, x_ND):
        weight_NE = kept_weights(self, top(self.gate(x_ND), 2))
        return sum(weight_NE[..., e, None] * f(x_ND) for e, f in enumerate(getattr(self, self.name)))


class Outer(Inner):
    def expert(self):
        return Inner()


def test_a_mixture_of_mixtures_is_read_under_any_name():
    torch.manual_seed(0)
    model = nn.Sequential(Outer("groups"))
    panel = inspect_moe(model, [tokens(100)])
    assert [layer.name for layer in panel.layers] == ["0", *(f"0.groups.{e}" for e in range(4))]
    for layer in panel.layers:
        check_weights(layer, model.get_submodule(layer.name).weight_NE)


class Nested(nn.Module):
    """A list of lists of experts, one for each step."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(D, 4) for _ in range(2))
        self.experts = nn.ModuleList(nn.ModuleList(nn.Linear(D, D) for _ in range(4)) for _ in range(2))

    def forward(self, x_ND):
        for gate, experts in zip(self.gates, self.experts, strict=True):
            weight_NE = gate(x_ND).softmax(-1)
            x_ND = x_ND + sum(weight_NE[:, e, None] * f(x_ND) for e, f in enumerate(experts))
        return x_ND


def test_lists_in_a_list_are_named():
    panel = inspect_moe(nn.Sequential(Nested()), [tokens(100)])
    assert len(panel.layers) == 1
    assert any("its list 'experts.0'" in entry for entry in panel.unread)


class TitanLike(nn.Module):
    """Attributes named as torchtitan's, in another order of arguments: a gate called router."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = nn.Linear(D, E), Stack(10**6)
        self.experts.w1, self.experts.w2, self.experts.w3 = (
            nn.Parameter(torch.zeros(E, 1, 1)) for _ in "123"
        )

    def forward(self, x_ND):
        weight_NK, index_NK = self.router(x_ND).softmax(1).topk(2, 1)
        kept_weights(self, torch.zeros(len(x_ND), E).scatter(1, index_NK, weight_NK))
        return self.experts(x_ND, index_NK, weight_NK)


def test_names_alone_do_not_make_a_block_unreadable():
    model = TitanLike()
    check_weights(inspect_moe(nn.Sequential(model), [tokens(200)])[0], model.weight_NE)


# --------------------------------------------------------------------------- losses, calls, adapters


class WithLoss(Inner):
    def forward(self, x_ND):
        output_ND = super().forward(x_ND)
        self.aux = soft_nearest_neighbor_loss(output_ND, torch.arange(len(output_ND)) % 3)
        return output_ND


def test_a_soft_nearest_neighbor_loss_inside_of_a_block():
    torch.manual_seed(0)
    model = nn.Sequential(WithLoss()).train()
    with watch(model, every=1) as w:
        (model(tokens(64)).sum() + model[0].aux).backward()
    check_weights(w.panel()[0], model[0].weight_NE)


class Padded(Inner):
    def forward(self, x_BTD, src_key_padding_mask=None):
        return super().forward(x_BTD)


def test_a_mask_under_another_name_is_noted():
    mask_BT = torch.zeros(4, 10, dtype=torch.bool)
    batch = {"x_BTD": tokens(40).view(4, 10, D), "src_key_padding_mask": mask_BT}
    notes = inspect_moe(Padded(), [batch])[0].notes
    assert "padding is told apart by `attention_mask` alone: 'src_key_padding_mask' was not used" in notes


class Pair(Inner):
    def forward(self, x_ND, y_ND):
        return super().forward(x_ND + y_ND)


def test_a_batch_that_does_not_fit_the_model_is_refused_with_the_remedy():
    batch = (tokens(10), tokens(10))
    with pytest.raises(ValueError, match=r"missing a required argument: 'y_ND'.*give \(\(a, b\), None\)"):
        inspect_moe(Pair(), [batch])
    assert inspect_moe(Pair(), [(batch, None)])[0].num_tokens == 10


class ByFunction(nn.Module):
    """Routed without a module; it keeps its decision."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate_ED = nn.Parameter(torch.randn(E, D))
        self.weight_EDD = nn.Parameter(torch.randn(E, D, D))

    def forward(self, x_ND):
        self.kept = (x_ND @ self.gate_ED.T).softmax(-1).topk(2, 1)
        weight_NE = torch.zeros(len(x_ND), E).scatter(1, self.kept[1], self.kept[0])
        return torch.einsum("nd,edo,ne->no", x_ND, self.weight_EDD, weight_NE)


DISPATCHES = {  # what an adapter makes of tokens, weights, indices and output -> what is said of it
    "right": (lambda x, w, i, y: Dispatch(x, i, w, y), None),
    "int16": (lambda x, w, i, y: Dispatch(x, i.to(torch.int16), w, y), None),
    "flat": (lambda x, w, i, y: Dispatch(x, i[:, 0], w[:, 0], y), "indices_NK must have 2 dimensions"),
    "swapped": (lambda x, w, i, y: Dispatch(x, w, i, y), "indices_NK must be integers"),
    "unlike": (lambda x, w, i, y: Dispatch(x, i, w[:, :1], y), "must have one shape"),
    "short": (lambda x, w, i, y: Dispatch(x[:5], i, w, y), "tokens_ND must have 99 rows"),
    "tuple": (lambda x, w, i, y: (x, i, w, y), "must return a Dispatch, got tuple"),
}


@pytest.mark.parametrize("case", DISPATCHES)
def test_what_an_adapter_gives_is_checked(case):
    make, said = DISPATCHES[case]

    class Mine(Adapter):
        classes = ("ByFunction",)

        def dispatch(self, call):
            return make(rows(call.tokens), *self.block.kept, rows(call.output))

        def answer(self, e, tokens_MD):
            return tokens_MD @ self.block.weight_EDD[e]

    def found():
        return inspect_moe(nn.Sequential(ByFunction()), [tokens(99)], adapters=[Mine])

    if said is None:
        assert found()[0]["mixture error"] < 1e-5
    else:
        with pytest.raises((ValueError, TypeError), match=said):
            found()
    Mine.classes = "ByFunction"
    with pytest.raises(ValueError, match=r"Mine.classes must be a tuple of names, got 'ByFunction'"):
        found()


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script")
        yield
