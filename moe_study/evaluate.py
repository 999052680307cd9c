"""From a trained classifier to the numbers in its result file; the interface that the engine calls.

Shapes: N samples, D code width, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lib import metrics
from moe_lib.metrics.interventions import expert_ablations
from moe_lib.models.classifier import ClassifierOutput
from moe_lib.moe import Experts
from moe_lib.rng import generator, initialise
from moe_lib.snnl import soft_nearest_neighbor_loss
from moe_study import store
from moe_study.data import Dataset, Split, pixels
from moe_study.replay import Replayed
from moe_study.tasks import ClassifierTask
from moe_study.train import Task, TrainConfig, adam, set_learning_rate

EMBEDDING_SAMPLES = 2000  # of the test set, for embedding measures, CKA and SNNL
KNN_SAMPLES = 5000  # of the training set
TSNE_SAMPLES = 2000


def similarity(
    experts: Experts, expert_logits_NEC: Tensor, usage_E: Tensor | None = None
) -> dict[str, float]:
    """Similarities of experts: two of their weights, two of what they compute, plain and weighted by use.

    Args:
        usage_E: the experts' mean weight in the mixture; None leaves the weighted forms out.
    """
    found = {
        "weights": metrics.pairwise_similarity(experts.flat_weights(), absolute=True),
        "weights_aligned": metrics.aligned_similarity(experts),
        "outputs": metrics.output_similarity(expert_logits_NEC),
        "cka": metrics.expert_cka(expert_logits_NEC, EMBEDDING_SAMPLES),
    }
    if usage_E is not None:
        found["outputs_weighted"] = metrics.output_similarity(expert_logits_NEC, usage_E=usage_E)
        found["cka_weighted"] = metrics.expert_cka(expert_logits_NEC, EMBEDDING_SAMPLES, usage_E=usage_E)
    return found


def routing_measures(task: ClassifierTask, probs_NE: Tensor, labels_N: Tensor) -> dict[str, Any]:
    """Entropies, their null, load and the class x expert matrix on one split."""
    num_classes = task.dataset.num_classes
    draw = generator(task.seed, "label permutation")
    return {
        "entropy": metrics.routing_entropy(probs_NE, labels_N, num_classes),
        "information_class_null": metrics.information_class_null(probs_NE, labels_N, num_classes, draw),
        "load": metrics.load(probs_NE, labels_N),
        "class_expert": metrics.class_expert_matrix(probs_NE, labels_N, num_classes).tolist(),
    }


def code_measures(dataset: Dataset, codes: Callable[[Split], Tensor]) -> dict[str, float]:
    """kNN accuracy, silhouette, trustworthiness, and SNNL at T = 1, of some test codes.

    Args:
        codes: of images [N, D].
    """
    test, train = dataset.test.take(slice(EMBEDDING_SAMPLES)), dataset.train.take(slice(KNN_SAMPLES))
    codes_ND = codes(test)
    quality = metrics.embedding_quality(
        codes(train),
        train.labels_N,
        codes_ND,
        test.labels_N,
        pixels(test.images_NCHW, torch.float64).flatten(1),
    )
    snnl = soft_nearest_neighbor_loss(codes_ND.double(), test.labels_N, temperature=1.0)
    return quality._asdict() | {"snnl": snnl.item()}


def tsne_points(task: ClassifierTask) -> tuple[list[list[int]], list[int]]:
    """t-SNE of some test codes, as integers 0..999, and the expert with most weight for each; for the eye."""
    from sklearn.manifold import TSNE

    output, codes_ND = task.predict(task.dataset.test.take(slice(TSNE_SAMPLES)))
    flat_N2 = TSNE(init="pca", random_state=0, perplexity=30).fit_transform(codes_ND.cpu().double().numpy())
    low, high = flat_N2.min(0), flat_N2.max(0)
    places_N2 = ((flat_N2 - low) / (high - low).max() * 999).round().astype(int)
    return places_N2.tolist(), output.routing.dense_weights().argmax(1).tolist()


def endpoint_measures(task: ClassifierTask, output: ClassifierOutput) -> dict[str, Any]:
    """What is measured at each endpoint, from the model's output on the test set."""
    test = task.dataset.test
    labels_N, correct_N = test.labels_N, output.log_probs_NC.argmax(1) == test.labels_N
    usage_E = output.routing.dense_weights().double().mean(0)
    return {
        "task": metrics.task_score(output.log_probs_NC, labels_N),
        "correct": store.pack_bits(correct_N),
        "routing": routing_measures(task, output.routing.probs_NE, labels_N),
        "similarity": similarity(task.model.moe.experts, output.expert_logits_NEC, usage_E),
        "domains": None if test.domains_N is None else domain_measures(output, correct_N, test.domains_N),
    }


def domain_measures(output: ClassifierOutput, correct_N: Tensor, domains_N: Tensor) -> dict[str, Any]:
    """Accuracy of each domain, each domain's mean gate, and what the gate knows of the domain (nats)."""
    count, probs_NE = int(domains_N.max()) + 1, output.routing.probs_NE
    accuracy = [correct_N[domains_N == domain].double().mean().item() for domain in range(count)]
    return {
        "accuracy": accuracy,
        "information": metrics.routing_entropy(probs_NE, domains_N, count).information_class,
        "domain_expert": metrics.class_expert_matrix(probs_NE, domains_N, count).tolist(),
    }


