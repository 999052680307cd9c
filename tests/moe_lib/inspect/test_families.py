"""Blocks of every style against counts by plain hooks; both major versions of transformers.

Shapes: N tokens, K slots, D width, E experts.
"""

import importlib.util

import pytest
import tiny_moes
import torch
from torch import nn

from moe_lib import AdaptiveClusteringRouter, MoE
from moe_lib.inspect import Adapter, CollapseCallback, Dispatch, inspect_moe, rows

pytestmark = pytest.mark.slow

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: .[test-hf]"
)
quiet = pytest.mark.filterwarnings("ignore")  # of transformers, about its own affairs


def counts(seen):
    """How often each expert served, by block."""
    return [torch.cat([served_NE for served_NE, _ in calls]).sum(0).tolist() for calls in seen.values()]


@quiet
@needs_transformers
def test_nllb_in_transformers_5_runs_two_experts_only():
    import transformers

    panel = inspect_moe(tiny_moes.causal_lm("NllbMoe"), tiny_moes.batches("NllbMoe"))
    dead = {layer["never chosen"] for layer in panel.layers}
    if transformers.__version__.startswith("5"):
        assert dead == {2}
        assert any(alarm.kind == "dead" for alarm in panel.alarms)


@quiet
@needs_transformers
def test_generation_is_counted():
    """Prompt and new tokens, under `generate` itself."""
    model, prompt = tiny_moes.causal_lm("Mixtral"), tiny_moes.ids()

    def run(batch):
        return model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)

    batch = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    panel = inspect_moe(model, [batch], run=run)
    seen = tiny_moes.observe(model)
    run(batch)
    for layer, count_E in zip(panel.layers, counts(seen), strict=True):
        assert layer.state.count_E.tolist() == count_E
        assert layer.num_tokens == prompt.numel() + 4 * len(prompt)  # the fifth new token is not read


@quiet
@needs_transformers
@pytest.mark.parametrize("checkpointed", [False, True])
def test_callback_in_a_real_trainer(tmp_path, checkpointed):
    pytest.importorskip("accelerate")
    import transformers

    model, rows_of_ids = tiny_moes.causal_lm("Mixtral"), tiny_moes.ids(batch=16)
    data = [{"input_ids": ids, "labels": ids} for ids in rows_of_ids]
    callback = CollapseCallback(every=2, verbose=False)
    options = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=4, logging_steps=1, report_to=[],
        use_cpu=True, gradient_checkpointing=checkpointed, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model, options, train_dataset=data, callbacks=[callback])
    trainer.train()
    assert len(callback.watch.history) == 2
    for layer in callback.watch.panel().layers:  # a step's tokens, counted once
        assert layer.num_tokens == 4 * rows_of_ids.shape[1]
        assert float(layer.state.slots) == 2 * layer.num_tokens
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert all(any(key.startswith("moe/") for key in row) for row in logged)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.layers.modules())


@quiet
@needs_transformers
def test_capacity_drops_tokens():
    model = tiny_moes.causal_lm("SwitchTransformers")
    data = tiny_moes.batches("SwitchTransformers")
    panel = inspect_moe(model, data)
    for layer in panel.layers:
        read = sum(b["decoder_input_ids" if "decoder" in layer.name else "input_ids"].numel() for b in data)
        served = int(layer.state.count_E.sum())
        assert layer.num_tokens == read
        assert layer["dropped"] == pytest.approx(1 - served / read)
        assert layer["dropped"] > 0.1


@quiet
@needs_transformers
@pytest.mark.parametrize("balanced", [False, True])
def test_selection_bias_is_seen(balanced):
    """Sigmoid scores with a selection bias: what the scores say is not what is dispatched."""
    model = tiny_moes.causal_lm("DeepseekV3", n_group=1, topk_group=1)
    for name, buffer in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith("e_score_correction_bias"):
            buffer.data[:2] += -0.6 if balanced else 0.6
    panel = inspect_moe(model, [{"input_ids": tiny_moes.ids()}])
    seen = tiny_moes.observe(model)
    with torch.no_grad():
        model(input_ids=tiny_moes.ids())
    for layer, count_E in zip(panel.layers, counts(seen), strict=True):
        assert layer.state.count_E.tolist() == count_E
        if layer.measures["follows scores"].value == layer.measures["follows scores"].value:  # not NaN
            assert layer["follows scores"] < 0.99


