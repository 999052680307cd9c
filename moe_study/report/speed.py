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


def origin_text(name: str, command: str = "") -> str:
    """By what, where and when results/bench/<name>.json was measured; a file may not say all of it."""
    found = bench(name)
    where: dict[str, Any] = found.get("provenance", {})
    first: dict[str, Any] = next(iter(found.get("rows", [])), {})
    command = command or f"python -m benchmarks {name}" + " --device cuda" * (first.get("device") == "cuda")
    parts = [f"`{command}`", first.get("processor") or where.get("machine", "unknown machine")]
    parts += [f"torch {where['versions']['torch']}"] if "versions" in where else []
    commit = where.get("commit") or "unknown"
    if len(commit) < 7:  # no commit's name
        parts += ["commit and day: see benchmarks/README.md"]
    else:
        parts += [f"commit {commit[:10]}" + " with changes" * bool(where.get("dirty"))]
        parts += [found.get("date", "day unknown")]
    parts += [f"without {', '.join(absent)}"] if (absent := found.get("absent")) else []
    return f"Measured: {'; '.join(parts)}."


GOALS = {"faster": "faster_than_fastest_peer", "saving": "memory_saving", "share": "share_of_limit"}


def missed_goals(row: dict[str, Any]) -> list[str]:
    """Goals of a row that are known to be missed."""
    wanted = {goal: row["goals"][goal] for goal in GOALS if row["goals"][goal]}
    return [goal for goal, least in wanted.items() if (row[GOALS[goal]] or least) < least]


def _against(row: dict[str, Any], goal: str, digits: int, more: str = "") -> str:
    value, wanted = row[GOALS[goal]], row["goals"][goal]
    if value is None:
        return "-"
    text = f"{value:.{digits}f}"
    if wanted and value < wanted <= float(text):  # rounding meets no goal
        return _against(row, goal, digits + 1, more)
    missed = ", missed" if goal in missed_goals(row) else ""
    return text + more + (f" (goal {wanted:.2g}{missed})" if wanted else "")


def fastest_peer(row: dict[str, Any]) -> str:
    """Of those timed."""
    peers = {who: found for who, found in row["contestants"].items() if found["peer"]}
    return min(peers, key=lambda who: peers[who]["times_ours"]["median"])


def bench_table(name: str) -> pd.DataFrame:
    """Ours against the fastest peer timed, from results/bench/<name>.json; empty where that is not there."""
    rows = []
    for row in bench(name).get("rows", []):
        if row["faster_than_fastest_peer"] is None:  # no peer was there
            continue
        contestants, peer = row["contestants"], fastest_peer(row)
        times = contestants[peer]["times_ours"]
        quartiles = f" [{times['low']:.2f}, {times['high']:.2f}]"
        equal = " equal" if times["low"] <= 1 <= times["high"] else ""
        fused = contestants.get("ours, fused")
        part = next((text for who, text in PARTS.items() if who in contestants), "") if name == "gpu" else ""
        rows.append(
            {
                "batch": part + row["row"],
                "dtype": row["dtype"],
                "fastest peer timed": peer,
                "times as fast": _against(row, "faster", 2, quartiles + equal),
                "in float32 like the peer": _as_fast("ours, float32", peer, contestants),
                "memory, times less": _against(row, "saving", 1),
                "fused kernels, times as fast": _as_fast("ours, fused", peer, contestants),
                "their memory, times less": f"{_least(contestants) / fused['memory_mb']:.1f}"
                if fused
                else "-",
                # The probes of the file that is there were too small for a GPU: some shares are above 1. And
                # of an attack the limit counts the images alone.
                "share of the physical limit": "-"
                if name in ("gpu", "attacks")
                else _against(row, "share", 2),
            }
        )
    table = pd.DataFrame(rows)
    unused = [name for name in table if (table[name] == "-").all()]
    return table.drop(columns=unused).set_index("batch") if rows else table


