"""What goes into a metric, checked: one value per item, from NumPy, a list, or torch on any device.

It comes out as a NumPy array, which shares the memory of a CPU tensor, or, where a `device` is named, a tensor there.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from .. import UNKNOWN
from ..errors import OsmlError

Values = ArrayLike | torch.Tensor


Vector = np.ndarray | torch.Tensor


def check_vector(values: Values, name: str, device: torch.device | str | None = None) -> Vector:
    """`values` with shape `(N,)`, N at least 1."""
    if isinstance(values, torch.Tensor):
        array = values.detach().to(device or "cpu")
        if device is None:
            # NumPy has no bfloat16.
            array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    else:
        try:
            array = np.asarray(values)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise OsmlError(
                f"{name} must have one value per item, shape (N,), but its rows differ or are no numbers ({reason})"
            ) from error
    if array.ndim != 1:
        raise OsmlError(f"{name} must have one value per item, shape (N,), but has shape {tuple(array.shape)}")
    if len(array) == 0:
        raise OsmlError(f"{name} is empty: give at least one item")
    return array


def check_scores(values: Values, device: torch.device | str | None = None) -> Vector:
    """Unknown scores `(N,)` as float64: higher = more unknown. Infinities are scores, NaN is none."""
    scores = check_vector(values, "scores", device)
    if _kind(scores) not in "fiu":
        raise OsmlError(f"scores must be real numbers, not {scores.dtype}: higher = more unknown")
    scores = _cast(scores, "float64", device)
    if (nan := scores != scores).any():
        count = int(nan.sum())
        raise OsmlError(
            f"scores has {count} NaN among {len(scores)}: give each item a score (+inf = certainly unknown)"
        )
    return scores


def check_taus(values: Values) -> np.ndarray:
    """Thresholds `(T,)` as float64; infinities are some, NaN is none."""
    taus = check_vector(values, "taus")
    if taus.dtype.kind not in "fiu" or np.isnan(taus).any():
        raise OsmlError(f"taus must be real numbers, none of them NaN, not {taus.dtype}: an item is unknown above τ")
    return taus.astype(np.float64)


def check_integers(values: Values, name: str, smallest: int, device: torch.device | str | None = None) -> Vector:
    """Class labels `(N,)` as int64, none below `smallest`."""
    labels = check_vector(values, name, device)
    # Not every uint64 fits into an int64.
    if _kind(labels) not in "iu" or str(labels.dtype).endswith("uint64"):
        raise OsmlError(f"{name} must be integers, not {labels.dtype}: give class numbers as int64")
    labels = _cast(labels, "int64", device)
    if labels.min() < smallest:
        raise OsmlError(f"{name} must be at least {smallest}, but has {labels.min()}: classes count from 0")
    return labels


def _kind(vector: Vector) -> str:
    """NumPy's letter for the kind of number."""
    dtype = vector.dtype
    if isinstance(dtype, np.dtype):
        return dtype.kind
    return "c" if dtype.is_complex else "f" if dtype.is_floating_point else "b" if dtype == torch.bool else "i"


def _cast(vector: Vector, dtype: str, device: torch.device | str | None) -> Vector:
    if device is None:
        return vector.astype(dtype, copy=False)
    if isinstance(vector, np.ndarray):  # of any strides and byte order, which torch does not take
        vector = torch.from_numpy(np.array(vector, dtype))
    return vector.to(device, getattr(torch, dtype))


def check_labels(values: Values, device: torch.device | str | None = None) -> Vector:
    """True labels `(N,)` as int64: a known class (from 0), or `UNKNOWN`."""
    return check_integers(values, "labels", UNKNOWN, device)


def check_predictions(values: Values, device: torch.device | str | None = None) -> Vector:
    """Closed-set classes `(N,)` as int64, from 0: the nearest known class even of an item that was rejected."""
    return check_integers(values, "predictions", 0, device)


def check_rejected(values: Values) -> np.ndarray:
    """The decisions `(N,)` as bool: True where the item was called unknown."""
    rejected = check_vector(values, "rejected")
    if rejected.dtype != np.bool_:
        raise OsmlError(f"rejected must be bool, not {rejected.dtype}: True where score > τ")
    return rejected


def check_same_length(**arrays: Vector) -> None:
    """Raise unless all arrays (given by name) have the same number of items."""
    if len({len(array) for array in arrays.values()}) > 1:
        sizes = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
        raise OsmlError(f"one value per item is needed in each, but the lengths differ: {sizes}")
