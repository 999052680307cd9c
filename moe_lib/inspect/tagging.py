"""Experts kept as a list of modules, under any name, behind any gate: observed by tagging their answers.

A block's output is linear in its experts' answers. Each answer carries a tangent (forward-mode automatic
differentiation) that is the one-hot code of its expert; the tangent of the block's output is then, token
by token, the weight of each expert. Gate, bias, groups, capacity, normalisation: all are in it, none need
be known, and the block's output is not changed.

Shapes: N tokens, D width, O output width, E experts, K chosen per token.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from moe_lib.inspect.adapters import (
    Adapter,
    Call,
    Dispatch,
    NotAMixture,
    first_tensor,
    from_dense,
    leaves_of,
    replaced,
    rows,
    stacked_weights,
)  # fmt: skip
from moe_lib.inspect.lists import (
    Join,
    expert_lists,
    has_forward,
    join_of,
    named_as_mixture,
    reads_samples,
)  # fmt: skip
from moe_lib.inspect.snapshot import (
    contents,
    copied,
    every_random_state,
    set_every_random_state,
    unchanged,
    with_copies,
)


@contextmanager
def _tagging() -> Iterator[None]:
    """Tensors can carry tangents: inside of reentrant checkpointing too, where that is off."""
    if forward_ad._current_level >= 0:  # inside of another block
        yield
        return
    with warnings.catch_warnings():  # the first dual tensor imports a module that warns about itself
        warnings.simplefilter("ignore", FutureWarning)
        from torch._decomp import decompositions_for_jvp  # noqa: F401
    enabled = torch._C._is_fwd_grad_enabled()
    torch._C._set_fwd_grad_enabled(True)
    try:
        with forward_ad.dual_level():
            yield
    finally:
        torch._C._set_fwd_grad_enabled(enabled)


def tagged(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


class NoDropout(TorchFunctionMode):
    """Switches dropout off for tagged tensors, where it would hide the weights; it acts on all others."""

    passed = False  # it would have changed a tagged tensor

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        x = args[0] if args and "dropout" in getattr(func, "__name__", "") else None
        if tagged(x):
            given = dict(zip(("x", "p", "training"), args, strict=False)) | (kwargs or {})
            self.passed |= bool(given.get("p", 0.5) and given.get("training", given.get("train", True)))
            primal = forward_ad.unpack_dual(x).primal.clone()
            func(primal, *args[1:], **(kwargs or {}))  # later draws stay the same
            return x
        return func(*args, **(kwargs or {}))


SIDE_BY_SIDE = "it returns its experts' answers side by side, and does not mix them"
BYPASSED = "its experts were not called, or not through __call__: as expert(x), not expert.forward(x)"
DROPPED_SAMPLES = (
    "whole samples have no expert: if their paths are dropped at random (stochastic depth), they are no "
    "dropped tokens; a module DropPath is known"
)
DROPPED_PATH = re.compile("droppath|stochasticdepth", re.I)


@contextmanager
def _no_dropped_paths(block: nn.Module) -> Iterator[list[nn.Module]]:
    """Switches off what drops whole samples at random, for tagged tensors; gives the modules it was."""
    found = []

    def passed(module: nn.Module, args: tuple, output: Any) -> Any:
        if not args or not tagged(args[0]):
            return None
        if module.training:
            found.append(module)
        return args[0]

    dropping = [m for m in block.modules() if DROPPED_PATH.search(type(m).__name__.replace("_", ""))]
    handles = [module.register_forward_hook(passed) for module in dropping]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class ListAdapter(Adapter):
    """A block with a ModuleList or ModuleDict of like modules whose answers it mixes.

    `holder` is the module that holds the list, if it is not the block itself; `which` of its lists it is.
    """

    ran: dict[int, list[Tensor]]  # what each expert read,
    ran_before: dict[int, list[Tensor]]  # and its first layer, if that is in another list
    answered: dict[int, list[Tensor]]  # what it answered
    read_sums: dict[int, Tensor]  # of what each expert read in the model's own call, if it is replayed
    parts: list[int]  # which leaves of the block's output are mixtures,
    tangent: Tensor | None  # of their sum
    tagged: Tensor | None  # their sum, as the tagged call had it
    replay_with: Any  # arguments, random states and what the block held
    row: tuple[int, ...] = ()  # shape of what an expert reads of one token,
    sequences = False  # as [B, T, D]

    def __init__(self, block: nn.Module, holder: nn.Module | None = None, which: int = 0) -> None:
        super().__init__(block)
        found = expert_lists(block if holder is None else holder)  # not empty, by `matches`
        self.list_name, self.members = found[which]
        self.samples = reads_samples(self.members[0])
        self.holder = holder
        self.num_lists = len(found)
        # Lists as long, which may hold first layers of the same experts: up, or gate and up.
        others = [members for _, members in found if members is not self.members]
        self.before = [members for members in others if len(members) == len(self.members)]
        self.joins: Join | None = None  # makes of their answers what the members read
        self.judged = False  # whether there is one
        self.forget()
        self.called = False  # was an expert, ever?
        self.inside = False  # does it run inside of another block that is tagged?
        self.confirmed = False  # it has been read once
        self.reads_input = False  # the experts read the block's input as it is
        self.takes_more = False  # and other tensors

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        called = has_forward(block) or not isinstance(block, nn.ModuleList | nn.ModuleDict)
        return called and bool(expert_lists(block))

    @property
    def list_of_experts(self) -> bool:
        """By its name, or its members' class."""
        return "expert" in f"{self.list_name} {type(self.members[0]).__name__}".lower()

    @property
    def named_as_experts(self) -> bool:
        return self.list_of_experts or named_as_mixture(self.block)

    @property
    def num_experts(self) -> int:
        return len(self.members)

    def answer(self, e: int, tokens_MD: Tensor) -> Tensor:
        read = tokens_MD.view(-1, *self.row) if self.row else tokens_MD
        read = read[None] if self.sequences else read
        if self.joins is not None:
            read = self.joins(*(layers[e](read) for layers in self.before))
        answer = first_tensor(self.members[e](read))
        return answer.flatten(1) if len(self.row) > 1 else rows(answer)

    def expert_weights(self) -> list[Tensor]:
        lists = [self.members, *(self.before if self.joins is not None else [])]
        return [weight for layers in lists for weight in stacked_weights(layers)]

    # ------------------------------------------------------------------------------------ tagging

    def begin(self, args: tuple, kwargs: dict) -> None:
        self.forget()
        if torch.is_grad_enabled():  # a tangent would change the graph: replayed afterwards, without one
            held = with_copies(contents(self.block, *tree_leaves((args, kwargs))))
            self.replay_with = (*tree_map(copied, (args, kwargs)), every_random_state(), held)
        else:
            self.inside = forward_ad._current_level >= 0 and not any(map(tagged, tree_leaves((args, kwargs))))
            self.open = ExitStack()
            self.open.enter_context(_tagging())

    def note(self, e: int, args: Any, output: Any) -> Any:
        """Expert e's answer with the tag of e."""
        answer, read = first_tensor(output), first_tensor(args)
        self.called, self.answer_dtype = True, answer.dtype
        if self.open is None:
            self.read_sums[e] = _sum(read) + self.read_sums.get(e, 0)
            return None
        read, tangent = forward_ad.unpack_dual(read)
        samples = read.ndim > 3 if self.samples is None else self.samples
        self.row = tuple(read.shape[1:] if samples else read.shape[-1:])
        self.sequences = read.ndim == 3 and not samples
        self.sequential |= tangent is not None and bool(tangent.any())
        self.takes_more |= sum(isinstance(leaf, Tensor) for leaf in tree_leaves(args)) > 1
        self.ran.setdefault(e, []).append(read)
        answer = forward_ad.unpack_dual(answer).primal
        if not self.examined:
            self.answered.setdefault(e, []).append(answer.clone())  # the block may weight it in place
        tag = answer.new_zeros(answer.shape)
        flat = tag.flatten(1) if samples else tag.view(-1, tag.shape[-1])
        self.width = flat.shape[1]
        flat[:, e :: self.num_experts] = 1  # in every period, to see what changes single features
        return replaced(output, forward_ad.make_dual(answer, tag))

    def note_before(self, e: int, args: Any, output: Any) -> None:
        """What the first of the layers of expert e read, if it may consist of several."""
        if self.open is not None:
            read = forward_ad.unpack_dual(first_tensor(args)).primal
            self.ran_before.setdefault(e, []).append(read)

    def end(self, call: Call) -> None:
        """Reads the tags of the block's output."""
        if self.open is None and call.output is not None and self.read_sums:
            self._replay(call)
        elif self.open is not None:
            with self.open:
                if call.output is not None:
                    self._find_tags(call.output, call)
            self.open = None

    def untagged(self, output: Any) -> Any:
        """Of a block inside of another: its tags end with it."""
        if not self.inside:
            return output
        return tree_map(lambda leaf: forward_ad.unpack_dual(leaf).primal if tagged(leaf) else leaf, output)

    def _find_tags(self, output: Any, call: Call) -> None:
        """The tags of the block's output; of their sum, if several outputs of one shape have tags."""
        tags: dict[int, Tensor] = {}
        for at, leaf in enumerate(leaves := leaves_of(output)):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1:
                tag = forward_ad.unpack_dual(leaf).tangent
                tags |= {} if tag is None else {at: tag}
        if not tags:
            return
        some = self._mixtures(tags, len(_rows(call.tokens, math.prod(self.row))) if self.row else 0)
        self.parts = [at for at in some if tags[at].shape == tags[some[0]].shape]
        self.part, self.mixes = some[0], len(self.parts) == 1
        self.tangent = torch.stack([tags[at] for at in self.parts]).sum(0)
        self.tagged = torch.stack([forward_ad.unpack_dual(leaves[at]).primal for at in self.parts]).sum(0)
        count = len(_rows(call.tokens, math.prod(self.row)))
        known = len(self.tangent.flatten(0, -2)), count * self.num_experts
        others = {at: tag for at, tag in tags.items() if at not in self.parts and tag.any()}
        left = [[*tag.shape] for tag in others.values() if tag.shape[-1] == self.width
                and len(tag.flatten(0, -2)) not in known]  # fmt: skip
        if left:
            self.remark = f"tokens of another output of its own, {left[0]}, are not counted"
        lost_BT = ~self.tangent.any(-1)
        lost_BT = lost_BT.flatten(1) if lost_BT.ndim > 1 else lost_BT[:, None]
        some_B, all_B = lost_BT.any(1), lost_BT.all(1)
        whole = torch.equal(some_B, all_B) and 0 < int(all_B.sum()) < len(all_B)
        if self.block.training and lost_BT.shape[1] > 1 and whole:
            self.remark = DROPPED_SAMPLES
        if not self.mixes:
            self.remark = f"it returns {len(self.parts)} mixtures of its experts: their weights are added up"

    def _mixtures(self, tags: dict[int, Tensor], num_tokens: int) -> list[int]:
        """Of the tagged outputs those that may be the mixture: with a row for each token, if there are any;
        and not the answers of one expert, which a block may return beside it."""
        some = [at for at, tag in tags.items() if tag.any()] or [*tags]
        some = [at for at in some if len(_rows(tags[at], self.width)) == num_tokens] or some
        single = {at: tag_D for at in some if (tag_D := self._single(tags[at])) is not None}
        if len(single) < len(some):
            return [at for at in some if at not in single]
        first = single[some[0]]
        if any(not torch.equal(tag_D, first) for tag_D in single.values()):
            raise NotAMixture(SIDE_BY_SIDE)
        return some

    def _single(self, tag: Tensor) -> Tensor | None:
        """The tag that all rows have, if it is one expert's, unweighted."""
        first_NE = _rows(tag, self.width)[:, : self.num_experts]
        one_E = first_NE[:1].flatten()
        bare = bool(((one_E == 0) | (one_E == 1)).all()) and float(one_E.sum()) == 1
        return one_E if bare and bool((first_NE == one_E).all()) else None

    @torch.no_grad()
    def _replay(self, call: Call) -> None:
        """The block once more, tagged, from the state it started with."""
        args, kwargs, states, held = self.replay_with
        try:
            with (
                unchanged(self.block, *tree_leaves((args, kwargs)), start=held), _tagging(),
                NoDropout() as dropout, _no_dropped_paths(self.block) as dropped, ExitStack() as self.open,
            ):  # fmt: skip
                set_every_random_state(states)
                self._find_tags(self.block.forward(*args, **kwargs), call)
        finally:
            self.open = None
        if dropout.passed or dropped:
            self.unchecked = "dropout acts on the experts' answers or on the block's output"
        again = {e: torch.stack([_sum(part) for part in parts]).sum() for e, parts in self.ran.items()}
        self.strayed = again.keys() != self.read_sums.keys() or not all(
            torch.allclose(again[e], was, rtol=1e-5, equal_nan=True) for e, was in self.read_sums.items()
        )

    def forget(self) -> None:
        if self.open is not None:  # the block was interrupted
            self.open.close()
            self.open = None
        self.ran, self.read_sums, self.tangent, self.tagged, self.replay_with = {}, {}, None, None, None
        self.ran_before, self.answered = {}, {}
        self.sequential, self.width, self.strayed, self.unchecked = False, 0, False, ""

    def dispatch(self, call: Call) -> Dispatch:
        num_experts = self.num_experts
        if not self.ran or self.tangent is None:
            output_NO = rows(call.output)
            if not self.confirmed and len(output_NO):
                raise NotAMixture(self._why_no_tags())
            none_N1 = torch.full((len(output_NO), 1), -1, device=output_NO.device)
            return Dispatch(output_NO[:0], none_N1, torch.zeros(none_N1.shape, device=none_N1.device),
                            output_NO, in_order=False)  # fmt: skip
        leaves = leaves_of(call.output)
        several = self.parts[1:]
        output = torch.stack([leaves[at] for at in self.parts]).sum(0) if several else leaves[self.parts[0]]
        output_NO, tags_NO = (_rows(tensor, self.width) for tensor in (output, self.tangent))
        if not self.judged and self.before and self.ran.keys() == self.ran_before.keys():
            with unchanged(self.block):
                self.judged, self.joins = True, join_of(self.before, self.ran_before, self.ran)
        if self.joins is not None:
            self.ran, (read, *_) = self.ran_before, next(iter(self.ran_before.values()))
            self.row, self.sequences = tuple(read.shape[-1:]), read.ndim == 3
        given_ND = _rows(call.tokens, math.prod(self.row))
        self._refuse(given_ND, output_NO, tags_NO)
        finite_N1 = tags_NO.isfinite().all(1, keepdim=True)
        indices_NK, weights_NK = from_dense(tags_NO[:, :num_experts].where(finite_N1, 0))
        shapes = self.tangent.shape[:-1], (num_experts, len(tags_NO) // num_experts)
        if not self.confirmed and any(_side_by_side(indices_NK, weights_NK, s, num_experts) for s in shapes):
            raise NotAMixture(SIDE_BY_SIDE)
        self.confirmed = True
        plain = bool(((weights_NK == 1) | (indices_NK < 0)).all()) and indices_NK.shape[1] > 1
        if plain:
            indices_NK, weights_NK = self._weights_of_inputs(given_ND, indices_NK, weights_NK)
            if self.takes_more and not self.scales_inputs:
                raise NotAMixture("answers are added up as they are, and its experts take more than tokens: "
                                  "weights may act inside of them; pass an adapter")  # fmt: skip
        tokens_ND, in_order = self._tokens(given_ND, indices_NK, weights_NK)
        if plain and not in_order:
            raise NotAMixture("answers are added up as they are, and what its experts read is not what it "
                              "was given: weights may be in there; pass an adapter")  # fmt: skip
        if not in_order and self.width < 2 * num_experts:
            self.remark = (f"answers of width {self.width} for {num_experts} experts: a scale of single "
                           "features after mixing would look like weights, and is not checked")  # fmt: skip
        if self.scales_inputs:  # tokens that are zero do not show them
            finite_N1 = finite_N1 & given_ND.any(1, keepdim=True)
        weights_NK = weights_NK.where(finite_N1, torch.nan)  # not counted
        return Dispatch(tokens_ND, indices_NK, weights_NK, output_NO, in_order=in_order)

    def _refuse(self, given_ND: Tensor, output_NO: Tensor, tags_NO: Tensor) -> None:
        """Raises NotAMixture where the tags are not the weights of a mixture, and says why."""
        num_experts, width = self.num_experts, math.prod(self.row)
        longest = max(len(_rows(part, width)) for parts in self.ran.values() for part in parts)
        if self.sequential:
            raise NotAMixture("its modules are applied one after the other")
        if len({*map(id, self.members)}) < num_experts:
            raise NotAMixture("its list holds one module twice, so its answers cannot be told apart")
        if self.strayed:
            raise NotAMixture("its experts read something else when it ran again: it keeps a state that its "
                              "modules do not hold; pass an adapter")  # fmt: skip
        if self.width < num_experts:
            raise NotAMixture(
                f"{num_experts} experts answer with a width of {self.width}: at least as many are needed "
                "to tell them apart; pass an adapter"
            )
        other = len(given_ND) > len(output_NO)
        if given_ND.shape[1] != width:  # the experts read something else, made of it
            other = longest % max(len(output_NO), 1) == 0
        if other and longest > len(output_NO):
            raise NotAMixture("the answers to several tokens are pooled")
        if output_NO.shape[1] < num_experts:
            raise NotAMixture("its output is narrower than its number of experts")
        periods = tags_NO.split(num_experts, 1)
        same = all(_close(period, periods[0][:, : period.shape[1]]) for period in periods[1:])
        if len(tags_NO) != len(output_NO) or self.width != output_NO.shape[1] or not same:
            raise NotAMixture("the answers are not added up with weights, or are transformed after that; a "
                              "mixture in a module of its own, on tokens [N, D], can be read")  # fmt: skip

    def _read(self) -> dict[int, Tensor]:
        """What each expert read, a row a token."""
        return {e: torch.cat([_rows(p, math.prod(self.row)) for p in parts]) for e, parts in self.ran.items()}

    def _weights_of_inputs(
        self, given_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Where answers are added up as they are: are weights in what the experts read?"""
        weights_NE = given_ND.new_zeros(len(indices_NK), self.num_experts)
        for e, read_RD in self._read().items():
            at_R = indices_NK.eq(e).any(1).nonzero().flatten()
            if read_RD.shape != (len(at_R), given_ND.shape[1]) or len(given_ND) != len(indices_NK):
                return indices_NK, weights_NK
            own_RD = given_ND[at_R]
            square_R1 = own_RD.square().sum(1, keepdim=True)
            share_R1 = ((read_RD * own_RD).sum(1, keepdim=True) / square_R1).where(square_R1 > 0, 1)
            if not _close(read_RD, share_R1 * own_RD):
                return indices_NK, weights_NK
            weights_NE[at_R, e] = share_R1.flatten().to(weights_NE.dtype)
        if _close(weights_NE, (weights_NE != 0).to(weights_NE.dtype)):  # they read the tokens themselves
            return indices_NK, weights_NK
        self.scales_inputs = self.reads_input = True
        return from_dense(weights_NE)

    def observed(self, seen: Dispatch) -> tuple[Tensor, Tensor] | None:
        """Of the call that was tagged; None: it is not known which token got which answer."""
        assert self.tagged is not None
        tagged_NO = _rows(self.tagged, self.width)
        read, count = self._read(), len(seen.indices_NK)
        everyone = torch.arange(count, device=seen.indices_NK.device)
        orders = [dict.fromkeys(read, everyone), *_orders(read, seen.indices_NK, seen.weights_NK)]
        for order in orders if seen.in_order else ():
            fits = all(len(part) == len(order[e]) for e, part in read.items())
            if fits and (self.scales_inputs or all(
                _close(part, seen.tokens_ND[order[e]]) for e, part in read.items()
            )):  # fmt: skip
                mixed_NO = torch.zeros_like(tagged_NO)
                for e, parts in self.answered.items():
                    weight_N1 = (seen.weights_NK * seen.indices_NK.eq(e)).sum(1, keepdim=True)
                    answer_RO = torch.cat([_rows(part, self.width) for part in parts])
                    weight_R1 = 1 if self.scales_inputs else weight_N1[order[e]]
                    mixed_NO.index_add_(0, order[e], (answer_RO * weight_R1).to(mixed_NO.dtype))
                return tagged_NO, mixed_NO
        return None

    def _why_no_tags(self) -> str:
        if torch.is_inference_mode_enabled():
            return "inference mode hides its experts' weights: use torch.no_grad instead"
        if not self.called:
            return BYPASSED
        return "its modules' answers do not reach its output"

    def _tokens(self, given_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, bool]:
        """What the experts read, in the tokens' order; if it cannot be known, their rows, and False.

        It is the block's input, unless the block changes it first. Then each expert's rows are put back:
        token after token, first choices before second ones, or by weight, whichever makes the experts agree.
        """
        if self.reads_input:  # decided once
            return given_ND, True
        read = self._read()
        shape = (len(indices_NK), next(iter(read.values())).shape[1])
        parts = [*read.values()]
        whole = all(len(part) == len(indices_NK) and _close(part, parts[0]) for part in parts)
        by_token, *others = _orders(read, indices_NK, weights_NK)
        if given_ND.shape == shape:
            same = [_same_rows(part, given_ND[by_token[e]]) or _same_rows(part, given_ND)
                    for e, part in read.items()]  # fmt: skip
            self.reads_input = True in same and False not in same
        if self.reads_input:
            return given_ND, True
        if self.before and self.joins is None:
            num_lists = len(self.before) + 1
            self.unchecked = f"its experts are made of {num_lists} lists, and only the last was read"
            return torch.cat(parts), False
        if whole:
            return parts[0], True
        if all(len(part) == len(by_token[e]) for e, part in read.items()):
            for order in (by_token, *others):
                tokens_ND = given_ND.clone() if given_ND.shape == shape else given_ND.new_zeros(shape)
                for e, part in read.items():
                    tokens_ND[order[e]] = part.to(tokens_ND.dtype)
                if all(_close(part, tokens_ND[order[e]]) for e, part in read.items()):
                    return tokens_ND, True
        return torch.cat(parts), False


def _side_by_side(indices_NK: Tensor, weights_NK: Tensor, shape: Sequence[int], num_experts: int) -> bool:
    """Is an expert's number its place along one of the output's dimensions?"""
    index_N, place_N = indices_NK[:, 0], torch.arange(len(indices_NK), device=indices_NK.device)
    several = len(index_N[index_N >= 0].unique()) > 1
    if not several or indices_NK.shape[1] > 1 or len(place_N) != math.prod(shape):
        return False
    strides = [math.prod(shape[dim + 1 :]) for dim, size in enumerate(shape) if size == num_experts]
    places = (place_N // stride % num_experts for stride in strides)
    return any(bool((index_N.eq(at_N) | (index_N < 0)).all()) for at_N in places)


def _rows(tensor: Tensor, width: int) -> Tensor:
    """[N, width], from tokens in any number of dimensions, or from whole samples; or else as `rows`."""
    if tensor.shape[-1] == width:
        return tensor.reshape(-1, width)
    return tensor.flatten(1) if math.prod(tensor.shape[1:]) == width else rows(tensor)


def _orders(read: dict[int, Tensor], indices_NK: Tensor, weights_NK: Tensor) -> list[dict[int, Tensor]]:
    """In which order an expert may read the tokens that chose it: as they come, first choices before second
    ones, or by weight."""
    size_NK = weights_NK.abs().where(indices_NK >= 0, 0)
    by_token = {e: indices_NK.eq(e).any(1).nonzero().flatten() for e in read}
    by_choice = {e: torch.where(indices_NK.T.eq(e))[1] for e in read}
    by_weight = {e: n[(size_NK * indices_NK.eq(e)).sum(1)[n].argsort(descending=True, stable=True)]
                 for e, n in by_token.items()}  # fmt: skip
    return [by_token, by_choice, by_weight]


def _sum(tensor: Tensor) -> Tensor:
    """A number that is another one for other rows."""
    return tensor.detach().sum(dtype=torch.float64) + tensor.numel()


def _same_rows(one_RD: Tensor, other_RD: Tensor) -> bool | None:
    """Equal up to order and rows of zeros, judged by their sum; None if they differ in number and sum."""
    if one_RD.shape[1:] != other_RD.shape[1:]:
        return None
    sums = one_RD.float().sum(0), other_RD.float().sum(0)
    same = torch.allclose(*sums, rtol=1e-3, atol=1e-3, equal_nan=True)
    return True if same else None if len(one_RD) != len(other_RD) else False


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=2e-2, atol=1e-6, equal_nan=True)
