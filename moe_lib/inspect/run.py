"""`inspect_moe`: one pass over some batches, and what it found.

Shapes: N tokens, B sequences, T positions.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_lib.inspect.adapters import Adapter, parameter_names
from moe_lib.inspect.alarms import limits
from moe_lib.inspect.block import Block
from moe_lib.inspect.find import REMEDY, confirm, find_blocks
from moe_lib.inspect.measures import ABOUT, NOTHING, Layer, Value, expert_measures, load, routing_measures
from moe_lib.inspect.panel import Panel
from moe_lib.inspect.places import by_name
from moe_lib.inspect.recorder import Recorder
from moe_lib.inspect.snapshot import on_copies, unchanged
from moe_lib.inspect.state import BlockState
from moe_lib.inspect.tamper import Loss, costs
from moe_lib.parallel import distributed

CAUSAL_BATCHES = 4
SHOWN = 100  # classes whose experts are listed, the largest; all are counted
Labels = None | str | Callable[[Any], Tensor | None]
Names = Mapping[int, str] | Sequence[str] | None


@torch.inference_mode(False)
def inspect_moe(
    model: nn.Module,
    batches: Iterable[Any],
    labels: Labels = None,
    *,
    adapters: Sequence[type[Adapter]] = (),
    names: Names = None,
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
    attention mask, is not counted. Where torch.distributed is initialised every rank must call this; each
    gets the totals of what was counted, while losses, costs and what is sampled of experts are its own.

    Args:
        model: called with each batch; with keywords if that is a mapping. A compiled model runs eagerly.
        batches: of inputs, or of pairs (inputs, labels); inputs that are a tuple are the model's arguments.
        labels: what I(c;E) is about. None: the labels of the pairs, if there are any; "tokens": the input
            ids; another string: that entry of the batches, which the model does not get unless it takes it;
            or a function of the inputs; one that returns None: no labels. Integers [B, T], [B] or [N]:
            classes, domains, sequence ids.
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
        seed: of permutations.

    Raises:
        ValueError: no block was found, no batch was given, or labels or masks do not fit the tokens.
    """
    check(batches, max_batches, thresholds)
    if causal not in (False, True, "every expert"):
        raise ValueError(f"causal must be False, True or 'every expert', got {causal!r}")
    model = getattr(model, "_orig_mod", model)
    recorder = Recorder(model, *find_blocks(model, adapters), sequence_first, seed)
    asked = run if run is not None else lambda inputs: _call(model, inputs, labels)
    call = partial(on_copies, asked)
    data = itertools.islice(map(_pair, batches), max_batches)
    kept: list[tuple[Any, Any]] = []
    with evaluating(model), torch.no_grad(), eager():
        first = next(data, None)
        if first is None:
            raise ValueError("batches is empty: give at least one batch")
        refuse_mask_as_labels(model, *first)
        confirm(recorder, lambda: call(first[0]), adapters)
        if not recorder.blocks:
            raise ValueError(nothing_found(recorder.unread))
        recorder.attach()
        stream, losses = recorder.stream, (math.nan, math.nan)
        try:
            for inputs, given in itertools.chain([first], data):
                stream.labels, stream.decoder_labels = _labels(model, labels, inputs, given, ignore_index)
                call(inputs)
                if causal and len(kept) < CAUSAL_BATCHES:
                    if loss is None and isinstance(given, Tensor) and not given.is_floating_point():
                        given = given.long().where(given != ignore_index, -100)
                    kept.append((inputs, given))
            stream.labels = stream.decoder_labels = None
            if causal:
                with unchanged(model):
                    losses = costs(recorder, call, loss, kept, causal == "every expert")
        finally:
            recorder.detach()
        panel = panel_of(recorder, title or type(model).__name__, names)
        if not panel.layers:
            raise ValueError(nothing_found(panel.unread))
    if (also := _may_be_input(model, *first)) is not None:
        for layer in panel.layers:
            layer.notes.append(
                f"the second of each pair was taken as labels; the model takes {also!r} as well: if it is "
                f"that, give ((inputs, {also}), labels)"
            )
    panel.thresholds = dict(thresholds or {})
    panel.loss, panel.loss_permuted = losses
    return panel


