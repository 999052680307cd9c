"""The inspector: its alarms on planted faults, and its cost and sight beside its peers.

    python -m benchmarks.inspect calibrate [--out FILE]   thresholds, false alarms, misses, early warning
    python -m benchmarks.inspect peers [--out FILE]       needs transformers; and the peers, where installed

Times are processor time of one thread, tools in turn with the bare model: ratios within a round.

Shapes: N tokens, D width, E experts, K chosen per token.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import io
import json
import logging
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.measure import origin, ratio
from moe_lib import MoE, load_balancing_loss
from moe_lib.inspect import THRESHOLDS, early_warning, inspect_moe, watch
from moe_lib.inspect.alarms import KINDS, reading
from moe_study import store

D = 32
FAULTS = ("dead", "collapsed", "dropping", "alike", "blind", "arbitrary", "overridden", "unexplained")
LEVELS = (0.25, 0.5, 0.75, 1.0)


class Planted(nn.Module):
    """Tokens lie in E clusters, the gate knows them, each expert is a random network; up to a fault.

    dead: half that share of the experts (one at least) is never chosen. collapsed: two experts' scores are
    raised, at level 1 far above all others. dropping: a tenth of that share of the tokens gets no expert.
    alike: experts' weights are mixed with a common one. blind: scores are mixed with a constant. arbitrary:
    that share of the tokens is routed as another token. overridden: that share of the tokens is served
    against the scores that the gate returned. unexplained: a twentieth of that share of the output's norm is
    added to it.
    """

    def __init__(self, seed: int, fault: str = "", level: float = 0.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.num_experts = (4, 8, 16)[seed % 3]
        self.top_k = 1 + seed // 3 % 2
        self.draw, self.fault, self.level = draw, fault, level
        self.centres_ED = torch.randn(self.num_experts, D, generator=draw)
        self.gate = nn.Identity()  # the scores pass through it, as those of a gate
        self.spread = 0.5 + float(torch.rand((), generator=draw))
        self.preference_E = torch.randn(self.num_experts, generator=draw)
        self.experts = nn.ModuleList(self._expert() for _ in range(self.num_experts))
        if fault == "alike":
            common = self._expert()
            with torch.no_grad():
                for expert in self.experts:
                    for p, q in zip(expert.parameters(), common.parameters(), strict=True):
                        p.copy_((1 - level) * p + level * q)

    def _expert(self) -> nn.Module:
        net = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, D))
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape, generator=self.draw) / 4)
        return net

    def tokens(self, size: int) -> Tensor:
        which = torch.randint(0, self.num_experts, (size,), generator=self.draw)
        return self.centres_ED[which] + self.spread * torch.randn(size, D, generator=self.draw)

    def choose(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        score_NE = (x_ND @ self.centres_ED.T - self.centres_ED.square().sum(1) / 2) / self.spread**2
        score_NE = score_NE / 4 + 0.3 * self.preference_E
        if self.fault == "dead":
            score_NE[:, : max(round(self.level * self.num_experts / 2), 1)] = -1e4
        elif self.fault == "collapsed":
            score_NE[:, 0] += 15 * self.level
            score_NE[:, 1] += 12 * self.level
        elif self.fault == "blind":
            score_NE = (1 - self.level) * score_NE + self.level * 5 * self.preference_E
        elif self.fault == "arbitrary":
            lost_N = torch.rand(len(x_ND), generator=self.draw) < self.level
            other_NE = score_NE[torch.randperm(len(x_ND), generator=self.draw)]
            score_NE = torch.where(lost_N[:, None], other_NE, score_NE)
        score_NE = self.gate(score_NE)
        if self.fault == "overridden":
            against_N = torch.rand(len(x_ND), generator=self.draw) < self.level
            score_NE = torch.where(against_N[:, None], -score_NE, score_NE)
        weight_NK, index_NK = score_NE.softmax(1).topk(self.top_k, 1)
        if self.fault == "dropping":
            weight_NK = weight_NK * (torch.rand(len(x_ND), 1, generator=self.draw) >= self.level / 10)
        return weight_NK, index_NK

    def forward(self, x_ND: Tensor) -> Tensor:
        weight_NK, index_NK = self.choose(x_ND)
        out_ND = torch.zeros_like(x_ND)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(index_NK == e)
            out_ND = out_ND.index_add(0, row, expert(x_ND[row]) * weight_NK[row, slot, None])
        if self.fault == "unexplained":
            extra_ND = torch.randn(x_ND.shape, generator=self.draw)
            out_ND = out_ND + self.level / 20 * extra_ND * (out_ND.detach().norm() / extra_ND.norm())
        return out_ND


def readings(seed: int, fault: str = "", level: float = 0.0) -> dict[str, float]:
    model = Planted(seed, fault, level)
    layer = inspect_moe(nn.Sequential(model), [model.tokens((256, 512, 1024)[seed % 3])])[0]
    return {kind: reading(layer, kind) for kind in KINDS}


def calibrate(num_healthy: int = 100, num_faulty: int = 12) -> dict[str, Any]:
    """Thresholds in use on seeds that had no part in choosing them, and the healthy blocks' own limits.

    `limit_1_percent`: the threshold that 1 % of the healthy calibration blocks would cross.
    """
    torch.set_num_threads(1)
    calibration = [readings(seed) for seed in range(num_healthy)]
    held_out = [readings(seed) for seed in range(1000, 1000 + num_healthy)]
    result: dict[str, Any] = {"healthy": num_healthy, "faulty_per_level": num_faulty, "alarms": {}}
    for kind, limit in THRESHOLDS.items():
        from_best = sorted((row[kind] for row in calibration if row[kind] == row[kind]),
                           reverse=KINDS[kind].low_is_worse)  # fmt: skip
        known = [row[kind] for row in held_out if row[kind] == row[kind]]
        result["alarms"][kind] = {
            "threshold": limit,
            "limit_1_percent": from_best[int(0.99 * len(from_best))] if from_best else None,
            "false_alarms": sum(KINDS[kind].raised(v, limit) for v in known) / max(len(known), 1),
            "judged": len(known),
            "missed": {},
        }
    for fault in FAULTS:
        for level in LEVELS:
            found = [readings(2000 + seed, fault, level)[fault] for seed in range(num_faulty)]
            missed = sum(not KINDS[fault].raised(v, THRESHOLDS[fault]) for v in found) / len(found)
            result["alarms"][fault]["missed"][str(level)] = missed
    result["early_warning"] = {"study": early_study(), "steps": early_steps()}
    return result


def early_score(histories: list[tuple[int, list[float]]], ahead: int = 3) -> dict[str, Any]:
    """How `early_warning` did on effective experts of whole runs; collapsed: they end below half of E.

    A run that is below half of E at its first look cannot be warned of. Lead: looks between the first
    warning and the first look below half.
    """
    score: Counter[str] = Counter()
    leads = []
    for num_experts, values in histories:
        half = num_experts / 2
        below = next((t for t, v in enumerate(values) if v < half), None)
        if below == 0:
            score["below half at the first look"] += 1
            continue
        until = len(values) if below is None else below
        warned = next(
            (t for t in range(1, until) if early_warning(values[: t + 1], num_experts, ahead) < half), None
        )
        if values[-1] < half:
            score["collapsed later"] += 1
            score["warned of"] += warned is not None
            leads += [] if warned is None else [until - warned]
        else:
            score["stayed or recovered"] += 1
            score["false alarms"] += warned is not None
    return {
        "runs": len(histories), "ahead": ahead, **score,
        "lead_median": statistics.median(leads) if leads else None, "lead_most": max(leads, default=None),
    }  # fmt: skip


def early_study() -> dict[str, Any]:
    """On the study's own runs at four experts or more with a gate that learns; one look an epoch."""
    histories = []
    for path in sorted((store.results_dir() / "core").glob("*/*/*.json")):
        stored = json.loads(path.read_text())
        marginal = stored.get("history", {}).get("validation", {}).get("marginal")
        model = stored.get("run", {}).get("model", {})
        if marginal and model.get("num_experts", 0) >= 4 and model.get("gate") == "mlp":
            histories.append((model["num_experts"], [math.exp(v) for v in marginal]))
    return early_score(histories)


