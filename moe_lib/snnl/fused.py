"""The soft nearest neighbor loss by two kernels of Triton on a GPU, in O(N D) of memory; nothing waits.

What is computed, and the letters, are in dense.py. Scores are formed twice and never leave the chip: once for
log2 p and log2 q, once for the product of C with the features. Masses are taken relative to the largest of
their own row and side, so no temperature needs a second look. A factor of a product is the sum of three
numbers of bfloat16, each the rounding error of those before: the six products that count give the digits of
float32 at the speed of bfloat16.

Columns are cut into parts that run side by side, where rows alone would leave most of a GPU idle. Nothing is
added atomically: two runs give equal bits.

Shapes: N samples (anchors), D width, P parts of the columns, R rows of a block, J columns of a block, K: D
filled up with zeros to a power of two, 3 pieces of each number.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton import language as tl

from moe_lib.snnl.dense import Distance, Options, Parts, power_of_two, reduced, weights

LN2 = math.log(2)


class Blocks(NamedTuple):
    rows: int
    columns: int
    warps: int


# The first that fits into a multiprocessor's own memory. No register of an H100 spills for D up to 128.
BLOCKS = [Blocks(128, 64, 8), Blocks(64, 64, 4), Blocks(64, 32, 4), Blocks(32, 32, 4), Blocks(16, 16, 4)]


def fused(
    options: Options, x_ND: Tensor, labels_N: Tensor, temperature: float | Tensor, weight_N: Tensor | None
) -> Parts:
    """One layer in float32, of at most 256 columns."""
    scale = (math.log2(math.e) / temperature) ** 0.5
    v_ND, shift_N, factor = _vectors(options.distance, x_ND, scale)
    grid = _Grid.of(v_ND)
    v_3ND, labels_N = _pieces(v_ND), labels_N.contiguous()

    log_2PN = v_ND.new_empty(2, grid.parts, len(v_ND))
    grid.launch(_sum_masses, v_3ND, shift_N, labels_N, *log_2PN)
    log_2N = log_2PN.mul_(LN2).logsumexp(1)
    has_2N = log_2N != -math.inf
    has_positive_N, has_both_N = has_2N[0], has_2N.all(0)
    log_ratio_N = (log_2N[1] - log_2N[0]).where(has_both_N, -math.inf)
    number_N = has_positive_N.to(x_ND.dtype)
    weight_N = weights(options.reduction, number_N, weight_N)
    loss_N = F.softplus(log_ratio_N, threshold=40)
    loss = reduced(options.reduction, loss_N[None], weight_N, number_N)
    if not options.wanted:
        return Parts(loss, [], None)

    force_N = weight_N * log_ratio_N.sigmoid() * LN2
    log_2N = log_2N.div_(LN2).where(has_both_N, math.inf)
    out_PND = v_ND.new_empty(grid.parts, *v_ND.shape)
    sums_PN = None if shift_N is None else v_ND.new_empty(grid.parts, len(v_ND))
    grid.launch(_apply_masses, v_3ND, shift_N, labels_N, *log_2N, force_N, out_PND, sums_PN)
    out_ND = out_PND.sum(0) if grid.parts > 1 else out_PND[0]
    if sums_PN is not None:  # scores are -|v_i - v_j|^2 / 2
        out_ND.addcmul_(v_ND, sums_PN.sum(0)[:, None], value=-1)
        slope = (v_ND * out_ND).sum() if options.learned else None
    else:  # scores are v_i v_j, of rows of one length: what lies along them does not count
        along_N1 = torch.linalg.vecdot(v_ND, out_ND)[:, None]
        slope = along_N1.sum() if options.learned else None
        out_ND.addcmul_(v_ND, along_N1 / scale**2, value=-1)
    out_ND.mul_(factor * scale)
    slope_L = None if slope is None else slope[None] * (-0.5 / temperature)
    return Parts(loss, [out_ND], slope_L)


def _vectors(
    distance: Distance, x_ND: Tensor, scale: float | Tensor
) -> tuple[Tensor, Tensor | None, float | Tensor]:
    """v and h of score_ij = v_i v_j - h_i - h_j (None: 0), and v / (scale x)."""
    if distance == "sqeuclidean":  # h = |v|^2 / 2
        v_ND = (x_ND - x_ND.mean(0)).mul_(math.sqrt(2) * scale)  # no distance changes, and less cancels
        return v_ND, torch.linalg.vecdot(v_ND, v_ND).div_(2), math.sqrt(2)
    power_N1 = power_of_two(x_ND)
    v_ND = x_ND * power_N1
    square_N1 = torch.linalg.vecdot(v_ND, v_ND)[:, None]
    inverse_N1 = square_N1.rsqrt().where(square_N1 != 0, 1)
    return v_ND.mul_(inverse_N1 * scale), None, inverse_N1 * power_N1


def _pieces(v_ND: Tensor) -> Tensor:
    """Three numbers of bfloat16 whose sum is v; in its type for the interpreter, which has no bfloat16."""
    v_3ND, rest_ND = v_ND.new_empty(3, *v_ND.shape, dtype=torch.bfloat16), v_ND
    for piece_ND in v_3ND:
        piece_ND.copy_(rest_ND)
        rest_ND = rest_ND - piece_ND
    return v_3ND if v_ND.is_cuda else v_3ND.to(v_ND.dtype)


class _Grid(NamedTuple):
    """How all pairs are cut: one program for each block of rows and part of the columns."""

    blocks: Blocks
    filled: int  # K
    parts: int
    span: int  # columns of a part

    @classmethod
    def of(cls, v_ND: Tensor) -> _Grid:
        processors, memory = _device(v_ND.device)
        filled = max(16, triton.next_power_of_2(v_ND.shape[1]))
        fitting = (one for one in BLOCKS if 6 * filled * (one.rows + 2 * one.columns) + 4096 <= memory)
        blocks = next(fitting, BLOCKS[-1])
        rows, columns = (triton.cdiv(len(v_ND), size) for size in blocks[:2])
        each = triton.cdiv(columns, max(1, processors // rows))
        return cls(blocks, filled, triton.cdiv(columns, each), each * blocks.columns)

    def launch(self, kernel: triton.JITFunction, v_3ND: Tensor, *rest: Tensor | None) -> None:
        rows, columns, warps = self.blocks
        count, width = v_3ND.shape[1:]
        with torch.cuda.device_of(v_3ND):
            kernel[triton.cdiv(count, rows), self.parts](
                v_3ND,
                *rest,
                count,
                self.span,
                width,
                self.filled,
                rows,
                columns,
                num_warps=warps,
                num_stages=2,
            )


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of the memory that each has of its own; an H100's for the interpreter."""
    if device.type == "cpu":
        return 132, 232_448
    found: Any = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_block_optin


