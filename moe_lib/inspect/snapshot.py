"""A look leaves no trace: what modules hold besides parameters, and random states, are put back."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CONTAINERS = (dict, list, set, deque, OrderedDict, defaultdict, Counter)
GENERATORS = (torch.Generator, np.random.Generator, random.Random)
OTHERS = ("torch", "transformers", "accelerate", "lightning", "pytorch_lightning")  # their objects stay as is
Held = list[tuple[Any, Any]]  # containers, arrays and random generators, and what they hold


def random_states() -> list[Tensor]:
    """Of the CPU, and of the GPU in use."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


def set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


def contents(module: nn.Module) -> Held:
    """Of a module and all inside it: attributes, and what containers and plain objects there hold."""
    held: dict[int, tuple[Any, Any]] = {}
    waiting: list[Any] = [vars(each) for each in module.modules()]
    while waiting:
        part = waiting.pop()
        if id(part) in held:
            continue
        if type(part) in CONTAINERS:
            held[id(part)] = part, copy.copy(part)
            waiting += part.values() if isinstance(part, dict) else part
        elif isinstance(part, tuple):
            waiting += part
        elif isinstance(part, (np.ndarray, *GENERATORS)):
            held[id(part)] = part, copy.deepcopy(_state(part))
        elif _is_plain(part):
            slots = [name for kind in type(part).__mro__ for name in getattr(kind, "__slots__", ())]
            waiting += [vars(part)] if hasattr(part, "__dict__") else []
            if slots:
                before = {name: getattr(part, name) for name in slots if hasattr(part, name)}
                held[id(part)] = part, before
                waiting += before.values()
    return [*held.values()]


def _is_plain(part: Any) -> bool:
    """An object of a class of one's own, which may count or collect something."""
    kind = type(part)
    ours = kind.__module__.partition(".")[0] not in ("builtins", "functools", "weakref", *OTHERS)
    return ours and not isinstance(part, nn.Module | Tensor | type)


def _state(part: Any) -> Any:
    if isinstance(part, np.ndarray):
        return part
    if isinstance(part, np.random.Generator):
        return part.bit_generator.state
    return part.get_state() if isinstance(part, torch.Generator) else part.getstate()


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
        elif isinstance(part, np.ndarray):
            part[...] = before
        elif isinstance(part, np.random.Generator):
            part.bit_generator.state = before
        elif isinstance(part, torch.Generator):
            part.set_state(before)
        elif isinstance(part, random.Random):
            part.setstate(before)
        else:
            for name, value in before.items():
                setattr(part, name, value)


@contextmanager
def unchanged(module: nn.Module, start: Held | None = None) -> Iterator[None]:
    """What a module holds, and random states, are afterwards what they were; meanwhile as in `start`.

    Tensors are copies meanwhile: one that is written to could not be used in a backward pass any more.
    """
    held, states = contents(module), random_states()
    others = random.getstate(), np.random.get_state()  # noqa: NPY002
    put_back(with_copies(held) if start is None else start)
    try:
        yield
    finally:
        set_random_states(states)
        random.setstate(others[0])
        np.random.set_state(others[1])  # noqa: NPY002
        put_back(held)
