"""The panel of any mixture: the library's own values, planted extremes, loops, refusals, a live model.

Shapes: N samples, E experts, O width of an answer, C classes.
"""

import copy
import importlib.util
import itertools
import math

import nbformat
import numpy as np
import pytest
import torch
from torch import nn

from moe_lib import metrics
from moe_lib.inspect.panel import DRAWS, collect, interventions, panel
from moe_lib.metrics.collapse import collapse, routing_collapse
from moe_lib.metrics.interventions import expert_ablations
from moe_lib.rng import generator
from moe_study import study
from moe_study.data import ROOT

E, C, N = 4, 8, 400
KINDS = ("routing", "representational", "functional")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels():
    return torch.arange(N) % C


def said(labels_N):
    """Sure and right. [N, C]"""
    return 9 * nn.functional.one_hot(labels_N, C).double()


def same(mixed_NO):
    return mixed_NO


def hard(expert_N):
    return nn.functional.one_hot(expert_N, E).double()


def learned():
    """A soft gate and class logits well above chance, none of them extreme."""
    labels_N = labels()
    probs_NE = (randn(N, E) + 2 * hard(labels_N % E)).softmax(1)
    outputs_NEC = 3 * randn(N, E, C, seed=1) + 0.4 * said(labels_N)[:, None] * hard(labels_N % E)[..., None]
    return probs_NE, labels_N, outputs_NEC


def value(found, name):
    return {measure.name: measure for measure in found.measures}[name]


# ------------------------------------------------------------------------------ the library's own values


def test_values_are_those_of_the_library():
    probs_NE, labels_N, outputs_NEC = learned()
    found = panel(probs_NE, labels_N, outputs_NEC, same, initial_probs_NE=randn(N, E, seed=2).softmax(1))
    entropy, load = metrics.routing_entropy(probs_NE, labels_N, C), metrics.load(probs_NE, labels_N)
    result = {
        "routing": {"entropy": entropy._asdict()},
        "initial": {
            "routing": {
                "entropy": metrics.routing_entropy(randn(N, E, seed=2).softmax(1), labels_N, C)._asdict()
            }
        },
        "similarity": {"outputs": metrics.output_similarity(outputs_NEC)},
        "ablation": expert_ablations(
            probs_NE, outputs_NEC, labels_N, "logits", generator(0, "permuted routing")
        )._asdict(),
        "task": {
            "accuracy": (torch.einsum("ne,nec->nc", probs_NE, outputs_NEC).argmax(1) == labels_N)
            .double()
            .mean()
            .item()
        },
    }
    expected = collapse(result)
    assert found.collapse.routing == pytest.approx(expected.routing)
    assert found.collapse.representational.value == pytest.approx(expected.representational.value)
    assert found.collapse.functional == pytest.approx(expected.functional)
    assert found.collapse.redundancy == pytest.approx(expected.redundancy)
    assert 0 < found.collapse.functional.value < 1
    for name, wanted in {
        "H(E)": entropy.marginal,
        "H(E|x)": entropy.per_sample,
        "H(E|c)": entropy.class_conditional,
        "H(C|E)": entropy.expert_class,
        "I(x;E)": entropy.information_input,
        "I(c;E)": entropy.information_class,
        "AMI": load.adjusted_mutual_information,
        "effective experts": load.effective_experts,
        "dead experts": load.dead_experts,
        "largest share": max(load.share),
        "accuracy": result["task"]["accuracy"],
    }.items():
        assert value(found, name).value == pytest.approx(wanted), name
    null = metrics.information_class_null(probs_NE, labels_N, C, generator(0, "label permutation"), DRAWS)
    assert value(found, "I(c;E)").null == pytest.approx(null)
    assert found.load.share == pytest.approx(load.share)
    torch.testing.assert_close(found.class_expert_CE, metrics.class_expert_matrix(probs_NE, labels_N, C))


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("rule", ["logits", "likelihood"])
def test_interventions_cost_what_the_studies_ablations_say(rule, top_k):
    """Mixed likelihoods are a linear mixture too, of probabilities."""
    probs_NE, labels_N, outputs_NEC = learned()
    answers_NEC = outputs_NEC if rule == "logits" else outputs_NEC.softmax(2)
    found = panel(probs_NE, labels_N, answers_NEC, same, top_k=top_k).collapse.redundancy
    kept_NE = probs_NE
    if top_k is not None:
        kept_NE = torch.where(probs_NE >= probs_NE.topk(top_k).values[:, -1:], probs_NE, 0)
        kept_NE = kept_NE / kept_NE.sum(1, keepdim=True)
    ablations = expert_ablations(kept_NE, outputs_NEC, labels_N, rule, generator(0, "permuted routing"))
    clean_NC = torch.einsum("ne,nec->nc", kept_NE, answers_NEC)
    advantage = (clean_NC.argmax(1) == labels_N).double().mean().item() - 1 / C

    def kept(cost, share):
        return min(max(1 - cost / (share * advantage), 0), 1)

    assert found.permuted == pytest.approx(kept(ablations.permuted, 1 - 1 / E))
    assert found.swapped == pytest.approx(kept(ablations.swapped, 2 / E))
    if rule == "logits":  # merged likelihoods are the mean of logits there, of probabilities here
        assert found.merged == pytest.approx(kept(ablations.merged, 2 / E))
    assert found.dropped == pytest.approx(kept(sum(max(c, 0) for c in ablations.dropped), 1))


