"""A block that was found, and what is examined once: its mixture, and a sample of what its experts read.

Shapes: N tokens of one call, M examined, D width, O output width, E experts, B sequences, T positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_lib.inspect.adapters import Adapter, Dispatch
from moe_lib.inspect.state import BlockState

EXAMINED = 64  # tokens of each block whose mixture and experts' answers are computed again,
ANSWERS = 1024  # as long as all experts together give no more answers; but at least
LEAST = 16


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
        self.failure = ""
        self.scores_NE: Tensor | None = None  # of the call in progress
        self.sample_MD: Tensor | None = None  # what the experts read
        self.width_BT: tuple[int, int] | None = None  # the block's own input, if it has three dimensions

    @property
    def family(self) -> str:
        return type(self.adapter.block).__name__

    def examine(self, seen: Dispatch, valid_N: Tensor | None, input_ND: Tensor) -> None:
        """Once a block: is the mixture what was observed? And a sample of what its experts read."""
        usable_N = (seen.indices_NK >= 0).any(1)
        if valid_N is not None:
            usable_N &= valid_N
        usable = usable_N.nonzero().flatten()
        if not len(usable):
            return
        size = min(max(ANSWERS // self.adapter.num_experts, LEAST), EXAMINED, len(usable))
        some_M = usable[torch.linspace(0, len(usable) - 1, size).long()]
        self.sample_MD = seen.tokens_ND[some_M].clone()
        if seen.output_NO is None:
            self.explanation = "not checked: the adapter gives no output"
            return
        mixed_MO = self.adapter.mix(self.sample_MD, seen.indices_NK[some_M], seen.weights_NK[some_M]).float()
        actual_MO = seen.output_NO[some_M].float()
        rest_MO = actual_MO - mixed_MO
        scale = actual_MO.norm().clamp(min=1e-30)
        self.mixture_error = float(rest_MO.norm() / scale)
        tolerance = 2e-2 if seen.tokens_ND.dtype in (torch.bfloat16, torch.float16) else 1e-3
        if self.mixture_error <= tolerance:
            self.explanation = "the mixture of what was observed is the block's output"
            return
        shared_MO = self._shared(self.sample_MD)
        named = {"a shared expert": shared_MO}
        if input_ND.shape == seen.output_NO.shape:
            named["the block's input (a residual connection)"] = input_ND[some_M].float()
        for what, part_MO in named.items():
            if part_MO is not None and float((rest_MO - part_MO).norm() / scale) <= tolerance:
                self.mixture_error = float((rest_MO - part_MO).norm() / scale)
                self.explanation = f"the block's output is the mixture and {what}"
                return
        self.explanation = (
            f"the block's output differs from the mixture by {self.mixture_error:.0%} of its norm: "
            "something else is added, or the answers are transformed after mixing"
        )

    def _shared(self, sample_MD: Tensor) -> Tensor | None:
        """The answer of an expert that every token has, under the names that it goes by."""
        module: Any = self.adapter.block
        for name in ("shared_expert", "shared_experts", "shared_mlp"):
            shared = getattr(module, name, None)
            if isinstance(shared, nn.Module):
                answer_MO = shared(sample_MD)
                if isinstance(gate := getattr(module, "shared_expert_gate", None), nn.Module):
                    answer_MO = gate(sample_MD).sigmoid() * answer_MO
                return answer_MO.float()
        return None