def _as_fast(who: str, peer: str, contestants: dict[str, Any]) -> str:
    if who not in contestants:
        return "-"
    theirs, own = (contestants[name]["times_ours"]["median"] for name in (peer, who))
    return f"{theirs / own:.1f}"


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
    "train": "Training (ours in bfloat16, as the study trains: slow where a processor has no units for it, "
    "fast where it has; the limit is of float32)",
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
    """Where time goes in the rows that miss a goal, from results/bench/profile.json; empty without it.

    Of rows and peers that the present files still name.
    """
    missed = {
        (name, row["row"]): fastest_peer(row)
        for name in BENCH_TITLES
        for row in bench(name).get("rows", [])
        if missed_goals(row)
    }
    rows = [
        {"batch": entry["row"], "contestant": entry["contestant"], "ms": f"{entry['milliseconds']:.1f}"}
        | {kind: f"{share:.2f}" for kind, share in entry["shares"].items()}
        for entry in bench("profile").get("profiles", [])
        if (peer := missed.get((entry.get("bench"), entry["row"]))) and entry["contestant"] in ("ours", peer)
    ]
    return pd.DataFrame(rows).set_index("batch") if rows else pd.DataFrame()


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
    tools, bare = found["tools"], found.get("unwatched_mib", [])

    def spread(entry: dict[str, Any], key: str, digits: int = 0, unit: str = "") -> str:
        if not (one := entry.get(key)):
            return "-"
        middle, low, high = (f"{one[name]:+.{digits}f}" for name in ("median", "low", "high"))
        return f"{middle}{unit} [{low}, {high}]"

    blind = [name for name, entry in tools.items() if len(set(entry["sees"].values())) == 1]
    seen = pd.DataFrame({name: entry["sees"] for name, entry in tools.items()}).rename_axis("planted")
    cost = pd.DataFrame(
        {
            name: {
                "training, every step": spread(entry, "training_percent", unit=" %"),
                "training, every tenth step": spread(entry, "training_every_10_percent", unit=" %"),
                "generation": spread(entry, "generation_percent", unit=" %"),
                "MiB more after 50 steps": spread(entry, "mib_more", 1),
            }
            for name, entry in tools.items()
            if name not in blind
        }
    ).T.rename_axis("tool")
    sections = [
        "## Watching a model",
        "Faults planted in every block of a small Mixtral (two blocks, 8 experts, K = 2), and what each tool "
        "says of them. *Second choice only*: an expert that is busy, "
        "though never a token's first choice; nothing is wrong with it. The gates of this model are sure of "
        "each token, which moewatch's alarm on entropy is about.",
        origin_text("inspect", "python -m benchmarks.inspect peers"),
        markdown(seen),
    ]
    if (cost != "-").any(axis=None):  # a file of older keys says nothing of it
        sections += [
            "Processor time that watching adds to 100 training steps or to generation: medians of ratios in "
            "one process, quartiles in brackets"
            + (f" (without {', '.join(blind)}, which read nothing of this model). " if blind else ". ")
            + "Memory: what a process gains in 50 steps beyond one that is not watched, median and extremes "
            "of fresh processes"
            + (f" (those not watched: {bare[0]:.1f} to {bare[-1]:.1f} MiB)" if bare else "")
            + ". moewatch judges at its default interval, but for the faults every fifth of six steps.",
            markdown(cost),
        ]
        if found.get("load_average", 0) > found.get("cores", 1):
            sections.append(
                f"The machine was busy meanwhile (load {found['load_average']:.1f} on {found['cores']} "
                "cores): the times are rough."
            )
    if passes := found.get("pass_percent"):
        listed = "; ".join(f"{spread(passes, what, unit=' %')} at {what}" for what in passes)
        sections.append(
            f"`inspect_moe` adds to a forward pass, the examination of all experts included: {listed}."
        )
    sections += (
        [f"Not installed when measured: {', '.join(missing)}."] if (missing := found["missing"]) else []
    )
    return sections


def speed_sections() -> list[str]:
    """The tables of what was measured into results/bench."""
    sections = []
    for name, title in BENCH_TITLES.items():
        if not (table := bench_table(name)).empty:
            sections += [f"{title}:", origin_text(name), markdown(table)]
    if sections:
        sections.insert(
            0,
            "Ours against the fastest of the peers timed, in turn in one process: the median of the ratios "
            "of their times, with quartiles, *equal* where these lie on both sides of 1. Memory is compared "
            "with the peer that takes least. Below 1 the peer is faster, or takes less. For losses, mixtures "
            "and routers a step is one forward and one backward pass; in the other tables it is what the row "
            "names. One thread; the limit "
            "is what the processor's products and memory could do; a goal is what was aimed at. The code "
            "may have changed since the commit below a title.",
        )
    if not (profiles := profile_table()).empty:
        sections += [
            "Rows on a processor that miss a goal: shares of a step's processor time by kind of operation, "
            "of ours and of the fastest peer timed. Times are measured anew, in turn; profiling makes small "
            "operations look a little dearer.",
            origin_text("profile"),
            markdown(profiles),
        ]
    if not (powers := scaling_table()).empty:
        sections += [
            "Time and memory of a step of ours grow as powers of each size alone: exponents, 95 % intervals "
            "(drawn in `results/bench/scaling.png`).",
            origin_text("scaling"),
            markdown(powers),
            "Seeds are runs of their own, so ten cost ten times one. Of the work that one process does in "
            f"some time (steps of the CNN with SNNL), {throughput_text()}.",
        ]
    return sections
