"""The rule that decides: every outcome reached on planted results; on the committed runs, its numbers.

Shapes: S seeds.
"""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest

from moe_study import claims, stats
from moe_study.report import tables

FILES = sorted((Path(__file__).parents[2] / "results/core/snnl").glob("*/*.json"))
CLAIM = {claim.key: claim for claim in claims.CLAIMS}
SEEDS = range(10)


def draws(mean, sd, seeds=SEEDS, salt=0):
    """One value a seed whose mean and standard deviation are exactly those asked for."""
    values = np.random.default_rng(salt).normal(size=len(seeds))
    values = (values - values.mean()) / values.std(ddof=1)
    return mean + sd * values


def run(study, arm, seed, dataset="cifar10", **content):
    head = {
        "profile": "core",
        "study": study,
        "dataset": dataset,
        "arm": arm,
        "seed": int(seed),
        "version": 1,
    }
    return {"run": head, **content}


def snnl_results(
    gain=0.01, entropy=0.3, information=0.1, cost=0.2, weights=(0.08, 0.05), marginal=(0.5, 1.0), sd=0.002,
    seeds=SEEDS, dataset="cifar10", arms=("base", "snnl"), similarity=0.9, alone=0.2,
):  # fmt: skip
    """Collapsed `base` runs and `snnl` runs that differ by what is asked for."""
    found = []
    for arm in arms:
        treated = arm == "snnl"
        scores = 0.8 + draws(gain * treated, sd, seeds, salt=treated)
        noise = draws(0, sd, seeds, salt=2 + treated)
        for seed, score, extra in zip(seeds, scores, noise, strict=True):
            found.append(
                run(
                    "snnl", arm, seed, dataset,
                    task={"accuracy": score},
                    routing={
                        "entropy": {
                            "class_conditional": 0.4 + entropy * treated + extra,
                            "information_input": 0.4 + information * treated + extra,
                            "marginal": marginal[treated] + extra,
                            "num_experts": 4,
                            "num_classes": 10,
                        }
                    },
                    similarity={"weights": weights[treated] + extra, "outputs": similarity + extra},
                    initial={
                        "routing": {"entropy": {"marginal": 1.3}},
                        "similarity": {"weights": 0.003 + extra / 10},
                    },
                    null={"similarity": {"weights": 0.003 - extra / 10, "outputs": alone}},
                    ablation={
                        "permuted": cost + extra, "swapped": 0.1, "merged": 0.1, "dropped": [0.1, 0.1, 0, 0]
                    },
                    expert_parameters=70_000,
                )
            )  # fmt: skip
    return found


def vision_results(gains, seeds=SEEDS, **kinds):
    """`gains`: arm -> accuracy above 0.6; corruption and attack take nothing unless asked for."""
    found = []
    for salt, (arm, gain) in enumerate(gains.items()):
        for seed, score in zip(seeds, draws(0.6 + gain, 0.002, seeds, salt), strict=True):
            content = {
                "task": {"accuracy": score},
                "history": {"validation": {"cross_entropy": [2.0 - gain, 1.0 - gain]}},
                "corruption": {"clean": score, "noise": [score] * 5},
                "attack": {"clean": score} | {name: {"detached": score} for name in tables.GRADIENT_ATTACKS},
            }
            found.append(run("ac-vision", arm, seed, **content))
    return found


def outcome(key, results):
    return claims.decide(CLAIM[key], results).outcome


# ------------------------------------------------------------------------------------- each outcome


def test_supported():
    verdict = claims.decide(CLAIM["snnl-accuracy"], snnl_results(gain=0.01))
    assert verdict.outcome == "supported"
    assert verdict.deciding == "accuracy: snnl - base"
    assert verdict.contrasts[verdict.deciding].difference == pytest.approx(0.01)
    assert verdict.p == verdict.p_holm == 2 / 2**10
    assert "+1.00 [" in verdict.reason
    assert "points" in verdict.reason


def test_refuted_by_the_margin_where_nothing_is_published():
    verdict = claims.decide(CLAIM["snnl-accuracy"], snnl_results(gain=0.0, sd=0.001))
    assert verdict.outcome == "refuted"
    assert "wholly below +0.28 points, the declared margin" in verdict.reason
    assert "equivalent to within it" in verdict.reason


