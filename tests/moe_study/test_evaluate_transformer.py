"""What is measured on transformers against recomputation by hand on tiny models.

Shapes: N tokens, B sequences or images, T positions, D width, E experts, K chosen, V vocabulary.
"""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import reference
import reference_transformer
import torch
from sklearn.metrics import adjusted_mutual_info_score
from small_models import (
    SMALL,
    Dropped,
    corpus_of,
    language_model,
    random,
    read,
    shaken,
    text_of,
    tiny_dataset,
)
from small_models import language_task as language_task_of
from small_models import vision_task as vision_task_of
from torch import nn
from torch.nn import functional as F

from moe_lib.models.language import LanguageOutput
from moe_lib.models.transformer import Seen, moe_layers, watching
from moe_lib.moe import ACConfig, AdaptiveClusteringRouter, MoE, Routing, adaptive_routers, route
from moe_lib.rng import generator
from moe_lib.snnl import SNNLConfig
from moe_study import evaluate_transformer, store
from moe_study.data.text import Corpus, head, load, swap_words
from moe_study.evaluate_transformer import (
    LanguageExperiment,
    VisionExperiment,
    ablation_measures,
    changed_by_scales,
    company,
    different_choice,
    layer_measures,
    mean_effective_experts,
    permuted,
    routing_measures,
    tampered,
    without,
    without_weight_gradients,
)
from moe_study.tasks import RoutedObjective
from moe_study.train import TrainConfig, fit

CAUSAL = {"router": "ac", "ac": ACConfig(causal=True)}
INDEPENDENT = {"linear": {"router": "linear"}, "cosine": {"router": "cosine"}, "ac-causal": CAUSAL}


def decisions(num_tokens=12, num_experts=4, top_k=2, seed=0):
    return route(2 * random(num_tokens, num_experts, seed=seed), top_k)


def hooks(model):
    return [hook for module in model.modules() for hook in module._forward_hooks]


def seen_by(model, *batches):
    with watching(model) as seen:
        for tokens_BT in batches:
            model(tokens_BT)
    return seen


# ----------------------------------------------------------------------------------------- routing


def test_a_different_choice_is_another_set_of_experts():
    """Another order of the same experts is none."""
    one, other = decisions(seed=1), decisions(seed=2)
    sets = [reference_transformer.chosen_sets(routing.probs_NE, 2) for routing in (one, other)]
    expected = [a != b for a, b in zip(*sets, strict=True)]
    assert 0 < sum(expected) < 12
    assert different_choice(one, other).tolist() == expected
    flipped = one._replace(indices_NK=one.indices_NK.flip(1), weights_NK=one.weights_NK.flip(1))
    assert not different_choice(one, flipped).any()


def test_what_m_changes_equals_a_count_by_hand():
    model = language_model(router="ac")
    batches = [read(6, 5, seed=1), read(4, 5, seed=2)]
    seen = seen_by(model, *batches)[1::3]
    best, chosen, actual, plain, clusters = 0, 0, [], [], []
    for one in seen:
        router, tokens_ND = one.layer.router, one.tokens_ND
        weights = reference_transformer.weights_of(one.layer)
        previous_NE = reference.array(one.previous.probs_NE)
        config = replace(SMALL, router="ac")
        _, with_NE = reference_transformer.moe_layer(tokens_ND.numpy(), weights, config, previous_NE)
        _, plain_NE = reference_transformer.moe_layer(tokens_ND.numpy(), weights, config, None)
        assert router.config == ACConfig()
        best += (with_NE.argmax(1) != plain_NE.argmax(1)).sum()
        pairs = zip(*(reference_transformer.chosen_sets(g, 2) for g in (with_NE, plain_NE)), strict=True)
        chosen += sum(a != b for a, b in pairs)
        actual += with_NE.argmax(1).tolist()
        plain += plain_NE.argmax(1).tolist()
        clusters += previous_NE.argmax(1).tolist()
    changed = changed_by_scales(seen)
    assert best > 0
    assert chosen > 0
    assert changed["best"] == pytest.approx(best / 50)
    assert changed["chosen"] == pytest.approx(chosen / 50)
    assert changed["follows"] == pytest.approx(adjusted_mutual_info_score(clusters, actual))
    assert changed["follows_plain"] == pytest.approx(adjusted_mutual_info_score(clusters, plain))


