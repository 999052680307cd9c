"""From a run to its task and measures: another kind of model is one more function, and one line below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from moe_lib.models.classifier import ClassifierConfig
from moe_lib.models.language import LanguageConfig
from moe_lib.models.vision import VisionConfig
from moe_study import data
from moe_study.configs.run import Run
from moe_study.data import Dataset, text
from moe_study.evaluate import ClassifierExperiment, Experiment
from moe_study.evaluate_transformer import LanguageExperiment, VisionExperiment
from moe_study.tasks import ClassifierTask, LanguageTask, Objective, RoutedObjective, VisionTask

Options = dict[str, Any]  # that all tasks take


def classifier(run: Run, device: str, options: Options) -> Experiment:
    assert isinstance(run.model, ClassifierConfig)
    assert isinstance(run.objective, Objective)
    options["bf16"] &= run.model.extractor == "cnn"
    task = ClassifierTask(images(run, device), run.model, run.objective, epochs=run.train.epochs, **options)
    return ClassifierExperiment(task, run.train if run.independent_experts else None, run.tsne)


def vision(run: Run, device: str, options: Options) -> Experiment:
    assert isinstance(run.model, VisionConfig)
    assert isinstance(run.objective, RoutedObjective)
    task = VisionTask(images(run, device), run.model, run.objective, augment=run.augment, **options)
    return VisionExperiment(task, run.attack_images, run.corrupted_images)


def language(run: Run, device: str, options: Options) -> Experiment:
    assert isinstance(run.model, LanguageConfig)
    assert isinstance(run.objective, RoutedObjective)
    if run.text_digest and (found := text.file_digest(run.dataset)) != run.text_digest:
        raise data.DataError(
            f"{run.dataset} has changed: its digest is {found}, that of the planned run {run.text_digest}; "
            "plan the runs anew (study.with_text, or the notebook from its start)"
        )
    corpus = text.load(run.dataset, device=device)
    task = LanguageTask(corpus, run.model, run.objective, epoch_tokens=run.epoch_tokens, **options)
    return LanguageExperiment(task, run.test_tokens)


def images(run: Run, device: str) -> Dataset:
    dataset = data.load(run.dataset, device=device, seed=run.seed)
    if run.train_images is None:
        return dataset
    return replace(dataset, train=dataset.train.take(slice(run.train_images)))


EXPERIMENTS: dict[type, Callable[[Run, str, Options], Experiment]] = {
    ClassifierConfig: classifier,
    VisionConfig: vision,
    LanguageConfig: language,
}


def experiment_of(run: Run, device: str) -> Experiment:
    options = {
        "seed": run.seed,
        "batch_size": run.train.batch_size,
        "dtype": run.train.dtype,
        "bf16": run.train.precision == "bfloat16",
    }
    return EXPERIMENTS[type(run.model)](run, device, options)
