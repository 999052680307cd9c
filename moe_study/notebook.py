"""What a notebook needs beyond the library: strict parameters, and figures that are saved and shown."""

from __future__ import annotations

import ast
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from moe_study import study
from moe_study.configs.arms import CONFIRMATORY
from moe_study.engine import watched
from moe_study.report import plots, provenance, selection
from moe_study.report import verdicts as words

# Every parameter of a notebook: its type, its least value, and both in words. Names of profiles and data sets
# are checked where they are used.
PARAMETERS: dict[str, tuple[type, int | None, str]] = {
    "profile": (str, None, "a name"),
    "dataset": (str, None, "a name"),
    "workers": (int, 0, "an integer of 0 or more"),
    "train": (bool, None, "True or False"),
    "seed": (int, 0, "an integer of 0 or more"),
    "experts": (int, 1, "an integer of 1 or more"),
    "top_k": (int, 1, "an integer of 1 or more"),
    "epochs": (int, 1, "an integer of 1 or more"),
}


def check_parameters(executed: Sequence[str], allowed: Iterable[str]) -> None:
    """Refuse parameters that the notebook does not have (papermill itself only warns), and wrong values.

    Args:
        executed: IPython's `In`, the source of every cell run so far. Papermill injects its parameters as
            a cell that starts with "# Parameters".
        allowed: the names in the notebook's own parameters cell.

    Raises:
        StudyError: naming the unknown parameter, or the one with a wrong value.
    """
    values: dict[str, Any] = {}
    for source in executed:
        if source.startswith("# Parameters\n"):
            names = {
                target.id
                for node in ast.parse(source).body
                if isinstance(node, ast.Assign)
                for target in node.targets
                if isinstance(target, ast.Name)
            }
            if unknown := sorted(names - set(allowed)):
                raise study.StudyError(
                    f"unknown parameter {unknown[0]!r}; this notebook has {', '.join(sorted(allowed))}"
                )
        values |= _literals(source)
    for name in sorted(set(allowed) & set(values) & set(PARAMETERS)):
        kind, least, words = PARAMETERS[name]
        if type(values[name]) is not kind or (least is not None and values[name] < least):
            raise study.StudyError(f"parameter {name} must be {words}, got {values[name]!r}")


def _literals(source: str) -> dict[str, Any]:
    """Names and values of a cell that assigns literals and does nothing else; of any other cell nothing."""
    try:
        body = ast.parse(source).body
        return {node.targets[0].id: ast.literal_eval(node.value) for node in body}  # type: ignore[attr-defined]
    except (SyntaxError, ValueError, AttributeError):
        return {}


def show(figure: Figure, path: str, runs: Sequence[study.Run] = (), files: Sequence[Path] = ()) -> None:
    """Save a figure below the figures folder, and show it inline with its caption and sources below it; the
    report's page finds both in the metadata of the output.

    Args:
        path: without suffix, such as "core/snnl/cifar10/curves".
        runs: those whose results the figure shows.
        files: others that it shows.
    """
    from IPython.display import HTML, Image, display

    sources = provenance.sources(runs, files)
    plots.save(figure, path, provenance.in_words(sources))
    caption = str(figure.get_label())
    about = {"figure": path, "caption": caption, "sources": sources}
    alt = caption or path.replace("/", " ")
    picture = Image(filename=str(plots.target(path)), embed=True, retina=True, alt=alt)
    display(picture, metadata={provenance.KEY: about})
    below = (
        f"<p>{provenance.marked(caption)}</p>\n<details><summary>where it comes from</summary>"
        f"{html.escape(provenance.below(path, sources))}</details>"
    )
    display(HTML(below), metadata={provenance.KEY: {"caption_of": path}})


def picture(figure: Figure) -> Any:
    """A figure to display now and again, without a file of its own: a curve that grows."""
    from IPython.display import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=96 * plots.RETINA)
    return Image(data=drawn.getvalue(), retina=True)


def arms_table(runs: Sequence[study.Run], descriptions: Mapping[str, str]) -> pd.DataFrame:
    """One row an arm: what it is, its learning rate, and how many seeds are planned."""
    rows = [
        {
            "arm": arm,
            "what it is": descriptions.get(arm, "an arm of your own"),
            "learning rate": ", ".join(
                dict.fromkeys(f"{run.train.learning_rate:g}" for run in runs if run.arm == arm)
            ),
            "seeds planned": sum(run.arm == arm for run in runs),
        }
        for arm in dict.fromkeys(run.arm for run in runs)
    ]
    return pd.DataFrame(rows).set_index("arm")


def real_data(*explored: str) -> pd.DataFrame:
    """What profile `core` found on real data, from the committed result files: its verdicts on the claims of
    some studies. What could not be tested there is left out, and so are pilots."""
    found = selection.current(selection.find_verdicts("core", explored))
    table = words.table([v for v in found if v.word not in ("not testable here", "pilot")])
    return table[["claim", "against", "verdict", "difference", "95 % interval", "seeds"]]


def finished(runs: Sequence[study.Run], workers: int = 0, train: bool = True) -> list[dict[str, Any]]:
    """Results of the runs; those without a file are trained first, or left out with `train=False`.

    Raises:
        StudyError: nothing was to be trained, and nothing is finished, or only a part of a confirmatory set.
    """
    results = study.ensure(runs, workers=workers or None) if train else study.results(runs)
    names = ", ".join(dict.fromkeys(f"{run.profile}/{run.study}/{run.dataset}" for run in runs))
    if not results:
        raise study.StudyError(f"nothing is finished for {names}: set train = True")
    declared = [run for run in runs if run.study in CONFIRMATORY]
    if study.whole(declared) != {run.dataset for run in declared}:
        raise study.StudyError(
            f"{len(results)} of {len(runs)} runs are finished for {names}: a confirmatory set is shown only "
            "whole; set train = True"
        )
    return results


def play(draw: Callable[[Any], Figure], name: str, values: Sequence[Any], at: Any, path: str) -> None:
    """A figure with a slider where a person sits at JupyterLab; elsewhere the figure at one value.

    Args:
        draw: value -> figure.
        name: of the slider.
        at: the value at the start, one of `values`.
        path: as for `show`.
    """
    show(draw(at), path)
    if watched():
        from ipywidgets import SelectionSlider, interact  # type: ignore[import-untyped]

        interact(draw, **{name: SelectionSlider(options=values, value=at)})
