"""What was found: numbers of every block, as a table, JSON, a picture and one page; and two of them compared.

Shapes: E experts, C classes, M tokens kept, K slots.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_lib.inspect.alarms import KINDS, Alarm, alarms_of
from moe_lib.inspect.measures import (
    ABOUT,
    NOTHING,
    Layer,
    Value,
    balance_losses,
    explain_balance_loss,
    how_many,
)  # fmt: skip
from moe_lib.inspect.state import BlockState

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def plain(value: Any) -> Any:
    """Numbers, lists, dictionaries and strings alone; None for what is no finite number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.name != "state"}
    if isinstance(value, Value | Alarm):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value


class Shown:
    """What a panel and a comparison have in common: in a notebook, their last line shows them."""

    title: str

    def _repr_html_(self) -> str:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def to_json(self, path: str | Path | None = None) -> str:
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text)
        return text

    def to_html(self, path: str | Path) -> Path:
        """One page that needs no other file."""
        from moe_lib.inspect.page import page

        Path(path).write_text(page(self.title, self._repr_html_()), encoding="utf-8")
        return Path(path)


@dataclass
class Panel(Shown):
    """The blocks of a model on some data."""

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

    @property
    def advice(self) -> list[str]:
        """What to try, once for each kind of alarm."""
        kinds = dict.fromkeys(alarm.kind for alarm in self.alarms)
        return [f"what to try ({kind}): {KINDS[kind].advice}" for kind in kinds]

    @property
    def loss_line(self) -> str:
        """The loss, and that with tampered routing, if it was asked for."""
        if math.isnan(self.loss_permuted):
            return ""
        permuted = self.loss + self.loss_permuted
        return f"loss {self.loss:.4f}; with routing permuted in all blocks {permuted:.4f}"

    def balance_losses(self) -> dict[str, float]:
        """A load-balancing loss on these tokens: as published, and with each of the usual mistakes."""
        return balance_losses(self._states())

    def explain_balance_loss(self, value: float, rtol: float = 1e-3) -> list[str]:
        """Which formulas give the value that your model reports on these tokens."""
        return explain_balance_loss(self._states(), value, rtol)

    def _states(self) -> list[BlockState]:
        return [layer.state for layer in self.layers if layer.state is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings; None for what is no finite number."""
        return plain(self) | {"alarms": plain(self.alarms)}

    @classmethod
    def from_json(cls, path: str | Path) -> Panel:
        """A panel written by `to_json`; it can be shown and compared, but knows no single tokens."""
        given = json.loads(Path(path).read_text())
        layers = []
        for entry in given["layers"]:
            measures = {
                k: Value(_number(v["value"]), _number(v["null"])) for k, v in entry["measures"].items()
            }
            layers.append(Layer(**{**entry, "measures": dict.fromkeys(ABOUT, NOTHING) | measures}))
        losses = _number(given["loss"]), _number(given["loss_permuted"])
        return cls(layers, given["unread"], given["title"], *losses, given["thresholds"])

    def table(self, nulls: bool = False) -> pd.DataFrame:
        """One row a block, one column a measure, as numbers; with `nulls` a second level of columns."""
        import pandas as pd

        cells = {
            la.name: {(k, part): getattr(v, part) for k, v in la.measures.items() for part in Value._fields}
            for la in self.layers
        }
        frame = pd.DataFrame(cells).T.dropna(axis=1, how="all")
        return frame.sort_index(axis=1) if nulls else frame.xs("value", axis="columns", level=1)  # type: ignore[return-value]

    def numbers(self) -> dict[str, float]:
        """Flat, for a logger: "block/measure", and the number of alarms."""
        found = {f"{la.name}/{k}": v.value for la in self.layers for k, v in la.measures.items()}
        return {k: v for k, v in found.items() if not math.isnan(v)} | {"alarms": float(len(self.alarms))}

    def figure(self) -> Figure:
        from moe_lib.inspect.pictures import panel_figure

        return panel_figure(self)

    def _repr_html_(self) -> str:
        from moe_lib.inspect.page import panel_body

        return panel_body(self)

    def __str__(self) -> str:
        lines = [
            f"{self.title or 'panel'}: {how_many(self.layers, 'block')}, {how_many(self.alarms, 'alarm')}"
        ]
        lines += [f"  {self.loss_line}"] if self.loss_line else []
        lines += [f"  {alarm.layer}: {alarm.what}" for alarm in self.alarms]
        lines += [f"  {text}" for text in self.advice]
        lines += [f"  not read: {entry}" for entry in self.unread]
        return "\n".join(lines)

    def compare(self, before: Panel) -> Comparison:
        """This panel beside an earlier one of the same model on the same data, block by block."""
        return Comparison(before, self)


@dataclass
class Comparison(Shown):
    before: Panel
    after: Panel

    def __post_init__(self) -> None:
        self.title = self.after.title
        blocks = [[(la.name, la.num_experts) for la in panel.layers] for panel in (self.before, self.after)]
        if blocks[0] != blocks[1]:
            raise ValueError("the two panels must be of the same blocks: inspect the same model twice")

    def saturation(self) -> list[Value]:
        """By block: share of a token's experts that it had before, mean over the tokens kept by both.

        1: routing no longer changes. Null: two choices that ignore each other, sum_e q_e q'_e / K.
        Both panels must have read the same data in the same order.
        """
        both = zip(self.before.layers, self.after.layers, strict=True)
        return [_saturation(old.state, new.state) for old, new in both]

    def table(self) -> pd.DataFrame:
        """Value after minus value before, and saturation."""
        frame = self.after.table().sub(self.before.table())
        frame["saturation"] = [value.value for value in self.saturation()]
        return frame.dropna(axis=1, how="all")

    def to_dict(self) -> dict[str, Any]:
        return {
            "before": self.before.to_dict(), "after": self.after.to_dict(),
            "saturation": plain(self.saturation()),
        }  # fmt: skip

    def figure(self) -> Figure:
        from moe_lib.inspect.pictures import comparison_figure

        return comparison_figure(self)

    def _repr_html_(self) -> str:
        from moe_lib.inspect.page import comparison_body

        return comparison_body(self)


def _saturation(a: BlockState | None, b: BlockState | None) -> Value:
    if a is None or b is None or not len(a.kept.position_M) or not len(b.kept.position_M):
        return NOTHING
    a_kept, b_kept = (s.kept.of(s.kept.position_M.argsort()) for s in (a, b))
    old_MK = a_kept.chosen_MK[torch.isin(a_kept.position_M, b_kept.position_M)]
    new_MK = b_kept.chosen_MK[torch.isin(b_kept.position_M, a_kept.position_M)]
    same = ((old_MK[:, :, None] == new_MK[:, None]) & (old_MK >= 0)[:, :, None]).any(2).sum()
    size = torch.maximum((old_MK >= 0).sum(1), (new_MK >= 0).sum(1)).sum().clamp(min=1)
    q_E, p_E = (s.count_E / s.count_E.sum().clamp(min=1) for s in (a, b))
    return Value(float(same / size), float(q_E @ p_E) * max(a.num_slots, 1))
