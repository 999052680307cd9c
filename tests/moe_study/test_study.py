"""The engine: names, result files, resuming after SIGKILL, and what fails loudly."""

import errno
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import small_runs
import torch

from moe_lib.models.language import LanguageModel
from moe_lib.models.transformer import moe_layers
from moe_study import data, engine, locks, store, study
from moe_study.configs import arms, collapse, snnl
from moe_study.data import ROOT
from moe_study.train import load_checkpoint

SUPPORT = Path(__file__).parents[1] / "support"


# ------------------------------------------------------------------------------------------ names


def test_digest_depends_on_every_choice_and_not_on_new_defaults():
    @dataclass(frozen=True)
    class Before:
        width: int
        depth: int = 2

    @dataclass(frozen=True)
    class After:
        width: int
        depth: int = 2
        gate: str = "mlp"

    assert store.digest(Before(3)) == store.digest(After(3))
    different = {store.digest(c) for c in (After(3), After(4), After(3, 3), After(3, gate="none"))}
    assert len(different) == 4


def test_ids_are_distinct_and_stable():
    for profile in arms.PROFILES:
        ids = [run.id for run in study.runs(profile)]
        assert len(set(ids)) == len(ids)
    first = study.runs("digits", "snnl", "digits", "base")[0]
    assert first.id == study.runs("digits", "snnl", "digits", "base")[0].id
    assert first.path.name == f"base-s42-{first.id}.json"


def test_committed_results_belong_to_the_plan(monkeypatch):
    """No file from another version or setting lies among the results, and each holds its own name."""
    monkeypatch.delenv("MOE_RESULTS_DIR", raising=False)
    for profile in ("core", "paper"):
        planned = {run.path: run for run in study.runs(profile)}
        for path in (ROOT / "results" / profile).glob("*/*/*.json"):
            assert path in planned, f"{path} is not what the plan would make now"
            result = study.read(planned[path])  # its id and configuration are checked there
            assert result["commit"]
            assert result["dirty"] is False
            assert path.stat().st_size <= 20_000


def test_arms_differ_from_base_in_one_thing():
    settings = snnl.SETTINGS["core"]["fashion_mnist"]
    study_arms = arms.snnl_arms(settings)
    assert set(study_arms) | set(collapse.collapse_arms(settings)) | set(collapse.top1_arms(settings)) == set(
        arms.ARM_DESCRIPTIONS
    )
    base_model, base_objective = study_arms["base"]
    dense_model = study_arms["dense"][0]
    assert dense_model.num_experts * dense_model.expert_hidden == (
        base_model.num_experts * base_model.expert_hidden
    )
    for arm, (model, objective) in study_arms.items():
        reference = dense_model if arm.startswith("dense") else base_model
        if arm == "uniform-snnl":  # away from "uniform-gate"
            reference = study_arms["uniform-gate"][0]
        changed_model = model != reference
        changed_objective = objective != base_objective
        assert (changed_model + changed_objective) == (arm not in ("base", "dense")), arm


def test_the_collapse_map_has_every_arm_at_every_size_and_only_sizes_differ():
    plan = collapse.MAPS["core"]
    runs = study.runs("core", "collapse-map")
    sizes = {(r.model.num_experts, r.model.expert_hidden, r.model.code_dim) for r in runs}
    assert sizes == set(itertools.product(plan.num_experts, plan.expert_hidden, plan.code_dim))
    assert len(runs) == len({run.id for run in runs}) == len(sizes) * len(plan.arms) * len(plan.seeds)
    reference = {r.arm: r for r in study.runs("core", "collapse")}
    for run in runs:  # at the collapse study's own size, a run of it but for the seed
        model = replace(run.model, num_experts=4, expert_hidden=4, code_dim=8)
        own = reference[run.arm]
        assert (model, run.objective, run.train) == (own.model, own.objective, own.train)


def test_top1_arms_route_each_image_to_one_expert():
    for run in study.runs("core", "collapse-top1"):
        assert run.model.top_k == 1
        assert (run.model.gate == "hash") == run.arm.startswith("hash")
        assert (run.objective.snnl is not None) == run.arm.endswith("snnl")


def test_text_past_the_plateau_changes_the_last_router_alone():
    """One pass over WikiText-2, on seeds that nobody has seen, with the arms' router in the last block."""
    kinds = {}
    for run in study.runs("core", "ac-language-confirm"):
        assert run.seed in arms.CONFIRMATORY_SEEDS
        assert 0.99 < run.train.epochs * run.epoch_tokens / 10_797_148 <= 1  # bytes of the training text
        if run.arm not in kinds:
            layers = moe_layers(LanguageModel(run.model, 256))
            kinds[run.arm] = [type(layer.router).__name__ for layer in layers]
    assert {tuple(found[:2]) for found in kinds.values()} == {("LinearRouter", "LinearRouter")}
    assert kinds["linear"][2] == "LinearRouter"
    assert kinds["cosine"][2] == "CosineRouter"
    assert {kinds[arm][2] for arm in kinds if arm.startswith("ac")} == {"AdaptiveClusteringRouter"}
    assert kinds["hash"][2] == kinds["hash-token"][2] == "HashRouter"