def test_interventions_are_the_loops():
    weights_NE = torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0], [0.1, 0.1, 0.8]], dtype=torch.float64)
    found = {}
    for name, tampered_NE in interventions(weights_NE, generator(0)):
        found.setdefault(name, []).append(tampered_NE)
    expected = {"dropped": [], "swapped": [], "merged": []}
    for e in range(3):
        rows = []
        for row in weights_NE.tolist():
            rest = sum(w for i, w in enumerate(row) if i != e)
            rows.append([0 if i == e else (w / rest if rest else 0.5) for i, w in enumerate(row)])
        expected["dropped"].append(rows)
    for a, b in itertools.combinations(range(3), 2):
        swapped, merged = weights_NE.tolist(), weights_NE.tolist()
        for row, other in zip(swapped, merged, strict=True):
            row[a], row[b] = row[b], row[a]
            other[a] = other[b] = (other[a] + other[b]) / 2
        expected["swapped"].append(swapped)
        expected["merged"].append(merged)
    for name, lists in expected.items():
        np.testing.assert_allclose(torch.stack(found[name]), lists, atol=1e-12, err_msg=name)
    for tampered_NE in found["permuted"]:
        assert sorted(tampered_NE.tolist()) == sorted(weights_NE.tolist())


def test_a_head_after_the_mixture_decides():
    """Answers that are no logits: a rotated code, read by the head that undoes it."""
    probs_NE, labels_N, outputs_NEC = learned()
    turn_CC = torch.linalg.qr(randn(C, C, seed=3)).Q
    plain = panel(probs_NE, labels_N, outputs_NEC, same).collapse
    turned = panel(probs_NE, labels_N, outputs_NEC @ turn_CC, lambda mixed: mixed @ turn_CC.T).collapse
    assert turned.redundancy == pytest.approx(plain.redundancy)


def test_the_null_of_renamed_experts_is_its_loop():
    probs_NE, labels_N, _ = learned()
    draw = generator(0, "expert renaming")
    nulls = []
    for _ in range(DRAWS):
        order_NE = torch.rand(N, E, generator=draw).argsort(1).tolist()
        mean = [sum(float(probs_NE[n, order_NE[n][e]]) for n in range(N)) / N for e in range(E)]
        nulls.append(routing_collapse(-sum(p * math.log(p) for p in mean), E))
    assert panel(probs_NE, labels_N).collapse.routing.null == pytest.approx(np.mean(nulls))


# ----------------------------------------------------------------------------------- planted extremes