def test_the_ninety_percent_interval_refutes():
    """Between the upper ends of the 90 % and the 95 % interval lies the margin."""
    results = snnl_results(gain=0.0)
    differences = np.subtract(
        *([r["task"]["accuracy"] for r in part] for part in (results[10:], results[:10]))
    )
    ends = [stats.t_interval(differences, confidence)[1] for confidence in (0.90, 0.95)]
    for shift, expected in ((sum(ends) / 2, "refuted"), (ends[0] * 0.99, "undecided")):
        moved = copy.deepcopy(results)
        for result in moved[10:]:
            result["task"]["accuracy"] += 0.0028 - shift
        assert outcome("snnl-accuracy", moved) == expected


def test_refuted_by_the_opposite_sign():
    verdict = claims.decide(CLAIM["snnl-accuracy"], snnl_results(gain=-0.01))
    assert verdict.outcome == "refuted"
    assert "equivalent" not in verdict.reason


def test_refuted_by_the_published_difference():
    """+0.3 points, give or take: too little for CIFAR-100's published +0.99, not for +0.28."""
    small = {"gain": 0.003, "sd": 0.0045}
    assert outcome("snnl-accuracy", snnl_results(dataset="cifar100", **small)) == "refuted"
    verdict = claims.decide(CLAIM["snnl-accuracy"], snnl_results(dataset="fashion_mnist", **small))
    assert verdict.outcome == "undecided"
    assert "second-hand" in claims.verdict_table([verdict]).loc[0, "published"]


def test_supported_and_yet_smaller_than_published():
    verdict = claims.decide(CLAIM["snnl-accuracy"], snnl_results(gain=0.004, sd=0.001, dataset="cifar100"))
    assert verdict.outcome == "supported"
    assert "yet 90 % interval" in verdict.reason
    assert "+0.99 points, the published difference (second-hand)" in verdict.reason


def test_undecided_names_what_could_have_been_seen():
    verdict = claims.decide(CLAIM["snnl-accuracy"], snnl_results(gain=0.003, sd=0.006))
    assert verdict.outcome == "undecided"
    contrast = verdict.contrasts["accuracy: snnl - base"]
    sd = contrast.difference / contrast.effect
    assert verdict.detectable == pytest.approx(stats.smallest_detectable_effect(sd, 10))
    assert f"test of 10 seeds would have found {verdict.detectable * 100:.2f} points" in verdict.reason


@pytest.mark.parametrize("seeds", [2, 5, 7])
def test_pilots_are_shown_and_never_decided(seeds):
    for gain in (-0.05, 0.0, 0.05):
        verdict = claims.decide(CLAIM["snnl-accuracy"], snnl_results(gain=gain, seeds=range(seeds)))
        assert verdict.outcome == "pilot"
        assert f"{seeds} seeds" in verdict.reason
        assert math.isnan(verdict.p_holm)
        assert verdict.contrasts["accuracy: snnl - base"].difference == pytest.approx(gain)
    assert outcome("snnl-accuracy", snnl_results(gain=0.05, seeds=range(8))) == "supported"


def test_pairs_count_not_runs():
    results = snnl_results(gain=0.05, arms=("base",)) + snnl_results(seeds=range(5, 15), arms=("snnl",))
    verdict = claims.decide(CLAIM["snnl-accuracy"], results)
    assert verdict.outcome == "pilot"
    assert verdict.contrasts["accuracy: snnl - base"].seeds == 5


def test_a_missing_arm_is_no_decision():
    verdict = claims.decide(CLAIM["snnl-accuracy"], snnl_results(arms=("snnl",)))
    assert (verdict.outcome, verdict.deciding) == ("pilot", None)
    assert "accuracy: snnl - base: 0 paired seeds" in verdict.reason
    assert verdict.contrasts == {"accuracy: snnl - base": None}
    assert math.isnan(verdict.p)
    table = claims.verdict_table([verdict])
    assert table.loc[0, ["difference", "seeds", "p (Holm)"]].tolist() == ["-", "-", "-"]


def test_verdicts_are_counted_by_kind():
    found = [
        claims.decide(CLAIM["snnl-accuracy"], snnl_results(gain=0.05)),
        claims.decide(CLAIM["snnl-accuracy"], snnl_results(gain=0.05, seeds=range(8))),
        claims.decide(CLAIM["snnl-accuracy"], snnl_results(arms=("snnl",))),
    ]
    assert claims.tally(found) == "Of 3 verdicts: 2 supported, 1 pilot."


