"""Discovery by size: seconds by stage, peak memory and accuracy, beside fast-hdbscan and EVoC where they are installed.

python benchmarks/discovery/scale.py [--sizes 10000x64 24000x64 100000x128] [--peers-up-to 24000] [--plot scale.png]

The items are a mixture of 300 normal classes of unequal size and width that overlap, of 16 dimensions turned into D;
every fifth class is known. Each size, and each peer, runs in a process of its own, so that peak memory is its own; it
is the most that the process held, libraries and the items themselves included, and `at first` is what it held when
`discover` was called. A peer is run on the unknown items twice, and its second time is told (the first one compiles).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

import numpy as np

from osml_plugin.discovery import discover
from osml_plugin.discovery import graph as graph_module
from osml_plugin.discovery import pool as pool_module
from osml_plugin.discovery.methods import communities as communities_module
from osml_plugin.metrics import discovery_metrics

SIZES = ("10000x64", "24000x64", "100000x128", "300000x128", "1000000x128")
STAGES = {"neighbours": (graph_module, "nearest"), "graph": (pool_module, "neighbor_graph")}
STAGES |= {name: (communities_module, name) for name in ("contracted", "communities", "quotient")}
PEERS = {"fast-hdbscan": ("fast_hdbscan", "HDBSCAN"), "EVoC": ("evoc", "EVoC")}


def mixture(n: int, width: int, n_classes: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Items `(n, width)` float32 and their classes."""
    rng = np.random.default_rng(seed)
    latent = 16
    centres = rng.normal(size=(n_classes, latent)).astype(np.float32)
    spread = rng.uniform(0.3, 0.75, size=(n_classes, 1)).astype(np.float32)
    share = rng.lognormal(sigma=0.6, size=n_classes)
    classes = rng.choice(n_classes, size=n, p=share / share.sum())
    turned = np.linalg.qr(rng.normal(size=(width, latent)))[0].T.astype(np.float32)
    items = np.empty((n, width), dtype=np.float32)
    for start in range(0, n, 65_536):
        of = classes[start : start + 65_536]
        inside = centres[of] + spread[of] * rng.standard_normal((len(of), latent), dtype=np.float32)
        items[start : start + len(of)] = inside @ turned
    items += 0.05 * rng.standard_normal(items.shape, dtype=np.float32)
    return items, classes


def peak() -> float:
    """The most memory that this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def timed(seconds: dict[str, float], stage: str, function: Callable) -> Callable:
    def wrapper(*args, **kwargs):
        start = perf_counter()
        result = function(*args, **kwargs)
        seconds[stage] = seconds.get(stage, 0.0) + perf_counter() - start
        return result

    return wrapper


def run(method: str, size: str) -> dict:
    """What one method does at one size; in a process of its own."""
    items, classes = mixture(*map(int, size.split("x")))
    known = classes % 5 == 0
    unknown, known_items = items[~known], items[known]
    del items
    discover(unknown[:500])  # whatever is loaded at the first call
    at_first, stages = peak(), {}
    if method == "discover":
        for stage, (module, name) in STAGES.items():
            setattr(module, name, timed(stages, stage, getattr(module, name)))
        start, cpu = perf_counter(), process_time()
        labels = discover(unknown, known_embeddings=known_items, known_labels=classes[known]).labels
    else:
        module, name = PEERS[method]
        peer = getattr(importlib.import_module(module), name)
        peer().fit_predict(unknown)
        start, cpu = perf_counter(), process_time()
        labels = peer().fit_predict(unknown)
    took, cpu = perf_counter() - start, process_time() - cpu
    if stages:
        stages["graph"] -= stages["neighbours"]
        stages["other"] = took - sum(stages.values())
    result = discovery_metrics(classes[~known], labels)
    return {
        "seconds": took,
        "cpu": cpu,
        "stages": stages,
        "at first": at_first,
        "peak": peak(),
        "accuracy": result.accuracy,
        "nmi": result.nmi,
        "found": result.n_classes_found,
        "true": len(np.unique(classes[~known])),
    }


def plot(results: dict[str, dict[int, dict]], file: Path) -> None:
    """Seconds and gigabytes against items, both axes logarithmic, beside a line of n log n."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for method, by_size in results.items():
        n = np.array(sorted(by_size))
        left.loglog(n, [by_size[i]["seconds"] for i in n], "o-", label=method)
        if method == "discover":
            cpu = np.array([by_size[i]["cpu"] for i in n])
            left.loglog(n, cpu, "s:", color="tab:gray", label="discover, processor time")
            line = n * np.log(n)
            left.loglog(n, cpu[0] * line / line[0], "k--", linewidth=1, label="n log n")
        right.loglog(n, [by_size[i]["peak"] for i in n], "o-", label=method)
    left.set(xlabel="items", ylabel="seconds")
    right.set(xlabel="items", ylabel="peak memory, GB")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="NxD")
    parser.add_argument("--peers-up-to", type=int, default=24_000, metavar="N", help="items up to which peers run")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of the growth")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # method and size, in a process of its own
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(*arguments.one)))
        return

    row = "{:<11} {:<13} {:>8} {:>8} {:>9} {:>7} {:>6} {:>6} {:>6} {:>6}  {}".format
    print(row("size", "method", "s", "cpu s", "at first", "peak GB", "ACC", "NMI", "found", "true", "stages, s"))
    results: dict[str, dict[int, dict]] = {}
    peers = [peer for peer, (module, _) in PEERS.items() if importlib.util.find_spec(module)]
    for size in arguments.sizes:
        n = int(size.split("x")[0])
        for method in ["discover", *(peers if n <= arguments.peers_up_to else [])]:
            command = [sys.executable, __file__, "--one", method, size]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            results.setdefault(method, {})[n] = result
            figures = [f"{result[name]:.1f}" for name in ("seconds", "cpu", "at first", "peak")]
            figures += [f"{result[name]:.3f}" for name in ("accuracy", "nmi")]
            stages = " ".join(f"{stage} {seconds:.1f}" for stage, seconds in result["stages"].items())
            print(row(size, method, *figures, result["found"], result["true"], stages), flush=True)
    for peer in PEERS.keys() - set(peers):
        print(f"{peer}: not installed")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
