"""The rule on simulated studies whose truth is known, drawn from the committed runs.

Shapes: R simulated studies, S seeds, U units, P endpoints.
"""

import numpy as np
import pytest

from moe_study import rates, store, study, verdicts
from moe_study.claims import BY_KEY
from moe_study.data import ROOT
from moe_study.report import verdicts as words


@pytest.fixture(scope="module")
def known():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MOE_RESULTS_DIR", raising=False)
        return rates.residuals(study.results(study.runs("core", "snnl")))


@pytest.fixture(scope="module")
def committed():
    return store.read(ROOT / "results" / "planted" / "verdicts.json")


def shares(committed, word, effect, seeds):
    """How often each unit got that word."""
    rows = committed["rates"]
    return [row["words"][word] for row in rows if (row["effect"], row["seeds"]) == (effect, seeds)]


def test_residuals_are_the_real_differences_about_their_mean(known):
    assert {dataset for _, dataset in known.units} == {"fashion_mnist", "cifar10", "cifar100"}
    np.testing.assert_allclose(known.values_SUP[:, :, 0].mean(0), 0, atol=1e-12)
    results = study.results(study.runs("core", "snnl", "cifar10"))
    u = known.units.index(("snnl-accuracy", "cifar10"))
    for p, name in enumerate(("last_epoch", "best_accuracy", "best_cross_entropy")):
        own = verdicts.pairs(results, BY_KEY["snnl-accuracy"].measure, "snnl", "base", name)
        if len(own[0]):  # drawn with replacement: their variance is that of a sample
            assert known.values_SUP[:, u, p].std() == pytest.approx(np.subtract(*own).std(ddof=1))
        else:
            assert np.isnan(known.values_SUP[:, u, p]).all()


@pytest.mark.parametrize("seeds", rates.SEED_COUNTS)
def test_without_an_effect_little_is_supported(seeds, committed):
    """Each unit, as the residuals were; any unit of a study, where they are as the test assumes."""
    error = 3 * (0.05 * 0.95 / committed["studies"]) ** 0.5  # of a rate of 5 %
    assert max(shares(committed, "supported", 0.0, seeds)) <= 0.05 + error
    (of_any,) = [row for row in committed["false_support"] if row["seeds"] == seeds]
    assert of_any["symmetric"] <= 0.05 + error


def test_an_effect_of_the_margin_is_rarely_called_smaller(known):
    found_RU = rates.simulate(known, 1.0, 20, 1000, symmetric=True)
    small = np.isin(found_RU, [rates.WORDS.index(word) for word in ("smaller than claimed", "contradicted")])
    assert small.mean(0).max() <= 0.05 + 3 * (0.05 * 0.95 / 1000) ** 0.5


def test_power_grows_with_effect_and_seeds(committed):
    supported = {
        (seeds, effect): np.mean(shares(committed, "supported", effect, seeds))
        for seeds in rates.SEED_COUNTS
        for effect in rates.EFFECTS
    }
    for seeds in rates.SEED_COUNTS:
        by_effect = [supported[seeds, effect] for effect in rates.EFFECTS]
        assert by_effect == sorted(by_effect)
    assert all(supported[20, effect] > supported[10, effect] for effect in (0.5, 1.0, 2.0))


def test_simulated_studies_need_two_seeds():
    with pytest.raises(ValueError, match="results of two seeds with every unit, found 0"):
        rates.residuals([])


def test_what_is_written_and_shown(known, folders, monkeypatch):
    monkeypatch.setattr(rates, "STUDIES", 20)
    monkeypatch.setattr(rates, "residuals", lambda results: known)
    rates.write()
    found = store.read(rates.path())
    assert len(found["rates"]) == len(known.units) * len(rates.EFFECTS) * len(rates.SEED_COUNTS)
    assert all(sum(row["words"].values()) == pytest.approx(1) for row in found["rates"])
    table = words.rates_table(found)
    assert len(table) == len(rates.CLAIMS) * len(rates.EFFECTS) * len(rates.SEED_COUNTS)
    row = table.loc[("more accurate", "20", "2 x")]
    own = [r["words"]["supported"] for r in found["rates"]
           if (r["claim"], r["seeds"], r["effect"]) == ("snnl-accuracy", 20, 2.0)]  # fmt: skip
    assert row["supported"] == f"{100 * np.mean(own):.1f}"
    assert "at least one unit of a study is supported in" in words.false_support(found)
    assert words.rates_table({"rates": []}).empty


@pytest.mark.slow
def test_committed_rates_are_what_the_command_writes(known, committed, monkeypatch):
    """Of ten seeds, and of two effects; each number of seeds and effect has draws of its own."""
    monkeypatch.setattr(rates, "SEED_COUNTS", (10,))
    monkeypatch.setattr(rates, "EFFECTS", (0.0, 1.0))
    found = store.compact(rates.rates(known, committed["studies"]))
    kept = [row for row in committed["rates"] if row["seeds"] == 10 and row["effect"] in rates.EFFECTS]
    assert found == kept
    of_any = store.compact(rates.false_support(known, committed["studies"]))
    assert of_any == [row for row in committed["false_support"] if row["seeds"] == 10]
