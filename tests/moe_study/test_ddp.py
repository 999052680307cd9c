"""One run of the study over several processes: its numbers, and a process that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe_study import ddp, study
from moe_study.__main__ import main
from moe_study.data import ROOT


def start(run: study.Run, processes: int, **environment: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "moe_study", "run", "--profile", run.profile, "--study", run.study]
    line += ["--dataset", run.dataset, "--arm", run.arm, "--shard", "1/99", "--ddp"]
    line += ["--workers", str(processes)]
    outside = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"} | environment
    return subprocess.Popen(line, env=outside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers(launcher: int) -> list[int]:
    """The processes that train: children of torchrun, which the launcher started."""
    found = []
    for agent in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        found += map(int, Path(f"/proc/{agent}/task/{agent}/children").read_text().split())
    return found


def check_numbers(run: study.Run, processes: int, alone: dict) -> None:
    """To 1e-6, over all epochs; digits have a batch in which the processes get unequal parts."""
    shared = study.read(run)
    assert shared["processes"] == processes
    for part in ("train", "validation"):
        assert shared["history"][part].keys() == alone["history"][part].keys()
        for key, column in alone["history"][part].items():
            assert shared["history"][part][key] == pytest.approx(column, rel=2e-6, abs=1e-9), key
    assert shared["task"] == pytest.approx(alone["task"], rel=2e-6)


@pytest.mark.slow
def test_numbers_are_those_of_one_process(folders, trained):
    run = study.runs("digits", "ac-vision", "digits", "ac")[0]
    process = start(run, 2)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    check_numbers(run, 2, *trained([run]))


@pytest.mark.slow
def test_a_killed_worker_is_started_anew_from_the_checkpoint(folders, trained):
    run = study.runs("digits", "snnl", "digits", "snnl")[0]
    process = start(run, 3)
    checkpoint = run.workspace / "checkpoint.pt"
    until = time.monotonic() + 300
    while not checkpoint.exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert said.count("epoch 1/") == 1  # of two starts the second one went on
    check_numbers(run, 3, *trained([run]))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_cover_a_batch_in_its_order(size):
    batch = torch.arange(7), torch.arange(7) * 10
    parts = [ddp.share(batch, rank, size) for rank in range(size)]
    for i in range(2):
        assert torch.cat([part[i] for part in parts]).equal(batch[i])


def test_what_cannot_be_shared_is_refused(folders, capsys, monkeypatch):
    wanted = ["run", "--profile", "digits", "--study", "snnl", "--arm", "snnl-shuffled", "--ddp"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a test")
    assert main(wanted) == 1
    assert "snnl-shuffled" in capsys.readouterr().err
    assert main([*wanted, "--time-limit", "5"]) == 1
    assert "--time-limit has no effect with --ddp" in capsys.readouterr().err
