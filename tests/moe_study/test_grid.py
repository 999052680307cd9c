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


def test_a_killed_batch_with_a_failing_shard_goes_on_where_it_was(grid, trained):
    """The first run of one shard cannot make its workspace: its sibling and the other shard are finished."""
    failing, sound = (study.shard(study.runs("digits", "snnl"), f"{i}/11") for i in (8, 9))
    runs = failing + sound
    assert [run.arm for run in runs] == ["uniform-gate"] * 2 + ["raw"] * 2
    done_failing, done_sound = done = done_files(11, 8, 9)
    obstacle = failing[0].workspace
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("in the way")
    batch = start(grid, 11, done)
    try:
        until = time.monotonic() + 480
        while not finished(runs) and time.monotonic() < until:
            assert batch.poll() is None, (grid / "output").read_text()
            time.sleep(0.02)
    finally:
        kill(batch)
    before = finished(runs)
    assert 1 <= len(before) < 3
    assert not any(path.exists() for path in done)

    status, said = finish(grid, 11, done)  # the same command, nothing else
    assert status != 0
    assert failing[0].label in said
    assert not done_failing.exists()
    assert store.read(done_sound) == {"runs": [run.id for run in sound]}
    kept = finished(runs)
    assert set(kept) == {run.path for run in runs[1:]}
    assert {path: kept[path] for path in before} == before

    obstacle.unlink()
    kept.pop(sound[0].path)
    sound[0].path.unlink()  # a DONE file counts only as long as its result files are there
    status, said = finish(grid, 11, done)
    assert status == 0, said
    assert all(path.exists() for path in done)
    after = finished(runs)
    assert set(after) == {run.path for run in runs}
    assert {path: after[path] for path in kept} == kept
    assert [numbers(study.read(run)) for run in runs] == [numbers(result) for result in trained(runs)]

    status, said = finish(grid, 11, done)
    assert status == 0
    assert "Nothing to be done" in said
    assert finished(runs) == after
