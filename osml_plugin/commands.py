"""What the commands do with a bundle, as plain typed functions: paths in, results out, nothing printed but progress.

The one that makes the bundle, `train`, is in `pipeline.py`.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import UNKNOWN, detectors
from .bundle import bundle_lock, load_bundle, read_manifest, save_bundle
from .data import Items, Split, check_pictures, open_items, readable_items, test_indices, write_embeddings
from .data.likeness import signatures
from .data.pixels import ON_WHITE, Rendering
from .embedding import default_device, embed_dataset
from .errors import OsmlError
from .preprocessing import rendering_of
from .presence import is_model_uri
from .recognizer import OpenSetRecognizer, Recognition

if TYPE_CHECKING:
    from .checkpoints import Checkpoint
    from .discovery import Discovery, Identities, Update
    from .evaluation import Evaluation
    from .jacobian_diagnostics import Diagnostics, Network
    from .metrics import DiscoveryMetrics

# What only one of the functions needs is imported in it: scikit-learn, SciPy and PML take seconds.

logger = logging.getLogger(__name__)


def evaluate(
    model: str | Path | OpenSetRecognizer,
    data: str | Path,
    *,
    split: str | Path | Split | None = None,
    alpha: float | None = None,
    skip_bad: bool = False,
    factories: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> tuple[Evaluation, Items]:
    """Test a bundle on the items of `data` that it has not seen; the items that were tested come with it.

    Tested is every item that the bundle was not trained, calibrated, validated or enrolled on; where the data declare
    a test role, of these. Pseudo-unknown classes take no part: they were chosen by. `split` limits the classes to
    those that it names; without it every class that the bundle does not know is unknown. `alpha` has the threshold
    fitted again, on the bundle's own calibration items, at another rate.
    """
    from .evaluation import evaluate_embeddings

    recognizer = open_recognizer(model, factories)
    if alpha is not None:
        recognizer = copy(recognizer).keep_rate(alpha)  # whoever passed one keeps it as it was
    items = _test_items(recognizer, open_items(data), data, split, skip_bad, progress)
    embeddings = recognizer.embed(_inputs(items), progress="embedding" if progress else None)
    return evaluate_embeddings(recognizer, embeddings, items.labels, seed=seed), items


def predict(
    model: str | Path | OpenSetRecognizer,
    paths: Sequence[str | Path],
    *,
    neighbours: int = 3,
    skip_bad: bool = False,
    factories: Sequence[str] = (),
    progress: bool = True,
) -> tuple[Recognition, Items]:
    """Recognise images, folders of images, or embeddings files; the items come with the answer, in order."""
    recognizer = open_recognizer(model, factories)
    items, _ = readable_items(_collect(paths), skip_bad, progress)
    bar = "recognising" if progress else None
    return recognizer.predict(_inputs(items), neighbours=neighbours, progress=bar), items


def embed(
    model: str | Path | OpenSetRecognizer,
    data: str | Path,
    out: str | Path,
    *,
    skip_bad: bool = False,
    factories: Sequence[str] = (),
    progress: bool = True,
) -> int:
    """Write the embeddings of a folder or manifest to an `.npz` or `.safetensors` file; returns how many."""
    recognizer = open_recognizer(model, factories)
    items, embeddings = _embedded(recognizer, open_items(data, labelled=False), skip_bad, progress)
    write_embeddings(out, embeddings.numpy(), items.labels, paths=items.paths)
    return len(items)


@dataclass(frozen=True)
class DiscoverResult:
    """Proposed classes among N items, and how well they match labels where the source has some."""

    source: Path
    """Where the items come from."""
    items: Items
    """Those that were grouped."""
    names: tuple[str, ...]
    """`(N,)` the file of each, or its place in a source without files; a file that is there twice has its place with
    it."""
    embeddings: torch.Tensor
    """`(N, D)`"""
    nearest: tuple[str, ...]
    """`(N,)` the known class that each is nearest to."""
    references: torch.Tensor
    """`(R, D)` the known items of the gallery."""
    groups: Discovery
    method: str
    """As it was asked for."""
    n_recognised: int
    """Items of the source that were not grouped, because they were recognised as known."""
    update: Update
    """The groups' ids, which last from run to run, and what became of earlier ones."""
    follows: bool
    """Whether there was an earlier run."""
    metrics: DiscoveryMetrics | None
    rendering: Rendering = ON_WHITE
    """Rule by which the recognizer sees image files."""

    @property
    def ids(self) -> list[int]:
        """The id of each group; without an earlier run its number."""
        return self.update.ids.tolist()

    def members(self, group: int) -> np.ndarray:
        """The places, among the N, of a group's items; of −1 those of the items left out."""
        return np.flatnonzero(self.groups.labels == group)

    def nearest_known(self, members: np.ndarray) -> list[tuple[str, int]]:
        """The known classes that these are nearest to, and how many of them are, the most frequent first."""
        return Counter(self.nearest[i] for i in members).most_common()

    @cached_property
    def short_names(self) -> list[str]:
        """The names as seen from the source."""
        return [_short(name, self.source) for name in self.names]

    def to_dict(self) -> dict[str, Any]:
        """The object that `osml discover --json` prints."""
        from .metrics.discovery import LEFT_OUT

        found, names = self.groups, self.names
        groups = []
        for group, exemplars in enumerate(found.exemplars):
            members = self.members(group)
            nearest, n_nearest = self.nearest_known(members)[0]
            groups.append(
                {
                    "group": self.ids[group],
                    "size": len(members),
                    "confidence": float(found.group_confidence[group]),
                    "nearest_known": nearest,
                    "nearest_known_share": n_nearest / len(members),
                    "exemplars": [names[i] for i in exemplars],
                    "members": [names[i] for i in members],
                    "member_confidence": found.confidence[members].round(4).tolist(),
                }
            )
        left_out = self.members(LEFT_OUT)
        return {
            "n_items": len(self.items),
            "n_recognised": self.n_recognised,
            "n_classes": found.n_classes,
            "n_classes_interval": list(found.n_classes_interval),
            "method": self.method,
            "granularity": found.granularity,
            "granularity_source": found.granularity_source,
            "groups": groups,
            "left_out": [names[i] for i in left_out],
            "left_out_known_class": [None if c is None else str(c) for c in found.known_class[left_out]],
            "too_few": [names[i] for i in np.flatnonzero(found.too_few)],
            "lacking": found.lacking,
            "note": found.note,
            "changes": self.update.sentences() if self.follows else [],
            "metrics": self.metrics.to_dict() if self.metrics else None,
        }


