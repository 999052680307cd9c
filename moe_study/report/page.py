"""The rendered report and the README's tables, both made from result files alone."""

from __future__ import annotations

import html
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from bs4 import BeautifulSoup
from IPython.display import HTML
from markupsafe import Markup
from matplotlib.figure import Figure
from nbformat import NotebookNode

from moe_lib.models.language import LanguageConfig
from moe_study import store, study, verdicts
from moe_study.claims import BY_KEY, CLAIMS, CONFIRMATORY
from moe_study.configs import arms
from moe_study.report import collapse_plots, plots, provenance, tables, verdict_plots
from moe_study.report import verdicts as words
from moe_study.report.answers import answers
from moe_study.report.plots import DATASET_TITLES
from moe_study.verdicts import Verdict

# Columns of the README's tables of the other studies.
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


def finished_runs(profile: str, study_name: str) -> dict[str, list[study.Run]]:
    """Runs with results, by data set, in the order of the profile; data sets without any are left out."""
    return _finished(study.runs(profile, study_name))


def evidence(profile: str, study_name: str) -> dict[str, list[study.Run]]:
    """The same of `study.evidence`: confirmatory runs where they are whole."""
    return _finished(study.evidence(profile, study_name))


def _finished(runs: Sequence[study.Run]) -> dict[str, list[study.Run]]:
    grouped: dict[str, list[study.Run]] = {}
    for run in runs:
        if run.path.exists():
            grouped.setdefault(run.dataset, []).append(run)
    return grouped


def whole_runs(profile: str, study_name: str) -> dict[str, list[study.Run]]:
    """`finished_runs`, without the data sets of a confirmatory study that are not whole: nobody is to look at
    them before they are."""
    found = finished_runs(profile, study_name)
    if study_name not in CONFIRMATORY:
        return found
    planned = Counter(run.dataset for run in study.runs(profile, study_name))
    return {dataset: runs for dataset, runs in found.items() if len(runs) == planned[dataset]}


def each_dataset(
    profile: str, study_name: str, columns: tables.Columns, table: Callable[[pd.DataFrame], pd.DataFrame]
) -> pd.DataFrame:
    """`table` of each data set's runs, one below the other; empty where nothing is finished."""
    found = {
        DATASET_TITLES[dataset]: table(tables.frame(study.results(runs), columns))
        for dataset, runs in evidence(profile, study_name).items()
    }
    return pd.concat(found, names=["data set"]) if found else pd.DataFrame()


def find_verdicts(profile: str) -> list[Verdict]:
    """Every claim on every data set with results: confirmatory ones first, pilots last.

    A confirmatory set that is not whole is left out: nobody is to look at it before it is.
    """
    studies = [*CONFIRMATORY, *(claim.study for claim in CLAIMS)]
    found = []
    for name in dict.fromkeys(studies):
        whole = whole_runs(profile, name).values()
        found += verdicts.verdicts([result for runs in whole for result in study.results(runs)], name)
    return sorted(found, key=lambda verdict: verdict.word == "pilot")


def current(found: Sequence[Verdict]) -> list[Verdict]:
    """Those that count: an exploratory verdict gives way where a confirmatory one is no pilot."""

    def unit(verdict: Verdict) -> tuple[str, str, str]:
        return verdict.claim.key, verdict.dataset, verdict.control

    confirmed = {unit(v) for v in found if v.confirmatory and v.word != "pilot"}
    return [v for v in found if v.confirmatory or unit(v) not in confirmed]


def collapse_table(profile: str) -> pd.DataFrame:
    """Is there collapse at all, with and without SNNL: idle experts, idle routing, and alike experts beside
    their null (the same experts trained alone on the same frozen extractor)."""
    rows = []
    for dataset, runs in evidence(profile, "snnl").items():
        results = study.results(runs)
        frame = tables.frame(results)
        for arm in ("base", "snnl"):
            group = frame[frame["arm"] == arm]
            if not group.empty:
                null = [
                    tables.look_up(r, "null.similarity.outputs") for r in results if r["run"]["arm"] == arm
                ]
                columns = ("effective experts", "dead experts", "cost of permuted routing", "cos outputs")
                rows.append(
                    {"data set": DATASET_TITLES[dataset], "arm": arm, "seeds": str(len(group))}
                    | {
                        tables.COLUMNS[name].title(name, level=True): tables.shown_level(
                            group[name], tables.COLUMNS[name]
                        )
                        for name in columns
                    }
                    | {"cos outputs, trained alone": tables.spread(pd.Series(null, dtype=float), 3)}
                )
    return pd.DataFrame(rows).set_index(["data set", "arm"]) if rows else pd.DataFrame()


