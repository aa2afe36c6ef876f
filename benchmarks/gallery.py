"""Galleries of up to a million references in a serving replica: time to ready, latency, recall, enrolment.

python benchmarks/gallery.py [--sizes 1000 100000 1000000] [--data people|products|blobs|none] [--detector knn]

For each size one process writes a bundle, and another one, as a replica does, loads it, answers, enrols and forgets.
Recall is that of the true nearest references (compared with all). There are a thousand calibration items, which every
change scores again. The data are made, 128 numbers wide, unit-norm:

people     a hundred references a class, around random directions
products   at most thirty classes, each spread along twelve directions of its own
blobs      at most thirty classes, each spread alike in all directions
none       no structure at all: uniform on the sphere, in thirty classes by chance
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from osml_plugin import OpenSetRecognizer
from osml_plugin.bundle import load_bundle

WIDTH, HELD_OUT, N_QUERIES = 128, 1000, 512


@dataclass
class Figures:
    ready: float
    single: np.ndarray
    batch: np.ndarray
    recall_known: tuple[float, float]
    recall_unknown: tuple[float, float]
    memory: float
    enrolled: float
    forgotten: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--data", choices=("people", "products", "blobs", "none"), default="products")
    parser.add_argument("--detector", default="knn")
    options = parser.parse_args()
    found = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as room:
            apart(write, Path(room), size, options.data, options.detector)
            found[size] = apart(measure, Path(room))
    first = found[min(found)]
    print(f"\n{options.detector} on '{options.data}', {WIDTH} wide; aims in brackets, growth against {min(found):,}")
    line = "{:<34}" + "{:>16}" * len(found)
    print(line.format("references", *(f"{n:,}" for n in found)))
    for name, value in rows(first):
        print(line.format(name, *(value(figures) for figures in found.values())))


def rows(first: Figures) -> list[tuple[str, Callable[[Figures], str]]]:
    def milliseconds(of: Callable[[Figures], np.ndarray], share: float) -> Callable[[Figures], str]:
        return lambda f: f"{1e3 * np.quantile(of(f), share):.2f}"

    def growth(of: Callable[[Figures], np.ndarray]) -> Callable[[Figures], str]:
        return lambda f: f"{1e3 * (np.quantile(of(f), 0.99) - np.quantile(of(first), 0.99)):+.2f}"

    return [
        ("ready, s [10]", lambda f: f"{f.ready:.2f}"),
        ("1 query, p50, ms", milliseconds(lambda f: f.single, 0.5)),
        ("1 query, p99, ms", milliseconds(lambda f: f.single, 0.99)),
        ("1 query, growth of p99, ms [5]", growth(lambda f: f.single)),
        ("32 queries, p50, ms", milliseconds(lambda f: f.batch, 0.5)),
        ("32 queries, p99, ms", milliseconds(lambda f: f.batch, 0.99)),
        ("32 queries, growth of p99, ms [5]", growth(lambda f: f.batch)),
        ("recall @1/@10, known [0.99]", lambda f: "{:.4f}/{:.4f}".format(*f.recall_known)),
        ("recall @1/@10, unknown", lambda f: "{:.4f}/{:.4f}".format(*f.recall_unknown)),
        ("memory (peak RSS), MB", lambda f: f"{f.memory:,.0f}"),
        ("enrolled and answered, s [1]", lambda f: f"{f.enrolled:.2f}"),
        ("forgotten and answered, s [1]", lambda f: f"{f.forgotten:.2f}"),
    ]


def apart(function: Callable, *args):
    """In a process of its own, so that memory and caches are those of a fresh one."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def make(size: int, data: str, n_more: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings `(size + n_more, 128)` of known classes, their labels, and embeddings of no class `(n_more, 128)`."""
    draw = torch.Generator().manual_seed(0)
    n = size + n_more
    labels = torch.arange(n) % (max(2, size // 100) if data == "people" else 30)
    n_classes = int(labels.max()) + 1
    directions = normalize(torch.randn(n_classes, WIDTH, generator=draw))
    if data == "none":
        known = torch.randn(n, WIDTH, generator=draw)
    elif data == "products":
        axes = torch.randn(n_classes, 12, WIDTH, generator=draw) / (12 * WIDTH) ** 0.5
        along = torch.randn(n, 12, generator=draw)
        known = 0.02 * torch.randn(n, WIDTH, generator=draw)
        for c in range(n_classes):
            known[labels == c] += directions[c] + 0.6 * along[labels == c] @ axes[c]
    else:
        known = directions[labels] + 0.06 * torch.randn(n, WIDTH, generator=draw)
    # Unknown: nearer to one of the known directions than chance, and far from all references.
    some = directions[torch.randint(n_classes, (n_more,), generator=draw)]
    unknown = some * 0.5 + 0.7 * normalize(torch.randn(n_more, WIDTH, generator=draw))
    return normalize(known), labels, normalize(unknown)


def write(room: Path, size: int, data: str, detector: str) -> None:
    known, labels, unknown = make(size, data, HELD_OUT + N_QUERIES)
    parts = [size, HELD_OUT, N_QUERIES]
    (references, held, queries), (names, held_names, _) = known.split(parts), labels.split(parts)
    recognizer = OpenSetRecognizer(detector).fit(references, names, calibration=(held, held_names))
    recognizer.save(room / "bundle")
    torch.save({"queries": queries, "unknown": unknown[:N_QUERIES]}, room / "queries.pt")


def measure(room: Path) -> Figures:
    items = torch.load(room / "queries.pt", weights_only=True)
    queries = items["queries"]
    began = perf_counter()
    recognizer = load_bundle(room / "bundle")
    recognizer.recognize(queries[:32])
    ready = perf_counter() - began
    single = timed(lambda q: recognizer.recognize(q), queries.split(1))
    batch = timed(lambda q: recognizer.recognize(q), queries.split(32) * 8)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    recalls = [recall(recognizer, items[kind]) for kind in ("queries", "unknown")]

    examples = normalize(-queries[:1] + 0.01 * torch.randn(5, WIDTH))
    began = perf_counter()
    recognizer.enroll("new", examples[:4])
    assert recognizer.recognize(examples[4:]).nearest == ("new",)
    enrolled = perf_counter() - began
    began = perf_counter()
    recognizer.forget("0")
    assert all(n != "0" for n in recognizer.recognize(queries[:1]).nearest)
    return Figures(ready, single, batch, *recalls, memory, enrolled, perf_counter() - began)


def timed(answer: Callable[[Tensor], object], batches: tuple[Tensor, ...]) -> np.ndarray:
    """Seconds of each call."""
    seconds = []
    for queries in batches:
        began = perf_counter()
        answer(queries)
        seconds.append(perf_counter() - began)
    return np.array(seconds)


def recall(recognizer: OpenSetRecognizer, queries: Tensor) -> tuple[float, float]:
    """The share of the true nearest, and of the ten nearest, that a search finds."""
    references, queries = recognizer.gallery.embeddings, queries[:200]
    true = torch.cat([torch.cdist(q, references).topk(10, largest=False).indices for q in queries.split(20)])
    found = recognizer.gallery.index.search(queries, 10)[1]
    nearest = (true[:, :1] == found[:, :1]).float().mean()
    return float(nearest), float((true[:, :, None] == found[:, None, :]).any(dim=2).float().mean())


if __name__ == "__main__":
    main()
