"""Tables, figures and the rendered report, on made-up result files, against numbers done by hand."""

import base64
import inspect
import re
from dataclasses import asdict, replace
from itertools import pairwise

import matplotlib as mpl
import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from moe_study import store, study, trust, verdicts
from moe_study.claims import ACCURACY
from moe_study.columns import (
    COLUMNS,
    LANGUAGE_COLUMNS,
    VISION_COLUMNS,
    Column,
    frame_of,
    look_up,
    shown_interval,
    spread,
)
from moe_study.configs import arms, crossed, snnl
from moe_study.data import ROOT
from moe_study.report import (
    first_screen,
    glossary,
    overview,
    plots,
    provenance,
    readme,
    routed_plots,
    selection,
    side_by_side,
    snnl_plots,
    speed,
    tables,
    trust_plots,
)
from moe_study.report import verdicts as words
from moe_study.report.answers import answers, notes
from moe_study.report.page import as_html, markdown, render
from moe_study.stats import PairedComparison

# ------------------------------------------------------------------------------------ made-up results


def planned(arm: str, seed: int, dataset: str = "fashion_mnist", profile: str = "core") -> study.Run:
    (run,) = [r for r in study.runs(profile, "snnl", dataset, arm) if r.seed == seed]
    return run


def made_up(run: study.Run, accuracy: float = 0.9, num_classes: int = 10, epochs: int = 3) -> dict:
    """What a result file of `run` could hold; every number follows from `accuracy` and the seed."""
    draw = np.random.default_rng(run.seed)
    experts = run.model.num_experts
    score = {"accuracy": accuracy, "cross_entropy": 1 - accuracy, "calibration_error": 0.02}
    dense = experts == 1  # similarity of one expert is no number
    similarity = dict.fromkeys(("weights", "weights_aligned", "outputs", "cka"), None if dense else 0.1)
    by_use = dict.fromkeys(("outputs_weighted", "cka_weighted"), None if dense else 0.2)
    result = {
        "id": run.id,
        "run": asdict(run),
        "commit": "0123456789abcdef",
        "dirty": False,
        "versions": {"python": "3.12.0", "torch": "2.14.0"},
        "machine": "Some CPU",
        "device": "cpu",
        "wall_seconds": 90.0,
        "peak_memory_mb": 500.0 + run.seed,
        "history": {
            "best_cross_entropy": 1 - accuracy,
            "validation": {
                "cross_entropy": [1 / (e + 1) for e in range(epochs)],
                "accuracy": [accuracy - 0.1 * (epochs - 1 - e) for e in range(epochs)],
                "marginal": [1.3] * epochs,
                "per_sample": [1.3 - 0.2 * e for e in range(epochs)],
                "output_similarity": [0.6 - 0.1 * e for e in range(epochs)],
            },
        },
        "primary_endpoint": "last_epoch",
        "task": score,
        "endpoints": {
            "best_accuracy": {"epoch": 1, "task": score | {"accuracy": accuracy - 0.001}},
            "best_cross_entropy": {"epoch": epochs - 1, "same_as": "last_epoch"},
        },
        "routing": {
            "entropy": {
                **{"marginal": 1.3, "per_sample": 0.4, "class_conditional": 0.5, "expert_class": 1.5},
                **{"information_input": 0.9, "information_class": 0.8},
                **{"num_experts": experts, "num_classes": num_classes},
            },
            "information_class_null": 0.02,
            "load": {"effective_experts": 3.5, "dead_experts": 0, "adjusted_mutual_information": 0.6},
            "class_expert": draw.dirichlet(np.ones(experts), num_classes).tolist(),
        },
        "similarity": similarity | by_use,
        "initial": {
            "similarity": {k: v and v / 2 for k, v in similarity.items()},
            "routing": {"entropy": {"marginal": 1.38}},
        },
        "embedding": {"knn_accuracy": 0.9, "silhouette": 0.4, "trustworthiness": 0.95, "snnl": 1.6},
        "ablation": {"permuted": 0.3, "swapped": 0.1, "merged": 0.1, "dropped": [0.1] * experts},
        "expert_parameters": 1000,
        "num_parameters": 1_234_567,
    }
    if run.independent_experts:
        result["null"] = {"similarity": {k: v and v * 4 for k, v in similarity.items()}}
    if run.tsne:
        points = draw.integers(0, 1000, (2, 400, 2)).tolist()
        labels = [i % num_classes for i in range(400)]
        result["tsne"] = {"before": points[0], "after": points[1], "labels": labels}
    return result


# arm -> accuracy of each of three seeds; the differences are done by hand in the tests
ACCURACIES = {
    "base": (0.90, 0.91, 0.92),
    "snnl": (0.92, 0.92, 0.94),
    "dense": (0.80, 0.80, 0.80),
    "dense-snnl": (0.81, 0.80, 0.82),
}


def some_results(accuracies: dict = ACCURACIES, **options: object) -> list[dict]:
    return [
        made_up(planned(arm, seed), accuracy, **options)
        for arm, values in accuracies.items()
        for seed, accuracy in zip(arms.SEEDS, values, strict=False)
    ]


@pytest.fixture
def core(folders):
    """Those results as files of profile "core", at the planned paths."""
    for result in some_results():
        run = planned(result["run"]["arm"], result["run"]["seed"])
        store.write_run(run.path, result)
    return folders


# -------------------------------------------------------------------------------------------- tables


def test_every_column_is_found_in_a_real_kind_of_result():
    frame = frame_of(some_results())
    assert list(frame.columns) == ["profile", "study", "dataset", "arm", "seed", *COLUMNS]
    assert len(frame) == 12
    assert not frame[frame["arm"].isin(["base", "snnl"])].isna().any().any()
    assert {str(kind) for kind in frame[list(COLUMNS)].dtypes} == {"float64"}
    first = frame.iloc[0]
    assert (first["arm"], first["seed"], first["accuracy"]) == ("base", 42, 0.90)
    assert first["accuracy, best validation accuracy"] == pytest.approx(0.899)
    assert first["accuracy, best validation cross-entropy"] == 0.90  # it was the last epoch
    assert first["cos outputs, by use"] == 0.2
    assert first["cost of permuted routing"] == 0.3
    assert frame[frame["arm"] == "dense"]["|cos| weights"].isna().all()


def test_scores_of_an_older_file_are_shown_where_it_has_them():
    """It has the last epoch's scores, and everything else of the lowest validation cross-entropy."""
    old = made_up(planned("base", 42))
    old["last_epoch"] = old["task"] | {"accuracy": 0.8}
    for key in ("primary_endpoint", "endpoints"):
        del old[key]
    row = frame_of([old]).iloc[0]
    assert row["accuracy"] == 0.8
    assert np.isnan(row["accuracy, best validation accuracy"])
    assert row["accuracy, best validation cross-entropy"] == 0.9


RUN = {"profile": "core", "study": "snnl", "dataset": "mnist", "arm": "base", "seed": 3}
SMALL = {"id": "0123456789", "run": RUN, "a": {"b": 1, "c": None, "0.1": {"d": 2}}, "l": [{"m": 5}]}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("a.b", 1),
        ("a.c", None),
        ("a.c.d", None),
        (("a", "0.1", "d"), 2),
        ("l.0.m", 5),
        ("null.similarity.outputs", None),  # may be missing
    ],
)
def test_look_up(path, value):
    assert look_up(SMALL, path) == value


@pytest.mark.parametrize("path", ["a.x", "x.y", "a.b.c", "l.1.m", "l.m", ("a", "0.2")])
def test_a_path_that_a_file_lacks_is_an_error_that_names_both(path):
    dotted = path if isinstance(path, str) else ".".join(path)
    name = re.escape(f"core/snnl/mnist/base-s3-0123456789.json lacks {dotted}:")
    with pytest.raises(store.StoreError, match=name):
        look_up(SMALL, path)


def test_summary_is_mean_and_sample_deviation():
    table = tables.summary(frame_of(some_results()), ["accuracy", "|cos| weights"])
    assert table.index.tolist() == list(ACCURACIES)  # in the order given, not by the alphabet
    assert table.loc["base"].tolist() == ["3", "91.00 ± 1.00", "0.1000 ± 0.0000"]
    assert table.loc["snnl"].tolist() == ["3", "92.67 ± 1.15", "0.1000 ± 0.0000"]
    assert table.loc["dense"].tolist() == ["3", "80.00 ± 0.00", "-"]


def test_contrast_by_hand():
    """Differences 0.02, 0.01, 0.02: mean 1/60, deviation 1/(100 sqrt 3), t(0.975, 2) = 4.302653."""
    frame = frame_of(some_results())
    found = tables.contrast(frame, "snnl", "base", "accuracy")
    assert found.difference == pytest.approx(1 / 60)
    assert found.low == pytest.approx(1 / 60 - 4.302653 / 300, abs=1e-7)
    assert found.high == pytest.approx(1 / 60 + 4.302653 / 300, abs=1e-7)
    assert found.p == 0.25  # 2 of 2^3 sign patterns
    assert tables.show(found) == {
        "difference": "+0.0167",
        "95 % interval": "[+0.0023, +0.0310]",
        "p": "0.2500",
        "seeds": "3 (pilot)",
    }
    assert verdicts.reading(found, "higher") == "interval on the claimed side"
    assert verdicts.reading(found, "lower") == "interval on the other side"


def test_contrast_pairs_by_seed_and_not_by_position():
    """Rows in any order; a seed that one arm lacks is left out."""
    results = some_results({"base": (0.90, 0.91, 0.92), "snnl": (0.92, 0.92, 0.94)})
    shuffled = [results[i] for i in (5, 0, 3, 2, 4, 1)]
    assert tables.contrast(frame_of(shuffled), "snnl", "base", "accuracy") == (
        tables.contrast(frame_of(results), "snnl", "base", "accuracy")
    )
    found = tables.contrast(frame_of(results[1:]), "snnl", "base", "accuracy")  # base without seed 42
    assert found.seeds == 2
    assert found.difference == pytest.approx((0.01 + 0.02) / 2)


def test_contrast_needs_two_pairs():
    frame = frame_of(some_results({"base": (0.9, 0.91), "snnl": (0.92,)}))
    assert tables.contrast(frame, "snnl", "base", "accuracy") is None
    assert tables.contrast(frame, "snnl", "raw", "accuracy") is None
    dense = frame_of(some_results({"dense": (0.8, 0.81), "dense-snnl": (0.82, 0.83)}))
    assert tables.contrast(dense, "dense-snnl", "dense", "|cos| weights") is None  # not a number


def test_a_seed_that_is_there_twice_is_refused():
    results = some_results({"base": (0.9, 0.91), "snnl": (0.92, 0.93)})
    with pytest.raises(ValueError, match="duplicate"):
        tables.contrast(frame_of([*results, results[0]]), "snnl", "base", "accuracy")


def test_mechanism_by_hand():
    """Mixture 0.02, 0.01, 0.02 minus dense 0.01, 0, 0.02: 0.01, 0.01, 0."""
    found = tables.mechanism(frame_of(some_results()), "accuracy")
    assert found.difference == pytest.approx(0.02 / 3)
    assert found.low == pytest.approx(0.02 / 3 - 4.302653 / 300, abs=1e-7)
    assert found.p == 0.5  # a third of 0 flips freely: 4 of 8 patterns
    assert verdicts.reading(found, "higher") == "interval includes 0"
    without = {arm: values for arm, values in ACCURACIES.items() if arm != "dense"}
    assert tables.mechanism(frame_of(some_results(without)), "accuracy") is None