def accuracy_table(
    profile: str,
    study_name: str = "snnl",
    found: Callable[[str, str], dict[str, list[study.Run]]] = whole_runs,
) -> pd.DataFrame:
    """Test accuracy (%) of every arm on every data set, mean ± sd over seeds (their number in brackets).

    Args:
        found: whose runs are shown, such as `evidence`.
    """
    columns = {}
    for dataset, runs in found(profile, study_name).items():
        frame = tables.frame(study.results(runs), {"accuracy": tables.COLUMNS["accuracy"]})
        columns[DATASET_TITLES[dataset]] = {
            str(arm): f"{tables.shown_level(group['accuracy'], tables.COLUMNS['accuracy'])} ({len(group)})"
            for arm, group in frame.groupby("arm", sort=False)
        }
    table = pd.DataFrame(columns)
    known = {**arms.ARM_DESCRIPTIONS, **arms.ROUTED_ARM_DESCRIPTIONS, **arms.CROSSED_ARM_DESCRIPTIONS}
    order = [arm for arm in dict.fromkeys([*known, *table.index]) if arm in table.index]
    return table.loc[order].fillna("-").rename_axis("arm")


def published_table(profile: str) -> pd.DataFrame:
    """The papers' accuracies (second-hand) beside ours, over the seeds that have both arms."""
    rows = []
    claim = BY_KEY["snnl-accuracy"]
    for name in ("snnl-confirm", "snnl"):
        for dataset, runs in whole_runs(profile, name).items():
            frame = tables.frame(study.results(runs))
            arms_S = tables.paired(frame, ["base", "snnl"], "accuracy")
            found = tables.contrast(frame, "snnl", "base", "accuracy")
            published = claim.published.get(dataset)
            if published is not None and arms_S is not None and found is not None:
                rows.append(
                    {
                        "study": name,
                        "data set": DATASET_TITLES[dataset],
                        "published MoE": f"{100 * published.control:.2f}",
                        "our base": f"{tables.rounded(arms_S['base'].mean() * 100, 2):.2f}",
                        "published MoE + SNNL": f"{100 * published.treatment:.2f}",
                        "our snnl": f"{tables.rounded(arms_S['snnl'].mean() * 100, 2):.2f}",
                        "published gain": f"{100 * published.difference:+.2f}",
                        "our gain": f"{found.difference * 100:+.2f}",
                        "95 % interval": f"[{found.low * 100:+.2f}, {found.high * 100:+.2f}]",
                        "seeds": str(found.seeds),
                    }
                )
    columns = ["study", "data set", "published MoE", "our base", "published MoE + SNNL", "our snnl"]
    columns += ["published gain", "our gain", "95 % interval", "seeds"]
    return pd.DataFrame(rows, columns=columns).set_index(["study", "data set"])


def routed_claims_table(profile: str, study_name: str) -> pd.DataFrame:
    """Each claim for the AC router on each data set of one of its studies, against each control."""
    asked, pairs, columns = {
        "ac-vision": (tables.VISION_CLAIMS, tables.VISION_PAIRS, tables.VISION_COLUMNS),
        "ac-language": (tables.LANGUAGE_CLAIMS, tables.LANGUAGE_PAIRS, tables.LANGUAGE_COLUMNS),
    }[study_name]
    return each_dataset(
        profile, study_name, columns, lambda frame: tables.claim_rows(frame, asked, pairs, columns)
    )


def scores_table(profile: str, study_name: str) -> pd.DataFrame:
    """What every arm of an AC or the crossed study scores on every data set."""
    columns, shown = {
        "ac-language": (tables.LANGUAGE_COLUMNS, LANGUAGE_SCORES),
    }.get(study_name, (tables.VISION_COLUMNS, VISION_SCORES))
    return each_dataset(
        profile, study_name, columns, lambda frame: tables.summary(frame, list(shown), columns)
    )


def crossed_table(profile: str) -> pd.DataFrame:
    """Main effects and interaction of SNNL and AC on each data set."""
    return each_dataset(profile, "crossed", tables.VISION_COLUMNS, tables.crossed_effects)


