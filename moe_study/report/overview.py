"""Tables over all data sets of a profile, made from result files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from moe_lib.models.language import LanguageConfig
from moe_study import store, study
from moe_study.claims import BY_KEY
from moe_study.columns import (
    COLUMNS,
    LANGUAGE_COLUMNS,
    VISION_COLUMNS,
    Column,
    Columns,
    Result,
    frame_of,
    look_up,
    rounded,
    shown_interval,
    shown_level,
    signed,
)
from moe_study.configs import arms
from moe_study.data import DATASETS
from moe_study.report import selection, tables
from moe_study.report import verdicts as words
from moe_study.report.plots import DATASET_TITLES

# Columns of RESULTS.md's tables of the other studies.
VISION_SCORES = (
    "accuracy",
    "validation area",
    "lost to corruption",
    "lost to attack",
    "changed by M",
    "batch dependence",
)

LANGUAGE_SCORES = (
    "cross-entropy", "bits per byte", "validation area", "lost to swap", "changed by M",
    "dependence on other sequences",
    "dependence on later tokens",
)  # fmt: skip


def each_dataset(
    profile: str,
    study_names: str | Sequence[str],
    table: Callable[[Sequence[Result]], pd.DataFrame],
) -> pd.DataFrame:
    """`table` of each data set's results, one below the other; empty where nothing is finished."""
    names = [study_names] if isinstance(study_names, str) else study_names
    found = {
        words.title(name, dataset): table(study.results(runs))
        for name in names
        for dataset, runs in selection.evidence(profile, name).items()
    }
    return pd.concat(found, names=["data set"]) if found else pd.DataFrame()


COLLAPSE_STUDIES = ("snnl", "collapse", "collapse-top1", "collapse-wide")
COLLAPSE_COLUMNS: Columns = {
    name: COLUMNS[name]
    for name in ("effective experts", "dead experts", "cost of permuted routing", "cos outputs")
} | {"cos outputs, trained alone": Column("null.similarity.outputs", 3)}


def collapse_table(profile: str) -> pd.DataFrame:
    """Is there collapse at all, with and without SNNL: idle experts, idle routing, and alike experts beside
    their null (the same experts trained alone on the same frozen extractor)."""

    def of_main_arms(results: Sequence[Result]) -> pd.DataFrame:
        main = [result for result in results if result["run"]["arm"] in arms.MAIN_ARMS]
        frame = frame_of(main, COLLAPSE_COLUMNS)
        return tables.summary(frame, list(COLLAPSE_COLUMNS), COLLAPSE_COLUMNS)

    return each_dataset(profile, COLLAPSE_STUDIES, of_main_arms)


def accuracy_table(
    profile: str,
    study_name: str = "snnl",
    found: Callable[[str, str], dict[str, list[study.Run]]] = selection.whole_runs,
) -> pd.DataFrame:
    """Test accuracy (%) of every arm on every data set, mean ± sd over seeds (their number in brackets).

    Args:
        found: whose runs are shown, such as `evidence`.
    """
    columns = {}
    for dataset, runs in found(profile, study_name).items():
        frame = frame_of(study.results(runs), {"accuracy": COLUMNS["accuracy"]})
        columns[words.title(study_name, dataset)] = {
            str(arm): f"{shown_level(group['accuracy'], COLUMNS['accuracy'])} ({len(group)})"
            for arm, group in frame.groupby("arm", sort=False)
        }
    table = pd.DataFrame(columns)
    known = {**arms.ARM_DESCRIPTIONS, **arms.ROUTED_ARM_DESCRIPTIONS, **arms.CROSSED_ARM_DESCRIPTIONS}
    order = [arm for arm in dict.fromkeys([*known, *table.index]) if arm in table.index]
    return table.loc[order].fillna("-").rename_axis("arm")


DOMAIN_STUDIES = ("collapse", "collapse-top1")
DOMAINS: Columns = {
    f"accuracy on {title}": Column(f"domains.accuracy.{at}", 2, "points")
    for at, title in enumerate(DATASETS["domains"].domains)
}


