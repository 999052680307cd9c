"""What a plan will take, the shards that a cluster gets, and how long so many workers need for them.

Times are medians of finished runs; for other arms the rate of their study, for another profile the rate of
the same model and data, scaled by what is trained on.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_study import data, store, study
from moe_study.configs.arms import PROFILES
from moe_study.data import text
from moe_study.engine import default_device, default_workers, device_of
from moe_study.study import Run, read

UNKNOWN = 60.0  # seconds, for shards: a run of which nothing is known
UNKNOWN_MB = 2000
# Seconds that a job takes beside its runs: submission, two starts of Snakemake, imports (results/cluster).
START = 20.0


class Times:
    """Wall times of finished runs, as recorded in their result files; the first part of a key says whether on
    a CPU or a GPU, where several share it."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.seconds: dict[tuple[str, ...], list[float]] = defaultdict(list)
        self.rates: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
        self.memory: dict[str, float] = {}
        self.machines: set[str] = set()
        for run in runs:
            if not run.path.exists():
                continue
            result = read(run)
            if "same_as" not in result:  # trained for another study
                self._add(run, result)

    def _add(self, run: Run, result: dict[str, Any]) -> None:
        seconds, device = result["wall_seconds"], result.get("device", "cpu")
        kind = "cpu" if device == "cpu" else "cuda"
        self.seconds[(kind, *_group(run))].append(seconds)
        self.seconds[(kind, *_group(run)[:3], "an epoch")].append(seconds / run.train.epochs)
        if device == "cpu":  # on a GPU it is that of all runs of a process
            self.memory[run.study] = max(self.memory.get(run.study, 0.0), result["peak_memory_mb"])
        self.machines.add(result.get("machine", "an unknown processor") if device == "cpu" else device)
        if (size := _size(run)) is not None:
            training = min(result.get("history", {}).get("seconds", seconds), seconds)
            for key in _likeness(run):
                self.rates[(kind, *key)].append((training / size, seconds - training))

    def expected(self, run: Run) -> float | None:
        """Seconds: the median of the same arm, else of an epoch on that data set, else of the same model in
        another profile, on the kind of device that it would have here; else on the other kind; None if none
        of them ran.
        """
        kinds = dict.fromkeys((device_of(run, default_device()), "cpu", "cuda"))
        found = (self._expected(run, kind) for kind in kinds)
        return next((seconds for seconds in found if seconds is not None), None)

    def _expected(self, run: Run, kind: str) -> float | None:
        if own := self.seconds.get((kind, *_group(run))):
            return statistics.median(own)
        if found := self.seconds.get((kind, *_group(run)[:3], "an epoch")):
            return run.train.epochs * statistics.median(found)
        size = _size(run)
        for key in _likeness(run):
            if size is not None and (rates := self.rates.get((kind, *key))):
                training, measuring = (statistics.median(column) for column in zip(*rates, strict=True))
                return size * training + measuring
        return None


def _group(run: Run) -> tuple[str, ...]:
    return run.profile, run.study, run.dataset, run.arm


def _likeness(run: Run) -> list[tuple[str, ...]]:
    """Keys under which runs cost alike per image, the closest first."""
    family = run.study.removesuffix("-confirm")
    return [(family, run.dataset, run.arm), (family, run.dataset)]


def _size(run: Run) -> float | None:
    """Images or bytes that a run is trained on, over all epochs."""
    each = run.epoch_tokens or run.train_images
    if each is None and run.dataset in data.DATASETS:
        each = data.DATASETS[run.dataset].images
    elif each is None and run.dataset in text.CORPORA:
        each = text.CORPORA[run.dataset].train_bytes
    return None if each is None else each * run.train.epochs


def related(wanted: Sequence[Run]) -> list[Run]:
    """These runs, and those of other profiles on the same data."""
    datasets = {run.dataset for run in wanted}
    others = {run.profile for run in wanted} ^ set(PROFILES)
    found = [run for profile in sorted(others) for run in study.runs(profile) if run.dataset in datasets]
    return [*wanted, *found]


# ------------------------------------------------------------------------------------------ shards


class Part(NamedTuple):
    """A shard: its runs, and what it asks of a cluster."""

    runs: list[str]  # their ids
    seconds: float  # expected
    memory_mb: int  # of one process, with a half more than was ever seen
    limit_minutes: int  # after which a job is ended; its checkpoints stay, and a retry has longer
    gpu: bool  # whether a run of it would use one


