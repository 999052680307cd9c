"""Loading data sets: what is promised about the splits, and what is said when files are missing or damaged.

Nothing here touches a network: whatever torchvision would download raises.
"""

import gzip
import hashlib
import itertools
import os
import pickle
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import cifar, mnist

from moe_study.data import ROOT, DataError, Split, data_dir, datasets, load, pixels

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


# ---------------------------------------------------------------------------- where the files are


def test_the_data_folder_is_the_argument_or_the_variable_or_the_projects(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_DATA_DIR", str(tmp_path / "variable"))
    assert data_dir(tmp_path / "argument") == (tmp_path / "argument").resolve()
    assert data_dir() == (tmp_path / "variable").resolve()
    monkeypatch.delenv("MOE_DATA_DIR")
    assert data_dir() == ROOT / "data"
    assert data_dir("~/images") == (Path.home() / "images").resolve()


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["imagenet", "", "MNIST"])
def test_an_unknown_name_is_answered_with_the_known_ones(name):
    with pytest.raises(DataError, match=f"{name!r}.*{', '.join(datasets.DATASETS)}"):
        load(name)


@pytest.mark.parametrize("name", TRAINING_FILES)
def test_missing_files_without_a_network(name, tmp_path):
    with pytest.raises(DataError) as caught:
        load(name, root=tmp_path)
    message = str(caught.value)
    for wanted in (name, str(tmp_path), "MOE_DATA_DIR", "make data", "no network in tests"):
        assert wanted in message


def idx(shape, payload):
    """A file in MNIST's format: 0, 0, type 8 (uint8), number of dimensions, sizes, values."""
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + payload