def panel_of(recorder: Recorder, title: str, names: Names = None) -> Panel:
    """The panel of what a recorder has seen so far, summed over ranks."""
    named = dict(names if isinstance(names, Mapping) else enumerate(names or ()))
    panel = Panel([], [f"{entry}: {REMEDY}" for entry in recorder.unread], title)
    states = _over_ranks([block.state.finish() for block in recorder.blocks])
    for block, state in zip(recorder.blocks, states, strict=True):
        if state.tokens:
            panel.layers.append(_layer(block, state, named, recorder.seed))
        else:
            why = "no value is finite" if state.not_finite else "; ".join(block.notes)
            why = why or "its forward did not run"
            panel.unread.append(f"{block.label}: {why}")
    return panel


@torch.no_grad()
def _layer(block: Block, state: BlockState, names: Mapping[int, str], seed: int) -> Layer:
    measures = routing_measures(state, seed) | expert_measures(block)
    measures |= {name: Value(cost, 0.0) for name, cost in block.costs.items()}
    notes = list(block.notes)
    if state.not_finite:
        notes.append(f"{int(state.not_finite)} tokens with values that are not finite were not counted")
    if block.examined:
        notes.append(f"experts' answers and the mixture: from a sample of {block.examined} tokens")
    classes_C, table_CE = state.class_table()
    largest = table_CE.sum(1).argsort(descending=True)[:SHOWN].sort().values
    share_CE = table_CE[largest] / table_CE[largest].sum(1, keepdim=True)
    shown = dict(zip(classes_C[largest].tolist(), share_CE.tolist(), strict=True))
    called = {c: names.get(c, str(c)) for c in shown}
    often = Counter(called.values())
    served = (state.tokens - state.dropped).clamp(min=1)
    return Layer(
        block.name, block.family, state.num_experts, state.num_slots, int(state.tokens),
        load(state).tolist(), (state.weight_E / served).tolist(),
        {name: measures.get(name, NOTHING) for name in ABOUT}, block.explanation, notes,
        {f"{called[c]} ({c})" if often[called[c]] > 1 else called[c]: row_E for c, row_E in shown.items()},
        block.dropped_E, state,
    )  # fmt: skip


def _over_ranks(states: list[Any]) -> list[Any]:
    if not distributed():
        return states
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, states)
    total = everyone[0]
    for other in everyone[1:]:
        for state, more in zip(total, other, strict=True):
            state.merge(more)
    return total


def nothing_found(unread: list[str]) -> str:
    listed = "; ".join(unread) or "no module looks like one"
    return f"no mixture-of-experts block was recognised ({listed}): {REMEDY}"


def _call(model: nn.Module, inputs: Any, labels: Labels) -> Any:
    if not isinstance(inputs, Mapping):
        return _fitting(model, inputs if isinstance(inputs, tuple | list) else (inputs,), {})
    parameters = inspect.signature(model.forward).parameters.values()
    takes = {p.name for p in parameters}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        # The entry that the labels come from is not the model's, unless its name says so.
        takes = {name for name in inputs if name != labels or name == "labels"}
    return _fitting(model, (), {name: value for name, value in inputs.items() if name in takes})


def _fitting(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The model's answer; whether it takes these arguments is said before it runs."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"the batch does not fit the model: {error}. A pair is (inputs, labels): give ((a, b), None) for "
            "two arguments; a mapping holds arguments by name: give run=lambda batch: model(batch) for one "
            "that is an argument itself"
        ) from None
    return model(*args, **kwargs)


def _pair(batch: Any) -> tuple[Any, Any]:
    """(inputs, labels or None)."""
    return tuple(batch) if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)


