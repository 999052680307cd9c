"""Matrix products by the fastest library at hand, and how torch sees them.

Shapes: N or R rows, D width, K summed over, J columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def traced() -> bool:
    """Whether torch.compile, torch.export, a torch.func transform or forward-mode AD is active.

    Only plain operators are used then, whose shapes and branches depend on no value.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


HOST = ("cpu",)  # devices whose values can be read without waiting; tests empty it


def on_host(x: Tensor) -> bool:
    """Whether a look at the values of `x` costs nothing. Elsewhere it would wait for the device."""
    return x.device.type in HOST


def differentiable_gradient(
    function: Callable[..., Tensor], inputs: tuple[Any, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradient of `function(*inputs)` as a part of the graph, for a second derivative.

    `function` is made of operators that torch differentiates. One entry for each input, None where it asks
    for no gradient.
    """
    # Aliases, so that an input that depends on another one does not count for both.
    aliases = [x.view_as(x) if isinstance(x, Tensor) else x for x in inputs]
    wanted = [x for x in aliases if isinstance(x, Tensor) and x.requires_grad]
    with torch.autocast(grad.device.type, enabled=False):
        grads = torch.autograd.grad(function(*aliases), wanted, grad, create_graph=True, allow_unused=True)
    found: Iterator[Tensor | None] = iter(grads)
    return tuple(next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in aliases)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@functools.cache
def _onednn() -> Callable[..., Tensor] | None:
    """f(a @ b.T + bias) in float32 by oneDNN, as torch.compile calls it; None where torch lacks it.

    The library behind torch.mm leaves the widest vector units of some processors idle; there this is up to
    2.4 times as fast. Both matrices must be contiguous or the transpose of one that is: other strides take
    a path that is a hundred times slower.
    """
    try:
        linear = torch.ops.mkldnn._linear_pointwise
        linear(torch.ones(1, 1), torch.ones(1, 1), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return lambda a, b, bias: linear(a, b, bias, "none", [], "")


ONEDNN_FROM = 1_500_000  # multiplications; below, its overhead of 10 microseconds shows


def _fast_linear(a_RK: Tensor, columns: int) -> Callable[..., Tensor] | None:
    """None where torch must differentiate or compile the product: it can do neither with oneDNN's."""
    large = a_RK.numel() * max(32, columns) >= ONEDNN_FROM  # torch.mm is slow with few columns
    fits = large and a_RK.dtype == torch.float32 and on_host(a_RK)
    return _onednn() if fits and not torch.is_grad_enabled() and not traced() else None


def product(a_RK: Tensor, b_KJ: Tensor, bias_J: Tensor | None = None) -> Tensor:
    """a @ b + bias."""
    linear = _fast_linear(a_RK, b_KJ.shape[1])
    if linear is not None:
        return linear(a_RK, b_KJ.T, bias_J)
    return a_RK @ b_KJ if bias_J is None else torch.addmm(bias_J, a_RK, b_KJ)


def add_product(out_RJ: Tensor, a_RK: Tensor, b_KJ: Tensor) -> None:
    """out += a @ b."""
    linear = _fast_linear(a_RK, b_KJ.shape[1])
    if linear is not None:
        out_RJ.add_(linear(a_RK, b_KJ.T, None))
    else:
        out_RJ.addmm_(a_RK, b_KJ)
