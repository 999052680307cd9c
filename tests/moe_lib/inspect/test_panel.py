"""Out: dictionary, JSON, table, pictures, pages; alarms on planted faults; the command line.

Shapes: D width, E experts.
"""

import html.parser
import importlib.util
import json
import math

import matplotlib.figure
import pytest
import tiny_moes
import torch
from torch import nn

from moe_lib import ACConfig, AdaptiveClusteringRouter, MoE, route
from moe_lib.inspect import ABOUT, Panel, inspect_moe
from moe_lib.inspect.__main__ import main

D = 12


class Layers(nn.Module):
    def __init__(self, num_layers=3, num_experts=8, top_k=2):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(MoE(D, num_experts, 8, top_k=top_k) for _ in range(num_layers))

    def forward(self, x_ND):
        for layer in self.layers:
            x_ND = x_ND + layer(x_ND)[0]
        return x_ND


def tokens(n=128):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1))


def panel(**options):
    return inspect_moe(Layers(**options), [(tokens(), torch.arange(128) % 3)])


def test_json_holds_the_panel(tmp_path):
    found = panel()
    found.to_json(tmp_path / "panel.json")
    again = Panel.from_json(tmp_path / "panel.json")
    assert again.to_dict() == found.to_dict() == json.loads(found.to_json())
    table = found.table()
    assert list(table.index) == [layer.name for layer in found.layers]
    assert (table.dtypes == "float64").all()
    assert table.loc["layers.1", "H(E)"] == found["layers.1"]["H(E)"]
    assert found.table(nulls=True)[("largest load", "null")].tolist() == [1 / 8] * 3
    assert again.table().equals(table)
    assert found.numbers()["layers.0/H(E|x)"] == found[0]["H(E|x)"]
    with pytest.raises(KeyError, match=r"layers\.0, layers\.1"):
        found["layers.9"]


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.images, self.links, self.text, self.open = [], 0, [], "", []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.images += tag == "img" and values["src"].startswith("data:image/png;base64,")
        assert tag != "img" or values["alt"]
        self.links += [v for k, v in values.items() if k in ("href", "src") and not v.startswith("data:")]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
def test_page_is_whole_and_escaped(tmp_path):
    found = panel()
    evil = "<script>alert('&')</script>"
    found.title, found.layers[0].name, found.layers[0].notes = evil, evil, [evil]
    found.unread.append(evil)
    text = found.to_html(tmp_path / "page.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert "script" not in reader.tags
    assert reader.text.count(evil) >= 4
    assert reader.images == 1
    assert reader.links == []
    assert reader.open == []
    assert all(about.formula.split(";")[0] in reader.text for about in ABOUT.values())
    assert found._repr_html_() in text


@pytest.mark.slow
def test_two_panels_are_compared(tmp_path):
    before, after = panel(), panel()
    text = after.compare(before).to_html(tmp_path / "page.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.images == 3
    assert reader.open == []
    assert (after.compare(before).table()["saturation"] == 1).all()
    after.to_json(tmp_path / "after.json")
    stored = Panel.from_json(tmp_path / "after.json")
    assert all(math.isnan(v.value) for v in after.compare(stored).saturation())
    assert (after.compare(stored).table() == 0).all(axis=None)
    for options in ({"num_layers": 2}, {"num_experts": 6}):
        with pytest.raises(ValueError, match="must be of the same blocks"):
            panel(**options).compare(before)


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 1}, {"num_layers": 60, "num_experts": 128}, {"top_k": None}]
)
def test_pictures_hold_every_block(options):
    figure = panel(**options).figure()
    assert isinstance(figure, matplotlib.figure.Figure)
    assert "routing collapse" in figure.get_label()
    layers = options.get("num_layers", 3)
    if layers > 1:
        grid_LE = figure.axes[0].images[0].get_array()
        assert grid_LE.shape == (layers, options.get("num_experts", 8))
        assert grid_LE.mean() == pytest.approx(1)
        labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
        assert len(labels) <= 30
    figure.canvas.draw()


# ----------------------------------------------------------------------------------------- alarms


def alarms(model):
    return {alarm.kind for alarm in inspect_moe(model, [tokens(512)]).alarms}


