"""One replica's recogniser: the bundle, and on top of it what the store has learned since."""

from __future__ import annotations

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from osml_plugin import UNKNOWN, OpenSetRecognizer
from osml_plugin.errors import OsmlError
from osml_plugin.gallery import Gallery
from osml_plugin.known_items import LabelledEmbeddings

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

    @property
    def rejection(self) -> Literal["on", "kept", "off"]:
        """off: τ is infinite, and everything gets a name. kept: of those items that the rate was promised by, too few
        are left, and the threshold is the last that they could promise."""
        if math.isinf(self.recognizer.threshold.tau):
            return "off"
        return "on" if self.recognizer.n_left is None else "kept"

    @cached_property
    def warnings(self) -> list[str]:
        """A line for each thing that whoever runs the endpoint should know of its threshold."""
        lines, rate = [], self.recognizer.kept_rate
        if self.rejection != "on":
            lines.append(str(self.recognizer.guarantee or "nothing is rejected: the threshold is infinite"))
        if self.alpha is not None and self.alpha != rate:
            at = "its threshold" if rate is None else f"{rate:g}"
            lines.append(
                f"the rate {self.alpha:g} was asked for, and model '{self.model}' has too few calibration items to "
                f"promise it: it stays at {at}; choose a larger alpha"
            )
        return lines

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the scores of known items: a unit for scores; 1 where there are none."""
        scores = np.concatenate([self.recognizer.calibration_scores, self.recognizer.enrolled_scores])
        return (float(scores.std()) if len(scores) else 0.0) or 1.0


class Live:
    """Follows the store. `snapshot` is what is known now; reading it takes no lock."""

    def __init__(self, store: Store, shelf: Shelf):
        self._store, self._shelf = store, shelf
        self._lock = threading.Lock()
        self._examples: Examples = {}
        self._ground: tuple[str, float | None, OpenSetRecognizer] | None = None
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
            # A store of a lower version is another one, which was put in the place of the one before.
            if state.model == now.model and state.gallery_version > now.gallery_version:
                changes = self._store.changes_since(now.gallery_version, now.model)
                if changes.state.model == now.model:
                    self.snapshot = self._made(_taken(self._examples, changes), changes)
                    return self.snapshot
            self.snapshot = self._first()
            return self.snapshot

    def _first(self) -> Snapshot:
        """From the bundle of the active model, and everything that was ever enrolled."""
        while True:
            model = self._store.state().model
            self._shelf.load(model)  # which takes seconds: what was learned meanwhile is read afterwards
            changes = self._store.changes_since(0, model)
            if changes.state.model == model:
                break
        left_behind = sum(change.name is not None and change.embedding is None for change in changes.items)
        if left_behind:
            logger.warning("%d examples came without an image and are not known to model %s", left_behind, model)
        return self._made(_taken({}, changes), changes)

    def _made(self, examples: Examples, changes: Changes) -> Snapshot:
        """The snapshot of these examples.

        It is always made from the bundle, also where only one example is new: so it is a function of what the store
        holds, and a replica that followed has the very same as one that starts now. A gallery or a detector that grew
        step by step keeps traces of its way: in the order of its rows, in rounding, in the cells of its index.
        """
        state = changes.state
        base = self._at_rate(state.model, state.alpha)
        recognizer = _apart(base)
        recognizer.calibration = _renamed(base.calibration, changes.trained)
        recognizer.validation = _renamed(base.validation, changes.trained)
        gallery, merged = assembled(base.gallery, changes.trained, _by_class(examples), base.copy_radius)
        recognizer.gallery = replace(gallery, version=state.gallery_version)
        if base.class_weights is not None:
            recognizer.class_weights, recognizer.proxy_ids = joined(base.class_weights, base.proxy_ids, merged)
        recognizer.refit()
        self._examples = examples
        return Snapshot(recognizer, state.model, state.gallery_version, state.alpha, changes.trained)

    def _at_rate(self, model: str, alpha: float | None) -> OpenSetRecognizer:
        """The bundle at the rate that was chosen, or at its own where its calibration items are too few for it."""
        if self._ground is None or self._ground[:2] != (model, alpha):
            base = self._shelf.load(model)
            if alpha is not None and alpha != base.kept_rate and base.has_scores:
                try:
                    base = _apart(base).keep_rate(alpha)
                except OsmlError as error:
                    logger.warning("model %s stays at its own rate: %s", model, error)
            self._ground = (model, alpha, base)
        return self._ground[2]


def assembled(
    gallery: Gallery, trained: Mapping[str, str | None], enrolled: Mapping[str, Tensor], copy_radius: float
) -> tuple[Gallery, dict[int, list[int]]]:
    """A bundle's gallery with its classes renamed, merged or forgotten, and examples `(M, D)` of classes on top, where
    near-copies add nothing; and for each class of the bundle that is left, the ids of those that it was made of."""
    names = {old: trained.get(name, name) for old, name in gallery.classes.items()}
    # A class that others were merged into keeps its own id.
    ids = {name: old for old, name in names.items() if name is not None and name == gallery.classes[old]}
    merged: dict[int, list[int]] = {}
    for old in sorted(names):
        if names[old] is not None:
            merged.setdefault(ids.setdefault(names[old], old), []).append(old)
    classes = {i: name for name, i in ids.items()}
    # By the place of each id among those that are there, since ids that a user chose may be large.
    there, place = gallery.labels.unique(return_inverse=True)
    labels = torch.tensor([ids.get(names[old], UNKNOWN) for old in there.tolist()])[place]
    if classes != dict(gallery.classes) or not torch.equal(labels, gallery.labels):
        kept = labels >= 0
        gallery = replace(gallery, classes=classes, labels=labels).keep(kept)
    return gallery.restored(enrolled, copy_radius), merged


def joined(weights: Tensor, proxy_ids: Sequence[int], merged: Mapping[int, list[int]]) -> tuple[Tensor, list[int]]:
    """The proxies `(C, P, D)` of merged classes together. As many for each class: of the others some stand twice, which
    changes nothing, since a class is as near as the nearest of its proxies."""
    of = dict(zip(proxy_ids, weights, strict=True))
    rows = {i: torch.cat([of[old] for old in olds if old in of]) for i, olds in merged.items()}
    most = max((len(row) for row in rows.values()), default=1)
    ids = sorted(rows)
    filled = [rows[i][torch.arange(most) % len(rows[i])] for i in ids]
    # Where none is left, one of no class tells how long those of enrolled classes are to be.
    return (torch.stack(filled), ids) if filled else (weights[:1], [UNKNOWN])


def _apart(recognizer: OpenSetRecognizer) -> OpenSetRecognizer:
    """Another one, to be changed: the one that is given answers others meanwhile."""
    other = copy(recognizer)
    other.threshold = deepcopy(recognizer.threshold)
    return other


def _taken(examples: Examples, changes: Changes) -> Examples:
    """With what has changed; the examples of before stay as they are."""
    after = dict(examples)
    for change in changes.items:
        if change.name is None or change.embedding is None:
            after.pop(change.id, None)
        else:
            after[change.id] = (change.name, change.embedding)
    return after


def _by_class(examples: Examples) -> dict[str, Tensor]:
    """Embeddings `(M, D)` of each class, in the order of their ids; a class comes where its first example does."""
    rows = defaultdict(list)
    for item in sorted(examples):
        name, embedding = examples[item]
        rows[name].append(embedding)
    return {name: torch.from_numpy(np.stack(of)) for name, of in rows.items()}


def _renamed(held: LabelledEmbeddings | None, trained: Mapping[str, str | None]) -> LabelledEmbeddings | None:
    """Held-out items follow their classes; those of a forgotten class get a name that no class can have, as its name
    may come again."""
    if held is None or not trained:
        return held
    return replace(held, names=tuple((trained[n] or f" {n}") if n in trained else n for n in held.names))


def learned(home: str | Path, *, database: str | None = None, factories: Sequence[str] = ()) -> OpenSetRecognizer:
    """What an endpoint knows by now, as a recogniser of one's own: to test it, or to save it as a bundle.

    Args:
        home: the endpoint's folder; `database` its store, where that is not the SQLite file in there.

    Raises:
        OsmlError: where no endpoint has ever run.
    """
    config = ServeConfig(home=Path(home), database=database)
    if config.database_url.startswith("sqlite") and database is None and not (config.home / "store.db").is_file():
        raise OsmlError(f"no endpoint has run in '{home}': expected the --home of an `osml serve`")
    with closing(Store(config.database_url)) as store:
        if store.state().model is None:
            raise OsmlError(f"no endpoint has run in '{home}': expected the --home of an `osml serve`")
        return Live(store, Shelf(config.home, factories)).snapshot.recognizer
