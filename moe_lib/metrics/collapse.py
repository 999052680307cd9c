"""Collapse taken apart: idle experts, alike experts, and routing that does not matter.

Each is a number in [0, 1], 0 where experts specialise perfectly and 1 where one network would do, beside
its null. They are different faults, and each occurs without the others:

- *routing*: few experts are used. Blind to what the experts compute, and to whether the gate looks at its
  input. Null: the same gate before training.
- *representational*: experts answer alike. Blind to use: an idle expert that never learned answers unlike
  the others. Null: experts trained alone on the same frozen extractor, alike for no reason but the task.
- *functional*: it does not matter which expert treats a sample. The consequence: total collapse of either
  kind brings it about, and so does a gate that ignores its input while experts differ. Null: exactly 1,
  from equal experts or a constant gate. Here collapse is being at the null, not above it.

Shapes: E experts, C classes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from moe_lib.checks import check_count, check_number


class Redundancy(NamedTuple):
    """Functional collapse by four interventions: 1 minus the accuracy lost, as a share of what E perfect
    specialists (equal in load, each at chance on the others' samples) would lose; merged: could lose."""

    permuted: float  # weights exchanged between samples: the headline, does routing matter?
    swapped: float  # two experts exchange their weights: are they interchangeable?
    merged: float  # two experts replaced by their mean: do two do what one could?
    dropped: float  # one expert left out, summed over experts: is each needed?


def routing_collapse(marginal_entropy: float, num_experts: int) -> float:
    """1 - (exp(H(E)) - 1) / (E - 1), with H(E) the entropy of the mean gate in nats.

    0: all experts are used alike; 1: a single one is. With k of E used alike it is (E - k) / (E - 1).
    NaN for one expert.
    """
    if check_count(num_experts, "num_experts") < 2:
        return math.nan
    check_number(marginal_entropy, "marginal_entropy")
    tolerance = 1e-5 * max(1, math.log(num_experts))  # result files keep six digits
    if not -tolerance <= marginal_entropy <= math.log(num_experts) + tolerance:
        raise ValueError(
            f"marginal_entropy: H(E) of {num_experts} experts lies in [0, {math.log(num_experts):.4g}] nats, "
            f"got {marginal_entropy}"
        )
    return _unit(1 - (math.exp(marginal_entropy) - 1) / (num_experts - 1))


def representational_collapse(output_similarity: float) -> float:
    """Mean cosine of the experts' centred answers to the same inputs (`metrics.output_similarity`).

    1: they answer alike; 0: unrelated, or opposed. Answers, not weights: hidden units permute freely, so
    equal experts may have orthogonal weights.
    """
    if not math.isnan(output_similarity) and abs(output_similarity) > 1 + 1e-6:
        raise ValueError(f"output_similarity is a cosine and lies in [-1, 1], got {output_similarity}")
    return _unit(output_similarity)


def functional_collapse(cost: float, accuracy: float, num_classes: int, share: float) -> float:
    """1 - cost / (share * (accuracy - 1 / C)): how much of what specialists would lose is kept.

    Args:
        cost: accuracy lost by an intervention (`metrics.interventions.Ablations`); a gain counts as no loss.
        accuracy: of the model as it is. NaN at or below chance, 1 / C: then nothing can be lost.
        share: of samples that the intervention gives to another expert, were all used alike:
            1 - 1 / E (permuted), 2 / E (swapped, merged), 1 (dropped, summed over experts).
    """
    check_count(num_classes, "num_classes")
    check_number(share, "share", least=0, above=True)
    advantage = accuracy - 1 / num_classes
    if not advantage > 0:
        return math.nan
    return _unit(1 - cost / (share * advantage))


def redundancy(ablation: dict[str, Any], accuracy: float, num_experts: int, num_classes: int) -> Redundancy:
    """From the fields of `metrics.interventions.Ablations`; NaN for one expert."""
    if num_experts < 2:
        return Redundancy(math.nan, math.nan, math.nan, math.nan)

    def kept(cost: float, share: float) -> float:
        return functional_collapse(cost, accuracy, num_classes, share)

    return Redundancy(
        kept(ablation["permuted"], 1 - 1 / num_experts),
        kept(ablation["swapped"], 2 / num_experts),
        kept(ablation["merged"], 2 / num_experts),
        kept(sum(max(cost, 0.0) for cost in ablation["dropped"]), 1.0),
    )


def _unit(value: float) -> float:
    return value if math.isnan(value) else min(max(value, 0.0), 1.0)
