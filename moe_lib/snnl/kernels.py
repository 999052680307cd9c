"""How the soft nearest neighbor loss is computed: value and gradient together, in three ways.

    "dense"      the matrix of all pairs, all layers at once; for small N
    "panels"     tiles of its upper triangle, kept for the gradient: fewer operations, N^2 / 2 of memory
    "streaming"  the same tiles, formed twice and never kept: O(N D) of memory

All of them work on scores -distance / temperature in units of log 2 (exp2 is the fastest exponential) and
on masses exp2(score), summed over the anchor's own class (p) and, by themselves, over the other classes (q):
the loss log(1 + q / p) keeps its digits where q is far below p. With z = p + q and w_i the weight of anchor
i in the total, the derivative with respect to the natural score of pair ij, as anchor i sees it, is

    H_ij = -w_i (q_i / z_i) mass_ij / p_i  within a class,      H_ij = w_i mass_ij / z_i  across classes.

Rows of H sum to zero. The masses are symmetric, so C = H + H^T costs no more than H. The gradient is C times
the features and a term along each sample; the derivative with respect to the temperature then comes free.
An anchor whose p leaves the range of the type is computed again, from logarithms of masses that are taken
relative to the largest of its own.

Shapes: L layers, N samples (anchors), D width, R rows (anchors) of a part, J columns of a part.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lib.products import add_product, product

Distance = Literal["cosine", "sqeuclidean"]
Reduction = Literal["mean", "mean_all", "sum", "none"]
Route = Literal["auto", "dense", "panels", "streaming"]

DENSE_UP_TO, PANELS_UP_TO = 512, 1536  # samples, on a CPU; measured
DENSE_UP_TO_GPU = 2048
TILE, TILE_GPU = (256, 1024), (2048, 8192)  # rows and columns at a time


class Range(NamedTuple):
    """Exponents of 2 within which a type is used, so that neither masses nor products leave it."""

    plain: float  # scores within +- this need no care
    floor: float  # masses below 2^-floor are zero: denormal numbers cost 4 to 60 times as much
    trusted: float  # a positive mass below 2^-trusted is computed again
    lift: float  # coefficients carry a factor 2^lift
    flush: float  # lifted coefficients below 2^-flush are zero
    squares: tuple[float, float]  # a squared norm outside of these calls for a rescaled row


RANGES = {
    torch.float32: Range(40, 100, 60, 40, 83, (2.0**-80, 2.0**80)),
    torch.float64: Range(400, 900, 500, 400, 600, (2.0**-600, 2.0**600)),
}


class Gradient(NamedTuple):
    """A layer's gradient: `coefficient_NN` @ `features_ND`, or `features_ND` itself where that is None."""

    coefficient_NN: Tensor | None
    features_ND: Tensor


class Parts(NamedTuple):
    loss: Tensor  # [L], or [L, N] for "none": 0 for an anchor without positives or without negatives
    gradients: list[Gradient]  # one a layer; none if not asked for
    slope_L: Tensor | None  # the derivative with respect to the temperature, if it is learned


class Options(NamedTuple):
    distance: Distance
    reduction: Reduction
    route: Route
    wanted: bool  # gradients, that is
    learned: bool  # the temperature has one


def losses(
    layers: Sequence[Tensor],
    labels_N: Tensor,
    temperature: float | Tensor,
    distance: Distance,
    reduction: Reduction,
    route: Route,
) -> Tensor:
    """[L] losses of L layers [N, D_l] of one type (float32 or float64) and device; [L, N] for "none"."""
    if not len(labels_N):  # connected to the features, as a sum over nothing is
        return torch.stack([x_ND.sum(1) if reduction == "none" else x_ND.sum() for x_ND in layers])
    if route == "auto":
        route = _choose(len(labels_N), labels_N.device.type)
    learned = isinstance(temperature, Tensor) and temperature.requires_grad
    options = Options(distance, reduction, route, torch.is_grad_enabled(), learned)
    return _SNNL.apply(options, temperature, labels_N, *layers)


def _choose(num_samples: int, device: str) -> Route:
    if num_samples <= (DENSE_UP_TO if device == "cpu" else DENSE_UP_TO_GPU):
        return "dense"
    return "panels" if device == "cpu" and num_samples <= PANELS_UP_TO else "streaming"


