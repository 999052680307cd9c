"""The same work on new numbers, again and again: on a GPU as one CUDA graph.

The models of the study are small: an update of the weights launches some hundred kernels of a few
microseconds each, and Python takes longer to launch them than a GPU to run them. A graph is launched as one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

Work = Callable[..., dict[str, Tensor]]  # of tensors


class Replayed:
    """Calls `work`; on a GPU the first call runs as it is (libraries start then), the second is recorded, and
    every later one with inputs of the same shapes is a single launch.

    `work` must do the same whatever the values: it reads none of them on the host, draws no random numbers,
    and changes what it keeps in place. Numbers that are no tensors stay what they were when it was recorded:
    make a new `Replayed` where they change.

    Args:
        enabled: False: call `work`, always.
    """

    def __init__(self, work: Work, enabled: bool = True) -> None:
        self.work, self.enabled = work, enabled
        self.shapes: list[torch.Size] | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        shapes = [x.shape for x in inputs]
        if not (self.enabled and all(x.is_cuda for x in inputs)) or self.shapes not in (None, shapes):
            return self.work(*inputs)
        if self.shapes is None:
            self.shapes = shapes
            return self.work(*inputs)
        graph = self.graph = self.graph or self._recorded(inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        graph.replay()
        return {name: value.clone() for name, value in self.outputs.items()}

    def _recorded(self, inputs: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        """The graph, with places for its inputs and outputs; nothing of it has run yet."""
        self.inputs, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        if stream == torch.cuda.default_stream():  # which can't be recorded
            stream = _thread.stream = _thread.stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # A thread's graphs run one after the other, and may form what they need in between in one memory.
        pool = None if _thread.graph is None else _thread.graph.pool()
        with torch.cuda.stream(stream):
            # Other threads of this process may use the GPU meanwhile.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                self.outputs = self.work(*self.inputs)
            finally:
                graph.capture_end()
        _thread.graph = graph
        return graph


class _Thread(threading.local):
    graph: torch.cuda.CUDAGraph | None = None  # its last, which keeps the memory for the next
    stream: torch.cuda.Stream | None = None  # where it records what its default stream replays


_thread = _Thread()
