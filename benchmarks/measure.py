"""Time and memory of contestants that do the same job, and the physical limit of the machine they share.

Contestants take turns within one process, so that what else the machine does meets all of them; only ratios
within a round are reported. On one CPU thread the clock is that thread's processor time. Memory is measured
in a fresh process for each contestant, during its second step, so that code loaded once is not counted.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_lib.products import product
from moe_study import store

Step = Callable[[], object]


@dataclass(frozen=True)
class Contestant:
    name: str
    build: Callable[[str], Step]  # from a device: makes the inputs, and returns what is measured
    peer: bool = True
    bytes: float = 0.0  # about what a step holds, where it is much


class Rates(NamedTuple):
    """What the machine reaches, per second."""

    gemm: float  # float operations of a matrix product, by the fastest library at hand
    gemm_mm: float  # by torch.mm
    gemm_bf16: float  # in bfloat16
    bandwidth: float  # bytes read and written
    exp: float  # exponentials


@dataclass(frozen=True)
class Work:
    """The least that a job needs, whoever does it."""

    gemm: float = 0.0  # float operations in matrix products
    gemm_bf16: float = 0.0  # those in bfloat16
    bytes: float = 0.0  # to be moved from and to memory
    exp: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """One after the other: on a processor they share the same units."""
        products = self.gemm / rates.gemm + self.gemm_bf16 / rates.gemm_bf16
        return products + self.bytes / rates.bandwidth + self.exp / rates.exp


@dataclass(frozen=True)
class Row:
    """One job at one size. The goals apply to our implementation, the first entry that is not a peer."""

    name: str
    sizes: dict[str, int]
    work: Work
    contestants: tuple[Contestant, ...]
    goal_time: float | None = None  # times as fast as the fastest of the peers timed
    goal_memory: float | None = None  # the best peer's memory divided by ours
    goal_share: float | None = None  # of the physical limit
    rounds: int = 15
    processes: int = 3  # in which memory is measured
    dtype: str = "float32"


@dataclass(frozen=True)
class Machine:
    device: str = "cpu"
    threads: int = 1
    turn: float = 0.02  # seconds that a contestant steps before the next has its turn
    clock: str = field(init=False)

    def __post_init__(self) -> None:
        alone = self.device == "cpu" and self.threads == 1
        object.__setattr__(self, "clock", "processor time of the thread" if alone else "wall time")

    def now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.thread_time() if self.device == "cpu" and self.threads == 1 else time.perf_counter()

    def describe(self) -> dict[str, Any]:
        """Of a CPU's allocator: which one, and the settings that bear on it."""
        provenance = store.provenance()
        settings = re.compile(r"MALLOC_|GLIBC_TUNABLES|LD_PRELOAD|PYTORCH_CUDA_ALLOC_CONF")
        chosen = [f"{name}={value}" for name, value in os.environ.items() if settings.match(name)]
        library = " ".join(platform.libc_ver()) or platform.system()
        return {
            "device": self.device,
            "processor": provenance["machine"] if self.device == "cpu" else torch.cuda.get_device_name(),
            "threads": self.threads,
            "allocator": " ".join([library if self.device == "cpu" else "torch caching", *chosen]),
            "torch": torch.__version__,
            "clock": self.clock,
        }


def origin(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Where a file's numbers come from, the day, and which of the peers' packages are not installed."""
    found, versions, absent = store.provenance(), {}, []
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    return {
        "provenance": found | {"versions": found["versions"] | versions},
        "date": date.today().isoformat(),
        "absent": absent,
    }


def _best(machine: Machine, step: Step, repeats: int) -> float:
    times = []
    step()
    for _ in range(repeats):
        start = machine.now()
        step()
        times.append(machine.now() - start)
    return min(times)


@torch.no_grad()
def probe(machine: Machine, repeats: int = 7) -> Rates:
    """Products of matrices of 1024 x 1024 (a GPU: 8192 x 8192), copies of 64 MiB (1 GiB), exponentials that
    stay in the cache; in float32 where the name of the rate says nothing else.
    """
    # Smaller matrices leave a GPU waiting for its host.
    size, more = (1024, 1) if machine.device == "cpu" else (8192, 16)
    count = 2**18 * more
    long_N = torch.rand(2**24 * more, device=machine.device)
    short_N = torch.rand(count, device=machine.device)
    long_to_N, short_to_N = torch.empty_like(long_N), torch.empty_like(short_N)
    a_NN, b_NN = torch.rand(2, size, size, device=machine.device)
    low_NN = torch.rand(size, size, device=machine.device).bfloat16()
    by_mm = 2 * size**3 / _best(machine, lambda: torch.mm(a_NN, b_NN), repeats)
    by_product = 2 * size**3 / _best(machine, lambda: product(a_NN, b_NN), repeats)
    copy = _best(machine, lambda: long_to_N.copy_(long_N), repeats)
    exp = _best(machine, lambda: torch.exp(short_N, out=short_to_N), repeats)
    exp2 = _best(machine, lambda: torch.exp2(short_N, out=short_to_N), repeats)
    return Rates(
        gemm=max(by_mm, by_product),
        gemm_mm=by_mm,
        gemm_bf16=2 * size**3 / _best(machine, lambda: torch.mm(low_NN, low_NN), repeats),
        bandwidth=2 * long_N.nbytes / copy,
        exp=count / min(exp, exp2),
    )


def compare(machine: Machine, contestants: Sequence[Contestant], rounds: int) -> dict[str, list[float]]:
    """Seconds a step, for each contestant in each round; every round begins with another contestant."""
    steps = {contestant.name: contestant.build(machine.device) for contestant in contestants}
    repeats = {}
    for name, step in steps.items():
        step()
        start = machine.now()
        step()
        repeats[name] = max(1, math.ceil(machine.turn / max(machine.now() - start, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if repeats[name] > 1:
                steps[name]()  # the one before has left other code and data in the caches
            start = machine.now()
            for _ in range(repeats[name]):
                steps[name]()
            seconds[name].append((machine.now() - start) / repeats[name])
    return seconds


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the rounds' ratios."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": statistics.median(ratios), "low": low, "high": high}


def memory_of_a_step(step: Step, device: str = "cpu") -> float | None:
    """Most memory (MB of 10^6 bytes) that a step holds beyond what was there; for a fresh process.

    None where Linux's /proc/self/clear_refs is not to be had. (`ru_maxrss` would not do: it is inherited.)
    """
    step()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else the step could live in what the first one left behind
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step()
        return (_status("VmHWM") - before) / 1e6
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    """Bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024


def available_memory() -> float:
    """Bytes that can be had without swapping; infinity where the system does not say."""
    try:
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024.0
    except (OSError, IndexError):
        return math.inf
