"""Find the blocks of a model; lists of like modules are tried on one batch before they count as experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from moe_lib.inspect.adapters import Adapter, reason_of
from moe_lib.inspect.block import Block
from moe_lib.inspect.families import FAMILIES, GUESSED
from moe_lib.inspect.lists import named_as_mixture
from moe_lib.inspect.measures import entropy
from moe_lib.inspect.recorder import ROUTER_NAMES, Recorder, router_of
from moe_lib.inspect.snapshot import unchanged
from moe_lib.inspect.state import BlockState
from moe_lib.inspect.tagging import BYPASSED, SIDE_BY_SIDE, ListAdapter

LIKE_MOE = re.compile("moe|mixture|expert|switch", re.I)
NOT_CALLED = "its forward was not called"
REMEDY = "write an Adapter of about ten lines (see moe_lib.inspect.Adapter) and pass it as adapters=[...]"


Taken = tuple[str, type[Adapter]]  # a module by its name, and an adapter


def find_blocks(
    model: nn.Module, adapters: Sequence[type[Adapter]] = (), without: Collection[Taken] = ()
) -> tuple[list[Block], list[str]]:
    """The blocks that an adapter reads, in the model's order, and the names of those that look like one.

    Args:
        without: what is not to be tried.
    """
    if objects := [type(one).__name__ for one in adapters if not isinstance(one, type)]:
        raise ValueError(f"adapters takes classes: give {objects[0]} instead of {objects[0]}(...)")
    for kind in adapters:
        if isinstance(kind.classes, str):
            raise ValueError(f"{kind.__name__}.classes must be a tuple of names, got {kind.classes!r}")
    if any(map(is_lazy, model.parameters())):
        raise ValueError("the model has parameters that are not initialised yet: call it once before")
    modules = dict(model.named_modules())
    found: dict[str, Block] = {}
    candidates: dict[str, Block] = {}
    for name, module in modules.items():
        if any(_inside(name, other) for other in found):
            continue
        parent = modules.get(_outside(name)) if name else None
        for kind in (*adapters, *FAMILIES):
            if kind.matches(module) and (name, kind) not in without:
                found[name] = Block(name, kind(module), parent)
                break
        else:
            if ListAdapter.matches(module):
                candidates[name] = Block(name, ListAdapter(module), parent)
    # A list of layers holds blocks; so does a list of experts that are mixtures themselves.
    known = [*found, *(name for name, block in candidates.items() if _lists(block).named_as_experts)]
    members = {modules[name] for name in known}
    for name, block in candidates.items():
        holds_known = any(other != name and _inside(other, name) for other in known)
        if _lists(block).list_of_experts or not holds_known or members.issuperset(_lists(block).members):
            found[name] = block
    unread = [
        name for name, module in modules.items()
        if ((name and _looks_like_one(module)) or _stacked_behind_a_gate(module))
        and not any(_inside(name, other) or _inside(other, name) for other in found)
    ]  # fmt: skip
    outermost = [name for name in unread if not any(o != name and _inside(name, o) for o in unread)]
    named = [f"{name or 'the model'} ({type(modules[name]).__name__})" for name in outermost]
    return [found[name] for name in modules if name in found], named


def _lists(block: Block) -> ListAdapter:
    assert isinstance(block.adapter, ListAdapter)
    return block.adapter


def _looks_like_one(module: nn.Module) -> bool:
    return named_as_mixture(module) and not type(module).__name__.endswith("MoeMLP")  # a dense layer's


def _stacked_behind_a_gate(module: nn.Module) -> bool:
    """Two or more parameters [E, ., .] of its own, and one of E scores beside them."""
    own = [p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3]
    alike = len(own) >= 2 and len(set(own)) == 1
    return alike and any(p.ndim == 2 and own[0] in p.shape for p in module.parameters())


def _outside(name: str) -> str:
    return name.rpartition(".")[0]


def _inside(name: str, other: str) -> bool:
    return name == other or not other or name.startswith(f"{other}.")


def confirm(recorder: Recorder, run: Callable[[], Any], adapters: Sequence[type[Adapter]] = ()) -> None:
    """Try what was found by a name, and lists of like modules, on one batch: what is no mixture is left out,
    with the reason."""
    wrong: dict[Taken, str] = {}
    while guessed := [b for b in recorder.blocks if isinstance(b.adapter, GUESSED)]:
        with unchanged(recorder.model):
            reasons = _reasons(recorder, [block.fresh() for block in guessed], run)
        now = {(b.name, type(b.adapter)): reasons[b.name] for b in guessed}
        now = {taken: reason for taken, reason in now.items() if reason not in ("", NOT_CALLED)}
        if not now:
            break
        wrong |= now
        recorder.blocks, recorder.unread = find_blocks(recorder.model, adapters, wrong)
    for (name, _), reason in wrong.items():
        if not any(_inside(block.name, name) for block in recorder.blocks):
            recorder.unread.append(f"{name or 'the model'}: {reason}")
    lists = [block for block in recorder.blocks if isinstance(block.adapter, ListAdapter)]
    if not lists:
        return
    kept = {block.name: block for block in recorder.blocks if block not in lists}
    with unchanged(recorder.model):
        while lists:  # the innermost first, and alone: there the tags of outer ones would be seen
            inner = [b for b in lists if not any(o is not b and _inside(o.name, b.name) for o in lists)]
            lists = [block for block in lists if block not in inner]
            reasons = _reasons(recorder, inner, run)
            for first in inner:
                block, reason = _best_list(recorder, first, reasons[first.name], run)
                named = _lists(block).named_as_experts
                if reason in (NOT_CALLED, BYPASSED) and not _lists(block).called and named:
                    reason = ""  # nor was any of its experts: they may be later
                if reason == SIDE_BY_SIDE or (reason and named):
                    block, reason = _outer(recorder, block, reason, run)
                elif not reason:
                    block = _summed_outside(recorder, block, run)
                if not reason:
                    kept[first.name] = block.fresh()
                elif named:
                    recorder.unread.append(f"{block.label}: {reason}")
    recorder.blocks[:] = [kept[block.name] for block in recorder.blocks if block.name in kept]


def _best_list(recorder: Recorder, first: Block, reason: str, run: Callable[[], Any]) -> tuple[Block, str]:
    """Of a block's lists the one whose weights vary over tokens, or else over experts; and what is wrong."""
    tried = [(first, reason)]
    for which in range(1, _lists(first).num_lists if type(first.adapter) is ListAdapter else 1):
        block = Block(first.name, ListAdapter(first.adapter.block, which=which), first.parent)
        tried.append((block, _reasons(recorder, [block], run)[block.name]))

    def rank(one: tuple[Block, str]) -> tuple[int, ...]:
        state = one[0].state
        good = not one[1]
        return (
            good,
            good and varies(state),
            good and uneven(state),
            _lists(one[0]).list_of_experts,
            one[0] is first,
        )

    block, reason = max(tried, key=rank)
    for other, wrong in tried:
        name, part_of_it = _lists(other).list_name, _lists(block).joins is not None
        if other is block or part_of_it or wrong == NOT_CALLED:
            continue
        if varies(other.state) if not wrong else "expert" in name:
            why = (
                wrong
                or f"it is a mixture beside {_lists(block).list_name!r}, and one list of a module is read"
            )
            recorder.unread.append(f"{other.label}, its list {name!r}: {why}")
    if _lists(first).list_of_experts:  # the block's name speaks for that list alone
        trusted = _lists(block).list_of_experts
    else:
        trusted = _lists(block).named_as_experts
    if not reason and block.state.tokens and not varies(block.state) and not trusted:
        unequal, gate = uneven(block.state), router_of(block.adapter.block, ROUTER_NAMES)
        if not unequal or gate is None:
            reason = "every token gets the same weights: a collapsed router, an ensemble, or no mixture"
            if unequal or LIKE_MOE.search(type(block.adapter.block).__name__):
                recorder.unread.append(f"{block.label}: {reason}")
    return tried[0] if reason and _lists(first).list_of_experts else (block, reason)


