"""The README's answer and RESULTS.md, both made from result files alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from moe_study import store, study
from moe_study.report import (
    collapse_plots,
    first_screen,
    glossary,
    overview,
    plots,
    selection,
    verdict_plots,
)
from moe_study.report import verdicts as words
from moe_study.report.answers import answers
from moe_study.report.page import markdown
from moe_study.report.speed import inspector_sections, speed_sections

BEGIN, END = "<!-- results: begin, written by `make readme` -->", "<!-- results: end -->"


def readme_section() -> str:
    """The part of the README between its markers, from results/core: the answer, with its numbers."""
    found = selection.current(selection.find_verdicts("core"))
    if not found:
        return f"{BEGIN}\nNo finished runs yet.\n{END}"
    parts = [BEGIN, answers(found, most=4), first_screen.scope(found, models=False)]
    parts.append(
        f"![Every claim on every data set: verdict, difference, 95 % interval]({README_PICTURES['verdicts']})"
    )
    if selection.whole_runs("core", "collapse"):
        parts.append(
            "Mean gate of each domain (one seed): SNNL spreads it, and separates domains less.\n\n"
            f"![Mean gate of each domain without and with SNNL]({README_PICTURES['routing']})"
        )
    return "\n\n".join(parts) + f"\n\n{END}"


RESULTS_MEASURES = (
    "representational collapse",
    *overview.COLLAPSE_COLUMNS,
    *overview.VISION_SCORES,
    *overview.LANGUAGE_SCORES,
)
ACCURACY_OF = ("snnl-confirm", "snnl", "collapse", "collapse-top1", "collapse-wide")
README_PICTURES = {"verdicts": "figures/readme/verdicts.png", "routing": "figures/readme/routing.png"}


def readme_pictures() -> dict[str, Figure]:
    """The README's two pictures, from results/core."""
    pictures = {}
    if found := selection.current(selection.find_verdicts("core")):
        pictures["verdicts"] = verdict_plots.verdict_grid(first_screen.grid(found))
    for runs in selection.whole_runs("core", "collapse").values():
        shown = [run for run in runs if run.arm in ("base", "snnl")]
        pictures.setdefault("routing", collapse_plots.domain_routing(study.results(shown)))
    return pictures


def results_page() -> str:
    """RESULTS.md: every verdict, accuracy and cost, from results/core and results/bench."""
    profile = "core"
    results = study.results(study.runs(profile))
    machines = ", ".join(sorted({r["machine"] for r in results if r["device"] == "cpu"}))
    found = selection.current(selection.find_verdicts(profile))
    unused = sorted(set(first_screen.MARKS) - {v.word for v in found})
    sections = [
        "# Results",
        "Written by `make readme` from the files under `results/`. Figures, and the reasons behind each "
        "verdict, are in the rendered report, `results/core/report.html`.",
        f"Profile `core`: {len(results)} of {len(study.runs(profile))} planned runs finished, tuning "
        f"included, {overview.core_minutes(results):.0f} core-minutes on {machines}"
        f"{overview.on_gpus(results)}. "
        "Regenerate with `make report PROFILE=core`.",
        "## Words, arms and measures",
        folded_table("Words", glossary.terms_table(unused)),
        folded_table("Arms", glossary.arms_table(results)),
        folded_table("Measures", glossary.measures_table(RESULTS_MEASURES)),
        "## Verdicts",
        f"{words.tally(found)} {selection.unfinished(profile)}".strip(),
        answers(found),
        first_screen.scope(found),
        "One row a claim, data set and control, at the last epoch, paired by seed: mean difference, 95 % t "
        "interval, exact sign-flip p of the claim (Holm over the units of a study; 1 where the mean lies "
        "on the other side). *Counts from*: the published difference, or a declared margin; *supported* asks "
        "only for the sign, *smaller than claimed* is measured by it. Fewer than eight seeds are a pilot: "
        "shown, never decided. †: an older unit, measured at the epoch of the lowest validation "
        "cross-entropy.",
        markdown(words.table(found)),
        "What each verdict depends on: the margin, the checkpoint, the test images, the number of seeds.",
        markdown(words.firmness(found)),
        "## SNNL",
        "Published accuracies (second-hand, from a summary of the paper) beside ours, in %, last epoch:",
        markdown(overview.published_table(profile)),
        *_accuracies(profile),
        "Test accuracy on each of the three domains (chance is 10 %), last epoch, mean ± standard deviation:",
        markdown(overview.domain_table(profile)),
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
    sections += ["## Speed and memory", *speed_sections(), *inspector_sections()]
    return "\n\n".join(sections) + "\n"


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
