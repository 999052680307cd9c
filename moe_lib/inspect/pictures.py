"""Pictures and pages of a panel or a comparison. Matplotlib is imported when something is drawn.

Shapes: L blocks, E experts, C classes.
"""

from __future__ import annotations

import base64
import html
import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lib.inspect.layer import CAUSAL, Layer
from moe_lib.inspect.measures import ABOUT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"  # Okabe and Ito
STRIP = (
    ("effective experts", "experts in use"), ("never chosen", "never chosen"), ("dropped", "dropped tokens"),
    ("I(x;E)", "I(x;E), nats"), ("I(c;E)", "I(c;E), nats"), ("input separation", "input separation"),
    ("switching", "switching"), ("answers alike, by use", "answers alike"),
    ("follows scores", "follows scores"), ("cost of permuting", "cost of permuting, nats"),
)  # fmt: skip


AT_LEAST = {  # top of the axis, so that nothing looks like something
    "never chosen": 1.0, "dropped": 0.05, "answers alike, by use": 1.0, "input separation": 0.1,
    "I(c;E)": 0.1, "I(x;E)": 0.1, "cost of permuting": 0.01, "follows scores": 1.0, "switching": 1.0,
}  # fmt: skip


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _short(names: list[str]) -> list[str]:
    """Names of blocks without the parts that all of them share."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return [name if len(name) <= 24 else "…" + name[-23:] for name in names]
    while len({p[0] for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[1:] for p in parts]
    while len({p[-1] for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[:-1] for p in parts]
    return [".".join(p) for p in parts]


def _load_matrix(layers: list[Layer]) -> np.ndarray:
    """[L, E] load times E, each block's experts from the most used to the least; NaN beyond its experts."""
    widest = max(layer.num_experts for layer in layers)
    grid_LE = np.full((len(layers), widest), np.nan)
    for row, layer in enumerate(layers):
        grid_LE[row, : layer.num_experts] = np.sort(layer.load_E)[::-1] * layer.num_experts
    return grid_LE