class _SNNL(torch.autograd.Function):
    """Forms the gradient in the forward pass; for "none" in the backward pass, which knows the weights."""

    @staticmethod
    def forward(
        ctx: Any, options: Options, temperature: float | Tensor, labels_N: Tensor, *layers: Tensor
    ) -> Tensor:
        later = options.reduction == "none"
        wanted = options.wanted and any(ctx.needs_input_grad)
        parts = _compute(
            options._replace(wanted=wanted and not later), layers, labels_N, temperature, weight_LN=None
        )
        ctx.options = options
        is_tensor = isinstance(temperature, Tensor)
        ctx.temperature_device = temperature.device if isinstance(temperature, Tensor) else None
        if wanted and later:
            ctx.temperature = None if is_tensor else temperature
            ctx.save_for_backward(temperature if is_tensor else None, labels_N, *layers)
        elif wanted:
            flat = [tensor for gradient in parts.gradients for tensor in gradient]
            ctx.save_for_backward(parts.slope_L, *flat)
        return parts.loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the soft nearest neighbor loss has no second derivative: differentiate without create_graph"
            )
        scale_L = grads[0]
        if ctx.options.reduction == "none":
            temperature, labels_N, *layers = ctx.saved_tensors
            largest = grads[0].abs().amax()
            largest = largest.where(largest > 0, 1)
            parts = _compute(
                ctx.options,
                layers,
                labels_N,
                ctx.temperature if temperature is None else temperature,
                weight_LN=grads[0] / largest,  # so that no weight leaves the range of the type
            )
            slope_L, gradients = parts.slope_L, parts.gradients
            scale_L = largest.expand(len(layers))
        else:
            slope_L, *flat = ctx.saved_tensors
            gradients = [Gradient(*pair) for pair in zip(flat[::2], flat[1::2], strict=True)]
        # On the CPU it costs nothing to look: a layer that "min" leaves out needs no product.
        scales = scale_L.tolist() if scale_L.device.type == "cpu" else list(scale_L)
        with _without_autocast(scale_L.device.type):
            out = [
                _times(gradient, scale) if wanted else None
                for gradient, scale, wanted in zip(gradients, scales, ctx.needs_input_grad[3:], strict=True)
            ]
        slope = None if slope_L is None else (scale_L * slope_L).sum().to(ctx.temperature_device)
        return (None, slope, None, *out)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Products stay in the type of the features."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _times(gradient: Gradient, scale: float | Tensor) -> Tensor:
    coefficient_NN, x_ND = gradient
    if isinstance(scale, float) and scale == 0:
        return torch.zeros_like(x_ND)
    if coefficient_NN is None:
        return x_ND * scale
    product_ND = product(coefficient_NN, x_ND)
    return product_ND if isinstance(scale, float) and scale == 1 else product_ND.mul_(scale)


def _compute(
    options: Options,
    layers: Sequence[Tensor],
    labels_N: Tensor,
    temperature: float | Tensor,
    weight_LN: Tensor | None,
) -> Parts:
    """`weight_LN`: the anchors' weights in the total; None: the reduction's."""
    if isinstance(temperature, Tensor):  # a GPU's stays there: nothing waits for it under "dense"
        on_gpu = temperature.device.type != "cpu"
        temperature = temperature.detach().to(layers[0].dtype) if on_gpu else temperature.item()
    with _without_autocast(labels_N.device.type):
        if options.route == "dense":
            return _dense(options, layers, labels_N, temperature, weight_LN)
        weights = [None] * len(layers) if weight_LN is None else list(weight_LN)
        parts = [
            _by_panels(options, x_ND, labels_N, float(temperature), weight_N)
            for x_ND, weight_N in zip(layers, weights, strict=True)
        ]
    slopes = [part.slope_L for part in parts if part.slope_L is not None]
    return Parts(
        torch.cat([part.loss for part in parts]),
        [gradient for part in parts for gradient in part.gradients],
        torch.cat(slopes) if slopes else None,
    )


def _weights(reduction: Reduction, has_positive_N: Tensor, given: Tensor | None) -> Tensor:
    """`has_positive_N`: 1 or 0."""
    if given is not None:
        return given * has_positive_N
    if reduction == "mean":
        return has_positive_N / has_positive_N.sum().clamp_(min=1)
    return has_positive_N / len(has_positive_N) if reduction == "mean_all" else has_positive_N


def _reduced(reduction: Reduction, loss_LN: Tensor, weight_LN: Tensor, has_positive_N: Tensor) -> Tensor:
    return loss_LN * has_positive_N if reduction == "none" else (loss_LN * weight_LN).sum(1)


