"""A real batch under Snakemake: killed in the middle, with a failing shard, and with nothing left to do."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_runs

from moe_study import store, study
from moe_study.configs import arms
from moe_study.data import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def grid(folders):
    """A working folder of its own, since Snakemake locks the one it runs in."""
    where = folders / "work"
    where.mkdir()
    for name in ("Snakefile", *store.PACKAGES, "notebooks"):
        (where / name).symlink_to(ROOT / name)
    return where


def done_files(shards: int, *numbers: int) -> list[Path]:
    """Where the Snakefile puts a shard's DONE file."""
    folder = "shards-" + store.digest([run.id for run in study.runs("digits", "snnl")])
    return [store.results_dir() / "digits" / ".work" / folder / f"{i}of{shards}.json" for i in numbers]


def start(grid: Path, shards: int, targets: list[Path]) -> subprocess.Popen:
    """What `make report` calls, narrowed to some shards of one study, in a process group of its own."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    command = re.search(r"snakemake (--cores .*)", makefile)[1]
    command = command.replace("$(CORES)", "2").replace("$(PROFILE)", f"digits study=snnl shards={shards}")
    assert not set(command) & set("$&|;>\\")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(grid.parent / "cache"),
    }
    with (grid / "output").open("w") as output:
        return subprocess.Popen(
            ["snakemake", *command.split(), "--", *map(str, targets)],
            cwd=grid,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def finish(grid: Path, shards: int, targets: list[Path]) -> tuple[int, str]:
    """Exit status and what was said."""
    batch = start(grid, shards, targets)
    try:
        return batch.wait(timeout=600), (grid / "output").read_text()
    finally:
        kill(batch)


def kill(batch: subprocess.Popen) -> None:
    """SIGKILL to the whole group; returns when none of it lives (a zombie does not)."""
    try:
        os.killpg(batch.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    batch.wait()
    until = time.monotonic() + 30
    while any(group_members(batch.pid)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(group_members(batch.pid))


def group_members(group: int):
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state not in "ZX":
            yield stat


def finished(runs: list[study.Run]) -> dict[Path, tuple[int, bytes]]:
    return {r.path: (r.path.stat().st_mtime_ns, r.path.read_bytes()) for r in runs if r.path.exists()}


def numbers(result: dict) -> dict:
    """Without the commit too: somebody may commit while this runs."""
    return small_runs.numbers(result) | {"commit": None, "dirty": None}


def test_a_killed_batch_goes_on_where_it_was(grid, folders, monkeypatch):
    runs = study.shard(study.runs("digits", "snnl"), "1/11") + study.shard(
        study.runs("digits", "snnl"), "2/11"
    )
    assert sorted((run.arm, run.seed) for run in runs) == sorted(
        (arm, seed) for arm in ("base", "snnl") for seed in arms.SEEDS[:3]
    )
    done = done_files(11, 1, 2)
    batch = start(grid, 11, done)
    try:
        until = time.monotonic() + 480
        while len(finished(runs)) < 2 and time.monotonic() < until:
            assert batch.poll() is None, (grid / "output").read_text()
            time.sleep(0.02)
    finally:
        kill(batch)
    before = finished(runs)
    assert 2 <= len(before) < 6
    assert not any(path.exists() for path in done)
    cut = [run for run in runs if run.path not in before]
    cut.sort(key=lambda run: not (run.workspace / "checkpoint.pt").exists())  # begun ones first

    status, said = finish(grid, 11, done)  # the same command, nothing else
    assert status == 0, said
    after = finished(runs)
    assert len(after) == 6
    assert set(cut[0].path.parent.glob("*.json")) == set(after)
    assert {path: after[path] for path in before} == before
    for i, path in enumerate(done, 1):
        assert store.read(path) == {
            "runs": [r.id for r in study.shard(study.runs("digits", "snnl"), f"{i}/11")]
        }

    status, said = finish(grid, 11, done)
    assert status == 0
    assert "Nothing to be done" in said
    assert finished(runs) == after

    continued = [store.read(run.path) for run in cut[:2]]
    monkeypatch.setenv("MOE_RESULTS_DIR", str(folders / "whole"))
    whole = study.ensure(cut[:2], workers=2, quiet=True)
    assert [numbers(result) for result in continued] == [numbers(result) for result in whole]


def test_a_failing_shard_leaves_the_other_alone(grid):
    """The first run of one shard cannot make its workspace: its siblings and the other shard are finished."""
    failing, sound = (study.shard(study.runs("digits", "snnl"), f"{i}/11") for i in (8, 9))
    assert [run.arm for run in failing + sound] == ["uniform-gate"] * 2 + ["raw"] * 2
    done_failing, done_sound = done = done_files(11, 8, 9)
    obstacle = failing[0].workspace
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("in the way")

    status, said = finish(grid, 11, done)
    assert status != 0
    assert failing[0].label in said
    assert not done_failing.exists()
    assert not failing[0].path.exists()
    assert done_sound.exists()
    kept = finished(failing + sound)
    assert set(kept) == {run.path for run in failing[1:] + sound}

    obstacle.unlink()
    lost = kept.popitem()[0]
    lost.unlink()  # a DONE file counts only as long as its result files are there
    status, said = finish(grid, 11, done)
    assert status == 0, said
    assert done_failing.exists()
    assert done_sound.exists()
    after = finished(failing + sound)
    assert set(after) == {run.path for run in failing + sound}
    assert {path: after[path] for path in kept} == kept
