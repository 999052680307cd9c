"""The engine: it trains once, resumes after SIGKILL, and fails loudly."""

import contextlib
import errno
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import small_runs
import torch

from moe_study import data, engine, locks, store, study
from moe_study.train import load_checkpoint

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.slow
def test_ensure_writes_once_and_then_reads(folders):
    run = small_runs.run(epochs=1)
    first = study.ensure([run], workers=1, quiet=True)
    written = run.path.stat().st_mtime_ns
    assert study.ensure([run], workers=1, quiet=True) == first
    assert run.path.stat().st_mtime_ns == written
    result = first[0]
    assert result["id"] == run.id
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"commit", "dirty", "machine", "device", "wall_seconds", "peak_memory_mb"} <= set(result)
    assert run.path.stat().st_size <= 20_000
    assert not (run.workspace / "checkpoint.pt").exists()
    assert not list(folders.rglob("*.part"))


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_numbers(folders, monkeypatch):
    """SIGKILL to the whole batch in the middle of a run; its worker must die with it."""
    run = small_runs.run(epochs=20)
    checkpoint = run.workspace / "checkpoint.pt"
    batch = subprocess.Popen([sys.executable, "small_runs.py", "20"], cwd=SUPPORT, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not checkpoint.exists() and time.monotonic() < until:
            assert batch.poll() is None
            os.sched_yield()
        children = Path(f"/proc/{batch.pid}/task/{batch.pid}/children").read_text().split()
    finally:
        os.kill(batch.pid, signal.SIGKILL)
        batch.wait()
    assert checkpoint.exists()
    assert not run.path.exists()
    done = load_checkpoint(checkpoint, run.id)["epoch"]
    assert 1 <= done < 20
    resumed = study.ensure([run], workers=1, quiet=True)[0]  # waits for the dying worker's lock, if need be
    assert children
    assert not any(Path(f"/proc/{child}").exists() for child in children)

    monkeypatch.setenv("MOE_RESULTS_DIR", str(folders / "whole"))
    whole = study.ensure([run], workers=1, quiet=True)[0]
    assert small_runs.numbers(resumed) == small_runs.numbers(whole)


@pytest.mark.slow
def test_a_killed_worker_loses_no_other_run(folders):
    """SIGKILL to the only worker of three runs: all three are there in the end."""
    runs = [replace(small_runs.run(epochs=10), seed=seed) for seed in (1, 2, 3)]

    def kill() -> None:
        while not (runs[0].workspace / "checkpoint.pt").exists():
            time.sleep(0.01)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert len(study.ensure(runs, workers=1, quiet=True)) == 3
    assert not killer.is_alive()


@pytest.mark.slow
def test_waiting_for_another_process_ends_with_the_time_limit(folders):
    run = small_runs.run(epochs=1)
    run.workspace.mkdir(parents=True)
    with locks.hold(run.workspace):
        assert engine._work(run, "cpu", time.monotonic() + 0.2) == "out of time"
    assert not run.path.exists()


def test_a_raised_version_takes_no_older_numbers(folders):
    first = study.runs("digits", "ac-vision", "digits", "cosine")[0]
    second = study.runs("digits", "crossed", "digits", "base")[0]
    study.write(first, {})
    assert study.twin(second) == first
    assert study.twin(replace(second, version=second.version + 1)) is None


@pytest.mark.slow
def test_a_run_that_another_study_has_is_not_trained_again(folders, monkeypatch):
    """base of the crossed study is cosine of the vision study: the same numbers, trained once."""
    first = study.runs("digits", "ac-vision", "digits", "cosine")[0]
    second = study.runs("digits", "crossed", "digits", "base")[0]
    assert first.seed == second.seed
    assert first.id != second.id
    assert study.twin(second) is None
    trained = {first: study.execute(first, "cpu"), second: study.execute(second, "cpu")}
    for key in ("task", "routing", "attack", "corruption"):
        assert store.compact(trained[first][key]) == store.compact(trained[second][key])
    study.write(first, {"task": trained[first]["task"]})
    [result] = study.ensure([second], quiet=True)
    assert result["same_as"] == first.label
    assert result["run"]["arm"] == "base"
    assert result["task"] == store.compact(trained[second]["task"])  # as if it had been trained
    assert study.twin(study.runs("digits", "crossed", "digits", "snnl")[0]) is None


@pytest.mark.slow
def test_one_failing_run_does_not_stop_the_others(folders):
    """The first run diverges; the message names arm, seed, epoch and batch."""
    good, bad = small_runs.run(epochs=1), small_runs.run(epochs=1, arm="base", learning_rate=1e200)
    with pytest.raises(study.StudyError, match=r"1 of 2 runs failed.*\n.*base seed 1234.*epoch 0, batch \d+"):
        study.ensure([bad, good], workers=1, quiet=True)
    assert good.path.exists()
    assert not bad.path.exists()


@pytest.mark.slow
def test_leftovers_are_swept_by_the_next_call(folders):
    """Of a run that was killed in a write, and of one killed before its checkpoint was deleted."""
    run = small_runs.run(epochs=1)
    study.write(run, {})
    run.workspace.mkdir(parents=True)
    others = run.path.parent / f".{run.arm}-s1-0123456789.json-x.part"
    stray = [run.workspace / ".checkpoint.pt-x.part", run.path.parent / f".{run.path.name}-x.part"]
    for path in (*stray, others, run.workspace / "checkpoint.pt"):
        path.write_bytes(b"")
    with locks.hold(run.workspace):  # somebody is at it: nothing is touched
        study.ensure([run], quiet=True)
        assert all(path.exists() for path in stray)
    study.ensure([run], quiet=True)
    assert not any(path.exists() for path in stray)
    assert not (run.workspace / "checkpoint.pt").exists()
    assert others.exists()  # of another run, under its own lock


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"workers": -1}, "workers.*-1"),
        ({"workers": 0}, "workers.*0"),
        ({"workers": "two"}, "workers.*'two'"),
        ({"workers": 1.5}, "workers.*1.5"),
        ({"workers": True}, "workers.*True"),
        ({"time_limit": math.nan}, "time_limit.*nan"),
        ({"time_limit": -1}, "time_limit.*-1"),
        ({"time_limit": "1"}, "time_limit.*'1'"),
        ({"time_limit": True}, "time_limit.*True"),
        ({"device": "tpu"}, "device.*'tpu'"),
    ],
)
def test_options_are_checked_by_type_and_range(options, named, folders):
    with pytest.raises(ValueError, match=named):
        study.ensure([small_runs.run(epochs=1)], quiet=True, **options)
    assert list(folders.iterdir()) == []


