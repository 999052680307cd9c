"""The loop: schedule, selection, NaN, time limit, and resuming with the same numbers."""

import math
import time

import pytest
import torch
from torch import nn

from moe_study.train import History, OutOfTime, TrainConfig, TrainingError, fit, set_learning_rate


class Line(nn.Module):
    """Fit y = 2x; batch order depends on the epoch alone."""

    num_batches = 4

    def __init__(self, poison: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.poison = poison
        self.seen: list[tuple[int, float]] = []

    def batches(self, epoch):
        x = torch.arange(16, dtype=torch.float64) / 16
        order = torch.randperm(16, generator=torch.Generator().manual_seed(epoch))
        for step, index in enumerate(order.split(4)):
            yield x[index] * (math.nan if (epoch, step) == self.poison else 1)

    def losses(self, x, epoch):
        loss = ((self.slope - 2) * x).square().mean()
        return {"cross_entropy": loss, "total": loss}

    def measure(self):
        return {"cross_entropy": float((self.slope.detach() - 2).square())}


CONFIG = TrainConfig(epochs=6, learning_rate=0.25, schedule="constant")


def test_learns_and_selects_the_epoch_with_the_lowest_validation_loss():
    task = Line()
    history, best = fit(task, CONFIG, task.measure, label="line")
    losses = history.validation["cross_entropy"]
    assert losses[-1] < losses[0]
    assert history.best_epoch == losses.index(min(losses))
    assert float((best["slope"] - 2).square()) == pytest.approx(min(losses))
    assert len(history.train["total"]) == CONFIG.epochs


def test_resumed_run_ends_with_the_same_numbers(tmp_path):
    whole = Line()
    expected, expected_best = fit(whole, CONFIG, whole.measure, label="line")

    def stop(epoch: int, history: History) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "checkpoint.pt"
    killed = Line()
    with pytest.raises(KeyboardInterrupt):
        fit(killed, CONFIG, killed.measure, label="line", checkpoint=checkpoint, on_epoch=stop)
    resumed = Line()
    found, found_best = fit(resumed, CONFIG, resumed.measure, label="line", checkpoint=checkpoint)
    assert found.validation == expected.validation
    assert found.train == expected.train
    assert torch.equal(found_best["slope"], expected_best["slope"])
    assert torch.equal(resumed.slope, whole.slope)
    assert not list(tmp_path.glob("*.part"))


def test_not_a_number_names_run_epoch_and_batch():
    task = Line(poison=(2, 3))
    with pytest.raises(TrainingError, match=r"snnl seed 7, epoch 2, batch 3: .*learning rate than 0\.25"):
        fit(task, CONFIG, task.measure, label="snnl seed 7")


def test_validation_that_is_not_finite_stops_the_run():
    task = Line()
    with pytest.raises(TrainingError, match="validation"):
        fit(task, CONFIG, lambda: {"cross_entropy": math.nan}, label="line")


def test_time_limit_keeps_the_checkpoint(tmp_path):
    task = Line()
    with pytest.raises(OutOfTime):
        fit(task, CONFIG, task.measure, label="line", deadline=time.monotonic() - 1)


def test_cosine_schedule_ends_near_zero(monkeypatch):
    from moe_study import train

    rates, original = [], train.set_learning_rate

    def spy(optimizer, config, progress):
        original(optimizer, config, progress)
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(train, "set_learning_rate", spy)
    task = Line()
    fit(task, TrainConfig(epochs=2, learning_rate=1.0, schedule="cosine"), task.measure, label="line")
    assert rates == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("schedule", "step"),
        ("precision", "int8"),
        ("warmup", -0.1),
        ("warmup", 1.0),
        ("warmup", math.nan),
    ],
)
def test_bad_configuration(field, value):
    with pytest.raises(ValueError, match=str(value)):
        TrainConfig(**{field: value})


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_warmup_rises_to_the_schedule(schedule, warmup):
    """From 0, in proportion; from its end on the schedule is as without it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    config = TrainConfig(learning_rate=0.5, schedule=schedule, warmup=warmup)
    for progress in (0.0, 0.03, 0.1, 0.25, 0.5, 0.75, 1.0):
        set_learning_rate(optimizer, config, progress)
        expected = 0.5 * (math.cos(math.pi * progress / 2) ** 2 if schedule == "cosine" else 1)
        expected *= progress / warmup if progress < warmup else 1
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-15)


def test_warmup_counts_steps_of_the_whole_training(monkeypatch):
    from moe_study import train

    rates = []

    def spy(optimizer, config, progress):
        set_learning_rate(optimizer, config, progress)
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(train, "set_learning_rate", spy)
    task = Line()
    config = TrainConfig(epochs=2, learning_rate=1.0, schedule="constant", warmup=0.5)
    fit(task, config, task.measure, label="line")
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1, 1])
