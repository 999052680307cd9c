"""`watch` neither changes nor stops training, whatever the block does; compiled models; root blocks.

Shapes: N tokens, D width, E experts.
"""

import copy
import gc
import math
import random
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from list_moes import Block, D, E, counts, looked, tokens
from torch import nn
from torch.nn import functional as F

from moe_lib import MoE
from moe_lib.inspect import CollapseCallback, inspect_moe, watch


class Remembers(Block):
    """As many do: a loss, a counter, lists and tensors as attributes, written in the forward pass."""

    def __init__(self):
        super().__init__()
        self.steps, self.log, self.nested = 0, [], {"loads": []}
        self.seen, self.usage = torch.zeros(()), nn.Buffer(torch.ones(E))

    def forward(self, x_ND):
        self.steps += 1
        self.log.append(self.steps)
        self.nested["loads"].append(random.random() + np.random.rand())  # noqa: NPY002
        self.aux_loss = self.gate(x_ND).softmax(-1).mean(0).square().sum()
        self.seen += len(x_ND)
        self.usage.mul_(0.5)
        return super().forward(x_ND) * self.usage.sum()  # the backward pass needs the buffer


def test_attributes_and_training_are_those_without_it():
    found = []
    for watched in (False, True):
        model = nn.Sequential(Remembers(), nn.Linear(D, D), Remembers()).train()
        block = model[2]
        log = block.log
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with watch(model, every=1) if watched else nullcontext():
            model(tokens())
            for step in range(3):
                optimizer.zero_grad()
                output = model(tokens(seed=step))
                (output.square().mean() + block.aux_loss).backward()
                optimizer.step()
        assert block.log is log
        found.append((block.steps, block.log, block.nested, float(block.seen), block.state_dict()))
    assert found[0][:4] == found[1][:4]
    assert found[0][0] == 4
    assert all(torch.equal(value, found[1][4][name]) for name, value in found[0][4].items())


def test_a_forward_of_an_instance_stays():
    model = nn.Sequential(Block()).train()
    for expert in model[0].experts:
        expert.forward = lambda x, own=expert.forward: 3 * own(x)
    before = model(tokens())
    looked(model, tokens())
    assert torch.equal(model(tokens()), before)


class RandomExperts(Block):
    def expert(self):
        return nn.Sequential(nn.Linear(D, D), nn.Dropout(0.3), nn.BatchNorm1d(D))


