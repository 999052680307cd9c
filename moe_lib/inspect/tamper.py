"""What routing is worth to the model: its loss when routing is tampered with, everything else as it is.

Shapes: N tokens, K slots per token, O output width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_lib.inspect.adapters import Dispatch
from moe_lib.inspect.block import Block
from moe_lib.inspect.recorder import Recorder

Loss = Callable[[Any, Any, Any], Tensor]  # (the model's output, its inputs, labels or None) -> mean loss
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # indices, weights [N, K] -> the same, tampered


def default_loss(output: Any, inputs: Any, labels: Any) -> Tensor:
    """The model's own loss, cross-entropy with the labels, or of the next token."""

    def entry(name: str, otherwise: Any = None) -> Any:
        return output.get(name) if isinstance(output, Mapping) else getattr(output, name, otherwise)

    if isinstance(own := entry("loss"), Tensor):
        return own
    logits = entry("logits", output)
    logits = logits[0] if isinstance(logits, tuple) else logits
    mapping = isinstance(inputs, Mapping)
    ids, mask = (inputs.get("input_ids"), inputs.get("attention_mask")) if mapping else (inputs, None)
    shape = logits.shape[:-1] if isinstance(logits, Tensor) else None
    next_token = isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape == shape and ids.dtype == torch.long
    if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
        labels = labels.long().where(labels >= 0, -100)
        if not next_token or bool(((labels != ids) & (labels >= 0)).any()):
            return cross_entropy(logits.flatten(0, -2).float(), labels.flatten())
    else:
        labels = ids
    if next_token:
        target = labels[:, 1:].clone()
        if isinstance(mask, Tensor):
            target[~mask[:, 1:].bool()] = -100
        return cross_entropy(logits[:, :-1].flatten(0, 1).float(), target.flatten())
    raise ValueError(
        "no loss can be made from the model's output: pass loss=, a function of (output, inputs, labels)"
    )


def drop(expert: int) -> Change:
    """One expert left out; a token's other weights are scaled to the same sum, if it has any."""

    def change(indices_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        kept_NK = weights_NK.where(indices_NK != expert, 0)
        left_N1, all_N1 = kept_NK.sum(1, keepdim=True), weights_NK.sum(1, keepdim=True)
        kept_NK = torch.where(left_N1.abs() > 1e-6, kept_NK * (all_N1 / left_N1), kept_NK)
        return indices_NK.where(indices_NK != expert, -1), kept_NK

    return change


def swap(a: int, b: int) -> Change:
    """Two experts serve each other's tokens."""

    def change(indices_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(indices_NK == a, b, torch.where(indices_NK == b, a, indices_NK)), weights_NK

    return change


def permute(seed: int) -> Change:
    """Every token gets another token's experts and weights."""

    def change(indices_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        order_N = torch.randperm(len(indices_NK), generator=draw).to(indices_NK.device)
        return indices_NK[order_N], weights_NK[order_N]

    return change


@torch.no_grad()
def costs(recorder: Recorder, run: Callable[[Any], Any], loss: Loss | None, batches: list[tuple[Any, Any]],
          every_expert: bool = False) -> tuple[float, float]:  # fmt: skip
    """The model's loss, and what permuting the routing of all blocks adds; by block: see `Block.costs`."""

    def loss_with(changes: dict[Block, Change]) -> float:
        """Mean over the batches."""

        def tampered(block: Block, seen: Dispatch, valid_N: Tensor | None) -> Tensor | None:
            if block not in changes or not seen.in_order:
                return None
            real = slice(None) if valid_N is None else valid_N  # padding stays as it is
            indices_NK, weights_NK = seen.indices_NK.clone(), seen.weights_NK.clone()
            change = changes[block]
            indices_NK[real], weights_NK[real] = change(seen.indices_NK[real], seen.weights_NK[real])
            after_NO = block.adapter.mix(seen.tokens_ND, indices_NK, weights_NK)
            return after_NO - block.adapter.mix(seen.tokens_ND, seen.indices_NK, seen.weights_NK)

        recorder.tamper = tampered
        losses = [float((loss or default_loss)(run(given), given, labels)) for given, labels in batches]
        return sum(losses) / len(losses)

    clean, permuted = loss_with({}), permute(recorder.seed)
    mixing = [b for b in recorder.blocks if b.calls and b.mixes and b.adapter.num_experts > 1]
    for block in mixing:
        first, second, *_ = block.state.finish().weight_E.argsort(descending=True).tolist()
        changes = {"permuting": permuted, "swapping": swap(first, second), "dropping": drop(first)}
        block.costs = {f"cost of {name}": loss_with({block: c}) - clean for name, c in changes.items()}
        if every_expert:
            experts = range(block.adapter.num_experts)
            block.dropped_E = [loss_with({block: drop(e)}) - clean for e in experts]
    every = loss_with(dict.fromkeys(mixing, permuted)) - clean if mixing else math.nan
    recorder.tamper = None
    return clean, every