# Studies whose settings were chosen there.
LAST_EPOCH = ("collapse", "ac-language-confirm", "ac-vision-confirm")


def tuning_table(profile: str) -> pd.DataFrame:
    """Validation cross-entropy of every setting tried, at its best epoch and at the last, mean over
    the tuning seeds; and by which of the two the setting was chosen."""
    rows = []
    for name in (name for name in study.STUDIES if name.endswith("-tuning")):
        for runs in finished_runs(profile, name).values():
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
                        "study": name.removesuffix("-tuning"),
                        "data set": DATASET_TITLES[run["dataset"]],
                        "arm": run["arm"],
                        "training images": run["train_images"] or "all",
                        "epochs": run["train"]["epochs"],
                        "learning rate": run["train"]["learning_rate"],
                        "weight of the extra loss": weight,
                        "chosen by": "the last epoch" if name.startswith(LAST_EPOCH) else "the best epoch",
                        "validation cross-entropy": result["history"]["best_cross_entropy"],
                        "at the last epoch": tables.look_up(result, "history.validation.cross_entropy")[-1],
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
        "runs of unknown origin (no commit, or unknown changes)": f"{store.of_unknown_origin(results)}",
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
    """ "; 54 runs on NVIDIA H100", whose times are no core's since they shared it; "" if there are none."""
    devices = Counter(r["device"] for r in results if r["device"] != "cpu")
    return "".join(
        f"; {count} run{'s' * (count > 1)} on {device}" for device, count in sorted(devices.items())
    )


def as_html(table: pd.DataFrame) -> HTML:
    """A table for the report: index as ordinary columns, no border; "none in this profile" if empty."""
    if table.empty:
        return HTML("<p>None in this profile.</p>")
    return HTML(table.reset_index().to_html(index=False, border=0, justify="left"))


def folded(title: str, table: pd.DataFrame) -> HTML:
    """A table that is shown on a click."""
    return HTML(
        f'<details class="more"><summary>{html.escape(title)}</summary>{as_html(table).data}</details>'
    )


# Of a profile that decides nothing: study, measure, and the contrasts that its report tells in words.
HAPPENED: tuple[tuple[str, str, tables.Columns, tuple[tuple[str, str], ...]], ...] = (
    ("snnl", "accuracy", tables.COLUMNS, (("snnl", "base"), ("base", "uniform-gate"))),
    ("collapse", "accuracy", tables.COLUMNS, (("snnl", "base"), ("base", "uniform-gate"))),
    ("ac-vision", "accuracy", tables.VISION_COLUMNS, (("ac", "cosine"), ("ac", "linear"))),
    ("ac-language", "cross-entropy", tables.LANGUAGE_COLUMNS, (("ac", "cosine"), ("ac", "linear"))),
)


def happened(profile: str) -> str:
    """What runs that decide nothing did, as Markdown: levels, differences, and where the answer is."""
    lines = []
    for name, measure, columns, pairs in HAPPENED:
        for dataset, runs in finished_runs(profile, name).items():
            frame = tables.frame(study.results(runs), columns)
            said = words.differences(frame, [(a, b, measure) for a, b in pairs], columns)
            if said:
                lines += [f"- **{DATASET_TITLES[dataset]}** ({measure})", *(f"    - {text}" for text in said)]
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
        for dataset, runs in finished_runs(profile, name).items():
            results = study.results(runs)

            def each(path: str, results: Sequence[dict[str, Any]] = results) -> str:
                found = {tables.look_up(result, path) for result in results}
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


# ----------------------------------------------------------------------------------------- README

BEGIN, END = "<!-- results: begin, written by `make readme` -->", "<!-- results: end -->"


def markdown(table: pd.DataFrame) -> str:
    """A data frame as a Markdown table; "None." where it has neither rows nor columns."""
    if not len(table.columns):
        return "None."
    flat = table.reset_index()
    cells = [[str(c) for c in flat.columns], ["---"] * len(flat.columns)]
    cells += [[str(v) for v in row] for row in flat.itertuples(index=False)]
    return "\n".join("| " + " | ".join(v.replace("|", "\\|") for v in row) + " |" for row in cells)


def bench(name: str) -> dict[str, Any]:
    """Content of results/bench/<name>.json; empty where that is not there."""
    path = store.results_dir() / "bench" / f"{name}.json"
    return store.read(path) if path.exists() else {}


