"""Routing measures judged on planted routers."""

import math

import pandas as pd
import pytest
import torch
from scipy.stats import kendalltau

from moe_study import store, trust
from moe_study.__main__ import main
from moe_study.data import ROOT
from moe_study.data.planted import PlantedRouting, planted_routing


def test_measures_of_hand_made_routers():
    right = trust.routing_measures(planted_routing(overlap=0.0))
    assert right["H(E)"] == pytest.approx(1)
    assert right["H(E|x)"] == 0
    assert right["H(E|c)"] == 0
    assert right["effective experts"] == pytest.approx(1)
    assert right["ARI with the truth"] == 1
    assert right["I(c;E) - null"] == pytest.approx(1, abs=0.03)
    blind = trust.routing_measures(planted_routing("blind", 1.0))
    assert blind["H(E|x)"] == pytest.approx(1)
    assert abs(blind["I(c;E) - null"]) < 1e-12
    collapsed = trust.routing_measures(planted_routing("collapse", 1.0))
    assert collapsed["effective experts"] == pytest.approx(0.25)
    assert collapsed["H(E)"] == 0
    arbitrary = trust.routing_measures(planted_routing("noise", 1.0, overlap=0.0))
    assert arbitrary["H(E)"] == pytest.approx(1)
    assert abs(arbitrary["I(c;E) - null"]) < 0.03
    assert abs(arbitrary["ARI with the truth"]) < 0.03


def test_split_uses_twice_the_right_number_of_experts():
    measures = trust.routing_measures(planted_routing("split", 1.0, overlap=0.0))
    assert measures["effective experts"] * 8 == pytest.approx(8, abs=0.1)
    before = trust.routing_measures(planted_routing("split", 0.0, overlap=0.0))
    assert before["effective experts"] * 8 == pytest.approx(4)


def test_one_group_is_no_division_by_zero():
    one = torch.ones(6, 1, dtype=torch.float64)
    zeros = torch.zeros(6, dtype=torch.long)
    measures = trust.routing_measures(PlantedRouting(one, zeros, zeros, one, one[:, None]))
    assert measures["I(c;E) - null"] == 0
    undefined = {name for name, value in measures.items() if not math.isfinite(value)}
    assert undefined == {"routing collapse", "representational collapse", "functional collapse"}


def test_kinds_of_collapse_on_hand_made_routers():
    right = trust.routing_measures(planted_routing(overlap=0.0))
    for kind in ("routing", "representational", "functional"):
        assert right[f"{kind} collapse"] == pytest.approx(0, abs=0.03)
    collapsed = trust.routing_measures(planted_routing("collapse", 1.0))
    assert collapsed["routing collapse"] == collapsed["functional collapse"] == 1
    assert collapsed["representational collapse"] == pytest.approx(0, abs=0.03)
    alike = trust.routing_measures(planted_routing("alike", 1.0, overlap=0.0))
    assert alike["routing collapse"] == pytest.approx(0)
    assert alike["representational collapse"] == pytest.approx(1)
    assert alike["functional collapse"] == 1
    blind = trust.routing_measures(planted_routing("blind", 1.0))
    assert blind["functional collapse"] == pytest.approx(1)
    assert blind["routing collapse"] == pytest.approx(0)


def test_functional_collapse_counts_every_exchange():
    """Against the mean over all pairs of token and other token's gate, done with loops."""
    routing = planted_routing("noise", 0.4, num_per_group=12, seed=3)
    votes_NEC, probs_NE = routing.answers_NEC.tolist(), routing.probs_NE.tolist()

    def right(n, m):
        """Token n with the gate of m."""
        total = [sum(w * votes_NEC[n][e][c] for e, w in enumerate(probs_NE[m])) for c in range(8)]
        return total.index(max(total)) == labels[n]

    labels, tokens = routing.labels_N.tolist(), range(48)
    clean = sum(right(n, n) for n in tokens) / 48
    exchanged = sum(right(n, m) for n in tokens for m in tokens) / 48**2
    expected = 1 - (clean - exchanged) / (3 / 4 * (clean - 1 / 8))
    assert trust.routing_measures(routing)["functional collapse"] == pytest.approx(expected, abs=0.12)


def ladder(**columns):
    length = len(next(iter(columns.values())))
    frame = {"ladder": "noise", "seed": 0, "level": [n / (length - 1) for n in range(length)]}
    frame |= {name: [0.5] * length for name in [*trust.CLAIMED, trust.TRUTH]}
    return pd.DataFrame(frame | columns)