def test_contrasts_lists_what_there_is():
    pairs = [("snnl", "base"), ("snnl", "raw")]
    table = tables.contrasts(frame_of(some_results()), pairs, ["accuracy", "|cos| weights"])
    mechanism = "mechanism: (snnl - base) - (dense-snnl - dense)"
    assert table.index.tolist() == [
        ("accuracy (points)", "snnl - base"),
        ("accuracy (points)", mechanism),
        ("|cos| weights", "snnl - base"),  # the dense arms have no such number: no mechanism
    ]
    assert table.loc[("accuracy (points)", "snnl - base"), "95 % interval"] == "[+0.23, +3.10]"
    assert table.loc[("accuracy (points)", mechanism), "difference"] == "+0.67"
    assert table.loc[("|cos| weights", "snnl - base"), "difference"] == "+0.0000"
    assert tables.contrasts(frame_of(some_results({"base": (0.9,)})), pairs, ["accuracy"]).empty


def test_contrasts_of_routing_leave_out_arms_with_one_expert():
    pairs = [("snnl", "base"), ("base", "dense"), ("snnl", "dense-snnl")]
    table = tables.contrasts(frame_of(some_results()), pairs, ["H(E)", "cross-entropy"])
    assert [row for row in table.index if "H(E)" in row[0]] == [("H(E) (nats)", "snnl - base")]
    assert len(table) == 1 + 4


def comparison(low: float, high: float, p: float = 0.01, seeds: int = 10) -> PairedComparison:
    return PairedComparison((low + high) / 2, low, high, p, seeds)


@pytest.mark.parametrize(
    ("low", "high", "claimed", "reading"),
    [
        (0.1, 0.2, "higher", "interval on the claimed side"),
        (-0.2, -0.1, "higher", "interval on the other side"),
        (-0.1, 0.2, "higher", "interval includes 0"),
        (0.0, 0.2, "higher", "interval includes 0"),
        (-0.2, 0.0, "higher", "interval includes 0"),
        (0.0, 0.0, "lower", "interval includes 0"),
        (-0.2, -0.1, "lower", "interval on the claimed side"),
        (0.1, 0.2, "lower", "interval on the other side"),
        (-0.1, 0.2, "lower", "interval includes 0"),
    ],
)
def test_reading(low, high, claimed, reading):
    assert verdicts.reading(comparison(low, high), claimed) == reading


def test_show_rounds_and_marks_pilots():
    assert tables.show(comparison(0.1, 0.3, p=0.00002, seeds=8), Column("", 1)) == {
        "difference": "+0.2",
        "95 % interval": "[+0.1, +0.3]",
        "p": "< 0.0001",
        "seeds": "8",
    }
    assert tables.show(comparison(0.1, 0.3, seeds=7))["seeds"] == "7 (pilot)"


# --------------------------------------------------------------------- made-up AC and crossed results


def routed_plan(study_name: str, arm: str, seed: int, dataset: str | None = None) -> study.Run:
    dataset = dataset or {"ac-language": "wikitext2"}.get(study_name, "cifar10")
    (run,) = [r for r in study.runs("core", study_name, dataset, arm) if r.seed == seed]
    return run


def routed(run: study.Run, value: float = 0.9, epochs: int = 3) -> dict:
    """What a result file of an AC or crossed run could hold; every number follows from `value`."""
    scaled, text = run.model.trunk.router == "ac", run.study == "ac-language"
    experts = run.model.trunk.num_experts
    load = {"dead_experts": 1, "effective_experts": 10 * value, "adjusted_mutual_information": 0.1}
    load["share"] = [2 * (e + 1) / experts / (experts + 1) for e in range(experts)]
    changed = {"best": value / 4, "chosen": value / 2, "follows": 0.3, "follows_plain": 0.2}
    layer = {"marginal": 1.3, "per_sample": 0.8, "class_conditional": 1.2, "load": load}
    layers = [layer | {"changed": changed if scaled and at else None} for at in range(3)]
    company = {"cross_entropy_alone": 2 + value / 100, "cross_entropy_together": 2.0}
    company |= {"changed_choice": value / 10, "largest_change": value}
    score = {"accuracy": value, "cross_entropy": 1 - value}
    score |= {"perplexity": 20.0, "bits_per_byte": 2.0} if text else {"calibration_error": 0.02}
    result = {
        "id": run.id,
        "run": asdict(run),
        "wall_seconds": 90.0,
        "history": {
            "best_cross_entropy": 1 - value,
            "validation": {
                "cross_entropy": [2 - value / (epochs - e) for e in range(epochs)],
                "accuracy": [value] * epochs,
                "effective_experts": [10 * value] * epochs,
            },
        },
        "primary_endpoint": "last_epoch",
        "task": score,
        "endpoints": {
            name: {"epoch": epochs - 1, "same_as": "last_epoch"}
            for name in ("best_accuracy", "best_cross_entropy")
        },
        "num_parameters": 1_234_567,
        "routing": {"layers": layers, "stability": [0.1, None]},
        "company": {"other sequences": company, "later tokens": company} if text else company,
        "ablation": {"permuted": [0.1, 0.2, 0.3], "permuted_everywhere": 0.5},
    }
    if text:
        lost = {"0": 0.0, "0.015": 0.01, "0.025": 0.02, "0.05": 0.03, "0.1": 0.06}
        result["swap"] = {
            share: {"clean": 2.0, "swapped": 2 + value * v, "all": 2.1 + v, "words": 9}
            for share, v in lost.items()
        }
        return result
    kinds = ("noise", "blur", "contrast", "jpeg")
    result["corruption"] = {k: [value - 0.1 * severity for severity in range(1, 6)] for k in kinds}
    result["corruption"]["clean"] = value
    modes = ("detached", "through", "frozen") if scaled else ("detached",)
    result["attack"] = {
        f"{name}-{strength}": {mode: value - 0.1 * (strength + at) for at, mode in enumerate(modes)}
        for name in ("fgsm", "pgd")
        for strength in (1, 2)
    }
    result["attack"] |= {"clean": value, "spsa-2": {"detached": 0.3}, "spsa-2 clean": {"detached": 0.7}}
    result["embedding"] = {"knn_accuracy": 0.9, "silhouette": 0.4, "trustworthiness": 0.95, "snnl": 1.6}
    return result


ROUTED_VALUES = {
    "linear": (0.80, 0.81, 0.82),
    "cosine": (0.80, 0.80, 0.80),
    "ac": (0.84, 0.82, 0.84),
    "ac-shuffled": (0.80, 0.81, 0.80),
    "ac-row": (0.83, 0.84, 0.83),
    "ac-pooled": (0.83, 0.82, 0.83),
    "ac-matched": (0.80, 0.81, 0.80),
    "ac-causal": (0.80, 0.81, 0.80),
}
CROSSED_VALUES = {
    "base": (0.80, 0.80, 0.80),
    "ac": (0.82, 0.81, 0.82),
    "snnl": (0.81, 0.81, 0.81),
    "snnl-ac": (0.85, 0.82, 0.85),
}


def routed_results(study_name: str, values: dict | None = None, seeds: int = 3, **options: int) -> list[dict]:
    chosen = dict(values or (CROSSED_VALUES if study_name == "crossed" else ROUTED_VALUES))
    if study_name == "ac-vision":
        chosen.pop("ac-row", None)
    return [
        routed(routed_plan(study_name, arm, seed), value, **options)
        for arm, own in chosen.items()
        for seed, value in zip(arms.SEEDS[:seeds], own, strict=False)
    ]


COLUMN_SETS = {
    "ac-vision": VISION_COLUMNS,
    "ac-language": LANGUAGE_COLUMNS,
    "crossed": VISION_COLUMNS,
}


@pytest.mark.parametrize("study_name", COLUMN_SETS)
def test_routed_columns_are_all_found(study_name):
    frame = frame_of(routed_results(study_name), COLUMN_SETS[study_name])
    assert not frame[frame["arm"] == "ac"].isna().any().any()
    plain = frame[~frame["arm"].str.contains("ac")]
    assert plain.columns[plain.isna().any()].tolist() == ["changed by M"]


@pytest.mark.parametrize("key", ["corruption", "attack", "company", "embedding"])
def test_routed_columns_refuse_a_result_that_lacks_them(key):
    result = routed_results("ac-vision")[0]
    del result[key]
    with pytest.raises(store.StoreError, match=f"lacks {key}"):
        frame_of([result], VISION_COLUMNS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("study_name", "dataset", "arm"),
    [("snnl", "digits", "raw"), ("ac-vision", "digits", "ac"), ("ac-language", "docs", "ac")],
)
def test_columns_name_what_a_run_writes(study_name, dataset, arm, trained):
    """Against a result that the engine itself has made."""
    run = study.runs("digits", study_name, dataset, arm)[0]
    (result,) = trained([run])
    row = frame_of([result], COLUMN_SETS.get(study_name, COLUMNS)).iloc[0]
    assert row.index[row.isna()].tolist() == []
    if study_name == "snnl":
        for source in ("similarity", "initial.similarity"):
            for key in ("weights", "weights_aligned", "outputs", "cka"):
                assert look_up(result, f"{source}.{key}") is not None
    else:
        assert tables.company_table([result]).shape[1] == 4
        assert len(tables.routing_by_layer([result])) == len(run.model.trunk.moe_blocks)


def test_losses_by_hand():
    vision = routed_results("ac-vision", {"ac": (0.9,)})[0]
    row = frame_of([vision], VISION_COLUMNS).iloc[0]
    assert row["validation area"] == pytest.approx((2 - 0.3 + 2 - 0.45 + 2 - 0.9) / 3)
    assert row["lost to corruption"] == pytest.approx(0.3)  # 0.1 to 0.5, "clean" is not among them
    assert row["FGSM, 2/255"] == pytest.approx(0.3)  # through loses more than detached; frozen, more, is out
    assert row["lost to attack"] == pytest.approx((0.2 + 0.3 + 0.2 + 0.3) / 4)
    assert row["accuracy under corruption"] == pytest.approx(0.9 - 0.3)
    assert row["accuracy under attack"] == pytest.approx(0.9 - (0.2 + 0.3 + 0.2 + 0.3) / 4)
    assert row["SPSA, 2/255"] == pytest.approx(0.4)  # against the clean accuracy of its own images
    assert row["changed by M"] == pytest.approx(0.45)  # the first layer has none
    assert row["stability"] == pytest.approx(0.1)
    assert row["batch dependence"] == pytest.approx(0.009)

    text = routed_results("ac-language", {"ac": (0.5,)})[0]
    row = frame_of([text], LANGUAGE_COLUMNS).iloc[0]
    assert row["2.5 %"] == pytest.approx(0.01)
    assert row["lost to swap"] == pytest.approx(0.5 * (0.01 + 0.02 + 0.03 + 0.06) / 4)
    assert row["cross-entropy under word swap"] == pytest.approx(2 + row["lost to swap"])
    assert row["dependence on later tokens"] == pytest.approx(0.005)