def bench_table(name: str) -> pd.DataFrame:
    """Ours against its fastest peer, from results/bench/<name>.json; empty where that is not there."""
    rows = []
    for row in bench(name).get("rows", []):
        contestants = row.get("contestants", {})
        plain = contestants.get("ours, float32", {}).get("milliseconds")
        peers = [found["milliseconds"] for found in contestants.values() if found["peer"]]
        if row["faster_than_fastest_peer"] is None:  # no peer was there
            continue
        goal = row.get("goals", {}).get("faster")
        on_gpu, fused = name == "gpu", contestants.get("ours, fused")
        part = next((text for who, text in PARTS.items() if who in contestants), "") if on_gpu else ""
        rows.append(
            {
                "batch": part + row["row"],
                "times as fast": f"{row['faster_than_fastest_peer']:.1f}",
                "goal": f"{goal:.2g}" if goal else "-",
                "in float32 like the peer": f"{min(peers) / plain:.1f}" if plain else "-",
                "memory, times less": f"{row['memory_saving']:.1f}",
                "fused kernels, times as fast": f"{min(peers) / fused['milliseconds']:.1f}" if fused else "-",
                "their memory, times less": f"{_least(contestants) / fused['memory_mb']:.1f}"
                if fused
                else "-",
                # The probes of the file that is there were too small for a GPU: some shares are above 1.
                "share of the physical limit": "-" if on_gpu else f"{row['share_of_limit']:.2f}",
            }
        )
    table = pd.DataFrame(rows)
    unused = [name for name in table if (table[name] == "-").all()]
    return table.drop(columns=unused).set_index("batch") if rows else table


def _least(contestants: dict[str, Any]) -> float:
    """Memory of the peer that takes least, MB."""
    return min(float(found["memory_mb"]) for found in contestants.values() if found["peer"])


# What a row measures, told by a contestant, where rows of all parts stand in one table.
PARTS = {"cleverhans": "SNNL, ", "authors, sums": "AC router, "}
BENCH_TITLES = {
    "snnl": "SNNL",
    "moe": "Mixtures of experts",
    "router": "The AC router (statistics and decision)",
    "attacks": "Attacks",
    "train": "Training steps (our CNN in bfloat16, which may pass the limit; peers in float32)",
    "gpu": "On a GPU",
}


