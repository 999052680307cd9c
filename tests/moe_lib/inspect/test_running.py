"""Masks, labels, order of tokens, precision, checkpointing, compilation, generation, ranks; training.

Shapes: N tokens, K slots, B sequences, T positions, D width, E experts.
"""

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_lib.inspect import CollapseCallback, Dispatch, early_warning, inspect_moe, watch
from moe_lib.inspect.state import BlockState, Place
from moe_lib.inspect.tamper import default_loss

pytestmark = pytest.mark.slow

B, T, D, E, K = 4, 6, 16, 4, 2


class Block(nn.Module):
    """A list of experts behind a gate, on [B, T, D] or any other order of tokens."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, D)) for _ in range(E)
        )
        self.jitter = nn.Dropout(dropout)
        self.calls = nn.Buffer(torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        x_ND = x.reshape(-1, D)
        weight_NK, index_NK = self.gate(self.jitter(x_ND)).softmax(1).topk(K, 1)
        self.last = index_NK.detach()
        out_ND = torch.zeros_like(x_ND)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(index_NK == e)
            out_ND = out_ND.index_add(0, row, (expert(x_ND[row]) * weight_NK[row, slot, None]).to(x_ND.dtype))
        return out_ND.view(x.shape)


class Model(nn.Module):
    """Embedding, two residual blocks, a head; takes what a decoder of transformers takes."""

    def __init__(self, checkpointed=False, sequence_first=False, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, D)
        self.blocks = nn.ModuleDict({"a": Block(dropout), "b": Block(dropout)})
        self.head = nn.Linear(D, 20)
        self.checkpointed, self.sequence_first = checkpointed, sequence_first

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        if self.sequence_first:
            x = x.transpose(0, 1)
        for block in self.blocks.values():
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return self.head(x.transpose(0, 1) if self.sequence_first else x)


def batch(seed=0, size=B):
    return torch.randint(0, 20, (size, T), generator=torch.Generator().manual_seed(seed))


def counts(panel):
    return [layer.state.count_E.tolist() for layer in panel.layers]


def truth(model, inputs):
    """Counts of a forward pass from what the blocks themselves remember."""
    model(inputs)
    return [block.last.flatten().bincount(minlength=E).tolist() for block in model.blocks.values()]


@pytest.mark.parametrize("sequence_first", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "pair", "per sequence", "entry", "function"])
def test_labels_follow_their_tokens(kind, sequence_first):
    model, ids_BT = Model(sequence_first=sequence_first), batch()
    domain_B = torch.tensor([3, 1, 1, 0])
    label_BT = ids_BT if kind == "tokens" else domain_B[:, None].expand(B, T)
    label_BT = label_BT.clone()
    if kind == "pair":
        label_BT[0, :2] = -100
    given = {
        "tokens": ([{"input_ids": ids_BT}], "tokens"),
        "pair": ([(ids_BT, label_BT)], None),
        "per sequence": ([(ids_BT, domain_B)], None),
        "entry": ([{"input_ids": ids_BT, "domain": domain_B}], "domain"),
        "function": ([ids_BT], lambda inputs: label_BT),
    }[kind]
    panel = inspect_moe(model, *given)
    model(ids_BT)
    for layer, block in zip(panel.layers, model.blocks.values(), strict=True):
        order_N = (label_BT.T if sequence_first else label_BT).flatten().tolist()
        expected: dict[str, list[float]] = {}
        for label, chosen in zip(order_N, block.last.tolist(), strict=True):
            if label >= 0:
                row = expected.setdefault(str(label), [0.0] * E)
                for e in chosen:
                    row[e] += 1
        shares = {c: [m / sum(row) for m in row] for c, row in expected.items()}
        assert {c: pytest.approx(row) for c, row in shares.items()} == layer.class_expert
        assert any("sequence-first" in note for note in layer.notes) == sequence_first


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"labels \(4, 3\) do not fit the tokens of block 'blocks.a'"):
        inspect_moe(Model(), [(batch(), torch.zeros(B, 3, dtype=torch.long))])
    with pytest.raises(ValueError, match="labels must be integers"):
        inspect_moe(Model(), [batch()], lambda inputs: torch.rand(B))
    with pytest.raises(ValueError, match="batches is empty"):
        inspect_moe(Model(), [])
    with pytest.raises(ValueError, match="'domain' names an entry"):
        inspect_moe(Model(), [batch()], "domain")
    with pytest.raises(ValueError, match="unknown alarms"):
        _ = inspect_moe(Model(), [batch()], thresholds={"nothing": 1.0}).alarms


def test_names_of_classes():
    panel = inspect_moe(Model(), [(batch(), torch.tensor([0, 1, 0, 1]))], names=["cats", "dogs"])
    assert set(panel[0].class_expert) == {"cats", "dogs"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision(dtype):
    model = Model().to(dtype)
    panel = inspect_moe(model, [batch()])
    assert counts(panel) == truth(model, batch())
    assert all(layer["mixture error"] < 0.02 for layer in panel.layers)


def test_a_model_is_left_as_it_was():
    model = Model().train()
    model.blocks["a"].eval()
    before = copy.deepcopy(model.state_dict())
    inspect_moe(model, [batch()], causal=True, loss=lambda output, inputs, labels: output.mean())
    assert model.training
    assert not model.blocks["a"].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_in_the_model_leaves_nothing_open():
    model = Model()
    with pytest.raises(IndexError):
        inspect_moe(model, [batch(), batch() + 20])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len(inspect_moe(model, [batch()])) == 2


def test_a_compiled_model_is_read():
    model = Model()
    expected = truth(model, batch())
    assert counts(inspect_moe(torch.compile(model, backend="eager"), [batch()])) == expected
    model.compile(backend="eager")
    assert counts(inspect_moe(model, [batch()])) == expected


def test_decoding_with_a_mask_of_the_whole_sequence():
    """As in generation with a cache: new tokens only, the mask of all."""
    model = Model()
    mask = torch.ones(B, 10)
    mask[0, -1] = 0
    panel = inspect_moe(model, [{"input_ids": batch()[:, :1], "attention_mask": mask}])
    assert panel[0].num_tokens == B - 1


def test_memory_does_not_grow_with_tokens():
    small = inspect_moe(Model(), [batch(i) for i in range(2)], "tokens")[0].state
    large = inspect_moe(Model(), [batch(i, 800) for i in range(20)], "tokens")[0].state

    def size(state):
        return sum(
            v.numel() for k, v in vars(state).items() if isinstance(v, torch.Tensor) and "kept" not in k
        )

    assert size(large) <= size(small) + 2 * 20 * E  # more classes seen, nothing else
    assert len(large.kept.position_M) == 16384 < 20 * 800 * T


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"), [(2**16, 32), pytest.param(10**6, 4, marks=pytest.mark.slow)]
)
def test_memory_beside_the_model(num_tokens, num_blocks):
    """Blocks of 64 experts: the peak of the whole pass is at most 300 MB above the model's own."""
    code = f"""
        import resource, torch
        from torch import nn
        from moe_lib.inspect import inspect_moe
        torch.set_num_threads(1)

        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.randn(64, 8, 1))

            def forward(self, hidden_states, top_k_index, top_k_weights):
                scale_NKD = self.scale[top_k_index].squeeze(-1)
                return hidden_states * (scale_NKD * top_k_weights[..., None]).sum(1)

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate, self.experts = nn.Linear(8, 64), Experts()

            def forward(self, x_ND):
                weight_NK, index_NK = self.gate(x_ND).softmax(1).topk(2, 1)
                return self.experts(x_ND, index_NK, weight_NK)

        model = nn.Sequential(*(Block() for _ in range({num_blocks}))).eval()
        data = [torch.randn(8192, 8) for _ in range(-(-{num_tokens} // 8192))]
        labels = torch.randint(0, 50_000, (8192,))
        with torch.no_grad():
            model(data[0])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        panel = inspect_moe(model, ((batch, labels) for batch in data))
        assert len(panel) == {num_blocks} and panel[0].num_tokens == 8192 * len(data)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 300, f"{done.stdout} MiB"


def test_importing_takes_nothing_heavy():
    code = "import sys, moe_lib.inspect; print([m for m in {} if m in sys.modules])".format(
        ["scipy", "sklearn", "pandas", "matplotlib", "seaborn", "transformers"]
    )
    with_torch = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert with_torch.strip() == "[]"


def test_a_token_without_any_weight_is_dropped():
    state = BlockState(3)
    weights_NK = torch.tensor([[0.5, 0.5], [0.0, 0.0], [1.0, 0.0]])
    state.update(Dispatch(torch.randn(3, 2), torch.tensor([[0, 1], [1, 2], [2, 0]]), weights_NK), Place())
    assert float(state.finish().dropped) == 1
    assert state.count_E.tolist() == [2, 1, 1]


def test_saturation_is_the_overlap_of_the_same_tokens():
    before, after = Model(), Model()
    with torch.no_grad():
        after.blocks["b"].gate.weight.copy_(torch.randn(E, D))
    data = [batch(i) for i in range(3)]
    found = inspect_moe(after, data).compare(inspect_moe(before, data)).saturation()
    shared = []
    for inputs in data:
        before(inputs), after(inputs)
        old, new = before.blocks["b"].last, after.blocks["b"].last
        shared += [len(set(o) & set(n)) / K for o, n in zip(old.tolist(), new.tolist(), strict=True)]
    assert found[0].value == 1
    assert found[1].value == pytest.approx(sum(shared) / len(shared))


# ------------------------------------------------------------------------------------- tampering


def test_costs_are_those_of_the_tampered_model():
    model, inputs = Model(), batch()
    panel = inspect_moe(model, [inputs], causal="every expert")
    model.requires_grad_(False)
    clean = default_loss(model(inputs), inputs, None)
    assert panel.loss == pytest.approx(float(clean))
    first = panel[0]
    order = first.state.weight_E.argsort(descending=True).tolist()
    swapped = copy.deepcopy(model)
    experts = swapped.blocks["a"].experts
    experts[order[0]], experts[order[1]] = experts[order[1]], experts[order[0]]
    cost = float(default_loss(swapped(inputs), inputs, None) - clean)
    assert first["cost of swapping"] == pytest.approx(cost, abs=1e-5)

    class Without(nn.Module):
        """The block without expert e, the other weight scaled to the same sum."""

        def __init__(self, block, e):
            super().__init__()
            self.block, self.e = block, e

        def forward(self, x):
            x_ND = x.reshape(-1, D)
            weight_NK, index_NK = self.block.gate(x_ND).softmax(1).topk(K, 1)
            kept_NK = weight_NK.masked_fill(index_NK == self.e, 0)
            kept_NK = kept_NK * weight_NK.sum(1, keepdim=True) / kept_NK.sum(1, keepdim=True)
            answers_NED = torch.stack([f(x_ND) for f in self.block.experts], 1)
            chosen_NKD = answers_NED.gather(1, index_NK[..., None].expand(-1, -1, D))
            return (kept_NK[..., None] * chosen_NKD).sum(1).view(x.shape)

    for e in range(E):
        without = copy.deepcopy(model)
        without.blocks["a"] = Without(without.blocks["a"], e)
        cost = float(default_loss(without(inputs), inputs, None) - clean)
        assert first.dropped_E[e] == pytest.approx(cost, abs=1e-5)


def test_a_block_that_is_the_whole_model_is_tampered_with():
    panel = inspect_moe(
        Block(), [torch.randn(9, D)], causal=True, loss=lambda output, *_: output.square().mean()
    )
    assert panel[0].name == ""
    assert panel[0]["cost of permuting"] == panel.loss_permuted != 0


def test_tampering_takes_batches_of_any_size():
    data = [(batch(size=4), torch.arange(4)), (batch(1, size=2), torch.arange(2))]
    panel = inspect_moe(
        Model(), data, causal=True, loss=lambda output, inputs, labels: output.square().mean()
    )
    assert abs(panel[0]["cost of dropping"]) > 0


def test_permuting_costs_nothing_where_experts_are_copies():
    model = Model()
    for block in model.blocks.values():
        for expert in block.experts[1:]:
            expert.load_state_dict(block.experts[0].state_dict())
        nn.init.zeros_(block.gate.weight)
        nn.init.zeros_(block.gate.bias)
    panel = inspect_moe(model, [batch()], causal=True)
    assert all(abs(layer["cost of permuting"]) < 1e-5 for layer in panel.layers)
    assert abs(panel.loss_permuted) < 1e-5


# -------------------------------------------------------------------------------------- training


def train(model, steps, watching=None, seed=0):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    torch.manual_seed(seed)
    for step in range(steps):
        optimizer.zero_grad()
        loss = default_loss(model(batch(step)), batch(step), None)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_watching_does_not_change_training(checkpointed):
    """Weights, buffers and random numbers are bit for bit those without it; each step counted once."""
    plain, watched = Model(checkpointed, dropout=0.3), Model(checkpointed, dropout=0.3)
    train(plain, 5)
    with watch(watched, every=2) as w:
        train(watched, 5)
    assert all(
        torch.equal(v, plain.state_dict()[k]) for k, v in watched.state_dict().items() if "calls" not in k
    )
    assert [row["step"] for row in w.history] == [0, 2, 4]
    assert w.panel()[0].num_tokens == B * T
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.modules())


def test_between_looks_there_are_no_hooks_on_blocks():
    model = Model()
    with watch(model, every=100) as w:
        train(model, 3)
        assert len(w.history) == 1
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if m is not model)


def test_watch_writes_lines_and_numbers(tmp_path):
    model = Model()
    with watch(model, every=2, path=tmp_path / "log.jsonl") as w:
        assert w.log() == {}
        train(model, 4)
        numbers = w.log(step=7)
    assert numbers["step"] == 7
    assert 1 <= numbers["blocks.a/effective experts"] <= E
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2]
    with pytest.raises(ValueError, match="every must be at least 1"), watch(model, every=0):
        pass


def test_the_slope_warns_before_collapse():
    falling = [8.0, 7.4, 6.8, 6.1, 5.5]
    assert early_warning(falling, 8, ahead=4) < 4 < early_warning(falling, 8, ahead=0)
    assert early_warning([8.0] * 5, 8, ahead=50) == pytest.approx(8)
    assert early_warning([3.0, 2.0], 8, ahead=50) == 1


def test_callback_logs_beside_the_loss(capsys):
    model, callback = Model(), CollapseCallback(every=2)
    for block in model.blocks.values():  # collapsed from the start
        with torch.no_grad():
            block.gate.bias.copy_(torch.tensor([50.0, 40.0, 0.0, 0.0]))
    state = SimpleNamespace(global_step=0, log_history=[{"loss": 1.0}])
    callback.on_init_end(None, state, None)  # an event that it does not need
    callback.on_train_begin(None, state, None, model=model)
    for step in range(3):
        train(model, 1)
        state.global_step = step + 1
        callback.on_step_end(None, state, None)
    logs = {"loss": 1.0}
    callback.on_log(None, state, None, logs=logs)
    callback.on_train_end(None, state, None)
    assert logs["moe/blocks.a/never chosen"] == 2
    assert state.log_history[-1]["moe/blocks.a/never chosen"] == 2
    assert "2 of 4 experts serve no token" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- ranks


def test_ranks_get_the_totals(tmp_path):
    code = f"""
        import sys, json, torch, torch.distributed as dist
        sys.path[:0] = {[str(Path(__file__).parent)]!r}
        from test_running import Model, batch, counts
        from moe_lib.inspect import inspect_moe
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
        print(json.dumps(counts(inspect_moe(Model(), [batch(rank)]))))
        dist.destroy_process_group()
    """
    started = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(rank)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    answers = [json.loads(process.communicate(timeout=900)[0].splitlines()[-1]) for process in started]
    assert answers[0] == answers[1] == counts(inspect_moe(Model(), [batch(0), batch(1)]))
