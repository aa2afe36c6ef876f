"""The inner level of a sweep: every detector, with every parameter, at every threshold, on cached embeddings."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from osml_plugin import UNKNOWN, thresholds
from osml_plugin.metrics import OpenSetMetrics, OperatingPoints, functional, open_set_metrics, operating_points
from osml_plugin.selection import Cached, Candidate, Scored, drawn, scored
from osml_plugin.thresholds.conformal import conformal_rank

RATES = np.linspace(0.005, 0.5, 100)
"""Shares of known items to reject, each with the threshold that calibration gives it."""

Rule = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Judged:
    """What the inner search found, as means over the folds.

    figures: threshold-free ones of the best detector, and its decisions at the best threshold.
    best: that detector, on that output of the model; `threshold` is the rule.
    curve: shares of known and of unknown items rejected at thresholds for each of `RATES`.
    n_combinations: of output, detector, parameters and threshold, in each fold.
    """

    figures: dict[str, float]
    best: Candidate
    threshold: Rule
    curve: list[tuple[float, float]]
    n_combinations: int


@dataclass(frozen=True)
class Embedded:
    """One fold's embeddings by output of the model, and its labels by data role."""

    outputs: Mapping[str, Cached]
    labels: Mapping[str, np.ndarray]


def judge(
    folds: Sequence[Embedded],
    detectors: Sequence[Rule],
    rules: Sequence[Rule],
    *,
    objective: str = "oscr",
    seed: int = 0,
) -> Judged:
    """The best detector by `objective`, and the best threshold rule for it by macro-F1, on validation.

    Detectors are ranked by their mean over the folds. Thresholds are fitted on calibration items, and those that need
    unknown items on one half of validation to be judged on the other, and the other way round.

    Args:
        detectors: by name and parameters; `rules` likewise, one or more threshold rules.
    """
    judged: dict[str, list[_OneFold]] = defaultdict(list)
    for fold in folds:
        some = drawn(len(fold.labels["validation"]), seed)
        n_calibration = len(fold.labels["calibration"])
        of = {"validation": some, "calibration": np.arange(n_calibration)}
        ranks = np.array([conformal_rank(n_calibration, rate) for rate in RATES.tolist()])
        for s in scored(fold.outputs, fold.labels["train"], detectors, of, progress=False):
            key = json.dumps([s.output, s.detector, s.params], sort_keys=True)
            judged[key].append(_judge(s, fold.labels["validation"][some], ranks, rules))

    def mean(of: list[_OneFold], figure: str) -> float:
        if figure == "macro_f1":
            return float(np.max(_rules_f1(of)))
        return float(np.mean([getattr(one.metrics, figure) for one in of]))

    best = max(judged.values(), key=lambda of: mean(of, objective))
    first, rule = best[0].scored, int(np.argmax(_rules_f1(best)))
    oscr, auroc = mean(best, "oscr"), mean(best, "auroc")
    figures = {
        figure: mean(best, figure)
        for figure in ("oscr", "auroc", "aupr_unknown", "aupr_known", "fpr95", "closed_set_accuracy")
    }
    for i, figure in enumerate(("known_rejected", "unknown_rejected", "macro_f1")):
        figures[figure] = float(np.mean([one.at_rules[rule][i] for one in best]))
    known = np.mean([one.curve.known_rejected for one in best], axis=0)
    unknown = np.mean([one.curve.unknown_rejected for one in best], axis=0)
    return Judged(
        figures,
        Candidate(first.output, first.detector, first.params, oscr, auroc),
        rules[rule],
        list(zip(known.round(5).tolist(), unknown.round(5).tolist(), strict=True)),
        len(judged) * (len(RATES) + len(rules)),
    )


@dataclass(frozen=True)
class _OneFold:
    """One detector in one fold: threshold-free figures, thresholds for `RATES`, and for each rule the share of known
    items rejected, of unknown items rejected, and the macro-F1."""

    scored: Scored
    metrics: OpenSetMetrics
    curve: OperatingPoints
    at_rules: list[tuple[float, float, float]]


def _judge(s: Scored, labels: np.ndarray, ranks: np.ndarray, rules: Sequence[Rule]) -> _OneFold:
    """One detector, by the thresholds at `ranks` among the calibration scores, counted from 1, and by the rules."""
    scores, classes = s.scores["validation"], s.classes["validation"]
    metrics = open_set_metrics(scores, labels, classes)
    calibration = np.sort(s.scores["calibration"]).astype(np.float64)
    taus = np.append(calibration, np.inf)[np.minimum(ranks - 1, len(calibration))]
    made = [thresholds.create(name, **params) for name, params in rules]
    fixed = [(i, t.fit(calibration).tau) for i, t in enumerate(made) if not (t.needs_unknown or t.by_class)]
    points = operating_points(scores, labels, classes, [*taus, *(tau for _, tau in fixed)])
    n = len(RATES)
    curve = OperatingPoints(points.tau[:n], points.known_rejected[:n], points.unknown_rejected[:n], points.macro_f1[:n])
    at_rules = {
        i: (points.known_rejected[n + j], points.unknown_rejected[n + j], points.macro_f1[n + j])
        for j, (i, _) in enumerate(fixed)
    }
    for i, threshold in enumerate(made):
        if threshold.needs_unknown or threshold.by_class:
            if threshold.needs_unknown:
                rejected = _crosswise(threshold, scores, labels == UNKNOWN)
            else:
                rejected = threshold.fit(s.scores["calibration"], s.classes["calibration"]).decide(scores, classes)
            at_rules[i] = (
                functional.known_rejected(labels, rejected),
                functional.unknown_rejected(labels, rejected),
                functional.macro_f1(labels, classes, rejected),
            )
    return _OneFold(s, metrics, curve, [at_rules[i] for i in range(len(rules))])


def _crosswise(threshold: thresholds.Threshold, scores: np.ndarray, is_unknown: np.ndarray) -> np.ndarray:
    """The decisions on each half of the items, by the threshold fitted on the other; both kinds are halved."""
    half = np.zeros(len(scores), dtype=bool)
    for kind in (is_unknown, ~is_unknown):
        half[np.flatnonzero(kind)[::2]] = True
    rejected = np.zeros(len(scores), dtype=bool)
    for fit_on in (half, ~half):
        if is_unknown[fit_on].any() and not is_unknown[fit_on].all():
            threshold.fit(scores[fit_on], is_unknown=is_unknown[fit_on])
            rejected[~fit_on] = threshold.decide(scores[~fit_on])
    return rejected


def _rules_f1(of: list[_OneFold]) -> np.ndarray:
    """The mean macro-F1 of each rule."""
    return np.mean([[f1 for _, _, f1 in one.at_rules] for one in of], axis=0)