def scaling_table() -> pd.DataFrame:
    """Exponents from results/bench/scaling.json, a size a column; empty where that is not there."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for entry in bench("scaling").get("exponents", []):
        for key in ("time", "memory"):
            fit = (
                entry[key]
                and f"{entry[key]['exponent']:.2f} [{entry[key]['low']:.2f}, {entry[key]['high']:.2f}]"
            )
            rows.setdefault((entry["job"], key), {})[entry["size"]] = fit or "-"
    if not rows:
        return pd.DataFrame()
    return pd.DataFrame.from_dict(rows, orient="index").fillna("-").rename_axis(["step of", "grows"])


def profile_table() -> pd.DataFrame:
    """Where time goes in the rows that miss their goal, from results/bench/profile.json; empty without it."""
    rows = [
        {"batch": entry["row"], "contestant": entry["contestant"], "ms": f"{entry['milliseconds']:.1f}"}
        | {kind: f"{share:.2f}" for kind, share in entry["shares"].items()}
        for entry in bench("profile").get("profiles", [])
    ]
    return pd.DataFrame(rows).set_index("batch") if rows else pd.DataFrame()


# Why the rows that miss their goal do: read off the profiles below.
MISSED = (
    "Where a goal is missed, a step's processor time goes (shares; `python -m benchmarks profile`) mostly "
    "into work that the peer does as well: in bfloat16 the experts' products, in training the convolutions "
    "(without matrix units bfloat16 does not quite halve them), in ten stacked models the products of small "
    "matrices and the gathering of their batches. The AC router has no such part: its products have few "
    "columns, and the rest are passes over the tokens."
)


def throughput_text() -> str:
    """A clause for each number of processes measured."""
    clauses = [
        f"{row['processes']} processes do {row['times_one']['median']:.2f} times as much "
        f"(quartiles {row['times_one']['low']:.2f} to {row['times_one']['high']:.2f})"
        for row in bench("scaling")["throughput"]
        if row["processes"] > 1
    ]
    return ", ".join(clauses) or "more than one process were not measured"


def unfinished(profile: str) -> str:
    """Confirmatory sets that are not whole, and so not shown, as a sentence; "" where there is none."""
    parts = []
    for name in CONFIRMATORY:
        runs, whole = study.runs(profile, name), whole_runs(profile, name)
        for dataset in dict.fromkeys(run.dataset for run in runs):
            own = [run.path.exists() for run in runs if run.dataset == dataset]
            if dataset not in whole:
                parts.append(f"{name} on {DATASET_TITLES[dataset]} ({sum(own)} of {len(own)} runs)")
    return f"Declared, but not whole yet and so not shown: {'; '.join(parts)}." if parts else ""


def readme_section() -> str:
    """The part of the README between its markers, from results/core: the answer, with its numbers."""
    found = current(find_verdicts("core"))
    if not found:
        return f"{BEGIN}\nNo finished runs yet.\n{END}"
    parts = [BEGIN, answers(found), words.scope(found)]
    parts.append(
        f"![Every claim on every data set: verdict, difference, 95 % interval]({README_PICTURES['verdicts']})"
    )
    if whole_runs("core", "collapse"):
        parts.append(
            "Who serves which domain, without and with SNNL: rows are domains, columns experts. Rows that "
            "differ "
            "show a gate that tells domains apart.\n\n"
            f"![Mean gate of each domain without and with SNNL]({README_PICTURES['routing']})"
        )
    return "\n\n".join(parts) + f"\n\n{END}"


README_PICTURES = {"verdicts": "figures/readme/verdicts.png", "routing": "figures/readme/routing.png"}


def readme_pictures() -> dict[str, Figure]:
    """The README's two pictures, from results/core."""
    pictures = {}
    if found := current(find_verdicts("core")):
        pictures["verdicts"] = verdict_plots.verdict_grid(words.grid(found))
    for runs in whole_runs("core", "collapse").values():
        shown = [run for run in runs if run.arm in ("base", "snnl")]
        pictures.setdefault("routing", collapse_plots.domain_routing(study.results(shown)))
    return pictures


def results_page() -> str:
    """RESULTS.md: every verdict, accuracy and cost, from results/core and results/bench."""
    profile = "core"
    results = study.results(study.runs(profile))
    machines = ", ".join(sorted({r["machine"] for r in results if r["device"] == "cpu"}))
    found = current(find_verdicts(profile))
    sections = [
        "# Results",
        "Written by `make readme` from the files under `results/`. Figures, and the reasons behind each "
        "verdict, are in the rendered report, `results/core/report.html`.",
        f"Profile `core`: {len(results)} of {len(study.runs(profile))} planned runs finished, tuning "
        f"included, {core_minutes(results):.0f} core-minutes on {machines}{on_gpus(results)}. "
        "Regenerate with `make report PROFILE=core`.",
        "## Verdicts",
        f"{words.tally(found)} {unfinished(profile)}".strip(),
        answers(found),
        words.scope(found),
        "One row a claim, data set and control, at the last epoch, paired by seed: mean difference, 95 % t "
        "interval, exact sign-flip p (Holm over the units of a study). *Counts from*: the published "
        "difference, or a declared margin. Fewer than eight seeds are a pilot: shown, never decided.",
        markdown(words.table(found)),
        "What each verdict hangs on: the margin, the checkpoint, the test images, the number of seeds.",
        markdown(words.firmness(found)),
        "## SNNL",
        "Published accuracies (second-hand) beside ours, in %, at the last epoch:",
        markdown(published_table(profile)),
        *_accuracies(profile),
        "Is there collapse? Of four experts, mean ± standard deviation over seeds; older files measured "
        "it at the epoch of the lowest validation cross-entropy:",
        markdown(collapse_table(profile)),
    ]
    for name, title in (
        ("ac-vision", "The AC router, images"),
        ("ac-language", "The AC router, text"),
        ("crossed", "Both remedies crossed, images (`base`: cosine router, no SNNL)"),
    ):
        table = scores_table(profile, name)
        if not table.empty:
            sections += [f"## {title}", "Mean ± standard deviation over seeds:", markdown(table)]
    sections += ["## Speed and memory", *speed_sections(), *inspector_sections()]
    return "\n\n".join(sections) + "\n"


