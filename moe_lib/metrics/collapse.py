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

from moe_lib.checks import check_count, check_number


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


def functional_collapse(cost: float, accuracy: float, num_classes: int, num_experts: int) -> float:
    """1 - cost / ((1 - 1 / E) * (accuracy - 1 / C)): what exchanging the weights between samples keeps of the
    accuracy that E perfect specialists, equal in load and each at chance on the others' samples, would lose.

    Args:
        cost: accuracy lost to the exchange (`metrics.interventions.Ablations.permuted`); a gain counts as no
            loss.
        accuracy: of the model as it is. NaN at or below chance, 1 / C: then nothing can be lost. NaN for one
            expert, too.
    """
    check_count(num_classes, "num_classes")
    advantage = accuracy - 1 / num_classes
    if check_count(num_experts, "num_experts") < 2 or not advantage > 0:
        return math.nan
    return _unit(1 - cost / ((1 - 1 / num_experts) * advantage))


def _unit(value: float) -> float:
    return value if math.isnan(value) else min(max(value, 0.0), 1.0)
