"""The one training loop: Adam, the epochs that validation selects, checkpoint and resume."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from moe_lib.parallel import distributed
from moe_lib.products import on_host
from moe_study import store
from moe_study.replay import Replayed

CHECKPOINT_SECONDS = 20.0  # between two checkpoints, the first epoch's and the last one's excepted


class TrainingError(RuntimeError):
    """A run cannot go on; the message names arm, seed, epoch and batch."""


class OutOfTime(Exception):
    """The time limit came; the checkpoint holds everything up to the last epoch."""


class Task(Protocol):
    """An `nn.Module` that knows where batches come from and what they cost."""

    num_batches: int  # per epoch

    @property
    def model(self) -> nn.Module: ...

    def batches(self, epoch: int) -> Iterator[Any]: ...

    def losses(self, batch: Any, epoch: int) -> dict[str, Tensor]: ...  # "total" is minimised

    # nn.Module's own
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> Any: ...
    def train(self) -> Any: ...
    def eval(self) -> Any: ...


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 8
    batch_size: int = 256
    learning_rate: float = 1e-3  # falls along a cosine, to 0 at the last step
    precision: Literal["float64", "float32", "bfloat16"] = (
        "float32"  # bfloat16: autocast of CNNs, transformers
    )
    warmup: float = 0.0  # share of the training over which the rate rises from 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the training in [0, 1), got {self.warmup}")
        if self.precision not in ("float64", "float32", "bfloat16"):
            raise ValueError(f"unknown precision {self.precision!r}; use 'float64', 'float32' or 'bfloat16'")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float64 if self.precision == "float64" else torch.float32


@dataclass
class History:
    """One entry per finished epoch: mean training losses, and what `evaluate` returned."""

    train: dict[str, list[float | None]] = field(default_factory=dict)
    validation: dict[str, list[float | None]] = field(default_factory=dict)
    best_epoch: int = -1  # lowest validation cross-entropy
    best_cross_entropy: float = math.inf
    best_accuracy_epoch: int = -1  # highest validation accuracy, the first of equals
    best_accuracy: float = -math.inf
    seconds: float = 0.0  # of training and evaluation, over all sessions of a resumed run
    resumed_from: list[str] = field(default_factory=list)  # code of earlier sessions, where it was another

    def add(self, losses: dict[str, float], measures: dict[str, float]) -> list[str]:
        """One more epoch; returns which of "best_cross_entropy" and "best_accuracy" it improves on.

        A loss that one phase of training does not have is None there.
        """
        epoch = len(self.validation.get("cross_entropy", []))
        for name in dict.fromkeys([*self.train, *losses]):
            self.train.setdefault(name, [None] * epoch).append(losses.get(name))
        for name, value in measures.items():
            self.validation.setdefault(name, []).append(value)
        improved = []
        if measures["cross_entropy"] < self.best_cross_entropy:
            self.best_cross_entropy, self.best_epoch = measures["cross_entropy"], epoch
            improved.append("best_cross_entropy")
        if measures["accuracy"] > self.best_accuracy:
            self.best_accuracy, self.best_accuracy_epoch = measures["accuracy"], epoch
            improved.append("best_accuracy")
        return improved


def fit(
    task: Task,
    config: TrainConfig,
    evaluate: Callable[[], dict[str, float]],
    *,
    label: str,
    checkpoint: Path | None = None,
    run_id: str = "",
    on_epoch: Callable[[int, History], None] | None = None,
    deadline: float = math.inf,
) -> tuple[History, dict[str, dict[str, Tensor]]]:
    """Train `task` and leave it with its last weights.

    Args:
        evaluate: measures on validation data, "cross_entropy" and "accuracy" among them.
        label: names the run (arm and seed) in errors.
        checkpoint: written after the first epoch and the last, and in between at most every
            `CHECKPOINT_SECONDS`; read if it exists. A resumed run ends with the same numbers as one that was
            never stopped, since batch order depends on (seed, epoch) alone. One that is damaged, or of
            another run, is set aside with a warning, and the run starts anew.
        run_id: names the run in its checkpoint.
        on_epoch: called with the epoch's number and the history so far.
        deadline: `time.monotonic()` value after which no further epoch is started.

    Returns:
        The history, and the weights (state dicts) of the two selected epochs: "best_cross_entropy" and
        "best_accuracy", both on validation data.

    Raises:
        TrainingError: a loss, a weight or a validation measure is not finite.
        StoreError: the checkpoint cannot be written.
        OutOfTime: the deadline came first.
    """
    optimizer, history, selected = _resumed(task, config, checkpoint, run_id, label)
    epoch = len(history.validation.get("cross_entropy", []))
    saved, saved_at = epoch, time.monotonic()  # epochs in the checkpoint

    def save() -> None:
        nonlocal saved, saved_at
        if checkpoint is not None and epoch > saved:
            state = {
                "task": task.state_dict(),
                "optimizer": optimizer.state_dict(),
                "history": vars(history),
                "selected": selected,
                "epoch": epoch,
                "code": _code(),
            }
            save_checkpoint(state, checkpoint, run_id)
            saved, saved_at = epoch, time.monotonic()

    while epoch < config.epochs:
        if time.monotonic() > deadline:
            save()
            raise OutOfTime(label)
        start = time.perf_counter()
        losses = _train_epoch(task, optimizer, config, epoch, label)
        measures = _validated(task, config, evaluate, f"{label}, epoch {epoch}")
        if improved := history.add(losses, measures):
            selected |= dict.fromkeys(improved, deepcopy(task.state_dict()))
        epoch += 1
        history.seconds += time.perf_counter() - start
        if epoch in (1, config.epochs) or time.monotonic() - saved_at >= CHECKPOINT_SECONDS:
            save()
        if on_epoch is not None:
            on_epoch(epoch, history)
    return history, selected


def _code() -> str:
    """What trains: its commit, and whether it differs from that."""
    found = store.provenance()
    return f"{found['commit'] or 'unknown'}{', changed' if found['dirty'] else ''}"


def _resumed(
    task: Task, config: TrainConfig, checkpoint: Path | None, run_id: str, label: str
) -> tuple[torch.optim.Optimizer, History, dict[str, dict[str, Tensor]]]:
    """Optimizer, history and selected weights, of the checkpoint if there is a valid one; `task` gets its
    weights. One that is not valid is set aside with a warning."""
    optimizer = adam(task.parameters(), config)
    if checkpoint is None or not os.path.lexists(checkpoint):
        return optimizer, History(), {}
    initial = deepcopy(task.state_dict())
    try:
        state = load_checkpoint(checkpoint, run_id, next(task.parameters()).device)
        task.load_state_dict(state["task"])
        kinds = [{key: group[key] for key in ("lr", "capturable")} for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(optimizer.param_groups, kinds, strict=True):
            group |= own  # those of this device: the checkpoint may be of another
        history, epoch = History(**state["history"]), state["epoch"]
        if not 1 <= epoch <= config.epochs or len(history.validation["cross_entropy"]) != epoch:
            raise ValueError(f"epoch {epoch} of {config.epochs} does not fit its history")
        if (code := state.get("code", "unknown")) != _code():
            history.resumed_from.append(code)
        return optimizer, history, state["selected"]
    except Exception as error:
        aside = checkpoint.with_suffix(".invalid")
        os.replace(checkpoint, aside)
        reason = str(error).split("\n")[0] if isinstance(error, ValueError) else type(error).__name__
        warnings.warn(
            f"{label}: the checkpoint is not valid ({reason}); it is kept as {aside}, "
            "and the run starts anew",
            stacklevel=3,
        )
    task.load_state_dict(initial)
    return adam(task.parameters(), config), History(), {}


def _validated(
    task: Task, config: TrainConfig, evaluate: Callable[[], dict[str, float]], where: str
) -> dict[str, float]:
    """Measures on validation data, of finite weights.

    Raises:
        TrainingError: a weight or a measure that selects is not finite.
    """
    # The last step's weights have met no loss yet: without this the first measure of them would raise.
    if not all(weight.isfinite().all() for weight in task.parameters()):
        raise TrainingError(
            f"{where}: the weights are not finite after the last batch. {_lower_rate(config)}"
        )
    task.eval()
    try:
        measures = evaluate()
    except (ValueError, ArithmeticError) as error:
        raise TrainingError(f"{where}, validation: {error}") from error
    for name in ("cross_entropy", "accuracy"):
        if not math.isfinite(measures[name]):
            raise TrainingError(f"{where}: validation {name} is not finite")
    return measures


def adam(weights: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """On a GPU its rate is a tensor there, which an update that is replayed reads anew."""
    weights = list(weights)
    if not weights[0].is_cuda:
        return torch.optim.Adam(weights, lr=config.learning_rate, fused=True)
    rate = torch.tensor(config.learning_rate, device=weights[0].device)
    return torch.optim.Adam(weights, lr=rate, fused=True, capturable=True)


def _lower_rate(config: TrainConfig) -> str:
    return f"The usual remedy is a lower learning rate than {config.learning_rate:g}."


def save_checkpoint(state: dict[str, Any], path: Path, run_id: str) -> None:
    """One line of JSON with the run's id and the SHA-256 of what follows: the state as torch saves it."""
    buffer = io.BytesIO()  # through memory, because torch.save hides why a write failed
    torch.save(state, buffer)
    content = buffer.getvalue()
    header = json.dumps({"run": run_id, "sha256": hashlib.sha256(content).hexdigest()})
    store.write_bytes(path, header.encode() + b"\n" + content)