# ------------------------------------------------------------------------------------ the kernels


@triton.jit
def _rows(v_3ND, place_R, count, D: tl.constexpr, K: tl.constexpr):
    """Three pieces [R, K] of rows of v, zeros where there are none."""
    column_K = tl.arange(0, K)
    mask_RK = (place_R < count)[:, None] & (column_K < D)[None, :]
    v_RK = v_3ND + place_R[:, None] * D + column_K[None, :]
    one_RK = tl.load(v_RK, mask=mask_RK, other=0.0)
    two_RK = tl.load(v_RK + count * D, mask=mask_RK, other=0.0)
    three_RK = tl.load(v_RK + 2 * count * D, mask=mask_RK, other=0.0)
    return one_RK, two_RK, three_RK


@triton.jit
def _add_product(out_RJ, a1_RK, a2_RK, a3_RK, b1_KJ, b2_KJ, b3_KJ):
    """out + a @ b of pieces, the least first; those below the digits of float32 are left out."""
    out_RJ = tl.dot(a3_RK, b1_KJ, out_RJ)
    out_RJ = tl.dot(a2_RK, b2_KJ, out_RJ)
    out_RJ = tl.dot(a1_RK, b3_KJ, out_RJ)
    out_RJ = tl.dot(a2_RK, b1_KJ, out_RJ)
    out_RJ = tl.dot(a1_RK, b2_KJ, out_RJ)
    return tl.dot(a1_RK, b1_KJ, out_RJ)


@triton.jit
def _scores(a1_RK, a2_RK, a3_RK, b1_JK, b2_JK, b3_JK, shift_N, row_R, column_J, count):
    score_RJ = tl.zeros([row_R.shape[0], column_J.shape[0]], tl.float32)
    b1_KJ, b2_KJ, b3_KJ = tl.trans(b1_JK), tl.trans(b2_JK), tl.trans(b3_JK)
    score_RJ = _add_product(score_RJ, a1_RK, a2_RK, a3_RK, b1_KJ, b2_KJ, b3_KJ)
    if shift_N is not None:
        score_RJ -= tl.load(shift_N + row_R, mask=row_R < count, other=0.0)[:, None]
        score_RJ -= tl.load(shift_N + column_J, mask=column_J < count, other=0.0)[None, :]
    return score_RJ


@triton.jit
def _added(largest_R, sum_R, score_RJ, mask_RJ):
    """The largest score and the sum of masses relative to it, with one more block of columns."""
    score_RJ = tl.where(mask_RJ, score_RJ, float("-inf"))
    found_R = tl.maximum(largest_R, tl.max(score_RJ, 1))
    base_R = tl.where(found_R == float("-inf"), 0.0, found_R)
    return found_R, sum_R * tl.exp2(largest_R - base_R) + tl.sum(tl.exp2(score_RJ - base_R[:, None]), 1)


