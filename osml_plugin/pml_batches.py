"""Batches and labels as pytorch-metric-learning's trainers and testers take them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import UNKNOWN
from .errors import OsmlError

Level = int | Sequence[int] | str | None


@dataclass(frozen=True)
class BatchReader:
    """Takes a batch apart: `(inputs, labels)`, the labels None where it has none.

    Args:
        getter: PML's `data_and_label_getter`: a batch as the loader gives it in, `(inputs, labels)` out. None: a batch
            is such a pair already, or inputs alone.
        level: PML's `label_hierarchy_level`: the column of labels `(N, L)`, a list of columns, or "all". None: labels
            have one column.

    Labels come out as a tensor `(N,)`, or `(N, L)` for several columns; text as an array of NumPy.

    Raises:
        OsmlError: for a batch that is no such pair, and labels without that column.
    """

    getter: Callable[[Any], tuple[Any, Any]] | None = None
    level: Level = None

    def __call__(self, batch: Any) -> tuple[Any, Tensor | np.ndarray | None]:
        found = batch if self.getter is None else self.getter(batch)
        if self.getter is None and isinstance(found, Tensor):
            return found, None
        if not isinstance(found, list | tuple) or len(found) != 2:
            raise OsmlError(self._no_pair(found))
        inputs, labels = found
        return inputs, None if labels is None else self._column(labels_of(labels))

    def __post_init__(self):
        if self.getter is not None and not callable(self.getter):
            raise OsmlError(f"data_and_label_getter is {self.getter!r}, expected a function of a batch")
        several = isinstance(self.level, Iterable) and not isinstance(self.level, str)
        columns = list(self.level) if several else [] if self.level in (None, "all") else [self.level]
        if not all(isinstance(column, Integral) for column in columns):
            raise OsmlError(f'label_hierarchy_level is {self.level!r}, expected a column, a list of columns, or "all"')

    def _column(self, labels: Tensor | np.ndarray) -> Tensor | np.ndarray:
        level = self.level if isinstance(self.level, Integral | str | None) else list(self.level)
        if labels.ndim == 1 and level in (None, 0, [0], "all"):
            return labels
        width = 1 if labels.ndim == 1 else labels.shape[1]
        if level is None and width > 1:
            raise OsmlError(
                f"labels have {width} columns: name one by label_hierarchy_level, or give class numbers where they are "
                "one-hot"
            )
        if level in (None, "all"):
            return labels[:, 0] if level is None else labels
        if not all(-width <= column < width for column in ([level] if isinstance(level, Integral) else level)):
            raise OsmlError(f"label_hierarchy_level is {level!r}, but the labels have {width} columns, the first is 0")
        return labels[:, level]

    def _no_pair(self, found: Any) -> str:
        source = "batches are" if self.getter is None else "data_and_label_getter returned"
        if isinstance(found, Mapping):
            keys = list(found)
            example = "lambda batch: (" + ", ".join(f"batch[{key!r}]" for key in (keys * 2)[:2]) + ")"
            what = f"dictionaries with the keys {', '.join(map(repr, keys))}"
        elif isinstance(found, list | tuple):
            example, what = f"lambda batch: (batch[0], batch[{max(len(found) - 1, 1)}])", f"{len(found)} values"
        else:
            example, what = "lambda batch: (batch[0], batch[1])", f"of type {type(found).__name__}"
        return f"{source} {what}, expected (inputs, labels): give a data_and_label_getter such as {example}"


def labels_of(labels: Any) -> Tensor | np.ndarray:
    """Labels `(N,)` or `(N, L)` of a batch: a tensor where they are numbers, an array of NumPy where they are text.

    A loader makes of N tuples of labels a list of L columns, and of N texts a list of N.
    """
    if isinstance(labels, Tensor):
        found = labels.detach().cpu()
    else:
        if isinstance(labels, list | tuple) and len(labels) and not isinstance(labels[0], str) and np.ndim(labels[0]):
            labels = np.stack([np.asarray(column) for column in labels], axis=1)
        found = np.asarray(labels)
        if found.dtype.kind == "O" and all(isinstance(label, str) for label in found.flat):
            found = found.astype(str)
        if found.dtype.kind not in "biufUT":
            raise OsmlError(f"labels are of type {found.dtype}, expected numbers or text, one for each item")
        if found.dtype.kind in "biuf":
            found = torch.from_numpy(found.astype(found.dtype.newbyteorder("=")))
    if found.ndim not in (1, 2):
        raise OsmlError(f"labels are of shape {tuple(found.shape)}, expected (items,) or (items, levels)")
    return found


@dataclass(frozen=True)
class KnownClasses:
    """The classes of a reference: its distinct labels, numbered from 0, and the comparison that makes labels equal.

    A label is `UNKNOWN` where it is −1: in any column, or in every column where a comparison of the user's reads them.
    """

    labels: Tensor
    """`(C,)` or `(C, L)`, ascending."""
    compare: Callable[[Tensor, Tensor], Tensor]
    """PML's `label_comparison_fn`: broadcasts over labels, `torch.eq` where the user gave none."""

    @classmethod
    def of(cls, labels: Tensor, compare: Callable[[Tensor, Tensor], Tensor] = torch.eq) -> tuple[KnownClasses, Tensor]:
        """The classes of a reference with these labels `(R,)` or `(R, L)`, and the class `(R,)` of each item, `UNKNOWN`
        for those that are none's. OsmlError for NaN."""
        labels = _checked(labels)
        known = ~_is_unknown(labels, compare)
        distinct, of_known = _distinct(labels[known])
        classes = torch.full((len(labels),), UNKNOWN, device=labels.device)
        classes[known] = of_known
        return cls(distinct, compare), classes

    def truth(self, labels: Tensor, predicted: Tensor) -> Tensor:
        """The true class `(N,)` of items with these labels, as the metrics take it beside the predicted ones `(N,)`.

        An item is known if its label equals one of the classes'. Its class is the predicted one if that equals its own,
        and else C, which is none's. OsmlError for NaN, and for labels of another number of columns.
        """
        labels = _checked(labels)
        if labels.shape[1:] != self.labels.shape[1:]:
            shapes = f"{tuple(labels.shape)} and, of the reference, {tuple(self.labels.shape)}"
            raise OsmlError(f"labels are of the shapes {shapes}: expected the same number of columns")
        # Called in the two ways in which PML calls it: a label against many, and an item's against its neighbors'.
        right = _rows(self.compare(labels[:, None], self.labels[predicted][:, None]))
        distinct, which = _distinct(labels)
        known = [bool(_rows(self.compare(label[None], self.labels)).any()) for label in distinct]
        known = torch.tensor(known, device=labels.device)[which] & ~_is_unknown(labels, self.compare)
        return torch.where(right, predicted, len(self.labels)).where(known, UNKNOWN)


