"""The runs of a profile, and the engine that trains what has no result file yet.

A run is a frozen configuration; its digest names its result file. `ensure` is the one place that
decides what is done: notebooks, `python -m moe_study run` and Snakemake all call it.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

from moe_lib.models.classifier import ClassifierConfig
from moe_lib.models.language import LanguageConfig
from moe_lib.models.vision import VisionConfig
from moe_study import data, locks, store
from moe_study.configs.arms import (
    AUXILIARY_WEIGHTS,
    BALANCE_WEIGHTS,
    COLLAPSE_BALANCE_WEIGHTS,
    COLLAPSE_RATES,
    COLLAPSE_SEED_COUNTS,
    COLLAPSE_SEEDS,
    COLLAPSE_SETTINGS,
    CONFIRMATORY_SEED_COUNTS,
    CONFIRMATORY_SEEDS,
    CROSSED_FACTORS,
    FACTORS,
    LEARNING_RATES,
    MAIN_ARMS,
    PROFILES,
    ROUTED_LEARNING_RATES,
    ROUTED_MAIN_ARMS,
    ROUTED_SEED_COUNTS,
    ROUTED_SETTINGS,
    SEED_COUNTS,
    SEEDS,
    SETTINGS,
    TUNING_DATASETS,
    TUNING_SEEDS,
    VERSIONS,
    RoutedSettings,
    Settings,
    collapse_arms,
    routed_arms,
    snnl_arms,
)
from moe_study.configs.dose import PLANS
from moe_study.data import text
from moe_study.evaluate import ClassifierExperiment, Experiment
from moe_study.evaluate_transformer import LanguageExperiment, VisionExperiment
from moe_study.tasks import ClassifierTask, LanguageTask, Objective, RoutedObjective, VisionTask
from moe_study.train import History, OutOfTime, TrainConfig, TrainingError, fit


class StudyError(RuntimeError):
    """A study, profile, data set, arm or parameter is unknown or wrong, or runs have failed."""

    def _render_traceback_(self) -> list[str]:
        """In a notebook: the message says it all, so no traceback."""
        return [f"StudyError: {self}"]


@dataclass(frozen=True)
class Run:
    """All that a run's numbers depend on, device excepted."""

    profile: str
    study: str
    dataset: str
    arm: str
    seed: int
    version: int
    model: ClassifierConfig | VisionConfig | LanguageConfig
    objective: Objective | RoutedObjective
    train: TrainConfig
    train_images: int | None = None  # use only the first so many of the (shuffled) training set
    independent_experts: bool = False  # train the null of expert similarity as well
    tsne: bool = False  # keep t-SNE coordinates of some test codes, for the eye
    epoch_tokens: int | None = None  # of a text: what an epoch covers; all of it if None
    attack_images: int = 512  # of the test set are attacked
    corrupted_images: int = 1024  # of the test set are corrupted
    augment: bool = False  # images: train on random crops and flips
    test_tokens: int = 2**18  # of a test text are scored; half of them with words swapped
    text_digest: str = ""  # of a text that was given by its path: another text, another run

    @property
    def id(self) -> str:
        return store.digest(self)

    @property
    def label(self) -> str:
        return f"{self.study}/{self.dataset}/{self.arm} seed {self.seed}"

    @property
    def path(self) -> Path:
        """Its result file, under the results folder of the moment."""
        name = text.folder_name(self.dataset, self.text_digest) if self.text_digest else self.dataset
        folder = store.results_dir() / self.profile / self.study / name
        return folder / f"{self.arm}-s{self.seed}-{self.id}.json"

    @property
    def workspace(self) -> Path:
        """Checkpoint and lock; not committed."""
        return store.results_dir() / self.profile / ".work" / self.id


