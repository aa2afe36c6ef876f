"""Labels of known items as people hold them: integers of any type, or names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from . import UNKNOWN
from .errors import OsmlError
from .names import class_names, item_labels

HIGHEST = 2**63 - 1


def read_labels(
    labels: Sequence | ArrayLike | torch.Tensor, n_items: int, what: str = "labels", *, unknown: bool = False
) -> list[int] | list[str]:
    """The labels `(N,)` of N items, either all as integers or all as names in canonical form.

    Integers may be of any type, width and byte order, in an array, a tensor, a pandas Series or a list. Everything else
    that could be read in two ways is refused, since a class that is numbered otherwise gives wrong answers in silence.

    Args:
        what: the labels' name, for errors.
        unknown: True also takes the labels of unknown items: -1, '-1' and 'unknown'.

    Raises:
        OsmlError: for another shape or number, floating point, booleans, missing values, a mixture of integers and
            names, negative integers, and names that no class may have.
    """
    values = _listed(labels, n_items, what)
    kinds = {_kind(value) for value in values}
    if kinds <= {"integer"}:
        whole = [int(value) for value in values]
        lowest = UNKNOWN if unknown else 0
        if whole and not lowest <= min(whole) <= max(whole) <= HIGHEST:
            wrong = min(whole) if min(whole) < lowest else max(whole)
            raise OsmlError(
                f"{what} hold {wrong}: classes are numbered from 0 to 2⁶³ − 1, and {UNKNOWN} is the label of what is "
                "unknown; a recognizer is fitted on known items, leave the others out"
            )
        return whole
    if kinds == {"name"}:
        return list((item_labels if unknown else class_names)(str(value) for value in values))
    if kinds == {"integer", "name"}:
        raise OsmlError(f"{what} hold integers and names, expected one kind; write all of them as names")
    row = next(i for i, value in enumerate(values) if _kind(value) not in ("integer", "name"))
    raise OsmlError(f"{what} hold {_shown(values[row])} in row {row}; expected integers or names, {_remedy(values)}")


def class_ids(labels: Iterable[int] | Iterable[str]) -> dict[str, int]:
    """The id of each class by its name: an integer is its own, names are numbered in their order."""
    distinct = sorted(set(labels))
    return {str(label): label if isinstance(label, int) else i for i, label in enumerate(distinct)}


def _listed(labels: Any, n_items: int, what: str) -> list:
    if isinstance(labels, str | bytes | Mapping | set | frozenset):
        raise OsmlError(f"{what} are of type {type(labels).__name__}; expected a list or an array of {n_items}")
    if isinstance(labels, torch.Tensor):
        labels = labels.detach().cpu()
    if not hasattr(labels, "tolist") and not hasattr(labels, "ndim"):
        try:
            values = list(labels)
        except TypeError as error:
            raise OsmlError(f"{what} are {_shown(labels)}; expected a list or an array of {n_items}") from error
        values = [value.item() if isinstance(value, torch.Tensor) and value.ndim == 0 else value for value in values]
        if any(np.ndim(value) for value in values if not isinstance(value, str | bytes)):
            labels = np.empty((len(values), len(values[0]) if np.ndim(values[0]) else 1), dtype=object)
    if (shape := getattr(labels, "shape", None)) is not None:
        if len(shape) != 1:
            how = (
                "one for each embedding: pass one column of them" if hasattr(labels, "columns") else _flattening(shape)
            )
            raise OsmlError(f"{what} are of shape {tuple(shape)}; expected ({n_items},), {how}")
        values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    elif hasattr(labels, "tolist"):
        values = labels.tolist()
    if len(values) != n_items:
        raise OsmlError(f"{len(values)} {what} for {n_items} embeddings: expected one for each")
    return values


def _flattening(shape: Sequence[int]) -> str:
    if len(shape) == 2 and shape[1] == 1:
        return "one for each embedding: pass labels.ravel()"
    if len(shape) == 2:
        return "one for each embedding: pass labels.argmax(axis=1) if they are one-hot, or one column of them"
    return "one for each embedding"


def _kind(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "truth"
    if isinstance(value, int | np.integer):
        return "integer"
    return "name" if isinstance(value, str) else "other"


def _remedy(values: list) -> str:
    if any(_scalar(value) is None for value in values):
        return "none missing: leave these items out"
    if all(isinstance(value, float) and value.is_integer() for value in values):
        return "whole numbers of an integer type: pass labels.astype(int)"
    return "one kind for all items"


def _scalar(value: Any) -> Any:
    """The value, or None where it cannot be compared with itself (pandas' NA)."""
    try:
        return None if bool(value != value) else value
    except (TypeError, ValueError):
        return None


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:59]}…"
