"""What a reader meets first: the README's code and commands as they stand, and every address in it."""

import os
import re
import shlex
import shutil
import subprocess

import nbformat
import pytest

from moe_study import __main__ as command_line
from moe_study.data import ROOT
from moe_study.report.glossary import MEASURES

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]


def test_it_is_short_and_begins_with_the_answer():
    assert sum(any(map(str.isalnum, word)) for word in README.split()) <= 1200  # no bars of tables
    order = [
        "?",
        "Does learned routing pay?",
        "Does SNNL make a model more accurate?",
        "figures/readme/effects.png",
        "make report",
    ]
    places = [README.index(text) for text in order]
    assert places == sorted(places)


def test_its_python_runs_as_it_stands():
    assert PYTHON
    names: dict = {}
    for block in PYTHON:
        exec(block, names)
    assert names["loss"].requires_grad
    assert names["outputs"].shape == (256, 32)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_knows_its_commands(command):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    _, *words = shlex.split(command)
    dry = subprocess.run(
        ["make", "--dry-run", *words], cwd=ROOT, env=clean, capture_output=True, text=True, check=False
    )
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.strip()


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("make ")])
def test_the_command_line_knows_its_commands(command, monkeypatch):
    python, flag, module, *arguments = shlex.split(command)
    assert (python, flag, module) == ("python", "-m", "moe_study")
    seen = []
    monkeypatch.setitem(command_line.COMMANDS, arguments[0], lambda parsed: seen.append(parsed) or 0)
    assert command_line.main(arguments) == 0
    assert len(seen) == 1


def anchors(text: str) -> set[str]:
    """Of a Markdown file's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md", "REPRODUCIBILITY.md"])
def test_every_address_is_there(name):
    text = (ROOT / name).read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets or name != "README.md"
    for target in targets:
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = ROOT / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def test_every_file_that_the_report_names_is_there():
    cells = nbformat.read(ROOT / "notebooks" / "90_report.ipynb", as_version=4).cells
    words = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    words += "\n".join(source for _, source in MEASURES.values())
    named = set(re.findall(r"`((?:moe_lib|moe_study|benchmarks|notebooks|tests)/[\w/.]+)`", words))
    assert len(named) > 3
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
