"""What goes into a metric, as checked NumPy arrays: one value per item, from NumPy, a list, or torch on any device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from .. import UNKNOWN
from ..errors import OsmlError

Values = ArrayLike | torch.Tensor


def check_vector(values: Values, name: str) -> np.ndarray:
    """`values` as a NumPy array of shape `(N,)`, N at least 1."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        array = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    else:
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise OsmlError(f"{name} must have one value per item, shape (N,), but its rows differ") from error
    if array.ndim != 1:
        raise OsmlError(f"{name} must have one value per item, shape (N,), but has shape {array.shape}")
    if array.size == 0:
        raise OsmlError(f"{name} is empty: give at least one item")
    return array


def check_scores(values: Values) -> np.ndarray:
    """Unknown scores `(N,)` as float64: higher = more unknown. Infinities are scores, NaN is none."""
    scores = check_vector(values, "scores")
    if scores.dtype.kind not in "fiu":
        raise OsmlError(f"scores must be real numbers, not {scores.dtype}: higher = more unknown")
    scores = scores.astype(np.float64, copy=False)
    if np.isnan(scores).any():
        count = np.count_nonzero(np.isnan(scores))
        raise OsmlError(
            f"scores has {count} NaN among {scores.size}: give each item a score (+inf = certainly unknown)"
        )
    return scores


def check_integers(values: Values, name: str, smallest: int) -> np.ndarray:
    """Class labels `(N,)` as int64, none below `smallest`."""
    labels = check_vector(values, name)
    # Not every uint64 fits into an int64.
    if labels.dtype.kind not in "iu" or labels.dtype == np.uint64:
        raise OsmlError(f"{name} must be integers, not {labels.dtype}: give class numbers as int64")
    labels = labels.astype(np.int64, copy=False)
    if labels.min() < smallest:
        raise OsmlError(f"{name} must be at least {smallest}, but has {labels.min()}: classes count from 0")
    return labels


def check_labels(values: Values) -> np.ndarray:
    """True labels `(N,)` as int64: a known class (from 0), or `UNKNOWN`."""
    return check_integers(values, "labels", UNKNOWN)


def check_predictions(values: Values) -> np.ndarray:
    """Closed-set classes `(N,)` as int64, from 0: the nearest known class even of an item that was rejected."""
    return check_integers(values, "predictions", 0)


def check_rejected(values: Values) -> np.ndarray:
    """The decisions `(N,)` as bool: True where the item was called unknown."""
    rejected = check_vector(values, "rejected")
    if rejected.dtype != np.bool_:
        raise OsmlError(f"rejected must be bool, not {rejected.dtype}: True where score > τ")
    return rejected


def check_same_length(**arrays: np.ndarray) -> None:
    """Raise unless all arrays (given by name) have the same number of items."""
    if len({array.size for array in arrays.values()}) > 1:
        sizes = ", ".join(f"{name} {array.size}" for name, array in arrays.items())
        raise OsmlError(f"one value per item is needed in each, but the lengths differ: {sizes}")
