"""Mixtures of experts that specialise or collapse: the SNN loss, the AC router, measures, and a panel.

The names that are used most: `from moe_lib import MoE, soft_nearest_neighbor_loss`. The rest is in
`moe_lib.metrics`, `.moe`, `.snnl`, `.models`, `.robustness` and `.parallel`.
"""

from moe_lib.inspect import CollapseCallback, Panel, inspect_moe, watch
from moe_lib.metrics import (
    RoutingEntropy,
    calibration_error,
    class_expert_matrix,
    expert_cka,
    information_class_null,
    linear_cka,
    load,
    output_similarity,
    pairwise_similarity,
    routing_entropy,
    task_score,
)
from moe_lib.moe import (
    ACConfig,
    AdaptiveClusteringRouter,
    CosineRouter,
    Experts,
    HashRouter,
    LinearRouter,
    MLPRouter,
    MoE,
    Routing,
    UniformRouter,
    adaptive_scales,
    load_balancing_loss,
    route,
    router_z_loss,
)
from moe_lib.robustness import corrupt, fgsm, pgd, spsa
from moe_lib.snnl import LayerwiseSNNL, SNNLConfig, soft_nearest_neighbor_loss

__version__ = "0.1.0"

__all__ = [
    "ACConfig",
    "AdaptiveClusteringRouter",
    "CollapseCallback",
    "CosineRouter",
    "Experts",
    "HashRouter",
    "LayerwiseSNNL",
    "LinearRouter",
    "MLPRouter",
    "MoE",
    "Panel",
    "Routing",
    "RoutingEntropy",
    "SNNLConfig",
    "UniformRouter",
    "adaptive_scales",
    "calibration_error",
    "class_expert_matrix",
    "corrupt",
    "expert_cka",
    "fgsm",
    "information_class_null",
    "inspect_moe",
    "linear_cka",
    "load",
    "load_balancing_loss",
    "output_similarity",
    "pairwise_similarity",
    "pgd",
    "route",
    "router_z_loss",
    "routing_entropy",
    "soft_nearest_neighbor_loss",
    "spsa",
    "task_score",
    "watch",
]