def _accuracies(profile: str) -> list[str]:
    """A table of each study of the SNNL family that has results."""
    title = "Test accuracy in %, last epoch, mean ± standard deviation (seeds)"
    found = {name: accuracy_table(profile, name) for name in ("snnl-confirm", "snnl", "collapse")}
    return [
        text
        for name, own in found.items()
        if not own.empty
        for text in (f"{title}; study `{name}`:", markdown(own))
    ]


def inspector_sections() -> list[str]:
    """The inspector beside its peers, from results/bench/inspect.json; nothing without it."""
    if not (found := bench("inspect")):
        return []
    tools = found["tools"]

    def percent(entry: dict[str, Any], key: str) -> str:
        return f"{entry[key]:+.0f} %" if key in entry else "-"

    seen = pd.DataFrame({name: entry["sees"] for name, entry in tools.items()}).rename_axis("planted")
    cost = pd.DataFrame(
        {
            name: {
                "training, every step": percent(entry, "added_percent_training"),
                "training, every tenth step": percent(entry, "added_percent_training_every_10"),
                "generation": percent(entry, "added_percent_generation"),
                "memory, MiB in 50 steps": f"{entry['mib_per_50_steps']:.1f}"
                if "mib_per_50_steps" in entry
                else "-",
            }
            for name, entry in tools.items()
        }
    ).T.rename_axis("tool")
    sections = [
        "## Watching a model",
        "Faults planted in every block of a small Mixtral (two blocks, 8 experts, K = 2), and what each tool "
        "says of them (`python -m benchmarks.inspect peers`). *Second choice only*: an expert that is busy, "
        "though never a token's first choice; nothing is wrong with it.",
        markdown(seen),
        "Processor time that watching adds, medians of ratios in one process, and what the process gains:",
        markdown(cost),
    ]
    if found.get("load_average", 0) > found.get("cores", 1):
        sections.append(
            f"The machine was busy meanwhile (load {found['load_average']:.0f} on {found['cores']} cores): "
            "the times are rough, and one below zero is noise."
        )
    if passes := found.get("pass_added_percent"):
        listed = "; ".join(f"{value:+.0f} % at {what}" for what, value in passes.items())
        sections.append(
            f"`inspect_moe` adds to a forward pass, the examination of all experts included: {listed}."
        )
    sections += (
        [f"Not installed when measured: {', '.join(missing)}."] if (missing := found["missing"]) else []
    )
    return sections


def speed_sections() -> list[str]:
    """The README's tables of what was measured into results/bench."""
    speeds = {title: bench_table(name) for name, title in BENCH_TITLES.items()}
    if not speeds[on_gpu := BENCH_TITLES["gpu"]].empty:
        processor = bench("gpu")["rows"][0]["processor"]
        speeds[f"{on_gpu} ({processor}; below 1 a peer is faster)"] = speeds.pop(on_gpu)
    sections = [text for title, t in speeds.items() if not t.empty for text in (f"{title}:", markdown(t))]
    if sections:
        sections.insert(
            0,
            "Value and gradient, ours against the fastest peer in the same run (one thread, float32 where "
            "nothing else is said; `make bench`). The limit is what the processor's products and memory "
            "could do; *goal* is the speed-up that was aimed at; where *memory, times less* is below 1, the "
            "peer takes less.",
        )
    if not (profiles := profile_table()).empty:
        sections += [MISSED, markdown(profiles)]
    if not (powers := scaling_table()).empty:
        sections += [
            "Time and memory of a step of ours grow as powers of each size alone: exponents, 95 % intervals "
            "(`python -m benchmarks scaling`; drawn in `results/bench/scaling.png`):",
            markdown(powers),
            "Seeds are runs of their own, so ten cost ten times one. Of the work that one process does in "
            f"some time (steps of the CNN with SNNL), {throughput_text()}.",
        ]
    return sections


def update_readme(path: Path, check: bool = False) -> int:
    """Write the results section of the README, and RESULTS.md beside it.

    With `check`, only say if one is out of date (exit code 1).
    """
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise store.StoreError(f"{path} must hold the two lines {BEGIN!r} and {END!r} once each")
    head, rest = text.split(BEGIN)
    wanted = {
        path: head + readme_section() + rest.split(END)[1],
        path.with_name("RESULTS.md"): results_page(),
    }
    stale = [file for file, content in wanted.items() if not file.exists() or file.read_text() != content]
    if not check:
        for name, figure in readme_pictures().items():
            plots.save(figure, f"readme/{name}")
    for file in stale:
        if check:
            print(f"{file} is out of date: run `make readme`", file=sys.stderr)
        else:
            store.write_bytes(file, wanted[file].encode())
    return int(check and bool(stale))


