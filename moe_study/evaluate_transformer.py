"""From a trained transformer to the numbers in its result file.

Shapes: N tokens, B sequences or images, T positions, D width, E experts, C classes, L MoE layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_lib import metrics
from moe_lib.models.transformer import Seen, moe_layers, watching
from moe_lib.moe import MoE, Routing, adaptive_routers, frozen_scales, gradient_through_scales, joined
from moe_lib.rng import generator
from moe_lib.robustness.attacks import fgsm, pgd, spsa
from moe_lib.robustness.corruptions import CORRUPTIONS, corrupt
from moe_study import store
from moe_study.data import Split, pixels
from moe_study.data.text import SWAP_SHARES, Text, head, swap_words
from moe_study.evaluate import code_measures
from moe_study.tasks import LanguageTask, VisionTask

# What is measured on how much of the test set: a whole pass for the task, less for the rest.
ROUTING_BATCHES = 8  # of training size
ALONE_SAMPLES = 64  # scored one by one
ABLATION_BATCHES = 2
EVALUATION_TOKENS = 2**16  # of the validation text, after every epoch
ATTACK_STRENGTHS = (1, 2)  # of 255


# ----------------------------------------------------------------------------------------- routing


def layer_measures(seen: Sequence[Seen], labels_N: Tensor, num_classes: int) -> dict[str, Any]:
    """One MoE layer over several batches: entropies, load, and how often M changes the choice."""
    probs_NE = torch.cat([one.routing.probs_NE for one in seen])
    entropy = metrics.routing_entropy(probs_NE, labels_N, num_classes)
    return {
        "marginal": entropy.marginal,
        "per_sample": entropy.per_sample,
        "class_conditional": entropy.class_conditional,
        "load": metrics.load(probs_NE, labels_N),
        "changed": changed_by_scales(seen) if adaptive_routers(seen[0].layer) else None,
    }


def changed_by_scales(seen: Sequence[Seen]) -> dict[str, float] | None:
    """Against M = I in the same model on the same tokens; None in the first MoE layer, which has no M.

    best, chosen: the share of tokens whose best expert, or whose set of chosen experts, is another.
    follows, follows_plain: adjusted mutual information of a token's best expert with its cluster k (its
        best expert in the previous layer), with M and with M = I. M is told k, so a router can copy it.
    """
    previous = [one.previous for one in seen if one.previous is not None]
    if not previous:
        return None
    actual = joined([one.routing for one in seen])
    plain = joined([one.layer.route(one.tokens_ND) for one in seen])
    cluster_N = joined(previous).first_choices()
    return {
        "best": (actual.first_choices() != plain.first_choices()).double().mean().item(),
        "chosen": different_choice(actual, plain).double().mean().item(),
        "follows": agreement(cluster_N, actual.first_choices()),
        "follows_plain": agreement(cluster_N, plain.first_choices()),
    }


def agreement(a_N: Tensor, b_N: Tensor) -> float:
    """Adjusted mutual information of two partitions: 0 by chance, 1 if they agree up to names."""
    from sklearn.metrics import adjusted_mutual_info_score

    return float(adjusted_mutual_info_score(a_N.cpu().numpy(), b_N.cpu().numpy()))


def different_choice(a: Routing, b: Routing) -> Tensor:
    """[N]: whether two decisions chose different sets of experts."""
    return ((a.dense_weights() > 0) != (b.dense_weights() > 0)).any(1)


def routing_measures(
    seen: Sequence[Seen], num_layers: int, labels: Sequence[Tensor], num_classes: int
) -> dict[str, Any]:
    """All MoE layers, and how well a token's expert in one layer tells its expert in the next.

    Args:
        seen: of several forward passes of a model with `num_layers` MoE layers, in order.
        labels: per pass, of its samples; a sample's label is that of all its tokens.
    """
    layers, best = [], []
    for at in range(num_layers):
        passes = seen[at::num_layers]
        labels_N = torch.cat(
            [
                own.repeat_interleave(len(one.tokens_ND) // len(own))
                for own, one in zip(labels, passes, strict=True)
            ]
        )
        layers.append(layer_measures(passes, labels_N, num_classes))
        best.append(torch.cat([one.routing.first_choices() for one in passes]))
    stability = [agreement(a, b) if len(a) == len(b) else None for a, b in itertools.pairwise(best)]
    return {"layers": layers, "stability": stability}


# ---------------------------------------------------------------------------------------- ablation


def scale_experts(layers: Sequence[MoE]) -> bool:
    return any(router.config.scale_experts for layer in layers for router in adaptive_routers(layer))


@contextmanager
def tampered(layers: Sequence[MoE], change: Callable[[Routing], Routing]) -> Iterator[None]:
    """Replace the decisions of some MoE layers; later layers see the changed ones."""
    if scale_experts(layers):
        raise ValueError("scale_experts: the decision and the experts' input cannot be changed apart")
    handles = [
        layer.router.register_forward_hook(lambda module, inputs, routing: change(routing))
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without(expert: int) -> Callable[[Routing], Routing]:
    """The decision if `expert` did not exist: the next best takes its place."""

    def change(routing: Routing) -> Routing:
        logits_NE = routing.logits_NE.clone()
        logits_NE[:, expert] = -math.inf
        probs_NE = logits_NE.to(routing.probs_NE.dtype).softmax(1)
        return Routing(logits_NE, probs_NE, routing.indices_NK, routing.weights_NK).top(
            routing.indices_NK.shape[1]
        )

    return change


def permuted(draw: torch.Generator) -> Callable[[Routing], Routing]:
    """Decisions exchanged between tokens at random."""

    def change(routing: Routing) -> Routing:
        order_N = torch.randperm(len(routing.probs_NE), generator=draw).to(routing.probs_NE.device)
        return Routing(*(field[order_N] for field in routing))

    return change


def ablation_measures(
    layers: Sequence[MoE], cross_entropy: Callable[[], float], draw: torch.Generator
) -> dict[str, Any]:
    """Cross-entropy gained (nats) when one layer loses an expert, or has its decisions exchanged. Empty where
    the experts see M h too, so that it can't be told what the decision alone is worth."""
    if scale_experts(layers):
        return {}
    clean = cross_entropy()
    dropped, exchanged = [], []
    for layer in layers:
        row = []
        num_experts = layer.experts.num_experts
        for expert in range(num_experts if layer.top_k is None or num_experts > layer.top_k else 0):
            with tampered([layer], without(expert)):
                row.append(cross_entropy() - clean)
        dropped.append(row)
        with tampered([layer], permuted(draw)):
            exchanged.append(cross_entropy() - clean)
    with tampered(layers, permuted(draw)):
        together = cross_entropy() - clean
    return {"dropped": dropped, "permuted": exchanged, "permuted_everywhere": together}


