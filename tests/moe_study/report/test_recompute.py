"""Every verdict on the committed runs once more, from the JSON files with numpy and scipy alone.

    python tests/moe_study/report/test_recompute.py

prints the table. Claims, margins and the rule are restated here; as a test, the table is compared with
`moe_study.verdicts`, which nothing here imports otherwise.

Shapes: S seeds, N test images.
"""

import base64
import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

pytestmark = pytest.mark.slow

CORE = Path(__file__).parents[3] / "results" / "core"
LAST, LOWEST = "last_epoch", "best_cross_entropy"
ENDPOINTS = (LAST, "best_accuracy", LOWEST)
# study -> whose claims
STUDIES = {name: name for name in ("snnl", "collapse", "collapse-top1", "collapse-wide")} | {
    "snnl-confirm": "snnl"
}
STUDIES |= {"ac-vision": "ac-vision", "ac-language": "ac-language"}
STUDIES |= {"ac-language-confirm": "ac-language", "ac-vision-confirm": "ac-vision"}
# Confirmatory sets and their numbers of runs: nobody looks at one that is not whole.
WHOLE = {"snnl-confirm": {"fashion_mnist": 40, "cifar10": 90, "cifar100": 90}, "collapse": {"domains": 360}}
WHOLE |= {"collapse-top1": {"domains": 100}, "collapse-wide": {"fashion_mnist": 90}}
WHOLE |= {"ac-language-confirm": {"wikitext2": 90}, "ac-vision-confirm": {"shifted_domains": 50}}
STUDIES["ac-language-everywhere"] = "ac-language-everywhere"
WHOLE["ac-language-everywhere"] = {"wikitext2": 30}
STUDIES["ac-vision-trained"] = "ac-vision"
WHOLE["ac-vision-trained"] = {"cifar10": 40}
NO_UNIT = ("mnist", "digits", "digit_domains", "docs")


# ------------------------------------------------------------------------------------------- measures


def at(path):
    def measure(file):
        for key in path.split("."):
            file = file.get(key) if isinstance(file, dict) else None
        return file

    return measure


def area(file):
    return float(np.mean(file["history"]["validation"]["cross_entropy"])) if "history" in file else None


def corrupted(file):
    rows = [v for name, v in file.get("corruption", {}).items() if name != "clean"]
    return float(np.mean(rows)) if rows else None


def attacked(file):
    """Of each attack the worse of M constant and M differentiated; with M frozen it is another model."""
    if "attack" not in file:
        return None
    kinds = [file["attack"][name] for name in ("fgsm-1", "fgsm-2", "pgd-1", "pgd-2")]
    return float(np.mean([min(v for mode, v in kind.items() if mode != "frozen") for kind in kinds]))


def swapped(file):
    rows = [row for share, row in file.get("swap", {}).items() if float(share) > 0]
    return float(np.mean([row["swapped"] for row in rows])) if rows else None


def corruption_cost(file):
    return file["corruption"]["clean"] - corrupted(file)


def attack_cost(file):
    return file["attack"]["clean"] - attacked(file)


def swap_cost(file):
    return float(
        np.mean([r["swapped"] - r["clean"] for share, r in file["swap"].items() if float(share) > 0])
    )


def experts_in_use(file):
    return float(np.exp(-sum(share * math.log(share) for share in file["routing"]["load"]["share"] if share)))


def whole_file(measure):
    return not measure.__qualname__.startswith("at.")


# --------------------------------------------------------------------------------------------- claims

ACCURACY, NATS = at("task.accuracy"), at("task.cross_entropy")
GAIN, POINT, NAT = 0.0028, 0.005, 0.01


def claim(key, measure, sign, treatment, controls, margin, **more):
    """gate: of a claim that routing pays; needs: a collapse; floor; resists: what a disturbance costs;
    conditions: (measure, sign, against the control or 0, bound, margin); published: by data set."""
    return {
        "key": key, "measure": measure, "sign": sign, "treatment": treatment, "controls": controls,
        "margin": margin, "ours": False, "gate": None, "needs": None, "floor": False, "resists": None,
        "conditions": (), "published": {},
    } | more  # fmt: skip


def ours(key, treatment, controls, measure=ACCURACY, sign=1, margin=GAIN):
    return claim(key, measure, sign, treatment, controls, margin, ours=True)


def of_snnl(key, measure, sign, margin, **more):
    return claim(key, measure, sign, "snnl", ("base",), margin, **more)


