"""From a classifier to its numbers: each is the measure it is named after, on the split it should be.

Shapes: N samples, D code width, E experts, C classes.
"""

import copy
import math

import numpy as np
import pytest
import reference
import torch

from moe_lib.models.classifier import ClassifierConfig
from moe_lib.moe import Experts
from moe_lib.rng import generator, initialise
from moe_study import evaluate, store
from moe_study.data import Dataset, Split, pixels
from moe_study.evaluate import ClassifierExperiment
from moe_study.tasks import ClassifierTask, Objective
from moe_study.train import TrainConfig

CONFIG = ClassifierConfig(
    "mlp", extractor_hidden=10, code_dim=5, num_experts=3, expert_hidden=6, gate_hidden=6
)


def make_task(num_experts=3, mixture="logits", seed=7, num_test=40):
    """A fresh model on images whose class shows in their brightness; the splits differ in size."""
    draw = torch.Generator().manual_seed(0)

    def split(n):
        labels_N = torch.randperm(n, generator=draw) % 3
        noise_NCHW = torch.randint(80, (n, 1, 4, 4), generator=draw)
        return Split((noise_NCHW + 80 * labels_N[:, None, None, None]).byte(), labels_N)

    return ClassifierTask(
        Dataset("tiny", split(60), split(30), split(num_test), 3),
        ClassifierConfig(**{**vars(CONFIG), "num_experts": num_experts, "mixture": mixture}),
        Objective(),
        seed=seed, epochs=3, batch_size=16, dtype=torch.float64,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_changes(monkeypatch):
    """No measure may touch a weight or leave a gradient."""
    tasks = []
    original = ClassifierTask.__init__

    def remember(self, *args, **kwargs):
        original(self, *args, **kwargs)
        tasks.append((self, copy.deepcopy(self.state_dict())))

    monkeypatch.setattr(ClassifierTask, "__init__", remember)
    yield
    for task, before in tasks:
        assert all(torch.equal(before[name], value) for name, value in task.state_dict().items())
        assert all(p.grad is None for p in task.parameters())


def outputs(task, split):
    """What the model says on a split, in one piece: log-probabilities, expert logits, gates, codes."""
    with torch.no_grad():
        output = task.model(pixels(split.images_NCHW, torch.float64))
    return output.log_probs_NC, output.expert_logits_NEC, output.routing.probs_NE, output.activations["code"]


def stacked(experts):
    return experts.w1_EDH, experts.b1_EH, experts.w2_EHO, experts.b2_EO


# ------------------------------------------------------------------------------------- validation


def test_validation_measures_are_taken_on_the_validation_set():
    task = make_task()
    split = task.dataset.validation
    log_probs_NC, logits_NEC, probs_NE, _ = outputs(task, split)
    right_N, cost = reference.accuracy_and_cross_entropy(log_probs_NC.exp().numpy(), split.labels_N.numpy())
    entropies = reference.routing_entropy(probs_NE, split.labels_N, 3)
    measured = ClassifierExperiment(task).validation()
    assert measured["cross_entropy"] == pytest.approx(cost, rel=1e-9)
    assert measured["accuracy"] == pytest.approx(right_N.mean())
    for name, expected in zip(("marginal", "per_sample", "class_conditional"), entropies, strict=False):
        assert measured[name] == pytest.approx(expected, rel=1e-9)
    flat_EP = task.model.moe.experts.flat_weights()
    assert measured["weight_similarity"] == pytest.approx(
        reference.pairwise_similarity(flat_EP, absolute=True)
    )
    assert measured["output_similarity"] == pytest.approx(reference.output_similarity(logits_NEC))


def test_validation_measures_of_the_dense_arm():
    measured = ClassifierExperiment(make_task(num_experts=1)).validation()
    assert measured["marginal"] == measured["per_sample"] == measured["class_conditional"] == 0
    assert math.isnan(measured["weight_similarity"])
    assert math.isnan(measured["output_similarity"])
    assert math.isfinite(measured["cross_entropy"])


# ------------------------------------------------------------------------------------- similarity


def test_the_four_similarities():
    task = make_task()
    experts = task.model.moe.experts
    logits_NEC = outputs(task, task.dataset.test)[1][:7]
    measured = evaluate.similarity(experts, logits_NEC)
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = {
        "weights": reference.pairwise_similarity(experts.flat_weights(), absolute=True),
        "weights_aligned": reference.aligned_similarity(*stacked(experts)),
        "outputs": reference.output_similarity(logits_NEC),
        "cka": np.mean([reference.linear_cka(logits_NEC[:, a], logits_NEC[:, b]) for a, b in pairs]),
    }
    assert measured == pytest.approx(expected, rel=1e-7)


def test_cka_takes_at_most_so_many_samples(monkeypatch):
    task = make_task()
    logits_NEC = outputs(task, task.dataset.test)[1]
    whole = evaluate.similarity(task.model.moe.experts, logits_NEC)["cka"]
    monkeypatch.setattr(evaluate, "EMBEDDING_SAMPLES", 10)
    part = evaluate.similarity(task.model.moe.experts, logits_NEC)["cka"]
    assert part != pytest.approx(whole)
    assert part == pytest.approx(evaluate.similarity(task.model.moe.experts, logits_NEC[:10])["cka"])


# ---------------------------------------------------------------------------------------- routing


def test_routing_measures_of_a_split():
    task = make_task()
    split = task.dataset.test
    probs_NE = outputs(task, split)[2]
    measured = evaluate.routing_measures(task, probs_NE, split.labels_N)
    expected = reference.routing_entropy(probs_NE, split.labels_N, 3)
    np.testing.assert_allclose(measured["entropy"][:6], expected, rtol=1e-9)
    assert measured["load"].share == pytest.approx(reference.load(probs_NE)[0])
    np.testing.assert_allclose(
        measured["class_expert"], reference.class_expert(probs_NE, split.labels_N, 3), rtol=1e-9
    )
    assert isinstance(measured["class_expert"], list)


def test_the_null_of_information_depends_on_the_seed():
    task, split = make_task(), make_task().dataset.test
    probs_NE = outputs(task, split)[2]
    draw = generator(7, "label permutation")
    orders = [torch.randperm(40, generator=draw) for _ in range(20)]
    expected = np.mean([reference.routing_entropy(probs_NE, split.labels_N[order], 3)[5] for order in orders])
    measured = [
        evaluate.routing_measures(make_task(seed=seed), probs_NE, split.labels_N)["information_class_null"]
        for seed in (7, 7, 8)
    ]
    assert measured[0] == pytest.approx(expected, rel=1e-7)
    assert measured[0] == measured[1] != measured[2]


# -------------------------------------------------------------------------------------- embedding


def test_embedding_measures_are_of_test_codes():
    task = make_task()
    train, test = task.dataset.train, task.dataset.test
    codes_ND, train_codes_MD = outputs(task, test)[3], outputs(task, train)[3]
    measured = ClassifierExperiment(task).final()["embedding"]
    assert set(measured) == {"knn_accuracy", "silhouette", "trustworthiness", "snnl"}
    assert measured["snnl"] == pytest.approx(reference.snnl(codes_ND, test.labels_N, 1.0), rel=1e-9)
    expected = reference.knn_accuracy(train_codes_MD, train.labels_N, codes_ND, test.labels_N)
    assert measured["knn_accuracy"] == pytest.approx(expected)
    assert -1 <= measured["silhouette"] <= 1
    assert 0.5 < measured["trustworthiness"] <= 1


def test_embedding_measures_take_at_most_so_many_samples(monkeypatch):
    task = make_task()
    monkeypatch.setattr(evaluate, "EMBEDDING_SAMPLES", 25)
    monkeypatch.setattr(evaluate, "KNN_SAMPLES", 30)
    codes_ND = outputs(task, task.dataset.test)[3][:25]
    labels_N, train_labels_M = task.dataset.test.labels_N[:25], task.dataset.train.labels_N[:30]
    measured = ClassifierExperiment(task).final()["embedding"]
    assert measured["snnl"] == pytest.approx(reference.snnl(codes_ND, labels_N, 1.0), rel=1e-9)
    train_codes_MD = outputs(task, task.dataset.train)[3][:30]
    expected = reference.knn_accuracy(train_codes_MD, train_labels_M, codes_ND, labels_N)
    assert measured["knn_accuracy"] == pytest.approx(expected)


def test_tsne_points_are_integers_on_a_grid_and_repeatable(monkeypatch):
    task = make_task(num_test=90)
    monkeypatch.setattr(evaluate, "TSNE_SAMPLES", 70)
    points, experts = evaluate.tsne_points(task)
    assert np.shape(points) == (70, 2)
    assert all(type(value) is int for point in points for value in point)
    low, high = np.min(points, 0), np.max(points, 0)
    assert low.tolist() == [0, 0]
    assert high.max() == 999
    assert 100 < high.min() < 999  # one scale for both axes
    weights = task.model(pixels(task.dataset.test.images_NCHW[:70], task.dtype)).routing.dense_weights()
    assert experts == [max(range(len(row)), key=row.__getitem__) for row in weights.tolist()]
    assert (points, experts) == evaluate.tsne_points(task)


# ------------------------------------------------------------------------------------------ final


def test_domains_are_measured_apart():
    """Accuracy and mean gate of each domain, and what the gate knows of it, from plain loops."""
    task = make_task()
    test = task.dataset.test
    probs_NE, log_probs_NC = outputs(task, test)[2], outputs(task, test)[0]
    domains_N = torch.arange(40) % 2
    with torch.no_grad():
        output = task.model(pixels(test.images_NCHW, torch.float64))
    right_N = log_probs_NC.argmax(1) == test.labels_N
    found = evaluate.domain_measures(output, right_N, domains_N)
    for domain in (0, 1):
        own = [n for n in range(40) if domains_N[n] == domain]
        assert found["accuracy"][domain] == pytest.approx(np.mean([bool(right_N[n]) for n in own]))
        mean_E = np.mean([probs_NE[n].tolist() for n in own], axis=0)
        np.testing.assert_allclose(found["domain_expert"][domain], mean_E)
    expected = reference.routing_entropy(probs_NE, domains_N, 2)[5]
    assert found["information"] == pytest.approx(expected, rel=1e-7)


def pair_cosines(logits_NEC):
    """Of two experts' logits, each centred over samples and classes as `reference.output_similarity` does."""
    pairs = [(a, b) for a in range(logits_NEC.shape[1]) for b in range(a)]
    return {(a, b): reference.output_similarity(logits_NEC[:, [a, b]]) for a, b in pairs}


@pytest.mark.parametrize("mixture", ["logits", "likelihood"])
def test_final_measures_are_taken_on_the_test_set(mixture):
    task = make_task(mixture=mixture)
    test = task.dataset.test
    log_probs_NC, logits_NEC, probs_NE, _ = outputs(task, test)
    final = ClassifierExperiment(task).final()
    assert {name for name, value in final.items() if value is not None} == {
        "task", "correct", "routing", "similarity", "embedding", "ablation", "expert_parameters",
    }  # fmt: skip
    probs_NC = log_probs_NC.exp().numpy()
    right_N, cost = reference.accuracy_and_cross_entropy(probs_NC, test.labels_N.numpy())
    calibration = reference.calibration_error(probs_NC.max(1), right_N)
    assert final["task"] == pytest.approx((right_N.mean(), cost, calibration), rel=1e-9)
    np.testing.assert_allclose(
        final["routing"]["entropy"][:6], reference.routing_entropy(probs_NE, test.labels_N, 3), rtol=1e-9
    )
    assert store.unpack_bits(final["correct"]).tolist() == right_N.astype(bool).tolist()
    assert final["similarity"]["outputs"] == pytest.approx(reference.output_similarity(logits_NEC))
    usage_E = probs_NE.mean(0).tolist()
    cosines = pair_cosines(logits_NEC)
    weights = {(a, b): usage_E[a] * usage_E[b] for a, b in cosines}
    assert final["similarity"]["outputs_weighted"] == pytest.approx(
        sum(weights[pair] * cosines[pair] for pair in cosines) / sum(weights.values())
    )
    draw = generator(7, "permuted routing")
    orders = [torch.randperm(40, generator=draw).tolist() for _ in range(5)]
    expected = reference.expert_ablations(probs_NE, logits_NEC, test.labels_N, mixture, orders)
    for name, value in final["ablation"]._asdict().items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_final_measures_of_the_dense_arm():
    final = ClassifierExperiment(make_task(num_experts=1)).final()
    assert all(math.isnan(value) for value in final["similarity"].values())
    assert final["routing"]["load"].share == [1.0]
    assert final["routing"]["information_class_null"] == 0
    assert math.isnan(final["ablation"].swapped)
    assert math.isfinite(final["task"].cross_entropy)


def test_measures_are_the_same_when_repeated_and_leave_the_global_random_state_alone():
    task = make_task()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = repr(ClassifierExperiment(task).final())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert repr(ClassifierExperiment(task).final()) == first


# --------------------------------------------------------------------------------------- the null


def test_the_null_is_experts_that_were_each_trained_alone():
    """The same as E loops over one expert: none feels another, and the batches are the run's."""
    task = make_task()
    config = TrainConfig(epochs=2, batch_size=16, learning_rate=1e-2, precision="float64")
    train, test = task.dataset.train, task.dataset.test
    codes_ND, test_codes_ND = outputs(task, train)[3], outputs(task, test)[3]
    start = Experts(5, 3, 6, 3)
    initialise(start, task.seed + 1)
    trained = []
    for e in range(3):
        expert = Experts(5, 1, 6, 3).double()
        with torch.no_grad():
            for parameter, whole in zip(expert.parameters(), start.parameters(), strict=True):
                parameter.copy_(whole[e : e + 1])
        optimizer = torch.optim.Adam(expert.parameters(), lr=1e-2)
        done, steps = 0, 2 * 4  # 60 samples make 4 batches
        for epoch in range(2):
            order_N = torch.randperm(60, generator=generator(task.seed, "order", epoch))
            for index in order_N.split(16):
                decay = (1 + math.cos(math.pi * done / steps)) / 2
                optimizer.param_groups[0]["lr"] = 1e-2 * decay
                loss = torch.nn.functional.cross_entropy(expert(codes_ND[index])[:, 0], train.labels_N[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
        trained.append(expert)
    together = Experts(5, 3, 6, 3).double()
    with torch.no_grad():
        for parameter, *parts in zip(together.parameters(), *(x.parameters() for x in trained), strict=True):
            parameter.copy_(torch.cat(parts))
        expected = evaluate.similarity(together, together(test_codes_ND))
    measured = evaluate.independent_expert_null(task, config)
    assert measured == pytest.approx(expected, rel=1e-6)


def test_the_null_is_repeatable_and_its_training_has_an_effect():
    task = make_task()
    config = TrainConfig(epochs=3, batch_size=16, learning_rate=1e-2, precision="float64")
    torch.manual_seed(0)
    first = evaluate.independent_expert_null(task, config)
    torch.manual_seed(1)
    assert evaluate.independent_expert_null(task, config) == first
    fresh = Experts(5, 3, 6, 3)
    initialise(fresh, task.seed + 1)
    fresh.double()
    with torch.no_grad():
        untrained = evaluate.similarity(fresh, fresh(outputs(task, task.dataset.test)[3]))
    assert all(abs(first[name] - untrained[name]) > 1e-3 for name in first)