def test_convergence_by_hand():
    """Curves planted: ac reaches the cosine's best (1.0) after 2, never and 4 of 4 epochs."""
    curves = {
        "cosine": ([4, 3, 2, 1], [4, 3, 2, 1], [4, 3, 1, 2]),
        "ac": ([2, 1, 1, 1], [4, 3, 2, 1.5], [4, 3, 2, 0.5]),
        "ac-shuffled": ([4, 3, 2, 1.5], [4, 3, 2, 1.5], [4, 3, 2, 0.5]),
    }
    results = routed_results("ac-vision", dict.fromkeys(curves, (0.9, 0.9, 0.9)))
    for result in results:
        arm, seed = result["run"]["arm"], result["run"]["seed"]
        result["history"]["validation"]["cross_entropy"] = curves[arm][arms.SEEDS.index(seed)]
    table = tables.convergence(results[:-1])  # ac-shuffled without its last seed
    assert table["epochs to best of cosine"].tolist() == ["4 (3 of 3)", "4 (2 of 3)", "> 4 (0 of 2)"]
    assert table["epochs to best of linear"].tolist() == ["-"] * 3  # not there
    assert table.loc["ac", "validation area"] == "2.0833 ± 0.7324"  # 1.25, 2.625, 2.375
    assert table.loc["ac-shuffled", "best validation cross-entropy"] == "1.5000 ± 0.0000"


def test_crossed_effects_by_hand():
    """AC: mean of (0.02, 0.01, 0.02) and (0.04, 0.01, 0.04); interaction: 0.02, 0, 0.02."""
    frame = frame_of(routed_results("crossed"), VISION_COLUMNS)
    table = tables.crossed_effects(frame, ["accuracy"])
    assert table["difference"].tolist() == ["+2.33", "+1.67", "+1.33"]
    half = 4.302653 * np.std([0.02, 0, 0.02], ddof=1) / 3**0.5
    assert (
        table["95 % interval"].iloc[2] == f"[{100 * (0.04 / 3 - half):+.2f}, {100 * (0.04 / 3 + half):+.2f}]"
    )
    without = frame[frame["arm"] != "snnl"]
    assert tables.crossed_effects(without).empty


def test_what_rounds_to_zero_has_no_sign():
    assert tables.show(comparison(-2e-6, 1e-6))["difference"] == "+0.0000"
    assert tables.show(comparison(-2e-9, 1e-9))["95 % interval"] == "[+0.000000, +0.000000]"
    assert spread(pd.Series([-1e-6, -1e-6]), 4) == "0.0000 ± 0.0000"


def test_an_end_of_an_interval_keeps_its_side_of_zero():
    assert shown_interval(-0.677, -0.001, 2) == "[-0.677, -0.001]"
    assert shown_interval(-0.0025, 0.173, 2) == "[-0.003, +0.173]"
    assert shown_interval(-0.68, 0.0, 2) == "[-0.68, +0.00]"
    assert ACCURACY.shown(-0.00339, -0.00677, -0.00001) == "-0.34 [-0.677, -0.001] points"


# -------------------------------------------------------------------------------------------- report


def test_only_result_files_of_the_plan_are_read(core):
    """A file of an earlier setting beside the planned ones is not."""
    before = overview.accuracy_table("core")
    run = planned("base", 42)
    stray = run.path.with_name(f"base-s{arms.SEEDS[3]}-0000000000.json")
    store.write_run(stray, made_up(run, accuracy=0.0))
    assert overview.accuracy_table("core").equals(before)


def test_verdicts_as_tables(core):
    """Three seeds are pilots; each unit against its control, by hand."""
    found = selection.find_verdicts("core")
    table = words.table(found).reset_index().set_index(["claim", "against"])
    row = table.loc[("more accurate", "base: published baseline and fair control")]
    assert row[["of", "data set", "verdict", "counts from"]].tolist() == [
        "SNNL-MoE", "FashionMNIST (CNN)", "pilot", "+0.28 points",
    ]  # fmt: skip
    assert row[["difference", "95 % interval"]].tolist() == ["+1.67 points", "[+0.23, +3.10]"]
    assert row["seeds"] == "3 (pilot)"
    assert (
        table.loc[("a mixture beats a dense network", "dense: no mixture, of the same size"), "seeds"]
        == "3 (pilot)"
    )
    hangs = words.firmness(found).loc[("FashionMNIST (CNN)", "more accurate")]
    assert hangs[["at half the margin", "last epoch", "best accuracy"]].tolist() == ["="] * 3
    assert hangs["interval over seeds and images"] == "-"
    why = words.reasons(found).loc[("FashionMNIST (CNN)", "more accurate")]
    assert why["reason"] == "snnl - base +1.67 [+0.23, +3.10] points: fewer than 8 paired seeds."
    assert "(snnl - base) - (dense-snnl - dense) +0.67" in why["attribution"]
    assert "CNN, 4 experts of width 512, 8 epochs; measured at last epoch" in why["scope"]


def test_provenance_does_not_hide_a_dirty_or_unknown_tree(core):
    for seed, dirty in zip(arms.SEEDS, (True, None), strict=False):
        run = planned("base", seed)
        store.write_run(run.path, store.read(run.path) | {"dirty": dirty, "commit": None})
    rows = overview.provenance_table("core")["value"]
    assert rows["code changed since the commit"] == "?, no, yes"
    assert rows["commits"] == "0123456789, unknown"


def test_a_confirmatory_set_is_shown_when_it_is_whole(folders):
    """Nobody is to look at a part of it."""
    runs = study.runs("core", "snnl-confirm", "fashion_mnist")
    for run in runs[:-1]:
        store.write_run(run.path, made_up(run, 0.92 + 0.001 * (run.seed % 2) if run.arm == "snnl" else 0.9))
    assert selection.find_verdicts("core") == []
    assert overview.accuracy_table("core", "snnl-confirm").empty
    assert f"snnl-confirm on FashionMNIST ({len(runs) - 1} of {len(runs)} runs)" in selection.unfinished(
        "core"
    )
    store.write_run(runs[-1].path, made_up(runs[-1]))
    found = selection.find_verdicts("core")
    [accuracy] = [v for v in found if v.claim.key == "snnl-accuracy"]
    assert (accuracy.study, accuracy.comparison.seeds) == ("snnl-confirm", 20)
    assert "snnl-confirm on FashionMNIST" not in selection.unfinished("core")


def test_confirmation_takes_the_place_of_exploration(folders):
    for name in ("snnl", "snnl-confirm"):
        for run in study.runs("core", name, "fashion_mnist"):
            if run.arm in arms.MAIN_ARMS:
                gain = 0.001 * (run.seed % 3) * (run.arm == "snnl")
                store.write_run(run.path, made_up(run, 0.9 + gain))
    found = selection.find_verdicts("core")
    assert [v.study for v in found if v.claim.key == "snnl-accuracy"] == ["snnl-confirm", "snnl"]
    assert [v.study for v in selection.current(found) if v.claim.key == "snnl-accuracy"] == ["snnl-confirm"]


def test_tables_of_a_profile_without_runs(folders):
    assert selection.finished_runs("core", "snnl") == {}
    for table in (
        overview.accuracy_table("core"),
        overview.published_table("core"),
        overview.collapse_table("core"),
        overview.tuning_table("core"),
        overview.routed_claims_table("core", "ac-vision"),
        overview.routed_claims_table("core", "ac-language"),
        overview.accuracy_table("core", "ac-vision"),
        overview.crossed_table("core"),
    ):
        assert as_html(table).data == "<p>None in this profile.</p>"
    assert overview.provenance_table("core").loc["commits", "value"] == "-"
    assert selection.find_verdicts("core") == []


# -------------------------------------------------------------------------------------------- README


def test_markdown():
    table = pd.DataFrame({"|cos| weights": ["0.1", "a | b"], "seeds": ["3", "4"]}, index=["x", "y"])
    lines = markdown(table.rename_axis("arm")).split("\n")
    assert lines[:2] == ["| arm | \\|cos\\| weights | seeds |", "| --- | --- | --- |"]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert [cell.strip() for cell in cells[3]] == ["y", "a \\| b", "4"]


README = f"# Title\n\nBefore.\n\n{readme.BEGIN}\nold\n{readme.END}\n\nAfter.\n"


@pytest.mark.slow
def test_readme_is_rewritten_between_its_markers(core):
    path, page = core / "README.md", core / "RESULTS.md"
    path.write_text(README)
    assert readme.update_readme(path) == 0
    first, results = path.read_text(), page.read_text()
    assert first.startswith(f"# Title\n\nBefore.\n\n{readme.BEGIN}\n")
    assert first.endswith(f"{readme.END}\n\nAfter.\n")
    assert "\nold\n" not in first
    assert "Of 4 verdicts: 4 pilot." in results
    assert "![Every arm of every setting" in first
    assert (core / readme.README_PICTURE).exists()
    assert (core / "benchmarks" / "RESULTS.md").read_text().startswith("# Speed and memory")
    total = len(study.runs("core"))
    assert f"12 of {total} planned runs finished, tuning included, 18 core-minutes on Some CPU." in results
    verdict = "| FashionMNIST (CNN) | more accurate | base: published baseline and fair control | pilot |"
    assert (
        f"{verdict} +1.67 points | [+0.23, +3.10] | +0.28 points | 0.2500 | 1.0000 | 3 (pilot) |" in results
    )
    assert "| snnl | 92.67 ± 1.15 (3) |" in results
    assert "| snnl | FashionMNIST | 91.33 | 91.00 | 91.61 | 92.67 | +0.28 | +1.67 |" in results

    assert readme.update_readme(path) == 0
    assert (path.read_text(), page.read_text()) == (first, results)
    assert readme.update_readme(path, check=True) == 0


def test_answers_name_what_is_decided_and_leave_pilots_out(folders):
    """Ten pairs one point apart decide; three do not."""
    for arm, accuracy in (("base", 0.80), ("snnl", 0.82), ("dense", 0.85), ("dense-snnl", 0.86)):
        for place, run in enumerate(study.runs("core", "snnl", "cifar100", arm)):
            value = accuracy + 0.001 * (place % 2) * (arm == "snnl")
            store.write_run(run.path, made_up(run, value, num_classes=100))
    for arm in ("base", "snnl"):
        for run in study.runs("core", "snnl", "fashion_mnist", arm)[:3]:
            store.write_run(run.path, made_up(run))
    found = selection.find_verdicts("core")
    text = answers(found)
    assert (
        "**Does SNNL make a model more accurate?** In 1 of 1 settings: more accurate by 2.0 points on "
        "CIFAR-100 (CNN) (models: " in text
    )
    assert "CNN, 4 experts of width 512, 8 epochs" in first_screen.scope(found)
    assert "FashionMNIST" not in text
    assert "points of accuracy: CIFAR-100 (CNN) -5.00 [-5.00, -5.00]." in notes(
        found
    )  # minus a dense network
    assert answers([]) == notes([]) == ""


def against_blind_routing(hash_of_domains, study_name="ac-vision-confirm", spread=0.001, **arms_of):
    draw = np.random.default_rng(0)
    arms_of = {"hash": hash_of_domains, "linear": 0.8, "cosine": 0.8, "ac": 0.8} | arms_of
    results = [
        routed(run, mean + spread * draw.normal())
        for arm, mean in arms_of.items()
        for run in study.runs("core", study_name, "cifar10" if study_name == "ac-vision" else None, arm=arm)
    ]
    return verdicts.verdicts(results, study_name)