@pytest.mark.slow
def test_unusable_shared_memory_is_named(folders, monkeypatch):
    class Context:
        def Queue(self):
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: Context())
    with pytest.raises(study.StudyError, match="/dev/shm"):
        study.ensure([small_runs.run(epochs=1)], workers=1, quiet=True)


@pytest.mark.slow
def test_data_that_cannot_be_had_is_asked_for_once(folders, monkeypatch):
    """Not by every run; runs on other data are trained, and the message has one line for all that failed."""
    asked = []

    def fetch(name):
        asked.append(name)
        raise data.DataError("no network")

    monkeypatch.setenv("MOE_DATA_DIR", str(folders / "data"))
    monkeypatch.setattr(data, "fetch", fetch)
    good = small_runs.run(epochs=1)
    bad = study.runs("core", "snnl", "cifar10")
    with pytest.raises(study.StudyError) as raised:
        study.ensure([good, *bad], workers=1, quiet=True)
    assert asked == ["cifar10"]
    assert str(raised.value).splitlines() == [
        f"{len(bad)} of {len(bad) + 1} runs failed; the others are kept, "
        "and the same command tries these again:",
        f"  {bad[0].label} and {len(bad) - 1} more: no network",
    ]
    assert good.path.exists()


def test_runs_on_a_gpu_are_trained_side_by_side_and_one_that_fails_stops_no_other(monkeypatch):
    """Played on the CPU: as many runs as threads wait for each other; each thread has one stream."""
    together, streams = threading.Barrier(engine.GPU_THREADS), []

    def work(run, device, deadline):
        assert device == "cuda"
        together.wait(60)
        if run == 3:
            raise ValueError("no luck")
        if run == 5:
            raise torch.OutOfMemoryError("full")
        return "done"

    monkeypatch.setattr(engine, "_work", work)
    monkeypatch.setattr(engine, "device_of", lambda run, device: device)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: threading.get_ident())
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    outcomes = engine._work_on(range(2 * engine.GPU_THREADS), "cuda", math.inf, engine.GPU_THREADS)
    assert len(set(streams)) == len(streams) == engine.GPU_THREADS
    assert len(outcomes) == 2 * engine.GPU_THREADS
    assert outcomes.pop(5) == ("out of memory", "full")
    assert outcomes.pop(3) == ("failed", "ValueError: no luck")
    assert set(outcomes) == {("done", None)}


