"""One batch over two and three processes, in parts of unequal size, against one process with the whole."""

import os
import subprocess
import sys

import group_cases
import pytest
import torch

from moe_lib import parallel
from moe_study.data import ROOT


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory):
    """What each process of a group found."""
    size, folder = request.param, tmp_path_factory.mktemp("group")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, group_cases.__file__]
    started = [
        subprocess.Popen([*line, str(rank), str(size), folder / "store", folder / "out"], env=environment)
        for rank in range(size)
    ]
    assert [process.wait(300) for process in started] == [0] * size
    return [torch.load(folder / f"out-{rank}") for rank in range(size)]


@pytest.mark.slow
def test_losses_statistics_and_gradients_are_those_of_one_process(processes):
    alone = group_cases.cases(0, 1)
    for found in processes:
        assert found.keys() == alone.keys()
        for case, values in alone.items():
            for name, value in values.items():
                where = f"{case}: {name}"
                torch.testing.assert_close(found[case][name], value, rtol=1e-9, atol=1e-9, msg=where)


def test_the_cases_tell_a_part_from_the_whole(monkeypatch):
    """Each loss but the mean of one's own samples would be another without the group."""
    alone = group_cases.cases(0, 1)
    part = group_cases.cases(0, 2)
    same = [case for case in alone if torch.allclose(alone[case]["value"], part[case]["value"])]
    assert same == []


def test_without_a_group_nothing_is_shared():
    x_ND = torch.randn(5, 2)
    assert parallel.total(x_ND) is x_ND
    assert parallel.gather(x_ND) == (x_ND, slice(0, 5))
    assert parallel.mean_of_rows(x_ND).equal(x_ND.mean(0))
    with pytest.raises(ValueError, match="init_process_group"), parallel.global_batch():
        pass
