"""The scaling matrices of the Adaptive Clustering (AC) router: how tightly clusters sit along each feature.

A cluster holds the tokens that one expert was given by the MoE layer before. Its scaling matrix M is
diagonal, and large along the features on which the cluster is tight.

Source: Nielsen, Teo, Abdullaev, Nguyen, "Tight Clusters Make Specialized Experts", ICLR 2025 (arXiv
2502.15315) and its public code.

Shapes: N tokens, D width, E experts, and so clusters.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lib import parallel
from moe_lib.checks import (
    check_count,
    check_floating,
    check_labels,
    check_number,
    check_option,
    readable,
)
from moe_lib.products import at_least_float32, on_host, traced

Dispersion = Literal["mad", "variance"]
Normalize = Literal["feature", "row", "global", "none"]


def adaptive_scales(
    tokens_ND: Tensor,
    assignment_N: Tensor,
    num_experts: int,
    dispersion: Dispersion = "mad",
    eps: float = 1e-4,
    normalize: Normalize = "feature",
    max_ratio: float | None = 10.0,
) -> Tensor:
    """How tightly each cluster of tokens sits along each feature: row k is the diagonal of its
    scaling matrix M_k.

    With s_kq the dispersion of cluster k along feature q,

        W_kq = 1 / (s_kq + eps),    m = mean of W,    W = min(W, max_ratio * m),

    then divided as `normalize` says. The defaults are the form of the authors' language models; that of
    their Swin models is normalize="global", max_ratio=1.5. In their code a cluster of 0 or 1 tokens has
    dispersion 0, hence an enormous W that shrinks all others. Here only clusters of 2 tokens or more are
    valid: means run over these alone, and the row of any other is ones (under "none", where rows have no
    common scale, it is m; 1 if no cluster is valid).

    Differentiable in the tokens; a caller detaches them where M is to be a constant.

    Args:
        tokens_ND: [N, D]. Sub-float32 types are computed in float32, also under autocast.
        assignment_N: [N] clusters of any integer type, 0 to `num_experts` - 1.
        num_experts: E, the number of clusters.
        dispersion: "mad", the mean absolute deviation from the cluster's mean, or "variance" (biased).
        eps: at least 0; 0 asks that every feature varies within every valid cluster.
        normalize: "feature" divides W by its mean over valid clusters, "row" by its mean over features,
            "global" by m (taken before the limit), "none" by nothing.
        max_ratio: the limit on W as a multiple of m; None for no limit.

    Returns:
        [E, D] scales, positive.

    Raises:
        ValueError: shapes or an option are unusable, or (checked on the CPU only: on a GPU it would wait
            for the device) an assignment lies outside 0 to E - 1.
    """
    check_count(num_experts, "num_experts")
    check_scale_options(dispersion, eps, normalize, max_ratio)
    check_floating(tokens_ND, "tokens", "N, D")
    assignment_N = check_labels(
        assignment_N, tokens_ND.shape[0], num_experts, name="assignment", like=tokens_ND
    )
    with torch.autocast(tokens_ND.device.type, enabled=False):
        dispersion_ED, valid_E = cluster_dispersion(
            at_least_float32(tokens_ND), assignment_N, num_experts, dispersion
        )
        scales_ED = scales_of_dispersion(dispersion_ED, valid_E, eps, normalize, max_ratio)
        if readable(tokens_ND):
            if not dispersion_ED.isfinite().all():
                raise ValueError(f"tokens are too large: their dispersion leaves {dispersion_ED.dtype}")
            if eps == 0 and ((dispersion_ED[valid_E] == 0).any() or not scales_ED.isfinite().all()):
                raise ValueError("eps must be positive where a feature hardly varies within a cluster, got 0")
        return scales_ED


def check_scale_options(dispersion: str, eps: float, normalize: str, max_ratio: float | None) -> None:
    check_option(dispersion, "dispersion", get_args(Dispersion))
    check_option(normalize, "normalize", get_args(Normalize))
    check_number(eps, "eps", least=0)
    if max_ratio is not None:
        check_number(max_ratio, "max_ratio", least=0, above=True)


def cluster_dispersion(
    tokens_ND: Tensor, assignment_N: Tensor, num_experts: int, dispersion: Dispersion
) -> tuple[Tensor, Tensor]:
    """[E, D] dispersion of each cluster, 0 if empty, and [E] whether it has the 2 tokens that this takes."""
    if on_host(tokens_ND) and not traced() and not parallel.active():
        count_E = torch.bincount(assignment_N, minlength=num_experts)
        order_N, starts_E = assignment_N.argsort(stable=True), count_E.cumsum(0) - count_E

        def means(x_ND: Tensor) -> Tensor:
            return F.embedding_bag(order_N, x_ND, starts_E, mode="mean")

        def spread(x_ED: Tensor) -> Tensor:
            return x_ED.index_select(0, assignment_N)
    else:
        # Products with the one-hot assignment: shapes depend on no value, nothing waits for the device, and
        # (unlike atomic adds) a GPU repeats them to the last digit.
        clusters_E = torch.arange(num_experts, device=assignment_N.device)
        member_NE = (assignment_N[:, None] == clusters_E).to(tokens_ND.dtype)
        count_E = parallel.total(member_NE.sum(0))
        share_EN = (member_NE / count_E.clamp(min=1)).T

        def means(x_ND: Tensor) -> Tensor:
            return parallel.total(share_EN @ x_ND)

        def spread(x_ED: Tensor) -> Tensor:
            return member_NE @ x_ED

    away_ND = spread(means(tokens_ND)).sub_(tokens_ND)  # in place, of any sign: one [N, D] is held
    return means(away_ND.abs_() if dispersion == "mad" else away_ND.square_()), count_E >= 2


def scales_of_dispersion(
    dispersion_ED: Tensor, valid_E: Tensor, eps: float, normalize: Normalize, max_ratio: float | None
) -> Tensor:
    """The second half of `adaptive_scales`, after `cluster_dispersion`."""
    valid_E1 = valid_E[:, None]
    one = dispersion_ED.new_ones(())
    # Masked before the reciprocal: afterwards, with eps = 0, an infinity would survive as 0 * inf.
    scales_ED = 1 / (dispersion_ED + eps).where(valid_E1, one)
    # If no cluster is valid, all rows are ones by now, and the means run over them.
    counted_E1 = (valid_E1 | ~valid_E.any()).to(scales_ED.dtype)
    share_E1 = counted_E1 / counted_E1.sum()
    mean = (share_E1 * scales_ED).sum(0).mean()
    if max_ratio is not None:
        scales_ED = torch.minimum(scales_ED, max_ratio * mean)
    if normalize == "feature":
        scales_ED = scales_ED / (share_E1 * scales_ED).sum(0)
    elif normalize == "row":
        scales_ED = scales_ED / scales_ED.mean(1, keepdim=True)
    elif normalize == "global":
        scales_ED = scales_ED / mean
    return scales_ED.where(valid_E1, mean if normalize == "none" else one)
