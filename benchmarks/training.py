"""Training against the usual script.

    authors         the CNN classifier as in Agarap and Azcarraga's earlier public code (pt-snnl): the
                    extractor runs once for the classes and once more for the activations of every layer,
                    whose losses are formed with eps; NCHW, float32, Adam without fused kernels
    authors, extractor once     the same, with classes and losses from one pass
    usual script    the same network on cross-entropy, fed by a DataLoader over a PIL data set with ToTensor
    tensors         as the usual script, fed by a DataLoader over tensors that takes a whole batch at a time

Shapes: N samples, D width, E experts, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from PIL import Image  # a dependency of torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import Contestant, Row, Step, Work
from benchmarks.snnl import authors as authors_snnl
from moe_lib.models.classifier import ClassifierConfig
from moe_lib.snnl import SNNLConfig
from moe_study import data, train
from moe_study.data import Dataset, Split
from moe_study.replay import Replayed
from moe_study.tasks import ClassifierTask, Objective
from moe_study.train import Task, TrainConfig

CIFAR, MNIST = (3, 32, 32), (1, 28, 28)
CNN = ClassifierConfig(extractor="cnn", code_dim=128, num_experts=4, expert_hidden=512)
MLP = ClassifierConfig("mlp", 64, code_dim=16, num_experts=4, expert_hidden=32, gate_hidden=32)
SNNL = Objective(snnl=SNNLConfig(factor=1.0, layers=("conv1", "conv2", "code")))
Shape = tuple[int, int, int]
Compute = Literal["float32", "bfloat16"]


def random_dataset(shape: Shape, count: int, device: str = "cpu") -> Dataset:
    draw = torch.Generator().manual_seed(0)
    images_NCHW = torch.randint(0, 256, (count, *shape), generator=draw, dtype=torch.uint8).to(device)
    split = Split(images_NCHW, torch.randint(10, (count,), generator=draw).to(device))
    return Dataset("random", split, split, split, 10)


def task_of(
    dataset: Dataset,
    config: ClassifierConfig,
    objective: Objective,
    batch: int,
    compute: Compute,
    seed: int = 0,
) -> ClassifierTask:
    bf16 = compute == "bfloat16"
    return ClassifierTask(dataset, config, objective, seed=seed, epochs=1, batch_size=batch, bf16=bf16)


def adam(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """The study's own if fused, else the usual script's."""
    if fused:
        return train.adam(model.parameters(), TrainConfig(learning_rate=1e-3))
    return torch.optim.Adam(model.parameters(), lr=1e-3, foreach=True)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def replayed(task: Task, optimizer: torch.optim.Optimizer) -> Replayed:
    """Of a batch: one update of the task's weights, as the study does it."""

    def update(*batch: Tensor) -> dict[str, Tensor]:
        descend(optimizer, task.losses(batch, 0)["total"])
        return {}

    return Replayed(update)


# ----------------------------------------------------------------------------------------- peers


class PublicClassifier(nn.Module):
    """The network of `CNN`, written layer by layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        code_dim, hidden = 128, CNN.expert_hidden
        height, width = (((side - 4) // 2 - 4) // 2 + 1 for side in shape[1:])
        self.layers = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(shape[0], 64, 8, stride=2, padding=1), nn.ReLU()),
                nn.Sequential(nn.Conv2d(64, 128, 6, stride=2, padding=1), nn.ReLU()),
                nn.Sequential(nn.Flatten(), nn.Linear(128 * height * width, code_dim)),
            ]
        )
        self.gate = nn.Sequential(
            nn.Linear(code_dim, CNN.gate_hidden), nn.ReLU(), nn.Linear(CNN.gate_hidden, CNN.num_experts)
        )
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(code_dim, hidden), nn.ReLU(), nn.Linear(hidden, 10))
            for _ in range(CNN.num_experts)
        )

    def activations(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x.flatten(1))
        return found

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.classify(self.activations(images_NCHW)[-1])

    def classify(self, code_ND: Tensor) -> Tensor:
        gate_NE = self.gate(code_ND).softmax(1)
        logits_NEC = torch.stack([expert(code_ND) for expert in self.experts], 1)
        return (gate_NE[..., None] * logits_NEC).sum(1)

    def losses(self, images_NCHW: Tensor, labels_N: Tensor, once: bool = False) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and the smallest SNNL of the layers at temperature 1; `once`: from one pass."""
        activations = self.activations(images_NCHW)
        logits_NC = self.classify(activations[-1]) if once else self(images_NCHW)
        cross_entropy = F.cross_entropy(logits_NC, labels_N)
        by_layer = [authors_snnl([x_ND], labels_N, 1.0) for x_ND in activations]
        return cross_entropy, torch.stack(by_layer).min()


class Pictures(torch.utils.data.Dataset):
    """Image by image, through PIL and ToTensor, as torchvision's data sets go."""

    def __init__(self, split: Split) -> None:
        from torchvision.transforms import ToTensor

        self.to_tensor = ToTensor()
        self.arrays = [image_CHW.permute(1, 2, 0).squeeze(2).numpy() for image_CHW in split.images_NCHW]
        self.labels = split.labels_N.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.to_tensor(Image.fromarray(self.arrays[index])), self.labels[index]