def test_the_table_shows_the_contrast_least_in_the_claims_favour():
    """A clear loss against one control, not the larger p of a draw with the other."""
    verdict = claims.decide(
        CLAIM["ac-vision-performance"], vision_results({"ac": 0.0, "linear": 0.0, "cosine": 0.02})
    )
    assert verdict.deciding == "accuracy: ac - linear"
    row = claims.verdict_table([verdict]).loc[0]
    assert row["contrast"] == claims.telling_contrast(verdict) == "accuracy: ac - cosine"
    assert row["difference"].startswith("-2.0")


def test_a_contradiction_does_not_ease_the_other_units():
    """A sure difference in the wrong direction takes no step of Holm's from a unit beside it."""
    good, bad = (snnl_results(gain=g, dataset=d) for g, d in ((0.01, "cifar100"), (-0.01, "fashion_mnist")))
    found = [v for v in claims.verdicts({"snnl": good + bad}, "core") if v.claim.key == "snnl-accuracy"]
    by_dataset = {verdict.dataset: verdict for verdict in found}
    assert by_dataset["fashion_mnist"].p == by_dataset["cifar100"].p == 2 / 2**10
    assert by_dataset["fashion_mnist"].p_holm == 1
    units = sum(claim.study == "snnl" for claim in claims.CLAIMS) * 2
    assert by_dataset["cifar100"].p_holm == pytest.approx(units * 2 / 2**10)


def test_causes_are_named_where_there_is_an_effect():
    arms = {"linear": 0.0, "cosine": 0.0, "ac": 0.0, "ac-matched": -0.02}
    verdict = claims.decide(CLAIM["ac-vision-performance"], vision_results(arms))
    assert verdict.outcome == "refuted"
    assert all(sentence.endswith("10 seeds.") for sentence in verdict.attribution)
    assert len(verdict.attribution) == 1


def test_a_refuted_claim_shows_the_contrast_that_refutes_it():
    """Refuted by a sure draw with one control, though a wide interval lies further from the claim."""
    wide = np.linspace(-0.021, 0.02, 10)
    results = vision_results({"ac": 0.0, "cosine": 0.0, "linear": 0.0})
    for result in results:
        accuracy = 0.6 + (wide[SEEDS.index(result["run"]["seed"])] if result["run"]["arm"] == "linear" else 0)
        result["task"]["accuracy"] = accuracy + 1e-4 * (result["run"]["seed"] % 3)
    for result in results:
        if result["run"]["arm"] == "ac":
            result["task"]["accuracy"] += 1e-5 * (result["run"]["seed"] % 2)
    verdict = claims.decide(CLAIM["ac-vision-performance"], results)
    assert verdict.outcome == "refuted"
    assert verdict.refuting == claims.telling_contrast(verdict) == "accuracy: ac - cosine"
    assert claims.verdict_table([verdict]).loc[0, "p (Holm)"] == "-"  # it is not by p that it is refuted


# ------------------------------------------------------------------------- nothing to resolve, floor


def test_a_disturbance_that_costs_nothing_is_nothing_to_resist():
    results = vision_results({"ac": 0.0, "linear": 0.0, "cosine": 0.0})
    cost = {"ac": -0.01, "linear": -0.02, "cosine": -0.02}

    def disturb(cost):
        for result, noise in zip(results, draws(0.0, 0.001, range(len(results)), 3), strict=True):
            clean = result["corruption"]["clean"]
            result["corruption"]["noise"] = [clean - cost[result["run"]["arm"]] - noise] * 5
        return claims.decide(CLAIM["ac-vision-corruption"], results)

    verdict = disturb(cost)
    assert verdict.outcome == "not applicable"
    assert "nothing to resist: accuracy lost to corruption is above 0 in no arm (ac -1.0" in verdict.reason
    assert disturb(cost | {"linear": 0.02}).outcome == "refuted"  # one arm loses: there is something


def test_no_collapse_nothing_to_resolve():
    routed = snnl_results(marginal=(1.3, 1.3))
    verdict = claims.decide(CLAIM["snnl-flexible"], routed)
    assert verdict.outcome == "not applicable"
    assert "nothing to resolve: routing collapse of base" in verdict.reason
    unlike = snnl_results(similarity=0.1, alone=0.2)
    assert outcome("snnl-orthogonal", unlike) == "not applicable"
    assert outcome("snnl-orthogonal", snnl_results()) == "supported"
    assert outcome("snnl-accuracy", unlike) == "supported"  # accuracy is claimed for itself


