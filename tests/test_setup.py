"""What is around the library: the lock, the installers, CI, what git holds, which way imports run."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from moe_study import store
from moe_study.data import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
UNLOCKED = {"hf", "slurm", "test-hf"}  # extras that no command of ours needs
LOCKED_EXTRAS = {name: o for name, o in PROJECT["optional-dependencies"].items() if name not in UNLOCKED}


def locked(text: str) -> dict[str, list[tuple[Requirement, str]]]:
    """Canonical name -> its requirements (one per marker), each with the lines that follow it."""
    found: dict[str, list[tuple[Requirement, str]]] = {}
    for block in re.findall(r"^[^\s#].*(?:\n[ \t].*)*", text, re.M):
        first, _, rest = block.partition("\n")
        requirement = Requirement(first.rstrip(" \\"))
        found.setdefault(canonicalize_name(requirement.name), []).append((requirement, rest))
    return found


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    paths = [ROOT / name for name in names.decode().split("\0") if name]
    assert len(paths) > 20
    return [path for path in paths if path.is_file()]  # one may be removed and not yet committed


# --------------------------------------------------------------------------------------------- lock


def test_every_locked_requirement_has_one_version_and_hashes():
    requirements = [entry for entries in locked(LOCK).values() for entry in entries]
    assert len(requirements) > 100
    for requirement, rest in requirements:
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", rest), requirement


def test_lock_names_no_index():
    assert "://" not in LOCK
    assert not re.search(
        r"^\s*(-i|-f|--index-url|--extra-index-url|--find-links|--trusted-host)\b", LOCK, re.M
    )


@pytest.mark.parametrize("group", ["dependencies", *LOCKED_EXTRAS])
def test_what_the_project_asks_for_is_locked(group):
    wanted = PROJECT["dependencies"] if group == "dependencies" else LOCKED_EXTRAS[group]
    pins = locked(LOCK)
    for requirement in map(Requirement, wanted):
        versions = [next(iter(r.specifier)).version for r, _ in pins[canonicalize_name(requirement.name)]]
        assert versions
        assert all(requirement.specifier.contains(version) for version in versions), (requirement, versions)


def test_the_installed_torch_is_the_locked_one():
    import torch

    (requirement, _), *others = locked(LOCK)["torch"]
    assert others == []
    assert requirement.specifier.contains(torch.__version__.split("+")[0])


def test_filter_for_another_torch_index_takes_torch_out_and_nothing_else():
    """The Makefile's awk program: torch and its CUDA come from TORCH_INDEX, all else by hash."""
    program = re.search(r"awk '([^']+)'", (ROOT / "Makefile").read_text())[1].replace("$$", "$")
    kept_text = subprocess.run(
        ["awk", program], input=LOCK, capture_output=True, text=True, check=True
    ).stdout
    everything, kept = locked(LOCK), locked(kept_text)
    of_torch = {
        name
        for name in everything
        if name in ("torch", "torchvision", "triton") or re.match("nvidia-|cuda-", name)
    }
    assert {"torch", "torchvision", "triton"} <= of_torch
    assert any(name.startswith("nvidia-") for name in of_torch)
    assert set(kept) == set(everything) - of_torch
    for name, entries in kept.items():
        assert entries == everything[name]


