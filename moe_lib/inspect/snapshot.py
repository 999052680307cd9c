"""Save what modules hold besides parameters, and random states; put it back after a trial run."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

CONTAINERS = (dict, list, set, deque, OrderedDict, defaultdict, Counter)
ATOMS = {int, float, bool, str, bytes, type(None), Tensor, nn.Parameter}
STRUCTURE = vars(nn.Module()).keys() - {"_buffers"}  # parameters, children, hooks: no call changes them
OTHERS = ("torch", "transformers", "accelerate", "lightning", "pytorch_lightning")  # their objects stay as is
Held = list[tuple[Any, Any]]  # what holds something, and what it held
MUTABLE: tuple[tuple[Any, Callable[[Any], Any], Callable[[Any, Any], Any]], ...] = (  # how to read and set
    (np.ndarray, np.copy, lambda array, before: array.__setitem__(..., before)),
    (torch.Generator, torch.Generator.get_state, torch.Generator.set_state),
    (random.Random, random.Random.getstate, random.Random.setstate),
    (
        np.random.Generator,
        lambda generator: copy.deepcopy(generator.bit_generator.state),
        lambda generator, before: setattr(generator.bit_generator, "state", before),
    ),
)


def random_states() -> list[Tensor]:
    """Of the CPU, and of the GPU in use."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


def set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


def every_random_state() -> tuple[Any, ...]:
    """Those of Python and NumPy as well."""
    return random_states(), random.getstate(), np.random.get_state()  # noqa: NPY002


def set_every_random_state(states: tuple[Any, ...]) -> None:
    set_random_states(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002


def contents(*parts: Any) -> Held:
    """Of modules and all inside them: attributes, those that their classes share, and what containers and
    plain objects there hold; of other objects the same."""
    held: dict[int, tuple[Any, Any]] = {}
    waiting: list[Any] = [*parts]
    while waiting:
        part = waiting.pop()
        if type(part) in ATOMS or id(part) in held:
            continue
        if isinstance(part, nn.Module):
            for each in part.modules():
                if id(vars(each)) not in held:
                    held[id(vars(each))] = vars(each), {**vars(each)}
                    waiting += [value for name, value in vars(each).items() if name not in STRUCTURE]
                    waiting += [value for base in type(each).__mro__ if _is_ours(base)
                                for value in vars(base).values() if type(value) in CONTAINERS]  # fmt: skip
        elif type(part) in CONTAINERS:
            held[id(part)] = part, copy.copy(part)
            waiting += part.values() if isinstance(part, dict) else part
        elif isinstance(part, tuple):
            waiting += part
        elif kind := next((kind for kind in MUTABLE if isinstance(part, kind[0])), None):
            held[id(part)] = part, kind[1](part)
        elif _is_plain(part):
            slots = _slots(part)
            waiting += [vars(part)] if hasattr(part, "__dict__") else []
            if slots:
                before = {name: getattr(part, name) for name in slots if hasattr(part, name)}
                held[id(part)] = part, before
                waiting += before.values()
    return [*held.values()]


def _slots(part: Any) -> list[str]:
    """Names of the attributes that are not in a dictionary."""
    given = [getattr(base, "__slots__", ()) for base in type(part).__mro__]
    names = [name for each in given for name in ((each,) if isinstance(each, str) else each)]
    return [name for name in names if not name.startswith("__")]


def _is_plain(part: Any) -> bool:
    """An object of a class of one's own, which may count or collect something."""
    return _is_ours(type(part)) and not isinstance(part, nn.Module | Tensor | type)


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in ("builtins", "functools", "weakref", *OTHERS)


def copied(value: Any) -> Any:
    """A tensor's copy; anything else, parameters too, as it is."""
    is_copied = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    return value.detach().clone() if is_copied else value


def with_copies(held: Held) -> Held:
    """The same with a copy of each tensor that is no parameter."""
    copies: dict[int, Any] = {}

    def once(value: Any) -> Any:
        return copies.setdefault(id(value), copied(value)) if isinstance(value, Tensor) else value

    def part_copied(old: Any) -> Any:
        if isinstance(old, dict):
            return {key: once(value) for key, value in old.items()}
        return [once(value) for value in old] if isinstance(old, list | deque) else old

    return [(part, part_copied(before)) for part, before in held]


def put_back(held: Held) -> None:
    for part, before in held:
        if type(part) in CONTAINERS:
            part.clear()
            (part.extend if isinstance(part, list | deque) else part.update)(before)
        elif kind := next((kind for kind in MUTABLE if isinstance(part, kind[0])), None):
            kind[2](part, before)
        else:
            for name in _slots(part):  # of frozen ones, too
                if name in before:
                    object.__setattr__(part, name, before[name])
                elif hasattr(part, name):
                    object.__delattr__(part, name)


@contextmanager
def unchanged(*parts: Any, start: Held | None = None) -> Iterator[None]:
    """What modules and objects hold, and random states, are afterwards what they were; meanwhile as in
    `start`.

    Tensors are copies meanwhile: one that is written to could not be used in a backward pass any more.
    """
    states = every_random_state()
    try:
        with put_back_after(*parts, start=start):
            yield
    finally:
        set_every_random_state(states)


def on_copies(call: Callable[[Any], Any], given: Any) -> Any:
    """call(given) on copies of what it may write to; objects hold afterwards what they held before."""
    copies = tree_map(copied, given)
    with put_back_after(*tree_leaves(copies)):
        return call(copies)


@contextmanager
def put_back_after(*parts: Any, start: Held | None = None) -> Iterator[None]:
    """The same, random states aside."""
    held = contents(*parts)
    put_back(with_copies(held) if start is None else start)
    try:
        yield
    finally:
        put_back(held)