def test_weights_at_the_floor_say_nothing():
    verdict = claims.decide(CLAIM["snnl-orthogonal"], snnl_results(weights=(0.003, 0.003), sd=0.0005))
    assert verdict.outcome == "not applicable"
    assert verdict.reason.startswith("uninformative: both arms' |cos| weights are no higher than a null")
    assert "trained alone 0.0030" in verdict.reason
    above = snnl_results(weights=(0.05, 0.003), sd=0.0005)  # one arm above: the measure can tell them apart
    assert outcome("snnl-orthogonal", above) == "supported"


# -------------------------------------------------------------------------------------- joint claims


def test_flexible_routing_needs_all_three():
    key = "snnl-flexible"
    assert outcome(key, snnl_results()) == "supported"
    uniform = claims.decide(CLAIM[key], snnl_results(entropy=0.9, information=-0.4, cost=0.0, sd=0.0005))
    assert uniform.outcome == "refuted"  # the highest entropy of all, and useless
    assert "I(x;E): snnl - base lies wholly below -0.070 nats" in uniform.reason
    idle = claims.decide(CLAIM[key], snnl_results(information=0.0, cost=0.0001, sd=0.001))
    assert idle.outcome == "refuted"
    assert 'the margin of "permuting the routing costs accuracy"' in idle.reason
    assert outcome(key, snnl_results(entropy=-0.2)) == "refuted"
    vague = snnl_results()
    for result, extra in zip(vague[10:], draws(-0.1, 0.4, salt=5), strict=True):
        result["routing"]["entropy"]["information_input"] = 0.4 + extra
    assert outcome(key, vague) == "undecided"


@pytest.mark.parametrize("information", [0.0, -0.02])
def test_information_that_falls_by_less_than_the_margin_is_not_lower(information):
    assert outcome("snnl-flexible", snnl_results(information=information)) == "supported"


def test_a_condition_that_holds_is_not_refuted_by_being_small():
    verdict = claims.decide(CLAIM["snnl-flexible"], snnl_results(cost=0.002, sd=0.0005))
    assert verdict.outcome == "supported"
    assert "yet" not in verdict.reason


# ---------------------------------------------------------------------------- several fair controls


def test_every_fair_control_must_agree():
    key = "ac-vision-performance"
    both = {"linear": 0.0, "cosine": 0.0, "ac": 0.02}
    assert outcome(key, vision_results(both)) == "supported"
    verdict = claims.decide(CLAIM[key], vision_results(both | {"cosine": 0.02}))
    assert verdict.outcome == "refuted"  # cosine does it all
    assert verdict.deciding == "accuracy: ac - cosine"
    assert verdict.p == max(
        stats.sign_flip_p(a - b)
        for a, b in (
            (draws(0.62, 0.002, salt=2), draws(0.6, 0.002, salt=0)),
            (draws(0.62, 0.002, salt=2), draws(0.62, 0.002, salt=1)),
        )
    )
    few = vision_results(both)
    few = [r for r in few if r["run"]["arm"] != "cosine" or r["run"]["seed"] < 5]
    assert outcome(key, few) == "pilot"


def test_lower_is_better_where_it_is_claimed_so():
    assert (
        outcome("ac-vision-convergence", vision_results({"linear": 0, "cosine": 0, "ac": 0.2})) == "supported"
    )
    assert (
        outcome("ac-vision-convergence", vision_results({"linear": 0, "cosine": 0, "ac": -0.2})) == "refuted"
    )


def test_placebos_attribute_and_never_decide():
    arms = {
        "linear": 0.0,
        "cosine": 0.0,
        "ac": 0.02,
        "ac-shuffled": 0.02,
        "ac-pooled": 0.05,
        "ac-matched": 0.0,
    }
    verdict = claims.decide(CLAIM["ac-vision-performance"], vision_results(arms))
    assert verdict.outcome == "supported"
    said = {s.split(" +")[0].split(" -0")[0].split(" -3")[0]: s for s in verdict.attribution}
    assert "is open" in said["ac - ac-shuffled"]
    assert "the opposite of the claim, so it is not" in said["ac - ac-pooled"]
    assert said["ac - ac-matched"].endswith("10 seeds: so it is the gate's sharpness.")
    assert "ac-causal" not in " ".join(verdict.attribution)
    few = vision_results(arms)
    few = [r for r in few if r["run"]["arm"] != "ac-matched" or r["run"]["seed"] < 3]
    verdict = claims.decide(CLAIM["ac-vision-performance"], few)
    assert "3 seeds: a pilot on whether it is the gate's sharpness." in " ".join(verdict.attribution)


