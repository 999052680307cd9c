"""Result files as data frames, and the tables that notebooks and report show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from scipy.special import entr

from moe_lib import metrics
from moe_study import stats, store
from moe_study.configs.dose import Panel
from moe_study.data import text

PILOT_BELOW = 8  # paired seeds; fewer are shown, never decided on

Result = dict[str, Any]


class Column(NamedTuple):
    """Where a table finds a number, and how it shows it."""

    source: str | Callable[[Result], float | None]  # a dotted path inside a result file, or a function of it
    decimals: int
    unit: str = ""  # "points": a share of 1, shown in percentage points

    @property
    def scale(self) -> float:
        return 100.0 if self.unit == "points" else 1.0

    def title(self, name: str, level: bool = False) -> str:
        """The column's heading with its unit; a level of accuracy, whose differences are points, is in %."""
        unit = "%" if level and self.unit == "points" and "accuracy" in name else self.unit
        return f"{name} ({unit})" if unit else name


Columns = dict[str, Column]
T = TypeVar("T")


def at_three_endpoints(name: str, decimals: int = 4, unit: str = "") -> Columns:
    """A score of the task at the last epoch, and at the two epochs that validation data select; None where a
    file was scored at others."""
    key = name.replace(" ", "_").replace("-", "_")

    def at(endpoint: str, result: Result) -> float | None:
        found = store.at_endpoint(result, endpoint)
        return look_up({**result, "task": found["task"]}, ("task", key)) if "task" in found else None

    return {
        f"{name}{suffix}": Column(partial(at, endpoint), decimals, unit)
        for endpoint, suffix in zip(store.ENDPOINTS, ("", *SELECTED), strict=True)
    }


SELECTED = (", best validation accuracy", ", best validation cross-entropy")


def dead_experts(result: Result) -> float | None:
    """Experts that are no sample's first choice; None for a constant gate, which chooses none."""
    if result["run"].get("model", {}).get("gate") == "uniform":
        return None
    return look_up(result, "routing.load.dead_experts")


COLUMNS: Columns = {
    **at_three_endpoints("accuracy", 2, "points"),
    **at_three_endpoints("cross-entropy", 4, "nats"),
    **at_three_endpoints("calibration error"),
    "H(E)": Column("routing.entropy.marginal", 3),
    "H(E|x)": Column("routing.entropy.per_sample", 3),
    "H(E|c)": Column("routing.entropy.class_conditional", 3),
    "H(C|E)": Column("routing.entropy.expert_class", 3),
    "I(x;E)": Column("routing.entropy.information_input", 3),
    "I(c;E)": Column("routing.entropy.information_class", 3),
    "I(c;E) null": Column("routing.information_class_null", 4),
    "effective experts": Column("routing.load.effective_experts", 2),
    "dead experts": Column(dead_experts, 1),
    "AMI": Column("routing.load.adjusted_mutual_information", 3),
    "cost of permuted routing": Column("ablation.permuted", 2, "points"),
    "|cos| weights": Column("similarity.weights", 4),
    "|cos| weights, aligned": Column("similarity.weights_aligned", 4),
    "cos outputs": Column("similarity.outputs", 3),
    "CKA outputs": Column("similarity.cka", 3),
    "cos outputs, by use": Column("similarity.outputs_weighted", 3),
    "CKA outputs, by use": Column("similarity.cka_weighted", 3),
    "kNN accuracy": Column("embedding.knn_accuracy", 1, "points"),
    "silhouette": Column("embedding.silhouette", 3),
    "trustworthiness": Column("embedding.trustworthiness", 3),
    "SNNL at T = 1": Column("embedding.snnl", 3),
}
SCORE = (*at_three_endpoints("accuracy"), "cross-entropy", "calibration error")
ROUTING = (  # the measures of collapse first
    "effective experts", "dead experts", "cost of permuted routing", "AMI",
    "H(E)", "H(E|x)", "H(E|c)", "H(C|E)", "I(x;E)", "I(c;E)", "I(c;E) null",
)  # fmt: skip
SIMILARITY = ("|cos| weights", "|cos| weights, aligned", "cos outputs", "CKA outputs")
BY_USE = ("cos outputs, by use", "CKA outputs, by use")
EMBEDDING = ("kNN accuracy", "silhouette", "trustworthiness", "SNNL at T = 1")


