"""The page of one evaluation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .. import UNKNOWN
from ..errors import OsmlError
from ..evaluation import Evaluation
from ..metrics.discovery import LEFT_OUT
from . import pictures
from .page import ImageLike, Page

Images = Sequence[ImageLike] | None

EXEMPLARS = 9
SHOWN_GROUPS = 40
SHOWN_CONFUSIONS = 20
SHOWN_MISTAKES = 18

MEANING = {
    "n_known_items": "Items tested whose class the recognizer knows.",
    "n_unknown_items": "Items tested whose class it does not know.",
    "known_rejected": "Share of known items called unknown{asked}. Lower is better.",
    "unknown_rejected": "Share of unknown items called unknown. Higher is better.",
    "macro_f1": "Mean F1 of all classes, unknown being one: all decisions in one figure. Higher is better.",
    "youden": "Share of unknown items called unknown minus that of known ones. Higher is better.",
    "open_set_accuracy": "Share of all items called what they are. Depends on how many are unknown. Higher is better.",
    "known_rejected_spread": "Standard deviation of the share called unknown, over the known classes. Lower is better.",
    "known_rejected_worst": "Share called unknown of the known class of which most is. Lower is better.",
    "threshold": "τ: an item is called unknown if its score is above it.",
    "alpha": "Share of known items that may be rejected, where the threshold is chosen by it.",
    "closed_set_accuracy": "Share of known items whose nearest class is their own, nothing rejected. Higher is better.",
    "auroc": "Chance that an unknown item scores above a known one: 0.5 is guessing, 1 is perfect.",
    "aupr_unknown": "Average precision of finding the unknown items. Depends on how many there are. Higher is better.",
    "aupr_known": "Average precision of finding the known items. Depends on how many there are. Higher is better.",
    "fpr95": "Share of unknown items accepted where 95 % of the known ones are. Lower is better.",
    "oscr": "Area under correctly classified known items over accepted unknown ones; 1 is best, and at most the "
    "closed-set accuracy can be had.",
    "fpr95_unknown_positive": "Share of known items rejected where 95 % of the unknown ones are. Lower is better.",
    "open_auc": "The same area where an unknown item of equal score counts against it.",
    "ccr_at_fpr_0_1": "Share of known items accepted and right where 10 % of the unknown are accepted; 1 is best.",
    "ccr_at_fpr_0_01": "The same where 1 % are.",
    "ccr_at_fpr_0_001": "The same where 0.1 % are.",
    "eer": "Error rate where as many known items are rejected as unknown ones accepted. Lower is better.",
    "detection_error": "Least mean of these two error rates at any threshold. Lower is better.",
    "best_youden": "Most that the share of unknown rejected exceeds that of known, at any threshold; 1 is best.",
    "autc": "Mean of both error rates over the range of the scores. Lower is better.",
    "best_threshold": "The threshold of best_youden, for these very items.",
    "openness": "0 is a closed set; nearer 1 the more classes are unknown.",
    "accuracy": "Share of items in the right group, groups and classes paired one to one. Higher is better.",
    "nmi": "Information that groups and classes share: 0 is none, 1 is all.",
    "ari": "Pairs of items that are rightly together or apart, corrected for chance: 0 is chance, 1 is perfect.",
    "bcubed_precision": "Of the items in an item's group, the share of its class: low where groups mix classes.",
    "bcubed_recall": "Of the items of an item's class, the share in its group: low where classes are torn apart.",
    "bcubed_f1": "Harmonic mean of these two. Higher is better.",
    "pair_precision": "Of the pairs of items in one group, the share that is of one class.",
    "pair_recall": "Of the pairs of items of one class, the share in one group.",
    "pair_f1": "Harmonic mean of these two. Large classes weigh most.",
    "accuracy_old": "Share of items of the classes known before that are in the right group.",
    "accuracy_new": "Share of items of new classes that are in the right group.",
    "n_classes_true": "Classes among the unknown items.",
    "n_classes_found": "Groups found, without being told how many there are.",
    "n_classes_error": "How far the number of groups is off, as a share of the classes. Lower is better.",
}
"""One plain sentence for each figure."""

AT_THRESHOLD = (
    "n_known_items",
    "n_unknown_items",
    "known_rejected",
    "unknown_rejected",
    "macro_f1",
    "youden",
    "open_set_accuracy",
    "known_rejected_spread",
    "known_rejected_worst",
    "threshold",
    "alpha",
)
"""The figures of the decisions; all others hold whatever the threshold."""


def write_report(
    path: str | Path,
    evaluation: Evaluation,
    *,
    paths: Sequence[str | Path] | None = None,
    images: Sequence[ImageLike] | None = None,
    title: str = "Open-set evaluation",
) -> None:
    """Write the page of one evaluation of N items, or nothing.

    Args:
        paths: `(N,)` the image file of each item, in the order of the evaluation; None for embeddings. A file that
            cannot be read is shown as such.
        images: the images themselves instead: uint8 `(N, H, W)` or `(N, H, W, C)`, or PIL images.

    Raises:
        OsmlError: both or the wrong number of `paths` and `images`, or a page that cannot be written.
    """
    if paths is not None and images is not None:
        raise OsmlError("give either the paths of the images or the images themselves, not both")
    page = Page(title, summary(evaluation), evaluation.rendering)
    add_evaluation(page, evaluation, images if paths is None else paths)
    page.write(path)


def add_evaluation(page: Page, evaluation: Evaluation, shown: Images = None) -> None:
    """Add the figures and pictures of one evaluation; `shown` is the image of each item, or its file."""
    if shown is not None and len(shown) != len(evaluation.labels):
        raise OsmlError(
            f"{len(shown)} images for an evaluation of {len(evaluation.labels)} items: expected one for each"
        )
    for part in tqdm((_figures, _scores, _map, _confusion, _groups, _mistakes), desc="report", unit="part"):
        part(page, evaluation, shown)


# --- the parts, in order ---------------------------------------------------------------------------------


def _figures(page: Page, evaluation: Evaluation, shown: Images) -> None:
    figures = evaluation.metrics.to_dict() | {"threshold": evaluation.threshold, "alpha": evaluation.alpha}

    def rows(figures: dict, names: Iterable[str]) -> list:
        asked = "" if evaluation.alpha is None else f"; asked for: {evaluation.alpha:g}"
        return [(name, figures[name], MEANING[name].format(asked=asked)) for name in names]

    header = ("figure", "value", "in plain words")
    page.add_table("At the threshold", header, rows(figures, AT_THRESHOLD), f"Detector: {evaluation.detector}.")
    if evaluation.class_thresholds:
        note = "Items whose nearest class is one of these are judged by its own τ; all others by that above."
        page.add_table("Thresholds by class", ("class", "τ"), list(evaluation.class_thresholds.items()), note)
    rest = [name for name in figures if name not in AT_THRESHOLD]
    note = "What the scores are worth, whatever the threshold. A dash: undefined without items of both kinds."
    page.add_table("At any threshold", header, rows(figures, rest), note)
    if evaluation.discovery is not None:
        found = evaluation.discovery.to_dict()
        note = "All items of unknown classes grouped into new classes, against their true classes."
        page.add_table("Grouping of the unknown", header, rows(found, found), note)


def _scores(page: Page, evaluation: Evaluation, shown: Images) -> None:
    note = "What lies right of the dashed line is called unknown. The outermost bars hold whatever lies beyond them."
    if math.isinf(evaluation.threshold):
        note = "The threshold is infinite, so nothing is rejected. The outermost bars hold whatever lies beyond them."
    if evaluation.class_thresholds:
        note = (
            "The dashed line, if any, is the τ of classes that have none of their own: not all that lies right of it "
            "is called unknown, nor all that lies left of it known. The outermost bars hold whatever lies beyond them."
        )
    page.add_figure("Scores", pictures.score_histogram(evaluation), note)
    curves = [figure for figure in (pictures.roc(evaluation), pictures.oscr(evaluation)) if figure is not None]
    if curves:
        note = "Every threshold at once: what is gained against what it costs. The dot is the threshold in use."
        page.add_figure("ROC and OSCR", curves, note)


def _map(page: Page, evaluation: Evaluation, shown: Images) -> None:
    n = len(evaluation.labels)
    which = f"{pictures.MAP_ITEMS:,} of {n:,} items, drawn at random" if n > pictures.MAP_ITEMS else f"{n:,} items"
    note = (
        f"Near in the map is near in the embedding; distances between islands mean little ({which}). First what "
        "the items are, then what the recognizer said of them."
    )
    page.add_figure("Map of the embeddings", pictures.maps(evaluation), note)


def _confusion(page: Page, evaluation: Evaluation, shown: Images) -> None:
    figure = pictures.confusion(evaluation)
    if figure is not None:
        note = "Each row is a true class, in percent of its items. Unknown classes belong in the last column."
        page.add_figure("Confusion", figure, note)
        return
    pairs = list(zip(evaluation.names, (n or "unknown" for n in evaluation.recognition.names), strict=True))
    right = evaluation.labels == evaluation.recognition.labels
    items, wrong = Counter(evaluation.names), Counter(p for p, r in zip(pairs, right, strict=True) if not r)
    rows = [(true, answer, count, count / items[true]) for (true, answer), count in wrong.most_common(SHOWN_CONFUSIONS)]
    header = ("true class", "answer", "items", "share of its class")
    page.add_table("Confusion", header, rows, "The wrong answers given most often.")


def _groups(page: Page, evaluation: Evaluation, shown: Images) -> None:
    groups = evaluation.groups
    if groups is None:
        return
    figure = pictures.groups(evaluation)
    if figure is not None:
        note = (
            "Each row is a true unknown class, in percent of its items. Best is one dark cell in each row and column."
        )
        page.add_figure("Groups against classes", figure, note)
    low, high = groups.n_classes_interval
    left_out = np.count_nonzero(groups.labels == LEFT_OUT)
    note = f"{groups.n_classes} groups ({low} to {high} fit about as well); {left_out} of {len(groups.labels)} items "
    note += "in none."
    items = np.flatnonzero(evaluation.labels == UNKNOWN)
    sizes = np.bincount(groups.labels[groups.labels != LEFT_OUT], minlength=groups.n_classes)
    if groups.n_classes > SHOWN_GROUPS:
        note += f" The {SHOWN_GROUPS} largest are shown."
    rows, cards = [], []
    for group in range(min(groups.n_classes, SHOWN_GROUPS)):  # the largest come first
        members = groups.labels == group
        name, count = Counter(evaluation.names[i] for i in items[members]).most_common(1)[0]
        confidence, share = float(groups.confidence[members].mean()), count / sizes[group]
        exemplars = items[groups.exemplars[group][:EXEMPLARS]].tolist()
        rows.append((group, int(sizes[group]), confidence, name, share, ", ".join(map(str, exemplars))))
        caption = f"Group {group}: {sizes[group]} items, {share:.0%} of them {name}; confidence {confidence:.2f}"
        if shown is not None:
            cards.append((caption, [(shown[i], evaluation.names[i]) for i in exemplars]))
    if shown is not None:
        page.add_images("Groups found", cards, note + " Of each its most typical items, with their true class.")
    else:
        header = ("group", "items", "confidence", "most are", "share", "most typical items")
        page.add_table("Groups found", header, rows, note)


def _mistakes(page: Page, evaluation: Evaluation, shown: Images) -> None:
    """The most telling ones: the score says how sure the recognizer was."""
    answer, scores = evaluation.recognition, evaluation.recognition.scores
    known, rejected = evaluation.labels != UNKNOWN, answer.labels == UNKNOWN
    confused = known & ~rejected & (answer.labels != evaluation.labels)
    p_values = [None] * len(scores) if answer.p_values is None else answer.p_values.tolist()
    for heading, of, wrong, key, note in (
        ("Known, but rejected", known, rejected, -scores, "The least usual for a known item come first."),
        ("Unknown, but accepted", ~known, ~rejected, scores, "Those most usual for a known item come first."),
        ("Taken for another known class", known, confused, scores, "The most usual for a known item come first."),
    ):
        items = np.flatnonzero(of & wrong)
        worst = items[np.argsort(key[items], kind="stable")][:SHOWN_MISTAKES].tolist()
        note = f"{len(items):,} of {np.count_nonzero(of):,} items. " + (note if worst else "")
        facts = [(i, evaluation.names[i], answer.nearest[i], float(scores[i]), p_values[i]) for i in worst]
        if shown is None:
            page.add_table(heading, ("item", "true class", "nearest known class", "score", "p"), facts, note)
            continue
        cards = []
        for i, true, nearest, score, p in facts:
            sure = f"score {score:.3g}" if p is None else f"p {p:.2g}"
            cards.append((shown[i], f"{true}\nnearest: {nearest}\n{sure}"))
        page.add_images(heading, [("", cards)] if cards else [], note)


# --- words -----------------------------------------------------------------------------------------------


def summary(evaluation: Evaluation) -> str:
    """What was tested and what came out, in two sentences."""
    m = evaluation.metrics
    known, unknown = f"{m.n_known_items:,} items of known classes", f"{m.n_unknown_items:,} of unknown ones"
    said = []
    if m.n_known_items:
        asked = "" if evaluation.alpha is None else f" ({evaluation.alpha:.1%} asked for)"
        said.append(f"{m.known_rejected:.1%} of the known items{asked}")
    if m.n_unknown_items:
        said.append(f"{m.unknown_rejected:.1%} of the unknown ones")
    lead = f"Tested on {known} and {unknown}. Called unknown: {', and '.join(said)}."
    if evaluation.groups is not None:
        found, true = evaluation.discovery.n_classes_found, evaluation.discovery.n_classes_true
        lead += f" The unknown items were grouped into {found} classes; in truth they are {true}."
    return lead