def independent_expert_null(task: ClassifierTask, config: TrainConfig) -> dict[str, float]:
    """Similarity of E experts, each trained alone on the codes of the (frozen) extractor of `task`.

    Same budget, data and batch order as the run; the experts differ in their initial weights alone. What
    a mixture's experts score beyond this is the mixture's doing.
    """
    train, test = task.dataset.train, task.dataset.test
    codes_ND, test_codes_ND = task.predict(train)[1], task.predict(test)[1]
    shape = task.model.moe.experts.w1_EDH.shape
    experts = Experts(shape[1], shape[0], shape[2], task.dataset.num_classes)
    initialise(experts, task.seed + 1)
    experts.to(codes_ND)
    optimizer = adam(experts.parameters(), config)

    def update(codes_ND: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
        logits_NEC = experts(codes_ND)
        labels_NE = labels_N[:, None].expand(-1, shape[0])
        # Sums over experts, means over samples: no expert feels another.
        loss = F.cross_entropy(logits_NEC.flatten(0, 1), labels_NE.flatten()) * shape[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {}

    replayed = Replayed(update)
    for epoch in range(config.epochs):
        order_N = torch.randperm(len(train), generator=generator(task.seed, "order", epoch))
        for step, index in enumerate(order_N.to(train.labels_N.device).split(config.batch_size)):
            set_learning_rate(optimizer, config, (epoch + step / task.num_batches) / config.epochs)
            replayed(codes_ND[index], train.labels_N[index])
    with torch.no_grad():
        return similarity(experts, experts(test_codes_ND))


class Experiment(Protocol):
    """A task and everything that the engine measures on it."""

    @property
    def task(self) -> Task: ...

    def validation(self) -> dict[str, float]:
        """After every epoch, on validation data; "cross_entropy" and "accuracy" among them."""

    def initial(self) -> dict[str, Any]:
        """Before training, on the test set."""

    def final(self) -> dict[str, Any]:
        """Every measure on the test set, at the last epoch's weights."""

    def endpoint(self) -> dict[str, Any]:
        """Fewer measures on the test set, at the weights of another endpoint."""


class ClassifierExperiment:
    """What the engine asks of a classifier's run.

    Args:
        null: how to train the null of expert similarity; None: do without it.
        tsne: keep t-SNE coordinates of some test codes, for the eye.
    """

    def __init__(self, task: ClassifierTask, null: TrainConfig | None = None, tsne: bool = False) -> None:
        self.task, self.null = task, null
        self.tsne: dict[str, Any] | None = {} if tsne else None

    def validation(self) -> dict[str, float]:
        """Score, routing and expert similarity on the validation set."""
        task, split = self.task, self.task.dataset.validation
        output, _ = task.predict(split)
        score = metrics.task_score(output.log_probs_NC, split.labels_N)
        entropy = metrics.routing_entropy(output.routing.probs_NE, split.labels_N, task.dataset.num_classes)
        return {
            "cross_entropy": score.cross_entropy,
            "accuracy": score.accuracy,
            "marginal": entropy.marginal,
            "per_sample": entropy.per_sample,
            "class_conditional": entropy.class_conditional,
            "weight_similarity": metrics.pairwise_similarity(task.model.moe.experts.flat_weights(), True),
            "output_similarity": metrics.output_similarity(output.expert_logits_NEC),
        }

    def initial(self) -> dict[str, Any]:
        test = self.task.dataset.test
        output, _ = self.task.predict(test)
        routing = routing_measures(self.task, output.routing.probs_NE, test.labels_N)
        routing.pop("class_expert")
        if self.tsne is not None:
            self.tsne["before"], _ = tsne_points(self.task)
        return {
            "similarity": similarity(self.task.model.moe.experts, output.expert_logits_NEC),
            "routing": routing,
        }

    def endpoint(self) -> dict[str, Any]:
        measures = endpoint_measures(self.task, self.task.predict(self.task.dataset.test)[0])
        measures["routing"].pop("class_expert")
        measures.pop("correct")
        return measures

    def final(self) -> dict[str, Any]:
        task, test = self.task, self.task.dataset.test
        output, _ = task.predict(test)
        ablations = expert_ablations(
            output.routing.dense_weights(),
            output.expert_logits_NEC,
            test.labels_N,
            task.model.mixture,
            generator(task.seed, "permuted routing"),
        )
        measures = endpoint_measures(task, output)
        measures["embedding"] = code_measures(task.dataset, lambda split: task.predict(split)[1])
        measures["ablation"] = ablations
        if self.null is not None:
            measures["null"] = {"similarity": independent_expert_null(task, self.null)}
        if self.tsne is not None:
            self.tsne["after"], self.tsne["experts"] = tsne_points(task)
            self.tsne["labels"] = test.labels_N[:TSNE_SAMPLES].tolist()
            measures["tsne"] = self.tsne
        measures["expert_parameters"] = task.model.moe.experts.flat_weights().shape[1]
        return measures
