"""The embedding as discovery compares it: whitened by how known classes vary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.stats import ortho_group
from sklearn.cluster import KMeans
from sklearn.covariance import LedoitWolf, ShrunkCovariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import adjusted_rand_score

from osml_plugin.discovery.representation import whitened


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def blobs(seed: int, n_classes: int = 5, a_class: int = 40, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows in classes that are wide in the first directions and narrow in the last."""
    rng = np.random.default_rng(seed)
    classes = np.repeat(np.arange(n_classes), a_class)
    spread = np.geomspace(0.3, 0.03, width)
    rows = rng.normal(size=(n_classes, width))[classes] + rng.normal(size=(len(classes), width)) * spread
    return unit(rows), classes


def slow(items: np.ndarray, known: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Item by item, class by class."""
    inside = []
    for c in sorted(set(classes.tolist())):
        members = known[classes == c].astype(np.float64)
        if len(members) > 1:
            inside += [member - members.mean(axis=0) for member in members]
    shrinkage = max(0.1, LedoitWolf(assume_centered=True).fit(np.array(inside, dtype=np.float64)).shrinkage_)
    covariance = ShrunkCovariance(shrinkage=shrinkage, assume_centered=True).fit(np.array(inside)).covariance_
    root = np.linalg.inv(np.real(sqrtm(covariance)))
    center = np.mean([row.astype(np.float64) for row in known], axis=0)
    moved = [root @ (item - center) for item in items]
    return np.array([row / np.sqrt(row @ row) for row in moved])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(2, 30), st.integers(2, 12))
def test_equals_the_slow_twin(seed, n_classes, a_class, width):
    known, classes = blobs(seed, n_classes, a_class, width)
    items, _ = blobs(seed + 1, 3, 5, width)
    assert np.allclose(whitened(items, known, classes), slow(items, known, classes), atol=1e-4)


def test_equals_the_space_of_linear_discriminant_analysis():
    """With as many classes as dimensions, discriminants are all directions, so that angles are the same."""
    known, classes = blobs(0, n_classes=9, a_class=300, width=8)
    lda = LinearDiscriminantAnalysis(solver="eigen", covariance_estimator=ShrunkCovariance(shrinkage=0.1))
    theirs = unit(lda.fit(known, classes).transform(known) - lda.transform(known.mean(axis=0, keepdims=True)))
    ours = whitened(known, known, classes)
    assert np.allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000))
def test_order_naming_and_company_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    known, classes = blobs(seed)
    items, _ = blobs(seed + 1)
    result = whitened(items, known, classes)
    shuffled, other = rng.permutation(len(known)), rng.permutation(len(items))[:7]
    renamed = rng.permutation(classes.max() + 3)[classes]  # and two numbers that no item has
    assert np.allclose(whitened(items, known[shuffled], classes[shuffled]), result, atol=1e-5)
    assert np.allclose(whitened(items, known, renamed), result, atol=1e-5)
    assert np.allclose(whitened(items[other], known, classes), result[other], atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000))
def test_a_turned_embedding_has_the_same_angles(seed):
    known, classes = blobs(seed)
    items, _ = blobs(seed + 1)
    turn = ortho_group.rvs(known.shape[1], random_state=seed).astype(np.float32)
    before, after = whitened(items, known, classes), whitened(items @ turn, known @ turn, classes)
    assert np.allclose(before @ before.T, after @ after.T, atol=1e-3)


def test_known_classes_are_as_wide_in_every_direction():
    known, classes = blobs(1, n_classes=10, a_class=400)
    shrunk = whitened(known, known, classes)
    widths = [
        np.linalg.svd(
            np.concatenate([rows[classes == c] - rows[classes == c].mean(0) for c in range(10)]), compute_uv=False
        )
        for rows in (known, shrunk)
    ]
    assert widths[0][0] / widths[0][-1] > 2 * widths[1][0] / widths[1][-1]


def test_classes_that_differ_where_known_ones_are_narrow_come_apart():
    rng = np.random.default_rng(0)

    def sample(means: np.ndarray, a_class: int) -> tuple[np.ndarray, np.ndarray]:
        classes = np.repeat(np.arange(len(means)), a_class)
        loud = rng.normal(size=(len(classes), 2)) * 0.15
        quiet = means[classes] + rng.normal(size=(len(classes), 2)) * 0.01
        return unit(np.column_stack([np.ones(len(classes)), loud, quiet])), classes

    known, known_classes = sample(np.array([[-0.08, -0.08], [0.08, -0.08], [0, 0.08]]), 200)
    items, classes = sample(np.array([[-0.08, 0.08], [0.08, 0.08], [0, -0.08]]), 200)

    def found(rows: np.ndarray) -> float:
        return adjusted_rand_score(classes, KMeans(3, n_init=5, random_state=0).fit_predict(rows))

    assert found(items) < 0.1
    assert found(whitened(items, known, known_classes)) > 0.9


@pytest.mark.parametrize("case", ["none", "one of each", "copies"])
def test_items_stay_where_they_are_if_the_known_tell_nothing(case):
    items, _ = blobs(0)
    known, classes = {
        "none": (items[:0], np.empty(0, dtype=np.int64)),
        "one of each": (items[::40], np.arange(5)),
        "copies": (np.repeat(items[::40], 7, axis=0), np.repeat(np.arange(5), 7)),
    }[case]
    assert whitened(items, known, classes) is items


def test_results_are_finite_float32_unit_rows_even_with_few_known_items():
    known, classes = blobs(0, n_classes=2, a_class=2, width=64)
    items, _ = blobs(1, width=64)
    items[0] = known.mean(axis=0)  # as good as at the centre
    result = whitened(items, known, classes)
    assert result.dtype == np.float32 and np.isfinite(result).all()
    assert np.allclose(np.linalg.norm(result[1:], axis=1), 1, atol=1e-6)


def test_nothing_that_was_given_is_changed():
    known, classes = blobs(0)
    items, _ = blobs(1)
    copies = items.copy(), known.copy(), classes.copy()
    whitened(items, known, classes)
    for before, after in zip(copies, (items, known, classes), strict=True):
        assert np.array_equal(before, after)
