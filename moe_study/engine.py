"""The engine: it trains what has no result file yet.

A run's digest names its result file. `ensure` is the one place that decides what is done: notebooks,
`python -m moe_study run` and Snakemake all call it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

from moe_study import data, locks, store
from moe_study.configs.run import Run, StudyError
from moe_study.data import text
from moe_study.evaluate import Experiment
from moe_study.experiments import experiment_of
from moe_study.runs import STUDIES
from moe_study.train import History, OutOfTime, TrainingError, fit

GPU_THREADS = 8  # of a process: threads wait for each other's Python, processes for their turn on the GPU
GPU_WORKERS = 24  # runs at a time on one GPU of 80 GB; fewer where that is smaller
GPU_BYTES = 3 * 2**30  # for each of them
Selected = dict[str, dict[str, torch.Tensor]]  # weights of the epochs that validation data select


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Whether torch refuses operations that may differ from call to call; restored afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def execute(
    run: Run,
    device: str,
    deadline: float = float("inf"),
    on_epoch: Callable[[int, History], None] | None = None,
    train: Callable[..., tuple[History, Selected]] = fit,
) -> dict[str, Any]:
    """Train one run (or resume it from its checkpoint) and return the content of its result file.

    Args:
        train: `fit`, or what trains in its place.
    """
    started = time.perf_counter()
    store.reset_peak_memory()
    with deterministic(run.train.precision == "float64"):
        experiment = experiment_of(run, device)
        initial = {} if run.tuning else experiment.initial()
        try:
            run.workspace.mkdir(parents=True, exist_ok=True)
            history, selected = train(
                experiment.task,
                run.train,
                experiment.validation,
                label=run.label,
                checkpoint=run.workspace / "checkpoint.pt",
                run_id=run.id,
                on_epoch=on_epoch,
                deadline=deadline,
            )
        except OSError as error:
            raise store.explain(error, run.workspace) from error
        try:
            result = _measured(run, experiment, history, selected)
        except (ValueError, ArithmeticError) as error:  # a measure that was given what is not finite, say
            raise TrainingError(f"{run.label}, after epoch {run.train.epochs - 1}: {error}") from error
    if not run.tuning:
        result["initial"] = initial
    # At least the training of all sessions, of a run that was resumed.
    result["wall_seconds"] = max(time.perf_counter() - started, history.seconds)
    result["peak_memory_mb"] = store.peak_memory_mb()
    return result


def _measured(run: Run, experiment: Experiment, history: History, selected: Selected) -> dict[str, Any]:
    """What a result file says of a trained run."""
    task = experiment.task
    result: dict[str, Any] = {"history": {**vars(history)}, "best_epoch": history.best_epoch}
    if sessions := result["history"].pop("resumed_from"):
        result["resumed_from"] = sessions
    if not run.tuning:
        result |= {"primary_endpoint": store.PRIMARY_ENDPOINT, **experiment.final()}
        epochs = {"best_accuracy": history.best_accuracy_epoch, "best_cross_entropy": history.best_epoch}
        result["endpoints"] = {}
        for name, weights in sorted(selected.items()):
            found: dict[str, Any] = {"epoch": epochs[name]}
            if epochs[name] == run.train.epochs - 1:
                found["same_as"] = store.PRIMARY_ENDPOINT
            else:
                task.load_state_dict(weights)
                found |= experiment.endpoint()
            result["endpoints"][name] = found
    result["num_parameters"] = sum(p.numel() for p in task.model.parameters())
    return result


def twin(run: Run) -> Run | None:
    """A finished run of another study that is the same in all but name, so that its numbers are this one's.

    Seeds are drawn from a run's seed and the names of layers, never from study or arm. Versions must agree:
    where one study's was raised, the other's numbers are not taken.
    """

    def nameless(other: Run) -> Run:
        return replace(other, study="", arm="")

    for name, planned in STUDIES.items():
        if name != run.study and not name.endswith("-tuning"):
            for other in planned(run.profile):
                if nameless(other) == nameless(run) and other.path.exists():
                    return other
    return None


def read(run: Run) -> dict[str, Any]:
    """The result file of a finished run.

    Raises:
        StoreError: it is damaged, or of another run; says how, and what to do.
    """
    return store.read_run(run.path, run.id, asdict(run))


def write(run: Run, content: dict[str, Any]) -> None:
    """The result file of a run: whose it is, its configuration, and what was found."""
    store.write_run(run.path, {**content, "id": run.id, "run": asdict(run)})


def record(run: Run, device: str, found: dict[str, Any]) -> None:
    """The same of what this process has just found, with where it comes from."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    write(run, {**store.provenance(), "device": name, "threads": torch.get_num_threads(), **found})


