"""One replica's recogniser: the bundle, and on top of it what the store has learned since."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from osml_plugin import OpenSetRecognizer
from osml_plugin.errors import OsmlError
from osml_plugin.gallery import Gallery
from osml_plugin.recognizer import LabelledEmbeddings

from .settings import ServeConfig
from .shelf import Shelf
from .store import Changes, Store

logger = logging.getLogger("osml.serve")

Examples = dict[str, tuple[str, np.ndarray]]
"""Class and embedding of each enrolled item, by its id."""


@dataclass(frozen=True)
class Snapshot:
    """What a request is answered by, from its first step to its last; it never changes."""

    recognizer: OpenSetRecognizer
    model: str
    gallery_version: int
    alpha: float | None
    trained: Mapping[str, str | None]
    """What became of classes of the bundle."""


class Live:
    """Follows the store. `snapshot` is what is known now; reading it takes no lock."""

    def __init__(self, store: Store, shelf: Shelf):
        self._store, self._shelf = store, shelf
        self._lock = threading.Lock()
        self._examples: Examples = {}
        self.snapshot = self._first()

    def catch_up(self, version: int | None = None) -> Snapshot:
        """Take in what the store has learned, up to `version` at least.

        Raises:
            StoreUnavailable: where the store does not answer; all stays as it was.
        """
        if version is not None and self.snapshot.gallery_version >= version:
            return self.snapshot
        with self._lock:
            now = self.snapshot
            state = self._store.state()
            if state.gallery_version == now.gallery_version and state.model == now.model:
                return now
            if state.model == now.model:
                changes = self._store.changes_since(now.gallery_version, now.model)
                if changes.state.model == now.model:
                    self.snapshot = self._next(now, changes)
                    return self.snapshot
            self.snapshot = self._first()
            return self.snapshot

    def prepare(self, model: str) -> None:
        """Have a model version at hand that may become the active one."""
        self._shelf.load(model)

    def _first(self) -> Snapshot:
        """From the bundle of the active model, and everything that was ever enrolled."""
        while True:
            model = self._store.state().model
            base = self._shelf.load(model)
            changes = self._store.changes_since(0, model)
            if changes.state.model == model:
                break
        self._examples = {}
        left_behind = sum(change.name is not None and change.embedding is None for change in changes.items)
        if left_behind:
            logger.warning("%d examples came without an image and are not known to model %s", left_behind, model)
        _take(self._examples, changes)
        return self._assembled(base, changes)

    def _next(self, before: Snapshot, changes: Changes) -> Snapshot:
        added = [c for c in changes.items if c.name is not None and c.embedding is not None]
        only_added = len(added) == len(changes.items) and not any(c.id in self._examples for c in added)
        _take(self._examples, changes)
        if not only_added or changes.trained != before.trained or changes.state.alpha != before.alpha:
            return self._assembled(self._shelf.load(before.model), changes)
        gallery = before.recognizer.gallery.add_all(_by_class({c.id: (c.name, c.embedding) for c in added}))
        return _snapshot(before.recognizer, gallery, before.model, changes)

    def _assembled(self, base: OpenSetRecognizer, changes: Changes) -> Snapshot:
        gallery = assembled(base.gallery, changes.trained, _by_class(self._examples))
        recognizer = copy(base)
        recognizer.calibration = _renamed(base.calibration, changes.trained)
        recognizer.validation = _renamed(base.validation, changes.trained)
        return _snapshot(recognizer, gallery, changes.state.model, changes)


def assembled(gallery: Gallery, trained: Mapping[str, str | None], enrolled: Mapping[str, Tensor]) -> Gallery:
    """A bundle's gallery with its classes renamed, merged or forgotten, and examples `(M, D)` of classes on top."""
    ids = {}
    of_old = torch.full((max(gallery.classes) + 1,), -1)
    for old in sorted(gallery.classes):
        name = trained.get(gallery.classes[old], gallery.classes[old])
        if name is not None:
            of_old[old] = ids.setdefault(name, old)
    names = {i: name for name, i in ids.items()}
    labels = of_old[gallery.labels]
    if names != dict(gallery.classes) or not torch.equal(labels, gallery.labels):
        kept = labels >= 0
        gallery = replace(gallery, classes=names, labels=labels).keep(kept)
    return gallery.add_all(enrolled)


def _snapshot(recognizer: OpenSetRecognizer, gallery: Gallery, model: str, changes: Changes) -> Snapshot:
    """Fitted again; the recognizer that is given answers others meanwhile and stays as it is."""
    state = changes.state
    gallery = replace(gallery, version=state.gallery_version)
    other = copy(recognizer)
    other.threshold = deepcopy(recognizer.threshold)
    other.gallery = gallery
    if state.alpha is not None and state.alpha != other.kept_rate:
        other.keep_rate(state.alpha)
    else:
        other.refit()
    return Snapshot(other, model, state.gallery_version, state.alpha, changes.trained)


def _take(examples: Examples, changes: Changes) -> None:
    for change in changes.items:
        if change.name is None or change.embedding is None:
            examples.pop(change.id, None)
        else:
            examples[change.id] = (change.name, change.embedding)


def _by_class(examples: Examples) -> dict[str, Tensor]:
    """Embeddings `(M, D)` of each class, in the order in which they were enrolled."""
    rows = defaultdict(list)
    for item in sorted(examples):
        name, embedding = examples[item]
        rows[name].append(embedding)
    return {name: torch.from_numpy(np.stack(rows[name])) for name in sorted(rows)}


def _renamed(held: LabelledEmbeddings | None, trained: Mapping[str, str | None]) -> LabelledEmbeddings | None:
    """Held-out items follow their classes; those of a forgotten class get a name that no class can have, as its name
    may come again."""
    if held is None or not trained:
        return held
    return replace(held, names=tuple((trained[n] or f"/{n}") if n in trained else n for n in held.names))


def learned(home: str | Path, *, database: str | None = None, factories: Sequence[str] = ()) -> OpenSetRecognizer:
    """What an endpoint knows by now, as a recogniser of one's own: to test it, or to save it as a bundle.

    Args:
        home: the endpoint's folder; `database` its store, where that is not the SQLite file in there.

    Raises:
        OsmlError: where no endpoint has ever run.
    """
    config = ServeConfig(home=Path(home), database=database)
    with closing(Store(config.database_url)) as store:
        if store.state().model is None:
            raise OsmlError(f"no endpoint has run in '{home}': expected the --home of an `osml serve`")
        return Live(store, Shelf(config.home, factories)).snapshot.recognizer
