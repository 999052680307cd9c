"""Data sets: images, texts, and planted data whose truth is known."""

from moe_study.data.datasets import (
    DATASETS,
    PUBLISHED,
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
    "PUBLISHED",
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
