"""The benchmark: its peers are what they claim to be, its measurements mean what they say.

Shapes: N samples, D width.
"""

import json
import math
from functools import partial

import numpy as np
import pytest
import reference
import torch

from benchmarks import attacks as bench_attacks
from benchmarks import experts as bench_moe
from benchmarks import gpu as bench_gpu
from benchmarks import inspect as bench_inspect
from benchmarks import measure
from benchmarks import profile as bench_profile
from benchmarks import run as bench
from benchmarks import snnl as bench_snnl
from benchmarks.measure import Contestant, Machine, Rates, Row, Work
from moe_lib.moe import AdaptiveClusteringRouter, route
from moe_study import store
from moe_study.data import ROOT

pytestmark = pytest.mark.slow


def sample(num_samples=12, dim=4, num_classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    features_ND = torch.randn(num_samples, dim, generator=generator, dtype=torch.float64).to(dtype)
    return features_ND, torch.arange(num_samples) % num_classes


# ----------------------------------------------------------------------------------------- peers


def test_the_authors_formula_step_by_step():
    features_ND, labels_N = sample()
    for temperature in (0.01, 0.5, 20.0):
        value = bench_snnl.authors([features_ND], labels_N, temperature)
        expected = reference.snnl_with_eps(features_ND.numpy(), labels_N, temperature)
        assert value.item() == pytest.approx(expected, rel=1e-9)


def test_the_cleverhans_formula_pair_by_pair():
    features_ND, labels_N = sample()
    losses = []
    for i in range(12):
        mass = {
            j: math.exp(-reference.distance_of(features_ND[i], features_ND[j], "sqeuclidean") / 3)
            for j in range(12)
            if j != i
        }
        share = sum(m for j, m in mass.items() if labels_N[j] == labels_N[i]) / (1e-5 + sum(mass.values()))
        losses.append(-math.log(1e-5 + share))
    value = bench_snnl.cleverhans([features_ND], labels_N, 3.0)
    assert value.item() == pytest.approx(math.fsum(losses) / 12, rel=1e-9)


CONTESTANTS = {
    "ours": (partial(bench_snnl.ours, distance="cosine"), "cosine"),
    "ours, squared Euclidean": (partial(bench_snnl.ours, distance="sqeuclidean"), "sqeuclidean"),
    "ours, streaming": (partial(bench_snnl.ours, distance="cosine", route="streaming"), "cosine"),
    "authors": (bench_snnl.authors, "cosine"),
    "cleverhans": (bench_snnl.cleverhans, "sqeuclidean"),
    "NCALoss": (bench_snnl.nca, "sqeuclidean"),
}


@pytest.mark.parametrize("name", CONTESTANTS)
def test_where_nothing_underflows_all_contestants_agree(name):
    if name == "NCALoss" and not bench_snnl.has_nca():
        pytest.skip("needs pytorch-metric-learning")
    loss, distance = CONTESTANTS[name]
    (first_ND, labels_N), (second_ND, _) = sample(), sample(dim=7)
    for layers in ([first_ND], [first_ND, second_ND]):
        expected = sum(reference.snnl(x_ND, labels_N, 2.0, distance) for x_ND in layers)
        assert loss(layers, labels_N, 2.0).item() == pytest.approx(expected, rel=1e-4)


def test_work_of_a_row():
    """3 N^2 D operations: half of N^2 pairs times D multiplications and additions, and once N^2 D of them."""
    row = bench_snnl.row(100, [8, 8, 8])
    assert row.name == "N=100 3 layers of D=8"
    assert row.work == Work(gemm=3 * 100**2 * 24, exp=3 * 100**2 / 2)


@pytest.mark.parametrize("top_k", [4, 2])  # with one expert the peers renormalise its weight to 1
def test_all_mixtures_do_the_same(top_k):
    """Values, and gradients by the input, of every contestant against the loop over tokens and experts."""
    size = bench_moe.Size(30, 6, 8, 5, 4, top_k)
    layer = bench_moe.build_layer(size, torch.float64, "cpu")
    x_ND = torch.randn(30, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = [weight.detach() for weight in layer.experts.stacked()]
    routing = layer.route(x_ND)
    expected_NO = reference.moe(x_ND, routing.indices_NK, routing.weights_NK.detach(), *weights)
    gradients = []
    for name, kind in bench_moe.contestants(layer.top_k).items():
        if issubclass(kind, bench_moe.GroupedMM):  # not in float64; below
            continue
        input_ND = x_ND.clone().requires_grad_()
        out_NO = kind(layer)(input_ND)
        np.testing.assert_allclose(out_NO.detach(), expected_NO, rtol=1e-9, atol=1e-11, err_msg=name)
        gradients += torch.autograd.grad(out_NO.square().sum(), input_ND)
    for gradient_ND in gradients[1:]:
        torch.testing.assert_close(gradient_ND, gradients[0])


@pytest.mark.parametrize("kind", [bench_moe.GroupedMM, bench_moe.GroupedMMSelect, bench_moe.TorchTitan])
def test_grouped_products_do_the_same(kind):
    """With one expert that no row chooses."""
    layer = bench_moe.build_layer(bench_moe.Size(40, 8, 16, 8, 5, 2), torch.float32, "cpu")
    with torch.no_grad():
        layer.router.gate.bias[3] = -50
    x_ND = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
    found = []
    for module in (bench_moe.Ours(layer), kind(layer)):
        input_ND = x_ND.clone().requires_grad_()
        out_NO = module(input_ND)
        found.append((out_NO, *torch.autograd.grad(out_NO.square().sum(), input_ND)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_both_attacks_stay_in_the_ball_and_cost_as_much():
    torch.manual_seed(0)
    weight_CP = torch.randn(10, 3 * 8 * 8)
    images_NCHW, labels_N = torch.rand(20, 3, 8, 8), torch.arange(20) % 10

    def predict(x_NCHW):
        return x_NCHW.flatten(1) @ weight_CP.T

    losses = []
    for attack in (bench_attacks.ours, bench_attacks.torchattacks):
        found = attack(predict, images_NCHW, labels_N)
        assert (found - images_NCHW).abs().max() <= bench_attacks.EPS + 1e-6
        assert found.min() >= 0
        assert found.max() <= 1
        losses.append(torch.nn.functional.cross_entropy(predict(found), labels_N).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] > torch.nn.functional.cross_entropy(predict(images_NCHW), labels_N).item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: minutes on a CPU")
@pytest.mark.usefixtures("without_children")
@pytest.mark.parametrize("name", ["gpu", "attacks"])
def test_rows_of_a_gpu_are_kept_one_by_one(name, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu, "workers", lambda machine: [])
    kept, write = [], store.write

    def keep(path, content):
        kept.append(len(content["rows"]))
        write(path, content)

    monkeypatch.setattr(store, "write", keep)
    assert bench.main([name, "--quick", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert kept[:-1] == list(range(1, len(content["rows"]) + 1))
    for row in content["rows"]:
        assert row["limit_milliseconds"] > 0
        assert row["faster_than_fastest_peer"] > 0
        assert row["rates"]["bandwidth"] > 0
        assert row["rates"]["gemm_bf16"] > 0


def test_several_processes_share_a_device():
    found = bench_gpu.workers(Machine(), counts=[2], seconds=0.05)
    assert found[0]["workers"] == 2
    assert found[0]["images_per_second"] > 0


def test_all_routers_by_absolute_deviation_decide_the_same():
    torch.manual_seed(0)
    router = AdaptiveClusteringRouter(6, 4, 2).double()
    tokens_ND, previous = sample(60, 6)[0], route(sample(60, 4)[0])
    assert torch.bincount(previous.probs_NE.argmax(1), minlength=4).min() >= 2
    expected = router(tokens_ND, previous)
    for name in ("authors", "authors, sums"):
        peer = bench_moe.AuthorsRouter(router, bench_moe.DEVIATIONS[name])
        for one, other in zip(peer(tokens_ND, previous), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_pairwise_deviation_pair_by_pair():
    tokens_ND, cluster_N = sample(9, 2)
    found_ED = bench_moe.pairwise(tokens_ND, cluster_N, 3)
    for k in range(3):
        own = [tokens_ND[n] for n in range(9) if cluster_N[n] == k]
        for q in range(2):
            pairs = [abs(a[q].item() - b[q].item()) for a in own for b in own]
            assert found_ED[k, q].item() == pytest.approx(math.fsum(pairs) / len(pairs))


# ----------------------------------------------------------------------------------- measurements


def test_the_limit_adds_up():
    rates = Rates(gemm=100.0, gemm_mm=50.0, gemm_bf16=400.0, bandwidth=10.0, exp=4.0)
    assert Work(gemm=200, bytes=30, exp=2, gemm_bf16=800).seconds(rates) == 2 + 3 + 0.5 + 2


def test_ratios_are_taken_within_rounds():
    """The machine slows down eightfold: ratios of medians would be as good, those of mixed rounds not."""
    found = measure.ratio([2.0, 4.0, 16.0, 6.0], [1.0, 2.0, 8.0, 2.0])
    assert found["median"] == 2
    assert found["low"] <= 2 <= found["high"]
    assert measure.ratio([3.0], [2.0]) == {"median": 1.5, "low": 1.5, "high": 1.5}


def test_contestants_take_turns_and_each_begins():
    seen = []
    contestants = [
        Contestant(name, lambda device, name=name: lambda: seen.append(name)) for name in ("a", "b", "c")
    ]
    seconds = measure.compare(Machine(turn=0.0), contestants, rounds=3)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(seen) == "aabbcc" + "abc" + "bca" + "cab"


def test_memory_of_a_step_that_holds_a_known_amount():
    """80 MB in one array that is freed before the step ends, so only the peak shows it."""

    def step():
        np.ones(10_000_000)

    found = measure.memory_of_a_step(step)
    if found is None:
        pytest.skip("needs Linux's /proc/self/clear_refs")
    assert found == pytest.approx(80, rel=0.1)


def test_memory_is_measured_in_a_fresh_process():
    ballast_N = torch.ones(30_000_000)  # 120 MB that a child does not have
    found = bench._memory_in_fresh_processes("snnl", 1, "ours, streaming", Machine(), quick=True)
    assert found is None or 0 < found < 60
    assert ballast_N.sum() > 0


def test_an_allocator_that_was_tuned_is_named(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1000000")
    described = Machine(threads=2).describe()
    assert "MALLOC_TOP_PAD_=1000000" in described["allocator"]
    assert described["clock"] == "wall time"
    assert Machine().describe()["clock"] == "processor time of the thread"


# ------------------------------------------------------------------------------------------ files


@pytest.fixture
def without_children(monkeypatch):
    monkeypatch.setattr(bench, "_memory_in_fresh_processes", lambda *_: 3.5)


@pytest.mark.usefixtures("without_children")
def test_the_file_of_the_losses(tmp_path, capsys):
    assert bench.main(["snnl", "--quick", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "snnl.json").read_text())
    assert content["quick"]
    assert [row["N"] for row in content["rows"]] == [64, 600]
    for row in content["rows"]:
        for key in ("dtype", "threads", "allocator", "torch", "processor", "device", "clock", "rates"):
            assert row[key], key
        ours = row["contestants"]["ours"]
        assert ours["times_ours"]["median"] == 1
        assert ours["share_of_limit"] == pytest.approx(
            row["limit_milliseconds"] / ours["milliseconds"], rel=1e-4
        )
        peers = [c["times_ours"]["median"] for c in row["contestants"].values() if c["peer"]]
        assert row["faster_than_fastest_peer"] == min(peers)
        assert row["memory_saving"] == 1
    assert "N=600 D=16: " in capsys.readouterr().out


@pytest.mark.usefixtures("without_children")
@pytest.mark.parametrize("name", ["moe", "router"])
def test_files_of_layers(name, tmp_path):
    assert bench.main([name, "--quick", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / f"{name}.json").read_text())
    for row in content["rows"]:
        assert row["contestants"]["ours"]["times_ours"]["median"] == 1
        assert row["limit_milliseconds"] > 0


@pytest.mark.usefixtures("without_children")
def test_what_does_not_fit_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr(measure, "available_memory", lambda: 100.0)
    monkeypatch.setattr(bench, "available_memory", lambda: 100.0)
    small = Contestant("small", lambda device: lambda: None, peer=False)
    large = Contestant("large", lambda device: lambda: None, bytes=51.0)
    row = Row("a row", {"N": 1}, Work(gemm=1.0), (small, large), rounds=1)
    found = bench._measured("snnl", row, 0, Machine(turn=0.0), quick=True)
    assert found["left_out"] == ["large"]
    assert found["faster_than_fastest_peer"] is None


def test_a_part_never_replaces_a_result_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOE_RESULTS_DIR", str(tmp_path))
    for part in (["--rows", "0"], ["--quick"]):
        assert bench.main(["snnl", *part]) == 1
        assert "--out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["snnl", "moe", "router", "attacks", "train", "scaling"])
def test_result_files_hold_every_row(name):
    """Of a GPU's (gpu.json) not all: the last loan was too short, and some rows are newer than it."""
    content = store.read(ROOT / "results" / "bench" / f"{name}.json")
    assert not content["quick"]
    declared = bench.benches()[name].rows(False)
    assert [row["row"] for row in content["rows"]] == [row.name for row in declared]
    for row, planned in zip(content["rows"], declared, strict=True):
        timed = {*row["contestants"], *row["left_out"]}
        assert timed >= {one.name for one in planned.contestants} or content["absent"], row["row"]


def test_files_name_the_versions_of_peers_and_those_that_are_absent():
    found = measure.origin(["numpy", "no-such-package"])
    assert found["absent"] == ["no-such-package"]
    assert found["provenance"]["versions"]["numpy"] == np.__version__
    assert "no-such-package" not in store.provenance()["versions"]


def test_unusable_arguments(capsys):
    with pytest.raises(SystemExit):
        bench.main(["tango"])
    assert "snnl" in capsys.readouterr().err
    assert bench.main(["snnl", "--threads", "0"]) == 1
    assert "--threads" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- profiles


def test_operations_are_told_apart_by_kind():
    kinds = {
        "aten::mm": "products",
        "aten::addmm_": "products",
        "aten::add_": "element by element",
        "mkldnn::_linear_pointwise": "products",
        "aten::convolution_backward": "convolutions",
        "aten::index_select": "rows moved",
        "aten::_fused_adam_": "optimizer",
        "aten::exp": "element by element",
        "aten::expand": bench_profile.REST,
        "_SNNLBackward": bench_profile.REST,
    }
    assert {name: bench_profile.kind_of(name) for name in kinds} == kinds


def test_shares_find_the_products_of_a_step_of_products():
    x_ND = torch.ones(256, 256)
    found = bench_profile.shares(lambda: [x_ND @ x_ND for _ in range(4)], steps=3)
    assert sum(found.values()) == pytest.approx(1)
    assert max(found, key=found.get) == "products"


def test_only_rows_below_a_goal_are_profiled_beside_the_fastest_peer_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_RESULTS_DIR", str(tmp_path))
    sizes = [bench_moe.Size(N, 16, 16, 16, 4, 2) for N in (40, 48, 56)]
    rows = [bench_moe.row(size, goal_time=1.0, goal_memory=2.0) for size in sizes]
    times = {"ours": 1.0, "loop": 3.0, "Hugging Face": 0.75, "einsum": 4.0}
    contestants = {who: {"peer": who != "ours", "times_ours": {"median": t}} for who, t in times.items()}
    known = {"contestants": contestants, "goals": {"faster": 1.0, "saving": 2.0, "share": None}}
    content = [
        known | {"row": row.name, "faster_than_fastest_peer": faster, "memory_saving": saving}
        for row, (faster, saving) in zip(rows, [(0.75, 3.0), (1.5, 2.5), (1.5, 1.9)], strict=True)
    ]
    store.write(tmp_path / "bench" / "moe.json", {"rows": content})
    monkeypatch.setattr(bench_moe, "rows", lambda: rows)
    found = bench_profile.missed(Machine(turn=0.0))
    assert [(one["bench"], one["row"], one["contestant"]) for one in found] == [
        ("moe", row.name, who) for row in (rows[0], rows[2]) for who in ("ours", "Hugging Face")
    ]
    assert all(0 < one["milliseconds"] < 1000 for one in found)


# -------------------------------------------------------------------------------------- inspector


def test_time_added_is_that_of_rounds_after_the_first(monkeypatch):
    """Plain takes 2 s, the tool 3; a first round of 100 s each is left out."""
    clock = [0.0]
    monkeypatch.setattr(bench_inspect.time, "process_time", lambda: clock[0])
    rounds = {"plain": iter([100.0, *[2.0] * 5]), "tool": iter([100.0, *[3.0] * 5])}

    def run(name):
        clock[0] += next(rounds[name])

    found = bench_inspect.added_percent(lambda: run("plain"), lambda: run("tool"), rounds=5)
    assert found == pytest.approx({"median": 50, "low": 50, "high": 50})


def test_memory_gained_is_beyond_that_of_bare_runs():
    assert bench_inspect.more([5.0, 3.0, 4.0], [1.0, 0.5, 9.0]) == {"median": 3, "low": 2, "high": 4}