def discover(
    model: str | Path | OpenSetRecognizer,
    data: str | Path,
    *,
    n_classes: int | None = None,
    method: str = "auto",
    granularity: float | None = None,
    must_link: Sequence[Sequence[str]] = (),
    cannot_link: Sequence[Sequence[str]] = (),
    previous: Identities | None = None,
    everything: bool = False,
    seed: int = 0,
    skip_bad: bool = False,
    factories: Sequence[str] = (),
    progress: bool = True,
) -> DiscoverResult:
    """Group the items of `data` that the recognizer rejects (or, with `everything`, all of them) into new classes.

    `n_classes`, `method`, `granularity` and `seed` are those of `osml_plugin.discovery.discover`. So are the links, but
    for their pairs being of files, as the source names them or below it; or of places in a source without files.

    Args:
        previous: What an earlier run left (`DiscoverResult.update.identities`): groups that continue one keep its id.
    """
    from .discovery import Constraints, Identities, identify, methods

    if method != "auto":
        methods.create(method)  # a wrong name is to be told before the work, and so are wrong links
    items = open_items(data, labelled=False)
    names = _names(items)
    links = {"must_link": _placed(must_link, names, Path(data)), "cannot_link": _placed(cannot_link, names, Path(data))}
    Constraints.of(**links, n_items=len(items))
    recognizer = open_recognizer(model, factories)
    readable, survey = readable_items(items, skip_bad, progress)
    places = np.arange(len(items)) if survey is None else survey.good
    embeddings = recognizer.embed(_inputs(readable), progress="embedding" if progress else None)
    answer = recognizer.recognize(embeddings, neighbours=0)
    kept = np.arange(len(readable)) if everything else np.flatnonzero(answer.labels == UNKNOWN)
    if not len(kept):
        raise OsmlError(f"all {len(readable)} items of '{data}' are recognised as known: nothing is left to group")
    chosen, keys = readable.select(kept), [names[i] for i in places[kept]]
    how = {"n_classes": n_classes, "method": method, "granularity": granularity, "seed": seed}
    links = {kind: _among(pairs, places[kept], names) for kind, pairs in links.items()}
    groups = recognizer.group(embeddings[kept], **how, **links)
    metrics = None
    if chosen.labels is not None:
        from .metrics import discovery_metrics

        metrics = discovery_metrics(chosen.labels, groups.labels)
    return DiscoverResult(
        source=Path(data),
        items=chosen,
        names=tuple(keys),
        embeddings=embeddings[kept],
        nearest=tuple(answer.nearest[i] for i in kept),
        references=recognizer.gallery.embeddings,
        groups=groups,
        method=method,
        n_recognised=len(readable) - len(kept),
        update=identify(previous or Identities(), _lasting(keys, items), groups.labels),
        follows=previous is not None,
        metrics=metrics,
        rendering=rendering_of(recognizer.preprocessing),
    )