def leftovers(run: Run) -> list[Path]:
    """What a killed process left of a run: temporary files, and the checkpoint of one that is finished."""
    found = store.leftovers(run.path)
    if run.workspace.is_dir():
        found += run.workspace.glob("*.part")  # dotted ones as well
        if run.path.exists():
            found += run.workspace.glob("checkpoint.pt")
    return found


def sweep(run: Run) -> None:
    """Delete them; the caller holds the run's lock."""
    for path in leftovers(run):
        path.unlink(missing_ok=True)


def _work(run: Run, device: str, deadline: float) -> str:
    """In a worker process: train one run unless it is done; "done" or "out of time".

    Args:
        deadline: `time.monotonic()` value, which counts alike in all processes of a machine.
    """
    if run.path.exists():
        return "done"
    if time.monotonic() > deadline:
        return "out of time"
    left = -1 if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
    try:
        with locks.hold(run.workspace, left, run.path):  # another notebook, shard or machine may be at it
            sweep(run)
            done = "done" if run.path.exists() else _train(run, device, deadline)
            sweep(run)
            return done
    except locks.Elsewhere:
        return "done"
    except Timeout:
        return "out of time"


def _train(run: Run, device: str, deadline: float) -> str:
    """The same, with the run's lock held."""
    if not run.tuning and (same := twin(run)) is not None:
        write(run, read(same) | {"same_as": same.label})
        return "done"

    def report(epoch: int, history: History) -> None:
        losses = history.validation
        _progress.put(
            (
                run.label,
                f"epoch {epoch}/{run.train.epochs}: "
                f"validation cross-entropy {losses['cross_entropy'][-1]:.4f}, "
                f"accuracy {losses['accuracy'][-1]:.2%}, {history.seconds:.0f} s",
            )
        )

    try:
        with locks.unless(run.path):
            result = execute(run, device, deadline, report)
    except OutOfTime:
        return "out of time"
    record(run, device, result)
    return "done"


def _work_on(runs: Sequence[Run], device: str, deadline: float, threads: int) -> list[tuple[str, str | None]]:
    """In a worker process: train some runs, on a GPU as many at a time as there are threads.

    Of each: what `_work` says, "out of memory", or "failed", and then the reason.
    """

    def start_thread() -> None:
        torch.set_num_threads(1)
        torch.cuda.set_stream(torch.cuda.Stream())  # one for all its runs: memory is kept for a stream

    def attempt(run: Run) -> tuple[str, str | None]:
        try:
            return _work(run, device_of(run, device), deadline), None
        except torch.OutOfMemoryError as error:  # of a GPU, which other runs may have filled
            return "out of memory", str(error)
        except Exception as error:
            return "failed", f"{type(error).__name__}: {error}"

    if device_of(runs[0], device) == "cpu":
        return [attempt(run) for run in runs]
    with ThreadPoolExecutor(threads, initializer=start_thread) as pool:
        return list(pool.map(attempt, runs))


_progress: Any = None  # in a worker: the queue to its parent


