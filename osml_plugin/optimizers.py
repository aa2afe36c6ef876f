"""Any torch optimizer by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .errors import unknown_name
from .registry import check_arguments, refusing

_OTHER_STEP = {"Optimizer", "LBFGS", "SparseAdam"}  # these need a closure, or sparse gradients


def names() -> list[str]:
    return [n for n in torch.optim.__all__ if isinstance(getattr(torch.optim, n), type) and n not in _OTHER_STEP]


def check(name: str, args: Mapping[str, Any]) -> None:
    """OsmlError for an optimizer or an argument that does not exist."""
    if name not in names():
        raise unknown_name("optimizer", name, names())
    allowed = [p for p in inspect.signature(getattr(torch.optim, name)).parameters if p != "params"]
    check_arguments("optimizer", name, args, allowed)


def build(name: str, args: Mapping[str, Any], parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    check(name, args)
    with refusing(f"optimizer '{name}' refuses its arguments"):
        return getattr(torch.optim, name)(parameters, **args)
