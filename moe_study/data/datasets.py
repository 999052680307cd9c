"""Image data sets, each a handful of uint8 tensors that live on the device.

Shapes: N samples, C channels, H height, W width.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
import torch
from filelock import FileLock
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


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """All that the project knows of a data set; a new one is one more row of `DATASETS`."""

    title: str  # in tables and figures
    splits: Callable[[Path], tuple[Split, Split]]  # data folder -> all training images, test images
    images: int | None = None  # that an epoch trains on
    classes: tuple[str, ...] = ()  # names of the labels, in their order
    domains: tuple[str, ...] = ()  # names of `Split.domains_N`, in their order
    published: tuple[str, ...] = ()  # the entries of `PUBLISHED` whose files it reads
    about: str = ""  # what it is, where its title does not say that


@dataclass(frozen=True)
class Dataset:
    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int


def data_dir(root: str | Path | None = None) -> Path:
    """The data folder: `root` if given, else `$MOE_DATA_DIR`, else `data/` in the project."""
    return Path(root).expanduser().resolve() if root else folder_of("MOE_DATA_DIR", "data")


def folder_of(variable: str, default: str) -> Path:
    """The folder that an environment variable names, else the default.

    A relative one is below the project, so that it is the same from every working folder.
    """
    return (ROOT / Path(os.environ.get(variable) or default).expanduser()).resolve()


def pixels(images_NCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """Intensities in [0, 1]; nothing else is done to an image here (no augmentation, no whitening)."""
    return images_NCHW.to(dtype) / 255


def load(
    name: str, root: str | Path | None = None, device: str | torch.device = "cpu", seed: int = 0
) -> Dataset:
    """Load a data set whole, with a 90/10 train/validation split drawn from `seed`.

    Args:
        name: "digits" (scikit-learn's, embedded), "mnist", "fashion_mnist", "cifar10", "cifar100", "domains"
            (three of them under one set of labels), "shifted_domains" (each of their images shifted at random
            around its edges) or "digit_domains" (the digits in three forms).
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
    return DATASETS[name].splits(root)


DOMAINS = ("mnist", "fashion_mnist", "cifar10")
DOMAIN_IMAGES = 15_000  # of each, for training and validation


def _both(part: Callable[[Path, bool], Split]) -> Callable[[Path], tuple[Split, Split]]:
    """Training and test images, of a function that gives the first where its second argument is True."""
    return lambda root: (part(root, True), part(root, False))


def _domains(root: Path, train: bool) -> Split:
    """MNIST, FashionMNIST and CIFAR-10 (grey, its middle 28 x 28 pixels) under the same ten labels, so that
    one label means three things."""
    parts, count = [], DOMAIN_IMAGES if train else None
    for name in DOMAINS:
        images_NCHW, labels_N = _published(name, root, train)
        if images_NCHW.shape[1] == 3:  # luma of ITU-R BT.601, as in Pillow's mode "L"
            weights_C = torch.tensor([0.299, 0.587, 0.114])
            grey_NHW = (images_NCHW[:, :, 2:-2, 2:-2] * weights_C[:, None, None]).sum(1)
            images_NCHW = grey_NHW.round().to(torch.uint8)[:, None]
        parts.append((images_NCHW[:count], labels_N[:count]))
    return _interleaved(parts)


def _shifted(split: Split) -> Split:
    """Every image shifted around its edges by a random number of rows and columns, the same in every run: no
    position means anything."""
    count, _, height, width = split.images_NCHW.shape
    draw = torch.Generator().manual_seed(count)
    rows_NH, columns_NW = (
        (torch.arange(side) + torch.randint(side, (count, 1), generator=draw)) % side
        for side in (height, width)
    )
    at = torch.arange(count)[:, None, None], slice(None), rows_NH[:, :, None], columns_NW[:, None, :]
    return replace(split, images_NCHW=split.images_NCHW[at].permute(0, 3, 1, 2).contiguous())


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


def _digits(train: bool) -> tuple[Tensor, Tensor]:
    """The 1,797 8x8 digits, their 17 grey levels spread over 0..255; every fifth of a class is test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=0
    )
    chosen = rest if train else test
    return images[chosen], labels[chosen]


@dataclass(frozen=True)
class Files:
    """Files of a published set in torchvision's layout."""

    folder: str
    train: dict[str, str]  # file name -> SHA-256, in the order in which they are read
    test: dict[str, str]
    download: str  # class in torchvision.datasets
    download_mb: int
    unpacked_mb: int


@functools.lru_cache(maxsize=64)
def _is_published(path: Path, expected: str, size: int, changed_ns: int) -> bool:
    """Whether a file has this SHA-256; asked once per process of a file that does not change."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == expected


def _published(name: str, root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images and labels of a published set; missing files are downloaded.

    Raises:
        DataError: files are missing and cannot be fetched, or are not the published ones.
    """
    info = PUBLISHED[name]
    files = info.train if train else info.test
    paths = [root / info.folder / file for file in files]
    if not all(path.exists() for path in paths):
        fetch(name, root)
    for path, expected in zip(paths, files.values(), strict=True):
        try:
            found = path.stat()
            known = S_ISREG(found.st_mode) and _is_published(path, expected, found.st_size, found.st_mtime_ns)
        except OSError as error:
            raise DataError(
                f"data set {name!r}: {path} cannot be read ({error.strerror}). {REMEDY}"
            ) from error
        if not known:
            raise DataError(
                f"data set {name!r}: {path} is damaged: it is not the published file (SHA-256 {expected}). "
                "Delete it, then `make data` fetches it again, or put the original there."
            )
    return (_idx if "mnist" in name else _pickled)(paths)


def _idx(paths: list[Path]) -> tuple[Tensor, Tensor]:
    """Two files of MNIST's format: magic number and sizes as big-endian 32-bit integers, then the bytes."""
    images, labels = (path.read_bytes() for path in paths)
    count, height, width = np.frombuffer(images, ">i4", 3, offset=4).tolist()
    images_NCHW = torch.frombuffer(bytearray(images[16:]), dtype=torch.uint8).view(count, 1, height, width)
    return images_NCHW, torch.frombuffer(bytearray(labels[8:]), dtype=torch.uint8).long()


def _pickled(paths: list[Path]) -> tuple[Tensor, Tensor]:
    """CIFAR's batches. Only files of a known SHA-256 come here, so that unpickling is safe."""
    batches = [pickle.loads(path.read_bytes(), encoding="latin1") for path in paths]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = [label for batch in batches for label in batch.get("labels", batch.get("fine_labels"))]
    return torch.from_numpy(images), torch.tensor(labels)


def fetch(name: str, root: str | Path | None = None) -> None:
    """Download what is missing of a data set; one process at a time, the others wait.

    Raises:
        DataError: it cannot be fetched.
    """
    root = data_dir(root)
    for part in DATASETS[name].published:
        if present(part, root):
            continue
        from torchvision import datasets

        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none: without an answer it would wait forever
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{part}.lock"):
                getattr(datasets, PUBLISHED[part].download)(str(root), download=True)
        except Exception as error:
            raise DataError(
                f"data set {part!r} is missing or damaged under {root} and could not be fetched "
                f"({type(error).__name__}: {' '.join(str(error).split())}). {REMEDY}"
            ) from error
        finally:
            socket.setdefaulttimeout(before)


def _unknown(name: str) -> str:
    return f"unknown data set {name!r}; known: {', '.join(DATASETS)}"


def present(name: str, root: str | Path | None = None) -> bool:
    """Whether a data set's files seem to be there already (they are checked when loaded)."""
    if name not in DATASETS:
        raise DataError(_unknown(name))
    return all(
        (data_dir(root) / files.folder / file).exists()
        for files in (PUBLISHED[part] for part in DATASETS[name].published)
        for file in (files.train | files.test)
    )


TIMEOUT = 10  # seconds without an answer from a server
REMEDY = (
    "With a network run `make data`; without one put torchvision's files there, or point MOE_DATA_DIR at a "
    "folder that has them; if files are damaged, delete them first."
)
PUBLISHED: dict[str, Files] = {
    "mnist": Files(
        "MNIST/raw",
        {
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        },
        {
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        "MNIST",
        download_mb=12,
        unpacked_mb=66,
    ),
    "fashion_mnist": Files(
        "FashionMNIST/raw",
        {
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        },
        {
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        "FashionMNIST",
        download_mb=31,
        unpacked_mb=85,
    ),
    "cifar10": Files(
        "cifar-10-batches-py",
        {
            "data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
            "data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
            "data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
            "data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
            "data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
        },
        {"test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831"},
        "CIFAR10",
        download_mb=170,
        unpacked_mb=350,
    ),
    "cifar100": Files(
        "cifar-100-python",
        {"train": "735e79b04f092ca3d2e6d07f368c0a7d70d48c48d28865950cc24454cf45129b"},
        {"test": "4b67687d9933c4db8f0831104447f15b93774f4f464bd0516f0f0f2ac83b7864"},
        "CIFAR100",
        download_mb=169,
        unpacked_mb=340,
    ),
}  # fmt: skip


def _published_info(name: str, title: str, images: int, classes: tuple[str, ...] = ()) -> DatasetInfo:
    splits = _both(lambda root, train: Split(*_published(name, root, train)))
    return DatasetInfo(title=title, splits=splits, images=images, classes=classes, published=(name,))


_THREE: dict[str, Any] = {
    "images": 3 * DOMAIN_IMAGES * 9 // 10,
    "domains": ("MNIST", "FashionMNIST", "CIFAR-10, grey"),
    "published": DOMAINS,
}


FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo(title="Digits (8×8)", splits=_both(lambda root, train: Split(*_digits(train)))),
    "digit_domains": DatasetInfo(
        title="Digits, three forms",
        splits=_both(lambda root, train: _digit_domains(*_digits(train))),
        domains=("upright", "turned", "inverted"),
    ),
    "domains": DatasetInfo(
        title="Three domains",
        splits=_both(_domains),
        **_THREE,
        about="MNIST, FashionMNIST and CIFAR-10 in grey, all 28 x 28, under the same ten labels",
    ),
    "shifted_domains": DatasetInfo(
        title="Three shifted domains",
        splits=_both(lambda root, train: _shifted(_domains(root, train))),
        **_THREE,
        about="Three domains, each image shifted around its edges at random: no position means anything",
    ),
    "mnist": _published_info("mnist", "MNIST", 54_000),
    "fashion_mnist": _published_info("fashion_mnist", "FashionMNIST", 54_000, FASHION),
    "cifar10": _published_info("cifar10", "CIFAR-10", 45_000, CIFAR10),
    "cifar100": _published_info("cifar100", "CIFAR-100", 45_000),
}
