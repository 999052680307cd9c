"""The grid on a real Slurm of three nodes: one is cut, the driver is killed, a daemon dies alone.

    make cluster                     as CI runs it
    make cluster RECORD=1            also writes what happened to results/cluster/nodes.json

Every number is compared with that of a grid trained here, without Slurm: in the results folder TRAINED, if
that is set.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import recorded
import slurm_nodes
import small_runs
from slurm_nodes import Slurm, eventually

from moe_study import plan, store, study
from moe_study.data import ROOT

FOLDER = ROOT / "results" / "cluster"
RECORD = os.environ.get("CLUSTER_RECORD")
STUDIES = ("snnl", "snnl-dose")
ONCE = ["--retries", "0", "--set-resources", "shard:runtime=5"]
# Faster than the committed profile, whose waiting times suit jobs of minutes.
HASTE = ["--slurm-init-seconds-before-status-checks", "3", "--latency-wait", "5"]


def on_slurm(test: Callable) -> Callable:
    """Only `make cluster` runs it, and it is skipped where Slurm is missing."""
    missing = slurm_nodes.missing()
    return pytest.mark.cluster(pytest.mark.skipif(missing is not None, reason=str(missing))(test))


def grid() -> list[study.Run]:
    return [run for name in STUDIES for run in study.runs("digits", name)]


class Driver:
    """Snakemake with the committed profile, in a folder that the nodes share."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.output = folder / "driver.out"
        folder.mkdir(exist_ok=True)
        for name in ("Snakefile", "profiles", "notebooks", *store.PACKAGES):
            if not (folder / name).exists():
                (folder / name).symlink_to(ROOT / name)
        python = str(Path(sys.executable).parent)
        self.environment = slurm.environment | {
            "PATH": os.pathsep.join([python, slurm.environment["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def start(self, *more: str) -> subprocess.Popen:
        line = [sys.executable, "-m", "snakemake", "--workflow-profile", "profiles/slurm", *HASTE, *more]
        line += ["--config", "profile=digits", f"study={','.join(STUDIES)}", "--", "shards"]
        with self.output.open("a") as output:
            return subprocess.Popen(
                line,
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


@pytest.fixture
def shared(folders):
    """The folder that all nodes see, with nothing in it."""
    return folders


def holders(runs: list[study.Run]) -> dict[str, study.Run]:
    """Which node trains which run, by the locks; only those that have a checkpoint already."""
    found = {}
    for run in runs:
        try:
            host = re.search(r"\bnode\d+\b", (run.workspace / "lease").read_text())
        except OSError:
            continue
        if host and (run.workspace / "checkpoint.pt").exists():
            found[host[0]] = run
    return found


def finished(runs: list[study.Run]) -> int:
    return sum(run.path.exists() for run in runs)


def wait_for_training(runs: list[study.Run], node: str, driver: subprocess.Popen) -> study.Run:
    """Until that node has a run under way, some epochs old."""

    def at_it() -> bool:
        assert driver.poll() is None, "the driver ended"
        return node in holders(runs)

    eventually(f"{node} trains", at_it, 600)
    return holders(runs)[node]


def recorded_as(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def record(name: str, content: dict) -> None:
    """Write a file of results, and the table in REPRODUCIBILITY.md anew."""
    store.write(FOLDER / f"{name}.json", content | store.provenance())
    recorded.show("cluster", lines_of(recorded_as("nodes"), recorded_as("scaling")))


def lines_of(befell: dict, scaling: dict) -> str:
    """What happened and how it scaled, as Markdown."""
    lines = [
        f"{befell['runs']} runs on {befell['nodes']} Slurm nodes, all on one machine ({befell['machine']}); "
        f"{befell['equal']} of {befell['runs']} ended with the numbers of a grid trained without Slurm:",
        *("", "| second | runs done | what was done | what was seen |", "|---|---|---|---|"),
        *(f"| {row['at']} | {row['done']} | {row['what']} | {row['outcome']} |" for row in befell["rows"]),
        "",
        f"The same grid undisturbed; the nodes share {scaling['cores']} cores, so training takes longer "
        f"the more of them work. A job took {scaling['start']:.0f} s beside its runs:",
        *("", "| nodes | wall, s | training, s, summed | simulated wall, s |", "|---|---|---|---|"),
        *(
            f"| {row['nodes']} | {row['wall']:.0f} | {row['training']:.0f} | {row['simulated']:.0f} |"
            for row in scaling["rows"]
        ),
        "",
    ]
    return "\n".join(lines)


def test_the_page_shows_what_is_recorded():
    befell = recorded_as("nodes")
    assert befell["equal"] == befell["runs"]
    assert recorded.shown("cluster") == lines_of(befell, recorded_as("scaling"))


@on_slurm
def test_what_may_befall_a_grid(shared, monkeypatch):
    runs = grid()
    assert len(runs) >= 40
    happened = []
    begun = time.monotonic()

    def note(what: str, outcome: str) -> None:
        happened.append(
            {"at": round(time.monotonic() - begun), "done": finished(runs), "what": what, "outcome": outcome}
        )
        print(happened[-1], flush=True)

    with Slurm(shared / "slurm") as slurm:
        driver = Driver(slurm, shared / "work")
        first = driver.start()
        lost = wait_for_training(runs, "node2", first)
        slurm.cut(2)
        note("node2 cut while it trained", f"{lost.arm} seed {lost.seed} was under way")
        before = {run.path: run.path.read_bytes() for run in runs if run.path.exists()}
        eventually("Slurm sees it", lambda: "down" in slurm.ask("sinfo", "-N", "-h", "-n", "node2"), 120)
        slurm.start(2)

        wait_for_training(runs, "node1", first)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        alive = len(slurm.ask("squeue", "-h", "-t", "R").splitlines())
        second = driver.start()
        note("the driver killed and started again", f"{alive} of its jobs lived on")

        split = wait_for_training(runs, "node3", second)
        slurm.kill_daemon(3)
        note("slurmd of node3 killed, its job lived", f"{split.arm} seed {split.seed} was under way")

        status = second.wait(timeout=1500)
        said = driver.output.read_text()
        assert status == 0, said[-5000:]
        note("all shards done", "the driver's exit status was 0")
    assert {path: path.read_bytes() for path in before} == before  # what was finished was kept

    on_cluster = [small_runs.numbers(study.read(run)) for run in runs]
    monkeypatch.setenv("MOE_RESULTS_DIR", os.environ.get("TRAINED") or str(shared / "alone"))
    alone = [small_runs.numbers(result) for result in study.ensure(runs, workers=2, quiet=True)]
    equal = sum(a == b for a, b in zip(on_cluster, alone, strict=True))
    if RECORD:
        record("nodes", {"nodes": 3, "runs": len(runs), "equal": equal, "rows": happened})
    assert equal == len(runs)


@on_slurm
def test_a_node_without_the_shared_folder_is_named(shared):
    """Slurm says FAILED and nothing else; the driver says which node misses which folder."""
    hook = f"mount -t tmpfs -o size=1m none {shared}"
    with Slurm(shared.parent / "slurm-missing", nodes=1, hooks={1: hook}) as slurm:
        driver = Driver(slurm, shared / "work")
        assert driver.start(*ONCE).wait(timeout=600) != 0
    assert f"node1: {shared / 'work'} is not there" in driver.output.read_text()


@on_slurm
def test_a_full_shared_folder_is_named_with_the_node(shared):
    results = store.results_dir()
    results.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(results)], check=True)
    try:
        with Slurm(shared.parent / "slurm-full", nodes=1) as slurm:
            driver = Driver(slurm, shared / "work")
            process = driver.start(*ONCE)
            eventually("the plan is written", lambda: list(results.rglob("shards.json")))
            with pytest.raises(OSError, match="No space"):
                (results / "filler").write_bytes(bytes(2**20))
            assert process.wait(timeout=600) != 0
            text = driver.output.read_text()
    finally:
        subprocess.run(["umount", "--lazy", str(results)], check=True)
    assert f"node1: {results / 'digits'} cannot be written" in text
    assert f"node1: {shared / 'work'} can be written" in text


@on_slurm
@pytest.mark.skipif(not RECORD, reason="measures: CLUSTER_RECORD=1")
def test_scaling(folders, monkeypatch):
    """Wall time of the whole grid at 1, 2 and 3 nodes, and what the simulation says."""
    runs, rows = grid(), []
    for nodes in (1, 2, 3):
        monkeypatch.setenv("MOE_RESULTS_DIR", str(folders / f"results-{nodes}"))
        with Slurm(folders / f"slurm-{nodes}", nodes) as slurm:
            begun = time.monotonic()
            assert Driver(slurm, folders / f"work-{nodes}").start().wait(timeout=1800) == 0
            wall = time.monotonic() - begun
        parts = plan.read_shards(next(store.results_dir().rglob("shards.json")))
        took = {run.id: study.read(run)["wall_seconds"] for run in runs}
        seconds = [sum(took[run_id] for run_id in part.runs) for part in parts]
        if nodes == 1:
            alone = seconds
            start = (wall - sum(alone)) / len(alone)
        simulated = plan.simulate(alone, nodes, start).wall
        rows.append({"nodes": nodes, "wall": wall, "training": sum(seconds), "simulated": simulated})
    record("scaling", {"cores": os.cpu_count(), "load": os.getloadavg(), "start": start, "rows": rows})
