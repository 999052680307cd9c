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

from moe_study import stats, store, study
from moe_study.claims import BY_KEY, OUTSIDE, Claim
from moe_study.verdicts import Result, Word, by_seed, decide, endpoint_of

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
    signed_RSUP = signed_RSUP + effect * known.margins_U[:, None]
    return np.array([words(signed_SUP, known.margins_U) for signed_SUP in signed_RSUP])


def words(signed_SUP: np.ndarray, margins_U: np.ndarray) -> list[int]:
    """Places in `WORDS`, one a unit: what the rule says of one study, with Holm over its units."""
    p_U = [stats.sign_flip_p(signed_S) if signed_S.mean() > 0 else 1.0 for signed_S in signed_SUP[:, :, 0].T]
    found = []
    for signed_PS, margin, p in zip(signed_SUP.transpose(1, 2, 0), margins_U, stats.holm(p_U), strict=True):
        elsewhere = any(stats.t_interval(signed_S, 0.9)[1] < 0 for signed_S in signed_PS[1:])
        found.append(WORDS.index(decide(signed_PS[0], margin, p, elsewhere)))
    return found


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
