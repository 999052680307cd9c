"""What a notebook or a script calls: the runs of a profile, and the engine that trains and reads them."""

from moe_study.configs.dose import dose_study
from moe_study.configs.run import Run, StudyError
from moe_study.engine import ensure, execute, leftovers, missing_data, read, results, twin, write
from moe_study.runs import NOTEBOOKS, PROFILES, STUDIES, evidence, notebooks, runs, shard, whole, with_text

__all__ = [
    "NOTEBOOKS",
    "PROFILES",
    "STUDIES",
    "Run",
    "StudyError",
    "dose_study",
    "ensure",
    "evidence",
    "execute",
    "leftovers",
    "missing_data",
    "notebooks",
    "read",
    "results",
    "runs",
    "shard",
    "twin",
    "whole",
    "with_text",
    "write",
]
