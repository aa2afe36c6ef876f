"""What a source holds: images on disk or embeddings, with the class of each where it is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ..errors import OsmlError
from ..names import item_labels
from .folders import is_special
from .threads import in_threads

ROLES = ("train", "calibration", "validation", "test")


@dataclass(frozen=True, eq=False)
class Items:
    """N items of one source. Each field is None or has N entries.

    labels: the class name of each item, in canonical form (`names.py`); None where the source has none. '-1' and
        'unknown' are those of items of unknown classes.
    paths: image files; beside embeddings, the images that those came from (never opened here).
    embeddings: `(N, D)` float32, or None for images.
    roles: the data role of each item as the source declares it, one of `ROLES`.
    """

    labels: tuple[str, ...] | None
    paths: tuple[Path, ...] | None
    embeddings: np.ndarray | None
    roles: tuple[str, ...] | None

    def __post_init__(self) -> None:
        if self.paths is None and self.embeddings is None:
            raise OsmlError("items need paths of images or embeddings; both are None")
        for field in ("labels", "paths", "embeddings", "roles"):
            values = getattr(self, field)
            if values is not None and len(values) != len(self):
                raise OsmlError(f"{len(values)} {field} for {len(self)} items; expected one an item")
        if self.labels is not None:
            object.__setattr__(self, "labels", item_labels(self.labels))

    def __len__(self) -> int:
        return len(self.paths if self.embeddings is None else self.embeddings)

    def class_names(self) -> list[str]:
        """The classes that occur, sorted; empty where there are no labels."""
        return sorted(set(self.labels or ()))

    def select(self, indices: Sequence[int] | np.ndarray) -> Items:
        """The items at `indices` (integers or a mask), in that order."""
        chosen = np.arange(len(self))[np.asarray(indices, dtype=None if len(indices) else np.int64)]

        def of(values: tuple | None) -> tuple | None:
            return None if values is None else tuple(values[i] for i in chosen)

        embeddings = None if self.embeddings is None else self.embeddings[chosen]
        return Items(of(self.labels), of(self.paths), embeddings, of(self.roles))

    def fingerprints(self) -> np.ndarray:
        """`(N,)` uint64 hash of each item's content: the file's bytes, or the row's float32 bytes.

        It depends on neither names nor order. Files are read once per `Items`. Raises `OsmlError` for a
        file that cannot be read.
        """
        return self._fingerprints

    def fingerprint(self) -> str:
        """Hexadecimal hash of the whole set: contents, labels and roles, whatever their order."""
        labels = self.labels or [None] * len(self)
        roles = self.roles or [None] * len(self)
        entries = zip(self.fingerprints().tolist(), labels, roles, strict=True)
        total = blake2b(digest_size=16)
        for line in sorted(json.dumps(entry) for entry in entries):
            total.update(line.encode() + b"\n")
        return total.hexdigest()

    @cached_property
    def _fingerprints(self) -> np.ndarray:
        if self.embeddings is not None:
            rows = np.ascontiguousarray(self.embeddings, dtype="<f4")
            digests = [blake2b(row, digest_size=8).digest() for row in rows]
        else:
            digests = in_threads(_file_digest, self.paths, "reading files")
        return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def _file_digest(path: Path) -> bytes:
    if is_special(path):
        raise OsmlError(f"cannot read '{path}': no regular file; remove it")
    try:
        return blake2b(path.read_bytes(), digest_size=8).digest()
    except OSError as error:
        raise OsmlError(f"cannot read '{path}': {error.strerror}; remove it or repair it") from error