@pytest.mark.parametrize("normalize", ["row", "feature", "global"])
def test_where_m_is_the_identity_nothing_changes(normalize):
    """Every cluster has tokens at plus and minus one along every feature: one dispersion for all."""
    torch.manual_seed(0)
    layer = MoE(
        4, 3, 5, top_k=2, router=AdaptiveClusteringRouter(4, 3, 2, ACConfig(normalize=normalize))
    ).double()
    corners_ND = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)
    previous = route(F.one_hot(torch.arange(3).repeat_interleave(16), 3).double() * 5, 2)
    tokens_ND = corners_ND.repeat(3, 1)
    seen = [Seen(layer, tokens_ND, previous, layer.route(tokens_ND, previous))]
    changed = layer_measures(seen, torch.zeros(48, dtype=torch.int64), 2)["changed"]
    assert (changed["best"], changed["chosen"]) == (0, 0)
    assert changed["follows"] == changed["follows_plain"]


@pytest.mark.parametrize("options", [*INDEPENDENT.values(), {"router": "ac"}], ids=[*INDEPENDENT, "ac"])
def test_layers_without_m_have_no_change_by_it(options):
    """The first MoE layer of an AC model is one, and so is one that averages no step so far."""
    model = language_model(**options).eval()
    seen = seen_by(model, read(6, 5))
    labels_N = read(6, 5).flatten()
    found = [layer_measures([one], labels_N, 9)["changed"] for one in seen]
    if options["router"] != "ac":
        assert found == [None, None, None]
    elif options == CAUSAL:
        assert found[0] is None
        assert [(changed["best"], changed["chosen"]) for changed in found[1:]] == [(0, 0), (0, 0)]
    else:
        assert found[0] is None
        assert all(changed["chosen"] > 0 for changed in found[1:])


def test_measures_of_all_layers_by_hand():
    """Two passes; a label of an image is that of all its tokens."""
    model = language_model(router="ac", moe_blocks=(0, 2))
    seen = seen_by(model, read(4, 5, seed=1), read(2, 5, seed=2))
    labels = [torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1])]
    found = routing_measures(seen, 2, labels, 3)
    labels_N = [label for own in labels for label in own.tolist() for _ in range(5)]
    best = []
    for at, layer in enumerate(found["layers"]):
        gates_NE = np.concatenate([reference.array(one.routing.probs_NE) for one in seen[at::2]])
        marginal, per_sample, class_conditional = reference.routing_entropy(gates_NE, labels_N, 3)[:3]
        assert layer["marginal"] == pytest.approx(marginal)
        assert layer["per_sample"] == pytest.approx(per_sample)
        assert layer["class_conditional"] == pytest.approx(class_conditional)
        share, dead, effective = reference.load(gates_NE)
        assert layer["load"].share == pytest.approx(share)
        assert layer["load"].dead_experts == dead
        assert layer["load"].effective_experts == pytest.approx(effective)
        best.append(gates_NE.argmax(1))
    assert found["stability"] == [pytest.approx(adjusted_mutual_info_score(*best))]
    assert found["layers"][0]["changed"] is None
    assert found["layers"][1]["changed"] is not None


def test_stability_is_one_for_equal_choices_and_none_where_tokens_merge():
    routing = decisions(40)
    layer = language_model().blocks[0].feed_forward
    tokens_ND = random(40, 6)
    same = [Seen(layer, tokens_ND, None, routing)] * 3
    assert routing_measures(same, 3, [torch.arange(40) % 2], 2)["stability"] == [pytest.approx(1)] * 2
    merged = Seen(layer, tokens_ND[:10], None, decisions(10))
    assert routing_measures([same[0], merged], 2, [torch.arange(10) % 2], 2)["stability"] == [None]


def test_effective_experts_between_one_and_all():
    uniform, single = route(torch.zeros(5, 4)), route(torch.tensor([[200.0, 0, 0, 0]]).expand(5, 4))
    assert mean_effective_experts([uniform]) == pytest.approx(4)
    assert mean_effective_experts([single]) == pytest.approx(1)
    assert mean_effective_experts([uniform, single]) == pytest.approx(2.5)
    expected = [reference.load(routing.probs_NE)[2] for routing in (decisions(), decisions(seed=3))]
    assert mean_effective_experts([decisions(), decisions(seed=3)]) == pytest.approx(np.mean(expected))


