"""Image data sets, each a handful of uint8 tensors that live on the device.

Shapes: N samples, C channels, H height, W width.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock  # a dependency of torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


class DataError(RuntimeError):
    """A data set is missing, damaged or unknown; the message says what to do."""


@dataclass(frozen=True)
class Split:
    images_NCHW: Tensor  # uint8, 0..255
    labels_N: Tensor  # int64
    domains_N: Tensor | None = None  # int64: which of several sources; None where there is one

    def __len__(self) -> int:
        return len(self.labels_N)

    def take(self, index: Tensor | slice) -> Split:
        domains_N = None if self.domains_N is None else self.domains_N[index]
        return Split(self.images_NCHW[index], self.labels_N[index], domains_N)

    def to(self, device: str | torch.device) -> Split:
        domains_N = None if self.domains_N is None else self.domains_N.to(device)
        return Split(self.images_NCHW.to(device), self.labels_N.to(device), domains_N)


@dataclass(frozen=True)
class Dataset:
    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int


def data_dir(root: str | Path | None = None) -> Path:
    """The data folder: `root` if given, else `$MOE_DATA_DIR`, else `data/` in the project."""
    return Path(root or os.environ.get("MOE_DATA_DIR") or ROOT / "data").expanduser().resolve()


def pixels(images_NCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """Intensities in [0, 1]; nothing else is done to an image (no augmentation, no whitening)."""
    return images_NCHW.to(dtype) / 255


def load(
    name: str, root: str | Path | None = None, device: str | torch.device = "cpu", seed: int = 0
) -> Dataset:
    """Load a data set whole, with a 90/10 train/validation split drawn from `seed`.

    Args:
        name: "digits" (scikit-learn's, embedded), "mnist", "fashion_mnist", "cifar10", "cifar100", "domains"
            (three of them under one set of labels) or "digit_domains" (the digits in three forms).
        root: data folder in torchvision's layout; see `data_dir`. Missing sets are downloaded into it.
        device: where the tensors live.
        seed: of the split. The test set never depends on it.

    Raises:
        DataError: the name is unknown, or the files are missing or damaged and cannot be fetched.
    """
    if name not in DATASETS:
        raise DataError(_unknown(name))
    whole, test = (part.to(device) for part in _splits(name, data_dir(root)))
    order_N = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).to(device)
    num_validation = len(whole) // 10
    return Dataset(
        name,
        train=whole.take(order_N[num_validation:]),
        validation=whole.take(order_N[:num_validation]),
        test=test,
        num_classes=int(whole.labels_N.max()) + 1,
    )


@functools.lru_cache(maxsize=1)  # a worker trains one run after the other, mostly on one data set
def _splits(name: str, root: Path) -> tuple[Split, Split]:
    """All training images, and the test set."""
    if name == "digits":
        train, test = _digits()
        return Split(*train), Split(*test)
    if name == "digit_domains":
        train, test = _digits()
        return _digit_domains(*train), _digit_domains(*test)
    if name == "domains":
        return _domains(root, True, DOMAIN_IMAGES), _domains(root, False, None)
    return Split(*_torchvision(name, root, train=True)), Split(*_torchvision(name, root, train=False))


DOMAINS = ("mnist", "fashion_mnist", "cifar10")
DOMAIN_IMAGES = 15_000  # of each, for training and validation


def _domains(root: Path, train: bool, count: int | None) -> Split:
    """MNIST, FashionMNIST and CIFAR-10 (grey, its middle 28 x 28 pixels) under the same ten labels, so that
    one label means three things. The first `count` images of each, all if None."""
    parts = []
    for name in DOMAINS:
        images_NCHW, labels_N = _torchvision(name, root, train)
        if images_NCHW.shape[1] == 3:  # luma of ITU-R BT.601, as in Pillow's mode "L"
            weights_C = torch.tensor([0.299, 0.587, 0.114])
            grey_NHW = (images_NCHW[:, :, 2:-2, 2:-2] * weights_C[:, None, None]).sum(1)
            images_NCHW = grey_NHW.round().to(torch.uint8)[:, None]
        parts.append((images_NCHW[:count], labels_N[:count]))
    return _interleaved(parts)


def _digit_domains(images_NCHW: Tensor, labels_N: Tensor) -> Split:
    """The digits upright, turned by 90 degrees and upside down in grey: each form has its own labels."""
    return _interleaved(
        [
            (images_NCHW, labels_N),
            (images_NCHW.rot90(1, (2, 3)), (labels_N + 3) % 10),
            (255 - images_NCHW, (labels_N + 7) % 10),
        ]
    )


def _interleaved(parts: list[tuple[Tensor, Tensor]]) -> Split:
    """One sample of each domain, then the next of each: any stretch holds all domains alike."""
    images, labels = (torch.stack(tensors, 1).flatten(0, 1) for tensors in zip(*parts, strict=True))
    return Split(images, labels, torch.arange(len(labels)) % len(parts))


def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The 1,797 8x8 digits, their 17 grey levels spread over 0..255; every fifth of a class is test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=0
    )
    return (images[rest], labels[rest]), (images[test], labels[test])


def _torchvision(name: str, root: Path, train: bool) -> tuple[Tensor, Tensor]:
    from torchvision import datasets

    factory: Callable = getattr(datasets, DATASETS[name])
    try:
        try:
            raw = factory(str(root), train=train, download=False)
        except RuntimeError:  # torchvision's word for "not found or corrupted"
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{name}.lock"):  # parallel runs: one downloads, the others wait
                raw = factory(str(root), train=train, download=True)
        images, labels = torch.as_tensor(raw.data), torch.as_tensor(raw.targets)
        expected = (60_000 if "mnist" in name else 50_000) if train else 10_000
        if len(images) != expected or len(labels) != expected:
            raise ValueError(f"{len(images)} images and {len(labels)} labels instead of {expected}")
    except Exception as error:
        raise DataError(
            f"data set {name!r} is missing or damaged under {root} and could not be fetched "
            f"({type(error).__name__}: {error}). With a network run `make data`; without one put "
            f"torchvision's files there, or point MOE_DATA_DIR at a folder that has them; "
            f"if files are damaged, delete them first."
        ) from error
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, labels.long()


def _unknown(name: str) -> str:
    return f"unknown data set {name!r}; known: {', '.join(DATASETS)}"


def present(name: str, root: str | Path | None = None) -> bool:
    """Whether a data set's files seem to be there already (they are checked when loaded)."""
    if name not in DATASETS:
        raise DataError(_unknown(name))
    if name in ("digits", "digit_domains"):
        return True
    if name == "domains":
        return all(present(part, root) for part in DOMAINS)
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}.get(name, DATASETS[name])
    return (data_dir(root) / folder).is_dir()


# Name here -> class in torchvision.datasets.
DATASETS = {
    "digits": "",
    "digit_domains": "",
    "domains": "",
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
