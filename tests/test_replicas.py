"""One truth: a replica that followed every write, one that looked now and then, one that starts now, and plain
dictionaries hold the same classes, references, thresholds and answers, whatever was written and in whatever order."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sphere_classes
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from serving import served

from osml_plugin import OpenSetRecognizer, OsmlError
from osml_plugin.gallery import Gallery
from osml_plugin.known_items import LabelledEmbeddings
from osml_plugin.serve.live import Live
from osml_plugin.serve.service import change_model
from osml_plugin.serve.settings import ServeConfig
from osml_plugin.serve.shelf import Shelf
from osml_plugin.serve.store import Group, NewItem, Observation, StaleModel, Store, Write, new_id
from osml_plugin.thresholds.ranks import enough, quantile

BY = Write("ann")
WIDTH = 8
NAMES = ["a", "b", "c", "x", "y", "/a"]
"""The first three are classes of the bundles; any of them may be enrolled, or given as a new name."""
RATES = [None, 0.05, 0.2, 0.02, 0.001]
"""At 0.02 all three classes are needed to promise it; nothing can promise 0.001."""
VERBS = [
    "enroll",
    "enroll near-copies",
    "observe",
    "enroll observations",
    "discover",
    "accept",
    "merge groups",
    "reject",
    "rename",
    "merge",
    "forget",
    "remove example",
    "rate",
    "model",
    "discard",
    "embed again",
]
POINTS = sphere_classes(n_classes=6, per_class=70, width=WIDTH, spread=0.12, seed=3)
QUERIES = POINTS[0][5::7]


def seen_by(model: int, vectors: np.ndarray) -> np.ndarray:
    """Embeddings by one of two models: the second turns them."""
    return np.roll(vectors, model, axis=-1)


def bundle(folder, model: int, **how) -> None:
    points, labels = torch.from_numpy(seen_by(model, POINTS[0].numpy())), POINTS[1].numpy()
    names = np.array(NAMES)[labels]
    known, held = labels < 3, np.arange(len(labels)) % 70 < 20
    recognizer = OpenSetRecognizer(**how)
    recognizer.fit(
        points[known & ~held],
        names[known & ~held],
        calibration=(points[known & held], names[known & held]),
        validation=(points[held & (labels < 4)], names[held & (labels < 4)]),
    )
    recognizer.save(folder / f"bundle{model}")


@dataclass
class Naive:
    """What was written, as plain dictionaries; and the recognizer that it comes to."""

    bundles: dict[str, OpenSetRecognizer]
    model: str
    alpha: float | None = None
    trained: dict[str, str | None] = field(default_factory=lambda: {name: name for name in NAMES[:3]})
    examples: dict[str, str] = field(default_factory=dict)
    embedded: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def give(self, old: str, new: str | None) -> None:
        for names in (self.trained, self.examples):
            for key, name in list(names.items()):
                if name == old:
                    names[key] = new
        self.examples = {id: name for id, name in self.examples.items() if name is not None}

    def recognizer(self) -> OpenSetRecognizer:
        base, rows = self.bundles[self.model], []
        for embedding, label in zip(base.gallery.embeddings, base.gallery.labels.tolist(), strict=True):
            rows.append((self.trained[base.gallery.classes[label]], embedding, False))
        for id in sorted(self.examples):
            if (id, self.model) in self.embedded:
                name, embedding = self.examples[id], torch.from_numpy(self.embedded[id, self.model].copy())
                near = [torch.dist(embedding, other) for of, other, _ in rows if of == name]
                if not near or min(near) > max(base.copy_radius, 1e-6):  # a near-copy adds nothing
                    rows.append((name, embedding, True))
        rows = [row for row in rows if row[0] is not None]
        ids = {name: i for i, name in enumerate(dict.fromkeys(name for name, _, _ in rows))}
        made = OpenSetRecognizer(base.detector.name, base.threshold.name, alpha=base.alpha)
        made.gallery = Gallery(
            torch.stack([embedding for _, embedding, _ in rows]),
            torch.tensor([ids[name] for name, _, _ in rows]),
            {i: name for name, i in ids.items()},
            torch.tensor([enrolled for _, _, enrolled in rows]),
            len(ids),
        )
        held = [self.trained[name] for name in base.calibration.names]
        kept = np.array([name is not None for name in held])
        made.calibration = LabelledEmbeddings(base.calibration.embeddings[kept], tuple(n for n in held if n))
        # Classes that are forgotten play the unknown, each by itself, when few examples are rehearsed.
        others = tuple(self.trained.get(name, name) or f"\n{name}" for name in base.validation.names)
        made.validation = LabelledEmbeddings(base.validation.embeddings, others)
        all_of_it = len(base.calibration.names)
        alpha = self.alpha if self.alpha is not None and enough(all_of_it, self.alpha) else base.alpha
        made.threshold.alpha = made.alpha = alpha
        made.refit()
        return made


class Endpoint:
    """A store, plain dictionaries of the same, and replicas: one that follows at once and one that is late."""

    def __init__(self, home, store: Store, shelf: Shelf, bundles: dict[str, OpenSetRecognizer]):
        self.home, self.store, self.shelf = home, store, shelf
        self.naive = Naive(bundles, store.state().model)
        self.at_once, self.late = Live(store, shelf), Live(store, shelf)
        self.unknown: dict[str, np.ndarray] = {}
        self.discovery: str | None = None
        self.random = np.random.default_rng(0)

    def new(self, kind: int, n: int, image: bool) -> tuple[list[NewItem], np.ndarray]:
        points = POINTS[0].numpy()[POINTS[1].numpy() == kind % 6]
        vectors = points[self.random.choice(len(points), n, replace=False)]
        rows = seen_by(self.number(), vectors)
        form = "application/x-vector"
        return [NewItem(r, v.tobytes() if image else None, form) for r, v in zip(rows, vectors, strict=True)], vectors

    def number(self, model: str | None = None) -> int:
        return list(self.naive.bundles).index(model or self.naive.model)

    def remember(self, ids: list[str], vectors: np.ndarray, image: bool) -> None:
        for id, vector in zip(ids, vectors, strict=True):
            for model in self.naive.bundles if image else [self.naive.model]:
                self.naive.embedded[id, model] = seen_by(self.number(model), vector)

    def do(self, verb: str, one: int, two: int, image: bool) -> None:
        """Some write; one that does not fit is refused and changes nothing."""
        store, naive = self.store, self.naive
        name, other = NAMES[one % 6], NAMES[two % 6]
        pool = sorted(self.unknown)
        if verb == "enroll":
            new, vectors = self.new(one, 1 + two % 8, image)
            ids = store.enroll(BY, name, new, naive.model).result["example_ids"]
            naive.examples |= dict.fromkeys(ids, name)
            self.remember(ids, vectors, image)
        elif verb == "enroll near-copies":
            ids = sorted(id for id, of in naive.examples.items() if of == name)
            examples = [naive.embedded[id, naive.model] for id in ids if (id, naive.model) in naive.embedded]
            if not examples:
                return
            rows = examples[0] + np.linspace(0.001, 0.002, WIDTH * (1 + two % 3), dtype="f4").reshape(-1, WIDTH)
            new = [NewItem(row, None, "application/x-vector") for row in rows]
            ids = store.enroll(BY, name, new, naive.model).result["example_ids"]
            naive.examples |= dict.fromkeys(ids, name)
            self.remember(ids, np.roll(rows, -self.number(), axis=-1), False)
        elif verb == "observe":
            new, vectors = self.new(one, 1 + two % 8, image)
            ids = [new_id() for _ in new]
            store.observe([Observation(i, n, naive.model, 1, "a", None) for i, n in zip(ids, new, strict=True)])
            self.unknown |= dict(zip(ids, vectors, strict=True))
            self.remember(ids, vectors, image)
        elif verb == "enroll observations":
            ids = store.enroll_observations(BY, name, pool[one % 4 :: 2]).result["example_ids"]
            self.enrolled(name, ids)
        elif verb == "discover":
            found = [Group(k, 0.5, tuple(ids), tuple(ids[:1])) for k, ids in enumerate((pool[::2], pool[1::2])) if ids]
            store.start_discovery(BY, {"n_classes": None, "seed": 0}, naive.model)
            job = store.claim_job("w", 60)
            assert store.finish_discovery(job.id, "w", found, {})
            self.discovery = job.id
        elif verb in ("accept", "merge groups", "reject"):
            if self.discovery is None:
                return
            if verb == "accept":
                self.enrolled(name, store.accept_group(BY, self.discovery, two % 2, name).result["example_ids"])
            elif verb == "merge groups":
                store.merge_groups(BY, self.discovery, one % 2, two % 2)
            else:
                store.reject_group(BY, self.discovery, one % 2)
        elif verb == "rename":
            store.rename(BY, name, other)
            naive.give(name, other)
        elif verb == "merge":
            store.merge(BY, name, other)
            naive.give(name, other)
        elif verb == "forget":
            store.forget(BY, name)
            naive.give(name, None)
        elif verb == "remove example":
            ids = sorted(naive.examples)
            if ids:
                id = ids[one % len(ids)]
                store.remove_example(BY, naive.examples[id], id)
                del naive.examples[id]
        elif verb == "rate":
            store.set_alpha(BY, RATES[one % len(RATES)])
            naive.alpha = RATES[one % len(RATES)]
        elif verb == "model":
            self.go_over(list(naive.bundles)[one % 2])
        elif verb == "discard":
            store.discard(BY, pool[one % 3 : one % 3 + 1])
            del self.unknown[pool[one % 3]]
        else:  # another replica has embedded the same items meanwhile, with other last digits
            ids = [id for id, model in naive.embedded if model == naive.model]
            store.add_embeddings(naive.model, {id: naive.embedded[id, naive.model] * np.float32(1.01) for id in ids})

    def enrolled(self, name: str, ids: list[str]) -> None:
        self.naive.examples |= dict.fromkeys(ids, name)
        for id in ids:
            self.unknown.pop(id)

    def go_over(self, model: str) -> None:
        """As a job does it: all that can be embedded by the other model is, and then it answers."""
        written = self.store.ask_model(BY, model, model, NAMES[:3])
        if written.result["state"] == "preparing":
            job = self.store.claim_job("w", 60)
            while batch := self.store.without_embedding(model, 5):
                vectors = {id: np.frombuffer(content, np.float32) for id, content in batch}
                self.store.add_embeddings(model, {i: seen_by(self.number(model), v) for i, v in vectors.items()})
            try:
                assert self.store.finish_model(job.id, model)
            except OsmlError as error:  # it would know too few of the classes
                self.store.fail_job(job.id, "w", str(error))
                raise
        self.naive.model = model

    def check(self, late: bool) -> None:
        """Everybody agrees."""
        followed, fresh = self.at_once.catch_up(), Live(self.store, self.shelf).snapshot
        same(followed, fresh)
        if late:
            same(self.late.catch_up(), fresh)
        as_naive(self.naive, fresh.recognizer)


def same(one, other) -> None:
    """Bit by bit."""
    for what in ("model", "gallery_version", "alpha", "trained"):
        assert getattr(one, what) == getattr(other, what)
    one, other = one.recognizer, other.recognizer
    for what in ("embeddings", "labels", "enrolled"):
        assert torch.equal(getattr(one.gallery, what), getattr(other.gallery, what)), what
    assert dict(one.gallery.classes) == dict(other.gallery.classes)
    assert (one.gallery.next_id, one.gallery.version) == (other.gallery.next_id, other.gallery.version)
    assert one.threshold.state() == other.threshold.state() and one.kept_rate == other.kept_rate
    for what in ("calibration_scores", "calibration_nearest", "enrolled_scores", "enrolled_nearest"):
        assert np.array_equal(getattr(one, what), getattr(other, what)), what
    assert str(one.guarantee) == str(other.guarantee) and one.n_left == other.n_left
    mine, theirs = one.recognize(QUERIES), other.recognize(QUERIES)
    assert (mine.names, mine.nearest, mine.neighbours) == (theirs.names, theirs.nearest, theirs.neighbours)
    for what in ("scores", "thresholds", "p_values"):
        assert np.array_equal(getattr(mine, what), getattr(theirs, what)), what


def as_naive(naive: Naive, found: OpenSetRecognizer) -> None:
    expected = naive.recognizer()

    def references(recognizer: OpenSetRecognizer) -> Counter:
        gallery = recognizer.gallery
        names = [gallery.classes[i] for i in gallery.labels.tolist()]
        rows = [row.numpy().tobytes() for row in gallery.embeddings]
        return Counter(zip(names, rows, gallery.enrolled.tolist(), strict=True))

    assert references(found) == references(expected) and set(found.class_names) == set(expected.class_names)
    if enough(len(expected.calibration_scores) or len(expected.enrolled_scores), expected.alpha):
        assert found.n_left is None
        assert found.kept_rate == expected.kept_rate
        assert found.threshold.tau == pytest.approx(expected.threshold.tau, rel=1e-4)
        assert found.class_thresholds == pytest.approx(expected.class_thresholds, rel=1e-4)
        assert np.allclose(np.sort(found.calibration_scores), np.sort(expected.calibration_scores), rtol=1e-4)
        assert np.allclose(np.sort(found.enrolled_scores), np.sort(expected.enrolled_scores), rtol=1e-4)
        mine, theirs = found.recognize(QUERIES), expected.recognize(QUERIES)
        clear = np.abs(theirs.scores - theirs.thresholds) > 1e-4
        assert [n for n, c in zip(mine.names, clear, strict=True) if c] == [
            n for n, c in zip(theirs.names, clear, strict=True) if c
        ]
    else:  # too few are left to promise anything: the bundle's own, at the same rate, stays
        assert found.n_left == len(expected.calibration_scores)
        base = naive.bundles[naive.model].calibration_scores
        if found.threshold.name == "conformal":
            assert found.threshold.tau == quantile(base, expected.alpha)
        assert "kept from before" in str(found.guarantee)
    assert math.isfinite(found.threshold.tau)
    assert np.isfinite(found.recognize(QUERIES).thresholds).all()


WAYS = {
    "knn": {"detector": "knn", "alpha": 0.05},
    "mahalanobis": {"detector": "mahalanobis", "alpha": 0.05},
    "by class": {"detector": "knn", "threshold": "class_conformal", "alpha": 0.1},
}


@pytest.fixture(scope="module", params=WAYS)
def room(request, tmp_path_factory):
    """Two bundles, their shelf, and a store that knows both and that nobody has written to."""
    room = tmp_path_factory.mktemp("room")
    with closing(Store(f"sqlite:///{room}/store.db")) as store:
        shelf = Shelf(room)
        for model in (0, 1):
            bundle(room, model, **WAYS[request.param])
        addresses = [shelf.resolve(str(room / f"bundle{model}")) for model in (0, 1)]
        for address in (*addresses, addresses[0]):
            change_model(store, shelf, BY, address)
    return room, shelf, {address.version: shelf.load(address.version) for address in addresses}


steps = st.tuples(st.sampled_from(VERBS), st.integers(0, 11), st.integers(0, 11), st.booleans())


@given(st.lists(steps, min_size=6, max_size=14))
@example([("enroll", 3, 5, True), ("rename", 3, 4, True)])
@example([("rename", 0, 4, True), ("enroll", 3, 0, True)])
@example([("observe", 4, 5, True), ("enroll", 3, 5, True), ("enroll observations", 3, 0, True)])
@example([("enroll", 3, 2, True), ("enroll near-copies", 3, 2, True), ("remove example", 0, 0, True)])
@example([("enroll", 3, 5, True), ("enroll", 4, 5, True), ("merge", 4, 3, True)])
@example([("observe", 3, 7, True), ("discover", 0, 0, True), ("accept", 3, 0, True), ("rename", 3, 5, True)])
@example([("rate", 3, 0, True), ("forget", 0, 0, True), ("enroll", 3, 5, True), ("forget", 1, 0, True)])
@example([("forget", 0, 0, True), ("enroll", 5, 5, True), ("enroll", 0, 5, True)])
@example([("enroll", 3, 7, True), ("enroll", 4, 7, True), *(("forget", i, 0, True) for i in range(3))])
@example([("enroll", 3, 1, True), ("observe", 4, 5, True), ("embed again", 0, 0, True), ("model", 1, 0, True)])
@example(
    [
        ("enroll", 3, 0, False),
        ("enroll", 4, 0, False),
        ("model", 1, 0, True),
        *(("forget", i, 0, True) for i in range(3)),
    ]
)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_after_every_write_all_replicas_are_the_same_and_are_what_was_written(room, tmp_path_factory, sequence):
    home, shelf, bundles = room
    place = tmp_path_factory.mktemp("store")
    shutil.copyfile(home / "store.db", place / "store.db")
    with closing(Store(f"sqlite:///{place}/store.db")) as store:
        endpoint = Endpoint(place, store, shelf, bundles)
        for number, step in enumerate(sequence):
            version = store.state().gallery_version
            try:
                endpoint.do(*step)
            except (OsmlError, StaleModel):
                assert store.state().gallery_version == version
            endpoint.check(late=number % 3 == 2)


def test_a_store_that_is_put_back_is_followed(room, tmp_path):
    """An earlier copy in the place of the file, while replicas run."""
    home, shelf, _ = room
    here, copy = tmp_path / "store.db", tmp_path / "copy.db"
    shutil.copyfile(home / "store.db", here)
    with closing(Store(f"sqlite:///{here}")) as store:
        model, row = store.state().model, POINTS[0][-1].numpy()
        store.enroll(BY, "x", [NewItem(row)], model)
        store.copy_to(copy)
        store.enroll(BY, "y", [NewItem(row)], model)
        store.rename(BY, "a", "b2")
        replica = Live(store, shelf)
        for part in ("", "-wal", "-shm"):
            Path(f"{here}{part}").unlink(missing_ok=True)
        copy.rename(here)
        same(replica.catch_up(), Live(store, shelf).snapshot)
        assert set(replica.snapshot.recognizer.class_names) == {"a", "b", "c", "x"}
        store.enroll(BY, "/a", [NewItem(row)], model)
        same(replica.catch_up(), Live(store, shelf).snapshot)


def test_classes_whose_ids_are_large_numbers_can_be_served(tmp_path):
    """Article numbers, say, which stay the ids of their classes."""
    points, labels, _ = sphere_classes(n_classes=4, per_class=30, width=WIDTH, spread=0.12)
    ids = np.array([7, 8, 2**31 - 1, 4006381333931])[labels.numpy()]
    OpenSetRecognizer().fit(points, ids).save(tmp_path / "bundle")
    with served(ServeConfig(model=str(tmp_path / "bundle"), home=tmp_path / "home"), jobs=False) as (_, client):
        client.merge("7", "4006381333931")
        client.forget("8")
        found = {c.name: c.trained for c in client.classes().classes}
        assert found.keys() == {"2147483647", "4006381333931"} and found["4006381333931"] > found["2147483647"]
