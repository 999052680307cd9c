"""bfloat16 products of a CNN on any machine.

Torch's own are for GPUs and for CPUs with AVX-512. Elsewhere its convolutions take twenty times as long as in
float32, and the gradient of a convolution's bias is wrong: it is summed up in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def bfloat16(device: torch.device, enabled: bool) -> AbstractContextManager[Any]:
    """Convolutions and linear layers of float32 weights take and give bfloat16, and sum in float32."""
    if not enabled:
        return nullcontext()
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return _Rounded()
    return torch.autocast(device.type, torch.bfloat16)


class _Rounded(TorchFunctionMode):
    """The same by products in float32 of numbers that were rounded to bfloat16."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function not in (F.conv2d, F.linear):
            return function(*args, **(kwargs or {}))
        args = [one.bfloat16().float() if isinstance(one, Tensor) else one for one in args]
        return function(*args, **(kwargs or {})).bfloat16()