def domain_table(profile: str) -> pd.DataFrame:
    """Test accuracy of every arm on each of the three domains."""
    return each_dataset(
        profile,
        DOMAIN_STUDIES,
        lambda results: tables.summary(frame_of(results, DOMAINS), list(DOMAINS), DOMAINS),
    )


def domain_gains(profile: str) -> pd.DataFrame:
    """What SNNL adds on each domain."""

    def gains(results: Sequence[Result]) -> pd.DataFrame:
        frame = frame_of(results, DOMAINS)
        return tables.contrasts(frame, [("snnl", "base")], list(DOMAINS), DOMAINS).drop(
            tables.MECHANISM_ROW, level="contrast", errors="ignore"
        )

    return each_dataset(profile, DOMAIN_STUDIES, gains).rename_axis(index={"data set": "setting"})


def published_table(profile: str) -> pd.DataFrame:
    """The papers' accuracies (second-hand) beside ours, over the seeds that have both arms."""
    rows = []
    claim = BY_KEY["snnl-accuracy"]
    for name in ("snnl-confirm", "snnl"):
        for dataset, runs in selection.whole_runs(profile, name).items():
            frame = frame_of(study.results(runs))
            arms_S = tables.paired(frame, ["base", "snnl"], "accuracy")
            found = tables.contrast(frame, "snnl", "base", "accuracy")
            published = claim.published.get(dataset)
            if published is not None and arms_S is not None and found is not None:
                rows.append(
                    {
                        "study": name,
                        "data set": DATASET_TITLES[dataset],
                        "published MoE": f"{100 * published.control:.2f}",
                        "our base": f"{rounded(100 * arms_S['base'].mean(), 2):.2f}",
                        "published MoE + SNNL": f"{100 * published.treatment:.2f}",
                        "our snnl": f"{rounded(100 * arms_S['snnl'].mean(), 2):.2f}",
                        "published gain": f"{100 * published.difference:+.2f}",
                        "our gain": signed(found.difference * 100, 2),
                        "95 % interval": shown_interval(found.low * 100, found.high * 100, 2),
                        "seeds": str(found.seeds),
                    }
                )
    return pd.DataFrame(rows).set_index(["study", "data set"]) if rows else pd.DataFrame()


def routed_claims_table(profile: str, study_name: str) -> pd.DataFrame:
    """Each claim for the AC router on each data set of one of its studies, against each control."""
    return each_dataset(profile, study_name, lambda results: tables.claim_table(results, study_name))


def scores_table(profile: str, study_name: str) -> pd.DataFrame:
    """What every arm of an AC or the crossed study scores on every data set."""
    columns, shown = {
        "ac-language": (LANGUAGE_COLUMNS, LANGUAGE_SCORES),
    }.get(study_name, (VISION_COLUMNS, VISION_SCORES))

    def scores(results: Sequence[Result]) -> pd.DataFrame:
        return tables.summary(frame_of(results, columns), list(shown), columns)

    return each_dataset(profile, study_name, scores)


def endpoints_in_words(profile: str, study_name: str) -> str:
    """At which epochs `scores_table` was measured, as a sentence; "" where all of it is of the last one."""
    older = []
    for dataset, runs in selection.evidence(profile, study_name).items():
        arms_of: dict[bool, list[str]] = {True: [], False: []}
        for result in study.results(runs):
            last = store.primary_endpoint(result) == store.PRIMARY_ENDPOINT
            arms_of[last].append(f"`{result['run']['arm']}`")
        if arms_of[False]:
            newer = ", ".join(dict.fromkeys(arms_of[True]))
            older.append(DATASET_TITLES[dataset] + (f" (all but {newer})" if newer else ""))
    if not older:
        return ""
    return (
        "Accuracy and cross-entropy are at the last epoch, and the validation area is over all epochs; the "
        "other measures are at the last epoch too, but in older files at that of the lowest validation "
        f"cross-entropy: {', '.join(older)}."
    )


