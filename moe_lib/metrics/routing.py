"""Measures of routing: entropies of the gate, its information on the class, and the load of the experts.

Everything is in nats unless said otherwise, computed in float64, and has a loop-written oracle in tests/.

Shapes: N samples, E experts, C classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lib.checks import check_count, check_floating, check_labels


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


def _gates(probs_NE: Tensor) -> Tensor:
    """[N, E] in float64; rows sum to exactly 1."""
    check_floating(probs_NE, "probs", "N, E")
    if not probs_NE.numel():
        raise ValueError(f"probs must hold a sample and an expert, got {list(probs_NE.shape)}")
    probs_NE = probs_NE.double()
    row_sums = probs_NE.sum(1)
    if not bool((probs_NE >= 0).all()) or not torch.allclose(row_sums, torch.ones_like(row_sums), atol=1e-2):
        raise ValueError("probs must be non-negative and sum to 1 in every row")
    return probs_NE / row_sums[:, None]


def _gates_and_labels(probs_NE: Tensor, labels_N: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    probs_NE = _gates(probs_NE)
    check_count(num_classes, "num_classes")
    return probs_NE, check_labels(labels_N, len(probs_NE), num_classes, like=probs_NE)


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(-1)


def _class_gates(probs_NE: Tensor, labels_N: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sum of the gates of each class [C, E], and class counts [C]."""
    one_hot_NC = torch.nn.functional.one_hot(labels_N, num_classes).to(probs_NE.dtype)
    return one_hot_NC.T @ probs_NE, one_hot_NC.sum(0)


def _given_class(gates_CE: Tensor, counts_C: Tensor) -> float:
    """H(E|class)."""
    shares_CE = gates_CE / counts_C.clamp(min=1)[:, None]
    return ((counts_C / counts_C.sum()) @ _entropy(shares_CE)).item()


def routing_entropy(probs_NE: Tensor, labels_N: Tensor, num_classes: int) -> RoutingEntropy:
    """Entropies of the gate and its information on input and class.

    Args:
        probs_NE: [N, E], rows sum to 1.
        labels_N: [N] of any integer type or bool, in 0 .. num_classes - 1; a class may be absent.

    Raises:
        ValueError: shapes or values do not fit, or there is no sample.
    """
    probs_NE, labels_N = _gates_and_labels(probs_NE, labels_N, num_classes)
    gates_CE, counts_C = _class_gates(probs_NE, labels_N, num_classes)
    marginal = _entropy(probs_NE.mean(0)).item()
    per_sample = _entropy(probs_NE).mean().item()
    class_conditional = _given_class(gates_CE, counts_C)
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
    probs_NE, labels_N = _gates_and_labels(probs_NE, labels_N, num_classes)
    gates_CE, counts_C = _class_gates(probs_NE, labels_N, num_classes)
    return gates_CE / counts_C[:, None]


def information_class_null(
    probs_NE: Tensor, labels_N: Tensor, num_classes: int, generator: torch.Generator, draws: int = 20
) -> float:
    """Mean of I(class;E) with labels permuted: what a gate blind to the class scores by chance.

    The plug-in bias is about (E - 1)(C - 1) / 2N nats for hard assignments, less for soft ones.
    """
    check_count(draws, "draws")
    probs_NE, labels_N = _gates_and_labels(probs_NE, labels_N, num_classes)
    given_class = 0.0
    for _ in range(draws):
        order_N = torch.randperm(len(labels_N), generator=generator).to(labels_N.device)
        given_class += _given_class(*_class_gates(probs_NE, labels_N[order_N], num_classes)) / draws
    return _entropy(probs_NE.mean(0)).item() - given_class


class Load(NamedTuple):
    share: list[float]  # of samples, by top-1 expert
    dead_experts: int  # top-1 of no sample
    effective_experts: float  # exp(H(E)), of the mean gate
    adjusted_mutual_information: float  # of class and top-1 expert; 0 by chance, 1 if they agree


def load(probs_NE: Tensor, labels_N: Tensor) -> Load:
    """How the samples are shared among the experts.

    Args:
        probs_NE: [N, E], rows sum to 1.
        labels_N: [N] integers: the classes that the best experts are compared with.

    Raises:
        ValueError: an argument has another shape or type.
    """
    from sklearn.metrics import adjusted_mutual_info_score

    gates_NE = _gates(probs_NE)
    labels_N = check_labels(labels_N, len(probs_NE), like=probs_NE)
    top1_N = probs_NE.argmax(1)
    best_NE = (probs_NE == probs_NE.amax(1, keepdim=True)).double()
    share_E = (best_NE / best_NE.sum(1, keepdim=True)).mean(0)  # experts that tie share the sample
    return Load(
        share=share_E.tolist(),
        dead_experts=int((share_E == 0).sum()),
        effective_experts=_entropy(gates_NE.mean(0)).exp().item(),
        adjusted_mutual_information=float(
            adjusted_mutual_info_score(labels_N.cpu().numpy(), top1_N.cpu().numpy())
        ),
    )
