"""The causal transformer against plain loops; what may and what may not change a token; its task.

Shapes: B sequences, T positions, N = B * T tokens, D width, V vocabulary, M tokens of a text.
"""

from dataclasses import replace

import numpy as np
import pytest
import reference_transformer
import torch
from small_models import SMALL, corpus_of, language_model, read, shaken, text_of
from small_models import language_task as task_of

from moe_lib.models.language import LanguageConfig
from moe_lib.models.transformer import watching
from moe_lib.moe import ACConfig
from moe_lib.snnl import SNNLConfig
from moe_study.data.text import Corpus
from moe_study.tasks import RoutedObjective
from moe_study.train import TrainConfig, fit

CAUSAL_ROUTERS = {
    "linear": {"router": "linear"},
    "cosine": {"router": "cosine"},
    "ac-causal": {"router": "ac", "ac": ACConfig(causal=True)},
    "ac-causal-mixed": {"router": "ac", "ac": ACConfig(causal=True, mixed=True, scale_experts=True)},
}
every_causal_router = pytest.mark.parametrize("options", CAUSAL_ROUTERS.values(), ids=CAUSAL_ROUTERS)


def trained(model, steps=2):
    """In evaluation mode, after forward passes that leave running averages behind."""
    for step in range(steps):
        model(read(4, 5, seed=50 + step))
    return model.eval()


# ---------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize(
    "options",
    [
        {"router": "linear"},
        {"router": "cosine", "top_k": 1},
        {"router": "cosine", "top_k": 4},
        {"router": "ac"},
        {"router": "ac", "moe_blocks": (0, 2)},
        {"router": "ac", "moe_blocks": (1, 2), "top_k": 3},
        {"router": "ac", "ac": ACConfig(normalize="row", dispersion="variance", eps=0.01)},
        {"router": "ac", "ac": ACConfig(mixed=True, matched=True)},
        {"router": "ac", "ac": ACConfig(mixed=True, scale_experts=True, normalize="global", max_ratio=1.5)},
        {"router": "ac", "ac": ACConfig(causal=True)},
    ],
    ids=str,
)
def test_the_whole_forward_equals_the_loops(options):
    model = language_model(**options)
    trained(model)
    tokens_BT = read(3, 4, seed=1)
    output = model(tokens_BT)
    config = LanguageConfig(replace(SMALL, **options), context=5)
    expected_BTV, gates = reference_transformer.language_model(tokens_BT, model, config)
    np.testing.assert_allclose(output.log_probs_BTV.detach(), expected_BTV, rtol=1e-7, atol=1e-9)
    assert len(output.routings) == len(gates)
    clusters = [np.bincount(gates_NE.argmax(1), minlength=4) for gates_NE in gates]
    assert all((counts >= 2).sum() >= 2 for counts in clusters), "one cluster alone: M = I, nothing is shown"
    for routing, gates_NE in zip(output.routings, gates, strict=True):
        np.testing.assert_allclose(routing.probs_NE.detach(), gates_NE, rtol=1e-7, atol=1e-9)


def test_the_chain_passes_over_blocks_without_experts():
    """The third block's clusters are the first one's; other clusters, other scores."""
    model = language_model(router="ac", moe_blocks=(0, 2))
    with watching(model) as seen:
        model(read())
    first, last = seen
    others = first.routing._replace(probs_NE=first.routing.probs_NE.roll(1, 0))
    logits_NE, others_NE = (
        last.layer.router(last.tokens_ND, previous).logits_NE for previous in (first.routing, others)
    )
    assert torch.equal(logits_NE, last.routing.logits_NE)
    assert (others_NE - logits_NE).abs().max() > 1e-3


def test_a_shorter_sequence_is_fine_and_a_longer_one_is_named():
    model = language_model()
    assert model(read(1, 1)).log_probs_BTV.shape == (1, 1, 9)
    with pytest.raises(ValueError, match=r"6 tokens.*context of 5"):
        model(read(1, 6))


@pytest.mark.parametrize(
    "options",
    [{"router": "linear"}, {"router": "cosine"}, {"router": "ac", "ac": ACConfig(gradient=True)}],
    ids=["linear", "cosine", "ac"],
)
def test_the_loss_passes_gradcheck(options):
    """Where M is differentiated too; by the weights of the last layers and by the embedded tokens."""
    model = language_model(**options)
    tokens_BT = read(2, 4, seed=1)
    names = [name for name, _ in model.named_parameters()]

    def loss(*values):
        parameters = dict(zip(names, values, strict=True))
        output = torch.func.functional_call(model, parameters, (tokens_BT,))
        return output.log_probs_BTV, output.routings[-1].probs_NE

    assert torch.autograd.gradcheck(loss, tuple(model.parameters()), fast_mode=True)


