"""What discovery is given, checked: each function raises an `OsmlError` that says what was expected."""

from __future__ import annotations

from numbers import Integral

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..checks import check_rows
from ..errors import OsmlError
from ..metrics.checks import check_vector
from ..registry import refusing
from .constraints import Constraints

HIGHEST_SEED = 2**31


def unit_rows(embeddings: ArrayLike | torch.Tensor, name: str) -> np.ndarray:
    """`embeddings` as float32 unit vectors `(N, D)` on the CPU."""
    rows = check_rows(embeddings, name, whole=True).cpu().double().numpy()
    if not len(rows):
        raise OsmlError(f"{name} must be of shape (items, width), at least one item; got {rows.shape}")
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    if not length.all():
        raise OsmlError(f"{name} has rows of zeros, which have no direction: leave out those items")
    return (rows / length).astype(np.float32)


def known_items(
    embeddings: ArrayLike | torch.Tensor | None,
    labels: ArrayLike | torch.Tensor | None,
    in_gallery: ArrayLike | None,
    width: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The known items `(K, width)`, the names of the classes `(C,)`, the index of each item's class `(K,)`, and whether
    it is in the gallery `(K,)`; none of any if none are given."""
    if (embeddings is None) != (labels is None):
        raise OsmlError("known_embeddings and known_labels belong together: give both or neither")
    if embeddings is None:
        if in_gallery is not None:
            raise OsmlError("in_gallery is about known_embeddings: give these, or leave it out")
        return np.empty((0, width), np.float32), np.empty(0, object), np.empty(0, np.int64), np.empty(0, bool)
    known = unit_rows(embeddings, "known_embeddings")
    if known.shape[1] != width:
        raise OsmlError(
            f"known_embeddings are {known.shape[1]} wide, but embeddings {width}: both must come from one model"
        )
    labels = check_vector(labels, "known_labels")
    if len(labels) != len(known):
        raise OsmlError(f"{len(known)} known_embeddings need as many known_labels, but there are {len(labels)}")
    with refusing("known_labels cannot be told apart", "give integers, or strings"):
        names, classes = np.unique(labels, return_inverse=True)
    if any(name != name for name in names.tolist()):
        raise OsmlError("known_labels has NaN: give each of known_embeddings its class, an integer or a string")
    in_gallery = np.ones(len(known), dtype=bool) if in_gallery is None else np.asarray(in_gallery)
    if in_gallery.shape != classes.shape or in_gallery.dtype != np.bool_:
        raise OsmlError(f"in_gallery must be {len(known)} bools, one for each of known_embeddings")
    return known, names.astype(object), classes, in_gallery


def check_wishes(n_classes: int | None, granularity: float | None, links: Constraints, n_items: int) -> None:
    """Whether there can be so many classes of `n_items`, and no granularity says otherwise."""
    if n_classes is None:
        return
    if granularity is not None:
        raise OsmlError("n_classes and granularity both say how fine to group: give one of them")
    whole = isinstance(n_classes, Integral) and not isinstance(n_classes, bool)
    if not (whole and 1 <= n_classes <= n_items):
        raise OsmlError(
            f"n_classes is {n_classes!r}, but must be whole, from 1 to the {n_items} items: give another, or none"
        )
    if n_classes > links.n_blocks:
        raise OsmlError(
            f"n_classes is {n_classes}, but must_link leaves {links.n_blocks}: ask for fewer, or take links back"
        )


def checked_seed(seed: int) -> int:
    """`seed` as an int, 0 … 2³¹."""
    if not isinstance(seed, Integral) or not 0 <= seed <= HIGHEST_SEED:
        raise OsmlError(f"seed must be a whole number from 0 to {HIGHEST_SEED}; got {seed!r}")
    return int(seed)