# ---------------------------------------------------------------------------------------- ablation


def moe_by_hand(layer, tokens_ND, gates_NE, experts_of):
    """Output of a layer whose tokens n are sent where `experts_of(n)` says, by the reference's loops."""
    indices = np.array([experts_of(n)[0] for n in range(len(tokens_ND))])
    weights = np.array([experts_of(n)[1] for n in range(len(tokens_ND))])
    stacked = [getattr(layer.experts, name) for name in ("w1_EDH", "b1_EH", "w2_EHO", "b2_EO")]
    return reference.moe(tokens_ND, indices, weights, *stacked)


@pytest.mark.parametrize("expert", range(4))
def test_without_an_expert_the_next_best_takes_its_place(expert):
    layer, tokens_ND = language_model().blocks[0].feed_forward, random(15, 6)
    gates_NE = reference.array(layer.route(tokens_ND).probs_NE)

    def experts_of(n):
        left = [-1 if e == expert else p for e, p in enumerate(gates_NE[n])]
        chosen, _ = reference.top_k(left, 2)
        total = sum(gates_NE[n, e] for e in chosen)
        return chosen, [gates_NE[n, e] / total for e in chosen]

    with tampered([layer], without(expert)):
        out_ND, routing = layer(tokens_ND)
    np.testing.assert_allclose(
        out_ND.detach(), moe_by_hand(layer, tokens_ND, gates_NE, experts_of), rtol=1e-9, atol=1e-12
    )
    assert not (routing.indices_NK == expert).any()
    torch.testing.assert_close(routing.probs_NE.sum(1), torch.ones(15, dtype=torch.float64))
    assert not routing.probs_NE[:, expert].any()


def test_permuted_routing_sends_tokens_where_others_went():
    layer, tokens_ND = language_model().blocks[0].feed_forward, random(15, 6)
    routing = layer.route(tokens_ND)
    order = torch.randperm(15, generator=generator("x")).tolist()
    assert order != list(range(15))
    with tampered([layer], permuted(generator("x"))):
        out_ND, used = layer(tokens_ND)
    by_hand = moe_by_hand(
        layer,
        tokens_ND,
        None,
        lambda n: (routing.indices_NK[order[n]].tolist(), routing.weights_NK[order[n]].tolist()),
    )
    np.testing.assert_allclose(out_ND.detach(), by_hand, rtol=1e-9, atol=1e-12)
    assert Counter(map(tuple, used.indices_NK.tolist())) == Counter(map(tuple, routing.indices_NK.tolist()))
    torch.testing.assert_close(used.probs_NE, routing.probs_NE[order])


def test_later_layers_see_the_tampered_decision():
    model = language_model(router="ac")
    first = moe_layers(model)[0]
    with tampered([first], without(2)), watching(model) as seen:
        model(read(6, 5))
    assert seen[1].previous is seen[0].routing
    assert not seen[1].previous.probs_NE[:, 2].any()


def test_an_expert_that_nobody_chose_is_not_missed():
    model, tokens_BT = language_model(), read(6, 5)
    for layer in moe_layers(model):
        layer.router = Dropped(layer.router, [1, 3])
    with watching(model) as seen:
        expected = model(tokens_BT).log_probs_BTV
    unused = [(one.layer, e) for one in seen for e in range(4) if not (one.routing.indices_NK == e).any()]
    assert len(unused) == 6
    for layer, expert in unused:
        with tampered([layer], without(expert)):
            torch.testing.assert_close(model(tokens_BT).log_probs_BTV, expected, rtol=1e-12, atol=1e-12)


def test_nothing_is_tampered_with_afterwards():
    model, tokens_BT = language_model(router="ac"), read()
    expected = model(tokens_BT).log_probs_BTV
    with tampered(moe_layers(model), permuted(generator(1))):
        assert not torch.equal(model(tokens_BT).log_probs_BTV, expected)
    assert torch.equal(model(tokens_BT).log_probs_BTV, expected)
    with pytest.raises(RuntimeError, match="halt"), tampered(moe_layers(model), without(0)):
        raise RuntimeError("halt")
    assert hooks(model) == []
    assert torch.equal(model(tokens_BT).log_probs_BTV, expected)


