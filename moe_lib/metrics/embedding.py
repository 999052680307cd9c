"""Measures of an embedding: do neighbours share their class, and are they neighbours among the pixels?

Shapes: M training samples, N test samples, D width, P pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from moe_lib.checks import check_floating, check_labels


class EmbeddingQuality(NamedTuple):
    knn_accuracy: float  # 10 nearest training codes, Euclidean, majority vote
    silhouette: float  # of the classes, Euclidean
    trustworthiness: float  # of the codes' 10-neighbourhoods against those of the pixels


def embedding_quality(
    train_codes_MD: Tensor,
    train_labels_M: Tensor,
    codes_ND: Tensor,
    labels_N: Tensor,
    pixels_NP: Tensor,
) -> EmbeddingQuality:
    from sklearn.manifold import trustworthiness
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import KNeighborsClassifier

    def numpy(x: Tensor) -> np.ndarray:
        return x.detach().cpu().double().numpy()

    check_floating(train_codes_MD, "train_codes", "M, D")
    check_floating(codes_ND, "codes", "N, D")
    check_floating(pixels_NP, "pixels", "N, P")
    train_labels_M = check_labels(train_labels_M, len(train_codes_MD), name="train_labels")
    labels_N = check_labels(labels_N, len(codes_ND))
    if codes_ND.shape[1] != train_codes_MD.shape[1] or not codes_ND.shape[1]:
        raise ValueError(f"codes must be as wide as train_codes, got {codes_ND.shape[1]}")
    if len(train_codes_MD) < 10 or len(codes_ND) < 21:
        raise ValueError(
            "train_codes needs 10 rows and codes 21, for 10 neighbours each, "
            f"got {len(train_codes_MD)} and {len(codes_ND)}"
        )
    if len(pixels_NP) != len(codes_ND):
        raise ValueError(f"pixels must have as many rows as codes, {len(codes_ND)}, got {len(pixels_NP)}")
    if not 2 <= len(labels_N.unique()) < len(labels_N):
        raise ValueError("labels must name at least 2 classes, one of them twice, for a silhouette")
    codes = numpy(codes_ND)
    knn = KNeighborsClassifier(10, algorithm="brute").fit(numpy(train_codes_MD), train_labels_M.cpu())
    return EmbeddingQuality(
        float(knn.score(codes, labels_N.cpu().numpy())),
        float(silhouette_score(codes, labels_N.cpu().numpy())),
        float(trustworthiness(numpy(pixels_NP), codes, n_neighbors=10)),
    )
