"""Result files: one JSON a run, written last and atomically; that file alone says that a run is done."""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import glob
import hashlib
import json
import math
import os
import platform
import subprocess
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_study.data import ROOT
from moe_study.data.datasets import folder_of

PACKAGES = ("moe_lib", "moe_study", "benchmarks")  # a change in one of them makes a result dirty


class StoreError(RuntimeError):
    """Results cannot be written or read; the message says where and what to do."""


# The epoch whose weights a result's measures describe. A result file that names none was written before the
# rule changed: its measures are those of the lowest validation cross-entropy.
PRIMARY_ENDPOINT = "last_epoch"
ENDPOINTS = (PRIMARY_ENDPOINT, "best_accuracy", "best_cross_entropy")


def primary_endpoint(result: Mapping[str, Any]) -> str:
    """The one that a result file's own measures describe."""
    return result.get("primary_endpoint", "best_cross_entropy")


def at_endpoint(result: dict[str, Any], name: str) -> dict[str, Any]:
    """What a result file holds of one endpoint: every measure of its own primary one, fewer of the others.

    Empty where the file says nothing of it: older files have the task measures of the last epoch and
    everything of the lowest validation cross-entropy.

    Raises:
        ValueError: the endpoint is unknown.
    """
    if name not in ENDPOINTS:
        raise ValueError(f"unknown endpoint {name!r}; known: {', '.join(ENDPOINTS)}")
    if name == primary_endpoint(result):
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
    """`$MOE_RESULTS_DIR`, or `results/` in the project; a relative one is below the project."""
    return folder_of("MOE_RESULTS_DIR", "results")


def use_results_dir(folder: Path) -> None:
    """Make `folder` the results folder of this process and of the workers it starts."""
    os.environ["MOE_RESULTS_DIR"] = str(folder.expanduser().resolve())


def figures_dir() -> Path:
    """`$MOE_FIGURES_DIR`, or `figures/` in the project; a relative one is below the project."""
    return folder_of("MOE_FIGURES_DIR", "figures")


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
    """A temporary file in the same folder, fsync, rename, fsync of the folder.

    Raises:
        StoreError: the folder cannot be written, or the disk is full. Nothing is left behind.
    """
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".part")
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
    with contextlib.suppress(OSError):  # not every file system can; the file is whole either way
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def leftovers(path: Path) -> list[Path]:
    """Temporary files that a killed `write` of this path left. Whoever holds its lock may delete them."""
    return list(path.parent.glob(f".{glob.escape(path.name)}-*.part"))


def explain(error: OSError, folder: Path) -> StoreError:
    """The StoreError for a failed write under `folder`."""
    reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
    return StoreError(
        f"cannot write under {folder} on {platform.node()}: {reason}. Free some space or point "
        "MOE_RESULTS_DIR (results) or MOE_FIGURES_DIR (figures) at a folder that can be written; "
        "finished runs are kept."
    )


def check_writable(folder: Path) -> None:
    """Fail now, and clearly, rather than after the first run has been trained."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # has no name that a kill could leave behind
            probe.write(b"0")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise explain(error, folder) from error


def read(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        StoreError: the path is not a regular file, or does not hold one.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not a JSON number")

    try:
        if not path.is_file():  # reading a FIFO would wait forever
            raise ValueError("not a regular file")
        content = json.loads(path.read_bytes(), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read ({error}); {REMEDY}") from error
    if not isinstance(content, dict):
        raise StoreError(f"{path} does not hold a JSON object; {REMEDY}")
    return content


# -------------------------------------------------------------------------------- files of runs

REMEDY = "delete it and run again, or restore it (`git checkout` if it is committed)"


def content_digest(content: dict[str, Any]) -> str:
    """SHA-256 of a run's content, whatever the order of its keys, "digest" left out."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_run(path: Path, content: dict[str, Any]) -> None:
    """Write a run's file, which names the digest of its own content."""
    content = compact(content)
    write(path, {"digest": content_digest(content), **{k: v for k, v in content.items() if k != "digest"}})


