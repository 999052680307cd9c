"""Ours against its peers, on this machine: python -m benchmarks NAME... [--out DIR] [--quick] [--rows I...].

Writes DIR/NAME.json, by default under results/bench; with --quick or --rows DIR has to be named.
The benchmark "scaling" also draws DIR/scaling.png where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import attacks as bench_attacks
from benchmarks import experts as bench_moe
from benchmarks import gpu as bench_gpu
from benchmarks import profile as bench_profile
from benchmarks import scaling as bench_scaling
from benchmarks import snnl as bench_snnl
from benchmarks import training as bench_train
from benchmarks.measure import Machine, Row, available_memory, compare, memory_of_a_step, origin, probe, ratio
from moe_study import store
from moe_study.data import ROOT


@dataclass(frozen=True)
class Bench:
    rows: Callable[[bool], list[Row]]  # from whether it is a quick look
    checks: Mapping[str, Callable[[Machine], Any]] = field(default_factory=dict)  # by its key in the file
    fits: Mapping[str, Callable[[list[dict[str, Any]]], Any]] = field(default_factory=dict)  # of the rows
    figure: Callable[[dict[str, Any]], Any] | None = None  # from the file's content
    packages: tuple[str, ...] = ()  # of peers, each left out where it is not installed


def benches() -> dict[str, Bench]:
    return {
        "snnl": Bench(bench_snnl.rows, packages=bench_snnl.PACKAGES),
        "moe": Bench(bench_moe.rows),
        "router": Bench(bench_moe.router_rows),
        "attacks": Bench(bench_attacks.rows),
        "gpu": Bench(bench_gpu.rows, packages=bench_snnl.PACKAGES),
        "workers": Bench(lambda quick: [], {"workers": bench_gpu.workers}),
        "train": Bench(bench_train.rows),
        "scaling": Bench(
            bench_scaling.rows,
            {"throughput": bench_scaling.throughput},
            {"exponents": bench_scaling.exponents},
            bench_scaling.figure,
        ),
        "profile": Bench(lambda quick: [], {"profiles": bench_profile.missed}),
    }


def run(arguments: argparse.Namespace) -> int:
    if arguments.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    torch.set_num_threads(arguments.threads)
    machine = Machine(arguments.device, arguments.threads, turn=0.002 if arguments.quick else 0.02)
    if arguments.memory_of:
        print(json.dumps(_memory(arguments.names[0], arguments.quick, machine, *arguments.memory_of)))
        return 0
    if arguments.out is None and (arguments.rows or arguments.quick):
        raise ValueError("--rows and --quick are no whole measurement: name a folder of its own with --out")
    out = arguments.out or store.results_dir() / "bench"
    every = [name for name in benches() if name not in ("gpu", "workers")]  # hours, on a CPU
    for name in every if "all" in arguments.names else arguments.names:
        keep = partial(store.write, out / f"{name}.json")
        keep(measure(name, machine, arguments.quick, arguments.rows, keep))
        print(f"wrote {out / name}.json")
        if (figure := benches()[name].figure) is not None:
            save_figure(figure, out / f"{name}.json")
    return 0


def measure(
    name: str,
    machine: Machine,
    quick: bool,
    only: list[int] | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """All rows, then all checks; `keep` is given what there is after each, since time may run out."""
    bench = benches()[name]
    content: dict[str, Any] = {"bench": name, "quick": quick, **origin(bench.packages), "rows": []}
    for number, row in enumerate(bench.rows(quick)):
        if only is None or number in only:
            content["rows"].append(_measured(name, row, number, machine, quick))
            if keep is not None:
                keep(content)
    for key, check in bench.checks.items():
        content[key] = check(machine)
    return content | {key: fit(content["rows"]) for key, fit in bench.fits.items()}


def _measured(bench: str, row: Row, number: int, machine: Machine, quick: bool) -> dict[str, Any]:
    room = available_memory() / 2
    present = [contestant for contestant in row.contestants if contestant.bytes <= room]
    before = probe(machine)
    seconds = compare(machine, present, row.rounds)
    rates = type(before)(*map(max, before, probe(machine)))
    limit = row.work.seconds(rates)
    ours = next(contestant.name for contestant in present if not contestant.peer)
    contestants: dict[str, Any] = {}
    for contestant in present:
        times = sorted(seconds[contestant.name])
        contestants[contestant.name] = {
            "peer": contestant.peer,
            "milliseconds": 1e3 * times[len(times) // 2],
            "fastest": 1e3 * times[0],
            "share_of_limit": limit / times[len(times) // 2],
            "times_ours": ratio(seconds[contestant.name], seconds[ours]),
            "memory_mb": memory_of_a_step(contestant.build(machine.device), machine.device)
            if machine.device != "cpu"  # torch's allocator counts exactly
            else _memory_in_fresh_processes(bench, number, contestant.name, machine, quick, row.processes),
        }
    peers = [figures for figures in contestants.values() if figures["peer"]]
    memories = [figures["memory_mb"] for figures in peers]
    memory = contestants[ours]["memory_mb"]
    faster = min((figures["times_ours"]["median"] for figures in peers), default=None)
    saving = min(memories) / memory if memory and memories and None not in memories else None
    result = {
        "row": row.name,
        **row.sizes,
        "dtype": row.dtype,
        **machine.describe(),
        "rounds": row.rounds,
        "rates": rates._asdict(),
        "limit_milliseconds": 1e3 * limit,
        "contestants": contestants,
        "left_out": [c.name for c in row.contestants if c not in present],  # too large for the memory
        "faster_than_fastest_peer": faster,
        "memory_saving": saving,
        "share_of_limit": contestants[ours]["share_of_limit"],
        "goals": {"faster": row.goal_time, "saving": row.goal_memory, "share": row.goal_share},
    }
    print(_line(result), flush=True)
    return result


def _line(result: dict[str, Any]) -> str:
    def against(value: float | None, goal: float | None) -> str:
        text = "-" if value is None else f"{value:.2f}"
        return text if goal is None else f"{text} (goal {goal:g})"

    goals = result["goals"]
    if len(result["contestants"]) == 1:
        ((name, alone),) = result["contestants"].items()
        share = against(alone["share_of_limit"], goals["share"])
        return f"{result['row']}: {name} {alone['milliseconds']:.2f} ms, {share} of the limit"
    return (
        f"{result['row']}: {against(result['faster_than_fastest_peer'], goals['faster'])} times as fast "
        "as the fastest of the peers timed, "
        f"1/{against(result['memory_saving'], goals['saving'])} of the least memory of a peer, "
        f"{against(result['share_of_limit'], goals['share'])} of the limit"
    )


def _memory_in_fresh_processes(
    bench: str, number: int, contestant: str, machine: Machine, quick: bool, processes: int = 1
) -> float | None:
    """Median: what an allocator holds back differs by a fifth from process to process."""
    command = [sys.executable, "-m", "benchmarks", bench, "--memory-of", str(number), contestant]
    command += ["--device", machine.device, "--threads", str(machine.threads), *["--quick"] * quick]
    found = []
    for _ in range(1 if quick else processes):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            raise RuntimeError(
                f"the memory of {contestant} could not be measured: {done.stderr.strip()[-500:]}"
            )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return None if None in found else statistics.median(found)


def _memory(bench: str, quick: bool, machine: Machine, number: str, name: str) -> float | None:
    row = benches()[bench].rows(quick)[int(number)]
    contestant = next(contestant for contestant in row.contestants if contestant.name == name)
    return memory_of_a_step(contestant.build(machine.device), machine.device)


def save_figure(figure: Callable[[dict[str, Any]], Any], path: Path) -> None:
    """A picture beside the result file `path`; none where matplotlib is missing."""
    try:
        from moe_study.report import plots
    except ModuleNotFoundError as error:
        print(f"no figure: {error.name} is not installed")
        return
    picture = path.with_suffix(".png")
    buffer = io.BytesIO()
    with plots.mpl.rc_context(plots.STYLE):
        drawn = figure(store.read(path))
        drawn.savefig(buffer, format="png", metadata={"Source": path.name, "Software": None})
    store.write_bytes(picture, buffer.getvalue())
    print(f"wrote {picture}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="+", choices=(*benches(), "all"), metavar="NAME", help="what to compare"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: results/bench")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: no evidence")
    parser.add_argument("--rows", type=int, nargs="+", metavar="I", help="only these rows, counted from 0")
    parser.add_argument("--memory-of", nargs=2, metavar=("ROW", "CONTESTANT"), help=argparse.SUPPRESS)
    try:
        return run(parser.parse_args(argv))
    except (store.StoreError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
