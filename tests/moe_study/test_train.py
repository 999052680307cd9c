"""The loop: schedule, selection, NaN, time limit, and resuming with the same numbers."""

import math
import os
import time

import pytest
import torch
from torch import nn

from moe_study import train
from moe_study.train import (
    History,
    OutOfTime,
    TrainConfig,
    TrainingError,
    fit,
    load_checkpoint,
    save_checkpoint,
    set_learning_rate,
)


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
        loss = float((self.slope.detach() - 2).square())
        return {"cross_entropy": loss, "accuracy": math.exp(-loss)}


CONFIG = TrainConfig(epochs=6, learning_rate=0.25)


def test_learns_and_selects_the_epoch_with_the_lowest_validation_loss():
    task = Line()
    history, best = fit(task, CONFIG, task.measure, label="line")
    losses = history.validation["cross_entropy"]
    assert losses[-1] < losses[0]
    assert history.best_epoch == losses.index(min(losses))
    assert float((best["best_cross_entropy"]["slope"] - 2).square()) == pytest.approx(min(losses))
    assert len(history.train["total"]) == CONFIG.epochs


@pytest.mark.parametrize("from_a_gpu", [False, True])
def test_resumed_run_ends_with_the_same_numbers(from_a_gpu, tmp_path):
    whole = Line()
    expected, expected_best = fit(whole, CONFIG, whole.measure, label="line")

    def stop(epoch: int, history: History) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "checkpoint.pt"
    killed = Line()
    with pytest.raises(KeyboardInterrupt):
        fit(killed, CONFIG, killed.measure, label="line", checkpoint=checkpoint, on_epoch=stop)
    if from_a_gpu:  # where updates are replayed, and read their rate from a tensor
        state = load_checkpoint(checkpoint, "")
        state["optimizer"]["param_groups"][0] |= {"lr": torch.tensor(0.1), "capturable": True}
        save_checkpoint(state, checkpoint, "")
    resumed = Line()
    found, found_best = fit(resumed, CONFIG, resumed.measure, label="line", checkpoint=checkpoint)
    assert found.validation == expected.validation
    assert found.train == expected.train
    for name in ("best_cross_entropy", "best_accuracy"):
        assert torch.equal(found_best[name]["slope"], expected_best[name]["slope"])
    assert torch.equal(resumed.slope, whole.slope)
    assert not list(tmp_path.glob("*.part"))


def test_a_run_that_other_code_began_says_so(tmp_path, monkeypatch):
    """Of three sessions the second is of another commit; in a result file: `resumed_from`."""

    def session(code: str, last: int) -> History:
        def stop(epoch: int, history: History) -> None:
            if epoch == last:
                raise KeyboardInterrupt

        monkeypatch.setattr(train, "_code", lambda: code)
        monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
        task = Line()
        options = {"label": "line", "checkpoint": tmp_path / "checkpoint.pt", "on_epoch": stop}
        return fit(task, CONFIG, task.measure, **options)[0]

    for code, last in (("first", 2), ("second", 3), ("second", 4)):
        with pytest.raises(KeyboardInterrupt):
            session(code, last)
    assert session("third", 99).resumed_from == ["first", "second"]


def test_a_loss_that_refuses_its_input_names_run_epoch_and_batch():
    """SNNL raises on features that are not finite before any loss can be."""

    class Refusing(Line):
        def losses(self, x, epoch):
            if epoch == 1:
                raise ValueError("features contain NaN")
            return super().losses(x, epoch)

    with pytest.raises(TrainingError, match="snnl seed 7, epoch 1, batch 0: features contain NaN"):
        fit(Refusing(), CONFIG, Refusing().measure, label="snnl seed 7")


def test_not_a_number_names_run_epoch_and_batch():
    task = Line(poison=(2, 3))
    with pytest.raises(TrainingError, match=r"snnl seed 7, epoch 2, batch 3: .*learning rate than 0\.25"):
        fit(task, CONFIG, task.measure, label="snnl seed 7")


