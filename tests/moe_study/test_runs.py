"""The plans: names, ids, settings that tuning chose, and shards."""

import itertools
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from moe_lib.models.language import LanguageModel
from moe_lib.models.transformer import moe_layers
from moe_study import notebook, store, study
from moe_study.configs import ac_language, ac_vision, arms, collapse, snnl
from moe_study.data import ROOT

COPIED = "ad3f54f"  # made in a copy whose git did not know it, see REPRODUCIBILITY.md
SUPPORT = Path(__file__).parents[1] / "support"


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
            assert not result["dirty"] or result["commit"] == COPIED
            # t-SNE of 2,000 codes; which of 30,000 test images are right, and of 10,000 under corruption
            limit = (
                80_000 if "tsne" in result else 30_000 if path.parts[-3].startswith("ac-vision-") else 20_000
            )
            assert path.stat().st_size <= limit


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


def test_fixed_experts_in_every_block_are_held_against_runs_that_are_there():
    """The linear arm is that of the confirmation; the others route by hash alone."""
    confirmed = {(run.arm, run.seed): run for run in study.runs("core", "ac-language-confirm")}
    planned = study.runs("core", "ac-language-everywhere")
    assert Counter(run.arm for run in planned) == dict.fromkeys(("linear", "hash", "hash-token"), 10)
    for run in planned:
        other = confirmed[run.arm, run.seed]
        assert (run.train, run.objective, run.epoch_tokens) == (
            other.train,
            other.objective,
            other.epoch_tokens,
        )
        if run.arm == "linear":
            assert run.model == other.model
            if other.path.exists():
                assert study.twin(run) == other
    (layers,) = {
        tuple(type(layer.router).__name__ for layer in moe_layers(LanguageModel(run.model, 256)))
        for run in planned if run.arm != "linear" and run.seed == planned[0].seed
    }  # fmt: skip
    assert layers == ("HashRouter",) * 3


@pytest.mark.parametrize(
    ("name", "dataset"),
    [("collapse", "domains"), ("collapse-top1", "domains"), ("collapse-wide", "fashion_mnist")],
)
def test_collapse_settings_are_what_tuning_chose(name, dataset, monkeypatch):
    """For each arm the rate and the weight of the lowest validation cross-entropy at the last epoch."""
    monkeypatch.delenv("MOE_RESULTS_DIR", raising=False)
    scores = defaultdict(list)
    for path in (ROOT / "results" / "core" / f"{name}-tuning" / dataset).glob("*.json"):
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


@pytest.mark.parametrize(
    ("name", "tried"),
    [
        ("ac-language-confirm", ac_language.CONFIRM_ARMS),
        ("ac-vision-confirm", ac_vision.CONFIRM_ARMS),
        ("ac-vision-trained", ac_vision.TRAINED_ARMS),
    ],
)
def test_the_rate_of_a_confirmation_is_what_tuning_chose(name, tried, monkeypatch):
    """The rule of these studies: one rate for all arms, by the mean over arms and seeds at the last epoch."""
    monkeypatch.delenv("MOE_RESULTS_DIR", raising=False)
    scores = defaultdict(list)
    for run in study.runs("core", f"{name}-tuning"):
        history = store.read(run.path)["history"]["validation"]["cross_entropy"]
        scores[run.train.learning_rate].append(history[-1])
    assert {len(found) for found in scores.values()} == {len(arms.TUNING_SEEDS) * len(tried)}
    means = {rate: sum(found) for rate, found in scores.items()}
    rates = {run.train.learning_rate for run in study.runs("core", name)}
    assert rates == {min(means, key=means.get)}


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


def test_shards_cover_the_plan_once():
    runs = study.runs("digits")
    parts = [study.shard(runs, f"{i}/4") for i in range(1, 5)]
    assert sorted(run.id for part in parts for run in part) == sorted(run.id for run in runs)


def test_a_confirmation_speaks_for_its_study_once_it_is_whole(folders):
    planned = study.runs("core", "snnl-confirm", "fashion_mnist")
    for run in planned[1:]:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        run.path.write_text("{}")
    assert study.evidence("core", "snnl", "fashion_mnist") == study.runs("core", "snnl", "fashion_mnist")
    planned[0].path.write_text("{}")
    assert study.evidence("core", "snnl", "fashion_mnist") == planned
    others = [run for run in study.runs("core", "snnl") if run.dataset != "fashion_mnist"]
    assert study.evidence("core", "snnl") == [*others, *planned]
    assert study.evidence("core", "crossed") == study.runs("core", "crossed")


def test_a_confirmatory_set_is_shown_only_whole(folders):
    planned = study.runs("core", "collapse")
    for run in planned[:-1]:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        study.write(run, {})
    with pytest.raises(study.StudyError, match=f"{len(planned) - 1} of {len(planned)} runs .*only whole"):
        notebook.finished(planned, train=False)
    study.write(planned[-1], {})
    assert len(notebook.finished(planned, train=False)) == len(planned)


@pytest.mark.parametrize(
    ("study_name", "option", "said"),
    [
        ("snnl", {"augment": True}, "augment = True has no effect on a ClassifierConfig"),
        ("ac-vision", {"tsne": True}, "tsne = True has no effect on a VisionConfig"),
        ("ac-language", {"train_images": 100}, "train_images = 100 has no effect on a LanguageConfig"),
        ("ac-vision", {"attack_images": 0}, "attack_images must be at least 4, got 0"),
        ("snnl", {"train_images": -1}, "train_images must be at least 1, got -1"),
    ],
)
def test_options_without_effect_or_out_of_range_are_refused(study_name, option, said):
    run = study.runs("digits", study_name)[0]
    with pytest.raises(study.StudyError, match=said):
        replace(run, **option)


def test_evidence_on_a_data_set_of_the_confirmation_alone(monkeypatch, tmp_path):
    """As planned for the notebook that asks for it; in a report only when it is whole."""
    monkeypatch.setenv("MOE_RESULTS_DIR", str(tmp_path))
    planned = study.runs("core", "ac-vision-confirm")
    assert study.evidence("core", "ac-vision", "shifted_domains") == planned
    assert study.evidence("core", "ac-vision") == study.runs("core", "ac-vision")
    with pytest.raises(study.StudyError, match="unknown dataset 'shifted'"):
        study.evidence("core", "ac-vision", "shifted")
