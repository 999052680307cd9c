"""How a mixture of experts is computed: sum_e gate_e (relu(x W1_e + b1_e) W2_e + b2_e) and its gradient.

    soft     all experts side by side are one network of width E * H whose hidden activations the gates
             weigh: outputs of single experts are never formed
    top-k    on a CPU: expert by expert, each on the rows that chose it; gradients go straight into the
             stacked weights
    blocks   top-k on a GPU: rows sorted by expert, in blocks of one expert each, and one batched product of
             as many blocks as any decision could need
    grouped  top-k on a GPU that has one product for all experts

Second derivatives come from the same operations, recorded by torch.

Shapes: N rows, D width, H expert hidden width, O output width, E experts, K chosen; F = E * H;
M = N * K choices; R rows of a block or a group of experts; P blocks; S rows of one expert; I, J widths in and
out of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lib.moe.routing import Routing
from moe_lib.products import (
    BLOCK,
    ONEDNN_FROM,
    add_product,
    at_least_float32,
    differentiable_gradient,
    on_host,
    product,
    relu_product,
    traced,
)


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
        if _has_grouped_products(experts):
            return _by_grouped_products(x_ND, routing, experts)
        if not traced():
            return (_by_expert if on_host(x_ND) else _by_blocks)(x_ND, routing, experts)
    return _soft(x_ND, routing.dense_weights().to(x_ND.dtype), experts)


def _soft(x_ND: Tensor, gate_NE: Tensor, experts: Stacked) -> Tensor:
    w1_EDH, b1_EH, w2_EHO, b2_EO = experts
    hidden_NF = torch.addmm(b1_EH.flatten(), x_ND, w1_EDH.transpose(0, 1).flatten(1)).relu()
    weighed_NEH = hidden_NF.unflatten(1, b1_EH.shape) * gate_NE[:, :, None]
    return torch.addmm(gate_NE @ b2_EO, weighed_NEH.flatten(1), w2_EHO.flatten(0, 1))


# ------------------------------------------------------------------------------------------ top-k


class _Group(NamedTuple):
    """Experts next to each other whose rows are gathered, weighed and added up together."""

    experts: slice
    places: slice  # in the list of all choices, expert by expert
    row_R: Tensor
    sizes: list[int]  # rows of each expert


def _by_expert(x_ND: Tensor, routing: Routing, experts: Stacked) -> Tensor:
    num_rows, top_k = routing.indices_NK.shape
    num_experts, hidden_dim, out_dim = experts.w2_EHO.shape
    expert_M = routing.indices_NK.flatten()  # row by row
    counts = torch.bincount(expert_M, minlength=num_experts).tolist()
    spares = [_spare(count, hidden_dim * max(x_ND.shape[1], out_dim)) for count in counts]
    by_expert = expert_M.argsort(stable=True).split(counts)
    # Spare places are filled with a choice that does not exist, M, of weight 0.
    choice_M = torch.cat(
        [
            F.pad(own_R, (0, spare), value=len(expert_M)) if spare else own_R
            for own_R, spare in zip(by_expert, spares, strict=True)
        ]
    )
    gate_M = F.pad(routing.weights_NK.flatten(), (0, 1)).index_select(0, choice_M)
    row_M = (choice_M // top_k).clamp_(max=num_rows - 1)
    sizes = [count + spare for count, spare in zip(counts, spares, strict=True)]
    groups = _groups(row_M, sizes, BLOCK // (2 * max(x_ND.shape[1], hidden_dim, out_dim)))
    return _Chosen.apply(groups, torch.is_grad_enabled(), x_ND, gate_M, *experts)


def _spare(count: int, multiplications: int) -> int:
    """What is missing to a multiple of 16, or beyond 512 to a number of 5 binary digits and zeros.

    oneDNN compiles a product anew for each shape, which takes about as long as the product itself, and the
    number of rows that choose an expert changes step by step. Small products do without it.
    """
    return -count % 2 ** max(4, count.bit_length() - 5) if count * multiplications >= ONEDNN_FROM else 0


def _groups(row_M: Tensor, sizes: list[int], most: int) -> list[_Group]:
    """As many experts in a group as have `most` rows together, one at least."""
    groups, first, start = [], 0, 0
    for last in range(len(sizes)):
        stop = start + sum(sizes[first : last + 1])
        if last + 1 == len(sizes) or stop - start + sizes[last + 1] > most:
            places = slice(start, stop)
            groups.append(_Group(slice(first, last + 1), places, row_M[places], sizes[first : last + 1]))
            first, start = last + 1, stop
    return groups


class _Chosen(torch.autograd.Function):
    """`gate_M`: the weights of all choices, expert by expert."""

    @staticmethod
    def forward(
        ctx: Any, groups: Sequence[_Group], keep: bool, x_ND: Tensor, gate_M: Tensor, *weights: Tensor
    ) -> Tensor:
        kept: list[Tensor] | None = [] if keep else None
        out_NO = _chosen(groups, kept, x_ND, gate_M, *weights)
        ctx.groups = groups
        ctx.save_for_backward(x_ND, gate_M, *weights, *(kept or ()))
        return out_NO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_M, w1_EDH, b1_EH, w2_EHO, b2_EO, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for
            inputs = (ctx.groups, None, x_ND, gate_M, w1_EDH, b1_EH, w2_EHO, b2_EO)
            return differentiable_gradient(_chosen, inputs, grads[0])
        grad_NO = grads[0]
        dx_ND, dgate_M = torch.zeros_like(x_ND), torch.empty_like(gate_M)
        for_weights = any(ctx.needs_input_grad[4:])
        dw1_EDH, db1_EH, dw2_EHO, db2_EO = map(torch.zeros_like, (w1_EDH, b1_EH, w2_EHO, b2_EO))
        for (experts, places, row_R, sizes), hidden_RH, out_RO in zip(
            ctx.groups, kept[::2], kept[1::2], strict=True
        ):
            grad_RO = grad_NO.index_select(0, row_R)
            dgate_M[places] = (grad_RO * out_RO).sum(1)
            grad_RO.mul_(gate_M[places, None])
            d_RH = _each(product, grad_RO.split(sizes), w2_EHO[experts].mT)
            _mask(d_RH, hidden_RH)
            dx_ND.index_add_(0, row_R, _each(product, d_RH.split(sizes), w1_EDH[experts].mT))
            if for_weights:
                x_RD = x_ND.index_select(0, row_R)
                for in_RI, d_RJ, dw_EIJ, db_EJ in (
                    (x_RD, d_RH, dw1_EDH, db1_EH),
                    (hidden_RH, grad_RO, dw2_EHO, db2_EO),
                ):
                    rows_of_each = in_RI.split(sizes), d_RJ.split(sizes)
                    for in_SI, d_SJ, dw_IJ, db_J in zip(
                        *rows_of_each, dw_EIJ[experts], db_EJ[experts], strict=True
                    ):
                        add_product(dw_IJ, in_SI.T, d_SJ)
                        torch.sum(d_SJ, 0, out=db_J)
        dweights = (dw1_EDH, db1_EH, dw2_EHO, db2_EO) if for_weights else (None,) * 4
        return None, None, dx_ND, dgate_M, *dweights


def _chosen(
    groups: Sequence[_Group],
    kept: list[Tensor] | None,
    x_ND: Tensor,
    gate_M: Tensor,
    w1_EDH: Tensor,
    b1_EH: Tensor,
    w2_EHO: Tensor,
    b2_EO: Tensor,
) -> Tensor:
    """[N, O]; adds what a backward pass needs to `kept`."""
    sum_NO = at_least_float32(x_ND.new_zeros(len(x_ND), b2_EO.shape[1]))
    for experts, places, row_R, sizes in groups:
        x_RD = x_ND.index_select(0, row_R)
        hidden_RH = _each(relu_product, x_RD.split(sizes), w1_EDH[experts], b1_EH[experts])
        out_RO = _each(product, hidden_RH.split(sizes), w2_EHO[experts], b2_EO[experts])
        sum_NO.index_add_(0, row_R, (gate_M[places, None] * out_RO).to(sum_NO.dtype))
        if kept is not None:
            kept += [hidden_RH, out_RO]
    return sum_NO.to(x_ND.dtype)


def _mask(d_RF: Tensor, hidden_RF: Tensor) -> None:
    """The derivative of a ReLU with these outputs, in place."""
    torch.ops.aten.threshold_backward.grad_input(d_RF, hidden_RF, 0, grad_input=d_RF)


def _each(function: Callable[..., Tensor], parts: Sequence[Tensor], *weights: Tensor) -> Tensor:
    """Each expert's rows by its own weights, one below the other."""
    found = [function(*one) for one in zip(parts, *weights, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found)


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
    """Each row's outputs, weighted: [N, O], summed in the weights' type."""
    gate_M1 = routing.weights_NK.flatten().index_select(0, choices.order_M)[:, None]
    sum_NO = gate_M1.new_zeros(len(routing.indices_NK), out_MO.shape[1])
    return sum_NO.index_add(0, choices.row_M, gate_M1 * out_MO)


def _has_grouped_products(experts: Stacked) -> bool:
    """On a Hopper GPU or later, in bfloat16, with rows of whole 16 bytes."""
    w1_EDH, _, w2_EHO, _ = experts
    whole = not any(size % 8 for size in (*w1_EDH.shape[1:], w2_EHO.shape[2]))
    fits = whole and w1_EDH.is_cuda and w1_EDH.dtype == torch.bfloat16
    return fits and torch.cuda.get_device_capability(w1_EDH.device) >= (9, 0)


def _by_grouped_products(x_ND: Tensor, routing: Routing, experts: Stacked) -> Tensor:
    """One product for all experts; sizes stay on the device, so nothing waits for it."""
    choices = _sorted_choices(routing, len(experts.b1_EH))
    ends_E = choices.ends_E.to(torch.int32)
    hidden_MH = F.grouped_mm(x_ND.index_select(0, choices.row_M), experts.w1_EDH, offs=ends_E)
    hidden_MH = (hidden_MH + experts.b1_EH.index_select(0, choices.expert_M)).relu()
    out_MO = F.grouped_mm(hidden_MH, experts.w2_EHO, offs=ends_E)
    out_MO = out_MO + experts.b2_EO.index_select(0, choices.expert_M)
    return _combined(out_MO, routing, choices).to(x_ND.dtype)