# ------------------------------------------------------------------------------------------ dense


def _dense(
    options: Options,
    layers: Sequence[Tensor],
    labels_N: Tensor,
    temperature: float | Tensor,
    weight_LN: Tensor | None,
) -> Parts:
    """All layers at once, from one Gram matrix each; the gradient is one matrix times the features."""
    same_NN = layers[0].new_empty(len(labels_N), len(labels_N))
    torch.eq(labels_N[:, None], labels_N, out=same_NN).fill_diagonal_(0)
    has_positive_N = same_NN.sum(1).clamp_(max=1)
    weight_LN = _weights(options.reduction, has_positive_N, weight_LN)
    cosine = options.distance == "cosine"
    layers, gram_LNN, square_LN, power_LN1, largest = _grams(layers, cosine)

    base2 = math.log2(math.e) / temperature
    if cosine:
        inverse_LN = square_LN.rsqrt() if power_LN1 is None else square_LN.rsqrt().where(square_LN > 0, 1)
        factor_LNN = (inverse_LN * base2)[:, :, None] * inverse_LN[:, None, :]
        score_LNN = gram_LNN.mul_(factor_LNN)
    else:
        score_LNN = gram_LNN.mul_(2).sub_(square_LN[:, :, None]).sub_(square_LN[:, None, :]).mul_(base2)

    spread = math.inf if largest is None else float(base2) * (1 if cosine else 4 * largest)
    if spread <= RANGES[score_LNN.dtype].plain:
        loss_LN, c_LNN = _plain(score_LNN, same_NN, weight_LN, options.wanted)
    else:
        itself_NN = torch.eye(len(labels_N), dtype=torch.bool, device=labels_N.device)
        loss_LN, half_LNN = _exact(score_LNN, same_NN.bool(), itself_NN, weight_LN)
        c_LNN = half_LNN + half_LNN.mT if options.wanted else half_LNN
    loss = _reduced(options.reduction, loss_LN, weight_LN, has_positive_N)
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
    return Parts(loss, [Gradient(c_NN, x_ND) for c_NN, x_ND in zip(c_LNN, layers, strict=True)], slope_L)


def _grams(
    layers: Sequence[Tensor], cosine: bool
) -> tuple[Sequence[Tensor], Tensor, Tensor, Tensor | None, float | None]:
    """Features fit for squares, their Gram matrices [L, N, N] and squared norms [L, N], the powers of two
    [L, N, 1] by which rows were multiplied (None: 1), the largest squared norm (None: unknown, since
    a GPU must not wait for it).
    """
    on_cpu = layers[0].device.type == "cpu"
    if not cosine:
        layers = [x_ND - x_ND.mean(0) for x_ND in layers]  # no distance changes, and less cancels
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
    power_LN1 = torch.stack([_power(x_ND) for x_ND in layers])
    return [x_ND * power_N1 for x_ND, power_N1 in zip(layers, power_LN1, strict=True)], power_LN1


def _power(x_ND: Tensor) -> Tensor:
    exponent_N1 = x_ND.abs().amax(1, keepdim=True).frexp().exponent
    exponent_N1 = exponent_N1.clamp(min=math.frexp(torch.finfo(x_ND.dtype).tiny)[1])
    return torch.exp2(-exponent_N1.to(x_ND.dtype))


