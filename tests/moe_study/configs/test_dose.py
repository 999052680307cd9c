"""Dose-response: every dose differs from its control in the remedy alone, and planted effects are found."""

from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest

from moe_study import store, study
from moe_study.columns import COLUMNS, frame_of
from moe_study.configs import arms, snnl
from moe_study.configs.dose import PLANS, Dose, Panel
from moe_study.report import doses

EVERY_PLAN = pytest.mark.parametrize(
    ("name", "profile"), [(name, profile) for name, profiles in PLANS.items() for profile in profiles]
)


@EVERY_PLAN
def test_names_tell_doses_apart(name, profile):
    planned = study.runs(profile, name)
    configurations = {(run.arm, run.seed): run.id for run in planned}
    assert len(configurations) == len(set(configurations.values())) == len(planned)
    assert all("/" not in run.arm and " " not in run.arm for run in planned)


@EVERY_PLAN
def test_a_control_lacks_the_remedy_and_nothing_else(name, profile):
    planned = PLANS[name][profile]
    for panel in planned.panels:
        for _, _, one in panel:
            treated, control = one.arm(planned.settings), one.control.arm(planned.settings)
            assert one.control.control == one.control
            assert treated[2] == control[2]  # training
            assert treated[0] == control[0]
            assert treated[1].snnl is not None
            assert control[1] == replace(treated[1], snnl=None)


@EVERY_PLAN
def test_every_cell_has_its_own_label(name, profile):
    for panel in PLANS[name][profile].panels:
        (_, rows), (_, columns) = panel.labels
        assert len(set(rows)) == len(rows) == len(panel.doses)
        assert all(len(set(columns)) == len(columns) == len(line) for line in panel.doses)


def test_the_default_dose_is_the_studys_own_arm():
    settings = snnl.SETTINGS["core"]["fashion_mnist"]
    model, objective, train = Dose(settings.factor).arm(settings)
    assert (model, objective) == arms.snnl_arms(settings)["snnl"]
    assert train == settings.train
    assert Dose().control.arm(settings)[:2] == arms.snnl_arms(settings)["base"]


def test_study_of_a_data_set():
    assert study.dose_study("core", "cifar100") == "snnl-batches"
    with pytest.raises(study.StudyError, match=r"'svhn'.*known: fashion_mnist, cifar100$"):
        study.dose_study("core", "svhn")


# ------------------------------------------------------------------------------- planted effects

FACTORS, EXPERTS = ("0.1", "1", "10"), ("4", "8")
PANEL = Panel(
    "factor × experts",
    (("factor", FACTORS), ("experts", EXPERTS)),
    tuple(tuple(Dose(float(f), num_experts=int(e)) for e in EXPERTS) for f in FACTORS),
)


def result(one, seed, accuracy):
    run = {"profile": "core", "study": "snnl-dose", "dataset": "x", "arm": one.name, "seed": seed}
    return {"run": run, "primary_endpoint": store.PRIMARY_ENDPOINT, "task": {"accuracy": accuracy}}


def planted(slope):
    """Accuracy 0.8, seed by seed a little more, and `slope` (by number of experts) for a tenfold factor."""
    results = []
    for seed, noise in enumerate((0.0, 0.01, -0.02, 0.015)):
        for control in dict.fromkeys(one.control for _, _, one in PANEL):
            results.append(result(control, seed, 0.8 + noise))
        for row, column, one in PANEL:
            wobble = 0.001 * ((seed + row) % 2)
            results.append(result(one, seed, 0.8 + noise + slope[column] * (row - 1) + wobble))
    return frame_of(results, {"accuracy": COLUMNS["accuracy"]})


def test_effects_are_paired_by_seed_and_in_their_cell():
    effects = doses.dose_effects(planted((0.01, -0.03)), PANEL, "accuracy")
    assert len(effects) == 6
    for (row, column), found in effects.items():
        wobble = [0.001 * ((seed + row) % 2) for seed in range(4)]
        expected = (0.01, -0.03)[column] * (row - 1) + np.mean(wobble)
        assert found.difference == pytest.approx(expected)
        assert found.high - found.low < 0.004  # the seeds' common noise is gone
    table = doses.dose_table(planted((0.01, -0.03)), PANEL, "accuracy")
    assert table.loc["10", "4"].startswith("+1.05 [+0.9")
    assert table.loc["10", "4"].endswith("(4)")
    assert table.index.name == "factor"
    assert table.columns.name == "experts"


def test_trends_are_the_slope_of_a_tenfold_factor():
    trends = doses.dose_trends(planted((0.01, -0.03)), [PANEL, PANEL], ["accuracy"])
    assert list(trends.index) == [("accuracy (points)", "experts: 4"), ("accuracy (points)", "experts: 8")]
    assert [float(d) for d in trends["slope"]] == pytest.approx([1, -3], abs=0.01)