# -------------------------------------------------------------------------------- batch dependence


class Company(NamedTuple):
    """Does a prediction change with the rest of the batch, or with later tokens?"""

    cross_entropy_alone: float
    cross_entropy_together: float
    changed_choice: float  # share of tokens that are routed otherwise, last MoE layer
    largest_change: float  # of a log-probability


def company(
    alone: Sequence[tuple[Tensor, Routing]], together: tuple[Tensor, Routing], labels_N: Tensor
) -> Company:
    """Compare log-probabilities and decisions on the same samples in two kinds of company.

    Args:
        alone: part by part.
    """
    alone_NC, together_NC = torch.cat([log_probs for log_probs, _ in alone]), together[0]
    changed_N = different_choice(joined([routing for _, routing in alone]), together[1])

    def cross_entropy(log_probs_NC: Tensor) -> float:
        return -log_probs_NC.double().gather(1, labels_N[:, None]).mean().item()

    return Company(
        cross_entropy(alone_NC),
        cross_entropy(together_NC),
        changed_N.double().mean().item(),
        (alone_NC - together_NC).abs().max().item(),
    )


# ------------------------------------------------------------------------------------------ vision


@contextmanager
def without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Only inputs are differentiated in this context, which saves a seventh of the time."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def mean_effective_experts(routings: Sequence[Routing]) -> float:
    """exp of the entropy of the mean gate, averaged over MoE layers."""
    gates = torch.stack([routing.probs_NE.double().mean(0) for routing in routings])
    return torch.special.entr(gates).sum(1).exp().mean().item()


def followed(score: metrics.TaskScore | LanguageScore, routings: Sequence[Routing]) -> dict[str, float]:
    """What is followed over training."""
    return {
        "cross_entropy": score.cross_entropy,
        "accuracy": score.accuracy,
        "effective_experts": mean_effective_experts(routings),
    }