# --------------------------------------------------------------------------------- what may matter


@every_causal_router
def test_no_later_token_and_no_other_sequence_matters(options):
    model = trained(language_model(**options))
    tokens_BT = read(4, 5, seed=1)
    expected = model(tokens_BT)
    for kept in (1, 3):
        changed_BT = tokens_BT.clone()
        changed_BT[0, kept:] = (changed_BT[0, kept:] + 1) % 9
        changed_BT[1:] = read(3, 5, seed=2)
        actual = model(changed_BT)
        torch.testing.assert_close(
            actual.log_probs_BTV[0, :kept], expected.log_probs_BTV[0, :kept], rtol=1e-10, atol=1e-12
        )
        for a, b in zip(actual.routings, expected.routings, strict=True):
            assert torch.equal(a.indices_NK[:kept], b.indices_NK[:kept])
        assert (actual.log_probs_BTV[0, kept] - expected.log_probs_BTV[0, kept]).abs().max() > 1e-3


def test_in_the_papers_form_they_matter():
    model = trained(language_model(router="ac"))
    tokens_BT = read(4, 5, seed=1)
    expected_TV = model(tokens_BT).log_probs_BTV[0]
    later_BT, others_BT = tokens_BT.clone(), tokens_BT.clone()
    later_BT[0, 3:] = (later_BT[0, 3:] + 1) % 9
    others_BT[1:] = read(3, 5, seed=2)
    assert (model(later_BT).log_probs_BTV[0, :3] - expected_TV[:3]).abs().max() > 1e-4
    assert (model(others_BT).log_probs_BTV[0] - expected_TV).abs().max() > 1e-4


# -------------------------------------------------------------------------------------- the batches


def windows_seen(task, epochs):
    """First tokens' positions, read off texts whose tokens are their positions."""
    return [batch[:, 0].tolist() for epoch in epochs for batch in task.batches(epoch)]


def counting_task(length=61, context=4, batch_size=3, **options):
    """A text whose tokens are 0, 1, 2, ...: a window tells where it was."""
    text = text_of(list(range(length)))
    corpus = Corpus("counting", text, text, text, length)
    return task_of(corpus, context, batch_size, **options)


def test_batches_are_windows_of_the_text_that_share_their_ends():
    task = counting_task()
    assert (task.num_windows, task.num_batches) == (15, 5)
    for batch_BW in task.batches(0):
        assert batch_BW.shape == (3, 5)
        assert torch.equal(batch_BW, batch_BW[:, :1] + torch.arange(5))
        assert not (batch_BW[:, 0] % 4).any()


