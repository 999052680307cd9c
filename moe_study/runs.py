"""Every study's plan, and the runs of a profile."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from moe_study.configs import ac_language, ac_vision, collapse, crossed, dose, snnl
from moe_study.configs.arms import CONFIRMATORY, PROFILES
from moe_study.configs.run import Plan, Run, StudyError
from moe_study.data import text

_FAMILIES = (snnl, ac_vision, ac_language, crossed, collapse, dose)
_PLANS = {name: plan for family in _FAMILIES for name, plan in family.STUDIES.items()}
# In the order of their priority; tuning, which is done, comes last.
STUDIES: dict[str, Plan] = dict(sorted(_PLANS.items(), key=lambda item: item[0].endswith("-tuning")))


def runs(
    profile: str, study: str | None = None, dataset: str | None = None, arm: str | None = None
) -> list[Run]:
    """The runs of a profile, narrowed to a study, data set or arm.

    Args:
        arm: one name, or several with commas between them: then all arms of a seed come before the next seed.

    Raises:
        StudyError: one of the names is unknown, or the profile has no such combination of study, data set
            and arm. Of a study that the profile lacks the list is empty.
    """
    if profile not in PROFILES:
        raise StudyError(f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")
    if study is not None and study not in STUDIES:
        raise StudyError(f"unknown study {study!r}; known: {', '.join(STUDIES)}")
    found = [run for name, plan in STUDIES.items() if study in (None, name) for run in plan(profile)]
    arms = None if arm is None else arm.split(",")
    for field, wanted in (("dataset", None if dataset is None else [dataset]), ("arm", arms)):
        if wanted is not None:
            known = sorted({getattr(run, field) for run in found})
            if unknown := [name for name in wanted if name not in known]:
                where = f"study {study!r} of profile" if study else "profile"
                raise StudyError(
                    f"unknown {field} {unknown[0]!r} in {where} {profile!r}; "
                    f"known: {', '.join(known) or 'none'}"
                )
            found = [run for run in found if getattr(run, field) in wanted]
    if arms is not None and len(arms) > 1:
        seeds = list(dict.fromkeys(run.seed for run in found))
        found.sort(key=lambda run: seeds.index(run.seed))
    return found


def evidence(profile: str, study: str, dataset: str | None = None) -> list[Run]:
    """What speaks for a study: on each data set the runs of its confirmation where all of them are finished,
    else its own; a data set of the confirmation alone, asked for by name, as planned.
    Raises as `runs` does."""
    confirming = [name for name, confirms in CONFIRMATORY.items() if study == confirms != name]
    confirmed = [
        run for name in confirming for run in STUDIES[name](profile) if dataset in (None, run.dataset)
    ]
    if dataset and confirmed and not any(run.dataset == dataset for run in runs(profile, study)):
        return confirmed
    own = runs(profile, study, dataset)
    done = whole(confirmed)
    return [
        *(run for run in own if run.dataset not in done),
        *(run for run in confirmed if run.dataset in done),
    ]


def whole(planned: Sequence[Run]) -> set[str]:
    """The data sets of which every run has its result file."""
    return {run.dataset for run in planned} - {run.dataset for run in planned if not run.path.exists()}


def with_text(wanted: Sequence[Run], path: str) -> list[Run]:
    """The same language runs on another text: any UTF-8 file.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or too short.
    """
    text.load(path)
    return [replace(run, dataset=path, text_digest=text.file_digest(path)) for run in wanted]


def shard(wanted: list[Run], part: str) -> list[Run]:
    """The i-th of n interleaved parts of a list of runs; `part` is "i/n", counted from 1."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", part)
    i, n = map(int, found.groups()) if found else (0, 0)
    if not 1 <= i <= n:
        raise StudyError(f"a shard is written i/n with 1 <= i <= n, got {part!r}")
    return wanted[i - 1 :: n]


# The notebook of a study, which `make report` runs once for each of its data sets.
NOTEBOOKS = {
    "snnl": "10_snnl_moe",
    "snnl-confirm": "10_snnl_moe",
    "collapse": "11_collapse",
    "collapse-top1": "11_collapse",
    "collapse-map": "11_collapse",
    "ac-vision": "20_ac_vision",
    "ac-vision-confirm": "20_ac_vision",
    "ac-vision-trained": "20_ac_vision",
    "ac-language": "21_ac_language",
    "ac-language-confirm": "21_ac_language",
    "crossed": "30_snnl_x_ac",
    "snnl-dose": "50_dose_response",
    "snnl-batches": "50_dose_response",
}


def notebooks(wanted: Sequence[Run]) -> list[str]:
    """Names of the executed notebooks of these runs, without those of the tour and the report."""
    return list(
        dict.fromkeys(f"{NOTEBOOKS[run.study]}-{run.dataset}" for run in wanted if run.study in NOTEBOOKS)
    )
