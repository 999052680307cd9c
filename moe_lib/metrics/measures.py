"""Measures of routing, expert similarity, embedding and task.

Everything is in nats unless said otherwise, computed in float64, and has a loop-written oracle in tests/.

Shapes: N samples, D width, E experts, C classes, P parameters or features of one expert, H hidden units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe_lib.moe.experts import Experts

# ---------------------------------------------------------------------------------------- routing


class RoutingEntropy(NamedTuple):
    marginal: float  # H(E), of the mean gate
    per_sample: float  # H(E|x), mean entropy of a sample's gate
    class_conditional: float  # H(E|class), of each class's mean gate, weighted by class frequency
    expert_class: float  # H(class|E), of the class mix each expert receives
    information_input: float  # I(x;E) = H(E) - H(E|x)
    information_class: float  # I(class;E) = H(E) - H(E|class)
    num_experts: int
    num_classes: int

    def normalized(self) -> RoutingEntropy:
        """Each value divided by its maximum: log E, log C, or min(log E, log C) for I(class;E).

        A maximum of 0 (one expert, one class) gives 0.
        """
        experts, classes = math.log(self.num_experts), math.log(self.num_classes)

        def share(value: float, ceiling: float) -> float:
            return value / ceiling if ceiling else 0.0

        return self._replace(
            marginal=share(self.marginal, experts),
            per_sample=share(self.per_sample, experts),
            class_conditional=share(self.class_conditional, experts),
            expert_class=share(self.expert_class, classes),
            information_input=share(self.information_input, experts),
            information_class=share(self.information_class, min(experts, classes)),
        )


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(-1)


def _class_gates(probs_NE: Tensor, labels_N: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sum of the gates of each class [C, E], and class counts [C]."""
    one_hot_NC = torch.nn.functional.one_hot(labels_N, num_classes).to(probs_NE.dtype)
    return one_hot_NC.T @ probs_NE, one_hot_NC.sum(0)


def routing_entropy(probs_NE: Tensor, labels_N: Tensor, num_classes: int) -> RoutingEntropy:
    """Entropies of the gate and its information on input and class.

    Args:
        probs_NE: [N, E], rows sum to 1.
        labels_N: [N], in 0 .. num_classes - 1; a class may be absent.

    Raises:
        ValueError: shapes or values do not fit, or there is no sample.
    """
    if probs_NE.ndim != 2 or labels_N.shape != probs_NE.shape[:1] or not len(labels_N):
        raise ValueError(
            f"expected probs [N, E] and labels [N] with N >= 1, got {tuple(probs_NE.shape)} "
            f"and {tuple(labels_N.shape)}"
        )
    if not 0 <= int(labels_N.min()) <= int(labels_N.max()) < num_classes:
        raise ValueError(
            f"labels must lie in 0..{num_classes - 1}, got {int(labels_N.min())}..{int(labels_N.max())}"
        )
    probs_NE = probs_NE.double()
    row_sums = probs_NE.sum(1)
    if not bool((probs_NE >= 0).all()) or not torch.allclose(row_sums, torch.ones_like(row_sums), atol=1e-2):
        raise ValueError("probs must be finite, non-negative and sum to 1 in every row")
    probs_NE = probs_NE / row_sums[:, None]
    gates_CE, counts_C = _class_gates(probs_NE, labels_N, num_classes)
    marginal = _entropy(probs_NE.mean(0)).item()
    per_sample = _entropy(probs_NE).mean().item()
    gates_given_class_CE = gates_CE / counts_C.clamp(min=1)[:, None]
    class_conditional = ((counts_C / counts_C.sum()) @ _entropy(gates_given_class_CE)).item()
    load_E = gates_CE.sum(0)
    mix_EC = gates_CE.T / load_E.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    return RoutingEntropy(
        marginal=marginal,
        per_sample=per_sample,
        class_conditional=class_conditional,
        expert_class=((load_E / load_E.sum()) @ _entropy(mix_EC)).item(),
        information_input=marginal - per_sample,
        information_class=marginal - class_conditional,
        num_experts=probs_NE.shape[1],
        num_classes=num_classes,
    )


