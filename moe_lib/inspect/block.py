"""A block that was found, and what is examined once: its mixture, and a sample of what its experts read.

Shapes: N tokens of one call, M examined, D width, O output width, E experts, B sequences, T positions.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moe_lib.inspect.adapters import Adapter, Dispatch, first_tensor, random_states
from moe_lib.inspect.state import BlockState

EXAMINED = 64  # tokens of each block whose mixture and experts' answers are computed again,
ANSWERS = 512  # as long as all experts together give no more answers; but at least
LEAST = 8


class Block:
    """A block that was found: its adapter, its tables, and what was found out about it."""

    def __init__(self, name: str, adapter: Adapter, parent: nn.Module | None) -> None:
        self.name = name
        self.adapter = adapter
        self.parent = parent
        self.state = BlockState(adapter.num_experts)
        self.mixture_error = float("nan")
        self.explanation = ""
        self.notes: dict[str, None] = {}  # in order, once each
        self.calls = 0
        self.scores_at: int | None = None  # which of the router's outputs they are; judged once
        self.scores_NE: Tensor | None = None  # of the call in progress
        self.examined = 0  # tokens
        self.computable = True  # can its experts' answers to its tokens be computed again?
        self.alike: tuple[Tensor, Tensor] | None = None  # cosines of answers [E, E]; of unpaired ones
        self.width_BT: tuple[int, int] | None = None  # the block's own input, if it has three dimensions

    def fresh(self) -> Block:
        """The same, with nothing seen yet."""
        return Block(self.name, copy.copy(self.adapter), self.parent)

    @property
    def label(self) -> str:
        return f"{self.name or 'the model'} ({self.family})"

    @property
    def family(self) -> str:
        return type(self.adapter.block).__name__

    def examine(self, seen: Dispatch, valid_N: Tensor | None, input_ND: Tensor, seed: int) -> None:
        """Once a block, on a few tokens: is the mixture what was observed? Are the experts' answers alike?"""
        adapter, num_experts = self.adapter, self.adapter.num_experts
        known_NK = (seen.indices_NK >= 0) & (seen.indices_NK < num_experts)
        usable_N = known_NK.any(1) & seen.weights_NK.isfinite().all(1)
        if valid_N is not None:
            usable_N &= valid_N
        if not usable_N.any():
            return
        usable = usable_N.nonzero().flatten() if seen.in_order else torch.arange(len(seen.tokens_ND))
        self.examined = min(max(ANSWERS // num_experts, LEAST), EXAMINED, len(usable))
        some_M = usable[torch.linspace(0, len(usable) - 1, self.examined).long()]
        sample_MD = seen.tokens_ND[some_M]
        states = random_states()
        answers_EMO = adapter.answers(sample_MD)
        drawn = any(not torch.equal(*pair) for pair in zip(states, random_states(), strict=True))
        dtypes = [seen.tokens_ND.dtype, answers_EMO.dtype, adapter.answer_dtype]
        answers_EMO = answers_EMO.float()
        self.alike, self.computable = cosines(answers_EMO, seed), seen.in_order
        if not seen.in_order:
            self.explanation = "not checked: which tokens the experts read is not known"
            return
        if seen.output_NO is None or drawn:
            why = "the experts' answers are random" if drawn else "the adapter gives no output"
            self.explanation = f"not checked: {why}"
            return
        indices_MK = seen.indices_NK[some_M].where(known_NK[some_M], 0)
        weights_MK = seen.weights_NK[some_M].where(known_NK[some_M], 0)
        if adapter.scales_inputs:
            mixed_MO = adapter.mix(sample_MD, indices_MK, weights_MK).float()
        else:
            chosen_MKO = answers_EMO[indices_MK, torch.arange(self.examined, device=some_M.device)[:, None]]
            mixed_MO = (chosen_MKO * weights_MK[:, :, None]).sum(1)
        actual_MO = seen.output_NO[some_M].float()
        parts = {"": torch.zeros_like(actual_MO), "a shared expert": self._shared(sample_MD)}
        if input_ND.shape == seen.output_NO.shape:
            parts["the block's input (a residual connection)"] = input_ND[some_M].float()
        coarse = any(d is not None and d.itemsize < 4 for d in [*dtypes, seen.output_NO.dtype])
        tolerance = 2e-2 if coarse else 1e-3
        scale = actual_MO.norm().clamp(min=1e-30)
        off = {what: float((actual_MO - mixed_MO - part_MO).norm() / scale)
               for what, part_MO in parts.items() if part_MO is not None}  # fmt: skip
        explained = next((what for what, error in off.items() if error <= tolerance), None)
        self.mixture_error = off[explained or ""]
        if explained is None:
            self.explanation = (
                f"the block's output differs from the mixture by {100 * self.mixture_error:.2g}% of its "
                "norm: something else is added, or the answers are transformed after mixing"
            )
        elif explained:
            self.explanation = f"the block's output is the mixture and {explained}"
        else:
            self.explanation = "the mixture of what was observed is the block's output"

    def _shared(self, sample_MD: Tensor) -> Tensor | None:
        """The answer of an expert that every token has, under the names that it goes by."""
        module: Any = self.adapter.block
        for name in ("shared_expert", "shared_experts", "shared_mlp"):
            shared = getattr(module, name, None)
            if isinstance(shared, nn.Module):
                parts = shared if isinstance(shared, nn.ModuleList) else [shared]
                answer_MO = torch.stack([first_tensor(part(sample_MD)) for part in parts]).sum(0)
                if isinstance(gate := getattr(module, "shared_expert_gate", None), nn.Module):
                    answer_MO = gate(sample_MD).sigmoid() * answer_MO
                return answer_MO.float()
        return None


def cosines(answers_EMO: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Of two experts' answers [E, E], each expert's mean removed: to the same tokens, and to others."""
    unit_EMO = answers_EMO - answers_EMO.mean(1, keepdim=True)
    unit_EMO = unit_EMO / unit_EMO.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
    num_experts, size, _ = unit_EMO.shape
    draw = torch.Generator().manual_seed(seed)
    order_EM = torch.rand(num_experts, size, generator=draw).argsort(1).to(unit_EMO.device)
    unpaired_EMO = unit_EMO[torch.arange(num_experts, device=unit_EMO.device)[:, None], order_EM]
    return tuple(flat_EP @ flat_EP.T for flat_EP in (unit_EMO.flatten(1), unpaired_EMO.flatten(1)))
