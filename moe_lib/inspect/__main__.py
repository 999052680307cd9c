"""A local checkpoint on a text: `python -m moe_lib.inspect MODEL --text FILE --out collapse.html`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moe_lib.inspect import Panel, inspect_moe


def windows(ids: torch.Tensor, length: int, size: int) -> Iterator[dict[str, Any]]:
    """Consecutive windows [B, T] of a text; what is left over at the end is not read."""
    length = min(length, len(ids))
    for batch in ids[: len(ids) // length * length].view(-1, length).split(size):
        yield {"input_ids": batch, "attention_mask": torch.ones_like(batch)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_lib.inspect", description=__doc__)
    parser.add_argument("model", help="folder of a checkpoint saved by transformers")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--out", type=Path, default=Path("collapse.html"), help="the page; beside it a .json")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-batches", type=int, default=16)
    parser.add_argument("--causal", action="store_true", help="also run with tampered routing")
    parser.add_argument("--before", type=Path, help="the .json of an earlier page, to compare with")
    options = parser.parse_args(argv)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        print("this needs transformers: pip install moe-collapse[inspect,hf]", file=sys.stderr)
        return 2
    for path in (Path(options.model), options.text):
        if not path.exists():
            print(f"{path} does not exist: give a local checkpoint and a text file", file=sys.stderr)
            return 2
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)[
        "input_ids"
    ][0]
    if len(ids) < 2:
        print(f"{options.text} holds {len(ids)} tokens: at least two are needed", file=sys.stderr)
        return 2
    try:
        panel = inspect_moe(
            model, windows(ids, options.length, options.batch_size), "tokens",
            causal=options.causal, max_batches=options.max_batches, title=Path(options.model).name,
        )  # fmt: skip
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    panel.to_json(options.out.with_suffix(".json"))
    if options.before is not None:
        panel.compare(Panel.from_json(options.before)).to_html(options.out)
    else:
        panel.to_html(options.out)
    print(panel)
    print(f"written: {options.out} and {options.out.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