def routed(bias=None, spread=3.0, copies=False, noise=False):
    torch.manual_seed(0)
    moe = MoE(D, 4, 8, top_k=1)
    with torch.no_grad():
        moe.router.gate.weight.copy_(spread * torch.eye(4, D))
        moe.router.gate.bias.copy_(torch.zeros(4) if bias is None else torch.tensor(bias))
        if copies:
            for p in moe.experts.parameters():
                p.copy_(p[:1].expand_as(p))
    if noise:

        class Noise(nn.Module):
            def forward(self, x_ND, previous=None):
                draw = torch.Generator().manual_seed(7)
                return route(5 * torch.randn(len(x_ND), 4, generator=draw), 1)

        moe.router = Noise()
    return moe


def test_a_healthy_mixture_raises_no_alarm():
    assert alarms(routed()) == set()


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        ({"bias": [0.0, 0.0, 0.0, -50.0]}, {"dead"}),
        ({"bias": [50.0, 0.0, 0.0, 0.0]}, {"dead", "collapsed", "blind", "arbitrary"}),
        ({"copies": True}, {"alike"}),
        ({"noise": True}, {"arbitrary"}),
    ],
)
def test_planted_faults_raise_theirs(fault, kinds):
    found = alarms(routed(**fault))
    assert found >= kinds - {"arbitrary"} if "collapsed" in kinds else found == kinds


def test_a_misspelt_option_is_refused():
    with pytest.raises(ValueError, match="causal must be False, True or 'every expert', got 'every_expert'"):
        inspect_moe(routed(), [tokens()], causal="every_expert")


# ------------------------------------------------------------------------------------ command line


def test_command_line_names_what_is_missing(tmp_path, capsys):
    assert main([str(tmp_path / "none"), "--text", str(tmp_path / "none.txt")]) == 2
    capsys.readouterr()
    installed = importlib.util.find_spec("transformers") is not None
    main([str(tmp_path / "none"), "--text", str(tmp_path / "none.txt")])
    assert ("does not exist" if installed else "pip install") in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers: .[test-hf]")
