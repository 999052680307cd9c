"""Find the blocks of a model; lists of like modules are tried on one batch before they count as experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from moe_lib.inspect.adapters import Adapter, NotAMixture, unchanged
from moe_lib.inspect.block import Block
from moe_lib.inspect.families import FAMILIES
from moe_lib.inspect.lists import MOE_CLASS, ListAdapter
from moe_lib.inspect.measures import entropy
from moe_lib.inspect.recorder import Recorder
from moe_lib.inspect.state import BlockState

REMEDY = "write an Adapter of about ten lines (see moe_lib.inspect.Adapter) and pass it as adapters=[...]"


def find_blocks(model: nn.Module, adapters: Sequence[type[Adapter]] = ()) -> tuple[list[Block], list[str]]:
    """The blocks that an adapter reads, in the model's order, and the names of those that look like one."""
    modules = dict(model.named_modules())
    found: dict[str, Block] = {}
    candidates: dict[str, Block] = {}
    for name, module in modules.items():
        if any(_inside(name, other) for other in found):
            continue
        parent = modules.get(_outside(name)) if name else None
        for kind in (*adapters, *FAMILIES):
            if kind.matches(module):
                found[name] = Block(name, kind(module), parent)
                break
        else:
            if ListAdapter.matches(module):
                candidates[name] = Block(name, ListAdapter(module), parent)
    # A list of layers holds blocks; a list of experts holds none.
    everything = {**candidates, **found}
    for name, block in candidates.items():
        if not any(other != name and _inside(other, name) for other in everything):
            found[name] = block
    unread = [
        name for name, module in modules.items()
        if name and (MOE_CLASS.search(type(module).__name__) or _stacked_behind_a_gate(module))
        and not any(_inside(name, other) or _inside(other, name) for other in found)
    ]  # fmt: skip
    outermost = [name for name in unread if not any(o != name and _inside(name, o) for o in unread)]
    named = [f"{name} ({type(modules[name]).__name__})" for name in outermost]
    return [found[name] for name in modules if name in found], named


def _stacked_behind_a_gate(module: nn.Module) -> bool:
    """Two or more parameters [E, ., .] of its own, and one of E scores beside them."""
    own = [p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3]
    alike = len(own) >= 2 and len(set(own)) == 1
    return alike and any(p.ndim == 2 and own[0] in p.shape for p in module.parameters())


def _outside(name: str) -> str:
    return name.rpartition(".")[0]


def _inside(name: str, other: str) -> bool:
    return name == other or not other or name.startswith(f"{other}.")


def confirm(recorder: Recorder, run: Callable[[], Any]) -> None:
    """Try lists of like modules on one batch: those that are no experts are left out, with the reason."""
    lists = [block for block in recorder.blocks if isinstance(block.adapter, ListAdapter)]
    if not lists:
        return
    with unchanged(recorder.model):
        reasons = _try_lists(recorder, lists, run)
        if reasons is None:  # some block cannot be tagged: find out which
            reasons = {}
            for block in lists:
                reasons |= _try_lists(recorder, [block], run) or {block.name: block.failure}
        for block in lists:
            named = block.adapter.named_as_experts  # type: ignore[attr-defined]
            reason = reasons.get(block.name, "" if block.calls else "its forward was not called")
            if not reason and not named and not varies(block.state):
                reason = "every token gets the same weights: an ensemble, or no mixture of experts"
            outer = _outer(recorder, block, run) if reason and named else None
            at = recorder.blocks.index(block)
            recorder.blocks[at : at + 1] = [] if reason and outer is None else [(outer or block).fresh()]
            if reason and named and outer is None:
                recorder.unread.append(f"{block.name} ({block.family}): {reason}")


def _outer(recorder: Recorder, block: Block, run: Callable[[], Any]) -> Block | None:
    """The module around one that only holds experts, if that is what mixes their answers."""
    if block.parent is None or block.parent is recorder.model or block.adapter.holder is not None:  # type: ignore[attr-defined]
        return None
    name = _outside(block.name)
    around = dict(recorder.model.named_modules())[_outside(name)]
    outer = Block(name, ListAdapter(block.parent, block.adapter.block), around)
    return outer if _try_lists(recorder, [outer], run) == {} and outer.calls else None


def _try_lists(recorder: Recorder, lists: list[Block], run: Callable[[], Any]) -> dict[str, str] | None:
    """Reasons by block; None if the model failed under the tags."""
    single = Recorder(recorder.model, lists, [], recorder.stream.sequence_first)
    single.reasons = {}
    try:
        single.attach()
        run()
    except (NotAMixture, NotImplementedError, RuntimeError) as error:
        for block in lists:
            block.failure = (str(error) or type(error).__name__).splitlines()[0]
        return None
    finally:
        single.detach()
    return single.reasons


def varies(state: BlockState) -> bool:
    """Do tokens differ in their weights?"""
    state.finish()
    per_token = float(state.entropy / (state.tokens - state.dropped).clamp(min=1))
    return entropy(state.weight_E / state.weight_E.sum()) - per_token > 1e-6
