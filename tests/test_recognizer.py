"""The recognizer on embeddings whose geometry is known, and on real digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import sphere_classes
from scipy.stats import binom
from torch.nn.functional import normalize

from osml_plugin import UNKNOWN, OpenSetRecognizer, OsmlError, detectors, thresholds
from osml_plugin.recognizer import FOLDS

ALL = detectors.names()
UNSUITED = {
    "movr": "made for proxies that repel each other, as its loss trains them; these lie at random",
    "norm": "tells by length, and all these embeddings are of length one",
    "openmax": "shares out logits, which are large only where the network was trained to make them so",
}
"""Detectors that cannot tell these classes from others, whatever the threshold."""


@pytest.fixture
def data():
    embeddings, labels, directions = sphere_classes(n_classes=6, per_class=120, spread=0.12)
    return embeddings, labels, directions


def fresh(labels: torch.Tensor) -> torch.Tensor:
    """A third of the items, which `fitted` does not see."""
    return torch.arange(len(labels)) % 3 == 0


def fitted(data, classes=range(4), **kwargs) -> OpenSetRecognizer:
    embeddings, labels, directions = data
    chosen = torch.isin(labels, torch.tensor(list(classes))) & ~fresh(labels)
    detector = kwargs.get("detector", "knn")
    weights = 16 * directions[list(classes)] if detectors.registry.get(detector).needs_class_weights else None
    return OpenSetRecognizer(**kwargs).fit(embeddings[chosen], labels[chosen], class_weights=weights)


@pytest.mark.parametrize("detector", [name for name in ALL if name not in UNSUITED])
def test_knows_the_known_and_rejects_the_rest(detector):
    # So many that chance does not decide; by seed 0 the calibration items of several detectors are untypical ones.
    data = sphere_classes(n_classes=6, per_class=360, spread=0.12, seed=1)
    recognizer = fitted(data, detector=detector)
    embeddings, labels, _ = data
    labels = labels[fresh(labels)]
    answer = recognizer.predict(embeddings[fresh(data[1])])
    known = labels.numpy() < 4
    assert (answer.labels[known] == labels.numpy()[known]).mean() > 0.9
    assert (answer.labels[~known] == UNKNOWN).mean() > 0.8
    assert all((name is None) == (label == UNKNOWN) for name, label in zip(answer.names, answer.labels, strict=True))
    assert [str(label) for label in answer.labels[known & (answer.labels >= 0)]] == [
        name for name, k in zip(answer.names, known, strict=True) if k and name is not None
    ]
    assert np.array_equal(answer.labels == UNKNOWN, answer.scores > answer.threshold)
    assert set(answer.thresholds) == {answer.threshold}


@pytest.mark.parametrize("detector", [name for name in ALL if name not in UNSUITED])
def test_a_class_is_enrolled_recognised_and_forgotten(data, detector):
    embeddings, labels, _ = data
    recognizer = fitted(data, detector=detector)
    new, later = embeddings[labels == 4][:60], embeddings[labels == 4][60:]
    before = recognizer.predict(embeddings[labels == 0])
    recognizer.enroll("otter", new)
    assert recognizer.class_names == ["0", "1", "2", "3", "otter"] and recognizer.gallery.version == 1
    answer = recognizer.predict(later)
    assert np.mean([name == "otter" for name in answer.names]) > 0.85
    assert (recognizer.predict(embeddings[labels == 0]).labels == 0).mean() > 0.9  # nothing old is lost
    assert (recognizer.predict(embeddings[labels == 5]).labels == UNKNOWN).mean() > 0.7  # nor all taken for new
    recognizer.forget("otter")
    again = recognizer.predict(embeddings[labels == 0])
    np.testing.assert_allclose(again.scores, before.scores, rtol=1e-5, atol=1e-6)
    assert again.threshold == pytest.approx(before.threshold, rel=1e-5)


def test_one_example_is_enough(data):
    embeddings, labels, _ = data
    recognizer = fitted(data)
    recognizer.enroll("one", embeddings[labels == 4][:1])
    assert "one" in recognizer.predict(embeddings[labels == 4][:1]).names


def test_a_trained_class_can_be_forgotten(data):
    embeddings, labels, _ = data
    recognizer = fitted(data).forget("2")
    answer = recognizer.predict(embeddings[labels == 2])
    assert recognizer.class_names == ["0", "1", "3"] and (answer.labels == UNKNOWN).mean() > 0.8
    assert set(recognizer.predict(embeddings[labels == 3]).labels) <= {3, UNKNOWN}  # ids stay what they were


@pytest.mark.parametrize("detector", ["knn", "centroid", "mahalanobis"])
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_the_rate_is_kept_and_is_kept_after_enrolment(detector, alpha):
    """Over 40 draws, the mean rejection rate of known items is at most α and not far below, before and after."""
    before, after = [], []
    for seed in range(40):
        embeddings, labels, _ = sphere_classes(n_classes=5, per_class=100, spread=0.2, seed=seed)
        half = torch.arange(len(labels)) % 2 == 0
        old = labels < 3
        recognizer = OpenSetRecognizer(detector, alpha=alpha).fit(embeddings[old & half], labels[old & half], seed=seed)
        before.append((recognizer.predict(embeddings[old & ~half]).labels == UNKNOWN).mean())
        for c in (3, 4):
            recognizer.enroll(f"new {c}", embeddings[half & (labels == c)])
        after.append((recognizer.predict(embeddings[~half]).labels == UNKNOWN).mean())
    for rates in (before, after):
        error = 3 * np.std(rates) / np.sqrt(len(rates))
        assert alpha - 0.04 - error < np.mean(rates) < alpha + error, (np.mean(rates), error)


def test_enrolled_examples_are_scored_without_themselves(data):
    """The slow twin: each fold taken out by hand, and the rest fitted anew."""
    embeddings, labels, _ = data
    recognizer = fitted(data).enroll("new", embeddings[labels == 4][:23])
    gallery = recognizer.gallery
    expected = []
    members = torch.arange(len(gallery))[gallery.labels == 4]
    for f in range(FOLDS):
        out = members[f::FOLDS]
        rest = torch.tensor([i for i in range(len(gallery)) if i not in out.tolist()])
        detector = detectors.create("knn").fit(gallery.embeddings[rest], gallery.labels[rest])
        expected += detector.score(gallery.embeddings[out]).tolist()
    calibration = recognizer.detector.score(recognizer.calibration.embeddings).tolist()
    assert sorted(recognizer.calibration_scores) == pytest.approx(sorted(calibration), rel=1e-5)
    assert sorted(recognizer.enrolled_scores) == pytest.approx(sorted(expected), rel=1e-5)


def test_folds_leave_something_of_every_class(data):
    recognizer = fitted(data)
    for n in (1, 2, 3, 7):
        recognizer.enroll(f"class of {n}", data[0][-n:])
    fold = recognizer.gallery.folds(FOLDS)
    for f in range(FOLDS):
        assert set(recognizer.gallery.labels[fold != f].tolist()) == set(recognizer.gallery.classes)


def test_p_values_of_known_items_are_uniform(data):
    embeddings, labels, _ = sphere_classes(n_classes=4, per_class=600, spread=0.15)
    even = torch.arange(len(labels)) % 2 == 0
    p = OpenSetRecognizer().fit(embeddings[even], labels[even]).predict(embeddings[~even]).p_values
    assert abs(np.mean(p <= 0.1) - 0.1) < 0.05 and abs(np.mean(p <= 0.5) - 0.5) < 0.08


def test_neighbours_are_the_nearest_references(data):
    recognizer = fitted(data)
    query = data[0][:5]
    answer = recognizer.predict(query, neighbours=4)
    distances = torch.cdist(query, recognizer.gallery.embeddings)
    for i, row in enumerate(answer.neighbours):
        values, indices = distances[i].sort()
        assert [n.distance for n in row] == pytest.approx(values[:4].tolist(), abs=1e-3)
        assert row[-1].name == recognizer.gallery.classes[int(recognizer.gallery.labels[indices[3]])]
    assert recognizer.predict(query, neighbours=0).neighbours == ()


def test_discovery_finds_the_new_classes(digit_vectors):
    vectors, labels = digit_vectors
    half = np.random.default_rng(0).random(len(labels)) < 0.5
    known = labels < 5
    recognizer = OpenSetRecognizer().fit(vectors[known & half], labels[known & half])
    groups = recognizer.discover(vectors[~known])
    assert 3 <= groups.n_classes <= 8 and groups.labels.shape == ((~known).sum(),)
    assert recognizer.discover(vectors[~known], n_classes=5).n_classes == 5


@pytest.mark.parametrize("threshold", thresholds.names())
def test_every_threshold_serves(data, threshold):
    embeddings, labels, _ = data
    made = thresholds.create(threshold, **({"tau": 0.7} if threshold == "fixed" else {}))
    held = fresh(labels) & (labels != 3)
    validation = (embeddings[held], [str(label) for label in labels[held].tolist()])
    known = (labels < 3) & ~fresh(labels)
    recognizer = OpenSetRecognizer(threshold=made).fit(embeddings[known], labels[known], validation=validation)
    tau = recognizer.threshold.tau
    assert 0.1 < tau < 1.5
    recognizer.enroll("4", embeddings[labels == 4])
    assert (recognizer.threshold.tau == tau) == (threshold == "fixed")


def test_a_refused_enrolment_leaves_all_as_it_was(data):
    recognizer = fitted(data)
    before = recognizer.predict(data[0])
    for name, examples, message in [
        ("", data[0][:3], "needs a name"),
        (" x", data[0][:3], "without blanks"),
        ("x", data[0][:0], "no examples"),
        ("x", torch.full((2, 16), torch.nan), "NaN"),
        ("x", torch.zeros(2, 7), "7 wide"),
    ]:
        with pytest.raises(OsmlError, match=message):
            recognizer.enroll(name, examples)
    with pytest.raises(OsmlError, match="no examples to enrol 'y'"):
        recognizer.learn({"x": data[0][:3], "y": data[0][:0]})
    with pytest.raises(OsmlError, match="unknown class '33': did you mean '3'"):
        recognizer.forget("33")
    after = recognizer.predict(data[0])
    assert np.array_equal(before.scores, after.scores) and recognizer.gallery.version == 0


def test_bad_input_is_refused(data):
    embeddings, labels, _ = data
    with pytest.raises(OsmlError, match="not fitted"):
        OpenSetRecognizer().predict(embeddings)
    with pytest.raises(OsmlError, match="at least two known classes"):
        OpenSetRecognizer().fit(embeddings[labels == 0], labels[labels == 0])
    with pytest.raises(OsmlError, match="labels hold -1"):
        OpenSetRecognizer().fit(embeddings, torch.where(labels == 0, UNKNOWN, labels))
    with pytest.raises(OsmlError, match="719 labels for 720 embeddings"):
        OpenSetRecognizer().fit(embeddings, labels[1:])
    with pytest.raises(OsmlError, match="7 wide"):
        OpenSetRecognizer().fit(embeddings, labels, calibration=(embeddings[:, :7], labels))
    with pytest.raises(OsmlError, match="7 wide"):
        fitted(data).predict(embeddings[:, :7])
    with pytest.raises(OsmlError, match="NaN"):
        fitted(data).predict(torch.full((1, 16), torch.nan))
    with pytest.raises(OsmlError, match="takes embeddings"):
        fitted(data).predict(["a.png"])
    with pytest.raises(OsmlError, match="needs validation items"):
        OpenSetRecognizer(threshold="max_f1").fit(embeddings, labels)
    with pytest.raises(OsmlError, match="one of the last two classes"):
        fitted(data, classes=range(2)).forget("0")


def test_labels_may_be_names(data):
    embeddings, labels, _ = data
    names = np.array(["bee", "ant", "cow", "dog", "eel", "fox"])[labels.numpy()]
    recognizer = OpenSetRecognizer().fit(embeddings.numpy(), names)
    assert recognizer.class_names == ["ant", "bee", "cow", "dog", "eel", "fox"]
    assert recognizer.predict(embeddings[:1]).nearest == ("bee",) and recognizer.gallery.id_of("bee") == 1


def test_empty_input_gives_an_empty_answer(data):
    answer = fitted(data).predict(normalize(torch.zeros(0, 16)))
    assert len(answer) == 0 and answer.names == ()


@pytest.mark.parametrize("detector", ALL)
def test_a_new_class_inherits_nothing_from_a_forgotten_one(data, detector):
    embeddings, labels, _ = data
    recognizer = fitted(data, detector=detector).forget("3").enroll("new", embeddings[labels == 4][:40])
    assert recognizer.gallery.id_of("new") == 4
    assert np.mean([n == "new" for n in recognizer.predict(embeddings[labels == 4][40:]).names]) > 0.8
    assert np.mean([n == "new" for n in recognizer.predict(embeddings[labels == 3]).names]) < 0.3


def test_a_name_that_comes_again_is_another_class(data):
    """The held-out items of the forgotten one say nothing of it."""
    embeddings, labels, _ = data
    examples, validation = embeddings[labels == 5][:40], (embeddings, labels)
    for threshold in ("conformal", "class_conformal", "max_f1"):
        chosen = (labels < 4) & ~fresh(labels)
        found = []
        for name in ("3", "other"):
            recognizer = OpenSetRecognizer(threshold=threshold)
            recognizer.fit(embeddings[chosen], labels[chosen], validation=validation)
            recognizer.forget("3").enroll(name, examples)
            found.append(recognizer)
        (tau, own), (expected, theirs) = ((r.threshold.tau, list(r.threshold.taus.values())) for r in found)
        assert (tau, own) == (expected, theirs)
        assert found[0].discover(embeddings[labels == 4]).n_classes == 1


@pytest.mark.parametrize("detector", ["knn", "centroid", "mahalanobis"])
def test_more_examples_help(digit_vectors, detector):
    """Mean over five new classes: the more examples, the more of the class is recognised. (Up to the 19 that a τ of its
    own takes, fewer examples lie further apart and so raise τ more: three may do as well as five.)"""
    vectors, labels = digit_vectors
    recognised = {}
    for n in (1, 3, 5, 20):
        rates = []
        for new in range(5, 10):
            old = labels < 5
            recognizer = OpenSetRecognizer(detector).fit(vectors[old][::2], labels[old][::2])
            items = vectors[labels == new]
            recognizer.enroll("new", items[:n])
            rates.append(np.mean([name == "new" for name in recognizer.predict(items[20:]).names]))
        recognised[n] = np.mean(rates)
    assert min(recognised[3], recognised[5]) > recognised[1] + 0.1, recognised
    assert recognised[20] > max(recognised[3], recognised[5]) + 0.1 and recognised[20] > 0.65, recognised


@pytest.mark.parametrize("detector", ["knn", "centroid", "mahalanobis"])
def test_whatever_is_enrolled_the_trained_classes_keep_their_rate(data, detector):
    """Copies of one image, or a class tighter than any, must not make the threshold reject the old ones."""
    embeddings, labels, _ = data
    before = fitted(data, detector=detector, alpha=0.1)
    tau = before.threshold.tau
    old = embeddings[fresh(labels) & (labels < 4)]
    rate = (before.predict(old).labels == UNKNOWN).mean()
    for examples in (embeddings[labels == 4][:1].repeat(40, 1), embeddings[labels == 4][:5], old.mean(0, keepdim=True)):
        recognizer = fitted(data, detector=detector, alpha=0.1).enroll("new", examples)
        assert (recognizer.predict(old).labels == UNKNOWN).mean() <= rate + 0.02
    if detector == "knn":  # its scores of old classes do not depend on new ones
        assert recognizer.threshold.tau >= tau


def test_p_values_and_rejection_agree_after_enrolment(data):
    embeddings, labels, _ = data
    answer = fitted(data, alpha=0.1).enroll("new", embeddings[labels == 4][:30]).predict(embeddings)
    assert np.array_equal(answer.p_values <= 0.1, answer.labels == UNKNOWN)


def test_the_guarantee_is_of_the_calibrated_classes(data):
    recognizer = fitted(data)
    n = recognizer.guarantee.n
    assert recognizer.enroll("new", data[0][-30:]).guarantee.n == n
    assert recognizer.forget("0").guarantee.n < n


def test_a_pseudo_unknown_class_can_be_found(data):
    embeddings, labels, _ = data
    known = (labels < 3) & ~fresh(labels)
    held = (labels < 4) & fresh(labels)  # 3 is pseudo-unknown
    recognizer = OpenSetRecognizer().fit(
        embeddings[known],
        labels[known],
        calibration=(embeddings[held & (labels < 3)], labels[held & (labels < 3)]),
        validation=(embeddings[held], labels[held]),
    )
    inbox = (labels == 3) & ~fresh(labels)
    groups = recognizer.discover(torch.cat([embeddings[inbox], embeddings[labels == 4], embeddings[labels == 5]]))
    assert (groups.labels[: int(inbox.sum())] >= 0).mean() > 0.9 and groups.n_classes == 3


def test_enrolling_the_last_pseudo_unknown_class_keeps_the_threshold(data):
    embeddings, labels, _ = data
    validation = (embeddings[labels < 4], labels[labels < 4])
    known = (labels < 3) & ~fresh(labels)
    recognizer = OpenSetRecognizer(threshold="max_f1").fit(embeddings[known], labels[known], validation=validation)
    tau = recognizer.threshold.tau
    assert recognizer.enroll("3", embeddings[labels == 3][:30]).threshold.tau == tau


def test_fit_again_forgets_the_proxies(data):
    embeddings, labels, directions = data
    recognizer = OpenSetRecognizer("max_logit").fit(embeddings, labels, class_weights=directions.numpy() * 16)
    with pytest.raises(OsmlError, match="needs class weights"):
        recognizer.fit(embeddings, labels)
    with pytest.raises(OsmlError, match=r"class weights must be of shape \(6, 16\)"):
        recognizer.fit(embeddings, labels, class_weights=directions[:5])


def test_another_rate_is_that_of_a_recognizer_fitted_with_it(data):
    examples = data[0][-30:]
    changed = fitted(data).enroll("new", examples).keep_rate(0.2)
    assert changed.threshold.tau == fitted(data, alpha=0.2).enroll("new", examples).threshold.tau


def state_of(recognizer) -> dict:
    """What must not change: every part by identity, and the threshold by all it holds."""
    kept = {k: v for k, v in vars(recognizer).items() if k != "threshold"}
    return kept | {"threshold": vars(recognizer.threshold).copy()}


def is_as_before(recognizer, before: dict) -> None:
    now = state_of(recognizer)
    assert now.pop("threshold") == before["threshold"]
    assert now.keys() == before.keys() - {"threshold"} and all(value is before[key] for key, value in now.items())


@pytest.mark.parametrize("error", [OsmlError("no"), MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("detector", ["knn", "centroid", "gmm"])
@pytest.mark.parametrize(
    "change",
    [
        lambda r, e: r.enroll("new", e),
        lambda r, e: r.forget("2"),
        lambda r, e: r.keep_rate(0.2),
        lambda r, e: r.fit(e[:10], [0, 1] * 5, calibration=(e[10:], [0, 1] * 10)),
    ],
    ids=["enroll", "forget", "keep_rate", "fit"],
)
def test_a_change_that_fails_halfway_changes_nothing(data, monkeypatch, detector, change, error):
    recognizer = fitted(data, detector=detector, alpha=0.1).enroll("otter", data[0][data[1] == 4][:30])
    before, fit = state_of(recognizer), thresholds.Conformal._fit

    def fails(threshold, *args):
        fit(threshold, *args)
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(thresholds.Conformal, "_fit", fails)
        change(recognizer, data[0][data[1] == 5][:30])
    is_as_before(recognizer, before)
    change(recognizer, data[0][data[1] == 5][:30])


def test_a_rate_that_is_none_or_has_nothing_to_be_fitted_on_changes_nothing(data):
    embeddings, labels, _ = data
    recognizer = fitted(data)
    before = state_of(recognizer)
    for alpha in (0, 1, 2, "a", None, True, np.nan):
        with pytest.raises(OsmlError, match="alpha must be a rate between 0 and 1"):
            recognizer.keep_rate(alpha)
    is_as_before(recognizer, before)
    fixed = thresholds.create("fixed", tau=0.3)
    recognizer = OpenSetRecognizer(threshold=fixed).fit(embeddings, labels, calibration=(embeddings[:0], []))
    before = state_of(recognizer)
    with pytest.raises(OsmlError, match="nothing to fit the threshold 'conformal' on"):
        recognizer.keep_rate(0.1)
    is_as_before(recognizer, before)
    with pytest.raises(OsmlError, match="not fitted"):
        OpenSetRecognizer().keep_rate(0.1)


HISTORY = ("a", 1), ("b", 2), ("a", 4), ("c", 19), ("b", None), ("d", 20), ("1", None), ("b", 5), ("0", 3), ("c", None)
"""Names and how many examples are enrolled; None: the class is forgotten."""


@pytest.mark.parametrize("detector", ALL)
@pytest.mark.parametrize("threshold", ["conformal", "class_conformal"])
def test_after_any_history_it_decides_as_one_fitted_afresh(data, detector, threshold):
    embeddings, labels, directions = data
    rng, alpha = np.random.default_rng(len(detector)), 0.1
    weights = 16 * directions[:4] if detectors.registry.get(detector).needs_class_weights else None
    known = (labels < 4) & (torch.arange(len(labels)) % 2 == 0)
    recognizer = OpenSetRecognizer(detector, threshold, alpha=alpha).fit(
        embeddings[known], labels[known], class_weights=weights
    )
    for name, n in HISTORY:
        if n is None:
            recognizer.forget(name)
        else:
            wide = normalize(directions[4 + ord(name) % 2] + 0.2 * torch.from_numpy(rng.normal(size=(n, 16))).float())
            recognizer.enroll(name, embeddings[labels == 0][1 : 2 * n : 2] if name == "0" else wide)
        grown = recognizer.predict(embeddings)
        assert np.array_equal(grown.labels == UNKNOWN, grown.scores > grown.thresholds)
        assert np.array_equal(grown.labels == UNKNOWN, grown.p_values <= alpha)
    recognizer.keep_rate(1 - 0.9)
    grown = recognizer.predict(embeddings)
    assert np.array_equal(grown.labels == UNKNOWN, grown.p_values <= 1 - 0.9)
    taus, own = recognizer.threshold.tau, recognizer.class_thresholds
    recognizer.refit()  # from the gallery alone
    afresh = recognizer.predict(embeddings)
    np.testing.assert_allclose(grown.scores, afresh.scores, rtol=1e-5, atol=1e-5)
    assert grown.nearest == afresh.nearest and taus == pytest.approx(recognizer.threshold.tau, rel=1e-5, abs=1e-5)
    assert own == pytest.approx(recognizer.class_thresholds, rel=1e-5, abs=1e-5)
    # Scores that rounding moved past a calibration score.
    assert np.mean(abs(grown.p_values - afresh.p_values) > 1e-9) < 0.01


@pytest.mark.parametrize("detector", ["knn", "centroid"])
def test_the_promise_over_hundreds_of_recognizers_with_classes_of_any_size(detector):
    """One new item of a trained class, and one of a class enrolled from 1 to 40 examples, for each of 300 draws of
    everything. The first is rejected as often as its guarantee expects before enrolment, and never more often after."""
    alpha, draws = 0.1, 300
    before = after = enrolled = near = 0
    for seed in range(draws):
        embeddings, labels, _ = sphere_classes(n_classes=6, per_class=42, width=8, spread=0.25, seed=seed)
        draw = np.random.default_rng(seed)
        place = torch.arange(len(labels)) % 42
        known, held = (labels < 3) & (place < 20), (labels < 3) & (place >= 20) & (place < 41)
        recognizer = OpenSetRecognizer(detector, alpha=alpha).fit(
            embeddings[known], labels[known], calibration=(embeddings[held], labels[held])
        )
        new = embeddings[(labels == draw.integers(3)) & (place == 41)]
        before += recognizer.predict(new).names[0] is None
        recognizer.learn({f"new {c}": embeddings[(labels == c) & (place < n)] for c, n in ((3, 1), (4, 5), (5, 40))})
        after += recognizer.predict(new).names[0] is None
        answer = recognizer.predict(embeddings[(labels == 5) & (place == 41)])
        near += answer.nearest[0] == "new 5"
        enrolled += answer.nearest[0] == "new 5" and answer.names[0] is None
    expected = thresholds.guarantee(63, alpha).expected
    low, high = binom.interval(0.999, draws, expected)
    assert low <= before <= high and after <= binom.ppf(0.999, draws, alpha), (before, after)
    assert near > 0.9 * draws and enrolled <= binom.ppf(0.999, near, alpha), (near, enrolled)
