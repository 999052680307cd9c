import math

import pytest
import torch

from moe_lib import MoE
from moe_study import tour
from moe_study.data import planted
from moe_study.data.planted import ClusterConfig, feature_clusters, planted_routing


def test_ring_clusters_lie_where_they_should():
    points_N2, classes_N, clusters_N = planted.ring_clusters(500, num_clusters=6, num_classes=3, spread=0.1)
    for k in range(6):
        own = points_N2[clusters_N == k]
        assert abs(own.norm(dim=1).mean() - 1) < 0.03
        assert (own.std(0) - 0.1).abs().max() < 0.02
        assert classes_N[clusters_N == k].unique().tolist() == [k % 3]


def test_tour_gates_are_told_apart():
    labels_N = torch.arange(4000) % 8
    one_hot = torch.nn.functional.one_hot
    gates = {
        "collapsed": torch.tensor([1.0, 0, 0, 0]).expand(4000, 4),
        "blind": torch.full((4000, 4), 0.25),
        "arbitrary": one_hot(
            torch.randint(0, 4, (4000,), generator=torch.Generator().manual_seed(3)), 4
        ).float(),
        "specialised": one_hot(labels_N // 2, 4).float(),
    }
    table = tour.gates_table(gates, labels_N, seed=3)
    assert table.loc["specialised", "I(c;E)"] == 1.386
    assert table.loc["blind", "I(x;E)"] == 0
    assert table.loc["arbitrary", "I(c;E)"] < 0.01
    assert table.loc["collapsed", "H(E)"] == 0


def test_eps_form_agrees_where_it_can_and_caps_where_it_cannot():
    points_N2, classes_N, _ = planted.ring_clusters(40, seed=1)
    table = tour.temperature_table(points_N2, classes_N)
    assert abs(table.loc["1", "exact"] - table.loc["1", "with eps"]) < 1e-3
    assert table.loc["1e-05", "with eps"] < table.loc["1e-05", "exact"] / 2


def test_figures_of_the_tour_say_what_to_see_and_hide_no_point():
    """No legend and no label lies inside the axes."""
    points_N2, classes_N, _ = planted.ring_clusters(40, seed=1)
    mixture = MoE(2, num_experts=4, hidden_dim=3, out_dim=4).double()
    trained = {"base": (torch.nn.Linear(2, 2).double(), mixture)}
    experts = tour.experts_figure(trained, points_N2, classes_N)
    names = [text.get_text() for legend in experts.legends for text in legend.get_texts()]
    assert names == [*(f"expert {e}" for e in range(4)), *"0123"]
    for figure in (experts, tour.space_figure(0), tour.snnl_figure(points_N2, classes_N)):
        assert len(figure.get_label()) > 60
        assert figure.legends
        assert not any(axis.texts or axis.get_legend() for axis in figure.axes)


def test_bad_planted_arguments():
    with pytest.raises(ValueError, match=r"-0\.1"):
        planted.ring_clusters(spread=-0.1)


# ------------------------------------------------------------------------------------ feature clusters


def test_clusters_are_tight_along_their_own_features():
    config = ClusterConfig(4000, num_clusters=3, dim=6, separation=2.0, tight=0.2, loose=1.0, noise=0.5)
    clusters = feature_clusters(config, seed=2)
    for k in range(3):
        own = clusters.tokens_ND[clusters.labels_N == k]
        assert len(own) == 4000
        for q in range(6):
            expected = math.hypot(0.2 if q % 3 == k else 1.0, 0.5)
            assert clusters.deviation_ED[k, q].item() == pytest.approx(expected)
            assert own[:, q].std().item() == pytest.approx(expected, rel=0.05)
            assert own[:, q].mean().item() == pytest.approx(clusters.centres_ED[k, q].item(), abs=0.08)
        for j in range(k):
            assert torch.dist(clusters.centres_ED[j], clusters.centres_ED[k]).item() == pytest.approx(2.0)


def test_clusters_differ_by_seed_and_share_their_draw_over_settings():
    one, other = feature_clusters(ClusterConfig(), 0), feature_clusters(ClusterConfig(), 1)
    assert not torch.equal(one.tokens_ND, other.tokens_ND)
    wide = feature_clusters(ClusterConfig(separation=6.0), 0)
    torch.testing.assert_close(wide.centres_ED, 2 * one.centres_ED)
    torch.testing.assert_close(
        wide.tokens_ND - wide.centres_ED[wide.labels_N], one.tokens_ND - one.centres_ED[one.labels_N]
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_per_cluster": 0}, "0, 4 and 16"),
        ({"num_clusters": 17}, "250, 17 and 16"),
        ({"tight": -0.1}, r"tight must be .* got -0\.1"),
        ({"noise": math.nan}, "noise must be finite .* got nan"),
        ({"separation": math.inf}, "separation .* got inf"),
    ],
)
def test_bad_cluster_config(options, named):
    with pytest.raises(ValueError, match=named):
        ClusterConfig(**options)


# ------------------------------------------------------------------------------------ planted routing


