"""A block that was found, and what is examined once: its mixture, and a sample of what its experts read.

Shapes: N tokens of one call, M examined, D width, O output width, E experts, B sequences, T positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn

from moe_lib.inspect.adapters import Adapter, Dispatch, first_tensor
from moe_lib.inspect.snapshot import random_states
from moe_lib.inspect.state import BlockState

EXAMINED = 64  # tokens of each block whose mixture and experts' answers are computed again,
ANSWERS = 512  # as long as all experts together give no more answers; but at least
LEAST = 8
PASSED_ON = 0.1  # share of the answers' variance: with less, a common input raises no alarm
FITTED = 8  # features; with fewer a path's share could explain anything


class Block:
    """A block that was found: its adapter, its tables, and what was found out about it."""

    def __init__(self, name: str, adapter: Adapter, parent: nn.Module | None) -> None:
        self.name = name
        self.adapter = adapter
        self.parent = parent
        self.state = BlockState(adapter.num_experts)
        self.mixture_error = float("nan")
        self.explanation = ""
        self.notes: dict[str, None] = {}  # in order, once each
        self.calls = 0
        self.scores_at: int | None = None  # which of the router's outputs they are; judged once
        self.scores_NE: Tensor | None = None  # of the call in progress
        self.examined = 0  # tokens
        self.computable = True  # can its experts' answers to its tokens be computed again?
        self.sequences = False  # do the experts read more than one token?
        self.costs: dict[str, float] = {}  # of tampering with its routing, by measure; see ABOUT
        self.dropped_E: list[float] = []  # cost of dropping each expert
        self.alike: tuple[Tensor, Tensor] | None = None  # cosines of answers [E, E]; of unpaired ones
        self.width_BT: tuple[int, int] | None = None  # the block's own input, if it has three dimensions

    def fresh(self) -> Block:
        """The same, with nothing seen yet."""
        return Block(self.name, copy.copy(self.adapter), self.parent)

    @property
    def mixes(self) -> bool:
        """Can its output be mixed anew?"""
        return self.adapter.mixes and self.computable

    @property
    def label(self) -> str:
        return f"{self.name or 'the model'} ({self.family})"

    @property
    def family(self) -> str:
        return type(self.adapter.block).__name__

    def examine(self, seen: Dispatch, valid_N: Tensor | None, given: Tensor, seed: int) -> None:
        """Once a block, on a few tokens: is the mixture what was observed? Are the experts' answers alike?"""
        adapter, num_experts = self.adapter, self.adapter.num_experts
        known_NK = (seen.indices_NK >= 0) & (seen.indices_NK < num_experts)
        usable_N = known_NK.any(1) & seen.weights_NK.isfinite().all(1)
        if valid_N is not None:
            usable_N &= valid_N
        if not usable_N.any():
            return
        if adapter.unchecked and not seen.in_order:
            self.computable, self.explanation = False, f"not checked: {adapter.unchecked}"
            return
        usable = usable_N.nonzero().flatten() if seen.in_order else torch.arange(len(seen.tokens_ND))
        self.examined = min(max(ANSWERS // num_experts, LEAST), EXAMINED, len(usable))
        some_M = usable[torch.linspace(0, len(usable) - 1, self.examined).long()]
        sample_MD = seen.tokens_ND[some_M]
        states = random_states()
        answers_EMO = adapter.answers(sample_MD)
        drawn = any(not torch.equal(*pair) for pair in zip(states, random_states(), strict=True))
        output = seen.tokens_ND if seen.output_NO is None else seen.output_NO
        dtypes = [seen.tokens_ND.dtype, answers_EMO.dtype, adapter.answer_dtype, output.dtype]
        tolerance = 2e-2 if any(d is not None and d.itemsize < 4 for d in dtypes) else 1e-3
        added_EMO, share = without_input(answers_EMO.float(), sample_MD.float(), tolerance)
        if share:
            said = f"experts pass on what they read, {share:.0%} of their answers' variance: "
            self.notes[f"{said}they are compared by what they add to it"] = None
        self.alike, self.computable = cosines(added_EMO, seed), seen.in_order
        if drawn:
            why = "the experts' answers are random"
        elif not seen.in_order:
            why = "which tokens the experts read is not known"
        elif seen.output_NO is None:
            why = "the adapter gives no output"
        else:
            why = adapter.unchecked
        if not why:
            indices_MK = seen.indices_NK[some_M].where(known_NK[some_M], 0)
            weights_MK = seen.weights_NK[some_M].where(known_NK[some_M], 0)
            if adapter.scales_inputs:
                mixed_MO = adapter.mix(sample_MD, indices_MK, weights_MK).float()
            else:
                row_M1 = torch.arange(self.examined, device=some_M.device)[:, None]
                mixed_MO = (answers_EMO[indices_MK, row_M1].float() * weights_MK[:, :, None]).sum(1)
            input_MO = given.reshape(output.shape)[some_M] if given.numel() == output.numel() else None
            self._explain(output[some_M].float(), mixed_MO, self._paths(sample_MD, input_MO), tolerance)
            if self.mixture_error <= tolerance:
                return
        if not drawn and _depend(answers_EMO, adapter, sample_MD, tolerance):
            why, self.mixture_error = "an expert's answer depends on the other tokens", float("nan")
            self.alike, self.computable, self.sequences = None, False, True
        if why:
            self.explanation = f"not checked: {why}"

    def _explain(self, actual_MO: Tensor, mixed_MO: Tensor, paths: Iterator[tuple[str, Tensor]],
                 tolerance: float) -> None:  # fmt: skip
        """Is the output the mixture, or the mixture and one path that all tokens take?"""
        rest_MO, scale = actual_MO - mixed_MO, actual_MO.norm().clamp(min=1e-30)
        self.mixture_error = float(rest_MO.norm() / scale)
        self.explanation = "the mixture of what was observed is the block's output"
        if self.mixture_error <= tolerance:
            return
        for what, path_MO in paths:
            if path_MO.shape == rest_MO.shape:
                if rest_MO.shape[1] >= FITTED:  # it may have a gate: a number for each token
                    unit_MO = nn.functional.normalize(path_MO)
                    path_MO = (rest_MO * unit_MO).sum(1, keepdim=True) * unit_MO
                if (error := float((rest_MO - path_MO).norm() / scale)) <= tolerance:
                    self.mixture_error = error
                    self.explanation = f"the block's output is the mixture and {what}"
                    return
        self.explanation = (
            f"the block's output differs from the mixture by {100 * self.mixture_error:.2g}% of its norm: "
            "something else is added (a shared path?), or the answers are transformed after mixing; if it is "
            "meant to be so, pass thresholds={'unexplained': 1e9}, or an adapter"
        )

    def _paths(self, sample_MD: Tensor, input_MO: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """What may be added to the mixture: the block's input, and its other children's answers."""
        if input_MO is not None:
            yield "the block's input (a residual connection)", input_MO.float()
        experts = {*self.adapter.members}
        for name, child in self.adapter.block.named_children():
            if experts.isdisjoint(child.modules()):
                parts = [*child] if isinstance(child, nn.ModuleList) else [child]
                with suppress(Exception):  # it takes something else than tokens
                    answers = [first_tensor(part(sample_MD)).float() for part in parts]
                    yield f"the answer of its {name!r} (a shared expert)", torch.stack(answers).sum(0)


def _depend(answers_EMO: Tensor, adapter: Adapter, sample_MD: Tensor, tolerance: float) -> bool:
    """Are the answers to the second half of the tokens others without the first half?"""
    half = len(sample_MD) // 2
    whole_EMO, alone_EMO = answers_EMO[:, half:].float(), adapter.answers(sample_MD[half:]).float()
    return half > 0 and bool((whole_EMO - alone_EMO).norm() > tolerance * whole_EMO.norm())


def without_input(answers_EMO: Tensor, read_MD: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """What experts add to a multiple of their input, if that is much of their answers; and how much it is.

    Experts x + f(x) share x, whatever f is. Centring over experts would take a common f away, too, which is
    what is looked for. Experts that add nothing are judged by their answers.
    """
    if read_MD.shape != answers_EMO.shape[1:]:
        return answers_EMO, 0.0
    apart_EMO, apart_MD = answers_EMO - answers_EMO.mean(1, keepdim=True), read_MD - read_MD.mean(0)
    along_E = (apart_EMO * apart_MD).sum((1, 2)) / apart_MD.square().sum().clamp(min=1e-30)
    explained_EMO = along_E[:, None, None] * apart_MD
    squares_E = apart_EMO.square().sum((1, 2)).clamp(min=1e-30)
    share_E = explained_EMO.square().sum((1, 2)) / squares_E
    if not share_E.mean() > PASSED_ON or share_E.max() >= 1 - tolerance**2:
        return answers_EMO, 0.0
    return apart_EMO - explained_EMO, float(share_E.mean())


def cosines(answers_EMO: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Of two experts' answers [E, E], each expert's mean removed: to the same tokens, and to others."""
    unit_EMO = answers_EMO - answers_EMO.mean(1, keepdim=True)
    unit_EMO = unit_EMO / unit_EMO.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
    num_experts, size, _ = unit_EMO.shape
    draw = torch.Generator().manual_seed(seed)
    order_EM = torch.rand(num_experts, size, generator=draw).argsort(1).to(unit_EMO.device)
    unpaired_EMO = unit_EMO[torch.arange(num_experts, device=unit_EMO.device)[:, None], order_EM]
    return tuple(flat_EP @ flat_EP.T for flat_EP in (unit_EMO.flatten(1), unpaired_EMO.flatten(1)))
