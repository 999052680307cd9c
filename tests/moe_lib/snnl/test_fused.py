"""The fused kernels of the soft nearest neighbor loss, run by Triton's interpreter on the CPU.

The interpreter must be chosen before Triton is imported: a fresh process runs all cases (this file, as a
script), and the tests compare what it found with float64.

Shapes: N samples, D width.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import reference
import torch

from moe_lib.snnl import autograd, soft_nearest_neighbor_loss
from moe_lib.snnl.dense import plain


class Case(NamedTuple):
    distance: str
    temperature: float
    reduction: str = "mean"
    learned: bool = False
    width: int = 5
    labels: str = "of 5 classes"
    dtype: torch.dtype = torch.float32


CASES = [
    *(Case(distance, t) for distance in ("cosine", "sqeuclidean") for t in (0.005, 0.5, 20.0)),
    *(Case("cosine", 0.3, reduction) for reduction in ("mean_all", "sum", "none")),
    Case("sqeuclidean", 2.0, "none", learned=True),
    Case("cosine", 0.3, learned=True),
    Case("cosine", 0.02, width=40),
    Case("sqeuclidean", 20.0, width=40, learned=True),
    Case("cosine", 0.3, dtype=torch.bfloat16),
    *(Case("cosine", 0.3, "mean", True, 5, labels) for labels in ("one alone", "all alone", "one class")),
]
NAMES = [" ".join(map(str, case)) for case in CASES]


def inputs(case):
    """70 samples: N fills no block. The two last rows are zeros, the third from the end is huge or tiny."""
    draw = torch.Generator().manual_seed(len(CASES) + CASES.index(case))
    x_ND = torch.randn(70, case.width, generator=draw)
    if case.distance == "cosine":
        x_ND[-2:] = 0
        x_ND[-3] *= 1e-30
        x_ND[-4] *= 1e30
    labels_N = torch.randint(5, (70,), generator=draw)
    if case.labels == "one alone":
        labels_N[3] = 9
    if case.labels == "all alone":
        labels_N = torch.arange(70)
    if case.labels == "one class":
        labels_N = torch.full((70,), -3)
    weight_N = torch.randn(70, generator=draw) if case.reduction == "none" else torch.ones(())
    return x_ND.to(case.dtype), labels_N, weight_N


def run(case, loss_of, dtype=None):
    """The loss, and the gradients of its weighted sum."""
    x_ND, labels_N, weight_N = inputs(case)
    x_ND = x_ND.to(dtype or x_ND.dtype).requires_grad_()
    temperature = torch.tensor(case.temperature, dtype=dtype, requires_grad=case.learned)
    given = temperature if case.learned else case.temperature
    loss = loss_of(x_ND, labels_N, given, case.distance, case.reduction)
    wanted = [x_ND, temperature] if case.learned else [x_ND]
    return [loss.detach(), *torch.autograd.grad((loss * weight_N).sum(), wanted)]


if __name__ == "__main__":
    import numpy as np

    from moe_lib.snnl import fused

    np.seterr(all="ignore")
    torch.set_num_threads(1)
    fused.BLOCKS = [fused.Blocks(32, 16, 4)]
    fused._device = lambda device: (6, 232_448)  # 3 blocks of rows, 2 parts of the 5 blocks of columns

    def by_kernels(*arguments):
        return soft_nearest_neighbor_loss(*arguments, route="fused")

    torch.save([run(case, by_kernels) for case in CASES], sys.argv[1])
    sys.exit()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    pytest.importorskip("triton", reason="Triton is not installed")
    path = tmp_path_factory.mktemp("fused") / "found.pt"
    root = Path(__file__).parents[3]
    folders = os.pathsep.join([str(root), str(root / "tests" / "oracles")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, torch.load(path), strict=True))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_values_are_those_of_the_loops(case, found):
    x_ND, labels_N, _ = inputs(case)
    expected = torch.as_tensor(
        reference.snnl(x_ND.double(), labels_N, case.temperature, case.distance, case.reduction)
    )
    value = found[case][0]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_gradients_are_those_of_the_formula_in_float64(case, found):
    """Rows of zeros have none in the formula; a row's gradient is compared relative to its length."""
    x_ND = inputs(case)[0].double()
    expected, gradients = run(case, plain, torch.float64)[1:], found[case][1:]
    length_N1 = x_ND.norm(dim=1, keepdim=True) if case.distance == "cosine" else 1.0
    kept_N = (x_ND != 0).any(1)
    one_ND, other_ND = ((g_ND.double() * length_N1)[kept_N] for g_ND in (gradients[0], expected[0]))
    rtol = 2**-8 if case.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(
        one_ND, other_ND, rtol=rtol, atol=rtol * max(1e-3, float(other_ND.abs().max()))
    )
    assert gradients[0].isfinite().all()
    for one, other in zip(gradients[1:], expected[1:], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case.learned and case.reduction == "mean"])