# ------------------------------------------------------------------------- without transformers


def tokens(n=60, seed=0):
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("adaptive", [False, True])
def test_our_own_mixture(top_k, adaptive):
    torch.manual_seed(0)
    router = AdaptiveClusteringRouter(16, 4) if adaptive else None
    moe = MoE(16, 4, 8, top_k=top_k, router=router)
    panel = inspect_moe(moe, [tokens()])
    routing = moe.route(tokens())
    first_E = routing.first_choices().bincount(minlength=4)
    assert panel[0].state.first_E.tolist() == first_E.tolist()
    weight_NE = routing.dense_weights().detach()
    share_E = (weight_NE / weight_NE.sum(1, keepdim=True)).mean(0)
    torch.testing.assert_close(torch.tensor(panel[0].weight_E), share_E, rtol=1e-5, atol=1e-6)
    assert panel[0]["mixture error"] < 1e-5
    if top_k:
        assert panel[0].state.count_E.tolist() == routing.indices_NK.flatten().bincount(minlength=4).tolist()


class Handwritten(nn.Module):
    """A gate by F.linear, sigmoid scores that are not normalised, a norm inside, a residual connection."""

    def __init__(self, container=nn.ModuleList, top_k=2):
        super().__init__()
        self.top_k = top_k
        self.norm = nn.LayerNorm(16)
        self.centres = nn.Parameter(torch.randn(4, 16))
        nets = [nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16)) for _ in range(4)]
        self.nets = container({str(i): n for i, n in enumerate(nets)} if container is nn.ModuleDict else nets)

    def choose(self, x_ND):
        return nn.functional.linear(self.norm(x_ND), self.centres).sigmoid().topk(self.top_k, 1)

    def forward(self, x_ND):
        weight_NK, index_NK = self.choose(x_ND)
        h_ND, out_ND = self.norm(x_ND), x_ND.clone()
        for e, net in enumerate(self.nets.children()):
            row, slot = torch.where(index_NK == e)
            if len(row):
                out_ND = out_ND.index_add(0, row, net(h_ND[row]) * weight_NK[row, slot, None])
        return out_ND


@pytest.mark.parametrize("container", [nn.ModuleList, nn.ModuleDict])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_list_under_any_name_behind_any_gate(container, top_k):
    torch.manual_seed(0)
    block = Handwritten(container, top_k)
    model = nn.Sequential(nn.Linear(16, 16), block, nn.Linear(16, 3))
    panel = inspect_moe(model, [tokens(), tokens(seed=1)])
    read_ND = torch.cat([model[0](tokens()), model[0](tokens(seed=1))])
    weight_NK, index_NK = block.choose(read_ND)
    (layer,) = panel.layers
    assert layer.name == "1"
    assert layer.state.count_E.tolist() == index_NK.flatten().bincount(minlength=4).tolist()
    dense_NE = torch.zeros(len(read_ND), 4).scatter(1, index_NK, weight_NK)
    share_E = (dense_NE / dense_NE.sum(1, keepdim=True)).mean(0)
    torch.testing.assert_close(torch.tensor(layer.weight_E), share_E.detach(), rtol=1e-5, atol=1e-6)
    assert "residual" in layer.explanation
    assert layer["mixture error"] < 1e-5


