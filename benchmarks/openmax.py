"""OpenMax against pytorch-ood's, on the same arrays: fit of all items, and prediction of one query.

python benchmarks/openmax.py [--classes 10 100 1000]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from pytorch_ood.detector import OpenMax as PeerOpenMax
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from osml_plugin import detectors

WIDTH = 128
PER_CLASS = 50
QUERIES = 2000
ROUNDS = 3
TAIL, ALPHA = 5, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    print(
        f"{PER_CLASS} items a class, {QUERIES} queries, width {WIDTH}, tail {TAIL}, alpha {ALPHA}, float32, "
        f"{torch.get_num_threads()} threads; medians of {ROUNDS} rounds run in turn (one fit of the peer)"
    )
    print(f"{'classes':>8}{'fit s':>9}{'peer s':>9}{'ratio':>8}{'predict µs':>12}{'peer µs':>9}{'ratio':>8}{'|ΔP|':>9}")
    for n_classes in parser.parse_args().classes:
        compare(n_classes)


def compare(n_classes: int) -> None:
    embeddings, labels, weights, queries = items(n_classes)
    detector = detectors.create("openmax", tail=TAIL, alpha=ALPHA)
    detector.fit(embeddings[: 2 * PER_CLASS], labels[: 2 * PER_CLASS], weights[:2])  # the first call sets torch up
    # The peer fits whatever it is given: what is classified correctly, as the paper has it.
    logits, of_queries = embeddings @ weights.T, queries @ weights.T
    right = logits.argmax(dim=1) == labels
    peer = PeerOpenMax(None, tailsize=TAIL, alpha=ALPHA)
    peer_fit = timed(lambda: peer.fit_logits(logits[right], labels[right]))
    works = {
        "fit": lambda: detector.fit(embeddings, labels, weights),
        "predict": lambda: detector.score(queries),
        "peer": lambda: peer.predict_logits(of_queries),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in tqdm(range(ROUNDS), desc=f"{n_classes} classes", leave=False):
        for name, work in works.items():
            seconds[name].append(timed(work))
    fit, predict, peer_predict = (median(seconds[name]) for name in works)
    difference = (detector.score(queries).sigmoid() - peer.predict_logits(of_queries)).abs().max()
    print(
        f"{n_classes:>8}{fit:>9.3f}{peer_fit:>9.2f}{peer_fit / fit:>8.0f}"
        f"{1e6 * predict / QUERIES:>12.1f}{1e6 * peer_predict / QUERIES:>9.0f}{peer_predict / predict:>8.0f}"
        f"{difference:>9.1e}"
    )


def items(n_classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, labels, class weights and queries near every class. No number is below 0, as after a ReLU: the peer
    wants logits above 0, and some query for every class."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.rand(n_classes, WIDTH, generator=draw)
    directions = normalize(directions * (torch.rand(n_classes, WIDTH, generator=draw) < 0.1))

    def near(classes: Tensor, spread: float) -> Tensor:
        return normalize((directions[classes] + spread * torch.randn(len(classes), WIDTH, generator=draw)).relu())

    labels = torch.arange(n_classes).repeat_interleave(PER_CLASS)
    return near(labels, 0.04), labels, 16 * directions, near(torch.arange(QUERIES) % n_classes, 0.05)


def timed(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


if __name__ == "__main__":
    main()