def test_the_right_gate_is_the_posterior():
    routing = planted_routing(overlap=0.5, num_per_group=40, num_groups=3, dim=4, seed=1)
    centres = [routing.tokens_ND.new_zeros(4) for _ in range(3)]
    # The centres are not returned: those of the overlap that is next to nothing are the same.
    tight = planted_routing(overlap=1e-9, num_per_group=40, num_groups=3, dim=4, seed=1)
    for g in range(3):
        centres[g] = tight.tokens_ND[tight.partition_N == g].mean(0)
    for n in range(0, 120, 7):
        density = [
            math.exp(-sum((x - c) ** 2 for x, c in zip(routing.tokens_ND[n], centre, strict=True)) / 0.5)
            for centre in centres
        ]
        for g in range(3):
            assert routing.probs_NE[n, g].item() == pytest.approx(density[g] / sum(density), abs=1e-6)


@pytest.mark.parametrize("fault", ["noise", "collapse", "blind", "split", "alike"])
def test_level_0_is_right_and_gates_stay_gates(fault):
    right = planted_routing(fault, 0.0, overlap=0.0)
    assert torch.equal(right.probs_NE.argmax(1), right.partition_N)
    for level in (0.3, 1.0):
        routing = planted_routing(fault, level)
        torch.testing.assert_close(routing.probs_NE.sum(1), torch.ones(800, dtype=torch.float64))
        assert torch.equal(routing.tokens_ND, planted_routing(fault, 0.0).tokens_ND)


def test_faults_do_what_they_say():
    right = planted_routing().probs_NE
    noise = planted_routing("noise", 0.5).probs_NE
    moved = (noise != right).any(1)
    assert 300 < moved.sum() <= 400
    torch.testing.assert_close(noise.sum(0), right.sum(0))  # exchanged, not invented

    collapse = planted_routing("collapse", 0.25, overlap=0.0)
    astray = collapse.probs_NE.argmax(1) != collapse.partition_N
    assert collapse.probs_NE[astray].argmax(1).unique().tolist() == [0]
    assert planted_routing("collapse", 1.0).probs_NE[:, 0].min() == 1
    lower = planted_routing("collapse", 0.1, overlap=0.0)
    assert (astray | (lower.probs_NE.argmax(1) == lower.partition_N)).all()  # nested

    torch.testing.assert_close(planted_routing("blind", 0.4).probs_NE, 0.6 * right + 0.1)

    split = planted_routing("split", 1.0, overlap=0.0)
    assert split.probs_NE.shape == (800, 8)
    assert torch.equal(split.probs_NE.argmax(1) % 4, split.partition_N)
    assert 0.4 < (split.probs_NE.argmax(1) >= 4).double().mean() < 0.6


def test_experts_are_specialists_until_they_are_alike():
    """Counted token by token: right in the own group, one guess in eight elsewhere."""
    for fault, num_experts in (("noise", 4), ("split", 8)):
        routing = planted_routing(fault, 1.0)
        assert routing.answers_NEC.shape == (800, num_experts, 8)
        answer_NE = routing.answers_NEC.argmax(2)
        assert (routing.answers_NEC.sum(2) == 1).all()
        own = elsewhere = 0
        for n in range(800):
            for e in range(num_experts):
                right = int(answer_NE[n, e] == routing.labels_N[n])
                if e % 4 == routing.partition_N[n]:
                    own += right
                else:
                    elsewhere += right
        assert own == 800 * num_experts / 4
        assert elsewhere / (800 * num_experts * 3 / 4) == pytest.approx(1 / 8, abs=0.03)

    right = planted_routing()
    half, whole = planted_routing("alike", 0.5), planted_routing("alike", 1.0)
    assert torch.equal(half.probs_NE, right.probs_NE)
    all_know = (half.answers_NEC.argmax(2) == half.labels_N[:, None]).all(1)
    assert 0.5 <= all_know.double().mean() < 0.55  # and now and then three guesses are right
    assert torch.equal(whole.answers_NEC.argmax(2), whole.labels_N[:, None].expand(-1, 4))


def test_classes_nest_or_cross():
    nested, crossed = planted_routing(), planted_routing(crossed=True)
    assert torch.equal(nested.labels_N // 2, nested.partition_N)
    for g in range(4):
        counts = torch.bincount(crossed.labels_N[crossed.partition_N == g], minlength=8)
        assert counts.min() > 10
    assert torch.equal(nested.probs_NE, crossed.probs_NE)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fault": "noisy"}, "'noisy'; use 'noise', 'collapse'"),
        ({"level": 1.1}, r"got 1\.1"),
        ({"level": math.nan}, "got nan"),
        ({"overlap": -1.0}, r"got -1\.0"),
        ({"num_groups": 9}, "200, 2, 9 and 8"),
        ({"classes_per_group": 0}, "200, 0, 4 and 8"),
    ],
)
def test_bad_planted_routing(options, named):
    with pytest.raises(ValueError, match=named):
        planted_routing(**options)
