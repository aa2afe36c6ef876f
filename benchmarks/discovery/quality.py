"""How well unknown classes are found and counted, against k-means that is told their number.

python benchmarks/discovery.py [--fashion-mnist DIR] [--draws 5]

Each draw takes other classes as known (half of them), pseudo-unknown (one or two) and unknown, and trains a small
network with ArcFace on 55 % of the known items. The rest of them and the pseudo-unknown classes are the references;
one in ten of the former is handed in among the unknown ones, as wrongly rejected. Figures are over the items
of unknown classes: `found` counts the proposed classes that have one, `interval` all proposed classes.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from pytorch_metric_learning.losses import ArcFaceLoss
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from osml_plugin.discovery import discover
from osml_plugin.metrics import discovery_metrics

WIDTH = 48


def read_idx(path: Path) -> np.ndarray:
    with gzip.open(path) as file:
        data = file.read()
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def digits() -> tuple[Tensor, np.ndarray, int]:
    """Images `(N, 1, S, S)`, labels, epochs."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images.reshape(-1, 1, 8, 8) / 16, dtype=torch.float32), labels, 25


def fashion_mnist(folder: Path) -> tuple[Tensor, np.ndarray, int]:
    images, labels = (read_idx(folder / f"train-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    some = np.random.default_rng(0).permutation(len(labels))[:12_000]
    return torch.tensor(images[some, None] / 255, dtype=torch.float32), labels[some].astype(np.int64), 4


def embed(images: Tensor, train: np.ndarray, labels: np.ndarray, epochs: int) -> Tensor:
    """Embeddings of all images by a network trained on those of `train`."""
    side = images.shape[-1] // 4
    layers = [
        layer
        for i, o in ((1, 24), (24, 48))
        for layer in (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * side * side, WIDTH))
    classes, targets = np.unique(labels[train], return_inverse=True)
    loss = ArcFaceLoss(len(classes), WIDTH, scale=32)
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters(), "lr": 1e-3}, {"params": loss.parameters(), "lr": 1e-2}]
    )
    data = torch.utils.data.TensorDataset(images[train], torch.from_numpy(targets))
    for _ in range(epochs):
        for batch, target in torch.utils.data.DataLoader(data, 128, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            loss(model(batch), target).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return torch.cat([nn.functional.normalize(model(batch)) for batch in images.split(2000)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fashion-mnist", type=Path, metavar="DIR", help="folder with its train-*-ubyte.gz files")
    parser.add_argument("--draws", type=int, default=5)
    arguments = parser.parse_args()
    sources = {"digits": digits()}
    if arguments.fashion_mnist:
        sources["Fashion-MNIST"] = fashion_mnist(arguments.fashion_mnist)

    row = "{:<14} {:>4} {:<24} {:>6} {:>6} {:>6} {:>6} {:>10} {:>7}".format
    print(row("data", "draw", "method", "ACC", "NMI", "true", "found", "interval", "s"))
    for name, (images, labels, epochs) in sources.items():
        for draw in tqdm(range(arguments.draws), desc=name):
            rng = np.random.default_rng(draw)
            torch.manual_seed(draw)
            order = rng.permutation(10)
            n_pseudo = 1 + draw % 2
            known = np.flatnonzero(np.isin(labels, order[:5]))
            rng.shuffle(known)
            train, held_out = np.split(known, [int(0.55 * len(known))])
            unknown = np.flatnonzero(np.isin(labels, order[5 + n_pseudo :]))
            embeddings = embed(images, train, labels, epochs).numpy()

            rejected, held_out = np.split(held_out, [len(held_out) // 10])
            reference = np.concatenate([held_out, np.flatnonzero(np.isin(labels, order[5 : 5 + n_pseudo]))])
            items = embeddings[np.concatenate([unknown, rejected])]
            known_items = {"known_embeddings": embeddings[reference], "known_labels": labels[reference]}
            n_true = 5 - n_pseudo
            methods = {
                "discover": known_items,
                "discover, no references": {},
                "discover, told": {"n_classes": n_true},
                "k-means, told": None,
            }
            for method, options in methods.items():
                start = perf_counter()
                if options is None:
                    groups, interval = KMeans(n_true, n_init=3, random_state=0).fit_predict(items), ""
                else:
                    discovery = discover(items, **options)
                    groups, interval = discovery.labels, "{}–{}".format(*discovery.n_classes_interval)
                seconds = perf_counter() - start
                m = discovery_metrics(labels[unknown], groups[: len(unknown)])
                values = (f"{m.accuracy:.3f}", f"{m.nmi:.3f}", n_true, m.n_classes_found, interval, f"{seconds:.1f}")
                tqdm.write(row(name, draw, method, *values))


if __name__ == "__main__":
    main()
