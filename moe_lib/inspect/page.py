"""One HTML page of a panel or a comparison, with everything in it."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from typing import TYPE_CHECKING, Any

from moe_lib.inspect.measures import ABOUT, Layer, Value, how_many

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """<style>
table.moe { border-collapse: collapse; font: 13px sans-serif } table.moe th, table.moe td { padding: 2px 8px;
text-align: right; white-space: nowrap } table.moe tr:nth-child(even) { color: #666 }
li.alarm { color: #a33a00; font-weight: 600 } figcaption { color: #444; font-size: 90% }
</style>"""
LISTED = 20  # alarms, at most


def comparison_body(comparison: Any) -> str:
    """What a notebook shows, and a page holds: the picture, and both panels."""
    caption = (
        "Each block's measures before and after, and the share of a token's experts that stayed the same."
    )
    after, before = panel_body(comparison.after), panel_body(comparison.before)
    return f"{STYLE}{_image(comparison.figure(), caption)}<h3>after</h3>{after}<h3>before</h3>{before}"


def panel_body(panel: Any) -> str:
    """What a notebook shows, and a page holds: the picture, the remarks and the table."""
    if not panel.layers:
        return f"<p>no block was read</p>{_remarks(panel)}"
    mark = "" if len(panel.layers) == 1 else "; a white mark: the experts right of it are never chosen"
    caption = (
        f"Load of every expert (above{mark}), and each block's measures beside their nulls, the values they "
        "take when nothing was learned."
    )
    tokens = ", ".join(sorted({str(layer.num_tokens) for layer in panel.layers}))
    return (
        f"{STYLE}<h3>{html.escape(panel.title)}: {how_many(panel.layers, 'block')}, {tokens} tokens</h3>"
        f"{_remarks(panel)}{_image(panel.figure(), caption)}{_table(panel.layers)}"
    )


def page(title: str, body: str) -> str:
    listed = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(f'{a.formula}. Null: {a.null}. {a.sign}')}</dd>"
        for name, a in ABOUT.items()
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{html.escape(title or "panel")}</title></head>'
        '<body style="font-family: sans-serif; max-width: 1200px; margin: 1rem auto; padding: 0 1rem">'
        f"<h1>Mixture of experts: {html.escape(title)}</h1>{body}<h2>What the numbers are</h2>"
        f"<dl>{listed}</dl></body></html>"
    )


def _image(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    data, text = base64.b64encode(buffer.getvalue()).decode(), html.escape(caption)
    return (
        f'<figure><img style="max-width:100%" src="data:image/png;base64,{data}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _remarks(panel: Any) -> str:
    alarms = [f"{alarm.layer}: {alarm.what}" for alarm in panel.alarms]
    if len(alarms) > LISTED:
        alarms[LISTED:] = [f"and {len(alarms) - LISTED} more; see panel.alarms"]
    others = panel.advice if alarms else ["no alarm"]
    others += [panel.loss_line] if panel.loss_line else []
    others += [f"not read: {entry}" for entry in panel.unread]
    said = Counter(text for layer in panel.layers for text in [layer.explanation, *layer.notes] if text)
    others += [f"{count} of {len(panel.layers)} blocks: {text}" for text, count in said.items()]
    lines = [f'<li class="alarm">{html.escape(text)}</li>' for text in alarms]
    return f"<ul>{''.join(lines)}{''.join(f'<li>{html.escape(text)}</li>' for text in others)}</ul>"


def _table(layers: list[Layer]) -> str:
    """Two rows a block: values and nulls."""
    import pandas as pd

    found = {
        (f"{la.name} ({la.family}, E = {la.num_experts}, K = {la.top_k})", part): {
            name: getattr(la.measures[name], part) for name in ABOUT
        }
        for la in layers
        for part in Value._fields
    }
    frame = pd.DataFrame(found).T.dropna(axis=1, how="all")
    table = frame.to_html(float_format=number, na_rep="", classes="moe", border=0)
    return f'<div style="overflow-x:auto">{table}</div>'


def number(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() and abs(value) >= 1 else f"{value:.3f}"
