# Orders the work: training shards, then the notebooks, then the report. `make report` calls it.
#
# The engine (moe_study.engine.ensure) decides what is trained: run files are never outputs here, because
# Snakemake deletes the outputs of a job that fails. A shard's only output is its DONE.json.
import os
from pathlib import Path

from snakemake.exceptions import WorkflowError

from moe_study import store, study

os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")

if unknown := sorted(set(config) - {"profile", "study", "shards"}):
    raise WorkflowError(f"unknown --config {unknown[0]}; known: profile, study, shards")
PROFILE = config.get("profile", "digits")
STUDY = config.get("study")  # one study alone: --config study=ac-vision
RUNS = study.runs(PROFILE, STUDY)
CODE = [path for package in store.PACKAGES for path in sorted(Path(package).rglob("*.py"))]
# As many shards as cores keep every core busy; a cluster executor may want more: --config shards=40
SHARDS = config.get("shards", workflow.cores or 1)
if type(SHARDS) is not int or SHARDS < 1:
    raise WorkflowError(f"--config shards must be an integer of 1 or more, got {SHARDS!r}")
RESULTS = store.results_dir() / PROFILE
# The planned runs name the shards' folder: a changed plan asks for new DONE files by itself.
DONE = RESULTS / ".work" / ("shards-" + store.digest([run.id for run in RUNS]))
BUILD = Path("build") / PROFILE
OR_SAY_WHY = " || (tail -n 15 {log:q} >&2; exit 1)"  # the end of a failed step's log
EXECUTED = [BUILD / f"{name}.ipynb" for name in study.notebooks(RUNS)]

if not (RESULTS / "report.html").exists():
    (BUILD / "90_report.ipynb").unlink(missing_ok=True)
for i in range(1, SHARDS + 1):  # a DONE file is true only as long as its result files are there
    if not all(run.path.exists() for run in study.shard(RUNS, f"{i}/{SHARDS}")):
        (DONE / f"{i}of{SHARDS}.json").unlink(missing_ok=True)


rule all:
    input:
        BUILD / "90_report.ipynb",
        BUILD / "00_tour.ipynb",
        EXECUTED,


rule shard:
    output:
        DONE / "{i}of{n}.json",
    threads: 1
    params:
        study=f"--study {STUDY}" if STUDY else "",
    shell:
        "python -m moe_study run --profile {PROFILE} {params.study} --shard {wildcards.i}/{wildcards.n} --workers 1"
        " --done {output:q} --follow $PPID"  # a shard ends with Snakemake, even if that is killed


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
        expand(DONE / "{i}of{n}.json", i=range(1, SHARDS + 1), n=SHARDS),
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
