"""The numbers of a result file: where each is found, what is derived from them, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import entr

from moe_study import store
from moe_study.data import text

Result = dict[str, Any]


class Column(NamedTuple):
    """Where a number is found in a result file, and how it is shown."""

    source: str | Callable[[Result], float | None]  # a dotted path, or a function of the whole file
    decimals: int = 4
    unit: str = ""  # "points": a share of 1, shown in percentage points
    endpoint: str | None = None  # None: the file's own primary one
    whole_run: bool = False  # it is of all epochs, and so the same at every endpoint

    @property
    def scale(self) -> float:
        return 100.0 if self.unit == "points" else 1.0

    def title(self, name: str, level: bool = False) -> str:
        """The column's heading with its unit; a level of accuracy, whose differences are points, is in %."""
        unit = "%" if level and self.unit == "points" and "accuracy" in name else self.unit
        return f"{name} ({unit})" if unit else name

    def of(self, result: Result, endpoint: str | None = None) -> float | None:
        """The value at an endpoint, or else at the column's own; None where the file has none there.

        A function has a value at the file's primary endpoint alone, unless it is of the whole run.
        """
        primary = store.primary_endpoint(result)
        endpoint = endpoint or self.endpoint or primary
        if not isinstance(self.source, str):
            return self.source(result) if self.whole_run or endpoint == primary else None
        there = store.at_endpoint(result, endpoint)
        if endpoint != primary and self.source.split(".")[0] not in there:
            return None
        return look_up(result | there, self.source)


Columns = dict[str, Column]


def at_three_endpoints(name: str, decimals: int = 4, unit: str = "") -> Columns:
    """A score of the task at the last epoch, and at the two epochs that validation data select."""
    source = f"task.{name.replace(' ', '_').replace('-', '_')}"
    return {
        f"{name}{suffix}": Column(source, decimals, unit, endpoint)
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
    "H(E)": Column("routing.entropy.marginal", 3, "nats"),
    "H(E|x)": Column("routing.entropy.per_sample", 3, "nats"),
    "H(E|c)": Column("routing.entropy.class_conditional", 3, "nats"),
    "H(C|E)": Column("routing.entropy.expert_class", 3, "nats"),
    "I(x;E)": Column("routing.entropy.information_input", 3, "nats"),
    "I(c;E)": Column("routing.entropy.information_class", 3, "nats"),
    "I(c;E) null": Column("routing.information_class_null", 4, "nats"),
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
    "validation area": Column(validation_area, 4, "nats", whole_run=True),
    "H(E|x)": Column(partial(layer_mean, "per_sample"), 3, "nats"),
    "H(E|c)": Column(partial(layer_mean, "class_conditional"), 3, "nats"),
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


def frame_of(results: Iterable[Result], columns: Columns = COLUMNS) -> pd.DataFrame:
    """One row a run: data set, arm, seed, then every one of the columns."""
    keys = ("profile", "study", "dataset", "arm", "seed")
    rows = [
        {key: result["run"][key] for key in keys}
        | {name: column.of(result) for name, column in columns.items()}
        for result in results
    ]
    return pd.DataFrame(rows, columns=[*keys, *columns]).astype(dict.fromkeys(columns, float))


def rounded(value: float, decimals: int) -> float:
    """Never -0.0: what rounds to zero has no sign. Ties do not depend on the order of a sum."""
    return round(round(value, decimals + 8), decimals) + 0.0


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
