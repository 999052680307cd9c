"""No training step waits for the device, and no epoch copies more than a handful of index lists to it.

Without a GPU: see `support/waiting.py`. With one, the same is tested in test_gpu.py.
"""

from dataclasses import replace

import pytest
import torch
from waiting import Waits, pretended_gpu, unreadable_values

from moe_lib.models.classifier import ClassifierConfig
from moe_lib.models.language import LanguageConfig
from moe_lib.models.transformer import TransformerConfig
from moe_lib.models.vision import VisionConfig
from moe_lib.moe import ACConfig
from moe_lib.snnl import SNNLConfig
from moe_study.data import Dataset, Split
from moe_study.data.text import Corpus, Text
from moe_study.tasks import ClassifierTask, LanguageTask, Objective, RoutedObjective, VisionTask
from moe_study.train import TrainConfig, adam

TRUNK = TransformerConfig(
    dim=32, depth=3, num_heads=2, mlp_hidden=32, moe_blocks=(1, 2), num_experts=8, expert_hidden=16
)
MLP = ClassifierConfig("mlp", 32, code_dim=8, num_experts=4, expert_hidden=8, gate_hidden=8)
CNN = ClassifierConfig(code_dim=16, expert_hidden=16, gate_hidden=16)
SNNL = SNNLConfig(layers=("code",))


def images(device, count=24, side=16):
    split = Split(
        torch.zeros(count, 3, side, side, dtype=torch.uint8).to(device),
        torch.zeros(count, dtype=torch.int64).to(device),
    )
    return Dataset("empty", split, split, split, 10)


def corpus(device, count=600):
    tokens_N = torch.zeros(count, dtype=torch.int64).to(device)
    part = Text(tokens_N, "")
    return Corpus("empty", part, part, part)


def check(make_task, monkeypatch, forward=True, epochs=1, **options):
    """An epoch, twice: forward with copies counted; and whole steps, of which none looks at a value."""
    with pretended_gpu(monkeypatch, **options):
        task = make_task("cuda")
        task.train()
        with Waits() as waits:
            for epoch in range(epochs):
                batches = task.batches(epoch)
                first = next(batches)
                before = len(waits.copies)  # order, crops, shuffled labels: once an epoch
                assert before <= 4 * (epoch + 1)
                for batch in (first, *batches):
                    if forward:
                        assert task.losses(batch, epoch)["total"].is_cuda
                assert waits.copies[before:] == []
    with unreadable_values(monkeypatch):
        task = make_task("cpu")
        task.train()
        optimizer = adam(task.parameters(), TrainConfig())
        for epoch in range(epochs):
            for batch in task.batches(epoch):
                losses = task.losses(batch, epoch)
                optimizer.zero_grad()
                losses["total"].backward()
                optimizer.step()


@pytest.mark.parametrize("config", [MLP, CNN], ids=["mlp", "cnn"])
@pytest.mark.parametrize(
    "objective",
    [
        Objective(),
        Objective(snnl=SNNL),
        Objective(snnl=SNNLConfig(layers=("code",), schedule="learned")),
        Objective(snnl=SNNL, shuffled=True),
        Objective(balance=0.1),
        Objective(auxiliary=0.1),
        Objective(pretrain="ce"),
    ],
    ids=["plain", "snnl", "learned", "shuffled", "balance", "auxiliary", "pretrain"],
)
def test_a_step_of_a_classifier(config, objective, monkeypatch):
    bf16 = config.extractor == "cnn"
    check(
        lambda device: ClassifierTask(
            images(device), config, objective, seed=0, epochs=2, batch_size=16, bf16=bf16
        ),
        monkeypatch,
        forward=not objective.shuffled,  # its loss needs gradients
        epochs=2 if objective.pretrain != "none" else 1,
    )


@pytest.mark.parametrize("config", [replace(MLP, gate="uniform"), replace(MLP, extractor="none")])
def test_a_step_of_a_classifier_without_a_part(config, monkeypatch):
    options = {"seed": 0, "epochs": 2, "batch_size": 16}
    check(
        lambda device: ClassifierTask(images(device), config, Objective(balance=0.1), **options), monkeypatch
    )


@pytest.mark.parametrize("gate", ["mlp", "hash"])
def test_a_step_of_a_classifier_with_one_expert_per_image(gate, monkeypatch):
    config = replace(MLP, gate=gate, top_k=1)
    check(
        lambda device: ClassifierTask(
            images(device), config, Objective(snnl=SNNL), seed=0, epochs=2, batch_size=16
        ),
        monkeypatch,
    )


TRUNKS = {
    "linear": replace(TRUNK, router="linear"),
    "cosine": TRUNK,
    "hash": replace(TRUNK, router="hash"),
    **{
        f"ac {name}": replace(TRUNK, router="ac", ac=ACConfig(**options))
        for name, options in {
            "language": {},
            "swin": {"normalize": "global", "max_ratio": 1.5},
            "shuffled": {"shuffled": True},
            "pooled": {"pooled": True, "normalize": "row"},
            "matched": {"matched": True},
            "causal": {"causal": True},
            "mixed": {"mixed": True},
            "gradient": {"gradient": True},
        }.items()
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("router", "bf16"), [*((name, False) for name in TRUNKS), ("cosine", True), ("ac language", True)]
)
def test_a_step_of_a_transformer(router, bf16, monkeypatch):
    trunk, objective = TRUNKS[router], RoutedObjective(snnl=SNNLConfig(layers=("stem",)))
    config = VisionConfig(trunk, patch=8, stem="conv" if bf16 else "patch")
    options = {"seed": 0, "batch_size": 16, "augment": True, "bf16": bf16}
    check(lambda device: VisionTask(images(device), config, objective, **options), monkeypatch)


@pytest.mark.parametrize("router", ["ac", "hash-token"])
def test_a_step_of_a_language_model(router, monkeypatch):
    config = LanguageConfig(replace(TRUNK, router=router, moe_blocks=(2,)), context=8)
    options = {"seed": 0, "batch_size": 4, "epoch_tokens": 8 * 16, "bf16": True}
    check(lambda device: LanguageTask(corpus(device), config, RoutedObjective(), **options), monkeypatch)


def test_an_older_gpu_takes_blocks(monkeypatch):
    config = VisionConfig(TRUNK, patch=8)
    options = {"seed": 0, "batch_size": 16, "bf16": True}
    check(
        lambda device: VisionTask(images(device), config, RoutedObjective(), **options),
        monkeypatch,
        capability=(8, 0),
    )


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: bool(x > 0),
        lambda x: x.reshape(1).nonzero(),
        lambda x: x.reshape(1)[x.reshape(1) > 0],
    ],
)
def test_a_look_at_a_value_is_noticed(look, monkeypatch):
    # DataDependentOutputException, DynamicOutputShapeException
    noticed = pytest.raises(RuntimeError, match=r"local_scalar_dense|nonzero")
    with unreadable_values(monkeypatch), noticed:
        look(torch.zeros(()))


def test_a_copy_is_noticed(monkeypatch):
    with pretended_gpu(monkeypatch), Waits() as waits:
        torch.zeros(3).to("cuda")
    assert len(waits.copies) == 1
