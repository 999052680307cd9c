"""The collapse panel of any mixture of experts, from tensors alone; and their collection from a live model.

Shapes: N samples or tokens, D width, E experts, K chosen, O width of an expert's answer, C classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from moe_lib import metrics
from moe_lib.metrics.collapse import (
    Collapse,
    Degree,
    Redundancy,
    redundancy,
    representational_collapse,
    routing_collapse,
)
from moe_lib.moe.routing import check_experts, route
from moe_lib.rng import generator
from moe_study.report.plots import PALETTE, new_figure

Predict = Callable[[Tensor], Tensor]  # mixed answers [N, O] -> class logits [N, C]
DRAWS = 20  # of each null by permutation
LEGEND: Any = {  # below the axis
    "loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "frameon": False, "fontsize": 9,
    "columnspacing": 1.2, "handlelength": 1.4,
}  # fmt: skip
PERMUTED_DRAWS = 5  # of permuted routing, as in `robustness.expert_ablations`


class Measure(NamedTuple):
    name: str
    value: float
    null: float  # its value when nothing was learned; NaN where there is none
    null_is: str
    says: str


@dataclass(frozen=True)
class Panel:
    measures: tuple[Measure, ...]
    collapse: Collapse  # NaN where what was given says nothing
    load: metrics.Load
    weight_E: Tensor  # mean weight of each expert, after any top-k
    class_expert_CE: Tensor  # mean gate of each class; NaN for a class without samples

    def table(self) -> pd.DataFrame:
        """One row a measure: value, null, what the null is, and how to read it. Rounded to 3 decimals."""
        rows = [
            {
                "measure": measure.name,
                "value": f"{measure.value:.3f}",
                "null": "" if math.isnan(measure.null) else f"{measure.null + 0.0:.3f}",
                "the null is": measure.null_is,
                "what it says": measure.says,
            }
            for measure in self.measures
        ]
        return pd.DataFrame(rows).set_index("measure").replace({"-0.000": "0.000"})

    def figure(self) -> Figure:
        """The three kinds of collapse beside their nulls, the load of each expert, the gate of each class."""
        figure, axes = new_figure(12, 4.1, 1, 3)
        self._draw_collapse(axes[0, 0])
        experts = np.arange(len(self.weight_E))
        axes[0, 1].bar(experts - 0.2, self.load.share, 0.4, color=PALETTE[2], label="first choices")
        axes[0, 1].bar(experts + 0.2, self.weight_E.numpy(), 0.4, color=PALETTE[3], label="mean weight")
        axes[0, 1].axhline(1 / len(experts), color="#555555", ls=":", lw=1.2, label="balanced: 1 / E")
        axes[0, 1].set(title="load", xlabel="expert", ylabel="share of the samples")
        axes[0, 1].legend(**LEGEND, ncols=3)
        gates_CE = self.class_expert_CE.numpy()
        known = np.flatnonzero(~np.isnan(gates_CE[:, 0]))
        order = known[np.lexsort((-gates_CE[known].max(1), gates_CE[known].argmax(1)))]
        picture = axes[0, 2].imshow(gates_CE[order], cmap="viridis", vmin=0, vmax=1, aspect="auto")
        few = len(order) <= 20
        axes[0, 2].set_yticks(range(len(order)) if few else [], order.tolist() if few else [])
        axes[0, 2].set(
            title="routing",
            xlabel="expert",
            ylabel="class" if few else f"{len(order)} classes, by preferred expert",
        )
        for axis in axes[0, 1:]:
            axis.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(picture, ax=axes[0, 2], label="mean gate probability")
        return figure

    def _draw_collapse(self, axis: Any) -> None:
        kinds = ("routing", "representational", "functional")
        for row, kind in enumerate(kinds):
            value, null = getattr(self.collapse, kind)
            axis.plot([0, 1], [row, row], color="#dddddd", lw=1, zorder=0)
            if math.isnan(value):
                axis.text(0.5, row - 0.12, "not measured", ha="center", fontsize=9, color="#555555")
            axis.plot(value, row, "o", color=PALETTE[1], ms=9, label="this model" if row == 0 else None)
            axis.plot(null, row, "D", color="#333333", mfc="none", ms=7, label="null" if row == 0 else None)
        axis.set_yticks(range(3), kinds)
        axis.set(
            title="collapse", xlim=(-0.05, 1.05), ylim=(2.6, -0.6), xlabel="0: specialists; 1: one would do"
        )
        axis.legend(**LEGEND, ncols=2)


def panel(
    probs_NE: Tensor,
    labels_N: Tensor,
    expert_outputs_NEO: Tensor | None = None,
    predict: Predict | None = None,
    *,
    top_k: int | None = None,
    initial_probs_NE: Tensor | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> Panel:
    """Collapse, taken apart, beside its nulls; see `collapse` for what each kind is blind to.

    Routing collapse and effective experts are of the weights in use: under a top-k a gate with hardly a
    preference may still send everything to one expert. Entropies and information are of the full softmax.

    Args:
        probs_NE: [N, E], the full softmax of the gate before any top-k; rows sum to 1.
        labels_N: [N] integers, the class of each sample or token; a class may be absent, or have one sample.
        expert_outputs_NEO: [N, E, O], every expert's answer to every sample, chosen or not. Without it
            nothing is said of representational and functional collapse. A few thousand samples suffice.
        predict: what comes after the mixture, from mixed answers [N, O] to class logits [N, C], row by
            row; `lambda mixed_NO: mixed_NO` where experts answer in class logits. Without it nothing is
            said of functional collapse. Called about E^2 times.
        top_k: the experts whose answers are mixed, weights renormalised over them; None: all.
        initial_probs_NE: the gate of the untrained model on the same samples, the null of routing collapse.
        num_classes: one more than the largest label if None.
        seed: of the permutations.

    Raises:
        ValueError: shapes do not fit, rows of probabilities do not sum to 1, labels are not integers in
            0..C-1, there is one class or one expert only, an answer is not finite.
    """
    labels_N, num_classes = _checked_labels(labels_N, num_classes)
    probs_NE = _checked_probs(probs_NE, labels_N, num_classes)
    check_experts(probs_NE.shape[1], top_k)
    weights_NE = route(probs_NE.log(), top_k).dense_weights()
    initial = math.nan
    if initial_probs_NE is not None:
        initial_probs_NE = _checked_probs(initial_probs_NE, labels_N, num_classes, "initial probs: ")
        if initial_probs_NE.shape != probs_NE.shape:
            raise ValueError(
                f"initial probs must have the shape of probs, {tuple(probs_NE.shape)}, "
                f"got {tuple(initial_probs_NE.shape)}"
            )
        initial = _mean_entropy(route(initial_probs_NE.log(), top_k).dense_weights())
    load = metrics.load(probs_NE, labels_N)
    routing, measures = _routing(probs_NE, weights_NE, labels_N, num_classes, load, initial, seed)
    alike = Degree(math.nan, math.nan)
    parts = Redundancy(math.nan, math.nan, math.nan, math.nan)
    if expert_outputs_NEO is not None:
        expert_outputs_NEO = _checked_outputs(expert_outputs_NEO, probs_NE)
        alike, measure = _representational(expert_outputs_NEO, seed)
        measures.append(measure)
        if predict is not None:
            parts, more = _functional(weights_NE, expert_outputs_NEO, labels_N, num_classes, predict, seed)
            measures += more
    elif predict is not None:
        raise ValueError("predict mixes the experts' answers: give expert_outputs_NEO too, or leave it out")
    return Panel(
        tuple(measures),
        Collapse(routing, alike, Degree(parts.permuted, 1.0), parts),
        load,
        weights_NE.mean(0),
        metrics.class_expert_matrix(probs_NE, labels_N, num_classes),
    )


def _checked_labels(labels_N: Tensor, num_classes: int | None) -> tuple[Tensor, int]:
    if labels_N.ndim != 1 or not len(labels_N) or labels_N.is_floating_point() or labels_N.is_complex():
        raise ValueError(
            f"labels must be integers of shape [N] with N >= 1, got {labels_N.dtype} {tuple(labels_N.shape)}"
        )
    labels_N = labels_N.detach().cpu().long()
    num_classes = int(labels_N.max()) + 1 if num_classes is None else num_classes
    if len(labels_N.unique()) < 2:
        raise ValueError(
            f"labels hold the single class {int(labels_N[0])}: routing by class needs at least two"
        )
    return labels_N, num_classes


def _checked_probs(probs_NE: Tensor, labels_N: Tensor, num_classes: int, whose: str = "") -> Tensor:
    """In float64, rows summing to 1 exactly."""
    if probs_NE.ndim == 2 and probs_NE.shape[1] < 2:
        raise ValueError(
            f"{whose}probs are of {probs_NE.shape[1]} expert: collapse is a matter of two or more"
        )
    probs_NE = probs_NE.detach().cpu().double()
    try:
        metrics.routing_entropy(probs_NE, labels_N, num_classes)  # refuses what does not fit
    except ValueError as error:
        raise ValueError(f"{whose}{error}") from error
    return probs_NE / probs_NE.sum(1, keepdim=True)


def _checked_outputs(expert_outputs_NEO: Tensor, probs_NE: Tensor) -> Tensor:
    if expert_outputs_NEO.ndim != 3 or expert_outputs_NEO.shape[:2] != probs_NE.shape:
        raise ValueError(
            f"expert outputs must be [N, E, O] with N, E = {tuple(probs_NE.shape)} as in probs, "
            f"got {tuple(expert_outputs_NEO.shape)}"
        )
    if expert_outputs_NEO.shape[2] < 2:
        raise ValueError(f"expert outputs need a width of at least 2, got {expert_outputs_NEO.shape[2]}")
    if not bool(expert_outputs_NEO.isfinite().all()):
        raise ValueError("expert outputs must be finite: an expert answers NaN or infinity somewhere")
    return expert_outputs_NEO.detach()


def _mean_entropy(gate_NE: Tensor) -> float:
    """Entropy of the mean row, nats."""
    return torch.special.entr(gate_NE.mean(0)).sum().item()


def _routing(
    probs_NE: Tensor,
    weights_NE: Tensor,
    labels_N: Tensor,
    num_classes: int,
    load: metrics.Load,
    initial: float,
    seed: int,
) -> tuple[Degree, list[Measure]]:
    """Routing collapse, and everything that the gate says by itself; `initial` is H(E) before training."""
    num_experts = probs_NE.shape[1]
    found = metrics.routing_entropy(probs_NE, labels_N, num_classes)
    draw = generator(seed, "label permutation")
    relabelled = [
        metrics.routing_entropy(
            probs_NE, labels_N[torch.randperm(len(labels_N), generator=draw)], num_classes
        )
        for _ in range(DRAWS)
    ]
    draw = generator(seed, "expert renaming")
    orders = [torch.rand(probs_NE.shape, generator=draw).argsort(1) for _ in range(DRAWS)]
    renamed_shares = [
        probs_NE.gather(1, order).argmax(1).bincount(minlength=num_experts) / len(probs_NE)
        for order in orders
    ]
    used, renamed_used = _mean_entropy(weights_NE), [_mean_entropy(weights_NE.gather(1, o)) for o in orders]

    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    names = "experts renamed at random in each sample"
    classes = "labels permuted"
    balanced = mean(routing_collapse(entropy, num_experts) for entropy in renamed_used)
    untrained = not math.isnan(initial)
    degree = Degree(
        routing_collapse(used, num_experts),
        routing_collapse(initial, num_experts) if untrained else balanced,
    )
    most = f"{math.log(num_experts):.3f}"
    return degree, [
        Measure(
            "routing collapse", *degree, "the gate before training" if untrained else names,
            "0: all experts are used alike; 1: a single one is",
        ),
        Measure(
            "effective experts", math.exp(used), mean(math.exp(entropy) for entropy in renamed_used), names,
            f"how many of {num_experts} are in use: exp of the entropy of the mean weight",
        ),
        Measure(
            "dead experts", load.dead_experts, mean(float((s == 0).sum()) for s in renamed_shares), names,
            "first choice of no sample",
        ),
        Measure(
            "largest share", max(load.share), mean(s.max().item() for s in renamed_shares), names,
            "of the samples, by first choice",
        ),
        Measure(
            "H(E)", found.marginal, mean(_mean_entropy(probs_NE.gather(1, order)) for order in orders), names,
            f"nats, {most} at most: low when experts idle",
        ),
        Measure(
            "H(E|x)", found.per_sample, math.nan, "",
            f"nats, {most} at most: low when a sample's gate is decided",
        ),
        Measure(
            "I(x;E)", found.information_input, 0.0, "a gate that ignores its input",
            f"nats, {most} at most: how much the choice depends on the sample",
        ),
        Measure(
            "H(E|c)", found.class_conditional, mean(r.class_conditional for r in relabelled), classes,
            f"nats, {most} at most: low when classes own experts",
        ),
        Measure(
            "H(C|E)", found.expert_class, mean(r.expert_class for r in relabelled), classes,
            f"nats, {math.log(num_classes):.3f} at most: low when experts see few classes",
        ),
        Measure(
            "I(c;E)", found.information_class, mean(r.information_class for r in relabelled), classes,
            f"nats, {math.log(min(num_experts, num_classes)):.3f} at most: what the gate knows of the class",
        ),
        Measure(
            "AMI", load.adjusted_mutual_information, 0.0, "chance, by construction",
            "of class and first choice: 1 where they agree",
        ),
    ]  # fmt: skip


def _representational(expert_outputs_NEO: Tensor, seed: int) -> tuple[Degree, Measure]:
    """The null keeps every expert's answers and breaks their pairing."""
    num_samples, num_experts = expert_outputs_NEO.shape[:2]
    draw = generator(seed, "unpaired answers")
    nulls = []
    for _ in range(PERMUTED_DRAWS):
        order_NE = torch.rand(num_samples, num_experts, generator=draw).argsort(0)
        index_NEO = order_NE.to(expert_outputs_NEO.device)[..., None].expand_as(expert_outputs_NEO)
        nulls.append(metrics.output_similarity(expert_outputs_NEO.gather(0, index_NEO)))
    degree = Degree(
        representational_collapse(metrics.output_similarity(expert_outputs_NEO)),
        representational_collapse(float(np.mean(nulls))),
    )
    return degree, Measure(
        "representational collapse", *degree, "answers to unrelated samples compared",
        "cosine of the experts' answers: 1: they answer alike; 0: unrelated",
    )  # fmt: skip


