"""What is recognised after enrolment: new classes by name, old ones, the rate, and what nobody ever met.

python benchmarks/discovery/enrolment.py [--sets digits …] [--draws 5 6 …] [--cache DIR] [--json FILE]

A quarter of a draw's unknown classes is never met. The items of the others are halved: one half is the pool, with
wrongly rejected known items in it; the other is the test. The recogniser is fitted on the trained items and its rate on
half of the held-out known ones; a quarter of these and the pseudo-unknown classes are its validation, the last quarter
is the test of the old classes. Then

- before: nothing is enrolled;
- discovered: the pool is grouped, and each group enrolled under the name that most of its items have;
- discovered, sure: the same, members of a confidence below 0.9 skipped;
- by hand, m: m examples of each new class are drawn from the pool; m = all: what labels for everything would give.

Shares, as means over the draws (and over the examples drawn): of test items of new classes that get their name and that
are rejected; of old ones likewise (rejected: to be at most alpha); of classes never met that are rejected.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from data import SETS, Draw, draw
from tqdm import tqdm

from osml_plugin import UNKNOWN, OpenSetRecognizer, detectors
from osml_plugin.discovery import Discovery
from osml_plugin.selection import Cached, candidates, select

DETECTORS = ("knn", "mahalanobis", "centroid", "auto")
SHOTS = (1, 5, 20, None)
SEEDS = 3
"""Of the examples by hand."""
SURE = 0.9
MOST = 6000
"""Items of a kind; of more, so many are drawn. It keeps a run to minutes."""


@dataclass(frozen=True)
class Part:
    """Embeddings `(N, D)` and classes `(N,)`."""

    embeddings: np.ndarray
    classes: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> Part:
        return Part(self.embeddings[rows], self.classes[rows])

    def __len__(self) -> int:
        return len(self.classes)


@dataclass(frozen=True)
class Cut:
    """A draw, cut into what a recogniser is given, what it meets, and what it is tested by."""

    train: Part
    calibration: Part
    validation: Part
    """Known and pseudo-unknown items."""
    pool: Part
    """Half of the new classes, and known items that were wrongly rejected."""
    old: Part
    new: Part
    never: Part
    new_classes: np.ndarray


def cut(given: Draw, seed: int) -> Cut:
    rng = np.random.default_rng(seed)

    def some(part: Part) -> Part:
        return part[rng.permutation(len(part))[:MOST]]

    unknown = rng.permutation(np.unique(given.classes[~given.is_old]))
    never, new = np.split(unknown, [max(1, len(unknown) // 4)])
    items = some(Part(given.items, given.classes))
    known = some(Part(given.references[given.in_gallery], given.reference_classes[given.in_gallery]))
    pseudo = some(Part(given.references[~given.in_gallery], given.reference_classes[~given.in_gallery]))
    calibration, validation, old = (
        known[rows] for rows in np.split(np.arange(len(known)), [len(known) // 2, 3 * len(known) // 4])
    )
    met = items[~np.isin(items.classes, never)]
    half = len(met) // 2
    return Cut(
        train=some(Part(given.train, given.train_classes)),
        calibration=calibration,
        validation=Part(
            np.concatenate([validation.embeddings, pseudo.embeddings]),
            np.concatenate([validation.classes, pseudo.classes]),
        ),
        pool=met[:half],
        old=old,
        new=met[half:][np.isin(met.classes[half:], new)],
        never=items[np.isin(items.classes, never)],
        new_classes=new,
    )


def recognizer_of(parts: Cut, detector: str, alpha: float) -> OpenSetRecognizer:
    """Fitted on the trained items; 'auto' is what validation chooses, as training does."""
    train, validation = parts.train, parts.validation
    chosen = detectors.create(detector) if detector != "auto" else _chosen(train, validation)
    return OpenSetRecognizer(chosen, alpha=alpha).fit(
        train.embeddings,
        train.classes,
        calibration=(parts.calibration.embeddings, parts.calibration.classes),
        validation=(validation.embeddings, validation.classes),
    )


def _chosen(train: Part, validation: Part) -> detectors.Detector:
    labels = np.where(np.isin(validation.classes, train.classes), validation.classes, UNKNOWN)
    embeddings = {"train": torch.from_numpy(train.embeddings), "validation": torch.from_numpy(validation.embeddings)}
    best = select({"embedding": Cached(embeddings)}, train.classes, labels, candidates(), progress=False)[0]
    return detectors.create(best.detector, **best.params)


def names_of_groups(discovery: Discovery, pool: Part) -> dict[int, str]:
    """The class that most items of each group have."""
    of = {g: pool.classes[discovery.labels == g] for g in range(discovery.n_classes)}
    return {g: str(np.bincount(classes).argmax()) for g, classes in of.items()}


def by_hand(parts: Cut, shots: int | None, seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    examples = {}
    for c in parts.new_classes:
        of_class = rng.permutation(np.flatnonzero(parts.pool.classes == c))[:shots]
        if len(of_class):
            examples[str(c)] = torch.from_numpy(parts.pool.embeddings[of_class])
    return examples


def measured(recognizer: OpenSetRecognizer, parts: Cut) -> dict[str, float]:
    old, new, never = (
        recognizer.predict(part.embeddings, neighbours=0) for part in (parts.old, parts.new, parts.never)
    )
    named = {
        kind: [name == str(c) for name, c in zip(found.names, part.classes, strict=True)]
        for kind, found, part in (("old", old, parts.old), ("new", new, parts.new))
    }
    return {
        "new named": float(np.mean(named["new"])),
        "new rejected": float(np.mean(new.labels == UNKNOWN)),
        "old named": float(np.mean(named["old"])),
        "old rejected": float(np.mean(old.labels == UNKNOWN)),
        "never rejected": float(np.mean(never.labels == UNKNOWN)),
    }


def apart(recognizer: OpenSetRecognizer) -> OpenSetRecognizer:
    """Another one, to learn while this one stays as it is."""
    other = copy(recognizer)
    other.threshold = deepcopy(recognizer.threshold)  # it is fitted in place
    return other


def enrolled(
    recognizer: OpenSetRecognizer, parts: Cut, discovery: Discovery
) -> Iterator[tuple[str, OpenSetRecognizer]]:
    """What there is before and after each way of enrolment."""
    yield "before", recognizer
    names = names_of_groups(discovery, parts.pool)
    for way, least in (("discovered", None), ("discovered, sure", SURE)):
        grown = apart(recognizer)
        sure = {g: n for g, n in names.items() if discovery.confidence[discovery.labels == g].max() >= (least or 0)}
        grown.enroll_groups(parts.pool.embeddings, discovery, sure, min_confidence=least)
        yield way, grown
    for shots in SHOTS:
        for seed in range(SEEDS if shots else 1):
            yield f"by hand, {shots or 'all'}", apart(recognizer).learn(by_hand(parts, shots, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--draws", nargs="+", type=int, default=[5, 6, 7, 8, 9])
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keeps the embeddings of the draws")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every row, before means are taken")
    arguments = parser.parse_args()

    rows = []
    with tqdm(total=len(arguments.sets) * len(arguments.draws) * len(DETECTORS), desc="enrolment") as bar:
        for name in arguments.sets:
            for number in arguments.draws:
                parts, discovery = cut(draw(name, number, arguments.cache), number), None
                for detector in DETECTORS:
                    recognizer = recognizer_of(parts, detector, arguments.alpha)
                    if discovery is None:  # it is the same for all detectors
                        discovery = recognizer.discover(parts.pool.embeddings)
                    which = {"set": name, "draw": number, "detector": detector, "chosen": recognizer.detector.name}
                    for way, grown in enrolled(recognizer, parts, discovery):
                        rows.append(which | {"way": way} | measured(grown, parts))
                    bar.update()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    table = pd.DataFrame(rows).drop(columns=["draw", "chosen"])
    print(table.groupby(["set", "detector", "way"], sort=False).mean().to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
