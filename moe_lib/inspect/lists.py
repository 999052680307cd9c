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
MOE_NAMES = "moe|moa|mixtureofexperts|experts"
MOE_CLASS = re.compile(rf"({MOE_NAMES})(block|layer|ffn|mlp|feedforward)?$|sparsemlp$", re.I)


def expert_lists(block: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """At least two modules of one kind, and the name of the child that holds them; "" if the block does.

    Modules without parameters may stand in a plain list: experts that compute nothing.
    """
    own = isinstance(block, nn.ModuleList | nn.ModuleDict) and has_forward(block)
    lists = [("", block)] if own else _lists_below(block)
    found = []
    for name, child in lists:
        named = child._modules.items()
        some = [m for _, m in named if m is not None and any(True for _ in m.parameters())]
        members = [m for key, m in named if m is not None and (not own or key.isdigit() or m in some)]
        shapes = {(type(m), tuple(p.shape for p in m.parameters())) for m in some}
        callable_ = all(has_forward(m) for m in members)
        if len(some) > 1 and callable_ and (len(shapes) == 1 or "expert" in name.lower()):
            found.append((name, members))
    return found


def _lists_below(block: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Lists that a module holds, and those in lists of lists."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and not has_forward(child):
            found += [(prefix + name, child), *_lists_below(child, f"{prefix}{name}.")]
    return found


def reads_samples(expert: nn.Module) -> bool | None:
    """Whether an expert reads whole samples, such as images, or tokens; None: its layers do not say."""
    for module in expert.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            return True
        if isinstance(module, nn.Linear):
            return False
    return None


def has_forward(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):  # compiled, say
        return True
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