# ------------------------------------------------------------------------------------------- HTML


def number_figures(content: NotebookNode) -> None:
    """Give each figure of `notebook.show` what the page says of it: number, caption, sources, commands. The
    caption that the notebook shows below it goes."""
    number = 0
    for cell in content.cells:
        if "outputs" not in cell:
            continue
        told = [(output, output.get("metadata", {}).get(provenance.KEY, {})) for output in cell.outputs]
        cell.outputs = [output for output, about in told if "caption_of" not in about]
        for output, about in told:
            if "figure" in about:
                number += 1
                output.metadata["figure"] = {
                    "name": about["figure"],
                    "caption": about["caption"] or about["figure"].replace("/", " "),
                    "sources": provenance.in_words(about["sources"]),
                    "commands": provenance.commands(about["sources"]),
                    "number": number,
                    **{side: output.metadata["image/png"][side] for side in ("width", "height")},
                }


class Arranged(NamedTuple):
    """The page's content, and its sections for the list of contents."""

    body: Markup
    contents: list[dict[str, Any]]


def arrange(body: str) -> Arranged:
    """Give headings an id, fold the parts of sections (level 3) and the sections tagged "fold", let tables
    scroll, and list the contents."""
    soup = BeautifulSoup(body, "html.parser")
    for link in soup.find_all("a", class_="anchor-link"):
        link.decompose()
    contents: list[dict[str, Any]] = []
    taken: Counter[str] = Counter()
    for heading in soup.find_all(["h2", "h3", "h4"]):
        stem = re.sub(r"\W+", "-", heading.get_text().lower()).strip("-")
        taken[stem] += 1
        heading["id"] = f"{stem}--{taken[stem]}" if taken[stem] > 1 else stem
        entry: dict[str, Any] = {"id": heading["id"], "title": heading.get_text(), "parts": []}
        if heading.name == "h2":
            contents.append(entry)
        elif heading.name == "h3" and contents:
            contents[-1]["parts"].append(entry)
    for cell in soup.find_all("div", class_="cell"):
        if "fold" in cell["class"]:
            for heading in cell.find_all("h2", recursive=False):
                heading["class"] = "fold"
        cell.unwrap()  # a section may begin inside a cell and end in another
    _fold(soup, "h3", ("h2", "h3"))
    _fold(soup, "h2", ("h2",), "fold")
    for table in soup.find_all("table"):
        if table.find_parent("div", class_="scroll") is None:
            table.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
    for cell in soup.find_all("td"):
        length = len(cell.get_text())
        if length > 24 and not cell.has_attr("class"):
            cell["class"] = "long" if length > 60 else "wrap"
    return Arranged(Markup(soup.decode(formatter="html5")), contents)


def _fold(soup: BeautifulSoup, level: str, ends: Sequence[str], kind: str | None = None) -> None:
    """Put everything from a heading to the next of `ends` into <details>, the heading as its summary."""
    for heading in soup.find_all(level, class_=kind) if kind else soup.find_all(level):
        following = list(heading.next_siblings)
        until = next(
            (at for at, one in enumerate(following) if getattr(one, "name", None) in ends), len(following)
        )
        details, summary = soup.new_tag("details"), soup.new_tag("summary")
        details["class"] = "part" if level == "h3" else "section"
        heading.insert_before(details)
        summary.append(heading.extract())
        details.append(summary)
        for one in following[:until]:
            details.append(one.extract())


def render(notebook: Path, target: Path) -> None:
    """An executed notebook as one HTML page without code, scripts or network, figures embedded."""
    import nbformat
    from nbconvert import HTMLExporter

    content = nbformat.read(notebook, as_version=4)
    number_figures(content)
    exporter = HTMLExporter(
        template_name="template", extra_template_basedirs=[str(Path(__file__).parent)], exclude_input=True
    )
    exporter.register_filter("arranged", arrange)
    title = content.cells[0].source.lstrip("# ").split("\n")[0]
    page, _ = exporter.from_notebook_node(content, resources={"title": title})
    store.write_bytes(target, page.encode())


if __name__ == "__main__":
    render(Path(sys.argv[1]), Path(sys.argv[2]))