def of_ac(key, measure, sign, margin, **more):
    gate = key.rsplit("-", 1)[0] + "-pays"
    return claim(key, measure, sign, "ac", ("linear", "cosine"), margin, gate=gate, **more)


CLAIMS = {
    "snnl": [
        ours("snnl-pays", "base", ("uniform-gate",)),
        ours("snnl-mixture", "base", ("dense",)),
        of_snnl(
            "snnl-accuracy", ACCURACY, 1, GAIN,
            published={"fashion_mnist": 0.9161 - 0.9133, "cifar100": 0.3674 - 0.3575},
        ),
        of_snnl("snnl-orthogonal", at("similarity.weights"), -1, 0.01, needs="representational", floor=True),
        of_snnl(
            "snnl-flexible", at("routing.entropy.class_conditional"), 1, 0.07, needs="routing",
            gate="snnl-pays",
            conditions=(
                (at("routing.entropy.information_input"), 1, "control", -0.07, -0.07),
                (at("ablation.permuted"), 1, "zero", 0.0, 0.005),
            ),
        ),
    ],
    "collapse": [
        ours("collapse-pays", "base", ("uniform-gate",)),
        ours("collapse-mixture", "base", ("dense",)),
        ours("collapse-beside", "snnl", ("uniform-snnl",)),
        of_snnl("collapse-effective", at("routing.load.effective_experts"), 1, 0.5, needs="routing"),
        of_snnl(
            "collapse-different", at("similarity.outputs_weighted"), -1, 0.05,
            conditions=((at("similarity.cka_weighted"), -1, "control", -0.02, -0.02),),
        ),
        of_snnl("collapse-accuracy", ACCURACY, 1, GAIN),
    ],
    "collapse-top1": [
        ours("collapse-top1-pays", "base", ("hash-gate",)),
        ours("collapse-top1-beside", "snnl", ("hash-snnl",)),
        of_snnl("collapse-top1-effective", experts_in_use, 1, 0.5),
        of_snnl("collapse-top1-accuracy", ACCURACY, 1, GAIN),
    ],
    "collapse-wide": [
        ours("collapse-wide-pays", "base", ("uniform-gate",)),
        ours("collapse-wide-mixture", "base", ("dense",)),
        ours("collapse-wide-beside", "snnl", ("uniform-snnl",)),
        of_snnl("collapse-wide-effective", at("routing.load.effective_experts"), 1, 2.0, needs="routing"),
        of_snnl("collapse-wide-accuracy", ACCURACY, 1, GAIN),
    ],
    "ac-vision": [
        ours("ac-vision-pays", "linear", ("hash",), margin=POINT),
        ours("ac-vision-mixture", "linear", ("dense",), margin=POINT),
        of_ac("ac-vision-convergence", area, -1, NAT),
        of_ac("ac-vision-performance", ACCURACY, 1, POINT),
        of_ac("ac-vision-corruption", corrupted, 1, POINT, resists=corruption_cost),
        of_ac("ac-vision-attack", attacked, 1, POINT, resists=attack_cost),
    ],
    "ac-language": [
        ours("ac-language-pays", "linear", ("hash", "hash-token"), NATS, -1, NAT),
        of_ac("ac-language-convergence", area, -1, NAT),
        of_ac("ac-language-performance", NATS, -1, NAT),
        of_ac("ac-language-swap", swapped, -1, NAT, resists=swap_cost),
    ],
    "ac-language-everywhere": [
        ours("ac-language-everywhere-pays", "linear", ("hash", "hash-token"), NATS, -1, NAT)
    ],
}  # fmt: skip


# ------------------------------------------------------------------------------------- values of files


def own_endpoint(file):
    return file.get("primary_endpoint", LOWEST)


def held(file, endpoint):
    """What a file holds of an endpoint; one from before there were three has scores of the last epoch."""
    if endpoint == own_endpoint(file):
        return file
    if "primary_endpoint" not in file:
        return {"task": file["last_epoch"]} if endpoint == LAST and "last_epoch" in file else {}
    other = file["endpoints"].get(endpoint, {})
    return file if "same_as" in other else other


def value(file, measure, endpoint):
    if measure is area:  # of all epochs
        return measure(file)
    if whole_file(measure):
        return measure(file) if endpoint == own_endpoint(file) else None
    return measure(held(file, endpoint))


def values(files, measure, arm, endpoint):
    found = {f["run"]["seed"]: value(f, measure, endpoint) for f in files if f["run"]["arm"] == arm}
    return {seed: one for seed, one in found.items() if one is not None}


