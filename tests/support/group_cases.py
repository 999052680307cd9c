"""Losses and statistics of one batch, for one process or several.

As a script: python group_cases.py RANK SIZE STORE OUT computes them as one process of a group, on its part.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moe_lib import parallel
from moe_lib.moe import AdaptiveClusteringRouter, load_balancing_loss
from moe_lib.moe.adaptive import ACConfig
from moe_lib.moe.routing import route, router_z_loss
from moe_lib.snnl import soft_nearest_neighbor_loss

PARTS = {1: [40], 2: [29, 11], 3: [23, 1, 16]}  # samples of each process
D, E, C = 6, 4, 3


def cases(rank: int, size: int) -> dict[str, dict[str, Tensor]]:
    """Value and gradients by the names of the weights, which all processes share."""
    draw = torch.Generator().manual_seed(3)
    inputs_ND = torch.randn(40, D, generator=draw, dtype=torch.float64)
    labels_N = torch.randint(C, (40,), generator=draw)
    weight_DD = torch.randn(D, D, generator=draw, dtype=torch.float64)
    router_DE = torch.randn(D, E, generator=draw, dtype=torch.float64)
    start = sum(PARTS[size][:rank])
    own = slice(start, start + PARTS[size][rank])
    found = {}

    def differentiate(name, loss_of):
        weights = {"weight": weight_DD, "router": router_DE, "temperature": torch.tensor(0.7).double()}
        weights = {key: value.clone().requires_grad_() for key, value in weights.items()}
        loss = loss_of(inputs_ND[own] @ weights["weight"], labels_N[own], weights)
        grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        found[name] = {"value": loss.detach()}
        for key, grad in zip(weights, grads, strict=True):
            found[name][key] = torch.zeros_like(weights[key]) if grad is None else grad

    for distance in ("cosine", "sqeuclidean"):
        for reduction in ("mean", "mean_all", "sum", "none"):

            def snnl(x_ND, own_labels_N, weights, distance=distance, reduction=reduction):
                temperature = weights["temperature"]
                loss = soft_nearest_neighbor_loss(x_ND, own_labels_N, temperature, distance, reduction)
                if reduction != "none":
                    return loss
                return parallel.total((loss * torch.arange(40)[own]).sum())  # every anchor its own weight

            differentiate(f"snnl {distance} {reduction}", snnl)
    for name, loss_of in (("balance", load_balancing_loss), ("z", router_z_loss)):
        differentiate(name, lambda x_ND, _, weights, f=loss_of: f(route(x_ND @ weights["router"], 2)))
    differentiate(
        "cross entropy",
        lambda x_ND, y_N, _: parallel.mean(F.cross_entropy(x_ND, y_N), len(y_N)),
    )
    for dispersion in ("mad", "variance"):
        for options in ({}, {"gradient": True}, {"pooled": True, "normalize": "row"}, {"causal": True}):
            torch.manual_seed(1)
            router = AdaptiveClusteringRouter(D, E, 2, ACConfig(dispersion=dispersion, **options)).double()

            def ac(x_ND, _, weights, router=router):
                previous = route(x_ND.detach() @ weights["router"], 1)
                for _ in range(2):  # causal: the second step sees the first one's statistics
                    routing = router(x_ND, previous)
                return parallel.total((routing.weights_NK * routing.probs_NE[:, :2]).sum())

            differentiate(f"ac {dispersion} {options}", ac)
    return found


if __name__ == "__main__":
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=size)
    with parallel.global_batch():
        found = cases(rank, size)
    for values in found.values():  # as DistributedDataParallel does
        for name in sorted(set(values) - {"value"}):
            dist.all_reduce(values[name])
            values[name] /= size
    torch.save(found, f"{sys.argv[4]}-{rank}")
    dist.destroy_process_group()
