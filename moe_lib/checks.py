"""Checks of arguments: each ends in a ValueError that names the argument, what came, and the remedy.

Values are looked at on the CPU alone (on a GPU a look would wait for the device), and not while torch.compile
or torch.func is at work.

Shapes: N samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

from moe_lib.products import on_host, traced


def readable(x: Tensor) -> bool:
    """Whether a check may look at the values of `x`."""
    return on_host(x) and not traced()


def check_tensor(x: Any, name: str, shape: str, remedy: str = "") -> Tensor:
    """A tensor with as many dimensions as `shape` names, such as "N, D"."""
    if isinstance(x, np.ndarray):
        raise ValueError(f"{name} must be a tensor [{shape}], got a numpy array: use torch.from_numpy")
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor [{shape}], got {type(x).__name__}: use torch.as_tensor")
    if x.ndim != len(shape.split(",")):
        raise ValueError(f"{name} must have shape [{shape}], got {list(x.shape)}{remedy}")
    return x


def check_floating(x: Any, name: str, shape: str, *, finite: bool = True, remedy: str = "") -> Tensor:
    """A real floating-point tensor, finite unless said otherwise."""
    x = check_tensor(x, name, shape, remedy)
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}: convert with .float()")
    if finite and readable(x) and not x.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return x


def check_labels(
    labels: Any,
    count: int,
    num_classes: int | None = None,
    *,
    name: str = "labels",
    like: Tensor | None = None,
) -> Tensor:
    """[N] labels as int64; any integer type, or bool for two classes.

    Args:
        count: N.
        num_classes: labels must lie in 0 to this - 1; None: any integer will do.
        like: labels must be on its device.
    """
    if isinstance(labels, np.ndarray):
        raise ValueError(f"{name} must be a tensor [N] of integers, got a numpy array: use torch.from_numpy")
    if not isinstance(labels, Tensor):
        kind = type(labels).__name__
        raise ValueError(f"{name} must be a tensor [N] of integers, got {kind}: use torch.tensor({name})")
    if labels.ndim == 2 and labels.shape[0] == count and labels.shape[1] > 1:
        raise ValueError(
            f"{name} must have shape [{count}], got {list(labels.shape)}: of one-hot labels take .argmax(1)"
        )
    if labels.ndim != 1 or labels.shape[0] != count:
        raise ValueError(f"{name} must have shape [{count}], one for each row, got {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{name} must be integers, got {labels.dtype}: convert with .long()")
    if like is not None and labels.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {labels.device}: move them with .to")
    labels = labels.long()
    if num_classes is not None and count and readable(labels):
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"{name} must lie in 0 to {num_classes - 1}, got {low} to {high}")
    return labels


def check_count(value: Any, name: str, least: int = 1) -> int:
    """An integer, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer, at least {least}, got {value!r}")
    return int(value)


def check_number(value: Any, name: str, *, least: float = -math.inf, above: bool = False) -> float:
    """A finite number, at least (or above) `least`."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or (above and value == least):
        bound = "" if least == -math.inf else f" {'above' if above else 'at least'} {least:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return float(value)


def check_option(value: Any, name: str, known: Sequence[str]) -> None:
    if value not in known:
        *others, last = map(repr, known)
        raise ValueError(f"unknown {name} {value!r}; use {', '.join(others)} or {last}")


def check_temperature(temperature: Any) -> None:
    """A positive finite number, or a 0-d tensor of one."""
    if isinstance(temperature, Tensor):
        if temperature.ndim:
            raise ValueError(
                f"temperature must be a number or a 0-d tensor, got shape {list(temperature.shape)}"
            )
        if not readable(temperature):
            return
        temperature = temperature.item()
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        kind = type(temperature).__name__
        raise ValueError(f"temperature must be a number or a 0-d tensor, got {kind} {temperature!r}")
    if not 1e-300 <= float(temperature) < math.inf:
        raise ValueError(f"temperature must be positive and finite (1e-300 or more), got {temperature}")