def _outer(recorder: Recorder, block: Block, reason: str, run: Callable[[], Any]) -> tuple[Block, str]:
    """The module around one that only holds experts, if that is what mixes their answers.

    By itself a holder looks like a perfectly balanced mixture.
    """
    if block.parent is None or _lists(block).holder is not None:
        return block, reason
    name = _outside(block.name)
    around = dict(recorder.model.named_modules())[_outside(name)] if name else None
    outer = Block(name, ListAdapter(block.parent, block.adapter.block), around)
    mixes = not _reasons(recorder, [outer], run)[name]
    mixes = mixes and (_lists(block).named_as_experts or varies(outer.state))  # else an ensemble
    return (outer, "") if mixes else (block, reason)


def _summed_outside(recorder: Recorder, block: Block, run: Callable[[], Any]) -> Block:
    """The module around one that answers with a row for each slot, if it adds these up."""
    state = block.state.finish()
    if state.num_slots != 1 or not 0 < block.given_rows < state.tokens:
        return block
    outer, _ = _outer(recorder, block, "", run)
    summed = outer.state.finish()
    fewer = summed.num_slots > 1 and summed.tokens < state.tokens
    return outer if fewer and outer.calls == block.calls and outer.adapter.mixes else block


def _reasons(recorder: Recorder, lists: list[Block], run: Callable[[], Any]) -> dict[str, str]:
    """By block: why it is no mixture; "" if it is one."""
    single = Recorder(recorder.model, lists, [], recorder.stream.sequence_first)
    single.quiet, single.reasons, before, Recorder.working = recorder.quiet, {}, Recorder.working, single
    try:
        single.attach()
        run()
    except (NotImplementedError, RuntimeError) as error:
        if len(lists) == 1:
            single.detach()
            run()  # an error of the model's own is raised as it is
            return {lists[0].name: reason_of(error)}
        return {b.name: _reasons(recorder, [b], run)[b.name] for b in lists}  # which cannot be tagged?
    finally:
        single.detach()
        Recorder.working = before
    return {b.name: single.reasons.get(b.name, "" if b.calls else NOT_CALLED) for b in lists}


def varies(state: BlockState) -> bool:
    """Do tokens differ in their weights?"""
    state.finish()
    per_token = float(state.entropy / (state.tokens - state.dropped).clamp(min=1))
    return entropy(state.weight_E / state.weight_E.sum()) - per_token > 1e-6


def uneven(state: BlockState) -> bool:
    """Do experts differ in their mean weights?"""
    return bool(state.weight_E.max() - state.weight_E.min() > 1e-6 * state.weight_E.max())