def test_answers_say_what_ac_gains_where_routing_pays():
    text = answers(against_blind_routing(0.6))
    assert re.search(
        r"\*\*Does the AC router help\?\*\* No gain is shown. Where it can be judged: on Three shifted "
        r"domains \S+ \[\S+, \S+\] points against the linear router and \S+ \[\S+, \S+\] points",
        text,
    )
    assert "Not judged" not in text
    text = answers(against_blind_routing(0.6, ac=0.9))
    assert "**Does the AC router help?** Yes, on Three shifted domains. Where it can be judged" in text


def test_answers_name_where_ac_is_not_judged():
    text = answers(against_blind_routing(0.9, "ac-vision"))
    assert (
        "Not judged on CIFAR-10 (ViT) (exploratory), where learned routing is not shown to beat every" in text
    )
    assert "that learns nothing; in the runs that count no difference is seen there either." in text
    assert "Where it can be judged" not in text


@pytest.mark.parametrize(
    ("blind", "said"),
    [
        (0.6, "Yes. Of 1 comparisons with routing that learns nothing, it is better in 1 ("),
        (0.9, "No. Of 1 comparisons with routing that learns nothing, it is worse in 1 ("),
        (0.8, "No. Of 1 comparisons with routing that learns nothing, it is unclear in 1 ("),
    ],
)
def test_answers_say_whether_learned_routing_pays(blind, said):
    assert f"**Does learned routing pay?** {said}" in answers(against_blind_routing(blind, spread=0.003))


def test_answers_name_the_controls_that_learned_routing_beats():
    results = [
        routed(run, mean + 0.001 * (run.seed % 7))
        for arm, mean in {"hash": 0.6, "hash-token": 0.9, "linear": 0.8}.items()
        for run in study.runs("core", "ac-language-confirm", arm=arm)
    ]
    found = verdicts.verdicts(results, "ac-language-confirm")
    text = answers(found)
    assert "Of 2 comparisons with routing that learns nothing, it is better in 1 and worse in 1 (" in text
    sides = ["fixed random experts per position", "fixed random experts per byte"]
    known = "It is sometimes better than {}, never than {}."
    assert known.format(*sides) in text or known.format(*reversed(sides)) in text
    assert {v.where for v in found} == {"in the last of 3 mixtures"}
    shown = words.table(found)["against"].tolist()
    assert "hash-token: learns no routing, by byte, in the last of 3 mixtures" in shown


def collapse_results(**others):
    """SNNL five points above base; more experts in use, and more with the balance loss."""
    effective = {"base": 3.0, "snnl": 3.7, "base-balance": 3.95}
    for arm, accuracy in ({"base": 0.60, "snnl": 0.649} | others).items():
        for run in study.runs("core", "collapse", arm=arm):
            wave = 0.001 * (run.seed % 7 + run.seed % 3 * (arm == "snnl"))
            result = made_up(run, accuracy + wave)
            result["routing"]["load"]["effective_experts"] = effective.get(arm, 4.0) + wave
            result["routing"]["entropy"]["marginal"] = 1.0
            alike = {"outputs_weighted": 0.4, "cka_weighted": 0.1} if arm == "snnl" else {}
            result["similarity"] |= {k: v + wave for k, v in alike.items()}
            result["task"]["cross_entropy"] = 1 - accuracy + wave
            yield run, result


def test_answers_say_what_routing_is_worth_without_snnl_and_with_it():
    arms_of = {"uniform-gate": 0.64, "uniform-snnl": 0.66}
    text = answers(verdicts.verdicts([r for _, r in collapse_results(**arms_of)], "collapse"))
    assert "In 1 of 1 settings: more accurate by 5.0 points on Three domains (models: MLP" in text
    assert (
        "Three domains: without SNNL, learned routing loses 4.0 points against a constant gate; with SNNL on "
        "both sides it loses 1.0 points." in text
    )


def test_answers_name_the_constant_gate_that_beats_snnl_by_cross_entropy(folders):
    arms_of = dict.fromkeys(("uniform-gate", "uniform-snnl", "dense", "dense-snnl", "snnl-shuffled"), 0.7)
    arms_of |= {"base-balance": 0.62, "snnl-weaker": 0.63}
    for run, result in collapse_results(**arms_of):
        store.write_run(run.path, result)
    found = selection.find_verdicts("core")
    assert (
        "By cross-entropy, not declared beforehand, SNNL is better than the plain MoE on Three domains; a "
        "constant gate without SNNL is better than SNNL on Three domains." in answers(found)
    )
    text = answers(found) + notes(found)
    assert "Pilots, whose runs do not count here, chose Three domains, because a learned gate cost" in text
    assert "SNNL minus the load-balancing loss, points of accuracy: Three domains +3" in text
    assert "The usual load-balancing loss spreads the work still more, with less accuracy." in text
    assert "experts become more alike on Three domains; by the CKA of outputs, less alike." in text


def test_notes_name_the_claims_that_could_not_be_tested():
    results = some_results({arm: [0.9 + 0.001 * i for i in range(10)] for arm in ("base", "snnl")})
    assert (
        "Could not be tested: experts' weights more orthogonal (FashionMNIST (CNN) (exploratory): there is "
        "no such collapse to resolve); routing more flexible (FashionMNIST (CNN) (exploratory): no gate that "
        "learns nothing was run on these seeds)." in notes(verdicts.verdicts(results, "snnl"))
    )


def test_notes_say_what_the_correction_for_our_own_claims_takes_back():
    """Nine seeds of ten gain: p is 0.03 alone, and twice that beside a claim of our own."""
    flat = [0.9 + 0.001 * i for i in range(10)]
    gain = [0.0028, 0.0031, 0.0029, 0.0033, 0.0030, 0.0027, 0.0034, 0.0032, -0.0056, 0.0026]
    snnl = [a + b for a, b in zip(flat, gain, strict=True)]
    accuracies = {"base": flat, "snnl": snnl, "dense": flat[::-1]}
    results = [
        made_up(run, accuracy, num_classes=100)
        for arm, own in accuracies.items()
        for run, accuracy in zip(study.runs("core", "snnl", "cifar100", arm), own, strict=True)
    ]
    found = verdicts.verdicts(results, "snnl")
    (unit,) = [v for v in found if v.claim.key == "snnl-accuracy"]
    assert unit.p <= 0.05 < unit.p_holm
    said = f"would be significant on CIFAR-100 (CNN) (p {unit.p:.3f} instead of {unit.p_holm:.3f})."
    assert said in notes(found)


def test_side_by_side_is_what_the_files_say(core):
    """Means, the paired gain and experts in use, by hand; arms and settings without runs are left out."""
    table = side_by_side.table("core", side_by_side.SNNL)
    (setting, row), *others = table.iterrows()
    assert (setting, others) == ("FashionMNIST (CNN) (exploratory)", [])
    assert row.to_dict() == {
        "MoE": "91.0", "MoE + SNNL": "92.7", "gain [95 %]": "+1.67 [+0.23, +3.10]", "dense": "80.0",
        "dense + SNNL": "81.0", "effective experts, without → with": "3.5 → 3.5 of 4",
    }  # fmt: skip
    assert side_by_side.table("core", side_by_side.AC).empty
    found = side_by_side.both_scores("core").loc["FashionMNIST (CNN)"]
    assert found.loc[("accuracy (points)", "snnl - base"), "difference"] == "+1.67"
    figure = side_by_side.effects("core")
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["FashionMNIST (CNN)\n(exploratory)"]
    points = {
        line.get_label(): line.get_xdata()[0] for line in axis.lines if not line.get_label().startswith("_")
    }
    assert points == pytest.approx({"MoE + SNNL": 5 / 3, "dense": -11.0, "dense + SNNL": -10.0})
    check_drawn(figure, "effects")


@pytest.mark.slow
def test_readme_check_sees_a_stale_table_and_changes_nothing(core, capsys):
    path = core / "README.md"
    path.write_text(README)
    readme.update_readme(path)
    current = path.read_text()
    run = planned("snnl", 42)
    store.write_run(run.path, made_up(run, accuracy=0.95))
    assert readme.update_readme(path, check=True) == 1
    assert "out of date: run `make readme`" in capsys.readouterr().err
    assert path.read_text() == current
    readme.update_readme(path)
    assert readme.update_readme(path, check=True) == 0


def test_readme_before_any_run(folders):
    path = folders / "README.md"
    path.write_text(README)
    readme.update_readme(path)
    assert f"{readme.BEGIN}\nNo finished runs yet.\n{readme.END}" in path.read_text()


@pytest.mark.parametrize("text", ["# No markers\n", README + README, README.replace(readme.END, "")])
def test_readme_without_its_markers_is_refused(text, core):
    path = core / "README.md"
    path.write_text(text)
    with pytest.raises(store.StoreError, match="results: begin"):
        readme.update_readme(path)
    assert path.read_text() == text


@pytest.mark.slow
def test_readme_of_the_project_shows_the_committed_results(monkeypatch):
    monkeypatch.delenv("MOE_RESULTS_DIR", raising=False)
    if not (ROOT / "README.md").exists():
        pytest.skip("no README.md yet")
    assert readme.update_readme(ROOT / "README.md", check=True) == 0


# ---------------------------------------------------------------------------------------------- HTML

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def test_report_is_one_page_that_needs_nothing_else(tmp_path, core):
    new = nbformat.v4
    picture = {"image/png": base64.b64encode(PNG).decode(), "text/plain": "<Image>"}
    about = {"figure": "a", "caption": "What <b> shows", "sources": [{"file": "planted/trust.json"}]}
    shown = {"image/png": {"width": 7, "height": 5}, "moe_study": about}
    notebook = new.new_notebook(
        cells=[
            new.new_markdown_cell("# The title of it\n\nWords with *stress*, $x$ and {braces}."),
            new.new_code_cell("secret_source()", execution_count=1),
            new.new_code_cell(
                "notebook.show()",
                execution_count=2,
                outputs=[
                    new.new_output("display_data", picture, metadata=shown),
                    new.new_output(
                        "display_data", {"text/plain": "below"}, metadata={"moe_study": {"caption_of": "a"}}
                    ),
                ],
            ),
            new.new_code_cell(
                "as_html(table)",
                execution_count=3,
                outputs=[
                    new.new_output(
                        "execute_result",
                        {"text/html": as_html(overview.accuracy_table("core")).data, "text/plain": "x"},
                        execution_count=3,
                    )
                ],
            ),
        ]
    )
    source, target = tmp_path / "in.ipynb", tmp_path / "pages" / "report.html"
    nbformat.write(notebook, source)
    render(source, target)

    page = target.read_text()
    assert [p.name for p in target.parent.iterdir()] == ["report.html"]
    assert target.stat().st_size < 8_000_000
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<html") == page.count("</html>") == page.count("<main>") == 1
    assert "<title>The title of it</title>" in page
    viewport = BeautifulSoup(page, "html.parser").find("meta", attrs={"name": "viewport"})
    assert viewport["content"] == "width=device-width, initial-scale=1"
    assert "<script" not in page
    assert "secret_source" not in page
    assert "Words with <em>stress</em>" in page
    assert "{braces}" in page
    assert "92.67 ± 1.15 (3)" in page
    assert "<figcaption><b>Figure 1.</b> What &lt;b&gt; shows" in page
    assert "figures/a.png, from results/planted/trust.json" in page
    assert "<code>python -m moe_study trust</code>" in page
    assert "below" not in page
    assert 'alt="What &lt;b&gt; shows"' in page
    assert page.count("<img") == page.count("<figure") == 1
    assert "--width: 7px" in page
    assert "In&nbsp;[" not in page
    assert "Out[" not in page

    used = re.findall(r"""(?:src|href|srcset|data|poster)\s*=\s*["']?([^"'\s>]+)""", page)
    used += re.findall(r"""url\(\s*["']?([^"')]+)""", page)
    outside = [name for name in used if not name.startswith(("data:", "#"))]
    assert outside == []
    assert any(name.startswith("data:image/png;base64,") for name in used)
    assert "@import" not in page


