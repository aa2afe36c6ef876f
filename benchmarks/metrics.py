"""How long all open-set metrics take together, against the peers' calls for the same set and against sorting alone.

python benchmarks/metrics.py [--n 1000000] [--quadratic 20000]

The peers: scikit-learn for both average precisions and the ROC curve, from which the rates and Youden's J are read;
pytorch-ood for each metric that it has; and OSCR as Vaze et al. publish it, O(n²), on fewer items.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np
import torch
from pytorch_ood.metrics import functional as pytorch_ood
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score, roc_curve
from tqdm import tqdm

from osml_plugin import UNKNOWN
from osml_plugin.metrics import bootstrap_intervals, delong_interval, functional, open_set_metrics

ROUNDS = 5


def items(n: int) -> tuple[np.ndarray, ...]:
    """Scores, labels, predictions and decisions of n known and n unknown items."""
    rng = np.random.default_rng(0)
    scores = np.concatenate((rng.normal(0, 1, n), rng.normal(1, 1, n)))
    labels = np.concatenate((rng.integers(0, 30, n), np.full(n, UNKNOWN)))
    predictions = np.where((rng.random(2 * n) < 0.9) & (labels >= 0), labels, rng.integers(0, 30, 2 * n))
    return scores, labels, predictions, scores > 1.5


def quadratic_oscr(scores: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> float:
    """Each cut of the sorted scores counted from the start: what the published code computes, in NumPy."""
    unknown = labels == UNKNOWN
    order = np.argsort(-scores)
    correct, unknown = (labels == predictions)[order], unknown[order]
    n, n_unknown = scores.size, np.count_nonzero(unknown)
    ccr, fpr = np.zeros(n + 2), np.zeros(n + 2)
    for k in range(n - 1):
        ccr[k] = np.count_nonzero(correct[k + 1 :]) / (n - n_unknown)
        fpr[k] = np.count_nonzero(unknown[k:]) / n_unknown
    ccr[n + 1], fpr[n + 1] = 1, 1
    points = sorted(zip(fpr, ccr, strict=True), reverse=True)
    return sum((points[j][0] - points[j + 1][0]) * (points[j][1] + points[j + 1][1]) / 2 for j in range(n + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1_000_000, help="known items, and as many unknown ones")
    parser.add_argument("--quadratic", type=int, default=20_000, help="the same for the O(n²) OSCR")
    args = parser.parse_args()
    n = args.n

    scores, labels, predictions, rejected = items(n)
    few = items(args.quadratic)[:3]
    unknown, known = labels == UNKNOWN, labels != UNKNOWN
    tensors = [torch.from_numpy(values) for values in (scores, predictions, labels)]
    ranking = functional.rank(scores, labels, predictions)

    def scikit_learn() -> tuple[float, ...]:
        decided = np.where(rejected, UNKNOWN, predictions)
        fpr, tpr, _ = roc_curve(unknown, scores, drop_intermediate=False)
        known_fpr, known_tpr, _ = roc_curve(known, -scores, drop_intermediate=False)
        return (
            roc_auc_score(unknown, scores),
            average_precision_score(unknown, scores),
            average_precision_score(known, -scores),
            known_fpr[np.searchsorted(known_tpr, 0.95)],
            fpr[np.searchsorted(tpr, 0.95)],
            np.max(tpr - fpr),
            f1_score(labels, decided, average="macro"),
            accuracy_score(labels, decided),
            accuracy_score(labels[known], predictions[known]),
        )

    def pytorch_oods() -> tuple[float, ...]:
        scores, predictions, labels = tensors
        return (
            float(pytorch_ood.auroc(scores, labels)),
            float(pytorch_ood.aupr(scores, labels, "ood")),
            float(pytorch_ood.aupr(scores, labels, "id")),
            float(pytorch_ood.fpr_at_tpr(scores, labels)),
            float(pytorch_ood.autc(scores, labels)),
            pytorch_ood.oscr_score(scores, predictions, labels),
            float(pytorch_ood.accuracy(predictions, labels)),
        )

    sort, ours = "np.argsort of the scores", "open_set_metrics: all in one pass"
    theirs = "scikit-learn: 9 of them", "pytorch-ood: 7 of them"
    quadratic, ours_few = f"O(n²) OSCR, {args.quadratic:,} of each", f"open_set_metrics, {args.quadratic:,} of each"
    works = {
        sort: lambda: np.argsort(scores),
        ours: lambda: open_set_metrics(scores, labels, predictions, rejected),
        theirs[0]: scikit_learn,
        theirs[1]: pytorch_oods,
        ours_few: lambda: open_set_metrics(*few),
        quadratic: lambda: quadratic_oscr(*few),
        "delong_interval, ranked": lambda: delong_interval(ranking),
        "bootstrap_intervals, 10 draws of 3": lambda: bootstrap_intervals(scores, labels, predictions, draws=10),
    }
    # Round by round, so that another load on the machine falls on all alike.
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in tqdm(range(ROUNDS)):
        for name, work in works.items():
            seconds[name].append(timed(work))
    middle = {name: median(times) for name, times in seconds.items()}

    print(f"{n:,} known + {n:,} unknown items, float64, medians of {ROUNDS}")
    print(f"{'':<44}{'seconds':>9}{'/ argsort':>11}")
    for name, time in middle.items():
        print(f"{name:<44}{time:>9.3f}{time / middle[sort]:>11.2f}")
    print(f"peers / ours: {sum(middle[name] for name in theirs) / middle[ours]:.1f}")
    print(f"O(n²) OSCR / all of ours: {middle[quadratic] / middle[ours_few]:.0f}")
    metrics, peer = open_set_metrics(scores, labels, predictions), scikit_learn()
    difference = np.abs(np.subtract((metrics.auroc, metrics.aupr_unknown, metrics.aupr_known), peer[:3])).max()
    print(f"largest difference from scikit-learn: {difference:.1e}")


def timed(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


if __name__ == "__main__":
    main()