def _names(items: Items) -> list[str]:
    """Each item's file, or else its place in the source; a file that is there twice has its place with it."""
    names = [str(name) for name in (range(len(items)) if items.paths is None else items.paths)]
    times = Counter(names)
    return [name if times[name] == 1 else f"{name}#{i}" for i, name in enumerate(names)]


def _lasting(names: list[str], items: Items) -> list[str]:
    """The names by which items are known to later runs, from wherever these are started."""
    return names if items.paths is None else [os.path.abspath(name) for name in names]


def _short(name: str, source: Path) -> str:
    """The name of an item as seen from the source."""
    folder = source if source.is_dir() else source.parent
    return str(Path(name).relative_to(folder)) if Path(name).is_relative_to(folder) else name


def _placed(pairs: Sequence[Sequence[str]], names: list[str], source: Path) -> list[list[int]]:
    """Pairs of items by name, as listed or as seen from the source, as pairs of their places in it."""
    if not pairs:
        return []
    places = {_short(name, source): i for i, name in enumerate(names)} | {name: i for i, name in enumerate(names)}
    for name in (name for pair in pairs for name in pair):
        if name not in places:
            raise OsmlError(
                f"'{name}' of the links is none of the {len(names)} items of '{source}': name a file as --json lists it"
            )
    return [[places[a], places[b]] for a, b in pairs]


def _among(pairs: list[list[int]], kept: np.ndarray, names: list[str]) -> list[list[int]]:
    """Pairs of places in the source as pairs of places among the items that are `kept` `(N,)`."""
    place = {int(i): n for n, i in enumerate(kept)}
    for i in (i for pair in pairs for i in pair):
        if i not in place:
            raise OsmlError(
                f"'{names[i]}' of the links is not grouped, for it was recognised as known, or cannot be read: pass "
                "--all, or take the link back"
            )
    return [[place[a], place[b]] for a, b in pairs]


def enroll(
    model: str | Path,
    name: str,
    paths: Sequence[str | Path],
    *,
    skip_bad: bool = False,
    factories: Sequence[str] = (),
    progress: bool = True,
) -> OpenSetRecognizer:
    """Teach a bundle a class, or more of one, from images, folders or an embeddings file; it is changed in place."""
    _check_changeable(model)
    rendering = rendering_of(read_manifest(model).preprocessing)
    items, survey = readable_items(_collect(paths), skip_bad, progress, rendering.background)
    if survey is not None:
        check_pictures(items, survey, rendering.bit_depth)
    with bundle_lock(model):
        recognizer = load_bundle(model, factories=factories)
        recognizer.enroll(name, _inputs(items))
        if recognizer.seen is not None:
            recognizer.seen = recognizer.seen.joined(signatures(items, None if survey is None else survey.signatures))
        seen = set(recognizer.details.get("seen", [])) | {int(f) for f in items.fingerprints()}
        recognizer.details = recognizer.details | {"seen": sorted(seen)}
        save_bundle(recognizer, model)
    return recognizer


def forget(model: str | Path, name: str, *, factories: Sequence[str] = ()) -> OpenSetRecognizer:
    """Make a bundle forget a class; it is changed in place."""
    _check_changeable(model)
    with bundle_lock(model):
        recognizer = load_bundle(model, factories=factories)
        recognizer.forget(name)
        save_bundle(recognizer, model)
    return recognizer


