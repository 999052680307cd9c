import pytest

from moe_lib import planted, tour


def test_ring_clusters_lie_where_they_should():
    points_N2, classes_N, clusters_N = planted.ring_clusters(500, num_clusters=6, num_classes=3, spread=0.1)
    for k in range(6):
        own = points_N2[clusters_N == k]
        assert abs(own.norm(dim=1).mean() - 1) < 0.03
        assert (own.std(0) - 0.1).abs().max() < 0.02
        assert classes_N[clusters_N == k].unique().tolist() == [k % 3]


def test_tour_gates_are_told_apart():
    table = tour.gates_table(seed=3)
    assert table.loc["specialised", "I(c;E)"] == 1.386
    assert table.loc["blind", "I(x;E)"] == 0
    assert table.loc["arbitrary", "I(c;E)"] < 0.01
    assert table.loc["collapsed", "H(E)"] == 0


def test_eps_form_agrees_where_it_can_and_caps_where_it_cannot():
    points_N2, classes_N, _ = planted.ring_clusters(40, seed=1)
    table = tour.temperature_table(points_N2, classes_N)
    assert abs(table.loc["1", "exact"] - table.loc["1", "with eps"]) < 1e-3
    assert table.loc["1e-05", "with eps"] < table.loc["1e-05", "exact"] / 2


def test_bad_planted_arguments():
    with pytest.raises(ValueError, match=r"-0\.1"):
        planted.ring_clusters(spread=-0.1)
