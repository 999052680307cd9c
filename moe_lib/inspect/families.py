"""One adapter per family of blocks.

Shapes: N tokens, M some of them, D width, O output width, H hidden width, E experts, K chosen per token,
C capacity, S filled slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_lib.inspect.adapters import (
    Adapter,
    Call,
    Dispatch,
    NotAMixture,
    from_dense,
    parameter_names,
    rows,
)  # fmt: skip
from moe_lib.inspect.lists import expert_lists
from moe_lib.inspect.snapshot import unchanged
from moe_lib.inspect.tagging import ListAdapter
from moe_lib.models.classifier import Classifier
from moe_lib.moe import MoE


class MoELibAdapter(Adapter):
    """`moe_lib.MoE`, which returns its decision."""

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return isinstance(block, MoE)

    def dispatch(self, call: Call) -> Dispatch:
        output_NO, routing = call.output
        decision = routing.indices_NK, routing.weights_NK
        return Dispatch(rows(call.tokens), *decision, output_NO if self.mixes else None, routing.logits_NE)

    @property
    def mixes(self) -> bool:  # type: ignore[override]
        """Not where the experts read scaled tokens, which are not returned."""
        return not getattr(getattr(self.block.router, "config", None), "scale_experts", False)

    def answer(self, e: int, tokens_MD: Tensor) -> Tensor:
        return self.block.experts.expert(e, tokens_MD)  # type: ignore[union-attr, operator]


class ClassifierAdapter(Adapter):
    """`moe_lib`'s `Classifier`, which asks router and experts of its `MoE` apart and mixes logits, or, where
    the output is no such mixture, probabilities. Its output is known up to a number an image."""

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return isinstance(block, Classifier)

    @property
    def mixes(self) -> bool:  # type: ignore[override]
        return self.block.mixture == "logits"

    def experts(self) -> nn.Module:
        return self.block.moe.experts  # type: ignore[union-attr, return-value]

    def dispatch(self, call: Call) -> Dispatch:
        found = call.output
        decision = found.routing.indices_NK, found.routing.weights_NK
        code = [*found.activations.values()][-1] if found.activations else call.tokens
        mixed_NO = (found.routing.dense_weights()[:, :, None] * found.expert_logits_NEC).sum(1)
        output_NO = mixed_NO if self.mixes else None
        return Dispatch(code.flatten(1), *decision, output_NO, found.routing.logits_NE)

    def answer(self, e: int, tokens_MD: Tensor) -> Tensor:
        return self.experts().expert(e, tokens_MD)  # type: ignore[operator]


INDEX_NAMES = {
    "top_k_index", "top_k_indices", "topk_indices", "topk_idx", "router_indices", "selected_experts",
    "top_experts", "expert_indices", "experts_index", "indices", "indices_NK",
}  # fmt: skip
WEIGHT_NAMES = {
    "top_k_weights", "topk_weights", "topk_weight", "routing_weights", "top_weights", "expert_weights",
    "router_weights", "weights", "weights_NK",
}  # fmt: skip


COUNT_NAMES = ("num_experts", "moe_num_experts", "n_experts", "num_local_experts", "n_routed_experts")


class StackedAdapter(Adapter):
    """Experts as stacked weights in one module, called with tokens, indices and weights.

    So are nearly all families of transformers 5, and GptOss and Dbrx in transformers 4.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.inputs: dict[str, Any] = {}
        self.tokens_name, self.index_name, self.weight_name = self._names(block)

    @staticmethod
    def _names(block: nn.Module) -> tuple[str, str, str]:
        names = [name for name in parameter_names(block) if name not in ("args", "kwargs")]
        index = next((name for name in names if name in INDEX_NAMES), "")
        weight = next((name for name in reversed(names) if name in WEIGHT_NAMES), "")
        return names[0] if names else "", index, weight

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        sizes = [p.ndim for p in block.parameters()]
        if isinstance(block, nn.ModuleList | nn.ModuleDict) or not sizes or not all(cls._names(block)):
            return False
        return max(sizes) > 2 or cls._count(block) is not None

    @staticmethod
    def _count(block: nn.Module) -> int | None:
        counts = [getattr(block, name, None) for name in COUNT_NAMES]
        return next((count for count in counts if isinstance(count, int)), None)

    @property
    def num_experts(self) -> int:
        count = self._count(self.block)
        return super().num_experts if count is None else count

    def dispatch(self, call: Call) -> Dispatch:
        self.inputs = call.inputs
        names = self.tokens_name, self.index_name, self.weight_name
        if not all(isinstance(call.inputs.get(name), Tensor) for name in names):
            raise NotAMixture(f"its {names} are not all given")
        tokens, indices = call.inputs[self.tokens_name], call.inputs[self.index_name]
        indices_NK = indices[:, None] if indices.ndim == 1 else indices.flatten(0, -2)
        sizes = {p.shape[0] for p in self.block.parameters() if p.ndim > 2}
        largest = int(indices_NK.max()) if indices_NK.numel() else 0
        if largest > self.num_experts or (self._count(self.block) is None and len(sizes) > 1):
            raise NotAMixture(
                f"its number of experts is not clear: {sorted(sizes)} by its parameters' first sizes, and "
                f"{largest} was chosen; give the module an attribute `num_experts`, or pass an adapter"
            )
        weights_NK = call.inputs[self.weight_name].reshape(len(indices_NK), -1)
        self.sequences, self.vector = tokens.ndim == 3, indices.ndim == 1
        self.dense = weights_NK.shape != indices_NK.shape
        if self.dense:  # weights of all experts [N, E]
            known_NK = (indices_NK >= 0) & (indices_NK < self.num_experts)
            weights_NK = weights_NK.gather(1, indices_NK.where(known_NK, 0)).where(known_NK, 0)
        tokens_ND, output_NO = rows(tokens), rows(call.output)
        # A token that the module drops, over capacity say, gets zeros; unless its experts answer so.
        lost_N = (output_NO == 0).all(1) & (tokens_ND != 0).any(1) & (weights_NK != 0).any(1)
        if lost_N.any():
            lost_N &= ~self._silent(tokens_ND, indices_NK, lost_N)[indices_NK].all(1)
        if not lost_N.all():
            indices_NK = indices_NK.where(~lost_N[:, None], -1)
        return Dispatch(tokens_ND, indices_NK, weights_NK, output_NO)

    def _silent(self, tokens_ND: Tensor, indices_NK: Tensor, lost_N: Tensor) -> Tensor:
        """[E + 1] experts that answer zero to the first of the lost tokens that chose them, asked alone; the
        last entry is of slots that no expert fills."""
        silent_E = torch.ones(self.num_experts + 1, dtype=torch.bool, device=indices_NK.device)
        with unchanged(self.block):
            for e in indices_NK[lost_N].unique().tolist():
                if 0 <= e < self.num_experts:
                    first = (lost_N & (indices_NK == e).any(1)).nonzero()[0]
                    silent_E[e] = not self.answer(e, tokens_ND[first]).any()
        return silent_E

    def forget(self) -> None:
        self.inputs = {}

    def _run(self, tokens_MD: Tensor, index_M: Tensor) -> Tensor:
        """The module's own answer where token m goes to expert index_M[m] alone."""
        weights = tokens_MD.new_ones(len(tokens_MD), 1)
        if self.dense:
            weights = tokens_MD.new_zeros(len(tokens_MD), self.num_experts)
            weights.scatter_(1, index_M.view(-1, 1), 1.0)
        tokens = tokens_MD[None] if self.sequences else tokens_MD
        if self.vector:
            index_M, weights = index_M.view(-1), weights if self.dense else weights.view(-1)
        else:
            index_M = index_M[:, None]
        named = {self.tokens_name: tokens, self.index_name: index_M, self.weight_name: weights}
        values = {**self.inputs, **named}
        in_order = [values[name] for name in self.names if name in values]  # some implementations rename them
        return rows(self.block(*in_order))

    def answer(self, e: int, tokens_MD: Tensor) -> Tensor:
        return self._run(tokens_MD, torch.full((len(tokens_MD),), e, device=tokens_MD.device))

    def answers(self, tokens_MD: Tensor) -> Tensor:
        size, num_experts = len(tokens_MD), self.num_experts
        index_R = torch.arange(num_experts, device=tokens_MD.device).repeat_interleave(size)
        return self._run(tokens_MD.repeat(num_experts, 1), index_R).view(num_experts, size, -1)

    def expert_weights(self) -> list[Tensor]:
        num_experts = self.num_experts
        parts = [p for p in self.block.parameters() if p.ndim > 1 and p.shape[0] % num_experts == 0]
        return [p.reshape(num_experts, -1) for p in parts if p.ndim == 2 or len(p) == num_experts]  # 2: Dbrx