# What some result files rightly lack, and why; a table shows "-" there. Any other missing path is an error.
OPTIONAL = {
    "null": "experts are trained alone for some arms only",
    "similarity.outputs_weighted": "came with the confirming studies; older files lack it",
    "similarity.cka_weighted": "came with the confirming studies; older files lack it",
    "ablation.permuted_everywhere": "where M scales what the experts see, the routing cannot be permuted",
}


def look_up(result: Result, path: str | Sequence[str]) -> Any:
    """The value at a dotted path, or at a sequence of keys that may hold dots; None where the file says null
    there or above, and where it lacks a path that `OPTIONAL` lists.

    Raises:
        StoreError: the file lacks the path; names both.
    """
    keys = path.split(".") if isinstance(path, str) else path
    value: Any = result
    for at, key in enumerate(keys):
        if value is None:
            return None
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            dotted = ".".join(keys)
            if any(dotted == known or dotted.startswith(f"{known}.") for known in OPTIONAL):
                return None
            there = f"{'.'.join(keys[:at])} has no {key!r}" if at else f"there is no {key!r}"
            raise store.StoreError(f"{_file(result)} lacks {dotted}: {there}") from error
    return value


def _file(result: Result) -> str:
    """Its name below the results folder, as far as the result says."""
    run = result.get("run")
    if not run:
        return "a result"
    name = f"{run['arm']}-s{run['seed']}-{result.get('id', '')}.json"
    return f"result file {run['profile']}/{run['study']}/{run['dataset']}/{name}"


def by_arm(results: Iterable[Result]) -> dict[str, list[Result]]:
    """In the order in which the arms appear."""
    return grouped(results, lambda result: result["run"]["arm"])