def test_validation_that_is_not_finite_stops_the_run():
    task = Line()
    with pytest.raises(TrainingError, match="validation"):
        fit(task, CONFIG, lambda: {"cross_entropy": math.nan, "accuracy": 0.5}, label="line")


def test_validation_accuracy_that_is_not_finite_stops_the_run():
    task = Line()
    with pytest.raises(TrainingError, match="line, epoch 0: validation accuracy is not finite"):
        fit(task, CONFIG, lambda: {"cross_entropy": 1.0, "accuracy": math.nan}, label="line")


@pytest.mark.parametrize("error", [ValueError("features must be finite"), OverflowError("too large")])
def test_a_measure_that_raises_names_the_run(error):
    def measure():
        raise error

    with pytest.raises(TrainingError, match=f"snnl seed 7, epoch 0, validation: {error}"):
        fit(Line(), CONFIG, measure, label="snnl seed 7")


class Broken(Line):
    """A finite loss whose gradient is NaN, in one batch."""

    def __init__(self, at: tuple[int, int]) -> None:
        super().__init__()
        self.at, self.step = at, 0

    def batches(self, epoch):
        for self.step, batch in enumerate(super().batches(epoch)):
            yield batch

    def losses(self, x, epoch):
        losses = super().losses(x, epoch)
        if (epoch, self.step) == self.at:  # the root of 0 has an infinite slope
            losses["total"] = losses["total"] + ((self.slope - self.slope.detach()) * 0).abs().sqrt().sum()
        return losses


def test_weights_that_turn_nan_in_the_last_batch_name_the_epoch():
    """Before any measure meets them; in an earlier batch, the next loss tells."""
    task, measured = Broken((2, 3)), []

    def measure():
        measured.append(task.slope.item())
        return task.measure()

    with pytest.raises(TrainingError, match="snnl seed 7, epoch 2: the weights are not finite after"):
        fit(task, CONFIG, measure, label="snnl seed 7")
    assert len(measured) == 2
    assert all(map(math.isfinite, measured))
    with pytest.raises(TrainingError, match="snnl seed 7, epoch 2, batch 2: the loss is not finite"):
        fit(task := Broken((2, 1)), CONFIG, task.measure, label="snnl seed 7")


def halfway(path, run_id="0123456789"):
    """A checkpoint after three of six epochs."""
    task = Line()

    def stop(epoch: int, history: History) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            fit(task, CONFIG, task.measure, label="line", checkpoint=path, run_id=run_id, on_epoch=stop)


def test_a_damaged_optimiser_ends_in_an_error_of_the_run(tmp_path):
    """A checkpoint whose moments are NaN, whatever made them so."""
    path = tmp_path / "checkpoint.pt"
    halfway(path)
    state = load_checkpoint(path, "0123456789")
    state["optimizer"]["state"][0]["exp_avg"].fill_(math.nan)
    save_checkpoint(state, path, "0123456789")
    task = Line()
    with pytest.raises(TrainingError, match="line, epoch 3, batch 1: the loss is not finite"):
        fit(task, CONFIG, task.measure, label="line", checkpoint=path, run_id="0123456789")


def edited(**changes):
    def damage(path):
        save_checkpoint(load_checkpoint(path, "0123456789") | changes, path, "0123456789")

    return damage


def flip(position):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[int(position * len(content))] ^= 1
        path.write_bytes(content)

    return damage


