import os
import shutil
import tempfile

import pytest
import torch

# Each test process compiles into a folder of its own: a killed one must not leave half a file to the next.
COMPILED = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")


# Begun first: at the end one of them would run while the other cores have nothing left.
LONG = {"test_grid", "test_golden", "test_ddp", "test_campaign", "test_report_traced", "test_recompute"}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_unconfigure():
    shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Results and figures of a test go to its own folder."""
    monkeypatch.setenv("MOE_RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setenv("MOE_FIGURES_DIR", str(tmp_path / "figures"))
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Results of digits runs: from the results folder TRAINED (`make test` fills one), else trained here."""
    folder = os.environ.get("TRAINED") or str(tmp_path_factory.mktemp("trained"))

    def results(runs):
        from moe_study import study

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOE_RESULTS_DIR", folder)
            return study.ensure(runs, workers=1, quiet=True)

    return results
