"""What is known of one block; E experts."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_lib.inspect.measures import Value
from moe_lib.inspect.state import BlockState


@dataclass
class Layer:
    """One block's numbers."""

    name: str
    family: str
    num_experts: int
    top_k: int
    num_tokens: int
    load_E: list[float]  # sums to 1
    weight_E: list[float]  # mean weight; sums to 1
    measures: dict[str, Value]
    explanation: str = ""  # of the mixture check
    notes: list[str] = field(default_factory=list)
    class_expert: dict[str, list[float]] = field(default_factory=dict)  # share of a class's slots by expert
    dropped_E: list[float] = field(default_factory=list)  # cost of dropping each expert, if asked for
    state: BlockState | None = field(default=None, repr=False)

    @property
    def soft(self) -> bool:
        """Does every token that is served use all experts? As `BlockState.soft`; also without a state."""
        return self.top_k == self.num_experts and self["unfilled"] <= self["dropped"] + 1e-9

    def __getitem__(self, measure: str) -> float:
        return self.measures[measure].value