def test_answers_computed_again_leave_no_trace():
    """Neither on the random numbers nor on the statistics of the experts; such a mixture is judged by the
    answers of one call."""
    found = []
    for watched in (False, True):
        model = nn.Sequential(RandomExperts()).train()
        torch.manual_seed(1)
        with watch(model, every=1) if watched else nullcontext() as w:
            model(tokens())
            output = model(tokens())
        found.append([output, torch.rand(3), *model.state_dict().values()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert w.panel()[0].explanation == "the mixture of what was observed is the block's output"
    assert any("answers are random: the mixture was checked" in note for note in w.panel()[0].notes)
    assert w.panel()[0].state.count_E.tolist() == counts(model[0])


class Dropped(Block):
    def forward(self, x_ND):
        return F.dropout(super().forward(F.dropout(x_ND, 0.3, self.training)), 0.3, self.training)


def test_dropout_after_the_mixture_is_left_out_and_before_it_acts():
    model = nn.Sequential(Dropped(), Dropped())
    panel, output = looked(model, tokens())
    assert [layer.state.count_E.tolist() for layer in panel.layers] == [counts(block) for block in model]
    assert (output == 0).float().mean() > 0.2


class Scaled(Block):
    def forward(self, x_ND):
        return super().forward(x_ND) * torch.linspace(1, 2, D)


def test_what_cannot_be_read_does_not_stop_training():
    panel, _ = looked(nn.Sequential(Block(), Scaled()), tokens())
    assert [layer.name for layer in panel.layers] == ["0"]
    assert "1 (Scaled): the answers are not added up" in panel.unread[0]
    model = nn.Sequential(Scaled()).train()
    with watch(model, every=1) as w:
        with pytest.warns(UserWarning, match="watch records nothing.*Scaled"):
            model(tokens())
        model(tokens())
    assert w.history == []
    plain = nn.Sequential(nn.Linear(D, D)).train()
    with pytest.raises(ValueError, match="no module looks like one"), watch(plain, every=1):
        plain(tokens())


class Changes(Block):
    """From the second step on it is no mixture, or its experts answer nothing, or it has no token."""

    fault = ""

    def forward(self, x_ND):
        if self.fault == "narrow":
            return super().forward(x_ND)[:, :2]
        if self.fault == "transformed":
            return super().forward(x_ND) * torch.linspace(1, 2, D)
        if self.fault == "none":
            return super().forward(x_ND[:0])
        if self.fault == "dropped":
            return torch.zeros_like(x_ND) + self.gate.weight.sum() * 0
        return super().forward(x_ND)


@pytest.mark.parametrize("fault", ["narrow", "transformed", "none", "dropped"])
def test_steps_that_cannot_be_read_are_noted_or_counted(fault):
    model = nn.Sequential(Changes()).train()
    with watch(model, every=1) as w:
        model(tokens())
        model[0].fault = fault
        model(tokens())
        (layer,) = w.panel().layers or [None]
        found = inspect_of(model, fault)
    if fault == "dropped":
        assert layer["dropped"] == 1
        assert found["dropped"] == 0.5
    else:
        assert found.num_tokens == 200
    if fault in ("narrow", "transformed"):
        assert any("a call was not counted" in note for note in found.notes)
        assert any("a call was not counted" in entry for entry in w.panel().unread)


def inspect_of(model, fault):
    """The block's numbers over a batch without the fault and one with it."""

    def batches():
        for model[0].fault in ("", fault):
            yield tokens()

    return inspect_moe(model, batches())[0]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_values_that_are_not_finite_are_not_counted(bad):
    x_ND, model = tokens(), nn.Sequential(Block())
    x_ND[3, 5] = bad
    model(x_ND)
    kept_N = torch.arange(len(x_ND)) != 3
    expected = model[0].chosen[kept_N].flatten().bincount(minlength=E).tolist()
    for panel in (inspect_moe(model, [x_ND]), looked(model, tokens(), x_ND)[0]):
        (layer,) = panel.layers
        assert layer.state.count_E.tolist() == expected
        assert layer.num_tokens == len(x_ND) - 1
        assert "1 tokens with values that are not finite were not counted" in layer.notes
        assert all(math.isfinite(layer[name]) for name in ("input separation", "mixture error", "I(x;E)"))


class Pair(nn.Linear):
    def forward(self, x):
        return {"hidden": super().forward(x), "extra": (x.mean(-1), None)}


class Pairs(Block):
    def expert(self):
        return Pair(D, D)

    def answer(self, e, x_MD):
        answer = self.experts[e](x_MD)
        return answer["hidden"] + 0 * answer["extra"][0][:, None]


def test_experts_that_answer_with_more_than_a_tensor():
    model = nn.Sequential(Pairs())
    panel, _ = looked(model, tokens())
    assert panel[0].state.count_E.tolist() == counts(model[0])


def test_a_model_that_is_a_block():
    for model in (Block(), MoE(D, E, 8, top_k=2)):
        panel, output = looked(model, tokens())
        chosen = model.chosen if isinstance(model, Block) else output[1].indices_NK
        assert panel[0].state.count_E.tolist() == chosen.flatten().bincount(minlength=E).tolist()
        assert not model._forward_hooks
        assert not model._forward_pre_hooks


@pytest.mark.filterwarnings("ignore")  # Dynamo asks tensors for their gradients
@pytest.mark.parametrize("how", ["returned", "in place", "block"])
def test_compiled_models_are_watched_and_not_compiled_again(how):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(nn.Linear(D, D), Block(), nn.Linear(D, 3)).train()
    called = torch.compile(model, backend=backend) if how == "returned" else model
    if how == "block":
        model[1] = torch.compile(model[1], backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
    for step in range(3):
        called(tokens(seed=step)).sum().backward()
    compiled = len(graphs)
    with watch(called, every=3) as w:
        for step in range(7):
            called(tokens(seed=step)).sum().backward()
            if step % 3 == 0:
                assert w.panel()[0].state.count_E.tolist() == counts(model[1])
    called(tokens()).sum().backward()
    assert [row["step"] for row in w.history] == [0, 3, 6]
    assert len(graphs) == compiled > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_model_behind_a_compiled_one_is_not_disturbed():
    torch._dynamo.reset()
    model = nn.Sequential(Block()).train()
    with watch(model, every=1) as w:
        torch.compile(model, backend="eager")(tokens()).sum().backward()
    with pytest.raises(ValueError, match=r"what torch\.compile returned, pass that"):
        w.panel()


def test_activations_are_let_go_after_a_look():
    model, x_ND = nn.Sequential(Block(), MoE(D, E, 8, top_k=2)).train(), tokens(40_000)

    def held():
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = [part for part in gc.get_objects() if type(part) is torch.Tensor]
        return sum(part.numel() for part in parts if part.is_floating_point() and part.numel() > 1000)

    before = held()
    with watch(model, every=1000):
        for batch in (x_ND, x_ND + 1):  # the step after a look, too
            model(batch)
        del batch
        assert held() - before < x_ND.numel() / 10


def test_a_callback_may_be_used_twice():
    model, callback = nn.Sequential(Block()), CollapseCallback(every=1, verbose=False)
    for _ in range(2):
        state = type("State", (), {"global_step": 7, "log_history": []})
        callback.on_train_begin(None, state, None, model=model.train())
        model(tokens())
        callback.on_step_end(None, state, None)
        callback.on_train_end(None, state, None)
        assert callback.watch.history[0]["step"] == 7


def test_a_model_is_left_as_it_was_by_an_inspection():
    model = nn.Sequential(Remembers(), Remembers())
    model(tokens())
    before = copy.deepcopy(model.state_dict()), model[0].log.copy()
    inspect_moe(model, [tokens()])
    assert len(model[0].log) == len(before[1]) + 1  # the pass itself, not the trial before it
    assert model[0].steps == 2


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, inputs_BTD, attention_mask=None):
        return self.block(inputs_BTD.flatten(0, 1))


@pytest.mark.parametrize("mask", [{"full": torch.ones(2, 100)}, object(), torch.full((2, 100), 0.5)])
def test_a_mask_that_cannot_be_read_does_not_stop_training(mask):
    model = Masked().train()
    with watch(model, every=1) as w:
        model(tokens().view(2, 100, D), attention_mask=mask)
    assert w.panel()[0].num_tokens == 200
    odd = isinstance(mask, torch.Tensor)
    assert ("padding is not told apart: attention_mask holds" in str(w.panel()[0].notes)) is odd


def test_thresholds_are_those_asked_for():
    model = Block().train()
    with watch(model, every=1, thresholds={"collapsed": 1.1}) as w:
        model(tokens())
    assert "collapsed" in [alarm.kind for alarm in w.panel().alarms]
    with pytest.raises(ValueError, match="unknown alarms"), watch(model, thresholds={"colapsed": 1}):
        pass


def test_a_block_that_is_not_measured_at_the_last_look_is_drawn():
    history = [{"step": 0.0, "a/AMI": 0.5, "b/AMI": 0.4}, {"step": 1.0, "a/AMI": 0.6}]
    watching = watch(Block())
    with watching as w:
        w.history = history
        assert [line.get_label() for line in w.figure("AMI").axes[0].lines] == ["a", "b"]
