"""When alarms are raised and when not; losses, names, JSON and options of the command line.

Shapes: N tokens, B sequences, T positions, D width, E experts, K slots.
"""

import importlib.util
import json
import math

import pytest
import torch
from list_moes import Block, D, tokens
from torch import nn
from torch.nn import functional as F

from moe_lib import LinearRouter, MoE, route
from moe_lib.inspect import Panel, inspect_moe
from moe_lib.inspect.__main__ import main
from moe_lib.inspect.alarms import reading
from moe_lib.inspect.tamper import default_loss


def kinds(panel):
    return {alarm.kind for alarm in panel.alarms}


class Noise(nn.Module):
    """A router that draws the experts."""

    def __init__(self, num_experts, top_k, seed):
        super().__init__()
        self.shape, self.top_k, self.seed = num_experts, top_k, seed

    def forward(self, x_ND, previous=None):
        draw = torch.Generator().manual_seed(self.seed)
        return route(5 * torch.randn(len(x_ND), self.shape, generator=draw), self.top_k)


def drawn(num_experts, top_k, seed, width=D):
    return MoE(width, num_experts, 4, top_k=top_k, router=Noise(num_experts, top_k, seed))


def test_experts_that_chance_leaves_out_are_not_dead():
    torch.manual_seed(0)
    found = [inspect_moe(drawn(64, 2, seed), [tokens(160, seed)]) for seed in range(30)]
    assert sum(panel[0]["never chosen"] > 0 for panel in found) > 5
    assert not any("dead" in kinds(panel) for panel in found)
    model = MoE(D, 64, 4, top_k=2)
    with torch.no_grad():
        model.router.gate.bias[:20] = -100
    panel = inspect_moe(model, [tokens(160)])
    assert "dead" in kinds(panel)
    assert panel[0]["never chosen"] >= 20


def test_chance_of_dead_experts_is_the_poisson_sum():
    layer = inspect_moe(drawn(64, 2, 0), [tokens(160)])[0]
    for value, null in (
        (0.0, 0.4),
        (1.0, 1e-4),
        (1.0, 0.01),
        (4.0, 0.4),
        (3.0, 0.4),
        (30.0, 12.0),
        (20.0, 12.0),
    ):
        layer.measures["never chosen"] = layer.measures["never chosen"]._replace(value=value, null=null)
        terms = [math.exp(-null) * null**n / math.factorial(n) for n in range(int(value))]
        assert reading(layer, "dead") == (value if 1 - sum(terms) < 1e-3 else 0)


def test_a_small_feature_that_decides_is_not_arbitrary():
    """One of 64 features, of the same variance as the others, makes the choice; and the same by chance."""
    router = LinearRouter(64, 2, 1)
    with torch.no_grad():
        for p in router.parameters():
            p.zero_()
        router.gate.weight[:, 0] = torch.tensor([5.0, -5.0])
    x_ND = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    panel = inspect_moe(MoE(64, 2, 4, top_k=1, router=router), x_ND.split(500))
    assert panel[0]["input separation"] < 0.03
    assert "arbitrary" not in kinds(panel)
    for seed in range(10):
        assert "arbitrary" in kinds(inspect_moe(drawn(2, 1, seed, 64), x_ND.split(500)))


@pytest.mark.parametrize("num_experts", [2, 5])
def test_separation_is_compared_with_the_spread_of_permutations(num_experts):
    """Inputs that vary in few directions: chance alone separates them more."""
    scale_D = torch.tensor([4.0, 2.0] + [0.5] * (D - 2))
    x_ND, draw = tokens(256) * scale_D, torch.Generator().manual_seed(1)
    layer = inspect_moe(drawn(num_experts, 1, 0), [x_ND])[0]
    first_N = drawn(num_experts, 1, 0).router(x_ND).indices_NK[:, 0]
    apart_ND, shares = x_ND - x_ND.mean(0), []
    for _ in range(400):
        first_N = first_N[torch.randperm(256, generator=draw)]
        means = [
            (first_N == e).sum() * apart_ND[first_N == e].mean(0).square().sum() for e in range(num_experts)
        ]
        shares.append(float(sum(means) / apart_ND.square().sum()))
    shares = torch.tensor(shares)
    expected = (layer["input separation"] - shares.mean()) / shares.std()
    assert layer["separation beyond chance"] == pytest.approx(float(expected), rel=0.3, abs=0.2)


