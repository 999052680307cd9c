"""Expert networks as stacked weights, and the layer that puts a router in front of them.

Shapes: N samples or tokens, D width, H expert hidden width, O output width, E experts, K chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lib.moe.dispatch import Stacked, mixture
from moe_lib.moe.routing import AdaptiveClusteringRouter, LinearRouter, Routing, check_experts


class Experts(nn.Module):
    """E two-layer ReLU networks D-H-O whose weights are stacked along the first dimension."""

    def __init__(self, dim: int, num_experts: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        check_experts(num_experts, None)
        self.w1_EDH = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.b1_EH = nn.Parameter(torch.empty(num_experts, hidden_dim))
        self.w2_EHO = nn.Parameter(torch.empty(num_experts, hidden_dim, out_dim))
        self.b2_EO = nn.Parameter(torch.empty(num_experts, out_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.w1_EDH, self.w2_EHO):  # Kaiming normal; fan-in is the middle dimension
            nn.init.normal_(weight, std=(2 / weight.shape[1]) ** 0.5)
        nn.init.zeros_(self.b1_EH)
        nn.init.zeros_(self.b2_EO)

    @property
    def num_experts(self) -> int:
        return self.w1_EDH.shape[0]

    def forward(self, x_ND: Tensor) -> Tensor:
        """Every expert on every row: [N, E, O]."""
        num_experts, dim, hidden_dim = self.w1_EDH.shape
        # The first layers share their input, so they are one GEMM.
        w1_DF = self.w1_EDH.transpose(0, 1).reshape(dim, num_experts * hidden_dim)
        hidden_NF = torch.addmm(self.b1_EH.flatten(), x_ND, w1_DF).relu()
        hidden_ENH = hidden_NF.view(len(x_ND), num_experts, hidden_dim).transpose(0, 1)
        return torch.baddbmm(self.b2_EO[:, None], hidden_ENH, self.w2_EHO).transpose(0, 1)

    def expert(self, e: int, x_ND: Tensor) -> Tensor:
        """Expert `e` on the given rows: [N, O]."""
        hidden_NH = torch.addmm(self.b1_EH[e], x_ND, self.w1_EDH[e]).relu()
        return torch.addmm(self.b2_EO[e], hidden_NH, self.w2_EHO[e])

    def stacked(self) -> Stacked:
        return Stacked(self.w1_EDH, self.b1_EH, self.w2_EHO, self.b2_EO)

    @torch.no_grad()
    def flat_weights(self) -> Tensor:
        """[E, P]: all weights and biases of each expert in one row."""
        return torch.cat([weight.flatten(1) for weight in self.stacked()], 1)


class MoE(nn.Module):
    """A router and its experts.

    Args:
        dim: width of the input.
        num_experts: E.
        hidden_dim: of each expert.
        out_dim: `dim` if None.
        top_k: None for a soft mixture of all experts; else each token goes to its k best only, and none
            is ever dropped.
        router: any module (tokens [N, D], previous Routing or None) -> Routing over E experts;
            a `LinearRouter` if None.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        hidden_dim: int,
        out_dim: int | None = None,
        top_k: int | None = None,
        router: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_experts(num_experts, top_k)
        self.top_k = top_k
        self.router = LinearRouter(dim, num_experts) if router is None else router
        self.experts = Experts(dim, num_experts, hidden_dim, dim if out_dim is None else out_dim)

    def route(self, x_ND: Tensor, previous: Routing | None = None, keys_N: Tensor | None = None) -> Routing:
        """The decision alone, restricted to `top_k` experts; arguments as for `forward`."""
        keys = () if keys_N is None else (keys_N,)
        return self._restrict(self.router(x_ND, previous, *keys))

    def _restrict(self, routing: Routing) -> Routing:
        num_experts = self.experts.num_experts
        if routing.probs_NE.shape[1] != num_experts:
            raise ValueError(
                f"the router routes to {routing.probs_NE.shape[1]} experts, the layer has {num_experts}"
            )
        chosen = routing.indices_NK.shape[1]
        if self.top_k is None or self.top_k == chosen:
            return routing
        if self.top_k > chosen:
            raise ValueError(f"top_k = {self.top_k} experts are asked for, the router chooses {chosen}")
        return routing.top(self.top_k)

    def forward(
        self, x_ND: Tensor, previous: Routing | None = None, keys_N: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Weighted sum of the chosen experts' outputs, [N, O], and the decision behind it.

        Args:
            previous: the decision of the MoE layer before.
            keys_N: for a `HashRouter` alone: each token's position or id.
        """
        if isinstance(self.router, AdaptiveClusteringRouter) and self.router.config.scale_experts:
            routing, scaled_ND = self.router.route_and_scale(x_ND, previous)
            routing, x_ND = self._restrict(routing), scaled_ND.to(x_ND.dtype)
        else:
            routing = self.route(x_ND, previous, keys_N)
        return mixture(x_ND, routing, self.experts.stacked()), routing
