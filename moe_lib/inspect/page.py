"""One HTML page of a panel or a comparison, with everything in it."""

from __future__ import annotations

import base64
import html
import io
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from moe_lib.inspect.measures import ABOUT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """<style>
table.moe { border-collapse: collapse; font: 13px sans-serif } table.moe th, table.moe td { padding: 2px 8px;
text-align: right; white-space: nowrap } table.moe tr.null { color: #666; border-bottom: 1px solid #ddd }
li.alarm { color: #a33a00; font-weight: 600 } figcaption { color: #444; font-size: 90% }
</style>"""
LISTED = 20  # alarms, at most


def panel_body(panel: Any) -> str:
    """The picture, the remarks and the table, without a page around them."""
    if not panel.layers:
        return f"<p>no block was read</p>{_remarks(panel)}"
    mark = "" if len(panel.layers) == 1 else "; a white mark: the experts right of it are never chosen"
    caption = (
        f"Load of every expert (above{mark}), and each block's measures beside their nulls, the values they "
        "take when nothing was learned."
    )
    tokens = ", ".join(sorted({str(layer.num_tokens) for layer in panel.layers}))
    return (
        f"{STYLE}<h3>{html.escape(panel.title)}: {len(panel.layers)} blocks, {tokens} tokens</h3>"
        f"{_remarks(panel)}{_image(panel.figure(), caption)}{_table(panel)}"
    )


def comparison_body(comparison: Any) -> str:
    caption = (
        "Each block's measures before and after, and the share of a token's experts that stayed the same."
    )
    return (
        f"{STYLE}{_image(comparison.figure(), caption)}<h3>after</h3>{panel_body(comparison.after)}"
        f"<h3>before</h3>{panel_body(comparison.before)}"
    )


def page(title: str, body: str) -> str:
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{_about(name)}</dd>" for name in ABOUT)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{html.escape(title or "panel")}</title></head>'
        '<body style="font-family: sans-serif; max-width: 1200px; margin: 1rem auto; padding: 0 1rem">'
        f"<h1>Mixture of experts: {html.escape(title)}</h1>{body}<h2>What the numbers are</h2>"
        f"<dl>{listed}</dl></body></html>"
    )


def _about(name: str) -> str:
    about = ABOUT[name]
    return html.escape(f"{about.formula}. Null: {about.null}. {about.sign}")


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


def _table(panel: Any) -> str:
    """Two rows a block: values and nulls."""
    names = [name for name in ABOUT if any(not math.isnan(layer[name]) for layer in panel.layers)]
    head = "".join(f'<th scope="col" title="{_about(name)}">{html.escape(name)}</th>' for name in names)
    body = ""
    for la in panel.layers:
        label = f"{la.name} ({la.family}, E = {la.num_experts}, K = {la.top_k})"
        for kind, part in ((label, "value"), ("null", "null")):
            cells = "".join(_cell(getattr(la.measures[name], part)) for name in names)
            body += f'<tr class="{part}"><th scope="row">{html.escape(kind)}</th>{cells}</tr>'
    return (
        '<div style="overflow-x:auto"><table class="moe"><thead><tr><th scope="col">block</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: float) -> str:
    if math.isnan(value):
        return "<td></td>"
    return f"<td>{value:.0f}</td>" if value.is_integer() and abs(value) >= 1 else f"<td>{value:.3f}</td>"
