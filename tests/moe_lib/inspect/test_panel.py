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

from moe_lib import MoE, route
from moe_lib.inspect import ABOUT, THRESHOLDS, Panel, inspect_moe
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
    with pytest.raises(ValueError, match="must be of the same blocks"):
        panel(num_layers=2).compare(before)


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 1}, {"num_layers": 60, "num_experts": 128}, {"top_k": None}]
)
def test_pictures_hold_every_block(options):
    figure = panel(**options).figure()
    assert isinstance(figure, matplotlib.figure.Figure)
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


def test_thresholds_can_be_set():
    assert inspect_moe(routed(), [tokens()], thresholds={"collapsed": 1.1}).alarms[0].kind == "collapsed"
    assert set(THRESHOLDS) >= {"dead", "alike"}


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
