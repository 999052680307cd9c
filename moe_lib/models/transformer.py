"""Transformer blocks whose feed-forward part may be a mixture of experts; for vision.py and language.py.

Shapes: B sequences, T positions, N = B * T tokens, D width, E experts, K experts chosen per token,
I, O width before and after a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lib.checks import check_count
from moe_lib.moe import (
    ACConfig,
    AdaptiveClusteringRouter,
    CosineRouter,
    HashRouter,
    LinearRouter,
    MoE,
    Routing,
    load_balancing_loss,
)
from moe_lib.products import differentiable_gradient, on_host, product, traced

Router = Literal["linear", "cosine", "ac", "hash", "hash-token"]  # by position, by token id


@dataclass(frozen=True)
class TransformerConfig:
    dim: int = 96
    depth: int = 4
    num_heads: int = 4
    mlp_hidden: int = 192  # of blocks without experts
    moe_blocks: tuple[int, ...] = (1, 2, 3)  # counted from 0
    num_experts: int = 16
    expert_hidden: int = 96
    top_k: int = 2
    router: Router = "cosine"
    ac: ACConfig = ACConfig()
    # MoE blocks that have `router`; the others have a linear one. None: all. The authors' small language
    # model has the AC router in its last block alone.
    router_blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.router not in get_args(Router):
            raise ValueError(f"unknown router {self.router!r}; known: {', '.join(get_args(Router))}")
        if self.router_blocks is not None and not set(self.router_blocks) <= set(self.moe_blocks):
            raise ValueError(
                f"router_blocks names some of moe_blocks = {self.moe_blocks}, got {self.router_blocks}"
            )
        if self.router != "ac" and self.ac != ACConfig():
            raise ValueError(f"ac options have no effect with router={self.router!r}")
        if self.depth < 1 or self.num_heads < 1 or self.dim % self.num_heads:
            raise ValueError(
                "depth and num_heads must be at least 1 and num_heads must divide dim, "
                f"got {self.depth}, {self.num_heads} and {self.dim}"
            )
        for name in ("mlp_hidden", "num_experts", "expert_hidden", "top_k"):
            check_count(getattr(self, name), name)
        outside = [block for block in self.moe_blocks if not 0 <= block < self.depth]
        if outside or not self.moe_blocks:
            raise ValueError(
                f"moe_blocks names one or more of the blocks 0 to {self.depth - 1}, got {self.moe_blocks}"
            )


def precision(bf16: bool, x: Tensor) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 on the device of `x`, or whatever is in force already."""
    return torch.autocast(x.device.type, torch.bfloat16) if bf16 else nullcontext()


class Projection(nn.Linear):
    """A linear layer that keeps the variance: weights from N(0, 1 / fan-in), zero bias."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        plain = x.dtype == torch.float32 and on_host(x) and not torch.is_autocast_enabled("cpu")
        if not plain or traced():
            return super().forward(x)
        return _Linear.apply(x.flatten(0, -2), self.weight, self.bias).unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    """x W^T + b, and its gradient, by `products`: up to 2.4 times as fast on a CPU."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
        x_NI = x_NI.contiguous()
        ctx.save_for_backward(x_NI, weight_OI, bias_O)
        return product(x_NI, weight_OI.T, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, bias_O = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for
            return differentiable_gradient(F.linear, (x_NI, weight_OI, bias_O), grads[0])
        grad_NO = grads[0].contiguous()
        for_x, for_weight, for_bias = ctx.needs_input_grad
        dx_NI = product(grad_NO, weight_OI) if for_x else None
        dweight_OI = None
        if for_weight:  # faster with few rows than with many
            wide = weight_OI.shape[0] > weight_OI.shape[1]
            dweight_OI = product(x_NI.T, grad_NO).T if wide else product(grad_NO.T, x_NI)
        return dx_NI, dweight_OI, grad_NO.sum(0) if for_bias else None


class Embedding(nn.Embedding):
    """Vectors of unit expected length."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)


def build_router(dim: int, config: TransformerConfig, block: int, num_keys: int) -> nn.Module:
    """The router of one block; `num_keys` as in `HashRouter`."""
    chosen = config.router_blocks is None or block in config.router_blocks
    kind = config.router if chosen else "linear"
    if kind == "linear":
        return LinearRouter(dim, config.num_experts, config.top_k)
    if kind == "cosine":
        return CosineRouter(dim, config.num_experts, config.top_k)
    if kind == "ac":
        return AdaptiveClusteringRouter(dim, config.num_experts, config.top_k, config.ac)
    return HashRouter(config.num_experts, num_keys, config.top_k)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.qkv = Projection(dim, 3 * dim)
        self.out = Projection(dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, length, dim = x_BTD.shape
        query, key, value = (
            part_BTD.view(batch, length, self.num_heads, dim // self.num_heads).transpose(1, 2)
            for part_BTD in self.qkv(x_BTD).split(dim, 2)
        )
        out = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(out.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x), the latter a `MoE` or a two-layer network.

    Returns the block's decision too; None if it has no experts.

    Args:
        index: of this block.
        num_keys: positions, or token ids, of a router that hashes.
    """

    def __init__(self, dim: int, config: TransformerConfig, index: int, num_keys: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, config.num_heads, causal)
        self.feed_forward: nn.Module
        if index in config.moe_blocks:
            router = build_router(dim, config, index, num_keys)
            self.feed_forward = MoE(
                dim, config.num_experts, config.expert_hidden, top_k=config.top_k, router=router
            )
        else:
            self.feed_forward = nn.Sequential(
                Projection(dim, config.mlp_hidden), nn.ReLU(), Projection(config.mlp_hidden, dim)
            )

    def forward(
        self, x_BTD: Tensor, previous: Routing | None, ids_BT: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """`ids_BT`: the tokens' ids, for a router that hashes them; without, it hashes positions."""
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
        tokens_ND = self.norm2(x_BTD).flatten(0, 1)
        routing = None
        if isinstance(self.feed_forward, MoE):
            keys_N = None
            if getattr(self.feed_forward.router, "needs_keys", False):
                batch, length = x_BTD.shape[:2]
                positions_N = torch.arange(length, device=x_BTD.device).repeat(batch)
                keys_N = positions_N if ids_BT is None else ids_BT.flatten()
            out_ND, routing = self.feed_forward(tokens_ND, previous, keys_N)
        else:
            out_ND = self.feed_forward(tokens_ND)
        return x_BTD + out_ND.view_as(x_BTD), routing


def moe_layers(model: nn.Module) -> list[MoE]:
    """The MoE layers of a model, in the order of its blocks."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def routing_losses(routings: Iterable[Routing]) -> dict[str, Tensor]:
    """The load-balancing loss, unweighted: the mean over the MoE layers."""
    return {"balance": torch.stack([load_balancing_loss(routing) for routing in routings]).mean()}


@dataclass
class Seen:
    """One MoE layer at work in one forward pass."""

    layer: MoE
    tokens_ND: Tensor
    previous: Routing | None
    routing: Routing


@contextmanager
def watching(model: nn.Module) -> Iterator[list[Seen]]:
    """Inside this context every forward pass appends what each MoE layer saw and decided."""
    seen: list[Seen] = []

    def note(layer: nn.Module, inputs: tuple, named: dict, output: tuple[Tensor, Routing]) -> None:
        assert isinstance(layer, MoE)
        previous = inputs[1] if len(inputs) > 1 else named.get("previous")
        seen.append(Seen(layer, inputs[0].detach(), previous, output[1]))

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in moe_layers(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