def test_specialised():
    labels_N = labels()
    gate_NE = hard(labels_N % E)
    outputs_NEC = gate_NE[..., None] * said(labels_N)[:, None]
    found = panel(gate_NE, labels_N, outputs_NEC, same)
    assert found.collapse.routing.value == pytest.approx(0, abs=1e-9)
    assert found.collapse.representational.value < 0.1
    assert found.collapse.functional.value == pytest.approx(0, abs=0.06)
    assert found.collapse.redundancy.swapped == pytest.approx(0, abs=1e-9)
    assert found.collapse.redundancy.dropped == pytest.approx(0, abs=1e-9)
    assert value(found, "H(E|c)").value == pytest.approx(0, abs=1e-9)
    assert value(found, "I(c;E)").value == pytest.approx(math.log(E))
    assert value(found, "I(c;E)").null < 0.1
    assert value(found, "accuracy").value == 1


def test_collapsed():
    labels_N = labels()
    outputs_NEC = (said(labels_N) + randn(N, C))[:, None].expand(N, E, C)
    found = panel(hard(torch.full((N,), 2)), labels_N, outputs_NEC, same)
    assert found.collapse.routing.value == 1
    assert found.collapse.routing.null < 0.1
    assert found.collapse.representational.value == pytest.approx(1)
    assert found.collapse.representational.null < 0.2
    assert found.collapse.functional == (1, 1)
    assert found.collapse.redundancy == (1, 1, 1, 1)
    assert value(found, "dead experts").value == E - 1
    assert value(found, "dead experts").null == 0
    assert value(found, "largest share").value == 1


def test_a_slight_preference_is_total_collapse_under_top_1():
    """The null of renamed experts is balanced still, and so is the untrained gate that prefers no one."""
    probs_NE = torch.tensor([0.28, 0.24, 0.24, 0.24]).expand(N, E)
    initial_NE = torch.where(hard(labels() % E) > 0, 0.28, 0.24)
    soft, sparse, before = (
        panel(probs_NE, labels()),
        panel(probs_NE, labels(), top_k=1),
        panel(probs_NE, labels(), top_k=1, initial_probs_NE=initial_NE),
    )
    assert soft.collapse.routing.value < 0.01
    assert sparse.collapse.routing.value == pytest.approx(1)
    assert value(sparse, "effective experts").value == pytest.approx(1)
    assert sparse.collapse.routing.null < 0.05
    assert before.collapse.routing == pytest.approx((1, 0))
    assert sparse.weight_E.tolist() == pytest.approx([1, 0, 0, 0])
    assert value(sparse, "H(E)") == value(soft, "H(E)")


def test_blind():
    """Balanced, unlike experts behind a gate that does not look: functional collapse alone."""
    labels_N = labels()
    outputs_NEC = 4 * randn(N, E, C) + said(labels_N)[:, None]
    found = panel(torch.full((N, E), 1 / E), labels_N, outputs_NEC, same)
    assert found.collapse.routing == pytest.approx((0, 0), abs=1e-9)
    assert found.collapse.representational.value < 0.6
    assert found.collapse.functional.value == 1
    assert value(found, "I(x;E)").value == pytest.approx(0, abs=1e-9)
    assert value(found, "H(E|c)").value == pytest.approx(value(found, "H(E|c)").null)


# ------------------------------------------------------------------------------------ what must work


def test_routing_alone():
    found = panel(learned()[0], labels())
    assert [measure.name for measure in found.measures][-1] == "AMI"
    assert all(math.isnan(getattr(found.collapse, kind).value) for kind in KINDS[1:])


def test_outputs_without_predict_leave_function_open():
    probs_NE, labels_N, outputs_NEC = learned()
    found = panel(probs_NE, labels_N, outputs_NEC)
    assert not math.isnan(found.collapse.representational.value)
    assert math.isnan(found.collapse.functional.value)