def test_decisions_of_scaled_experts_cannot_be_tampered_with():
    model = language_model(router="ac", ac=ACConfig(scale_experts=True))
    with pytest.raises(ValueError, match="scale_experts"), tampered(moe_layers(model), without(0)):
        pass
    assert hooks(model) == []


@pytest.mark.parametrize("top_k", [2, 4])
def test_ablations_are_differences_from_the_whole(top_k):
    """With all experts chosen there is no next best, and none is dropped."""
    model, tokens_BT = language_model(router="ac", top_k=top_k), read(6, 5)

    def cross_entropy():
        log_probs_BTV = model(tokens_BT).log_probs_BTV.detach()
        return -log_probs_BTV[:, :-1].gather(2, tokens_BT[:, 1:, None]).mean().item()

    layers, clean = moe_layers(model), cross_entropy()
    found = ablation_measures(layers, cross_entropy, generator("order"))
    draw = generator("order")
    for number, layer in enumerate(layers):
        for expert in range(4 if top_k == 2 else 0):
            with tampered([layer], without(expert)):
                assert found["dropped"][number][expert] == pytest.approx(cross_entropy() - clean, abs=1e-12)
        with tampered([layer], permuted(draw)):
            assert found["permuted"][number] == pytest.approx(cross_entropy() - clean, abs=1e-12)
    with tampered(layers, permuted(draw)):
        assert found["permuted_everywhere"] == pytest.approx(cross_entropy() - clean, abs=1e-12)
    assert [len(row) for row in found["dropped"]] == [4 if top_k == 2 else 0] * 3
    assert any(abs(value) > 1e-4 for value in found["permuted"])
    assert hooks(model) == []


# ----------------------------------------------------------------------------------------- company


def one_choice(experts):
    """The decision of a router that sends each token to one of three experts."""
    probs_NE = torch.nn.functional.one_hot(torch.tensor(experts), 3).double()
    return Routing(
        probs_NE.log(), probs_NE, torch.tensor(experts)[:, None], torch.ones(len(experts), 1).double()
    )


def test_company_by_hand():
    alone_NC, together_NC = random(6, 3).log_softmax(1), random(6, 3, seed=1).log_softmax(1)
    labels_N = torch.tensor([0, 1, 2, 0, 1, 2])
    chosen, other = (one_choice([0, 1, 2, 0]), one_choice([1, 1, 2, 2]))  # of four tokens, two by another
    alone = [(alone_NC[:2], one_choice([0])), (alone_NC[2:], one_choice([1, 2, 0]))]
    found = company(alone, (together_NC, other), labels_N)
    assert found.cross_entropy_alone == pytest.approx(-sum(alone_NC[n, n % 3].item() for n in range(6)) / 6)
    assert found.cross_entropy_together == pytest.approx(
        -sum(together_NC[n, n % 3].item() for n in range(6)) / 6
    )
    assert found.changed_choice == 0.5
    assert found.largest_change == pytest.approx(np.abs(alone_NC.numpy() - together_NC.numpy()).max())
    assert company(alone, (alone_NC, chosen), labels_N)[2:] == (0, 0)


def with_averages(task):
    """In evaluation mode, after two steps whose statistics were kept."""
    shaken(task)
    task.train()
    for batch in list(task.batches(0))[:2]:
        task.losses(batch, 0)
    task.eval()
    return task


@pytest.mark.parametrize("options", INDEPENDENT.values(), ids=INDEPENDENT)
def test_images_and_sequences_do_not_depend_on_company_where_they_should_not(options):
    """One at a time, or 256 at once."""
    vision = vision_task_of(batch_size=256, dataset=tiny_dataset(512, 256), **options)
    language = language_task_of(corpus_of(2060, 40, 1030), batch_size=256, **options)
    images = VisionExperiment(with_averages(vision), 8, 8)._company()
    sequences = LanguageExperiment(with_averages(language), 1030)
    for found in (images, sequences._alone(), sequences._later()):
        assert found.changed_choice == 0
        assert found.largest_change < 1e-12
        assert found.cross_entropy_alone == pytest.approx(found.cross_entropy_together, abs=1e-12)


