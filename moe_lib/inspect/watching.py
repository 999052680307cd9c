"""During training: look at every hundredth step, and leave the others alone.

Shapes: E experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_lib.inspect.adapters import Adapter
from moe_lib.inspect.alarms import early_warning
from moe_lib.inspect.find import confirm, find_blocks
from moe_lib.inspect.panel import Panel
from moe_lib.inspect.recorder import Recorder
from moe_lib.inspect.run import eager, nothing_found, panel_of


class Watch:
    """What `watch` gives: `log(step)` for numbers, `panel()` for the last look, `history` for all of them."""

    def __init__(self, model: nn.Module, every: int = 100, adapters: Sequence[type[Adapter]] = (),
                 path: str | Path | None = None) -> None:  # fmt: skip
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.model = model
        self.every = every
        self.adapters = tuple(adapters)
        self.path = None if path is None else Path(path)
        self.history: list[dict[str, float]] = []  # "step", and the numbers of each look
        self.steps = 0
        self.recorder: Recorder | None = None
        self.found: Recorder | None = None  # with the blocks that were confirmed, never attached
        self.last: Panel | None = None
        self.handles: list[Any] = []
        self.stance: Any = None

    def start(self) -> Watch:
        target = getattr(self.model, "_orig_mod", self.model)
        self.handles = [target.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)]
        return self

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self._close()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the model's forward: is it time to look? Only training steps count."""
        if not module.training or torch._C._current_graph_task_id() != -1 or self.recorder is not None:
            return
        self.steps += 1
        if (self.steps - 1) % self.every:
            return
        if self.found is None:
            self.found = Recorder(module, *find_blocks(module, self.adapters))
            with torch.no_grad():
                confirm(self.found, lambda: module.forward(*args, **kwargs))  # past our own hook
            if not self.found.blocks:
                raise ValueError(nothing_found(self.found.unread))
        fresh = [block.fresh() for block in self.found.blocks]
        self.recorder = Recorder(module, fresh, self.found.unread)
        self.recorder.attach()
        self.recorder.batch_starts(module, args, kwargs)
        self.handles.append(module.register_forward_hook(self._after, always_call=True))
        self.stance = eager()
        self.stance.__enter__()

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self.stance is not None:
            self.stance.__exit__(None, None, None)
            self.stance = None
        if self.recorder is None:
            return
        recorder, self.recorder = self.recorder, None
        recorder.detach()
        for handle in self.handles[1:]:
            handle.remove()
        self.handles = self.handles[:1]
        if any(block.calls for block in recorder.blocks):
            self.last = panel_of(recorder, title=f"{type(recorder.model).__name__}, step {self.steps - 1}")
            self.history.append({"step": float(self.steps - 1), **self.last.numbers()})
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps(self.history[-1]) + "\n")

    def panel(self) -> Panel:
        """The last look: one training batch."""
        if self.last is None:
            raise ValueError("nothing was seen yet: train at least one step inside `with watch(...)`")
        return self.last

    def log(self, step: int | None = None) -> dict[str, float]:
        """The numbers of the last look, flat, for TensorBoard, W&B or JSON lines; {} before the first.

        `step`, if given, is stored with them.
        """
        if not self.history:
            return {}
        if step is not None:
            self.history[-1]["step"] = float(step)
        return dict(self.history[-1])

    def warnings(self, ahead: int = 1) -> dict[str, float]:
        """Blocks whose effective experts are on the way below half of E, and what is expected."""
        found = {}
        for layer in self.panel().layers:
            past = [row.get(f"{layer.name}/effective experts", math.nan) for row in self.history]
            expected = early_warning(past, layer.num_experts, ahead)
            if expected < layer.num_experts / 2:
                found[layer.name] = expected
        return found

    def figure(self, measure: str = "effective experts") -> Any:
        """One measure over training, a line per block."""
        from moe_lib.inspect.pictures import history_figure

        return history_figure(self.history, measure)


@contextmanager
def watch(model: nn.Module, every: int = 100, adapters: Sequence[type[Adapter]] = (),
          path: str | Path | None = None) -> Iterator[Watch]:  # fmt: skip
    """Watch a model while it trains: hooks are there in every `every`-th training step only.

    Args:
        model: in training mode it is looked at at its first forward pass and every `every`-th after it;
            passes in evaluation mode do not count. Recomputation under gradient checkpointing does not.
        every: steps between two looks.
        adapters: your own, tried first; see `Adapter`.
        path: a file for JSON lines, one for each look.
    """
    watching = Watch(model, every, adapters, path).start()
    try:
        yield watching
    finally:
        watching.stop()


class CollapseCallback:
    """For Hugging Face's Trainer: `trainer.add_callback(CollapseCallback(every=500))`.

    Numbers go to the trainer's log beside the loss, alarms to its output; `callback.watch` has the rest.
    """

    def __init__(
        self, every: int = 500, adapters: Sequence[type[Adapter]] = (), verbose: bool = True
    ) -> None:
        self.every, self.adapters, self.verbose = every, adapters, verbose
        self.watch: Watch | None = None
        self.seen = 0

    def __getattr__(self, name: str) -> Any:
        """The trainer's other events: nothing to do. (A base class would import transformers: seconds.)"""
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
    ) -> None:
        if model is None:
            raise ValueError("the trainer gave no model")
        self.watch = Watch(model, self.every, self.adapters).start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.watch is not None
        if len(self.watch.history) > self.seen:
            self.seen = len(self.watch.history)
            self.watch.log(state.global_step)
            if self.verbose and (alarms := self.watch.panel().alarms):
                print(f"step {state.global_step}: " + "; ".join(f"{a.layer}: {a.what}" for a in alarms))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if logs is not None and self.watch is not None and self.watch.history:
            ours = {f"moe/{name}": value for name, value in self.watch.log().items() if name != "step"}
            logs.update(ours)
            if state.log_history:
                state.log_history[-1].update(ours)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.watch is not None:
            self.watch.stop()
