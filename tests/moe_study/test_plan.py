"""Shards by expected minutes, and the simulation of so many workers."""

import itertools

import pytest

from moe_study import plan, store, study


def finish(
    runs: list[study.Run], seconds: float, memory: float = 400.0, training: float | None = None
) -> None:
    for run in runs:
        history = {} if training is None else {"history": {"seconds": training}}
        study.write(run, {"wall_seconds": seconds, "peak_memory_mb": 400.0, **history})


@pytest.fixture
def runs(folders):
    """The arms of a study: base takes 100 s, raw 400 s, the others 50 s; one seed of each is finished."""
    found = study.runs("digits", "snnl")
    first = {run.arm: run for run in reversed(found)}
    for arm, run in first.items():
        finish([run], {"base": 100.0, "raw": 400.0}.get(arm, 50.0))
    return found


def test_shards_hold_every_unfinished_run_once_the_longest_first(runs):
    parts = plan.shards(runs, minutes=5)
    todo = [run.id for run in runs if not run.path.exists()]
    assert sorted(itertools.chain(*(part.runs for part in parts))) == sorted(todo)
    lengths = [part.seconds for part in parts]
    assert lengths == sorted(lengths, reverse=True)
    assert all(length >= 300 for length in lengths)
    expected = {run.id: {"base": 100.0, "raw": 400.0}.get(run.arm, 50.0) for run in runs}
    for part in parts:
        assert part.seconds == pytest.approx(sum(expected[run_id] for run_id in part.runs))
        assert 60 * part.limit_minutes >= 3 * part.seconds + 600
        assert part.memory_mb == 600  # a half more than was seen
        assert not part.gpu  # float64 stays on the CPU


def test_a_shard_is_short_only_if_there_is_no_more_work(runs):
    (part,) = plan.shards(runs, minutes=10_000)
    assert len(part.runs) == sum(not run.path.exists() for run in runs)
    finish(runs, 1.0)
    assert plan.shards(runs) == []


def test_every_job_reads_the_list_that_the_driver_wrote(runs, folders):
    """Whatever has been finished since."""
    path = plan.write_shards(runs, folders / "work", minutes=5)
    parts = plan.read_shards(path)
    finish(runs[:10], 9.0)
    assert plan.read_shards(path) == parts
    for number, part in enumerate(parts, 1):
        assert [run.id for run in plan.part_of(runs, path, f"{number}/{len(parts)}")] == part.runs
    with pytest.raises(ValueError, match=f"lists {len(parts)} shards, got --shard 1/99"):
        plan.part_of(runs, path, "1/99")
    with pytest.raises(ValueError, match="the code has changed since"):
        plan.part_of([], path, f"1/{len(parts)}")


def test_work_that_was_deleted_is_asked_for_again(runs, folders):
    path = plan.write_shards(runs, folders / "work")
    store.write(path.parent / "1of1.json", {})
    assert plan.write_shards(runs, folders / "work") == path
    assert not (path.parent / "1of1.json").exists()


def test_another_profile_takes_the_rate_per_image_and_the_same_time_to_measure(folders):
    """20,000 images, 6 epochs, 60 s of training and 40 s of measuring; then 45,000 images, 20 epochs."""
    small = study.runs("core", "ac-vision", "cifar10", "ac")[0]
    assert (small.train.epochs, small.train_images) == (6, 20_000)
    finish([small], 100.0, training=60.0)
    large = study.runs("paper", "ac-vision", "cifar10", "ac")[0]
    assert large.train_images is None
    times = plan.Times(plan.related([large]))
    expected = 60 * (45_000 * large.train.epochs) / (20_000 * 6) + 40
    assert times.expected(large) == pytest.approx(expected)


@pytest.mark.parametrize(("workers", "wall"), [(1, 24), (2, 13), (3, 9), (4, 9), (1000, 9)])
def test_simulated_wall_time(workers, wall):
    """Jobs of 8, 5, 4 and 3 s that cost 1 s each, longest first: 9 | 6 | 5 | 4."""
    found = plan.simulate([4, 8, 3, 5], workers, start=1)
    assert found.wall == wall
    assert found.starting == pytest.approx(4 / (workers * wall))
    assert found.idle == pytest.approx(1 - 24 / (workers * wall))


def test_nobody_beats_the_bounds_of_scheduling():
    """At least the longest job and an equal split; at most their sum, since nobody waits while work is left."""
    seconds = [(i * 7919) % 1000 + 1.0 for i in range(300)]
    for workers in plan.CURVE:
        wall = plan.simulate(seconds, workers, start=0).wall
        split = sum(seconds) / workers
        assert max(*seconds, split) <= wall <= split + max(seconds)
