"""Image data sets, each a handful of uint8 tensors that live on the device.

Shapes: N samples, C channels, H height, W width.
"""

from __future__ import annotations

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

    def __len__(self) -> int:
        return len(self.labels_N)

    def take(self, index: Tensor | slice) -> Split:
        return Split(self.images_NCHW[index], self.labels_N[index])


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
        name: "digits" (scikit-learn's, embedded), "mnist", "fashion_mnist", "cifar10" or "cifar100".
        root: data folder in torchvision's layout; see `data_dir`. Missing sets are downloaded into it.
        device: where the tensors live.
        seed: of the split. The test set never depends on it.

    Raises:
        DataError: the name is unknown, or the files are missing or damaged and cannot be fetched.
    """
    if name not in DATASETS:
        raise DataError(_unknown(name))
    if name == "digits":
        (images, labels), test = _digits()
    else:
        images, labels = _torchvision(name, data_dir(root), train=True)
        test = _torchvision(name, data_dir(root), train=False)
    order_N = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    whole = Split(images.to(device), labels.to(device))
    num_validation = len(labels) // 10
    return Dataset(
        name,
        train=whole.take(order_N[num_validation:].to(device)),
        validation=whole.take(order_N[:num_validation].to(device)),
        test=Split(test[0].to(device), test[1].to(device)),
        num_classes=int(labels.max()) + 1,
    )


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
    if name == "digits":
        return True
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}.get(name, DATASETS[name])
    return (data_dir(root) / folder).is_dir()


# Name here -> class in torchvision.datasets.
DATASETS = {
    "digits": "",
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