def grouped(items: Iterable[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    """Items by key, in the order in which the keys appear."""
    found: dict[str, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    """Of the numbers among them; None if there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def validation_area(result: Result) -> float | None:
    """Area under the validation cross-entropy, per epoch (nats): low for an early descent."""
    return _mean_of_all(look_up(result, "history.validation.cross_entropy"))


def experts_in_use(result: Result) -> float | None:
    """exp H of the shares of samples that the experts were chosen for first: 1 to E."""
    share_E = look_up(result, "routing.load.share")
    return None if share_E is None else float(np.exp(entr(share_E).sum()))


def layer_mean(path: str, result: Result) -> float | None:
    """Mean over MoE layers of one routing measure; layers where it is null are left out."""
    layers = range(len(look_up(result, "routing.layers")))
    return _mean(look_up(result, f"routing.layers.{layer}.{path}") for layer in layers)


def _mean_of_all(values: Iterable[float | None]) -> float | None:
    """None if one of the numbers is missing, or all are."""
    found = list(values)
    return None if None in found else _mean(found)


def corruption_loss(result: Result) -> float | None:
    """Accuracy lost to corruption: clean minus corrupted, mean over all kinds and severities."""
    return _difference(look_up(result, "corruption.clean"), accuracy_corrupted(result))


def accuracy_corrupted(result: Result) -> float | None:
    """Accuracy under corruption, mean over all kinds and severities."""
    kinds = {name: row for name, row in look_up(result, "corruption").items() if name != "clean"}
    return _mean_of_all(value for row in kinds.values() for value in row)


def accuracy_attacked(attacks: Sequence[str], result: Result) -> float | None:
    """Accuracy under attack, mean over some attacks; of each the stronger treatment of M counts."""
    return _difference(look_up(result, "attack.clean"), attack_loss(attacks, result))


def attack_losses(attack: str, result: Result) -> dict[str, float | None]:
    """Accuracy lost to an attack, such as "pgd-2", on the same images, by treatment of M."""
    clean = look_up(result, "attack.clean")
    if f"{attack} clean" in result["attack"]:  # an attack that takes long is made on fewer images
        clean = look_up(result, f"attack.{attack} clean.detached")
    return {
        mode: _difference(clean, accuracy) for mode, accuracy in look_up(result, f"attack.{attack}").items()
    }


GRADIENT_ATTACKS = ("fgsm-1", "fgsm-2", "pgd-1", "pgd-2")


def attack_loss(attacks: Sequence[str], result: Result) -> float | None:
    """Accuracy lost, mean over some attacks; of each the stronger treatment of M counts, constant in the
    gradient or differentiated. (With M frozen, it is another model that is scored.)"""

    def strongest(attack: str) -> float | None:
        lost = [v for mode, v in attack_losses(attack, result).items() if mode != "frozen"]
        known = [v for v in lost if v is not None]
        return max(known) if known and len(known) == len(lost) else None

    return _mean_of_all(strongest(attack) for attack in attacks)


SWAP_SHARES = tuple(f"{share:g}" for share in text.SWAP_SHARES)


def swap_loss(shares: Sequence[str], result: Result) -> float | None:
    """Nats a token lost when a share of the words becomes <unk>, mean over some shares: swapped minus clean,
    on the same targets, those of the words left alone."""
    swaps = [[look_up(result, ("swap", share, key)) for key in ("swapped", "clean")] for share in shares]
    return _mean_of_all(_difference(*swap) for swap in swaps)


def swapped(shares: Sequence[str], result: Result) -> float | None:
    """Nats a token under word swap, mean over some shares, on the targets that `swap_loss` scores."""
    return _mean_of_all(look_up(result, ("swap", share, "swapped")) for share in shares)


def batch_dependence(path: str, result: Result) -> float | None:
    """Cross-entropy (nats) of samples predicted alone, minus that of the same with the rest of the batch."""
    return _difference(
        look_up(result, f"{path}.cross_entropy_alone"), look_up(result, f"{path}.cross_entropy_together")
    )


ROUTED_COLUMNS: Columns = {
    **at_three_endpoints("cross-entropy", 4, "nats"),
    **at_three_endpoints("accuracy", 2, "points"),
    "validation area": Column(validation_area, 4, "nats"),
    "H(E|x)": Column(partial(layer_mean, "per_sample"), 3),
    "H(E|c)": Column(partial(layer_mean, "class_conditional"), 3),
    "effective experts": Column(partial(layer_mean, "load.effective_experts"), 2),
    "dead experts": Column(partial(layer_mean, "load.dead_experts"), 1),
    "AMI": Column(partial(layer_mean, "load.adjusted_mutual_information"), 3),
    "stability": Column(lambda result: _mean(look_up(result, "routing.stability")), 3),
    "changed by M": Column(partial(layer_mean, "changed.chosen"), 3),
    "cost of permuted routing": Column("ablation.permuted_everywhere", 2, "points"),
}
VISION_COLUMNS: Columns = ROUTED_COLUMNS | {
    **at_three_endpoints("calibration error"),
    "accuracy under corruption": Column(accuracy_corrupted, 2, "points"),
    "accuracy under attack": Column(partial(accuracy_attacked, GRADIENT_ATTACKS), 2, "points"),
    "lost to corruption": Column(corruption_loss, 2, "points"),
    "lost to attack": Column(partial(attack_loss, GRADIENT_ATTACKS), 2, "points"),
    "FGSM, 2/255": Column(partial(attack_loss, ["fgsm-2"]), 2, "points"),
    "PGD, 2/255": Column(partial(attack_loss, ["pgd-2"]), 2, "points"),
    "SPSA, 2/255": Column(partial(attack_loss, ["spsa-2"]), 2, "points"),
    "batch dependence": Column(partial(batch_dependence, "company"), 4, "nats"),
    "kNN accuracy": Column("embedding.knn_accuracy", 1, "points"),
    "SNNL at T = 1": Column("embedding.snnl", 3),
}
LANGUAGE_COLUMNS: Columns = ROUTED_COLUMNS | {
    **at_three_endpoints("perplexity", 2),
    **at_three_endpoints("bits per byte"),
    "cross-entropy under word swap": Column(partial(swapped, SWAP_SHARES), 4, "nats"),
    "lost to swap": Column(partial(swap_loss, SWAP_SHARES), 4, "nats"),
    **{f"{100 * float(one):g} %": Column(partial(swap_loss, [one]), 4, "nats") for one in SWAP_SHARES},
    "dependence on other sequences": Column(partial(batch_dependence, "company.other sequences"), 4, "nats"),
    "dependence on later tokens": Column(partial(batch_dependence, "company.later tokens"), 4, "nats"),
    "cost of permuted routing": Column("ablation.permuted_everywhere", 4, "nats"),
}
ROUTED_ROUTING = (
    "effective experts", "dead experts", "cost of permuted routing", "AMI",
    "H(E|x)", "H(E|c)", "stability", "changed by M",
)  # fmt: skip

# The three claims for the AC router: wording, then measures and claimed directions.
Claims = dict[str, list[tuple[str, str]]]
VISION_CLAIMS: Claims = {
    "faster convergence": [("validation area", "lower")],
    "more robust": [
        ("accuracy under corruption", "higher"),
        ("accuracy under attack", "higher"),
        ("lost to corruption", "lower"),
        ("lost to attack", "lower"),
    ],
    "better": [("accuracy", "higher"), ("cross-entropy", "lower")],
}
LANGUAGE_CLAIMS: Claims = {
    "faster convergence": [("validation area", "lower")],
    "more robust": [("cross-entropy under word swap", "lower"), ("lost to swap", "lower")],
    "better": [("cross-entropy", "lower"), ("accuracy", "higher")],
}
# Treatment and control, the fair ones first. A pooled M is compared with its partner of like normalisation.
VISION_PAIRS = tuple(
    ("ac", control) for control in ("linear", "cosine", "ac-shuffled", "ac-pooled", "ac-matched", "ac-causal")
)
LANGUAGE_PAIRS = tuple(("ac-row", b) if b == "ac-pooled" else (a, b) for a, b in VISION_PAIRS)


def frame(results: Iterable[Result], columns: Columns = COLUMNS) -> pd.DataFrame:
    """One row a run: data set, arm, seed, then every one of the columns."""
    keys = ("profile", "study", "dataset", "arm", "seed")
    rows = [
        {key: result["run"][key] for key in keys}
        | {
            name: look_up(result, source) if isinstance(source, str) else source(result)
            for name, (source, *_) in columns.items()
        }
        for result in results
    ]
    return pd.DataFrame(rows, columns=[*keys, *columns]).astype(dict.fromkeys(columns, float))


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


def rounded(value: float, decimals: int) -> float:
    """Never -0.0: what rounds to zero has no sign."""
    return round(value, decimals) + 0.0


def signed(value: float, decimals: int) -> str:
    return f"{rounded(value, decimals):+.{decimals}f}"


def shown_interval(low: float, high: float, decimals: int) -> str:
    """ "[low, high]", with up to two more decimals where an end would lose its side of 0 to rounding."""
    more = next((k for k in (0, 1) if all(round(end, decimals + k) for end in (low, high) if end)), 2)
    return f"[{signed(low, decimals + more)}, {signed(high, decimals + more)}]"


def spread(numbers: Iterable[float | None], decimals: int) -> str:
    """ "mean ± sd" (sd of the sample), the mean alone for one seed, "-" for none. None does not count."""
    values = pd.Series(list(numbers), dtype=float).dropna()
    if values.empty:
        return "-"
    mean = f"{rounded(values.mean(), decimals):.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std():.{decimals}f}"


def shown_level(values: pd.Series, column: Column) -> str:
    return spread(values * column.scale, column.decimals)


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


def contrasts(
    runs: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    names: Sequence[str],
    columns: Columns = COLUMNS,
) -> pd.DataFrame:
    """Paired differences with their 95 % intervals, one row a contrast and column."""
    rows = []
    for column in names:
        found = [(f"{a} - {b}", contrast(runs, a, b, column)) for a, b in pairs]
        found.append(("mechanism: (snnl - base) - (dense-snnl - dense)", mechanism(runs, column)))
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
            "cross-entropy with it": groups["cross_entropy_together"].apply(spread, 4),
            "more without": groups["more"].apply(spread, 4),
            "choices changed": groups["changed_choice"].apply(spread, 3),
            "largest change": groups["largest_change"].max().map("{:.4f}".format),
        }
    )
    return table.sort_index(level="without", sort_remaining=False, kind="stable")


def claim_rows(
    runs: pd.DataFrame,
    claims: Claims,
    pairs: Sequence[tuple[str, str]],
    columns: Columns,
) -> pd.DataFrame:
    """Each claim for AC: its paired differences against every control, and where their intervals lie."""
    rows = []
    for claim, measures in claims.items():
        for column, direction in measures:
            for a, b in pairs:
                found = contrast(runs, a, b, column)
                if found is not None:
                    rows.append(
                        {
                            "claim": claim,
                            "measure": f"{columns[column].title(column)}, {direction} is better",
                            "contrast": f"{a} - {b}",
                        }
                        | show(found, columns[column])
                        | {"reading": reading(found, direction)}
                    )
    return comparisons(rows, ["claim", "measure", "contrast"], "reading")


def shown_p(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"


PLAIN = Column("", 4)


def show(value: stats.PairedComparison, column: Column = PLAIN) -> dict[str, str]:
    """A comparison as text: difference, t interval, sign-flip p, and "pilot" below eight seeds."""
    low, high = value.low * column.scale, value.high * column.scale
    return {
        "difference": signed(value.difference * column.scale, column.decimals),
        "95 % interval": shown_interval(low, high, column.decimals),
        "p": shown_p(value.p),
        "seeds": f"{value.seeds}" + (" (pilot)" if value.seeds < PILOT_BELOW else ""),
    }


def reading(value: stats.PairedComparison, claimed: str) -> str:
    """Where the 95 % interval lies, against the claimed direction ("higher" or "lower")."""
    sign = {"higher": 1, "lower": -1}[claimed]
    low, high = sorted((sign * value.low, sign * value.high))
    if low > 0:
        return "interval on the claimed side"
    if high < 0:
        return "interval on the other side"
    return "interval includes 0"


DOSE_MEASURES = ("accuracy", "cross-entropy", "H(E|c)", "I(x;E)")  # shown of each dose


def dose_effects(
    runs: pd.DataFrame, panel: Panel, name: str
) -> dict[tuple[int, int], stats.PairedComparison | None]:
    """Each dose of a panel, by row and column, minus its control; None below two seeds."""
    return {(row, column): contrast(runs, dose.name, dose.control.name, name) for row, column, dose in panel}


def dose_table(runs: pd.DataFrame, panel: Panel, name: str) -> pd.DataFrame:
    """The panel as text: difference from the control, 95 % t interval, number of seeds."""
    (down, rows), (across, heads) = panel.labels
    cells = [["-"] * len(heads) for _ in rows]
    for (row, column), found in dose_effects(runs, panel, name).items():
        if found is not None:
            shown = show(found, COLUMNS[name])
            cells[row][column] = f"{shown['difference']} {shown['95 % interval']} ({found.seeds})"
    return pd.DataFrame(cells, pd.Index(rows, name=down), pd.Index(heads, name=across))


def dose_trends(runs: pd.DataFrame, panels: Iterable[Panel], names: Sequence[str]) -> pd.DataFrame:
    """What a tenfold factor adds to each measure: every seed's least-squares slope on log10 of the factor,
    their mean and its 95 % t interval. Over the seeds that have all factors of a panel's column."""
    columns: dict[tuple[str, ...], tuple[tuple[str, ...], str]] = {}  # those of two panels once
    for panel in panels:
        (down, factors), (across, heads) = panel.labels
        for column, head in enumerate(heads if down == "factor" else ()):
            arms = tuple(line[column].name for line in panel.doses)
            columns.setdefault(arms, (factors, f"{across}: {head}"))
    rows = []
    for name in names:
        for tried, (factors, at) in columns.items():
            both = paired(runs, tried, name)
            if both is not None:
                slopes = np.polyfit(np.log10([float(f) for f in factors]), both.to_numpy().T, 1)[0]
                found = stats.paired_comparison(slopes, np.zeros(len(slopes)))
                rows.append({"measure": COLUMNS[name].title(name), "at": at} | show(found, COLUMNS[name]))
    return comparisons(rows, ["measure", "at"])