def early_steps(num_runs: int = 20, steps: int = 240, every: int = 10) -> dict[str, Any]:
    """On fresh runs on the embedded digits, watched every tenth step: eight experts, one for each image.

    Half of them with a balance loss, half with neither it nor a small learning rate.
    """
    data = load_digits()
    x_ND, y_N = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    histories = []
    for seed in range(num_runs):
        torch.manual_seed(300 + seed)
        moe = MoE(64, 8, 16, out_dim=32, top_k=1)
        model = DigitsModel(moe, nn.Linear(32, 10)).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
        with watch(model, every=every) as w:
            for _ in range(steps):
                some = torch.randint(0, len(x_ND), (128,))
                logits_NC, routing = model(x_ND[some])
                loss = nn.functional.cross_entropy(logits_NC, y_N[some])
                if seed % 2:
                    loss = loss + 0.1 * load_balancing_loss(routing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        histories.append((8, [row["moe/effective experts"] for row in w.history]))
    return early_score(histories) | {"last_effective": [round(values[-1], 2) for _, values in histories]}


class DigitsModel(nn.Module):
    def __init__(self, moe: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.moe, self.head = moe, head

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Any]:
        hidden_ND, routing = self.moe(x_ND)
        return self.head(hidden_ND), routing


# ------------------------------------------------------------------------------------------- peers


def tiny_mixtral(fault: str = "healthy", width: int = 64, num_experts: int = 8) -> nn.Module:
    """Two layers, K = 2; `fault` planted in every block."""
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=width, intermediate_size=width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=num_experts, num_experts_per_tok=2,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            block = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
            gate = block.gate.weight
            gate.mul_(50)
            if fault == "look-alike experts":
                for p in block.experts.parameters():
                    if p.ndim > 2:
                        p.copy_(p[:1].expand_as(p))
            elif fault in GATES:
                block.gate.register_forward_hook(lambda module, args, output: GATES[fault](*output))
    return model


def _second(logits_NE: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits_NE = logits_NE.clone()
    logits_NE[:, 0] = logits_NE[:, 1:].topk(2, 1).values.mean(1)
    return _again(logits_NE)


def _again(logits_NE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight_NK, index_NK = logits_NE.float().softmax(1).topk(2, 1)
    return logits_NE, weight_NK / weight_NK.sum(1, keepdim=True), index_NK


Gate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # of scores, weights and choices
GATES: dict[str, Gate] = {
    "dead experts": lambda logits_NE, *_: _again(logits_NE.index_fill(1, torch.tensor((0, 1)), -1e4)),
    # By a hook: a gate of zeros would learn within a few steps.
    "blind gate": lambda logits_NE, *_: _again(torch.zeros_like(logits_NE)),
    "noise": lambda logits_NE, *_: _again(5 * torch.randn_like(logits_NE)),
    # A fifth of the tokens gets no weight from any expert.
    "dropped tokens": lambda logits_NE, weight_NK, index_NK: (
        logits_NE, weight_NK * (torch.rand(len(weight_NK), 1) >= 0.2), index_NK,
    ),
    # Expert 0 is every token's second choice and nobody's first: busy, not dead.
    "second choice only": _second,
}  # fmt: skip
PLANTED = (
    "healthy", "dead experts", "look-alike experts", "blind gate", "noise", "dropped tokens",
    "second choice only",
)  # fmt: skip


def batches(num: int, size: int = 8, length: int = 64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, 128, (size, length), generator=draw) for _ in range(num)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def train(model: nn.Module, steps: int, each: Callable[[int], Any] = lambda step: None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    model.train()
    for step, ids in enumerate(batches(steps)):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        each(step)


def generate(model: Any, num: int = 2) -> None:
    with torch.no_grad():
        for ids in batches(num, length=32):
            mask = torch.ones_like(ids)
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)


def forward(model: nn.Module, data: list[Tensor]) -> None:
    with torch.no_grad():
        for ids in data:
            model(input_ids=ids)


# Each tool: a context in which the model is watched, and what it says in the end, in a few words.


@contextlib.contextmanager
def _ours(model: nn.Module, say: list[str], every: int = 1) -> Iterator[Callable[[int], Any]]:
    with watch(model, every=every) as w:
        yield lambda step: None
    say += sorted({alarm.kind for alarm in w.panel().alarms})


@contextlib.contextmanager
def _moewatch(
    model: nn.Module, say: list[str], every: int = 1, **options: Any
) -> Iterator[Callable[[int], Any]]:
    moewatch = importlib.import_module("moewatch")
    logging.getLogger("moewatch").setLevel(logging.ERROR)
    with quiet():
        watcher = moewatch.MoEWatch(model, moewatch.WatchConfig(sample_every=every, **options))
        watcher.start()

        def each(step: int) -> None:
            with quiet():
                watcher.step(step)

        yield each
        alerts = [alert.to_dict() for alert in watcher.get_alert_log()]
        watcher.stop()
    last = [a for a in alerts if a["step"] == alerts[-1]["step"] and a["level"] != "INFO"]
    say += moewatch_words([a["message"] for a in last])


def moewatch_words(messages: list[str]) -> list[str]:
    """ "Expert 3 DEAD - utilisation: 0.0%" and the like, counted by kind."""
    kinds: Counter[str] = Counter()
    for message in messages:
        found = re.match(r"Expert \d+ (DEAD|COLD)|Routing entropy (CRITICAL|LOW)|Load imbalance", message)
        if found is None:
            raise ValueError(f"moewatch says something new: {message!r}")
        kinds[f"experts {found[1].lower()}" if found[1] else f"entropy {found[2].lower()}"
              if found[2] else "imbalance"] += 1  # fmt: skip
    return [f"{count} {kind}" for kind, count in sorted(kinds.items())]


@contextlib.contextmanager
def _plumb(model: nn.Module, say: list[str]) -> Iterator[Callable[[int], Any]]:
    counter = importlib.import_module("plumb.counter").ActivationCounter()
    hooks = importlib.import_module("plumb.hook").ProfilingHooks(counter)
    found = hooks.attach(model, top_k=2)
    yield lambda step: None
    hooks.detach()
    counts = counter.snapshot()
    say.append(f"{found} blocks found, {sum(counts.values())} slots counted")


@contextlib.contextmanager
def _innards(model: nn.Module, say: list[str]) -> Iterator[Callable[[int], Any]]:
    innards = importlib.import_module("innards")
    with quiet():
        watcher = innards.observe(model, store=False, features=["moe"])
    try:
        yield lambda step: None
        with quiet():
            watcher.wait(60)
        for record in watcher.records[-1:]:
            data = record.features["moe"]["summary"]
            say.append(f"{data['experts_used_mean']:g} of {data['experts']} used, "
                       f"balance {data['balance_mean']:.2f}")  # fmt: skip
    finally:
        watcher.close()


TOOLS = {"ours": _ours, "moewatch": _moewatch, "plumb-moe": _plumb, "innards": _innards}


def sees(name: str) -> dict[str, str]:
    """What a tool says of each planted fault."""
    found = {}
    for fault in PLANTED:
        model = tiny_mixtral(fault)
        say: list[str] = []
        # It judges what it logs, by default every 100 steps; these are six.
        with TOOLS[name](model, say, **({"log_every": 5} if name == "moewatch" else {})) as each:
            if name == "innards":
                generate(model.eval(), 1)
            else:
                train(model, 6, each)
        found[fault] = ", ".join(say) or "nothing"
    return found


Spread = dict[str, float]  # median, low, high


def added_percent(plain: Callable[[], Any], tool: Callable[[], Any], rounds: int = 7) -> Spread:
    """Processor time that `tool` takes beyond that of `plain`, in turn: median and quartiles over rounds."""
    seconds: dict[Callable[[], Any], list[float]] = {plain: [], tool: []}
    for _ in range(rounds + 1):
        for run, times in seconds.items():
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
    found = ratio(seconds[tool][1:], seconds[plain][1:])  # the first warm up
    return {key: 100 * (value - 1) for key, value in found.items()}


def added(name: str, what: str, steps: int = 100, **options: Any) -> Spread:
    """By a tool to training steps, or to generation, hooks set and results read included."""
    model = tiny_mixtral()

    def run(each: Callable[[int], Any] = lambda step: None) -> None:
        train(model, steps, each) if what == "train" else generate(model.eval())

    def tool() -> None:
        with TOOLS[name](model, [], **options) as each:
            run(each)

    return added_percent(run, tool)


def pass_added(width: int, num_experts: int, num: int, size: int) -> Spread:
    """By `inspect_moe` to a pass over `num` batches, everything included."""
    model = tiny_mixtral("healthy", width, num_experts).eval()
    data = batches(num, size)
    inputs = [{"input_ids": ids} for ids in data]
    return added_percent(lambda: forward(model, data), lambda: inspect_moe(model, inputs, "tokens"))


def resident() -> float:
    """MiB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def grows(name: str | None, steps: int = 50, before: int = 10) -> float:
    """MiB that a process gains over so many steps, watched by a tool or by none."""
    torch.set_num_threads(1)
    model, seen = tiny_mixtral(), []
    with TOOLS[name](model, []) if name else contextlib.nullcontext(lambda step: None) as each:

        def note(step: int) -> None:
            each(step)
            if step + 1 in (before, before + steps):
                seen.append(resident())

        train(model, before + steps, note)
    return seen[1] - seen[0]


def grown(name: str | None, processes: int = 3) -> list[float]:
    """Each in a fresh process: memory that one tool has freed would serve the next."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        return list(pool.map(grows, [name] * processes))


def more(watched: Sequence[float], bare: Sequence[float]) -> Spread:
    """MiB beyond the median of the bare runs: median and extremes."""
    middle = statistics.median(bare)
    return {
        key: kind(watched) - middle
        for key, kind in (("median", statistics.median), ("low", min), ("high", max))
    }


def peers() -> dict[str, Any]:
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "torch": torch.__version__, "load_average": os.getloadavg()[1], "cores": os.cpu_count(),
        "tools": {}, "missing": {},
    }  # fmt: skip
    result["unwatched_mib"] = bare = sorted(grown(None))
    for name, module in (("ours", "moe_lib"), ("moewatch", "moewatch"), ("plumb-moe", "plumb.hook"),
                         ("innards", "innards")):  # fmt: skip
        try:
            importlib.import_module(module)
        except ImportError as error:
            result["missing"][name] = str(error)
            continue
        entry: dict[str, Any] = {"sees": sees(name)}
        if name != "ours":
            entry["version"] = importlib.metadata.version(name)
        reads = len(set(entry["sees"].values())) > 1  # if nothing of this model, its cost says nothing
        if reads and name == "innards":
            entry["generation_percent"] = added(name, "generate")
        elif reads:
            entry["training_percent"] = added(name, "train")
            entry["mib_more"] = more(grown(name), bare)
        if name in ("ours", "moewatch"):
            entry["training_every_10_percent"] = added(name, "train", every=10)
        result["tools"][name] = entry
        print(name, json.dumps(entry), file=sys.stderr, flush=True)
    result["pass_percent"] = {
        "D 64, E 8, 16 batches of 512 tokens": pass_added(64, 8, 16, 8),
        "D 512, E 64, 4 batches of 1024 tokens": pass_added(512, 64, 4, 16),
        "D 512, E 64, 16 batches of 1024 tokens": pass_added(512, 64, 16, 16),
    }
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspect", description=__doc__)
    parser.add_argument("what", choices=("calibrate", "peers"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    result = calibrate() if options.what == "calibrate" else peers()
    folder = {"calibrate": "planted", "peers": "bench"}[options.what]
    result = {**origin(("transformers",)), **result}
    store.write(options.out or store.results_dir() / folder / "inspect.json", result)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
