"""A run: all that its numbers depend on, as one frozen value."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path

from moe_lib.models.classifier import ClassifierConfig
from moe_lib.models.language import LanguageConfig
from moe_lib.models.vision import VisionConfig
from moe_study import store
from moe_study.data import text
from moe_study.tasks import Objective, RoutedObjective
from moe_study.train import TrainConfig

OPTIONS: dict[type, frozenset[str]] = {  # that mean something, by kind of model
    ClassifierConfig: frozenset({"train_images", "independent_experts", "tsne"}),
    VisionConfig: frozenset({"train_images", "attack_images", "corrupted_images", "augment"}),
    LanguageConfig: frozenset({"epoch_tokens", "test_tokens", "text_digest"}),
}
LEAST = {"attack_images": 4}  # SPSA sees a quarter of them


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

    def __post_init__(self) -> None:
        meant = OPTIONS.get(type(self.model))
        for option in fields(self):
            value = getattr(self, option.name)
            if option.default is MISSING or value == option.default:
                continue
            if meant is not None and option.name not in meant:
                raise StudyError(
                    f"{option.name} = {value!r} has no effect on a {type(self.model).__name__}: leave it out"
                )
            if type(value) is int and value < LEAST.get(option.name, 1):
                least = LEAST.get(option.name, 1)
                raise StudyError(f"{option.name} must be at least {least}, got {value}")

    @cached_property
    def id(self) -> str:
        return store.digest(self)

    @property
    def tuning(self) -> bool:
        """Then it never looks at the test set."""
        return self.study.endswith("-tuning")

    @property
    def label(self) -> str:
        return f"{self.study}/{self.dataset}/{self.arm} seed {self.seed}"

    @property
    def path(self) -> Path:
        """Its result file, under the results folder set when called."""
        name = text.folder_name(self.dataset, self.text_digest) if self.text_digest else self.dataset
        folder = store.results_dir() / self.profile / self.study / name
        return folder / f"{self.arm}-s{self.seed}-{self.id}.json"

    @property
    def workspace(self) -> Path:
        """Checkpoint and lock; not committed."""
        return store.results_dir() / self.profile / ".work" / self.id


# Raised by hand when a change is meant to move a study's results, from 1; the report never mixes versions.
VERSIONS: defaultdict[str, int] = defaultdict(lambda: 1)

Plan = Callable[[str], Iterator[Run]]  # the runs of a study in a profile, in the order of their priority
