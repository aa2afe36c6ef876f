"""Discovery of a handful of items, and of near-copies of a few."""

from __future__ import annotations

import numpy as np
import pytest

from osml_plugin import OpenSetRecognizer
from osml_plugin.discovery import discover
from osml_plugin.discovery.distances import RANKS, Distances, joined_by_class, tight_sets
from osml_plugin.discovery.graph import neighbor_graph
from osml_plugin.nearest import nearest


def classes_of(width: int, seed: int = 0):
    """A way to draw items `(n, width)` of a class 0 … 11, and a recognizer of the first six."""
    rng = np.random.default_rng(seed)
    centers = 3 * rng.normal(size=(12, width))

    def draw(c: int, n: int) -> np.ndarray:
        return (centers[c] + 0.5 * rng.normal(size=(n, width))).astype(np.float32)

    known = np.concatenate([draw(c, 60) for c in range(6)])
    return draw, OpenSetRecognizer("knn").fit(known, np.repeat(np.arange(6), 60)), rng


@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("n", [1, 3, 5, 6])
def test_a_few_items_of_a_new_class_are_never_known(width, n):
    draw, recognizer, _ = classes_of(width)
    found = recognizer.discover(draw(8, n))
    assert all(name is None for name in found.known_class)
    if n >= 5:
        assert found.n_classes == 1 and not found.too_few.any() and found.lacking == 0
    else:
        assert found.n_classes == 0 and found.too_few.all() and found.lacking == 5 - n
        assert found.note.startswith(f"too few to group: {5 - n} more different item")


def test_three_small_classes_are_three_groups_beside_wrongly_rejected_items():
    draw, recognizer, _ = classes_of(16)
    few = [draw(c, 5) for c in (8, 9, 10)]
    labels = recognizer.discover(np.concatenate(few)).labels
    assert sorted(labels[::5]) == [0, 1, 2] and labels.tolist() == np.repeat(labels[::5], 5).tolist()
    found = recognizer.discover(np.concatenate([*few, *(draw(c, 4) for c in range(5))]))
    assert found.n_classes == 3 and (found.labels[15:] == -1).all()
    assert found.known_class[15:].tolist() == np.repeat([*"01234"], 4).tolist()


def test_many_copies_of_one_item_are_one_item():
    draw, recognizer, rng = classes_of(16)
    for noise in (0, 1e-6, 1e-3):
        items = np.repeat(draw(8, 1), 500, axis=0) * (1 + noise * rng.normal(size=(500, 16)))
        found = recognizer.discover(items.astype(np.float32))
        assert found.n_classes == 0 and found.lacking == 4 and found.too_few.all()


def test_one_of_each_of_many_new_classes_is_no_class():
    draw, recognizer, _ = classes_of(64)
    found = recognizer.discover(np.concatenate([draw(c, 1) for c in range(6, 12)]))
    assert found.n_classes == 0 and found.too_few.all() and found.lacking == 4


@pytest.mark.parametrize(("width", "copies", "noise"), [(16, 5, 1e-3), (16, 5, 0.1), (64, 10, 0.05)])
def test_near_copies_count_once(width, copies, noise):
    draw, recognizer, rng = classes_of(width)
    items = np.repeat(np.concatenate([draw(c, 30) for c in (8, 9, 10)]), copies, axis=0)
    items = (items * (1 + noise * rng.normal(size=items.shape))).astype(np.float32)
    found = recognizer.discover(items)
    assert found.n_classes == 3
    assert found.labels.tolist() == np.repeat(found.labels[:: 30 * copies], 30 * copies).tolist()
    if noise < 0.1:
        assert all(len(set(exemplars // copies)) == len(exemplars) for exemplars in found.exemplars)


def test_rounding_is_seen_through_without_known_items():
    draw, _, _ = classes_of(16)
    items = draw(8, 40)
    found = discover(np.concatenate([items, items * (1 + 1e-7)]))
    assert len(found.pool.nodes) == 40


def test_links_of_a_class_against_a_slow_twin():
    rng = np.random.default_rng(0)
    nodes = rng.normal(size=(60, 4)).astype(np.float32)
    of_known, graph = np.arange(20, 60), neighbor_graph(nodes)
    distances = Distances(beside=1.0, within=2.0, width=1.0)
    links, apart = joined_by_class(graph, nodes, of_known, distances)
    length = np.linalg.norm(nodes[:, None] - nodes, axis=2)
    linked = graph.toarray() > 0
    for i in range(60):
        reaches = [length[i, j] for j in of_known if linked[i, j]]
        assert apart[i] == (i < 20 and not any(r <= 1.0 for r in reaches))
    for i in range(60):
        for j in range(60):
            kept = linked[i, j] and length[i, j] <= 2 and not (apart[i] and j >= 20) and not (apart[j] and i >= 20)
            assert links[i, j] == (graph[i, j] if kept else 0)
    assert 0 < apart.sum() < 20


def test_tight_sets_are_those_with_others_of_their_class_around():
    rng = np.random.default_rng(0)
    known = rng.normal(size=(60, 64))
    copied = np.repeat(rng.normal(size=(20, 64)), 10, axis=0) + 0.1 * rng.normal(size=(200, 64))
    narrow = 100 + 0.1 * rng.normal(size=(10, 64))  # a class of its own: nothing is around it
    nodes = np.concatenate([known, copied, narrow]).astype(np.float32)
    of_known = np.arange(60)
    distances = Distances.of(nodes, of_known, np.repeat([0, 1], 30))
    sets = tight_sets(nodes, nearest(nodes, min(RANKS + 1, len(nodes))), of_known, distances)
    assert len(np.unique(sets)) == 60 + 20 + 10
    assert (sets[60:260].reshape(20, 10) == sets[60:260:10, None]).all()