def _plain(score_LNN: Tensor, same_NN: Tensor, weight_LN: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Losses [L, N] and C [L, N, N] of scores whose masses cannot leave the range of the type.

    Anchors without positives have no weight; the bound on p only keeps their loss finite.
    """
    mass_LNN = score_LNN.exp2()
    mass_LNN.diagonal(dim1=1, dim2=2).zero_()
    same_LNN = mass_LNN * same_NN
    other_LNN = mass_LNN.sub_(same_LNN)
    p_LN = same_LNN.sum(2).clamp_(min=2.0 ** -(RANGES[score_LNN.dtype].plain + 2))
    q_LN = other_LNN.sum(2)
    loss_LN = (q_LN / p_LN).log1p_()
    if not wanted:
        return loss_LN, mass_LNN
    across_LN = weight_LN * math.log(2) / (p_LN + q_LN)
    within_LN = across_LN * q_LN / p_LN
    across_LNN = across_LN[:, :, None] + across_LN[:, None, :]
    within_LNN = within_LN[:, :, None] + within_LN[:, None, :]
    return loss_LN, across_LNN.mul_(other_LNN).sub_(within_LNN.mul_(same_LNN))


def _exact(score: Tensor, same_RJ: Tensor, itself_RJ: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
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


# ----------------------------------------------------------------------------------------- panels


class _Scores(NamedTuple):
    """score_ij = v_i v_j - h_i - h_j, of samples sorted by class."""

    v_ND: Tensor
    shift_N: Tensor | None  # h; None: 0, where all masses stay within the range of the type without it
    far: bool  # whether scores below the floor have to be looked for

    def of(self, rows: slice | Tensor, columns: slice) -> Tensor:
        if self.shift_N is None:
            return product(self.v_ND[rows], self.v_ND[columns].T)
        score_RJ = product(self.v_ND[rows], self.v_ND[columns].T, -self.shift_N[columns])
        return score_RJ.sub_(self.shift_N[rows, None])

    def masses(self, tile: _Tile) -> Tensor:
        rows, columns = slice(tile.top, tile.bottom), slice(tile.left, tile.right)
        mass_RJ = self.of(rows, columns)
        if self.far:
            torch.threshold_(mass_RJ, -RANGES[mass_RJ.dtype].floor, -math.inf)
        mass_RJ.exp2_()
        if tile.on_diagonal:
            mass_RJ.diagonal().zero_()
        return mass_RJ


class _Tile(NamedTuple):
    """Rows `top` to `bottom` and columns `left` to `right` of the upper triangle; samples sorted by class.

    On the diagonal its first columns form a symmetric square. Columns from `band` on are across classes for
    every row.
    """

    top: int
    bottom: int
    left: int
    right: int
    band: int

    @property
    def on_diagonal(self) -> bool:
        return self.left == self.top

    @property
    def square(self) -> int:
        """Width of the symmetric square."""
        return self.bottom - self.top if self.on_diagonal else 0

    def same(self, class_N: Tensor) -> Tensor:
        """1 for each pair within a class, else 0: [R, band - left]."""
        top_R1, left_J = class_N[self.top : self.bottom, None], class_N[self.left : self.band]
        return torch.eq(top_R1, left_J, out=class_N.new_empty(len(top_R1), len(left_J)))


def _tiles(class_ends_N: Tensor) -> list[_Tile]:
    """All of the upper triangle; `class_ends_N`: where each sample's class ends.

    Column edges are multiples of the width (itself one of the height), so that few shapes occur: oneDNN keeps
    half a megabyte of code for each.
    """
    on_gpu, count = class_ends_N.device.type != "cpu", len(class_ends_N)
    height, width = TILE_GPU if on_gpu else TILE
    tops = range(0, count, height)
    bottoms = [min(top + height, count) for top in tops]
    ends = class_ends_N[[bottom - 1 for bottom in bottoms]].tolist()
    tiles = []
    for top, bottom, end in zip(tops, bottoms, ends, strict=True):
        edges = [top, *range(top - top % width + width, count, width), count]
        for left, right in itertools.pairwise(edges):
            tiles.append(_Tile(top, bottom, left, right, min(max(end, left), right)))
    return tiles


def _by_panels(
    options: Options, x_ND: Tensor, labels_N: Tensor, temperature: float, weight_N: Tensor | None
) -> Parts:
    """One layer, by panels of the upper triangle, so that each mass is formed once for both its rows."""
    labels_N, order_N = labels_N.sort()
    scores, factor_N1 = _sorted_scores(options.distance, x_ND, order_N, temperature)
    _, class_N, sizes_C = torch.unique_consecutive(labels_N, return_inverse=True, return_counts=True)
    has_positive_N = sizes_C[class_N] > 1
    tiles = _tiles(sizes_C.cumsum(0)[class_N])
    class_N = class_N.to(x_ND.dtype)  # compared as such, ten times as fast

    p_N, q_N = torch.zeros(2, len(labels_N), dtype=x_ND.dtype, device=x_ND.device)
    kept_RJ = []
    for tile in tiles:
        mass_RJ = scores.masses(tile)
        _sum_masses(tile, mass_RJ, tile.same(class_N), p_N, q_N)
        if options.route == "panels" and options.wanted:
            kept_RJ.append(mass_RJ)

    trusted_N = has_positive_N & (p_N >= 2.0 ** -RANGES[x_ND.dtype].trusted)
    loss_N = (q_N / p_N).log1p_().masked_fill_(~trusted_N, 0)
    number_N = has_positive_N.to(x_ND.dtype)
    weight_N = _weights(options.reduction, number_N, None if weight_N is None else weight_N[order_N])
    lifted_N = weight_N * 2.0 ** RANGES[x_ND.dtype].lift
    total = _Total.zeros(scores.v_ND, factor_N1 is None) if options.wanted else None
    if total is not None and trusted_N.any():
        across_N = (lifted_N * math.log(2) / (p_N + q_N)).masked_fill_(~trusted_N, 0)
        within_N = (across_N * q_N / p_N).masked_fill_(~trusted_N, 0)
        for tile in tiles:
            mass_RJ = kept_RJ.pop(0) if kept_RJ else scores.masses(tile)
            _to_coefficients(tile, mass_RJ, tile.same(class_N), across_N, within_N)
            if scores.far:
                mass_RJ = F.hardshrink(mass_RJ, 2.0 ** -RANGES[x_ND.dtype].flush)
            total.add_tile(scores.v_ND, tile, mass_RJ)
    untrusted_R = (has_positive_N & ~trusted_N).nonzero()[:, 0]
    for rows_R in untrusted_R.split(max(1, TILE[0] * TILE[1] // len(labels_N))) if len(untrusted_R) else ():
        itself_RJ = rows_R[:, None] == torch.arange(len(labels_N), device=labels_N.device)
        same_RJ = (labels_N[rows_R, None] == labels_N) & ~itself_RJ
        score_RJ = scores.of(rows_R, slice(None))
        loss_N[rows_R], half_RJ = _exact(score_RJ, same_RJ, itself_RJ, lifted_N[rows_R])
        if total is not None:
            total.add_rows(scores.v_ND, rows_R, half_RJ)

    loss = _reduced(options.reduction, loss_N[None], weight_N, number_N)
    if options.reduction == "none":
        loss = torch.empty_like(loss).index_copy_(1, order_N, loss)
    if total is None:
        return Parts(loss, [], None)
    sorted_ND, slope = total.gradient(scores.v_ND, factor_N1, temperature)
    gradient_ND = torch.empty_like(sorted_ND).index_copy_(0, order_N, sorted_ND)
    return Parts(loss, [Gradient(None, gradient_ND)], slope[None] if options.learned else None)


def _sorted_scores(
    distance: Distance, x_ND: Tensor, order_N: Tensor, temperature: float
) -> tuple[_Scores, Tensor | None]:
    """Scores, and under "cosine" what each row was multiplied by to have length 1 (1 for a row of zeros)."""
    base2, limit, on_cpu = math.log2(math.e) / temperature, RANGES[x_ND.dtype], x_ND.device.type == "cpu"
    v_ND = x_ND[order_N]
    if distance == "sqeuclidean":  # v = sqrt(2 base2) x, h = |v|^2 / 2
        v_ND.sub_(x_ND.mean(0)).mul_(math.sqrt(2 * base2))  # no distance changes, and less cancels
        shift_N = torch.linalg.vecdot(v_ND, v_ND).div_(2)
        largest = shift_N.max().item()
        if on_cpu:
            check_finite([x_ND], largest)
        return _Scores(v_ND, shift_N, far=not 4 * largest <= 2 * limit.plain), None
    # v = sqrt(base2) x / |x|, h = base2 / 2
    power_N1: Tensor | float = 1.0
    square_N1 = torch.linalg.vecdot(v_ND, v_ND)[:, None]
    least, most = (bound.item() for bound in square_N1.aminmax())
    if on_cpu:
        check_finite([x_ND], most)
    if not (limit.squares[0] <= least and most <= limit.squares[1]):
        power_N1 = _power(v_ND)
        v_ND.mul_(power_N1)
        square_N1 = torch.linalg.vecdot(v_ND, v_ND)[:, None]
    inverse_N1 = square_N1.rsqrt().masked_fill_(square_N1 == 0, 1)
    v_ND.mul_(inverse_N1 * math.sqrt(base2))
    far = base2 > limit.plain
    shift_N = v_ND.new_full((len(v_ND),), base2 / 2) if far else None
    return _Scores(v_ND, shift_N, far), inverse_N1 * power_N1


def _sum_masses(tile: _Tile, mass_RJ: Tensor, same_RJ: Tensor, p_N: Tensor, q_N: Tensor) -> None:
    """Add a tile's masses to the sums of its rows and, right of a square, of its columns."""
    top, bottom, left, right, band = tile
    within_RJ = mass_RJ[:, : band - left] * same_RJ
    across_RJ = mass_RJ[:, : band - left] - within_RJ
    beyond_RJ = mass_RJ[:, band - left :]
    p_N[top:bottom] += within_RJ.sum(1)
    q_N[top:bottom] += across_RJ.sum(1) + beyond_RJ.sum(1)
    square = tile.square
    p_N[left + square : band] += _column_sums(within_RJ[:, square:])
    q_N[left + square : band] += _column_sums(across_RJ[:, square:])
    q_N[band:right] += _column_sums(beyond_RJ)


def _column_sums(x_RJ: Tensor) -> Tensor:
    """x.sum(0), as the matrix product that is three times as fast."""
    return x_RJ.new_ones(len(x_RJ)) @ x_RJ


def _to_coefficients(
    tile: _Tile, mass_RJ: Tensor, same_RJ: Tensor, across_N: Tensor, within_N: Tensor
) -> None:
    """Turn a tile's masses into C = H + H^T, in place."""
    top, bottom, left, right, band = tile
    pair_RJ = across_N[top:bottom, None] + across_N[left:right]
    inner_RJ = (within_N[top:bottom, None] + within_N[left:band]).mul_(same_RJ)
    pair_RJ[:, : band - left].mul_(same_RJ.neg_().add_(1)).sub_(inner_RJ)
    mass_RJ.mul_(pair_RJ)


class _Total(NamedTuple):
    """Sums over panels: C @ v as the sum of `rows_ND` and `columns_DN` transposed, and the row sums of C."""

    rows_ND: Tensor
    columns_DN: Tensor
    sums_N: Tensor | None  # only "sqeuclidean" needs them

    @classmethod
    def zeros(cls, v_ND: Tensor, with_sums: bool) -> _Total:
        sums_N = v_ND.new_zeros(len(v_ND)) if with_sums else None
        return cls(torch.zeros_like(v_ND), v_ND.new_zeros(v_ND.shape[::-1]), sums_N)

    def add_tile(self, v_ND: Tensor, tile: _Tile, c_RJ: Tensor) -> None:
        """Uses up `c_RJ`. Its square, which both products meet, enters each of them by half."""
        rows, columns = slice(tile.top, tile.bottom), slice(tile.left, tile.right)
        c_RJ[:, : tile.square].mul_(0.5)
        add_product(self.rows_ND[rows], c_RJ, v_ND[columns])
        add_product(self.columns_DN[:, columns], v_ND[rows].T.contiguous(), c_RJ)
        if self.sums_N is not None:
            self.sums_N[rows] += c_RJ.sum(1)
            self.sums_N[columns] += _column_sums(c_RJ)

    def add_rows(self, v_ND: Tensor, rows_R: Tensor, half_RJ: Tensor) -> None:
        self.rows_ND[rows_R] += product(half_RJ, v_ND)
        add_product(self.columns_DN, v_ND[rows_R].T.contiguous(), half_RJ)
        if self.sums_N is not None:
            self.sums_N[rows_R] += half_RJ.sum(1)
            self.sums_N.add_(half_RJ.sum(0))

    def gradient(self, v_ND: Tensor, factor_N1: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
        """With respect to the sorted features and to the temperature; uses up the sums."""
        unlift = 2.0 ** -RANGES[v_ND.dtype].lift
        scale = math.sqrt(math.log2(math.e) / temperature)
        out_ND = self.rows_ND.add_(self.columns_DN.T)
        if self.sums_N is not None:  # scores are -|v_i - v_j|^2 / 2, with v = sqrt(2) scale x
            out_ND.addcmul_(v_ND, self.sums_N[:, None], value=-1)
            slope = (v_ND * out_ND).sum() * (-unlift / 2 / temperature)
            return out_ND.mul_(unlift * math.sqrt(2) * scale), slope
        # scores are v_i v_j, with v = scale u, u = x / |x|
        along_N1 = torch.linalg.vecdot(v_ND, out_ND)[:, None]
        slope = along_N1.sum() * (-unlift / 2 / temperature)
        out_ND.addcmul_(v_ND, along_N1, value=-1 / scale**2).mul_(factor_N1 * (unlift * scale))
        return out_ND, slope