def test_an_empty_expert_an_absent_class_and_a_class_of_one():
    labels_N = torch.cat([torch.zeros(30), torch.ones(29), torch.tensor([3])]).long()
    probs_NE = torch.cat([randn(60, 2).softmax(1), torch.zeros(60, 1)], 1)
    found = panel(probs_NE, labels_N, randn(60, 3, 4, seed=1), same)
    assert value(found, "dead experts").value == 1
    assert found.class_expert_CE[2].isnan().all()
    torch.testing.assert_close(found.class_expert_CE[3], probs_NE[-1])
    assert all(math.isfinite(measure.value) for measure in found.measures[:11])
    found.table()
    found.figure()


def test_types_and_arguments():
    """Half precision, int32 labels; nothing is changed, the global random state neither; seeds decide."""
    probs_NE, labels_N, outputs_NEC = learned()
    state, copies = torch.get_rng_state(), [x.clone() for x in (probs_NE, labels_N, outputs_NEC)]
    exact = panel(probs_NE, labels_N, outputs_NEC, same)
    again = panel(probs_NE, labels_N, outputs_NEC, same)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(copies, (probs_NE, labels_N, outputs_NEC), strict=True))
    assert exact.table().equals(again.table())
    other = panel(probs_NE, labels_N, outputs_NEC, same, seed=1)
    assert value(other, "I(c;E)").null != value(exact, "I(c;E)").null
    rough = panel(probs_NE.bfloat16().requires_grad_(), labels_N.int(), outputs_NEC.float(), same)
    assert rough.collapse.routing.value == pytest.approx(exact.collapse.routing.value, abs=0.01)
    assert rough.collapse.functional.value == pytest.approx(exact.collapse.functional.value, abs=0.05)


def test_table_and_figure():
    probs_NE, labels_N, outputs_NEC = learned()
    found = panel(probs_NE, labels_N, outputs_NEC, same)
    table = found.table()
    assert list(table.columns) == ["value", "null", "the null is", "what it says"]
    assert list(table.index) == [measure.name for measure in found.measures]
    assert table.loc["H(E|x)", "null"] == ""
    assert float(table.loc["H(E)", "value"]) == pytest.approx(value(found, "H(E)").value, abs=6e-4)
    assert (table["what it says"].str.len() > 0).all()
    assert "-0.000" not in table.to_string()
    kinds, load, routing, _ = found.figure().axes
    drawn = [line.get_xdata()[0] for line in kinds.lines if line.get_marker() == "o"]
    assert drawn == pytest.approx([getattr(found.collapse, kind).value for kind in KINDS])
    heights = [bar.get_height() for bar in load.patches]
    np.testing.assert_allclose(heights, [*found.load.share, *found.weight_E.tolist()])
    assert routing.images[0].get_array().shape == (C, E)


def test_many_classes_are_drawn_without_names():
    figure = panel(learned()[0], torch.arange(N) % 40).figure()
    assert list(figure.axes[2].get_yticks()) == []
    assert figure.axes[2].get_ylabel() == "40 classes, by preferred expert"


