# Orders the work: training shards, then the notebooks, then the report. `make report` calls it.
#
# The engine (moe_study.study.ensure) decides what is trained: run files are never outputs here, because
# Snakemake deletes the outputs of a job that fails. A shard's only output is its DONE.json.
#
# On one machine there are as many shards as cores. Under a cluster executor (profiles/slurm) shards hold
# minutes of work each, see moe_study/plan.py. A job reads this file anew, when other runs are finished and
# other cores are there; so the list of shards is written to a file, and its name passed on in MOE_SHARDS.
import os
from pathlib import Path

from snakemake.exceptions import WorkflowError

from moe_study import plan, store, study

os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")

OPTIONS = {"profile", "study", "shards", "minutes", "gpus", "workers"}
if unknown := sorted(set(config) - OPTIONS):
    raise WorkflowError(f"unknown --config {unknown[0]}; known: {', '.join(sorted(OPTIONS))}")


def positive(name, default, least=1):
    value = config.get(name, default)
    if type(value) is not int or value < least:
        raise WorkflowError(f"--config {name} must be an integer of {least} or more, got {value!r}")
    return value


PROFILE = config.get("profile", "digits")
STUDY = config.get("study")  # one study alone: --config study=ac-vision
GPUS = positive("gpus", 0, least=0)  # that a shard asks for
WORKERS = positive("workers", 1)  # processes of a shard: several may share its GPU
RUNS = study.runs(PROFILE, STUDY)
CODE = [path for package in store.PACKAGES for path in sorted(Path(package).rglob("*.py"))]
RESULTS = store.results_dir() / PROFILE
WORK = RESULTS / ".work"
BUILD = Path("build") / PROFILE
EXECUTED = [BUILD / f"{name}.ipynb" for name in study.notebooks(RUNS)]

PARTS, PLAN = None, ""
if "shards" in config or (workflow.is_main_process and workflow.resource_settings.nodes is None):
    # As many shards as cores keep every core busy.
    SHARDS = positive("shards", None) if "shards" in config else workflow.cores
    # The planned runs name the shards' folder: a changed plan asks for new DONE files by itself.
    DONE = WORK / ("shards-" + store.digest([run.id for run in RUNS]))
    for i in range(1, SHARDS + 1):  # a DONE file is true only as long as its result files are there
        if not all(run.path.exists() for run in study.shard(RUNS, f"{i}/{SHARDS}")):
            (DONE / f"{i}of{SHARDS}.json").unlink(missing_ok=True)
else:
    if workflow.is_main_process:
        os.environ["MOE_SHARDS"] = str(plan.write_shards(RUNS, WORK, positive("minutes", 5)))
    if "MOE_SHARDS" not in os.environ:
        raise WorkflowError("MOE_SHARDS is not set: the executor must pass the environment on to its jobs")
    PLAN = os.environ["MOE_SHARDS"]
    PARTS = plan.read_shards(Path(PLAN))
    SHARDS, DONE = len(PARTS), Path(PLAN).parent

if workflow.is_main_process and not (RESULTS / "report.html").exists():
    (BUILD / "90_report.ipynb").unlink(missing_ok=True)


def part(wildcards):
    """What the plan knows of a shard; without one, nothing is asked for."""
    return PARTS[int(wildcards.i) - 1] if PARTS else plan.Part([], 0, 0, False)


rule all:
    input:
        BUILD / "90_report.ipynb",


rule shard:
    output:
        DONE / "{i}of{n}.json",
    threads: WORKERS
    priority: lambda wildcards: int(part(wildcards).seconds)  # the longest first
    params:
        study=f"--study {STUDY}" if STUDY else "",
        plan=f"--plan {PLAN}" if PLAN else "",
    resources:
        mem_mb=lambda wildcards, attempt: attempt * WORKERS * part(wildcards).memory_mb,
        runtime=lambda wildcards, attempt: attempt * part(wildcards).limit_minutes,
        gpu=lambda wildcards: GPUS if part(wildcards).gpu else 0,
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
        "papermill --no-progress-bar {input[0]:q} {output:q} > {log:q} 2>&1"


rule study:
    input:
        "notebooks/{notebook}.ipynb",
        expand(DONE / "{i}of{n}.json", i=range(1, SHARDS + 1), n=SHARDS),
        CODE,
    output:
        BUILD / "{notebook}-{dataset}.ipynb",
    log:
        BUILD / "{notebook}-{dataset}.log",
    shell:
        "papermill --no-progress-bar {input[0]:q} {output:q}"
        " -p profile {PROFILE} -p dataset {wildcards.dataset} > {log:q} 2>&1"


rule report:
    input:
        "notebooks/90_report.ipynb",
        BUILD / "00_tour.ipynb",
        EXECUTED,
    output:
        BUILD / "90_report.ipynb",
    log:
        BUILD / "90_report.log",
    params:
        page=RESULTS / "report.html",
    shell:
        "(papermill --no-progress-bar {input[0]:q} {output:q} -p profile {PROFILE}"
        " && python -m moe_study.report.page {output:q} {params.page:q}) > {log:q} 2>&1"