@pytest.mark.parametrize(("length", "batch_size"), [(61, 3), (61, 4), (64, 4), (29, 7), (33, 5)])
def test_a_pass_holds_every_window_once(length, batch_size):
    """Also where passes end in the middle of a batch, or of an epoch."""
    task = counting_task(length, batch_size=batch_size)
    starts = [4 * i for i in range((length - 1) // 4)]
    epochs = range(2 + 2 * len(starts) // (task.num_batches * batch_size))
    sequence = [start for batch in windows_seen(task, epochs) for start in batch]
    passes = [sequence[i : i + len(starts)] for i in range(0, len(sequence), len(starts))]
    assert len(passes) > 2
    assert all(sorted(one) == starts for one in passes[:-1])
    assert len({tuple(one) for one in passes[:-1]}) == len(passes) - 1


def test_the_order_depends_on_seed_and_pass_alone():
    whole = windows_seen(counting_task(), range(3))
    torch.manual_seed(1)
    assert windows_seen(counting_task(router="ac"), range(3)) == whole
    assert windows_seen(counting_task(seed=6), range(3)) != whole
    # However a pass is cut into batches and epochs.
    flat = [start for batch in whole for start in batch]
    other = counting_task(batch_size=5, epoch_tokens=20)
    assert [start for batch in windows_seen(other, range(9)) for start in batch] == flat


def test_an_epoch_is_the_same_whatever_came_before():
    whole = windows_seen(counting_task(batch_size=4), range(4))
    each = counting_task(batch_size=4).num_batches
    for epoch in range(4):
        assert windows_seen(counting_task(batch_size=4), [epoch]) == whole[each * epoch : each * (epoch + 1)]


@pytest.mark.parametrize(
    ("epoch_tokens", "num_batches"), [(None, 5), (60, 5), (59, 4), (12, 1), (23, 1), (24, 2), (180, 15)]
)
def test_an_epoch_covers_so_many_tokens(epoch_tokens, num_batches):
    """Rounded down to whole batches of 3 x 4 tokens; also more than the text has."""
    task = counting_task(epoch_tokens=epoch_tokens)
    assert task.num_batches == num_batches == len(list(task.batches(0)))


# ------------------------------------------------------------------------------------------ losses


def test_losses_equal_the_loops_on_a_batch():
    task = task_of(router="ac", objective=RoutedObjective(balance=0.1))
    batch_BW = next(task.batches(0))
    losses = task.losses(batch_BW, 0)
    log_probs_BTV, gates = reference_transformer.language_model(batch_BW[:, :-1], task.model, task.config)
    picked = [log_probs_BTV[b, t, batch_BW[b, t + 1]] for b in range(3) for t in range(4)]
    assert losses["cross_entropy"].item() == pytest.approx(-np.mean(picked), rel=1e-8)
    balance = []
    for gates_NE in gates:
        chosen = reference_transformer.chosen_sets(gates_NE, 2)
        share = [sum(e in own for own in chosen) / (2 * len(chosen)) for e in range(4)]
        balance.append(4 * sum(share[e] * gates_NE[:, e].mean() for e in range(4)))
    assert losses["balance"].item() == pytest.approx(np.mean(balance), rel=1e-8)
    total = losses["cross_entropy"] + 0.1 * losses["balance"]
    assert losses["total"].item() == pytest.approx(total.item(), rel=1e-12)


# ------------------------------------------------------------------------------------------- score


@pytest.mark.parametrize("length", [5, 6, 7, 8, 9, 10, 13, 23])
@pytest.mark.parametrize("context", [1, 3, 4])
def test_the_score_equals_one_window_at_a_time(length, context):
    task = shaken(task_of(context=context, batch_size=2))
    tokens = torch.randint(9, (length,), generator=torch.Generator().manual_seed(length)).tolist()

    def predict(window):
        return task.model(torch.tensor([window])).log_probs_BTV[0].detach().numpy()

    losses_M, right_M = task.score(torch.tensor(tokens))
    expected, right = reference_transformer.predicted_one_by_one(predict, tokens, context)
    assert losses_M.dtype == torch.float64
    np.testing.assert_allclose(losses_M, expected, rtol=1e-9)
    assert right_M.tolist() == right


@pytest.mark.parametrize("length", [0, 1, 4])
def test_a_text_that_is_too_short_to_score_is_named(length):
    with pytest.raises(ValueError, match=f"{length} tokens.*context of 4"):
        task_of().score(torch.zeros(length, dtype=torch.int64))


# ----------------------------------------------------------------------------------------- training


def test_a_text_that_repeats_itself_is_learned():
    text = text_of([0, 1, 2, 3, 4] * 30)  # of another period than the windows, or positions would tell
    task = task_of(Corpus("abc", text, text, text, 5), context=6, batch_size=4, router="ac")

    def measure():
        losses_M, right_M = task.score(text.tokens_N)
        return {"cross_entropy": losses_M.mean().item(), "accuracy": right_M.double().mean().item()}

    assert measure()["cross_entropy"] > 1
    config = TrainConfig(epochs=8, batch_size=4, learning_rate=0.03, precision="float64")
    history, _ = fit(task, config, measure, label="abc")
    assert history.best_cross_entropy < 0.2


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_context_longer_than_a_text_is_named(part):
    corpus = corpus_of(**{"train": 60, part: 8})
    with pytest.raises(ValueError, match=f"context of 8 .*{part}.*'random' has 8"):
        task_of(corpus, context=8, batch_size=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 16}, r"15 windows of 4 tokens.*16"),
        ({"epoch_tokens": 11}, r"2 windows.*3"),
        ({"epoch_tokens": 0}, r"0 windows"),
        ({"epoch_tokens": -1}, r"-1 windows"),
        ({"batch_size": 0}, r"batch_size.*0"),
        ({"batch_size": -2}, r"batch_size.*-2"),
        ({"context": 0}, r"context.*0"),
        ({"objective": RoutedObjective(snnl=SNNLConfig())}, r"snnl"),
    ],
    ids=str,
)
def test_unusable_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        task_of(corpus_of(61), **options)