def test_mechanism_is_the_difference_of_differences():
    results = snnl_results(gain=0.01)
    for arm, gain in (("dense", 0.0), ("dense-snnl", 0.01)):
        for seed, score in zip(SEEDS, draws(0.85 + gain, 0.002, salt=7 + (gain > 0)), strict=True):
            results.append(run("snnl", arm, seed, task={"accuracy": score}))
    verdict = claims.decide(CLAIM["snnl-accuracy"], results)
    assert "(snnl - base) - (dense-snnl - dense)" in " ".join(verdict.attribution)
    assert "whether it is SNNL in a mixture, not better features alone is open" in " ".join(
        verdict.attribution
    )
    assert verdict.outcome == "supported"


# ------------------------------------------------------------------------------------------ measures


def test_measures_of_the_routed_studies_equal_the_loops():
    result = run(
        "ac-vision", "ac", 1,
        task={"accuracy": 0.7, "cross_entropy": 1.6},
        history={"validation": {"cross_entropy": [3.0, 2.0, 1.5]}},
        corruption={"clean": 0.72, "blur": [0.7, 0.6, 0.5, 0.4, 0.3], "noise": [0.6, 0.5, 0.4, 0.3, 0.2]},
        attack={
            "clean": 0.71,
            "fgsm-1": {"detached": 0.5, "through": 0.4, "frozen": 0.1},
            "fgsm-2": {"detached": 0.4, "through": 0.4},
            "pgd-1": {"detached": 0.3},
            "pgd-2": {"detached": 0.2, "through": 0.25},
            "spsa-2": {"detached": 0.0},
            "spsa-2 clean": {"detached": 0.9},
        },
        swap={
            "0": {"clean": 2.0, "swapped": 2.5, "all": 9.0},
            "0.015": {"clean": 2.1, "swapped": 2.1, "all": 9.0},
            "0.025": {"clean": 2.0, "swapped": 2.1, "all": 9.0},
            "0.05": {"clean": 2.1, "swapped": 2.3, "all": 9.0},
            "0.1": {"clean": 2.2, "swapped": 2.5, "all": 9.0},
        },
    )  # fmt: skip
    measured = {key: CLAIM[key].measure.of(result) for key in CLAIM if key.startswith("ac-")}
    assert measured["ac-vision-convergence"] == measured["ac-language-convergence"]
    assert measured["ac-vision-convergence"] == pytest.approx(6.5 / 3)
    lost = [0.72 - a for row in (result["corruption"]["blur"], result["corruption"]["noise"]) for a in row]
    assert measured["ac-vision-corruption"] == pytest.approx(sum(lost) / 10)
    assert measured["ac-vision-attack"] == pytest.approx(0.71 - (0.4 + 0.4 + 0.3 + 0.2) / 4)
    assert measured["ac-language-swap"] == pytest.approx((0.0 + 0.1 + 0.2 + 0.3) / 4)


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("ac-vision-performance", ("task", "accuracy")),
        ("ac-vision-convergence", ("history", "validation", "cross_entropy", 1)),
        ("ac-vision-corruption", ("corruption", "noise", 2)),
        ("ac-vision-attack", ("attack", "fgsm-1", "detached")),
    ],
)
@pytest.mark.parametrize("bad", [None, math.nan])
def test_a_value_that_is_missing_names_its_run(key, path, bad):
    results = copy.deepcopy(vision_results({"linear": 0.0, "cosine": 0.0, "ac": 0.02}))
    at = results[13]
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = bad
    with pytest.raises(ValueError, match=r"ac-vision/cifar10/cosine seed 3 has no finite"):
        claims.decide(CLAIM[key], results)


def test_a_missing_null_names_its_run():
    results = copy.deepcopy(snnl_results())
    del results[4]["null"]
    with pytest.raises(ValueError, match=r"snnl/cifar10/base seed 4 has no finite null of representational"):
        claims.decide(CLAIM["snnl-orthogonal"], results)


# ------------------------------------------------------------------------------------------- families


def test_holm_over_the_units_of_a_study():
    results = [
        result
        for gain, dataset in ((0.01, "fashion_mnist"), (0.0, "cifar10"), (0.002, "cifar100"))
        for result in snnl_results(gain=gain, sd=0.003, dataset=dataset)
    ]
    found = claims.verdicts({"snnl": results}, "core")
    assert [(v.claim.key, v.dataset) for v in found[:3]] == [
        ("snnl-accuracy", "fashion_mnist"), ("snnl-accuracy", "cifar10"), ("snnl-accuracy", "cifar100"),
    ]  # fmt: skip
    assert len(found) == 9
    assert [v.p_holm for v in found] == stats.holm([v.p for v in found]).tolist()
    assert {v.profile for v in found} == {"core"}


