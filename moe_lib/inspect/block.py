"""A block that was found, and what is examined once: its mixture, and a sample of what its experts read.

Shapes: N tokens of one call, M examined, D width, O output width, E experts, B sequences, T positions.
"""

from __future__ import annotations

import copy
import itertools
import math
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
        self.scores_at: int | None = None  # which of the router's outputs they are; decided once
        self.scores_NE: Tensor | None = None  # of the call in progress
        self.scores_shape: tuple[int, ...] = ()  # as the router gave them
        self.examined = 0  # tokens
        self.computable = True  # can its experts' answers to its tokens be computed again?
        self.sequences = False  # do the experts read more than one token?
        self.costs: dict[str, float] = {}  # of tampering with its routing, by measure; see ABOUT
        self.dropped_E: list[float] = []  # cost of dropping each expert
        self.alike: tuple[Tensor, Tensor] | None = None  # cosines of answers [E, E]; of unpaired ones
        self.parent_shape: tuple[int, int] | None = None  # [B, T], if its parent reads three dimensions
        self.given_rows = 0  # of all its parent's inputs,
        self.given_shape: tuple[int, ...] = ()  # and the shape of the last
        self.writes: bool | None = None  # does it write to its input? Decided once
        self.versions: list[int] = []  # of the inputs of the call in progress

    def fresh(self) -> Block:
        """The same, with nothing seen yet."""
        adapter = copy.copy(self.adapter)
        adapter.examined = False
        return Block(self.name, adapter, self.parent)

    def note(self, text: str) -> None:
        self.notes[text] = None

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

    def check(self, seen: Dispatch) -> None:
        """What an adapter of one's own gave.

        Raises:
            TypeError: it is no Dispatch.
            ValueError: shapes or types do not fit; names the field.
        """
        who = f"{type(self.adapter).__name__}.dispatch"
        if not isinstance(seen, Dispatch):
            raise TypeError(f"{who} must return a Dispatch, got {type(seen).__name__}")
        tokens_ND, indices_NK, weights_NK, output_NO = seen[:4]
        for name, part in zip(Dispatch._fields, (tokens_ND, indices_NK, weights_NK, output_NO), strict=False):
            if part is not None and part.ndim != 2:
                raise ValueError(f"{who}: {name} must have 2 dimensions, got {list(part.shape)}")
        if indices_NK.is_floating_point() or not weights_NK.is_floating_point():
            given = f"{indices_NK.dtype} and {weights_NK.dtype}"
            raise ValueError(f"{who}: indices_NK must be integers and weights_NK floating point, got {given}")
        if weights_NK.shape != indices_NK.shape:
            given = f"{list(indices_NK.shape)} and {list(weights_NK.shape)}"
            raise ValueError(f"{who}: indices_NK and weights_NK must have one shape, got {given}")
        rows = {"output_NO": output_NO} | ({"tokens_ND": tokens_ND} if seen.in_order else {})
        for name, part in rows.items():
            if part is not None and len(part) != len(indices_NK):
                raise ValueError(
                    f"{who}: {name} must have {len(indices_NK)} rows, as indices_NK, got {len(part)}"
                )

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
        if adapter.takes_more:  # asked without these, they may answer something else
            self.computable = False
            return self._check_observed(seen, some_M, given, "its experts take more than tokens", 2e-2)
        states = random_states()
        answers_EMO = adapter.answers(sample_MD)
        drawn = any(not torch.equal(*pair) for pair in zip(states, random_states(), strict=True))
        output = seen.tokens_ND if seen.output_NO is None else seen.output_NO
        dtypes = [seen.tokens_ND.dtype, answers_EMO.dtype, adapter.answer_dtype, output.dtype]
        tolerance = 2e-2 if any(d is not None and d.itemsize < 4 for d in dtypes) else 1e-3
        added_EMO, share = without_input(answers_EMO.float(), sample_MD.float(), tolerance)
        if share:
            self.note(f"experts pass on what they read, {share:.0%} of their answers' variance: they are "
                      "compared by what they add to it")  # fmt: skip
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
            input_MO = _rows_like(output, given, some_M)
            self._explain(output[some_M].float(), mixed_MO, self._paths(sample_MD, input_MO), tolerance)
            if self.mixture_error <= tolerance:
                lost_N = ~known_NK.any(1) & seen.weights_NK.isfinite().all(1)
                lost = (lost_N if valid_N is None else lost_N & valid_N).nonzero().flatten()[:EXAMINED]
                input_MO = _rows_like(output, given, lost)
                self._explain_lost(output[lost].float(), seen.tokens_ND[lost], input_MO, tolerance)
                return
        if not drawn and _depend(answers_EMO, adapter, sample_MD, tolerance):
            why = "an expert's answer depends on the other tokens"
            self.alike, self.computable, self.sequences = None, False, True
            if not adapter.members and not math.isnan(self.mixture_error):  # it is asked token by token
                self.explanation += f"; {why}: if it drops tokens over a capacity, this is not seen"
                return
        if why:
            self._check_observed(seen, some_M, given, why, tolerance)

    def _check_observed(self, seen: Dispatch, some_M: Tensor, given: Tensor, why: str,
                        tolerance: float) -> None:  # fmt: skip
        if (observed := self.adapter.observed(seen)) is not None and not self._random_paths():
            sample_MD = seen.tokens_ND[some_M]
            actual_NO, mixed_NO = (part.float() for part in observed)
            paths = self._paths(sample_MD, _rows_like(actual_NO, given, some_M))
            self._explain(actual_NO[some_M], mixed_NO[some_M], paths, tolerance)
            self.note(f"{why}: the mixture was checked with the answers of one call")
        else:
            self.explanation, self.mixture_error = f"not checked: {why}", float("nan")

    def _random_paths(self) -> bool:
        """Is something beside the experts another one in each call?"""
        experts = {*self.adapter.members}
        others = [c for c in self.adapter.block.children() if experts.isdisjoint(c.modules())]
        changing = nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm
        return any(isinstance(m, changing) and m.training for child in others for m in child.modules())

    def _explain(self, actual_MO: Tensor, mixed_MO: Tensor, paths: Iterator[tuple[str, Tensor]],
                 tolerance: float) -> None:  # fmt: skip
        """Is the output the mixture, or the mixture and one path that all tokens take?"""
        rest_MO, scale = actual_MO - mixed_MO, actual_MO.norm().clamp(min=1e-30)
        self.mixture_error = float(rest_MO.norm() / scale)
        self.explanation = "the mixture of what was observed is the block's output"
        if self.mixture_error <= tolerance:
            return
        # Beside a path that is much larger an error in the mixture would not be seen; rounding would.
        scale = torch.maximum(mixed_MO.norm(), 5 * tolerance * scale)
        for error, what in _errors(rest_MO, scale, paths):
            if error <= tolerance:
                self.mixture_error = error
                self.explanation = f"the block's output is the mixture and {what}"
                return
        self.explanation = (
            f"the block's output differs from the mixture by {100 * self.mixture_error:.3g}% of its norm: "
            "something else is added (a shared path?), or the answers are transformed after mixing; if it is "
            "meant to be so, pass thresholds={'unexplained': 1e9}, or an adapter"
        )

    def _explain_lost(self, actual_MO: Tensor, read_MD: Tensor, input_MO: Tensor | None,
                      tolerance: float) -> None:  # fmt: skip
        """Tokens that no expert serves: is their output zero, or a path that needs none?"""
        if not actual_MO.any():
            return
        errors = _errors(actual_MO, actual_MO.norm(), self._paths(read_MD, input_MO))
        least = min((error for error, _ in errors), default=1.0)
        if least > tolerance:
            self.mixture_error = least
            self.explanation = (
                "tokens that no expert serves, as far as can be seen, have an output of their own: are some "
                "experts' answers detached, or is something else in their place?"
            )

    def _paths(self, sample_MD: Tensor, input_MO: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """What may be added to the mixture: the block's input, and its other children's answers."""
        if input_MO is not None:
            yield "the block's input (a residual connection)", input_MO.float()
        if input_MO is None or not torch.equal(sample_MD, input_MO):
            yield "what the experts read (a residual connection)", sample_MD.float()
        for name, weight in self.adapter.block.named_parameters(recurse=False):
            if weight.ndim == 1:
                yield f"its {name!r}", weight.detach().float().expand(len(sample_MD), -1)
        experts = {*self.adapter.members}
        for name, child in self.adapter.block.named_children():
            if experts.isdisjoint(child.modules()):
                parts = [*child] if isinstance(child, nn.ModuleList) else [child]
                for read in [sample_MD] if input_MO is None else [sample_MD, input_MO]:
                    with suppress(Exception):  # it takes something else than tokens
                        answers = [first_tensor(part(read)).float() for part in parts]
                        yield f"the answer of its {name!r} (a shared expert)", torch.stack(answers).sum(0)


def _rows_like(output_NO: Tensor, given: Tensor, some_M: Tensor) -> Tensor | None:
    """Rows [M, O] of the block's input, if it is as large as the output."""
    return given.reshape(output_NO.shape)[some_M] if given.numel() == output_NO.numel() else None


def _errors(
    rest_MO: Tensor, scale: Tensor, paths: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[float, str]]:
    """What is left beside each path, and beside each two."""
    known = [(what, path_MO) for what, path_MO in paths if path_MO.shape == rest_MO.shape]
    for group in [*((one,) for one in known), *itertools.combinations(known, 2)]:
        left_MO = rest_MO - _along(rest_MO, [path_MO for _, path_MO in group])
        yield float(left_MO.norm() / scale), " and ".join(what for what, _ in group)


def _along(rest_MO: Tensor, paths: list[Tensor]) -> Tensor:
    """What paths explain: as they are or, with enough features, each with a gate: a number for each token."""
    if rest_MO.shape[1] < FITTED * len(paths):
        return torch.stack(paths).sum(0)
    units: list[Tensor] = []
    for path_MO in paths:
        for unit_MO in units:
            path_MO = path_MO - (path_MO * unit_MO).sum(1, keepdim=True) * unit_MO
        units.append(nn.functional.normalize(path_MO))
    return torch.stack([(rest_MO * unit_MO).sum(1, keepdim=True) * unit_MO for unit_MO in units]).sum(0)


def _depend(answers_EMO: Tensor, adapter: Adapter, sample_MD: Tensor, tolerance: float) -> bool:
    """Are the answers to the second half of the tokens others without the first half?"""
    half = len(sample_MD) // 2
    whole_EMO, alone_EMO = answers_EMO[:, half:].float(), adapter.answers(sample_MD[half:]).float()
    return half > 0 and bool((whole_EMO - alone_EMO).norm() > tolerance * whole_EMO.norm())


def without_input(answers_EMO: Tensor, read_MD: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """What experts add to a multiple of their input, if that is much of their answers; and how much it is.

    Experts x + f(x) share x, whatever f is. Centring over experts would take a common f away, too, which is
    what is looked for. Of experts that return a multiple of their input the answers themselves are compared.
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
