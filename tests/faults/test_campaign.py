"""What may befall a grid of runs: kills, damaged files, full and read-only disks.

After each fault the same work is asked for again, and every number is compared bit for bit with those of a
grid that nothing disturbed. A table says what was tried, what held and what failed.

    make test               a few faults of each kind
    make faults             a small campaign, recorded in results/faults/ and REPRODUCIBILITY.md
    make faults KILLS=100   the whole one
"""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import nbformat
import psutil
import pytest
import recorded
import small_runs
import torch

from moe_study import __main__ as cli
from moe_study import engine, store, study
from moe_study.data import ROOT
from moe_study.train import TrainingError

KILLS = int(os.environ.get("FAULTS_KILLS", "5"))
RECORD = os.environ.get("FAULTS_RECORD") == "1"  # `make faults` sets it; nothing else writes the table
SHARD = "1/8"  # of 24 runs: three, of three arms
AMID = "amid training"
VICTIMS = (
    *("parent", "group", "worker", "parent", "Snakemake"),
    *("group", "parent", "worker", "group", "notebook"),
)
TABLE: dict[str, Counter] = {}
FOUND = ROOT / "results" / "faults" / "campaign.json"


def planned() -> list[study.Run]:
    """A small real grid."""
    return study.shard(study.runs("digits", "snnl"), SHARD)


def tried(kind: str, fault: str | None) -> None:
    """Count a fault, and what was wrong after it, if anything was."""
    TABLE.setdefault(kind, Counter()).update(["tried", "failed" if fault else "held"])
    if fault:
        print(f"\n{kind}: {fault}", flush=True)


def lines_of(found: dict) -> str:
    """The table of a campaign, as Markdown."""
    rows = [
        f"| {kind} | {counts['tried']} | {counts['held']} | {counts['failed']} |"
        for kind, counts in found["faults"].items()
    ]
    where = f"`make faults` on {found['machine']}, {found['minutes']} minutes"
    share = f"{found['kills']} random kills, {found['amid_training']} of them while runs were being trained"
    return "\n".join(
        [f"{where}; {share}:", "", "| fault | tried | held | failed |", "|---|---|---|---|", *rows, ""]
    )


@pytest.fixture(scope="module", autouse=True)
def table():
    """Prints the table at the end; `make faults` also writes it."""
    started = time.monotonic()
    yield
    faults = {
        kind: {word: counts[word] for word in ("tried", "held", "failed")}
        for kind, counts in TABLE.items()
        if kind != AMID
    }
    found = {
        **store.provenance(),
        "kills": sum(found["tried"] for kind, found in TABLE.items() if kind.startswith("kill: ")),
        "minutes": round((time.monotonic() - started) / 60),
        "amid_training": TABLE.get(AMID, Counter())["tried"],
        "faults": faults,
    }
    print(f"\n\n{lines_of(found)}")
    if RECORD:
        store.write(FOUND, found)
        recorded.show("faults", lines_of(found))


def test_the_page_shows_the_campaign_that_is_recorded():
    if not FOUND.exists():
        pytest.skip("no campaign is recorded")
    found = json.loads(FOUND.read_text())
    assert recorded.shown("faults") == lines_of(found)
    assert all(counts["tried"] == counts["held"] + counts["failed"] for counts in found["faults"].values())


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
        done = store.results_dir() / "digits" / ".work" / f"shards-{store.digest(ids)}"
        part, parts = SHARD.split("/")
        options = "--cores 1 --keep-going --rerun-incomplete --nolock --rerun-triggers mtime input --quiet"
        config = ["--config", "profile=digits", "study=snnl", f"shards={parts}"]
        return ["snakemake", *options.split(), *config, "--", str(done / f"{part}of{parts}.json")]
    if victim == "notebook":
        source = (
            "from moe_study import study\n"
            f"runs = study.shard(study.runs('digits', 'snnl'), {SHARD!r})\n"
            "len(study.ensure(runs, workers=2))"
        )
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(made, folder / "grid.ipynb")
        return [*["papermill", "--no-progress-bar", "--cwd"], str(folder), "grid.ipynb", "out.ipynb"]


