"""Hooks on the blocks of a model, which pass what is dispatched to the tables.

Shapes: N tokens of one call, O output width, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from moe_lib.inspect.adapters import (
    Call,
    Dispatch,
    NotAMixture,
    first_tensor,
    leaves_of,
    reason_of,
    replaced,
    router_scores,
)  # fmt: skip
from moe_lib.inspect.block import Block
from moe_lib.inspect.families import StackedAdapter
from moe_lib.inspect.places import Stream
from moe_lib.inspect.snapshot import copied, unchanged
from moe_lib.inspect.tagging import ListAdapter

ROUTER_NAMES = ("gate", "router", "gating", "wg", "gate_network", "gating_network")


def router_of(holder: nn.Module | None, names: Sequence[str]) -> nn.Module | None:
    named = [getattr(holder, name, None) for name in names]
    return next((one for one in named if isinstance(one, nn.Module)), None)


def _versions(given: Any) -> list[int]:
    """How often the tensors were written to."""
    tensors = (leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor))
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


class Recorder:
    """Hooks on the blocks of one model; between `attach` and `detach` every call is counted once."""

    # Who calls the model, or experts, itself; the others look away.
    working: ClassVar[Recorder | Block | None] = None

    def __init__(self, model: nn.Module, blocks: list[Block], unread: list[str],
                 sequence_first: bool | None = None, seed: int = 0) -> None:  # fmt: skip
        self.model = model
        self.blocks, self.unread = blocks, unread
        self.seed = seed
        self.quiet = False  # whatever goes wrong is noted; nothing is raised
        self.handles: list[Any] = []
        self.calls: dict[str, Call] = {}
        self.stream = Stream(sequence_first)
        self.reasons: dict[str, str] | None = None  # why lists are no experts; while they are tried
        self.tamper: Callable[[Block, Dispatch, Tensor | None], Tensor | None] | None = None

    def attach(self) -> None:
        hooks = [self.model.register_forward_pre_hook(self._batch_starts, with_kwargs=True)]
        for block in reversed(self.blocks):  # the inner ones end first
            module, adapter, parent = block.adapter.block, block.adapter, block.parent
            starts = partial(self._safely, self._starts, block)
            ends = partial(self._safely, self._ends, block)
            hooks.append(module.register_forward_pre_hook(starts, with_kwargs=True))
            # always_call: tagging that is left on would break whatever comes later.
            hooks.append(module.register_forward_hook(ends, with_kwargs=True, always_call=True))
            for name in adapter.watch:
                child = partial(self._child, block, name)
                hooks.append(module.get_submodule(name).register_forward_hook(child))
            for e, member in enumerate(adapter.members):
                note = partial(self._safely, self._member, block, partial(adapter.note, e))
                hooks.append(member.register_forward_hook(note, with_kwargs=True))
            for e, member in enumerate(adapter.before[0] if adapter.before else ()):
                note = partial(self._safely, self._member, block, partial(adapter.note_before, e))
                hooks.append(member.register_forward_hook(note, with_kwargs=True))
            holder = module if any(hasattr(module, name) for name in ROUTER_NAMES) else parent
            router = router_of(holder, [name for name in ROUTER_NAMES if name not in adapter.watch])
            if router is not None:
                scores = partial(self._safely, self._router, block)
                hooks.append(router.register_forward_hook(scores))
            if parent is not None:
                hooks.append(parent.register_forward_pre_hook(partial(self._parent, block), with_kwargs=True))
        self.handles = hooks

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.calls = [], {}
        for block in self.blocks:
            block.adapter.forget()

    # ------------------------------------------------------------------------------------- hooks

    def _safely(self, hook: Callable[..., Any], block: Block, *rest: Any) -> Any:
        """What cannot be read must not stop the model: it is a reason or a note. Other errors are raised."""
        try:
            return hook(block, *rest)
        except Exception as error:
            reason = reason_of(error)
            if self.reasons is not None:
                self.reasons.setdefault(block.name, reason)
            elif self.quiet or isinstance(error, NotAMixture):
                block.note(f"a call was not counted: {reason}")
            else:
                raise
            return None

    def _idle(self) -> bool:
        in_backward = torch._C._current_graph_task_id() != -1  # checkpointing recomputes: counted before
        return in_backward or Recorder.working not in (None, self)

    def _batch_starts(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._idle():
            return
        try:
            self.stream.starts(module, args, kwargs)
        except ValueError as error:  # a mask that cannot be read
            if not self.quiet:
                raise
            for block in self.blocks:
                block.note(f"padding is not told apart: {error}")

    def _parent(self, block: Block, module: nn.Module, args: tuple, kwargs: dict) -> None:
        read = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if read is not None and read.ndim > 1 and not self._idle():
            block.given_rows += read.numel() // max(read.shape[-1], 1)
            block.given_shape = tuple(read.shape) if read.is_floating_point() else ()
        block.parent_shape = (read.shape[0], read.shape[1]) if read is not None and read.ndim == 3 else None

    def _starts(self, block: Block, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._idle():
            if block.name in self.calls:
                block.note("it calls itself: of nested calls the inner one alone is counted")
            given = (args, kwargs) if block.writes is False else tree_map(copied, (args, kwargs))
            self.calls[block.name] = Call(block.adapter.names, *given)
            block.versions = _versions((args, kwargs))
            block.adapter.begin(args, kwargs)

    def _child(self, block: Block, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if not self._idle() and block.name in self.calls:
            self.calls[block.name].seen[name] = output

    def _router(self, block: Block, module: nn.Module, args: tuple, output: Any) -> None:
        if self._idle():
            return
        if isinstance(module, nn.modules.conv._ConvNd) and isinstance(output, Tensor):
            output = output.movedim(1, -1)
        if block.scores_at is None:
            block.scores_at, _ = router_scores(output, block.adapter.num_experts)
        if block.scores_at >= 0:
            value = output[block.scores_at] if isinstance(output, tuple | list) else output
            block.scores_NE = value.detach().reshape(-1, value.shape[-1])
            block.scores_shape = tuple(value.shape)

    def _ordered_scores(self, block: Block, tokens: Tensor) -> Tensor | None:
        """In the order of the block's tokens [B, T], if the router read them as [T, B]."""
        scores_NE, shape = block.scores_NE, block.scores_shape
        turned = len(shape) == tokens.ndim == 3 and shape[:2] == tokens.shape[1::-1] != tokens.shape[:2]
        if scores_NE is None or not turned:
            return scores_NE
        return scores_NE.view(shape).transpose(0, 1).reshape(scores_NE.shape)

    def _member(self, block: Block, note: Callable[[Any, Any], Any], module: nn.Module, args: Any,
                kwargs: dict, output: Any) -> Any:  # fmt: skip
        replayed = Recorder.working is block and block.adapter.open is not None
        return note((args, kwargs), output) if replayed or not self._idle() else None

    def _ends(self, block: Block, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if self._idle() or (call := self.calls.pop(block.name, None)) is None:
            return None
        call.output = output
        block.writes = block.writes or block.versions != _versions((args, kwargs))
        before, Recorder.working = Recorder.working, block
        try:
            block.adapter.end(call)
            if output is None:  # the block failed
                return None
            with torch.no_grad():
                changed = self._record(block, call)
            return block.adapter.untagged(output if changed is None else changed)
        finally:
            Recorder.working = before
            block.adapter.forget()

    def _record(self, block: Block, call: Call) -> Any:
        seen = block.adapter.dispatch(call)
        block.check(seen)
        seen = seen._replace(indices_NK=seen.indices_NK.long())
        if seen.scores_NE is None:
            seen = seen._replace(scores_NE=self._ordered_scores(block, call.tokens))
            block.scores_NE = None
        seen = Dispatch(*(v.detach() if isinstance(v, Tensor) else v for v in seen))  # type: ignore[arg-type]
        block.calls += 1
        if block.adapter.remark:
            block.note(block.adapter.remark)
        if not len(seen.indices_NK):
            return None
        size, num_slots = seen.indices_NK.shape
        given = math.prod(block.given_shape[:-1]) if block.given_shape[-1:] == seen.tokens_ND.shape[1:] else 0
        if num_slots == 1 and 0 < given < size and size % given == 0:
            block.note(f"{size} rows for {given} that its parent reads: if these are a token's slots, "
                       "tokens, top-k and H(E|x) are of slots")  # fmt: skip
        place = self.stream.place(block, call.tokens, len(seen.indices_NK))
        if self.tamper is not None:
            known_NK = (seen.indices_NK >= 0) & (seen.indices_NK < block.adapter.num_experts)
            seen = seen._replace(weights_NK=seen.weights_NK.where(known_NK, 0))
            change_NO = self.tamper(block, seen, place.valid_N)
            if change_NO is None:
                return None
            part = block.adapter.part
            answer = first_tensor(call.output) if part is None else leaves_of(call.output)[part]
            return replaced(call.output, answer + change_NO.view(answer.shape).to(answer.dtype), part)
        if not block.examined and not block.explanation:
            try:
                with unchanged(block.adapter.block):
                    block.examine(seen, place.valid_N, call.tokens, self.seed)
            except Exception as error:
                adapter = block.adapter
                named = isinstance(adapter, ListAdapter) and adapter.named_as_experts
                sure = named or isinstance(adapter, StackedAdapter)
                if self.reasons is not None and block.alike is None and not sure:
                    raise  # its modules take more than tokens
                block.computable = False
                block.explanation = f"not checked: the experts cannot be called again: {reason_of(error)}"
        block.adapter.examined = bool(block.examined or block.explanation)
        in_order = seen.in_order and not block.sequences  # what one token reads does not say what it needs
        block.state.update(seen._replace(in_order=in_order), place)
        return None
