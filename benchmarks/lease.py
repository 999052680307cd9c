"""Use a borrowed GPU for some minutes: tests, benchmark, then as many whole blocks of the study as fit.

    python -m benchmarks.lease OUT --data DATA --commit COMMIT --minutes 9

See benchmarks/README.md. Steps run one after the other, each with a limit and a log of its own. Every minute,
and at the end, what is finished is packed into OUT/archive-<n>.tar.gz, each under 16 MiB and whole at any
moment, so that the machine may vanish at any second.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_study import data, store
from moe_study.data import ROOT, text
from moe_study.engine import GPU_WORKERS

ARCHIVE_BYTES = 15 * 2**20  # may be exceeded by what the compressor still holds, some 100 kB
ARCHIVES = 8  # as many come back
# In order of worth; the engine does a block seed by seed, so that a stopped one still has pairs.
BLOCKS = (
    "core:ac-language-confirm:wikitext2",
    "core:snnl-confirm:cifar100",
    "core:snnl-confirm:fashion_mnist",
    "core:snnl-confirm:cifar10",
    "paper:snnl-confirm:cifar100",
    "paper:snnl-confirm:fashion_mnist",
    "paper:ac-vision:cifar10",
    "paper:ac-language:wikitext2",
    "paper:collapse:domains",
    "paper:crossed:cifar10",
)


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]
    seconds: float  # after which its processes are killed


def steps(arguments: argparse.Namespace) -> Iterator[Step]:
    """Tests, benchmarks, blocks; a block gets what its own limit and the lease leave."""
    python, out, device = sys.executable, arguments.out, arguments.device
    if arguments.tests:
        tests = (python, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-m", "gpu", "tests/gpu")
        yield Step("tests", tests, arguments.tests)
    if arguments.bench:
        for name in ("workers", "gpu"):
            command = (python, "-m", "benchmarks", name, "--device", device, "--out", str(out / "bench"))
            yield Step(name, (*command, *["--quick"] * arguments.quick), arguments.bench)
    workers = arguments.workers or fastest(out / "bench" / "workers.json")
    for block in arguments.blocks:
        profile, study, dataset = block.split(":")
        options = {
            "--profile": profile,
            "--study": study,
            "--dataset": dataset,
            "--device": device,
            "--workers": str(workers),
            "--time-limit": f"{arguments.block:g}",
            "--out": str(out / "results"),
        }
        run = (python, "-m", "moe_study", "run", *(word for pair in options.items() for word in pair))
        # The engine stops by itself between epochs; the kill is for one that hangs.
        yield Step(block.replace(":", "-"), run, arguments.block + 30)


def finished(blocks: Sequence[str], out: Path) -> set[Path]:
    """Results of the blocks that this copy of the project holds, copied to where the blocks look for them."""
    copied = set()
    for block in blocks:
        folder = Path(*block.split(":"))
        for path in (store.results_dir() / folder).glob("*.json"):
            target = out / folder / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            copied.add(Path(shutil.copy2(path, target)))
    return copied


def fastest(path: Path) -> int:
    """As many runs at a time as trained most images a second in the benchmark "workers"."""
    try:
        measured = store.read(path)["workers"]
    except store.StoreError:
        return GPU_WORKERS
    return max(measured, key=lambda one: one["images_per_second"])["workers"]


def run_step(step: Step, logs: Path, deadline: float) -> str:
    """ "done", "failed" or "stopped"; its output is in logs/<name>.log."""
    limit = min(step.seconds, deadline - time.monotonic())
    if limit <= 1:
        return "not begun"
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{step.name}.log").open("w") as log:
        log.write(" ".join(step.command) + "\n")
        log.flush()
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return "done" if process.wait(timeout=limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:  # its workers too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Packer:
    """Packs finished files into archives of bounded size, each renamed into place when it is whole."""

    def __init__(self, out: Path, most: int = ARCHIVE_BYTES) -> None:
        self.out, self.most = out, most
        self.number = 0  # of the archive that is still filled
        self.sealed: set[Path] = set()  # files in full archives
        self.lock = threading.Lock()

    def files(self) -> list[Path]:
        """Result, benchmark and log files, oldest first; nothing half written."""
        found = []
        for folder in ("results", "bench", "logs"):
            for path in sorted((self.out / folder).rglob("*")):
                hidden = any(part.startswith(".") for part in path.relative_to(self.out).parts)
                if path.is_file() and not hidden and path.suffix != ".part":
                    found.append(path)
        return sorted(found, key=lambda path: path.stat().st_mtime)

    def pack(self) -> None:
        with self.lock:
            todo = [path for path in self.files() if path not in self.sealed or path.suffix == ".log"]
            while todo:
                target = self.out / f"archive-{self.number}.tar.gz"
                partial = target.with_suffix(".part")
                packed = []
                with partial.open("wb") as stream, tarfile.open(fileobj=stream, mode="w:gz") as archive:
                    while todo and stream.tell() + todo[0].stat().st_size < self.most:
                        archive.add(todo[0], todo[0].relative_to(self.out))
                        packed.append(todo.pop(0))
                    stream.flush()
                os.replace(partial, target)
                if not packed and todo:  # larger than an archive may be: left out, and said so
                    print(f"{todo[0]} is too large for an archive", file=sys.stderr)
                    self.sealed.add(todo.pop(0))
                elif todo:
                    self.sealed.update(packed)
                    self.number += 1
                    if self.number == ARCHIVES:
                        print(f"more than {ARCHIVES} archives: fetch some now", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "benchmarks.lease", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for results, logs and archives")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole (default 9)")
    parser.add_argument("--data", type=Path, help="data folder (default: MOE_DATA_DIR, or data/)")
    parser.add_argument("--commit", help="of this copy of the project, where there is no git (MOE_COMMIT)")
    parser.add_argument("--workers", type=int, help="runs at a time (default: as many as prove fastest)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tests", type=float, default=60, help="seconds for the tests; 0: none")
    parser.add_argument("--bench", type=float, default=120, help="seconds for each benchmark; 0: none")
    parser.add_argument("--quick", action="store_true", help="a quick benchmark, for a rehearsal")
    parser.add_argument("--block", type=float, default=180, help="seconds for each block")
    parser.add_argument("--blocks", nargs="*", default=[*BLOCKS], help="PROFILE:STUDY:DATASET, in order")
    parser.add_argument("--every", type=float, default=60, help="seconds between archives")
    arguments = parser.parse_args(argv)
    for block in arguments.blocks:
        if block.count(":") != 2:
            parser.error(f"a block is PROFILE:STUDY:DATASET, got {block!r}")
    for variable, value in (("MOE_DATA_DIR", arguments.data), ("MOE_COMMIT", arguments.commit)):
        if value is not None:
            os.environ[variable] = str(value.resolve() if isinstance(value, Path) else value)
    for block in list(arguments.blocks):  # looking for a server takes a minute
        name = block.split(":")[2]
        if not (text if text.is_corpus(name) else data).present(name):
            print(f"{block}: left out, {data.data_dir()} lacks {name}", file=sys.stderr, flush=True)
            arguments.blocks.remove(block)
    if store.provenance()["commit"] is None:
        parser.error("the commit of this copy is unknown: name it with --commit")
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    known = finished(arguments.blocks, arguments.out / "results")
    deadline = time.monotonic() + 60 * arguments.minutes - 10  # ten seconds for the last archive
    packer = Packer(arguments.out)
    packer.sealed |= known
    over = threading.Event()

    def pack_on() -> None:
        while not over.wait(arguments.every):
            packer.pack()

    thread = threading.Thread(target=pack_on, daemon=True)
    thread.start()
    for step in steps(arguments):
        begun = time.monotonic()
        outcome = run_step(step, arguments.out / "logs", deadline)
        print(f"{step.name}: {outcome}, {time.monotonic() - begun:.0f} s", flush=True)
    over.set()
    thread.join()
    packer.pack()
    return 0


if __name__ == "__main__":
    sys.exit(main())