def test_scores_of_made_up_measures():
    climbed = pd.concat(
        [
            ladder(
                **{
                    "H(E)": [0.9, 0.7, 0.4, 0.1],
                    "H(E|x)": [0.1, 0.2, 0.3, 0.4],
                    "I(x;E)": [0.5, 0.5001, 0.4999, 0.5002],  # moves less than a hundredth
                    "H(E|c)": [0.1, 0.9, 0.2, 0.8],
                }
            ).assign(ladder=name)
            for name in trust.LADDERS
        ]
    )
    scored = trust.score_measures(climbed)
    assert scored.loc["H(E)"].tolist() == pytest.approx([1] * 8)
    assert scored.loc["H(E|x)", "noise"] == pytest.approx(-1)
    assert scored.loc["H(E|x)", "worst"] == pytest.approx(1)  # low is what it is read as good for
    assert scored.loc["I(x;E)", "noise"] == 0
    # Ranks of the values 1 4 2 3 (of the quality 4 3 2 1): sum of squared differences 14, 1 - 6 * 14 / 60.
    assert scored.loc["H(E|c)", "noise"] == pytest.approx(1 - 6 * (9 + 1 + 0 + 4) / 60)
    assert scored.loc["H(E|c)", "worst"] < 0


def test_ladders_on_real_gates():
    climbed = trust.climb(range(2), levels=(0, 0.5, 1))
    assert len(climbed) == 2 * 3 * len(trust.LADDERS)
    scored = trust.score_measures(climbed)
    # An independent rank correlation agrees where a measure is monotone.
    for name in ("noise", "collapse", "overlap"):
        assert scored.loc["I(c;E) - null", name] == pytest.approx(1)
        for _, one in climbed[climbed["ladder"] == name].groupby("seed"):
            assert kendalltau(1 - one["level"], one["I(c;E) - null"]).statistic == pytest.approx(1)
    assert scored.loc["H(E)", "noise"] == 0
    assert scored.loc["effective experts", "split"] == pytest.approx(-1)
    assert scored.loc["ARI with the truth", "noise, crossed"] == pytest.approx(1)
    assert scored.loc["representational collapse", "alike"] == pytest.approx(-1)
    assert scored.loc["functional collapse", ["alike", "noise, crossed"]].tolist() == pytest.approx([-1, -1])
    unseen = scored.drop(index=["representational collapse", "functional collapse", trust.TRUTH])
    assert unseen["alike"].abs().max() == 0


def test_the_command_writes_what_was_found(folders, monkeypatch):
    monkeypatch.setattr(trust, "SEEDS", (3, 4))
    monkeypatch.setattr(trust, "LEVELS", (0, 0.5, 1))
    monkeypatch.setattr(trust, "LADDERS", {name: trust.LADDERS[name] for name in ("split", "noise, crossed")})
    monkeypatch.setattr(trust, "UNSEEN", ("noise, crossed",))
    assert main(["trust"]) == 0
    found = store.read(folders / "results" / "planted" / "trust.json")
    assert (found["seeds"], found["levels"]) == ([3, 4], [0, 0.5, 1])
    for at, level in enumerate(trust.LEVELS):
        measured = [trust.routing_measures(planted_routing("split", level, seed=s), s) for s in (3, 4)]
        for name, values in found["means"]["split"].items():
            assert values[at] == pytest.approx(sum(one[name] for one in measured) / 2, rel=1e-4, abs=1e-6)
    signed = trust.signed_scores()
    assert signed.loc["effective experts", "split"] == pytest.approx(-1)  # calls needless experts better
    assert signed.loc["functional collapse", "noise, crossed"] == pytest.approx(1)


def test_the_committed_file_is_what_the_command_writes(monkeypatch):
    """Two of its ladders, climbed afresh."""
    monkeypatch.setattr(trust, "LADDERS", {name: trust.LADDERS[name] for name in ("alike", "overlap")})
    monkeypatch.setattr(trust, "UNSEEN", ("alike",))
    found = store.read(ROOT / "results" / "planted" / "trust.json")
    assert found["claimed"] == trust.CLAIMED
    climbed = trust.climb(trust.SEEDS)
    for ladder, one in climbed.groupby("ladder"):
        means = one.drop(columns=["ladder", "seed"]).groupby("level").mean()
        for name in [*trust.CLAIMED, trust.TRUTH]:
            assert found["means"][ladder][name] == pytest.approx(means[name].tolist(), abs=1e-5)
    scored = trust.score_measures(climbed)
    for name, row in found["scores"].items():
        for ladder in trust.LADDERS:
            assert row[ladder] == pytest.approx(scored.loc[name, ladder], abs=0.05)
