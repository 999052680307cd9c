"""Where the time of a step goes in the rows of results/bench that miss their goal: ours, the fastest peer.

Shares are of the processor time that PyTorch's profiler ascribes to each operation itself; what it costs to
profile is in them, so small operations look a little dearer than they are.
"""

from __future__ import annotations

from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks import experts as bench_moe
from benchmarks import training as bench_train
from benchmarks.measure import Machine, Row, Step
from moe_study import store

KINDS = {  # kind -> how the names of its operations begin
    "products": ("mm", "addmm", "bmm", "baddbmm", "_linear_pointwise"),
    "convolutions": ("convolution", "mkldnn_convolution"),
    "rows moved": (
        "index", "_index_put", "scatter", "gather", "cat", "copy_", "_embedding_bag", "sort", "fill_",
    ),
    "experts chosen": ("max", "topk", "argmax", "_softmax", "_log_softmax"),
    "element by element": (
        "mul", "add", "sub", "div", "abs", "sum", "mean", "clamp", "threshold", "relu", "sqrt", "sgn",
    ),
    "optimizer": ("_fused_adam", "_foreach", "Optimizer"),
}  # fmt: skip
REST = "calls and the rest"


def kind_of(operation: str) -> str:
    name = operation.split("::")[-1]
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), REST)


def shares(step: Step, steps: int = 10) -> dict[str, float]:
    """Of the processor time of a step, by kind; they sum to 1."""
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    found = dict.fromkeys((*KINDS, REST), 0.0)
    for event in profiler.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total
    total = sum(found.values())
    return {kind: time / total for kind, time in found.items()}


def missed(machine: Machine) -> list[dict[str, Any]]:
    """Of each row of the last benchmarks that misses its goal in time."""
    found = []
    rows: dict[str, list[Row]] = {
        "moe": bench_moe.rows(), "router": bench_moe.router_rows(), "train": bench_train.rows(),
    }  # fmt: skip
    for name, planned in rows.items():
        path = store.results_dir() / "bench" / f"{name}.json"
        measured = {row["row"]: row for row in (store.read(path)["rows"] if path.exists() else [])}
        for row in planned:
            last = measured.get(row.name)
            if last is None or not row.goal_time or last["faster_than_fastest_peer"] >= row.goal_time:
                continue
            times = {who: figures["milliseconds"] for who, figures in last["contestants"].items()}
            peers = [one for one in row.contestants if one.peer and one.name in times]
            for contestant in (row.contestants[0], min(peers, key=lambda peer: times[peer.name])):
                print(f"{row.name}: {contestant.name}", flush=True)
                found.append(
                    {
                        "row": row.name,
                        "contestant": contestant.name,
                        "milliseconds": times[contestant.name],
                        "shares": shares(contestant.build(machine.device)),
                    }
                )
    return found