class Dense(nn.Module):
    """Every expert answers every token of [B, T, D]; the gate weighs them."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 3)
        self.branches = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x_BTD):
        gate_BTE = self.gate(x_BTD).softmax(-1)
        return torch.einsum("bte,btde->btd", gate_BTE, torch.stack([f(x_BTD) for f in self.branches], -1))


def test_a_subclass_of_our_own_mixture():
    class Mine(MoE):
        pass

    layer = inspect_moe(nn.Sequential(Mine(16, 4, 8, top_k=2)), [torch.randn(50, 16)])[0]
    assert layer.num_experts == 4
    assert layer["mixture error"] < 1e-6


def test_a_soft_mixture():
    torch.manual_seed(0)
    model = Dense()
    x_BTD = torch.randn(5, 7, 16)
    panel = inspect_moe(model, [x_BTD])
    gate_NE = model.gate(x_BTD).detach().softmax(-1).flatten(0, 1).double()
    assert panel[0].weight_E == pytest.approx(gate_NE.mean(0).tolist(), rel=1e-5)
    entropy = float(torch.special.entr(gate_NE).sum(1).mean())
    assert panel[0]["H(E|x)"] == pytest.approx(entropy, rel=1e-5)
    assert panel[0]["mixture error"] < 1e-5


class Stack(nn.Module):
    def __init__(self, words="layers"):
        super().__init__()
        setattr(self, words, nn.ModuleList(nn.Linear(16, 16) for _ in range(3)))
        self.words = words

    def forward(self, x):
        for layer in getattr(self, self.words):
            x = layer(x).relu()
        return x


class Ensemble(nn.Module):
    def __init__(self):
        super().__init__()
        self.members = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return sum(member(x) for member in self.members) / 3


@pytest.mark.parametrize("model", [Stack(), Ensemble(), nn.Linear(16, 16)])
def test_what_is_no_mixture_is_not_taken_for_one(model):
    with pytest.raises(ValueError, match="no mixture-of-experts block was recognised"):
        inspect_moe(model, [tokens()])


def test_what_looks_like_a_mixture_and_is_not_read_is_named():
    class OddMoE(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 16, 16))

        def forward(self, x):
            return torch.einsum("nd,edo,e->no", x, self.w, torch.ones(3))

    panel = inspect_moe(nn.Sequential(Handwritten(), OddMoE(), Stack("experts")), [tokens()])
    assert len(panel) == 1
    assert any("1 (OddMoE)" in entry and "Adapter" in entry for entry in panel.unread)
    assert any("one after the other" in entry for entry in panel.unread)


class TenLines(Adapter):
    classes = ("FusedMoE",)
    watch = ("pick",)

    def dispatch(self, call):
        weight_NK, index_NK = call.seen["pick"]
        return Dispatch(rows(call.tokens), index_NK, weight_NK, rows(call.output))

    def answer(self, e, tokens_MD):
        return tokens_MD @ self.block.stacked[e]


class Pick(nn.Linear):
    def forward(self, x_ND):
        return super().forward(x_ND).softmax(1).topk(2, 1)


class FusedMoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.pick = Pick(16, 4)
        self.stacked = nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x_ND):
        weight_NK, index_NK = self.pick(x_ND)
        return torch.einsum("nd,nkdo,nk->no", x_ND, self.stacked[index_NK], weight_NK)


def test_an_adapter_of_ones_own():
    torch.manual_seed(0)
    model = nn.Sequential(FusedMoE())
    with pytest.raises(ValueError, match=r"0 \(FusedMoE\).*Adapter"):
        inspect_moe(model, [tokens()])
    panel = inspect_moe(model, [tokens()], adapters=[TenLines])
    _, index_NK = model[0].pick(tokens())
    assert panel[0].state.count_E.tolist() == index_NK.flatten().bincount(minlength=4).tolist()
    assert panel[0]["mixture error"] < 1e-5


class ForeignMLP(nn.Module):
    """A block as others write it: tokens sorted by expert, capacity, outer scores, results put back."""

    def __init__(self, capacity=12):
        super().__init__()
        self.wg = nn.Linear(16, 4, bias=False)
        self.mlps = nn.ModuleDict({f"mlp_{i}": nn.Linear(16, 16) for i in range(4)})
        self.capacity = capacity

    def forward(self, hidden_BTD):
        x_ND = hidden_BTD.reshape(-1, 16)
        prob_N, expert_N = self.wg(x_ND).softmax(-1).max(-1)
        order_N = expert_N.argsort(stable=True)
        self.served = {}
        y_ND = torch.zeros_like(x_ND)
        for i, mlp in enumerate(self.mlps.values()):
            mine = order_N[expert_N[order_N] == i][: self.capacity]
            self.served[i] = len(mine)
            if len(mine):
                y_ND = y_ND.index_copy(0, mine, mlp(x_ND[mine]) * prob_N[mine, None])
        return y_ND.view_as(hidden_BTD)


class MaskedDispatch(nn.Module):
    """Every expert runs on all tokens, masked; scores are normalised over the chosen; a shared expert."""

    def __init__(self):
        super().__init__()
        self.score = nn.Parameter(torch.randn(16, 6))
        self.expert_mlps = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.shared_expert = nn.Linear(16, 16)

    def forward(self, x_BTD):
        top, index = (x_BTD @ self.score).topk(2, -1)
        self.index = index
        gate_BTE = torch.zeros(*x_BTD.shape[:2], 6).scatter(-1, index, top.softmax(-1))
        out_BTD = self.shared_expert(x_BTD)
        for e, mlp in enumerate(self.expert_mlps):
            out_BTD = out_BTD + gate_BTE[..., e : e + 1] * mlp(x_BTD)
        return out_BTD


@pytest.mark.parametrize("kind", [ForeignMLP, MaskedDispatch])
def test_blocks_in_foreign_styles(kind):
    torch.manual_seed(0)
    model = kind()
    x_BTD = torch.randn(3, 20, 16)
    (layer,) = inspect_moe(nn.Sequential(model), [x_BTD]).layers
    if kind is ForeignMLP:
        assert layer.state.count_E.tolist() == list(model.served.values())
        assert layer["dropped"] == pytest.approx(1 - sum(model.served.values()) / 60)
        assert layer["dropped"] > 0
    else:
        assert layer.state.count_E.tolist() == model.index.flatten().bincount(minlength=6).tolist()
        assert "shared expert" in layer.explanation
    assert layer["mixture error"] < 1e-5


class NoisyNamed(nn.Module):
    """Noisy top-k over a ModuleDict; answers are put back with masks."""

    def __init__(self):
        super().__init__()
        self.gate, self.noise = nn.Linear(16, 4), nn.Linear(16, 4)
        self.experts = nn.ModuleDict({f"e{i}": nn.Linear(16, 16) for i in range(4)})

    def forward(self, x_BTD):
        score_BTE = self.gate(x_BTD)
        score_BTE = score_BTE + torch.randn_like(score_BTE) * nn.functional.softplus(self.noise(x_BTD))
        top, index = score_BTE.topk(2, -1)
        gate_BTE = torch.full_like(score_BTE, -torch.inf).scatter(-1, index, top).softmax(-1)
        self.served = index.flatten().bincount(minlength=4).tolist()
        out_BTD = torch.zeros_like(x_BTD)
        for e, expert in enumerate(self.experts.values()):
            mine = (index == e).any(-1)
            out_BTD[mine] += expert(x_BTD[mine]) * gate_BTE[mine][:, e : e + 1]
        return out_BTD


def test_noisy_scores():
    torch.manual_seed(0)
    model = NoisyNamed()
    (layer,) = inspect_moe(nn.Sequential(model), [torch.randn(3, 20, 16)]).layers
    assert layer.state.count_E.tolist() == model.served
    assert layer["dropped"] == 0
    assert layer["mixture error"] < 1e-5


@pytest.mark.parametrize("after", ["relu", "dropout", "scale", "pool"])
def test_what_is_done_after_mixing_is_refused_by_name(after):
    """Feature by feature, or over tokens: the tags no longer are the weights."""

    class Transformed(NoisyNamed):
        def forward(self, x_BTD):
            out_BTD = super().forward(x_BTD)
            if after == "pool":
                return out_BTD.mean(1)
            change = {"relu": torch.relu, "scale": torch.linspace(1, 2, 16).mul}
            return change.get(after, lambda y: nn.functional.dropout(y, 0.3))(out_BTD)

    torch.manual_seed(0)
    reason = "pooled" if after == "pool" else "transformed after that"
    with pytest.raises(ValueError, match=rf"0 \(Transformed\): the answers .*{reason}"):
        inspect_moe(nn.Sequential(Transformed()), [torch.randn(3, 20, 16)])


class EinsumLayer(nn.Module):
    """Stacked weights and dispatch by einsum in one module, under a name that says nothing."""

    def __init__(self):
        super().__init__()
        self.w_gate = nn.Linear(16, 4, bias=False)
        self.w_in, self.w_out = nn.Parameter(torch.randn(4, 16, 8)), nn.Parameter(torch.randn(4, 8, 16))

    def forward(self, x_ND):
        gate_NE = self.w_gate(x_ND).softmax(-1)
        hidden_ENH = torch.einsum("nd,edh->enh", x_ND, self.w_in).relu()
        return torch.einsum("ne,enh,ehd->nd", gate_NE, hidden_ENH, self.w_out)


class Codebook(nn.Module):
    """No experts, but called as experts are."""

    def __init__(self):
        super().__init__()
        self.scores, self.codes = nn.Linear(16, 32), Codes()

    def forward(self, x_ND):
        weights, indices = self.scores(x_ND).softmax(-1).topk(2)
        return self.codes(x_ND, indices, weights)


class Codes(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(32, 16))

    def forward(self, x_ND, indices, weights):
        return (self.table[indices] * weights[..., None]).sum(1)


def test_stacked_weights_in_one_module_are_named_and_a_codebook_is_not():
    panel = inspect_moe(nn.Sequential(Handwritten(), EinsumLayer(), Codebook()), [tokens()])
    assert [layer.name for layer in panel.layers] == ["0"]
    assert len(panel.unread) == 1
    assert panel.unread[0].startswith("1 (EinsumLayer): write an Adapter")
    with pytest.raises(ValueError, match=r"recognised \(the model \(EinsumLayer\)\): write an Adapter"):
        inspect_moe(EinsumLayer(), [tokens()])


class TitanRouter(nn.Linear):
    def forward(self, x_ND, bias=None):
        top, index = super().forward(x_ND).sigmoid().topk(2, 1)
        return top, index, index.flatten().bincount(minlength=4)


class TitanExperts(nn.Module):
    def __init__(self):
        super().__init__()
        for name, shape in (("w1", (4, 8, 16)), ("w2", (4, 16, 8)), ("w3", (4, 8, 16))):
            setattr(self, name, nn.Parameter(torch.randn(shape) / 4))


class TitanMoE(nn.Module):
    """Experts stacked as in torchtitan: w1, w2, w3."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = TitanRouter(16, 4), TitanExperts()

    def forward(self, x_BTD):
        x_ND = x_BTD.flatten(0, 1)
        top_NK, index_NK, _ = self.router(x_ND)
        w1, w2, w3 = (getattr(self.experts, name)[index_NK] for name in ("w1", "w2", "w3"))
        hidden = torch.einsum("nd,nkhd->nkh", x_ND, w1)
        hidden = nn.functional.silu(hidden) * torch.einsum("nd,nkhd->nkh", x_ND, w3)
        return torch.einsum("nkh,nkdh,nk->nd", hidden, w2, top_NK).view(x_BTD.shape)


