"""Measures of how alike experts are, in their weights and in their answers.

Everything is computed in float64, and has a loop-written oracle in tests/.

Shapes: N samples, E experts, C classes, P parameters or features of one expert, H hidden units, O outputs,
A, B features of two representations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moe_lib.checks import check_count, check_floating
from moe_lib.moe import Experts


def pairwise_similarity(vectors_EP: Tensor, absolute: bool = False) -> float:
    """Mean cosine over all E (E - 1) / 2 pairs of rows; with `absolute`, mean |cosine|.

    NaN for fewer than two rows. A row of zeros has cosine 0 with everything.
    """
    check_floating(vectors_EP, "vectors", "E, P")
    if not vectors_EP.shape[1]:
        raise ValueError(f"vectors must have at least one column, got {list(vectors_EP.shape)}")
    num_vectors = len(vectors_EP)
    if num_vectors < 2:
        return math.nan
    unit_EP = _unit_rows(vectors_EP.double())
    cosine_EE = unit_EP @ unit_EP.T
    above = cosine_EE[tuple(torch.triu_indices(num_vectors, num_vectors, 1))]
    return (above.abs() if absolute else above).mean().item()


def _unit_rows(x_EP: Tensor) -> Tensor:
    """Rows at unit length, whatever theirs is; a row of zeros stays."""
    largest_E1 = x_EP.abs().amax(1, keepdim=True)  # whose square may leave the type
    x_EP = x_EP / largest_E1.where(largest_E1 > 0, 1)
    norm_E1 = torch.linalg.vector_norm(x_EP, dim=1, keepdim=True)
    return x_EP / norm_E1.where(norm_E1 > 0, 1)


def similarity_floor(num_parameters: int) -> float:
    """Expected |cosine| of two independent isotropic vectors in P dimensions: about sqrt(2 / (pi P))."""
    check_count(num_parameters, "num_parameters")
    return math.sqrt(2 / (math.pi * num_parameters))


def aligned_similarity(experts: Experts) -> float:
    """Mean cosine of the experts' weights after matching hidden units, pair by pair.

    Hidden units permute freely, so equal functions may have orthogonal weights. For each pair the
    permutation with the largest inner product of the flattened weights is found (Hungarian method).
    """
    from scipy.optimize import linear_sum_assignment  # here: half of the library's time of import

    with torch.no_grad():
        units_EHP = torch.cat(
            [experts.w1_EDH.transpose(1, 2), experts.b1_EH[..., None], experts.w2_EHO], 2
        ).double()
        bias_EO = experts.b2_EO.double()
        norm_E = (units_EHP.square().sum((1, 2)) + bias_EO.square().sum(1)).sqrt()
        cosines = []
        for a, b in itertools.combinations(range(experts.num_experts), 2):
            inner_HH = (units_EHP[a] @ units_EHP[b].T).cpu().numpy()
            best = inner_HH[linear_sum_assignment(inner_HH, maximize=True)].sum()
            best += float(bias_EO[a] @ bias_EO[b])
            cosines.append(best / float(norm_E[a] * norm_E[b]))
    return float(np.mean(cosines)) if cosines else math.nan


def output_similarity(expert_logits_NEC: Tensor, *, usage_E: Tensor | None = None) -> float:
    """Mean cosine of the experts' logits on the same inputs, each input's logits centred over classes
    (softmax ignores a constant) and each expert's mean over inputs removed.

    Args:
        usage_E: how much each expert is used, such as its mean gate. A pair counts by the product of its two
            experts' usage: an expert that is never used is not a different one. None: all pairs alike.
    """
    logits = _expert_logits(expert_logits_NEC).double()
    logits = logits - logits.mean(2, keepdim=True)
    logits = logits - logits.mean(0, keepdim=True)
    unit_EP = _unit_rows(logits.transpose(0, 1).flatten(1))
    return _mean_of_pairs((unit_EP @ unit_EP.T).tolist(), usage_E)


def _expert_logits(expert_logits_NEC: Tensor) -> Tensor:
    check_floating(expert_logits_NEC, "expert_logits", "N, E, C")
    if not expert_logits_NEC.numel():
        raise ValueError(f"expert_logits must not be empty, got {list(expert_logits_NEC.shape)}")
    return expert_logits_NEC


def _mean_of_pairs(values_EE: Sequence[Sequence[float]], usage_E: Tensor | None) -> float:
    """Mean of a symmetric matrix over its pairs e < f, weighted by usage_e usage_f; NaN without a pair."""
    if usage_E is not None:
        check_floating(usage_E, "usage", "E")
        if len(usage_E) != len(values_EE) or (usage_E < 0).any():
            raise ValueError(
                f"usage must hold {len(values_EE)} numbers, none negative, got {usage_E.tolist()}"
            )
    usage = [1.0] * len(values_EE) if usage_E is None else usage_E.double().tolist()
    pairs = list(itertools.combinations(range(len(values_EE)), 2))
    weights = [usage[a] * usage[b] for a, b in pairs]
    if not sum(weights) > 0:
        return math.nan
    return sum(w * values_EE[a][b] for w, (a, b) in zip(weights, pairs, strict=True) if w) / sum(weights)


def linear_cka(x_NA: Tensor, y_NB: Tensor) -> float:
    """Unbiased linear centred kernel alignment of two representations of the same N samples.

    Source: Nguyen, Raghu, Kornblith, "Do Wide and Deep Networks Learn the Same Things?", ICLR 2021, with
    the unbiased HSIC of Song et al., JMLR 2012. 1 for equal representations up to rotation and
    scale, 0 in expectation for independent ones; slightly negative values occur. NaN where the HSIC of one
    with itself is 0: it is constant, only one sample differs from the rest, or all are equally far apart.
    """
    check_floating(x_NA, "x", "N, A")
    check_floating(y_NB, "y", "N, B")
    n = len(x_NA)
    if len(y_NB) != n:
        raise ValueError(f"y must have as many rows as x, {n}, got {len(y_NB)}")
    if n < 4 or not x_NA.shape[1] or not y_NB.shape[1]:
        raise ValueError(
            "x and y must have at least 4 rows (the unbiased estimate needs them) and a column, "
            f"got {list(x_NA.shape)} and {list(y_NB.shape)}"
        )

    x_NA, y_NB = (_centred(z.double()) for z in (x_NA, y_NB))

    def hsic(x_NA: Tensor, y_NB: Tensor) -> float:
        """Of the Gram matrices without their diagonals. Centred features: every row of x x^T sums to 0."""
        few = n * n < x_NA.shape[1] * y_NB.shape[1]  # |x^T y|^2 = tr(x x^T y y^T), by the cheaper product
        whole = ((x_NA @ x_NA.T) * (y_NB @ y_NB.T)).sum() if few else (x_NA.T @ y_NB).square().sum()
        x_N, y_N = x_NA.square().sum(1), y_NB.square().sum(1)  # the diagonals; minus these are the row sums
        cross = whole - x_N @ y_N + x_N.sum() * y_N.sum() / ((n - 1) * (n - 2))
        found = (cross - 2 * (x_N @ y_N) / (n - 2)).item()
        return found / (n * (n - 3)) if abs(found) > 1e-12 * float(whole + x_N @ y_N) else 0.0  # rounding

    scale = hsic(x_NA, x_NA) * hsic(y_NB, y_NB)
    return hsic(x_NA, y_NB) / math.sqrt(scale) if scale > 0 else math.nan


def _centred(z_NA: Tensor) -> Tensor:
    """Columns of mean 0, times a power of two, so that fourth powers stay in the type; rounding is noise."""
    largest = z_NA.abs().max()
    z_NA = z_NA * torch.exp2(-largest.frexp().exponent.to(z_NA.dtype))
    centred_NA = z_NA - z_NA.mean(0)
    constant_A = centred_NA.abs().amax(0) <= 2**-50 * z_NA.abs().amax(0)
    return centred_NA.masked_fill(constant_A, 0)


def expert_cka(expert_logits_NEC: Tensor, max_samples: int = 2000, *, usage_E: Tensor | None = None) -> float:
    """Mean unbiased linear CKA over all pairs of experts' logits, on the first `max_samples` samples: shuffle
    sorted ones.

    Args:
        usage_E: as in `output_similarity`.
    """
    logits = _expert_logits(expert_logits_NEC)[: check_count(max_samples, "max_samples", 4)]
    experts = range(logits.shape[1])
    values = [[linear_cka(logits[:, a], logits[:, b]) if a < b else 0.0 for b in experts] for a in experts]
    return _mean_of_pairs(values, usage_E)
