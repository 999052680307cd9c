"""What was measured into results/bench, as tables and sentences."""

from __future__ import annotations

from typing import Any

import pandas as pd

from moe_study import store
from moe_study.report.page import markdown


def bench(name: str) -> dict[str, Any]:
    """Content of results/bench/<name>.json; empty where that is not there."""
    path = store.results_dir() / "bench" / f"{name}.json"
    return store.read(path) if path.exists() else {}


def bench_table(name: str) -> pd.DataFrame:
    """Ours against its fastest peer, from results/bench/<name>.json; empty where that is not there."""
    rows = []
    for row in bench(name).get("rows", []):
        contestants = row.get("contestants", {})
        plain = contestants.get("ours, float32", {}).get("milliseconds")
        peers = [found["milliseconds"] for found in contestants.values() if found["peer"]]
        if row["faster_than_fastest_peer"] is None:  # no peer was there
            continue
        goal = row.get("goals", {}).get("faster")
        on_gpu, fused = name == "gpu", contestants.get("ours, fused")
        part = next((text for who, text in PARTS.items() if who in contestants), "") if on_gpu else ""
        rows.append(
            {
                "batch": part + row["row"],
                "times as fast": f"{row['faster_than_fastest_peer']:.2f}",
                "goal": f"{goal:.2g}" if goal else "-",
                "in float32 like the peer": f"{min(peers) / plain:.1f}" if plain else "-",
                "memory, times less": f"{row['memory_saving']:.1f}",
                "fused kernels, times as fast": f"{min(peers) / fused['milliseconds']:.1f}" if fused else "-",
                "their memory, times less": f"{_least(contestants) / fused['memory_mb']:.1f}"
                if fused
                else "-",
                # The probes of the file that is there were too small for a GPU: some shares are above 1. And
                # of an attack the limit counts the images alone.
                "share of the physical limit": "-"
                if name in ("gpu", "attacks")
                else f"{row['share_of_limit']:.2f}",
            }
        )
    table = pd.DataFrame(rows)
    unused = [name for name in table if (table[name] == "-").all()]
    return table.drop(columns=unused).set_index("batch") if rows else table


def _least(contestants: dict[str, Any]) -> float:
    """Memory of the peer that takes least, MB."""
    return min(float(found["memory_mb"]) for found in contestants.values() if found["peer"])


# What a row measures, told by a contestant, where rows of all parts stand in one table.
PARTS = {"cleverhans": "SNNL, ", "authors, sums": "AC router, "}

BENCH_TITLES = {
    "snnl": "SNNL",
    "moe": "Mixtures of experts",
    "router": "The AC router (statistics and decision)",
    "attacks": "Attacks",
    "train": "Training steps (our CNN in bfloat16, which may pass the limit; peers in float32)",
    "gpu": "On a GPU",
}