def test_the_papers_form_leaks_and_company_tells():
    images = VisionExperiment(with_averages(vision_task_of(router="ac", batch_size=16)), 8, 8)._company()
    sequences = LanguageExperiment(
        with_averages(language_task_of(corpus_of(200, 200, 200), batch_size=16, router="ac")), 128
    )
    for found in (images, sequences._alone(), sequences._later()):
        assert found.largest_change > 1e-3
        assert found.cross_entropy_alone != found.cross_entropy_together
        assert found.changed_choice > 0


def test_company_of_sequences_by_hand():
    """The second form compares first halves whose second halves were exchanged."""
    task = with_averages(language_task_of(corpus_of(60, 60, 21), batch_size=5, router="ac"))
    experiment = LanguageExperiment(task, 64)
    tokens_M = task.corpus.test.tokens_N
    batch_BW = torch.stack([tokens_M[4 * b : 4 * b + 5] for b in range(5)])
    together_BTV = task.model(batch_BW[:, :-1]).log_probs_BTV
    alone_BTV = torch.cat([task.model(row_W[None, :-1]).log_probs_BTV for row_W in batch_BW])
    assert experiment._alone().largest_change == pytest.approx((alone_BTV - together_BTV).abs().max().item())
    exchanged_BW = batch_BW.clone()
    for b in range(5):
        exchanged_BW[b, 2:4] = batch_BW[b - 1, 2:4]
    later_BTV = task.model(exchanged_BW[:, :-1]).log_probs_BTV
    found = experiment._later()
    assert found.largest_change == pytest.approx((later_BTV - together_BTV)[:, :2].abs().max().item())
    picked = [later_BTV[b, t, batch_BW[b, t + 1]].item() for b in range(5) for t in range(2)]
    assert found.cross_entropy_alone == pytest.approx(-np.mean(picked))


# -------------------------------------------------------------------------------------- experiments


def state_of(task):
    return {name: value.clone() for name, value in task.state_dict().items()}


def changes(task, before):
    return {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.slow
@pytest.mark.parametrize("options", [CAUSAL, {"router": "ac"}], ids=["ac-causal", "ac"])
def test_no_measure_changes_a_model(options, monkeypatch):
    """Not even a fresh one, which is in training mode: its running averages would be the test set's."""
    monkeypatch.setattr(evaluate_transformer, "CORRUPTIONS", ("noise",))
    for experiment in (
        VisionExperiment(vision_task_of(dataset=tiny_dataset(num_other=32), **options), 8, 8),
        LanguageExperiment(language_task_of(**options), 64),
    ):
        task = experiment.task
        before = state_of(task)
        experiment.initial()
        assert changes(task, before) == set()
        task.train()
        first, second = list(task.batches(0))[:2]
        task.losses(first, 0)
        kept = {f"model.blocks.2.feed_forward.router.{name}" for name in ("running_ED", "seen_E")}
        assert changes(task, before) == (kept if options == CAUSAL else set())
        task.eval()
        before = state_of(task)
        task.losses(second, 0)
        experiment.validation()
        experiment.endpoint()
        found = experiment.final()
        assert changes(task, before) == set()
        assert all(parameter.grad is None for parameter in task.parameters())
        assert hooks(task) == []
        assert [router.config for router in adaptive_routers(task)] == [options.get("ac", ACConfig())] * 2
        assert json.dumps(experiment.final()) == json.dumps(found)


@pytest.mark.parametrize(
    "kind", ["images, causal AC, learned SNNL", "sequences, cosine", "sequences, causal AC"]
)
def test_a_killed_run_ends_with_the_same_numbers(kind, tmp_path):
    """Running averages and the learned temperature of the SNNL travel with the checkpoint."""
    config = TrainConfig(epochs=3, batch_size=8, learning_rate=0.01, warmup=0.3, precision="float64")
    snnl = SNNLConfig(factor=0.1, schedule="learned", layers=("stem",))
    options = CAUSAL if "AC" in kind else {"router": "cosine"}

    def run(checkpoint=None, stop_after=None):
        if "images" in kind:
            experiment = VisionExperiment(vision_task_of(RoutedObjective(snnl=snnl), **options), 8, 8)
        else:
            experiment = LanguageExperiment(language_task_of(epoch_tokens=24, **options), 64)

        def stop(epoch, history):
            if epoch == stop_after:
                raise KeyboardInterrupt

        task, measure = experiment.task, experiment.validation
        history, best = fit(task, config, measure, label="tiny", checkpoint=checkpoint, on_epoch=stop)
        return task, history, best

    whole, expected, best = run()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "checkpoint.pt", stop_after=1)
    resumed, found, found_best = run(tmp_path / "checkpoint.pt")
    assert (found.train, found.validation) == (expected.train, expected.validation)
    assert best.keys() == found_best.keys() == {"best_cross_entropy", "best_accuracy"}
    pairs = [(best[name], found_best[name]) for name in best]
    for state, other in ((whole.state_dict(), resumed.state_dict()), *pairs):
        assert state.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in state.items())
    averages = [value.any() for name, value in best["best_cross_entropy"].items() if "running" in name]
    assert any(averages) == ("AC" in kind)