def check(batches: Any, max_batches: int | None, thresholds: dict[str, float] | None) -> None:
    """What is wrong with the arguments is said before the model runs."""
    limits(thresholds)
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches}")
    if isinstance(batches, Mapping | Tensor):
        raise ValueError(f"batches is one {type(batches).__name__}: give a list of batches, [batch]")
    if isinstance(batches, tuple) and len(batches) == 2 and all(isinstance(part, Tensor) for part in batches):
        one, two = batches
        if one.dtype != two.dtype or one.shape[1:] != two.shape[1:]:
            raise ValueError("batches is one pair of unlike tensors: give a list, [(inputs, labels)]")


def refuse_mask_as_labels(model: nn.Module, inputs: Any, given: Any) -> None:
    """A pair of token ids and what looks like their attention mask: it would be counted as labels."""
    if isinstance(inputs, Tensor) and isinstance(given, Tensor) and given.shape == inputs.shape:
        takes_mask = "attention_mask" in parameter_names(getattr(model, "module", model))
        if takes_mask and given.ndim == 2 and bool(((given == 0) | (given == 1)).all()):
            step_BT = given.long().diff(dim=1)
            if bool((step_BT <= 0).all() or (step_BT >= 0).all()):
                raise ValueError("the second of a pair is taken as labels, and this one looks like a mask: "
                                 "give {'input_ids': ids, 'attention_mask': mask}")  # fmt: skip


def _may_be_input(model: nn.Module, inputs: Any, given: Any) -> str | None:
    """The parameter that the second of a pair may have been meant for."""
    if given is None or isinstance(inputs, Mapping | tuple | list):
        return None
    second = parameter_names(getattr(model, "module", model))[1:2]
    known = second and re.search("^y$|^args$|^kwargs$|mask|label|target", second[0])
    return second[0] if second and not known else None


def _labels(
    model: nn.Module, labels: Labels, inputs: Any, given: Any, ignore_index: int
) -> tuple[Tensor | None, Tensor | None]:
    """Of a batch; and of its decoder's tokens: token ids are each half's own, labels of sequences both's."""
    named, decoder = by_name(model, inputs), None
    if callable(labels):
        found = labels(inputs)
    elif labels == "tokens":
        found, decoder = named.get("input_ids"), named.get("decoder_input_ids")
        found = inputs if found is None and isinstance(inputs, Tensor) else found
        if found is None:
            raise ValueError(f"labels='tokens' needs an entry input_ids, and there are {', '.join(named)}: "
                             "name the entry that holds the token ids")  # fmt: skip
    elif isinstance(labels, str):
        if labels not in named:
            raise ValueError(f"labels={labels!r} names an entry of the batches, and this batch has none")
        found = named[labels]
    else:
        found = given
    if found is None:
        return None, decoder
    try:
        found = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):  # of a pair: boxes, texts or several targets, say
        if labels is None:
            return None, None
        raise
    if found.is_floating_point():
        if labels is None:
            return None, None  # targets of a regression, say
        raise ValueError(f"labels must be integers, got {found.dtype}: give class, token or sequence ids")
    found = found.long().where(found != ignore_index, -1)
    return found, found if found.ndim == 1 and labels != "tokens" else decoder


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():  # the outer ones first
            if module.training != training:
                module.train(training)  # it may do more than set the mode, as LoRA layers that merge
        for module, training in modes.items():
            module.training = training


_stance, _asking = ExitStack(), 0


@contextmanager
def eager() -> Iterator[None]:
    """Hooks must be seen: a model compiled in place runs eagerly meanwhile, until the last of those who ask
    for it is done: two that watch one model may end in any order."""
    global _asking
    if _asking == 0:
        _stance.enter_context(torch.compiler.set_stance("force_eager"))
    _asking += 1
    try:
        yield
    finally:
        _asking -= 1
        if _asking == 0:
            _stance.close()
