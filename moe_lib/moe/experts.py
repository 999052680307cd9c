"""Expert networks as stacked weights, and the layer that puts a router in front of them.

Shapes: N samples or tokens, D width, H expert hidden width, O output width, E experts, K chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lib.checks import check_count
from moe_lib.moe.dispatch import Stacked, mixture
from moe_lib.moe.routing import LinearRouter, Routing, UniformRouter, check_choice, check_tokens


class Experts(nn.Module):
    """E two-layer ReLU networks D-H-O whose weights are stacked along the first dimension."""

    def __init__(self, dim: int, num_experts: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        sizes = {"dim": dim, "num_experts": num_experts, "hidden_dim": hidden_dim, "out_dim": out_dim}
        for name, size in sizes.items():
            check_count(size, name)
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
        hidden_ENH = hidden_NF.view(x_ND.shape[0], num_experts, hidden_dim).transpose(0, 1)
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
        renormalize: divide the chosen experts' weights by their sum; see `Routing.top`. None: as the router
            decides, or for top_k > 1 where the router does not choose `top_k` experts itself.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        hidden_dim: int,
        out_dim: int | None = None,
        top_k: int | None = None,
        router: nn.Module | None = None,
        renormalize: bool | None = None,
    ) -> None:
        super().__init__()
        check_choice(num_experts, top_k, renormalize)
        if isinstance(router, UniformRouter) and top_k not in (None, num_experts):
            raise ValueError(
                f"top_k must not be {top_k} behind a UniformRouter: all experts tie, and every token would "
                "go to the first ones; use a HashRouter"
            )
        self.top_k, self.renormalize = top_k, renormalize
        self.router = LinearRouter(dim, num_experts) if router is None else router
        self.experts = Experts(dim, num_experts, hidden_dim, dim if out_dim is None else out_dim)

    def route(self, x_ND: Tensor, previous: Routing | None = None, keys_N: Tensor | None = None) -> Routing:
        """The decision alone, restricted to `top_k` experts; arguments as for `forward`."""
        return self._route(x_ND, previous, keys_N)[0]

    def _route(self, x_ND: Tensor, previous: Routing | None, keys_N: Tensor | None) -> tuple[Routing, Tensor]:
        """The decision, and what the experts see."""
        x_ND = check_tokens(x_ND, self.experts.w1_EDH.shape[1])
        if keys_N is not None and not getattr(self.router, "needs_keys", False):
            raise ValueError(f"keys_N has no effect on a {type(self.router).__name__}: leave it out")
        experts_see = getattr(self.router, "experts_see", None)
        if experts_see is not None:
            routing, seen_ND = experts_see(x_ND, previous)
        else:
            keys = () if keys_N is None else (keys_N,)
            routing, seen_ND = self.router(x_ND, previous, *keys), x_ND
        num_experts, chosen = self.experts.num_experts, routing.indices_NK.shape[1]
        if routing.probs_NE.shape[1] != num_experts:
            raise ValueError(
                f"router routes to {routing.probs_NE.shape[1]} experts, the layer has {num_experts}"
            )
        if self.top_k is None or (self.top_k == chosen and self.renormalize is None):
            return routing, seen_ND
        if self.top_k > chosen:
            raise ValueError(f"top_k = {self.top_k} experts are asked for, the router chooses {chosen}")
        return routing.top(self.top_k, self.renormalize), seen_ND

    def forward(
        self, x_ND: Tensor, previous: Routing | None = None, keys_N: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Weighted sum of the chosen experts' outputs, [N, O], and the decision behind it.

        Compiles, exports and has second derivatives; see `dispatch.mixture`. Values that are not finite are
        passed on, as by torch's layers.

        Args:
            x_ND: tokens; a batch of sequences is flattened first, x_BTD.flatten(0, 1).
            previous: the decision of the MoE layer before.
            keys_N: for a `HashRouter` alone: each token's position or id.
        """
        routing, seen_ND = self._route(x_ND, previous, keys_N)
        return mixture(seen_ND, routing, self.experts.stacked()), routing
