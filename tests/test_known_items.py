"""Known items come into a recognizer once each, in one role, and calibration has the classes' proportions."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osml_plugin import UNKNOWN, OpenSetRecognizer
from osml_plugin.errors import OsmlError
from osml_plugin.known_items import held_out

CLASSES, WIDTH = 6, 12


def drawn(labels, seed=0):
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(9).normal(size=(CLASSES + 3, WIDTH)) * 2.5
    return (centers[labels] + rng.normal(size=(len(labels), WIDTH))).astype(np.float32)


LABELS = np.repeat(np.arange(CLASSES), 50)
ITEMS, NEW = drawn(LABELS), drawn(np.repeat(np.arange(CLASSES), 200), seed=1)


def same(a, b):
    """Two recognizers give one answer."""
    assert a.threshold.tau == b.threshold.tau and str(a.guarantee) == str(b.guarantee)
    first, second = a.predict(NEW), b.predict(NEW)
    assert (first.labels == second.labels).all() and (first.scores == second.scores).all()


@pytest.mark.parametrize("times", [2, 3, 7])
def test_rows_that_occur_more_than_once_change_nothing(times, caplog):
    once = OpenSetRecognizer("knn").fit(ITEMS, LABELS)
    with caplog.at_level(logging.WARNING):
        same(once, OpenSetRecognizer("knn").fit(np.repeat(ITEMS, times, 0), np.repeat(LABELS, times)))
    n = len(ITEMS)
    assert f"{n * (times - 1)} of {n * times} reference items are near-copies of others" in caplog.text


@pytest.mark.parametrize("noise", [1e-6, 1e-4, 1e-2])
def test_the_rate_holds_for_items_with_noisy_copies(noise):
    noisy = np.repeat(ITEMS, 5, 0) * (1 + noise * np.random.default_rng(2).normal(size=(5 * len(ITEMS), WIDTH)))
    recognizer = OpenSetRecognizer("knn").fit(noisy, np.repeat(LABELS, 5))
    assert recognizer.guarantee.n == len(ITEMS) // 5
    assert (recognizer.predict(NEW).labels == UNKNOWN).mean() < 0.09  # at most 8.4 % with 95 % confidence


@pytest.mark.parametrize("n", [1, 20, 50])
def test_a_class_of_pictures_that_are_in_another_class_too_keeps_its_references(n):
    both, labels = np.concatenate([ITEMS, ITEMS[:n]]), np.append(LABELS, np.full(n, 7))
    recognizer = OpenSetRecognizer("knn").fit(both, labels)
    counts = Counter(recognizer.gallery.labels.tolist())
    assert counts[7] == n and set(counts) == {*range(CLASSES), 7}
    # No item sets the threshold beside its copy in the gallery.
    held = {row.tobytes() for row in recognizer.calibration.embeddings.numpy()}
    assert not held & {row.tobytes() for row in recognizer.gallery.embeddings.numpy()}
    assert len(held) == len(recognizer.calibration) > 40


def test_copies_are_different_items_where_the_user_says_so():
    recognizer = OpenSetRecognizer("knn").fit(np.repeat(ITEMS, 2, 0), np.repeat(LABELS, 2), near_copies=False)
    assert recognizer.guarantee.n == 2 * len(ITEMS) // 5 and recognizer.copy_radius == 0


@pytest.mark.parametrize("detector", ["knn", "mahalanobis", "centroid"])
@pytest.mark.parametrize("copies_of", [1, 3])
def test_an_example_enrolled_many_times_is_as_good_as_once(detector, copies_of):
    validation = drawn(np.repeat([6, 7, 0], 30), seed=3), np.repeat([6, 7, 0], 30)
    few = drawn(np.full(copies_of, 8), seed=4)
    noise = 1 + 1e-6 * np.random.default_rng(5).normal(size=(30 * copies_of, WIDTH))
    once, often, later = (OpenSetRecognizer(detector).fit(ITEMS, LABELS, validation=validation) for _ in range(3))
    once.enroll("new", few)
    often.enroll("new", np.concatenate([few, (np.repeat(few, 30, 0) * noise).astype(np.float32)]))
    later.enroll("new", few).enroll("new", few)
    same(once, often)
    same(once, later)
    assert len(often.gallery) == len(once.gallery)


def test_calibration_items_that_are_references_are_refused_or_left_out(caplog):
    with pytest.raises(OsmlError, match=r"300 of 300 calibration items are near-copies of references; expected"):
        OpenSetRecognizer().fit(ITEMS, LABELS, calibration=(ITEMS, LABELS))
    half = np.arange(len(ITEMS)) % 2 == 0
    held = np.concatenate([ITEMS[~half], ITEMS[half][:20]]), np.append(LABELS[~half], LABELS[half][:20])
    clean = OpenSetRecognizer().fit(ITEMS[half], LABELS[half], calibration=(ITEMS[~half], LABELS[~half]))
    with caplog.at_level(logging.WARNING):
        same(clean, OpenSetRecognizer().fit(ITEMS[half], LABELS[half], calibration=held))
    assert "20 of 170 calibration items are near-copies" in caplog.text


def test_calibration_items_of_other_classes_are_named():
    labels = np.append(LABELS[:250], np.full(50, 77))
    with pytest.raises(OsmlError, match="50 calibration items are of classes without references, '77'"):
        OpenSetRecognizer().fit(ITEMS, LABELS, calibration=(drawn(LABELS, 6), labels))


def test_too_few_calibration_items_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        OpenSetRecognizer(alpha=0.01).fit(ITEMS, LABELS)
    assert "nothing is rejected: at 1.0% at least 99 calibration items are needed, and there are 60" in caplog.text


def test_labels_of_unknown_items_may_stand_in_validation_alone():
    validation = drawn(np.repeat([0, 6], 20), seed=3), np.repeat([0, UNKNOWN], 20)
    assert OpenSetRecognizer().fit(ITEMS, LABELS, validation=validation).validation.names.count("-1") == 20
    with pytest.raises(OsmlError, match="hold -1"):
        OpenSetRecognizer().fit(ITEMS, LABELS, calibration=validation)


def test_integer_labels_keep_their_ids_whatever_holds_them():
    labels = 3 * LABELS + 1
    plain = OpenSetRecognizer().fit(ITEMS, labels)
    for given_labels in (labels.tolist(), labels.astype(">u2"), labels.astype(object)):
        other = OpenSetRecognizer().fit(ITEMS, given_labels)
        same(plain, other)
        assert dict(other.gallery.classes) == {3 * c + 1: str(3 * c + 1) for c in range(CLASSES)}
    for refused in (labels.astype(float), labels[:, None], np.eye(CLASSES)[LABELS], [None, *labels[1:]]):
        with pytest.raises(OsmlError, match="expected"):
            OpenSetRecognizer().fit(ITEMS, refused)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(0, 50))
def test_a_fifth_is_held_out_and_of_each_class_its_share_up_to_one_item(sizes, seed):
    names = np.repeat([f"c{i}" for i in range(len(sizes))], sizes)
    aside = held_out(names, seed)
    counts, drawable = Counter(names[aside]), sum(n for n in sizes if n > 1)
    assert abs(aside.sum() - drawable / 5) < 1 or (drawable and aside.sum() == 1)
    for i, n in enumerate(sizes):
        assert counts[f"c{i}"] in ((0,) if n == 1 else (n // 5, -(-n // 5), 1 if drawable < 5 else n // 5))


def test_every_item_is_held_out_with_the_same_chance():
    names = np.repeat(["a", "b", "c", "d"], [2, 9, 3, 26])
    times = sum(held_out(names, seed).astype(int) for seed in range(2000))
    assert np.abs(times / 2000 - 0.2).max() < 0.045  # five standard deviations


def test_the_rate_holds_where_most_classes_are_small_and_wide():
    """A fifth of each class, rounded down, gave 7.0 % for 5 % and 13.8 % for 10 %."""
    sizes, rates = np.append(1000, np.full(100, 9)), []
    classes, spread = np.repeat(np.arange(101), sizes), np.append(0.5, np.full(100, 1.5))
    for seed in range(12):
        rng = np.random.default_rng(seed)
        centers = rng.normal(size=(101, 16)) * 3

        def draw(labels, rng=rng, centers=centers):
            items = centers[labels] + rng.normal(size=(len(labels), 16)) * spread[labels][:, None]
            return items.astype(np.float32)

        recognizer = OpenSetRecognizer("knn", alpha=0.1).fit(draw(classes), classes)
        new = draw(rng.choice(101, 2000, p=sizes / sizes.sum()))
        rates.append((recognizer.predict(new, neighbours=0).labels == UNKNOWN).mean())
    assert 0.085 < np.mean(rates) < 0.115  # the standard error is 0.004
