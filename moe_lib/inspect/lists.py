"""Experts kept as a list of modules, under any name, behind any gate: observed by tagging their answers.

A block's output is linear in its experts' answers. Each answer carries a tangent (forward-mode automatic
differentiation) that is the one-hot code of its expert; the tangent of the block's output is then, token
by token, the weight of each expert. Gate, bias, groups, capacity, normalisation: all are in it, none need
be known, and the block's output is not changed.

Shapes: N tokens, D width, O output width, E experts, K chosen per token.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

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
    unchanged,
)  # fmt: skip

MOE_CLASS = re.compile(r"(moe|moa|mixtureofexperts|experts)(block|layer|ffn)?$|sparsemlp$", re.I)


def expert_list(block: nn.Module) -> tuple[str, list[nn.Module]] | None:
    """At least two modules of one kind, and the name of the child that holds them; "" if the block does."""
    own = isinstance(block, nn.ModuleList | nn.ModuleDict) and _has_forward(block)
    for name, child in [("", block)] if own else list(block.named_children()):
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and (own or not _has_forward(child)):
            members = [m for m in child.children() if any(True for _ in m.parameters())]
            shapes = {(type(m), tuple(p.shape for p in m.parameters())) for m in members}
            if len(members) > 1 and len(shapes) == 1:
                return name, members
    return None


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward not in (nn.Module.forward, nn.ModuleList.forward, nn.ModuleDict.forward)


@contextmanager
def _tagging() -> Iterator[None]:
    """Tensors can carry tangents: inside of reentrant checkpointing too, where that is off."""
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


class ListAdapter(Adapter):
    """A block with a ModuleList or ModuleDict of like modules whose answers it mixes.

    `holder` is the module that holds the list, if it is not the block itself.
    """

    def __init__(self, block: nn.Module, holder: nn.Module | None = None) -> None:
        super().__init__(block)
        found = expert_list(block if holder is None else holder)
        assert found is not None  # by `matches`
        self.list_name, self.members = found
        self.holder = holder
        self.open: ExitStack | None = None  # closing it ends the tagging
        self.ran: dict[int, list[Tensor]] = {}
        self.like: Tensor | None = None  # an answer without rows
        self.sequential = False
        self.reads_input = False  # the experts read the block's input as it is

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        called = _has_forward(block) or not isinstance(block, nn.ModuleList | nn.ModuleDict)
        return called and expert_list(block) is not None

    @property
    def named_as_experts(self) -> bool:
        named = "expert" in f"{self.list_name} {type(self.members[0]).__name__}".lower()
        return named or MOE_CLASS.search(type(self.block).__name__) is not None

    @property
    def num_experts(self) -> int:
        return len(self.members)

    def answer(self, e: int, tokens_MD: Tensor) -> Tensor:
        return rows(self.members[e](tokens_MD))

    def expert_weights(self) -> list[Tensor]:
        return stacked_weights(self.members)

    # ------------------------------------------------------------------------------------ tagging

    def begin(self, args: tuple, kwargs: dict) -> None:
        self.ran, self.sequential = {}, False
        if torch.is_grad_enabled():  # a tangent would change the graph: replayed afterwards, without one
            cuda_state = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
            copies = [_copied(value) for value in args], {k: _copied(v) for k, v in kwargs.items()}
            self.replay_with = (*copies, torch.get_rng_state(), cuda_state)
        else:
            self.open = ExitStack()
            self.open.enter_context(_tagging())

    def note(self, e: int, args: tuple, output: Any) -> Any:
        """Expert e's answer with the tag of e."""
        answer = first_tensor(output)
        self.like = answer[:0].detach()
        if self.open is None:
            return None
        if args and isinstance(args[0], Tensor):
            read, tangent = forward_ad.unpack_dual(args[0])
            self.sequential |= tangent is not None and bool(tangent.any())
            self.ran.setdefault(e, []).append(read)
            answer = forward_ad.unpack_dual(answer).primal
        tag = torch.zeros_like(answer)
        flat = tag.view(-1, tag.shape[-1]) if tag.ndim <= 3 else tag.view(len(tag), -1)
        if flat.shape[1] < self.num_experts:
            raise NotAMixture(
                f"{self.num_experts} experts answer with a width of {flat.shape[1]}: at least as many "
                "are needed to tell them apart; pass an adapter"
            )
        flat[:, e :: self.num_experts] = 1  # in every period, to see what changes single features
        return replaced(output, forward_ad.make_dual(answer, tag))

    def end(self, call: Call) -> None:
        """Reads the tags of the block's output."""
        self.tangent = None
        if self.open is None and call.output is not None and self.like is not None:
            self._replay()
        elif self.open is not None:
            if call.output is not None:
                self.tangent = forward_ad.unpack_dual(first_tensor(call.output)).tangent
            self.open.close()
            self.open = None

    @torch.no_grad()
    def _replay(self) -> None:
        """The block once more from the same random state, its experts answering zero with their tags."""
        args, kwargs, random_state, cuda_state = self.replay_with
        self.replaying = True
        for member in self.members:
            member.forward = self._zero_answer
        try:
            with unchanged(self.block), _tagging(), ExitStack() as self.open:
                torch.set_rng_state(random_state)
                if cuda_state is not None:
                    torch.cuda.set_rng_state(cuda_state)
                output = self.block.forward(*args, **kwargs)
                self.tangent = forward_ad.unpack_dual(first_tensor(output)).tangent
        finally:
            self.open, self.replaying = None, False
            for member in self.members:
                del member.forward

    def _zero_answer(self, x: Tensor, *rest: object, **options: object) -> Tensor:
        like = self.like
        assert like is not None  # some expert has answered
        return like.new_zeros(
            (*x.shape[:-1], like.shape[-1]) if like.ndim <= 3 else (len(x), *like.shape[1:])
        )

    def dispatch(self, call: Call) -> Dispatch:
        output_NO = rows(call.output)
        if self.sequential:
            raise NotAMixture("its modules are applied one after the other")
        if not self.ran or self.tangent is None:
            raise NotAMixture("its modules' answers do not reach its output")
        tags_NO, num_experts = rows(self.tangent), self.num_experts
        longest = max(len(rows(part)) for parts in self.ran.values() for part in parts)
        if len(rows(call.tokens)) > len(output_NO) and longest > len(output_NO):
            raise NotAMixture("the answers to several tokens are pooled")
        periods = tags_NO.split(num_experts, 1)
        same = all(_close(period, periods[0][:, : period.shape[1]]) for period in periods[1:])
        if len(tags_NO) != len(output_NO) or not same:
            raise NotAMixture("the answers are not added up with weights, or are transformed after that")
        indices_NK, weights_NK = from_dense(tags_NO[:, :num_experts])
        return Dispatch(self._tokens(rows(call.tokens), indices_NK), indices_NK, weights_NK, output_NO)

    def _tokens(self, given_ND: Tensor, indices_NK: Tensor) -> Tensor:
        """What the experts read, in the tokens' order.

        It is the block's input, unless the block changes it first. Then each expert's rows are put back:
        token after token, or first choices before second ones, whichever makes the experts agree.
        """
        if self.reads_input:  # judged once
            return given_ND
        read = {e: torch.cat([rows(part) for part in parts]) for e, parts in self.ran.items()}
        shape = (len(indices_NK), next(iter(read.values())).shape[1])
        whole = [part for part in read.values() if len(part) == len(indices_NK)]
        by_token = {e: indices_NK.eq(e).any(1).nonzero().flatten() for e in read}
        by_choice = {e: torch.where(indices_NK.T.eq(e))[1] for e in read}
        if given_ND.shape == shape:
            same = [_same_rows(part, given_ND if len(part) == len(given_ND) else given_ND[by_token[e]])
                    for e, part in read.items()]  # fmt: skip
            self.reads_input = True in same and False not in same
        if self.reads_input or whole:
            return given_ND if self.reads_input else whole[0]
        tried: list[tuple[float, int, Tensor]] = []
        for order in (by_token, by_choice):
            tokens_ND = given_ND.clone() if given_ND.shape == shape else given_ND.new_zeros(shape)
            known = [e for e, part in read.items() if len(part) == len(order[e])]
            for e in known:
                tokens_ND[order[e]] = read[e].to(tokens_ND.dtype)
            off = sum(float((read[e] - tokens_ND[order[e]]).abs().sum()) for e in known)
            tried.append((off, len(tried), tokens_ND))
        return min(tried)[2]


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _same_rows(one_RD: Tensor, other_RD: Tensor) -> bool | None:
    """Equal up to the order of their rows, judged by their sum; None if they differ in number."""
    if one_RD.shape != other_RD.shape:
        return None
    return torch.allclose(one_RD.float().sum(0), other_RD.float().sum(0), rtol=1e-3, atol=1e-3)


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=2e-2, atol=1e-6)
