"""The soft nearest neighbor loss from the matrix of all pairs: as its formula reads, and by kernels.

`plain` is the form to read. Torch differentiates, compiles and maps it. `dense` forms value and gradient
together, all layers at once. `direct` does so for one layer where products of features lose the distance to
rounding: from differences, in float64.

The kernels work on scores -distance / temperature in units of log 2 (exp2 is the fastest exponential) and
on masses exp2(score), summed over the anchor's own class (p) and, by themselves, over the other classes (q):
the loss log(1 + q / p) keeps its digits where q is far below p. With z = p + q and w_i the weight of anchor
i in the total, the derivative with respect to the natural score of pair ij, as anchor i sees it, is

    H_ij = -w_i (q_i / z_i) mass_ij / p_i  within a class,      H_ij = w_i mass_ij / z_i  across classes.

Rows of H sum to zero. The masses are symmetric, so C = H + H^T costs no more than H. The gradient is C times
the features and a term along each sample; the derivative with respect to the temperature then comes free.

Shapes: L layers, N samples (anchors), D width, R rows (anchors) of a part, J columns of a part, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lib.products import on_host, product

Distance = Literal["cosine", "sqeuclidean"]
Reduction = Literal["mean", "mean_all", "sum", "none"]
Route = Literal["auto", "dense", "panels", "streaming", "fused"]


def plain(
    features_ND: Tensor,
    labels_N: Tensor,
    temperature: float | Tensor,
    distance: Distance,
    reduction: Reduction,
) -> Tensor:
    """The loss of one layer: a scalar, or [N] for "none"."""
    same_NN = labels_N[:, None] == labels_N
    itself_NN = torch.eye(labels_N.shape[0], dtype=torch.bool, device=labels_N.device)
    positive_NN, negative_NN = same_NN & ~itself_NN, ~same_NN
    has_positive_N = positive_NN.any(1)

    if distance == "cosine":
        largest_N1 = features_ND.detach().abs().amax(1, keepdim=True)  # whose square may leave the type
        x_ND = features_ND / largest_N1.where(largest_N1 > 0, 1)
        square_N1 = x_ND.square().sum(1, keepdim=True)
        unit_ND = x_ND * square_N1.where(square_N1 > 0, 1).rsqrt()
        distance_NN = 1 - unit_ND @ unit_ND.T
    else:
        x_ND = features_ND - features_ND.mean(0)  # no distance changes, and less cancels
        square_N = x_ND.square().sum(1)
        distance_NN = square_N[:, None] + square_N - 2 * x_ND @ x_ND.T
        # Not below 0; a gradient of 0 at 0 would be wrong in second derivatives.
        distance_NN = distance_NN + (-distance_NN).relu().detach()
    score_NN = -distance_NN / temperature

    lowest = torch.finfo(score_NN.dtype).min / 4  # finite, so that an empty side leaves a gradient of 0
    log_p_N = score_NN.where(positive_NN, lowest).logsumexp(1)
    log_q_N = score_NN.where(negative_NN, lowest).logsumexp(1)
    has_both_N = has_positive_N & negative_NN.any(1)
    loss_N = F.softplus((log_q_N - log_p_N).where(has_both_N, 0), threshold=40).where(has_both_N, 0)
    if reduction == "none":
        return loss_N
    if reduction == "mean":
        return loss_N.sum() / has_positive_N.sum().clamp(min=1)
    return loss_N.mean() if reduction == "mean_all" else loss_N.sum()


# ------------------------------------------------------------------------------------ the kernels


class Range(NamedTuple):
    """Exponents of 2 within which a type is used, so that neither masses nor products leave it."""

    safe: float  # scores within +- this need no care
    precise: float  # beyond, their rounding shows in the loss: more digits are needed
    floor: float  # masses below 2^-floor are zero: denormal numbers cost 4 to 60 times as much
    trusted: float  # a positive mass below 2^-trusted is computed again
    lift: float  # coefficients carry a factor 2^lift
    flush: float  # lifted coefficients below 2^-flush are zero
    squares: tuple[float, float]  # a squared norm outside of these calls for a rescaled row


RANGES = {
    torch.float32: Range(40, 2.0**10, 100, 60, 40, 83, (2.0**-80, 2.0**80)),
    torch.float64: Range(400, 2.0**32, 900, 500, 400, 600, (2.0**-600, 2.0**600)),
}


class Parts(NamedTuple):
    loss: Tensor  # [L], or [L, N] for "none": 0 for an anchor without positives or without negatives
    gradients_ND: list[Tensor]  # one a layer; none if not asked for
    slope_L: Tensor | None  # the derivative with respect to the temperature, if it is learned


class Options(NamedTuple):
    distance: Distance
    reduction: Reduction
    route: Route
    wanted: bool  # gradients, that is
    learned: bool  # the temperature has one


def weights(reduction: Reduction, has_positive_N: Tensor, given: Tensor | None) -> Tensor:
    """`has_positive_N`: 1 or 0; `given`: the anchors' weights in the total, None: the reduction's."""
    if given is not None:
        return given * has_positive_N
    if reduction == "mean":
        return has_positive_N / has_positive_N.sum().clamp_(min=1)
    return has_positive_N / len(has_positive_N) if reduction == "mean_all" else has_positive_N


def reduced(reduction: Reduction, loss_LN: Tensor, weight_LN: Tensor, has_positive_N: Tensor) -> Tensor:
    return loss_LN * has_positive_N if reduction == "none" else (loss_LN * weight_LN).sum(1)


def dense(
    options: Options,
    layers: Sequence[Tensor],
    labels_N: Tensor,
    temperature: float | Tensor,
    weight_LN: Tensor | None,
) -> Parts:
    """All layers at once, from one Gram matrix each; the gradient is one matrix times the features.

    Under "sqeuclidean" features are best given minus their mean, so that less cancels.
    """
    same_NN = layers[0].new_empty(len(labels_N), len(labels_N))
    torch.eq(labels_N[:, None], labels_N, out=same_NN).fill_diagonal_(0)
    has_positive_N = same_NN.sum(1).clamp_(max=1)
    weight_LN = weights(options.reduction, has_positive_N, weight_LN)
    cosine = options.distance == "cosine"
    layers, gram_LNN, square_LN, power_LN1, largest = _grams(layers, cosine)

    base2 = math.log2(math.e) / temperature
    if cosine:
        inverse_LN = square_LN.rsqrt() if power_LN1 is None else square_LN.rsqrt().where(square_LN > 0, 1)
        factor_LNN = (inverse_LN * base2)[:, :, None] * inverse_LN[:, None, :]
        score_LNN = gram_LNN.mul_(factor_LNN)
    else:
        score_LNN = gram_LNN.mul_(2).sub_(square_LN[:, :, None]).sub_(square_LN[:, None, :]).mul_(base2)

    if cosine and not isinstance(base2, Tensor):
        spread = base2
    else:
        spread = math.inf if largest is None else float(base2) * (1 if cosine else 4 * largest)
    if spread <= RANGES[score_LNN.dtype].safe:
        loss_LN, c_LNN = _from_masses(score_LNN, same_NN, weight_LN, options.wanted)
    else:
        itself_NN = torch.eye(len(labels_N), dtype=torch.bool, device=labels_N.device)
        loss_LN, half_LNN = exact(score_LNN, same_NN.bool(), itself_NN, weight_LN)
        c_LNN = half_LNN + half_LNN.mT if options.wanted else half_LNN
    loss = reduced(options.reduction, loss_LN, weight_LN, has_positive_N)
    if not options.wanted:
        return Parts(loss, [], None)

    slope_L = None
    if cosine or options.learned:
        own_LN = score_LNN.mul_(c_LNN).sum(2)
    if options.learned:
        slope_L = own_LN.sum(1) * (-0.5 / temperature)
    if cosine:  # d cos_ij / d x_i = (u_j - cos_ij u_i) / |x_i|, with u = x / |x|
        c_LNN.mul_(factor_LNN)
        own_LN *= inverse_LN.square()
    else:  # d |x_i - x_j|^2 / d x_i = 2 (x_i - x_j)
        c_LNN.mul_(2 * base2)
        own_LN = c_LNN.sum(2)
    c_LNN.diagonal(dim1=1, dim2=2).sub_(own_LN)
    if power_LN1 is not None:
        c_LNN.mul_(power_LN1)
    return Parts(loss, [product(c_NN, x_ND) for c_NN, x_ND in zip(c_LNN, layers, strict=True)], slope_L)


def _grams(
    layers: Sequence[Tensor], cosine: bool
) -> tuple[Sequence[Tensor], Tensor, Tensor, Tensor | None, float | None]:
    """Features fit for squares, their Gram matrices [L, N, N] and squared norms [L, N], the powers of two
    [L, N, 1] by which rows were multiplied (None: 1), the largest squared norm (None: unknown, since
    a GPU must not wait for it).
    """
    on_cpu = on_host(layers[0])
    power_LN1 = None
    if cosine and not on_cpu:
        layers, power_LN1 = _rescaled(layers)
    gram_LNN, square_LN = _gram_matrices(layers)
    if not on_cpu:
        return layers, gram_LNN, square_LN, power_LN1, None
    low, high = (bound.item() for bound in square_LN.aminmax())
    check_finite(layers, high)
    least, most = RANGES[square_LN.dtype].squares
    if cosine and not (least <= low and high <= most):
        layers, power_LN1 = _rescaled(layers)
        gram_LNN, square_LN = _gram_matrices(layers)
    return layers, gram_LNN, square_LN, power_LN1, high


def _gram_matrices(layers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    grams = [product(x_ND, x_ND.T) for x_ND in layers]
    gram_LNN = torch.stack(grams) if len(grams) > 1 else grams[0][None]
    return gram_LNN, gram_LNN.diagonal(dim1=1, dim2=2).clone()


def check_finite(layers: Sequence[Tensor], largest_square: float) -> None:
    """Raises ValueError where a feature is NaN or infinite; a look at the squared norms mostly suffices."""
    if not math.isfinite(largest_square) and not all(x_ND.isfinite().all() for x_ND in layers):
        raise ValueError("features contain NaN or infinity: look at the learning rate and the inputs")


def _rescaled(layers: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Rows times an exact power of two each, so that no square under- or overflows and no digit changes."""
    power_LN1 = torch.stack([power_of_two(x_ND) for x_ND in layers])
    return [x_ND * power_N1 for x_ND, power_N1 in zip(layers, power_LN1, strict=True)], power_LN1