def shards(wanted: Sequence[Run], minutes: float = 5, times: Times | None = None) -> list[Part]:
    """The unfinished runs in shards of at least so many expected minutes, the longest first.

    A job costs seconds of its own, so a shard must not be short. Runs are taken by length, the longest first,
    and a shard is closed as soon as it is long enough; what is left at the end goes to the last one.
    """
    times = times or Times(related(wanted))
    todo = [run for run in wanted if not run.path.exists()]
    known = [seconds for run in todo if (seconds := times.expected(run)) is not None]
    otherwise = statistics.median(known) if known else UNKNOWN
    length = {run: times.expected(run) or otherwise for run in todo}
    groups: list[list[Run]] = []
    left: list[Run] = []
    for run in sorted(todo, key=length.__getitem__, reverse=True):
        left.append(run)
        if sum(length[run] for run in left) >= 60 * minutes:
            groups.append(left)
            left = []
    if left:
        groups = [*groups[:-1], [*groups[-1], *left]] if groups else [left]
    most = max(times.memory.values(), default=UNKNOWN_MB / 1.5)
    parts = []
    for group in groups:
        seconds = sum(length[run] for run in group)
        memory = math.ceil(1.5 * max(times.memory.get(run.study, most) for run in group))
        gpu = any(run.train.precision != "float64" for run in group)
        parts.append(Part([run.id for run in group], seconds, memory, 10 + math.ceil(seconds / 20), gpu))
    return sorted(parts, key=lambda part: part.seconds, reverse=True)


def write_shards(wanted: Sequence[Run], folder: Path, minutes: float = 5) -> Path:
    """Write the shards and notebooks where every job finds them, in a folder named by what they hold."""
    parts, notebooks = shards(wanted, minutes), study.notebooks(wanted)
    folder /= "shards-" + store.digest([[part.runs for part in parts], notebooks])
    for done in folder.glob("*of*.json"):  # of the same work, done before and deleted since
        done.unlink()
    store.write(folder / "shards.json", {"shards": parts, "notebooks": notebooks})
    return folder / "shards.json"


def read_shards(path: Path) -> list[Part]:
    """The list that `write_shards` wrote."""
    fields = store.read(path).get("shards")
    if not isinstance(fields, list):
        raise ValueError(f"{path} lists no shards: --plan takes a file that `plan.write_shards` wrote")
    return [Part(**part) for part in fields]


def part_of(wanted: Sequence[Run], path: Path, which: str) -> list[Run]:
    """The runs of one shard of such a list; `which` is "i/n", counted from 1.

    Raises:
        ValueError: the list has not n shards, or names a run that is not among the wanted ones.
    """
    parts = read_shards(path)
    study.shard(list(wanted), which)  # refuses what is not i/n
    number, count = map(int, which.split("/"))
    if count != len(parts):
        raise ValueError(f"{path} lists {len(parts)} shards, got --shard {which}")
    by_id = {run.id: run for run in wanted}
    ids = parts[number - 1].runs
    if unknown := [run_id for run_id in ids if run_id not in by_id]:
        raise ValueError(f"{path} names run {unknown[0]}, which the plan lacks: the code has changed since")
    return [by_id[run_id] for run_id in ids]


# -------------------------------------------------------------------------------------- simulation


class Outcome(NamedTuple):
    """So many workers at a list of jobs."""

    workers: int
    wall: float  # seconds until the last one ends
    starting: float  # share of the workers' time that jobs take beside their runs
    idle: float  # share in which a worker has no job any more


def simulate(seconds: Sequence[float], workers: int, start: float = START) -> Outcome:
    """Every worker takes the longest job that is left. Each job costs `start` seconds beside its own."""
    ends = [0.0] * min(workers, max(len(seconds), 1))
    for length in sorted(seconds, reverse=True):
        heapq.heappush(ends, heapq.heappop(ends) + start + length)
    wall = max(ends)
    held = workers * wall
    if not held:
        return Outcome(workers, 0.0, 0.0, 0.0)
    return Outcome(
        workers,
        wall,
        len(seconds) * start / held,
        max(0.0, 1 - (sum(seconds) + len(seconds) * start) / held),
    )


CURVE = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)


