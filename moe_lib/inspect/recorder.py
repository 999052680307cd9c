"""Hooks on the blocks of a model, which pass what is dispatched to the tables.

Shapes: N tokens of one call, O output width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_lib.inspect.adapters import Call, Dispatch, NotAMixture, router_scores, rows
from moe_lib.inspect.block import Block
from moe_lib.inspect.lists import ListAdapter
from moe_lib.inspect.places import Stream

ROUTER_NAMES = ("gate", "router", "gating", "wg", "gate_network", "gating_network")


class Recorder:
    """Hooks on the blocks of one model; between `attach` and `detach` every call is counted once."""

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        unread: list[str],
        sequence_first: bool | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.blocks, self.unread = blocks, unread
        self.on = True
        self.busy = False  # our own calls of experts and blocks are not counted
        self.handles: list[Any] = []
        self.calls: dict[str, Call] = {}
        self.stream = Stream(sequence_first, seed)
        self.reasons: dict[str, str] | None = None  # why lists are no experts; while they are tried
        self.tamper: Callable[[Block, Dispatch, Tensor | None], Tensor | None] | None = None

    # ------------------------------------------------------------------------------------- hooks

    def attach(self) -> Recorder:
        if self.handles:
            return self
        self.handles.append(self.model.register_forward_pre_hook(self._batch_starts, with_kwargs=True))
        for block in self.blocks:
            self._hook(block)
        return self

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.calls = {}

    def _hook(self, block: Block) -> None:
        module, adapter = block.adapter.block, block.adapter
        self.handles.append(module.register_forward_pre_hook(self._starts(block), with_kwargs=True))
        # always_call: a dual level that is left open would break every later one.
        self.handles.append(
            module.register_forward_hook(self._ends(block), with_kwargs=True, always_call=True)
        )
        for name in adapter.watch:
            self.handles.append(module.get_submodule(name).register_forward_hook(self._child(block, name)))
        if isinstance(adapter, ListAdapter):
            for e, member in enumerate(adapter.members):
                self.handles.append(member.register_forward_hook(self._expert(adapter, e)))
        holder = module if any(hasattr(module, name) for name in ROUTER_NAMES) else block.parent
        for name in ROUTER_NAMES:
            router = getattr(holder, name, None)
            if isinstance(router, nn.Module) and name not in adapter.watch:
                self.handles.append(router.register_forward_hook(self._router(block)))
                break
        if block.parent is not None:
            self.handles.append(block.parent.register_forward_pre_hook(self._parent(block)))

    def _idle(self) -> bool:
        in_backward = torch._C._current_graph_task_id() != -1  # checkpointing recomputes: counted before
        return not self.on or self.busy or in_backward

    def _batch_starts(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._idle():
            self.stream.starts(module, args, kwargs)

    def _parent(self, block: Block) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            tensor = next((a for a in args if isinstance(a, Tensor)), None)
            block.width_BT = None
            if tensor is not None and tensor.ndim == 3:
                block.width_BT = (tensor.shape[0], tensor.shape[1])

        return hook

    def _starts(self, block: Block) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._idle():
                return
            self.calls[block.name] = Call(block.adapter.names, args, kwargs)
            if isinstance(block.adapter, ListAdapter):
                block.adapter.begin(args, kwargs)

        return hook

    def _child(self, block: Block, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if not self._idle() and block.name in self.calls:
                self.calls[block.name].seen[name] = output

        return hook

    def _router(self, block: Block) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if self._idle() or getattr(block.adapter, "replaying", False):
                return
            if block.scores_at is None:
                block.scores_at, block.scores_NE = router_scores(output, block.adapter.num_experts)
            elif block.scores_at >= 0:
                value = output[block.scores_at] if isinstance(output, tuple | list) else output
                block.scores_NE = value.detach().reshape(-1, value.shape[-1])

        return hook

    def _expert(self, adapter: ListAdapter, e: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            return None if self._idle() else adapter.note(e, args, output)

        return hook

    def _ends(self, block: Block) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            call = self.calls.pop(block.name, None)
            if call is None or self._idle():
                return None
            call.output = output
            adapter = block.adapter
            self.busy = not isinstance(adapter, ListAdapter)
            try:
                if isinstance(adapter, ListAdapter):
                    adapter.end(call)
                    self.busy = True
                if output is None:  # the block failed
                    return None
                with torch.no_grad():
                    return self._record(block, call)
            finally:
                self.busy = False

        return hook

    # --------------------------------------------------------------------------------- recording

    def _record(self, block: Block, call: Call) -> Any:
        try:
            seen = block.adapter.dispatch(call)
        except NotAMixture as error:
            if self.reasons is None:
                raise ValueError(f"block {block.name!r} is no longer a mixture: {error}") from error
            self.reasons[block.name] = str(error)
            return None
        if seen.scores_NE is None:
            seen = seen._replace(scores_NE=block.scores_NE)
            block.scores_NE = None
        seen = seen._replace(**{k: v.detach() for k, v in seen._asdict().items() if v is not None})
        block.calls += 1
        place = self.stream.place(block, call.tokens, len(seen.indices_NK))
        if self.tamper is not None:
            known_NK = (seen.indices_NK >= 0) & (seen.indices_NK < block.adapter.num_experts)
            seen = seen._replace(weights_NK=seen.weights_NK.where(known_NK, 0))
            change_NO = self.tamper(block, seen, place.valid_N)
            return None if change_NO is None else _add(call.output, change_NO)
        if not block.examined:
            block.examine(seen, place.valid_N, rows(call.tokens), self.stream.seed)
        block.state.update(seen, place)
        return None


def _add(output: Any, change_NO: Tensor) -> Any:
    """The block's output with a change added to its first tensor."""
    if isinstance(output, Tensor):
        return output + change_NO.view(output.shape).to(output.dtype)
    items = [*output]
    at = next(i for i, value in enumerate(items) if isinstance(value, Tensor))
    items[at] = items[at] + change_NO.view(items[at].shape).to(items[at].dtype)
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
