"""Locks that hold on a shared file system: dead, silent and living holders, and work finished elsewhere."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest

from moe_study import engine, locks, study
from moe_study.data import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from moe_study import locks
locks.LEASE = float(sys.argv[2])
with locks.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def busy() -> None:
    """A minute of work that asks nobody."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        pass


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds the lock of `tmp_path`, with a lease of so many seconds."""
    started = []

    def start(lease: float) -> subprocess.Popen:
        line = [sys.executable, "-c", HOLDER, str(tmp_path), str(lease)]
        process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_a_living_holder_keeps_its_lock_beyond_the_lease(tmp_path, holder, monkeypatch):
    """Its heartbeat is what keeps it: the same wait takes the lock from one that fell silent."""
    monkeypatch.setattr(locks, "LEASE", 1.0)
    process = holder(1.0)
    with pytest.raises(filelock.Timeout), locks.hold(tmp_path, timeout=3):
        pass
    os.kill(process.pid, signal.SIGSTOP)
    with locks.hold(tmp_path, timeout=10):
        assert (tmp_path / "lease").exists()
    assert not (tmp_path / "lease").exists()


def test_a_killed_holder_of_this_machine_is_not_waited_for(tmp_path, holder):
    process = holder(locks.LEASE)
    process.kill()
    process.wait()
    with locks.hold(tmp_path, timeout=0):
        pass


def test_a_silent_holder_is_replaced_where_names_cannot_be_exchanged(tmp_path, holder, monkeypatch):
    """As on NFS."""
    monkeypatch.setattr("filelock._soft.exchange_names", lambda *paths: False)
    monkeypatch.setattr(locks, "LEASE", 0.5)
    process = holder(0.5)
    os.kill(process.pid, signal.SIGSTOP)
    with locks.hold(tmp_path, timeout=20):
        pass


def test_waiting_ends_when_the_result_appears(tmp_path, holder):
    holder(locks.LEASE)
    result = tmp_path / "result.json"
    threading.Timer(0.3, result.write_text, ["{}"]).start()
    with pytest.raises(locks.Elsewhere), locks.hold(tmp_path, 60, result):
        pass


def test_a_block_ends_when_another_process_writes_its_result(tmp_path):
    """Whatever it is at, and signals are handled as before afterwards."""
    result, before = tmp_path / "result.json", signal.getsignal(signal.SIGUSR1)
    threading.Timer(0.3, result.write_text, ["{}"]).start()
    with pytest.raises(locks.Elsewhere), locks.unless(result):
        busy()
    assert signal.getsignal(signal.SIGUSR1) is before
    with locks.unless(tmp_path / "another"):
        pass
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_duplicate_leaves_the_first_result_alone(folders, monkeypatch):
    """Two processes train one run, as after a split brain; the second one sees that it is not needed."""
    run = study.runs("digits", "snnl", "digits", "base")[0]

    def slow(*arguments: object) -> dict:
        Path(run.path).parent.mkdir(parents=True)
        study.write(run, {"machine": "the first"})
        busy()
        return {}

    monkeypatch.setattr(engine, "execute", slow)
    assert engine._work(run, "cpu", float("inf")) == "done"
    assert study.read(run)["machine"] == "the first"
