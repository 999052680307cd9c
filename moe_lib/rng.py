"""Randomness from names: nothing draws from a global stream, so what two arms share starts equal."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def seed_of(*parts: object) -> int:
    """A 63-bit seed for the given names and numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator for the given names and numbers."""
    return torch.Generator().manual_seed(seed_of(*parts))


def initialise(model: nn.Module, seed: int) -> None:
    """Draw every layer's weights from (seed, its name), on the CPU.

    Linear and convolutional layers: Kaiming normal, zero bias. Other layers, subclasses of these among
    them: by their own rule.
    """
    with torch.random.fork_rng(devices=[]):
        for name, module in model.named_modules():
            torch.default_generator.manual_seed(seed_of(seed, name))  # torch's own would seed GPUs as well
            if type(module) in (nn.Linear, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()
