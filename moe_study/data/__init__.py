"""Data sets: images, texts, and planted data whose truth is known."""

from moe_study.data.datasets import (
    DATASETS,
    ROOT,
    DataError,
    Dataset,
    DatasetInfo,
    Split,
    data_dir,
    fetch,
    load,
    pixels,
    present,
)

__all__ = [
    "DATASETS",
    "ROOT",
    "DataError",
    "Dataset",
    "DatasetInfo",
    "Split",
    "data_dir",
    "fetch",
    "load",
    "pixels",
    "present",
]
