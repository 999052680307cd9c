"""How a mixture of experts is computed: sum_e gate_e (relu(x W1_e + b1_e) W2_e + b2_e) and its gradient.

    soft     all experts side by side are one network of width E * H whose hidden activations the gates
             weigh: outputs of single experts are never formed; on a CPU whose cache that would not fit,
             expert by expert
    top-k    on a CPU: expert by expert, each on the rows that chose it
    blocks   top-k on a GPU: rows sorted by expert, in blocks of one expert each, and one batched product of
             as many blocks as any decision could need
    grouped  top-k by one product for all experts: on a GPU that has it; on a CPU in bfloat16, or with few
             rows an expert

Shapes: N rows, D width, H expert hidden width, O output width, E experts, K chosen; F = E * H;
M = N * K choices; R rows of a block or of one expert; P blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lib.moe.routing import Routing
from moe_lib.products import at_least_float32, on_host, traced

CACHED = 2**18  # hidden activations of all experts, on a CPU
FEW_ROWS = 128  # an expert's, on a CPU


class Stacked(NamedTuple):
    """Weights of E two-layer networks."""

    w1_EDH: Tensor
    b1_EH: Tensor
    w2_EHO: Tensor
    b2_EO: Tensor


def mixture(x_ND: Tensor, routing: Routing, experts: Stacked) -> Tensor:
    """Each row's experts, weighted as its decision says: [N, O].

    While torch.compile, torch.export or torch.func is at work, every expert runs on every row (but for the
    grouped form), since no shape may depend on the decisions: E / K times the products.
    """
    device = x_ND.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_ND, experts = x_ND.to(dtype), Stacked(*(weight.to(dtype) for weight in experts))
    if routing.indices_NK.shape[1] < len(experts.b1_EH):
        if _has_grouped_products(experts, routing.indices_NK.numel()):
            return _by_grouped_products(x_ND, routing, experts)
        if not traced():
            return (_by_expert if on_host(x_ND) else _by_blocks)(x_ND, routing, experts)
    return _soft(x_ND, routing.dense_weights().to(x_ND.dtype), experts)


def _soft(x_ND: Tensor, gate_NE: Tensor, experts: Stacked) -> Tensor:
    w1_EDH, b1_EH, w2_EHO, b2_EO = experts
    if on_host(x_ND) and not traced() and len(x_ND) * b1_EH.numel() > CACHED:
        out_NO = at_least_float32(gate_NE @ b2_EO)
        for gate_N, w1_DH, b1_H, w2_HO in zip(gate_NE.T, w1_EDH, b1_EH, w2_EHO, strict=True):
            out_NO += gate_N[:, None] * (torch.addmm(b1_H, x_ND, w1_DH).relu_() @ w2_HO)
        return out_NO.to(x_ND.dtype)
    hidden_NF = torch.addmm(b1_EH.flatten(), x_ND, w1_EDH.transpose(0, 1).flatten(1)).relu()
    weighed_NEH = hidden_NF.unflatten(1, b1_EH.shape) * gate_NE[:, :, None]
    return torch.addmm(gate_NE @ b2_EO, weighed_NEH.flatten(1), w2_EHO.flatten(0, 1))


# ------------------------------------------------------------------------------------------ top-k


def _by_expert(x_ND: Tensor, routing: Routing, experts: Stacked) -> Tensor:
    """Each expert's rows through its own network."""
    choices = _sorted_choices(routing, len(experts.b1_EH))
    sizes = choices.ends_E.diff(prepend=choices.ends_E.new_zeros(1)).tolist()
    rows = x_ND.index_select(0, choices.row_M).split(sizes)
    out_MO = torch.cat(
        [
            torch.addmm(b2_O, torch.addmm(b1_H, x_RD, w1_DH).relu_(), w2_HO)
            for x_RD, w1_DH, b1_H, w2_HO, b2_O in zip(rows, *map(torch.unbind, experts), strict=True)
        ]
    )
    return _combined(out_MO, routing, choices).to(x_ND.dtype)


# ----------------------------------------------------------------- on a GPU: no size hangs on a decision


