"""What a GPU is for: the rows of the other benchmarks at its sizes, how many runs can share it, and what the
Adaptive Clustering (AC) router costs in a whole layer.

    python -m benchmarks workers gpu --device cuda

Rows stand in the order of their worth: a lease may end before the last. `--quick` has tiny sizes that any CPU
runs.

Shapes: N rows, D width, H expert hidden width, E experts.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from benchmarks import experts, snnl, training
from benchmarks.experts import Size
from benchmarks.measure import Contestant, Machine, Row, Step, Work
from moe_lib.models.transformer import TransformerConfig
from moe_lib.models.vision import VisionConfig
from moe_lib.moe import AdaptiveClusteringRouter, LinearRouter, MoE
from moe_study.engine import GPU_THREADS
from moe_study.replay import Replayed
from moe_study.tasks import RoutedObjective, VisionTask

WORKERS = (1, 8, 24)
SECONDS = 3.0  # of each number of workers


def rows(quick: bool = False) -> list[Row]:
    """SNNL, top-k experts, a layer with the AC router, training steps; memory in one process each."""
    few: dict[str, Any] = {"rounds": 3 if quick else 7, "processes": 1}
    if quick:
        return [
            snnl.row(96, [16], torch.bfloat16, **few),
            snnl.row(96, [16], replay=True, **few),
            experts.row(Size(48, 16, 16, 16, 4, 2), torch.bfloat16, **few),
            layer_row(64, 16, 16, 4, **few),
            experts.router_row(64, 8, 4, **few),
            vision_step(8, 8, TransformerConfig(dim=32, depth=2, moe_blocks=(0, 1)), **few),
        ]
    low = torch.bfloat16
    pairs: dict[str, Any] = {"fused": torch.cuda.is_available(), **few}
    return [
        snnl.row(4096, [128], replay=True, goal_time=5, goal_memory=10, **pairs),
        snnl.row(1024, [128], replay=True, **pairs),
        snnl.row(256, [128], replay=True, **pairs),
        snnl.row(16_384, [128], replay=True, **pairs),
        snnl.row(4096, [128], goal_time=5, goal_memory=10, **pairs),
        experts.row(Size(16_384, 512, 512, 512, 16, 2), low, goal_time=1, **few),
        layer_row(16_384, 512, 512, 16, replay=True, goal_time=1 / 1.15, **few),
        training._snnl_step(256, **few),
        vision_step(256, 4, TransformerConfig(dim=192, depth=6, moe_blocks=(2, 3, 4, 5)), **few),
        experts.row(Size(4096, 1024, 1024, 1024, 32, 2), low, goal_time=1, **few),
        snnl.row(1024, [128], **pairs),
        snnl.row(4096, [128], low, **pairs),
        experts.router_row(16_384, 512, 16, **few),
        experts.row(Size(1024, 512, 512, 512, 8, 2), low, goal_time=1, **few),
        experts.row(Size(65_536, 1024, 1024, 1024, 64, 2), low, goal_time=1, **few),
        layer_row(16_384, 512, 512, 16, **few),
        experts.row(Size(4096, 2048, 2048, 2048, 8, 2), low, goal_time=1, **few),
        experts.row(Size(16_384, 512, 512, 512, 16, 2), **few),
        snnl.row(256, [128], **pairs),
        snnl.row(16_384, [128], **pairs),
    ]


def layer_row(
    num_rows: int, dim: int, hidden: int, num_experts: int, replay: bool = False, **options: Any
) -> Row:
    """Forward and backward of a layer of top-2 experts, with the AC router and with a linear one.

    Args:
        replay: as one CUDA graph, as in the study's training; else each operation is launched by Python.
    """

    def build(adaptive: bool, device: str) -> Step:
        torch.manual_seed(0)
        kind = AdaptiveClusteringRouter if adaptive else LinearRouter
        layer = MoE(dim, num_experts, hidden, top_k=2, router=kind(dim, num_experts, 2)).to(device)
        draw = torch.Generator().manual_seed(1)
        x_ND = torch.randn(num_rows, dim, generator=draw).to(device)
        with torch.no_grad():
            previous = LinearRouter(dim, num_experts, 2).to(device)(x_ND)

        def work(x_ND: torch.Tensor) -> dict[str, torch.Tensor]:
            x_ND = x_ND.detach().requires_grad_()
            with torch.autocast(device, torch.bfloat16):
                out_ND, routing = layer(x_ND, previous)
            loss = out_ND.float().square().mean() + routing.probs_NE.square().mean()
            torch.autograd.grad(loss, [x_ND, *layer.parameters()])
            return {}

        replayed = Replayed(work, enabled=replay)
        return lambda: replayed(x_ND)

    contestants = (
        Contestant("AC router", partial(build, True), peer=False),
        Contestant("linear router", partial(build, False)),
    )
    products = Work(gemm_bf16=6.0 * num_rows * 2 * hidden * 2 * dim)
    sizes = {"N": num_rows, "D": dim, "H": hidden, "E": num_experts}
    name = (
        f"MoE layer{' as a graph' * replay}, AC against linear router, N={num_rows} D={dim} E={num_experts}"
    )
    return Row(name, sizes, products, contestants, dtype="bfloat16 products, float32 routers", **options)


def vision_step(batch: int, patch: int, trunk: TransformerConfig, **options: Any) -> Row:
    """From data to update, with crops and flips; the two precisions of our own."""

    def build(bf16: bool, device: str) -> Step:
        dataset = training.random_dataset(training.CIFAR, 8 * batch, device)
        config = VisionConfig(trunk, patch=patch)
        task = VisionTask(
            dataset, config, RoutedObjective(), seed=0, batch_size=batch, augment=True, bf16=bf16
        )
        update = training.replayed(task, training.adam(task, fused=True))
        batches = training.our_batches(task)

        def step() -> None:
            update(*next(batches))

        return step

    contestants = (
        Contestant("ours", partial(build, True), peer=False),
        Contestant("ours, float32", partial(build, False), peer=False),
    )
    tokens = batch * (32 // patch) ** 2
    products = trunk.depth * 4 * trunk.dim**2 + len(trunk.moe_blocks) * 4 * trunk.dim * trunk.expert_hidden
    work = Work(gemm_bf16=6.0 * tokens * products)
    name = f"vision transformer step, patch {patch}, width {trunk.dim}, batch {batch}"
    return Row(name, {"N": batch, "D": trunk.dim}, work, contestants, dtype="bfloat16 or float32", **options)


# ------------------------------------------------------------------------------------ many runs


def workers(
    machine: Machine, counts: Sequence[int] | None = None, seconds: float | None = None, batch: int = 256
) -> list[dict[str, Any]]:
    """Images a second of several runs that train the CNN with SNNL on one device at the same time.

    On a GPU they are threads of a few processes, as the engine has them.
    """
    cores = os.cpu_count() or 1
    on_gpu = machine.device != "cpu"
    counts = counts or (WORKERS if on_gpu else [1])
    seconds = seconds or (SECONDS if on_gpu else 0.2)
    context = multiprocessing.get_context("spawn")
    found = []
    for count in counts:
        threads = min(count, GPU_THREADS) if on_gpu else 1
        processes = min(-(-count // threads), cores)
        barrier, queue = context.Barrier(processes), context.Queue()
        arguments = (machine.device, batch if on_gpu else 8, seconds, threads, barrier, queue)
        own = [context.Process(target=_train_for, args=arguments, daemon=True) for _ in range(processes)]
        for process in own:
            process.start()
        rates = [queue.get(timeout=180) for _ in own]
        for process in own:
            process.join()
        found.append({"workers": count, "processes": processes, "images_per_second": sum(rates)})
        print(f"{count} runs in {processes} processes: {sum(rates):.0f} images a second", flush=True)
    return found


def _train_for(device: str, batch: int, seconds: float, threads: int, barrier: Any, queue: Any) -> None:
    together = threading.Barrier(threads, action=barrier.wait)

    def train(_: int) -> float:
        torch.set_num_threads(1)
        with torch.cuda.stream(torch.cuda.Stream()) if device != "cpu" else contextlib.nullcontext():
            step = training.our_snnl_step(batch, "bfloat16", device)
            for _ in range(4):
                step()
            _settle(device)
            together.wait()
            start, steps = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                step()
                steps += 1
                if steps % 16 == 0:  # else the host would run ahead of the device
                    _settle(device)
            _settle(device)
            return steps * batch / (time.perf_counter() - start)

    with ThreadPoolExecutor(threads) as pool:
        queue.put(sum(pool.map(train, range(threads))))


def _settle(device: str) -> None:
    if device != "cpu":
        torch.cuda.current_stream().synchronize()
