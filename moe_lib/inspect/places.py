"""Padding, labels and positions of the tokens that a block reads.

Shapes: N tokens of one call, B sequences, T positions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_lib.inspect.adapters import parameter_names
from moe_lib.inspect.block import Block
from moe_lib.inspect.state import Place


def by_name(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """A model's inputs by its forward's parameter names; a wrapper's by those of the model inside."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    given = inputs if isinstance(inputs, tuple | list) else (inputs,)
    return dict(zip(parameter_names(getattr(model, "module", model)), given, strict=False))


def real(mask: Tensor | None) -> Tensor | None:
    """True for tokens, False for padding, from a mask to multiply with, or one to add (0 and below)."""
    if mask is None or mask.dtype == torch.bool or not mask.numel():
        return mask
    if mask.is_floating_point() and bool((mask <= 0).all()):
        return mask == 0
    if bool((mask < 0).any()) or (mask.is_floating_point() and bool(((mask != 0) & (mask != 1)).any())):
        raise ValueError(
            f"attention_mask holds values from {mask.min():g} to {mask.max():g}: give 1 for tokens and 0 for "
            "padding, or what is added to scores, 0 for tokens and less for padding"
        )
    return mask != 0


class Stream:
    """The batch in progress, and how far the data have been read."""

    def __init__(self, sequence_first: bool | None) -> None:
        self.sequence_first = sequence_first
        self.num_calls = 0  # of the model
        self.labels: Tensor | None = None
        self.decoder_labels: Tensor | None = None  # of an encoder-decoder's second half
        self.masks: dict[bool, Tensor | None] = {}  # of a decoder's second half: True
        self.batch_shape: tuple[int, ...] = ()
        self.encoder_decoder = False
        self.places: dict[Any, tuple[Place, list[str]]] = {}  # of this batch, and what is to be noted
        self.read: Counter[str] = Counter()  # tokens of this batch, by block

    def starts(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """The model is called: what its arguments say about the tokens."""
        whole = len(args) == 1 and isinstance(args[0], Mapping)
        named = by_name(model, args[0] if whole else args) | kwargs
        given = [named.get("input_ids"), *named.values()]
        first = next((value for value in given if isinstance(value, Tensor)), None)
        self.batch_shape = () if first is None else tuple(first.shape)
        self.masks = {}
        self.encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.num_calls += 1
        self.places, self.read = {}, Counter()
        for decoder, name in ((False, "attention_mask"), (True, "decoder_attention_mask")):
            mask = named.get(name)  # of some models a mapping, or an object of its own kind
            self.masks[decoder] = real(mask) if isinstance(mask, Tensor) else None

    def place(self, block: Block, own: Tensor, num_tokens: int) -> Place:
        """Of the tokens that a block reads, given its first input."""
        decoder = self.encoder_decoder and "decoder" in block.name
        key = (num_tokens, own.shape[:2] if own.ndim == 3 else None, block.width_BT, decoder, own.device)
        if key not in self.places:
            self.places[key] = self._place(block, own, num_tokens, decoder)
        place, notes = self.places[key]
        block.notes |= dict.fromkeys(notes)
        start = (self.num_calls << 24) + self.read[block.name]  # a block may be called several times
        self.read[block.name] += num_tokens
        return place._replace(position_N=start + torch.arange(num_tokens))

    def _place(self, block: Block, own: Tensor, num_tokens: int, decoder: bool) -> tuple[Place, list[str]]:
        notes: list[str] = []
        mask, labels = self.masks.get(decoder), self.decoder_labels if decoder else self.labels
        if mask is not None and mask.ndim != 2:
            notes.append("the attention mask is not [B, T]: padding is not told apart")
            mask = None
        num_rows, first = self.batch_shape[0] if self.batch_shape else None, self.sequence_first
        shapes = [(own.shape[0], own.shape[1]) if own.ndim == 3 else None, block.width_BT]
        shape = next((s for s in shapes if s is not None and s[0] * s[1] == num_tokens), None)
        if shape is None:
            table = labels if mask is None and labels is not None and labels.ndim == 2 else mask
            size = num_rows if table is None else len(table)
            if size and num_tokens % size == 0 and num_tokens > size:
                shape = (num_tokens // size, size) if first else (size, num_tokens // size)
                if first is None:
                    notes.append("the block reads tokens [N, D]: taken as sequences of one length, one after "
                                 "the other; else give labels [N]")  # fmt: skip
        if first is None and shape is not None and num_rows is not None:
            first = shape[0] != num_rows and shape[1] == num_rows
            if first:
                notes.append("sequence-first: the block reads tokens as [T, B]")
            elif shape == (num_rows, num_rows):
                notes.append("T equals B: taken as batch-first; say sequence_first")
        size, length = (num_tokens, 1) if shape is None else (shape[1], shape[0]) if first else shape
        known = None if mask is None or shape is None else mask
        valid_N, labels_N = (self._aligned(t, size, length, bool(first)) for t in (known, labels))
        batch = self.batch_shape[:2]
        fit = [batch, batch[::-1], batch[:1], batch[1:], (math.prod(batch),)]
        if labels is not None and labels_N is None and tuple(labels.shape) not in fit:  # nor the batch
            raise ValueError(
                f"labels {tuple(labels.shape)} do not fit the tokens of block {block.name!r}, {size} "
                f"sequences of {length}: give [B, T], [B] or [N], sequence_first=True for [T, B], "
                "or labels=lambda inputs: None for no labels"
            )
        for what, given, found in (("padding", mask, valid_N), ("labels", labels, labels_N)):
            if given is not None and found is None:
                length = 1  # nor is known where sequences end
                notes.append(f"{what} {list(given.shape)} cannot be told apart among its {num_tokens} tokens")
        follows_N = None
        if length > 1 and not first:
            follows_N = torch.arange(1, num_tokens + 1) % length > 0
        place = [None if v is None else v.to(own.device) for v in (valid_N, labels_N, None, follows_N)]
        return Place(*place), notes

    def _aligned(self, given: Tensor | None, size: int, length: int, first: bool) -> Tensor | None:
        """[N] in the order of the block's tokens, from [B, T], [B] or [N]; None: it reads other tokens."""
        step = self.batch_shape[1] if len(self.batch_shape) > 1 else None
        if given is None:
            return None
        if given.ndim == 1 and len(given) == size:
            table_BT = given[:, None].expand(size, length)
        elif given.ndim == 1 and len(given) == size * length:
            return given
        elif given.shape == (size, length):
            table_BT = given
        elif given.ndim == 2 and len(given) == size and given.shape[1] > length == step:
            table_BT = given[:, -length:]  # decoding with a cache: the newest tokens
        elif first and given.shape == (length, size):
            return given.flatten()
        else:
            return None
        return (table_BT.T if first else table_BT).flatten()