@triton.jit
def _sum_masses(
    v_3ND, shift_N, labels_N, log_p_PN, log_q_PN,
    count, span, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """log2 of the masses of each row's positives and negatives among the columns of one part."""
    row_R, part = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1)
    a1_RK, a2_RK, a3_RK = _rows(v_3ND, row_R, count, D, K)
    label_R = tl.load(labels_N + row_R, mask=row_R < count, other=0)
    largest_p_R = tl.full([R], float("-inf"), tl.float32)
    largest_q_R = tl.full([R], float("-inf"), tl.float32)
    p_R, q_R = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
    for left in range(part * span, min(part * span + span, count), J):
        column_J = left + tl.arange(0, J)
        b1_JK, b2_JK, b3_JK = _rows(v_3ND, column_J, count, D, K)
        score_RJ = _scores(a1_RK, a2_RK, a3_RK, b1_JK, b2_JK, b3_JK, shift_N, row_R, column_J, count)
        label_J = tl.load(labels_N + column_J, mask=column_J < count, other=0)
        same_RJ = label_R[:, None] == label_J[None, :]
        other_RJ = (row_R[:, None] != column_J[None, :]) & (column_J < count)[None, :]
        largest_p_R, p_R = _added(largest_p_R, p_R, score_RJ, same_RJ & other_RJ)
        largest_q_R, q_R = _added(largest_q_R, q_R, score_RJ, ~same_RJ & other_RJ)
    tl.store(log_p_PN + part * count + row_R, largest_p_R + tl.log2(p_R), mask=row_R < count)
    tl.store(log_q_PN + part * count + row_R, largest_q_R + tl.log2(q_R), mask=row_R < count)


@triton.jit
def _apply_masses(
    v_3ND, shift_N, labels_N, log_p_N, log_q_N, force_N, out_PND, sums_PN,
    count, span, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """C @ v, and the row sums of C, over the columns of one part."""
    row_R, part = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1)
    a1_RK, a2_RK, a3_RK = _rows(v_3ND, row_R, count, D, K)
    label_R = tl.load(labels_N + row_R, mask=row_R < count, other=0)
    log_p_R = tl.load(log_p_N + row_R, mask=row_R < count, other=float("inf"))
    log_q_R = tl.load(log_q_N + row_R, mask=row_R < count, other=float("inf"))
    force_R = tl.load(force_N + row_R, mask=row_R < count, other=0.0)
    out_RK, sum_R = tl.zeros([R, K], tl.float32), tl.zeros([R], tl.float32)
    for left in range(part * span, min(part * span + span, count), J):
        column_J = left + tl.arange(0, J)
        b1_JK, b2_JK, b3_JK = _rows(v_3ND, column_J, count, D, K)
        score_RJ = _scores(a1_RK, a2_RK, a3_RK, b1_JK, b2_JK, b3_JK, shift_N, row_R, column_J, count)
        label_J = tl.load(labels_N + column_J, mask=column_J < count, other=0)
        log_p_J = tl.load(log_p_N + column_J, mask=column_J < count, other=float("inf"))
        log_q_J = tl.load(log_q_N + column_J, mask=column_J < count, other=float("inf"))
        force_J = tl.load(force_N + column_J, mask=column_J < count, other=0.0)
        same_RJ = label_R[:, None] == label_J[None, :]
        own_RJ = tl.exp2(score_RJ - tl.where(same_RJ, log_p_R[:, None], log_q_R[:, None]))
        theirs_RJ = tl.exp2(score_RJ - tl.where(same_RJ, log_p_J[None, :], log_q_J[None, :]))
        c_RJ = force_R[:, None] * own_RJ + force_J[None, :] * theirs_RJ
        other_RJ = (row_R[:, None] != column_J[None, :]) & (column_J < count)[None, :]
        c_RJ = tl.where(other_RJ, tl.where(same_RJ, -c_RJ, c_RJ), 0.0)
        c1_RJ = c_RJ.to(b1_JK.dtype)
        c2_RJ = (c_RJ - c1_RJ).to(b1_JK.dtype)
        c3_RJ = (c_RJ - c1_RJ - c2_RJ).to(b1_JK.dtype)
        out_RK = _add_product(out_RK, c1_RJ, c2_RJ, c3_RJ, b1_JK, b2_JK, b3_JK)
        if sums_PN is not None:
            sum_R += tl.sum(c_RJ, 1)
    column_K = tl.arange(0, K)
    place_RK = (part * count + row_R)[:, None] * D + column_K[None, :]
    tl.store(out_PND + place_RK, out_RK, mask=(row_R < count)[:, None] & (column_K < D)[None, :])
    if sums_PN is not None:
        tl.store(sums_PN + part * count + row_R, sum_R, mask=row_R < count)
