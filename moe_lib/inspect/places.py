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


def _like_a_mask(name: str, value: Any, shape: tuple[int, ...]) -> bool:
    known = name in ("attention_mask", "decoder_attention_mask")
    named = "mask" in name or "pad" in name
    return (
        named and not known and isinstance(value, Tensor) and tuple(value.shape) == shape and len(shape) == 2
    )


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
        self.read: Counter[str] = Counter()  # tokens of this batch, by block
        self.ignored = ""  # an argument that may say what is padding

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
        self.read = Counter()
        masks = [name for name, value in named.items() if _like_a_mask(name, value, self.batch_shape[:2])]
        self.ignored = next(iter(masks), "")
        for decoder, name in ((False, "attention_mask"), (True, "decoder_attention_mask")):
            mask = named.get(name)  # of some models a mapping, or an object of its own kind
            self.masks[decoder] = real(mask) if isinstance(mask, Tensor) else None

    def place(self, block: Block, own: Tensor, num_tokens: int) -> Place:
        """Of the tokens that a block reads, given its first input."""
        decoder = self.encoder_decoder and "decoder" in block.name
        mask, labels = self.masks.get(decoder), self.decoder_labels if decoder else self.labels
        if self.ignored:
            block.note(f"padding is told apart by `attention_mask` alone: {self.ignored!r} was not used")
        if mask is not None and mask.ndim != 2:
            block.note("the attention mask is not [B, T]: padding is not told apart")
            mask = None
        table = labels if mask is None and labels is not None and labels.ndim == 2 else mask
        shape, first = self._layout(block, own, num_tokens, table)
        size, length = shape or (num_tokens, 1)
        if first:
            size, length = length, size
        valid_N = None if shape is None else self._aligned(mask, size, length, first)
        labels_N = self._aligned(labels, size, length, first)
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
                block.note(f"{what} {list(given.shape)} cannot be told apart among its {num_tokens} tokens")
        start = (self.num_calls << 24) + self.read[block.name]  # a block may be called several times
        self.read[block.name] += num_tokens
        place_N = torch.arange(num_tokens)
        follows_N = (place_N + 1) % length > 0 if length > 1 and not first else None
        known = (None if v is None else v.to(own.device) for v in (valid_N, labels_N, follows_N))
        valid_N, labels_N, follows_N = known
        return Place(valid_N, labels_N, start + place_N, follows_N)

    def _layout(
        self, block: Block, own: Tensor, num_tokens: int, table: Tensor | None
    ) -> tuple[tuple[int, int] | None, bool]:
        """How a block's tokens lie: [B, T], or [T, B] if the second is True; None: it is not known."""
        num_rows, first = self.batch_shape[0] if self.batch_shape else None, self.sequence_first
        shapes = [(own.shape[0], own.shape[1]) if own.ndim == 3 else None, block.parent_shape]
        shape = next((s for s in shapes if s is not None and s[0] * s[1] == num_tokens), None)
        size = num_rows if table is None else len(table)
        if shape is None and size and num_tokens % size == 0 and num_tokens > size:
            shape = (num_tokens // size, size) if first else (size, num_tokens // size)
            if first is None:
                block.note("the block reads tokens [N, D]: taken as sequences of one length, one after the "
                           "other; else give labels [N]")  # fmt: skip
        if first is None and shape is not None and num_rows is not None:
            first = shape[0] != num_rows and shape[1] == num_rows
            if first:
                block.note("sequence-first: the block reads tokens as [T, B]")
            elif shape == (num_rows, num_rows):
                block.note("T equals B: taken as batch-first; say sequence_first")
        return shape, bool(first)

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
