"""The one object that users hold: model + gallery + detector + threshold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.functional import normalize

from . import UNKNOWN, copies, detectors, thresholds
from .checks import check_embeddings, check_references, holds_vectors
from .data.likeness import SeenItems
from .detectors import Detector
from .detectors.base import check_class_weights
from .embedding import embed_dataset, loading_workers
from .enrolment import EnrolledGroup, examples_of_groups, rehearsed_scores
from .errors import OsmlError
from .gallery import Gallery, Neighbor
from .known_items import LabelledEmbeddings, fit_items
from .labels import class_ids, read_labels
from .names import canonical
from .preprocessing import Preprocessing
from .thresholds import Conformal, Guarantee, Threshold
from .thresholds.ranks import enough

if TYPE_CHECKING:
    from .discovery import Discovery

logger = logging.getLogger(__name__)

FOLDS = 5
"""Parts into which enrolled examples are cut to score each one by a detector that has not seen it."""


@dataclass(frozen=True)
class Recognition:
    """What a recognizer says of N items."""

    labels: np.ndarray
    """`(N,)` class ids, `UNKNOWN` where the item is rejected."""
    names: tuple[str | None, ...]
    """The class names of these; None where rejected."""
    nearest: tuple[str, ...]
    """The nearest known class, of rejected items too."""
    scores: np.ndarray
    """`(N,)` unknown scores: higher = more unknown."""
    threshold: float
    """The τ of every class that has none of its own."""
    thresholds: np.ndarray
    """`(N,)` the τ of each item, that of its nearest class: rejected iff `scores > thresholds`."""
    p_values: np.ndarray | None
    """`(N,)` how usual such a score is for a known item (conformal p-value); None without calibration data."""
    neighbours: tuple[tuple[Neighbor, ...], ...]
    """The nearest references of each item, nearest first."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class OpenSetRecognizer:
    """Images or embeddings in, known classes or `UNKNOWN` out; learns a new class without training.

    >>> recognizer = OpenSetRecognizer("knn", alpha=0.05).fit(embeddings, labels)        # doctest: +SKIP
    >>> recognizer.predict(new_embeddings).names                                         # doctest: +SKIP

    Args:
        detector: a name (`osml detectors` lists them) or a `Detector`.
        threshold: a name or a `Threshold`.
        alpha: the share of known items that may be rejected, for 'conformal' and 'class_conformal' given by name.
        model: maps a batch of network inputs to embeddings `(N, D)`; without it the recognizer takes embeddings.
        preprocessing: what turns images into network inputs; with a model that takes images.
    """

    detector: str | Detector = "knn"
    threshold: str | Threshold = "conformal"
    alpha: float = 0.05
    model: nn.Module | None = None
    preprocessing: Preprocessing | None = None
    gallery: Gallery | None = field(default=None, init=False)
    calibration: LabelledEmbeddings | None = field(default=None, init=False)
    validation: LabelledEmbeddings | None = field(default=None, init=False)
    class_weights: Tensor | None = field(default=None, init=False)
    calibration_scores: np.ndarray | None = field(default=None, init=False)
    """Unknown scores of the calibration items whose classes are in the gallery."""
    enrolled_scores: np.ndarray | None = field(default=None, init=False)
    """Those of the enrolled examples, each from a detector that was fitted without it."""
    calibration_nearest: np.ndarray | None = field(default=None, init=False)
    """The nearest class id of each of the one,"""
    enrolled_nearest: np.ndarray | None = field(default=None, init=False)
    """and of the other."""
    promised: tuple[np.ndarray, np.ndarray] | None = field(default=None, init=False)
    """Scores and nearest class ids of the calibration items when these last sufficed to promise the rate."""
    n_left: int | None = field(default=None, init=False)
    """Calibration items that are left, where these are too few for the rate and `promised` stands for them."""
    proxy_ids: list[int] = field(default_factory=list, init=False)
    """The class id of each row of `class_weights`."""
    copy_radius: float = field(default=0.0, init=False)
    """Distance within which an example that is enrolled is a near-copy of a reference of its class."""
    seen: SeenItems | None = field(default=None, init=False)
    """Likeness of the items that nobody may test this recognizer on; None where it was fitted on bare embeddings."""
    details: dict[str, Any] = field(default_factory=dict, init=False)
    """Configuration, split and provenance, as the bundle keeps them; plain JSON."""

    def __post_init__(self):
        if isinstance(self.detector, str):
            self.detector = detectors.create(self.detector)
        if isinstance(self.threshold, str):
            args = {"alpha": self.alpha} if "alpha" in thresholds.registry.parameters(self.threshold) else {}
            self.threshold = thresholds.create(self.threshold, **args)
        self.alpha = getattr(self.threshold, "alpha", self.alpha)

    # Learning ---------------------------------------------------------------------------------------------

    def fit(
        self,
        embeddings: ArrayLike,
        labels: Sequence | ArrayLike,
        *,
        calibration: tuple[ArrayLike, Sequence] | None = None,
        validation: tuple[ArrayLike, Sequence] | None = None,
        class_weights: Tensor | None = None,
        near_copies: bool = True,
        copy_radius: float | None = None,
        seed: int = 0,
    ) -> OpenSetRecognizer:
        """Make the gallery, fit the detector on it and the threshold on items that the gallery does not hold.

        Args:
            embeddings: `(N, D)` of known items.
            labels: `(N,)` integers or names. Integers stay the ids of their classes; names get 0, 1, … in order.
            calibration: embeddings and labels of known items that training did not see; None = a fifth of the items
                is set aside for it, the classes in their proportions.
            validation: embeddings and labels of known and pseudo-unknown items: for thresholds that are chosen on
                both, and for the granularity of discovery.
            class_weights: the proxies of a classification loss, for detectors that need them; as `Detector.fit`.
            near_copies: True counts each set of near-copies (`copies.copy_sets`) as one item, in one role; False
                takes all items for different ones.
            copy_radius: distance within which an example that is enrolled later is a near-copy of one of its class,
                and adds nothing; None = measured on these items, and 0 where `near_copies` is False.

        Fewer than 1/α − 1 calibration items cannot carry the rate: nothing is rejected then, and a warning says so.

        Raises:
            OsmlError: for NaN, mismatched lengths or widths, labels that are neither integers nor names, `UNKNOWN`
                among them, fewer than two classes, calibration items of other classes, and calibration items that
                are references.
        """
        with self._all_or_nothing():
            embeddings = check_references(embeddings)
            labels = read_labels(labels, len(embeddings))  # once, since it may be a generator
            known, ids = self._labelled(embeddings, labels, "labels"), class_ids(labels)
            if len(ids) < 2:
                raise OsmlError(f"a recognizer needs at least two known classes; got {len(ids)}: {', '.join(ids)}")
            held = None if calibration is None else self._labelled(*calibration, "calibration labels")
            pseudo = None if validation is None else self._labelled(*validation, "validation labels", unknown=True)
            for aside in (held, pseudo):
                if aside is not None:
                    check_same_width(aside.embeddings, known.embeddings.shape[1])
            items = fit_items(known, held, pseudo, near_copies=near_copies, seed=seed)
            self.gallery = Gallery(
                embeddings=items.references.embeddings,
                labels=torch.tensor([ids[n] for n in items.references.names]),
                classes={i: n for n, i in ids.items()},
                enrolled=torch.zeros(len(items.references), dtype=torch.bool),
                next_id=max(ids.values()) + 1,
            )
            self.calibration, self.validation = items.calibration, items.validation
            self.promised = None
            if copy_radius is None:
                copy_radius = measured_radius(items.references, items.calibration) if near_copies else 0.0
            self.copy_radius = copy_radius
            self.class_weights, self.proxy_ids = None, sorted(ids.values())
            if class_weights is not None:
                self.class_weights = check_class_weights(class_weights, len(ids), known.embeddings)
            self.refit()
        if self.guarantee is not None and not self.guarantee.possible:
            logger.warning("%s", self.guarantee)
        return self

    def enroll(self, name: str, examples: Sequence | ArrayLike) -> OpenSetRecognizer:
        """Learn a class, or more of one, from images or embeddings `(M, D)`; no training.

        The threshold is fitted again. A conformal one gives the new class a τ of its own, by its examples: the classes
        of the training keep their rate, and the new one as well as its examples show how far it reaches. A class of few
        examples reaches as far as the pseudo-unknown classes do when they are enrolled from as few.
        """
        return self.learn({name: self.embed(examples)})

    def learn(self, examples: Mapping[str, Tensor]) -> OpenSetRecognizer:
        """Enrol embeddings `(M, D)` of several classes at once, as `embed` gives them.

        With a detector that is `incremental` this costs what the new examples cost.
        """
        for name, embeddings in examples.items():
            if len(embeddings) == 0:
                raise OsmlError(f"no examples to enrol '{name}' from: give at least one image")
        before = self._fitted_gallery()
        after = before.add_all(examples, self.copy_radius)
        self._change(after, lambda: self._grown_detector(before, after))
        return self

    def enroll_groups(
        self,
        items: Sequence | ArrayLike,
        discovery: Discovery,
        names: Mapping[int, str] | None = None,
        *,
        min_confidence: float | None = None,
    ) -> tuple[EnrolledGroup, ...]:
        """Learn the groups of a discovery, all at once: `learn` for what `discover` found. All or nothing.

        Args:
            items: the `(N,)` images or embeddings `(N, D)` that were grouped.
            discovery: what `discover` said of them.
            names: the class of each group, by its number. The name of a class that is there adds to it, groups of one
                name become one class, and a group that is not named here is not enrolled. None: all groups, named
                'new-1', 'new-2', …, those names left out that are taken.
            min_confidence: members of a lower confidence are skipped; None: none are.

        Returns:
            For each enrolled group, by number: its class, how many examples it gave, and which members it did not.

        Raises:
            OsmlError: for items that are not those of the discovery, a group that is none of its, a name that no class
                may have, or a group without any member of that confidence.
        """
        examples, enrolled = examples_of_groups(self.embed(items), discovery, names, min_confidence, self.class_names)
        if examples:
            self.learn(examples)
        return enrolled

    def forget(self, name: str) -> OpenSetRecognizer:
        """Drop a class and all its references; what belongs to it is unknown from now on, and a class that is enrolled
        under its name later is another one.

        Where fewer calibration items are left than the rate needs, the last threshold that they could promise stays
        (`n_left`, `guarantee`): forgetting never turns rejection off.
        """
        before, name = self._fitted_gallery(), canonical(str(name))
        gone = before.labels == before.id_of(name)
        after = before.remove(name)

        def shrunk() -> Detector:
            if not self._incremental:
                return self._fitted_detector(after)
            return self.detector.without(before.embeddings[gone], before.labels[gone])

        self._change(after, shrunk)
        self.calibration, self.validation = (_nameless(h, name) for h in (self.calibration, self.validation))
        return self

    def keep_rate(self, alpha: float) -> OpenSetRecognizer:
        """Fit a conformal threshold at another share of known items that may be rejected.

        Raises:
            OsmlError: for a rate that the calibration items are too few for: nothing would be rejected.
        """
        name = self.threshold.name if isinstance(self.threshold, Conformal) else "conformal"
        with self._all_or_nothing():
            self.threshold = thresholds.create(name, alpha=alpha)
            self.alpha = self.threshold.alpha
            self._refit_threshold()
            promise = thresholds.guarantee(self._n_promising(), alpha)
            if not promise.possible:
                raise OsmlError(str(promise))
        return self

    @property
    def has_scores(self) -> bool:
        """Whether there are known items to fit a rate on."""
        return len(self.calibration_scores) + len(self.enrolled_scores) > 0

    def refit(self) -> None:
        """Fit detector and threshold on the gallery and the held-out items that are here now."""
        self.detector = self._fitted_detector(self._fitted_gallery())
        self._refit_threshold()

    def _refit_threshold(self) -> None:
        gallery, threshold = self._fitted_gallery(), self.threshold
        self._score_known()
        self._keep_promise()
        if threshold.needs_unknown:
            self._fit_on_validation()
        elif len(self.calibration_scores):
            threshold.fit(self.calibration_scores, self.calibration_nearest)
            if isinstance(threshold, Conformal) and gallery.enrolled.any():
                enrolled = self.enrolled_scores, self.enrolled_nearest, self._enrolled_ids()
                threshold.fit_enrolled(*enrolled)
                if threshold.lacking:
                    threshold.fit_enrolled(*enrolled, self._rehearsed(threshold.lacking))
        elif len(self.enrolled_scores):  # all classes of the training are forgotten
            threshold.fit(self.enrolled_scores, self.enrolled_nearest)
        if threshold.tau is None:
            missing = "validation items, known and pseudo-unknown" if threshold.needs_unknown else "calibration items"
            raise OsmlError(f"nothing to fit the threshold '{threshold.name}' on: it needs {missing}")

    def _fit_on_validation(self) -> None:
        """Fit a threshold on known and pseudo-unknown items, as long as there are both: enrolling the last
        pseudo-unknown class leaves the threshold as it was."""
        if self.validation is None:
            return
        is_unknown = ~np.isin(self.validation.names, self.class_names)
        if self.threshold.tau is None or (is_unknown.any() and not is_unknown.all()):
            nearest, scores = self.detector.predict(self.validation.embeddings)
            self.threshold.fit(scores, nearest, is_unknown=is_unknown)

    # Answering --------------------------------------------------------------------------------------------

    @property
    def class_names(self) -> list[str]:
        return self._fitted_gallery().class_names

    @property
    def kept_rate(self) -> float | None:
        """The share of known items that the threshold may reject; None where it follows another rule."""
        if isinstance(self.threshold, thresholds.Quantile):
            return 1 - self.threshold.accepted
        if isinstance(self.threshold, thresholds.TargetRate):
            return self.threshold.known_rejected
        return getattr(self.threshold, "alpha", None)

    @property
    def class_thresholds(self) -> dict[str, float]:
        """The τ of each class that has one of its own, by name; that of all others is `threshold.tau`."""
        taus = self.threshold.taus
        return {name: taus[c] for c, name in sorted(self._fitted_gallery().classes.items()) if c in taus}

    @property
    def guarantee(self) -> Guarantee | None:
        """What can be promised of the share of known items rejected, for the classes that have calibration items
        (of enrolled ones it says less); None for thresholds that promise nothing."""
        if not isinstance(self.threshold, Conformal) or not len(self.calibration_scores):
            return None
        classes = self.gallery.classes
        pooled = tuple(classes[c] for c in self.threshold.pooled if c in classes)  # forgotten ones have no name
        return replace(self.threshold.guarantee(), pooled=pooled, left=self.n_left)

    def embed(self, items: Sequence | ArrayLike, progress: str | None = None) -> Tensor:
        """Embeddings `(N, D)` of images (files, PIL images, uint8 arrays or tensors); embeddings pass through, in any
        form that `checks.check_embeddings` takes."""
        if holds_vectors(items):
            embeddings = check_embeddings(items).cpu()
            if self.model is not None and self.preprocessing is None:
                self._check_input_width(embeddings)
                embeddings = embed_dataset(self.model, embeddings, progress=progress)[0]
        elif self.preprocessing is None:
            raise OsmlError("this recognizer takes embeddings of shape (items, width), not images: it has no model")
        elif isinstance(items, Tensor):
            embeddings, _ = embed_dataset(self.model, self.preprocessing.from_tensor(items), progress=progress)
        elif len(items) == 0:
            embeddings = torch.empty(0, self._width)
        else:
            workers = loading_workers(len(items))
            embeddings, _ = embed_dataset(
                self.model, self.preprocessing.dataset(items), workers=workers, progress=progress
            )
        if self.gallery is not None:
            self._check_width(embeddings)
        return embeddings

    def predict(self, items: Sequence | ArrayLike, *, neighbours: int = 3, progress: str | None = None) -> Recognition:
        """Recognise images or embeddings `(N, D)`; `neighbours` is how many references to name for each."""
        return self.recognize(self.embed(items, progress), neighbours=neighbours)

    def recognize(self, embeddings: Tensor, *, neighbours: int = 3) -> Recognition:
        """The same for embeddings that `embed` gave."""
        gallery = self._fitted_gallery()
        labels, scores = self.detector.predict(embeddings)
        taus = self.threshold.tau_of(labels)
        rejected = self.threshold.decide(scores, labels)
        nearest = tuple(gallery.classes[i] for i in labels.tolist())
        return Recognition(
            labels=np.where(rejected, UNKNOWN, labels.numpy()),
            names=tuple(None if r else n for r, n in zip(rejected, nearest, strict=True)),
            nearest=nearest,
            scores=scores.numpy(),
            threshold=self.threshold.tau,
            thresholds=taus,
            p_values=self._p_values(scores, labels),
            neighbours=tuple(tuple(row) for row in gallery.neighbors(embeddings, neighbours)) if neighbours else (),
        )

    def discover(self, items: Sequence | ArrayLike, **how: Any) -> Discovery:
        """Group unknown images or embeddings into proposed classes, as fine as the held-out classes are; `how` is what
        `osml_plugin.discovery.discover` takes: n_classes, method, granularity, must_link, cannot_link, seed."""
        return self.group(self.embed(items), **how)

    def group(self, embeddings: Tensor, **how: Any) -> Discovery:
        """The same for embeddings that `embed` gave; `progress` may be a function that is told how far it is, from 0 to
        1."""
        from .discovery import discover  # seconds of imports, which only grouping needs

        held = [h for h in (self.calibration, self.validation) if h is not None and len(h)]
        if held:
            names = np.concatenate([np.array(h.names) for h in held])
            how["known_embeddings"], how["known_labels"] = torch.cat([h.embeddings for h in held]), names
            # Pseudo-unknown and forgotten classes say how fine a class is, but are to be found if they are there.
            how["in_gallery"] = np.isin(names, self.class_names)
        return discover(embeddings, **how)

    # On disk ----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a bundle: a folder of JSON and safetensors."""
        from .bundle import save_bundle

        save_bundle(self, path)

    @staticmethod
    def load(path: str | Path, *, factories: Sequence[str] = ()) -> OpenSetRecognizer:
        """Read a bundle. Nothing in it is executed; a trunk made by a factory of yours must be named in `factories`."""
        from .bundle import load_bundle

        return load_bundle(path, factories=factories)

    # Inside -----------------------------------------------------------------------------------------------

    @property
    def _width(self) -> int:
        return self._fitted_gallery().embeddings.shape[1]

    def _fitted_gallery(self) -> Gallery:
        if self.gallery is None:
            raise OsmlError("this recognizer is not fitted: call fit(embeddings, labels) first, or load a bundle")
        return self.gallery

    def _check_width(self, embeddings: Tensor) -> None:
        check_same_width(embeddings, self._width)

    def _check_input_width(self, vectors: Tensor) -> None:
        expected = self.details.get("input", {}).get("size", vectors.shape[1])
        if vectors.shape[1] != expected:
            raise OsmlError(
                f"embeddings are {vectors.shape[1]} wide, but this recognizer was trained on embeddings of {expected}"
            )

    def _labelled(
        self, embeddings: ArrayLike, labels: Sequence | ArrayLike, what: str, *, unknown: bool = False
    ) -> LabelledEmbeddings:
        embeddings = check_embeddings(embeddings).cpu()
        names = read_labels(labels, len(embeddings), what, unknown=unknown)
        return LabelledEmbeddings(embeddings, tuple(map(str, names)))

    def _change(self, gallery: Gallery, changed: Callable[[], Detector]) -> None:
        """Take another gallery, and the detector that was `changed` for it."""
        with self._all_or_nothing():
            self.gallery = gallery
            self.detector = changed()
            self._refit_threshold()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """If anything refuses the change made inside, or interrupts it, all stays as it was."""
        before = {**self.__dict__, "threshold": copy(self.threshold)}  # a threshold is fitted in place
        try:
            yield
        except BaseException:
            self.__dict__.update(before)
            raise

    @property
    def _incremental(self) -> bool:
        """Whether the detector changes along with the gallery; one that searches it takes the gallery's own index."""
        return self.detector.incremental and not self.detector.searches_references

    def _fitted_detector(self, gallery: Gallery) -> Detector:
        detector = detectors.create(self.detector.name, **self.detector.params)
        weights = self._weights_of(gallery) if detector.needs_class_weights else None
        return detector.fit(gallery.index, gallery.labels, weights)

    def _grown_detector(self, before: Gallery, after: Gallery) -> Detector:
        """The detector for a gallery that has grown, from that for the one before."""
        if len(after) == len(before):
            return self.detector
        if not self._incremental:
            return self._fitted_detector(after)
        new = slice(len(before), None)
        weights = self._weights_of(after) if self.detector.needs_class_weights else None
        return copy(self.detector).partial_fit(after.embeddings[new], after.labels[new], weights)

    def _weights_of(self, gallery: Gallery) -> Tensor | None:
        """Proxies in the order of class ids. An enrolled class gets an imprinted one (Qi et al. 2018): its mean
        direction, as long as the trained proxies are on average."""
        if self.class_weights is None:
            return None
        trained = dict(zip(self.proxy_ids, self.class_weights, strict=True))
        length = self.class_weights.norm(dim=2).mean()
        rows = []
        for label in sorted(gallery.classes):
            if label not in trained:
                mean = normalize(gallery.embeddings[gallery.labels == label]).mean(dim=0)
                trained[label] = (length * normalize(mean, dim=0)).expand_as(self.class_weights[0])
            rows.append(trained[label])
        return torch.stack(rows)

    def _enrolled_ids(self) -> list[int]:
        """Ids of the classes that calibration items have nothing of."""
        gallery, calibrated = self.gallery, set(self.calibration.names)
        ids = gallery.labels[gallery.enrolled].unique().tolist()
        return [i for i in ids if gallery.classes[i] not in calibrated]

    def _score_known(self) -> None:
        """Score known items that the detector has not seen: those of the calibration role, and the enrolled examples,
        each by a detector that was fitted without it (of a class with one example there is none)."""
        gallery = self.gallery
        kept = torch.from_numpy(np.isin(self.calibration.names, self.class_names))
        found = self.detector.predict(self.calibration.embeddings[kept])
        self.calibration_nearest, self.calibration_scores = (t.numpy() for t in found)
        fold, enrolled = gallery.folds(FOLDS), [tuple(t[:0] for t in found)]
        for f in fold[fold >= 0].unique():  # beside references of the training some parts are empty
            out = fold == f
            if self._incremental and not self.detector.needs_class_weights:
                detector = self.detector.without(gallery.embeddings[out], gallery.labels[out])
            else:  # imprinted proxies, too, are to be made without what is scored
                rest = gallery.labels.where(~out, UNKNOWN)
                detector = self._fitted_detector(replace(gallery, labels=rest, index=gallery.index.without(out)))
            enrolled.append(detector.predict(gallery.embeddings[out]))
        self.enrolled_nearest, self.enrolled_scores = (torch.cat(t).numpy() for t in zip(*enrolled, strict=True))

    def _n_promising(self) -> int:
        """How many items the threshold is fitted on: those of the calibration, or where none is left the enrolled."""
        return len(self.calibration_scores) or len(self.enrolled_scores)

    def _keep_promise(self) -> None:
        """Where the calibration items that are left are too few for the rate, the scores of those that last sufficed
        stay: forgetting classes makes τ neither infinite nor one that nobody chose."""
        self.n_left = None
        if not isinstance(self.threshold, Conformal):
            return
        alpha, left = self.threshold.alpha, len(self.calibration_scores)
        if enough(self._n_promising(), alpha):
            if left:
                self.promised = self.calibration_scores, self.calibration_nearest
        elif self.promised is not None and enough(len(self.promised[0]), alpha):
            self.calibration_scores, self.calibration_nearest = self.promised
            self.n_left = left

    def _rehearsed(self, classes: Iterable[int]) -> dict[int, np.ndarray]:
        """For enrolled classes with few examples: the scores that further items of a new class get when it is enrolled
        from as few. The pseudo-unknown classes play the new ones."""
        gallery, held = self.gallery, self.validation
        if held is None:
            return {}
        unknown = ~np.isin(held.names, gallery.class_names)
        items, names = held.embeddings[torch.from_numpy(unknown)], np.array(held.names)[unknown]
        sizes = {c: int((gallery.labels == c).sum()) for c in classes}
        grown = partial(self._grown_detector, gallery)
        found = {size: rehearsed_scores(items, names, size, gallery, grown) for size in set(sizes.values())}
        return {c: found[size] for c, size in sizes.items()}

    def _p_values(self, scores: Tensor, nearest: Tensor) -> np.ndarray | None:
        """Conformal p-values, such that p ≤ α and rejected by a conformal threshold are the same thing."""
        if not len(self.calibration_scores):
            return None
        if isinstance(self.threshold, Conformal):
            return self.threshold.p_values(scores, nearest)
        return thresholds.p_values(scores, self.calibration_scores)


def check_same_width(embeddings: Tensor, width: int) -> None:
    """Raise `OsmlError` unless embeddings `(N, D)` are as wide as the references."""
    if embeddings.shape[1] != width:
        raise OsmlError(f"embeddings are {embeddings.shape[1]} wide, but the gallery's are {width}")


def measured_radius(*parts: LabelledEmbeddings) -> float:
    """Radius of near-copies among all these known items."""
    names = [name for items in parts for name in items.names]
    return copies.copy_radius(torch.cat([items.embeddings for items in parts]), names)


def _nameless(held: LabelledEmbeddings | None, name: str) -> LabelledEmbeddings | None:
    """Held-out items with a name that no class can have in place of this one."""
    return held and replace(held, names=tuple(f" {n}" if n == name else n for n in held.names))
