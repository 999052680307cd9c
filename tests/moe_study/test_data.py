"""Loading data sets: what is promised about the splits, and what is said when files are missing or damaged.

Nothing here touches a network: whatever torchvision would download raises.
"""

import gzip
import os
import struct
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torchvision.datasets import cifar, mnist

from moe_study.data import ROOT, DataError, Split, data_dir, load, pixels

TRAINING_FILES = {  # one of each data set, in torchvision's layout
    "mnist": "MNIST/raw/train-images-idx3-ubyte",
    "fashion_mnist": "FashionMNIST/raw/train-images-idx3-ubyte",
    "cifar10": "cifar-10-batches-py/data_batch_1",
    "cifar100": "cifar-100-python/train",
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network in tests")

    for module in (mnist, cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", refuse)


def split_rows(split):
    """One bytes object per sample, image and label together."""
    return [
        image.numpy().tobytes() + bytes([int(label)])
        for image, label in zip(split.images_NCHW, split.labels_N, strict=True)
    ]


# ----------------------------------------------------------------------------------------- digits


def test_digits_shapes_and_types():
    digits = load("digits")
    assert digits.name == "digits"
    assert digits.num_classes == 10
    assert [len(part) for part in (digits.train, digits.validation, digits.test)] == [1294, 143, 360]
    for part in (digits.train, digits.validation, digits.test):
        assert part.images_NCHW.shape == (len(part), 1, 8, 8)
        assert part.images_NCHW.dtype == torch.uint8
        assert part.labels_N.dtype == torch.int64
        assert set(part.labels_N.tolist()) == set(range(10))


def test_digits_use_the_whole_range_of_grey_in_17_levels():
    digits = load("digits")
    levels = torch.cat([part.images_NCHW.flatten() for part in (digits.train, digits.test)]).unique()
    assert levels.tolist() == [round(level * 255 / 16) for level in range(17)]


def test_digits_splits_are_disjoint_and_complete():
    from sklearn.datasets import load_digits

    digits = load("digits", seed=3)
    together = [row for part in (digits.train, digits.validation, digits.test) for row in split_rows(part)]
    raw = load_digits()
    images = (torch.from_numpy(raw.images) * 255 / 16).round().byte()
    expected = split_rows(Split(images[:, None], torch.from_numpy(raw.target)))
    assert sorted(together) == sorted(expected)  # each of the 1,797 once
    assert len(together) == 1797


def test_validation_depends_on_the_seed_and_test_does_not():
    first, again, other = load("digits", seed=0), load("digits", seed=0), load("digits", seed=1)
    assert split_rows(first.train) == split_rows(again.train)
    assert split_rows(first.validation) == split_rows(again.validation)
    assert split_rows(first.validation) != split_rows(other.validation)
    assert split_rows(first.test) == split_rows(other.test)
    rest = sorted(split_rows(first.train) + split_rows(first.validation))
    assert rest == sorted(split_rows(other.train) + split_rows(other.validation))


def test_loading_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load("digits", seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_test_set_has_every_class_in_proportion():
    counts_C = load("digits").test.labels_N.bincount()
    assert counts_C.min() >= 34
    assert counts_C.max() <= 38


def test_pixels_are_intensities_from_zero_to_one():
    images = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(pixels(images, dtype), torch.tensor([[0, 0.2, 1]], dtype=dtype))


def test_take_keeps_images_and_labels_together():
    part = load("digits").test
    index = torch.tensor([7, 0, 3])
    assert split_rows(part.take(index)) == [split_rows(part)[i] for i in (7, 0, 3)]
    assert len(part.take(slice(5))) == 5


# ---------------------------------------------------------------------------- where the files are


def test_the_data_folder_is_the_argument_or_the_variable_or_the_projects(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_DATA_DIR", str(tmp_path / "variable"))
    assert data_dir(tmp_path / "argument") == (tmp_path / "argument").resolve()
    assert data_dir() == (tmp_path / "variable").resolve()
    monkeypatch.delenv("MOE_DATA_DIR")
    assert data_dir() == ROOT / "data"
    assert data_dir("~/images") == (Path.home() / "images").resolve()


def test_the_variable_is_used_by_load(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_DATA_DIR", str(tmp_path / "here"))
    with pytest.raises(DataError, match="here"):
        load("mnist")


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["imagenet", "", "MNIST"])
def test_an_unknown_name_is_answered_with_the_known_ones(name):
    with pytest.raises(DataError, match=f"{name!r}.*digits, mnist, fashion_mnist, cifar10, cifar100"):
        load(name)


@pytest.mark.parametrize("name", TRAINING_FILES)
def test_missing_files_without_a_network(name, tmp_path):
    with pytest.raises(DataError) as caught:
        load(name, root=tmp_path)
    message = str(caught.value)
    for wanted in (name, str(tmp_path), "MOE_DATA_DIR", "make data", "no network in tests"):
        assert wanted in message


def test_a_data_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="file"):
        load("mnist", root=tmp_path / "file")


def idx(shape, payload):
    """A file in MNIST's format: 0, 0, type 8 (uint8), number of dimensions, sizes, values."""
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + payload


def write_fashion_mnist(root, shorten=(), cut=None):
    """Two valid training files and two valid test files of black images, as torchvision leaves them.

    Args:
        shorten: prefixes of files ("train", "t10k") that get 10 samples.
        cut: name of a file to cut in the middle.
    """
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, full in (("train", 60_000), ("t10k", 10_000)):
        n = 10 if prefix in shorten else full
        labels = bytes(i % 10 for i in range(n))
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx((n, 2, 2), bytes(4 * n)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx((n,), labels))
    if cut is not None:
        content = (folder / cut).read_bytes()
        (folder / cut).write_bytes(content[: len(content) // 2])


def test_files_in_torchvisions_layout_are_read(tmp_path):
    write_fashion_mnist(tmp_path)
    dataset = load("fashion_mnist", root=tmp_path, seed=1)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [
        54_000,
        6_000,
        10_000,
    ]
    assert dataset.train.images_NCHW.shape == (54_000, 1, 2, 2)
    assert dataset.train.images_NCHW.dtype == torch.uint8
    assert dataset.train.labels_N.dtype == torch.int64
    together = torch.cat([dataset.train.labels_N, dataset.validation.labels_N])
    assert together.bincount().tolist() == [6_000] * 10
    assert dataset.num_classes == 10


@pytest.mark.parametrize(
    "cut",
    [
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ],
)
def test_a_truncated_file(cut, tmp_path):
    write_fashion_mnist(tmp_path, cut=cut)
    with pytest.raises(DataError) as caught:
        load("fashion_mnist", root=tmp_path)
    for wanted in ("fashion_mnist", "damaged", "delete", str(tmp_path)):
        assert wanted in str(caught.value)


def test_an_empty_file_and_a_file_of_another_kind(tmp_path):
    write_fashion_mnist(tmp_path)
    path = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    for content in (b"", b"<html>moved</html>", gzip.compress(b"still packed")):
        path.write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            load("fashion_mnist", root=tmp_path)


@pytest.mark.parametrize(("prefix", "full"), [("train", "60000"), ("t10k", "10000")])
def test_a_wellformed_file_with_too_few_samples(prefix, full, tmp_path):
    write_fashion_mnist(tmp_path, shorten=(prefix,))
    with pytest.raises(DataError, match=f"10 images and 10 labels instead of {full}"):
        load("fashion_mnist", root=tmp_path)


def test_images_and_labels_of_different_numbers(tmp_path):
    write_fashion_mnist(tmp_path)
    folder = tmp_path / "FashionMNIST" / "raw"
    (folder / "train-images-idx3-ubyte").write_bytes(idx((10, 2, 2), bytes(40)))
    with pytest.raises(DataError, match="10 images and 60000 labels"):
        load("fashion_mnist", root=tmp_path)


# ------------------------------------------------------------------------------------- real files


@pytest.mark.parametrize(
    ("name", "shape", "num_train", "num_classes"),
    [
        ("mnist", (1, 28, 28), 60_000, 10),
        ("fashion_mnist", (1, 28, 28), 60_000, 10),
        ("cifar10", (3, 32, 32), 50_000, 10),
        ("cifar100", (3, 32, 32), 50_000, 100),
    ],
)
def test_real_data_sets(name, shape, num_train, num_classes):
    root = os.environ.get("MOE_DATA_DIR")
    if not root or not (Path(root) / TRAINING_FILES[name]).is_file():
        pytest.skip(f"MOE_DATA_DIR holds no {name}")
    dataset = load(name)
    assert len(dataset.train) == num_train * 9 // 10
    assert len(dataset.validation) == num_train // 10
    assert len(dataset.test) == 10_000
    assert dataset.num_classes == num_classes
    for part in (dataset.train, dataset.validation, dataset.test):
        assert part.images_NCHW.shape == (len(part), *shape)
        assert part.images_NCHW.dtype == torch.uint8
        assert part.labels_N.unique().tolist() == list(range(num_classes))
    assert dataset.test.labels_N.bincount().tolist() in (
        [10_000 // num_classes] * num_classes,
        MNIST_TEST_COUNTS,
    )


MNIST_TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
