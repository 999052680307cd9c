"""The stored notebooks: parameters that are refused if unknown, outputs that nbval can check, no traces."""

import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import nbformat
import papermill
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.figure import Figure
from PIL import Image

from moe_study import notebook, store, study
from moe_study.data import ROOT

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHOWING = {"notebook.show", "display"}  # calls that put something below a cell
SILENT = {
    "notebook.check_parameters",
    "torch.set_num_threads",
    "pd.set_option",
}  # last calls that return None
UNCHECKED = {"nbval-ignore-output", "nbval-skip"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:tmp|home|work|root|Users)/")

every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def called(node: ast.AST) -> set[str]:
    """All functions called in a piece of code, as they are written there."""
    return {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}


def shows(cell: nbformat.NotebookNode) -> bool:
    """Whether running the cell must leave an output."""
    tree = ast.parse(cell.source)
    if called(tree) & SHOWING:
        return True
    last = tree.body[-1] if tree.body else None
    silent = isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and called(last) & SILENT
    return isinstance(last, ast.Expr) and not silent


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """Source and everything readable in the outputs."""
    found = [cell.source]
    for output in cell.get("outputs", []):
        found.append(output.get("text", ""))
        found += [v for kind, v in output.get("data", {}).items() if not kind.startswith("image/")]
    return [text if isinstance(text, str) else json.dumps(text) for text in found]


def test_every_notebook_is_run_by_make_and_by_the_check():
    """40 needs transformers: tests/moe_lib/inspect/test_notebook.py runs it."""
    names = [path.stem for path in PATHS if path.stem != "40_your_model"]
    for name in ("Makefile", "tests/notebooks.sh"):
        found = re.findall(r"\b\d\d_\w+", (ROOT / name).read_text().split("for name in ")[-1])
        assert sorted(set(found)) == names


# --------------------------------------------------------------------------------------- as stored


@every_notebook
def test_format_and_kernel(path):
    stored = read(path)
    nbformat.validate(stored)
    assert stored.metadata.kernelspec.name == "python3"
    assert stored.cells[0].cell_type == "markdown"  # its first line is the report's title
    assert stored.cells[0].source.startswith("# ")
    ids = [cell.id for cell in stored.cells]
    assert len(set(ids)) == len(ids)


@every_notebook
def test_parameters_are_what_the_notebook_checks(path):
    parameter_cells = [cell for cell in code_cells(path) if "parameters" in tags(cell)]
    assert len(parameter_cells) == 1
    assigned = {node.targets[0].id for node in ast.parse(parameter_cells[0].source).body}
    seen = papermill.inspect_notebook(str(path))
    assert set(seen) == assigned
    assert all(seen[name]["default"] != "None" for name in seen)

    checks = [
        node
        for cell in code_cells(path)
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "check_parameters"
    ]
    assert len(checks) == 1
    assert checks[0].args[0].id == "In"
    assert ast.literal_eval(checks[0].args[1]) == set(seen)