def of_runs(study: str, dataset: str, *arms: str) -> dict:
    return {"profile": "core", "study": study, "dataset": dataset, "arms": list(arms), "runs": 3}


@pytest.mark.parametrize(
    ("sources", "shown", "commands"),
    [
        ([], "computed in this notebook", []),
        (
            [{"file": "planted/verdicts.json"}],
            "results/planted/verdicts.json",
            ["python -m moe_study rates"],
        ),
        (
            [of_runs("snnl", "cifar10", "raw")],
            "results/core/snnl/cifar10/raw-s[0-9]*.json (3 files)",
            [
                "python -m moe_study run --profile core --study snnl --dataset cifar10",
                "make render PROFILE=core",
            ],
        ),
        (
            [of_runs("snnl", "cifar10", "base", "raw"), of_runs("snnl", "mnist", "base")],
            "results/core/snnl/**/*.json (6 files)",
            ["python -m moe_study run --profile core --study snnl", "make render PROFILE=core"],
        ),
        (
            [of_runs("snnl", "cifar10", "base"), of_runs("crossed", "cifar10", "ac")],
            "results/core/**/*.json (6 files)",
            ["python -m moe_study run --profile core --dataset cifar10", "make render PROFILE=core"],
        ),
    ],
)
def test_sources_of_a_figure_and_the_commands_that_make_them(sources, shown, commands):
    assert provenance.in_words(sources) == shown
    assert provenance.commands(sources) == commands


def test_contents_list_every_heading_once(tmp_path):
    new = nbformat.v4
    shown = new.new_output(
        "display_data", {"text/markdown": "### Same\n\n#### Same\n\n### A & `b`", "text/plain": ""}
    )
    cells = [
        new.new_markdown_cell("# T\n\nIntroduction."),
        new.new_markdown_cell("## Same\n\nwords\n\n### Same"),
        new.new_code_cell("display()", execution_count=1, outputs=[shown]),
        new.new_markdown_cell("## Last: *one*?"),
    ]
    source, target = tmp_path / "in.ipynb", tmp_path / "out.html"
    nbformat.write(new.new_notebook(cells=cells), source)
    render(source, target)
    page = target.read_text()
    names = re.findall(r'<h[234] id="([^"]+)"', page)
    assert names == ["same", "same--2", "same--3", "same--4", "a-b", "last-one"]
    assert re.findall('href="#([^"]+)"', page) == [name for name in names if name != "same--4"]
    assert page.index("<nav") < page.index("Introduction.") < page.index('<h2 id="same"')
    assert page.count("<ul>") == page.count("</ul>") == 2  # the list, and the one below its first entry
    assert page.count('<details class="part">') == 3  # every part folds, with what belongs to it


def test_long_cells_may_be_broken_and_tables_scroll(tmp_path):
    table = as_html(pd.DataFrame({"x": ["short", "long " * 8, "word " * 20]}, index=[1, 2, 3])).data
    shown = nbformat.v4.new_output("display_data", {"text/html": table, "text/plain": ""})
    cells = [
        nbformat.v4.new_markdown_cell("# T\n\n| a | b |\n| --- | --- |\n| 1 | `code` |"),
        nbformat.v4.new_code_cell("display()", execution_count=1, outputs=[shown]),
    ]
    source, target = tmp_path / "in.ipynb", tmp_path / "out.html"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), source)
    render(source, target)
    page = target.read_text()
    assert page.count('<div class="scroll" tabindex="0"><table') == page.count("</table></div>") == 2
    assert page.count('<td class="wrap">long') == page.count('<td class="long">word') == 1
    assert "<td>short</td>" in page
    assert "<td><code>code</code></td>" in page


def test_a_section_tagged_fold_is_folded_to_its_end(tmp_path):
    new = nbformat.v4
    cells = [
        new.new_markdown_cell("# T"),
        new.new_markdown_cell("## Aside\n\nhidden words", metadata={"tags": ["fold"]}),
        new.new_markdown_cell("### Part\n\nmore"),
        new.new_markdown_cell("## Open\n\nshown words"),
    ]
    source, target = tmp_path / "in.ipynb", tmp_path / "out.html"
    nbformat.write(new.new_notebook(cells=cells), source)
    render(source, target)
    soup = BeautifulSoup(target.read_text(), "html.parser")
    (section,) = soup.find_all("details", class_="section")
    assert section.summary.h2["id"] == "aside"
    assert "hidden words" in section.get_text()
    assert "more" in section.find("details", class_="part").get_text()
    assert "shown words" not in section.get_text()


def test_names_are_escaped_on_the_first_screen(core, monkeypatch):
    found = [replace(verdict, scope="<b>bold</b> & small") for verdict in selection.find_verdicts("core")]
    monkeypatch.setattr(first_screen, "GLOSSARY", {"<i>": "<u>"})
    monkeypatch.setattr(first_screen, "scope", lambda found: found[0].scope)
    drawn = first_screen.first_screen(found)
    assert "&lt;b&gt;bold" in drawn
    assert not {"<b>", "<i>", "<u>"} & set(re.findall("<[a-z]+>", drawn))


def test_what_happened_is_told_in_words(folders):
    """Of runs that decide nothing: levels, difference, interval, seeds; and where the answer is."""
    for arm, accuracy in (("base", 0.90), ("snnl", 0.92)):
        for place, run in enumerate(study.runs("digits", "snnl", "digits", arm)[:3]):
            store.write_run(run.path, made_up(run, accuracy + 0.01 * place))
    text = overview.happened("digits")
    assert (
        "accuracy: SNNL-MoE 93.00 %, plain MoE 91.00 %; difference +2.00 [+2.00, +2.00] points on 3 seeds, "
        "SNNL-MoE is higher, and the seeds are too few to decide." in text
    )
    assert "results/core/report.html" in text


def test_partners_know_arms_of_ones_own(core):
    runs = frame_of(
        [*some_results(), *({**r, "run": r["run"] | {"arm": "mine"}} for r in some_results()[:3])]
    )
    pairs = tables.partners(runs)
    assert ("snnl", "base") in pairs
    assert ("mine", "base") in pairs


# ----------------------------------------------------------------------------------------------- plots

FIGURES = {
    name: function
    for module in (plots, snnl_plots, routed_plots)
    for name, function in inspect.getmembers(module, inspect.isfunction)
}
SITUATIONS = {
    "one run of one epoch": ({"base": (0.9,)}, {"epochs": 1}),
    "100 classes": (ACCURACIES, {"num_classes": 100}),
    "no mixture": ({"dense": (0.9,)}, {}),
    "every arm": (
        {run.arm: (0.9, 0.91, 0.92) for run in study.runs("core", "snnl", "fashion_mnist")},
        {},
    ),
}


SNNL_FIGURES = (
    "training_curves",
    "accuracy_by_arm",
    "tsne_panels",
    "routing_heatmap",
    "similarity_with_nulls",
    "collapse_panel",
)
ROUTED_FIGURES = [  # name, study, further arguments
    ("training_curves", "ac-vision", ()),
    ("accuracy_by_arm", "ac-vision", ()),
    ("corruption_by_severity", "ac-vision", ()),
    ("corruption_by_severity", "crossed", ()),
    ("swap_curve", "ac-language", ()),
    ("changed_choices", "ac-language", ()),
    ("expert_load", "ac-language", ()),
    ("paired_differences", "ac-vision", ("ac-vision",)),
    ("paired_differences", "ac-language", ("ac-language",)),
    ("crossed_lines", "crossed", ()),
]
ROUTED_SITUATIONS = {
    "several seeds": {},
    "one run of one epoch": {"values": {"ac": (0.9,)}, "epochs": 1},
}


def test_trust_grid_marks_every_score(folders):
    scores = pd.DataFrame(0.0, index=["a", "b", trust.TRUTH], columns=list(trust.LADDERS))
    scores.loc["b", ["noise", "collapse", "blind", "split", "alike"]] = 1, 0.9, 0.65, -0.3, -0.31
    scores.loc[trust.TRUTH] = 1
    figure = trust_plots.trust_grid(scores)
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["b", "a", trust.TRUTH]
    marks = [text.get_text() for text in axis.texts]
    assert marks[:7] == ["✓", "✓", "~", "–", "✗", "–", "–"]
    assert marks[7:] == ["–"] * 7 + ["✓"] * 7
    check_drawn(figure, "trust_grid")


def test_collapse_panel_shows_values_beside_their_nulls():
    """exp(1.3) effective experts of four; answers as alike as 0.1, alone 0.4; 0.3 lost of 3/4 (0.9 - 0.1)."""
    routing, representational, degrees = snnl_plots.collapse_panel(some_results({"base": (0.9,)})).axes
    expected = 1 - (np.exp(1.3) - 1) / 3
    np.testing.assert_allclose(routing.lines[0].get_ydata(), expected)
    np.testing.assert_allclose(representational.lines[0].get_ydata(), [0.6, 0.5, 0.4])
    drawn = [line.get_xdata() for line in degrees.lines]
    np.testing.assert_allclose(drawn[1::3], np.array([drawn[::3], drawn[2::3]])[..., 0].T)
    shown = [line[0] for at, line in enumerate(drawn) if at % 3 != 1]
    nulls = [1 - (np.exp(1.38) - 1) / 3, 0.4, 1]
    np.testing.assert_allclose(shown[::2], [expected, 0.1, 0.5])
    np.testing.assert_allclose(shown[1::2], nulls, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", SNNL_FIGURES)
def test_every_figure_can_be_drawn(name, situation, folders):
    accuracies, options = SITUATIONS[situation]
    check_drawn(FIGURES[name](some_results(accuracies, **options)), name)


@pytest.mark.slow
@pytest.mark.parametrize("situation", ROUTED_SITUATIONS)
@pytest.mark.parametrize(("name", "study_name", "more"), ROUTED_FIGURES)
def test_every_routed_figure_can_be_drawn(name, study_name, more, situation, folders):
    check_drawn(FIGURES[name](routed_results(study_name, **ROUTED_SITUATIONS[situation]), *more), name)


def check_drawn(figure: Figure, name: str) -> None:
    """Drawn and saved for real: a warning of the layout would be an error."""
    assert isinstance(figure, Figure)
    assert any(axis.has_data() or axis.texts for axis in figure.axes)
    plots.save(figure, name)
    assert plots.target(name).stat().st_size > 3000


def test_figures_leave_the_style_of_others_alone(folders):
    before = dict(mpl.rcParams)
    plots.save(plots.accuracy_by_arm(some_results()), "x")
    assert dict(mpl.rcParams) == before


def test_figures_are_the_same_bytes_each_time(folders):
    for name in ("a", "b"):
        plots.save(plots.training_curves(some_results()), name)
    assert plots.target("a").read_bytes() == plots.target("b").read_bytes()


def test_curves_are_means_over_seeds():
    figure = plots.training_curves(some_results({"base": (0.90, 0.91, 0.95)}))
    cross_entropy, accuracy, information = figure.axes
    assert cross_entropy.lines[0].get_xdata().tolist() == [1, 2, 3]
    np.testing.assert_allclose(cross_entropy.lines[0].get_ydata(), [1, 1 / 2, 1 / 3])
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [72, 82, 92])
    np.testing.assert_allclose(information.lines[0].get_ydata(), [0, 0.2, 0.4], atol=1e-12)
    band = accuracy.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((70, 95))


