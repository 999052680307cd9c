"""Growth with each size: exponents that are found again, and rows that vary one size alone."""

import itertools
import json
import math

import pytest

from benchmarks import run as bench
from benchmarks import scaling as bench_scaling
from benchmarks.measure import Machine, Rates

pytestmark = pytest.mark.slow


def planted(exponents, rows):
    """Rows as measured: time 3 * product of (the job's own) sizes ** exponents, memory its square."""
    measured = []
    for row in rows:
        job = next(job for name, job in bench_scaling.JOBS.items() if row.name.startswith(f"{name} "))
        time = 3 * math.prod(row.sizes[size] ** exponents[size] for size in job.base)
        figures = {"milliseconds": time, "memory_mb": time**2}
        measured.append({"row": row.name, **row.sizes, "contestants": {"ours": figures}})
    return measured


def test_a_planted_power_law_is_found_again():
    found = bench_scaling.power_law([1, 2, 4, 8], [5 * n**1.5 for n in (1, 2, 4, 8)])
    assert found == pytest.approx({"exponent": 1.5, "low": 1.5, "high": 1.5})


def test_the_interval_is_that_of_the_textbook():
    """Logarithms 0, 1, 1, 2 at 0, 1, 2, 3: slope 0.6, residuals 0.1 (-1, 3, -3, 1); t = 4.302653."""
    found = bench_scaling.power_law([1, 2, 4, 8], [1, 2, 2, 4])
    margin = 4.302653 * math.sqrt(0.20 / 2 / 5)
    assert found == pytest.approx({"exponent": 0.6, "low": 0.6 - margin, "high": 0.6 + margin}, rel=1e-5)


def test_every_job_and_size_has_its_own_exponent():
    planned = {"N": 1.9, "D": 0.8, "E": -0.3, "K": 0.5}
    found = bench_scaling.exponents(planted(planned, bench_scaling.rows()))
    assert [(e["job"], e["size"]) for e in found] == [
        (name, size) for name, job in bench_scaling.JOBS.items() for size in job.base
    ]
    for entry in found:
        assert entry["time"]["exponent"] == pytest.approx(planned[entry["size"]])
        assert entry["memory"]["exponent"] == pytest.approx(2 * planned[entry["size"]])


def test_rows_differ_from_their_base_in_one_size_by_factors_of_two():
    rows = bench_scaling.rows()
    for name, job in bench_scaling.JOBS.items():
        own = [row for row in rows if row.name.startswith(f"{name} ")]
        for row in own:
            changed = [size for size in job.base if row.sizes[size] != job.base[size]]
            assert len(changed) <= 1
            assert all(math.log2(row.sizes[size] / job.base[size]) % 1 == 0 for size in changed)
        assert len(own) == 1 + 4 + 3 * (len(job.base) - 1)


def test_memory_that_is_not_known_has_no_exponent():
    measured = planted(dict.fromkeys("NDEK", 1), bench_scaling.rows(quick=True))
    for row in measured:
        row["contestants"]["ours"]["memory_mb"] = None
    assert {entry["memory"] for entry in bench_scaling.exponents(measured)} == {None}


def test_a_quick_look_writes_file_and_figure(tmp_path, monkeypatch):
    sizes = itertools.count(1)
    monkeypatch.setattr(bench, "_memory_in_fresh_processes", lambda *_: float(next(sizes)))
    monkeypatch.setattr(bench, "probe", lambda machine: Rates(1e11, 1e11, 1e11, 1e10, 1e9))
    monkeypatch.setattr(bench_scaling, "throughput", lambda machine: [])
    assert bench.main(["scaling", "--quick", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "scaling.json").read_text())
    assert [(e["job"], e["size"]) for e in content["exponents"]] == [
        (name, "N") for name in bench_scaling.JOBS
    ]
    assert all(row["contestants"]["ours"]["milliseconds"] > 0 for row in content["rows"])
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"


def test_the_work_of_one_process_is_one(monkeypatch):
    monkeypatch.setattr(bench_scaling, "ROUNDS", 2)
    (found,) = bench_scaling.throughput(Machine(turn=0.001), processes=[1])
    assert found["processes"] == 1
    assert found["steps_per_second"] > 0
    assert found["times_one"] == {"median": 1, "low": 1, "high": 1}
