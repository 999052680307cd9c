"""Locks of runs that hold on a shared file system, and the end of work that another process has finished.

A lock is a file with host, pid and heartbeat (`filelock.SoftFileLease`). All it asks of the file system is
that of two processes which create a file one fails: local ones, NFS (3 and later), Lustre, GPFS, CephFS and
BeeGFS do that. `flock` is not used: depending on how NFS or Lustre is mounted, it holds on one node alone.

A holder that died on this machine is noticed at once by its pid, one on another machine by `LEASE` seconds
without a heartbeat, counted on the waiting process's own clock. A lease is no guarantee: a holder that only
fell silent trains on beside its successor. That costs time, never a number: result files are written
atomically, and both processes would write the same.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

LEASE = 30.0  # seconds without a heartbeat after which a holder on another machine counts as dead
LOOK = 0.5  # seconds between two looks at a lock or a result


class Elsewhere(Exception):
    """Another process has written the result: there is nothing left to do."""


@contextlib.contextmanager
def hold(folder: Path, timeout: float = -1, result: Path | None = None) -> Iterator[None]:
    """Hold the lock of a folder.

    Args:
        timeout: seconds to wait for it; below 0: without limit.
        result: what the holder is about to write, if the caller has no use for the lock once it is there.

    Raises:
        filelock.Timeout: it was not free in time.
        Elsewhere: the result appeared while waiting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, path = _lock(folder), folder / "lease"
    deadline = time.monotonic() + timeout if timeout >= 0 else float("inf")
    seen, since = None, time.monotonic()
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except filelock.Timeout:
            if result is not None and result.exists():
                raise Elsewhere(result) from None
            now = time.monotonic()
            if now >= deadline:
                raise
            if (found := _stamp(path)) != seen:
                seen, since = found, now
            elif found is not None and now - since > 2 * LEASE:
                # filelock takes over by exchanging two names, which NFS cannot; there it would wait for ever.
                path.unlink(missing_ok=True)
            time.sleep(min(LOOK, deadline - now))
    try:
        yield
    finally:
        lock.release()


def _lock(folder: Path) -> filelock.BaseFileLock:
    if hasattr(filelock, "SoftFileLease"):
        return filelock.SoftFileLease(folder / "lease", lease_duration=LEASE)
    return filelock.FileLock(folder / "lock")  # an older version, as a bare machine has: it works alone


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes with every heartbeat and every holder."""
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        return found.st_ino, found.st_mtime_ns
    return None


@contextlib.contextmanager
def unless(result: Path) -> Iterator[None]:
    """Raise `Elsewhere` in the block within a second after another process has written `result`.

    Two processes may be at one run: see above. Works in the main thread, where a worker works.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGUSR1"):
        yield
        return
    over = threading.Event()

    def end(number: int, frame: object) -> None:
        if not over.is_set():
            over.set()
            raise Elsewhere(result)

    def watch() -> None:
        while not over.wait(LOOK):
            if result.exists():
                signal.pthread_kill(main, signal.SIGUSR1)
                return

    main = threading.get_ident()
    before = signal.signal(signal.SIGUSR1, end)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        signal.signal(signal.SIGUSR1, before)
