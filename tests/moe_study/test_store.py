"""Result files: whole or not there, whose they are, and what fails loudly."""

import errno
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import small_runs

from moe_study import store, study
from moe_study.data import ROOT

SUPPORT = Path(__file__).parents[1] / "support"


# --------------------------------------------------------------------------------- files of runs


@pytest.fixture
def finished(folders):
    run = small_runs.run(epochs=1)
    history = {"validation": {"accuracy": [0.5]}}
    study.write(run, {"task": {"accuracy": 0.5, "cross_entropy": 1.0}, "history": history, "commit": "c"})
    assert study.read(run)["task"]["accuracy"] == 0.5
    return run


def changed(run, change, stamp):
    """The file of a run with its content changed, and the digest as before, made anew or left out."""
    content = json.loads(run.path.read_text())
    change(content)
    if stamp == "anew":
        content["digest"] = store.content_digest(content)
    elif stamp == "none":  # as files of earlier versions
        content.pop("digest", None)
    run.path.write_text(json.dumps(content))


VALUES = {
    "accuracy": lambda c: c["task"].update(accuracy=0.59),
    "history of text": lambda c: c["history"]["validation"].update(accuracy=["x"]),
    "endpoint": lambda c: c.update(primary_endpoint="luckiest"),
    "commit": lambda c: c.update(commit=7),
}
IDENTITY = {
    "version": lambda c: c["run"].update(version=9),
    "setting": lambda c: c["run"]["train"].update(learning_rate=0.5),
    "unknown option": lambda c: c["run"].update(extra=1),
    "id": lambda c: c.update(id="0123456789"),
    "no id": lambda c: c.pop("id"),
    "no run": lambda c: c.pop("run"),
    "nothing": lambda c: c.clear(),
}
CHANGES = VALUES | IDENTITY


@pytest.mark.parametrize(
    ("change", "stamp"),
    [(c, s) for c in CHANGES for s in ("as before", "anew", "none") if c in IDENTITY or s != "anew"],
)
def test_an_edited_result_file_is_named_with_the_remedy(change, stamp, finished):
    """Unless it is a value that was changed, and the digest made anew."""
    changed(finished, CHANGES[change], stamp)
    with pytest.raises(store.StoreError, match=r"delete it and run again") as raised:
        study.read(finished)
    assert str(finished.path) in str(raised.value)


def test_an_edited_result_that_states_no_digest_is_named(folders):
    """Files of earlier versions: their digests stand in one file beside them."""
    run = study.runs("core", "snnl", "cifar100", "base")[0]
    committed = ROOT / "results" / run.path.relative_to(store.results_dir())
    content = json.loads(committed.read_bytes())
    assert "digest" not in content
    run.path.parent.mkdir(parents=True)
    shutil.copy(committed, run.path)
    assert study.read(run) == content
    content["task"]["accuracy"] += 0.09
    run.path.write_text(json.dumps(content))
    with pytest.raises(store.StoreError, match=r"was changed after it was written.*delete it"):
        study.read(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b'{"id": ', b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b'{"a":' * 100_000],
    ids=["empty", "no keys", "list", "null", "torn", "binary", "NaN", "brackets", "braces"],
)
def test_what_is_no_result_is_named(content, finished):
    finished.path.write_bytes(content)
    with pytest.raises(store.StoreError, match=re.escape(str(finished.path)) + ".*delete it"):
        study.ensure([finished], quiet=True)


def test_a_pipe_a_folder_and_a_link_in_place_of_a_result(finished):
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(ROOT, path)):
        finished.path.unlink()
        make(finished.path)
        with pytest.raises(store.StoreError, match="not a regular file"):
            study.read(finished)
        (finished.path.rmdir if finished.path.is_dir() and make is os.mkdir else finished.path.unlink)()
        finished.path.touch()


def test_a_copied_result_is_named(finished):
    other = replace(finished, seed=finished.seed + 1)
    other.path.write_bytes(finished.path.read_bytes())
    with pytest.raises(store.StoreError, match=f"{other.path.name} is of another run.*{finished.id}"):
        study.results([finished, other])


def test_a_file_that_changes_is_checked_again(finished):
    changed(finished, CHANGES["accuracy"], "as before")
    with pytest.raises(store.StoreError, match="was changed after it was written"):
        study.read(finished)


def test_results_of_unknown_origin_are_counted():
    known = {"commit": "c", "dirty": False}
    assert store.of_unknown_origin([known, known | {"commit": None}, known | {"dirty": None}, {}]) == 3


@pytest.mark.slow
def test_git_is_asked_in_the_folder_of_another_owner(tmp_path, monkeypatch):
    """Git refuses such a folder; that it does so here, and that the commit is found nevertheless."""
    if os.getuid() != 0:
        pytest.skip("giving a folder to another owner needs root")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(tmp_path)]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    asked = [*git, "rev-parse", "HEAD"]
    commit = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    for path in (tmp_path, tmp_path / ".git"):
        os.chown(path, 12345, 12345)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.delenv("MOE_COMMIT", raising=False)
    assert subprocess.run(asked, check=False, capture_output=True).returncode != 0
    store.provenance.cache_clear()
    try:
        assert store.provenance()["commit"] == commit
        assert store.provenance()["dirty"] is False
    finally:
        store.provenance.cache_clear()


def test_a_relative_results_folder_is_below_the_project(monkeypatch):
    monkeypatch.setenv("MOE_RESULTS_DIR", "build/results")
    monkeypatch.setenv("MOE_FIGURES_DIR", "build/figures")
    for folder in (ROOT, ROOT / "notebooks"):
        monkeypatch.chdir(folder)
        assert store.results_dir() == ROOT / "build" / "results"
        assert store.figures_dir() == ROOT / "build" / "figures"


# ------------------------------------------------------------------------------------------ store


def test_written_json_is_compact_and_whole(tmp_path):
    path = tmp_path / "a" / "b.json"
    store.write(path, {"x": 1 / 3, "nan": float("nan"), "list": (1, 2.0)})
    assert store.read(path) == {"x": 0.333333, "nan": None, "list": [1, 2.0]}
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(store.StoreError, match=r"disk is full.*MOE_RESULTS_DIR"):
        store.write(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_full_tmpfs_keeps_finished_runs(tmp_path, monkeypatch):
    """A real file system of 2 MB: a checkpoint does not fit, what was finished stays."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        monkeypatch.setenv("MOE_RESULTS_DIR", str(disk))
        small, large = small_runs.run(epochs=1), small_runs.run(epochs=1, arm="dense")
        large = replace(large, model=replace(large.model, expert_hidden=20_000))
        with pytest.raises(study.StudyError, match=r"1 of 2 runs failed.*\n.*(disk is full|No space)"):
            study.ensure([small, large], workers=1, quiet=True)
        assert small.path.exists()
        assert not large.path.exists()
        store.read(small.path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_unwritable_results_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MOE_RESULTS_DIR", str(tmp_path / "file" / "results"))
    with pytest.raises(store.StoreError, match="MOE_RESULTS_DIR"):
        study.ensure([small_runs.run(epochs=1)], workers=1, quiet=True)


def test_torn_result_file_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"id": ')
    with pytest.raises(store.StoreError, match="delete it"):
        store.read(path)
