"""The notebook on one's own model, where transformers is installed; and the alarms' stored calibration."""

import importlib.util
import json

import nbformat
import pytest

from moe_lib.inspect import THRESHOLDS
from moe_study import study
from moe_study.data import ROOT


def notebook_cells():
    stored = nbformat.read(ROOT / "notebooks" / "40_your_model.ipynb", as_version=4)
    return [cell.source for cell in stored.cells if cell.cell_type == "code"]


def test_the_notebook_names_what_is_to_be_installed(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "transformers" else found(name, *rest),
    )
    with pytest.raises(study.StudyError, match=r"pip install transformers$"):
        exec(notebook_cells()[1], {"In": []})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs(folders):
    pytest.importorskip("transformers", reason="transformers is not installed: .[test-hf]")
    space = {"In": []}
    for source in notebook_cells():
        exec(source, space)
    panels = space["panels"]
    used = {name: panels[name].table()["effective experts"].mean() for name in ("healthy", "collapsed")}
    assert used["collapsed"] < used["healthy"]
    assert "collapsed" in {alarm.kind for alarm in panels["collapsed"].alarms}
    assert not panels["healthy"].alarms
    assert (folders / "figures" / "your_model" / "collapsed.png").exists()


def test_thresholds_are_those_whose_errors_are_stored():
    stored = json.loads((ROOT / "results" / "planted" / "inspect.json").read_text())["alarms"]
    assert {kind: entry["threshold"] for kind, entry in stored.items()} == THRESHOLDS
    for entry in stored.values():
        assert entry["false_alarms"] <= 0.05
        assert entry["missed"].get("1.0", 0.0) <= 0.5