def scaling_table() -> pd.DataFrame:
    """Exponents from results/bench/scaling.json, a size a column; empty where that is not there."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for entry in bench("scaling").get("exponents", []):
        for key in ("time", "memory"):
            fit = (
                entry[key]
                and f"{entry[key]['exponent']:.2f} [{entry[key]['low']:.2f}, {entry[key]['high']:.2f}]"
            )
            rows.setdefault((entry["job"], key), {})[entry["size"]] = fit or "-"
    if not rows:
        return pd.DataFrame()
    return pd.DataFrame.from_dict(rows, orient="index").fillna("-").rename_axis(["step of", "grows"])


def profile_table() -> pd.DataFrame:
    """Where time goes in the rows that miss their goal, from results/bench/profile.json; empty without it."""
    rows = [
        {"batch": entry["row"], "contestant": entry["contestant"], "ms": f"{entry['milliseconds']:.1f}"}
        | {kind: f"{share:.2f}" for kind, share in entry["shares"].items()}
        for entry in bench("profile").get("profiles", [])
    ]
    return pd.DataFrame(rows).set_index("batch") if rows else pd.DataFrame()


# Why the rows that miss their goal do: read off the profiles below.
MISSED = (
    "Where a goal is missed, a step's processor time goes (shares; `python -m benchmarks profile`) mostly "
    "into work that the peer does as well: in bfloat16 the experts' products, in training the convolutions "
    "(without matrix units bfloat16 does not quite halve them), in ten stacked models the products of small "
    "matrices and the gathering of their batches. The AC router has no such part: its products have few "
    "columns, and the rest are passes over the tokens."
)


def throughput_text() -> str:
    """A clause for each number of processes measured."""
    clauses = [
        f"{row['processes']} processes do {row['times_one']['median']:.2f} times as much "
        f"(quartiles {row['times_one']['low']:.2f} to {row['times_one']['high']:.2f})"
        for row in bench("scaling")["throughput"]
        if row["processes"] > 1
    ]
    return ", ".join(clauses) or "more than one process were not measured"


def inspector_sections() -> list[str]:
    """The inspector beside its peers, from results/bench/inspect.json; nothing without it."""
    if not (found := bench("inspect")):
        return []
    tools = found["tools"]

    def percent(entry: dict[str, Any], key: str) -> str:
        return f"{entry[key]:+.0f} %" if key in entry else "-"

    blind = [name for name, entry in tools.items() if len(set(entry["sees"].values())) == 1]
    seen = pd.DataFrame({name: entry["sees"] for name, entry in tools.items()}).rename_axis("planted")
    cost = pd.DataFrame(
        {
            name: {
                "training, every step": percent(entry, "added_percent_training"),
                "training, every tenth step": percent(entry, "added_percent_training_every_10"),
                "generation": percent(entry, "added_percent_generation"),
                "memory, MiB in 50 steps": f"{entry['mib_per_50_steps']:.1f}"
                if "mib_per_50_steps" in entry
                else "-",
            }
            for name, entry in tools.items()
            if name not in blind
        }
    ).T.rename_axis("tool")
    sections = [
        "## Watching a model",
        "Faults planted in every block of a small Mixtral (two blocks, 8 experts, K = 2), and what each tool "
        "says of them (`python -m benchmarks.inspect peers`). *Second choice only*: an expert that is busy, "
        "though never a token's first choice; nothing is wrong with it. The gates of this model are sure of "
        "each token, which moewatch's alarm on entropy is about.",
        markdown(seen),
        "Processor time that watching adds, medians of ratios in one process, and what the process gains"
        + (f" (without {', '.join(blind)}, which read nothing of this model):" if blind else ":"),
        markdown(cost),
    ]
    if found.get("load_average", 0) > found.get("cores", 1):
        sections.append(
            f"The machine was busy meanwhile (load {found['load_average']:.0f} on {found['cores']} cores): "
            "the times are rough, and one below zero is noise."
        )
    if passes := found.get("pass_added_percent"):
        listed = "; ".join(f"{value:+.0f} % at {what}" for what, value in passes.items())
        sections.append(
            f"`inspect_moe` adds to a forward pass, the examination of all experts included: {listed}."
        )
    sections += (
        [f"Not installed when measured: {', '.join(missing)}."] if (missing := found["missing"]) else []
    )
    return sections


def speed_sections() -> list[str]:
    """The README's tables of what was measured into results/bench."""
    speeds = {title: bench_table(name) for name, title in BENCH_TITLES.items()}
    if not speeds[on_gpu := BENCH_TITLES["gpu"]].empty:
        processor = bench("gpu")["rows"][0]["processor"]
        speeds[f"{on_gpu} ({processor}; below 1 a peer is faster)"] = speeds.pop(on_gpu)
    sections = [text for title, t in speeds.items() if not t.empty for text in (f"{title}:", markdown(t))]
    if sections:
        sections.insert(
            0,
            "Value and gradient, ours against the fastest peer in the same run (one thread, float32 where "
            "nothing else is said; `make bench`). The limit is what the processor's products and memory "
            "could do; *goal* is the speed-up that was aimed at; where *memory, times less* is below 1, the "
            "peer takes less.",
        )
    if not (profiles := profile_table()).empty:
        sections += [MISSED, markdown(profiles)]
    if not (powers := scaling_table()).empty:
        sections += [
            "Time and memory of a step of ours grow as powers of each size alone: exponents, 95 % intervals "
            "(`python -m benchmarks scaling`; drawn in `results/bench/scaling.png`):",
            markdown(powers),
            "Seeds are runs of their own, so ten cost ten times one. Of the work that one process does in "
            f"some time (steps of the CNN with SNNL), {throughput_text()}.",
        ]
    return sections