_believed: set[tuple[Path, int, int, str]] = set()  # files checked in this process, until they change


def read_run(path: Path, run_id: str, configuration: dict[str, Any]) -> dict[str, Any]:
    """The file of one run, if it is what it says it is.

    Files written before there was a digest have none; theirs stand in `OLDER`.

    Args:
        run_id: digest of the configuration, which also stands in the file's name.
        configuration: of the run that was planned. A file may lack options that came later: that these
            stand at their defaults is what the equal id says.

    Raises:
        StoreError: the file is damaged, or another run's; says how.
    """
    content = read(path)
    found = path.stat()
    key = (path, found.st_mtime_ns, found.st_size, run_id)
    if key not in _believed:
        if fault := _fault(content, run_id, json.loads(json.dumps(compact(configuration)))):
            raise StoreError(f"result file {path} {fault}; {REMEDY}")
        _believed.add(key)
    return content


def _fault(content: dict[str, Any], run_id: str, configuration: dict[str, Any]) -> str | None:
    """What is wrong with a run's content, or None."""
    missing = [key for key in ("id", "run") if key not in content]
    if missing:
        return f"lacks {', '.join(missing)}"
    if content["id"] != run_id:
        return f"is of another run: it says id {content['id']!r}, its place is that of {run_id!r}"
    if (said := _disagreement(content["run"], configuration, "run")) is not None:
        return f"disagrees with the plan: {said}"
    found = content_digest(content)
    if "digest" not in content and run_id not in _older():
        return "states no digest of its content, as a whole file does"
    if content.get("digest", _older().get(run_id)) not in (found, found[:16]):
        return "was changed after it was written: its content has another digest than was recorded"
    return None


OLDER = ROOT / "results" / "digests.json"  # of the files that do not state their own: 16 digits for each id


@functools.cache
def _older() -> dict[str, str]:
    return json.loads(OLDER.read_bytes()) if OLDER.exists() else {}


# Options that the configurations no longer have, with the value that every recorded run had.
DELETED = {
    "merge_before": [],
    "router_z": 0.0,
    "level": "byte",
    "vocabulary_size": 10_000,
    "schedule": "cosine",
    "momentum": None,
}


def _disagreement(recorded: Any, planned: Any, where: str) -> str | None:
    """The first place where a recorded configuration differs from the planned one."""
    if not (isinstance(recorded, dict) and isinstance(planned, dict)):
        return None if recorded == planned else f"{where} is {recorded!r}, planned is {planned!r}"
    for key, value in recorded.items():
        if key not in planned and key in DELETED and DELETED[key] == value:
            continue
        if key not in planned:
            return f"{where}.{key} is not in the plan"
        if (said := _disagreement(value, planned[key], f"{where}.{key}")) is not None:
            return said
    return None


def of_unknown_origin(results: Iterable[dict[str, Any]]) -> int:
    """How many results do not say which code made them: no commit, not whether the code differed, or more
    than one."""
    return sum(
        result.get("commit") is None or result.get("dirty") is None or "resumed_from" in result
        for result in results
    )


@functools.cache
def provenance() -> dict[str, Any]:
    """Where a number comes from: commit, whether the code differed from it, versions, processor.

    Commit and difference are None where git cannot say. MOE_COMMIT names the commit of a copied folder, of
    which git knows no difference.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                # Git refuses the folder of another owner unless it is named safe. Nothing is run from it.
                ["git", "-c", f"safe.directory={ROOT}", "-c", "core.fsmonitor=false", *arguments],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=20,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    import numpy
    import scipy
    import sklearn
    import torchvision

    named = os.environ.get("MOE_COMMIT")
    ours = git("rev-parse", "--show-prefix") == ""  # else an outer folder's: this one is a copy in it
    changes = git("status", "--porcelain", "--", *PACKAGES) if ours and not named else None
    return {
        "commit": named or (git("rev-parse", "HEAD") if ours else None),
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
