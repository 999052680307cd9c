"""Mixtures of experts that specialise or collapse: the SNN loss, the AC router, measures, and a panel.

Everything public can be imported from here: `from moe_lib import MoE, soft_nearest_neighbor_loss`.
"""

from moe_lib.inspect import CollapseCallback, Panel, inspect_moe, watch
from moe_lib.metrics import (
    RoutingEntropy,
    class_expert_matrix,
    linear_cka,
    pairwise_similarity,
    routing_entropy,
    similarity_floor,
)
from moe_lib.moe import (
    ACConfig,
    AdaptiveClusteringRouter,
    CosineRouter,
    Experts,
    HashRouter,
    LinearRouter,
    MoE,
    Routing,
    adaptive_scales,
    load_balancing_loss,
    route,
    router_z_loss,
)
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
    "MoE",
    "Panel",
    "Routing",
    "RoutingEntropy",
    "SNNLConfig",
    "adaptive_scales",
    "class_expert_matrix",
    "inspect_moe",
    "linear_cka",
    "load_balancing_loss",
    "pairwise_similarity",
    "route",
    "router_z_loss",
    "routing_entropy",
    "similarity_floor",
    "soft_nearest_neighbor_loss",
    "watch",
]