@every_notebook
def test_names_of_our_modules_exist(path):
    """In branches too that the embedded data never reach."""
    tree = ast.parse("\n".join(cell.source for cell in code_cells(path)))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in store.PACKAGES:
            for alias in node.names:
                holder = importlib.import_module(node.module)
                if not hasattr(holder, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")  # not imported yet
                if inspect.ismodule(found := getattr(holder, alias.name)):
                    modules[alias.asname or alias.name] = found
    used = {
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in modules
    }
    assert [f"{name}.{own}" for name, own in sorted(used) if not hasattr(modules[name], own)] == []


@every_notebook
def test_parameters_are_checked_before_anything_is_done(path):
    cells = code_cells(path)
    assert "parameters" in tags(cells[0])
    second = ast.parse(cells[1].source).body
    effects = [node for node in second if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert called(effects[0]) == {"notebook.check_parameters"}


@every_notebook
def test_cells_that_show_something_have_their_output(path):
    """nbval compares nothing where nothing is stored."""
    checked = [cell for cell in code_cells(path) if shows(cell) and not tags(cell) & UNCHECKED]
    empty = [cell.source for cell in checked if not cell.outputs]
    assert empty == []
    for cell in code_cells(path):
        tree = ast.parse(cell.source)
        # A figure that is only drawn if there is something to draw has words in its place.
        if "notebook.show" in called(tree) and not any(
            isinstance(node, ast.If) and node.orelse for node in tree.body
        ):
            pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
            assert pictures, cell.source


@every_notebook
def test_most_cells_are_checked(path):
    checked = [cell for cell in code_cells(path) if shows(cell) and not tags(cell) & UNCHECKED]
    assert len(checked) >= 4


@every_notebook
def test_no_errors_and_no_warnings_are_stored(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", output.text


@every_notebook
def test_no_path_of_a_machine(path):
    for cell in read(path).cells:
        for text in texts(cell):
            assert not MACHINE_PATH.search(text), text[:300]
            assert str(ROOT) not in text


# ------------------------------------------------------------------------------------- when executed


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("00_tour", {"sede": 1}, "unknown parameter 'sede'; this notebook has seed"),
        ("10_snnl_moe", {"dataset": "svhn"}, "unknown dataset 'svhn'"),
        ("20_ac_vision", {"dataset": "docs"}, "unknown dataset 'docs'"),
        ("21_ac_language", {"dataset": "digits"}, "unknown dataset 'digits'"),
        ("30_snnl_x_ac", {"worker": 1}, "unknown parameter 'worker'; this notebook has dataset"),
        ("40_your_model", {"expert": 1}, "unknown parameter 'expert'; this notebook has epochs"),
        ("50_dose_response", {"dataset": "svhn"}, "unknown dataset 'svhn'"),
        ("90_report", {"profile": "x"}, "unknown profile 'x'"),
    ],
)
def test_a_wrong_parameter_stops_the_notebook(name, given, said, folders):
    """Its cells one after the other, as papermill writes them, in a shell of this process."""
    stored = papermill.iorw.load_notebook_node(str(ROOT / "notebooks" / f"{name}.ipynb"))
    made, shell = papermill.parameterize.parameterize_notebook(stored, given), InteractiveShell()
    code = (cell.source for cell in made.cells if cell.cell_type == "code")
    errors = (shell.run_cell(source, store_history=True).error_in_exec for source in code)
    with pytest.raises(study.StudyError, match=said):
        raise next(filter(None, errors))
    assert not any(path.is_file() for path in folders.rglob("*"))


# ------------------------------------------------------------------------------- moe_lib.notebook


def test_check_parameters_lets_known_names_pass():
    notebook.check_parameters([], {"seed"})
    notebook.check_parameters(["", "seed = 0", "# Parameters\nseed = 3\n", "anything = 1"], {"seed"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train": "no"}, "parameter train must be True or False, got 'no'"),
        ({"train": "False"}, "train.*'False'"),
        ({"train": 0}, "train.*0"),
        ({"workers": -1}, "workers must be an integer of 0 or more, got -1"),
        ({"workers": "two"}, "workers.*'two'"),
        ({"workers": 1.5}, "workers.*1.5"),
        ({"workers": True}, "workers.*True"),
        ({"dataset": None}, "dataset must be a name, got None"),
        ({"profile": ["core"]}, "profile.*core"),
    ],
)
def test_check_parameters_names_a_wrong_value(given, said):
    """As papermill injects it, and as a person writes it into the parameters cell."""
    defaults = {"profile": "digits", "dataset": "digits", "workers": 0, "train": True}
    own = "\n".join(f"{name} = {value!r}  # words" for name, value in defaults.items())
    notebook.check_parameters(["", own, "import os\nworkers = -7", "workers = (", "%%time"], defaults)
    injected = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in given.items())
    edited = "\n".join(f"{name} = {value!r}" for name, value in (defaults | given).items())
    for cells in (["", own, injected], ["", edited]):
        with pytest.raises(study.StudyError, match=said):
            notebook.check_parameters(cells, defaults)


