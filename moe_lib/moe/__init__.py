"""Routers, experts, and the layer made of them."""

from moe_lib.moe.adaptive import (
    ACConfig,
    AdaptiveClusteringRouter,
    adaptive_routers,
    frozen_scales,
    gradient_through_scales,
)
from moe_lib.moe.experts import Experts, MoE
from moe_lib.moe.routing import (
    CosineRouter,
    HashRouter,
    LinearRouter,
    MLPRouter,
    Routing,
    UniformRouter,
    joined,
    load_balancing_loss,
    route,
    router_z_loss,
)
from moe_lib.moe.scaling import adaptive_scales

__all__ = [
    "ACConfig",
    "AdaptiveClusteringRouter",
    "CosineRouter",
    "Experts",
    "HashRouter",
    "LinearRouter",
    "MLPRouter",
    "MoE",
    "Routing",
    "UniformRouter",
    "adaptive_routers",
    "adaptive_scales",
    "frozen_scales",
    "gradient_through_scales",
    "joined",
    "load_balancing_loss",
    "route",
    "router_z_loss",
]