def interventions(
    weights_NE: Tensor, draw: torch.Generator, permuted_draws: int = PERMUTED_DRAWS
) -> Iterator[tuple[str, Tensor]]:
    """The tamperings of `robustness.expert_ablations`, each as the weights it leaves: (name, [N, E]).

    To merge two experts into the mean of their answers is to give each the mean of their weights.
    """
    num_experts = weights_NE.shape[1]
    for e in range(num_experts):
        kept_NE = weights_NE.clone()
        kept_NE[:, e] = 0
        total_N1 = kept_NE.sum(1, keepdim=True)
        # Where the dropped expert had all but a millionth, the others share alike.
        others_NE = torch.full_like(kept_NE, 1 / (num_experts - 1))
        others_NE[:, e] = 0
        yield "dropped", torch.where(total_N1 > 1e-6, kept_NE / total_N1.clamp(min=1e-6), others_NE)
    for a, b in itertools.combinations(range(num_experts), 2):
        swapped_NE, merged_NE = weights_NE.clone(), weights_NE.clone()
        swapped_NE[:, [a, b]] = weights_NE[:, [b, a]]
        merged_NE[:, [a, b]] = weights_NE[:, [a, b]].mean(1, keepdim=True)
        yield "swapped", swapped_NE
        yield "merged", merged_NE
    for _ in range(permuted_draws):
        yield "permuted", weights_NE[torch.randperm(len(weights_NE), generator=draw)]


