"""The soft nearest neighbor loss by tiles of the upper triangle of all pairs, for many samples.

    "panels"     the tiles are kept for the gradient: fewer operations, N^2 / 2 of memory
    "streaming"  they are formed twice and never kept: O(N D) of memory

What is computed, and the letters, are in dense.py. Where scores may leave the range of the type, they are
counted from the largest score of a usual anchor. An anchor whose masses leave the range all the same is
computed again, from logarithms of masses that are taken relative to the largest of its own.

Shapes: N samples (anchors), D width, R rows of a part, J columns of a part, C classes.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lib.products import add_product, on_host, product
from moe_lib.snnl.dense import (
    RANGES,
    Distance,
    Options,
    Parts,
    check_finite,
    exact,
    power_of_two,
    reduced,
    weights,
)

TILE, TILE_GPU = (256, 1024), (2048, 8192)  # rows and columns at a time
SAMPLE = 32  # anchors whose nearest sample is looked for


def by_tiles(
    options: Options, x_ND: Tensor, labels_N: Tensor, temperature: float, weight_N: Tensor | None
) -> Parts:
    """One layer; each mass is formed once for both its rows."""
    labels_N, order_N = labels_N.sort()
    scores, factor_N1 = _sorted_scores(options.distance, x_ND, order_N, temperature)
    if scores.far:
        scores = scores.from_the_nearest()
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
    if scores.far:
        trusted_N &= p_N + q_N < 2.0 ** RANGES[x_ND.dtype].safe
    loss_N = (q_N / p_N).log1p_().masked_fill_(~trusted_N, 0)
    number_N = has_positive_N.to(x_ND.dtype)
    weight_N = weights(options.reduction, number_N, None if weight_N is None else weight_N[order_N])
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
        loss_N[rows_R], half_RJ = exact(score_RJ, same_RJ, itself_RJ, lifted_N[rows_R])
        if total is not None:
            total.add_rows(scores.v_ND, rows_R, half_RJ)

    loss = reduced(options.reduction, loss_N[None], weight_N, number_N)
    if options.reduction == "none":
        loss = torch.empty_like(loss).index_copy_(1, order_N, loss)
    if total is None:
        return Parts(loss, [], None)
    sorted_ND, slope = total.gradient(scores.v_ND, factor_N1, temperature)
    gradient_ND = torch.empty_like(sorted_ND).index_copy_(0, order_N, sorted_ND)
    return Parts(loss, [gradient_ND], slope[None] if options.learned else None)


class _Scores(NamedTuple):
    """score_ij = v_i v_j - h_i - h_j, of samples sorted by class."""

    v_ND: Tensor
    shift_N: Tensor | None  # h; None: 0, where all masses stay within the range of the type without it
    far: bool  # whether scores outside of the range have to be looked for

    def of(self, rows: slice | Tensor, columns: slice) -> Tensor:
        if self.shift_N is None:
            return product(self.v_ND[rows], self.v_ND[columns].T)
        score_RJ = product(self.v_ND[rows], self.v_ND[columns].T, -self.shift_N[columns])
        return score_RJ.sub_(self.shift_N[rows, None])

    def masses(self, tile: _Tile) -> Tensor:
        rows, columns = slice(tile.top, tile.bottom), slice(tile.left, tile.right)
        mass_RJ = self.of(rows, columns)
        if self.far:
            limit = RANGES[mass_RJ.dtype]
            torch.threshold_(mass_RJ, -limit.floor, -math.inf).clamp_(max=limit.safe)
        mass_RJ.exp2_()
        if tile.on_diagonal:
            mass_RJ.diagonal().zero_()
        return mass_RJ

    def from_the_nearest(self) -> _Scores:
        """The same, counted from the largest score of a usual anchor: the median of a sample's."""
        assert self.shift_N is not None
        step = -(-len(self.v_ND) // SAMPLE)
        rows_R = torch.arange(0, len(self.v_ND), step, device=self.v_ND.device)
        score_RJ = self.of(rows_R, slice(None)).scatter_(1, rows_R[:, None], -math.inf)
        return self._replace(shift_N=self.shift_N + score_RJ.amax(1).median().clamp(max=0) / 2)


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
    on_gpu, count = not on_host(class_ends_N), len(class_ends_N)
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


def _sorted_scores(
    distance: Distance, x_ND: Tensor, order_N: Tensor, temperature: float
) -> tuple[_Scores, Tensor | None]:
    """Scores, and under "cosine" what each row was multiplied by to have length 1 (1 for a row of zeros)."""
    base2, limit, on_cpu = math.log2(math.e) / temperature, RANGES[x_ND.dtype], on_host(x_ND)
    v_ND = x_ND[order_N]
    if distance == "sqeuclidean":  # v = sqrt(2 base2) x, h = |v|^2 / 2
        v_ND.sub_(x_ND.mean(0)).mul_(math.sqrt(2 * base2))  # no distance changes, and less cancels
        shift_N = torch.linalg.vecdot(v_ND, v_ND).div_(2)
        largest = shift_N.max().item()
        if on_cpu:
            check_finite([x_ND], largest)
        return _Scores(v_ND, shift_N, far=not 4 * largest <= 2 * limit.safe), None
    # v = sqrt(base2) x / |x|, h = base2 / 2
    power_N1: Tensor | float = 1.0
    square_N1 = torch.linalg.vecdot(v_ND, v_ND)[:, None]
    least, most = (bound.item() for bound in square_N1.aminmax())
    if on_cpu:
        check_finite([x_ND], most)
    if not (limit.squares[0] <= least and most <= limit.squares[1]):
        power_N1 = power_of_two(v_ND)
        v_ND.mul_(power_N1)
        square_N1 = torch.linalg.vecdot(v_ND, v_ND)[:, None]
    inverse_N1 = square_N1.rsqrt().masked_fill_(square_N1 == 0, 1)
    v_ND.mul_(inverse_N1 * math.sqrt(base2))
    far = base2 > limit.safe
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