def curve(
    wanted: Sequence[Run], workers: int, minutes: float = 5, speed: float = 1.0, times: Times | None = None
) -> str:
    """What a cluster of so many workers would take, as text, and fewer and more of them.

    Args:
        minutes: the least that a shard is expected to take.
        speed: of one worker, as a multiple of the machines that the times come from.
    """
    times = times or Times(related(wanted))
    todo = [run for run in wanted if not run.path.exists()]
    unknown = sum(times.expected(run) is None for run in todo)
    parts = shards(wanted, minutes * speed, times)
    seconds = [part.seconds / speed for part in parts]
    lines = [
        f"{len(todo)} runs in {len(parts)} shards of at least {minutes:g} minutes, the longest first; a job "
        f"takes {START:.0f} s beside its runs",
        f"times: of runs on {', '.join(sorted(times.machines)) or 'no machine yet'}"
        + (f"; a worker is taken to be {speed:g} times as fast" if speed != 1 else "")
        + (f"; {unknown} runs of unknown length, taken as the median of the others" if unknown else ""),
        "",
        f"{'workers':>9} {'wall time':>12} {'hours held':>11} {'speed-up':>9} {'starting':>9} {'idle':>6}",
    ]
    alone = simulate(seconds, 1).wall
    for count in sorted({*CURVE, workers}):
        found = simulate(seconds, count)
        gain = alone / found.wall if found.wall else 1.0
        lines.append(
            f"{count:9}{'*' if count == workers else ' '}{duration(found.wall):>12} "
            f"{count * found.wall / 3600:11.1f} {gain:9.1f} {found.starting:9.1%} {found.idle:6.1%}"
        )
    return "\n".join([*lines, "", f"* the {workers} workers asked for; hours held: until the last one ends"])


# -------------------------------------------------------------------------------------------- plan


def plan(wanted: list[Run], workers: int | None = None, times: Times | None = None) -> str:
    """What is done, what is left, and what that will take, as text; starts nothing."""
    todo = [run for run in wanted if not run.path.exists()]
    workers = max(1, min(workers or default_workers(default_device()), len(todo)))
    times = times or Times(related(wanted))
    wide = max([16, *(len(run.arm) for run in wanted)])
    lines = [f"{'study':18} {'data set':14} {'arm':{wide}} {'done':>5} {'left':>5} {'minutes left':>13}"]
    total, unknown = 0.0, 0
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in wanted:
        groups[_group(run)].append(run)
    for key, group in groups.items():
        done = sum(run.path.exists() for run in group)
        left = len(group) - done
        each = times.expected(group[0])
        if each is None:
            unknown += left
        total += left * (each or 0.0)
        minutes = "unknown" if left and each is None else f"{left * (each or 0.0) / 60:.1f}"
        lines.append(f"{key[1]:18} {key[2]:14} {key[3]:{wide}} {done:5} {left:5} {minutes:>13}")
    and_more = f" and {unknown} runs of unknown length" if unknown else ""
    peak = max((times.memory.get(run.study, 0.0) for run in todo), default=0.0)
    lines += [
        "",
        f"time: {duration(total)} of one process{and_more}, about {duration(total / workers)} with "
        f"{workers} processes",
        f"notebooks: {len(study.notebooks(wanted)) + 2} after the runs, with tour and report (`make report`)",
        *([f"memory: up to {workers * peak:.0f} MB ({peak:.0f} MB a process)"] if peak else []),
        _download(todo),
        f"disk: about {len(todo) * 0.012:.1f} MB of results under "
        f"{store.results_dir()}, and up to {30 * workers} MB of checkpoints while it works",
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """In the unit that a person would choose."""
    for unit, size, least in (("days", 86_400, 2), ("hours", 3_600, 2)):
        if seconds >= least * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} minutes"


def _download(todo: list[Run]) -> str:
    datasets = {run.dataset for run in todo}
    missing = sorted(name for name in datasets if not (text if text.is_corpus(name) else data).present(name))
    images = {part for name in missing if name in data.DATASETS for part in data.DATASETS[name].published}
    infos: list[Any] = [data.PUBLISHED[part] for part in images if not data.present(part)]
    infos += [text.CORPORA[name] for name in missing if name in text.CORPORA]
    return (
        f"download: {sum(info.download_mb for info in infos)} MB ({', '.join(missing) or 'nothing'}), "
        f"{sum(info.unpacked_mb for info in infos)} MB unpacked under {data.data_dir()}"
    )