def panel_figure(panel: Any) -> Figure:
    """Above: the load of every expert of every block. Below: each block's measures beside their nulls."""
    layers = panel.layers
    if not layers:
        raise ValueError("the panel has no block: nothing was read")
    shown = [
        (name, title) for name, title in STRIP
        if any(not math.isnan(la.measures[name].value) for la in layers if name in la.measures)
    ]  # fmt: skip
    columns = 4
    strip_rows = -(-len(shown) // columns)
    heat_height = min(max(1.2 + 0.16 * len(layers), 2.4), 9.0) if len(layers) > 1 else 2.8
    figure = _figure(11, heat_height + 2.3 * strip_rows)
    grid = figure.add_gridspec(1 + strip_rows, columns, height_ratios=[heat_height] + [2.3] * strip_rows)
    top = figure.add_subplot(grid[0, :])
    if len(layers) == 1:
        _draw_load(top, layers[0])
    else:
        _draw_heat(figure, top, layers)
    for i, (name, title) in enumerate(shown):
        axis = figure.add_subplot(grid[1 + i // columns, i % columns])
        _draw_strip(axis, layers, name, title, legend=i == 0)
    return figure


def _draw_load(axis: Any, layer: Layer) -> None:
    experts = np.arange(layer.num_experts)
    axis.bar(experts - 0.2, layer.load_E, 0.4, color=BLUE, label="load: share of the slots")
    axis.bar(experts + 0.2, layer.weight_E, 0.4, color=ORANGE, label="mean weight")
    axis.axhline(1 / layer.num_experts, color=GREY, ls=":", lw=1.3, label="balanced: 1 / E")
    axis.set(xlabel="expert", ylabel="share", title=f"{layer.name}: load of each expert")
    _whole_numbers(axis)
    axis.legend(frameon=False, fontsize=9, ncols=3)


def _draw_heat(figure: Any, axis: Any, layers: list[Layer]) -> None:
    from matplotlib.colors import TwoSlopeNorm

    grid_LE = _load_matrix(layers)
    picture = axis.imshow(
        np.ma.masked_invalid(grid_LE), aspect="auto", interpolation="nearest", cmap="PuOr_r",
        norm=TwoSlopeNorm(1.0, 0.0, min(max(2.0, float(np.nanmax(grid_LE))), 4.0)),
    )  # fmt: skip
    axis.set_facecolor("#eeeeee")
    names = _short([layer.name for layer in layers])
    step = -(-len(layers) // 30)
    axis.set_yticks(range(0, len(layers), step), names[::step], fontsize=8)
    axis.set(
        xlabel="experts of a block, from the most used to the least", title="load of each expert; 1: balanced"
    )
    figure.colorbar(picture, ax=axis, label="load x E, darkest at 4 or more", pad=0.01)
    for row, layer in enumerate(layers):
        dead = int((np.asarray(layer.load_E) == 0).sum())
        if dead:
            left = layer.num_experts - dead - 0.5
            axis.plot([left, left], [row - 0.5, row + 0.5], color="#000000", lw=1.6)
    if grid_LE.shape[1] <= 12 and len(layers) <= 8:
        for (row, column), value in np.ndenumerate(grid_LE):
            if not math.isnan(value):
                dark = value > 1.75 or value < 0.35
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                          color="white" if dark else "black")  # fmt: skip


def _draw_strip(axis: Any, layers: list[Layer], name: str, title: str, legend: bool) -> None:
    """One measure, block after block, beside its null."""
    depth = np.arange(len(layers))
    values = np.array([la.measures[name].value if name in la.measures else math.nan for la in layers])
    nulls = np.array([la.measures[name].null if name in la.measures else math.nan for la in layers])
    line = "-" if len(layers) > 1 else ""
    few = len(layers) < 13
    axis.plot(depth, nulls, ls=line, marker="D" if few else "", mfc="none", ms=5, color=GREY, label="null")
    axis.plot(depth, values, ls=line, marker="o", ms=5 if few else 2.5, color=BLUE, label="this model")
    both = np.append(values, nulls)
    known = np.append(both[~np.isnan(both)], 0.0)
    low, high = float(known.min()), max(float(known.max()), AT_LEAST.get(name, 1e-3))
    axis.set_ylim(low - 0.04 * (high - low), high + 0.12 * (high - low))
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("block", fontsize=9)
    axis.tick_params(labelsize=8)
    _whole_numbers(axis)
    if len(layers) == 1:
        axis.set_xlim(-1, 1)
        axis.set_xticks([])
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend(frameon=False, fontsize=8)


def comparison_figure(comparison: Any) -> Figure:
    """Every measure before and after, block by block."""
    before, after = comparison.before.layers, comparison.after.layers
    shown = [
        (name, title) for name, title in STRIP
        if any(name in la.measures and not math.isnan(la.measures[name].value) for la in after)
    ]  # fmt: skip
    saturation = [value.value for value in comparison.saturation()]
    panels = [*shown, ("", "saturation: share of experts kept")]
    columns = 4
    figure = _figure(11, 2.5 * -(-len(panels) // columns))
    depth = np.arange(len(after))
    for i, (name, title) in enumerate(panels):
        axis = figure.add_subplot(-(-len(panels) // columns), columns, i + 1)
        style: dict[str, Any] = {"marker": "o", "ms": 4, "lw": 1.4, "ls": "-" if len(after) > 1 else ""}
        if name:
            for layers, colour, label in ((before, ORANGE, "before"), (after, BLUE, "after")):
                values = [la.measures[name].value if name in la.measures else math.nan for la in layers]
                axis.plot(depth, values, color=colour, label=label, **style)
        elif not all(map(math.isnan, saturation)):
            axis.plot(depth, saturation, color=GREEN, **style)
            axis.set_ylim(-0.03, 1.05)
        else:
            axis.text(0.5, 0.5, "needs two live panels", ha="center", transform=axis.transAxes, fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("block", fontsize=9)
        axis.tick_params(labelsize=8)
        _whole_numbers(axis)
        axis.spines[["top", "right"]].set_visible(False)
        if i == 0:
            axis.legend(frameon=False, fontsize=8)
    return figure


def history_figure(history: list[dict[str, float]], measure: str) -> Figure:
    """One measure over training: a line per block."""
    names = [key for key in (history[-1] if history else {}) if key.endswith(f"/{measure}")]
    if not names:
        raise ValueError(f"{measure!r} was not measured; there are {', '.join(ABOUT)}")
    figure = _figure(7, 3.6)
    axis = figure.add_subplot()
    steps = [row["step"] for row in history]
    import matplotlib

    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(names)))
    labels = _short([name.removesuffix(f"/{measure}") for name in names])
    for name, colour, label in zip(names, colours, labels, strict=True):
        axis.plot(
            steps, [row.get(name, math.nan) for row in history], marker="o", ms=3, color=colour, label=label
        )
    axis.set(xlabel="training step", ylabel=measure)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    if len(names) <= 8:
        axis.legend(frameon=False, fontsize=8, title="block", title_fontsize=8)
    else:
        bar = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, len(names) - 1), "viridis")
        figure.colorbar(bar, ax=axis, label="block")
    return figure


# ------------------------------------------------------------------------------------------ page


def escaped(text: object) -> str:
    return html.escape(str(text), quote=True)


def _image(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = escaped(caption)
    return (
        f'<figure><img style="max-width:100%" src="data:image/png;base64,{data}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _cell(value: float) -> str:
    if math.isnan(value):
        return "<td></td>"
    return f"<td>{value:.0f}</td>" if value == int(value) and abs(value) >= 1 else f"<td>{value:.3f}</td>"


def _table(panel: Any) -> str:
    names = [
        name for name in (*ABOUT, *CAUSAL)
        if any(name in la.measures and not math.isnan(la.measures[name].value) for la in panel.layers)
    ]  # fmt: skip
    head = "".join(f'<th scope="col" title="{escaped(_about(name))}">{escaped(name)}</th>' for name in names)
    body = ""
    for layer in panel.layers:
        cells = "".join(
            _cell(layer.measures[name].value if name in layer.measures else math.nan) for name in names
        )
        nulls = "".join(
            _cell(layer.measures[name].null if name in layer.measures else math.nan) for name in names
        )
        label = f"{layer.name} ({layer.family}, E = {layer.num_experts}, K = {layer.top_k})"
        body += f'<tr><th scope="row">{escaped(label)}</th>{cells}</tr>'
        body += f'<tr class="null"><th scope="row">null</th>{nulls}</tr>'
    return (
        '<div style="overflow-x:auto"><table class="moe"><thead><tr><th scope="col">block</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _about(name: str) -> str:
    if name in CAUSAL:
        return CAUSAL[name]
    about = ABOUT[name]
    return f"{about.formula}. Null: {about.null}. {about.sign}"


def _remarks(panel: Any) -> str:
    lines = [(f"{alarm.layer}: {alarm.what}", "alarm") for alarm in panel.alarms]
    shown, more = lines[:20], len(lines) - 20
    if more > 0:
        shown.append((f"and {more} more; see panel.alarms", "alarm"))
    shown += [(f"not read: {entry}", "") for entry in panel.unread]
    checks: dict[str, int] = {}
    for layer in panel.layers:
        for text in [layer.explanation, *layer.notes]:
            if text:
                checks[text] = checks.get(text, 0) + 1
    shown += [(f"{count} of {len(panel.layers)} blocks: {text}", "") for text, count in checks.items()]
    if not math.isnan(panel.loss):
        permuted = panel.loss + panel.loss_permuted
        cost = f"loss {panel.loss:.4f}; with routing permuted in all blocks {permuted:.4f}"
        shown.insert(0, (cost, ""))
    if not panel.alarms:
        shown.insert(0, ("no alarm", ""))
    return "<ul>" + "".join(f'<li class="{kind}">{escaped(text)}</li>' for text, kind in shown) + "</ul>"


def body(panel: Any) -> str:
    """The picture, the remarks and the table, without a page around them."""
    if not panel.layers:
        return f"<p>no block was read</p>{_remarks(panel)}"
    caption = (
        "Load of every expert (above; a black mark: the experts right of it are never chosen), and each "
        "block's measures beside their nulls, the values they take when nothing was learned."
    )
    tokens = ", ".join(sorted({str(layer.num_tokens) for layer in panel.layers}))
    return (
        f"{STYLE}<h3>{escaped(panel.title)}: {len(panel.layers)} blocks, {tokens} tokens</h3>"
        f"{_remarks(panel)}{_image(panel.figure(), caption)}{_table(panel)}"
    )


def comparison_body(comparison: Any) -> str:
    caption = (
        "Each block's measures before and after, and the share of a token's experts that stayed the same."
    )
    return (
        f"{STYLE}{_image(comparison.figure(), caption)}<h3>after</h3>{body(comparison.after)}"
        f"<h3>before</h3>{body(comparison.before)}"
    )


STYLE = """<style>
table.moe { border-collapse: collapse; font: 13px sans-serif } table.moe th, table.moe td { padding: 2px 8px;
text-align: right; white-space: nowrap } table.moe tr.null { color: #666; border-bottom: 1px solid #ddd }
li.alarm { color: #a33a00; font-weight: 600 } figcaption { color: #444; font-size: 90% }
</style>"""


def page(shown: Any) -> str:
    """One HTML page with everything in it."""
    panel = getattr(shown, "after", shown)
    inner = body(panel) if panel is shown else comparison_body(shown)
    listed = "".join(
        f"<dt>{escaped(name)}</dt><dd>{escaped(_about(name))}</dd>" for name in (*ABOUT, *CAUSAL)
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{escaped(panel.title or "panel")}</title></head>'
        '<body style="font-family: sans-serif; max-width: 1200px; margin: 1rem auto; padding: 0 1rem">'
        f"<h1>Mixture of experts: {escaped(panel.title)}</h1>{inner}<h2>What the numbers are</h2>"
        f"<dl>{listed}</dl>"
        "</body></html>"
    )
