"""The collapse map: every difference recomputed by loops over the results."""

import numpy as np
import pytest

from moe_study.report import map_plots

SEEDS, EXPERTS, WIDTHS, CODES = (1, 2, 3), (2, 4), (4, 16), (4, 8)
ARMS = ("base", "base-balance", "uniform-gate", "snnl", "snnl-weaker", "uniform-snnl")


@pytest.fixture
def results():
    draw = np.random.default_rng(0)
    return [
        {
            "run": {
                "arm": arm,
                "seed": seed,
                "model": {"code_dim": code, "num_experts": experts, "expert_hidden": width},
            },
            "task": {"accuracy": draw.uniform(0.2, 0.8)},
            "routing": {"load": {"effective_experts": draw.uniform(1, experts)}},
        }
        for code in CODES
        for experts in EXPERTS
        for width in WIDTHS
        for arm in ARMS
        for seed in SEEDS
    ]


def accuracy(results, arm, seed, code, experts, width):
    size = {"code_dim": code, "num_experts": experts, "expert_hidden": width}
    for result in results:
        run = result["run"]
        if (run["arm"], run["seed"], run["model"]) == (arm, seed, size):
            return 100 * result["task"]["accuracy"]
    return None


def panels(figure):
    """(title, column) -> texts of the cells, row by row."""
    return {
        (part.get_suptitle(), column): axis.texts
        for part in figure.subfigs
        for column, axis in enumerate(part.axes[: len(CODES)])
    }


def test_cells_hold_paired_medians_and_are_bold_where_all_seeds_agree(results):
    found = panels(map_plots.gain_map(results))
    weights = set()
    for column, code in enumerate(CODES):
        texts = iter(found["snnl − uniform-snnl: does routing pay with SNNL?", column])
        for width in WIDTHS:
            for experts in EXPERTS:
                at = (code, experts, width)
                differences = [
                    accuracy(results, "snnl", seed, *at) - accuracy(results, "uniform-snnl", seed, *at)
                    for seed in SEEDS
                ]
                text = next(texts)
                assert float(text.get_text()) == pytest.approx(sorted(differences)[1], abs=0.0501)
                agree = min(differences) > 0 or max(differences) < 0
                assert text.get_weight() == ("bold" if agree else "normal")
                weights.add(text.get_weight())
    assert weights == {"bold", "normal"}


def test_evenness_is_0_for_one_expert_and_1_for_all(results):
    for result in results:
        experts = result["run"]["model"]["num_experts"]
        full = result["run"]["model"]["code_dim"] == 8
        result["routing"]["load"]["effective_experts"] = float(experts if full else 1)
    figure = map_plots.collapse_map(results)
    assert "(exp H(E) - 1) / (E - 1)" in figure.get_label()
    found = panels(figure)
    for (_, column), texts in found.items():
        assert {text.get_text() for text in texts} == {"1.00" if CODES[column] == 8 else "0.00"}


def test_caption_of_the_costs_counts_the_cells_that_balance_does_not_repair(results):
    lost, even = 0, []
    for code in CODES:
        for experts in EXPERTS:
            for width in WIDTHS:
                at = (code, experts, width)
                differences = [
                    accuracy(results, "base-balance", seed, *at)
                    - accuracy(results, "uniform-gate", seed, *at)
                    for seed in SEEDS
                ]
                lost += sorted(differences)[1] < 0
                own = [
                    (r["routing"]["load"]["effective_experts"] - 1) / (experts - 1)
                    for r in results
                    if r["run"]["arm"] == "base-balance"
                    and r["run"]["model"]
                    == {"code_dim": code, "num_experts": experts, "expert_hidden": width}
                ]
                even.append(sorted(own)[1])
    caption = map_plots.cost_map(results).get_label()
    assert f"less accurate than a constant one in {lost} of 8 cells" in caption
    assert f"its evenness is {int(100 * min(even)) / 100:.2f} or more" in caption
    assert "Medians over 3 seeds" in caption
    assert "1 cell in 4 does by chance" in caption
    alone = [r for r in results if r["run"]["seed"] == 1 and r["run"]["arm"] != "base-balance"]
    assert "One seed" in map_plots.cost_map(alone).get_label()
    assert "chance" not in map_plots.cost_map(alone).get_label()


def test_table_counts_cells(results):
    table = map_plots.map_table(results)
    medians, higher, lower = [], 0, 0
    for code in CODES:
        for experts in EXPERTS:
            for width in WIDTHS:
                at = (code, experts, width)
                differences = [
                    accuracy(results, "base", seed, *at) - accuracy(results, "uniform-gate", seed, *at)
                    for seed in SEEDS
                ]
                medians.append(sorted(differences)[1])
                higher += min(differences) > 0
                lower += max(differences) < 0
    row = table.loc["base − uniform-gate: does learned routing pay?"]
    assert (row["cells"], row["seeds"]) == (8, 3)
    assert (row["higher in all seeds"], row["lower in all seeds"]) == (higher, lower)
    assert float(row["mean of medians, points"]) == pytest.approx(sum(medians) / 8, abs=0.006)
    assert float(row["lowest"]) == pytest.approx(min(medians), abs=0.006)


def test_unfinished_pairs_are_left_out(results):
    """A seed without its partner adds nothing; an arm that is missing takes its row away."""
    without = [r for r in results if (r["run"]["arm"], r["run"]["seed"]) != ("uniform-gate", 1)]
    assert map_plots.map_table(without).loc["base − uniform-gate: does learned routing pay?", "seeds"] == 2
    plain = [r for r in results if r["run"]["arm"] in ("base", "uniform-gate")]
    assert list(map_plots.map_table(plain).index) == ["base − uniform-gate: does learned routing pay?"]
    assert not map_plots.gain_map(plain).subfigs
    fewer = map_plots.gain_map([r for r in results if r["run"]["arm"] != "snnl-weaker"])
    assert [part.get_suptitle().split(":")[0] for part in fewer.subfigs] == [
        "snnl − base",
        "snnl − uniform-snnl",
    ]
    assert "row by row: snnl − base; snnl − uniform-snnl." in fewer.get_label()


def test_a_map_of_one_panel_has_room_for_its_titles(results):
    narrow = [r for r in results if r["run"]["model"]["code_dim"] == 4]
    assert map_plots.cost_map(narrow).get_figwidth() == map_plots.LEAST_WIDTH
    assert map_plots.cost_map(results).get_figwidth() > map_plots.LEAST_WIDTH
