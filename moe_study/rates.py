"""How often the rule says each word: simulated studies whose true effect is known.

`python -m moe_study rates` writes what comes out to `results/planted/verdicts.json`.

A simulated study draws seeds, with replacement, from the committed SNNL runs. A drawn seed brings along what
it has of every claim, data set and endpoint, so that their real correlations stay. Of the paired differences
the means are taken away and the true effect is added, at every endpoint alike: a multiple of the difference
that counts. Then the rule decides, with Holm over the family. Gates, floors and conditions are left out: each
of them only withholds a word.

Shapes: R simulated studies, S seeds, U units, P endpoints (the primary one first).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from scipy import stats as scipy_stats

from moe_study import stats, store, study
from moe_study.claims import BY_KEY, OUTSIDE, Claim
from moe_study.verdicts import ALPHA, Result, Word, by_seed, endpoint_of

CLAIMS = ("snnl-accuracy", "snnl-orthogonal", "snnl-flexible")  # their first measure
EFFECTS = (0.0, 0.5, 1.0, 2.0)  # times the difference that counts
SEED_COUNTS = (10, 20)
STUDIES = 2000
WORDS: tuple[Word, ...] = get_args(Word)


class Residuals(NamedTuple):
    """Of real paired differences, positive in the claimed direction."""

    units: tuple[tuple[str, str], ...]  # claim and data set
    margins_U: np.ndarray
    values_SUP: np.ndarray  # mean 0 over seeds; NaN where an endpoint was not measured


def residuals(results: Sequence[Result]) -> Residuals:
    """From results of the SNNL study, over the seeds that all units have.

    Scaled by sqrt(S / (S - 1)), so that a sample drawn from them has the variance of the differences.

    Raises:
        ValueError: fewer than two seeds have every unit.
    """
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for key in CLAIMS:
        for dataset in dict.fromkeys(
            r["run"]["dataset"] for r in results if r["run"]["dataset"] not in OUTSIDE
        ):
            found[key, dataset] = _differences(
                BY_KEY[key], [r for r in results if r["run"]["dataset"] == dataset]
            )
    seeds = sorted(set.intersection(*map(set, found.values()))) if found else []
    if len(seeds) < 2:
        raise ValueError(f"simulated studies need results of two seeds with every unit, found {len(seeds)}")
    values_SUP = np.array([[by_seed[seed] for by_seed in found.values()] for seed in seeds])
    values_SUP = (values_SUP - values_SUP.mean(0)) * np.sqrt(len(seeds) / (len(seeds) - 1))
    margins_U = np.array([BY_KEY[key].worth(dataset) for key, dataset in found])
    return Residuals(tuple(found), margins_U, values_SUP)


def _differences(claim: Claim, results: Sequence[Result]) -> dict[int, list[float]]:
    """Of each seed that has both arms: its signed differences [P], NaN where an endpoint was not measured."""
    primary = endpoint_of(claim, results)
    found: dict[int, list[float]] = {}
    for name in (primary, *(other for other in store.ENDPOINTS if other != primary)):
        treated, control = (by_seed(results, claim.measure, arm, name) for arm in ("snnl", "base"))
        for seed in set(treated) & set(control) if name == primary else found:
            known = seed in treated and seed in control
            difference = claim.measure.sign * (treated[seed] - control[seed]) if known else np.nan
            found.setdefault(seed, []).append(difference)
    return found


def simulate(
    known: Residuals, effect: float, seeds: int, studies: int, symmetric: bool = False
) -> np.ndarray:
    """[R, U] words, as their places in `WORDS`, of studies whose every unit has this effect (in margins).

    Args:
        symmetric: draw a sign for each seed too, of all its differences together. Then they are as the
            sign-flip test assumes, and correlated as they were.
    """
    draw = np.random.default_rng([seeds, round(10 * effect), symmetric])
    drawn_RS = draw.integers(len(known.values_SUP), size=(studies, seeds))
    signed_RSUP = known.values_SUP[drawn_RS]
    if symmetric:
        signed_RSUP *= draw.choice([-1.0, 1.0], size=(studies, seeds, 1, 1))
    return words(signed_RSUP + effect * known.margins_U[:, None], known.margins_U)


def words(signed_RSUP: np.ndarray, margins_U: np.ndarray) -> np.ndarray:
    """[R, U] places in `WORDS`: `verdicts.decide` of every unit, with Holm over the units of each study."""
    seeds = signed_RSUP.shape[1]
    mean_RUP = signed_RSUP.mean(1)
    half_RUP = scipy_stats.t.ppf(0.95, seeds - 1) * signed_RSUP.std(1, ddof=1) / np.sqrt(seeds)
    high_RUP = mean_RUP + half_RUP
    p_RU = np.stack([sign_flip_p(signed_RSUP[:, :, u, 0]) for u in range(len(margins_U))], axis=1)
    p_RU[mean_RUP[:, :, 0] <= 0] = 1.0
    holm_RU = np.stack([stats.holm(p_U) for p_U in p_RU])
    elsewhere_RU = (high_RUP[:, :, 1:] < 0).any(2)
    found_RU = np.full(p_RU.shape, WORDS.index("undecided"))
    found_RU[high_RUP[:, :, 0] < margins_U] = WORDS.index("smaller than claimed")
    found_RU[(mean_RUP[:, :, 0] > 0) & (holm_RU <= ALPHA) & ~elsewhere_RU] = WORDS.index("supported")
    found_RU[high_RUP[:, :, 0] < 0] = WORDS.index("contradicted")
    return found_RU


def sign_flip_p(differences_RS: np.ndarray) -> np.ndarray:
    """[R]: `stats.sign_flip_p` of every row."""
    seeds = differences_RS.shape[1]
    sums = []
    for part_RS in np.array_split(differences_RS, 2, axis=1):
        signs_KS = np.array(list(itertools.product((1, -1), repeat=part_RS.shape[1])))
        sums.append(np.sort(part_RS @ signs_KS.T, axis=1))
    least_R = np.abs(differences_RS.sum(1)) - 1e-12 * np.abs(differences_RS).sum(1)
    below_R = [
        np.searchsorted(b_K, least - a_K).sum() for a_K, b_K, least in zip(*sums, least_R, strict=True)
    ]
    return np.where(least_R <= 0, 1.0, np.minimum(2 * (1 - np.array(below_R) / 2.0**seeds), 1.0))


def rates(known: Residuals, studies: int) -> list[dict[str, Any]]:
    """Share of each word for each number of seeds, effect and unit."""
    rows: list[dict[str, Any]] = []
    for seeds, effect in itertools.product(SEED_COUNTS, EFFECTS):
        found_RU = simulate(known, effect, seeds, studies)
        for (key, dataset), found_R in zip(known.units, found_RU.T, strict=True):
            share = {word: float((found_R == at).mean()) for at, word in enumerate(WORDS)}
            unit = {"seeds": seeds, "effect": effect, "claim": key, "dataset": dataset}
            rows.append(unit | {"words": share})
    return rows


def false_support(known: Residuals, studies: int) -> list[dict[str, Any]]:
    """Without any effect: the share of studies in which at least one unit is supported."""

    def share(seeds: int, symmetric: bool) -> float:
        found_RU = simulate(known, 0.0, seeds, studies, symmetric)
        return float((found_RU == WORDS.index("supported")).any(1).mean())

    return [
        {"seeds": seeds, "as drawn": share(seeds, False), "symmetric": share(seeds, True)}
        for seeds in SEED_COUNTS
    ]


def path() -> Path:
    return store.results_dir() / "planted" / "verdicts.json"


def write() -> None:
    """Simulate from the finished SNNL runs of profile "core" and write `path()`."""
    known = residuals(study.results(study.runs("core", "snnl")))
    content = {"studies": STUDIES, "real_seeds": len(known.values_SUP)}
    found = {"rates": rates(known, STUDIES), "false_support": false_support(known, STUDIES)}
    store.write(path(), content | found | store.provenance())