# ------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probs_NE": randn(N, E)}, "^probs must .*sum to 1"),
        ({"probs_NE": torch.full((N, E), 0.3)}, "^probs must .*sum to 1"),
        ({"probs_NE": torch.full((N, E), math.nan)}, "^probs must be finite"),
        ({"probs_NE": torch.ones(N)}, r"^expected probs \[N, E\]"),
        ({"probs_NE": torch.ones(N, 1)}, "of 1 expert"),
        ({"probs_NE": torch.full((N - 1, E), 1 / E)}, r"^expected .*\(399, 4\)"),
        ({"initial_probs_NE": randn(N, E)}, "initial probs: .*sum to 1"),
        ({"initial_probs_NE": torch.full((N, 2), 0.5)}, r"initial probs must have .*\(400, 2\)"),
        ({"labels_N": labels() - 1}, r"^labels must lie in 0\.\.6, got -1\.\.6"),
        ({"num_classes": 5}, r"^labels must lie in 0\.\.4, got 0\.\.7"),
        ({"labels_N": torch.full((N,), 3)}, "single class 3"),
        ({"labels_N": labels().float()}, "must be integers .*float32"),
        ({"labels_N": labels()[:, None]}, r"shape \[N\].*\(400, 1\)"),
        ({"labels_N": labels()[:0]}, r"N >= 1, got torch.int64 \(0,\)"),
        ({"expert_outputs_NEO": randn(E, N, C)}, r"\[N, E, O\] .*got \(4, 400, 8\)"),
        ({"expert_outputs_NEO": randn(N, E, 1)}, "width of at least 2, got 1"),
        ({"expert_outputs_NEO": torch.full((N, E, C), math.inf)}, "must be finite"),
        ({"expert_outputs_NEO": None}, "give expert_outputs_NEO too"),
        ({"predict": lambda mixed: mixed[:, :5]}, r"\[400, C\] with C >= 8 .*got \(400, 5\)"),
        ({"predict": lambda mixed: mixed.argmax(1)}, r"got \(400,\)"),
        ({"top_k": 5}, "top_k must lie .* got 5"),
        ({"top_k": 0}, "top_k must lie .* got 0"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    probs_NE, labels_N, outputs_NEC = learned()
    given = {
        "probs_NE": probs_NE,
        "labels_N": labels_N,
        "expert_outputs_NEO": outputs_NEC,
        "predict": same,
    }
    with pytest.raises(ValueError, match=message):
        panel(**(given | change))


# -------------------------------------------------------------------------------------- a live model


class FusedExperts(nn.Module):
    """The calling convention of transformers 5."""

    def __init__(self, listed):
        super().__init__()
        self.listed = nn.ModuleList(listed)

    def forward(self, tokens_ND, index_NK, weights_NK):
        return torch.stack(
            [
                sum(w * self.listed[e](token) for e, w in zip(chosen, weights, strict=True))
                for token, chosen, weights in zip(tokens_ND, index_NK.tolist(), weights_NK, strict=True)
            ]
        )


class TupleGate(nn.Linear):
    def forward(self, tokens_ND):
        logits_NE = super().forward(tokens_ND)
        return logits_NE, *logits_NE.softmax(1).topk(2)


class Block(nn.Module):
    def __init__(self, fused):
        super().__init__()
        listed = [nn.Linear(6, 6) for _ in range(3)]
        self.gate = (TupleGate if fused else nn.Linear)(6, 3)
        self.experts = FusedExperts(listed) if fused else nn.ModuleList(listed)

    def forward(self, x_BTD):
        scores = self.gate(x_BTD.flatten(0, 1))
        logits_NE = scores[0] if isinstance(scores, tuple) else scores
        out_NED = torch.stack(
            [e(x_BTD.flatten(0, 1)) for e in getattr(self.experts, "listed", self.experts)], 1
        )
        return torch.einsum("ne,ned->nd", logits_NE.softmax(1), out_NED).view_as(x_BTD)


class Model(nn.Module):
    def __init__(self, fused, times=1):
        super().__init__()
        self.first, self.drop, self.block, self.times = nn.Linear(5, 6), nn.Dropout(0.5), Block(fused), times

    def forward(self, x_BTD):
        x_BTD = self.drop(self.first(x_BTD))
        for _ in range(self.times):
            x_BTD = self.block(x_BTD)
        return x_BTD


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_collects_what_a_loop_finds(fused, named, per_token):
    model = Model(fused)
    model.block.eval()
    x_BTD, labels_N = randn(7, 4, 5).float(), torch.arange(28) % 3 if per_token else torch.arange(7)
    given = labels_N.view(7, 4) if per_token else labels_N
    batches = [({"x_BTD": x} if named else x, y) for x, y in zip(x_BTD.split(3), given.split(3), strict=True)]
    seen = collect(model, batches, model.block)
    assert model.training
    assert model.drop.training
    assert not model.block.training
    assert not model.block.gate._forward_hooks
    listed = getattr(model.block.experts, "listed", model.block.experts)
    n = 0
    for b, t in itertools.product(range(7), range(4)):
        token = model.first(x_BTD[b, t])
        logits = nn.functional.linear(token, model.block.gate.weight, model.block.gate.bias)
        torch.testing.assert_close(seen.inputs_ND[n], token)
        torch.testing.assert_close(seen.probs_NE[n], logits.softmax(0))
        torch.testing.assert_close(seen.expert_outputs_NEO[n], torch.stack([e(token) for e in listed]))
        assert seen.labels_N[n] == (labels_N[n] if per_token else b)
        n += 1
    assert len(seen.labels_N) == n
    assert not seen.expert_outputs_NEO.requires_grad


def test_a_gate_that_returns_probabilities_is_taken_at_its_word():
    model = Model(False)
    model.block.gate = nn.Sequential(nn.Linear(6, 3), nn.Softmax(1))
    x_BTD = randn(3, 2, 5).float()
    seen = collect(model, [(x_BTD, torch.arange(3))], model.block)
    torch.testing.assert_close(seen.probs_NE, model.block.gate(model.first(x_BTD).flatten(0, 1)))


def test_collect_refuses():
    model, batch = Model(True), (randn(3, 4, 5).float(), torch.arange(3))
    with pytest.raises(ValueError, match=r"\.gate and \.experts is needed, got Linear"):
        collect(model, [batch], model.first)
    with pytest.raises(ValueError, match="its gate ran 2 times"):
        collect(twice := Model(True, times=2), [batch], twice.block)
    with pytest.raises(ValueError, match="its gate ran 0 times"):
        collect(model, [batch], copy.deepcopy(model.block))
    with pytest.raises(ValueError, match="5 labels do not divide 12 tokens"):
        collect(model, [(batch[0], torch.arange(5))], model.block)
    with pytest.raises(ValueError, match="no batch"):
        collect(model, [], model.block)
    assert model.training
    assert not model.block.gate._forward_hooks


def test_a_block_of_hugging_face():
    """Its own output is the mixture of what was collected."""
    pytest.importorskip("transformers", reason="pip install transformers")
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=8, intermediate_size=6, num_local_experts=4, experts_implementation="eager"
    )
    block = MixtralSparseMoeBlock(config)
    for at, weight in enumerate(block.parameters()):
        weight.data = randn(*weight.shape, seed=at).float()
    x_BTD = randn(9, 3, 8, seed=9).float()
    seen = collect(block, [(x_BTD, torch.arange(9) % 3)], block)
    best = seen.probs_NE.topk(2)
    weights_NE = torch.zeros(27, 4).scatter(1, best.indices, best.values / best.values.sum(1, keepdim=True))
    mixed_ND = torch.einsum("ne,ned->nd", weights_NE, seen.expert_outputs_NEO)
    out = block(x_BTD)
    torch.testing.assert_close(mixed_ND.view_as(x_BTD), out[0] if isinstance(out, tuple) else out)
    found = panel(seen.probs_NE, seen.labels_N, seen.expert_outputs_NEO, same, top_k=2)
    assert 0 <= found.collapse.representational.value <= 1


# ------------------------------------------------------------------------------------- the notebook


def notebook_cells():
    stored = nbformat.read(ROOT / "notebooks" / "40_your_model.ipynb", as_version=4)
    return [cell.source for cell in stored.cells if cell.cell_type == "code"]


def test_the_notebook_names_what_is_to_be_installed(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "transformers" else found(name, *rest),
    )
    with pytest.raises(study.StudyError, match=r"pip install transformers$"):
        exec(notebook_cells()[1], {"In": []})


def test_the_user_writes_five_lines():
    (source,) = [source for source in notebook_cells() if "collect(" in source]
    assert len(source.splitlines()) <= 5


def test_the_notebook_runs(folders):
    pytest.importorskip("transformers", reason="pip install transformers")
    space = {"In": []}
    for source in notebook_cells():
        exec(source, space)
    found = space["found"]
    assert value(found, "accuracy").value > 0.8
    assert all(0 <= getattr(found.collapse, kind).value <= 1 for kind in KINDS)
    assert (folders / "figures" / "your_model" / "mixtral.png").exists()