def differences(files, measure, treatment, control, endpoint):
    a, b = values(files, measure, treatment, endpoint), values(files, measure, control, endpoint)
    return np.array([a[seed] - b[seed] for seed in sorted(set(a) & set(b))])


# ------------------------------------------------------------------------------------------ statistics


def interval(values_S, confidence):
    if len(values_S) < 2:
        return math.nan, math.nan
    if np.ptp(values_S) == 0:
        return float(values_S[0]), float(values_S[0])
    found = stats.ttest_1samp(values_S, 0).confidence_interval(confidence)
    return float(found.low), float(found.high)


def sign_flip(values_S):
    """Share of all sign patterns whose sum is as far from 0, counted in integers: each half's sums listed,
    and the sum of every pair looked at, or counted in a sorted list where they are too many."""
    whole_S = [round(v * 1e12) for v in np.asarray(values_S, dtype=float)]
    return share_as_far(tuple(whole_S))


@functools.cache
def share_as_far(whole_S):
    slack = 1000  # rounding of the files' decimals: 1e-9

    def sums(part):
        found = np.zeros(1, dtype=np.int64)
        for one in part:
            found = np.concatenate([found + one, found - one])
        return found

    a, b = sums(whole_S[::2]), np.sort(sums(whole_S[1::2]))
    least = abs(sum(whole_S)) - slack
    if least <= 0:
        return 1.0
    if len(whole_S) <= 20:
        far = sum(int((np.abs(one + b) >= least).sum()) for one in a)
    else:
        far = 2 * int((len(b) - np.searchsorted(b, least - a)).sum())
    return far / 2 ** len(whole_S)


def above_zero(values, nulls):
    return interval(np.subtract(values, nulls), 0.95)[0] > 0


def seeds_for_power(values_S, effect):
    """The first number of seeds at which the noncentral t puts 80 % beyond the critical value."""
    shift = effect / np.std(values_S, ddof=1)

    def power(n):
        return stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, shift * math.sqrt(n))

    low, high = 1, 2
    while power(high) < 0.8:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= 0.8 else (middle, high)
    return high


def crossed(files, treatment, control, endpoint):
    """Interval over seeds and test images: two-way random effects, Satterthwaite's degrees of freedom."""
    right = {}
    for file in files:
        if file["run"]["arm"] in (treatment, control):
            if "correct" not in held(file, endpoint):
                return None
            packed = held(file, endpoint)["correct"]
            bits = np.unpackbits(np.frombuffer(base64.b64decode(packed["bits"]), np.uint8))[: packed["count"]]
            right[file["run"]["arm"], file["run"]["seed"]] = bits.astype(float)
    seeds = sorted(s for a, s in right if a == treatment and (control, s) in right)
    if len(seeds) < 2:
        return None
    table = np.array([right[treatment, s] - right[control, s] for s in seeds])
    s, n = table.shape
    total = ((table - table.mean()) ** 2).sum()
    rows = n * ((table.mean(1) - table.mean()) ** 2).sum()
    columns = s * ((table.mean(0) - table.mean()) ** 2).sum()
    mean_squares = rows / (s - 1), columns / (n - 1), (total - rows - columns) / ((s - 1) * (n - 1))
    variance = max(mean_squares[0] + mean_squares[1] - mean_squares[2], *mean_squares[:2])
    parts = zip(mean_squares, (s - 1, n - 1, (s - 1) * (n - 1)), strict=True)
    freedom = max(variance**2 / sum(square**2 / df for square, df in parts), 1)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(variance / (s * n))
    return table.mean() - half, table.mean() + half


def holm(p_values):
    adjusted, least = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = least
    return adjusted


# ----------------------------------------------------------------------------------------- obstacles


def routing_collapse(file, entropy):
    experts = file["routing"]["entropy"]["num_experts"]
    return 1 - (math.exp(entropy["marginal"]) - 1) / (experts - 1)