@torch.no_grad()
def _functional(
    weights_NE: Tensor,
    expert_outputs_NEO: Tensor,
    labels_N: Tensor,
    num_classes: int,
    predict: Predict,
    seed: int,
) -> tuple[Redundancy, list[Measure]]:
    num_samples, num_experts = weights_NE.shape

    def accuracy(weights_NE: Tensor) -> tuple[float, int]:
        mixed_NO = torch.einsum("ne,neo->no", weights_NE.to(expert_outputs_NEO), expert_outputs_NEO)
        logits_NC = predict(mixed_NO)
        if logits_NC.ndim != 2 or len(logits_NC) != num_samples or logits_NC.shape[1] < num_classes:
            raise ValueError(
                f"predict must return class logits [{num_samples}, C] with C >= {num_classes} "
                f"from mixed answers {tuple(mixed_NO.shape)}, got {tuple(logits_NC.shape)}"
            )
        return (logits_NC.argmax(1).cpu() == labels_N).double().mean().item(), logits_NC.shape[1]

    clean, num_answers = accuracy(weights_NE)
    lost: dict[str, list[float]] = {"dropped": [], "swapped": [], "merged": [], "permuted": []}
    for name, tampered_NE in interventions(weights_NE, generator(seed, "permuted routing")):
        lost[name].append(clean - accuracy(tampered_NE)[0])
    costs = {name: values if name == "dropped" else float(np.mean(values)) for name, values in lost.items()}
    parts = redundancy(costs, clean, num_experts, num_answers)
    no_matter = "equal experts, or a constant gate"
    return parts, [
        Measure("accuracy", clean, 1 / num_answers, "chance", "of the mixture as it is"),
        Measure(
            "functional collapse", parts.permuted, 1.0, no_matter,
            "gates exchanged between samples. 1: it does not matter; 0: as dear as to perfect specialists",
        ),
        Measure("... two swapped", parts.swapped, 1.0, no_matter, "1: experts are interchangeable"),
        Measure("... two merged", parts.merged, 1.0, no_matter, "1: two do what their mean could"),
        Measure("... one dropped", parts.dropped, 1.0, no_matter, "1: none is missed"),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------- from a live model


class Collected(NamedTuple):
    """What `panel` needs, and the block's input, for a `predict` with a residual connection."""

    probs_NE: Tensor
    labels_N: Tensor
    expert_outputs_NEO: Tensor
    inputs_ND: Tensor


@torch.no_grad()
def collect(model: nn.Module, batches: Iterable[tuple[Any, Tensor]], block: nn.Module) -> Collected:
    """Run a model and record one MoE block in it, as Hugging Face's transformers build them.

    Every expert answers every token, chosen or not. The model is put into evaluation mode meanwhile.

    Args:
        model: called with the inputs of each batch; with keywords if these are a mapping.
        batches: (inputs, labels): a label a token, or a label a sequence, which all its tokens get.
        block: a module inside the model, such as `MixtralSparseMoeBlock`, that runs once a batch. Its `.gate`
            returns logits (or probabilities), alone or first in a tuple; its `.experts` is a `ModuleList`
            (transformers 4), or one module called with tokens, indices [N, K] and weights [N, K] (5).

    Raises:
        ValueError: the block has no gate and experts, ran not once a batch, or labels do not fit the tokens.
    """
    gate, experts = getattr(block, "gate", None), getattr(block, "experts", None)
    if not isinstance(gate, nn.Module) or not isinstance(experts, nn.Module):
        raise ValueError(
            f"a block with modules .gate and .experts is needed, got {type(block).__name__}; "
            "for any other layer give its tensors to `panel` directly"
        )
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        scores = output[0] if isinstance(output, tuple) else output
        seen.append((inputs[0].flatten(0, -2), scores.flatten(0, -2)))

    modes = {module: module.training for module in model.modules()}
    hook = gate.register_forward_hook(note)
    parts: list[Collected] = []
    try:
        model.eval()
        for inputs, labels in batches:
            seen.clear()
            _ = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
            if len(seen) != 1:
                raise ValueError(f"the block must run once a batch, its gate ran {len(seen)} times")
            ((tokens_ND, scores_NE),) = seen
            labels_N, tokens = labels.flatten(), len(tokens_ND)
            if not len(labels_N) or tokens % len(labels_N):
                raise ValueError(f"{len(labels_N)} labels do not divide {tokens} tokens")
            parts.append(
                Collected(
                    _probabilities(scores_NE),
                    labels_N.to(tokens_ND.device).repeat_interleave(tokens // len(labels_N)),
                    _answers(experts, tokens_ND, scores_NE.shape[1]),
                    tokens_ND,
                )
            )
    finally:
        hook.remove()
        for module, training in modes.items():
            module.training = training
    if not parts:
        raise ValueError("no batch to collect from")
    return Collected(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _probabilities(scores_NE: Tensor) -> Tensor:
    scores_NE = scores_NE.float()
    sums_N = scores_NE.sum(1)
    already = bool((scores_NE >= 0).all()) and torch.allclose(sums_N, torch.ones_like(sums_N), atol=1e-2)
    return scores_NE if already else scores_NE.softmax(1)


def _answers(experts: nn.Module, tokens_ND: Tensor, num_experts: int) -> Tensor:
    """[N, E, O]"""
    if isinstance(experts, nn.ModuleList):
        return torch.stack([expert(tokens_ND) for expert in experts], 1)
    weight_N1 = tokens_ND.new_ones(len(tokens_ND), 1)
    index_N1 = torch.zeros_like(weight_N1, dtype=torch.long)
    return torch.stack([experts(tokens_ND, index_N1 + e, weight_N1) for e in range(num_experts)], 1)
