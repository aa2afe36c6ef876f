"""Near-copies: found at every multiplicity and every small noise, and never among independent items."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from osml_plugin import copies
from osml_plugin.copies import copy_radius, copy_sets, joined, representatives, sets_within


def drawn(n_classes=4, of_each=30, width=16, seed=0, spread=0.5):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(n_classes), of_each)
    items = rng.normal(size=(n_classes, width))[labels] * 3 + spread * rng.normal(size=(len(labels), width))
    return items.astype(np.float32), labels


def copied(items, labels, times, noise, seed=1):
    """Each item `times` times with relative noise, and the item that each is a copy of."""
    source = np.repeat(np.arange(len(items)), times)
    factor = 1 + noise * np.random.default_rng(seed).normal(size=(len(source), items.shape[1]))
    return (items[source] * factor).astype(np.float32), labels[source], source


def merged(pairs, n_items):
    """Set numbers by repeated relabeling, the slow and obvious way."""
    sets = list(range(n_items))
    for a, b in pairs:
        low, high = sorted((sets[a], sets[b]))
        sets = [low if s == high else s for s in sets]
    order = list(dict.fromkeys(sets))
    return np.array([order.index(s) for s in sets])


@pytest.mark.parametrize("noise", [0, 1e-6, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("times", [2, 5, 30])
def test_copies_are_found_at_every_multiplicity_and_small_noise(times, noise):
    items, labels, source = copied(*drawn(of_each=20), times, noise)
    assert (copy_sets(items, labels) == source).all()


@pytest.mark.parametrize("width", [1, 2, 8, 64])
@pytest.mark.parametrize("of_each", [3, 10, 200])
def test_independent_items_are_no_copies(width, of_each):
    items, labels = drawn(of_each=of_each, width=width, seed=width)
    n_sets = copy_sets(items, labels).max() + 1
    assert n_sets >= len(items) - 1  # on a line two of hundreds fall within rounding


def test_real_images_of_different_things_are_no_copies():
    digits = load_digits()
    assert copy_sets(digits.data, digits.target).max() + 1 >= len(digits.data) - 1


def test_a_class_of_several_kinds_is_no_set_of_copies():
    """Items of one kind lie four times as near as others; only copies among them are near-copies."""
    rng = np.random.default_rng(0)
    labels, kind = np.repeat(np.arange(4), 200), rng.integers(5, size=800)
    items = (2 * rng.normal(size=(4, 5, 8)))[labels, kind] + 0.5 * rng.normal(size=(800, 8))
    assert copy_sets(items, labels).max() + 1 == len(items)
    both, classes, _ = copied(items, labels, 2, 0)
    moved = both + 0.08 / np.sqrt(8) * np.random.default_rng(1).normal(size=both.shape)
    sets = copy_sets(moved, classes)
    assert (sets[::2] == sets[1::2]).mean() > 0.9 and sets.max() + 1 > 0.95 * len(items)


@pytest.mark.parametrize("times", [40, 200])
def test_more_copies_than_neighbors_that_are_compared(times):
    items, labels = drawn(of_each=12)
    everything, classes, source = copied(items[:36], labels[:36], times, 3e-3)
    assert (copy_sets(everything, classes) == source).all()
    # One long burst among single items.
    burst = copied(items[:1], labels[:1], times, 3e-3)[0]
    sets = copy_sets(np.concatenate([items, burst]), np.append(labels, np.zeros(times, int)))
    assert (sets == np.append(np.arange(len(items)), np.zeros(times))).all()


@pytest.mark.parametrize("width", [1, 2, 3])
def test_classes_that_overlap_in_few_dimensions_are_no_copies_of_one_another(width):
    rng = np.random.default_rng(width)
    labels = np.repeat(np.arange(5), 400)
    items = 3 * rng.normal(size=(5, width))[labels] + rng.normal(size=(2000, width))
    assert copy_sets(items, labels).max() + 1 > len(items) - 8  # on a line some fall within rounding


def test_half_precision_makes_copies():
    items, labels = drawn(width=64)
    both = np.concatenate([items, items.astype(np.float16).astype(np.float32)])
    assert (copy_sets(both, np.tile(labels, 2)) == np.tile(np.arange(len(items)), 2)).all()


def test_some_items_copied_unevenly():
    items, labels = drawn(of_each=40)
    times = np.where(np.arange(len(items)) % 7 == 0, 1 + np.arange(len(items)) % 11, 1)
    everything, classes, source = copied(items, labels, times, 3e-3)
    assert (copy_sets(everything, classes) == source).all()


@pytest.mark.parametrize("width", [8, 128])
@pytest.mark.parametrize("kind", ["outliers", "two places"])
def test_a_class_far_across_has_no_more_copies_than_others(width, kind):
    rng, labels = np.random.default_rng(width), np.repeat(np.arange(10), 60)
    places = rng.normal(size=(20, width))
    moved = (labels < 2) & (rng.random(600) < (0.2 if kind == "outliers" else 0.5))
    items = places[labels + 10 * moved] + 0.05 * rng.normal(size=(600, width))
    if kind == "outliers":
        items[moved] = rng.normal(size=(moved.sum(), width))
    assert copy_sets(items, labels).max() + 1 >= 599


def test_a_class_that_is_one_item_many_times_is_one_set_where_others_show_what_a_width_is():
    items, labels = drawn()
    burst, _, _ = copied(items[:1], labels[:1], 30, 1e-3)
    sets = copy_sets(np.concatenate([items[30:], burst]), np.append(labels[30:], np.full(30, 9)))
    assert (sets == np.append(np.arange(90), np.full(30, 90))).all()


def test_a_narrow_class_beside_wide_ones_is_no_set_of_copies():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(21), [300, *[9] * 20])
    spread = np.where(labels == 0, 0.3, 1.5)[:, None]
    items = rng.normal(size=(21, 16))[labels] * 3 + spread * rng.normal(size=(len(labels), 16))
    assert copy_sets(items, labels).max() + 1 == len(items)


def test_the_same_item_under_two_labels_is_one():
    items, labels = drawn()
    sets = copy_sets(np.concatenate([items, items[:1]]), np.append(labels, 3))
    assert sets[-1] == sets[0] and sets.max() + 1 == len(items)


def test_classes_of_one_or_two_items_have_copies_only_up_to_rounding():
    items, labels = np.float32([[1, 2], [1, 2], [3, 1], [4, 1]]), ["a", "a", "b", "b"]
    assert copy_sets(items, labels).tolist() == [0, 0, 1, 2]
    assert copy_sets(items[:1], labels[:1]).tolist() == [0]
    assert copy_sets(items[:0], labels[:0]).tolist() == []


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.sampled_from([0, 1e-5, 1e-3, 1e-2]), st.floats(1e-3, 1e3))
def test_neither_order_nor_unit_matters(seed, noise, unit):
    items, labels, _ = copied(*drawn(3, 12, seed=seed), 3, noise, seed)
    order = np.random.default_rng(seed).permutation(len(items))
    sets, other = copy_sets(items, labels), copy_sets(np.float32(unit) * items[order], labels[order])
    assert (sets[order][:, None] == sets[order]).tolist() == (other[:, None] == other).tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 100), st.sampled_from([0, 1e-3, 3e-2, 0.1]))
def test_it_is_the_two_rules_pair_by_pair(seed, noise):
    items, labels, _ = copied(*drawn(2, 9, width=6, seed=seed), 2, noise, seed)
    items, n = items.astype(np.float64), len(items)
    distance = np.array([[np.linalg.norm(a - b) for b in items] for a in items])
    rounding = [copies.ROUNDING * np.linalg.norm(item) for item in items]
    width = {
        c: np.quantile([distance[i, j] for i, j in combinations(np.flatnonzero(labels == c), 2)], 0.75) for c in labels
    }
    near = {i: sorted(distance[i][(labels == labels[i]) & (np.arange(n) != i)]) for i in range(n)}
    estimates = []
    for ranked in near.values():
        k = min(copies.RANKS + 1, len(ranked))
        ranks = range(k // 2 + 1, k)
        mean_log = np.mean([np.log(ranked[k - 1] / ranked[j - 1]) for j in ranks])
        estimates.append(np.mean([sum(1 / x for x in range(j, k)) for j in ranks]) / mean_log)
    dimension, reach, tests = np.median(estimates), list(rounding), []
    for i, ranked in near.items():
        for j in range(1, min(copies.RANKS + 1, len(ranked))):
            gap = np.log(max(ranked[j], 1e-30) / max(ranked[j - 1], 1e-30))
            if ranked[j - 1] <= copies.NEAR * width[labels[i]] and ranked[j] >= copies.STEP * ranked[j - 1]:
                tests.append((np.exp(-j * dimension * gap) * np.pi**2 / 6 * j**2, i, ranked[j - 1] * (1 + 1e-6)))
    tests.sort()
    discoveries = [k for k, test in enumerate(tests, 1) if test[0] <= k * copies.CHANCE / n]
    for _, i, end in tests[: max(discoveries, default=0)]:
        reach[i] = max(reach[i], end)
    pairs = [
        (a, b)
        for a, b in combinations(range(n), 2)
        if labels[a] == labels[b] and distance[a, b] <= min(reach[a], reach[b])
    ]
    assert copy_sets(items, labels).tolist() == merged(pairs, n).tolist()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_two_relations_join_to_connected_components(numbers):
    first, second = np.array(numbers, dtype=int).reshape(-1, 2).T
    pairs = [(a, b) for a, b in combinations(range(len(first)), 2) if first[a] == first[b] or second[a] == second[b]]
    assert joined(first, second).tolist() == merged(pairs, len(first)).tolist()


def test_representatives_are_the_first_of_each_set():
    assert representatives(np.array([0, 1, 0, 2, 1])).tolist() == [0, 1, 3]


def test_sets_within_a_radius_hang_together_in_chains():
    items = np.float32([[0], [1], [2], [5], [5.5]])
    assert sets_within(items, 1.1).tolist() == [0, 0, 0, 1, 1]
    assert sets_within(items, np.array([1.1, 1.1, 0.5, 1.1, 1.1])).tolist() == [0, 0, 1, 2, 2]


def test_the_radius_of_a_new_class_is_that_of_the_narrowest():
    items, labels = drawn()
    items[labels == 2] = (items[labels == 2] - items[labels == 2].mean(axis=0)) / 3
    of_class = items[labels == 2].astype(np.float64)
    least = min(np.linalg.norm(a - b) for a, b in combinations(of_class, 2)) / 2
    width = np.quantile([np.linalg.norm(a - b) for a, b in combinations(of_class, 2)], 0.75)
    assert copy_radius(items, labels) == pytest.approx(min(least, copies.NEAR * width), rel=0.02)  # pairs are drawn
    assert copy_radius(items[:0], labels[:0]) == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 200), st.integers(1, 4), st.floats(0, 0.3))
def test_new_items_are_taken_one_by_one(seed, times, radius):
    items, _, _ = copied(*drawn(1, 8, width=3, seed=seed), times, 1e-2, seed)
    embeddings = torch.from_numpy(items[np.random.default_rng(seed).permutation(len(items))])
    references, rest = embeddings[:5], embeddings[5:]
    taken = []
    for i, item in enumerate(rest):
        if all(
            (item - other).norm() > max(radius, copies.ROUNDING * item.norm()) for other in [*references, *rest[taken]]
        ):
            taken.append(i)
    assert copies.new_items(rest, references, radius).tolist() == taken
    assert copies.new_items(rest, references[:0], 1e9).tolist() == [0]
    assert copies.new_items(rest[:0], references, radius).tolist() == []
