"""Likeness of items: which are near-copies of one another, and whether a model has seen an item before.

Identity is of what a network sees. A picture that is saved again, in another format or size or with other metadata, has
other bytes and nearly the same pixels, so that bytes tell nothing; a signature of its pixels does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..copies import copy_sets, radii, representatives
from ..neighbors import NeighborIndex
from .items import Items

SIDE = 16
"""Pixels of a side to which an image is averaged."""
BRIGHTNESS, COLOR = 8, 4
"""Frequencies of a side that are kept of an image's brightness, and of each of its two color differences."""
EXACT_UP_TO = 20_000
"""Seen items up to which an item is compared with all."""
NEAREST = 4
"""Seen items that an item is compared with: the nearest one may have a smaller radius than the next."""
WIDTH = BRIGHTNESS**2 + 2 * COLOR**2
"""Numbers in a signature."""

_PLACES = np.pi * (2 * np.arange(SIDE) + 1) / (2 * SIDE)
_COSINES = np.sqrt(2 / SIDE) * np.cos(np.outer(np.arange(BRIGHTNESS), _PLACES))
_COSINES[0] /= np.sqrt(2)
# ITU-R BT.601, as JPEG has it.
_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def image_signature(image: Image.Image) -> np.ndarray:
    """Low frequencies `(WIDTH,)` float32 of an upright 8-bit image, "L" or "RGB": the discrete cosine transform (type
    II, orthonormal) of its 16 x 16 averages, 8 x 8 frequencies of brightness and 4 x 4 of each color difference.

    The Euclidean distance of two signatures is about that of the averages, in units of pixel values.
    """
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    planes = np.tensordot(_TO_YCC, small, axes=(1, 2)) if small.ndim == 3 else [small, *np.zeros((2, SIDE, SIDE))]
    kept = (BRIGHTNESS, COLOR, COLOR)
    frequencies = [_COSINES[:n] @ plane @ _COSINES[:n].T for n, plane in zip(kept, planes, strict=True)]
    return np.concatenate([f.ravel() for f in frequencies]).astype(np.float32)


def embedding_signatures(embeddings: np.ndarray) -> np.ndarray:
    """Rows `(N, D)` as they are, or projected to `WIDTH` numbers where they are wider, which keeps their distances
    (Johnson & Lindenstrauss 1984)."""
    width = embeddings.shape[1]
    if width <= WIDTH:
        return np.asarray(embeddings, dtype=np.float32)
    # RandomState is frozen: it draws the same numbers in every version of NumPy.
    projection = np.random.RandomState(0).standard_normal((width, WIDTH)) / np.sqrt(WIDTH)
    return embeddings.astype(np.float32) @ projection.astype(np.float32)


def signatures(items: Items, of_images: np.ndarray | None) -> np.ndarray:
    """Signature `(N, S)` of each item; `of_images` are those that a survey found, None for embeddings."""
    return embedding_signatures(items.embeddings) if of_images is None else of_images


def near_copies(items: Items, of_images: np.ndarray | None) -> np.ndarray:
    """Set number `(N,)` of each labelled item: near-copies have one number (`copies.copy_sets`)."""
    return copy_sets(items.embeddings if of_images is None else of_images, items.labels)


@dataclass(frozen=True)
class SeenItems:
    """Items that a model was trained, calibrated, validated or enrolled on.

    signatures: `(n, S)` float32. radii: `(n,)` float32, distance within which another item is the same one.
    """

    signatures: np.ndarray
    radii: np.ndarray

    @staticmethod
    def of(signatures: np.ndarray, labels: np.ndarray, sets: np.ndarray) -> SeenItems:
        """Items `(n, S)` with their classes and their sets of near-copies, `(n,)` each."""
        first = representatives(sets)
        of_set = radii(signatures[first], labels[first])
        place = np.searchsorted(sets[first], sets, sorter=np.argsort(sets[first]))
        return SeenItems(signatures, of_set[np.argsort(sets[first])[place]].astype(np.float32))

    def __len__(self) -> int:
        return len(self.radii)

    def holds(self, signatures: np.ndarray) -> np.ndarray:
        """Mark the items `(N, S)` that are one of these, bool `(N,)`. False for signatures of another width."""
        if not len(self) or not len(signatures) or signatures.shape[1] != self.signatures.shape[1]:
            return np.zeros(len(signatures), dtype=bool)
        references = torch.from_numpy(np.ascontiguousarray(self.signatures, dtype=np.float32))
        queries = torch.from_numpy(np.ascontiguousarray(signatures, dtype=np.float32))
        one_cell = torch.zeros(len(references), dtype=torch.int64)
        index = NeighborIndex(references, one_cell, exact_up_to=EXACT_UP_TO)
        distances, nearest = (t.numpy() for t in index.search(queries, min(len(references), NEAREST)))
        return (distances <= self.radii[nearest]).any(axis=1)

    def joined(self, signatures: np.ndarray) -> SeenItems:
        """These and more items, which have copies within the smallest distance of these."""
        radii = np.full(len(signatures), self.radii.min() if len(self) else 0, dtype=np.float32)
        if len(self) and signatures.shape[1] != self.signatures.shape[1]:
            return self
        if not len(self):
            return SeenItems(np.asarray(signatures, dtype=np.float32), radii)
        together = np.concatenate([self.signatures, signatures]).astype(np.float32)
        return SeenItems(together, np.append(self.radii, radii))