def test_validation_and_test_scores_of_images_by_hand():
    task = shaken(vision_task_of(router="ac")).eval()
    experiment = VisionExperiment(task, 8, 8)
    for split, found in (
        (task.dataset.validation, experiment.validation()),
        (task.dataset.test, experiment.endpoint()["task"]._asdict()),
    ):
        log_probs_NC = torch.cat(
            [task.model(part.double() / 255).log_probs_NC for part in split.images_NCHW.split(8)]
        )
        picked = [row[label].item() for row, label in zip(log_probs_NC, split.labels_N, strict=True)]
        assert found["cross_entropy"] == pytest.approx(-np.mean(picked))
        right = (log_probs_NC.argmax(1) == split.labels_N).double().mean().item()
        assert found["accuracy"] == pytest.approx(right)


class Uniform(nn.Module):
    """Every token equally probable, whatever was read."""

    def __init__(self, num_tokens):
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, tokens_BT):
        value = torch.tensor(-math.log(self.num_tokens), dtype=torch.float64)
        return LanguageOutput(value.expand(*tokens_BT.shape, self.num_tokens), [])


def test_a_uniform_model_has_the_perplexity_of_the_vocabulary():
    """And log2 V bits a token: at byte level 8 bits a byte, the first of which is no target."""
    tokens = torch.randint(128, (301,), generator=torch.Generator().manual_seed(0)).tolist()
    text = text_of(tokens)
    task = language_task_of(Corpus("bytes", text, text, text, 256), context=16)
    task.model = Uniform(256)
    score = LanguageExperiment(task, 10**6)._score(text)
    assert score.cross_entropy == pytest.approx(math.log(256))
    assert score.perplexity == pytest.approx(256)
    assert score.bits_per_byte == pytest.approx(8 * 300 / 301)


