"""`inspect_moe`: one pass over some batches, and what it found.

Shapes: N tokens, B sequences, T positions.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_lib.inspect.adapters import Adapter
from moe_lib.inspect.find import REMEDY, confirm, recorder_of
from moe_lib.inspect.layer import CAUSAL, layer_of
from moe_lib.inspect.measures import Value, expert_measures, routing_measures
from moe_lib.inspect.panel import Panel
from moe_lib.inspect.recorder import Recorder
from moe_lib.inspect.tamper import Loss, Tamper

Labels = None | str | Callable[[Any], Tensor | None]


def inspect_moe(
    model: nn.Module,
    batches: Iterable[Any],
    labels: Labels = None,
    *,
    adapters: Sequence[type[Adapter]] = (),
    names: Mapping[int, str] | Sequence[str] | None = None,
    ignore_index: int = -100,
    causal: bool | str = False,
    loss: Loss | None = None,
    run: Callable[[Any], Any] | None = None,
    sequence_first: bool | None = None,
    max_batches: int | None = None,
    thresholds: dict[str, float] | None = None,
    title: str = "",
    seed: int = 0,
) -> Panel:
    """Every mixture-of-experts block of a model on some data, in one pass.

    The model is in evaluation mode meanwhile, without gradients; its output is not changed. Padding, by the
    attention mask, is not counted. Where torch.distributed is initialised every rank must call this, and
    each gets the totals.

    Args:
        model: called with each batch; with keywords if that is a mapping. A compiled model runs eagerly.
        batches: of inputs, or of pairs (inputs, labels).
        labels: what I(c;E) is about. None: the labels of the pairs, if there are any; "tokens": the input
            ids; another string: that entry of the batches, which the model does not get unless it takes it;
            or a function of the batch. Integers [B, T], [B] or [N]: classes, domains, sequence ids.
        adapters: your own, tried first; see `Adapter`.
        names: of the classes.
        ignore_index: labels with this value, and negative ones, are not counted by class.
        causal: also run the model with tampered routing on the first four batches, about three times per
            block; "every expert": also without each expert in turn.
        loss: for `causal`; a function of (output, inputs, labels). None: the model's own loss,
            cross-entropy with the labels, or of the next token.
        run: calls the model on the inputs, if it is not `model(inputs)`; such as
            `lambda batch: model.generate(**batch, max_new_tokens=20)`.
        sequence_first: whether blocks read tokens as [T, B]. None: judged by the batch.
        max_batches: read no more than these.
        thresholds: of alarms, where they shall differ from `THRESHOLDS`.
        title: shown above the panel.
        seed: of permutations and of the tokens kept.

    Raises:
        ValueError: no block was found, no batch was given, or labels or masks do not fit the tokens.
    """
    model = getattr(model, "_orig_mod", model)
    recorder = recorder_of(model, adapters, sequence_first, seed)
    takes = _parameters(model)
    call = run if run is not None else lambda inputs: _call(model, inputs, labels, takes)
    data = itertools.islice(batches_of(batches), max_batches)
    kept: list[tuple[Any, Any]] = []
    causal_batches = 4 if causal else 0
    with evaluating(model), torch.no_grad(), _eager():
        first = next(data, None)
        if first is None:
            raise ValueError("batches is empty: give at least one batch")
        confirm(recorder, lambda: call(first[0]))
        if not recorder.blocks:
            raise ValueError(_nothing(recorder))
        recorder.attach()
        try:
            for inputs, given in itertools.chain([first], data):
                recorder.stream.labels = _labels(labels, inputs, given, ignore_index)
                recorder.stream.decoder_labels = _decoder_labels(recorder.stream.labels, labels, inputs)
                call(inputs)
                if len(kept) < causal_batches:
                    kept.append((inputs, given))
            recorder.stream.labels = recorder.stream.decoder_labels = None
            costs = Tamper(recorder, call, loss).costs(kept, causal == "every expert", seed) if causal else {}
        finally:
            recorder.detach()
        return panel_of(recorder, names, costs, thresholds, title or type(model).__name__, seed)


def panel_of(
    recorder: Recorder,
    names: Any = None,
    costs: dict[str, dict[str, Any]] | None = None,
    thresholds: dict[str, float] | None = None,
    title: str = "",
    seed: int = 0,
) -> Panel:
    """The panel of what a recorder has seen so far, summed over ranks."""
    if names is not None and not isinstance(names, Mapping):
        names = dict(enumerate(names))
    blocks = [block for block in recorder.blocks if block.calls]
    unread = [f"{entry}: {REMEDY}" for entry in recorder.unread]
    unread += [f"{block.name} ({block.family}): did not run" for block in recorder.blocks if not block.calls]
    states = _over_ranks([block.state.finish() for block in blocks])
    layers = []
    recorder.busy = True
    try:
        for block, state in zip(blocks, states, strict=True):
            with torch.no_grad():
                measures = routing_measures(state, seed) | expert_measures(block)
            notes = list(block.notes)
            if block.examined:
                notes.append(f"experts' answers and the mixture: from a sample of {block.examined} tokens")
            layer = layer_of(block.name, block.family, state, measures, block.explanation, notes, names)
            if cost := (costs or {}).get(block.name):
                for label, key in zip(CAUSAL, ("permuted", "swapped", "dropped"), strict=True):
                    layer.measures[label] = Value(cost[key], 0.0)
                layer.dropped_E = cost.get("dropped_E", [])
            layers.append(layer)
    finally:
        recorder.busy = False
    everything = (costs or {}).get("", {})
    loss, permuted = everything.get("loss", math.nan), everything.get("permuted", math.nan)
    return Panel(layers, unread, title, loss, permuted, dict(thresholds or {}))


def _over_ranks(states: list[Any]) -> list[Any]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return states
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, states)
    total = everyone[0]
    for other in everyone[1:]:
        for state, more in zip(total, other, strict=True):
            state.merge(more)
    return total


def _nothing(recorder: Recorder) -> str:
    listed = "; ".join(recorder.unread) or "no module looks like one"
    return f"no mixture-of-experts block was recognised ({listed}): {REMEDY}"


def _parameters(model: nn.Module) -> set[str] | None:
    """The names that the model's forward takes; None: any."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def _call(model: nn.Module, inputs: Any, labels: Labels, takes: set[str] | None) -> Any:
    if isinstance(inputs, Mapping):
        dropped = {labels} if isinstance(labels, str) and (takes is None or labels not in takes) else set()
        if labels == "labels":
            dropped = set()
        return model(
            **{k: v for k, v in inputs.items() if k not in dropped and (takes is None or k in takes)}
        )
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _labels(labels: Labels, inputs: Any, given: Any, ignore_index: int) -> Tensor | None:
    if callable(labels):
        found = labels(inputs)
    elif labels == "tokens":
        found = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    elif isinstance(labels, str):
        if not isinstance(inputs, Mapping) or labels not in inputs:
            raise ValueError(f"labels={labels!r} names an entry of the batches, and this batch has none")
        found = inputs[labels]
    else:
        found = given
    if found is None:
        return None
    if not isinstance(found, Tensor):
        found = torch.as_tensor(found)
    if found.is_floating_point():
        if labels is None:
            return None  # targets of a regression, say
        raise ValueError(f"labels must be integers, got {found.dtype}: give class, token or sequence ids")
    return found.long().where(found != ignore_index, -1)


def batches_of(data: Iterable[Any]) -> Iterable[tuple[Any, Any]]:
    """(inputs, labels or None) of each batch."""
    for batch in data:
        if isinstance(batch, tuple | list) and len(batch) == 2 and not isinstance(batch, Mapping):
            yield batch[0], batch[1]
        else:
            yield batch, None


def _decoder_labels(found: Tensor | None, labels: Labels, inputs: Any) -> Tensor | None:
    """In an encoder-decoder, labels of sequences are for both halves; token ids are each half's own."""
    if labels == "tokens":
        return inputs.get("decoder_input_ids") if isinstance(inputs, Mapping) else None
    return found if found is not None and found.ndim == 1 else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _eager() -> Any:
    """Hooks must be seen: a model compiled in place runs eagerly meanwhile."""
    return (
        torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else _nothing_done()
    )


@contextmanager
def _nothing_done() -> Iterator[None]:
    yield
