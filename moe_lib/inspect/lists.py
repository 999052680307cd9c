"""Which lists of modules a block has, and experts whose layers are in several: `w1`, `w2`, perhaps `w3`.

Shapes: E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Join = Callable[..., Tensor]
ACTIVATIONS: list[Join] = [
    F.silu, F.gelu, partial(F.gelu, approximate="tanh"), F.relu, F.leaky_relu, F.elu, F.mish, torch.tanh,
    torch.sigmoid, F.softplus, lambda hidden: F.relu(hidden).square(), lambda hidden: hidden,
]  # fmt: skip
JOINS: dict[int, list[Join]] = {  # by the number of lists: of one, or of a gate and another
    1: ACTIVATIONS,
    2: [
        *(lambda gate, up, act=act: act(gate) * up for act in ACTIVATIONS),
        *(lambda up, gate, act=act: act(gate) * up for act in ACTIVATIONS),
    ],
}
KINDS = "moe|moa|mixtureofexperts|experts"
MOE_CLASS = re.compile(rf"({KINDS})(block|layer|ffn|mlp|feedforward)?$|sparsemlp$", re.I)


def expert_lists(block: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """At least two modules of one kind, and the name of the child that holds them; "" if the block does.

    Modules without parameters may stand in a plain list: experts that compute nothing.
    """
    own = isinstance(block, nn.ModuleList | nn.ModuleDict) and has_forward(block)
    found = []
    for name, child in [("", block)] if own else list(block.named_children()):
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and (own or not has_forward(child)):
            members = [*child.values()] if isinstance(child, nn.ModuleDict) else [*child]
            some = [m for m in members if any(True for _ in m.parameters())]
            members = some if own else members
            shapes = {(type(m), tuple(p.shape for p in m.parameters())) for m in some}
            if len(some) > 1 and len(shapes) == 1:
                found.append((name, members))
    return found


def has_forward(module: nn.Module) -> bool:
    return type(module).forward not in (nn.Module.forward, nn.ModuleList.forward, nn.ModuleDict.forward)


def named_as_mixture(module: nn.Module) -> bool:
    return MOE_CLASS.search(type(module).__name__) is not None


def join_of(before: Sequence[Sequence[nn.Module]], first: dict[int, list[Tensor]],
            last: dict[int, list[Tensor]]) -> Join | None:  # fmt: skip
    """Where experts' layers are in several lists: the function between them, by what was read in a call.

    `first` and `last`: what the experts' first and last layers read. None: no known function gives that.
    """
    with suppress(Exception):  # they take something else
        given = {e: [layers[e](torch.cat(parts)) for layers in before] for e, parts in first.items()}
        for join in JOINS.get(len(before), []):
            if all(_fits(join(*given[e]), torch.cat(parts)) for e, parts in last.items()):
                return join
    return None


def _fits(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-4 if other.dtype.itemsize >= 4 else 2e-2
    same = one.shape == other.shape
    return same and bool((one - other).float().norm() <= tolerance * other.float().norm())
