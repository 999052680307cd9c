"""A GPU that no machine needs to have: tensors without values, which nothing can read.

Whatever needs a value on the host (`.item()`, `.tolist()`, `bool(...)`, `nonzero`, a boolean index) raises on
them, as it would make the host wait on a real one.

    pretended_gpu        they say that they are on "cuda", for the branches that ask; torch can't differentiate
                         there without a driver. `Waits` sees copies between host and device, which wait
                         unless memory is pinned
    unreadable_values    they are on the CPU, and the library is told that this is not the host
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lib import products


class Waits(TorchDispatchMode):
    """Notes every copy from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, found) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors}
        if len(devices) > 1 and func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            self.copies.append(f"{func}: {[tuple(x.shape) for x in tensors]}")
        return found


def _to(module: nn.Module, device: Any = None, dtype: Any = None, memory_format: Any = None) -> nn.Module:
    """`nn.Module.to`, which cannot move such tensors."""
    for own in module.modules():
        for name, weight in own._parameters.items():
            if weight is not None:
                own._parameters[name] = nn.Parameter(weight.detach().to(device=device, dtype=dtype))
        for name, buffer in own._buffers.items():
            if buffer is not None:
                kind = dtype if buffer.is_floating_point() else None
                own._buffers[name] = buffer.to(device=device, dtype=kind)
    return module


@contextmanager
def pretended_gpu(monkeypatch: Any, capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "to", _to)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        with FakeTensorMode():
            yield


@contextmanager
def unreadable_values(monkeypatch: Any) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "to", _to)
        patch.setattr(products, "HOST", ())
        with FakeTensorMode():
            yield
