"""Runs on the embedded digits, short or long, for the tests of the engine.

As a script: python small_runs.py EPOCHS trains `run(EPOCHS)` with the engine, as a batch would.
"""

import sys
from dataclasses import replace

from moe_study import study


def run(epochs: int, arm: str = "snnl", **train: object) -> study.Run:
    planned = study.runs("digits", "snnl", "digits", arm)[1]
    return replace(planned, train=replace(planned.train, epochs=epochs, **train))


def numbers(result: dict) -> dict:
    """A result without what differs between equal runs: time, memory, the commit and the digest of all."""
    # Somebody may commit meanwhile.
    differs = ("wall_seconds", "peak_memory_mb", "digest", "commit", "dirty", "resumed_from")
    kept = {k: v for k, v in result.items() if k not in differs}
    return kept | {"history": {k: v for k, v in result["history"].items() if k != "seconds"}}


if __name__ == "__main__":
    study.ensure([run(int(sys.argv[1]))], workers=1)
