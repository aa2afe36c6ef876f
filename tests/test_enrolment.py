"""Groups and few examples become classes: what is enrolled, and what is promised of it."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from conftest import sphere_classes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from osml_plugin import UNKNOWN, OpenSetRecognizer, OsmlError, detectors, thresholds
from osml_plugin.enrolment import rehearsed_scores
from osml_plugin.thresholds.ranks import conformal_rank, enough, fewest, topped_up


@pytest.fixture(scope="module")
def data():
    """Classes 0–3 are known, 4 and 5 pseudo-unknown, 6–8 unknown."""
    embeddings, labels, _ = sphere_classes(n_classes=9, per_class=90, spread=0.12, seed=3)
    return embeddings, labels


def fitted(data, detector="knn", **kwargs) -> OpenSetRecognizer:
    embeddings, labels = data
    part = torch.arange(len(labels)) % 3
    known, pseudo = labels < 4, (labels == 4) | (labels == 5)
    validation = (known & (part == 2)) | pseudo
    return OpenSetRecognizer(detector, **kwargs).fit(
        embeddings[known & (part == 0)],
        labels[known & (part == 0)],
        calibration=(embeddings[known & (part == 1)], labels[known & (part == 1)]),
        validation=(embeddings[validation], labels[validation]),
    )


@pytest.fixture(scope="module")
def pool(data):
    embeddings, labels = data
    return embeddings[labels >= 6][::2], labels[labels >= 6][::2]


@pytest.fixture(scope="module")
def groups(data, pool):
    found = fitted(data).discover(pool[0])
    assert found.n_classes == 3
    return found


def same(one: OpenSetRecognizer, other: OpenSetRecognizer) -> bool:
    a, b = one.gallery, other.gallery
    return (
        torch.equal(a.embeddings, b.embeddings)
        and torch.equal(a.labels, b.labels)
        and dict(a.classes) == dict(b.classes)
        and one.threshold.state() == other.threshold.state()
        and a.version == b.version
    )


# Groups -----------------------------------------------------------------------------------------------------


def test_all_groups_in_one_step(data, pool, groups, monkeypatch):
    recognizer, by_hand = fitted(data), fitted(data)
    calibrated = []
    monkeypatch.setattr(
        OpenSetRecognizer,
        "_refit_threshold",
        lambda self, refit=OpenSetRecognizer._refit_threshold: calibrated.append(self) or refit(self),
    )
    enrolled = recognizer.enroll_groups(pool[0], groups)
    assert len(calibrated) == 1 and recognizer.gallery.version == 1
    by_hand.learn({f"new-{g + 1}": pool[0][torch.from_numpy(groups.labels == g)] for g in range(3)})
    assert same(recognizer, by_hand)
    assert [(e.group, e.name, e.size, len(e.skipped)) for e in enrolled] == [
        (g, f"new-{g + 1}", (groups.labels == g).sum(), 0) for g in range(3)
    ]
    embeddings, labels = data
    for group in enrolled:  # the other half of the class is recognised
        kind = np.bincount(pool[1][torch.from_numpy(groups.labels == group.group)]).argmax()
        names = recognizer.predict(embeddings[labels == kind][1::2]).names
        assert np.mean([name == group.name for name in names]) > 0.85


def test_groups_go_to_the_classes_they_are_named(data, pool, groups):
    recognizer, by_hand = fitted(data), fitted(data)
    recognizer.enroll_groups(pool[0], groups, {2: "otter", 0: "2", 1: "otter"})
    inside = [pool[0][torch.from_numpy(groups.labels == g)] for g in range(3)]
    by_hand.learn({"2": inside[0], "otter": torch.cat(inside[1:])})
    assert same(recognizer, by_hand) and recognizer.class_names == ["0", "1", "2", "3", "otter"]
    recognizer = fitted(data)
    recognizer.enroll_groups(pool[0], groups, {1: "otter"})
    assert same(recognizer, fitted(data).enroll("otter", inside[1]))  # the others are not enrolled
    assert recognizer.enroll_groups(pool[0], groups, {}) == () and recognizer.gallery.version == 1


def test_names_that_are_taken_are_left_out(data, pool, groups):
    recognizer = fitted(data).enroll("new-2", pool[0][:5])
    names = [e.name for e in recognizer.enroll_groups(pool[0], groups)]
    assert names == ["new-1", "new-3", "new-4"]
    assert [e.name for e in recognizer.enroll_groups(pool[0], groups)] == ["new-5", "new-6", "new-7"]


def test_members_of_low_confidence_are_skipped_and_told(data, pool, groups):
    confidence = np.random.default_rng(0).random(len(groups.labels))
    confidence[groups.labels == 2] = 0.2
    unsure = dataclasses.replace(groups, confidence=confidence)
    recognizer, by_hand = fitted(data), fitted(data)
    enrolled = recognizer.enroll_groups(pool[0], unsure, {0: "a", 1: "b"}, min_confidence=0.4)
    members = [[i for i in range(len(confidence)) if groups.labels[i] == g] for g in range(2)]
    for group, inside in zip(enrolled, members, strict=True):
        assert group.skipped.tolist() == [i for i in inside if confidence[i] < 0.4]
        assert group.size == len(inside) - len(group.skipped) > 0
    kept = [[i for i in inside if confidence[i] >= 0.4] for inside in members]
    assert same(recognizer, by_hand.learn({"a": pool[0][kept[0]], "b": pool[0][kept[1]]}))
    with pytest.raises(OsmlError, match=r"no member of group 2 .* 0.4 \(the highest is 0.20\)"):
        recognizer.enroll_groups(pool[0], unsure, min_confidence=0.4)
    assert recognizer.gallery.version == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pool: {"items": pool[:-1]}, "the discovery is one of"),
        (lambda pool: {"items": pool[:, :-1]}, "15 wide"),
        (lambda pool: {"names": {3: "otter"}}, "no group 3 in this discovery: groups are numbered 0 to 2"),
        (lambda pool: {"names": {-1: "otter"}}, "no group -1"),
        (lambda pool: {"names": {True: "otter"}}, "no group True"),
        (lambda pool: {"names": {"0": "otter"}}, "no group '0'"),
        (lambda pool: {"names": {0: "otter", 1: " "}}, "a class needs a name"),
        (lambda pool: {"names": {0: "otter", 1: 7}}, "name of a class is text"),
        (lambda pool: {"names": {0: "otter", 1: ["x"]}}, "name of a class is text"),
        (lambda pool: {"names": {0: "otter", 1: "-1"}}, "label of what is unknown"),
        (lambda pool: {"min_confidence": float("nan")}, "finite number"),
        (lambda pool: {"min_confidence": 1.5}, "no member of group 0"),
    ],
)
def test_what_is_wrong_changes_nothing(data, pool, groups, change, message):
    recognizer = fitted(data)
    arguments = {"items": pool[0], "discovery": groups} | change(pool[0])
    with pytest.raises(OsmlError, match=message) as raised:
        recognizer.enroll_groups(**arguments)
    assert "\n" not in str(raised.value)
    assert same(recognizer, fitted(data))


def test_a_failure_in_calibration_changes_nothing(data, pool, groups, monkeypatch):
    recognizer = fitted(data)
    monkeypatch.setattr(OpenSetRecognizer, "_rehearsed", lambda *_: 1 / 0)
    monkeypatch.setattr(OpenSetRecognizer, "_score_known", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recognizer.enroll_groups(pool[0], groups)
    monkeypatch.undo()
    assert same(recognizer, fitted(data))
    assert recognizer.detector.class_labels.tolist() == [0, 1, 2, 3]


# Few examples -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 60), st.integers(0, 80), st.sampled_from([0.05, 0.1, 1 / 3, 0.5]), st.integers(0, 2**31))
def test_topped_up(n, m, alpha, seed):
    rng = np.random.default_rng(seed)
    own, others = rng.normal(size=n), rng.normal(size=m)
    scores = topped_up(own, others, alpha)
    assert scores[:n].tolist() == own.tolist() and set(scores[n:]) <= set(others.tolist())
    assert len(scores) == max(n, min(fewest(alpha), n + m))
    added = np.sort(scores[n:])
    k = len(added)
    # The slow twin: of the others, the smallest that a share of i/(k+1) does not exceed.
    ordered = sorted(others)
    by_hand = [next(x for j, x in enumerate(ordered, 1) if j / m >= i / (k + 1) - 1e-12) for i in range(1, k + 1)]
    assert added.tolist() == by_hand


def test_rehearsed_scores_join_where_a_class_is_lacking():
    rng = np.random.default_rng(0)
    calibration, own, others = rng.normal(size=200), rng.normal(3, 1, 6), rng.normal(5, 1, 300)
    threshold = thresholds.create("conformal", alpha=0.1).fit(calibration)
    assert threshold.lacking == ()
    classes = np.repeat([10, 11], [4, 2])
    threshold.fit_enrolled(own, classes, [10, 11, 12])
    assert threshold.lacking == (10, 11, 12)  # six scores, and nine are needed
    before = threshold.tau
    threshold.fit_enrolled(own, classes, [10, 11, 12], {10: others, 12: others + 1, 3: others})
    assert threshold.lacking == (11,) and threshold.tau == before
    top = sorted(others)[int(np.ceil(0.75 * 300)) - 1]  # of three that join, at 1/4, 2/4 and 3/4
    assert threshold.taus == {10: max(own.max(), top), 11: own.max(), 12: max(own.max(), top + 1)}
    wide = rng.normal(3, 1, 30)  # enough of its own: nothing joins
    threshold.fit(calibration).fit_enrolled(wide, np.full(30, 10), [10], {10: others})
    assert threshold.taus == {10: np.sort(wide)[conformal_rank(30, 0.1) - 1]} and threshold.lacking == ()
    threshold.fit(calibration).fit_enrolled([], np.zeros(0, int), [10], {10: []})
    assert threshold.taus == {10: threshold.tau} and threshold.lacking == (10,)
    with pytest.raises(OsmlError, match="NaN"):
        threshold.fit_enrolled([], np.zeros(0, int), [10], {10: [np.nan]})


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 30), st.integers(0, 40), st.sampled_from([0.05, 0.1, 1 / 3]), st.integers(0, 2**31))
def test_p_values_and_the_threshold_agree_after_a_rehearsal(n, m, alpha, seed):
    rng = np.random.default_rng(seed)
    threshold = thresholds.create("conformal", alpha=alpha).fit(rng.normal(size=50))
    threshold.fit_enrolled(rng.normal(1, 1, n), np.full(n, 7), [7], {7: rng.normal(2, 1, m)})
    classes = rng.choice([0, 7], size=60)
    scores = np.concatenate([rng.normal(0, 3, 40), threshold.tau_of(classes[40:])])
    assert np.array_equal(threshold.decide(scores, classes), threshold.p_values(scores, classes) <= alpha)


@pytest.mark.parametrize("detector", ["knn", "mahalanobis", "nearest_ratio", "gmm"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_rehearsal_enrols_the_pseudo_unknown_classes(data, detector, size):
    """The slow twin: the detector fitted anew with examples of 4 and 5, as they were dealt."""
    recognizer = fitted(data, detector)
    gallery = recognizer.gallery
    embeddings, labels = data
    played = labels >= 4
    items, names = embeddings[played & (labels <= 5)], labels[played & (labels <= 5)].numpy().astype(str)
    grown = []

    def spy(after):
        grown.append(after)
        return recognizer._grown_detector(gallery, after)

    scores = rehearsed_scores(items, names, size, gallery, spy)
    expected = []
    for after in grown:
        new = after.labels > 3
        assert len(after.classes) == 6 and new.sum() == 2 * size and torch.equal(after.labels[~new], gallery.labels)
        detector_anew = detectors.create(detector).fit(after.embeddings, after.labels)
        class_of = {}
        for row, label in zip(after.embeddings[new], after.labels[new], strict=True):
            i = (items == row).all(dim=1).nonzero()[0, 0]
            assert class_of.setdefault(int(label), names[i]) == names[i]  # examples of one class each
        out = torch.tensor([not (after.embeddings[new] == row).all(dim=1).any() for row in items])
        nearest, of_rest = detector_anew.predict(items[out])
        own = [class_of.get(int(c)) == name for c, name in zip(nearest, names[out.numpy()], strict=True)]
        expected += of_rest.numpy()[own].tolist()
    assert len(grown) == 3 and len({tuple(after.embeddings[-1].tolist()) for after in grown}) > 1
    np.testing.assert_allclose(np.sort(scores), np.sort(expected), rtol=1e-4, atol=1e-6)
    # None of more examples than there are items, and none of no items.
    assert len(rehearsed_scores(items, names, 90, gallery, spy)) == 0
    assert len(rehearsed_scores(items[:0], names[:0], 1, gallery, spy)) == 0


@pytest.mark.parametrize("detector", ["knn", "mahalanobis", "centroid"])
def test_a_class_of_one_example_keeps_about_the_rate(detector):
    """Over draws: of further items that are nearest to a class enrolled from one example, about alpha is rejected,
    where pseudo-unknown classes have shown how far such a class reaches; without them most are."""
    rejected, blind = [], []
    for seed in range(12):
        embeddings, labels, _ = sphere_classes(n_classes=16, per_class=60, spread=0.12, seed=seed)
        known, pseudo, new = labels < 5, (labels >= 5) & (labels < 15), labels == 15
        trained = torch.arange(len(labels)) % 2 == 0
        for validated, rates in ((known & ~trained | pseudo, rejected), (known & ~trained, blind)):
            recognizer = OpenSetRecognizer(detector, alpha=0.1).fit(
                embeddings[known & trained],
                labels[known & trained],
                calibration=(embeddings[known & ~trained], labels[known & ~trained]),
                validation=(embeddings[validated], labels[validated]),
            )
            for example in range(3):
                one = _apart(recognizer).learn({"one": embeddings[new][example : example + 1]})
                answer = one.predict(embeddings[new][3:])
                of_it = np.array(answer.nearest) == "one"
                rates.append((answer.labels[of_it] == UNKNOWN).mean())
    assert np.mean(rejected) < 0.2 and np.mean(rejected) < np.mean(blind) - 0.1, (np.mean(rejected), np.mean(blind))


def _apart(recognizer):
    other = copy.copy(recognizer)
    other.threshold = copy.deepcopy(recognizer.threshold)
    return other


def test_the_rate_of_the_known_is_kept_when_single_examples_are_enrolled(data):
    embeddings, labels = data
    recognizer = fitted(data, alpha=0.1)
    calibration = recognizer.calibration
    for c in (6, 7, 8):
        recognizer.enroll(f"class {c}", embeddings[labels == c][:1])
    rejected = (recognizer.predict(calibration.embeddings).labels == UNKNOWN).sum()
    assert rejected <= binom.ppf(0.999, len(calibration), 0.1)
    assert min(recognizer.class_thresholds.values()) >= recognizer.threshold.tau


def test_enough_examples_need_no_rehearsal(data, pool):
    recognizer, blind = fitted(data), fitted(data)
    blind.validation = None
    many = pool[0][pool[1] == 6]
    assert enough(len(many), 0.05)
    assert same(recognizer.enroll("many", many), blind.enroll("many", many))
    one = pool[0][pool[1] == 7][:1]
    assert not same(fitted(data).enroll("one", one), blind.forget("many").enroll("one", one))


def test_what_was_rehearsed_is_there_again_after_loading(data, pool, tmp_path):
    recognizer = fitted(data).enroll("one", pool[0][:1]).enroll("two", pool[0][pool[1] == 8][:2])
    recognizer.save(tmp_path / "bundle")
    again = OpenSetRecognizer.load(tmp_path / "bundle")
    assert again.class_thresholds == pytest.approx(recognizer.class_thresholds)
    assert recognizer.class_thresholds["one"] > recognizer.threshold.tau


def test_validation_of_another_width_is_refused(data):
    embeddings, labels = data
    known = labels < 4
    with pytest.raises(OsmlError, match="wide"):
        OpenSetRecognizer().fit(embeddings[known], labels[known], validation=(embeddings[:, :3], labels))
