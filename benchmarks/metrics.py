"""How long all open-set metrics take together, against scikit-learn's three and against sorting alone.

python benchmarks/metrics.py [--n 1000000]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score
from tqdm import tqdm

from osml_plugin import UNKNOWN
from osml_plugin.metrics import open_set_metrics

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1_000_000, help="known items, and as many unknown ones")
    n = parser.parse_args().n

    rng = np.random.default_rng(0)
    scores = np.concatenate((rng.normal(0, 1, n), rng.normal(1, 1, n)))
    labels = np.concatenate((rng.integers(0, 30, n), np.full(n, UNKNOWN)))
    predictions = np.where((rng.random(2 * n) < 0.9) & (labels >= 0), labels, rng.integers(0, 30, 2 * n))
    rejected = scores > 1.5
    unknown = labels == UNKNOWN

    def scikit_learn() -> tuple[float, float, float]:
        return (
            roc_auc_score(unknown, scores),
            average_precision_score(unknown, scores),
            average_precision_score(~unknown, -scores),
        )

    works = {
        "np.argsort of the scores": lambda: np.argsort(scores),
        "open_set_metrics: all 9, one pass": lambda: open_set_metrics(scores, labels, predictions, rejected),
        "scikit-learn: AUROC, 2 average precisions": scikit_learn,
    }
    # Round by round, so that another load on the machine falls on all alike.
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in tqdm(range(ROUNDS)):
        for name, work in works.items():
            seconds[name].append(timed(work))

    ours = open_set_metrics(scores, labels, predictions)
    difference = np.abs(np.subtract((ours.auroc, ours.aupr_unknown, ours.aupr_known), scikit_learn())).max()
    sort = median(seconds["np.argsort of the scores"])
    print(f"{n:,} known + {n:,} unknown items, float64, medians of {ROUNDS}")
    print(f"{'':<44}{'seconds':>9}{'/ argsort':>11}")
    for name, times in seconds.items():
        print(f"{name:<44}{median(times):>9.3f}{median(times) / sort:>11.2f}")
    print(f"largest difference from scikit-learn: {difference:.1e}")


def timed(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


if __name__ == "__main__":
    main()
