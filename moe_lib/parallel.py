"""One batch over several processes: losses and statistics of the whole of it.

    with global_batch():  # of the default process group
        loss = cross_entropy + 10 * soft_nearest_neighbor_loss(code_ND, labels_N)

Inside, what compares samples is computed over the parts of all processes: the SNNL from the gathered
features, the load-balancing and z-loss and the AC router's statistics from sums over the group. Parts may
differ in size; none may be empty where a loss is a mean over its own tokens.

Every process gets the loss of the whole batch, and collectives sum gradients over the group. So the *average*
of the processes' gradients (what `DistributedDataParallel` forms) is the gradient that one process with the
whole batch has. A loss of one's own, a mean over samples, becomes global by `mean_of_rows` or `mean`.

Shapes: N samples or tokens of this process, M of all processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_groups: list[Any] = []  # of the contexts that are open; the last one counts


def distributed() -> bool:
    """Whether this is one of several processes of torch.distributed."""
    return dist.is_available() and dist.is_initialized()


@contextmanager
def global_batch(group: Any = None) -> Iterator[None]:
    """Losses and statistics inside are those of the whole group's batch.

    Every process of the group must run the same losses in the same order.

    Args:
        group: of torch.distributed; None: the default one.

    Raises:
        ValueError: there is no process group.
    """
    if not distributed():
        raise ValueError(
            "global_batch needs a process group: call torch.distributed.init_process_group first"
        )
    _groups.append(dist.group.WORLD if group is None else group)
    try:
        yield
    finally:
        _groups.pop()


def active() -> bool:
    return bool(_groups)


class _Sum(torch.autograd.Function):
    """Sum over the group, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grads[0], ctx.group), None


def total(x: Tensor) -> Tensor:
    """The sum over the group, differentiable; `x` itself outside of `global_batch`."""
    return _Sum.apply(x, _groups[-1]) if _groups else x


def mean_of_rows(x: Tensor) -> Tensor:
    """Mean over the first dimension, of all processes' rows."""
    if not _groups:
        return x.mean(0)
    return total(x.sum(0)) / total(x.new_tensor(float(len(x))))


def mean(value: Tensor, count: int) -> Tensor:
    """The mean over all samples, from each process's mean over its own `count`."""
    if not _groups:
        return value
    return total(value * count) / total(value.new_tensor(float(count)))


def gather(x: Tensor) -> tuple[Tensor, slice]:
    """[M, ...]: all processes' rows in the order of ranks, differentiable; and where the own ones are."""
    if not _groups:
        return x, slice(0, len(x))
    group = _groups[-1]
    counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=x.device)
    rank = dist.get_rank(group)
    counts[rank] = len(x)
    dist.all_reduce(counts, group=group)
    start = int(counts[:rank].sum())
    own = slice(start, start + len(x))
    # A sum of parts, each in its own rows and zero elsewhere: they may be of any size, gradients as well.
    whole = x.new_zeros(int(counts.sum()), *x.shape[1:])
    return total(whole.index_copy(0, torch.arange(own.start, own.stop, device=x.device), x)), own