def usual_batches(split: Split, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For ever; in this process, since a benchmark on one core gives its peers no more."""
    loader = torch.utils.data.DataLoader(Pictures(split), batch, shuffle=True)
    while True:
        yield from loader


def tensor_batches(split: Split, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For ever; pixels are stored in float32, and a batch is one index of the data set."""
    tools = torch.utils.data
    dataset = tools.TensorDataset(data.pixels(split.images_NCHW, torch.float32), split.labels_N)
    batches = tools.BatchSampler(tools.RandomSampler(dataset), batch, drop_last=False)
    loader = tools.DataLoader(dataset, sampler=batches, batch_size=None)
    while True:
        yield from loader


FED: dict[str, Callable[[Split, int], Iterator[tuple[Tensor, Tensor]]]] = {
    "usual script": usual_batches,
    "tensors": tensor_batches,
}


# ------------------------------------------------------------------------------------------ rows


def rows(quick: bool = False) -> list[Row]:
    """Steps of training: data path, forward, backward, optimiser. `quick`: a look at the machinery."""
    if quick:
        return [
            _snnl_step(8, rounds=3),
            _pipeline(8, rounds=3),
            _data_path(10, rounds=3),
        ]
    return [
        _snnl_step(256, goal_time=3.5, rounds=5),
        _snnl_step(512, goal_time=3.5, rounds=5),
        _pipeline(512, goal_time=3, rounds=5),
        _data_path(100),
    ]


def _snnl_step(batch: int, **options: Any) -> Row:
    widths = 64 * 14**2, 128 * 6**2, CNN.code_dim or 0
    contestants = (
        Contestant("ours", partial(our_snnl_step, batch, "bfloat16"), peer=False),
        Contestant("ours, float32", partial(our_snnl_step, batch, "float32"), peer=False),
        Contestant("authors", partial(_authors_step, batch, False)),
        Contestant("authors, extractor once", partial(_authors_step, batch, True)),
    )
    pairs = Work(gemm=_cnn_operations(batch) + 3.0 * batch**2 * sum(widths), exp=1.5 * batch**2)
    return Row(
        f"CNN step with SNNL, batch {batch}", {"N": batch}, pairs, contestants, dtype=_DTYPES, **options
    )


_DTYPES = "float32; ours: extractor in bfloat16, experts and losses in float32"


def _cnn_operations(batch: int) -> float:
    """In forward and backward passes; nothing asks for the gradient of the pixels."""
    conv1, conv2 = 14**2 * 64 * 3 * 8**2, 6**2 * 128 * 64 * 6**2
    linear = 128 * 6**2 * 128 + 128 * 512 + 512 * 4 + 4 * (128 * 512 + 512 * 10)
    return 2.0 * batch * (2 * conv1 + 3 * conv2 + 3 * linear)


def our_snnl_step(batch: int, compute: Compute, device: str) -> Step:
    dataset = random_dataset(CIFAR, batch, device)
    task = task_of(dataset, CNN, SNNL, batch, compute)
    update, ready = replayed(task, adam(task, fused=True)), next(task.batches(0))

    def step() -> None:
        update(*ready)

    return step


def _authors_step(batch: int, once: bool, device: str) -> Step:
    split = random_dataset(CIFAR, batch, device).train
    model = PublicClassifier(CIFAR).to(device)
    optimizer, images_NCHW = adam(model, fused=False), data.pixels(split.images_NCHW, torch.float32)
    return lambda: descend(optimizer, sum(model.losses(images_NCHW, split.labels_N, once), torch.zeros(())))


def _pipeline(batch: int, **options: Any) -> Row:
    contestants = (
        Contestant("ours", partial(_our_pipeline, batch, "bfloat16"), peer=False),
        Contestant("ours, float32", partial(_our_pipeline, batch, "float32"), peer=False),
        *(Contestant(name, partial(_usual_pipeline, batch, name)) for name in FED),
    )
    work = Work(gemm=_cnn_operations(batch))
    return Row(
        f"CNN from data to update, batch {batch}", {"N": batch}, work, contestants, dtype=_DTYPES, **options
    )


def our_batches(task: Task) -> Iterator[Any]:
    """Epoch after epoch, for ever."""
    return itertools.chain.from_iterable(map(task.batches, itertools.count()))


def _our_steps(task: ClassifierTask) -> Step:
    optimizer, batches = adam(task, fused=True), our_batches(task)
    return lambda: descend(optimizer, task.losses(next(batches), 0)["total"])


def _our_pipeline(batch: int, compute: Compute, device: str) -> Step:
    return _our_steps(task_of(random_dataset(CIFAR, 8 * batch, device), CNN, Objective(), batch, compute))


def _usual_pipeline(batch: int, name: str, device: str) -> Step:
    batches = FED[name](random_dataset(CIFAR, 8 * batch).train, batch)
    model = PublicClassifier(CIFAR).to(device)
    optimizer = adam(model, fused=False)

    def step() -> None:
        images_NCHW, labels_N = next(batches)
        descend(optimizer, F.cross_entropy(model(images_NCHW.to(device)), labels_N.to(device)))

    return step


def _data_path(batch: int, **options: Any) -> Row:
    def ours(device: str) -> Step:
        batches = our_batches(
            task_of(random_dataset(MNIST, 600 * batch, device), MLP, Objective(), batch, "float32")
        )
        return lambda: next(batches)

    def usual(name: str, device: str) -> Step:
        batches = FED[name](random_dataset(MNIST, 600 * batch).train, batch)
        return lambda: [tensor.to(device) for tensor in next(batches)]

    work = Work(bytes=batch * 28.0**2 * (1 + 4))
    peers = (Contestant(name, partial(usual, name)) for name in FED)
    contestants = Contestant("ours", ours, peer=False), *peers
    return Row(f"data path alone, MNIST size, batch {batch}", {"N": batch}, work, contestants, **options)