def test_slopes_are_those_of_the_loops(case, found):
    x_ND, labels_N, _ = inputs(case)
    total = reference.snnl_slope(x_ND.double(), labels_N, case.temperature, case.distance)
    counted = sum(int((labels_N == label).sum()) > 1 for label in labels_N)
    assert float(found[case][2]) == pytest.approx(total / max(counted, 1), rel=1e-4, abs=1e-6)


def test_a_lone_class_or_no_positive_costs_nothing(found):
    for case in CASES:
        if case.labels in ("all alone", "one class"):
            assert not any(tensor.any() for tensor in found[case])


def features(dim=4, dtype=torch.float32):
    return torch.ones(6, dim, dtype=dtype), torch.arange(6) % 2


def test_a_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"on a GPU, these are on 'cpu'.*'auto'"):
        soft_nearest_neighbor_loss(*features(), route="fused")


@pytest.mark.parametrize(
    ("dim", "dtype", "reason"), [(4, torch.float64, "float32"), (257, torch.float32, "up to 256 columns")]
)
def test_what_does_not_fit_is_refused(dim, dtype, reason, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=reason):
        soft_nearest_neighbor_loss(*features(dim, dtype), route="fused")


def test_without_triton_the_reason_is_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "moe_lib.snnl.fused", raising=False)
    with pytest.raises(ValueError, match="needs the package triton"):
        soft_nearest_neighbor_loss(*features(), route="fused")


@pytest.mark.parametrize(
    ("dim", "dtype", "temperature", "distance", "used"),
    [
        (4, torch.float32, 0.5, "cosine", True),
        (4, torch.bfloat16, 0.5, "sqeuclidean", True),
        (4, torch.float64, 0.5, "cosine", False),
        (257, torch.float32, 0.5, "cosine", False),
        (4, torch.float32, 1e-3, "cosine", False),  # float32 lacks the digits
        (4, torch.float32, torch.tensor(0.5, requires_grad=True), "cosine", False),
    ],
)
def test_auto_takes_them_where_float32_has_the_digits(dim, dtype, temperature, distance, used, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    called = []

    def fused(*arguments):
        called.append(arguments)
        return autograd.by_tiles(*arguments)

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # else a CPU has none of them
    monkeypatch.setattr("moe_lib.snnl.fused.fused", fused)
    monkeypatch.setattr(autograd, "choose", lambda *_: "auto")
    x_ND = torch.randn(6, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    value = soft_nearest_neighbor_loss(x_ND, torch.arange(6) % 2, temperature, distance)
    expected = plain(x_ND.double(), torch.arange(6) % 2, temperature, distance, "mean")
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    assert bool(called) is used


def test_auto_leaves_few_samples_and_cpus_to_the_others():
    assert [autograd.choose(count, "cuda") for count in (1000, 3000)] == ["dense", "auto"]
    assert [autograd.choose(count, "cpu") for count in (10, 1000, 3000)] == ["dense", "panels", "streaming"]
