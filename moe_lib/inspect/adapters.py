"""What a mixture-of-experts block dispatched: the interface; `families` has an adapter per family of blocks.

An adapter reads what a block really used: the chosen experts and their weights, after bias, groups,
capacity and normalisation. Nothing is computed again from the router's weights.

Shapes: N tokens, M some of them, D width, O output width, E experts, K chosen per token, C capacity.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


class NotAMixture(ValueError):
    """What was taken for a mixture of experts is none, or not one that can be read."""


def reason_of(error: BaseException) -> str:
    """Its first line."""
    return (str(error) or type(error).__name__).splitlines()[0]


class Dispatch(NamedTuple):
    """One call of one block. Slots that no expert filled have an index that is no expert's, and weight 0."""

    tokens_ND: Tensor  # what the experts read
    indices_NK: Tensor
    weights_NK: Tensor  # what the experts' answers were multiplied by
    output_NO: Tensor | None = None  # the block's answer, to check the mixture against
    scores_NE: Tensor | None = None  # the router's scores before selection, if it returned any
    in_order: bool = True  # False: the tokens are some that experts read, and whose rows they are is unknown


class Call:
    """A block's call: its arguments by name, its output, and the outputs of the children in `watch`."""

    def __init__(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs = dict(zip(names, args, strict=False)) | kwargs
        self.output: Any = None
        self.seen: dict[str, Any] = {}

    @property
    def tokens(self) -> Tensor:
        """The first tensor among the arguments."""
        return first_tensor(self.inputs)


class Adapter:
    """How to read one kind of block. For your own, subclass it and pass the class to `inspect_moe`:

        class MyAdapter(Adapter):
            classes = ("MyMoE",)            # names of classes, base classes included
            watch = ("router",)             # children whose outputs `dispatch` needs

            def dispatch(self, call):
                weights_NK, indices_NK = call.seen["router"]
                return Dispatch(rows(call.tokens), indices_NK, weights_NK, rows(call.output))

            def answer(self, e, tokens_MD):
                return tokens_MD @ self.block.experts.weight[e]

    A block that routes in its own forward has no child to watch: let it keep its decision, as
    `self.kept = weights, indices`, and read `self.block.kept` here.

    `num_experts` and `expert_weights` follow where `experts` is a list of modules, and `answer` too; or where
    parameters are stacked along their first dimension. Else override them.
    """

    classes: ClassVar[tuple[str, ...]] = ()
    watch: tuple[str, ...] = ()
    mixes: bool = True  # the output is weights times answers, token by token
    scales_inputs: bool = False  # weights multiply what an expert reads, not what it answers
    answer_dtype: torch.dtype | None = None  # of the answers that were observed, if they were
    unchecked: str = ""  # why the mixture cannot be checked
    part: int | None = None  # which of the call's output leaves is the mixture; None: the first with rows
    remark: str = ""  # what the panel notes
    takes_more = False  # its experts take other tensors beside tokens
    examined = False  # the mixture has been checked, as far as it can be

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.names = parameter_names(block)

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return any(base.__name__ in cls.classes for base in type(block).__mro__)

    @property
    def num_experts(self) -> int:
        if self.listed is not None:
            return len(self.listed)
        sizes = [p.shape[0] for p in self.experts().parameters() if p.ndim > 2]
        if not sizes:
            raise ValueError(f"the number of experts of {type(self.block).__name__} is not clear: override "
                             f"num_experts in {type(self).__name__}")  # fmt: skip
        return sizes[0]

    @property
    def listed(self) -> nn.ModuleList | None:
        """The experts, if they are modules in a list."""
        holders = self.experts(), getattr(self.experts(), "experts", None)
        return next((each for each in holders if isinstance(each, nn.ModuleList)), None)

    def experts(self) -> nn.Module:
        found = getattr(self.block, "experts", self.block)
        return found if isinstance(found, nn.Module) else self.block

    def dispatch(self, call: Call) -> Dispatch:
        raise NotImplementedError

    def answer(self, e: int, tokens_MD: Tensor) -> Tensor:
        """Expert e's answer to each token [M, O], unweighted."""
        if self.listed is None:
            raise NotImplementedError
        return self.listed[e](tokens_MD)

    def answers(self, tokens_MD: Tensor) -> Tensor:
        """Every expert's answer to each token [E, M, O]."""
        return torch.stack([self.answer(e, tokens_MD) for e in range(self.num_experts)])

    def mix(self, tokens_MD: Tensor, indices_MK: Tensor, weights_MK: Tensor) -> Tensor:
        """Sum over k of weight times answer [M, O]; indices that are no expert's count for nothing."""
        mixed_MO = None
        for e in range(self.num_experts):
            row, slot = torch.where(indices_MK == e)
            if len(row):
                read_RD, weight_R1 = tokens_MD[row], weights_MK[row, slot, None].to(tokens_MD.dtype)
                if self.scales_inputs:
                    part_RO = self.answer(e, read_RD * weight_R1)
                else:
                    part_RO = self.answer(e, read_RD) * weight_R1
                if mixed_MO is None:
                    mixed_MO = part_RO.new_zeros(len(tokens_MD), part_RO.shape[1])
                mixed_MO.index_add_(0, row, part_RO)
        return torch.zeros_like(tokens_MD) if mixed_MO is None else mixed_MO

    def observed(self, seen: Dispatch) -> tuple[Tensor, Tensor] | None:
        """The block's output and the mixture of the answers that were observed [N, O], if they were."""
        return None

    def expert_weights(self) -> list[Tensor]:
        """The experts' parameters, each stacked [E, ...]."""
        if self.listed is not None:
            return stacked_weights(self.listed)
        return [p for p in self.experts().parameters() if p.ndim > 1 and p.shape[0] == self.num_experts]

    # For adapters that must do something while the block runs; `ListAdapter` alone does.

    members: Sequence[nn.Module] = ()  # experts to be hooked with `note`
    before: Sequence[Sequence[nn.Module]] = ()  # their other layers; the first: hooked with `note_before`
    open: ExitStack | None = None  # leaving it ends the tagging of answers; None: they are not tagged

    def begin(self, args: tuple, kwargs: dict) -> None:
        """Before the block."""

    def note(self, e: int, args: Any, output: Any) -> Any:
        """After member e: what replaces its output; None: nothing."""

    def note_before(self, e: int, args: Any, output: Any) -> None:
        """After the first layer of member e."""

    def end(self, call: Call) -> None:
        """After the block, also if it failed: its output is None then."""

    def untagged(self, output: Any) -> Any:
        """The block's output as the model gets it."""
        return output

    def forget(self) -> None:
        """After the call was recorded: let go of its tensors."""


@functools.cache
def _parameters(forward: Any) -> list[str]:
    return [*inspect.signature(forward).parameters]


def parameter_names(block: nn.Module) -> list[str]:
    """Of its forward, "self" left out."""
    own = vars(block).get("forward")
    return _parameters(type(block).forward)[1:] if own is None else [*inspect.signature(own).parameters]


def rows(value: Any) -> Tensor:
    """[N, D] from the first tensor of a block's input or output."""
    tensor = first_tensor(value)
    if not tensor.ndim:
        raise NotAMixture("it returns a number, such as a loss, and no tensor with rows")
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim <= 3 else tensor.flatten(1)


def first_tensor(value: Any) -> Tensor:
    """In any nesting: the first with rows, not a loss; or else the first."""
    tensors = [part for part in leaves_of(value) if isinstance(part, Tensor)]
    if not tensors:
        raise NotAMixture("it returns no tensor")
    return next((tensor for tensor in tensors if tensor.ndim > 1), tensors[0])


def leaves_of(value: Any) -> list[Any]:
    """Of any nesting, dataclasses included."""
    found = []
    for leaf in tree_leaves(value):
        fields = [getattr(leaf, field.name) for field in dataclasses.fields(leaf)] if _holds(leaf) else None
        found += [leaf] if fields is None else leaves_of(fields)
    return found


def _holds(leaf: Any) -> bool:
    return dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)


