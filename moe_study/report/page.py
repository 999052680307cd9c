"""A table as HTML or Markdown, and an executed notebook as one HTML page."""

from __future__ import annotations

import html
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from bs4 import BeautifulSoup
from IPython.display import HTML
from markupsafe import Markup
from nbformat import NotebookNode

from moe_study import store
from moe_study.report import provenance


def as_html(table: pd.DataFrame) -> HTML:
    """A table for the report: index as ordinary columns, no border; "none in this profile" if empty."""
    if table.empty:
        return HTML("<p>None in this profile.</p>")
    return HTML(table.reset_index().to_html(index=False, border=0, justify="left"))


def folded(title: str, table: pd.DataFrame) -> HTML:
    """A table that is shown on a click."""
    return HTML(
        f'<details class="more"><summary>{html.escape(title)}</summary>{as_html(table).data}</details>'
    )


def markdown(table: pd.DataFrame) -> str:
    """A data frame as a Markdown table; "None." where it has neither rows nor columns."""
    if not len(table.columns):
        return "None."
    flat = table.reset_index()
    cells = [[str(c) for c in flat.columns], ["---"] * len(flat.columns)]
    cells += [[str(v) for v in row] for row in flat.itertuples(index=False)]
    return "\n".join("| " + " | ".join(v.replace("|", "\\|") for v in row) + " |" for row in cells)


def number_figures(content: NotebookNode) -> None:
    """Give each figure of `notebook.show` what the page says of it: number, caption, origin, commands. The
    caption that the notebook shows below it goes."""
    number = 0
    for cell in content.cells:
        if "outputs" not in cell:
            continue
        told = [(output, output.get("metadata", {}).get(provenance.KEY, {})) for output in cell.outputs]
        cell.outputs = [output for output, about in told if "caption_of" not in about]
        for output, about in told:
            if "figure" in about:
                number += 1
                caption = about["caption"] or about["figure"].replace("/", " ")
                output.metadata["figure"] = {
                    "caption": caption,
                    "shown": provenance.marked(caption),
                    "origin": provenance.below(about["figure"], about["sources"]),
                    "commands": provenance.commands(about["sources"]),
                    "number": number,
                    **{side: output.metadata["image/png"][side] for side in ("width", "height")},
                }


class Arranged(NamedTuple):
    """The page's content, and its sections for the list of contents."""

    body: Markup
    contents: list[dict[str, Any]]


def arrange(body: str) -> Arranged:
    """Give headings an id, fold the parts of sections (level 3) and the sections tagged "fold", let tables
    scroll, and list the contents."""
    soup = BeautifulSoup(body, "html.parser")
    for link in soup.find_all("a", class_="anchor-link"):
        link.decompose()
    contents: list[dict[str, Any]] = []
    taken: Counter[str] = Counter()
    for heading in soup.find_all(["h2", "h3", "h4"]):
        stem = re.sub(r"\W+", "-", heading.get_text().lower()).strip("-")
        taken[stem] += 1
        heading["id"] = f"{stem}--{taken[stem]}" if taken[stem] > 1 else stem
        entry: dict[str, Any] = {"id": heading["id"], "title": heading.get_text(), "parts": []}
        if heading.name == "h2":
            contents.append(entry)
        elif heading.name == "h3" and contents:
            contents[-1]["parts"].append(entry)
    for cell in soup.find_all("div", class_="cell"):
        if "fold" in cell["class"]:
            for heading in cell.find_all("h2", recursive=False):
                heading["class"] = "fold"
        cell.unwrap()  # a section may begin inside a cell and end in another
    _fold(soup, "h3", ("h2", "h3"))
    _fold(soup, "h2", ("h2",), "fold")
    for table in soup.find_all("table"):
        if table.find_parent("div", class_="scroll") is None:
            table.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
    for cell in soup.find_all("td"):
        length = len(cell.get_text())
        if length > 24 and not cell.has_attr("class"):
            cell["class"] = "long" if length > 60 else "wrap"
    return Arranged(Markup(soup.decode(formatter="html5")), contents)


def _fold(soup: BeautifulSoup, level: str, ends: Sequence[str], kind: str | None = None) -> None:
    """Put everything from a heading to the next of `ends` into <details>, the heading as its summary."""
    for heading in soup.find_all(level, class_=kind) if kind else soup.find_all(level):
        following = list(heading.next_siblings)
        until = next(
            (at for at, one in enumerate(following) if getattr(one, "name", None) in ends), len(following)
        )
        details, summary = soup.new_tag("details"), soup.new_tag("summary")
        details["class"] = "part" if level == "h3" else "section"
        heading.insert_before(details)
        summary.append(heading.extract())
        details.append(summary)
        for one in following[:until]:
            details.append(one.extract())


def render(notebook: Path, target: Path) -> None:
    """An executed notebook as one HTML page without code, scripts or network, figures embedded."""
    import nbformat
    from nbconvert import HTMLExporter

    content = nbformat.read(notebook, as_version=4)
    number_figures(content)
    exporter = HTMLExporter(
        template_name="template", extra_template_basedirs=[str(Path(__file__).parent)], exclude_input=True
    )
    exporter.register_filter("arranged", arrange)
    title = content.cells[0].source.lstrip("# ").split("\n")[0]
    page, _ = exporter.from_notebook_node(content, resources={"title": title})
    store.write_bytes(target, page.encode())


if __name__ == "__main__":
    render(Path(sys.argv[1]), Path(sys.argv[2]))
