"""How time and memory of our own steps grow with each size, and what processes do at the same time.

Every size is varied alone, in factors of two, from one base; the exponent is that of a power law. Seeds are
runs of their own: ten take ten times as long as one, by construction.

Shapes: N samples, rows or tokens, D width (of experts' hidden layers too), E experts, K chosen.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks import experts as bench_moe
from benchmarks import snnl as bench_snnl
from benchmarks import training as bench_train
from benchmarks.experts import Size
from benchmarks.measure import Machine, Row, Step, ratio


@dataclass(frozen=True)
class Job:
    row: Callable[..., Row]  # from the sizes in the order of `base`; its first contestant is ours
    base: dict[str, int]


JOBS = {
    "SNNL": Job(lambda N, D: bench_snnl.row(N, [D]), {"N": 2048, "D": 128}),
    "soft mixture": Job(
        lambda N, D, E: bench_moe.row(Size(N, D, D, 10, E, E)), {"N": 2048, "D": 128, "E": 8}
    ),
    "top-k mixture": Job(
        lambda N, D, E, K: bench_moe.row(Size(N, D, D, D, E, K)), {"N": 2048, "D": 128, "E": 16, "K": 2}
    ),
    "AC router": Job(bench_moe.router_row, {"N": 2048, "D": 128, "E": 16, "K": 2}),
}


def rows(quick: bool = False) -> list[Row]:
    """Of each job the base, then one size after the other."""
    found = []
    for name, job in JOBS.items():
        base = job.base | ({"N": job.base["N"] // 16} if quick else {})
        wanted = [base]
        for size, value in base.items():
            factors = [0.5, 2] if quick else [0.5, 2, 4, 8]
            if size != "N":
                factors = [] if quick else factors[:3]
            wanted += [base | {size: int(factor * value)} for factor in factors]
        for sizes in wanted:
            row = job.row(*sizes.values())
            title = " ".join([name, *(f"{size}={value}" for size, value in sizes.items())])
            found.append(
                replace(
                    row,
                    name=title,
                    contestants=row.contestants[:1],
                    rounds=3 if quick else 7,
                    processes=1,  # the fit takes a mean over sizes
                    goal_share=None,
                )
            )
    return found


def power_law(sizes: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Exponent of values = c * sizes ** exponent by least squares on logarithms, and its 95 % interval."""
    line = stats.linregress(np.log(sizes), np.log(values))
    margin = stats.t.ppf(0.975, len(sizes) - 2) * line.stderr
    return {"exponent": line.slope, "low": line.slope - margin, "high": line.slope + margin}


def series(measured: Sequence[dict[str, Any]], name: str, size: str) -> list[dict[str, Any]]:
    """Of a job's rows those that differ from its base in one size alone, in its order."""
    own = [row for row in measured if row["row"].startswith(f"{name} ")]
    others = [other for other in JOBS[name].base if other != size]
    return sorted(
        (row for row in own if all(row[other] == own[0][other] for other in others)),
        key=lambda row: row[size],
    )


def exponents(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of time and memory, for each job and size with three values or more."""
    found = []
    for name, job in JOBS.items():
        for size in job.base:
            own = series(measured, name, size)
            if len(own) < 3:
                continue
            at = [row[size] for row in own]
            entry: dict[str, Any] = {"job": name, "size": size, "from": at[0], "to": at[-1]}
            for key, column in (("time", "milliseconds"), ("memory", "memory_mb")):
                values = [row["contestants"]["ours"][column] for row in own]
                entry[key] = power_law(at, values) if all(values) else None  # memory: where it is known
            found.append(entry)
    return found


# -------------------------------------------------------------------------------------- processes

BATCH, ROUNDS = 256, 5
_step: Step | None = None  # in a process of `throughput`, with what it waits for before it starts
_together: Any = None


def _start(together: Any, device: str) -> None:
    global _step, _together
    torch.set_num_threads(1)
    _step, _together = bench_train.our_snnl_step(BATCH, "bfloat16", device), together
    _step()


def _steps_per_second(seconds: float) -> float:
    """For so many seconds of wall time, begun by all processes at once; 0 seconds: it takes no part."""
    assert _step is not None
    _together.wait()
    start, count, past = time.perf_counter(), 0, 0.0
    while past < seconds:
        _step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        past, count = time.perf_counter() - start, count + 1
    return count / past if count else 0.0


def throughput(machine: Machine, processes: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """How many times the work of one process 1, 2, 4, ... do at the same time, up to one a core.

    Work: training steps of the small CNN with SNNL, one thread a process. All processes are there from the
    start; those that take no part wait.
    """
    cores = os.cpu_count() or 1
    counts = processes or sorted({*(2**power for power in range(cores.bit_length())), cores})
    most, seconds = max(counts), 75 * machine.turn
    context = multiprocessing.get_context("spawn")
    rates: dict[int, list[float]] = {count: [] for count in counts}
    with ProcessPoolExecutor(most, context, _start, (context.Barrier(most), machine.device)) as pool:
        for _ in range(ROUNDS):
            for count, found in rates.items():
                found.append(sum(pool.map(_steps_per_second, [seconds] * count + [0.0] * (most - count))))
    return [
        {
            "processes": count,
            "steps_per_second": statistics.median(found),
            "times_one": ratio(found, rates[counts[0]]),
        }
        for count, found in rates.items()
    ]


# ----------------------------------------------------------------------------------------- figure


def figure(content: dict[str, Any]) -> Any:
    """Time (above) and memory (below) of a step against each size; exponents in the legends."""
    from matplotlib.ticker import LogLocator

    from moe_study.report import plots

    sizes = list(dict.fromkeys(entry["size"] for entry in content["exponents"]))
    drawn, axes = plots.new_figure(3.2 * max(len(sizes), 1), 6.4, 2, max(len(sizes), 1))
    for key, column, title, across in zip(
        ("time", "memory"), ("milliseconds", "memory_mb"), ("time (ms)", "memory (MB)"), axes, strict=True
    ):
        for axis, size in zip(across, sizes, strict=False):
            ticks: set[int] = set()
            for at, name in enumerate(JOBS):
                fits = [e for e in content["exponents"] if (e["job"], e["size"]) == (name, size) and e[key]]
                own = series(content["rows"], name, size) if fits else []
                ticks |= {row[size] for row in own}
                axis.plot(
                    [row[size] for row in own],
                    [row["contestants"]["ours"][column] for row in own],
                    marker="osD^"[at],
                    color=plots.PALETTE[at + 1],
                    ms=5,
                    label=f"{fits[0][key]['exponent']:.2f}" if fits else "_",
                )
            axis.set(xscale="log", yscale="log", xlabel=size, title=f"{title} against {size}")
            axis.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)], fontsize=8)
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.grid(alpha=0.3)
            axis.legend(title="exponent", fontsize=8, title_fontsize=8, handlelength=1)
    lines = axes[0, 0].get_lines()
    drawn.legend(lines, list(JOBS), loc="outside lower center", ncols=len(JOBS))
    return drawn
