"""Fit and score of each detector against pytorch-ood's of the same name, and kNN against bare faiss.

python benchmarks/detectors.py [--small] [--rounds 3] [--only knn vim]

The same float32 arrays and as many threads on both sides; 100 classes, width 128. Both sides are made, fitted and asked
for scores in each round, logits included: ours from the class weights, theirs from a linear layer that holds them,
whose logits of the training items count too where the peer is fitted on logits. Ours check all that they are given for
NaN and find the nearest class besides; theirs do neither.

The peers get all queries at once, but for NNGuide, whose products with all training items would not fit in memory: it
gets them in parts as large as ours. Our kNN takes the k-th reference of each class, theirs and bare faiss of all. What
is quick is run again until a second is spent on it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import exp, log
from statistics import fmean, median
from time import perf_counter

import faiss
import pytorch_ood.detector as peers
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from osml_plugin import detectors

N_CLASSES, WIDTH = 100, 128
K = 5
TAIL = 20
LONG = 20
"""Seconds after which a round is the last of its detector's."""
ENOUGH = 1
"""Seconds of rounds: until then there are more of them than were asked for."""


def items(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training embeddings, labels, class weights, and queries, half of which belong to no class."""
    draw = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(N_CLASSES, WIDTH, generator=draw))
    labels = torch.arange(n) % N_CLASSES
    noise = 0.08 * torch.randn(2, n, WIDTH, generator=draw)
    known = normalize(directions[labels] + noise[0])
    queries = normalize(directions[labels] + noise[1])
    queries[::2] = normalize(torch.randn(len(queries[::2]), WIDTH, generator=draw))
    return known, labels, 16 * directions, queries


def comparisons(embeddings: Tensor, labels: Tensor, weights: Tensor, queries: Tensor, threads: int) -> dict:
    """By name: our parameters, and the peer's fit and score."""
    head = nn.Linear(WIDTH, N_CLASSES, bias=False).requires_grad_(False)
    head.weight.data = weights

    def features(peer) -> Tensor:
        return peer.fit_features(embeddings, labels).predict_features(queries)

    def in_parts(peer) -> Tensor:
        peer.fit_features(embeddings, labels)
        return torch.cat([peer.predict_features(part) for part in queries.split(detectors.Detector.chunk_size)])

    def logits(peer) -> Tensor:
        return peer.predict_logits(head(queries))

    def fitted_logits(peer) -> Tensor:
        of_known = head(embeddings)
        right = of_known.argmax(dim=1) == labels
        return peer.fit_logits(of_known[right], labels[right]).predict_logits(head(queries))

    def maps(peer) -> Tensor:
        if isinstance(peer, peers.ReAct):
            peer.fit_feature_maps(embeddings[:, :, None, None], labels)
        return peer.predict_feature_maps(queries[:, :, None, None])

    def knn() -> Tensor:
        peer = peers.KNN(None, k=K)
        peer.knn.n_jobs = threads
        return features(peer)

    def last(feature_maps: Tensor) -> Tensor:
        return head(feature_maps.flatten(1))

    return {
        "max_logit": ({}, lambda: logits(peers.MaxLogit(None))),
        "msp": ({}, lambda: logits(peers.MaxSoftmax(None))),
        "energy": ({}, lambda: logits(peers.EnergyBased(None))),
        "entropy": ({}, lambda: logits(peers.Entropy(None))),
        "gen": ({}, lambda: logits(peers.GEN(None))),
        "kl_matching": ({}, lambda: fitted_logits(peers.KLMatching(None))),
        "openmax": ({"tail": TAIL}, lambda: fitted_logits(peers.OpenMax(None, tailsize=TAIL))),
        "vim": ({}, lambda: features(peers.ViM(None, d=WIDTH // 2, w=weights, b=torch.zeros(N_CLASSES)))),
        "nnguide": ({}, lambda: in_parts(peers.NNGuide(None, head))),
        "fdbd": ({}, lambda: features(peers.fDBD(None, head))),
        "nci": ({}, lambda: features(peers.NCI(None, head))),
        "she": ({}, lambda: features(peers.SHE(None, head))),
        "react": ({}, lambda: maps(peers.ReAct(None, last))),
        "ash": ({}, lambda: maps(peers.ASH(None, last))),
        "scale": ({}, lambda: maps(peers.SCALE(None, last))),
        "mahalanobis": ({}, lambda: features(peers.Mahalanobis(None))),
        "relative_mahalanobis": ({}, lambda: features(peers.RMD(None))),
        "gmm": ({}, lambda: features(peers.GMM(None))),
        "knn": ({"k": K}, knn),
    }


def bare_faiss(embeddings: Tensor, queries: Tensor) -> None:
    index = faiss.IndexFlatL2(WIDTH)
    index.add(embeddings.numpy())
    index.search(queries.numpy(), K)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="5,000 items and queries instead of 50,000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these detectors only")
    arguments = parser.parse_args()
    n, threads = 5000 if arguments.small else 50_000, torch.get_num_threads()
    embeddings, labels, weights, queries = items(n)
    pairs = comparisons(embeddings, labels, weights, queries, threads)
    pairs = {name: pairs[name] for name in arguments.only or pairs}

    def ours(name: str, params: dict) -> Callable[[], Tensor]:
        return lambda: detectors.create(name, **params).fit(embeddings, labels, weights).score(queries)

    works = {name: (ours(name, params), peer) for name, (params, peer) in pairs.items()}
    if "knn" in works:
        works["knn / faiss"] = (works["knn"][0], lambda: bare_faiss(embeddings, queries))
    print(f"{n:,} training items, {n:,} queries, width {WIDTH}, {N_CLASSES} classes, {threads} threads; seconds of fit")
    print(f"and score, medians of {arguments.rounds} rounds or more run in turn")
    print(f"{'':<24}{'ours':>9}{'peer':>9}{'ratio':>9}")
    ratios = {}
    with threadpool_limits(threads), tqdm(total=len(works)) as bar:
        for name, (mine, peer) in works.items():
            seconds = []
            while len(seconds) < arguments.rounds or sum(map(sum, seconds)) < ENOUGH:
                seconds.append((timed(mine), timed(peer)))
                if sum(seconds[-1]) > LONG:
                    break
            bar.update()
            own, theirs = (median(of_one) for of_one in zip(*seconds, strict=True))
            ratios[name] = theirs / own
            tqdm.write(f"{name:<24}{own:>9.3f}{theirs:>9.3f}{theirs / own:>8.2f}×")
    of_faiss = ratios.pop("knn / faiss", None)
    mean = exp(fmean(map(log, ratios.values())))
    print(f"geometric mean of {len(ratios)}: {mean:.2f}×; least: {min(ratios.values()):.2f}×")
    if of_faiss:
        print(f"kNN takes {1 / of_faiss:.2f} × the time of faiss.IndexFlatL2 alone")


def timed(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


if __name__ == "__main__":
    main()
