"""The benchmark of training: every contestant does the same job.

Shapes: N samples, E experts, D width, H hidden width.
"""

import json

import pytest
import torch

from benchmarks import run as bench
from benchmarks import training as bench_train
from benchmarks.measure import Rates
from benchmarks.training import CIFAR, CNN, FED, MNIST, SNNL, PublicClassifier
from moe_study.data import pixels

pytestmark = pytest.mark.slow


def with_weights_of(task):
    """The peer, with the weights of one of our models."""
    peer, ours = PublicClassifier(CIFAR), task.model
    layers = ours.extractor.layers
    pairs = [(peer.layers[i][at], layers[name][at]) for i, (name, at) in enumerate(
        [("conv1", 0), ("conv2", 0), ("code", 1)]
    )]  # fmt: skip
    pairs += [(peer.gate[at], ours.moe.router.gate[at]) for at in (0, 2)]
    for theirs, own in pairs:
        theirs.load_state_dict(own.state_dict())
    w1_EDH, b1_EH, w2_EHO, b2_EO = ours.moe.experts.parameters()
    for e, expert in enumerate(peer.experts):
        expert.load_state_dict(
            {"0.weight": w1_EDH[e].T, "0.bias": b1_EH[e], "2.weight": w2_EHO[e].T, "2.bias": b2_EO[e]}
        )
    return peer


@pytest.mark.parametrize("once", [False, True])
def test_the_authors_step_has_our_losses(once):
    dataset = bench_train.random_dataset(CIFAR, 60)
    task = bench_train.task_of(dataset, CNN, SNNL, 60, "float32")
    images_NCHW, labels_N = next(task.batches(0))
    ours = task.losses((images_NCHW, labels_N), 0)
    peer, passes = with_weights_of(task), []
    peer.layers[0].register_forward_hook(lambda *_: passes.append(1))
    cross_entropy, snnl = peer.losses(images_NCHW, labels_N, once)
    assert len(passes) == 2 - once
    assert cross_entropy.item() == pytest.approx(ours["cross_entropy"].item(), rel=1e-5)
    assert snnl.item() == pytest.approx(ours["snnl"].item(), rel=1e-3)  # their eps


@pytest.mark.parametrize("name", FED)
def test_the_usual_scripts_see_our_pixels(name):
    split = bench_train.random_dataset(MNIST, 7).train
    images_NCHW, labels_N = next(FED[name](split, 7))
    expected = {(label, image.tobytes()) for image, label in zip(
        pixels(split.images_NCHW, torch.float32).numpy(), split.labels_N.tolist(), strict=True
    )}  # fmt: skip
    found = {
        (label, image.tobytes()) for image, label in zip(images_NCHW.numpy(), labels_N.tolist(), strict=True)
    }
    assert found == expected


def test_a_quick_look_writes_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_memory_in_fresh_processes", lambda *_: 3.5)
    monkeypatch.setattr(bench, "probe", lambda machine: Rates(1e11, 1e11, 1e11, 1e10, 1e9))
    assert bench.main(["train", "--quick", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "train.json").read_text())
    assert len(content["rows"]) == 3
    assert all(row["faster_than_fastest_peer"] > 0 for row in content["rows"])