@pytest.mark.parametrize("name", ["collapse", "collapse-top1"])
def test_collapse_settings_are_what_tuning_chose(name, monkeypatch):
    """For each arm the rate and the weight of the lowest validation cross-entropy at the last epoch."""
    monkeypatch.delenv("MOE_RESULTS_DIR", raising=False)
    scores = defaultdict(list)
    for path in (ROOT / "results" / "core" / f"{name}-tuning" / "domains").glob("*.json"):
        file = json.loads(path.read_text())
        run = file["run"]
        weight = (run["objective"]["snnl"] or {}).get("factor"), run["objective"]["balance"]
        key = run["arm"], run["train"]["learning_rate"], weight
        scores[key].append(file["history"]["validation"]["cross_entropy"][-1])
    assert all(len(found) == len(arms.TUNING_SEEDS) for found in scores.values())
    takes_over = {"snnl-shuffled", "snnl-weaker"}  # arms that are not in the grid
    for run in study.runs("core", name):
        if run.arm not in takes_over and run.seed == study.runs("core", name)[0].seed:
            own = {key: sum(found) for key, found in scores.items() if key[0] == run.arm}
            factor = None if run.objective.snnl is None else run.objective.snnl.factor
            weight = factor, run.objective.balance
            assert min(own, key=own.get) == (run.arm, run.train.learning_rate, weight)


@pytest.mark.parametrize("dataset", snnl.TUNING_DATASETS)
def test_settings_are_what_tuning_chose(dataset, monkeypatch):
    """The rule of snnl.SETTINGS, applied to the committed tuning results."""
    monkeypatch.delenv("MOE_RESULTS_DIR", raising=False)
    runs = [run for run in study.runs("core", "snnl-tuning", dataset) if run.path.exists()]
    if not runs:
        pytest.skip("no tuning results yet")
    scores = {}
    for run in runs:
        objective = run.objective
        weight = (objective.snnl.factor if objective.snnl else 0) or objective.balance or objective.auxiliary
        key = (run.arm, run.train.epochs, run.train.learning_rate, weight)
        scores.setdefault(key, {})[run.seed] = store.read(run.path)["history"]["best_cross_entropy"]

    def best(arm, epochs, position, rate=None):
        """The setting with the lowest mean, among those that the same seeds have tried."""
        tried = {k: v for k, v in scores.items() if k[:2] == (arm, epochs) and rate in (None, k[2])}
        seeds = set.intersection(*(set(v) for v in tried.values())) if tried else set()
        means = {k: sum(v[s] for s in seeds) / len(seeds) for k, v in tried.items()} if seeds else {}
        return min(means, key=means.get)[position] if means else None

    settings = snnl.SETTINGS["core"][dataset]
    rate = settings.train.learning_rate
    assert best("base", settings.train.epochs, 2) in (rate, None)
    assert best("snnl", 4, 3, rate) == settings.factor
    assert best("dense-snnl", 4, 3, rate) == settings.dense_factor
    assert best("base-balance", 4, 3, rate) in (settings.balance, None)
    assert best("base-aux", 4, 3, rate) in (settings.auxiliary, None)
    preferred = {best(arm, 4, 2) for arm in ("base", "snnl", "dense")}
    assert len(preferred) == 1, "arms prefer different rates: give them their own (Settings.learning_rates)"


@pytest.mark.parametrize("name", ["ac-vision", "ac-language", "crossed"])
def test_routed_settings_are_what_tuning_chose(name, monkeypatch):
    """The value in use has the lowest validation cross-entropy of those tried, for every arm tried."""
    monkeypatch.delenv("MOE_RESULTS_DIR", raising=False)
    found = defaultdict(list)
    for run in study.runs("core", f"{name}-tuning"):
        value = run.objective.snnl.factor if name == "crossed" else run.train.learning_rate
        found[run.arm, value].append(store.read(run.path)["history"]["best_cross_entropy"])
    in_use = {
        run.arm: run.objective.snnl.factor if name == "crossed" else run.train.learning_rate
        for run in study.runs("core", name)
        if name != "crossed" or run.objective.snnl is not None
    }
    for arm in {arm for arm, _ in found}:
        means = {value: sum(scores) / len(scores) for (a, value), scores in found.items() if a == arm}
        assert min(means, key=means.get) == in_use[arm]


def test_paired_arms_share_everything_but_the_arm():
    runs = study.runs("digits", "snnl", "digits")
    by_seed = {}
    for run in runs:
        by_seed.setdefault(run.seed, set()).add((run.train, run.train_images))
    assert all(len(shared) == 1 for shared in by_seed.values())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("nope",), "nope"),
        (("core", "nope"), "nope"),
        (("core", "snnl", "svhn"), "svhn"),
        (("core", "snnl", "mnist", "raw"), "raw"),
    ],
)
def test_unknown_names(arguments, named):
    with pytest.raises(study.StudyError, match=named) as raised:
        study.runs(*arguments)
    assert "known:" in str(raised.value)


