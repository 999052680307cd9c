"""The numbers of one block, ready to be shown.

Shapes: E experts, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_lib.inspect.measures import ABOUT, Value, load
from moe_lib.inspect.state import BlockState

CAUSAL = {
    "cost of permuting": "loss with another token's routing for every token, minus the loss, nats",
    "cost of swapping": "loss when the two most used experts serve each other's tokens, minus the loss, nats",
    "cost of dropping": "loss without the most used expert, its weight given to others, minus the loss, nats",
}


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
    class_expert: dict[str, list[float]] = field(
        default_factory=dict
    )  # share of each class's slots by expert
    dropped_E: list[float] = field(default_factory=list)  # cost of dropping each expert, if asked for
    state: BlockState | None = field(default=None, repr=False)

    def __getitem__(self, measure: str) -> float:
        return self.measures[measure].value


def layer_of(name: str, family: str, state: BlockState, measures: dict[str, Value], explanation: str,
             notes: list[str], names: dict[int, str] | None) -> Layer:  # fmt: skip
    state.finish()
    served = (state.tokens - state.dropped).clamp(min=1)
    class_expert: dict[str, list[float]] = {}
    if len(state.class_key):
        classes_C, table_CE = state.class_table()
        largest = table_CE.sum(1).argsort(descending=True)[:100].sort().values  # to be shown; all are counted
        share_CE = table_CE[largest] / table_CE[largest].sum(1, keepdim=True)
        shown = zip(classes_C[largest].tolist(), share_CE.tolist(), strict=True)
        class_expert = {(names or {}).get(c, str(c)): share_E for c, share_E in shown}
    return Layer(
        name, family, state.num_experts, state.num_slots, int(state.tokens), load(state).tolist(),
        (state.weight_E / served).tolist(), {key: measures[key] for key in ABOUT if key in measures},
        explanation, notes, class_expert, state=state,
    )  # fmt: skip