def load_checkpoint(path: Path, run_id: str, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The state of `save_checkpoint`.

    Raises:
        ValueError: it is damaged, or another run's.
    """
    if not path.is_file():
        raise ValueError("not a regular file")
    header, _, content = path.read_bytes().partition(b"\n")
    try:
        said = dict(json.loads(header))
    except (ValueError, TypeError, RecursionError):
        raise ValueError("it has no header") from None
    if said.get("run") != run_id:
        raise ValueError(f"it is of run {said.get('run')!r}, not {run_id!r}")
    if said.get("sha256") != hashlib.sha256(content).hexdigest():
        raise ValueError("its content was changed or cut")
    return torch.load(io.BytesIO(content), map_location=device, weights_only=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, progress: float) -> None:
    """The rate at `progress`, from 0 (start) to 1 (end of training): half a cosine, after the warm-up."""
    decay = (1 + math.cos(math.pi * progress)) / 2
    if progress < config.warmup:
        decay *= progress / config.warmup
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(config.learning_rate * decay)
        else:
            group["lr"] = config.learning_rate * decay


def _train_epoch(
    task: Task, optimizer: torch.optim.Optimizer, config: TrainConfig, epoch: int, label: str
) -> dict[str, float]:
    """One pass over the batches; the mean of every named loss."""
    task.train()
    on_cpu = on_host(next(task.parameters()))
    rows: list[dict[str, Tensor]] = []

    def update(*batch: Tensor) -> dict[str, Tensor]:
        losses = task.losses(batch if len(batch) > 1 else batch[0], epoch)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}

    replayed = Replayed(update, enabled=not distributed())
    for step, batch in enumerate(task.batches(epoch)):
        set_learning_rate(optimizer, config, (epoch + step / task.num_batches) / config.epochs)
        try:
            rows.append(replayed(*(batch if isinstance(batch, tuple) else (batch,))))
        except ValueError as error:  # a loss that refuses NaN, say
            raise TrainingError(f"{label}, epoch {epoch}, batch {step}: {error}") from error
        if on_cpu:  # a look at a GPU's losses would stall it
            _check_finite(rows[-1:], f"{label}, epoch {epoch}", step, config)
    if not on_cpu:
        _check_finite(rows, f"{label}, epoch {epoch}", 0, config)
    return {name: torch.stack([row[name] for row in rows]).mean().item() for name in rows[0]}


def _check_finite(rows: list[dict[str, Tensor]], where: str, first: int, config: TrainConfig) -> None:
    """Raises TrainingError for the first batch whose total is not finite; `first`: the number of row 0."""
    finite = torch.stack([row["total"] for row in rows]).isfinite()
    if not finite.all():
        at = finite.tolist().index(False)
        values = ", ".join(f"{name} = {loss.item():g}" for name, loss in rows[at].items())
        raise TrainingError(
            f"{where}, batch {first + at}: the loss is not finite ({values}). {_lower_rate(config)}"
        )