def test_an_arm_of_ones_own_has_a_colour_and_a_row():
    results = some_results({"snnl": (0.90, 0.91, 0.95), "base": (0.90, 0.91, 0.92)})
    for result in results[:3]:
        result["run"] |= {"arm": "mine"}
    (legend,) = plots.training_curves(results).legends
    assert [text.get_text() for text in legend.get_texts()] == ["base", "mine"]
    rows = [label.get_text() for label in plots.accuracy_by_arm(results).axes[0].get_yticklabels()]
    assert rows == ["base (3)", "mine (3)"]
    assert plots.arm_style("mine") == plots.arm_style("mine")
    known = {to_hex(colour) for colour, _ in plots.ARM_STYLE.values()}
    assert not known & {to_hex(colour) for colour in plots.OWN_COLOURS}


def test_accuracy_names_arms_and_their_seeds():
    axis = plots.accuracy_by_arm(some_results()).axes[0]
    labels = [tick.get_text() for tick in axis.get_yticklabels()]
    assert labels == ["base (3)", "snnl (3)", "dense (3)", "dense-snnl (3)"]
    dots, interval, mean = axis.lines[:3]
    np.testing.assert_allclose(dots.get_xdata(), [90, 91, 92])
    np.testing.assert_allclose(mean.get_xdata(), 91)
    np.testing.assert_allclose(interval.get_xdata(), [91 - 4.302653 / 3**0.5, 91 + 4.302653 / 3**0.5])


def spoiled(effective: tuple[float, ...], **options: object) -> list[dict]:
    """Runs of both arms, with these effective experts by seed."""
    results = some_results({"base": (0.9,) * len(effective), "snnl": (0.9,) * len(effective)}, **options)
    for result, value in zip(results, effective * 2, strict=True):
        result["routing"]["load"] = result["routing"]["load"] | {"effective_experts": value}
    return results


@pytest.mark.parametrize("num_classes", [10, 100])
def test_heatmap_shows_the_median_seed_by_preferred_expert(num_classes):
    results = spoiled((1.0, 3.0, 2.0), num_classes=num_classes)
    axes = snnl_plots.routing_heatmap(results).axes
    axis = axes[0]
    shown = np.asarray(axis.images[0].get_array())
    gates = np.array(results[2]["routing"]["class_expert"])
    assert axis.get_title() == f"base, seed {arms.SEEDS[2]}: 2.00 effective experts"
    assert shown.shape == (num_classes, 4)
    assert sorted(map(sorted, shown.tolist())) == sorted(map(sorted, gates.tolist()))
    assert all(a <= b for a, b in pairwise(shown.argmax(1)))
    labels = [tick.get_text() for tick in axis.get_yticklabels()]
    if num_classes == 10:  # every row has the number of its class, and its name
        assert "0 T-shirt/top" in labels
        rows = gates[[int(label.split()[0]) for label in labels]]
        np.testing.assert_array_equal(np.sort(rows, axis=1), np.sort(shown, axis=1))
    else:
        assert labels == []
    assert [a.get_title() for a in axes if a.get_title() in ("1.0", "2.0", "3.0")] == [
        "1.0",
        "3.0",
        "2.0",
    ] * 2


def test_heatmaps_match_the_experts_of_the_other_arm():
    """The same gate with its experts renamed is drawn the same."""
    results = spoiled((2.0,))
    gates = np.array(results[0]["routing"]["class_expert"])
    results[1]["routing"]["class_expert"] = gates[:, [2, 0, 3, 1]].tolist()
    base, snnl = (a for a in snnl_plots.routing_heatmap(results).axes if "effective" in a.get_title())
    np.testing.assert_array_equal(*(np.asarray(a.images[0].get_array()) for a in (base, snnl)))


def test_codes_of_an_arm_stand_in_a_row():
    figure = snnl_plots.tsne_panels(some_results({"base": (0.9, 0.8), "snnl": (0.9, 0.8)}))
    moments = ("before training", "after training")
    titles = [f"{arm}, {moment}" for arm in ("base", "snnl") for moment in moments]
    assert [axis.get_title() for axis in figure.axes] == titles
    said = f"`base` seed {arms.SEEDS[0]} with 3.50 effective experts (median over seeds 3.50)"
    assert said in figure.get_label()


@pytest.mark.parametrize(
    ("num_classes", "title"), [(10, "the same, by expert"), (100, "all images, by expert")]
)
def test_codes_are_coloured_by_expert_and_numbered_as_in_the_heat_map(num_classes, title):
    """The first column of the heat map is expert 2's, and its points have the first colour."""
    results = some_results({"base": (0.9,)}, num_classes=num_classes)
    results[0]["routing"]["class_expert"] = [[0.2, 0.3, 0.4, 0.1]] * num_classes
    points = np.array(results[0]["tsne"]["after"])
    experts = results[0]["tsne"]["experts"] = [i % 3 for i in range(len(points))]
    figure = snnl_plots.tsne_panels(results)
    assert "by the expert" in figure.get_label()
    [axis] = [axis for axis in figure.axes if axis.get_title() == title]
    assert [line.get_label() for line in axis.lines] == ["expert 1", "expert 2", "expert 3"]
    for line, e in zip(axis.lines, (2, 1, 0), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), points[np.array(experts) == e])


@pytest.mark.parametrize(
    "names", [arms.ARM_DESCRIPTIONS, arms.ROUTED_ARM_DESCRIPTIONS, arms.CROSSED_ARM_DESCRIPTIONS]
)
def test_arms_of_a_study_are_told_apart(names):
    colours = {to_hex(plots.ARM_STYLE[name][0]).lower() for name in names}
    assert len(colours) == len(names)


def test_two_seeds_have_no_interval_and_no_band():
    """Two seeds as dots and their mean; the caption says why there is no interval."""
    two = some_results({"base": (0.9, 0.5)})
    dots, interval, _ = plots.accuracy_by_arm(two).axes[0].lines
    np.testing.assert_allclose(dots.get_xdata(), [90, 50])
    np.testing.assert_allclose(interval.get_xdata(), [70, 70])
    assert not any(axis.collections for axis in plots.training_curves(two).axes)
    pair = {"linear": (0.8, 0.7), "ac": (0.9, 0.5)}
    corrupted = routed_plots.corruption_by_severity(routed_results("ac-vision", pair))
    assert not any(axis.collections for axis in corrupted.axes)
    crossed = dict.fromkeys(arms.CROSSED_ARMS, (0.8, 0.5))
    lines = routed_plots.crossed_lines(routed_results("crossed", crossed))
    assert len(lines.axes[0].lines) == 2 * 3  # dots at both ends and one line, without and with SNNL
    for figure in (plots.accuracy_by_arm(two), corrupted, lines):
        assert "(no interval below 3 seeds)" in figure.get_label()
    assert "(no band below 3 seeds)" in plots.training_curves(two).get_label()
    assert "no interval" not in plots.accuracy_by_arm(some_results()).get_label()


def test_differences_are_drawn_pair_by_pair():
    """ac - cosine in accuracy: 4, 2, 4 points."""
    figure = routed_plots.paired_differences(routed_results("ac-vision"), "ac-vision")
    (axis,) = [axis for axis in figure.axes if axis.get_title() == "performs better:\naccuracy"]
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert labels == [f"ac - {control}" for control in AC_CONTROLS]
    dots, interval, mean = axis.lines[3:6]  # of the second pair
    np.testing.assert_allclose(sorted(dots.get_xdata()), [2, 4, 4])
    np.testing.assert_allclose(dots.get_ydata(), 1)
    np.testing.assert_allclose(mean.get_xdata(), 10 / 3)
    half = 4.302653 * np.std([4, 2, 4], ddof=1) / 3**0.5
    np.testing.assert_allclose(interval.get_xdata(), [10 / 3 - half, 10 / 3 + half], rtol=1e-6)
    assert axis.get_xlabel() == "points"
    shaded = axis.patches[0].get_extents().transformed(axis.transData.inverted())
    assert shaded.x0 == pytest.approx(0, abs=1e-9)
    assert shaded.x1 > 4


def test_pairs_that_no_two_seeds_have_are_left_out():
    results = routed_results("ac-vision", {"ac": (0.9, 0.8), "cosine": (0.8, 0.8), "linear": (0.7,)})
    figure = routed_plots.paired_differences(results, "ac-vision")
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["ac - cosine"]


def test_swap_curve_counts_from_the_clean_text():
    left, right = routed_plots.swap_curve(routed_results("ac-language", {"ac": (0.5, 0.7)})).axes
    np.testing.assert_allclose(left.lines[0].get_xdata(), [0, 1.5, 2.5, 5, 10])
    np.testing.assert_allclose(left.lines[0].get_ydata(), 0.6 * np.array([0, 0.01, 0.02, 0.03, 0.06]))
    np.testing.assert_allclose(right.lines[0].get_ydata(), [0, 0.01, 0.02, 0.03, 0.06], atol=1e-12)


def test_corruption_is_drawn_against_the_baseline():
    """`routed` loses 10 points a severity in every arm, so the differences are those of clean accuracy."""
    results = routed_results("ac-vision")
    for result in results:
        if result["run"]["arm"] == "cosine":
            result["run"]["arm"] = "dense"  # which comes first in figures
    figure = routed_plots.corruption_by_severity(results)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == ["noise", "blur", "contrast", "jpeg"]
    by_arm = {arm: [r["corruption"] for r in results if r["run"]["arm"] == arm] for arm in ("linear", "ac")}
    expected = np.mean([a["clean"] - b["clean"] for a, b in zip(by_arm["ac"], by_arm["linear"], strict=True)])
    (line,) = [line for line in shown[0].lines if line.get_label() == "ac"]
    assert line.get_ydata()[0] == pytest.approx(100 * expected)
    assert line.get_xdata().tolist() == [0, 1, 2, 3, 4, 5]
    assert (
        "Severity 0 is the accuracy on the 1,024 test images that were then corrupted, at the last epoch"
        in (figure.get_label())
    )
    for result in results:
        del result["run"]["corrupted_images"], result["primary_endpoint"]
    older = routed_plots.corruption_by_severity(results).get_label()
    assert "1,024 test images that were then corrupted, at the epoch of the lowest validation" in older


