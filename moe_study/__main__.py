"""The study without a notebook: python -m moe_study run | plan | where | data | readme | trust | rates."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import select
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

import moe_lib
from moe_study import data, ddp, engine, plan, store, study
from moe_study.data import text
from moe_study.train import TrainingError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _integer(text: str) -> int:
    if not re.fullmatch("-?[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer")
    return int(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds of 0 or more")
    return float(text)


def _number(text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(text)


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m moe_study", description=__doc__)
    parser.add_argument("--version", action="version", version=f"moe-collapse {moe_lib.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what has no result file yet")
    plan = commands.add_parser("plan", help="what is done, what is left, and what that will take")
    profiles = f"how much is run: {', '.join(study.PROFILES)}"
    for command in (run, plan):
        command.add_argument("--profile", required=True, help=profiles)
        command.add_argument("--study", help=f"one study alone: {', '.join(study.STUDIES)}")
        command.add_argument("--dataset", help="one data set alone, such as cifar10")
        command.add_argument(
            "--arm", help="one arm alone, such as base; of several (base,snnl) all seed by seed"
        )
        command.add_argument(
            "--workers",
            type=_integer,
            metavar="N",
            help="runs at a time (default: one per core, 24 on a large GPU)",
        )
    _add_run_options(run)
    plan.add_argument("--nodes", type=_integer, metavar="N", help="simulate a cluster of so many machines")
    plan.add_argument("--gpus", type=_integer, metavar="N", help="workers of each machine (default: 1)")
    plan.add_argument("--minutes", type=_number, metavar="M", help="least length of a shard (default: 5)")
    plan.add_argument(
        "--speed", type=_number, metavar="X", help="of a worker, as a multiple of the measured machines (1)"
    )
    where = commands.add_parser("where", help="the report's path")
    where.add_argument("--profile", required=True, help=profiles)
    fetch = commands.add_parser("data", help="download and check data sets")
    fetch.add_argument(
        "names", nargs="*", help=f"of {', '.join([*data.DATASETS, *text.CORPORA])} (default: all)"
    )
    fetch.add_argument("--profile", help="only fetch what the runs left of this profile need")
    readme = commands.add_parser(
        "readme", help="rewrite the README's answers and the pages of results from results/"
    )
    readme.add_argument("--check", action="store_true", help="change nothing; fail if it is out of date")
    commands.add_parser("trust", help="score every measure on planted data, into results/planted/trust.json")
    commands.add_parser("rates", help="how often the rule says each word, into results/planted/verdicts.json")
    return parser


def _add_run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: what there is")
    run.add_argument("--ddp", action="store_true", help="all processes share each run, batch by batch")
    run.add_argument("--shard", default="1/1", help="i/n: the i-th of n equal parts, counted from 1")
    run.add_argument(
        "--plan", type=_path, metavar="FILE", help="a list of n shards, of which --shard i/n takes the i-th"
    )
    run.add_argument("--time-limit", type=_seconds, metavar="S", help="start no epoch after S seconds")
    run.add_argument("--out", type=_path, metavar="DIR", help="results folder (default: MOE_RESULTS_DIR)")
    run.add_argument("--done", type=_path, metavar="FILE", help="write this when every run has its file")
    run.add_argument("--follow", type=_integer, metavar="PID", help="end when this process ends")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else argv
    try:
        status = COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # as in `plan | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 0
    except (data.DataError, store.StoreError, study.StudyError, TrainingError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _selected(arguments: argparse.Namespace) -> list[study.Run]:
    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {arguments.workers}")
    found = study.runs(arguments.profile, arguments.study, arguments.dataset, arguments.arm)
    if not found:
        there = [profile for profile in study.PROFILES if study.runs(profile, arguments.study)]
        raise study.StudyError(
            f"profile {arguments.profile!r} has no runs of study {arguments.study!r}; those that have some: "
            f"{', '.join(there)}"
        )
    return found


def _follow(pid: int) -> None:
    """End this process, and so its workers, as soon as another one has ended."""

    def watch() -> None:
        try:
            with contextlib.suppress(AttributeError, OSError):  # a system or a container may lack it
                select.select([os.pidfd_open(pid)], [], [])
            while True:
                os.kill(pid, 0)
                time.sleep(1)
        except ProcessLookupError:
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(arguments: argparse.Namespace) -> int:
    if arguments.out is not None:
        store.use_results_dir(arguments.out)
    selected = _selected(arguments)
    if arguments.plan is None:
        runs = study.shard(selected, arguments.shard)
    else:
        runs = plan.part_of(selected, arguments.plan, arguments.shard)
    if arguments.follow is not None:
        _follow(arguments.follow)
    if arguments.ddp:
        if arguments.time_limit is not None:
            raise ValueError("--time-limit has no effect with --ddp: stop it, and it goes on where it was")
        device = arguments.device or engine.default_device()
        ddp.check(runs)
        if not ddp.is_worker():
            there = torch.cuda.device_count() if device == "cuda" else engine.available_cores()
            workers = arguments.workers or there
            if device == "cuda" and not 1 <= workers <= there:
                raise ValueError(f"--ddp takes a GPU for each process: --workers is {workers}, GPUs: {there}")
            return ddp.start(arguments.argv, workers)
        ddp.ensure(runs, device)
    else:
        study.ensure(runs, arguments.workers, arguments.device, arguments.time_limit, among=selected)
    missing = sum(not run.path.exists() for run in runs)
    if arguments.done is not None and not missing:
        store.write(arguments.done, {"runs": [run.id for run in runs]})
    print(f"{len(runs) - missing} of {len(runs)} runs have their result under {store.results_dir()}")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    runs = _selected(arguments)
    times = plan.Times(plan.related(runs))
    print(plan.plan(runs, arguments.workers, times))
    for name in ("nodes", "gpus"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if arguments.nodes is not None:
        workers = arguments.nodes * (arguments.gpus or 1)
        print("\n" + plan.curve(runs, workers, arguments.minutes or 5, arguments.speed or 1, times))
    elif unused := [name for name in ("gpus", "minutes", "speed") if getattr(arguments, name) is not None]:
        raise ValueError(f"--{unused[0]} has no effect without --nodes")
    return 0


def _where(arguments: argparse.Namespace) -> int:
    study.runs(arguments.profile)  # refuses an unknown one
    print(store.results_dir() / arguments.profile / "report.html")
    return 0


def _data(arguments: argparse.Namespace) -> int:
    if arguments.profile is not None and arguments.names:
        raise ValueError(f"give names of data sets or --profile, not both; got {arguments.names[0]!r}")
    if arguments.profile is not None:
        return _data_of(arguments.profile)
    failed = []
    for name in arguments.names or [*data.DATASETS, *text.CORPORA]:
        try:
            print(f"{name}: {_sizes(name)}")
        except data.DataError as error:  # a server that is down, say: the others may not be
            failed.append(str(error))
    if failed:
        raise data.DataError("\n".join(failed))
    print(f"data folder: {data.data_dir()}")
    return 0


def _sizes(name: str) -> str:
    if text.is_corpus(name):
        corpus = text.load(name)
        return f"{len(corpus.train)} bytes of training text, {len(corpus.test)} of test text"
    loaded = data.load(name)
    return f"{len(loaded.train) + len(loaded.validation)} training, {len(loaded.test)} test images"


def _data_of(profile: str) -> int:
    """Fetch what the runs left of a profile need; an error only if then nothing of it can be shown."""
    runs = study.runs(profile)
    todo = [run for run in runs if not run.path.exists()]
    missing = study.missing_data(todo)
    for reason in missing.values():
        print(f"warning: {reason}", file=sys.stderr)
    if len(todo) == len(runs) and all(run.dataset in missing for run in todo):
        raise data.DataError(f"profile {profile!r} has no results, and none of its data can be had")
    return 0


def _readme(arguments: argparse.Namespace) -> int:
    from moe_study.report import readme  # needs pandas, which a bare machine lacks

    return readme.update_readme(data.ROOT / "README.md", check=arguments.check)


def _simulated(arguments: argparse.Namespace) -> int:
    from moe_study import rates, trust  # need pandas, which a bare machine lacks

    torch.set_num_threads(1)
    module: Any = {"trust": trust, "rates": rates}[arguments.command]
    module.write()
    print(module.path())
    return 0


COMMANDS = {
    "run": _run, "plan": _plan, "where": _where, "data": _data, "readme": _readme, "trust": _simulated,
    "rates": _simulated,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
