"""What a plan will take: medians of finished runs, and for other arms the rate of their study."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from moe_study import data, store, study
from moe_study.data import text
from moe_study.engine import default_device, default_workers
from moe_study.study import Run, read


class Times:
    """Wall times of finished runs, as recorded in their result files."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.seconds: dict[tuple[str, ...], list[float]] = defaultdict(list)
        self.memory: dict[str, float] = {}
        self.finished: dict[tuple[str, ...], int] = defaultdict(int)
        for run in runs:
            if not run.path.exists():
                continue
            self.finished[_group(run)] += 1
            result = read(run)
            if "same_as" not in result:  # trained for another study
                self._add(run, result)

    def _add(self, run: Run, result: dict[str, Any]) -> None:
        seconds = result["wall_seconds"]
        self.seconds[_group(run)].append(seconds)
        self.seconds[(*_group(run)[:3], "an epoch")].append(seconds / run.train.epochs)
        self.memory[run.study] = max(self.memory.get(run.study, 0.0), result["peak_memory_mb"])

    def expected(self, run: Run) -> float | None:
        """Seconds: the median of the same arm, else of an epoch on that data set; None if neither ran."""
        if own := self.seconds.get(_group(run)):
            return statistics.median(own)
        found = self.seconds.get((*_group(run)[:3], "an epoch"))
        return None if found is None else run.train.epochs * statistics.median(found)


def _group(run: Run) -> tuple[str, ...]:
    return run.profile, run.study, run.dataset, run.arm


def plan(wanted: list[Run], workers: int | None = None) -> str:
    """What is done, what is left, and what that will take, as text; starts nothing."""
    todo = [run for run in wanted if not run.path.exists()]
    workers = max(1, min(workers or default_workers(default_device()), len(todo)))
    times = Times(wanted)
    wide = max([16, *(len(run.arm) for run in wanted)])
    lines = [f"{'study':18} {'data set':14} {'arm':{wide}} {'done':>5} {'left':>5} {'minutes left':>13}"]
    total, unknown = 0.0, 0
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in wanted:
        groups[_group(run)].append(run)
    for key, group in groups.items():
        done = times.finished[key]
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
        f"time: {duration(total)} of one core{and_more}, about {duration(total / workers)} with "
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
    known = data.DATASETS | text.CORPORA
    infos = [known[name] for name in missing if name in known]
    return (
        f"download: {sum(info.download_mb for info in infos)} MB ({', '.join(missing) or 'nothing'}), "
        f"{sum(info.unpacked_mb for info in infos)} MB unpacked under {data.data_dir()}"
    )