def test_a_panel_without_a_factor_has_no_trend():
    panel = replace(PANEL, labels=(("normalisation", FACTORS), PANEL.labels[1]))
    assert doses.dose_trends(planted((0.01, 0.0)), [panel], ["accuracy"]).empty


def colours(axis):
    return np.asarray(axis.images[0].get_array(), dtype=float)


def test_heatmap_frames_what_excludes_zero():
    axis = doses.dose_heatmaps(planted((0.01, 0.0)), PANEL, ["accuracy"]).axes[0]
    framed = [patch.get_xy() for patch in axis.patches]
    assert {round(x + 0.48) for x, _ in framed} == {0}  # the effect is in the first column alone
    assert axis.get_title() == "accuracy (points),\npurple: better"
    assert "+1.05" in [text.get_text() for text in axis.texts]


def test_heatmap_colours_are_differences_and_one_colour_is_better():
    frame = planted((0.002, -0.03))
    names = ["accuracy", "cross-entropy", "H(E|c)"]
    for name in names[1:]:
        frame[name] = frame["accuracy"]
    up, down, neither = doses.dose_heatmaps(frame, PANEL, names).axes[:3]
    expected = np.array([[-0.0015, 0.0305], [0.0005, 0.0005], [0.0025, -0.0295]])
    np.testing.assert_allclose(colours(up), expected, rtol=1e-6)
    np.testing.assert_allclose(colours(down), -expected, rtol=1e-6)
    np.testing.assert_allclose(colours(neither), expected, rtol=1e-6)
    for axis in (up, down, neither):
        assert axis.images[0].get_clim() == pytest.approx((-0.0305, 0.0305))
    assert neither.get_title().startswith("H(E|c) (nats)")
    worse = up.images[0].get_cmap()(0.0)
    assert worse[0] > worse[2]  # orange
    assert [axis.get_title().split(",\n")[1] for axis in (up, down, neither)] == [
        "purple: better", "purple: better", "purple: more",
    ]  # fmt: skip


def test_heatmap_leaves_out_rows_and_columns_without_a_number():
    frame = planted((0.01, 0.0))
    gone = {line[1].name for line in PANEL.doses} | {PANEL.doses[0][0].name}
    axis = doses.dose_heatmaps(frame[~frame["arm"].isin(gone)], PANEL, ["accuracy"]).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == list(FACTORS[1:])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["4"]
    assert colours(axis).shape == (2, 1)


def test_heatmap_without_a_number_says_so():
    frame = planted((0.01, 0.0))
    (axis,) = doses.dose_heatmaps(frame[frame["seed"] < 1], PANEL, ["accuracy"]).axes
    assert not axis.images
    assert "no dose" in axis.texts[0].get_text()


@EVERY_PLAN
def test_every_panel_can_be_drawn(name, profile):
    """Of made-up results, one seed short in some cells."""
    generator = np.random.default_rng(0)
    rows = []
    for run in study.runs(profile, name):
        if run.seed in arms.SEEDS[:2] and not (run.seed == arms.SEEDS[1] and run.arm.endswith("factor=10")):
            keys = {key: asdict(run)[key] for key in ("profile", "study", "dataset", "arm", "seed")}
            rows.append(keys | {column: generator.normal() for column in COLUMNS})
    frame = pd.DataFrame(rows)
    for panel in PLANS[name][profile].panels:
        figure = doses.dose_heatmaps(frame, panel, doses.DOSE_MEASURES)
        titles = [axis.get_title() for axis in figure.axes if axis.get_visible()]
        assert [title.split(" (")[0].split(",")[0] for title in titles] == list(doses.DOSE_MEASURES)


def test_temperatures_are_drawn_in_order():
    panel = PLANS["snnl-dose"]["core"].panels[0]
    arms_ = sorted(panel.arms())
    rows = [
        {"arm": arm, "seed": seed, "accuracy": 0.8 + at / 99}
        for at, arm in enumerate(arms_)
        for seed in (1, 2)
    ]
    axis = doses.dose_heatmaps(pd.DataFrame(rows), panel, ["accuracy"]).axes[0]
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["0.1", "1", "10", "annealed from 1"]
    effects = doses.dose_effects(pd.DataFrame(rows), panel, "accuracy")
    annealed = panel.labels[1][1].index("annealed from 1")
    written = [text.get_text() for text in axis.texts if text.get_position() == (3, -0.16)]
    assert written == [f"{100 * effects[0, annealed].difference:+.2f}"]
