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
    rows,
    stacked_weights,
)

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


def _enter() -> tuple[int, bool]:
    """A dual level, and whether tangents were on: they are not inside of reentrant checkpointing."""
    with warnings.catch_warnings():  # the first dual tensor imports a module that warns about itself
        warnings.simplefilter("ignore", FutureWarning)
        from torch._decomp import decompositions_for_jvp  # noqa: F401
    enabled = torch._C._is_fwd_grad_enabled()
    torch._C._set_fwd_grad_enabled(True)
    return forward_ad.enter_dual_level(), enabled


def _leave(entered: tuple[int, bool]) -> None:
    forward_ad.exit_dual_level(level=entered[0])
    torch._C._set_fwd_grad_enabled(entered[1])


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward not in (nn.Module.forward, nn.ModuleList.forward, nn.ModuleDict.forward)


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
        self.level: tuple[int, bool] | None = None
        self.ran: dict[int, list[Tensor]] = {}
        self.sequential = False
        self.replaying = False
        self.reads_input = False  # the experts read the block's input as it is

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return expert_list(block) is not None and (
            _has_forward(block) or not isinstance(block, nn.ModuleList | nn.ModuleDict)
        )

    @property
    def named_as_experts(self) -> bool:
        return (
            "expert" in f"{self.list_name} {type(self.members[0]).__name__}".lower()
            or MOE_CLASS.search(type(self.block).__name__) is not None
        )

    @property
    def num_experts(self) -> int:
        return len(self.members)

    def answer(self, e: int, tokens_MD: Tensor) -> Tensor:
        return rows(self.members[e](tokens_MD))

    def expert_weights(self) -> list[Tensor]:
        return stacked_weights(self.members)

    # ------------------------------------------------------------------------------------ tagging

    def begin(self, args: tuple, kwargs: dict) -> None:
        self.ran = {}
        self.sequential = False
        if torch.is_grad_enabled():  # a tangent would change the graph: replayed afterwards, without one
            self.replay_with = (
                tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args),
                {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()},
                torch.get_rng_state(),
                torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
            )
        else:
            self.level = _enter()

    def note(self, e: int, args: tuple, output: object) -> object | None:
        """Hook on expert e: returns its answer with the tag of e."""
        answer = first_tensor(output)
        self.answer_like = answer[:0].detach()
        if self.level is None:
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
        tagged = forward_ad.make_dual(answer, tag)
        if isinstance(output, Tensor):
            return tagged
        rest = list(output)  # type: ignore[call-overload]
        rest[next(i for i, v in enumerate(rest) if isinstance(v, Tensor))] = tagged
        return tuple(rest)

    def end(self, call: Call) -> None:
        """Hook on the block, also if it failed: reads the tags of its output."""
        self.tangent = None
        if self.level is None and call.output is not None:
            self._replay()
        elif self.level is not None:
            if call.output is not None:
                self.tangent = forward_ad.unpack_dual(first_tensor(call.output)).tangent
            _leave(self.level)
            self.level = None

    @torch.no_grad()
    def _replay(self) -> None:
        """The block once more from the same random state, its experts answering zero with their tags."""
        args, kwargs, random_state, cuda_state = self.replay_with
        if not hasattr(self, "answer_like"):
            return  # no expert ran
        buffers = {name: buffer.clone() for name, buffer in self.block.named_buffers()}
        here, here_cuda = torch.get_rng_state(), None
        torch.set_rng_state(random_state)
        if cuda_state is not None:
            here_cuda = torch.cuda.get_rng_state()
            torch.cuda.set_rng_state(cuda_state)
        self.replaying = True
        for member in self.members:
            member.forward = self._zero_answer
        self.level = _enter()
        try:
            self.tangent = forward_ad.unpack_dual(first_tensor(self.block.forward(*args, **kwargs))).tangent
        finally:
            _leave(self.level)
            self.level = None
            self.replaying = False
            for member in self.members:
                del member.forward
            torch.set_rng_state(here)
            if here_cuda is not None:
                torch.cuda.set_rng_state(here_cuda)
            for name, buffer in self.block.named_buffers():
                buffer.copy_(buffers[name])

    def _zero_answer(self, x: Tensor, *rest: object, **options: object) -> Tensor:
        like = self.answer_like
        shape = (*x.shape[:-1], like.shape[-1]) if like.ndim <= 3 else (len(x), *like.shape[1:])
        return like.new_zeros(shape)

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
        return Dispatch(self._tokens(call, indices_NK), indices_NK, weights_NK, output_NO)

    def _tokens(self, call: Call, indices_NK: Tensor) -> Tensor:
        """What the experts read, in the tokens' order.

        It is the block's input, unless the block changes it first. Then each expert's rows are put back:
        token after token, or first choices before second ones, whichever makes the experts agree.
        """
        given_ND = rows(call.tokens)
        if self.reads_input:
            return given_ND
        read = {e: torch.cat([rows(part) for part in parts]) for e, parts in self.ran.items()}
        chosen = {
            e: [indices_NK.eq(e).any(1).nonzero().flatten(), torch.where(indices_NK.T.eq(e))[1]] for e in read
        }
        whole = {e: slice(None) if len(part) == len(indices_NK) else chosen[e][0] for e, part in read.items()}
        fits = given_ND.shape == (len(indices_NK), next(iter(read.values())).shape[1])
        checks = [_same_rows(part, given_ND[whole[e]]) for e, part in read.items()] if fits else [False]
        if all(check is not False for check in checks) and True in checks:
            self.reads_input = True  # judged once
            return given_ND
        for part in read.values():
            if len(part) == len(indices_NK):
                return part
        best, least = given_ND, float("inf")
        for order in (0, 1):
            tokens_ND = (
                given_ND.clone()
                if fits
                else given_ND.new_zeros(len(indices_NK), next(iter(read.values())).shape[1])
            )
            for e, part in read.items():
                if len(part) == len(chosen[e][order]):
                    tokens_ND[chosen[e][order]] = part.to(tokens_ND.dtype)
            wrong = sum(
                float((part - tokens_ND[chosen[e][order]]).abs().sum())
                for e, part in read.items() if len(part) == len(chosen[e][order])
            )  # fmt: skip
            if wrong < least:
                best, least = tokens_ND, wrong
        return best


def _same_rows(one_RD: Tensor, other_RD: Tensor) -> bool | None:
    """Equal up to the order of their rows, judged by their sum; None if they differ in number."""
    if one_RD.shape != other_RD.shape:
        return None
    return torch.allclose(one_RD.float().sum(0), other_RD.float().sum(0), rtol=1e-3, atol=1e-3)


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=2e-2, atol=1e-6)