def crossed_table(profile: str) -> pd.DataFrame:
    """Main effects and interaction of SNNL and AC on each data set."""
    return each_dataset(
        profile, "crossed", lambda results: tables.crossed_effects(frame_of(results, VISION_COLUMNS))
    )


def tuning_table(profile: str) -> pd.DataFrame:
    """Validation cross-entropy of every setting tried, at its best epoch and at the last, mean over
    the tuning seeds; and by which of the two the setting was chosen."""
    rows = []
    for name in (name for name in study.STUDIES if name.endswith("-tuning")):
        tuned_study = name.removesuffix("-tuning")
        chosen_by = "the last epoch" if tuned_study in arms.CONFIRMATORY else "the best epoch"
        for runs in selection.finished_runs(profile, name).values():
            results = study.results(runs)
            objectives = [result["run"]["objective"] for result in results]
            tuned = [key for key in ("balance", "auxiliary") if len({one.get(key) for one in objectives}) > 1]
            for result in results:
                run = result["run"]
                objective = run["objective"]
                weights = [(objective["snnl"] or {}).get("factor"), *(objective[key] for key in tuned)]
                weight = next(filter(None, weights), 0.0)
                rows.append(
                    {
                        "study": tuned_study,
                        "data set": DATASET_TITLES[run["dataset"]],
                        "arm": run["arm"],
                        "training images": run["train_images"] or "all",
                        "epochs": run["train"]["epochs"],
                        "learning rate": run["train"]["learning_rate"],
                        "weight of the extra loss": weight,
                        "chosen by": chosen_by,
                        "validation cross-entropy": result["history"]["best_cross_entropy"],
                        "at the last epoch": look_up(result, "history.validation.cross_entropy")[-1],
                    }
                )
    if not rows:
        return pd.DataFrame()
    keys = ["study", "data set", "arm", "training images", "epochs", "learning rate", "chosen by"]
    settings = pd.DataFrame(rows).groupby([*keys, "weight of the extra loss"])
    table = settings.mean().round(4)
    table["seeds"] = settings.size()
    return table.reset_index("chosen by")[
        ["validation cross-entropy", "at the last epoch", "chosen by", "seeds"]
    ]


def provenance_table(profile: str) -> pd.DataFrame:
    """Where the numbers come from: commits, versions, machines, time and memory, over all runs used."""
    by_study = {name: study.results(study.runs(profile, name)) for name in study.STUDIES}
    results = [result for own in by_study.values() for result in own]
    planned = len(study.runs(profile))
    memory = [r["peak_memory_mb"] for r in results if r["device"] == "cpu"]

    def distinct(values: Sequence[Any]) -> str:
        return ", ".join(sorted({str(v) for v in values})) or "-"

    versions = [f"{k} {v}" for r in results for k, v in r["versions"].items()]
    rows = {
        "runs finished / planned": f"{len(results)} / {planned}",
        "commits": distinct([(r["commit"] or "unknown")[:10] for r in results]),
        "runs of unknown origin (no commit, unknown changes, or several commits)": str(
            store.of_unknown_origin(results)
        ),
        "code changed since the commit": distinct(
            [{True: "yes", False: "no"}.get(r["dirty"], "?") for r in results]
        ),
        "versions": distinct(versions),
        "machines": distinct([f"{r['machine']} ({r['device']})" for r in results]),
        "time": f"{core_minutes(results):.0f} core-minutes{on_gpus(results)}",
        "... by study": ", ".join(f"{name} {core_minutes(own):.0f}" for name, own in by_study.items() if own),
        "longest run": f"{max((r['wall_seconds'] for r in results), default=0):.0f} s",
        "highest memory of a run on a CPU": f"{max(memory, default=0):.0f} MB",
    }
    return pd.DataFrame({"value": rows}).rename_axis("what")