def test_load_is_ordered_in_each_run_before_it_is_averaged():
    results = routed_results("ac-vision", {"cosine": (0.8, 0.8)})
    shares = [0.7, 0.3] + [0.0] * 14
    for result, share in zip(results, (shares, shares[::-1]), strict=True):
        result["routing"]["layers"][0]["load"] = {"share": share}
    line, even = routed_plots.expert_load(results).axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), 100 * np.array(shares))
    np.testing.assert_allclose(even.get_ydata(), 100 / 16)
    results = routed_results("ac-vision", {"linear": (0.8,), "hash": (0.8,), "ac": (0.8,)})
    (dense,) = (result for result in results if result["run"]["arm"] == "ac")
    dense["run"]["arm"] = "dense"
    for layer in dense["routing"]["layers"]:
        layer["load"]["share"] = [1.0]
    dense["history"]["validation"]["effective_experts"] = [1.0] * 3
    legend = routed_plots.expert_load(results).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["linear", "hash"]
    *_, accuracy, effective = plots.training_curves(results).axes
    assert (len(accuracy.lines), len(effective.lines)) == (3, 2)


def test_summary_of_one_seed_has_no_deviation():
    table = tables.summary(frame_of(some_results({"base": (0.9,)})), ["accuracy"])
    assert table.loc["base"].to_dict() == {"seeds": "1", "accuracy (%)": "90.00"}


def test_similarity_nulls():
    table = tables.similarity_nulls(some_results(), ["base", "dense", "raw"])  # no result of raw
    floor = (2 / (np.pi * 1000)) ** 0.5
    kinds = ["trained together", "before training", "null: trained alone", "floor sqrt(2 / (pi P))"]
    assert table.index.tolist() == [(arm, kind) for arm in ("base", "dense") for kind in kinds]
    column = table.loc["base", "|cos| weights"]
    assert column.tolist() == ["0.1000 ± 0.0000", "0.0500 ± 0.0000", "0.4000 ± 0.0000", f"{floor:.4f}"]
    assert table.loc[("base", kinds[3])].tolist()[1:] == ["-", "-", "-"]
    assert table.loc[("dense", kinds[0])].tolist() == ["-"] * 4


@pytest.mark.parametrize(
    ("curve", "level", "epoch"),
    [([3, 2, 1], 2, 2), ([3, 2, 1], 2.5, 2), ([3, 2, 1], 0.5, np.inf), ([1, 2], 1, 1), ([3, 1, 2], 1.5, 2)],
)
def test_epochs_until(curve, level, epoch):
    assert tables.epochs_until(curve, level) == epoch


AC_CONTROLS = ("linear", "cosine", "ac-shuffled", "ac-pooled", "ac-matched", "ac-causal")


def test_claim_table_holds_each_claim_against_every_control():
    for study_name, measures in (("ac-vision", 6), ("ac-language", 4)):
        table = tables.claim_table(routed_results(study_name), study_name)
        assert len(table) == measures * len(AC_CONTROLS)
        compared = {contrast.split(" - ")[1] for contrast in table.index.get_level_values("contrast")}
        assert compared == set(AC_CONTROLS)
    row = table.loc[("performs better", "cross-entropy (nats), lower is better", "ac-row - ac-pooled")]
    assert row["seeds"] == "3 (pilot)"


def test_claim_table_of_too_few_runs():
    table = tables.claim_table(routed_results("ac-vision", seeds=1), "ac-vision")
    assert table.empty
    assert table.query("claim == 'performs better'").empty


def test_attack_modes():
    table = tables.attack_modes(routed_results("ac-vision", {"cosine": (0.8, 0.9), "ac": (0.9, 0.9)}))
    assert table.loc[("PGD, 2/255", "ac")].tolist() == [f"{v:.2f} ± 0.00" for v in (20, 30, 40)]
    assert table.loc[("FGSM, 1/255", "cosine")].tolist() == ["10.00 ± 0.00", "-", "-"]
    assert table.loc[("SPSA, 2/255", "ac")].tolist() == ["40.00 ± 0.00", "-", "-"]


def test_routing_by_layer():
    table = tables.routing_by_layer(routed_results("ac-vision", {"cosine": (0.8,), "ac": (0.8, 0.9)}))
    assert table.index.tolist() == [(arm, str(at)) for arm in ("cosine", "ac") for at in (1, 2, 3)]
    assert table["chosen set changed by M"].tolist() == ["-"] * 4 + ["0.425 ± 0.035"] * 2
    assert table["effective experts"].tolist() == ["8.00"] * 3 + ["8.50 ± 0.71"] * 3


def test_company_table():
    table = tables.company_table(routed_results("ac-language", {"cosine": (0.0,), "ac": (0.8, 0.9)}))
    kinds = ("later tokens", "other sequences")
    assert table.index.tolist() == [(kind, arm) for kind in kinds for arm in ("cosine", "ac")]
    shown = ["2.0000 ± 0.0000", "0.0085 ± 0.0007", "0.085 ± 0.007", "0.9000"]
    assert table.loc[("later tokens", "ac")].tolist() == shown
    assert table.loc[("later tokens", "cosine")].tolist() == ["2.0000", "0.0000", "0.000", "0.0000"]
    images = tables.company_table(routed_results("ac-vision", {"ac": (0.8,)}))
    assert images.index.tolist() == [("other images", "ac")]


