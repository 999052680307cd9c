"""Experts kept as a list of modules, under any name, behind any gate: observed by tagging their answers.

A block's output is linear in its experts' answers. Each answer carries a tangent (forward-mode automatic
differentiation) that is the one-hot code of its expert; the tangent of the block's output is then, token
by token, the weight of each expert. Gate, bias, groups, capacity, normalisation: all are in it, none need
be known, and the block's output is not changed.

Shapes: N tokens, D width, O output width, E experts, K chosen per token.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
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
    replaced,
    rows,
    stacked_weights,
)  # fmt: skip
from moe_lib.inspect.lists import Join, expert_lists, has_forward, join_of, named_as_mixture
from moe_lib.inspect.snapshot import (
    contents,
    copied,
    random_states,
    set_random_states,
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


class NoDropout(TorchFunctionMode):
    """Dropout lets tagged tensors pass: after the mixture it would hide the weights; before it, it acts."""

    passed = False  # it would have changed a tagged tensor

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        x = args[0] if args and "dropout" in getattr(func, "__name__", "") else None
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            given = dict(zip(("x", "p", "training"), args, strict=False)) | (kwargs or {})
            self.passed |= bool(given.get("p", 0.5) and given.get("training", given.get("train", True)))
            return x
        return func(*args, **(kwargs or {}))


class ListAdapter(Adapter):
    """A block with a ModuleList or ModuleDict of like modules whose answers it mixes.

    `holder` is the module that holds the list, if it is not the block itself; `which` of its lists it is.
    """

    ran: dict[int, list[Tensor]]  # what each expert read,
    ran_before: dict[int, list[Tensor]]  # and its first layer, if that is in another list
    read_sums: dict[int, Tensor]  # of what each expert read in the model's own call, if it is replayed
    parts: list[int]  # which leaves of the block's output are mixtures,
    tangent: Tensor | None  # of their sum
    replay_with: Any  # arguments, random states and what the block held
    row: tuple[int, ...] = ()  # shape of what an expert reads of one token,
    sequences = False  # as [B, T, D]

    def __init__(self, block: nn.Module, holder: nn.Module | None = None, which: int = 0) -> None:
        super().__init__(block)
        found = expert_lists(block if holder is None else holder)  # not empty, by `matches`
        self.list_name, self.members = found[which]
        self.holder = holder
        self.num_lists = len(found)
        # Lists as long, which may hold first layers of the same experts: up, or gate and up.
        others = [members for _, members in found if members is not self.members]
        self.before = [members for members in others if len(members) == len(self.members)]
        self.joins: Join | None = None  # makes of their answers what the members read
        self.judged = False  # whether there is one
        self.open: ExitStack | None = None  # leaving it ends the tagging
        self.forget()
        self.called = False  # was an expert, ever?
        self.confirmed = False  # it has been read once
        self.reads_input = False  # the experts read the block's input as it is

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
        return rows(self.members[e](read))

    def expert_weights(self) -> list[Tensor]:
        lists = [self.members, *(self.before if self.joins is not None else [])]
        return [weight for layers in lists for weight in stacked_weights(layers)]

    # ------------------------------------------------------------------------------------ tagging

    def begin(self, args: tuple, kwargs: dict) -> None:
        self.forget()
        if torch.is_grad_enabled():  # a tangent would change the graph: replayed afterwards, without one
            held = with_copies(contents(self.block))
            self.replay_with = (*tree_map(copied, (args, kwargs)), random_states(), held)
        else:
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
        self.row, self.sequences = tuple(read.shape[1 if read.ndim > 3 else -1 :]), read.ndim == 3
        self.sequential |= tangent is not None and bool(tangent.any())
        self.ran.setdefault(e, []).append(read)
        answer = forward_ad.unpack_dual(answer).primal
        tag = answer.new_zeros(answer.shape)
        flat = tag.view(-1, tag.shape[-1]) if tag.ndim <= 3 else tag.view(len(tag), -1)
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
            self._replay()
        elif self.open is not None:
            with self.open:
                if call.output is not None:
                    self._find_tags(call.output)
            self.open = None

    def _find_tags(self, output: Any) -> None:
        """The tags of the block's output; of their sum, if several outputs of one shape have tags."""
        tags: dict[int, Tensor] = {}
        for at, leaf in enumerate(tree_leaves(output)):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1:
                tag = forward_ad.unpack_dual(leaf).tangent
                tags |= {} if tag is None else {at: tag}
        if some := [at for at, tag in tags.items() if tag.any()] or [*tags]:
            self.parts = [at for at in some if tags[at].shape == tags[some[0]].shape]
            self.part, self.mixes = some[0], len(self.parts) == 1
            self.tangent = torch.stack([tags[at] for at in self.parts]).sum(0)
        if not self.mixes:
            self.remark = f"it returns {len(self.parts)} mixtures of its experts: their weights are added up"

    @torch.no_grad()
    def _replay(self) -> None:
        """The block once more, tagged, from the state it started with."""
        args, kwargs, states, held = self.replay_with
        self.replaying = True
        try:
            with unchanged(self.block, held), _tagging(), NoDropout() as dropout, ExitStack() as self.open:
                set_random_states(states)
                self._find_tags(self.block.forward(*args, **kwargs))
        finally:
            self.open, self.replaying = None, False
        if dropout.passed:
            self.unchecked = "dropout acts on the experts' answers or on the block's output"
        again = {e: torch.stack([_sum(part) for part in parts]).sum() for e, parts in self.ran.items()}
        self.strayed = again.keys() != self.read_sums.keys() or not all(
            torch.allclose(again[e], was, rtol=1e-5, equal_nan=True) for e, was in self.read_sums.items()
        )

    def forget(self) -> None:
        if self.open is not None:  # the block was interrupted
            self.open.close()
            self.open = None
        self.ran, self.read_sums, self.tangent, self.replay_with = {}, {}, None, None
        self.ran_before = {}
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
        leaves = tree_leaves(call.output)
        several = self.parts[1:]
        output = torch.stack([leaves[at] for at in self.parts]).sum(0) if several else leaves[self.parts[0]]
        output_NO, tags_NO = (_rows(tensor, self.width) for tensor in (output, self.tangent))
        if not self.judged and self.before and self.ran.keys() == self.ran_before.keys():
            with unchanged(self.block):
                self.judged, self.joins = True, join_of(self.before, self.ran_before, self.ran)
        if self.joins is not None:
            self.ran, (read, *_) = self.ran_before, next(iter(self.ran_before.values()))
            self.row, self.sequences = tuple(read.shape[-1:]), read.ndim == 3
        given_ND = _rows(call.tokens, self.row[-1])
        longest = max(len(rows(part)) for parts in self.ran.values() for part in parts)
        if self.sequential:
            raise NotAMixture("its modules are applied one after the other")
        if len({*map(id, self.members)}) < num_experts:
            raise NotAMixture("a module stands in its list twice: which of the two answered cannot be seen")
        if self.strayed:
            raise NotAMixture("its experts read something else when it ran again: it keeps a state that its "
                              "modules do not hold; pass an adapter")  # fmt: skip
        if self.width < num_experts:
            raise NotAMixture(
                f"{num_experts} experts answer with a width of {self.width}: at least as many are needed "
                "to tell them apart; pass an adapter"
            )
        other = len(given_ND) > len(output_NO)
        if self.row and given_ND.shape[1] != self.row[-1]:  # the experts read something else, made of it
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
        self.confirmed = True
        finite_N1 = tags_NO.isfinite().all(1, keepdim=True)
        indices_NK, weights_NK = from_dense(tags_NO[:, :num_experts].where(finite_N1, 0))
        tokens_ND, in_order = self._tokens(given_ND, indices_NK, weights_NK)
        weights_NK = weights_NK.where(finite_N1, torch.nan)  # not counted
        return Dispatch(tokens_ND, indices_NK, weights_NK, output_NO, in_order=in_order)

    def _why_no_tags(self) -> str:
        if torch.is_inference_mode_enabled():
            return "inference mode hides its experts' weights: use torch.no_grad instead"
        if not self.called:
            return "its experts were not called through __call__: as expert(x), not expert.forward(x)"
        return "its modules' answers do not reach its output"

    def _tokens(self, given_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, bool]:
        """What the experts read, in the tokens' order; if it cannot be known, their rows, and False.

        It is the block's input, unless the block changes it first. Then each expert's rows are put back:
        token after token, first choices before second ones, or by weight, whichever makes the experts agree.
        """
        if self.reads_input:  # judged once
            return given_ND, True
        read = {e: torch.cat([rows(part) for part in parts]) for e, parts in self.ran.items()}
        shape = (len(indices_NK), next(iter(read.values())).shape[1])
        parts = [*read.values()]
        whole = all(len(part) == len(indices_NK) and _close(part, parts[0]) for part in parts)
        by_token = {e: indices_NK.eq(e).any(1).nonzero().flatten() for e in read}
        by_choice = {e: torch.where(indices_NK.T.eq(e))[1] for e in read}
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
        size_NK = weights_NK.abs().where(indices_NK >= 0, 0)
        by_weight = {e: n[(size_NK * indices_NK.eq(e)).sum(1)[n].argsort(descending=True, stable=True)]
                     for e, n in by_token.items()}  # fmt: skip
        if all(len(part) == len(by_token[e]) for e, part in read.items()):
            for order in (by_token, by_choice, by_weight):
                tokens_ND = given_ND.clone() if given_ND.shape == shape else given_ND.new_zeros(shape)
                for e, part in read.items():
                    tokens_ND[order[e]] = part.to(tokens_ND.dtype)
                if all(_close(part, tokens_ND[order[e]]) for e, part in read.items()):
                    return tokens_ND, True
        return torch.cat(parts), False


def _rows(tensor: Tensor, width: int) -> Tensor:
    """[N, width], from tokens in any number of dimensions; or else as `rows`."""
    return tensor.reshape(-1, width) if tensor.shape[-1] == width else rows(tensor)


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
