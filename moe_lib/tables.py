"""Result files as data frames, and the tables that notebooks and report show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from moe_lib import metrics, stats

PILOT_BELOW = 8  # paired seeds; fewer are shown, never decided on

# column -> path inside a result file, and how many decimals it is shown with
COLUMNS: dict[str, tuple[str, int]] = {
    "accuracy": ("task.accuracy", 4),
    "cross-entropy": ("task.cross_entropy", 4),
    "calibration error": ("task.calibration_error", 4),
    "last-epoch accuracy": ("last_epoch.accuracy", 4),
    "H(E)": ("routing.entropy.marginal", 3),
    "H(E|x)": ("routing.entropy.per_sample", 3),
    "H(E|c)": ("routing.entropy.class_conditional", 3),
    "H(C|E)": ("routing.entropy.expert_class", 3),
    "I(x;E)": ("routing.entropy.information_input", 3),
    "I(c;E)": ("routing.entropy.information_class", 3),
    "I(c;E) null": ("routing.information_class_null", 4),
    "effective experts": ("routing.load.effective_experts", 2),
    "dead experts": ("routing.load.dead_experts", 1),
    "AMI": ("routing.load.adjusted_mutual_information", 3),
    "cost of permuted routing": ("ablation.permuted", 4),
    "|cos| weights": ("similarity.weights", 4),
    "|cos| weights, aligned": ("similarity.weights_aligned", 4),
    "cos outputs": ("similarity.outputs", 3),
    "CKA outputs": ("similarity.cka", 3),
    "kNN accuracy": ("embedding.knn_accuracy", 3),
    "silhouette": ("embedding.silhouette", 3),
    "trustworthiness": ("embedding.trustworthiness", 3),
    "SNNL at T = 1": ("embedding.snnl", 3),
}
SCORE = ("accuracy", "last-epoch accuracy", "cross-entropy", "calibration error")
ROUTING = (
    "H(E)", "H(E|x)", "H(E|c)", "H(C|E)", "I(x;E)", "I(c;E)", "I(c;E) null", "AMI",
    "effective experts", "dead experts", "cost of permuted routing",
)  # fmt: skip
SIMILARITY = ("|cos| weights", "|cos| weights, aligned", "cos outputs", "CKA outputs")
EMBEDDING = ("kNN accuracy", "silhouette", "trustworthiness", "SNNL at T = 1")


def look_up(result: dict[str, Any], path: str) -> Any:
    """The value at a dotted path; None where the result does not have it."""
    value: Any = result
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def frame(results: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row a run: data set, arm, seed, then every column of `COLUMNS`."""
    rows = [
        {key: result["run"][key] for key in ("profile", "study", "dataset", "arm", "seed")}
        | {name: look_up(result, path) for name, (path, _) in COLUMNS.items()}
        for result in results
    ]
    columns = ["profile", "study", "dataset", "arm", "seed", *COLUMNS]
    table = pd.DataFrame(rows, columns=columns)
    return table.astype(dict.fromkeys(COLUMNS, float))


def summary(runs: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Arm by arm: number of seeds, and "mean ± standard deviation over seeds" of the given columns."""
    rows = {}
    for arm, group in runs.groupby("arm", sort=False):
        rows[arm] = {"seeds": str(len(group))} | {
            name: spread(group[name], COLUMNS[name][1]) for name in columns
        }
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["seeds", *columns])
    return table.rename_axis("arm")


def spread(values: pd.Series, decimals: int) -> str:
    """ "mean ± sd" (sd of the sample), the mean alone for one seed, "-" for none."""
    values = values.dropna()
    if values.empty:
        return "-"
    mean = f"{values.mean():.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std():.{decimals}f}"


def similarity_nulls(results: Sequence[dict[str, Any]], arms: Sequence[str]) -> pd.DataFrame:
    """Beside each arm's similarity: its value before training, that of experts trained alone on the same
    frozen extractor, and the floor of independent random vectors."""
    names = dict(zip(SIMILARITY, ("weights", "weights_aligned", "outputs", "cka"), strict=True))
    rows = []
    for arm in arms:
        group = [result for result in results if result["run"]["arm"] == arm]
        if not group:
            continue
        floor = metrics.similarity_floor(group[0]["expert_parameters"])
        for title, source in (
            ("trained together", "similarity"),
            ("before training", "initial.similarity"),
            ("null: trained alone", "null.similarity"),
        ):
            values = {
                column: spread(pd.Series([look_up(r, f"{source}.{key}") for r in group], dtype=float), 4)
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


def contrasts(runs: pd.DataFrame, pairs: Sequence[tuple[str, str]], columns: Sequence[str]) -> pd.DataFrame:
    """Paired differences with their 95 % intervals, one row a contrast and column."""
    rows = []
    for column in columns:
        found = [(f"{a} - {b}", contrast(runs, a, b, column)) for a, b in pairs]
        found.append(("mechanism: (snnl - base) - (dense-snnl - dense)", mechanism(runs, column)))
        for name, value in found:
            if value is not None:
                rows.append({"measure": column, "contrast": name} | show(value, COLUMNS[column][1]))
    return pd.DataFrame(
        rows, columns=["measure", "contrast", "difference", "95 % interval", "p", "seeds"]
    ).set_index(["measure", "contrast"])


def show(value: stats.PairedComparison, decimals: int = 4) -> dict[str, str]:
    """A comparison as text: difference, t interval, sign-flip p, and "pilot" below eight seeds."""
    return {
        "difference": f"{value.difference:+.{decimals}f}",
        "95 % interval": f"[{value.low:+.{decimals}f}, {value.high:+.{decimals}f}]",
        "p": f"{value.p:.4f}" if value.p >= 0.0001 else "< 0.0001",
        "seeds": f"{value.seeds}" + (" (pilot)" if value.seeds < PILOT_BELOW else ""),
    }


def reading(value: stats.PairedComparison, claimed: str) -> str:
    """Where the 95 % interval lies, against the claimed direction ("higher" or "lower")."""
    sign = {"higher": 1, "lower": -1}[claimed]
    low, high = sorted((sign * value.low, sign * value.high))
    if low > 0:
        return "as claimed"
    if high < 0:
        return "opposite to the claim"
    return "interval includes 0"