def snnl_runs(study: str, profile: str) -> Iterator[Run]:
    """The SNNL study or its confirmation, seed by seed, so that an unfinished profile still has pairs."""
    confirm = study == "snnl-confirm"
    seeds = CONFIRMATORY_SEEDS if confirm else SEEDS
    counts = CONFIRMATORY_SEED_COUNTS.get(profile, {}) if confirm else SEED_COUNTS.get(profile, {})
    for dataset, groups in counts.items():
        settings = SETTINGS[profile][dataset]
        arms = snnl_arms(settings)
        for position, seed in enumerate(seeds):
            for names, count in groups:
                for arm in names if position < count else ():
                    model, objective = arms[arm]
                    rate = dict(settings.learning_rates).get(arm, settings.train.learning_rate)
                    yield Run(
                        profile, study, dataset, arm, seed, VERSIONS[study], model, objective,
                        replace(settings.train, learning_rate=rate),
                        independent_experts=arm in MAIN_ARMS,
                        tsne=arm in MAIN_ARMS and seed == seeds[0],
                    )  # fmt: skip


def collapse_runs(profile: str) -> Iterator[Run]:
    """The collapse study, confirmatory from the start: all arms, seed by seed."""
    for dataset, settings in COLLAPSE_SETTINGS.get(profile, {}).items():
        for seed in COLLAPSE_SEEDS[: COLLAPSE_SEED_COUNTS[profile]]:
            for arm, (model, objective) in collapse_arms(settings).items():
                rate = dict(settings.learning_rates).get(arm, settings.train.learning_rate)
                yield Run(
                    profile, "collapse", dataset, arm, seed, VERSIONS["collapse"], model, objective,
                    replace(settings.train, learning_rate=rate), independent_experts=arm in MAIN_ARMS,
                )  # fmt: skip


def collapse_tuning_runs(profile: str) -> Iterator[Run]:
    """The grid behind `COLLAPSE_SETTINGS`, at the full budget, on two seeds outside the study.

    Every arm at every learning rate, for arms differ in the one they want; the factor of SNNL and the weight
    of the balance loss at each.
    """
    for dataset, settings in COLLAPSE_SETTINGS.get(profile, {}).items() if profile == "core" else ():
        plain = ("base", "dense", "uniform-gate", "uniform-snnl")
        grid: list[tuple[str, Settings]] = [(arm, settings) for arm in plain]
        for factor in FACTORS:
            tried = replace(settings, factor=factor, dense_factor=factor)
            grid += [(arm, tried) for arm in ("snnl", "dense-snnl")]
        grid += [("base-balance", replace(settings, balance=weight)) for weight in COLLAPSE_BALANCE_WEIGHTS]
        for seed in TUNING_SEEDS:
            for rate in COLLAPSE_RATES:
                for arm, tried in grid:
                    model, objective = collapse_arms(tried)[arm]
                    yield Run(
                        profile, "collapse-tuning", dataset, arm, seed, VERSIONS["collapse-tuning"], model,
                        objective, replace(settings.train, learning_rate=rate),
                    )  # fmt: skip


def tuning_runs(profile: str) -> Iterator[Run]:
    """The grid behind `SETTINGS`: the same three learning rates for every main arm, the factor x three.

    20,000 training images and 4 epochs, on two seeds outside the study; decided on validation
    cross-entropy alone. Controls with a weight of their own get three weights at the base's rate.
    """
    for dataset in TUNING_DATASETS if profile == "core" else ():
        settings = SETTINGS[profile][dataset]
        grid: list[tuple[str, float, Settings]] = []
        for rate in LEARNING_RATES:
            grid += [(arm, rate, settings) for arm in ("base", "dense")]
            for factor in FACTORS:
                tried = replace(settings, factor=factor, dense_factor=factor)
                grid += [(arm, rate, tried) for arm in ("snnl", "dense-snnl")]
        for weight in BALANCE_WEIGHTS:
            grid.append(("base-balance", 1e-3, replace(settings, balance=weight)))
        for weight in AUXILIARY_WEIGHTS:
            grid.append(("base-aux", 1e-3, replace(settings, auxiliary=weight)))
        for seed in TUNING_SEEDS:
            for arm, rate, tried in grid:
                model, objective = snnl_arms(tried)[arm]
                yield Run(
                    profile, "snnl-tuning", dataset, arm, seed, VERSIONS["snnl-tuning"], model, objective,
                    replace(settings.train, learning_rate=rate, epochs=4),
                    train_images=20_000,
                )  # fmt: skip
            # Does the rate that is best for the short budget hold for the whole one? With base alone.
            for rate in LEARNING_RATES:
                model, objective = snnl_arms(settings)["base"]
                yield Run(
                    profile, "snnl-tuning", dataset, "base", seed, VERSIONS["snnl-tuning"], model, objective,
                    replace(settings.train, learning_rate=rate),
                )  # fmt: skip