class Llama4Adapter(Adapter):
    """The router's score multiplies the expert's input, not its answer."""

    classes = ("Llama4TextMoe",)
    watch = ("router",)
    scales_inputs = True

    def dispatch(self, call: Call) -> Dispatch:
        scores, logits = call.seen["router"][:2]
        if scores.shape[0] == self.num_experts != logits.shape[-1]:
            scores = scores.T
        indices_NK, weights_NK = from_dense(scores)
        return Dispatch(rows(call.tokens), indices_NK, weights_NK, rows(call.output), logits)

    def answer(self, e: int, tokens_MD: Tensor) -> Tensor:
        experts: Any = self.block.experts
        gate_MH, up_MH = (tokens_MD @ experts.gate_up_proj[e]).chunk(2, 1)
        return (up_MH * experts.act_fn(gate_MH)) @ experts.down_proj[e]


class ParallelExpertsAdapter(Adapter):
    """Tokens sorted by expert, then one grouped product: JetMoe, and GraniteMoe in transformers 4.

    JetMoe's attention has them in a child: they make the queries, their answers, and read the heads.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.pair: Any = self._pair(block)
        self.mixes = self.pair is block
        self.watch = ("router",) if self.mixes else ("experts.router",)

    @staticmethod
    def _pair(block: nn.Module) -> nn.Module | None:
        """What holds the two grouped layers."""
        inner = getattr(block, "experts", None)
        if type(inner).__name__ == "JetMoeMoA":  # it has no forward of its own
            return inner
        parts = [type(getattr(block, name, None)).__name__ for name in ("input_linear", "output_linear")]
        grouped = hasattr(block, "router") and all(part.endswith("ParallelExperts") for part in parts)
        return block if grouped and type(block).__name__ != "JetMoeMoA" else None

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return cls._pair(block) is not None

    def experts(self) -> nn.Module:
        return nn.Sequential(self.pair.input_linear, self.pair.output_linear)

    def dispatch(self, call: Call) -> Dispatch:
        _, token_S, gate_S, sizes, logits_NE = call.seen[self.watch[0]]
        tokens_ND = rows(call.tokens)
        expert_S = torch.repeat_interleave(torch.tensor(sizes)).to(token_S.device)
        dense_NE = gate_S.new_zeros(len(tokens_ND), self.num_experts)
        indices_NK, weights_NK = from_dense(dense_NE.index_put((token_S, expert_S), gate_S))
        bias = getattr(self.block, "bias", None)
        output_NO = rows(call.output) - (0 if bias is None else bias) if self.mixes else None
        return Dispatch(tokens_ND, indices_NK, weights_NK, output_NO, logits_NE)

    def answer(self, e: int, tokens_MD: Tensor) -> Tensor:
        hidden_MH = tokens_MD @ self.pair.input_linear.weight[e].T
        if not self.mixes:
            return hidden_MH
        gate_MH, up_MH = hidden_MH.chunk(2, 1)
        return (self.pair.activation(gate_MH) * up_MH) @ self.pair.output_linear.weight[e].T


class CombineTensorAdapter(Adapter):
    """A gate that returns a combine tensor [..., N, E, C]: GShard and its descendants.

    The PyPI packages mixture-of-experts and st-moe-pytorch, and fairscale's MOELayer.
    """

    watch = ("gate",)
    gates = ("Top2Gating", "TopNGating", "Top2Gate")

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return type(getattr(block, "gate", None)).__name__ in cls.gates and hasattr(block, "experts")

    def dispatch(self, call: Call) -> Dispatch:
        several = [
            v for v in call.seen["gate"] if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 2
        ]
        combine = next((v for v in reversed(several) if v.shape[-2] == self.num_experts), None)
        if combine is None:
            raise NotAMixture(f"its gate returns no combine tensor [..., {self.num_experts}, C]")
        indices_NK, weights_NK = from_dense(combine.sum(-1).flatten(0, -2))
        return Dispatch(rows(call.tokens), indices_NK, weights_NK, rows(call.output))

    def answer(self, e: int, tokens_MD: Tensor) -> Tensor:
        if self.listed is not None:
            return super().answer(e, tokens_MD)
        return self.experts()(tokens_MD.expand(self.num_experts, *tokens_MD.shape))[e]


class TorchtitanAdapter(Adapter):
    """A router that returns scores, indices and counts, before experts stacked as w1, w2, w3."""

    watch = ("router",)

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        experts = getattr(block, "experts", None)
        return all(hasattr(experts, name) for name in ("w1", "w2", "w3")) and hasattr(block, "router")

    def dispatch(self, call: Call) -> Dispatch:
        tensors = [value for value in call.seen["router"] if isinstance(value, Tensor)]
        indices = next((t for t in tensors if not t.is_floating_point() and t.ndim >= 2), None)
        shape = None if indices is None else indices.shape
        weights = next((t for t in tensors if t.is_floating_point() and t.shape == shape), None)
        if indices is None or weights is None:
            raise NotAMixture("its router does not return indices [N, K] and weights of the same shape")
        return Dispatch(rows(call.tokens), rows(indices), rows(weights), rows(call.output))

    def answer(self, e: int, tokens_MD: Tensor) -> Tensor:
        w1_HD, w2_DH, w3_HD = (getattr(self.block.experts, name)[e] for name in ("w1", "w2", "w3"))
        return (nn.functional.silu(tokens_MD @ w1_HD.T) * (tokens_MD @ w3_HD.T)) @ w2_DH.T

    @property
    def scales_inputs(self) -> bool:  # type: ignore[override]
        return bool(getattr(self.block, "score_before_experts", False))


class SoftMoEAdapter(ListAdapter):
    """soft-moe-pytorch: experts serve slots, which are mixtures of tokens; weights summed over slots."""

    classes = ("SoftMoE",)
    mixes = False

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block, block.experts)  # type: ignore[arg-type]

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        holder = getattr(block, "experts", None)
        return super(ListAdapter, cls).matches(block) and holder is not None and bool(expert_lists(holder))

    def dispatch(self, call: Call) -> Dispatch:
        seen = super().dispatch(call)
        return seen._replace(tokens_ND=rows(call.tokens), output_NO=None, in_order=True)


GUESSED = CombineTensorAdapter, TorchtitanAdapter, StackedAdapter  # by names alone
FAMILIES: tuple[type[Adapter], ...] = (
    MoELibAdapter, ClassifierAdapter, Llama4Adapter, ParallelExpertsAdapter, CombineTensorAdapter,
    TorchtitanAdapter, SoftMoEAdapter, StackedAdapter,
)  # fmt: skip
