"""What a run will cost: operations against torch's own count, and rates that are found again.

Shapes: N samples or tokens.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_lib import bench_cost, cost, study
from moe_lib.bench_cost import Group
from moe_lib.classifier import Classifier
from moe_lib.cost import Amount


def test_operations_of_a_classifier_are_those_that_torch_counts():
    model = study.runs("core", "snnl", "cifar10", "base")[0].model
    found = cost._forward_classifier(model, (3, 32, 32), 10)
    classifier = Classifier(model, (3, 32, 32), 10)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        classifier.extractor(torch.zeros(1, 3, 32, 32))
        classifier.moe.router(torch.zeros(1, 128))
    experts = 2 * sum(classifier.moe.experts.get_parameter(name).numel() for name in ("w1_EDH", "w2_EHO"))
    assert found.convolution + found.product == counter.get_total_flops() + experts


@pytest.mark.parametrize("name", ["snnl", "ac-vision", "ac-language", "crossed"])
def test_cost_grows_with_epochs_and_experts_chosen(name):
    run = next(run for run in study.runs("core", name))
    longer = replace(run, train=replace(run.train, epochs=2 * run.train.epochs))
    assert 1.3 < cost.amount(longer).product / cost.amount(run).product <= 2
    if name != "snnl":
        trunk = replace(run.model.trunk, top_k=4)
        assert (
            cost.amount(replace(run, model=replace(run.model, trunk=trunk))).product
            > cost.amount(run).product
        )


def test_every_planned_run_has_an_amount():
    for profile in study.PROFILES:
        assert all(cost.amount(run).product > 0 for run in study.runs(profile))


def test_an_unknown_text_has_none():
    run = study.runs("core", "ac-language")[0]
    assert cost.amount(replace(run, dataset="/some/text.txt")) is None


def test_rates_are_found_again_though_a_few_runs_were_held_up():
    sizes = [(1e12, 2e12), (5e12, 1e12), (2e12, 9e12), (0, 3e12), (7e12, 7e12), (3e12, 1e11), (4e12, 8e12)]
    known = [Group("s", "d", str(i), Amount(*size), 0, 1, 1) for i, size in enumerate(sizes)]
    truth = {"convolution": 5e-12, "product": 2e-11}
    known = [replace(group, seconds=cost.seconds(group.amount, truth)) for group in known]
    known[0] = replace(known[0], seconds=4 * known[0].seconds)
    assert bench_cost.fit(known) == pytest.approx(truth, rel=1e-2)
    assert bench_cost.left_out(known, ["arm"])[1:] == pytest.approx([1] * 6, rel=0.02)
