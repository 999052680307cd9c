"""The README's answer, RESULTS.md and the benchmarks' tables, all made from result files alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from moe_study import store, study
from moe_study.report import (
    first_screen,
    glossary,
    map_plots,
    overview,
    plots,
    selection,
    side_by_side,
)
from moe_study.report import verdicts as words
from moe_study.report.answers import answers, notes
from moe_study.report.page import markdown
from moe_study.report.speed import inspector_sections, speed_sections

BEGIN, END = "<!-- results: begin, written by `make readme` -->", "<!-- results: end -->"


def readme_section() -> str:
    """The part of the README between its markers, from results/core: the answer, with its numbers."""
    found = selection.current(selection.find_verdicts("core"))
    if not found:
        return f"{BEGIN}\nNo finished runs yet.\n{END}"
    snnl = markdown(side_by_side.table("core", side_by_side.SNNL, README_ARMS))
    picture = f"![Every arm of every setting against the plain model, with 95 % intervals]({README_PICTURE})"
    parts = [BEGIN, answers(found, most=3), f"Test accuracy in %:\n\n{snnl}", picture, END]
    return "\n\n".join(parts)


RESULTS_MEASURES = (
    "representational collapse",
    *overview.COLLAPSE_COLUMNS,
    *overview.VISION_SCORES,
    *overview.LANGUAGE_SCORES,
)
ACCURACY_OF = ("snnl-confirm", "snnl", "collapse", "collapse-top1", "collapse-wide")
README_ARMS = ("MoE", "MoE + SNNL", "no learned gate", "no learned gate + SNNL", "dense")
README_PICTURE = "figures/readme/effects.png"


def results_page() -> str:
    """RESULTS.md: every verdict and score, from results/core."""
    profile = "core"
    results = study.results(study.runs(profile))
    machines = ", ".join(sorted({r["machine"] for r in results if r["device"] == "cpu"}))
    found = selection.current(selection.find_verdicts(profile))
    aside = [v for v in found if v.word in ("not testable here", "pilot")]
    decided = [v for v in found if v not in aside]
    reused = sum("same_as" in result for result in results)
    unused = sorted(set(first_screen.MARKS) - {v.word for v in found})
    sections = [
        "# Results",
        "Written by `make readme` from the files under `results/`. Figures, and the reasons behind each "
        "verdict, are in the report, `results/core/report.html`; speed and memory in "
        "[benchmarks/RESULTS.md](benchmarks/RESULTS.md).",
        f"Profile `core`: {len(results)} of {len(study.runs(profile))} planned runs finished, tuning "
        f"included{f', {reused} of them taken over from another study' * bool(reused)}, "
        f"{overview.core_minutes(results):.0f} core-minutes on {machines}{overview.on_gpus(results)}. "
        "Regenerate with `make report PROFILE=core`.",
        "## Words, arms and measures",
        folded_table("Words", glossary.terms_table(unused)),
        folded_table("Arms", glossary.arms_table(results)),
        folded_table("Measures", glossary.measures_table(RESULTS_MEASURES)),
        "## Every arm, side by side",
        "SNNL: test accuracy in %, last epoch, mean over seeds; its gain is paired by seed. *No learned "
        "gate*: a constant gate, or a random expert where one expert answers (top-1).",
        markdown(side_by_side.table(profile, side_by_side.SNNL)),
        "AC router: the same; text in nats of cross-entropy.",
        markdown(side_by_side.table(profile, side_by_side.AC)),
        folded_table(
            "SNNL by accuracy, which decides, and by cross-entropy, which no claim declared; every arm was "
            "tuned on validation cross-entropy",
            side_by_side.both_scores(profile),
        ),
        "## The answers, and what stands beside them",
        answers(found),
        notes(found),
        *_map(profile),
        "## Verdicts",
        f"{words.tally(found)} {selection.unfinished(profile)}".strip(),
        first_screen.scope(found),
        "One row a claim, data set and control, at the last epoch, paired by seed: mean difference, 95 % t "
        "interval, exact sign-flip p of the claim (Holm over the units of a study; 1 where the mean lies "
        "on the other side). *Counts from*: the published difference, or a declared margin; *supported* asks "
        "only for the sign, *smaller than claimed* is measured by it. Fewer than eight seeds are a pilot: "
        "shown, never decided. †: an older unit, measured at the epoch of the lowest validation "
        "cross-entropy.",
        markdown(words.table(decided)),
        folded_table(f"The other {len(aside)}: not testable here, or pilots", words.table(aside)),
        folded_table(
            "What each verdict depends on: margin, checkpoint, test images, seeds (=: the same word)",
            words.firmness(decided),
        ),
        "## SNNL",
        "Published accuracies (second-hand, from a summary of the paper) beside ours, in %, last epoch:",
        markdown(overview.published_table(profile)),
        *_accuracies(profile),
        "Test accuracy on each of the three domains (chance is 10 %), last epoch, mean ± standard deviation:",
        markdown(overview.domain_table(profile)),
        "What SNNL adds there. The domains have equally many test images: the mean is the gain above.",
        markdown(overview.domain_gains(profile)),
        "Is there collapse? Of four experts, or of as many as the row says; mean ± standard deviation over "
        "seeds. Older files measured it at the epoch of the lowest validation cross-entropy:",
        markdown(overview.collapse_table(profile)),
    ]
    for name, title in (
        ("ac-vision", "The AC router, images"),
        ("ac-language", "The AC router, text"),
        ("crossed", "Both remedies crossed, images (`base`: cosine router, no SNNL)"),
    ):
        table = overview.scores_table(profile, name)
        if not table.empty:
            said = f"Mean ± standard deviation over seeds. {overview.endpoints_in_words(profile, name)}"
            sections += [f"## {title}", said.strip(), markdown(table)]
    return "\n\n".join(sections) + "\n"


def _map(profile: str) -> list[str]:
    """What the map over sizes says of expert width."""
    found = selection.finished_runs(profile, "collapse-map")
    return [
        text
        for dataset, runs in found.items()
        for text in (
            f"A map over sizes of the model on {plots.DATASET_TITLES[dataset]}, which explores: differences "
            "in accuracy by expert width, the mean over sizes of the median over seeds; in brackets, in how "
            "many sizes that median lies below 0. The size that was confirmed has width 4.",
            markdown(map_plots.by_width(study.results(runs))),
        )
    ]


def speed_page() -> str:
    """benchmarks/RESULTS.md, from results/bench."""
    head = ["# Speed and memory", "Written by `make readme` from the files under `results/bench`."]
    return "\n\n".join([*head, *speed_sections(), *inspector_sections()]) + "\n"


def folded_table(summary: str, table: pd.DataFrame) -> str:
    """A Markdown table that a click opens."""
    return f"<details><summary>{summary}</summary>\n\n{markdown(table)}\n\n</details>"


def _accuracies(profile: str) -> list[str]:
    """A table of each study of the SNNL family that has results."""
    title = "Test accuracy in %, last epoch, mean ± standard deviation (seeds)"
    found = {name: overview.accuracy_table(profile, name) for name in ACCURACY_OF}
    return [
        text
        for name, own in found.items()
        if not own.empty
        for text in (f"{title}; study `{name}`:", markdown(own))
    ]


def update_readme(path: Path, check: bool = False) -> int:
    """Write the results section of the README, and both pages of results beside and below it.

    With `check`, only say if one is out of date (exit code 1).
    """
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise store.StoreError(f"{path} must hold the two lines {BEGIN!r} and {END!r} once each")
    head, rest = text.split(BEGIN)
    wanted = {
        path: head + readme_section() + rest.split(END)[1],
        path.with_name("RESULTS.md"): results_page(),
        path.parent / "benchmarks" / "RESULTS.md": speed_page(),
    }
    stale = [file for file, content in wanted.items() if not file.exists() or file.read_text() != content]
    if not check:
        plots.save(side_by_side.effects("core"), "readme/effects")
    for file in stale:
        if check:
            print(f"{file} is out of date: run `make readme`", file=sys.stderr)
        else:
            store.write_bytes(file, wanted[file].encode())
    return int(check and bool(stale))
