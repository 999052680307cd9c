"""The lease of a GPU, rehearsed: limits are kept, archives are whole whenever the machine vanishes."""

import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import lease
from moe_study import store


def restored(out, folder):
    """The files in all archives, as the docstring's loop would unpack them."""
    for archive in sorted(out.glob("archive-*.tar.gz")):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_archives_are_bounded_and_hold_everything_finished(tmp_path):
    out, draw, most = tmp_path / "out", random.Random(0), 200_000
    packer, written = lease.Packer(out, most), {}
    for number in range(30):  # files come in while it packs
        path = out / "results" / "paper" / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw.randbytes(draw.randint(1_000, 30_000)))
        written[str(path.relative_to(out))] = path.read_bytes()
        (path.parent / ".half.part").write_bytes(b"half")
        if number % 4 == 0:
            packer.pack()
    packer.pack()
    assert restored(out, tmp_path / "home") == written
    archives = list(out.glob("archive-*.tar.gz"))
    assert len(archives) > 1
    assert max(archive.stat().st_size for archive in archives) < most + 100_000
    assert not list(out.glob("*.part"))


@pytest.mark.slow
def test_a_step_that_hangs_is_killed_with_its_children(tmp_path):
    child = tmp_path / "child"
    script = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(child)!r}, 'w').write(str(p.pid)); print('begun', flush=True); time.sleep(600)"
    )
    step = lease.Step("hangs", (sys.executable, "-c", script), 5)
    assert lease.run_step(step, tmp_path / "logs", time.monotonic() + 60) == "stopped"
    assert "begun" in (tmp_path / "logs" / "hangs.log").read_text()
    for _ in range(100):
        try:
            os.kill(int(child.read_text()), 0)
        except ProcessLookupError:
            break
        if "Z" in Path(f"/proc/{child.read_text()}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the step's child still runs")
    assert lease.run_step(step, tmp_path / "logs", time.monotonic() + 0.5) == "not begun"


def test_blocks_run_as_many_at_a_time_as_proved_fastest(tmp_path):
    path = tmp_path / "workers.json"
    assert lease.fastest(path) == lease.GPU_WORKERS
    rates = {1: 100.0, 4: 350.0, 8: 300.0}
    store.write(path, {"workers": [{"workers": n, "images_per_second": r} for n, r in rates.items()]})
    assert lease.fastest(path) == 4


def test_what_is_finished_is_neither_trained_nor_packed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_RESULTS_DIR", str(tmp_path / "here"))
    before = tmp_path / "here/core/snnl/mnist"
    before.mkdir(parents=True)
    (before / "base-s1-0.json").write_text("{}")
    out = tmp_path / "out"
    packer = lease.Packer(out)
    packer.sealed |= lease.finished(["core:snnl:mnist", "core:snnl:cifar10"], out / "results")
    known = out / "results/core/snnl/mnist/base-s1-0.json"
    assert packer.sealed == {known}
    assert known.read_text() == "{}"
    known.with_name("base-s2-0.json").write_text("{}")
    packer.pack()
    assert list(restored(out, tmp_path / "home")) == ["results/core/snnl/mnist/base-s2-0.json"]


def test_blocks_without_data_are_left_out_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(store, "provenance", lambda: {"commit": None})  # so that it ends there
    with pytest.raises(SystemExit):
        lease.main(
            [str(tmp_path), "--blocks", "core:snnl:mnist", "core:ac-language:wikitext2", "digits:snnl:digits"]
        )
    said = capsys.readouterr().err
    assert f"core:snnl:mnist: left out, {tmp_path / 'data'} lacks mnist" in said
    assert "core:ac-language:wikitext2: left out" in said
    assert "digits:snnl:digits" not in said


def test_an_unknown_commit_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "provenance", lambda: {"commit": None})
    with pytest.raises(SystemExit):
        lease.main([str(tmp_path)])
    assert "--commit" in capsys.readouterr().err


def test_a_block_is_named_by_study_and_data_set(capsys):
    with pytest.raises(SystemExit):
        lease.main(["out", "--blocks", "snnl"])
    assert "a block is PROFILE:STUDY:DATASET, got 'snnl'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_lease_rehearsed_on_a_cpu_and_killed(tmp_path):
    """A block of the embedded data; killed outright after the first archive with a result."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.lease", str(out), "--minutes", "5", "--workers", "1"]
    command += ["--device", "cpu", "--tests", "0", "--bench", "0", "--every", "1"]
    command += ["--blocks", "digits:snnl:digits"]
    nothing = os.environ | {"MOE_RESULTS_DIR": str(tmp_path / "nothing")}  # is finished yet
    process = subprocess.Popen(command, cwd=lease.ROOT, env=nothing, start_new_session=True)
    try:
        for _ in range(1200):
            time.sleep(0.2)
            archives = list(out.glob("archive-*.tar.gz"))
            if archives and any(name.endswith(".json") for name in restored(out, tmp_path / "first")):
                break
        else:
            pytest.fail("no result was packed")
    finally:
        subprocess.run(["pkill", "-9", "-s", str(os.getsid(process.pid))], check=False)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found = restored(out, tmp_path / "home")
    results = {name: content for name, content in found.items() if name.endswith(".json")}
    assert results
    assert all(content.startswith(b"{") and content.endswith(b"}\n") for content in results.values())