REFERENCES = 100
"""Items of each class that the detector of a checkpoint is fitted on."""


def jacobian(
    model: str | Path | OpenSetRecognizer,
    data: str | Path,
    *,
    split: str | Path | Split | None = None,
    n_projections: int | None = None,
    before_norm: bool = False,
    max_items: int = 500,
    seed: int = 0,
    skip_bad: bool = False,
    factories: Sequence[str] = (),
    progress: bool = True,
) -> Diagnostics:
    """The Jacobian norm of known and of unknown items over the checkpoints of a bundle's training, or, where there are
    none, of its final model.

    Looked at are the items that `evaluate` would test, at most `max_items` known and as many unknown ones, drawn by
    `seed`. The detector is the bundle's; that of a checkpoint is fitted again, on the items of `data` that the bundle
    has seen.

    Args:
        n_projections: estimate the norm from so many projections; None = exact.
        before_norm: of the embedding before it is brought to unit norm.
        split, skip_bad, factories: as for `evaluate`.
    """
    from .checkpoints import find_checkpoints
    from .jacobian_diagnostics import Network, diagnose

    recognizer = open_recognizer(model, factories)
    if recognizer.model is None:
        raise OsmlError("the Jacobian norm is of a network, and this bundle has none: it takes embeddings as they are")
    items = open_items(data)
    if (items.embeddings is None) != (recognizer.preprocessing is not None):
        kind = "images" if recognizer.preprocessing is not None else "embeddings"
        raise OsmlError(f"this bundle's network takes {kind}: give the {kind} that it was trained on, or alike")
    ids = {name: i for i, name in recognizer.gallery.classes.items()}
    tested = _test_items(recognizer, items, data, split, skip_bad, progress)
    unknown = np.array([name not in ids for name in tested.labels])
    draw = np.random.default_rng(seed)
    kinds = [draw.permutation(np.flatnonzero(of))[:max_items] for of in (~unknown, unknown)]
    if not len(kinds[0]):
        raise OsmlError(
            f"'{data}' holds no item of a known class that the bundle has not seen: nothing to compare with"
        )
    tested = tested.select(np.sort(np.concatenate(kinds)))
    labels = np.array([ids.get(name, UNKNOWN) for name in tested.labels])
    checkpoints = []
    if not isinstance(model, OpenSetRecognizer) and not is_model_uri(model):
        checkpoints = find_checkpoints(model, recognizer.details)
    if checkpoints:
        networks = _trained_networks(recognizer, checkpoints, _references(recognizer, items, data, skip_bad))
    else:
        networks = [Network(None, recognizer.model, recognizer.detector)]
    how = {"n_projections": n_projections, "before_norm": before_norm, "seed": seed, "progress": progress}
    return diagnose(networks, len(checkpoints) or 1, _network_inputs(recognizer, tested), labels, **how)


def _references(recognizer: OpenSetRecognizer, items: Items, data: str | Path, skip_bad: bool) -> Items:
    """Of the items that a bundle has seen, some of each class of its training."""
    names = [recognizer.gallery.classes[i] for i in recognizer.proxy_ids if i in recognizer.gallery.classes]
    seen = np.isin(items.fingerprints(), np.array(recognizer.details.get("seen", []), dtype=np.uint64))
    of_class = {name: seen & (np.array(items.labels) == name) for name in names}
    if missing := [name for name, of in of_class.items() if not of.any()]:
        raise OsmlError(
            f"'{data}' holds nothing of class '{missing[0]}' that the bundle was trained on, and the detector of a "
            "checkpoint is fitted on such items: give the data of the training"
        )
    few = np.concatenate([np.flatnonzero(of)[:REFERENCES] for of in of_class.values()])
    return readable_items(items.select(np.sort(few)), skip_bad, progress=False)[0]