def test_experts_stacked_as_in_torchtitan():
    torch.manual_seed(0)
    model = TitanMoE()
    panel = inspect_moe(model, [torch.randn(3, 5, 16)])
    assert panel[0]["mixture error"] < 1e-5
    assert panel[0].state.slots == 30


@quiet
@pytest.mark.parametrize("package", ["mixture_of_experts", "st_moe_pytorch", "soft_moe_pytorch"])
def test_packages_of_pypi(package):
    module = pytest.importorskip(package, reason=f"{package} is not installed")
    torch.manual_seed(0)
    if package == "soft_moe_pytorch":
        model, x_BTD = module.SoftMoE(16, num_experts=4, seq_len=8), torch.randn(3, 8, 16)
    else:
        model, x_BTD = module.MoE(16, num_experts=4), torch.randn(3, 32, 16)
    seen = []
    if package != "soft_moe_pytorch":
        model.gate.register_forward_hook(lambda m, a, output: seen.append(output[1]))
    panel = inspect_moe(nn.Sequential(model), [x_BTD])
    (layer,) = panel.layers
    if package == "soft_moe_pytorch":
        logits = torch.einsum("bnd,esd->bnes", model.norm(x_BTD), model.slot_norm(model.slot_embeds))
        weight_E = logits.flatten(2).softmax(-1).view(logits.shape).sum(3).mean((0, 1))
        torch.testing.assert_close(torch.tensor(layer.weight_E), weight_E.detach(), rtol=1e-5, atol=1e-6)
    else:
        combine_BTEC = seen[-1]
        count_E = (combine_BTEC.sum(-1) > 0).flatten(0, 1).sum(0)
        assert layer.state.count_E.tolist() == count_E.tolist()
        assert layer["mixture error"] < 1e-5