def as_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "text": lambda path: path.write_text("torn"),
    "another seed's": lambda path: (path.unlink(), halfway(path, "9876543210")),
    "without a header": lambda path: path.write_bytes(path.read_bytes().partition(b"\n")[2]),
    "late epoch": edited(epoch=99),
    "early epoch": edited(epoch=1),
    "no history": edited(history={}),
    "other weights": edited(task={"slope": torch.zeros(2)}),
    "no optimiser": edited(optimizer={}),
    "folder": as_folder,
    "link to itself": lambda path: (path.unlink(), path.symlink_to(path)),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    **{f"bit flipped at {at}": flip(at) for at in (0.0, 0.02, 0.3, 0.5, 0.7, 0.9, 0.999)},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_invalid_checkpoint_is_set_aside_and_the_run_starts_anew(damage, tmp_path):
    whole = Line()
    expected, expected_best = fit(whole, CONFIG, whole.measure, label="line")
    path = tmp_path / "checkpoint.pt"
    halfway(path)
    DAMAGE[damage](path)
    task = Line()
    with pytest.warns(UserWarning, match="line: the checkpoint is not valid .*starts anew") as warned:
        found, best = fit(task, CONFIG, task.measure, label="line", checkpoint=path, run_id="0123456789")
    assert "weights_only" not in str(warned[0].message)
    assert os.path.lexists(tmp_path / "checkpoint.invalid")
    assert vars(found) | {"seconds": 0} == vars(expected) | {"seconds": 0}
    assert torch.equal(best["best_accuracy"]["slope"], expected_best["best_accuracy"]["slope"])
    assert load_checkpoint(path, "0123456789")["epoch"] == 6


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, [1, 2, 3, 4, 5, 6]), (1000.0, [1, 6])])
def test_checkpoints_between_the_first_epoch_and_the_last(seconds, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", seconds)
    saved = []
    monkeypatch.setattr(train, "save_checkpoint", lambda state, path, run_id: saved.append(state["epoch"]))
    task = Line()
    fit(task, CONFIG, task.measure, label="line", checkpoint=tmp_path / "checkpoint.pt")
    assert saved == expected


def test_the_time_limit_saves_what_no_checkpoint_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 1000.0)
    clock = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])

    def on_epoch(epoch: int, history: History) -> None:
        clock[0] = float(epoch)

    task, path = Line(), tmp_path / "checkpoint.pt"
    with pytest.raises(OutOfTime):
        fit(task, CONFIG, task.measure, label="line", checkpoint=path, on_epoch=on_epoch, deadline=3.5)
    assert load_checkpoint(path, "")["epoch"] == 4


def test_time_limit_keeps_the_checkpoint(tmp_path):
    task = Line()
    with pytest.raises(OutOfTime):
        fit(task, CONFIG, task.measure, label="line", deadline=time.monotonic() - 1)


def test_cosine_schedule_ends_near_zero(monkeypatch):
    rates, original = [], train.set_learning_rate

    def spy(optimizer, config, progress):
        original(optimizer, config, progress)
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(train, "set_learning_rate", spy)
    task = Line()
    fit(task, TrainConfig(epochs=2, learning_rate=1.0), task.measure, label="line")
    assert rates == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("precision", "int8"),
        ("warmup", -0.1),
        ("warmup", 1.0),
        ("warmup", math.nan),
    ],
)
def test_bad_configuration(field, value):
    with pytest.raises(ValueError, match=str(value)):
        TrainConfig(**{field: value})


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_warmup_rises_to_the_schedule(warmup):
    """From 0, in proportion; from its end on the schedule is as without it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    config = TrainConfig(learning_rate=0.5, warmup=warmup)
    for progress in (0.0, 0.03, 0.1, 0.25, 0.5, 0.75, 1.0):
        set_learning_rate(optimizer, config, progress)
        expected = 0.5 * (math.cos(math.pi * progress / 2) ** 2)
        expected *= progress / warmup if progress < warmup else 1
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-15)


def test_warmup_counts_steps_of_the_whole_training(monkeypatch):
    rates = []

    def spy(optimizer, config, progress):
        set_learning_rate(optimizer, config, progress)
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(train, "set_learning_rate", spy)
    task = Line()
    config = TrainConfig(epochs=2, learning_rate=1.0, warmup=0.5)
    fit(task, config, task.measure, label="line")
    without = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert rates == pytest.approx([rate * min(step / 4, 1) for step, rate in enumerate(without)])