class VisionExperiment:
    """What the engine asks of a vision run.

    Args:
        attack_images: of the test set are attacked, a quarter of them (128 at most) by SPSA.
        corrupted_images: of the test set are corrupted.
    """

    def __init__(self, task: VisionTask, attack_images: int, corrupted_images: int) -> None:
        self.task, self.attack_images, self.corrupted_images = task, attack_images, corrupted_images
        self.spsa_images = min(attack_images // 4, 128)

    def validation(self) -> dict[str, float]:
        split = self.task.dataset.validation
        output = self.task.predict(split)
        return followed(metrics.task_score(output.log_probs_NC, split.labels_N), output.routings)

    def initial(self) -> dict[str, Any]:
        self.task.eval()  # a causal router would count the test set among its steps
        return {"routing": self._routing()}

    def endpoint(self) -> dict[str, Any]:
        test = self.task.dataset.test
        log_probs_NC = self.task.predict(test).log_probs_NC
        return {
            "task": metrics.task_score(log_probs_NC, test.labels_N),
            "correct": store.pack_bits(log_probs_NC.argmax(1) == test.labels_N),
            "routing": self._routing(),
        }

    def final(self) -> dict[str, Any]:
        with without_weight_gradients(self.task.model):
            attack, attacked = self._attack()
        corruption, corrupted = self._corruption()
        return self.endpoint() | {
            "company": self._company(),
            "ablation": self._ablation(),
            "corruption": corruption,
            "attack": attack,
            "correct_under": {"attack": attacked, "corruption": corrupted},
            "embedding": self._embedding(),
        }

    def _score(self, split: Split) -> metrics.TaskScore:
        return metrics.task_score(self.task.predict(split).log_probs_NC, split.labels_N)

    def _part(self, batches: int) -> Split:
        return self.task.dataset.test.take(slice(batches * self.task.batch_size))

    def _routing(self) -> dict[str, Any]:
        split = self._part(ROUTING_BATCHES)
        with watching(self.task.model) as seen:
            self.task.predict(split)
        labels = split.labels_N.split(self.task.batch_size)
        return routing_measures(seen, len(moe_layers(self.task.model)), labels, self.task.dataset.num_classes)

    def _company(self) -> Company:
        split = self._part(1).take(slice(ALONE_SAMPLES))
        output = self.task.predict(self._part(1))
        single = [self.task.predict(split.take(slice(i, i + 1))) for i in range(len(split))]
        alone = [(one.log_probs_NC, one.routings[-1]) for one in single]
        tokens = sum(len(routing.probs_NE) for _, routing in alone)
        routing = Routing(*(field[:tokens] for field in output.routings[-1]))
        return company(alone, (output.log_probs_NC[: len(split)], routing), split.labels_N)

    def _ablation(self) -> dict[str, Any]:
        split = self._part(ABLATION_BATCHES)
        return ablation_measures(
            moe_layers(self.task.model),
            lambda: self._score(split).cross_entropy,
            generator(self.task.seed, "permuted routing"),
        )

    def _correct(self, split: Split) -> Tensor:
        """[N]: whether each image is classified rightly."""
        return self.task.predict(split).log_probs_NC.argmax(1) == split.labels_N

    def _corruption(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Accuracy at severities 1 to 5, where "clean" is that of the same images; and of how many of all
        kinds and severities each image was classified rightly, packed."""
        split = self.task.dataset.test.take(slice(self.corrupted_images))
        accuracy: dict[str, Any] = {"clean": self._correct(split).double().mean().item()}
        right_N = torch.zeros(len(split), dtype=torch.uint8, device=split.labels_N.device)
        for name in CORRUPTIONS:
            accuracy[name] = []
            for severity in range(1, 6):
                draw = generator(self.task.seed, name, severity)
                images_NCHW = corrupt(split.images_NCHW, name, severity, draw)
                correct_N = self._correct(Split(images_NCHW, split.labels_N))
                accuracy[name].append(correct_N.double().mean().item())
                right_N += correct_N
        return accuracy, store.pack_counts(right_N)

    def _attack(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Accuracy under attack, by attack and strength (1/255 or 2/255), by what is known of M; and which
        images were classified rightly.

        AC's M depends on the batch, so an attacker (and the score) can treat it in three ways: "detached",
        a constant in the gradient, as the published code would have it; "through", differentiated;
        "frozen" at its value on the clean images, for attack and score alike. Other routers have no M:
        "detached" alone. SPSA uses no gradient at all: it takes less accuracy than PGD on the same images
        ("spsa-2 pgd", M differentiated) unless gradients are masked.
        """
        test = self.task.dataset.test.take(slice(self.attack_images))
        right: dict[tuple[str, str], list[Tensor]] = {}
        for number, start in enumerate(range(0, len(test), self.task.batch_size)):
            part = test.take(slice(start, start + self.task.batch_size))
            images_NCHW, labels_N = pixels(part.images_NCHW, self.task.dtype), part.labels_N
            found = self._attack_batch(images_NCHW, labels_N, number)
            if number == 0:
                found |= self._attack_by_samples(images_NCHW, labels_N)
            for key, correct_N in found.items():
                right.setdefault(key, []).append(correct_N)
        clean_N = torch.cat(right.pop(("clean", "")))
        accuracy: dict[str, Any] = {"clean": clean_N.double().mean().item()}
        packed: dict[str, Any] = {"clean": store.pack_bits(clean_N)}
        for (name, mode), parts in right.items():
            correct_N = torch.cat(parts)
            accuracy.setdefault(name, {})[mode] = correct_N.double().mean().item()
            packed.setdefault(name, {})[mode] = store.pack_bits(correct_N)
        return accuracy, packed

    def _log_probs(self, images_NCHW: Tensor) -> Tensor:
        return self.task.model(images_NCHW).log_probs_NC

    @torch.no_grad()
    def _right(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        return self._log_probs(images_NCHW).argmax(1) == labels_N

    def _attack_batch(
        self, images_NCHW: Tensor, labels_N: Tensor, number: int
    ) -> dict[tuple[str, str], Tensor]:
        """Attack and treatment of M -> which images of the `number`-th batch are still classified rightly."""
        model, predict = self.task.model, self._log_probs
        treatments: dict[str, Callable[[], AbstractContextManager]] = {"detached": nullcontext}
        if any(not router.config.causal for router in adaptive_routers(model)):  # M depends on the batch
            treatments["through"] = lambda: gradient_through_scales(model)
            treatments["frozen"] = lambda: frozen_scales(model, lambda: predict(images_NCHW))
        right = {("clean", ""): self._right(images_NCHW, labels_N)}
        for strength, (mode, treated) in itertools.product(ATTACK_STRENGTHS, treatments.items()):
            eps = strength / 255
            with treated():
                draw = generator(self.task.seed, "pgd", number)
                by_step = fgsm(predict, images_NCHW, labels_N, eps)
                right[f"fgsm-{strength}", mode] = self._right(by_step, labels_N)
                by_steps = pgd(predict, images_NCHW, labels_N, eps, draw)
                right[f"pgd-{strength}", mode] = self._right(by_steps, labels_N)
        return right

    def _attack_by_samples(self, images_NCHW: Tensor, labels_N: Tensor) -> dict[tuple[str, str], Tensor]:
        """SPSA on some images of the first batch, and PGD on the same."""
        few, known, predict = images_NCHW[: self.spsa_images], labels_N[: self.spsa_images], self._log_probs
        with gradient_through_scales(self.task.model):
            by_gradient = pgd(predict, few, known, 2 / 255, generator(self.task.seed, "pgd", 0))
        by_samples = spsa(predict, few, known, 2 / 255, generator(self.task.seed, "spsa"))
        attacked = {"spsa-2": by_samples, "spsa-2 pgd": by_gradient, "spsa-2 clean": few}
        return {(name, "detached"): self._right(images, known) for name, images in attacked.items()}

    def _embedding(self) -> dict[str, float]:
        """Of the mean token in front of the first MoE layer."""
        return code_measures(self.task.dataset, lambda split: self.task.predict(split).activations["stem"])


# ---------------------------------------------------------------------------------------- language


class LanguageScore(NamedTuple):
    cross_entropy: float  # nats a token
    perplexity: float  # its exponential
    bits_per_byte: float
    accuracy: float


class LanguageExperiment:
    """What the engine asks of a language run.

    Args:
        test_tokens: of the test text are scored; half of them with words swapped.
    """

    def __init__(self, task: LanguageTask, test_tokens: int) -> None:
        self.task = task
        corpus = task.corpus
        self.test = head(corpus.test, test_tokens)
        if len(self.test) < 4 * task.config.context:  # half of it is scored again, with shorter words
            raise ValueError(
                f"a context of {task.config.context} needs four times that many tokens of test text, but "
                f"corpus {corpus.name!r} has {len(self.test)}: use a longer text or a shorter context"
            )

    def validation(self) -> dict[str, float]:
        corpus = self.task.corpus
        score = self._score(head(corpus.validation, EVALUATION_TOKENS))
        with torch.no_grad():
            batch = self._sequences(corpus.validation.tokens_N, self.task.batch_size)
            routings = self.task.model(batch[:, :-1]).routings
        return followed(score, routings)

    def initial(self) -> dict[str, Any]:
        self.task.eval()  # a causal router would count the test set among its steps
        return {"routing": self._routing()}

    def endpoint(self) -> dict[str, Any]:
        return {"task": self._score(self.test), "routing": self._routing()}

    def final(self) -> dict[str, Any]:
        return self.endpoint() | {
            "company": {"other sequences": self._alone(), "later tokens": self._later()},
            "ablation": self._ablation(),
            "swap": self._swap(),
        }

    def _score(self, text: Text) -> LanguageScore:
        losses_M, right_M = self.task.score(text.tokens_N)
        mean = losses_M.mean().item()
        bits = losses_M.sum().item() / math.log(2)
        perplexity = math.exp(mean) if mean < 700 else math.inf
        return LanguageScore(mean, perplexity, bits / len(text), right_M.double().mean().item())

    def _sequences(self, tokens_M: Tensor, count: int) -> Tensor:
        """[count, T + 1] windows of a text, side by side; fewer if it is shorter."""
        context = self.task.config.context
        count = min(count, (len(tokens_M) - 1) // context)
        index_BW = torch.arange(count)[:, None] * context + torch.arange(context + 1)
        return tokens_M[index_BW.to(tokens_M.device)]

    def _batches(self, count: int) -> Sequence[Tensor]:
        """So many batches of the test text, or all of it."""
        size = self.task.batch_size
        return self._sequences(self.test.tokens_N, count * size).split(size)

    @torch.no_grad()
    def _routing(self) -> dict[str, Any]:
        """Labels are the tokens that are read."""
        batches = [batch[:, :-1] for batch in self._batches(ROUTING_BATCHES)]
        with watching(self.task.model) as seen:
            for batch in batches:
                self.task.model(batch)
        labels = [batch.flatten() for batch in batches]
        return routing_measures(seen, len(moe_layers(self.task.model)), labels, self.task.corpus.num_tokens)

    @torch.no_grad()
    def _alone(self) -> Company:
        """Sequences one by one against the same ones in a batch of the training size."""
        batch = self._sequences(self.test.tokens_N, self.task.batch_size)
        few, context = min(ALONE_SAMPLES, len(batch)), self.task.config.context
        output = self.task.model(batch[:, :-1])
        together = (
            output.log_probs_BTV[:few].flatten(0, 1),
            Routing(*(field[: few * context] for field in output.routings[-1])),
        )
        alone = []
        for sequence in batch[:few]:
            own = self.task.model(sequence[None, :-1])
            alone.append((own.log_probs_BTV[0], own.routings[-1]))
        return company(alone, together, batch[:few, 1:].flatten())

    @torch.no_grad()
    def _later(self) -> Company:
        """First halves of sequences whose second halves are another's ("alone"), against the originals.

        A causal model shows no change at all.
        """
        batch = self._sequences(self.test.tokens_N, self.task.batch_size)[:, :-1]
        half = batch.shape[1] // 2
        exchanged = torch.cat([batch[:, :half], batch[:, half:].roll(1, 0)], 1)

        def first_half(tokens_BT: Tensor) -> tuple[Tensor, Routing]:
            output = self.task.model(tokens_BT)
            kept = [
                field.unflatten(0, tokens_BT.shape)[:, :half].flatten(0, 1) for field in output.routings[-1]
            ]
            return output.log_probs_BTV[:, :half].flatten(0, 1), Routing(*kept)

        targets_N = batch[:, 1 : half + 1].flatten()
        return company([first_half(exchanged)], first_half(batch), targets_N)

    def _ablation(self) -> dict[str, Any]:
        parts = self._batches(ABLATION_BATCHES)

        @torch.no_grad()
        def cross_entropy() -> float:
            losses = [self.task.losses(part, 0)["cross_entropy"].double() * len(part) for part in parts]
            return torch.stack(losses).sum().item() / sum(len(part) for part in parts)

        draw = generator(self.task.seed, "permuted routing")
        return ablation_measures(moe_layers(self.task.model), cross_entropy, draw)

    def _swap(self) -> dict[str, dict[str, float]]:
        """Cross-entropy with a share of the words replaced by <unk>: on the targets that belong to words left
        alone, in the clean and in the swapped text, and on all targets of the swapped text."""
        clean = head(self.test, max(len(self.test) // 2, 1))
        clean_M, _ = self.task.score(clean.tokens_N)
        found = {}
        for share in (0.0, *SWAP_SHARES):
            swapped = swap_words(clean, share, generator(self.task.seed, "word swap"))
            losses_M, _ = self.task.score(swapped.tokens_M)
            scored = swapped.clean_positions_U > 0  # the first token of a text is no target
            scored &= swapped.swapped_positions_U > 0
            found[f"{share:g}"] = {
                "clean": clean_M[swapped.clean_positions_U[scored] - 1].mean().item(),
                "swapped": losses_M[swapped.swapped_positions_U[scored] - 1].mean().item(),
                "all": losses_M.mean().item(),
                "words": swapped.num_swapped,
            }
        return found
