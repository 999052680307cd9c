"""Result files: one JSON a run, written last and atomically; that file alone says that a run is done."""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import platform
import subprocess
import tempfile
import zlib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_study.data import ROOT

PACKAGES = ("moe_lib", "moe_study", "benchmarks")  # a change in one of them makes a result dirty


class StoreError(RuntimeError):
    """Results cannot be written or read; the message says where and what to do."""


# The epoch whose weights a result's measures describe. A result file that names none was written before the
# rule changed: its measures are those of the lowest validation cross-entropy.
PRIMARY_ENDPOINT = "last_epoch"
ENDPOINTS = (PRIMARY_ENDPOINT, "best_accuracy", "best_cross_entropy")


def at_endpoint(result: dict[str, Any], name: str) -> dict[str, Any]:
    """What a result file holds of one endpoint: every measure of its own primary one, fewer of the others.

    Empty where the file says nothing of it: older files have the task measures of the last epoch and
    everything of the lowest validation cross-entropy.

    Raises:
        ValueError: the endpoint is unknown.
    """
    if name not in ENDPOINTS:
        raise ValueError(f"unknown endpoint {name!r}; known: {', '.join(ENDPOINTS)}")
    if name == result.get("primary_endpoint", "best_cross_entropy"):
        return result
    if name == "last_epoch" and "last_epoch" in result:
        return {"task": result["last_epoch"]}
    found = (result.get("endpoints") or {}).get(name, {})
    return result if found.get("same_as") == result.get("primary_endpoint") and found else found


def pack_bits(values_N: Tensor) -> dict[str, Any]:
    """Truth values, eight to a byte, as base64 text beside their number."""
    packed = np.packbits(values_N.cpu().numpy().astype(bool))
    return {"count": len(values_N), "bits": base64.b64encode(packed.tobytes()).decode()}


def pack_counts(values_N: Tensor) -> dict[str, Any]:
    """Counts up to 255: compressed bytes as base64 text, beside their number."""
    packed = zlib.compress(values_N.cpu().numpy().astype(np.uint8).tobytes(), 9)
    return {"count": len(values_N), "counts": base64.b64encode(packed).decode()}


def unpack_bits(packed: dict[str, Any]) -> np.ndarray:
    """[N] truth values of `pack_bits`.

    Raises:
        ValueError: the text holds fewer or more than its count says.
    """
    bits = np.unpackbits(np.frombuffer(base64.b64decode(packed["bits"]), dtype=np.uint8))
    if not packed["count"] <= len(bits) < packed["count"] + 8:
        raise ValueError(f"expected {packed['count']} packed truth values, got {len(bits)}")
    return bits[: packed["count"]].astype(bool)


def results_dir() -> Path:
    """`$MOE_RESULTS_DIR`, or `results/` in the project."""
    return Path(os.environ.get("MOE_RESULTS_DIR") or ROOT / "results").expanduser().resolve()


def use_results_dir(folder: Path) -> None:
    """Make `folder` the results folder of this process and of the workers it starts."""
    os.environ["MOE_RESULTS_DIR"] = str(folder.expanduser().resolve())


def figures_dir() -> Path:
    """`$MOE_FIGURES_DIR`, or `figures/` in the project."""
    return Path(os.environ.get("MOE_FIGURES_DIR") or ROOT / "figures").expanduser().resolve()


def digest(configuration: Any) -> str:
    """Ten hexadecimal digits that name a dataclass's values.

    Fields at their default are left out, so that a new option (whose default is what was done before)
    renames no earlier result. Hence a default, once results exist, is never changed.
    """

    def chosen(value: Any) -> Any:
        if not is_dataclass(value):
            return value
        return {
            f.name: chosen(getattr(value, f.name))
            for f in fields(value)
            if getattr(value, f.name) != f.default
        }

    text = json.dumps(chosen(configuration), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def compact(value: Any) -> Any:
    """Plain JSON values: floats to 6 significant digits, NaN and infinity as null, tuples as lists."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if hasattr(value, "_asdict"):
        return compact(value._asdict())
    if isinstance(value, dict):
        return {str(k): compact(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [compact(v) for v in value]
    return value


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that the file is either there whole or not at all."""
    write_bytes(path, (json.dumps(compact(content), separators=(",", ":")) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """A temporary file in the same folder, fsync, rename.

    Raises:
        StoreError: the folder cannot be written, or the disk is full. Nothing is left behind.
    """
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except OSError as error:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
        raise explain(error, path.parent) from error


def explain(error: OSError, folder: Path) -> StoreError:
    """The StoreError for a failed write under `folder`."""
    reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
    return StoreError(
        f"cannot write under {folder}: {reason}. Free some space or point MOE_RESULTS_DIR (results) or "
        f"MOE_FIGURES_DIR (figures) at a folder that can be written; finished runs are kept."
    )


def check_writable(folder: Path) -> None:
    """Fail now, and clearly, rather than after the first run has been trained."""
    probe = folder / f".writable-{os.getpid()}"
    write_bytes(probe, b"")
    probe.unlink()


def read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"result file {path} cannot be read ({error}); delete it and run again") from error
    if not isinstance(content, dict):
        raise StoreError(f"result file {path} does not hold a run; delete it and run again")
    return content


@functools.cache
def provenance() -> dict[str, Any]:
    """Where a number comes from: commit, whether the code differed from it, versions, processor."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    import numpy
    import scipy
    import sklearn
    import torchvision

    changes = git("status", "--porcelain", "--", *PACKAGES)
    return {
        "commit": os.environ.get("MOE_COMMIT") or git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__.split("+")[0] for m in (torch, torchvision, numpy, scipy, sklearn)},
        },
        "machine": processor(),
    }


def processor() -> str:
    """The name that the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def reset_peak_memory() -> None:
    """Begin `peak_memory_mb` anew, where the system can: a worker trains one run after the other."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Highest resident memory of this process so far, MB (of 10^6 bytes); its GPU memory if it used one."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if platform.system() == "Darwin" else peak * 1024 / 1e6