def not_testable(one, control, files, gates):
    """Whether models are not trained, routing does not pay, nothing collapses, the measure is at its
    floor, or nothing disturbs."""
    if files[0]["run"]["study"].startswith("ac-language") and any(
        f["task"]["cross_entropy"] > 1.5
        for f in files
        if f["run"]["arm"] in {one["treatment"], control} - {"hash", "hash-token"}
    ):
        return True
    if one["gate"] is not None and (not gates or any(word != "supported" for word in gates)):
        return True
    arms = {arm: [f for f in files if f["run"]["arm"] == arm] for arm in (one["treatment"], control)}
    if one["needs"] == "routing":
        value_S = [routing_collapse(f, f["routing"]["entropy"]) for f in arms[control]]
        null_S = [routing_collapse(f, f["initial"]["routing"]["entropy"]) for f in arms[control]]
    elif one["needs"] == "representational":
        value_S = [max(f["similarity"]["outputs"], 0) for f in arms[control]]
        null_S = [max(f["null"]["similarity"]["outputs"], 0) for f in arms[control]]
    if one["needs"] and not above_zero(value_S, null_S):
        return True
    if one["floor"]:
        informative = False
        for group in arms.values():
            nulls = [[math.sqrt(2 / (math.pi * f["expert_parameters"])) for f in group]]
            for path in ("initial.similarity.weights", "null.similarity.weights"):
                null_S = [at(path)(f) for f in group]
                nulls += [null_S] if None not in null_S else []
            own_S = [one["measure"](f) for f in group]
            informative |= all(above_zero(own_S, null_S) for null_S in nulls)
        if not informative:
            return True
    if one["resists"]:
        costs = [[one["resists"](f) for f in group] for group in arms.values()]
        return not any(above_zero(cost_S, np.zeros(len(cost_S))) for cost_S in costs)
    return False


# --------------------------------------------------------------------------------------------- the rule


def parts_of(one, control, files, endpoint):
    """[(signed differences, bound, margin of a condition)], the claimed measure first."""
    found = [(one["sign"] * differences(files, one["measure"], one["treatment"], control, endpoint), 0, None)]
    for measure, sign, against, bound, margin in one["conditions"]:
        if against == "zero":
            own = values(files, measure, one["treatment"], endpoint)
            signed_S = sign * np.array([own[seed] for seed in sorted(own)])
        else:
            signed_S = sign * differences(files, measure, one["treatment"], control, endpoint)
        found.append((signed_S, bound, margin))
    return found


def largest_p(parts):
    return max(
        sign_flip(signed_S - bound) if len(signed_S) > 1 and signed_S.mean() > bound else 1.0
        for signed_S, bound, _ in parts
    )


def word_of(parts, blocked, p_holm, elsewhere, margin):
    if min(len(signed_S) for signed_S, *_ in parts) < 8:
        return "pilot"
    if blocked:
        return "not testable here"
    if any(interval(signed_S, 0.9)[1] < least for signed_S, _, least in parts[1:]):
        return "contradicted"
    signed_S = parts[0][0]
    high = interval(signed_S, 0.9)[1]
    if high < 0:
        return "contradicted"
    if signed_S.mean() > 0 and p_holm <= 0.05 and not elsewhere:
        return "supported"
    return "smaller than claimed" if high < margin else "undecided"


def decide(claims, by_dataset, gates):
    """The family of a study; `gates`: (key, data set) -> words of our own claims; None: all are open."""
    units = []
    for one in claims:
        measures = [one["measure"], *(measure for measure, *_ in one["conditions"])]
        for dataset, files in by_dataset.items():
            arms = {f["run"]["arm"] for f in files}
            own = [f for f in files if f["run"]["arm"] in {one["treatment"], *one["controls"]}]
            last = all(value(f, measure, LAST) is not None for f in own for measure in measures)
            primary = LAST if last else own_endpoint(files[0])
            for control in one["controls"]:
                if {one["treatment"], control} <= arms:
                    units.append((one, dataset, control, files, primary))

    def at_endpoint(name):
        """parts, blocked, p_holm of every unit there."""
        found, applicable = [], []
        for i, (one, dataset, control, files, primary) in enumerate(units):
            parts = parts_of(one, control, files, name or primary)
            enough = min(len(signed_S) for signed_S, *_ in parts) >= 8
            gate = one["gate"], dataset
            if gates is None:
                opening = ["supported"] if any((u[0]["key"], u[1]) == gate for u in units) else []
            else:
                opening = gates.get(gate, [])
            blocked = enough and not_testable(one, control, files, opening)
            found.append([parts, blocked, math.nan])
            if not blocked:
                applicable.append((i, largest_p(parts) if enough else 1.0))
        for (i, _), adjusted in zip(applicable, holm([p for _, p in applicable]), strict=True):
            found[i][2] = adjusted
        return found

    primary_units, others = at_endpoint(None), {name: at_endpoint(name) for name in ENDPOINTS}
    rows = []
    for i, (one, dataset, control, files, primary) in enumerate(units):
        parts, blocked, p_holm = primary_units[i]
        margin = one["sign"] * one["published"].get(dataset, one["sign"] * one["margin"])
        sizes = [len(v) for v, *_ in parts]
        known = {n: own[i] for n, own in others.items() if sizes == [len(v) for v, *_ in own[i][0]] != [0]}
        against = {
            name: any(interval(signed_S, 0.9)[1] < (least or 0) for signed_S, _, least in own[0])
            for name, own in known.items()
        }
        elsewhere = any(bad for name, bad in against.items() if name != primary)
        signed_S = parts[0][0]
        row = {
            "claim": one["key"], "dataset": dataset, "control": control, "endpoint": primary,
            "seeds": len(signed_S),
            "word": word_of(parts, blocked, p_holm, elsewhere, margin),
            "half": word_of(parts, blocked, p_holm, elsewhere, margin / 2),
            "twice": word_of(parts, blocked, p_holm, elsewhere, margin * 2),
            "elsewhere": {
                name: word_of(*own, any(bad for n, bad in against.items() if n != name), margin)
                for name, own in known.items()
            },
            "difference": one["sign"] * float(signed_S.mean()) if len(signed_S) else math.nan,
            "interval": sorted(one["sign"] * end for end in interval(signed_S, 0.95)),
            "p": largest_p(parts), "holm": p_holm,
        }  # fmt: skip
        row["needed"] = seeds_for_power(signed_S, margin) if row["word"] == "undecided" else None
        of_accuracy = one["measure"] is ACCURACY
        row["images"] = crossed(files, one["treatment"], control, primary) if of_accuracy else None
        rows.append(row)
    return rows


