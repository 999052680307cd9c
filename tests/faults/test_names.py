"""Names that somebody else chose: options of Snakemake, and folders and files with markup in them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_study import study
from moe_study.data import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (["shards=0"], "shards must be an integer of 1 or more, got 0"),
        (["shards=two"], "shards must be an integer of 1 or more, got 'two'"),
        (["profil=core"], "unknown --config profil; known: "),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_wrong_option_of_snakemake_is_named(config, said, folders):
    """Before anything is planned or written."""
    for name in ("Snakefile", "moe_lib", "moe_study", "benchmarks", "notebooks"):
        (folders / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folders / "cache"),
    }
    line = ["snakemake", "--cores", "1", "--dry-run", "--nolock", "--quiet", "--config", *config]
    done = subprocess.run(line, cwd=folders, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode
    assert said in done.stderr + done.stdout
    assert not (folders / "results").exists()


@pytest.mark.parametrize("name", ["<b>bold</b>.txt", 'a"b.txt', "a&b;c.txt", "<script>.txt"])
def test_markup_in_the_name_of_a_text_reaches_no_result(name, folders):
    """A text's own name becomes the name of a data set, in tables, pages and paths."""
    path = folders / name
    path.parent.mkdir(exist_ok=True)  # of "</b>" the slash makes a folder
    path.write_text("words of one's own " * 3000)
    (run,) = study.with_text(study.runs("digits", "ac-language")[:1], str(path))
    below = run.path.relative_to(folders / "results")
    assert not set(str(below)) & set("<>&\"';")
