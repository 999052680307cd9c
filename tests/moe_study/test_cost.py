"""What a run will cost: operations against torch's own count, and rates that are found again.

Shapes: N samples or tokens.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost as bench_cost
from benchmarks import measure
from benchmarks.cost import Group
from moe_lib.models.classifier import Classifier
from moe_study import cost, store, study
from moe_study.cost import Amount


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


# --------------------------------------------------------------------------------------------- plan


@pytest.fixture
def known(folders, monkeypatch):
    """Fitted on a machine of 2e11 products a second; this one makes 1e11, has 4 cores and 3000 MB free."""
    group = {"study": "snnl", "dataset": "digits", "arm": "base", "memory_mb": 500.0}
    fit = {
        "seconds_per": {"convolution": 1e-9, "product": 1e-9},
        "rates": {"gemm": 2e11},
        "groups": [group, group | {"study": "crossed", "memory_mb": 1600.0}],
    }
    store.write(store.results_dir() / "bench" / "cost.json", {"fit": fit})
    rows = [{"processes": n, "times_one": {"median": times}} for n, times in ((1, 1.0), (2, 1.5))]
    store.write(store.results_dir() / "bench" / "scaling.json", {"throughput": rows})
    monkeypatch.setattr(cost, "products_per_second", lambda machine: {"gemm": 1e11, "gemm_mm": 1e11})
    monkeypatch.setattr(cost, "available_memory", lambda: 3e9)
    monkeypatch.setattr(cost.os, "cpu_count", lambda: 4)
    return study.runs("digits", "snnl", arm="base")


def minutes_left(printed):
    (line,) = [line for line in printed.splitlines() if line.startswith("snnl ")]
    return float(line.split()[-1])


def test_foretold_time_is_scaled_by_the_speed_of_this_machine(known):
    amount = cost.amount(known[0])
    expected = 2 * (amount.convolution + amount.product) * 1e-9 / 60 * len(known)
    printed = cost.plan(known, 2)
    assert minutes_left(printed) == pytest.approx(expected, abs=0.051)
    assert printed.splitlines()[-1] == (
        "speed: this machine does products at 0.50 times the rate of the fitted one"
    )
    assert f", about {expected / 1.5:.0f} minutes with 2 processes, which do 1.50 times the work" in printed


@pytest.mark.parametrize("same", [True, False])
def test_time_of_a_finished_run_counts_on_the_same_processor_alone(known, same):
    foretold = minutes_left(cost.plan(known)) * (len(known) - 1) / len(known)
    machine = store.processor() if same else "another processor"
    study.write(known[0], {"wall_seconds": 60e4, "machine": machine})
    expected = 1e4 * (len(known) - 1) if same else foretold
    assert minutes_left(cost.plan(known)) == pytest.approx(expected, abs=0.1)


def test_processes_between_and_beyond_those_that_were_measured(known, monkeypatch):
    assert [cost.throughput(workers) for workers in (1, 2, 4, 9)] == [1, 1.5, 3, 3]  # 9 have 4 cores
    rows = [{"processes": n, "times_one": {"median": times}} for n, times in ((1, 1.0), (4, 2.5))]
    store.write(store.results_dir() / "bench" / "scaling.json", {"throughput": rows})
    assert cost.throughput(3) == pytest.approx(2)
    monkeypatch.setattr(cost, "_benchmark", lambda name: None)
    assert [cost.throughput(workers) for workers in (1, 3)] == [1, 3]


def test_memory_is_that_of_the_largest_run_known_and_warned_of(known):
    fits = cost.plan(known, 4)
    assert "\nmemory: up to 2000 MB with 4 processes (500 MB each)\n" in fits
    assert "warning" not in fits
    assert "\nmemory: " not in cost.plan(study.runs("digits", "ac-vision"), 2)
    warned = cost.plan([*known, *study.runs("digits", "crossed")], 2)
    assert "\nmemory: up to 3200 MB with 2 processes (1600 MB each)\n" in warned
    assert "\nwarning: only 3000 MB of memory are free; try --workers 1\n" in warned
    assert "\nmemory: up to 3200 MB with 1 processes" not in warned
    one = cost.plan(known[:1], 4)  # one run needs one process
    assert "\nmemory: up to 500 MB with 1 processes" in one


def test_a_plan_where_nothing_was_fitted(known, monkeypatch):
    monkeypatch.setattr(cost, "_benchmark", lambda name: None)
    printed = cost.plan(known, 2)
    assert "unknown" in printed
    assert "memory" not in printed
    assert "speed" not in printed


def test_a_fit_without_rates_is_not_scaled(known):
    fit = cost.fitted()
    del fit["rates"]
    store.write(store.results_dir() / "bench" / "cost.json", {"fit": fit})
    assert cost.speed() is None
    amount = cost.amount(known[0])
    expected = (amount.convolution + amount.product) * 1e-9 / 60 * len(known)
    assert minutes_left(cost.plan(known, 2)) == pytest.approx(expected, abs=0.051)


def test_the_speed_of_this_machine_leaves_its_threads_alone(known, monkeypatch):
    monkeypatch.setattr(cost, "products_per_second", measure.products_per_second)
    torch.set_num_threads(2)
    assert cost.speed() > 0
    assert torch.get_num_threads() == 2
