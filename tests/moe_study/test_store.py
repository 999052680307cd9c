"""Result files: whole or not there, whose they are, and what fails loudly."""

import errno
import json
import os
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


def test_a_copied_result_is_named(finished):
    other = replace(finished, seed=finished.seed + 1)
    other.path.write_bytes(finished.path.read_bytes())
    with pytest.raises(store.StoreError, match=f"{other.path.name} is of another run.*{finished.id}"):
        study.results([finished, other])


def test_the_commit_of_a_folder_around_a_copy_is_not_ours(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "outer"], check=True)
    (tmp_path / "copy").mkdir()
    found = {}
    for root in (tmp_path, tmp_path / "copy"):
        monkeypatch.setattr(store, "ROOT", root)
        monkeypatch.delenv("MOE_COMMIT", raising=False)
        store.provenance.cache_clear()
        found[root.name] = store.provenance()
    store.provenance.cache_clear()
    assert (found["copy"]["commit"], found["copy"]["dirty"]) == (None, None)
    assert len(found[tmp_path.name]["commit"]) == 40


def test_results_of_unknown_origin_are_counted():
    known = {"commit": "c", "dirty": False}
    assert (
        store.of_unknown_origin(
            [known, known | {"commit": None}, known | {"dirty": None}, known | {"resumed_from": ["x"]}, {}]
        )
        == 4
    )


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