def test_shards_cover_the_plan_once():
    runs = study.runs("digits")
    parts = [study.shard(runs, f"{i}/4") for i in range(1, 5)]
    assert sorted(run.id for part in parts for run in part) == sorted(run.id for run in runs)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b"])
def test_bad_shards(part):
    with pytest.raises(study.StudyError, match="shard"):
        study.shard([], part)


# ----------------------------------------------------------------------------------------- engine


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
    run = small_runs.run(epochs=60)
    checkpoint = run.workspace / "checkpoint.pt"
    batch = subprocess.Popen([sys.executable, "small_runs.py", "60"], cwd=SUPPORT, stdout=subprocess.DEVNULL)
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
    assert 1 <= done < 60
    resumed = study.ensure([run], workers=1, quiet=True)[0]  # waits for the dying worker's lock, if need be
    assert children
    assert not any(Path(f"/proc/{child}").exists() for child in children)

    monkeypatch.setenv("MOE_RESULTS_DIR", str(folders / "whole"))
    whole = study.ensure([run], workers=1, quiet=True)[0]
    assert small_runs.numbers(resumed) == small_runs.numbers(whole)


@pytest.mark.slow
def test_a_killed_worker_loses_no_other_run(folders):
    """SIGKILL to the only worker of three runs: all three are there in the end."""
    runs = [replace(small_runs.run(epochs=40), seed=seed) for seed in (1, 2, 3)]

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
def test_time_limit_leaves_a_run_to_be_continued(folders):
    run = small_runs.run(epochs=2)
    assert study.ensure([run], workers=1, time_limit=0, quiet=True) == []
    assert not run.path.exists()
    assert len(study.ensure([run], workers=1, quiet=True)) == 1


@pytest.mark.slow
def test_one_failing_run_does_not_stop_the_others(folders):
    """The first run diverges; the message names arm, seed, epoch and batch."""
    good, bad = small_runs.run(epochs=1), small_runs.run(epochs=1, arm="base", learning_rate=1e200)
    with pytest.raises(study.StudyError, match=r"1 of 2 runs failed.*\n.*base seed 1234.*epoch 0, batch \d+"):
        study.ensure([bad, good], workers=1, quiet=True)
    assert good.path.exists()
    assert not bad.path.exists()


@pytest.mark.slow
def test_a_loss_that_refuses_its_input_names_the_run(folders):
    """SNNL raises on features that are not finite before any loss can be."""
    run = small_runs.run(epochs=2, arm="snnl-pretrained", learning_rate=1e200)
    with pytest.raises(study.StudyError, match=r"snnl-pretrained seed 1234, epoch 0, batch \d+: features"):
        study.ensure([run], workers=1, quiet=True)


@pytest.mark.slow
def test_damaged_checkpoint_is_set_aside(folders):
    """The run starts anew, and nobody is told to load a file that could run code."""
    run = small_runs.run(epochs=2)
    run.workspace.mkdir(parents=True)
    (run.workspace / "checkpoint.pt").write_bytes(b"torn")
    with pytest.warns(UserWarning, match=r"seed 1234: the checkpoint is not valid.*starts anew") as warned:
        found = study.execute(run, "cpu")
    assert "weights_only" not in str(warned[0].message)
    assert (run.workspace / "checkpoint.invalid").read_bytes() == b"torn"
    whole = study.execute(replace(run, tsne=True), "cpu")  # another id, so another workspace
    assert found["history"]["validation"] == whole["history"]["validation"]


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


CHANGES = {
    "accuracy": lambda c: c["task"].update(accuracy=0.59),
    "impossible accuracy": lambda c: c["task"].update(accuracy=7.5),
    "negative cross-entropy": lambda c: c["task"].update(cross_entropy=-1.0),
    "history of text": lambda c: c["history"]["validation"].update(accuracy=["x"]),
    "version": lambda c: c["run"].update(version=9),
    "setting": lambda c: c["run"]["train"].update(learning_rate=0.5),
    "unknown option": lambda c: c["run"].update(extra=1),
    "id": lambda c: c.update(id="0123456789"),
    "no id": lambda c: c.pop("id"),
    "no run": lambda c: c.pop("run"),
    "nothing": lambda c: c.clear(),
    "endpoint": lambda c: c.update(primary_endpoint="luckiest"),
    "commit": lambda c: c.update(commit=7),
}


@pytest.mark.parametrize("stamp", ["as before", "anew", "none"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_edited_result_file_is_named_with_the_remedy(change, stamp, finished):
    changed(finished, CHANGES[change], stamp)
    if change == "accuracy" and stamp == "anew":
        study.read(finished)  # within its range, and whoever changed it made the digest anew
        return
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
    changed(finished, CHANGES["impossible accuracy"], "anew")
    with pytest.raises(store.StoreError, match=r"breaks the schema.*accuracy"):
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
