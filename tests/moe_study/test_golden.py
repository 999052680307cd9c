"""The digits study is a fixed point: its numbers neither drift with the code nor tremble with the CPU.

`golden.json` holds the losses of one seed of every arm. A change that is not meant to move results leaves
it alone; one that is raises the study's version and rewrites it: python tests/moe_study/test_golden.py
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from moe_study import store, study, tasks
from moe_study.columns import EMBEDDING, ROUTING, SCORE, SIMILARITY, frame_of
from moe_study.configs import arms
from moe_study.configs.run import VERSIONS
from moe_study.report import tables

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).with_name("golden.json")
RUNS = study.runs("digits", "snnl")


def golden(results):
    seed = arms.SEEDS[0]
    histories = {r["run"]["arm"]: r["history"] for r in results if r["run"]["seed"] == seed}
    return {
        "version": VERSIONS["snnl"],
        "cross_entropy": {arm: history["validation"]["cross_entropy"] for arm, history in histories.items()},
        "total": {arm: history["train"]["total"] for arm, history in histories.items()},
    }


def rendered(results):
    """Every checked table of the notebooks, as they show it."""
    frame = frame_of(results)
    columns = [*SCORE, *ROUTING, *SIMILARITY, *EMBEDDING]
    pairs = [("snnl", arm) for arm in arms.ARM_DESCRIPTIONS if arm != "snnl"]
    return [
        tables.summary(frame, columns),
        tables.contrasts(frame, pairs, columns),
        tables.similarity_nulls(results, ["base", "snnl"]),
    ]


@pytest.fixture(scope="module")
def results(trained):
    return trained(RUNS)


def test_losses_are_the_recorded_ones(results):
    recorded, found = json.loads(GOLDEN.read_text()), golden(results)
    assert found["version"] == recorded["version"]
    for kind in ("cross_entropy", "total"):
        assert set(found[kind]) == set(recorded[kind])
        for arm, values in recorded[kind].items():
            assert found[kind][arm] == pytest.approx(values, rel=5e-6), f"{arm}: see this file's docstring"


def test_tables_do_not_depend_on_the_last_bits(results, monkeypatch, tmp_path):
    """Initial weights of one seed perturbed by 1e-15, as another CPU's rounding would: the same tables."""
    monkeypatch.setenv("MOE_RESULTS_DIR", str(tmp_path))
    initialise = tasks.initialise

    def perturbed(model, seed):
        initialise(model, seed)
        model.double()
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
                weight += 1e-15 * noise

    monkeypatch.setattr(tasks, "initialise", perturbed)
    shaken = [
        result
        if run.seed != arms.SEEDS[0]
        else store.compact({"run": asdict(run)} | study.execute(replace(run, tsne=False), "cpu"))
        for run, result in zip(RUNS, results, strict=True)
    ]
    for before, after in zip(rendered(results), rendered(shaken), strict=True):
        assert before.to_string() == after.to_string()


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(study.ensure(RUNS)), indent=1) + "\n")
