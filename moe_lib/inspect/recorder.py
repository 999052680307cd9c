"""Find the blocks of a model, hook them, and pass what they dispatch to their tables.

Shapes: N tokens of one call, B sequences, T positions, M tokens examined, D width, O output width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_lib.inspect.adapters import FAMILIES, Adapter, Call, Dispatch, NotAMixture, router_scores, rows
from moe_lib.inspect.lists import MOE_CLASS, ListAdapter
from moe_lib.inspect.state import BlockState, Place

ROUTER_NAMES = ("gate", "router", "gating", "wg", "gate_network", "gating_network")
EXAMINED = 64  # tokens of each block whose mixture and experts' answers are computed again
REMEDY = "write an Adapter of about ten lines (see moe_lib.inspect.Adapter) and pass it as adapters=[...]"


class Block:
    """A block that was found: its adapter, its tables, and what was found out about it."""

    def __init__(self, name: str, adapter: Adapter, parent: nn.Module | None) -> None:
        self.name = name
        self.adapter = adapter
        self.parent = parent
        self.state = BlockState(adapter.num_experts)
        self.mixture_error = float("nan")
        self.explanation = ""
        self.notes: dict[str, None] = {}  # in order, once each
        self.calls = 0
        self.failure = ""
        self.scores_NE: Tensor | None = None  # of the call in progress
        self.sample_MD: Tensor | None = None  # what the experts read
        self.width_BT: tuple[int, int] | None = None  # the block's own input, if it has three dimensions

    @property
    def family(self) -> str:
        return type(self.adapter.block).__name__


def find_blocks(model: nn.Module, adapters: Sequence[type[Adapter]] = ()) -> tuple[list[Block], list[str]]:
    """The blocks that an adapter reads, in the model's order, and the names of those that look like one."""
    model = getattr(model, "_orig_mod", model)
    modules = dict(model.named_modules())
    found: dict[str, Block] = {}
    candidates: dict[str, Block] = {}
    for name, module in modules.items():
        if any(name.startswith(f"{other}.") for other in found if other):
            continue
        parent = modules.get(name.rpartition(".")[0]) if name else None
        for kind in (*adapters, *FAMILIES):
            if kind.matches(module):
                found[name] = Block(name, kind(module), parent)
                break
        else:
            if ListAdapter.matches(module):
                candidates[name] = Block(name, ListAdapter(module), parent)
    # A list of layers holds blocks; a list of experts holds none.
    everything = {**candidates, **found}
    for name, block in candidates.items():
        inside = f"{name}." if name else ""
        if not any(other != name and other.startswith(inside) for other in everything):
            found[name] = block
    order = [name for name in modules if name in found]
    unread = [
        f"{name} ({type(module).__name__})"
        for name, module in modules.items()
        if name and MOE_CLASS.search(type(module).__name__)
        and not any(_inside(name, other) or _inside(other, name) for other in found)
    ]  # fmt: skip
    unread = [entry for entry in unread if not any(entry.startswith(f"{o.split(' ')[0]}.") for o in unread)]
    return [found[name] for name in order], unread


def _inside(name: str, other: str) -> bool:
    return name == other or not other or name.startswith(f"{other}.")


