"""The three kinds of collapse of a finished run, from its result file; see `moe_lib.metrics.collapse`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from moe_lib.metrics.collapse import functional_collapse, representational_collapse, routing_collapse


class Degree(NamedTuple):
    value: float  # in [0, 1]; NaN where the measure says nothing
    null: float  # NaN where the run has none


class Collapse(NamedTuple):
    routing: Degree
    representational: Degree
    functional: Degree


def collapse(result: dict[str, Any]) -> Collapse:
    """The panel of one classifier's run, from its result file.

    All NaN for a model of one expert. The representational null exists where the run trained it.
    """
    entropy = result["routing"]["entropy"]
    num_experts, num_classes = entropy["num_experts"], entropy["num_classes"]
    if num_experts < 2:
        nothing = Degree(math.nan, math.nan)
        return Collapse(nothing, nothing, nothing)
    alone = (result.get("null") or {}).get("similarity", {}).get("outputs", math.nan)
    cost, accuracy = result["ablation"]["permuted"], result["task"]["accuracy"]
    return Collapse(
        Degree(
            routing_collapse(entropy["marginal"], num_experts),
            routing_collapse(result["initial"]["routing"]["entropy"]["marginal"], num_experts),
        ),
        Degree(
            representational_collapse(result["similarity"]["outputs"]),
            representational_collapse(alone),
        ),
        Degree(functional_collapse(cost, accuracy, num_classes, num_experts), 1.0),
    )


def trajectory(result: dict[str, Any]) -> dict[str, list[float]]:
    """Routing and representational collapse after every epoch, on validation data; NaN for one expert."""
    validation = result["history"]["validation"]
    num_experts = result["routing"]["entropy"]["num_experts"]
    if num_experts < 2:
        nothing = [math.nan] * len(validation["marginal"])
        return {"routing": nothing, "representational": nothing}
    return {
        "routing": [routing_collapse(value, num_experts) for value in validation["marginal"]],
        "representational": [representational_collapse(value) for value in validation["output_similarity"]],
    }
