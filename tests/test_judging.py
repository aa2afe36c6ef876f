"""The inner level of a sweep against every combination judged on its own."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from conftest import sphere_classes

from osml_plugin import UNKNOWN, detectors, thresholds
from osml_plugin.metrics import open_set_metrics
from osml_plugin.selection import Cached, candidates, drawn
from osml_plugin.tune.judging import RATES, Embedded, judge

FREE = ("oscr", "auroc", "aupr_unknown", "aupr_known", "fpr95", "closed_set_accuracy")
DECIDED = ("known_rejected", "unknown_rejected", "macro_f1")
RULES = [
    ("conformal", {"alpha": 0.1}),
    ("max_f1", {}),
    ("conformal", {"alpha": 0.01}),
    ("quantile", {}),
    ("target_rate", {}),
    ("class_conformal", {"alpha": 0.1}),
]


def fold(seed: int, n_calibration: int, weights: bool = True) -> Embedded:
    """A fold with five known classes and two unknown, and two outputs of which one has no class weights."""
    rng = np.random.default_rng(seed)
    outputs, roles = {}, {}
    for output, spread in (("trunk", 0.5), ("embedder", 0.35)):
        embeddings, index, directions = sphere_classes(n_classes=7, per_class=40, spread=spread, seed=seed)
        if not roles:
            known, unknown = (rng.permutation(np.flatnonzero(of)) for of in (index < 5, index >= 5))
            train, calibration, rest = np.split(known, [100, 100 + n_calibration])
            roles = {"train": train, "calibration": calibration, "validation": np.append(rest, unknown)}
        index = index.numpy()
        outputs[output] = Cached(
            {role: embeddings[items] for role, items in roles.items()},
            16 * directions[:5] if weights and output == "embedder" else None,
        )
    labels = {role: np.where(index[items] < 5, index[items], UNKNOWN) for role, items in roles.items()}
    return Embedded(outputs, labels)


def crosswise(rule, scores, labels):
    """Decisions on each half by the rule fitted on the other; the 1st, 3rd, … of each kind are the first half."""
    place = {True: 0, False: 0}
    half = []
    for label in labels:
        half.append(place[label == UNKNOWN] % 2)
        place[label == UNKNOWN] += 1
    half, rejected = np.array(half), np.zeros(len(labels), bool)
    for mine, other in ((0, 1), (1, 0)):
        fit_on = half == other
        threshold = thresholds.create(rule[0], **rule[1]).fit(scores[fit_on], is_unknown=labels[fit_on] == UNKNOWN)
        rejected[half == mine] = threshold.decide(scores[half == mine])
    return rejected


def one_by_one(folds, tried, rules, objective):
    """Candidates in order, each with its means: threshold-free figures, rules `(R, 3)`, curve `(T, 2)`."""
    means = defaultdict(list)
    for f in folds:
        some = drawn(len(f.labels["validation"]), 0)
        labels = f.labels["validation"][some]
        for output, cached in f.outputs.items():
            for name, params in tried:
                detector = detectors.create(name, **params)
                if detector.needs_class_weights and cached.class_weights is None:
                    continue
                detector.fit(cached.embeddings["train"], f.labels["train"], cached.class_weights)
                nearest, calibration = (v.numpy() for v in detector.predict(cached.embeddings["calibration"]))
                classes, scores = (v.numpy() for v in detector.predict(cached.embeddings["validation"][some]))
                figures = open_set_metrics(scores, labels, classes)
                curve, at_rules = [], []
                for rate in RATES:
                    threshold = thresholds.create("conformal", alpha=float(rate)).fit(calibration)
                    m = open_set_metrics(scores, labels, classes, rejected=threshold.decide(scores))
                    curve.append((m.known_rejected, m.unknown_rejected))
                for rule in rules:
                    if thresholds.registry.get(rule[0]).needs_unknown:
                        rejected = crosswise(rule, scores, labels)
                    else:
                        rejected = (
                            thresholds.create(rule[0], **rule[1]).fit(calibration, nearest).decide(scores, classes)
                        )
                    m = open_set_metrics(scores, labels, classes, rejected=rejected)
                    at_rules.append([getattr(m, figure) for figure in DECIDED])
                means[output, name, str(params)].append(([getattr(figures, x) for x in FREE], at_rules, curve))
    found = {}
    for key, parts in means.items():
        free, at_rules, curve = (np.mean([p[i] for p in parts], axis=0) for i in range(3))
        rule = int(np.argmax(at_rules[:, 2]))
        figures = dict(zip(FREE, free, strict=True)) | dict(zip(DECIDED, at_rules[rule], strict=True))
        found[key] = figures, rule, curve
    best = max(found, key=lambda key: found[key][0][objective])  # the first of equals
    return len(found), best, *found[best]


@pytest.mark.parametrize(
    ("rules", "objective"),
    [(RULES, "oscr"), (RULES, "closed_set_accuracy"), (RULES[:1], "macro_f1"), (RULES[1:2], "macro_f1")],
)
def test_it_is_every_combination_judged_on_its_own(rules, objective):
    folds = [fold(0, 40), fold(1, 31)]
    tried = candidates()
    judged = judge(folds, tried, rules, objective=objective)
    n, best, figures, rule, curve = one_by_one(folds, tried, rules, objective)
    assert (judged.best.output, judged.best.detector, str(judged.best.params)) == best
    assert judged.threshold == rules[rule]
    assert judged.n_combinations == n * (len(RATES) + len(rules))
    assert judged.figures == pytest.approx(figures)
    assert (judged.best.oscr, judged.best.auroc) == pytest.approx((figures["oscr"], figures["auroc"]))
    np.testing.assert_allclose(judged.curve, curve, atol=1e-5)


@pytest.mark.parametrize("candidate", candidates(), ids=str)
def test_each_detector_alone(candidate):
    folds = [fold(2, 25), fold(3, 19)]
    judged = judge(folds, [candidate], RULES)
    _, best, figures, rule, curve = one_by_one(folds, [candidate], RULES, "oscr")
    assert (judged.best.output, judged.threshold) == (best[0], RULES[rule])
    assert judged.figures == pytest.approx(figures)
    np.testing.assert_allclose(judged.curve, curve, atol=1e-5)


def test_the_first_of_equals_is_chosen():
    """Every candidate separates these perfectly."""
    labels = {
        "train": np.repeat([0, 1], 10),
        "calibration": np.repeat([0, 1], 5),
        "validation": np.array([0, 1, -1, -1]),
    }
    axes = torch.eye(3)
    embeddings = {role: axes[torch.as_tensor(np.where(of < 0, 2, of))] for role, of in labels.items()}
    for tried in ([("knn", {"k": 3}), ("centroid", {}), ("knn", {"k": 1})], [("centroid", {}), ("knn", {"k": 1})]):
        judged = judge([Embedded({"embedder": Cached(embeddings)}, labels)], tried, RULES[:1])
        assert (judged.best.detector, judged.best.params, judged.best.oscr) == (*tried[0], 1.0)