class FakeFashion:
    """Four files in torchvision's layout, small ones that `datasets` is told to take for the published."""

    num_train, num_test = 40, 10_000

    def __init__(self, root, monkeypatch):
        self.folder, self.monkeypatch = root / "FashionMNIST" / "raw", monkeypatch
        self.folder.mkdir(parents=True)
        self.content = {}
        for prefix, n in (("train", self.num_train), ("t10k", self.num_test)):
            pixels_of = (np.arange(784 * n) // 10 % 256).astype(np.uint8).tobytes()
            self.content[f"{prefix}-images-idx3-ubyte"] = idx((n, 28, 28), pixels_of)
            self.content[f"{prefix}-labels-idx1-ubyte"] = idx((n,), bytes(i % 10 for i in range(n)))
        self.publish()

    def publish(self):
        """Write the files, and their SHA-256 into the table."""
        found = {name: hashlib.sha256(content).hexdigest() for name, content in self.content.items()}
        info = replace(
            datasets.PUBLISHED["fashion_mnist"],
            train={k: v for k, v in found.items() if k.startswith("train")},
            test={k: v for k, v in found.items() if k.startswith("t10k")},
        )
        self.monkeypatch.setitem(datasets.PUBLISHED, "fashion_mnist", info)
        for name, content in self.content.items():
            (self.folder / name).write_bytes(content)
        datasets._splits.cache_clear()


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    return FakeFashion(tmp_path, monkeypatch)


def test_files_in_torchvisions_layout_are_read(fashion, tmp_path):
    """Pixel for pixel what torchvision reads."""
    dataset = load("fashion_mnist", root=tmp_path, seed=1)
    sizes = [len(part) for part in (dataset.train, dataset.validation, dataset.test)]
    assert sizes == [36, 4, 10_000]
    assert dataset.train.images_NCHW.shape == (36, 1, 28, 28)
    assert dataset.train.images_NCHW.dtype == torch.uint8
    assert dataset.train.labels_N.dtype == torch.int64
    assert dataset.num_classes == 10
    peer = mnist.FashionMNIST(str(tmp_path), train=True)
    together = split_rows(dataset.train) + split_rows(dataset.validation)
    assert sorted(together) == sorted(split_rows(Split(peer.data[:, None], peer.targets)))
    peer = mnist.FashionMNIST(str(tmp_path), train=False)
    assert torch.equal(dataset.test.images_NCHW, peer.data[:, None])
    assert torch.equal(dataset.test.labels_N, peer.targets)


def flipped(content):
    """One bit of the last image."""
    return content[:-1] + bytes([content[-1] ^ 1])


DAMAGE = {
    "flipped bit": flipped,
    "cut in half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a page": lambda content: b"<html>moved</html>",
    "still packed": lambda content: gzip.compress(content[:1000]),
    "noise behind a right header": lambda content: content[:16] + bytes(len(content) - 16),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_file_is_named_with_the_remedy(name, damage, fashion, tmp_path):
    (fashion.folder / name).write_bytes(DAMAGE[damage](fashion.content[name]))
    with pytest.raises(DataError, match=r"is damaged.*SHA-256.*[Dd]elete it.*make data") as caught:
        load("fashion_mnist", root=tmp_path)
    assert str(fashion.folder / name) in str(caught.value)
    (fashion.folder / name).write_bytes(fashion.content[name])
    load("fashion_mnist", root=tmp_path)  # the remedy works in the same process


def test_files_of_cifar_are_read_as_torchvision_does(tmp_path, monkeypatch):
    """The five batches in order, planes of colour first."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    info, digests = datasets.PUBLISHED["cifar10"], {}
    for i, name in enumerate((*info.train, *info.test)):
        n = 10_000 if name == "test_batch" else 4
        values = np.random.default_rng(i).integers(0, 256, (n, 3072), dtype=np.uint8)
        content = pickle.dumps({"data": values, "labels": [(j + 6 * (i % 2)) % 10 for j in range(n)]})
        (folder / name).write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    info = replace(
        info,
        train={name: digests[name] for name in info.train},
        test={name: digests[name] for name in info.test},
    )
    monkeypatch.setitem(datasets.PUBLISHED, "cifar10", info)
    monkeypatch.setattr(cifar, "check_integrity", lambda *arguments: True)
    monkeypatch.setattr(cifar.CIFAR10, "_load_meta", lambda self: None)
    for train in (True, False):
        images_NCHW, labels_N = datasets._published("cifar10", tmp_path, train)
        peer = cifar.CIFAR10(str(tmp_path), train=train)
        assert torch.equal(images_NCHW, torch.from_numpy(peer.data).permute(0, 3, 1, 2))
        assert labels_N.tolist() == peer.targets


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


# ----------------------------------------------------------------------------------------- domains


def test_the_digits_in_three_forms_share_ten_labels():
    """Upright, turned, inverted, one after the other; in each, another label for the same digit."""
    dataset = load("digit_domains")
    plain = load("digits")
    assert dataset.num_classes == 10
    assert len(dataset.test) == 3 * len(plain.test)
    for n in (0, 1, 2, 100):
        image_HW = plain.test.images_NCHW[n, 0]
        forms = [dataset.test.images_NCHW[3 * n + domain, 0] for domain in range(3)]
        assert torch.equal(forms[0], image_HW)
        turned = [[int(image_HW[j, 7 - i]) for j in range(8)] for i in range(8)]
        assert forms[1].tolist() == turned
        assert forms[2].tolist() == (255 - image_HW).tolist()
        label = int(plain.test.labels_N[n])
        own = dataset.test.labels_N[3 * n : 3 * n + 3].tolist()
        assert own == [label, (label + 3) % 10, (label + 7) % 10]
    assert dataset.test.domains_N.tolist() == [0, 1, 2] * len(plain.test)


def test_domains_stay_with_their_images_through_the_split():
    """An inverted image is bright; each is marked as such in every part."""
    dataset = load("digit_domains", seed=3)
    for part in (dataset.train, dataset.validation, dataset.test):
        bright_N = part.images_NCHW.double().mean((1, 2, 3)) > 128
        assert torch.equal(bright_N, part.domains_N == 2)
        few = part.take(slice(5, 9))
        assert torch.equal(few.domains_N, part.domains_N[5:9])
    assert abs((dataset.validation.domains_N == 1).double().mean().item() - 1 / 3) < 0.05


def test_three_sets_under_one_label_space(monkeypatch, tmp_path):
    """The first so many of each, in turn; CIFAR-10 cropped to its middle and weighed to grey."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
    stored = {
        name: (
            torch.randint(256, (6, *shape), generator=draw, dtype=torch.uint8),
            torch.randint(10, (6,), generator=draw),
        )
        for name, shape in shapes.items()
    }
    monkeypatch.setattr(datasets, "_published", lambda name, root, train: stored[name])
    monkeypatch.setattr(datasets, "DOMAIN_IMAGES", 4)
    found = datasets._domains(tmp_path, True)
    assert found.images_NCHW.shape == (12, 1, 28, 28)
    assert found.domains_N.tolist() == [0, 1, 2] * 4
    for n in range(4):
        for domain, name in enumerate(("mnist", "fashion_mnist")):
            assert torch.equal(found.images_NCHW[3 * n + domain], stored[name][0][n])
            assert found.labels_N[3 * n + domain] == stored[name][1][n]
        image_CHW = stored["cifar10"][0][n]
        for i, j in ((0, 0), (13, 5), (27, 27)):
            red, green, blue = (int(value) for value in image_CHW[:, i + 2, j + 2])
            expected = 0.299 * red + 0.587 * green + 0.114 * blue
            assert abs(int(found.images_NCHW[3 * n + 2, 0, i, j]) - expected) <= 0.5001
        assert found.labels_N[3 * n + 2] == stored["cifar10"][1][n]
    assert len(datasets._domains(tmp_path, False)) == 18


def test_shifted_images_are_those_of_the_domains_turned_around_their_edges(monkeypatch, tmp_path):
    """By np.roll; the shifts are the same in each call, others for each image, and spread evenly."""
    images_NCHW = torch.arange(600 * 12).reshape(600, 1, 3, 4)
    split = datasets.Split(images_NCHW, torch.arange(600), torch.arange(600) % 3)
    monkeypatch.setattr(datasets, "_domains", lambda root, train: split if train else split.take(slice(4)))
    shifted = datasets.DATASETS["shifted_domains"].splits
    train, test = shifted(tmp_path)
    assert torch.equal(train.images_NCHW, shifted(tmp_path)[0].images_NCHW)
    assert torch.equal(train.labels_N, split.labels_N)
    assert torch.equal(train.domains_N, split.domains_N)
    assert len(test) == 4
    found = Counter()
    for before, after in zip(images_NCHW.numpy(), train.images_NCHW.numpy(), strict=True):
        shifts = [
            s for s in itertools.product(range(3), range(4)) if (np.roll(before, s, (1, 2)) == after).all()
        ]
        assert len(shifts) == 1
        found.update(shifts)
    assert len(found) == 12
    assert max(found.values()) < 2 * 600 / 12


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


def test_a_data_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="file"):
        load("mnist", root=tmp_path / "file")


def test_a_pipe_in_place_of_a_file(fashion, tmp_path):
    path = fashion.folder / "train-images-idx3-ubyte"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="damaged"):
        load("fashion_mnist", root=tmp_path)


def test_a_files_hash_is_computed_once(fashion, tmp_path, monkeypatch):
    load("fashion_mnist", root=tmp_path)
    datasets._splits.cache_clear()
    monkeypatch.setattr(hashlib, "file_digest", None)  # a second look would call it
    load("fashion_mnist", root=tmp_path)


def test_a_relative_data_folder_is_below_the_project(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_DATA_DIR", "build/../data")
    for folder in (ROOT, ROOT / "notebooks", tmp_path):
        monkeypatch.chdir(folder)
        assert data_dir() == ROOT / "data"