def test_collapse_table_puts_the_null_beside(core):
    table = overview.collapse_table("core")
    assert [arm for _, arm in table.index] == ["base", "snnl"] * (len(table) // 2)
    for _, row in table.iterrows():
        assert row["seeds"] == "3"
        assert row["effective experts"] == "3.50 ± 0.00"
        together, alone = (float(row[c].split()[0]) for c in ("cos outputs", "cos outputs, trained alone"))
        assert alone == pytest.approx(4 * together, abs=3e-3)  # as `made_up` has it; both are rounded


def test_collapse_table_has_the_collapse_studies_once_they_are_whole(core):
    """Labelled as the verdicts are; with one run missing, nobody looks."""
    titles = {"collapse": "Three domains", "collapse-top1": "Three domains (top-1)"}
    for name in titles:
        for run in study.runs("core", name):
            store.write_run(run.path, made_up(run))
    shown = overview.collapse_table("core").index.get_level_values("data set")
    assert list(dict.fromkeys(shown)) == ["FashionMNIST (CNN)", *titles.values()]
    assert overview.accuracy_table("core", "collapse-top1").columns.tolist() == [titles["collapse-top1"]]
    study.runs("core", "collapse-top1")[-1].path.unlink()
    shown = overview.collapse_table("core").index.get_level_values("data set")
    assert list(dict.fromkeys(shown)) == ["FashionMNIST (CNN)", titles["collapse"]]


def test_scores_say_where_files_were_measured_at_different_epochs(folders):
    """Of CIFAR-10 one arm is new, of FashionMNIST all are."""
    for dataset, old in (("cifar10", ("linear", "ac")), ("fashion_mnist", ())):
        for arm in ("linear", "ac", "hash"):
            run = study.runs("core", "ac-vision", dataset, arm)[0]
            result = routed(run, 0.5)
            if arm in old:
                del result["primary_endpoint"]
            store.write_run(run.path, result)
    said = overview.endpoints_in_words("core", "ac-vision")
    assert said.endswith("of the lowest validation cross-entropy: CIFAR-10 (all but `hash`).")
    assert overview.endpoints_in_words("core", "ac-language") == ""


def test_every_measure_of_the_results_page_is_defined():
    plain = {"accuracy", "cross-entropy", "cos outputs, trained alone"}
    assert set(readme.RESULTS_MEASURES) - set(glossary.MEASURES) == plain


def test_words_and_arms_of_the_results_page_are_explained(core):
    page = readme.results_page()
    place = page.index("## Words, arms and measures")
    assert place < page.index("## Verdicts")
    ran = [line for line in page[place:].split("\n") if line.startswith("| SNNL and collapse |")]
    assert [line.split(" | ")[1] for line in ran] == ["base", "snnl", "dense", "dense-snnl"]
    assert f"| {arms.ARM_DESCRIPTIONS['snnl']} |" in ran[1]
    for term in ("Three domains", "Three shifted domains", "constant gate", "nats", "points", "exploratory"):
        assert f"| {term} | " in page
    assert "| changed by M | share of tokens" in page
    assert "| supported |" not in page  # no verdict has that word here


def test_accuracy_table(core):
    run = planned("base", 42, "mnist")
    store.write_run(run.path, made_up(run, accuracy=0.99))
    table = overview.accuracy_table("core")
    assert table.columns.tolist() == ["FashionMNIST (CNN)", "MNIST"]
    assert table["FashionMNIST (CNN)"].to_dict() == {
        "base": "91.00 ± 1.00 (3)",
        "snnl": "92.67 ± 1.15 (3)",
        "dense": "80.00 ± 0.00 (3)",
        "dense-snnl": "81.00 ± 1.00 (3)",
    }
    assert table["MNIST"].tolist() == ["99.00 (1)", "-", "-", "-"]


def test_tuning_table(folders):
    """The two seeds of one setting are averaged; settings of one arm stand apart."""
    runs = [r for r in study.runs("core", "snnl-tuning", "cifar100") if r.train.learning_rate == 1e-3]
    tried = [r for r in runs if r.arm == "snnl" and r.objective.snnl.factor in (1.0, 10.0)]
    assert len(tried) == 4
    for run in tried:
        value = run.objective.snnl.factor + run.seed
        curve = {"cross_entropy": [value, value + 1]}
        study.write(run, {"history": {"best_cross_entropy": value, "validation": curve}})
    table = overview.tuning_table("core").reset_index()
    assert table["learning rate"].tolist() == [1e-3, 1e-3]
    assert table["weight of the extra loss"].tolist() == [1.0, 10.0]
    assert table["validation cross-entropy"].tolist() == [2.5, 11.5]
    assert table["at the last epoch"].tolist() == [3.5, 12.5]
    assert table["chosen by"].tolist() == ["the best epoch"] * 2
    assert table["seeds"].tolist() == [2, 2]


def store_routed(study_name: str, **options: int) -> None:
    for result in routed_results(study_name, **options):
        run = routed_plan(study_name, result["run"]["arm"], result["run"]["seed"])
        store.write_run(run.path, result)


def tuned(value: float) -> dict:
    return {"best_cross_entropy": value, "validation": {"cross_entropy": [value]}}


def test_tuning_budgets_are_not_mixed(folders):
    """base is also tuned at the whole budget; its value there is not averaged with the short one's."""
    rate = snnl.LEARNING_RATES[0]
    runs = [
        run
        for run in study.runs("core", "snnl-tuning", "cifar100", "base")
        if run.train.learning_rate == rate and run.seed == 1
    ]
    assert len({run.train.epochs for run in runs}) == len(runs) == 2
    for run in runs:
        history = tuned(float(run.train.epochs))
        study.write(run, {"history": history})
    assert sorted(overview.tuning_table("core")["validation cross-entropy"]) == sorted(
        float(run.train.epochs) for run in runs
    )


def test_tuning_table_has_every_study(folders):
    """The balance weight, which is the same everywhere there, is no tuned weight of an AC study."""
    names = [name for name in study.STUDIES if name.endswith("-tuning")]
    for name in names:
        run = study.runs("core", name)[0]
        study.write(run, {"history": tuned(2.0)})
    table = overview.tuning_table("core").reset_index()
    assert sorted(table["study"]) == sorted(name.removesuffix("-tuning") for name in names)
    weights = dict(zip(table["study"], table["weight of the extra loss"], strict=True))
    assert weights["ac-vision"] == weights["ac-language"] == 0
    assert weights["crossed"] == crossed.FACTORS[0]


def test_routed_tables(folders):
    for name in COLUMN_SETS:
        store_routed(name)
    vision = overview.routed_claims_table("core", "ac-vision")
    assert set(vision.index.get_level_values("data set")) == {"CIFAR-10 (ViT)"}
    key = "CIFAR-10 (ViT)", "performs better", "accuracy (points), higher is better", "ac - cosine"
    row = vision.loc[key]
    assert (row["difference"], row["reading"]) == ("+3.33", "interval on the claimed side")
    language = overview.routed_claims_table("core", "ac-language")
    row = ("performs better", "cross-entropy (nats), lower is better", "ac-row - ac-pooled")
    assert row in language.droplevel(0).index
    accuracy = overview.accuracy_table("core", "ac-vision")["CIFAR-10 (ViT)"]
    assert accuracy["ac"] == "83.33 ± 1.15 (3)"
    assert accuracy.index.tolist()[:3] == ["linear", "cosine", "ac"]
    assert len(overview.crossed_table("core")) == 3 * len(tables.CROSSED_MEASURES)


def test_provenance_table(core):
    rows = overview.provenance_table("core")["value"]
    assert rows["runs finished / planned"] == f"12 / {len(study.runs('core'))}"
    assert rows["commits"] == "0123456789"
    assert rows["code changed since the commit"] == "no"
    assert rows["versions"] == "python 3.12.0, torch 2.14.0"
    assert rows["machines"] == "Some CPU (cpu)"
    assert rows["time"] == "18 core-minutes"
    assert rows["longest run"] == "90 s"
    assert rows["highest memory of a run on a CPU"] == f"{500 + max(arms.SEEDS[:3])} MB"


def test_html_table(core):
    html = as_html(overview.accuracy_table("core")).data
    assert html.count("<tr") == 5
    assert "<th>arm</th>" in html
    assert "<td>92.67 ± 1.15 (3)</td>" in html


def test_readme_shows_the_benchmark(core):
    row = bench_row()
    content = {"provenance": {"commit": "a" * 40, "dirty": True, "machine": "Chip"}, "date": "2026-12-01"}
    store.write(store.results_dir() / "bench" / "snnl.json", content | {"rows": [row], "absent": ["pml"]})
    page = readme.speed_page()
    assert "| N=1024 | float32 | cleverhans | 3.06 [2.90, 3.50] | 2.0 | 7.0 | 0.40 |" in page
    origin = "Chip; commit aaaaaaaaaa with changes; 2026-12-01; without pml."
    assert f"Measured: `python -m benchmarks snnl`; {origin}" in page
    on_gpu = row | {"processor": "Big GPU", "device": "cuda", "goals": row["goals"] | {"faster": 1 / 1.15}}
    store.write(store.results_dir() / "bench" / "gpu.json", {"rows": [on_gpu, on_gpu | {
        "row": "no peer here", "faster_than_fastest_peer": None}]})  # fmt: skip
    page = readme.speed_page()
    assert "`python -m benchmarks gpu --device cuda`; Big GPU; commit unknown; day unknown." in page
    assert "| SNNL, N=1024 | float32 | cleverhans | 3.06 [2.90, 3.50] (goal 0.87) | 2.0 | 7.0 |\n" in page
    assert "no peer here" not in page


def bench_row(**changes):
    """Of a benchmark's file: two peers, the second slower, and ours in another form."""
    medians = {"ours": 1.0, "ours, float32": 1.5, "cleverhans": 3.06, "authors": 4.0}
    contestants = {
        who: {"peer": not who.startswith("ours"), "times_ours": {"median": t, "low": 2.9, "high": 3.5}}
        for who, t in medians.items()
    }
    return {
        "row": "N=1024",
        "dtype": "float32",
        "faster_than_fastest_peer": 3.06,
        "memory_saving": 7.0,
        "share_of_limit": 0.397,
        "goals": {"faster": None, "saving": None, "share": None},
        "contestants": contestants,
    } | changes


def test_a_missed_goal_is_marked_and_no_rounding_meets_it(folders):
    def cells(**changes):
        store.write(store.results_dir() / "bench" / "snnl.json", {"rows": [bench_row(**changes)]})
        return speed.bench_table("snnl").iloc[0]

    goals = {"faster": 2.0, "saving": 5.0, "share": 0.5}
    found = cells(faster_than_fastest_peer=1.99772, memory_saving=4.99, share_of_limit=0.6, goals=goals)
    assert found["times as fast"] == "1.998 [2.90, 3.50] (goal 2, missed)"
    assert found["memory, times less"] == "4.99 (goal 5, missed)"
    assert found["share of the physical limit"] == "0.60 (goal 0.5)"
    assert found["in float32 like the peer"] == "2.0"
    assert "memory, times less" not in cells(memory_saving=None, goals=goals)
    contestants = bench_row()["contestants"]
    contestants["cleverhans"]["times_ours"] = {"median": 1.03, "low": 0.95, "high": 1.14}
    found = cells(faster_than_fastest_peer=1.03, contestants=contestants)
    assert found["times as fast"] == "1.03 [0.95, 1.14] equal"


def test_profiles_are_of_rows_and_peers_that_the_files_still_name(folders):
    missed = bench_row(goals={"faster": 4.0, "saving": None, "share": None})
    store.write(store.results_dir() / "bench" / "snnl.json", {"rows": [missed, bench_row(row="met")]})
    known = {"bench": "snnl", "row": "N=1024", "milliseconds": 2.0, "shares": {"products": 0.75}}
    entries = [known | {"contestant": who} for who in ("ours", "cleverhans", "authors")]
    entries += [known | {"contestant": "ours", "row": "met"}, known | {"contestant": "ours", "bench": "moe"}]
    store.write(store.results_dir() / "bench" / "profile.json", {"profiles": entries})
    found = speed.profile_table()
    assert list(found["contestant"]) == ["ours", "cleverhans"]
    assert list(found["products"]) == ["0.75", "0.75"]


def test_a_gpus_runs_are_counted_and_their_times_are_no_core_minutes(core):
    run = planned("base", 42)
    store.write_run(run.path, store.read(run.path) | {"device": "Big GPU", "wall_seconds": 9e9})
    assert overview.provenance_table("core")["value"]["time"].endswith(" core-minutes; 1 run on Big GPU")
    assert float(overview.provenance_table("core")["value"]["time"].split()[0]) < 18


def test_results_show_the_inspector_beside_its_peers(folders):
    saw = {"healthy": "nothing", "noise": "arbitrary"}
    percent = {"median": 12.4, "low": -1.2, "high": 20.0}
    ours = {"sees": saw, "training_percent": percent, "mib_more": {"median": 0.26, "low": -0.1, "high": 1.0}}
    peer = {"sees": {"healthy": "all is well", "noise": "nothing"}, "generation_percent": percent}
    blind = {"sees": {"healthy": "2 blocks", "noise": "2 blocks"}}
    content = {
        "tools": {"ours": ours, "peer": peer, "blind": blind},
        "missing": {"x": "gone"},
        "pass_percent": {"D 512": percent},
        "unwatched_mib": [0.12, 0.5],
    }
    store.write(store.results_dir() / "bench" / "inspect.json", content)
    section = "\n".join(speed.inspector_sections())
    assert "| planted | ours | peer | blind |" in section
    assert "| noise | arbitrary | nothing | 2 blocks |" in section
    assert "(without blind, which read nothing of this model)" in section
    assert "| blind | -" not in section
    assert "| ours | +12 % [-1, +20] | - | - | +0.3 [-0.1, +1.0] |" in section
    assert "| peer | - | - | +12 % [-1, +20] | - |" in section
    assert "+12 % [-1, +20] at D 512" in section
    assert "(those not watched: 0.1 to 0.5 MiB)" in section
    assert "Not installed when measured: x." in section


def test_readme_shows_how_steps_grow(core):
    fit = {"exponent": 1.93, "low": 1.871, "high": 1.99}
    entry = {"job": "SNNL", "size": "N", "time": fit, "memory": None}
    other = {"job": "AC router", "size": "K", "time": fit, "memory": fit}
    times = {"median": 1.874, "low": 1.8, "high": 1.9}
    rows = [{"processes": 1, "times_one": dict.fromkeys(times, 1.0)}, {"processes": 2, "times_one": times}]
    content = {"exponents": [entry, other], "throughput": rows}
    store.write(store.results_dir() / "bench" / "scaling.json", content)
    section = readme.speed_page()
    assert "| step of | grows | N | K |" in section
    assert "| SNNL | time | 1.93 [1.87, 1.99] | - |" in section
    assert "| SNNL | memory | - | - |" in section
    assert "2 processes do 1.87 times as much (quartiles 1.80 to 1.90)." in section


def test_readme_with_no_data_set_that_was_published(folders):
    """MNIST alone: every table of the section still has its columns."""
    for arm in ("base", "snnl"):
        for seed in arms.SEEDS[:2]:
            run = planned(arm, seed, "mnist")
            store.write_run(run.path, made_up(run, accuracy=0.99))
    section = readme.results_page()
    assert "| of | data set | claim | against | verdict |" in section  # no row: MNIST is outside
    assert "| MNIST | base | 2 |" in section
    assert "| index |" not in section


def test_first_screen_holds_every_verdict(core):
    """One cell of the tables a verdict, with its word, difference and interval; in words what minus what."""
    found = selection.find_verdicts("core")
    soup = BeautifulSoup(first_screen.first_screen(found), "html.parser")
    units = [one for table in soup.find_all("table") for one in table.find_all("span", class_="unit")]
    assert len(units) == len(found) == 4
    assert all("pilot" in one["class"] for one in units)
    row = soup.find("table").tbody.tr
    assert row.th.get_text() == "FashionMNIST (CNN)"
    assert row.find("span").get_text().split() == ["○", "+1.67", "[+0.23,", "+3.10]"]
    assert "SNNL-MoE minus plain MoE" in row.find("span")["title"]
    assert "SNNL-MoE minus plain MoE" in soup.get_text()


def test_budget_table(core):
    table = overview.budget_table("core")
    row = table.loc[("snnl", "FashionMNIST")]
    assert (row["arms"], row["runs"], row["training images"]) == ("4", "12", "all")
    assert row["epochs"] == f"{planned('base', 42).train.epochs}"
    assert row["tokens an epoch"] == "-"
    assert as_html(overview.budget_table("digits")).data == "<p>None in this profile.</p>"


def test_report_is_the_same_whenever_it_is_rendered(tmp_path):
    new = nbformat.v4
    source = tmp_path / "in.ipynb"
    nbformat.write(new.new_notebook(cells=[new.new_markdown_cell("# T\n\n## Part")]), source)
    pages = [tmp_path / "1.html", tmp_path / "2.html"]
    for page in pages:
        render(source, page)
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_curves_show_the_wanted_arms_in_one_order():
    figure = plots.training_curves(some_results({"base": (0.9,), "snnl": (0.9,)})[::-1])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["base", "snnl"]


def test_similarity_floor_is_drawn():
    figure = snnl_plots.similarity_with_nulls(some_results())
    floor = (2 / (np.pi * 1000)) ** 0.5
    (line,) = [line for line in figure.axes[0].lines if line.get_label().startswith("floor")]
    np.testing.assert_allclose(line.get_xdata(), floor)
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 4


def test_changed_choices_of_arms_without_an_m_are_refused():
    with pytest.raises(ValueError, match="no arm here has an M"):
        routed_plots.changed_choices(routed_results("ac-vision", {"cosine": (0.8, 0.8)}))