def _trained_networks(
    recognizer: OpenSetRecognizer, checkpoints: Sequence[Checkpoint], references: Items
) -> Iterator[Network]:
    """The network of each checkpoint, with the bundle's detector fitted on what it makes of the references."""
    from .jacobian_diagnostics import Network

    ids = {name: i for i, name in recognizer.gallery.classes.items()}
    labels = np.array([ids[name] for name in references.labels])
    inputs, device = _network_inputs(recognizer, references), default_device()
    kept = [row for row, i in enumerate(recognizer.proxy_ids) if i in recognizer.gallery.classes]
    for checkpoint in checkpoints:
        model, class_weights = checkpoint.load(recognizer.model)
        embeddings, _ = embed_dataset(model, inputs, device=device)
        detector = detectors.create(recognizer.detector.name, **recognizer.detector.params)
        weights = class_weights[kept] if detector.needs_class_weights else None
        yield Network(checkpoint.epoch, model, detector.fit(embeddings, labels, weights))


def _network_inputs(recognizer: OpenSetRecognizer, items: Items) -> Any:
    """A dataset of what the network takes."""
    if items.embeddings is not None:
        return torch.from_numpy(items.embeddings)
    return recognizer.preprocessing.dataset(items.paths)


def _test_items(
    recognizer: OpenSetRecognizer,
    items: Items,
    data: str | Path,
    split: str | Path | Split | None,
    skip_bad: bool,
    progress: bool,
) -> Items:
    """Readable items of `data` that `evaluate` tests: none that the recognizer has seen, in whatever file format."""
    known = recognizer.class_names
    stored = Split.from_dict(recognizer.details["split"]) if "split" in recognizer.details else Split(tuple(known))
    held_out = [c for c in stored.pseudo_unknown if c not in known]
    if split is not None:
        split = split if isinstance(split, Split) else Split.load(split)
        split.check(items.class_names())
        for name in split.known:
            recognizer.gallery.id_of(name)
        named = {*split.known, *split.unknown}
        held_out += [c for c in items.class_names() if c not in named]
    seen = np.array(recognizer.details.get("seen", []), dtype=np.uint64)
    items = items.select(test_indices(items, known, held_out, seen=seen))
    if len(items):
        background = rendering_of(recognizer.preprocessing).background
        items, survey = readable_items(items, skip_bad, progress, background)
        items = _unseen(recognizer, items, None if survey is None else survey.signatures)
    if len(items) == 0:
        raise OsmlError(f"'{data}' holds nothing to test on: all of it was used to train, or its classes are held out")
    return items


def _unseen(recognizer: OpenSetRecognizer, items: Items, of_images: np.ndarray | None) -> Items:
    """The items that are no near-copies of what the recognizer has seen."""
    if recognizer.seen is None:
        return items
    seen = recognizer.seen.holds(signatures(items, of_images))
    if seen.any():
        logger.warning(
            "%d of %d items are near-copies of items that were used to train: they are not tested",
            seen.sum(),
            len(seen),
        )
    return items.select(np.flatnonzero(~seen))


def _embedded(
    recognizer: OpenSetRecognizer, items: Items, skip_bad: bool, progress: bool
) -> tuple[Items, torch.Tensor]:
    """The readable items and their embeddings."""
    items, _ = readable_items(items, skip_bad, progress)
    return items, recognizer.embed(_inputs(items), progress="embedding" if progress else None)


def _collect(paths: Sequence[str | Path]) -> Items:
    """Everything that paths name, in order."""
    if not paths:
        raise OsmlError("no images given: name image files, folders of images, or an embeddings file")
    found = [open_items(p, labelled=False) for p in paths]
    if len(found) == 1:
        return found[0]
    if any(f.embeddings is not None for f in found):
        raise OsmlError("an embeddings file stands alone: name one, or images and folders")
    return Items(None, tuple(p for f in found for p in f.paths), None, None)


def _inputs(items: Items) -> Any:
    return items.paths if items.embeddings is None else items.embeddings


def open_recognizer(model: str | Path | OpenSetRecognizer, factories: Sequence[str]) -> OpenSetRecognizer:
    """Of a bundle, a registered model (`models:/NAME@champion`), or as it is."""
    if isinstance(model, OpenSetRecognizer):
        return model
    if is_model_uri(model):
        from .tracking import download_bundle

        model = download_bundle(str(model))
    return load_bundle(model, factories=factories)


def _check_changeable(model: str | Path) -> None:
    if is_model_uri(model):
        raise OsmlError(
            f"'{model}' is a registered model, and these never change: download it (mlflow artifacts download -u MODEL "
            "-d FOLDER) and teach the bundle in it"
        )