def routed_runs(study: str, profile: str) -> Iterator[Run]:
    """An AC or the crossed study: its main arms seed by seed, then the controls."""
    for dataset, groups in ROUTED_SEED_COUNTS[study].get(profile, {}).items():
        settings = ROUTED_SETTINGS[study][profile][dataset]
        arms = routed_arms(study, settings)
        for names, count in groups:
            for seed in SEEDS[:count]:
                for arm in names:
                    model, objective = arms[arm]
                    rate = dict(settings.learning_rates).get(arm, settings.train.learning_rate)
                    yield Run(
                        profile, study, dataset, arm, seed, VERSIONS[study], model, objective,
                        replace(settings.train, learning_rate=rate),
                        train_images=settings.train_images, epoch_tokens=settings.epoch_tokens,
                        attack_images=settings.attack_images, corrupted_images=settings.corrupted_images,
                        augment=settings.augment,
                        test_tokens=settings.test_tokens,
                    )  # fmt: skip


def routed_tuning_runs(study: str, profile: str) -> Iterator[Run]:
    """The same learning rates for each main arm of an AC study; three factors of the SNNL for the crossed.

    A third of the epochs, the first data set, two seeds outside the study, validation data alone.
    """
    if profile != "core":
        return
    dataset, settings = next(iter(ROUTED_SETTINGS[study][profile].items()))
    train = replace(settings.train, epochs=max(settings.train.epochs // 3, 1))
    grid: list[tuple[str, float, RoutedSettings]] = []
    if study == "crossed":
        for factor in CROSSED_FACTORS:
            grid.append(("snnl", train.learning_rate, replace(settings, factor=factor)))
    else:
        for rate in ROUTED_LEARNING_RATES[study]:
            grid += [(arm, rate, settings) for arm in ROUTED_MAIN_ARMS]
    for seed in TUNING_SEEDS:
        for arm, rate, tried in grid:
            model, objective = routed_arms(study, tried)[arm]
            yield Run(
                profile, f"{study}-tuning", dataset, arm, seed, VERSIONS[f"{study}-tuning"], model, objective,
                replace(train, learning_rate=rate),
                train_images=settings.train_images, epoch_tokens=settings.epoch_tokens,
            )  # fmt: skip


def dose_runs(study: str, profile: str) -> Iterator[Run]:
    """Every dose of a dose-response study and its controls, seed by seed."""
    planned = PLANS[study].get(profile)
    if planned is None:
        return
    settings = planned.settings
    for seed in SEEDS[: planned.num_seeds]:
        for dose in planned.doses():
            model, objective, train = dose.arm(settings)
            run = Run(
                profile, study, planned.dataset, dose.name, seed, VERSIONS[study], model, objective, train,
                train_images=planned.train_images,
            )  # fmt: skip
            if isinstance(settings, RoutedSettings):
                run = replace(run, epoch_tokens=settings.epoch_tokens, test_tokens=settings.test_tokens)
            yield run


def dose_study(profile: str, dataset: str) -> str:
    """The dose-response study that a profile has on a data set.

    Raises:
        StudyError: it has none.
    """
    names = {plans[profile].dataset: name for name, plans in PLANS.items() if profile in plans}
    if dataset not in names:
        raise StudyError(
            f"unknown dataset {dataset!r} in the dose-response of profile {profile!r}; "
            f"known: {', '.join(names) or 'none'}"
        )
    return names[dataset]


STUDIES: dict[str, Callable[[str], Iterator[Run]]] = {
    "snnl": partial(snnl_runs, "snnl"),
    "snnl-confirm": partial(snnl_runs, "snnl-confirm"),
    "ac-vision": partial(routed_runs, "ac-vision"),
    "ac-language": partial(routed_runs, "ac-language"),
    "crossed": partial(routed_runs, "crossed"),
    "collapse": collapse_runs,
    "snnl-dose": partial(dose_runs, "snnl-dose"),
    "snnl-batches": partial(dose_runs, "snnl-batches"),
    "ac-dose": partial(dose_runs, "ac-dose"),
    "snnl-tuning": tuning_runs,
    "collapse-tuning": collapse_tuning_runs,
    "ac-vision-tuning": partial(routed_tuning_runs, "ac-vision"),
    "ac-language-tuning": partial(routed_tuning_runs, "ac-language"),
    "crossed-tuning": partial(routed_tuning_runs, "crossed"),
}


def runs(
    profile: str, study: str | None = None, dataset: str | None = None, arm: str | None = None
) -> list[Run]:
    """The runs of a profile, narrowed to a study, data set or arm.

    Args:
        arm: one name, or several with commas between them: then all arms of a seed come before the next seed.

    Raises:
        StudyError: one of the names is unknown, or the profile has no such combination.
    """
    if profile not in PROFILES:
        raise StudyError(f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")
    if study is not None and study not in STUDIES:
        raise StudyError(f"unknown study {study!r}; known: {', '.join(STUDIES)}")
    found = [run for name, plan in STUDIES.items() if study in (None, name) for run in plan(profile)]
    arms = None if arm is None else arm.split(",")
    for field, wanted in (("dataset", None if dataset is None else [dataset]), ("arm", arms)):
        if wanted is not None:
            known = sorted({getattr(run, field) for run in found})
            if unknown := [name for name in wanted if name not in known]:
                where = f"study {study!r} of profile" if study else "profile"
                raise StudyError(
                    f"unknown {field} {unknown[0]!r} in {where} {profile!r}; "
                    f"known: {', '.join(known) or 'none'}"
                )
            found = [run for run in found if getattr(run, field) in wanted]
    if arms is not None and len(arms) > 1:
        seeds = list(dict.fromkeys(run.seed for run in found))
        found.sort(key=lambda run: seeds.index(run.seed))
    return found


def with_text(wanted: Sequence[Run], path: str) -> list[Run]:
    """The same language runs on another text: any UTF-8 file.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or too short.
    """
    text.load(path)
    return [replace(run, dataset=path, text_digest=text.file_digest(path)) for run in wanted]


def shard(wanted: list[Run], part: str) -> list[Run]:
    """The i-th of n interleaved parts of a list of runs; `part` is "i/n", counted from 1."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", part)
    i, n = map(int, found.groups()) if found else (0, 0)
    if not 1 <= i <= n:
        raise StudyError(f"a shard is written i/n with 1 <= i <= n, got {part!r}")
    return wanted[i - 1 :: n]


# The notebook of a study, which `make report` runs once for each of its data sets.
NOTEBOOKS = {
    "snnl": "10_snnl_moe",
    "snnl-confirm": "10_snnl_moe",
    "collapse": "11_collapse",
    "ac-vision": "20_ac_vision",
    "ac-language": "21_ac_language",
    "crossed": "30_snnl_x_ac",
    "snnl-dose": "50_dose_response",
    "snnl-batches": "50_dose_response",
    "ac-dose": "50_dose_response",
}


def notebooks(wanted: Sequence[Run]) -> list[str]:
    """Names of the executed notebooks of these runs, without those of the tour and the report."""
    return list(
        dict.fromkeys(f"{NOTEBOOKS[run.study]}-{run.dataset}" for run in wanted if run.study in NOTEBOOKS)
    )


# ----------------------------------------------------------------------------------------- engine


def prepare(run: Run, device: str) -> Experiment:
    """Data, model and measures of a run, before the first step."""
    dtype = torch.float64 if run.train.precision == "float64" else torch.float32
    if run.train.precision == "bfloat16" and not isinstance(run.model, ClassifierConfig):
        raise StudyError(f"{run.label}: bfloat16 is for the convolutional extractor alone; use float32")
    if isinstance(run.model, LanguageConfig):
        assert isinstance(run.objective, RoutedObjective)
        corpus = text.load(run.dataset, device=device)
        return LanguageExperiment(
            LanguageTask(
                corpus,
                run.model,
                run.objective,
                seed=run.seed,
                batch_size=run.train.batch_size,
                epoch_tokens=run.epoch_tokens,
                dtype=dtype,
            ),
            run.test_tokens,
        )
    dataset = data.load(run.dataset, device=device, seed=run.seed)
    if run.train_images is not None:
        dataset = replace(dataset, train=dataset.train.take(slice(run.train_images)))
    if isinstance(run.model, VisionConfig):
        assert isinstance(run.objective, RoutedObjective)
        return VisionExperiment(
            VisionTask(
                dataset,
                run.model,
                run.objective,
                seed=run.seed,
                batch_size=run.train.batch_size,
                dtype=dtype,
                augment=run.augment,
            ),
            run.attack_images,
            run.corrupted_images,
        )
    assert isinstance(run.objective, Objective)
    task = ClassifierTask(
        dataset,
        run.model,
        run.objective,
        seed=run.seed,
        epochs=run.train.epochs,
        batch_size=run.train.batch_size,
        dtype=dtype,
        bf16=run.train.precision == "bfloat16" and run.model.extractor == "cnn",
    )
    return ClassifierExperiment(task, run.train, run.independent_experts, run.tsne)


def execute(
    run: Run,
    device: str,
    deadline: float = float("inf"),
    on_epoch: Callable[[int, History], None] | None = None,
) -> dict[str, Any]:
    """Train one run (or resume it from its checkpoint) and return the content of its result file."""
    started = time.perf_counter()
    store.reset_peak_memory()
    torch.use_deterministic_algorithms(run.train.precision == "float64")
    experiment = prepare(run, device)
    task = experiment.task
    full = not run.study.endswith("-tuning")  # tuning never looks at the test set
    initial = experiment.initial() if full else {}
    try:
        run.workspace.mkdir(parents=True, exist_ok=True)
        history, selected = fit(
            task,
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
    if full:
        result["initial"] = initial
    # At least the training of all sessions, of a run that was resumed.
    result["wall_seconds"] = max(time.perf_counter() - started, history.seconds)
    result["peak_memory_mb"] = store.peak_memory_mb()
    return result


def _measured(
    run: Run, experiment: Experiment, history: History, selected: dict[str, dict[str, torch.Tensor]]
) -> dict[str, Any]:
    """What a result file says of a trained run."""
    task = experiment.task
    result: dict[str, Any] = {"history": vars(history), "best_epoch": history.best_epoch}
    if not run.study.endswith("-tuning"):
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
    if not run.study.endswith("-tuning") and (same := twin(run)) is not None:
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
    write(
        run,
        {
            **store.provenance(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            **result,
        },
    )
    return "done"


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
    """Whether a person looks on: a terminal, or a notebook opened in Jupyter (not run by papermill)."""
    return sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def ensure(
    wanted: Sequence[Run],
    workers: int | None = None,
    device: str | None = None,
    time_limit: float | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Train the runs that have no result file yet, one process each, and return all finished results.

    Args:
        workers: processes; one per core if None, one on a GPU.
        device: "cpu" or "cuda"; what there is if None. float64 runs always use the CPU.
        time_limit: seconds after which no epoch is started; checkpoints are kept and the next call goes on.

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
        _train_all(todo, workers, device or default_device(), time_limit, quiet)
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


def _say(line: str) -> None:
    """Print a line; if nobody reads any more, the work goes on in silence."""
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


def _train_all(
    todo: list[Run], workers: int | None, device: str, time_limit: float | None, quiet: bool
) -> None:
    store.check_writable(store.results_dir())
    if store.of_unknown_origin([store.provenance()]) and not quiet:
        _say(
            "the commit is unknown: git is missing, or this folder is no git checkout. The results will say "
            "so; MOE_COMMIT names the commit of a copied folder"
        )
    num_wanted, missing = len(todo), missing_data(todo, quiet)
    failed = {run: missing[run.dataset] for run in todo if run.dataset in missing}
    todo = [run for run in todo if run not in failed]

    def device_of(run: Run) -> str:
        return "cpu" if run.train.precision == "float64" else device

    on_cpu = all(device_of(run) == "cpu" for run in todo)
    if on_cpu:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by the workers when they import torch
    workers = max(1, min(workers or (os.cpu_count() or 1 if on_cpu else 1), len(todo)))
    deadline = time.monotonic() + (float("inf") if time_limit is None else time_limit)
    context = multiprocessing.get_context("spawn")
    try:
        queue = context.Queue()
    except OSError as error:
        raise StudyError(
            f"cannot start worker processes ({error}): their semaphores need a writable /dev/shm; "
            "in a container, mount one (docker run --shm-size=1g)"
        ) from error
    unfinished = 0
    with _Reporter(queue, len(todo), quiet) as reporter:

        def attempt(runs: Sequence[Run], workers: int) -> list[Run]:
            """Those that were lost because a worker was killed, which takes the whole pool with it."""
            nonlocal unfinished
            lost = []
            pool = ProcessPoolExecutor(workers, context, _start_worker, (queue,))
            try:
                jobs = {pool.submit(_work, run, device_of(run), deadline): run for run in runs}
                for job in as_completed(jobs):
                    try:
                        unfinished += job.result() == "out of time"
                    except BrokenProcessPool:
                        lost.append(jobs[job])
                        continue
                    except Exception as error:
                        failed[jobs[job]] = f"{type(error).__name__}: {error}"
                    reporter.finished()
            finally:
                pool.shutdown(cancel_futures=True)
            return lost

        for run in attempt(todo, workers):  # one at a time: it takes less memory, and shows which it was
            for lost in attempt([run], 1):
                failed[lost] = "its process was killed twice (out of memory?)"
                reporter.finished()
    if unfinished and not quiet:
        _say(f"time limit: {unfinished} runs are left; the same command goes on from here")
    if failed:
        lines = []
        for reason in dict.fromkeys(failed.values()):
            first, *more = [run.label for run in failed if failed[run] == reason]
            lines.append(f"{first}{f' and {len(more)} more' if more else ''}: {reason}")
        raise StudyError(
            f"{len(failed)} of {num_wanted} runs failed; the others are kept, and the same command tries "
            "these again:\n  " + "\n  ".join(sorted(lines))
        )


class _Reporter:
    """Shows the workers' epochs: a bar when a person watches, else one line each."""

    def __init__(self, queue: Any, total: int, quiet: bool) -> None:
        self.queue, self.total, self.quiet = queue, total, quiet
        self.bar: Any = None
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> _Reporter:
        if watched() and not self.quiet:
            try:
                from tqdm.auto import tqdm

                self.bar = tqdm(total=self.total, unit="run")
            except ImportError:  # a bare machine
                pass
        self.thread.start()
        return self

    def _follow(self) -> None:
        while (message := self.queue.get()) is not None:
            label, text = message
            if self.bar is not None:
                self.bar.set_postfix_str(f"{label}: {text}")
            elif not self.quiet:
                _say(f"{label}: {text}")

    def finished(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def __exit__(self, *exception: object) -> None:
        self.queue.put(None)
        self.thread.join()
        if self.bar is not None:
            self.bar.close()
