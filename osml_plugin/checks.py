"""Embeddings in whatever form people hold them, checked: every place that takes embeddings takes them through here."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .errors import OsmlError

LARGEST = 1e15
"""Largest number that an embedding may hold: squares, and sums of them, stay finite in float32."""
SMALLEST = 1e-12
"""Least size of the largest number of references that are not all zero: below it squares vanish in float32."""


def check_embeddings(values: ArrayLike, what: str = "embeddings") -> Tensor:
    """Embeddings `(N, D)` as a float32 tensor, on the device where they are; N may be 0.

    Args:
        values: a tensor or array of any floating type, byte order and strides, a pandas DataFrame, a Series or list of
            rows, or lists of numbers.
        what: their name in errors.

    Raises:
        OsmlError: for another shape, other types, masked, missing or sparse values, NaN, and numbers beyond `LARGEST`.
    """
    return check_rows(values, what).float()


def check_rows(values: ArrayLike, what: str, *, whole: bool = False) -> Tensor:
    """Check embeddings in the precision in which they are; `whole` takes integers, too."""
    given = _as_tensor(values, what)
    if given.ndim != 2 or given.shape[1] == 0:
        raise OsmlError(f"{what} must be of shape (items, width); got {tuple(given.shape)}")
    if given.is_complex() or given.dtype == torch.bool or not (whole or given.is_floating_point()):
        raise OsmlError(
            f"{what} must be floating point; got {given.dtype}: convert them to float32 if they are numbers"
        )
    check_range(given, what)
    return given


def check_references(values: ArrayLike, what: str = "embeddings") -> Tensor:
    """Check embeddings to fit on. Raises OsmlError, too, where all numbers are below `SMALLEST`, but not zero."""
    given = check_rows(values, what)
    largest = float(torch.stack(given.aminmax()).abs().max()) if given.numel() else 0.0
    if 0 < largest < SMALLEST:
        raise OsmlError(
            f"the largest number of all {what} is {largest:.0e}: float32 cannot square them; multiply all by one "
            "number, those to recognize as well"
        )
    return given.float()


def check_range(values: Tensor, what: str) -> None:
    """Raise OsmlError for NaN, infinity, or a number beyond `LARGEST` in real `values` `(N, …)`, naming the first
    row."""
    if not values.numel():
        return
    low, high = values.aminmax()  # without a tensor of their size; both are NaN where one value is
    if low >= -LARGEST and high <= LARGEST:
        return
    rows = values.flatten(1)
    bad = ~rows.isfinite().all(dim=1)
    if bad.any():
        raise OsmlError(
            f"{int(bad.sum())} of {len(rows)} {what} hold NaN or infinity, the first in row {int(bad.nonzero()[0])}: "
            "leave them out, or look at the network that made them"
        )
    bad = (rows.abs() > LARGEST).any(dim=1)
    raise OsmlError(
        f"{int(bad.sum())} of {len(rows)} {what} hold numbers beyond {LARGEST:.0e}, the first in row "
        f"{int(bad.nonzero()[0])}: float32 cannot square them; divide all by one number, those to recognize as well"
    )


def holds_vectors(items: Any) -> bool:
    """Tell whether `items` are rows of numbers, not images: two axes, or a first element with one axis."""
    n_axes = getattr(items, "ndim", 1)
    return _is_row(next(iter(items), None)) if n_axes == 1 else n_axes == 2


def _is_row(value: Any) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", None) == 1


def _as_tensor(values: Any, what: str) -> Tensor:
    """The numbers of `values` as a tensor that shares their memory where it can."""
    if isinstance(values, Tensor):
        if values.layout != torch.strided:
            raise OsmlError(f"{what} are sparse: pass to_dense() of them")
        return values.detach()
    if isinstance(values, list | tuple) and values and all(isinstance(row, Tensor) for row in values):
        try:
            return torch.stack([row.detach() for row in values])
        except (RuntimeError, TypeError) as error:
            raise _no_table(what, error) from error
    array = _as_array(values, what)
    if array.dtype == object:
        array = _unboxed(array, what)
    if array.dtype.kind == "f":
        # Torch takes neither foreign byte orders nor more than 64 bits.
        array = array.astype(f"f{min(array.dtype.itemsize, 8)}", copy=False)
    elif array.dtype.kind in "iub":
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
    elif array.dtype.kind != "c":
        raise OsmlError(f"{what} must be numbers of shape (items, width); got {array.dtype}")
    array = np.asarray(array, order="C")  # a copy where strides are negative
    try:
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except TypeError as error:
        raise _no_table(what, error) from error


def _as_array(values: Any, what: str) -> np.ndarray:
    if np.ma.is_masked(values):
        raise OsmlError(f"{what} have masked values: fill them in, or leave these items out")
    if hasattr(values, "toarray"):
        raise OsmlError(f"{what} are sparse: pass toarray() of them")
    try:
        return np.asarray(values.to_numpy() if hasattr(values, "to_numpy") else values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_table(what, error) from error


def _unboxed(array: np.ndarray, what: str) -> np.ndarray:
    """Objects `(N, D)`, or `(N,)` rows, as float64."""
    if array.ndim == 1 and len(array) and all(_is_row(row) for row in array):
        rows = [_as_array(row, what) for row in array]
        try:
            array = np.stack(rows)
        except ValueError as error:
            raise _no_table(what, error) from error
        if array.dtype != object:
            return array
    for place, value in np.ndenumerate(array):
        if not isinstance(value, Real) or isinstance(value, bool | np.bool_):
            row = f" in row {place[0]}" if place else ""
            raise OsmlError(f"{what} must be floating point; got {type(value).__name__} ({str(value)[:40]}){row}")
    return array.astype(np.float64)


def _no_table(what: str, error: Exception) -> OsmlError:
    return OsmlError(f"{what} must be numbers of shape (items, width): {' '.join(str(error).split())}")
