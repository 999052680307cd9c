"""During training: look at every hundredth step, and leave the others alone.

Shapes: E experts.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from moe_lib.inspect.adapters import Adapter
from moe_lib.inspect.alarms import early_warning, limits
from moe_lib.inspect.find import confirm, find_blocks
from moe_lib.inspect.panel import Panel, plain
from moe_lib.inspect.recorder import Recorder
from moe_lib.inspect.run import eager, nothing_found, panel_of
from moe_lib.inspect.snapshot import on_copies
from moe_lib.inspect.tagging import NoDropout
from moe_lib.parallel import distributed


class Watch:
    """Watch a model while it trains: hooks are there in every `every`-th forward pass only.

    Training is as it would be without it, with one exception: at a look, blocks with lists of experts run a
    second time, and the model once more at the first look. What they write into what their modules hold
    (buffers, numbers, lists, objects of one's own) is taken back; what they write elsewhere (globals) is not.
    What cannot be read is listed or noted; only if nothing looks like a mixture is a ValueError
    raised, at the first look. Where torch.distributed is initialised every rank must watch, since a look sums
    over ranks.

    `with watch(model) as w:`, then `w.log(step)` for numbers, `w.panel()` for the last look, `w.history` for
    all of them.

    Args:
        model: in training mode it is looked at at its first forward pass and every `every`-th after it;
            passes in evaluation mode do not count. Recomputation under gradient checkpointing does not.
            Call it as model(x): calls of model.forward or of its parts are not seen.
            A compiled model runs eagerly while it is looked at: give what `torch.compile` returned.
        every: forward passes between two looks: with gradients accumulated over k batches, k a step.
        adapters: your own, tried first; see `Adapter`.
        path: a file for JSON lines, one for each look; written by the first rank.
        thresholds: of alarms, as for `inspect_moe`.
    """

    def __init__(self, model: nn.Module, every: int = 100, adapters: Sequence[type[Adapter]] = (),
                 path: str | Path | None = None,
                 thresholds: dict[str, float] | None = None) -> None:  # fmt: skip
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        limits(thresholds)
        if path is not None and not Path(path).parent.is_dir():
            raise ValueError(f"path {path}: there is no folder {Path(path).parent}")
        self.model = model
        self.every = every
        self.adapters = tuple(adapters)
        self.path = None if path is None else Path(path)
        self.thresholds = dict(thresholds or {})
        self.history: list[dict[str, float]] = []  # "step", and the numbers of each look
        self.steps = 0
        self.due: bool | None = None  # is the next pass to be looked at? None: every `every`-th is
        self.logged = 0  # rows of the history that `log` gave a step
        self.found: Recorder | None = None  # with the blocks that were confirmed, never attached
        self.last: Panel | None = None
        self.busy = False  # it is being looked at
        self.open = ExitStack()  # closing it ends the look
        self.end: Any = None  # takes back what `__enter__` did

    def __deepcopy__(self, memo: Any) -> Watch:
        """Itself: the hook on a copy of the model does nothing."""
        return self

    def __reduce__(self) -> Any:
        """Saved with a model: a watch of no model."""
        return Watch, (None,)

    def __enter__(self) -> Watch:
        compiled = self.model._compiled_call_impl
        if compiled is None:
            hook = self.model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
            self.end = hook.remove
            return self

        def call(*args: Any, **kwargs: Any) -> Any:  # a hook on the model would be compiled with it
            with self._look(args, kwargs) if self._due() else nullcontext():
                return compiled(*args, **kwargs)

        vars(self.model)["_compiled_call_impl"] = call
        self.end = partial(vars(self.model).update, _compiled_call_impl=compiled)
        return self

    def __exit__(self, *_: Any) -> None:
        self.end()
        self.open.close()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the model's forward: look until it ends, if it is time."""
        if torch.compiler.is_compiling() or module is not self.model or not self._due():  # a replica
            return
        known = [*module._forward_pre_hooks]
        self.open.enter_context(self._look(args, kwargs))
        after = module.register_forward_hook(self._after, always_call=True)
        self.open.callback(after.remove)
        for key, hook in [*module._forward_pre_hooks.items()]:
            if key not in known:  # added too late for this call
                hook(module, args, kwargs)

    def _after(self, *_: Any) -> None:
        if Recorder.working is None:  # else another watch tries the model
            self.open.close()

    def _due(self) -> bool:
        """Is it time to look? Only training steps count."""
        training = getattr(self.model, "_orig_mod", self.model).training
        tried, in_backward = Recorder.working is not None, torch._C._current_graph_task_id() != -1
        if self.busy or tried or not training or in_backward:
            return False
        if self.found is None and any(map(is_lazy, self.model.parameters())):  # the next pass knows them
            return False
        due = self.steps % self.every == 0 if self.due is None else self.due
        self.steps += 1
        self.due = None if self.due is None else False
        return due and (self.found is None or bool(self.found.blocks))

    @contextmanager
    def _look(self, args: tuple, kwargs: dict) -> Iterator[None]:
        """Watch one call of the model."""
        module = getattr(self.model, "_orig_mod", self.model)
        self.busy = True
        try:
            with eager():
                if self.found is None:
                    self.found = self._find(module, args, kwargs)
                recorder = Recorder(module, [block.fresh() for block in self.found.blocks], self.found.unread)
                recorder.quiet = True
                recorder.attach()
                try:
                    yield
                finally:
                    recorder.detach()
        finally:
            self.busy = False
        try:
            self._keep(recorder)
        except Exception as error:  # must not stop the training
            warnings.warn(f"a look was lost: {error}", stacklevel=2)

    def _find(self, module: nn.Module, args: tuple, kwargs: dict) -> Recorder:
        found = Recorder(module, *find_blocks(module, self.adapters))
        found.quiet = True

        def run() -> None:
            on_copies(lambda given: self.model(*given[0], **given[1]), (args, kwargs))

        with torch.no_grad(), NoDropout():
            confirm(found, run, self.adapters)
        if not found.blocks:
            if not found.unread:
                raise ValueError(nothing_found([]))
            warnings.warn(f"watch records nothing: {nothing_found(found.unread)}", stacklevel=2)
        return found

    def _keep(self, recorder: Recorder) -> None:
        if distributed() or any(block.calls or block.notes for block in recorder.blocks):
            self.last = panel_of(recorder, title=f"{type(recorder.model).__name__}, step {self.steps - 1}")
            self.last.thresholds = self.thresholds
            self.history.append({"step": float(self.steps - 1), **self.last.numbers()})
            if self.path is not None and on_first_rank():
                with self.path.open("a") as file:
                    file.write(json.dumps(plain(self.history[-1])) + "\n")

    def panel(self) -> Panel:
        """The last look: one training batch."""
        if self.last is None:
            raise ValueError(
                "nothing was seen yet: train at least one step inside `with watch(...)`, calling model(x); "
                "model.forward, training_step and parts of the model are not seen; "
                "if you call what torch.compile returned, pass that to watch"
            )
        return self.last

    def log(self, step: int | None = None) -> dict[str, float]:
        """The numbers of the last look, flat, for TensorBoard, W&B or JSON lines; {} before the first.

        `step`, if given, is stored with the looks since the last call instead of the number of the pass,
        which the lines of `path` keep.
        """
        if not self.history:
            return {}
        if step is not None:
            for row in self.history[self.logged :]:
                row["step"] = float(step)
            self.logged = len(self.history)
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


def on_first_rank() -> bool:
    return not distributed() or torch.distributed.get_rank() == 0


watch = Watch


class CollapseCallback:
    """For Hugging Face's Trainer: `CollapseCallback(every=500).add_to(trainer)`; `every` counts its steps.

    Numbers go to the trainer's log beside the loss, alarms to its output; `callback.watch` has the rest.
    Reports to TensorBoard, W&B and others are callbacks as well, and get the numbers only if they come later:
    `add_to` puts this one before them; `trainer.add_callback`, and callbacks=[...], put it behind them.
    """

    def __init__(
        self, every: int = 500, adapters: Sequence[type[Adapter]] = (), verbose: bool = True,
        path: str | Path | None = None, thresholds: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.every, self.verbose = every, verbose
        self.build = partial(Watch, every=every, adapters=adapters, path=path, thresholds=thresholds)
        self.watch: Watch | None = None
        self.open = ExitStack()  # closing it ends the watch
        self.seen = 0
        self.first = False  # of the trainer's callbacks

    def add_to(self, trainer: Any) -> CollapseCallback:
        """Before the trainer's other callbacks."""
        trainer.callback_handler.callbacks.insert(0, self)
        self.first = True
        return self

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
        if (reports := getattr(args, "report_to", None)) and not self.first:
            warnings.warn(f"{reports} get no numbers of the blocks: use add_to(trainer)", stacklevel=2)
        self.on_train_end(args, state, control)  # an earlier training may have been stopped by an error
        self.seen = 0
        self.watch = self.open.enter_context(self.build(model))
        self.watch.due = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.watch is not None
        self.watch.due = state.global_step % self.every == 0  # of a step's batches the first
        if len(self.watch.history) > self.seen:
            self.seen = len(self.watch.history)
            self.watch.log(state.global_step)
            if self.verbose and on_first_rank() and (alarms := self.watch.panel().alarms):
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
        self.open.close()