def run_grid() -> int:
    """`python -m moe_study run` of the grid, here and now.

    In a fork of this process, workers are forks too: nothing is imported again, and most kills strike work.
    """
    context = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: context
    return cli.main(["run", "--profile", "digits", "--study", "snnl", "--shard", SHARD, "--workers", "2"])


@contextlib.contextmanager
def begun(victim: str, folder: Path) -> Iterator[psutil.Process]:
    """The command in a session of its own; what is left of it at the end is killed."""
    folder.mkdir(exist_ok=True)
    with (folder / "output").open("w") as output:
        if victim in ("Snakemake", "notebook"):
            line = command(victim, folder)
            process: psutil.Process = psutil.Popen(
                line, cwd=folder, stdout=output, stderr=output, start_new_session=True
            )
        else:
            process = psutil.Process(fork(run_grid, output.fileno()))
    try:
        yield process
    finally:
        if status_of(process) is None:  # the campaign itself was interrupted
            os.killpg(process.pid, signal.SIGKILL)


def fork(work: Callable[[], int | None], output: int | None = None) -> int:
    """The number of a child of this process, which has imported everything. What it returns is its status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            warnings.simplefilter("ignore")
            torch.set_num_threads(1)
            if output is not None:
                os.setsid()
                os.dup2(output, 1)
                os.dup2(output, 2)
            status = work() or 0
        except (store.StoreError, TrainingError, OSError):
            status = 3  # said clearly
        finally:
            os._exit(status)
    return child


def status_of(process: psutil.Process) -> int | None:
    """None while it runs; negative after a signal."""
    try:
        return process.wait(0)
    except psutil.TimeoutExpired:
        return None


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Of the engine, whoever started it."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = " ".join(child.cmdline())
            forked = child.ppid() == process.pid and "resource_tracker" not in words
            if "spawn_main" in words or (forked and not isinstance(process, psutil.Popen)):
                found.append(child)
    return found


def strike(victim: str, process: psutil.Process, draw: random.Random) -> None:
    """Kill; then wait until everything that was started has ended by itself.

    Raises:
        AssertionError: something did not end, or a batch that lost a worker did not finish.
    """
    family, workers = process.children(recursive=True), workers_of(process)
    target = process
    if victim == "worker":
        target = draw.choice(workers)
    elif victim == "notebook":  # papermill, its kernel, or a worker of the kernel
        kernels = [child for child in family if "ipykernel" in " ".join(child.cmdline())]
        target = draw.choice([process, *kernels[:1], *workers])
    if victim == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        target.kill()
    status = process.wait(600)
    if target in workers and status:
        raise AssertionError(f"{victim}: lost one worker and ended with {status}")
    _, alive = psutil.wait_procs(family, timeout=60)
    if alive:
        outlived = []
        for child in alive:
            with contextlib.suppress(psutil.Error):
                outlived.append(" ".join(child.cmdline())[:80])
                child.kill()
        raise AssertionError(f"{victim}: outlived by {outlived}")


def random_kills(home: Path, monkeypatch: pytest.MonkeyPatch, number: int, victims: Sequence[str]) -> None:
    """Kills of a real grid: after each every finished file is right, and of the resumed grid all are.

    A command that ends before its moment comes is begun again, and no kill is counted.
    """
    draw = random.Random(number)
    monkeypatch.setenv("MOE_RESULTS_DIR", str(home / "undisturbed"))
    started = time.monotonic()
    with begun("parent", home / "undisturbed-command") as process:
        assert process.wait(600) == 0
    usual = time.monotonic() - started
    subprocess.run([sys.executable, "-c", "import moe_study.study"], check=True)
    start_up = time.monotonic() - started - usual
    undisturbed = {run.id: small_runs.numbers(study.read(run)) for run in planned()}
    pending: list[str] = []  # kills of the grid at work: whether they held shows when it is whole
    folders = 0

    def fresh() -> None:
        nonlocal folders
        folders += 1
        monkeypatch.setenv("MOE_RESULTS_DIR", str(home / f"results-{folders}"))

    fresh()
    struck = 0
    while struck < number:
        victim = victims[struck % len(victims)]
        imports = 4 * start_up * (victim in ("Snakemake", "notebook"))  # one after the other
        after = draw.uniform(0.05, 0.65) * usual + imports * draw.random()
        fault = None
        with begun(victim, home / victim) as process:
            until = time.monotonic() + after
            while status_of(process) is None and (
                time.monotonic() < until or (victim == "worker" and not workers_of(process))
            ):
                time.sleep(0.05)
            amid = any((run.workspace / "checkpoint.pt").exists() for run in planned())
            try:
                if status_of(process) is None:
                    strike(victim, process, draw)
                    struck += 1
                    pending.append(victim)
                    TABLE.setdefault(AMID, Counter())["tried"] += amid
                    print(f"kill {struck} of {number}: {victim} after {after:.1f} s", flush=True)
            except AssertionError as error:
                fault = str(error)
                pending.append(victim)
            except (psutil.NoSuchProcess, ProcessLookupError, IndexError):  # it ended in this very moment
                process.wait(600)
            if (status := status_of(process) or 0) > 0 and pending[-1:] != ["notebook"]:
                fault = fault or f"{victim} ended with {status}"  # papermill fails with its kernel
        fault = fault or faults_of(planned(), undisturbed, whole=False)
        if fault or struck == number or all(run.path.exists() for run in planned()):
            with begun("parent", home / "resumed") as process:
                if process.wait(600):
                    fault = fault or "resuming failed: " + (home / "resumed" / "output").read_text()[-300:]
            fault = fault or faults_of(planned(), undisturbed, whole=True)
            for kind in pending:
                tried(f"kill: {kind}", fault)
            if fault:
                pytest.fail(f"{fault}\n{(home / victim / 'output').read_text()[-2000:]}")
            pending.clear()
            shutil.rmtree(store.results_dir())
            fresh()


# -------------------------------------------------------------------------- faults at known moments


class Queue:
    def put(self, message: object) -> None:
        pass


def forked(work: Callable[[], None]) -> int:
    """Exit status of `work` in a child of this process; -9 if killed, 3 if it said clearly what is wrong."""

    def alone() -> None:
        engine._progress = Queue()
        work()

    return os.waitstatus_to_exitcode(os.waitpid(fork(alone), 0)[1])


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


@pytest.mark.faults
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
    "list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "brackets": lambda path: path.write_text("[" * 100_000),
    "braces": lambda path: path.write_text('{"a":' * 100_000),
    "NaN": lambda path: path.write_text(path.read_text().replace('"accuracy":', '"accuracy":NaN,"x":', 1)),
    "accuracy": edit(lambda content: content["task"].update(accuracy=0.99)),
    "version": edit(lambda content: content["run"].update(version=99)),
    "id": edit(lambda content: content.update(id="0123456789")),
}


def mostly_of_the_campaign(values: Sequence, usual: object) -> list:
    """Parameters of a test, of which the ordinary tests try one."""
    return [pytest.param(value, marks=() if value == usual else pytest.mark.faults) for value in values]


@pytest.mark.parametrize("damage", mostly_of_the_campaign(list(ANY_FILE), "bit flipped at 0.5"))
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


@pytest.mark.slow
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


@pytest.mark.parametrize("kilobytes", mostly_of_the_campaign([8, 64, 256, 512, 1024], 64))
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


@pytest.mark.slow
def test_a_few_random_kills(home, monkeypatch):
    if RECORD:
        pytest.skip("the campaign has more of them")
    random_kills(home, monkeypatch, 2, ("group", "worker"))


@pytest.mark.faults
@pytest.mark.slow
def test_random_kills(home, monkeypatch):
    random_kills(home, monkeypatch, KILLS, VICTIMS)
