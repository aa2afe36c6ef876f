"""The index of a large gallery, made small here, against comparing with every reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import sphere_classes
from torch.nn.functional import normalize

from osml_plugin import OpenSetRecognizer, OsmlError, detectors, neighbors
from osml_plugin.gallery import Gallery
from osml_plugin.neighbors import Cells, NeighborIndex


@pytest.fixture(autouse=True)
def large_is_small(monkeypatch):
    monkeypatch.setattr(neighbors, "EXACT_UP_TO", 500)


@pytest.fixture
def made():
    """Forty classes of fifty, ten of a hundred, and one of a thousand."""
    embeddings, labels, _ = sphere_classes(n_classes=51, per_class=1000, spread=0.1)
    sizes = torch.tensor([50] * 40 + [100] * 10 + [1000])
    chosen = torch.arange(len(labels)) % 1000 < sizes[labels]
    return embeddings[chosen], labels[chosen], embeddings[~chosen][::211]


def brute(queries, references, k):
    """The slow twin."""
    distances = (queries[:, None] - references).norm(dim=2)
    return distances.topk(k, largest=False)


def is_almost_brute(index, queries, references, k, least=0.99):
    """Distances are those of the rows that are found, and nearly all of these are the right ones."""
    distances, rows = index.search(queries, k)
    farthest = brute(queries, references, min(k, len(references))).values[:, -1:]
    assert distances.shape == rows.shape == (len(queries), min(k, len(references)))
    torch.testing.assert_close(distances, (queries[:, None] - index.references[rows]).norm(dim=2))
    assert (distances[:, 1:] >= distances[:, :-1]).all()
    assert all(len(set(row)) == len(row) for row in rows.tolist())
    assert (distances <= farthest + 1e-6).float().mean() >= least


def uses_cells(index: NeighborIndex) -> Cells | None:
    return index._parts[0] if isinstance(index._parts[0], Cells) else None


@pytest.mark.parametrize("k", [1, 10, 300])
def test_cells_find_the_nearest(made, k):
    references, labels, queries = made
    index = NeighborIndex(references, labels)
    assert uses_cells(index)
    is_almost_brute(index, queries, references, k)


@pytest.mark.parametrize("labels", ["one class", "each its own", "by chance"])
def test_labels_that_say_nothing_cost_time_only(made, labels):
    references, _, queries = made
    n = len(references)
    drawn = torch.randint(20, (n,), generator=torch.Generator().manual_seed(0))
    labels = {"one class": torch.zeros(n).long(), "each its own": torch.arange(n), "by chance": drawn}[labels]
    is_almost_brute(NeighborIndex(references, labels), queries, references, 10)


def test_references_without_structure_are_found():
    draw = torch.Generator().manual_seed(0)
    references = normalize(torch.randn(4000, 64, generator=draw))
    queries = normalize(torch.randn(100, 64, generator=draw))
    is_almost_brute(NeighborIndex(references, torch.arange(4000) % 7), queries, references, 10, least=0.985)


def test_far_and_equal_references_do_no_harm(made):
    references, labels, queries = made
    references = references.clone()
    references[::1500] *= 1e4
    references[1:600:2] = references[1]
    is_almost_brute(NeighborIndex(references, labels), queries, references, 10)


def test_all_references_can_be_asked_for(made):
    references, labels, queries = made
    distances, rows = NeighborIndex(references, labels).search(queries[:3], 10_000)
    assert (rows.sort(dim=1).values == torch.arange(len(references))).all()
    torch.testing.assert_close(distances, brute(queries[:3], references, len(references)).values)


def test_left_out_references_are_not_found(made):
    references, labels, queries = made
    index = NeighborIndex(references, labels)
    index.search(queries, 1)
    out = (torch.arange(len(references)) % 3 == 0) | (labels == 7)
    less = index.without(out)
    assert uses_cells(less) is uses_cells(index)
    for k in (1, 10, 300):
        assert not out[less.search(queries, k)[1]].any()
        is_almost_brute(less, queries, references[~out], k)
    again = less.without(labels == 8)
    assert not (out | (labels == 8))[again.search(queries, 50)[1]].any()
    is_almost_brute(index, queries, references, 10)  # the first one is as it was


def test_a_gallery_that_changes_shares_the_cells(made):
    references, labels, queries = made
    gallery = Gallery(references, labels, {i: f"c{i}" for i in range(51)}, torch.zeros(len(labels)).bool(), 51)
    gallery.neighbors(queries, 3)
    cells = uses_cells(gallery.index)
    draw = torch.Generator().manual_seed(5)
    for step in range(12):
        name = f"new {step}"
        gallery = gallery.add(name, normalize(torch.randn(7, 16, generator=draw)))
        if step % 2:
            gallery = gallery.remove(gallery.class_names[3 * step])
        if step % 3 == 0:
            gallery = replace(gallery, version=100 + step)
        assert uses_cells(gallery.index) is cells
        is_almost_brute(gallery.index, torch.cat([queries, gallery.embeddings[-3:]]), gallery.embeddings, 10)
        assert gallery.neighbors(gallery.embeddings[-1:], 1)[0][0].name == name
    assert (gallery.index.references is gallery.embeddings) and len(gallery.labels) == len(gallery.embeddings)


def test_cells_are_made_anew_after_many_additions(made, monkeypatch):
    references, labels, queries = made
    monkeypatch.setattr(neighbors, "REBUILT_AFTER", 20)
    gallery = Gallery(references, labels, {i: f"c{i}" for i in range(51)}, torch.zeros(len(labels)).bool(), 51)
    cells = uses_cells(gallery.index)
    gallery = gallery.add("a", queries[:15])
    assert uses_cells(gallery.index) is cells
    gallery = gallery.add("b", queries[15:30])
    assert uses_cells(gallery.index) is not cells
    is_almost_brute(gallery.index, queries, gallery.embeddings, 10)


def test_other_references_are_not_searched_with_an_old_index(made):
    references, labels, queries = made
    gallery = Gallery(references, labels, {i: f"c{i}" for i in range(51)}, torch.zeros(len(labels)).bool(), 51)
    gallery.neighbors(queries, 1)
    other = replace(gallery, embeddings=references.flip(0), labels=labels.flip(0))
    is_almost_brute(other.index, queries, other.embeddings, 5)


@pytest.mark.parametrize("k", [1, 5, 60])
def test_knn_by_cells_is_knn(made, k, monkeypatch):
    references, labels, queries = made
    far = normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(2)))
    queries = torch.cat([queries, far])
    found = detectors.create("knn", k=k).fit(references, labels).predict(queries)
    monkeypatch.setattr(neighbors, "EXACT_UP_TO", 10**6)
    exact = detectors.create("knn", k=k).fit(references, labels).predict(queries)
    assert (found[0] == exact[0]).float().mean() >= 0.99
    assert (found[1] <= exact[1] * 1.001).float().mean() >= 0.99
    assert (found[1] >= exact[1] - 1e-6).all()


def test_a_detector_takes_an_index_and_what_it_leaves_out(made):
    references, labels, queries = made
    out = torch.arange(len(references)) % 5 == 0
    out |= labels == 3
    for name in ("knn", "centroid", "mahalanobis"):
        index = NeighborIndex(references, labels, exact_up_to=10**6).without(out)
        classes, scores = detectors.create(name).fit(index, labels.where(~out, -1)).predict(queries)
        expected = detectors.create(name).fit(references[~out], labels[~out]).predict(queries)
        assert torch.equal(classes, expected[0])
        torch.testing.assert_close(scores, expected[1])
    with pytest.raises(OsmlError, match="UNKNOWN"):
        detectors.create("knn").fit(index, torch.full_like(labels, -1))


def test_a_fitted_index_is_shared_saved_and_loaded(made, tmp_path):
    references, labels, queries = made
    out = torch.arange(len(references)) % 5 == 0
    index = NeighborIndex(references, labels).without(out)
    detector = detectors.create("knn").fit(index, labels)
    assert detector.references is index.references
    detector.save(tmp_path / "detector")
    loaded = detectors.Detector.load(tmp_path / "detector")
    torch.testing.assert_close(loaded.score(queries), detector.score(queries))


def test_a_large_recognizer_learns_and_forgets_as_a_small_one(made, monkeypatch):
    references, labels, queries = made

    def taught():
        recognizer = OpenSetRecognizer("knn").fit(references, labels)
        recognizer.recognize(queries)
        recognizer.enroll("new", -queries[:23]).enroll("3", references[labels == 3][:5] + 0.01).forget("7")
        return recognizer

    large = taught()
    assert uses_cells(large.gallery.index)
    monkeypatch.setattr(neighbors, "EXACT_UP_TO", 10**6)
    small = taught()
    assert not uses_cells(small.gallery.index)
    for scores in ("calibration_scores", "enrolled_scores"):
        ours, theirs = getattr(large, scores), getattr(small, scores)
        assert ours.shape == theirs.shape and np.isclose(ours, theirs, rtol=1e-5).mean() > 0.98
    assert large.threshold.tau == pytest.approx(small.threshold.tau, rel=0.02)
    mine, other = large.recognize(-queries[:23] + 0.001), small.recognize(-queries[:23] + 0.001)
    assert mine.names == other.names and mine.neighbours[0][0].name == "new"


@pytest.mark.parametrize("exact_up_to", [500, 5000])
@pytest.mark.parametrize("k", [1, 10, 300])
def test_extended_references_are_found_and_shared(made, exact_up_to, k):
    references, labels, queries = made
    index = NeighborIndex.of_copy(references[:-60], labels[:-60])
    index._exact_up_to = exact_up_to
    index.search(queries, 1)
    before = index.search(queries, k)
    first = index.extended(references[-60:-30], labels[:-30])
    second = first.extended(references[-30:], labels)
    other = index.extended(-references[:30], labels[:-30])  # where the first one has written
    assert second.references.data_ptr() == index.references.data_ptr() != other.references.data_ptr()
    assert second._parts[0] is other._parts[0] is index._parts[0]
    for grown, expected in ((second, references), (other, torch.cat([references[:-60], -references[:30]]))):
        assert torch.equal(grown.references, expected)
        is_almost_brute(grown, queries, expected, k, least=0.99 if exact_up_to < len(references) else 1)
    assert all(map(torch.equal, index.search(queries, k), before))


def test_what_is_left_out_stays_so_in_an_extended_index(made):
    references, labels, queries = made
    index = NeighborIndex.of_copy(references[:400], labels[:400])
    index.search(queries, 1)
    out = torch.arange(430) % 3 == 0
    out[400:] = False
    less = index.without(out[:400]).extended(references[400:430], labels[:430])
    is_almost_brute(less, queries, references[:430][~out], 10, least=1)
    assert not out[less.search(queries, 10)[1]].any()


def test_an_index_that_grows_past_the_exact_size_gets_cells(made):
    references, labels, queries = made
    index = NeighborIndex.of_copy(references[:450], labels[:450])
    index.search(queries, 1)
    assert not uses_cells(index)
    grown = index.extended(references[450:], labels)
    assert uses_cells(grown)
    is_almost_brute(grown, queries, references, 10)