def _by_blocks(x_ND: Tensor, routing: Routing, experts: Stacked) -> Tensor:
    """Sizes are those that any decision would need, so that nothing waits for the device."""
    num_experts, choices = len(experts.b1_EH), _sorted_choices(routing, len(experts.b1_EH))
    # A quarter of an expert's fair share: at most a quarter more rows than choices, at equal loads.
    num_rows = max(16, 1 << max(0, (len(choices.expert_M) // (4 * num_experts)).bit_length() - 1))
    num_blocks = len(choices.expert_M) // num_rows + num_experts
    starts_E = F.pad(choices.ends_E[:-1], (1, 0))
    blocks_E = (choices.ends_E - starts_E + num_rows - 1) // num_rows
    last_E = blocks_E.cumsum(0)  # the block after an expert's last one
    expert_P = torch.searchsorted(last_E, torch.arange(num_blocks, device=x_ND.device), right=True)
    expert_P = expert_P.clamp(max=num_experts - 1)  # of blocks that stay empty
    shift_E = (last_E - blocks_E) * num_rows - starts_E
    place_M = torch.arange(len(choices.expert_M), device=x_ND.device) + shift_E[choices.expert_M]
    filled = x_ND.new_zeros(num_blocks * num_rows, x_ND.shape[1])
    filled = filled.index_copy(0, place_M, x_ND.index_select(0, choices.row_M))
    w1_PDH, b1_PH, w2_PHO, b2_PO = (weight.index_select(0, expert_P) for weight in experts)
    hidden_PRH = torch.baddbmm(b1_PH[:, None], filled.unflatten(0, (num_blocks, num_rows)), w1_PDH).relu()
    out_PRO = torch.baddbmm(b2_PO[:, None], hidden_PRH, w2_PHO)
    return _combined(out_PRO.flatten(0, 1).index_select(0, place_M), routing, choices).to(x_ND.dtype)


class _Choices(NamedTuple):
    """All choices, expert by expert."""

    expert_M: Tensor
    order_M: Tensor  # place among the choices row by row
    row_M: Tensor
    ends_E: Tensor  # one behind each expert's last


def _sorted_choices(routing: Routing, num_experts: int) -> _Choices:
    expert_M, order_M = routing.indices_NK.flatten().sort(stable=True)
    numbers_E = torch.arange(num_experts, device=expert_M.device)
    ends_E = torch.searchsorted(expert_M, numbers_E, right=True)
    return _Choices(expert_M, order_M, order_M // routing.indices_NK.shape[1], ends_E)


def _combined(out_MO: Tensor, routing: Routing, choices: _Choices) -> Tensor:
    """Each row's outputs, weighted: [N, O], summed in the wider of both types."""
    weighed_MO = routing.weights_NK.flatten().index_select(0, choices.order_M)[:, None] * out_MO
    sum_NO = weighed_MO.new_zeros(len(routing.indices_NK), out_MO.shape[1])
    return sum_NO.index_add_(0, choices.row_M, weighed_MO)


def _has_grouped_products(experts: Stacked, choices: int) -> bool:
    """Where one product for all experts is there and pays, with rows of whole 16 bytes.

    In bfloat16 on a CPU and on a Hopper GPU or later; in float32 on a CPU where the experts have few rows
    each: there the calls of single products cost more than the products.
    """
    w1_EDH, b1_EH, w2_EHO, _ = experts
    if traced() and on_host(w1_EDH):
        return False
    if any(size * w1_EDH.element_size() % 16 for size in (*w1_EDH.shape[1:], w2_EHO.shape[2])):
        return False
    if w1_EDH.is_cuda:
        return w1_EDH.dtype == torch.bfloat16 and torch.cuda.get_device_capability(w1_EDH.device) >= (9, 0)
    if not on_host(w1_EDH) or choices == 0:
        return False
    few = choices <= FEW_ROWS * len(b1_EH)
    return w1_EDH.dtype == torch.bfloat16 or (few and w1_EDH.dtype == torch.float32)


def _by_grouped_products(x_ND: Tensor, routing: Routing, experts: Stacked) -> Tensor:
    """One product for all experts; sizes stay on the device, so nothing waits for it."""
    choices = _sorted_choices(routing, len(experts.b1_EH))
    ends_E = choices.ends_E.to(torch.int32)
    hidden_MH = F.grouped_mm(x_ND.index_select(0, choices.row_M), experts.w1_EDH, offs=ends_E)
    hidden_MH.add_(experts.b1_EH.index_select(0, choices.expert_M)).relu_()
    out_MO = F.grouped_mm(hidden_MH, experts.w2_EHO, offs=ends_E)
    out_MO.add_(experts.b2_EO.index_select(0, choices.expert_M))
    return _combined(out_MO, routing, choices).to(x_ND.dtype)
