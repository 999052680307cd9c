"""What a run will cost, from its configuration alone, and so a plan: operations times fitted rates.

    seconds = convolutions / r1 + products / r2

with operations counted here and rates fitted to finished runs by `python -m benchmarks cost`, which
writes them to results/bench/cost.json with the speed of that machine, by which a plan made on another is
scaled. (Attention on its own, calls per batch and a constant were tried: their fitted share was zero.)

Shapes: N samples or tokens, T tokens of a sequence, D width, E experts, K chosen, H hidden width.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Machine, available_memory, products_per_second
from moe_lib.models.classifier import Classifier, ClassifierConfig
from moe_lib.models.language import LanguageConfig
from moe_lib.models.transformer import TransformerConfig
from moe_lib.models.vision import VisionConfig
from moe_study import data, store, study
from moe_study.data import ROOT, text
from moe_study.study import Run, read

# Shape of an image; images for training, validation and test.
IMAGES = {
    "digits": ((1, 8, 8), 1_294, 143, 360),
    "mnist": ((1, 28, 28), 54_000, 6_000, 10_000),
    "fashion_mnist": ((1, 28, 28), 54_000, 6_000, 10_000),
    "cifar10": ((3, 32, 32), 45_000, 5_000, 10_000),
    "cifar100": ((3, 32, 32), 45_000, 5_000, 10_000),
}
# Bytes for training, bytes of validation and test that there are at most.
TEXTS = {
    "docs": (300_000, 30_000),
    "tiny_shakespeare": (1_000_000, 60_000),
    "ptb": (5_100_000, 400_000),
    "wikitext2": (10_900_000, 1_100_000),
}
BYTES_PER_WORD = 5
DOWNLOAD_MB = {
    "digits": 0, "mnist": 12, "fashion_mnist": 31, "cifar10": 170, "cifar100": 169,
    "docs": 0, "wikitext2": 5, "ptb": 6, "tiny_shakespeare": 1,
}  # fmt: skip
UNPACKED_MB = {
    "digits": 0, "mnist": 66, "fashion_mnist": 85, "cifar10": 350, "cifar100": 340,
    "docs": 0, "wikitext2": 13, "ptb": 6, "tiny_shakespeare": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Amount:
    """Float operations. In convolutions those of bfloat16 count one, in products those of float32; the same
    number of operations in twice the bytes counts twice."""

    convolution: float
    product: float

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.convolution + other.convolution, self.product + other.product)

    def times(self, factor: float) -> Amount:
        return Amount(factor * self.convolution, factor * self.product)


@functools.lru_cache
def _forward_classifier(model: ClassifierConfig, shape: tuple[int, int, int], classes: int) -> Amount:
    """Of one image."""
    with torch.device("meta"):
        classifier, image = Classifier(model, shape, classes), torch.empty(1, *shape)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            code_ND, _ = classifier.extractor(image)
    found = {str(name): float(value) for name, value in counter.get_flop_counts().get("Global", {}).items()}
    convolution = sum(value for name, value in found.items() if "convolution" in name)
    width = code_ND.shape[1]
    gate = 0 if model.gate == "uniform" else model.gate_hidden * (width + model.num_experts)
    product = sum(found.values()) - convolution + 2 * (gate + _experts(model, width, classes))
    return Amount(convolution, product)


def _experts(model: ClassifierConfig, width: int, classes: int) -> int:
    return (model.top_k or model.num_experts) * model.expert_hidden * (width + classes)


def _forward_transformer(trunk: TransformerConfig, length: int, ends: float) -> Amount:
    """Of one token; `ends`: multiplications of embedding and head."""
    moe, dim = len(trunk.moe_blocks), trunk.dim
    plain = (trunk.depth - moe) * 2 * dim * trunk.mlp_hidden
    routed = moe * (dim * trunk.num_experts + 2 * trunk.top_k * dim * trunk.expert_hidden)
    product = 2 * (trunk.depth * 4 * dim**2 + plain + routed + ends)
    return Amount(0, product + 4.0 * trunk.depth * length * dim)


def amount(run: Run) -> Amount | None:
    """None for a text whose size is not known here."""
    if isinstance(run.model, LanguageConfig):
        if run.dataset not in TEXTS:
            return None
        found = _language(run, run.model)
    elif isinstance(run.model, VisionConfig):
        found = _vision(run, run.model)
    else:
        found = _classifier(run, run.model)
    width = 2 if run.train.precision == "float64" else 1
    conv = {"bfloat16": 1, "float32": 2, "float64": 4}[run.train.precision]
    return Amount(conv * found.convolution, width * found.product)


def _samples(forward: float, trained: float) -> float:
    """As forward passes: `trained` go backward too, which takes three times as long as forward alone."""
    return forward + 3 * trained


def _full(run: Run) -> bool:
    return not run.study.endswith("-tuning")  # tuning never looks at the test set


def _classifier(run: Run, model: ClassifierConfig) -> Amount:
    shape, train, validation, test = IMAGES[run.dataset]
    train, classes = min(train, run.train_images or train), 100 if run.dataset == "cifar100" else 10
    one = _forward_classifier(model, shape, classes)
    # Test: before training, last and best weights, routing, and the samples of the embedding.
    forward = run.train.epochs * validation + (6 * test + 7_000 if _full(run) else 0)
    total = one.times(_samples(forward, run.train.epochs * train))
    if run.independent_experts:
        width = model.code_dim or 0
        alone = Amount(0, 2.0 * _experts(model, width, classes))
        total += alone.times(_samples(0, run.train.epochs * train))
    return total


def _vision(run: Run, model: VisionConfig) -> Amount:
    shape, train, validation, test = IMAGES[run.dataset]
    train, batch, trunk = min(train, run.train_images or train), run.train.batch_size, model.trunk
    tokens = (shape[1] // model.patch) * (shape[2] // model.patch)
    one = _forward_transformer(trunk, tokens, shape[0] * model.patch**2 * trunk.dim).times(tokens)
    forward = float(run.train.epochs * validation)
    if _full(run):
        layers, attacked = len(trunk.moe_blocks), min(run.attack_images, test)
        modes = 3 if trunk.router == "ac" and not trunk.ac.causal else 1
        forward += 2 * test + 2 * 8 * batch + 7_000 + (layers * (trunk.num_experts + 1) + 2) * 2 * batch
        forward += 31 * 2 * attacked  # corruptions
        # A gradient of pixels alone is a forward and less than a backward pass: two.
        forward += attacked * (2 * modes * 21 * 2 + (320 + 40) / 4)
    return one.times(_samples(forward, run.train.epochs * train))


def _language(run: Run, model: LanguageConfig) -> Amount:
    train, other = (n // (BYTES_PER_WORD if model.level == "word" else 1) for n in TEXTS[run.dataset])
    trunk, vocabulary = model.trunk, 256 if model.level == "byte" else model.vocabulary_size
    one = _forward_transformer(trunk, model.context, trunk.dim * vocabulary)
    batch = run.train.batch_size * model.context
    forward = run.train.epochs * 2.0 * min(2**16, other)  # windows overlap by half
    if _full(run):
        test, layers = min(run.test_tokens, other), len(trunk.moe_blocks)
        forward += 2 * 2 * test + 6 * test + 2 * 8 * batch
        forward += (layers * (trunk.num_experts + 1) + 2) * 2 * batch
    return one.times(_samples(forward, run.train.epochs * (run.epoch_tokens or train)))


# -------------------------------------------------------------------------------------- prediction


def seconds(found: Amount, per_amount: dict[str, float]) -> float:
    return sum(per_amount[name] * value for name, value in vars(found).items())


def _benchmark(name: str) -> dict[str, Any] | None:
    """What `bench name` wrote into the results folder, else what came with the project."""
    for folder in (store.results_dir(), ROOT / "results"):
        if (path := folder / "bench" / f"{name}.json").exists():
            return store.read(path)
    return None


def fitted() -> dict[str, Any] | None:
    found = _benchmark("cost")
    return None if found is None else found["fit"]


def expected_seconds(run: Run) -> float | None:
    """Wall time on one core of the machine whose runs were fitted; None where nothing is known."""
    found, fit = amount(run), fitted()
    return None if found is None or fit is None else seconds(found, fit["seconds_per"])


def speed() -> float | None:
    """Rate of products on one core here, over that of the fitted machine; None where nothing is known."""
    if (fit := fitted()) is None or "rates" not in fit:
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return products_per_second(Machine())["gemm"] / fit["rates"]["gemm"]
    finally:
        torch.set_num_threads(threads)


def throughput(workers: int) -> float:
    """How many times the work of one process so many do: as measured by `bench scaling`, else all of it.

    Between counts that were measured a straight line; beyond them each does its share of the largest.
    Processes that have no core of their own add nothing.
    """
    workers = min(workers, os.cpu_count() or 1)
    found = (_benchmark("scaling") or {}).get("throughput")
    if not found:
        return float(workers)
    counts, times = [row["processes"] for row in found], [row["times_one"]["median"] for row in found]
    return float(np.interp(workers, counts, times)) * max(1.0, workers / counts[-1])


def peak_memory_mb(wanted: list[Run]) -> float | None:
    """Of the largest run known of the same studies and data sets; None where none is known."""
    names = {(run.study, run.dataset) for run in wanted}
    groups = (fitted() or {}).get("groups", [])
    return max((g["memory_mb"] for g in groups if (g["study"], g["dataset"]) in names), default=None)


def plan(wanted: list[Run], workers: int | None = None) -> str:
    """What is done, what is left, and what that will take, as text; starts nothing.

    A finished run's time is believed for its like if a processor of this name took it; all other time is
    foretold, by the speed of this machine.
    """
    todo = [run for run in wanted if not run.path.exists()]
    workers = max(1, min(workers or os.cpu_count() or 1, len(todo)))
    found_speed, here = speed(), store.processor()
    wide = max([16, *(len(run.arm) for run in wanted)])
    lines = [f"{'study':18} {'data set':14} {'arm':{wide}} {'done':>5} {'left':>5} {'minutes left':>13}"]
    total, unknown = 0.0, False
    for key in dict.fromkeys((run.study, run.dataset, run.arm) for run in wanted):
        group = [run for run in wanted if (run.study, run.dataset, run.arm) == key]
        done = [read(run) for run in group if run.path.exists()]
        walls = sorted(result["wall_seconds"] for result in done if result.get("machine") == here)
        left = len(group) - len(done)
        each = walls[len(walls) // 2] if walls else expected_seconds(group[0])
        if each is not None and not walls:
            each /= found_speed or 1.0
        unknown |= bool(left) and each is None
        total += left * (each or 0.0)
        minutes = "unknown" if left and each is None else f"{left * (each or 0.0) / 60:.1f}"
        lines.append(f"{key[0]:18} {key[1]:14} {key[2]:{wide}} {len(done):5} {left:5} {minutes:>13}")
    datasets = {run.dataset for run in todo}
    missing = sorted(name for name in datasets if not (text if text.is_corpus(name) else data).present(name))
    times = throughput(workers)
    lines += [
        "",
        f"time: {duration(total)} of one core{' and more' if unknown else ''}, "
        f"about {duration(total / times)} with {workers} processes, which do {times:.2f} times the work "
        "of one",
        f"notebooks: {len(study.notebooks(wanted)) + 2} after the runs, with tour and report (`make report`)",
        *_memory(todo, workers),
        f"download: {sum(DOWNLOAD_MB[name] for name in missing)} MB ({', '.join(missing) or 'nothing'}), "
        f"{sum(UNPACKED_MB[name] for name in missing)} MB unpacked under {data.data_dir()}",
        f"disk: about {len(todo) * 0.012:.1f} MB of results under "
        f"{store.results_dir()}, and up to {30 * workers} MB of checkpoints while it works",
    ]
    if found_speed is not None:
        lines.append(
            f"speed: this machine does products at {found_speed:.2f} times the rate of the fitted one"
        )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """In the unit that a person would choose."""
    for unit, size, least in (("days", 86_400, 2), ("hours", 3_600, 2)):
        if seconds >= least * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} minutes"


def _memory(todo: list[Run], workers: int) -> list[str]:
    peak, free = peak_memory_mb(todo), available_memory() / 1e6
    if peak is None:
        return []
    lines = [f"memory: up to {workers * peak:.0f} MB with {workers} processes ({peak:.0f} MB each)"]
    if workers * peak > free:
        fewer = max(1, int(free / peak))
        lines.append(f"warning: only {free:.0f} MB of memory are free; try --workers {fewer}")
    return lines