def test_the_score_of_a_text_by_hand():
    task = shaken(language_task_of(router="ac", batch_size=7)).eval()
    text = task.corpus.test
    found = LanguageExperiment(task, 10**6).endpoint()["task"]
    losses_M, right_M = task.score(text.tokens_N)
    assert found.cross_entropy == pytest.approx(np.mean(losses_M.tolist()))
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses_M.tolist())))
    assert found.bits_per_byte == pytest.approx(sum(losses_M.tolist()) / math.log(2) / 40)
    assert found.accuracy == pytest.approx(np.mean(right_M.tolist()))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_swap_scores_the_same_targets_in_both_texts(share, monkeypatch, tmp_path):
    raw = "the quick brown fox jumps over the lazy dog of the naïve house\n" * 60
    (tmp_path / "prose.txt").write_text(raw)
    corpus = load(str(tmp_path / "prose.txt"))
    task = language_task_of(corpus, context=16, batch_size=8, router="cosine").eval()
    monkeypatch.setattr(evaluate_transformer, "SWAP_SHARES", (share,))
    found = LanguageExperiment(task, 2 * 10**6)._swap()[f"{share:g}"]
    text = head(corpus.test, len(corpus.test) // 2)
    swapped = swap_words(text, share, generator(task.seed, "word swap"))
    losses = {name: task.score(tokens_M)[0].tolist() for name, tokens_M in (
        ("clean", text.tokens_N), ("swapped", swapped.tokens_M)
    )}  # fmt: skip
    clean, other = [], []
    for at_clean, at_swapped in zip(
        swapped.clean_positions_U.tolist(), swapped.swapped_positions_U.tolist(), strict=True
    ):
        if at_clean > 0 and at_swapped > 0:
            assert text.tokens_N[at_clean] == swapped.tokens_M[at_swapped]
            clean.append(losses["clean"][at_clean - 1])
            other.append(losses["swapped"][at_swapped - 1])
    assert found["clean"] == pytest.approx(np.mean(clean))
    assert found["swapped"] == pytest.approx(np.mean(other))
    assert found["all"] == pytest.approx(np.mean(losses["swapped"]))
    assert found["words"] == swapped.num_swapped
    assert (found["words"] > 0) == (share > 0)
    assert (found["clean"] == found["swapped"]) == (share == 0)


def test_ablations_of_both_experiments_start_from_the_scored_batches():
    vision, language = vision_task_of(router="ac").eval(), language_task_of(router="ac").eval()
    for experiment in (VisionExperiment(vision, 8, 8), LanguageExperiment(language, 64)):
        found, again = experiment._ablation(), experiment._ablation()
        assert found == again
        assert [len(row) for row in found["dropped"]] == [4, 4]
        assert len(found["permuted"]) == 2
        assert hooks(experiment.task) == []


@pytest.mark.parametrize(
    ("options", "modes"),
    [
        ({"router": "linear"}, {"detached"}),
        ({"router": "cosine"}, {"detached"}),
        (CAUSAL, {"detached"}),
        ({"router": "ac"}, {"detached", "through", "frozen"}),
    ],
    ids=["linear", "cosine", "ac-causal", "ac"],
)
def test_attacks_know_m_in_the_ways_that_matter(options, modes):
    task = shaken(vision_task_of(**options)).eval()
    found, right = VisionExperiment(task, 16, 16)._attack()
    for name in ("fgsm-1", "fgsm-2", "pgd-1", "pgd-2"):
        assert set(found[name]) == modes
        assert all(0 <= accuracy <= 1 for accuracy in found[name].values())
    split = task.dataset.test.take(slice(16))
    assert found["clean"] == pytest.approx(VisionExperiment(task, 16, 16)._score(split).accuracy)
    assert store.unpack_bits(right["clean"]).mean() == found["clean"]
    for name in found.keys() - {"clean"}:
        for mode, packed in right[name].items():
            assert store.unpack_bits(packed).mean() == pytest.approx(found[name][mode])


def test_attacks_differentiate_no_weight_and_leave_training_possible():
    task = vision_task_of()
    first = next(task.model.parameters()).requires_grad_(False)
    with without_weight_gradients(task.model):
        assert not any(weight.requires_grad for weight in task.model.parameters())
    assert not first.requires_grad
    assert all(weight.requires_grad for weight in list(task.model.parameters())[1:])


def test_attacks_lower_the_accuracy_of_a_model_that_learned(monkeypatch):
    task = vision_task_of(router="cosine", dataset=tiny_dataset(num_train=96)).train()
    optimizer = torch.optim.Adam(task.parameters(), lr=0.01)
    for epoch in range(5):
        for batch in task.batches(epoch):
            optimizer.zero_grad()
            task.losses(batch, epoch)["total"].backward()
            optimizer.step()
    task.eval()
    experiment = VisionExperiment(task, 16, 16)
    monkeypatch.setattr(evaluate_transformer, "ATTACK_STRENGTHS", (40,))
    found, _ = experiment._attack()
    assert found["clean"] > 0.5
    assert found["pgd-40"]["detached"] <= found["fgsm-40"]["detached"] < found["clean"]


@pytest.mark.parametrize("length", [5, 15])
def test_a_test_text_too_short_to_measure_on_is_named_before_training(length):
    task = language_task_of(corpus_of(60, 60, length))
    with pytest.raises(ValueError, match=f"context of 4 .*'random' has {length}"):
        LanguageExperiment(task, 10**6)
    with pytest.raises(ValueError, match="'random' has 15"):
        LanguageExperiment(language_task_of(corpus_of(60, 60, 60)), 15)