def _start_worker(queue: Any) -> None:
    global _progress
    _progress = queue
    torch.set_num_threads(1)
    store.provenance()  # now: the commit may move while runs go on, this process's code does not
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:  # a killed batch must not leave workers behind
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def watched() -> bool:
    """Whether this is a notebook that a person opened in Jupyter (papermill does not)."""
    return "JPY_SESSION_NAME" in os.environ


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def available_cores() -> int:
    """Those that this process may use, fewer than the machine's in a job of a cluster."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(device: str) -> int:
    """Runs at a time: one per core; on a GPU several share it, since one of these models leaves it idle."""
    if device == "cpu":
        return available_cores()
    room = torch.cuda.get_device_properties(0).total_memory // GPU_BYTES
    return max(1, min(GPU_WORKERS, GPU_THREADS * available_cores(), room))


def ensure(
    wanted: Sequence[Run],
    workers: int | None = None,
    device: str | None = None,
    time_limit: float | None = None,
    quiet: bool = False,
    among: Sequence[Run] | None = None,
) -> list[dict[str, Any]]:
    """Train the runs that have no result file yet, and return all finished results.

    Args:
        workers: runs at a time; None: one per core, or 24 that share a GPU. Each has a process of its own; on
            a GPU eight are threads of one process.
        device: "cpu" or "cuda"; what there is if None. float64 runs always use the CPU.
        time_limit: seconds after which no epoch is started; checkpoints are kept and the next call goes on.
        among: runs that progress is counted over, where these are a part of them; None: the wanted ones.

    Raises:
        StudyError: some runs failed. The others were finished first; the message has every reason.
        StoreError: the results folder cannot be written, or a result file in it is damaged.
        ValueError: an option is of another type, or out of range.
    """
    _check_options(workers, device, time_limit)
    found = {run: read(run) for run in wanted if run.path.exists()}  # a damaged one is named before training
    for run in found:
        if leftovers(run):
            with contextlib.suppress(Timeout, OSError), locks.hold(run.workspace, 0):
                sweep(run)
    if todo := [run for run in wanted if run not in found]:
        _train_all(todo, workers, device or default_device(), time_limit, quiet, among or wanted)
        found |= {run: read(run) for run in todo if run.path.exists()}
    return [found[run] for run in wanted if run in found]


def _check_options(workers: Any, device: Any, time_limit: Any) -> None:
    """Raises ValueError, naming the option, its value and what it may be."""
    if workers is not None and (type(workers) is not int or workers < 1):
        raise ValueError(
            f"workers must be an integer of 1 or more, or None for one per core; got {workers!r}"
        )
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device must be 'cpu', 'cuda', or None for what there is; got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no GPU here: leave it out to train on the CPU")
    if time_limit is not None and not (type(time_limit) in (int, float) and time_limit >= 0):  # not NaN
        raise ValueError(f"time_limit must be seconds, at least 0, or None for none; got {time_limit!r}")


def results(wanted: Sequence[Run]) -> list[dict[str, Any]]:
    """The finished ones among the given runs; trains nothing."""
    return [read(run) for run in wanted if run.path.exists()]


def missing_data(wanted: Sequence[Run], quiet: bool = False) -> dict[str, str]:
    """Fetch the data that runs need and the data folder lacks; the reason of each set that cannot be had."""
    failed = {}
    for name in dict.fromkeys(run.dataset for run in wanted):
        source: Any = text if text.is_corpus(name) else data
        try:
            if not source.present(name):
                if not quiet:
                    _say(f"data set {name} is not under {data.data_dir()}: fetching it")
                source.fetch(name)
        except data.DataError as error:
            failed[name] = str(error)
    return failed


def _say(line: str, end: str = "\n") -> None:
    """Print a line; if nobody reads any more, the work goes on in silence."""
    with contextlib.suppress(BrokenPipeError):
        print(line, end=end, flush=True)


def device_of(run: Run, device: str) -> str:
    return "cpu" if run.train.precision == "float64" else device


def _train_all(
    todo: list[Run],
    workers: int | None,
    device: str,
    time_limit: float | None,
    quiet: bool,
    among: Sequence[Run],
) -> None:
    """Train every run, each in a process; raises StudyError with the reasons of those that failed."""
    store.check_writable(store.results_dir())
    if store.provenance()["commit"] is None and not quiet:
        _say(
            "the commit is unknown: git is missing, or this folder is no git checkout. The results will say "
            "so; MOE_COMMIT names the commit of a copied folder"
        )
    missing = missing_data(todo, quiet)
    failed = {run: missing[run.dataset] for run in todo if run.dataset in missing}
    can_run = [run for run in todo if run not in failed]
    on_cpu = all(device_of(run, device) == "cpu" for run in can_run)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by the workers when they import torch
    workers = max(1, min(workers or default_workers("cpu" if on_cpu else device), len(can_run)))
    deadline = time.monotonic() + (float("inf") if time_limit is None else time_limit)
    context = multiprocessing.get_context("spawn")
    try:
        queue = context.Queue()
    except OSError as error:
        raise StudyError(
            f"cannot start worker processes ({error}): their semaphores need a writable /dev/shm; "
            "in a container, mount one (docker run --shm-size=1g)"
        ) from error
    with _Reporter(queue, len(can_run), quiet, among) as reporter:
        attempt = partial(_attempt, context, queue, device, deadline, reporter, failed)
        unfinished, lost = attempt(can_run, workers)
        while len(lost) > 1 and workers > 1:  # fewer at a time take less memory
            workers //= 2
            again, lost = attempt(lost, workers)
            unfinished += again
        for run in lost:  # alone
            again, killed = attempt([run], 1)
            unfinished += again
            if killed:
                failed[run] = (
                    "it ran out of memory, or was killed, also when it ran alone (or a script that calls "
                    "this lacks if __name__ == '__main__')"
                )
                reporter.finished()
    if unfinished and not quiet:
        _say(f"time limit: {unfinished} runs are left; the same command goes on from here")
    if failed:
        raise StudyError(_failures(failed, len(todo)))


def _attempt(
    context: Any,
    queue: Any,
    device: str,
    deadline: float,
    reporter: _Reporter,
    failed: dict[Run, str],
    runs: Sequence[Run],
    workers: int,
) -> tuple[int, list[Run]]:
    """Number of runs that the deadline cut off, and those that were lost: a GPU was full, or a worker was
    killed, which takes with it what was under way in the others; the rest goes on in new ones. The reason of
    a run that raised goes into `failed`."""
    unfinished: int = 0
    lost: list[Run] = []
    on_gpu = [run for run in runs if device_of(run, device) == "cuda"]
    processes = -(-workers // GPU_THREADS) if on_gpu else workers
    shares = [share for at in range(processes) if (share := on_gpu[at::processes])]
    shares += [[run] for run in runs if device_of(run, device) == "cpu"]
    threads = -(-workers // processes)
    waiting = deque(shares)
    under_way: dict[Any, list[Run]] = {}
    start = partial(ProcessPoolExecutor, processes, context, _start_worker, (queue,))
    pool = start()
    try:
        while waiting or under_way:
            try:
                while waiting and len(under_way) < processes:
                    job = pool.submit(_work_on, waiting[0], device, deadline, threads)
                    under_way[job] = waiting.popleft()
                job = next(as_completed(under_way))
                error = job.exception()
                if isinstance(error, BrokenProcessPool):
                    raise error
            except BrokenProcessPool:
                lost += itertools.chain(*under_way.values())
                under_way = {}
                pool.shutdown()
                pool = start()
                continue
            share = under_way.pop(job)
            said = f"{type(error).__name__}: {error}"
            outcomes = job.result() if error is None else [("failed", said)] * len(share)
            for run, (outcome, reason) in zip(share, outcomes, strict=True):
                if outcome == "out of memory":
                    lost.append(run)
                    continue
                unfinished += outcome == "out of time"
                if reason is not None:
                    failed[run] = reason
                reporter.finished()
    finally:
        pool.shutdown(cancel_futures=True)
    return unfinished, lost


def _failures(failed: dict[Run, str], num_wanted: int) -> str:
    """Each reason once, with the first run that it stopped."""
    lines = []
    for reason in dict.fromkeys(failed.values()):
        first, *more = [run.label for run in failed if failed[run] == reason]
        lines.append(f"{first}{f' and {len(more)} more' if more else ''}: {reason}")
    return (
        f"{len(failed)} of {num_wanted} runs failed; the others are kept, and the same command tries these "
        "again:\n  " + "\n  ".join(sorted(lines))
    )


class _Reporter:
    """Shows progress: a bar in a notebook that a person watches, else one line now and then.

    Args:
        among: runs that the line counts; other processes may train some of them.
    """

    EVERY = 10.0  # seconds between two lines, where they cannot be written over

    def __init__(self, queue: Any, total: int, quiet: bool, among: Sequence[Run]) -> None:
        self.queue, self.total, self.quiet = queue, total, quiet
        self.paths = [run.path for run in among]
        self.start, self.done_before = time.monotonic(), self._count()
        self.last, self.rewrites = -math.inf, sys.stdout.isatty()
        self.bar: Any = None
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> _Reporter:
        if watched() and not self.quiet:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=self.total, unit="run")
        self.thread.start()
        return self

    def _count(self) -> int:
        return sum(path.exists() for path in self.paths)

    def _follow(self) -> None:
        while (message := self.queue.get()) is not None:
            if self.bar is not None:
                self.bar.set_postfix_str(": ".join(message))
            elif not self.quiet and time.monotonic() - self.last >= (1.0 if self.rewrites else self.EVERY):
                self._line(": ".join(message))

    def _line(self, now: str) -> None:
        done, elapsed = self._count(), time.monotonic() - self.start
        left, trained = len(self.paths) - done, done - self.done_before
        seconds = left * elapsed / trained if trained else math.nan
        wait = f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"
        line = f"{done} runs done, {left} left, {wait if trained else 'time left not known yet'} | {now}"
        if self.rewrites:
            _say(f"\r{line[:150]}\x1b[K", end="")
        else:
            _say(line)
        self.last = time.monotonic()

    def finished(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def __exit__(self, *exception: object) -> None:
        self.queue.put(None)
        self.thread.join()
        if self.bar is not None:
            self.bar.close()
        elif self.rewrites and not self.quiet:
            _say("")
