"""What routing is worth to the model: its loss when routing is tampered with, everything else as it is.

Shapes: N tokens, K slots per token, O output width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_lib.inspect.adapters import Dispatch
from moe_lib.inspect.block import Block
from moe_lib.inspect.recorder import Recorder

Loss = Callable[[Any, Any, Any], Tensor]  # (the model's output, its inputs, labels or None) -> mean loss
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # indices, weights [N, K] -> the same, tampered


def default_loss(output: Any, inputs: Any, labels: Any) -> Tensor:
    """The model's own loss, cross-entropy with the labels, or of the next token."""
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, tuple):
        logits = logits[0]
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if isinstance(logits, Tensor) and isinstance(labels, Tensor) and logits.shape[:-1] == labels.shape:
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100
        )
    if (
        isinstance(logits, Tensor)
        and isinstance(ids, Tensor)
        and logits.shape[:-1] == ids.shape
        and ids.ndim == 2
    ):
        target = ids[:, 1:].clone()
        if isinstance(inputs, Mapping) and isinstance(mask := inputs.get("attention_mask"), Tensor):
            target[~mask[:, 1:].bool()] = -100
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target.flatten())
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


class Tamper:
    """Runs the model with one change of routing in the named blocks."""

    def __init__(self, recorder: Recorder, run: Callable[[Any], Any], loss: Loss | None) -> None:
        self.recorder, self.run = recorder, run
        self.loss = default_loss if loss is None else loss

    @torch.no_grad()
    def loss_with(self, batches: list[tuple[Any, Any]], changes: dict[str, Change]) -> float:
        """Mean loss; `changes` by block name."""

        def tampered(block: Block, seen: Dispatch, valid_N: Tensor | None) -> Tensor | None:
            if (change := changes.get(block.name)) is None:
                return None
            real = slice(None) if valid_N is None else valid_N  # padding stays as it is
            indices_NK, weights_NK = seen.indices_NK.clone(), seen.weights_NK.clone()
            indices_NK[real], weights_NK[real] = change(seen.indices_NK[real], seen.weights_NK[real])
            after_NO = block.adapter.mix(seen.tokens_ND, indices_NK, weights_NK)
            return after_NO - block.adapter.mix(seen.tokens_ND, seen.indices_NK, seen.weights_NK)

        self.recorder.tamper = tampered if changes else None
        self.recorder.on = bool(changes)
        try:
            losses = [float(self.loss(self.run(inputs), inputs, labels)) for inputs, labels in batches]
        finally:
            self.recorder.tamper, self.recorder.on = None, True
        return sum(losses) / len(losses)

    def costs(
        self, batches: list[tuple[Any, Any]], every_expert: bool = False, seed: int = 0
    ) -> dict[str, dict[str, Any]]:
        """By block: increase of the loss, nats, when its routing is permuted, its two most used experts are
        swapped, or its most used expert is dropped; with `every_expert` the cost of dropping each."""
        clean = self.loss_with(batches, {})
        found: dict[str, dict[str, Any]] = {}
        for block in self.recorder.blocks:
            if not block.calls or not block.adapter.mixes or block.adapter.num_experts < 2:
                continue
            order = block.state.finish().weight_E.argsort(descending=True).tolist()
            trials = {"permuted": permute(seed), "swapped": swap(*order[:2]), "dropped": drop(order[0])}
            found[block.name] = {
                name: self.loss_with(batches, {block.name: change}) - clean for name, change in trials.items()
            }
            if every_expert:
                found[block.name]["dropped_E"] = [
                    self.loss_with(batches, {block.name: drop(e)}) - clean
                    for e in range(block.adapter.num_experts)
                ]
        everywhere = {name: permute(seed) for name in found}
        found[""] = {"loss": clean, "permuted": self.loss_with(batches, everywhere) - clean}
        return found
