"""The contract that every detector keeps, and the registry that finds them by name."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import ClassVar, Self, final

import torch
from numpy.typing import ArrayLike
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import UNKNOWN
from ..checks import check_embeddings, check_range, check_references
from ..errors import OsmlError
from ..neighbors import NeighborIndex
from ..registry import Named, Registry, refusing

registry: Registry[Detector] = Registry("detector")


class Detector(Named, nn.Module):
    """Gives each embedding an unknown score: **higher = more unknown**, always.

    A subclass has a keyword-only `__init__` that keeps each argument under its own name, and writes `_fit`
    and one of: `_class_scores -> (N, C)` (the score is the minimum over classes, the class its argmin) or
    `_score_and_class -> ((N,), (N,))`. All it has fitted lives in buffers. The base owns everything else:
    checks, labels ↔ indices, dtype, device, chunks, gradients, files. Where detectors can share work (`scan`), their
    class writes `_fit_all` or `_score_all` instead. One that is `incremental` writes `_update` besides.
    """

    registry = registry
    needs_class_weights: ClassVar[bool] = False
    """Whether `fit` needs the proxies of a classification loss."""
    searches_references: ClassVar[bool] = False
    """Whether `_fit` takes a `NeighborIndex` in place of embeddings; rows that it leaves out have the label −1."""
    incremental: ClassVar[bool] = False
    """Whether `partial_fit` and `without` work."""
    class_buffers: ClassVar[tuple[str, ...]] = ()
    """Of one that is incremental: its buffers with a row for each class."""
    search_space: ClassVar[dict[str, tuple]] = {}
    """For each parameter worth searching, the values to try."""
    tried_by_auto: ClassVar[bool] = True
    """Whether `detector: auto` and sweeps try it; not where it costs many times what the others do."""
    far_point_exception: ClassVar[str | None] = None
    """Why a far point need not score above the training points, where that is so."""

    chunk_size = 4096

    @final
    def fit(
        self, embeddings: ArrayLike | NeighborIndex, labels: ArrayLike, class_weights: ArrayLike | None = None
    ) -> Detector:
        """Learn the known classes.

        Args:
            embeddings: `(N, D)`, finite; any float type, NumPy or torch. Its device becomes the detector's. Or an index
                over them, which is then shared and not made again; what it leaves out is left out.
            labels: `(N,)` integers, any values but `UNKNOWN`; leave unknown items out.
            class_weights: `(C, D)`, or `(C, P, D)` for P proxies a class: row c is the proxy of the c-th
                smallest label, scaled so that `embedding · weight` is the logit.

        Raises:
            OsmlError: for wrong shapes, NaN, an `UNKNOWN` label, missing class weights.
        """
        fit_together([self], embeddings, labels, class_weights)
        return self

    @final
    @torch.no_grad()
    def partial_fit(self, embeddings: ArrayLike, labels: ArrayLike, class_weights: ArrayLike | None = None) -> Detector:
        """Learn more examples of known classes, or of new ones: what `fit` on all examples gives, at the cost of the
        new ones. The first time, it is `fit`.

        Args:
            embeddings, labels: the new examples, as for `fit`.
            class_weights: of all classes, those known before included.

        Raises:
            OsmlError: as `fit`, and for a detector that is not `incremental`; it stays as it was.
        """
        self._check_incremental()
        if "class_labels" not in self._buffers:
            return self.fit(embeddings, labels, class_weights)
        embeddings, labels = self._checked_change(embeddings, labels)
        class_labels = torch.cat([self.class_labels, labels]).unique()
        class_weights = self._checked_weights(class_weights, len(class_labels), embeddings)
        rows = torch.full_like(class_labels, -1)
        rows[torch.searchsorted(class_labels, self.class_labels)] = torch.arange(
            len(self.class_labels), device=rows.device
        )
        grown = self._copy()
        grown._take_classes(rows)
        grown.class_labels = class_labels
        grown._change(embeddings, labels, class_weights, 1)
        grown._fitted()
        self.__dict__.update(grown.__dict__)
        return self

    @final
    @torch.no_grad()
    def without(self, embeddings: ArrayLike, labels: ArrayLike) -> Detector:
        """Another detector, as if these items had never been given to this one, at the cost of these items.

        Classes that lose all their items vanish. This one stays as it is; the two share what is the same.

        Args:
            embeddings, labels: items that it was fitted on, as they were given then.

        Raises:
            OsmlError: as `partial_fit`; for items of classes that it does not know, or more than it has of one; where
                nothing would be left.
        """
        self._check_incremental()
        if "class_labels" not in self._buffers:
            raise OsmlError(f"detector '{self.name}' is not fitted: there is nothing to take away yet")
        embeddings, labels = self._checked_change(embeddings, labels)
        leavers, n_leaving = labels.unique(return_counts=True)
        row = torch.searchsorted(self.class_labels, leavers).clamp_max(len(self.class_labels) - 1)
        here = torch.where(self.class_labels[row] == leavers, self.class_counts[row], 0)
        if (n_leaving > here).any():
            first = int((n_leaving > here).nonzero()[0])
            raise OsmlError(
                f"{int(n_leaving[first])} items of class {int(leavers[first])} are to be left out, but the detector "
                f"was fitted on {int(here[first])}: give items that it was fitted on"
            )
        if n_leaving.sum() == self.class_counts.sum():
            raise OsmlError("all items are to be left out: a detector needs at least one")
        rest = self._copy()
        rest._change(embeddings, labels, None, -1)
        kept = rest.class_counts.nonzero()[:, 0]
        rest._take_classes(kept)
        rest.class_labels = rest.class_labels[kept]
        rest._fitted()
        return rest

    @final
    def score(self, embeddings: ArrayLike) -> Tensor:
        """Unknown scores `(N,)` float32 of embeddings `(N, D)`."""
        return self.predict(embeddings)[1]

    @final
    def predict(self, embeddings: ArrayLike) -> tuple[Tensor, Tensor]:
        """The nearest known class (a label given to `fit`) and the unknown score of each item, both `(N,)`."""
        return predict_together([self], embeddings)[0]

    @staticmethod
    def scan(
        detectors: Sequence[Detector],
        embeddings: ArrayLike,
        labels: ArrayLike,
        queries: ArrayLike,
        class_weights: ArrayLike | None = None,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Fit each of many detectors on the same items, and predict the same queries with it.

        What `fit` and `predict` one after another give, in less time: detectors that differ in parameters only, and
        others that are kin, share what does not depend on these.

        Args:
            detectors: any, fitted or not; they are fitted afterwards.
            embeddings, labels, class_weights: as for `fit`.
            queries: `(M, D)`, as for `predict`.

        Yields:
            the position among `detectors`, kin together, then nearest classes and unknown scores as of `predict`.
        """
        families = defaultdict(list)
        for i, detector in enumerate(detectors):
            kind = type(detector)
            families[kind._fit, kind._fit_all.__func__, kind._score_all.__func__].append(i)
        for members in families.values():
            family = [detectors[i] for i in members]
            fit_together(family, embeddings, labels, class_weights)
            for i, (classes, scores) in zip(members, predict_together(family, queries), strict=True):
                yield i, classes, scores

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the fitted tensors, and name and parameters as its metadata."""
        if "class_labels" not in self._buffers:
            raise OsmlError(f"detector '{self.name}' is not fitted: there is nothing to save yet")
        tensors = {k: v.contiguous() for k, v in self._buffers.items()}
        with refusing(f"cannot write the detector '{path}'", "name a file in a folder that is there"):
            save_file(tensors, path, {"detector": self.name, "params": json.dumps(self.params)})

    @staticmethod
    def load(path: str | Path, device: str | torch.device = "cpu") -> Detector:
        """The detector that `save` wrote. OsmlError for a file that is not there, or another."""
        advice = "name a file that Detector.save wrote"
        with refusing(f"cannot read the detector '{path}'", advice), safe_open(path, "pt", device=str(device)) as file:
            meta = file.metadata() or {}
            if "detector" not in meta:
                raise OsmlError(f"'{path}' is not a detector: expected a file that Detector.save wrote")
            detector = registry.create(meta["detector"], **json.loads(meta["params"]))
            for key in file.keys():  # noqa: SIM118 - a safetensors file is not a dict
                # A copy starts where memory of its own does, and products of matrices round by where they start.
                detector.register_buffer(key, file.get_tensor(key).clone())
        detector._fitted()
        return detector

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if "class_labels" in self._buffers:
            self._fitted()
        return self

    def _check_incremental(self) -> None:
        if not self.incremental:
            able = [name for name in registry.names() if registry.get(name).incremental]
            raise OsmlError(
                f"detector '{self.name}' cannot learn or forget single items: fit it again on all of them, or choose "
                f"one that can: {', '.join(able)}"
            )

    def _checked_change(self, embeddings: ArrayLike, labels: ArrayLike) -> tuple[Tensor, Tensor]:
        """Items to add or to take away, on the detector's device."""
        if "class_counts" not in self._buffers:
            raise OsmlError(
                f"this detector '{self.name}' was saved by a version that kept nothing to learn on from: it scores, "
                "but to change it fit it again on all items"
            )
        embeddings = check_embeddings(embeddings).to(self.class_labels.device)
        check_width(embeddings, self)
        return embeddings, check_labels(labels, embeddings).long()

    def _checked_weights(self, class_weights: ArrayLike | None, n_classes: int, embeddings: Tensor) -> Tensor | None:
        if class_weights is not None:
            return check_class_weights(class_weights, n_classes, embeddings)
        if self.needs_class_weights:
            raise OsmlError(
                f"detector '{self.name}' needs class weights: train with a classification loss (one that has "
                "proxies, such as ArcFaceLoss), or choose a detector that works on embeddings alone"
            )
        return None

    def _copy(self) -> Self:
        """Another one with the same tensors: what either replaces is the other's no more."""
        other = copy(self)
        other._buffers = dict(self._buffers)
        return other

    def _change(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None, sign: int) -> None:
        index = torch.searchsorted(self.class_labels, labels)
        self.class_counts = self.class_counts + sign * index.bincount(minlength=len(self.class_labels))
        self._update(embeddings, index, class_weights, sign)

    # What a detector writes -----------------------------------------------------------------------------

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        """Register buffers. `embeddings` (N, D) float32, `labels` (N,) in 0..C-1, `class_weights` (C, P, D)."""
        raise NotImplementedError

    def _fitted(self) -> None:
        """Rebuild what is derived from the buffers; called after `fit`, `load` and a change of device or of items."""

    def _update(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None, sign: int) -> None:
        """Add items, given as to `_fit` (sign 1; all classes have their rows, of zeros for new ones), or take them away
        (−1). `class_counts` (C,) is what is there afterwards. Buffers are replaced, never changed in place: other
        detectors share them."""
        raise NotImplementedError

    def _take_classes(self, rows: Tensor) -> None:
        """Give the classes other rows: `rows` (C',) is where each was; −1 for a new one."""
        self.class_counts = _taken(self.class_counts, rows)
        for name in self.class_buffers:
            self.register_buffer(name, _taken(self._buffers[name], rows))

    def _class_scores(self, embeddings: Tensor) -> Tensor:
        """How far each item is from each class, `(N, C)`."""
        raise NotImplementedError

    def _score_and_class(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Score and class index, `(N,)` each."""
        return self._class_scores(embeddings).min(dim=1)

    # What a family of detectors writes instead, to share work; each gets one or more of the family -------

    @classmethod
    def _fit_all(
        cls, detectors: Sequence[Self], embeddings: Tensor, labels: Tensor, class_weights: Tensor | None
    ) -> None:
        """`_fit` of each."""
        for detector in detectors:
            detector._fit(embeddings, labels, class_weights)

    @classmethod
    def _score_all(cls, detectors: Sequence[Self], embeddings: Tensor) -> list[tuple[Tensor, Tensor]]:
        """`_score_and_class` of each."""
        return [detector._score_and_class(embeddings) for detector in detectors]


@torch.no_grad()
def fit_together(
    detectors: Sequence[Detector],
    embeddings: ArrayLike | NeighborIndex,
    labels: ArrayLike,
    class_weights: ArrayLike | None,
) -> None:
    """`Detector.fit` of one or more of a family."""
    index = embeddings if isinstance(embeddings, NeighborIndex) else None
    embeddings = check_references(embeddings if index is None else index.references)
    present = None if index is None else index.present
    labels = check_labels(labels, embeddings, present)
    known = labels if present is None else labels[present]
    class_labels, inverse = known.long().unique(return_inverse=True)
    weights = [detector._checked_weights(class_weights, len(class_labels), embeddings) for detector in detectors]
    class_weights = weights[0]
    try:
        for detector in detectors:
            detector._buffers.clear()
            detector.register_buffer("class_labels", class_labels)
            detector.register_buffer("width", torch.tensor(embeddings.shape[1], device=embeddings.device))
            if detector.incremental:
                detector.register_buffer("class_counts", inverse.bincount())
        if detectors[0].searches_references:
            if index is None:
                index = NeighborIndex.of_copy(embeddings, inverse)
            else:
                inverse = torch.full_like(labels, -1, dtype=torch.long).masked_scatter(present, inverse)
            detectors[0]._fit_all(detectors, index, inverse, class_weights)
        else:
            embeddings = embeddings if present is None or bool(present.all()) else embeddings[present]
            detectors[0]._fit_all(detectors, embeddings, inverse, class_weights)
        for detector in detectors:
            detector._fitted()
    except BaseException:  # half of a fit is none
        for detector in detectors:
            detector._buffers.clear()
        raise


@torch.no_grad()
def predict_together(detectors: Sequence[Detector], embeddings: ArrayLike) -> list[tuple[Tensor, Tensor]]:
    """`Detector.predict` of one or more of a family that were fitted together."""
    first = detectors[0]
    if "class_labels" not in first._buffers:
        raise OsmlError(f"detector '{first.name}' is not fitted: call fit(embeddings, labels) first")
    home = embeddings.device if isinstance(embeddings, Tensor) else "cpu"
    embeddings = check_embeddings(embeddings).to(first.class_labels.device)
    check_width(embeddings, first)
    chunks = [first._score_all(detectors, e) for e in embeddings.split(first.chunk_size)]
    found = []
    for of_one in zip(*chunks, strict=True):
        scores, index = (torch.cat(parts) for parts in zip(*of_one, strict=True))
        found.append((first.class_labels[index].to(home), scores.float().to(home)))
    return found


def check_width(embeddings: Tensor, detector: Detector) -> None:
    if embeddings.shape[1] != detector.width:
        raise OsmlError(
            f"embeddings are {embeddings.shape[1]} wide, but the detector was fitted on {int(detector.width)}"
        )


def check_labels(labels: ArrayLike, embeddings: Tensor, present: Tensor | None = None) -> Tensor:
    """Integers `(N,)` beside `embeddings`, none of them `UNKNOWN` where `present` (everywhere, if it is not given)."""
    try:
        labels = torch.as_tensor(labels, device=embeddings.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OsmlError(f"labels must be integers, one for each embedding: {error}") from error
    if labels.shape != embeddings.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise OsmlError(
            f"labels must be integers of shape ({len(embeddings)},), one for each embedding; "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    labels = labels.long()  # first, because 255 in 8 bits without a sign equals −1 to PyTorch
    if len(embeddings) == 0:
        raise OsmlError("no embeddings to fit on: give at least one for each known class")
    if ((labels if present is None else labels[present]) == UNKNOWN).any():
        raise OsmlError(f"labels hold UNKNOWN ({UNKNOWN}): a detector learns known classes only, leave these out")
    return labels


def check_class_weights(weights: ArrayLike, n_classes: int, embeddings: Tensor) -> Tensor:
    """`(C, P, D)` finite float32 beside `embeddings`, of weights `(C, D)` or `(C, P, D)`."""
    try:
        weights = torch.as_tensor(weights, dtype=torch.float32, device=embeddings.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OsmlError(f"class weights must be numbers, a row a class: {' '.join(str(error).split())}") from error
    weights = weights[:, None] if weights.ndim == 2 else weights
    right = weights.ndim == 3 and weights.shape[::2] == (n_classes, embeddings.shape[1]) and weights.shape[1] > 0
    if not right:
        raise OsmlError(
            f"class weights must be of shape ({n_classes}, {embeddings.shape[1]}) or "
            f"({n_classes}, proxies, {embeddings.shape[1]}); got {tuple(weights.shape)}"
        )
    bad = ~weights.isfinite().all(dim=2).all(dim=1)
    if bad.any():
        raise OsmlError(
            f"class weights of {int(bad.sum())} of {n_classes} classes hold NaN or infinity, the first in row "
            f"{int(bad.nonzero()[0])}: look at the loss that they are of"
        )
    check_range(weights, "class weights")
    return weights.contiguous()  # so that a file, which always is, gives the very same scores


def class_means(embeddings: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Mean embedding of each class, `(C, D)` in the embeddings' precision, zeros where it has none; `labels` are in
    0..C-1."""
    sums = embeddings.new_zeros(n_classes, embeddings.shape[1]).index_add_(0, labels, embeddings)
    return sums / labels.bincount(minlength=n_classes).clamp_min(1)[:, None]


def _taken(buffer: Tensor, rows: Tensor) -> Tensor:
    taken = buffer[rows]
    taken[rows < 0] = 0
    return taken
