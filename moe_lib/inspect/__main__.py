"""A local checkpoint on a text: `python -m moe_lib.inspect MODEL --text FILE --out collapse.html`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moe_lib.inspect import Panel, inspect_moe
from moe_lib.inspect.adapters import reason_of
from moe_lib.inspect.panel import Shown


def windows(ids: torch.Tensor, length: int, size: int) -> Iterator[dict[str, Any]]:
    """Consecutive windows [B, T] of a text; what is left over at the end is not read."""
    length = min(length, len(ids))
    for batch in ids[: len(ids) // length * length].view(-1, length).split(size):
        yield {"input_ids": batch, "attention_mask": torch.ones_like(batch)}


def _checked(options: argparse.Namespace) -> tuple[str, Panel | None]:
    """The text and the earlier panel; what is wrong with the options is said before a model is loaded."""
    if options.out.suffix == ".json":
        raise ValueError(f"--out {options.out} is the page, and a .json is written beside it: name an .html")
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder: name an .html in it")
    if not options.out.parent.is_dir():
        raise ValueError(f"--out {options.out}: there is no folder {options.out.parent}")
    for name in ("length", "batch_size", "max_batches"):
        if (value := getattr(options, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    try:
        text = options.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.text} is not UTF-8: {error}") from error
    try:
        return text, None if options.before is None else Panel.from_json(options.before)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--before {options.before} is no panel: {error}") from error


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
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        print("this needs transformers: pip install moe-collapse[inspect,hf]", file=sys.stderr)
        return 2
    for path in (Path(options.model), options.text):
        if not path.exists():
            print(f"{path} does not exist: give a local checkpoint and a text file", file=sys.stderr)
            return 2
    try:
        text, before = _checked(options)
        if AutoConfig.from_pretrained(options.model).is_encoder_decoder:
            raise ValueError(f"{options.model} is an encoder-decoder: use inspect_moe on batches of your own")
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model)
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        if len(ids) < 2:
            raise ValueError(f"{options.text} holds {len(ids)} tokens: at least two are needed")
        panel = inspect_moe(
            model, windows(ids, options.length, options.batch_size), "tokens",
            causal=options.causal, max_batches=options.max_batches, title=Path(options.model).name,
        )  # fmt: skip
        shown: Shown = panel if before is None else panel.compare(before)
    except (ValueError, OSError, KeyError) as error:
        print(reason_of(error), file=sys.stderr)
        return 2
    panel.to_json(options.out.with_suffix(".json"))
    shown.to_html(options.out)
    print(panel)
    print(f"written: {options.out} and {options.out.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
