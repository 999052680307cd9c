"""The command line: what it says, what it refuses, and that it needs no more than a bare machine has."""

import importlib.metadata
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from moe_study import data, plan, store, study
from moe_study.__main__ import main
from moe_study.data import ROOT, datasets, text


@pytest.fixture(autouse=True)
def own_folders(folders, monkeypatch):
    """An empty data folder as well, and no way out to the network."""
    monkeypatch.setenv("MOE_DATA_DIR", str(folders / "data"))
    for scheme in ("http", "https", "ftp"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")  # the discard port: refused at once
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def python(arguments: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """A Python process that does not inherit the test's own import path."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("run --profile nope", "'nope'"),
        ("run --profile digits --study nope", "'nope'"),
        ("run --profile digits --dataset svhn", "'svhn'"),
        ("run --profile digits --arm nope", "'nope'"),
        ("run --profile core --study snnl --dataset mnist --arm raw", "'raw'"),
        ("run --profile paper --study ac-vision-trained", "no runs of study 'ac-vision-trained'"),
        ("run --profile digits --shard 3/2", "'3/2'"),
        ("run --profile digits --shard 0/2", "'0/2'"),
        ("run --profile digits --shard half", "'half'"),
        ("run --profile digits --shard \uff11/\uff12", "'\uff11/\uff12'"),
        ("run --profile digits --shard 1/2/3", "'1/2/3'"),
        ("run --profile digits --arm base,nope", "'nope'"),
        ("run --profile digits --workers 0", "--workers must be at least 1, got 0"),
        ("run --profile digits --workers -3", "got -3"),
        ("plan --profile nope", "'nope'"),
        ("plan --profile digits --study nope", "'nope'"),
        ("plan --profile digits --dataset svhn", "'svhn'"),
        ("plan --profile digits --arm nope", "'nope'"),
        ("plan --profile digits --workers 0", "--workers must be at least 1, got 0"),
        ("plan --profile digits --workers -3", "got -3"),
        ("where --profile nope", "'nope'"),
        ("data svhn", "'svhn'"),
    ],
)
def test_unknown_values_are_named_in_one_line(arguments, named, folders, capsys):
    assert main(arguments.split()) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: .+\n", err)
    assert named in err
    assert files(folders) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", "command"),
        ("train", "'train'"),
        ("run", "--profile"),
        ("run --profile digits --epochs 3", "--epochs"),
        ("run --profile digits --workers many", "'many'"),
        ("run --profile digits --time-limit soon", "'soon'"),
        ("run --profile digits --device tpu", "'tpu'"),
        ("run --profile digits --workers 1.5", "'1.5'"),
        ("run --profile digits --workers True", "'True'"),
        ("run --profile digits --workers \uff12", "'\uff12'"),  # a full-width 2
        ("run --profile digits --time-limit nan", "'nan'"),
        ("run --profile digits --time-limit=-1", "'-1'"),
        ("run --profile digits --time-limit inf", "'inf'"),
        ("run --profile digits --out=", "--out: the path is empty"),
        ("run --profile digits --done=", "--done: the path is empty"),
        ("run --profile digits --follow me", "'me'"),
    ],
)
def test_what_argparse_refuses(arguments, named, folders, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert line.startswith("error: ")
    assert files(folders) == []


@pytest.mark.parametrize("command", ["", "run", "plan", "where", "data", "readme", "trust"])
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    options = capsys.readouterr().out.partition("options:")[2]
    for line in re.findall(r"^  -.*(?:\n {10,}.*)?", options, re.M):
        assert len(re.split(r"\s{2,}", line.strip(), maxsplit=1)) == 2, line


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"moe-collapse {importlib.metadata.version('moe-collapse')}\n"


def test_several_arms_run_seed_by_seed():
    found = study.runs("core", "snnl", "cifar10", "base,snnl")
    alone = {arm: study.runs("core", "snnl", "cifar10", arm) for arm in ("base", "snnl")}
    assert sorted(run.id for run in found) == sorted(run.id for runs in alone.values() for run in runs)
    seeds = [run.seed for run in found]
    assert seeds == [seed for seed in dict.fromkeys(seeds) for _ in range(2)]
    assert {run.arm for run in found[:2]} == {"base", "snnl"}
    with pytest.raises(study.StudyError, match="unknown arm 'nope'"):
        study.runs("core", "snnl", "cifar10", "base,nope")


def piped(arguments: str, reader: str, cwd: Path) -> subprocess.CompletedProcess:
    """In bash: status of the command itself, what the reader said, and what came on stderr."""
    line = f"{sys.executable} -m moe_study {arguments} | {reader}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(
        ["bash", "-c", line],
        cwd=cwd,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_reader_that_leaves_early_ends_the_plan_quietly(folders):
    process = piped("plan --profile digits", "head -1", ROOT)
    assert process.stdout.startswith("study ")
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.slow
def test_a_broken_pipe_does_not_keep_a_run_from_its_done_file(folders):
    done = folders / "DONE.json"
    wanted = f"run --profile digits --study snnl --arm raw --shard 1/5 --workers 1 --done {done}"
    process = piped(wanted, "true", ROOT)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    run = study.runs("digits", "snnl", arm="raw")[0]
    assert store.read(done) == {"runs": [run.id]}
    study.read(run)


@pytest.mark.slow
def test_a_run_ends_with_the_process_that_it_follows(folders):
    """As a shard with Snakemake; its workers with it."""
    followed = subprocess.Popen(["sleep", "300"])
    wanted = [
        "run",
        "--profile",
        "digits",
        "--study",
        "snnl",
        "--workers",
        "1",
        "--follow",
        str(followed.pid),
    ]
    process = subprocess.Popen([sys.executable, "-m", "moe_study", *wanted], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert b"epoch 1/12" in process.stdout.readline()  # its worker trains
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        followed.kill()
        followed.wait()
        assert process.wait(timeout=60) == 1
        until = time.monotonic() + 60
        while any(alive(child) for child in children) and time.monotonic() < until:
            time.sleep(0.05)
        assert children
        assert not any(alive(child) for child in children)
    finally:
        followed.kill()
        followed.wait()
        process.kill()
        process.communicate()  # closes its output


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_profile_without_data_results_or_network_says_so(folders, capsys):
    assert main(["data", "--profile", "core"]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "error: profile 'core' has no results, and none of its data can be had"
    warned = re.findall(r"^warning: (?:data set|corpus) '(\w+)'", err, re.M)
    assert len(warned) == len({run.dataset for run in study.runs("core")}) == err.count("MOE_DATA_DIR")


def test_a_profile_whose_runs_are_finished_needs_no_data(folders, capsys, monkeypatch):
    runs = study.runs("core", "snnl", "cifar10", "base")
    monkeypatch.setattr(study, "runs", lambda profile: runs)
    study.write(runs[0], {})
    assert main(["data", "--profile", "core"]) == 0  # one is finished: a report can be made
    assert capsys.readouterr().err.startswith("warning: ")
    for run in runs:
        study.write(run, {})
    assert main(["data", "--profile", "core"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["data", "--profile", "digits"]) == 0
    assert main(["data", "cifar10", "--profile", "digits"]) == 1
    assert "not both; got 'cifar10'" in capsys.readouterr().err


def test_results_folder_that_cannot_be_made(folders, capsys):
    (folders / "file").write_text("in the way")
    wanted = ["--profile", "digits", "--arm", "raw", "--shard", "1/5"]
    assert main(["run", *wanted, "--out", str(folders / "file" / "results")]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: cannot write under .+\n", err)
    assert "MOE_RESULTS_DIR" in err
    assert files(folders) == ["file"]


# --------------------------------------------------------------------------------------------- data


def test_missing_data_without_a_network(folders, capsys, monkeypatch):
    from torchvision.datasets import CIFAR10

    def no_network(self):
        raise OSError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", no_network)
    assert main(["data", "cifar10"]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: .+\n", err)
    for part in ("'cifar10'", str(folders / "data"), "MOE_DATA_DIR", "`make data`", "no route to host"):
        assert part in err
    assert [name for name in files(folders) if not name.endswith(".lock")] == []


def test_a_run_without_its_data_fails_with_the_remedy(folders, capsys):
    """In a worker process, where torchvision itself fails to reach the network."""
    wanted = ["--profile", "core", "--study", "snnl", "--dataset", "cifar10", "--arm", "base"]
    done = folders / "DONE.json"
    assert main(["run", *wanted, "--shard", "1/10", "--device", "cpu", "--done", str(done)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: 1 of 1 runs failed")
    assert "Traceback" not in err
    for part in ("base seed 42", "'cifar10'", str(folders / "data"), "MOE_DATA_DIR", "`make data`"):
        assert part in err
    assert [name for name in files(folders) if not name.endswith("lock")] == []


def test_data_counts_the_embedded_digits(folders, capsys):
    assert main(["data", "digits"]) == 0
    assert capsys.readouterr().out == (
        f"digits: 1437 training, 360 test images\ndata folder: {folders / 'data'}\n"
    )
    assert files(folders) == []


# --------------------------------------------------------------------------------------------- plan


def rows(printed: str) -> dict[tuple[str, str, str], tuple[int, int, str]]:
    """(study, data set, arm) -> done, left, minutes left."""
    table = printed.split("\n\n")[0].splitlines()
    assert table[0].split() == ["study", "data", "set", "arm", "done", "left", "minutes", "left"]
    split = [line.split() for line in table[1:]]
    return {(a, b, c): (int(done), int(left), minutes) for a, b, c, done, left, minutes in split}


@pytest.mark.parametrize("profile", study.PROFILES)
def test_plan_says_what_is_to_come_and_starts_nothing(profile, folders, capsys):
    assert main(["plan", "--profile", profile, "--workers", "4"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert sum(left for _, left, _ in rows(out).values()) == len(study.runs(profile))
    assert {done for done, _, _ in rows(out).values()} == {0}
    assert re.search(
        r"^time: 0 minutes of one process and \d+ runs of unknown length, about .* with 4 processes$",
        out,
        re.M,
    )
    assert f"\nnotebooks: {len(study.notebooks(study.runs(profile))) + 2} after the runs" in out
    # mnist, fashion_mnist, cifar10, cifar100 (12, 31, 170, 169), the text (5): each once, whoever needs it
    megabytes = {"digits": 0, "core": 387, "paper": 387}[profile]
    assert f"\ndownload: {megabytes} MB (" in out
    assert f"unpacked under {folders / 'data'}" in out
    assert re.search(rf"^disk: about [\d.]+ MB of results under {folders / 'results'}, ", out, re.M)
    assert list(folders.iterdir()) == []


def test_plan_does_not_ask_for_data_that_is_there(folders, capsys):
    published = datasets.PUBLISHED["cifar10"]
    for name in published.train | published.test:
        store.write_bytes(folders / "data" / published.folder / name, b"")
    assert main(["plan", "--profile", "core", "--dataset", "cifar10"]) == 0
    assert "\ndownload: 0 MB (nothing), 0 MB unpacked" in capsys.readouterr().out


def test_plan_takes_the_median_of_an_arm_and_for_others_that_of_an_epoch(folders, capsys):
    snnl = study.runs("digits", "snnl")
    base, raw = ([run for run in snnl if run.arm == arm] for arm in ("base", "raw"))
    for run, seconds in zip(base, (60.0, 240.0, 120.0), strict=False):
        study.write(run, {"wall_seconds": seconds, "peak_memory_mb": 300.0})
    assert main(["plan", "--profile", "digits", "--study", "snnl", "--workers", "2"]) == 0
    out = capsys.readouterr().out
    table = rows(out)
    assert table["snnl", "digits", "base"] == (3, len(base) - 3, f"{(len(base) - 3) * 2:.1f}")
    assert table["snnl", "digits", "raw"] == (0, len(raw), f"{len(raw) * 2:.1f}")  # as many epochs
    total = 2 * (len(snnl) - 3)
    one, two = plan.duration(60 * total), plan.duration(30 * total)
    assert f"\ntime: {one} of one process, about {two} with 2 processes\n" in out
    assert "\nmemory: up to 600 MB (300 MB a process)\n" in out


def test_plan_does_not_invent_a_time(folders, capsys):
    assert main(["plan", "--profile", "digits", "--study", "snnl", "--arm", "base"]) == 0
    out = capsys.readouterr().out
    (row,) = rows(out).values()
    assert row == (0, row[1], "unknown")
    assert f"\ntime: 0 minutes of one process and {row[1]} runs of unknown length, " in out


def test_plan_announces_no_download_where_nothing_is_left(folders, capsys):
    for run in study.runs("core", "snnl", "cifar10", "base"):
        study.write(run, {"wall_seconds": 1.0, "peak_memory_mb": 300.0})
    assert (
        main(["plan", "--profile", "core", "--study", "snnl", "--dataset", "cifar10", "--arm", "base"]) == 0
    )
    assert "\ndownload: 0 MB (nothing), 0 MB unpacked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 minutes"),
        (600, "10 minutes"),
        (7199, "120 minutes"),
        (7200, "2.0 hours"),
        (520_000, "6.0 days"),
    ],
)
def test_long_times_are_said_in_hours_and_days(seconds, said):
    assert plan.duration(seconds) == said


# ------------------------------------------------------------------------------------- where and run


def test_where_is_below_the_results_folder(folders, capsys):
    assert main(["where", "--profile", "core"]) == 0
    assert capsys.readouterr().out == f"{folders / 'results' / 'core' / 'report.html'}\n"
    assert files(folders) == []


@pytest.mark.slow
def test_where_does_not_depend_on_the_working_folder(tmp_path):
    process = python(["-m", "moe_study", "where", "--profile", "digits"], cwd=tmp_path, MOE_RESULTS_DIR="")
    assert process.stdout == f"{ROOT / 'results' / 'digits' / 'report.html'}\n"
    assert process.returncode == 0


@pytest.mark.slow
def test_time_limit_zero_trains_nothing(folders, capsys):
    elsewhere, done = folders / "elsewhere", folders / "DONE.json"
    wanted = ["--profile", "digits", "--arm", "raw", "--shard", "1/5", "--done", str(done)]
    assert main(["run", *wanted, "--out", str(elsewhere), "--time-limit", "0"]) == 0
    out = capsys.readouterr().out
    assert "time limit: 1 runs are left" in out
    assert out.endswith(f"0 of 1 runs have their result under {elsewhere}\n")
    assert files(folders) == []


@pytest.mark.slow
def test_done_is_written_when_every_run_has_its_file(folders, capsys):
    """Two runs, one finished: no DONE. Both finished: DONE with their ids, and nothing is trained."""
    runs = study.shard(study.runs("digits", arm="raw"), "1/1")
    assert len(runs) == 2
    done = folders / "a" / "DONE.json"
    command = ["run", "--profile", "digits", "--arm", "raw", "--shard", "1/1", "--done", str(done)]
    study.write(runs[0], {})
    assert main([*command, "--time-limit", "0"]) == 0
    assert f"1 of 2 runs have their result under {folders / 'results'}\n" in capsys.readouterr().out
    assert not done.exists()
    study.write(runs[1], {})
    assert main(command) == 0
    assert capsys.readouterr().out == f"2 of 2 runs have their result under {folders / 'results'}\n"
    assert store.read(done) == {"runs": [run.id for run in runs]}


# -------------------------------------------------------------------------------------- bare machine

BARE = ("torch", "torchvision", "numpy", "scipy", "scikit-learn")
STUDY_ONLY = {
    *("pandas", "matplotlib", "seaborn", "IPython", "ipykernel", "papermill", "tqdm", "nbconvert"),
    *("nbformat", "jupyter_client", "jupyter_core", "jupyterlab", "snakemake", "safetensors", "statsmodels"),
}

HOOK = """
import sys

BLOCKED = set({blocked!r})


class Bare:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Bare(finder) for finder in sys.meta_path]
"""


def bare_distributions() -> set[str]:
    """`BARE` and all that these need themselves, by canonical name."""
    found, todo = set(), list(BARE)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        found.add(name)
        needed = [Requirement(text) for text in requires]
        todo += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.mark.slow
def test_run_needs_only_what_a_bare_machine_has(folders):
    """Every other installed package is out of reach, of this process and of its workers."""
    allowed = bare_distributions() | {"moe-collapse"}
    blocked = STUDY_ONLY | {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not any(re.sub(r"[-_.]+", "-", owner).lower() in allowed for owner in owners)
    }
    assert not blocked & {"torch", "torchvision", "numpy", "scipy", "sklearn", "moe_lib"}
    hook = folders / "bare" / "sitecustomize.py"
    hook.parent.mkdir()
    hook.write_text(HOOK.format(blocked=sorted(blocked)))
    bare = {"PYTHONPATH": f"{hook.parent}{os.pathsep}{ROOT}"}

    assert "No module named 'pandas'" in python(["-c", "import pandas"], folders, **bare).stderr

    out, done = folders / "out", folders / "DONE.json"  # the arm and seed that measure the most
    wanted = ["--profile", "digits", "--study", "snnl", "--arm", "snnl", "--shard", "1/5", "--workers", "1"]
    process = python(
        ["-m", "moe_study", "run", *wanted, "--out", str(out), "--done", str(done)], folders, **bare
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert f"1 of 1 runs have their result under {out}" in process.stdout
    run = study.runs("digits", arm="snnl")[0]
    result = store.read(out / run.path.relative_to(store.results_dir()))
    assert result["id"] == run.id
    assert {"tsne", "null", "task"} <= set(result)
    assert store.read(done) == {"runs": [run.id]}


def test_every_data_set_of_the_plan_is_known():
    needed = {run.dataset for profile in study.PROFILES for run in study.runs(profile)}
    assert needed <= {*data.DATASETS, *text.CORPORA}
