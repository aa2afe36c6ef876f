"""Many detectors on the same items at once against one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import sphere_classes
from torch.nn.functional import normalize

from osml_plugin import OsmlError, detectors
from osml_plugin.detectors import Detector
from osml_plugin.metrics import open_set_metrics
from osml_plugin.selection import Cached, candidates, scored, select

TRIED = candidates(detectors.names())


def items(kind: str, seed: int = 0):
    """Embeddings, labels, class weights and queries, with what is awkward about some."""
    embeddings, index, directions = sphere_classes(n_classes=5, per_class=30, spread=0.4, seed=seed)
    names = torch.tensor([7, 2, 30, 11, 4])
    labels, weights = names[index], 16 * directions[names.argsort()]
    queries = normalize(torch.randn(80, 16, generator=torch.Generator().manual_seed(seed + 1)))
    queries = torch.cat([queries, embeddings[::7]])
    if kind == "classes of one example":
        keep = torch.cat([torch.arange(60), torch.tensor([60, 90, 120])])
        embeddings, labels = embeddings[keep], labels[keep]
    if kind == "one example of every class":
        embeddings, labels = embeddings[::30], labels[::30]
    if kind == "duplicates":
        again = torch.arange(0, 150, 10).repeat(4)
        embeddings, labels = torch.cat([embeddings, embeddings[again]]), torch.cat([labels, labels[again]])
    if kind == "one class":
        embeddings, labels, weights = embeddings[:30], labels[:30], weights[2:3]  # of the label 7
    return embeddings, labels, weights, queries


KINDS = ["plain", "classes of one example", "one example of every class", "duplicates", "one class"]


def one_by_one(name, params, data):
    embeddings, labels, weights, queries = data
    return detectors.create(name, **params).fit(embeddings, labels, weights).predict(queries)


def is_the_same(found, expected):
    """The same scores; the same classes wherever no other class is as near."""
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    assert (found[0] == expected[0]).all()


@pytest.mark.parametrize("chunk_size", [4096, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_is_fit_and_predict_one_by_one(kind, chunk_size, monkeypatch):
    monkeypatch.setattr(Detector, "chunk_size", chunk_size)
    data = items(kind)
    made = [detectors.create(name, **params) for name, params in TRIED]
    seen = set()
    for i, classes, scores in Detector.scan(made, *data[:2], data[3], data[2]):
        is_the_same((classes, scores), one_by_one(*TRIED[i], data))
        is_the_same(made[i].predict(data[3]), (classes, scores))  # it is fitted now
        seen.add(i)
    assert seen == set(range(len(TRIED)))


def test_a_scan_takes_any_order_and_repeats():
    data = items("plain")
    order = np.random.default_rng(0).permutation(2 * len(TRIED)) % len(TRIED)
    made = [detectors.create(TRIED[j][0], **TRIED[j][1]) for j in order]
    found = {i: (c, s) for i, c, s in Detector.scan(made, *data[:2], data[3], data[2])}
    for i, j in enumerate(order):
        is_the_same(found[i], one_by_one(*TRIED[j], data))


def test_a_subclass_that_fits_otherwise_keeps_to_itself():
    class Doubled(detectors.CentroidCosine):
        def _class_scores(self, embeddings):
            return 2 * super()._class_scores(embeddings)

    class Halved(detectors.MaxLogit):
        def _fit(self, embeddings, labels, class_weights):
            super()._fit(embeddings, labels, class_weights / 2)

    embeddings, labels, weights, queries = items("plain")
    made = [Doubled(), detectors.create("centroid"), Halved(), detectors.create("max_logit")]
    found = {i: s for i, _, s in Detector.scan(made, embeddings, labels, queries, weights)}
    assert torch.equal(found[0], 2 * found[1])
    assert torch.equal(found[2], found[3] / 2)


def test_a_scan_refuses_what_fit_refuses():
    embeddings, labels, _, queries = items("plain")
    with pytest.raises(OsmlError, match="'energy' needs class weights"):
        list(Detector.scan([detectors.create("energy")], embeddings, labels, queries))
    with pytest.raises(OsmlError, match="9 wide, but the detector was fitted on 16"):
        list(Detector.scan([detectors.create("knn")], embeddings, labels, torch.zeros(3, 9)))


def cached_outputs():
    """Two outputs of a model, of which one has no class weights."""
    outputs, roles = {}, {"validation": 60, "calibration": 20}
    for output, seed in (("trunk", 5), ("embedder", 0)):
        embeddings, labels, weights, queries = items("plain", seed)
        parts = dict(zip(roles, queries.split([60, len(queries) - 60]), strict=True))
        outputs[output] = Cached({"train": embeddings} | parts, weights if output == "embedder" else None)
    return outputs, labels.numpy()


def test_scored_keeps_the_order_and_splits_the_roles():
    outputs, labels = cached_outputs()
    rng = np.random.default_rng(0)
    tried = [TRIED[i] for i in rng.permutation(len(TRIED))] + [("knn", {})]
    of = {"calibration": np.array([3, 1, 1, 8]), "validation": rng.permutation(60)[:50]}
    found = list(scored(outputs, labels, tried, of, progress=False))
    expected = [
        (output, name, params)
        for output in outputs
        for name, params in tried
        if outputs[output].class_weights is not None or not detectors.registry.get(name).needs_class_weights
    ]
    assert [(s.output, s.detector, s.params) for s in found] == expected
    for s in found:
        cached = outputs[s.output]
        detector = detectors.create(s.detector, **s.params).fit(
            cached.embeddings["train"], labels, cached.class_weights
        )
        assert list(s.scores) == list(s.classes) == list(of)
        for role, chosen in of.items():
            classes, scores = detector.predict(cached.embeddings[role][chosen])
            np.testing.assert_allclose(s.scores[role], scores, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(s.classes[role], classes)


def test_select_ranks_all_by_oscr():
    outputs, labels = cached_outputs()
    truth = np.where(np.arange(60) % 2, -1, 7)
    found = select(outputs, labels, truth, TRIED, progress=False)
    one = {
        (s.output, s.detector, str(s.params)): open_set_metrics(s.scores["validation"], truth, s.classes["validation"])
        for s in scored(outputs, labels, TRIED, {"validation": np.arange(60)}, progress=False)
    }
    assert len(found) == len(one)
    assert [c.oscr for c in found] == sorted((m.oscr for m in one.values()), reverse=True)
    for c in found:
        metrics = one[c.output, c.detector, str(c.params)]
        assert (c.oscr, c.auroc) == pytest.approx((metrics.oscr, metrics.auroc))
