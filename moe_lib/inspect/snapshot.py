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
Held = list[tuple[Any, Any]]  # containers, and what they hold


def random_states() -> list[Tensor]:
    """Of the CPU, and of the GPU in use."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


def set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


def contents(module: nn.Module) -> Held:
    """Of the attributes of a module and of all inside it, and of the containers among them."""
    held: dict[int, tuple[Any, Any]] = {}
    waiting: list[Any] = [vars(each) for each in module.modules()]
    while waiting:
        container = waiting.pop()
        if id(container) not in held:
            held[id(container)] = container, copy.copy(container)
            parts = container.values() if isinstance(container, dict) else container
            waiting += [part for part in parts if type(part) in CONTAINERS]
    return [*held.values()]


def copied(value: Any) -> Any:
    """A tensor's copy; anything else, parameters too, as it is."""
    is_copied = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    return value.detach().clone() if is_copied else value


def with_copies(held: Held) -> Held:
    """The same with a copy of each tensor that is no parameter."""
    copies: dict[int, Any] = {}

    def once(value: Any) -> Any:
        return copies.setdefault(id(value), copied(value)) if isinstance(value, Tensor) else value

    return [
        (each, {k: once(v) for k, v in old.items()} if isinstance(old, dict) else old) for each, old in held
    ]


def put_back(held: Held) -> None:
    for container, before in held:
        container.clear()
        (container.extend if isinstance(container, list | deque) else container.update)(before)


@contextmanager
def unchanged(module: nn.Module, start: Held | None = None) -> Iterator[None]:
    """Attributes, buffers, lists and random states are afterwards what they were; meanwhile as in `start`.

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