@functools.cache
def read(study):
    """data set -> its files, as they lie there."""
    found = {}
    for path in sorted((CORE / study).glob("*/*.json")):
        if path.parent.name not in NO_UNIT:
            found.setdefault(path.parent.name, []).append(json.loads(path.read_text()))
    return {name: files for name, files in found.items() if len(files) >= WHOLE.get(study, {}).get(name, 0)}


def recompute(study):
    by_dataset, claims = read(study), CLAIMS[STUDIES[study]]
    ours, gates = {one["key"] for one in claims if one["ours"]}, {}
    first = [row for row in decide(claims, by_dataset, None) if row["claim"] in ours]
    for row in first:
        gates.setdefault((row["claim"], row["dataset"]), []).append(row["word"])
    return first + [row for row in decide(claims, by_dataset, gates) if row["claim"] not in ours]


@pytest.mark.parametrize("study", STUDIES)
def test_verdicts_are_what_the_files_say(study):
    from moe_study import verdicts

    if not read(study):
        pytest.skip(f"no committed results of {study}")
    results = [file for files in read(study).values() for file in files]
    theirs = {(v.claim.key, v.dataset, v.control): v for v in verdicts.verdicts(results, study)}
    rows = recompute(study)
    assert {(row["claim"], row["dataset"], row["control"]) for row in rows} == set(theirs)
    for row in rows:
        v = theirs[row["claim"], row["dataset"], row["control"]]
        assert (v.word, v.at_half, v.at_twice) == (row["word"], row["half"], row["twice"]), row
        assert (v.endpoint, dict(v.by_endpoint)) == (row["endpoint"], row["elsewhere"]), row
        assert v.seeds_needed == row["needed"], row
        assert v.p == pytest.approx(row["p"]), row
        assert v.p_holm == pytest.approx(row["holm"], nan_ok=True), row
        if row["seeds"] >= 2:
            numbers = v.comparison.difference, v.comparison.low, v.comparison.high
            assert numbers == pytest.approx((row["difference"], *row["interval"]), abs=1e-12), row
        assert (v.images is None) == (row["images"] is None), row
        if v.images is not None:
            assert v.images == pytest.approx(row["images"]), row


def test_whole_sets_are_those_of_the_plan():
    from moe_study.study import runs

    for study, sizes in WHOLE.items():
        assert sizes == {name: len(runs("core", study, name)) for name in sizes}
        assert len(runs("core", study)) == sum(sizes.values())


if __name__ == "__main__":
    for name in STUDIES:
        for row in recompute(name):
            low, high = row["interval"]
            print(
                f"{name:13}{row['dataset']:14}{row['claim']:25}{row['control']:13}{row['word']:21}"
                f"{row['difference']:+.5f} [{low:+.5f}, {high:+.5f}]  p {row['p']:.4f}  "
                f"Holm {row['holm']:.4f}  {row['seeds']} seeds, {row['endpoint']}"
            )