def class_expert_matrix(probs_NE: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
    """[C, E]: the mean gate of each class; NaN for a class without samples."""
    gates_CE, counts_C = _class_gates(probs_NE.double(), labels_N, num_classes)
    return gates_CE / counts_C[:, None]


def information_class_null(
    probs_NE: Tensor, labels_N: Tensor, num_classes: int, generator: torch.Generator, draws: int = 20
) -> float:
    """Mean of I(class;E) with labels permuted: what a gate blind to the class scores by chance.

    The plug-in bias is about (E - 1)(C - 1) / 2N nats for hard assignments, less for soft ones.
    """
    null = 0.0
    for _ in range(draws):
        order_N = torch.randperm(len(labels_N), generator=generator).to(labels_N.device)
        null += routing_entropy(probs_NE, labels_N[order_N], num_classes).information_class / draws
    return null


class Load(NamedTuple):
    share: list[float]  # of samples, by top-1 expert
    dead_experts: int  # top-1 of no sample
    effective_experts: float  # exp(H(E)), of the mean gate
    adjusted_mutual_information: float  # of class and top-1 expert; 0 by chance, 1 if they agree


def load(probs_NE: Tensor, labels_N: Tensor) -> Load:
    from sklearn.metrics import adjusted_mutual_info_score

    top1_N = probs_NE.argmax(1)
    counts_E = torch.bincount(top1_N, minlength=probs_NE.shape[1])
    return Load(
        share=(counts_E / len(top1_N)).tolist(),
        dead_experts=int((counts_E == 0).sum()),
        effective_experts=_entropy(probs_NE.double().mean(0)).exp().item(),
        adjusted_mutual_information=float(
            adjusted_mutual_info_score(labels_N.cpu().numpy(), top1_N.cpu().numpy())
        ),
    )


# ------------------------------------------------------------------------------------- similarity


def pairwise_similarity(vectors_EP: Tensor, absolute: bool = False) -> float:
    """Mean cosine over all E (E - 1) / 2 pairs of rows; with `absolute`, mean |cosine|.

    NaN for fewer than two rows. A row of zeros has cosine 0 with everything.
    """
    if vectors_EP.ndim != 2:
        raise ValueError(f"expected vectors [E, P], got {tuple(vectors_EP.shape)}")
    num_vectors = len(vectors_EP)
    if num_vectors < 2:
        return math.nan
    unit_EP = torch.nn.functional.normalize(vectors_EP.double(), dim=1)
    cosine_EE = unit_EP @ unit_EP.T
    above = cosine_EE[tuple(torch.triu_indices(num_vectors, num_vectors, 1))]
    return (above.abs() if absolute else above).mean().item()


def similarity_floor(num_parameters: int) -> float:
    """Expected |cosine| of two independent isotropic vectors in P dimensions: about sqrt(2 / (pi P))."""
    return math.sqrt(2 / (math.pi * num_parameters))


def aligned_similarity(experts: Experts) -> float:
    """Mean cosine of the experts' weights after matching hidden units, pair by pair.

    Hidden units permute freely, so equal functions may have orthogonal weights. For each pair the
    permutation with the largest inner product of the flattened weights is found (Hungarian method).
    """
    with torch.no_grad():
        units_EHP = torch.cat(
            [experts.w1_EDH.transpose(1, 2), experts.b1_EH[..., None], experts.w2_EHO], 2
        ).double()
        bias_EO = experts.b2_EO.double()
        norm_E = (units_EHP.square().sum((1, 2)) + bias_EO.square().sum(1)).sqrt()
        cosines = []
        for a in range(experts.num_experts):
            for b in range(a + 1, experts.num_experts):
                inner_HH = (units_EHP[a] @ units_EHP[b].T).cpu().numpy()
                best = inner_HH[linear_sum_assignment(inner_HH, maximize=True)].sum()
                best += float(bias_EO[a] @ bias_EO[b])
                cosines.append(best / float(norm_E[a] * norm_E[b]))
    return float(np.mean(cosines)) if cosines else math.nan


def output_similarity(expert_logits_NEC: Tensor, usage_E: Tensor | None = None) -> float:
    """Mean cosine of the experts' logits on the same inputs, each input's logits centred over classes
    (softmax ignores a constant) and each expert's mean over inputs removed.

    Args:
        usage_E: how much each expert is used, such as its mean gate. A pair counts by the product of its two
            experts' usage: an expert that is never used is not a different one. None: all pairs alike.
    """
    logits = expert_logits_NEC.double()
    logits = logits - logits.mean(2, keepdim=True)
    logits = logits - logits.mean(0, keepdim=True)
    unit_EP = torch.nn.functional.normalize(logits.transpose(0, 1).flatten(1), dim=1)
    return _mean_of_pairs((unit_EP @ unit_EP.T).tolist(), usage_E)


def _mean_of_pairs(values_EE: Sequence[Sequence[float]], usage_E: Tensor | None) -> float:
    """Mean of a symmetric matrix over its pairs e < f, weighted by usage_e usage_f; NaN without a pair."""
    usage = [1.0] * len(values_EE) if usage_E is None else usage_E.double().tolist()
    pairs = list(itertools.combinations(range(len(values_EE)), 2))
    weights = [usage[a] * usage[b] for a, b in pairs]
    if not sum(weights) > 0:
        return math.nan
    return sum(w * values_EE[a][b] for w, (a, b) in zip(weights, pairs, strict=True)) / sum(weights)


def linear_cka(x_NA: Tensor, y_NB: Tensor) -> float:
    """Unbiased linear centred kernel alignment of two representations of the same N samples.

    Source: Nguyen, Raghu, Kornblith, "Do Wide and Deep Networks Learn the Same Things?", ICLR 2021, with
    the unbiased HSIC of Song et al., JMLR 2012. 1 for equal representations up to rotation and
    scale, 0 in expectation for independent ones; slightly negative values occur. NaN if one is constant.
    """
    if x_NA.ndim != 2 or y_NB.ndim != 2 or len(x_NA) != len(y_NB):
        raise ValueError(f"expected [N, A] and [N, B], got {tuple(x_NA.shape)} and {tuple(y_NB.shape)}")
    n = len(x_NA)
    if n < 4:
        raise ValueError(f"the unbiased estimate needs at least 4 samples, got {n}")

    x_NA, y_NB = (z.double() - z.double().mean(0) for z in (x_NA, y_NB))

    def hsic(x_NA: Tensor, y_NB: Tensor) -> float:
        """Of the Gram matrices without their diagonals. Centred features: every row of x x^T sums to 0."""
        few = n * n < x_NA.shape[1] * y_NB.shape[1]  # |x^T y|^2 = tr(x x^T y y^T), by the cheaper product
        whole = ((x_NA @ x_NA.T) * (y_NB @ y_NB.T)).sum() if few else (x_NA.T @ y_NB).square().sum()
        x_N, y_N = x_NA.square().sum(1), y_NB.square().sum(1)  # the diagonals; minus these are the row sums
        cross = whole - x_N @ y_N + x_N.sum() * y_N.sum() / ((n - 1) * (n - 2))
        return ((cross - 2 * (x_N @ y_N) / (n - 2)) / (n * (n - 3))).item()

    scale = hsic(x_NA, x_NA) * hsic(y_NB, y_NB)
    return hsic(x_NA, y_NB) / math.sqrt(scale) if scale > 0 else math.nan


def expert_cka(expert_logits_NEC: Tensor, max_samples: int = 2000, usage_E: Tensor | None = None) -> float:
    """Mean unbiased linear CKA over all pairs of experts' logits, on at most `max_samples` samples.

    Args:
        usage_E: as in `output_similarity`.
    """
    logits = expert_logits_NEC[:max_samples]
    experts = range(logits.shape[1])
    values = [[linear_cka(logits[:, a], logits[:, b]) if a < b else 0.0 for b in experts] for a in experts]
    return _mean_of_pairs(values, usage_E)


# -------------------------------------------------------------------------------------- embedding


class Embedding(NamedTuple):
    knn_accuracy: float  # 10 nearest training codes, Euclidean, majority vote
    silhouette: float  # of the classes, Euclidean
    trustworthiness: float  # of the codes' 10-neighbourhoods against those of the pixels


def embedding_quality(
    train_codes_MD: Tensor,
    train_labels_M: Tensor,
    codes_ND: Tensor,
    labels_N: Tensor,
    pixels_NP: Tensor,
) -> Embedding:
    from sklearn.manifold import trustworthiness
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import KNeighborsClassifier

    def numpy(x: Tensor) -> np.ndarray:
        return x.cpu().double().numpy()

    codes = numpy(codes_ND)
    knn = KNeighborsClassifier(10, algorithm="brute").fit(numpy(train_codes_MD), train_labels_M.cpu())
    return Embedding(
        float(knn.score(codes, labels_N.cpu().numpy())),
        float(silhouette_score(codes, labels_N.cpu().numpy())),
        float(trustworthiness(numpy(pixels_NP), codes, n_neighbors=10)),
    )


# ------------------------------------------------------------------------------------------- task


class TaskScore(NamedTuple):
    accuracy: float
    cross_entropy: float  # nats
    calibration_error: float  # expected calibration error, 15 equal-width bins of confidence


def task_score(log_probs_NC: Tensor, labels_N: Tensor) -> TaskScore:
    log_probs_NC = log_probs_NC.double()
    confidence_N, predicted_N = log_probs_NC.exp().max(1)
    correct_N = (predicted_N == labels_N).double()
    return TaskScore(
        correct_N.mean().item(),
        -log_probs_NC.gather(1, labels_N[:, None]).mean().item(),
        calibration_error(confidence_N, correct_N),
    )


def calibration_error(confidence_N: Tensor, correct_N: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence| per bin, weighted by the bin's share.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 5. Bins are (a, b].
    """
    bin_N = (confidence_N * bins).ceil().clamp(1, bins).long() - 1
    gap_B = torch.zeros(bins, dtype=torch.float64, device=bin_N.device)
    gap_B.index_add_(0, bin_N, correct_N.double() - confidence_N.double())
    return (gap_B.abs().sum() / len(bin_N)).item()