def test_a_family_can_undo_a_unit_and_pilots_count_in_it():
    """At p = 0.02 alone a claim stands; among four data sets, one of them decided, it does not."""
    salt = next(
        s
        for s in range(1000)
        if 0.015 < stats.sign_flip_p(draws(0.004, 0.004, salt=s)) < 0.03
        and stats.t_interval(draws(0.004, 0.004, salt=s))[0] > 0
    )
    results = snnl_results(gain=0.0)
    for result, base, gain in zip(results[10:], results[:10], draws(0.004, 0.004, salt=salt), strict=True):
        result["task"]["accuracy"] = base["task"]["accuracy"] + gain
    alone = claims.decide(CLAIM["snnl-accuracy"], results)
    assert alone.outcome == "supported"
    for dataset in ("fashion_mnist", "cifar100"):
        results += snnl_results(dataset=dataset, seeds=range(3))
    verdict = next(v for v in claims.verdicts({"snnl": results}, "core") if v.dataset == "cifar10")
    assert verdict.p == alone.p
    assert verdict.p_holm > 0.05
    assert verdict.outcome == "undecided"


def test_data_sets_outside_the_family_have_no_unit():
    for dataset in ("mnist", "digits"):
        assert claims.verdicts({"snnl": snnl_results(dataset=dataset)}, "core") == []
    assert claims.verdicts({}, "core") == []
    assert claims.verdict_table([]).empty


def test_what_does_not_belong_together_is_refused():
    results = snnl_results()
    with pytest.raises(ValueError, match="never pooled: expected 'paper', got 'core'"):
        claims.verdicts({"snnl": results}, "paper")
    with pytest.raises(ValueError, match="one dataset, got cifar10, cifar100"):
        claims.decide(CLAIM["snnl-accuracy"], results + snnl_results(dataset="cifar100"))
    with pytest.raises(ValueError, match="two results of snnl/cifar10/base seed 0"):
        claims.decide(CLAIM["snnl-accuracy"], results + results[:1])
    with pytest.raises(ValueError, match="of study 'ac-vision', got 'snnl'"):
        claims.decide(CLAIM["ac-vision-attack"], results)
    with pytest.raises(ValueError, match="one profile, got none"):
        claims.decide(CLAIM["snnl-accuracy"], [])


def test_claims_are_well_formed():
    assert len(CLAIM) == len(claims.CLAIMS)
    for claim in claims.CLAIMS:
        assert claim.margin > 0
        assert claim.margin_reason
        assert claim.controls
        assert {contrast.control for contrast in claim.attribution}.isdisjoint(claim.controls)


def test_chance_differences_are_rarely_supported():
    """No effect at all: the rule with its two controls stays below the nominal 5 %."""
    draw = np.random.default_rng(11)
    called = 0
    results = vision_results({"linear": 0.0, "cosine": 0.0, "ac": 0.0})
    for _ in range(150):
        for result in results:
            result["task"]["accuracy"] = draw.normal(0.6, 0.01)
        called += outcome("ac-vision-performance", results) == "supported"
    assert called / 150 <= 0.05


# -------------------------------------------------------------------------------------- committed runs


@pytest.mark.skipif(not FILES, reason="no committed runs")
def test_committed_runs_give_the_numbers_of_the_tables():
    results = [json.loads(path.read_text()) for path in FILES]
    found = claims.verdicts({"snnl": results}, "core")
    assert found
    columns = {"snnl-accuracy": "accuracy", "snnl-orthogonal": "|cos| weights", "snnl-flexible": "H(E|c)"}
    for verdict in found:
        frame = tables.frame(r for r in results if r["run"]["dataset"] == verdict.dataset)
        column = columns[verdict.claim.key]
        expected = tables.contrast(frame, "snnl", "base", column)
        assert verdict.contrasts[f"{column}: snnl - base"] == expected
        assert (verdict.outcome == "pilot") == (expected is None or expected.seeds < tables.PILOT_BELOW)
        if verdict.claim.conditions:
            assert verdict.contrasts["I(x;E): snnl - base"] == tables.contrast(
                frame, "snnl", "base", "I(x;E)"
            )
    table = claims.verdict_table(found)
    assert len(table) == len(found)
    assert table["verdict"].tolist() == [verdict.outcome for verdict in found]