def test_torch_filter_names_both_packages_by_version():
    """The Makefile's grep, which installs from TORCH_INDEX what the filter takes out."""
    pattern = re.search(r"grep -oE '([^']+)'", (ROOT / "Makefile").read_text())[1]
    found = subprocess.run(
        ["grep", "-oE", pattern, "requirements.lock"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    pins = {str(locked(LOCK)[name][0][0]).split(";")[0].strip() for name in ("torch", "torchvision")}
    assert set(found.split()) == pins


# --------------------------------------------------------------------------------------- installers


def test_conda_and_binder_use_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["--require-hashes", "-r requirements.lock"]}
    assert {re.split("=", name)[0] for name in conda} == {"python", "pip"}
    (python,) = [name.split("=")[1] for name in conda if name.startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    post = (ROOT / "postBuild").read_text()
    assert post.startswith("#!/bin/sh\n")
    assert "pip install" in post
    assert "--no-deps" in post
    assert post.rstrip().endswith("-e .")


def test_lock_serves_the_python_of_conda():
    """No requirement is left out under that Python that the project needs."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(n for n in environment["dependencies"] if str(n).startswith("python=")).split("=")[1]
    there = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    groups = [PROJECT["dependencies"], *LOCKED_EXTRAS.values()]
    for wanted in (Requirement(text) for group in groups for text in group):
        pins = [r for r, _ in locked(LOCK)[canonicalize_name(wanted.name)]]
        assert sum(r.marker is None or r.marker.evaluate(there) for r in pins) == 1, wanted


def test_makefile_refuses_the_same_pythons_as_the_project():
    (low,) = re.findall(r"version_info < \((\d+), (\d+)\)", (ROOT / "Makefile").read_text())
    assert PROJECT["requires-python"] == f">={'.'.join(low)}"


@pytest.mark.parametrize("name", [".ci/run", "tests/notebooks.sh", "postBuild"])
def test_scripts_can_be_run(name):
    assert os.access(ROOT / name, os.X_OK)
    shell = "bash" if "bash" in (ROOT / name).read_text().splitlines()[0] else "sh"
    subprocess.run([shell, "-n", str(ROOT / name)], check=True)


def test_ci_runs_these_commands_and_stops_at_the_first_failure():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line.startswith("make ")]
    assert commands == ["make report", "make test", "make cluster || make cluster"]
    assert "set -euo pipefail" in lines


def test_make_test_runs_every_kind_of_check():
    """Dry: what `make test` would call."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    printed = subprocess.run(
        ["make", "--dry-run", "--old-file=.venv/ready", "test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for called in ("ruff check", "ruff format --check", "mypy", "pytest", "tests/notebooks.sh"):
        assert called in printed
    notebooks = (ROOT / "tests" / "notebooks.sh").read_text()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        # 40 needs an extra that is not locked; tests/moe_lib/inspect/test_notebook.py runs it if it is there.
        assert (f"notebooks/{path.name}" in notebooks) != (path.stem == "40_your_model")


def make(goal: str, *variables: str, **environment: str) -> subprocess.CompletedProcess:
    """What a goal would run, dry."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # A make that runs the tests would hand its own flags down, and its folder messages with them.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", "--dry-run", "--old-file=.venv/ready", goal, *variables],
        cwd=ROOT,
        env=outside | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("goal", ["report", "render", "plan"])
@pytest.mark.parametrize(
    "value",
    *[
        [
            "$$(touch made-by-a-test)",
            "$(shell touch made-by-a-test)",
            "../../x",
            "digits core",
            "",
            "%",
            "Core",
        ]
    ],
)
def test_make_refuses_a_profile_that_there_is_not(goal, value):
    done = make(goal, f"PROFILE={value}")
    assert done.returncode == 2
    assert re.search(r"PROFILE must be digits, core or paper, got '.*'", done.stderr)
    assert done.stdout == ""
    assert not (ROOT / "made-by-a-test").exists()


@pytest.mark.parametrize(
    "value", ["0", "-1", "1.5", "two", "", "2 3", "012", "1,2", "1;touch made-by-a-test", "２"]
)
def test_make_refuses_a_number_of_cores_that_is_none(value):
    for goal, name in (("report", "CORES"), ("test", "CORES"), ("faults", "KILLS")):
        done = make(goal, f"{name}={value}")
        assert done.returncode == 2
        assert f"{name} must be an integer of 1 or more" in done.stderr
    assert not (ROOT / "made-by-a-test").exists()


def test_make_counts_cores_whatever_the_number_of_threads():
    unset = make("report").stdout
    for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT"):
        assert make("report", **{name: "1"}).stdout == unset
    cores = len(os.sched_getaffinity(0))
    assert f"--cores {cores} " in unset
    assert "--cores 1234 " in make("report", "CORES=1234").stdout


def test_make_checks_only_what_a_goal_uses():
    """PROFILE may be anything in somebody's environment."""
    assert make("test", PROFILE="dev").returncode == 0
    assert make("clean", PROFILE="dev", CORES="many").returncode == 0


def test_readme_names_both_commands():
    text = (ROOT / "README.md").read_text()
    assert "make report" in text
    assert "make test" in text
    assert "environment.yml" in text


# ---------------------------------------------------------------------------------------------- git


def test_no_tracked_file_holds_a_path_of_a_machine():
    folder = re.compile(rb"(?<![\w.])/(?:home|root|work|Users)/[A-Za-z]")
    checkout = str(ROOT).encode()
    for path in tracked():
        content = path.read_bytes()
        if b"\0" in content:  # a picture
            continue
        assert not folder.search(content), path
        assert len(ROOT.parts) < 3 or checkout not in content, path


def test_no_tracked_file_is_large():
    """The rendered report and its notebook, which is stored on the core results, hold their pictures."""
    limits = {"report.html": 8_000_000, "90_report.ipynb": 6_000_000}
    sizes = {path: path.stat().st_size for path in tracked()}
    large = {path.name: size for path, size in sizes.items() if size > limits.get(path.name, 2_000_000)}
    assert large == {}
    assert sum(sizes.values()) < 60_000_000


def test_nothing_that_is_made_again_is_tracked():
    made = {".venv", ".work", "build", ".snakemake", "__pycache__", "digits"}
    names = {path.relative_to(ROOT) for path in tracked()}
    assert {str(name) for name in names if made & set(name.parts) or name.parts[0] == "data"} == set()


# ------------------------------------------------------------------------------------------ imports

PACKAGES = store.PACKAGES
BARE = {"torch", "torchvision", "numpy", "scipy", "sklearn"}
BARE |= {"filelock", "PIL"}  # PIL comes with torchvision
# What moe_study may import beside the bare machine's packages: pictures, tables and pages of results.
STUDY_ONLY = {
    *(
        "moe_study.report",
        "moe_study.notebook",
        "moe_study.claims",
        "moe_study.columns",
        "moe_study.verdicts",
        "moe_study.rates",
    ),
    *("moe_study.tour", "moe_study.trust", "moe_study.theory"),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imported(path: Path, lazy: bool = True) -> set[str]:
    """Every module that a file imports: `from moe_lib import rng` is moe_lib.rng.

    Without `lazy` only what its import needs: nothing inside functions or under TYPE_CHECKING.
    """
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & set(MODULES)) or {node.module}
    return found


def own(path: Path) -> set[str]:
    """The project's modules that a file imports."""
    return imported(path) & set(MODULES)


def core(name: str) -> bool:
    """Whether a module must work on a bare machine."""
    return not any(name == one or name.startswith(f"{one}.") for one in STUDY_ONLY)


def test_imports_run_one_way():
    graph = {name: own(path) for name, path in MODULES.items()}
    assert graph["moe_study.experiments"] >= {
        "moe_study.evaluate",
        "moe_lib.models.vision",
    }  # imports are read
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(MODULES)
    some = ["moe_study.data", "moe_study.engine", "moe_study.report.readme"]
    assert sorted(some, key=order.index) == some


def test_packages_are_layers():
    crossings = {
        (name.split(".")[0], other.split(".")[0]) for name, path in MODULES.items() for other in own(path)
    }
    allowed = {("moe_study", "moe_lib"), ("benchmarks", "moe_lib"), ("benchmarks", "moe_study")}
    assert {(a, b) for a, b in crossings if a != b} <= allowed


def test_core_imports_core_and_a_bare_machine_alone():
    for name in filter(core, MODULES):
        if name.startswith("benchmarks") or name == "moe_study.__main__":
            continue
        assert all(map(core, own(MODULES[name]))), name
        lazy = not name.startswith("moe_lib.inspect")  # pictures and tables import what they need when drawn
        outside = {module.split(".")[0] for module in imported(MODULES[name], lazy)} - set(PACKAGES)
        extra = outside - set(sys.stdlib_module_names) - BARE
        optional = {  # if they are there
            "moe_study.engine": {"tqdm"},
            "moe_lib.snnl.fused": {"triton"},
        }
        assert extra <= optional.get(name, set()), name


def test_command_line_imports_the_core_alone_at_its_head():
    tree = ast.parse(MODULES["moe_study.__main__"].read_text())
    lazy = {node for f in tree.body if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    head = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node not in lazy]
    names = {f"{node.module}.{alias.name}" for node in head for alias in node.names} & set(MODULES)
    assert names
    assert all(map(core, names))


def test_public_names_are_there_and_documented():
    import moe_lib

    assert sorted(moe_lib.__all__) == moe_lib.__all__
    for name in moe_lib.__all__:
        assert getattr(moe_lib, name).__doc__, name
    assert (ROOT / "moe_lib" / "py.typed").exists()


@pytest.mark.slow
def test_the_library_works_installed_elsewhere(tmp_path):
    """A wheel, unpacked into an empty folder and imported from outside the checkout."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True, cwd=tmp_path)
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    code = "import moe_lib, torch; print(moe_lib.__file__, moe_lib.MoE(4, 2, 3)(torch.ones(5, 4))[0].shape)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout == f"{site / 'moe_lib' / '__init__.py'} torch.Size([5, 4])\n"
    assert (site / "moe_lib" / "py.typed").exists()
    assert list(site.glob("*.dist-info/licenses/LICENSE"))


def test_nothing_imports_a_notebook_or_a_test():
    for path in MODULES.values():
        roots = {module.split(".")[0] for module in imported(path)}
        assert not roots & {"notebooks", "tests", "reference", "small_runs", "conftest"}, path.name