class Recorder:
    """Hooks on the blocks of one model; between `attach` and `detach` every call is counted once."""

    def __init__(self, model: nn.Module, adapters: Sequence[type[Adapter]] = (),
                 sequence_first: bool | None = None, seed: int = 0) -> None:  # fmt: skip
        self.model = getattr(model, "_orig_mod", model)
        self.blocks, self.unread = find_blocks(self.model, adapters)
        self.sequence_first = sequence_first
        self.on = True
        self.busy = False  # our own calls of experts and blocks are not counted
        self.examine = True
        self.draw = torch.Generator().manual_seed(seed)
        self.handles: list[Any] = []
        self.calls: dict[str, Call] = {}
        self.labels: Tensor | None = None
        self.masks: dict[str, Tensor | None] = {}
        self.batch_shape: tuple[int, ...] = ()
        self.num_tokens: dict[int, int] = {}  # by length of a call: where its stream stands
        self.places: dict[int, tuple[Tensor, Tensor]] = {}
        self.reasons: dict[str, str] | None = None  # why lists are no experts; while they are tried
        self.tamper: Callable[[Block, Dispatch, Tensor | None], Tensor | None] | None = None

    # ------------------------------------------------------------------------------------- hooks

    def attach(self) -> Recorder:
        if self.handles:
            return self
        self.handles.append(self.model.register_forward_pre_hook(self._batch_starts, with_kwargs=True))
        for block in self.blocks:
            self._hook(block)
        return self

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.calls = {}

    def _hook(self, block: Block) -> None:
        module, adapter = block.adapter.block, block.adapter
        self.handles.append(module.register_forward_pre_hook(self._starts(block), with_kwargs=True))
        # always_call: a dual level that is left open would break every later one.
        self.handles.append(
            module.register_forward_hook(self._ends(block), with_kwargs=True, always_call=True)
        )
        for name in adapter.watch:
            self.handles.append(module.get_submodule(name).register_forward_hook(self._child(block, name)))
        if isinstance(adapter, ListAdapter):
            for e, member in enumerate(adapter.members):
                self.handles.append(member.register_forward_hook(self._expert(adapter, e)))
        holder = module if any(hasattr(module, name) for name in ROUTER_NAMES) else block.parent
        for name in ROUTER_NAMES:
            router = getattr(holder, name, None)
            if isinstance(router, nn.Module) and name not in adapter.watch:
                self.handles.append(router.register_forward_hook(self._router(block)))
                break
        if block.parent is not None:
            self.handles.append(block.parent.register_forward_pre_hook(self._parent(block)))

    def _idle(self) -> bool:
        in_backward = torch._C._current_graph_task_id() != -1  # checkpointing recomputes: counted before
        return not self.on or self.busy or in_backward

    def _batch_starts(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._idle():
            return
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if len(args) == 1 and isinstance(args[0], Mapping):
            kwargs = {**args[0], **kwargs}
        self.masks = {"": kwargs.get("attention_mask"), "decoder": kwargs.get("decoder_attention_mask")}
        ids = kwargs.get("input_ids")
        if ids is None and tensors:
            ids = tensors[0]
        self.batch_shape = tuple(ids.shape) if isinstance(ids, Tensor) else ()
        self.encoder_decoder = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
        self.places = {}

    def _parent(self, block: Block) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            tensor = next((a for a in args if isinstance(a, Tensor)), None)
            block.width_BT = None
            if tensor is not None and tensor.ndim == 3:
                block.width_BT = (tensor.shape[0], tensor.shape[1])

        return hook

    def _starts(self, block: Block) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._idle():
                return
            self.calls[block.name] = Call(block.adapter.names, args, kwargs)
            if isinstance(block.adapter, ListAdapter):
                block.adapter.begin(args, kwargs)

        return hook

    def _child(self, block: Block, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if not self._idle() and block.name in self.calls:
                self.calls[block.name].seen[name] = output

        return hook

    def _router(self, block: Block) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if self._idle() or getattr(block.adapter, "replaying", False):
                return
            block.scores_NE = router_scores(output, block.adapter.num_experts)

        return hook

    def _expert(self, adapter: ListAdapter, e: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            return None if self._idle() else adapter.note(e, args, output)

        return hook

    def _ends(self, block: Block) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            call = self.calls.pop(block.name, None)
            if call is None or self._idle():
                return None
            call.output = output
            adapter = block.adapter
            self.busy = not isinstance(adapter, ListAdapter)
            try:
                if isinstance(adapter, ListAdapter):
                    adapter.end(call)
                    self.busy = True
                if output is None:  # the block failed
                    return None
                with torch.no_grad():
                    return self._record(block, call)
            finally:
                self.busy = False

        return hook

    # --------------------------------------------------------------------------------- recording

    def _record(self, block: Block, call: Call) -> Any:
        try:
            seen = block.adapter.dispatch(call)
        except NotAMixture as error:
            if self.reasons is None:
                raise ValueError(f"block {block.name!r} is no longer a mixture: {error}") from error
            self.reasons[block.name] = str(error)
            return None
        if seen.scores_NE is None:
            seen = seen._replace(scores_NE=block.scores_NE)
            block.scores_NE = None
        seen = Dispatch(*(t if t is None else t.detach() for t in seen))
        block.calls += 1
        place = self._place(block, call, len(seen.indices_NK))
        if self.tamper is not None:
            change_NO = self.tamper(block, seen, place.valid_N)
            return None if change_NO is None else _add(call.output, change_NO)
        if self.examine and block.sample_MD is None:
            self._examine(block, seen, place, rows(call.tokens))
        block.state.update(seen, place)
        return None

    def _examine(self, block: Block, seen: Dispatch, place: Place, input_ND: Tensor) -> None:
        """Once a block: is the mixture what was observed? And a sample of what its experts read."""
        usable_N = (seen.indices_NK >= 0).any(1)
        if place.valid_N is not None:
            usable_N &= place.valid_N
        usable = usable_N.nonzero().flatten()
        if not len(usable):
            return
        some_M = usable[torch.linspace(0, len(usable) - 1, min(EXAMINED, len(usable))).long()]
        block.sample_MD = seen.tokens_ND[some_M].clone()
        if seen.output_NO is None:
            block.explanation = "not checked: the adapter gives no output"
            return
        mixed_MO = block.adapter.mix(
            block.sample_MD, seen.indices_NK[some_M], seen.weights_NK[some_M]
        ).float()
        actual_MO = seen.output_NO[some_M].float()
        rest_MO = actual_MO - mixed_MO
        scale = actual_MO.norm().clamp(min=1e-30)
        block.mixture_error = float(rest_MO.norm() / scale)
        tolerance = 2e-2 if seen.tokens_ND.dtype in (torch.bfloat16, torch.float16) else 1e-3
        if block.mixture_error <= tolerance:
            block.explanation = "the mixture of what was observed is the block's output"
            return
        shared_MO = self._shared(block, block.sample_MD)
        named = {"a shared expert": shared_MO}
        if input_ND.shape == seen.output_NO.shape:
            named["the block's input (a residual connection)"] = input_ND[some_M].float()
        for what, part_MO in named.items():
            if part_MO is not None and float((rest_MO - part_MO).norm() / scale) <= tolerance:
                block.mixture_error = float((rest_MO - part_MO).norm() / scale)
                block.explanation = f"the block's output is the mixture and {what}"
                return
        block.explanation = (
            f"the block's output differs from the mixture by {block.mixture_error:.0%} of its norm: "
            "something else is added, or the answers are transformed after mixing"
        )

    @staticmethod
    def _shared(block: Block, sample_MD: Tensor) -> Tensor | None:
        """The answer of an expert that every token has, under the names that it goes by."""
        module: Any = block.adapter.block
        for name in ("shared_expert", "shared_experts", "shared_mlp"):
            shared = getattr(module, name, None)
            if isinstance(shared, nn.Module):
                answer_MO = shared(sample_MD)
                if isinstance(gate := getattr(module, "shared_expert_gate", None), nn.Module):
                    answer_MO = gate(sample_MD).sigmoid() * answer_MO
                return answer_MO.float()
        return None

    def _place(self, block: Block, call: Call, num_tokens: int) -> Place:
        """Padding, labels and positions of this call's tokens."""
        shape = block.width_BT
        own = call.tokens
        if own.ndim == 3 and own.shape[0] * own.shape[1] == num_tokens:
            shape = (own.shape[0], own.shape[1])
        elif shape is not None and shape[0] * shape[1] != num_tokens:
            shape = None
        mask = self.masks.get("")
        if getattr(self, "encoder_decoder", False) and "decoder" in block.name:
            mask = self.masks.get("decoder")
        if mask is not None and mask.ndim != 2:
            block.notes["the attention mask is not [B, T]: padding is not told apart"] = None
            mask = None
        labels = self.labels
        known = mask if mask is not None else labels if labels is not None and labels.ndim == 2 else None
        batch = self.batch_shape[0] if self.batch_shape else None
        first = self.sequence_first
        if shape is None and known is not None and num_tokens % len(known) == 0:
            shape = (len(known), num_tokens // len(known))
            if first is None:
                block.notes["the block reads tokens [N, D]: taken as sequence after sequence"] = None
        if shape is None and first is None and batch and num_tokens % batch == 0 and num_tokens > batch:
            shape = (batch, num_tokens // batch)
            block.notes["the block reads tokens [N, D]: taken as sample after sample"] = None
        if first is None and shape is not None and batch is not None and shape[0] != shape[1]:
            first = shape[0] != batch and shape[1] == batch
            if first:
                block.notes["sequence-first: the block reads tokens as [T, B]"] = None
        place = Place()
        if shape is not None:
            size, length = (shape[1], shape[0]) if first else shape
            place.sequences = None if first else (size, length)
            place.valid_N = self._aligned(block, mask, size, length, bool(first), "attention mask", own)
            place.labels_N = self._aligned(block, labels, size, length, bool(first), "labels", own)
            if place.valid_N is not None:
                place.valid_N = place.valid_N.bool()
        elif labels is not None:
            place.labels_N = self._aligned(block, labels, num_tokens, 1, False, "labels", own)
        if num_tokens not in self.places:
            start = self.num_tokens.get(num_tokens, 0)
            self.num_tokens[num_tokens] = start + num_tokens
            priority_N = torch.rand(num_tokens, generator=self.draw, dtype=torch.float64)
            self.places[num_tokens] = (start + torch.arange(num_tokens), priority_N)
        place.position_N, place.priority_N = self.places[num_tokens]
        return place

    @staticmethod
    def _aligned(block: Block, given: Tensor | None, size: int, length: int, first: bool, what: str,
                 like: Tensor) -> Tensor | None:  # fmt: skip
        """[N] in the order of the block's tokens, from [B, T], [B] or [N]."""
        if given is None:
            return None
        given = given.to(like.device)
        if given.ndim == 1 and len(given) == size:
            table_BT = given[:, None].expand(size, length)
        elif given.ndim == 1 and len(given) == size * length:
            return given
        elif given.ndim == 2 and len(given) == size and given.shape[1] >= length:
            table_BT = given[:, given.shape[1] - length :]  # the last ones: decoding step by step
        elif first and given.shape == (length, size):
            return given.flatten()
        else:
            raise ValueError(
                f"{what} {tuple(given.shape)} do not fit the tokens of block {block.name!r}, "
                f"{size} sequences of {length}: give [B, T], [B] or [N], or sequence_first=True for [T, B]"
            )
        return (table_BT.T if first else table_BT).flatten()


def _add(output: Any, change_NO: Tensor) -> Any:
    """The block's output with a change added to its first tensor."""
    if isinstance(output, Tensor):
        return output + change_NO.view(output.shape).to(output.dtype)
    items = [*output]
    at = next(i for i, value in enumerate(items) if isinstance(value, Tensor))
    items[at] = items[at] + change_NO.view(items[at].shape).to(items[at].dtype)
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def confirm(recorder: Recorder, run: Callable[[], Any]) -> None:
    """Try lists of like modules on one batch: those that are no experts are left out, with the reason."""
    lists = [block for block in recorder.blocks if isinstance(block.adapter, ListAdapter)]
    if lists:
        with unchanged(recorder.model):
            _confirm(recorder, lists, run)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Buffers and random states are afterwards what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


def _confirm(recorder: Recorder, lists: list[Block], run: Callable[[], Any]) -> None:
    reasons = _try_lists(recorder, lists, run)
    if reasons is None:  # some block cannot be tagged: find out which
        reasons = {}
        for block in lists:
            reasons |= _try_lists(recorder, [block], run) or {block.name: block.failure}
    for block in lists:
        adapter = block.adapter
        assert isinstance(adapter, ListAdapter)
        reason = reasons.get(block.name, "" if block.calls else "its forward was not called")
        at = recorder.blocks.index(block)
        recorder.blocks[at] = Block(block.name, ListAdapter(adapter.block, adapter.holder), block.parent)
        if not reason and not adapter.named_as_experts and not varies(block.state):
            reason = "every token gets the same weights: an ensemble, or no mixture of experts"
        if not reason:
            continue
        del recorder.blocks[at]
        if adapter.named_as_experts:
            outer = _outer(recorder, block, run)
            if outer is not None:
                recorder.blocks.insert(at, outer)
            else:
                recorder.unread.append(f"{block.name} ({block.family}): {reason}")


def _outer(recorder: Recorder, block: Block, run: Callable[[], Any]) -> Block | None:
    """The module around one that only holds experts, if that is what mixes their answers."""
    if block.parent is None or block.parent is recorder.model or block.adapter.holder is not None:  # type: ignore[attr-defined]
        return None
    name = block.name.rpartition(".")[0]
    modules = dict(recorder.model.named_modules())

    def fresh() -> Block:
        adapter = ListAdapter(modules[name], block.adapter.block)
        return Block(name, adapter, modules.get(name.rpartition(".")[0]))

    tried = fresh()
    reasons = _try_lists(recorder, [tried], run)
    return fresh() if reasons == {} and tried.calls else None


def _try_lists(recorder: Recorder, lists: list[Block], run: Callable[[], Any]) -> dict[str, str] | None:
    """Reasons by block; None if the model failed under the tags."""
    single = Recorder.__new__(Recorder)
    single.__dict__ |= {**recorder.__dict__, "blocks": lists, "handles": [], "calls": {}, "places": {}}
    single.num_tokens, single.draw, single.reasons = {}, torch.Generator().manual_seed(0), {}
    try:
        single.attach()
        run()
    except (NotAMixture, NotImplementedError, RuntimeError) as error:
        for block in lists:
            block.failure = (str(error) or type(error).__name__).splitlines()[0]
        return None
    finally:
        single.detach()
    return single.reasons


def varies(state: BlockState) -> bool:
    """Do tokens differ in their weights?"""
    mean_E = state.weight_E / state.weight_E.sum()
    marginal = torch.special.entr(mean_E).sum()
    per_token = state.entropy / (state.tokens - state.dropped).clamp(min=1)
    return bool(marginal - per_token > 1e-6)


def batches_of(data: Iterable[Any]) -> Iterable[tuple[Any, Any]]:
    """(inputs, labels or None) of each batch."""
    for batch in data:
        if isinstance(batch, tuple | list) and len(batch) == 2 and not isinstance(batch, Mapping):
            yield batch[0], batch[1]
        else:
            yield batch, None


__all__ = ["REMEDY", "Block", "Recorder", "batches_of", "confirm", "find_blocks", "rows"]
