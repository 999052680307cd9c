"""Which runs and verdicts of a profile are shown: confirmatory sets only where they are whole."""

from __future__ import annotations

from collections.abc import Sequence

from moe_study import study, verdicts
from moe_study.claims import CLAIMS
from moe_study.configs.arms import CONFIRMATORY
from moe_study.report.plots import DATASET_TITLES
from moe_study.verdicts import Verdict


def finished_runs(profile: str, study_name: str) -> dict[str, list[study.Run]]:
    """Runs with results, by data set, in the order of the profile; data sets without any are left out."""
    return _finished(study.runs(profile, study_name))


def evidence(profile: str, study_name: str) -> dict[str, list[study.Run]]:
    """The same of `study.evidence`: confirmatory runs where they are whole."""
    if study_name in CONFIRMATORY:
        return whole_runs(profile, study_name)
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
    done = study.whole(study.runs(profile, study_name))
    return {dataset: runs for dataset, runs in found.items() if dataset in done}


def find_verdicts(profile: str, explored: Sequence[str] = ()) -> list[Verdict]:
    """Every claim on every data set with results: confirmatory ones first, pilots last.

    A confirmatory set that is not whole is left out: nobody is to look at it before it is.

    Args:
        explored: the claims of these exploring studies alone.
    """
    studies = [*CONFIRMATORY, *(claim.study for claim in CLAIMS)]
    found = []
    for name in dict.fromkeys(studies):
        if explored and CONFIRMATORY.get(name, name) not in explored:
            continue
        whole = whole_runs(profile, name).values()
        found += verdicts.verdicts([result for runs in whole for result in study.results(runs)], name)
    return sorted(found, key=lambda verdict: verdict.word == "pilot")


def current(found: Sequence[Verdict]) -> list[Verdict]:
    """Those that count: an exploratory verdict gives way where a confirmatory one is no pilot."""

    def unit(verdict: Verdict) -> tuple[str, str, str]:
        return verdict.claim.key, verdict.dataset, verdict.control

    confirmed = {unit(v) for v in found if v.confirmatory and v.word != "pilot"}
    return [v for v in found if v.confirmatory or unit(v) not in confirmed]


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