def test_a_gpu_that_is_not_there_is_an_error_before_anything_is_done(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda', but torch finds no GPU"):
        study.ensure(study.runs("digits", "snnl"), device="cuda")


class Numbered(int):
    """Stands for a run."""

    dataset = "digits"

    @property
    def label(self):
        return f"run {int(self)}"


def pools(monkeypatch, outcome_of):
    """Pools of this process, whose runs end as `outcome_of(share, pool's number)` says. Returns, by pool,
    what was submitted, and a list that grows with every run that is over."""
    submitted, over = [], []

    class Pool:
        def __init__(self, processes, *rest):
            submitted.append([])

        def submit(self, work, share, *rest):
            submitted[-1].append([int(run) for run in share])
            job = Future()
            found = outcome_of(share, len(submitted))
            job.set_exception(found) if isinstance(found, Exception) else job.set_result(found)
            return job

        def shutdown(self, cancel_futures=False):
            pass

    counter = types.SimpleNamespace(finished=lambda: over.append(1))
    monkeypatch.setattr(engine, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(engine, "device_of", lambda run, device: device)
    monkeypatch.setattr(engine, "missing_data", lambda *rest: {})
    monkeypatch.setattr(engine, "_Reporter", lambda *rest: contextlib.nullcontext(counter))
    return submitted, over


def test_a_worker_that_is_killed_once_leaves_the_others_at_work(monkeypatch):
    """Of 40 runs in 4 processes the first is killed: at most 4 are tried again, two at a time, in a new pool;
    all others go on four at a time."""
    died = []

    def outcome(share, pool):
        if share == [0] and not died:
            died.append(0)
            return BrokenProcessPool()
        return [("done", None)] * len(share)

    submitted, over = pools(monkeypatch, outcome)
    engine._train_all([Numbered(number) for number in range(40)], 4, "cpu", None, True, [])
    assert len(over) == 40
    assert len(submitted) == 3
    assert len(submitted[2]) <= 4
    assert sum(len(pool) for pool in submitted) <= 44


def test_a_run_that_kills_its_worker_each_time_fails_alone(monkeypatch):
    def outcome(share, pool):
        return BrokenProcessPool() if share == [5] else [("done", None)]

    submitted, over = pools(monkeypatch, outcome)
    with pytest.raises(engine.StudyError, match=r"1 of 40 runs failed[^$]*run 5: it ran out of memory"):
        engine._train_all([Numbered(number) for number in range(40)], 4, "cpu", None, True, [])
    assert len(over) == 40
    assert submitted[-1] == []  # the pool after the last death
    assert sum(len(pool) for pool in submitted) < 60


@pytest.mark.parametrize("times", [1, 2])
def test_a_run_that_finds_a_gpu_full_is_tried_again_when_the_others_are_done(times, monkeypatch):
    """Once more, alone; then its failure is told."""

    def outcome(share, pool):
        full = len(share) > 1 or times > 1
        return [("out of memory" if full and run == 2 else "done", None) for run in share]

    submitted, over = pools(monkeypatch, outcome)
    runs = [Numbered(number) for number in range(5)]
    refused = pytest.raises(engine.StudyError, match=r"(?s)1 of 5 runs failed.*run 2: it ran out of memory")
    with refused if times == 2 else contextlib.nullcontext():
        engine._train_all(runs, 8, "cuda", None, True, [])
    assert submitted == [[[0, 1, 2, 3, 4]], [[2]]]
    assert len(over) == 5


@pytest.mark.parametrize(
    ("gigabytes", "cores", "expected"), [(80, 16, 24), (80, 2, 16), (8, 16, 2), (2, 16, 1)]
)
def test_a_gpu_takes_as_many_runs_as_its_memory_holds(gigabytes, cores, expected, monkeypatch):
    found = types.SimpleNamespace(total_memory=gigabytes * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(engine, "available_cores", lambda: cores)
    assert engine.default_workers("cuda") == expected
    assert engine.default_workers("cpu") == cores
