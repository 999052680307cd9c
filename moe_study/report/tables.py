"""The tables that notebooks and report show of result files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import pandas as pd

from moe_lib import metrics
from moe_study import stats
from moe_study.claims import PILOT_BELOW, claimed
from moe_study.columns import (
    COLUMNS,
    ROUTING,
    SIMILARITY,
    VISION_COLUMNS,
    Column,
    Columns,
    Result,
    attack_losses,
    frame_of,
    look_up,
    shown_interval,
    shown_level,
    signed,
    spread,
)
from moe_study.verdicts import MECHANISM, reading

T = TypeVar("T")


def by_arm(results: Iterable[Result]) -> dict[str, list[Result]]:
    """In the order in which the arms appear."""
    return grouped(results, lambda result: result["run"]["arm"])


def grouped(items: Iterable[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    """Items by key, in the order in which the keys appear."""
    found: dict[str, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def summary(runs: pd.DataFrame, names: Sequence[str], columns: Columns = COLUMNS) -> pd.DataFrame:
    """Arm by arm: number of seeds, and "mean ± standard deviation over seeds" of the named columns."""
    rows = {}
    for arm, group in runs.groupby("arm", sort=False):
        rows[arm] = {"seeds": str(len(group))} | {
            columns[name].title(name, level=True): shown_level(group[name], columns[name]) for name in names
        }
    titles = [columns[name].title(name, level=True) for name in names]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["seeds", *titles])
    return table.rename_axis("arm")


def similarity_nulls(results: Sequence[Result], arms: Sequence[str]) -> pd.DataFrame:
    """Beside each arm's similarity: its value before training, that of experts trained alone on the same
    frozen extractor, and the floor of independent random vectors."""
    names = dict(zip(SIMILARITY, ("weights", "weights_aligned", "outputs", "cka"), strict=True))
    rows = []
    grouped = by_arm(results)
    for arm, group in ((arm, grouped[arm]) for arm in arms if arm in grouped):
        floor = metrics.similarity_floor(group[0]["expert_parameters"])
        for title, source in (
            ("trained together", "similarity"),
            ("before training", "initial.similarity"),
            ("null: trained alone", "null.similarity"),
        ):
            values = {
                column: spread([look_up(r, f"{source}.{key}") for r in group], 4)
                for column, key in names.items()
            }
            rows.append({"arm": arm, "experts": title, **values})
        rows.append({"arm": arm, "experts": "floor sqrt(2 / (pi P))", SIMILARITY[0]: f"{floor:.4f}"})
    return (
        pd.DataFrame(rows, columns=["arm", "experts", *SIMILARITY]).fillna("-").set_index(["arm", "experts"])
    )


def paired(runs: pd.DataFrame, arms: Sequence[str], column: str) -> pd.DataFrame | None:
    """One row a seed that has all the arms, one column an arm; None below two such seeds."""
    both = runs[runs["arm"].isin(arms)].pivot(index="seed", columns="arm", values=column)
    both = both.reindex(columns=list(arms)).dropna()
    return both if len(both) >= 2 else None


def contrast(runs: pd.DataFrame, treatment: str, control: str, column: str) -> stats.PairedComparison | None:
    """Treatment minus control over the seeds that both have; None below two of them."""
    both = paired(runs, [treatment, control], column)
    if both is None:
        return None
    return stats.paired_comparison(both[treatment].to_numpy(), both[control].to_numpy())


def mechanism(runs: pd.DataFrame, column: str) -> stats.PairedComparison | None:
    """(snnl - base) - (dense-snnl - dense): what SNNL does to a mixture beyond what it does to features."""
    both = paired(runs, ["snnl", "base", "dense-snnl", "dense"], column)
    if both is None:
        return None
    mixture, dense = both["snnl"] - both["base"], both["dense-snnl"] - both["dense"]
    return stats.paired_comparison(mixture.to_numpy(), dense.to_numpy())


def comparisons(rows: list[dict[str, str]], keys: list[str], *more: str) -> pd.DataFrame:
    """Rows of `keys`, what `show` says, and more, as a table."""
    columns = [*keys, "difference", "95 % interval", "p", "seeds", *more]
    return pd.DataFrame(rows, columns=columns).set_index(keys)


ONE_EXPERT = ("dense", "dense-snnl")  # arms
MECHANISM_ROW = f"mechanism: {MECHANISM}"


def contrasts(
    runs: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    names: Sequence[str],
    columns: Columns = COLUMNS,
) -> pd.DataFrame:
    """Paired differences with their 95 % intervals, one row a contrast and column; of routing only between
    mixtures."""
    rows = []
    for column in names:
        routing = column in ROUTING  # says nothing where an arm has one expert
        own = [pair for pair in pairs if not (routing and {*pair} & {*ONE_EXPERT})]
        found = [(f"{a} - {b}", contrast(runs, a, b, column)) for a, b in own]
        if not routing:
            found.append((MECHANISM_ROW, mechanism(runs, column)))
        for name, value in found:
            if value is not None:
                rows.append(
                    {"measure": columns[column].title(column), "contrast": name}
                    | show(value, columns[column])
                )
    return comparisons(rows, ["measure", "contrast"])


PARTNERS = (  # arms that differ in one thing
    ("snnl", "base"), ("snnl", "snnl-shuffled"), ("snnl", "base-aux"), ("snnl", "base-balance"),
    ("snnl", "uniform-snnl"), ("snnl", "hash-snnl"), ("snnl", "dense-snnl"), ("base", "uniform-gate"),
    ("base", "hash-gate"), ("base", "dense"), ("dense-snnl", "dense"),
)  # fmt: skip


def partners(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """The pairs of arms worth comparing among those that ran; every arm without a partner against `base`."""
    there = list(dict.fromkeys(runs["arm"]))
    pairs = [pair for pair in PARTNERS if set(pair) <= set(there)]
    known = {arm for pair in PARTNERS for arm in pair}
    return pairs + [(arm, "base") for arm in there if arm not in known]


CROSSED_MEASURES = (
    "accuracy", "validation area", "lost to corruption", "effective experts", "SNNL at T = 1", "kNN accuracy",
)  # fmt: skip


def crossed_effects(runs: pd.DataFrame, names: Sequence[str] = CROSSED_MEASURES) -> pd.DataFrame:
    """Main effects and interaction of SNNL and AC, paired by seed over the seeds that have all four arms."""
    rows = []
    for name in names:
        both = paired(runs, ["base", "ac", "snnl", "snnl-ac"], name)
        if both is None:
            continue
        base, ac, snnl, joint = both.to_numpy().T
        for effect, treatment, control in (
            ("AC: mean of (ac - base), (snnl-ac - snnl)", (ac + joint) / 2, (base + snnl) / 2),
            ("SNNL: mean of (snnl - base), (snnl-ac - ac)", (snnl + joint) / 2, (base + ac) / 2),
            ("interaction: (snnl-ac - snnl) - (ac - base)", joint - snnl, ac - base),
        ):
            found = stats.paired_comparison(treatment, control)
            column = VISION_COLUMNS[name]
            rows.append({"measure": column.title(name), "contrast": effect} | show(found, column))
    return comparisons(rows, ["measure", "contrast"])


def convergence(results: Sequence[Result], controls: Sequence[str] = ("linear", "cosine")) -> pd.DataFrame:
    """Arm by arm: area and best of the validation cross-entropy, and the epochs until it is as low as that
    control's best at the same seed.

    Epochs are the median over seeds, where one that never got there counts as later than any epoch; in
    brackets how many did.
    """
    curves = {
        arm: {r["run"]["seed"]: r["history"]["validation"]["cross_entropy"] for r in group}
        for arm, group in by_arm(results).items()
    }
    rows = {}
    for arm, own in curves.items():
        row = {
            "seeds": str(len(own)),
            "validation area": spread(map(np.mean, own.values()), 4),
            "best validation cross-entropy": spread(map(min, own.values()), 4),
        }
        for control in controls:
            best = {seed: min(curve) for seed, curve in curves.get(control, {}).items()}
            steps = [epochs_until(curve, best[seed]) for seed, curve in own.items() if seed in best]
            row[f"epochs to best of {control}"] = _median_epoch(steps, max(map(len, own.values())))
        rows[arm] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")


def epochs_until(curve: Sequence[float], level: float) -> float:
    """The first epoch, counted from 1, at which a falling curve is at or below a level; infinity if none."""
    return next((epoch for epoch, value in enumerate(curve, 1) if value <= level), float("inf"))


def _median_epoch(steps: Sequence[float], epochs: int) -> str:
    if not steps:
        return "-"
    median = float(np.median(steps))
    shown = f"{median:g}" if np.isfinite(median) else f"> {epochs}"
    return f"{shown} ({sum(np.isfinite(steps))} of {len(steps)})"


def attack_modes(results: Sequence[Result]) -> pd.DataFrame:
    """Points of accuracy lost to each attack by each treatment of M, mean ± sd over seeds. "-": there is no
    such treatment, because SPSA uses no gradient or the router has no M that depends on the batch."""
    rows = []
    for attack in ("fgsm-1", "fgsm-2", "pgd-1", "pgd-2", "spsa-2"):
        name, strength = attack.split("-")
        for arm, group in by_arm(results).items():
            lost = pd.DataFrame([attack_losses(attack, r) for r in group])
            lost = lost.reindex(columns=["detached", "through", "frozen"]).astype(float)
            rows.append(
                {"attack": f"{name.upper()}, {strength}/255", "arm": arm}
                | {str(mode): spread(100 * values, 2) for mode, values in lost.items()}
            )
    return pd.DataFrame(rows).set_index(["attack", "arm"])


def routing_by_layer(results: Sequence[Result]) -> pd.DataFrame:
    """Routing of each MoE layer, mean ± sd over seeds. "Changed" is against M = I in the same model, a share
    of the tokens; "follows cluster" is the adjusted mutual information of best expert and cluster."""
    measures = {
        "effective experts": ("load.effective_experts", 2),
        "dead experts": ("load.dead_experts", 1),
        "H(E|x)": ("per_sample", 3),
        "H(E|c)": ("class_conditional", 3),
        "AMI": ("load.adjusted_mutual_information", 3),
        "best expert changed by M": ("changed.best", 3),
        "chosen set changed by M": ("changed.chosen", 3),
        "follows cluster": ("changed.follows", 3),
        "with M = I": ("changed.follows_plain", 3),
    }
    rows = []
    for arm, group in by_arm(results).items():
        for at in range(len(look_up(group[0], "routing.layers"))):
            rows.append(
                {"arm": arm, "MoE layer": str(at + 1)}
                | {
                    name: spread([look_up(r, f"routing.layers.{at}.{path}") for r in group], decimals)
                    for name, (path, decimals) in measures.items()
                }
            )
    return pd.DataFrame(rows, columns=["arm", "MoE layer", *measures]).set_index(["arm", "MoE layer"])


def company_table(results: Sequence[Result]) -> pd.DataFrame:
    """Does a prediction depend on what else is in the batch, or comes later? Mean ± sd over seeds, and the
    largest change of any log-probability."""
    rows = []
    for result in results:
        found = result["company"]
        for kind, one in {"other images": found}.items() if "changed_choice" in found else found.items():
            rows.append({"without": kind, "arm": result["run"]["arm"]} | one)
    found = pd.DataFrame(rows)
    found["more"] = found["cross_entropy_alone"] - found["cross_entropy_together"]
    groups = found.groupby(["without", "arm"], sort=False)
    table = pd.DataFrame(
        {
            "cross-entropy in the batch": groups["cross_entropy_together"].apply(spread, 4),
            "added without": groups["more"].apply(spread, 4),
            "choices changed": groups["changed_choice"].apply(spread, 3),
            "largest change": groups["largest_change"].max().map("{:.4f}".format),
        }
    )
    return table.sort_index(level="without", sort_remaining=False, kind="stable")


def claim_table(results: Sequence[Result], study: str) -> pd.DataFrame:
    """Each claim for the AC router in a study: its paired differences against every control, and where their
    intervals lie."""
    rows = []
    for claim, measure, contrasts in claimed(study):
        runs = frame_of(results, {measure.name: measure.column})
        heading = f"{measure.column.title(measure.name)}, {measure.direction} is better"
        for a, b in contrasts:
            found = contrast(runs, a, b, measure.name)
            if found is not None:
                rows.append(
                    {"claim": claim.wording, "measure": heading, "contrast": f"{a} - {b}"}
                    | show(found, measure.column)
                    | {"reading": "-" if found.seeds < FEWEST_SEEDS else reading(found, measure.direction)}
                )
    return comparisons(rows, ["claim", "measure", "contrast"], "reading")


def shown_p(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"


PLAIN = Column("", 4)
FEWEST_SEEDS = 3  # of an interval or a band; with two the t interval is 13 standard errors to each side


def show(value: stats.PairedComparison, column: Column = PLAIN) -> dict[str, str]:
    """A comparison as text: difference, t interval ("-" below three seeds), sign-flip p, and "pilot" below
    eight seeds."""
    low, high = value.low * column.scale, value.high * column.scale
    return {
        "difference": signed(value.difference * column.scale, column.decimals),
        "95 % interval": "-" if value.seeds < FEWEST_SEEDS else shown_interval(low, high, column.decimals),
        "p": shown_p(value.p),
        "seeds": f"{value.seeds}" + (" (pilot)" if value.seeds < PILOT_BELOW else ""),
    }