def numbered(*labels: Tensor | np.ndarray) -> list[Tensor]:
    """Labels as numbers: text becomes its place among all distinct texts. OsmlError for text beside numbers."""
    if all(isinstance(some, Tensor) for some in labels):
        return list(labels)
    if any(isinstance(some, Tensor) for some in labels):
        raise OsmlError("labels are text in one data set and numbers in another: expected one kind for all")
    places = np.unique(np.concatenate([some.ravel() for some in labels]), return_inverse=True)[1]
    parts = np.split(places, np.cumsum([some.size for some in labels])[:-1])
    return [torch.from_numpy(part.reshape(some.shape)) for part, some in zip(parts, labels, strict=True)]


def _checked(labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        if labels.isnan().any():
            raise OsmlError(f"labels hold NaN: give each item a number, {UNKNOWN} where it is unknown")
        return labels
    return labels.long()  # since 255 in 8 bits without a sign equals −1 to PyTorch


def _distinct(labels: Tensor) -> tuple[Tensor, Tensor]:
    return labels.unique(dim=0 if labels.ndim > 1 else None, return_inverse=True)


def _is_unknown(labels: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    unknown = labels == UNKNOWN
    if labels.ndim == 1:
        return unknown
    return unknown.any(dim=1) if compare is torch.eq else unknown.all(dim=1)


def _rows(equal: Tensor) -> Tensor:
    """Bool `(N,)` of a comparison `(N, …)`: labels are equal where all their columns are."""
    return equal.reshape(len(equal), -1).bool().all(dim=1)