def power_of_two(x_ND: Tensor) -> Tensor:
    exponent_N1 = x_ND.abs().amax(1, keepdim=True).frexp().exponent
    exponent_N1 = exponent_N1.clamp(min=math.frexp(torch.finfo(x_ND.dtype).tiny)[1])
    return torch.exp2(-exponent_N1.to(x_ND.dtype))


def _from_masses(
    score_LNN: Tensor, same_NN: Tensor, weight_LN: Tensor, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Losses [L, N] and C [L, N, N] of scores whose masses cannot leave the range of the type.

    Anchors without positives have no weight; the bound on p only keeps their loss finite.
    """
    mass_LNN = score_LNN.exp2()
    mass_LNN.diagonal(dim1=1, dim2=2).zero_()
    same_LNN = mass_LNN * same_NN
    other_LNN = mass_LNN.sub_(same_LNN)
    p_LN = same_LNN.sum(2).clamp_(min=2.0 ** -(RANGES[score_LNN.dtype].safe + 2))
    q_LN = other_LNN.sum(2)
    loss_LN = (q_LN / p_LN).log1p_()
    if not wanted:
        return loss_LN, mass_LNN
    across_LN = weight_LN * math.log(2) / (p_LN + q_LN)
    within_LN = across_LN * q_LN / p_LN
    across_LNN = across_LN[:, :, None] + across_LN[:, None, :]
    within_LNN = within_LN[:, :, None] + within_LN[:, None, :]
    return loss_LN, across_LNN.mul_(other_LNN).sub_(within_LNN.mul_(same_LNN))


def exact(score: Tensor, same_RJ: Tensor, itself_RJ: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [..., R] and H [..., R, J] of any finite scores [..., R, J], from logarithms of the masses.

    An empty side would have log 0; it gets the anchor itself as a stand-in, and the outcome is masked.
    """
    other_RJ = ~(same_RJ | itself_RJ)
    has_both_R = same_RJ.any(1) & other_RJ.any(1)
    stand_in_RJ = itself_RJ & ~has_both_R[:, None]
    p, log_p = _masses(score, same_RJ | stand_in_RJ)
    q, log_q = _masses(score, other_RJ | stand_in_RJ)
    log_ratio = (log_q - log_p) * math.log(2)
    loss = F.softplus(log_ratio, threshold=40).masked_fill(~has_both_R, 0)
    weight = (weight * math.log(2) * log_ratio.sigmoid()).masked_fill(~has_both_R, 0)[..., None]
    coefficient = q.mul_(weight).sub_(p.mul_(weight))
    return loss, F.hardshrink(coefficient, 2.0 ** -RANGES[score.dtype].flush)


def _masses(score: Tensor, mask_RJ: Tensor) -> tuple[Tensor, Tensor]:
    """Shares [..., R, J] of each row's mass under the mask, and the log2 of that mass [..., R]."""
    score = score.masked_fill(~mask_RJ, -math.inf)
    largest = score.amax(-1, keepdim=True)
    mass = F.threshold(score.sub_(largest), -RANGES[score.dtype].floor, -math.inf).exp2_()
    total = mass.sum(-1, keepdim=True)
    return mass.div_(total), (total.log2() + largest).squeeze(-1)


# ----------------------------------------------------------------------------------------- direct

DIRECT_BLOCK = 2**22  # numbers in a block of rows, or of pairs


def direct(
    options: Options, x_ND: Tensor, labels_N: Tensor, temperature: float, weight_N: Tensor | None
) -> Parts:
    """One layer in float64, from differences of features, so that coincident and nearly parallel rows keep
    their distance. Few masses are positive where this is needed; the gradient is summed over these pairs.
    """
    check_finite([x_ND], math.inf)
    cosine, count = options.distance == "cosine", len(labels_N)
    if cosine:  # 1 - cos is half the squared distance of unit vectors
        power_N1 = power_of_two(x_ND)
        v_ND = x_ND * power_N1
        norm_N1 = torch.linalg.vector_norm(v_ND, dim=1, keepdim=True)
        inverse_N1 = 1 / norm_N1.where(norm_N1 > 0, 1)
        v_ND = v_ND * inverse_N1
        half, is_zero_N = 0.5, norm_N1[:, 0] == 0
    else:
        v_ND, half = x_ND, 1.0
    base2 = math.log2(math.e) / temperature
    same_counts_N = labels_N.unique(return_inverse=True, return_counts=True)[1:]
    has_positive_N = (same_counts_N[1][same_counts_N[0]] > 1).to(x_ND.dtype)
    weight_N = weights(options.reduction, has_positive_N, weight_N)
    loss_N, gradient_ND, slope = torch.zeros_like(weight_N), torch.zeros_like(v_ND), x_ND.new_zeros(())
    place_N = torch.arange(count, device=x_ND.device)
    for rows_R in place_N.split(max(1, DIRECT_BLOCK // count)):
        distance_RN = torch.cdist(v_ND[rows_R], v_ND, compute_mode="donot_use_mm_for_euclid_dist")
        distance_RN.square_().mul_(half)
        if cosine:  # a row of zeros is at distance 1 from everything
            distance_RN.masked_fill_(is_zero_N[rows_R, None] | is_zero_N, 1)
        itself_RN = rows_R[:, None] == place_N
        same_RN = (labels_N[rows_R, None] == labels_N) & ~itself_RN
        loss_N[rows_R], half_RN = exact(distance_RN * -base2, same_RN, itself_RN, weight_N[rows_R])
        if not options.wanted:
            continue
        slope += (half_RN * distance_RN).sum() * (base2 / temperature)
        half_RN.masked_fill_(distance_RN == 0, 0)  # no force, and there may be many
        for pairs_P2 in half_RN.nonzero().split(max(1, DIRECT_BLOCK // v_ND.shape[1])):
            i_P, j_P = rows_R[pairs_P2[:, 0]], pairs_P2[:, 1]
            force_P1 = half_RN[pairs_P2[:, 0], j_P, None] * (-2 * half * base2)
            force_PD = (v_ND[i_P] - v_ND[j_P]).mul_(force_P1)
            gradient_ND.index_add_(0, i_P, force_PD).index_add_(0, j_P, force_PD, alpha=-1)
    loss = reduced(options.reduction, loss_N[None], weight_N, has_positive_N)
    if not options.wanted:
        return Parts(loss, [], None)
    if cosine:
        along_N1 = torch.linalg.vecdot(v_ND, gradient_ND)[:, None]
        gradient_ND.addcmul_(v_ND, along_N1, value=-1).mul_(inverse_N1).mul_(power_N1)
    return Parts(loss, [gradient_ND], slope[None] if options.learned else None)