def core_minutes(results: Sequence[dict[str, Any]]) -> float:
    """Time spent on a CPU's runs; one that another study had trained already took none."""
    return sum(r["wall_seconds"] for r in results if "same_as" not in r and r["device"] == "cpu") / 60


def on_gpus(results: Sequence[dict[str, Any]]) -> str:
    """ "; 54 runs on NVIDIA H100", whose times are no core's since they shared it; "" if there are none. One
    that another study had trained already does not count again."""
    devices = Counter(r["device"] for r in results if r["device"] != "cpu" and "same_as" not in r)
    return "".join(
        f"; {count} run{'s' * (count > 1)} on {device}" for device, count in sorted(devices.items())
    )


# Of a profile that decides nothing: study, measure, and the contrasts that its report tells in words.
HAPPENED: tuple[tuple[str, str, Columns, tuple[tuple[str, str], ...]], ...] = (
    ("snnl", "accuracy", COLUMNS, (("snnl", "base"), ("base", "uniform-gate"))),
    ("collapse", "accuracy", COLUMNS, (("snnl", "base"), ("base", "uniform-gate"))),
    ("ac-vision", "accuracy", VISION_COLUMNS, (("ac", "cosine"), ("ac", "linear"))),
    ("ac-language", "cross-entropy", LANGUAGE_COLUMNS, (("ac", "cosine"), ("ac", "linear"))),
)


def happened(profile: str) -> str:
    """What runs that decide nothing did, as Markdown: levels, differences, and where the answer is."""
    lines = []
    for name, measure, columns, pairs in HAPPENED:
        for dataset, runs in selection.finished_runs(profile, name).items():
            frame = frame_of(study.results(runs), columns)
            said = words.differences(frame, [(a, b, measure) for a, b in pairs], columns)
            if said:
                lines += [f"- **{DATASET_TITLES[dataset]}** ({measure})", *(f"    - {text}" for text in said)]
    if profile != "digits":
        return "No claim has both its arms finished yet."
    core = store.results_dir() / "core" / "report.html"
    link = "[the report of profile `core`](../core/report.html)"
    return "\n".join(
        [
            f"> Profile `{profile}` shows the machinery at work on embedded data: small sets, few seeds. It "
            f"decides nothing. The answer is in {link if core.exists() else '`results/core/report.html`'}.",
            "",
            "What happened here, mean difference over paired seeds with its 95 % interval:",
            "",
            *lines,
        ]
    )


def budget_table(profile: str) -> pd.DataFrame:
    """What each study trained, data set by data set; the time is in `provenance_table`."""
    rows = []
    for name in study.STUDIES:
        for dataset, runs in selection.finished_runs(profile, name).items():
            results = study.results(runs)

            def each(path: str, results: Sequence[dict[str, Any]] = results) -> str:
                found = {look_up(result, path) for result in results}
                values = [f"{value:.10g}" for value in sorted(v for v in found if v is not None)]
                return ", ".join(values + ["all"] * (None in found))

            text = isinstance(runs[0].model, LanguageConfig)
            sizes = sorted(r["num_parameters"] / 1e6 for r in results if "num_parameters" in r)
            rows.append(
                {
                    "study": name,
                    "data set": DATASET_TITLES[dataset],
                    "arms": str(len({run.arm for run in runs})),
                    "runs": str(len(runs)),
                    "training images": "-" if text else each("run.train_images"),
                    "tokens an epoch": each("run.epoch_tokens") if text else "-",
                    "epochs": each("run.train.epochs"),
                    "batch": each("run.train.batch_size"),
                    "learning rates": each("run.train.learning_rate"),
                    "weights (millions)": ", ".join(
                        dict.fromkeys(f"{size:.2f}" for size in (*sizes[:1], *sizes[-1:]))
                    ),
                }
            )
    return pd.DataFrame(rows).set_index(["study", "data set"]) if rows else pd.DataFrame()
