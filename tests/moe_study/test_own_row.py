"""A data set of one's own is a row, an arm a `replace`: they are in plan, runs, tables and figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "own_row.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    own = {"MOE_RESULTS_DIR": str(folder / "results"), "MOE_FIGURES_DIR": str(folder / "figures")}
    done = subprocess.run([sys.executable, SCRIPT], env=os.environ | own, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_a_data_set_of_ones_own(found):
    lines = [line.split() for line in found["plan"].splitlines() if "stripes" in line]
    assert [line[:5] for line in lines] == [["snnl", "stripes", arm, "0", "2"] for arm in ("base", "snnl")]
    assert min(found["accuracy"]) > 0.5  # of four classes
    assert found["page"] == ["Stripes"]
    assert sorted(text.split()[-1] for text in found["classes"]) == ["a", "b", "c", "d"]


def test_an_arm_of_ones_own(found):
    assert found["summary"] == ["base", "snnl", "mine"]
    assert "mine" in found["contrast"]
    assert found["rows"] == ["base (2)", "snnl (2)", "mine (2)"]
    assert found["legend"] == ["base", "snnl", "mine"]
    assert len(set(found["colours"])) == 3
