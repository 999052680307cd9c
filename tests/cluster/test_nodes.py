"""The grid on a real Slurm of three nodes: one is cut, the driver is killed, a daemon dies alone.

    make cluster                     as CI runs it
    make cluster RECORD=1            also writes what happened to results/cluster/nodes.json

Every number is compared with that of a grid trained here, without Slurm.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_nodes
import small_runs
from slurm_nodes import Slurm, eventually

from moe_study import plan, store, study
from moe_study.data import ROOT

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(slurm_nodes.missing() is not None, reason=str(slurm_nodes.missing())),
]
RECORD = os.environ.get("CLUSTER_RECORD")
STUDIES = ("snnl", "snnl-dose")
# Faster than the committed profile, whose waiting times suit jobs of minutes.
HASTE = ["--slurm-init-seconds-before-status-checks", "3", "--latency-wait", "5"]


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
            host = (run.workspace / "lease").read_text().split()
        except OSError:
            continue
        names = [word.split("?")[0] for word in host if word.startswith("node")]
        if names and (run.workspace / "checkpoint.pt").exists():
            found[names[0]] = run
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
    monkeypatch.setenv("MOE_RESULTS_DIR", str(shared / "alone"))
    alone = [small_runs.numbers(result) for result in study.ensure(runs, workers=2, quiet=True)]
    equal = sum(a == b for a, b in zip(on_cluster, alone, strict=True))
    if RECORD:
        content = {"nodes": 3, "runs": len(runs), "equal": equal, "rows": happened, **store.provenance()}
        store.write(ROOT / "results" / "cluster" / "nodes.json", content)
    assert equal == len(runs)


@pytest.mark.parametrize(
    ("fault", "hook", "said"),
    [
        ("missing", "mount -t tmpfs -o size=1m none {results}/..", "is not there"),
        ("full", "mount -t tmpfs -o size=4k none {results}", "cannot be written"),
    ],
)
def test_a_bad_shared_folder_is_named_with_its_node(fault, hook, said, shared):
    """A node that does not see the folder, or sees a full one: the driver says which node and which path."""
    results = store.results_dir()
    (results / "digits").mkdir(parents=True)
    hooks = {1: hook.format(results=results)}
    with Slurm(shared.parent / f"slurm-{fault}", nodes=1, hooks=hooks) as slurm:
        driver = Driver(slurm, shared / "work")
        process = driver.start("--retries", "0", "--set-resources", "shard:runtime=5")
        assert process.wait(timeout=600) != 0
        text = driver.output.read_text()
    assert "node1" in text
    assert str(results if fault == "full" else shared) in text
    assert said in text


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
        rows.append({"nodes": nodes, "wall": wall, "seconds": seconds})
    start = (rows[0]["wall"] - sum(rows[0]["seconds"])) / len(rows[0]["seconds"])
    for row in rows:
        row["simulated"] = plan.simulate(rows[0]["seconds"], row["nodes"], start).wall
        row["training"] = sum(row.pop("seconds"))
    content = {"cores": os.cpu_count(), "load": os.getloadavg(), "start": start, "rows": rows}
    store.write(ROOT / "results" / "cluster" / "scaling.json", content | store.provenance())