def test_command_line_writes_a_page(tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = "the expert of a router is an expert of tokens and the router is a gate"
    words = text.split(" ")
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["?", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path / "model")
    tiny_moes.causal_lm("Mixtral").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(words * 20))
    out = tmp_path / "collapse.html"
    arguments = [str(tmp_path / "model"), "--text", str(tmp_path / "text.txt")]
    arguments += ["--out", str(out), "--length", "32"]
    assert main([*arguments, "--causal"]) == 0
    assert "2 blocks" in capsys.readouterr().out
    assert "cost of permuting" in out.read_text()
    stored = json.loads(out.with_suffix(".json").read_text())
    assert [layer["num_tokens"] for layer in stored["layers"]] == [len(words) * 20 // 32 * 32] * 2
    out.with_suffix(".json").rename(tmp_path / "before.json")
    assert main([*arguments, "--before", str(tmp_path / "before.json")]) == 0
    assert "<h3>before</h3>" in out.read_text()


# --------------------------------------------------------------------------------- unusual blocks


class Routed(nn.Module):
    """Experts in a list; the gate returns indices, weights and, as many do, a loss without dimensions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = Scores()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x_ND):
        index_NK, weight_NK, _ = self.gate(x_ND)
        out_ND = torch.zeros_like(x_ND)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(index_NK == e)
            out_ND = out_ND.index_add(0, row, expert(x_ND[row]) * weight_NK[row, slot, None])
        return out_ND


class Scores(nn.Linear):
    def __init__(self):
        super().__init__(D, 4)

    def forward(self, x_ND):
        probs_NE = super().forward(x_ND).softmax(1)
        weight_NK, index_NK = probs_NE.topk(2, 1)
        return index_NK, weight_NK, probs_NE.mean(0).square().sum()


def test_a_router_may_return_a_number_beside_its_choice():
    model = Routed()
    index_NK = model.gate(tokens())[0]
    found = inspect_moe(nn.Sequential(model), [tokens()])[0]
    assert found.load_E == pytest.approx([(index_NK == e).double().mean().item() for e in range(4)])


def test_one_expert_raises_no_alarm_and_has_nothing_to_permute():
    found = inspect_moe(nn.Sequential(Layers(1, 1, 1)), [(tokens(), tokens())], causal=True, loss=squares)
    assert [alarm.kind for alarm in found.alarms if alarm.kind in ("blind", "arbitrary")] == []
    assert math.isnan(found.loss_permuted)
    assert "routing permuted" not in found._repr_html_()


def squares(output, inputs, labels):
    return (output - labels).square().mean()


def test_experts_that_read_scaled_tokens_are_not_tampered_with():
    """What the AC router makes of the tokens is not returned, so the mixture cannot be computed again."""
    model = AdaptivePair()
    found = inspect_moe(model, [(tokens(), tokens())], causal=True, loss=squares)
    costs = {layer.name: layer["cost of permuting"] for layer in found.layers}
    assert math.isfinite(costs["first"])
    assert math.isnan(costs["second"])


class AdaptivePair(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        scaled = AdaptiveClusteringRouter(D, 4, 2, ACConfig(scale_experts=True))
        self.first, self.second = MoE(D, 4, 8, top_k=2), MoE(D, 4, 8, top_k=2, router=scaled)

    def forward(self, x_ND):
        out_ND, routing = self.first(x_ND)
        return self.second(out_ND, previous=routing)[0]


def test_inputs_far_from_zero_are_separated_as_those_around_it():
    """A constant added to all tokens, and taken back by the gate's bias, moves no token to another expert."""
    model, found = Routed().double(), []
    for shift in (0.0, 5000.0):
        with torch.no_grad():
            model.gate.bias -= shift * model.gate.weight.sum(1)
            for expert in model.experts:
                expert.bias -= shift * expert.weight.sum(1)
        found.append(inspect_moe(nn.Sequential(model), [tokens().double() + shift])[0]["input separation"])
    assert found[1] == pytest.approx(found[0], abs=0.01)


def test_a_number_without_end_is_shown():
    found = panel(num_layers=1)
    found[0].measures["cost of permuting"] = found[0].measures["H(E)"]._replace(value=math.inf)
    assert "<td>inf</td>" in found._repr_html_()


class Grouped(nn.Module):
    """As in GShard: the gate gives masks, and the experts sit in a module of their own behind einsums."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = Top2Gating(), Side()

    def forward(self, x_BTD):
        mask_BTEC, weight_BTEC = self.gate(x_BTD)
        read_EBCD = torch.einsum("btd,btec->ebcd", x_BTD, mask_BTEC)
        answer_EBCD = self.experts(read_EBCD.flatten(1, 2)).view(read_EBCD.shape)
        return torch.einsum("ebcd,btec->btd", answer_EBCD, weight_BTEC)


class Top2Gating(nn.Linear):
    def __init__(self):
        super().__init__(D, 4)

    def forward(self, x_BTD):
        best = super().forward(x_BTD).softmax(-1).topk(2, -1)
        gate_BTE = torch.zeros(*x_BTD.shape[:2], 4).scatter(-1, best.indices, best.values)
        weight_BTEC = torch.einsum("bte,tc->btec", gate_BTE, torch.eye(x_BTD.shape[1]))
        return weight_BTEC.bool().float(), weight_BTEC


class Side(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, read_EMD):
        return torch.stack([expert(read_MD) for expert, read_MD in zip(self.experts, read_EMD, strict=True)])


def test_a_model_that_is_a_block_itself_is_read_once():
    batch = tokens(64).view(2, 32, D)
    alone, wrapped = (inspect_moe(model, [batch]) for model in (Grouped(), nn.Sequential(Grouped())))
    assert len(alone.layers) == len(wrapped.layers) == 1
    assert alone[0].load_E == wrapped[0].load_E


class SoftMoE(nn.Module):
    """Its name is that of a package's class, but its experts are a plain list."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, 4)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x_ND):
        answer_END = torch.stack([expert(x_ND) for expert in self.experts])
        return torch.einsum("end,ne->nd", answer_END, self.gate(x_ND).softmax(1))


def test_a_class_named_as_a_packages_is_read_as_what_it_is():
    found = inspect_moe(nn.Sequential(SoftMoE()), [tokens()])[0]
    expected_E = SoftMoE().gate(tokens()).softmax(1).mean(0)
    assert found.weight_E == pytest.approx(expected_E.tolist(), rel=1e-5)