@every_notebook
def test_every_parameter_has_a_type_and_its_default_fits(path):
    (cell,) = [cell for cell in code_cells(path) if "parameters" in tags(cell)]
    values = notebook._literals(cell.source)
    assert set(values) <= set(notebook.PARAMETERS)
    notebook.check_parameters([cell.source], values)


def test_a_wrong_parameter_costs_a_line_in_the_notebook():
    from IPython.core.interactiveshell import InteractiveShell

    shown = []
    shell = InteractiveShell()
    shell._showtraceback = lambda kind, error, lines: shown.extend(lines)
    shell.run_cell("from moe_study import study\nraise study.StudyError('parameter train must be True')")
    assert shown == ["StudyError: parameter train must be True"]


def test_check_parameters_reads_what_papermill_writes():
    """The injected cell as papermill itself makes it, values of every kind."""
    given = {"seed": 1, "name": "x", "rate": 0.5, "flag": None, "many": [1, 2]}
    stored = papermill.iorw.load_notebook_node(str(ROOT / "notebooks" / "00_tour.ipynb"))
    made = papermill.parameterize.parameterize_notebook(stored, given)
    injected = [cell.source for cell in made.cells if "injected-parameters" in tags(cell)]
    assert len(injected) == 1
    notebook.check_parameters(injected, given)
    with pytest.raises(study.StudyError, match="'many'"):
        notebook.check_parameters(injected, set(given) - {"many"})


def figure() -> Figure:
    drawn = Figure(figsize=(1, 1))
    drawn.subplots().plot([1, 2])
    return drawn


def shown_outputs(*arguments: object) -> list:
    """What `notebook.show` displays in a kernel."""
    InteractiveShell.instance()
    with capture_output() as captured:
        notebook.show(*arguments)
    assert captured.stdout == ""
    return captured.outputs


def test_show_says_which_files_a_figure_came_from(folders):
    runs = [*study.runs("digits", "snnl", "digits", "base")[:3], *study.runs("digits", arm="dense-snnl")[:1]]
    written = [*runs[:2], runs[3]]
    for run in written:
        study.write(run, {})
    drawn = figure()
    drawn.set_label("What <unk> shows")
    picture, below = shown_outputs(drawn, "digits/snnl/digits/curves", runs)  # the third has no file yet

    entry = {"profile": "digits", "study": "snnl", "dataset": "digits", "arms": ["base", "dense-snnl"]}
    assert picture.metadata["moe_study"] == {
        "figure": "digits/snnl/digits/curves",
        "caption": "What <unk> shows",
        "sources": [entry | {"runs": 3}],
    }
    assert picture.metadata["image/png"]["alt"] == "What <unk> shows"
    source = "results/digits/snnl/digits/{base,dense-snnl}-s[0-9]*.json (3 files)"
    path = folders / "figures" / "digits" / "snnl" / "digits" / "curves.png"
    with Image.open(path) as stored:
        assert stored.format == "PNG"
        assert stored.text["Source"] == source
        assert "Software" not in stored.text
        assert 2 * picture.metadata["image/png"]["width"] == stored.width
    assert below.metadata["moe_study"] == {"caption_of": "digits/snnl/digits/curves"}
    assert "What &lt;unk&gt; shows" in below.data["text/html"]
    assert f"figures/digits/snnl/digits/curves.png, from {source}" in below.data["text/html"]
    assert [p.name for p in path.parent.iterdir()] == ["curves.png"]


def test_show_without_files(folders):
    picture, below = shown_outputs(figure(), "tour/x")
    assert "figures/tour/x.png, computed in this notebook<" in below.data["text/html"]
    assert picture.metadata["moe_study"] == {"figure": "tour/x", "caption": "", "sources": []}
    with Image.open(folders / "figures" / "tour" / "x.png") as stored:
        assert stored.text["Source"] == "computed in this notebook"
