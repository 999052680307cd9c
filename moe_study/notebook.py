"""What a notebook needs beyond the library: strict parameters, and figures that are saved and shown."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from moe_study import study
from moe_study.report import plots


def check_parameters(executed: Sequence[str], allowed: Iterable[str]) -> None:
    """Refuse parameters that the notebook does not have: papermill itself only warns.

    Args:
        executed: IPython's `In`, the source of every cell run so far. Papermill injects its parameters as
            a cell that starts with "# Parameters".
        allowed: the names in the notebook's own parameters cell.

    Raises:
        StudyError: naming the unknown parameter.
    """
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


def show(figure: Figure, path: str, runs: Sequence[study.Run] = (), files: Sequence[Path] = ()) -> None:
    """Save a figure below the figures folder, show it inline, and say which files it came from.

    Args:
        path: without suffix, such as "core/snnl/cifar10/curves".
        runs: those whose results the figure shows.
        files: others that it shows.
    """
    from IPython.display import Image, display

    caption = plots.save(figure, path, [*(run.path for run in runs if run.path.exists()), *files])
    display(Image(filename=str(plots.target(path)), embed=True))
    print(caption)
