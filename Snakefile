# Orders the work: training shards, then the notebooks, then the report. `make report` calls it.
#
# The engine (moe_study.engine.ensure) decides what is trained: run files are never outputs here, because
# Snakemake deletes the outputs of a job that fails. A shard's only output is its DONE.json.
#
# On one machine there are as many shards as cores. Under a cluster executor (profiles/slurm) shards hold
# minutes of work each, see moe_study/plan.py. A job reads this file anew, when other runs are finished and
# other cores are there; so what was planned is written to a file, and its name passed on in MOE_SHARDS. A job
# imports nothing of the study here, which takes seconds.
import json
import os
import shutil
from pathlib import Path

from snakemake.exceptions import WorkflowError

os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")

OPTIONS = {"profile", "study", "shards", "minutes", "gpus", "workers"}
if unknown := sorted(set(config) - OPTIONS):
    raise WorkflowError(f"unknown --config {unknown[0]}; known: {', '.join(sorted(OPTIONS))}")


def integer(name, default, least=1):
    value = config.get(name, default)
    if type(value) is not int or value < least:
        raise WorkflowError(f"--config {name} must be an integer of {least} or more, got {value!r}")
    return value


PROFILE = config.get("profile", "digits")
STUDY = config.get("study")  # one study alone: --config study=ac-vision; on a cluster several: snnl,crossed
GPUS = integer("gpus", 0, least=0)  # that a shard asks for
WORKERS = integer("workers", 1)  # processes of a shard: several may share its GPU
PACKAGES = ("moe_lib", "moe_study", "benchmarks")
CODE = [path for package in PACKAGES for path in sorted(Path(package).rglob("*.py"))]
BUILD = Path("build") / PROFILE
OR_SAY_WHY = " || (tail -n 15 {log:q} >&2; exit 1)"  # the end of a failed step's log

PLANNED = "shards" not in config and not (workflow.is_main_process and workflow.resource_settings.nodes is None)
PARTS, PLAN = [], ""
if workflow.is_main_process or not PLANNED:
    from moe_study import plan, store, study

    STUDIES = STUDY.split(",") if STUDY and PLANNED else [STUDY]
    RUNS = [run for name in STUDIES for run in study.runs(PROFILE, name)]
    RESULTS = store.results_dir() / PROFILE
    NOTEBOOKS = study.notebooks(RUNS)
    if PLANNED:
        os.environ["MOE_SHARDS"] = str(plan.write_shards(RUNS, RESULTS / ".work", integer("minutes", 5)))
if PLANNED:
    if "MOE_SHARDS" not in os.environ:
        raise WorkflowError("MOE_SHARDS is not set: the executor must pass the environment on to its jobs")
    PLAN = os.environ["MOE_SHARDS"]
    DONE = Path(PLAN).parent
    RESULTS = DONE.parent.parent
    PARTS, NOTEBOOKS = json.loads(Path(PLAN).read_text()).values()
    SHARDS = len(PARTS)
else:
    # As many shards as cores keep every core busy.
    SHARDS = integer("shards", None) if "shards" in config else workflow.cores
    # The planned runs name the shards' folder: a changed plan asks for new DONE files by itself.
    DONE = RESULTS / ".work" / ("shards-" + store.digest([run.id for run in RUNS]))
    for i in range(1, SHARDS + 1):  # a DONE file is true only as long as its result files are there
        if not all(run.path.exists() for run in study.shard(RUNS, f"{i}/{SHARDS}")):
            (DONE / f"{i}of{SHARDS}.json").unlink(missing_ok=True)
EXECUTED = [BUILD / f"{name}.ipynb" for name in NOTEBOOKS]

if workflow.is_main_process and not (RESULTS / "report.html").exists():
    (BUILD / "90_report.ipynb").unlink(missing_ok=True)


def planned(name):
    """A shard's entry in the plan; 0 without one, so nothing is asked for. More with every attempt."""
    return lambda wildcards, attempt: int(attempt * PARTS[int(wildcards.i) - 1][name]) if PARTS else 0


rule all:
    input:
        BUILD / "90_report.ipynb",
        BUILD / "00_tour.ipynb",
        EXECUTED,


rule shards:
    input:
        [DONE / f"{i}of{SHARDS}.json" for i in range(1, SHARDS + 1)],


rule shard:
    output:
        DONE / "{i}of{n}.json",
    threads: WORKERS
    priority: lambda wildcards: planned("seconds")(wildcards, 1)  # the longest first
    params:
        study=f"--study {STUDY}" if STUDY and not PLANNED else "",
        plan=f"--plan {PLAN}" if PLAN else "",
    resources:
        mem_mb=lambda wildcards, attempt: WORKERS * planned("memory_mb")(wildcards, attempt),
        runtime=planned("limit_minutes"),
        gpu=lambda wildcards: GPUS if planned("gpu")(wildcards, 1) else 0,
    shell:
        "python -m moe_study run --profile {PROFILE} {params.study} --shard {wildcards.i}/{wildcards.n}"
        " {params.plan} --workers {WORKERS} --done {output:q}"
        " --follow $PPID"  # a shard ends with Snakemake, even if that is killed


rule tour:
    input:
        "notebooks/00_tour.ipynb",
        CODE,
    output:
        BUILD / "00_tour.ipynb",
    log:
        BUILD / "00_tour.log",
    shell:
        "papermill --no-progress-bar {input[0]:q} {output:q} > {log:q} 2>&1" + OR_SAY_WHY


rule study:
    input:
        "notebooks/{notebook}.ipynb",
        rules.shards.input,
        CODE,
    output:
        BUILD / "{notebook}-{dataset}.ipynb",
    log:
        BUILD / "{notebook}-{dataset}.log",
    shell:
        "papermill --no-progress-bar {input[0]:q} {output:q}"
        " -p profile {PROFILE} -p dataset {wildcards.dataset} > {log:q} 2>&1" + OR_SAY_WHY


rule report:  # of the result files, so that it need not wait for the other notebooks
    input:
        "notebooks/90_report.ipynb",
        rules.study.input[1:],
    output:
        BUILD / "90_report.ipynb",
    log:
        BUILD / "90_report.log",
    params:
        page=RESULTS / "report.html",
    shell:
        "(papermill --no-progress-bar {input[0]:q} {output:q} -p profile {PROFILE}"
        " && python -m moe_study.report.page {output:q} {params.page:q}) > {log:q} 2>&1" + OR_SAY_WHY


onerror:
    # A job whose node lacks the shared folder leaves no log: ask the node.
    if Path("profiles/slurm/why.sh").exists() and PLANNED and shutil.which("srun"):
        shell("profiles/slurm/why.sh {log:q} {workflow.basedir:q} {RESULTS:q}")