def replaced(value: Any, tensor: Tensor, part: int | None = None) -> Any:
    """A module's output with another tensor in place of that leaf; None: of the first tensor."""
    old = first_tensor(value) if part is None else leaves_of(value)[part]

    def change(leaf: Any) -> Any:
        if leaf is old:
            return tensor
        if not _holds(leaf):
            return leaf
        changed = copy.copy(leaf)
        for field in dataclasses.fields(leaf):
            object.__setattr__(changed, field.name, tree_map(change, getattr(leaf, field.name)))
        return changed

    return tree_map(change, value)


def from_dense(weights_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and weights [N, K] of a dense weight matrix, the largest first; K is the fullest row's."""
    num_chosen = max(int((weights_NE != 0).sum(1).max()), 1) if len(weights_NE) else 1
    size_NK, indices_NK = weights_NE.abs().topk(num_chosen, 1)
    return indices_NK.where(size_NK > 0, -1), weights_NE.gather(1, indices_NK)


def router_scores(output: Any, num_experts: int) -> tuple[int, Tensor | None]:
    """Which of a router's outputs are its scores [N, E], not masks or what selection left; -1: none."""
    for at, value in enumerate(output if isinstance(output, tuple | list) else (output,)):
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1:] == (num_experts,):
            scores_NE = value.detach().reshape(-1, num_experts)
            first_NE = scores_NE[:64]
            if not bool(((first_NE == 0) | first_NE.isinf()).any(1).all()):
                return at, scores_NE
    return -1, None


def stacked_weights(experts: Any) -> list[Tensor]:
    """The parameters of a list of like modules, stacked [E, P]; a few thousand entries of each."""
    same = zip(*(ps for expert in experts if (ps := [*expert.parameters()])), strict=False)
    alike = [each for each in same if len({p.shape for p in each}) == 1]  # of experts of one size, all
    return [torch.cat([some_entries(p[None]) for p in each]) for each in alike]


def some_entries(weight: Tensor) -> Tensor:
    """About 2,048 entries of each row [E, P], in pieces of 64 that lie together in memory."""
    flat_EP = weight.detach().flatten(1)
    pieces = flat_EP.shape[1] // 64
    if pieces < 64:
        return flat_EP
    return flat_EP.unfold(1, 64, 64 * (pieces // 32)).flatten(1)