class AllButOne(nn.Module):
    """Equal weights for seven of eight experts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = nn.Linear(D, 8), nn.ModuleList(nn.Linear(D, D) for _ in range(8))

    def forward(self, x_ND):
        index_NK = self.gate(x_ND).topk(7, -1).indices
        weight_NE = torch.zeros(len(x_ND), 8).scatter(1, index_NK, 1 / 7)
        return sum(weight_NE[:, e, None] * expert(x_ND) for e, expert in enumerate(self.experts))


def test_choosing_all_but_one_is_not_blind():
    panel = inspect_moe(nn.Sequential(AllButOne()), [tokens(1000)])
    assert panel[0]["I(x;E)"] < 0.1 * math.log(8)
    assert "blind" not in kinds(panel)
    assert reading(panel[0], "blind") == pytest.approx(panel[0]["I(x;E)"] / math.log(8 / 7))


# ---------------------------------------------------------------------------------------- losses


class Classifier(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(D, width)

    def forward(self, x_ND):
        return self.head(x_ND + self.block(x_ND))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.long])
def test_labels_of_any_integer_kind_make_a_loss(dtype):
    model, label_N = Classifier(), torch.arange(200) % 2
    ignored = -1 if dtype != torch.bool else -100
    given_N = label_N.to(dtype)
    if dtype != torch.bool:
        given_N[:50] = ignored
    loss = inspect_moe(model, [(tokens(), given_N)], ignore_index=ignored, causal=True).loss
    counted = slice(0 if dtype == torch.bool else 50, None)
    expected = F.cross_entropy(model(tokens())[counted], label_N[counted])
    assert loss == pytest.approx(float(expected.detach()))


def test_targets_of_a_regression_ask_for_a_loss():
    with pytest.raises(ValueError, match="pass loss="):
        inspect_moe(Classifier(1), [(tokens(), torch.randn(200))], causal=True)


def test_labels_that_are_the_inputs_are_those_of_the_next_token():
    ids_BT, logits_BTC = torch.arange(12).view(3, 4) % 5, torch.randn(3, 4, 5)
    expected = F.cross_entropy(logits_BTC[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    assert default_loss(logits_BTC, ids_BT, ids_BT) == pytest.approx(float(expected))
    masked_BT = ids_BT.masked_fill(torch.arange(4) > 2, -100)
    expected = F.cross_entropy(logits_BTC[:, :2].flatten(0, 1), ids_BT[:, 1:3].flatten())
    assert default_loss(logits_BTC, ids_BT, masked_BT) == pytest.approx(float(expected))
    other_BT = (ids_BT + 1) % 5
    expected = F.cross_entropy(logits_BTC.flatten(0, 1), other_BT.flatten())
    assert default_loss(logits_BTC, ids_BT, other_BT) == pytest.approx(float(expected))


# ------------------------------------------------------------------------------------ panels, files


def test_classes_of_one_name_are_told_apart():
    data = [(tokens(), torch.arange(200) % 3)]
    found = inspect_moe(nn.Sequential(Block()), data, names=["a", "a", "b"])[0].class_expert
    assert set(found) == {"a (0)", "a (1)", "b"}


def test_infinite_losses_make_valid_json(tmp_path):
    data = [(tokens(), torch.arange(200) % 2)]
    panel = inspect_moe(Classifier(), data, causal=True, loss=lambda *_: torch.tensor(math.inf))
    text = panel.to_json(tmp_path / "panel.json")
    assert "Infinity" not in text
    assert json.loads(text)["loss"] is None
    assert math.isnan(Panel.from_json(tmp_path / "panel.json").loss)


class Two(nn.Module):
    """Two blocks, of which the first never chooses half of its experts."""

    def __init__(self, num_blocks=2):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(MoE(D, 4, 4, top_k=1) for _ in range(num_blocks))
        nn.init.constant_(self.blocks[0].router.gate.bias[2:], -100)

    def forward(self, x_ND):
        return sum(block(x_ND)[0] for block in self.blocks)


@pytest.mark.slow
def test_pictures_show_dead_experts_and_say_their_scale():
    panel = inspect_moe(Two(), [tokens()])
    figure = panel.figure()
    top = max(max(layer.load_E) * 4 for layer in panel.layers)
    assert figure.axes[1].get_ylabel().endswith(f"darkest at {top:.2g} or more")
    assert [line.get_color() for line in figure.axes[0].lines] == ["black", "white"]
    assert "a white mark" in panel._repr_html_()
    assert "mark" not in inspect_moe(Two(1), [tokens()])._repr_html_()


@pytest.mark.slow
def test_every_kind_of_alarm_comes_with_what_to_try_said_once():
    panel = inspect_moe(Two(), [tokens()], thresholds={"unexplained": -1.0})  # of both blocks
    kinds = {alarm.kind for alarm in panel.alarms}
    assert len([alarm for alarm in panel.alarms if alarm.kind == "unexplained"]) == 2
    for shown in (str(panel), panel._repr_html_()):
        assert {kind: shown.count(f"what to try ({kind})") for kind in kinds} == dict.fromkeys(kinds, 1)
    healthy = inspect_moe(Two(), [tokens()], thresholds={"collapsed": 0.0, "dead": 9, "unexplained": 9})
    assert "what to try" not in str(healthy)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers: .[test-hf]")
@pytest.mark.parametrize("wrong", ["out", "folder", "before", "length", "text", "kind"])
def test_the_command_line_refuses_before_it_loads_a_model(tmp_path, capsys, wrong):
    import transformers

    folder, text, out = tmp_path / "model", tmp_path / "text.txt", tmp_path / "page.html"
    config = transformers.SwitchTransformersConfig() if wrong == "kind" else transformers.MixtralConfig()
    config.save_pretrained(folder)  # no weights and no tokenizer: loading them would fail
    text.write_bytes("é".encode("latin-1" if wrong == "text" else "utf-8"))
    (tmp_path / "other.json").write_text("{}")
    out = {"out": tmp_path / "page.json", "folder": tmp_path / "none" / "page.html"}.get(wrong, out)
    more = {"before": ["--before", str(tmp_path / "other.json")], "length": ["--length", "0"]}.get(wrong, [])
    said = {"out": "name an .html", "folder": "there is no folder", "before": "is no panel",
            "length": "at least 1", "text": "is not UTF-8", "kind": "encoder-decoder"}[wrong]  # fmt: skip
    assert main([str(folder), "--text", str(text), "--out", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
