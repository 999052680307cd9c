"""One run over several processes: each takes a part of every batch, and the numbers are those of one process.

    python -m moe_study run --profile core --study ac-vision --dataset cifar10 --arm ac --ddp --workers 2
    torchrun --nnodes 2 --nproc-per-node 8 ... -m moe_study run --profile paper ... --ddp

The first form starts torchrun on this machine. A process that dies takes the others with it; all are started
anew and go on from the last checkpoint. Selected runs are trained one after the other. On GPUs each process
has one of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moe_lib.parallel import global_batch
from moe_study import engine, locks
from moe_study.study import Run, StudyError
from moe_study.tasks import Objective
from moe_study.train import History, TrainConfig, fit

RESTARTS = 3


def start(arguments: Sequence[str], processes: int) -> int:
    """Run this module's commands under torchrun on this machine; its exit status."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    line += ["--max-restarts", str(RESTARTS), "-m", "moe_study", *arguments]
    # With the agent's own store shared, workers that are started anew wait for the dead ones' keys.
    outside = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    outside.setdefault("OMP_NUM_THREADS", "1")
    return subprocess.run(line, env=outside, check=False).returncode


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def share(batch: Any, rank: int, size: int) -> Any:
    """A process's part of a batch: a tensor, or several of one length."""
    if isinstance(batch, Tensor):
        return batch.tensor_split(size)[rank]
    return tuple(share(part, rank, size) for part in batch)


class SharedTask:
    """A task whose batches are parts, and whose losses are those of the whole batch."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self.whole = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def batches(self, epoch: int) -> Iterator[Any]:
        rank, size = dist.get_rank(), dist.get_world_size()
        for batch in self.task.batches(epoch):
            rows = len(batch if isinstance(batch, Tensor) else batch[0])
            self.whole = rows < size  # too few for all: then each process takes them all
            yield batch if self.whole else share(batch, rank, size)

    def losses(self, batch: Any, epoch: int) -> dict[str, Tensor]:
        with contextlib.nullcontext() if self.whole else global_batch():
            return self.task.losses(batch, epoch)


@contextlib.contextmanager
def averaged_gradients() -> Iterator[None]:
    """Every optimizer's step inside is on the average of the processes' gradients."""

    def average(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        # Of a weight that no process used there stays none: Adam then leaves it alone.
        used = torch.tensor([weight.grad is not None for weight in weights], dtype=weights[0].dtype)
        used = used.to(weights[0].device)
        dist.all_reduce(used)
        chosen = [weight for weight, number in zip(weights, used.tolist(), strict=True) if number]
        grads = [w.new_zeros(w.shape) if w.grad is None else w.grad for w in chosen]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for weight, part in zip(chosen, flat.split([w.numel() for w in chosen]), strict=True):
            weight.grad = torch.empty_like(weight).copy_(part.view_as(weight))

    handle = register_optimizer_step_pre_hook(average)
    try:
        yield
    finally:
        handle.remove()


def check(wanted: Sequence[Run]) -> None:
    """Raises StudyError: a run cannot be shared out."""
    if refused := [run for run in wanted if isinstance(run.objective, Objective) and run.objective.shuffled]:
        raise StudyError(f"{refused[0].label}: shuffled labels are drawn in one process; leave out --ddp")


def ensure(wanted: Sequence[Run], device: str) -> None:
    """In a process of torchrun: train the runs that have no result file yet, one after the other."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")  # float64 runs on CPUs
    try:
        for run in wanted:
            _ensure_one(run, engine.device_of(run, device))
    finally:
        dist.destroy_process_group()


def _ensure_one(run: Run, device: str) -> None:
    first = dist.get_rank() == 0
    with locks.hold(run.workspace) if first else contextlib.nullcontext():
        there = [run.path.exists()]
        dist.broadcast_object_list(there, src=0)  # one decision for all
        if there[0]:
            return

        def report(epoch: int, history: History) -> None:
            if first:
                accuracy = history.validation["accuracy"][-1]
                print(f"{run.label}: epoch {epoch}/{run.train.epochs}: accuracy {accuracy:.2%}", flush=True)

        # Every process measures, all alike.
        result = engine.execute(run, device, on_epoch=report, train=partial(_fit, first))
        if first:
            engine.record(run, device, {"processes": dist.get_world_size(), **result})
            engine.sweep(run)
        dist.barrier()


def _fit(
    first: bool, task: Any, config: TrainConfig, evaluate: Callable[[], dict[str, float]], *,
    checkpoint: Path, **options: Any,
) -> tuple[History, engine.Selected]:  # fmt: skip
    """`train.fit` with a part of every batch in each process; the first one writes checkpoints."""
    with tempfile.TemporaryDirectory() as scratch, averaged_gradients():
        if not first:  # reads what the first one wrote, writes where nobody looks
            own = Path(scratch) / "checkpoint.pt"
            if checkpoint.exists():
                shutil.copy(checkpoint, own)
            checkpoint = own
        dist.barrier()  # all have read before the first one writes
        return fit(SharedTask(task), config, evaluate, checkpoint=checkpoint, **options)
