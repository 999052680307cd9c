"""The study without a notebook: python -m moe_study run | plan | where | data | readme | trust | rates."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_study import data, plan, store, study
from moe_study.data import text
from moe_study.train import TrainingError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="train what has no result file yet")
    plan = commands.add_parser("plan", help="what is done, what is left, and what that will take")
    for command in (run, plan):
        command.add_argument("--profile", required=True, help=", ".join(study.PROFILES))
        command.add_argument("--study", help=", ".join(study.STUDIES))
        command.add_argument("--dataset")
        command.add_argument("--arm")
        command.add_argument("--workers", type=int, help="processes (default: one per core, one on a GPU)")
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: what there is")
    run.add_argument("--shard", default="1/1", help="i/n: the i-th of n equal parts, counted from 1")
    run.add_argument("--time-limit", type=float, metavar="S", help="start no epoch after S seconds")
    run.add_argument("--out", type=Path, metavar="DIR", help="results folder (default: MOE_RESULTS_DIR)")
    run.add_argument("--done", type=Path, metavar="FILE", help="write this when every run has its file")

    where = commands.add_parser("where", help="the report's path")
    where.add_argument("--profile", required=True)

    fetch = commands.add_parser("data", help="download and check data sets")
    fetch.add_argument(
        "names", nargs="*", help=f"of {', '.join([*data.DATASETS, *text.CORPORA])} (default: all)"
    )

    readme = commands.add_parser("readme", help="rewrite the README's result tables from results/")
    readme.add_argument("--check", action="store_true", help="change nothing; fail if it is out of date")

    commands.add_parser("trust", help="score every measure on planted data, into results/planted/trust.json")
    commands.add_parser("rates", help="how often the rule says each word, into results/planted/verdicts.json")

    arguments = parser.parse_args(argv)
    try:
        return COMMANDS[arguments.command](arguments)
    except (data.DataError, store.StoreError, study.StudyError, TrainingError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _selected(arguments: argparse.Namespace) -> list[study.Run]:
    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {arguments.workers}")
    return study.runs(arguments.profile, arguments.study, arguments.dataset, arguments.arm)


def _run(arguments: argparse.Namespace) -> int:
    runs = study.shard(_selected(arguments), arguments.shard)
    if arguments.out is not None:
        store.use_results_dir(arguments.out)
    study.ensure(runs, arguments.workers, arguments.device, arguments.time_limit)
    missing = sum(not run.path.exists() for run in runs)
    print(f"{len(runs) - missing} of {len(runs)} runs have their result under {store.results_dir()}")
    if arguments.done is not None and not missing:
        store.write(arguments.done, {"runs": [run.id for run in runs]})
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    print(plan.plan(_selected(arguments), arguments.workers))
    return 0


def _where(arguments: argparse.Namespace) -> int:
    study.runs(arguments.profile)  # refuses an unknown one
    print(store.results_dir() / arguments.profile / "report.html")
    return 0


def _data(arguments: argparse.Namespace) -> int:
    for name in arguments.names or [*data.DATASETS, *text.CORPORA]:
        if text.is_corpus(name):
            corpus = text.load(name)
            print(f"{name}: {len(corpus.train)} bytes of training text, {len(corpus.test)} of test text")
            continue
        loaded = data.load(name)
        print(
            f"{name}: {len(loaded.train) + len(loaded.validation)} training, {len(loaded.test)} test images"
        )
    print(f"data folder: {data.data_dir()}")
    return 0


def _readme(arguments: argparse.Namespace) -> int:
    from moe_study.report import page  # needs pandas, which a bare machine lacks

    return page.update_readme(data.ROOT / "README.md", check=arguments.check)


def _trust(arguments: argparse.Namespace) -> int:
    import torch

    from moe_study import trust  # needs pandas, which a bare machine lacks

    torch.set_num_threads(1)
    trust.write()
    print(trust.path())
    return 0


def _rates(arguments: argparse.Namespace) -> int:
    from moe_study import rates  # needs pandas, which a bare machine lacks

    rates.write()
    print(rates.path())
    return 0


COMMANDS = {
    "run": _run, "plan": _plan, "where": _where, "data": _data, "readme": _readme, "trust": _trust,
    "rates": _rates,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
