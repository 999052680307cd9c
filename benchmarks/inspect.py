"""The inspector: its alarms on planted faults, and its cost and sight beside its peers.

    python -m benchmarks.inspect calibrate [--out FILE]   thresholds, false alarms and misses
    python -m benchmarks.inspect peers [--out FILE]       needs transformers; and moewatch, if it is there

Shapes: N tokens, D width, E experts, K chosen per token.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_lib.inspect import THRESHOLDS, inspect_moe, watch
from moe_lib.inspect.alarms import AT_MOST, severity

ROOT = Path(__file__).parents[1]
D = 32
FAULTS = ("dead", "collapsed", "dropping", "alike", "blind", "arbitrary")
LEVELS = (0.25, 0.5, 0.75, 1.0)


class Planted(nn.Module):
    """Tokens lie in E clusters, the gate knows them, each expert is a random network; up to a fault.

    dead: half that share of the experts (one at least) is never chosen. collapsed: two experts' scores are
    raised, at level 1 far above all others. dropping: a tenth of that share of the tokens gets no expert.
    alike: experts' weights are mixed with a common one. blind: scores are mixed with a constant. arbitrary:
    that share of the tokens is routed as another token.
    """

    def __init__(self, seed: int, fault: str = "", level: float = 0.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.num_experts = (4, 8, 16)[seed % 3]
        self.top_k = 1 + seed // 3 % 2
        self.draw, self.fault, self.level = draw, fault, level
        self.centres_ED = torch.randn(self.num_experts, D, generator=draw)
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
        return out_ND


def severities(seed: int, fault: str = "", level: float = 0.0) -> dict[str, float]:
    model = Planted(seed, fault, level)
    layer = inspect_moe(nn.Sequential(model), [model.tokens((256, 512, 1024)[seed % 3])])[0]
    return {kind: severity(layer, kind) for kind in THRESHOLDS}


def raised(worse: float, kind: str, limit: float) -> bool:
    return worse >= -limit if kind in AT_MOST else worse > limit


def calibrate(num_healthy: int = 100, num_faulty: int = 12) -> dict[str, Any]:
    """Thresholds in use on seeds that had no part in choosing them, and the healthy blocks' own limits.

    `limit_1_percent`: the threshold that 1 % of the healthy calibration blocks would cross.
    """
    torch.set_num_threads(1)
    calibration = [severities(seed) for seed in range(num_healthy)]
    held_out = [severities(seed) for seed in range(1000, 1000 + num_healthy)]
    result: dict[str, Any] = {"healthy": num_healthy, "faulty_per_level": num_faulty, "alarms": {}}
    for kind, limit in THRESHOLDS.items():
        ordered = sorted(row[kind] for row in calibration if row[kind] == row[kind])
        edge = ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)] if ordered else float("nan")
        known = [row[kind] for row in held_out if row[kind] == row[kind]]
        result["alarms"][kind] = {
            "threshold": limit,
            "limit_1_percent": None if edge != edge else -edge if kind in AT_MOST else edge,
            "false_alarms": sum(raised(v, kind, limit) for v in known) / max(len(known), 1),
            "judged": len(known),
            "missed": {},
        }
    for fault in FAULTS:
        for level in LEVELS:
            found = [severities(2000 + seed, fault, level)[fault] for seed in range(num_faulty)]
            missed = sum(not raised(v, fault, THRESHOLDS[fault]) for v in found) / len(found)
            result["alarms"][fault]["missed"][str(level)] = missed
    return result


# ------------------------------------------------------------------------------------------- peers


def tiny_mixtral(fault: str = "") -> nn.Module:
    """Two layers, 8 experts, K = 2; `fault` planted in every block."""
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            block = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
            gate = block.gate.weight
            gate.mul_(50)
            if fault == "dead experts":
                _never(block, (0, 1))
            elif fault == "look-alike experts":
                for p in block.experts.parameters():
                    if p.ndim > 2:
                        p.copy_(p[:1].expand_as(p))
            elif fault == "blind gate":
                gate.zero_()
            elif fault == "noise":
                _noise(block)
            elif fault == "second choice only":
                _second(block)
    return model


def _never(block: Any, experts: tuple[int, ...]) -> None:
    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        logits_NE, _, _ = output
        return _again(logits_NE.index_fill(1, torch.tensor(experts), -1e4))

    block.gate.register_forward_hook(hook)


def _noise(block: Any) -> None:
    block.gate.register_forward_hook(lambda m, a, output: _again(5 * torch.randn_like(output[0])))


def _second(block: Any) -> None:
    """Expert 0 is every token's second choice and nobody's first: busy, not dead."""

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        logits_NE = output[0].clone()
        logits_NE[:, 0] = logits_NE[:, 1:].topk(2, 1).values.mean(1)
        return _again(logits_NE)

    block.gate.register_forward_hook(hook)


def _again(logits_NE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight_NK, index_NK = logits_NE.float().softmax(1).topk(2, 1)
    return logits_NE, weight_NK / weight_NK.sum(1, keepdim=True), index_NK


PLANTED = ("healthy", "dead experts", "look-alike experts", "blind gate", "noise", "second choice only")


def batches(num: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, 128, (8, 64), generator=draw) for _ in range(num)]


def train(model: nn.Module, steps: int, each: Callable[[int], Any] | None = None) -> float:
    """Seconds per step, the median."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    model.train()
    times = []
    for step, ids in enumerate(batches(steps)):
        start = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if each is not None:
            each(step)
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def resident() -> float:
    """MiB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def ours_sees() -> dict[str, list[str]]:
    found = {}
    for fault in PLANTED:
        panel = inspect_moe(tiny_mixtral(fault), [{"input_ids": ids} for ids in batches(4)], "tokens")
        found[fault] = sorted({alarm.kind for alarm in panel.alarms})
    return found


def moewatch_sees() -> dict[str, list[str]]:
    moewatch = importlib.import_module("moewatch")
    found = {}
    for fault in PLANTED:
        model = tiny_mixtral(fault)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            watcher = moewatch.MoEWatch(model)
            watcher.start()
            train(model, 12, watcher.step)
            alerts = [alert.to_dict() for alert in watcher.get_alert_log()]
            watcher.stop()
        kinds = {
            str(a.get("alert_type", a.get("type", a.get("kind", a.get("metric", "alert"))))) for a in alerts
        }
        found[fault] = sorted(kinds)
    return found


def interleaved(makers: dict[str, Callable[[], float]], rounds: int = 3) -> dict[str, float]:
    """Median over rounds, contestants taking turns, so that a slow minute strikes all of them."""
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds):
        for name, make in makers.items():
            times[name].append(make())
    return {name: statistics.median(values) for name, values in times.items()}


def peers(steps: int = 15) -> dict[str, Any]:
    torch.set_num_threads(1)

    def plain() -> float:
        return train(tiny_mixtral(), steps)

    def every(number: int) -> Callable[[], float]:
        def run() -> float:
            model = tiny_mixtral()
            with watch(model, every=number):
                return train(model, steps)

        return run

    def moewatch_run() -> float:
        moewatch = importlib.import_module("moewatch")
        model = tiny_mixtral()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            watcher = moewatch.MoEWatch(model)
            watcher.start()
            seconds = train(model, steps, watcher.step)
            watcher.stop()
        return seconds

    contestants = {"nothing": plain, "ours, every 10th step": every(10), "ours, every step": every(1)}
    notes, sees = {}, {"ours": ours_sees()}
    try:
        sees["moewatch"] = moewatch_sees()
        contestants["moewatch"] = moewatch_run
    except Exception as error:
        notes["moewatch"] = f"{type(error).__name__}: {error}"
    for name in ("plumb.hook", "innards"):
        try:
            importlib.import_module(name)
            notes[name] = "imports; not run here"
        except Exception as error:
            notes[name] = f"does not import: {type(error).__name__}: {error}"
    seconds = interleaved(contestants)
    base = seconds["nothing"]
    model = tiny_mixtral()
    before = resident()
    with watch(model, every=1):
        train(model, 50)
    return {
        "seconds_per_step": seconds,
        "added_percent": {name: 100 * (value / base - 1) for name, value in seconds.items()},
        "sees": sees,
        "notes": notes,
        "pass": one_pass(),
        "ours_grows_mib_per_50_steps": resident() - before,
        "max_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "torch": torch.__version__,
    }


def one_pass() -> dict[str, float]:
    """Seconds of `inspect_moe` and of the model alone over 16 batches of 512 tokens; MiB of the tables."""
    model, data = tiny_mixtral().eval(), [{"input_ids": ids} for ids in batches(16)]

    def alone() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for batch in data:
                model(**batch)
        return time.perf_counter() - start

    def inspected() -> float:
        start = time.perf_counter()
        inspect_moe(model, data, "tokens")
        return time.perf_counter() - start

    found = interleaved({"model alone": alone, "inspect_moe": inspected})
    state = inspect_moe(model, data, "tokens")[0].state
    held = [v for v in vars(state).values() if isinstance(v, Tensor)]
    return found | {"table_mib_per_block": sum(v.numel() * v.element_size() for v in held) / 2**20}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspect", description=__doc__)
    parser.add_argument("what", choices=("calibrate", "peers"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    result = calibrate() if options.what == "calibrate" else peers()
    folder = {"calibrate": "planted", "peers": "bench"}[options.what]
    out = options.out or ROOT / "results" / folder / "inspect.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
