"""Padding, labels and positions of the tokens that a block reads.

Shapes: N tokens of one call, B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_lib.inspect.block import Block
from moe_lib.inspect.state import Place


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

    def starts(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """The model is called: what its arguments say about the tokens."""
        given = [kwargs.get("input_ids"), *args, *kwargs.values()]
        if len(args) == 1 and isinstance(args[0], Mapping):
            kwargs = {**args[0], **kwargs}
            given = [kwargs.get("input_ids"), *kwargs.values()]
        first = next((value for value in given if isinstance(value, Tensor)), None)
        self.batch_shape = () if first is None else tuple(first.shape)
        self.masks = {False: kwargs.get("attention_mask"), True: kwargs.get("decoder_attention_mask")}
        self.encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.num_calls += 1
        self.places = {}

    def place(self, block: Block, own: Tensor, num_tokens: int) -> Place:
        """Of the tokens that a block reads, given its first input."""
        decoder = self.encoder_decoder and "decoder" in block.name
        key = (num_tokens, own.shape[:2] if own.ndim == 3 else None, block.width_BT, decoder, own.device)
        if key not in self.places:
            self.places[key] = self._place(block, own, num_tokens, decoder)
        place, notes = self.places[key]
        block.notes |= dict.fromkeys(notes)
        return place

    def _place(self, block: Block, own: Tensor, num_tokens: int, decoder: bool) -> tuple[Place, list[str]]:
        notes: list[str] = []
        mask, labels = self.masks.get(decoder), self.decoder_labels if decoder else self.labels
        if mask is not None and mask.ndim != 2:
            notes.append("the attention mask is not [B, T]: padding is not told apart")
            mask = None
        batch, first = self.batch_shape[0] if self.batch_shape else None, self.sequence_first
        shapes = [(own.shape[0], own.shape[1]) if own.ndim == 3 else None, block.width_BT]
        shape = next((s for s in shapes if s is not None and s[0] * s[1] == num_tokens), None)
        if shape is None:
            table = labels if mask is None and labels is not None and labels.ndim == 2 else mask
            size = batch if table is None else len(table)
            if size and num_tokens % size == 0 and num_tokens > size:
                shape = (num_tokens // size, size) if first else (size, num_tokens // size)
                if first is None:
                    notes.append("the block reads tokens [N, D]: taken as sequence after sequence")
        if first is None and shape is not None and batch is not None:
            first = shape[0] != batch and shape[1] == batch
            if first:
                notes.append("sequence-first: the block reads tokens as [T, B]")
            elif shape == (batch, batch):
                notes.append("T equals B: taken as batch-first; say sequence_first")
        size, length = (num_tokens, 1) if shape is None else (shape[1], shape[0]) if first else shape
        follows_N = None
        if length > 1 and not first:
            follows_N = (torch.arange(1, num_tokens + 1) % length > 0).to(own.device)
        valid_N = labels_N = None
        if mask is not None and shape is not None:
            valid_N = self._aligned(block, mask, size, length, bool(first), "attention mask")
            valid_N = valid_N.bool().to(own.device)
        if labels is not None:
            labels_N = self._aligned(block, labels, size, length, bool(first), "labels").to(own.device)
        position_N = (self.num_calls << 24) + torch.arange(num_tokens)
        return Place(valid_N, labels_N, position_N, follows_N), notes

    def _aligned(self, block: Block, given: Tensor, size: int, length: int, first: bool, what: str) -> Tensor:
        """[N] in the order of the block's tokens, from [B, T], [B] or [N]."""
        step = self.batch_shape[1] if len(self.batch_shape) > 1 else None
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
            raise ValueError(
                f"{what} {tuple(given.shape)} do not fit the tokens of block {block.name!r}, "
                f"{size} sequences of {length}: give [B, T], [B] or [N], or sequence_first=True for [T, B]"
            )
        return (table_BT.T if first else table_BT).flatten()
