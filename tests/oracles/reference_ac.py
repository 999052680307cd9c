"""Plain forms of the Adaptive Clustering router: loops over float64 numbers, never optimised.

Arguments are anything numpy can read (CPU tensors included); results are Python floats or numpy arrays.

Shapes: N tokens, D width, E experts (and clusters).
"""

import math

import numpy as np
from reference import array, log_sum_exp


def dispersions(tokens_ND, assignment_N, num_experts, dispersion="mad"):
    """Of each cluster with at least 2 tokens, by its number: a list of D values."""
    tokens_ND, assignment_N = array(tokens_ND), array(assignment_N)
    found = {}
    for k in range(num_experts):
        members = [n for n in range(len(tokens_ND)) if assignment_N[n] == k]
        if len(members) < 2:
            continue
        found[k] = []
        for q in range(tokens_ND.shape[1]):
            mean = math.fsum(tokens_ND[n, q] for n in members) / len(members)
            away = [abs(tokens_ND[n, q] - mean) for n in members]
            if dispersion == "variance":
                away = [a**2 for a in away]
            found[k].append(math.fsum(away) / len(members))
    return found


def adaptive_scales(
    tokens_ND, assignment_N, num_experts, dispersion="mad", eps=1e-4, normalize="feature", max_ratio=10.0
):
    """[E, D]: 1 / (dispersion + eps), limited, and divided by a mean; entry by entry."""
    num_features = array(tokens_ND).shape[1]
    found = dispersions(tokens_ND, assignment_N, num_experts, dispersion)
    weight = {k: [1 / (s + eps) for s in row] for k, row in found.items()}
    entries = [w for row in weight.values() for w in row]
    overall = math.fsum(entries) / len(entries) if entries else 1.0
    if max_ratio is not None:
        weight = {k: [min(w, max_ratio * overall) for w in row] for k, row in weight.items()}
    scales_ED = np.full((num_experts, num_features), overall if normalize == "none" else 1.0)
    for k, row in weight.items():
        for q in range(num_features):
            divisor = {
                "feature": math.fsum(weight[j][q] for j in weight) / len(weight),
                "row": math.fsum(row) / num_features,
                "global": overall,
                "none": 1.0,
            }[normalize]
            scales_ED[k, q] = row[q] / divisor
    return scales_ED


def language_form(tokens_ND, assignment_N, num_experts):
    """The authors' language models: 1 / (MAD + 1e-4), at most 10 x its mean, divided by the clusters' mean.

    Defined here where every cluster has 2 tokens.
    """
    found = dispersions(tokens_ND, assignment_N, num_experts)
    weight_ED = 1 / (np.array([found[k] for k in range(num_experts)]) + 1e-4)
    weight_ED = np.minimum(weight_ED, 10 * weight_ED.mean())
    return weight_ED / weight_ED.mean(0)


def swin_form(tokens_ND, assignment_N, num_experts):
    """The authors' Swin models: at most 1.5 x the mean, divided by that mean."""
    found = dispersions(tokens_ND, assignment_N, num_experts)
    weight_ED = 1 / (np.array([found[k] for k in range(num_experts)]) + 1e-4)
    return np.minimum(weight_ED, 1.5 * weight_ED.mean()) / weight_ED.mean()


def scores(tokens_ND, embeddings_ED, assignment_N=None, scales_ED=None):
    """[N, E]: h^T M_k e with unit-norm e, feature by feature; M = I without scales."""
    tokens_ND, embeddings_ED = array(tokens_ND), array(embeddings_ED)
    scores_NE = np.zeros((len(tokens_ND), len(embeddings_ED)))
    for n, token_D in enumerate(tokens_ND):
        for e, embedding_D in enumerate(embeddings_ED):
            norm = math.sqrt(math.fsum(embedding_D**2))
            for q in range(len(token_D)):
                scale = 1.0 if scales_ED is None else scales_ED[int(assignment_N[n])][q]
                scores_NE[n, e] += token_D[q] * scale * embedding_D[q] / norm
    return scores_NE


def router_z_loss(logits_NE):
    logits_NE = array(logits_NE)
    return math.fsum(log_sum_exp([float(z) for z in row]) ** 2 for row in logits_NE) / len(logits_NE)
