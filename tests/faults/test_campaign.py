"""What may befall a grid of runs: kills, damaged files, full and read-only disks.

After each fault the same work is asked for again, and every number is compared bit for bit with those of a
grid that nothing disturbed. Prints a table of tried, held and failed.

    make faults             a small campaign
    make faults KILLS=100   the whole one
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import pytest
import small_runs
import torch

from moe_study import engine, store, study
from moe_study.data import ROOT

pytestmark = pytest.mark.faults

KILLS = int(os.environ.get("FAULTS_KILLS", "5"))
SHARD = "1/5"
GRID = f"--profile digits --study snnl --arm base,snnl --shard {SHARD}"
VICTIMS = ("parent", "worker", "group", "Snakemake", "notebook")
TABLE: dict[str, Counter] = {}


def planned() -> list[study.Run]:
    return study.shard(study.runs("digits", "snnl", arm="base,snnl"), SHARD)


def tried(kind: str, fault: str | None) -> None:
    """Count a fault, and what was wrong after it, if anything was."""
    TABLE.setdefault(kind, Counter()).update(["tried", "failed" if fault else "held"])
    if fault:
        print(f"{kind}: {fault}", flush=True)


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print("\n\n| fault | tried | held | failed |\n|---|---|---|---|")
    for kind, found in TABLE.items():
        print(f"| {kind} | {found['tried']} | {found['held']} | {found['failed']} |")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Results of a test in its own folder, with the paths of this environment."""
    monkeypatch.setenv("MOE_RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setenv("MOE_FIGURES_DIR", str(tmp_path / "figures"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def faults_of(runs: list[study.Run], undisturbed: dict[str, dict], whole: bool) -> str | None:
    """What is wrong with the files of a grid: one that cannot be read, another number, a leftover, a gap."""
    for run in runs:
        if not run.path.exists():
            if whole:
                return f"{run.label} is missing"
            continue
        try:
            if small_runs.numbers(study.read(run)) != undisturbed[run.id]:
                return f"{run.label} has other numbers"
        except store.StoreError as error:
            return str(error)
        if whole and (left := study.leftovers(run)):
            return f"{run.label} left {left}"
    return None


# ------------------------------------------------------------------------------------ random kills


def command(victim: str, folder: Path) -> list[str]:
    """The whole grid by the shell, by Snakemake or in a notebook; `folder` is where it runs."""
    folder.mkdir(exist_ok=True)
    if victim == "Snakemake":
        for name in ("Snakefile", *store.PACKAGES, "notebooks"):
            if not (folder / name).exists():
                (folder / name).symlink_to(ROOT / name)
        ids = [run.id for run in study.runs("digits", "snnl")]
        runs = {run.id for run in planned()}
        shards = [i for i in range(len(ids)) if ids[i] in runs]
        done = store.results_dir() / "digits" / ".work" / f"shards-{store.digest(ids)}"
        targets = [str(done / f"{i + 1}of{len(ids)}.json") for i in shards]
        options = "--cores 2 --keep-going --rerun-incomplete --nolock --rerun-triggers mtime input --quiet"
        config = ["--config", "profile=digits", "study=snnl", f"shards={len(ids)}"]
        return ["snakemake", *options.split(), *config, "--", *targets]
    if victim == "notebook":
        source = (
            "from moe_study import study\n"
            f"runs = study.shard(study.runs('digits', 'snnl', arm='base,snnl'), {SHARD!r})\n"
            "len(study.ensure(runs, workers=2))"
        )
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(made, folder / "grid.ipynb")
        return [*["papermill", "--no-progress-bar", "--cwd"], str(folder), "grid.ipynb", "out.ipynb"]
    return [sys.executable, "-m", "moe_study", "run", *GRID.split(), "--workers", "2"]


def begin(victim: str, folder: Path) -> psutil.Popen:
    line = command(victim, folder)
    with (folder / "output").open("w") as output:
        return psutil.Popen(line, cwd=folder, stdout=output, stderr=output, start_new_session=True)


def strike(victim: str, process: psutil.Popen, draw: random.Random) -> None:
    family = process.children(recursive=True)
    if victim == "worker":
        workers = [child for child in family if "spawn_main" in " ".join(child.cmdline())]
        if workers:
            draw.choice(workers).kill()
        process.wait(600)  # the batch goes on without it
        return
    if victim == "group":
        os.killpg(process.pid, signal.SIGKILL)
    elif victim == "notebook":
        draw.choice([process, *family]).kill()
    else:
        process.kill()
    process.wait(600)
    _, alive = psutil.wait_procs(family, timeout=60)
    for child in alive:
        child.kill()
    if alive and victim != "notebook":  # of papermill the kernel may outlive a killed worker
        raise AssertionError(f"{len(alive)} processes outlived it: {[' '.join(c.cmdline()) for c in alive]}")


def test_random_kills(home, monkeypatch):
    """Of a real grid: after each kill every finished file is whole and right; resumed, the grid is."""
    draw = random.Random(KILLS)
    results = home / "undisturbed"
    monkeypatch.setenv("MOE_RESULTS_DIR", str(results))
    started = time.monotonic()
    study.ensure(planned(), workers=2, quiet=True)
    usual = time.monotonic() - started + 8  # and what it takes to import everything
    undisturbed = {run.id: small_runs.numbers(study.read(run)) for run in planned()}

    pending: list[str] = []  # kills of the grid at work: whether they held shows when it is whole
    number = 0

    def fresh() -> None:
        nonlocal number
        number += 1
        monkeypatch.setenv("MOE_RESULTS_DIR", str(home / f"results-{number}"))

    def settle(fault: str | None) -> None:
        for kind in pending:
            tried(f"kill: {kind}", fault)
        pending.clear()
        fresh()

    fresh()
    for i in range(KILLS):
        victim = VICTIMS[i % len(VICTIMS)]
        process = begin(victim, home / victim)
        until = time.monotonic() + draw.uniform(0.2, 1) * usual
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        pending.append(victim)
        fault = None
        try:
            if process.poll() is None:
                strike(victim, process, draw)
        except (AssertionError, psutil.Error) as error:
            fault = str(error)
        fault = fault or faults_of(planned(), undisturbed, whole=False)
        if fault or all(run.path.exists() for run in planned()) or i + 1 == KILLS:
            study.ensure(planned(), workers=2, quiet=True)
            settle(fault or faults_of(planned(), undisturbed, whole=True))
    assert not sum(found["failed"] for found in TABLE.values())


# -------------------------------------------------------------------------- faults at known moments


class Queue:
    def put(self, message: object) -> None:
        pass


def forked(work: Callable[[], None]) -> int:
    """Exit status of `work` in a child of this process, which has imported everything; -9 if killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            warnings.simplefilter("ignore")
            torch.set_num_threads(1)
            engine._progress = Queue()
            work()
            status = 0
        except (store.StoreError, study.TrainingError, OSError):
            status = 3  # said clearly
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


RUN = small_runs.run(epochs=2, arm="raw")


def train() -> None:
    assert engine._work(RUN, "cpu", float("inf")) == "done"


CALLS = ((os, "fsync"), (os, "chmod"), (os, "replace"), (Path, "unlink"), (os, "fdopen"))


def killed_at(moment: int, counted: Path | None = None) -> None:
    """Train, and be killed right before the call of that number that writes, renames or deletes."""
    passed = 0

    def wrap(original: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            nonlocal passed
            passed += 1
            if passed == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    for place, name in CALLS:
        setattr(place, name, wrap(getattr(place, name)))
    train()
    if counted is not None:
        counted.write_text(str(passed))


@pytest.fixture
def truth(home, monkeypatch):
    """The numbers of RUN when nothing happens.

    Trained in this process, so that its children find everything imported.
    """
    monkeypatch.setenv("MOE_RESULTS_DIR", str(home / "undisturbed"))
    monkeypatch.setattr(engine, "_progress", Queue())
    train()
    found = {RUN.id: small_runs.numbers(study.read(RUN))}
    monkeypatch.setenv("MOE_RESULTS_DIR", str(home / "results"))
    return found


def resumed(truth: dict) -> str | None:
    """What is wrong after the same work was asked for again."""
    if (status := forked(train)) != 0:
        return f"resuming ended with {status}"
    study.ensure([RUN], quiet=True)  # sweeps, as every command does
    return faults_of([RUN], truth, whole=True)


def test_kills_between_write_rename_and_unlink(home, truth):
    assert forked(lambda: killed_at(0, home / "count")) == 0
    moments = int((home / "count").read_text())
    assert moments >= 16
    for moment in range(1, moments + 1):
        shutil.rmtree(store.results_dir(), ignore_errors=True)
        status = forked(lambda moment=moment: killed_at(moment))
        fault = None if status == -signal.SIGKILL else f"moment {moment}: was not killed"
        tried("kill between write, rename, unlink", fault or resumed(truth))
    assert not TABLE["kill between write, rename, unlink"]["failed"]


def flip(position: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position * len(content))] ^= 1
        path.write_bytes(content)

    return damage


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


ANY_FILE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "pipe": instead(os.mkfifo),
    "folder": instead(os.mkdir),
    "link to itself": instead(lambda path: path.symlink_to(path)),
    **{f"bit flipped at {at}": flip(at) for at in (0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)},
}
RESULT = {
    "no keys": lambda path: path.write_text("{}"),
    "brackets": lambda path: path.write_text("[" * 100_000),
    "NaN": lambda path: path.write_text(path.read_text().replace('"accuracy":', '"accuracy":NaN,"x":', 1)),
    "accuracy": edit(lambda content: content["task"].update(accuracy=0.99)),
    "version": edit(lambda content: content["run"].update(version=99)),
    "id": edit(lambda content: content.update(id="0123456789")),
}


@pytest.mark.parametrize("damage", ANY_FILE)
def test_damaged_checkpoints(damage, truth):
    """The run starts anew and ends with the right numbers."""
    # The first epoch's checkpoint is there: fdopen, fsync, chmod, replace, fsync of the folder. Now the next.
    assert forked(lambda: killed_at(6)) == -signal.SIGKILL
    path = RUN.workspace / "checkpoint.pt"
    assert path.exists()
    ANY_FILE[damage](path)
    fault = resumed(truth) or (None if os.path.lexists(path.with_suffix(".invalid")) else "not set aside")
    tried("damaged checkpoint", fault)
    assert fault is None


def test_damaged_results(truth):
    """Each is named with its path; deleted, the run is made again with the same numbers."""
    assert forked(train) == 0
    whole = RUN.path.read_bytes()
    for name, damage in (ANY_FILE | RESULT).items():
        damage(RUN.path)
        try:
            found = study.ensure([RUN], quiet=True)
            fault = f"{name}: believed" if small_runs.numbers(found[0]) != truth[RUN.id] else None
        except store.StoreError as error:
            fault = None if str(RUN.path) in str(error) and "delete it" in str(error) else f"{name}: {error}"
        tried("damaged result", fault)
        if RUN.path.is_dir() and not RUN.path.is_symlink():
            RUN.path.rmdir()
        RUN.path.unlink(missing_ok=True)
        RUN.path.write_bytes(whole)
    RUN.path.unlink()
    assert resumed(truth) is None
    assert not TABLE["damaged result"]["failed"]


@contextlib.contextmanager
def disk(folder: Path, options: str):
    """A small file system in memory."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield lambda new: subprocess.run(["mount", "-o", f"remount,{new}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [8, 64, 256, 512, 1024])
def test_full_disk(kilobytes, truth):
    with disk(store.results_dir(), f"size={kilobytes}k") as remount:
        status = forked(train)
        fault = None if status in (0, 3) else f"ended with {status}"
        if status == 3:
            found = [path for path in store.results_dir().rglob("*") if path.suffix == ".part"]
            fault = f"left {found}" if found else None
        remount("size=64m")
        fault = fault or resumed(truth)
    tried("full disk", fault)
    assert fault is None


def test_read_only_folder(truth):
    with disk(store.results_dir(), "size=64m") as remount:
        remount("ro")
        with pytest.raises(store.StoreError, match=r"cannot write under .*MOE_RESULTS_DIR"):
            study.ensure([RUN], workers=1, quiet=True)
        remount("rw")
        fault = resumed(truth)
        remount("ro")
        study.ensure([RUN], workers=1, quiet=True)  # what is finished can be read
        remount("rw")
    tried("read-only folder", fault)
    assert fault is None
