"""Where the time of a step goes in the rows of results/bench that miss a goal: ours, the fastest peer timed.

Shares are of the processor time that PyTorch's profiler ascribes to each operation itself; what it costs to
profile is in them, so small operations look a little dearer than they are.
"""

from __future__ import annotations

import statistics
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks import attacks, experts, snnl, training
from benchmarks.measure import Machine, Step, compare
from moe_study import store

KINDS = {  # kind -> how the names of its operations begin
    "products": ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_linear_pointwise"),
    "convolutions": ("convolution", "mkldnn_convolution"),
    "rows moved": (
        "index", "_index_put", "scatter", "gather", "cat", "copy_", "_embedding_bag", "sort", "fill_",
    ),
    "attention": ("_scaled_dot_product",),
    "softmax and top-k": ("max_", "topk", "argmax", "_softmax", "_log_softmax"),
    "element by element": (
        "mul", "add", "sub", "div", "abs", "sum", "mean", "clamp", "threshold", "relu", "sqrt", "sgn", "exp_",
        "exp2", "log", "pow", "neg", "eq_", "ne_", "any", "bitwise", "where", "masked_fill", "hardshrink",
        "softplus", "native_layer_norm",
    ),
    "optimizer": ("_fused_adam", "_foreach", "Optimizer"),
}  # fmt: skip
REST = "calls and the rest"


def kind_of(operation: str) -> str:
    name = operation.split("::")[-1] + "_"  # "exp_" begins the name of exp, not of expand
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
    """Of each row that misses a goal in the last benchmarks: ours and the peer that was fastest there.

    Times are measured here, in turn.
    """
    from moe_study.report.speed import missed_goals  # needs the report's packages

    found = []
    planned = {
        "snnl": snnl.rows(), "moe": experts.rows(), "router": experts.router_rows(),
        "attacks": attacks.rows(), "train": training.rows(),
    }  # fmt: skip
    for name, rows in planned.items():
        path = store.results_dir() / "bench" / f"{name}.json"
        measured = {row["row"]: row for row in (store.read(path)["rows"] if path.exists() else [])}
        for row in rows:
            if row.name not in measured or not missed_goals(measured[row.name]):
                continue
            times = {
                who: figures["times_ours"]["median"]
                for who, figures in measured[row.name]["contestants"].items()
            }
            peers = [one for one in row.contestants if one.peer and one.name in times]
            both = row.contestants[0], min(peers, key=lambda peer: times[peer.name])
            seconds = compare(machine, both, row.rounds)
            for contestant in both:
                print(f"{row.name}: {contestant.name}", flush=True)
                found.append(
                    {
                        "bench": name,
                        "row": row.name,
                        "contestant": contestant.name,
                        "milliseconds": 1e3 * statistics.median(seconds[contestant.name]),
                        "shares": shares(contestant.build(machine.device)),
                    }
                )
    return found
