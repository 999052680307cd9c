"""What was found: numbers of every block, as a table, JSON, a picture and one page; and two of them compared.

Shapes: E experts, C classes, M tokens kept, K slots.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_lib.inspect.alarms import Alarm, alarms_of
from moe_lib.inspect.layer import Layer
from moe_lib.inspect.measures import Value, balance_losses, explain_balance_loss

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass
class Panel:
    """The blocks of a model on some data. In a notebook, its last line shows the picture and the table."""

    layers: list[Layer]
    unread: list[str] = field(default_factory=list)  # looks like a mixture of experts, and was not read
    title: str = ""
    loss: float = math.nan  # if routing was tampered with
    loss_permuted: float = math.nan  # minus `loss`: routing permuted in all blocks at once
    thresholds: dict[str, float] = field(default_factory=dict)  # of alarms, where they differ

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, key: int | str) -> Layer:
        if isinstance(key, int):
            return self.layers[key]
        for layer in self.layers:
            if layer.name == key:
                return layer
        raise KeyError(f"no block {key!r}; there are {', '.join(layer.name for layer in self.layers)}")

    @property
    def alarms(self) -> list[Alarm]:
        return alarms_of(self.layers, self.thresholds)

    def balance_losses(self) -> dict[str, float]:
        """A load-balancing loss on these tokens: as published, and with each of the usual mistakes."""
        return balance_losses([layer.state for layer in self.layers if layer.state is not None])

    def explain_balance_loss(self, value: float, rtol: float = 1e-3) -> list[str]:
        """Which formulas give the value that your model reports on these tokens."""
        return explain_balance_loss([la.state for la in self.layers if la.state is not None], value, rtol)

    # ------------------------------------------------------------------------------------ numbers

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings; NaN as None."""

        def plain(value: float) -> float | None:
            return None if math.isnan(value) else value

        return {
            "title": self.title,
            "loss": plain(self.loss),
            "loss_permuted": plain(self.loss_permuted),
            "unread": self.unread,
            "alarms": [alarm._asdict() for alarm in self.alarms],
            "layers": [
                {
                    "name": layer.name,
                    "family": layer.family,
                    "num_experts": layer.num_experts,
                    "top_k": layer.top_k,
                    "num_tokens": layer.num_tokens,
                    "load": layer.load_E,
                    "weight": layer.weight_E,
                    "mixture": layer.explanation,
                    "notes": layer.notes,
                    "class_expert": layer.class_expert,
                    "dropped": layer.dropped_E,
                    "measures": {
                        name: {"value": plain(v.value), "null": plain(v.null)}
                        for name, v in layer.measures.items()
                    },
                }
                for layer in self.layers
            ],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_json(cls, path: str | Path) -> Panel:
        """A panel written by `to_json`; it can be shown and compared, but knows no single tokens."""
        given = json.loads(Path(path).read_text())

        def number(value: float | None) -> float:
            return math.nan if value is None else value

        layers = [
            Layer(
                entry["name"], entry["family"], entry["num_experts"], entry["top_k"], entry["num_tokens"],
                entry["load"], entry["weight"],
                {name: Value(number(v["value"]), number(v["null"])) for name, v in entry["measures"].items()},
                entry["mixture"], entry["notes"], entry["class_expert"], entry["dropped"],
            )
            for entry in given["layers"]
        ]  # fmt: skip
        return cls(
            layers, given["unread"], given["title"], number(given["loss"]), number(given["loss_permuted"])
        )

    def table(self, nulls: bool = False) -> pd.DataFrame:
        """One row a block, one column a measure, as numbers; with `nulls` a second level of columns."""
        import pandas as pd

        rows = {}
        for layer in self.layers:
            row: dict[Any, float] = {}
            for name, value in layer.measures.items():
                if nulls:
                    row[(name, "value")], row[(name, "null")] = value
                else:
                    row[name] = value.value
            rows[layer.name] = row
        frame = pd.DataFrame.from_dict(rows, orient="index").dropna(axis=1, how="all")
        if nulls and len(frame.columns):
            frame.columns = pd.MultiIndex.from_tuples([*frame.columns])
        return frame

    def numbers(self) -> dict[str, float]:
        """Flat, for a logger: "block/measure", and the number of alarms."""
        found = {
            f"{layer.name}/{name}": value.value
            for layer in self.layers
            for name, value in layer.measures.items()
            if not math.isnan(value.value)
        }
        return found | {"alarms": float(len(self.alarms))}

    # ------------------------------------------------------------------------------------ pictures

    def figure(self) -> Figure:
        from moe_lib.inspect.pictures import panel_figure

        return panel_figure(self)

    def _repr_html_(self) -> str:
        from moe_lib.inspect.pictures import body

        return body(self)

    def to_html(self, path: str | Path) -> Path:
        """One page that needs no other file."""
        from moe_lib.inspect.pictures import page

        Path(path).write_text(page(self), encoding="utf-8")
        return Path(path)

    def __str__(self) -> str:
        lines = [f"{self.title or 'panel'}: {len(self.layers)} blocks, {len(self.alarms)} alarms"]
        lines += [f"  {alarm.layer}: {alarm.what}" for alarm in self.alarms]
        lines += [f"  not read: {entry}" for entry in self.unread]
        return "\n".join(lines)

    def compare(self, before: Panel) -> Comparison:
        """This panel beside an earlier one of the same model on the same data, block by block."""
        return Comparison(before, self)


@dataclass
class Comparison:
    before: Panel
    after: Panel

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.before.layers]
        if names != [layer.name for layer in self.after.layers]:
            raise ValueError("the two panels must be of the same blocks: inspect the same model twice")

    def saturation(self) -> list[Value]:
        """By block: share of a token's experts that it had before, mean over the tokens kept by both.

        1: routing no longer changes. Null: two choices that ignore each other, sum_e q_e q'_e / K.
        Both panels must have read the same data in the same order.
        """
        found = []
        for old, new in zip(self.before.layers, self.after.layers, strict=True):
            a, b = old.state, new.state
            if a is None or b is None or not len(a.kept.priority_M) or not len(b.kept.priority_M):
                found.append(Value(math.nan, math.nan))
                continue
            order_a, order_b = a.kept.position_M.argsort(), b.kept.position_M.argsort()
            common = torch.isin(a.kept.position_M[order_a], b.kept.position_M)
            mine = torch.isin(b.kept.position_M[order_b], a.kept.position_M)
            old_MK, new_MK = a.kept.chosen_MK[order_a][common], b.kept.chosen_MK[order_b][mine]
            same = ((old_MK[:, :, None] == new_MK[:, None]) & (old_MK >= 0)[:, :, None]).any(2).sum()
            size = torch.maximum((old_MK >= 0).sum(1), (new_MK >= 0).sum(1)).sum().clamp(min=1)
            q, p = (s.count_E / s.count_E.sum().clamp(min=1) for s in (a, b))
            found.append(Value(float(same / size), float((q * p).sum()) * max(a.num_slots, 1)))
        return found

    def table(self) -> pd.DataFrame:
        """Value after minus value before, and saturation."""
        frame = self.after.table().sub(self.before.table())
        frame["saturation"] = [value.value for value in self.saturation()]
        return frame.dropna(axis=1, how="all")

    def to_dict(self) -> dict[str, Any]:
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "saturation": [
                {
                    "value": None if math.isnan(v.value) else v.value,
                    "null": None if math.isnan(v.null) else v.null,
                }
                for v in self.saturation()
            ],
        }

    def figure(self) -> Figure:
        from moe_lib.inspect.pictures import comparison_figure

        return comparison_figure(self)

    def _repr_html_(self) -> str:
        from moe_lib.inspect.pictures import comparison_body

        return comparison_body(self)

    def to_html(self, path: str | Path) -> Path:
        from moe_lib.inspect.pictures import page

        Path(path).write_text(page(self), encoding="utf-8")
        return Path(path)
